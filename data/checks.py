"""What may come in as vectors, row numbers, labels and settings: the one place that checks them.

Each check returns what the functions of the course compute with, or raises ValueError that names the argument, what is
wrong with it, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

Array = np.ndarray
HALF = re.compile("[\ud800-\udfff]")
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


def check_k(k: int, available: int, what: str) -> int:
    """The number of neighbours as an int."""
    if available < 1:
        raise ValueError(f"there are no other {what} to find; two or more are needed")
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or not 1 <= k <= available:
        raise ValueError(f"k={k} neighbours cannot be found among {available} {what}; choose k from 1 to {available}")
    return int(k)


def check_cut(k) -> None:
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
