"""What is asked, and what came: chapters as they were handed out, and submissions that may be anything at all.

    load_chapters(notebooks)        the exercises of each chapter, from the student's edition
    read_submission(path)           the code cells of a notebook, or the reason why there are none
    recognise, targets              which chapter it answers; which of its cells answer an exercise

Nothing here executes, compiles or parses a submission's code: it reads JSON and compares text.
"""

import ast
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minialign.course import build
from minialign.course.check import Exercise, Quiz, find
from minialign.course.grader.needed import answers
from minialign.course.grader.sandbox import PACKAGE
from minialign.course.grader.wire import Unreadable

MAX_BYTES = 10 << 20  # of a notebook; the chapters, pictures included, are below 1.5 MB
MAX_CELLS, MAX_CODE = 2_000, 400_000  # cells; characters of code, of which all submissions' are held in memory


# ---------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Item:
    """One exercise or question of a chapter."""

    exercise: Exercise | Quiz
    cell: str  # grade id of its check, "10-step_kl"
    expression: str  # what is checked, "step_kl"
    position: int  # of its check among the given code cells

    @property
    def name(self) -> str:
        return self.exercise.name


@dataclass(frozen=True)
class Chapter:
    """A chapter as it was handed out."""

    number: str  # "10"
    title: str  # "10_ddpo"
    given: tuple[tuple[str | None, str], ...]  # (grade id, source) of every code cell of the student's edition
    items: tuple[Item, ...]
    fingerprint: str  # of all that a grade depends on, the submission and the seed aside

    @property
    def points(self) -> float:
        return float(sum(item.exercise.points for item in self.items))


def load_chapters(notebooks: Path) -> dict[str, Chapter]:
    """The chapters in a folder of students' editions, by number. ValueError if there is none, or one fits no check."""
    chapters = {}
    for path in sorted(Path(notebooks).glob("[0-9][0-9]_*.ipynb")):
        given = tuple(_code_cells(json.loads(path.read_bytes())))
        items = []
        for position, (cell, source) in enumerate(given):
            for name in build.GRADED.findall(source) if cell and not answers(cell) else ():
                items.append(Item(find(name), cell, _checked(source), position))
        if items:
            number = path.name[:2]
            chapters[number] = Chapter(number, path.stem, given, tuple(items), _fingerprint(number, given))
    if not chapters:
        raise ValueError(f"{notebooks} holds no student's edition (NN_name.ipynb with checks). Name it with --source.")
    return chapters


def _checked(source: str) -> str:
    """The second argument of the check or quiz in one of our own graded cells."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("check", "quiz"):
            return ast.unparse(node.args[1])
    raise ValueError(f"no check in {source!r}")


def _fingerprint(number: str, given: Sequence) -> str:
    import minialign

    texts = [minialign.__version__, torch.__version__, json.dumps(given)]
    own = (f"course/chapters/*_{number}.py", "course/*.py")
    for path in (path for part in (*own, "course/grader/*.py", "kernels/*.py") for path in sorted(PACKAGE.glob(part))):
        texts.append(path.read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# ---------------------------------------------------------------------------------- what came


@dataclass(frozen=True)
class Submission:
    """One file. Its text is kept in memory; nothing that runs later can change it."""

    name: str  # path within the folder
    cells: tuple[tuple[str | None, str], ...] = ()  # (grade id, source) of its code cells
    digest: str = ""
    problem: str = ""  # why there are no cells


def read_submission(path: Path, name: str | None = None) -> Submission:
    """The code cells of whatever lies at `path`; never raises."""
    name = path.name if name is None else name
    try:
        raw = _read_file(path)
    except Unreadable as problem:
        return Submission(name, digest=sha256(str(problem).encode()), problem=str(problem))
    try:
        cells = tuple(_code_cells(_json(raw)))
    except Unreadable as problem:
        return Submission(name, digest=sha256(raw), problem=str(problem))
    except Exception as error:  # not foreseen, but one file must not stop the others
        return Submission(name, digest=sha256(raw), problem=f"cannot be read ({type(error).__name__})")
    return Submission(name, cells, sha256(raw))


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _read_file(path: Path) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        link = path.is_symlink()
        raise Unreadable("a link, not a notebook" if link else f"cannot be read: {error.strerror}") from None
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode):
        os.close(file)
        raise Unreadable("not a regular file")
    with open(file, "rb") as handle:
        raw = handle.read(MAX_BYTES + 1) if about.st_size <= MAX_BYTES else b""
    if about.st_size > MAX_BYTES or len(raw) > MAX_BYTES:
        raise Unreadable(f"{about.st_size / 1e6:.0f} MB; a notebook has at most {MAX_BYTES / 1e6:.0f} MB")
    if not raw.strip():
        raise Unreadable("an empty file")
    return raw


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unreadable("not a notebook: not text in UTF-8") from None
    except RecursionError:
        raise Unreadable("not a notebook: nested too deeply") from None
    except ValueError as error:
        raise Unreadable(f"not a notebook: not JSON ({str(error)[:80]})") from None


def _code_cells(notebook: Any) -> list[tuple[str | None, str]]:
    """(grade id or None, source) of the code cells; Unreadable if this is no notebook of format 4."""
    if not isinstance(notebook, dict) or "nbformat" not in notebook:
        raise Unreadable("not a notebook: JSON, but without a notebook's fields")
    if notebook["nbformat"] != 4:
        version = notebook["nbformat"] if isinstance(notebook["nbformat"], int) else "unknown"
        raise Unreadable(f"a notebook of format {version}"[:40] + "; expected format 4")
    if not isinstance(notebook.get("cells"), list):
        raise Unreadable("a notebook without cells")
    if len(notebook["cells"]) > MAX_CELLS:
        raise Unreadable(f"{len(notebook['cells'])} cells; a notebook has at most {MAX_CELLS}")
    cells = []
    for cell in notebook["cells"]:
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        if isinstance(source, list):
            source = "".join(part for part in source if isinstance(part, str))
        metadata = cell.get("metadata")
        grader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
        grade_id = grader.get("grade_id") if isinstance(grader, dict) else None
        clean = source.encode("utf-8", "replace").decode() if isinstance(source, str) else ""  # no lone surrogates
        cells.append((grade_id if isinstance(grade_id, str) and len(grade_id) < 200 else None, clean))
    if (size := sum(len(source) for _, source in cells)) > MAX_CODE:
        raise Unreadable(f"{size / 1e6:.1f} MB of code; a notebook has at most {MAX_CODE / 1e6:g} MB")
    return cells


def recognise(submission: Submission, chapters: Mapping[str, Chapter]) -> Chapter:
    """The chapter that most of the notebook's cells belong to. Raises Unreadable if none does."""
    known = {item.cell: number for number, chapter in chapters.items() for item in chapter.items}
    votes: Counter = Counter()
    for cell, source in submission.cells:
        ids = {answers(cell) or cell}
        ids |= {name.replace("/", "-") for name in build.GRADED.findall(source)}
        votes.update({known[i] for i in ids if i in known})
    if not votes:
        raise Unreadable("no cell of any chapter is in it: neither a solution cell nor a check")
    return chapters[min(votes, key=lambda number: (-votes[number], number))]


def targets(chapter: Chapter, item: Item, cells: Sequence[tuple[str | None, str]]) -> list[int]:
    """Which of the student's cells are the solution: by grade id, and others above the check that define its name."""
    defines = re.compile(rf"(?m)^(?:async[ \t]+)?(?:def[ \t]+|class[ \t]+)?{re.escape(item.expression)}\b[ \t]*[(=:]")
    known = {source for _, source in chapter.given}
    place = next((k for k, (cell, _) in enumerate(cells) if cell == item.cell), len(cells))
    graded = {other.cell for other in chapter.items}
    return [
        k
        for k, (cell, source) in enumerate(cells)
        if answers(cell) == item.cell
        or (k < place and cell not in graded and not answers(cell) and source not in known and defines.search(source))
    ]  # fmt: skip
