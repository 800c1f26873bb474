"""The grader's parts that need no sandbox: what is read, what is kept, what a teacher gets."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minialign.course import Exercise, Quiz
from minialign.course.check import registered
from minialign.course.grader import formats, grade, gradebook, needed, overrides, sandbox, scratch, similar, worker
from minialign.course.grader.gradebook import Grade, Run
from minialign.course.grader.submission import Chapter, Item, Submission, collect, read_submission

# ---------------------------------------------------------------------------------- a chapter

STEP = Exercise("98/step", points=3, reference=torch.exp, cases=[dict(x=torch.ones(1))], mistakes={"no.": torch.sin})
ASK = Quiz("98/q1", points=1, answer="b", why={"a": "Tempting, but no.", "b": "Yes: it is."})
GIVEN = (("98-step-answer", "def step(x):\n    # YOUR CODE HERE"), ("98-step", 'check("98/step", step)'))
CHAPTER = Chapter("98", "98_steps", GIVEN, (Item(STEP, "98-step", "step", 1), Item(ASK, "98-q1", "q1", 3)), "")
CHAPTERS = {"98": CHAPTER}


def handed_in(name, answer="def step(x):\n    return x.exp()"):
    return Submission(name, (("98-step-answer", answer), GIVEN[1], ("98-q1-answer", 'q1 = "b"')), digest=name)


def graded(name, points=3.0, text="98/step: passed, 3 of 3 points (1 cases).", letter="b"):
    asked = ["passed" if letter == "b" else "wrong", float(letter == "b"), 1.0]
    asked.append(f"98/q1: {asked[0]}, {asked[1]:g} of 1 points.\n  {ASK.why[letter]}")
    verdicts = {"98/step": ["passed" if points else "wrong", points, 3.0, text], "98/q1": asked}
    return Grade(name, "98", "98_steps", points + asked[1], 4.0, verdicts)


def notebook(*sources, outputs=()):
    cells = [{"cell_type": "code", "source": s, "metadata": {}, "outputs": list(outputs)} for s in sources]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})


# ---------------------------------------------------------------------------------- what is read


def test_fifty_megabytes_of_pictures_are_no_reason_to_refuse(tmp_path):
    path = tmp_path / "one.ipynb"
    path.write_text(notebook("x = 1", outputs=["A" * (50 << 20)]))
    assert read_submission(path).cells == ((None, "x = 1"),)
    path.write_text('{"nbformat": 4, "cells": [' + "[]," * 2_000_001 + "[]]}")  # and as objects, a gigabyte
    assert read_submission(path).problem == "not a notebook: too many values"
    with open(path, "wb") as file:
        file.truncate(65 << 20)
    assert "68 MB; a notebook has at most 67 MB" in read_submission(path).problem


def test_what_browsers_call_a_notebook_is_one_and_a_closed_folder_has_a_row(tmp_path, monkeypatch):
    for name in ("a.ipynb", "b.IPYNB", "c.ipynb.txt", "d.ipynb.json", "e.txt", "._f.ipynb", "closed/g.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(notebook("x"))
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    paths, ignored, unread = collect(tmp_path)
    assert list(paths) == ["a.ipynb", "b.IPYNB", "c.ipynb.txt", "d.ipynb.json"] and ignored == ["._f.ipynb", "e.txt"]
    [closed] = unread
    assert (closed.name, closed.problem) == ("closed", "a folder that cannot be read: Permission denied")
    run = Run([graded("a.ipynb"), Grade("closed", remarks=[closed.problem])], CHAPTERS, ignored, "", "", 1.0, 1.0, 1)
    told = gradebook.report(run, "grades.csv", "grades")
    assert "1 could not be graded; grades.csv says why: closed" in told
    assert "2 other files are no notebooks: ._f.ipynb, e.txt" in told


def test_results_that_may_have_been_handed_in_are_not_believed(tmp_path):
    for out in ("class/grades.csv", "class.csv", "class/of/grades.csv"):  # class.csv puts its results in class/
        (tmp_path / "class").mkdir(exist_ok=True)
        (tmp_path / "class/a.ipynb").write_text(notebook("x"))
        with pytest.raises(ValueError, match="where one may hand it in"):
            grade.grade_all(tmp_path / "class", tmp_path / out, Path(__file__).parents[3] / "notebooks")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.ipynb", "class"]  # and nothing was spent


@pytest.mark.parametrize("limit", ["seconds", "wall", "total", "memory", "output", "files", "processes"])
def test_a_limit_that_lets_nobody_pass_is_refused(limit):
    with pytest.raises(ValueError, match=f"a limit of {limit}=0 lets nobody pass"):
        sandbox.Limits(**{limit: 0})


def imports(*sources):
    own = [("98-step-answer", source) for source in sources]
    return {name for s in needed.needed(GIVEN, own, range(len(own)), 1) for name in s.imports.split()}


def test_the_imports_column_sees_roundabout_ways():
    assert imports("from minialign.kernels import Level\nimport minialign.methods.ddpo as d") == {
        "minialign.kernels.Level", "minialign.methods.ddpo",
    }  # fmt: skip
    assert imports("def step(x):\n    return __import__('minialign.kernels').kernels") == {
        "__import__", "minialign.kernels",
    }  # fmt: skip
    assert imports("import importlib\nimportlib.import_module('mini' + 'align')") == {"importlib", "import_module"}
    assert imports("from importlib import import_module as get") == {"importlib.import_module"}
    assert imports("import sys\nsys.modules['minialign.kernels']") == {"sys.modules", "minialign.kernels"}
    assert imports("from sys import modules") == {"sys.modules"}
    assert imports("from minialign.course import check\n'about minialign'\nmodules = 5") == set()


def test_magics_are_passed_over_where_the_parser_meets_them_and_nowhere_else():
    source = 'text = """\n%d\n!"""\nn = (7\n% 4)\nlen?\nif n:\n    %time m = n\nfiles = !ls\n?len\nawait n\nlast = n'
    scope = {}
    for statement in needed._statements(source, (1, 0, 0), "cell"):
        exec(compile(statement.code, "", "exec"), scope)
    assert scope["text"] == "\n%d\n!" and (scope["n"], scope["m"], scope["last"], scope["files"]) == (3, 3, 3, None)
    assert needed._statements("%%bash\nls | wc -l", (1, 1, 0), "cell")[1:]  # which Python can read, as it happens
    assert needed._statements("%%bash\nfor f in *; do rm $f; done", (1, 2, 0), "cell") == []


# ---------------------------------------------------------------------------------- what a sandbox leaves


def test_the_processor_s_limit_is_told_from_a_crash():
    """On a busy machine the kernel's two clocks disagree: the limit's says 10 s where the report says 6."""
    assert worker._overran(-signal.SIGXCPU, 0.2, 10) and worker._overran(-signal.SIGKILL, 6.0, 10)
    assert not worker._overran(-signal.SIGKILL, 0.2, 10) and not worker._overran(-signal.SIGSEGV, 9.9, 10)
    assert not worker._overran(1, 9.9, 10)


def test_a_folder_is_emptied_however_deep_and_closed(tmp_path):
    here = os.getcwd()
    (tmp_path / "files").mkdir()
    os.chdir(tmp_path / "files")
    try:
        for _ in range(1100):  # beyond a path's length, and beyond what can be called recursively
            os.mkdir("deep")
            Path("file").touch()
            os.chdir("deep")
        os.mkdir("closed", 0)
    finally:
        os.chdir(here)
    assert scratch.overfull(str(tmp_path / "files"), 1 << 20)
    scratch.empty(str(tmp_path / "files"))
    assert os.listdir(tmp_path / "files") == [] and not scratch.overfull(str(tmp_path / "files"), 1)
    (tmp_path / "files/one").write_bytes(bytes(5000))
    assert scratch.overfull(str(tmp_path / "files"), 4000) and not scratch.overfull(str(tmp_path / "files"), 10000)


SLEEPER = """
import ctypes, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # not to be ended with its parent
open("started", "w").close()
time.sleep(600)
"""
KILLED = """
from dataclasses import asdict
from minialign.course.grader import sandbox
box = sandbox.Sandbox("subprocess", inner={inner})
item = dict(expression="value", targets=[0], position=0, cases=[], grad_wrt=[])
request = dict(given=[], own=[["a", {source!r}]], items=[item], functions=[], lent=[], names={{}}, solved={{}})
list(box.run(request | dict(limits=asdict(sandbox.Limits(wall=600, total=600)))))
"""


@pytest.mark.parametrize("inner", [True, False])
def test_a_killed_grader_leaves_nobody_behind(tmp_path, inner):
    """Nor a submission that asks the kernel to be left alone; with no libseccomp to refuse that, its server ends it."""
    if sys.platform != "linux":
        pytest.skip("no prctl")
    script = KILLED.format(inner=inner, source=SLEEPER)
    root = Path(__file__).parents[3]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(root)}
    first = subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=root)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*/files-*/started")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert first.poll() is None
    first.kill()
    first.wait()
    for _ in range(100):
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
        if not left:
            break
        time.sleep(0.05)
    for path in left:  # a test that fails leaves nobody either
        os.kill(int(path.parent.name), signal.SIGKILL)
    assert left == []


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


# ---------------------------------------------------------------------------------- tables


def test_every_cell_is_quoted_and_none_is_a_formula_wherever_it_is_split():
    odd = {
        "a;=1+1": "a;'=1+1",
        "a;\t@x": r"a;\t@x",
        "a; -1": "a; '-1",
        'a;"=1': "a;\"'=1",
        "a\t=1": r"a\t=1",
        "-": "'-",
    }
    for name, shown in odd.items():
        assert gradebook.cell(name) == shown
    table = gradebook.table([graded("a,b;=1.ipynb")], CHAPTERS)
    assert table.splitlines()[1] == '''"a,b;'=1.ipynb","98_steps","4","4","3","1","",""'''
    assert all(line.count('"') == 16 for line in table.splitlines())


def by_hand(tmp_path, text):
    (tmp_path / "by_hand.csv").write_text(text)
    submissions = [handed_in("a.ipynb"), handed_in("=1.ipynb"), Submission("scan.ipynb", problem="not JSON")]
    return overrides.read(tmp_path / "by_hand.csv", submissions, CHAPTERS | {"97": CHAPTER_97})


CHAPTER_97 = Chapter("97", "97", (), (Item(Quiz("97/q1", points=1, answer="a", why={}), "97-q1", "q1", 0),), "")


def test_points_by_hand_stand(tmp_path):
    rows = 'submission,exercise,points,reason\na.ipynb,98/step,2.5,"nearly; <b>"\n\'=1.ipynb,98/q1,0,\n'
    given = by_hand(tmp_path, rows + "scan.ipynb,98/q1,1,on paper\n")
    assert given == {
        "a.ipynb": {"98/step": (2.5, "nearly; <b>")}, "=1.ipynb": {"98/q1": (0.0, "")},
        "scan.ipynb": {"98/q1": (1.0, "on paper")},
    }  # fmt: skip
    before = graded("a.ipynb", 0.0, "98/step: wrong, 0 of 3 points. The smallest")
    after = overrides.apply(before, given["a.ipynb"], CHAPTERS)
    assert (after.points, after.remarks) == (3.5, ["by hand: 98/step"]) and before.points == 1.0
    assert after.verdicts["98/step"][:3] == ["by hand", 2.5, 3.0]
    page = gradebook.feedback(after)
    assert "nearly; &lt;b&gt;\n  Before: 0. 98/step: wrong" in page and '<section class="by">' in page
    scan = overrides.apply(Grade("scan.ipynb", remarks=["not JSON"]), given["scan.ipynb"], CHAPTERS)
    assert (scan.title, scan.points, scan.out_of) == ("98_steps", 1.0, 4.0)
    assert overrides.apply(before, {}, CHAPTERS) is before


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("b.ipynb,98/step,1", "line 2: no submission 'b.ipynb'. Did you mean 'a.ipynb'?"),
        ("a.ipynb,98/stop,1", "line 2: no exercise '98/stop'. Did you mean '98/step'?"),
        ("a.ipynb,98/step,4", "points '4'; expected a number from 0 to 3"),
        ("a.ipynb,98/step,nan", "points 'nan'"),
        ("a.ipynb,98/step,", "points ''"),
        ("a.ipynb,98/step,1\na.ipynb,98/step,2", "line 3: 98/step of a.ipynb stands there twice"),
        ("a.ipynb,97/q1,1", "a.ipynb is of chapter 98, 97/q1 is not"),
        ("scan.ipynb,97/q1,1\nscan.ipynb,98/q1,1", "scan.ipynb is of chapter 97, 98/q1 is not"),
    ],
)
def test_a_mistake_in_the_points_by_hand_is_named_before_anything_is_graded(tmp_path, row, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        by_hand(tmp_path, f"submission,exercise,points\n{row}\n")
    with pytest.raises(ValueError, match="lacks the column 'points'"):
        by_hand(tmp_path, "submission,exercise\n")


CANVAS = """\ufeffStudent,ID,SIS User ID,SIS Login ID,Section,Homework (12)
    Points Possible,,,,,10
"Doe, Jane",4711,s1,jdoe,A,
"Roe, Jo",99,s2,jroe,A,
"Núñez, Ana",4713,s3,ana,A,
"""
MOODLE = """First name;Last name;ID number;Email address
Jane;Doe;s1;jane@example.org
Jo;Roe;s2;jo@example.org
"""


def exported(tmp_path, form, roster, *grades):
    (tmp_path / "roster.csv").write_text(roster, encoding="utf-8")
    table, notes = formats.export(form, formats.read_roster(tmp_path / "roster.csv", form), grades, CHAPTERS)
    return [row for row in csv.reader(table.splitlines())], notes


def test_canvas_takes_the_table_back(tmp_path):
    """99 is a submission's number here, and another student's own."""
    rows, notes = exported(
        tmp_path, "canvas", CANVAS, graded("doejane_4711_99_my 4713.ipynb"), graded("roejo_LATE_99_5_x.ipynb", 0.0),
        graded("nobody_1_2_x.ipynb"), graded("doejane_4711_100_b.ipynb", 0.0), graded("work of s3.ipynb", 2.0),
    )  # fmt: skip
    assert rows == [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "98_steps"],
        ["Points Possible", "", "", "", "", "4"],
        ["Doe, Jane", "4711", "s1", "jdoe", "A", "4"],
        ["Roe, Jo", "99", "s2", "jroe", "A", "1"],
        ["Núñez, Ana", "4713", "s3", "ana", "A", "3"],
    ]
    assert notes == [
        "nobody_1_2_x.ipynb fits no student",
        "doejane_4711_100_b.ipynb is a second submission of one student; the better one counts",
    ]


def test_moodle_takes_the_table_back(tmp_path):
    rows, notes = exported(
        tmp_path, "moodle", MOODLE, graded("Jane Doe_12_assignsubmission_file/s2.ipynb"), graded("s2/a.ipynb", 0.0),
        graded("s1 s2.ipynb"),
    )  # fmt: skip
    assert rows == [
        ["First name", "Last name", "ID number", "Email address", "98_steps"],
        ["Jane", "Doe", "s1", "jane@example.org", "4"],
        ["Jo", "Roe", "s2", "jo@example.org", "1"],
    ]
    assert notes == ["s1 s2.ipynb fits 2 students"]


def test_a_roster_that_the_platform_would_not_know_is_refused(tmp_path):
    for form, text, problem in (
        ("canvas", "Student,ID\nx,1\n", "no Canvas roster: it lacks a column; expected Student, ID"),
        ("moodle", "First name\nJane\n", "no Moodle roster: it lacks a column; expected ID number or"),
        ("moodle", "ID number\n", "names no student"),
        ("blackboard", "ID\n", "unknown format 'blackboard'"),
    ):
        with pytest.raises(ValueError, match=problem):
            exported(tmp_path, form, text)
    with pytest.raises(ValueError, match="--format and --roster go together"):
        grade.grade_all(tmp_path, tmp_path / "g.csv", Path(__file__).parents[3] / "notebooks", form="canvas")


# ---------------------------------------------------------------------------------- the instructor's page

LONG = """def step(x):
    total = torch.zeros_like(x)
    for power in range(30):
        term = x**power / math.factorial(power)
        total = total + term  # the series, term by term
    return total"""


def test_copied_answers_are_flagged_and_a_formula_that_everybody_finds_is_not():
    renamed = LONG.replace("total", "acc").replace("power", "k").replace("  # the series, term by term", "")
    other = LONG.replace("x**power / math.factorial(power)", "(power * x.log() - math.lgamma(power + 1)).exp()")
    answers = {"a": LONG, "b": renamed, "c": other, "d": LONG, "e": None, "f": None}
    submissions = [handed_in(name, answer) if answer else handed_in(name) for name, answer in answers.items()]
    alike = similar.alike([(submission, CHAPTER) for submission in submissions])
    assert alike == [("98/step", "byte for byte", ["a", "d"]), ("98/step", "nearly", ["a", "b", "d"])]
    many = [handed_in(f"{k}", LONG + f"  # {k}") for k in range(60)]
    assert similar.alike([(submission, CHAPTER) for submission in many]) == []
    twice = [Submission(name, (), digest="same") for name in "ab"]
    assert similar.alike([(submission, CHAPTER) for submission in twice]) == [
        ("the whole file", "byte for byte", ["a", "b"])
    ]


def test_the_instructor_sees_which_hints_and_options_were_common():
    hint = (
        "98/step: wrong, 0 of 3 points.\n  Your function raised ValueError: Hint: x\n  Hint: x < 0 <b>.\n  It builds on"
    )
    grades = [graded("a", 0.0, hint), graded("b", 0.0, hint), graded("c", letter="a"), graded("d")]
    alike = [("98/step", "nearly", ["a", "b"])]
    page = gradebook.summary(Run(grades, CHAPTERS, [], "", "", 1.0, 1.0, 4, alike=alike))
    assert '<td>98/step</td><td>x &lt; 0 &lt;b&gt;.</td><td class="n">2</td>' in page
    assert '<td>98/q1</td><td>a</td><td class="n">1</td>' in page
    assert '<td>98/q1</td><td>b (right)</td><td class="n">3</td>' in page
    assert "Answers alike" in page and page.count('href="feedback/b-') == 2


def test_every_exercise_has_inputs_that_nobody_knows_beforehand():
    exercises = [e for n in range(100) for e in registered(f"{n:02d}") if isinstance(e, Exercise)]
    assert len(exercises) > 50
    draws = {e.name: [str(e.draw(seed)) for seed in (1, 2, 1)] for e in exercises}
    assert [name for name, (one, other, _) in draws.items() if one == other] == []
    assert [name for name, (one, _, again) in draws.items() if one != again] == []
