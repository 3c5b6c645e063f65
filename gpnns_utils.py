"""What the notebooks of this course share, in the order in which data flows.

where are we -> images -> encoders -> embeddings -> neighbours -> scores -> results -> pictures

Everything that passes from one section to the next is a plain numpy array or a small dataclass, so you can leave at
any point with what you have. Embeddings are float32 (n, d) with unit rows; a row number is an image's identity.
Everything else lives in the package `gpnns`, notebooks/gpnns: what is read by name in its images/ and encoders/, and one file
for each lesson. Libraries that only some readers need are imported where they are used.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

HERE = Path(__file__).resolve().parent
CHECKOUT = (HERE / "notebooks" / "gpnns").is_dir()  # otherwise: installed by pip, the data lie in the package
if CHECKOUT:
    sys.path.insert(0, str(HERE / "notebooks"))  # where the package is, also for those who installed nothing

from gpnns.encoders import embedding_cache
from gpnns.encoders.encoder import Encoder
from gpnns.images import decoding
from gpnns.images.image_set import NO_LABELS, ImageSet, check_rows
from gpnns.machine import Progress, best_device, best_precision, write_atomically
from gpnns.machine import disk_error as disk_error  # passed on, like the next two
from gpnns.machine import display_over as display_over
from gpnns.machine import in_notebook as in_notebook

Array = np.ndarray
Index = Any  # of faiss
Picture = HTML = Any  # of IPython; what only some readers need is imported where it is used
COURSE = HERE / ("notebooks" if CHECKOUT else "gpnns")  # where profiles and schematics are
DATA = (HERE if CHECKOUT else COURSE) / "data"


# --- where are we ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Where a notebook runs and where its files go; made by `setup`."""

    profile: str
    seed: int
    platform: str
    device: torch.device
    folder: Path
    started: float


def setup(profile: str = "mini", seed: int = 0) -> Run:
    """Choose device and folder (runs/<profile>/), fix the seeds, set the figure style, print one card."""
    import matplotlib

    matplotlib.rcParams.update(STYLE)
    np.random.seed(seed)
    torch.manual_seed(seed)
    hosted = {"Colab": "google.colab" in sys.modules, "Kaggle": "KAGGLE_KERNEL_RUN_TYPE" in os.environ}
    where = next((name for name, there in hosted.items() if there), "local")
    run = Run(profile, seed, where, best_device(), work_folder() / "runs" / profile, time.time())
    run.folder.mkdir(parents=True, exist_ok=True)
    computes = f"{run.device}, {best_precision(run.device) or torch.float32} | {os.cpu_count()} cores"
    print(f"gpnns | profile {profile} | seed {seed} | {where}")
    print(f"python {platform.python_version()} | torch {torch.__version__} | {computes}")
    switch = {"Kaggle": "Settings > Accelerator > GPU T4 x2", "Colab": "Runtime > Change runtime type > T4 GPU"}
    if where in switch and not torch.cuda.is_available():
        print(f"no GPU is switched on; for real encoders it saves hours: {switch[where]}")
    return run


def work_folder() -> Path:
    """Where runs/ and .cache/ are made: the course's folder, or the current one when gpnns is an installed package."""
    return HERE if CHECKOUT else Path.cwd()


def cache_folder() -> Path:
    """Where drawn images and embeddings are kept; the environment variable GPNNS_CACHE moves it."""
    return Path(os.environ.get("GPNNS_CACHE") or work_folder() / ".cache").expanduser()


# --- images ----------------------------------------------------------------------------------------------------------


def load_images(source: str | Path, split: str = "test") -> ImageSet:
    """Load "mini" (the drawn world), a data set by name, a folder, a table of images, or webdataset tars.

    An ImageSet (gpnns/images/image_set.py) holds images and what is known of them: labels, groups, captions, names of classes.
    Names and their splits: data/README.md. What is nowhere yet is downloaded, where its authors allow that. A name may
    bring a split of its own, "coco:validation", and several, "sop + cub", become one set.
    Folder: `label/file`, `group/label/file`, or just files (no labels). Equal labels in two groups are one class. A
    subfolder named like `split` (also `val`, `valid`) is used where subfolders are splits, and `captions.json` maps
    labels, or names of files, to lists of captions. Table (.csv, .tsv, .parquet): columns `path` and, if known, `label`,
    `group`, `caption` (several: separated by `|`, or one line each), `split`; paths are relative to the table. Tars: one
    .tar, or a folder of them. Images of folders, tables and tars are sorted by path, those of data sets as their lists
    are, so that rows do not depend on the file system.

    Prints one line that says what was taken as what; files that cannot be read are named in `left_out`.
    Raises FileNotFoundError for what is nowhere, ValueError for what cannot be understood.
    """
    from gpnns.images import datasets

    return datasets.load_images(source, split)


# --- encoders --------------------------------------------------------------------------------------------------------


def load_encoder(spec: str, device: torch.device | str | None = None) -> Encoder:
    """Load an encoder by name: towers and their preprocessing, which turn images, and perhaps texts, into vectors of
    `dim` numbers (gpnns/encoders/encoder.py; build one yourself for any other model).

    "mini" (the small CLIP of this course), "random" (the same before training), "pixels" (no model: 16 x 16 colors),
    "efficientnet_lite0" (trained on ImageNet, its weights come with the packages, so it needs no download; a width in pixels
    may follow, for small pictures: "efficientnet_lite0:64"),
    "open_clip:ARCHITECTURE/TAG" (the tag "random" for untrained weights), "timm:NAME", "gpnns:ViT-B@file.pth" (the GP-NNS release format).
    `@file` behind a name takes the weights from a file: "mini@tuned.safetensors", "open_clip:ViT-B-16/openai@epoch_3.pt"
    (the tag then says what the file was tuned from, which decides preprocessing and activation); "mini@arcmargin",
    "mini@2sft" and "mini@mcip_realigned" are those that come with the course.

    Raises ValueError for an unknown name or a file that does not fit, FileNotFoundError, OSError without a network.
    """
    from gpnns.encoders import loading

    return loading.load(str(spec), torch.device(device) if device else best_device())


# --- embeddings ------------------------------------------------------------------------------------------------------

SAVE_EVERY = 1024  # embeddings that a killed run can lose


def embed_images(
    encoder: Encoder, images: ImageSet, batch_size: int = 64, cache: bool = True
) -> tuple[Array, ImageSet]:
    """Embed a set of images: (embeddings float32 (n, d) with unit rows, the images that they belong to, row by row).

    The images are `images`, which is not changed, without files that cannot be read and images whose vector is zero or not
    finite (as `pixels` has none for a blank page); these are listed in `left_out` and named in a warning.

    Files are decoded in worker processes. Embeddings are kept in the cache folder one by one, under a key made of the encoder
    (weights, layers, preprocessing), the precision and the image's content: one new photo among 3,000 computes one, a part
    of what was embedded none, and a killed run goes on where it stopped. Batches are padded to one size, so its result has
    the same bits where a row's bits do not depend on its place in a batch, and is the same to 1e-6 on processors where they
    do. cache=False leaves the disk alone, for models that change with every step.

    Raises ValueError when no image is left, or when the encoder makes such a vector of a test picture too.
    """
    if not isinstance(images, ImageSet):
        raise ValueError(f"images must be an ImageSet, not {type(images)}: load_images(folder) makes one")
    if len(images) == 0:
        raise ValueError(f"{images.name}: there are no images to embed")

    def compute(batches: list[list[int]]):
        read, size = decoding.DecodedImages(images, encoder.preprocess), batch_size * (len(batches) > 1)
        workers = decoding.count_decoders(images, sum(map(len, batches)))
        for count, readable, pixels in decoding.read_in_workers(read, batches, workers, decoding.stack_readable):
            features = np.full((count, encoder.dim), np.nan, dtype=np.float32)  # NaN marks an unreadable image
            if readable:
                pixels = torch.from_numpy(pixels).to(encoder.device)
                features[readable] = run_tower(encoder, encoder.image_tower, pixels, size)
            if np.isinf(features).any():
                probe = encoder.features(encoder.image_tower, encoder.probe()[None])
                unit_rows(probe, f"the features of {encoder.name}")  # is it the encoder?
            yield features

    keys = images.digests(Progress(len(images), f"reading {images.name}").update) if cache else range(len(images))
    label = f"embedding {images.name} with {encoder.name}"
    embeddings = embed_missing(encoder, keys, batch_size, compute, label, "images", cache)
    blank = f"get a vector from {encoder.name} that is zero or not finite, as blank pages may,"
    unreadable, unfit = np.isnan(embeddings[:, 0]), ~np.isfinite(embeddings[:, 0])
    if unfit.any():
        images = images.leave_out({"cannot be read": unreadable, blank: unfit & ~unreadable})
    return embeddings[~unfit], images


def embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int = 128, cache: bool = True) -> Array:
    """Embed texts into the encoder's joint space: float32 (n, d), unit rows; cached like images.

    Raises ValueError for an encoder without a text tower.
    """
    if not encoder.has_text:
        raise ValueError(f"{encoder.name} encodes images only; for text, choose mini or an open_clip: encoder")
    texts = check_texts(texts)

    def compute(batches: list[list[int]]):
        for rows in batches:
            batch, size = [texts[row] for row in rows], batch_size * (len(batches) > 1)
            features = run_tower(encoder, encoder.text_tower, batch, size)
            for row in np.flatnonzero(np.isinf(features[:, 0]))[:1]:
                raise ValueError(f"{encoder.name} gives a vector that is zero or not finite for {batch[row]!r}")
            yield features

    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts] if cache else range(len(texts))
    return embed_missing(encoder, keys, batch_size, compute, f"embedding texts with {encoder.name}", "texts", cache)


def run_tower(encoder: Encoder, tower: Callable, batch: Any, size: int = 0) -> Array:
    """One batch, a tensor or a list of texts, through a tower in the precision the device gains from: float32 unit rows,
    infinite where there is none. A batch shorter than `size` is filled up with its last item, and the result cut again."""
    count, precision = len(batch), best_precision(encoder.device)
    if count < size:
        rest = [batch[-1:]] * (size - count)
        batch = torch.cat([batch, *rest]) if isinstance(batch, torch.Tensor) else sum(rest, batch)
    with torch.inference_mode(), torch.autocast(encoder.device.type, precision, enabled=precision is not None):
        features = tower(batch).float().cpu().numpy()
    if features.shape != (len(batch), encoder.dim):
        raise ValueError(
            f"{encoder.name} makes {features.shape} of {len(batch)} inputs, not ({len(batch)}, {encoder.dim})"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        squares = vecdot(features[:count], features[:count])
    fit, units = np.isfinite(squares) & (squares > 0), np.full((count, encoder.dim), np.inf, dtype=np.float32)
    if fit.any():
        units[fit] = unit_rows(features[:count][fit])
    return units


def embed_missing(
    encoder: Encoder, keys: Sequence, batch_size: int, compute: Callable, label: str, unit: str, cache: bool
) -> Array:
    """The embeddings of all keys: those that the cache holds, and the others, which `compute` yields batch by batch of their
    rows. What is NaN or infinite is not kept."""
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"a batch holds 1 image or more, not {batch_size!r}")
    known, path, fresh, missing = {}, Path(), {}, {}
    if cache:
        precision = str(best_precision(encoder.device) or torch.float32).removeprefix("torch.")
        path = cache_folder() / "embeddings" / f"{encoder.fingerprint(unit)}-{precision}-{unit}.sqlite"
        known = embedding_cache.read_embeddings(path, keys, encoder.dim)
    for row, key in enumerate(keys):
        if key not in known:
            missing.setdefault(key, row)  # of equal images the first is computed
    rows, progress = list(missing.values()), Progress(len(keys), label, unit)
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    done = len(keys) - len(rows)
    for features, batch in zip(compute(batches) if batches else (), batches, strict=True):
        known |= zip((keys[row] for row in batch), features, strict=True)
        fresh |= {keys[row]: vector for row, vector in zip(batch, features, strict=True) if np.isfinite(vector[0])}
        done += len(batch)
        if cache and fresh and (len(fresh) >= SAVE_EVERY or done == len(keys)):
            embedding_cache.write_embeddings(path, fresh.items())
            fresh = {}
        progress.update(done)
    return np.stack([known[key] for key in keys])


# --- neighbours ------------------------------------------------------------------------------------------------------

BLOCK, TILE = 4096, 65_536  # gallery rows whose bias, and whose scores, are computed at a time
METRICS = {"cosine": 0, "inner": 0, "l2": 1, "hamming": None}  # and the numbers that faiss has for them


def search(
    queries: Array,
    gallery: Array,
    k: int = 10,
    metric: str = "cosine",
    own: Array | None = None,
    index: Index | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """The k nearest gallery rows of each query: (scores, rows), both (n, k), nearest first. Exact unless `index` is given.

    metric: "cosine" (a similarity: larger is nearer), "inner" (the product of the vectors as they are), "l2" (Euclidean
    distance) or "hamming" (differing bits between the signs of the vectors, as in the GP-NNS notebook). own: (n,) the
    gallery row that is the query itself, which is left out of its results by identity; -1 for none. index: an
    approximate index made by `build_index`; where it finds fewer than k, the remaining rows are -1. bias: (gallery,)
    is subtracted from the scores, see `hub_bias`; an index must hold it already, see `with_bias`.

    The gallery may be of any size and number type, on disk too: it is read in tiles. Rows of equal score come in their
    order (not from an index, nor for hamming), but which of several that tie for place k are found is not settled.
    Raises ValueError for what cannot be searched.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose cosine, inner, l2 or hamming")
    if np.ndim(queries) == 2 and len(queries) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    check_vectors(gallery, "the gallery", metric, rows=slice(0, 0))  # its shape: rows are checked as they are read
    queries = check_vectors(queries, "queries", metric, np.shape(gallery)[1])
    k = check_k(k, len(gallery) - (own is not None), "gallery images")
    if bias is not None and (index is not None or metric not in ("cosine", "inner")):
        index_of = "build the index from with_bias(gallery, bias) and ask it with_bias(queries), metric='inner'"
        raise ValueError(f"a bias belongs to exact search with the metrics cosine and inner; else {index_of}")
    if own is not None:
        own = np.asarray(own)
        if own.shape != (len(queries),) or own.dtype.kind not in "iu" or own.min() < -1 or own.max() >= len(gallery):
            raise ValueError(
                f"own needs one row of the gallery, or -1, for each of {len(queries)} queries, not {own!r}"
            )
    reach = k + (own is not None)
    if index is None:
        scores, rows = search_exactly(queries, gallery, reach, metric, bias, "the gallery")
    else:
        n, d = np.shape(gallery)
        d = 8 * ((d + 7) // 8) if metric == "hamming" else d
        if (index.ntotal, index.d) != (n, d):  # faiss itself would answer wrongly or abort
            found = f"{index.ntotal} rows of {index.d} dimensions"
            raise ValueError(f"the index holds {found}, the gallery {n} of {d}; build it from this gallery")
        if metric != "hamming" and index.metric_type != METRICS[metric]:
            raise ValueError(f"the index was not built for the metric {metric}; build_index(gallery, kind, {metric!r})")
        scores, rows = index.search(binary_codes(queries) if metric == "hamming" else queries, reach)
        scores = np.sqrt(np.maximum(scores, 0)) if metric == "l2" else scores
    if own is None:
        return scores, rows
    # The query's own row goes where it is found; where something else pushed it out, the last neighbour goes.
    is_own = (rows == own[:, None]) & (rows >= 0)
    is_own[~is_own.any(axis=1), -1] = True
    return scores[~is_own].reshape(len(rows), k), rows[~is_own].reshape(len(rows), k)


def get_faiss() -> Any:
    """faiss, which on macOS meets torch's own copy of OpenMP in the process; they get along with one thread."""
    import faiss

    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss


def search_exactly(
    queries: Array, gallery: Array, k: int, metric: str, bias: Array | None, what: str
) -> tuple[Array, Array]:
    """The k nearest of all rows, for queries that are checked already; faiss computes, one tile of the gallery at a time."""
    faiss = get_faiss()
    if metric == "hamming":
        tiles = [slice(first, first + TILE) for first in range(0, len(gallery), TILE)]
        codes = [binary_codes(check_vectors(gallery, what, metric, rows=rows)) for rows in tiles]
        return faiss.knn_hamming(binary_codes(queries), np.concatenate(codes), k)
    if bias is not None:  # as one more dimension, see `with_bias`
        bias, minus = check_bias(bias, len(gallery)), np.full((len(queries), 1), -1, np.float32)
        queries = np.hstack([queries, minus])
    size = TILE if bias is None else TILE // 8  # a bias makes a copy of each tile: one that stays in the cache
    best = faiss.ResultHeap(len(queries), k, keep_max=metric != "l2")
    for first in range(0, len(gallery), size):
        tile = check_vectors(gallery, what, metric, rows=slice(first, first + size))
        if bias is not None:
            tile = np.hstack([tile, bias[first : first + size, None]])
        scores, rows = faiss.knn(queries, tile, min(k, len(tile)), metric=METRICS[metric])
        best.add_result(scores, rows + first)
    best.finalize()
    scores, rows = best.D, best.I
    tied = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))  # of equal scores the first row comes first
    order = np.lexsort((rows[tied], scores[tied] if metric == "l2" else -scores[tied]))
    rows[tied] = np.take_along_axis(rows[tied], order, axis=1)
    return (np.sqrt(np.maximum(scores, 0)) if metric == "l2" else scores), rows


def hub_bias(gallery: Array, references: Array, k: int = 128, alpha: float = 0.75, metric: str = "cosine") -> Array:
    """Nearest Neighbor Normalization: how much too near each gallery row is to queries in general, float32 (n,).

    The bias is alpha times the mean of the k largest scores of a gallery row with reference queries; subtracted from
    its scores (`search(..., bias=bias)`) it takes hubs back. Source: NNN (2410.24114), equation 1; there alpha is 0.75
    and k 128 for CLIP.

    references: queries that stand for those to come, such as training captions; never the queries one measures on.
    metric: cosine or inner. Raises ValueError for what cannot be used.
    """
    if not isinstance(alpha, (int, float, np.number)) or not np.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha={alpha} is not a share of the mean score; choose a number from 0 to about 1.5")
    return np.float32(alpha) * reference_means(gallery, references, [k], metric)[0]


def reference_means(gallery: Array, references: Array, ks: Sequence[int], metric: str = "cosine") -> Array:
    """The mean of each gallery row's k largest scores with the references, for several k in one pass: (len(ks), n).

    Exact; both sides are read in tiles, so that memory grows with neither. `alpha * reference_means(..., [k])[0]` is
    `hub_bias`, so a sweep over k and alpha costs one pass.
    """
    if metric not in ("cosine", "inner"):
        raise ValueError(f"a bias and its references need the metric cosine or inner, not {metric!r}")
    check_vectors(gallery, "the gallery", metric, rows=slice(0, 0))
    check_vectors(references, "references", metric, np.shape(gallery)[1], slice(0, 0))
    ks = [check_k(k, len(references), "references") for k in ks]
    means = np.empty((len(ks), len(gallery)), np.float32)
    size = max(1, min(BLOCK, 2**22 // max(ks)))  # all scores of a block are held
    for first in range(0, len(gallery), size):
        rows = slice(first, first + size)
        block = check_vectors(gallery, "the gallery", metric, rows=rows)
        scores, _ = search_exactly(block, references, max(ks), metric, None, "references")
        means[:, rows] = np.cumsum(scores, axis=1).T[np.array(ks) - 1] / np.float32(ks)[:, None]
    return means


def with_bias(vectors: Array, bias: Array | None = None, metric: str = "cosine") -> Array:
    """Vectors with one more dimension, in which an inner product subtracts the bias: float32 (n, d + 1).

    with_bias(gallery, bias) goes into the index, with_bias(queries) asks it: the extra number of a query is -1. Any
    index for inner products then ranks by the corrected score; one for cosine does not, for it undoes the bias.
    """
    vectors = check_vectors(vectors, metric=metric)
    extra = np.full(len(vectors), -1, np.float32) if bias is None else check_bias(bias, len(vectors))
    return np.concatenate([vectors, extra[:, None]], axis=1)


def build_index(gallery: Array, kind: str = "hnsw", metric: str = "cosine") -> Index:
    """A faiss index: "flat" (exact), or approximate: "hnsw" (a graph), "ivf" (cells, a tenth of which are visited).

    Binary codes are so cheap to compare that with the metric "hamming" every kind is exact.
    """
    faiss = get_faiss()
    if kind not in ("flat", "hnsw", "ivf") or metric not in METRICS:
        raise ValueError(f"no index {kind!r} for {metric!r}; choose flat, hnsw or ivf, and {', '.join(METRICS)}")
    gallery = check_vectors(gallery, "the gallery", metric)
    n, d = gallery.shape
    if metric == "hamming":
        index, gallery = faiss.IndexBinaryFlat(8 * ((d + 7) // 8)), binary_codes(gallery)
    else:
        cells = max(1, int(np.sqrt(n)))
        recipes = {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{cells},Flat"}
        index = faiss.index_factory(d, recipes[kind], METRICS[metric])
        if kind == "ivf":
            index.cp.min_points_per_centroid = 1  # small galleries are fine here, no need for faiss to warn
            index.nprobe = max(1, cells // 10)
        index.train(gallery)
    index.add(gallery)
    return index


def binary_codes(vectors: Array) -> Array:
    """One bit per dimension, its sign: uint8 (n, ceil(d / 8))."""
    return np.packbits(vectors > 0, axis=1)


def neighbour_recall(found: Array, exact: Array) -> float:
    """The share of the exact neighbours (n, k) that another search found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One value from 0 to 1 per query; the score is their mean. NaN: the query had nothing to find and does not count."""

    per_query: Array

    def __post_init__(self):
        self.per_query = np.asarray(self.per_query, dtype=float)

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.per_query)) if np.isfinite(self.per_query).any() else float("nan")

    def interval(self, clusters: Array | None = None, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """A bootstrap 95 % interval of the mean, resampling queries, or whole clusters of them: the images of a class
        succeed and fail together, so pass their labels as `clusters`, or the interval is too narrow."""
        from scipy.stats import bootstrap

        if clusters is not None:
            clusters = check_labels(clusters, len(self.per_query), "queries")
        there = np.isfinite(self.per_query)
        members = np.arange(len(there)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        totals, counts = np.bincount(members[there], self.per_query[there]), np.bincount(members[there])
        totals, counts = totals[counts > 0], counts[counts > 0]
        if len(counts) < 2:
            return self.mean, self.mean
        found = bootstrap(
            (totals, counts), lambda t, c, axis: t.sum(axis) / c.sum(axis), paired=True, method="percentile",
            n_resamples=resamples, batch=100, random_state=np.random.default_rng(seed),
        )  # fmt: skip
        return tuple(map(float, found.confidence_interval))

    def where(self, mask: Array) -> Score:
        """The same score over a part of the queries."""
        return Score(self.per_query[check_rows(mask, len(self.per_query), "the queries of a part")])


def is_right(images: ImageSet, rows: Array, queries: Array, gallery: ImageSet | None = None) -> Array:
    """Whether neighbours show the same thing as their queries: 1 or 0, NaN where no labels tell. rows: (n, k) of `gallery`, or
    without one of `images`; queries: (n,) rows of `images`."""
    gallery = images if gallery is None else gallery
    if images.labels is None or gallery.labels is None:
        return np.full(np.shape(rows), np.nan)
    return (gallery.labels[rows] == images.labels[queries][:, None]).astype(float)


def same_label(query_labels: Array, gallery_labels: Array) -> list[Array]:
    """For each query, the gallery rows that carry its label. Raises ValueError where there are no labels."""
    if query_labels is None or gallery_labels is None:
        raise ValueError(f"one of the two sets {NO_LABELS}")
    query_labels = check_labels(query_labels, len(query_labels), "queries")
    gallery_labels = check_labels(gallery_labels, len(gallery_labels), "gallery rows")
    check_same_kind(query_labels, gallery_labels)
    order = np.argsort(gallery_labels, kind="stable")
    ordered = gallery_labels[order]
    starts, ends = np.searchsorted(ordered, query_labels, "left"), np.searchsorted(ordered, query_labels, "right")
    return [order[a:b] for a, b in zip(starts, ends, strict=True)]


def rank_relevant(
    queries: Array, gallery: Array, relevant: Sequence, leave_out: Sequence | None = None,
    ties: str = "group", bias: Array | None = None,
) -> Array:  # fmt: skip
    """The rank of every relevant gallery row in each query's full ranking: float64 (n, r), ascending, padded with inf.

    Every score below is a function of these ranks. No list is ever sorted: the rank of a row is the number of rows
    that score at least as high, counted while the matrix product of unit rows passes by in small blocks.

    relevant: for each query, the gallery rows to find, as numbers or as a mask over the gallery. leave_out: for each
    query, rows that do not take part: the query itself, junk (-1 for none); they are taken out of `relevant` too. ties: "group" ranks rows of equal score at the end of
    their group, as scikit-learn does; "optimistic" and "pessimistic" put the relevant ones first or last, which
    bounds what any order of ties can give. bias: (gallery,) is subtracted from the scores, see `hub_bias`.
    """
    gallery = unit_rows(gallery, "the gallery")
    queries = check_vectors(queries, "queries", dim=gallery.shape[1])
    if ties not in ("group", "optimistic", "pessimistic"):
        raise ValueError(f"unknown rule for ties {ties!r}; choose group, optimistic or pessimistic")
    relevant = relevant if isinstance(relevant, np.ndarray) else list(relevant)
    if len(relevant) != len(queries) or (leave_out is not None and len(leave_out) != len(queries)):
        raise ValueError(f"{len(queries)} queries need as many lists of relevant rows, and of rows to leave out")
    bias = 0 if bias is None else check_bias(bias, len(gallery))
    count, workers = len(gallery), os.cpu_count() or 1
    block = max(1, min(256, 2**23 // (workers * count)))  # at most 32 MB of scores at a time
    # Whole blocks of columns: some processors sum the last few of a product otherwise, and equal rows would not tie.
    gallery = np.pad(gallery, ((0, -count % 64), (0, 0)))

    def rank_block(start: int) -> list[Array]:
        scores = (queries[start : start + block] @ gallery.T)[:, :count]
        scores -= bias
        found = []
        for query, row in enumerate(scores, start):
            if leave_out is not None:
                without = check_rows(leave_out[query], len(row), f"the rows that query {query} leaves out", none=True)
                row[without] = -np.inf
            rows = check_rows(relevant[query], len(row), f"the relevant rows of query {query}")
            wanted = row[np.unique(rows)]  # one that is listed twice counts once
            found.append(count_ranks(row, wanted if leave_out is None else wanted[wanted > -np.inf], ties))
        return found

    # One product per core, rather than all cores on each product: then they also share the counting.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        found = [ranks for part in pool.map(rank_block, range(0, len(queries), block)) for ranks in part]
    if not any(map(len, found)):
        raise ValueError(
            "no query has anything to find: a class needs two images or more, a text an image that it describes"
        )
    ranks = np.full((len(found), max(map(len, found))), np.inf)
    for query, values in enumerate(found):
        ranks[query, : len(values)] = values
    return ranks


def count_ranks(row: Array, wanted: Array, ties: str) -> Array:
    """Ranks of the scores `wanted` among all scores of `row`, ascending; both come from one matrix product."""
    if len(wanted) == 0:
        return wanted
    wanted = np.sort(wanted)[::-1]
    counts = count_above(row, wanted, strict=ties == "optimistic")
    if ties == "group":
        return counts
    return counts - count_above(wanted, wanted, strict=ties == "optimistic") + np.arange(1, len(wanted) + 1)


def count_above(row: Array, wanted: Array, strict: bool) -> Array:
    """How many scores of `row` are at least (strict: above) each of `wanted`, which descends."""
    rivals = row.compress(row >= wanted[-1])  # only scores from the lowest wanted one up matter, mostly they are few
    if len(rivals) * 12 < len(row) or len(wanted) > 16:
        rivals.sort()
        return len(rivals) - rivals.searchsorted(wanted, "right" if strict else "left")
    above = np.greater if strict else np.greater_equal
    return np.array([np.count_nonzero(above(rivals, score)) for score in wanted])


def mean_average_precision(ranks: Array, k: int | None = None, denominator: str = "relevant") -> Score:
    """Average precision per query from the ranks of `rank_relevant`: non-interpolated, as in GPR1200 and scikit-learn.

    With k, only ranks up to k count, and tools divide by different things: "relevant" (r, pytorch-metric-learning and
    trec_eval), "min" (min(r, k), GLDv2 and UnED) or "hits" (those found, torchmetrics), which rewards finding less.
    """
    if k is not None:
        check_cut(k)
    number = np.isfinite(ranks).sum(axis=1)
    hits = np.tile(np.arange(1.0, ranks.shape[1] + 1), (len(ranks), 1))
    for j in range(ranks.shape[1] - 2, -1, -1):  # equal ranks count as found together
        hits[:, j] = np.where(ranks[:, j] == ranks[:, j + 1], hits[:, j + 1], hits[:, j])
    counted = np.isfinite(ranks) if k is None else ranks <= k
    total = np.where(counted, hits / ranks, 0).sum(axis=1)
    choices = {"relevant": number, "min": np.minimum(number, k or np.inf), "hits": np.maximum(counted.sum(axis=1), 1)}
    if denominator not in choices:
        raise ValueError(f"unknown denominator {denominator!r}; choose relevant, min or hits")
    return Score(np.where(number, total / np.maximum(choices[denominator], 1), np.nan))


def recall_at_k(ranks: Array, k: int = 1) -> Score:
    """1 for a query with a relevant row among the first k, else 0 (R@k of the retrieval papers: "hit at k")."""
    check_cut(k)
    return Score(np.where(np.isfinite(ranks[:, 0]), ranks[:, 0] <= k, np.nan))


def mean_precision_at_5(ranks: Array) -> Score:
    """Relevant rows among the first m, divided by m, where m = min(r, 5): the measure of the GUIE challenge (2210.11141,
    section 1) and of UnED. With two rows to find, one at rank 4 counts for nothing."""
    most = np.minimum(np.isfinite(ranks).sum(axis=1), 5)
    return Score(np.where(most, (ranks <= most[:, None]).sum(axis=1) / np.maximum(most, 1), np.nan))


def knn_accuracy(
    queries: Array, query_labels: Array, gallery: Array, gallery_labels: Array, k: int = 21, temperature: float = 0.1
) -> Score:
    """Accuracy of a vote among the k nearest, each weighted by exp(cosine / temperature).

    k=21 and 0.1 as in MCIP (2409.01936); DINO uses 0.07. k is cut to the size of the gallery.
    """
    query_labels = check_labels(query_labels, len(queries), "queries")
    gallery_labels = check_labels(gallery_labels, len(gallery), "gallery rows")
    check_same_kind(query_labels, gallery_labels)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} weights no votes; choose a number above 0")
    scores, rows = search(queries, gallery, min(k, len(gallery)))
    classes, votes_for = np.unique(gallery_labels, return_inverse=True)
    weights = np.exp((scores - 1) / temperature)  # minus 1 changes no vote and keeps exp small
    votes = np.zeros((len(queries), len(classes)))
    np.add.at(votes, (np.arange(len(queries))[:, None], votes_for[rows]), weights)
    return Score((classes[votes.argmax(axis=1)] == query_labels).astype(float))


def text_to_image_recall(texts: Array, images: Array, relevant: Sequence, k: int = 1) -> Score:
    """R@k of text queries: 1 where any of a text's relevant images is among the k nearest."""
    return recall_at_k(rank_relevant(texts, images, relevant), k)


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str] = ("a photo of {}",)) -> Array:
    """One text embedding per class: the mean over prompt templates of unit embeddings, made unit again (CLIP, section 3.1)."""
    names, templates = check_texts(names, "names"), check_texts(templates, "templates")
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"a template holds {{}} where the name goes, and {wrong[0]!r} does not")
    texts = [template.replace("{}", name) for name in names for template in templates]
    means = embed_texts(encoder, texts).reshape(len(names), len(templates), -1).mean(axis=1)
    return unit_rows(means, "class embeddings")


def zero_shot_accuracy(images: Array, labels: Array, classes: Array) -> Score:
    """Accuracy of giving each image the class whose text embedding is nearest. labels: rows of `classes`."""
    labels = check_labels(labels, len(images), "images")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"labels are rows of the {len(classes)} classes, whole numbers from 0, not {labels.min()!r} to {labels.max()!r}"
        )
    _, nearest = search(images, classes, k=1)
    return Score((nearest[:, 0] == labels).astype(float))


def hubness(
    queries: Array, gallery: Array, k: int = 10, own: Array | None = None, bias: Array | None = None
) -> tuple[float, Array]:
    """How unevenly images are found: (skewness, counts), counts[i] = in how many queries' first k row i appears.

    Near 0, all rows are found about equally often; hubs make it large (Radovanovic et al., JMLR 2010).
    """
    from scipy.stats import skew

    _, rows = search(queries, gallery, k, own=own, bias=bias)
    counts = np.bincount(rows.ravel(), minlength=len(gallery))
    return float(skew(counts)) if counts.std() else 0.0, counts


# --- results ---------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "open_clip", "timm", "faiss", "numpy")  # whose versions are noted beside results


def result_row(
    model: str, task: str, metric: str, score: Score, clusters: Array | None = None,
    group: str = "all", split: str = "test",
) -> dict:  # fmt: skip
    """One line of a results file: a score from 0 to 100 with its interval."""
    low, high = score.interval(clusters)
    row = {"model": model, "task": task, "split": split, "group": group, "metric": metric}
    numbers = {"value": score.mean, "low": low, "high": high}
    return row | {key: round(100 * n, 3) if n == n else None for key, n in numbers.items()} | {"seeds": 1}


def save_results(run: Run, notebook: str, rows: list[dict], headline: str) -> Path:
    """Write runs/<profile>/<notebook>.json: what ran, where, how long, one line to remember, one tidy row per number."""
    environment = {"python": platform.python_version(), "device": str(run.device), "platform": run.platform}
    environment |= {"seed": run.seed} | {
        name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules
    }
    result = {"notebook": notebook, "profile": run.profile, "seconds": round(time.time() - run.started, 1)}
    result |= {"headline": headline, "environment": environment, "rows": rows}
    path = run.folder / f"{notebook}.json"
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=1, default=to_json) + "\n").encode()))
    return path


def to_json(value: Any) -> float | str:
    """What JSON does not know: a number of numpy as Python's, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


# --- pictures --------------------------------------------------------------------------------------------------------

RIGHT, WRONG = "#009E73", "#D55E00"  # green and red that color-blind readers tell apart (Okabe and Ito)
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
STYLE = {
    "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
    "axes.prop_cycle": f"cycler('color', {PALETTE})", "image.interpolation": "antialiased",
    "text.parse_math": False,  # "$5 more than $4" in a caption is no formula
}  # fmt: skip


def show_images(
    rows: Sequence[Sequence], titles: Sequence[Sequence[str]] | None = None, frames: Sequence[Sequence] | None = None,
    labels: Sequence[str] = (), size: float = 0.8,
) -> Picture:  # fmt: skip
    """A grid of images, titles and frame colors for each, a label per row: a JPEG, which keeps a notebook small."""
    import matplotlib.pyplot as plt

    if not any(map(len, rows)):
        raise ValueError("there are no images to show")
    columns = max(map(len, rows))
    margin = 0.1 * max([len(line) for label in labels for line in label.split("\n")], default=0)
    tall = size * (1.28 if titles else 1.05)
    width, height = columns * size + margin, len(rows) * tall
    figure = plt.figure(figsize=(width, height), layout="none")
    for i, row in enumerate(rows):
        bottom = (len(rows) - 1 - i) * tall
        for j, image in enumerate(row):
            left = margin + j * size
            box = np.array([left + 0.05 * size, bottom + 0.04 * size, 0.9 * size, 0.9 * size])
            axis = figure.add_axes(box / [width, height, width, height])
            axis.imshow(np.asarray(image))
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            color = frames[i][j] if frames else None
            for spine in axis.spines.values():
                spine.set(visible=color is not None, color=color or "white", linewidth=3.5)
            if titles and titles[i][j]:
                axis.set_title(titles[i][j], fontsize=9.5, pad=3, parse_math=False)
        if i < len(labels):
            height_of_row = (bottom + 0.5 * size) / height
            figure.text(0.05 / width, height_of_row, labels[i], fontsize=11, va="center", parse_math=False)
    return as_jpeg(figure)


def as_jpeg(figure: Any) -> Picture:
    """A finished figure as a JPEG picture for the end of a cell; the figure itself is closed."""
    import matplotlib.pyplot as plt
    from IPython.display import Image as Picture

    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=78, pil_kwargs={"quality": 60, "optimize": True})
    plt.close(figure)
    return Picture(buffer.getvalue(), format="jpeg")


def show_schematic(notebook: str) -> Picture:
    """The drawing of what a notebook does, by the notebook's name; gpnns/tools/draw_schematics.py makes it."""
    from IPython.display import Image as Picture

    return Picture(str(COURSE / "schematics" / f"{notebook}.png"))


def show_neighbors(
    queries: Sequence, gallery: ImageSet, rows: Array, scores: Array | None = None, right: Array | None = None
) -> Picture:
    """Queries and their neighbours, one line each. queries: PIL images or strings. rows, scores, right: (n, k).

    Right neighbours have a green frame and a check mark, wrong ones a red frame and a cross, unknown ones (NaN) none.
    """
    texts = [textwrap.fill(query, max(24, len(query) // 4 + 8)) if isinstance(query, str) else "" for query in queries]
    form = "{} bits" if scores is not None and np.asarray(scores).dtype.kind != "f" else "{:.2f}"
    lines, titles, frames = [], [], []
    for i, query in enumerate(queries):
        judged = [None] * len(rows[i]) if right is None else [None if np.isnan(r) else r for r in right[i]]
        first = [] if isinstance(query, str) else [query]
        found = [j for j, row in enumerate(rows[i]) if row >= 0]  # an index may find fewer, and says -1
        judged = [judged[j] for j in found]
        lines.append(first + [gallery[rows[i][j]] for j in found])
        frames.append([None] * len(first) + [None if good is None else RIGHT if good else WRONG for good in judged])
        marks = ["" if good is None else "✓ " if good else "✗ " for good in judged]
        numbers = [""] * len(marks) if scores is None else [form.format(scores[i][j]) for j in found]
        titles.append(["query"] * len(first) + [mark + number for mark, number in zip(marks, numbers, strict=True)])
    return show_images(lines, titles, frames, texts if any(texts) else ())


def live_picture(draw: Callable[..., Picture], controls: dict[str, Any]) -> Any:
    """Controls, and below them the picture that `draw(**values)` makes, anew on every move.

    The picture is a widget itself: `interact`'s Output widget hides exceptions, and may block in batch (nbclient 312).
    """
    import ipywidgets as widgets

    picture = widgets.Image(format="jpeg", layout={"align_self": "flex-start", "max_width": "100%"})  # never enlarged

    def refresh(_=None) -> None:
        picture.value = draw(**{name: control.value for name, control in controls.items()}).data

    for control in controls.values():
        control.observe(refresh, "value")
    refresh()
    return widgets.VBox([*controls.values(), picture])


def show_table(rows: Sequence[dict], caption: str = "", best: Sequence[str] = ()) -> HTML:
    """Dicts as a table: numbers with one decimal, None as an empty cell, the largest of each column in `best` in bold."""
    from IPython.display import HTML

    columns = list(dict.fromkeys(key for row in rows for key in row))
    best = [best] if isinstance(best, str) else best
    numbers = {
        key: [row[key] for row in rows if isinstance(row.get(key), (int, float, np.number)) and row[key] == row[key]]
        for key in best
    }
    top = {key: max(values) for key, values in numbers.items() if values}

    def cell(row: dict, column: str) -> str:
        value = row.get(column)
        text = "" if value is None or value != value else html.escape(str(value))
        text = f"{value:.1f}" if isinstance(value, (float, np.floating)) and value == value else text
        text = f"<b>{text}</b>" if column in top and value == top[column] else text
        return f"<td style='text-align:{'left' if isinstance(value, str) else 'right'}'>{text}</td>"

    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
    body = "".join("<tr>" + "".join(cell(row, column) for column in columns) + "</tr>" for row in rows)
    return HTML(f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>")


def show_findings(sentences: Sequence[str]) -> HTML:
    """Sentences as a list. Names of models, groups and files in them are shown as they are, never taken as markup."""
    from IPython.display import HTML

    return HTML("<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>")


# --- what comes in -----------------------------------------------------------------------------------------------------

HALF = re.compile("[\ud800-\udfff]")
# numpy before 2, which Kaggle has installed, lacks it.
vecdot = getattr(np, "vecdot", None) or (lambda a, b: np.einsum("nd,nd->n", a, b))


def unit_rows(vectors: Array, what: str = "the vectors") -> Array:
    """Rows divided by their length, float32. Raises ValueError for NaN, infinite or zero rows and names the first."""
    return check_vectors(vectors, what)


def check_vectors(
    vectors: Array, what: str = "the vectors", metric: str = "cosine", dim: int = 0, rows: slice = slice(None)
) -> Array:
    """`rows` of some vectors as search takes them: contiguous float32 (n, d), made unit rows for the metric cosine.

    The one place that checks vectors. They may be of any number type, tensors on any device, lists, or on disk.
    Raises ValueError, which says what is wrong where and what to do, for an empty array or a single vector, another
    dimension than `dim`, rows that are not finite or too long for float32, and for cosine rows of length zero.
    """
    shape = np.shape(vectors)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{what} must be a non-empty array (n, d), not {shape}; write a single vector as vector[None]")
    if dim and dim != shape[1]:
        raise ValueError(f"{what} have {shape[1]} dimensions, the gallery {dim}; embed both with the same encoder")
    part = vectors[rows]
    kind = np.float32 if isinstance(part, torch.Tensor) else np.asarray(part[:1]).dtype
    if np.dtype(kind).kind not in "fiub":
        raise ValueError(f"{what} must hold numbers, not {kind}")
    part = part.detach().float().cpu().numpy() if isinstance(part, torch.Tensor) else part
    part = np.ascontiguousarray(part, dtype=np.float32).reshape(-1, shape[1])
    with np.errstate(over="ignore"):
        squares = vecdot(part, part)  # not finite where a row is not, and one pass over the data
    unfit = ~np.isfinite(squares) | ((squares == 0) & (metric == "cosine"))
    if unfit.any():
        first = int(np.argmax(unfit))
        trouble = "is too long for float32; scale the vectors down"
        if squares[first] == 0:
            trouble = "is zero and has no direction; leave that image out"
        elif not np.isfinite(part[first]).all():
            trouble = "holds NaN or infinite values; embed in float32, or leave that image out"
        raise ValueError(f"{what}: row {(rows.start or 0) + first} {trouble}")
    if metric != "cosine" or np.allclose(squares, 1, atol=2e-6):
        return part
    return part / np.sqrt(squares)[:, None]


def check_bias(bias: Array, size: int) -> Array:
    """A bias as float32 (size,), or a ValueError."""
    bias = np.asarray(bias, dtype=np.float32)
    if bias.shape != (size,) or not np.isfinite(bias).all():
        broken = "" if np.isfinite(bias).all() else " with NaN or infinite values"
        raise ValueError(f"a bias needs one finite number for each of {size} gallery rows, not {bias.shape}{broken}")
    return bias


def check_k(k: int, available: int, what: str) -> int:
    """The number of neighbours as an int."""
    if available < 1:
        raise ValueError(f"there are no other {what} to find; two or more are needed")
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not 1 <= k <= available:
        raise ValueError(f"k={k} neighbours cannot be found among {available} {what}; choose k from 1 to {available}")
    return int(k)


def check_cut(k: int) -> None:
    """Where a ranking is cut, for a score."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ValueError(f"a ranking is cut at k = 1 or later, not at {k!r}")


def check_labels(labels: Sequence, count: int, what: str) -> Array:
    """One label for each, as an array; numpy would stretch a single one, and leave the rest of more unused."""
    if np.shape(labels) != (count,):
        raise ValueError(f"{count} {what} need as many labels, not {' x '.join(map(str, np.shape(labels))) or labels}")
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iufbUS":
        raise ValueError(f"the labels of {count} {what} must be numbers or texts, not {labels.dtype}, such as None")
    return labels


def check_same_kind(one: Array, other: Array) -> None:
    """Labels that can be equal: a 1 is never the text "1"."""
    if (one.dtype.kind in "US") != (other.dtype.kind in "US"):
        raise ValueError(
            f"labels of {one.dtype} and of {other.dtype} are never equal; give both as texts, or both as numbers"
        )


def check_texts(texts: Sequence[str], what: str = "texts") -> list[str]:
    """A list of strings, from any sequence or generator of them. A single string is no list; half characters, as in names
    of files that are no UTF-8, are no text: no tokenizer takes them."""
    listed = [] if texts is None or isinstance(texts, str) else list(texts)
    wrong = [text for text in listed if not isinstance(text, str) or HALF.search(text)]
    if wrong or not listed:
        raise ValueError(f"{what} must be a list of strings, one or more, not {(wrong or [texts])[0]!r}")
    return listed
