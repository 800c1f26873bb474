"""Gaussians and their mixtures seen through noise: score, denoiser, density and flow in closed form, at any level.

    x_t = signal x_0 + noise_std noise        Level: variance preserving, Level.variance_preserving(alpha_bar), or
                                              EDM's (Karras et al., 2022), Level.edm(sigma); both go through one core
    v = signal^2 lambda + noise_std^2         variance of x_t along an eigenvector of variance lambda

A covariance is U diag(lambda) U', U (d, r) with orthonormal columns; outside their span the data is its mean, the noise
of course is not: v = noise_std^2 there. r = d is a full covariance. No call inverts a matrix.
The mean is subtracted before anything is rotated or squared: at sigma = .002 in float32, |x|^2 - 2 x mean + |mean|^2
loses whole nats.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from minialign.kernels.gaussian import at_least_float32

Number = Float[Tensor, "..."] | float | int


class Level(NamedTuple):
    """A noise level by its squares, of which variances are made; a number, or (batch,) for one a sample.

    signal_power = signal^2 (alpha_bar), noise_power = noise_std^2.
    """

    signal_power: Number
    noise_power: Number

    @classmethod
    def variance_preserving(cls, alpha_bar: Number) -> "Level":
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise: alpha_bar is 1 on data, 0 on pure noise."""
        return cls(alpha_bar, 1 - alpha_bar)

    @classmethod
    def edm(cls, sigma: Number) -> "Level":
        """x = x_0 + sigma noise."""
        return cls(1.0, sigma**2)

    @classmethod
    def of(cls, signal: Number, noise_std: Number) -> "Level":
        """x_t = signal x_0 + noise_std noise, whatever the schedule: what a diffusers scheduler says of itself."""
        return cls(signal**2, noise_std**2)


def _powers(level: Level, x: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Signal and noise power in x's dtype, (batch or 1, *ones)."""
    shape = (-1, *(1,) * axes)
    return tuple(torch.as_tensor(power, dtype=x.dtype, device=x.device).reshape(shape) for power in level)


def _same_precision(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


# One Gaussian ---------------------------------------------------------------------------------------------------------


def gaussian_score(
    x: Float[Tensor, "b d"],
    level: Level,
    mean: Float[Tensor, "d"],
    vectors: Float[Tensor, "d r"],
    values: Float[Tensor, "r"],
) -> Float[Tensor, "b d"]:
    """grad log p(x_t) = -U U'y / v - (y - U U'y) / noise_std^2, y = x_t - signal mean.

    Woodbury's form: products with (d, r), no d x d matrix. Limit: -y / noise_std^2 where lambda = 0.
    """
    x, mean, vectors, values = _same_precision(x, mean, vectors, values)
    signal_power, noise_power = _powers(level, x, 1)
    y = x - signal_power.sqrt() * mean
    inside = y @ vectors
    score = -(inside / (signal_power * values + noise_power)) @ vectors.mT
    if vectors.shape[0] == vectors.shape[1]:  # nothing is outside, and its rounding error must not be blown up
        return score
    return score - (y - inside @ vectors.mT) / noise_power


def gaussian_denoised(
    x: Float[Tensor, "b d"],
    level: Level,
    mean: Float[Tensor, "d"],
    vectors: Float[Tensor, "d r"],
    values: Float[Tensor, "r"],
) -> Float[Tensor, "b d"]:
    """E[x_0 | x_t] = mean + U (signal lambda / v) U'(x_t - signal mean): a mode appears once sigma < sqrt(lambda)."""
    x, mean, vectors, values = _same_precision(x, mean, vectors, values)
    signal_power, noise_power = _powers(level, x, 1)
    signal = signal_power.sqrt()
    shrink = signal * values / (signal_power * values + noise_power)
    return mean + ((x - signal * mean) @ vectors * shrink) @ vectors.mT


def gaussian_flow(
    x: Float[Tensor, "b d"],
    level_from: Level,
    level_to: Level,
    mean: Float[Tensor, "d"],
    vectors: Float[Tensor, "d r"],
    values: Float[Tensor, "r"],
) -> Float[Tensor, "b d"]:
    """The exact probability-flow solution of the Gaussian between two noise levels, in either direction.

    signal' mean + U sqrt(v' / v) U'y + (noise_std' / noise_std)(y - U U'y), y = x - signal mean, primes for the level
    gone to. Maps the marginal at one level onto that at the other. noise_std > 0 at the level of departure. The last
    term keeps the noise outside span(U): without it a network would see an impossible input.
    """
    x, mean, vectors, values = _same_precision(x, mean, vectors, values)
    (signal, noise), (signal_to, noise_to) = _powers(level_from, x, 1), _powers(level_to, x, 1)
    y = x - signal.sqrt() * mean
    stretch = ((signal_to * values + noise_to) / (signal * values + noise)).sqrt()
    outside = (noise_to / noise).sqrt()
    return signal_to.sqrt() * mean + outside * y + (y @ vectors * (stretch - outside)) @ vectors.mT


# Mixtures -------------------------------------------------------------------------------------------------------------


class _Components(NamedTuple):
    inside: Float[Tensor, "b c r"]  # U'y, y = x_t - signal mean
    outside: Float[Tensor, "b c d"] | None  # y - U U'y; None where r = d
    variance: Float[Tensor, "#b c r"]  # v
    log_joint: Float[Tensor, "b c"]  # log weight + log N(x_t; component)


def _components(
    x: Float[Tensor, "b d"],
    level: Level,
    log_weights: Float[Tensor, "#b c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> _Components:
    dim, rank = vectors.shape[1:]
    signal_power, noise_power = _powers(level, x, 2)
    y = x.unsqueeze(1) - signal_power.sqrt() * means
    inside = einsum(y, vectors, "b c d, c d r -> b c r")
    variance = signal_power * values + noise_power
    distance = (inside**2 / variance + variance.log()).sum(-1)
    outside = None
    if rank < dim:
        outside = y - einsum(inside, vectors, "b c r, c d r -> b c d")
        distance = distance + ((outside**2).sum(-1) / noise_power[..., 0] + (dim - rank) * noise_power[..., 0].log())
    log_joint = log_weights - (distance + dim * math.log(2 * math.pi)) / 2
    return _Components(inside, outside, variance, log_joint)


def mixture_log_prob(
    x: Float[Tensor, "b d"],
    level: Level,
    log_weights: Float[Tensor, "... c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> Float[Tensor, "b"]:
    """log p(x_t) = logsumexp_c log w_c + log N(x_t; signal mean_c, signal^2 Sigma_c + noise_std^2 I), in nats.

    log_weights (c,), or (batch, c) for weights of each row's own. Memory b c d, here and below.
    """
    x, log_weights, means, vectors, values = _same_precision(x, log_weights, means, vectors, values)
    return _components(x, level, torch.atleast_2d(log_weights), means, vectors, values).log_joint.logsumexp(-1)


def mixture_responsibilities(
    x: Float[Tensor, "b d"],
    level: Level,
    log_weights: Float[Tensor, "... c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> Float[Tensor, "b c"]:
    """p(component | x_t)."""
    x, log_weights, means, vectors, values = _same_precision(x, log_weights, means, vectors, values)
    return _components(x, level, torch.atleast_2d(log_weights), means, vectors, values).log_joint.softmax(-1)


def mixture_score(
    x: Float[Tensor, "b d"],
    level: Level,
    log_weights: Float[Tensor, "... c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> Float[Tensor, "b d"]:
    """grad log p(x_t): each component's score, weighted with p(component | x_t). One component: `gaussian_score`."""
    x, log_weights, means, vectors, values = _same_precision(x, log_weights, means, vectors, values)
    at = _components(x, level, torch.atleast_2d(log_weights), means, vectors, values)
    prob = at.log_joint.softmax(-1).unsqueeze(-1)
    score = -einsum(prob * at.inside / at.variance, vectors, "b c r, c d r -> b d")
    if at.outside is None:
        return score
    return score - (prob * at.outside).sum(1) / _powers(level, x, 1)[1]


def mixture_denoised(
    x: Float[Tensor, "b d"],
    level: Level,
    log_weights: Float[Tensor, "... c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> Float[Tensor, "b d"]:
    """E[x_0 | x_t]: each component's denoised guess, weighted with p(component | x_t); at signal 0 the data's mean."""
    x, log_weights, means, vectors, values = _same_precision(x, log_weights, means, vectors, values)
    at = _components(x, level, torch.atleast_2d(log_weights), means, vectors, values)
    prob, signal = at.log_joint.softmax(-1), _powers(level, x, 2)[0].sqrt()
    shrunk = prob.unsqueeze(-1) * signal * values / at.variance * at.inside
    return prob @ means + einsum(shrunk, vectors, "b c r, c d r -> b d")


def delta_score(x: Float[Tensor, "b d"], level: Level, data: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
    """Score of the training set itself, a mixture of n points: what a network would learn that memorises. signal > 0.

    Distances are summed directly, n b d operations: as |x|^2 - 2 x y + |y|^2 they would have no digits at low noise.
    """
    x, data = at_least_float32(x), at_least_float32(data)
    signal_power, noise_power = _powers(level, x, 1)
    signal = signal_power.sqrt()
    distance = signal * torch.cdist(x / signal, data, compute_mode="donot_use_mm_for_euclid_dist")
    return (signal * ((-(distance**2) / (2 * noise_power)).softmax(-1) @ data) - x) / noise_power
