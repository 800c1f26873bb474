"""The DDPO loop: its statistics, and what must not change the result (passes, resuming, processes)."""

import dataclasses

import pytest
import torch

from minialign import worlds
from minialign.loop import fit
from minialign.methods import ddpo
from minialign.statistics import Statistics

SMALL = ddpo.Config(
    num_iterations=3, num_prompts=8, group_size=2, num_minibatches=2, learning_rate=3e-3, steps_per_pass=5
)


def trained(config, seed=0, reward=None, resume=None, keep=None, dtype=torch.float64):
    """Weights after training in compass with five steps, in float64; `keep` collects the Steps."""
    world = worlds.load("compass", num_steps=5)
    world.policy.network.to(dtype)
    world.policy.to("cpu")
    reward = reward or world.rewards["gold"]
    for step in ddpo.train(world.policy, reward, world.prompts, config, torch.Generator().manual_seed(seed), resume):
        if keep is not None:
            keep.append((step, step.checkpoint()))
    return torch.cat([p.detach().flatten() for p in world.policy.parameters()])


def distance(samples, prompts):
    """A smooth reward, so that every sample has an advantage of its own."""
    return -(samples - 1).square().sum(1)


def test_prompt_statistics_on_a_scripted_sequence():
    # buffer of 4, at least 3: round 1 gives each prompt 2 rewards, so the batch's mean 2.5 and std sqrt(1.25) are used
    statistics = Statistics(last=4)
    first = ddpo.prompt_advantages(statistics, ["a", "a", "b", "b"], torch.tensor([1.0, 2.0, 3.0, 4.0]), min_count=3)
    torch.testing.assert_close(first, torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5)
    # round 2: a holds 1, 2, 3 (mean 2, std sqrt(2/3)), b still 2 values: the batch is the single 3, so nothing to say
    second = ddpo.prompt_advantages(statistics, ["a"], torch.tensor([3.0]), min_count=3)
    torch.testing.assert_close(second, torch.tensor([1.0]) / (2 / 3) ** 0.5, atol=1e-5, rtol=0)
    # round 3: a would hold 1, 2, 3, 7, 7; the oldest leaves: 2, 3, 7, 7 has mean 4.75, variance 5.1875
    third = ddpo.prompt_advantages(statistics, ["a", "a"], torch.tensor([7.0, 7.0]), min_count=3)
    torch.testing.assert_close(third, torch.full((2,), 2.25 / 5.1875**0.5), atol=1e-5, rtol=0)


def test_prompt_statistics_ignore_scale_and_shift_and_constants():
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(1))
    prompts = ["a", "b"] * 20
    plain = ddpo.prompt_advantages(Statistics(last=64), prompts, rewards, 16)
    moved = ddpo.prompt_advantages(Statistics(last=64), prompts, 7 * rewards + 3, 16)
    torch.testing.assert_close(plain, moved, atol=1e-4, rtol=0)
    constant = ddpo.prompt_advantages(Statistics(last=64), ["a"] * 7, torch.full((7,), 0.3), 1)
    assert (constant == 0).all()  # not 1e-8 / 1e-6
    kept = ddpo.prompt_advantages(Statistics(last=64), prompts, rewards, 16, scale=False)
    assert abs(float(kept[::2].mean())) < 1e-6 and float(kept.std()) == pytest.approx(float(rewards.std()), rel=0.1)


def test_warm_up_shortens_the_first_updates_only():
    once = dataclasses.replace(SMALL, num_iterations=1, num_minibatches=1, weight_decay=0.0)
    start = trained(dataclasses.replace(once, learning_rate=0.0))
    full = trained(once, reward=distance) - start
    tenth = trained(dataclasses.replace(once, warmup_updates=10), reward=distance) - start
    torch.testing.assert_close(
        tenth, full / 10, atol=1e-12, rtol=1e-6
    )  # AdamW's first step is proportional to its rate


def test_a_share_of_the_steps_costs_its_share_and_is_drawn_afresh(generator):
    steps = ddpo.chosen_steps(64, 5, 0.6, generator)
    assert steps.shape == (64, 3)
    assert all(len(set(row)) == 3 for row in steps.tolist())
    assert steps.flatten().bincount(minlength=5).min() > 19  # 38.4 expected, sd 3.9: 5 below
    world = worlds.load("compass", num_steps=5)
    config = dataclasses.replace(SMALL, timestep_fraction=0.6, steps_per_pass=2)
    history = fit(ddpo.train(world.policy, distance, world.prompts, config), progress=False)
    assert history["network_evaluations"][0] == 16 * 5 + 3 * 16 * 3


def test_a_checkpoint_of_another_policy_is_refused():
    steps = []
    trained(dataclasses.replace(SMALL, num_iterations=1), keep=steps)
    world = worlds.load("line", num_steps=5)
    with pytest.raises(ValueError, match="checkpoint does not fit"):
        next(ddpo.train(world.policy, distance, world.prompts, SMALL, resume=steps[0][1]))


def test_costs_are_counted_as_the_paper_table_says():
    world = worlds.load("compass", num_steps=5)
    history = fit(ddpo.train(world.policy, distance, world.prompts, SMALL), progress=False)
    assert history["reward_queries"] == [16, 32, 48]
    assert history["network_evaluations"] == [16 * 5 * (1 + 3) * n for n in (1, 2, 3)]  # sampling + 3 x training


def test_the_kl_penalty_holds_the_policy_back():
    free, held = [], []
    config = dataclasses.replace(SMALL, num_iterations=10, learning_rate=1e-2)
    trained(dataclasses.replace(config, beta=1e-9), reward=distance, keep=free)
    trained(dataclasses.replace(config, beta=20.0), reward=distance, keep=held)
    assert float(held[-1][0].metrics["kl"]) < 0.2 * float(free[-1][0].metrics["kl"])


def test_exact_kl_weights_the_noise_error_by_the_step():
    # KL_t = k_t^2 |eps - eps_ref|^2 / (2 sigma_t^2), sheet ddpo; the authors' code drops the factor
    world = worlds.load("compass", num_steps=5)
    policy = world.policy
    [p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0)) for p in policy.parameters()]
    with torch.no_grad():
        traj = policy.rollout(["inner"] * 6)
        for i in range(5):
            x, step = traj.states[:, i], torch.full((6,), i)
            output = policy.model_output(x, step, traj.condition)
            out = policy.step_from(output, x, step, next=traj.states[:, i + 1], reduction="sum")
            args = (policy, output, x, step, traj.condition, out)
            exact = ddpo.step_kl(*args, dataclasses.replace(SMALL, reduction="sum"))
            mse = ddpo.step_kl(*args, dataclasses.replace(SMALL, kl="noise_mse"))
            a, a_next, std = policy._alpha_bar[i], policy._alpha_bar_next[i], policy.std[i]
            gain = (1 - a_next - std**2).sqrt() - (a_next * (1 - a) / a).sqrt()
            torch.testing.assert_close(exact, 2 * mse * gain**2 / (2 * std**2), rtol=1e-3, atol=1e-6)


def test_impossible_settings_are_refused():
    world = worlds.load("compass", num_steps=5)
    for change, message in [
        ({"baseline": "prmpt"}, "baseline is 'prmpt'; expected one of 'prompt'"),
        ({"num_minibatches": 17}, "more than the 16 samples"),
        ({"timestep_fraction": 0.0}, "timestep_fraction is 0.0; expected a finite number above 0 and at most 1"),
        ({"group_size": 0}, "group_size is 0; expected a whole number of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(ddpo.train(world.policy, distance, world.prompts, dataclasses.replace(SMALL, **change)))
    with pytest.raises(ValueError, match="prompts is empty"):
        next(ddpo.train(world.policy, distance, [], SMALL))
    with pytest.raises(ValueError, match="eta = 0"):
        next(ddpo.train(worlds.load("compass", eta=0.0).policy, distance, world.prompts, SMALL))


@pytest.mark.parametrize("baseline", ["prompt", "group", "batch"])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_have_no_advantage_at_all(baseline, scale):
    """Exactly none: .3 less its mean in float32 is 3e-8, which Adam would make steps of full length of."""
    config = dataclasses.replace(SMALL, baseline=baseline, scale_advantages=scale)
    advantages = ddpo.round_advantages(torch.full((14,), 0.3), ["a", "b"] * 7, Statistics(last=64), config)
    assert torch.equal(advantages, torch.zeros(14))
