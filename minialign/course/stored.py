"""Results of the replications, stored: what a chapter draws where many seeds are needed.

    stored("ppo")["runs"]    the raw runs; also "table", "bars" and "verdict", as `minialign replicate ppo` wrote them

In a clone they are those of tests/claims/results; elsewhere those that the wheel brought.
"""

import json
from importlib import metadata
from pathlib import Path

CLONE = Path(__file__).parents[2] / "tests" / "claims" / "results"


def stored(name: str) -> dict:
    """What `minialign replicate NAME` found. Raises FileNotFoundError if this installation holds no such result."""
    found = sorted(CLONE.glob("*.json")) or _shipped()
    for path in found:
        if path.stem == name:
            return json.loads(path.read_text(encoding="utf-8"))
    there = ", ".join(path.stem for path in found) or "none: install from a clone or a wheel"
    raise FileNotFoundError(f"no stored result is called {name!r}. There are: {there}.")


def _shipped() -> list[Path]:
    try:
        files = metadata.files("minialign") or []
    except metadata.PackageNotFoundError:
        files = []
    return [Path(file.locate()) for file in files if file.match("share/minialign/results/*.json")]
