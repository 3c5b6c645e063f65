"""Nearest Neighbor Normalization: the paper's numbers, the published package as oracle, and every way to misuse it."""

import faiss
import numpy as np
import pytest
import torch
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st
from nnn import BaseRanker, BaseRetriever, NNNRanker, NNNRetriever
from scipy.stats import spearmanr

import gpnns_utils as gu


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks and tiles so small that little arrays already cross their borders."""
    monkeypatch.setattr(gu, "BLOCK", 7)
    monkeypatch.setattr(gu, "TILE", 11)


def package(gallery, references, k, alpha):
    return NNNRanker(NNNRetriever(gallery.shape[1]), gallery, references, alternate_ks=k, alternate_weight=alpha)


def cone(rng, n, d, axis):
    """Unit rows around an axis, as images or texts of one encoder lie."""
    return gu.unit_rows(unit(rng, n, d) + axis)


# --- the same as the package and the paper ---


@pytest.mark.parametrize("direction", ["text to image", "image to text"])
def test_biases_scores_and_rankings_are_those_of_the_package(direction):
    rng = np.random.default_rng(0)
    images, texts = cone(rng, 900, 48, np.eye(48)[0]), cone(rng, 700, 48, np.eye(48)[1])
    gallery, references, queries = images[:500], texts[:500], texts[500:]
    if direction == "image to text":
        gallery, references, queries = texts[:500], images[:600], images[600:]
    for k, alpha in ((1, 0.25), (16, 0.75), (128, 1.5)):
        ranker = package(gallery, references, k, alpha)
        bias = gu.hub_bias(gallery, references, k, alpha)
        assert bias.dtype == np.float32 and bias.shape == (500,)
        np.testing.assert_allclose(bias, alpha * ranker.alignment_means.numpy()[:, 0], atol=1e-6)
        scores, rows = gu.search(queries, gallery, 20, bias=bias)
        their_scores, their_rows = ranker.search(queries, 20)
        np.testing.assert_allclose(scores, their_scores, atol=1e-6)
        np.testing.assert_array_equal(rows, their_rows)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(2, 40), st.integers(1, 60), st.integers(1, 9), st.integers(2, 20)),
    alpha=st.floats(0, 2),
    kind=st.sampled_from(["float32", "float64", "float16", "int8"]),
    metric=st.sampled_from(["cosine", "inner"]),
)
def test_bias_and_search_are_their_definition_for_all_shapes_and_number_types(seed, sizes, alpha, kind, metric):
    n, references, queries, d = sizes
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=(m, d)) * 20).astype(kind) for m in (n, references, queries)]
    for array in arrays:
        array[:, 0] = 9  # no row is zero
    k, depth = int(rng.integers(1, references + 1)), int(rng.integers(1, n + 1))
    gallery, reference, query = (a.astype(np.float64) for a in arrays)
    if metric == "cosine":
        gallery, reference, query = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (gallery, reference, query))
    else:
        arrays, gallery, reference, query = (
            [np.float32(a) / 50 for a in arrays],
            gallery / 50,
            reference / 50,
            query / 50,
        )
    expected = alpha * np.sort(gallery @ reference.T, axis=1)[:, -k:].mean(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gu, "BLOCK", 7)
        patch.setattr(gu, "TILE", 11)
        bias = gu.hub_bias(arrays[0], arrays[1], k, alpha, metric)
        scores, rows = gu.search(arrays[2], arrays[0], depth, metric, bias=bias)
    np.testing.assert_allclose(bias, expected, atol=2e-5)
    corrected = query @ gallery.T - expected
    np.testing.assert_allclose(scores, -np.sort(-corrected, axis=1)[:, :depth], atol=5e-5)
    np.testing.assert_allclose(scores, np.take_along_axis(corrected, rows, axis=1), atol=5e-5)
    assert all(len(set(line)) == depth for line in rows.tolist())


def test_the_packages_example_of_four_corners_and_a_pole():
    """Queries lean from the pole to a corner each: the pole is the nearest of all, and the bias gives the corners back."""
    corners = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [-1, 0, 0, 0]], dtype=np.float32)
    pole = np.array([[0, 0, 1, 0]], dtype=np.float32)
    gallery, queries = np.concatenate([corners, pole]), np.concatenate([0.6 * corners + 0.8 * pole, pole])
    shifts = 0.01 * np.array([[0, 1, 0, 0], [0, -1, 0, 0], [1, 0, 0, 0], [-1, 0, 0, 0]], dtype=np.float32)
    references = np.concatenate([queries + shift for shift in shifts])
    scores, rows = gu.search(queries, gallery, 1, "inner")
    assert rows[:, 0].tolist() == [4, 4, 4, 4, 4]
    np.testing.assert_allclose(scores[:, 0], [0.8, 0.8, 0.8, 0.8, 1], atol=2e-5)
    theirs = BaseRanker(BaseRetriever(4), gallery, references, batch_size=5).search(queries, 1)
    np.testing.assert_array_equal(rows, theirs[1])
    bias = gu.hub_bias(gallery, references, 2, 0.75, "inner")
    scores, rows = gu.search(queries, gallery, 1, "inner", bias=bias)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scores[:, 0], [0.14625, 0.14625, 0.14625, 0.14625, 0.25], atol=2e-5)


def test_the_order_of_csls_is_that_of_half_the_mean():
    """CSLS = 2 cos - r(query) - r(gallery); a query's own term moves all of its scores alike."""
    rng = np.random.default_rng(1)
    gallery, references, queries = cone(rng, 300, 24, np.eye(24)[0]), unit(rng, 200, 24), unit(rng, 40, 24)
    k = 10
    near = np.sort(gallery @ references.T, axis=1)[:, -k:].mean(axis=1)
    own = np.sort(queries @ gallery.T, axis=1)[:, -k:].mean(axis=1)
    csls = 2 * queries @ gallery.T - near - own[:, None]
    _, rows = gu.search(queries, gallery, 300, bias=gu.hub_bias(gallery, references, k, alpha=0.5))
    for order, scores in zip(rows, csls, strict=True):
        assert spearmanr(scores[order], -np.arange(300)).statistic > 1 - 1e-6


def test_a_hub_loses_its_place_and_hubness_falls():
    rng = np.random.default_rng(3)
    images, text_side = unit(rng, 1000, 32), np.eye(32, dtype=np.float32)[0]
    images[0] = gu.unit_rows((images[0] + 1.5 * text_side)[None])[0]  # one image lies where all texts lie
    texts = gu.unit_rows(images[1:] + 0.8 * unit(rng, 999, 32) + text_side)
    bias = gu.hub_bias(images, texts[:500], 16, 0.75)
    before, after = gu.hubness(texts[500:], images), gu.hubness(texts[500:], images, bias=bias)
    assert before[1][0] > 400 and after[1][0] < before[1][0] / 4 and after[0] < before[0] / 2
    relevant = [[row] for row in range(501, 1000)]
    recall = [gu.recall_at_k(gu.rank_relevant(texts[500:], images, relevant, bias=b)).mean for b in (None, bias)]
    assert recall[1] > recall[0] + 0.3


# --- one dimension more, full score matrices, ranks ---


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_one_more_dimension_gives_the_corrected_ranking_in_any_index_for_inner_products(kind):
    rng = np.random.default_rng(4)
    gallery, references, queries = cone(rng, 2000, 32, np.eye(32)[0]), unit(rng, 500, 32), unit(rng, 60, 32)
    bias = gu.hub_bias(gallery, references, 16, 0.75)
    scores, rows = gu.search(queries, gallery, 10, bias=bias)
    longer = gu.with_bias(gallery, bias)
    index = gu.build_index(longer, kind, "inner")
    if kind == "ivf":
        index.nprobe = index.nlist  # all cells
    found_scores, found = gu.search(gu.with_bias(queries), longer, 10, "inner", index=index)
    if kind == "hnsw":
        assert gu.neighbour_recall(found, rows) > 0.8
    else:
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_allclose(found_scores, scores, atol=1e-6)


def test_equal_scores_come_in_the_order_of_their_rows(small_tiles):
    """Which of those that tie for the last place are found is left to faiss; there are none among the first twenty."""
    gallery = np.tile(np.eye(3, dtype=np.float32), (20, 1))  # each row twenty times
    scores, rows = gu.search(np.eye(3, dtype=np.float32), gallery, 25)
    assert [line[:20].tolist() for line in rows] == [list(range(first, 60, 3)) for first in range(3)]
    assert (np.diff(rows[:, 20:], axis=1) > 0).all() and len(set(rows[0])) == 25
    assert (scores[:, :20] == 1).all() and (scores[:, 20:] == 0).all()


# --- large, small, on disk, in part ---


def test_memory_maps_half_precision_tensors_and_views_give_the_same_bias(tmp_path):
    rng = np.random.default_rng(6)
    gallery, references = unit(rng, 5000, 16), unit(rng, 4500, 16)
    bias = gu.hub_bias(gallery, references, 32)
    half = np.memmap(tmp_path / "half.bin", np.float16, "w+", shape=gallery.shape)
    half[:] = gallery
    np.testing.assert_allclose(gu.hub_bias(half, references, 32), bias, atol=1e-3)
    np.save(tmp_path / "gallery.npy", gallery)
    on_disk = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    np.testing.assert_allclose(gu.hub_bias(on_disk, references, 32), bias, atol=1e-6)
    np.testing.assert_allclose(
        gu.hub_bias(torch.from_numpy(gallery), torch.from_numpy(references), 32), bias, atol=1e-6
    )
    np.testing.assert_allclose(gu.hub_bias(gallery[::-1], references[::-1], 32)[::-1], bias, atol=1e-6)
    np.testing.assert_allclose(gu.hub_bias(gallery[:50].tolist(), references, 32), bias[:50], atol=1e-6)


def test_several_k_in_one_pass_equal_one_pass_each(small_tiles):
    rng = np.random.default_rng(7)
    gallery, references = unit(rng, 40, 8), unit(rng, 60, 8)
    ks = [5, 1, 60, 13]
    means = gu.reference_means(gallery, references, ks)
    assert means.shape == (4, 40) and means.dtype == np.float32
    for mean, k in zip(means, ks, strict=True):
        np.testing.assert_allclose(0.5 * mean, gu.hub_bias(gallery, references, k, 0.5), atol=1e-6)


# --- misuse ---


def test_every_misuse_is_refused_with_a_remedy():
    rng = np.random.default_rng(11)
    gallery, references, queries = unit(rng, 20, 4), unit(rng, 10, 4), unit(rng, 3, 4)
    bad = {kind: references.copy() for kind in ("nan", "inf", "zero")}
    bad["nan"][4, 1], bad["inf"][5, 0], bad["zero"][6] = np.nan, np.inf, 0
    broken = gallery.copy()
    broken[7, 2] = np.nan
    bias = gu.hub_bias(gallery, references, 3)
    longer = gu.with_bias(gallery, bias)
    index = gu.build_index(longer, "flat", "inner")
    distances = gu.build_index(references, "flat", "l2")
    cases = [
        (
            lambda: gu.hub_bias(gallery, references, 11),
            "k=11 neighbours cannot be found among 10 references; choose k from 1 to 10",
        ),
        (lambda: gu.hub_bias(gallery, references), "k=128 neighbours cannot be found among 10 references"),
        (lambda: gu.hub_bias(gallery, references, 0), "choose k from 1 to 10"),
        (lambda: gu.hub_bias(gallery, references, -1), "choose k from 1 to 10"),
        (lambda: gu.hub_bias(gallery, references, 2.5), "choose k from 1 to 10"),
        (lambda: gu.hub_bias(gallery, references, 3, float("nan")), "alpha=nan is not a share"),
        (lambda: gu.hub_bias(gallery, references, 3, -0.5), "alpha=-0.5 is not a share"),
        (lambda: gu.hub_bias(gallery, np.empty((0, 4), np.float32), 1), "references must be a non-empty array"),
        (lambda: gu.hub_bias(np.empty((0, 4), np.float32), references, 1), "the gallery must be a non-empty array"),
        (lambda: gu.hub_bias(gallery, bad["nan"], 3), "references: row 4 holds NaN or infinite values"),
        (lambda: gu.hub_bias(gallery, bad["inf"], 3), "references: row 5 holds NaN or infinite values"),
        (lambda: gu.hub_bias(gallery, bad["zero"], 3), "references: row 6 is zero"),
        (lambda: gu.hub_bias(broken, references, 3), "the gallery: row 7 holds NaN"),
        (lambda: gu.hub_bias(gallery, references[:, :3], 3), "references have 3 dimensions, the gallery 4"),
        (lambda: gu.hub_bias(gallery, references, 3, metric="l2"), "need the metric cosine or inner"),
        (
            lambda: gu.search(queries, gallery, 5, own=np.arange(4)),
            "own needs one row of the gallery, or -1, for each of 3",
        ),
        (lambda: gu.search(queries, references, 3, index=distances), "not built for the metric cosine"),
        (lambda: gu.search(queries, gallery, 5, bias=bias[:19]), "one finite number for each of 20 gallery rows"),
        (lambda: gu.search(queries, gallery, 5, bias=bias[:, None]), "one finite number for each of 20 gallery rows"),
        (lambda: gu.search(queries, gallery, 5, bias=bias * np.inf), "with NaN or infinite values"),
        (lambda: gu.search(queries, gallery, 5, "l2", bias=bias), "exact search with the metrics cosine and inner"),
        (lambda: gu.search(queries, gallery, 5, index=index, bias=bias), "build the index from with_bias"),
        (lambda: gu.search(queries, longer, 5, "inner", index=index), "queries have 4 dimensions, the gallery 5"),
        (lambda: gu.search(queries, gallery, 5, "inner", index=index), "the index holds 20 rows of 5 dimensions"),
        (lambda: gu.search(queries, gallery, 21, bias=bias), "choose k from 1 to 20"),
        (lambda: gu.search(queries, gallery, 0, bias=bias), "choose k from 1 to 20"),
        (lambda: gu.search(queries[0], gallery, 5, bias=bias), r"write a single vector as vector\[None\]"),
        (lambda: gu.search(queries * np.nan, gallery, 5, bias=bias), "queries: row 0 holds NaN"),
        (lambda: gu.rank_relevant(queries, gallery, [[0]] * 3, bias=bias[:5]), "one finite number for each of 20"),
        (lambda: gu.with_bias(gallery, bias[:5]), "one finite number for each of 20"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_broken_row_is_named_by_its_number_in_the_whole_array(small_tiles):
    gallery, references = unit(np.random.default_rng(12), 40, 4), unit(np.random.default_rng(13), 40, 4)
    references[37] = np.nan
    with pytest.raises(ValueError, match="references: row 37 holds NaN"):
        gu.hub_bias(gallery, references, 3)
    gallery[39] = 0
    with pytest.raises(ValueError, match="the gallery: row 39 is zero"):
        gu.hub_bias(gallery, references[:30], 3)


def test_no_queries_have_no_neighbours():
    gallery = unit(np.random.default_rng(14), 6, 4)
    scores, rows = gu.search(np.empty((0, 4), np.float32), gallery, 3)
    assert scores.shape == rows.shape == (0, 3) and rows.dtype == np.int64


def test_a_saved_index_with_its_bias_inside_answers_as_before(tmp_path):
    rng = np.random.default_rng(17)
    gallery, references, queries = unit(rng, 100, 8), unit(rng, 50, 8), unit(rng, 7, 8)
    bias = gu.hub_bias(gallery, references, 5)
    np.save(tmp_path / "bias.npy", bias)
    longer = gu.with_bias(gallery, np.load(tmp_path / "bias.npy"))
    faiss.write_index(gu.build_index(longer, "flat", "inner"), str(tmp_path / "gallery.index"))
    index = faiss.read_index(str(tmp_path / "gallery.index"))
    _, rows = gu.search(gu.with_bias(queries), longer, 4, "inner", index=index)
    np.testing.assert_array_equal(rows, gu.search(queries, gallery, 4, bias=bias)[1])
