"""A campaign of faults: kinds of broken input times the public functions, a thousand cases from one seed.

Each fault states what must come out, and computes it here, without the code under test: the value, and then it must be
equal; or the words that the error must hold, which name the file or the argument, and the remedy. `python
tests/test_faults.py` prints the table of kinds and functions.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import signal
import sqlite3
import struct
import sys
import tarfile
import threading
import unicodedata
import warnings
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import gpnns_utils as gu
from gpnns import losses, parameters, training_loop
from gpnns.encoders import checkpoints
from gpnns.images import downloads

CASES, SEED, SECONDS = 1000, 20, 20  # cases in all, their seed, and how long one may take before it counts as hanging
KINDS = ("broken", "empty", "cut", "wrong type", "wrong shape", "wrong encoding", "wrong order", "too large")
FAULTS = {}  # (kind, function) -> what makes a case: (random numbers, an empty folder) -> (call, what must come out)


class Refused(tuple):
    """An error whose message holds all these words."""

    def __new__(cls, *words):
        return super().__new__(cls, words)


class Value:
    """What the call must return; and words that its warnings must hold."""

    def __init__(self, value, *warned):
        self.value, self.warned = value, warned


def fault(kind, function):
    """Register a maker of cases."""
    assert kind in KINDS and (kind, function) not in FAULTS, (kind, function)
    return lambda make: FAULTS.setdefault((kind, function), make)


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def cut(rng, content, least=1):
    return content[: rng.integers(least, len(content))]


# --- folders of pictures ---


def noise(rng, size=None):
    height, width = size or rng.integers(18, 40, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photos(rng, folder, count=6):
    """Files of two classes, by their path."""
    files = [folder / f"class {i % 2}" / f"{i}.png" for i in range(count)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(rng).save(file)
    return sorted(files)


def by_pillow(file):
    """What `pixels` must make of a file, in numpy; None where Pillow cannot read it."""
    try:
        with Image.open(file) as image:
            small = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    except Exception:
        return None
    vector = (small - small.mean()).transpose(2, 0, 1).ravel()
    return vector / np.linalg.norm(vector)


def embedded(folder):
    images = gu.load_images(folder)
    vectors, images = gu.embed_images(gu.load_encoder("pixels", "cpu"), images, cache=False)
    return [str(path) for path in images.images], [images.names[label] for label in images.labels], vectors


def folder_case(folder, files, changed=()):
    """The files that Pillow reads, in the order of their paths; those of `changed` that it does not must be named."""
    vectors = {file: by_pillow(file) for file in files}
    kept = [file for file in files if vectors[file] is not None]
    names = [file.name for file in changed if vectors[file] is None]
    if not kept:
        return lambda: embedded(folder), Refused(f"all {len(files)} images cannot be read", *names[:1])
    expected = [str(file) for file in kept], [file.parent.name for file in kept], np.stack([vectors[f] for f in kept])
    return lambda: embedded(folder), Value(expected, *names)


def some(rng, files):
    return [file for file in files if rng.random() < 0.4] or files[:1]


@fault("broken", "folder")
def _(rng, folder):
    files = photos(rng, folder)
    changed = some(rng, files)
    for file in changed:
        file.write_bytes(rng.bytes(rng.integers(1, 400)))
    return folder_case(folder, files, changed)


@fault("empty", "folder")
def _(rng, folder):
    files = photos(rng, folder)
    changed = files if rng.random() < 0.2 else some(rng, files)
    if rng.random() < 0.2:
        for file in files:
            file.unlink()
        return lambda: embedded(folder), Refused("no images", str(folder))
    for file in changed:
        file.write_bytes(b"")
    return folder_case(folder, files, changed)


@fault("cut", "folder")
def _(rng, folder):
    files = photos(rng, folder)
    changed = some(rng, files)
    for file in changed:
        file.write_bytes(cut(rng, file.read_bytes()))
    return folder_case(folder, files, changed)


@fault("wrong type", "folder")
def _(rng, folder):
    files = photos(rng, folder)
    changed = some(rng, files)
    for file in changed:
        if rng.random() < 0.5:
            file.write_text("this is no picture")
        else:  # a picture of another kind than its name says is one all the same
            Image.open(file).save(file, pick(rng, ("jpeg", "bmp", "gif", "webp")))
    (folder / "class 0" / "notes.txt").write_text("a text among the pictures")
    return folder_case(folder, files, changed)


@fault("wrong shape", "folder")
def _(rng, folder):
    files = photos(rng, folder)
    for file in some(rng, files):
        mode = pick(rng, ("L", "1", "P", "RGBA", "CMYK", "thin"))
        image = noise(rng, (1, 30)) if mode == "thin" else Image.open(file).convert(mode)
        image.save(file, "tiff" if mode == "CMYK" else "png")
    return folder_case(folder, files)


@fault("wrong encoding", "folder")
def _(rng, folder):
    names = [
        "Café",
        unicodedata.normalize("NFD", "Café"),
        "图片",
        "two words",
        "😀",
        os.fsdecode(b"caf\xe9"),
        "a$b_{c}",
    ]
    label, files = pick(rng, names), photos(rng, folder)
    (folder / "class 0").rename(folder / label)
    files = sorted(file if file.parent.name == "class 1" else folder / label / file.name for file in files)
    shown = unicodedata.normalize("NFC", os.fsencode(label).decode("utf-8", "backslashreplace"))
    _, value = folder_case(folder, files)
    order = sorted(
        range(len(files)), key=lambda i: (shown if files[i].parent.name == label else "class 1", files[i].name)
    )
    paths, labels, vectors = value.value
    labels = [shown if name == label else name for name in labels]
    return lambda: embedded(folder), Value(([paths[i] for i in order], [labels[i] for i in order], vectors[order]))


@fault("wrong order", "folder")
def _(rng, folder):
    made = {f"class {i % 3}/{name}.png": noise(rng) for i, name in enumerate(rng.permutation(9))}
    for name in rng.permutation(list(made)):
        (folder / name).parent.mkdir(exist_ok=True)
        made[name].save(folder / name)
    return folder_case(folder, sorted(folder / name for name in made))


@fault("too large", "folder")
def _(rng, folder):
    """A file of few bytes that says it has some billion pixels, as attacks on Pillow do."""
    files = photos(rng, folder)
    changed = some(rng, files)
    for file in changed:
        header = b"IHDR" + struct.pack(">IIBBBBB", *rng.integers(30_000, 60_000, 2), 8, 2, 0, 0, 0)
        size, check = struct.pack(">I", len(header) - 4), struct.pack(">I", zlib.crc32(header))
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + size + header + check + file.read_bytes()[33:])
    return folder_case(folder, files, changed)


# --- tables ---


def table(rng, folder, count=5):
    """A table's rows (label, path), and the images beside it."""
    rows = [(f"class {i % 2}", f"photo {i}.png") for i in range(count)]
    for _, name in rows:
        noise(rng).save(folder / name)
    return rows


def as_csv(rows, header=("label", "path")):
    return "\n".join(",".join(row) for row in [header, *rows]) + "\n"


def listed(path):
    images = gu.load_images(path)
    labels = None if images.labels is None else [images.names[label] for label in images.labels]
    return [file.name for file in images.images], labels, images.captions


def table_case(folder, rows, *warned, labels=True, captions=None):
    rows = sorted(rows, key=lambda row: row[1])
    found = [row[1] for row in rows], [row[0] for row in rows] if labels else None, captions
    return lambda: listed(folder / "list.csv"), Value(found, *warned)


def refused_table(folder, *words):
    return lambda: listed(folder / "list.csv"), Refused("list.csv", *words)


@fault("broken", "table")
def _(rng, folder):
    rows = table(rng, folder)
    if rng.random() < 0.5:
        (folder / "list.csv").write_bytes(b"\xff" + rng.bytes(200))
        return refused_table(folder, "save the file as UTF-8")
    bad = rng.integers(len(rows))
    rows[bad] = ('"' + rows[bad][0], rows[bad][1])
    (folder / "list.csv").write_text(as_csv(rows))
    return refused_table(folder, f"line {bad + 2}", "quotation mark")


@fault("empty", "table")
def _(rng, folder):
    table(rng, folder)
    content = pick(rng, ("", "\n\n", "label,path\n"))
    (folder / "list.csv").write_text(content)
    return refused_table(folder, "names no images" if "path" in content else "has no column 'path'")


@fault("cut", "table")
def _(rng, folder):
    """Somewhere in the last path: that image is not there, and is named."""
    rows = table(rng, folder)
    content = as_csv(rows)
    (folder / "list.csv").write_text(content[: -rng.integers(2, 9)])

    def call():
        images = gu.load_images(folder / "list.csv")
        return [file.name for file in images.images], len(images.left_out), "it is not there" in images.left_out[0]

    return call, Value(([name for _, name in rows[:-1]], 1, True))


@fault("wrong type", "table")
def _(rng, folder):
    table(rng, folder)
    kinds = {
        b"PK\x03\x04\x14\x00\x06\x00": "save the file as UTF-8",  # what Excel writes
        b"\x89PNG\r\n\x1a\n": "save the file as UTF-8",
        b'[{"path": "photo 0.png"}]': "has no column 'path'",
        b"photo 0.png\nphoto 1.png\n": "write a line such as 'path,label' above it",
    }
    content = pick(rng, list(kinds))
    (folder / "list.csv").write_bytes(content)
    return refused_table(folder, kinds[content])


@fault("wrong shape", "table")
def _(rng, folder):
    rows, kind = table(rng, folder), rng.integers(4)
    if kind == 0:
        (folder / "list.csv").write_text(as_csv(rows, ("label", "where")))
        return refused_table(folder, "has no column 'path'", "label, where")
    if kind == 1:
        bad = rng.integers(len(rows))
        rows[bad] = (*rows[bad], "more")
        (folder / "list.csv").write_text(as_csv(rows))
        return refused_table(folder, f"line {bad + 2} has 3 columns where the first line has 2", "quotation marks")
    if kind == 2:
        (folder / "list.csv").write_text(as_csv([row[1:] for row in rows], ("path",)))
        return table_case(folder, rows, labels=False)
    bad = rng.integers(len(rows))
    rows[bad] = ("", rows[bad][1])
    (folder / "list.csv").write_text(as_csv(rows))
    return refused_table(folder, "1 of 5 images have no label", rows[bad][1])


@fault("wrong encoding", "table")
def _(rng, folder):
    rows = [(label.replace("class 0", "Café"), name) for label, name in table(rng, folder)]
    encoding = pick(rng, ("latin-1", "cp1252", "utf-16-le", "utf-8-sig", "utf-16", "utf-32"))
    (folder / "list.csv").write_bytes(as_csv(rows).encode(encoding))
    if encoding in ("latin-1", "cp1252", "utf-16-le", "utf-32"):
        return refused_table(folder, "save the file as UTF-8", "iconv")
    return table_case(folder, rows)


@fault("wrong order", "table")
def _(rng, folder):
    rows = table(rng, folder)
    columns = rng.permutation(2)
    shuffled = [tuple(np.array(row)[columns]) for row in rng.permutation(rows)]
    (folder / "list.csv").write_text(as_csv(shuffled, tuple(np.array(["label", "path"])[columns])))
    return table_case(folder, rows)


@fault("too large", "table")
def _(rng, folder):
    """A caption of more letters than Python's csv takes: mostly a quotation mark that nobody closed."""
    rows = [(*row, "a caption") for row in table(rng, folder)]
    bad = rng.integers(len(rows))
    rows[bad] = (*rows[bad][:2], "long " * 30_000)
    (folder / "list.csv").write_text(as_csv(rows, ("label", "path", "caption")))
    return refused_table(folder, f"line {bad + 2}", "quotation mark")


# --- captions.json ---


def captioned(folder):
    images = gu.load_images(folder)
    return [str(path) for path in images.images], images.captions


def captions_case(rng, folder, content, *refused, captions=None):
    files = photos(rng, folder)
    (folder / "captions.json").write_bytes(content)
    if refused:
        return lambda: captioned(folder), Refused("captions.json", *refused)
    return lambda: captioned(folder), Value((list(map(str, files)), [captions[file.parent.name] for file in files]))


GIVEN = {"class 0": ["a red flower"], "class 1": ["a blue vase", "a vase"]}


@fault("broken", "captions.json")
def _(rng, folder):
    content = bytearray(json.dumps(GIVEN).encode())
    content[pick(rng, [0, 1, 9, len(content) - 1])] = pick(rng, [0xFF, 0xC3])
    return captions_case(rng, folder, bytes(content), "UTF-8")


@fault("empty", "captions.json")
def _(rng, folder):
    return captions_case(rng, folder, pick(rng, (b"", b"\n", b"  ")), "damaged", "get it again")


@fault("cut", "captions.json")
def _(rng, folder):
    return captions_case(rng, folder, cut(rng, json.dumps(GIVEN).encode()), "damaged", "get it again")


@fault("wrong type", "captions.json")
def _(rng, folder):
    content, word = pick(
        rng,
        [
            (["a caption"], "must hold"),
            ("a caption", "must hold"),
            (7, "must hold"),
            (None, "must hold"),
            ({"class 0": {"file": "x"}}, "a dict without 'captions'"),
            ({"class 0": [True]}, "give a list of texts"),
            ({"class 7": ["a caption"]}, "is the name of a class or of an image"),
        ],
    )
    return captions_case(rng, folder, json.dumps(content).encode(), word)


@fault("wrong shape", "captions.json")
def _(rng, folder):
    given = pick(
        rng,
        [
            {"class 0": "a red flower", "class 1": ["a blue vase", "a vase"]},
            {"class 0": [["a red flower"]], "class 1": {"captions": ["a blue vase", "a vase"]}},
            {"class 0": {"caption": "a red flower"}, "class 1": ["a blue vase", " ", "a vase", None]},
        ],
    )
    return captions_case(rng, folder, json.dumps(given).encode(), captions=GIVEN)


@fault("wrong encoding", "captions.json")
def _(rng, folder):
    given = {"class 0": ["un café"], "class 1": ["a vase"]}
    encoding = pick(rng, ("latin-1", "cp1252", "utf-8-sig", "utf-16", "ascii"))
    content = json.dumps(given, ensure_ascii=encoding == "ascii").encode(encoding)
    return captions_case(rng, folder, content, *["UTF-8"] * (encoding in ("latin-1", "cp1252")), captions=given)


@fault("wrong order", "captions.json")
def _(rng, folder):
    given = {key: GIVEN[key] for key in rng.permutation(list(GIVEN))}
    return captions_case(rng, folder, json.dumps(given).encode(), captions=GIVEN)


@fault("too large", "captions.json")
def _(rng, folder):
    return captions_case(rng, folder, b"[" * int(rng.integers(60_000, 200_000)), "damaged")


# --- webdataset tars ---


def samples(rng, count=4):
    """The members of a tar, by name."""
    members = {}
    for i in range(count):
        buffer = io.BytesIO()
        noise(rng, (200, 200)).save(buffer, "png")
        members |= {f"{i}.png": buffer.getvalue(), f"{i}.cls": str(i % 2).encode(), f"{i}.txt": f"caption {i}".encode()}
    return members


def write_tar(path, members):
    with tarfile.open(path, "w") as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))


def unpacked(folder):
    images = gu.load_images(folder / "shard.tar")
    return [path.name for path in images.images], images.labels, images.captions


TAR = Value((["0.png", "1.png", "2.png", "3.png"], np.array([0, 1, 0, 1]), [[f"caption {i}"] for i in range(4)]))


@fault("broken", "tar")
def _(rng, folder):
    (folder / "shard.tar").write_bytes(rng.bytes(rng.integers(1, 4000)))
    return lambda: unpacked(folder), Refused("shard.tar cannot be unpacked", "get it again")


@fault("empty", "tar")
def _(rng, folder):
    if rng.random() < 0.5:
        (folder / "shard.tar").write_bytes(b"")
        return lambda: unpacked(folder), Refused("shard.tar cannot be unpacked", "get it again")
    write_tar(folder / "shard.tar", {})
    return lambda: unpacked(folder), Refused("no images in", "shard.tar")


@fault("cut", "tar")
def _(rng, folder):
    """In the middle of the last picture."""
    members = samples(rng)
    members["3.png"] = members.pop("3.png")
    write_tar(folder / "shard.tar", members)
    content = (folder / "shard.tar").read_bytes()
    begin = content.rindex(b"\x89PNG")
    (folder / "shard.tar").write_bytes(content[: begin + rng.integers(1, len(members["3.png"]))])
    return lambda: unpacked(folder), Refused("shard.tar cannot be unpacked", "get it again")


@fault("wrong type", "tar")
def _(rng, folder):
    members = samples(rng)
    if rng.random() < 0.5:  # packed by another program, under the usual name
        with zipfile.ZipFile(folder / "shard.tar", "w") as packed:
            for name, content in members.items():
                packed.writestr(name, content)
        return lambda: unpacked(folder), TAR
    (folder / "shard.tar").write_bytes(members["0.png"])
    return lambda: unpacked(folder), Refused("shard.tar cannot be unpacked", "get it again")


@fault("wrong shape", "tar")
def _(rng, folder):
    members = samples(rng)
    if rng.random() < 0.5:
        write_tar(folder / "shard.tar", {name: data for name, data in members.items() if not name.endswith("png")})
        return lambda: unpacked(folder), Refused("no images in", "shard.tar")
    del members["2.cls"]
    write_tar(folder / "shard.tar", members)
    return lambda: unpacked(folder), Refused("1 of 4 images have no label", "2.png", "give every image one")


@fault("wrong encoding", "tar")
def _(rng, folder):
    members, name = samples(rng), f"{rng.integers(4)}.txt"
    write_tar(folder / "shard.tar", members | {name: "un café".encode("latin-1")})
    return lambda: unpacked(folder), Refused(name, "save the file as UTF-8")


@fault("wrong order", "tar")
def _(rng, folder):
    members = samples(rng)
    write_tar(folder / "shard.tar", {name: members[name] for name in rng.permutation(list(members))})
    return lambda: unpacked(folder), TAR


# --- archives of data sets ---


def unpack(folder, name):
    """What lies in the target afterwards; nothing else may have been written anywhere."""
    before = {path for path in folder.rglob("*")}
    try:
        downloads.unpack_archive(folder / name, folder / "here" / "target")
    except Exception:
        left = {path for path in folder.rglob("*")} - before - {folder / "here"}
        assert not left, f"{left} is left behind"
        raise
    return {path.name: path.read_bytes() for path in (folder / "here" / "target").iterdir()}


def archive_case(folder, *refused, members=None, name="a.tar"):
    return lambda: unpack(folder, name), Refused(name, *refused) if refused else Value(members)


@fault("broken", "archive")
def _(rng, folder):
    kind = rng.integers(3)
    if kind == 0:
        (folder / "a.tar").write_bytes(rng.bytes(rng.integers(1, 4000)))
        return archive_case(folder, "cannot be unpacked", "remove it and get it again")
    outside = pick(rng, ("../escaped.jpg", "/tmp/gpnns-escaped.jpg", "a/../../escaped.jpg", "..\\escaped.jpg"))
    if kind == 1:
        write_tar(folder / "a.tar", samples(rng) | {outside: b"x"})
        return archive_case(folder, "a path outside its folder")
    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("good.jpg", b"x")
        packed.writestr(outside, b"x")
    return archive_case(folder, "a path outside its folder", name="a.zip")


@fault("empty", "archive")
def _(rng, folder):
    (folder / "a.tar").write_bytes(b"")
    return archive_case(folder, "cannot be unpacked", "remove it and get it again")


@fault("cut", "archive")
def _(rng, folder):
    members = samples(rng)
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
        name, content = "a.tar.gz", buffer.getvalue()
    else:
        with zipfile.ZipFile(folder / "a.zip", "w") as packed:
            for member, content in members.items():
                packed.writestr(member, content)
        name, content = "a.zip", (folder / "a.zip").read_bytes()
    (folder / name).write_bytes(cut(rng, content, 30)[:-30])
    return archive_case(folder, "cannot be unpacked", "remove it and get it again", name=name)


@fault("wrong type", "archive")
def _(rng, folder):
    (folder / "a.tar").write_bytes(pick(rng, (b"<!DOCTYPE html><html>", b"\x89PNG\r\n\x1a\n", b"{}" * 400)))
    return archive_case(folder, "cannot be unpacked", "remove it and get it again")


@fault("wrong order", "archive")
def _(rng, folder):
    members = samples(rng)
    write_tar(folder / "a.tar", {name: members[name] for name in rng.permutation(list(members))})
    return archive_case(folder, members=members)


@fault("too large", "archive")
def _(rng, folder):
    """Its list of files says how large they become, before anything is written."""
    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("a.jpg", rng.bytes(100))
        packed.filelist[0].file_size = 2 ** int(rng.integers(50, 60))
    return archive_case(folder, "it unpacks to", "MB free", "nothing of a.zip was kept", name="a.zip")


# --- checkpoints ---


@functools.cache
def mini_weights():
    return {key: value.clone() for key, value in gu.load_encoder("random", "cpu").model.state_dict().items()}


def weights(path):
    return {key: value.numpy() for key, value in gu.load_encoder(f"mini@{path}", "cpu").model.state_dict().items()}


def save(rng, folder, state):
    path = folder / pick(rng, ("weights.pt", "weights.safetensors"))
    if path.suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    return path


def checkpoint_case(path, *refused):
    return lambda: weights(path), Refused(path.name, *refused) if refused else Value(
        {key: value.numpy() for key, value in mini_weights().items()}
    )


@fault("broken", "checkpoint")
def _(rng, folder):
    path = save(rng, folder, mini_weights())
    content = bytearray(path.read_bytes())
    content[:200] = rng.bytes(200)
    path.write_bytes(bytes(content[: rng.integers(100, 4000)]))
    return checkpoint_case(path, "not a readable checkpoint", "Fetch or write it again")


@fault("empty", "checkpoint")
def _(rng, folder):
    path = folder / pick(rng, ("a.pt", "a.safetensors", "a.bin", "a"))
    path.write_bytes(b"")
    return checkpoint_case(path, "is empty (0 bytes)", "fetch it again")


@fault("cut", "checkpoint")
def _(rng, folder):
    path = save(rng, folder, mini_weights())
    path.write_bytes(cut(rng, path.read_bytes()))
    return checkpoint_case(path, "not a readable checkpoint", "Fetch or write it again")


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch gpnns-harmful",))


@fault("wrong type", "checkpoint")
def _(rng, folder):
    kinds = {
        "pointer": ("is a Git LFS pointer", "git lfs pull"),
        "page": ("is a web page", "download the file itself"),
        "list": ("holds no state dict",),
        "code": ("such objects can run code", "save its weights alone"),
        "model": ("such objects can run code", "save its weights alone"),
        "optimizer": ("holds no state dict", "optimizer"),
    }
    kind = pick(rng, list(kinds))
    path = folder / "a.pt"
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605143316\n")
    elif kind == "page":
        path.write_text("<html><head><title>Sign in</title></head></html>")
    else:
        content = {"list": [torch.zeros(2)], "code": {"state_dict": Harmful()}, "model": torch.nn.Linear(2, 2)}
        torch.save(content.get(kind, {"optimizer": {"state": {}, "param_groups": []}}), path)
    return checkpoint_case(path, *kinds[kind])


@fault("wrong shape", "checkpoint")
def _(rng, folder):
    state = dict(mini_weights())
    key = pick(rng, [key for key, value in state.items() if value.ndim == 2 and "positional" not in key])
    if rng.random() < 0.5:
        del state[key]
        return checkpoint_case(save(rng, folder, state), f"{key} is missing")
    state[key] = torch.zeros(3, 5)
    return checkpoint_case(save(rng, folder, state), f"{key} has shape (3, 5), not")


@fault("wrong encoding", "checkpoint")
def _(rng, folder):
    kind = pick(rng, (torch.float16, torch.bfloat16, torch.float64, torch.int8))
    if kind == torch.int8:  # quantised without its scales
        return checkpoint_case(save(rng, folder, {k: v.to(kind) for k, v in mini_weights().items()}), "dequantise")
    state = {key: value.to(kind) if value.is_floating_point() else value for key, value in mini_weights().items()}
    path = save(rng, folder, state)
    return lambda: weights(path), Value(
        {key: value.to(mini_weights()[key].dtype).numpy() for key, value in state.items()}
    )


@fault("wrong order", "checkpoint")
def _(rng, folder):
    prefix = pick(rng, ("", "module.", "_orig_mod."))
    state = {prefix + key: mini_weights()[key] for key in rng.permutation(list(mini_weights()))}
    return checkpoint_case(save(rng, folder, state))


@fault("wrong type", "checkpoint's notes")
def _(rng, folder):
    """Notes of another program under our key are not ours."""
    path = folder / "a.safetensors"
    notes = pick(rng, ("not json", "[1, 2]", "null", "3", '{"before_projection": "yes"}', "{}"))
    save_file(mini_weights(), path, metadata={"gpnns": notes})
    return checkpoint_case(path)


@fault("wrong shape", "checkpoint's head")
def _(rng, folder):
    head = pick(rng, (torch.zeros(()), torch.zeros(0, 128), torch.zeros(8), torch.zeros(8, 4)))
    path = save(rng, folder, mini_weights() | {"embedding_head.linear.weight": head})
    return checkpoint_case(path, "linear.weight has shape", str(tuple(head.shape)))


@fault("too large", "checkpoint")
def _(rng, folder):
    name = pick(rng, ("decoder.weight", "visual.more", "text_projection_2"))
    return checkpoint_case(
        save(rng, folder, mini_weights() | {name: torch.zeros(2)}), f"{name} is not part of the model"
    )


# --- caches ---

TEXTS = ["a red flower", "a blue vase", "a face with glasses"]


@functools.cache
def mini():
    return gu.load_encoder("mini", "cpu")


@functools.cache
def embedded_texts():
    return gu.embed_texts(mini(), TEXTS, cache=False)


def cached_texts(rng, folder, damage, *said):
    """Embedded once; the file in the cache is damaged; embedded again, with the same bits and a warning."""
    expected = embedded_texts()

    def call():
        os.environ["GPNNS_CACHE"] = str(folder)
        gu.embed_texts(mini(), TEXTS)
        (file,) = (folder / "embeddings").rglob("*.sqlite")
        damage(file)
        found = gu.embed_texts(mini(), TEXTS)
        return found, gu.embed_texts(mini(), TEXTS)

    return call, Value((expected, expected), *said)


def drawn_world(rng, folder, damage):
    """The same of the drawn world's file."""
    path = folder / "mini_world" / "tiny.npy"
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    path.parent.mkdir()
    np.save(path, images)
    damage(path)
    sys.path.insert(0, str(gu.DATA))
    from gpnns.world import mini_world

    return lambda: mini_world.read_drawn(path, (4, 8, 8, 3)), Value(None, "tiny.npy is damaged and is drawn again")


DAMAGES = {
    "broken": lambda rng, file: file.write_bytes(rng.bytes(300)),
    "empty": lambda rng, file: file.write_bytes(b""),
    "cut": lambda rng, file: file.write_bytes(cut(rng, file.read_bytes())),
    "wrong type": lambda rng, file: np.save(file, np.array([{"an": "object"}]), allow_pickle=True),
    "wrong shape": lambda rng, file: np.save(file, np.load(file)[:-1]),
    "wrong encoding": lambda rng, file: np.save(file, np.load(file).astype(pick(rng, ("f8", "f2", "i4")))),
    "too large": lambda rng, file: np.save(file, np.tile(np.load(file), (2, *[1] * (np.load(file).ndim - 1)))),
}


def change_vectors(change):
    """A damage of an embedding cache: every vector (bytes) becomes change(rng, vector)."""

    def damage(rng, file):
        with contextlib.closing(sqlite3.connect(file)) as base, base:
            for key, vector in base.execute("SELECT key, vector FROM embeddings").fetchall():
                base.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (change(rng, vector), key))

    return damage


CACHE_DAMAGES = DAMAGES | {
    "wrong type": lambda rng, file: file.write_bytes(pickle.dumps([{"an": "object"}])),
    "wrong shape": change_vectors(lambda rng, vector: vector[:-4]),
    "wrong encoding": change_vectors(
        lambda rng, vector: np.frombuffer(vector, np.float32).astype(pick(rng, ("f8", "f2", "i4"))).tobytes()
    ),
    "too large": change_vectors(lambda rng, vector: 2 * vector),
}
for _kind in DAMAGES:
    _said = () if _kind == "empty" else (".sqlite is damaged and is computed again",)  # of no bytes: nothing kept yet
    FAULTS[_kind, "embedding cache"] = lambda rng, folder, damage=CACHE_DAMAGES[_kind], said=_said: cached_texts(
        rng, folder, lambda file: damage(rng, file), *said
    )
    FAULTS[_kind, "drawn world"] = lambda rng, folder, damage=DAMAGES[_kind]: drawn_world(
        rng, folder, lambda file: damage(rng, file)
    )


# --- texts ---


@fault("empty", "texts")
def _(rng, folder):
    return lambda: gu.embed_texts(mini(), pick(rng, ([], ()))), Refused("texts must be a list of strings")


@fault("wrong type", "texts")
def _(rng, folder):
    wrong = pick(rng, ("one text", TEXTS + [None], TEXTS + [7], [b"bytes"], [["nested"]]))
    return lambda: gu.embed_texts(mini(), wrong), Refused("texts must be a list of strings")


@fault("wrong encoding", "texts")
def _(rng, folder):
    wrong = TEXTS + [os.fsdecode(b"caf\xe9")]
    return lambda: gu.embed_texts(mini(), wrong), Refused("texts must be a list of strings", "caf\\udce9")


@fault("wrong order", "texts")
def _(rng, folder):
    order = rng.permutation(3)

    def call():
        return gu.embed_texts(mini(), [TEXTS[i] for i in order], cache=False)

    return call, Value(embedded_texts()[order])


@fault("too large", "texts")
def _(rng, folder):
    """Of a text longer than the model reads, the beginning counts."""
    long = "a red flower " * int(rng.integers(100, 2000))
    first = mini().features(mini().text_tower, ["a red flower " * 60])
    return lambda: gu.embed_texts(mini(), [long], cache=False), Value(first / np.linalg.norm(first))


# --- vectors ---


def vectors(rng, rows=None, dim=8):
    return rng.normal(size=(rows or rng.integers(5, 30), dim)).astype(np.float32)


def cosines(queries, gallery):
    queries, gallery = (np.asarray(v, dtype=np.float64) for v in (queries, gallery))
    return queries / np.linalg.norm(queries, axis=1)[:, None] @ (gallery / np.linalg.norm(gallery, axis=1)[:, None]).T


def by_search(queries, gallery):
    """The three largest cosines, and their rows."""
    scores = cosines(queries, gallery)
    rows = np.argsort(-scores, axis=1)[:, :3]
    return np.take_along_axis(scores, rows, axis=1), rows


def by_ranks(queries, gallery):
    """The rank of the first gallery row, for every query."""
    scores = cosines(queries, gallery)
    return (scores >= scores[:, :1]).sum(axis=1)[:, None].astype(float)


def by_bias(queries, gallery):
    """Half the mean of the two largest cosines of each gallery row with the queries, taken as references."""
    return 0.5 * np.sort(cosines(gallery, queries), axis=1)[:, -2:].mean(axis=1)


FUNCTIONS = {  # name -> (call(queries, gallery), oracle, what the message calls queries and gallery)
    "search": (lambda q, g: gu.search(q, g, 3), by_search, ("queries", "the gallery")),
    "rank_relevant": (
        lambda q, g: gu.rank_relevant(q, g, [[0]] * len(q)),
        by_ranks,
        ("queries", "the gallery"),
    ),
    "hub_bias": (lambda q, g: gu.hub_bias(g, q, k=2, alpha=0.5), by_bias, ("references", "the gallery")),
    "build_index": (
        lambda q, g: gu.search(q, np.asarray(g), 3, index=gu.build_index(g, "flat")),
        by_search,
        ("queries", "the gallery"),
    ),
}


def two_sides(rng, change):
    """Queries and gallery, one of which is changed; and which one."""
    sides, which = [vectors(rng), vectors(rng)], int(rng.integers(2))
    sides[which] = change(sides[which])
    return sides, which


def vector_fault(function):
    call, oracle, names = FUNCTIONS[function]

    def broken(rng, folder):
        bad = int(rng.integers(5))

        def change(v):
            v[bad, rng.integers(8)] = pick(rng, (np.nan, np.inf, -np.inf))
            return v

        sides, which = two_sides(rng, change)
        return lambda: call(*sides), Refused(names[which], f"row {bad}", "NaN or infinite")

    def empty(rng, folder):
        sides, which = two_sides(rng, lambda v: v[:0] if rng.random() < 0.5 else v[:, :0])
        if len(sides[0]) == 0 and oracle is by_search:  # no queries find nothing, three times
            return lambda: call(*sides), Value((np.zeros((0, 3)), np.zeros((0, 3))))
        return lambda: call(*sides), Refused("must be a non-empty array (n, d)")

    def cut_off(rng, folder):
        sides, which = two_sides(rng, lambda v: v[0])
        return lambda: call(*sides), Refused(names[which], "write a single vector as vector[None]")

    def wrong_type(rng, folder):
        """Numbers of any type are numbers; texts and objects are not."""
        kind = pick(rng, ("list", "tensor", "f8", "f2", "i4", "texts", "objects", "complex"))
        change = {
            "list": lambda v: v.tolist(),
            "tensor": torch.from_numpy,
            "texts": lambda v: v.astype(str),
            "objects": lambda v: np.array([[None] * 8] * len(v)),
            "complex": lambda v: v.astype(complex) + 1j,
        }.get(kind, lambda v: (v * 50).astype(kind))
        sides, which = two_sides(rng, change)
        if kind in ("texts", "objects", "complex"):
            return lambda: call(*sides), Refused(names[which], "numbers")
        return lambda: call(*sides), Value(oracle(*(np.asarray(side, dtype=np.float64) for side in sides)))

    def wrong_shape(rng, folder):
        sides, which = two_sides(rng, lambda v: v[:, :5] if rng.random() < 0.5 else v[None])
        word = "must be a non-empty array (n, d)" if sides[which].ndim == 3 else "dimensions"
        return lambda: call(*sides), Refused(word)

    def wrong_encoding(rng, folder):
        sides, _ = two_sides(rng, lambda v: v.astype(pick(rng, (">f4", ">f8"))))
        return lambda: call(*sides), Value(oracle(*sides))

    def wrong_order(rng, folder):
        """Of memory: transposed, every second one, backwards, read only."""

        def change(v):
            made = pick(rng, (np.asfortranarray(v), np.repeat(v, 2, axis=0)[::2], v[::-1], v.T.copy().T))
            made.flags.writeable = False
            return made

        sides, _ = two_sides(rng, change)
        return lambda: call(*sides), Value(oracle(*sides))

    def too_large(rng, folder):
        bad = int(rng.integers(5))

        def change(v):
            v[bad] = 3e38
            return v

        sides, which = two_sides(rng, change)
        return lambda: call(*sides), Refused(names[which], f"row {bad} is too long for float32", "scale")

    made = (broken, empty, cut_off, wrong_type, wrong_shape, wrong_encoding, wrong_order, too_large)
    for kind, make in zip(KINDS, made, strict=True):
        FAULTS[kind, function] = make


for _function in FUNCTIONS:
    vector_fault(_function)


# --- rows and labels ---


def ranked(rng, relevant, n=6, **more):
    v = vectors(rng, n)
    return v, lambda: gu.rank_relevant(v, v, relevant, **more)


def ranks_by_hand(v, relevant):
    scores = cosines(v, v)
    return np.array([np.sort([(scores[q] >= scores[q, row]).sum() for row in rows]) for q, rows in enumerate(relevant)])


@fault("empty", "relevant rows")
def _(rng, folder):
    _, call = ranked(rng, [[]] * 6)
    return call, Refused("no query has anything to find")


@fault("cut", "relevant rows")
def _(rng, folder):
    _, call = ranked(rng, [[0]] * int(rng.integers(0, 6)))
    return call, Refused("6 queries need as many lists of relevant rows")


@fault("wrong type", "relevant rows")
def _(rng, folder):
    wrong = pick(rng, ([0.0], [2.7], ["0"], [[0]], [None]))
    _, call = ranked(rng, [[1]] * 5 + [wrong])
    return call, Refused("the relevant rows of query 5", "must be row numbers")


@fault("wrong encoding", "relevant rows")
def _(rng, folder):
    """A mask says the same as row numbers; one of zeros and ones could mean either."""
    mask = rng.random((6, 6)) < 0.5
    mask[:, 2] = True
    if rng.random() < 0.5:
        _, call = ranked(rng, mask.astype(int))
        return call, Refused("seem to be a mask", "astype(bool)")
    v, call = ranked(rng, mask)
    rows = [np.flatnonzero(row) for row in mask]
    expected = np.full((6, max(map(len, rows))), np.inf)
    scores = cosines(v, v)
    for q, own in enumerate(rows):
        expected[q, : len(own)] = np.sort([(scores[q] >= scores[q, row]).sum() for row in own])
    return call, Value(expected)


@fault("wrong order", "relevant rows")
def _(rng, folder):
    relevant = [list(rng.permutation(6)[:3]) for _ in range(6)]
    v, call = ranked(rng, [rows + rows[:1] for rows in relevant])  # one that is listed twice counts once
    return call, Value(ranks_by_hand(v, relevant).astype(float))


@fault("too large", "relevant rows")
def _(rng, folder):
    wrong = int(pick(rng, (6, 7, 1000, -1, -7)))
    _, call = ranked(rng, [[1]] * 5 + [[0, wrong]])
    return call, Refused("the relevant rows of query 5", f"hold {wrong}, which is no row of 6")


def voted(queries, labels, gallery, gallery_labels):
    return gu.knn_accuracy(queries, labels, gallery, gallery_labels, k=1).per_query


@fault("empty", "labels")
def _(rng, folder):
    return lambda: gu.same_label(None, None), Refused("has no labels", "folder of its own")


@fault("cut", "labels")
def _(rng, folder):
    q, g = vectors(rng, 5), vectors(rng, 6)
    if rng.random() < 0.5:
        return lambda: voted(q, np.zeros(3), g, np.zeros(6)), Refused("5 queries need as many labels, not 3")
    return lambda: voted(q, np.zeros(5), g, np.zeros(4)), Refused("6 gallery rows need as many labels, not 4")


@fault("wrong type", "labels")
def _(rng, folder):
    """Labels may be numbers or texts."""
    q, g, names = vectors(rng, 5), vectors(rng, 6), np.array(["a", "b"])
    own, other = rng.integers(0, 2, 5), rng.integers(0, 2, 6)
    expected = (other[cosines(q, g).argmax(axis=1)] == own).astype(float)
    texts = rng.random() < 0.5
    return lambda: voted(q, names[own] if texts else own.tolist(), g, names[other] if texts else other.tolist()), Value(
        expected
    )


@fault("wrong shape", "labels")
def _(rng, folder):
    q, g = vectors(rng, 5), vectors(rng, 6)
    return lambda: voted(q, np.zeros((5, 2)), g, np.zeros(6)), Refused("5 queries need as many labels")


@fault("wrong order", "labels")
def _(rng, folder):
    own, other = rng.integers(0, 4, 7), rng.integers(0, 4, 9)
    return lambda: [rows.tolist() for rows in gu.same_label(own, other)], Value(
        [np.flatnonzero(other == label).tolist() for label in own]
    )


@fault("too large", "labels")
def _(rng, folder):
    q, g = vectors(rng, 5), vectors(rng, 6)
    return lambda: voted(q, np.zeros(8), g, np.zeros(6)), Refused("5 queries need as many labels, not 8")


# --- classes by name ---


@fault("wrong type", "classes")
def _(rng, folder):
    """Labels that can never be equal, or are no rows of the classes."""
    q, g = vectors(rng, 5), vectors(rng, 6)
    if rng.random() < 0.3:
        return lambda: voted(q, [1] * 5, g, list("111222")), Refused("are never equal", "both as texts")
    wrong = pick(rng, (list("abcde"), [0.5] * 5, [-1] * 5, [6] * 5, [True] * 5))
    return lambda: gu.zero_shot_accuracy(q, wrong, g), Refused("labels are rows of the 6 classes")


@fault("wrong shape", "classes")
def _(rng, folder):
    template = pick(rng, ("a photo", "a photo of %s", "a {thing}", "{0}"))
    return lambda: gu.class_embeddings(mini(), ["dog", "cat"], [template]), Refused("a template holds {}", template)


@fault("wrong encoding", "classes")
def _(rng, folder):
    """Braces in names are letters like others; names may come one by one."""
    names = [f"a {{{color}}} vase" for color in rng.permutation(["red", "blue", "green"])]
    expected = gu.embed_texts(mini(), [f"a photo of {name}" for name in names], cache=False)
    return lambda: gu.class_embeddings(mini(), (name for name in names), ["a photo of {}"]), Value(expected)


@fault("empty", "classes")
def _(rng, folder):
    names, templates, word = pick(rng, [([], ["{}"], "names"), (["a"], [], "templates"), ("dog", ["{}"], "names")])
    return lambda: gu.class_embeddings(mini(), names, templates), Refused(f"{word} must be a list of strings")


# --- gray pictures of many kinds, and what is no file ---


@fault("wrong encoding", "gray picture")
def _(rng, folder):
    """Shares from 0 to 1, 8 bits in wide numbers, 16 bits; what could be anything, such as heights, is left out."""
    gray = rng.integers(1, 256, (20, 20)).astype(np.uint8)
    gray[0, 0], kind = 255, pick(rng, ("share", "wide", "sixteen", "heights", "negative"))
    values = {
        "share": gray.astype(np.float32) / 255,
        "wide": gray.astype(np.int32),
        "sixteen": gray.astype(np.uint16) * 257,
        "heights": gray.astype(np.float32) * 20,
        "negative": -gray.astype(np.int32),
    }[kind]
    file, other = folder / "a.tif", folder / "b.png"
    Image.fromarray(values).save(file)
    noise(rng).save(other)

    def call():
        images = gu.load_images(folder)
        images = gu.embed_images(gu.load_encoder("pixels", "cpu"), images, cache=False)[1]
        return np.asarray(images[0])[:, :, 0] if len(images) == 2 else [Path(path).name for path in images.images]

    if kind in ("heights", "negative"):
        return call, Value(["b.png"], "1 of 2 images cannot be read", "a.tif")
    return call, Value(np.floor(gray.astype(float)) if kind != "share" else np.floor(values * 255.0))


@fault("wrong type", "pipe")
def _(rng, folder):
    """What waits for another program is no picture and no checkpoint; nobody waits with it."""
    files = photos(rng, folder)
    files[0].unlink()
    os.mkfifo(files[0])
    if rng.random() < 0.5:
        return lambda: checkpoints.load_checkpoint(files[0]), Refused(files[0].name, "is no regular file")
    kept = [str(file) for file in files[1:]]
    return lambda: embedded(folder)[0], Value(kept, "1 of 6 images cannot be read", files[0].name)


# --- settings of a training ---


@fault("wrong type", "settings")
def _(rng, folder):
    settings, words = pick(
        rng,
        [
            ({"groups": [{"params": [], "lr": -1.0}]}, ("a learning rate is a number from 0", "-1.0")),
            ({"groups": [{"params": [], "lr": "1e-5"}]}, ("a learning rate is a number from 0", "1e-5")),
            ({"groups": [{"params": [], "lr": float("nan")}]}, ("a learning rate is a number from 0", "nan")),
            ({"epochs": 0}, ("epochs=0", "above 0")),
            ({"epochs": float("nan")}, ("epochs=nan", "above 0")),
            ({"clip": 0.0}, ("clip=0.0", "above 0")),
            ({"ema": 1.0}, ("ema=1.0", "between 0 and 1")),
            ({"ema": float("nan")}, ("ema=nan", "between 0 and 1")),
        ],
    )
    settings = {"groups": [{"params": [], "lr": 0.1}]} | settings
    return lambda: training_loop.fit(None, None, folder, **settings), Refused(*words)


@fault("wrong shape", "settings")
def _(rng, folder):
    arguments, words = pick(
        rng,
        [
            ({"classes": 1}, ("at least two classes",)),
            ({"margin": [0.1, 0.2]}, ("margin has the shape (2,)", "one for each of 5")),
            ({"margin": 20}, ("is no angle in radians", "20 degrees are 0.35")),
            ({"scale": 0}, ("scale=0", "20 to 64")),
            ({"start": np.zeros((4, 8))}, ("start has the shape (4, 8), not (5, 8)",)),
        ],
    )
    return lambda: losses.ArcMargin(**{"dim": 8, "classes": 5} | arguments), Refused(*words)


@fault("too large", "settings")
def _(rng, folder):
    warmup = int(rng.integers(3, 100))
    points = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.arange(8) % 2)
    module = torch.nn.Linear(2, 2)
    groups = [{"params": module.parameters(), "lr": 0.1}]
    call = functools.partial(training_loop.fit, module, points, folder, groups, batch_size=4, warmup=warmup)
    return call, Refused(f"warmup={warmup} steps do not fit into 2", "train longer")


# --- sets of images ---


def image_set(rng, count=6, **fields):
    return gu.ImageSet("mine", rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), **fields)


@fault("empty", "image set")
def _(rng, folder):
    images = gu.ImageSet("mine", [])
    return lambda: gu.embed_images(mini(), images)[0], Refused("mine: there are no images to embed")


@fault("cut", "image set")
def _(rng, folder):
    part = pick(rng, ("labels", "groups", "captions"))
    values = {"labels": np.arange(4), "groups": np.array(["a"] * 4), "captions": [["a"]] * 4}[part]
    return lambda: image_set(rng, **{part: values}), Refused("mine", f"{part} needs one entry for each of 6 images")


@fault("wrong type", "image set")
def _(rng, folder):
    labels = pick(rng, (np.array(list("abcabc")), np.arange(6) / 2, np.array([-1, 0, 1, 2, 3, 4])))
    return lambda: image_set(rng, labels=labels), Refused("mine: labels are class numbers from 0")


@fault("wrong shape", "image set")
def _(rng, folder):
    wrong = pick(rng, (np.zeros((4, 8, 8), np.uint8), np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 8, 8, 3))))
    return lambda: gu.ImageSet("mine", wrong), Refused("mine: an array of images is uint8 (n, height, width, 3)")


@fault("wrong order", "image set")
def _(rng, folder):
    images, order = image_set(rng, labels=np.arange(6)), rng.permutation(6)
    subset = images.subset(order)
    return lambda: (subset.labels, subset.rows, subset.images), Value((order, order, images.images[order]))


@fault("too large", "image set")
def _(rng, folder):
    images, wrong = image_set(rng), int(pick(rng, (6, 100, -1)))
    return lambda: images.subset([0, wrong]), Refused(f"rows hold {wrong}, which is no row of 6")


# --- numbers to find ---


@fault("too large", "k")
def _(rng, folder):
    v, k = vectors(rng, 6), int(rng.integers(7, 99))
    return lambda: gu.search(v, v, k), Refused(f"k={k} neighbours cannot be found among 6", "from 1 to 6")


@fault("wrong type", "k")
def _(rng, folder):
    v, k = vectors(rng, 6), pick(rng, (0, -1, 2.5, "3", None, True, np.int64(3), np.int32(3)))
    if isinstance(k, np.integer):
        return lambda: gu.search(v, v, k), Value(by_search(v, v))
    return lambda: gu.search(v, v, k), Refused(f"k={k} neighbours cannot be found", "from 1 to 6")


@fault("broken", "bias")
def _(rng, folder):
    v = vectors(rng, 6)
    bias = np.zeros(6)
    bias[rng.integers(6)] = np.nan
    return lambda: gu.search(v, v, 3, bias=bias), Refused("a bias needs one finite number for each of 6")


@fault("wrong shape", "bias")
def _(rng, folder):
    v, shape = vectors(rng, 6), pick(rng, ((5,), (6, 1), (7,), (1, 6)))
    return lambda: gu.search(v, v, 3, bias=np.zeros(shape)), Refused("a bias needs one finite number for each of 6")


@fault("wrong type", "bias")
def _(rng, folder):
    v, alpha = vectors(rng, 6), pick(rng, (-0.5, float("nan"), float("inf")))
    return lambda: gu.hub_bias(v, v, 2, alpha), Refused(f"alpha={alpha}", "choose a number from 0")


# --- downloads ---


class Once(BaseHTTPRequestHandler):
    """Serves `server.content`; the first `server.breaks` answers end after as many bytes as they say."""

    def do_GET(self):
        content, start = self.server.content, 0
        if content is None:
            return self.send_error(404)
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        end = start + self.server.breaks.pop() if self.server.breaks else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


def downloaded(folder, content, true, breaks=()):
    """A file that should have the size and checksum of `true`; nothing wrong may lie under its name."""

    def call():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Once)
        server.content, server.breaks, server.handle_error = content, list(breaks), lambda *_: None
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        downloads.PAUSE = 0.0
        try:
            url, md5 = f"http://127.0.0.1:{server.server_port}/list.bin", hashlib.md5(true).hexdigest()
            return downloads.download([url], folder / "list.bin", len(true), md5).read_bytes()
        finally:
            downloads.PAUSE = 3.0
            assert not (folder / "list.bin").exists() or (folder / "list.bin").read_bytes() == true
            server.shutdown()
            server.server_close()

    return call


@fault("broken", "download")
def _(rng, folder):
    true = rng.bytes(5000)
    wrong = bytearray(true)
    wrong[rng.integers(5000)] ^= 1
    return downloaded(folder, bytes(wrong), true), Refused("list.bin", "has the checksum", "get it again")


@fault("empty", "download")
def _(rng, folder):
    return downloaded(folder, b"", rng.bytes(5000)), Refused("list.bin", "5,000")


@fault("cut", "download")
def _(rng, folder):
    """The connection breaks several times; the rest is fetched, and the file is the same to the bit."""
    true = rng.bytes(5000)
    return downloaded(folder, true, true, rng.integers(1, 1500, rng.integers(1, 4)).tolist()), Value(true)


@fault("wrong type", "download")
def _(rng, folder):
    return downloaded(folder, None, rng.bytes(5000)), Refused(
        "could not download", "list.bin", "get the file elsewhere"
    )


@fault("too large", "download")
def _(rng, folder):
    true = rng.bytes(5000)
    content = true + rng.bytes(rng.integers(1, 500))
    return downloaded(folder, content, true), Refused("list.bin", "expected 5,000", "the file was changed")


# --- parameters of a notebook ---


def parameter_case(name, given, expected):
    notebook = "01_search_images" if name == "k" else "02_benchmark_encoders"
    defaults = yaml.safe_load((gu.HERE / "notebooks" / "profiles" / "mini.yml").read_text(encoding="utf-8"))
    given_too = defaults["notebooks"][notebook] | {"profile": "mini", name: given}
    return lambda: parameters.take_parameters(notebook, given_too)[name], expected


@fault("broken", "parameter")
def _(rng, folder):
    given = pick(rng, ('["a", "b"', "[a, b", "[{]"))
    return parameter_case("encoders", given, Refused("encoders must be a list such as", given))


@fault("empty", "parameter")
def _(rng, folder):
    given = pick(rng, ("", [], " , ", "[]"))
    return parameter_case("encoders", given, Refused("encoders names nothing"))


@fault("wrong type", "parameter")
def _(rng, folder):
    number = int(rng.integers(1, 9999))
    name, given, expected = pick(
        rng,
        [
            ("images", number, Value(str(number))),
            ("k", str(number), Value(number)),
            ("k", float(number), Value(number)),
            ("k", "many", Refused("k must be a whole number", "'many'", "5")),
            ("images", None, Refused("images must be text", "'mini'")),
            ("encoders", "pixels, mini", Value(["pixels", "mini"])),
            ("encoders", '["pixels"]', Value(["pixels"])),
        ],
    )
    return parameter_case(name, given, expected)


@fault("too large", "parameter")
def _(rng, folder):
    name, given = pick(rng, [("k", 0), ("k", -3), ("seed", -1), ("k", float("inf")), ("seed", 10**20)])
    return parameter_case(name, given, Refused(f"{name} must"))


@fault("broken", "profile")
def _(rng, folder):
    """A profile names a folder of results and leads nowhere else."""
    given = pick(rng, ("", "..", "/tmp", "a/b", "../x", ".hidden"))
    return parameter_case("profile", given, Refused("profile names the folder of results", repr(given)))


# --- the campaign ---


def same(found, expected):
    """Equal, arrays and numbers to float32's accuracy."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)) and not isinstance(found, np.ndarray):
        assert len(found) == len(expected)
        return all(same(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=1e-5)
    else:
        assert found == expected
    return True


def too_slow(*_):
    raise TimeoutError(f"hangs: nothing came out within {SECONDS} s")


def try_case(make, rng, folder):
    """None where what must come out came out, else what happened instead."""
    call, expected = make(rng, folder)
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = call()
    except Exception as error:
        if not isinstance(expected, Refused):
            return f"{type(error).__name__}: {error}"
        if type(error) not in (ValueError, OSError, FileNotFoundError, ConnectionError, ImportError):
            return f"a bare {type(error).__name__}: {error}"
        missing = [word for word in expected if word not in str(error)]
        return f"{missing} not said by: {error}" if missing else None
    finally:
        signal.alarm(0)
    if isinstance(expected, Refused):
        return f"not refused ({', '.join(expected)}): {found!r}"[:500]
    said = " ".join(str(warning.message) for warning in caught)
    try:
        same(found, expected.value)
    except (AssertionError, ValueError, TypeError) as error:
        return f"another value: {error}"[:800]
    missing = [word for word in expected.warned if word not in said]
    return f"{missing} not warned of by: {said}" if missing else None


def seeds(place):
    """The numbers of the cases of one fault: together CASES of them."""
    return range(place, CASES, len(FAULTS))


@pytest.mark.parametrize("place", range(len(FAULTS)), ids=[f"{kind}, {function}" for kind, function in FAULTS])
def test_a_fault_gives_the_value_or_an_error_that_names_it_and_the_remedy(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPNNS_CACHE", str(tmp_path / "cache"))
    make = list(FAULTS.values())[place]
    for number in seeds(place):
        folder = tmp_path / f"case {number}"
        folder.mkdir()
        happened = try_case(make, np.random.default_rng([SEED, number]), folder)
        assert happened is None, f"case {number}: {happened}"
    assert not Path("gpnns-harmful").exists()


def test_there_are_a_thousand_cases_of_every_kind():
    counts = collections.Counter(kind for place, (kind, _) in enumerate(FAULTS) for _ in seeds(place))
    assert counts.keys() == set(KINDS) and counts.total() == CASES


if __name__ == "__main__":
    functions = list(dict.fromkeys(function for _, function in FAULTS))
    print("| |", " | ".join(KINDS), "|\n" + "|---" * (1 + len(KINDS)) + "|")
    places = {pair: place for place, pair in enumerate(FAULTS)}
    for function in functions:
        cells = [len(seeds(places[kind, function])) if (kind, function) in places else "" for kind in KINDS]
        print(f"| {function} |", " | ".join(map(str, cells)), "|")
