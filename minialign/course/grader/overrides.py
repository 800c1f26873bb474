"""Points that the instructor gives by hand, in a table of one's own: they stand whatever the grader finds next time.

submission,exercise,points,reason
"anna.ipynb","10/step_kl","3","right up to a sign in the docstring"

read(path, submissions, chapters)       {submission: {exercise: (points, reason)}}; ValueError says what is wrong
apply(grade, own, chapters)             the grade with them
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from minialign.course.grader.gradebook import BY_HAND, Grade, cell
from minialign.course.grader.submission import Chapter, Submission, recognise
from minialign.course.grader.wire import Unreadable

COLUMNS = ("submission", "exercise", "points")


def read(
    path: Path, submissions: Sequence[Submission], chapters: Mapping[str, Chapter]
) -> dict[str, dict[str, tuple[float, str]]]:
    """Names of submissions as the files are called, or as grades.csv spells them."""
    called = {cell(one.name): one.name for one in submissions} | {one.name: one.name for one in submissions}
    worth = {item.name: float(item.exercise.points) for chapter in chapters.values() for item in chapter.items}
    by_name, chapter_of = {one.name: one for one in submissions}, {}
    found: dict[str, dict[str, tuple[float, str]]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the column {missing[0]!r}; expected {', '.join(COLUMNS)}, reason.")
        for number, row in enumerate(reader, 2):
            name, exercise, points = (row[column] or "" for column in COLUMNS)
            for what, value, known in (("submission", name, called), ("exercise", exercise, worth)):
                if value not in known:
                    near = "".join(f" Did you mean {other!r}?" for other in get_close_matches(value, known, 1))
                    raise ValueError(f"{path}, line {number}: no {what} {value!r}.{near}")
            if called[name] in found and exercise in found[called[name]]:
                raise ValueError(f"{path}, line {number}: {exercise} of {name} stands there twice.")
            asked = exercise.partition("/")[0]
            own = chapter_of.setdefault(called[name], _chapter(by_name[called[name]], chapters) or asked)
            if asked != own:
                raise ValueError(f"{path}, line {number}: {name} is of chapter {own}, {exercise} is not.")
            value = _number(points)
            if not 0 <= value <= worth[exercise]:
                most = f"{worth[exercise]:g}"
                raise ValueError(f"{path}, line {number}: points {points!r}; expected a number from 0 to {most}.")
            found.setdefault(called[name], {})[exercise] = value, row.get("reason") or ""
    return found


def _chapter(submission: Submission, chapters: Mapping[str, Chapter]) -> str:
    try:
        return recognise(submission, chapters).number
    except Unreadable:
        return ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def apply(grade: Grade, own: Mapping[str, tuple[float, str]], chapters: Mapping[str, Chapter]) -> Grade:
    """Also where there was no grade: the exercise says which chapter it is; the others then have no points."""
    if not own:
        return grade
    chapter = chapters[next(iter(own)).partition("/")[0]]
    none = {item.name: ["missing", 0.0, float(item.exercise.points), ""] for item in chapter.items}
    verdicts = none | grade.verdicts
    for exercise, (points, reason) in own.items():
        _, before, worth, text = verdicts[exercise]
        said = f"{exercise}: {BY_HAND}, {points:g} of {worth:g} points. {reason}\n"
        verdicts[exercise] = [BY_HAND, points, worth, f"{said}  Before: {before:g}. {text}".rstrip()]
    remarks = [*grade.remarks, f"{BY_HAND}: {', '.join(own)}"]
    return replace(
        grade, chapter=chapter.number, title=chapter.title, out_of=chapter.points, verdicts=verdicts, remarks=remarks,
        points=float(sum(entry[1] for entry in verdicts.values())),
    )  # fmt: skip
