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

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = {"jupyterlab", "ipykernel"}  # a hosted notebook brings its own


def lacking() -> list[str]:
    """The requirements of the course, as pyproject.toml lists them, whose packages are not installed."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return [
        line for line in requirements if (name := re.split("[>=]", line)[0]) not in PLATFORM and not installed(name)
    ]


def installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def install(requirements: list[str]) -> None:
    """Install the requirements with every installed package held at its version. RuntimeError says what to do if not."""
    held = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(held.items())))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        result = subprocess.run([*pip, "--constraint", str(constraints), *requirements], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(
            f"could not install {', '.join(requirements)} ({reason}). Is the Internet switched on? Kaggle: Settings > Internet > On. Then run this cell again"
        )


if __name__ == "__main__" and (needed := lacking()):
    install(needed)
    print("installed", ", ".join(needed))
