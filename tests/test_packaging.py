"""The house keeps its promises: light import, floors, one list of dependencies, nothing stray at the top."""

import re
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_import_is_light():
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'matplotlib', 'sklearn', 'scipy', 'numpy'}"
    code = f"import sys, minialign; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
