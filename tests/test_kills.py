"""Killed with -9 at any moment and started again: the same bits as without. Four jobs that take hours in earnest."""

import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_apart
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from test_faults import Once
from train_small import train_small

import gpnns_utils as gu
from gpnns.images import downloads


def embed_photos(folder: Path, out: Path, photos: Path) -> None:
    """Of files, kept 32 by 32."""
    os.environ["GPNNS_CACHE"], gu.SAVE_EVERY = str(folder), 32
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the workers that read; here they inherit another way
    encoder, images = gu.load_encoder("mini", "cpu"), gu.load_images(photos)
    (folder / "began").touch()
    embeddings = gu.embed_images(encoder, images, batch_size=16)[0]
    gu.write_atomically(out, lambda file: np.save(file, embeddings))


def embed_sentences(folder: Path, out: Path, photos: Path) -> None:
    os.environ["GPNNS_CACHE"], gu.SAVE_EVERY = str(folder), 32
    torch.set_num_threads(1)
    texts = [f"a red flower and {number} blue vases" for number in range(400)]
    encoder = gu.load_encoder("mini", "cpu")
    (folder / "began").touch()
    embeddings = gu.embed_texts(encoder, texts, batch_size=16)
    gu.write_atomically(out, lambda file: np.save(file, embeddings))


def fit(folder: Path, out: Path, photos: Path) -> None:
    (folder / "began").touch()
    train_small(folder, folder / "trained", dropout=0.3, ema=0.9)
    state = load_file(folder / "trained")
    del state["losses"]  # the first mean after a resumption is over fewer steps
    gu.write_atomically(out, lambda file: file.write(safetensors_bytes(state)))


def download(folder: Path, out: Path, url: str) -> None:
    (folder / "began").touch()
    downloads.download([url], folder / "file.bin", len(CONTENT), hashlib.md5(CONTENT).hexdigest())
    os.replace(folder / "file.bin", out)


CONTENT = np.random.default_rng(0).bytes(12 * 2**20)


class Slow(Once):
    """A server that needs half a second for the file."""

    def do_GET(self):
        write, whole = self.wfile.write, len(CONTENT)

        def slowly(content: bytes) -> None:
            for start in range(0, len(content), whole // 24):
                write(content[start : start + whole // 24])
                time.sleep(0.02)

        self.wfile.write = slowly if self.command == "GET" else write
        super().do_GET()


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.content, server.breaks, server.handle_error = CONTENT, [], lambda *_: None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/file.bin"
    server.shutdown()
    server.server_close()


def photos_in(folder: Path, count: int = 300) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class {i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(path)
    return folder


def killed_at_random(job, source, tmp_path: Path, kills: int) -> int:
    """Each time in an empty folder: started, killed after a random part of the time that the work takes, started again
    to the end. Returns in how many cases it was killed with something done."""

    def start(folder: Path):
        folder.mkdir(exist_ok=True)
        (folder / "began").unlink(missing_ok=True)
        process = start_apart(functools.partial(job, folder, folder / "out", source), folder=tmp_path / "said")
        while process.is_alive() and not (folder / "began").exists():
            time.sleep(0.005)
        return process

    def finish(folder: Path) -> tuple[bytes, float]:
        process, began = start(folder), time.time()
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "said" / "stderr").read_text()[-2000:]
        return (folder / "out").read_bytes(), time.time() - began

    finish(tmp_path / "first")  # what is slow once, such as the first import
    expected, took = finish(tmp_path / "whole")
    halfway = 0
    for number, moment in enumerate(np.random.default_rng(1).uniform(0, 1, kills) * took):
        folder = tmp_path / f"killed {number}"
        process = start(folder)
        process.join(moment)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        done = [path for path in folder.rglob("*") if path.is_file() and path.name != "began"]
        halfway += bool(done) and not (folder / "out").exists()
        assert finish(folder)[0] == expected, f"killed after {moment:.2f} of {took:.2f} s, with {len(done)} files"
    return halfway


JOBS = [embed_photos, embed_sentences, fit, download]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_killed_at_a_few_moments_the_result_is_the_same_to_the_bit(job, url, tmp_path):
    source = url if job is download else photos_in(tmp_path / "photos")
    killed_at_random(job, source, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_killed_at_fifty_moments_the_result_is_the_same_to_the_bit(job, url, tmp_path):
    source = url if job is download else photos_in(tmp_path / "photos")
    assert killed_at_random(job, source, tmp_path, 50) >= 25, "most of them were killed in the midst of their work"
