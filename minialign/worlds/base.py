"""What every world offers, and how a missing weight is reported."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"


@dataclass
class World:
    """A small place with a known truth: a base policy, prompts for it, rewards, and the oracle that is not fooled.

    `rewards` maps a name to `reward(samples, prompts) -> (batch,)`; `default_reward` is the one that `minialign run`
    trains on. `oracle` says what is right: 0 or 1 a sample. `real(n, generator)` draws (samples, prompts) of the data.
    `show(samples, prompts)` draws them. `extras` holds what only this world has (held-out prompts, its exact mixture).
    """

    name: str
    policy: Any
    prompts: list[str]
    rewards: dict[str, Callable[[Tensor, list[str]], Tensor]]
    default_reward: str
    oracle: Callable[[Tensor, list[str]], Tensor]
    real: Callable[..., tuple[Tensor, list[str]]]
    show: Callable[..., Any]
    extras: dict[str, Any] = field(default_factory=dict)


def missing_weights(name: str, problem: str) -> FileNotFoundError:
    """The one error for weights that are absent or damaged: it says what was found and which command remakes them."""
    return FileNotFoundError(
        f"the shipped weights of world {name!r} cannot be used: {problem}. Restore them with `git checkout -- "
        f"minialign/worlds/weights/{name}`, or remake them with `minialign pretrain {name}`."
    )


@contextmanager
def quietly():
    """Loads without the libraries' progress bars and their advice on optional packages; errors are still shown."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
