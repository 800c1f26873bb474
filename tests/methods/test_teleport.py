"""Teleportation against the exact flow, in our sampler and in diffusers' own schedulers and pipelines."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from minialign.exact import Gaussian
from minialign.kernels import Level, karras_sigmas
from minialign.methods import teleport
from minialign.policies.late_start import TRIED

F64 = torch.float64
D, R, B = 7, 3, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(rank=D, dim=D, seed=0):
    vectors = torch.linalg.qr(random(dim, dim, seed=seed)).Q[:, :rank]
    return Gaussian(random(dim, seed=seed + 1), vectors, 0.1 + 4 * random(rank, seed=seed + 2).abs())


def test_explained_variance():
    target, mean = random(B, D, seed=1), 0.3
    assert teleport.explained_variance(target, target) == 1
    assert teleport.explained_variance(target, torch.zeros_like(target)) == 0
    assert teleport.explained_variance(target, torch.full_like(target, mean), mean) == 0
    # half of the deviation from the centre is missed: 1 - 1/4
    half = mean + (target - mean) / 2
    assert teleport.explained_variance(target, half, mean) == pytest.approx(0.75)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_check_6_heun_converges_to_it_at_second_order():
    values = torch.tensor([9, 1, 0.04], dtype=F64)
    g = Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), values)
    x = torch.full((1, 3), 80.0, dtype=F64)
    errors = []
    for points in (18, 36, 72):
        out = teleport.heun(g.denoised, x, karras_sigmas(points, dtype=F64))
        errors.append(float((out - g.flow(x, 80.0, 0.0)).abs().max()))
    assert errors == pytest.approx([0.096435, 0.021632, 0.005131], abs=2e-6)


def test_heun_counts_and_the_jump_composes_with_it():
    g, noise, calls = gaussian(), random(B, D, seed=9), []

    def denoise(x, sigma):
        calls.append(float(sigma))
        return g.denoised(x, sigma)

    grid = karras_sigmas(10, dtype=F64)
    plain = teleport.sample(denoise, noise, grid)
    assert len(calls) == 19
    calls.clear()
    skipped = teleport.sample(denoise, noise, grid[4:], g)
    assert len(calls) == 19 - 2 * 4 and max(calls) == grid[4]
    exact = g.flow(80 * noise, 80.0, 0.0)
    assert (skipped - exact).abs().max() < (plain - exact).abs().max()


SCHEDULERS = {
    "DDIM": (DDIMScheduler, {"clip_sample": False}),
    "DDIM trailing": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++ Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "EDM Euler": (EDMEulerScheduler, {}),
    "EDM DPM-Solver++": (EDMDPMSolverMultistepScheduler, {}),
}


def run(scheduler, states, g):
    """A scheduler's own loop, with the exact network of a Gaussian in the scheduler's parametrisation."""
    levels = dict(zip(scheduler.timesteps[:: scheduler.order].tolist(), teleport.noise_levels(scheduler), strict=True))
    edm = type(scheduler).__name__.startswith("EDM")
    scheduler.evaluations = 0
    for t in scheduler.timesteps:
        alpha, sigma = levels[t.item()]
        scaled = scheduler.scale_model_input(states, t)
        if edm:  # F = (D - c_skip x) / c_out
            variance = sigma**2 + 0.25
            denoised = g.denoised(states, sigma)
            output = (denoised - 0.25 / variance * states) / (sigma * 0.5 / variance.sqrt())
        else:  # the noise, from the state x_0 + (sigma / alpha) noise
            ratio = sigma / alpha
            clean = states / alpha
            output = (clean - g.denoised(clean, ratio)) / ratio
        scheduler.evaluations += 1
        states = scheduler.step(output.to(scaled.dtype), t, states).prev_sample
    return states


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_start_late_end_where_the_exact_flow_ends(name):
    """The jump is exact and the network is exact, so a fine grid must end at the closed form, skipped or not; and the
    late scheduler does what the full one does from the same state."""
    kind, settings = SCHEDULERS[name]
    scheduler, g = kind(**settings), gaussian(R)
    noise = random(B, D, seed=9)
    start = teleport.skip_steps(scheduler, noise, g, sigma_skip=3.0, num_inference_steps=100)
    assert 0 < start.num_skipped < 100 and start.sigma <= 3
    full = teleport.skip_steps(scheduler, noise, g, sigma_skip=1e9, num_inference_steps=100)
    assert full.num_skipped == 0
    (alpha, sigma), *_ = teleport.noise_levels(full.scheduler)
    (alpha_to, sigma_to), *_ = teleport.noise_levels(start.scheduler)
    torch.testing.assert_close(start.states, g.flow(full.states, Level.of(alpha, sigma), Level.of(alpha_to, sigma_to)))
    torch.testing.assert_close(start.latents * start.scheduler.init_noise_sigma, start.states)
    late, early = run(start.scheduler, start.states, g), run(full.scheduler, full.states, g)
    exact = g.flow(full.states, Level.of(alpha, sigma), Level.edm(0.0))
    per_step = full.scheduler.evaluations / 100
    assert start.scheduler.evaluations == pytest.approx(
        full.scheduler.evaluations - start.num_skipped * per_step, abs=1
    )
    error_late, error_early = (float((out - exact).abs().max()) for out in (late, early))
    assert (
        error_late < 1.1 * error_early + 1e-3
    )  # no worse than the full run, whose own error depends on its last level


def test_the_same_budget_below_refines_the_grid():
    g, noise = gaussian(), random(B, D, seed=9)
    for kind, settings in (SCHEDULERS["UniPC"], SCHEDULERS["DDIM"], SCHEDULERS["EDM Euler"]):
        start = teleport.skip_steps(kind(**settings), noise, g, 3.0, 10, keep_budget=True)
        assert len(start.scheduler.timesteps) in (10, 11) and start.num_inference_steps > 10 and start.sigma <= 3


def test_each_sample_may_have_its_own_statistics():
    one, two, noise = gaussian(seed=0), gaussian(seed=5), random(2, D, seed=9)
    both = teleport.skip_steps(DDIMScheduler(clip_sample=False), noise, [one, two], 3.0, 20)
    for row, g in enumerate((one, two)):
        alone = teleport.skip_steps(DDIMScheduler(clip_sample=False), noise[row : row + 1], g, 3.0, 20)
        torch.testing.assert_close(both.states[row : row + 1], alone.states)


# The law of N(0, I) under exact noise: every late start ends where the whole run does, within what its solver errs.
VARIANTS = {
    **{name: (name, {}) for name in TRIED},
    "Karras": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    "third order": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "last level": ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    "stochastic": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "Euler leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
}


def spread(kind, settings, steps, skipped):
    """The std at the end, from standard normal noise; the data is N(0, I), the network exact, `skipped` steps cut."""
    parameters = inspect.signature(kind.__init__).parameters
    common = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler = kind(**{name: value for name, value in common.items() if name in parameters} | settings)
    noise = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    unit = Gaussian(torch.zeros(4), torch.eye(4), torch.ones(4))
    full = teleport.skip_steps(scheduler, noise, unit, 1e9, steps).scheduler
    alpha, sigma = teleport.noise_levels(full)[skipped]
    start = teleport.skip_steps(scheduler, noise, unit, float(sigma / alpha) * 1.0001, steps)
    assert start.num_skipped == skipped
    late, x = start.scheduler, start.states
    generator = {"generator": torch.Generator().manual_seed(1)}
    generator = generator if "generator" in inspect.signature(late.step).parameters else {}
    for i, t in enumerate(late.timesteps):
        scaled = late.scale_model_input(x, t)
        if "EDM" in kind.__name__:  # F = (D - c_skip x) / c_out, D = x / (1 + sigma^2)
            sigma, data = late.sigmas[i], late.config.sigma_data
            output = (x / (1 + sigma**2) - data**2 / (sigma**2 + data**2) * x) * (sigma**2 + data**2).sqrt()
            output = output / (sigma * data)
        else:  # E[noise | x] = sqrt(1 - alpha_bar) x, between two training timesteps as diffusers interpolates
            levels = torch.log(1 / late.alphas_cumprod.double() - 1) / 2
            below = min(int(t), len(levels) - 2)
            sigma = torch.lerp(levels[below], levels[below + 1], (t - below).double().clamp(0, 1)).exp()
            output = (sigma / (1 + sigma**2).sqrt()).float() * scaled
        x = late.step(output, t, x, **generator).prev_sample
    return float(x.std())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [20, 21])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_scheduler_that_starts_late_keeps_the_law(name, steps):
    kind, settings = VARIANTS[name]
    kind = getattr(diffusers, kind)
    # single-step solvers go in pairs: cut between two, and within one. KDPM2's grids take a second each
    counts = (5,) if "KDPM2" in kind.__name__ else (4, 5, 10, 11, steps - 1)
    whole, *lates = (spread(kind, settings, steps, skipped) for skipped in (0, *counts))
    assert all(abs(late - 1) < abs(whole - 1) + 0.04 for late in lates), (whole, lates)


def test_every_scheduler_that_was_not_tried_is_refused():
    """An allow-list: DDIM's inverse, LCM and the rest would run, and end in another law."""
    refused = 0
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or name in TRIED:
            continue
        try:
            scheduler = getattr(diffusers, name)()
        except (ImportError, TypeError):  # another library, settings of its own
            continue
        with pytest.raises(ValueError, match="cannot start late: it is not among the schedulers that were tried"):
            teleport.skip_steps(scheduler, random(2, D), gaussian(), 3.0, 10)
        refused += 1
    assert refused > 15
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="use_flow_sigmas=False"):
        teleport.skip_steps(flow, random(2, D), gaussian(), 3.0, 10)


def test_a_level_below_the_grid_is_refused():
    with pytest.raises(ValueError, match="below the last level"):
        teleport.skip_steps(DDIMScheduler(clip_sample=False), random(2, D), gaussian(), 1e-3, 10)
    with pytest.raises(ValueError, match="statistics for 2 samples"):
        teleport.skip_steps(DDIMScheduler(clip_sample=False), random(3, D), [gaussian(), gaussian()], 3.0, 10)


# Pipelines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler]
)
def test_a_pipeline_starts_late(kind):
    from minialign import worlds

    world = worlds.load("shapes")
    pipe = copy.copy(world.policy.pipeline)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    scheduler = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    images, _ = world.real(64, torch.Generator().manual_seed(0))
    statistics = teleport.latent_statistics(pipe.vae, images, generator=torch.Generator().manual_seed(1))
    late, arguments = teleport.teleport(
        pipe, statistics, sigma_skip=4.0, num_inference_steps=12, num_images=2,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    prompts = ["a red circle", "a blue square"]
    pictures = late(prompts, guidance_scale=1.0, output_type="pt", **arguments).images
    handle.remove()
    skipped = late.scheduler.num_skipped
    assert 2 <= skipped <= 5
    assert len(calls) == (2 * (12 - skipped) - 1 if kind is HeunDiscreteScheduler else 12 - skipped)
    assert pipe.scheduler is scheduler and late.unet is pipe.unet  # the given pipeline is as it was
    assert pictures.shape == (2, 3, 32, 32) and 0.5 < pictures.mean() < 1


def test_statistics_are_in_the_units_that_the_pipeline_decodes(monkeypatch):
    """Encoding is the inverse of decoding, for latents with a mean and std of their own and for a shift."""
    from types import SimpleNamespace

    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    units = dict(latents_mean=[0.5, -0.5, 0.3, 0.1], latents_std=[2.0, 1.5, 1.2, 0.8])
    for settings in (units, dict(shift_factor=0.3), {}):
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.5, **settings)
        own = torch.randn(500, 4, 1, 1)
        encoded = SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator, own=own: own))
        monkeypatch.setattr(vae, "encode", lambda part, encoded=encoded: encoded)
        statistics = teleport.latent_statistics(vae, torch.rand(500, 3, 4, 4), rows=500)
        mean = torch.tensor(settings.get("latents_mean") or [settings.get("shift_factor", 0.0)] * 4)
        std = torch.tensor(settings.get("latents_std") or [1.0] * 4)
        expected = (own[:, :, 0, 0] - mean) / std * 0.5
        torch.testing.assert_close(statistics.mean.flatten(), expected.mean(0), atol=1e-5, rtol=1e-5)
