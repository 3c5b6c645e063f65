"""Scores of what other programs computed (notebook 02), and the papers' tables (notebook 07)."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import test_datasets as in_small
import timm
import torch
from conftest import FOLDER, execute, run_here, text_of
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torchvision import transforms

import gpnns_utils as gu
from gpnns import benchmark, paper_tables, published_tables
from gpnns.encoders import checkpoints, heads, licences
from gpnns.images import datasets
from gpnns.images import image_set as image_set_module

REAL_CACHE = gu.cache_folder()
data = in_small.data  # the fixture: an empty folder of data sets, and no network

# --- notebook 02: vectors and rankings of other programs ---


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
def test_a_full_ranking_scores_as_the_vectors_it_came_from(leave_out_query, lists_hold_the_query):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(6), 5)
    vectors = gu.unit_rows(rng.normal(size=(30, 8)).astype(np.float32) + 2 * np.eye(8)[labels])
    lists = nearest_first(vectors)
    if not lists_hold_the_query:
        lists = np.array([row[row != query] for query, row in enumerate(lists)])
    ranks = benchmark.rank_in_lists(lists, gu.same_label(labels, labels), leave_out_query)
    expected = oracle(vectors, labels, leave_out_query)
    assert gu.mean_average_precision(ranks).mean == pytest.approx(expected, abs=1e-5)


def test_what_a_short_list_leaves_out_was_not_found_and_minus_one_is_nobody():
    lists, relevant = np.array([[0, 1, -1], [1, 2, -1], [2, 1, 0], [3, 2, 1]]), [np.array([0, 1, 3])] * 4
    ranks = benchmark.rank_in_lists(lists, relevant, leave_out_query=True)
    score = gu.mean_average_precision(ranks).per_query
    assert score[0] == pytest.approx(1 / 2), "one of two found, at rank 1"
    assert score[1] == pytest.approx(0, abs=1e-6) and score[3] == pytest.approx((1 / 2) / 2)
    assert gu.recall_at_k(ranks, 3).per_query.tolist() == [1, 0, 1, 1]


def test_rows_are_checked_against_names_that_lie_beside_them(photos, tmp_path):
    file = saved(tmp_path / "vectors.npy", np.eye(12))
    names = [f"{path.parent.name}/{path.name}" for path in photos.images]
    (tmp_path / "vectors.txt").write_text("\n".join(names) + "\n")
    assert benchmark.load_rows(file, photos).shape == (12, 12)
    (tmp_path / "vectors.txt").write_text("\n".join(names[:2] + names[:1:-1]))
    with pytest.raises(ValueError, match=r"vectors.txt, line 3 says 'red/3.png', but image 2 is .*blue/2.png"):
        benchmark.load_rows(file, photos)
    (tmp_path / "vectors.txt").write_text("\n".join(names[:4]))
    with pytest.raises(ValueError, match="line 5 says 'nothing'"):
        benchmark.load_rows(file, photos)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((11, 3)), r"holds an array \(11, 3\); it needs a row for each of 12 images"),
        (np.ones(12), r"holds an array \(12,\)"),
        (np.ones((12, 0)), r"holds an array \(12, 0\)"),
        (np.array([{}] * 12), "cannot be read as an array .* numbers only"),
    ],
)
def test_a_file_that_cannot_hold_rows_of_these_images_is_refused(photos, tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        benchmark.load_rows(saved(tmp_path / "rows.npy", array), photos)


def test_a_file_that_is_not_there_is_said_with_the_kind_it_should_be(photos):
    with pytest.raises(ValueError, match="nowhere.npy cannot be read .*No such file.* that numpy.save wrote"):
        benchmark.load_rows("nowhere.npy", photos)


def test_vectors_with_nan_are_refused_with_file_and_row(photos, tmp_path):
    file = saved(tmp_path / "broken.npy", np.where(np.arange(12)[:, None] == 4, np.nan, np.ones((12, 3))))
    with pytest.raises(ValueError, match="broken.npy: row 4 holds NaN"):
        benchmark.load_vectors(file, photos)


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
def test_lists_that_cannot_be_right_are_refused(photos, tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        benchmark.load_neighbours(saved(tmp_path / "lists.npy", lists), photos)


def test_lists_with_or_without_the_query_and_of_any_whole_numbers_are_taken(photos, tmp_path):
    for lists in (CIRCLE, CIRCLE[:, 1:], CIRCLE.astype(np.uint16), np.where(CIRCLE[:, -1:] == CIRCLE, -1, CIRCLE)):
        taken = benchmark.load_neighbours(saved(tmp_path / "lists.npy", lists), photos)
        assert list(taken) == ["file:lists"] and taken["file:lists"].tolist() == lists.tolist()


def test_no_file_means_that_nothing_of_another_program_takes_part(photos):
    assert benchmark.load_vectors("", photos) == benchmark.load_neighbours("", photos) == {}


def test_notebook_02_scores_the_files_of_another_program_like_its_own_encoder(folder, photos, tmp_path, results, cache):
    profile, out = results
    vectors = gu.embed_images(gu.load_encoder("pixels"), photos)[0]
    mine = {"profile": profile, "images": str(folder), "encoders": "pixels"}
    mine["embeddings"] = saved(tmp_path / "theirs.npy", 3 * vectors.astype(np.float16))
    mine["indices"] = saved(tmp_path / "ranked.npy", nearest_first(vectors))
    run_here("02", mine)
    rows = json.loads((out / "02_benchmark_encoders.json").read_text())["rows"]
    for metric in ("mAP", "mAP (self included)"):
        values = {r["model"]: r["value"] for r in rows if r["metric"] == metric and r["group"] == "all"}
        for model in ("file:theirs", "file:ranked"):
            assert values[model] == pytest.approx(values["pixels"], abs=0.1), (model, metric)


# --- notebook 02: new things and known ones, several encoders ---


def known_of(source):
    images = benchmark.load_labelled(source)
    return images, benchmark.load_known(source, images)


def test_new_pictures_of_the_drawn_world_ask_the_training_pictures_of_the_same_things(capsys):
    _, known = known_of("mini")
    asks = known.groups == "query"
    assert asks.sum() == 600 and set(known.groups) == {"query", "gallery"}
    assert set(known.labels[asks]) == set(known.labels[~asks]) and len(set(known.labels)) == 120
    train = gu.load_images("mini", "train")
    things = {known.names[label] for label in known.labels}
    assert things == {name for name in train.names if int(name.split()[1]) < 20}
    digests = known.subset(asks).digests()
    assert not set(digests) & set(known.subset(~asks).digests()), "pictures that were never trained on"
    assert "600 queries, 1,068 images in the gallery: new pictures of things" in capsys.readouterr().out


def test_half_of_each_class_asks_the_other_where_nothing_tells_queries_from_gallery(folder):
    images, known = known_of(folder)
    asks = known.groups == "query"
    assert np.bincount(known.labels[asks]).tolist() == np.bincount(known.labels[~asks]).tolist() == [2, 2, 2]
    assert known.images == images.images and images.groups is None, "the images themselves stay as they are"


def test_files_that_were_left_out_of_queries_or_gallery_stay_named(folder):
    one, other = gu.load_images(folder).subset(np.arange(4)), gu.load_images(folder).subset(np.arange(4, 12))
    one.left_out, other.left_out = ["a.png"], ["b.png"]
    assert image_set_module.concat([one, other], groups=["query", "gallery"]).left_out == ["a.png", "b.png"]


def test_hubness_is_noted_under_the_encoder_whose_texts_asked(folder, results, cache):
    profile, out = results
    run_here("02", {"profile": profile, "images": str(folder), "encoders": "mini, pixels"})
    rows = json.loads((out / "02_benchmark_encoders.json").read_text())["rows"]
    noted = {row["task"]: row["model"] for row in rows if row["metric"] == "hubness skewness"}
    assert noted == {"image_to_image": "pixels", "text_to_image": "mini"}


def test_a_class_of_one_image_is_in_the_gallery_alone():
    assert benchmark.split_halves(np.array([0, 1, 1, 1, 0, 2]), seed=0)[5] == "gallery"
    assert (benchmark.split_halves(np.arange(5), seed=0) == "gallery").all()


@pytest.mark.parametrize("parts", [("query", "gallery"), ("test", "train")])
def test_a_folder_s_own_queries_and_gallery_are_taken(folder, tmp_path, parts):
    for i, part in enumerate(parts):
        for path in sorted(folder.rglob("*.png")):
            if (int(path.stem) == 3) != bool(i):
                (tmp_path / "own" / part / path.parent.name).mkdir(parents=True, exist_ok=True)
                (tmp_path / "own" / part / path.parent.name / path.name).write_bytes(path.read_bytes())
    images = gu.load_images(tmp_path / "own", parts[0])
    known = benchmark.load_known(tmp_path / "own", images)
    assert [path.stem for path, group in zip(known.images, known.groups, strict=True) if group == "query"] == ["3"] * 3
    assert (known.groups == "gallery").sum() == 9 and [known.names[i] for i in range(3)] == ["blue", "green", "red"]


def test_a_query_that_is_in_the_gallery_too_is_refused_with_its_name(folder, tmp_path):
    for part in ("query", "gallery"):
        for path in sorted(folder.rglob("*.png")):
            (tmp_path / "own" / part / path.parent.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "own" / part / path.parent.name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="12 of 12 images .* are also in .*: each would find itself"):
        known_of(tmp_path / "own")


def test_two_encoders_of_one_short_name_are_refused_before_one_hides_the_other(folder, tmp_path):
    files = [tmp_path / place / "epoch_3.safetensors" for place in "ab"]
    for file in files:
        file.parent.mkdir()
        checkpoints.save_checkpoint(gu.load_encoder("mini"), file)
    with pytest.raises(ValueError, match="are called mini@epoch_3: rename a file"):
        benchmark.embed_each([f"mini@{file}" for file in files], gu.load_images(folder))


def test_encoders_without_words_sit_questions_in_words_out(folder):
    assert benchmark.select_text_encoders(["pixels", "mini", "efficientnet_lite0:32"]) == ["mini"]
    assert benchmark.embed_texts_each([], ["a red square"]) == {}


# --- notebook 07: a column is data, a task is a function ---


@pytest.fixture(scope="module")
def mini():
    return gu.load_encoder("mini", device="cpu")


def planted(count, classes, seed=0, dim=16):
    """Labels, and vectors that find their class more or less."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, count))
    vectors = rng.normal(size=(count, dim)) + 1.5 * np.eye(dim)[labels % dim]
    return labels, gu.unit_rows(vectors.astype(np.float32))


def image_set(labels, captions=None, names=()):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    return gu.ImageSet("planted", images, labels=labels, captions=captions, names=list(names))


@pytest.mark.parametrize(("table", "published"), [("gpnns", "gpnns_table4"), ("mcip", "mcip_table1")])
def test_the_columns_are_those_of_the_published_table_in_its_order(table, published):
    columns = paper_tables.load_columns(table)
    printed = [
        key
        for key in published_tables.load_published(published)[0]
        if key.split("_")[-1] in ("map", "r1", "knn", "zs", "r5")
    ]
    assert [column[0] for column in columns] == printed
    for name, source, gallery, task, metric in columns:
        for part in filter(None, (source, gallery)):
            data_set, split = part.split(":")
            assert split in datasets.TABLE[data_set]["splits"], part
        expected = {
            "map": ("image_to_image", "revisited"),
            "r1": ("image_to_image",),
            "knn": ("knn",),
            "zs": ("zero_shot",),
            "r5": ("text_to_image",),
        }
        assert task in expected[name.split("_")[-1]] and metric


def test_the_query_takes_part_exactly_where_the_papers_let_it():
    columns = {c[0]: c for c in paper_tables.load_columns("gpnns") + paper_tables.load_columns("mcip")}
    included = {name for name, column in columns.items() if column.metric == "mAP (self included)"}
    assert included == {"instre_map", "gpr1200_map", "adience_map"}
    assert columns["roxford_map"][1:3] == ("roxford:query_full", "roxford:gallery"), "GP-NNS asks with whole pictures"
    bases = {name: c[2] for name, c in columns.items() if c[3] == "knn"}
    own = {"flowers_knn": "flowers:train", "aircraft_knn": "aircraft:train", "fgvca_knn": "aircraft:train"}
    assert bases == {name: own.get(name, "imagenet:train") for name in bases} and len(bases) == 8


@pytest.mark.parametrize("metric", ["mAP", "mAP (self included)", "R@1"])
def test_image_to_image_agrees_with_scikit_learn(mini, metric):
    labels, vectors = planted(60, 8)
    column = paper_tables.Column("x", "s:test", "", "image_to_image", metric)
    kept = {(id(mini), "s:test"): (vectors, image_set(labels))}
    score, units = paper_tables.TASKS["image_to_image", metric](mini, column, {}, kept)
    scores = vectors @ vectors.T
    if metric == "R@1":
        np.fill_diagonal(scores, -1)
        expected = np.mean(labels[scores.argmax(axis=1)] == labels)
    else:
        expected = oracle(vectors, labels, leave_out_query="self" not in metric)
    assert score.mean == pytest.approx(expected, abs=1e-5) and units is labels


def test_a_twin_of_the_query_counts_as_a_neighbour_and_not_as_the_query(mini):
    labels, vectors = np.array([0, 1, 0, 1]), np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    kept = {(id(mini), "s:test"): (vectors, image_set(labels))}  # images 0 and 1 are one picture with two labels
    column = paper_tables.Column("x", "s:test", "", "image_to_image", "R@1")
    score, _ = paper_tables.TASKS["image_to_image", "R@1"](mini, column, {}, kept)
    assert score.per_query[:2].tolist() == [0, 0], "dropping the first neighbour blindly would count these as found"


@pytest.mark.parametrize("with_gallery", [True, False])
def test_the_vote_is_that_of_scikit_learn_with_21_neighbours_and_weights_of_a_tenth(mini, with_gallery):
    labels, vectors = planted(90, 5)
    known_labels, known = planted(120, 7, seed=1)
    column = paper_tables.Column("x", "q:test", "q:train" if with_gallery else "", "knn", "accuracy")
    kept = {(id(mini), "q:test"): (vectors, image_set(labels))}
    kept[id(mini), "q:train"] = known, image_set(known_labels)
    score, units = paper_tables.score_knn(mini, column, {}, kept)
    asks = np.full(90, True)
    if not with_gallery:
        for label in np.unique(labels):
            asks[np.flatnonzero(labels == label)[::2]] = False
        known_labels, known = labels[~asks], vectors[~asks]

    def weights(distances):  # of unit vectors: cos = 1 - d^2 / 2
        return np.exp((1 - np.asarray(distances) ** 2 / 2) / 0.1)

    vote = KNeighborsClassifier(21, weights=weights, algorithm="brute").fit(known, known_labels)
    expected = vote.predict(vectors[asks]) == labels[asks]
    assert score.per_query.tolist() == expected.tolist() and units.tolist() == labels[asks].tolist()


def test_oxford_is_measured_by_its_ground_truth_under_medium_and_refuses_a_gap(mini, monkeypatch):
    rng = np.random.default_rng(0)
    queries, gallery = (gu.unit_rows(rng.normal(size=(n, 8)).astype(np.float32)) for n in (3, 40))
    truth = [
        {k: np.arange(10 * q + 3 * i, 10 * q + 3 * i + 3) for i, k in enumerate(("easy", "hard", "junk"))}
        for q in range(3)
    ]
    monkeypatch.setattr(datasets, "load_ground_truth", {"roxford": truth}.__getitem__)
    column = paper_tables.load_columns("gpnns")[2]
    kept = {(id(mini), column.images): (queries, image_set(np.zeros(3, int)))}
    kept[id(mini), column.gallery] = gallery, image_set(np.zeros(40, int))
    score, _ = paper_tables.measure_revisited(mini, column, {}, kept)
    np.testing.assert_array_equal(score.per_query, paper_tables.score_revisited(queries, gallery, truth).per_query)
    kept[id(mini), column.gallery][1].left_out.append("broken.jpg")
    with pytest.raises(ValueError, match="counts images by row; broken.jpg cannot be read"):
        paper_tables.measure_revisited(mini, column, {}, kept)


def test_zero_shot_chooses_among_the_classes_that_occur_with_the_mean_of_eighty_prompts(mini):
    names = ["a red flower", "a vase", "a face", "a house"]
    labels, vectors = np.array([1, 1, 3]), gu.embed_texts(mini, ["a vase", "a photo of a face", "a house"], cache=False)
    column = paper_tables.Column("x", "s:test", "", "zero_shot", "accuracy (80 templates)")
    images = image_set(labels, names=names)
    kept = {(id(mini), "s:test"): (vectors, images)}
    score, _ = paper_tables.TASKS[column.task, column.metric](mini, column, {}, kept)
    prompts = [[template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in ("a vase", "a house")]
    means = [gu.embed_texts(mini, texts, cache=False).mean(axis=0) for texts in prompts]
    nearest = (vectors @ gu.unit_rows(np.array(means)).T).argmax(axis=1)
    assert score.per_query.tolist() == (np.array([0, 0, 1]) == nearest).tolist()
    assert paper_tables.list_class_names(images)[0] == ["a vase", "a house"], "classes without an image are no choice"


def test_each_caption_of_coco_has_one_right_image_and_of_the_drawn_world_any_that_carries_it(mini):
    captions = [["a vase", "a red vase"], ["a vase"], ["a face"]] + [["a house"]] * 6
    texts = ["a vase", "a red vase", "a face", "a house"]
    as_vector = dict(zip(texts, gu.embed_texts(mini, texts), strict=True))
    vectors = np.array([as_vector[own[0]] for own in captions])
    vectors[1] = -as_vector["a vase"]  # the second vase is far from its caption
    kept = {(id(mini), "s:test"): (vectors, image_set(np.arange(9), captions))}
    column = paper_tables.Column("x", "s:test", "", "text_to_image", "R@5 (own image)")
    score, units = paper_tables.TASKS[column.task, column.metric](mini, column, {}, kept)
    assert units.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert score.per_query[:4].tolist() == [1, 1, 0, 1]
    score, _ = paper_tables.TASKS["text_to_image", "R@5"](mini, column, {}, kept)
    assert len(score.per_query) == 4 and score.mean == pytest.approx(0.75), (
        "six equal houses tie beyond the fifth place"
    )


# --- notebook 07: measured once, in spite of breaks ---


class Counted:
    """An encoder that finds colors, and counts what it is shown."""

    def __init__(self):
        self.pictures = 0

    def encoder(self):
        def tower(batch):
            self.pictures += len(batch) if len(batch) > 1 else 0  # probes come one by one
            return batch.mean((2, 3)) + 0.01

        prepare = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
        return gu.Encoder("counted", prepare, tower)


def colored(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), 5)
    images = np.clip(40 * labels[:, None, None, None] + rng.integers(0, 60, (20, 8, 8, 3)), 0, 255).astype(np.uint8)
    return gu.ImageSet("colored", images, labels=labels)


COLUMNS = [
    paper_tables.Column("first", "a:test", "", "image_to_image", "mAP"),
    paper_tables.Column("second", "b:test", "a:test", "knn", "accuracy"),
    paper_tables.Column("third", "a:test", "", "knn", "accuracy"),
]


@pytest.fixture
def bench(cache, tmp_path, monkeypatch):
    """A table of three columns over two drawn sets: run(names) -> its cells, with an encoder that counts."""
    there, counted, loads = {"a": colored(0), "b": colored(1)}, Counted(), []

    def load(name, split):
        loads.append(f"{name}:{split}")
        if name not in there:
            raise FileNotFoundError(f"{name} was not found; get it from its home page")
        return there[name].subset(np.arange(len(there[name])))

    monkeypatch.setattr(gu, "load_images", load)
    monkeypatch.setattr(gu, "load_encoder", lambda name: counted.encoder())

    def run(names=("counted",), columns=COLUMNS, protocol="own"):
        sets, notes = paper_tables.load_sets(columns)
        return paper_tables.measure_table(list(names), columns, sets, notes, protocol, tmp_path / "cells")

    return SimpleNamespace(run=run, there=there, counted=counted, loads=loads, cells=tmp_path / "cells")


def test_every_set_is_loaded_once_and_every_image_embedded_once_for_all_columns(bench):
    cells = bench.run()
    assert all("row" in cell for cell in cells.values()) and len(cells) == 3
    assert sorted(bench.loads) == ["a:test", "b:test"]
    assert bench.counted.pictures == 40
    bench.run(columns=[*COLUMNS, paper_tables.Column("fourth", "b:test", "", "image_to_image", "R@1")])
    assert bench.counted.pictures == 40


def test_a_killed_run_goes_on_with_the_column_it_died_in(bench, monkeypatch):
    measured = []
    honest = paper_tables.score_cell

    def score(encoder, column, sets, kept):
        if len(measured) == 1 and column[0] == "second":
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(column[0])
        return honest(encoder, column, sets, kept)

    monkeypatch.setitem(paper_tables.measure_table.__globals__, "score_cell", score)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert len(list(bench.cells.glob("*.json"))) == 1, "the first column is on disk"
    resumed = bench.run()
    assert measured == ["first", "killed", "second", "third"]
    assert bench.run() == resumed and len(measured) == 4, "now all come from their files"


def test_other_images_or_other_weights_are_measured_anew(bench):
    before = bench.run()
    bench.there["b"] = colored(2)
    after = bench.run()
    assert after["counted", "second"]["data"] != before["counted", "second"]["data"]
    assert after["counted", "first"] == before["counted", "first"]
    files = {
        paper_tables.name_cell_file(gu.Encoder("e", *parts), COLUMNS[0], bench.cells) for parts in different_encoders()
    }
    assert len(files) == 3


def different_encoders():
    small, large = (transforms.Compose([transforms.Resize((n, n)), transforms.ToTensor()]) for n in (4, 8))
    yield small, lambda batch: batch.mean((2, 3))
    yield large, lambda batch: batch.mean((2, 3))
    yield large, lambda batch: batch.mean((2, 3)) * torch.tensor([1.0, 2, 3])


def test_a_data_set_that_is_nowhere_leaves_its_cells_blank_with_the_loaders_words(bench):
    del bench.there["b"]
    cells = bench.run()
    assert cells["counted", "second"] == {"why": "b was not found; get it from its home page"}
    assert "row" in cells["counted", "first"] and "row" in cells["counted", "third"]
    values = [cell.get("row", {}).get("value") for cell in cells.values()]
    assert paper_tables.average_columns(values).endswith("over 2 of 3")


def test_what_was_measured_stays_when_its_data_are_gone(bench):
    before = bench.run()
    del bench.there["b"]
    assert bench.run() == before


def test_an_encoder_without_text_leaves_text_columns_blank(bench):
    cells = bench.run(columns=[paper_tables.Column("words", "a:test", "", "zero_shot", "accuracy")])
    assert cells["counted", "words"] == {"why": "counted has no text tower"}


def test_weights_that_cannot_be_had_leave_a_row_blank_and_a_mistyped_file_stops(bench, monkeypatch):
    def load(name):
        if name == "counted":
            return bench.counted.encoder()
        errors = {"far": OSError("check the network"), "typo": FileNotFoundError("no checkpoint at x")}
        raise errors.get(name, ValueError("unknown encoder"))

    monkeypatch.setattr(gu, "load_encoder", load)
    cells = bench.run(["far", "counted"])
    assert {cells["far", column[0]]["why"] for column in COLUMNS} == {"check the network"}
    assert all("row" in cells["counted", column[0]] for column in COLUMNS)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        bench.run(["typo"])
    with pytest.raises(ValueError, match="unknown encoder"):
        bench.run(["nothing"])


def test_files_that_cannot_be_read_are_noted_in_the_cell(folder, mini, cache, tmp_path):
    (folder / "red" / "1.png").write_bytes(b"broken")
    sets = {"s:test": gu.load_images(folder)}
    notes, column = (
        {"s:test": paper_tables.digest_set(sets["s:test"])},
        paper_tables.Column("x", "s:test", "", "image_to_image", "mAP"),
    )
    with pytest.warns(UserWarning, match="1 of 12 images cannot be read"):
        cell = paper_tables.measure_cell(mini, column, sets, notes, tmp_path, {})
    assert "red/1.png" in cell["left out"][0]


def test_avg_is_a_number_only_over_all_columns():
    assert paper_tables.average_columns([50.0, 70.0, 0.0]) == pytest.approx(40)
    assert paper_tables.average_columns([50.0, None, 0.0]) == "25.0 over 2 of 3"
    assert paper_tables.average_columns([None, None]) == "over 0 of 2"


def test_every_published_cell_agrees_differs_or_was_not_run():
    large, small = "open_clip:ViT-L-14-336/openai", "open_clip:ViT-B-16/openai"
    ours = {large: {"gpr1200_map": 75.6, "cub_r1": 77.6, "sop_r1": None}, "mini": {"gpr1200_map": 76.0}}
    lines = {line["model"]: line for line in paper_tables.compare_table("gpnns", ours)}
    assert len(lines) == 8 and all(len(line) == 16 for line in lines.values())
    base = lines["CLIP ViT-L"]
    assert base["gpr1200_map"] == "76.0 ✓ 75.6" and base["cub_r1"] == "77.0 ✗ 77.6"
    assert base["sop_r1"] == "67.8 –" and lines["CLIP ViT-L, ArcMargin"]["cub_r1"] == "88.2 –"
    everything = {small: paper_tables.find_published_rows("gpnns")[small]}
    marks = {
        line["model"]: {str(cell).split()[1] for name, cell in line.items() if name != "model"}
        for line in paper_tables.compare_table("gpnns", everything)
    }
    assert marks.pop("CLIP ViT-B") == {"✓"} and set().union(*marks.values()) == {"–"}
    labels = [line["model"] for line in paper_tables.compare_table("mcip", {})]
    assert len(set(labels)) == 9 and labels[4] == "OpenAI ViT-L/14@336, mcip, realigned"


@pytest.mark.parametrize("table", ["gpnns", "mcip"])
def test_published_rows_are_those_before_fine_tuning_or_of_the_release(table):
    rows = paper_tables.find_published_rows(table)
    large = rows["open_clip:ViT-L-14-336/openai"]
    assert large["gpr1200_map"] == 76.0 and large["cub_r1"] == 77.0, "both papers print the same base"
    if table == "gpnns":
        assert rows["gpnns:ViT-L"]["avg"] == 77.3 and rows["timm:vit_base_patch16_224.augreg_in21k"]["avg"] == 54.7
    else:
        assert [row["avg"] for row in rows.values()] == [67.2, 70.5, 76.2]


# --- notebook 07: the papers' protocol for pictures and features ---


def test_the_papers_protocol_squeezes_crops_and_takes_features_before_the_projection(mini):
    paper = heads.embed_as_in_paper(mini)
    square, crop, _, norm = paper.preprocess.transforms
    assert square.size == (54, 54) and square.interpolation == transforms.InterpolationMode.BICUBIC
    assert crop.size == (48, 48) and norm.mean == mini.preprocess.transforms[-1].mean
    assert paper.fingerprint() != mini.fingerprint() and not paper.has_text and mini.has_text
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8))
    with torch.no_grad():
        before = paper.image_tower(paper.preprocess(picture)[None])
        joint = mini.image_tower(paper.preprocess(picture)[None])
        assert torch.allclose(before @ mini.model.visual.proj, joint, atol=1e-5)


def test_weights_of_openai_get_the_mean_of_imagenet_and_encoders_without_a_model_stay_as_they_are(mini):
    openai = replace(mini, origin={"encoder": "open_clip:ViT-B-16/openai"})
    assert heads.embed_as_in_paper(openai).preprocess.transforms[-1].mean == (0.485, 0.456, 0.406)
    pixels = gu.load_encoder("pixels")
    assert heads.embed_as_in_paper(pixels) is pixels


def test_one_embedding_serves_images_and_texts_of_an_encoder_with_weights_of_its_own(mini, folder, cache, tmp_path):
    """In a table with columns of both; without texts, and without weights of its own, images have the features before it."""
    one = heads.embed_as_in_paper(mini, one_embedding=True)
    assert one.has_text and one.dim == mini.dim
    openai = heads.embed_as_in_paper(replace(mini, origin={"encoder": "open_clip:ViT-B-16/openai"}), True)
    assert openai.preprocess.transforms[-1].mean == mini.preprocess.transforms[-1].mean, "one mean throughout"
    images, texts = (
        paper_tables.Column("i", "s:test", "", "image_to_image", "mAP"),
        paper_tables.Column("t", "s:test", "", "zero_shot", "accuracy"),
    )
    sets = {"s:test": gu.load_images(folder)}
    notes, own = {"s:test": paper_tables.digest_set(sets["s:test"])}, tmp_path / "own.safetensors"
    checkpoints.save_checkpoint(mini, own)
    values = {}
    for name in ("mini", f"mini@{own}"):
        for columns in ([images], [images, texts]):
            cells = paper_tables.measure_table([name], columns, sets, notes, "paper", tmp_path / "cells")
            values[name[:5], len(columns)] = cells[name, "i"]["row"]["value"]
    vectors = {
        f: gu.embed_images(heads.embed_as_in_paper(mini, f), sets["s:test"], cache=False)[0] for f in (True, False)
    }
    expected = {f: 100 * oracle(v, sets["s:test"].labels, leave_out_query=True) for f, v in vectors.items()}
    assert values["mini@", 2] == pytest.approx(expected[True], abs=0.01)
    for other in (("mini@", 1), ("mini", 1), ("mini", 2)):
        assert values[other] == pytest.approx(expected[False], abs=0.01), other


def test_a_checkpoint_with_a_head_keeps_its_features_and_does_not_stop_a_table(mini, folder, cache, tmp_path):
    for before in (False, True):
        with_head = heads.add_head(gu.load_encoder("mini", "cpu"), 16, before)
        checkpoints.save_checkpoint(with_head, tmp_path / f"{before}.safetensors", before_projection=before)
    sets = {"s:test": gu.load_images(folder)}
    notes, columns = (
        {"s:test": paper_tables.digest_set(sets["s:test"])},
        [paper_tables.Column("i", "s:test", "", "image_to_image", "mAP")],
    )
    names = [f"mini@{tmp_path}/{before}.safetensors" for before in (False, True)]
    cells = paper_tables.measure_table(names, columns, sets, notes, "paper", tmp_path / "cells")
    assert all("row" in cells[name, "i"] for name in names)
    assert heads.embed_as_in_paper(gu.load_encoder(names[0], "cpu")).dim == 16


# --- notebook 07: whole tables on the data sets in small ---


@pytest.mark.parametrize(("table", "encoder"), [("gpnns", "pixels"), ("mcip", "mini")])
def test_a_whole_table_is_measured_where_its_data_sets_are_there(data, tmp_path, monkeypatch, table, encoder):
    columns = paper_tables.load_columns(table)
    for name in dict.fromkeys(part.split(":")[0] for column in columns for part in column[1:3] if part):
        in_small.build(name, data, monkeypatch)
    sets, notes = paper_tables.load_sets(columns)
    assert len(sets) == len(notes), notes
    cells = paper_tables.measure_table([encoder], columns, sets, notes, "paper", tmp_path / "cells")
    values = [cells[encoder, column[0]]["row"]["value"] for column in columns]
    assert len(values) == {"gpnns": 15, "mcip": 14}[table] and all(0 <= value <= 100 for value in values)
    assert isinstance(paper_tables.average_columns(values), float)


def test_without_its_data_sets_a_table_is_blank_and_each_set_says_how_to_get_it(data, tmp_path):
    columns = paper_tables.load_columns("gpnns")
    sets, notes = paper_tables.load_sets(columns)
    assert not sets and "cannot be downloaded without you" in notes["imagenet:train"]
    assert "could not download" in notes["instre:test"]
    cells = paper_tables.measure_table(["pixels"], columns, sets, notes, "own", tmp_path / "cells")
    assert [cell["why"] for cell in cells.values()] == [notes[column[2] or column[1]] for column in columns]
    assert not {"imagenet_v2:test", "roxford:query_full"} & notes.keys(), "nothing is fetched that has no gallery"


@pytest.mark.notebook
def test_the_notebook_measures_the_part_of_a_paper_that_is_there_and_says_what_is_not(data, tmp_path, results):
    profile, out = results
    for part in ("mini_world", "embeddings"):  # what only the lesson itself needs, from the shared cache
        if (REAL_CACHE / part).exists():
            (tmp_path / "cache").mkdir(exist_ok=True)
            (tmp_path / "cache" / part).symlink_to(REAL_CACHE / part)
    for name in {column[1].split(":")[0] for column in paper_tables.load_columns("gpnns")} - {"imagenet"}:
        in_small.BUILDERS[name](data / name)  # too small to be the real ones, but for Adience, which has no counts
    parameters = {"profile": profile, "table": "gpnns", "encoders": ["mini", "pixels"]}
    said = text_of(execute(FOLDER / "07_reproduce_papers.ipynb", tmp_path / "o.ipynb", parameters))
    written = json.loads((out / "07_reproduce_papers.json").read_text())
    assert written["headline"] == "gpnns: 2 of 30 cells"
    assert {(row["model"], row["split"], row["metric"]) for row in written["rows"]} == {
        (model, "adience", "mAP (self included)") for model in ("mini", "pixels")
    }, "and no AVG"
    assert "over 1 of 15" in said and "expected 5,924 images and found 4" in said
    assert "ImageNet (ILSVRC2012) was not found" in said and not re.search(r"\bnan\b", said)


# --- licences ---


def test_a_licence_is_what_the_library_states_and_else_a_place_to_look():
    assert licences.find_licence("mini") == licences.find_licence("mini@arcmargin") == "MIT"
    for name in ("timm:vit_large_patch16_dinov3.lvd1689m", "timm:vit_base_patch16_224.augreg_in21k"):
        assert licences.find_licence(name) == timm.get_pretrained_cfg(name[5:]).license
    assert licences.find_licence("open_clip:ViT-H-14-worldwide/metaclip2_worldwide") == "cc-by-nc-4.0"
    openai = licences.find_licence("open_clip:ViT-B-16/openai")
    assert openai == "see its model card, timm/vit_base_patch16_clip_224.openai"
    for name in ("open_clip:ViT-B-16", "open_clip:hf-hub:someone/model", "timm:no_such_model"):
        assert licences.find_licence(name) == "see its model card", name
    assert (
        licences.find_licence("mini@mine.safetensors")
        == licences.find_licence("gpnns:ViT-B@x.pth")
        == "see where the file is from"
    )
