"""The closed-form checks of the ddpo sheet, in float64, through the real policy, world and loss."""

import math

import pytest
import torch

from minialign.exact import LinearGaussianSampler
from minialign.kernels import clipped_surrogate, gaussian_kl, group_advantages
from minialign.methods import ddpo
from minialign.statistics import Statistics
from minialign.worlds import gaussian

F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


def float64_policy(name, **settings):
    """A world's policy, its network in float64, and its exact sampler (line) on the very same noise levels."""
    world = gaussian.load(name, **settings)
    world.policy.network.double()
    world.policy.set_num_steps(world.policy.num_steps)
    return world.policy, world.sampler, world


def with_theta(policy, theta):
    with torch.no_grad():
        policy.network.residual.theta.copy_(theta)


def transitions(policy, x):
    """Mean of every step at x, (S,): one batched call."""
    steps = torch.arange(policy.num_steps)
    condition = policy.encode(["a number"] * policy.num_steps)
    states = torch.full((policy.num_steps, 1), x, dtype=F64)
    return policy.step(states, steps, condition, reduction="sum").mean.squeeze(-1)


# ---------------------------------------------------------------------------------------------- check 1


def test_the_policy_is_the_linear_gaussian_sampler():
    """Slope, offset, gain and std of every step, measured on the policy, against the closed form."""
    policy, sampler, _ = float64_policy("line", mean=0.25, std=0.5, num_steps=5)  # 0.3 would be kept as float32's 0.3
    tol = {"atol": 1e-12, "rtol": 0}
    offset, at_one = transitions(policy, 0.0), transitions(policy, 1.0)
    with_theta(policy, torch.ones(5, dtype=F64))
    gain = transitions(policy, 0.0) - offset
    torch.testing.assert_close(at_one - offset, sampler.slope, **tol)
    torch.testing.assert_close(offset, sampler.offset, **tol)
    torch.testing.assert_close(gain, sampler.gain, **tol)
    torch.testing.assert_close(policy.std, sampler.step_std, **tol)
    assert policy.timesteps.tolist() == [801, 601, 401, 201, 1]
    sheet = f64(-0.187154, -0.263620, -0.383399, -0.568892, -0.020714)
    torch.testing.assert_close(sampler.policy_gradient, sheet, atol=2e-6, rtol=0)  # diffusers' table is float32


def test_monte_carlo_policy_gradient():
    """The score-function estimate of d E[x_0] / d theta, from DDPO's own loss by autograd, within 4 standard errors."""
    policy, sampler, world = float64_policy("line", mean=0.3, std=0.5, num_steps=5)
    generator, config = torch.Generator().manual_seed(0), ddpo.Config(reduction="sum")
    estimates = []
    for _ in range(100):
        with torch.no_grad():
            traj = policy.rollout(world.prompts * 400, generator=generator, reduction="sum")
        advantages = traj.final.squeeze(-1) - sampler.sample_mean  # a constant baseline: no bias
        b, s = torch.cartesian_prod(torch.arange(400), torch.arange(5)).unbind(-1)
        out = policy.step(traj.states[b, s], s, traj.condition[b], next=traj.states[b, s + 1], reduction="sum")
        loss, info = clipped_surrogate(out.log_prob, traj.log_probs[b, s], advantages[b], 1e9)
        theta = policy.network.residual.theta
        (gradient,) = torch.autograd.grad(loss.mean() * policy.num_steps, theta)  # mean over samples, sum over steps
        rows, steps = torch.arange(400), torch.arange(5).expand(400, 5)
        loss = ddpo.transition_loss(policy, traj, rows, steps, advantages, 1e9, config)[0]
        torch.testing.assert_close(torch.autograd.grad(loss * policy.num_steps, theta)[0], gradient)
        assert not info["clip_fraction"].any()
        estimates.append(-gradient)
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    target = sampler.policy_gradient
    assert ((estimates.mean(0) - target).abs() < 4 * error).all()
    assert (error < 0.1 * target.abs()).all()  # sharp enough to see a sign, and every step but the last to 10 %


def test_sampler_moments():
    policy, sampler, world = float64_policy("line", mean=0.3, std=0.5, num_steps=5)
    x0 = policy.sample(world.prompts * 50_000, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    assert sampler.sample_mean.item() == pytest.approx(0.297046, abs=2e-6)
    assert sampler.sample_variance.item() == pytest.approx(0.084424, abs=2e-6)
    assert abs(x0.mean().item() - 0.297046) < 4 * math.sqrt(0.084424 / len(x0))
    assert abs(x0.var().item() - 0.084424) < 4 * 0.084424 * math.sqrt(2 / len(x0))


# ---------------------------------------------------------------------------------------------- check 2


@pytest.mark.parametrize(("num_steps", "shift"), [(20, 0.387493), (50, 0.444262)])
def test_reachable_optimum_of_the_policy(num_steps, shift):
    """theta* moves x_0 by Vn / beta in every run, leaves its variance alone, and zeroes the whole gradient."""
    policy, sampler, world = float64_policy("line", std=1.0, num_steps=num_steps)
    beta, theta = 2.0, sampler.optimum(2.0)
    noise = policy.draw_noise(64, torch.Generator().manual_seed(0))
    before = policy.sample(world.prompts * 64, noise)
    with_theta(policy, theta)
    with torch.no_grad():
        traj = policy.rollout(world.prompts * 64, noise, reduction="sum")
    moved = traj.final - before
    torch.testing.assert_close(moved, torch.full_like(moved, sampler.reachable_shift(beta)), atol=1e-10, rtol=0)
    assert moved.mean().item() == pytest.approx(shift, abs=2e-6)
    assert traj.final.var().item() == pytest.approx(before.var().item(), abs=1e-10)
    # d/d theta of beta * KL at the stored states, through the policy, balances the policy gradient exactly.
    steps = torch.arange(num_steps)
    states, condition = traj.states[0, steps], policy.encode(world.prompts * num_steps)
    now = policy.step(states, steps, condition, reduction="sum")
    ref = policy.step(states, steps, condition, reduction="sum", reference=True)
    kl = gaussian_kl(now.mean, ref.mean, now.std, "sum").sum()
    (slope,) = torch.autograd.grad(beta * kl, policy.network.residual.theta)
    torch.testing.assert_close(slope, sampler.policy_gradient, atol=1e-10, rtol=0)
    assert kl.item() == pytest.approx(sampler.optimal_kl(beta).item(), abs=1e-12)
    if num_steps == 20:
        assert kl.item() == pytest.approx(0.096873, abs=2e-6)


# ---------------------------------------------------------------------------------------------- check 3


@pytest.mark.parametrize(
    ("num_steps", "std", "eta", "fraction", "digits"),
    [(20, 1.0, 1.0, 0.010, 5e-4), (20, 0.5, 1.0, 0.003, 5e-4), (20, 0.5, 0.5, 0.29, 5e-3), (50, 1.0, 0.2, 0.83, 5e-3)],
)
def test_memory_of_the_initial_noise(num_steps, std, eta, fraction, digits):
    """Move one noise at a time by 1: the squared responses of x_0 are its variance, the first one is x_T's share."""
    policy, sampler, world = float64_policy("line", std=std, num_steps=num_steps, eta=eta)
    noise = torch.cat([torch.zeros(1, num_steps + 1, dtype=F64), torch.eye(num_steps + 1, dtype=F64)]).unsqueeze(-1)
    x0 = policy.sample(world.prompts * len(noise), noise).squeeze(-1)
    response = (x0[1:] - x0[0]) ** 2
    assert (response[0] / response.sum()).item() == pytest.approx(fraction, abs=digits)
    torch.testing.assert_close(response.sum(), sampler.sample_variance)
    torch.testing.assert_close(response[1:].sum(), sampler.noise_variance)


# ---------------------------------------------------------------------------------------------- check 4


def test_nothing_has_happened_yet_at_the_old_policy():
    """On compass: ratio 1, loss -mean(A), gradient -mean(A grad log p), clip fraction 0.

    To rounding: a matrix product of 64 rows may add in another order than one of 16.
    """
    policy, _, world = float64_policy("compass", num_steps=4)
    policy.network.residual.net[-1].weight.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    with torch.no_grad():
        traj = policy.rollout(world.prompts * 8, generator=torch.Generator().manual_seed(0))
    group = torch.arange(16) % 2
    rewards = world.rewards["styled_gold"](traj.final, world.prompts * 8)
    advantages = group_advantages(rewards, group)
    b, s = torch.cartesian_prod(torch.arange(16), torch.arange(4)).unbind(-1)
    out = policy.step(traj.states[b, s], s, traj.condition[b], next=traj.states[b, s + 1], reduction="mean")
    torch.testing.assert_close(out.log_prob, traj.log_probs[b, s], atol=1e-12, rtol=0)
    loss, info = clipped_surrogate(out.log_prob, traj.log_probs[b, s], advantages[b], 0.1)
    torch.testing.assert_close(loss, -advantages[b], atol=1e-12, rtol=0)
    assert not info["clip_fraction"].any() and info["approx_kl"].abs().max() < 1e-15
    loss = loss.mean()
    parameters = policy.parameters()
    gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
    by_hand = torch.autograd.grad(-(advantages[b] * out.log_prob).mean(), parameters)
    for mine, theirs in zip(gradient, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=1e-10)
    assert max(g.abs().max() for g in gradient) > 1e-3  # alive


def test_rewards_of_a_prompt_may_be_scaled_and_shifted():
    """With enough in the buffer nothing changes; below min_count the batch's statistics mix prompts, and it does."""
    prompts, g = ["inner", "outer"] * 16, torch.Generator().manual_seed(0)
    rounds = [torch.randn(32, dtype=F64, generator=g) for _ in range(3)]
    changed = [torch.where(torch.arange(32) % 2 == 0, 5 * r - 3, r) for r in rounds]

    def run(rewards, min_count):
        statistics = Statistics(last=64)
        return [ddpo.prompt_advantages(statistics, prompts, r, min_count) for r in rewards]

    for mine, theirs in zip(run(changed, 16), run(rounds, 16), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert (run(changed, 17)[0] - run(rounds, 17)[0]).abs().max() > 0.1
    torch.testing.assert_close(run(changed, 17)[1], run(rounds, 17)[1], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- check 5


def test_without_noise_there_is_no_density():
    policy, _, world = float64_policy("line", eta=0.0, num_steps=6)
    with pytest.raises(ValueError, match="no density"):
        policy.rollout(world.prompts * 2)
    with pytest.raises(ValueError, match="no density"):
        next(ddpo.train(policy, world.rewards["first_coordinate"], world.prompts))


def test_eta_to_zero_is_ddim():
    """The eta = 0 sample is the DDIM map x' = sqrt(a') x0hat + sqrt(1 - a') eps, and eta = 1e-6 lies next to it."""
    samples = {}
    for eta in (0.0, 1e-6, 1.0):
        policy, _, world = float64_policy("compass", eta=eta, num_steps=10)
        noise = policy.draw_noise(32, torch.Generator().manual_seed(0))
        samples[eta] = policy.sample(world.prompts * 16, noise)
    x, table = noise[:, 0], policy.scheduler.alphas_cumprod.double()
    for t in range(901, 0, -100):
        a, a_next = table[t], table[max(t - 100, 0)]
        eps = policy.network.mixture.noise_pred(x, a)
        x = a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
    torch.testing.assert_close(samples[0.0], x, atol=1e-10, rtol=0)
    # Each step's noise is 1e-6 times one of size <= 1; the sampler amplifies between modes, but not a million times.
    assert (samples[1e-6] - samples[0.0]).abs().quantile(0.9) < 1e-4
    assert (samples[1.0] - samples[0.0]).abs().mean() > 0.1


def test_batched_timesteps_are_a_loop():
    policy, _, world = float64_policy("compass", num_steps=5)
    policy.network.residual.net[-1].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        traj = policy.rollout(world.prompts, generator=torch.Generator().manual_seed(0), reduction="sum")
        b, s = torch.cartesian_prod(torch.arange(2), torch.arange(5)).unbind(-1)
        batched = policy.step(traj.states[b, s], s, traj.condition[b], next=traj.states[b, s + 1], reduction="sum")
        for i, (row, step) in enumerate(zip(b.tolist(), s.tolist(), strict=True)):
            given = {"next": traj.states[[row], step + 1], "reduction": "sum"}
            one = policy.step(traj.states[[row], step], step, traj.condition[[row]], **given)
            for mine, theirs in zip(batched, one, strict=True):
                torch.testing.assert_close(mine[i], theirs[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(batched.log_prob.reshape(2, 5), traj.log_probs, atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------- check 6


def test_exact_kl_is_the_mean_log_ratio():
    """Per step, sum convention, states and actions drawn under theta: |mean(log ratio - KL)| < 4 standard errors."""
    policy, _, world = float64_policy("compass", num_steps=6)
    policy.network.residual.net[-1].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    n = 3000
    with torch.no_grad():
        traj = policy.rollout(world.prompts * n, generator=torch.Generator().manual_seed(0), reduction="sum")
        for step in range(6):
            given = {"next": traj.states[:, step + 1], "reduction": "sum"}
            now = policy.step(traj.states[:, step], step, traj.condition, **given)
            ref = policy.step(traj.states[:, step], step, traj.condition, reference=True, **given)
            log_ratio, kl = now.log_prob - ref.log_prob, gaussian_kl(now.mean, ref.mean, now.std, "sum")
            excess = log_ratio - kl
            assert excess.mean().abs() < 4 * excess.std() / math.sqrt(2 * n)
            assert kl.mean() > 10 * excess.std() / math.sqrt(2 * n)  # so half the KL, or its double, would be noticed


def test_path_kl_of_the_line():
    policy, sampler, world = float64_policy("line", std=0.5, num_steps=8)
    theta = 0.2 * torch.randn(8, dtype=F64, generator=torch.Generator().manual_seed(2))
    with_theta(policy, theta)
    traj = policy.rollout(world.prompts * 3, generator=torch.Generator().manual_seed(0), reduction="sum")
    total = torch.zeros(3, dtype=F64)
    for step in range(8):
        args = (traj.states[:, step], step, traj.condition)
        now, ref = (policy.step(*args, reduction="sum", reference=base) for base in (False, True))
        total = total + gaussian_kl(now.mean, ref.mean, now.std, "sum")
    torch.testing.assert_close(total, sampler.path_kl(theta).expand(3), atol=1e-12, rtol=0)


def test_float32_schedule_moves_no_figure():
    """diffusers keeps alpha_bar in float32: the sheet's figures, from a float64 schedule, move in the seventh digit."""
    table = gaussian.scheduler().alphas_cumprod
    for num_steps, std in ((20, 1.0), (50, 1.0), (5, 0.5)):
        exact, rounded = (LinearGaussianSampler(0.3, std, num_steps, 1.0, t) for t in (None, table))
        assert rounded.noise_variance.item() == pytest.approx(exact.noise_variance.item(), rel=2e-5)
        torch.testing.assert_close(rounded.policy_gradient, exact.policy_gradient, atol=2e-6, rtol=0)
