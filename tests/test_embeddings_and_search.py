"""Embedding with a cache that survives anything, and exact, approximate and binary search."""

import contextlib
import copy
import os
import signal
import sqlite3
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_apart, start_apart, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import gpnns_utils as gu
from gpnns import evaluation, training_data, training_loop
from gpnns.encoders import embedding_cache, heads
from gpnns.images import decoding


def test_embeddings_are_float32_unit_rows_in_the_order_of_the_images(world, cache):
    encoder = gu.load_encoder("mini", "cpu")
    embeddings = gu.embed_images(encoder, world)[0]
    assert embeddings.dtype == np.float32 and embeddings.shape == (240, 128)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    with torch.no_grad():
        alone = encoder.image_tower(encoder.preprocess(world[17])[None])[0].numpy()
    np.testing.assert_allclose(embeddings[17], alone / np.linalg.norm(alone), atol=1e-5)


def test_worker_processes_change_nothing(folder, cache, monkeypatch):
    encoder = gu.load_encoder("mini", "cpu")
    assert decoding.count_decoders(gu.load_images(folder), 12) == 0, "so few are decoded here"
    direct = gu.embed_images(encoder, gu.load_images(folder), cache=False)[0]
    monkeypatch.setattr(decoding, "count_decoders", lambda images, count: 2)
    np.testing.assert_array_equal(gu.embed_images(encoder, gu.load_images(folder), cache=False)[0], direct)


def many_files(folder, count=300):
    """Small pictures, linked under many names: opening and sending them costs what it costs for different ones."""
    (folder / "many").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    for i in range(count):
        (folder / "many" / f"{i:04d}.png").symlink_to(folder / f"{i % 8}.png")
    return gu.load_images(folder / "many")


def read_with_little(folder, out):
    """Embed, and read for training, where no file may grow, not in shared memory either, and few may be open."""
    import resource

    images, encoder = many_files(folder), gu.load_encoder("efficientnet_lite0", "cpu")
    images.labels = np.arange(len(images)) % 8
    data = training_data.TrainingImages(images, encoder.preprocess)
    decoding.count_decoders = lambda images, count: 8
    gu.run_tower = lambda encoder, tower, batch, size: gu.unit_rows(batch.flatten(1)[:, ::1000].numpy())
    encoder.dim = 151
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    vectors = gu.embed_images(encoder, images, batch_size=64, cache=False)[0]
    draws = [[(0, row) for row in range(start, start + 64)] for start in range(0, 256, 64)]
    repeatable = training_loop.Repeatable(data, 0)
    batches = list(decoding.read_in_workers(repeatable, draws, 8, training_loop.to_arrays))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for start in range(64):
        np.testing.assert_array_equal(batches[start % 4][start][1][0], data[64 * (start % 4) + start][0])
    np.save(out, vectors)


def test_workers_need_no_shared_memory_and_no_open_file_for_each_picture(tmp_path):
    done = run_apart(read_with_little, tmp_path, tmp_path / "out.npy", folder=tmp_path / "said")
    assert done.returncode == 0, done.stderr
    assert "could not go on" not in done.stderr
    vectors = np.load(tmp_path / "out.npy")
    assert vectors.shape == (300, 151)
    np.testing.assert_array_equal(vectors[:8], vectors[8:16])


class Numbers(torch.utils.data.Dataset):
    """Squares; a worker process that is asked for one of `fatal` dies, or raises `error`."""

    def __init__(self, fatal=(), error=None):
        self.fatal, self.error, self.home = fatal, error, os.getpid()

    def __getitem__(self, row):
        if row in self.fatal and self.error and (os.getpid() != self.home or type(self.error) is RuntimeError):
            raise self.error
        if row in self.fatal and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return row**2


@pytest.mark.parametrize(
    "error", [None, OSError(24, "Too many open files"), pytest.param(MemoryError(), marks=pytest.mark.slow)]
)
def test_workers_that_are_lost_are_replaced_by_fewer_and_nothing_is_lost_or_twice(error):
    rows = [list(range(start, start + 5)) for start in range(0, 50, 5)]
    with pytest.warns(UserWarning, match="going on with this one alone.*--shm-size") as caught:
        batches = list(decoding.read_in_workers(Numbers((31,), error), iter(rows), 4, np.array))
    ours = [str(one.message)[0] for one in caught if "could not go on" in str(one.message)]
    assert ours == ["4", "2", "1"]
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(50) ** 2)


def test_workers_that_cannot_be_started_are_done_without(monkeypatch):
    loader = decoding.DataLoader

    def no_semaphores(*given, num_workers, **settings):
        if num_workers:
            raise OSError(38, "Function not implemented")  # what Python says where there is no /dev/shm
        return loader(*given, num_workers=num_workers, **settings)

    monkeypatch.setattr(decoding, "DataLoader", no_semaphores)
    with pytest.warns(UserWarning, match="Function not implemented.*docker run --shm-size"):
        batches = list(decoding.read_in_workers(Numbers(), [[1, 2], [3]], 2, list))
    assert batches == [[1, 4], [9]]


def test_an_error_of_an_image_is_no_reason_to_change_the_workers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="a wrong size"):
            list(decoding.read_in_workers(Numbers((3,), RuntimeError("a wrong size")), [[1, 2], [3]], 2, list))
        with pytest.raises(OSError, match="Too many open files"):
            list(decoding.read_in_workers(AlwaysShort(), [[1]], 0, list))


class Stops(torch.utils.data.Dataset):
    def __getitem__(self, row):
        return next(iter([row] if row != 7 else []))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_is_lost_when_an_item_or_the_batches_stop_early(workers):
    with pytest.raises((ValueError, RuntimeError), match="StopIteration"):
        list(decoding.read_in_workers(Stops(), [[i, i + 1] for i in range(0, 20, 2)], workers, list))

    def batches():
        yield [1]
        raise OSError(5, "the list cannot be read")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not go on")
        with pytest.raises(OSError, match="the list cannot be read"):
            list(decoding.read_in_workers(Numbers(), batches(), workers, list))


class AlwaysShort(torch.utils.data.Dataset):
    def __getitem__(self, row):
        raise OSError(24, "Too many open files")


def counting(encoder):
    """The same encoder, and a list that grows by the size of each batch it computes."""
    batches, tower = [], encoder.image_tower

    def count(batch):
        batches.append(len(batch))
        return tower(batch)

    encoder.image_tower = count
    return batches


def test_a_second_run_reads_the_cache(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    batches = counting(encoder)
    first = gu.embed_images(encoder, gu.load_images(folder))[0]
    computed = sum(batches) - 1  # a probe goes into the key
    assert computed == 12
    np.testing.assert_array_equal(gu.embed_images(encoder, gu.load_images(folder))[0], first)
    assert sum(batches) - 1 == computed


def test_the_cache_follows_content_weights_and_preprocessing(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    batches = counting(encoder)
    before = gu.embed_images(encoder, gu.load_images(folder))[0]
    path = folder / "red" / "0.png"
    times = path.stat()
    Image.new("RGB", (50, 40), "black").save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same name, same time, other content
    after = gu.embed_images(encoder, gu.load_images(folder))[0]
    assert sum(batches) - 1 == 13 and not np.allclose(before[8], after[8]), "the changed one alone is computed"
    np.testing.assert_allclose(np.delete(before, 8, 0), np.delete(after, 8, 0), atol=1e-6)
    other = gu.load_encoder("random", "cpu")
    assert not np.allclose(gu.embed_images(other, gu.load_images(folder))[0], after)


def test_changing_weights_or_a_tower_in_place_is_noticed(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    before = gu.embed_images(encoder, gu.load_images(folder))[0]
    with torch.no_grad():
        encoder.model.visual.proj.mul_(torch.linspace(0.5, 1.5, 128))
    assert not np.allclose(gu.embed_images(encoder, gu.load_images(folder))[0], before)
    plain = gu.load_encoder("mini", "cpu")
    tower = plain.image_tower
    plain.image_tower = lambda batch: tower(batch).flip(1)
    np.testing.assert_allclose(gu.embed_images(plain, gu.load_images(folder))[0], before[:, ::-1], atol=1e-6)
    text, tokenizer = gu.embed_texts(plain, ["a vase"]), plain.tokenizer
    plain.tokenizer = lambda texts: tokenizer([t.upper() + " of gold" for t in texts])
    assert not np.allclose(gu.embed_texts(plain, ["a vase"]), text)


@pytest.mark.parametrize(
    "change",
    {
        "in place": lambda model: model.visual.proj.mul_(1.5),
        "around its version": lambda model: model.visual.proj.data.mul_(1.5),
        "a buffer's": lambda model: model.visual.register_buffer("scale", torch.ones(1)),
        "another state": lambda model: model.load_state_dict(gu.load_encoder("random", "cpu").model.state_dict()),
        "another parameter": lambda model: setattr(
            model.visual, "proj", torch.nn.Parameter(model.visual.proj.flip(0).clone())
        ),
        "a layer": lambda model: setattr(model.visual, "ln_post", torch.nn.Identity()),
        "a layer's attribute": lambda model: setattr(model.visual.ln_post, "eps", 1.0),
        "a hook": lambda model: model.visual.register_forward_hook(lambda module, given, found: found.flip(1)),
        "a step": lambda model: take_a_step(model.visual),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_fingerprint_is_kept_until_what_it_stands_for_changes(change, monkeypatch):
    encoder, probed = gu.load_encoder("mini", "cpu"), []
    features = type(encoder).features
    monkeypatch.setattr(type(encoder), "features", lambda *asked: probed.append(1) or features(*asked))
    before = encoder.fingerprint("images"), encoder.fingerprint("texts")
    with torch.no_grad():
        encoder.image_tower(torch.zeros(1, 3, 48, 48))
    assert (encoder.fingerprint("images"), encoder.fingerprint("texts")) == before and len(probed) == 2
    with torch.no_grad():
        change[1](encoder.model)
    probed.clear()
    assert encoder.fingerprint("images") != before[0] and len(probed) == 1
    assert (encoder.fingerprint("texts") == before[1]) == (change[0] != "another state")


def take_a_step(module):
    """One step of an optimizer."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for value in module.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()


def test_a_replaced_tower_tokenizer_or_preprocessing_is_noticed_also_when_it_is_changed_in_place():
    encoder = gu.load_encoder("mini", "cpu")
    seen = {encoder.fingerprint()}
    encoder.preprocess.transforms[-1].mean = (0.1, 0.2, 0.3)
    seen.add(encoder.fingerprint())
    tower, tokenizer = encoder.image_tower, encoder.tokenizer
    encoder.image_tower = lambda batch: tower(batch).flip(1)
    seen.add(encoder.fingerprint())
    assert len(seen) == 3
    texts = encoder.fingerprint("texts")
    encoder.tokenizer = lambda texts: tokenizer([text.upper() + " of gold" for text in texts])
    assert encoder.fingerprint("texts") != texts


@pytest.mark.parametrize(
    ("name", "dim", "before"),
    [
        ("mini", None, False),
        ("efficientnet_lite0:64", None, False),
        ("efficientnet_lite0:64", 8, False),
        ("mini", 8, False),
        ("mini", None, True),
        ("mini", 8, True),
    ],
)
def test_a_deep_copy_embeds_images_and_texts_with_weights_of_its_own(name, dim, before):
    encoder = gu.load_encoder(name, "cpu")
    encoder = heads.add_head(encoder, dim, before) if dim or before else encoder
    batch, texts = torch.rand(2, 3, *[encoder.image_size] * 2), ["a red flower", "a blue vase"]

    def embed(one):
        found = [one.features(one.image_tower, batch)]
        return found + ([one.features(one.text_tower, texts)] if one.has_text else [])

    old, marks = embed(encoder), [encoder.fingerprint(of) for of in ("images", "texts")[: 1 + encoder.has_text]]
    other = copy.deepcopy(encoder)
    for first, second in zip(old, embed(other), strict=True):
        np.testing.assert_array_equal(first, second)
    assert [other.fingerprint(of) for of in ("images", "texts")[: len(old)]] == marks
    with torch.no_grad():
        for value in other.model.parameters():
            value.mul_(1.3)
    for first, second, third in zip(old, embed(encoder), embed(other), strict=True):
        np.testing.assert_array_equal(first, second)
        assert not np.allclose(first, third)
    assert [encoder.fingerprint(of) for of in ("images", "texts")[: len(old)]] == marks
    assert not {other.fingerprint(of) for of in ("images", "texts")[: len(old)]} & set(marks)


def test_an_encoder_of_one_s_own_may_take_texts_without_a_tokenizer():
    encoder = gu.Encoder(
        "own",
        gu.load_encoder("pixels", "cpu").preprocess,
        lambda batch: batch.mean((2, 3)),
        lambda texts: torch.tensor([[float(len(text)), 1, 2] for text in texts]),
    )
    assert encoder.has_text and gu.embed_texts(encoder, ["a", "bcd"], cache=False).shape == (2, 3)
    assert encoder.fingerprint("texts") == encoder.fingerprint("texts") != encoder.fingerprint("images")
    with pytest.raises(ValueError, match="pixels encodes images only"):
        gu.load_encoder("pixels", "cpu").text_tower(["a"])


def trimmed(image):
    """A picture without its white border."""
    pixels = np.asarray(image)
    rows, columns = (np.flatnonzero((pixels < 255).any(axis=(2, axis))) for axis in (1, 0))
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)) if len(rows) else image


@pytest.mark.parametrize(
    "change",
    [
        trimmed,
        lambda image: image.crop(image.getbbox()),  # without a black border
        lambda image: image.reduce(2) if image.width > 600 else image,
        lambda image: image.rotate(90, expand=True) if image.height > image.width else image,
        lambda image: image.convert("L").convert("RGB") if image.width < 20 else image,
        lambda image: image.point(lambda value: max(value, 30)),
    ],
)
def test_preprocessing_that_changes_some_kind_of_picture_changes_the_key(change):
    encoder = gu.load_encoder("mini", "cpu")
    before, plain = encoder.fingerprint(), encoder.preprocess
    encoder.preprocess = lambda image: plain(change(image))
    changed = encoder.fingerprint()
    encoder.preprocess = lambda image: plain(image)
    assert changed != encoder.fingerprint() and encoder.fingerprint() != before


def test_a_transform_s_own_description_is_part_of_the_key_and_its_address_is_not():
    first, second = gu.load_encoder("mini", "cpu"), gu.load_encoder("mini", "cpu")
    compose, steps = type(first.preprocess), first.preprocess.transforms

    def defined_anew():
        def same(image):
            return image

        return same

    functions = [defined_anew(), defined_anew()]  # both live, so at two addresses
    first.preprocess, second.preprocess = (compose([function, *steps]) for function in functions)
    assert repr(first.preprocess) != repr(second.preprocess) and first.fingerprint() == second.fingerprint()

    class Strict(torch.nn.Module):
        def __init__(self, least):
            super().__init__()
            self.least = least

        def forward(self, image):
            return image.resize((self.least, self.least)) if image.width < 5 else image

        def extra_repr(self):
            return f"least={self.least}"

    first.preprocess, second.preprocess = (compose([Strict(least), *steps]) for least in (64, 32))
    assert first.fingerprint() != second.fingerprint(), "no test picture is that narrow"


def test_only_what_is_new_is_computed(folder, cache):
    """One photo more, in front of all others; a part of them; another name; the same picture twice."""
    encoder = gu.load_encoder("mini", "cpu")
    batches = counting(encoder)
    gu.embed_images(encoder, gu.load_images(folder))
    computed = sum(batches)

    def count_new(images):
        nonlocal computed
        embeddings, found = gu.embed_images(encoder, images)
        assert len(embeddings) == len(found) == len(images)
        new, computed = sum(batches) - computed, sum(batches)
        return new

    Image.new("RGB", (50, 40), (1, 2, 3)).save(folder / "blue" / "+.png")
    images = gu.load_images(folder)
    assert images.images[0].name == "+.png" and count_new(images) == 1
    assert count_new(images.subset([7, 3, 3])) == 0
    (folder / "blue" / "0.png").rename(folder / "red" / "renamed.png")
    (folder / "red" / "twice.png").write_bytes((folder / "red" / "1.png").read_bytes())
    assert count_new(gu.load_images(folder)) == 0


def test_a_file_that_could_not_be_read_once_is_read_when_it_can_be(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    whole = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "0.png").write_bytes(whole[:200])
    with pytest.warns(UserWarning, match="1 of 12 images cannot be read"):
        assert len(gu.embed_images(encoder, gu.load_images(folder))[0]) == 11
    times = (folder / "red" / "0.png").stat()
    (folder / "red" / "0.png").write_bytes(whole)
    os.utime(folder / "red" / "0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(gu.embed_images(encoder, gu.load_images(folder))[0]) == 12


def test_a_passing_error_of_a_disk_is_not_kept(folder, cache, monkeypatch):
    """The same bytes, which could not be decoded for a moment."""
    encoder = gu.load_encoder("mini", "cpu")
    with monkeypatch.context() as troubled:
        troubled.setattr(Image, "open", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(ValueError, match="all 12 images cannot be read"):
            gu.embed_images(encoder, gu.load_images(folder))
    assert len(gu.embed_images(encoder, gu.load_images(folder))[0]) == 12


def test_several_that_write_at_the_same_time_lose_nothing(tmp_path):
    vectors = gu.unit_rows(np.random.default_rng(0).normal(size=(400, 16)))
    keys = [str(i).encode() for i in range(400)]

    def write(part):
        for row in range(part, 400, 8):
            embedding_cache.write_embeddings(tmp_path / "all.sqlite", [(keys[row], vectors[row])])

    threads = [threading.Thread(target=write, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = embedding_cache.read_embeddings(tmp_path / "all.sqlite", keys, 16)
    np.testing.assert_array_equal([found[key] for key in keys], vectors)


def test_a_cache_of_the_old_form_is_not_misread(folder, cache):
    encoder, images = gu.load_encoder("mini", "cpu"), gu.load_images(folder)
    old = cache / "embeddings" / f"{encoder.fingerprint('images')}-float32-images"
    old.mkdir(parents=True)
    np.save(old / "0123456789abcdef.npy", np.ones((12, 128), np.float32))
    np.testing.assert_array_equal(gu.embed_images(encoder, images)[0], gu.embed_images(encoder, images, cache=False)[0])
    assert np.load(old / "0123456789abcdef.npy").all(), "and it is left alone"


def test_scores_stay_beside_their_queries_when_an_image_cannot_be_read(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    whole = evaluation.evaluate(encoder, gu.load_images(folder))["image to image"]
    (folder / "green" / "2.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="1 of 12 images cannot be read"):
        part = evaluation.evaluate(encoder, gu.load_images(folder))["image to image"]
    assert part.per_query.shape == whole.per_query.shape and np.flatnonzero(np.isnan(part.per_query)).tolist() == [6]


def test_a_damaged_cache_file_is_named_and_computed_again(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    first = gu.embed_images(encoder, gu.load_images(folder))[0]
    (kept,) = cache.rglob("*.sqlite")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        again = gu.embed_images(encoder, gu.load_images(folder))[0]
    np.testing.assert_array_equal(first, again)


def embed_slowly(out, pause):
    """Embed a part of the drawn world, kept 64 by 64, with a pause before each batch."""
    gu.SAVE_EVERY = 64
    torch.set_num_threads(1)
    encoder = gu.load_encoder("mini", "cpu")
    tower = encoder.image_tower
    encoder.image_tower = lambda batch: time.sleep(pause) or tower(batch)
    images = gu.load_images("mini", "test")
    np.save(out, gu.embed_images(encoder, images.subset(images.labels % 40 < 4), batch_size=16)[0])


def test_a_killed_run_goes_on_where_it_stopped_with_identical_bits(world, tmp_path):
    drawn = gu.cache_folder() / "mini_world"  # drawn once for all tests

    def start(cache, out, pause):
        (tmp_path / cache).mkdir(exist_ok=True)
        if not (tmp_path / cache / "mini_world").exists():
            (tmp_path / cache / "mini_world").symlink_to(drawn)
        environment = {"GPNNS_CACHE": str(tmp_path / cache)}
        return start_apart(embed_slowly, tmp_path / out, pause, folder=tmp_path / "said", environment=environment)

    def kept(cache):
        """The embeddings that are kept, by key."""
        found = {}
        for file in (tmp_path / cache / "embeddings").rglob("*.sqlite"):
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(file)) as base:
                found |= dict(base.execute("SELECT key, vector FROM embeddings"))
        return found

    def finish(process):
        process.join(60)
        assert process.exitcode == 0

    process = start("killed", "never.npy", 0.25)
    deadline = time.time() + 60
    while len(kept("killed")) < 128 and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = kept("killed")
    assert 128 <= len(done) < 240, "the run was killed half-way"
    assert not (tmp_path / "never.npy").exists()
    finish(start("killed", "resumed.npy", 0))
    assert done.items() <= kept("killed").items(), "what was finished is kept as it was"
    finish(start("fresh", "fresh.npy", 0))
    assert (tmp_path / "resumed.npy").read_bytes() == (tmp_path / "fresh.npy").read_bytes()


def break_some(folder):
    (folder / "blue" / "1.png").write_bytes(b"not an image")
    whole = (folder / "green" / "2.png").read_bytes()
    (folder / "green" / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "3.png").write_bytes(b"")


def test_unreadable_images_are_named_left_out_and_counted(folder, cache):
    encoder = gu.load_encoder("mini", "cpu")
    whole = gu.embed_images(encoder, gu.load_images(folder))[0]
    break_some(folder)
    for run in ("computed", "from the cache"):
        images = gu.load_images(folder)
        with pytest.warns(UserWarning, match="3 of 12 images cannot be read") as caught:
            embeddings, found = gu.embed_images(encoder, images)
        message = str(caught[0].message)
        assert len(caught) == 1 and all(name in message for name in ("blue/1.png", "green/2.png", "red/3.png")), run
        assert len(found.left_out) == 3 and len(images) == 12 and not images.left_out, "the argument stays as it was"
        kept = np.setdiff1d(np.arange(12), [1, 6, 11])
        np.testing.assert_array_equal(found.labels, np.repeat([0, 1, 2], 4)[kept])
        np.testing.assert_allclose(embeddings, whole[kept], atol=1e-6)
        assert [p.name for p in found.images][:3] == ["0.png", "2.png", "3.png"]


def test_no_readable_image_at_all_is_an_error(folder, cache):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="all 12 images cannot be read; the first is .*0.png"):
        gu.embed_images(gu.load_encoder("mini", "cpu"), gu.load_images(folder))


def blank_pages(folder, *names):
    for name in names:
        Image.new("RGB", (50, 40), "white").save(folder / name)


def test_a_blank_page_is_left_out_and_named_like_an_unreadable_file(folder, cache):
    """`pixels` subtracts the mean color; of one color nothing remains. The others keep their rows and their numbers."""
    encoder = gu.load_encoder("pixels", "cpu")
    whole = gu.embed_images(encoder, gu.load_images(folder), cache=False)[0]
    blank_pages(folder, "blue/1.png", "red/3.png")
    (folder / "green" / "2.png").write_bytes(b"broken")
    for run in ("computed", "from the cache", "not cached"):
        images = gu.load_images(folder)
        with pytest.warns(UserWarning) as caught:
            embeddings, found = gu.embed_images(encoder, images, batch_size=2, cache=run != "not cached")
        said = [str(warning.message) for warning in caught]
        assert "1 of 12 images cannot be read" in said[0] and "green/2.png" in said[0], run
        assert "2 of 12 images get a vector from pixels that is zero" in said[1]
        assert "blue/1.png" in said[1] and "red/3.png" in said[1] and len(said) == 2
        assert len(found.left_out) == 3
        kept = np.setdiff1d(np.arange(12), [1, 6, 11])
        np.testing.assert_array_equal(found.rows, kept)
        np.testing.assert_array_equal(found.labels, np.repeat([0, 1, 2], 4)[kept])
        np.testing.assert_allclose(embeddings, whole[kept], atol=1e-6)
    images = gu.load_images(folder)
    with pytest.warns(UserWarning, match="1 of 12 images cannot be read"):
        assert len(gu.embed_images(gu.load_encoder("mini", "cpu"), images)[0]) == 11, "mini has a vector for any page"


def test_only_blank_pages_are_an_error(folder, cache):
    blank_pages(folder, *[path.relative_to(folder) for path in folder.rglob("*.png")])
    with pytest.raises(ValueError, match="all 12 images get a vector from pixels that is zero"):
        gu.embed_images(gu.load_encoder("pixels", "cpu"), gu.load_images(folder))


def test_a_text_without_a_vector_is_named(cache):
    encoder = gu.load_encoder("mini", "cpu")
    tower, encoder.tokenizer = copy.copy(encoder).text_tower, None  # a tower of one's own takes the texts themselves
    encoder.encode_text = lambda texts: tower(texts) * torch.tensor([[float(text != "a void")] for text in texts])
    with pytest.raises(ValueError, match="mini gives a vector that is zero or not finite for 'a void'"):
        gu.embed_texts(encoder, ["a red flower", "a blue vase", "a void"], batch_size=2)
    assert not list(cache.rglob("*.sqlite"))


def test_text_asked_of_an_image_encoder_says_what_to_use(cache):
    with pytest.raises(ValueError, match="pixels encodes images only; for text, choose mini"):
        gu.embed_texts(gu.load_encoder("pixels", "cpu"), ["a flower"])
    with pytest.raises(ValueError, match="a list of strings, one or more, not"):
        gu.embed_texts(gu.load_encoder("mini", "cpu"), [])


def test_texts_are_cached_and_keep_their_order(cache):
    encoder = gu.load_encoder("mini", "cpu")
    texts = ["a red flower", "a blue vase", "a face with glasses"]
    first = gu.embed_texts(encoder, texts)
    tokenizer, asked = encoder.tokenizer, []
    encoder.tokenizer = lambda texts: asked.extend(texts) or tokenizer(texts)
    np.testing.assert_array_equal(gu.embed_texts(encoder, texts), first)
    assert not set(texts) & set(asked), "the cache answers"
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("factor", "message"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (0.0, "is zero")]
)
def test_an_encoder_that_returns_nonsense_is_an_error(world, cache, factor, message):
    encoder = gu.load_encoder("pixels", "cpu")
    tower = encoder.image_tower
    encoder.image_tower = lambda batch: tower(batch) * factor
    with pytest.raises(ValueError, match=f"the features of pixels: row 0 .*{message}"):
        gu.embed_images(encoder, world)
    assert not list(cache.rglob("*.sqlite")), "nothing wrong is cached"


def test_class_embeddings_average_prompts(cache):
    encoder = gu.load_encoder("mini", "cpu")
    classes = gu.class_embeddings(encoder, ["red flower", "blue vase"], ["a {}", "a photo of a {}"])
    each = gu.embed_texts(encoder, ["a red flower", "a photo of a red flower"])
    np.testing.assert_allclose(classes[0], gu.unit_rows(each.mean(0, keepdims=True))[0], atol=1e-6)
    assert gu.zero_shot_accuracy(classes, np.array([0, 1]), classes).mean == 1


# --- search ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(2, 20), st.sampled_from(["cosine", "l2", "hamming"]))
def test_exact_search_is_brute_force(seed, n, d, metric):
    rng = np.random.default_rng(seed)
    queries, gallery = rng.normal(size=(5, d)).astype(np.float32), rng.normal(size=(n, d)).astype(np.float32)
    k = int(rng.integers(1, n + 1))
    scores, rows = gu.search(queries, gallery, k, metric)
    if metric == "cosine":
        expected = gu.unit_rows(queries) @ gu.unit_rows(gallery).T
    elif metric == "l2":
        expected = np.linalg.norm(queries[:, None] - gallery[None], axis=2)
    else:
        expected = ((queries[:, None] > 0) != (gallery[None] > 0)).sum(2)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, 1), atol=2e-3)
    best = -np.sort(-expected, axis=1) if metric == "cosine" else np.sort(expected, axis=1)
    np.testing.assert_allclose(scores, best[:, :k], atol=2e-3)


def test_the_query_is_left_out_by_identity_wherever_duplicates_stand():
    rng = np.random.default_rng(0)
    gallery = np.repeat(unit(rng, 5, 8), 6, axis=0)  # six exact copies of each
    own = np.arange(30)
    for metric in ("cosine", "l2", "hamming"):
        _, rows = gu.search(gallery, gallery, 4, metric, own=own)
        assert rows.shape == (30, 4) and not (rows == own[:, None]).any(), metric
        assert (rows // 6 == own[:, None] // 6).all(), metric


def test_a_query_outside_the_gallery_loses_no_neighbour_even_where_an_index_finds_few():
    x = unit(np.random.default_rng(0), 100, 8)
    index = gu.build_index(x, "ivf")
    own = np.where(np.arange(100) % 2, np.arange(100), -1)
    _, rows = gu.search(x, x, 20, own=own, index=index)
    assert rows.shape == (100, 20) and (rows == -1).any()
    assert (rows[::2, 0] == np.arange(0, 100, 2)).all() and not (rows[1::2] == own[1::2, None]).any()


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_approximate_index_reports_its_recall_against_exact(kind):
    rng = np.random.default_rng(0)
    gallery = gu.unit_rows(np.repeat(unit(rng, 100, 32), 20, 0) + 0.5 * unit(rng, 2000, 32))
    queries = gallery[::40]
    _, exact = gu.search(queries, gallery, 10)
    _, found = gu.search(queries, gallery, 10, index=gu.build_index(gallery, kind))
    recall = gu.neighbour_recall(found, exact)
    assert recall == 1 if kind == "flat" else 0.8 < recall <= 1
    assert gu.neighbour_recall(np.full_like(exact, -1), exact) == 0


def test_bad_vectors_and_bad_requests_say_what_and_where():
    x = unit(np.random.default_rng(0), 6, 4)
    broken = x.copy()
    broken[3, 0] = np.inf
    zero = x.copy()
    zero[2] = 0
    cases = [
        (lambda: gu.search(x, broken, 2), "the gallery: row 3 holds NaN or infinite"),
        (lambda: gu.search(broken, x, 2), "queries: row 3 holds"),
        (lambda: gu.search(x, zero, 2), "row 2 is zero"),
        (lambda: gu.search(x, x[:, :3], 2), "queries have 4 dimensions, the gallery 3"),
        (lambda: gu.search(x, x, 7), "k=7 neighbours cannot be found among 6"),
        (lambda: gu.search(x, x, 6, own=np.arange(6)), "choose k from 1 to 5"),
        (lambda: gu.search(x, x, 2, "manhattan"), "choose cosine, inner, l2 or hamming"),
        (lambda: gu.search(x[0], x, 2), "must be a non-empty array"),
        (lambda: gu.build_index(x, "tree"), "choose flat, hnsw or ivf"),
        (lambda: gu.search(x * 1e30, x, 2), "too long for float32"),
        (lambda: gu.embed_texts(gu.load_encoder("mini", "cpu"), "a red flower"), "must be a list"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_binary_codes_are_signs():
    codes = gu.binary_codes(np.array([[1, -1, 0, 2, -3, 4, 5, -6, 7]], dtype=np.float32))
    np.testing.assert_array_equal(codes, [[0b10010110, 0b10000000]])


def test_progress_says_how_much_is_left_and_stays_silent_for_short_work(capsys, monkeypatch):
    quick = gu.Progress(10, "quick")
    quick.update(5)
    quick.update(10)
    assert capsys.readouterr().err == ""
    now = time.time()
    monkeypatch.setattr(gu.time, "time", lambda: now)
    slow = gu.Progress(100, "embedding", "images")
    now += 20
    slow.update(40)
    assert "embedding: 40 of 100 images, 30 s left" in capsys.readouterr().err
    assert "<progress value='40' max='100'>" in slow._repr_html_()
    now += 30
    slow.update(100)
    assert "100 images in 50 s" in capsys.readouterr().err


def test_nothing_warns_on_a_normal_run_and_nothing_is_printed(world, cache, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = gu.load_encoder("mini", "cpu")
        embeddings = gu.embed_images(encoder, world)[0]
        gu.search(embeddings, embeddings, 5, own=np.arange(len(embeddings)))
        gu.search(embeddings, embeddings, 3, bias=gu.hub_bias(embeddings, embeddings, 3))
        gu.build_index(embeddings, "ivf")
    assert capsys.readouterr() == ("", "")


def most_memory(work) -> float:
    """The most anonymous memory, in MB, while `work()` runs: what files bring along that are only mapped is not in it."""

    def now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

    most, over = [now()], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    over.set()
    watcher.join()
    return most[0]


def work_on_mapped_rows(folder, rows: int) -> None:
    mapped = np.memmap(folder / "rows.bin", np.float16, "r", shape=(rows, 128))
    random = np.random.default_rng(0)
    queries = gu.unit_rows(random.normal(size=(20, 128)))
    gu.search(queries, mapped[:1000], 5), gu.hub_bias(mapped[:1000], queries, 5)  # what libraries take at first
    print(most_memory(lambda: gu.search(queries, mapped, 5, bias=np.zeros(rows))))
    print(most_memory(lambda: gu.hub_bias(mapped, queries, 5)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory apart")
def test_galleries_on_disk_are_read_in_parts_however_large(tmp_path):
    """With twice as many rows, 50 MB more of them, neither search nor bias takes 50 MB more memory."""
    random, most = np.random.default_rng(0), []
    np.concatenate([random.normal(size=(50_000, 128)).astype(np.float16)] * 8).tofile(tmp_path / "rows.bin")
    for rows in (200_000, 400_000):
        ran = run_apart(work_on_mapped_rows, tmp_path, rows, folder=tmp_path / str(rows))
        assert ran.returncode == 0, ran.stderr
        most.append(np.array(ran.stdout.split(), float))
    assert (most[1] - most[0] < 50).all(), most
