"""Averaging weights: what notebook 05 defines, against other libraries, by hand, on files and on broken input."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import lift
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.spatial import geometric_slerp
from sklearn.decomposition import PCA
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import gpnns_utils as gu

nb = lift("05")


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))


def state(*values, key="w", dtype=torch.float32):
    return {key: torch.tensor(values, dtype=dtype)}


numbers = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3)


# --- the mean ---


def test_the_uniform_soup_is_torchs_average_of_models():
    models = [network(seed) for seed in range(4)]
    theirs = AveragedModel(models[0], multi_avg_fn=get_swa_multi_avg_fn())
    for model in models:
        theirs.update_parameters(model)
    ours = nb.average([model.state_dict() for model in models])
    for key, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours[key], value.detach())


def test_an_exponential_moving_average_is_torchs():
    models = [network(seed) for seed in range(5)]
    theirs = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(0.7))
    for model in models:
        theirs.update_parameters(model)
    ours = nb.moving_average([model.state_dict() for model in models], 0.7)
    for key, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours[key], value.detach())


@given(st.lists(numbers, min_size=1, max_size=5), st.randoms())
def test_the_order_does_not_matter_and_the_mean_lies_between_its_ingredients(rows, random):
    states = [state(*row) for row in rows]
    mean = nb.average(states)["w"]
    shuffled = random.sample(states, len(states))
    torch.testing.assert_close(nb.average(shuffled)["w"], mean, atol=1e-4, rtol=1e-5)
    assert (mean >= torch.tensor(rows).amin(0) - 1e-4).all() and (mean <= torch.tensor(rows).amax(0) + 1e-4).all()
    np.testing.assert_allclose(nb.average_by_hand(states)["w"], mean, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype):
    large = [state(60000.0, 1.0, dtype=dtype) for _ in range(4)]
    small = state(60000.0, 1.0 + 2**-7, dtype=dtype)
    mean = nb.average([*large, small])["w"]
    assert mean.dtype == torch.float32 and torch.isfinite(mean).all()
    assert mean[1].item() == pytest.approx(1 + 2**-7 / 5, abs=1e-6)


def test_integers_are_the_first_checkpoints_not_rounded_means():
    first, second = network(0).state_dict(), network(1).state_dict()
    first["1.num_batches_tracked"], second["1.num_batches_tracked"] = torch.tensor(7), torch.tensor(100)
    soup = nb.average([first, second])
    assert soup["1.num_batches_tracked"].item() == 7 and soup["1.num_batches_tracked"].dtype == torch.int64


def test_a_list_of_one_models_own_tensors_is_refused_and_copies_of_them_are_averaged():
    model, aliased, copies = network(0), [], []
    for seed in range(4):
        model.load_state_dict(network(seed).state_dict())
        aliased.append(model.state_dict())
        copies.append({key: value.clone() for key, value in model.state_dict().items()})
    with pytest.raises(ValueError, match=r"0\.weight is the same memory in several state dicts: clone\(\) them"):
        nb.average(aliased)
    assert torch.equal(nb.average_by_hand(aliased)["0.weight"], copies[-1]["0.weight"]), "the published mistake"
    expected = torch.stack([copy["0.weight"] for copy in copies]).mean(0)
    torch.testing.assert_close(nb.average(copies)["0.weight"], expected)
    assert not torch.allclose(expected, copies[-1]["0.weight"])


@pytest.mark.parametrize("method", ["average", "wise_ft", "slerp", "model_stock", "greedy", "moving_average"])
def test_a_soup_shares_no_memory_with_its_ingredients_and_leaves_them_as_they_were(method):
    states = [network(seed).state_dict() for seed in range(2)]
    before = [{key: value.clone() for key, value in one.items()} for one in states]
    extra = {"wise_ft": (states[1], 0.5), "slerp": (states[1],), "model_stock": (network(9).state_dict(),)}
    extra |= {"greedy": (lambda soup: -soup["0.weight"].sum().item(),), "moving_average": (0.5,)}
    first = states[0] if method in ("wise_ft", "slerp") else states
    soup = getattr(nb, method)(first, *extra.get(method, ()))
    soup = soup[0] if method == "greedy" else soup
    for key, value in soup.items():
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
    for function in (nb.average, lambda states: nb.slerp(*states), lambda states: nb.wise_ft(*states, 0.5)):
        with pytest.raises(ValueError, match=message):
            function([first, other])
    with pytest.raises(ValueError, match=message.replace("checkpoint 1", "checkpoint 2")):
        nb.model_stock([{"a": first["a"].clone(), "b": first["b"].clone()}, other], first)


def test_an_empty_soup_and_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="nothing to average"):
        nb.average([])
    for weights in ([1.0], [0.5, 0.6], [1, 0, 0]):
        with pytest.raises(ValueError, match="2 checkpoints need as many weights that sum to 1"):
            nb.average([state(1.0), state(2.0)], weights)


# --- files ---


def test_tensors_of_a_file_are_read_when_asked_for_and_prefixes_are_taken_off(tmp_path):
    save_file({"module.a": torch.ones(3), "module.b": torch.zeros(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    opened = nb.open_checkpoint(tmp_path / "x.safetensors")
    assert list(opened) == ["a", "b"] and len(opened) == 2 and torch.equal(opened["a"], torch.ones(3))
    torch.save({"state_dict": {"module.a": torch.full((3,), 3.0), "module.b": torch.ones(2)}}, tmp_path / "x.pt")
    assert torch.equal(nb.average([opened, nb.open_checkpoint(tmp_path / "x.pt")])["a"], torch.full((3,), 2.0))


def test_broken_and_missing_files_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(ValueError, match=r"broken.safetensors is not a readable safetensors file"):
        nb.open_checkpoint(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        nb.open_checkpoint(tmp_path / "none.safetensors")
    for name, size in (("a", 2), ("b", 3)):
        save_file({"w": torch.zeros(size)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors and .*b.safetensors are not of one architecture"):
        nb.average([nb.open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab"])


MEMORY = """
import resource, sys
from pathlib import Path
from conftest import lift
nb = lift("05")
files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
peaks = [peak()]
for count in (2, 8):
    checkpoints = [nb.open_checkpoint(file) for file in files[:count]]
    soup, chosen, _ = nb.greedy(checkpoints, lambda state: float(state["0"].mean()))
    soup, checkpoints = nb.average(checkpoints)["0"].mean().item(), None
    peaks.append(peak())
print(*peaks, soup, len(chosen))
"""


def test_a_soup_of_eight_files_needs_the_memory_of_two(tmp_path):
    size = 32  # MB in half precision, so 64 MB as float32
    for i in range(8):
        tensors = {str(j): torch.full((2**20, 2), float(i), dtype=torch.float16) for j in range(size // 4)}
        save_file(tensors, tmp_path / f"{i}.safetensors")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(gu.HERE), str(gu.HERE / "tests")])}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    start, two, eight, soup, chosen = map(float, run.stdout.split())
    assert soup == 3.5 and chosen == 1
    assert two - start < 2 * 2 * size + 20, "a soup, and one that is being tried"
    assert eight - two < size / 2, "more files need no more memory"


# --- greedy ---


@settings(max_examples=30)
@given(st.lists(numbers, min_size=1, max_size=6))
def test_greedy_never_falls_below_the_best_single_and_stops_where_nothing_rises(rows):
    states = [state(*row) for row in rows]

    def score(soup):
        return -(soup["w"] - 1).square().sum().item()

    soup, chosen, trials = nb.greedy(states, score)
    alone = [score(one) for one in states]
    assert score(soup) >= max(alone) - 1e-6 and len(trials) == len(states)
    assert alone[chosen[0]] == max(alone) and len(set(chosen)) == len(chosen)
    torch.testing.assert_close(soup["w"], torch.stack([states[i]["w"] for i in chosen]).mean(0), atol=1e-4, rtol=1e-5)
    values = [trial["together"] for trial in trials if trial["added"] == "yes"]
    assert values == sorted(set(values)), "only a strict rise is added"
    assert [trial["alone"] for trial in trials] == sorted(alone, reverse=True)


def test_greedy_leaves_out_what_helps_alone_but_not_together():
    states = [state(0.0, 1.0), state(0.0, -1.2), state(5.0, 0.0)]
    soup, chosen, _ = nb.greedy(states, lambda soup: -soup["w"].square().sum().item())
    assert chosen == [0, 1] and soup["w"].tolist() == pytest.approx([0, -0.1])


def test_equal_scores_add_nothing_and_scores_that_are_no_numbers_are_refused():
    states = [state(1.0), state(2.0)]
    assert nb.greedy(states, lambda soup: 5.0)[1] == [0]
    with pytest.raises(ValueError, match="must be finite"):
        nb.greedy(states, lambda soup: float("nan"))


# --- towards the start ---


def test_wise_ft_ends_where_its_models_are_and_keeps_a_new_head():
    before, after = network(0).state_dict(), network(1).state_dict() | {"embedding_head.linear.weight": torch.ones(2)}
    for alpha, end in ((0, before), (1, after)):
        soup = nb.wise_ft(before, after, alpha)
        for key in before:
            if before[key].is_floating_point():
                torch.testing.assert_close(soup[key], end[key])
        assert torch.equal(soup["embedding_head.linear.weight"], torch.ones(2))
    halfway = nb.wise_ft(before, after, 0.5)["0.weight"]
    torch.testing.assert_close(halfway, torch.lerp(before["0.weight"], after["0.weight"], 0.5))


def test_lines_scales_the_change_by_depth_in_each_tower_on_its_own():
    names = [f"visual.transformer.resblocks.{i}.w" for i in range(5)] + [f"transformer.resblocks.{i}.w" for i in (0, 1)]
    after = {name: torch.ones(2) for name in [*names, "visual.proj"]}
    soup = nb.lines({name: torch.zeros(2) for name in after}, after, 0.2)
    assert [round(soup[name][0].item(), 3) for name in after] == [0.2, 0.4, 0.6, 0.8, 1.0, 0.2, 1.0, 0.2]
    stages = ["conv1.w", "layer1.0.w", "layer2.0.w", "layer3.5.w", "fc.w"]
    assert list(nb.depths(stages).values()) == [0, 0, 0.5, 1, 0], "a ResNet's stages are its blocks"
    with pytest.raises(ValueError, match="fewer than two numbered blocks"):
        nb.lines(state(1.0), state(2.0), 0.5)


def test_lines_with_share_one_changes_nothing():
    before, after = (
        {"blocks.0.w": torch.zeros(2), "b": torch.zeros(1)},
        {"blocks.0.w": torch.ones(2), "b": torch.ones(1)},
    )
    assert all(torch.equal(value, after[key]) for key, value in nb.lines(before, after, 1.0).items())


@pytest.mark.parametrize(("degrees", "share"), [(0, 1.0), (60, 2 / 3), (90, 0.0), (120, 0.0)])
def test_model_stock_keeps_of_the_mean_what_two_models_agree_on(degrees, share):
    angle = np.deg2rad(degrees)
    start, one = state(1.0, 2.0), state(2.0, 2.0)
    other = {"w": start["w"] + torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)}
    soup = nb.model_stock([one, other], start)["w"]
    mean = (one["w"] + other["w"]) / 2
    torch.testing.assert_close(soup, start["w"] + share * (mean - start["w"]), atol=1e-5, rtol=1e-5)


def test_model_stock_of_n_models_agrees_with_the_formula_and_with_tensors_that_did_not_move():
    rng = np.random.default_rng(0)
    common = rng.normal(size=500)
    moves = [common + rng.normal(size=500) for _ in range(4)]
    start = {"w": torch.zeros(500), "still": torch.ones(3)}
    states = [{"w": torch.tensor(move, dtype=torch.float32), "still": torch.ones(3)} for move in moves]
    cosine = np.mean([np.corrcoef(a, b)[0, 1] for i, a in enumerate(moves) for b in moves[:i]])
    soup = nb.model_stock(states, start)
    np.testing.assert_allclose(soup["w"], 4 * cosine / (1 + 3 * cosine) * np.mean(moves, axis=0), atol=0.02)
    assert torch.equal(soup["still"], torch.ones(3))


@settings(max_examples=30)
@given(st.integers(2, 6), st.floats(0, 1), st.integers(0, 100))
def test_slerp_follows_the_arc_that_scipy_finds(dimensions, share, seed):
    one, other = np.random.default_rng(seed).normal(size=(2, dimensions))
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    if abs(one @ other) > 0.999:
        return
    ours = nb.slerp({"w": torch.from_numpy(one)}, {"w": torch.from_numpy(other)}, share)["w"]
    np.testing.assert_allclose(ours, geometric_slerp(one, other, share), atol=1e-7)


def test_slerp_of_parallel_or_zero_tensors_is_a_straight_line():
    one, other = {"a": torch.ones(4), "b": torch.zeros(2)}, {"a": 3 * torch.ones(4), "b": torch.ones(2)}
    soup = nb.slerp(one, other)
    assert soup["a"].tolist() == [2.0] * 4 and soup["b"].tolist() == [0.5] * 2


# --- the map, batch norm, small embeddings ---


@given(st.integers(0, 200))
def test_the_map_keeps_the_distances_between_its_three_models(seed):
    states = [network(seed + i).state_dict() for i in range(3)]
    points = nb.corners(states)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(points[i] - points[j]) == pytest.approx(nb.distance(states[i], states[j]), rel=1e-6)


def test_renewed_statistics_are_those_of_the_images_and_models_without_batch_norm_stay(world):
    encoder = gu.load_encoder("mini")
    before = encoder.fingerprint()
    assert nb.renew_statistics(encoder, world) is False and encoder.fingerprint() == before
    layer = torch.nn.BatchNorm2d(3)
    convolution = gu.Encoder(
        "n", encoder.preprocess, torch.nn.Sequential(layer, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    )
    convolution.model = convolution.image_tower
    layer.running_var.fill_(99.0)
    images = world.subset(np.arange(128))
    assert nb.renew_statistics(convolution, images) is True and not layer.training
    pixels = torch.stack([encoder.preprocess(images[i]) for i in range(128)])
    torch.testing.assert_close(layer.running_mean, pixels.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    batches = torch.stack(
        [part.transpose(0, 1).flatten(1).var(1) for part in pixels[np.random.default_rng(0).permutation(128)].split(64)]
    )
    torch.testing.assert_close(layer.running_var, batches.mean(0), atol=1e-3, rtol=2e-2)


def test_directions_are_those_of_pca():
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * np.arange(1, 9)
    found, expected = nb.directions(vectors, 3), PCA(3).fit(vectors).components_.T
    np.testing.assert_allclose(np.abs(found.T @ expected), np.eye(3), atol=1e-4)
    assert nb.directions(vectors[:4], 64).shape == (8, 3), "four points span no more"


def test_the_challenges_measure_looks_no_further_than_there_is_something_to_find():
    vectors = np.array([[0.0], [10], [0.1], [0.2], [0.3], [9], [30]])  # two queries, then a gallery
    labels = np.array([0, 1, 0, 2, 0, 1, 1])
    nb.challenge.__globals__.update(
        half=np.array([False, False, True, True, True, True, True]), test=gu.ImageSet("x", ["a.png"] * 7, labels)
    )
    # query 0 has two to find, of which one is among its first two; query 1 has two: the second lies farthest away
    assert nb.challenge(vectors).per_query.tolist() == [0.5, 0.5]


def test_lists_of_names_are_read_from_text_and_json_once_each_without_blanks(tmp_path):
    for name, content in {
        "a.txt": "cup\n\n lamp \ncup\n",
        "b.json": '["cup", "", "lamp", "lamp "]',
        "c.json": '{"home": ["cup", "lamp"], "again": ["cup"]}',
    }.items():
        (tmp_path / name).write_text(content)
        assert nb.read_names(str(tmp_path / name)) == ["cup", "lamp"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no names: put one on each line"):
        nb.read_names(str(tmp_path / "empty.txt"))
