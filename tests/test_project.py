"""The project's own promises: one list of dependencies, installable, no stray files, nothing that names a machine."""

import os
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
    everything = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
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
    assert top <= allowed | {".ci", ".github", ".gitignore", "LICENSE"}


def test_an_installed_package_works_anywhere(tmp_path):
    """What `pip install .` puts into site-packages, used from an unrelated folder."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path / "site"),
            str(ROOT),
        ],
        check=True,
    )
    code = "import gpnns_utils as gu; e = gu.load_encoder('mini'); print(gu.HERE); print(gu.embed_texts(e, ['a red flower']).shape); print(len(gu.load_published('mcip_table1')), gu.work_folder()); print('cub' in gu.datasets.TABLE)"
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "GPNNS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout and "(1, 128)" in result.stdout
    assert str(tmp_path / "elsewhere") in result.stdout and result.stdout.endswith("True\n")


def test_published_tables_are_complete():
    import gpnns_utils as gu

    table = gu.load_published("gpnns_table4")
    assert len(table) == 8
    for row in table:  # AVG is the plain mean of the 15 columns
        columns = [value for key, value in row.items() if key not in ("model", "loss", "avg")]
        assert len(columns) == 15 and sum(columns) / 15 == pytest.approx(row["avg"], abs=0.06)
    with pytest.raises(FileNotFoundError, match="there are gpnns_table4"):
        gu.load_published("table5")


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
