"""From tars of images to a table that is searched, on one machine or on a cluster. Notebook 09 explains each step.

    python notebooks/scale.py INPUT OUTPUT --encoder mini --references captions.txt
    python notebooks/scale.py s3://photos/tars s3://photos/found --encoder open_clip:ViT-B-32/openai --ray auto

INPUT is a folder of webdataset tars, at any depth. OUTPUT gets a Parquet file for each, and the table. Either may lie in
object storage. After any stop, run the same command again: tars that have their file are not read again.
"""

import argparse
import hashlib
import itertools
import json
import os

os.environ |= {"DO_NOT_TRACK": "1", "DAFT_PROGRESS_BAR": "0", "LANCEDB_LOG": "error"}  # Daft would report home
import daft
import numpy as np
import pyarrow as pa
import torch

import gpnns_utils as gu
from gpnns_utils import Array, storage


def embed_tar(encoder: gu.Encoder, references: Array | None, source: str, output: str, name: str) -> dict:
    """One tar into one Parquet file: id (`name/member`), vector (a unit row) and bias of each image; returns its facts."""
    images = storage.images_of(f"{source}/{name}.tar")
    pixels = ((member, None if image is None else encoder.preprocess(image)) for member, image in images)
    members, vectors = [], [np.empty((0, encoder.dim), np.float32)]
    while batch := list(itertools.islice(pixels, 64)):  # the memory holds one batch, however large the tar is
        members += [member for member, _ in batch]
        vectors.append(np.full((len(batch), encoder.dim), np.inf, np.float32))
        _, readable, stack = gu.datasets.stacked([tensor for _, tensor in batch])
        if readable:
            stack = torch.from_numpy(stack).to(encoder.device)
            vectors[-1][readable] = gu.run_tower(encoder, encoder.image_tower, stack)
    members, vectors = np.array(members, object), np.concatenate(vectors)
    fit = np.isfinite(vectors[:, 0])  # an image could be read, and has a direction; a blank page may have none
    ids, vectors, bias = [f"{name}/{member}" for member in members[fit]], vectors[fit], np.zeros(fit.sum())
    if references is not None and len(ids):
        bias = gu.hub_bias(vectors, references, min(128, len(references)))
    facts = {"tar": name, "images": len(ids), "unreadable": list(members[~fit])}
    storage.write_rows(f"{output}/embeddings/{name}.parquet", ids, vectors, bias, facts)
    return facts


class Worker:
    """What each process of the engine runs: it loads the encoder once, then embeds one tar after the other."""

    def __init__(self, encoder: str, references: Array | None, source: str, output: str, gpus: float):
        torch.set_num_threads(1)  # there is a worker for each core
        self.job = gu.load_encoder(encoder, None if gpus else "cpu"), references, source, output

    def embed(self, name: str) -> str:
        try:
            return json.dumps(embed_tar(*self.job, name))
        except ValueError as error:  # the tar is broken; the others go on
            return json.dumps({"tar": name, "broken": str(error)})


def embed_all(encoder: str, references: Array | None, source: str, output: str, workers: int = 0, gpus: float = 0):
    """Every tar below `source` that has no Parquet file yet, by Daft's workers (0: one a core); their facts, a list."""
    tars, done = storage.names_below(source, ".tar"), {*storage.names_below(f"{output}/embeddings", ".parquet")}
    if not tars:
        raise ValueError(f"there is no .tar file in {source}; pack the images into webdataset tars first")
    worker = daft.cls(Worker, use_process=True, max_concurrency=workers or os.cpu_count(), gpus=gpus)
    todo = [name for name in tars if name not in done]
    call = worker(encoder, references, source, output, gpus).embed(daft.col("tar")).alias("facts")
    rows = daft.from_pydict({"tar": todo}).into_batches(1).select(call).iter_rows() if todo else []
    progress, facts = gu.Progress(len(tars), "embedding tars", "tars", len(tars) - len(todo)), []
    try:
        for row in rows:
            facts.append(json.loads(row["facts"]))
            progress.update(len(tars) - len(todo) + len(facts))
    except Exception as error:
        raise RuntimeError(f"a worker failed after {len(facts)} tars, which are kept; run this again") from error
    return facts


def padded(vectors: Array, bias: Array | None = None) -> Array:
    """`gu.with_bias`, and zeros up to a multiple of 8 dimensions, which change no product and which the index needs."""
    vectors = gu.with_bias(vectors, bias)
    return np.pad(vectors, ((0, 0), (0, -vectors.shape[1] % 8)))


def table_rows(ids: list[str], vectors: Array, bias: Array) -> pa.Table:
    return pa.table({"id": ids, "vector": storage.column(padded(vectors, bias))})


def put(table, rows) -> None:
    """Rows into the table: known ids are replaced, new ones added, so that none is there twice."""
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def fill_table(output: str, indexed: int = 100_000):
    """The table of all Parquet files; adds those that it lacks. From `indexed` rows on it has an approximate index."""
    import lancedb  # not before the engine starts its processes: the two do not mix

    names, base = storage.names_below(f"{output}/embeddings", ".parquet"), lancedb.connect(f"{output}/table")
    filled = json.loads(storage.read(f"{output}/table/filled.json") or "[]")
    files = [f"{output}/embeddings/{name}.parquet" for name in names if name not in {*filled}]
    batches = (batch for file in files for rows in storage.read_rows(file) for batch in table_rows(*rows).to_batches())
    if first := next(batches, None):
        rows = pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], batches))
        put(base.create_table("images", schema=first.schema, exist_ok=True), rows)
    storage.write(f"{output}/table/filled.json", json.dumps(names).encode())
    table = base.open_table("images")
    if table.count_rows() >= indexed and not table.list_indices():
        table.create_index("vector", config=lancedb.index.IvfRq(distance_type="dot", num_bits=3))
    table.optimize()  # new rows into the index too
    return table


def search_table(table, queries: Array, k: int = 10, probes: int = 0, refine: int = 1) -> tuple[Array, Array]:
    """Scores and ids (queries, k) of the nearest; `probes` cells of the index are read, or, for 0, every row."""
    found = []
    for query in padded(queries):
        search = table.search(query).distance_type("dot").select(["id", "_distance"]).limit(k)
        search = search.nprobes(probes).refine_factor(refine) if probes else search.bypass_vector_index()
        found.append(search.to_arrow().to_pydict())
    return 1 - np.array([rows["_distance"] for rows in found], np.float32), np.array([rows["id"] for rows in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--encoder", required=True, help="as load_encoder takes it, such as open_clip:ViT-B-32/openai")
    parser.add_argument("--references", help="texts, one a line, whose nearest images are hubs (notebook 06)")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one a core of this machine")
    parser.add_argument("--gpus", type=float, default=0, help="share of a GPU for each process, such as 0.125")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; auto: the one of this machine")
    asked = parser.parse_args()
    encoder, texts = gu.load_encoder(asked.encoder), storage.read(asked.references) if asked.references else b""
    told = {"encoder": asked.encoder, "weights": encoder.fingerprint(), "references": hashlib.md5(texts).hexdigest()}
    storage.check_settings(asked.output, told)
    references = gu.embed_texts(encoder, texts.decode().splitlines()) if texts else None
    if asked.ray:
        daft.set_runner_ray(asked.ray)
    facts = embed_all(asked.encoder, references, asked.input, asked.output, asked.workers, asked.gpus)
    broken = [fact["broken"] for fact in facts if "broken" in fact]
    unreadable = [f"{fact['tar']}/{name}" for fact in facts for name in fact.get("unreadable", [])]
    print(f"{len(facts) - len(broken)} tars embedded, with {len(unreadable)} unreadable images:", *unreadable[:9])
    print(f"the table has {fill_table(asked.output).count_rows():,} images")
    raise SystemExit("not embedded: " + "; ".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
