"""Grades with the ids of a learning platform: a table that Canvas or Moodle takes back in.

    read_roster(path, form)                 the platform's own export of the class: a row a student
    export(form, roster, grades, chapters)  (the table, whom it could not place)

Whose a submission is, its file's name says, as the platform itself wrote it on downloading: Canvas
`doejane_4711_99_my file.ipynb`, where 4711 is the student's ID; Moodle `Jane Doe_99_assignsubmission_file/my
file.ipynb`. Of other names, any part between `_`, `/` and spaces may be an id or a login.
"""

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from minialign.course.grader.gradebook import Grade, comma_separated, visible
from minialign.course.grader.submission import NOTEBOOK, Chapter

CANVAS = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section")
IDS = {"canvas": CANVAS[1:4], "moodle": ("ID number", "Email address", "Username")}
FORMS = tuple(IDS)
CANVAS_NAME = re.compile(r"([^_/]+)(?:_LATE)?_(\d+)_\d+_")
MOODLE_NAME = re.compile(r"([^_/]+)_\d+_assignsubmission")


def read_roster(path: Path, form: str) -> list[dict[str, str]]:
    """The class. ValueError if a column is missing without which the platform finds nobody."""
    if form not in FORMS:
        raise ValueError(f"unknown format {form!r}. There are: {', '.join(FORMS)}.")
    text = Path(path).read_text(encoding="utf-8-sig")
    header = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=";" if header.count(";") > header.count(",") else ",")
    columns = [name for name in reader.fieldnames or () if name]
    missing = [name for name in CANVAS if name not in columns] if form == "canvas" else []
    if missing or not set(IDS[form]) & set(columns):
        expected = ", ".join(CANVAS) if form == "canvas" else " or ".join(IDS[form])
        raise ValueError(f"{path} is no {form.capitalize()} roster: it lacks a column; expected {expected}.")
    rows = [{name: (row[name] or "").strip() for name in columns} for row in reader]
    rows = [row for row in rows if any(row.get(name) for name in IDS[form])]  # not the line "Points Possible"
    if not rows:
        raise ValueError(f"{path} names no student.")
    return rows


def export(
    form: str, roster: Sequence[Mapping[str, str]], grades: Sequence[Grade], chapters: Mapping[str, Chapter]
) -> tuple[str, list[str]]:
    """A row a student, a column a chapter; empty where nothing was handed in. Of two submissions the better counts."""
    known = [chapters[number] for number in sorted({grade.chapter for grade in grades if grade.chapter})]
    points: list[dict[str, float]] = [{} for _ in roster]
    notes = []
    for grade in grades:
        students = _whose(grade.submission, roster, form)
        if len(students) != 1:
            notes.append(f"{visible(grade.submission)} fits {len(students) or 'no'} student{'s' * bool(students)}")
            continue
        own = points[students[0]]
        if grade.title in own:
            notes.append(f"{visible(grade.submission)} is a second submission of one student; the better one counts")
        own[grade.title] = max(grade.points, own.get(grade.title, 0.0))
    columns = CANVAS if form == "canvas" else tuple(roster[0])
    rows = [[*columns, *(chapter.title for chapter in known)]]
    if form == "canvas":
        rows.append(["Points Possible", *[""] * (len(CANVAS) - 1), *(f"{chapter.points:g}" for chapter in known)])
    for student, own in zip(roster, points, strict=True):
        given = [f"{own[chapter.title]:g}" if chapter.title in own else "" for chapter in known]
        rows.append([*(student[column] for column in columns), *given])
    return comma_separated(rows), notes


def _whose(submission: str, roster: Sequence[Mapping[str, str]], form: str) -> list[int]:
    """Which students of the roster it may belong to: by an id, else by the name."""
    match = (CANVAS_NAME if form == "canvas" else MOODLE_NAME).match(submission)
    stem = NOTEBOOK.sub("", submission)
    parts = {part.casefold() for part in re.split(r"[/_\s]+", stem)}
    if match:
        parts = {match[2]} if form == "canvas" else set()
    by_id = [
        k for k, student in enumerate(roster) if parts & {student[i].casefold() for i in IDS[form] if student.get(i)}
    ]
    name = _letters(match[1] if match else stem)
    return by_id or [k for k, student in enumerate(roster) if name and name in _names(student)]


def _names(student: Mapping[str, str]) -> set[str]:
    """Doe, Jane; Jane Doe: as Canvas and Moodle write names of files."""
    first, last = student.get("First name", ""), student.get("Last name", student.get("Surname", ""))
    return {_letters(name) for name in (student.get("Student", ""), first + last, last + first)} - {""}


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalpha())
