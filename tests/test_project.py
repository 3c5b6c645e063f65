"""The project's own promises: one list of dependencies, installable, no stray files, nothing that names a machine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_conda_and_pip_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert sorted(line for line in pip if not line.startswith("--")) == sorted(PROJECT["project"]["dependencies"])
    assert f"python{PROJECT['project']['requires-python']}" in environment["dependencies"]


def test_dependencies_have_lower_bounds_and_no_upper_pins():
    everything = sum(PROJECT["project"]["optional-dependencies"].values(), PROJECT["project"]["dependencies"])
    for requirement in everything:
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+", requirement), requirement


def test_the_required_packages_are_there():
    names = {re.split(">=", r)[0] for r in PROJECT["project"]["dependencies"]}
    assert {
        "jupyterlab",
        "torch",
        "open_clip_torch",
        "timm",
        "faiss-cpu",
        "matplotlib",
        "ipywidgets",
        "papermill",
    } <= names


def test_the_top_level_holds_what_the_design_names():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    allowed = {
        "README.md",
        "environment.yml",
        "pyproject.toml",
        "Makefile",
        "gpnns_utils.py",
        "notebooks",
        "data",
        "tests",
    }
    assert top <= allowed | {".ci", ".github", ".gitignore", "LICENSE", "CHANGELOG.md", "CITATION.cff"}


def test_the_module_stays_one_that_a_student_reads_in_one_sitting():
    """A thousand lines from top to bottom take about an hour. What only some readers need belongs into the package
    `gpnns`, and what one notebook uses into that notebook."""
    assert len((ROOT / "gpnns_utils.py").read_text(encoding="utf-8").splitlines()) <= 950


def test_importing_the_module_imports_nothing_that_only_some_readers_need():
    code = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import gpnns_utils as gu
print(time.process_time() - start)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new))
import numpy as np
x = np.eye(4, dtype=np.float32)
gu.search(x, x, 2), gu.mean_average_precision(gu.rank_relevant(x, x, [[0]] * 4)).mean
print("open_clip" in sys.modules, "accelerate" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules, heavy = result.stdout.splitlines()
    assert float(seconds) < 0.3
    assert not {"open_clip", "torchvision", "accelerate", "timm", "faiss", "matplotlib", "IPython"} & set(
        modules.split()
    )
    assert heavy == "False False", "scores and search do without them"


def test_published_tables_are_complete():
    from gpnns import published_tables

    table = published_tables.load_published("gpnns_table4")
    assert len(table) == 8
    for row in table:  # AVG is the plain mean of the 15 columns
        columns = [value for key, value in row.items() if key not in ("model", "loss", "avg")]
        assert len(columns) == 15 and sum(columns) / 15 == pytest.approx(row["avg"], abs=0.06)
    with pytest.raises(FileNotFoundError, match="there are gpnns_table4"):
        published_tables.load_published("table5")


def test_the_workflows_run_what_is_there():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        commands = "\n".join(step.get("run", "") for step in steps)
        made = re.findall(r"^make (\w+)", commands, re.M)
        assert made and set(made) <= targets
        named = re.findall(r"\b(?:tests|notebooks)/[\w./]+", commands)
        assert named and all((ROOT / name).exists() for name in named), named
        assert workflow["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in workflow["jobs"].values())
