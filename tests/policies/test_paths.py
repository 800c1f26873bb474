"""Stored paths scored again: what they were, under the weights that drew them; the KL of paths is their mean ratio."""

import math

import pytest
import torch

from minialign import measure, worlds
from minialign.policies.paths import path_log_probs, reference_log_probs


def moved_policy(scale=0.05):
    world = worlds.load("crowd", num_steps=6)
    world.policy.network.double()
    world.policy.to("cpu")
    generator = torch.Generator().manual_seed(0)
    for p in world.policy.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return world, world.policy


def rolled(policy, prompts, **settings):
    with torch.no_grad():
        return policy.rollout(prompts, generator=torch.Generator().manual_seed(1), **settings)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scored_again_they_are_what_they_were(reduction):
    world, policy = moved_policy()
    traj = rolled(policy, world.prompts[:7], reduction=reduction)
    rows, places = torch.tensor([5, 0, 3]), torch.tensor([4, 1])
    again = path_log_probs(policy, traj, rows, places, reduction=reduction)
    torch.testing.assert_close(again, traj.log_probs[rows][:, places], atol=1e-10, rtol=0)
    assert again.requires_grad
    reference = path_log_probs(policy, traj, rows, places, reduction=reduction, reference=True)
    assert not reference.requires_grad and (reference - again).abs().min() > 1e-5
    for cut in (dict(rows_per_pass=3, steps_per_pass=4), dict(rows_per_pass=99, steps_per_pass=6)):
        whole = reference_log_probs(policy, traj, reduction=reduction, **cut)
        assert whole.shape == (7, 6)
        torch.testing.assert_close(whole[rows][:, places], reference, atol=1e-10, rtol=0)


def test_a_path_that_started_late_counts_its_own_steps():
    world, policy = moved_policy()
    whole = rolled(policy, world.prompts[:4], reduction="sum")
    late = rolled(policy, world.prompts[:4], reduction="sum", states=whole.states[:, 2], first=2)
    assert late.log_probs.shape == (4, 4)
    again = path_log_probs(policy, late, torch.arange(4), torch.arange(4), reduction="sum")
    torch.testing.assert_close(again, late.log_probs, atol=1e-10, rtol=0)


def test_the_mean_log_ratio_of_paths_is_their_kl():
    """Within 4 standard errors of the exact KL of every transition; and the other way round it would be far off."""
    world, policy = moved_policy(0.15)
    traj = rolled(policy, world.prompts[:1] * 4000, reduction="sum")
    log_ratio = (traj.log_probs - reference_log_probs(policy, traj, reduction="sum", rows_per_pass=4000,
                                                      steps_per_pass=3)).sum(1)  # fmt: skip
    exact = measure.path_kl(policy, traj)
    excess = log_ratio - exact
    error = excess.std() / math.sqrt(len(excess))
    assert excess.mean().abs() < 4 * error and exact.mean() > 20 * error
