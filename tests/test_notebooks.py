"""Every notebook: its structure, and its execution through papermill in the ways that readers use it."""

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import open_clip
import papermill as pm
import pytest
import timm
import torch
from conftest import FOLDER, NOTEBOOKS, execute, run_here, text_of, value, write_notebook
from PIL import Image
from safetensors.torch import load_file
from wrong_answers import WRONG

import gpnns_utils as gu
from gpnns import evaluation
from gpnns.encoders import checkpoints, heads

PATHS = NOTEBOOKS
ids = [path.stem for path in PATHS]


def cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.source.strip()]


def code_cells(path):
    return [cell for cell in cells(path) if cell.cell_type == "code"]


def lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


def test_the_course_has_its_notebooks():
    assert ids == [
        "01_search_images",
        "02_benchmark_encoders",
        "03_finetune_arcmargin",
        "04_realign_text_mcip",
        "05_average_soups",
        "06_normalize_neighbors_nnn",
        "07_reproduce_papers",
        "08_build_your_search",
        "09_scale_out",
    ]


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_notebook_opens_as_all_do(path):
    first, *_ = cells(path)
    assert first.source.startswith("# ")
    for part in (
        "colab.research.google.com",
        "kaggle.com/kernels",
        "**Time**",
        "**Downloads**",
        f"notebooks/{path.name}",
    ):
        assert part in first.source, part
    setup, reference = code_cells(path)[0].source, code_cells(PATHS[0])[0].source
    assert setup == reference, "the setup cell is the same in every notebook"


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_parameters_are_typed_described_and_known_to_papermill(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    known = pm.inspect_notebook(str(path))
    assert len(known) == len(lines(cell)) and {"profile", "seed"} <= known.keys()
    for name, parameter in known.items():
        assert parameter["inferred_type_name"] != "None" and parameter["help"], name
    assert all(isinstance(node, ast.AnnAssign) for node in ast.parse(cell.source).body)


def pictures_shown(path):
    """After how many code cells each picture stands that is among the committed outputs."""
    return [
        number
        for number, cell in enumerate(code_cells(path), 1)
        if any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {}))
    ]


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_lesson_stays_within_what_a_reader_can_follow(path):
    code = code_cells(path)
    assert len(code) <= 60
    assert sum(len(lines(cell)) for cell in code) <= 400 and max(len(lines(cell)) for cell in code) <= 25
    trees = [ast.parse(cell.source) for cell in code[1:]]  # the first is the set-up that all notebooks share
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes) <= 15
    assert len(pm.inspect_notebook(str(path))) <= 10
    assert pictures_shown(path)[0] <= 10 and path.stat().st_size <= 300 * 1024
    fillers = [
        cell.source
        for cell in cells(path)
        if cell.cell_type == "markdown" and cell.source[0] not in "#!<|" and len(cell.source.split()) <= 8
    ]
    assert len(fillers) <= 3, fillers


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_lesson_has_no_guards_and_asks_no_input_what_it_is(path):
    """What a cell calls checks; a comparison inside an expression is fine where it draws or counts."""
    trees = [ast.parse(cell.source) for cell in code_cells(path)[1:] if not cell.id.startswith("check-")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert not [ast.unparse(node) for node in nodes if isinstance(node, ast.Raise | ast.Assert | ast.If | ast.Try)]


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_committed_notebook_was_run_from_top_to_bottom_and_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    text = path.read_text(encoding="utf-8")
    assert str(gu.HERE) not in text, "no path of the machine that ran it"
    assert not re.search(r"<progress value|embedding [^\n]*: [\d,]+ (images|texts) in", text), (
        "nor a cache that was empty"
    )


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_notebook_ends_with_findings_results_exercises_and_a_way_on(path):
    headings = re.findall(
        r"^## (.+)$", "\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown"), re.M
    )
    assert headings[-2:] == ["What we found", "Exercises"]
    assert "gu.save_results(" in "".join(cell.source for cell in code_cells(path))
    assert "**Next**" in cells(path)[-1].source


def test_links_between_notebooks_lead_somewhere():
    for path in PATHS:
        for cell in cells(path):
            for target in re.findall(r"\]\(([\w/.]+\.ipynb)\)", cell.source):
                assert (FOLDER / target).exists(), target


# --- execution ---

# Parameters of the tests that run every notebook; the training that is the default runs once, below.
QUICK = {
    "03_finetune_arcmargin": {"recipe": {"epochs": 1.0, "batch_size": 16}, "train_images": "SMALL WORLD"},
    "04_realign_text_mcip": {
        "recipe": {
            "images": {"epochs": 1.0, "batch_size": 16},
            "search": {"threshold": -1.0},
            "realign": {"epochs": 1.0, "batch_size": 16},
        },
        "train_images": "SMALL WORLD",
        "pair_images": "SMALL WORLD",
        "bank": "BANK",
    },
    "05_average_soups": {"recipe": {"epochs": 1.0, "batch_size": 16}, "train_images": "SMALL WORLD"},
    "06_normalize_neighbors_nnn": {"encoders": "random, mini", "reference_images": 300},
    "08_build_your_search": {
        "recipe": {"images": {"epochs": 1.0, "batch_size": 16}, "realign": {"epochs": 1.0, "batch_size": 16}},
        "images": "TOLD WORLD",
    },
    "09_scale_out": {"rows": 10_000},
}


def with_wrong_answers(path, target):
    """A notebook with each exercise tried as a reader may: its empty stub, wrong answers, then the solution."""
    notebook = nbformat.read(FOLDER / "solutions" / path.name, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    for number, answers in WRONG[path.stem].items():
        check, behind = cells[f"check-{number}"], notebook.cells.index(cells[f"stub-{number}"]) + 1
        trials = [check.source, *(f"{answer}\n\n{check.source}" for answer in answers)]
        notebook.cells[behind:behind] = [
            nbformat.v4.new_code_cell(source, id=f"check-{number}-{i}") for i, source in enumerate(trials)
        ]
    nbformat.write(notebook, target)
    return target


def said_by_checks(notebook):
    """What each check of an executed notebook said, by the id of its cell; None for what is no text."""
    said = {}
    for cell in notebook.cells:
        if cell.id.startswith("check-"):
            values = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
            said[cell.id] = ast.literal_eval(values[0]) if values and values[0][0] in "'\"" else None
    return said


@pytest.mark.notebook
@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_notebook_runs_its_checks_tell_right_from_wrong_and_its_results_are_tidy(
    request, path, tmp_path, results, small_world
):
    """From any folder of the course: it finds its module by itself."""
    profile, folder = results
    places, parameters = {"SMALL WORLD": str(small_world)}, {"profile": profile} | QUICK.get(path.stem, {})
    if "bank" in parameters or "TOLD WORLD" in parameters.values():
        places["TOLD WORLD"], places["BANK"] = map(str, request.getfixturevalue("told_world"))
    parameters = {key: places.get(str(value), value) for key, value in parameters.items()}
    cwd = (gu.HERE, FOLDER, FOLDER / "solutions")[PATHS.index(path) % 3]
    notebook = execute(with_wrong_answers(path, tmp_path / path.name), tmp_path / "out.ipynb", parameters, cwd)
    said = said_by_checks(notebook)
    right = {f"check-{number}" for number in WRONG[path.stem]}
    assert {name: text for name, text in said.items() if name in right} == dict.fromkeys(right, "right")
    hints = {name: text for name, text in said.items() if name not in right}
    assert hints and {name: text for name, text in hints.items() if not str(text).startswith("hint:")} == {}
    assert "nan" not in text_of(notebook)
    written = json.loads((folder / f"{path.stem}.json").read_text())
    assert written.keys() == {"notebook", "profile", "seconds", "headline", "environment", "rows"}
    assert written["notebook"] == path.stem and written["rows"] and written["headline"]
    for row in written["rows"]:
        assert row.keys() == {"model", "task", "split", "group", "metric", "value", "low", "high", "seeds"}
        assert np.isfinite(row["value"])
        if row["low"] is not None:
            assert row["low"] - 1e-6 <= row["value"] <= row["high"] + 1e-6, row
    least = {"identical_files": 100, "same_rows": 99.5}  # of 09: after kills, and after changes
    promised = [row for row in written["rows"] if row["metric"] in least]
    assert len(promised) == (11 if path.stem == "09_scale_out" else 0)
    assert all(row["value"] >= least[row["metric"]] for row in promised), promised


@pytest.mark.slow
def test_anyones_encoders_on_anyones_labelled_folder(folder, tmp_path, results, cache):
    """A real network among them."""
    profile, out = results
    encoders = ["random", "efficientnet_lite0", "pixels"]
    run_here("02", {"profile": profile, "images": str(folder), "encoders": json.dumps(encoders)})
    for model in encoders[:2]:
        wanted = {"model": model, "metric": "mAP", "group": "all", "task": "image_to_image", "split": "test"}
        assert value(out, "02_benchmark_encoders", **wanted)["value"] > 60
    run_here("01", {"profile": profile, "images": str(folder), "encoder": "pixels", "k": 3})


def test_broken_files_stop_neither_notebook(folder, tmp_path, results, cache):
    profile, out = results
    (folder / "blue" / "0.png").write_bytes(b"broken")
    (folder / "red" / "3.png").write_bytes(b"")
    mine = {"profile": profile, "images": str(folder)}
    with pytest.warns(UserWarning, match="2 of 12 images cannot be read"):
        run_here("01", mine | {"k": 3, "encoder": "pixels"})
    run_here("02", mine | {"encoders": "pixels, mini"})
    wanted = {"model": "mini", "metric": "mAP", "group": "all", "task": "image_to_image", "split": "test"}
    assert value(out, "02_benchmark_encoders", **wanted)["value"] > 60


def test_search_needs_no_labels_and_benchmark_says_that_it_does(folder, tmp_path, results, cache):
    profile, _ = results
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    run_here("01", {"profile": profile, "images": str(flat), "k": 3})
    with pytest.raises(ValueError, match="has no labels: put each class into a folder"):
        run_here("02", {"profile": profile, "images": str(flat)})


@pytest.mark.slow
@pytest.mark.notebook
def test_fine_tuning_gains_ten_points_on_unseen_classes_in_every_domain_and_costs_text(tmp_path, results):
    profile, out = results
    notebook = execute(FOLDER / "03_finetune_arcmargin.ipynb", tmp_path / "o.ipynb", {"profile": profile})
    rows = json.loads((out / "03_finetune_arcmargin.json").read_text())["rows"]
    scores = {(row["model"], row["split"], row["task"], row["group"]): row for row in rows}
    tuned = {key[1:]: row for key, row in scores.items() if key[0] == "arcmargin"}
    assert len(tuned) == 8, "all images, six domains, and text"
    for (split, task, group), row in tuned.items():
        gain = row["value"] - scores["mini", split, task, group]["value"]
        if task == "text_to_image":
            assert gain < 0, "the text tower no longer fits"
        else:
            assert gain > (10 if group == "all" else 0), (split, task, group)
    shipped = load_file(gu.DATA / "mini_tuned" / "arcmargin.safetensors")
    made = load_file(out / "03_arcmargin.safetensors")
    assert all(torch.allclose(made[key], shipped[key], atol=0.01) for key in shipped), "the recipe of what is shipped"
    trained_here = [json.loads(line) for line in next(out.glob("03_training/*/log.jsonl")).read_text().splitlines()]
    validation = [row["validation"] for row in trained_here if "validation" in row]
    assert len(validation) == 2 and max(validation) > 58, "this run trained, it did not load"
    assert "nan" not in text_of(notebook)


@pytest.mark.slow
@pytest.mark.notebook
def test_text_lost_by_images_alone_is_won_back_by_realignment_and_less_is_lost_with_captions(tmp_path, results):
    profile, out = results
    notebook = execute(FOLDER / "04_realign_text_mcip.ipynb", tmp_path / "o.ipynb", {"profile": profile})
    rows = json.loads((out / "04_realign_text_mcip.json").read_text())["rows"]
    scores = {(row["model"], row["task"]): row["value"] for row in rows}

    def gain(model, task, over="mini"):
        return scores[model, task] - scores[over, task]

    images, texts = "image_to_image", "text_to_image"
    assert gain("arcmargin", images) > 20 and gain("arcmargin", texts) < -2
    assert gain("2sft", images, over="arcmargin") == 0 and gain("2sft", texts, over="arcmargin") > 1
    assert gain("base, realigned", images) == 0 and gain("base, realigned", texts) > 1, "new pairs alone"
    assert gain("MCIP", images) > 20 and gain("MCIP", texts, over="arcmargin") > 0
    assert gain("mcip_realigned", texts, over="MCIP") > 1
    for training, count in (("04_training", 1), ("04_realign", 3)):
        logs = [path.read_text().splitlines() for path in out.glob(f"{training}/*/log.jsonl")]
        assert len(logs) == count, "this run trained"
        assert all(sum("validation" in line for line in log) >= 2 for log in logs)
    shipped = {"2sft": gu.load_encoder("mini@" + str(gu.DATA / "mini_tuned" / "2sft.safetensors"))}
    shipped["mcip_realigned"] = gu.load_encoder("mini@" + str(gu.DATA / "mini_tuned" / "mcip_realigned.safetensors"))
    test = gu.load_images("mini", "test")
    for name, encoder in shipped.items():
        found = 100 * evaluation.evaluate(encoder, test)["image to image"].mean
        assert found == pytest.approx(scores[name, images], abs=0.5), "the recipe of what is shipped"
    assert gu.load_encoder(f"mini@{out}/04_mcip_realigned.safetensors").has_text
    assert "nan" not in text_of(notebook)


def test_anyones_folder_is_fine_tuned_with_margins_by_class_size_three_proxies_and_a_head(
    shapes, tmp_path, results, cache
):
    profile, out = results
    (shapes / "class 3" / "0.png").write_bytes(b"broken")
    (shapes / "class 4" / "1.png").unlink()
    for i in range(1, 6):
        (shapes / "class 5" / f"{i}.png").unlink()  # a class with one image
    recipe = {"batch_size": 16, "epochs": 4, "head": 16, "centers": 3, "margin": [0.1, 0.4], "start": "xavier"}
    run_here("03", {"profile": profile, "train_images": str(shapes), "recipe": recipe})
    encoder = gu.load_encoder(f"mini@{out}/03_arcmargin.safetensors")
    assert encoder.dim == 16 and not encoder.has_text
    rows = json.loads((out / "03_finetune_arcmargin.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"mini", "arcmargin"}
    about = json.loads((out / "03_arcmargin.json").read_text())
    assert about | recipe == about, "the checkpoint says how it was made"


@pytest.fixture
def captioned_shapes(shapes, tmp_path):
    """The shapes with captions for each class, and a bank in which one caption is far too long."""
    captions = {folder.name: ["a square", f"a {folder.name} square"] for folder in sorted(shapes.iterdir())}
    captions.pop("class 7")  # then its name is the query
    captions["class 8"].append(" ")
    (shapes / "captions.json").write_text(json.dumps(captions))
    lines = [text for texts in captions.values() for text in texts] + ["a red vase " * 30, "", "a face with black hair"]
    (tmp_path / "bank.txt").write_text("\n".join(lines), encoding="utf-8")
    return {"train_images": str(shapes), "pair_images": str(shapes), "bank": str(tmp_path / "bank.txt")}


@pytest.mark.parametrize(
    "kind", [pytest.param("txt, trained in two processes", marks=pytest.mark.slow), "csv, found by another encoder"]
)
def test_anyones_folder_and_captions_are_realigned(captioned_shapes, tmp_path, results, cache, kind):
    profile, out = results
    recipe = {
        "images": {"batch_size": 16, "epochs": 2},
        "search": {"threshold": -1.0},
        "realign": {"batch_size": 16, "chunk": 6, "epochs": 1},
    }
    mine = captioned_shapes | {"profile": profile, "recipe": recipe}
    if kind.startswith("txt"):
        mine |= {"processes": 2}
    else:
        lines = (tmp_path / "bank.txt").read_text().splitlines()
        (tmp_path / "bank.csv").write_text("caption\n" + "\n".join(line for line in lines if line))
        mine |= {"bank": str(tmp_path / "bank.csv")}
        recipe["search"]["finder"] = "random"
    run_here("04", mine)
    rows = json.loads((out / "04_realign_text_mcip.json").read_text())["rows"]
    models = {"mini", "arcmargin", "2sft", "base, realigned", "MCIP", "mcip_realigned"}
    assert {row["model"] for row in rows} == models


def two_checkpoints(folder, kind):
    """Two of one architecture, written as others write them; returns what a reader types."""
    files = []
    for seed in range(2):
        torch.manual_seed(seed + 1)
        if kind == "open_clip":
            model = open_clip.create_model("ViT-S-32-alt")
            torch.save(
                {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
                folder / f"{seed}.pt",
            )
            files.append(str(folder / f"{seed}.pt"))
        elif kind == "batch norm":
            model = timm.create_model("test_efficientnet", num_classes=0)
            files.append(str(folder / f"{seed}.safetensors"))
            checkpoints.save_weights(model, folder / f"{seed}.safetensors")
        else:
            encoder = gu.load_encoder(
                "mini@" + str(gu.DATA / "mini_tuned" / f"{('arcmargin', '2sft')[seed]}.safetensors")
            )
            encoder = heads.add_head(encoder, 16) if kind == "heads" else encoder
            files.append(str(checkpoints.save_checkpoint(encoder, folder / f"tuned_{seed}")))
    return json.dumps(files)


REFUSED = [  # what a notebook is asked for, and the sentence that says what to do instead
    ("03", {"test_images": "SHAPES"}, "60 of 60 images of shapes are also in shapes"),
    ("03", {"train_images": "ONE CLASS"}, "has 1 classes"),
    ("03", {"train_images": "THREE CLASSES"}, "has 3 classes; at least 4 are needed"),
    ("04", {"bank": "no/such.txt"}, "no captions at"),
    ("04", {"bank": "EMPTY"}, "holds no captions: put one on each line"),
    ("04", {"recipe": {"search": {"threshold": 0.99}}}, "no caption lies above 0.99; the nearest is at"),
    ("04", {"recipe": {"search": {"finder": "pixels"}}}, "pixels encodes images only"),
    ("04", {"recipe": {"search": {"treshold": 0.5}}}, "recipe.search knows no treshold; it has finder, top, threshold"),
    ("04", {"encoder": "pixels"}, "pixels has no weights"),
    ("04", {"pair_images": "FLAT"}, "flat has no captions for images outside test and validation: add a captions.json"),
    ("04", {"pair_images": "mini"}, "needs a bank and pair_images of its own"),
    ("04", {"bank": "mini"}, "needs a bank and pair_images of its own"),
    ("05", {"method": "gredy"}, "method must be one of best, uniform, greedy"),
    ("05", {"checkpoints": "one.safetensors"}, "two different checkpoints or more"),
    ("05", {"checkpoints": '["no.safetensors", "such.safetensors"]'}, "no checkpoint at"),
    ("05", {"checkpoints": '["a", "b"'}, "checkpoints must be a list such as"),
    ("05", {"checkpoints": "BROKEN FILE"}, "not a readable checkpoint"),
    ("05", {"checkpoints": "OURS", "encoder": "open_clip:ViT-S-32-alt"}, "Name what they were fine-tuned from"),
    ("05", {"checkpoints": "START TOO"}, r"holds the same weights as mini: leave it out"),
    ("05", {"checkpoints": "OURS", "test_images": "SHAPES"}, "60 of 60 images of shapes are also in shapes"),
    ("05", {"checkpoints": "OTHERS"}, "do not fit its architecture.*Name what they were fine-tuned from in .* encoder"),
    ("05", {"checkpoints": "MIXED"}, r"0.safetensors do not fit its architecture"),
    ("05", {"checkpoints": "OURS", "train_images": "FLAT"}, "labels"),
    ("05", {"encoder": "pixels"}, "pixels has no weights"),
    ("06", {"encoders": "mini, pixels"}, "pixels encodes images only"),
    ("06", {"encoders": "mini, mini"}, "are called mini"),
    ("06", {"encoders": ""}, "encoders names nothing"),
    ("06", {"reference_images": 0}, "reference_images must be 1 or more"),
    ("06", {"train_images": "FLAT"}, "neither captions nor classes"),
    ("06", {"train_images": "THREE CLASSES"}, "has 3 classes; five or more"),
    ("06", {"test_images": "SHAPES"}, "reference images are test images too, .*a bias that has seen the test"),
]


@pytest.mark.parametrize(("notebook", "change", "message"), REFUSED)
def test_what_cannot_work_is_refused_with_a_remedy(
    request, shapes, tmp_path, results, cache, notebook, change, message
):
    for path in sorted(shapes.rglob("*.png")):
        for name, classes in (("flat", 3), ("one class", 1), ("three classes", 3)):
            if int(path.parent.name[-1]) < classes:
                target = (
                    tmp_path / name / ("" if name == "flat" else path.parent.name) / f"{path.parent.name} {path.name}"
                )
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    shutil.copytree(shapes, tmp_path / "broken image")
    (tmp_path / "broken image" / "class 3" / "0.png").write_bytes(b"broken")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    places = {
        name.upper(): str(tmp_path / name) for name in ("flat", "one class", "three classes", "broken image", "shapes")
    }
    places["EMPTY"] = str(tmp_path / "empty.txt")
    if "checkpoints" in change:
        places["OURS"], places["OTHERS"] = (two_checkpoints(tmp_path, kind) for kind in ("this course's", "batch norm"))
        ours, others = json.loads(places["OURS"]), json.loads(places["OTHERS"])
        places["MIXED"] = json.dumps([ours[0], others[0]])
        places["START TOO"] = json.dumps([ours[0], str(gu.DATA / "mini_clip" / "open_clip_model.safetensors")])
        places["BROKEN FILE"] = json.dumps([ours[0], str(tmp_path / "broken.safetensors")])
    mine = {"profile": results[0], "train_images": str(shapes)}
    if notebook == "04":
        mine |= request.getfixturevalue("captioned_shapes")
        quick = {"images": {"batch_size": 16, "epochs": 0.5}, "realign": {"batch_size": 16, "epochs": 0.5}}
        change = change | {"recipe": quick | change.get("recipe", {})}
    mine |= {"05": {"recipe": {"batch_size": 16}}, "06": {"encoders": "mini"}}.get(notebook, {})
    mine |= {key: places.get(str(value), value) for key, value in change.items()}
    with pytest.raises((ValueError, OSError), match=message):
        run_here(notebook, mine)


@pytest.mark.slow
@pytest.mark.notebook
def test_averaging_equals_beats_the_best_of_them_and_averaging_nothing_is_found_out(tmp_path, results):
    profile, out = results
    notebook = execute(FOLDER / "05_average_soups.ipynb", tmp_path / "o.ipynb", {"profile": profile})
    rows = json.loads((out / "05_average_soups.json").read_text())["rows"]
    scores = {(row["model"], row["task"], row["metric"]): row["value"] for row in rows}
    images, texts = ("image_to_image", "mAP"), ("text_to_image", "R@5")
    singles = [scores[f"ingredient_{i}", *images] for i in range(4)]
    assert min(singles) > scores["base", *images] + 10, "each ingredient is fine-tuned"
    assert scores["soup:uniform", *images] > max(singles) and scores["soup:greedy", *images] > np.mean(singles)
    assert scores["50% soup", *texts] > scores["uniform soup", *texts], "it goes back towards the base"
    small = {row["model"]: row["value"] for row in rows if row["metric"] == "mP@5"}
    assert small["soup, PCA of images"] > small["base, all numbers"]
    logs = [path.read_text() for path in out.glob("05_training/*/log.jsonl")]
    assert len(logs) == 4 and all("validation" in log for log in logs), "this run trained"
    soup = checkpoints.load_checkpoint(out / "05_soup.safetensors")
    gu.load_encoder("mini").model.load_state_dict(soup, strict=True)
    assert "nan" not in text_of(notebook)


@pytest.mark.parametrize(
    ("kind", "encoder", "method"),
    [
        ("this course's", None, "greedy"),
        ("this course's", None, "lines"),
        ("heads", None, "uniform"),
        pytest.param("open_clip", "open_clip:ViT-S-32-alt/random", "best", marks=pytest.mark.slow),  # two minutes
        pytest.param("batch norm", "timm:test_efficientnet@START", "greedy", marks=pytest.mark.slow),
        ("batch norm", "timm:test_efficientnet@START", "model_stock"),
    ],
)
@pytest.mark.filterwarnings("ignore:these models have batch norm")
def test_a_soup_of_anyones_checkpoints_is_a_file_that_their_library_loads(
    shapes, tmp_path, results, cache, kind, encoder, method
):
    profile, out = results
    (shapes / "class 3" / "0.png").write_bytes(b"broken")
    mine = {"profile": profile, "method": method, "train_images": str(shapes)}
    mine |= {"checkpoints": two_checkpoints(tmp_path, kind)}
    if encoder and "@" in encoder:
        torch.manual_seed(0)
        checkpoints.save_weights(timm.create_model("test_efficientnet", num_classes=0), tmp_path / "start.safetensors")
        encoder = encoder.replace("START", str(tmp_path / "start.safetensors"))
    run_here("05", mine | ({"encoder": encoder} if encoder else {}))
    written = out / "05_soup.safetensors"
    about = json.loads(written.with_suffix(".json").read_text())
    assert about["method"] == method or method == "best" and 1 <= len(about["ingredients"]) <= 2
    if method == "lines":
        base, tuned = (
            gu.load_encoder(spec).model.state_dict() for spec in ("mini", f"mini@{tmp_path}/tuned_0.safetensors")
        )
        soup, name = load_file(written), "visual.transformer.resblocks.0.mlp.c_fc.weight"
        kept = (soup[name] - base[name]).norm() / (tuned[name] - base[name]).norm()
        assert kept < 0.8, "low layers went back towards the start"
    if kind == "open_clip":
        open_clip.create_model("ViT-S-32-alt", pretrained=str(written))
    elif kind == "batch norm":
        timm.create_model("test_efficientnet", num_classes=0).load_state_dict(load_file(written), strict=True)
    else:
        assert gu.load_encoder(f"mini@{written}").dim == (16 if kind == "heads" else 128)
    rows = json.loads((out / "05_average_soups.json").read_text())["rows"]
    assert {"soup:uniform", "soup:greedy", "soup:model_stock"} <= {row["model"] for row in rows}


def test_anyones_folder_is_cooked(shapes, tmp_path, results, cache):
    profile, out = results
    (shapes / "class 3" / "0.png").write_bytes(b"broken")
    mine = {"profile": profile, "train_images": str(shapes), "recipe": {"batch_size": 16, "epochs": 2}}
    run_here("05", mine | {"method": "model_stock"})
    rows = json.loads((out / "05_average_soups.json").read_text())["rows"]
    assert {"base", "ingredient_3", "soup:model_stock", "soup:lines"} <= {row["model"] for row in rows}
    assert json.loads((out / "05_soup.json").read_text())["method"] == "model_stock"


@pytest.mark.slow
@pytest.mark.notebook
def test_a_bias_takes_hubs_back_and_helps_where_there_are_hubs(tmp_path, results):
    profile, out = results
    notebook = execute(FOLDER / "06_normalize_neighbors_nnn.ipynb", tmp_path / "o.ipynb", {"profile": profile})
    rows = json.loads((out / "06_normalize_neighbors_nnn.json").read_text())["rows"]
    scores = {(row["model"], row["task"], row["metric"]): row for row in rows}
    models = ("mini", "mini@arcmargin", "mini@mcip_realigned")
    for model, task in itertools.product(models, ("text_to_image", "image_to_text")):
        skewness = [scores[name, task, "hubness skewness"]["value"] for name in (model, f"{model}+nnn")]
        rises = (model, task) == ("mini@arcmargin", "text_to_image")  # its alpha of 1 makes other pictures popular
        assert (skewness[1] > skewness[0]) == rises, (model, task)

    def gain(model, task, metric="mAP"):
        return scores[f"{model}+nnn", task, metric]["value"] - scores[model, task, metric]["value"]

    assert all(gain(model, "text_to_image") > 1 and gain(model, "image_to_text") > 0.5 for model in models)
    assert np.load(out / "06_search" / "bias.npy").shape == (2400,)
    assert "nan" not in text_of(notebook)


@pytest.mark.parametrize("kind", ["one folder, cut", "two folders", "a table without classes"])
def test_anyones_captioned_images_are_corrected(shapes, tmp_path, results, cache, kind):
    profile, out = results
    captions = {folder.name: ["a square", f"a {folder.name} square"] for folder in sorted(shapes.iterdir())}
    captions.pop("class 7")  # then its name is the caption
    (shapes / "captions.json").write_text(json.dumps(captions))
    mine = {"profile": profile, "train_images": str(shapes), "encoders": '["random", "mini"]'}
    (shapes / "class 3" / "0.png").write_bytes(b"broken")  # is left out, with a warning
    if kind == "two folders":
        for name in ("class 1", "class 2"):
            shutil.move(shapes / name, tmp_path / "others" / name)
        mine |= {"test_images": str(tmp_path / "others")}
    if kind == "a table without classes":
        lines = [f"{path}|{path.parent.name} number {path.stem}" for path in sorted(shapes.rglob("*.png"))]
        table = "path,caption\n" + "\n".join(line.replace("|", ",") for line in lines)
        (tmp_path / "captioned.csv").write_text(table)
        mine |= {"train_images": str(tmp_path / "captioned.csv")}
    run_here("06", mine)
    rows = json.loads((out / "06_normalize_neighbors_nnn.json").read_text())["rows"]
    assert {"random", "random+nnn", "mini", "mini+nnn"} == {row["model"] for row in rows}
    assert len(np.load(out / "06_search" / "bias.npy")) == 12


@pytest.mark.notebook
def test_a_typo_in_a_parameter_fails_instead_of_running_the_defaults(tmp_path):
    with pytest.raises(AssertionError, match="has no parameters"):
        execute(PATHS[0], tmp_path / "o.ipynb", {"profle": "mini"}, gu.HERE)


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "FAILED at cell 2: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "FAILED at cell [23]: (it did not run|SystemExit)"),
        ("import os; os._exit(1)", "FAILED at cell 2: DeadKernelError"),
    ],
)
def test_make_course_stops_at_a_failing_notebook_and_names_it(tmp_path, cell, message):
    good = write_notebook(tmp_path / "01_good.ipynb", 'profile: str = "mini"  # p')
    bad = write_notebook(tmp_path / "02_bad.ipynb", 'profile: str = "mini"  # p', cell, "3")
    after = write_notebook(tmp_path / "03_after.ipynb", 'profile: str = "mini"  # p')
    command = [sys.executable, "-m", "gpnns.tools.run", "--runs", str(tmp_path / "runs"), good, bad, after]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "[1/3] 01_good ... done" in result.stdout and "[2/3] 02_bad ... failed" in result.stdout
    assert re.search(message, result.stdout), result.stdout
    assert re.search(r"03_after +not run", result.stdout)


def test_a_blank_page_among_the_images_is_left_out_for_all_encoders(shapes, results, cache):
    """`pixels`, the first encoder of the list, has no vector for it; mini would have one."""
    Image.new("RGB", (40, 40), "white").save(shapes / "class 4" / "2.png")
    with pytest.warns(UserWarning, match="1 of 60 images get a vector from pixels that is zero.* left out: .*2.png"):
        names = run_here("02", {"profile": results[0], "images": str(shapes), "encoders": ["mini", "pixels", "random"]})
    assert {len(vectors) for vectors in names.embedded.values()} == {59} == {len(names.photos)}
    alone = gu.embed_images(gu.load_encoder("mini"), names.photos, cache=False)[0]
    np.testing.assert_allclose(names.embedded["mini"], alone, atol=1e-5)
    assert np.isfinite([row["value"] for row in names.rows]).all()


def test_one_image_for_each_class_is_refused_and_gives_no_score_of_nan(shapes, results, cache):
    for path in shapes.rglob("[1-9].png"):
        path.unlink()
    with pytest.raises(ValueError, match="no query has anything to find: a class needs two images or more"):
        run_here("02", {"profile": results[0], "images": str(shapes)})


@pytest.mark.parametrize("count", [2, 3])
def test_the_first_notebook_searches_among_two_or_three_images(shapes, results, cache, count):
    for path in sorted(shapes.rglob("*.png"))[count:]:
        path.unlink()
    names = run_here("01", {"profile": results[0], "images": str(shapes)})
    assert names.k == count - 1 and len(names.embeddings) == count


def test_every_schematic_comes_from_the_script_and_is_shown_in_its_notebook(tmp_path):
    import runpy

    script = runpy.run_path(str(gu.HERE / "notebooks" / "gpnns" / "tools" / "draw_schematics.py"))
    for name in script["SCHEMATICS"]:
        script["save_schematic"](name, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as drawn, Image.open(gu.show_schematic(name).filename) as shipped:
            assert drawn.size == shipped.size
            difference = np.abs(np.asarray(drawn.convert("L"), float) - np.asarray(shipped.convert("L"), float))
            assert difference.mean() < 2, "draw it again: python -m gpnns.tools.draw_schematics"
        assert f'gu.show_schematic("{name}")' in (gu.HERE / "notebooks" / f"{name}.ipynb").read_text(
            encoding="utf-8"
        ).replace('\\"', '"')
