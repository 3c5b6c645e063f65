"""Images by name: where data sets lie, how they are fetched, one split of them as an ImageSet.

`gpnns_utils.load_images(source, split)` calls `load_images`; own_images.py reads what has no name. What differs from one
data set to the next is in data/datasets.toml, how their authors arrange them in layouts.py. Each has a folder of its
name in one of the folders of the environment variable GPNNS_DATA (several: separated as in PATH), or in .cache/datasets.

the table -> where data lie -> loading -> fetching
"""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns.images import downloads, image_set, layouts, own_images, text_files, walking

KAGGLE = Path("/kaggle/input")  # data sets that a Kaggle notebook was given; read only
TABLE: dict[str, dict] = tomllib.loads((gu.DATA / "datasets.toml").read_text(encoding="utf-8"))


def list_datasets() -> list[dict]:
    """One dict per data set: name, title, splits with their counts, licence, how to get it, where it was found."""
    rows = []
    for name, entry in TABLE.items():
        splits = [split + (f" {counts[0]:,}" if counts else "") for split, counts in entry["splits"].items()]
        found = {str(folder) for split in entry["splits"] if (folder := find_dataset(name, split))}
        by_hand = "get" in entry or not all("url" in file for file in entry.get("files", []))
        row = {"name": name, "title": entry["title"], "images": ", ".join(splits)}
        row |= {"licence": entry.get("licence", "see its home page"), "get": "by hand" if by_hand else "downloaded"}
        rows.append(row | {"found": ", ".join(sorted(found)) or "not found"})
    return rows


def list_places(name: str) -> list[Path]:
    """Where a data set may lie, in the order in which that is searched: a folder of its name in each data folder."""
    given = [Path(part).expanduser() for part in os.environ.get("GPNNS_DATA", "").split(os.pathsep) if part]
    return [folder / name for folder in [*given, gu.cache_folder() / "datasets"]]


def find_dataset(name: str, split: str) -> Path | None:
    """The folder that holds what a split needs, or None; never one whose download was interrupted."""
    markers = list_markers(name, split)
    for place in list_places(name):
        if not (place / f".incomplete_{split}").exists() and (folder := find_below(place, markers)):
            return folder
    return find_below(KAGGLE, markers, depth=6)


def list_markers(name: str, split: str) -> list[list[str]]:
    """The lists of paths of which one must exist below a folder that holds the split."""
    markers = TABLE[name]["marker"]
    return markers[split] if isinstance(markers, dict) else markers


def find_below(top: Path, markers: list[list[str]], depth: int = 4) -> Path | None:
    """The first folder, `top` or below, in which all paths of one marker exist. Archives and sites add folders on top."""
    level = [top] if top.is_dir() else []
    for _ in range(depth + 1):
        for folder in level:
            for paths in markers:
                if all(next(folder.glob(p), None) if "*" in p else (folder / p).exists() for p in paths):
                    return folder
        # many subfolders are classes, or train/a/b/c: nothing to find there, and slow to look through
        below = [walking.list_subfolders(folder) for folder in level[:300]]
        level = [sub for subs in below if len(subs) <= 100 for sub in subs]
    return None


def load_images(source: str | Path, split: str = "test") -> gu.ImageSet:
    """The images that `source` names, as `gpnns_utils.load_images` describes them; prints what was taken as what.

    Raises FileNotFoundError for what is nowhere, ValueError for what cannot be understood.
    """
    notes = []
    if not str(source).strip():
        raise ValueError("name the images: mini, a data set, a folder or a table ('.' is the current folder)")
    parts = [part.strip().partition(":") for part in str(source).split(" + ")]
    if str(source) == "mini":
        from gpnns.world import mini_world

        report = gu.Progress(0, f"drawing mini world, {split}").update
        drawn = mini_world.load_split(split, gu.cache_folder(), report=report)
        images = gu.ImageSet(name=f"mini {split}", drawn=True, **drawn)
    elif all(name in TABLE for name, _, _ in parts) and not is_own_folder(source, split):
        images = load_several([(name, own or split) for name, _, own in parts])
    else:
        images, notes = load_own_images(Path(source).expanduser(), split)
    print(summarize(images, notes))
    return images


def is_own_folder(source: str | Path, split: str) -> bool:
    """Whether a name of a data set means a folder of one's own, which it does when one lies here under that name."""
    place = Path(source)
    if not place.is_dir():
        return False
    found = find_dataset(str(source), split)
    if found is None or isinstance(source, Path):
        return True
    if place.resolve() in (found.resolve(), *found.resolve().parents):
        return False  # the data set itself lies there
    what = f"{str(source)!r} is a folder here, and a data set that was found at {found}"
    raise ValueError(f"{what}; write './{source}' for the folder, or rename it")


def summarize(images: gu.ImageSet, notes: Sequence[str] = ()) -> str:
    """One line that says what a set holds, how it was understood, and what was left out."""

    def count(number: int, noun: str) -> str:
        return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"

    parts = [count(len(images), "image")]
    for noun, values in (("class", images.labels), ("group", images.groups)):
        parts += [] if values is None else [count(len(np.unique(values)), noun)]
    if images.captions is not None:
        parts.append(count(sum(map(len, images.captions)), "caption"))
    parts += ["no labels"] if images.labels is None and images.captions is None else []
    line = "; ".join([f"{images.name}: {', '.join([*parts, *notes[:1]])}", *notes[1:]])
    gone = images.left_out
    return line + (f"; {count(len(gone), 'file')} left out: {join_names(gone, 3)}" if gone else "")


def load_dataset(name: str, split: str = "test") -> gu.ImageSet:
    """One split of a data set, fetched first when it is nowhere and may be downloaded.

    Raises ValueError for a split that does not exist and for numbers of images or classes other than the table's,
    FileNotFoundError for what must be got by hand, ConnectionError when a download fails.
    """
    rows, names = read_dataset(name, split)
    wanted, labels = [row for row in rows if row["split"] == split], None
    if "label" in wanted[0]:
        labels = [row["label"] for row in wanted]
        if isinstance(labels[0], str):  # number all classes of the splits that share them
            shared = TABLE[name].get("same_classes", [])
            together = shared if split in shared else [split]
            names = names or sorted({row["label"] for row in rows if row["split"] in together})
            number = {label: i for i, label in enumerate(names)}
            labels = [number[label] for label in labels]
        labels = np.array(labels, dtype=np.int64)
    check_counts(TABLE[name], split, wanted, labels)
    return make_image_set(f"{name} {split}", wanted, labels, names or [])


def make_image_set(
    name: str, rows: list[dict], labels: np.ndarray | None, names: list[str], left_out: Sequence[str] = ()
) -> gu.ImageSet:
    """Rows of layouts.py or own_images.py as an ImageSet; labels: their class numbers, which `names` lists."""
    groups, captions = [row.get("group") or "" for row in rows], [row.get("captions") or [] for row in rows]
    return gu.ImageSet(
        name=name,
        images=[row["path"] for row in rows],
        labels=labels,
        groups=np.array(groups) if any(groups) else None,
        captions=captions if any(captions) else None,
        names=names,
        crops=np.array([row["crop"] for row in rows], dtype=np.int64) if "crop" in rows[0] else None,
        left_out=list(left_out),
    )


def load_several(parts: Sequence[tuple[str, str]]) -> gu.ImageSet:
    """Several data sets, given as (name, split), as one; each becomes a group, and its classes stay apart from the others'.

    Raises ValueError when one of them has no labels, or shows only parts of its pictures.
    """
    loaded = [load_dataset(name, split) for name, split in parts]
    if len(loaded) == 1:
        return loaded[0]
    together = " + ".join(one.name for one in loaded)
    if unfit := [one.name for one in loaded if one.labels is None or one.crops is not None]:
        raise ValueError(f"{together}: {unfit[0]} has no labels, or crops; load it by itself")
    apart = [replace(one, names=[f"{one.name}/{name}" for name in one.names]) for one in loaded]
    return image_set.concat(apart, together, groups=[one.name for one in loaded])


def load_own_images(source: Path, split: str) -> tuple[gu.ImageSet, list[str]]:
    """Images of one's own, and notes on how they were understood (own_images.py)."""
    if not source.exists():
        choice = "give a path, 'mini' for the drawn world, or the name of a data set"
        close = suggest_names(str(source), list(TABLE))
        raise FileNotFoundError(f"no folder or table of images at {source.absolute()}; {choice}{close}")
    rows, left_out, notes = own_images.read_own_images(source, split)
    names, labels = np.unique([row.get("label") or "" for row in rows], return_inverse=True)
    labels, names = (labels, names.tolist()) if names.any() else (None, [])
    name = text_files.to_printable(source.absolute().name if source.is_dir() else source.stem)
    return make_image_set(name, rows, labels, names, left_out), notes


def read_dataset(name: str, split: str) -> tuple[list[dict], list[str] | None]:
    """The rows of a data set as its reader gives them: of `split`, and of other splits where one list holds both."""
    entry = TABLE[name]
    if split not in entry["splits"]:
        raise ValueError(f"{entry['title']} has no split {split!r}; {name} has {', '.join(entry['splits'])}")
    folder = find_dataset(name, split) or fetch_dataset(name, split)
    try:
        return layouts.read_layout(folder, split, entry)
    except BROKEN_LIST as error:
        if entry["title"] in str(error) or str(folder) in str(error):
            raise  # it says what is wrong already
        what = f"are not as its authors hand them out ({type(error).__name__}: {error})"
        raise ValueError(f"{entry['title']}: the lists in {folder} {what}; get them again") from error


BROKEN_LIST = (KeyError, IndexError, TypeError, AttributeError, ValueError)  # what a list with other columns leads to


def check_counts(entry: dict, split: str, rows: list[dict], numbers: np.ndarray | None) -> None:
    """Raise ValueError when a split has not as many images and classes as the table says."""
    classes = None if numbers is None else len(np.unique(numbers))
    for what, expected, found in zip(("images", "classes"), entry["splits"][split], (len(rows), classes), strict=False):
        if found != expected:
            differ = f"{abs(found - expected):,} {'missing' if found < expected else 'too many'}"
            where = layouts.find_common_folder(rows)
            count = f"expected {expected:,} {what} and found {found:,} below {where} ({differ})"
            raise ValueError(f"{entry['title']}, {split}: {count}; compare with {entry['home']}, or unpack again")


def load_ground_truth(name: str) -> list[dict]:
    """For each image of split "query" a dict of rows of split "gallery": "easy", "hard", "junk", as revisited_map of notebook 07 takes.

    Revisited Oxford and Paris: as their authors judged. Google Landmarks: all relevant images are under "easy".
    """
    entry = TABLE[name]
    if not {"query", "gallery"} <= set(entry["splits"]):
        raise ValueError(f"{entry['title']} has no query and gallery splits: its labels say what is relevant")
    if entry["layout"] == "revisited":
        truth = layouts.read_ground_truth(find_dataset(name, "query") or fetch_dataset(name, "query"), entry)["gnd"]
        return [{key: np.atleast_1d(np.asarray(one[key], dtype=np.int64)) for key in layouts.TRUTH} for one in truth]
    row_of = {Path(row["path"]).stem: i for i, row in enumerate(read_dataset(name, "gallery")[0])}
    wanted = [{row_of[image] for image in row["relevant"] if image in row_of} for row in read_dataset(name, "query")[0]]
    none = np.empty(0, dtype=np.int64)
    return [{"easy": np.array(sorted(rows), dtype=np.int64), "hard": none, "junk": none} for rows in wanted]


def suggest_names(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is not known: those most like it."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def fetch_dataset(name: str, split: str) -> Path:
    """Unpack what lies there packed, download what may be downloaded, and return the folder of the data set.

    FileNotFoundError says what must be got by hand and where to put it. Files that are there already stay as they are;
    one that lies in another, perhaps read-only, folder is linked.
    """
    entry, target, todo = TABLE[name], find_writable_place(name), []
    for file in list_files_for(entry, split):
        ready = target / file["gives"]
        if ready.exists():
            continue
        if there := find_file(name, file["gives"]):
            ready.parent.mkdir(parents=True, exist_ok=True)
            ready.symlink_to(there)
        else:  # index/images_000.tar is looked for first: three splits use this name
            around = str(Path(file["gives"]).parent / file["name"])
            todo.append((file, ready, find_file(name, around, file["name"])))
    by_hand = [file["name"] for file, _, packed in todo if packed is None and "url" not in file]
    note = target / f".incomplete_{split}"  # half of a data set must not be taken for all of it after a break
    arranged = " or ".join(map(" and ".join, list_markers(name, split)))
    if by_hand or not (todo or note.exists()):
        how = f" ({entry['get']})" if "get" in entry else ""
        do = f"Get {join_names(by_hand) or 'it'} from {entry['home']}{how} and put it into {target}, packed or as {arranged}"
        lost = f"was not found in {', '.join(map(str, list_places(name)))} and cannot be downloaded without you"
        raise FileNotFoundError(f"{entry['title']} {lost}. {do}")
    note.touch()
    if wanted := [file["name"] for file, _, packed in todo if packed is None]:
        terms = f" Licence: {entry['licence']}." if "licence" in entry else ""
        print(f"{entry['title']} was not found: downloading {join_names(wanted)} to {target}.{terms}", file=sys.stderr)
    for file, ready, packed in todo:
        known = file.get("size"), file.get("md5")
        if packed:
            downloads.check_file(packed, *known)
        archive = packed or downloads.download(file["url"], ready.with_name(file["name"]), *known)
        if downloads.is_archive(file["name"]):
            downloads.unpack_archive(archive, ready, file.get("nested", False))
            if not packed:
                archive.unlink()  # it would take the same room again; one that was put there by hand stays
    note.unlink()
    if folder := find_dataset(name, split):
        return folder
    remedy = "remove the folder and run again, or arrange the files as data/README.md says"
    raise ValueError(f"{entry['title']}: {target} holds all files, but not {arranged}; {remedy}")


def find_file(name: str, *paths: str) -> Path | None:
    """The first file or folder of one of these relative paths in the places of a data set, or None."""
    found = (place / path for place in list_places(name) for path in paths)
    return next((path.absolute() for path in found if path.exists()), None)


def list_files_for(entry: dict, split: str) -> Iterator[dict]:
    """The files that a split needs: numbered ones one by one, `gives` and `url` filled in."""
    for file in entry.get("files", []):
        if split in file.get("splits", entry["splits"]):
            for i in range(file.get("count", 1)):
                numbered = {key: file[key].format(i) for key in ("name", "gives") if key in file}
                urls = {"url": [url.format(i) for url in file["url"]]} if "url" in file else {}
                yield {"gives": numbered["name"], **file, **numbered, **urls}


def find_writable_place(name: str) -> Path:
    """The first of `list_places` that can be written to; made when it is not there."""
    for place in list_places(name):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    places = ", ".join(map(str, list_places(name)))
    raise OSError(f"none of {places} can be written to; set GPNNS_DATA to a folder that can")


def join_names(names: list[str], most: int = 4) -> str:
    """Names in a sentence; the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
