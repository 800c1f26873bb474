"""Gaussian transitions: the density that turns a sampler into a policy.

Every stochastic step in this package (diffusion, consistency, flow) is an isotropic Gaussian N(mean, std^2 I) whose std
has no parameters. `reduction` says how the D elements of a sample are put together: "sum" is the log-density itself,
"mean" is that divided by D, which keeps importance ratios finite at D = 16,384 and rescales beta and clip ranges by D.
"""

import math
from typing import Literal, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

Reduction = Literal["sum", "mean"]


class StepOut(NamedTuple):
    """One stochastic step: `next` was sampled, or given and scored.

    next: sampled as mean + std noise, it carries the gradient (pathwise); given, it is data and carries none.
    log_prob: log N(next; mean, std^2 I) in nats (per element under "mean"), with `next` as data either way: its
    gradient flows through the mean alone (score function). Of an attached sample it would be exactly 0, silently.
    denoised: the guess of x_0 that the step was made from, in the latent space.
    """

    next: Float[Tensor, "batch *dims"]
    mean: Float[Tensor, "batch *dims"]
    std: Float[Tensor, "batch"]
    log_prob: Float[Tensor, "batch"]
    denoised: Float[Tensor, "batch *dims"]


def same_shape(**tensors: Tensor) -> None:
    """Raises ValueError for shapes that would be broadcast: of (n,) and (n, 1) torch makes (n, n), in silence."""
    first, *rest = tensors.values()
    if any(x.shape != first.shape for x in rest):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"got {shapes}: expected one shape; broadcast on purpose, with expand.")


def expand_as(scalar: Float[Tensor, "batch"], x: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *ones"]:
    """One number a sample, with trailing axes of one so that it broadcasts against x. Raises ValueError for others."""
    if scalar.shape != x.shape[:1]:
        raise ValueError(f"got {tuple(scalar.shape)} for a batch {tuple(x.shape)}: expected one number a sample.")
    return scalar.reshape(scalar.shape + (1,) * (x.ndim - 1))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions become float32: a log-ratio of two near-equal densities would have no digits left in them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gaussian_log_prob(
    x: Float[Tensor, "batch *dims"],
    mean: Float[Tensor, "batch *dims"],
    std: Float[Tensor, "batch"],
    reduction: Reduction,
) -> Float[Tensor, "batch"]:
    """log N(x; mean, std^2 I), in float32 at least. At x = mean: -log std - 0.5 log 2 pi an element.

    std = 0 gives inf or nan, not an error (it would cost a host synchronisation): `DiffusionPolicy` refuses it before.
    """
    same_shape(x=x, mean=mean)
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    std = expand_as(std, x)
    elements = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return reduce(elements, "batch ... -> batch", reduction)


def gaussian_kl(
    mean: Float[Tensor, "batch *dims"],
    mean_ref: Float[Tensor, "batch *dims"],
    std: Float[Tensor, "batch"],
    reduction: Reduction,
) -> Float[Tensor, "batch"]:
    """KL(N(mean, std^2 I) || N(mean_ref, std^2 I)) = |mean - mean_ref|^2 / (2 std^2). Symmetric: both share std."""
    same_shape(mean=mean, mean_ref=mean_ref)
    mean, mean_ref, std = at_least_float32(mean), at_least_float32(mean_ref), at_least_float32(std)
    return reduce(0.5 * ((mean - mean_ref) / expand_as(std, mean)) ** 2, "batch ... -> batch", reduction)


def diagonal_log_prob(
    x: Float[Tensor, "batch *dims"],
    mean: Float[Tensor, "batch *dims"],
    log_std: Float[Tensor, "batch *dims"],
    reduction: Reduction,
) -> Float[Tensor, "batch"]:
    """log N(x; mean, diag(std)^2), a std an element, in float32 at least. Where all are equal: `gaussian_log_prob`."""
    same_shape(x=x, mean=mean, log_std=log_std)
    x, mean, log_std = at_least_float32(x), at_least_float32(mean), at_least_float32(log_std)
    elements = -0.5 * ((x - mean) * (-log_std).exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return reduce(elements, "batch ... -> batch", reduction)


def standard_normal_kl(
    mean: Float[Tensor, "batch *dims"], log_std: Float[Tensor, "batch *dims"], reduction: Reduction
) -> Float[Tensor, "batch"]:
    """KL(N(mean, diag(std)^2) || N(0, I)): (mean^2 + std^2 - 1) / 2 - log std an element, in that direction."""
    same_shape(mean=mean, log_std=log_std)
    mean, log_std = at_least_float32(mean), at_least_float32(log_std)
    elements = 0.5 * (mean**2 + torch.expm1(2 * log_std)) - log_std  # expm1: near std = 1 nothing cancels
    return reduce(elements, "batch ... -> batch", reduction)


def gaussian_step(
    denoised: Float[Tensor, "batch *dims"],
    mean: Float[Tensor, "batch *dims"],
    std: Float[Tensor, "batch"],
    *,
    next: Float[Tensor, "batch *dims"] | None,
    noise: Float[Tensor, "batch *dims"] | None,
    reduction: Reduction,
) -> StepOut:
    """The end of every Gaussian step: samples mean + std noise (no noise: the mean), or scores `next` if it is given.

    See `StepOut` for the gradients: the sample is attached, the log-density is of a detached one.
    """
    if noise is not None:
        same_shape(mean=mean, noise=noise)
    sampled = mean if noise is None else mean + expand_as(std, mean) * noise
    next = sampled if next is None else next.detach().to(mean.dtype)
    return StepOut(next, mean, std, gaussian_log_prob(next.detach(), mean, std, reduction), denoised)


def squared_error(
    x: Float[Tensor, "batch *dims"], y: Float[Tensor, "batch *dims"], reduction: Reduction
) -> Float[Tensor, "batch"]:
    """|x - y|^2 a sample, in float32 at least: "sum" over its elements, or their "mean"."""
    same_shape(x=x, y=y)
    return reduce((at_least_float32(x) - at_least_float32(y)).square(), "batch ... -> batch", reduction)
