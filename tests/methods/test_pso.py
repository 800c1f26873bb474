"""PSO's two losses against the sheet's numbers, what its loops must keep, and a real pipeline of four calls."""

import dataclasses
import math

import pytest
import torch

from minialign import worlds
from minialign.kernels import ddim_std, ddim_step
from minialign.loop import fit
from minialign.methods import diffusion_dpo, pso
from minialign.methods.diffusion_dpo import PairErrors
from minialign.pairs import Pairs, by_reward, draw_pairs
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.paths import path_log_probs, reference_log_probs

F64, INF = torch.float64, math.inf
SMALL = pso.Config(num_iterations=3, batch_size=7, learning_rate=3e-3, beta=5.0)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def student(num_steps=4, name="compass"):
    """An undistilled student in float64."""
    world = worlds.load(name)
    world.policy.network.double()
    world.policy.to("cpu")
    policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=num_steps)
    policy.train_all_weights()
    return world, policy


def distance(samples, prompts):
    return -(samples - 1).square().sum(1)


def flat(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def moved(policy, by=0.02):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(by)


# ---- check 1: the log-ratio of a re-noising step


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_log_ratio_of_a_step_in_closed_form(reduction):
    """l = d[(2 x_prev - sqrt(a)(f + f_ref)) sqrt(a)(f - f_ref)] / (2 (1 - a)), a the level it goes to."""
    _, policy = student()
    with torch.no_grad():
        traj = policy.rollout(["inner"] * 5, generator=torch.Generator().manual_seed(0), reduction=reduction)
    moved(policy)
    rows, places = torch.arange(5), torch.arange(3)
    now = path_log_probs(policy, traj, rows, places, reduction=reduction)
    before = reference_log_probs(policy, traj, reduction=reduction, rows_per_pass=2, steps_per_pass=2)
    for k in range(3):
        states, t = traj.states[:, k], policy.timesteps[k].expand(5)
        f, ref = (policy.denoise(states, t, traj.condition, reference) for reference in (False, True))
        a = policy.scheduler.alphas_cumprod[policy.timesteps[k + 1]].double()
        terms = (2 * traj.states[:, k + 1] - a.sqrt() * (f + ref)) * a.sqrt() * (f - ref) / (2 * (1 - a))
        torch.testing.assert_close((now - before)[:, k], getattr(terms, reduction)(1))
    assert (now - before).abs().min() > 1e-6


def test_at_the_reference_the_loss_is_log_two_and_its_gradient_is_half_of_beta():
    log_prob = random(2, 4, 3).requires_grad_()
    preference = f64(1, 0, 0.5, 1)
    loss, info = pso.online_loss(log_prob, log_prob.detach().clone(), preference, 50.0, 0.1)
    torch.testing.assert_close(loss, torch.full((4, 3), math.log(2), dtype=F64))
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    sign = f64(1, -1, 0, 1).unsqueeze(1).expand(4, 3)
    torch.testing.assert_close(slope, torch.stack([-25 * sign, 25 * sign]))
    assert (info["accuracy"] == 0.5).all() and info["clip_fraction"].sum() == 0 and info["approx_kl"].abs().max() == 0


# ---- checks 2 and 3: offline


def test_errors_of_the_noise_are_errors_of_the_sample_times_the_level():
    """VP: (x^_0 - x_0)^2 abar / (1 - abar) = (eps - noise)^2. In sigma space, x = x_0 + sigma eps, over sigma^2."""
    world, policy = student()
    x, noise, condition = random(6, 2), random(6, 2, seed=1), policy.encode(["inner"] * 6)
    levels = policy.timesteps[torch.tensor([0, 1, 2, 3, 3, 0])]
    pairs = Pairs(["inner"] * 6, x, x + 1)
    plain, weighted = (
        pso.diffusion_dpo.pair_errors(policy, pairs, condition, levels, (noise, noise), target=target)
        for target in ("sample", "epsilon")
    )
    a = policy.scheduler.alphas_cumprod[levels].double()
    torch.testing.assert_close(weighted.chosen, plain.chosen * a / (1 - a))
    teacher = world.policy.training_error(x, levels, noise, world.policy.encode(["inner"] * 6), reduction="mean")
    torch.testing.assert_close(weighted.chosen.detach(), teacher.detach(), rtol=1e-4, atol=1e-6)  # boundary: 1e-6 of x
    sigma, state = 3.0, x + 3.0 * noise
    torch.testing.assert_close((state - sigma * 0.9 * noise - x).square() / sigma**2, (0.9 * noise - noise).square())
    assert (weighted.chosen[0] < 1e-2 * plain.chosen[0]).all()  # the first level, which decides most, is not heard


def errors(seed=0, n=6):
    return PairErrors(*random(4, n, seed=seed).square())


def test_offline_is_diffusion_dpo_at_twice_the_beta():
    e = errors()
    dpo = diffusion_dpo.preference_loss(e, diffusion_dpo.Config(beta=6.0))
    torch.testing.assert_close(pso.offline_loss(*e, 3.0), dpo)
    logit = 3.0 * ((e.chosen_reference - 0.4 * e.rejected_reference) - (e.chosen - 0.4 * e.rejected))
    torch.testing.assert_close(pso.offline_loss(*e, 3.0, 0.4), torch.nn.functional.softplus(-logit))
    assert not torch.allclose(pso.offline_loss(*e, 3.0, 0.4), dpo)
    same = PairErrors(e.chosen, e.rejected, e.chosen, e.rejected)
    torch.testing.assert_close(pso.offline_loss(*same, 3.0, 0.4), torch.full((6,), math.log(2), dtype=F64))


def test_the_offline_run_is_diffusion_dpos_at_the_samplers_levels():
    """Weights after a run; and every level that the network saw is the sampler's own."""
    world, policy = student()
    pairs = draw_pairs(policy, by_reward(distance), world.prompts, 20, torch.Generator().manual_seed(0))
    levels = []
    policy.network.register_forward_hook(lambda _, inputs, __: levels.extend(inputs[1].tolist()))
    history = fit(pso.train_offline(policy, pairs, SMALL, torch.Generator().manual_seed(1)), progress=False)
    assert set(levels) <= set(policy.timesteps.tolist()) and len(set(levels)) > 1
    assert history["comparisons"] == [7, 14, 21] and history["network_evaluations"] == [7 * 8 * n for n in (1, 2, 3)]

    other = student()[1]
    config = diffusion_dpo.Config(
        num_iterations=3, batch_size=7, learning_rate=3e-3, beta=10.0, warmup_updates=0, target="sample"
    )

    def of_sampler(n, generator):
        return other.timesteps[torch.randint(4, (n,), generator=generator)]

    fit(diffusion_dpo.train(other, pairs, config, torch.Generator().manual_seed(1), levels=of_sampler), progress=False)
    torch.testing.assert_close(flat(policy), flat(other))
    assert (flat(policy) - flat(student()[1])).abs().max() > 1e-3


def test_the_mode_draws_labels_and_learns_and_names_what_it_spends():
    """train() in mode "offline" is train_offline on pairs of the untrained student, ranked by the reward."""
    world, policy = student()
    config = dataclasses.replace(SMALL, mode="offline", data_size=20, data_seed=3)
    fit(pso.train(policy, distance, world.prompts, config), progress=False)
    other = student()[1]
    pairs = draw_pairs(other, by_reward(distance), world.prompts, 20, torch.Generator().manual_seed(3))
    fit(pso.train_offline(other, pairs, config), progress=False)
    assert torch.equal(flat(policy), flat(other))


def test_the_reference_free_hinge_is_almost_the_diffusion_loss_of_the_chosen():
    """prior_weight - beta loser_weight = .5 - 5 * .1 = 0: no gradient to the rejected while the hinge is active."""
    parts = [part.requires_grad_() for part in random(2, 5).square() / 10]
    e = PairErrors(*parts, *random(2, 5, seed=3))  # whatever the reference says
    loss = pso.reference_free_loss(*e[:2], 5.0, 0.1, 0.5)
    assert (5 * (0.1 * e.rejected - e.chosen) < 1).all()
    chosen, rejected = torch.autograd.grad(loss.sum(), parts)
    torch.testing.assert_close(chosen, torch.full_like(chosen, 5.0))
    torch.testing.assert_close(rejected, torch.zeros_like(rejected), atol=1e-12, rtol=0)
    far = PairErrors(parts[0], parts[1] + 100, *random(2, 5))  # beyond the margin: prior preservation alone
    chosen, rejected = torch.autograd.grad(pso.reference_free_loss(*far[:2], 5.0, 0.1, 0.5).sum(), parts)
    assert chosen.abs().max() == 0 and (rejected == 0.5).all()


# ---- check 4: bounds, clip, ties


def test_the_bounds_of_the_clip():
    far = torch.tensor([[[9.0]], [[-9.0]]], dtype=F64)
    zero = torch.zeros_like(far)
    argument = 50 * math.log(1.1 / 0.9)
    assert argument == pytest.approx(10.0335, abs=1e-4)
    best, worst = (pso.online_loss(far, zero, f64(p), 50.0, 0.1)[0].item() for p in (1.0, 0.0))
    assert best == pytest.approx(4.39e-5, abs=1e-7) and worst == pytest.approx(10.0336, abs=1e-4)
    weak = [pso.online_loss(far, zero, f64(p), 0.1, 0.1)[0].item() for p in (1.0, 0.0)]
    assert weak == [pytest.approx(0.683164, abs=1e-6), pytest.approx(0.703231, abs=1e-6)]  # D3PO's
    inside = torch.tensor([[[0.05]], [[9.0]]], dtype=F64, requires_grad=True)
    loss, info = pso.online_loss(inside, zero, f64(0.0), 50.0, 0.1)
    (slope,) = torch.autograd.grad(loss.sum(), inside)
    assert slope[1].item() == 0 and slope[0].item() > 0 and info["clip_fraction"].tolist() == [[[0.0]], [[1.0]]]
    free = pso.online_loss(far, zero, f64(1.0), 2.0, INF)[0].item()
    assert free == pytest.approx(math.log1p(math.exp(-36)))


def test_ties_have_no_gradient_and_swapping_changes_nothing():
    now, ref = random(2, 3, 2).requires_grad_(), random(2, 3, 2, seed=1)
    loss, _ = pso.online_loss(now, ref, f64(0.5, 0.5, 0.5), 2.0, INF)
    (slope,) = torch.autograd.grad(loss.sum(), now)
    assert slope.abs().max() == 0 and loss.detach().unique().item() == pytest.approx(math.log(2))
    preference = f64(1, 0, 0.5)
    loss, info = pso.online_loss(now, ref, preference, 2.0, 0.3)
    swapped, other = pso.online_loss(now.flip(0), ref.flip(0), 1 - preference, 2.0, 0.3)
    torch.testing.assert_close(swapped, loss)
    torch.testing.assert_close(other["accuracy"], info["accuracy"])


def test_the_loss_in_half_precision_is_that_of_its_float32_values():
    now, ref = (random(2, 3, 2, seed=s).bfloat16() for s in (0, 1))
    loss, _ = pso.online_loss(now, ref, f64(1, 0, 1).bfloat16(), 2.0, 0.3)
    exact, _ = pso.online_loss(now.float(), ref.float(), f64(1, 0, 1).float(), 2.0, 0.3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)


# ---- the loop


def test_what_a_round_spends_and_that_the_last_call_is_left_out():
    """Each sample: N calls, N - 1 of its states under the reference, and thrice these; none for the last."""
    for settings in ({}, dict(num_minibatches=2, pairs_per_pass=2, steps_per_pass=2)):
        world, policy = student()
        config = dataclasses.replace(SMALL, **settings)
        trained = []
        policy.network.register_forward_hook(
            lambda _, inputs, __, trained=trained: trained.extend(inputs[1].tolist() if torch.is_grad_enabled() else [])
        )
        history = fit(pso.train(policy, distance, world.prompts, config), progress=False)
        assert sorted(set(trained), reverse=True) == policy.timesteps[:-1].tolist()
        assert history["network_evaluations"] == [14 * (4 + 3 + 9) * n for n in (1, 2, 3)]
        assert history["reward_queries"] == [14, 28, 42] and history["comparisons"] == [7, 14, 21]


def test_a_pair_starts_from_two_noises_or_from_one():
    for shared in (False, True):
        world, policy = student()
        starts, rollout = [], policy.rollout

        def watched(prompts, noise, rollout=rollout, starts=starts, **kwargs):
            starts.append(noise.clone())
            return rollout(prompts, noise, **kwargs)

        policy.rollout = watched
        config = dataclasses.replace(SMALL, num_iterations=1, shared_start=shared)
        fit(pso.train(policy, distance, world.prompts, config), progress=False)
        first, second = starts[0][::2], starts[0][1::2]
        assert torch.equal(first[:, 0], second[:, 0]) == shared
        assert not (first[:, 1:] == second[:, 1:]).any() and not (first[1:, 1] == first[:-1, 1]).any()  # each its own


def test_it_learns_which_of_two_is_better():
    """compass, the prompted side: the reward rises though only its order is told, and one update raises the margin."""
    rewards = {}
    for scale in (1.0, 1000.0):
        world, policy = student()
        config = dataclasses.replace(SMALL, num_iterations=8, batch_size=32, learning_rate=3e-3)
        shown = lambda samples, prompts, scale=scale: scale * distance(samples, prompts)  # noqa: E731
        history = fit(pso.train(policy, shown, world.prompts, config), progress=False)
        rewards[scale] = [reward / scale for reward in history["reward"]]
    assert rewards[1.0][-1] > rewards[1.0][0] + 0.5
    assert rewards[1.0] == pytest.approx(rewards[1000.0], rel=1e-6)  # the values are not used


def test_impossible_settings_are_refused():
    world, policy = student()
    for change, message in [
        ({"clip_range": 1.0}, "clip_range is 1.0; expected below 1"),
        ({"num_minibatches": 8}, "num_minibatches is 8, more than the 7 pairs"),
        ({"mode": "both"}, "mode is 'both'; expected one of 'online', 'offline'"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(pso.train(policy, distance, world.prompts, dataclasses.replace(SMALL, **change)))
    with pytest.raises(ValueError, match="num_steps = 1 has no stochastic step"):
        next(pso.train(student(1)[1], distance, world.prompts, SMALL))
    with pytest.raises(ValueError, match="needs one that denoises"):
        next(pso.train(worlds.load("tokens").policy, distance, ["a"], SMALL))
    one, pairs = student(1)[1], Pairs(["inner"] * 3, random(3, 2), random(3, 2, seed=1))
    next(pso.train_offline(one, pairs, SMALL))  # offline one call is enough: it needs no density
    with pytest.raises(ValueError, match="this policy's states have shape"):
        next(pso.train_offline(one, Pairs(["inner"], random(1, 3), random(1, 3)), SMALL))


# ---- SDXL-Turbo's sampler


def test_an_euler_ancestral_step_is_ddpms_in_other_units():
    """x = x_0 + sigma eps: N(x + (x - x^_0) / sigma (sigma_down - sigma), sigma_up^2), sigma_up^2 = s^2 (sigma^2 - s^2)
    / sigma^2, sigma_down^2 = s^2 - sigma_up^2 with s the next sigma. Divided by sqrt(1 + s^2): eta = 1."""
    sigma, after = f64(14.0, 3.0, 1.2), f64(4.0, 1.5, 0.3)
    x, noise_pred = random(3, 5) * sigma.unsqueeze(1), random(3, 5, seed=1)
    denoised = x - sigma.unsqueeze(1) * noise_pred
    up = (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
    down = (after**2 - up**2).sqrt()
    mean = x + (x - denoised) / sigma.unsqueeze(1) * (down - sigma).unsqueeze(1)
    a, a_next, scale = 1 / (1 + sigma**2), 1 / (1 + after**2), (1 + after**2).sqrt()
    state = x * a.sqrt().unsqueeze(1)
    out = ddim_step(noise_pred, state, a, a_next, 1.0, next=random(3, 5, seed=2), reduction="mean")
    torch.testing.assert_close(out.mean * scale.unsqueeze(1), mean)
    torch.testing.assert_close(ddim_std(a, a_next, 1.0) * scale, up)


# ---- check 6


def test_where_there_is_no_signal_the_diffusion_loss_wants_the_mean_of_the_data():
    """And no sample is there: on-mode share 0. The ends of the exact ODE's paths are on the modes."""
    world = worlds.load("ring", std=0.15, schedule="cosine", num_steps=50, eta=0.0)

    def on_mode(samples):
        return (torch.cdist(samples, world.modes).amin(1) < 0.45).float().mean()

    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    wanted = world.mixture.denoised(x, 1e-6)
    assert wanted.abs().max() < 0.02 and on_mode(wanted) == 0
    ends = world.policy.sample(["a point"] * 500, generator=torch.Generator().manual_seed(0))
    assert on_mode(ends) > 0.9
