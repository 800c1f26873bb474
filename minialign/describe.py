"""`minialign methods`: what there is, from the catalogue; and one method from its own file."""

import inspect
import re
from pathlib import Path

from minialign.methods import CATALOGUE, CHAPTERS, Method, bars_text, catalogue_table
from minialign.prepare import find_method, worlds_of
from minialign.recipes import RECIPES

RESULTS = Path(__file__).parent.parent / "tests" / "claims" / "results"  # in a clone


def stored_results() -> Path | None:
    return RESULTS if RESULTS.is_dir() else None


def columns_of(method: Method) -> list[str]:
    return [
        method.name, method.chapter, method.kind, f"{method.paper} ({method.arxiv})",
        " ".join(worlds_of(method)), bars_text(method, stored_results()),
    ]  # fmt: skip


def print_catalogue() -> None:
    lines = [["method", "chapter", "", "paper", "worlds", "bars"], *map(columns_of, CATALOGUE.values())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    print("\nbars: how many of a paper's claims hold in its stored replication (`minialign replicate`), in a clone")
    print("more on one of them: minialign methods NAME")


def config_lines(config: type) -> list[str]:
    """The fields of a Config as they stand in its file, with their comments; then those of the one that it extends."""
    lines = inspect.getsource(config).splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r"    \w+:", line))
    own = {name for line in lines[first:] for name in re.findall(r"^    (\w+):", line)}
    parent = config.__base__
    inherited = config_lines(parent) if hasattr(parent, "__dataclass_fields__") else []
    return lines[first:] + [line for line in inherited if not own & set(re.findall(r"^    (\w+):", line))]


def commands(method: Method) -> list[str]:
    """To try, the first world first."""
    found = [f"minialign run {method.name}"]
    found += [f"minialign run {method.name} --world {world}" for world in worlds_of(method) if world != method.world]
    return [*found, *(f"minialign replicate {claim}" for claim in method.claims)]


def print_method(method: Method) -> None:
    module = method.module
    chapter = CHAPTERS[method.chapter]
    print(f"{method.title} ({method.name}): {method.kind}\n\n{inspect.getdoc(module)}\n")
    for kind in [module.Config, *([CATALOGUE[method.loop].module.Config] if method.loop else [])]:
        print(f"Settings, --set FIELD=VALUE, of {kind.__module__}:\n")
        print("\n".join(config_lines(kind)), end="\n\n")
    with_recipe = [world for world in worlds_of(method) if (method.name, world) in RECIPES]
    print(f"Chapter: {chapter.stem}, {chapter.title}")
    print(f"Worlds: {', '.join(worlds_of(method))}; with settings that suit them: {', '.join(with_recipe)}")
    print(f"Bars that hold: {bars_text(method, stored_results())}\n")
    print("\n".join(commands(method)))


def command_methods(args) -> int:
    if args.markdown:
        print(catalogue_table("notebooks/", stored_results()))
    elif args.name is not None:
        print_method(find_method(args.name))
    else:
        print_catalogue()
    return 0
