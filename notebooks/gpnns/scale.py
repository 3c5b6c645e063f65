"""From tars of images to a table that is searched, on one machine or on a cluster. Notebook 09 explains each step.

    python -m gpnns.scale path/to/tars s3://photos/found --encoder open_clip:ViT-B-32/openai --references captions.txt

Writes a Parquet file for each webdataset tar, and the table, here or in object storage. Run it again after a stop."""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

COURSE = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # of a checkout that nobody installed
sys.path[:0] = [folder for folder in COURSE if folder not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join([*COURSE, *filter(None, [os.environ.get("PYTHONPATH")])])  # for the workers
os.environ |= {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0", "LANCEDB_LOG": "error"}
import daft  # only now: it would report home
import numpy as np
import pyarrow as pa
import torch

import gpnns_utils as gu
from gpnns import storage
from gpnns.images import decoding
from gpnns_utils import Array


def embed_tar(encoder: gu.Encoder, references: Array | None, source: str, output: str, name: str) -> dict:
    """One tar into one Parquet file: id (`name.tar/member`), vector (a unit row) and bias of each image; returns its facts."""
    images = storage.read_tar_images(f"{source}/{name}.tar")
    pixels = ((member, None if image is None else encoder.preprocess(image)) for member, image in images)
    members, vectors = [], [np.empty((0, encoder.dim), np.float32)]
    while batch := list(itertools.islice(pixels, 64)):  # the memory holds one batch, however large the tar is
        members += [member for member, _ in batch]
        vectors.append(np.full((len(batch), encoder.dim), np.inf, np.float32))
        _, rows, stack = decoding.stack_readable([tensor for _, tensor in batch])
        if rows:
            vectors[-1][rows] = gu.run_tower(encoder, encoder.image_tower, torch.from_numpy(stack).to(encoder.device))
    members, vectors = np.array(members, object), np.concatenate(vectors)
    fit = np.isfinite(vectors[:, 0])  # an image could be read, and has a direction; a blank page may have none
    ids, vectors, bias = [f"{name}.tar/{member}" for member in members[fit]], vectors[fit], np.zeros(fit.sum())
    if references is not None and len(ids):
        bias = gu.hub_bias(vectors, references, min(128, len(references)))
    facts = {"tar": name, "images": len(ids), "unreadable": list(members[~fit])}
    return storage.write_rows(f"{output}/embeddings/{name}.parquet", ids, vectors, bias, facts)


class Worker:  # in each process of the engine: it loads the encoder once, then embeds one tar after the other
    def __init__(self, encoder: str, references: Array | None, source: str, output: str, gpus: float):
        torch.set_num_threads(1)  # there is a worker for each core
        self.job = gu.load_encoder(encoder, None if gpus else "cpu"), references, source, output

    def embed(self, name: str) -> str:
        try:
            return json.dumps(embed_tar(*self.job, name))
        except storage.BrokenTar as error:  # the others go on
            return json.dumps({"tar": name, "broken": str(error)})


def embed_all(
    encoder: str, references: Array | None, source: str, output: str, workers: int = 0, gpus: float = 0
) -> list[dict]:
    """Every tar below `source` that has no Parquet file yet, by Daft's workers (0: one a core); the facts of each."""
    tars, done = storage.list_stored(source, ".tar"), storage.list_stored(f"{output}/embeddings", ".parquet")
    if not tars:
        raise ValueError(f"there is no .tar file in {source}; pack the images into webdataset tars first")
    workers, todo, facts = workers or os.cpu_count(), [name for name in tars if name not in done], []
    worker = daft.cls(Worker, use_process=True, max_concurrency=workers, gpus=gpus)
    call = worker(encoder, references, source, output, gpus).embed(daft.col("tar")).alias("facts")
    progress = gu.Progress(len(tars), "embedding tars", "tars", len(tars) - len(todo))
    try:
        for row in daft.from_pydict({"tar": todo}).into_batches(1).select(call).iter_rows() if todo else []:
            facts.append(json.loads(row["facts"]))
            progress.update(len(tars) - len(todo) + len(facts))
    except Exception as error:
        where = [name for name in todo if name not in {fact["tar"] for fact in facts}][:workers]
        raise RuntimeError(f"a worker failed at {' or '.join(where)}; run this again, the rest is kept") from error
    return facts


def pad_vectors(vectors: Array, bias: Array | None = None) -> Array:
    """`gu.with_bias`, and zeros up to a multiple of 8 dimensions, which change no product and which the index needs."""
    return np.pad(wider := gu.with_bias(vectors, bias), ((0, 0), (0, -wider.shape[1] % 8)))


def make_table_rows(ids: list[str], vectors: Array, bias: Array) -> pa.Table:
    return pa.table({"id": ids, "vector": storage.make_vector_column(pad_vectors(vectors, bias))})


def put_rows(table: Any, rows: pa.Table | pa.RecordBatchReader) -> None:
    """Replace rows of known ids and add new ones, so that no id is there twice."""
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def fill_table(output: str, indexed: int = 100_000) -> Any:
    """The table, after files that are new or were made again are put in; from `indexed` rows on it has an index."""
    import lancedb  # not before the engine starts its processes: the two do not mix

    folder, base = f"{output}/embeddings", lancedb.connect(f"{output}/table")
    there, filled = storage.list_stored(folder, ".parquet"), storage.read_settings(f"{output}/table/filled.json")
    new = [name for name, stamp in there.items() if filled.get(name) != stamp]
    for group in (new[first : first + 100] for first in range(0, len(new), 100)):
        for name in {*group} & {*filled}:  # made again, perhaps of fewer images
            base.open_table("images").delete("starts_with(id, '{}.tar/')".format(name.replace("'", "''")))
        parts = (make_table_rows(*part) for name in group for part in storage.read_rows(f"{folder}/{name}.parquet"))
        if (rows := storage.make_reader(parts)) is not None:
            put_rows(base.create_table("images", schema=rows.schema, exist_ok=True), rows)
        filled |= {name: there[name] for name in group}
        storage.write_bytes(f"{output}/table/filled.json", json.dumps(filled).encode())
    if not base.list_tables().tables:
        raise ValueError(f"{folder} has no image: in none of the tars could one be read")
    table = base.open_table("images")
    if table.count_rows() >= indexed and not table.list_indices():
        table.create_index("vector", config=lancedb.index.IvfRq("dot", num_bits=3, target_partition_size=4096))
    table.optimize()  # new rows into the index too
    return table


def search_table(table: Any, queries: Array, k: int = 10, probes: int = 0, refine: int = 1) -> tuple[Array, Array]:
    """Scores and ids (queries, k) of the nearest, -inf and "" where there are fewer. probes: cells read; 0 for all rows."""
    scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), "", object)
    for row, query in enumerate(pad_vectors(queries)):
        search = table.search(query).distance_type("dot").select(["id", "_distance"]).limit(k)
        found = (search.nprobes(probes).refine_factor(refine) if probes else search.bypass_vector_index()).to_arrow()
        scores[row, : len(found)], ids[row, : len(found)] = 1 - found["_distance"].to_numpy(), found["id"].to_pylist()
    return scores, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input"), parser.add_argument("output")
    parser.add_argument("--encoder", required=True, help="as load_encoder takes it, such as open_clip:ViT-B-32/openai")
    parser.add_argument("--references", help="texts, one a line, whose nearest images are hubs (notebook 06)")
    parser.add_argument("--workers", type=int, default=0, help="processes in all; default: one for each core here")
    parser.add_argument("--gpus", type=float, default=0, help="share of a GPU for each process, such as 0.125")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; auto: the one of this machine")
    asked = parser.parse_args()
    encoder, texts = gu.load_encoder(asked.encoder), storage.read_bytes(asked.references) if asked.references else b""
    made_with = {"encoder": asked.encoder, "weights": encoder.fingerprint(), "references": texts, "gpu": asked.gpus > 0}
    storage.check_same_settings(asked.output, made_with)
    references = gu.embed_texts(encoder, texts.decode("utf-8-sig").splitlines()) if texts else None
    if asked.ray:
        import ray

        ray.init(asked.ray, runtime_env={"env_vars": {"DO_NOT_TRACK": "1", "DAFT_PROGRESS_BAR": "0"}})  # there, too
        daft.set_runner_ray()
    facts = embed_all(asked.encoder, references, asked.input, asked.output, asked.workers, asked.gpus)
    unreadable = [f"{fact['tar']}/{name}" for fact in facts for name in fact.get("unreadable", [])]
    print(f"{len(facts)} tars read, with {len(unreadable)} images that are not readable:", *unreadable[:9])
    sys.stderr.writelines(fact["broken"] + "\n" for fact in facts if "broken" in fact)
    print(f"the table has {fill_table(asked.output).count_rows():,} images")
    raise SystemExit(any("broken" in fact for fact in facts))


if __name__ == "__main__":
    main()
