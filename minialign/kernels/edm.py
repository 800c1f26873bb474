"""Noise levels and preconditioning of EDM (Karras et al., 2022, arXiv 2206.00364): x = x_0 + sigma noise.

The probability-flow ODE is then dx / dsigma = (x - D(x, sigma)) / sigma, with D the denoiser E[x_0 | x].
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.kernels.gaussian import at_least_float32, expand_as, same_shape


def karras_sigmas(
    num_points: int,
    sigma_min: float = 0.002,
    sigma_max: float | int = 80.0,
    rho: float | int = 7.0,
    dtype=torch.float32,
) -> Float[Tensor, "levels"]:
    """Levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho), and a last 0 (eq. 5).

    Restarted at any of its own points with the points that are left, the grid is the same.
    """  # fmt: skip
    if num_points < 2:
        raise ValueError(f"num_points is {num_points}; the grid from sigma_max to sigma_min needs at least 2.")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    grid = (high + torch.arange(num_points, dtype=torch.float64) / (num_points - 1) * (low - high)) ** rho
    return torch.cat([grid, grid.new_zeros(1)]).to(dtype)


def edm_scalings(
    sigma: Float[Tensor, "batch"], sigma_data: float
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """(c_skip, c_out, c_in, c_noise) of table 1: the network's input and target have unit variance at each level."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4


def edm_denoised(
    model_output: Float[Tensor, "batch *dims"],
    state: Float[Tensor, "batch *dims"],
    sigma: Float[Tensor, "batch"],
    sigma_data: float,
) -> Float[Tensor, "batch *dims"]:
    """D = c_skip x + c_out F (eq. 7). As sigma -> 0 it is x, whatever the network says; at large sigma sigma_data F."""
    same_shape(model_output=model_output, state=state)
    c_skip, c_out, _, _ = edm_scalings(at_least_float32(sigma), sigma_data)
    state = at_least_float32(state)
    return expand_as(c_skip, state) * state + expand_as(c_out, state) * model_output
