"""Tries the ends of pyproject.toml's ranges: `python tests/versions.py`. By hand; 20 minutes a set or more.

    oldest     the lower end of every range
    tested     tests/constraints.txt, what README's commands and CI install
    newest     whatever pip takes today

For each: a fresh environment, the tests of FOLDERS, and a step of RUNS. Prints a table and exits with 1 if it holds a
failure. `python tests/versions.py oldest` tries that set alone; what was printed lies in `--out`, a folder.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETS = ("oldest", "tested", "newest")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "numpy")
FOLDERS = ("tests/kernels", "tests/policies", "tests/worlds", "tests/methods")
RUNS = ("ppo", "ddpo", "rlcm")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "beartype")


def lower_ends(dependencies: list[str]) -> list[str]:
    """["torch>=2.13,<3", ...] -> ["torch==2.13", ...]."""
    return [f"{name}=={version}" for name, version in (re.split(">=|,", one)[:2] for one in dependencies)]


def constraints(which: str, folder: Path) -> list[str]:
    """pip's arguments for a set."""
    if which == "newest":
        return []
    if which == "tested":
        return ["-c", str(ROOT / "tests" / "constraints.txt")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (folder / "oldest.txt").write_text("\n".join(lower_ends(project["dependencies"])), encoding="utf-8")
    return ["-c", str(folder / "oldest.txt")]


def attempt(command: list, log: Path) -> str:
    """Runs it in the clone; what it printed goes to `log`. -> "passed 61 s" or "FAILED, see LOG"."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    return f"passed {time.perf_counter() - start:.0f} s" if done.returncode == 0 else f"FAILED, see {log}"


def versions(python: Path) -> str:
    code = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {LIBRARIES}), sep=', ')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def try_set(which: str, out: Path) -> Iterator[tuple[str, str]]:
    """(what, how it went) of one set, one after another; its environment is deleted at the end."""
    folder = out / which
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"minialign-{which}-") as place:
        venv.create(place, with_pip=True)
        python = Path(place) / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [python, "-m", "pip", "install", *constraints(which, folder), "-e", ".", *TOOLS]
        yield "install", (how := attempt(install, folder / "install.log"))
        if how.startswith("FAILED"):
            return
        yield "versions", versions(python)
        for tests in FOLDERS:
            command = [python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", tests]
            yield tests, attempt(command, folder / f"{Path(tests).name}.log")
        for method in RUNS:
            command = [python, "-m", "minialign.cli", "run", method, "--steps", "1", "--out", folder / method]
            yield f"run {method} --steps 1", attempt(command, folder / f"{method}.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all if none is named")
    parser.add_argument("--out", type=Path, help="folder for what was printed (a new temporary one)")
    given = parser.parse_args()
    if unknown := set(given.sets) - set(SETS):
        parser.error(f"unknown set {', '.join(sorted(unknown))}. There are: {', '.join(SETS)}.")
    out, failed = (given.out or Path(tempfile.mkdtemp(prefix="minialign-versions-"))).resolve(), False
    for which in given.sets or SETS:
        for what, how in try_set(which, out):
            print(f"{which:<8} {what:<22} {how}", flush=True)
            failed |= how.startswith("FAILED")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
