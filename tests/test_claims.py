"""The table of the papers' claims: made from the shipped scores by one command, checked against scipy, resumable."""

import csv
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import gpnns_utils as gu
from gpnns import losses, published_tables
from gpnns.claims import claims_table, measure_claims


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Nothing here may train: what is shipped has to do."""

    def refuse(*_):
        raise AssertionError("the shipped scores lack something")

    monkeypatch.setattr(measure_claims, "ProcessPoolExecutor", refuse)


class InLine:
    """ProcessPoolExecutor without processes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, *lists):
        return map(function, *lists)


def test_a_part_is_measured_once_and_a_killed_run_keeps_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_claims, "KEPT", tmp_path / "claims")
    monkeypatch.setattr(measure_claims, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(measure_claims, "ProcessPoolExecutor", InLine)
    asked = []

    def measure_tuned(base, number):
        asked.append(number)
        if number == 3 and asked.count(3) == 1:
            raise KeyboardInterrupt
        return {"score": np.arange(number)}

    _, settings = measure_claims.PARTS["tuned"]
    monkeypatch.setitem(measure_claims.PARTS, "tuned", (measure_tuned, settings))
    many = [{"base": "0", "number": number} for number in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        measure_claims.get_results("tuned", many)
    for _ in range(2):
        results = measure_claims.get_results("tuned", many)
        assert [len(result["score"]) for result in results] == [1, 2, 3]
    assert asked == [1, 2, 3, 3]
    written = (tmp_path / "claims" / "tuned.npz").read_bytes()
    measure_claims.write_results(tmp_path / "again.npz", measure_claims.read_results(tmp_path / "claims" / "tuned.npz"))
    assert (tmp_path / "again.npz").read_bytes() == written, "the same results are the same bytes"
    measure_claims.get_results("tuned", [many[0], many[0] | {"number": 4}, many[0] | {"number": 4}])
    assert asked == [1, 2, 3, 3, 4], "another part is added, and asked for twice it is measured once"
    assert len(measure_claims.read_results(tmp_path / "claims" / "tuned.npz")) == 4
    monkeypatch.setitem(measure_claims.RECIPE, "scale", 30.0)
    measure_claims.get_results("tuned", many[:1])
    assert asked == [1, 2, 3, 3, 4, 1], "with another recipe nothing of the old one may be used"


def test_a_result_rests_on_its_own_settings_and_bases_alone(monkeypatch):
    kept = {
        part: measure_claims.describe_settings(part, {"base": "1", "way": "adaptive", "finder": "2"})
        for part in ("tuned", "nnn")
    }
    monkeypatch.setitem(measure_claims.BASES, "another", ["--seed", "9"])
    measure_nnn, (ks, alphas) = measure_claims.PARTS["nnn"]
    assert (ks, alphas) == (measure_claims.KS, measure_claims.ALPHAS)
    monkeypatch.setitem(measure_claims.PARTS, "nnn", (measure_nnn, [ks, (0.0, 1.0)]))
    monkeypatch.setitem(measure_claims.OPTIONS, "adaptive", (0.1, 0.5))
    now = {
        part: measure_claims.describe_settings(part, {"base": "1", "way": "adaptive", "finder": "2"}) for part in kept
    }
    assert now["tuned"] != kept["tuned"] and now["nnn"] != kept["nnn"]
    assert measure_claims.describe_settings(
        "tuned", {"base": "1", "way": "softmax"}
    ) != measure_claims.describe_settings("tuned", {"base": "2", "way": "softmax"}), "weights of another base"


def test_scores_of_a_base_that_is_not_shipped_are_used_until_it_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_claims, "KEPT", tmp_path / "claims")
    monkeypatch.setattr(measure_claims, "RUNS", tmp_path / "runs")
    path = measure_claims.find_base("longer_clean")
    assert path.is_relative_to(tmp_path) and measure_claims.hash_base("longer_clean") == "not made yet"
    gu.write_atomically(path, lambda stream: stream.write(b"weights"))
    first = measure_claims.describe_settings("tuned", {"base": "0", "finder": "longer_clean"})
    path.unlink()
    assert measure_claims.describe_settings("tuned", {"base": "0", "finder": "longer_clean"}) == first
    measure_claims.hash_file.cache_clear()
    gu.write_atomically(path, lambda stream: stream.write(b"others"))
    assert measure_claims.describe_settings("tuned", {"base": "0", "finder": "longer_clean"}) != first


def test_what_is_shipped_is_used_as_it_is():
    """No result in `claims/` rests on settings or weights that have changed since."""
    kinds = {"rate": float, "weight": float, "alpha": float, "k": int}
    for file in sorted(measure_claims.KEPT.glob("*.npz")):
        found = measure_claims.read_results(file)
        for name, result in found.items():
            listed = dict(part.split("=") for part in name.split(",")[1:])
            options = {key: kinds.get(key, str)(value) for key, value in listed.items()}
            assert measure_claims.name_part(file.stem, options) == name
            assert str(result["made with"]) == measure_claims.describe_settings(file.stem, options), name


def test_processes_that_need_one_training_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_claims, "RUNS", tmp_path)
    inside, most = [], []

    @measure_claims.run_alone
    def train(base, rate=1.0):
        inside.append(base)
        most.append(inside.count(base))
        time.sleep(0.05)
        inside.remove(base)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, ["0", "0", "1", "0"]))
    assert max(most) == 1
    assert len(list((tmp_path / "locks").iterdir())) == 2, "a training has one lock, however its settings are given"
    train("0", 1.0), train(base="0")
    assert len(list((tmp_path / "locks").iterdir())) == 2


def test_the_best_setting_is_the_one_that_validation_prefers(monkeypatch):
    values = {0.1: [5.0, 40.0], 0.2: [7.0, 30.0], 0.3: [6.0, 45.0]}
    monkeypatch.setattr(
        measure_claims,
        "get_results",
        lambda _, many: [{"validation": np.array(values[options["rate"]])} for options in many],
    )
    many = [{"rate": rate} for rate in values]
    assert measure_claims.choose_best("tuned", many, lambda validation: validation[0])["rate"] == 0.2
    assert measure_claims.choose_best("tuned", many, np.mean)["rate"] == 0.3


def test_a_long_tail_keeps_every_class_and_thins_out_the_small_ones():
    whole, cut = gu.load_images("mini", "train"), measure_claims.load_images_of("long_tail")
    before, after = np.bincount(whole.labels), np.bincount(cut.labels, minlength=len(np.bincount(whole.labels)))
    assert after.min() == 2 and after.max() == before.max()
    order = np.argsort(before)
    share = after[order] / before[order]
    assert share[:100].mean() < 0.5 < share[-20:].mean()


def test_captions_are_true_as_often_as_asked():
    assert measure_claims.measure_true_words("own") == 1.0
    read, half, none = (measure_claims.measure_true_words(f"read_{share}") for share in (1.0, 0.5, 0.0))
    assert half == pytest.approx((read + none) / 2, abs=0.02)
    assert none < 0.5 < 0.75 < read < 1, "the bank describes other images"
    counts = [(measure_claims.find_captions_by(finder)[0] >= 0).sum() for finder in ("read_1.0", "read_0.0")]
    assert counts[0] == counts[1], "replaced captions are as many as before"


def test_the_caption_loss_is_the_sum_written_down_for_one_image_after_the_other():
    images, captions = F.normalize(torch.randn(3, 16)), F.normalize(torch.randn(6, 16))
    owned = [[0, 1], [2], [3, 4, 5]]
    own = torch.tensor([[number in rows for number in range(6)] for rows in owned])
    expected = []
    for image, rows in zip(images, owned, strict=True):
        cosines = captions @ image
        harder = [np.cos(np.arccos(c) + 0.1) if i in rows else c for i, c in enumerate(cosines.tolist())]
        surprise = np.log(np.sum(np.exp(20 * np.array(harder)))) - 20 * np.array(harder)
        share = np.array([1 / len(rows) if i in rows else 0 for i in range(6)])
        expected.append(share @ surprise + 0.1 * np.max((1 - share) * surprise))
    assert losses.multi_caption_loss(images, captions, own, 20.0).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_caption_of_two_images_belongs_to_both():
    columns, own = losses.batch_captions(torch.tensor([[7, 5], [7, -1], [-1, -1]]))
    assert columns.tolist() == [5, 7]
    assert own.int().tolist() == [[1, 1], [0, 1], [0, 0]]


def test_every_way_to_train_runs_in_small_and_changes_what_it_should(tmp_path, monkeypatch):
    """A few steps of each: images alone and with captions move the image tower, realigning the text tower."""
    monkeypatch.setattr(measure_claims, "RUNS", tmp_path)
    monkeypatch.setattr(measure_claims, "EPOCHS", 1.0)
    monkeypatch.setattr(measure_claims, "REALIGNING", {"epochs": 1.0, "batch_size": 64})
    few = {name: gu.load_images("mini", name).subset(np.arange(200)) for name in ("train", "validation", "bank")}
    few["captions_validation"] = gu.load_images("mini", "captions_validation").subset(np.arange(100))
    monkeypatch.setattr(measure_claims, "load_images_of", few.get)
    monkeypatch.setattr(measure_claims, "find_captions_by", measure_claims.find_captions_by.__wrapped__)

    def weights(encoder):
        state = encoder.model.state_dict()
        return [torch.cat([v.flatten() for k, v in state.items() if k.startswith("visual.") == own]) for own in (1, 0)]

    images, texts = weights(measure_claims.open_base("0"))
    for options in ({"way": "adaptive"}, {"way": "arcmargin", "finder": "0", "weight": 0.5}):
        moved, kept = weights(measure_claims.tune_base("0", rate=1e-3, **options))
        assert not torch.equal(moved, images) and torch.equal(kept, texts), options
    again, _ = weights(measure_claims.tune_base("0", rate=1e-3, **options))
    assert torch.equal(again, moved), "the second call finds the training done"
    kept, moved = weights(measure_claims.realign_base("0", 1e-3, rate=1e-3, **options))
    assert torch.equal(kept, again) and not torch.equal(moved, texts)

    start, _ = weights(measure_claims.tune_base("0", "arcmargin", 1e-3))
    further = {number: weights(measure_claims.continue_tuning("0", 1e-3, 1e-3, number))[0] for number in (0, 1, 4)}
    further["averaged"], _ = weights(measure_claims.continue_tuning("0", 1e-3, 1e-3, 1, ema=0.9))
    further["unequal"], _ = weights(measure_claims.tune_unequally("0", 2))
    longer, kept = weights(measure_claims.continue_tuning("0", 1e-3, 1e-3, 0, passes=2.0))
    assert torch.equal(kept, texts) and not torch.equal(longer, further[0]), "from another start"
    moves = {name: (state - start).norm() for name, state in further.items()}
    assert 0 < moves["averaged"] < moves[1] and all(moves.values()), "the average lags behind"


def test_a_line_between_two_models_begins_and_ends_at_them_and_rules_lie_between_base_and_soup(tmp_path, monkeypatch):
    """Without any training: the models are the mini CLIP, and what notebook 03 made of it."""
    few = gu.load_images("mini", "test").subset(np.arange(0, 2400, 8))
    monkeypatch.setattr(measure_claims, "load_images_of", lambda name: few)
    monkeypatch.setattr(measure_claims, "measure_encoder", lambda encoder: encoder.model.state_dict())
    tuned = f"mini@{gu.DATA / 'mini_tuned' / 'arcmargin.safetensors'}"
    names = {0: tuned, 1: "mini", 2: tuned, 3: tuned}
    monkeypatch.setattr(
        measure_claims, "continue_tuning", lambda base, start_rate, rate, number: gu.load_encoder(names[number])
    )
    monkeypatch.setattr(measure_claims, "tune_base", lambda *_: gu.load_encoder("mini"))
    line = measure_claims.measure_between("0", 1e-3, rate=1e-3)["image"]
    for scores, name in ((line[0], tuned), (line[-1], "mini")):
        np.testing.assert_array_equal(
            scores, measure_claims.score_images(gu.embed_images(gu.load_encoder(name), few)[0])
        )
    assert len(line) == len(measure_claims.SHARES)
    key = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    moved = {}
    for rule in measure_claims.RULES:
        state = measure_claims.measure_relative("0", 1e-3, 1e-3, rule)
        moved[rule] = (state[key] - gu.load_encoder("mini").model.state_dict()[key]).norm().item()
    assert (
        moved["WiSE-FT"] == pytest.approx(moved["uniform soup"] / 2, rel=1e-4)
        and moved["LiNeS"] < moved["uniform soup"]
    )


@pytest.fixture(scope="module")
def table():
    return published_tables.read_numbers(gu.DATA / "claims.csv")


def test_the_table_follows_from_the_shipped_scores(table):
    for line, written in zip(claims_table.make_claims(), table, strict=True):
        assert line == written, line["claim"]


def test_every_claim_has_three_seeds_an_interval_a_verdict_and_a_condition(table):
    assert list(table[0]) == ["claim", "source", "paper", "ours", "low", "high", "seeds", "shown", "condition"]
    for line in table:
        assert line["low"] <= line["ours"] <= line["high"] and line["seeds"] == 3, line
        assert line["condition"].startswith("by seed") and line["source"], line


def test_a_claim_is_shown_where_its_whole_interval_says_so():
    def verdict(low, at_least=0.0):
        found = claims_table.Difference(2.0, low, 3.0, (1.0, 2.0, 3.0))
        line = claims_table.make_claim("a claim", "a paper", None, found, "more", at_least)
        assert line["condition"] == "by seed +1.0, +2.0, +3.0; more"
        return line["shown"]

    assert [verdict(0.5), verdict(-0.5), verdict(-0.5, at_least=-1.5), verdict(-1.6, at_least=-1.5)] == [
        "yes",
        "no",
        "yes",
        "no",
    ]


def test_pairing_and_interval_are_those_of_scipy_where_queries_are_drawn(table):
    """One row: the text search that image-only tuning loses. The mean over seeds comes first, then the difference query by
    query; scipy's paired bootstrap of both columns, and its paired t-test, give the same interval."""
    found = measure_claims.score_models()
    before, after = (
        np.mean([100 * (result["text"] <= 5) for result in found[name]], axis=0) for name in ("base", "image-only")
    )
    line = next(line for line in table if line["claim"].startswith("Image-only tuning loses"))
    assert line["ours"] == pytest.approx(before.mean() - after.mean(), abs=0.006)

    def difference(one, other, axis):
        return one.mean(axis) - other.mean(axis)

    drawn = scipy.stats.bootstrap((before, after), difference, paired=True, n_resamples=4000, rng=1)
    paired = scipy.stats.ttest_rel(before, after).confidence_interval()
    for low, high in (drawn.confidence_interval, paired):
        assert (line["low"], line["high"]) == pytest.approx((low, high), abs=0.15)
    unpaired = scipy.stats.ttest_ind(before, after).confidence_interval()
    assert unpaired.high - unpaired.low > 1.3 * (line["high"] - line["low"]), "pairing is what makes it this narrow"


def test_an_interval_of_image_search_is_that_of_scipy_over_classes(table):
    steps, labels = measure_claims.score_models(), gu.load_images("mini", "test").labels
    means = [
        np.mean([100 * result["image"].astype(float) for result in steps[name]], axis=0)
        for name in ("arcmargin", "margin 0")
    ]
    gain = means[0] - means[1]
    by_class = np.array([gain[labels == label].mean() for label in np.unique(labels)])  # of ten images each
    drawn = scipy.stats.bootstrap((by_class,), np.mean, n_resamples=4000, rng=1).confidence_interval
    line = next(line for line in table if line["claim"].startswith("The margin itself"))
    assert (line["low"], line["high"]) == pytest.approx(tuple(drawn), abs=0.15)
    images_alone = scipy.stats.bootstrap(
        (gain,), np.mean, n_resamples=1000, method="percentile", rng=1
    ).confidence_interval
    assert images_alone.high - images_alone.low < line["high"] - line["low"], (
        "images of a class are no independent draws"
    )


def test_the_curves_are_shipped_and_follow_from_the_scores():
    with open(gu.DATA / "claims_curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["curve"] for row in rows} == {
        "ladder",
        "refinements",
        "finder",
        "room",
        "models",
        "frontier",
        "soups",
        "relatives",
        "ingredients",
        "between",
        "overlap",
        "gallery",
    }
    assert {row["line"] for row in published_tables.load_curve("ladder")} == set(measure_claims.LADDER)
    measured = claims_table.make_curves()
    assert [float(row["y"]) for row in rows] == [point["y"] for point in measured]
    for row in rows:
        assert float(row["low"]) <= float(row["y"]) <= float(row["high"]), row


def test_what_the_readme_says_of_the_claims_is_in_the_table(table):
    readme = (gu.HERE / "README.md").read_text(encoding="utf-8")
    lines = set()
    for line in table:
        paper = "" if line["paper"] is None else f"{line['paper']:+.1f}"
        ours = "{ours:+.1f} [{low:+.1f}, {high:+.1f}]".format(**line)
        lines.add(f"| {line['claim']} | {paper} | {ours} | {line['shown']} |")
    said = re.findall(r"^\|.*\| (?:yes|no) \|$", readme, re.M)
    assert len(said) >= 8 and set(said) <= lines
    assert {line.split("|")[4].strip() for line in said} == {"yes", "no"}, "what does not show is not left out"
    assert f"{sum(line['shown'] == 'yes' for line in table)} of {len(table)} claims show" in readme
