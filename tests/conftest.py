"""Shape annotations run in the tests: every jaxtyping annotation of the package is checked by beartype."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# children are started by name, too (nbgrader: alembic): they are this interpreter's, whether its environment is active
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

from jaxtyping import install_import_hook

hook = install_import_hook("minialign", "beartype.beartype")

import matplotlib
import pytest
import torch
from seconds import pytest_terminal_summary  # noqa: F401  (a hook)

matplotlib.use("Agg")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """run(source): what a script leaves in {out} when two processes are launched; {folder} is tests."""

    def run(source: str):
        folder = tmp_path_factory.mktemp("two")
        script, out = folder / "two.py", str(folder / "two.pt")
        script.write_text(source.format(folder=str(Path(__file__).parent), out=out))
        # accelerate's own launcher would quietly start one process on a machine without a GPU
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    return run


EVERYTHING = """
import sys, torch
import torch.distributed as dist
from accelerate import PartialState
state = PartialState(cpu=True)
sys.path[:0] = [{folder!r}]
from MODULE import everything
found = everything()
if state.is_main_process:
    torch.save({{"processes": dist.get_world_size(), "found": found}}, {out!r})
state.destroy_process_group()
"""


@pytest.fixture(scope="session")
def by_two_processes(two_processes):
    """run(module): what `everything()` of a test module gives on the first of two processes; there are two."""

    def run(module: str):
        result = two_processes(EVERYTHING.replace("MODULE", module))
        assert result["processes"] == 2
        return result["found"]

    return run


# ---- where to look when an exact optimum is missed -------------------------------------------------------------------

PROBES = """An optimum is missed for many reasons. Look in this order, and at the next only when the last is green:
1. the ratio is 1 before the first update:        pytest tests/test_every_loop.py -k "ratio and {name}"
2. the gradient is the policy gradient's, 4 s.e.: pytest tests/methods -k "{name} and policy_gradient"
3. the optimum: this test; then step size, rounds, and what the KL is weighed against."""


def pytest_configure(config):
    config.addinivalue_line("markers", "optimum(name): a loop reaches an exact optimum; a failure says where to look")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker = item.get_closest_marker("optimum")
    if marker and report.failed:
        report.sections.append(("where to look", PROBES.format(name=marker.args[0])))
