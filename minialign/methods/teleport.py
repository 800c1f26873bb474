"""Gaussian scores and teleportation (Wang and Vastola, TMLR 2024, arXiv 2412.09726).

Far from the data, every distribution looks like its mean and covariance. A diffusion network's first sampling steps
follow, almost exactly, the score of that one Gaussian, and for a Gaussian the probability-flow ODE has a closed form:
so jump ("teleport") from the first noise level to sigma_skip without the network, and let any solver do the rest.

    s = (Sigma + sigma^2 I)^-1 (mu - x), without inverse                       kernels.gaussian_score
    D = x + sigma^2 s = mu + U lambda / (lambda + sigma^2) U'(x - mu)          kernels.gaussian_denoised
    x_sigma = mu + U sqrt((sigma^2 + lambda) / (sigma_T^2 + lambda)) U'(x_T - mu) + ...    kernels.gaussian_flow
    mu, U, lambda of a data set                                                exact.Gaussian.fit
    mixture of low-rank Gaussians; of the training points     exact.GaussianMixture.fit; kernels.delta_score
    EV = 1 - |s - a|^2 / |s|^2                                explained_variance
    jump to sigma_skip, then any solver                       sample; teleport (diffusers pipelines), skip_steps

Notation: x = alpha x_0 + sigma noise. alpha = 1 is EDM's; variance-preserving schedulers have alpha^2 + sigma^2 = 1.
`sigma_skip` is always sigma / alpha, EDM's noise level, whatever the scheduler. Covariance U diag(lambda) U', U (d, r)
with orthonormal columns; outside their span the data is taken to be the mean, the noise of course is not.
As in neither paper nor code: eigenvalues are clamped at zero, and a jump is made for whole diffusers pipelines.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.evaluate import Trial, from_pure_noise, sampler_trial, walk
from minialign.exact import Gaussian
from minialign.kernels import Level, at_least_float32, same_shape
from minialign.policies.encoders import latent_shape_of, latent_units, without_overflow
from minialign.policies.late_start import late, noise_levels
from minialign.settings import Count, Positive, Settings

Number = Float[Tensor, ""] | float | int


def explained_variance(
    target: Float[Tensor, "b *dims"], approximation: Float[Tensor, "b *dims"], centre: Tensor | float = 0.0
) -> Float[Tensor, ""]:
    """1 - |target - approximation|^2 / |target - centre|^2, sums over the batch. 1: equal; 0: no better than `centre`.

    For scores centre is 0, and at high noise anything explains them, for they are nearly -noise / sigma. For denoisers
    centre is the data's mean, and the figure says how much of the data's structure is understood (sheet, trap 7).
    """
    same_shape(target=target, approximation=approximation)
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
    sigma_max: Number = 80.0,
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
    Raises ValueError for schedulers that cannot start late (`policies.late_start`) and for a sigma_skip below the grid.
    """
    wanted = num_inference_steps
    while True:
        full = late(scheduler, 0)
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
    begun = late(scheduler, skipped)
    begun.set_timesteps(num_inference_steps)
    alpha_from, sigma_from = levels[0].tolist()
    alpha_to, sigma_to = levels[skipped].tolist()
    states = at_least_float32(noise) * float(full.init_noise_sigma)
    if skipped:
        flows = [statistics] if isinstance(statistics, Gaussian) else statistics
        rows = states.split(1) if len(flows) > 1 else [states]
        if len(flows) != len(rows):
            raise ValueError(f"there are statistics for {len(flows)} samples, and noise for {len(noise)}.")
        jump = Level.of(alpha_from, sigma_from), Level.of(alpha_to, sigma_to)
        states = torch.cat([g.to(x.device).flow(x, *jump) for g, x in zip(flows, rows, strict=True)])
    latents = (states / float(begun.init_noise_sigma)).to(noise.dtype)
    return Start(begun, states, latents, num_inference_steps, skipped, sigma_to / alpha_to)


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
    shape = (num_images, *latent_shape_of(unet))
    device = generator.device if generator is not None else unet.device
    noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(unet.device)
    start = skip_steps(pipeline.scheduler, noise, statistics, sigma_skip, num_inference_steps, keep_budget=keep_budget)
    begun = copy.copy(pipeline)
    begun.scheduler = start.scheduler
    return begun, {"latents": start.latents.to(unet.dtype), "num_inference_steps": start.num_inference_steps}


@torch.no_grad()
def latent_statistics(
    vae, images: Float[Tensor, "n c h w"], rank: int | None = None, rows: int = 64, generator=None
) -> Gaussian:
    """Mean and covariance of an autoencoder's latents, scaled as the UNet sees them. images in [0, 1]."""
    vae = without_overflow(vae)
    scale, shift = latent_units(vae.config)
    images = (2 * images - 1).to(vae.device, vae.dtype)
    latents = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in images.split(rows)]).float()
    return Gaussian.fit((latents - shift.to(latents)) / scale.to(latents), rank)


# On the command line --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Settings):
    sigma_skip: Positive = 2.5  # the noise level sigma / alpha to jump to
    budgets: tuple[Count, ...] = (3, 5, 10, 20)  # network evaluations a sample, at which both are compared
    rank: Count | None = None  # of the covariances; None: all eigenvectors
    num_data: Count = 4000  # real samples for the statistics, of all prompts together

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budgets:
            raise ValueError("budgets is empty; give at least one number of network evaluations.")


def prompt_statistics(world, config: Config, generator: torch.Generator) -> dict[Any, Gaussian]:
    """A Gaussian a prompt, of the world's real data as the policy's states."""
    samples, prompts = world.real(config.num_data, generator)
    states, names = world.encode(samples), list(dict.fromkeys(prompts))
    own = torch.tensor([names.index(prompt) for prompt in prompts])
    return {name: Gaussian.fit(states[own == i], config.rank) for i, name in enumerate(names)}


def trial(world, config: Config, seed: int) -> Trial:
    """The same network and solver with and without the jump, at equal network evaluations; a Gaussian a prompt."""
    policy, statistics = world.policy, prompt_statistics(world, config, torch.Generator().manual_seed(seed))

    def drawn(sigma_skip: float | int) -> Callable:
        def draw(num_steps: int, prompts: list, generator: torch.Generator) -> Tensor:
            noise, own = policy.draw_noise(len(prompts), generator)[:, 0], [statistics[prompt] for prompt in prompts]
            scheduler = from_pure_noise(policy.scheduler)
            start = skip_steps(scheduler, noise, own, sigma_skip, num_steps, keep_budget=True)
            return walk(policy, start.scheduler, start.states, prompts)

        return draw

    return sampler_trial(world, drawn(math.inf), drawn(config.sigma_skip), config.budgets, seed, ("no jump", "jump"))


def bench(device: str, dim: int = 64 * 64 * 3, rank: int = 512, num_images: int = 2000, batch: int = 64) -> dict:
    """Seconds for the statistics of `num_images` images and for the jump of a batch; memory beside the data's own."""
    import resource
    import time

    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(num_images, dim, generator=generator) * torch.linspace(3, 0.01, dim)).to(device)
    noise = torch.randn(batch, dim, generator=generator).to(device)
    peak, laps = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.perf_counter()]
    statistics = Gaussian.fit(data, rank)
    laps.append(time.perf_counter())
    statistics.flow(80 * noise, 80.0, 5.0).cpu()
    laps.append(time.perf_counter())
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / data.nbytes
    return dict(
        dim=dim, rank=rank, num_images=num_images, batch=batch, device=device,
        statistics_seconds=round(laps[1] - laps[0], 3), jump_seconds=round(laps[2] - laps[1], 4),
        memory_over_data=round(more, 2),
    )  # fmt: skip
