"""Scores against definitions, published toy values and other libraries."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import unit
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from scipy.stats import skew
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

import gpnns_utils as gu
from gpnns import paper_tables

TOY = np.array([[1.0, 3.0, 6.0, 8.0]])  # relevant at ranks 1, 3, 6, 8 of 8


def scores_as_vectors(scores):
    """One query and a gallery of unit vectors whose cosines with it order as `scores`."""
    angles = np.arccos(np.asarray(scores, dtype=float))
    return np.array([[1.0, 0.0]]), np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize(
    ("k", "denominator", "expected"),
    [
        (None, "relevant", 0.6667),
        (3, "relevant", 0.4167),
        (5, "relevant", 0.4167),
        (3, "min", 0.5556),
        (5, "min", 0.4167),
        (3, "hits", 0.8333),
        (5, "hits", 0.8333),
    ],
)
def test_average_precision_of_the_toy_ranking_is_the_value_each_tool_reports(k, denominator, expected):
    assert gu.mean_average_precision(TOY, k, denominator).mean == pytest.approx(expected, abs=5e-5)


def test_the_trapezoid_rule_of_revisited_oxford_gives_its_toy_value():
    assert paper_tables.trapezoid_average_precision(TOY).mean == pytest.approx(0.6244, abs=5e-5)


def test_ranks_are_those_of_a_sorted_list():
    query, gallery = scores_as_vectors([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    ranks = gu.rank_relevant(query, gallery, [[0, 2, 5, 7]])
    np.testing.assert_array_equal(ranks, TOY)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 6), st.sampled_from([1, 3]))
def test_average_precision_equals_scikit_learn_also_with_ties(seed, n, classes, decimals):
    rng = np.random.default_rng(seed)
    grid = np.round(rng.uniform(0, 1, (n, 2)) + 0.05, decimals).astype(np.float32)  # a coarse grid makes ties
    labels = rng.integers(0, classes, n)
    x = gu.unit_rows(grid)
    ranks = gu.rank_relevant(x, x, gu.same_label(labels, labels))
    # Another product may differ in the last bit and split a tie: scikit-learn sees the very same scores.
    with threadpool_limits(1, user_api="blas"):
        scores = x[:256] @ x.T
    expected = [average_precision_score(labels == labels[i], scores[i]) for i in range(n)]
    np.testing.assert_allclose(gu.mean_average_precision(ranks).per_query, expected, atol=1e-9)


def test_a_relevant_image_that_is_listed_twice_counts_once():
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng, 3, 8), unit(rng, 20, 8)
    once, twice = [[1, 5], [2], []], [[5, 1, 5], [2, 2], []]
    assert np.array_equal(gu.rank_relevant(queries, gallery, once), gu.rank_relevant(queries, gallery, twice))


def test_a_constant_encoder_wins_nothing():
    x = np.ones((4, 3), dtype=np.float32)
    relevant, own = [[1]] * 4, None
    group = gu.rank_relevant(x, x, relevant, own)
    assert gu.mean_average_precision(group).mean == 0.25 == average_precision_score([0, 1, 0, 0], [1, 1, 1, 1])
    assert gu.recall_at_k(group, 1).mean == 0
    optimistic = gu.mean_average_precision(gu.rank_relevant(x, x, relevant, ties="optimistic")).mean
    pessimistic = gu.mean_average_precision(gu.rank_relevant(x, x, relevant, ties="pessimistic")).mean
    assert (optimistic, pessimistic) == (1.0, 0.25)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_tie_rules_bound_every_order_of_ties(seed):
    rng = np.random.default_rng(seed)
    x = gu.unit_rows(rng.integers(1, 3, (12, 2)).astype(np.float32))
    labels = rng.integers(0, 3, 12)
    relevant = gu.same_label(labels, labels)
    low, high = (
        gu.mean_average_precision(gu.rank_relevant(x, x, relevant, ties=t)).per_query
        for t in ("pessimistic", "optimistic")
    )
    scores = x @ x.T
    for i in range(12):
        order = np.lexsort((rng.random(12), -scores[i]))
        hits = (labels[order] == labels[i]).astype(float)
        value = (hits.cumsum() / np.arange(1, 13) * hits).sum() / hits.sum()
        assert low[i] - 1e-9 <= value <= high[i] + 1e-9


def test_full_ranking_map_at_gpr1200s_size_equals_its_argsort_definition_with_the_query_included():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(1200), 10)
    x = gu.unit_rows(unit(rng, 12000, 512) + 0.38 * unit(rng, 1200, 512)[labels])
    expected, places = [], np.arange(1, 12001)
    for start in range(0, 12000, 1000):
        order = np.argsort(-(x[start : start + 1000] @ x.T), axis=1)
        hits = (labels[order] == labels[start : start + 1000, None]).astype(np.float32)
        expected.append((hits.cumsum(1) / places * hits).sum(1) / 10)
    ours = gu.mean_average_precision(gu.rank_relevant(x, x, gu.same_label(labels, labels)))
    assert 0.3 < ours.mean < 0.7
    assert ours.mean == pytest.approx(np.concatenate(expected).mean(), abs=1e-5)


def test_leave_one_out_equals_pytorch_metric_learning():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 30, 400)
    x = gu.unit_rows(unit(rng, 400, 16) + 0.7 * unit(rng, 30, 16)[labels])
    calculator = AccuracyCalculator(
        include=("mean_average_precision", "precision_at_1"), k=None, device=torch.device("cpu")
    )
    theirs = calculator.get_accuracy(torch.from_numpy(x), torch.from_numpy(labels))
    ranks = gu.rank_relevant(x, x, gu.same_label(labels, labels), leave_out=np.arange(400)[:, None])
    assert gu.mean_average_precision(ranks).mean == pytest.approx(theirs["mean_average_precision"], abs=1e-5)
    assert gu.recall_at_k(ranks, 1).mean == pytest.approx(theirs["precision_at_1"], abs=1e-9)


def test_the_query_is_left_out_by_identity_even_among_exact_duplicates():
    x = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)
    labels = np.array([0, 1, 0, 1])
    ranks = gu.rank_relevant(x, x, gu.same_label(labels, labels), leave_out=np.arange(4)[:, None])
    # Query 0 finds image 2 tied with its duplicate of another class; query 1 finds image 3 behind both.
    np.testing.assert_array_equal(ranks[:, 0], [2, 3, 2, 3])


def test_minus_one_leaves_nothing_out():
    x = unit(np.random.default_rng(0), 5, 3)
    kept = gu.rank_relevant(x, x, [[4]] * 5, leave_out=[[-1]] * 5)
    np.testing.assert_array_equal(kept, gu.rank_relevant(x, x, [[4]] * 5))


def test_masks_and_row_numbers_say_the_same():
    x, labels = unit(np.random.default_rng(0), 12, 4), np.arange(12) % 3
    same = labels[:, None] == labels
    rows = gu.rank_relevant(x, x, gu.same_label(labels, labels), leave_out=np.arange(12)[:, None])
    np.testing.assert_array_equal(gu.rank_relevant(x, x, same, leave_out=np.eye(12, dtype=bool)), rows)
    np.testing.assert_array_equal(gu.rank_relevant(x, x, list(same), leave_out=[[i, -1] for i in range(12)]), rows)
    some = gu.rank_relevant(x, x, [[]] * 11 + [[3]])
    np.testing.assert_array_equal(np.isnan(gu.recall_at_k(some).per_query), np.arange(12) < 11)


def test_nothing_to_find_is_an_error_and_no_score_of_nan():
    """One image per class, labels that are not there: README's own ten lines on such a folder."""
    x = unit(np.random.default_rng(0), 5, 4)
    alone = gu.same_label(np.arange(5), np.arange(5))
    with pytest.raises(ValueError, match="no query has anything to find: a class needs two images or more"):
        gu.rank_relevant(x, x, alone, leave_out=np.arange(5)[:, None])
    with pytest.raises(ValueError, match="has no labels: put each class into a folder of its own"):
        gu.same_label(None, None)


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ([2, -1], "the relevant rows of query 0 hold -1, which is no row of 5; leave out what is not there"),
        ([5], "hold 5, which is no row of 5"),
        ([1.0, 2.7], "must be row numbers, or a mask of 5 entries, not float64"),
        ([True, False], r"must be row numbers, or a mask of 5 entries, not bool \(2,\)"),
        ([0, 1, 0, 0, 1], "5 zeros and ones seem to be a mask; give it as booleans"),
        (["cat"], "must be row numbers"),
        (3, "must be row numbers"),
    ],
)
def test_what_is_no_row_of_the_gallery_is_refused(relevant, message):
    x = unit(np.random.default_rng(0), 5, 3)
    with pytest.raises(ValueError, match=message):
        gu.rank_relevant(x[:1], x, [relevant])
    five = gu.ImageSet("five", np.zeros((5, 4, 4, 3), np.uint8))
    if "seem to be a mask" in message:
        assert len(five.subset(relevant)) == 5, "here rows may repeat"
        return
    with pytest.raises(ValueError, match=message.partition("the relevant rows of query 0 ")[2] or message):
        five.subset(relevant)


def test_what_is_no_row_is_refused_wherever_rows_are_given():
    x = unit(np.random.default_rng(0), 5, 3)
    for wrong in ([[7]], [[0.5]], [[-2]]):
        with pytest.raises(ValueError, match="the rows that query 0 leaves out"):
            gu.rank_relevant(x[:1], x, [[1]], leave_out=wrong)
    for wrong in (np.array([5] * 5), np.array([-2] * 5), np.arange(5.0)):
        with pytest.raises(ValueError, match="own needs one row of the gallery"):
            gu.search(x, x, 2, own=wrong)
    for right in ([-1] * 5, [0] * 5, np.arange(5)):
        assert gu.search(x, x, 2, own=right)[1].shape == (5, 2)
    images = gu.ImageSet("five", np.zeros((5, 4, 4, 3), np.uint8))
    shown = gu.show_neighbors(["a query"], images, np.array([[0, -1, -1]]), np.array([[0.5, 0, 0]], np.float32))
    assert shown.data == gu.show_neighbors(["a query"], images, np.array([[0]]), np.array([[0.5]], np.float32)).data


def test_a_query_without_anything_to_find_does_not_count():
    x = unit(np.random.default_rng(0), 3, 4)
    labels = np.array([0, 0, 1])
    ranks = gu.rank_relevant(x, x, gu.same_label(labels, labels), leave_out=np.arange(3)[:, None])
    score = gu.mean_average_precision(ranks)
    assert np.isnan(score.per_query[2]) and np.isfinite(score.mean)


def test_precision_at_5_looks_no_further_than_there_is_something_to_find():
    nothing = [np.inf] * 4
    ranks = np.array([[1, 2, 9, *nothing[:3]], [1, 2, 3, 4, 5, 6], [1, 4, *nothing], [4, 5, *nothing]])
    np.testing.assert_allclose(gu.mean_precision_at_5(ranks).per_query, [2 / 3, 1, 1 / 2, 0])


def test_revisited_protocols_ignore_what_they_should():
    query, gallery = scores_as_vectors([0.95, 0.9, 0.85, 0.8, 0.7])
    truth = [{"easy": [1], "hard": [3], "junk": [0]}]
    scores = {
        name: paper_tables.score_revisited(query, gallery, truth, name).mean for name in ("easy", "medium", "hard")
    }
    assert scores["easy"] == 1.0  # ranks after junk and hard are gone: image 1 is first
    assert scores["hard"] == pytest.approx((0 + 1 / 2) / 2)  # after junk and easy are gone: rank 2
    assert scores["medium"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)  # ranks 1 and 3


def test_revisited_map_follows_the_reference_loop():
    def reference(ranks, number):  # 0-based ranks, precision before and at each of them
        total = 0.0
        for j, rank in enumerate(ranks):
            before = 1.0 if rank == 0 else j / rank
            total += (before + (j + 1) / (rank + 1)) / (2 * number)
        return total

    rng = np.random.default_rng(0)
    gallery, queries = unit(rng, 200, 8), unit(rng, 20, 8)
    parts = [np.split(rng.permutation(200)[:60], [15, 35]) for _ in queries]
    truth = [{"easy": a, "hard": b, "junk": c} for a, b, c in parts]
    ours = paper_tables.score_revisited(queries, gallery, truth).per_query
    for i, (easy, hard, junk) in enumerate(parts):
        order = [j for j in np.argsort(-(gallery @ queries[i])) if j not in set(junk)]
        ranks = [r for r, j in enumerate(order) if j in set(easy) | set(hard)]
        assert ours[i] == pytest.approx(reference(ranks, 35), abs=1e-6)


def test_a_revisited_query_without_positives_is_skipped():
    query, gallery = scores_as_vectors([0.9, 0.8])
    truth = [{"easy": [0], "hard": [], "junk": []}, {"easy": [0], "hard": [1], "junk": []}]
    query = np.concatenate([query, query])
    hard = paper_tables.score_revisited(query, gallery, truth, "hard")
    assert np.isnan(hard.per_query[0]) and hard.mean == 1
    assert paper_tables.score_revisited(query, gallery, truth, "easy").mean == 1


@pytest.mark.parametrize("temperature", [0.1, 0.07])
def test_knn_accuracy_is_scikit_learns_vote_with_the_same_weights(temperature):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 5, 300)
    x = gu.unit_rows(unit(rng, 300, 8) + 0.5 * unit(rng, 5, 8)[labels])
    train, test = slice(0, 200), slice(200, 300)
    oracle = KNeighborsClassifier(
        21, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    oracle.fit(x[train], labels[train])
    ours = gu.knn_accuracy(x[test], labels[test], x[train], labels[train], 21, temperature)
    assert ours.mean == pytest.approx(oracle.score(x[test], labels[test]))
    assert 0.2 < ours.mean < 1  # the case tells right from wrong


def test_text_to_image_recall_counts_any_of_several_relevant_images():
    query, gallery = scores_as_vectors([0.9, 0.8, 0.7])
    recalls = [gu.text_to_image_recall(query, gallery, [[1, 2]], k).mean for k in (1, 2, 3)]
    assert recalls == [0, 1, 1]


def test_negative_scores_count_like_any_others():
    query, gallery = scores_as_vectors([-0.1, -0.2, -0.3, -0.4])
    ranks = gu.rank_relevant(query, gallery, [[0, 3]])
    assert gu.mean_average_precision(ranks).mean == pytest.approx((1 + 2 / 4) / 2)


def test_hubness_is_the_skewness_of_how_often_rows_are_found():
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng, 300, 64), unit(rng, 100, 64)
    value, counts = gu.hubness(queries, gallery, k=5)
    assert counts.sum() == 1500
    assert value == pytest.approx(skew(counts))
    hub = gallery.copy()
    hub[0] = gu.unit_rows(queries.mean(0, keepdims=True))[0]
    assert gu.hubness(queries, hub, k=5)[1][0] > counts[0]


def test_an_interval_over_clusters_is_wider_when_queries_of_a_class_succeed_together():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 10)
    score = gu.Score(np.repeat(rng.random(50) < 0.5, 10).astype(float))
    low, high = score.interval()
    cluster_low, cluster_high = score.interval(labels)
    assert low < score.mean < high
    assert cluster_high - cluster_low > 2 * (high - low)


def test_a_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = gu.Score((rng.random(100) < 0.3).astype(float)).interval(resamples=300, seed=trial)
        covered += low <= 0.3 <= high
    assert 175 <= covered <= 198


def test_scores_that_cannot_be_computed_say_why():
    x = unit(np.random.default_rng(0), 4, 3)
    with pytest.raises(ValueError, match="3 dimensions, the gallery 2"):
        gu.rank_relevant(x, x[:, :2], [[0]] * 4)
    with pytest.raises(ValueError, match="4 queries need as many lists"):
        gu.rank_relevant(x, x, [[0]] * 3)
    with pytest.raises(ValueError, match="optimistic"):
        gu.rank_relevant(x, x, [[0]] * 4, ties="lucky")
    with pytest.raises(ValueError, match="min or hits"):
        gu.mean_average_precision(TOY, 3, "all")
    broken = x.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 holds NaN"):
        gu.rank_relevant(broken, x, [[0]] * 4)


@pytest.mark.parametrize("text", ["$5 & 10% more than $4", "$x^2$", r"a_{b} \\frac $ and $", "costs $"])
def test_dollar_signs_in_a_text_are_no_formula(text, tmp_path):
    images = gu.ImageSet("two", np.zeros((2, 4, 4, 3), np.uint8))
    drawn = gu.show_images([[images[0]]], [[text]], labels=[text])
    assert drawn.data != gu.show_images([[images[0]]], [[text.replace("$", "")]], labels=[text.replace("$", "")]).data
    gu.show_neighbors([text], images, np.array([[0, 1]]))
    with matplotlib.rc_context(gu.STYLE):  # as `setup` leaves it for every figure of a notebook
        figure, axis = plt.subplots()
        axis.set(title=text, xlabel=text, xticks=[0], xticklabels=[text])
        axis.plot([0], label=text)
        axis.legend()
        gu.as_jpeg(figure)


@pytest.mark.parametrize("copies", [2, 6, 7, 15, 33, 100])
def test_equal_rows_of_the_gallery_tie_wherever_they_stand(copies):
    """A product's last columns may be summed in another order than the others, which would break a tie by its place."""
    rng = np.random.default_rng(copies)
    queries, row = unit(rng, 5, 128), unit(rng, 1, 128)
    gallery = np.concatenate([unit(rng, 3, 128), np.repeat(row, copies, axis=0)])
    ranks = gu.rank_relevant(queries, gallery, [np.arange(3, 3 + copies)] * len(queries))
    assert (ranks == ranks[:, :1]).all(), "all at the end of their group"
