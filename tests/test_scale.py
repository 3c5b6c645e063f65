"""notebooks/gpnns/scale.py and gpnns/storage.py: from tars to a table, whatever is killed, broken, added, taken out or far away."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import gpnns_utils as gu
from gpnns import scale, storage

SCRIPT, BIN = gu.COURSE / "gpnns" / "scale.py", Path(sys.executable).parent
# Ray ends its workers when the memory of the machine is nearly full, whoever has taken it: here the other tests.
RAY = {"RAY_memory_monitor_refresh_ms": "0"}


def pack(path: Path, files: dict[str, bytes]) -> None:
    """A tar with these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory, world):
    """240 images in four tars, one of them in a folder below; in each the same names, a text, and a broken image."""
    top = tmp_path_factory.mktemp("tars")
    for part, name in enumerate(("a", "b", "c", "deep/d")):
        files = {f"{i:03d}.png": png(world[row]) for i, row in enumerate(range(part * 60, part * 60 + 60))}
        files = {"000.json": b"{}"} | files | {"broken.jpg": b"no image"}
        pack(top / f"{name}.tar", dict(sorted(files.items(), key=lambda item: item[0] != "000.json")))
    (top / "captions.txt").write_text("\n".join(captions[-1] for captions in world.captions[::3]))
    return top


@pytest.fixture(scope="module")
def encoder():
    return gu.load_encoder("mini", "cpu")


@pytest.fixture(scope="module")
def references(tars, encoder):
    return gu.embed_texts(encoder, (tars / "captions.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def embedded(tars, encoder, references, tmp_path_factory):
    """The four Parquet files, made without an engine, as an undisturbed run makes them."""
    output = tmp_path_factory.mktemp("embedded")
    for name in storage.list_stored(tars, ".tar"):
        scale.embed_tar(encoder, references, str(tars), str(output), name)
    return output


@pytest.fixture
def output(embedded, tmp_path):
    """A copy of them, to change."""
    for name in storage.list_stored(embedded, ".parquet"):
        storage.write_bytes(tmp_path / f"output/{name}.parquet", storage.read_bytes(embedded / f"{name}.parquet"))
    return tmp_path / "output"


def all_rows(output: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, vectors and bias of all Parquet files, in the order of their names."""
    folder = output / "embeddings"
    parts = [
        part
        for name in storage.list_stored(folder, ".parquet")
        for part in storage.read_rows(f"{folder}/{name}.parquet")
    ]
    ids, vectors, bias = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(vectors), np.concatenate(bias)


def digests(output: Path) -> dict[str, str]:
    folder = output / "embeddings"
    return {
        name: hashlib.md5(storage.read_bytes(f"{folder}/{name}.parquet")).hexdigest()
        for name in storage.list_stored(folder, ".parquet")
    }


def start(source, output, *options, **more) -> subprocess.Popen:
    """The command that the README gives."""
    command = [sys.executable, str(SCRIPT), str(source), str(output), "--encoder", "mini", *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=os.environ | more)


def run(source, output, *options, **more) -> tuple[int, str, str]:
    process = start(source, output, *options, **more)
    said, errors = process.communicate(timeout=300)
    return process.returncode, said, errors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def told_in_notebook_09(words: str) -> str:
    """The one text of notebook 09 that has these words."""
    cells = json.loads((gu.HERE / "notebooks" / "09_scale_out.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = ["".join(cell["source"]) for cell in cells if words in "".join(cell["source"])]
    return text


# --- partitions ------------------------------------------------------------------------------------------------------


def test_every_image_has_the_vector_and_the_bias_that_the_module_gives_it(embedded, world, encoder, references):
    ids, vectors, bias = all_rows(embedded)
    assert list(ids[:2]) == ["a.tar/000.png", "a.tar/001.png"] and ids[-1] == "deep/d.tar/059.png"
    np.testing.assert_allclose(vectors, gu.embed_images(encoder, world)[0], atol=1e-5)
    np.testing.assert_allclose(bias, gu.hub_bias(vectors, references, len(references)), atol=1e-6)


def test_no_id_occurs_twice_although_names_repeat_from_tar_to_tar(embedded):
    ids, _, _ = all_rows(embedded)
    assert len({*ids}) == len(ids) == 240


def test_unreadable_images_are_counted_and_named_and_their_neighbours_embedded(tmp_path, world, encoder):
    good = png(world[0])
    pack(tmp_path / "x.tar", {"0.png": good, "1.png": good[:200], "2.jpg": b"", "3.png": good, "4.txt": b"a vase"})
    facts = scale.embed_tar(encoder, None, str(tmp_path), str(tmp_path / "out"), "x")
    assert facts == {"tar": "x", "images": 2, "unreadable": ["1.png", "2.jpg"]}
    assert storage.read_facts(tmp_path / "out/embeddings/x.parquet") == facts
    ids, vectors, bias = all_rows(tmp_path / "out")
    assert list(ids) == ["x.tar/0.png", "x.tar/3.png"] and np.array_equal(vectors[0], vectors[1]) and not bias.any()


def test_an_image_without_a_direction_is_left_out_by_name(tmp_path):
    """`pixels` has no vector for a gray page."""
    blank, noise = Image.new("RGB", (40, 40), (128, 128, 128)), np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    pack(tmp_path / "x.tar", {"blank.png": png(blank), "noise.png": png(Image.fromarray(noise.astype(np.uint8)))})
    facts = scale.embed_tar(gu.load_encoder("pixels"), None, str(tmp_path), str(tmp_path), "x")
    assert facts == {"tar": "x", "images": 1, "unreadable": ["blank.png"]}


@pytest.mark.parametrize("files", [{}, {"a.txt": b"no image"}, {"a.png": b"broken"}])
def test_a_tar_without_images_gives_a_file_without_rows(files, tmp_path, encoder, references):
    pack(tmp_path / "x.tar", files)
    facts = scale.embed_tar(encoder, references, str(tmp_path), str(tmp_path), "x")
    assert facts["images"] == 0 and len(facts["unreadable"]) == ("a.png" in files)
    assert list(storage.read_rows(tmp_path / "embeddings/x.parquet")) == []


def test_broken_tars_say_what_they_are_and_leave_no_file(tmp_path, world, encoder):
    pack(tmp_path / "whole.tar", {f"{i}.png": png(world[i]) for i in range(9)})
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.tar").write_bytes(b"<html>not found</html>" * 100)
    with tarfile.open(tmp_path / "whole.tar") as tar:
        fourth = tar.getmembers()[4]
    (tmp_path / "between.tar").write_bytes(whole[: fourth.offset])  # as an upload that was cut off between two images
    (tmp_path / "header.tar").write_bytes(whole[: fourth.offset + 100])
    (tmp_path / "flipped.tar").write_bytes(whole[: fourth.offset] + b"?" + whole[fourth.offset + 1 :])
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    reasons = {"cut": "broken", "none": "is no tar", "twice": "holds a.png twice"}
    reasons |= dict.fromkeys(("between", "header", "flipped"), "cut off, or damaged, after 4 images")
    for name, reason in reasons.items():
        with pytest.raises(storage.BrokenTar, match=rf"{name}.tar.*{reason}"):
            scale.embed_tar(encoder, None, str(tmp_path), str(tmp_path), name)
    assert storage.list_stored(tmp_path, ".parquet") == {} and not list(tmp_path.rglob("*.partial"))


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        storage.write_bytes(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# --- the table -------------------------------------------------------------------------------------------------------


def check_same(table, ids: np.ndarray, vectors: np.ndarray, bias: np.ndarray, encoder, k: int = 10) -> None:
    """Exact search in the table gives the rows and the scores of `gu.search`, for images and for texts."""
    texts = gu.embed_texts(encoder, ["a red flower", "a brick building with two towers", "a blue vase", "a face"])
    assert table.count_rows() == len(ids)
    for queries in (vectors[::17], texts):
        scores, rows = gu.search(queries, vectors, k, bias=bias)
        found_scores, found = scale.search_table(table, queries, k)
        np.testing.assert_allclose(found_scores, scores, atol=1e-6)
        assert np.array_equal(found, ids[rows])


def test_the_table_answers_as_the_module_after_every_change(output, encoder, references, world):
    table = scale.fill_table(str(output))
    ids, vectors, bias = all_rows(output)
    check_same(table, ids, vectors, bias, encoder)

    new = gu.embed_images(encoder, gu.load_images("mini", "validation").subset(range(24)))[
        0
    ]  # a tenth more, put in twice
    new_ids, new_bias = [f"new/{i}" for i in range(24)], gu.hub_bias(new, references, len(references))
    for _ in range(2):
        scale.put_rows(table, scale.make_table_rows(new_ids, new, new_bias))
    ids, vectors, bias = np.append(ids, new_ids), np.vstack([vectors, new]), np.append(bias, new_bias)
    check_same(table, ids, vectors, bias, encoder)

    gone = ids[::5]
    table.delete(f"id in ({', '.join(map(repr, map(str, gone)))})")
    kept = ~np.isin(ids, gone)
    ids, vectors, bias = ids[kept], vectors[kept], bias[kept]
    check_same(table, ids, vectors, bias, encoder)

    others = gu.embed_texts(encoder, [told[0] for told in gu.load_images("mini", "references").captions[:50]])
    bias = gu.hub_bias(vectors, others, 16)
    scale.put_rows(table, scale.make_table_rows(list(ids), vectors, bias))
    check_same(table, ids, vectors, bias, encoder)


def test_what_was_deleted_never_returns(output, encoder):
    table = scale.fill_table(str(output), indexed=100)
    assert table.list_indices()
    _, vectors, _ = all_rows(output)
    table.delete("id = 'a.tar/000.png'")
    table = scale.fill_table(str(output), indexed=100)  # as every later run does
    for probes in (0, 20):
        _, found = scale.search_table(table, vectors[:1], 239, probes, 10)
        assert "a.tar/000.png" not in found[0] and len({*found[0]}) == found.shape[1]


def test_filling_again_adds_what_is_new_and_nothing_twice(output, encoder):
    folder = output / "embeddings"
    later = storage.read_bytes(folder / "b.parquet")
    os.remove(folder / "b.parquet")
    assert scale.fill_table(str(output)).count_rows() == 180
    storage.write_bytes(folder / "b.parquet", later)
    assert scale.fill_table(str(output)).count_rows() == 240
    os.remove(output / "table/filled.json")  # as if killed just before it was written
    table = scale.fill_table(str(output))
    check_same(table, *all_rows(output), encoder)


def test_a_tar_that_was_embedded_again_takes_the_place_of_its_old_rows(output, encoder):
    """Its neighbours stay, also one in a folder of the same name."""
    folder = output / "embeddings"
    vectors, bias = gu.unit_rows(np.random.default_rng(0).normal(size=(7, encoder.dim))), np.zeros(7)
    storage.write_rows(folder / "a/it's.parquet", [f"a/it's.tar/{i}" for i in range(3)], vectors[:3], bias[:3], {})
    assert scale.fill_table(str(output)).count_rows() == 243
    storage.write_rows(folder / "a.parquet", ["a.tar/000.png", "a.tar/new.png"], vectors[5:7], bias[5:7], {})
    storage.write_rows(folder / "a/it's.parquet", ["a/it's.tar/0"], vectors[:1], bias[:1], {})
    check_same(scale.fill_table(str(output)), *all_rows(output), encoder)


def test_where_fewer_are_found_than_asked_for_the_rest_is_marked(output):
    table = scale.fill_table(str(output))
    scores, found = scale.search_table(table, all_rows(output)[1][:2], 250)
    assert (found[:, :240] != "").all() and (found[:, 240:] == "").all() and np.isneginf(scores[:, 240:]).all()


def test_a_question_mark_in_an_address_and_references_that_are_nowhere_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave out what follows the .; AWS_ENDPOINT_URL"):
        storage.find_place("s3://photos/tars?endpoint_override=somewhere")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(tmp_path / "captions.txt")


def test_an_index_of_3_bits_finds_98_of_100_in_the_mini_world(tmp_path, encoder):
    images = gu.load_images("mini", "test")
    vectors = gu.embed_images(encoder, images)[0]
    bias = gu.hub_bias(vectors, gu.embed_texts(encoder, [told[-1] for told in images.captions[::10]]), 16)
    ids = [str(row) for row in range(len(vectors))]
    storage.write_rows(tmp_path / "embeddings/all.parquet", ids, vectors, bias, {})
    table = scale.fill_table(str(tmp_path), indexed=1)
    _, right = scale.search_table(table, vectors[::8], 10)
    _, found = scale.search_table(table, vectors[::8], 10, probes=20, refine=10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(right, found, strict=True)]) >= 0.98


@pytest.mark.parametrize("width", [5, 7, 8, 128, 512])
def test_a_width_that_is_no_multiple_of_8_never_reaches_the_index(width):
    random = np.random.default_rng(0)
    vectors, queries = (gu.unit_rows(random.normal(size=(rows, width))) for rows in (20, 6))
    bias = random.random(20).astype(np.float32)
    gallery, asked = scale.pad_vectors(vectors, bias), scale.pad_vectors(queries)
    assert gallery.shape[1] % 8 == 0 and gallery.shape[1] - width in range(1, 9)
    np.testing.assert_allclose(asked @ gallery.T, queries @ vectors.T - bias, atol=1e-6)
    assert scale.make_table_rows(["a"] * 20, vectors, bias).schema.field("vector").type.list_size == gallery.shape[1]


# --- the command -----------------------------------------------------------------------------------------------------


def runs(process: psutil.Process) -> bool:
    """Not so of a process that has ended and that nobody has asked how, which some containers keep."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def left_behind(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after half a minute: a child ends a moment after its parent, when it notices."""
    until = time.monotonic() + 30
    while (left := [*filter(runs, processes)]) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def test_the_command_embeds_all_names_what_is_broken_and_opens_no_port_but_to_itself(tars, embedded, tmp_path):
    for name in (*storage.list_stored(tars, ".tar"), "bad"):
        content = b"no tar" * 1000 if name == "bad" else storage.read_bytes(f"{tars}/{name}.tar")
        storage.write_bytes(tmp_path / f"in/{name}.tar", content)
    process = start(tmp_path / "in", tmp_path / "out", "--references", tars / "captions.txt", "--workers", 1)
    family, addresses = {}, set()
    while process.poll() is None:
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                family[member.pid] = member
                ends = [
                    end for connection in member.net_connections("inet") for end in (connection.laddr, connection.raddr)
                ]
                addresses |= {end.ip for end in ends if end}
        time.sleep(0.1)
    said, errors = process.communicate()
    assert process.returncode == 1 and "bad.tar is no tar, or a broken one" in errors
    assert (
        "5 tars read, with 4 images that are not readable: a/broken.jpg b/broken.jpg" in said
        and "has 240 images" in said
    )
    assert digests(tmp_path / "out") == digests(embedded), "the engine changes nothing"
    assert addresses <= {"127.0.0.1", "::1"}
    assert len(family) > 1 and not left_behind(family.values())


def test_an_output_keeps_to_one_encoder_and_one_set_of_references(tmp_path):
    for _ in range(2):
        storage.check_same_settings(tmp_path, {"encoder": "mini", "references": b"a vase"})
    with pytest.raises(ValueError, match=r"references \w{32}, now \w{32}; choose another folder"):
        storage.check_same_settings(tmp_path, {"encoder": "mini", "references": b"a flower"})


def test_a_folder_without_tars_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no .tar file in .*pack the images into webdataset tars"):
        scale.embed_all("mini", None, str(tmp_path / "nowhere"), str(tmp_path / "out"))


def test_a_table_of_no_image_says_so(tmp_path):
    storage.write_rows(tmp_path / "embeddings/a.parquet", [], np.empty((0, 8), np.float32), np.empty(0), {})
    with pytest.raises(ValueError, match="embeddings has no image: in none of the tars could one be read"):
        scale.fill_table(str(tmp_path))


@pytest.mark.slow
def test_tars_without_a_readable_image_are_named_before_the_table_says_that_it_is_empty(tmp_path):
    pack(tmp_path / "in/no_images.tar", {"a.jpg": b"no image"})
    storage.write_bytes(tmp_path / "in/no_tar.tar", b"no tar" * 1000)
    code, said, errors = run(tmp_path / "in", tmp_path / "out", "--workers", 1)
    assert code == 1 and "1 images that are not readable: no_images/a.jpg" in said
    assert "no_tar.tar is no tar, or a broken one" in errors and "embeddings has no image" in errors


@pytest.mark.slow
def test_after_sigkill_of_worker_and_driver_the_same_bytes_and_nothing_is_computed_twice(tars, embedded, tmp_path):
    """Notebook 09 does so too, in every `make test`."""
    options, folder, before = ("--references", tars / "captions.txt", "--workers", 1), tmp_path / "out/embeddings", {}
    for victim in ("worker", "driver"):
        process = start(tars, tmp_path / "out", *options)
        while (
            not (done := {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}).keys() - before.keys()
        ):
            time.sleep(0.005)
            assert process.poll() is None, process.communicate()
        children = psutil.Process(process.pid).children(recursive=True)
        (worker,) = [child for child in children if "daft.execution.udf_worker" in child.cmdline()]
        os.kill(worker.pid if victim == "worker" else process.pid, signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode and ("run this again" in errors or victim == "driver")
        assert not left_behind(children)
        assert before.items() <= done.items(), "what was finished is left as it was"
        before = done
    code, said, errors = run(tars, tmp_path / "out", *options)
    assert code == 0, errors
    assert digests(tmp_path / "out") == digests(embedded)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_daft_reports_home_when_it_is_imported_alone_and_not_through_the_script():
    code = """
import http.client, socket, time, urllib.request
asked = []
def note(*_, **__):
    asked.append(1)
    raise OSError("no connection in this test")
socket.socket.connect = socket.create_connection = note
urllib.request.urlopen = http.client.HTTPConnection.request = note
import {module}
time.sleep(1)  # it asks in a thread
print(len(asked))
"""
    allowed = {name: value for name, value in os.environ.items() if name not in ("DO_NOT_TRACK", "SCARF_NO_ANALYTICS")}
    asked = [
        subprocess.run([sys.executable, "-c", code.format(module=module)], env=allowed, capture_output=True, check=True)
        for module in ("daft", "gpnns.scale")
    ]
    alone, through_the_script = (int(result.stdout) for result in asked)
    assert alone > 0, "else this test would notice nothing"
    assert through_the_script == 0


@pytest.mark.slow
def test_ray_gives_the_same_files(tars, embedded, tmp_path):
    code, said, errors = run(tars, tmp_path / "out", "--references", tars / "captions.txt", "--ray", "local", **RAY)
    assert code == 0, errors
    assert digests(tmp_path / "out") == digests(embedded)


@pytest.mark.slow
def test_a_cluster_as_notebook_09_starts_it_gives_the_same_files_and_reports_nothing_home(tars, embedded, tmp_path):
    """Its lines as they stand there, for two nodes on this machine with a core each; stopped by their own processes."""
    port, home = free_port(), {"HOME": str(tmp_path), "DO_NOT_TRACK": "0", "PATH": f"{BIN}:{os.environ['PATH']}"} | RAY
    commands = re.findall("^(?:export|ray|chmod) .*", told_in_notebook_09("ray start --head --port 6379 "), re.M)[:5]
    allowed, token, hidden, head, node = [command.partition("  # ")[0].strip() for command in commands]
    home |= dict([allowed.removeprefix("export ").split("=")])
    head = head.replace("6379", str(port)) + " --include-dashboard false"
    node = node.replace("FIRST_MACHINE:6379", f"127.0.0.1:{port}")
    subprocess.run(f"{token} && {hidden}", shell=True, env=os.environ | home, check=True)
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    started, workers = [], {}
    try:
        for command in (head, node):
            command = f"exec {command} --num-cpus 1 --block"
            started.append(
                subprocess.Popen(command, shell=True, env=os.environ | home, stdout=subprocess.PIPE, text=True)
            )
            for line in started[-1].stdout:
                if "Ray runtime started" in line:
                    break
        nodes = [psutil.Process(process.pid) for process in started]
        options = "--references", tars / "captions.txt", "--ray", f"127.0.0.1:{port}", "--workers", 2
        process = start(tars, tmp_path / "out", *options, **home)
        while process.poll() is None:
            for child in [child for parent in nodes for child in parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if "Actor" in " ".join(child.cmdline()):
                        workers[child.pid] = child.environ()
            time.sleep(0.1)
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        everyone = [child for parent in nodes for child in parent.children(recursive=True)]
    finally:
        for process in reversed(started):
            process.terminate()
    assert digests(tmp_path / "out") == digests(embedded)
    assert workers and {environment["DO_NOT_TRACK"] for environment in workers.values()} == {"1"}
    assert not left_behind(everyone)


@pytest.mark.slow
def test_input_and_output_may_lie_in_object_storage(tars, embedded, tmp_path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    keys |= {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
        "AWS_ENDPOINT": address,
        "AWS_ALLOW_HTTP": "true",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    upload = f"""
import time
from pathlib import Path
from pyarrow import fs
from gpnns import storage
for _ in range(100):
    try:
        fs.FileSystem.from_uri("s3://photos?allow_bucket_creation=true")[0].create_dir("photos")
        break
    except OSError:
        time.sleep(0.2)
for path in Path({str(tars)!r}).rglob("*.*"):
    storage.write("s3://photos/in/" + path.relative_to({str(tars)!r}).as_posix(), path.read_bytes())
"""
    download = f"""
from gpnns import scale, storage
for name in storage.files_below("s3://photos/out/embeddings", ".parquet"):
    storage.write({str(tmp_path)!r} + f"/embeddings/{{name}}.parquet", storage.read(f"s3://photos/out/embeddings/{{name}}.parquet"))
print(scale.fill_table("s3://photos/out").count_rows())
"""
    try:
        subprocess.run([sys.executable, "-c", upload], env=os.environ | keys, check=True)
        for time_ in range(2):
            code, said, errors = run(
                "s3://photos/in", "s3://photos/out", "--references", "s3://photos/in/captions.txt", **keys
            )
            assert code == 0, errors
            assert f"{4 * (time_ == 0)} tars read" in said and "has 240 images" in said
        result = subprocess.run(
            [sys.executable, "-c", download], env=os.environ | keys, check=True, capture_output=True, text=True
        )
    finally:
        server.kill()
    assert result.stdout.strip() == "240" and digests(tmp_path) == digests(embedded)


@pytest.mark.slow
def test_the_training_of_notebook_09_runs_as_two_nodes(tmp_path):
    """Its lines and its command as they stand there, for a tenth of an epoch, with one process a node and two nodes here."""
    cell = told_in_notebook_09("torchrun --nnodes")
    blocks = re.findall(r"^```\w*\n(.*?)^```", cell, re.M | re.S)
    (lines,) = [block for block in blocks if "fine_tune" in block]
    assert "epochs=1.0" in lines
    (tmp_path / "train.py").write_text(lines.replace("epochs=1.0", "epochs=0.1"))
    (command,) = re.findall("^torchrun .*", cell, re.M)
    port = str(free_port())
    for said, here in {"FIRST_MACHINE": "127.0.0.1", "29500": port, "--nproc_per_node 8": "--nproc_per_node 1"}.items():
        assert said in command
        command = command.replace(said, here)
    nodes = [
        subprocess.Popen(
            [BIN / "torchrun", *command.replace("node_rank 0", f"node_rank {node}").split()[1:]],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert len(list(tmp_path.glob("shared/run/*/best.safetensors"))) == 1, "one training, of two processes"
    assert list(tmp_path.glob("shared/run/*/step_*/random_states_1.pkl"))
