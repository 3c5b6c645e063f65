"""An ImageSet: images and what is known of them; joining sets, and opening an image file.

It stands below `gpnns_utils`, which embeds sets of images, and imports nothing of the course but how texts are printed.

the set -> what a set says -> opening a file
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gpnns.images import text_files

# --- a set of images -------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NO_LABELS = "has no labels: put each class into a folder of its own, or add a column 'label'"
PER_IMAGE = ("images", "labels", "groups", "captions", "crops", "rows")  # the fields with one entry for each image


@dataclass
class ImageSet:
    """Images and what is known about them. All fields but `names` have one entry per image.

    images: list of paths, or uint8 array (n, height, width, 3). labels: int64 (n,) class numbers. groups: (n,) domain
    names. captions: n lists of strings (a single string is taken as a list of one). names: class number -> readable
    name. left_out: files that could not be read, each with the reason. crops: int (n, 4), the part that counts of each
    picture file: left, top, right, bottom in pixels; a right or bottom below 1 counts from the other edge. rows: int64 (n,),
    which row of the first, whole set each image was: what belongs to a set and to a part of it is matched by them. drawn:
    whether these are the mini world's, which brings splits, captions and names of its own.

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
    drawn: bool = False

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
        return f"row {row} of {self.name}" if array else text_files.to_printable(self.images[row])

    def subset(self, rows: Sequence[int] | np.ndarray) -> ImageSet:
        """The images of `rows` (numbers, or a boolean mask) as a new set. ValueError for rows that are not there."""
        rows = check_rows(rows, len(self), "rows", repeats=True)
        parts = {part: values for part in PER_IMAGE if (values := getattr(self, part)) is not None}
        parts = {k: v[rows] if isinstance(v, np.ndarray) else [v[i] for i in rows] for k, v in parts.items()}
        return replace(self, **parts, left_out=list(self.left_out))

    def digest(self, row: int) -> bytes:
        """A hash of an image's content (file bytes or pixels); of its path when the file cannot be opened."""
        image = self.images[row]
        if isinstance(self.images, np.ndarray):
            return hash_bytes(image.tobytes() + str(image.shape).encode())
        try:
            check_regular_file(image)
            found, crop = os.stat(image), "" if self.crops is None else repr(self.crops[row].tolist())
            return digest_file(str(image), crop, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        except (OSError, ValueError):
            return hash_bytes(b"unreadable " + os.fsencode(image))

    def digests(self, report: Callable[[int], None] = lambda done: None) -> list[bytes]:
        """`digest` of every image. Files are read by several threads: a disk, or a network, answers many at once.
        `report(done)` is called now and then."""
        found = []
        with ThreadPoolExecutor(8) as pool:
            for first in range(0, len(self), 1024):
                found += pool.map(self.digest, range(first, min(first + 1024, len(self))))
                report(len(found))
        return found

    def leave_out(self, reasons: dict[str, np.ndarray]) -> ImageSet:
        """A set without the images that cannot be used; reasons: why -> bool (n,). Says so once: in its `left_out`, and in a
        warning for each reason. ValueError when no image would be left."""
        gone, total = np.any(list(reasons.values()), axis=0), len(self)
        kept = self.subset(~gone)
        for why, marked in reasons.items():
            names = [self.describe(row) + self.explain_unreadable(row) for row in np.flatnonzero(marked)]
            if names and gone.all():
                raise ValueError(f"{self.name}: all {total} images {why}; the first is {names[0]}")
            kept.left_out += names
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            if names:
                message = f"{self.name}: {len(names)} of {total} images {why} and are left out: {shown}"
                warnings.warn(message, stacklevel=3)
        return kept

    def explain_unreadable(self, row: int) -> str:
        """The kind of error that an image leads to, in brackets; "" for one that can be read."""
        try:
            self[row]
        except Exception as error:  # a decoder may raise anything on broken data
            return f" ({type(error).__name__})"
        return ""


def check_rows(
    rows: Sequence[int] | np.ndarray, size: int, what: str, none: bool = False, repeats: bool = False
) -> np.ndarray:
    """Rows of something that has `size` of them, given as numbers or as a boolean mask; with `none`, -1 stands for no row.

    ValueError for anything else, where numpy would count -1 from the end, cut 2.7 to 2 and, unless rows may repeat, take a
    mask of whole numbers for rows.
    """
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (size,):
        return np.flatnonzero(rows)
    if rows.shape == (0,):
        return np.empty(0, dtype=np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"{what} must be row numbers, or a mask of {size} entries, not {rows.dtype} {rows.shape}")
    if not repeats and len(rows) == size > 2 and 0 <= rows.min() <= rows.max() <= 1:
        raise ValueError(f"{what}: {size} zeros and ones seem to be a mask; give it as booleans, mask.astype(bool)")
    if (wrong := rows[(rows < -none) | (rows >= size)]).size:
        raise ValueError(f"{what} hold {wrong[0]}, which is no row of {size}; leave out what is not there")
    return rows[rows >= 0] if none else rows


@functools.lru_cache(2**20)
def digest_file(path: str, crop: str, size: int, changed: int, touched: int) -> bytes:
    """The hash of a file's bytes and crop, read once for each state of the file."""
    return hash_bytes(Path(path).read_bytes() + crop.encode())


def hash_bytes(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def concat(sets: Sequence[ImageSet], name: str = "", groups: Sequence[str] | None = None) -> ImageSet:
    """Several sets as one. Classes of equal names are one class, numbered as they come. groups: one for all images of each
    set; None keeps those that all sets have. Labels are kept where all sets have them, captions where any has."""
    names, labels, crops, captions = [], None, None, None
    if all(one.labels is not None for one in sets):
        called = [one.names or [f"class {i}" for i in range(one.labels.max(initial=-1) + 1)] for one in sets]
        names = list(dict.fromkeys(name for names in called for name in names))
        number = {name: i for i, name in enumerate(names)}
        labels = [np.array([number[name] for name in own])[one.labels] for own, one in zip(called, sets, strict=True)]
        labels = np.concatenate(labels)
    if groups is not None:
        groups = np.repeat(groups, [len(one) for one in sets])
    elif all(one.groups is not None for one in sets):
        groups = np.concatenate([one.groups for one in sets])
    if any(one.crops is not None for one in sets):
        whole = [np.zeros((len(one), 4), np.int64) if one.crops is None else one.crops for one in sets]
        crops = np.concatenate(whole)
    if any(one.captions is not None for one in sets):
        captions = [texts for one in sets for texts in one.captions or [[]] * len(one)]
    arrays = all(isinstance(one.images, np.ndarray) for one in sets)
    return ImageSet(
        name or " and ".join(dict.fromkeys(one.name for one in sets)),
        np.concatenate([one.images for one in sets]) if arrays else [path for one in sets for path in one.images],
        labels=labels,
        groups=groups,
        captions=captions,
        names=names,
        left_out=list(dict.fromkeys(file for one in sets for file in one.left_out)),
        crops=crops,
        drawn=all(one.drawn for one in sets),
    )


def text_queries(images: ImageSet) -> tuple[list[str], list[np.ndarray]]:
    """Every caption of a set once, in alphabetical order, and for each the rows of the images that carry it."""
    carried = {}
    for row, captions in enumerate(images.captions or []):
        for caption in dict.fromkeys(caption for caption in captions if caption.strip()):
            carried.setdefault(caption, []).append(row)
    return sorted(carried), [np.array(carried[caption]) for caption in sorted(carried)]


def group_masks(images: ImageSet) -> dict[str, np.ndarray]:
    """Which images belong to each group, {name: bool (n,)}, in the order in which they come; nothing where none is known."""
    groups = [] if images.groups is None else images.groups
    return {str(name): np.asarray(groups) == name for name in dict.fromkeys(groups)}


def group_rows(images: ImageSet, most: int = 6) -> dict[str, np.ndarray]:
    """The rows of each group of a set, by name, of at most `most` groups; of equal parts where no groups are known."""
    if found := group_masks(images):
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
        check_regular_file(path)
    with Image.open(path) as image:
        if crop is not None:
            left, top, right, bottom = (int(edge) for edge in crop)
            right, bottom = right + image.width * (right < 1), bottom + image.height * (bottom < 1)
            image = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = to_eight_bits(np.asarray(image))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def open_or_none(read: Callable[[], Image.Image]) -> Image.Image | None:
    """What `read()` gives, or None for a file that cannot be read; when it is the machine that fails, that is raised."""
    try:
        return read()
    except Exception as error:  # a decoder may raise anything on broken data
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in EXHAUSTED:
            raise  # not the file's trouble: stop, and go on later
        return None


def to_eight_bits(values: np.ndarray) -> Image.Image:
    """Gray values as 8 bits: of 16 bits, of 8 in wider numbers, or from 0 to 1. ValueError for others, such as heights."""
    low, high = values.min(), values.max()
    most = 1 if values.dtype.kind == "f" and high <= 1 else 255 if high <= 255 and values.itemsize > 2 else 65_535
    if not 0 <= low <= high <= most or (values.dtype.kind == "f" and most > 1):
        raise ValueError(f"its values go from {low} to {high}; save it with 8 or 16 bits")
    return Image.fromarray(
        (values * (255 / most)).astype(np.uint8) if most <= 255 else (values // 257).astype(np.uint8)
    )


def check_regular_file(path: Path) -> None:
    """ValueError for what only looks like a file: a pipe would be waited on for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file")


EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of a machine short of file handles or memory


SYSTEM = {  # folders that file managers, archives and network disks add to every other
    "__MACOSX", "@eaDir", "#recycle", "@Recycle", "#snapshot", "$RECYCLE.BIN", "RECYCLER", "System Volume Information",
    "lost+found", "__pycache__",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
