"""On Colab and Kaggle: install what the course needs and the machine lacks, and change nothing that is there.

The first cell of every notebook runs this there, once it has fetched the course.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PLATFORM = {"jupyterlab", "ipykernel"}  # a hosted notebook brings its own


def list_requirements() -> list[str]:
    """What the course needs on a hosted machine, as pyproject.toml lists it."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return [line for line in lines if get_name(line) not in PLATFORM]


def get_name(requirement: str) -> str:
    return normalize_name(re.split("[>=]", requirement)[0])


def normalize_name(name: str) -> str:
    """A package's name as pip compares names: torch_metrics, Torch.Metrics and torch-metrics are one."""
    return re.sub("[-_.]+", "-", name).lower()


def list_lacking() -> list[str]:
    """The requirements whose packages are not installed."""
    held = list_held()
    return [line for line in list_requirements() if get_name(line) not in held]


def list_held() -> dict[str, str]:
    """Every installed package and its version. Where a machine has two of one name, the first on the path is used."""
    versions = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(normalize_name(name), distribution.version)
    return versions


def install(needed: list[str]) -> None:
    """Install what is needed with every installed package held at its version. RuntimeError says what to do if not."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in list_held().items()))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        result = subprocess.run([*pip, "--constraint", str(constraints), *needed], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(
            f"could not install {', '.join(needed)} ({reason}). Is the Internet switched on? Kaggle: Settings > Internet"
            " > On. Then run this cell again"
        )


if __name__ == "__main__" and (needed := list_lacking()):
    install(needed)
    print("installed", ", ".join(needed))
