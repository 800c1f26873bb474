"""The grader: a notebook or a folder of hundreds -> grades.csv, feedback for each student, a summary.

    grade_all(submissions, out, notebooks)      the whole run, resumable, on all cores
    grade_one(submission, chapter, box, ...)    one submission, run in a sandbox
    verdict(item, cases, body)                  what came out of it, judged

`submission.py` reads what came, `wire.py` what the sandbox says, and `gradebook.py` writes what comes out; `kept.py`
remembers.

A submission is hostile until proven otherwise. This process, the grader, never executes, imports, compiles or parses
code of a submission; it reads JSON, and it compares numbers:

1. Every submission is read before any is run, so none can change another's text: a regular file, at most 64 MB, JSON,
   cells. The chapter is the one that most of its grade ids (`10-step_kl-answer`) belong to, whatever the file's name.
2. For each exercise the cases are drawn here and sent into a sandbox (`sandbox.py`), with the text of the student's
   cells and of the given ones from the student's edition. There, in a process of its own, `worker.py` runs what the
   exercise needs: the student's solution cell; the names it uses, from the given cells *as they were handed out*, an
   earlier solution being the student's own; names that are not given, from the student's other cells. Checks, pictures
   and training runs are not executed, an edited check or a deleted helper changes nothing.
3. What comes back is JSON: values, exceptions, gradients, for each case. It is refused unless every leaf is of a known
   type and size, and judged by `check.judge`, the self-check's own code, against the reference, which stays in this
   process (but see `_Attempt.lend`). A forged message can only claim values; to be right they have to be those of
   inputs drawn a moment ago, so forging is computing.
4. The grade is written down at once, in a file of its own, with a hash of all that it depends on. A run that is killed
   and started again grades the rest; grades.csv is assembled last, and replaced whole.

Draws come from the run's seed and the submission's bytes: fresh for everyone, equal when a run is resumed. The seed is
drawn at the first start and kept. Limits of time are of CPU, so that a busy machine stops nobody (`wall`, thrice as
long, is for those that sleep, `total` for a notebook of sleepers); only a solution that needs just about the limit may
fall on either side of it.

Feedback holds what the notebook's own check would print: the smallest failing case, the value expected there, and a
hint. That value shows an answer to one input, never a formula, and the next draw is another. A wrong quiz answer is
told why it is wrong, never which is right.

What this does not do: a solution that calls the package's own function (`minialign.kernels`, which every student has)
is right. The table says what of the package it imports; what that is worth is the instructor's to decide.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from minialign.course.check import GO_ON, Exercise, Quiz, Verdict, judge, quiz, registered
from minialign.course.grader import formats, gradebook, kept, overrides, similar, walls
from minialign.course.grader.gradebook import Grade, Run, slug
from minialign.course.grader.needed import answers
from minialign.course.grader.sandbox import Broken, Limits, Lost, Sandbox
from minialign.course.grader.submission import (
    Chapter,
    Item,
    Submission,
    collect,
    load_chapters,
    read_submission,
    recognise,
    sha256,
    targets,
)
from minialign.course.grader.wire import Packer, Unreadable, read_result, read_stated
from minialign.course.observe import Outcome

# ---------------------------------------------------------------------------------- judging


STOPPED = {
    "time": "it ran longer than {seconds} s, and was stopped",
    "budget": "the {total:g} s for the whole notebook were used up, by this exercise or those before it",
    "files": "it wrote more than {files} bytes of temporary files, or too many files, and was stopped",
    "output": "its result was larger than {output} bytes, and was not taken",
    "lost": "it brought its sandbox down",
}


def _none(exercise: Exercise | Quiz, status: str, why: str = "") -> Verdict:
    """No points, in the form of the self-check's own texts."""
    text = f"{exercise.name}: {status}{' yet' if status == 'not attempted' else ''}, 0 of {exercise.points:g} points"
    return Verdict(status, 0.0, f"{text}{why and ': ' + why}.")


def stopped(exercise: Exercise | Quiz, said: str, limits: Limits) -> Verdict:
    """The verdict where there is no result."""
    why = STOPPED.get(said, "its process ended before there was a result").format(**asdict(limits))
    if match := re.fullmatch(r"died (-?\d+)", said):
        code = int(match[1])
        why += f" ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
    return _none(exercise, "stopped", why)


_judging = threading.Lock()  # torch's random numbers, warnings and standard output are the whole process's


def verdict(item: Item, cases: Sequence[Mapping], body: bytes) -> Verdict:
    """The verdict on a result. The only place where points are given."""
    exercise = item.exercise
    try:
        outcomes = read_result(body, cases, getattr(exercise, "grad_wrt", ()))
    except Unreadable as problem:
        return _none(exercise, "stopped", str(problem))
    with _judging:
        if isinstance(exercise, Quiz):
            return _quiz(exercise, outcomes[0])
        try:
            result = judge(exercise, cases, outcomes)
        except Exception as error:  # a value that the check cannot compare must not stop the others' grades
            return _none(exercise, "stopped", f"its result cannot be judged ({str(error)[:200]})")
    return result._replace(text=result.text.removesuffix(f"\n{GO_ON}"))


def _quiz(question: Quiz, outcome: Outcome) -> Verdict:
    if outcome.error:
        text = f"{question.name}: wrong, 0 of {question.points:g} points.\n  Its cell raised {outcome.trace}"
        return Verdict("wrong", 0.0, text)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        points = quiz(question.name, outcome.value)
    text = printed.getvalue().rstrip("\n")
    status = "passed" if points else "not attempted" if "not attempted" in text.split("\n")[0] else "wrong"
    return Verdict(status, points, text)


class Asked(NamedTuple):
    """An exercise that the student did something about."""

    item: Item
    cells: list[int]  # of the submission: the solution
    cases: list[dict]


def grade_one(submission: Submission, chapter: Chapter, box: Sandbox, seed: str, limits: Limits) -> Grade:
    """Run it in `box` and judge it. A sandbox that is lost costs the exercise that lost it, and no other."""
    began, warming = time.monotonic(), box.seconds
    found: dict[str, Verdict] = {}
    asked, solved = [], {item.cell: targets(chapter, item, submission.cells) for item in chapter.items}
    given = {cell: source for cell, source in chapter.given if cell}
    for item in chapter.items:
        cells, exercise = solved[item.cell], item.exercise
        if not cells:
            found[item.name] = _none(exercise, "missing", "the cell with the solution is not in the notebook")
        elif all(given.get(cell) == source for cell, source in (submission.cells[k] for k in cells)):
            found[item.name] = _none(exercise, "not attempted")
        else:
            drawn = _seed(seed, submission.digest, item.name)
            asked.append(Asked(item, cells, exercise.draw(drawn) if isinstance(exercise, Exercise) else []))
    asked.sort(key=lambda entry: isinstance(entry.item.exercise, Exercise))  # questions first: they take no time
    attempt = _Attempt(submission, chapter, box, limits, found, solved)
    prepared = time.monotonic()
    attempt.run(asked)
    for entry in asked:
        attempt.lend(entry)
    verdicts = {
        item.name: [
            found[item.name].status,
            found[item.name].points,
            float(item.exercise.points),
            found[item.name].text,
        ]
        for item in chapter.items
    }
    remarks = []
    for status in ("missing", "stopped"):
        names = [name for name, entry in verdicts.items() if entry[0] == status]
        remarks += [f"{status}: {', '.join(names)}"] if names else []
    seconds = {"preparing": prepared - began, "starting sandboxes": box.seconds - warming, "judging": attempt.judging}
    seconds["running"] = time.monotonic() - began - sum(seconds.values())
    return Grade(
        submission.name, chapter.number, chapter.title, points=float(sum(entry[1] for entry in verdicts.values())),
        out_of=chapter.points, verdicts=verdicts, remarks=remarks, seconds=seconds,
        uses=sorted({name for stated in attempt.stated.values() for name in stated["uses"]}),
    )  # fmt: skip


def _seed(run: str, *parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join((run, *parts)).encode()).digest()[:8]) >> 1


@dataclass
class _Attempt:
    """A submission on its way through a sandbox."""

    submission: Submission
    chapter: Chapter
    box: Sandbox
    limits: Limits
    found: dict[str, Verdict]  # by exercise
    solved: dict[str, list[int]]  # by grade id of the check: the student's cells with the solution
    stated: dict[str, dict] = field(default_factory=dict)  # by exercise: what it uses, see `read_stated`
    judging: float = 0.0  # seconds
    running: float = 0.0  # seconds in a sandbox, its start aside

    def left(self) -> float:
        """Seconds of the submission's budget."""
        return self.limits.total - self.running

    def run(self, asked: Sequence[Asked], lent: Sequence[Item] = ()) -> None:
        """Find a verdict for each."""
        while asked:
            todo, asked, position = asked, [], 0
            began, judged, warming = time.monotonic(), self.judging, self.box.seconds
            try:
                for said in self.box.run(self._request(todo, lent)):
                    item, _, cases = todo[position]
                    position += 1
                    came = time.monotonic()
                    self.stated[item.name] = read_stated(said.body)
                    if said.status == "ok":
                        self.found[item.name] = verdict(item, cases, said.body)
                    else:
                        self.found[item.name] = stopped(item.exercise, said.status, self.limits)
                    self.judging += time.monotonic() - came
            except Lost:
                if position < len(todo):
                    item = todo[position].item
                    self.found[item.name] = stopped(item.exercise, "lost", self.limits)
                    asked = todo[position + 1 :]
            own = self.judging - judged + self.box.seconds - warming
            self.running += time.monotonic() - began - own

    def lend(self, entry: Asked) -> None:
        """A second try for an exercise that builds on earlier ones which have not passed, with right ones instead.

        So does the notebook: its check hands on a working function either way. Those exercises are graded already; and
        what this process may say, now that it holds their answers, is its status: no word of it reaches the feedback.
        """
        item, first = entry.item, self.found[entry.item.name]
        if first.status == "passed" or self.left() <= 0 or not isinstance(item.exercise, Exercise):
            return
        text = "\n".join(self.submission.cells[k][1] for k in entry.cells)
        needs = {answers(cell) for cell in self.stated.get(item.name, {}).get("needs", [])}
        lent = [
            other
            for other in self.chapter.items
            if other.position < item.position and isinstance(other.exercise, Exercise)
            and self.found[other.name].status != "passed"
            and (other.cell in needs or re.search(rf"\b{other.expression}\b", text))
        ]  # fmt: skip
        if not lent:
            return
        self.run([entry], lent)
        names, points = ", ".join(other.name for other in lent), item.exercise.points
        if self.found[item.name].status == "passed":
            text = f"passed, {points:g} of {points:g} points, with a right {names} in place of yours."
            self.found[item.name] = self.found[item.name]._replace(text=f"{item.name}: {text}")
        else:
            note = f"It builds on {names}, which has not passed; with a right one in its place it does not pass either."
            self.found[item.name] = first._replace(text=f"{first.text}\n  {note}")

    def _request(self, asked: Sequence[Asked], lent: Sequence[Item]) -> dict:
        items, packer = [], Packer([] if lent else _answers(self.chapter))
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
            "given": self.chapter.given, "own": self.submission.cells, "items": items, "functions": packer.functions,
            "names": {item.cell: item.expression for item in self.chapter.items}, "solved": self.solved,
            "lent": [[other.cell, other.expression, packer.pack(other.exercise.reference)] for other in lent],
            "limits": asdict(self.limits) | {"total": max(self.left(), 0.0)},
        }  # fmt: skip


def _answers(chapter: Chapter) -> list[Callable]:
    known = [exercise for exercise in registered(chapter.number) if isinstance(exercise, Exercise)]
    return [f for exercise in known for f in (exercise.reference, *exercise.mistakes.values())]


# ---------------------------------------------------------------------------------- the run


def grade_all(
    submissions: Path, out: Path, notebooks: Path, *, chapter: str | None = None, jobs: int | None = None,
    isolation: str = "auto", limits: Limits = Limits(), seed: str | None = None, echo: Callable = print,
    progress: bool = False, hide: Sequence[Path] = (), by_hand: Path | None = None, form: str | None = None,
    roster: Path | None = None,
) -> list[Grade]:  # fmt: skip
    """Grade a notebook or every notebook in a folder, and write `out` and the folder beside it, named after it.

    `out`, say grades.csv, has a line a submission; grades/ holds feedback/, summary.html and results/, from which a
    run that was stopped goes on. `chapter` refuses the notebooks of others. `hide`: folders that hold answers.
    `by_hand`: a table of points that replace the grader's, see `overrides.py`. `form`, with the platform's `roster` of
    the class: also a table that the platform takes, see `formats.py`.
    """
    submissions, out = Path(submissions), Path(out)
    if (form is None) != (roster is None):
        raise ValueError("--format and --roster go together: which platform, and its export of the class.")
    students = formats.read_roster(roster, form) if form else []
    folder = out.with_suffix("")
    if folder == out:
        raise ValueError(f"--out {out} needs a suffix, as in grades.csv; the folder beside it is named after it.")
    if submissions.is_dir() and folder.resolve().is_relative_to(submissions.resolve()):
        raise ValueError(
            f"--out {out} puts {folder}/results among the submissions, where one may hand it in: choose another place."
        )
    chapters = load_chapters(notebooks)
    if chapter is not None and chapter not in chapters:
        raise ValueError(f"no chapter {chapter!r} in {notebooks}. There are: {', '.join(chapters)}.")
    paths, ignored, unread = collect(submissions)
    for part in ("results", "feedback"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    hidden = [Path(p) for p in (folder, submissions, notebooks, *hide)]
    kind, warning = walls.isolation(isolation, hidden)
    if warning:
        echo(f"warning: {warning}")
    seed = kept.seed(folder, seed)
    began = time.monotonic()
    read = [read_submission(path, name) for name, path in paths.items()] + unread
    read.sort(key=lambda submission: submission.name)
    given = overrides.read(by_hand, read, chapters) if by_hand else {}
    grades, todo = _sorted(read, chapters, chapter, [seed, asdict(limits)], folder)
    if todo and grades:
        echo(f"{len(read)} submissions; {len(todo)} to grade, the others need no run")
    reading = time.monotonic() - began
    for done in _run(todo, kind, hidden, seed, limits, jobs, progress, folder):
        grades[done.submission] = done
    ordered = [overrides.apply(grades[one.name], given.get(one.name, {}), chapters) for one in read]
    answered = [(one, chapters[grades[one.name].chapter]) for one in read if grades[one.name].chapter]
    for grade in ordered:
        kept.write(folder / "feedback" / f"{slug(grade.submission)}.html", gradebook.feedback(grade))
    took = time.monotonic() - began
    run = Run(
        ordered, chapters, ignored, kind, warning, seconds=took, reading=reading, graded=len(todo),
        alike=similar.alike(answered),
    )  # fmt: skip
    kept.write(folder / "summary.html", gradebook.summary(run))
    kept.write(out, gradebook.table(ordered, chapters))
    if form:
        table, notes = formats.export(form, students, ordered, chapters)
        kept.write(out.with_name(f"{out.stem}-{form}.csv"), table)
        for note in notes:
            echo(f"{form}: {note}")
    echo(gradebook.report(run, str(out), str(folder)))
    return ordered


def _sorted(
    read: Sequence[Submission], chapters: Mapping[str, Chapter], chapter: str | None, settings: list, folder: Path
) -> tuple[dict[str, Grade], list[tuple[Submission, Chapter, str]]]:
    """Those that have a grade already, or can have none; those to run, with the key that their result is kept under."""
    grades, todo = {}, []
    for submission in read:
        try:
            if submission.problem:
                raise Unreadable(submission.problem)
            found = recognise(submission, chapters)
            if chapter not in (None, found.number):
                raise Unreadable(f"this is chapter {found.number}; chapter {chapter} was asked for")
        except Unreadable as problem:
            out_of = chapters[chapter].points if chapter else 0.0
            grades[submission.name] = Grade(submission.name, out_of=out_of, remarks=[str(problem)])
            continue
        key = sha256(json.dumps([found.fingerprint, settings, submission.digest, submission.name]).encode())
        if known := kept.load(folder, submission, key):
            grades[submission.name] = known
        else:
            todo.append((submission, found, key))
    return grades, todo


def _run(todo, kind, hidden, seed, limits, jobs, progress, folder):
    """Grades as they are finished, one thread and one sandbox a core."""
    from tqdm import tqdm

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, min(jobs or cores, len(todo)))
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
        kept.store(folder, grade, key)
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
