"""Galleries larger than the mini world, and how much of what is there an approximate search of them finds.

`python -m gpnns.larger_tables` measures tables of up to three million rows and writes data/larger_tables.csv, from which
notebook 09 draws what a laptop is not asked to wait for. It takes about twenty minutes on two cores and 8 GB of memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gpnns_utils as gu
from gpnns import published_tables, scale, storage
from gpnns_utils import Array

PART = 100_000  # rows that are drawn, biased and written at a time
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
SETTINGS = [(bits, probes, refine) for bits in (1, 3) for probes in (20, 50, 100, 200) for refine in (1, 10, 50, 200)]


def draw_rows(embeddings: Array, labels: Array, rows: int, seed: int = 0) -> Iterator[Array]:
    """Embeddings of things that nobody has drawn: parts of up to 100,000 unit rows, `rows` in all, ten for each thing.

    A thing is a point from the normal distribution that has the mean and the covariance of the classes' centers in
    `embeddings`; its images lie around it as the images of those classes lie around their center. So a larger gallery
    has more things, not more images of each, and it is as crowded as the real one.
    """
    random = np.random.default_rng(seed)
    classes, at = np.unique(labels, return_inverse=True)
    centers = np.stack([embeddings[at == i].mean(axis=0) for i in range(len(classes))])
    between, within = (
        np.linalg.cholesky(np.cov(deviations.T) + 1e-6 * np.eye(embeddings.shape[1])).T.astype(np.float32)
        for deviations in (centers, embeddings - centers[at])
    )
    for first in range(0, rows, PART):
        count = min(PART, rows - first)
        things = centers.mean(axis=0) + random.standard_normal((-(-count // 10), len(between)), np.float32) @ between
        drawn = things.repeat(10, axis=0)[:count] + random.standard_normal((count, len(within)), np.float32) @ within
        yield gu.unit_rows(drawn)


def make_queries(encoder: gu.Encoder, count: int = 200) -> dict[str, Array]:
    """Images and texts to ask with, `count` of each, and the texts that the bias refers to, which nobody asks."""
    test, captions, references = (gu.load_images("mini", split) for split in ("test", "captions", "references"))
    return {
        "images": gu.embed_images(encoder, test)[0][:: len(test) // count],
        "texts": gu.embed_texts(encoder, [told[0] for told in captions.captions])[:: len(captions) // count],
        "references": gu.embed_texts(encoder, [told[0] for told in references.captions]),
    }


def make_table(folder: str | Path, gallery: Array, bias: Array) -> Any:
    """A table whose ids are row numbers, written part by part."""
    import lancedb  # only now: `scale` must have told it to keep its warnings to itself

    rows = (np.arange(first, min(first + PART, len(gallery))) for first in range(0, len(gallery), PART))
    parts = (scale.make_table_rows(part.astype(str), gallery[part], bias[part]) for part in rows)
    return lancedb.connect(folder).create_table("images", storage.make_reader(parts), mode="overwrite")


def measure_index(
    folder: Path, gallery: Array, asked: dict[str, Array], settings: list[tuple] = SETTINGS
) -> list[dict]:
    """Make a table, and an index for it; recall of the exact ten nearest, and time as a share of what it takes to read
    every row, for each of `settings`: (bits of the index, probes, refine)."""
    import lancedb

    bias = gu.hub_bias(gallery, asked["references"], k=16)
    table, lines = make_table(folder, gallery, bias), []
    right = {kind: gu.search(asked[kind], gallery, 10, bias=bias)[1].astype(str) for kind in ("images", "texts")}
    start = time.perf_counter()
    scale.search_table(table, asked["texts"][:10])
    exact = (time.perf_counter() - start) / 10
    for bits in dict.fromkeys(bits for bits, _, _ in settings):
        earlier = {*folder.rglob("_indices/*/*")}
        start = time.perf_counter()
        table.create_index("vector", config=lancedb.index.IvfRq("dot", num_bits=bits, target_partition_size=4096))
        build = time.perf_counter() - start
        size = sum(file.stat().st_size for file in {*folder.rglob("_indices/*/*")} - earlier)
        costs = {"exact_ms": 1e3 * exact, "build_seconds": build, "index_mb": size / 1e6}
        for probes, refine in [setting[1:] for setting in settings if setting[0] == bits]:
            for kind in right:
                start = time.perf_counter()
                _, ids = scale.search_table(table, asked[kind], 10, probes, refine)
                seconds = (time.perf_counter() - start) / len(ids)
                line = {"rows": len(gallery), "queries": kind, "bits": bits, "probes": probes, "refine": refine}
                shares = {"recall": gu.neighbour_recall(ids, right[kind]), "share_of_exact_time": seconds / exact}
                line |= {name: round(value, 4) for name, value in shares.items()}
                lines.append(line | {name: round(value, 1) for name, value in costs.items()})
    return lines


def main() -> None:
    encoder, train = gu.load_encoder("mini", "cpu"), gu.load_images("mini", "train")
    asked, embeddings = make_queries(encoder), gu.embed_images(encoder, train)[0]
    lines = []
    for rows in SIZES:
        gallery = np.concatenate(list(draw_rows(embeddings, train.labels, rows)))
        with tempfile.TemporaryDirectory() as folder:
            lines += measure_index(Path(folder), gallery, asked)
        print(*lines[-2:], sep="\n", flush=True)
        published_tables.write_numbers(gu.DATA / "larger_tables.csv", lines)


if __name__ == "__main__":
    main()
