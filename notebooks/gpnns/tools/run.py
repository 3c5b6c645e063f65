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
LACK_OF_MEMORY = re.compile("DeadKernelError|MemoryError|out of memory|allocate memory", re.I)
MEMORY = (
    "\nMemory ran out, most likely; a kernel dies of little else (papermill alone then ends with exit status 138). Close "
    "other programs, or choose a smaller batch_size or fewer images, and run the notebook again: embeddings and "
    "trainings go on where they were."
)


def run_notebook(path: Path, output: Path, parameters: dict) -> str | None:
    """Execute one notebook; None when every cell ran, else what went wrong and where."""
    output.unlink(missing_ok=True)  # an earlier run's copy must not speak for this one
    try:
        papermill.execute_notebook(
            path,
            output,
            parameters,
            kernel_name="python3",
            cwd=FOLDER,
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],  # the kernel's own start-up notes are not the reader's concern
        )
    except PapermillExecutionError as error:
        return f"cell {own_number(path, error.cell_index)}: {error.ename}: {error.evalue}"
    except Exception as error:  # no kernel, or one that died
        message = str(error).strip().splitlines()
        return f"cell {max(executed(output)[0], default=1)}: {type(error).__name__}: {message[0] if message else ''}"
    # sys.exit() in a cell ends a run silently: only what was never started tells.
    waiting = executed(output)[1]
    return f"cell {waiting[0]}: it did not run" if waiting else None


def notebooks_of(profile: str) -> list[Path]:
    """The notebooks that a profile has a part for; all of them for a name without a file."""
    paths, file = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")), FOLDER / "profiles" / f"{profile}.yml"
    if not file.exists():
        return paths
    listed = yaml.safe_load(file.read_text(encoding="utf-8"))["notebooks"]
    return [path for path in paths if path.stem in listed]


def own_number(path: Path, index: int) -> int:
    """The number, from 1, of an executed cell in the notebook itself, which lacks the injected parameters."""
    cells = nbformat.read(path, as_version=4).cells
    parameters = next((i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])), -1)
    return index + 1 - (index > parameters)


def executed(output: Path) -> tuple[list[int], list[int]]:
    """The numbers, from 1, of the code cells that were started and of those that were not."""
    cells = nbformat.read(output, as_version=4).cells if output.exists() else []
    own = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    code = [(i, cell) for i, cell in enumerate(own, 1) if cell.cell_type == "code" and cell.source.strip()]
    begun = [i for i, cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    return begun, [i for i, _ in code if i not in begun]


def headline(results: Path, start: float) -> str:
    """The notebook's own headline, from the results file of this run."""
    fresh = results.exists() and results.stat().st_mtime >= start - 1
    return json.loads(results.read_text(encoding="utf-8"))["headline"] if fresh else ""


def render(copy: Path, source: Path) -> None:
    """Replace the committed notebook by the executed one, without what only this run knows."""
    notebook = nbformat.read(copy, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.metadata.get("tags") == []:
            cell.metadata.pop("tags")
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            # How long something took, or that it was not in the cache, a reader need not know.
            cell.outputs = [
                o for o in cell.outputs if not o.get("data", {}).get("text/html", "").startswith("<progress")
            ]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {
        key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata
    }
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, source)


def smaller(png: str) -> str:
    """The same figure with a palette of 48 colors, which is plenty for curves and text: a third of the size."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(48).save(buffer, format="png", optimize=True)
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
        if "solution" in cell.metadata.get("tags", []):
            answers.setdefault(anchor, []).append(cell)
        else:
            anchor = cell.id
    if lost := answers.keys() - {cell.id for cell in notebook.cells}:
        raise ValueError(f"{solution} has answers behind the cell {lost.pop()}, which {path.name} no longer has")
    notebook.cells = [part for cell in notebook.cells for part in (cell, *answers.get(cell.id, []))]
    known = {(cell.id, cell.source): cell for cell in before}
    for cell in notebook.cells:
        cell.source = in_solutions(cell.source) if cell.cell_type == "markdown" else cell.source
        if cell.cell_type == "code":
            same = known.get((cell.id, cell.source), {})
            cell.outputs, cell.execution_count = same.get("outputs", []), same.get("execution_count")
    nbformat.write(notebook, solution)


def in_solutions(text: str) -> str:
    """Prose of a notebook as its solution has it, one folder further down: links lead to where they did."""
    return text.replace("](README.md", "](../README.md").replace("](solutions/", "](")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where executed copies go")
    parser.add_argument("--render", action="store_true", help="refresh the committed outputs")
    parser.add_argument("--solutions", action="store_true", help="run nothing, only bring solutions/ up to date")
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all, in order)")
    arguments = parser.parse_args()
    paths = arguments.notebooks or notebooks_of(arguments.profile)
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
        seconds = time.time() - start
        print("failed" if failed else "done", f"in {seconds:.0f} s", flush=True)
        table.append(
            (
                path.stem,
                f"{seconds:.0f} s",
                f"FAILED at {failed}" if failed else headline(folder / f"{path.stem}.json", start),
            )
        )
        if arguments.render and not failed:
            render(folder / path.name, path)
            rebuild_solution(path)
            solution, copy = path.parent / "solutions" / path.name, folder / f"{path.stem}_solved.ipynb"
            failed = run_notebook(solution, copy, {"profile": arguments.profile})  # its training is done already
            if not failed:
                render(copy, solution)
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
