"""Images of one's own: folders, tables and webdataset tars, understood as people really arrange them.

read_*(...) -> (rows, files left out, each with the reason, notes on what was taken as what). A row: path, label (perhaps
""), and what is known of group and captions.

splits of folders -> folders -> captions.json -> tables -> tars -> any of them
"""

from __future__ import annotations

import collections
import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

import gpnns_utils as gu
from gpnns.images import downloads, text_files, walking

PICTURES = {  # what people mean by a picture; `readable` says which of them Pillow reads here
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd", ".svg", ".eps", ".pcx", ".qoi",
    ".exr", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw",
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
    "query": ("query", "queries"),
    "gallery": ("gallery", "index"),
}


def list_readable_suffixes() -> set[str]:
    """The suffixes of `PICTURES` that this Pillow, with the plugins that are registered now, can read."""
    Image.init()
    return {suffix for suffix in PICTURES if Image.EXTENSION.get(suffix) in Image.OPEN}


def get_suffix(path: str | Path) -> str:
    return os.path.splitext(path)[1].lower()


def parse_split(name: str) -> str:
    """The split that a folder or a cell of a table names: "val" is "validation". "" for any other name."""
    name = re.sub(r"[-_ ]*(set|split|images|(19|20)\d\d)$", "", name.casefold())  # train_set, val2017
    return next((split for split, names in SPLITS.items() if name in names), "")


def to_split(name: str) -> str:
    """`parse_split`, or the name itself where it is none of the usual ones."""
    return parse_split(name) or name


def are_splits(inside: set[str]) -> bool:
    """Whether folders are splits: all, or at least two, are named like one. A class may be called "test" beside others."""
    splits = [parse_split(name) for name in inside if parse_split(name)]
    return bool(splits) and (len(splits) == len(inside) or len(set(splits)) > 1)


def choose_split(folder: Path, inside: set[str], split: str) -> str | None:
    """The subfolder that holds `split`, or None where the subfolders `inside`, which hold images, are no splits.

    ValueError where they are others, or two mean the same.
    """
    if to_split(split) not in SPLITS and split in inside:
        return split
    if not are_splits(inside):
        return None
    splits = sorted(filter(parse_split, inside))
    fitting = [name for name in splits if parse_split(name) == to_split(split)]
    if len(fitting) == 1:
        return fitting[0]
    wrong = f"both {' and '.join(fitting)}" if fitting else f"{', '.join(splits)}, but no {split}"
    remedy = f"Give one, such as {folder / (fitting or splits)[0]}, or name the one that you mean {split}"
    raise ValueError(f"{folder} has {wrong}: images of several splits are not measured together. {remedy}")


def has_own_split(source: Path, split: str) -> bool:
    """Whether a folder or a table of one's own has images of this split, apart from others."""
    if source.is_dir():
        _, inside, _ = find_splits(source, walking.list_files(source)[0])
        return are_splits(inside) and split in map(parse_split, inside)
    if get_suffix(source) not in TABLES:
        return False
    columns, _, lines = open_table(source)
    return "split" in columns and any(parse_split(text_files.to_text(line["split"])) == split for _, line in lines)


def find_splits(folder: Path, files: list[Path]) -> tuple[Path, set[str], list[Path]]:
    """Where the splits or classes lie, mostly in `folder` itself; the names of its subfolders with pictures; and those
    pictures, or tars where there are none."""
    pictures = [path for path in files if get_suffix(path) in PICTURES]
    pictures = pictures or [path for path in files if get_suffix(path) == ".tar"]
    place, inside = folder, list_folders_with(pictures, folder)
    while len(inside) == 1 and not are_splits(inside):  # perhaps a folder around them
        place = place / min(inside)
        inside = list_folders_with(pictures, place)
    if not are_splits(inside) or any(path.parent == place for path in pictures):
        place = folder
    return place, list_folders_with(pictures, place), pictures


def list_folders_with(paths: list[Path], folder: Path) -> set[str]:
    """The names of the subfolders in which some of the paths lie."""
    below = [path.relative_to(folder).parts for path in paths if path.is_relative_to(folder)]
    return {parts[0] for parts in below if len(parts) > 1}


def choose_shards(shards: list[Path], split: str) -> list[Path]:
    """The tars of a split where their names tell it, as in train-0000.tar; else all. ValueError when there are none."""
    splits = {path: parse_split(re.split(r"[-_.\d]", path.stem)[0]) for path in shards}
    fitting = [path for path, meant in splits.items() if meant == to_split(split)]
    if any(splits.values()) and not fitting:
        raise ValueError(f"{shards[0].parent} has tars of {', '.join(sorted(set(splits.values())))}, but no {split}")
    return fitting or shards


def read_folder(folder: Path, split: str) -> tuple[list[dict], list[str], list[str]]:
    """The images below `folder`, with label and group from the names of its folders."""
    files, passed = walking.list_files(folder)
    folder, inside, pictures = find_splits(folder, files)
    part = choose_split(folder, inside, split)
    top, notes = folder / part if part else folder, [f"split {part}" if part else "no splits"]
    if part:
        beside = sorted(inside - {part})
        notes += list_names("folders beside the splits passed over:", (n for n in beside if not parse_split(n)))
        notes += list_names("beside it", filter(parse_split, beside))
        loose = sum(path.parent == folder for path in pictures)
        notes += [f"{loose} pictures beside the splits passed over"] if loose else []
    tars = sum(get_suffix(path) == ".tar" for path in files)
    packed = tars > 0 and pictures[0].suffix.lower() == ".tar"
    notes += [f"{tars} tar files beside the pictures passed over"] if tars and not packed else []
    notes += list_names("passed over:", passed)
    pictures = [path for path in pictures if path.is_relative_to(top)]
    if packed:
        rows, left_out, more = read_shards(pictures if part else choose_shards(pictures, split))
        return rows, left_out, notes + more
    rows, known = [], list_readable_suffixes()
    unread = [path for path in pictures if get_suffix(path) not in known]
    left_out = [f"{text_files.to_printable(path)} (this Pillow cannot read {get_suffix(path)})" for path in unread]
    for path in filter(lambda path: get_suffix(path) in known, pictures):
        *above, label = map(text_files.to_printable, path.relative_to(top).parts[:-1] or ("",))
        rows.append({"path": path, "label": label, "group": "/".join(above)})
    if not rows:
        kinds = sorted({get_suffix(path) or "no suffix" for path in files if path.is_relative_to(top)})
        found = f"found only files with {', '.join(kinds[:8])}" if kinds else "it is empty"
        raise ValueError(f"no images below {top.absolute()}: {found}; readable here: {', '.join(sorted(known))}")
    if all(parse_split(row["label"]) for row in rows) and any(row["group"] for row in rows):
        inner = text_files.to_printable(rows[0]["path"].relative_to(top))
        raise ValueError(f"{top}: the splits lie inside the classes ({inner}); arrange the folders as split/class/file")
    bank = next((path for path in (top / "captions.json", folder / "captions.json") if path.exists()), None)
    return rows, left_out, notes + (add_captions(rows, bank, top) if bank else [])


def list_names(what: str, names: Iterable[str]) -> list[str]:
    """A note that ends with names; none where there are none."""
    names = list(names)
    return [f"{what} {', '.join(names)}"] if names else []


def add_captions(rows: list[dict], path: Path, top: Path) -> list[str]:
    """Give rows the captions of a captions.json: {label, or path of an image: a caption, a list of them, or {"captions":
    a list}}. Returns notes; ValueError when nothing in it belongs to an image."""
    given = text_files.read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f'{path} must hold {{"label": ["a caption", ...], ...}}, not a {type(given).__name__}')
    captions = {}
    for key, value in given.items():
        try:
            if isinstance(value, dict):
                if not {"captions", "caption"} & value.keys():
                    raise ValueError(f"a dict without 'captions' ({', '.join(map(str, value))})")
                value = value.get("captions", value.get("caption"))
            captions[text_files.to_printable(key)] = text_files.to_texts(value)
        except ValueError as error:
            raise ValueError(f"{path}, {key!r}: {error}; give a list of texts") from error
    used, alike = set(), collections.Counter(text_files.to_printable(row["path"].name) for row in rows)
    for row in rows:
        inside, name = map(text_files.to_printable, (row["path"].relative_to(top).as_posix(), row["path"].name))
        found = [key for key in dict.fromkeys((row["label"], inside, name)) if key in captions]
        if name in found and name not in (row["label"], inside) and alike[name] > 1:
            raise ValueError(f"{path}: {name!r} names {alike[name]} images; write the folder too, as in {inside!r}")
        row["captions"] = [text for key in found for text in captions[key]]
        used.update(found)
    unused = [key for key in captions if key not in used]
    if unused and not used:
        what = f"none of its keys, such as {unused[0]!r}, is the name of a class or of an image"
        raise ValueError(f"{path}: {what} below {top}")
    return [f"no image for {len(unused)} keys of {path.name}: {', '.join(unused[:3])}"] if unused else []


COLUMNS = {  # the names that other programs give to the columns; the first that is there counts
    "path": ("path", "filepath", "file_path", "filename", "file_name", "file", "image", "image_path", "img_path", "img"),
    "label": ("label", "class", "class_name", "category", "labels", "class_id", "target"),
    "group": ("group", "domain"),
    "caption": ("caption", "captions", "title", "text"),
    "split": ("split",),
}  # fmt: skip
TABLES = (".csv", ".tsv", ".parquet")


def find_columns(header: Sequence[str], path: Path) -> dict[str, str]:
    """Column of ours -> the name that it has in the header of a file. ValueError for two that are called the same."""
    names = {}
    for name in header:
        plain = str(name).strip().casefold().replace(" ", "_")
        if plain in names and plain in sum(COLUMNS.values(), ()):
            raise ValueError(f"{path}: two columns are called {plain!r}; rename one")
        names[plain] = name
    found = {column: next((names[n] for n in known if n in names), None) for column, known in COLUMNS.items()}
    return {column: name for column, name in found.items() if name is not None}


def open_table(path: Path, needs: str = "path") -> tuple[dict[str, str], list[str], Iterator[tuple[int, dict]]]:
    """A .csv, .tsv or .parquet table: its columns (ours -> theirs), those that are not used, and its rows with the
    number of their line, read as they are asked for. ValueError without a column `needs`, and for a damaged row."""
    header, rows = read_parquet_rows(path) if get_suffix(path) == ".parquet" else read_text_rows(path, needs)
    columns, names = find_columns(header, path), list(map(str, header))
    if needs not in columns:
        remedy = f"name it {needs!r}"
        if any(get_suffix(name) in PICTURES for name in names):
            remedy = "it seems to be an image already: write a line such as 'path,label' above it"
        first = ", ".join(names)[:200] or "nothing"
        raise ValueError(f"{path} has no column {needs!r}; its first line holds {first}; {remedy}")
    places = {column: names.index(name) for column, name in columns.items()}
    lines = ((number, {column: cells[place] for column, place in places.items()}) for number, cells in rows)
    return columns, [name for name in names if name not in columns.values()], lines


def read_text_rows(path: Path, needs: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Header and rows of a .csv or .tsv file."""
    lines = text_files.read_text_lines(path)
    first = next((line for line in lines if line.strip()), "").rstrip("\n")
    betweens = "\t" if get_suffix(path) == ".tsv" else ",;\t|"
    headers = {between: next(csv.reader([first], delimiter=between, skipinitialspace=True), []) for between in betweens}
    between = max(headers, key=lambda one: (needs in find_columns(headers[one], path), len(headers[one])))
    return headers[between], read_cells(path, lines, between, len(headers[between]))


def read_cells(path: Path, lines: Iterator[str], between: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header, each with the number of the line where it begins. ValueError for an open quotation mark,
    and for a row of more or fewer than `width` cells."""
    tabs = between == "\t"  # then a text may begin with a quotation mark; else that must close what it opens
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=between, skipinitialspace=True, strict=True, quoting=quoting)
    while True:
        number = reader.line_num + 2  # the header is line 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {number}: {error}; {CLOSED}") from error
        if cells is None:
            return
        inner = [line for cell in cells for line in cell.split("\n")[1:]]
        if any(get_suffix(line.split(between)[0].strip()) in PICTURES for line in inner):
            raise ValueError(f"{path}, line {number}: a quotation mark takes in the lines after it; {CLOSED}")
        if cells and len(cells) != width:
            wrong = f"has {len(cells)} columns where the first line has {width}"
            raise ValueError(f"{path}, line {number} {wrong}; put texts that hold {between!r} in quotation marks")
        if cells:
            yield number, list(map(unquote, cells)) if tabs else cells


CLOSED = 'is a quotation mark left open there? A text that holds " is written with "" in its place and " around it'


def unquote(cell: str) -> str:
    """A cell without the quotation marks that spreadsheets put around a text, and double inside of it."""
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def read_parquet_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, list]]]:
    """Header and rows of a .parquet file; values keep their types."""
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow (pip install pyarrow); or save the table as .csv") from error
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a parquet table ({reason}); get it again") from error
    return table.column_names, ((i, list(row.values())) for i, row in enumerate(table.to_pylist(), 2))


def read_own_table(table: Path, split: str) -> tuple[list[dict], list[str], list[str]]:
    """The images of a table: lines that name the same path are one image, which has the captions of all of them."""
    columns, unused, lines = open_table(table)
    images, first_line, found = {}, {}, collections.Counter()
    for number, line in lines:
        try:
            row = {column: text_files.to_text(line.get(column)) for column in ("path", "label", "group", "split")}
            row["captions"] = text_files.to_texts(line.get("caption"), between="|")
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: {error}") from error
        if not row["path"]:
            raise ValueError(f"{table}, line {number} has no path; remove it, or fill it in")
        found[row["split"]] += 1
        if "split" in columns and to_split(row["split"]) != to_split(split):
            continue
        slashes = row["path"] if "/" in row["path"] else row["path"].replace("\\", "/")  # as Windows writes them
        key = os.path.normpath(slashes)
        known = images.setdefault(key, row | {"captions": []})
        first_line.setdefault(key, number)
        known["captions"] += [text for text in row["captions"] if text not in known["captions"]]
        for column in ("label", "group"):
            if row[column] and known[column] and row[column] != known[column]:
                before = f"in line {first_line[key]} it has {known[column]!r}; an image has one {column}"
                raise ValueError(f"{table}, line {number}: {row['path']} has the {column} {row[column]!r}, {before}")
            known[column] = known[column] or row[column]
    if not images:
        there = ", ".join(name or "nothing" for name in found)
        elsewhere = f"has a column 'split' (with {there}) but no image in split {split!r}"
        raise ValueError(f"{table} {elsewhere if found else 'names no images: put one into each line below the first'}")
    listings = {}
    places = {key: (table.parent / key, table.parent / row["path"]) for key, row in images.items()}
    stored = {key: find_stored(one, listings) or find_stored(two, listings) for key, (one, two) in places.items()}
    rows = [images[key] | {"path": path} for key, path in stored.items() if path]
    left_out = [f"{places[key][0]} (it is not there)" for key, path in stored.items() if not path]
    if not rows:
        gone = f"none of its {len(images)} images is there; paths count from its folder"
        raise ValueError(f"{table}: {gone}: {left_out[0]}")
    notes = [f"split {split}" if "split" in columns else "no splits"]
    beside = {name: count for name, count in found.items() if "split" in columns and to_split(name) != to_split(split)}
    notes += list_names("beside it", [f"{name or 'nothing'} {count:,}" for name, count in beside.items()])
    notes += list_names("columns:", [f"{theirs} as {ours}" for ours, theirs in columns.items() if theirs != ours])
    return rows, left_out, notes + list_names("columns not used:", unused)


def find_stored(path: Path, listings: dict[Path, dict[str, Path]]) -> Path | None:
    """The path as the disk has it, or None. A name with accents may be stored in Unicode's other form. `listings` keeps
    what lies in each folder, which is faster than asking for every file."""
    folder = path.parent
    if folder not in listings:
        stored = folder if folder.is_dir() or folder == path else find_stored(folder, listings)
        names = os.listdir(stored) if stored and os.access(stored, os.R_OK) else []
        printed = {text_files.to_printable(name): stored / name for name in names}
        listings[folder] = printed | {name: stored / name for name in names}
    return listings[folder].get(path.name) or listings[folder].get(text_files.to_printable(path.name))


def read_shards(shards: Sequence[Path]) -> tuple[list[dict], list[str], list[str]]:
    """The images of webdataset tars: files with the same name up to the first point are one sample.

    The image of a sample is a .jpg, .png ...; its label is in .cls or under "label" in .json, its captions are the
    lines of .txt or under "caption" in .json. The tars are unpacked once, into the cache.
    """
    shards = sorted(Path(shard).absolute() for shard in shards)
    about = repr([(str(shard), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards])
    folder = gu.cache_folder() / "shards" / hashlib.blake2b(about.encode(), digest_size=8).hexdigest()
    rows, left_out, known = [], [], list_readable_suffixes()
    for i, shard in enumerate(shards):
        target = folder / f"{i:05d}_{shard.stem}"
        if not target.exists():
            downloads.unpack_archive(shard, target)
        samples: dict[str, dict[str, Path]] = {}
        for path in sorted(walking.list_files(target)[0]):
            key, _, suffix = path.name.partition(".")
            samples.setdefault(str(path.parent / key), {})["." + suffix.lower()] = path
        for parts in samples.values():
            image = next((path for suffix, path in parts.items() if suffix in known), None)
            if image is not None:
                rows.append({"path": image, **read_sample(parts)})
            for path in parts.values():
                if path != image and get_suffix(path) in PICTURES:
                    what = NAMED if image is None else f"a sample has one picture, here {image.name}"
                    what = "this Pillow cannot read it" if get_suffix(path) not in known else what
                    left_out.append(f"{path.relative_to(target)} of {shard.name} ({what})")
    if not rows:
        raise ValueError(f"no images in {shards[0]}" + (f" and {len(shards) - 1} more" if len(shards) > 1 else ""))
    if all(row["label"].isdigit() for row in rows):  # class numbers: in the order of the numbers
        width = max(len(row["label"]) for row in rows)
        rows = [row | {"label": row["label"].zfill(width)} for row in rows]
    return rows, left_out, [f"{len(shards)} tar files"]


NAMED = "its name has several points; what follows the first says what a file is"


def read_sample(parts: dict[str, Path]) -> dict:
    """Label and captions of one webdataset sample."""
    facts = text_files.read_json(parts[".json"]) if ".json" in parts else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{parts['.json']} holds a {type(facts).__name__}, not a dict with 'label' or 'caption'")
    try:
        label, captions = facts.get("label"), facts.get("caption", facts.get("captions"))
        label = text_files.read_text(parts[".cls"]) if ".cls" in parts else label
        captions = text_files.read_text(parts[".txt"]).splitlines() if ".txt" in parts else captions
        return {"label": text_files.to_text(label), "captions": text_files.to_texts(captions)}
    except ValueError as error:
        raise ValueError(f"{parts.get('.json', next(iter(parts.values())))}: {error}") from error


def read_own_images(source: Path, split: str) -> tuple[list[dict], list[str], list[str]]:
    """A folder, a table or a tar as rows sorted by path, each a dict with path and, where known, label, group, captions;
    the files left out; and notes on what was taken as what.

    Raises ValueError for what is none of them, for no images, and when only some of them have labels.
    """
    if source.is_dir():
        rows, left_out, notes = read_folder(source, split)
    elif get_suffix(source) in TABLES:
        rows, left_out, notes = read_own_table(source, split)
    elif get_suffix(source) == ".tar":
        rows, left_out, notes = read_shards([source])
    else:
        raise ValueError(f"{source} is neither a folder, a .csv, .tsv or .parquet table, nor a .tar")
    rows.sort(key=lambda row: (text_files.to_printable(row["path"]), os.fsencode(row["path"])))
    unlabelled = [row for row in rows if not row.get("label")]
    if 0 < len(unlabelled) < len(rows):
        example = text_files.to_printable(unlabelled[0]["path"])
        what = f"{len(unlabelled)} of {len(rows)} images have no label, for example {example}"
        raise ValueError(f"{source}: {what}; give every image one, or none")
    return rows, left_out, notes
