import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores
os.environ.setdefault("MPLBACKEND", "agg")
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill as pm
import pytest
from PIL import Image

import gpnns_utils as gu
from gpnns.world import mini_world

FOLDER = gu.HERE / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


def pytest_configure(config):
    """The drawn world is drawn once, before the workers start."""
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        for split in mini_world.SPLITS:
            if split != "pairs":  # only for pre-training
                gu.load_images("mini", split)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "09_scale_out" not in item.nodeid)  # the longest first: last, a worker would idle
    for item in items:
        if "chromium" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for one test."""
    monkeypatch.setenv("GPNNS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def world():
    """A small part of the drawn test split: 6 domains x 4 classes x 10 images (uses the shared cache)."""
    images = gu.load_images("mini", "test")
    return images.subset(images.labels % 40 < 4)


@pytest.fixture
def folder(tmp_path):
    """A class-per-folder tree of 3 classes x 4 colored images."""
    rng = np.random.default_rng(0)
    for label, color in {"blue": (30, 30, 200), "green": (20, 160, 60), "red": (200, 40, 40)}.items():
        for i in range(4):
            path = tmp_path / "photos" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(np.array(color) + rng.normal(0, 25, (40, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.fixture
def shapes(tmp_path):
    """Ten classes of six pictures: a colored square each, at a random place."""
    rng = np.random.default_rng(0)
    for label in range(10):
        color = rng.integers(0, 256, 3)
        for i in range(6):
            pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
            x, y = rng.integers(0, 20, 2)
            pixels[y : y + 20, x : x + 20] = color
            path = tmp_path / "shapes" / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "shapes"


@pytest.fixture
def small_world(tmp_path):
    """A part of the drawn world as a folder, for what trains many times: 6 domains x 5 classes x 6 images."""
    images = gu.load_images("mini", "train")
    place = np.arange(len(images)) - np.searchsorted(images.labels, images.labels)  # within its class
    large = np.bincount(images.labels).reshape(6, 120) >= 6
    kept = np.flatnonzero(large & (large.cumsum(axis=1) <= 5))
    for row in np.flatnonzero(np.isin(images.labels, kept) & (place < 6)):
        path = tmp_path / "small world" / images.groups[row] / images.names[images.labels[row]] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[row].save(path)
    return tmp_path / "small world"


@pytest.fixture
def told_world(small_world):
    """The same folder with captions for each class, and a bank of captions beside it, a text file."""
    images, captions = gu.load_images("mini", "train"), {}
    for row in [int(path.stem) for path in sorted(small_world.rglob("*.png"))]:
        captions.setdefault(images.names[images.labels[row]], images.captions[row][:2])
    (small_world / "captions.json").write_text(json.dumps(captions))
    (bank := small_world.with_name("bank.txt")).write_text(
        "\n".join(sorted({text for row in images.captions[::40] for text in row}))
    )
    return small_world, bank


@pytest.fixture
def results(request):
    """A profile of its own for a test; its folder of results is removed afterwards."""
    profile = f"test-{hashlib.blake2b(request.node.nodeid.encode(), digest_size=6).hexdigest()}"
    yield profile, gu.work_folder() / "runs" / profile
    shutil.rmtree(gu.work_folder() / "runs" / profile, ignore_errors=True)


# --- notebooks ---


def lift(notebook):
    """The imports, functions and classes of a notebook, without running anything else in it."""
    path = next(FOLDER.glob(f"{notebook}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    names = {}
    exec(compile(tree, str(path), "exec"), names)
    return SimpleNamespace(**names)


def execute(path, output, parameters, cwd=gu.HERE):
    """Run through papermill with the guards it lacks: unknown parameters fail, and every cell must have run."""
    unknown = parameters.keys() - pm.inspect_notebook(str(path)).keys()
    assert not unknown, f"{path.name} has no parameters {unknown}"
    notebook = pm.execute_notebook(
        str(path),
        str(output),
        parameters,
        kernel_name="python3",
        cwd=str(cwd),
        progress_bar=False,
        execution_timeout=900,
    )
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip())
    return notebook


def run_here(notebook, parameters):
    """A notebook's code up to its exercises, in this process: its names, or the exception that stops it. A kernel alone
    would take longer to start than most of what is tried so; what a kernel shows is tested by `execute`."""
    path = next(FOLDER.glob(f"{notebook}_*.ipynb"))
    assert parameters.keys() <= pm.inspect_notebook(str(path)).keys()
    names = {"__name__": "__main__"}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.source.startswith("## Exercises"):
            break
        if cell.cell_type == "code":
            exec(compile(cell.source, str(path), "exec"), names)
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
    plt.close("all")
    return SimpleNamespace(**names)


def text_of(notebook):
    """All that a reader can read in the outputs; pictures, as letters, could spell anything."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [{mime: part for mime, part in output.get("data", {}).items() if "image" not in mime} for output in outputs]
    return json.dumps([data, [output.get("text", "") for output in outputs]])


def value(folder, notebook, **wanted):
    """The one row of a notebook's results that has these fields."""
    rows = json.loads((folder / f"{notebook}.json").read_text())["rows"]
    (row,) = [row for row in rows if all(row[key] == val for key, val in wanted.items())]
    return row


def write_notebook(path, *sources):
    """A notebook of these code cells, the first of which holds the parameters; returns its path."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return str(path)


# --- processes ---

APART = multiprocessing.get_context("forkserver")  # its server has imported what takes long; each child is a fork of it
APART.set_forkserver_preload(["torch", "gpnns.training"])


def start_apart(function, *arguments, folder, environment=()):
    """Start function(*arguments) in a process of its own, whose output goes to files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = dict(os.environ) | dict(environment)
    process = APART.Process(target=call_apart, args=(function, arguments, variables, str(folder)))
    process.start()
    return process


def run_apart(function, *arguments, folder, environment=(), ranks=1):
    """Run function(*arguments) in a process, or in `ranks` that train together: exit status and output of the first to
    fail."""
    shared = (
        {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
    )
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        variables = dict(environment) | shared | own
        processes.append(start_apart(function, *arguments, folder=folder / str(rank), environment=variables))
    for process in processes:
        process.join(300)
        assert process.exitcode is not None, "it hangs"
    failed = next((rank for rank, process in enumerate(processes) if process.exitcode), 0)
    said = {kind: (folder / str(failed) / kind).read_text() for kind in ("stdout", "stderr")}
    return SimpleNamespace(returncode=processes[failed].exitcode, codes=[p.exitcode for p in processes], **said)


def call_apart(function, arguments, variables, folder):
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        function(*arguments)
        sys.stdout.flush()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- odds and ends ---


def load_module(path):
    """Import one Python file by its path, without running what it guards as a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(rng, n, d):
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
