"""What every denoising policy deals in: conditions, trajectories, and the transitions that a loss picks from them."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Encoded(NamedTuple):
    """What an encoder makes of prompts: the first two have a row a prompt, `shared` has no row axis."""

    inputs: dict[str, Tensor]
    unconditional: dict[str, Tensor] = {}  # noqa: RUF012 (never written to)
    shared: dict[str, Tensor] = {}  # noqa: RUF012


@dataclass
class Condition:
    """Named inputs of the network; `condition[rows]` selects rows.

    inputs: a row a sample. unconditional: those without the prompt, of the same names, for guidance; empty if it is
    off. shared: the same for every row, without a row axis (image ids, a guidance embedding); goes with any rows.
    rows (n,): which of the distinct prompts each row came from.
    """

    inputs: dict[str, Tensor]
    unconditional: dict[str, Tensor]
    shared: dict[str, Tensor]
    rows: Tensor

    def __getitem__(self, index) -> "Condition":
        inputs, unconditional = (
            {name: tensor[index] for name, tensor in part.items()} for part in (self.inputs, self.unconditional)
        )
        return Condition(inputs, unconditional, self.shared, self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)


class Transitions(NamedTuple):
    """Single steps, one a row: from `states` by policy step `step` to `next`, with its log-probability back then."""

    states: Tensor
    step: Tensor
    condition: Condition
    next: Tensor
    log_prob_old: Tensor


@dataclass
class Trajectory:
    """Denoising runs, from noise to data: `states[:, 0]` is noisiest, `states[:, i + 1]` follows by step `steps[i]`.

    states (batch, S + 1, *latent); log_probs (batch, S) under the weights that rolled it out; steps (S,) indices into
    the policy's `timesteps`; timesteps (S,) the network's integers; final (batch, *latent) what `policy.decode` takes.
    log_probs are data. states and final carry the sampler's graph where the rollout kept one.
    A run that started late, from the branching point of a tree, has `steps[0] > 0`.
    """

    states: Tensor
    log_probs: Tensor
    steps: Tensor
    timesteps: Tensor
    condition: Condition
    final: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def transitions(self, rows: Tensor, places: Tensor) -> Transitions:
        """The transitions of trajectories `rows` (n,) at their `places` (n, k), flattened to n k rows.

        A place counts from the start of this trajectory, not of the policy's steps: branches start in the middle.
        """
        b, s = rows.repeat_interleave(places.shape[1]), places.flatten()
        return Transitions(
            self.states[b, s], self.steps[s], self.condition[b], self.states[b, s + 1], self.log_probs[b, s]
        )
