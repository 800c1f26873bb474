"""Rectified flow: its straight paths, and the ODE that samples it turned into an SDE, whose steps have a density.

Notation, as in the papers (Liu et al., 2025, arXiv 2505.05470, Flow-GRPO; Xue et al., 2025, arXiv 2505.07818,
DanceGRPO): t = 1 is noise, t = 0 is data, x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0. So

    E[x_0 | x_t] = x_t - t v,    E[noise | x_t] = x_t + (1 - t) v,    score = -(x_t + (1 - t) v) / t.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.kernels.gaussian import Reduction, StepOut, at_least_float32, expand_as, gaussian_step, same_shape

NoiseSchedule = Literal["flow_grpo", "constant"]


def add_flow_noise(
    denoised: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"], t: Float[Tensor, "batch"]
) -> Float[Tensor, "batch *dims"]:
    """x_t = (1 - t) x_0 + t noise."""
    same_shape(denoised=denoised, noise=noise)
    t = expand_as(t, denoised)
    return (1 - t) * denoised + t * noise


def flow_diffusion(
    t: Float[Tensor, "*any"], noise_level: float | int, schedule: NoiseSchedule, t_second: Float[Tensor, ""]
) -> Float[Tensor, "*any"]:
    """s_t, the noise that the SDE adds per root of time. "flow_grpo": a sqrt(t / (1 - t)), Flow-GRPO's, with
    a = noise_level; at t = 1 the denominator takes the grid's second level `t_second`, the numerator stays.
    "constant": eta = noise_level, DanceGRPO.
    """
    if schedule == "constant":
        return torch.full_like(t, noise_level)
    return noise_level * (t / (1 - torch.where(t == 1, t_second, t))).sqrt()


def flow_step(
    velocity: Float[Tensor, "batch *dims"],
    state: Float[Tensor, "batch *dims"],
    t: Float[Tensor, "batch"],
    t_next: Float[Tensor, "batch"],
    diffusion: Float[Tensor, "batch"],
    *,
    reduction: Reduction,
    next: Float[Tensor, "batch *dims"] | None = None,
    noise: Float[Tensor, "batch *dims"] | None = None,
) -> StepOut:
    """x_t -> x_{t'}: N(x + v dt - s^2 / 2 score dt, s^2 |dt| I) with dt = t' - t < 0 and s = diffusion, (batch,).

    The score's term pays back what the noise spreads, so that in the limit of small steps every x_t has the marginal
    that the ODE gives it (Flow-GRPO). s = 0 is Euler's step of the ODE; log_prob is then nan or inf. Scores
    `next` when it is given, else samples with `noise`; `StepOut` says where gradients flow.
    """
    state, velocity = at_least_float32(state), at_least_float32(velocity)
    same_shape(velocity=velocity, state=state)
    dt, at = expand_as(t_next - t, state), expand_as(t, state)
    score = -(state + (1 - at) * velocity) / at
    mean = state + (velocity - expand_as(diffusion, state) ** 2 / 2 * score) * dt
    return gaussian_step(
        state - at * velocity, mean, diffusion * (t - t_next).sqrt(), next=next, noise=noise, reduction=reduction
    )


def variance_preserving_of(t: Float[Tensor, "*any"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """(alpha_bar, scale): x_t / scale is a variance-preserving state of that alpha_bar, with the same signal to noise.

    scale = sqrt((1 - t)^2 + t^2). So a diffusion model is a flow model with another clock.
    """
    scale = ((1 - t) ** 2 + t**2).sqrt()
    return ((1 - t) / scale) ** 2, scale
