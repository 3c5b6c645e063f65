"""The files of a folder: which are images, and what is passed over."""

from __future__ import annotations

import os
from pathlib import Path

from gpnns.images import image_set


def list_files(top: Path) -> tuple[list[Path], list[str]]:
    """All files below a folder by path, also behind symbolic links; and what is passed over: hidden folders, those of
    the system, those that may not be opened, and links that lead back up."""
    found, passed = [], []

    def closed(error: OSError) -> None:
        passed.append(f"{os.path.relpath(error.filename, top)} ({error.strerror})")

    for folder, below, names in os.walk(top, onerror=closed, followlinks=True):
        found += [Path(folder, name) for name in names if not image_set.is_hidden(name)]
        here = os.path.realpath(folder)
        for name in sorted(below):
            path = os.path.join(folder, name)
            upwards = os.path.islink(path) and (here + os.sep).startswith(os.path.realpath(path) + os.sep)
            if image_set.is_hidden(name) or upwards:
                passed.append(os.path.relpath(path, top) + (" (a link upwards)" if upwards else ""))
                below.remove(name)
    return sorted(found), passed


def list_subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not image_set.is_hidden(e.name))
    return [folder / name for name in names]


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder, by name."""
    return [folder / name for name in sorted(os.listdir(folder)) if image_set.is_image(name)]


def list_images_below(folder: Path) -> list[Path]:
    """The image files in a folder and all its subfolders, by path."""
    return [path for path in list_files(folder)[0] if image_set.is_image(path.name)]
