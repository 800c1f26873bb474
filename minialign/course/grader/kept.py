"""What a run keeps on disk, so that one that was stopped goes on: the seed, and each grade as it is found.

seed(folder, given)                     of the run: drawn at its first start
load(folder, submission, key), store    a grade, with a hash of all that it depends on
write(path, text)                       whole or not at all
"""

import json
import os
import secrets
from pathlib import Path

from minialign.course.grader.gradebook import Grade, slug
from minialign.course.grader.submission import Submission


def seed(folder: Path, given: str | None) -> str:
    path = folder / "results" / "seed.txt"
    if given is None and path.exists():
        return path.read_text().strip()
    drawn = secrets.token_hex(16) if given is None else given
    write(path, drawn + "\n")
    return drawn


def load(folder: Path, submission: Submission, key: str) -> Grade | None:
    """The grade of an earlier run, if it would come out the same."""
    try:
        kept = json.loads((folder / "results" / f"{slug(submission.name)}.json").read_text(encoding="utf-8"))
        return Grade(**kept["grade"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(folder: Path, grade: Grade, key: str) -> None:
    kept = {"key": key, "grade": vars(grade)}
    write(folder / "results" / f"{slug(grade.submission)}.json", json.dumps(kept, indent=1))


def write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    os.replace(partial, path)
