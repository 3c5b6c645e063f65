"""Make all that the course ships from nothing but its code: `make world`.

First the mini CLIP, then notebooks 03 to 06; after each, what it saved is copied to `mini_tuned/`.
Begun trainings are kept in `.cache/` and `runs/world/`: after a break the same command goes on, and repeats no finished one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

import gpnns_utils as gu
from gpnns.tools.run import run_notebook

RUNS = gu.work_folder() / "runs" / "world"
MADE = {  # notebook: which of its results are shipped, under their names without the number
    "03_finetune_arcmargin": ("03_arcmargin.safetensors", "03_arcmargin.json"),
    "04_realign_text_mcip": ("04_2sft.safetensors", "04_mcip_realigned.safetensors"),
    "05_average_soups": (),  # ships nothing, but has to run with what was made
    "06_normalize_neighbors_nnn": (),
}


def run_and_ship(name: str, shipped: tuple[str, ...]) -> str | None:
    """Run a notebook and copy what it ships; None when all went well, else what went wrong and where."""
    path = gu.COURSE / f"{name}.ipynb"
    failed = run_notebook(path, RUNS / path.name, {"profile": "world"})
    for file in () if failed else shipped:
        ship(RUNS / file, gu.DATA / "mini_tuned" / file.partition("_")[2])
    return failed


def ship(made: Path, target: Path) -> None:
    """A copy; weights of which only 06 and 07 search with, in half precision."""
    if made.suffix == ".safetensors" and made.name.startswith("04_"):
        save_file({key: value.half() for key, value in load_file(made).items()}, target)
    else:
        shutil.copyfile(made, target)


def main() -> int:
    started = time.time()
    RUNS.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "gpnns.tools.pretrain_mini_clip"], check=True)
    print(f"mini CLIP: {(time.time() - started) / 60:.0f} min", flush=True)
    for name, shipped in MADE.items():
        begun = time.time()
        print(f"{name} ...", end=" ", flush=True)
        if failed := run_and_ship(name, shipped):
            print(f"failed at {failed}\nThe executed copy is in {RUNS}; the same command goes on.")
            return 1
        print(f"{(time.time() - begun) / 60:.0f} min", flush=True)
    print(f"all of it: {(time.time() - started) / 60:.0f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
