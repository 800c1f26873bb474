"""The grader: a notebook or a folder of hundreds -> grades.csv, feedback for each student, a summary.

    grade_all(submissions, out, notebooks)      the whole run, resumable, on all cores
    read_submission(path)                       the cells of a notebook that may be anything at all
    Chapter, recognise                          what is asked, and which chapter a notebook answers
    grade_one(submission, chapter, box, ...)    one submission, run in a sandbox
    verdict(item, cases, body)                  what came out of it, judged

A submission is hostile until proven otherwise. This process, the grader, never executes, imports, compiles or parses
code of a submission; it reads JSON, and it compares numbers:

1. Every submission is read before any is run, so none can change another's text: a regular file, at most 10 MB, JSON,
   cells. The chapter is the one that most of its grade ids (`10-step_kl-answer`) belong to, whatever the file's name.
2. For each exercise the cases are drawn here and sent into a sandbox (`sandbox.py`), with the text of the student's
   cells and of the given ones from the student's edition. There, in a process of its own, `worker.py` runs what the
   exercise needs: the student's solution cell; the names it uses, from the given cells *as they were handed out*, an
   earlier solution being the student's own; names that are not given, from the student's other cells. Checks, pictures
   and training runs are not executed, an edited check or a deleted helper changes nothing.
3. What comes back is JSON: values, exceptions, gradients, for each case. It is refused unless every leaf is of a known
   type and size, and judged by `check.judge`, the self-check's own code, against the reference, which stays in this
   process (but see `_lend`). A forged message can only claim values; to be right they have to be those of inputs drawn
   a moment ago, so forging is computing.
4. The grade is written down at once, in a file of its own, with a hash of all that it depends on. A run that is killed
   and started again grades the rest; grades.csv is assembled last, and replaced whole.

Draws come from the run's seed and the submission's bytes: fresh for everyone, equal when a run is resumed. The seed is
drawn at the first start and kept. Limits of time are of CPU, so that a busy machine stops nobody (`wall`, thrice as
long, is for those that sleep); only a solution that needs just about the limit may fall on either side of it.

Feedback holds what the notebook's own check would print: the smallest failing case, the value expected there, and a
hint. That value shows an answer to one input, never a formula, and the next draw is another. A wrong quiz answer is
told why it is wrong, never which is right.

What this does not do: a solution that calls the package's own function (`minialign.kernels`, which every student has)
is right. The remark says what of the package it imports; what that is worth is the instructor's to decide.
"""

import ast
import base64
import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
import secrets
import stat
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minialign.course import build, sandbox
from minialign.course.check import GO_ON, Exercise, Quiz, Verdict, find, judge, quiz, registered
from minialign.course.observe import Outcome
from minialign.course.sandbox import Broken, Limits, Lost, Sandbox
from minialign.course.worker import DTYPES, MAX_DEPTH, TEXT, Packer

MAX_BYTES = 10 << 20  # of a notebook; the chapters, pictures included, are below 1.5 MB
MAX_CELLS, MAX_CODE = 2_000, 400_000  # cells; characters of code, of which all submissions' are held in memory
MAX_LEAVES, MAX_KEY = 10_000, 60  # of one result; characters of a key. Comparing writes out each leaf's whole path
COUNTED = ("passed", "wrong", "not attempted", "stopped", "missing")
VERSION = 1  # of the results on disk


class Unreadable(Exception):
    """A submission, or a result, that is not what it should be. Its text is the message to the student."""


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
            for name in build.GRADED.findall(source) if cell and "-answer" not in cell else ():
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

    texts = [str(VERSION), minialign.__version__, torch.__version__, json.dumps(given)]
    modules = [f"course/chapter_{number}.py", *(f"course/{n}.py" for n in ("check", "observe", "grade", "worker"))]
    kernels = sorted(path.relative_to(sandbox.PACKAGE).as_posix() for path in sandbox.PACKAGE.glob("kernels/*.py"))
    for name in (*modules, *kernels):
        path = sandbox.PACKAGE / name
        texts.append(path.read_text(encoding="utf-8") if path.exists() else "")
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
        return Submission(name, digest=_digest(str(problem).encode()), problem=str(problem))
    try:
        cells = tuple(_code_cells(_json(raw)))
    except Unreadable as problem:
        return Submission(name, digest=_digest(raw), problem=str(problem))
    return Submission(name, cells, _digest(raw))


def _digest(raw: bytes) -> str:
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
        cells.append((grade_id if isinstance(grade_id, str) else None, clean))
    if (size := sum(len(source) for _, source in cells)) > MAX_CODE:
        raise Unreadable(f"{size / 1e6:.1f} MB of code; a notebook has at most {MAX_CODE / 1e6:g} MB")
    return cells


def recognise(submission: Submission, chapters: Mapping[str, Chapter]) -> Chapter:
    """The chapter that most of the notebook's cells belong to. Raises Unreadable if none does."""
    known = {item.cell: number for number, chapter in chapters.items() for item in chapter.items}
    votes: Counter = Counter()
    for cell, source in submission.cells:
        ids = {re.sub(r"-answer(-\d+)?$", "", cell)} if cell else set()
        ids |= {name.replace("/", "-") for name in build.GRADED.findall(source)}
        votes.update({known[i] for i in ids if i in known})
    if not votes:
        raise Unreadable("no cell of any chapter is in it: neither a solution cell nor a check")
    return chapters[min(votes, key=lambda number: (-votes[number], number))]


def targets(chapter: Chapter, item: Item, cells: Sequence[tuple[str | None, str]]) -> list[int]:
    """Which of the student's cells are the solution: by grade id, and others above the check that define its name."""
    answer = re.compile(re.escape(item.cell) + r"-answer(-\d+)?")
    defines = re.compile(rf"(?m)^(?:async[ \t]+)?(?:def[ \t]+|class[ \t]+)?{re.escape(item.expression)}\b[ \t]*[(=:]")
    known = {source for _, source in chapter.given}
    place = next((k for k, (cell, _) in enumerate(cells) if cell == item.cell), len(cells))
    graded = {other.cell for other in chapter.items}
    return [
        k
        for k, (cell, source) in enumerate(cells)
        if (cell and answer.fullmatch(cell))
        or (k < place and cell not in graded and not (cell and "-answer" in cell) and source not in known
            and defines.search(source))
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- what the sandbox said


class Opaque:
    """Stands for an object that is no plain data; only the name of its type is known."""


def read_stated(body: bytes) -> dict[str, list[str]]:
    """{"uses": what it imports of minialign, "needs": earlier solutions}: the first line; empty if it is no such."""
    try:
        claim = json.loads(body.partition(b"\n")[0].decode("utf-8"))
        return {key: [str(name)[:100] for name in claim[key][:20]] for key in ("uses", "needs")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"uses": [], "needs": []}


def read_result(body: bytes, cases: Sequence[Mapping], grad_wrt: Sequence[str]) -> list[Outcome]:
    """The outcome of each case, from the bytes of a student's process, behind their first line. Raises Unreadable."""
    try:
        _, _, results = body.partition(b"\n")
        entries = json.loads(results.decode("utf-8"))
        if not isinstance(entries, list) or len(entries) != max(len(cases), 1):
            raise Unreadable("its result is not one outcome a case")
        budget = [MAX_LEAVES]
        return [_outcome(entry, case, grad_wrt, budget) for entry, case in zip(entries, cases or [{}], strict=True)]
    except Unreadable:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, RuntimeError):
        raise Unreadable("its result could not be read; something other than the grader's own code wrote it") from None


def _outcome(entry: Mapping, case: Mapping, grad_wrt: Sequence[str], budget: list[int]) -> Outcome:
    error, trace = entry["error"], entry["trace"]
    if not (isinstance(error, str) and isinstance(trace, str)):
        raise Unreadable("its result holds an exception that is no text")
    if error:
        return Outcome(error=error[:100], trace=trace[:TEXT])
    grads = {name: _value(entry["grads"].get(name), budget) for name in grad_wrt}
    if entry["value"] is not None:
        for name, grad in grads.items():
            if not isinstance(grad, torch.Tensor) or grad.shape != case[name].shape or grad.dtype != case[name].dtype:
                raise Unreadable(f"its result holds a gradient that does not fit {name}")
    mutated = tuple(name for name in case if name in entry["mutated"])
    return Outcome(_value(entry["value"], budget), mutated=mutated, grads=grads)


def _value(packed: Any, budget: list[int], depth: int = 0) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH + 1:
        raise Unreadable("its result is too large")
    if packed is None or isinstance(packed, bool | float):
        return packed
    if isinstance(packed, str):
        return packed[:TEXT]
    if isinstance(packed, int):
        if abs(packed) >= 2**63:
            raise Unreadable("its result holds a number beyond 64 bits")
        return packed
    ((kind, value),) = packed.items()
    if kind == "ellipsis":
        return ...
    if kind == "list":
        return [_value(item, budget, depth + 1) for item in value]
    if kind == "dict":
        pairs = [(_value(key, budget, depth + 1), _value(item, budget, depth + 1)) for key, item in value]
        odd = any(isinstance(key, torch.Tensor) or len(str(key)) > MAX_KEY for key, _ in pairs)
        if odd or len({key for key, _ in pairs}) != len(pairs):
            raise Unreadable("its result holds a dict with odd keys")
        return dict(pairs)
    if kind == "tensor":
        return _tensor(*value)
    if kind == "object":
        return type(value[:60] if value.isidentifier() else "object", (Opaque,), {})()
    raise Unreadable("its result holds something unknown")


def _tensor(dtype: str, shape: list, raw: str) -> torch.Tensor:
    if dtype not in DTYPES or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 32:
        raise Unreadable("its result holds a tensor of an unknown kind")
    data = base64.b64decode(raw, validate=True)
    kind, count = getattr(torch, dtype), 1
    for n in shape:
        count *= n
    if len(data) != count * kind.itemsize:
        raise Unreadable("its result holds a tensor whose size is not that of its shape")
    if kind is torch.bool and not set(data) <= {0, 1}:
        raise Unreadable("its result holds a truth value that is neither")
    return (torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)).view(shape)


# ---------------------------------------------------------------------------------- judging


@dataclass
class Grade:
    """Of one submission: plain data, as it is kept on disk."""

    submission: str
    chapter: str = ""
    title: str = ""
    points: float = 0.0
    out_of: float = 0.0
    verdicts: dict[str, list] = field(default_factory=dict)  # exercise -> [status, points, points to be had, text]
    remarks: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # where the time went; not part of the grade


STOPPED = {
    "time": "it ran longer than {seconds} s, and was stopped",
    "output": "its result was larger than {output} bytes, and was not taken",
    "lost": "it brought its sandbox down",
}


def stopped(exercise: Exercise | Quiz, said: str, limits: Limits) -> Verdict:
    """The verdict where there is no result."""
    reason = STOPPED.get(said, "its process ended before there was a result").format(**limits._asdict())
    if match := re.fullmatch(r"died (-?\d+)", said):
        code = int(match[1])
        reason += f" ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
    return Verdict("stopped", 0.0, f"{exercise.name}: stopped, 0 of {exercise.points:g} points: {reason}.")


_judging = threading.Lock()  # torch's random numbers, warnings and standard output are the whole process's


def verdict(item: Item, cases: Sequence[Mapping], body: bytes) -> Verdict:
    """The verdict on a result. The only place where points are given."""
    exercise = item.exercise
    refused = f"{exercise.name}: stopped, 0 of {exercise.points:g} points: "
    try:
        outcomes = read_result(body, cases, getattr(exercise, "grad_wrt", ()))
    except Unreadable as problem:
        return Verdict("stopped", 0.0, f"{refused}{problem}.")
    with _judging:
        if isinstance(exercise, Quiz):
            return _quiz(exercise, outcomes[0])
        try:
            result = judge(exercise, cases, outcomes)
        except Exception as error:  # a value that the check cannot compare must not stop the others' grades
            return Verdict("stopped", 0.0, f"{refused}its result cannot be judged ({str(error)[:200]}).")
    text = re.sub(r"(<function \w+) at 0x\w+>", r"\1>", result.text.removesuffix(f"\n{GO_ON}"))
    return result._replace(text=text)


def _quiz(question: Quiz, outcome: Outcome) -> Verdict:
    if outcome.error:
        text = f"{question.name}: wrong, 0 of {question.points:g} points.\n  Its cell raised {outcome.trace}"
        return Verdict("wrong", 0.0, text)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        points = quiz(question.name, outcome.value)
    text = printed.getvalue().rstrip("\n")
    status = "passed" if points else "not attempted" if "not attempted" in text.split("\n")[0] else "wrong"
    return Verdict(status, points, text)


def _seed(run: str, *parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join((run, *parts)).encode()).digest()[:8]) >> 1


def grade_one(submission: Submission, chapter: Chapter, box: Sandbox, seed: str, limits: Limits) -> Grade:
    """Run it in `box` and judge it. A sandbox that is lost costs the exercise that lost it, and no other."""
    began = time.monotonic()
    grade = Grade(submission.name, chapter.number, chapter.title, out_of=chapter.points)
    found: dict[str, Verdict] = {}
    asked: list[tuple[Item, list[int], list[dict]]] = []
    given = {cell: source for cell, source in chapter.given if cell}
    for item in chapter.items:
        cells = targets(chapter, item, submission.cells)
        exercise, name = item.exercise, item.name
        if not cells:
            text = (
                f"{name}: missing, 0 of {exercise.points:g} points: the cell with the solution is not in the notebook."
            )
            found[name] = Verdict("missing", 0.0, text)
        elif all(submission.cells[k] == (submission.cells[k][0], given.get(submission.cells[k][0])) for k in cells):
            text = f"{name}: not attempted yet, 0 of {exercise.points:g} points."
            found[name] = Verdict("not attempted", 0.0, text)
        else:
            cases = exercise.draw(_seed(seed, submission.digest, name)) if isinstance(exercise, Exercise) else []
            asked.append((item, cells, cases))
    prepared, judged, warming = time.monotonic(), [0.0], box.seconds
    stated: dict[str, dict] = {}

    def run(asked: list, lent: Sequence[Item]) -> None:
        while asked:
            todo, asked, position = asked, [], 0
            try:
                for said in box.run(_request(chapter, submission, todo, limits, lent)):
                    item, _, cases = todo[position]
                    position += 1
                    start = time.monotonic()
                    ended = said.status != "ok"
                    found[item.name] = (
                        stopped(item.exercise, said.status, limits) if ended else verdict(item, cases, said.body)
                    )
                    stated[item.name] = read_stated(said.body)
                    judged[0] += time.monotonic() - start
            except Lost:
                if position < len(todo):
                    item = todo[position][0]
                    found[item.name] = stopped(item.exercise, "lost", limits)
                    asked = todo[position + 1 :]

    run(asked, ())
    for entry in asked:
        _lend(entry, chapter, submission, found, stated, run)
    for item in chapter.items:
        result = found[item.name]
        grade.verdicts[item.name] = [result.status, result.points, float(item.exercise.points), result.text]
    grade.points = float(sum(entry[1] for entry in grade.verdicts.values()))
    for status in ("missing", "stopped"):
        names = [name for name, entry in grade.verdicts.items() if entry[0] == status]
        grade.remarks += [f"{status}: {', '.join(names)}"] if names else []
    if uses := sorted({name for states in stated.values() for name in states["uses"]}):
        grade.remarks.append(f"imports {', '.join(uses)}")
    warming = box.seconds - warming
    grade.seconds = {"preparing": prepared - began, "starting sandboxes": warming, "judging": judged[0]}
    grade.seconds["running"] = time.monotonic() - began - sum(grade.seconds.values())
    return grade


def _lend(entry: tuple, chapter: Chapter, submission: Submission, found: dict, stated: dict, run: Callable) -> None:
    """A second try for an exercise that builds on earlier ones which have not passed, with right ones in their place.

    So does the notebook: its check hands on a working function either way. Those exercises are graded already; and what
    this process may say, now that it holds their answers, is its status: no word of its output reaches the feedback.
    """
    item, first = entry[0], found[entry[0].name]
    if first.status == "passed" or not isinstance(item.exercise, Exercise):
        return
    text = "\n".join(submission.cells[k][1] for k in entry[1])
    needs = {re.sub(r"-answer(-\d+)?$", "", cell) for cell in stated.get(item.name, {}).get("needs", [])}
    lent = [
        other
        for other in chapter.items
        if other.position < item.position and isinstance(other.exercise, Exercise)
        and found[other.name].status != "passed"
        and (other.cell in needs or re.search(rf"\b{other.expression}\b", text))
    ]  # fmt: skip
    if not lent:
        return
    run([entry], lent)
    second, names = found[item.name], ", ".join(other.name for other in lent)
    worth = f"{item.exercise.points:g} of {item.exercise.points:g} points"
    if second.status == "passed":
        text = f"{item.name}: passed, {worth}, with a right {names} in place of yours."
        found[item.name] = second._replace(text=text)
    else:
        note = f"  It builds on {names}, which has not passed; with a right one in its place it does not pass either."
        found[item.name] = first._replace(text=f"{first.text}\n{note}")


def _request(
    chapter: Chapter, submission: Submission, asked: Sequence, limits: Limits, lent: Sequence[Item] = ()
) -> dict:
    items = []
    packer = Packer([] if lent else _answers(chapter))
    for item, cells, cases in asked:
        try:
            packed = [packer.pack(dict(case)) for case in cases]
        except ValueError as error:
            raise Broken(f"{item.name} cannot be graded: in the arguments of a case, {error}.") from None
        items.append({
            "expression": item.expression, "targets": cells, "position": item.position, "cases": packed,
            "grad_wrt": list(getattr(item.exercise, "grad_wrt", ())),
        })  # fmt: skip
    return {
        "given": chapter.given, "own": submission.cells, "items": items, "functions": packer.functions,
        "names": {item.cell: item.expression for item in chapter.items},
        "lent": [[other.cell, other.expression, packer.pack(other.exercise.reference)] for other in lent],
        "limits": limits._asdict(),
    }  # fmt: skip


def _answers(chapter: Chapter) -> list[Callable]:
    known = [exercise for exercise in registered(chapter.number) if isinstance(exercise, Exercise)]
    return [f for exercise in known for f in (exercise.reference, *exercise.mistakes.values())]


# ---------------------------------------------------------------------------------- the run


def grade_all(
    submissions: Path, out: Path, notebooks: Path, *, chapter: str | None = None, jobs: int | None = None,
    isolation: str = "auto", limits: Limits = Limits(), seed: str | None = None, echo: Callable = print,
    progress: bool = False, hide: Sequence[Path] = (),
) -> list[Grade]:  # fmt: skip
    """Grade a notebook or every notebook in a folder, and write `out` and the folder beside it, named after it.

    `out`, say grades.csv, has a line a submission; grades/ holds feedback/, summary.html and results/, from which a
    run that was stopped goes on. `chapter` refuses the notebooks of others. `hide`: folders that hold answers.
    """
    submissions, out = Path(submissions), Path(out)
    chapters = load_chapters(notebooks)
    if chapter is not None and chapter not in chapters:
        raise ValueError(f"no chapter {chapter!r} in {notebooks}. There are: {', '.join(chapters)}.")
    paths, ignored = collect(submissions)
    folder = out.with_suffix("")
    if folder == out:
        raise ValueError(f"--out {out} needs a suffix, as in grades.csv; the folder beside it is named after it.")
    for part in ("results", "feedback"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    hidden = [Path(p) for p in (folder, submissions, notebooks, *hide)]
    kind, warning = sandbox.isolation(isolation, hidden)
    if warning:
        echo(f"warning: {warning}")
    seed = _kept_seed(folder, seed)
    began = time.monotonic()
    read = [read_submission(path, name) for name, path in paths.items()]
    grades: dict[str, Grade] = {}
    todo = []
    for submission in read:
        try:
            if submission.problem:
                raise Unreadable(submission.problem)
            found = recognise(submission, chapters)
            if chapter not in (None, found.number):
                raise Unreadable(f"this is chapter {found.number}; chapter {chapter} was asked for")
            key = _digest(json.dumps([found.fingerprint, seed, limits, submission.digest, submission.name]).encode())
            kept = _kept(folder, submission, key)
            if kept:
                grades[submission.name] = kept
            else:
                todo.append((submission, found, key))
        except Unreadable as problem:
            asked = chapters.get(chapter or "")
            out_of = asked.points if asked else 0.0
            grades[submission.name] = Grade(submission.name, out_of=out_of, remarks=[str(problem)])
    resumed = len(read) - len(todo)
    if todo and resumed:
        echo(f"{len(read)} submissions; {len(todo)} to grade, the others have their grade already")
    reading = time.monotonic() - began
    for done in _run(todo, kind, hidden, seed, limits, jobs, progress, folder):
        grades[done.submission] = done
    ordered = [grades[submission.name] for submission in read]
    for grade in ordered:
        _write(folder / "feedback" / f"{slug(grade.submission)}.html", feedback(grade))
    spent = {"reading": reading, "all": time.monotonic() - began, "graded": len(todo)}
    _write(folder / "summary.html", summary(ordered, chapters, ignored, kind, warning, spent))
    _write(out, table(ordered, chapters))
    echo(report(ordered, spent, out, folder))
    return ordered


def collect(submissions: Path) -> tuple[dict[str, Path], list[str]]:
    """({name: path of a notebook}, other files' names), sorted; links to folders are not followed."""
    if not submissions.exists() and not submissions.is_symlink():
        raise FileNotFoundError(f"no such file or folder: {submissions}")
    if not submissions.is_dir():
        return {submissions.name: submissions.resolve()}, []
    paths, ignored = {}, []
    for folder, folders, files in os.walk(submissions):
        odd = [name for name in folders if name.endswith(".ipynb")]  # a folder that calls itself a notebook
        folders[:] = sorted(name for name in folders if name not in odd and not name.startswith("."))
        for name in sorted(files + odd):
            path = Path(folder) / name
            shown = path.relative_to(submissions).as_posix()
            if name.endswith(".ipynb"):
                paths[shown] = path
            elif not name.startswith("."):
                ignored.append(shown)
    if not paths:
        raise ValueError(f"{submissions} holds no notebooks (*.ipynb).")
    return dict(sorted(paths.items())), sorted(ignored)


def _run(todo, kind, hidden, seed, limits, jobs, progress, folder):
    """Grades as they are finished, one thread and one sandbox a core."""
    from tqdm import tqdm

    jobs = max(1, min(jobs or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(todo)))
    boxes = [Sandbox(kind, hidden) for _ in range(jobs if todo else 0)]
    free, stopping = list(boxes), threading.Event()

    def one(submission: Submission, chapter: Chapter, key: str) -> Grade | None:
        if stopping.is_set():
            return None
        box = free.pop()
        try:
            grade = grade_one(submission, chapter, box, seed, limits)
        except Broken:
            raise
        except Exception as error:  # a flaw of ours that one submission found; the others go on
            box.close()
            remark = f"the grader failed on it ({type(error).__name__}: {str(error)[:200]}); grade it by hand"
            return Grade(submission.name, chapter.number, chapter.title, out_of=chapter.points, remarks=[remark])
        finally:
            free.append(box)
        kept = {"key": key, "grade": vars(grade)}
        _write(folder / "results" / f"{slug(grade.submission)}.json", json.dumps(kept, indent=1))
        return grade

    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = [pool.submit(one, *entry) for entry in todo]
        for future in tqdm(as_completed(waiting), total=len(todo), disable=not progress, unit="notebook"):
            yield future.result()
    finally:
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for box in boxes:
            box.close()
            box.scratch.cleanup()


def _kept_seed(folder: Path, seed: str | None) -> str:
    path = folder / "results" / "seed.txt"
    if seed is None and path.exists():
        return path.read_text().strip()
    seed = secrets.token_hex(16) if seed is None else seed
    _write(path, seed + "\n")
    return seed


def _kept(folder: Path, submission: Submission, key: str) -> Grade | None:
    """The grade of an earlier run, if it would come out the same."""
    try:
        kept = json.loads((folder / "results" / f"{slug(submission.name)}.json").read_text(encoding="utf-8"))
        return Grade(**kept["grade"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def slug(name: str) -> str:
    """A file's name, safe and different for different submissions."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name.removesuffix(".ipynb")).strip("-")[:80]
    return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------- what is written


def table(grades: Sequence[Grade], chapters: Mapping[str, Chapter]) -> str:
    """grades.csv: submission, chapter, points, out_of, a column an exercise, remarks."""
    names = [
        item.name for number in sorted({g.chapter for g in grades if g.chapter}) for item in chapters[number].items
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["submission", "chapter", "points", "out_of", *names, "remarks"])
    for grade in grades:
        points = [f"{grade.verdicts[name][1]:g}" if name in grade.verdicts else "" for name in names]
        row = [
            grade.submission,
            grade.title,
            f"{grade.points:g}",
            f"{grade.out_of:g}",
            *points,
            "; ".join(grade.remarks),
        ]
        writer.writerow([_cell(value) for value in row])
    return text.getvalue()


def _cell(value: str) -> str:
    """A spreadsheet takes a cell that begins like this for a formula; the file's name is the student's to choose."""
    clean = "".join(c if c.isprintable() else " " for c in value)
    return "'" + clean if clean[:1] in ("=", "+", "-", "@") else clean


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; background: #fff; max-width: 58rem; margin: 2rem auto;
       padding: 0 1rem }
pre { font: 14px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 1rem }
table { border-collapse: collapse } th, td { text-align: left; padding: .25rem 1.2rem .25rem 0;
       border-bottom: 1px solid #d9dde3; vertical-align: top } td.n, th.n { text-align: right }
.bar { background: #0b6fb8; height: 1rem } h2 { font-size: 1.1rem; margin: 1.6rem 0 0 } small { color: #69707d }
"""


def _page(title: str, body: Sequence[str]) -> str:
    """HTML without scripts; every text that came from a student is escaped by its caller."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join([
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>", *body, "</body></html>\n",
    ])  # fmt: skip


def feedback(grade: Grade) -> str:
    """The page of one student."""
    head = f"{grade.points:g} of {grade.out_of:g} points" if grade.out_of else "no points"
    body = [f"<h1>{html.escape(grade.submission)}: {head}</h1>"]
    body += [f"<p>{html.escape(remark)}.</p>" for remark in grade.remarks if not remark.startswith("imports ")]
    for name, (status, points, worth, text) in grade.verdicts.items():
        body += [f"<h2>{html.escape(name)}: {status}, {points:g} of {worth:g}</h2>", f"<pre>{html.escape(text)}</pre>"]
    return _page(grade.submission, body)


def summary(grades, chapters, ignored, kind, warning, spent) -> str:
    """The instructor's page: for each chapter a histogram of points, and how each exercise went."""
    body = ["<h1>Grades</h1>", f"<p>{len(grades)} submissions.</p>"]
    for number in sorted({grade.chapter for grade in grades if grade.chapter}):
        chapter, own = chapters[number], [grade for grade in grades if grade.chapter == number]
        values = [grade.points for grade in own]
        centre = f"mean {statistics.mean(values):.1f}, median {statistics.median(values):g}"
        body.append(
            f"<h2>{html.escape(chapter.title)}: {len(own)} submissions, {centre} of {chapter.points:g} points</h2>"
        )
        body.append("<table><tr><th>points</th><th class=n>submissions</th><th></th></tr>")
        counts = histogram(values, chapter.points)
        for label, count in counts:
            width = 24 * count / max(c for _, c in counts)
            bar = f'<div class="bar" style="width:{width:.1f}rem" role="img" aria-label="{count} submissions"></div>'
            body.append(f"<tr><td>{label}</td><td class=n>{count}</td><td>{bar}</td></tr>")
        body.append("</table><p></p><table><tr><th>exercise</th><th class=n>points</th>")
        body += [f"<th class=n>{status}</th>" for status in COUNTED] + ["</tr>"]
        for item in chapter.items:
            tally = Counter(grade.verdicts[item.name][0] for grade in own if grade.verdicts)
            cells = "".join(f"<td class=n>{tally[status] or ''}</td>" for status in COUNTED)
            body.append(f"<tr><td>{item.name}</td><td class=n>{item.exercise.points:g}</td>{cells}</tr>")
        body.append("</table>")
    for title, wanted in (("Look at these", False), ("What solutions import of the package", True)):
        rows = [(g, [r for r in g.remarks if r.startswith("imports ") == wanted]) for g in grades]
        if any(remarks for _, remarks in rows):
            body.append(f"<h2>{title}</h2><table>")
        for grade, remarks in rows:
            cells = (grade.submission, f"{grade.points:g}", "; ".join(remarks))
            body += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"] if remarks else []
        body += ["</table>"] if any(remarks for _, remarks in rows) else []
    if ignored:
        body.append(f"<h2>Not notebooks, not graded</h2><p>{html.escape(', '.join(ignored))}</p>")
    body.append(
        f"<h2>How</h2><p>Isolation: {kind}. {html.escape(warning)}</p><p><small>{_times(grades, spent)}</small></p>"
    )
    return _page("Grades", body)


def histogram(values: Sequence[float | int], most: float | int, bins: int = 10) -> list[tuple[str, int]]:
    """(interval, how many): whole points where there are few, else tenths of what can be had; the best in the last."""
    width = 1.0 if most <= bins else most / bins
    number = max(1, round(most / width))
    counts = Counter(min(int(value / width), number - (0 if width == 1.0 else 1)) for value in values)
    if width == 1.0:
        return [(f"{k:g}", counts[k]) for k in range(number + 1)]
    return [(f"{k * width:.3g} to {(k + 1) * width:.3g}", counts[k]) for k in range(number)]


def _times(grades: Sequence[Grade], spent: Mapping) -> str:
    total: Counter = Counter()
    for grade in grades:
        total.update(grade.seconds)
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in total.most_common())
    return (
        f"{spent['graded']} graded in {spent['all']:.0f} s; reading them {spent['reading']:.1f} s. "
        f"Over all sandboxes: {parts or 'nothing to do'}."
    )


def report(grades: Sequence[Grade], spent: Mapping, out: Path, folder: Path) -> str:
    """What the command prints."""
    lines = []
    for number in sorted({grade.chapter for grade in grades if grade.chapter}):
        own = [grade for grade in grades if grade.chapter == number]
        lines.append(f"{own[0].title}: {len(own)} submissions, points out of {own[0].out_of:g}")
        counts = histogram([grade.points for grade in own], own[0].out_of)
        scale = max(1, max(count for _, count in counts) / 40)
        lines += [f"  {label:>14s} {count:5d} {'#' * round(count / scale)}" for label, count in counts]
    unread = sum(not grade.chapter for grade in grades)
    lines += [f"{unread} could not be graded; grades.csv says why"] if unread else []
    return "\n".join([*lines, _times(grades, spent), f"{out}; feedback and summary.html in {folder}/"])
