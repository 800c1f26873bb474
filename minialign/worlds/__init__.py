"""Small places with exact answers. `load("shapes")` gives a `World`: policy, prompts, rewards, oracle, real data."""

import difflib
import importlib

from minialign.worlds.base import World

_MODULES = {
    "assistant": "assistant",
    "compass": "gaussian",
    "crowd": "crowd",
    "digits": "digits",
    "line": "gaussian",
    "ring": "gaussian",
    "shapes": "shapes",
    "tokens": "tokens",
}


def names() -> list[str]:
    return sorted(_MODULES)


def load(name: str, **settings) -> World:
    """The world called `name`, on the CPU. `settings` go to its own `load` (num_steps, eta, ...)."""
    if name not in _MODULES:
        near = difflib.get_close_matches(name, names(), n=1)
        raise ValueError(
            f"unknown world {name!r};{f' did you mean {near[0]!r}?' if near else ''} There are: {', '.join(names())}."
        )
    module = importlib.import_module(f"minialign.worlds.{_MODULES[name]}")
    return module.load(**settings) if _MODULES[name] == name else module.load(name, **settings)
