"""What the machine is and does: its device and precision, a progress line, files that are there as a whole or not at all.

It stands below `gpnns_utils`, which passes all of it on, and imports nothing of the course.
"""

from __future__ import annotations

import contextlib
import html
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def best_device() -> torch.device:
    """A GPU that really computes, else the CPU. Some installations of torch see a GPU without having kernels for it (a
    P100 on Kaggle): asking is not enough, so one small product is computed."""
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # each process of a training on several GPUs has its own
    for name, there in ((cuda, torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if there:
            try:
                (torch.ones(8, 8, device=name) @ torch.ones(8, 8, device=name)).sum().item()
                return torch.device(name)
            except RuntimeError as error:
                warnings.warn(
                    f"this torch cannot use the {name} device ({str(error).splitlines()[0]}); using the CPU. On Kaggle, choose the accelerator 'GPU T4 x2'.",
                    stacklevel=2,
                )
    return torch.device("cpu")


def best_precision(device: torch.device) -> torch.dtype | None:
    """The autocast dtype the device gains from: bfloat16 from Ampere on, float16 on older GPUs (T4), None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


class Progress:
    """A progress line that updates in place and stays, in its last state, in a saved notebook; none for short work."""

    def __init__(self, total: int, label: str, unit: str = "images", done: int = 0):
        self.total, self.label, self.unit = total, label, unit
        self.done = self.first = done
        self.start, self.shown, self.handle = time.time(), 0.0, None

    def update(self, done: int, total: int | None = None) -> None:
        self.done, self.total = done, total or self.total
        now, pause = time.time(), 1 if in_notebook() else 10
        if now - max(self.shown, self.start) < pause and not (done >= self.total and self.shown):
            return
        self.shown = now
        if in_notebook():
            self.handle = display_over(self.handle, self)
        else:
            print(self, file=sys.stderr, flush=True)

    def __repr__(self) -> str:
        spent, here = time.time() - self.start, self.done - self.first
        if self.done >= self.total:
            return f"{self.label}: {here:,} {self.unit} in {spent:.0f} s"
        return f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {spent / max(here, 1) * (self.total - self.done):.0f} s left"

    def _repr_html_(self) -> str:
        bar = f"<progress value='{self.done}' max='{self.total}'></progress> "
        return bar * (self.done < self.total) + html.escape(repr(self))


def in_notebook() -> bool:
    """Whether a kernel runs this; asked without importing IPython."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def display_over(handle: Any, thing: Any) -> Any:
    """Show `thing` in place of what `handle` shows, or anew for None; returns the handle."""
    from IPython.display import display

    if handle is None:
        return display(thing, display_id=True)
    handle.update(thing)
    return handle


def write_atomically(path: Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file and move it to `path`: a killed process never leaves half a file there. When
    writing fails, as on a full disk, the temporary file is removed, an earlier `path` stays, and OSError says so."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # unique: threads and containers share folders
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    except OSError as error:
        kept = "what was there before is still there" if path.exists() else "nothing was written"
        raise disk_error(path, error, kept) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def disk_error(path: Path, error: Exception, kept: str) -> OSError:
    """The error to raise instead when writing failed: what happened and what is left."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free / 1e6
    reason = " ".join(str(error).split())[:200]
    return OSError(f"could not write {path} ({reason}; {free:,.0f} MB free); {kept}. Free some space and run again")
