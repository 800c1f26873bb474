"""Reward-weighted regression: its weights, and that it climbs."""

import dataclasses

import pytest
import torch

from minialign import worlds
from minialign.loop import fit
from minialign.methods import rwr


def test_softmax_weights_by_hand():
    # group 0: rewards 0, log 3 -> 1/4, 3/4 at beta 1; group 1 alone -> 1
    rewards, group = torch.tensor([0.0, 5.0, 3.0]), torch.tensor([0, 1, 0])
    rewards[2] = torch.tensor(3.0).log()
    torch.testing.assert_close(rwr.softmax_weights(rewards, group, 1.0), torch.tensor([0.25, 1.0, 0.75]))
    torch.testing.assert_close(rwr.softmax_weights(rewards, group, 0.0), torch.tensor([0.5, 1.0, 0.5]))
    torch.testing.assert_close(rwr.softmax_weights(rewards, group, 1e4), torch.tensor([0.0, 1.0, 1.0]))


def test_top_weights_keep_exactly_their_share_with_ties_by_chance():
    rewards, group = torch.tensor([1.0, 1, 1, 1, 0, 2, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    kept = torch.stack([rwr.top_weights(rewards, group, 0.5, torch.rand(8)) for _ in range(200)])
    assert torch.equal((kept > 0)[:, :4].sum(1), torch.full((200,), 2))  # half of the ties, no more
    assert (kept[:, 4:] == torch.tensor([0, 0.5, 0.5, 0])).all()
    assert (kept[:, :4] > 0).float().mean(0).sub(0.5).abs().max() < 0.15  # each of the four as often: 4 s.e. = .14


@pytest.mark.parametrize("weighting", ["softmax", "top"])
def test_it_climbs_and_counts(weighting):
    world = worlds.load("compass", num_steps=10)
    config = rwr.Config(num_iterations=4, batch_size=512, num_updates=100, learning_rate=3e-3, weighting=weighting)
    history = fit(rwr.train(world.policy, world.rewards["gold"], world.prompts, config), progress=False)
    assert history["reward"][-1] > history["reward"][0] + 0.125  # 4 s.e. of a difference of two means of 512
    assert history["reward_queries"] == [512, 1024, 1536, 2048]
    assert history["network_evaluations"][0] == 512 * 10 + 3 * 100 * 256


def test_unknown_weighting():
    world = worlds.load("compass")
    with pytest.raises(ValueError, match="weighting is 'soft'"):
        next(rwr.train(world.policy, world.oracle, world.prompts, dataclasses.replace(rwr.Config(), weighting="soft")))
