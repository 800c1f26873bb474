"""Consistency functions in discrete, variance-preserving time (Luo et al., 2023, arXiv 2310.04378), and their sampler.

A consistency function maps any point of a probability-flow trajectory to the trajectory's end, so f(x, 0) = x. Sampling
alternates f with fresh noise: re-noising is Gaussian, which makes the pair a policy (Oertell et al., arXiv 2404.03673).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels.diffusion import PredictionType, predict
from minialign.kernels.gaussian import Reduction, StepOut, at_least_float32, expand_as, gaussian_step


def boundary_scalings(
    timesteps: Int[Tensor, "batch"], timestep_scaling: float = 10.0, sigma_data: float = 0.5, dtype=torch.float32
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """(c_skip, c_out): 1 and 0 at timestep 0, and with the usual scaling of 10 nearly 0 and 1 from timestep 1 on."""
    tau = timestep_scaling * timesteps.to(dtype)
    return sigma_data**2 / (tau**2 + sigma_data**2), tau / (tau**2 + sigma_data**2).sqrt()


def consistency_function(
    model_output: Float[Tensor, "batch *dims"],
    state: Float[Tensor, "batch *dims"],
    alpha_bar: Float[Tensor, "batch"],
    timesteps: Int[Tensor, "batch"],
    prediction_type: PredictionType = "epsilon",
    timestep_scaling: float = 10.0,
) -> Float[Tensor, "batch *dims"]:
    """f(x, t) = c_skip(t) x + c_out(t) denoised(x, t); exactly x at t = 0, whatever the network says."""
    state = at_least_float32(state)
    denoised, _ = predict(at_least_float32(model_output), state, alpha_bar, prediction_type)
    c_skip, c_out = boundary_scalings(timesteps, timestep_scaling, dtype=state.dtype)
    return expand_as(c_skip, state) * state + expand_as(c_out, state) * denoised


def consistency_step(
    denoised: Float[Tensor, "batch *dims"],
    signal: Float[Tensor, "batch"],
    std: Float[Tensor, "batch"],
    *,
    reduction: Reduction,
    next: Float[Tensor, "batch *dims"] | None = None,
    noise: Float[Tensor, "batch *dims"] | None = None,
) -> StepOut:
    """Re-noise f's output to the NEXT level: N(signal f, std^2 I); signal^2 = alpha_bar', std^2 = 1 - alpha_bar'.

    Scores `next` when it is given (detached: it is data), else moves to mean + std * noise, through which the gradient
    flows; `StepOut` says what log_prob's gradient is.
    Where std = 0 (after the last call) `next` is the mean, and log_prob is nan or inf: there is no density.
    """
    denoised = at_least_float32(denoised)
    mean = expand_as(signal, denoised) * denoised
    return gaussian_step(denoised, mean, std, next=next, noise=noise, reduction=reduction)


def lcm_timesteps(num_steps: int, original_steps: int = 50, style: str = "linspace") -> list[int]:
    """The sampler's timesteps out of the distillation grid 999, 979, ..., 19 (of 1,000), noisiest first.

    "linspace": as diffusers spaces them today; "stride": as its first versions did, and with them RLCM's code.
    """
    if style not in ("linspace", "stride"):
        raise ValueError(f"style is {style!r}; expected 'linspace' or 'stride'.")
    if not 1 <= num_steps <= original_steps:
        raise ValueError(
            f"num_steps is {num_steps}; the distillation grid has 1 to {original_steps} steps to choose from."
        )
    grid = [(i + 1) * (1000 // original_steps) - 1 for i in range(original_steps)][::-1]
    if style == "stride":
        return grid[:: original_steps // num_steps][:num_steps]
    return [grid[i * original_steps // num_steps] for i in range(num_steps)]


def guidance_embedding(w: Float[Tensor, "batch"], dim: int) -> Float[Tensor, "batch dim"]:
    """Sinusoids of 1000 w, which a latent consistency model's UNet takes beside the time. w = guidance_scale - 1."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device, dtype=w.dtype) * (-math.log(10_000.0) / (half - 1)))
    phase = 1000 * w.unsqueeze(-1) * frequencies
    return torch.nn.functional.pad(torch.cat([phase.sin(), phase.cos()], -1), (0, dim % 2))


def lcm_guidance(guidance_scale: float | Tensor) -> float | Tensor:
    """w of e_c + w (e_c - e_u), the consistency papers' convention, from diffusers' g of e_u + g (e_c - e_u): g - 1."""
    return guidance_scale - 1


def diffusers_guidance(w: float | Tensor) -> float | Tensor:
    """The way back: g = w + 1. No guidance is g = 1 here, w = 0 there."""
    return w + 1
