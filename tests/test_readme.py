"""What the README and the page behind it say, tried: commands, code, links and numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import papermill as pm
import pytest
import test_house
from conftest import execute

import gpnns_utils as gu

FRONT = (gu.HERE / "README.md").read_text(encoding="utf-8")
MANUAL = (gu.HERE / "notebooks" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", FRONT + MANUAL, re.M | re.S)
COMMANDS = "\n".join(text for kind, text in BLOCKS if kind == "").replace("\\\n", " ").splitlines()


def test_every_heading_a_reader_looks_for_is_there():
    headings = re.findall(r"^## (.+)$", FRONT + MANUAL, re.M)
    for wanted in (
        "Just look",
        "Try online",
        "Install",
        "The notebooks",
        "In your own code",
        "Glossary",
        "Questions",
        "Papers",
    ):
        assert wanted in headings, wanted


PAGES = [*gu.HERE.glob("*.md"), *gu.HERE.glob("*/README.md"), *sorted((gu.HERE / "notebooks").glob("**/[0-9]*.ipynb"))]


def text_of_page(path):
    """The prose of a page; of a notebook, that of its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors_of(path):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of_page(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_relative_link_and_anchor_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of_page(path)):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            other = path if not file else path.parent / file
            assert other.exists(), target
            assert not anchor or anchor in anchors_of(other), target


def test_a_link_to_nowhere_and_to_no_heading_is_found(tmp_path):
    (tmp_path / "a.md").write_text("# A page: first\n[one](#a-page-first) [two](#other) [three](b.md)")
    for target, fault in (("#a-page-first", False), ("#other", True), ("b.md", True)):
        (tmp_path / "a.md").write_text(f"# A page: first\n[link]({target})")
        if fault:
            with pytest.raises(AssertionError):
                test_every_relative_link_and_anchor_leads_somewhere(tmp_path / "a.md")
        else:
            test_every_relative_link_and_anchor_leads_somewhere(tmp_path / "a.md")


def test_every_make_command_is_a_target():
    targets = set(re.findall(r"^([a-z]+):", (gu.HERE / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=`|   |$)", FRONT + MANUAL, re.M))
    assert {"course", "test", "lab", "app", "site"} <= named <= targets


def test_every_papermill_command_names_a_notebook_and_its_parameters():
    lines = [line for line in COMMANDS if "papermill" in line]
    assert len(lines) >= 5
    for line in lines:
        path = re.search(r"notebooks/\S+\.ipynb", line).group()
        assert set(re.findall(r"-[pfyr] (\w+)", line)) <= pm.inspect_notebook(str(gu.HERE / path)).keys(), line


def code_of_the_readme(folder):
    """Its Python blocks as one script, with the mini CLIP in place of a download, and shorter: images and captions that a
    test can have."""
    blocks = [
        text for kind, text in BLOCKS if kind == "python" and "state.pop" not in text and "open_folder" not in text
    ]  # test_checkpoints and test_building run those two
    assert len(blocks) == 4
    code = "\n".join(blocks)
    for said, here in {
        "open_clip:ViT-B-16/openai": "mini",
        "path/to/folder": str(folder),
        "k=16": "k=2",
        "ranker = NNNRanker": "from nnn import NNNRanker, NNNRetriever\n"
        "gallery = np.random.default_rng(0).normal(size=(600, 512)).astype(np.float32)\n"
        "gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)\n"
        "references, queries = gallery[::2], gallery[:5]\nranker = NNNRanker",
        "splitting.split_classes(images, 0.1)": 'splitting.split_classes(gu.ImageSet("double", images.images * 2, np.arange(24) // 4), 0.1)',
        "epochs=3,": "epochs=1, batch_size=4,",
    }.items():
        assert said in code, said
        code = code.replace(said, here)
    Path("captions.txt").write_text("a red square\na green square\na blue square\na picture\n")
    return code


def test_the_code_runs_as_it_stands(folder, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code_of_the_readme(folder), {})
    assert Path("runs/mine/tuned.safetensors").exists()
    assert re.search(r"\d\.\d+ \(\d\.\d+, \d\.\d+\)", capsys.readouterr().out), "a score and its interval"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `pip install .` puts into site-packages, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel") / "site"
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, str(gu.HERE)], check=True)
    return folder


@pytest.mark.slow
def test_an_installed_course_has_two_names_at_the_top_and_no_class_twice(site):
    names = {path.name for path in site.iterdir() if not path.name.startswith(".")}
    assert {name for name in names if not name.endswith(".dist-info")} - {"__pycache__"} == {"gpnns", "gpnns_utils.py"}
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", test_house.SAME]
    result = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(site)) == 2


@pytest.mark.slow
def test_the_code_runs_in_an_empty_folder_once_the_package_is_installed(site, folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code = code_of_the_readme(folder) + "\nfrom gpnns import published_tables"
    code += "\nprint(gu.HERE, gu.work_folder(), len(published_tables.load_published('mcip_table1')))"
    environment = os.environ | {"PYTHONPATH": str(site), "GPNNS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{site} {tmp_path / 'elsewhere'} 9" in result.stdout
    assert Path("runs/mine/tuned.safetensors").exists()


@pytest.mark.slow
@pytest.mark.notebook
def test_an_installed_course_runs_its_notebooks_in_an_empty_folder(site, tmp_path, monkeypatch):
    """With the profiles and the drawings that came with it, and without this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(site))
    for name in ("01_search_images", "02_benchmark_encoders"):
        shutil.copy(gu.COURSE / f"{name}.ipynb", tmp_path)
        execute(tmp_path / f"{name}.ipynb", tmp_path / f"{name}_out.ipynb", {}, cwd=tmp_path)
        assert (tmp_path / "runs" / "mini" / f"{name}.json").exists()


@pytest.mark.parametrize("path", sorted((gu.HERE / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_the_numbers_beside_a_notebook_are_those_of_its_committed_run(path):
    (row,) = [line for line in FRONT.splitlines() if line.startswith(f"| [{path.stem}]")]
    headline = row.split("|")[3]
    outputs = [o for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in cell.get("outputs", [])]
    said = json.dumps([o.get("data", {}).get(kind, "") for o in outputs for kind in ("text/plain", "text/html")])
    numbers = re.findall(r"\d[\d.,]*\d", headline)
    assert numbers
    for number in numbers:
        assert number in said or number.replace(",", "") in said, number
