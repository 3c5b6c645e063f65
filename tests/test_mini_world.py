"""The drawn world: deterministic, disjoint, cached, and as large as it says."""

import sys

import numpy as np
import pytest

import gpnns_utils as gu

sys.path.insert(0, str(gu.DATA))
import mini_world

FINGERPRINT = "ef0f9fe1fd2b5ef98b7c5dda2c728d881afdf615f4fac534c65f677b08ccaa13"


def test_the_world_is_the_same_on_every_run_and_machine():
    assert mini_world.fingerprint("test") == FINGERPRINT


def test_an_image_can_be_drawn_again_on_its_own(world):
    drawn = mini_world.draw_image("test", "faces", 2, view=3)
    row = int(np.flatnonzero(world.labels == 5 * 40 + 2)[3])
    np.testing.assert_array_equal(np.asarray(world[row]), drawn)


@pytest.mark.parametrize("domain", mini_world.DOMAINS)
def test_no_two_splits_share_a_class(domain):
    seen = {}
    for split in ("pairs", "train", "validation", "test", "bank"):
        for number in range(mini_world.SPLITS[split][1]):
            key = repr(mini_world.class_parameters(split, domain, number))
            assert key not in seen, (split, number, seen.get(key))
            seen[key] = (split, number)


def test_the_shifted_test_shows_the_same_classes_in_another_light():
    for domain in mini_world.DOMAINS:
        assert repr(mini_world.class_parameters("shifted", domain, 1)) == repr(
            mini_world.class_parameters("test", domain, 1)
        )
        a, b = (mini_world.draw_image(split, domain, 1, 0) for split in ("test", "shifted"))
        assert not np.array_equal(a, b)


def test_the_test_split_has_six_domains_of_forty_classes_of_ten_images():
    images = gu.load_images("mini")
    assert len(images) == 2400 and images.images.shape == (2400, 64, 64, 3)
    labels, counts = np.unique(images.labels, return_counts=True)
    assert len(labels) == 240 and set(counts) == {10}
    assert list(dict.fromkeys(images.groups)) == list(mini_world.DOMAINS)
    assert images.names[:2] == ["landmarks 0", "landmarks 1"]


def test_captions_go_from_coarse_to_fine_and_different_classes_share_them():
    images = gu.load_images("mini")
    for coarse, middle, fine in images.captions[::10]:
        assert len(coarse) < len(middle) <= len(fine)
    by_caption = {}
    for label, captions in zip(images.labels, images.captions, strict=True):
        by_caption.setdefault(captions[-1], set()).add(label)
    shared = sum(len(labels) > 1 for labels in by_caption.values())
    assert len(by_caption) < 200 and shared >= 40


def test_the_mini_clip_can_be_pretrained_again(tmp_path, monkeypatch):
    import open_clip
    import pretrain_mini_clip

    monkeypatch.setitem(mini_world.SPLITS, "pairs", (0, 2, 3))
    for out in ("first", "second"):
        pretrain_mini_clip.pretrain(tmp_path / out, tmp_path, epochs=1, batch_size=12, rate=1e-3, seed=0)
    first, second = ((tmp_path / out / "open_clip_model.safetensors").read_bytes() for out in ("first", "second"))
    assert first == second, "the same seed gives the same weights"
    assert open_clip.create_model(f"local-dir:{tmp_path / 'first'}").visual.output_dim == 128


def test_a_split_is_drawn_once_and_a_killed_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(mini_world.SPLITS, "tiny", (7, 1, 2))
    calls = []
    draw = mini_world.draw_image
    monkeypatch.setattr(mini_world, "draw_image", lambda *a: calls.append(a) or draw(*a))
    with monkeypatch.context() as broken:
        broken.setattr(mini_world.np, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mini_world.load_split("tiny", tmp_path)
    assert not list(tmp_path.rglob("*.npy"))
    first = mini_world.load_split("tiny", tmp_path)
    drawn = len(calls)
    np.testing.assert_array_equal(mini_world.load_split("tiny", tmp_path)["images"], first["images"])
    assert len(calls) == drawn == 24
