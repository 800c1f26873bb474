"""Gaussian scores and teleportation against closed forms, slow references, autograd, and diffusers' own schedulers."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from minialign.kernels import karras_sigmas
from minialign.methods import teleport
from minialign.methods.teleport import Gaussian, Mixture

F64 = torch.float64
D, R, B = 7, 3, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(rank=D, dim=D, seed=0):
    vectors = torch.linalg.qr(random(dim, dim, seed=seed)).Q[:, :rank]
    return Gaussian(random(dim, seed=seed + 1), vectors, 0.1 + 4 * random(rank, seed=seed + 2).abs())


def one_dimension(mean, value):
    return Gaussian(torch.tensor([mean], dtype=F64), torch.ones(1, 1, dtype=F64), torch.tensor([value], dtype=F64))


# The sheet's closed-form checks ---------------------------------------------------------------------------------------


def test_check_1_one_dimension():
    # by hand: 1 + 79 sqrt((sigma^2 + 4) / (6400 + 4))
    flow = one_dimension(1.0, 4.0).flow
    x = torch.tensor([[80.0]], dtype=F64)
    assert [float(flow(x, 80.0, sigma)) for sigma in (10.0, 2.0, 0.0)] == pytest.approx(
        [11.067418, 3.792199, 2.974383], abs=5e-7
    )


def test_check_2_variance_preserving():
    x = torch.tensor([[0.5]], dtype=F64)
    moved = one_dimension(1.0, 4.0).flow(x, (1 - 1e-4) ** 0.5, 0.8, 0.01, 0.6)
    assert float(moved) == pytest.approx(1.306582, abs=5e-7)


@pytest.mark.parametrize("rank", [R, D])
def test_check_3_semigroup_identity_and_inverse(rank):
    g, x = gaussian(rank), 80 * random(B, D, seed=9)
    torch.testing.assert_close(g.flow(g.flow(x, 80.0, 10.0), 10.0, 2.0), g.flow(x, 80.0, 2.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g.flow(x, 80.0, 80.0), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g.flow(g.flow(x, 80.0, 2.0), 2.0, 80.0), x, rtol=1e-11, atol=1e-11)


def test_check_4_marginals_are_carried_onto_each_other():
    """The map is affine, x -> A x + b: A (Sigma + 80^2) A' must be Sigma + 2^2, and b + A mean = mean."""
    g = gaussian(R)
    b = g.flow(torch.zeros(1, D, dtype=F64), 80.0, 2.0)[0]
    matrix = (g.flow(torch.eye(D, dtype=F64), 80.0, 2.0) - b).T
    covariance = g.vectors * g.values @ g.vectors.T
    eye = torch.eye(D, dtype=F64)
    torch.testing.assert_close(matrix @ (covariance + 6400 * eye) @ matrix.T, covariance + 4 * eye)
    torch.testing.assert_close(b + matrix @ g.mean, g.mean)


def test_check_4_the_endpoint_lies_in_the_span():
    g = gaussian(R)
    end = g.flow(80 * random(B, D, seed=9), 80.0, 0.0) - g.mean
    torch.testing.assert_close(end @ g.vectors @ g.vectors.T, end, rtol=1e-12, atol=1e-12)


def test_check_5_limits_of_the_variance():
    x = 80 * random(B, D, seed=9)
    point = Gaussian(gaussian().mean, gaussian().vectors, torch.zeros(D, dtype=F64))
    torch.testing.assert_close(point.flow(x, 80.0, 5.0), point.mean + 5 / 80 * (x - point.mean))
    wide = Gaussian(gaussian().mean, gaussian().vectors, torch.full((D,), 1e16, dtype=F64))
    torch.testing.assert_close(wide.flow(x, 80.0, 5.0), x, rtol=1e-11, atol=1e-9)
    g, y = gaussian(), random(B, D, seed=11)
    torch.testing.assert_close(g.flow(g.mean + 3 * y, 80.0, 5.0) - g.mean, 3 * (g.flow(g.mean + y, 80.0, 5.0) - g.mean))


def test_check_6_heun_converges_to_it_at_second_order():
    values = torch.tensor([9, 1, 0.04], dtype=F64)
    g = Gaussian(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), values)
    x = torch.full((1, 3), 80.0, dtype=F64)
    errors = []
    for points in (18, 36, 72):
        out = teleport.heun(g.denoised, x, karras_sigmas(points, dtype=F64))
        errors.append(float((out - g.flow(x, 80.0, 0.0)).abs().max()))
    assert errors == pytest.approx([0.096435, 0.021632, 0.005131], abs=2e-6)


def test_check_7_a_mixture_of_one_is_the_gaussian_and_autograd_gives_its_score():
    g, x = gaussian(), 2 * random(B, D, seed=9)
    one = Mixture(torch.zeros(1, dtype=F64), g.mean[None], g.vectors[None], g.values[None])
    torch.testing.assert_close(teleport.mixture_score(x, 1.3, *one), g.score(x, 1.3), rtol=1e-10, atol=1e-10)
    a, b = gaussian(R, seed=20), gaussian(R, seed=30)
    two = Mixture(
        torch.tensor([0.3, 0.7], dtype=F64).log(),
        *(torch.stack(pair) for pair in zip(*((h.mean, h.vectors, h.values) for h in (a, b)), strict=True)),
    )
    x = x.requires_grad_()
    (score,) = torch.autograd.grad(teleport.mixture_log_prob(x, 1.3, *two).sum(), x)
    torch.testing.assert_close(teleport.mixture_score(x, 1.3, *two), score, rtol=1e-10, atol=1e-10)


# Check 8, the grid, is in tests/kernels/test_edm.py.

# Slow references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [R, D])
def test_score_and_denoiser_with_an_explicit_inverse(rank):
    g, x, sigma = gaussian(rank), random(B, D, seed=9), 0.7
    covariance = g.vectors * g.values @ g.vectors.T
    inverse = torch.linalg.inv(covariance + sigma**2 * torch.eye(D, dtype=F64))
    score = (g.mean - x) @ inverse
    torch.testing.assert_close(g.score(x, sigma), score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(g.denoised(x, sigma), x + sigma**2 * score, rtol=1e-10, atol=1e-10)


def test_mixture_density_with_explicit_covariances():
    parts, sigma, x = [gaussian(R, seed=20), gaussian(R, seed=30)], 0.7, random(B, D, seed=9)
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    two = Mixture(
        weights.log(),
        *(torch.stack(p) for p in zip(*((h.mean, h.vectors, h.values) for h in parts), strict=True)),
    )
    eye = torch.eye(D, dtype=F64)
    normals = [
        torch.distributions.MultivariateNormal(h.mean, h.vectors * h.values @ h.vectors.T + sigma**2 * eye)
        for h in parts
    ]
    log_prob = torch.stack([n.log_prob(x) for n in normals], 1).add(weights.log()).logsumexp(1)
    constant = D / 2 * torch.log(torch.tensor(2 * torch.pi, dtype=F64))
    torch.testing.assert_close(teleport.mixture_log_prob(x, sigma, *two) - constant, log_prob, rtol=1e-10, atol=1e-10)


def test_the_flow_solves_the_ode():
    """dx/dsigma = -sigma score along the closed form, by central differences; also in VP notation, where
    x / alpha follows the same path at sigma / alpha."""
    g, x, h = gaussian(R), 80 * random(B, D, seed=9), 1e-5
    at = g.flow(x, 80.0, 2.0)
    slope = (g.flow(x, 80.0, 2.0 + h) - g.flow(x, 80.0, 2.0 - h)) / (2 * h)
    torch.testing.assert_close(slope, -2.0 * g.score(at, 2.0), rtol=1e-6, atol=1e-7)
    y = random(B, D, seed=10)
    vp = g.flow(y, 0.995, 0.8, 0.1, 0.6)
    torch.testing.assert_close(vp, 0.6 * g.flow(y / 0.1, 0.995 / 0.1, 0.8 / 0.6), rtol=1e-12, atol=1e-12)


def test_deltas_are_a_mixture_without_width():
    data, x = random(11, D, seed=3), random(B, D, seed=9)
    points = Mixture(
        torch.full((11,), 1 / 11, dtype=F64).log(), data, torch.zeros(11, D, 1, dtype=F64),
        torch.zeros(11, 1, dtype=F64),
    )  # fmt: skip
    torch.testing.assert_close(teleport.delta_score(x, 0.6, data), teleport.mixture_score(x, 0.6, *points))


def test_far_away_the_training_set_looks_like_its_gaussian():
    """The two scores agree in sigma^-1 and sigma^-3 where |x - mean| ~ sigma; what is left falls like sigma^-4."""
    data = random(200, D, seed=3).exp()  # skewed on purpose
    centred = data - data.mean(0)
    g = Gaussian.from_moments(data.mean(0), centred.T @ centred / len(data))
    z, gaps = random(B, D, seed=9), []
    for sigma in (100.0, 200.0):
        x = data.mean(0) + sigma * z
        gaps.append(float((teleport.delta_score(x, sigma, data) - g.score(x, sigma)).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(16, rel=0.1)


# Fitting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(300, 11), (13, 40)])
def test_fit_gives_mean_and_covariance(n, d):
    data = random(n, d, seed=1) * torch.linspace(1, 3, d, dtype=F64) + 2
    g = Gaussian.fit(data)
    torch.testing.assert_close(g.mean, data.mean(0))
    torch.testing.assert_close(g.vectors * g.values @ g.vectors.T, data.T.cov(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g.vectors.T @ g.vectors, torch.eye(min(n - 1, d), dtype=F64), rtol=0, atol=1e-10)
    assert (g.values.diff() <= 0).all()


def test_fit_of_low_rank_is_the_leading_part_and_repeats_itself():
    data = random(400, 200, seed=1) * torch.logspace(1, -2, 200, dtype=F64)
    exact, low = Gaussian.fit(data), Gaussian.fit(data, rank=12)
    assert low.vectors.shape == (200, 12)
    torch.testing.assert_close(low.values, exact.values[:12], rtol=1e-2, atol=0)  # two power iterations
    before = torch.get_rng_state()
    again = Gaussian.fit(data, rank=12)
    assert torch.equal(again.vectors, low.vectors) and torch.equal(torch.get_rng_state(), before)


def test_images_keep_their_shape_and_half_precision_is_raised():
    images = random(50, 1, 4, 4).bfloat16()
    g = Gaussian.fit(images)
    assert g.mean.dtype == torch.float32
    x = random(3, 1, 4, 4).bfloat16()
    for out in (g.score(x, 1.0), g.denoised(x, 1.0), g.flow(x, 80.0, 1.0)):
        assert out.shape == x.shape and out.dtype == torch.float32
    assert g.trajectory(x, torch.tensor([80.0, 5.0, 0.0])).shape == (3, 3, 1, 4, 4)


def test_mixture_fit_finds_two_clusters():
    left, right = random(300, D, seed=1) - 8, 0.5 * random(100, D, seed=2) + 8
    mixture = Mixture.fit(torch.cat([left, right]), 2, rank=D)
    order = mixture.means[:, 0].argsort()
    torch.testing.assert_close(mixture.log_weights.exp()[order], torch.tensor([0.75, 0.25], dtype=F64))
    torch.testing.assert_close(mixture.means[order], torch.stack([left.mean(0), right.mean(0)]))
    assert mixture.values[order[0]].mean() == pytest.approx(float(left.T.cov().trace()) / D + 1e-5, rel=1e-9)


def test_explained_variance():
    target, mean = random(B, D, seed=1), 0.3
    assert teleport.explained_variance(target, target) == 1
    assert teleport.explained_variance(target, torch.zeros_like(target)) == 0
    assert teleport.explained_variance(target, torch.full_like(target, mean), mean) == 0
    # half of the deviation from the centre is missed: 1 - 1/4
    half = mean + (target - mean) / 2
    assert teleport.explained_variance(target, half, mean) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Gaussian.fit(random(1, 3)), "at least 2 samples"),
        (lambda: Gaussian.fit(random(5, 9), rank=5), "rank 1 to 4"),
        (lambda: Gaussian.fit(random(5, 9) / 0), "nan or inf"),
        (lambda: gaussian().flow(random(2, 8), 80.0, 1.0), "8 elements a sample, these statistics 7"),
        (lambda: Mixture.fit(random(5, 2), 5, rank=1), "fewer than 5 components"),
        (lambda: Mixture.fit(random(5, 2), 2, rank=3), "1 to 2 modes"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# Sampling -------------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(start.states, g.flow(full.states, sigma, sigma_to, alpha, alpha_to))
    torch.testing.assert_close(start.latents * start.scheduler.init_noise_sigma, start.states)
    late, early = run(start.scheduler, start.states, g), run(full.scheduler, full.states, g)
    exact = g.flow(full.states, sigma, 0.0, alpha, 1.0)
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


@pytest.mark.parametrize("kind", [PNDMScheduler, FlowMatchEulerDiscreteScheduler])
def test_schedulers_that_cannot_start_late_are_refused(kind):
    with pytest.raises(ValueError, match="cannot start late"):
        teleport.skip_steps(kind(), random(2, D), gaussian(), 3.0, 10)


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
