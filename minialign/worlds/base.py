"""What every world offers, and how a missing weight is reported."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"


class Policies:
    """A world's policies by kind ("diffusion", "consistency", "language", ...), each built when it is first asked for.

    `builders` maps a kind to a function without arguments. `policies["diffusion"]` is the same object every time.
    """

    def __init__(self, world: str, builders: Mapping[str, Callable[[], Any]]):
        self.world, self.builders, self.built = world, dict(builders), {}

    def __getitem__(self, kind: str) -> Any:
        if kind not in self.builders:
            raise ValueError(f"world {self.world!r} has no {kind!r} policy. There are: {', '.join(self) or 'none'}.")
        if kind not in self.built:
            self.built[kind] = self.builders[kind]()
        return self.built[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.builders

    def __iter__(self) -> Iterator[str]:
        return iter(self.builders)

    def __len__(self) -> int:
        return len(self.builders)


@dataclass(kw_only=True)
class World:
    """A small place with a known truth: prompts, rewards, real data, the oracle that is not fooled, and base policies.

    `rewards` maps a name to `reward(samples, prompts) -> (batch,)`; `default_reward` is the one that `minialign run`
    trains on. `oracle` says what is right, on `oracle_scale`: "binary", 0 or 1 a sample, so that its mean is a share;
    or "points", any number. Prompts are any hashable; no training ever sees those `held_out`.
    `set_rewards` maps a name to a builder, without arguments, of a reward of a *set*: reward(samples, prompts) -> one
    number (`rewards.checked_set`); the first is what `minialign run` takes where such a reward is asked for.
    `real(n, generator)` draws (samples, prompts) of the data; `encode(samples)` are they as the policies' states.
    `show(samples, prompts)` draws them.
    `policies` maps a kind to a builder without arguments, see `Policies`; a world may have none. `policy` is the base
    model of `policy_kind`, the first kind if nothing else is said. What only one world has is a field of its class.
    """

    name: str
    prompts: list[Hashable]
    rewards: dict[str, Callable[[Any, list], Tensor]]
    default_reward: str
    oracle: Callable[[Any, list], Tensor]
    real: Callable[..., tuple[Any, list]]
    show: Callable[..., Any]
    oracle_scale: Literal["binary", "points"] = "binary"
    policies: Policies | Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    policy_kind: str | None = None
    held_out: list[Hashable] = field(default_factory=list)
    set_rewards: dict[str, Callable[[], Callable[[Any, list], Any]]] = field(default_factory=dict)
    encode: Callable[[Any], Any] = lambda samples: samples

    def __post_init__(self):
        if not isinstance(self.policies, Policies):
            self.policies = Policies(self.name, self.policies)
        if self.policy_kind is None:
            self.policy_kind = next(iter(self.policies), None)
        elif self.policy_kind not in self.policies:
            self.policies[self.policy_kind]  # raises, with the kinds that there are

    @property
    def policy(self) -> Any:
        """The base model that methods start from. Raises ValueError in a world without any."""
        if self.policy_kind is None:
            raise ValueError(
                f"world {self.name!r} has no policy: it offers data, rewards and an oracle, for methods that train or "
                "search without a base model. Build a policy yourself, or choose another world."
            )
        return self.policies[self.policy_kind]


@dataclass(kw_only=True)
class LanguageWorld(World):
    """Samples are texts of at most `num_tokens` tokens; `critic(num_heads=1)` builds a value network where one fits."""

    num_tokens: int
    critic: Callable[..., Any] | None = None


def missing_weights(name: str, problem: str) -> FileNotFoundError:
    """The one error for weights that are absent or damaged: it says what was found and which command remakes them."""
    return FileNotFoundError(
        f"the shipped weights of world {name!r} cannot be used: {problem}. Restore them with `git checkout -- "
        f"minialign/worlds/weights/{name}`, or remake them with `minialign pretrain {name}`."
    )


@contextmanager
def weights_of(name: str, folder: Path):
    """Around loading: what safetensors, json and the libraries raise, each their own, becomes the one error."""
    try:
        yield
    except Exception as error:
        raise missing_weights(name, f"{folder} does not load ({type(error).__name__}: {error})") from error


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
