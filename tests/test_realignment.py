"""Text that still fits: captions and what is trained on them, against other libraries, by hand, and on broken input."""

import io
import json
import math
import tarfile

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import lift, unit
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from pytorch_metric_learning.losses import ArcFaceLoss
from safetensors.torch import load_file

import gpnns_utils as gu
from gpnns import caption_banks, losses, training, training_data, training_loop
from gpnns.encoders import checkpoints, heads
from gpnns.images import image_set, splitting

nb = lift("04")


def rows_of(n, d, seed=0):
    return torch.from_numpy(unit(np.random.default_rng(seed), n, d))


# --- the loss of MCIP ---


def last_term(images, captions, own, scale, margin):
    """A tenth of the largest surprise of an image, each times what its target lacks to 1."""
    cosines = F.normalize(images) @ captions.T
    harder = torch.where(own, (cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos() + margin).cos(), cosines)
    surprise = -F.log_softmax(scale * harder, dim=1)
    return 0.1 * ((1 - own / own.sum(dim=1, keepdim=True)) * surprise).amax(dim=1).mean()


def test_with_one_caption_each_the_caption_loss_is_arcface_on_fixed_proxies_and_its_last_term():
    images, captions = rows_of(12, 16).requires_grad_(), rows_of(30, 16, 1)
    labels = torch.from_numpy(np.random.default_rng(2).integers(0, 30, 12))
    own = F.one_hot(labels, 30).bool()
    theirs = ArcFaceLoss(num_classes=30, embedding_size=16, margin=math.degrees(0.1), scale=30)
    theirs.W.data = captions.T.clone()
    ours = losses.multi_caption_loss(images, captions, own, 30.0, 0.1)
    expected = theirs(images, labels) + last_term(images, captions, own, 30.0, 0.1)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    mine, other = (torch.autograd.grad(value, images)[0] for value in (ours, expected))
    assert torch.allclose(mine, other, atol=1e-5)


def test_without_margin_the_caption_loss_is_cross_entropy_with_equal_shares_and_its_last_term():
    images, captions = rows_of(8, 16), rows_of(20, 16, 1)
    own = torch.from_numpy(np.random.default_rng(3).random((8, 20)) < 0.3)
    own[:, 0] = True
    expected = F.cross_entropy(12 * images @ captions.T, own / own.sum(1, keepdim=True))
    expected = expected + last_term(images, captions, own, 12.0, 0.0)
    assert losses.multi_caption_loss(images, captions, own, 12.0, 0.0).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 0.5), st.floats(1, 40), st.integers(0, 1000))
def test_the_caption_loss_of_a_batch_is_the_mean_of_the_open_version(n, m, margin, scale, seed):
    rng = np.random.default_rng(seed)
    images, captions = torch.from_numpy(unit(rng, n, 8)), torch.from_numpy(unit(rng, m, 8))
    own = torch.from_numpy(rng.random((n, m)) < 0.5)
    own[np.arange(n), rng.integers(0, m, n)] = True
    # far from the own caption the course's follows the branch of ArcMargin that goes on downwards: the open one has none
    cosines = images.double() @ captions.double().T
    own &= (cosines > -0.85) | (own.sum(1, keepdim=True) == 1)
    if not own.any(1).all() or (cosines[own] <= -0.85).any():
        return
    expected = np.mean([
        nb.caption_loss_by_hand(image, captions, row, scale, margin).item()
        for image, row in zip(images, own, strict=True)
    ])  # fmt: skip
    assert losses.multi_caption_loss(images, captions, own, scale, margin).item() == pytest.approx(
        expected, rel=1e-3, abs=1e-3
    )


def test_an_image_without_captions_has_only_the_last_term_and_a_batch_without_any_has_no_loss():
    images, captions = rows_of(2, 8).requires_grad_(), rows_of(5, 8, 1)
    own = torch.zeros(2, 5, dtype=torch.bool)
    surprise = -F.log_softmax(30 * images @ captions.T, dim=1)
    assert losses.multi_caption_loss(images, captions, own).item() == pytest.approx(
        0.1 * surprise.amax(1).mean().item(), rel=1e-5
    )
    nothing = losses.multi_caption_loss(images, captions[:0], own[:, :0])
    nothing.backward()
    assert nothing.item() == 0 and not images.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_caption_loss_is_finite_where_image_and_caption_coincide(dtype):
    captions = torch.eye(4)
    images = torch.cat([captions[:2], -captions[:2]]).to(dtype).requires_grad_()
    loss = losses.multi_caption_loss(images, captions, torch.eye(4).bool())
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(images.grad).all()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_captions_of_a_batch_are_counted_whatever_another_image_s_copy_is(n, top, seed):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(8)[:top] for _ in range(n)])
    rows[rng.random(rows.shape) < 0.4] = -1
    counts = (rows >= 0).sum(axis=1)
    for shared in losses.SHARED:
        columns, own = losses.batch_captions(torch.from_numpy(rows), shared)
        assert own.sum(1).tolist() == counts.tolist()
        assert own.shape == (n, len(columns))
        for image, mine in zip(rows, own, strict=True):
            assert sorted(columns[mine].tolist()) == sorted(image[image >= 0].tolist())
    unique, _ = losses.batch_captions(torch.from_numpy(rows))
    assert len(set(unique.tolist())) == len(unique) == len(set(rows[rows >= 0].tolist()))


def test_as_in_the_originals_another_image_s_copy_of_a_caption_is_a_wrong_answer():
    _, own = losses.batch_captions(torch.tensor([[7, 5], [7, -1], [-1, -1]]), "wrong")
    assert own.int().tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    encoder = gu.load_encoder("mini")
    texts = ["a red vase", "a face with black hair", "a blue vase"]
    tokens, features = encoder.tokenizer(texts), rows_of(3, encoder.dim)
    scale = encoder.model.logit_scale.exp()
    theirs = ClipLoss()(features, F.normalize(encoder.model.encode_text(tokens)), scale)
    numbers = torch.tensor([4, 4, 2])
    wrong, right = (
        training.Realignment(encoder.model, 10, shared)(features, tokens, numbers) for shared in ("wrong", "right")
    )
    assert wrong.item() == pytest.approx(theirs.item(), rel=1e-5) and abs(right.item() - theirs.item()) > 1e-3


# --- InfoNCE and gradient caching ---


def test_info_nce_of_different_captions_is_open_clips():
    images, texts = rows_of(10, 16).requires_grad_(), rows_of(10, 16, 1).requires_grad_()
    ours, theirs = losses.info_nce(images, texts, 20.0, torch.arange(10)), ClipLoss()(images, texts, 20.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for mine, other in zip(*(torch.autograd.grad(value, (images, texts)) for value in (ours, theirs)), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_images_that_share_a_caption_are_right_answers_to_it():
    images, texts, numbers = rows_of(6, 8), rows_of(6, 8, 1), torch.tensor([5, 5, 6, 7, 6, 5])
    logits = 10 * images @ texts.T
    expected = 0
    for scores in (logits, logits.T):  # the mean surprise of an image's right texts, and of a text's right images
        surprise = -F.log_softmax(scores, dim=1)
        expected += np.mean([surprise[i, numbers == numbers[i]].mean().item() for i in range(6)]) / 2
    assert losses.info_nce(images, texts, 10.0, numbers).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 10, 100])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch_from_small_encodings(chunk, monkeypatch):
    encoder = gu.load_encoder("mini")
    texts = [f"a {color} vase" for color in ("red", "blue", "green", "white", "black")] * 2
    tokens, features = encoder.tokenizer(texts), rows_of(10, encoder.dim)
    numbers = torch.arange(10) % 5
    training.Realignment(encoder.model, 100)(features, tokens, numbers).backward()
    whole = {name: value.grad.clone() for name, value in encoder.model.named_parameters() if value.grad is not None}
    encoder.model.zero_grad(set_to_none=True)
    seen, encode = [], encoder.model.encode_text
    monkeypatch.setattr(encoder.model, "encode_text", lambda part: (seen.append(len(part)), encode(part))[1])
    training.Realignment(encoder.model, chunk)(features, tokens, numbers).backward()
    assert max(seen) <= chunk
    assert whole
    for name, value in encoder.model.named_parameters():
        if value.grad is not None:
            assert torch.allclose(value.grad, whole[name], atol=1e-5), name


# --- caption banks ---


def tar_of(path, captions, cut=None):
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(captions):
            for suffix, content in ((".jpg", b"\xff\xd8" * 700), (".txt", caption.encode()), (".json", b"{}")):
                info = tarfile.TarInfo(f"{i:05d}{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    if cut:
        path.write_bytes(path.read_bytes()[:cut])


@pytest.fixture
def banks(tmp_path):
    """The same captions as a text file, tables, one tar and a folder of tars."""
    captions = ["a cat", "two dogs,\nrunning", "ein Käse", "a cat"]
    (tmp_path / "bank.txt").write_text("a cat\n\n  two dogs, running \nein Käse\r\na cat\n", encoding="utf-8")
    (tmp_path / "bank.csv").write_text(
        'url,caption\nx,a cat|"two dogs,\nrunning"\n'.replace('|"', '\ny,"') + "z,ein Käse|a cat\n", encoding="utf-8"
    )
    (tmp_path / "bank.tsv").write_text(
        "caption\turl\na cat|two dogs, running\tx\nein Käse\ty\na cat\tz\n", encoding="utf-8-sig"
    )
    tar_of(tmp_path / "bank.tar", captions)
    (tmp_path / "shards").mkdir()
    tar_of(tmp_path / "shards" / "00001.tar", captions[2:])
    tar_of(tmp_path / "shards" / "00000.tar", captions[:2])
    return tmp_path


@pytest.mark.parametrize("name", ["bank.txt", "bank.csv", "bank.tsv", "bank.tar", "shards"])
def test_every_kind_of_bank_gives_the_same_captions(banks, tmp_path, name):
    files = caption_banks.list_text_files(banks / name, tmp_path / "copies")
    assert list(caption_banks.read_captions(files)) == ["a cat", "two dogs, running", "ein Käse", "a cat"]


def test_a_changed_table_is_read_again_and_an_unchanged_one_is_not(banks, tmp_path):
    (first,) = caption_banks.list_text_files(banks / "bank.tsv", tmp_path / "copies")
    stamp = first.stat().st_mtime_ns
    assert (
        caption_banks.list_text_files(banks / "bank.tsv", tmp_path / "copies") == [first]
        and first.stat().st_mtime_ns == stamp
    )
    (banks / "bank.tsv").write_text("caption\na horse\n")
    assert list(
        caption_banks.read_captions(caption_banks.list_text_files(banks / "bank.tsv", tmp_path / "copies"))
    ) == ["a horse"]


def test_broken_banks_are_named_and_leave_nothing_half_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no captions at .*nowhere.txt: give a .txt"):
        caption_banks.list_text_files(tmp_path / "nowhere.txt", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder of .tar"):
        caption_banks.list_text_files(tmp_path / "empty", tmp_path)
    (tmp_path / "bank.csv").write_text("url,words\nx,a cat\n")
    with pytest.raises(
        ValueError, match="bank.csv has no column 'caption'; its first line holds url, words; name it 'caption'"
    ):
        caption_banks.list_text_files(tmp_path / "bank.csv", tmp_path / "copies")
    (tmp_path / "bank.pdf").write_text("x")
    with pytest.raises(ValueError, match="bank.pdf is no caption bank"):
        caption_banks.list_text_files(tmp_path / "bank.pdf", tmp_path)
    tar_of(tmp_path / "cut.tar", ["a cat", "a dog"], cut=3000)
    with pytest.raises(ValueError, match="cut.tar is not a whole tar file"):
        caption_banks.list_text_files(tmp_path / "cut.tar", tmp_path / "copies")
    assert not list((tmp_path / "copies").glob("*"))


def test_a_table_with_an_open_quotation_mark_is_named_and_tabs_need_no_quotes(tmp_path):
    (tmp_path / "bank.tsv").write_text('caption\n"quoted at the start\nanother\nthird"\n')
    found = list(caption_banks.read_captions(caption_banks.list_text_files(tmp_path / "bank.tsv", tmp_path / "copies")))
    assert found == ['"quoted at the start', "another", 'third"']
    (tmp_path / "bank.csv").write_text('caption\n"' + "a very long line\n" * 20_000)
    with pytest.raises(ValueError, match="bank.csv, line .*is a quotation mark left open there"):
        caption_banks.list_text_files(tmp_path / "bank.csv", tmp_path / "copies")


class SigLipLike:
    """Pads with 1, ends with 1, 64 places: as SigLIP's tokenizer does."""

    def __call__(self, texts, context_length=64):
        rows = [[5 + len(word) for word in text.split()][: context_length - 1] + [1] for text in texts]
        return torch.tensor([row + [1] * (context_length - len(row)) for row in rows])


@pytest.mark.parametrize(
    ("tokenizer", "most"),
    [(open_clip.SimpleTokenizer(), 75), (gu.load_encoder("mini", "cpu").tokenizer, 62), (SigLipLike(), 63)],
    ids=["clip", "mini", "siglip"],
)
def test_words_and_cuts_are_told_for_any_tokenizer(tokenizer, most):
    texts = ["", "  ", "red", "red " * most, "red " * (most + 1), "red " * 500]
    assert caption_banks.has_words(tokenizer, texts).tolist() == [False, False, True, True, True, True]
    assert caption_banks.is_cut(tokenizer, texts).tolist() == [False, False, False, False, True, True]


# --- the search ---

WORDS = [f"a {color} {thing}" for color in ("red", "blue", "white", "green") for thing in ("vase", "flower", "face")]


@pytest.mark.parametrize("portion", [1, 3, 5, 1000])
@pytest.mark.parametrize("top", [2, 20])
def test_the_search_by_portions_is_the_search_over_all_captions(world, cache, portion, top):
    encoder = gu.load_encoder("mini")
    images = gu.embed_images(encoder, world.subset(np.arange(40)))[0]
    scores, rows = caption_banks.find_captions(encoder, images, WORDS, top, portion)
    exact = images @ gu.embed_texts(encoder, WORDS).T
    k = min(top, len(WORDS))
    expected = np.argsort(-exact, axis=1)[:, :k]
    assert rows[:, :k].tolist() == expected.tolist()
    assert np.allclose(scores[:, :k], np.take_along_axis(exact, expected, 1), atol=1e-6)
    assert (scores[:, k:] == -np.inf).all() and (rows[:, k:] == -1).all()


def test_a_stopped_search_embeds_no_portion_twice(world, cache, monkeypatch):
    encoder = gu.load_encoder("mini")
    images = gu.embed_images(encoder, world.subset(np.arange(20)))[0]
    run, seen = gu.run_tower, []

    def stopping(encoder, tower, batch, size):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(list(batch))
        return run(encoder, tower, batch, size)

    monkeypatch.setattr(gu, "run_tower", stopping)
    with pytest.raises(KeyboardInterrupt):
        caption_banks.find_captions(encoder, images, WORDS, 5, 3)
    seen.clear()
    monkeypatch.setattr(
        gu, "run_tower", lambda e, tower, batch, size: (seen.append(list(batch)), run(e, tower, batch, size))[1]
    )
    caption_banks.find_captions(encoder, images, WORDS, 5, 3)
    assert seen == [WORDS[6:9], WORDS[9:12]]


def test_wordless_and_cut_captions_are_counted_and_the_wordless_are_not_found(world, cache, capsys):
    encoder = gu.load_encoder("mini")
    images = gu.embed_images(encoder, world.subset(np.arange(4)))[0]
    scores, rows = caption_banks.find_captions(encoder, images, ["\ufeff", "a red vase", "a vase " * 40], 5, 2)
    assert "3 captions searched with mini; 1 have no words for it, 1 lose their end" in capsys.readouterr().out
    assert [sorted(row) for row in rows.tolist()] == [[-1, -1, -1, 1, 2]] * 4
    with pytest.raises(ValueError, match="pixels has no text tower to find captions with; choose mini"):
        caption_banks.find_captions(gu.load_encoder("pixels"), images, WORDS)


def test_captions_above_the_threshold_remain_and_are_numbered_anew():
    scores, rows = np.array([[0.9, 0.4], [0.6, 0.5]]), np.array([[7, 2], [3, 7]])
    captions = [f"caption {i}" for i in range(9)]
    assert caption_banks.keep_near(scores, rows, captions, 0.45)[0].tolist() == [[1, -1], [0, 1]]
    kept, used = caption_banks.keep_near(scores, rows, captions, 0.55)
    assert used == ["caption 3", "caption 7"] and kept.tolist() == [[1, -1], [0, -1]]
    with pytest.raises(ValueError, match="no caption lies above 0.95; the nearest is at 0.90: lower the threshold"):
        caption_banks.keep_near(scores, rows, captions, 0.95)


def test_true_words_are_those_that_the_images_own_captions_have(folder):
    images = gu.load_images(folder).subset([0, 4, 8])
    captions = ["a red vase with flowers", "a vase", "the sky"]
    rows = np.array([[0, 1], [2, -1], [0, 2]])
    assert np.isnan(caption_banks.share_true_words(images, rows, captions)).all(), "nothing is known"
    images.captions = [["a red vase, and leaves"], ["blue sky"], []]
    expected = [[2 / 3, 1], [1, np.nan], [np.nan, np.nan]]
    assert np.allclose(caption_banks.share_true_words(images, rows, captions), expected, equal_nan=True)


def test_banks_come_by_name_or_file_and_the_drawn_worlds_captions_only_for_its_own_images(banks, cache, shapes):
    drawn, own = splitting.load_splits("mini"), splitting.load_splits(shapes)
    captions = caption_banks.load_captions("mini", drawn)
    assert len(captions) == len(set(captions)) > 5000 and set(captions) == set(
        image_set.text_queries(gu.load_images("mini", "bank"))[0]
    )
    assert caption_banks.load_captions(banks / "bank.tsv", own) == ["a cat", "two dogs, running", "ein Käse"]
    (banks / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt holds no captions: put one on each line"):
        caption_banks.load_captions(banks / "empty.txt", own)
    for load, name in ((caption_banks.load_captions, "bank"), (caption_banks.load_pairs, "pair_images")):
        with pytest.raises(ValueError, match=f"needs a bank and pair_images of its own.*{name} = 'mini'"):
            load("mini", own)


def test_pairs_that_show_a_test_image_or_say_nothing_are_left_out(folder):
    pairs, test = gu.load_images(folder), gu.load_images(folder).subset([0, 5])
    pairs.captions = [["a blue square", " "]] * 4 + [["a green square"]] * 4 + [[], [" "], [""], ["red"]]
    left = caption_banks.exclude_images(pairs, (test,))
    assert left.captions == [["a blue square"]] * 3 + [["a green square"]] * 3 + [["red"]]
    pairs.captions = None
    with pytest.raises(ValueError, match="photos has no captions for images outside test and validation"):
        caption_banks.exclude_images(pairs, (test,))


def test_weights_are_chosen_on_validation_images_with_captions_of_their_own_or_else_on_a_tenth_of_the_pairs(shapes):
    pairs, chosen = caption_banks.load_pairs("mini", drawn := splitting.load_splits("mini"))
    assert len(pairs) == 7200 and chosen is drawn.text_validation
    (shapes / "captions.json").write_text(json.dumps({f"class {i}": [f"a square of kind {i}"] for i in range(10)}))
    splits = splitting.load_splits(shapes)
    pairs, chosen = caption_banks.load_pairs(shapes, splits)
    assert chosen is splits.text_validation and len(pairs) == len(splits.train)
    for images in (*splits.validation, *splits.test):
        images.captions = None
    pairs, chosen = caption_banks.load_pairs(shapes, splits)
    assert len(chosen) == len(splits.train) // 10 and len(pairs) + len(chosen) == len(splits.train)
    assert not set(pairs.digests()) & set(chosen.digests())


# --- what was taken home, and realigning it ---


def test_the_encoder_to_realign_is_what_notebook_03_left_or_the_shipped_copy_or_is_trained_now(
    shapes, tmp_path, monkeypatch
):
    monkeypatch.setattr(gu, "work_folder", lambda: tmp_path)
    run = gu.setup("mine")
    photos, chosen_on, _ = splitting.load_splits("mini").open_sets()
    shipped, source = training.load_or_train_03(run, "mini", photos, chosen_on, {})
    assert "comes with the course" in source and shipped.has_text
    stored = load_file(gu.DATA / "mini_tuned" / "arcmargin.safetensors")
    assert torch.equal(shipped.model.state_dict()["visual.proj"].cpu(), stored["visual.proj"].float())
    checkpoints.save_checkpoint(gu.load_encoder("mini"), run.folder / "03_arcmargin", tuned_from="mini")
    found, source = training.load_or_train_03(run, "mini", photos, chosen_on, {})
    assert source == "what notebook 03 left in runs/mine"
    assert found.fingerprint() == gu.load_encoder("mini").fingerprint()
    assert "comes with the course" not in training.load_or_train_03(run, "mini", photos, chosen_on, {})[1]
    checkpoints.save_checkpoint(
        gu.load_encoder("mini"), run.folder / "03_arcmargin", tuned_from="mini@another.safetensors"
    )
    assert "comes with the course" in training.load_or_train_03(run, "mini", photos, chosen_on, {})[1], (
        "of another start"
    )
    checkpoints.save_checkpoint(
        heads.add_head(gu.load_encoder("mini"), 16), run.folder / "03_arcmargin", tuned_from="mini"
    )
    assert "comes with the course" in training.load_or_train_03(run, "mini", photos, chosen_on, {})[1], (
        "a head has no words"
    )
    photos, chosen_on, _ = splitting.load_splits(shapes).open_sets()
    settings = {"epochs": 0.5, "batch_size": 8, "rate": 1e-4}
    trained, source = training.load_or_train_03(run, "mini", photos, chosen_on, settings)
    assert (
        source == "a fine-tuning on images alone, done now" and len(list((run.folder / "03_training").iterdir())) == 1
    )
    assert training.load_or_train_03(run, "mini", photos, chosen_on, settings)[0].fingerprint() == trained.fingerprint()


def test_realigning_changes_the_end_of_the_text_tower_and_needs_one(shapes, tmp_path, capsys):
    (shapes / "captions.json").write_text(json.dumps({f"class {i}": [f"a square {i} " * 40] for i in range(10)}))
    splits = splitting.load_splits(shapes)
    pairs, chosen = caption_banks.load_pairs(shapes, splits)
    encoder = gu.load_encoder("mini")
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    realigned, log = training.realign(encoder, pairs, chosen, tmp_path, epochs=2, batch_size=8, rate=1e-3)
    assert realigned is encoder and "validation" in log[-1]
    assert "are too long for mini and lose their end" in capsys.readouterr().out
    changed = {key for key, value in encoder.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and not [key for key in changed if key.startswith(("visual.", "token_embedding"))]
    for without in (gu.load_encoder("pixels"), heads.add_head(gu.load_encoder("mini"), 8)):
        with pytest.raises(ValueError, match="has no text tower to realign; choose mini or an open_clip: encoder"):
            training.realign(without, pairs, chosen, tmp_path)
    with pytest.raises(ValueError, match="shared_captions is one of right, wrong, not 'x'"):
        training.realign(encoder, pairs, chosen, tmp_path, shared_captions="x")


def test_the_paper_realigns_with_its_own_betas_and_epsilon():
    encoder = gu.load_encoder("mini")
    for group in training.select_text_parameters(encoder.model, 1e-5, betas=(0.9, 0.98), eps=1e-6):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.98), 1e-6, 1e-5)
    optimizer = torch.optim.AdamW(training.select_text_parameters(encoder.model, 1e-5, betas=(0.9, 0.98), eps=1e-6))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}


# --- what is trained, and the checkpoint ---

VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS = {
    "tiny-clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-sigmoid": {
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"context_length": 64, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "tiny-custom-text": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": False},
    },
}


@pytest.fixture
def configs(tmp_path):
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways_end_in_a_whole_model_that_open_clip_loads_strictly(name, configs, folder, tmp_path, cache):
    encoder = gu.load_encoder(f"open_clip:{name}/random")
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    images = gu.load_images(folder)
    texts = ["a red square", "something blue", "green"]
    rows = np.array([[2, 1, -1]] * 4 + [[0, -1, -1]] * 4 + [[-1, -1, -1]] * 4)
    captions = training.Captions(rows, texts, gu.embed_texts(encoder, texts))
    data = training_data.TrainingImages(images, training_data.make_training_transform(encoder), captions)
    torch.manual_seed(0)
    objective = training.ImageObjective(encoder, losses.ArcMargin(16, 3), captions)
    training_loop.fit(
        objective, data, tmp_path / "mcip", training.select_image_parameters(encoder, 1e-3), epochs=2, batch_size=6
    )
    between = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    changed = {key for key in before if not torch.equal(before[key], between[key])}
    assert changed and all(key.startswith("visual.") for key in changed), "the text tower is frozen"

    features = gu.embed_images(encoder, images)[0]
    pairs = training_data.CaptionPairs(features, [texts] * len(images), encoder.tokenizer)
    groups = training.select_text_parameters(encoder.model, 1e-2)
    training_loop.fit(
        training.Realignment(encoder.model, 4), pairs, tmp_path / "realigned", groups, epochs=2, batch_size=6
    )
    after = encoder.model.state_dict()
    changed = {key.removeprefix("text.") for key in before if not torch.equal(between[key], after[key])}
    ends = ("transformer.resblocks.1.", "ln_final.", "text_projection")
    assert {"ln_final.weight", "logit_scale"} <= changed
    assert all(key.startswith(ends) or key == "logit_scale" for key in changed), "only the end of the text tower"

    path = checkpoints.save_checkpoint(encoder, tmp_path / "tuned")
    plain = open_clip.create_model(name, load_weights=False)
    plain.load_state_dict(load_file(path), strict=True)
    probe = encoder.tokenizer(texts)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, after[key]), key
    assert torch.allclose(plain.eval().encode_text(probe), encoder.model.eval().encode_text(probe), atol=1e-5)
    again = gu.load_encoder(f"open_clip:{name}@{path}")
    assert np.allclose(gu.embed_images(again, images, cache=False)[0], gu.embed_images(encoder, images)[0], atol=1e-5)


def test_what_a_caption_training_learns_from_is_part_of_its_name(folder, tmp_path, cache):
    images = gu.load_images(folder)

    def train(texts, rows):
        torch.manual_seed(0)
        encoder = gu.load_encoder("random")
        captions = training.Captions(rows, texts, gu.embed_texts(encoder, texts))
        data = training_data.TrainingImages(images, training_data.make_training_transform(encoder), captions)
        objective = training.ImageObjective(encoder, losses.ArcMargin(encoder.dim, 3), captions)
        training_loop.fit(
            objective, data, tmp_path / "runs", training.select_image_parameters(encoder, 1e-4), batch_size=6
        )
        return len(list((tmp_path / "runs").iterdir()))

    rows = np.zeros((12, 2), dtype=int)
    other = rows.copy()
    other[11, 1] = -1
    assert [train(["a", "b"], rows), train(["a", "b"], other), train(["a", "c"], rows), train(["a", "b"], rows)] == [
        1,
        2,
        3,
        3,
    ]


def test_new_text_weights_leave_cached_image_embeddings_valid_and_new_image_weights_do_not(cache):
    encoder = gu.load_encoder("mini")
    images, texts = encoder.fingerprint("images"), encoder.fingerprint("texts")
    with torch.no_grad():
        encoder.model.ln_final.weight.mul_(1.01)
    assert encoder.fingerprint("images") == images and encoder.fingerprint("texts") != texts
    texts = encoder.fingerprint("texts")
    with torch.no_grad():
        encoder.model.visual.ln_post.weight.mul_(1.01)
    assert encoder.fingerprint("images") != images and encoder.fingerprint("texts") == texts
