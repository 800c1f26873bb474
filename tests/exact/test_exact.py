"""exact.py against hand-derived numbers, enumeration, quadrature and the figures of the sheets."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from minialign.exact import (
    LinearGaussianSampler,
    best_of_n,
    discrete_kl,
    exponential_tilt,
    gold_kl_frontier,
    i_projection,
    leading_timesteps,
    scaled_linear_alpha_bar,
    tilt_gaussian_mixture,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


REF = f64(0.4, 0.3, 0.2, 0.1).log()

# ---------------------------------------------------------------------------------------------- exponential tilt


def test_tilt_by_hand():
    # pi_ref exp(r / beta) with r / beta = (0, log 2, log 4): (1/2, 1/4 * 2, 1/4 * 4) = (1/2, 1/2, 1), so Z = 2.
    log_prob, log_z = exponential_tilt(f64(0.5, 0.25, 0.25).log(), 3.0 * f64(1, 2, 4).log(), beta=3.0)
    assert log_z.item() == pytest.approx(math.log(2), abs=1e-14)
    torch.testing.assert_close(log_prob.exp(), f64(0.25, 0.25, 0.5), atol=1e-14, rtol=0)


def test_tilt_is_the_optimum_and_its_value_is_beta_log_z():
    reward, beta = f64(0.3, -1.0, 2.0, 0.5), 0.7
    log_prob, log_z = exponential_tilt(REF, reward, beta)

    def objective(log_pi):
        return log_pi.exp() @ reward - beta * discrete_kl(log_pi, REF)

    assert objective(log_prob).item() == pytest.approx(beta * log_z.item(), abs=1e-13)
    others = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert max(objective(other) for other in others) < objective(log_prob)


def test_tilt_limits_zeros_and_batches():
    reward = f64(1.0, 3.0, 3.0, 2.0)
    torch.testing.assert_close(exponential_tilt(REF, reward, 1e9)[0], REF, atol=1e-8, rtol=0)
    greedy = exponential_tilt(REF, reward, 1e-3)[0].exp()
    torch.testing.assert_close(greedy, f64(0, 0.6, 0.4, 0), atol=1e-12, rtol=0)  # pi_ref on the two best
    holed = f64(0.5, 0.0, 0.5).log()
    log_prob, log_z = exponential_tilt(holed, f64(0.0, 100.0, 1.0), 1.0)
    assert log_prob[1] == -math.inf
    assert log_z.item() == pytest.approx(math.log(0.5 + 0.5 * math.e), abs=1e-14)
    rewards = torch.stack([reward, -reward])
    batched = exponential_tilt(REF.expand(2, 4), rewards, 0.5)
    for row in range(2):
        torch.testing.assert_close(batched[0][row], exponential_tilt(REF, rewards[row], 0.5)[0])
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive KL weight"):
            exponential_tilt(REF, reward, beta)


def test_discrete_kl_by_hand():
    # .7 log 3.5 + .2 log(2/3) + .1 log .2 = .876934 - .081093 - .160944 = .634897; the other way round
    # .2 log(2/7) + .3 log 1.5 + .5 log 5 = -.250553 + .121640 + .804719 = .675806.
    p, q = f64(0.7, 0.2, 0.1).log(), f64(0.2, 0.3, 0.5).log()
    assert discrete_kl(p, q).item() == pytest.approx(0.634897, abs=1e-6)
    assert discrete_kl(q, p).item() == pytest.approx(0.675806, abs=1e-6)
    assert discrete_kl(f64(1, 0).log(), f64(0.5, 0.5).log()).item() == pytest.approx(math.log(2))
    assert discrete_kl(f64(0.5, 0.5).log(), f64(1, 0).log()) == math.inf


# ---------------------------------------------------------------------------------------------- the frontier


def test_frontier_along_a_misleading_proxy():
    # Outcome 3 is what the proxy likes best and the gold likes least: optimise a little, gold rises; a lot, it falls.
    proxy, gold = f64(0, 1, 2, 3), f64(0, 1, 2, -4)
    log_ref = f64(0.5, 0.3, 0.19, 0.01).log()
    betas = f64(100, 3, 1, 0.5, 0.1)
    frontier = gold_kl_frontier(log_ref, proxy, gold, betas)
    for i, beta in enumerate(betas.tolist()):  # by plain enumeration
        weights = [math.exp(p + r / beta) for p, r in zip(log_ref.tolist(), proxy.tolist(), strict=True)]
        law = [w / sum(weights) for w in weights]
        assert frontier.proxy[i].item() == pytest.approx(sum(w * r for w, r in zip(law, proxy.tolist(), strict=True)))
        assert frontier.gold[i].item() == pytest.approx(sum(w * r for w, r in zip(law, gold.tolist(), strict=True)))
        kl = sum(w * (math.log(w) - p) for w, p in zip(law, log_ref.tolist(), strict=True))
        assert frontier.kl[i].item() == pytest.approx(kl, abs=1e-12)
    assert (frontier.kl.diff() > 0).all()
    assert (frontier.proxy.diff() > 0).all()
    assert frontier.gold[1] > frontier.gold[0]
    assert frontier.gold[-1] < -3
    honest = gold_kl_frontier(log_ref, gold, gold, betas)
    torch.testing.assert_close(honest.proxy, honest.gold)


# ---------------------------------------------------------------------------------------------- I-projection


def test_i_projection_one_constraint():
    # Sheet constrained, check 1.
    features, target = f64(0, 1 / 3, 2 / 3, 1).unsqueeze(-1), f64(0.6)
    log_prob, multipliers = i_projection(REF, features, target)
    assert multipliers.item() == pytest.approx(2.163734, abs=5e-7)
    torch.testing.assert_close(log_prob.exp(), f64(0.146322, 0.225737, 0.309560, 0.318381), atol=5e-7, rtol=0)
    assert discrete_kl(log_prob, REF).item() == pytest.approx(0.292585, abs=5e-7)


def test_i_projection_two_constraints():
    # Sheet constrained, check 2.
    features = torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [1, 1]], dtype=torch.float64)
    log_prob, multipliers = i_projection(REF, features, f64(0.6, 0.6))
    torch.testing.assert_close(multipliers, f64(0.946762, 0.659080), atol=5e-7, rtol=0)
    torch.testing.assert_close(log_prob.exp(), f64(0.310396, 0.310396, 0.179207, 0.200000), atol=5e-7, rtol=0)
    assert discrete_kl(log_prob, REF).item() == pytest.approx(0.050811, abs=5e-7)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_i_projection_of_a_larger_law(scale):
    """Meets its targets, is a tilt of the reference by the features, and no law with the same means is nearer."""
    g = torch.Generator().manual_seed(1)
    log_ref = torch.randn(53, dtype=torch.float64, generator=g).log_softmax(-1)
    features = scale * torch.randn(53, 3, dtype=torch.float64, generator=g)
    law = (
        log_ref + features @ f64(1.0, -2.0, 0.5) / scale + torch.randn(53, dtype=torch.float64, generator=g)
    ).softmax(-1)
    targets = law @ features
    log_prob, multipliers = i_projection(log_ref, features, targets)
    torch.testing.assert_close(log_prob.exp() @ features, targets, atol=1e-8 * scale, rtol=0)
    tilt = log_ref + features @ multipliers
    torch.testing.assert_close(log_prob, tilt - tilt.logsumexp(-1), atol=1e-9, rtol=0)
    # Pythagoras: KL(law || ref) = KL(law || projection) + KL(projection || ref) for every law with these means.
    total = discrete_kl(law.log(), log_prob) + discrete_kl(log_prob, log_ref)
    assert discrete_kl(law.log(), log_ref).item() == pytest.approx(total.item(), abs=1e-9)


def test_i_projection_met_already_redundant_and_with_holes():
    features = torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [1, 1]], dtype=torch.float64)
    log_prob, multipliers = i_projection(REF, features, REF.exp() @ features)
    torch.testing.assert_close(log_prob, REF)
    assert multipliers.abs().max() < 1e-9
    doubled = torch.cat([features, 2 * features[:, :1]], -1)
    torch.testing.assert_close(
        i_projection(REF, doubled, f64(0.6, 0.6, 1.2))[0],
        i_projection(REF, features, f64(0.6, 0.6))[0],
        atol=1e-8,
        rtol=0,
    )
    holed = f64(0.4, 0.0, 0.4, 0.2).log()
    log_prob, _ = i_projection(holed, f64(0, 7, 1, 2).unsqueeze(-1), f64(1.2))
    assert log_prob[1] == -math.inf
    assert (log_prob.exp() @ f64(0, 7, 1, 2)).item() == pytest.approx(1.2, abs=1e-9)


def test_i_projection_on_the_edge_gives_the_face():
    # Mean 1 of a feature in [0, 1]: only its maximisers are left, shared as under the reference.
    log_prob, multipliers = i_projection(REF, f64(0, 1, 1, 0.5).unsqueeze(-1), f64(1.0))
    torch.testing.assert_close(log_prob.exp(), f64(0, 0.6, 0.4, 0), atol=1e-9, rtol=0)
    assert multipliers.item() > 20


@pytest.mark.parametrize("targets", [(1.2, 0.5), (0.0, 0.3), (0.1, 0.1), (-5.0, 2.0)])
def test_i_projection_refuses_what_no_law_can_do(targets):
    features = torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [1, 1]], dtype=torch.float64)
    with pytest.raises(ValueError, match="outside the convex hull"):
        i_projection(REF, features, f64(*targets))


def test_i_projection_refuses_a_contradiction():
    features = f64(0, 1, 2, 3).unsqueeze(-1).expand(4, 2)
    with pytest.raises(ValueError, match="convex hull"):
        i_projection(REF, features, f64(1.0, 1.5))


# ---------------------------------------------------------------------------------------------- best of n


def enumerate_best_of_n(prob, reward, n):
    """Every n-tuple of draws; among equally good draws one is taken at random."""
    law = [0.0] * len(prob)
    for draws in itertools.product(range(len(prob)), repeat=n):
        weight = math.prod(prob[i] for i in draws)
        best = max(reward[i] for i in draws)
        winners = Counter(i for i in draws if reward[i] == best)
        for i, times in winners.items():
            law[i] += weight * times / winners.total()
    return law


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("reward", [(0.1, 0.7, -1.0, 0.3), (1.0, 0.0, 1.0, 2.0), (5.0, 5.0, 5.0, 0.0), (1.0,) * 4])
def test_best_of_n_enumerated(reward, n):
    prob = [0.4, 0.3, 0.2, 0.1]
    out = best_of_n(REF, f64(*reward), n)
    expected = enumerate_best_of_n(prob, reward, n)
    torch.testing.assert_close(out.log_prob.exp(), f64(*expected), atol=1e-14, rtol=0)
    kl = sum(p * math.log(p / q) for p, q in zip(expected, prob, strict=True) if p > 0)
    assert out.kl.item() == pytest.approx(kl, abs=1e-13)
    assert out.kl <= out.bound + 1e-13
    assert out.bound == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_bound_and_its_limit():
    # Sheet ppo_rlhf, check 3: log n - (n - 1) / n, reached as atoms shrink.
    figures = {2: 0.193147, 4: 0.636294, 16: 1.835089, 64: 3.174508, 1000: 5.908755, 60000: 10.002117}
    size = 20_000
    uniform = torch.full((size,), -math.log(size), dtype=torch.float64)
    reward = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    for n, figure in figures.items():
        out = best_of_n(uniform, reward, n)
        assert out.bound == pytest.approx(figure, abs=6e-7)
        assert out.kl < out.bound
        assert out.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-10)
        if n <= 1000:
            assert out.kl.item() == pytest.approx(figure, abs=2e-3)
    assert best_of_n(uniform, reward, 60_000).kl < 9.75  # n = 3 atoms: the formula is off by 0.3 here


def test_best_of_n_zeros_tiny_atoms_and_batches():
    holed = f64(0.0, 0.5, 0.0, 0.5, 0.0).log()
    out = best_of_n(holed, f64(-1, 0, 0, 1, 2), 2)
    torch.testing.assert_close(out.log_prob.exp(), f64(0, 0.25, 0, 0.75, 0), atol=1e-15, rtol=0)
    assert out.log_prob[[0, 2, 4]].tolist() == [-math.inf] * 3
    assert out.kl.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    # An atom too small to move the cumulative sum is still chosen about n times as often when it is the best.
    tiny = torch.cat([torch.tensor([1.0], dtype=torch.float64), f64(1e-20)]).log()
    assert best_of_n(tiny, f64(0, 1), 7).log_prob[1].exp().item() == pytest.approx(7e-20, rel=1e-6)
    # In the middle, and this small, it does not move log F at all; then P = n F^(n-1) p, here 7 / 2^6 of it.
    middle = best_of_n(torch.cat([f64(0.5).log(), f64(-800), f64(0.5).log()]), f64(0, 1, 2), 7)
    assert middle.log_prob[1].item() == pytest.approx(-800 + math.log(7 / 64), abs=1e-9)
    # n = 60,000 multiplies the rounding of the total probability: in float32, from 1e-7 to nearly 1 %.
    ref = torch.full((3000,), -math.log(3000))
    law = best_of_n(ref, torch.arange(3000.0), 60_000).log_prob.double().exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-3)
    rewards = torch.tensor([[0.1, 0.7, -1.0, 0.3], [1.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    both = best_of_n(REF.expand(2, 4), rewards, 3)
    for row in range(2):
        torch.testing.assert_close(both.log_prob[row], best_of_n(REF, rewards[row], 3).log_prob)
    with pytest.raises(ValueError, match="at least one draw"):
        best_of_n(REF, rewards[0], 0)


# ---------------------------------------------------------------------------------------------- Gaussian mixtures


def test_quadratic_tilt_of_one_gaussian():
    # Sheet find_noise, check 2: r = -(x - 2)^2 = -4 + 4 x - x^2, N(1, .5^2), beta .1: mean 1.833333, sd .204124.
    out = tilt_gaussian_mixture(
        f64(1).reshape(1, 1), f64(0.25).reshape(1, 1, 1), f64(0), 0.1, f64(4.0), f64(-2).reshape(1, 1)
    )
    assert out.means.item() == pytest.approx(1.833333, abs=5e-7)
    assert out.covariances.item() ** 0.5 == pytest.approx(0.204124, abs=5e-7)


def test_linear_tilt_of_one_gaussian():
    # N(0, 1), r = x, beta = 1: N(1, 1), log Z = 1/2 (sheet fk_steering, check 4).
    # s = .5, g = 2, beta = .25: shift s^2 g / beta = 2 (sheet d3po, check 5).
    out = tilt_gaussian_mixture(f64(0).reshape(1, 1), f64(1).reshape(1, 1, 1), f64(0), 1.0, f64(1.0))
    assert (out.means.item(), out.covariances.item()) == pytest.approx((1, 1))
    assert out.log_z.exp().item() == pytest.approx(1.648721, abs=5e-7)
    out = tilt_gaussian_mixture(f64(0).reshape(1, 1), f64(0.25).reshape(1, 1, 1), f64(0), 0.25, f64(2.0))
    assert out.means.item() == pytest.approx(2.0)


def test_tilt_of_a_mixture_in_the_steering_sheet():
    # Sheet fk_steering: .9 N(-1, .16) + .1 N(1.5, .16), r = -(x - 1.5)^2 / 2 = -1.125 + 1.5 x - x^2 / 2, beta = 1/2:
    # E r -.192, P(x > .5) .925, log Z -2.365.
    out = tilt_gaussian_mixture(
        f64(-1, 1.5).reshape(2, 1),
        f64(0.16, 0.16).reshape(2, 1, 1),
        f64(0.9, 0.1).log(),
        0.5,
        f64(1.5),
        f64(-1).reshape(1, 1),
    )
    weight, mean, var = out.log_weights.exp(), out.means[:, 0], out.covariances[:, 0, 0]
    assert (weight @ (-((mean - 1.5) ** 2 + var) / 2)).item() == pytest.approx(-0.192, abs=5e-4)
    assert (weight @ (1 - torch.special.ndtr((0.5 - mean) / var.sqrt()))).item() == pytest.approx(0.925, abs=5e-4)
    assert out.log_z.item() - 1.125 / 0.5 == pytest.approx(-2.365, abs=5e-4)


def density(means, covariances, log_weights, x):
    """A mixture's density with an inverse and a determinant, as in a textbook."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for mean, covariance, log_weight in zip(means, covariances, log_weights, strict=True):
        d = x - mean
        exponent = -0.5 * torch.einsum("ni,ij,nj->n", d, torch.linalg.inv(covariance), d)
        total += torch.exp(log_weight + exponent) / torch.sqrt(torch.linalg.det(2 * math.pi * covariance))
    return total


def test_tilt_of_a_correlated_mixture_against_the_definition():
    """p exp(r / beta) / Z, point by point, Z by quadrature; the reward curves up one way, down the other."""
    means = torch.tensor([[0.5, -0.3], [-1.0, 0.8]], dtype=torch.float64)
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]], dtype=torch.float64)
    log_weights, beta = f64(0.7, 0.3).log(), 0.8
    linear, quadratic = f64(0.6, -1.1), torch.tensor([[0.5, 0.3], [0.3, -1.5]], dtype=torch.float64)
    out = tilt_gaussian_mixture(means, covariances, log_weights, beta, linear, quadratic)
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    reward = grid @ linear + torch.einsum("ni,ij,nj->n", grid, quadratic, grid) / 2
    tilted = density(means, covariances, log_weights, grid) * (reward / beta).exp()
    z = (
        tilted.sum() * (axis[1] - axis[0]) ** 2
    )  # the trapezoid rule is spectrally accurate on a decaying smooth function
    assert out.log_z.item() == pytest.approx(z.log().item(), abs=1e-9)
    torch.testing.assert_close(density(*out[:3], grid), tilted / z, atol=1e-11, rtol=0)
    torch.testing.assert_close(out.covariances, out.covariances.mT)


def test_tilt_limits_and_refusals():
    means = torch.tensor([[0.5, -0.3], [-1.0, 0.8]], dtype=torch.float64)
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.0, 0.0], [0.0, 0.6]]], dtype=torch.float64)
    log_weights, linear = f64(0.7, 0.3).log(), f64(0.6, -1.1)
    out = tilt_gaussian_mixture(means, covariances, log_weights, 0.5, linear)
    torch.testing.assert_close(out.means, means + covariances @ linear / 0.5)  # a flat direction cannot move
    torch.testing.assert_close(out.covariances, covariances)
    unnormalised = tilt_gaussian_mixture(means, covariances, log_weights + 3, 0.5, linear)
    torch.testing.assert_close(unnormalised.log_z, out.log_z)
    same = tilt_gaussian_mixture(means, covariances, log_weights, 0.5)
    torch.testing.assert_close(same.log_weights, log_weights)
    assert same.log_z.abs() < 1e-14
    convex = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"infinite under component 0.*larger beta"):
        tilt_gaussian_mixture(
            means, covariances, log_weights, 0.55, linear, convex
        )  # largest eigenvalue of Sigma: .6236
    tilt_gaussian_mixture(means, covariances, log_weights, 0.63, linear, convex)
    with pytest.raises(ValueError, match="positive KL weight"):
        tilt_gaussian_mixture(means, covariances, log_weights, 0.0, linear)


# ---------------------------------------------------------------------------------------------- linear-Gaussian sampler


def test_schedule():
    table = scaled_linear_alpha_bar()
    assert table[0].item() == pytest.approx(0.99915, abs=1e-12)
    assert table[999].item() == pytest.approx(0.00466, abs=5e-6)
    assert leading_timesteps(20).tolist() == list(range(951, 0, -50))
    assert leading_timesteps(5).tolist() == [801, 601, 401, 201, 1]


def test_five_steps_of_the_sampler():
    # Sheet ddpo, check 1.
    sampler = LinearGaussianSampler(mean=0.3, std=0.5, num_steps=5, eta=1.0)
    close = {"atol": 5e-7, "rtol": 0}
    torch.testing.assert_close(sampler.step_std, f64(0.820143, 0.653684, 0.433599, 0.041172, 0.020648), **close)
    torch.testing.assert_close(sampler.gain, f64(-1.643266, -1.103967, -0.768510, -0.570590, -0.020714), **close)
    torch.testing.assert_close(
        sampler.policy_gradient, f64(-0.187154, -0.263620, -0.383399, -0.568892, -0.020714), **close
    )
    assert sampler.sample_mean.item() == pytest.approx(0.297046, abs=5e-7)
    assert sampler.sample_variance.item() == pytest.approx(0.084424, abs=5e-7)


@pytest.mark.parametrize(
    ("num_steps", "shift", "kl", "variance"), [(20, 0.387493, 0.096873, 0.783), (50, 0.444262, None, 0.894)]
)
def test_reachable_optimum(num_steps, shift, kl, variance):
    # Sheet ddpo, check 2 and trap 4: not the naive std^2 / beta = .5.
    sampler = LinearGaussianSampler(0.0, 1.0, num_steps)
    assert sampler.reachable_shift(2.0).item() == pytest.approx(shift, abs=5e-7)
    theta = sampler.optimum(2.0)
    assert (sampler.mean_at(theta) - sampler.sample_mean).item() == pytest.approx(shift, abs=5e-7)
    assert sampler.path_kl(theta).item() == pytest.approx(sampler.optimal_kl(2.0).item(), abs=1e-14)
    assert sampler.sample_variance.item() == pytest.approx(variance, abs=5e-4)
    if kl is not None:
        assert sampler.optimal_kl(2.0).item() == pytest.approx(kl, abs=5e-7)


def test_the_optimum_is_stationary_and_maximal():
    sampler, beta = LinearGaussianSampler(-0.7, 0.5, 7, eta=0.6), 0.4
    theta = sampler.optimum(beta).requires_grad_()
    objective = sampler.mean_at(theta) - beta * sampler.path_kl(theta)
    assert torch.autograd.grad(objective, theta)[0].abs().max() < 1e-14
    nudge = 0.01 * torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert all(sampler.mean_at(theta + d) - beta * sampler.path_kl(theta + d) < objective for d in nudge)


def test_ten_steps_variance():
    assert LinearGaussianSampler(0.0, 1.0, 10).sample_variance.item() == pytest.approx(0.648, abs=5e-4)  # trap 4


@pytest.mark.parametrize(
    ("num_steps", "std", "eta", "fraction", "digits"),
    [(20, 1.0, 1.0, 0.010, 5e-4), (20, 0.5, 1.0, 0.003, 5e-4), (20, 0.5, 0.5, 0.29, 5e-3), (50, 1.0, 0.2, 0.83, 5e-3)],
)
def test_memory(num_steps, std, eta, fraction, digits):
    # Sheet ddpo, check 3: the share of Var(x_0) that x_T fixes.
    assert LinearGaussianSampler(0.0, std, num_steps, eta).memory_fraction.item() == pytest.approx(fraction, abs=digits)


def test_variance_decided_in_a_window():
    # Sheet b2diffurl, check 1.
    sampler = LinearGaussianSampler(0.0, 0.5, 20)
    assert sampler.sample_variance.item() == pytest.approx(0.169096, abs=5e-7)
    shares = {1: 0.0025, 2: 0.0122, 4: 0.2721, 6: 0.5242, 8: 0.7079, 10: 0.8300, 14: 0.9529, 20: 0.9969}
    for window, share in shares.items():
        assert (sampler.window_variance(window) / sampler.sample_variance).item() == pytest.approx(share, abs=5e-5)
    assert sampler.memory_fraction.item() == pytest.approx(0.0031, abs=5e-5)
    for std, figures in {1.0: {4: 0.0891, 8: 0.4069, 14: 0.8548}, 0.1: {2: 0.5076, 4: 0.8542}}.items():
        other = LinearGaussianSampler(0.0, std, 20)
        for window, share in figures.items():
            assert (other.window_variance(window) / other.sample_variance).item() == pytest.approx(share, abs=5e-5)
    assert sampler.window_variance(0) == 0
    with pytest.raises(ValueError, match="expected 0 to 20"):
        sampler.window_variance(21)


def test_branching_pays_only_in_short_windows():
    # Sheet b2diffurl, check 2: b = 5, the step at t = 151; global baseline Var + q, branch baseline b/(b-1) (Vs + q).
    sampler = LinearGaussianSampler(0.0, 0.5, 20)
    step = sampler.timesteps.tolist().index(151)
    q = (sampler.downstream[step] * sampler.step_std[step]) ** 2
    assert q.item() == pytest.approx(0.02366, abs=5e-6)
    assert (sampler.sample_variance + q).item() == pytest.approx(0.1928, abs=5e-5)
    for window, figure in {4: 0.0871, 8: 0.1792, 14: 0.2310}.items():
        assert (5 / 4 * (sampler.window_variance(window) + q)).item() == pytest.approx(figure, abs=5e-5)


def test_sampler_against_the_recursion_and_a_simulation():
    """The closed forms of the mean, variance and gradient against a loop written from the sheet, step by step."""
    mean, std, eta, num_steps = -0.4, 0.7, 0.8, 6
    sampler = LinearGaussianSampler(mean, std, num_steps, eta)
    table, stride = scaled_linear_alpha_bar(), 1000 // num_steps
    theta = 0.1 * torch.randn(num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rng = np.random.default_rng(0)
    x = rng.standard_normal(200_000)
    m, v = 0.0, 1.0
    for i in range(num_steps):
        t = (num_steps - 1 - i) * stride + 1
        a, a_next = table[t].item(), table[max(t - stride, 0)].item()

        def move(x, z, a=a, a_next=a_next, shift=theta[i].item()):
            eps = math.sqrt(1 - a) * (x - math.sqrt(a) * mean) / (a * std**2 + 1 - a) + shift
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
            return math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps + sigma * z

        slope, sigma = move(1.0, 0.0) - move(0.0, 0.0), move(0.0, 1.0) - move(0.0, 0.0)
        assert sampler.slope[i].item() == pytest.approx(slope, abs=1e-13)
        assert sampler.step_std[i].item() == pytest.approx(sigma, abs=1e-13)
        m, v = move(m, 0.0), slope**2 * v + sigma**2
        x = move(x, rng.standard_normal(len(x)))
    assert sampler.mean_at(theta).item() == pytest.approx(m, abs=1e-13)
    assert sampler.sample_variance.item() == pytest.approx(v, abs=1e-13)
    assert abs(x.mean() - m) < 4 * math.sqrt(v / len(x))
    assert abs(x.var() - v) < 4 * v * math.sqrt(2 / len(x))


def test_deterministic_sampler_has_no_density():
    sampler = LinearGaussianSampler(0.0, 1.0, 10, eta=0.0)
    assert sampler.noise_variance == 0
    assert sampler.memory_fraction == 1
    for ask in (lambda: sampler.optimum(1.0), lambda: sampler.path_kl(torch.ones(10, dtype=torch.float64))):
        with pytest.raises(ValueError, match=r"step 0 \(timestep 901\) is deterministic"):
            ask()
