"""Notebook 08: any folder gets parts, copies are found, steps change only what they may, and what is taken home opens."""

import ast
import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import run_here
from PIL import Image

import gpnns_utils as gu
from gpnns import building
from gpnns.encoders import heads, loading


def photo(path, number, size=(60, 40)):
    """A file of a coloured noise of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def folder_of(top, classes, each, splits=("",), first=0):
    """A folder of things with images of their own, numbered from `first`, which no other number makes again."""
    for s, split in enumerate(splits):
        for c in range(classes):
            for i in range(each):
                photo(top / split / f"thing {c:02d}" / f"{i}.png", first + 10_000 * s + 100 * c + i)
    return top


def contents(images):
    return set(images.digests())


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_many_things_asks_an_open_question(tmp_path, capsys):
    parts = building.load_parts(folder_of(tmp_path / "many", 20, 3))
    kinds = [set(one.labels) for one in (parts.train, parts.validation[0], parts.test[0])]
    assert parts.question == "open" and [len(kind) for kind in kinds] == [14, 2, 4]
    assert not kinds[0] & kinds[1] and not (kinds[0] | kinds[1]) & kinds[2]
    assert parts.test[0] is parts.test[1] and len(parts.everything) == 60
    assert "4 classes that nothing is trained on" in capsys.readouterr().out


def test_a_folder_of_few_things_asks_for_other_images_of_them(tmp_path):
    parts = building.load_parts(folder_of(tmp_path / "few", 3, 10))
    assert parts.question == "closed" and parts.test[1] is parts.train
    assert [len(one) for one in (parts.train, parts.validation[0], parts.test[0])] == [22, 2, 6]
    assert not contents(parts.train) & contents(parts.test[0])


def test_images_without_labels_are_cut_at_random_and_nothing_is_measured(tmp_path, capsys):
    for i in range(20):
        photo(tmp_path / "flat" / f"{i}.jpg", i)
    parts = building.load_parts(tmp_path / "flat")
    assert parts.question == "" and [len(one) for one in (parts.train, parts.validation[0], parts.test[0])] == [
        14,
        2,
        4,
    ]
    assert "no labels tell which of them show the same" in capsys.readouterr().out
    assert building.measure_search(building.Search(gu.load_encoder("pixels")), parts) == {}


def test_splits_of_a_source_are_kept(tmp_path):
    parts = building.load_parts(folder_of(tmp_path / "cut", 3, 4, ("train", "validation", "test")))
    assert parts.question == "closed" and len(parts.train) == len(parts.test[0]) == 12
    assert len(parts.everything) == 36 and sorted(set(parts.everything.names)) == ["thing 00", "thing 01", "thing 02"]


def test_exact_copies_count_once_but_all_of_them_can_be_found(tmp_path, capsys):
    top = folder_of(tmp_path / "twice", 12, 3)
    for i in range(3):
        (top / "thing 00" / f"again {i}.png").write_bytes((top / "thing 00" / f"{i}.png").read_bytes())
    parts = building.load_parts(top)
    assert sum(len(one) for one in (parts.train, parts.validation[0], parts.test[0])) == 36
    assert len(parts.everything) == 39


@pytest.mark.parametrize("count", [1, 9])
def test_too_few_images_are_refused(tmp_path, count):
    for i in range(count):
        photo(tmp_path / "few" / f"{i}.png", i)
    with pytest.raises(ValueError, match=f"few holds {count} different images; ten are the least"):
        building.load_parts(tmp_path / "few")


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_copy(tmp_path):
    """Parts of a folder with splits, in which a training image is a smaller JPEG of a test image."""
    top = folder_of(tmp_path / "leak", 3, 4, ("train", "validation", "test"))
    original = Image.open(top / "test" / "thing 01" / "2.png").convert("RGB")
    original.resize((45, 30)).save(top / "train" / "thing 01" / "copy.jpg", quality=60)
    return building.load_parts(top)


def test_a_near_copy_is_the_nearest_of_all_and_leaves_the_training(with_copy, capsys):
    images, part, cosines, nearest = building.find_copies(with_copy)
    best = int(np.argmax(cosines))
    assert {part[best], part[nearest[best]]} == {"train", "test"} and cosines[best] > 0.98
    assert np.sort(cosines)[-3] < 0.9, "nothing else is alike"
    without = building.remove_copies(with_copy, 0.98)
    assert len(without.train) == 12 and not [path for path in without.train.images if path.name == "copy.jpg"]
    assert without.test[1] is without.train and without.validation[1] is without.train
    assert "1 of 13 training images have a near copy in another part" in capsys.readouterr().out
    assert building.remove_copies(without, 0.98) is without


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    return gu.load_encoder("mini")


@pytest.fixture
def told(tmp_path):
    """A folder of twelve things with captions."""
    top = folder_of(tmp_path / "told", 12, 4)
    words = {f"thing {c:02d}/{i}.png": f"a white building number {c} {i}" for c in range(12) for i in range(4)}
    (top / "captions.json").write_text(json.dumps(words))
    return building.load_parts(top)


def test_a_linear_map_multiplies_images_and_texts_and_leaves_the_encoder_it_was_made_from(mini, told):
    search, dim = building.Search(mini), mini.dim
    rng = np.random.default_rng(0)
    matrix = np.eye(dim) + 0.3 * rng.normal(size=(dim, dim)) / dim**0.5
    before = gu.embed_images(mini, told.test[0])[0], gu.embed_texts(mini, ["a fish", "a red vase"])
    other = building.map_search(search, told, lambda vectors, labels: matrix).encoder
    after = gu.embed_images(other, told.test[0])[0], gu.embed_texts(other, ["a fish", "a red vase"])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, gu.unit_rows(old @ matrix.T.astype(np.float32), "rows"), atol=2e-5)
    np.testing.assert_array_equal(before[0], gu.embed_images(mini, told.test[0], cache=False)[0])


@pytest.mark.parametrize("name", ["timm:resnet10t", "efficientnet_lite0:64"])
def test_a_model_without_a_text_tower_gets_the_map_as_a_head(told, name, monkeypatch):
    if name.startswith("timm"):
        import timm

        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k | {"pretrained": False}))
    encoder = gu.load_encoder(name)
    matrix = np.diag(np.linspace(0.5, 1.5, encoder.dim))
    other = building.map_search(building.Search(encoder), told, lambda vectors, labels: matrix).encoder
    old, new = gu.embed_images(encoder, told.test[0])[0], gu.embed_images(other, told.test[0])[0]
    np.testing.assert_allclose(new, gu.unit_rows(old @ matrix.astype(np.float32), "rows"), atol=1e-4)
    again = copy.deepcopy(other)
    np.testing.assert_allclose(gu.embed_images(again, told.test[0])[0], new, atol=1e-6)
    assert not other.has_text


@pytest.mark.parametrize("kind", ["squashed", "before the projection"])
def test_a_copy_prepares_images_and_ends_as_its_original_also_when_taken_home(mini, told, tmp_path, kind):
    fresh = gu.load_encoder("mini")
    changed = (
        loading.squash_images(fresh) if kind == "squashed" else heads.add_head(fresh, None, before_projection=True)
    )
    wanted, plain = (gu.embed_images(one, told.test[0])[0] for one in (changed, mini))
    assert wanted.shape != plain.shape or np.abs(wanted - plain).max() > 1e-3, "the two differ"
    home = building.open_folder(building.take_home(building.Search(changed), told, tmp_path / "out", CARD))
    for other in (copy.deepcopy(changed), home["encoder"]):
        np.testing.assert_allclose(gu.embed_images(other, told.test[0], cache=False)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("architecture", ["RN50", "MobileCLIP2-S0", "ViT-B-32"])
def test_projections_of_other_towers_take_the_map_in_too(told, architecture):
    encoder = gu.load_encoder(f"open_clip:{architecture}/random")
    matrix = np.eye(encoder.dim) + 0.5 * np.random.default_rng(0).normal(size=(encoder.dim,) * 2) / encoder.dim**0.5
    other, few = building.add_map(encoder, matrix), told.test[0].subset([0, 1])
    for embed, what in (
        (lambda *given, **how: gu.embed_images(*given, **how)[0], few),
        (gu.embed_texts, ["a fish", "a vase"]),
    ):
        wanted = gu.unit_rows(embed(encoder, what, cache=False) @ matrix.T.astype(np.float32), "rows")
        np.testing.assert_allclose(embed(other, what, cache=False), wanted, atol=2e-5)


def test_steps_that_lack_something_give_back_what_they_got_and_say_what_would_help(tmp_path, mini, told, capsys):
    for i in range(20):
        photo(tmp_path / "flat" / f"{i}.jpg", i)
    flat, search = building.load_parts(tmp_path / "flat"), building.Search(mini)
    images_only = building.Search(gu.load_encoder("efficientnet_lite0:64"))
    capsys.readouterr()
    assert building.map_search(search, flat, None) is search and "no labels: with a folder" in capsys.readouterr().out
    assert building.tune_search(search, flat, tmp_path) is search and "no labels" in capsys.readouterr().out
    assert building.realign_search(search, flat, tmp_path) is search and "no captions" in capsys.readouterr().out
    assert building.correct_hubs(search, flat) is search and "no captions" in capsys.readouterr().out
    assert building.average_searches(search, search) is search and "no two trainings" in capsys.readouterr().out
    assert building.realign_search(images_only, told, tmp_path) is images_only
    assert "efficientnet_lite0:64 has no text tower; nothing is changed" in capsys.readouterr().out
    pixels = building.Search(gu.load_encoder("pixels"))
    assert building.tune_search(pixels, told, tmp_path) is pixels and "no weights to train" in capsys.readouterr().out


def test_an_encoder_that_cannot_read_finds_nothing_by_text(told):
    scores = building.measure_search(building.Search(gu.load_encoder("efficientnet_lite0:64")), told)
    assert scores[building.TEXTS].mean == 0 and scores[building.IMAGES].mean > 0


def test_the_bias_counts_for_texts_alone(mini, told):
    plain = building.measure_search(building.Search(mini), told)
    pushed = building.measure_search(building.Search(mini, k=4, alpha=5.0), told)
    np.testing.assert_array_equal(plain[building.IMAGES].per_query, pushed[building.IMAGES].per_query)
    assert not np.array_equal(plain[building.TEXTS].per_query, pushed[building.TEXTS].per_query)


def test_hubs_are_taken_back_with_as_few_captions_as_there_are(mini, told):
    few = dataclasses.replace(told, told=told.told | {"train": told.train.subset([0, 1, 2])})
    assert building.correct_hubs(building.Search(mini), few).k == 3


def test_the_average_of_two_searches_has_the_mean_of_their_weights(mini):
    one, other = building.Search(copy.deepcopy(mini)), building.Search(copy.deepcopy(mini))
    with torch.no_grad():
        other.encoder.model.text_projection.add_(2.0)
    mean = building.average_searches(one, other).encoder.model.text_projection
    torch.testing.assert_close(mean, mini.model.text_projection + 1.0)


# --- take home -------------------------------------------------------------------------------------------------------

CARD = {
    "base": "mini",
    "images": "few",
    "licence": "MIT",
    "kept": ["a map"],
    "table": [{"step": "at first", "R@5": "1"}],
}


@pytest.fixture
def home(mini, told, tmp_path):
    search = building.Search(mini, k=4, alpha=0.5)
    return search, told, building.take_home(search, told, tmp_path / "home", CARD)


def test_a_folder_answers_as_the_search_that_was_saved(home):
    search, parts, folder = home
    opened, encoder = building.open_folder(folder), search.encoder
    vectors = gu.embed_images(encoder, parts.everything)[0]
    bias = gu.hub_bias(vectors, building.embed_references(encoder, parts), 4, 0.5)
    texts = ["a white building number 3 1", "a fish"]
    wanted = gu.search(gu.embed_texts(encoder, texts), vectors, 5, bias=bias)
    scores, rows = building.find_rows(opened, texts, 5)
    np.testing.assert_array_equal(rows, wanted[1])
    np.testing.assert_allclose(scores, wanted[0], atol=1e-5)
    asked = parts.everything.subset([7])
    np.testing.assert_array_equal(building.find_rows(opened, asked, 5)[1], gu.search(vectors[[7]], vectors, 5)[1])
    assert building.find(opened, asked, 1) == [[parts.everything.describe(7)]]
    assert opened["captions"] == parts.everything.captions


def test_open_clip_opens_the_folder_strictly_without_this_course(home):
    search, parts, folder = home
    code = f"""
import open_clip, sys, torch
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}", bpe_path="{folder}/vocabulary.txt.gz")
from PIL import Image
image = preprocess(Image.open(r"{parts.everything.images[3]}").convert("RGB"))[None]
with torch.no_grad():
    print(*torch.nn.functional.normalize(model.encode_image(image))[0].tolist())
    print(*torch.nn.functional.normalize(model.encode_text(tokenizer(["a fish"])))[0].tolist())
assert "gpnns_utils" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    image, text = (np.array(line.split(), float) for line in result.stdout.splitlines())
    np.testing.assert_allclose(image, gu.embed_images(search.encoder, parts.everything)[0][3], atol=1e-5)
    np.testing.assert_allclose(text, gu.embed_texts(search.encoder, ["a fish"])[0], atol=1e-5)


def test_models_with_another_activation_or_tower_open_again_as_they_were(told, tmp_path):
    for name in ("open_clip:ViT-B-32-quickgelu/random", "efficientnet_lite0:64"):
        encoder = gu.load_encoder(name)
        folder = building.take_home(building.Search(encoder), told, tmp_path / "out", CARD)
        again = building.open_folder(folder)["encoder"]
        few = told.test[0].subset([0, 1])
        np.testing.assert_allclose(gu.embed_images(again, few)[0], gu.embed_images(encoder, few)[0], atol=1e-5)
        assert again.has_text == encoder.has_text


def test_a_folder_is_replaced_as_a_whole_and_a_card_says_what_it_is(home, monkeypatch):
    search, parts, folder = home
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: open_clip\nlicense: mit\n") and "| at first | 1 |" in text
    before = (folder / "search.json").read_bytes()
    monkeypatch.setattr(building, "write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        building.take_home(search, parts, folder, CARD | {"base": "other"})
    assert (folder / "search.json").read_bytes() == before, "what was saved is still there"


def test_the_lines_that_open_a_folder_run_in_a_new_process(home, tmp_path):
    _, parts, folder = home
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(gu.HERE)!r})\n" + building.write_program(folder, parts)],
        cwd=gu.work_folder(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"^\[\[.*\]\]$", result.stdout, re.M)
    assert len(lines) == 2 and str(parts.everything.images[0]) in lines[1].replace("\\\\", "\\")


def test_the_lines_of_the_readme_run_on_it_from_anywhere(home, tmp_path):
    _, parts, folder = home
    readme = (gu.HERE / "README.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "open_folder" in block]
    assert len([line for line in lines.splitlines() if line]) <= 5
    for said, here in (("runs/photos/08_search", str(folder)), ("path/to/folder", str(tmp_path / "told"))):
        assert said in lines
        lines = lines.replace(said, here)
    environment = os.environ | {"PYTHONPATH": str(gu.HERE)}
    result = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = [ast.literal_eval(line) for line in result.stdout.splitlines() if line.startswith("[[")]
    assert len(found[0][0]) == 5 and [rows[0] for rows in found[1]] == [str(path) for path in parts.everything.images]


def test_new_photos_join_a_search_with_a_bias_of_their_own_and_once(home, tmp_path):
    search, parts, folder = home
    more = gu.load_images(folder_of(tmp_path / "more", 2, 3, first=5_000))
    assert building.add(folder, more) == 6 and building.add(folder, more) == 0
    opened, encoder = building.open_folder(folder), search.encoder
    assert opened["names"][-6:] == [str(path) for path in more.images] and len(opened["captions"]) == 54
    vectors = np.concatenate([gu.embed_images(encoder, one)[0] for one in (parts.everything, more)])
    bias = gu.hub_bias(vectors, building.embed_references(encoder, parts), 4, 0.5)
    wanted = gu.search(gu.embed_texts(encoder, ["a fish"]), vectors, 54, bias=bias)[0]
    np.testing.assert_allclose(building.find_rows(opened, ["a fish"], 54)[0], wanted, atol=1e-5)
    assert building.find(opened, more.subset([2]), 1) == [[str(more.images[2])]]


def test_an_addition_that_is_stopped_half_way_leaves_what_was_there_and_can_be_repeated(home, tmp_path, monkeypatch):
    _, parts, folder = home
    more, before = gu.load_images(folder_of(tmp_path / "more", 2, 3, first=5_000)), len(parts.everything)
    with monkeypatch.context() as stopped:
        stopped.setattr(gu, "write_atomically", lambda *_: 1 / 0)  # the index is written, the names are not
        with pytest.raises(ZeroDivisionError):
            building.add(folder, more)
    opened = building.open_folder(folder)
    assert opened["index"].ntotal == len(opened["names"]) == before
    assert len(building.find(opened, more.subset([0]), before)[0]) == before
    assert building.add(folder, more) == 6
    opened = building.open_folder(folder)
    assert opened["index"].ntotal == len(opened["names"]) == before + 6


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no search.json: give the folder that notebook 08 took home"):
        building.open_folder(tmp_path)


def test_a_page_holds_its_images_itself_and_marks_right_and_wrong(told, tmp_path):
    rows, right = np.array([[0, 1, 2]]), np.array([[1.0, 0.0, np.nan]])
    queries = ["<b>a fish</b> & more"]
    path = building.write_page(tmp_path / "page.html", "mine & yours", queries, told.test[1], {"before": (rows, right)})
    images = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            images.extend([dict(attrs)] if tag == "img" else [])

    page = path.read_text(encoding="utf-8")
    Reader().feed(page)
    assert [image["class"] for image in images] == ["right", "wrong", ""]
    assert all(image["src"].startswith("data:image/jpeg;base64,") and image["alt"] for image in images)
    assert "&lt;b&gt;a fish" in page and "http" not in page.replace("http-equiv", "")


# --- the notebook ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("kind", ["flat", "flat with captions", "few things", "a table with captions", "images alone"])
def test_the_same_cells_run_on_whatever_a_folder_holds(kind, shapes, tmp_path, results, cache, capsys):
    top, names = tmp_path / "mine", []
    for path in sorted(shapes.rglob("*.png")):
        flat = "flat" in kind
        target = top / ("" if flat else path.parent.name) / (f"{path.parent.name} {path.name}" if flat else path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        names.append((target, path.parent.name))
    if kind == "flat with captions":
        told = {target.name: f"a shape of {label}, number {i}" for i, (target, label) in enumerate(names)}
        (top / "captions.json").write_text(json.dumps(told))
    source = top
    if kind == "a table with captions":
        lines = [f"{target},{label},a shape of {label} number {i}" for i, (target, label) in enumerate(names)]
        (source := tmp_path / "mine.csv").write_text("\n".join(["path,label,caption", *lines]))
    if kind == "few things":
        for target, label in names:
            if label[-1] not in "01":
                target.unlink()
    encoders = ["efficientnet_lite0:64"] if kind == "images alone" else ["efficientnet_lite0:64", "mini"]
    recipe = {"images": {"epochs": 1.0, "batch_size": 4}, "realign": {"epochs": 1.0, "batch_size": 4}}
    names = run_here("08", {"profile": results[0], "images": str(source), "encoders": encoders, "recipe": recipe})
    said = capsys.readouterr().out
    assert ("no labels" in said) == ("flat" in kind) and len(names.journal) == len(encoders) + 4
    assert ("no captions" in said) == ("captions" not in kind)
    opened = building.open_folder(results[1] / "08_search")
    assert len(opened["names"]) == len(names.parts.everything) and names.process.returncode == 0
    assert (results[1] / "08_before_and_after.html").stat().st_size > 10_000
