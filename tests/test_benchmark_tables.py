"""Scores of what other programs computed (notebook 02), and the papers' tables (notebook 07)."""

import json

import numpy as np
import papermill as pm
import pytest
from conftest import lift
from sklearn.metrics import average_precision_score

import gpnns_utils as gu

# --- notebook 02: vectors and rankings of other programs ---


@pytest.fixture(scope="module")
def two():
    return lift("02")


@pytest.fixture
def photos(folder):
    return gu.load_images(folder)


def saved(path, array):
    np.save(path, array)
    return str(path)


def nearest_first(vectors, k=None):
    scores = vectors @ vectors.T
    return np.argsort(-scores, axis=1)[:, :k]


def oracle(vectors, labels, leave_out_query):
    """mAP (query in or out) by scikit-learn, from the scores."""
    scores, values = vectors @ vectors.T, []
    for query, row in enumerate(scores):
        kept = np.arange(len(row)) != query if leave_out_query else np.full(len(row), True)
        values.append(average_precision_score(labels[kept] == labels[query], row[kept]))
    return np.mean(values)


@pytest.mark.parametrize("leave_out_query", [True, False])
@pytest.mark.parametrize("lists_hold_the_query", [True, False])
def test_a_full_ranking_scores_as_the_vectors_it_came_from(two, leave_out_query, lists_hold_the_query):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(6), 5)
    vectors = gu.unit_rows(rng.normal(size=(30, 8)).astype(np.float32) + 2 * np.eye(8)[labels])
    lists = nearest_first(vectors)
    if not lists_hold_the_query:
        lists = np.array([row[row != query] for query, row in enumerate(lists)])
    ranks = two.listed_ranks(lists, gu.same_label(labels, labels), leave_out_query)
    expected = oracle(vectors, labels, leave_out_query)
    assert gu.mean_average_precision(ranks).mean == pytest.approx(expected, abs=1e-5)


def test_what_a_short_list_leaves_out_was_not_found_and_minus_one_is_nobody(two):
    lists, relevant = np.array([[0, 1, -1], [1, 2, -1], [2, 1, 0], [3, 2, 1]]), [np.array([0, 1, 3])] * 4
    ranks = two.listed_ranks(lists, relevant, leave_out_query=True)
    score = gu.mean_average_precision(ranks).per_query
    assert score[0] == pytest.approx(1 / 2), "one of two found, at rank 1"
    assert score[1] == pytest.approx(0, abs=1e-6) and score[3] == pytest.approx((1 / 2) / 2)
    assert gu.recall_at_k(ranks, 3).per_query.tolist() == [1, 0, 1, 1]


def test_rows_are_checked_against_names_that_lie_beside_them(two, photos, tmp_path):
    file = saved(tmp_path / "vectors.npy", np.eye(12))
    names = [f"{path.parent.name}/{path.name}" for path in photos.images]
    (tmp_path / "vectors.txt").write_text("\n".join(names) + "\n")
    assert two.load_rows(file, photos).shape == (12, 12)
    (tmp_path / "vectors.txt").write_text("\n".join(names[:2] + names[:1:-1]))
    with pytest.raises(ValueError, match=r"vectors.txt, line 3 says 'red/3.png', but image 2 is .*blue/2.png"):
        two.load_rows(file, photos)
    (tmp_path / "vectors.txt").write_text("\n".join(names[:4]))
    with pytest.raises(ValueError, match="line 5 says 'nothing'"):
        two.load_rows(file, photos)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((11, 3)), r"holds an array \(11, 3\); it needs a row for each of 12 images"),
        (np.ones(12), r"holds an array \(12,\)"),
        (np.ones((12, 0)), r"holds an array \(12, 0\)"),
        (np.array([{}] * 12), "cannot be read as an array .* numbers only"),
    ],
)
def test_a_file_that_cannot_hold_rows_of_these_images_is_refused(two, photos, tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        two.load_rows(saved(tmp_path / "rows.npy", array), photos)


def test_a_file_that_is_not_there_is_said_with_the_kind_it_should_be(two, photos):
    with pytest.raises(ValueError, match="nowhere.npy cannot be read .*No such file.* that numpy.save wrote"):
        two.load_rows("nowhere.npy", photos)


CIRCLE = (np.arange(12)[:, None] + np.arange(5)) % 12  # each image first, then those that follow it


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (CIRCLE.astype(float), "holds float64; neighbours are row numbers, whole numbers from 0 to 11"),
        (CIRCLE + 1, "the list of image 7 names a row outside 0 to 11; count from 0"),
        (np.where(CIRCLE == 3, 2, CIRCLE), "the list of image 0 names an image twice"),
        (CIRCLE[:, ::-1], "0% of the images are their own first neighbour.*from near to far"),
        (np.roll(CIRCLE, 2, axis=0), "0% of the images are their own first neighbour.*row i belongs to image i"),
    ],
)
def test_lists_that_cannot_be_right_are_refused(two, photos, tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        two.load_neighbours(saved(tmp_path / "lists.npy", lists), photos)


def test_lists_with_or_without_the_query_and_of_any_whole_numbers_are_taken(two, photos, tmp_path):
    for lists in (CIRCLE, CIRCLE[:, 1:], CIRCLE.astype(np.uint16), np.where(CIRCLE[:, -1:] == CIRCLE, -1, CIRCLE)):
        assert two.load_neighbours(saved(tmp_path / "lists.npy", lists), photos).tolist() == lists.tolist()


@pytest.mark.notebook
def test_notebook_02_scores_the_files_of_another_program_like_its_own_encoder(folder, photos, tmp_path, results, cache):
    profile, out = results
    vectors = gu.embed_images(gu.load_encoder("pixels"), photos)
    mine = {"profile": profile, "images": str(folder), "encoders": "pixels", "dimensions": 4}
    mine["embeddings"] = saved(tmp_path / "theirs.npy", 3 * vectors.astype(np.float16))
    mine["indices"] = saved(tmp_path / "ranked.npy", nearest_first(vectors))
    notebook = gu.HERE / "notebooks" / "02_benchmark_encoders.ipynb"
    run = {"kernel_name": "python3", "cwd": str(gu.HERE), "progress_bar": False}
    pm.execute_notebook(notebook, tmp_path / "o.ipynb", mine, **run)
    rows = json.loads((out / "02_benchmark_encoders.json").read_text())["rows"]
    for metric in ("mAP", "mAP (self included)"):
        values = {r["model"]: r["value"] for r in rows if r["metric"] == metric and r["group"] == "all"}
        for model in ("file:theirs", "file:ranked"):
            assert values[model] == pytest.approx(values["pixels"], abs=0.1), (model, metric)
    vectors[4] = np.nan
    mine["embeddings"] = saved(tmp_path / "broken.npy", vectors)
    with pytest.raises(pm.PapermillExecutionError, match="broken.npy: row 4 holds NaN"):
        pm.execute_notebook(notebook, tmp_path / "o.ipynb", mine, **run)
