"""The summary at the end of a run, with the workers of pytest-xdist as in the real one."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.parametrize(("notebook", "seconds"), [("notebooks/00_tour", 20.0), ("solutions/00_tour", 21.5)])
def test_a_chapter(notebook, seconds, record_property):
    record_property("notebook", notebook)
    record_property("cpu_seconds", seconds)
    assert notebook.startswith("notebooks")  # one that is over the limit fails, and is listed all the same

def test_something_else():
    pass
"""


def test_the_run_ends_with_the_cpu_seconds_of_each_chapter(tmp_path):
    (tmp_path / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "seconds", "-n", "1", "-q", "-c", "/dev/null", "test_two.py"]
    path = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, "-p", "xdist"], cwd=tmp_path, env=path, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    first = lines.index(["chapter", "edition", "CPU", "seconds"])
    assert lines[first + 1 : first + 4] == [
        ["00_tour", "notebooks", "20.0"], ["00_tour", "solutions", "21.5"], ["together", "41.5"],
    ], done.stdout  # fmt: skip


def test_conftest_has_the_hook(pytestconfig):
    import seconds

    plugins = pytestconfig.pluginmanager.get_plugins()
    assert seconds.pytest_terminal_summary in [getattr(p, "pytest_terminal_summary", None) for p in plugins]
