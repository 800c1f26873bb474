"""The real nbgrader, its three commands as they are, in a scratch course whose source is our complete edition."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from minialign.course.build import STUB, SUFFIX
from minialign.course.check import registered

pytest.importorskip("nbgrader")
ROOT = Path(__file__).parents[2]
CHAPTER = os.environ.get("MINIALIGN_CHAPTER", "01_diffusion_as_a_policy")  # any other is tried with this variable
CONFIG = f"""c = get_config()
c.CourseDirectory.course_id = "minialign"
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
c.ExecutePreprocessor.timeout = 600
"""


def nbgrader(course, *arguments):
    """Run one command; its output, or a failure that shows it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with one assignment, released, submitted by two students, graded, with feedback."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "nbgrader_config.py").write_text(CONFIG)
    (folder / "source/one").mkdir(parents=True)
    shutil.copy(ROOT / f"solutions/{CHAPTER}.ipynb", folder / "source/one")
    nbgrader(folder, "generate_assignment", "one", "--create")
    complete = nbformat.read(ROOT / f"solutions/{CHAPTER}.ipynb", as_version=4)
    empty = nbformat.read(folder / f"release/one/{CHAPTER}.ipynb", as_version=4)
    one, first = copy.deepcopy(empty), True
    for cell, solved in zip(one.cells, complete.cells, strict=True):  # the first exercise alone
        if cell.metadata.get("nbgrader", {}).get("solution") and first:
            cell.source, first = solved.source, False
    for student, notebook in {"all": complete, "one": one}.items():
        (folder / f"submitted/{student}/one").mkdir(parents=True)
        nbformat.write(notebook, folder / f"submitted/{student}/one/{CHAPTER}.ipynb")
    nbgrader(folder, "autograde", "one", "--create")
    nbgrader(folder, "generate_feedback", "one")
    return folder


def test_its_release_is_our_students_edition(course):
    ours = nbformat.read(ROOT / f"notebooks/{CHAPTER}.ipynb", as_version=4)
    theirs = nbformat.read(course / f"release/one/{CHAPTER}.ipynb", as_version=4)
    solved = nbformat.read(ROOT / f"solutions/{CHAPTER}.ipynb", as_version=4)
    for_teachers = {cell.id for cell in solved.cells if "solution" in cell.metadata.get("tags", ())}
    theirs.cells = [
        cell for cell in theirs.cells if cell.id not in for_teachers
    ]  # ours leaves explanations out as well
    assert [cell.id for cell in theirs.cells] == [cell.id for cell in ours.cells]
    assert [c.source.replace(SUFFIX, "") for c in theirs.cells] == [c.source for c in ours.cells]
    for their, our in zip(theirs.cells, ours.cells, strict=True):
        keys = ("grade", "grade_id", "points", "solution", "locked")
        assert all(
            their.metadata.get("nbgrader", {}).get(key) == our.metadata.get("nbgrader", {}).get(key) for key in keys
        )


def test_its_grades_are_the_points_of_our_checks(course):
    from nbgrader.api import Gradebook

    most = sum(entry.points for entry in registered(CHAPTER[:2]))
    cells = nbformat.read(course / f"release/one/{CHAPTER}.ipynb", as_version=4).cells
    first = next(c.metadata.nbgrader.points for c in cells if c.metadata.get("nbgrader", {}).get("grade"))
    with Gradebook(f"sqlite:///{course}/gradebook.db") as book:
        scores = {s.student.id: (s.score, s.max_score) for s in book.assignment_submissions("one")}
        needed = [s.student.id for s in book.assignment_submissions("one") if s.needs_manual_grade]
    assert scores == {"all": (most, most), "one": (first, most)} and 0 < first < most and needed == []


def test_its_feedback_is_written_for_everybody(course):
    for student in ("all", "one"):
        page = (course / f"feedback/{student}/one/{CHAPTER}.html").read_text()
        assert ("not attempted yet" in page) == (student == "one") and "Score" in page
