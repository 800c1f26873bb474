"""The folder of a run: what is written there is whole or absent, whenever the process dies.

run.json                what was asked for
checkpoint.safetensors  the state after a round, and all rows up to it: one file, so that they never disagree
metrics.csv             the rows, without the clock: the same bytes for the same seed, interrupted or not
timing.csv              seconds of each round
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minialign.prepare import UserError, check_takes_files

CHECKPOINT = "checkpoint.safetensors"


def free_folder(stem: str) -> Path:
    number = 0
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def leftovers(folder: Path) -> list[Path]:
    """What a killed process was writing."""
    return [path for path in folder.iterdir() if path.name.startswith(".partial-") or path.suffix == ".partial"]


def clear_leftovers(folder: Path) -> None:
    for path in leftovers(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_free(folder: Path) -> None:
    """Raises UserError for a folder that cannot take a new run."""
    if folder.is_dir() and set(folder.iterdir()) - set(leftovers(folder)):
        raise UserError(
            f"{folder} already holds {'a run' if (folder / 'run.json').exists() else 'files'}. "
            f"Go on with `minialign run --resume {folder}`, or choose another --out."
        )
    check_takes_files(folder)


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which are moved to `folder` at the end, summary.json last; none if anything fails.

    `folder` is made where there is none, and then is gone again after a failure. Raises OSError, a full disk among its
    reasons.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
            partial = Path(name)
            yield partial
            for path in sorted(partial.iterdir(), key=lambda path: (path.name == "summary.json", path.name)):
                path.replace(folder / path.name)
    except BaseException:
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def write_rows(rows: list[dict], columns: list[str], path: Path) -> None:
    with all_or_nothing(path.parent) as partial, open(partial / path.name, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_metrics(rows: list[dict], path: Path) -> None:
    """One line a round, without its seconds; a column that appears late is empty before."""
    columns = dict.fromkeys(name for row in rows for name in row if name != "seconds")
    write_rows(rows, list(columns), path)


def write_timing(rows: list[dict], path: Path) -> None:
    write_rows(rows, ["step", "seconds"], path)


def start_folder(folder: Path, description: dict) -> None:
    with all_or_nothing(folder) as partial:
        write_description(partial, description)


def write_description(folder: Path, description: dict) -> None:
    (folder / "run.json").write_text(json.dumps(description, indent=2))


def save_round(tensors: dict, rows: list[dict], description: dict, folder: Path) -> None:
    from minialign.checkpoint import save_checkpoint

    about = {"run": json.dumps(identity(description)), "rows": json.dumps(rows)}
    save_checkpoint(tensors, folder / CHECKPOINT, about)


def saved_rows(folder: Path, description: dict) -> list[dict]:
    """The rows up to the checkpoint; none where there is no checkpoint yet.

    Raises ValueError for a checkpoint that is damaged, or of another run.
    """
    from minialign.checkpoint import read_about

    path = folder / CHECKPOINT
    if not path.exists():
        return []
    about = read_about(path)
    if "run" not in about or json.loads(about["run"]) != identity(description):
        other = json.loads(about["run"]) if "run" in about else None
        whose = f"{other['method']} on {other['world']}, seed {other['seed']}" if other else "no `minialign run`"
        raise UserError(
            f"{path} is of another run ({whose}) than {folder / 'run.json'}: put back the one that belongs there, or "
            "delete it and start over."
        )
    return json.loads(about["rows"])


def identity(description: dict) -> dict:
    """What may not differ between a run and its checkpoint: everything but how long it is to be."""
    same = json.loads(json.dumps(description))
    for config in (same["config"], same.get("loop_config") or {}):
        config.pop("num_iterations", None)
    return same


def read_description(folder: Path) -> dict:
    """What run.json holds. Raises UserError that names the file and the remedy."""
    path = folder / "run.json"
    if not folder.is_dir():
        raise UserError(f"{folder} holds no run to resume: there is no such folder.")
    if not path.exists():
        raise UserError(f"{folder} holds no run to resume (no run.json): start it with `minialign run METHOD --out`.")
    try:
        found = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): put back a whole copy, or start over with another --out."
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no description of a run: put back its own, or start over with another --out.")
    return found
