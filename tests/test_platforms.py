"""Colab and Kaggle, imitated: what their first cell does, with and without a network, and what `setup` says of the GPU."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpnns_utils as gu

PREPARE = gu.load_module(gu.HERE / "notebooks" / "prepare.py")
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
    assert PREPARE.lacking() == []


@pytest.fixture
def lacks_faiss(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "faiss-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_only_what_is_lacking_is_installed_and_everything_else_is_held(lacks_faiss, monkeypatch):
    needed = PREPARE.lacking()
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
