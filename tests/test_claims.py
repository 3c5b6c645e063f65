"""The table of the papers' claims: made from the shipped scores by one command, checked against scipy, resumable."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpnns_utils as gu
from gpnns_utils import measure_claims, training


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

    def part_tuned(base, number):
        asked.append(number)
        if number == 3 and asked.count(3) == 1:
            raise KeyboardInterrupt
        return {"score": np.arange(number)}

    monkeypatch.setattr(measure_claims, "part_tuned", part_tuned)
    many = [{"base": "0", "number": number} for number in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        measure_claims.results_of("tuned", many)
    for _ in range(2):
        results = measure_claims.results_of("tuned", many)
        assert [len(result["score"]) for result in results] == [1, 2, 3]
    assert asked == [1, 2, 3, 3]
    written = (tmp_path / "claims" / "tuned.npz").read_bytes()
    measure_claims.save_results(tmp_path / "again.npz", measure_claims.results_in(tmp_path / "claims" / "tuned.npz"))
    assert (tmp_path / "again.npz").read_bytes() == written, "the same results are the same bytes"
    measure_claims.results_of("tuned", [many[0], many[0] | {"number": 4}, many[0] | {"number": 4}])
    assert asked == [1, 2, 3, 3, 4], "another part is added, and asked for twice it is measured once"
    assert len(measure_claims.results_in(tmp_path / "claims" / "tuned.npz")) == 4
    monkeypatch.setattr(measure_claims, "RECIPE", measure_claims.RECIPE | {"scale": 30.0})
    measure_claims.results_of("tuned", many[:1])
    assert asked == [1, 2, 3, 3, 4, 1], "with another recipe nothing of the old one may be used"


def test_a_result_rests_on_its_own_settings_and_bases_alone(monkeypatch):
    kept = {
        part: measure_claims.made_with(part, {"base": "1", "way": "adaptive", "finder": "2"})
        for part in ("tuned", "nnn")
    }
    monkeypatch.setitem(measure_claims.BASES, "another", ["--seed", "9"])
    monkeypatch.setattr(measure_claims, "ALPHAS", (0.0, 1.0))
    monkeypatch.setitem(measure_claims.OPTIONS, "adaptive", (0.1, 0.5))
    now = {part: measure_claims.made_with(part, {"base": "1", "way": "adaptive", "finder": "2"}) for part in kept}
    assert now["tuned"] != kept["tuned"] and now["nnn"] != kept["nnn"]
    assert measure_claims.made_with("tuned", {"base": "1", "way": "softmax"}) != measure_claims.made_with(
        "tuned", {"base": "2", "way": "softmax"}
    ), "weights of another base"


def test_what_is_shipped_is_used_as_it_is():
    """No result in `claims/` rests on settings or weights that have changed since."""
    kinds = {"rate": float, "weight": float, "alpha": float, "k": int}
    for file in sorted(measure_claims.KEPT.glob("*.npz")):
        found = measure_claims.results_in(file)
        for name, result in found.items():
            listed = dict(part.split("=") for part in name.split(",")[1:])
            options = {key: kinds.get(key, str)(value) for key, value in listed.items()}
            assert measure_claims.name_of(file.stem, options) == name
            assert str(result["made with"]) == measure_claims.made_with(file.stem, options), name


def test_processes_that_need_one_training_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_claims, "RUNS", tmp_path)
    inside, most = [], []

    @measure_claims.alone
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
        "results_of",
        lambda _, many: [{"validation": np.array(values[options["rate"]])} for options in many],
    )
    many = [{"rate": rate} for rate in values]
    assert measure_claims.best("tuned", many, lambda validation: validation[0])["rate"] == 0.2
    assert measure_claims.best("tuned", many, np.mean)["rate"] == 0.3


def test_a_long_tail_keeps_every_class_and_thins_out_the_small_ones():
    whole, cut = gu.load_images("mini", "train"), measure_claims.images_of("long_tail")
    before, after = np.bincount(whole.labels), np.bincount(cut.labels, minlength=len(np.bincount(whole.labels)))
    assert after.min() == 2 and after.max() == before.max()
    order = np.argsort(before)
    share = after[order] / before[order]
    assert share[:100].mean() < 0.5 < share[-20:].mean()


def test_captions_are_true_as_often_as_asked():
    shares = [measure_claims.share_of_true_words(f"true_{share}") for share in (1.0, 0.5, 0.0)]
    assert shares[0] == 1.0
    assert shares[1] == pytest.approx((shares[0] + shares[2]) / 2, abs=0.02)
    assert shares[2] < 0.5


def test_an_average_of_state_dicts_is_none_of_them():
    states = [{"a": torch.full((2,), float(value))} for value in (0, 1, 5)]
    assert measure_claims.average(states)["a"].tolist() == [2.0, 2.0]


def test_the_losses_of_the_ladder_are_those_of_other_libraries():
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    embeddings, labels = torch.randn(32, 8), torch.arange(32) % 5
    start = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    softmax = training.Softmax(start)
    plain = torch.nn.Linear(8, 5, bias=False)
    plain.weight.data = F.normalize(torch.from_numpy(start))
    assert torch.allclose(softmax(embeddings, labels), F.cross_entropy(plain(embeddings), labels))
    peer = ProxyAnchorLoss(5, 8, margin=0.1, alpha=8**0.5)
    peer.proxies.data = torch.from_numpy(start)
    assert torch.allclose(training.ProxyAnchor(start)(embeddings, labels), peer(embeddings, labels), rtol=1e-5)


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
    assert training.multi_caption_loss(images, captions, own, 20.0).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_caption_of_two_images_belongs_to_both():
    columns, own = training.batch_captions(torch.tensor([[7, 5], [7, -1], [-1, -1]]))
    assert columns.tolist() == [5, 7]
    assert own.int().tolist() == [[1, 1], [0, 1], [0, 0]]


def test_every_way_to_train_runs_in_small_and_changes_what_it_should(tmp_path, monkeypatch):
    """A few steps of each: images alone and with captions move the image tower, realigning the text tower."""
    monkeypatch.setattr(measure_claims, "RUNS", tmp_path)
    monkeypatch.setattr(measure_claims, "EPOCHS", 1.0)
    monkeypatch.setattr(measure_claims, "REALIGNING", {"epochs": 1.0, "batch_size": 64})
    few = {name: gu.load_images("mini", name).subset(np.arange(200)) for name in ("train", "validation", "bank")}
    few["captions_validation"] = gu.load_images("mini", "captions_validation").subset(np.arange(100))
    monkeypatch.setattr(measure_claims, "images_of", few.get)
    for cached in ("embedded", "captions_for"):
        monkeypatch.setattr(measure_claims, cached, getattr(measure_claims, cached).__wrapped__)

    def weights(encoder):
        state = encoder.model.state_dict()
        return [torch.cat([v.flatten() for k, v in state.items() if k.startswith("visual.") == own]) for own in (1, 0)]

    images, texts = weights(measure_claims.open_base("0"))
    for options in ({"way": "adaptive"}, {"way": "arcmargin", "finder": "0", "weight": 0.5}):
        moved, kept = weights(measure_claims.tuned("0", rate=1e-3, **options))
        assert not torch.equal(moved, images) and torch.equal(kept, texts), options
    again, _ = weights(measure_claims.tuned("0", rate=1e-3, **options))
    assert torch.equal(again, moved), "the second call finds the training done"
    kept, moved = weights(measure_claims.realigned("0", 1e-3, rate=1e-3, **options))
    assert torch.equal(kept, again) and not torch.equal(moved, texts)
