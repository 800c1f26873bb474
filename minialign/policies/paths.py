"""Stored denoising paths, scored again: what log-ratios of whole paths, and losses on them, are made of.

    path_log_probs        a trajectory's transitions under the weights as they are now, or under the reference
    reference_log_probs   all of them under the reference, in calls of bounded size

Of paths x_T ... x_0 that start from the same law, log p(path) / p_ref(path) is the sum over steps of what these two
give: p(x_T) is in both, and cancels. Its mean over paths of the policy is the KL of paths; `measure.path_kl` has the
same without the noise of the steps, and without their gradient.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.policies.trajectory import Trajectory


def path_log_probs(
    policy,
    traj: Trajectory,
    rows: Int[Tensor, "n"],
    places: Int[Tensor, "k"],
    *,
    reduction: str,
    reference: bool = False,
) -> Float[Tensor, "n k"]:
    """log p(x_{t-1} | x_t) of trajectories `rows` at `places`, the same of each, in one network call of n k rows.

    Nats under "sum", nats an element under "mean". The gradient reaches the weights, not the states: they are data.
    """
    batch = traj.transitions(rows, places.expand(len(rows), -1))
    scored = {"next": batch.next, "reduction": reduction, "reference": reference}
    return policy.step(batch.states, batch.step, batch.condition, **scored).log_prob.view(len(rows), -1)


@torch.no_grad()
def reference_log_probs(
    policy,
    traj: Trajectory,
    *,
    reduction: str,
    rows_per_pass: int,
    steps_per_pass: int,
    rows: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, "n steps"]:
    """The whole trajectory, or some `rows` of it, under the reference; at most rows_per_pass times steps_per_pass rows
    in a network call."""
    num_rows, num_steps = traj.log_probs.shape
    every_row, steps = (torch.arange(n, device=traj.log_probs.device) for n in (num_rows, num_steps))
    rows = every_row if rows is None else rows
    if len(rows) == 0:
        return traj.log_probs[rows]
    passes = [
        [path_log_probs(policy, traj, r, s, reduction=reduction, reference=True) for s in steps.split(steps_per_pass)]
        for r in rows.split(rows_per_pass)
    ]
    return torch.cat([torch.cat(row, 1) for row in passes])
