"""The command line: `minialign methods | run | pretrain | replicate | bench | course`.

`run` tries a method in a world and leaves in its folder: summary.json, before_after.png, curves.png, run.json; where it
trains also metrics.csv, what was trained (an adapter in the format that diffusers loads), and checkpoint.safetensors,
from which `--resume` goes on to the same numbers as an uninterrupted run.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from minialign.bench import command_bench
from minialign.describe import command_methods
from minialign.methods import CATALOGUE, catalogue_table, parts_table, verdicts_table
from minialign.prepare import UserError, check_takes_files, check_writable, nearest
from minialign.recipes import BENCH_WORLDS, WORLDS
from minialign.run import command_run
from minialign.settings import Count, Range, parse

REPOSITORY = Path(__file__).parent.parent
WEIGHTS_MADE_BY = {
    "assistant": "minialign.pretrain.assistant",
    "digits": "minialign.pretrain.digits",
    "digits_flow": "minialign.pretrain.digits_flow",
    "digits_edm": "minialign.pretrain.edm",
    "patches": "minialign.pretrain.edm",
    "shapes": "minialign.pretrain.shapes",
    "shapes_lcm": "minialign.pretrain.shapes_lcm",
}


def command_pretrain(args) -> int:
    if args.name not in WEIGHTS_MADE_BY:
        raise UserError(nearest("set of weights", args.name, WEIGHTS_MADE_BY))
    from minialign.worlds.base import WEIGHTS

    out = args.out or WEIGHTS / args.name
    if args.out is not None and out.is_dir() and any(out.iterdir()):  # it would be replaced, whatever it holds
        raise UserError(f"--out {out} already holds files; choose a new folder.")
    check_takes_files(out)
    module = WEIGHTS_MADE_BY[args.name]
    which = {"name": args.name} if list(WEIGHTS_MADE_BY.values()).count(module) > 1 else {}
    importlib.import_module(module).main(out, seed=args.seed, **which)
    return 0


def claims() -> dict[str, Path]:
    folder = REPOSITORY / "tests" / "claims"
    found = {path.stem.removeprefix("claim_"): path for path in folder.glob("claim_*.py")}
    if not found:
        raise UserError(
            "replications live in the repository's tests/claims: run this from an editable install of a clone."
        )
    return found


def command_replicate(args) -> int:
    found = claims()
    if args.table:
        write_table(found)
        return 0
    if args.name not in found:
        raise UserError(
            nearest("replication", args.name, found) if args.name else f"which replication? One of: {', '.join(found)}."
        )
    if args.out is not None:
        check_writable(args.out)
    sys.path.insert(0, str(found[args.name].parent))  # its worker processes import it by name, too
    verdict = importlib.import_module(f"claim_{args.name}").replicate()
    for bar in verdict["bars"]:
        mark = "pass" if bar["passed"] else "FAIL" if bar.get("claimed", True) else "no  "
        print(f"{mark}  {bar['id']}: {bar['value']:.4g} (bar {bar['threshold']})")
    print(f"{args.name}: {verdict['verdict']}, {verdict['seeds']} seeds")
    if args.out is not None:
        args.out.write_text(json.dumps(verdict, indent=2))
    return 0 if verdict["verdict"] == "replicates" else 1


def write_table(found: dict[str, Path]) -> None:
    """Rewrites what follows from the stored verdicts and the catalogue: tables of both README.md, the tour's map."""
    lines = ["| paper | claim in miniature | measured | bar | verdict |", "|---|---|---|---|---|"]
    results = REPOSITORY / "tests" / "claims" / "results"
    for name in sorted(found):
        stored = results / f"{name}.json"
        if stored.exists():
            verdict = json.loads(stored.read_text())
            for bar in verdict["bars"]:
                measured = bar.get("text", format(bar["value"], ".4g"))
                mark = "replicates" if bar["passed"] else "does not replicate"
                lines.append(f"| {verdict['name']} | {bar['id']} | {measured} | {bar['threshold']} | {mark} |")
    write_between(REPOSITORY / "tests" / "claims" / "README.md", "results", "\n".join(lines))
    write_between(REPOSITORY / "README.md", "map", catalogue_table("notebooks/"))
    write_between(REPOSITORY / "README.md", "methods", verdicts_table(results))
    for edition in ("solutions", "notebooks"):
        write_tours_map(REPOSITORY / edition / "00_tour.ipynb")
    print("\n".join(lines))


def between(whole: str, mark: str, text: str) -> str:
    """`whole` with `text` in the place of what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    head, rest = whole.split(f"<!-- {mark} -->\n", 1)
    _, tail = rest.split(f"<!-- /{mark} -->", 1)
    return f"{head}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{tail}"


def write_between(path: Path, mark: str, text: str) -> None:
    path.write_text(between(path.read_text(), mark, text))


def write_tours_map(path: Path) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "<!-- map -->" in cell.source)
    cell.source = between(cell.source, "map", parts_table())
    nbformat.write(notebook, path)


def command_course(args) -> int:
    from minialign.course import build

    solutions, notebooks = REPOSITORY / "solutions", REPOSITORY / "notebooks"
    if not solutions.exists():
        raise UserError(
            "the chapters live in the repository's solutions/: run this from an editable install of a clone."
        )
    build.build_all(solutions, notebooks, execute=not args.no_execute, only=args.only)
    return 0


def notebooks() -> list[Path]:
    """The student's edition: of the clone, or the one that the wheel brought. Raises UserError where there is none."""
    from importlib.metadata import PackageNotFoundError, files

    found = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    if not found:
        try:
            shipped = files("minialign") or []
        except PackageNotFoundError:
            shipped = []
        found = sorted(Path(file.locate()) for file in shipped if file.match("share/minialign/notebooks/*.ipynb"))
    if not found:
        raise UserError("this installation came without the notebooks: install from a clone or a wheel.")
    return found


def command_copy(args) -> int:
    import shutil

    folder, found = args.folder, notebooks()
    there = [path.name for path in found if (folder / path.name).exists()]
    if there:  # it may hold a student's answers
        raise UserError(f"{folder} already holds {there[0]}: choose another folder.")
    check_takes_files(folder, "DIR")
    folder.mkdir(parents=True, exist_ok=True)
    for path in found:
        shutil.copy(path, folder)
    print(f"{len(found)} chapters in {folder}: pip install jupyterlab ipywidgets && jupyter lab {folder}")
    return 0


def command_grade(args) -> int:
    from minialign.course.grader import grade, sandbox

    limits = sandbox.Limits(seconds=args.seconds, wall=3 * args.seconds, total=12 * args.seconds)
    try:
        grade.grade_all(
            args.submissions, args.out, args.source, chapter=args.chapter, jobs=args.jobs,
            isolation=args.isolation, limits=limits, seed=args.seed, progress=sys.stderr.isatty(),
            by_hand=args.overrides, form=args.format, roster=args.roster,
            hide=[REPOSITORY / "solutions", REPOSITORY / "tests", REPOSITORY / ".git"],
        )  # fmt: skip
    except sandbox.Broken as error:
        raise UserError(str(error)) from None
    return 0


def typed(read: Callable, *kind) -> Callable[[str], Any]:
    """An option's type for argparse, which says in our words what is wrong."""

    def typed(text: str):
        try:
            return read(text, *kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


def read_path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path.")
    return Path(text)


COUNT, SEED, PATH = typed(parse, Count), typed(parse, Annotated[int, Range(0, 2**63 - 1)]), typed(read_path)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="minialign", description="Reward alignment of generative models, one paper a file."
    )
    commands = top.add_subparsers(dest="command", required=True)

    methods = commands.add_parser("methods", help="what there is; with a name: its file's words, settings, commands")
    methods.add_argument("name", nargs="?", help=", ".join(CATALOGUE))
    methods.add_argument("--markdown", action="store_true", help="the map of the course, as README shows it")
    methods.set_defaults(function=command_methods)

    run = commands.add_parser("run", help="a method in a world: what it changes, measured and drawn")
    run.add_argument("method", nargs="?", help=", ".join(CATALOGUE))
    run.add_argument("--world", help=f"{', '.join(WORLDS)} (default: the method's first, see `minialign methods`)")
    run.add_argument("--seed", type=SEED, help="of everything random (default: 0)")
    run.add_argument("--steps", type=COUNT, help="iterations of the method")
    run.add_argument("--reward", help="of the world, or package.module:function; several with commas")
    run.add_argument("--out", type=PATH, help="folder for the results (default: a new one under runs/)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the method's Config, or of the sampler",
    )
    run.add_argument("--resume", type=PATH, metavar="DIR", help="go on with an interrupted run")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.set_defaults(function=command_run)

    pretrain = commands.add_parser("pretrain", help="remake shipped weights")
    pretrain.add_argument("name", help=", ".join(WEIGHTS_MADE_BY))
    pretrain.add_argument("--out", type=PATH, help="folder (default: the shipped one)")
    pretrain.add_argument("--seed", type=SEED, default=0)
    pretrain.set_defaults(function=command_pretrain)

    replicate = commands.add_parser("replicate", help="check a paper's claims in miniature")
    replicate.add_argument("name", nargs="?")
    replicate.add_argument("--out", type=PATH, help="store the verdict as JSON")
    replicate.add_argument("--table", action="store_true", help="rewrite the tables and maps")
    replicate.set_defaults(function=command_replicate)

    bench = commands.add_parser("bench", help="a method's step beside the bare network passes it cannot avoid")
    bench.add_argument("--methods", nargs="+", help="default: all that say what a step cannot avoid")
    bench.add_argument("--worlds", nargs="+", help=f"default: of {', '.join(BENCH_WORLDS)} those of the method")
    bench.add_argument("--rounds", type=COUNT, default=5)
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--out", type=PATH, help="store the rows as JSON")
    bench.set_defaults(function=command_bench)

    course = commands.add_parser("course", help="make the student's edition of the chapters; grade what comes back")
    actions = course.add_subparsers(dest="action", required=True)
    make = actions.add_parser("build", help="the student's edition, from the complete one")
    make.add_argument("--only", help="one chapter, by number or name")
    make.add_argument("--no-execute", action="store_true", help="leave the student's edition without outputs")
    make.set_defaults(function=command_course)
    copy = actions.add_parser("copy", help="the student's notebooks into a folder of yours")
    copy.add_argument("folder", type=PATH)
    copy.set_defaults(function=command_copy)
    marks = actions.add_parser("grade", help="grade a notebook or a folder of hundreds, each in a sandbox")
    marks.add_argument("submissions", type=PATH, help="a notebook, or a folder of them")
    marks.add_argument(
        "--out", type=PATH, default=Path("grades.csv"), help="the grades; feedback goes to the folder of that name"
    )
    marks.add_argument(
        "--source",
        type=PATH,
        default=REPOSITORY / "notebooks",
        help="the chapters as they were handed out (default: notebooks/)",
    )
    marks.add_argument("--chapter", help="accept this chapter only, by number")
    marks.add_argument("--jobs", type=COUNT, help="sandboxes at a time (default: one a core)")
    marks.add_argument(
        "--seconds",
        type=COUNT,
        default=10,
        help="of CPU an exercise; thrice that of wall time, 12 times a notebook",
    )
    marks.add_argument("--overrides", type=PATH, metavar="CSV", help="by hand: submission,exercise,points,reason")
    marks.add_argument("--format", choices=["canvas", "moodle"], help="also a table that this platform takes")
    marks.add_argument("--roster", type=PATH, metavar="CSV", help="that platform's export of the class")
    marks.add_argument("--seed", help="of the fresh inputs (default: drawn at the first start, and kept)")
    marks.add_argument("--isolation", choices=["auto", "bubblewrap", "subprocess"], default="auto")
    marks.set_defaults(function=command_grade)
    return top


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: what the user can mend, in one line; 130: stopped by Ctrl-C or SIGTERM; 141: nobody reads on."""
    args = parser().parse_args(argv)
    try:
        with terminable():
            code = args.function(args)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `minialign methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, ValueError, OSError, FloatingPointError) as error:
        print(f"minialign {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minialign {args.command}: stopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is Ctrl-C: what a scheduler or a container sends first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
