"""Rewards made of exemplars: the closed forms of sheet dragon, features that are encoded once, errors with a name."""

import math

import pytest
import torch

from minialign import exemplars, measure, rewards
from minialign.measure import RunningMoments, frechet_gaussian, vendi_score


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the sheet's closed forms


def test_frechet_closed_forms():
    """Check 1: 2 in one dimension, 5.553301 in two; symmetric; rotation and shift leave it, a scale squares."""
    line = frechet_gaussian(f64(0), f64([4.0]), f64(1), f64([1.0]))
    assert line.item() == pytest.approx(2, abs=1e-12)
    a, b = (f64(0, 0), f64([2, 0.5], [0.5, 1])), (f64(1, 2), f64([1, -0.3], [-0.3, 0.5]))
    assert frechet_gaussian(*a, *b).item() == pytest.approx(5.553301, abs=5e-7)
    assert frechet_gaussian(*b, *a).item() == pytest.approx(5.553301, abs=5e-7)
    assert frechet_gaussian(*a, *a).item() == pytest.approx(0, abs=1e-12)
    turn, shift = f64([0.8, -0.6], [0.6, 0.8]), f64(3, -1)
    moved = [(turn @ mean + shift, turn @ cov @ turn.T) for mean, cov in (a, b)]
    assert frechet_gaussian(*moved[0], *moved[1]).item() == pytest.approx(5.553301, abs=5e-7)
    scaled = [(3 * mean, 9 * cov) for mean, cov in (a, b)]
    assert frechet_gaussian(*scaled[0], *scaled[1]).item() == pytest.approx(9 * 5.553301, abs=5e-6)


def test_vendi_closed_forms():
    """Check 2: copies 1, orthogonal ones 4, two clusters of duplicates 2, two at cosine 0.5: 1.754765."""
    axes = torch.eye(4, dtype=torch.float64)
    pair = f64([1, 0], [0.5, math.sqrt(0.75)])
    found = [vendi_score(x).item() for x in (axes[[0, 0, 0]], axes, axes[[0, 1, 0, 1]], pair)]
    assert found == pytest.approx([1, 4, 2, 1.754765], abs=5e-7)


def test_moments_after_swaps_are_those_computed_anew():
    """Check 7, to 1e-12, after many swaps, far from the origin."""
    inside, outside = random(40, 3) + 100, random(40, 3, seed=1) + 100
    moments = RunningMoments(inside)
    for i in [*range(40), 3, 7, 3]:
        moments.swap(inside[i], outside[i])
        inside[i], outside[i] = outside[i].clone(), inside[i].clone()
    torch.testing.assert_close(moments.mean, inside.mean(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(moments.covariance, inside.T.cov(), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="at least 2 samples; there is 1"):
        RunningMoments(inside[:1])


# ---- rewards of a set


def test_ready_rewards_of_a_set_prefer_the_near_and_the_diverse():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 2, generator=generator)
    near, far = torch.randn(400, 2, generator=generator), torch.randn(400, 2, generator=generator) + 1
    same = near[:1] + 0.01 * torch.randn(400, 2, generator=generator)
    samples, prompts, group = torch.cat([near, far, same]), ["a point"] * 1200, torch.arange(3).repeat_interleave(400)
    for reward in (exemplars.frechet_to(points), exemplars.mmd_to(points)):
        scores = rewards.checked_set(reward, samples, prompts, group)
        assert scores[0] > scores[1] and scores[0] > scores[2]
    # a shift by one in each of two directions costs 2 in squared units, and nothing else
    assert float(exemplars.frechet_to(points)(points + 1, prompts)) == pytest.approx(-2, abs=1e-5)
    assert float(exemplars.frechet_to(points)(far, [])) == pytest.approx(-float(measure.frechet_distance(far, points)))
    rows = torch.eye(3).repeat(2, 1)
    assert rewards.checked_set(exemplars.vendi(), rows, ["x"] * 6, [0, 0, 0, 1, 1, 1]).tolist() == pytest.approx([3, 3])
    assert rewards.checked_set(exemplars.vendi(), rows[[0, 0, 1, 1]], ["x"] * 4).tolist() == pytest.approx([2])
    doubled = exemplars.frechet_to(points, features=lambda x: 2 * x)
    assert float(doubled(far, prompts)) == pytest.approx(4 * float(exemplars.frechet_to(points)(far, prompts)))


def test_vendi_by_distance_tells_points_in_one_direction_apart():
    # at distance 2 and bandwidth 1 the similarity is e^-2: eigenvalues (1 +- e^-2) / 2
    points, half = f64([1, 1], [1 + math.sqrt(2), 1 + math.sqrt(2)]), math.exp(-2) / 2
    expected = math.exp(-sum(p * math.log(p) for p in (0.5 + half, 0.5 - half)))
    assert exemplars.vendi(bandwidth=1.0)(points, []).item() == pytest.approx(expected)
    assert exemplars.vendi()(points, []).item() == pytest.approx(1)


def test_the_bandwidth_of_mmd_does_not_depend_on_the_set():
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    bandwidth = float(torch.pdist(points.double()).median())
    samples = points[:20] + 9
    expected = -measure.mmd(samples, points, bandwidth)
    torch.testing.assert_close(exemplars.mmd_to(points)(samples, ["x"] * 20), expected)
    assert exemplars.mmd_to(points, 3.0)(samples, []) != expected


def test_exemplars_may_be_of_another_kind():
    """Texts for images: each has an encoder of its own into one space."""
    space, texts = {"left": f64(-1, 0), "right": f64(1, 0)}, ["left", "right"] * 4

    def of_texts(texts):
        return torch.stack([space[word] for word in texts])

    reward = exemplars.frechet_to(texts, lambda images: images[:, 0, 0], of_texts, "words")
    images = of_texts(texts).reshape(8, 1, 1, 2)
    assert float(reward(images, [])) == pytest.approx(0, abs=1e-12) and rewards.name_of(reward) == "words"
    assert float(reward(images + 1, [])) == pytest.approx(-2)


def test_encoding_once_gives_the_same_number():
    points, samples = random(30, 2), random(12, 2, seed=3)
    for reward in (exemplars.frechet_to(points, torch.exp), exemplars.vendi(torch.exp), exemplars.mmd_to(points)):
        features = reward.encode(samples)
        assert float(reward.on_features()(features, [])) == pytest.approx(float(reward(samples, [])))
    moments = RunningMoments(samples.exp())
    reward = exemplars.frechet_to(points, torch.exp)
    assert float(reward.of_moments(moments.mean, moments.covariance)) == pytest.approx(float(reward(samples, [])))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (lambda x: x, "of reward 'vendi' are shape (3, 1, 2, 2) for 3 samples; expected a tensor of shape (3, d)"),
        (lambda x: x.flatten(1)[:2], "are shape (2, 4) for 3 samples"),
        (lambda x: x.tolist(), "are a list for 3 samples"),
    ],
)
def test_features_of_another_shape_are_refused(features, words):
    with pytest.raises(rewards.RewardError) as caught:
        rewards.checked_set(exemplars.vendi(features), torch.ones(3, 1, 2, 2), ["x"] * 3)
    assert words in str(caught.value)


def test_a_set_too_small_for_a_covariance_is_named():
    reward = exemplars.frechet_to(random(9, 2))
    with pytest.raises(rewards.RewardError, match="'frechet_to_exemplars' raised ValueError: a covariance needs"):
        rewards.checked_set(reward, random(1, 2), ["x"])
    with pytest.raises(rewards.RewardError, match="Or a reward of a set, where one of samples is asked for"):
        rewards.checked(reward, random(5, 2), ["x"] * 5)


# ---- rewards of samples


def test_mahalanobis_by_hand_and_where_a_direction_never_varies():
    # exemplars (+-1, 0), (0, +-2): mean 0, variances 2/3 and 8/3; (2, 2) is 4 / (2/3) + 4 / (8/3) = 7.5 away
    points = f64([1, 0], [-1, 0], [0, 2], [0, -2])
    reward = exemplars.mahalanobis_to(points, ridge=0.0)
    torch.testing.assert_close(reward(f64([2, 2], [0, 0]), []), f64(-7.5, 0))
    flat = torch.cat([points, torch.zeros(4, 1, dtype=torch.float64)], 1)
    assert exemplars.mahalanobis_to(flat)(f64([0, 0, 1.0]), []).item() == pytest.approx(-1e6, rel=1e-3)


def test_frechet_of_each_sample_is_that_of_its_own_parts():
    def parts(x):
        return x.unflatten(1, (4, 2))

    points, samples = random(5, 8), random(3, 8, seed=1)
    found = exemplars.frechet_of_each(points, parts)(samples, ["x"] * 3)
    pooled = points.reshape(20, 2)
    expected = [-measure.frechet_distance(parts(samples)[i], pooled) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert rewards.checked(exemplars.frechet_of_each(points, parts), samples, ["x"] * 3).dtype == torch.float32
