"""An environment with the versions that Colab or Kaggle has installed, and the course prepared in it as there.

    python tests/colab_versions.py python os-info.txt         the Python of Colab, for example 3.12
    python tests/colab_versions.py build pip-freeze.txt FOLDER

The second makes a virtual environment in FOLDER with what the list and the course's requirements have in common, runs
notebooks/gpnns/tools/prepare.py in it, and fails if that changed anything that was installed. uv must be installed.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = [sys.executable, "-m", "uv"]
SPEC = importlib.util.spec_from_file_location("prepare", ROOT / "notebooks" / "gpnns" / "tools" / "prepare.py")
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)


def read_freeze(text: str) -> dict[str, str]:
    """Package -> version, from a `pip freeze`, without local parts such as +cpu, which the package index does not have.

    What was installed from a file or an address has no version there and is left out.
    """
    return {
        prepare.normalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;+]+)", text, re.M)
    }


def python_of(os_info: str) -> str:
    return re.search(r"^Python (3\.\d+)", os_info, re.M)[1]


def split_requirements(installed: dict[str, str]) -> tuple[list[str], list[str]]:
    """What of the course's requirements a machine has, with its versions, and what prepare.py would install there."""
    names = {line: prepare.get_name(line) for line in prepare.list_requirements()}
    there = [f"{name}=={installed[name]}" for name in names.values() if name in installed]
    return there, [line for line, name in names.items() if name not in installed]


def build(freeze: Path, folder: Path) -> None:
    installed = read_freeze(freeze.read_text(encoding="utf-8"))
    python = folder / "bin" / "python"
    subprocess.run([*UV, "venv", "--quiet", "--seed", "--python", sys.executable, str(folder)], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there, _ = split_requirements(installed)
    install(python, installed, [*there, "ipykernel"])
    before = freeze_of(python)
    subprocess.run([str(python), str(ROOT / "notebooks" / "gpnns" / "tools" / "prepare.py")], check=True)
    after = freeze_of(python)
    if changed := changes(before, after):
        sys.exit("prepare.py changed what was installed: " + ", ".join(changed))
    print("added", ", ".join(f"{name}=={after[name]}" for name in sorted(after.keys() - before.keys())))
    extras = [line for extra in ("dev", "scale") for line in project["optional-dependencies"][extra]]
    install(python, installed | after, [prepare.get_name(line) for line in extras])


def install(python: Path, held: dict[str, str], requirements: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "held.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
        command = [*UV, "pip", "install", "--quiet", "--python", str(python), "--constraint", str(constraints)]
        subprocess.run([*command, *requirements], check=True)


def freeze_of(python: Path) -> dict[str, str]:
    command = [*UV, "pip", "freeze", "--python", str(python)]
    return read_freeze(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was installed before and has another version now, or none."""
    return [f"{name} {version} -> {after.get(name)}" for name, version in before.items() if after.get(name) != version]


if __name__ == "__main__":
    if sys.argv[1] == "python":
        print(python_of(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        build(Path(sys.argv[2]), Path(sys.argv[3]))
