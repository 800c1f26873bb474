"""Tokens and denoising steps as episodes: scored again they are what they were, in the units that methods rely on."""

import pytest
import torch

from minialign import worlds
from minialign.policies.episodes import denoise, respond


def tokens():
    world = worlds.load("tokens")
    policy, prompts = world.policy, ["p0", "p3", "p1"]
    policy.train_all_weights()
    return policy, prompts, respond(policy, prompts, policy.draw_noise(3, 4, torch.Generator().manual_seed(0)), 4)


def steps(**settings):
    world = worlds.load("compass", num_steps=5)
    policy, prompts = world.policy, [*world.prompts, *world.prompts][:3]
    noise = policy.draw_noise(3, torch.Generator().manual_seed(0))
    return policy, prompts, denoise(policy, prompts, noise, **dict(rows_per_pass=2, steps_per_pass=2) | settings)


@pytest.mark.parametrize("play", [tokens, steps])
def test_under_unchanged_weights_the_score_is_the_stored_log_probability_and_the_references(play):
    _, _, episodes = play()
    rows = torch.tensor([2, 0])
    log_prob = torch.cat([episodes.score(rows, places)[0] for places in episodes.places], 1)
    torch.testing.assert_close(log_prob, episodes.log_probs[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(episodes.log_prob_ref, episodes.log_probs, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat(list(episodes.places)), torch.arange(episodes.mask.shape[1])) and episodes.mask.all()


def test_a_denoising_step_is_summed_over_its_elements():
    policy, prompts, episodes = steps()
    noise = policy.draw_noise(3, torch.Generator().manual_seed(0))
    means = policy.rollout(prompts, noise, reduction="mean").log_probs
    torch.testing.assert_close(episodes.log_probs, episodes.num_elements * means)
    assert episodes.num_elements == 2 and tokens()[2].num_elements == 1


def test_passes_change_nothing_and_the_reference_stays_when_the_policy_moves():
    policy, prompts, before = steps()
    _, _, whole = steps(rows_per_pass=3, steps_per_pass=5)
    torch.testing.assert_close(whole.log_prob_ref, before.log_prob_ref)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05
        moved = denoise(policy, prompts, policy.draw_noise(3, torch.Generator().manual_seed(0)), 3, 5)
    assert (moved.log_probs - moved.log_prob_ref).abs().mean() > 1e-3
