"""One Gaussian, fitted to data or given by its moments: what far from the data every distribution looks like."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import Level, at_least_float32, gaussian_denoised, gaussian_flow, gaussian_score

AnyLevel = Level | Float[Tensor, "..."] | float | int


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of data, the latter by its eigenpairs: all that teleportation knows of a data set.

    mean (d,); vectors (d, r), orthonormal columns; values (r,), variances along them. Its methods take x (batch, *dims)
    with d elements a sample, in the range in which the network was trained (sheet teleport, trap 1: pixels in [0, 1]
    give a wrong jump that looks plausible), and give float32 at least. A noise level is a `kernels.Level`, or a number:
    EDM's sigma, so that `denoised` can stand wherever a denoiser(x, sigma) can.
    """

    mean: Float[Tensor, "d"]
    vectors: Float[Tensor, "d r"]
    values: Float[Tensor, "r"]

    @classmethod
    def fit(cls, data: Float[Tensor, "n *dims"], rank: int | None = None) -> "Gaussian":
        """Sample mean and the leading `rank` eigenpairs (all by default) of the covariance (divisor n - 1).

        Never forms d x d when n < d: the n x n Gram matrix has the same eigenvalues. Where the rank is small against
        both, a randomised range finder (Halko et al., 2011) serves. Memory is linear in d. ValueError for n < 2.
        """
        y = at_least_float32(data.flatten(1))
        n, d = y.shape
        most = min(n - 1, d)
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 samples; there is {n}.")
        if rank is not None and not 1 <= rank <= most:
            raise ValueError(f"rank is {rank}; {n} samples of {d} elements have a covariance of rank 1 to {most}.")
        if not y.isfinite().all():
            raise ValueError("the data has nan or inf in it, and so would every eigenvector.")
        mean = y.double().mean(0).to(y.dtype)
        y = y - mean
        if rank is not None and 6 * (rank + 10) < min(n, d):
            values, vectors = _leading(y, rank)
        else:
            small = y.mT @ y if d <= n else y @ y.mT
            small = small / (n - 1) if rank else small.double() / (n - 1)  # the last eigenpairs want the digits
            values, vectors = torch.linalg.eigh(small)
            vectors = vectors.to(y.dtype).flip(1)[:, :most]
            values = values.to(y.dtype).flip(0)[:most]
            if d > n:
                vectors = torch.linalg.qr(y.mT @ vectors).Q  # the columns are orthogonal already: this only scales them
            values, vectors = values[:rank], vectors[:, :rank]
        return cls(mean, vectors.contiguous(), values.clamp_min(0))

    @classmethod
    def from_moments(cls, mean: Float[Tensor, "d"], covariance: Float[Tensor, "d d"], rank: int | None = None):
        """From a known mean and covariance, for example `GaussianMixture.moments()` of an exact world."""
        values, vectors = torch.linalg.eigh(covariance)
        return cls(mean, vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0))

    def truncated(self, rank: int) -> "Gaussian":
        """Its leading `rank` modes alone."""
        return Gaussian(self.mean, self.vectors[:, :rank], self.values[:rank])

    def to(self, *args) -> "Gaussian":
        """On another device or in another dtype."""
        return Gaussian(self.mean.to(*args), self.vectors.to(*args), self.values.to(*args))

    def _apply(self, kernel: Callable, x: Tensor, *levels: Level) -> Tensor:
        if x[0].numel() != len(self.mean):
            raise ValueError(
                f"x has {x[0].numel()} elements a sample, these statistics {len(self.mean)}: they are of other data "
                f"(pixels instead of latents?) or of another size. x is {tuple(x.shape)}; only its first axis counts "
                "samples."
            )
        return kernel(x.flatten(1), *levels, self.mean, self.vectors, self.values).reshape(x.shape)

    def score(self, x: Float[Tensor, "b *dims"], level: AnyLevel) -> Float[Tensor, "b *dims"]:
        """grad log p(x_t), see `kernels.gaussian_score`."""
        return self._apply(gaussian_score, x, _level(level))

    def denoised(self, x: Float[Tensor, "b *dims"], level: AnyLevel) -> Float[Tensor, "b *dims"]:
        """E[x_0 | x_t], see `kernels.gaussian_denoised`."""
        return self._apply(gaussian_denoised, x, _level(level))

    def flow(self, x: Float[Tensor, "b *dims"], level_from: AnyLevel, level_to: AnyLevel) -> Float[Tensor, "b *dims"]:
        """Where the probability-flow ODE takes x between two levels, see `kernels.gaussian_flow`."""
        return self._apply(gaussian_flow, x, _level(level_from), _level(level_to))

    def trajectory(self, x: Float[Tensor, "b *dims"], sigmas: Float[Tensor, "t"]) -> Float[Tensor, "t b *dims"]:
        """The whole path from x at sigmas[0] through all levels."""
        return torch.stack([self.flow(x, sigmas[0], sigma) for sigma in sigmas])


def _level(level: AnyLevel) -> Level:
    return level if isinstance(level, Level) else Level.edm(level)


def _leading(y: Float[Tensor, "n d"], rank: int) -> tuple[Float[Tensor, "r"], Float[Tensor, "d r"]]:
    """Leading eigenpairs of the centred data's covariance by a randomised singular value decomposition."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # svd_lowrank draws from the global generator; equal data must give equal statistics
        _, singular, vectors = torch.svd_lowrank(y, q=rank + 10, niter=2)
    return singular[:rank] ** 2 / (len(y) - 1), vectors[:, :rank]
