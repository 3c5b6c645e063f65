"""Make .venv and install the course into it. `make` starts this; without make: `python3 notebooks/gpnns/tools/install.py`.

It runs before anything is installed, and with a Python of any age, if only to say that it is too old. What was
downloaded before a failure is kept, so that the next start goes on from there.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv"
PYTHON = str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
DISK = 8e9 if sys.platform == "linux" else 4e9  # torch for Linux brings the libraries of a GPU along: 7 GB in all
AGAIN = "Then run the same command again: it goes on where it was."
REMEDIES = [  # what a failed step prints, and what to do: the first that fits
    (
        "No space left|Disk quota",
        "The disk is full. uv keeps what it downloads in ~/.cache/uv, or where UV_CACHE_DIR says, which may be another "
        "disk than this one. Make room. " + AGAIN,
    ),
    (
        "ensurepip|No module named .?venv",
        "Python's venv module is incomplete here. On Debian and Ubuntu: apt install python3-venv, or "
        "python3.{minor}-venv. " + AGAIN,
    ),
    (
        "(?i)connect|resolve host|dns error|timed out|unreachable|failed to fetch|proxy|certificate|versions: none",
        "The packages could not be downloaded. Is this computer online? Behind a proxy, set HTTPS_PROXY; where packages "
        "come from a mirror, set PIP_INDEX_URL and UV_DEFAULT_INDEX to its address. " + AGAIN,
    ),
    (
        "No solution found|has no wheels",
        "A package, named above, is not made for Python 3.{minor} on this kind of machine. Try another: make "
        "PYTHON=python3.12. For Macs with Intel processors torch is no longer made.",
    ),
]


def main() -> None:
    check_python()
    check_disk()
    print("Installing the course's packages into .venv; once, some minutes.", flush=True)
    run_step(sys.executable, "-m", "venv", str(VENV))
    run_step(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
    run_step(PYTHON, "-m", "uv", "pip", "install", "--compile-bytecode", "--python", PYTHON, "-e", ".[dev,scale]")


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036
        found = "{}.{}.{} ({})".format(*sys.version_info[:3], sys.executable)
        sys.exit(
            "gpnns needs Python 3.11 or newer, and this is " + found + ". Install a newer one, or name one that is"
            " there: make PYTHON=python3.12, or without make: python3.12 notebooks/gpnns/tools/install.py"
        )


def check_disk() -> None:
    """Enough room for what is not in .venv yet."""
    there = sum(path.lstat().st_size for path in VENV.rglob("*")) if VENV.exists() else 0
    free = shutil.disk_usage(VENV if VENV.exists() else ROOT).free
    if free < DISK - there:
        sys.exit(
            f"The packages need about {(DISK - there) / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free in {ROOT}."
            f" Make room, or move the course to another disk. {AGAIN}"
        )


def run_step(*command: str) -> None:
    """Run one command and show what it prints; where it fails, end with a sentence about what to do."""
    process = Popen(command, cwd=ROOT, stdout=PIPE, stderr=STDOUT, text=True, errors="replace")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not line.startswith(" + "):  # one for each of 170 packages
            print(line, end="", flush=True)
    if process.wait():
        known = (remedy for sign, remedy in REMEDIES if re.search(sign, "".join(lines)))
        remedy = next(known, "The installation stopped; the reason stands above. " + AGAIN)
        sys.exit("\n" + remedy.format(minor=sys.version_info[1]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. " + AGAIN)
