"""A first run that fails: whatever is missing, the last sentence says what happened and what to do."""

import ast
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import load_module, write_notebook

import gpnns_utils as gu

INSTALL = load_module(gu.COURSE / "gpnns" / "tools" / "install.py")
NOWHERE = "http://127.0.0.1:9/simple"  # nothing listens there
OFFLINE = {"PIP_INDEX_URL": NOWHERE, "UV_DEFAULT_INDEX": NOWHERE, "PIP_RETRIES": "0", "UV_HTTP_RETRIES": "0"}
OFFLINE |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1"}
# Not what a `make test` around this tells its own commands.
HERE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


@pytest.fixture
def course(tmp_path, monkeypatch):
    """What an installation needs of the course, without an environment, on a disk with room."""
    for name in ("Makefile", "pyproject.toml", "notebooks/gpnns/tools/install.py", "notebooks/gpnns/tools/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (gu.HERE / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(re.sub("^DISK = .*", "DISK = 0", text, flags=re.M), encoding="utf-8")
    monkeypatch.setattr(INSTALL.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    monkeypatch.setattr(INSTALL, "ROOT", tmp_path)
    monkeypatch.setattr(INSTALL, "VENV", tmp_path / ".venv")
    return tmp_path


def make(course, python, **environment):
    """The last lines of a `make course` that fails."""
    command = ["make", "course", f"PYTHON={python}"]
    result = subprocess.run(command, cwd=course, env=HERE | environment, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert not (course / ".venv" / ".ready").exists(), "an installation that failed does not count"
    return "\n".join((result.stdout + result.stderr).strip().splitlines()[-3:])


def imitated_python(folder, body):
    """A python3 that answers as `body`, a shell script, says."""
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_no_python_at_all(course):
    assert re.search("There is no python33 here. Install Python 3.11 or newer", make(course, "python33"))


def test_a_python_that_is_too_old(course):
    code = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    said = make(course, imitated_python(course, f'exec "{sys.executable}" -c "{code}" "$@"'))
    assert re.search("gpnns needs Python 3.11 or newer, and this is 3.9.18 .*make PYTHON=python3.12", said)
    assert not (course / ".venv").exists()


def test_an_old_python_can_read_what_tells_it_that_it_is_too_old():
    ast.parse((gu.COURSE / "gpnns" / "tools" / "install.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_a_python_without_its_venv_module(course, monkeypatch):
    python = imitated_python(
        course, "echo 'The virtual environment was not created: ensurepip is not available.'; exit 1"
    )
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(
        SystemExit, match=rf"venv module is incomplete.*apt install .*python3.{sys.version_info[1]}-venv"
    ):
        INSTALL.main()


def test_a_disk_without_room(course, monkeypatch):
    monkeypatch.setattr(INSTALL.shutil, "disk_usage", lambda _: SimpleNamespace(free=2.5e9))
    with pytest.raises(SystemExit, match=r"need about [48].0 GB of disk, and 2.5 GB are free in .*Make room"):
        INSTALL.main()
    assert not (course / ".venv").exists()


def test_what_is_installed_already_needs_no_more_room(course, monkeypatch):
    with open_file(course / ".venv" / "lib" / "torch.so") as file:
        file.truncate(int(INSTALL.DISK - 2e9))  # a file with a hole takes no room here
    for free, enough in ((1.9e9, False), (2.1e9, True)):
        monkeypatch.setattr(INSTALL.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            INSTALL.check_disk()
        else:
            with pytest.raises(SystemExit, match="need about 2.0 GB"):
                INSTALL.check_disk()


def open_file(path):
    path.parent.mkdir(parents=True)
    return path.open("wb")


def test_a_disk_that_fills_up_while_installing(course):
    with pytest.raises(SystemExit, match="The disk is full.*UV_CACHE_DIR.*same command again"):
        INSTALL.run_step("sh", "-c", "echo 'error: failed to write: No space left on device (os error 28)'; exit 2")


def test_no_network_for_the_first_package(course):
    said = make(course, sys.executable, **OFFLINE)
    assert re.search("could not be downloaded. Is this computer online.*HTTPS_PROXY.*PIP_INDEX_URL", said), said


def test_no_network_for_the_others(course, monkeypatch, capfd):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="could not be downloaded. Is this computer online"):
        INSTALL.run_step(sys.executable, "-m", "uv", "pip", "install", "--target", str(course / "x"), "no-such-package")
    assert NOWHERE in capfd.readouterr().out, "what uv itself says is there too"


def test_a_python_for_which_a_package_is_not_made(course):
    with pytest.raises(SystemExit, match=r"is not made for Python 3\.\d+ on this kind of machine. Try another: make"):
        INSTALL.run_step(
            "sh", "-c", "echo 'No solution found when resolving dependencies: torch has no wheels'; exit 1"
        )


def test_a_failure_that_nobody_foresaw_shows_what_the_installer_said(course, capfd):
    with pytest.raises(SystemExit, match="the reason stands above"):
        INSTALL.run_step("sh", "-c", "echo 'something new'; exit 1")
    assert "something new" in capfd.readouterr().out


def test_the_next_make_goes_on_and_one_that_is_done_does_nothing(course):
    python = imitated_python(
        course,
        f'test "$1" = notebooks/gpnns/tools/install.py && echo $1 >> {course}/calls && mkdir -p .venv; exit $FAILS',
    )
    make(course, python, FAILS="1")
    for _ in range(2):
        subprocess.run(["make", ".venv/.ready", f"PYTHON={python}"], cwd=course, env=HERE | {"FAILS": "0"}, check=True)
    assert (course / "calls").read_text().splitlines() == ["notebooks/gpnns/tools/install.py"] * 2, (
        "one that failed, one that did not"
    )


def test_a_python_without_the_packages_is_told_how_to_get_them(course):
    bare = [sys.executable, "-I", "-S", "notebooks/gpnns/tools/run.py"]  # without site-packages
    result = subprocess.run(bare, cwd=course, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(
        "is not installed for .*make course.*notebooks/gpnns/tools/install.py.*gpnns.tools.run", result.stderr
    )


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "DeadKernelError: Kernel died"),
        ("import torch; torch.ones(10**15)", "RuntimeError: .*can't allocate memory"),
    ],
)
def test_a_run_without_memory_says_where_it_was_and_what_to_do(tmp_path, cell, error):
    notebook = write_notebook(tmp_path / "01_large.ipynb", 'profile: str = "mini"  # p', cell, "3")
    command = [
        sys.executable,
        str(gu.COURSE / "gpnns" / "tools" / "run.py"),
        "--runs",
        str(tmp_path / "runs"),
        notebook,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.search(rf"01_large +\d+ s +FAILED at cell 2: {error}", result.stdout), result.stdout
    assert re.search("Memory ran out, most likely.*batch_size.*run the notebook again", result.stderr)


@pytest.mark.notebook
def test_papermill_alone_ends_with_138_when_the_kernel_dies(tmp_path):
    """The README names this number."""
    dying = write_notebook(tmp_path / "dying.ipynb", 'profile: str = "mini"  # p', "import os; os.kill(os.getpid(), 9)")
    command = [sys.executable, "-m", "papermill", dying, str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    assert subprocess.run(command, capture_output=True).returncode == 138
