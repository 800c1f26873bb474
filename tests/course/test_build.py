"""The builder: student's edition, nbgrader's metadata, drift and lint, on a chapter made here."""

import copy
import json
import sys
import types

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minialign.course.build import SUFFIX, annotate, build, build_all, drift, lint, run, save, student

DOUBLE = '''def double(x):
    """2 x."""
    ### BEGIN SOLUTION
    y = x + x
    return y
    ### END SOLUTION'''
CHECKED = 'double, points = check("98/double", double)\npoints'
CHAPTER_98 = """
from minialign.course.check import Exercise, Quiz


def double(x):
    return 2 * x


exercises = [Exercise("98/double", 2, double, [dict(x=1.5)]), Quiz("98/q1", 1, "b", {"a": "Tempting.", "b": "Yes."})]
"""


def sample():
    return new_notebook(
        cells=[
            new_markdown_cell(f"# 98 · Doubling{SUFFIX}\nText.", id="title"),
            new_code_cell("from minialign.course import check, quiz", id="imports"),
            new_markdown_cell("Exercise\n\nDifficulty 1/5 · Importance 5/5 · 5-10 min · 2 points", id="header"),
            new_code_cell(DOUBLE, id="double"),
            new_code_cell(CHECKED, id="check"),
            new_markdown_cell("Because 2 = 1 + 1.", id="why", metadata={"tags": ["solution"]}),
            new_code_cell('q1 = None  # "a" or "b"\n### BEGIN SOLUTION\nq1 = "b"\n### END SOLUTION', id="answer"),
            new_code_cell('quiz("98/q1", q1)', id="quiz"),
            new_code_cell("print(double(2.0))", id="on", metadata={"tags": ["nbval-check-output"]}),
        ]
    )


@pytest.fixture(autouse=True)
def chapter_98(monkeypatch):
    module = types.ModuleType("minialign.course.chapters.chapter_98")
    exec(CHAPTER_98, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def folders(tmp_path):
    save(annotate(sample()), tmp_path / "solutions" / "98_doubling.ipynb")
    return tmp_path / "solutions", tmp_path / "notebooks"


def with_cell(number, source):
    notebook = sample()
    notebook.cells[number].source = source
    return notebook


def errors(notebook, tmp_path):
    return lint(save(notebook, tmp_path / "98_doubling.ipynb"))[0]


def test_students_edition_has_stubs_and_no_answers():
    notebook = student(sample())
    assert [cell.id for cell in notebook.cells] == [
        "title", "imports", "header", "double", "check", "answer", "quiz", "on"
    ]  # fmt: skip
    assert notebook.cells[0].source == "# 98 · Doubling\nText."
    assert notebook.cells[3].source == 'def double(x):\n    """2 x."""\n    # YOUR CODE HERE'
    assert notebook.cells[5].source == 'q1 = None  # "a" or "b"\n# YOUR CODE HERE'
    assert notebook.cells[4].source == CHECKED
    nbformat.validate(notebook)


def test_metadata_follows_from_the_cells_and_pleases_nbgrader():
    notebook = annotate(sample())
    grader = {cell.id: cell.metadata.get("nbgrader") for cell in notebook.cells}
    assert grader["check"] == {
        "cell_type": "code", "grade": True, "grade_id": "98-double", "locked": True, "points": 2, "schema_version": 3,
        "solution": False, "task": False,
    }  # fmt: skip
    assert grader["double"]["grade_id"] == "98-double-answer"
    assert (grader["answer"]["grade_id"], grader["answer"]["solution"]) == ("98-q1-answer", True)
    assert grader["quiz"]["points"] == 1
    assert grader["on"] is grader["title"] is None
    assert annotate(copy.deepcopy(notebook)) == notebook
    formats = pytest.importorskip("nbgrader.nbgraderformat")
    formats.MetadataValidator().validate_nb(notebook)
    formats.MetadataValidator().validate_nb(student(notebook))


def test_two_solution_cells_before_one_check_have_two_ids():
    notebook = sample()
    notebook.cells.insert(3, new_code_cell("### BEGIN SOLUTION\nhelp = 1\n### END SOLUTION"))
    ids = [cell.metadata.nbgrader.grade_id for cell in annotate(notebook).cells if "nbgrader" in cell.metadata]
    assert len(ids) == len(set(ids)) == 5


def test_building_twice_gives_the_same_bytes_and_no_drift(folders):
    solutions, notebooks = folders
    (target,) = build_all(solutions, notebooks, execute=False, echo=lambda line: None)
    first = target.read_bytes()
    build(solutions / target.name, target, execute=False)
    assert target.read_bytes() == first
    assert drift(solutions, notebooks) == []
    with pytest.raises(ValueError, match=r"starts with '97'. There are: 98_doubling\."):
        build_all(solutions, notebooks, only="97")
    assert [path.name for path in notebooks.iterdir()] == ["98_doubling.ipynb"]  # nothing partial is left


def test_metadata_of_the_source_is_put_right(folders):
    solutions, notebooks = folders
    source = solutions / "98_doubling.ipynb"
    good = source.read_bytes()
    target = build(source, notebooks / source.name, execute=False)
    edited = sample()
    edited.metadata["language_info"] = {"name": "python", "version": "3.99"}
    save(edited, source)
    assert drift(solutions, notebooks) == [source.name]
    build(source, target, execute=False)
    assert source.read_bytes() == good
    assert drift(solutions, notebooks) == []


@pytest.mark.parametrize("change", ["source", "metadata", "missing", "left over"])
def test_drift_is_seen(folders, change):
    solutions, notebooks = folders
    target = build(solutions / "98_doubling.ipynb", notebooks / "98_doubling.ipynb", execute=False)
    notebook = nbformat.read(target, as_version=4)
    if change == "source":
        notebook.cells[-1].source += "\n"
    elif change == "metadata":
        notebook.cells[4].metadata.nbgrader.points = 3
    if change == "missing":
        target.unlink()
    else:
        save(notebook, target.with_name("97_old.ipynb") if change == "left over" else target)
    assert drift(solutions, notebooks) == ["97_old.ipynb" if change == "left over" else "98_doubling.ipynb"]


def test_drift_ignores_outputs(folders):
    solutions, notebooks = folders
    target = build(solutions / "98_doubling.ipynb", notebooks / "98_doubling.ipynb", execute=False)
    notebook = nbformat.read(target, as_version=4)
    notebook.cells[-1].outputs = [new_output("stream", text="4.0\n")]
    notebook.cells[-1].execution_count = 5
    save(notebook, target)
    assert drift(solutions, notebooks) == []


@pytest.mark.parametrize(
    ("number", "source", "words"),
    [
        (0, "# 98 · Doubling", "the first line should be"),
        (2, "Exercise", "98/double needs a header"),
        (2, "Difficulty 1/5 · Importance 5/5 · 5 min · 3 points", "98/double needs a header"),
        (3, DOUBLE.replace("### END SOLUTION", ""), "without '### END SOLUTION'"),
        (3, DOUBLE.replace("### BEGIN SOLUTION", ""), "unbalanced solution markers"),
        (3, DOUBLE.replace("    y = x", "    ### BEGIN SOLUTION\n    y = x"), "unbalanced solution markers"),
        (3, DOUBLE.replace('    """2 x."""\n', ""), "Give a function a docstring"),
        (4, CHECKED.removesuffix("\npoints"), "ends with the points earned"),
        (4, CHECKED + " > 0", "ends with the points earned, not with 'points > 0'"),
        (4, CHECKED.replace("98/double", "98/doubel"), "did you mean '98/double'?"),
        (4, CHECKED.replace("98/double", "97/double"), "belongs to another chapter"),
        (4, f"{DOUBLE}\n{CHECKED}", "holds one check and no solution"),
        (4, CHECKED + ";  # quiet", "ends in a semicolon"),
        (7, 'quiz("98/q1", q1);', "ends in a semicolon"),
        (7, "q1", "98/q1 is registered but never checked"),
        (8, CHECKED, "98/double is checked twice"),
        (8, "x" * 1_600_000, "at most 1.5 MB"),
    ],
)
def test_lint_names_the_breach(tmp_path, number, source, words):
    found = errors(with_cell(number, source), tmp_path)
    assert any(words in error for error in found), found


def test_lint_refuses_stderr_and_warns_of_long_cells(tmp_path):
    notebook = sample()
    assert errors(notebook, tmp_path) == []
    notebook.cells[1].outputs = [new_output("stream", name="stderr", text="Warning!")]
    notebook.cells[1].source += "\npass" * 12
    notebook.cells[8].source += "\npass" * 11
    found, warnings = lint(save(notebook, tmp_path / "98_doubling.ipynb"))
    assert ["stderr" in error for error in found] == [True]
    assert warnings == ["cell 1: 13 lines; aim at 12"]


def test_a_header_serves_one_graded_cell(tmp_path):
    notebook = sample()
    title, imports, header, double, check, why, answer, quiz, on = notebook.cells
    notebook.cells = [title, imports, header, answer, quiz, double, check, why, on]
    assert ["98/double needs a header" in error for error in errors(notebook, tmp_path)] == [True]


def test_nothing_is_written_if_the_source_breaks_a_contract_or_a_cell_raises(tmp_path):
    target = tmp_path / "out" / "98_doubling.ipynb"
    with pytest.raises(ValueError, match="cannot be built:\n  cell 4: a graded cell ends"):
        build(save(with_cell(4, CHECKED + " + 1"), tmp_path / target.name), target)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        build(save(with_cell(1, "1 / 0"), tmp_path / target.name), target)
    assert not target.exists()


def test_clear_does_what_nbgrader_does():
    preprocessors = pytest.importorskip("nbgrader.preprocessors")
    notebook = annotate(sample())
    theirs = copy.deepcopy(notebook)
    for make in (
        preprocessors.LockCells(),
        preprocessors.ClearSolutions(code_stub={"python": "# YOUR CODE HERE"}),
        preprocessors.ClearOutput(),
        preprocessors.CheckCellMetadata(),
    ):
        theirs, _ = make.preprocess(theirs, {})
    theirs.cells = [cell for cell in theirs.cells if cell.id != "why"]
    theirs.cells[0].source = theirs.cells[0].source.replace(SUFFIX, "")
    assert theirs == student(notebook)


def test_executed_editions_are_graded_by_nbgrader_itself(tmp_path, capfd):
    """Solved 3 of 3 points; unsolved, even with nbgrader's own stub, which raises, 0 of 3, and the notebook goes on."""
    utils = pytest.importorskip("nbgrader.utils")
    preamble = (
        "import sys, types\nm = types.ModuleType('minialign.course.chapters.chapter_98')\n"
        f"exec({CHAPTER_98!r}, m.__dict__)\n"
    )
    preamble += "sys.modules[m.__name__] = m\n"

    def grades(notebook):
        notebook.cells[1].source = preamble + notebook.cells[1].source
        run(notebook, tmp_path)
        assert notebook.cells[-1].outputs[0].text == "4.0\n"
        return [utils.determine_grade(cell) for cell in notebook.cells if utils.is_grade(cell)]

    complete = annotate(sample())
    assert grades(copy.deepcopy(complete)) == [(2.0, 2.0), (1.0, 1.0)]
    raising = student(complete)
    raising.cells[3].source = raising.cells[3].source.replace("# YOUR CODE HERE", "raise NotImplementedError()")
    assert grades(raising) == [(0.0, 2.0), (0.0, 1.0)]
    assert "WARNING" not in capfd.readouterr().err  # ipykernel's, about a transport that nobody chose


def test_saved_files_are_what_jupyter_itself_would_write(folders):
    """Sorted keys, one line of source per line of the file: readable differences."""
    solutions, _ = folders
    text = (solutions / "98_doubling.ipynb").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert '    "    y = x + x\\n",\n' in text
    assert nbformat.reads(text, as_version=4).cells[3].source == DOUBLE
