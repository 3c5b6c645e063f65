"""What the README says, tried: its commands, its code, its links and its numbers."""

import json
import re
from pathlib import Path

import numpy as np
import papermill as pm
import pytest
from conftest import unit

import gpnns_utils as gu

README = (gu.HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = "\n".join(text for kind, text in BLOCKS if kind == "").replace("\\\n", " ").splitlines()


def test_every_heading_a_reader_looks_for_is_there():
    headings = re.findall(r"^## (.+)$", README, re.M)
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


def test_every_link_and_picture_is_in_the_project():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (gu.HERE / target).exists(), target


def test_every_make_command_is_a_target():
    targets = set(re.findall(r"^([a-z]+):", (gu.HERE / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=`|   |$)", README, re.M))
    assert {"course", "test", "lab", "app", "site"} <= named <= targets


def test_every_papermill_command_names_a_notebook_and_its_parameters():
    lines = [line for line in COMMANDS if "papermill" in line]
    assert len(lines) >= 5
    for line in lines:
        path = re.search(r"notebooks/\S+\.ipynb", line).group()
        assert set(re.findall(r"-[pfyr] (\w+)", line)) <= pm.inspect_notebook(str(gu.HERE / path)).keys(), line


def test_the_code_runs_as_it_stands(folder, cache, tmp_path, monkeypatch, capsys):
    """With the mini CLIP in place of a download, and shorter: images and captions that a test can have."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("a red square\na green square\na blue square\na picture\n")
    names = {}
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 4
    for text in blocks:
        if "NNNRanker" not in text and "captions.txt" in text:
            text = text.replace("k=16", "k=2")
        text = text.replace("open_clip:ViT-B-16/openai", "mini").replace("path/to/folder", str(folder))
        text = text.replace("split_classes(images, 0.1)", "split_classes(double, 0.1)").replace(
            "epochs=3,", "epochs=1, batch_size=4,"
        )
        if "split_classes" in text:  # too few classes to hold some out
            names["double"] = gu.ImageSet("double", names["images"].images * 2, np.arange(24) // 4)
        if "NNNRanker" in text:  # the lines before and after are for the same arrays
            gallery = unit(np.random.default_rng(0), 600, 512)
            names |= {"gallery": gallery, "references": gallery[::2], "queries": gallery[:5]}
            exec("from nnn import NNNRanker, NNNRetriever", names)
        exec(text, names)
    assert Path("runs/mine/tuned.safetensors").exists()
    assert re.search(r"\d\.\d+ \(\d\.\d+, \d\.\d+\)", capsys.readouterr().out), "a score and its interval"


@pytest.mark.parametrize("path", sorted((gu.HERE / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_the_numbers_beside_a_notebook_are_those_of_its_committed_run(path):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| [{path.stem}]")]
    headline = row.rstrip(" |").rsplit("|", 1)[1]
    outputs = [o for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in cell.get("outputs", [])]
    said = json.dumps([o.get("data", {}).get(kind, "") for o in outputs for kind in ("text/plain", "text/markdown")])
    numbers = re.findall(r"\d[\d.,]*\d", headline)
    assert numbers
    for number in numbers:
        assert number in said or number.replace(",", "") in said, number
