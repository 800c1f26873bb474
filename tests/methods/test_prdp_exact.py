"""PRDP where everything is known: the linear-Gaussian line, in float64, through the real policy, world and loss."""

import dataclasses
import math

import pytest
import torch

from minialign.exact import LinearGaussianSampler
from minialign.methods import prdp
from minialign.policies.paths import reference_log_probs
from minialign.worlds import gaussian

F64, BETA = torch.float64, 2.0
CONFIG = prdp.Config(beta=BETA, clip_range=math.inf, weight_decay=0.0, max_grad_norm=math.inf)


def line(num_steps=5, std=1.0):
    world = gaussian.load("line", num_steps=num_steps, std=std)
    world.policy.network.double()
    world.policy.set_num_steps(num_steps)
    return world, world.policy, world.sampler


def at(policy, theta):
    with torch.no_grad():
        policy.network.residual.theta.copy_(theta)


def rolled(policy, groups, size, seed=0, shared=False):
    """(trajectory, log-probabilities under the reference, rewards), rows (groups, size) side by side."""
    noise = policy.draw_noise(groups * size, torch.Generator().manual_seed(seed))
    if shared:
        noise[:, 0] = noise[::size, 0].repeat_interleave(size, 0)
    with torch.no_grad():
        traj = policy.rollout(["a number"] * len(noise), noise, reduction="sum")
    ref = reference_log_probs(policy, traj, reduction="sum", rows_per_pass=len(noise), steps_per_pass=5)
    return traj, ref, traj.final.squeeze(-1)


def loss_and_slope(policy, groups, size, shared=False, seed=0, config=CONFIG):
    """The mean loss over prompts, in the paper's units, and its gradient with respect to theta."""
    traj, ref, rewards = rolled(policy, groups, size, seed, shared)
    rows = torch.arange(groups * size).view(groups, size)
    ((loss, _),) = prdp.partial_losses(policy, traj, rows, ref, rewards, False, config)
    loss = loss / config.beta**2
    return loss.item(), torch.autograd.grad(loss, policy.network.residual.theta)[0]


@pytest.mark.parametrize("num_steps", [5, 20])
def test_at_the_exact_tilt_no_error_is_left_but_that_of_the_start(num_steps):
    """Check 4: theta* = P sigma^2 / (beta k). With one x_T a prompt the loss is 0; with two, the part of x_0 that no
    policy tilts stays, (m (x_T - x_T') / beta)^2, of mean 2 m^2 / beta^2."""
    _, policy, sampler = line(num_steps)
    at(policy, sampler.optimum(BETA))
    loss, slope = loss_and_slope(policy, 40, 3, shared=True)
    assert loss < 1e-18 and slope.abs().max() < 1e-9
    pairs = [loss_and_slope(policy, 1000, 2, seed=seed) for seed in range(12)]
    losses, slopes = torch.tensor([loss for loss, _ in pairs]), torch.stack([slope for _, slope in pairs])
    left = 2 * float(sampler.memory_slope) ** 2 / BETA**2
    error = losses.std() / math.sqrt(len(losses))
    assert abs(losses.mean() - left) < 4 * error and left > 20 * error
    # and it pulls nowhere: x_T adds variance, not bias
    assert (slopes.mean(0).abs() < 4 * slopes.std(0) / math.sqrt(len(slopes))).all()
    # Cov(x_0 | x_T) / beta, not Cov(x_0) / beta
    shift = sampler.mean_at(policy.network.residual.theta.detach()) - sampler.sample_mean
    assert float(shift) == pytest.approx(float(sampler.noise_variance) / BETA)
    at(policy, 1.1 * sampler.optimum(BETA))
    assert loss_and_slope(policy, 40, 3, shared=True)[0] > 1e-3


def test_the_policy_gradient_is_that_of_reward_minus_beta_kl():
    """On the paths that a policy drew itself: -4 / beta (b / (b - 1) taken in) times d/dtheta (E x_0 - beta KL), at any
    theta, within 4 standard errors; every step's own."""
    _, policy, sampler = line(5)
    theta = torch.tensor([0.3, -0.2, 0.1, -0.4, 0.2], dtype=F64)
    at(policy, theta)
    slopes = torch.stack([loss_and_slope(policy, 500, 4, seed=seed)[1] for seed in range(40)])
    kl_slope = sampler.gain**2 * theta / sampler.step_std**2
    expected = -4 / BETA * (sampler.policy_gradient - BETA * kl_slope)
    error = slopes.std(0) / math.sqrt(len(slopes))
    assert ((slopes.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.12 * expected.abs().max()).all()


@pytest.mark.optimum("prdp")
@pytest.mark.parametrize("clip_range", [0.05, math.inf])
def test_the_loop_reaches_the_exact_optimum_and_stays(clip_range):
    """Every step's theta*, and the shift of the samples' mean: Vn / beta."""
    world, policy, _ = line(5)
    config = dataclasses.replace(
        CONFIG, num_iterations=40, num_prompts=32, group_size=4, num_updates=4, clip_range=clip_range,
        learning_rate=0.05, prompts_per_pass=32, shared_start=True,
    )  # fmt: skip
    exact, shifts = LinearGaussianSampler(num_steps=5, alpha_bar_table=policy.scheduler.alphas_cumprod), []
    generator = torch.Generator().manual_seed(0)
    for step in prdp.train(policy, world.rewards["first_coordinate"], world.prompts, config, generator):
        theta, found = policy.network.residual.theta.detach(), step.metrics
        shifts.append(float(exact.mean_at(theta) - exact.sample_mean) / float(exact.reachable_shift(BETA)))
    assert all(abs(shift - 1) < 0.02 for shift in shifts[25:])
    torch.testing.assert_close(theta, exact.optimum(BETA), atol=0.02, rtol=0)
    assert abs(float(found["slope"]) - 1) < 0.02 and float(found["explained"]) > 0.999
    # the mean log-ratio is the KL of paths; its own spread is that of x_0 / beta
    kl, spread = float(found["kl"]), math.sqrt(float(exact.noise_variance) / 128) / BETA
    assert abs(kl - float(exact.optimal_kl(BETA))) < 4 * spread
