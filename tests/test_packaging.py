"""The house keeps its promises: light import, floors, one list of dependencies, nothing stray at the top."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_is_light():
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'matplotlib', 'sklearn', 'scipy', 'numpy'}"
    code = f"import sys, minialign; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(
    ("first", "given", "spins", "said"),
    [
        ("minialign", {}, "3000", 0),
        ("minialign", {"GOMP_SPINCOUNT": "7"}, "7", 0),
        ("minialign", {"OMP_WAIT_POLICY": "passive"}, None, 0),
        ("minialign", {"OMP_NUM_THREADS": "1"}, None, 0),
        ("torch", {}, None, 1),
        ("torch", {"GOMP_SPINCOUNT": "7"}, "7", 0),
    ],
)
def test_threads_wait_less_and_it_is_said_where_that_came_too_late(first, given, spins, said):
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    code = f"import os, {first}, minialign, minialign.methods; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(spins)
    assert done.stderr.count("import minialign first, or set GOMP_SPINCOUNT=3000") == said


def test_every_room_can_be_reached():
    import minialign

    for room in minialign._ROOMS:
        assert getattr(minialign, room).__name__ == f"minialign.{room}"


def test_floors():
    done = subprocess.run(["lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_module_has_its_floor():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = {name.strip() for layer in contracts[0]["layers"] for name in layer.split("|")}
    found = {
        path.stem for path in (ROOT / "minialign").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert floors == {f"minialign.{name}" for name in found - {"__init__"}}


def test_the_wheel_ships_the_notebooks_and_what_they_draw_and_stays_small():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    data = {to: [path for pattern in patterns for path in ROOT.glob(pattern)] for to, patterns in shipped.items()}
    notebooks, results = data["share/minialign/notebooks"], data["share/minialign/results"]
    assert {path.name for path in notebooks} == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.name for path in results} == {path.name for path in (ROOT / "tests/claims/results").glob("*.json")}
    files = [
        *notebooks,
        *results,
        *(path for path in (ROOT / "minialign").rglob("*") if path.is_file() and "__pycache__" not in path.parts),
    ]
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 20 * 2**20


def test_environment_yml_says_the_same_as_pyproject():
    extras = project()["optional-dependencies"]
    listed = (
        project()["dependencies"] + extras["notebooks"] + [d for d in extras["dev"] if not d.startswith("minialign")]
    )
    lines = re.findall(r"^ {6}- (?!\")(.+)$", (ROOT / "environment.yml").read_text(), flags=re.MULTILINE)
    assert sorted(lines) == sorted(listed)
    assert f"python{project()['requires-python']}" in (ROOT / "environment.yml").read_text()


def test_constraints_pin_every_dependency_inside_its_range():
    """Exactly, and as any platform can have it: without the label of a local build (+cpu)."""
    lines = [line for line in (ROOT / "tests/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    extras = project()["optional-dependencies"]
    for one in map(Requirement, project()["dependencies"] + extras["notebooks"] + extras["dev"]):
        if one.name != "minialign":
            assert one.specifier.contains(pins[canonicalize_name(one.name)]), one


def test_newcomers_and_ci_take_the_tested_versions():
    readme = re.search(r"## Two commands(.*?)\n## ", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    installs = re.findall(r"pip install .*", readme) + re.findall(r"pip install .*", (ROOT / ".ci/run").read_text())
    assert len(installs) == 3 and all("-c tests/constraints.txt -e " in line for line in installs)
    assert '- "-c tests/constraints.txt"' in (ROOT / "environment.yml").read_text()


def test_the_oldest_set_is_the_lower_end_of_each_range():
    versions = runpy.run_path(str(ROOT / "tests/versions.py"))
    assert versions["lower_ends"](["torch>=2.13,<3", "numpy>=2"]) == ["torch==2.13", "numpy==2"]
    assert len(versions["lower_ends"](project()["dependencies"])) == len(project()["dependencies"])


def test_nothing_stray_at_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    allowed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "environment.yml",
        "minialign",
        "notebooks",
        "solutions",
        "tests",
    }
    assert top <= allowed, top - allowed


def test_shipped_weights_stay_small():
    weights = ROOT / "minialign" / "worlds" / "weights"
    assert sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) < 15 * 2**20


def test_every_weight_folder_has_a_card():
    for folder in (ROOT / "minialign" / "worlds" / "weights").iterdir():
        card = (folder / "README.md").read_text()
        assert re.search(r"[0-9a-f]{64}", card), f"{folder.name}: no sha256 in its card"
