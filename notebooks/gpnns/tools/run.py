"""Run the notebooks of the course in order, each in its own kernel: `python -m gpnns.tools.run`.

Executed copies and results go to runs/<profile>/. The first notebook that fails stops the run with its name, cell and
error and exit status 1. Parameters are those of profiles/<profile>.yml, which the notebooks read themselves. With
--render the executed notebooks also replace the committed ones.
"""

import argparse
import base64
import io
import json
import re
import sys
import time
from pathlib import Path

try:
    import nbformat
    import papermill
    import yaml
    from papermill.exceptions import PapermillExecutionError
    from PIL import Image
except ModuleNotFoundError as error:
    sys.exit(
        f"{error.name} is not installed for {sys.executable}. Start the course with `make course`; without make: "
        "`python3 notebooks/gpnns/tools/install.py`, then `.venv/bin/python -m gpnns.tools.run`"
    )

FOLDER = Path(__file__).resolve().parents[2]
ROOT = FOLDER.parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
LACK_OF_MEMORY = re.compile("DeadKernelError|MemoryError|out of memory|allocate memory", re.I)
MEMORY = (
    "\nMemory ran out, most likely; a kernel dies of little else (papermill alone then ends with exit status 138). Close "
    "other programs, or choose a smaller batch_size or fewer images, and run the notebook again: embeddings and "
    "trainings go on where they were."
)


def run_notebook(path: Path, output: Path, parameters: dict) -> str | None:
    """Execute one notebook; None when every cell ran, else what went wrong and where."""
    output.unlink(missing_ok=True)  # an earlier run's copy must not speak for this one
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}  # the kernel's own start-up notes
    try:
        papermill.execute_notebook(path, output, parameters, kernel_name="python3", cwd=FOLDER, **quiet)
    except PapermillExecutionError as error:
        return f"cell {find_own_number(path, error.cell_index)}: {error.ename}: {error.evalue}"
    except Exception as error:  # no kernel, or one that died
        message = str(error).strip().splitlines()
        return f"cell {max(list_executed(output)[0], default=1)}: {type(error).__name__}: {''.join(message[:1])}"
    # sys.exit() in a cell ends a run silently: only what was never started tells.
    waiting = list_executed(output)[1]
    return f"cell {waiting[0]}: it did not run" if waiting else None


def list_notebooks(profile: str) -> list[Path]:
    """The notebooks that a profile has a part for; all of them for a name without a file."""
    file = FOLDER / "profiles" / f"{profile}.yml"
    if not file.exists():
        return NOTEBOOKS
    listed = yaml.safe_load(file.read_text(encoding="utf-8"))["notebooks"]
    return [path for path in NOTEBOOKS if path.stem in listed]


def has_tag(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def find_own_number(path: Path, index: int) -> int:
    """The number, from 1, of an executed cell in the notebook itself, which lacks the injected parameters."""
    cells = nbformat.read(path, as_version=4).cells
    parameters = next((i for i, cell in enumerate(cells) if has_tag(cell, "parameters")), -1)
    return index + 1 - (index > parameters)


def list_executed(output: Path) -> tuple[list[int], list[int]]:
    """The numbers, from 1, of the code cells that were started and of those that were not."""
    cells = nbformat.read(output, as_version=4).cells if output.exists() else []
    own = enumerate((cell for cell in cells if not has_tag(cell, "injected-parameters")), 1)
    code = [(i, cell) for i, cell in own if cell.cell_type == "code" and cell.source.strip()]
    begun = [i for i, cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    return begun, [i for i, _ in code if i not in begun]


def read_headline(results: Path, start: float) -> str:
    """The notebook's own headline, from the results file of this run."""
    fresh = results.exists() and results.stat().st_mtime >= start - 1
    return json.loads(results.read_text(encoding="utf-8"))["headline"] if fresh else ""


def render(copy: Path, source: Path) -> None:
    """Replace the committed notebook by the executed one, without what only this run knows."""
    notebook = nbformat.read(copy, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not has_tag(cell, "injected-parameters")]
    for cell in notebook.cells:
        for key in ("papermill", "execution", *(() if cell.metadata.get("tags") else ("tags",))):
            cell.metadata.pop(key, None)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        # How long something took, or that it was not in the cache, a reader need not know.
        cell.outputs = [o for o in cell.outputs if not o.get("data", {}).get("text/html", "").startswith("<progress")]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = shrink_png(output.data["image/png"])
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, source)


def shrink_png(png: str) -> str:
    """The same figure with a palette of 48 colors, which is plenty for curves and text: a third of the size.

    By octree, because the median cut merges small dots of different colors.
    """
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(48, method=Image.Quantize.FASTOCTREE).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def rebuild_solution(path: Path) -> None:
    """Write the solution of a notebook anew: its cells and the old solution's tagged cells.

    --render does this and then runs the solution, --solutions does it for all of them without a run: to be called after
    any change to a notebook. An answer stays behind the cell it followed, known by its id; outputs stay where a cell is
    what it was. ValueError when an answer's cell is gone.
    """
    solution = path.parent / "solutions" / path.name
    notebook, answers, anchor = nbformat.read(path, as_version=4), {}, None
    before = nbformat.read(solution, as_version=4).cells if solution.exists() else []
    for cell in before:
        if has_tag(cell, "solution"):
            answers.setdefault(anchor, []).append(cell)
        else:
            anchor = cell.id
    if lost := answers.keys() - {cell.id for cell in notebook.cells}:
        raise ValueError(f"{solution} has answers behind the cell {lost.pop()}, which {path.name} no longer has")
    notebook.cells = [part for cell in notebook.cells for part in (cell, *answers.get(cell.id, []))]
    known = {(cell.id, cell.source): cell for cell in before}
    for cell in notebook.cells:
        cell.source = redirect_links(cell.source) if cell.cell_type == "markdown" else cell.source
        if cell.cell_type == "code":
            same = known.get((cell.id, cell.source), {})
            cell.outputs, cell.execution_count = same.get("outputs", []), same.get("execution_count")
    nbformat.write(notebook, solution)


def redirect_links(text: str) -> str:
    """Prose of a notebook as its solution has it, one folder further down: links lead to where they did."""
    return text.replace("](README.md", "](../README.md").replace("](solutions/", "](")


def render_with_solution(path: Path, folder: Path, profile: str) -> str | None:
    """Render a notebook that ran, and run and render its solution: None, or what went wrong there and where."""
    render(folder / path.name, path)
    rebuild_solution(path)
    solution, copy = path.parent / "solutions" / path.name, folder / f"{path.stem}_solved.ipynb"
    failed = run_notebook(solution, copy, {"profile": profile})  # its training is done already
    if not failed:
        render(copy, solution)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where executed copies go")
    parser.add_argument("--render", action="store_true", help="refresh the committed outputs")
    parser.add_argument("--solutions", action="store_true", help="run nothing, only bring solutions/ up to date")
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all, in order)")
    arguments = parser.parse_args()
    paths = arguments.notebooks or list_notebooks(arguments.profile)
    if arguments.solutions:
        for path in paths:
            rebuild_solution(path)
        return 0
    folder = arguments.runs / arguments.profile
    folder.mkdir(parents=True, exist_ok=True)
    table, failed = [], None
    for number, path in enumerate(paths, 1):
        if failed:
            table.append((path.stem, "", "not run"))
            continue
        print(f"[{number}/{len(paths)}] {path.stem} ...", end=" ", flush=True)
        start = time.time()
        failed = run_notebook(path, folder / path.name, {"profile": arguments.profile})
        seconds = f"{time.time() - start:.0f} s"
        print("failed" if failed else "done", f"in {seconds}", flush=True)
        result = f"FAILED at {failed}" if failed else read_headline(folder / f"{path.stem}.json", start)
        table.append((path.stem, seconds, result))
        if arguments.render and not failed:
            failed = render_with_solution(path, folder, arguments.profile)
    width = max(len(row[0]) for row in table)
    print(f"\n{'notebook':{width}}  {'time':>6}  headline result")
    for name, seconds, result in table:
        print(f"{name:{width}}  {seconds:>6}  {result}")
    if failed:
        if LACK_OF_MEMORY.search(failed):
            print(MEMORY, file=sys.stderr)
        print(f"\nThe run stopped. The executed copies, with the full error, are in {folder}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
