"""InPO: the closed forms of one Gaussian, its limit Diffusion-DPO, the official code's mislabelled level, refusals."""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "policies"))

from test_inversion_exact import NOTHING, GaussianPolicy, f64

from minialign import worlds
from minialign.methods import diffusion_dpo, inpo
from minialign.methods.diffusion_dpo import pair_errors
from minialign.pairs import Pairs, bradley_terry, draw_pairs
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.inversion import implied_noise

SMALL = inpo.Config(num_iterations=2, batch_size=12, pairs_per_pass=12, beta=120.0, learning_rate=1e-3)
RATIOS = {0.8: 0.5556, 0.99: 0.5025, 0.1: 0.9091}  # sheet, check 3, s = 1: signal: h / k


def ring(model="diffusion", dtype=torch.float64, num_pairs=200):
    """(policy, pairs of its samples), in float64."""
    settings = dict(schedule="cosine", num_steps=20, eta=0.0) if model == "diffusion" else {}
    world = worlds.load("ring", model=model, **settings)
    world.policy.network.to(dtype)
    world.policy.to("cpu")
    labeller = bradley_terry(world.rewards["first_coordinate"])
    return world.policy, draw_pairs(world.policy, labeller, world.prompts, num_pairs, torch.Generator().manual_seed(7))


def trained(config, model="diffusion", seed=0, train=inpo.train):
    """(weights, rows) after training on ring."""
    policy, pairs = ring(model)
    rows = [step.row() for step in train(policy, pairs, config, torch.Generator().manual_seed(seed))]
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), rows


# ---- one Gaussian ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", RATIOS)
def test_in_one_gaussian_it_is_diffusion_dpo_with_less_weight(signal):
    """Check 3: u = 2 beta' k h shift (x_w - x_l), h / k = sqrt(v) / (sqrt(v) + signal s); beta' = beta / 2 in 1-D."""
    std, expected = 1.0, RATIOS[signal]
    policy = GaussianPolicy(std=std, shift=0.5)
    pairs, level = Pairs([0], f64([1.2]), f64([-0.3])), f64(math.acos(signal))
    noiser = inpo.Inversion(num_steps=200, renoise=True)
    taus = tuple(noiser(policy, x, level, NOTHING, torch.empty(0)) for x in (pairs.chosen, pairs.rejected))
    noise = f64([0.7])
    logits = []
    for drawn in (taus, (noise, noise)):
        chosen, rejected = pair_errors(policy, pairs, NOTHING, level, drawn).log_ratios
        logits.append(2 * (chosen - rejected).item())  # beta' = 1
    v = policy.spread(level) ** 2
    k = level.sin() * level.cos() / v
    assert logits[1] == pytest.approx((2 * k**2 * 0.5 * 1.5).item())
    assert logits[0] / logits[1] == pytest.approx(expected, abs=5e-5)
    if signal == 0.8:
        assert logits == [pytest.approx(0.192, abs=1e-5), pytest.approx(0.3456)]


@pytest.mark.optimum("inpo")
def test_the_optimum_of_one_level_is_a_logistic_regression():
    """Line, a residual of one number a step: u = -beta h theta (x_w - x_l), linear in both, so that the slope g of a
    regression of the labels on x says theta = -g / (beta h): there the loop has no gradient left, elsewhere it has."""
    policy = worlds.load("line", eta=0.0).policy
    policy.network.double()
    policy.to("cpu")
    labeller = bradley_terry(lambda samples, prompts: samples[:, 0])
    pairs = draw_pairs(policy, labeller, ["a number"], 400, torch.Generator().manual_seed(0))
    gap = (pairs.chosen - pairs.rejected).double().flatten()
    slope = torch.zeros(1, dtype=torch.float64)
    for _ in range(20):  # Newton: mean log sigmoid(slope gap)
        p = (slope * gap).sigmoid()
        slope = slope + ((1 - p) * gap).mean() / (p * (1 - p) * gap.square()).mean()
    assert abs(slope.item() - 1) < 0.3  # the true reward's, but for the error of 400 labels

    step, noiser = 10, inpo.Inversion(20)
    level, x = policy.timesteps[step], f64([1.0], [-1.0])
    condition, levels = policy.encode(["a number"] * 2), level.repeat(2)
    tau = noiser(policy, x, levels, condition, torch.empty(0))
    seen = policy.noise_at(policy.corrupt(x, levels, tau), levels, condition, reference=True)
    h = (seen - tau)[0].item()
    signal, noise = (value.item() for value in policy.signal_and_noise(level))
    assert h == pytest.approx(signal * noise / (1 + signal), rel=0.15)  # sqrt(v) = s = 1: the limit of many steps

    def gradient(theta):
        policy.network.residual.theta.data[step] = theta
        config = inpo.Config(num_iterations=1, batch_size=400, pairs_per_pass=400, beta=4.0, max_grad_norm=math.inf)
        one_level = dict(noiser=noiser, levels=lambda n, generator: level.repeat(n))
        return next(diffusion_dpo.train(policy, pairs, config, **one_level)).row()["grad_norm"]

    optimum = -slope.item() / (4 * h)
    assert gradient(optimum) < 1e-6 and gradient(0.0) > 0.1 and gradient(1.05 * optimum) > 1e-3


# ---- its limit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_with_the_forward_process_as_the_noiser_it_is_diffusion_dpo(shared):
    """Check 6, bit for bit."""
    config = dataclasses.replace(SMALL, shared_noise=shared)
    forward = partial(diffusion_dpo.train, noiser=lambda policy, latents, levels, condition, noise: noise)
    plain, rows = trained(config, train=diffusion_dpo.train)
    ours, other = trained(config, train=forward)
    assert torch.equal(plain, ours)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in other]
    assert not torch.equal(plain, trained(config)[0])


@pytest.mark.parametrize(
    "settings",
    [{}, dict(invert_with="policy"), dict(official_grid=True), dict(inversion_noise=0.1), dict(num_inversion_steps=1)],
    ids=str,
)
def test_at_the_reference_the_loss_is_log_2_whatever_the_inversion(settings):
    """Check 5; the gradient is not 0, and every setting is heard."""
    weights, rows = trained(dataclasses.replace(SMALL, **settings))
    assert not settings or not torch.equal(weights, trained(SMALL)[0])
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and rows[0]["accuracy"] == 0.5
    assert rows[0]["grad_norm"] > 1e-3 and rows[1]["loss"] != pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("model", ["diffusion", "flow"])
def test_it_learns_what_the_labels_say(model):
    """One step raises the logit of its own batch; sixteen move the samples to where the reward is."""
    policy, pairs = ring(model, torch.float32, 400)
    prompts, noise = [pairs.prompts[0]] * 400, policy.draw_noise(400, torch.Generator().manual_seed(1))
    before = policy.sample(prompts, noise)[:, 0].mean()
    settings = dict(batch_size=128, pairs_per_pass=128, num_iterations=16, warmup_updates=1, learning_rate=3e-3)
    whole = dataclasses.replace(SMALL, beta=30.0 if model == "diffusion" else 5.0, **settings)
    rows = [step.row() for step in inpo.train(policy, pairs, whole)]
    assert policy.sample(prompts, noise)[:, 0].mean() > before + 0.3
    assert rows[-1]["accuracy"] > 0.5 and rows[-1]["margin"] > 0
    once = dataclasses.replace(whole, num_iterations=2, batch_size=len(pairs), pairs_per_pass=400, warmup_updates=0)
    same = lambda n, generator: policy.draw_levels(1, torch.Generator().manual_seed(4)).expand(n)  # noqa: E731
    policy = ring(model, torch.float32, 400)[0]
    first, second = (s.row() for s in diffusion_dpo.train(policy, pairs, once, noiser=inpo.Inversion(), levels=same))
    assert second["margin"] > first["margin"] == 0 and second["loss"] < first["loss"]


# ---- who inverts, how far, and at what price -------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["diffusion", "flow"])
def test_the_reference_does_not_drift_and_the_policy_does(model):
    policy, pairs = ring(model)
    levels, condition = policy.draw_levels(9, torch.Generator().manual_seed(2)), policy.encode(pairs.prompts[:9])

    def taus():
        given = policy, pairs.chosen[:9].double(), levels, condition, torch.empty(0)
        return [inpo.Inversion(invert_with=who)(*given) for who in ("reference", "policy")]

    start = taus()
    torch.testing.assert_close(*start)
    for p in policy.parameters():
        p.data += 0.05
    moved = taus()
    assert torch.equal(moved[0], start[0]) and (moved[1] - start[1]).abs().max() > 1e-3
    assert not any(tau.requires_grad for tau in moved)


def test_the_official_level_is_the_next_of_a_fixed_grid():
    """Of 1000 and ten steps: 350 ends at 401, and beyond 901 nothing goes. The sheet's ablation: 100 and five."""
    thousand = worlds.load("compass").policy
    asked = torch.tensor([0, 1, 2, 101, 102, 350, 901, 902, 999])
    ends = torch.tensor([1, 1, 101, 101, 201, 401, 901, 901, 901])
    assert torch.equal(inpo.official_levels(thousand, asked, 10), ends)
    hundred = worlds.load("ring", schedule="cosine").policy
    assert inpo.official_levels(hundred, torch.tensor([1, 2, 21, 35, 81, 99]), 5).tolist() == [1, 21, 21, 41, 81, 81]
    flow = torch.tensor([0.001, 0.1, 0.35, 0.6, 0.901, 1.0])
    torch.testing.assert_close(inpo.official_levels(hundred, flow, 10), torch.tensor([0.1, 0.1, 0.4, 0.6, 1, 1]))


def test_mislabelled_states_are_too_noisy_for_their_level():
    """In one Gaussian tau has variance (sqrt(v) - signal s)^2 / (s noise)^2 of the level reached, over that of the one
    named: at 350 of 1000 the state of 401 stands, so tau is larger than it should be."""
    policy = worlds.load("line").policy
    x, levels = torch.tensor([[1.0], [-1.0]]), torch.tensor([350, 350])
    condition = policy.encode(["a number"] * 2)
    right, wrong = (
        inpo.Inversion(10, official_grid=flag)(policy, x, levels, condition, torch.empty(0)) for flag in (False, True)
    )
    there = policy.corrupt(x, levels, wrong)
    at_401 = policy.corrupt(x, torch.tensor([401, 401]), inpo.Inversion(10)(
        policy, x, torch.tensor([401, 401]), condition, torch.empty(0)))  # fmt: skip
    torch.testing.assert_close(there, at_401, atol=1e-5, rtol=0)
    in_order = inpo.Inversion(10)(policy, x, torch.tensor([401, 401]), condition, torch.empty(0))
    assert (right.abs() != wrong.abs()).all() and not torch.allclose(in_order, wrong)


def test_level_0_is_not_drawn_and_would_be_no_noise():
    """Up to level 0 nothing is inverted: x_t = x_0, and tau = (1 - signal) / noise x_0, a shrunken image. A flow has no
    such level; there its noise would be 0 / 0."""
    policy, pairs = ring()
    x, levels = pairs.chosen[:5].double(), torch.zeros(5, dtype=torch.long)
    tau = inpo.Inversion()(policy, x, levels, policy.encode(pairs.prompts[:5]), torch.empty(0))
    signal, noise = (value[0] for value in policy.signal_and_noise(levels))
    torch.testing.assert_close(tau, (1 - signal) / noise * x)
    torch.testing.assert_close(policy.corrupt(x, levels, tau), x)
    drawn = inpo.invertible_levels(policy, 3000, torch.Generator().manual_seed(0))
    assert drawn.min() == 1 and drawn.max() == 99
    theirs = policy.draw_levels(3000, torch.Generator().manual_seed(0))
    assert theirs.min() == 0 and torch.equal(drawn[theirs > 0], theirs[theirs > 0])  # the same draws, but for that
    one = inpo.Inversion()(policy, x, levels + 1, policy.encode(pairs.prompts[:5]), torch.empty(0))
    seen = policy.noise_at(x, levels, policy.encode(pairs.prompts[:5]), reference=True)
    assert (one - seen).abs().max() < 0.5 * seen.abs().max()  # one step: mostly the noise that was seen in the image
    flow, _ = ring("flow")
    levels = inpo.invertible_levels(flow, 3000, torch.Generator().manual_seed(0))
    assert levels.min() == 1e-3 and levels.max() == 1
    assert implied_noise(flow, x, levels[:5] * 0, x).isnan().all()


def test_the_random_term_takes_a_draw_a_step():
    policy, pairs = ring()
    assert inpo.Inversion(4).noise_shape == () and inpo.Inversion(4, random_term=0.1).noise_shape == (4,)
    levels, condition = torch.tensor([40, 90]), policy.encode(pairs.prompts[:2])
    x, noise = pairs.chosen[:2].double(), torch.randn(2, 4, 2, dtype=torch.float64)
    plain, ours = (inpo.Inversion(4, random_term=c)(policy, x, levels, condition, noise) for c in (0.0, 0.1))
    assert 1e-3 < (plain - ours).abs().max() < 1
    noise[:, -1] += 1  # the last step's draw counts, too
    assert not torch.equal(ours, inpo.Inversion(4, random_term=0.1)(policy, x, levels, condition, noise))
    same, other = (trained(dataclasses.replace(SMALL, inversion_noise=0.1), seed=seed)[0] for seed in (0, 0))
    assert torch.equal(same, other)


def test_each_image_of_a_pair_has_its_own_tau():
    """The loop's errors at the first step, by hand."""
    policy, pairs = ring(num_pairs=6)
    levels, condition = torch.full((6,), 60), policy.encode(pairs.prompts)
    config = inpo.Config(num_iterations=1, batch_size=6)
    given = dict(noiser=inpo.Inversion(), levels=lambda n, generator: levels)
    row = next(diffusion_dpo.train(policy, pairs, config, **given)).row()
    for name in ("chosen", "rejected"):
        x = getattr(pairs, name).double()
        tau = inpo.Inversion()(policy, x, levels, condition, torch.empty(0))
        states = policy.corrupt(x, levels, tau)
        error = (policy.noise_at(states, levels, condition, reference=True) - tau).square().mean()
        assert row[f"error_{name}"] == pytest.approx(error.item(), rel=1e-5)


def test_costs_are_counted():
    """A pair: n inversion steps of two images, two under the reference, two that are differentiated."""
    for settings, per_pair in ((dict(), 2 * 5 + 2 + 6), (dict(num_inversion_steps=2, invert_with="policy"), 4 + 2 + 6)):
        config = dataclasses.replace(SMALL, **settings)
        rows = trained(config)[1]
        assert [row["network_evaluations"] for row in rows] == [12 * per_pair, 24 * per_pair]
        assert [row["comparisons"] for row in rows] == [12, 24] and rows[-1]["reward_queries"] == 0
        passes = inpo.floor(None, config, {})
        assert sum(passes["forward"]) + 3 * sum(passes["backward"]) == 12 * per_pair


def test_what_cannot_be_inverted_is_refused():
    world = worlds.load("compass", num_steps=4)
    student = ConsistencyPolicy.from_diffusion(world.policy)
    student.train_all_weights()
    states = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="ConsistencyPolicy, which jumps to data"):
        next(inpo.train(student, Pairs(["inner"] * 4, states, states), SMALL))
    with pytest.raises(ValueError, match=r"the pairs hold \(3,\)"):
        next(inpo.train(world.policy, Pairs(["inner"] * 4, torch.zeros(4, 3), torch.zeros(4, 3)), SMALL))
    for change, message in [
        ({"num_inversion_steps": 0}, "num_inversion_steps is 0"),
        ({"invert_with": "base"}, "invert_with is 'base'; expected one of 'reference', 'policy'"),
        ({"inversion_noise": -0.1}, "inversion_noise is -0.1"),
        ({"official_grid": 1}, "official_grid is 1; expected True or False"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
