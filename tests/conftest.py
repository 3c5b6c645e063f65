import ast
import importlib.util
import os
import shutil
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "2")
import nbformat
import numpy as np
import pytest
from PIL import Image

import gpnns_utils as gu


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
def results(request):
    """A profile of its own for a test; its folder of results is removed afterwards."""
    profile = f"test-{request.node.name.split('[')[0][:40]}"
    yield profile, gu.work_folder() / "runs" / profile
    shutil.rmtree(gu.work_folder() / "runs" / profile, ignore_errors=True)


def lift(notebook):
    """The imports, functions and classes of a notebook, without running anything else in it."""
    path = next((gu.HERE / "notebooks").glob(f"{notebook}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    names = {}
    exec(compile(tree, str(path), "exec"), names)
    return SimpleNamespace(**names)


def load_module(path):
    """Import one Python file by its path, without running what it guards as a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(rng, n, d):
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write_notebook(path, *sources):
    """A notebook of these code cells, the first of which holds the parameters; returns its path."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return str(path)
