"""Where things live: data without code, one ordinary package, arrows that point one way, names with one meaning."""

import ast
import collections
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import sysconfig
import typing
from pathlib import Path

import jedi
import pytest

import gpnns
import gpnns_utils as gu

ROOT = Path(gu.__file__).resolve().parent
PACKAGE = ROOT / "notebooks" / "gpnns"
SETTINGS = "gpnns.tools.voila"  # a file of settings that Voila runs: it is never imported
MODULES = ["gpnns_utils"] + sorted(
    module.name
    for module in pkgutil.walk_packages(gpnns.__path__, "gpnns.")
    if not module.ispkg and module.name != SETTINGS
)


def path_of(module):
    return ROOT / "gpnns_utils.py" if module == "gpnns_utils" else ROOT / "notebooks" / f"{module.replace('.', '/')}.py"


TREES = {module: ast.parse(path_of(module).read_text(encoding="utf-8")) for module in MODULES}


def public_functions(module):
    """The functions of a module and of its classes whose names do not begin with an underscore, as (name, function)."""
    own = vars(importlib.import_module(module)).items()
    own = [(name, one) for name, one in own if getattr(one, "__module__", "") == module and not name.startswith("_")]
    found = [(name, one) for name, one in own if inspect.isfunction(one)]
    for name, one in own:
        if inspect.isclass(one):
            methods = [(f"{name}.{key}", value) for key, value in vars(one).items() if not key.startswith("_")]
            found += [(key, value) for key, value in methods if inspect.isfunction(value)]
    return found


def tracked(*patterns):
    """What git knows, and what is new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [path for path in listed if path and (ROOT / path).exists()]


# --- 1: data are data ---


def test_data_holds_no_code():
    kinds = {Path(path).suffix for path in tracked("data")}
    assert kinds <= {".csv", ".json", ".toml", ".md", ".npz", ".safetensors", ".gz"}, kinds


def test_no_other_folder_beside_the_package_and_the_tests_holds_code():
    code = [Path(path) for path in tracked("*.py")]
    assert {path.parts[0] for path in code} == {"gpnns_utils.py", "notebooks", "tests"}
    assert {path.parts[:2] for path in code if path.parts[0] == "notebooks"} == {("notebooks", "gpnns")}


# --- 2: an ordinary package, which editors follow ---


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("from gpnns import training\ntraining.fine_tu", "fine_tune"),
        ("from gpnns.losses import ArcM", "ArcMargin"),
        ('import gpnns_utils as gu\ngu.load_images("mini").lab', "labels"),
        ('import gpnns_utils as gu\nimages = gu.load_images("mini")\nimages.sub', "subset"),
        ('import gpnns_utils as gu\ngu.load_encoder("mini").fing', "fingerprint"),
    ],
)
def test_an_editor_and_a_notebook_complete(typed, offered):
    as_in_a_notebook = {}
    exec("import gpnns_utils as gu\nfrom gpnns import training", as_in_a_notebook)
    for script in (jedi.Script(typed), jedi.Interpreter(typed, [as_in_a_notebook])):
        assert offered in [one.name for one in script.complete()], script


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_says_what_it_takes_and_gives(module):
    for name, function in public_functions(module):
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
        wanted = [
            one.name
            for one in parameters
            if one.name != "self" and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        ]
        missing = [parameter for parameter in [*wanted, "return"] if parameter not in hints]
        assert not missing, f"{module}.{name} has no type hint for {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_by_a_trick(module):
    names = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
    defined = {node.name for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)}
    assert not {"__path__", "__import__", "globals", "exec", "eval"} & names
    assert not {"__getattr__", "__dir__"} & defined
    assert "import_module" not in path_of(module).read_text(encoding="utf-8")


# --- 3: arrows point one way ---

BELOW = {  # what the module stands on
    "gpnns.machine", "gpnns.encoders.encoder", "gpnns.encoders.embedding_cache", "gpnns.images.image_set",
    "gpnns.images.decoding", "gpnns.images.text_files",
}  # fmt: skip


def layer(module):
    if module in BELOW:
        return 0
    if module == "gpnns_utils":
        return 1
    folder = module.split(".")[1] if module.count(".") > 1 else "lessons"
    return {"images": 2, "encoders": 2, "world": 2, "lessons": 3, "claims": 4, "tools": 5}[folder]


def imports_of(nodes):
    """The modules of the course that are imported somewhere among some nodes."""
    found = set()
    for node in nodes:
        for one in ast.walk(node):
            if isinstance(one, ast.Import):
                found |= {alias.name for alias in one.names}
            elif isinstance(one, ast.ImportFrom):
                whole = [f"{one.module}.{alias.name}" for alias in one.names]
                found |= {name if name in TREES else one.module for name in whole}
    return found & set(TREES)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_stands_below_it_or_beside_it(module):
    upwards = {other for other in imports_of([TREES[module]]) if layer(other) > layer(module)}
    if module != "gpnns_utils":
        assert not upwards, f"{module} looks up to {upwards}"
        return
    functions = [node for node in TREES[module].body if isinstance(node, ast.FunctionDef)]
    delegators = {node.name: imports_of([node]) for node in functions if imports_of([node])}
    assert delegators == {"load_images": {"gpnns.images.datasets"}, "load_encoder": {"gpnns.encoders.loading"}}
    assert upwards == set().union(*delegators.values()), "only the two delegators look back, inside of their functions"


def test_no_imports_go_in_a_circle():
    arrows = {}
    for module, tree in TREES.items():
        body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        arrows[module] = imports_of([tree] if module != "gpnns_utils" else body) - {module}
    left = dict(arrows)
    while left:
        free = {module for module, others in left.items() if not others & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {module: others for module, others in left.items() if module not in free}


def test_no_notebook_imports_how_things_are_made():
    for path in tracked("notebooks/*.ipynb", "notebooks/solutions/*.ipynb"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "from gpnns.claims" not in text and "from gpnns.tools" not in text, path


# --- 4: one class from one file, wherever the course is ---

SAME = """
import gpnns_utils as gu
from gpnns.encoders.encoder import Encoder
from gpnns.images import datasets, image_set
import sys, collections
assert gu.ImageSet is image_set.ImageSet and gu.Encoder is Encoder and type(gu.load_images("mini")) is gu.ImageSet
files = collections.Counter(m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None) and "gpnns" in m.__file__)
assert set(files.values()) == {1}, files
print(gu.__file__, image_set.__file__)
"""


@pytest.mark.parametrize("start", [".", "notebooks", "tests"])
def test_a_checkout_that_nobody_installed_is_imported_like_any_package(start):
    """Without site-packages' .pth files, as on Colab; from the root, from the notebooks, and by a path from elsewhere."""
    packages = sysconfig.get_paths()["purelib"]
    code = f"import sys\nsys.path.append({packages!r})\n"  # its packages, not what was installed for editing
    code += f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'notebooks')!r}]\n" if start != "." else ""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-S", "-c", code + SAME]
    result = subprocess.run(command, cwd=ROOT / start, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(ROOT / "gpnns_utils.py") in result.stdout and str(PACKAGE) in result.stdout


# --- 5: names ---

SHARED_NAMES = {"load_images", "load_encoder", "main"}  # the two delegators, and what a script runs


def test_a_function_s_name_has_one_meaning():
    homes = collections.defaultdict(set)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                homes[node.name].add(module)
    assert {name: where for name, where in homes.items() if len(where) > 1 and name not in SHARED_NAMES} == {}


# --- 6: size ---


def test_the_product_stays_small():
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in tracked("*.py")}
    product = {path: count for path, count in lines.items() if not path.startswith("tests/")}
    assert sum(product.values()) <= 10_770, "it may shrink, and not grow"
    assert max(product.values()) <= 1000, "a file is read in one sitting"
