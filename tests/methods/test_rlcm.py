"""The RLCM loop: what must not change the result, REBEL by hand, refusals."""

import dataclasses

import pytest
import torch

from minialign import worlds
from minialign.loop import fit
from minialign.methods import rlcm
from minialign.policies.consistency import ConsistencyPolicy

SMALL = rlcm.Config(
    num_iterations=3, num_prompts=8, group_size=2, num_minibatches=2, learning_rate=3e-3, clip_range=0.1
)
VARIANTS = {"ppo": {}, "rebel": {"objective": "rebel"}, "terminal": {"terminal_std": 0.1}}


def student(num_steps=4, dtype=torch.float64):
    world = worlds.load("compass")
    world.policy.network.to(dtype)
    world.policy.to("cpu")
    policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=num_steps)
    policy.train_all_weights()
    return world, policy


def distance(samples, prompts):
    """A smooth reward, so that every sample has an advantage of its own."""
    return -(samples - 1).square().sum(1)


def trained(config, seed=0, reward=distance, resume=None, keep=None):
    """Weights after training an undistilled student in compass, in float64; `keep` collects the Steps."""
    world, policy = student()
    for step in rlcm.train(policy, reward, world.prompts, config, torch.Generator().manual_seed(seed), resume):
        if keep is not None:
            keep.append((step, step.checkpoint()))
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_rebel_by_hand():
    log_ratio = torch.tensor([[0.3, 0.0], [0.1, -0.5]])
    advantages = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    # (2 * .2 - .5)^2 = .01 and (2 * .5 + 2)^2 = 9
    assert rlcm.rebel_loss(log_ratio, advantages, eta=2.0).item() == pytest.approx(4.505)
    explained = torch.stack([advantages[0] / 3, advantages[1] / 3])  # the log-ratio explains the advantages: no loss
    assert rlcm.rebel_loss(explained, advantages, eta=3.0).item() == pytest.approx(0, abs=1e-12)


def test_rebel_sums_within_a_sample_and_pairs_samples_of_one_prompt():
    """Sheet, trap 6: the authors' code sums over the minibatch, so its loss changes with the minibatch's size."""
    _, policy = student()
    with torch.no_grad():
        traj = policy.rollout(["inner"] * 4 + ["outer"] * 4, generator=torch.Generator().manual_seed(0))
    for p in policy.parameters():
        p.data.add_(0.02)
    config, advantages = dataclasses.replace(SMALL, objective="rebel"), torch.randn(8, dtype=torch.float64)
    single = [
        rlcm.round_loss(policy, traj, torch.tensor([i, i + 1]), advantages, 0.1, config)[0] for i in range(0, 8, 2)
    ]
    rows = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    together = rlcm.round_loss(policy, traj, rows, advantages, 0.1, config)[0]
    torch.testing.assert_close(together, torch.stack(single).mean())


def test_costs_are_counted():
    """H calls a sample; 3 for each of the H - 1 transitions that are trained (H with terminal noise)."""
    for std, trained_actions, per_sample in ((0.0, None, 4 + 3 * 3), (0.1, None, 4 + 3 * 4), (0.0, 1, 4 + 3 * 1)):
        world, policy = student()
        config = dataclasses.replace(SMALL, terminal_std=std, trained_actions=trained_actions)
        history = fit(rlcm.train(policy, distance, world.prompts, config), progress=False)
        assert history["network_evaluations"] == [16 * per_sample * n for n in (1, 2, 3)]
        assert history["reward_queries"] == [16, 32, 48]
        assert policy.terminal_std == 0


def test_only_the_trained_actions_have_a_gradient():
    """With weights that differ from the sampling ones, the loss over the first action is that of a run cut after it."""
    _, policy = student()
    with torch.no_grad():
        traj = policy.rollout(["inner"] * 4, generator=torch.Generator().manual_seed(0))
    for p in policy.parameters():
        p.data.add_(0.02)
    rows, advantages = torch.arange(4), torch.randn(4, dtype=torch.float64)
    first = rlcm.round_loss(policy, traj, rows, advantages, 0.1, dataclasses.replace(SMALL, trained_actions=1))[0]
    cut = dataclasses.replace(traj, log_probs=traj.log_probs[:, :1])
    torch.testing.assert_close(first, rlcm.round_loss(policy, cut, rows, advantages, 0.1, SMALL)[0])
    every = rlcm.round_loss(policy, traj, rows, advantages, 0.1, dataclasses.replace(SMALL, trained_actions=3))[0]
    torch.testing.assert_close(every, rlcm.round_loss(policy, traj, rows, advantages, 0.1, SMALL)[0])
    assert not torch.allclose(first, every)


def test_actions_that_do_not_exist_are_refused():
    world, policy = student()
    config = dataclasses.replace(SMALL, trained_actions=4)
    with pytest.raises(ValueError, match="4 calls have 1 to 3"):
        next(rlcm.train(policy, distance, world.prompts, config))


def test_the_learning_rate_falls_to_two_thirds():
    """Adam's steps are proportional to its rate: compare the moves of the last round."""
    moves = []
    for fraction in (1.0, 0.5):
        config = dataclasses.replace(SMALL, num_iterations=2, num_minibatches=1, final_lr_fraction=fraction)
        steps = []
        trained(config, keep=steps)
        moves.append(
            [torch.cat([v.flatten() for k, v in kept.items() if k.startswith("parameter")]) for _, kept in steps]
        )
    assert torch.equal(moves[0][0], moves[1][0])  # the first round has the full rate
    full, reduced = (second - first for first, second in moves)
    torch.testing.assert_close(reduced, 0.75 * full, atol=1e-12, rtol=1e-6)  # 1 - .5 / 2, half-way


def test_a_round_that_fails_leaves_the_policy_as_it_was():
    world, policy = student()

    def broken(samples, prompts):
        raise RuntimeError

    with pytest.raises(ValueError, match="raised RuntimeError"):
        next(rlcm.train(policy, broken, world.prompts, dataclasses.replace(SMALL, terminal_std=0.1)))
    assert policy.terminal_std == 0


def test_impossible_settings_are_refused():
    world, policy = student()
    for change, message in [
        ({"objective": "dpo"}, "objective is 'dpo'; expected one of 'ppo', 'rebel'"),
        ({"terminal_std": -0.1}, "terminal_std is -0.1"),
        ({"objective": "rebel", "group_size": 3}, "two by two: give an even number"),
        ({"objective": "rebel", "num_minibatches": 9}, "more than the 8 samples or pairs"),
        ({"num_prompts": 0}, "num_prompts is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(rlcm.train(policy, distance, world.prompts, dataclasses.replace(SMALL, **change)))
        assert policy.terminal_std == 0  # a refusal leaves the policy as it was
    one = student(num_steps=1)[1]
    with pytest.raises(ValueError, match="num_steps = 1 has no stochastic step: one deterministic call"):
        next(rlcm.train(one, distance, world.prompts, SMALL))
    next(rlcm.train(one, distance, world.prompts, dataclasses.replace(SMALL, terminal_std=0.1)))  # now it has one
