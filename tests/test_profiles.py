"""Profiles: one parameter that sets the others, the line-ups they name, and whole runs of `gpu` with small models."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import open_clip
import papermill as pm
import pytest
import test_datasets as in_small
import timm
import yaml
from conftest import load_module
from PIL import Image
from scipy.io import savemat

import gpnns_utils as gu
from gpnns import paper_tables, parameters
from gpnns.encoders import checkpoints, licences
from gpnns.images import datasets, text_files

NOTEBOOKS = sorted((gu.HERE / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROFILES = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((gu.HERE / "notebooks" / "profiles").glob("*.yml"))
}
DEFAULTS = PROFILES["mini"]["notebooks"]
# As the parameters cells have them: a mapping is empty there, and its keys come from the profile.
TYPED = {
    notebook: {name: {} if isinstance(value, dict) else value for name, value in values.items()}
    for notebook, values in DEFAULTS.items()
}


def test_the_profiles_are_there_and_say_their_names():
    assert {"mini", "gpu", "paper"} <= PROFILES.keys()
    assert [values["profile"] for values in PROFILES.values()] == list(PROFILES)
    everything = {path.stem for path in NOTEBOOKS}
    for name, without in (
        ("mini", set()),
        ("gpu", set()),
        ("paper", {"08_build_your_search", "09_scale_out"}),
    ):  # they are in no paper
        assert PROFILES[name]["notebooks"].keys() == everything - without


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_mini_holds_the_defaults_of_each_notebook(path):
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    defaults = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert defaults.pop("profile") == "mini" and defaults == TYPED[path.stem]
    applied = f'globals().update(take_parameters("{path.stem}", globals()))'
    assert [cell for cell in cells if applied in cell.source.splitlines()], "the notebook reads its profile"


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "mini"])
def test_a_profile_sets_only_what_its_notebooks_know_and_only_what_differs(name):
    for notebook, values in PROFILES[name]["notebooks"].items():
        parts = [(values, DEFAULTS[notebook])]
        for listed, known in parts:  # which grows: a recipe holds mappings
            assert listed.keys() <= known.keys()
            assert [key for key in listed if listed[key] == known[key]] == []
            for key, value in listed.items():
                assert isinstance(value, type(known[key])) or (key == "margin" and len(value) == 2), (notebook, key)
                if isinstance(value, dict):
                    parts.append((value, known[key]))


def taken(notebook, profile="mini", **given):
    return parameters.take_parameters(notebook, TYPED[notebook] | {"profile": profile} | given)


def test_a_profile_takes_the_place_of_defaults_and_of_nothing_else(capsys):
    notebook = "06_normalize_neighbors_nnn"
    expected = DEFAULTS[notebook] | PROFILES["gpu"]["notebooks"][notebook] | {"profile": "gpu"}
    assert taken(notebook, "gpu") == expected
    assert "profile gpu sets " in capsys.readouterr().out
    mine = {"train_images": "photos", "reference_images": 5}
    assert taken(notebook, "gpu", **mine) == expected | mine
    assert taken(notebook) == DEFAULTS[notebook] | {"profile": "mini"}


def test_a_recipe_of_several_parts_keeps_in_each_what_is_not_given(capsys):
    notebook = "04_realign_text_mcip"
    mini, gpu = DEFAULTS[notebook]["recipe"], PROFILES["gpu"]["notebooks"][notebook]["recipe"]
    assert taken(notebook)["recipe"] == mini
    found = taken(notebook, "gpu", recipe={"search": {"top": 5}, "images": {"rate": "2e-5"}})["recipe"]
    assert found["search"] == mini["search"] | gpu["search"] | {"top": 5}
    assert found["images"] == mini["images"] | gpu["images"] | {"rate": 2e-5}
    assert found["realign"] == mini["realign"] | gpu["realign"]
    said = capsys.readouterr().out
    assert "recipe.search.threshold = 0.27" in said and "images.rate" not in said, "what was given is not the profile's"


def test_a_recipe_keeps_the_settings_of_the_profile_that_are_not_given(capsys):
    notebook = "03_finetune_arcmargin"
    mini, gpu = DEFAULTS[notebook]["recipe"], PROFILES["gpu"]["notebooks"][notebook]["recipe"]
    assert taken(notebook)["recipe"] == mini and "recipe" not in capsys.readouterr().out
    assert taken(notebook, "gpu")["recipe"] == mini | gpu
    assert "recipe.jitter = 0.4" in capsys.readouterr().out
    assert taken(notebook, "gpu", recipe={"margin": 0.2})["recipe"] == mini | gpu | {"margin": 0.2}
    mine = {"margin": 0.2, "head": 16}
    for given in (mine, "{margin: 0.2, head: 16}", '{"margin": 0.2, "head": 16}', {"margin": "0.2", "head": 16.0}):
        assert taken(notebook, recipe=given)["recipe"] == mini | mine, "as a mapping, as YAML, as JSON"
        assert taken(notebook, "a name of mine", recipe=given)["recipe"] == mini | mine
    assert taken(notebook, recipe={"margin": [0.05, "0.5"]})["recipe"]["margin"] == [0.05, 0.5]
    rates = [taken(notebook, recipe={"rate": rate})["recipe"]["rate"] for rate in ("1e-4", 1)]  # YAML wants 1.0e-4
    assert rates == [1e-4, 1.0] and isinstance(rates[1], float)


def test_the_papers_recipes_are_complete():
    """What the papers and their code say: GP-NNS (section 4 and its training script), and GUIE's fourth place."""
    notebook = "03_finetune_arcmargin"
    paper = taken(notebook, "paper")["recipe"]
    stated = {"epochs": 3.0, "batch_size": 256, "rate": 1e-6, "proxy_rate": 1e-4, "warmup": 0.0, "lr_min": 1e-7}
    stated |= {"scale": 30.0, "margin": 0.1, "centers": 1, "start": "xavier", "weight_decay": 0.01, "protocol": "paper"}
    assert paper | stated == paper
    guie = taken(notebook, "paper_guie")
    stated = {"margin": [0.05, 0.5], "centers": 3, "scale": 30.0, "head": 512, "weight_decay": 1e-3, "epochs": 1.0}
    stated |= {"proxy_decay": 1e-5, "proxy_rate": 3e-4, "views": "autoaugment", "warmup": 1000.0, "flip": 0.0}
    assert guie["recipe"] | stated == guie["recipe"] and guie["recipe"]["layer_decay"] < 1
    mcip = taken("04_realign_text_mcip", "paper")["recipe"]
    assert (
        mcip["realign"] | {"beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "shared_captions": "wrong"}
        == mcip["realign"]
    )
    assert mcip["captions"] == {"caption_weight": 0.25, "caption_scale": 30.0, "shared_captions": "wrong"}
    assert mcip["search"]["threshold"] == 0.27 and mcip["search"]["top"] == 20
    assert guie["recipe"]["batch_size"] * guie["recipe"]["accumulate"] == 32 and "ViT-H-14" in guie["encoder"]


def test_a_name_without_a_file_only_names_results_and_says_so(capsys):
    assert taken("01_search_images", "gup") == DEFAULTS["01_search_images"] | {"profile": "gup"}
    said = capsys.readouterr().out
    assert "a name for results only; with parameters of their own:" in said and "gpu, " in said


@pytest.mark.parametrize(
    ("notebook", "name", "given", "value"),
    [  # what papermill and YAML make of what was typed, and what was meant
        ("01_search_images", "images", 2024, "2024"),
        ("01_search_images", "images", 2.5, "2.5"),
        ("01_search_images", "images", True, "True"),
        ("01_search_images", "profile", 2024, "2024"),
        ("01_search_images", "k", 7.0, 7),
        ("01_search_images", "k", "7", 7),
        ("02_benchmark_encoders", "encoders", "pixels", ["pixels"]),
        ("02_benchmark_encoders", "encoders", " pixels, mini ,", ["pixels", "mini"]),
        ("02_benchmark_encoders", "encoders", '["pixels", "mini"]', ["pixels", "mini"]),
        ("02_benchmark_encoders", "encoders", "[pixels, mini]", ["pixels", "mini"]),
        ("02_benchmark_encoders", "encoders", "['pixels']", ["pixels"]),
        ("02_benchmark_encoders", "encoders", ("pixels", "mini"), ["pixels", "mini"]),
        ("05_average_soups", "checkpoints", ["a.pt", 7], ["a.pt", "7"]),
        ("05_average_soups", "checkpoints", "", []),
        ("05_average_soups", "checkpoints", "[]", []),
        ("07_reproduce_papers", "protocol", "", ""),
    ],
)
def test_a_parameter_is_taken_as_what_its_default_is(notebook, name, given, value):
    found = taken(notebook, **{name: given})
    assert found.pop(name) == value and type(found.get(name, value)) is type(value)
    assert found == {k: v for k, v in (DEFAULTS[notebook] | {"profile": "mini"}).items() if k != name}


@pytest.mark.parametrize(
    ("notebook", "name", "given", "message"),
    [
        ("01_search_images", "images", None, "images must be text, not None. Its default is 'mini'"),
        ("01_search_images", "images", ["a"], "images must be text"),
        ("01_search_images", "k", "five", "k must be a whole number, not 'five'. Its default is 5"),
        ("01_search_images", "k", 2.5, "k must be a whole number"),
        ("01_search_images", "k", 0, "k must be 1 or more, not 0"),
        ("01_search_images", "k", True, "k must be a whole number, not True"),
        ("01_search_images", "seed", -1, "seed must be from 0 to 4294967295, not -1"),
        ("02_benchmark_encoders", "encoders", "", "encoders names nothing"),
        ("02_benchmark_encoders", "encoders", None, "encoders must be text, not None"),
        ("05_average_soups", "checkpoints", '["a", "b"', 'checkpoints must be a list such as \\["one", "two"\\]'),
        ("05_average_soups", "method", "gredy", "method must be one of best, uniform, greedy, .*, not 'gredy'"),
        ("01_search_images", "k", 0, "k must be 1 or more"),
        ("05_average_soups", "recipe", {"rate": float("nan")}, "recipe.rate must be a number, not nan"),
        ("05_average_soups", "recipe", {"head": 64}, "recipe knows no head"),
        ("03_finetune_arcmargin", "recipe", "fast", "recipe must be a mapping such as {margin: 0.1}, not 'fast'"),
        ("03_finetune_arcmargin", "recipe", {"marginn": 0.1}, "recipe knows no marginn; it has epochs, batch_size, "),
        ("03_finetune_arcmargin", "recipe", {"rate": "fast"}, "recipe.rate must be a number, not 'fast'"),
        ("03_finetune_arcmargin", "recipe", {"rate": [0.1, 0.2]}, "recipe.rate must be a number"),
        ("03_finetune_arcmargin", "recipe", {"margin": [0.1]}, "recipe.margin must be a number"),
        ("03_finetune_arcmargin", "recipe", {"flip": 2}, "recipe.flip is a share from 0 to 1"),
        ("03_finetune_arcmargin", "recipe", {"balanced": "maybe"}, "recipe.balanced must be True or False"),
        ("03_finetune_arcmargin", "recipe", {"views": "cropped"}, "recipe.views must be one of crop, autoaugment"),
        (
            "04_realign_text_mcip",
            "recipe",
            {"images": {"rate": "fast"}},
            "recipe.images.rate must be a number, not 'fast'",
        ),
        (
            "04_realign_text_mcip",
            "recipe",
            {"images": {"start": "zero"}},
            "recipe.images.start must be one of means, xavier",
        ),
        (
            "04_realign_text_mcip",
            "recipe",
            {"captions": {"shared_captions": "x"}},
            "shared_captions must be one of right, wrong",
        ),
        ("04_realign_text_mcip", "recipe", {"search": {"top": 0}}, "recipe.search.top must be 1 or more"),
        ("04_realign_text_mcip", "recipe", {"realign": 3}, "recipe.realign must be a mapping such as"),
        ("07_reproduce_papers", "table", "gpns", "table must be one of mini, flowers, gpnns, mcip"),
    ],
)
def test_a_parameter_that_cannot_be_meant_is_named_with_what_it_may_be(notebook, name, given, message):
    with pytest.raises(ValueError, match=message):
        taken(notebook, **{name: given})


@pytest.mark.notebook
def test_papermill_s_command_line_makes_numbers_of_names_and_the_notebook_text_again(
    folder, tmp_path, cache, monkeypatch
):
    """A folder 2024 and a profile 2024, through papermill itself."""
    folder.rename(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    notebook, out = NOTEBOOKS[1], tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar", "--log-level", "ERROR"]
    command += ["-p", "images", "2024", "-p", "profile", "2024", "-p", "encoders", "pixels"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
        assert (gu.HERE / "runs" / "2024" / "02_benchmark_encoders.json").exists()
    finally:
        shutil.rmtree(gu.HERE / "runs" / "2024", ignore_errors=True)


def test_run_py_runs_the_notebooks_that_a_profile_has_a_part_for():
    runner = load_module(gu.COURSE / "gpnns" / "tools" / "run.py")
    assert runner.list_notebooks("gpu") == runner.list_notebooks("a name without a file") == NOTEBOOKS
    assert [path.stem for path in runner.list_notebooks("paper_mcip")] == ["07_reproduce_papers"]


def test_a_misspelt_parameter_in_a_profile_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    for name, values in (("mini", {"k": 5}), ("wide", {"kk": 9})):
        text = yaml.safe_dump({"profile": name, "notebooks": {"01_one": values}})
        (tmp_path / "notebooks" / "profiles" / f"{name}.yml").write_text(text)
    monkeypatch.setattr(gu, "COURSE", tmp_path / "notebooks")
    with pytest.raises(ValueError, match="profiles/wide.yml sets kk, which 01_one does not know"):
        parameters.take_parameters("01_one", {"profile": "wide", "k": 5})


# --- line-ups ---


def encoders_of(values):
    """The encoders that a notebook's part of a profile names, in whatever form."""
    listed = values.get("encoders", [])
    listed = listed if isinstance(listed, list) else [name.strip() for name in listed.split(",")]
    return listed + [values[key] for key in ("encoder", "captioner") if key in values]


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "mini"])
def test_every_encoder_of_a_profile_exists_in_the_installed_libraries(name):
    for values in PROFILES[name]["notebooks"].values():
        for encoder in encoders_of(values):
            kind, _, rest = encoder.partition(":")
            there = open_clip.list_pretrained() if kind == "open_clip" else timm.list_pretrained()
            shipped = encoder in ("pixels", "efficientnet_lite0")
            assert shipped or (tuple(rest.split("/")) if kind == "open_clip" else rest) in there, encoder
            assert licences.find_licence(encoder)


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "mini"])
def test_every_data_set_of_a_profile_has_an_entry_and_the_split_it_asks_for(name):
    table = datasets.TABLE
    for notebook, values in PROFILES[name]["notebooks"].items():
        for key, usual in (("images", "test"), ("train_images", "train"), ("test_images", "test"), ("bank", "train")):
            for part in values[key].split(" + ") if key in values else []:
                source, _, split = part.partition(":")
                assert (split or usual) in table[source]["splits"], (notebook, part)
                if name in ("gpu", "laptop"):
                    assert all("url" in file for file in table[source]["files"]), f"{part} needs a login"


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_todays_encoders_are_beside_those_of_the_papers_in_notebook_02(name):
    names = PROFILES[name]["notebooks"]["02_benchmark_encoders"]["encoders"]
    families = ["openai", "laion2b", "datacomp", "SigLIP", "SigLIP2", "PE-Core", "MobileCLIP2"]
    families += ["dinov2", "dinov3", "in21k"] + ["metaclip2"] * (name == "paper")  # too large for one small GPU
    assert [family for family in families if not any(family in name for name in names)] == []


def test_the_tables_of_the_papers_are_measured_with_the_papers_encoders():
    for profile in ("gpu", "paper", "paper_mcip"):
        values = PROFILES[profile]["notebooks"]["07_reproduce_papers"]
        assert set(values["encoders"]) <= set(paper_tables.find_published_rows(values["table"])), profile


# --- the whole profile `gpu`, with data in small and random models in place of the downloads ---

SMALL_MODELS = '''
"""In place of downloads: every architecture in small, with random weights that come from a file all the same."""

import os
from pathlib import Path

import open_clip
import timm
import torch

WEIGHTS = Path(os.environ["SMALL_WEIGHTS"])
CONFIGS = open_clip.factory._MODEL_CONFIGS
for name in CONFIGS:
    CONFIGS[name] = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }


def weights_of(cfg, **_):
    """What open_clip asks the network for: a file of weights of the architecture that is being built."""
    path = WEIGHTS / f"{BUILDING[-1]}.pt"
    if not path.exists():
        torch.manual_seed(len(path.name))
        torch.save(open_clip.create_model(BUILDING[-1]).state_dict(), path)
    return str(path)


BUILDING, create = [], open_clip.factory.create_model_and_transforms


def create_small(architecture, **settings):
    BUILDING.append(architecture)
    return create(architecture, **settings | {"force_quick_gelu": False})


tokenizer_of = open_clip.get_tokenizer  # many tokenizers are downloads too; CLIP's own is not
open_clip.get_tokenizer = lambda name, **given: tokenizer_of("ViT-B-16" if name in CONFIGS else name, **given)
open_clip.create_model_and_transforms = create_small
open_clip.factory.download_pretrained = weights_of

make = timm.create_model


def make_small(name, pretrained=False, **settings):
    small = {"embed_dim": 48, "depth": 2, "num_heads": 2} if name.startswith("vit") else {}  # else it needs no download
    return make(name, pretrained=False, **settings, **small)


timm.create_model = make_small
'''


def drawn_photos(count, size=(90, 70)):
    """Pictures with something in them: the mini world's test images, as photographs of another shape."""
    world = gu.load_images("mini", "test")
    return [world[row].resize(size) for row in range(0, 8 * count, 8)]


def course_in_small(folder):
    """A copy of the course whose data sets are small, and whose encoders are small and random."""
    shutil.copytree(gu.HERE / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("solutions", ".*"))
    shutil.copytree(gu.HERE / "data", folder / "data", ignore=shutil.ignore_patterns("__pycache__"))
    code = (gu.HERE / "gpnns_utils.py").read_text(encoding="utf-8")
    (folder / "gpnns_utils.py").write_text(code + "\nimport small_models  # noqa\n", encoding="utf-8")
    (folder / "small_models.py").write_text(SMALL_MODELS)
    (folder / "weights").mkdir()
    sets, photos = folder / "datasets", iter(drawn_photos(280))
    counts = {name: in_small.BUILDERS[name](sets / name) for name in ("instre", "roxford", "rparis", "sop")}
    counts |= {name: in_small.BUILDERS[name](sets / name) for name in ("flowers", "aircraft")}

    def save(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        next(photos).save(path, "jpeg")

    for number in range(12):
        for i in range(3):
            save(sets / "gpr1200" / "images" / f"{number}_{i}.jpg")
    counts["gpr1200"] = {"test": [36, 12]}
    top, listed = sets / "cub" / "CUB_200_2011", []
    classes = {c: f"{c:03d}.Bird_{c}" for c in [*range(1, 13), *range(101, 107)]}
    for c, name in classes.items():
        for i in range(6):
            listed.append((c, f"{name}/{i}.jpg"))
            save(top / "images" / listed[-1][1])
    in_small.write(top / "classes.txt", "".join(f"{c} {name}\n" for c, name in classes.items()))
    in_small.write(top / "images.txt", "".join(f"{i} {path}\n" for i, (_, path) in enumerate(listed, 1)))
    in_small.write(top / "image_class_labels.txt", "".join(f"{i} {c}\n" for i, (c, _) in enumerate(listed, 1)))
    counts["cub"] = {"train": [72, 12], "test": [36, 6]}
    shutil.rmtree(
        sets / "flowers" / "jpg"
    )  # more of them than the loader's own tests need: the profile laptop trains on these
    kinds = np.repeat(np.arange(1, 13), 4)
    for i in range(1, len(kinds) + 1):
        save(sets / "flowers" / "jpg" / f"image_{i:05d}.jpg")
    savemat(sets / "flowers" / "imagelabels.mat", {"labels": kinds[None]})
    number = np.arange(1, len(kinds) + 1)
    parts = {"trnid": number[number % 4 > 0], "valid": number[number % 8 == 0], "tstid": number[number % 8 == 4]}
    savemat(sets / "flowers" / "setid.mat", {name: rows[None] for name, rows in parts.items()})
    counts["flowers"] = {"train": [36, 12], "validation": [6, 6], "test": [6, 6]}
    images = []
    for i in range(36):
        sentences = [{"raw": f"a picture of bird {i} number {j}"} for j in range(5)]
        name, part = f"{i:012d}.jpg", "val" if i < 24 else "test"
        images.append({"filename": name, "filepath": "val2014", "split": part, "sentences": sentences})
        save(sets / "coco" / "val2014" / name)
    in_small.write(sets / "coco" / "caption_datasets" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    counts["coco"] = {"validation": [24], "test": [12]}
    table = (folder / "data" / "datasets.toml").read_text(encoding="utf-8")
    parts = table.split("\n[")
    for i, part in enumerate(parts):
        if (name := part.split("]")[0]) in counts:
            lines = [line for line in part.splitlines() if not line.startswith(("splits =", "unlisted ="))]
            splits = ", ".join(f"{split} = {numbers}" for split, numbers in counts[name].items())
            parts[i] = "\n".join([lines[0], f"splits = {{ {splits} }}", 'unlisted = "any"', *lines[1:], ""])
    (folder / "data" / "datasets.toml").write_text("\n[".join(parts), encoding="utf-8")
    return folder


# What the small data sets are too small for, and what would only repeat: the profile sets everything else.
SMALLER = {
    "03_finetune_arcmargin": {"recipe": {"batch_size": 16, "epochs": 1.0}},
    "04_realign_text_mcip": {
        "recipe": {
            "images": {"batch_size": 16, "epochs": 1.0},
            "search": {"threshold": -1.0},
            "realign": {"batch_size": 16, "epochs": 1.0, "chunk": 64},
        }
    },
    "05_average_soups": {"recipe": {"batch_size": 8, "epochs": 1.5}},
    "08_build_your_search": {"recipe": {"images": {"batch_size": 16, "epochs": 1.0}}},
}


@pytest.fixture
def small_course(tmp_path):
    """A course in small, and how papermill is called in it: papermill(notebook, parameters), which must succeed. Kaggle is
    imitated by its variable; there is no network, and none is asked for."""
    course = course_in_small(tmp_path / "course")
    shutil.copytree(
        gu.cache_folder() / "mini_world", tmp_path / "cache" / "mini_world"
    )  # notebook 07 tries tasks on it
    environment = os.environ | {
        "GPNNS_DATA": str(course / "datasets"),
        "GPNNS_CACHE": str(tmp_path / "cache"),
        "SMALL_WEIGHTS": str(course / "weights"),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }

    def papermill(notebook, *options):
        command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(tmp_path / "out.ipynb")]
        command += ["-k", "python3", "--cwd", str(course), "--no-progress-bar", *options]
        result = subprocess.run(command, env=environment, cwd=course, capture_output=True, text=True)
        assert result.returncode == 0, f"{notebook} {options}: {result.stderr[-3000:]}"
        return nbformat.read(tmp_path / "out.ipynb", as_version=4).cells

    return course, papermill


@pytest.mark.slow
@pytest.mark.notebook
def test_the_gpu_profile_runs_from_end_to_end_with_small_random_models(small_course):
    course, papermill = small_course
    for path in NOTEBOOKS:
        cells = papermill(path.stem, "-y", json.dumps({"profile": "gpu"} | SMALLER.get(path.stem, {})))
        text = "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))
        assert "profile gpu sets" in text and "| Kaggle" in text
        written = json.loads((course / "runs" / "gpu" / f"{path.stem}.json").read_text())
        models = {row["model"] for row in written["rows"]}
        assert written["profile"] == "gpu" and written["rows"] and not models & {"mini", "random", "pixels"}
        assert all(np.isfinite(row["value"]) for row in written["rows"])
    table = json.loads((course / "runs" / "gpu" / "07_reproduce_papers.json").read_text())
    columns = {row["split"] for row in table["rows"]}
    assert columns >= {"instre", "gpr1200", "roxford", "rparis", "cub", "sop", "flowers", "aircraft"}


@pytest.mark.slow
@pytest.mark.notebook
def test_the_laptop_profile_runs_from_end_to_end_with_stand_ins_for_what_it_downloads(small_course):
    course, papermill = small_course
    for notebook in PROFILES["laptop"]["notebooks"]:
        smaller = {"recipe": {"images": {"batch_size": 16}}} if notebook.startswith("08") else {}
        cells = papermill(notebook, "-y", json.dumps({"profile": "laptop"} | smaller))
        assert "profile laptop sets" in "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))
        written = json.loads((course / "runs" / "laptop" / f"{notebook}.json").read_text())
        assert written["rows"] and all(np.isfinite(row["value"]) for row in written["rows"])
    home = text_files.read_json(course / "runs" / "laptop" / "08_search" / "search.json")
    assert (
        len(home["names"]) == 36 and home["base"] in PROFILES["laptop"]["notebooks"]["08_build_your_search"]["encoders"]
    )


def test_the_laptop_profile_needs_few_photographs_and_small_downloads():
    sources = {
        values.get("images") or values.get("train_images") for values in PROFILES["laptop"]["notebooks"].values()
    }
    columns = {source for column in paper_tables.load_columns("flowers") for source in column[1:3] if source}
    assert (sources - {None}) | columns == {"flowers:train"}
    assert datasets.TABLE["flowers"]["splits"]["train"][0] <= 1200


PAGES = "".join((gu.HERE / name).read_text(encoding="utf-8") for name in ("README.md", "notebooks/README.md"))
COMMANDS = re.findall(r"papermill notebooks/(\w+)\.ipynb runs/\w+\.ipynb +(-p profile .*)", PAGES.replace("\\\n", " "))


@pytest.mark.slow
@pytest.mark.notebook
def test_what_the_readme_says_about_fine_tuning_runs_in_small_as_it_is_written(small_course, tmp_path):
    """Own images with the profile `photos`, its checkpoint in notebook 02, the profiles of the papers."""
    course, papermill = small_course
    first, _ = next((i, line) for i, line in enumerate(COMMANDS) if line[0] == "03_finetune_arcmargin")
    listed = [*COMMANDS[first : first + 2], *(line for line in COMMANDS[first + 2 :] if line[0].startswith("03"))]
    assert ["photos" in listed[0][1], "@runs/photos" in listed[1][1], "paper" in listed[2][1]] == [True] * 3
    listed.append(("03_finetune_arcmargin", "-p profile paper_guie -p train_images path/to/labelled/folder"))
    birds = course / "datasets" / "cub" / "CUB_200_2011" / "images"
    smaller = {"batch_size": 8, "epochs": 1.0, "warmup": 0.5}  # the small folder has 18 classes of 6 images
    for notebook, options in listed:
        options = re.sub(r"path/to/\w+/folder", str(birds), options)
        more = ["-y", json.dumps({"recipe": smaller})] if notebook.startswith("03") else []
        papermill(notebook, *shlex.split(options), *more)
    for profile in ("photos", "paper", "paper_guie"):
        about = json.loads((course / "runs" / profile / "03_arcmargin.json").read_text())
        recipe = taken("03_finetune_arcmargin", profile)["recipe"] | smaller
        assert (about.pop("head") or 0) == recipe.pop("head")
        assert about | recipe == about, "the profile's recipe"


@pytest.mark.slow
@pytest.mark.notebook
def test_what_the_readme_says_about_keeping_text_runs_in_small_as_it_is_written(small_course, tmp_path):
    """Own images, bank and captions after notebook 03 under the same profile; the paper's profile, which trains both."""
    course, papermill = small_course
    shutil.copytree(course / "datasets" / "cub" / "CUB_200_2011" / "images", mine := tmp_path / "mine")
    names = [folder.name for folder in sorted(mine.iterdir())]
    (tmp_path / "captions.txt").write_text("\n".join(f"a picture of the bird {name}" for name in names))
    (mine / "captions.json").write_text(json.dumps({name: [f"the bird {name}"] for name in names}))
    own, paper = (options for notebook, options in COMMANDS if notebook == "04_realign_text_mcip")
    own = own.replace("path/to/captions.txt", str(tmp_path / "captions.txt"))
    small = SMALLER["04_realign_text_mcip"]
    first = shlex.split(re.sub(r"path/to/\w+/folder", str(mine), dict(COMMANDS[::-1])["03_finetune_arcmargin"]))
    papermill("03_finetune_arcmargin", *first, "-y", json.dumps({"recipe": {"batch_size": 8, "epochs": 1.0}}))
    for options, more in ((own, {}), (paper, {"bank": "coco:validation", "pair_images": "coco:validation"})):
        options = shlex.split(re.sub(r"path/to/\w+/folder", str(mine), options))
        cells = papermill("04_realign_text_mcip", *options, "-y", json.dumps(small | more))
        said = str([output for cell in cells for output in cell.get("outputs", [])])
        trained = "a fine-tuning on images alone, done now"
        assert ("what notebook 03 left in runs/photos" if "photos" in options else trained) in said
    for name in ("photos", "paper"):
        for checkpoint in ("04_2sft", "04_mcip_realigned"):
            about = json.loads((course / "runs" / name / f"{checkpoint}.json").read_text())
            assert about["search"]["threshold"] == -1.0 and about["realign"]["beta2"] == 0.98
    checkpoint = course / "runs" / "photos" / "04_2sft.safetensors"
    start = f"open_clip:ViT-B-16/openai@{checkpoint}"  # a checkpoint of one's own is a start like any other
    mine_too = shlex.split(re.sub(r"path/to/\w+/folder", str(mine), own).replace("open_clip:ViT-B-16/openai", start))
    cells = papermill("04_realign_text_mcip", *mine_too, "-y", json.dumps(small))
    assert "done now" in str([output for cell in cells for output in cell.get("outputs", [])])


@pytest.mark.slow
@pytest.mark.notebook
def test_what_the_readme_says_about_averaging_runs_in_small_as_it_is_written(small_course, tmp_path):
    """Checkpoints of one's own, four trainings after notebook 03 under the same profile, and the paper's profile."""
    course, papermill = small_course
    mine = str(course / "datasets" / "cub" / "CUB_200_2011" / "images")
    small = ["-y", json.dumps({"recipe": {"batch_size": 8, "epochs": 1.0, "warmup": 0.5}})]
    first = re.sub(r"path/to/\w+/folder", mine, dict(COMMANDS[::-1])["03_finetune_arcmargin"])
    for profile in ("photos", "mine"):
        papermill("03_finetune_arcmargin", *shlex.split(first.replace("photos", profile)), *small)
    own, trained = (options for notebook, options in COMMANDS if notebook == "05_average_soups")
    for letter, profile in (("a", "photos"), ("b", "mine")):
        own = own.replace(f"{letter}.safetensors", str(course / "runs" / profile / "03_arcmargin.safetensors"))
    said = {}
    for name, options in {"own": own, "trained": trained, "paper": f"-p profile paper -p train_images {mine}"}.items():
        cells = papermill("05_average_soups", *shlex.split(re.sub(r"path/to/\w+/folder", mine, options)), *small)
        said[name] = str([output for cell in cells for output in cell.get("outputs", [])])
    assert "2 ingredients from files; their start is open_clip:ViT-B-16/openai" in said["own"]
    assert "they start from what notebook 03 left in runs/photos" in said["trained"]
    assert "they start from open_clip:ViT-L-14-336/openai itself" in said["paper"]
    for profile, methods in (("mine", ["greedy"]), ("paper", ["uniform"]), ("photos", taken_methods())):
        about = json.loads((course / "runs" / profile / "05_soup.json").read_text())
        assert about["method"] in methods and about["encoder"].startswith("open_clip:ViT-")


@pytest.mark.slow
@pytest.mark.notebook
def test_what_the_readme_says_about_searching_measuring_and_hubs_runs_in_small_as_it_is_written(small_course, tmp_path):
    """Own images in 01, 02 and 08, as the front page has them; captioned ones in 06; an own checkpoint in a table of 07."""
    course, papermill = small_course
    shutil.copytree(course / "datasets" / "cub" / "CUB_200_2011" / "images", mine := tmp_path / "mine")
    names = [folder.name for folder in sorted(mine.iterdir())]
    (mine / "captions.json").write_text(json.dumps({name: [f"the bird {name}", f"{name} again"] for name in names}))
    small = {"images": {"batch_size": 8, "epochs": 1.0}, "realign": {"batch_size": 8, "epochs": 1.0}}
    listed = ("01_search_images", "02_benchmark_encoders", "06_normalize_neighbors_nnn", "08_build_your_search")
    for notebook, options in COMMANDS:
        if notebook not in listed:
            continue
        more = ["-y", json.dumps({"recipe": small})] if notebook.startswith("08") else []
        options = shlex.split(re.sub(r"path/to(/\w+)?/folder", str(mine), options))
        if "@runs/photos" in str(options):
            continue  # that encoder is the result of another command, with which it is tried
        papermill(notebook, *options, *more)
        results = course / "runs" / options[options.index("profile") + 1] / f"{notebook}.json"
        rows = json.loads(results.read_text())["rows"]
        assert rows and all(np.isfinite(row["value"]) for row in rows)
    encoder = gu.load_encoder("mini")
    file = checkpoints.save_checkpoint(encoder, tmp_path / "tuned.safetensors")
    further = (gu.HERE / "notebooks" / "07_reproduce_papers.ipynb").read_text(encoding="utf-8")
    (options,) = re.findall(r"`(-p table mcip [^`]*)`", further)
    options = options.replace("open_clip:ViT-B-16/openai@tuned.safetensors", f"mini@{file}")
    papermill("07_reproduce_papers", *shlex.split(options), "-p", "profile", "mine")
    written = json.loads((course / "runs" / "mine" / "07_reproduce_papers.json").read_text())
    assert {row["model"] for row in written["rows"]} == {f"mini@{file}"}


def taken_methods():
    return parameters.CHOICES["method"][1:]


def test_the_small_course_differs_from_the_real_one_only_in_what_is_downloaded(tmp_path):
    course = course_in_small(tmp_path / "course")
    assert (course / "gpnns_utils.py").read_text().startswith((gu.HERE / "gpnns_utils.py").read_text())
    for path in NOTEBOOKS:
        assert (course / "notebooks" / path.name).read_bytes() == path.read_bytes()
    assert Image.open(next((course / "datasets" / "cub").rglob("*.jpg"))).size == (90, 70)
    assert pm.inspect_notebook(str(NOTEBOOKS[0])).keys() == DEFAULTS[NOTEBOOKS[0].stem].keys() | {"profile"}
