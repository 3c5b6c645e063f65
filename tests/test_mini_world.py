"""The drawn world: every thing has words of its own, views too, and what teaches text never holds a test's text."""

import collections
import functools
import hashlib
import json
import re

import numpy as np
import pytest

import gpnns_utils as gu
from gpnns.world import mini_world, painters

FINGERPRINT = "35951363099af365ea10efbe99c86f98277d3662be9c83bedb7924711141b4c0"


@functools.cache
def told(split, domain):
    """The five captions of each image of a domain."""
    sizes = mini_world.count_views(split)
    numbers = mini_world.list_class_numbers(split, domain)
    return [
        mini_world.tell_image(split, domain, n, view)
        for n, size in zip(numbers, sizes, strict=True)
        for view in range(size)
    ]


def texts(split, domain, level):
    return [captions[level] for captions in told(split, domain)]


def test_the_world_is_the_same_on_every_run_and_machine():
    digest = hashlib.sha256()
    for domain in painters.DOMAINS:
        for number in mini_world.list_class_numbers("captions", domain)[:2]:
            digest.update(mini_world.draw_image("captions", domain, number, 0).tobytes())
            digest.update(json.dumps(mini_world.tell_image("captions", domain, number, 0)).encode())
    assert digest.hexdigest() == FINGERPRINT


@pytest.mark.parametrize("domain", painters.DOMAINS)
def test_captions_go_from_what_many_share_to_what_only_one_thing_has(domain):
    """400 things: a handful of coarse captions, and no two of the finest alike."""
    distinct = [len(set(texts("captions", domain, level))) for level in range(5)]
    coarse, middle, some, view, finest = distinct
    assert coarse < middle < 60 and some > 300 and view > 200 and finest == 400
    start = gu.load_encoder("mini")
    longest = max(texts("captions", domain, 4), key=len)
    room = start.tokenizer.context_length - len(["a", "drawing", "of"])  # a template stands before it in the training
    assert len(start.tokenizer.encode(longest)) + 2 <= room, "the text tower reads them to their end"


def test_every_word_is_one_token_of_the_mini_clip():
    tokenizer = gu.load_encoder("mini").tokenizer
    said = {text for domain in painters.DOMAINS for level in range(5) for text in texts("captions", domain, level)}
    words = {word for text in said for word in re.findall(r"[a-z]+", text)}
    assert len(words) > 150
    assert {word: len(tokenizer.encode(word)) for word in words} == dict.fromkeys(words, 1)


@pytest.mark.parametrize("domain", painters.DOMAINS)
def test_almost_every_class_of_the_pairs_has_a_text_of_its_own(domain):
    finest = [
        mini_world.tell_finest(domain, mini_world.make_thing("pairs", domain, n))
        for n in mini_world.list_class_numbers("pairs", domain)
    ]
    assert len(set(finest)) >= 590


@pytest.mark.parametrize("domain", painters.DOMAINS)
def test_nothing_that_teaches_text_or_stands_for_queries_holds_a_text_that_is_asked(domain):
    """Neither the whole caption nor its words for the thing alone."""
    splits = ("captions", "captions_validation", "pairs", "bank", "references")
    things = {
        split: {
            mini_world.tell_finest(domain, mini_world.make_thing(split, domain, n))
            for n in mini_world.list_class_numbers(split, domain)
        }
        for split in splits
    }
    said = {split: {text for captions in told(split, domain) for text in captions} for split in splits}
    for asked in mini_world.ASKED:
        queries = set(texts(asked, domain, 4))
        for split in set(splits) - {asked}:
            assert len(things[asked] & things[split]) == 0, (asked, split)
            assert len(queries & said[split]) == 0, (asked, split)


@pytest.mark.parametrize("domain", painters.DOMAINS)
def test_no_two_splits_share_a_thing(domain):
    seen = {}
    for split in set(mini_world.SPLITS) - {"shifted", "train_noisy", "known"}:
        for number in mini_world.list_class_numbers(split, domain):
            key = repr(mini_world.make_thing(split, domain, number))
            assert seen.setdefault(key, split) == split, (split, number, seen[key])


def test_a_view_is_drawn_from_its_parameters_and_told_by_them():
    thing = mini_world.make_thing("test", "faces", 1)
    view = mini_world.make_view("test", "faces", 1, 0)
    rng = np.random.default_rng(0)
    drawn = np.asarray(painters.PAINTERS["faces"][4](thing, view, rng).image)
    np.testing.assert_array_equal(drawn, np.asarray(painters.PAINTERS["faces"][4](thing, view, rng).image))
    other = view | {"shirt": "red", "shirt_color": (200, 45, 45)}
    assert not np.array_equal(drawn, np.asarray(painters.PAINTERS["faces"][4](thing, other, rng).image))
    assert "a red shirt" in mini_world.tell_view("faces", other)
    told = mini_world.tell_view("faces", view | {"front": ("green", ()), "light": view["light"] | {"gain": 1.3}})
    assert "a green leaf in front" in told and told[-1] == "in bright light"
    coarse, middle, some, seen, finest = mini_world.tell_five("faces", thing, other, np.random.default_rng(0))
    assert seen.startswith(coarse) and "red shirt" in seen
    assert finest.startswith(mini_world.tell_finest("faces", thing) + ", ")
    added = finest.removeprefix(mini_world.tell_finest("faces", thing) + ", ").split(", ")
    assert len(added) == 2 and set(added) < set(mini_world.tell_view("faces", other))


def test_an_image_can_be_drawn_again_on_its_own():
    photos = gu.load_images("mini", "test")
    row = int(np.flatnonzero(photos.labels == 5 * 40 + 2)[3])
    np.testing.assert_array_equal(np.asarray(photos[row]), mini_world.draw_image("test", "faces", 2, view=3))


def test_the_test_split_has_six_domains_of_forty_classes_of_ten_images():
    photos = gu.load_images("mini", "test")
    assert photos.images.shape == (2400, 64, 64, 3)
    labels, counts = np.unique(photos.labels, return_counts=True)
    assert len(labels) == 240 and set(counts) == {10}
    assert list(dict.fromkeys(photos.groups)) == list(painters.DOMAINS)
    assert photos.names[:2] == ["landmarks 0", "landmarks 1"]


def test_views_of_a_thing_differ_and_the_shifted_test_shows_the_same_things_in_worse_light():
    for domain in painters.DOMAINS:
        assert repr(mini_world.make_thing("test", domain, 3)) == repr(mini_world.make_thing("shifted", domain, 3))
        one, two = (mini_world.draw_image("test", domain, 3, view) for view in (0, 1))
        assert not np.array_equal(one, two)
        lights = [mini_world.make_view("shifted", domain, 3, view)["light"] for view in range(30)]
        assert {light["gain"] for light in lights} == {0.6, 0.75, 1.35} and any(light["gray"] for light in lights)


def test_classes_are_as_uneven_as_in_life():
    for split, least, most, mean in (("train", 5, 45, 10), ("pairs", 1, 53, 4)):
        sizes = np.array(mini_world.count_views(split))
        assert (sizes.min(), sizes.max()) == (least, most) and sizes.mean() == mean
        assert np.sort(sizes)[::-1][: len(sizes) // 5].sum() > 0.35 * sizes.sum(), (
            "a fifth of the classes has most images"
        )
    assert set(mini_world.count_views("test")) == {10} and set(mini_world.count_views("captions")) == {1}


def test_a_tenth_of_the_noisy_labels_is_wrong_and_the_pictures_are_the_same():
    domain_of = np.repeat(np.arange(6), 1200)
    right = np.array(
        [painters.DOMAINS.index(domain) * 120 + place for domain, place, _, _ in mini_world.list_rows("train")]
    )
    noisy = mini_world.add_wrong_labels(right, 120)
    assert np.mean(noisy != right) == pytest.approx(0.1)
    np.testing.assert_array_equal(noisy // 120, domain_of)
    assert mini_world.list_rows("train") == mini_world.list_rows("train_noisy")
    np.testing.assert_array_equal(
        mini_world.draw_image("train", "nature", 2, 1), mini_world.draw_image("train_noisy", "nature", 2, 1)
    )


def test_pairs_are_as_noisy_as_the_web_s():
    own = [[f"{row} {level}" for level in range(5)] for row in range(20_000)]
    rng = np.random.default_rng(0)
    said = [mini_world.draw_web_caption(own, row, rng) for row in range(len(own))]
    parts = [text.split() for text in said]
    empty = np.array([not (len(part) == 2 and part[0].isdigit()) for part in parts])
    other = np.array([not e and int(part[0]) != row for row, (e, part) in enumerate(zip(empty, parts, strict=True))])
    assert empty.mean() == pytest.approx(0.05, abs=0.01)
    assert other[~empty].mean() == pytest.approx(0.3, abs=0.015)
    levels = collections.Counter(part[1] for e, part in zip(empty, parts, strict=True) if not e)
    shares = [levels[str(level)] / (~empty).sum() for level in range(5)]
    np.testing.assert_allclose(shares, mini_world.LEVELS, atol=0.015)


def test_a_split_is_drawn_once_read_again_and_a_damaged_file_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setitem(mini_world.SPLITS, "references", (7, 2, 1))
    for cached in (mini_world.list_class_numbers, mini_world.list_finest_texts):
        monkeypatch.setattr(mini_world, cached.__name__, cached.__wrapped__)
    drawn = []
    draw = mini_world.draw_image
    monkeypatch.setattr(mini_world, "draw_image", lambda *which: drawn.append(which) or draw(*which))
    first = mini_world.load_split("references", tmp_path)
    first["images"] = np.array(first["images"])  # a memory map of the file that is damaged below
    again = mini_world.load_split("references", tmp_path)
    assert len(drawn) == 12 and first["captions"] == again["captions"]
    np.testing.assert_array_equal(first["images"], again["images"])
    assert first["names"][:3] == ["landmarks 0", "landmarks 1", "nature 0"] and list(first["labels"]) == list(range(12))
    images = gu.ImageSet("references", **first)
    assert [len(told) for told in images.captions] == [1] * 12, "where text is asked, the finest caption alone"
    assert len(gu.load_images("mini", "test").captions[0]) == 5
    (path,) = (tmp_path / "mini_world").iterdir()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="references-seed0-v3.npy is damaged and is drawn again"):
        np.testing.assert_array_equal(mini_world.load_split("references", tmp_path)["images"], first["images"])


def test_a_killed_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(mini_world.SPLITS, "test", (3, 1, 2))
    monkeypatch.setattr(mini_world, "list_class_numbers", mini_world.list_class_numbers.__wrapped__)
    with monkeypatch.context() as broken:
        broken.setattr(mini_world.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mini_world.load_split("test", tmp_path)
    assert not list(tmp_path.rglob("*.npy"))
    assert len(mini_world.load_split("test", tmp_path)["images"]) == 12


def test_the_base_is_trained_by_one_command_that_goes_on_where_it_stopped(tmp_path, monkeypatch, cache):
    """Two classes a domain, two steps; open_clip loads the folder, and a second run finds its training done."""
    import open_clip

    from gpnns.tools import pretrain_mini_clip as script

    monkeypatch.setitem(mini_world.SPLITS, "pairs", (0, 2, 2))
    monkeypatch.setitem(mini_world.SPLITS, "captions_validation", (6, 2, 1))
    monkeypatch.setitem(mini_world.SPLITS, "captions", (5, 2, 1))
    for cached in (mini_world.list_class_numbers, mini_world.list_finest_texts):
        monkeypatch.setattr(mini_world, cached.__name__, cached.__wrapped__)
    for _ in range(2):
        script.pretrain_base(tmp_path / "base", epochs=1, batch_size=12, rate=1e-3, wrong=0.3, seed=0)
        first = (tmp_path / "base" / "open_clip_model.safetensors").read_bytes()
    assert (tmp_path / "base" / "open_clip_model.safetensors").read_bytes() == first
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/base")
    tokenizer = open_clip.get_tokenizer(
        f"local-dir:{tmp_path}/base", bpe_path=str(tmp_path / "base" / "vocabulary.txt.gz")
    )
    text = mini_world.tell_finest("faces", mini_world.make_thing("pairs", "faces", 0))
    assert model.encode_text(tokenizer([text])).shape == (1, 128)
    assert tokenizer.decode(tokenizer([text])[0].tolist()).count("face") == 1
    assert len(list((cache / "pretraining").iterdir())) == 1


def test_all_that_is_shipped_is_made_by_one_command_and_a_failure_replaces_nothing(tmp_path, monkeypatch):
    from gpnns.tools import make_world

    made = {file.partition("_")[2] for shipped in make_world.MADE.values() for file in shipped}
    assert made == {path.name for path in (gu.DATA / "mini_tuned").iterdir()}
    (tmp_path / "mini_tuned").mkdir()
    monkeypatch.setattr(gu, "DATA", tmp_path)
    monkeypatch.setattr(make_world, "RUNS", tmp_path)
    told = []

    def run_notebook(path, output, parameters):
        told.append((path.name, parameters))
        (tmp_path / "03_result.npz").write_bytes(b"new")
        return failure

    monkeypatch.setattr(make_world, "run_notebook", run_notebook)
    for failure in ("cell 3: ValueError", None):
        assert make_world.run_and_ship("03_finetune_arcmargin", ("03_result.npz",)) == failure
        assert (tmp_path / "mini_tuned" / "result.npz").exists() == (failure is None)
    assert told == [("03_finetune_arcmargin.ipynb", {"profile": "world"})] * 2
