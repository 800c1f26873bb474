"""The builder: complete edition (`solutions/`, the source) -> student's edition (`notebooks/`).

    build_all(solutions, notebooks)     build every chapter, executed unsolved
    drift(solutions, notebooks)         chapters whose student's edition is not what would be built
    lint(path)                          breaches of the authors' contracts in a complete edition

The student's edition has `# YOUR CODE HERE` for every region between `### BEGIN SOLUTION` and `### END SOLUTION`,
exactly as nbgrader's ClearSolutions with that stub, and none of the cells tagged `solution`. The stub is a comment: a
function keeps its docstring and returns None, which its check calls *not attempted*; a variable keeps the neutral
value given before the region. Metadata for nbgrader follows from the cells: a region makes a solution cell;
`check("01/x", ...)` and `quiz("01/q1", ...)` make graded ones, with the points of the registry.
"""

import ast
import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from minialign.course.check import Exercise, find, registered

BEGIN, END, STUB = "### BEGIN SOLUTION", "### END SOLUTION", "# YOUR CODE HERE"
SUFFIX = " · complete edition"
GRADED = re.compile(r'\b(?:check|quiz)\(\s*"(\d\d/\w+)"')
HEADER = re.compile(r"Difficulty [1-5]/5 · Importance [1-5]/5 · \d+(?:-\d+)? min · ([\d.]+) points?")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MAX_BYTES, MAX_LINES = 1_500_000, 12


def build_all(
    solutions: Path, notebooks: Path, execute: bool = True, only: str | None = None, echo: Callable = print
) -> list[Path]:
    """Build every chapter, or those whose name starts with `only`; return the notebooks written."""
    written, sources = [], [path for path in _chapters(solutions) if path.name.startswith(only or "")]
    if only and not sources:
        names = ", ".join(path.stem for path in _chapters(solutions)) or "none"
        raise ValueError(f"no chapter's name starts with {only!r}. There are: {names}.")
    for source in sources:
        target = build(source, Path(notebooks) / source.name, execute)
        echo(f"{source.name}: built{', and executed unsolved' if execute else ''}")
        written.append(target)
    return written


def build(source: Path, target: Path, execute: bool = True) -> Path:
    """One chapter; the source's own metadata is put right on the way, its sources and outputs never touched.

    Nothing is written if the source breaks a contract (ValueError); no student's edition if a cell of it raises.
    """
    if errors := lint(source)[0]:
        raise ValueError(f"{source.name} cannot be built:\n  " + "\n  ".join(errors))
    kept = nbformat.read(source, as_version=4)
    complete = annotate(copy.deepcopy(kept))
    if complete != kept:
        save(complete, source)
    notebook = student(complete)
    if execute:
        run(notebook, target.parent)
    return save(notebook, target)


def drift(solutions: Path, notebooks: Path) -> list[str]:
    """Chapters of which either edition is missing, or is not as `build` would leave it, outputs aside."""
    sources = {path.name: nbformat.read(path, as_version=4) for path in _chapters(solutions)}
    editions = {path.name: strip(nbformat.read(path, as_version=4)) for path in _chapters(notebooks)}
    fresh = {name: student(source) for name, source in sources.items()}
    drifted = {name for name in fresh.keys() | editions.keys() if fresh.get(name) != editions.get(name)}
    return sorted(drifted | {name for name, source in sources.items() if source != annotate(copy.deepcopy(source))})


def annotate(notebook: NotebookNode) -> NotebookNode:
    """Set all metadata in place, from the sources of the cells; an unknown exercise raises ValueError."""
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = nbformat.from_dict(METADATA), 4, 5
    following, taken = "no-check", []
    for cell in reversed(notebook.cells):  # backwards: a solution cell is named after the check that follows it
        for key in cell.metadata.keys() - {"tags", "jupyter"}:
            del cell.metadata[key]
        if cell.cell_type != "code":
            continue
        names = GRADED.findall(cell.source)
        if names:
            following = names[0].replace("/", "-")
            points = find(names[0]).points
            cell.metadata |= {"editable": False} | _grader(following, points)
        elif BEGIN in cell.source:
            taken.append(following)
            number = taken.count(following)
            cell.metadata |= _grader(f"{following}-answer{f'-{number}' if number > 1 else ''}", None)
    return notebook


def student(notebook: NotebookNode) -> NotebookNode:
    """The student's edition, without outputs."""
    notebook = strip(annotate(copy.deepcopy(notebook)))
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.source = clear(cell.source) if cell.cell_type == "code" else cell.source
    notebook.cells[0].source = notebook.cells[0].source.replace(SUFFIX, "", 1)
    return notebook


def clear(source: str) -> str:
    """`source` with each solution region replaced by the stub; ValueError if the markers are unbalanced."""
    lines, inside = [], False
    for line in source.split("\n"):
        if BEGIN in line or END in line:
            if inside == (BEGIN in line):
                raise ValueError(f"unbalanced solution markers at {line.strip()!r}")
            inside = not inside
            lines += [line[: len(line) - len(line.lstrip())] + STUB] if inside else []
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"{BEGIN!r} without {END!r}")
    return "\n".join(lines)


def strip(notebook: NotebookNode) -> NotebookNode:
    """Remove outputs and execution counts, in place."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def run(notebook: NotebookNode, folder: Path, **hooks: Callable) -> NotebookNode:
    """Execute in place, with `folder` as working directory, as nbval does; CellExecutionError if a cell raises."""
    from nbclient import NotebookClient

    folder.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=ERROR"], **hooks,
    )  # fmt: skip
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel added its versions
    return notebook


def save(notebook: NotebookNode, path: Path) -> Path:
    """Write whole or not at all; equal notebooks give equal bytes."""
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.validate(notebook)
    partial.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def lint(path: Path) -> tuple[list[str], list[str]]:
    """(errors, warnings) in the complete edition at `path`."""
    notebook, chapter = nbformat.read(path, as_version=4), path.name[:2]
    errors, warnings, checked = [], [], []
    title = notebook.cells[0].source.split("\n")[0] if notebook.cells else ""
    if not (title.startswith("# ") and title.endswith(SUFFIX)):
        errors.append(f"the first line should be '# Title{SUFFIX}', not {title!r}")
    header = None  # points promised by the last exercise header, until its graded cell comes
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            found = HEADER.findall(cell.source)
            header = float(found[-1]) if found else header
            continue
        if cell.cell_type != "code":
            continue
        names = GRADED.findall(cell.source)
        errors += [f"cell {number}: {problem}" for problem in _cell_errors(cell, names, header)]
        checked += names
        header = None if names else header
        length = len([line for line in cell.source.split("\n") if line.strip()])
        if length > MAX_LINES:
            warnings.append(f"cell {number}: {length} lines; aim at {MAX_LINES}")
    errors += [f"{name} is checked twice" for k, name in enumerate(checked) if name in checked[:k]]
    errors += [
        f"{known.name} is registered but never checked" for known in registered(chapter) if known.name not in checked
    ]
    errors += [f"{name} belongs to another chapter" for name in checked if not name.startswith(chapter + "/")]
    if path.stat().st_size > MAX_BYTES:
        errors.append(f"{path.stat().st_size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6} MB: fewer or smaller figures")
    return errors, warnings


def _cell_errors(cell: NotebookNode, names: list[str], header: float | None) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"holds {output.output_type} output on stderr, which nbgrader gives no points"
    try:
        body = ast.parse(re.sub(r"(?m)^\s*[%!].*", "", clear(cell.source))).body
    except (ValueError, SyntaxError) as error:
        yield f"{error}. Give a function a docstring, a block or variable a neutral line, before the region"
        return
    if not names:
        return
    if len(names) > 1 or BEGIN in cell.source or "solution" in cell.metadata.get("tags", []):
        yield "a graded cell holds one check and no solution"
    if re.search(r";\s*(#.*)?$", cell.source):
        yield "a graded cell that ends in a semicolon shows nothing, which nbgrader gives full points"
    last = ast.unparse(body[-1])
    if not isinstance(body[-1], ast.Expr) or not (last == "points" or last.startswith("quiz(")):
        yield f"a graded cell ends with the points earned, not with {last!r}"
    try:
        exercise = find(names[0])
    except ValueError as error:
        yield str(error)
        return
    if isinstance(exercise, Exercise) and header != exercise.points:
        header = f"Difficulty n/5 · Importance n/5 · m min · {exercise.points:g} points"
        yield f"{names[0]} needs a header '{header}' above it"


def _grader(grade_id: str, points: int | float | None) -> NotebookNode:
    """nbgrader's metadata, version 3: a graded cell has points, a solution cell None."""
    graded = points is not None
    fields = {"cell_type": "code", "grade": graded, "grade_id": grade_id, "locked": graded, "schema_version": 3}
    fields |= {"solution": not graded, "task": False} | ({"points": points} if graded else {})
    return nbformat.from_dict({"deletable": False, "nbgrader": fields})


def _chapters(folder: Path) -> list[Path]:
    """Chapters are named NN_name.ipynb."""
    return sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
