"""What may come in as vectors, row numbers, labels and settings: the one place that checks them.

Each check returns what the functions of the course compute with, or raises ValueError that names the argument, what is
wrong with it, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray
# numpy before 2, which Kaggle has installed, lacks it.
vecdot = getattr(np, "vecdot", None) or (lambda a, b: np.einsum("nd,nd->n", a, b))


def unit_rows(vectors: Array, what: str = "the vectors") -> Array:
    """Rows divided by their length, float32. Raises ValueError for NaN, infinite or zero rows and names the first."""
    return checked(vectors, what)


def checked(
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


def checked_bias(bias: Array, size: int) -> Array:
    """A bias as float32 (size,), or a ValueError."""
    bias = np.asarray(bias, dtype=np.float32)
    if bias.shape != (size,) or not np.isfinite(bias).all():
        broken = "" if np.isfinite(bias).all() else " with NaN or infinite values"
        raise ValueError(f"a bias needs one finite number for each of {size} gallery rows, not {bias.shape}{broken}")
    return bias


def row_numbers(rows: Sequence, size: int, what: str, none: bool = False) -> Array:
    """Rows of something that has `size` of them, given as numbers or as a boolean mask; with `none`, -1 stands for no row.

    Raises ValueError for anything else, where numpy would count -1 from the end, take a mask for zeros and ones, and
    cut 2.7 to 2.
    """
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (size,):
        return np.flatnonzero(rows)
    if rows.size == 0 and rows.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"{what} must be row numbers, or a mask of {size} entries, not {rows.dtype} {rows.shape}")
    if len(rows) == size > 2 and 0 <= rows.min() <= rows.max() <= 1:
        raise ValueError(f"{what}: {size} zeros and ones seem to be a mask; give it as booleans, mask.astype(bool)")
    if rows.min() < -none or rows.max() >= size:
        wrong = rows[(rows < -none) | (rows >= size)][0]
        raise ValueError(f"{what} hold {wrong}, which is no row of {size}; leave out what is not there")
    return rows[rows >= 0] if none else rows


def check_k(k: int, available: int, what: str) -> None:
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= available:
        raise ValueError(f"k={k} neighbours cannot be found among {available} {what}; choose k from 1 to {available}")


def check_labels(labels: Sequence, count: int, what: str) -> None:
    """ValueError unless there is one label for each; numpy would stretch a single one, and leave the rest of more unused."""
    if np.shape(labels) != (count,):
        raise ValueError(f"{count} {what} need as many labels, not {' x '.join(map(str, np.shape(labels))) or labels}")
