"""Benchmark tables, as notebook 07 measures them: columns as data, a function for each task, cells that are measured once.

columns -> the sets that they need -> a score for each encoder and column, kept in a file -> beside what is published
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gpnns_utils as gu
from gpnns import published_tables
from gpnns.encoders import heads
from gpnns.images import datasets, image_set, text_files

# --- columns ---------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a benchmark table. images and gallery: sources for `gu.load_images`, gallery "" for the same images; task
    and metric: a key of TASKS."""

    name: str
    images: str
    gallery: str
    task: str
    metric: str


TOLERANCE = 0.5  # points: what rounding, half precision and versions of libraries may differ by


def load_columns(table: str) -> list[Column]:
    """The columns of a table, from data/columns.csv: "mini" (the drawn world, as notebooks 03 and 04 measure, and shifted),
    "flowers" (four on Flowers102's training images, for a laptop), "gpnns" (GP-NNS, Table 4) and "mcip" (MCIP, Table 1), the
    last two under the names of data/published/*.csv."""
    lines = published_tables.read_numbers(gu.DATA / "columns.csv")
    return [Column(*(line[field] or "" for field in Column._fields)) for line in lines if line["table"] == table]


# --- images, or why a column stays blank ------------------------------------------------------------------------------


def digest_set(images: gu.ImageSet) -> str:
    """A hash of a set's pixels, or the names, sizes and times of its files, with labels and captions."""
    digest = hashlib.blake2b(repr(images.captions).encode(), digest_size=8)
    digest.update(b"" if images.labels is None else images.labels.tobytes())
    if isinstance(images.images, np.ndarray):
        digest.update(np.ascontiguousarray(images.images))
    else:
        files = ((path.name, path.stat()) for path in images.images)
        digest.update(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode())
    return digest.hexdigest()


def load_sets(columns: list[Column]) -> tuple[dict[str, gu.ImageSet], dict[str, str]]:
    """({source: images}, {source: its digest, or why it is not there}) for all that the columns need. A set that is nowhere
    stops nothing; without its gallery nothing else is fetched for a column."""
    sets, notes = {}, {}
    wanted = ((s, column.gallery) for column in columns for s in (column.gallery, column.images) if s)
    for source, gallery in dict.fromkeys(wanted):
        if source in notes or (source != gallery and gallery and gallery not in sets):
            continue
        try:
            sets[source] = gu.load_images(*source.split(":"))
            notes[source] = digest_set(sets[source])
        except (OSError, ValueError) as error:  # the loader's own words: what is missing, and how to get it
            sets.pop(source, None)
            notes[source] = str(error)
    return sets, notes


# --- a function for each task -----------------------------------------------------------------------------------------


def embed_once(encoder: gu.Encoder, source: str, sets: dict, kept: dict) -> tuple[np.ndarray, gu.ImageSet]:
    """The embeddings of a set and the images that they belong to: kept from an earlier column, else from the cache, else
    computed."""
    key = id(encoder), source
    if key not in kept:
        kept[key] = gu.embed_images(encoder, sets[source])
    return kept[key]


def score_image_to_image(
    encoder: gu.Encoder, column: Column, sets: dict, kept: dict, with_query: bool = False, recall_at: int = 0
) -> tuple[gu.Score, np.ndarray]:
    """Every image asks all images of its set, with_query: itself too. mAP, or R@k."""
    vectors, images = embed_once(encoder, column.images, sets, kept)
    own = None if with_query else np.arange(len(images))[:, None]
    ranks = gu.rank_relevant(vectors, vectors, gu.same_label(images.labels, images.labels), leave_out=own)
    return (gu.recall_at_k(ranks, recall_at) if recall_at else gu.mean_average_precision(ranks)), images.labels


def trapezoid_average_precision(ranks: np.ndarray) -> gu.Score:
    """Average precision with each precision averaged with the one just before the rank, as revisitop computes it."""
    number = np.isfinite(ranks).sum(axis=1)
    hits = np.arange(1.0, ranks.shape[1] + 1)
    before = np.where(ranks > 1, (hits - 1) / np.maximum(ranks - 1, 1), 1.0)
    total = np.where(np.isfinite(ranks), (before + hits / ranks) / 2, 0).sum(axis=1)
    return gu.Score(np.where(number, total / np.maximum(number, 1), np.nan))


def score_revisited(
    queries: np.ndarray, gallery: np.ndarray, ground_truth: list[dict], protocol: str = "medium"
) -> gu.Score:
    """mAP under a protocol; ground_truth: per query a dict of gallery rows under "easy", "hard" and "junk"."""
    wanted = {"easy": ["easy"], "medium": ["easy", "hard"], "hard": ["hard"]}[protocol]
    ignored = [kind for kind in ("easy", "hard", "junk") if kind not in wanted]

    def rows_of(kinds):
        return [np.concatenate([np.asarray(truth[kind], dtype=int) for kind in kinds]) for truth in ground_truth]

    ranks = gu.rank_relevant(queries, gallery, rows_of(wanted), leave_out=rows_of(ignored), ties="pessimistic")
    return trapezoid_average_precision(ranks)


def measure_revisited(encoder: gu.Encoder, column: Column, sets: dict, kept: dict) -> tuple[gu.Score, None]:
    """The mAP of revisited Oxford and Paris under the protocol medium."""
    (queries, asked), (gallery, searched) = (
        embed_once(encoder, source, sets, kept) for source in (column.images, column.gallery)
    )
    if left_out := asked.left_out + searched.left_out:
        raise ValueError(
            f"the ground truth of {column.images} counts images by row; {left_out[0]} cannot be read: get it again"
        )
    return score_revisited(queries, gallery, datasets.load_ground_truth(column.images.split(":")[0])), None


def score_knn(encoder: gu.Encoder, column: Column, sets: dict, kept: dict) -> tuple[gu.Score, np.ndarray]:
    """The accuracy of a vote of 21 neighbours; the gallery's classes all stand for election."""
    vectors, images = embed_once(encoder, column.images, sets, kept)
    labels, asks = images.labels, np.full(len(vectors), True)
    if column.gallery:
        known, searched = embed_once(encoder, column.gallery, sets, kept)
        known_labels = searched.labels
    else:
        for label in np.unique(labels):
            asks[np.flatnonzero(labels == label)[::2]] = False
        known, known_labels = vectors[~asks], labels[~asks]
    score = gu.knn_accuracy(vectors[asks], labels[asks], known, known_labels, k=21, temperature=0.1)
    return score, labels[asks]


def list_class_names(images: gu.ImageSet) -> tuple[list[str], np.ndarray]:
    """The names of the classes that occur, and for each image the number of its own."""
    if images.captions is not None:
        return image_set.class_texts(images)
    present, own = np.unique(images.labels, return_inverse=True)
    return [images.names[label] for label in present], own


def score_zero_shot(
    encoder: gu.Encoder, column: Column, sets: dict, kept: dict, prompts: Sequence[str] = ("a photo of {}",)
) -> tuple[gu.Score, np.ndarray]:
    """The accuracy of taking the class whose name is nearest."""
    vectors, images = embed_once(encoder, column.images, sets, kept)
    named, own = list_class_names(images)
    return gu.zero_shot_accuracy(vectors, own, gu.class_embeddings(encoder, named, prompts)), images.labels


def score_zero_shot_80(encoder: gu.Encoder, column: Column, sets: dict, kept: dict) -> tuple[gu.Score, np.ndarray]:
    """`score_zero_shot` with the mean of the 80 prompts that CLIP was published with."""
    import open_clip

    prompts = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return score_zero_shot(encoder, column, sets, kept, prompts)


def score_text_to_image(
    encoder: gu.Encoder, column: Column, sets: dict, kept: dict, own_image: bool = False
) -> tuple[gu.Score, np.ndarray | None]:
    """R@5: the share of captions with a right image among the first five; own_image: right is only its own image."""
    vectors, images = embed_once(encoder, column.images, sets, kept)
    texts, relevant = image_set.text_queries(images)
    units = None
    if own_image:
        pairs = [(caption, row) for row, captions in enumerate(images.captions) for caption in captions]
        texts, relevant = [caption for caption, _ in pairs], [np.array([row]) for _, row in pairs]
        units = np.array([row for _, row in pairs])
    return gu.text_to_image_recall(gu.embed_texts(encoder, texts), vectors, relevant, k=5), units


TASKS = {  # (task, metric): from (encoder, column, sets, embeddings kept) to (score, what succeeds and fails together)
    ("image_to_image", "mAP"): score_image_to_image,
    ("image_to_image", "mAP (self included)"): functools.partial(score_image_to_image, with_query=True),
    ("image_to_image", "R@1"): functools.partial(score_image_to_image, recall_at=1),
    ("revisited", "mAP (medium)"): measure_revisited,
    ("knn", "accuracy"): score_knn,
    ("zero_shot", "accuracy"): score_zero_shot,
    ("zero_shot", "accuracy (80 templates)"): score_zero_shot_80,
    ("text_to_image", "R@5"): score_text_to_image,
    ("text_to_image", "R@5 (own image)"): functools.partial(score_text_to_image, own_image=True),
}

# --- a cell is measured once ------------------------------------------------------------------------------------------


def takes_texts(column: Column) -> bool:
    """Whether a column needs a text tower."""
    return column.task in ("zero_shot", "text_to_image")


def name_cell_file(encoder: gu.Encoder, column: Column, folder: Path) -> Path:
    """The file of one cell, named by a hash of all that decides it but the images."""
    parts = ["images", "texts"] if takes_texts(column) else ["images"]
    key = json.dumps([*map(encoder.fingerprint, parts), *column])
    return folder / f"{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"


def score_cell(encoder: gu.Encoder, column: Column, sets: dict, kept: dict) -> dict:
    """A column, measured now: {"column", "row", "left out"}, the last with the files that could not be read."""
    score, units = TASKS[column.task, column.metric](encoder, column, sets, kept)
    data_set, split = column.images.split(":")
    split = split if data_set == "mini" else data_set
    row = gu.result_row(encoder.name, column.task, column.metric, score, units, split=split)
    sources = filter(None, (column.images, column.gallery))
    left_out = [file for source in sources for file in embed_once(encoder, source, sets, kept)[1].left_out]
    return {"column": column.name, "row": row, "left out": left_out}


def measure_cell(encoder: gu.Encoder, column: Column, sets: dict, notes: dict, folder: Path, kept: dict) -> dict:
    """One cell, from its file or measured now and written; {"why": ...} where it cannot be measured."""
    if takes_texts(column) and not encoder.has_text:
        return {"why": f"{encoder.name} has no text tower"}
    needed, path = list(filter(None, (column.images, column.gallery))), name_cell_file(encoder, column, folder)
    data, absent = [notes.get(source) for source in needed], [source for source in needed if source not in sets]
    known = text_files.read_json(path) if path.exists() else None
    if known and (absent or known["data"] == data):
        return known
    if absent:
        return {"why": next(notes[source] for source in absent if source in notes)}
    cell = score_cell(encoder, column, sets, kept) | {"data": data}
    gu.write_atomically(path, lambda file: file.write((json.dumps(cell, indent=1) + "\n").encode()))
    return cell


def measure_table(
    names: list[str], columns: list[Column], sets: dict, notes: dict, protocol: str, folder: Path
) -> dict[tuple[str, str], dict]:
    """{(encoder, column name): cell} for a whole table, in the order of its columns.

    protocol: "own" (pictures as the encoder's authors prepare them) or "paper": columns of images then see them as GP-NNS
    does and take the features before CLIP's projection, as in the printed rows, and columns of texts take the encoder whole.
    In a table that has both, an encoder with weights of its own (`@file`) has one embedding and one preparation for all
    columns, as MCIP promises. An encoder whose weights cannot be had leaves its row blank; a mistyped file stops the run.
    """
    cells, progress = {}, gu.Progress(len(names) * len(columns), "measuring", "columns")
    for name in names:
        try:
            whole = gu.load_encoder(name)
        except FileNotFoundError:
            raise  # a mistyped file
        except (OSError, ImportError) as error:
            cells |= {(name, column.name): {"why": str(error)} for column in columns}
            continue
        one = "@" in name and any(map(takes_texts, columns))
        on_images, kept = heads.embed_as_in_paper(whole, one) if protocol == "paper" else whole, {}
        for column in columns:
            encoder = whole if takes_texts(column) and not one else on_images
            cells[name, column.name] = measure_cell(encoder, column, sets, notes, folder, kept)
            progress.update(len(cells))
    return cells


def average_columns(values: list[float | None]) -> float | str:
    """AVG of all columns, or a text that says what the mean is over when some are missing."""
    there = [value for value in values if value is not None]
    if len(there) == len(values):
        return float(np.mean(there))
    return f"{np.mean(there):.1f} over {len(there)} of {len(values)}" if there else f"over 0 of {len(values)}"


# --- beside what is published -----------------------------------------------------------------------------------------


def find_published_rows(table: str) -> dict[str, dict]:
    """{encoder: its row in the paper's table}, for encoders whose weights are public."""
    large, small = "open_clip:ViT-L-14-336/openai", "open_clip:ViT-B-16/openai"
    if table == "gpnns":
        twins = {small: ("CLIP ViT-B", "-"), large: ("CLIP ViT-L", "-")}
        twins |= {"gpnns:ViT-B": ("CLIP ViT-B", "ArcMargin"), "gpnns:ViT-L": ("CLIP ViT-L", "ArcMargin")}
        twins["timm:vit_base_patch16_224.augreg_in21k"] = ("IN21k ViT-B", "-")
    else:
        twins = {large: ("OpenAI ViT-L/14@336", 0, 0, 0)}
        twins["open_clip:ViT-L-14/datacomp_xl_s13b_b90k"] = ("DataComp ViT-L/14", 0, 0, 0)
        twins["open_clip:ViT-SO400M-14-SigLIP-384/webli"] = ("SigLIP SO400M/14@384", 0, 0, 0)
    rows = load_published_table(table)
    return {name: row for name, twin in twins.items() for row in rows if tuple(row.values())[: len(twin)] == twin}


@functools.cache
def load_published_table(table: str) -> list[dict]:
    """All rows of the paper's table."""
    return published_tables.load_published({"gpnns": "gpnns_table4", "mcip": "mcip_table1"}[table])


def compare_table(table: str, measured: dict[str, dict]) -> list[dict]:
    """The published table of a paper, one dict per row: for each of its cells whether it agrees (within TOLERANCE points), differs
    or was not run, as `compare_cell` says. measured: {encoder: {column: per cent or None}}; a row that belongs to none of the encoders
    of `find_published_rows` was not run, for its weights are not published."""
    columns = [column.name for column in load_columns(table)]
    by_row, lines = {id(row): measured.get(name, {}) for name, row in find_published_rows(table).items()}, []
    for row in load_published_table(table):
        ours, steps = by_row.get(id(row), {}), [key for key in ("gpr_ft", "mcip", "realigned") if row.get(key)]
        label = ", ".join([row["model"], *([] if row.get("loss", "-") == "-" else [row["loss"]]), *steps])
        lines.append({"model": label} | {name: compare_cell(row[name], ours.get(name)) for name in columns})
    return lines


def compare_cell(printed: float, measured: float | None) -> str:
    """What is to be said of one published number: "76.0 –" (not run), "76.0 ✓ 75.8" (agrees) or "76.0 ✗ 71.2" (differs)."""
    if measured is None:
        return f"{printed} –"
    return f"{printed} {'✓' if abs(printed - measured) <= TOLERANCE else '✗'} {measured:.1f}"
