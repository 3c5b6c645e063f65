"""Averaging weights, and what notebook 05 defines: against other libraries, by hand, and on broken input."""

import numpy as np
import pytest
import torch
from conftest import lift
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

import gpnns_utils as gu
from gpnns import caption_banks, soups

nb = lift("05")


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))


def state(*values, key="w", dtype=torch.float32):
    return {key: torch.tensor(values, dtype=dtype)}


numbers = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)


# --- the mean ---


def test_the_uniform_soup_is_torchs_average_of_models():
    models = [network(seed) for seed in range(4)]
    theirs = AveragedModel(models[0], multi_avg_fn=get_swa_multi_avg_fn())
    for model in models:
        theirs.update_parameters(model)
    ours = soups.average([model.state_dict() for model in models])
    for key, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours[key], value.detach())


@given(st.lists(numbers, min_size=1, max_size=5), st.randoms())
def test_the_order_does_not_matter_and_the_mean_lies_between_its_ingredients(rows, random):
    states = [state(*row) for row in rows]
    mean = soups.average(states)["w"]
    shuffled = random.sample(states, len(states))
    torch.testing.assert_close(soups.average(shuffled)["w"], mean, atol=1e-4, rtol=1e-5)
    assert (mean >= torch.tensor(rows).amin(0) - 1e-4).all() and (mean <= torch.tensor(rows).amax(0) + 1e-4).all()
    np.testing.assert_allclose(nb.average_by_hand(states)["w"], mean, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype):
    large = [state(60000.0, 1.0, dtype=dtype) for _ in range(4)]
    small = state(60000.0, 1.0 + 2**-7, dtype=dtype)
    mean = soups.average([*large, small])["w"]
    assert mean.dtype == torch.float32 and torch.isfinite(mean).all()
    assert mean[1].item() == pytest.approx(1 + 2**-7 / 5, abs=1e-6)


def test_integers_are_the_first_checkpoints_not_rounded_means():
    first, second = network(0).state_dict() | {"n": torch.tensor(7)}, network(1).state_dict() | {"n": torch.tensor(100)}
    for soup in (soups.average([first, second]), nb.average_by_hand([first, second])):
        assert soup["n"].item() == 7 and soup["n"].dtype == torch.int64


@given(numbers, st.floats(0, 1))
def test_what_is_the_same_everywhere_stays_so_to_the_last_bit(row, share):
    same = soups.average([state(*row), state(*row)], [share, 1 - share])["w"]
    assert torch.equal(same, state(*row)["w"])


def test_batch_norm_is_warned_of_because_its_averaged_statistics_may_not_fit():
    states = [torch.nn.BatchNorm1d(2).state_dict() for _ in range(2)]
    with pytest.warns(UserWarning, match="batch norm.*update_bn"):
        soups.average(states)


def test_a_list_of_one_models_own_tensors_is_refused_and_copies_of_them_are_averaged():
    model, aliased, copies = network(0), [], []
    for seed in range(4):
        model.load_state_dict(network(seed).state_dict())
        aliased.append(model.state_dict())
        copies.append({key: value.clone() for key, value in model.state_dict().items()})
    assert (soups.find_shared_memory(aliased), soups.find_shared_memory(copies)) == ("0.weight", None)
    with pytest.raises(ValueError, match=r"0\.weight is the same memory in several state dicts.*clone\(\) them"):
        soups.average(aliased)
    assert torch.equal(nb.average_by_hand(aliased)["0.weight"], copies[-1]["0.weight"]), "the published mistake"
    expected = torch.stack([copy["0.weight"] for copy in copies]).mean(0)
    torch.testing.assert_close(soups.average(copies)["0.weight"], expected)
    assert not torch.allclose(expected, copies[-1]["0.weight"])


@pytest.mark.parametrize("method", ["average", "mix_states", "lines", "model_stock"])
def test_a_soup_shares_no_memory_with_its_ingredients_and_leaves_them_as_they_were(method):
    states = [{f"blocks.{key}": value for key, value in network(seed).state_dict().items()} for seed in range(3)]
    before = [{key: value.clone() for key, value in one.items()} for one in states]
    arguments = {
        "average": (states,),
        "mix_states": (*states[:2], lambda key: 0.5),
        "lines": (*states[:2], 0.5),
        "model_stock": (states[:2], states[2]),
    }
    for key, value in getattr(soups, method)(*arguments[method]).items():
        value.zero_()
        assert all(torch.equal(one[key], copy[key]) for one, copy in zip(states, before, strict=True)), key


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(2)}, r"checkpoint 0 and checkpoint 1 are not of one architecture; they differ in b \(1"),
        ({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(1)}, "differ in c "),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "differ in b "),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_name(other, message):
    first = {"a": torch.ones(2), "b": torch.ones(2)}
    for function in (soups.average, lambda states: soups.lines(*states, 0.5)):
        with pytest.raises(ValueError, match=message):
            function([first, other])
    with pytest.raises(ValueError, match=message.replace("checkpoint 1", "checkpoint 2")):
        soups.model_stock([{"a": first["a"].clone(), "b": first["b"].clone()}, other], first)


def test_an_empty_soup_and_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="nothing to average"):
        soups.average([])
    for weights in ([1.0], [0.5, 0.6], [1, 0, 0]):
        with pytest.raises(ValueError, match="2 checkpoints need as many weights that sum to 1"):
            soups.average([state(1.0), state(2.0)], weights)


# --- greedy ---


@settings(max_examples=30)
@given(st.lists(numbers, min_size=1, max_size=6))
def test_greedy_never_falls_below_the_best_single_and_stops_where_nothing_rises(rows):
    states = [state(*row) for row in rows]

    def score(soup):
        return -(soup["w"] - 1).square().sum().item()

    chosen, trials = nb.greedy(states, score)
    alone, soup = [score(one) for one in states], soups.average([states[i] for i in chosen])
    assert score(soup) >= max(alone) - 1e-6 and len(trials) == len(states) - 1
    assert alone[chosen[0]] == max(alone) and len(set(chosen)) == len(chosen)
    taken = [trial for trial in trials if trial["tried"] in chosen]
    values = [max(alone), *(trial["together with the others"] for trial in taken)]
    assert values == sorted(set(values)), "only a strict rise is taken"
    assert all(t["together with the others"] <= t["before"] for t in trials if t not in taken), (
        "and what does not rise is not"
    )
    assert [trial["alone"] for trial in trials] == sorted(alone, reverse=True)[1:]


def test_greedy_leaves_out_what_helps_alone_but_not_together():
    states = [state(0.0, 1.0), state(0.0, -1.2), state(5.0, 0.0)]
    assert nb.greedy(states, lambda soup: -soup["w"].square().sum().item())[0] == [0, 1]


def test_equal_scores_add_nothing():
    assert len(nb.greedy([state(1.0), state(2.0)], lambda soup: 5.0)[0]) == 1


# --- towards the start ---


def test_lines_scales_the_change_by_depth_in_each_tower_on_its_own(capsys):
    names = [f"visual.transformer.resblocks.{i}.w" for i in range(5)] + [f"transformer.resblocks.{i}.w" for i in (0, 1)]
    after = {name: torch.ones(2) for name in [*names, "visual.proj"]}
    soup = soups.lines({name: torch.zeros(2) for name in after}, after, 0.2)
    assert [round(soup[name][0].item(), 3) for name in after] == [0.2, 0.4, 0.6, 0.8, 1.0, 0.2, 1.0, 0.2]
    stages = ["conv1.w", "layer1.0.w", "layer2.0.w", "layer3.5.w", "fc.w"]
    assert list(soups.find_depths(stages).values()) == [0, 0, 0.5, 1, 0], "a ResNet's stages are its blocks"
    assert soups.lines(state(1.0), state(2.0), 0.5)["w"].item() == 1.5
    assert "LiNeS finds no depth" in capsys.readouterr().out


def test_lines_with_share_one_changes_nothing():
    before, after = (
        {"blocks.0.w": torch.zeros(2), "b": torch.zeros(1)},
        {"blocks.0.w": torch.ones(2), "b": torch.ones(1)},
    )
    assert all(torch.equal(value, after[key]) for key, value in soups.lines(before, after, 1.0).items())


@pytest.mark.parametrize(("degrees", "share"), [(0, 1.0), (60, 2 / 3), (90, 0.0), (120, 0.0)])
def test_model_stock_keeps_of_the_mean_what_two_models_agree_on(degrees, share):
    angle = np.deg2rad(degrees)
    start, one = state(1.0, 2.0), state(2.0, 2.0)
    other = {"w": start["w"] + torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)}
    soup = soups.model_stock([one, other], start)["w"]
    mean = (one["w"] + other["w"]) / 2
    torch.testing.assert_close(soup, start["w"] + share * (mean - start["w"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(soup, nb.model_stock_by_hand([one["w"], other["w"]], start["w"]), atol=1e-5, rtol=1e-5)


def test_model_stock_of_n_models_agrees_with_the_formula_and_with_tensors_that_did_not_move():
    rng = np.random.default_rng(0)
    common = rng.normal(size=500)
    moves = [common + rng.normal(size=500) for _ in range(4)]
    start = {"w": torch.zeros(500), "still": torch.ones(3)}
    states = [{"w": torch.tensor(move, dtype=torch.float32), "still": torch.ones(3)} for move in moves]
    cosine = np.mean([np.corrcoef(a, b)[0, 1] for i, a in enumerate(moves) for b in moves[:i]])
    soup = soups.model_stock(states, start)
    np.testing.assert_allclose(soup["w"], 4 * cosine / (1 + 3 * cosine) * np.mean(moves, axis=0), atol=0.02)
    assert torch.equal(soup["still"], torch.ones(3))


# --- the map, small embeddings ---


@given(st.integers(0, 200))
def test_the_map_keeps_the_distances_between_its_three_models(seed):
    states = [network(seed + i).state_dict() for i in range(3)]
    points = nb.corners(states)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(points[i] - points[j]) == pytest.approx(nb.distance(states[i], states[j]), rel=1e-6)


def test_directions_are_those_of_pca():
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * np.arange(1, 9)
    found, expected = nb.directions(vectors, 3), PCA(3).fit(vectors).components_.T
    np.testing.assert_allclose(np.abs(found.T @ expected), np.eye(3), atol=1e-4)
    assert nb.directions(vectors[:4], 64).shape == (8, 3), "four points span no more"


def test_the_challenges_measure_looks_no_further_than_there_is_something_to_find():
    vectors = np.array([[0.1], [0.0], [0.2], [10], [0.3], [40], [9], [50], [30], [60]])  # every other one asks
    labels = np.array([0, 0, 2, 1, 0, 3, 1, 3, 1, 3])
    nb.challenge.__globals__["test"] = gu.ImageSet("x", ["a.png"] * 10, labels)
    # the first query has two to find, of which one is among its first two; so has the second, whose other one lies farthest
    # away; of the others' class there is none in the gallery
    assert nb.challenge(vectors).per_query[:2].tolist() == [0.5, 0.5]
    assert np.isnan(nb.challenge(vectors).per_query[2:]).all()


def test_names_of_things_are_the_classes_or_what_the_drawn_worlds_bank_tells(folder):
    assert caption_banks.load_names(gu.load_images(str(folder))) == ["blue", "green", "red"]
    assert len(caption_banks.load_names(gu.load_images("mini", "validation"))) == 2389  # every third of 7,165


def test_an_encoder_without_a_text_tower_takes_the_directions_of_images_and_says_so(capsys):
    images = np.eye(3, dtype=np.float32)
    assert caption_banks.embed_names(gu.load_encoder("pixels"), ["a cup"], images) is images
    assert "pixels has no text tower" in capsys.readouterr().out
