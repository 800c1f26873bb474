"""Every chapter under nbval, in both editions: no cell raises, checked outputs agree; unsolved 0 points, solved all.

Each edition runs once: a pytest of its own runs nbval and notes what the graded cells returned. Run as a script, this
file is that pytest:    python tests/test_notebooks.py NOTEBOOK RESULTS.json [SECONDS]

Whoever needs torch imports it: the pytest that only talks to a kernel would pay for it twenty-two times.
"""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 30  # seconds of CPU a notebook, on one thread, the ten for imports included (a busy machine takes more)
OLD = {"00", "01", "02", "03", "04", "10", "11", "12", "50", "51", "52"}  # chapters from before that limit; no more
OLD_LIMIT = 90  # 11 to 65 were measured beside other work; 45 is the aim
YARDSTICK = 0.3  # seconds of CPU for `slowness`'s work where LIMIT was set


@functools.cache
def slowness():
    """How many times longer than that machine this one takes for what the chapters do most, small convolutions; >= 1.

    A limit in seconds judges the processor, too: without AVX, ours takes three times as long, and some notebooks twice.
    """
    import torch

    convolution, images = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(64, 32, 8, 8)
    start = time.process_time()
    for _ in range(100):
        convolution(images).square().mean().backward()
    return max(1.0, (time.process_time() - start) / YARDSTICK)


def limit(notebook):
    """Seconds of CPU that a notebook may take here."""
    return (OLD_LIMIT if notebook.name[:2] in OLD else LIMIT) * slowness()


def chapters(folder):
    return sorted((ROOT / folder).glob("[0-9][0-9]_*.ipynb"))


class Points:
    """A plugin that notes the outputs of nbval's graded cells."""

    def __init__(self, path):
        self.path, self.graded = path, {}

    def pytest_runtest_teardown(self, item):
        grader = item.cell.metadata.get("nbgrader", {})
        if grader.get("grade"):
            outputs = item.test_outputs or []
            shown = [out["data"]["text/plain"] for out in outputs if out["output_type"] == "execute_result"]
            stderr = "".join(out.get("text", "") for out in outputs if out.get("name") == "stderr")
            self.graded[grader["grade_id"]] = {"shown": shown, "points": grader["points"], "stderr": stderr}

    def pytest_sessionfinish(self):
        Path(self.path).write_text(json.dumps(self.graded))


def nbval(notebook, results):
    """Run nbval on one notebook, apart from this run's plugins and settings; (exit status, report)."""
    patience = 4 * limit(notebook)  # seconds of wall time before it is stopped
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MPLBACKEND"))}
    environment |= {"IPYTHONDIR": str(results.parent / "ipython")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, __file__, str(notebook), str(results), str(int(patience))],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        report = process.communicate(timeout=patience)[0]
        return process.returncode, report
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then stops its kernel and says which cell it was at
        try:
            report = process.communicate(timeout=10)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            report = process.communicate()[0]
        return "timeout", f"{report}\nstopped after {patience:.0f} s"


def grades(notebook, tmp_path, record_property):
    """[(shown by the graded cell, points it is worth)]; fails if nbval does, or if a graded cell writes to stderr."""
    from minialign.course.check import registered

    results = tmp_path / "points.json"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status, report = nbval(notebook, results)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    record_property("notebook", f"{notebook.parent.name}/{notebook.stem}")
    record_property("seconds", round(time.perf_counter() - start, 1))
    record_property("cpu_seconds", round(seconds, 1))
    assert status == 0, f"{notebook.name} under nbval: {status}\n{report[-6000:]}"
    most = limit(notebook)
    assert 5 < seconds < most, f"{notebook.name} took {seconds:.0f} s of CPU; the limit is {most:.0f}"
    graded = json.loads(results.read_text())
    assert set(graded) == {exercise.name.replace("/", "-") for exercise in registered(notebook.name[:2])}
    assert [name for name, cell in graded.items() if cell["stderr"]] == [], "stderr earns no points"
    return {name: (cell["shown"], cell["points"]) for name, cell in graded.items()}


def test_a_new_chapter_may_take_less_than_an_old_one():
    known = {path.name[:2] for path in chapters("solutions")}
    assert known >= OLD and limit(Path("solutions/60_new.ipynb")) == LIMIT * slowness()
    assert limit(Path("solutions/52_old.ipynb")) == OLD_LIMIT * slowness() > limit(Path("solutions/60_new.ipynb"))


# Two classes, so that under --dist loadscope the two editions run side by side.
class TestStudentsEdition:
    @pytest.mark.parametrize("notebook", chapters("notebooks"), ids=lambda path: path.stem)
    def test_runs_unsolved_and_earns_nothing(self, notebook, tmp_path, record_property):
        found = grades(notebook, tmp_path, record_property)
        assert found == {name: (["0.0"], points) for name, (_, points) in found.items()}


class TestCompleteEdition:
    @pytest.mark.parametrize("notebook", chapters("solutions"), ids=lambda path: path.stem)
    def test_earns_every_point(self, notebook, tmp_path, record_property):
        found = grades(notebook, tmp_path, record_property)
        assert found == {name: ([str(float(points))], points) for name, (_, points) in found.items()}


def main(notebook, results, patience=4 * OLD_LIMIT):
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nbval alone: the others take two seconds to import
    options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={patience}", "-x", "-p", "no:cacheprovider"]
    options += ["--rootdir", str(ROOT), "-o", "addopts=", "-p", "nbval.plugin", "--color=no", "--tb=short"]
    return pytest.main([*options, notebook], plugins=[Points(results)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
