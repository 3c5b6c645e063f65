"""Images by name: where data sets lie, how they are fetched, how the layout of their authors is read.

`gpnns_utils.load_images(source, split)` calls `load`; own_images.py reads what has no name. What differs from one data
set to the next is in datasets.toml; a layout that no reader below understands yet is one more function in READERS. Each data set has a folder of its own name
in one of the folders of the environment variable GPNNS_DATA (several: separated as in PATH), or in .cache/datasets.

a set of images -> reading with several processes -> the table -> where data lie -> loading -> splits -> the papers' tables -> layouts -> downloads -> archives
"""

from __future__ import annotations

import collections
import csv
import difflib
import errno
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import pickle
import shutil
import ssl
import stat
import sys
import tarfile
import time
import tomllib
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

import gpnns_utils as gu

KAGGLE = Path("/kaggle/input")  # data sets that a Kaggle notebook was given; read only
TRIES, PAUSE, TIMEOUT = 4, 3.0, 60.0  # downloads: attempts without progress, seconds between them, seconds of silence


# --- a set of images -------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NO_LABELS = "has no labels: put each class into a folder of its own, or add a column 'label'"
PER_IMAGE = (
    "images",
    "labels",
    "groups",
    "captions",
    "crops",
    "rows",
)  # the fields of an ImageSet with one entry per image


@dataclass
class ImageSet:
    """Images and what is known about them. All fields but `names` have one entry per image.

    images: list of paths, or uint8 array (n, height, width, 3). labels: int64 (n,) class numbers. groups: (n,) domain
    names. captions: n lists of strings (a single string is taken as a list of one). names: class number -> readable
    name. left_out: files that could not be read, each with the reason. crops: int (n, 4), the part that counts of each
    picture file: left, top, right, bottom in pixels; a right or bottom below 1 counts from the other edge. rows: int64 (n,),
    which row of the first, whole set each image was: embeddings from before and after `leave_out` are matched by them.

    Raises ValueError for fields that do not belong together.
    """

    name: str
    images: Sequence[Path] | np.ndarray
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None
    captions: list[list[str]] | None = None
    names: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    crops: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __post_init__(self):
        if isinstance(self.images, (str, Path)):
            raise ValueError(f"images must be a list of paths, not {self.images!r}; load_images reads a folder")
        if isinstance(self.images, np.ndarray) and (self.images.dtype != np.uint8 or self.images.shape[3:] != (3,)):
            raise ValueError(
                f"{self.name}: an array of images is uint8 (n, height, width, 3), not {self.images.dtype} {self.images.shape}"
            )
        if not isinstance(self.images, np.ndarray) and (
            wrong := [image for image in self.images if not isinstance(image, (str, Path))]
        ):
            raise ValueError(
                f"{self.name}: images are paths, or one uint8 array (n, height, width, 3), not {type(wrong[0])}"
            )
        self.rows = np.arange(len(self)) if self.rows is None else self.rows
        self.names = list(self.names)
        for part in PER_IMAGE[1:]:
            values = getattr(self, part)
            if isinstance(values, str) or (values is not None and len(values) != len(self)):
                raise ValueError(f"{self.name}: {part} needs one entry for each of {len(self)} images")
        if self.labels is not None:
            self.labels = np.asarray(self.labels) if len(self) else np.empty(0, dtype=np.int64)
            if self.labels.ndim != 1:
                raise ValueError(f"{self.name}: labels are one number for each image, not an array {self.labels.shape}")
            if self.labels.dtype.kind not in "iu" or (len(self) and self.labels.min() < 0):
                raise ValueError(
                    f"{self.name}: labels are class numbers from 0, not {self.labels.dtype} such as {self.labels[0]!r}; "
                    "names, labels = np.unique(texts, return_inverse=True) makes them from texts"
                )
            if self.names and len(self) and self.labels.max() >= len(self.names):
                raise ValueError(f"{self.name}: label {self.labels.max()} has no name; there are {len(self.names)}")
        self.groups = None if self.groups is None else np.asarray(self.groups)
        self.crops = None if self.crops is None else np.asarray(self.crops)
        if self.captions is not None:
            listed = [one if isinstance(one, (list, tuple)) else [] if one is None else [one] for one in self.captions]
            self.captions = [list(one) for one in listed]
            if wrong := [one for some in self.captions for one in some if not isinstance(one, str)]:
                raise ValueError(f"{self.name}: captions are lists of strings for each image, not {wrong[0]!r}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Image.Image:
        image = self.images[row]
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(np.asarray(image))
        return open_image(image, None if self.crops is None else self.crops[row])

    def describe(self, row: int) -> str:
        """Where an image comes from, for messages: its path, or its row."""
        array = isinstance(self.images, np.ndarray)
        return f"row {row} of {self.name}" if array else gu.own_images.printable(self.images[row])

    def subset(self, rows: Sequence[int] | np.ndarray) -> ImageSet:
        """The images of `rows` (numbers, or a boolean mask) as a new set. ValueError for rows that are not there."""
        rows = gu.row_numbers(rows, len(self), "rows")
        parts = {part: values for part in PER_IMAGE if (values := getattr(self, part)) is not None}
        parts = {k: v[rows] if isinstance(v, np.ndarray) else [v[i] for i in rows] for k, v in parts.items()}
        return replace(self, **parts, left_out=list(self.left_out))

    def digest(self, row: int) -> bytes:
        """A hash of an image's content (file bytes or pixels); of its path when the file cannot be opened."""
        image = self.images[row]
        try:
            if isinstance(self.images, np.ndarray):
                content = image.tobytes() + str(image.shape).encode()
            else:
                check_regular(image)
                crop = "" if self.crops is None else repr(self.crops[row].tolist())
                content = Path(image).read_bytes() + crop.encode()
        except (OSError, ValueError):
            content = b"unreadable " + os.fsencode(image)
        return hashlib.blake2b(content, digest_size=16).digest()

    def digests(self) -> list[bytes]:
        """`digest` of every image. Files are read by several threads: a disk, or a network, answers many at once."""
        progress, found = gu.Progress(len(self), f"reading {self.name}"), []
        with ThreadPoolExecutor(8) as pool:
            for rows in gu.consecutive(len(self), 1024):
                found += pool.map(self.digest, rows)
                progress.update(len(found))
        return found

    def leave_out(self, rows: np.ndarray, why: str = "cannot be read") -> None:
        """Take out images that cannot be used, and say so once: in `left_out`, and in a warning."""
        reasons = []
        for row in rows:
            try:
                self[row]
                reasons.append(self.describe(row))
            except Exception as error:
                reasons.append(f"{self.describe(row)} ({type(error).__name__})")
        total = len(self)
        if len(rows) == total:
            raise ValueError(f"{self.name}: all {total} images {why}; the first is {reasons[0]}")
        kept = self.subset(np.setdiff1d(np.arange(total), rows))
        for part in PER_IMAGE:
            setattr(self, part, getattr(kept, part))
        self.left_out += reasons
        shown = ", ".join(reasons[:5]) + (f" and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        warnings.warn(f"{self.name}: {len(rows)} of {total} images {why} and are left out: {shown}", stacklevel=3)


def text_queries(images: ImageSet) -> tuple[list[str], list[np.ndarray]]:
    """Every caption of a set once, in alphabetical order, and for each the rows of the images that carry it."""
    carried = {}
    for row, captions in enumerate(images.captions or []):
        for caption in dict.fromkeys(caption for caption in captions if caption.strip()):
            carried.setdefault(caption, []).append(row)
    return sorted(carried), [np.array(carried[caption]) for caption in sorted(carried)]


def domains(images: ImageSet) -> dict[str, np.ndarray]:
    """Which images belong to each group, {name: bool (n,)}, in the order in which they come; nothing where none is known."""
    groups = [] if images.groups is None else images.groups
    return {str(name): np.asarray(groups) == name for name in dict.fromkeys(groups)}


def parts(images: ImageSet, most: int = 6) -> dict[str, np.ndarray]:
    """The rows of each group of a set, by name, of at most `most` groups; of equal parts where no groups are known."""
    if found := domains(images):
        return {name: np.flatnonzero(inside) for name, inside in list(found.items())[:most]}
    cut = np.array_split(np.arange(len(images)), most)
    return {f"part {i}": rows for i, rows in enumerate(cut, 1) if len(rows)}


def class_texts(images: ImageSet) -> tuple[list[str], np.ndarray]:
    """One text for each class: the longest caption that all of its images share, or else its name. Classes may share one.

    Returns the texts in alphabetical order and, for each image, the number of its own, int64 (n,).
    """
    shared = {}
    for label, captions in zip(images.labels, images.captions or [[]] * len(images), strict=True):
        told = {caption for caption in captions if caption.strip()}
        shared[label] = shared.get(label, told) & told
    text_of = {label: max(sorted(told), key=len, default=images.names[label]) for label, told in shared.items()}
    number = {text: i for i, text in enumerate(sorted(set(text_of.values())))}
    return list(number), np.array([number[text_of[label]] for label in images.labels], dtype=np.int64)


def open_image(path: Path | io.BytesIO, crop: Sequence[int] | None = None) -> Image.Image:
    """Read an image as RGB: turned upright as its EXIF data say, transparent parts on white, 16 bits and shares cut to 8.

    path: a file, or the bytes of one. crop: a box as in `ImageSet.crops`, in the pixels of the file.
    """
    if not isinstance(path, io.BytesIO):
        check_regular(path)
    with Image.open(path) as image:
        if crop is not None:
            left, top, right, bottom = (int(edge) for edge in crop)
            right, bottom = right + image.width * (right < 1), bottom + image.height * (bottom < 1)
            image = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = eight_bits(np.asarray(image))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_or_none(read: Callable[[], Image.Image]) -> Image.Image | None:
    """What `read()` gives, or None for a file that cannot be read; when it is the machine that fails, that is raised."""
    try:
        return read()
    except Exception as error:  # a decoder may raise anything on broken data
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in EXHAUSTED:
            raise  # not the file's trouble: stop, and go on later
        return None


def eight_bits(values: np.ndarray) -> Image.Image:
    """Gray values as 8 bits: of 16 bits, of 8 in wider numbers, or from 0 to 1. ValueError for others, such as heights."""
    low, high = values.min(), values.max()
    most = 1 if values.dtype.kind == "f" and high <= 1 else 255 if high <= 255 and values.itemsize > 2 else 65_535
    if not 0 <= low <= high <= most or (values.dtype.kind == "f" and most > 1):
        raise ValueError(f"its values go from {low} to {high}; save it with 8 or 16 bits")
    return Image.fromarray(
        (values * (255 / most)).astype(np.uint8) if most <= 255 else (values // 257).astype(np.uint8)
    )


def check_regular(path: Path) -> None:
    """ValueError for what only looks like a file: a pipe would be waited on for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file")


# --- reading with several processes ----------------------------------------------------------------------------------

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of a machine short of file handles or memory


class Decoded(Dataset):
    """Preprocessed images by row; None for one that cannot be read."""

    def __init__(self, images: ImageSet, preprocess: Callable):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, row: int) -> torch.Tensor | None:
        image = image_or_none(lambda: self.images[row])
        return None if image is None else self.preprocess(image)


def stacked(items: list[torch.Tensor | None]) -> tuple[int, list[int], np.ndarray]:
    """A batch of `Decoded`: its size, which of its images were readable, and those as one array."""
    readable = [i for i, item in enumerate(items) if item is not None]
    pixels = torch.stack([items[i] for i in readable]) if readable else torch.empty(0)
    pixels = pixels.float() if pixels.dtype == torch.bfloat16 else pixels  # which numpy does not know
    return len(items), readable, pixels.numpy()


def decoders(images: ImageSet) -> int:
    """How many processes should decode: none for arrays and for a handful of files."""
    return 0 if isinstance(images.images, np.ndarray) or len(images) < 64 else min(8, os.cpu_count() or 1)


def from_workers(dataset: Dataset, batches: Iterable, workers: int, collate: Callable) -> Iterator:
    """What `collate` makes of the items of each batch, in order, read by worker processes; 0 for this one.

    collate must return numpy arrays, which travel through pipes. torch would put every tensor into shared memory, of
    which Docker gives 64 MB in all, and keep a file open for it. Where workers cannot be started or are lost, half as
    many go on where they were, and at last this process alone, with the same results and a warning.
    """
    batches, asked, broken = iter(batches), collections.deque(), []

    def draw(again: list) -> Iterator:
        yield from again
        try:
            for batch in batches:
                asked.append(batch)
                yield batch
        except Exception as error:  # not the workers' fault
            broken.append(error)

    while True:
        try:
            loader = DataLoader(dataset, batch_sampler=draw(list(asked)), num_workers=workers, collate_fn=collate)
            for items in loader:
                asked.popleft()
                yield items
            if broken:
                raise broken[0]
            if asked:
                raise ValueError(
                    f"an item of the rows {asked[0]} raised StopIteration, which would end the reading unseen"
                )
            return
        except (OSError, RuntimeError, MemoryError) as error:
            short = isinstance(error, MemoryError) or any(f"[Errno {code}]" in str(error) for code in EXHAUSTED)
            if workers == 0 or broken or ("in DataLoader worker process" in str(error) and not short):
                raise
            workers, lost = workers // 2, workers
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            warnings.warn(
                f"{lost} processes that read images could not go on ({reason}); going on with {workers or 'this one alone'}. "
                "They need memory, open files (see `ulimit -n`) and, in a container, some shared memory (docker run "
                "--shm-size=1g)",
                stacklevel=2,
            )


# --- the table -------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, dict]:
    """datasets.toml as name -> entry. An entry that is `like` another takes over the fields it does not set itself."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: {"folder": entry.get("like", name), **table.get(entry.get("like"), {}), **entry}
        for name, entry in table.items()
    }


TABLE = read_table(Path(__file__).with_name("datasets.toml"))


def overview() -> list[dict]:
    """One dict per data set: name, title, splits with their counts, licence, how to get it, where it was found."""
    rows = []
    for name, entry in TABLE.items():
        splits = [split + (f" {counts[0]:,}" if counts else "") for split, counts in entry["splits"].items()]
        found = {str(folder) for split in entry["splits"] if (folder := find(name, split))}
        by_hand = "get" in entry or not all("url" in file for file in entry.get("files", []))
        rows.append(
            {
                "name": name,
                "title": entry["title"],
                "images": ", ".join(splits),
                "licence": entry.get("licence", "see its home page"),
                "get": "by hand" if by_hand else "downloaded",
                "found": ", ".join(sorted(found)) or "not found",
            }
        )
    return rows


# --- where data lie --------------------------------------------------------------------------------------------------


def data_folders() -> list[Path]:
    """The folders in which each data set has a folder of its own name, in the order in which they are searched."""
    given = [Path(part).expanduser() for part in os.environ.get("GPNNS_DATA", "").split(os.pathsep) if part]
    return [*given, gu.cache_folder() / "datasets"]


def places(name: str) -> list[Path]:
    """Where the data set may lie: its folder in each of `data_folders`."""
    return [folder / TABLE[name]["folder"] for folder in data_folders()]


def find(name: str, split: str) -> Path | None:
    """The folder that holds what a split needs, or None; never one whose download was interrupted."""
    markers = for_split(TABLE[name]["marker"], split)
    for place in places(name):
        if not (place / f".incomplete_{split}").exists() and (folder := find_below(place, markers)):
            return folder
    return find_below(KAGGLE, markers, depth=6)


def for_split(value, split: str):
    """A field's value, or its value for this split where the table has one for each."""
    return value[split] if isinstance(value, dict) else value


def find_below(top: Path, markers: list[list[str]], depth: int = 4) -> Path | None:
    """The first folder, `top` or below, in which all paths of one marker exist. Archives and sites add folders on top."""
    level = [top] if top.is_dir() else []
    for _ in range(depth + 1):
        for folder in level:
            for paths in markers:
                if all(next(folder.glob(p), None) if "*" in p else (folder / p).exists() for p in paths):
                    return folder
        # many subfolders are classes, or train/a/b/c: nothing to find there, and slow to look through
        below = [subfolders(folder) for folder in level[:300]]
        level = [sub for subs in below if len(subs) <= 100 for sub in subs]
    return None


SYSTEM = {  # folders that file managers, archives and network disks add to every other
    "__MACOSX", "@eaDir", "#recycle", "@Recycle", "#snapshot", "$RECYCLE.BIN", "RECYCLER", "System Volume Information",
    "lost+found", "__pycache__",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def walk(top: Path) -> tuple[list[Path], list[str]]:
    """All files below a folder by path, also behind symbolic links; and what is passed over: hidden folders, those of
    the system, those that may not be opened, and links that lead back up."""
    found, passed = [], []

    def closed(error: OSError) -> None:
        passed.append(f"{os.path.relpath(error.filename, top)} ({error.strerror})")

    for folder, below, names in os.walk(top, onerror=closed, followlinks=True):
        found += [Path(folder, name) for name in names if not is_hidden(name)]
        here = os.path.realpath(folder)
        for name in sorted(below):
            path = os.path.join(folder, name)
            upwards = os.path.islink(path) and (here + os.sep).startswith(os.path.realpath(path) + os.sep)
            if is_hidden(name) or upwards:
                passed.append(os.path.relpath(path, top) + (" (a link upwards)" if upwards else ""))
                below.remove(name)
    return sorted(found), passed


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
    return [folder / name for name in names]


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder, by name."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if is_image(e.name))
    return [folder / name for name in names]


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and all its subfolders, by path."""
    return [path for path in walk(folder)[0] if is_image(path.name)]


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


# --- loading ---------------------------------------------------------------------------------------------------------


def load(source: str | Path, split: str = "test") -> ImageSet:
    """The images that `source` names, as `gpnns_utils.load_images` describes them; prints what was taken as what.

    Raises FileNotFoundError for what is nowhere, ValueError for what cannot be understood.
    """
    notes = []
    if not str(source).strip():
        raise ValueError("name the images: mini, a data set, a folder or a table ('.' is the current folder)")
    parts = [part.strip().partition(":") for part in str(source).split(" + ")]
    if str(source) == "mini":
        from gpnns_utils import mini_world

        report = gu.Progress(0, f"drawing mini world, {split}").update
        images = ImageSet(name=f"mini {split}", **mini_world.load_split(split, gu.cache_folder(), report=report))
    elif all(name in TABLE for name, _, _ in parts) and not is_own(source, split):
        images = ImageSet(**load_all([(name, own or split) for name, _, own in parts]))
    else:
        fields, notes = load_own(Path(source).expanduser(), split)
        images = ImageSet(**fields)
    print(summary(images, notes))
    return images


def is_own(source: str | Path, split: str) -> bool:
    """Whether a name of a data set means a folder of one's own, which it does when one lies here under that name."""
    place = Path(source)
    if not place.is_dir():
        return False
    found = find(str(source), split)
    if found is None or isinstance(source, Path):
        return True
    if place.resolve() in (found.resolve(), *found.resolve().parents):
        return False  # the data set itself lies there
    raise ValueError(
        f"{str(source)!r} is a folder here, and a data set that was found at {found}; write './{source}' for the folder, "
        f"or rename it"
    )


def summary(images: ImageSet, notes: Sequence[str] = ()) -> str:
    """One line that says what a set holds, how it was understood, and what was left out."""

    def count(number: int, one: str, many: str) -> str:
        return f"{number:,} {one if number == 1 else many}"

    parts = [count(len(images), "image", "images")]
    if images.labels is not None:
        parts.append(count(len(np.unique(images.labels)), "class", "classes"))
    if images.groups is not None:
        parts.append(count(len(np.unique(images.groups)), "group", "groups"))
    if images.captions is not None:
        parts.append(count(sum(map(len, images.captions)), "caption", "captions"))
    parts += ["no labels"] if images.labels is None and images.captions is None else []
    line = f"{images.name}: {', '.join([*parts, *notes[:1]])}"
    for note in notes[1:]:
        line += f"; {note}"
    if images.left_out:
        more = f" and {len(images.left_out) - 3} more" if len(images.left_out) > 3 else ""
        files = count(len(images.left_out), "file", "files")
        line += f"; {files} left out: {', '.join(images.left_out[:3])}{more}"
    return line


def load_named(name: str, split: str = "test") -> dict:
    """The fields of an ImageSet for one split of a data set, fetched first when it is nowhere and may be downloaded.

    Raises ValueError for a split that does not exist and for numbers of images or classes other than the table's,
    FileNotFoundError for what must be got by hand, ConnectionError when a download fails.
    """
    rows, names = read(name, split)
    entry, numbers = TABLE[name], None
    wanted = [row for row in rows if row["split"] == split]
    if "label" in wanted[0]:
        labels = [row["label"] for row in wanted]
        if names is None:  # labels are texts: number those of the splits that share classes, in alphabetical order
            together = {split, *(entry.get("same_classes", []) if split in entry.get("same_classes", []) else [])}
            names = sorted({row["label"] for row in rows if row["split"] in together})
            number = {label: i for i, label in enumerate(names)}
            labels = [number[label] for label in labels]
        numbers = np.array(labels, dtype=np.int64)
    check_counts(entry, split, wanted, numbers)
    first = wanted[0]
    return {
        "name": f"{name} {split}",
        "images": [row["path"] for row in wanted],
        "labels": numbers,
        "groups": np.array([row["group"] for row in wanted]) if "group" in first else None,
        "captions": [row["captions"] for row in wanted] if "captions" in first else None,
        "names": names or [],
        "crops": np.array([row["crop"] for row in wanted], dtype=np.int64) if "crop" in first else None,
    }


def load_all(parts: Sequence[tuple[str, str]]) -> dict:
    """The fields of one ImageSet for several data sets, given as (name, split); each becomes a group of the whole.

    Raises ValueError when one of them has no labels, or shows only parts of its pictures.
    """
    loaded = [load_named(name, split) for name, split in parts]
    if len(loaded) == 1:
        return loaded[0]
    together = " + ".join(one["name"] for one in loaded)
    if unfit := [one["name"] for one in loaded if one["labels"] is None or one["crops"] is not None]:
        raise ValueError(f"{together}: {unfit[0]} has no labels, or crops; load it by itself")
    begins = np.cumsum([0, *(len(one["names"]) for one in loaded)])
    return {
        "name": together,
        "images": [path for one in loaded for path in one["images"]],
        "labels": np.concatenate([one["labels"] + begin for one, begin in zip(loaded, begins, strict=False)]),
        "groups": np.repeat([one["name"] for one in loaded], [len(one["images"]) for one in loaded]),
        "captions": None,
        "names": [f"{one['name']}/{name}" for one in loaded for name in one["names"]],
        "crops": None,
    }


def load_own(source: Path, split: str) -> tuple[dict, list[str]]:
    """The fields of an ImageSet for images of one's own, and notes on how they were understood (own_images.py)."""
    if not source.exists():
        raise FileNotFoundError(
            f"no folder or table of images at {source.absolute()}; give a path, 'mini' for the drawn world, or the name of "
            f"a data set{suggest(str(source), list(TABLE))}"
        )
    rows, left_out, notes = gu.own_images.read(source, split)
    names, numbers = np.unique([row.get("label") or "" for row in rows], return_inverse=True)
    groups, captions = [row.get("group") or "" for row in rows], [row.get("captions") or [] for row in rows]
    return {
        "name": gu.own_images.printable(source.absolute().name if source.is_dir() else source.stem),
        "images": [row["path"] for row in rows],
        "labels": numbers if names.any() else None,
        "groups": np.array(groups) if any(groups) else None,
        "captions": captions if any(captions) else None,
        "names": names.tolist() if names.any() else [],
        "left_out": left_out,
    }, notes


def read(name: str, split: str) -> tuple[list[dict], list[str] | None]:
    """The rows of a data set as its reader gives them: of `split`, and of other splits where one list holds both."""
    entry = TABLE[name]
    if split not in entry["splits"]:
        raise ValueError(f"{entry['title']} has no split {split!r}; {name} has {', '.join(entry['splits'])}")
    folder = find(name, split) or fetch(name, split)
    try:
        rows, names = READERS[entry["layout"]](folder, split, entry)
    except BROKEN_LIST as error:
        if entry["title"] in str(error) or str(folder) in str(error):
            raise  # it says what is wrong already
        raise ValueError(
            f"{entry['title']}: the lists in {folder} are not as its authors hand them out ({type(error).__name__}: {error}); get them again"
        ) from error
    if not any(row["split"] == split for row in rows):
        raise ValueError(f"{entry['title']}, {split}: no images below {folder}; look at the layout in data/README.md")
    return rows, names


BROKEN_LIST = (KeyError, IndexError, TypeError, AttributeError, ValueError)  # what a list with other columns leads to


def check_counts(entry: dict, split: str, rows: list[dict], numbers: np.ndarray | None) -> None:
    """Raise ValueError when a split has not as many images and classes as the table says."""
    classes = None if numbers is None else len(np.unique(numbers))
    for what, expected, found in zip(("images", "classes"), entry["splits"][split], (len(rows), classes), strict=False):
        if found != expected:
            word = "missing" if found < expected else "too many"
            raise ValueError(
                f"{entry['title']}, {split}: expected {expected:,} {what} and found {found:,} below "
                f"{common_folder(rows)} ({abs(found - expected):,} {word}); compare with {entry['home']}, or unpack again"
            )


def check_listed(rows: list[dict], split: str, entry: dict) -> None:
    """Compare a data set's lists with its files. ValueError when listed images are missing, a warning for others.

    rows: of every split whose images lie together, so that an image of another split is not called unknown.
    """
    top = common_folder(rows)
    found = {str(path) for path in images_below(top)}
    wanted = [str(row["path"]) for row in rows if row["split"] == split]
    if missing := [path for path in wanted if path not in found]:
        raise ValueError(
            f"{entry['title']}, {split}: expected {len(wanted):,} images and found {len(wanted) - len(missing):,} below {top}; "
            f"{missing[0]} is missing. Unpack its archive again"
        )
    unlisted, expected = found - {str(row["path"]) for row in rows}, entry.get("unlisted", 0)
    if expected != "any" and len(unlisted) != expected:
        example = f", for example {min(unlisted)}" if unlisted else ""
        warnings.warn(
            f"{entry['title']}: expected {expected:,} images below {top} that are in none of its lists, and found "
            f"{len(unlisted):,}{example}; they are left out",
            stacklevel=6,
        )


def common_folder(rows: list[dict]) -> Path:
    """The deepest folder that holds the images of all rows."""
    return Path(os.path.commonpath({os.path.dirname(row["path"]) for row in rows}))


def ground_truth(name: str) -> list[dict]:
    """For each image of split "query" a dict of rows of split "gallery": "easy", "hard", "junk", as revisited_map of notebook 07 takes.

    Revisited Oxford and Paris: as their authors judged. Google Landmarks: all relevant images are under "easy". Other
    data sets with a query and a gallery split: images that share a class, under "easy", the same file under "junk".
    """
    entry = TABLE[name]
    if not {"query", "gallery"} <= set(entry["splits"]):
        raise ValueError(f"{entry['title']} has no query and gallery splits: its labels say what is relevant")
    if entry["layout"] == "revisited":
        truth = read_revisited(find(name, "query") or fetch(name, "query"), entry)["gnd"]
        return [{key: np.atleast_1d(np.asarray(one[key], dtype=np.int64)) for key in TRUTH} for one in truth]
    queries = [row for row in read(name, "query")[0] if row["split"] == "query"]
    gallery = [row for row in read(name, "gallery")[0] if row["split"] == "gallery"]
    rows_of: dict = {}  # what makes an image relevant -> rows of the gallery: its name for Google Landmarks, else its class
    for i, row in enumerate(gallery):
        keys = [Path(row["path"]).stem] if entry["layout"] == "gldv2" else row.get("labels", [row["label"]])
        for key in keys:
            rows_of.setdefault(key, []).append(i)
    file_row = {str(row["path"]): i for i, row in enumerate(gallery)}
    truth = []
    for row in queries:
        own = file_row.get(str(row["path"]))
        wanted = {i for key in row.get("relevant", row.get("labels", [row["label"]])) for i in rows_of.get(key, [])}
        easy, junk = sorted(wanted - {own}), [] if own is None else [own]
        truth.append(dict(zip(TRUTH, (np.array(part, dtype=np.int64) for part in (easy, [], junk)), strict=True)))
    return truth


TRUTH = ("easy", "hard", "junk")


def suggest(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is not known: those most like it."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


# --- splits ----------------------------------------------------------------------------------------------------------


def split_classes(images: ImageSet, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Cut off `share` of the classes, at least two: (the rest, those). Select models on them, not on a benchmark.

    Only classes with two images or more are cut off, because a single image has nothing to find. Raises ValueError
    without labels, or when there are too few classes for both sides.
    """
    if images.labels is None:
        raise ValueError(f"{images.name} {NO_LABELS}")
    classes, counts = np.unique(images.labels, return_counts=True)
    measurable = classes[counts > 1]
    number = max(2, min(round(share * len(classes)), len(measurable)))
    if len(classes) - number < 2 or len(measurable) < 2:
        raise ValueError(
            f"{images.name} has {len(classes)} classes; at least {number + 2} are needed, {number} of them, with two images or more, to measure on: add classes"
        )
    held = np.isin(images.labels, np.random.default_rng(seed).choice(measurable, number, replace=False))
    return images.subset(~held), images.subset(held)


@dataclass
class Splits:
    """What `load_splits` gives: images to learn from, and twice queries and the gallery that they search.

    question "open": things that were never trained on, where all images of a part search each other (queries is gallery,
    and a query leaves itself out). question "closed": other pictures of the things that are trained on, which search the
    training images; labels of all sets then mean the same classes.

    text_validation, text_test: the images whose captions ask. In the drawn world those of its caption test, of other
    images the queries of validation and test themselves; the name of its class asks for an image without a caption.
    """

    question: str
    train: ImageSet
    validation: tuple[ImageSet, ImageSet]
    test: tuple[ImageSet, ImageSet]
    text_validation: ImageSet
    text_test: ImageSet

    def open_sets(self) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Train, validation and test of an open question. ValueError for a closed one."""
        if self.question == "closed":
            raise ValueError(
                f"{self.test[0].name} shows the classes that are trained on, so it asks for things known (closed); here they must "
                "be others (open): give images of other classes, or none, so that classes are cut off"
            )
        return self.train, self.validation[0], self.test[0]


def load_splits(train_images: str | Path, test_images: str | Path = "", seed: int = 0) -> Splits:
    """Labelled images to learn from, to choose on and to measure on; prints which question they answer.

    "mini" brings its own three parts. Of others, those to measure on are `test_images`, or the split "test" of
    `train_images` where it has one, or else a fifth of the classes, cut off. When they show none of the classes that are
    trained on the question is open, when they show only those it is closed: can new pictures of known things be found?
    To choose on serves a split "validation" that asks the same, or else a tenth of the classes (open) or of the images
    (closed) is cut off. Where `train_images` has splits "query" and "gallery" those are the test.

    Raises ValueError without labels, for too few classes, for a test that mixes both questions, and when a picture of a
    closed test is trained on.
    """
    drawn = str(train_images) == "mini"  # whose classes have the same names in every part, and are others
    train, searched = load(train_images, "train"), None
    if drawn:
        if test_images:
            raise ValueError("test_images belong to train_images of your own; the drawn world brings its test")
        validation, test = load("mini", "validation"), load("mini", "test")
    else:
        if train.labels is None:
            raise ValueError(f"{train_images} {NO_LABELS}")
        test = load(test_images, "test") if test_images else load_beside(train_images, "test")
        validation = load_beside(train_images, "validation")
        if test is None and not test_images:
            queries, gallery = (load_beside(train_images, part) for part in ("query", "gallery"))
            test, searched = (queries, gallery) if queries and gallery else (None, None)
        if test is None:
            train, test = split_classes(train, 0.2, seed)
    if test.labels is None:
        raise ValueError(f"{test.name} {NO_LABELS}")
    question = "open" if drawn else question_of(train, test)
    if not drawn and validation and (validation.labels is None or question_of(train, validation, "") != question):
        print(f"{validation.name} does not ask the same ({question}) as {test.name}, and is left aside")
        validation = None
    if question == "open" and validation and not drawn and question_of(test, validation, "") != "open":
        print(f"{validation.name} shows classes of {test.name}, which must not choose, and is left aside")
        validation = None
    if searched is not None:
        test = check_apart(with_labels_of(searched, test), searched)
    if question == "open":
        if searched is None and (np.unique(test.labels, return_counts=True)[1] > 1).sum() < 2:
            raise ValueError(f"{test.name} needs at least two classes with two images each, to measure on")
        for held in () if drawn else filter(None, (test, searched, validation)):
            if twice := images_in_both(train, held):
                print(
                    f"{len(twice)} of {len(held)} images of {held.name} are in {train.name} too, under other labels; they are taken out of it"
                )
                train = train.subset(np.setdiff1d(np.arange(len(train)), [row for row, _ in twice]))
        if validation is None:
            train, validation = split_classes(train, 0.1, seed)
        gallery = test if searched is None else searched
        asked = [load("mini", part) for part in ("captions_validation", "captions")] if drawn else (validation, test)
        splits = Splits(question, train, (validation, validation), (test, gallery), *map(asked_by_name, asked))
        how = f"{len(np.unique(test.labels))} classes that are not trained on; " + (
            "their images search each other"
            if searched is None
            else f"they search {len(searched):,} images of their own"
        )
    else:
        test = check_apart(with_labels_of(train, test), train) if searched is None else test
        if validation is None:
            train, validation = split_images(train, 0.1, seed)
        else:
            validation = check_apart(check_apart(with_labels_of(train, validation), train), test)
        gallery = train if searched is None else searched
        splits = Splits(question, train, (validation, train), (test, gallery), *map(asked_by_name, (validation, test)))
        how = (
            f"{len(test):,} other images of classes that are trained on; they search the {len(train):,} training images"
        )
    print(f"the question is {question}: {how}")
    return splits


def asked_by_name(images: ImageSet) -> ImageSet:
    """The same images, the name of its class as the caption of each that has none."""
    told = [[text for text in texts if text.strip()] for texts in images.captions or [[]] * len(images)]
    names = [[]] * len(images) if images.labels is None else [[images.names[label]] for label in images.labels]
    captions = [texts or name for texts, name in zip(told, names, strict=True)]
    return replace(images, captions=captions, left_out=list(images.left_out))


def load_beside(source: str | Path, split: str) -> ImageSet | None:
    """Another split of the same source, or None where it has none."""
    if not has_split(source, split):
        return None
    images = load(source, split)
    return images if images.name.endswith(f" {split}") else replace(images, name=f"{images.name} {split}")


def has_split(source: str | Path, split: str) -> bool:
    """Whether a data set, a folder or a table has a split of that name; not asked of several sets, or of a split itself."""
    if all(part.strip().partition(":")[0] in TABLE for part in str(source).split(" + ")) and not Path(source).exists():
        return str(source) in TABLE and split in TABLE[str(source)]["splits"]
    return gu.own_images.has_split(Path(source).expanduser(), split)


def question_of(train: ImageSet, other: ImageSet, mixed: str | None = None) -> str:
    """ "open" when two sets share no class, "closed" when the second shows only classes of the first, else `mixed`, or a
    ValueError."""
    shown = {other.names[label] for label in np.unique(other.labels)}
    known = {train.names[label] for label in np.unique(train.labels)}
    shared = sorted(shown & known)
    if not shared or shared == sorted(shown):
        return "closed" if shared else "open"
    if mixed is None:
        raise ValueError(
            f"{len(shared)} of the {len(shown)} classes of {other.name} are trained on, for example {shared[0]}, and others are "
            f"not, for example {min(shown - known)}: ask for known things (closed) or for new ones (open), not for both at once"
        )
    return mixed


def with_labels_of(train: ImageSet, other: ImageSet) -> ImageSet:
    """The other set with the class numbers of the first. ValueError when that has not all of its classes."""
    numbers = {name: number for number, name in enumerate(train.names)}
    if missing := sorted({other.names[label] for label in other.labels} - set(numbers)):
        raise ValueError(f"{train.name} has no image of {missing[0]}, which {other.name} asks for")
    return replace(other, labels=np.array([numbers[other.names[label]] for label in other.labels]), names=train.names)


def check_apart(other: ImageSet, train: ImageSet) -> ImageSet:
    """The other set; ValueError when a picture of it is in the first: it would find itself."""
    if twice := images_in_both(train, other):
        raise ValueError(
            f"{len(twice)} of {len(other)} images of {other.name} are also in {train.name}, for example "
            f"{other.describe(twice[0][1])} as {train.describe(twice[0][0])}: each would find itself; take them out of one"
        )
    return other


def images_in_both(one: ImageSet, other: ImageSet) -> list[tuple[int, int]]:
    """(row, row) of the images that two sets share. Only files of the same size are read."""

    def sizes(images: ImageSet) -> list[int]:
        return [0 if isinstance(images.images, np.ndarray) else file_size(Path(path)) for path in images.images]

    ours, theirs = np.array(sizes(one)), np.array(sizes(other))
    rows, others = np.flatnonzero(np.isin(ours, theirs)), np.flatnonzero(np.isin(theirs, ours))
    known = dict(zip(other.subset(others).digests(), others, strict=True))
    return [(row, known[d]) for row, d in zip(rows, one.subset(rows).digests(), strict=True) if d in known]


def split_images(images: ImageSet, share: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Cut off `share` of the images, of classes that keep at least one: (the rest, those). ValueError when there are none."""
    left, cut = np.bincount(images.labels), []
    for row in np.random.default_rng(seed).permutation(len(images)):
        if left[images.labels[row]] > 1 and len(cut) < max(2, round(share * len(images))):
            left[images.labels[row]] -= 1
            cut.append(row)
    if len(cut) < 2:
        raise ValueError(
            f"{images.name} has one image for nearly every class, so that none can be set apart to choose on; add images, or a "
            "folder 'validation' with others beside 'train'"
        )
    held = np.isin(np.arange(len(images)), cut)
    return images.subset(~held), images.subset(held)


# --- the papers' tables ----------------------------------------------------------------------------------------------


def load_published(name: str) -> list[dict]:
    """A table of the papers, data/published/<name>.csv: one dict per row, numbers as float, empty cells as None."""
    path = gu.DATA / "published" / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"no published table {name!r}; there are {', '.join(sorted(p.stem for p in path.parent.glob('*.csv')))}"
        )
    return numbers_of(path)


def numbers_of(path: Path) -> list[dict]:
    """A small table of the course, such as data/claims.csv: one dict per row, numbers as int or float, empty cells as None."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: None if value == "" else number_or_text(value) for key, value in row.items()} for row in rows]


def number_or_text(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# --- layouts ---------------------------------------------------------------------------------------------------------
# read_*(folder, split, entry) -> (rows, names). A row: path, split, and what is known of label, group, captions, crop
# (left, top, right, bottom; a right or bottom below 1 counts from the other edge). Either names is None and labels are
# readable texts, or labels are numbers and names lists all classes.


def lines_of(path: Path) -> list[list[str]]:
    """The lines of a text file, split at spaces."""
    return [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def read_json(path: Path):
    """The content of a .json file; ValueError names a damaged one."""
    text = gu.own_images.read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); correct it, or get it again") from error


def read_csv(path: Path) -> Iterator[dict]:
    """The lines of a .csv file as dicts, one at a time: some have millions."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def read_mat(path: Path) -> dict:
    """A MATLAB file as plain dicts and arrays. scipy comes with scikit-learn; only these files need it."""
    from scipy.io import loadmat

    try:
        return loadmat(path, simplify_cells=True)
    except Exception as error:  # loadmat raises whatever the broken bytes lead to
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); get it again") from error


def first_of(folder: Path, *paths: str) -> Path:
    """The first of several relative paths that exists, else the first: the message for a missing file then names it."""
    return next((folder / path for path in paths if (folder / path).exists()), folder / paths[0])


def read_gpr1200(folder: Path, split: str, entry: dict):
    """GPR1200: `images/CLASS_name.jpg`; 200 classes for each of six domains, in this order."""
    domains = ("landmarks", "nature", "sketches", "objects", "products", "faces")
    per_domain = entry["splits"][split][1] // len(domains)
    texts = folder / "categoryNumber_to_text.json"
    texts = read_json(texts) if texts.exists() else {}
    rows = []
    for path in images_in(folder / "images"):
        number = path.name.split("_")[0]
        if not number.isdigit() or int(number) >= per_domain * len(domains):
            raise ValueError(f"{entry['title']}: {path} does not begin with a class number, as in 12_name.jpg")
        rows.append({"path": path, "split": split, "label": int(number), "group": domains[int(number) // per_domain]})
    rows.sort(key=lambda row: (row["label"], row["path"].name))  # numbers, not texts: 2 comes before 10
    return rows, [str(texts.get(str(i), f"class {i}")) for i in range(per_domain * len(domains))]


def read_instre(folder: Path, split: str, entry: dict):
    """INSTRE: `INSTRE-S1/01a_canada_book/001.jpg`; every folder is a class, as GP-NNS measures it."""
    paths = [path for part in ("INSTRE-S1", "INSTRE-S2", "INSTRE-M") for path in images_below(folder / part)]
    return [{"path": p, "split": split, "label": p.parent.relative_to(folder).as_posix()} for p in paths], None


def read_revisited_pixels(folder: Path, split: str, entry: dict):
    """Revisited Oxford and Paris: the images of one list, in its order; queries are cut to their box."""
    truth = read_revisited(folder, entry)
    top = folder / "jpg" if (folder / "jpg").is_dir() else folder
    paths = {path.stem: path for path in images_below(top)}
    rows = []
    for kind, stems in (("query", truth["qimlist"]), ("query_full", truth["qimlist"]), ("gallery", truth["imlist"])):
        for i, stem in enumerate(stems):
            row = {"path": paths.get(str(stem), top / f"{stem}.jpg"), "split": kind}
            if kind == "query":
                row["crop"] = np.rint(np.ravel(truth["gnd"][i]["bbx"])).astype(np.int64)
            rows.append(row)
    check_listed(rows, split, entry)
    return [row for row in rows if row["split"] == split], None


def read_revisited(folder: Path, entry: dict) -> dict:
    """imlist, qimlist and gnd (per query: easy, hard, junk as rows from 0, and bbx) from the .pkl, else the .mat file."""
    path = folder / f"{entry['ground_truth']}.pkl"
    if path.exists():
        try:
            with open(path, "rb") as file:
                return PlainPickle(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error}); get it again") from error
    truth = read_mat(path.with_suffix(".mat"))
    truth = {key: np.atleast_1d(truth[key]) for key in ("imlist", "qimlist", "gnd")}
    for one in truth["gnd"]:
        for key in TRUTH:
            one[key] = np.atleast_1d(one[key]).astype(np.int64) - 1  # MATLAB counts from 1
    return truth


class PlainPickle(pickle.Unpickler):
    """Reads lists, dicts, texts, numbers and numpy arrays; a pickle that asks for more could run code, and is refused."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy._core", "numpy.core")
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
            ("__builtin__", "bytes"): bytes,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no ground truth needs")
        return known[module, name]


def read_cub(folder: Path, split: str, entry: dict):
    """CUB-200-2011: numbered lists of images, classes, and the class of each image."""
    names = dict(lines_of(folder / "classes.txt"))
    classes = dict(lines_of(folder / "image_class_labels.txt"))
    rows = []
    for number, path in lines_of(folder / "images.txt"):
        rows.append(
            {
                "path": folder / "images" / path,
                "split": "train" if int(classes[number]) <= entry["train_classes"] else "test",
                "label": names[classes[number]].split(".", 1)[-1].replace("_", " "),
            }
        )
    check_listed(rows, split, entry)
    return rows, None


def read_cars(folder: Path, split: str, entry: dict):
    """Cars196: `car_ims/` with one list; `cars_train/` and `cars_test/` (on Kaggle each in another of that name) with one
    list each; or `car_data/`, classes as folders, as pytorch-metric-learning has it."""
    if (folder / "car_ims").is_dir():
        content = read_mat(folder / "cars_annos.mat")
        images = [
            (folder / str(row["relative_im_path"]), row["class"]) for row in np.atleast_1d(content["annotations"])
        ]
        names = content["class_names"]
    elif (folder / "names.csv").exists():
        names = [name.strip() for name in gu.own_images.text_lines(folder / "names.csv")]
        images = [image for part in ("train", "test") for image in cars_by_class(folder, part)]
    else:
        devkit = first_of(folder, "devkit", "car_devkit/devkit")
        tests = [path for place in (folder, devkit) for path in sorted(place.glob("cars_test_annos_withlabels*.mat"))]
        if not tests:
            raise ValueError(
                f"{entry['title']}: cars_test_annos_withlabels.mat is in neither {folder} nor {devkit}; many copies lack it, "
                "and cars_test_annos.mat has no classes. Get it, and put it into either"
            )
        images = []
        for part, path in (("cars_train", devkit / "cars_train_annos.mat"), ("cars_test", tests[0])):
            top = first_of(folder, f"{part}/{part}", part)
            images += [(top / str(row["fname"]), row["class"]) for row in np.atleast_1d(read_mat(path)["annotations"])]
        names = read_mat(devkit / "cars_meta.mat")["class_names"]
    rows = []
    for path, number in images:
        kind = "train" if int(number) <= entry["train_classes"] else "test"
        rows.append({"path": path, "split": kind, "label": str(names[int(number) - 1])})
    check_listed(rows, split, entry)
    return rows, None


def cars_by_class(folder: Path, part: str) -> list[tuple[Path, str]]:
    """(image, class number) of anno_train.csv or anno_test.csv, whose lines are: file, four edges of a box, class."""
    top = first_of(folder, f"car_data/car_data/{part}", f"car_data/{part}")
    paths = {path.name: path for path in images_below(top)}
    lines = [line.strip().split(",") for line in gu.own_images.text_lines(folder / f"anno_{part}.csv") if line.strip()]
    return [(paths.get(cells[0], top / cells[0]), cells[5]) for cells in lines]


def read_sop(folder: Path, split: str, entry: dict):
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt with image, class, kind of product and path."""
    rows = []
    for kind in ("train", "test"):
        for _, number, _, path in lines_of(folder / f"Ebay_{kind}.txt")[1:]:
            label = f"{path.split('/')[0].removesuffix('_final').replace('_', ' ')} {int(number):05d}"
            rows.append({"path": folder / path, "split": kind, "label": label})
    check_listed(rows, split, entry)
    return rows, None


def read_adience(folder: Path, split: str, entry: dict):
    """Adience: `faces/USER/coarse_tilt_aligned_face.PERSON.PHOTO.jpg`, or `aligned/`."""
    rows = []
    for path in images_below(first_of(folder, "aligned", "faces")):
        parts = path.name.split(".")
        if len(parts) < 4:
            raise ValueError(f"{entry['title']}: {path} names no person, as in landmark_aligned_face.12.photo.jpg")
        rows.append({"path": path, "split": split, "label": f"person {int(parts[-3]):05d}"})
    return rows, None


def read_flowers(folder: Path, split: str, entry: dict):
    """Flowers102: `jpg/image_00001.jpg`, the class of each image, and the image numbers of each split."""
    from torchvision.datasets import Flowers102  # its authors' files do not hold the names of the classes

    labels, parts = read_mat(folder / "imagelabels.mat")["labels"], read_mat(folder / "setid.mat")
    names = getattr(Flowers102, "classes", None) or [f"flower {i + 1}" for i in range(102)]
    rows = []
    for kind, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        for i in np.atleast_1d(parts[key]):
            path = folder / "jpg" / f"image_{i:05d}.jpg"
            rows.append({"path": path, "split": kind, "label": int(labels[i - 1]) - 1})
    check_listed(rows, split, entry)
    return rows, list(names)


def read_aircraft(folder: Path, split: str, entry: dict):
    """FGVC Aircraft: `data/images/1234567.jpg` and a list of image and variant for each split."""
    names = [line.strip() for line in (folder / "data" / "variants.txt").read_text().splitlines() if line.strip()]
    rows = []
    for kind, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        for image, *variant in lines_of(folder / "data" / f"images_variant_{part}.txt"):
            path = folder / "data" / "images" / f"{image}.jpg"
            rows.append({"path": path, "split": kind, "label": names.index(" ".join(variant))})
    check_listed(rows, split, entry)
    return rows, names


def imagenet_classes() -> tuple[dict[str, int], list[str]]:
    """WordNet id -> class number (0 to 999, in the order of the ids), and the name of each class for prompts."""
    import open_clip
    from timm.data import ImageNetInfo

    numbers = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return numbers, list(open_clip.IMAGENET_CLASSNAMES)


def read_imagenet(folder: Path, split: str, entry: dict):
    """ImageNet and its variants: a folder per class, named by WordNet id (or class number, in V2); val also without."""
    numbers, names = imagenet_classes()
    top = folder / entry["folders"][split]
    rows = []
    for sub in subfolders(top):
        number = numbers.get(sub.name, int(sub.name) if sub.name.isdigit() else -1)  # "10" is class 10, not the third
        if not 0 <= number < len(names):
            raise ValueError(f"{entry['title']}: {sub} is not named like an ImageNet class (n01440764, or 0 to 999)")
        rows += [{"path": path, "split": split, "label": number} for path in images_in(sub)]
    if not rows and (paths := images_in(top)):
        of_image = validation_labels(folder, entry)
        if unknown := [path for path in paths if path.stem not in of_image]:
            raise ValueError(f"{entry['title']}: no label for {len(unknown):,} of {len(paths):,} images: {unknown[0]}")
        rows = [{"path": path, "split": split, "label": numbers[of_image[path.stem]]} for path in paths]
    rows.sort(key=lambda row: (row["label"], row["path"].name))
    return rows, names


def validation_labels(folder: Path, entry: dict) -> dict[str, str]:
    """Image -> WordNet id for validation images in one flat folder, from Kaggle's table or the authors' devkit."""
    table = first_of(folder, "LOC_val_solution.csv", "../../../LOC_val_solution.csv")
    if table.exists():
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in read_csv(table)}
    devkit = folder / "ILSVRC2012_devkit_t12" / "data"
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in read_mat(devkit / "meta.mat")["synsets"]}
    ids = [int(number) for (number,) in lines_of(devkit / "ILSVRC2012_validation_ground_truth.txt")]
    return {f"ILSVRC2012_val_{i:08d}": wnid[number] for i, number in enumerate(ids, 1)}


def read_objectnet(folder: Path, split: str, entry: dict):
    """ObjectNet: `images/air_freshener/1.png`; "test" keeps the classes that ImageNet has too. The border is cut off."""
    labels = read_json(folder / "mappings" / "folder_to_objectnet_label.json")
    both = read_json(folder / "mappings" / "objectnet_to_imagenet_1k.json")
    rows = []
    for sub in subfolders(folder / "images"):
        if sub.name not in labels:
            raise ValueError(f"{entry['title']}: {sub} is not in mappings/folder_to_objectnet_label.json")
        if split == "all" or labels[sub.name] in both:
            same = {"split": split, "label": labels[sub.name], "crop": entry["crop"]}
            rows += [{"path": path} | same for path in images_in(sub)]
    return rows, None


def objectnet_in_imagenet() -> dict[str, list[int]]:
    """Class of ObjectNet -> numbers of the ImageNet classes that count as right, for the 113 that both have."""
    folder = (find("objectnet", "test") or fetch("objectnet", "test")) / "mappings"
    texts = [line.strip() for line in (folder / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()]
    number = {int(line): int(i) for i, line in read_json(folder / "pytorch_to_imagenet_2012_id.json").items()}
    both = read_json(folder / "objectnet_to_imagenet_1k.json")
    return {name: [number[texts.index(text) + 1] for text in same.split("; ")] for name, same in both.items()}


def read_karpathy(folder: Path, split: str, entry: dict):
    """COCO and Flickr30k: Karpathy's list of images, each with its split and captions, of which the first five count; or
    the lists of one split each that CLIP_benchmark makes of it."""
    own_list = folder / entry["list_of_split"].format({"validation": "val"}.get(split, split))
    whole = first_of(folder, entry["list"], f"caption_datasets/{entry['list']}")
    if not whole.exists() and own_list.exists():
        rows = clip_benchmark_list(own_list, split, first_of(folder, *entry["folders"], "."))
        check_listed(rows, split, entry | {"unlisted": "any"})
        return rows, None
    content = read_json(whole)
    top = first_of(folder, *entry["folders"])
    kinds = {part: kind for kind, parts in entry["parts"].items() for part in parts}
    rows = []
    for image in content["images"]:
        captions = [" ".join(sentence["raw"].split()) for sentence in image["sentences"][:5]]
        path = top / image.get("filepath", "") / image["filename"]
        rows.append({"path": path, "split": kinds[image["split"]], "captions": captions})
    parents = {os.path.dirname(row["path"]) for row in rows if row["split"] == split}
    check_listed([row for row in rows if os.path.dirname(row["path"]) in parents], split, entry)
    return rows, None


def clip_benchmark_list(path: Path, split: str, top: Path) -> list[dict]:
    """Images and captions of coco_test_karpathy.json (in COCO's own form) or of flickr30k_test_karpathy.txt (a line for
    each caption: image,caption)."""
    captions: dict[str, list[str]] = {}
    if path.suffix == ".json":
        content = read_json(path)
        place = {
            one["id"]: f"{'val' if 'val2014' in one['file_name'] else 'train'}2014/{one['file_name']}"
            for one in content["images"]
        }
        told = [(place[one["image_id"]], one["caption"]) for one in content["annotations"]]
    else:
        lines = [line.partition(",") for line in list(gu.own_images.text_lines(path))[1:] if line.strip()]
        told = [(name.strip(), gu.own_images.unquoted(caption.strip())) for name, _, caption in lines]
    for name, caption in told:
        captions.setdefault(name, []).append(" ".join(caption.split()))
    return [{"path": top / name, "split": split, "captions": texts[:5]} for name, texts in captions.items()]


def read_in_shop(folder: Path, split: str, entry: dict):
    """In-Shop: `img/WOMEN/Dresses/id_00000002/02_1_front.jpg` and one list of image, item and split; or `img_highres/`,
    the same pictures in large, as OML has them."""
    lines = lines_of(first_of(folder, "list_eval_partition.txt", "Eval/list_eval_partition.txt"))
    top = first_of(folder, "img", "Img/img", "img_highres", "Img/img_highres")
    rows = [{"path": top / path.removeprefix("img/"), "split": kind, "label": item} for path, item, kind in lines[2:]]
    if len(rows) != int(lines[0][0]):
        raise ValueError(
            f"{entry['title']}: the list says {int(lines[0][0]):,} images and has {len(rows):,}; get it again"
        )
    check_listed(rows, split, entry)
    return rows, None


def read_gldv2(folder: Path, split: str, entry: dict):
    """Google Landmarks v2: `train/a/b/c/abc....jpg`, one .csv for each split. Queries without a landmark are left out."""
    top = folder / {"query": "test", "gallery": "index"}.get(split, "train")
    paths = {path.stem: path for path in images_below(top)}

    def row(image: str, landmark: str) -> dict:
        path = paths.get(image, top / image[0] / image[1] / image[2] / f"{image}.jpg")
        return {"path": path, "split": split, "label": f"landmark {int(landmark):06d}"}

    rows, names = [], None
    if split in ("query", "gallery"):  # both number all landmarks of the index
        landmark = {line["id"]: line["landmark_id"] for line in read_csv(folder / "index_image_to_landmark.csv")}
        names = [f"landmark {number:06d}" for number in sorted({int(number) for number in landmark.values()})]
    if split == "gallery":
        rows = [row(image, number) for image, number in landmark.items()]
    elif split == "query":
        for line in read_csv(folder / "retrieval_solution_v2.1.csv"):
            if line["Usage"] != "Ignored" and line["images"] not in ("", "None"):
                relevant = line["images"].split()
                rows.append(row(line["id"], landmark[relevant[0]]) | {"relevant": relevant})
    elif split == "train" and (folder / "train_clean.csv").exists():
        for line in read_csv(folder / "train_clean.csv"):
            rows += [row(image, line["landmark_id"]) for image in line["images"].split()]
    else:  # on Kaggle train.csv is the clean list already
        rows = [row(line["id"], line["landmark_id"]) for line in read_csv(folder / "train.csv")]
    check_listed(rows, split, entry)
    if names is not None:
        number = {name: i for i, name in enumerate(names)}
        rows = [one | {"label": number[one["label"]]} for one in rows]
    return rows, names


def read_products10k(folder: Path, split: str, entry: dict):
    """Products-10K: `train/1.jpg` and `test/1.jpg`, with a .csv of image and class for each."""
    rows = []
    for kind, table in (("train", "train.csv"), ("test", "test_kaggletest.csv")):
        for line in read_csv(folder / table):
            label = f"product {int(line['class']):05d}"
            rows.append({"path": folder / kind / line["name"], "split": kind, "label": label})
    check_listed([row for row in rows if row["split"] == split], split, entry)
    return rows, None


def read_inaturalist2018(folder: Path, split: str, entry: dict):
    """iNaturalist 2018: `train_val2018/Aves/1234/abc.jpg`, with a .json of images and annotations for each split."""
    rows, names = [], {}
    for kind, part in (("train", "train2018.json"), ("test", "val2018.json")):
        content = read_json(folder / part)
        names |= {category["id"]: str(category["name"]) for category in content["categories"]}
        classes = {one["image_id"]: one["category_id"] for one in content["annotations"]}
        for image in content["images"]:
            rows.append({"path": folder / image["file_name"], "split": kind, "label": classes[image["id"]]})
    check_listed(rows, split, entry)
    return rows, [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


def read_inaturalist2021(folder: Path, split: str, entry: dict):
    """iNaturalist 2021: a folder per species, `train/00000_Animalia_..._Genus_species/`; its number is the class."""
    rows, names = [], {}
    for sub in subfolders(folder / entry["folders"][split]):
        number, *taxonomy = sub.name.split("_")
        if not number.isdigit():
            raise ValueError(f"{entry['title']}: {sub} does not begin with the number of a species")
        names[int(number)] = " ".join(taxonomy[-2:])
        rows += [{"path": path, "split": split, "label": int(number)} for path in images_in(sub)]
    return rows, [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


def read_uned(folder: Path, split: str, entry: dict):
    """UnED: `info_files/DOMAIN/SPLIT.json` lists path and class; a domain without an index searches its test images."""
    rows = []
    for domain in entry["domains"]:
        lists = folder / "info_files" / domain
        files = {"train": "train.json", "validation": "val.json", "query": "test.json", "gallery": "index.json"}
        kinds = ("query", "gallery") if split in ("query", "gallery") else (split,)  # two that number classes together
        for kind in kinds:
            for image in read_json(first_of(lists, files[kind], "test.json")):
                classes = image["class_id"] if isinstance(image["class_id"], list) else [image["class_id"]]
                labels = [f"{domain} {int(number):06d}" for number in classes]
                row = {"path": uned_path(folder / "images", image["path"]), "split": kind, "group": domain}
                rows.append(row | {"label": labels[0], "labels": labels})
    wanted = [row for row in rows if row["split"] == split]
    check_listed(wanted, split, entry)
    return rows, None


def uned_path(top: Path, path: str) -> Path:
    """An image of UnED. RP2K has Chinese names, which some unzip programs write as #U4e00: both are found."""
    if path.isascii() or (top / path).exists():
        return top / path
    return top / "".join(letter if letter.isascii() else f"#U{ord(letter):04x}" for letter in path)


READERS = {
    "gpr1200": read_gpr1200,
    "instre": read_instre,
    "revisited": read_revisited_pixels,
    "cub": read_cub,
    "cars": read_cars,
    "sop": read_sop,
    "adience": read_adience,
    "flowers": read_flowers,
    "aircraft": read_aircraft,
    "imagenet": read_imagenet,
    "objectnet": read_objectnet,
    "karpathy": read_karpathy,
    "in_shop": read_in_shop,
    "gldv2": read_gldv2,
    "products10k": read_products10k,
    "inaturalist2018": read_inaturalist2018,
    "inaturalist2021": read_inaturalist2021,
    "uned": read_uned,
}


# --- downloads -------------------------------------------------------------------------------------------------------


def fetch(name: str, split: str) -> Path:
    """Unpack what lies there packed, download what may be downloaded, and return the folder of the data set.

    FileNotFoundError says what must be got by hand and where to put it. Files that are there already stay as they are;
    one that lies in another, perhaps read-only, folder is linked.
    """
    entry = TABLE[name]
    target = writable_place(name)
    todo = []
    for file in files_for(entry, split):
        for place in (p for p in places(name) if not (target / file["gives"]).exists()):
            if (place / file["gives"]).exists():
                (target / file["gives"]).parent.mkdir(parents=True, exist_ok=True)
                (target / file["gives"]).symlink_to((place / file["gives"]).absolute())
        if not (target / file["gives"]).exists():
            around = Path(file["gives"]).parent / file["name"]  # index/images_000.tar: three splits use this name
            packed = [place / path for place in places(name) for path in (around, file["name"])]
            todo.append(file | {"packed": next((path for path in packed if path.is_file()), None)})
    by_hand = [file for file in todo if file["packed"] is None and "url" not in file]
    note = target / f".incomplete_{split}"  # half of a data set must not be taken for all of it after a break
    if by_hand or not (todo or note.exists()):
        raise FileNotFoundError(by_hand_message(name, split, by_hand, target))
    note.touch()
    downloads = [file for file in todo if file["packed"] is None]
    if downloads:
        terms = f" Licence: {entry['licence']}." if "licence" in entry else ""
        print(f"{entry['title']} was not found: downloading {shown(downloads)} to {target}.{terms}", file=sys.stderr)
    for file in todo:
        packed = file["packed"] or download(
            file["url"], target / Path(file["gives"]).parent / file["name"], file.get("size"), file.get("md5")
        )
        if file["packed"] is not None:
            verify(packed, file.get("size"), file.get("md5"))
        if is_archive(file["name"]):
            unpack(packed, target / file["gives"], file.get("nested", False))
            if file["packed"] is None:
                packed.unlink()  # it would take the same room again; one that was put there by hand stays
        elif file["packed"] is not None:
            (target / file["gives"]).symlink_to(packed.absolute())
    note.unlink()
    if folder := find(name, split):
        return folder
    raise ValueError(
        f"{entry['title']}: {target} holds all files, but not {' or '.join(map(' and '.join, for_split(entry['marker'], split)))}; "
        f"remove the folder and run again, or arrange the files as data/README.md says"
    )


def files_for(entry: dict, split: str) -> Iterator[dict]:
    """The files that a split needs: numbered ones one by one, `gives` and `url` filled in."""
    for file in entry.get("files", []):
        if split in file.get("splits", entry["splits"]):
            for i in range(file.get("count", 1)):
                numbered = {key: file[key].format(i) for key in ("name", "gives") if key in file}
                urls = {"url": [url.format(i) for url in file["url"]]} if "url" in file else {}
                yield {"gives": numbered["name"], **file, **numbered, **urls}


def writable_place(name: str) -> Path:
    """The data set's folder in the first of `data_folders` that can be written to; made when it is not there."""
    for place in places(name):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OSError(
        f"none of {', '.join(map(str, data_folders()))} can be written to; set GPNNS_DATA to a folder that can"
    )


def shown(files: list[dict]) -> str:
    """The names of some files; the first of many."""
    return ", ".join(file["name"] for file in files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def by_hand_message(name: str, split: str, files: list[dict], target: Path) -> str:
    """What to get, from where, and where to put it."""
    entry = TABLE[name]
    how = f" ({entry['get']})" if "get" in entry else ""
    layouts = " or ".join(" and ".join(paths) for paths in for_split(entry["marker"], split))
    return (
        f"{entry['title']} was not found in {', '.join(map(str, places(name)))} and cannot be downloaded without you. "
        f"Get {shown(files) or 'it'} from {entry['home']}{how} and put it into {target}, packed or as {layouts}"
    )


def download(urls: Sequence[str], path: Path, size: int | None = None, md5: str | None = None) -> Path:
    """Fetch a file from the first of `urls` that answers, and return `path`.

    A broken download goes on where it stopped, also after a restart; `path` appears when the file is complete and its
    size and checksum are right. ConnectionError when no URL answers, ValueError for wrong bytes, OSError without room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    failures, attempt = 0, 0
    while True:
        url, before = urls[attempt % len(urls)], file_size(partial)
        try:
            receive(url, partial, path.name, size)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500  # not there: do not ask again
            attempt, failures = attempt + 1, failures + 1 if file_size(partial) <= before else 0
            if failures >= (len(urls) if final else max(TRIES, len(urls))):
                reason = getattr(error, "reason", None) or error
                raise ConnectionError(
                    f"could not download {url} ({reason}); {file_size(partial):,} bytes are kept in {partial}. Run again when "
                    f"online to go on from there, or get the file elsewhere and save it as {path}"
                ) from error
            time.sleep(PAUSE if failures and not final else 0)
        except OSError as error:
            if error.errno is None:
                raise  # it says what is wrong already
            raise gu.disk_error(path, error, f"{file_size(partial):,} bytes are kept in {partial}") from error
    try:
        verify(partial, size, md5)
    except ValueError:
        forget(partial)  # going on from wrong bytes would never become right
        raise
    os.replace(partial, path)
    forget(partial)
    return path


def receive(url: str, partial: Path, label: str, size: int | None) -> None:
    """One attempt: append to `partial` what is still missing, or begin again when the server cannot go on."""
    have, tag = file_size(partial), partial.with_name(partial.name + ".tag")
    request = urllib.request.Request(url, headers={"User-Agent": "gpnns"})
    if have and tag.exists():  # only of the very same file; without a tag only size and checksum could tell
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing from there on: all is here already, or it is not the same file
            raise
        if (error.headers.get("Content-Range") or "").rpartition("/")[2] != str(have):
            forget(partial)
            raise ConnectionError("the file on the server is another one now") from error
        return
    with response:
        if getattr(response, "status", None) != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size and total != size:
            raise ValueError(
                f"{url} has {total:,} bytes, expected {size:,}: the file was changed. Look at its home page"
            )
        free = shutil.disk_usage(partial.parent).free
        if total and total - have > free:
            raise OSError(
                f"{label} needs {(total - have) / 1e6:,.0f} MB and {partial.parent} has {free / 1e6:,.0f} MB free; set GPNNS_DATA to a larger disk"
            )
        if not have:
            tag.unlink(missing_ok=True)
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified") or "W/"
            if not mark.startswith("W/"):  # a weak tag does not promise the same bytes
                tag.write_text(mark)
        progress = gu.Progress((total or 0) // 2**20, f"downloading {label}", "MB", done=have // 2**20)
        with open(partial, "ab" if have else "wb") as file:
            while block := response.read(2**20):
                file.write(block)
                have += len(block)
                progress.update(have // 2**20)
    if total and have < total:
        raise ConnectionError(f"the connection broke after {have:,} of {total:,} bytes")


def verify(path: Path, size: int | None, md5: str | None) -> None:
    """Raise ValueError when a file has not the size or checksum that the table gives."""
    if size and file_size(path) != size:
        raise ValueError(f"{path} has {file_size(path):,} bytes, expected {size:,}; remove it and get it again")
    if md5:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise ValueError(f"{path} has the checksum {found}, expected {md5}; remove it and get it again")


def file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def forget(partial: Path) -> None:
    """Remove a partial download and what is known about it."""
    for path in (partial, partial.with_name(partial.name + ".tag")):
        path.unlink(missing_ok=True)


# --- archives --------------------------------------------------------------------------------------------------------


DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError,
    RuntimeError,  # a zip that asks for a password
)  # fmt: skip


def is_archive(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))


def unpack(archive: Path, target: Path, nested: bool = False) -> None:
    """Unpack a tar or zip archive so that `target` appears at once and complete; `nested`: the tars in it too.

    Where the archive holds something named like `target` at its top, that becomes `target`, else all of it. ValueError,
    with nothing written, for an archive that is damaged or tries to write elsewhere: absolute paths, `..`, links.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"there is no archive {archive}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        extract(archive, partial)
        for inner in sorted(partial.glob("*.tar")) if nested else []:  # one per class: ImageNet's training set
            unpack(inner, inner.with_suffix(""))
            inner.unlink()
        inner = partial / target.name
        os.replace(inner if inner.exists() else partial, target)
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{archive} cannot be unpacked ({reason}); remove it and get it again") from error
    except OSError as error:
        raise gu.disk_error(target, error, f"nothing of {archive.name} was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def extract(archive: Path, folder: Path) -> None:
    """Unpack every file of a tar or zip archive. ValueError for a name that leads outside: the standard library, which
    does the work, would take the file in under another name; and before more is written than such a file can hold."""
    progress = gu.Progress(max(file_size(archive) // 2**20, 1), f"unpacking {archive.name}", "MB")
    with open(archive, "rb") as raw:
        if zipfile.is_zipfile(raw):
            with zipfile.ZipFile(raw) as packed:
                check_room(archive, folder, sum(member.file_size for member in packed.infolist()))
                for member in packed.infolist():
                    refuse(archive, member.filename, stat.S_ISLNK(member.external_attr >> 16))
                    packed.extract(member, folder)
                    progress.update(raw.tell() // 2**20)
            return
        raw.seek(0)
        with tarfile.open(fileobj=raw, mode="r:*") as packed:
            packed.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)  # since Python 3.11.4
            total = 0
            for member in packed:
                total += member.size
                check_room(archive, folder, total, written=total - member.size)
                refuse(archive, member.name, not (member.isfile() or member.isdir()))
                packed.extract(member, folder)
                progress.update(raw.tell() // 2**20)


def check_room(archive: Path, folder: Path, total: int, written: int = 0) -> None:
    """ValueError for an archive that unpacks to far more bytes than pictures and lists could (a "bomb"), OSError where
    the disk has no room for the rest of its `total` bytes."""
    if total > max(BOMB * file_size(archive), 100e6):
        raise ValueError(
            f"{archive} ({file_size(archive) / 1e6:,.1f} MB) would unpack to {total / 1e6:,.0f} MB or more, which no archive of "
            "images does; nothing of it was kept. Get it from its home page again, or unpack it yourself if you trust it"
        )
    free = shutil.disk_usage(folder).free
    if total - written > free:
        raise OSError(
            errno.ENOSPC, f"it unpacks to {total / 1e6:,.0f} MB, and {folder.parent} has {free / 1e6:,.0f} MB free"
        )


BOMB = 200  # times: zip and gzip make an empty page 1,000 times smaller, JPEG files not at all, lists 20 times


def refuse(archive: Path, name: str, special: bool) -> None:
    """Raise ValueError for a member that could end up outside the folder: no data set needs one."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if special or parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts or "\0" in name:
        kind = "a link or device" if special else "a path outside its folder"
        raise ValueError(f"{archive} holds {name!r}, {kind}: it is not unpacked. Get it from the data set's home page")
