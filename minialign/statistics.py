"""Rewards remembered from round to round, by name: what an advantage is measured against.

    Moments       count, mean, population variance, lowest and highest of some rewards, for each name or for all
    Statistics    the moments of what was seen: the last few of each name, the last few rounds, or everything

DDPO's buffer a prompt, B2-DiffuRL's history of stages and PAR's running mean are three settings of the one class. It is
kept with a run's checkpoint by name, so that prompts may come in another order, or new ones join, when it goes on.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels import at_least_float32


def key_of(name: Hashable) -> str:
    """What a name is kept under: a string as it is, anything else by its type and repr.

    Raises ValueError for a repr that a later process would not give again: an object's address, a frozenset's order.
    """
    if isinstance(name, str):
        return name
    if type(name).__repr__ is object.__repr__ or isinstance(name, frozenset):
        raise ValueError(
            f"prompt {name!r} has no name that outlives this process; use a string, a number, a tuple of those, or a "
            "frozen dataclass."
        )
    return f"{type(name).__name__} {name!r}"


@dataclass(frozen=True)
class Moments:
    """Of the rewards of each name, (names,), or of all together, (); `moments[index]` picks names."""

    count: Float[Tensor, "*names"]
    mean: Float[Tensor, "*names"]
    var: Float[Tensor, "*names"]
    low: Float[Tensor, "*names"]
    high: Float[Tensor, "*names"]

    @classmethod
    def of(cls, rewards: Float[Tensor, "*any"]) -> "Moments":
        """Of all of them. Equal rewards have exactly their value as mean, and variance 0."""
        rewards = at_least_float32(rewards).flatten()
        grouped = cls.by_index(rewards, torch.zeros_like(rewards, dtype=torch.long), 1)
        return grouped[0]

    @classmethod
    def by_index(cls, rewards: Float[Tensor, "n"], index: Int[Tensor, "n"], num_names: int) -> "Moments":
        """Of the rewards of each index in [0, num_names); a name without any has count 0 and means nothing."""
        empty = rewards.new_zeros(num_names)
        count = empty.index_add(0, index, torch.ones_like(rewards))
        low = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
        high = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
        shifted = rewards - low[index]  # equal rewards are then exact zeros; rounding would survive a division by std
        mean = empty.index_add(0, index, shifted) / count.clamp_min(1)
        var = empty.index_add(0, index, (shifted - mean[index]) ** 2) / count.clamp_min(1)
        return cls(count, low + mean, var, low, high)

    def __getitem__(self, index) -> "Moments":
        return Moments(*(value[index] for value in self.tensors().values()))

    def merge(self, new: "Moments") -> "Moments":
        """Of both together: pooled mean, and variance within plus variance between."""
        count = self.count + new.count
        share = new.count / count.clamp_min(1)
        mean = self.mean + share * (new.mean - self.mean)
        within = (1 - share) * self.var + share * new.var
        between = share * (1 - share) * (new.mean - self.mean) ** 2
        low, high = torch.minimum(self.low, new.low), torch.maximum(self.high, new.high)
        return Moments(count, mean, within + between, low, high)

    @property
    def std(self) -> Float[Tensor, "*names"]:
        """Of the population: sqrt(var)."""
        return self.var.sqrt()

    @property
    def unbiased_std(self) -> Float[Tensor, "*names"]:
        """With Bessel's correction; 0 where there are fewer than two."""
        return (self.var * self.count / (self.count - 1).clamp_min(1)).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count, "mean": self.mean, "var": self.var, "low": self.low, "high": self.high}


class Statistics:
    """Rewards by name. last: how many of each name are remembered; rounds: how many rounds, the current one included.

    Neither: everything is. They are kept in float64 on the CPU. Names are any hashable, see `key_of`. Raises ValueError
    for a memory of none.
    """

    def __init__(self, last: int | None = None, rounds: int | None = None):
        for name, value in (("last", last), ("rounds", rounds)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1, or None for all.")
        self.last, self.rounds = last, rounds
        self.names: dict[str, int] = {}
        self.index = torch.empty(0, dtype=torch.long)
        self.rewards = torch.empty(0, dtype=torch.float64)
        self.age = torch.empty(0, dtype=torch.long)  # in rounds

    def update(self, names: Sequence[Hashable], rewards: Float[Tensor, "n"]) -> Moments:
        """Takes a round in, forgets what is too old, and gives the moments of each row's name, (n,), on the CPU."""
        keys = {name: key_of(name) for name in dict.fromkeys(names)}
        rows = [self.names.setdefault(keys[name], len(self.names)) for name in names]
        rows = torch.tensor(rows, dtype=torch.long)
        self.index = torch.cat([self.index, rows])
        self.rewards = torch.cat([self.rewards, rewards.detach().double().cpu()])
        self.age = torch.cat([self.age + 1, torch.zeros_like(rows)])
        self._forget()
        return Moments.by_index(self.rewards, self.index, len(self.names))[rows]

    def _forget(self) -> None:
        keep = torch.ones_like(self.index, dtype=torch.bool)
        if self.rounds is not None:
            keep &= self.age < self.rounds
        if self.last is not None:
            order = torch.argsort(self.index, stable=True)  # by name, and within it by arrival
            count = torch.bincount(self.index, minlength=len(self.names))
            place = torch.arange(len(order)) - (count.cumsum(0) - count)[self.index[order]]
            keep[order] &= place >= count[self.index[order]] - self.last
        self.index, self.rewards, self.age = self.index[keep], self.rewards[keep], self.age[keep]

    def tensors(self) -> dict[str, Tensor]:
        names = torch.tensor(list(json.dumps(list(self.names)).encode()), dtype=torch.uint8)
        return {"names": names, "index": self.index, "rewards": self.rewards, "age": self.age}

    def load(self, tensors: dict[str, Tensor]) -> None:
        names = json.loads(bytes(tensors["names"].tolist()))
        self.names = {name: i for i, name in enumerate(names)}
        self.index, self.rewards, self.age = (tensors[name].clone() for name in ("index", "rewards", "age"))
