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


@pytest.fixture
def two_processes(tmp_path):
    """run(source): what a script leaves in {out} when two processes are launched; {folder} is tests/methods."""

    def run(source: str):
        script, out = tmp_path / "two.py", str(tmp_path / "two.pt")
        script.write_text(source.format(folder=str(Path(__file__).parent / "methods"), out=out))
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
        launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(script)]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    return run
