"""Embeddings kept on disk one by one, under the digest of what was embedded: one SQLite file for each encoder.

It stands below `gpnns_utils`, whose `embed_images` and `embed_texts` use it, and imports nothing of the course. Several
processes may read and write a file at the same time, and a killed one leaves it whole.
"""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gpnns import machine

WAIT = 60.0  # seconds for another process that writes
AT_A_TIME = 500  # keys in one question; older SQLite takes 999


def read_embeddings(path: Path, keys: Sequence[bytes], dim: int) -> dict[bytes, np.ndarray]:
    """Those of `keys` that the file holds, each with its embedding, float32 (dim,). A damaged file is named and removed, so
    that all of it is computed again."""
    if not path.exists() or path.stat().st_size == 0:  # another process has just made it
        return {}
    found = {}
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT)) as base:
            (page,) = base.execute("PRAGMA page_size").fetchone()
            if path.stat().st_size % page:
                raise sqlite3.DatabaseError("cut off")
            for first in range(0, len(keys), AT_A_TIME):
                some = keys[first : first + AT_A_TIME]
                marks = ", ".join("?" * len(some))
                rows = base.execute(f"SELECT key, vector FROM embeddings WHERE key IN ({marks})", some).fetchall()
                vectors = np.frombuffer(b"".join(vector for _, vector in rows), np.float32).reshape(-1, dim)
                if len(vectors) != len(rows) or not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
                    raise sqlite3.DatabaseError("rows of another kind")
                found.update(zip((key for key, _ in rows), vectors, strict=True))
    except (sqlite3.DatabaseError, ValueError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:  # locked for longer than WAIT: compute it
            return found
        warnings.warn(f"{path} is damaged and is computed again", stacklevel=2)
        for file in path.parent.glob(f"{path.name}*"):  # and its journal
            file.unlink(missing_ok=True)
        return {}
    return found


def write_embeddings(path: Path, embeddings: Iterable[tuple[bytes, np.ndarray]]) -> None:
    """Add embeddings, float32 (dim,), by key; all of them or, where the process is killed, none. Raises OSError where that is
    not possible, as on a full disk; what was there before stays."""
    rows = [(key, np.ascontiguousarray(vector, np.float32).tobytes()) for key, vector in embeddings]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT)) as base, base:
            base.execute("PRAGMA synchronous = OFF")  # do not wait for the disk: what a power cut breaks is noticed
            base.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL)")
            base.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
    except (OSError, sqlite3.Error) as error:
        raise machine.disk_error(path, error, "what was kept before is still there") from error
