"""D3PO's loss by hand, its limits, who may compare, and what its own loop must keep."""

import dataclasses
import itertools
import math

import pytest
import torch

from minialign import worlds
from minialign.kernels import clipped_surrogate, dpo_loss
from minialign.loop import fit
from minialign.methods import d3po
from minialign.pairs import bradley_terry, by_reward
from minialign.policies.paths import path_log_probs, reference_log_probs

F64, INF = torch.float64, math.inf
SMALL = d3po.Config(num_iterations=3, num_prompts=8, num_minibatches=2, learning_rate=3e-3, weight_decay=0.0)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def slopes(chosen, rejected, beta=0.1, clip_range=0.1):
    """(loss, its gradient with respect to either log-ratio) of one step."""
    x = f64(chosen, rejected).requires_grad_()
    loss, _ = d3po.step_loss(*x, beta, clip_range)
    return loss.item(), torch.autograd.grad(loss, x)[0].tolist()


# ---- checks 1 to 4


def test_at_the_reference_it_is_log_2_and_pulls_at_both():
    loss, (chosen, rejected) = slopes(0.0, 0.0)
    assert loss == pytest.approx(math.log(2)) and chosen == pytest.approx(-0.05) and rejected == pytest.approx(0.05)


def test_a_steps_log_ratio_is_that_of_two_gaussians():
    """Check 1: [delta (x - mu_ref) - delta^2 / 2] / sigma^2, delta = mu - mu_ref, through the policy on the line."""
    world = worlds.load("line", num_steps=5)
    policy = world.policy
    policy.network.double()
    policy.set_num_steps(5)
    theta = torch.linspace(-0.5, 0.7, 5, dtype=F64)
    with torch.no_grad():
        policy.network.residual.theta.copy_(theta)
        traj = policy.rollout(world.prompts * 3, generator=torch.Generator().manual_seed(0), reduction="sum")
    ratio = traj.log_probs - reference_log_probs(policy, traj, reduction="sum", rows_per_pass=2, steps_per_pass=2)
    exact = world.sampler
    delta, x = exact.gain * theta, traj.states.squeeze(-1)
    mean_ref = exact.slope * x[:, :-1] + exact.offset
    expected = (delta * (x[:, 1:] - mean_ref) - delta**2 / 2) / exact.step_std**2
    torch.testing.assert_close(ratio, expected.to(ratio), atol=1e-6, rtol=1e-6)
    rows = torch.tensor([2, 0])
    some = reference_log_probs(policy, traj, reduction="sum", rows_per_pass=1, steps_per_pass=5, rows=rows)
    torch.testing.assert_close(traj.log_probs[rows] - some, ratio[rows])


def test_its_bounds():
    """Check 2, to its digits: the argument is within +-.0200671, so the loss within .683164 to .703231."""
    far = torch.tensor([-9.0, -0.5, 0.0, 0.5, 9.0], dtype=F64)
    loss, _ = d3po.step_loss(far.repeat_interleave(5), far.repeat(5), 0.1, 0.1)
    argument = -torch.special.logit((-loss).exp()).neg()
    assert argument.max().item() == pytest.approx(0.0200671, abs=5e-8)
    assert argument.min().item() == pytest.approx(-0.0200671, abs=5e-8)
    assert loss.min().item() == pytest.approx(0.683164, abs=5e-7)
    assert loss.max().item() == pytest.approx(0.703231, abs=5e-7)


@pytest.mark.parametrize("outside", [math.log(1.1) + 1e-6, math.log(0.9) - 1e-6, 3.0, -3.0])
def test_outside_the_clip_there_is_no_gradient_in_either_direction(outside):
    """Check 3; the partner keeps its own, -+beta sigmoid(-argument)."""
    edge = math.log(1.1 if outside > 0 else 0.9)
    _, (chosen, rejected) = slopes(outside, 0.02)
    assert chosen == 0 and rejected == pytest.approx(0.1 / (1 + math.exp(0.1 * (edge - 0.02))))
    _, (chosen, rejected) = slopes(0.02, outside)
    assert rejected == 0 and chosen == pytest.approx(-0.1 / (1 + math.exp(0.1 * (0.02 - edge))))
    _, both = slopes(outside, outside, clip_range=INF)
    assert both == pytest.approx([-0.05, 0.05])


def test_without_clip_it_is_dpo():
    chosen, rejected = random(3, 4), random(3, 4, seed=1)
    loss, info = d3po.step_loss(chosen, rejected, 0.7, INF)
    torch.testing.assert_close(loss, dpo_loss(chosen, rejected, 0.7))
    assert info["clip_fraction"].max() == 0
    torch.testing.assert_close(info["accuracy"], (chosen > rejected).to(info["accuracy"]))


def test_what_is_told_of_the_clip():
    _, info = d3po.step_loss(f64(0.0, 0.2, -0.2, 0.2), f64(0.0, 0.0, 0.3, 0.05), 0.1, 0.1)
    assert info["clip_fraction"].tolist() == [0, 0.5, 1, 0.5] and info["accuracy"].tolist() == [0.5, 1, 0, 1]


def test_half_precision_counts_in_float32():
    chosen, rejected = (0.1 * random(5, seed=s).bfloat16() for s in (0, 1))
    half, full = (d3po.step_loss(*(x.to(t) for x in (chosen, rejected)), 0.1, 0.1)[0] for t in (torch.bfloat16, F64))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full.float())


# ---- who is better


def test_several_rewards_need_dominance():
    first, second = (
        torch.tensor([[1.0, 1, 1, 2, 1], [5, 5, 5, 5, 4]]),
        torch.tensor([[0.0, 2, 1, 1, 1], [4, 4, 5, 5, 5]]),
    )
    assert d3po.pareto(first, second).tolist() == [1, 0.5, 0.5, 1, 0]
    assert d3po.pareto(second, first).tolist() == [0, 0.5, 0.5, 0, 1]
    one, other = random(1, 50).float(), random(1, 50, seed=1).float()
    assert torch.equal(d3po.pareto(one, other), by_reward(lambda x, p: x)(one[0], other[0], [""] * 50)[0])
    assert torch.equal(d3po.pareto(one.exp(), other.exp()), d3po.pareto(one, other))  # it only ranks


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_pair_of_a_group_and_none_beyond(size):
    expected = [pair for g in range(3) for pair in itertools.combinations(range(g * size, (g + 1) * size), 2)]
    assert d3po.every_pair(3, size).tolist() == [list(pair) for pair in expected]
    assert size != 7 or len(expected) == 3 * 21


def test_the_better_one_stands_first_and_ties_are_gone():
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]])
    assert d3po.chosen_and_rejected(pairs, torch.tensor([1.0, 0.5, 0.0, 1.0])).tolist() == [[0, 1], [2, 1], [3, 4]]
    assert d3po.chosen_and_rejected(pairs, torch.full((4,), 0.5)).shape == (0, 2)


# ---- the loop


def left(samples, prompts):
    return -samples[:, 0]


def up(samples, prompts):
    return samples[:, 1]


def trained(config, reward=left, keep=None, seed=0, **who):
    """Weights after training with five steps, in float64; `keep` collects the rows."""
    world = worlds.load("compass", num_steps=5)
    world.policy.network.double()
    world.policy.to("cpu")
    for step in d3po.train(world.policy, reward, world.prompts, config, torch.Generator().manual_seed(seed), **who):
        if keep is not None:
            keep.append(step.row())
    return torch.cat([p.detach().flatten() for p in world.policy.parameters()])


def changed(**settings):
    return dataclasses.replace(SMALL, **settings)


def test_rewards_only_rank():
    weights = trained(SMALL)
    assert torch.equal(trained(SMALL, lambda x, p: left(x, p).exp() + 100), weights)
    assert torch.equal(trained(SMALL, [left, lambda x, p: 3 * left(x, p)]), weights)
    opposite = trained(SMALL, lambda x, p: -left(x, p))
    assert (opposite - weights).abs().max() > 1e-4


def test_a_labeller_stands_in_the_place_of_a_reward():
    rows, told = [], []
    weights = trained(SMALL, None, rows, labeller=by_reward(left))
    assert torch.equal(weights, trained(SMALL, left, told))
    assert "reward" not in rows[0] and rows[-1]["reward_queries"] == 0 and rows[-1]["comparisons"] == 24
    assert told[-1]["reward_queries"] == 48 and told[-1]["comparisons"] == 24
    person = lambda first, second, prompts: (first[:, 0] < second[:, 0]).float()  # noqa: E731
    assert torch.equal(trained(SMALL, None, labeller=lambda *given: person(*given[:3])), weights)
    erring = [trained(SMALL, None, seed=0, labeller=bradley_terry(left)) for _ in range(2)]
    assert torch.equal(*erring) and not torch.equal(erring[0], weights)


def test_contradicting_rewards_leave_only_ties():
    rows = []
    start = trained(changed(learning_rate=0.0))
    assert torch.equal(trained(SMALL, [left, lambda x, p: -left(x, p)], rows), start)
    assert all(row["tied"] == 1 and row["grad_norm"] == 0 for row in rows)
    assert rows[-1]["network_evaluations"] == 3 * 16 * 5  # nothing is spent on them but the rollout
    trained(SMALL, [left, up], rows := [])
    assert 0 < rows[0]["tied"] < 1


def test_what_is_evaluated():
    rows = []
    trained(changed(num_epochs=2), keep=rows)
    states = 8 * 2 * 5  # rolled out, under the reference, twice differentiated
    assert [row["network_evaluations"] for row in rows] == [n * states * (1 + 1 + 2 * 3) for n in (1, 2, 3)]
    trained(changed(refresh_reference=True), keep=(rows := []))
    assert rows[0]["network_evaluations"] == states * (1 + 3)  # the model that drew is the reference
    # of seven images each state is evaluated once a pass, though it stands in six pairs
    trained(changed(num_prompts=2, group_size=7, num_minibatches=1), keep=(rows := []))
    assert rows[0]["network_evaluations"] == 14 * 5 * (1 + 1 + 3) and rows[0]["comparisons"] == 42


def test_the_mean_over_elements_is_another_beta():
    """Check 7: D = 2."""
    mean = trained(changed(clip_range=INF, beta=0.5))
    torch.testing.assert_close(trained(changed(clip_range=INF, beta=0.25, reduction="sum")), mean, atol=1e-9, rtol=0)


def gradient_of(loss, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])


def test_at_the_reference_it_is_a_policy_gradient_with_advantages_of_one():
    """beta times DDPO's, whose advantage is 1 for the better one and -1 for the other."""
    world = worlds.load("compass", num_steps=5)
    policy = world.policy
    policy.network.double()
    policy.to("cpu")
    with torch.no_grad():
        traj = policy.rollout(world.prompts * 6, generator=torch.Generator().manual_seed(0), reduction="mean")
    pairs = torch.tensor([[0, 2], [4, 6], [9, 7], [3, 1]])
    ref = reference_log_probs(policy, traj, reduction="mean", rows_per_pass=5, steps_per_pass=2)
    places = torch.arange(5)
    loss, info = d3po.pair_loss(policy, traj, pairs, places, ref, SMALL)
    assert loss.item() == pytest.approx(math.log(2)) and info["clip_fraction"] == 0 and info["accuracy"] == 0.5
    ours = gradient_of(loss, policy)
    rows, sign = pairs.flatten(), torch.tensor([1.0, -1.0]).repeat(4).repeat_interleave(5)
    log_prob = path_log_probs(policy, traj, rows, places, reduction="mean").flatten()
    surrogate, _ = clipped_surrogate(log_prob, traj.log_probs[rows].flatten(), sign, 0.2)
    torch.testing.assert_close(ours, SMALL.beta * gradient_of(surrogate.mean(), policy), atol=1e-10, rtol=1e-6)
    assert ours.abs().max() > 1e-5  # it is alive
    old = dataclasses.replace(traj, log_probs=traj.log_probs + 0.3)  # as if the policy had moved by -.3 since
    _, info = d3po.pair_loss(policy, old, pairs, places, ref, SMALL)
    assert info["approx_kl"].item() == pytest.approx(math.exp(-0.3) - 1 + 0.3)  # k3 of KL(old || new)


def test_a_refreshed_reference_is_the_model_that_drew():
    """Equal to the fixed one in the first round; from the second on it starts at log 2 again."""
    once = changed(num_iterations=1)
    assert torch.equal(trained(once), trained(dataclasses.replace(once, refresh_reference=True)))
    trained(changed(num_minibatches=1), keep=(fixed := []))
    trained(changed(num_minibatches=1, refresh_reference=True), keep=(fresh := []))
    assert all(row["loss"] == pytest.approx(math.log(2)) and row["log_ratio"] == 0 for row in fresh)
    assert abs(fixed[2]["loss"] - math.log(2)) > 1e-6 and fixed[2]["log_ratio"] != 0


@pytest.mark.parametrize("shared", [True, False])
def test_a_start_is_shared_within_a_prompt_and_not_beyond(shared, monkeypatch):
    world, seen = worlds.load("compass", num_steps=5), []
    rollout = world.policy.rollout
    monkeypatch.setattr(world.policy, "rollout", lambda p, noise, **k: seen.append(noise) or rollout(p, noise, **k))
    config = changed(num_iterations=1, group_size=3, shared_start=shared)
    fit(d3po.train(world.policy, left, world.prompts, config), progress=False)
    starts = seen[0][:, 0].view(8, 3, 2)
    assert torch.equal(starts, starts[:, :1].expand_as(starts)) == shared
    assert len(starts.flatten(0, 1).unique(dim=0)) == (8 if shared else 24) and len(seen[0][:, 1].unique(dim=0)) == 24


def test_impossible_settings_are_refused():
    world = worlds.load("compass", num_steps=5)
    for change, message in [
        ({"group_size": 1}, "group_size is 1; D3PO compares the images of a prompt"),
        ({"clip_range": 1.0}, r"clip_range is 1\.0; expected a number between 0 and 1, or inf"),
        ({"beta": 0.0}, r"beta is 0\.0; expected a finite number above 0"),
        ({"reduction": "total"}, "reduction is 'total'; expected one of 'mean', 'sum'"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(d3po.train(world.policy, left, world.prompts, changed(**change)))
    for given in ({}, {"labeller": by_reward(left)}):
        with pytest.raises(ValueError, match="who compares"):
            next(d3po.train(world.policy, left if given else None, world.prompts, SMALL, **given))
    with pytest.raises(ValueError, match="who compares"):
        next(d3po.train(world.policy, [], world.prompts, SMALL))
    with pytest.raises(ValueError, match="prompts is empty"):
        next(d3po.train(world.policy, left, [], SMALL))
    with pytest.raises(ValueError, match="eta = 0"):
        next(d3po.train(worlds.load("compass", eta=0.0).policy, left, world.prompts, SMALL))
    with pytest.raises(ValueError, match="the policy is a LanguagePolicy; this method needs one that denoises"):
        next(d3po.train(worlds.load("tokens").policy, left, ["p0"], SMALL))


@pytest.mark.parametrize("answer", [lambda a, b, p, g: torch.ones(3), lambda a, b, p, g: torch.full((8,), 0.3)])
def test_a_labellers_answer_is_checked(answer):
    with pytest.raises(ValueError, match=r"the labeller gave .*, for 8 pairs; expected \(8,\): 1 where the first"):
        trained(SMALL, None, labeller=answer)
