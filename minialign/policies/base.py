"""What every policy deals in: conditions, trajectories, and the single transitions that a loss picks from them."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass
class Condition:
    """Named inputs of the network, one row a sample; `condition[rows]` selects. `rows`: which prompt each came from."""

    tensors: dict[str, Tensor]
    rows: Tensor

    def __getitem__(self, index) -> "Condition":
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()}, self.rows[index])

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
