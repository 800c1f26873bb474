"""The house keeps its promises: light import, floors, one list of dependencies, nothing stray at the top."""

import re
import subprocess
import sys
import tomllib
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
