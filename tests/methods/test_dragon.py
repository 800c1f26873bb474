"""DRAGON: how the two sets are chosen, the loss at the reference, ties, costs, refusals, and a real pipeline."""

import dataclasses
import itertools
import math
import runpy
import time
from pathlib import Path

import pytest
import torch

from minialign import exemplars, worlds
from minialign.loop import fit
from minialign.methods import dragon
from minialign.policies.diffusion import DiffusionPolicy

MODELS = Path(__file__).parent.parent / "policies" / "conftest.py"
SMALL = dragon.Config(num_iterations=2, num_prompts=8, num_updates=3, minibatch_size=5)
SETS = dataclasses.replace(SMALL, selection="distribution")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def neighbours(n):
    return dragon.partners(n, True, torch.Generator())


def two_modes(samples, prompts):
    """Of a set: half on each side, whatever the samples."""
    return -((samples[:, 0] > 0).double().mean() - 0.5).abs()


def distance(samples, prompts):
    return -(samples - 1).square().sum(1)


# ---- the sets


def test_by_instance_the_better_of_each_pair_is_chosen_and_ties_are_undecided():
    # pairs (0, 1), (2, 3), (4, 5)
    found = dragon.split_by_instance(torch.tensor([1.0, 2, 5, 5, 4, 3]), neighbours(3), True)
    assert found.chosen.tolist() == [1, 2, 4] and found.rejected.tolist() == [0, 3, 5]
    assert found.decided.tolist() == [True, False, True]


def test_unpaired_the_better_half_of_all_is_chosen():
    scores = torch.tensor([9.0, 8, 1, 2, 7, 0, 3, 6])
    found = dragon.split_by_instance(scores, dragon.partners(4, False, torch.Generator().manual_seed(0)), False)
    assert sorted(found.chosen.tolist()) == [0, 1, 4, 7] and sorted(found.rejected.tolist()) == [2, 3, 5, 6]
    assert found.decided.all()
    tied = torch.tensor([1.0, 0, 0, 0, 0, 0])  # one is better; five cannot be told apart
    found = dragon.split_by_instance(tied, dragon.partners(3, False, torch.Generator().manual_seed(0)), False)
    assert 0 in found.chosen and found.decided.sum() == 1 and found.decided[found.chosen == 0].all()
    matched = [
        dragon.split_by_instance(scores, dragon.partners(4, False, torch.Generator().manual_seed(s)), False).rejected
        for s in range(20)
    ]
    assert len({tuple(m.tolist()) for m in matched}) > 5  # with whom is chance


def test_swaps_never_lower_the_reward_and_the_best_is_what_exhaustion_finds():
    """Sheet, check 3, with the value after each step seen; six pairs have 64 sets."""
    points, pairs = random(12, 2, seed=3), neighbours(6)
    reward = exemplars.frechet_to(random(30, 2) * torch.tensor([2.0, 0.3]))

    kept = []

    class Watched(dragon.Sets):
        def value(self):
            kept.append(super().value())
            return kept[-1]

    sets = Watched(reward, points, ["x"] * 12, pairs)
    before = dragon.Sets(reward, points, ["x"] * 12, pairs).value()
    found = dragon.split_by_swaps(sets, torch.arange(6), num_passes=10)
    after = float(reward(points[found.chosen], []))
    assert after == pytest.approx(max(kept)) and after > before
    assert sorted(torch.cat([found.chosen, found.rejected]).tolist()) == list(range(12))
    every = [float(reward(points[pairs[list(choice), range(6)]], [])) for choice in itertools.product((0, 1), repeat=6)]
    assert after <= max(every) + 1e-9 and sum(value > after + 1e-9 for value in every) < 7  # a local optimum: near it
    for pair in range(6):  # and one it is: no further swap improves
        other = found.chosen.clone()
        other[pair] = found.rejected[pair]
        assert float(reward(points[other], [])) <= after + 1e-9


def test_one_pair_gives_the_better_sample_and_a_sum_the_better_of_each_pair():
    """Sheet, check 3: whatever the order, in one pass."""
    points, prompts = random(14, 2), ["x"] * 14

    def total(samples, prompts):
        return distance(samples, prompts).sum()

    scores = distance(points, prompts)
    for seed in range(3):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        found = dragon.split_by_swaps(dragon.Sets(total, points, prompts, neighbours(7)), order)
        expected = dragon.split_by_instance(scores, neighbours(7), True)
        assert torch.equal(found.chosen, expected.chosen) and torch.equal(found.rejected, expected.rejected)
    single = dragon.split_by_swaps(dragon.Sets(total, points, prompts, neighbours(1)), torch.arange(1))
    assert single.chosen.item() == int(scores[1] > scores[0])


def test_moments_and_plain_calls_choose_alike_and_moments_are_fast():
    points, prompts = random(1024, 2), ["x"] * 1024
    reward = exemplars.frechet_to(random(200, 2) + 1)
    plain = lambda samples, prompts: reward(samples, prompts)  # noqa: E731 (no FeatureReward: asked as it is)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        dragon.split_by_swaps(dragon.Sets(r, points[:128], prompts[:128], neighbours(64)), order)
        for r in (reward, plain)
    )
    assert torch.equal(ours.chosen, theirs.chosen)
    started = time.process_time()
    dragon.split_by_swaps(dragon.Sets(reward, points, prompts, neighbours(512)), torch.arange(512))
    assert time.process_time() - started < 1  # 512 evaluations


def test_a_swap_that_changes_nothing_is_taken_back_and_teaches_nothing():
    # three of four are right; both of pair 0 are left, both of pairs 1 and 3 right: only pair 2 can bring back balance
    x = torch.tensor([-1.0, -2, 1, 2, 1, -1, 3, 4])
    points = torch.stack([x, torch.zeros(8)], 1)
    found = dragon.split_by_swaps(dragon.Sets(two_modes, points, ["x"] * 8, neighbours(4)), torch.arange(4))
    assert found.decided.tolist() == [False, False, True, False] and found.chosen.tolist() == [0, 2, 5, 6]


# ---- the loss


@pytest.mark.parametrize(("objective", "loss", "slope"), [("dpo", math.log(2), 4), ("kto", 0.5, 16)])
def test_the_first_loss_and_its_gradient_are_the_sheets(objective, loss, slope):
    """At theta = reference: beta/4 grad (s+ - s-), and for KTO, a mean over both sets, beta/8 on each half."""
    world = worlds.load("compass", num_steps=5)
    world.policy.network.double()
    world.policy.to("cpu")
    policy, config = world.policy, dataclasses.replace(SMALL, objective=objective, beta=3.0)
    latents, condition = random(8, 2), policy.encode(["inner", "outer"] * 4)
    levels, noise = torch.tensor([10, 300, 600, 990]), random(4, 2, seed=1)
    found, info = dragon.contrast(dragon.log_ratios(policy, latents, condition, levels, noise, "sum"), config)
    assert found.item() == pytest.approx(loss, abs=1e-12) and info["log_ratio"] == 0
    ours = torch.autograd.grad(found, policy.parameters())
    error = policy.training_error(latents, levels.repeat(2), noise.repeat(2, 1), condition, reduction="sum")
    target = 3.0 / slope * (error[:4] - error[4:]).mean()
    expected = torch.autograd.grad(target, policy.parameters())
    assert any(g.abs().max() > 1e-3 for g in ours)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_log_ratios_share_noise_within_a_pair():
    """So a pair of one sample cancels, at weights that have moved, too."""
    world = worlds.load("compass")
    [p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0)) for p in world.policy.parameters()]
    latents = random(3, 2).float().repeat(2, 1)
    condition, levels = world.policy.encode(["inner"] * 6), torch.tensor([10, 300, 900])
    ratios = dragon.log_ratios(world.policy, latents, condition, levels, random(3, 2, seed=1).float(), "sum")
    assert ratios.abs().max() > 1e-3
    torch.testing.assert_close(ratios[:3], ratios[3:])
    mean = dragon.log_ratios(world.policy, latents, condition, levels, random(3, 2, seed=1).float(), "mean")
    torch.testing.assert_close(mean, ratios / 2)


# ---- the loop


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_crowd_is_moved_as_a_whole(objective):
    """The mean of a set's first coordinate rises from 0 by more than .42, 4 s.e. of a mean of 192 points of sd 1.45."""
    world = worlds.load("ring", num_modes=4, std=0.35, num_steps=10)
    config = dragon.Config(
        num_iterations=5, num_prompts=96, num_updates=20, minibatch_size=128, selection="distribution", beta=10.0,
        objective=objective,
    )  # fmt: skip

    def to_the_right(samples, prompts):
        return samples[:, 0].mean()

    history = fit(dragon.train(world.policy, to_the_right, world.prompts, config), progress=False)
    assert abs(history["reward"][0]) < 0.42 < history["reward"][-1]
    for first, second in itertools.pairwise(("reward_chosen", "reward", "reward_rejected")):
        assert all(a >= b for a, b in zip(history[first], history[second], strict=True))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("config", [SMALL, SETS])
def test_a_reward_that_cannot_tell_moves_nothing(config, paired):
    world = worlds.load("compass", num_steps=3)
    start = [p.clone() for p in world.policy.parameters()]
    same = (lambda s, p: 0.3) if config is SETS else (lambda s, p: torch.full((len(s),), 0.3))
    config = dataclasses.replace(config, paired=paired)
    (first, _) = fit(dragon.train(world.policy, same, world.prompts, config), progress=False)
    assert first["decided"] == 0 and first["grad_norm"] == 0
    assert all(torch.equal(p, q) for p, q in zip(world.policy.parameters(), start, strict=True))


def test_costs_and_fewer_steps_for_the_demonstrations():
    world = worlds.load("compass", num_steps=7)
    config = dataclasses.replace(SETS, rollout_steps=3, num_passes=2)
    reward = exemplars.frechet_to(world.real(50, torch.Generator().manual_seed(0))[0])
    history = fit(dragon.train(world.policy, reward, world.prompts, config), progress=False)
    assert world.policy.num_steps == 7
    assert history["reward_queries"] == [16, 32] and history["set_queries"] == [2 * 8 + 4, 40]
    assert history["network_evaluations"][0] == 16 * 3 + 3 * 10 * (3 + 1)  # demonstrations; updates and reference

    def broken(samples, prompts):
        raise RuntimeError

    with pytest.raises(ValueError, match="raised RuntimeError"):
        next(dragon.train(world.policy, broken, world.prompts, config))
    assert world.policy.num_steps == 7


def test_a_feature_reward_encodes_each_sample_once():
    seen = []

    def features(samples):
        seen.append(len(samples))
        return samples.flatten(1)

    world = worlds.load("compass", num_steps=3)
    for reward in (exemplars.vendi(features), exemplars.frechet_to(torch.randn(20, 2), features)):
        seen.clear()
        next(dragon.train(world.policy, reward, world.prompts, SETS))
        assert sum(seen) == 16


def test_impossible_settings_and_rewards_of_the_other_kind_are_refused():
    world = worlds.load("compass", num_steps=3)
    for change, message in [
        ({"selection": "set"}, "selection is 'set'; expected one of 'instance', 'distribution'"),
        ({"beta": 0}, "beta is 0; expected a finite number above 0"),
        ({"rollout_steps": 0}, "rollout_steps is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="Or a reward of a set, where one of samples is asked for"):
        next(dragon.train(world.policy, two_modes, world.prompts, SMALL))
    with pytest.raises(ValueError, match=r"expected one number for the whole set\. It scores each sample"):
        next(dragon.train(world.policy, distance, world.prompts, SETS))
    with pytest.raises(ValueError, match="returned nan for group 0 of 16 samples"):
        next(dragon.train(world.policy, lambda s, p: float("nan"), world.prompts, SETS))
    with pytest.raises(ValueError, match="this method needs one that denoises"):
        next(dragon.train(worlds.load("tokens").policy, distance, ["a"], SMALL))


# ---- on the ecosystem's classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stable_diffusion_pipeline_learns_and_redraws_from_its_own_loader(tmp_path, dtype):
    stable_diffusion = runpy.run_path(str(MODELS))["stable_diffusion"]
    prompts, noise = ["a dog", "a cat"], torch.Generator().manual_seed(3)
    policy = DiffusionPolicy.from_pipeline(
        stable_diffusion(tmp_path).to(dtype=dtype), num_steps=3, guidance_scale=1.0, eta=0.0
    )
    policy.add_lora(rank=2)
    config = dragon.Config(
        num_iterations=2, num_prompts=3, num_updates=2, minibatch_size=3, selection="distribution", learning_rate=1e-2
    )
    rows = fit(dragon.train(policy, exemplars.vendi(), prompts, config), progress=False)
    assert all(math.isfinite(row["loss"]) for row in rows) and {p.dtype for p in policy.parameters()} == {torch.float32}
    noise = policy.draw_noise(2, noise)
    policy.save_adapter(tmp_path / "adapter")
    again = stable_diffusion(tmp_path).to(dtype=dtype)
    before = DiffusionPolicy.from_pipeline(again, num_steps=3, guidance_scale=1.0, eta=0.0).sample(prompts, noise)
    again.load_lora_weights(tmp_path / "adapter")
    redrawn = DiffusionPolicy.from_pipeline(again, num_steps=3, guidance_scale=1.0, eta=0.0)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    images = policy.sample(prompts, noise)
    torch.testing.assert_close(redrawn.sample(prompts, noise), images, atol=tolerance, rtol=0)
    if dtype == torch.float32:
        assert (images - before).abs().max() > 1e-3
