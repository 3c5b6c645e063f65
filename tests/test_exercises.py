"""The exercises: each has a stub, a check and an answer; a notebook is its solution without the answers.

That every answer is right, and that empty stubs and wrong answers get a hint, is seen where the notebooks are executed:
tests/test_notebooks.py.
"""

import subprocess
import sys

import nbformat
import pytest
from conftest import load_module
from wrong_answers import WRONG

import gpnns_utils as gu

FOLDER = gu.HERE / "notebooks"
PATHS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
ids = [path.stem for path in PATHS]
RUN = load_module(FOLDER / "gpnns" / "tools" / "run.py")


def read(path):
    return nbformat.read(path, as_version=4).cells


def is_answer(cell):
    return "solution" in cell.metadata.get("tags", [])


def solution_of(path):
    return path.parent / "solutions" / path.name


def sources(cells):
    return [(cell.id, cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells]


def exercises_of(path):
    """The numbers of a notebook's exercises, in their order."""
    return [int(cell.id.split("-")[1]) for cell in read(path) if cell.id.startswith("exercise-")]


def test_every_notebook_has_its_solution_and_no_solution_stands_alone():
    assert sorted(path.name for path in (FOLDER / "solutions").iterdir() if path.suffix == ".ipynb") == [
        path.name for path in PATHS
    ]


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_notebook_is_its_solution_without_the_answers(path):
    solved = [cell for cell in read(solution_of(path)) if not is_answer(cell)]
    own = [(name, kind, RUN.redirect_links(source), tags) for name, kind, source, tags in sources(read(path))]
    assert own == sources(solved), "run `python -m gpnns.tools.run --solutions`"
    assert not any(is_answer(cell) for cell in read(path))


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_three_to_five_exercises_each_with_question_stub_check_and_answer(path):
    numbers = exercises_of(path)
    assert numbers == list(range(1, len(numbers) + 1)) and 3 <= len(numbers) <= 5
    cells = read(solution_of(path))
    first = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    assert RUN.redirect_links(f"](solutions/{path.name})") in cells[first].source
    wanted = ["exercise", "stub", "why", "solution", "before-check", "check"]
    wanted = [f"{part}-{number}" for number in numbers for part in wanted]
    named = {cell.id: cell for cell in cells[first:]}
    assert [cell.id for cell in cells[first + 1 :]][: len(wanted)] == wanted
    for number in numbers:
        assert named[f"exercise-{number}"].source.startswith(f"**{number}.** ")
        assert "None" in named[f"stub-{number}"].source
        assert named[f"check-{number}"].source.splitlines()[-1].startswith('"right" if ')
        assert is_answer(named[f"why-{number}"]) and is_answer(named[f"solution-{number}"])


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_every_exercise_is_tried_with_wrong_answers_too(path):
    assert sorted(WRONG[path.stem]) == exercises_of(path) and all(WRONG[path.stem].values())


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_the_ids_of_a_solution_are_unique(path):
    cells = read(solution_of(path))
    assert len({cell.id for cell in cells}) == len(cells)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_a_solution_shows_its_own_run_in_which_every_check_says_right(path):
    cells = [cell for cell in read(solution_of(path)) if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "`run.py --render`"
    said = {cell.id: text_of_outputs(cell) for cell in cells if cell.id.startswith("check-")}
    assert said == {f"check-{number}": ["'right'"] for number in exercises_of(path)}
    assert str(gu.HERE) not in solution_of(path).read_text(encoding="utf-8"), "no path of the machine that ran it"


def text_of_outputs(cell):
    return [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]


def write(path, *cells):
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)


def code(name, source, answer=False):
    return nbformat.v4.new_code_cell(source, id=name, metadata={"tags": ["solution"]} if answer else {})


@pytest.fixture
def changed(tmp_path):
    """A notebook that was changed after its solution was written."""
    path = tmp_path / "01_new.ipynb"
    write(path, code("a", "1 + 1"), code("new", "0"), code("stub", "answer = None"), code("z", "answer"))
    old = [code("a", "1"), code("stub", "answer = None"), code("s", "answer = 2", answer=True), code("z", "answer")]
    write(solution_of(path), *old)
    return path


def test_a_changed_notebook_takes_its_answers_along(changed):
    outputs = read(changed)
    outputs[0].outputs, outputs[0].execution_count = [nbformat.v4.new_output("stream", text="2")], 1
    write(changed, *outputs)
    subprocess.run([sys.executable, "-m", "gpnns.tools.run", "--solutions", str(changed)], check=True)
    cells = read(solution_of(changed))
    assert [(cell.id, cell.source) for cell in cells] == [
        ("a", "1 + 1"),
        ("new", "0"),
        ("stub", "answer = None"),
        ("s", "answer = 2"),
        ("z", "answer"),
    ]
    assert read(changed)[0].outputs and not cells[0].outputs, "the solution shows its own run, not the notebook's"


def test_an_answer_keeps_its_outputs_until_its_cell_changes(changed):
    solved = read(solution_of(changed))
    for count, cell in enumerate(solved, 1):
        cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text=f"{count}")], count
    write(solution_of(changed), *solved)
    RUN.rebuild_solution(changed)
    shown = {cell.id: (cell.execution_count, len(cell.outputs)) for cell in read(solution_of(changed))}
    assert shown == {"a": (None, 0), "new": (None, 0), "stub": (2, 1), "s": (3, 1), "z": (4, 1)}


def test_an_answer_whose_stub_is_gone_is_not_dropped_silently(changed):
    write(changed, *[cell for cell in read(changed) if cell.id != "stub"])
    before = solution_of(changed).read_bytes()
    with pytest.raises(ValueError, match="answers behind the cell stub, which 01_new.ipynb no longer has"):
        RUN.rebuild_solution(changed)
    assert solution_of(changed).read_bytes() == before
