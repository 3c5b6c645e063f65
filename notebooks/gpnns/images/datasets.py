"""Images by name: where data sets lie, how they are fetched, one split of them as an ImageSet.

`gpnns_utils.load_images(source, split)` calls `load`; own_images.py reads what has no name. What differs from one data
set to the next is in data/datasets.toml, how their authors arrange them in layouts.py. Each data set has a folder of its own
name in one of the folders of the environment variable GPNNS_DATA (several: separated as in PATH), or in .cache/datasets.

the table -> where data lie -> loading -> fetching
"""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns.images import downloads, layouts, own_images, text_files, walking

KAGGLE = Path("/kaggle/input")  # data sets that a Kaggle notebook was given; read only


# --- the table -------------------------------------------------------------------------------------------------------


def read_datasets(path: Path) -> dict[str, dict]:
    """datasets.toml as name -> entry. An entry that is `like` another takes over the fields it does not set itself."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: {"folder": entry.get("like", name), **table.get(entry.get("like"), {}), **entry}
        for name, entry in table.items()
    }


TABLE = read_datasets(gu.DATA / "datasets.toml")


def list_datasets() -> list[dict]:
    """One dict per data set: name, title, splits with their counts, licence, how to get it, where it was found."""
    rows = []
    for name, entry in TABLE.items():
        splits = [split + (f" {counts[0]:,}" if counts else "") for split, counts in entry["splits"].items()]
        found = {str(folder) for split in entry["splits"] if (folder := find_dataset(name, split))}
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


def list_data_folders() -> list[Path]:
    """The folders in which each data set has a folder of its own name, in the order in which they are searched."""
    given = [Path(part).expanduser() for part in os.environ.get("GPNNS_DATA", "").split(os.pathsep) if part]
    return [*given, gu.cache_folder() / "datasets"]


def list_places(name: str) -> list[Path]:
    """Where the data set may lie: its folder in each of `data_folders`."""
    return [folder / TABLE[name]["folder"] for folder in list_data_folders()]


def find_dataset(name: str, split: str) -> Path | None:
    """The folder that holds what a split needs, or None; never one whose download was interrupted."""
    markers = get_for_split(TABLE[name]["marker"], split)
    for place in list_places(name):
        if not (place / f".incomplete_{split}").exists() and (folder := find_below(place, markers)):
            return folder
    return find_below(KAGGLE, markers, depth=6)


def get_for_split(value, split: str):
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
        below = [walking.list_subfolders(folder) for folder in level[:300]]
        level = [sub for subs in below if len(subs) <= 100 for sub in subs]
    return None


# --- loading ---------------------------------------------------------------------------------------------------------


def load(source: str | Path, split: str = "test") -> gu.ImageSet:
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
        images = gu.ImageSet(name=f"mini {split}", **mini_world.load_split(split, gu.cache_folder(), report=report))
    elif all(name in TABLE for name, _, _ in parts) and not is_own_folder(source, split):
        images = gu.ImageSet(**load_several([(name, own or split) for name, _, own in parts]))
    else:
        fields, notes = load_own_images(Path(source).expanduser(), split)
        images = gu.ImageSet(**fields)
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
    raise ValueError(
        f"{str(source)!r} is a folder here, and a data set that was found at {found}; write './{source}' for the folder, "
        f"or rename it"
    )


def summarize(images: gu.ImageSet, notes: Sequence[str] = ()) -> str:
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


def load_dataset(name: str, split: str = "test") -> dict:
    """The fields of an ImageSet for one split of a data set, fetched first when it is nowhere and may be downloaded.

    Raises ValueError for a split that does not exist and for numbers of images or classes other than the table's,
    FileNotFoundError for what must be got by hand, ConnectionError when a download fails.
    """
    rows, names = read_dataset(name, split)
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


def load_several(parts: Sequence[tuple[str, str]]) -> dict:
    """The fields of one ImageSet for several data sets, given as (name, split); each becomes a group of the whole.

    Raises ValueError when one of them has no labels, or shows only parts of its pictures.
    """
    loaded = [load_dataset(name, split) for name, split in parts]
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


def load_own_images(source: Path, split: str) -> tuple[dict, list[str]]:
    """The fields of an ImageSet for images of one's own, and notes on how they were understood (own_images.py)."""
    if not source.exists():
        raise FileNotFoundError(
            f"no folder or table of images at {source.absolute()}; give a path, 'mini' for the drawn world, or the name of "
            f"a data set{suggest_names(str(source), list(TABLE))}"
        )
    rows, left_out, notes = own_images.read_own_images(source, split)
    names, numbers = np.unique([row.get("label") or "" for row in rows], return_inverse=True)
    groups, captions = [row.get("group") or "" for row in rows], [row.get("captions") or [] for row in rows]
    return {
        "name": text_files.to_printable(source.absolute().name if source.is_dir() else source.stem),
        "images": [row["path"] for row in rows],
        "labels": numbers if names.any() else None,
        "groups": np.array(groups) if any(groups) else None,
        "captions": captions if any(captions) else None,
        "names": names.tolist() if names.any() else [],
        "left_out": left_out,
    }, notes


def read_dataset(name: str, split: str) -> tuple[list[dict], list[str] | None]:
    """The rows of a data set as its reader gives them: of `split`, and of other splits where one list holds both."""
    entry = TABLE[name]
    if split not in entry["splits"]:
        raise ValueError(f"{entry['title']} has no split {split!r}; {name} has {', '.join(entry['splits'])}")
    folder = find_dataset(name, split) or fetch_dataset(name, split)
    try:
        rows, names = layouts.READERS[entry["layout"]](folder, split, entry)
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
                f"{layouts.find_common_folder(rows)} ({abs(found - expected):,} {word}); compare with {entry['home']}, or unpack again"
            )


def load_ground_truth(name: str) -> list[dict]:
    """For each image of split "query" a dict of rows of split "gallery": "easy", "hard", "junk", as revisited_map of notebook 07 takes.

    Revisited Oxford and Paris: as their authors judged. Google Landmarks: all relevant images are under "easy". Other
    data sets with a query and a gallery split: images that share a class, under "easy", the same file under "junk".
    """
    entry = TABLE[name]
    if not {"query", "gallery"} <= set(entry["splits"]):
        raise ValueError(f"{entry['title']} has no query and gallery splits: its labels say what is relevant")
    if entry["layout"] == "revisited":
        truth = layouts.read_revisited(find_dataset(name, "query") or fetch_dataset(name, "query"), entry)["gnd"]
        return [{key: np.atleast_1d(np.asarray(one[key], dtype=np.int64)) for key in layouts.TRUTH} for one in truth]
    queries = [row for row in read_dataset(name, "query")[0] if row["split"] == "query"]
    gallery = [row for row in read_dataset(name, "gallery")[0] if row["split"] == "gallery"]
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
        truth.append(
            dict(zip(layouts.TRUTH, (np.array(part, dtype=np.int64) for part in (easy, [], junk)), strict=True))
        )
    return truth


def map_objectnet_to_imagenet() -> dict[str, list[int]]:
    """Class of ObjectNet -> numbers of the ImageNet classes that count as right, for the 113 that both have."""
    folder = (find_dataset("objectnet", "test") or fetch_dataset("objectnet", "test")) / "mappings"
    texts = [line.strip() for line in (folder / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()]
    number = {
        int(line): int(i) for i, line in text_files.read_json(folder / "pytorch_to_imagenet_2012_id.json").items()
    }
    both = text_files.read_json(folder / "objectnet_to_imagenet_1k.json")
    return {name: [number[texts.index(text) + 1] for text in same.split("; ")] for name, same in both.items()}


def suggest_names(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is not known: those most like it."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


# --- downloads -------------------------------------------------------------------------------------------------------


def fetch_dataset(name: str, split: str) -> Path:
    """Unpack what lies there packed, download what may be downloaded, and return the folder of the data set.

    FileNotFoundError says what must be got by hand and where to put it. Files that are there already stay as they are;
    one that lies in another, perhaps read-only, folder is linked.
    """
    entry = TABLE[name]
    target = find_writable_place(name)
    todo = []
    for file in list_files_for(entry, split):
        for place in (p for p in list_places(name) if not (target / file["gives"]).exists()):
            if (place / file["gives"]).exists():
                (target / file["gives"]).parent.mkdir(parents=True, exist_ok=True)
                (target / file["gives"]).symlink_to((place / file["gives"]).absolute())
        if not (target / file["gives"]).exists():
            around = Path(file["gives"]).parent / file["name"]  # index/images_000.tar: three splits use this name
            packed = [place / path for place in list_places(name) for path in (around, file["name"])]
            todo.append(file | {"packed": next((path for path in packed if path.is_file()), None)})
    by_hand = [file for file in todo if file["packed"] is None and "url" not in file]
    note = target / f".incomplete_{split}"  # half of a data set must not be taken for all of it after a break
    if by_hand or not (todo or note.exists()):
        raise FileNotFoundError(explain_by_hand(name, split, by_hand, target))
    note.touch()
    wanted = [file for file in todo if file["packed"] is None]
    if wanted:
        terms = f" Licence: {entry['licence']}." if "licence" in entry else ""
        print(f"{entry['title']} was not found: downloading {join_names(wanted)} to {target}.{terms}", file=sys.stderr)
    for file in todo:
        packed = file["packed"] or downloads.download(
            file["url"], target / Path(file["gives"]).parent / file["name"], file.get("size"), file.get("md5")
        )
        if file["packed"] is not None:
            downloads.check_file(packed, file.get("size"), file.get("md5"))
        if downloads.is_archive(file["name"]):
            downloads.unpack_archive(packed, target / file["gives"], file.get("nested", False))
            if file["packed"] is None:
                packed.unlink()  # it would take the same room again; one that was put there by hand stays
        elif file["packed"] is not None:
            (target / file["gives"]).symlink_to(packed.absolute())
    note.unlink()
    if folder := find_dataset(name, split):
        return folder
    raise ValueError(
        f"{entry['title']}: {target} holds all files, but not {' or '.join(map(' and '.join, get_for_split(entry['marker'], split)))}; "
        f"remove the folder and run again, or arrange the files as data/README.md says"
    )


def list_files_for(entry: dict, split: str) -> Iterator[dict]:
    """The files that a split needs: numbered ones one by one, `gives` and `url` filled in."""
    for file in entry.get("files", []):
        if split in file.get("splits", entry["splits"]):
            for i in range(file.get("count", 1)):
                numbered = {key: file[key].format(i) for key in ("name", "gives") if key in file}
                urls = {"url": [url.format(i) for url in file["url"]]} if "url" in file else {}
                yield {"gives": numbered["name"], **file, **numbered, **urls}


def find_writable_place(name: str) -> Path:
    """The data set's folder in the first of `data_folders` that can be written to; made when it is not there."""
    for place in list_places(name):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OSError(
        f"none of {', '.join(map(str, list_data_folders()))} can be written to; set GPNNS_DATA to a folder that can"
    )


def join_names(files: list[dict]) -> str:
    """The names of some files; the first of many."""
    return ", ".join(file["name"] for file in files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")


def explain_by_hand(name: str, split: str, files: list[dict], target: Path) -> str:
    """What to get, from where, and where to put it."""
    entry = TABLE[name]
    how = f" ({entry['get']})" if "get" in entry else ""
    layouts = " or ".join(" and ".join(paths) for paths in get_for_split(entry["marker"], split))
    return (
        f"{entry['title']} was not found in {', '.join(map(str, list_places(name)))} and cannot be downloaded without you. "
        f"Get {join_names(files) or 'it'} from {entry['home']}{how} and put it into {target}, packed or as {layouts}"
    )
