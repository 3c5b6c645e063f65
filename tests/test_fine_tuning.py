"""The margin, the heads, checkpoints, and `fit`: repeatable, resumable, on one process or two."""

import copy
import functools
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import lift, run_apart, unit
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pytorch_metric_learning.losses import ArcFaceLoss, ProxyAnchorLoss, SubCenterArcFaceLoss
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score
from torchvision import transforms
from train_small import save_random, train_small

import gpnns_utils as gu
from gpnns import evaluation, losses, training, training_data, training_loop
from gpnns.encoders import checkpoints, heads
from gpnns.images import image_set, splitting


def tensors(seed=0, n=32, d=16, classes=10):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(unit(rng, n, d)).requires_grad_(), torch.from_numpy(rng.integers(0, classes, n))


@pytest.fixture(scope="session")
def resnet(tmp_path_factory):
    """The name of a small convolutional encoder with random weights in a file."""
    path = tmp_path_factory.mktemp("resnet") / "resnet.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), path)
    return f"timm:resnet10t@{path}"


# --- the margin ---


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize(("scale", "margin"), [(30, 0.1), (64, 0.5), (20, 0.3), (16, 1.4)])
def test_arc_margin_equals_pytorch_metric_learning_in_value_and_gradient(scale, margin, centers):
    ours = losses.ArcMargin(16, 10, scale, margin, centers)
    settings = {"num_classes": 10, "embedding_size": 16, "margin": math.degrees(margin), "scale": scale}
    theirs = ArcFaceLoss(**settings) if centers == 1 else SubCenterArcFaceLoss(**settings, sub_centers=3)
    theirs.W.data = ours.proxies.data.reshape(-1, 16).T.clone()
    embeddings, labels = tensors()
    with torch.no_grad():  # some embeddings look away from their proxy: the branch past pi - margin is taken too
        embeddings[:8] = -F.normalize(ours.proxies[labels[:8], :16]) + 0.05 * embeddings[:8]
    values, gradients = [], []
    for loss, proxies in ((ours, ours.proxies), (theirs, theirs.W)):
        value = loss(embeddings, labels)
        gradient = torch.autograd.grad(value, [embeddings, proxies])
        values.append(value.item())
        gradients.append((gradient[0], gradient[1].reshape(10, -1) if loss is ours else gradient[1].T.reshape(10, -1)))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1, other.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_embedding_on_its_proxy_or_opposite_to_it_gives_a_finite_loss_and_gradient(dtype, sign):
    loss = losses.ArcMargin(8, 3, 30, 0.5)
    with torch.no_grad():
        loss.proxies.copy_(torch.eye(3, 8))
    embeddings = (sign * torch.eye(3, 8)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss(embeddings, torch.arange(3))
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value)
    assert torch.isfinite(embeddings.grad).all() and torch.isfinite(loss.proxies.grad).all()


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1.5))
def test_a_margin_lowers_every_cosine_and_keeps_their_order(a, b, margin):
    low, high = losses.arc_margin(torch.tensor([min(a, b), max(a, b)]), torch.tensor(margin))
    assert low <= high + 1e-3
    assert low <= min(a, b) + 1e-3 and high <= max(a, b) + 1e-3


def test_without_margin_it_is_the_softmax_of_scaled_cosines():
    loss = losses.ArcMargin(16, 10, 25, 0.0)
    embeddings, labels = tensors()
    expected = F.cross_entropy(25 * embeddings @ F.normalize(loss.proxies).T, labels)
    assert loss(embeddings, labels).item() == pytest.approx(expected.item(), abs=1e-3)


def test_margins_may_differ_by_class():
    margins = np.linspace(0.05, 0.5, 10)
    torch.manual_seed(0)
    loss = losses.ArcMargin(16, 10, 30, margins)
    embeddings, labels = tensors()
    one_by_one = []
    for row, label in enumerate(labels):
        single = losses.ArcMargin(16, 10, 30, float(margins[label]))
        single.proxies = loss.proxies
        one_by_one.append(single(embeddings[row : row + 1], labels[row : row + 1]).item())
    assert loss(embeddings, labels).item() == pytest.approx(np.mean(one_by_one), rel=1e-5)


def test_margins_and_starts_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"margin has the shape \(4,\)"):
        losses.ArcMargin(8, 3, margin=[0.1] * 4)
    with pytest.raises(ValueError, match=r"start has the shape \(1, 8\), not \(3, 8\)"):
        losses.ArcMargin(8, 3, start=np.ones((1, 8)))


@pytest.mark.parametrize("margin", [28.6, 5.7, -0.1, float("nan"), float("inf"), [0.1, 30.0, 0.1]])
def test_a_margin_that_cannot_be_radians_is_refused(margin):
    with pytest.raises(ValueError, match="no angle in radians from 0 to 1.57; 20 degrees are 0.35"):
        losses.ArcMargin(4, 3, margin=margin)


def test_one_class_has_nothing_to_keep_a_margin_from():
    with pytest.raises(ValueError, match="at least two classes"):
        losses.ArcMargin(8, 1)


def test_proxies_start_near_the_class_means_that_they_are_given():
    rng = np.random.default_rng(0)
    means = unit(rng, 6, 8)
    for centers in (1, 3):
        loss = losses.ArcMargin(8, 6, centers=centers, start=means)
        directions = F.normalize(loss.proxies.detach().reshape(6, centers, 8), dim=2).numpy()
        assert (np.einsum("ckd,cd->ck", directions, means) > 0.9).all()
    assert not np.allclose(directions[:, 0], directions[:, 1])


# --- the losses ---


@pytest.fixture(scope="module")
def lesson():
    return lift("03")


def test_the_margin_by_hand_is_the_modules(lesson):
    embeddings, labels = tensors()
    module = losses.ArcMargin(16, 10, 20, 0.3)
    by_hand = lesson.arc_margin_by_hand(embeddings, module.proxies, labels, 20, 0.3)
    assert by_hand.item() == pytest.approx(module(embeddings, labels).item(), rel=1e-5)


def test_proxy_anchor_equals_pytorch_metric_learning():
    embeddings, labels = tensors(classes=6)
    begin = unit(np.random.default_rng(1), 10, 16)
    theirs = ProxyAnchorLoss(num_classes=10, embedding_size=16, margin=0.1, alpha=4)
    theirs.proxies.data = torch.from_numpy(begin.copy())
    values = losses.ProxyAnchor(begin)(embeddings, labels), theirs(embeddings, labels)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    one, other = (torch.autograd.grad(value, embeddings)[0] for value in values)
    assert torch.allclose(one, other, atol=1e-5)


def test_plain_softmax_is_cross_entropy_of_dot_products():
    embeddings, labels = tensors()
    begin = unit(np.random.default_rng(1), 10, 16)
    expected = F.cross_entropy(3 * embeddings @ torch.from_numpy(begin).T, labels)
    assert losses.Softmax(5 * begin)(3 * embeddings, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_rarer_classes_get_wider_margins_between_the_published_bounds():
    """G-Universal-CLIP: t = sqrt(1 / sqrt(count)), scaled to 0.05 ... 0.50."""
    counts = [50, 4, 7, 20]
    t = np.sqrt(1 / np.sqrt(counts))
    assert losses.margins_by_count(counts) == pytest.approx((t - t.min()) / (t.max() - t.min()) * 0.45 + 0.05)
    assert np.isfinite(losses.margins_by_count([10, 10])).all()


# --- many classes ---


def test_a_sampled_step_is_the_full_loss_over_the_classes_drawn_and_touches_no_other():
    loss = losses.ArcMargin(16, 5000, 30, 0.2, sampled=100)
    embeddings, labels = tensors(classes=5000)
    value = loss(embeddings, labels)
    value.backward()
    rows = loss.proxies.grad.any(dim=1).nonzero()[:, 0]
    assert np.isin(labels.numpy(), rows.numpy()).all() and len(rows) <= 132
    small = losses.ArcMargin(16, len(rows), 30, 0.2)
    with torch.no_grad():
        small.proxies.copy_(loss.proxies[rows])
    again = small(embeddings, torch.searchsorted(rows, labels))
    again.backward()
    assert value.item() == pytest.approx(again.item(), rel=1e-6)
    assert torch.allclose(loss.proxies.grad[rows], small.proxies.grad, atol=1e-6)


def test_each_step_draws_other_classes_and_a_copy_draws_the_same():
    first, second = losses.ArcMargin(4, 1000, sampled=20), losses.ArcMargin(4, 1000, sampled=20)
    labels = torch.tensor([3, 5])
    draws = [first.draw(labels)[0] for _ in range(3)]
    assert len(draws[0]) != len(draws[1]) or not torch.equal(draws[0], draws[1])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.draw(labels)[0], second.draw(labels)[0])


def test_validation_compares_with_all_classes():
    loss = losses.ArcMargin(16, 300, sampled=5)
    full = losses.ArcMargin(16, 300)
    full.load_state_dict(loss.state_dict())
    embeddings, labels = tensors(classes=300)
    assert loss.eval()(embeddings, labels).item() == full(embeddings, labels).item()


# --- data ---


def test_class_means_are_means():
    embeddings, labels = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32), np.arange(40) % 7 + 3
    expected = np.stack([embeddings[labels == label].mean(0) for label in range(3, 10)])
    assert np.allclose(losses.class_means(embeddings, labels), expected, atol=1e-6)


def test_classes_with_one_image_are_never_cut_off_to_measure_on():
    labels = np.array([*range(10), *[10] * 3, *[11] * 3, *[12] * 3])
    images = gu.ImageSet("some", np.zeros((len(labels), 4, 4, 3), np.uint8), labels)
    for seed in range(20):
        assert set(splitting.split_classes(images, 0.1, seed)[1].labels) <= {10, 11, 12}
    with pytest.raises(ValueError, match="with two images or more"):
        splitting.split_classes(images.subset(labels < 11), 0.1)


@given(st.integers(4, 40), st.floats(0.01, 0.9), st.integers(0, 5))
def test_split_classes_shares_no_class_and_loses_no_image(classes, share, seed):
    images = gu.ImageSet("some", np.zeros((3 * classes, 4, 4, 3), np.uint8), np.repeat(np.arange(classes), 3))
    if classes - max(2, round(share * classes)) < 2:
        with pytest.raises(ValueError, match="add classes"):
            splitting.split_classes(images, share, seed)
        return
    kept, held = splitting.split_classes(images, share, seed)
    assert not set(kept.labels) & set(held.labels) and len(kept) + len(held) == len(images)
    assert len(set(held.labels)) == max(2, round(share * classes))


def shop(top, **parts):
    """A folder for each part: {part: {class: numbers of its pictures}}; a picture is a colour of its class and number."""
    for part, classes in parts.items():
        for label, numbers in classes.items():
            for i in numbers:
                path = top / part / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), (ord(label[0]) * 2 - 100, 10 * i, 90)).save(path)
    return top


def test_in_the_drawn_world_texts_ask_for_other_things_than_images_do():
    splits = splitting.load_splits("mini")
    assert [splits.text_validation.name, splits.text_test.name] == ["mini captions_validation", "mini captions"]
    assert [part.name for part in splits.open_sets()] == ["mini train", "mini validation", "mini test"]
    texts, relevant = image_set.text_queries(splits.text_test)
    assert len(texts) == 2400 and {len(rows) for rows in relevant} == {1}


def test_other_classes_are_an_open_question_in_which_images_search_each_other(tmp_path, capsys):
    top = shop(tmp_path, train={c: range(3) for c in "abcdefghij"}, test={c: range(3) for c in "xyz"})
    for splits in (splitting.load_splits(top / "train", top / "test"), splitting.load_splits(top)):
        assert (
            splits.question == "open" and splits.test[0] is splits.test[1] and splits.test[0].names == ["x", "y", "z"]
        )
        assert (
            splits.validation[0] is splits.validation[1] and len(splits.validation[0]) == 6 and len(splits.train) == 24
        )
        asked = image_set.text_queries(splits.text_test)
        assert asked[0] == ["x", "y", "z"] and [len(rows) for rows in asked[1]] == [3, 3, 3], "names of classes ask"
        assert splits.test[0].captions is None and len(splits.text_validation) == 6
        train, validation, test = splits.open_sets()
        named = [{images.names[label] for label in images.labels} for images in (train, validation, test)]
        assert not (named[0] & named[1] or named[0] & named[2])
    assert capsys.readouterr().out.count("the question is open: 3 classes that are not trained on") == 2


def test_other_pictures_of_the_same_classes_are_a_closed_question_in_which_they_search_what_is_trained_on(
    tmp_path, capsys
):
    top = shop(tmp_path, train={c: range(5) for c in "abcdefgh"}, test={c: (7, 9) for c in "bdh"})
    splits = splitting.load_splits(top / "train", top / "test")
    assert splits.question == "closed"
    (chosen, catalogue), (queries, gallery) = splits.validation, splits.test
    assert catalogue is gallery is splits.train and len(gallery) == 36 and len(chosen) == 4 and len(queries) == 6
    assert [queries.names[label] for label in queries.labels] == ["b", "b", "d", "d", "h", "h"]
    assert [gallery.names[label] for label in gallery.labels[[0, -1]]] == ["a", "h"], "labels mean the same classes"
    assert not set(chosen.images) & set(gallery.images)
    said = capsys.readouterr().out
    assert (
        "the question is closed: 6 other images of classes that are trained on; they search the 36 training images"
        in said
    )
    encoder = gu.load_encoder("pixels", "cpu")
    encoder.image_tower = lambda batch: batch.flatten(1)  # the color itself
    scores = gu.embed_images(encoder, queries, cache=False)[0] @ gu.embed_images(encoder, gallery, cache=False)[0].T
    precisions = [
        average_precision_score(gallery.labels == own, row) for own, row in zip(queries.labels, scores, strict=True)
    ]
    found = evaluation.evaluate(encoder, *splits.test)["image to image"]
    np.testing.assert_allclose(found.per_query, precisions, atol=1e-6)
    with pytest.raises(
        ValueError, match="test shows the classes that are trained on.*closed.*give images of other classes"
    ):
        splits.open_sets()


@pytest.mark.parametrize("around", ["", "archive/data"])
def test_a_folder_with_all_three_splits_brings_its_own(tmp_path, capsys, around):
    outer, tmp_path = tmp_path, tmp_path / around
    shop(tmp_path, train={c: range(3) for c in "abcd"}, val={c: [4] for c in "ab"}, test={c: [5] for c in "abcd"})
    splits = splitting.load_splits(outer)
    assert splits.question == "closed" and [len(part[0]) for part in (splits.validation, splits.test)] == [2, 4]
    assert len(splits.train) == 12 and splits.validation[1] is splits.train
    shop(tmp_path, val={"x": [4]})
    assert len(splitting.load_splits(outer).train) == 10, "a validation that mixes both questions is not used"
    assert f"{outer.name} validation does not ask the same (closed) as {outer.name} test" in capsys.readouterr().out


def test_queries_and_a_gallery_of_one_s_own_are_the_test(tmp_path, capsys):
    parts = {"query": {"x": [1], "z": [1]}, "gallery": {c: (2, 3) for c in "xyz"}}
    splits = splitting.load_splits(shop(tmp_path, train={c: range(3) for c in "abcdefgh"}, **parts))
    queries, gallery = splits.test
    assert splits.question == "open" and (len(queries), len(gallery)) == (2, 6) and queries.labels.tolist() == [0, 2]
    assert "2 classes that are not trained on; they search 6 images of their own" in capsys.readouterr().out
    shop(tmp_path, query={"y": [2]})
    with pytest.raises(ValueError, match="1 of 3 images of .* query are also in .* gallery"):
        splitting.load_splits(tmp_path)


def test_test_pictures_under_another_label_are_not_trained_on_and_test_classes_do_not_choose(tmp_path, capsys):
    parts = {"val": {c: [5, 6] for c in "wx"}, "test": {c: range(3) for c in "xyz"}}
    top = shop(tmp_path, train={c: range(3) for c in "abcdefgh"}, **parts)
    (top / "train" / "a" / "copy.png").write_bytes((top / "test" / "y" / "1.png").read_bytes())
    splits = splitting.load_splits(top)
    said = capsys.readouterr().out
    assert "1 of 9 images of" in said and "under other labels; they are taken out of it" in said
    assert "must not choose, and is left aside" in said
    assert len(splits.train) + len(splits.validation[0]) == 24
    assert not [path for path in splits.train.images if path.stem == "copy"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"train": {"a": [1, 2], "b": [1, 2]}, "test": {"a": [3], "x": [3]}},
            "1 of the 2 classes of test are trained on",
        ),
        ({"train": {"a": [1, 2], "b": [1, 2]}, "test": {"a": [2, 3]}}, "1 of 2 images of test are also in train"),
        ({"train": {"a": [1], "b": [1]}, "test": {"a": [2]}}, "one image for nearly every class"),
        ({"train": {"a": [1, 2], "b": [1, 2]}, "test": {"x": [1], "y": [2]}}, "two classes with two images each"),
    ],
)
def test_a_test_that_asks_two_things_or_shows_what_is_trained_on_is_refused(tmp_path, parts, message):
    shop(tmp_path, **parts)
    with pytest.raises(ValueError, match=message):
        splitting.load_splits(tmp_path / "train", tmp_path / "test")


def test_training_needs_labels_and_two_classes_and_readable_files(folder):
    encoder = gu.load_encoder("random")
    transform = training_data.make_training_transform(encoder)
    images = gu.load_images(folder)
    with pytest.raises(ValueError, match="only one class"):
        training_data.TrainingImages(images.subset(images.labels == 0), transform)
    (folder / "red" / "0.png").write_bytes(b"broken")
    dataset = training_data.TrainingImages(images, transform)
    assert dataset[0][0].shape == (3, 48, 48)
    with pytest.raises(ValueError, match="cannot read .*red/0.png.*embed_images"):
        dataset[8]
    images.labels = None
    with pytest.raises(ValueError, match="no labels"):
        training_data.TrainingImages(images, transform)


def test_training_views_differ_between_epochs_but_not_between_runs(folder):
    images = gu.load_images(folder)
    encoder = gu.load_encoder("random")
    views = training_loop.Repeatable(
        training_data.TrainingImages(images, training_data.make_training_transform(encoder)), seed=3
    )
    torch.manual_seed(5)
    state = torch.get_rng_state()
    (_, (one, _)), (_, (again, _)), (_, (later, _)) = views[0, 1], views[0, 1], views[1, 1]
    assert torch.equal(one, again) and not torch.equal(one, later)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_cover_each_epoch_once_and_a_resumed_run_sees_the_same():
    everything = list(training_loop.draw_batches(50, 8, 0, 18, 0, None, 0, 1))
    for epoch in range(3):
        rows = [row for batch in everything[6 * epoch : 6 * epoch + 6] for _, row in batch]
        assert len(set(rows)) == 48
    assert list(training_loop.draw_batches(50, 8, 7, 18, 0, None, 0, 1)) == everything[7:]
    halves = [list(training_loop.draw_batches(50, 8, 0, 18, 0, None, part, 2)) for part in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in everything]


def test_balanced_batches_draw_classes_equally_often():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    keys = [key for batch in training_loop.draw_batches(1000, 100, 0, 30, 0, labels, 0, 1) for key in batch]
    assert np.bincount(labels[[row for _, row in keys]]) == pytest.approx(1000, rel=0.1)
    assert len(set(keys)) == len(keys), "an image that is drawn again is shown in another view"


# --- heads, parameters, checkpoints ---


def test_before_projection_the_embedding_is_what_clip_would_project(resnet):
    encoder = gu.load_encoder("random")
    before = heads.add_head(encoder, before_projection=True)
    batch = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(
            before.image_tower(batch) @ encoder.model.visual.proj, encoder.image_tower(batch), atol=1e-5
        )
    assert not before.has_text and encoder.model.visual.proj is not None
    both = heads.add_head(before, 8)
    assert both.origin["before_projection"] and both.dim == 8
    with pytest.raises(ValueError, match="already has a head"):
        heads.add_head(both, 4)
    with pytest.raises(ValueError, match="no projection"):
        heads.add_head(gu.load_encoder(resnet), before_projection=True)


def test_multi_sample_dropout_is_the_plain_linear_map_once_training_is_over():
    head = heads.EmbeddingHead(16, 4)
    features = torch.randn(5, 16)
    assert not torch.equal(head.train()(features), head(features))
    assert torch.equal(head.eval()(features), head.linear(features))
    still = heads.EmbeddingHead(16, 4, dropout=0, samples=(0, 0)).train()
    assert torch.allclose(still(features), still.linear(features), atol=1e-6)
    many = torch.stack([head.train()(features) for _ in range(4000)]).mean(0)
    assert torch.allclose(many, head.linear(features), atol=0.1), "dropout does not change the mean"


def test_rates_fall_with_depth_and_every_parameter_of_the_image_tower_is_in_one_group():
    encoder = gu.load_encoder("random")
    groups = training.select_image_parameters(encoder, 1e-3, layer_decay=0.5)
    scale = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    names = dict(encoder.model.visual.named_parameters())
    assert len(scale) == len(names) == sum(len(group["params"]) for group in groups)
    depth = {key: scale[id(value)] for key, value in names.items()}
    for key in ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight"):
        assert depth[key] == 0.5**5, key
    for block in range(4):
        assert {depth[key] for key in names if f"resblocks.{block}." in key} == {0.5 ** (4 - block)}
    assert depth["ln_post.weight"] == depth["proj"] == 1
    assert all(group["lr"] == 1e-3 for group in groups)
    flat = {id(value) for group in groups if group["weight_decay"] == 0 for value in group["params"]}
    assert flat == {id(value) for value in names.values() if value.ndim <= 1}


def test_patches_are_dropped_in_training_only_and_only_where_there_are_any(resnet):
    encoder = gu.load_encoder("random")
    batch = torch.randn(2, 3, 48, 48)
    before = encoder.features(encoder.image_tower, batch)
    assert training.drop_patches(encoder, 0.5)
    assert np.array_equal(encoder.features(encoder.image_tower, batch), before)
    encoder.model.train()
    assert not np.allclose(encoder.features(encoder.image_tower, batch), before)
    assert not training.drop_patches(gu.load_encoder(resnet), 0.5)


def test_towers_of_other_kinds_are_trained_without_tricks_that_they_do_not_know():
    resnet = open_clip.modified_resnet.ModifiedResNet((1, 1, 1, 1), 16, 2, 64, 8)
    encoder = SimpleNamespace(name="RN", model=SimpleNamespace(visual=resnet), origin={})
    (values,) = [{id(v) for group in training.select_image_parameters(encoder, 1e-3) for v in group["params"]}]
    assert values == {id(value) for value in resnet.parameters()}
    with pytest.raises(ValueError, match="choose layer_decay=1"):
        training.select_image_parameters(encoder, 1e-3, layer_decay=0.9)
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, num_classes=0)
    assert not training.drop_patches(SimpleNamespace(name="eva", model=eva), 0.5)
    assert eva.train()(torch.randn(2, 3, 28, 28)).shape == (2, 192)


def test_image_parameters_know_timm_models_and_heads(resnet):
    encoder = gu.load_encoder(resnet)
    groups = training.select_image_parameters(encoder, 1e-3, layer_decay=0.5)
    scale = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    names = dict(encoder.model.named_parameters())
    assert len(scale) == len(names)
    assert scale[id(names["conv1.0.weight"])] < scale[id(names["layer4.0.conv1.weight"])]
    headed = heads.add_head(gu.load_encoder("random"), dim=8, before_projection=True)
    groups = training.select_image_parameters(headed, 1e-3)
    values = {id(value) for group in groups for value in group["params"]}
    assert id(headed.model.visual.proj) not in values
    assert id(headed.model.embedding_head.linear.weight) not in values, "it is new and has a rate of its own"
    assert len(values) == len(list(headed.model.visual.parameters())) - 1


def test_a_checkpoint_keeps_the_name_it_is_given(tmp_path):
    encoder = gu.load_encoder("mini")
    paths = [checkpoints.save_checkpoint(encoder, tmp_path / f"margin{margin}") for margin in (0.1, 0.3)]
    assert [path.name for path in paths] == ["margin0.1.safetensors", "margin0.3.safetensors"]
    assert (tmp_path / "margin0.1.json").exists()
    with pytest.raises(ValueError, match="no weights to save"):
        checkpoints.save_checkpoint(gu.load_encoder("pixels"), tmp_path / "pixels")


@pytest.mark.parametrize(("dim", "before"), [(None, False), (None, True), (8, False), (8, True)])
def test_a_checkpoint_restores_the_encoder_and_its_towers_load_into_plain_open_clip(tmp_path, dim, before):
    encoder = gu.load_encoder("mini")
    with torch.no_grad():
        for value in encoder.model.visual.parameters():
            value.add_(0.01)
    headed = heads.add_head(encoder, dim, before) if dim or before else encoder
    path = checkpoints.save_checkpoint(headed, tmp_path / "tuned", loss="arcmargin", epochs=3)
    assert path == tmp_path / "tuned.safetensors"
    again = gu.load_encoder(f"mini@{path}")
    batch = torch.randn(3, 3, 48, 48)
    assert np.array_equal(again.features(again.image_tower, batch), headed.features(headed.image_tower, batch))
    assert again.has_text == (not dim and not before) and again.dim == headed.dim
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["loss"] == "arcmargin" and about["load"] == "load_encoder('mini@tuned.safetensors')"
    plain = open_clip.create_model(f"local-dir:{gu.DATA / 'mini_clip'}", load_weights=False)
    state = load_file(path)
    tower = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    plain.visual.load_state_dict(tower, strict=True)
    if not dim:
        plain.load_state_dict(state, strict=True)


def test_the_shipped_fine_tuning_gains_ten_points_over_its_start_and_keeps_the_text_tower():
    images = gu.load_images("mini", "test")
    start, tuned = gu.load_encoder("mini"), gu.load_encoder(f"mini@{gu.DATA}/mini_tuned/arcmargin.safetensors")
    before, after = (evaluation.evaluate(one, images)["image to image"].mean for one in (start, tuned))
    assert after > before + 0.10
    assert all(
        torch.equal(a, b) for a, b in zip(*(e.model.transformer.parameters() for e in (start, tuned)), strict=True)
    )


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_earlier_one(tmp_path):
    encoder = gu.load_encoder("mini")
    path = checkpoints.save_checkpoint(encoder, tmp_path / "tuned.safetensors")
    before = path.read_bytes()
    result = run_apart(save_random, path, 10**6, folder=tmp_path / "said")
    assert result.returncode == 1
    assert "OSError: could not write" in result.stderr and "MB free" in result.stderr
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["said", "tuned.json", "tuned.safetensors"], "no leftovers"


# --- fit ---


class Line(torch.nn.Module):
    """A line through points: the smallest thing that can be fitted."""

    def __init__(self):
        super().__init__()
        self.line, self.frozen = torch.nn.Linear(2, 1), torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
        self.seen = []

    def forward(self, x, y):
        if self.training:
            self.seen.append(len(x))
        return F.mse_loss(self.line(self.frozen(x))[:, 0], y)


class LinePoints(torch.utils.data.Dataset):
    def __init__(self, n=64, broken=None):
        self.x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
        self.y = self.x @ torch.tensor([2.0, -1.0]) + 0.5
        if broken is not None:
            self.y[broken] = float("nan")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.y[row]

    def describe(self):
        return self.x.numpy().tobytes() + self.y.numpy().tobytes()


def fit_line(folder, dataset=None, seed=0, **settings):
    torch.manual_seed(0)
    objective = Line()
    groups = [{"params": objective.line.parameters(), "lr": 0.1}]
    log = training_loop.fit(
        objective, dataset or LinePoints(), folder, groups, **{"epochs": 20, "batch_size": 16, "seed": seed} | settings
    )
    return objective, log


def test_fit_finds_a_line_and_leaves_frozen_parts_alone(tmp_path):
    objective, log = fit_line(tmp_path)
    assert log[-1]["loss"] < 0.01 < log[0]["loss"]
    assert objective.line.weight.detach().numpy().ravel() == pytest.approx([2, -1], abs=0.05)
    assert objective.frozen[0].num_batches_tracked == 0, "a frozen module stays in evaluation mode"
    assert log[-1]["step"] == 80 and {"epoch", "rate", "gradient", "images_per_second"} <= log[-1].keys()
    (written,) = tmp_path.glob("*/log.jsonl")
    assert [json.loads(line) for line in written.read_text().splitlines()] == log


def test_batch_norm_learns_its_weights_and_keeps_its_statistics(tmp_path):
    """New statistics, of few images of one kind, undo what a pretrained network knows."""
    encoder = gu.load_encoder("efficientnet_lite0:64")
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    rng = np.random.default_rng(0)
    images = gu.ImageSet("noise", rng.integers(0, 256, (24, 64, 64, 3), dtype=np.uint8), np.arange(24) // 4)
    training.fine_tune(encoder, images, images, tmp_path, epochs=1.0, batch_size=8, rate=1e-3)
    after = encoder.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "bn1.weight" in moved and not {name for name in moved if "running" in name or "tracked" in name}


def test_the_rate_warms_up_and_falls_on_a_cosine(tmp_path):
    _, log = fit_line(tmp_path, warmup=8)
    rates = [row["rate"] for row in log]
    assert rates[:8] == pytest.approx([0.1 * step / 8 for step in range(8)])
    assert rates[8:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 80)) for step in range(8, 80)])


def test_the_cosine_may_end_above_zero(tmp_path):
    _, log = fit_line(tmp_path, lr_min=0.02)
    expected = [0.02 + 0.04 * (1 + math.cos(math.pi * step / 80)) for step in range(80)]
    assert [row["rate"] for row in log] == pytest.approx(expected)


def test_the_same_call_repeats_bit_for_bit_and_another_seed_does_not(tmp_path):
    one, _ = fit_line(tmp_path / "a", epochs=3)
    same, _ = fit_line(tmp_path / "b", epochs=3)
    other, _ = fit_line(tmp_path / "c", epochs=3, seed=1)
    assert torch.equal(one.line.weight, same.line.weight)
    assert not torch.equal(one.line.weight, other.line.weight)


def test_a_finished_training_is_read_back_and_other_settings_train_anew(tmp_path):
    one, log = fit_line(tmp_path, epochs=3)
    again, same_log = fit_line(tmp_path, epochs=3)
    assert again.seen == [] and torch.equal(one.line.weight, again.line.weight) and same_log == log
    longer, _ = fit_line(tmp_path, epochs=4)
    assert len(longer.seen) == 16 and len(list(tmp_path.iterdir())) == 2
    other = LinePoints()
    other.y += 1
    fresh, _ = fit_line(tmp_path, other, epochs=3)
    assert len(fresh.seen) == 12, "other data are not mistaken for the same training"


class Doubled(training.ImageObjective):
    """Another loss that has the name and the settings of the first: only its value tells."""

    def forward(self, images, labels):
        return 2 * super().forward(images, labels)


Doubled.__name__ = "ImageObjective"


def test_whatever_decides_what_is_learned_makes_another_training(tmp_path, folder):
    images = gu.load_images(folder)

    def train(change):
        torch.manual_seed(0)
        encoder = gu.load_encoder("random")
        settings = {"epochs": 1, "batch_size": 4, "balanced": False}
        photos = images.subset(np.arange(len(images)))
        flip, kind, scale = 0.5, training.ImageObjective, 30.0
        if change == "patches":
            training.drop_patches(encoder, 0.5)
        if change == "labels":
            photos.labels[[3, 4]] = photos.labels[[4, 3]]
        if change == "view":
            flip = 0.51
        if change == "images":
            photos.images = photos.images[::-1]
        if change == "weights":
            with torch.no_grad():
                encoder.model.visual.proj.mul_(1.01)
        if change == "scale":
            scale = 31.0
        if change == "code":
            kind = Doubled
        if change == "balanced":
            settings["balanced"] = True
        data = training_data.TrainingImages(photos, training_data.make_training_transform(encoder, flip))
        objective = kind(encoder, losses.ArcMargin(encoder.dim, 3, scale))
        groups = training.select_image_parameters(encoder, 1e-4)
        if change == "fewer":
            groups = [group | {"params": group["params"][1:]} for group in groups]
        training_loop.fit(objective, data, tmp_path / "runs", groups, **settings)
        return len(list((tmp_path / "runs").iterdir()))

    changes = ["", "patches", "labels", "view", "images", "weights", "scale", "code", "balanced", "fewer"]
    assert [train(change) for change in changes] == list(range(1, 11))
    assert train("") == 10, "the first is recognised"


def test_pictures_replaced_under_their_names_train_anew_and_renamed_ones_do_not(tmp_path, folder):
    def train():
        torch.manual_seed(0)
        encoder = gu.load_encoder("random", "cpu")
        data = training_data.TrainingImages(gu.load_images(folder), encoder.preprocess)
        objective = training.ImageObjective(encoder, losses.ArcMargin(encoder.dim, 3))
        training_loop.fit(
            objective, data, tmp_path / "runs", training.select_image_parameters(encoder, 1e-4), batch_size=6
        )
        return len(list((tmp_path / "runs").iterdir()))

    assert [train(), train()] == [1, 1]
    for label, other in (("blue", "red"), ("red", "green")):
        for i in range(1, 3):  # the first, some of which the key embeds, stay as they are
            replaced, times = folder / label / f"{i}.png", (folder / label / f"{i}.png").stat()
            replaced.write_bytes((folder / other / f"{i + 1}.png").read_bytes())
            os.utime(replaced, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [train(), train()] == [2, 2]
    folder.rename(folder.with_name("moved"))
    folder = folder.with_name("moved")
    assert train() == 2, "the same pictures elsewhere are the same training"


def test_training_in_stages_is_calling_fit_twice(tmp_path):
    torch.manual_seed(0)
    objective = torch.nn.Module()
    objective.tower, objective.loss = torch.nn.Linear(2, 4), losses.ArcMargin(4, 20, sampled=3)
    objective.forward = lambda x, y: objective.loss(objective.tower(x), (y.abs() * 5).long().clamp(max=19))
    first = copy.deepcopy(objective.state_dict())
    proxies = [{"params": objective.loss.parameters(), "lr": 0.1}]
    training_loop.fit(objective, LinePoints(), tmp_path, proxies, batch_size=16)
    between = copy.deepcopy(objective.state_dict())
    assert torch.equal(first["tower.weight"], between["tower.weight"])
    assert not torch.equal(first["loss.proxies"], between["loss.proxies"])
    training_loop.fit(
        objective, LinePoints(), tmp_path, [{"params": objective.tower.parameters(), "lr": 0.1}], batch_size=16
    )
    assert torch.equal(between["loss.proxies"], objective.loss.proxies)
    assert not torch.equal(between["tower.weight"], objective.tower.weight)


def test_each_child_of_the_objective_is_clipped_to_its_own_norm():
    """As in GP-NNS: the proxies' large gradients do not take the encoder's share."""
    objective = torch.nn.ModuleDict(
        {"tower": torch.nn.Linear(4, 4, bias=False), "loss": torch.nn.Linear(4, 4, bias=False)}
    )
    for child, size in zip(objective.children(), (0.1, 100.0), strict=True):
        child.weight.grad = torch.full((4, 4), size)
    assert training_loop.clip_gradients(Accelerator(cpu=True), objective, 1.0).item() == pytest.approx(400)
    norms = [child.weight.grad.norm().item() for child in objective.children()]
    assert norms == pytest.approx([0.4, 1.0], rel=1e-4)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    large, _ = fit_line(tmp_path / "a", epochs=2, batch_size=32)
    small, log = fit_line(tmp_path / "b", epochs=2, batch_size=16, accumulate=2)
    assert log[-1]["step"] == 4 and len(small.seen) == 8
    assert torch.allclose(large.line.weight, small.line.weight, atol=1e-6)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(tmp_path, monkeypatch):
    """Adam hides the size of a gradient, so plain gradient descent takes its place: a step is rate x clip at most."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    torch.manual_seed(0)
    start = Line().line.weight.detach().clone()
    objective, log = fit_line(tmp_path, epochs=0.25, clip=0.01)
    assert log[-1]["gradient"] > 0.1
    step = torch.cat([(objective.line.weight - start).flatten()]).norm().item()
    assert 0 < step <= 0.1 * 0.01 * 1.001


def test_the_average_of_the_weights_is_what_is_kept(tmp_path):
    weights = []
    torch.manual_seed(0)
    objective = Line()
    expected = objective.line.weight.detach().clone()

    def watch():
        weights.append(objective.line.weight.detach().clone())
        return float(len(weights))

    groups = [{"params": objective.line.parameters(), "lr": 0.1}]
    training_loop.fit(
        objective, LinePoints(), tmp_path / "a", groups, epochs=1, batch_size=16, validate=watch, validate_every=1
    )
    for weight in weights:
        expected = 0.7 * expected + 0.3 * weight
    average, _ = fit_line(tmp_path / "b", epochs=1, ema=0.7)
    assert len(weights) == 4 and torch.allclose(average.line.weight, expected, atol=1e-6)


def test_the_best_validated_weights_are_kept(tmp_path):
    seen, scores = [], iter([10.0, 50.0, 30.0, 20.0])
    torch.manual_seed(0)
    objective = Line()

    def validate():
        assert not objective.training
        seen.append(objective.line.weight.detach().clone())
        return next(scores)

    groups = [{"params": objective.line.parameters(), "lr": 0.1}]
    log = training_loop.fit(objective, LinePoints(), tmp_path, groups, epochs=4, batch_size=16, validate=validate)
    assert [row["validation"] for row in log if "validation" in row] == [10, 50, 30, 20]
    assert torch.equal(objective.line.weight, seen[1])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(tmp_path):
    rows = [row for _, row in list(training_loop.draw_batches(64, 16, 0, 8, 0, None, 0, 1))[6]]
    seen_before = {
        row for batch in list(training_loop.draw_batches(64, 16, 0, 6, 0, None, 0, 1))[4:] for _, row in batch
    }
    broken = next(row for row in rows if row not in seen_before)

    class LateTrouble(LinePoints):
        reads = 0

        def __getitem__(self, row):
            self.reads += 1
            x, y = super().__getitem__(row)
            return x, y * float("nan") if row == broken and self.reads > 80 else y

    with pytest.raises(FloatingPointError, match=rf"loss became \[nan\] at step 7, .*{broken}.*step_00000006") as error:
        fit_line(tmp_path, LateTrouble(), epochs=4, save_every=2)
    assert str(rows[:3])[1:-1] in str(error.value)
    (kept,) = tmp_path.glob("*/step_*")
    assert kept.name == "step_00000006"


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="64 images do not fill one step of 1 x 128"):
        fit_line(tmp_path, batch_size=128)
    objective = Line()
    with pytest.raises(ValueError, match="nothing to train"):
        training_loop.fit(objective, LinePoints(), tmp_path, [{"params": [], "lr": 0.1}], batch_size=16)
    with pytest.raises(ValueError, match="no weights to train"):
        training.ImageObjective(gu.load_encoder("pixels"), losses.ArcMargin(768, 3))


# --- fit, in processes of its own ---


def train(folder, out, check=True, ranks=1, **options):
    result = run_apart(functools.partial(train_small, folder, out, **options), folder=out.parent / "said", ranks=ranks)
    assert result.returncode == 0 or not check, result.stderr[-3000:]
    return result


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_weights(tmp_path):
    options = {"dropout": 0.3, "ema": 0.9, "sampled": 4}
    train(tmp_path / "whole", tmp_path / "whole.safetensors", **options)
    for death in ({"kill_at_item": 30}, {"kill_at_item": 150}, {"kill_while_saving": True}):
        result = train(tmp_path / "cut", tmp_path / "cut.safetensors", **options, **death, check=False)
        assert result.returncode == -9, result.stderr
    result = train(tmp_path / "cut", tmp_path / "cut.safetensors", **options)
    assert "steps 9" in result.stdout
    whole, cut = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "cut.safetensors")
    assert whole.keys() == cut.keys()
    for key in whole:
        if key != "losses":  # the first mean after a resumption is over fewer steps
            assert torch.equal(whole[key], cut[key]), key


@pytest.mark.slow
def test_fifty_kills_at_fifty_moments_change_no_bit(tmp_path):
    options = {"dropout": 0.3, "ema": 0.9}
    train(tmp_path / "whole", tmp_path / "whole.safetensors", **options)
    for item in np.random.default_rng(0).integers(9, 110, 50).tolist():
        train(tmp_path / "cut", tmp_path / "cut.safetensors", **options, kill_at_item=item, check=False)
    train(tmp_path / "cut", tmp_path / "cut.safetensors", **options)
    whole, cut = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "cut.safetensors")
    assert all(torch.equal(whole[key], cut[key]) for key in whole if key != "losses")


def test_a_full_disk_stops_training_with_a_message_and_keeps_the_earlier_checkpoint(tmp_path):
    train(tmp_path / "run", tmp_path / "out", kill_at_item=150, check=False)
    (kept,) = (tmp_path / "run").glob("*/step_*")
    result = train(tmp_path / "run", tmp_path / "out", largest_file=2000, check=False)
    assert result.returncode == 1 and "OSError: could not write" in result.stderr and "MB free" in result.stderr
    assert [p.name for p in (tmp_path / "run").glob("*/step_*")] == [kept.name]
    assert not list((tmp_path / "run").glob("*/partial"))
    assert "finished" in train(tmp_path / "run", tmp_path / "out").stdout


def test_half_precision_keeps_float32_weights_and_trains_about_the_same(tmp_path):
    train(tmp_path / "full", tmp_path / "full.safetensors")
    train(tmp_path / "half", tmp_path / "half.safetensors", bfloat16=True)
    full, half = load_file(tmp_path / "full.safetensors"), load_file(tmp_path / "half.safetensors")
    weights = full["tower.0.weight"], half["tower.0.weight"]
    assert weights[1].dtype == torch.float32 and not torch.equal(*weights)
    assert torch.allclose(full["losses"], half["losses"], rtol=0.05)


class Described(torch.utils.data.TensorDataset):
    def describe(self):
        return b"".join(values.numpy().tobytes() for values in self.tensors)


class Tower(torch.nn.Module):
    """A tower of one layer and ArcMargin."""

    def __init__(self):
        super().__init__()
        self.tower, self.loss = torch.nn.Linear(10, 8), losses.ArcMargin(8, 12, 10, 0.1)

    def forward(self, points, labels):
        return self.loss(self.tower(points), labels)


@pytest.fixture
def forked(monkeypatch):
    """`fit_in_processes` with processes that need not import everything anew."""
    start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)


def test_several_processes_train_for_a_notebook_and_leave_it_the_weights_of_one(tmp_path, forked):
    points = torch.randn(96, 10, generator=torch.Generator().manual_seed(0))
    data = Described(points, torch.arange(96) % 12)
    weights, logs = [], []
    for processes in (1, 2):
        torch.manual_seed(1)
        objective = Tower()
        groups = [{"params": objective.parameters(), "lr": 1e-2}]  # a generator, as modules give it
        settings = {"epochs": 3, "batch_size": 16, "validate": lambda: objective.tower.weight.abs().sum().item() % 7}  # noqa: B023
        logs.append(
            training_loop.fit_in_processes(objective, data, tmp_path / str(processes), groups, processes, **settings)
        )
        weights.append(objective.state_dict())
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for key, value in weights[0].items():
        assert torch.allclose(value, weights[1][key], atol=1e-5), key


def test_what_goes_wrong_in_a_process_is_said_in_the_notebook(tmp_path, forked):
    objective = Tower()
    data = Described(torch.full((96, 10), torch.nan), torch.arange(96) % 12)
    with pytest.raises(Exception, match="the loss became .*nan.*Look at those images, or lower the rates"):
        training_loop.fit_in_processes(
            objective, data, tmp_path, [{"params": objective.parameters(), "lr": 1e-2}], 2, batch_size=16
        )


def test_nodes_that_share_no_folder_stop_before_the_first_step(tmp_path):
    result = train(tmp_path / "node", tmp_path / "out", ranks=2, folder_of_its_own=True, check=False)
    assert result.codes == [1, 1], "none is left waiting"
    assert "processes [1] do not see what process 0 writes to" in result.stderr
    assert "choose a folder that all nodes share" in result.stderr
    assert not list(tmp_path.rglob("step_*")) and not list(tmp_path.rglob("log.jsonl"))


@pytest.mark.parametrize("sampled", [None, 5])
def test_two_processes_give_the_weights_of_one_with_the_same_global_batch(tmp_path, sampled):
    train(tmp_path / "one", tmp_path / "one.safetensors", sampled=sampled)
    result = train(tmp_path / "two", tmp_path / "two.safetensors", sampled=sampled, ranks=2)
    assert "items read 152; validations 3" in result.stdout, "half of the items, and the probe of eight"
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    for key in one:
        assert torch.allclose(one[key].float(), two[key].float(), atol=1e-4), key


def test_a_run_whose_checkpoints_come_before_its_first_row_of_the_log_goes_on(tmp_path):
    assert training_loop.resume(SimpleNamespace(load_state=lambda folder: None), tmp_path) == (0, [])
    (tmp_path / "step_00000300").mkdir()
    assert training_loop.resume(SimpleNamespace(load_state=lambda folder: None), tmp_path) == (300, [])


def test_a_part_that_is_frozen_has_no_gradient_to_clip():
    """Its norm would lie on the CPU, whatever the device of the others."""
    objective = torch.nn.ModuleDict({"tower": torch.nn.Linear(4, 4), "loss": torch.nn.Linear(4, 4, device="meta")})
    objective["tower"].weight.grad = torch.ones(4, 4)
    assert training_loop.clip_gradients(Accelerator(cpu=True), objective, 1.0).item() == pytest.approx(4)


def test_a_data_set_that_cannot_be_told_from_another_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the data set needs describe"):
        fit_line(tmp_path, torch.utils.data.TensorDataset(torch.ones(64, 2), torch.ones(64)))


@pytest.mark.parametrize("kept", ["step_*/model.safetensors", "step_*/optimizer.bin", "log.jsonl", "best.safetensors"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_file_that_a_power_cut_damaged_is_named_with_what_to_delete(tmp_path, kept, left):
    settings = {"epochs": 2, "validate": lambda: 1.0}
    fit_line(tmp_path, **settings)
    (path,) = tmp_path.glob(f"*/{kept}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))] if left or kept != "log.jsonl" else b"\0" * len(whole))
    with pytest.raises(
        ValueError, match=f"{path.name if 'step' not in kept else 'step_'}.* is damaged .*delete the folder"
    ):
        fit_line(tmp_path, **settings)
    shutil.rmtree(path.parent if "step" not in kept else path.parent.parent)
    assert fit_line(tmp_path, **settings)[0].seen


def test_a_whole_fine_tuning_is_its_parts_put_together(tmp_path):
    photos = gu.load_images("mini", "validation").subset(np.arange(120))
    held_out = gu.load_images("mini", "validation").subset(np.arange(200, 240))
    recipe = {"epochs": 1.0, "batch_size": 40, "seed": 3}
    whole, log = training.fine_tune_by_recipe(
        gu.load_encoder("mini"), photos, held_out, tmp_path / "whole",
        {"rate": 1e-3, "proxy_rate": 5e-3, "flip": 0.0, "scale": 30.0}, **recipe,
    )  # fmt: skip
    assert log[-1]["step"] == 3
    middle, parts = gu.load_encoder("mini"), gu.load_encoder("mini")
    transform = training_data.make_training_transform(parts, flip=0.0)
    training.fine_tune(
        middle, photos, held_out, tmp_path / "middle", transform=transform, rate=1e-3, proxy_rate=5e-3, **recipe
    )
    data = training_data.TrainingImages(photos, transform)
    start = losses.class_means(gu.embed_images(parts, photos)[0], data.labels)
    torch.manual_seed(3)
    loss = losses.ArcMargin(parts.dim, len(start), 30.0, 0.1, start=start)
    groups = training.select_image_parameters(parts, 1e-3)
    groups.append({"params": loss.parameters(), "lr": 5e-3, "weight_decay": 0.01})
    objective = training.ImageObjective(parts, loss)
    score = lambda: 100 * evaluation.evaluate(parts, held_out, cache=False)["image to image"].mean  # noqa: E731
    training_loop.fit(objective, data, tmp_path / "parts", groups, validate=score, **recipe)
    after, between, by_hand = (encoder.model.state_dict() for encoder in (whole, middle, parts))
    assert all(torch.equal(after[key], by_hand[key]) and torch.equal(between[key], by_hand[key]) for key in after)
    assert not torch.equal(after["visual.proj"], gu.load_encoder("mini").model.state_dict()["visual.proj"])
    with pytest.raises(TypeError, match="marginn"):
        training.fine_tune_by_recipe(parts, photos, held_out, tmp_path / "parts", {"marginn": 0.3})


def tuned_in_small(tmp_path, monkeypatch, **recipe):
    """What a recipe hands to `fit`, stage by stage, without training: (encoder, [(objective, data set, groups, settings)])."""
    photos = gu.load_images("mini", "validation").subset(np.arange(120))
    stages = []

    def record(objective, dataset, folder, groups, **settings):
        stages.append((objective, dataset, groups, settings))
        return []

    monkeypatch.setattr(training_loop, "fit_in_processes", record)
    recipe = {"batch_size": 40} | recipe
    encoder, _ = training.fine_tune_by_recipe(gu.load_encoder("mini"), photos, photos, tmp_path, recipe)
    return encoder, stages


def test_a_recipe_sets_margins_by_class_size_centers_and_the_start_of_the_proxies(tmp_path, monkeypatch):
    _, [(objective, *_)] = tuned_in_small(tmp_path, monkeypatch, margin=[0.05, 0.5], centers=3, start="xavier")
    photos = gu.load_images("mini", "validation").subset(np.arange(120))
    counts = np.unique(photos.labels, return_counts=True)[1]
    assert objective.loss.margin.tolist() == pytest.approx(losses.margins_by_count(counts, 0.05, 0.5).tolist())
    assert objective.loss.centers == 3
    means = torch.from_numpy(losses.class_means(gu.embed_images(gu.load_encoder("mini"), photos)[0], photos.labels))
    for start, near in (("xavier", False), ("means", True)):
        _, [(objective, *_)] = tuned_in_small(tmp_path, monkeypatch, start=start)
        cosines = F.cosine_similarity(objective.loss.proxies, means)
        assert bool((cosines > 0.9).all()) == near, start


def test_a_head_learns_with_the_proxies_first_alone_and_then_stays(tmp_path, monkeypatch):
    recipe = {"head": 16, "head_first": 2.0, "frozen_head": True, "rate": 1e-3, "proxy_rate": 5e-3, "proxy_decay": 1e-5}
    encoder, (first, second) = tuned_in_small(tmp_path, monkeypatch, epochs=1.0, seed=0, **recipe)
    assert encoder.dim == 16 and not encoder.has_text
    new = {id(value) for value in [*first[0].loss.parameters(), *encoder.model.embedding_head.parameters()]}
    assert first[3]["epochs"] == 2.0 and "validate" not in first[3]
    (group,) = first[2]
    assert {id(value) for value in group["params"]} == new
    assert (group["lr"], group["weight_decay"]) == (5e-3, 1e-5)
    assert second[3]["epochs"] == 1.0
    assert not new & {id(value) for group in second[2] for value in group["params"]}
    with pytest.raises(ValueError, match="set head_first to a few epochs"):
        tuned_in_small(tmp_path, monkeypatch, frozen_head=True)


def test_warm_up_is_a_share_of_the_steps_or_their_number(tmp_path):
    for warmup, steps in ((0.1, 8), (4, 4), (4.0, 4), (0.0, 0)):
        _, log = fit_line(tmp_path / str(warmup), warmup=warmup)
        rates = [row["rate"] for row in log]
        assert rates[:steps] == pytest.approx([0.1 * step / steps for step in range(steps)])
        assert rates.index(max(rates)) == steps
    with pytest.raises(ValueError, match="warmup=81 steps do not fit into 80"):
        fit_line(tmp_path, warmup=81)


def test_views_by_autoaugment_are_squashed_and_keep_the_encoders_scale_of_pixels(tmp_path, monkeypatch):
    encoder, [(_, dataset, *_)] = tuned_in_small(tmp_path, monkeypatch, views="autoaugment", flip=0.0, jitter=0.0)
    augment, resize, *_, norm = dataset.transform.transforms
    assert isinstance(augment, transforms.AutoAugment) and resize.size == (48, 48)
    assert norm.mean == encoder.preprocess.transforms[-1].mean
    with pytest.raises(ValueError, match="views is one of crop, autoaugment, not 'cropped'"):
        tuned_in_small(tmp_path, monkeypatch, views="cropped")


def test_the_papers_protocol_is_the_same_for_training_and_for_tables(tmp_path, monkeypatch):
    encoder, [(objective, dataset, *_)] = tuned_in_small(tmp_path, monkeypatch, protocol="paper")
    table = heads.embed_as_in_paper(gu.load_encoder("mini"))
    assert encoder.fingerprint() == table.fingerprint() and encoder.origin["before_projection"]
    assert dataset.transform.transforms[-1].mean == table.preprocess.transforms[-1].mean
    assert objective.loss.dim == table.dim


def test_a_misspelt_protocol_or_start_is_refused(tmp_path, monkeypatch):
    for name, message in (
        ("protocol", "protocol is own or paper, not 'x'"),
        ("start", "start is means or xavier, not 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned_in_small(tmp_path, monkeypatch, **{name: "x"})


def test_a_rate_that_makes_a_large_model_forget_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LARGE_MODEL", 1e5)
    with pytest.warns(UserWarning, match="rate=0.001 is much for mini.*1e-6 to 1e-5"):
        tuned_in_small(tmp_path, monkeypatch, rate=1e-3)


def test_scores_of_an_encoder_are_those_of_both_kinds_of_search():
    splits, mini = splitting.load_splits("mini"), gu.load_encoder("mini")
    scores = evaluation.evaluate(mini, splits.test[0], captioned=splits.text_test)
    assert list(scores) == ["image to image", "text to image"]
    embeddings, images = gu.embed_images(mini, splits.test[0])
    wanted, own = gu.same_label(images.labels, images.labels), np.arange(len(images))[:, None]
    by_hand = gu.mean_average_precision(gu.rank_relevant(embeddings, embeddings, wanted, leave_out=own))
    np.testing.assert_array_equal(scores["image to image"].per_query, by_hand.per_query)
    texts, relevant = image_set.text_queries(splits.text_test)
    ranks = gu.rank_relevant(gu.embed_texts(mini, texts), gu.embed_images(mini, splits.text_test)[0], relevant)
    assert scores["text to image"].mean == pytest.approx(gu.mean_average_precision(ranks).mean)
    assert list(evaluation.evaluate(heads.embed_as_in_paper(mini), splits.test[0], captioned=splits.text_test)) == [
        "image to image"
    ], "no text tower"
