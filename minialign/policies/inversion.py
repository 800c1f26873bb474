"""Inversion: from a clean sample to the noise that the model itself would have made it from (Song et al., 2021, DDIM).

    sampler     x_t -> x_{t - dt}, deterministic, with eps = eps_theta(x_t, t)
    inversion   the same step read backwards: its eps would be needed at a point that is not there yet

DDIM inversion takes eps at the point that is left: of first order, the error halves with twice the steps. ReNoise
(Garibi et al., 2024, arXiv 2403.14602) takes it again where that guess arrives, at the level it arrives at, and steps
with the average: Heun's rule, of second order. SmPO's official code asks the second time at the old level (`level`);
its and InPO's end at a level of a fixed grid that is not the one they name. Here each row's own grid ends at its level.
"""

from typing import Literal

import torch
from torch import Tensor

from minialign.kernels import expand_as, posterior_std, transport
from minialign.policies.trajectory import Condition
from minialign.settings import Count, demand


@torch.no_grad()
def invert(
    policy,
    latents: Tensor,
    levels: Tensor,
    condition: Condition,
    *,
    num_steps: int = 5,
    renoise: bool = False,
    reference: bool = True,
    level: Literal["new", "old"] = "new",
    noise: Tensor | None = None,
) -> Tensor:
    """The states (n, *latent) at `levels` (n,) from which the sampler would reach `latents`, which lie at level 0.

    levels: of a diffusion policy training timesteps, of a flow t; each row has a grid of num_steps equal steps, rounded
    to timesteps. renoise: each step twice, see above; level: at which it asks again ("old": of first order only).
    reference: inverts with the base model, which does not drift while the policy trains. noise (n, num_steps, *latent):
    added after each step, in the sampler's standard deviations at eta = 1 (InPO's random term). Unguided. Evaluations:
    num_steps a row, twice that with renoise.
    """
    demand(Count, num_steps=num_steps)
    states, before = latents.to(policy.state_dtype), torch.zeros_like(levels)
    for i in range(num_steps):
        after = levels * (i + 1) / num_steps
        after = after if levels.is_floating_point() else after.round().long()
        ends = policy.signal_and_noise(before), policy.signal_and_noise(after)
        seen = policy.noise_at(states, before, condition, reference)
        arrived = transport(seen, states, *ends)
        if renoise:
            asked = after if level == "new" else before
            seen = (seen + policy.noise_at(arrived, asked, condition, reference)) / 2
            arrived = transport(seen, states, *ends)
        if noise is not None:
            arrived = arrived + expand_as(posterior_std(*ends), arrived) * noise[:, i]
        states, before = arrived, after
    return states


def implied_noise(policy, latents: Tensor, levels: Tensor, states: Tensor) -> Tensor:
    """tau with signal latents + noise tau = states at `levels` (n,): what corrupts `latents` to just these states.

    There must be noise at the level: at a flow's t = 0 tau is nan.
    """
    signal, noise = (expand_as(x, states) for x in policy.signal_and_noise(levels))
    return (states - signal * latents) / noise
