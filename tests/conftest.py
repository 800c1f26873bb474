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
