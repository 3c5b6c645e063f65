"""What notebooks/gpnns/scale.py reads and writes, on this machine or in object storage, through pyarrow's file systems.

An address is a local path, or one such as s3://bucket/folder or gs://bucket/folder. Credentials come from where those
services keep them: environment variables, files in the home folder, the machine's role.

files -> tars of images -> Parquet files of embeddings
"""

from __future__ import annotations

import itertools
import json
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from hashlib import md5
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from gpnns.images import image_set

Array = np.ndarray


def find_place(address: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system of an address, and the path in it. ValueError for an address with settings behind a question mark."""
    kind, distant, path = str(address).partition("://")
    if not distant:
        return fs.LocalFileSystem(), Path(address).expanduser().absolute().as_posix()
    if "?" in path:
        raise ValueError(f"{address}: leave out what follows the ?; AWS_ENDPOINT_URL names a service of your own")
    return fs.FileSystem.from_uri(f"{kind}://{quote(path)}")


def list_stored(address: str | Path, ending: str) -> dict[str, str]:
    """The files below a folder whose names end so, sorted: their paths from there on, without the ending, and for each
    what changes when it is written again, its size and time."""
    files, top = find_place(address)
    found = files.get_file_info(fs.FileSelector(top, recursive=True, allow_not_found=True))
    wanted = [file for file in found if file.is_file and file.path.endswith(ending)]
    names = {file.path.removeprefix(top).strip("/").removesuffix(ending): file for file in wanted}
    return {name: f"{file.size} {file.mtime_ns}" for name, file in sorted(names.items())}


def read_bytes(address: str | Path) -> bytes:
    """A small file as a whole. FileNotFoundError where there is none."""
    files, path = find_place(address)
    with files.open_input_stream(path) as stream:
        return stream.read()


def read_settings(address: str | Path) -> dict:
    """What a JSON file says, nothing where there is none."""
    files, path = find_place(address)
    return json.loads(read_bytes(address)) if files.get_file_info(path).is_file else {}


def write_bytes(address: str | Path, content: bytes) -> None:
    """A file that is there as a whole or not at all, whatever is killed meanwhile."""
    files, path = find_place(address)
    files.create_dir(path.rpartition("/")[0], recursive=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with files.open_output_stream(partial) as stream:
            stream.write(content)
        files.move(partial, path)
    except BaseException:
        if files.get_file_info(partial).is_file:
            files.delete_file(partial)
        raise


def check_same_settings(output: str | Path, settings: dict) -> None:
    """Note in OUTPUT/settings.json what its embeddings are made with, of bytes a digest. ValueError where they were made
    with something else."""
    settings = {key: md5(v).hexdigest() if isinstance(v, bytes) else v for key, v in settings.items()}
    known = read_settings(f"{output}/settings.json")
    if known and (other := [key for key in settings if known.get(key) != settings[key]]):
        told = ", ".join(f"{key} {known.get(key)}, now {settings[key]}" for key in other)
        raise ValueError(f"{output} holds embeddings that are made with {told}; choose another folder for these")
    if not known:
        write_bytes(f"{output}/settings.json", json.dumps(settings, indent=1).encode())


class BrokenTar(ValueError):
    """A tar that cannot be read to its end."""


def read_tar_images(tar: str | Path) -> Iterator[tuple[str, Image.Image | None]]:
    """The images of a tar with their names, one after the other as they are read; None for one that cannot be read.

    Raises BrokenTar, when it comes to that, for a tar that is broken, is cut off, or holds a name twice.
    """
    (files, path), seen = find_place(tar), set()
    try:
        with files.open_input_stream(path) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                if member.isfile() and image_set.is_image(member.name.rpartition("/")[2]):
                    if member.name in seen:
                        raise BrokenTar(f"{tar} holds {member.name} twice; an image needs a name of its own")
                    seen.add(member.name)
                    content = BytesIO(members.extractfile(member).read())
                    yield member.name, image_set.open_or_none(lambda file=content: image_set.open_image(file))
        with files.open_input_file(path) as file:  # tarfile takes a broken header for the end
            file.seek(members.offset)
            if file.read(512) != bytes(512):
                raise BrokenTar(f"{tar} is cut off, or damaged, after {len(seen)} images; make it again")
    except tarfile.TarError as error:
        raise BrokenTar(f"{tar} is no tar, or a broken one ({error}); make it again") from error


def make_vector_column(vectors: Array) -> pa.Array:
    """Vectors (n, d) as a column of lists of one length."""
    return pa.array(list(vectors), pa.list_(pa.float32(), vectors.shape[1]))


def write_rows(address: str | Path, ids: Sequence[str], vectors: Array, bias: Array, facts: dict) -> dict:
    """One Parquet file: an id, a vector and a bias for each image, and the facts, which it returns, in its metadata."""
    columns = [pa.array(ids, pa.string()), make_vector_column(vectors), pa.array(bias, pa.float32())]
    rows, content = pa.table(columns, ["id", "vector", "bias"], metadata={"facts": json.dumps(facts)}), BytesIO()
    pq.write_table(rows, content)
    write_bytes(address, content.getvalue())
    return facts


def read_rows(address: str | Path) -> Iterator[tuple[list[str], Array, Array]]:
    """ids, vectors and bias of a Parquet file, some ten thousand rows at a time."""
    files, path = find_place(address)
    with pq.ParquetFile(path, filesystem=files) as file:
        for rows in file.iter_batches(10_000):
            vectors = np.stack(rows["vector"].to_numpy(zero_copy_only=False))
            yield rows["id"].to_pylist(), vectors, rows["bias"].to_numpy()


def read_facts(address: str | Path) -> dict:
    """What the metadata of a Parquet file say: the tar, how many images it had, which could not be read."""
    files, path = find_place(address)
    return json.loads(pq.read_schema(path, filesystem=files).metadata[b"facts"])


def make_reader(parts: Iterator[pa.Table]) -> pa.RecordBatchReader | None:
    """Tables as one stream of rows, none of which is read before it is asked for; None where there is no table."""
    first = next(parts, None)
    if first is None:
        return None
    batches = (batch for part in itertools.chain([first], parts) for batch in part.to_batches())
    return pa.RecordBatchReader.from_batches(first.schema, batches)
