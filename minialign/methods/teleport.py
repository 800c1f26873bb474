"""Gaussian scores and teleportation (Wang and Vastola, TMLR 2024, arXiv 2412.09726).

Far from the data, every distribution looks like its mean and covariance. A diffusion network's first sampling steps
follow, almost exactly, the score of that one Gaussian, and for a Gaussian the probability-flow ODE has a closed form:
so jump ("teleport") from the first noise level to sigma_skip without the network, and let any solver do the rest.

    s = (Sigma + sigma^2 I)^-1 (mu - x), without inverse         gaussian_score
    D = x + sigma^2 s = mu + U lambda / (lambda + sigma^2) U'(x - mu)          gaussian_denoised
    x_sigma = mu + U sqrt((sigma^2 + lambda) / (sigma_T^2 + lambda)) U'(x_T - mu) + ...     gaussian_flow, in VP as well
    mixture of low-rank Gaussians; of the training points        mixture_score, Mixture; delta_score
    EV = 1 - |s - a|^2 / |s|^2                                   explained_variance
    jump to sigma_skip, then any solver                          sample; teleport (diffusers pipelines), skip_steps

Notation: x = alpha x_0 + sigma noise. alpha = 1 is EDM's; variance-preserving schedulers have alpha^2 + sigma^2 = 1.
`sigma_skip` is always sigma / alpha, EDM's noise level, whatever the scheduler. Covariance U diag(lambda) U', U (d, r)
with orthonormal columns; outside their span the data is taken to be the mean, the noise of course is not.
As in neither paper nor code: eigenvalues are clamped at zero, and a jump is made for whole diffusers pipelines.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import at_least_float32

Level = Float[Tensor, ""] | float | int  # a noise level: one for the whole batch

# The Gaussian: score, denoiser, flow ----------------------------------------------------------------------------------


def gaussian_score(
    x: Float[Tensor, "b d"],
    sigma: Level,
    mean: Float[Tensor, "d"],
    vectors: Float[Tensor, "d r"],
    values: Float[Tensor, "r"],
) -> Float[Tensor, "b d"]:
    """grad log N(x; mean, Sigma + sigma^2 I) = (U lambda / (lambda + sigma^2) U'y - y) / sigma^2, y = x - mean.

    Woodbury's form: two products with (d, r), no d x d matrix. Limits: -y / sigma^2 where lambda = 0.
    """
    return (gaussian_denoised(x, sigma, mean, vectors, values) - at_least_float32(x)) / sigma**2


def gaussian_denoised(
    x: Float[Tensor, "b d"],
    sigma: Level,
    mean: Float[Tensor, "d"],
    vectors: Float[Tensor, "d r"],
    values: Float[Tensor, "r"],
) -> Float[Tensor, "b d"]:
    """E[x_0 | x] = mean + U lambda / (lambda + sigma^2) U'(x - mean): each mode appears once sigma < sqrt(lambda)."""
    x, mean, vectors, values = (at_least_float32(t) for t in (x, mean, vectors, values))
    return mean + ((x - mean) @ vectors * (values / (values + sigma**2))) @ vectors.mT


def gaussian_flow(
    x: Float[Tensor, "b d"],
    mean: Float[Tensor, "d"],
    vectors: Float[Tensor, "d r"],
    values: Float[Tensor, "r"],
    sigma_from: Level,
    sigma_to: Level,
    alpha_from: Level = 1.0,
    alpha_to: Level = 1.0,
) -> Float[Tensor, "b d"]:
    """The exact probability-flow solution of the Gaussian between two noise levels, in either direction.

    alpha' mean + U sqrt((alpha'^2 lambda + sigma'^2) / (alpha^2 lambda + sigma^2)) U'y + (sigma' / sigma)(I - U U')y,
    y = x - alpha mean. Maps the marginal at one level onto that at the other. sigma_from > 0. The last term keeps the
    noise outside span(U): without it the network would see an impossible input (sheet, trap 4).
    """
    x, mean, vectors, values = (at_least_float32(t) for t in (x, mean, vectors, values))
    y = x - alpha_from * mean
    stretch = ((alpha_to**2 * values + sigma_to**2) / (alpha_from**2 * values + sigma_from**2)).sqrt()
    outside = sigma_to / sigma_from
    return alpha_to * mean + outside * y + (y @ vectors * (stretch - outside)) @ vectors.mT


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of data, the latter by its eigenpairs: all that teleportation knows of a data set.

    mean (d,); vectors (d, r), orthonormal columns; values (r,), variances along them. Its methods take x (batch, *dims)
    with d elements a sample, in the range in which the network was trained (sheet, trap 1: pixels in [0, 1] give a
    wrong jump that looks plausible), and give float32 at least.
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

    def _apply(self, kernel: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        if x[0].numel() != len(self.mean):
            raise ValueError(
                f"x has {x[0].numel()} elements a sample, these statistics {len(self.mean)}: they are of other data "
                f"(pixels instead of latents?) or of another size. x is {tuple(x.shape)}; only its first axis counts "
                "samples."
            )
        return kernel(x.flatten(1), *args, **kwargs).reshape(x.shape)

    def score(self, x: Float[Tensor, "b *dims"], sigma: Level) -> Float[Tensor, "b *dims"]:
        """grad log p_sigma(x), see `gaussian_score`."""
        return self._apply(gaussian_score, x, sigma, self.mean, self.vectors, self.values)

    def denoised(self, x: Float[Tensor, "b *dims"], sigma: Level) -> Float[Tensor, "b *dims"]:
        """E[x_0 | x], see `gaussian_denoised`."""
        return self._apply(gaussian_denoised, x, sigma, self.mean, self.vectors, self.values)

    def flow(
        self,
        x: Float[Tensor, "b *dims"],
        sigma_from: Level,
        sigma_to: Level,
        alpha_from: Level = 1.0,
        alpha_to: Level = 1.0,
    ) -> Float[Tensor, "b *dims"]:
        """Where the probability-flow ODE takes x, see `gaussian_flow`: the teleport."""
        levels = (sigma_from, sigma_to, alpha_from, alpha_to)
        return self._apply(gaussian_flow, x, self.mean, self.vectors, self.values, *levels)

    def trajectory(self, x: Float[Tensor, "b *dims"], sigmas: Float[Tensor, "t"]) -> Float[Tensor, "t b *dims"]:
        """The whole path from x at sigmas[0] through all levels."""
        return torch.stack([self.flow(x, sigmas[0], sigma) for sigma in sigmas])


def _leading(y: Float[Tensor, "n d"], rank: int) -> tuple[Float[Tensor, "r"], Float[Tensor, "d r"]]:
    """Leading eigenpairs of the centred data's covariance by a randomised singular value decomposition."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # svd_lowrank draws from the global generator; equal data must give equal statistics
        _, singular, vectors = torch.svd_lowrank(y, q=rank + 10, niter=2)
    return singular[:rank] ** 2 / (len(y) - 1), vectors[:, :rank]


# Finer approximations -------------------------------------------------------------------------------------------------


def mixture_score(
    x: Float[Tensor, "b d"],
    sigma: Level,
    log_weights: Float[Tensor, "c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> Float[Tensor, "b d"]:
    """Score of a mixture of low-rank Gaussians at noise level sigma: responsibilities times the components' scores.

    One component is `gaussian_score`. Memory b c (d / c + r): nothing of size b c d.
    """
    x, means, vectors, values = (at_least_float32(t) for t in (x, means, vectors, values))
    coordinates, log_joint = _mixture_terms(x, sigma, log_weights, means, vectors, values)
    prob = log_joint.softmax(-1)
    shrunk = prob.unsqueeze(-1) * coordinates * values / (values + sigma**2)
    return (prob @ means + einsum(shrunk, vectors, "b c r, c d r -> b d") - x) / sigma**2


def mixture_log_prob(
    x: Float[Tensor, "b d"],
    sigma: Level,
    log_weights: Float[Tensor, "c"],
    means: Float[Tensor, "c d"],
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
) -> Float[Tensor, "b"]:
    """log p_sigma(x) of that mixture, in nats, but for the constant -(d / 2) log 2 pi."""
    return _mixture_terms(x, sigma, log_weights, means, vectors, values)[1].logsumexp(-1)


def _mixture_terms(x, sigma, log_weights, means, vectors, values):
    """U_c'(x - mean_c), (b, c, r), and log w_c + log N(x; c) + (d / 2) log 2 pi, (b, c)."""
    coordinates = einsum(x, vectors, "b d, c d r -> b c r") - einsum(means, vectors, "c d, c d r -> c r")
    squared = (x**2).sum(-1, keepdim=True) - 2 * x @ means.mT + (means**2).sum(-1)
    inside = (values / (values + sigma**2) * coordinates**2).sum(-1)
    outside = x.shape[1] - values.shape[1]
    level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    log_det = (values + level**2).log().sum(-1) + 2 * outside * level.log()
    return coordinates, log_weights - (log_det + (squared - inside) / level**2) / 2


def delta_score(x: Float[Tensor, "b d"], sigma: Level, data: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
    """Score of the training set itself, a mixture of n points: what a network would learn that memorises."""
    x, data = at_least_float32(x), at_least_float32(data)
    log_weights = -(torch.cdist(x, data) ** 2) / (2 * sigma**2)
    return (log_weights.softmax(-1) @ data - x) / sigma**2


class Mixture(NamedTuple):
    """Low-rank Gaussians with weights: `mixture_score(x, sigma, *mixture)`."""

    log_weights: Float[Tensor, "c"]
    means: Float[Tensor, "c d"]
    vectors: Float[Tensor, "c d r"]
    values: Float[Tensor, "c r"]

    @classmethod
    def fit(
        cls, data: Float[Tensor, "n *dims"], num_components: int, rank: int, ridge: float = 1e-5, seed: int = 0
    ) -> "Mixture":
        """k-means clusters, each with its own mean, weight, and leading `rank` eigenpairs (+ ridge).

        As in the authors' code, which fits no mixture by likelihood. Kept eigenpairs that a small cluster lacks are
        `ridge`; outside the `rank` kept ones a cluster has no width at all, which at low noise costs dearly: keep all
        of them where you can. Raises ValueError if a cluster has fewer than two members, or rank exceeds d.
        """
        from sklearn.cluster import MiniBatchKMeans

        flat = at_least_float32(data.flatten(1))
        if not 1 <= rank <= flat.shape[1]:
            raise ValueError(f"rank is {rank}; samples of {flat.shape[1]} elements have 1 to {flat.shape[1]} modes.")
        labels = MiniBatchKMeans(num_components, random_state=seed, n_init=3).fit_predict(flat.cpu().numpy())
        labels = torch.from_numpy(labels).to(flat.device)
        groups = [flat[labels == c] for c in range(num_components)]
        if (smallest := min(map(len, groups))) < 2:
            raise ValueError(f"a cluster has {smallest} members; use fewer than {num_components} components.")
        covariances = torch.stack([group.mT.cov() for group in groups])
        values, vectors = torch.linalg.eigh(covariances)
        weights = torch.tensor([len(group) / len(flat) for group in groups], dtype=flat.dtype, device=flat.device)
        means = torch.stack([group.mean(0) for group in groups])
        return cls(weights.log(), means, vectors.flip(2)[..., :rank], values.flip(1)[:, :rank].clamp_min(0) + ridge)


def explained_variance(
    target: Float[Tensor, "b *dims"], approximation: Float[Tensor, "b *dims"], centre: Tensor | float = 0.0
) -> Float[Tensor, ""]:
    """1 - |target - approximation|^2 / |target - centre|^2, sums over the batch. 1: equal; 0: no better than `centre`.

    For scores centre is 0, and at high noise anything explains them, for they are nearly -noise / sigma. For denoisers
    centre is the data's mean, and the figure says how much of the data's structure is understood (sheet, trap 7).
    """
    target, approximation = at_least_float32(target), at_least_float32(approximation)
    return 1 - (target - approximation).square().sum() / (target - centre).square().sum()


# Sampling -------------------------------------------------------------------------------------------------------------


def heun(denoise: Callable, x: Float[Tensor, "b *dims"], sigmas: Float[Tensor, "t"]) -> Float[Tensor, "b *dims"]:
    """EDM's deterministic sampler (Karras et al., 2022, algorithm 1) from x at sigmas[0] down to sigmas[-1] = 0.

    denoise(x, sigma) -> E[x_0 | x]. 2 (t - 1) - 1 evaluations: the step to zero is Euler's.
    """
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        proposed = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (proposed - denoise(proposed, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def sample(
    denoise: Callable,
    noise: Float[Tensor, "b *dims"],
    sigmas: Float[Tensor, "t"],
    statistics: Gaussian | None = None,
    sigma_max: Level = 80.0,
    solver: Callable = heun,
) -> Float[Tensor, "b *dims"]:
    """Samples of a denoiser: jump from sigma_max to sigmas[0] by the closed form, then `solver` from there.

    noise: standard normal. Give the tail `karras_sigmas(n)[k:]` to save the evaluations of k points, or a new grid
    `karras_sigmas(n, sigma_max=sigma_skip)` to spend them below. Without statistics there is no jump: plain EDM.
    """
    if statistics is None:
        return solver(denoise, sigmas[0] * noise, sigmas)
    return solver(denoise, statistics.flow(sigma_max * noise, sigma_max, sigmas[0]), sigmas)


# diffusers: schedulers and pipelines ----------------------------------------------------------------------------------


class Late:
    """Mixed into a diffusers scheduler: each grid that `set_timesteps` makes loses its first `num_skipped` steps."""

    num_skipped = 0

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        first = self.num_skipped * self.order  # Heun's scheduler lists every level twice
        self.timesteps = self.timesteps[first:]
        if hasattr(self, "sigmas"):
            self.sigmas = self.sigmas[first:]


class Start(NamedTuple):
    """Where a scheduler begins after the jump.

    scheduler: a copy of the given one that skips `num_skipped` steps of its grid, set to `num_inference_steps`.
    states: the teleported states, in that scheduler's own scaling, ready for `scheduler.scale_model_input` and `step`.
    latents: the same divided by its init_noise_sigma, as pipelines want them. sigma: the level sigma / alpha reached.
    """

    scheduler: Any
    states: Tensor
    latents: Tensor
    num_inference_steps: int
    num_skipped: int
    sigma: float


def skip_steps(
    scheduler,
    noise: Float[Tensor, "b *dims"],
    statistics: Gaussian | Sequence[Gaussian],
    sigma_skip: float | int,
    num_inference_steps: int,
    *,
    keep_budget: bool = False,
) -> Start:
    """Jumps to the first level of the scheduler's own grid that is at or below sigma_skip (sigma / alpha).

    noise: standard normal. statistics: of the data, or one a sample (those of its class or prompt).
    keep_budget=False drops the steps above, and saves their evaluations. True refines the grid until
    `num_inference_steps` steps remain below: the same cost, spent where it matters.
    Works with diffusers' schedulers whose state is x_0 and noise alone: DDIM, DDPM, DPM-Solver (single and multistep),
    DEIS, UniPC, Euler, Heun, LMS, EDM. Raises ValueError for others, and for a sigma_skip that is no level of the grid.
    """
    wanted = num_inference_steps
    while True:
        full = _late(scheduler, 0)
        full.set_timesteps(num_inference_steps)
        levels = noise_levels(full)
        skipped = int((levels[:, 1] / levels[:, 0] > sigma_skip).sum())
        missing = wanted - (len(levels) - skipped)
        if not keep_budget or missing <= 0 or not skipped:
            break
        num_inference_steps += missing
    if skipped == len(levels):
        raise ValueError(
            f"sigma_skip is {sigma_skip}, below the last level {levels[-1, 1] / levels[-1, 0]:.3g} of "
            f"{type(scheduler).__name__}'s grid of {num_inference_steps} steps: nothing would be left to the network."
        )
    late = _late(scheduler, skipped)
    late.set_timesteps(num_inference_steps)
    alpha_from, sigma_from = levels[0].tolist()
    alpha_to, sigma_to = levels[skipped].tolist()
    states = at_least_float32(noise) * float(full.init_noise_sigma)
    if skipped:
        flows = [statistics] if isinstance(statistics, Gaussian) else statistics
        rows = states.split(1) if len(flows) > 1 else [states]
        if len(flows) != len(rows):
            raise ValueError(f"there are statistics for {len(flows)} samples, and noise for {len(noise)}.")
        levels = (sigma_from, sigma_to, alpha_from, alpha_to)
        states = torch.cat([g.to(x.device).flow(x, *levels) for g, x in zip(flows, rows, strict=True)])
    latents = (states / float(late.init_noise_sigma)).to(noise.dtype)
    return Start(late, states, latents, num_inference_steps, skipped, sigma_to / alpha_to)


def noise_levels(scheduler) -> Float[Tensor, "steps 2"]:
    """(alpha, sigma) of the state at the start of each step of a diffusers scheduler that has been set, float64."""
    timesteps = scheduler.timesteps[:: scheduler.order]
    if hasattr(scheduler, "sigmas"):
        ratio = scheduler.sigmas.double().cpu()[:: scheduler.order][: len(timesteps)]
        # Either the state is x_0 + sigma noise, started from noise times the largest sigma, or it preserves variance.
        alpha = torch.ones_like(ratio) if float(scheduler.init_noise_sigma) != 1 else (1 + ratio**2).rsqrt()
        return torch.stack([alpha, ratio * alpha], 1)
    alpha_bar = scheduler.alphas_cumprod.double().cpu()[timesteps.long().cpu()]
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1)


def _late(scheduler, num_skipped: int):
    """A copy of the scheduler, of a class that drops the first steps."""
    kind = type(scheduler)
    flow = scheduler.config.get("use_flow_sigmas", False) or kind.__name__.startswith("FlowMatch")
    if flow or not (hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sigmas")) or "PNDM" in kind.__name__:
        raise ValueError(
            f"{kind.__name__} cannot start late: its state is not x_0 and noise at one level. Use for example "
            "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)."
        )
    late = type(kind.__name__, (Late, kind), {}).from_config(scheduler.config)
    late.num_skipped = num_skipped
    return late


def teleport(
    pipeline,
    statistics: Gaussian | Sequence[Gaussian],
    sigma_skip: float | int,
    num_inference_steps: int = 50,
    num_images: int = 1,
    *,
    keep_budget: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments) for a teleported start of a StableDiffusion-like pipeline: `late(prompts, **arguments)`.

    The pipeline shares all modules with the given one, which is left as it was; its scheduler starts late. The
    arguments are `latents` (num_images, *latent) and `num_inference_steps`; see `skip_steps` for the rest.
    statistics: of the autoencoder's latents, scaled as the UNet sees them: `latent_statistics`; give those of each
    prompt, or the jump forgets the prompt. Guidance acts after the jump only.
    """
    unet = pipeline.unet
    side = unet.config.sample_size
    shape = (num_images, unet.config.in_channels, *((side, side) if isinstance(side, int) else side))
    device = generator.device if generator is not None else unet.device
    noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(unet.device)
    start = skip_steps(pipeline.scheduler, noise, statistics, sigma_skip, num_inference_steps, keep_budget=keep_budget)
    late = copy.copy(pipeline)
    late.scheduler = start.scheduler
    return late, {"latents": start.latents.to(unet.dtype), "num_inference_steps": start.num_inference_steps}


@torch.no_grad()
def latent_statistics(
    vae, images: Float[Tensor, "n c h w"], rank: int | None = None, rows: int = 64, generator=None
) -> Gaussian:
    """Mean and covariance of an autoencoder's latents, scaled as the UNet sees them. images in [0, 1]."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = [
        (vae.encode((2 * part - 1).to(vae.device, vae.dtype)).latent_dist.sample(generator) - shift)
        for part in images.split(rows)
    ]
    return Gaussian.fit(torch.cat(parts).float() * vae.config.scaling_factor, rank)
