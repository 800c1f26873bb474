"""Advantages, the clipped surrogate and the KL estimators: hand-derived numbers, loops, enumerated expectations."""

import math
import statistics

import pytest
import torch
from torch.autograd import gradcheck

from minialign.kernels import (
    clipped_surrogate,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    means,
    weighted_sums,
    whiten,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- whitening


def test_whiten_by_hand():
    # (1, 3, 5, 11): mean 5, population variance (16 + 4 + 0 + 36) / 4 = 14.
    torch.testing.assert_close(whiten(f64(1, 3, 5, 11), eps=0.0), f64(-4, -2, 0, 6) / math.sqrt(14))
    torch.testing.assert_close(whiten(f64(1, 3), eps=1.0), f64(-0.5, 0.5))  # std 1, plus eps


def test_whiten_limits():
    x = random(3, 5, 7)
    out = whiten(x)
    assert out.shape == x.shape
    assert out.mean().abs() < 1e-14
    assert out.std(correction=0).item() == pytest.approx(1, abs=1e-7)
    torch.testing.assert_close(whiten(3 * x - 100), out, atol=1e-7, rtol=0)
    torch.testing.assert_close(whiten(-x), -out)
    for constant in (0.0, 0.1, -1e6 / 3):
        assert whiten(torch.full((7,), constant)).tolist() == [0.0] * 7  # in float32, where 0.1's mean is not 0.1
    assert gradcheck(whiten, (random(5, seed=1).requires_grad_(),))


# ---------------------------------------------------------------------------------------------- group advantages


def test_group_advantages_by_hand():
    # Group 0: (1, 3), mean 2, population std 1. Group 2: (5, 5, 8), mean 6, variance (1 + 1 + 4) / 3 = 2.
    rewards, group = f64(1, 5, 3, 5, 8), torch.tensor([0, 2, 0, 2, 2])
    root = math.sqrt(2)
    expected = f64(-1, -1 / root, 1, -1 / root, 2 / root)
    torch.testing.assert_close(group_advantages(rewards, group, eps=0.0), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(group_advantages(rewards, group, scale=False), f64(-1, -1, 1, -1, 2))
    torch.testing.assert_close(group_advantages(f64(1, 3), torch.tensor([1, 1]), eps=1.0), f64(-0.5, 0.5))


def grouped_loop(rewards, group, eps):
    out = []
    for reward, g in zip(rewards, group, strict=True):
        mine = [r for r, other in zip(rewards, group, strict=True) if other == g]
        out.append((reward - statistics.fmean(mine)) / (statistics.pstdev(mine) + eps))
    return out


@pytest.mark.parametrize("batch", [1, 2, 13, 64])
def test_group_advantages_against_a_loop(batch):
    """Groups of unequal size, ids with gaps, rows in no order."""
    rewards = 5 + 3 * random(batch, seed=batch)
    group = torch.randint(max(batch // 3, 1), (batch,), generator=torch.Generator().manual_seed(batch))
    expected = grouped_loop(rewards.tolist(), group.tolist(), 1e-6)
    torch.testing.assert_close(group_advantages(rewards, group), f64(*expected), atol=1e-10, rtol=0)


def test_group_advantages_see_their_own_group_only():
    """Affine changes of one prompt's rewards change nothing; a negative factor turns only that prompt round."""
    rewards, group = random(12), torch.arange(12) % 3
    base = group_advantages(rewards, group)
    changed = torch.where(group == 1, 7 * rewards - 40, torch.where(group == 2, rewards / 9 + 3, rewards))
    torch.testing.assert_close(group_advantages(changed, group), base, atol=3e-5, rtol=0)  # eps = 1e-6 of a std of 1/9
    turned = group_advantages(torch.where(group == 1, -rewards, rewards), group)
    torch.testing.assert_close(turned, torch.where(group == 1, -base, base))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(rewards[order], group[order]), base[order])
    for g in range(3):
        assert base[group == g].mean().abs() < 1e-14


def test_constant_groups_are_exact_zeros():
    """Float noise of 1e-8 over eps = 1e-6 would be an advantage of 0.01 from nothing (sheet ddpo, trap 6)."""
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([0.1, 0.1, 0.1, 1e6 / 3, 1e6 / 3, 1e6 / 3, 2.0], dtype=dtype)
        group = torch.tensor([0, 0, 0, 1, 1, 1, 6])
        assert group_advantages(rewards, group).tolist() == [0.0] * 7
        assert group_advantages(rewards, group, scale=False).tolist() == [0.0] * 7


def test_one_group_is_whitening():
    rewards = random(11)
    one = group_advantages(rewards, torch.zeros(11, dtype=torch.long), eps=1e-8)
    torch.testing.assert_close(one, whiten(rewards), atol=1e-14, rtol=0)


def test_a_column_of_rewards_is_refused():
    """(B, 1) rewards against (B,) log-probabilities: every sample gets the mean advantage, and nothing is learnt."""
    with pytest.raises(Exception, match="rewards"):
        group_advantages(random(4, 1), torch.arange(4))
    with pytest.raises(Exception, match="advantages"):
        clipped_surrogate(random(4), random(4), random(4, 1), 0.2)


# ---------------------------------------------------------------------------------------------- clipped surrogate

RATIOS = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
ADVANTAGES = [-1.0, 0.0, 2.0]
GRID = [(ratio, advantage) for ratio in RATIOS for advantage in ADVANTAGES]


def surrogate(ratio, advantage, low, high):
    """PPO, eq. 7, for one sample: (loss, d loss / d log ratio). The minimum of the two, and where it is flat."""
    clipped = min(max(ratio, low), high)
    loss = -min(ratio * advantage, clipped * advantage)
    flat = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
    return loss, 0.0 if flat else -advantage * ratio


@pytest.mark.parametrize("clip_range", [0.05, 0.25])
def test_surrogate_on_the_grid(clip_range):
    for ratio, advantage in GRID:
        log_prob = f64(math.log(ratio) - 3.0).requires_grad_()
        loss, info = clipped_surrogate(log_prob, f64(-3.0), f64(advantage), clip_range)
        expected, slope = surrogate(ratio, advantage, 1 - clip_range, 1 + clip_range)
        assert loss.item() == pytest.approx(expected, abs=1e-12), (ratio, advantage)
        assert torch.autograd.grad(loss, log_prob)[0].item() == pytest.approx(slope, abs=1e-12), (ratio, advantage)
        assert info["clip_fraction"].item() == float(abs(ratio - 1) > clip_range + 1e-9)
        # k3 of KL(old || new), samples from old: ratio - 1 - log ratio.
        assert info["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12)


def test_surrogate_of_the_whole_grid_at_once():
    ratio, advantage = f64(*[r for r, _ in GRID]), f64(*[a for _, a in GRID])
    old = random(len(GRID))
    loss, info = clipped_surrogate(ratio.log() + old, old, advantage, 0.25)
    assert loss.tolist() == pytest.approx([surrogate(r, a, 0.75, 1.25)[0] for r, a in GRID], abs=1e-12)
    assert info["clip_fraction"].tolist() == [float(abs(r - 1) > 0.25) for r, _ in GRID]
    assert info["approx_kl"].tolist() == pytest.approx([r - 1 - math.log(r) for r, _ in GRID], abs=1e-12)
    assert not info["approx_kl"].requires_grad
    weight = torch.arange(1.0, 34.0, dtype=torch.float64) / 561  # sums to 1
    assert means(info)["clip_fraction"].item() == pytest.approx(sum(abs(r - 1) > 0.25 for r in RATIOS) / len(RATIOS))
    total = sum(w * kl for w, kl in zip(weight.tolist(), info["approx_kl"].tolist(), strict=True))
    assert weighted_sums(info, weight)["approx_kl"].item() == pytest.approx(total)


def test_surrogate_by_hand():
    # Ratios 2 and 1/2, advantages 3 and -4, range .2: -min(6, 3.6) = -3.6 and -min(-2, -3.2) = 3.2.
    loss, _ = clipped_surrogate(f64(2.0, 0.5).log(), f64(0, 0), f64(3, -4), 0.2)
    assert loss.tolist() == pytest.approx([-3.6, 3.2])


def test_surrogate_at_the_old_policy():
    """Loss -A, gradient -A, nothing clipped: check 4 of the sheet, for one kernel."""
    log_prob, advantages = random(7).requires_grad_(), random(7, seed=1)
    loss, info = clipped_surrogate(log_prob, log_prob.detach().clone(), advantages, 0.1)
    torch.testing.assert_close(loss, -advantages)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), log_prob)[0], -advantages)
    assert (info["clip_fraction"] == 0).all() and (info["approx_kl"] == 0).all()


def test_surrogate_gradcheck():
    ratio, advantage = (
        f64(0.5, 0.9, 1.04, 1.5, 0.5, 1.5),
        f64(2, 2, -1, 2, -1, -1),
    )  # away from the kinks at .75 and 1.25
    assert gradcheck(
        lambda lp: clipped_surrogate(lp, f64(*[0] * 6), advantage, 0.25)[0], (ratio.log().requires_grad_(),)
    )


# ---------------------------------------------------------------------------------------------- KL estimators

P, Q = f64(0.7, 0.2, 0.1), f64(0.2, 0.3, 0.5)  # lopsided: KL(p || q) = .634897, KL(q || p) = .675806
LOG_RATIO = P.log() - Q.log()


def test_expectations_enumerated():
    # E_p: k1 and k3 give .634897; k2 gives sum p log^2(p/q) / 2:
    # (.7 1.569415 + .2 .164402 + .1 2.590290) / 2 = .695250.
    assert (P @ kl_k1(LOG_RATIO)).item() == pytest.approx(0.634897, abs=1e-6)
    assert (P @ kl_k3(LOG_RATIO)).item() == pytest.approx(0.634897, abs=1e-6)
    assert (P @ kl_k2(LOG_RATIO)).item() == pytest.approx(0.695250, abs=1e-6)
    assert (Q @ kl_k1(-LOG_RATIO)).item() == pytest.approx(0.675806, abs=1e-6)
    assert (Q @ kl_k3(-LOG_RATIO)).item() == pytest.approx(0.675806, abs=1e-6)


def test_k3_turned_round_is_something_else():
    # The usual mistake: expm1(u) - u with u = log p - log q has mean chi2(p || q) - KL(p || q) under p.
    chi2 = (P**2 / Q).sum() - 1
    assert (P @ kl_k3(-LOG_RATIO)).item() == pytest.approx((chi2 - 0.634897).item(), abs=1e-6)
    assert (P @ kl_k3(-LOG_RATIO)).item() > 0.634897 + 0.3


def test_signs_and_small_ratios():
    u = torch.linspace(-3, 3, 41, dtype=torch.float64)
    torch.testing.assert_close(kl_k1(u), u)
    torch.testing.assert_close(kl_k2(u), u**2 / 2)
    torch.testing.assert_close(kl_k3(u), (-u).exp() - 1 + u)
    assert (kl_k3(u) >= 0).all()
    assert kl_k3(f64(0)).item() == 0
    # Near 0 k3 -> k2, also in float32, where exp(u) - 1 - u would lose every digit: u^2 / 2 = 5e-9 against eps 1.2e-7.
    assert kl_k3(torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=0.02)


def test_gradients_enumerated():
    """Under samples from p held fixed: k2's mean gradient is the KL's, k1's is zero, k3's is that of KL(q || p).

    So k1 and k3 serve as numbers, never as losses; Schulman's note and its usual misreading.
    """
    logits = P.log().requires_grad_()
    log_p = logits.log_softmax(-1)
    log_ratio = log_p - Q.log()
    true = torch.autograd.grad((log_p.exp() * log_ratio).sum(), logits, retain_graph=True)[0]
    reverse = torch.autograd.grad((Q * -log_ratio).sum(), logits, retain_graph=True)[0]
    expected = {kl_k1: torch.zeros(3, dtype=torch.float64), kl_k2: true, kl_k3: reverse}
    for estimator, gradient in expected.items():
        got = torch.autograd.grad(P @ estimator(log_ratio), logits, retain_graph=True)[0]
        torch.testing.assert_close(got, gradient, atol=1e-12, rtol=0)
    assert (true - reverse).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions(dtype):
    rewards, group = random(6).to(dtype), torch.tensor([0, 0, 0, 1, 1, 1])
    wide = torch.promote_types(dtype, torch.float32)
    tol = {"atol": 1e-5, "rtol": 1e-5}
    for out in (whiten(rewards), group_advantages(rewards, group)):
        assert out.dtype == wide
    torch.testing.assert_close(whiten(rewards).double(), whiten(rewards.double()), **tol)
    exact = group_advantages(rewards.double(), group)
    torch.testing.assert_close(group_advantages(rewards, group).double(), exact, **tol)
    log_prob = (random(6, seed=1) / 8).to(dtype)
    for estimator in (kl_k1, kl_k2, kl_k3):
        rough = {"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else tol
        torch.testing.assert_close(estimator(log_prob).double(), estimator(log_prob.double()), **rough)
    loss, info = clipped_surrogate(log_prob, torch.zeros_like(log_prob), rewards, 0.1)
    expected, _ = clipped_surrogate(log_prob.double(), torch.zeros(6, dtype=torch.float64), rewards.double(), 0.1)
    torch.testing.assert_close(loss.double(), expected, atol=0.02, rtol=0.02)
    assert loss.dtype == wide and all(value.isfinite().all() for value in info.values())
