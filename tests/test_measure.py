"""Measures against closed forms, slow references and their limits."""

import itertools
import math
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from minialign import measure
from minialign.kernels import StepOut, gaussian_kl


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, mean, root, seed):
    """n draws of mean + root z."""
    return mean + torch.randn(n, len(mean), generator=rng(seed), dtype=torch.float64) @ root.T


# ---- Frechet


def test_frechet_of_two_gaussians_in_one_dimension():
    # (3 - 1)^2 + (2 - 5)^2 = 13: means 3 and 1, standard deviations 2 and 5.
    one = torch.ones(1)
    distance = measure.frechet_gaussian(3 * one, 4 * one[None], one, 25 * one[None])
    assert distance.item() == pytest.approx(13.0, abs=1e-12)


def test_frechet_of_covariances_that_do_not_commute_agrees_with_scipys_matrix_root():
    a, b = torch.randn(2, 5, 5, generator=rng(1), dtype=torch.float64)
    a, b = a @ a.T, b @ b.T
    mean = torch.tensor([1.0, -2, 0, 0, 3], dtype=torch.float64)
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    expected = 14 + a.trace() + b.trace() - 2 * np.trace(root)
    torch.testing.assert_close(measure.frechet_gaussian(mean, a, torch.zeros_like(mean), b), expected)
    torch.testing.assert_close(measure.frechet_gaussian(torch.zeros_like(mean), b, mean, a), expected)


def test_frechet_distance_uses_the_unbiased_moments_and_is_zero_on_itself():
    a, b = torch.randn(7, 3, generator=rng(2)), 2 * torch.randn(11, 3, generator=rng(3)) + 1
    moments = [
        torch.tensor(f(x.double().numpy())) for x in (a, b) for f in (lambda v: v.mean(0), lambda v: np.cov(v.T))
    ]
    torch.testing.assert_close(measure.frechet_distance(a, b), measure.frechet_gaussian(*moments))
    assert measure.frechet_distance(a, a) < 1e-10
    assert measure.frechet_distance(a, a + 2) == pytest.approx(12.0, rel=1e-5)


def test_frechet_distance_survives_features_that_never_vary():
    a = torch.cat([torch.randn(5, 2, generator=rng(4)), torch.zeros(5, 20)], 1)  # rank 2 of 22
    assert measure.frechet_distance(a, a).item() == pytest.approx(0.0, abs=1e-10)
    with pytest.raises(ValueError, match="features_b has 1"):
        measure.frechet_distance(a, a[:1])


# ---- MMD


def test_mmd_by_a_slow_loop():
    a, b, h = torch.randn(4, 2, generator=rng(5)), torch.randn(3, 2, generator=rng(6)), 0.7
    k = lambda x, y: math.exp(-float((x - y).square().sum()) / (2 * h * h))  # noqa: E731
    within_a = sum(k(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_b = sum(k(b[i], b[j]) for i in range(3) for j in range(3) if i != j) / 6
    across = sum(k(x, y) for x in a for y in b) / 12
    assert measure.mmd(a, b, bandwidth=h).item() == pytest.approx(within_a + within_b - 2 * across, rel=1e-6)


def test_mmd_is_unbiased_where_the_distributions_agree_and_right_where_they_differ():
    # E k(x, y) for x ~ N(m, I), y ~ N(0, I) in d dimensions: (h^2 / (h^2 + 2))^(d/2) exp(-|m|^2 / (2 (h^2 + 2)))
    h, d, m = 1.3, 3, 0.8
    scale = (h**2 / (h**2 + 2)) ** (d / 2)
    truth = 2 * scale * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    z = torch.randn(400, 2, 20, d, generator=rng(7))
    shift = torch.tensor([m, 0, 0])
    for offset, expected in ((0 * shift, 0.0), (shift, truth)):
        estimates = torch.stack([measure.mmd(a + offset, b, bandwidth=h) for a, b in z])
        assert abs(estimates.mean() - expected) < 4 * estimates.std() / 20
        assert (
            4 * estimates.std() / 20 < truth / 4
        )  # so it can fail; keeping the diagonals would add 2 (1 - scale) / 20


def test_mmds_own_bandwidth_is_the_median_distance():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [7.0]])
    # distances 1 3 7 2 6 4: torch's median is the lower middle one, 3
    torch.testing.assert_close(measure.mmd(a, b), measure.mmd(a, b, bandwidth=3.0))
    with pytest.raises(ValueError, match="bandwidth is 0"):
        measure.mmd(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least 2"):
        measure.mmd(a[:1], b)


# ---- sliced Wasserstein


def test_wasserstein_on_the_line_agrees_with_the_quantile_integral_for_unequal_sizes():
    a, b = torch.randn(5, 1, generator=rng(8)), torch.randn(3, 1, generator=rng(9))
    # Repeating each point until both have 15 turns it into the sorted pairing.
    pairs = a.repeat_interleave(3, 0).sort(0).values - b.repeat_interleave(5, 0).sort(0).values
    assert measure.sliced_wasserstein(a, b, 4).item() == pytest.approx(pairs.square().mean().sqrt().item(), rel=1e-6)
    assert measure.sliced_wasserstein(a, a).item() == 0


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d():
    # A shift m is projected to m . u with E (m . u)^2 = |m|^2 / d for unit u.
    a, shift = torch.randn(30, 4, generator=rng(10)), torch.tensor([3.0, 0, -4, 0])
    distance = measure.sliced_wasserstein(a, a + shift, 20_000, generator=rng(11)).item()
    assert distance == pytest.approx(5 / 2, rel=0.02)  # (m . u)^2 has relative sd 1.0, so 4 s.e. of its root is 1.4 %
    again = measure.sliced_wasserstein(a, a + shift, 20_000, generator=rng(11)).item()
    assert distance == again


# ---- diversity


def test_diversity_compares_within_a_prompt_only():
    samples = torch.tensor([[0.0, 0], [3, 4], [100, 0], [0, 2], [50, 50], [100, 1]])
    prompts = ["a", "a", "b", "a", "alone", "b"]
    # a: 5, 2, sqrt(9 + 4); b: 1; 'alone' has no pair
    expected = ((5 + 2 + math.sqrt(13)) / 3 + 1) / 2
    assert measure.diversity(samples, prompts, reduction="sum").item() == pytest.approx(expected)
    assert measure.diversity(samples, prompts, reduction="mean").item() == pytest.approx(expected / math.sqrt(2))


def test_diversity_of_images_counts_every_pixel_and_refuses_nonsense():
    black, white = torch.zeros(1, 3, 5, 7), torch.ones(1, 3, 5, 7)
    assert measure.diversity(torch.cat([black, white]), ["x", "x"], reduction="mean").item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no prompt has two samples"):
        measure.diversity(torch.cat([black, white]), ["x", "y"], reduction="mean")
    with pytest.raises(ValueError, match="unknown reduction"):
        measure.diversity(torch.cat([black, white]), ["x", "x"], reduction="max")


def test_vendi_counts_the_different_samples():
    assert measure.vendi_score(torch.ones(6, 3)).item() == pytest.approx(1.0)
    assert measure.vendi_score(3 * torch.eye(5)).item() == pytest.approx(5.0)
    # shares 1/2, 1/4, 1/4: exp(entropy) = 2^1.5; scale of a feature vector does not matter
    features = torch.tensor([[1.0, 0, 0], [7, 0, 0], [0, 1, 0], [0, 0, 2]])
    assert measure.vendi_score(features).item() == pytest.approx(2**1.5)
    assert measure.vendi_score(similarity=torch.eye(4)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_vendi_from_features_and_from_their_similarity_agree(shape):
    features = torch.randn(shape, generator=rng(12))
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        measure.vendi_score(features), measure.vendi_score(similarity=unit @ unit.T), rtol=1e-4, atol=0
    )


def test_vendi_refuses_a_matrix_that_is_no_similarity():
    with pytest.raises(ValueError, match="ones on its diagonal"):
        measure.vendi_score(similarity=2 * torch.eye(3))
    with pytest.raises(ValueError, match="either features or similarity"):
        measure.vendi_score()


# ---- KL to the base


class Walk:
    """A policy of two numbers: each step moves x by theta[step], the base by 0, with noise std[step]; no network."""

    def __init__(self, theta, std):
        self.theta, self.std, self.num_steps = torch.tensor(theta), torch.tensor(std), len(theta)

    def step(self, states, step, condition, *, next=None, noise=None, reduction, reference=False):
        assert reduction == "sum"
        assert len(condition) == len(states) == len(step)
        move = 0 * self.theta[step] if reference else self.theta[step]
        # The move is scaled by the state's own sign, so that pairing a state with another step's std shows.
        mean = states + move[:, None, None] * (1 + states.abs())
        return StepOut(mean, mean, self.std[step], mean.flatten(1).sum(1), mean)

    def step_kl(self, out, out_ref, reduction):
        return gaussian_kl(out.mean, out_ref.mean, out.std, reduction)


def walk(num_rows, theta, std, first=0):
    policy = Walk(theta, std)
    states = torch.randn(num_rows, len(theta) + 1 - first, 2, 3, generator=rng(13))
    steps = torch.arange(first, len(theta))
    rows = torch.arange(num_rows)
    return policy, SimpleNamespace(
        states=states, log_probs=torch.zeros(num_rows, len(steps)), steps=steps, condition=rows
    )


@pytest.mark.parametrize("steps_per_pass", [1, 2, 5])
def test_path_kl_is_the_sum_over_steps_of_exact_gaussian_kls(steps_per_pass):
    theta, std = [0.3, -0.2, 0.5], [0.7, 1.1, 2.0]
    policy, trajectory = walk(5, theta, std)
    expected = torch.zeros(5)
    for row in range(5):
        for step in range(3):
            moved = theta[step] * (1 + trajectory.states[row, step].abs())
            expected[row] += (moved**2).sum() / (2 * std[step] ** 2)
    torch.testing.assert_close(measure.path_kl(policy, trajectory, steps_per_pass), expected.double())
    torch.testing.assert_close(measure.kl_to_base(policy, trajectory), expected.double().mean())


def test_path_kl_of_a_run_that_branched_late_uses_its_own_steps():
    policy, trajectory = walk(1, [9.0, -0.2, 0.5], [0.1, 1.1, 2.0], first=1)
    x = trajectory.states[0]
    parts = [(0.2 * (1 + x[0].abs()) / 1.1) ** 2, (0.5 * (1 + x[1].abs()) / 2.0) ** 2]
    assert measure.path_kl(policy, trajectory).item() == pytest.approx(sum(p.sum().item() / 2 for p in parts), rel=1e-5)


def test_the_base_itself_is_at_distance_zero():
    policy, trajectory = walk(4, [0.0, 0.0], [1.0, 2.0])
    assert measure.kl_to_base(policy, trajectory).item() == 0


# ---- certainty


def test_the_interval_is_students():
    x = [1.0, 2.0, 4.0, 7.0]
    interval = measure.mean_ci(x, level=0.9)
    low, high = scipy.stats.t.interval(0.9, 3, loc=3.5, scale=scipy.stats.sem(x))
    assert interval == pytest.approx((3.5, low, high))
    assert interval.half_width == pytest.approx((high - low) / 2)
    assert str(measure.Interval(0.7123, 0.6783, 0.7463)) == "0.712 +- 0.034"
    torch.testing.assert_close(measure.mean_ci(torch.tensor(x)), measure.mean_ci(x))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    samples = torch.randn(2000, 5, generator=rng(14))
    covered = sum(i.low < 0 < i.high for i in map(measure.mean_ci, samples)) / 2000
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_a_paired_difference_is_scipys():
    a, b = [1.0, 2.0, 4.0, 7.0], [0.5, 2.5, 3.0, 5.0]
    difference = measure.paired_difference(a, b)
    assert difference.t == pytest.approx(scipy.stats.ttest_rel(a, b).statistic)
    assert difference.mean == pytest.approx(0.75)
    assert difference.standard_error == pytest.approx(scipy.stats.sem(np.subtract(a, b)))


def test_equal_differences_have_an_infinite_t_of_the_right_sign():
    assert measure.paired_difference([1.0, 2.0], [2.0, 3.0]) == (-1.0, 0.0, -math.inf)
    assert measure.paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("function", [measure.mean_ci, lambda x: measure.paired_difference(x, x)])
def test_one_value_is_not_enough(function):
    with pytest.raises(ValueError, match="at least 2"):
        function([1.0])


def test_a_level_is_a_probability():
    with pytest.raises(ValueError, match="between 0 and 1; got 95"):
        measure.mean_ci([1.0, 2.0], level=95.0)


def test_a_tie_is_half_a_win():
    ours, base = torch.tensor([1.0, 2.0, 2.0, 5.0, 0.0]), torch.tensor([0.0, 2.0, 3.0, 4.0, 0.0])
    assert measure.win_rate(ours, base) == pytest.approx((2 + 0.5 * 2) / 5)


# Over-optimisation ----------------------------------------------------------------------------------------------------


def test_best_of_n_weights_by_hand():
    """Sheet ppo_rlhf, check 4: with gold a unit vector the estimate is the weight of that rank."""
    proxy = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0])  # ranks 3, 1, 5, 2, 4
    ranked = torch.eye(5)[torch.tensor([2, 0, 4, 1, 3])]  # column k: gold of the sample of rank k + 1
    for n, weights in {1: [0.2] * 5, 2: [0, 0.1, 0.2, 0.3, 0.4], 3: [0, 0, 0.1, 0.3, 0.6], 5: [0, 0, 0, 0, 1]}.items():
        got = [float(measure.best_of_n_estimate(proxy, ranked[:, k], n)) for k in range(5)]
        assert got == pytest.approx(weights, abs=1e-12)
    with pytest.raises(ValueError, match="n from 1 to 5"):
        measure.best_of_n_estimate(proxy, proxy, 6)


def test_best_of_n_is_the_mean_over_subsets():
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    subsets = [list(c) for c in itertools.combinations(range(9), 4)]
    mean = torch.stack([gold[c][proxy[c].argmax()] for c in subsets]).mean()
    torch.testing.assert_close(measure.best_of_n_estimate(proxy, gold, 4), mean)


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_the_laws_are_recovered_and_peak_where_they_say(form):
    d = torch.linspace(0, 4, 50, dtype=torch.float64)
    r = d * (2.0 - 0.5 * (d if form == "bon" else d.clamp_min(1e-300).log()))
    law = measure.overoptimisation_law(d, r, form)
    assert law == pytest.approx((2.0, 0.5, 1.0))
    peak = law.alpha / (2 * law.beta) if form == "bon" else math.exp(law.alpha / law.beta - 1)
    near = d * (law.alpha - law.beta * (d if form == "bon" else d.clamp_min(1e-300).log()))
    at = peak * (law.alpha - law.beta * (peak if form == "bon" else math.log(peak)))
    assert at >= float(near.max()) - 1e-9
    noisy = measure.overoptimisation_law(d, r + torch.randn(50, generator=torch.Generator().manual_seed(0)), form)
    assert 0 < noisy.r2 < 0.9
    with pytest.raises(ValueError, match="at least 3"):
        measure.overoptimisation_law(d[:3], r[:3], form)


def test_distinct_counts_by_hand():
    # a b, b a, a b | a b, b c: five pairs, three different; words: a b c of seven
    texts = ["a b a b", "a b c"]
    assert measure.distinct(texts, 2) == 3 / 5 and measure.distinct(texts, 1) == 3 / 7
    assert measure.distinct(texts * 10, 2) == 3 / 50
    assert measure.distinct(["a"], 2) == 0.0


# ---- shapes that would broadcast in silence


@pytest.fixture
def _annotations_off():
    """As outside the tests, where no annotation runs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


A, COLUMN = torch.arange(5.0), torch.arange(5.0).unsqueeze(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: measure.paired_difference(A, COLUMN), r"shapes \(5,\) and \(5, 1\).*squeeze\(-1\)"),
        (lambda: measure.paired_difference(COLUMN, COLUMN), r"shapes \(5, 1\) and \(5, 1\)"),
        (lambda: measure.paired_difference([1.0], A), r"shapes \(1,\) and \(5,\)"),
        (lambda: measure.paired_difference(2.0, A), r"shapes \(\) and \(5,\)"),
        (lambda: measure.win_rate(A, COLUMN), r"expected \(n,\) twice"),
        (lambda: measure.win_rate(A, A[:1]), r"expected \(n,\) twice"),
        (lambda: measure.best_of_n_estimate(A, COLUMN, 2), r"expected \(n,\) twice"),
        (lambda: measure.overoptimisation_law(A, COLUMN), r"expected \(n,\) twice"),
        (lambda: measure.mean_ci(COLUMN), r"shape \(5, 1\); expected \(n,\)"),
        (lambda: measure.frechet_distance(COLUMN, COLUMN.expand(5, 3)), r"\(5, 1\) and \(5, 3\)"),
        (lambda: measure.mmd(A, A), r"\(5,\) and \(5,\)"),
        (lambda: measure.sliced_wasserstein(COLUMN, COLUMN.expand(5, 3)), "the same"),
        (lambda: measure.vendi_score(COLUMN.unsqueeze(2)), r"features.flatten\(1\)"),
        (lambda: measure.diversity(COLUMN, ["x"] * 4, reduction="sum"), "5 samples and 4 prompts"),
    ],
)
@pytest.mark.usefixtures("_annotations_off")
def test_shapes_that_would_broadcast_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_diversity_groups_by_any_hashable_prompt():
    samples = torch.tensor([[0.0], [1.0], [5.0], [8.0]])
    assert float(measure.diversity(samples, [(0, 1), (0, 1), 7, 7], reduction="sum")) == 2
