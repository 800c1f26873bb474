"""The B2-DiffuRL loop and its kernels: scripted values, DDPO as a limit, and what must not change the result."""

import dataclasses

import pytest
import torch

from minialign import worlds
from minialign.kernels import clipped_surrogate
from minialign.loop import fit
from minialign.methods import b2diffurl, ddpo
from minialign.statistics import Statistics

SMALL = b2diffurl.Config(
    num_iterations=3, num_prompts=6, num_branches=3, first_window=2, last_window=4, num_minibatches=2, num_epochs=2,
    learning_rate=3e-3, steps_per_pass=3, clip_range=0.1, history_stages=1,
)  # fmt: skip
VARIANTS = {
    "official": {},
    "branch": {"advantage": "branch"},
    "all": {"advantage": "branch", "select": "all"},
    "pairwise": {"objective": "pairwise"},
    "independent": {"branch_sampling": False},
}


def distance(samples, prompts):
    """A smooth reward, so that every sample has an advantage of its own."""
    return -(samples - 1).square().sum(1)


def trained(config, seed=0, reward=distance, resume=None, keep=None, residual="mlp"):
    """Weights after training in compass with five steps, in float64; `keep` collects the Steps."""
    world = worlds.load("compass", num_steps=5, residual=residual)
    world.policy.network.double()
    world.policy.to("cpu")
    for step in b2diffurl.train(
        world.policy, reward, world.prompts, config, torch.Generator().manual_seed(seed), resume
    ):
        if keep is not None:
            keep.append((step, step.checkpoint()))
    return torch.cat([p.detach().flatten() for p in world.policy.parameters()])


# ---------------------------------------------------------------------------------------------- kernels, by script


def test_the_window_grows_as_the_authors_script_says():
    windows = [b2diffurl.progressive_window(k, 100, 14, 20) for k in range(100)]
    assert [windows.index(w) for w in range(14, 21)] == [0, 15, 29, 43, 58, 72, 86]
    assert windows == sorted(windows) and windows[-1] == 20
    # by hand: 36 stages, 4 to 10: 4 + floor(7 k / 36) leaves 4 at k = 6 (42 / 36)
    assert [b2diffurl.progressive_window(k, 36, 4, 10) for k in (0, 5, 6, 35)] == [4, 4, 5, 10]
    assert {b2diffurl.progressive_window(k, 7, 3, 3) for k in range(7)} == {3}


def test_extremes_by_script():
    z = torch.tensor([
        [0.6, 2.0, -0.1],  # best only
        [-0.5, 0.5, 0.0],  # best: >= includes the threshold; worst: < excludes it
        [-0.6, 0.4, -2.0],  # worst only
        [0.1, -0.2, 0.3],  # nothing
        [1.0, 1.0, -1.0],  # a tie: the first
        [-1.0, 0.9, -1.0],
    ])  # fmt: skip
    kept = torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    assert torch.equal(b2diffurl.select_extremes(z, 0.5, -0.5), kept)
    pairs = b2diffurl.best_and_worst(z, kept)
    assert pairs.tolist() == [[12, 14], [16, 15]]  # rows 3 g + branch of the two groups that kept both
    one = b2diffurl.select_extremes(z.flatten().unsqueeze(1), 0.0, 0.0)
    assert one.all()  # b = 1: z >= 0 or z < 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_branch_baseline_is_the_mean_of_the_others(dtype, generator):
    z = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype)
    others = torch.stack([z.float()[:, [k for k in range(5) if k != i]].mean(1) for i in range(5)], 1)
    out = b2diffurl.branch_advantage(z)
    torch.testing.assert_close(out, (z.float() - others).to(out.dtype))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert b2diffurl.branch_advantage(z[:, :1]).isnan().all()
    many = torch.randn(3, 20_000, generator=generator) + torch.tensor([[1.0], [-2.0], [5.0]])  # b -> infinity
    exact = many - torch.tensor([[1.0], [-2.0], [5.0]])  # the conditional mean as baseline
    torch.testing.assert_close(b2diffurl.branch_advantage(many), exact, atol=4 / 20_000**0.5, rtol=0)


def test_history_z_score_by_script():
    history = Statistics(rounds=2)
    # a: 1, 3 have mean 2 and unbiased std sqrt(2); b was seen once: no std, so 0
    first = b2diffurl.history_zscore(history, ["a", "a", "b"], torch.tensor([1.0, 3.0, 9.0]))
    torch.testing.assert_close(first, torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0]))
    # a: 1, 3, 5 mean 3 std 2; b: 9, 13 mean 11 std sqrt(8)
    second = b2diffurl.history_zscore(history, ["b", "a"], torch.tensor([13.0, 5.0]))
    torch.testing.assert_close(second, torch.tensor([2 / 8**0.5, 1.0]))
    # stage 1 has aged out, also for c, which is new: a: 5, 6 and b: nothing new
    third = b2diffurl.history_zscore(history, ["a", "c", "c"], torch.tensor([6.0, 0.3, 0.3]))
    torch.testing.assert_close(third, torch.tensor([0.5**0.5, 0.0, 0.0]))
    assert (third[1:] == 0).all()  # equal rewards: exact zeros


def test_shift_and_scale_of_a_prompts_rewards_change_nothing(generator):
    """Check 7, within one stage: neither the kept set nor the advantages."""
    rewards, prompts = torch.randn(40, generator=generator, dtype=torch.float64), ["a", "b"] * 20
    plain = b2diffurl.history_zscore(Statistics(rounds=9), prompts, rewards)
    moved = torch.where(torch.arange(40) % 2 == 0, 7 * rewards - 30, 0.1 * rewards + 4)
    again = b2diffurl.history_zscore(Statistics(rounds=9), prompts, moved)
    torch.testing.assert_close(plain, again, atol=1e-6, rtol=0)
    kept = b2diffurl.select_extremes(plain.view(8, 5), 0.5, -0.5)
    assert torch.equal(kept, b2diffurl.select_extremes(again.view(8, 5), 0.5, -0.5)) and 0 < kept.sum() < 16


def test_the_pairwise_loss_starts_as_a_policy_gradient(generator):
    log_prob = torch.randn(2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    ratio = log_prob - log_prob.detach()
    loss = b2diffurl.pairwise_loss(ratio[0], ratio[1], beta=3.0)
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item())
    (gradient,) = torch.autograd.grad(loss, log_prob)
    advantages = torch.tensor([[1.5], [-1.5]], dtype=torch.float64).expand(2, 9).flatten()
    surrogate = (
        clipped_surrogate(log_prob.flatten(), log_prob.detach().flatten(), advantages, 0.1)[0].mean() * 2
    )  # mean of 18
    torch.testing.assert_close(gradient, torch.autograd.grad(surrogate, log_prob)[0])
    assert b2diffurl.pairwise_loss(ratio[0] + 20, ratio[1] - 20, beta=1.0) < 1e-12  # a pair won
    assert b2diffurl.pairwise_loss(ratio[0] - 20, ratio[1], beta=0.5).item() == pytest.approx(10, abs=1e-4)


# ---------------------------------------------------------------------------------------------- branches


@torch.no_grad()
def test_a_branch_rollout_shares_its_prefix_and_costs_less():
    world = worlds.load("compass", num_steps=5)
    policy, noise = world.policy, world.policy.draw_noise(12, torch.Generator().manual_seed(0))
    prompts = ["inner", "outer", "outer"]
    for window in range(1, 6):
        policy.network_evaluations = 0
        traj = b2diffurl.branch_rollout(policy, prompts, noise, window, 4)
        assert policy.network_evaluations == 3 * ((5 - window) + 4 * window)
        assert traj.states.shape == (12, window + 1, 2) and traj.log_probs.shape == (12, window)
        assert traj.steps.tolist() == list(range(5 - window, 5))
        start = traj.states[:, 0].view(3, 4, 2)
        assert (start == start[:, :1]).all() and traj.final.view(3, 4, 2).std(1).min() > 0
        whole = policy.rollout([p for p in prompts for _ in range(4)], noise)  # the first branch is a plain rollout
        torch.testing.assert_close(traj.states[::4], whole.states[::4, 5 - window :])
        torch.testing.assert_close(traj.log_probs[::4], whole.log_probs[::4, 5 - window :])


def test_one_branch_all_steps_is_ddpos_rollout():
    world = worlds.load("compass", num_steps=5)
    noise = world.policy.draw_noise(6, torch.Generator().manual_seed(0))
    ours = b2diffurl.branch_rollout(world.policy, world.prompts * 3, noise, 5, 1)
    theirs = world.policy.rollout(world.prompts * 3, noise)
    torch.testing.assert_close(ours.states, theirs.states)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs)


@pytest.mark.parametrize("how", ["switches off", "b = 1, thresholds 0"])
def test_ddpo_is_a_limit(monkeypatch, how):
    """Check 4: DDPO with z-scored advantages, the same weights after three rounds of four updates."""
    limit = dataclasses.replace(SMALL, num_prompts=18, num_branches=1, num_minibatches=2, backward_progressive=False)
    if how == "switches off":
        limit = dataclasses.replace(limit, num_prompts=6, num_branches=3, branch_sampling=False)
    else:
        limit = dataclasses.replace(limit, positive_threshold=0.0, negative_threshold=0.0)
    ours = trained(limit)
    history = Statistics(rounds=limit.history_stages + 1)
    zscore = b2diffurl.history_zscore
    monkeypatch.setattr(ddpo, "round_advantages", lambda rewards, prompts, *_: zscore(history, prompts, rewards))
    world = worlds.load("compass", num_steps=5)
    world.policy.network.double()
    world.policy.to("cpu")
    config = ddpo.Config(
        num_iterations=3, num_prompts=18, group_size=1, num_minibatches=2, num_epochs=2, learning_rate=3e-3,
        steps_per_pass=3, clip_range=0.1,
    )  # fmt: skip
    fit(ddpo.train(world.policy, distance, world.prompts, config, torch.Generator().manual_seed(0)), progress=False)
    theirs = torch.cat([p.detach().flatten() for p in world.policy.parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert (ours - trained(dataclasses.replace(limit, learning_rate=0.0))).abs().max() > 1e-3


def test_the_ratio_starts_at_one_and_the_prefix_gets_no_gradient():
    """Check 5."""
    world = worlds.load("compass", num_steps=5, residual="per_step_linear")
    noise = world.policy.draw_noise(12, torch.Generator().manual_seed(0))
    with torch.no_grad():
        traj = b2diffurl.branch_rollout(world.policy, ["inner", "outer", "outer"], noise, 2, 4)
    rows, places = torch.arange(12).unsqueeze(1), torch.arange(2).expand(12, 2)
    loss, info = b2diffurl.objective_loss(world.policy, traj, rows, places, torch.randn(12), 0.1, SMALL)
    assert float(info["clip_fraction"]) == 0 and float(info["approx_kl"]) < 1e-10
    loss.backward()
    (weight,) = world.policy.parameters()
    assert (weight.grad[:3] == 0).all() and (weight.grad[3:] != 0).any()


def test_steps_outside_every_window_stay_at_zero():
    for name in ("official", "pairwise", "independent"):
        kept = dict(positive_threshold=0.0, negative_threshold=0.0)  # all have something to learn from
        config = dataclasses.replace(SMALL, last_window=3, num_prompts=18, **kept | VARIANTS[name])
        weight = trained(config, residual="per_step_linear").view(5, -1)
        assert (weight[:2] == 0).all() and (weight[2:] != 0).any(), name


# ---------------------------------------------------------------------------------------------- the loop


def test_costs_are_counted():
    """Sampling (S - w) + b w a group, training 3 w a kept image and epoch."""
    world = worlds.load("compass", num_steps=5)
    history = fit(b2diffurl.train(world.policy, distance, world.prompts, SMALL), progress=False)
    spent = 0
    for row, window in zip(history, (2, 3, 4), strict=True):
        assert row["window"] == window
        kept = row["kept_positive"] + row["kept_negative"]
        assert 0 < kept <= 12
        spent += 6 * ((5 - window) + 3 * window) + 2 * 3 * window * kept
        assert row["network_evaluations"] == spent


def test_a_stage_that_keeps_nothing_moves_nothing():
    config = dataclasses.replace(SMALL, positive_threshold=50.0, negative_threshold=-50.0)
    start, steps = trained(dataclasses.replace(SMALL, num_iterations=1, learning_rate=0.0)), []
    assert torch.equal(trained(config, keep=steps), start)
    row = steps[-1][0].row()
    assert row["kept_positive"] == row["kept_negative"] == row["grad_norm"] == 0 and row["reward_queries"] == 54


def test_impossible_settings_are_refused():
    world = worlds.load("compass", num_steps=5)
    for change, message in [
        ({"advantage": "brnch"}, "advantage is 'brnch'; expected one of 'global', 'branch'"),
        ({"num_branches": 0}, "num_branches is 0; expected a whole number of at least 1"),
        ({"first_window": 6, "last_window": None}, "grows from 6 to 5 steps, but must stay within 1 and the 5"),
        ({"last_window": 1}, "not shrink"),
        ({"advantage": "branch", "num_branches": 1}, "needs branch_sampling=True and num_branches of at least 2"),
        ({"objective": "pairwise", "branch_sampling": False}, "compares the branches of a group"),
        ({"objective": "pairwise", "select": "all"}, "use select='extremes'"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(b2diffurl.train(world.policy, distance, world.prompts, dataclasses.replace(SMALL, **change)))
    with pytest.raises(ValueError, match="prompts is empty"):
        next(b2diffurl.train(world.policy, distance, [], SMALL))
    with pytest.raises(ValueError, match="eta = 0"):
        next(b2diffurl.train(worlds.load("compass", num_steps=5, eta=0.0).policy, distance, world.prompts, SMALL))
