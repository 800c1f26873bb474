"""FIND: the sheet's closed-form checks, its gradient, its calibration, exact optima, refusals."""

import dataclasses
import math

import pytest
import torch

from minialign import worlds
from minialign.kernels import diagonal_log_prob, standard_normal_kl
from minialign.loop import fit
from minialign.methods import find_noise
from minialign.policies.initial_noise import NoisePolicy

F64 = torch.float64
SMALL = find_noise.Config(num_iterations=3, group_size=6, reduction="sum", learning_rate=0.01)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def distance(samples, prompts):
    """A smooth reward, so that every sample has an advantage of its own."""
    return -(samples - 1).square().sum(1)


def compass(num_steps=5, eta=0.0):
    world = worlds.load("compass", num_steps=num_steps, eta=eta)
    world.policy.network.double()
    world.policy.to("cpu")
    return world, NoisePolicy(world.policy, world.prompts)


def trained(config, reward=distance, seed=0):
    world, policy = compass()
    history = fit(
        find_noise.train(policy, reward, world.prompts, config, torch.Generator().manual_seed(seed)), progress=False
    )
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), history


# The sheet's checks ---------------------------------------------------------------------------------------------------


def climbed(objective, start=(0.0, 0.0)):
    """argmax over (mean, log std) of a closed-form objective."""
    mean, log_std = (torch.tensor([[v]], dtype=F64, requires_grad=True) for v in start)
    optimizer = torch.optim.LBFGS(
        [mean, log_std], 1.0, 200, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = -objective(mean, log_std).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return mean.item(), log_std.exp().item()


def test_checks_1_and_2_the_optimum_of_a_linear_sampler():
    """x0 = m + s z: E[r] is known, the KL is the package's."""
    a, s, b = 0.4, 0.5, 0.1
    found = climbed(lambda mean, log_std: a * s * mean - b * standard_normal_kl(mean, log_std, "sum"))
    assert found == pytest.approx((2.0, 1.0), abs=1e-6)
    m, s, a, b = 1.0, 0.5, 2.0, 0.1

    def quadratic(mean, log_std):
        expected = -((m + s * mean - a) ** 2) - (s * log_std.exp()) ** 2
        return expected - b * standard_normal_kl(mean, log_std, "sum")

    mean, std = climbed(quadratic)
    assert (mean, std) == pytest.approx((1.666667, 0.408248), abs=1e-6)
    assert (m + s * mean, s * std) == pytest.approx((1.833333, 0.204124), abs=1e-6)
    # which is the tilted law N(m, s^2) exp(r / b): precisions add
    precision = 1 / s**2 + 2 / b
    assert (m + s * mean, s * std) == pytest.approx(((m / s**2 + 2 * a / b) / precision, precision**-0.5), abs=1e-6)


def test_check_3_at_first_the_gradient_is_reinforce_and_clipping_is_inactive():
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(1, 3, generator=generator, dtype=F64).requires_grad_() for _ in range(2))
    z = torch.randn(5, 3, generator=generator, dtype=F64)
    advantages = torch.randn(5, generator=generator, dtype=F64)
    log_prob = diagonal_log_prob(z, mean.expand(5, 3), log_std.expand(5, 3), "sum")
    loss, info = find_noise.find_loss(log_prob, log_prob.detach(), advantages, f64(0.0), 0.2, 0.1)
    ours = torch.autograd.grad(loss, (mean, log_std))
    u = ((z - mean) / log_std.exp()).detach()
    by_hand = [-(advantages[:, None] * score).mean(0, True) for score in (u / log_std.exp().detach(), u**2 - 1)]
    for mine, theirs in zip(ours, by_hand, strict=True):
        assert mine.abs().min() > 1e-3
        torch.testing.assert_close(mine, theirs)
    assert info["clip_fraction"] == 0 and info["approx_kl"] == 0


@pytest.mark.parametrize("baseline", ["batch", "ema"])
def test_check_4_a_shifted_reward_changes_nothing(baseline):
    config = dataclasses.replace(SMALL, baseline=baseline)
    weights, _ = trained(config)
    shifted, _ = trained(config, lambda samples, prompts: distance(samples, prompts) + 16)
    torch.testing.assert_close(shifted, weights, atol=1e-5, rtol=0)  # rewards are float32: 16 costs four of its bits
    raw = dataclasses.replace(SMALL, baseline="none")
    assert (trained(raw)[0] - trained(raw, lambda s, p: distance(s, p) + 16)[0]).abs().max() > 1e-2


def test_check_5_the_kl_and_the_codes_surrogate():
    mean, log_std = f64([0.3], [0.3]), f64([0.8], [0.8]).log()
    assert standard_normal_kl(mean, log_std, "sum").tolist() == pytest.approx([0.088144] * 2, abs=1e-6)
    assert find_noise.moment_distance(mean, log_std, "sum").tolist() == pytest.approx([0.13] * 2, abs=1e-12)
    small = f64([1e-4])
    ratio = find_noise.moment_distance(small, f64([0.0]), "sum") / standard_normal_kl(small, f64([0.0]), "sum")
    assert ratio.item() == pytest.approx(2)
    ratio = find_noise.moment_distance(f64([0.0]), small, "sum") / standard_normal_kl(f64([0.0]), small, "sum")
    assert ratio.item() == pytest.approx(1, abs=1e-3)


def test_check_6_the_ratio_under_sum_and_mean():
    z = f64([0.5, -1, 0.2, 1.5])
    for reduction, expected in (("sum", 1.008631), ("mean", 1.002151)):
        new = diagonal_log_prob(z, torch.full_like(z, 0.1), torch.full_like(z, math.log(1.1)), reduction)
        old = diagonal_log_prob(z, torch.zeros_like(z), torch.zeros_like(z), reduction)
        assert (new - old).exp().item() == pytest.approx(expected, abs=1e-6)


def test_check_7_a_strong_pull_holds_it_and_no_advantage_leaves_the_pull_alone():
    strong, _ = trained(dataclasses.replace(SMALL, beta=1e6, num_iterations=10))
    free, _ = trained(dataclasses.replace(SMALL, beta=0.0, num_iterations=10))
    assert strong.abs().max() < 0.02 and free.abs().max() > 0.1
    kl = standard_normal_kl(f64([0.3]), f64([-0.2]), "sum")
    loss, _ = find_noise.find_loss(f64(0.3, 1.0), f64(0.1, 2.0), f64(0.0, 0.0), kl, 0.2, 0.5)
    assert loss.item() == pytest.approx(0.5 * kl.item())


def test_beyond_the_clip_the_minimum_still_pulls_back():
    """Trap: a clamp alone has no gradient there, whatever the advantage's sign."""
    log_prob = f64(0.5, 0.5, -0.5, -0.5).requires_grad_()
    loss, info = find_noise.find_loss(log_prob, torch.zeros_like(log_prob), f64(1, -1, 1, -1), f64(0.0), 0.2, 0.0)
    loss.backward()
    assert (log_prob.grad != 0).tolist() == [False, True, True, False] and info["clip_fraction"] == 1


# The optimum, by the loop ---------------------------------------------------------------------------------------------


@pytest.mark.optimum("find_noise")
@pytest.mark.parametrize("kl", ["exact", "moments"])
def test_the_loop_reaches_the_exact_optimum(kl):
    """The line's own deterministic sampler is x0 = offset + slope z; the reward -(x0 - 2)^2, beta 0.1."""
    world = worlds.load("line", num_steps=3, eta=0.0, mean=1.0, std=1.0)
    policy, exact = NoisePolicy(world.policy, world.prompts), world.sampler
    slope, offset = float(exact.memory_slope), float(exact.sample_mean)
    config = find_noise.Config(
        num_iterations=100, group_size=256, num_epochs=1, reduction="sum", baseline="batch", beta=0.1, kl=kl,
        learning_rate=0.05, max_grad_norm=1e9,
    )  # fmt: skip

    def quadratic(samples, prompts):
        return -(samples[:, 0] - 2).square()

    means, stds = [], []
    for step in find_noise.train(policy, quadratic, world.prompts, config):
        means.append(policy.mean.item())
        stds.append(step.metrics["std"].item())
    if kl == "exact":
        mean, std = 2 * slope * (2 - offset) / (2 * slope**2 + 0.1), (0.1 / (2 * slope**2 + 0.1)) ** 0.5
    else:  # d/dmu: 2 slope (2 - x) = 2 beta mu; d/dsigma: 2 slope^2 sigma = -2 beta (sigma - 1)
        mean, std = slope * (2 - offset) / (slope**2 + 0.1), 0.1 / (slope**2 + 0.1)
    assert sum(means[-40:]) / 40 == pytest.approx(mean, abs=0.05)  # the other KL's is .15 away
    assert sum(stds[-40:]) / 40 == pytest.approx(
        std, abs=0.02 if kl == "exact" else 0.1
    )  # it is still on its way there


def test_find_noise_policy_gradient_is_the_exact_one():
    """mean over z of A grad log pi is grad E[r] in closed form, within 4 standard errors."""
    n, m, s, a = 200_000, 1.0, 0.5, 2.0
    mean, log_std = f64([0.4]).requires_grad_(), f64([-0.3]).requires_grad_()
    z = mean.detach() + log_std.detach().exp() * torch.randn(
        n, 1, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    rewards = -((m + s * z[:, 0] - a) ** 2)
    log_prob = diagonal_log_prob(z, mean.expand(n, 1), log_std.expand(n, 1), "sum")
    loss, _ = find_noise.find_loss(log_prob, log_prob.detach(), rewards - rewards.mean(), f64(0.0), 0.2, 0.0)
    ours = torch.autograd.grad(-loss, (mean, log_std))
    expected = -((m + s * mean - a) ** 2) - (s * log_std.exp()) ** 2
    exact = torch.autograd.grad(expected.sum(), (mean, log_std))
    u = ((z - mean) / log_std.exp()).detach()
    for mine, truth, score in zip(ours, exact, (u / log_std.detach().exp(), u**2 - 1), strict=True):
        error = ((rewards - rewards.mean())[:, None] * score).std() / n**0.5
        assert abs(mine.item() - truth.item()) < 4 * error and abs(truth.item()) > 50 * error


# Calibration, buffer, variants ----------------------------------------------------------------------------------------


def calibrated(config, rounds):
    _, policy = compass()
    calibration, values = find_noise.Calibration(policy, config), []
    for rewards in rounds:
        values.append(calibration.update(torch.tensor(rewards), torch.tensor([0, 0, 1, 1])).tolist())
    return values


def test_what_each_baseline_expects():
    rounds = [[1.0, 3.0, 0.0, 0.0], [4.0, 6.0, 1.0, 0.0]]
    ema = dataclasses.replace(SMALL, ema_decay=0.75)
    assert calibrated(ema, rounds) == [[2.0, 0.0], [2 + 0.25 * 3, 0.125]]  # begins at the first mean, then a quarter
    assert calibrated(dataclasses.replace(SMALL, baseline="batch"), rounds) == [[2.0, 0.0], [5.0, 0.5]]
    assert calibrated(dataclasses.replace(SMALL, baseline="none"), rounds) == [[0.0, 0.0]] * 2
    learned = calibrated(dataclasses.replace(SMALL, baseline="value", value_updates=40), rounds[:1] * 6)
    assert learned[-1] == pytest.approx([2.0, 0.0], abs=0.05)


def test_the_network_reads_the_law():
    """V is of (phi, c): of a law that moved it says something else, of the other one what it said."""
    _, policy = compass()
    calibration = find_noise.Calibration(policy, dataclasses.replace(SMALL, baseline="value", value_updates=200))
    calibration.update(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    before = calibration.network(policy)
    policy.mean.data[0] += 1
    after = calibration.network(policy)
    assert before.tolist() == pytest.approx([1, 0], abs=0.02)
    assert (after[0] - before[0]).abs() > 1e-3 and after[1] == before[1]


def test_the_buffer_holds_the_last_rounds_each_with_its_own_reward():
    def sample(i):
        return find_noise.Samples(*(torch.full(shape, float(i)) for shape in ((2, 3), (2,), (2,), (2,))))

    buffer, one = find_noise.Buffer(2), find_noise.Buffer(1)
    held = [(buffer.push(sample(i)).rewards.tolist(), one.push(sample(i)).rewards.tolist()) for i in range(3)]
    assert held == [([0, 0], [0, 0]), ([0, 0, 1, 1], [1, 1]), ([1, 1, 2, 2], [2, 2])]
    assert buffer.samples.latents[:, 0].tolist() == [1, 1, 2, 2] and one.tensors() == {}


def test_prompts_learn_apart():
    """A prompt's law is the same whichever others learn beside it: rows of one prompt touch no other one's law."""
    world, both = compass()
    config = dataclasses.replace(SMALL, max_grad_norm=math.inf, num_iterations=4)
    steps = find_noise.train(both, lambda s, p: distance(s, p) * torch.tensor([q == "inner" for q in p]), world.prompts,
                             config)  # fmt: skip
    fit(steps, progress=False)
    assert both.mean[0].abs().min() > 1e-3 and both.mean[1].abs().max() == 0 and both.log_std[1].abs().max() == 0
    world, alone = compass()
    fit(find_noise.train(alone, distance, ["inner"], config), progress=False)  # the same noise: its rows come first
    torch.testing.assert_close(alone.mean[0], both.mean[0], atol=1e-6, rtol=0)


def test_the_ratio_to_the_initial_law_is_not_one_in_the_second_round():
    """The authors' code: log rho = log pi - log N(0, I), for ever."""
    for reference, is_one in (("rollout", True), ("initial", False)):
        config = dataclasses.replace(SMALL, num_iterations=2, num_epochs=1, ratio_reference=reference)
        _, history = trained(config)
        assert history["approx_kl"][0] == 0 and (abs(history["approx_kl"][1]) < 1e-12) == is_one


def test_it_climbs_and_counts():
    world, policy = compass(num_steps=10)
    config = find_noise.Config(num_iterations=15, group_size=16, reduction="sum", learning_rate=0.05)
    history = fit(find_noise.train(policy, world.rewards["side"], world.prompts, config), progress=False)
    assert history["reward"][-1] > 0.9 > 0.75 > history["reward"][0]  # the base is right in half
    assert history["reward_queries"] == [32 * n for n in range(1, 16)]
    assert history["network_evaluations"] == [320 * n for n in range(1, 16)]  # of the sampler alone
    assert history["kl"][0] < history["kl"][-1] and history["std"][-1] < 1


def test_impossible_settings_are_refused():
    world, policy = compass()
    for change, message in [
        ({"baseline": "mean"}, "baseline is 'mean'; expected one of 'ema', 'value', 'batch', 'none'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5"),
        ({"buffer_rounds": 0}, "buffer_rounds is 0"),
        ({"baseline": "batch", "group_size": 1}, "each reward is its own mean"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(find_noise.train(policy, distance, world.prompts, dataclasses.replace(SMALL, **change)))
    with pytest.raises(ValueError, match="this method needs one that learns its initial noise, NoisePolicy"):
        next(find_noise.train(world.policy, distance, world.prompts, SMALL))
    with pytest.raises(ValueError, match="prompt 'outer' has no law"):
        next(find_noise.train(NoisePolicy(world.policy, ["inner"]), distance, world.prompts, SMALL))
