"""PRDP's loss by hand and against a loop written from the paper, its limits, and what its own loop must keep."""

import dataclasses
import math

import pytest
import torch

from minialign import worlds
from minialign.kernels import group_advantages
from minialign.loop import fit
from minialign.methods import prdp, rlcm

F64, INF = torch.float64, math.inf
SMALL = prdp.Config(
    num_iterations=3, num_prompts=8, group_size=3, num_updates=3, beta=0.5, clip_range=0.01, learning_rate=3e-3,
    weight_decay=0.0,
)  # fmt: skip


def f64(*values):
    return torch.tensor(values, dtype=F64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def loss_of(log_ratio, rewards, beta, clip_range=INF, **settings):
    """The loss of log-ratios (n, b, t), with an old policy that is the reference."""
    zero = torch.zeros_like(log_ratio)
    return prdp.prdp_loss(log_ratio, zero, zero, rewards, beta, clip_range, **settings)[0]


# ---- check 1


def test_it_is_zero_where_the_log_ratios_are_r_over_beta_and_a_constant():
    paths = f64(0.2, 0.7, -0.1).view(1, 3, 1)
    assert loss_of(paths, f64(1, 2, 0.4).unsqueeze(0), 2.0).item() == pytest.approx(0, abs=1e-30)
    rewards, shares = random(4, 5, seed=1), random(4, 5, 3, seed=2).softmax(2)
    paths = shares * (rewards / 0.7 + random(4, 1, seed=3)).unsqueeze(2)  # spread over three steps, any way
    for ties in (False, True):
        assert loss_of(paths, rewards, 0.7, ties=ties).max() < 1e-28
    assert loss_of(paths, rewards, 0.8).min() > 1e-3 and loss_of(-paths, rewards, 0.7).min() > 1e-3


# ---- check 2


def test_what_must_not_change_it():
    log_prob, old, ref, rewards = *(random(2, 4, 3, seed=s) for s in (1, 2, 3)), random(2, 4, seed=4)
    old = log_prob + 0.3 * old  # so that some steps are clipped and some are not
    loss, info = prdp.prdp_loss(log_prob, old, ref, rewards, 0.7, 0.2)
    assert 0.2 < info["clip_fraction"].mean() < 0.8
    a, shift = random(2, 1, seed=5), random(2, 4, 3, seed=6)
    torch.testing.assert_close(prdp.prdp_loss(log_prob, old, ref, rewards + a, 0.7, 0.2)[0], loss)
    moved = [x + shift for x in (log_prob, old, ref)]
    torch.testing.assert_close(prdp.prdp_loss(*moved, rewards, 0.7, 0.2)[0], loss)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [x[:, order] for x in (log_prob, old, ref, rewards)]
    torch.testing.assert_close(prdp.prdp_loss(*shuffled, 0.7, 0.2)[0], loss)
    only = prdp.prdp_loss(log_prob[1:], old[1:], ref[1:], rewards[1:], 0.7, 0.2)[0]
    torch.testing.assert_close(only, loss[1:])  # prompts do not mix


# ---- check 3


def test_its_first_gradient_is_a_policy_gradient_with_the_prompts_mean_as_baseline():
    rewards = f64(1, 3, -2, 0.5).unsqueeze(0)
    paths = torch.zeros(1, 4, 2, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(paths, rewards, 2.0, clip_range=0.1).sum(), paths)
    expected = f64(-0.25, -1.583333, 1.75, 0.083333)
    torch.testing.assert_close(slope, expected.view(1, 4, 1).expand(1, 4, 2), atol=1e-6, rtol=0)  # of every step alike
    advantages = group_advantages(rewards.flatten(), torch.zeros(4, dtype=torch.long), scale=False)
    torch.testing.assert_close(slope[0, :, 0], -4 * advantages / (2.0 * 3))


# ---- check 5


@pytest.mark.parametrize(
    ("q", "expected", "gradient"),
    [
        (0.05, 0.2025, -0.9),  # inside: nothing is clipped
        (0.3, 0.16, 0.0),  # clipped, short of the target: on its way, so no gradient
        (1.2, 0.49, 1.4),  # past the target: the way back is open
        (-0.3, 0.64, -1.6),  # clipped on the wrong side: the way back is open
    ],
)
def test_the_four_cases_of_the_clip(q, expected, gradient):
    path = torch.tensor([[[q], [0.0]]], dtype=F64, requires_grad=True)
    loss = loss_of(path, f64(0.5, 0).unsqueeze(0), 1.0, clip_range=0.1).sum()
    (slope,) = torch.autograd.grad(loss, path)
    assert (loss.item(), slope[0, 0, 0].item()) == (pytest.approx(expected), pytest.approx(gradient))
    assert q != 0.3 or loss_of(path, f64(0.5, 0).unsqueeze(0), 1.0).item() == pytest.approx(0.04)  # unclipped
    tie = torch.tensor([[[0.9], [0.0]]], dtype=F64)
    assert loss_of(tie, f64(0.5, 0).unsqueeze(0), 1.0, 0.1).item() == pytest.approx(0.16)


def test_the_clip_is_around_the_old_policy_and_step_by_step():
    """old is .4 from the reference: .45 is inside, though .45 from the reference; .3 and .7 are clipped to .35, .45."""
    old, ref = f64(0.4, 0.4, 0.4, 0.4).view(1, 2, 2), torch.zeros(1, 2, 2, dtype=F64)
    rewards = f64(3.0, 0.0).unsqueeze(0)
    path = f64(0.45, 0.4, 0.4, 0.4).view(1, 2, 2)
    loss, info = prdp.prdp_loss(path, old, ref, rewards, 1.0, 0.06)
    assert loss.item() == pytest.approx((0.05 - 3) ** 2) and info["clip_fraction"].sum() == 0
    path = f64(0.3, 0.7, 0.4, 0.4).view(1, 2, 2)  # the sum moved by .2, its clipped steps cancel
    loss, info = prdp.prdp_loss(path, old, ref, rewards, 1.0, 0.05)
    assert loss.item() == pytest.approx(9.0) and info["clip_fraction"].flatten().tolist() == [1, 1, 0, 0]


# ---- check 6, and the siblings


def test_the_mean_over_steps_is_another_beta():
    log_prob, rewards = random(2, 4, 5), random(2, 4, seed=1)
    mean = loss_of(log_prob, rewards, 0.7, 0.3, reduction="mean")
    torch.testing.assert_close(mean, loss_of(log_prob, rewards, 0.7 / 5, 0.3) / 25)


def test_two_paths_without_clip_are_rebel():
    """Reference = old policy, beta = eta, beta^2 times the loss."""
    log_ratio, rewards = random(5, 2, 3), random(5, 2, seed=1)
    rebel = rlcm.rebel_loss(log_ratio.sum(2).T, rewards.T, 0.7)
    torch.testing.assert_close(0.7**2 * loss_of(log_ratio, rewards, 0.7).mean(), rebel)


def slow_loss(log_prob, old, ref, rewards, beta, eps, ties):
    """Eq. 10 to 21, pair by pair and step by step."""
    total, pairs = 0.0, 0
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if not (rewards[i] > rewards[j] or (ties and i < j and rewards[i] == rewards[j])):
                continue
            plain = clipped = 0.0
            for t in range(log_prob.shape[1]):
                for sign, k in ((1, i), (-1, j)):
                    q, q_old = float(log_prob[k, t] - ref[k, t]), float(old[k, t] - ref[k, t])
                    plain += sign * q
                    clipped += sign * min(max(q, q_old - eps), q_old + eps)
            target = float(rewards[i] - rewards[j]) / beta
            total, pairs = total + max((plain - target) ** 2, (clipped - target) ** 2), pairs + 1
    return total / max(pairs, 1)


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_papers_sums(ties):
    log_prob, ref = random(3, 5, 2), random(3, 5, 2, seed=1)
    old = log_prob + 0.5 * random(3, 5, 2, seed=2)
    rewards = torch.tensor([[0, 1, 1, 0, 1], [2, 2, 2, 2, 2], [5, 1, 4, 1, 3]], dtype=F64)
    loss, info = prdp.prdp_loss(log_prob, old, ref, rewards, 0.7, 0.4, ties=ties)
    slow = [slow_loss(log_prob[n], old[n], ref[n], rewards[n], 0.7, 0.4, ties) for n in range(3)]
    torch.testing.assert_close(loss, f64(*slow))
    assert (loss[1] == 0) == (not ties)  # a prompt of equal rewards
    k3 = (log_prob - old).expm1() - (log_prob - old)
    torch.testing.assert_close(info["approx_kl"], k3)


def test_half_precision_counts_in_float32():
    log_prob, old, ref = (random(2, 3, 4, seed=s).bfloat16() for s in (1, 2, 3))
    rewards = random(2, 3, seed=4).float()
    half = prdp.prdp_loss(log_prob, old, ref, rewards, 0.7, 0.2)[0]
    full = prdp.prdp_loss(*(x.float() for x in (log_prob, old, ref)), rewards, 0.7, 0.2)[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full)


def test_shapes_are_refused_and_not_broadcast():
    log_prob = random(2, 3, 4)
    with pytest.raises(Exception, match="rewards"):  # beartype's here; ValueError by same_shape without annotations
        prdp.prdp_loss(log_prob, log_prob, log_prob, random(2, 1), 0.7, 0.2)


def test_what_is_predicted():
    rewards = f64(1, 3, 0, 10, 11, 14).view(2, 3)
    for scale, slope, explained in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.75), (2.0, 2.0, 0.0)):
        found = prdp.prediction(scale * rewards / 0.7 + f64(3, -8).unsqueeze(1), rewards, 0.7)
        assert (found["slope"].item(), found["explained"].item()) == (pytest.approx(slope), pytest.approx(explained))
    constant = prdp.prediction(random(2, 3), torch.full((2, 3), 0.3, dtype=F64), 0.7)
    assert (constant["slope"].item(), constant["explained"].item()) == (0, 1)


# ---- the loop


def trained(config, seed=0, reward=None, keep=None, name="compass"):
    """Weights after training with five steps, in float64; `keep` collects the rows."""
    world = worlds.load(name, num_steps=5)
    world.policy.network.double()
    world.policy.to("cpu")
    reward = reward or (lambda samples, prompts: -(samples - 1).square().sum(1))
    for step in prdp.train(world.policy, reward, world.prompts, config, torch.Generator().manual_seed(seed)):
        if keep is not None:
            keep.append(step.row())
    return torch.cat([p.detach().flatten() for p in world.policy.parameters()])


@pytest.mark.parametrize("shared", [False, True])
def test_one_call_for_all_steps_or_several_is_the_same_but_for_its_price(shared):
    config = dataclasses.replace(SMALL, num_iterations=2, shared_start=shared)
    whole, cut = [], []
    torch.testing.assert_close(
        trained(dataclasses.replace(config, steps_per_pass=2), keep=cut), trained(config, keep=whole), atol=1e-9, rtol=0
    )
    for row, other in zip(whole, cut, strict=True):
        assert {**row, "seconds": 0, "network_evaluations": 0} == pytest.approx(
            {**other, "seconds": 0, "network_evaluations": 0}, abs=1e-8
        )
    states = 8 * 3 * 5  # rolled out, scored under the reference, 3 times differentiated; again before updates 2 and 3
    assert [row["network_evaluations"] for row in whole] == [states * (1 + 1 + 9), 2 * states * (1 + 1 + 9)]
    assert cut[1]["network_evaluations"] == 2 * states * (1 + 1 + 9 + 2)
    assert [row["reward_queries"] for row in whole] == [24, 48]
    assert any(row["clip_fraction"] > 0.05 for row in whole)  # else the slopes of clipped steps were not compared


def test_a_level_of_reward_that_prompts_have_changes_nothing():
    """In the crowd: with levels spread over +-10 and without, the same weights, to rounding."""
    world = worlds.load("crowd")
    even, uneven = (
        trained(dataclasses.replace(SMALL, clip_range=0.05), reward=world.rewards[name], name="crowd")
        for name in ("even", "uneven")
    )
    torch.testing.assert_close(even, uneven, atol=1e-5, rtol=0)  # the rewards are float32: 10 + .3 has 1e-6 left
    start = torch.cat([p.detach().flatten() for p in worlds.load("crowd", num_steps=5).policy.parameters()])
    assert (even - start.double()).abs().max() > 1e-3


def test_a_shared_start_is_shared_within_a_prompt_and_not_beyond(monkeypatch):
    world, seen = worlds.load("compass", num_steps=5), []
    rollout = world.policy.rollout
    monkeypatch.setattr(world.policy, "rollout", lambda p, noise, **k: seen.append(noise) or rollout(p, noise, **k))
    config = dataclasses.replace(SMALL, num_iterations=1, shared_start=True)
    fit(prdp.train(world.policy, world.rewards["style"], world.prompts, config), progress=False)
    starts = seen[0][:, 0].view(8, 3, 2)
    assert torch.equal(starts, starts[:, :1].expand_as(starts)) and len(starts[:, 0].unique(dim=0)) == 8
    assert len(seen[0][:, 1].unique(dim=0)) == 24


def test_impossible_settings_are_refused():
    world = worlds.load("compass", num_steps=5)
    reward = world.rewards["gold"]
    for change, message in [
        ({"group_size": 1}, "group_size is 1; PRDP compares the paths of a prompt"),
        ({"beta": 0.0}, r"beta is 0\.0; expected a finite number above 0"),
        ({"clip_range": 0}, "clip_range is 0; expected a number above 0"),
        ({"reduction": "total"}, "reduction is 'total'; expected one of 'sum', 'mean'"),
        ({"steps_per_pass": 0}, "steps_per_pass is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(prdp.train(world.policy, reward, world.prompts, dataclasses.replace(SMALL, **change)))
    with pytest.raises(ValueError, match="prompts is empty"):
        next(prdp.train(world.policy, reward, [], SMALL))
    with pytest.raises(ValueError, match="eta = 0"):
        next(prdp.train(worlds.load("compass", eta=0.0).policy, reward, world.prompts, SMALL))
    with pytest.raises(ValueError, match="the policy is a LanguagePolicy; this method needs one that denoises"):
        next(prdp.train(worlds.load("tokens").policy, reward, ["p0"], SMALL))
