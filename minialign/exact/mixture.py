"""Gaussian mixtures: all questions about their noised versions, and tilts by quadratic rewards, in closed form."""

from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from minialign import kernels
from minialign.exact.gaussian import AnyLevel
from minialign.kernels import Level, at_least_float32


class GaussianMixture(nn.Module):
    """sum_c weights_c N(means_c, covariances_c), and every question about its noised versions answered exactly.

    Covariances are diagonalised once, and `rank` keeps their leading eigenpairs alone (the data then has no width
    outside them): `values` (c, r), ascending, and `vectors` (c, d, r). x is (batch, *dims) with d = prod(dims)
    elements, so images need no reshaping. A noise level is a number or (batch,), which is alpha_bar of a variance
    preserving process, or a `kernels.Level`, for example `Level.edm(sigma)`. `log_weights` (batch, c) replaces the
    mixture's own row by row: a question about a class. Results have x's dtype; the arithmetic is in float32 at least.
    Raises ValueError for covariances that are not symmetric and positive semi-definite, and for negative weights.
    """

    def __init__(
        self,
        means: Float[Tensor, "c d"],
        covariances: Float[Tensor, "c d d"],
        weights: Float[Tensor, "c"] | None = None,
        rank: int | None = None,
    ):
        super().__init__()
        weights = torch.ones_like(means[:, 0]) if weights is None else weights
        if (weights < 0).any() or weights.sum() <= 0:
            raise ValueError(f"mixture weights are {weights.tolist()}; expected none negative and not all zero.")
        rank = means.shape[1] if rank is None else rank
        if not 1 <= rank <= means.shape[1]:
            raise ValueError(
                f"rank is {rank}; a covariance of {means.shape[1]} elements has 1 to {means.shape[1]} modes."
            )
        values, vectors = torch.linalg.eigh(covariances)
        slack = 1e-5 * covariances.abs().amax()
        if (values < -slack).any() or ((covariances - covariances.mT).abs() > slack).any():
            raise ValueError("a covariance is not symmetric positive semi-definite; (A + A.mT) / 2 repairs rounding.")
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("values", values[:, -rank:].clamp_min(0))  # (c, r)
        self.register_buffer("vectors", vectors[..., -rank:])  # (c, d, r): columns

    @classmethod
    def isotropic(cls, means: Float[Tensor, "c d"], std: float, weights: Tensor | None = None) -> "GaussianMixture":
        """Components of one standard deviation `std` in every direction."""
        eye = torch.eye(means.shape[-1]).to(means)
        return cls(means, (std**2 * eye).expand(len(means), -1, -1), weights)

    @classmethod
    def fit(
        cls, data: Float[Tensor, "n *dims"], num_components: int, rank: int, ridge: float = 1e-5, seed: int = 0
    ) -> "GaussianMixture":
        """k-means clusters, each with its own mean, weight, and leading `rank` eigenpairs (+ ridge).

        As in the code of Wang and Vastola (2024), which fits no mixture by likelihood. Kept eigenpairs that a small
        cluster lacks are `ridge`; outside the `rank` kept ones a cluster has no width at all, which at low noise costs
        dearly: keep all of them where you can. Raises ValueError if a cluster has fewer than two members, or rank
        exceeds d.
        """
        from sklearn.cluster import MiniBatchKMeans

        flat = at_least_float32(data.flatten(1))
        labels = MiniBatchKMeans(num_components, random_state=seed, n_init=3).fit_predict(flat.cpu().numpy())
        labels = torch.from_numpy(labels).to(flat.device)
        groups = [flat[labels == c] for c in range(num_components)]
        if (smallest := min(map(len, groups))) < 2:
            raise ValueError(f"a cluster has {smallest} members; use fewer than {num_components} components.")
        covariances = torch.stack([group.mT.cov() for group in groups]) + ridge * torch.eye(flat.shape[1]).to(flat)
        weights = torch.tensor([len(group) / len(flat) for group in groups], dtype=flat.dtype, device=flat.device)
        return cls(torch.stack([group.mean(0) for group in groups]), covariances, weights, rank)

    @property
    def num_components(self) -> int:
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def covariances(self) -> Float[Tensor, "c d d"]:
        return self.vectors * self.values.unsqueeze(-2) @ self.vectors.mT

    def moments(self) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
        """Mean and covariance of the whole mixture (law of total covariance)."""
        weights = self.log_weights.exp()
        mean = weights @ self.means
        centred = self.means - mean
        between = centred.T @ (weights.unsqueeze(-1) * centred)
        return mean, einsum(weights, self.covariances, "c, c i j -> i j") + between

    def sample(
        self, n: int, generator: torch.Generator | None = None, log_weights: Float[Tensor, "n c"] | None = None
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
        """n draws from the data, and the component that each came from."""
        weights = (self.log_weights.expand(n, -1) if log_weights is None else log_weights).exp()
        component = torch.multinomial(weights, 1, generator=generator).squeeze(-1)
        shape = n, self.values.shape[1]
        noise = torch.randn(shape, generator=generator, dtype=self.means.dtype, device=self.means.device)
        noise = noise * self.values[component].sqrt()
        return self.means[component] + einsum(self.vectors[component], noise, "n d r, n r -> n d"), component

    def _ask(self, kernel, x: Tensor, level: AnyLevel, log_weights: Tensor | None) -> Tensor:
        flat = x.flatten(1)
        if flat.shape[1] != self.dim:
            raise ValueError(f"x has {flat.shape[1]} elements a sample; this mixture lives in {self.dim} dimensions.")
        weights = self.log_weights if log_weights is None else log_weights
        level = self._level(level, x)
        return kernel(flat, level, weights, self.means, self.vectors, self.values).to(x.dtype)

    def _level(self, level: AnyLevel, x: Tensor) -> Level:
        if isinstance(level, Level):
            return level
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.means.dtype), torch.float32)
        return Level.variance_preserving(torch.as_tensor(level, dtype=dtype, device=x.device))

    def log_prob(
        self, x: Float[Tensor, "b *dims"], level: AnyLevel = 1.0, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b"]:
        """log p(x_t) in nats; without a level, of the data."""
        return self._ask(kernels.mixture_log_prob, x, level, log_weights)

    def responsibilities(
        self, x: Float[Tensor, "b *dims"], level: AnyLevel = 1.0, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b c"]:
        """p(component | x_t)."""
        return self._ask(kernels.mixture_responsibilities, x, level, log_weights)

    def score(
        self, x: Float[Tensor, "b *dims"], level: AnyLevel = 1.0, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b *dims"]:
        """grad_x log p(x_t)."""
        return self._ask(kernels.mixture_score, x, level, log_weights).reshape(x.shape)

    def noise_pred(
        self, x: Float[Tensor, "b *dims"], level: AnyLevel, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b *dims"]:
        """E[noise | x_t] = -noise_std score: what a perfect epsilon network says."""
        level = self._level(level, x)
        noise_std = torch.as_tensor(level.noise_power, dtype=x.dtype, device=x.device).sqrt()
        return -noise_std.reshape(-1, *(1,) * (x.ndim - 1)) * self.score(x, level, log_weights)

    def denoised(
        self, x: Float[Tensor, "b *dims"], level: AnyLevel, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b *dims"]:
        """E[x_0 | x_t], also where there is no signal: there it is the data's mean, and noise_pred says nothing."""
        return self._ask(kernels.mixture_denoised, x, level, log_weights).reshape(x.shape)

    def flow(self, x: Float[Tensor, "b *dims"], level_from: AnyLevel, level_to: AnyLevel) -> Float[Tensor, "b *dims"]:
        """Where the probability-flow ODE takes x between two noise levels: closed form, one Gaussian.

        Raises ValueError for a mixture of several, whose flow has no closed form: take `moments()` for its Gaussian.
        """
        if self.num_components != 1:
            raise ValueError(
                f"the flow of {self.num_components} components has no closed form; for the Gaussian of its "
                "moments: Gaussian.from_moments(*mixture.moments())."
            )
        levels = self._level(level_from, x), self._level(level_to, x)
        moved = kernels.gaussian_flow(x.flatten(1), *levels, self.means[0], self.vectors[0], self.values[0])
        return moved.to(x.dtype).reshape(x.shape)

    def tilt(
        self, beta: float, linear: Tensor | None = None, quadratic: Tensor | None = None
    ) -> tuple["GaussianMixture", Float[Tensor, ""]]:
        """(p exp(r / beta) / Z, log Z), r = linear . x + x . quadratic . x / 2: see `tilt_gaussian_mixture`."""
        out = tilt_gaussian_mixture(self.means, self.covariances, self.log_weights, beta, linear, quadratic)
        return GaussianMixture(out.means, out.covariances, out.log_weights.exp()), out.log_z


class TiltedMixture(NamedTuple):
    """A Gaussian mixture, and the `log_z` of the tilt that made it."""

    means: Float[Tensor, "c d"]
    covariances: Float[Tensor, "c d d"]
    log_weights: Float[Tensor, "c"]
    log_z: Float[Tensor, ""]


def tilt_gaussian_mixture(
    means: Float[Tensor, "c d"],
    covariances: Float[Tensor, "c d d"],
    log_weights: Float[Tensor, "c"],
    beta: float,
    linear: Float[Tensor, "d"] | None = None,
    quadratic: Float[Tensor, "d d"] | None = None,
) -> TiltedMixture:
    """p(x) exp(r(x) / beta) / Z for a mixture p and r(x) = linear . x + x . quadratic . x / 2: a mixture again.

    Completing the square per component, without inverting a covariance (so flat directions are allowed): with
    A = quadratic / beta, b = linear / beta and R = (I - Sigma A)^-1, Sigma' = R Sigma, mu' = R (mu + Sigma b), and
    each weight is multiplied by the component's own E[exp(r / beta)].
    A linear reward alone moves every mean by Sigma linear / beta and keeps the covariances.
    Raises ValueError where E[exp(r / beta)] is infinite: a convex reward, and beta too small.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive KL weight (to minimise a reward, negate it)")
    dim = means.shape[-1]
    b = torch.zeros(dim).to(means) if linear is None else linear / beta
    a = torch.zeros(dim, dim).to(means) if quadratic is None else (quadratic + quadratic.T) / (2 * beta)
    eigenvalues, vectors = torch.linalg.eigh(covariances)
    root = vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)  # Sigma = root root^T
    curvature = 1 - torch.linalg.eigvalsh(root.mT @ a @ root)  # of I - Sigma A, (c, d)
    if (curvature <= 0).any():
        first = int((curvature <= 0).any(-1).nonzero()[0])
        raise ValueError(
            f"E[exp(reward / beta)] is infinite under component {first}: the reward curves up faster than that "
            f"Gaussian falls off. Use a larger beta (it is {beta}) or a concave reward."
        )
    matrix = torch.eye(dim).to(means) - covariances @ a
    new_means = torch.linalg.solve(matrix, (means + covariances @ b).unsqueeze(-1)).squeeze(-1)
    new_covariances = torch.linalg.solve(matrix, covariances)
    pull = torch.linalg.solve(matrix.mT, (b + means @ a).unsqueeze(-1)).squeeze(-1)
    log_gain = -curvature.log().sum(-1) / 2 + (new_means @ b + (means * pull).sum(-1)) / 2
    scores = log_weights + log_gain
    log_z = scores.logsumexp(-1) - log_weights.logsumexp(-1)
    return TiltedMixture(new_means, (new_covariances + new_covariances.mT) / 2, scores.log_softmax(-1), log_z)
