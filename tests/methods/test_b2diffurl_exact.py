"""The closed-form checks of the b2diffurl sheet in the linear-Gaussian world, through the real policy and rollout."""

import pytest
import torch

from minialign import worlds
from minialign.methods import b2diffurl


def line(**settings):
    world = worlds.load("line", num_steps=20, mean=0.0, std=0.5, **settings)
    world.policy.network.double()
    world.policy.set_num_steps(20)
    return world


def branches(world, window, num_branches, groups, seed=0):
    noise = world.policy.draw_noise(groups * num_branches, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return b2diffurl.branch_rollout(world.policy, world.prompts * groups, noise, window, num_branches, "sum")


@pytest.mark.parametrize("window", [1, 4, 8, 14, 20])
def test_branches_differ_by_the_variance_decided_in_the_window(window):
    """Check 1: the mean variance within a group is Vs(w), between the groups' true means Var - Vs(w)."""
    world, b, groups = line(), 4, 6_000
    rewards = branches(world, window, b, groups).final.view(groups, b)
    exact = world.sampler.window_variance(window).item()
    within = rewards.var(1)
    error = within.std().item() / groups**0.5
    assert abs(within.mean().item() - exact) < 4 * error
    between = rewards.mean(1).var().item() - exact / b
    total = world.sampler.sample_variance.item()
    assert abs(between - (total - exact)) < 4 * total * (2 / groups) ** 0.5


@pytest.mark.parametrize(("window", "branch", "pays"), [(4, 0.0871, True), (8, 0.1792, True), (14, 0.2310, False)])
def test_variance_of_the_gradient_under_both_baselines(window, branch, pays):
    """Check 2: the step at t = 151, b = 5, in units of its own noise; the mean is P sigma under either baseline."""
    world, b, groups = line(), 5, 40_000
    sampler, step = world.sampler, world.policy.timesteps.tolist().index(151)
    effect = sampler.downstream[step] * sampler.step_std[step]
    traj = branches(world, window, b, groups)
    place = traj.steps.tolist().index(step)
    mean = world.policy.step(traj.states[:, place], step, traj.condition).mean.detach()
    xi = ((traj.states[:, place + 1] - mean) / sampler.step_std[step]).view(groups, b)
    rewards = traj.final.view(groups, b)

    def moments(advantages):  # of the group's estimate; groups are independent
        per_group = (xi * advantages).mean(1)
        variance = b * per_group.var().item()
        spread = ((per_group - per_group.mean()) ** 2).std().item() * b / groups**0.5
        return per_group.mean().item(), variance, spread

    got_mean, got, error = moments(b2diffurl.branch_advantage(rewards))
    assert abs(got_mean - effect.item()) < 4 * (got / (b * groups)) ** 0.5
    assert abs(got - branch) < 4 * error and error < 0.02 * branch
    # the global mean as baseline: samples of a group are then correlated, so take one sample of each group
    alone = xi[:, 0] * (rewards[:, 0] - sampler.sample_mean)
    assert abs(alone.mean().item() - effect.item()) < 4 * (0.1928 / groups) ** 0.5
    error = ((alone - alone.mean()) ** 2).std().item() / groups**0.5
    assert abs(alone.var().item() - 0.1928) < 4 * error
    assert pays == (branch < 0.1928)


def test_branching_pays_where_the_prefix_explains_enough():
    """Check 3: b/(b-1) (Vs + q) < Var + q iff Vp > (Var + q)/b; for b = 5 true at w = 8, false at the official 14."""
    sampler = line().sampler
    total = sampler.sample_variance
    for b in (2, 5, 10):
        pays = []
        for window in range(1, 21):
            inside, q = (
                sampler.window_variance(window),
                (sampler.downstream * sampler.step_std)[-window:].square().max(),
            )
            smaller = bool(b / (b - 1) * (inside + q) < total + q)
            assert smaller == bool(total - inside > (total + q) / b)
            pays.append(smaller)
        assert pays == sorted(pays, reverse=True)  # once it stops paying, a longer window does not help
        if b == 5:
            assert pays[7] and not pays[13]


def test_the_window_is_the_last_timesteps():
    """Check 6."""
    traj = branches(line(), 14, 2, 1)
    assert traj.timesteps.tolist() == list(range(651, 0, -50))


def test_all_branches_with_the_branch_baseline_are_an_unbiased_policy_gradient():
    """select="all", advantage="branch" through the real loss: d E[x_0] / d theta = k P inside the window, 0 before."""
    world, b, groups, estimates = line(), 4, 400, []
    config = b2diffurl.Config(reduction="sum", num_branches=b)
    for seed in range(50):
        traj = branches(world, 6, b, groups, seed)
        advantages = b2diffurl.branch_advantage(traj.final.view(groups, b)).flatten()
        rows, places = torch.arange(groups * b).unsqueeze(1), torch.arange(6).expand(groups * b, 6)
        loss = b2diffurl.objective_loss(world.policy, traj, rows, places, advantages, 1e9, config)[0]
        estimates.append(-torch.autograd.grad(loss * 6, world.policy.network.residual.theta)[0])  # sum over steps
    estimates = torch.stack(estimates)
    error, exact = estimates.std(0) / 50**0.5, world.sampler.policy_gradient
    assert (estimates[:, :14] == 0).all()
    assert ((estimates.mean(0) - exact).abs()[14:] < 4 * error[14:]).all()
    assert (error[14:19] < 0.1 * exact.abs()[14:19]).all()
