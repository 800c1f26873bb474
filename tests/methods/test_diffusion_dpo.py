"""Diffusion-DPO: the sheet's numbers, what independent noise costs, limits, prompts left out, and real pipelines."""

import csv
import dataclasses
import math
import runpy
from pathlib import Path

import pytest
import torch
from scipy.optimize import brentq

from minialign import worlds
from minialign.exact import GaussianMixture
from minialign.loop import fit, load_checkpoint, save_checkpoint
from minialign.measure import kl_to_base
from minialign.methods import diffusion_dpo as dpo
from minialign.pairs import Pairs, bradley_terry, by_reward, draw_pairs
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.flow import FlowPolicy
from minialign.worlds.exact_denoiser import ExactDenoiser, PerStepScalar

MODELS = Path(__file__).parent.parent / "policies" / "conftest.py"
F64 = torch.float64
SMALL = dpo.Config(num_iterations=3, batch_size=15, pairs_per_pass=15, beta=40.0, learning_rate=3e-3, warmup_updates=0)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def seed(number):
    return torch.Generator().manual_seed(number)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def some_pairs(policy, prompts, n=23, shape=None):
    first, second = (random(n, *(shape or policy.latent_shape), seed=s) for s in (1, 2))
    return Pairs([prompts[i % len(prompts)] for i in range(n)], first, second)


def shifted(alpha_bar, shift):
    """A base N(0, 1) on the line whose trained part says that the data's mean has moved by `shift`, at one level."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=2, trained_betas=[1 - alpha_bar, 0.5], clip_sample=False)
    residual = PerStepScalar(torch.arange(2), 2)
    network = ExactDenoiser(GaussianMixture.isotropic(torch.zeros(1, 1), 1.0), scheduler.alphas_cumprod, residual)
    policy = DiffusionPolicy(network.double(), scheduler, latent_shape=(1,), num_steps=1)
    signal, noise = policy.signal_and_noise(torch.tensor([0]))
    slope = float(noise * signal)  # k = sigma alpha / v, v = 1
    with torch.no_grad():
        residual.theta[0] = -slope * shift
    return policy, slope


def line_logit(policy, chosen, rejected, noise, beta_sum=1.0):
    """u of a pair on the line, beta in the sum convention, D = 1: beta = 2 D beta'."""
    pairs = Pairs(["a number"], f64(chosen).view(1, 1), f64(rejected).view(1, 1))
    drawn = tuple(f64(e).view(1, 1) for e in noise)
    errors = dpo.pair_errors(policy, pairs, policy.encode(pairs.prompts), torch.tensor([0]), drawn)
    return 2 * beta_sum * (errors.log_ratios[0] - errors.log_ratios[1])


# ---- check 1


def test_at_the_reference_the_loss_is_log_2_and_its_gradient_that_of_two_denoising_losses():
    n, dim, beta = 3, 7, 5.0
    outputs = [random(n, dim, seed=s).requires_grad_() for s in (1, 2)]
    noise = random(n, dim, seed=3)
    errors = [(output - noise).square().mean(1) for output in outputs]
    found = dpo.PairErrors(*errors, *(error.detach() for error in errors))
    assert torch.equal(found.info()["accuracy"], torch.tensor(0.5, dtype=F64))  # not 0: ties are halves
    loss = dpo.preference_loss(found, dpo.Config(beta=beta))
    torch.testing.assert_close(loss, torch.full((n,), 0.69314718, dtype=F64))
    slopes = torch.autograd.grad(loss.mean(), outputs)
    for sign, slope, output in zip((1, -1), slopes, outputs, strict=True):
        torch.testing.assert_close(slope, sign * beta / (2 * dim * n) * (output - noise).detach())


# ---- check 2


@pytest.mark.parametrize("loss", ["dpo", "hinge", "ipo"])
def test_swapping_the_pair_turns_the_logit(loss):
    errors = dpo.PairErrors(*(random(5, seed=s).square() for s in range(4)))
    swapped = dpo.PairErrors(errors[1], errors[0], errors[3], errors[2])
    config = dpo.Config(beta=1.3, loss=loss)
    u = config.beta * (errors.log_ratios[0] - errors.log_ratios[1])
    gap = dpo.preference_loss(errors, config) - dpo.preference_loss(swapped, config)
    # hinge: both within the margin; ipo: (v - 1/2b)^2 - (v + 1/2b)^2 = -2 v / b, v = u / b
    expected = {"dpo": -u, "ipo": -2 * u / config.beta**2, "hinge": (1 - u).clamp_min(0) - (1 + u).clamp_min(0)}
    torch.testing.assert_close(gap, expected[loss])
    assert (u.abs() > 0.05).sum() > 3 and u.min() < 0 < u.max()


def test_one_step_raises_the_margin_of_its_own_batch():
    """A wrong sign would start at log 2 just the same."""
    world = worlds.load("ring", schedule="cosine")
    pairs = draw_pairs(world.policy, by_reward(world.rewards["first_coordinate"]), world.prompts, 64, seed(0))
    before, after = (
        fit(dpo.train(world.policy, pairs, dataclasses.replace(
            SMALL, num_iterations=2, batch_size=64), seed(0)), progress=False)
    )  # fmt: skip
    assert before["loss"] == pytest.approx(math.log(2)) and before["margin"] == 0 and before["accuracy"] == 0.5
    assert after["loss"] < before["loss"] and after["margin"] > 1e-4 and after["accuracy"] > 0.5


# ---- check 3


def test_a_shift_of_the_mean_by_hand():
    policy, slope = shifted(0.64, 0.5)  # alpha .8, sigma .6: k = .48; u = 2 k^2 .5 (1.2 + .3) = .3456
    assert slope == pytest.approx(0.48)
    for noise in (-1.3, 0.0, 2.2):  # for every noise that the two share
        assert line_logit(policy, 1.2, -0.3, (noise, noise)).item() == pytest.approx(0.3456, abs=1e-6)
    assert line_logit(policy, 1.2, -0.3, (0.5, -0.2)).item() == pytest.approx(0.13056, abs=1e-6)
    shared = line_logit(policy, 1.2, -0.3, (0.1, 0.1), beta_sum=7.0).item()
    assert shared == pytest.approx(7 * 0.3456, abs=1e-5)


# ---- checks 4 and 5


def fitted_shift(alpha_bar, shared, n=200_000):
    """The shift that minimises the loss on many pairs of N(0, 1) labelled with r = x, over the exact tilt's: g/2k^2."""
    policy, slope = shifted(alpha_bar, 1.0)
    x = random(2, n, seed=5)
    first_wins = torch.rand(n, dtype=F64, generator=seed(6)) < (x[0] - x[1]).sigmoid()
    pairs = Pairs(
        ["a number"] * n, torch.where(first_wins, x[0], x[1])[:, None], torch.where(first_wins, x[1], x[0])[:, None]
    )
    noise = random(n, 1, seed=7), random(n, 1, seed=8)
    drawn = (noise[0], noise[0] if shared else noise[1])
    errors = dpo.pair_errors(policy, pairs, policy.encode(pairs.prompts), torch.zeros(n, dtype=torch.long), drawn)
    # errors are quadratic in the shift D: log-ratio = D lin + D^2 quad, and quad is the same of both images
    lin = 2 * (errors.log_ratios[0] - errors.log_ratios[1]).detach()  # at D = 1 and beta' = 1
    best = brentq(lambda shift: float((lin * (-shift * lin).sigmoid()).mean()), -1.0, 60.0)
    return best * 2 * slope**2


@pytest.mark.parametrize(("alpha", "attenuation"), [(0.3, 0.878), (0.6, 0.561), (0.8, 0.289), (0.95, 0.073)])
def test_independent_noise_attenuates_what_is_learned_and_shared_noise_does_not(alpha, attenuation):
    """Errors in variables. Standard errors of 200,000 pairs: some .005 (shared), .003 (independent)."""
    assert fitted_shift(alpha**2, shared=True) == pytest.approx(1.0, abs=0.02)
    assert fitted_shift(alpha**2, shared=False) == pytest.approx(attenuation, abs=0.01)


def test_training_finds_the_exact_optimum_of_a_level():
    """Check 4 by the loop: Delta = g / (2 beta' k^2), with noise in the labels; D = 1, so beta = 2 beta'."""
    policy, slope = shifted(0.64, 0.0)
    x = random(2, 8_000, seed=1)
    labeller = bradley_terry(lambda samples, prompts: samples[:, 0])
    preference, _ = labeller(x[0, :, None], x[1, :, None], ["a number"] * 8_000, seed(2))
    won = preference.bool()[:, None]
    pairs = Pairs(["a number"] * 8_000, torch.where(won, *x[..., None]), torch.where(won, *x.flip(0)[..., None]))
    config = dpo.Config(num_iterations=140, batch_size=256, pairs_per_pass=256, beta=4.0, learning_rate=0.02,
                        warmup_updates=0)  # fmt: skip
    shifts = []
    for _ in dpo.train(policy, pairs, config, seed(0), levels=lambda n, g: torch.zeros(n, dtype=torch.long)):
        shifts.append(-float(policy.network.residual.theta[0].detach()) / slope)
    mean = sum(shifts[60:]) / 80
    assert mean == pytest.approx(1 / (2 * 2 * slope**2), rel=0.06)  # 1.085


# ---- check 6, and other limits


def test_a_small_beta_is_linear_in_the_errors():
    errors = dpo.PairErrors(*(random(5, seed=s).square() for s in range(4)))
    found = 4 / 1e-6 * (dpo.preference_loss(errors, dpo.Config(beta=1e-6)) - math.log(2))
    torch.testing.assert_close(found, (errors[0] - errors[1]) - (errors[2] - errors[3]), atol=1e-5, rtol=0)


def test_variants_at_their_limits():
    errors = dpo.PairErrors(*(random(5, seed=s).square() for s in range(4)))
    plain = dpo.preference_loss(errors, dpo.Config(beta=2.0))
    smoothed = dpo.preference_loss(errors, dpo.Config(beta=2.0, label_smoothing=0.1))
    wrong = dpo.preference_loss(dpo.PairErrors(errors[1], errors[0], errors[3], errors[2]), dpo.Config(beta=2.0))
    torch.testing.assert_close(smoothed, 0.9 * plain + 0.1 * wrong)
    torch.testing.assert_close(dpo.preference_loss(errors, dpo.Config(loss="sft")), errors.chosen)
    weight = torch.arange(5, dtype=F64)
    weighted = dpo.preference_loss(errors, dpo.Config(beta=2.0), weight)
    torch.testing.assert_close(weighted[1], plain[1])
    assert weighted[0] == pytest.approx(math.log(2)) and not torch.isclose(weighted[2], plain[2])


def test_sums_and_means_are_one_loss_with_another_beta():
    """Eq. 14's beta T omega is beta / 2 D here."""
    world = worlds.load("digits")
    world.policy.add_lora(rank=2)
    with torch.no_grad():
        for p in world.policy.parameters():
            p += 0.05
    pairs = some_pairs(world.policy, world.prompts, 4)
    given = world.policy, pairs, world.policy.encode(pairs.prompts), torch.tensor([10, 300, 600, 900])
    noise = tuple(random(4, *world.policy.latent_shape, seed=s) for s in (4, 5))
    means, sums = (dpo.pair_errors(*given, noise, reduction=r) for r in ("mean", "sum"))
    assert (means.chosen - means.chosen_reference).abs().min() > 1e-4
    ours, papers = (dpo.preference_loss(e, dpo.Config(beta=b)) for e, b in ((means, 64 * 30.0), (sums, 30.0)))
    torch.testing.assert_close(ours, papers, atol=1e-4, rtol=1e-4)


def test_half_precision_counts_in_float32_and_nothing_flows_into_the_reference():
    errors = dpo.PairErrors(*(random(5, seed=s).square().bfloat16().requires_grad_() for s in range(4)))
    loss = dpo.preference_loss(errors, dpo.Config(beta=3.0))
    full = dpo.PairErrors(*(error.detach().float() for error in errors))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dpo.preference_loss(full, dpo.Config(beta=3.0)))
    slopes = torch.autograd.grad(loss.sum(), errors, allow_unused=True)
    assert slopes[0].abs().min() > 0 and slopes[1].abs().min() > 0 and slopes[2] is None and slopes[3] is None


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_errors_of_another_target_are_those_of_a_network_that_says_it(target):
    """ring's network says the noise; the same said as v or x_0 has these errors."""
    policy = worlds.load("ring", schedule="cosine").policy
    policy.network.double()
    policy.to("cpu")
    pairs, levels = some_pairs(policy, ["a point"], 4), torch.tensor([3, 30, 60, 90])
    noise = random(4, 2, seed=4), random(4, 2, seed=5)
    errors = dpo.pair_errors(policy, pairs, policy.encode(pairs.prompts), levels, noise, target=target)
    signal, sigma = (part[:, None] for part in policy.signal_and_noise(levels))
    states = signal * pairs.chosen + sigma * noise[0]
    said = policy.noise_at(states, levels, policy.encode(pairs.prompts))
    clean = (states - sigma * said) / signal
    missed = {"epsilon": said - noise[0], "sample": clean - pairs.chosen,
              "v_prediction": signal * (said - noise[0]) - sigma * (clean - pairs.chosen)}  # fmt: skip
    torch.testing.assert_close(errors.chosen, missed[target].square().mean(1).detach(), check_dtype=False)


# ---- the loop


def test_noise_is_shared_by_default_and_not_otherwise(monkeypatch):
    world, seen = worlds.load("ring"), []
    pairs = some_pairs(world.policy, world.prompts)
    error = world.policy.training_error
    monkeypatch.setattr(
        world.policy,
        "training_error",
        lambda x, t, noise, *a, **k: seen.append((t, noise)) or error(x, t, noise, *a, **k),
    )
    for shared in (True, False):
        next(dpo.train(world.policy, pairs, dataclasses.replace(SMALL, shared_noise=shared)))
        (t, noise), (t_reference, noise_reference) = seen[-2:]
        (t_w, t_l), (w, l) = t.chunk(2), noise.chunk(2)  # noqa: E741
        assert torch.equal(t_w, t_l) and len(t_w.unique()) > 5 and len(w.unique(dim=0)) == 15
        assert torch.equal(w, l) == shared
        assert torch.equal(noise, noise_reference) and torch.equal(t, t_reference)


def test_what_later_papers_change():
    """noiser corrupts both images with what it returns, levels are those given; weights and labels meet their pairs."""
    world, asked, weighed = worlds.load("ring"), [], []
    pairs = some_pairs(world.policy, world.prompts)

    def noiser(policy, latents, levels, condition, noise):
        asked.append((latents, levels))
        return 0 * noise

    def objective(errors, config, weight, label):
        weighed.extend([weight, label])
        return dpo.preference_loss(errors, config, weight, label)

    given = dict(noiser=noiser, levels=lambda n, generator: torch.full((n,), 249), objective=objective)
    given |= dict(weights=torch.arange(23.0), labels=torch.arange(23) / 23)
    (row,) = fit(dpo.train(world.policy, pairs, dataclasses.replace(SMALL, num_iterations=1), **given), progress=False)
    ((both, levels),) = asked  # one call
    chosen, rejected = both.chunk(2)
    assert (levels == 249).all() and len(levels) == 30
    rows = [(pairs.chosen == x).all(1).nonzero().item() for x in chosen]
    assert torch.equal(pairs.rejected[rows], rejected)
    assert weighed[0].tolist() == rows  # each pair its own, wherever it stands in the batch
    assert torch.equal(weighed[1], torch.tensor(rows) / 23)
    latents = pairs.chosen[rows].float()
    condition = world.policy.encode(["a point"] * 15)
    given = latents, torch.full((15,), 249), torch.zeros(15, 2), condition
    error = world.policy.training_error(*given, reduction="mean", reference=True)  # as it was before the update
    assert row["error_chosen"] == pytest.approx(float(error.mean()), rel=1e-4)


def class_conditional(null_class=3):
    network = runpy.run_path(str(MODELS))["class_conditional"]()
    scheduler = runpy.run_path(str(MODELS))["sd_scheduler"]()
    policy = DiffusionPolicy(network, scheduler, class_names=["0", "1", "2"], null_class=null_class, num_steps=3)
    policy.train_all_weights()
    return policy


def texts(tmp_path):
    policy = DiffusionPolicy.from_pipeline(runpy.run_path(str(MODELS))["stable_diffusion"](tmp_path), num_steps=3)
    policy.add_lora(rank=2)
    return policy


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_prompts_are_left_out_for_both_images_and_the_reference(kind, tmp_path, monkeypatch):
    policy = class_conditional() if kind == "classes" else texts(tmp_path)
    names = ["0", "1", "2"] if kind == "classes" else ["abc", "de", "f"]
    name = "class_labels" if kind == "classes" else "encoder_hidden_states"
    pairs, seen = some_pairs(policy, names, 40), []
    error = policy.training_error
    monkeypatch.setattr(
        policy,
        "training_error",
        lambda x, t, z, condition, **k: seen.append(condition) or error(x, t, z, condition, **k),
    )
    without = policy.encode(["0" if kind == "classes" else "abc"], guided=True).unconditional[name][0]
    for share, low, high in ((0.0, 0, 0), (0.5, 5, 25), (1.0, 30, 30)):
        config = dataclasses.replace(SMALL, batch_size=30, pairs_per_pass=30, num_iterations=1, prompt_dropout=share)
        fit(dpo.train(policy, pairs, config, seed(0)), progress=False)
        sides = [condition.inputs[name].chunk(2) for condition in seen[-2:]]
        for chosen, rejected in sides:
            assert torch.equal(chosen, rejected) and torch.equal(chosen, sides[0][0])
            dropped = (chosen == without).flatten(1).all(1) if chosen.ndim > 1 else chosen == without
            assert low <= dropped.sum() <= high


def test_both_errors_may_rise_while_the_loss_falls():
    """Likelihood displacement, on labels without noise: what the metrics tell apart."""
    world = worlds.load("ring", schedule="cosine")
    pairs = draw_pairs(world.policy, by_reward(world.rewards["first_coordinate"]), world.prompts, 500, seed(0))
    config = dpo.Config(num_iterations=100, batch_size=128, beta=40.0, learning_rate=1e-3)
    fit(dpo.train(world.policy, pairs, config, seed(0)), progress=False)
    noise = torch.randn(500, 2, generator=seed(1))
    levels = torch.arange(500) % 100
    with torch.no_grad():
        given = world.policy, pairs, world.policy.encode(pairs.prompts), levels, (noise, noise)
        errors = dpo.pair_errors(*given)
    loss = dpo.preference_loss(errors, config).mean()
    assert loss < 0.9 * math.log(2)
    assert errors.chosen.mean() > errors.chosen_reference.mean()
    assert errors.rejected.mean() > errors.rejected_reference.mean() + (errors.chosen - errors.chosen_reference).mean()


def ring_gain(policy, world):
    return float(policy.sample(world.prompts * 512, generator=seed(9))[:, 0].mean())


@pytest.mark.parametrize("kind", ["diffusion", "flow", "consistency"])
def test_every_kind_of_policy_learns_and_its_implicit_reward_orders_new_pairs(kind):
    if kind == "flow":
        world = worlds.load("ring", model="flow")
        policy = world.policy
    else:
        world = worlds.load("ring", schedule="cosine", eta=0.0)
        policy = world.policy
    if kind == "consistency":
        policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=4, solver_steps=50)
        policy.train_all_weights()
    reward, before = by_reward(world.rewards["first_coordinate"]), ring_gain(policy, world)
    data = [draw_pairs(world.policy, reward, world.prompts, n, seed(n)) for n in (300, 150)]
    beta = 20.0 if kind == "flow" else 120.0
    config = dpo.Config(num_iterations=45, batch_size=128, beta=beta, learning_rate=2e-3, warmup_updates=5)
    rows = fit(dpo.train(policy, data[0], config, seed(0)), progress=False)
    assert sum(rows["accuracy"][-10:]) / 10 > 0.6
    assert ring_gain(policy, world) > before + 0.3
    held = [
        dpo.implicit_reward(policy, x, data[1].prompts, config, 12, seed(3)) for x in (data[1].chosen, data[1].rejected)
    ]
    assert (held[0] > held[1]).float().mean() > 0.65


def test_the_implicit_reward_is_the_mean_logit_and_zero_at_the_reference():
    policy, _ = shifted(0.64, 0.5)
    x = f64(1.2, -0.3)[:, None]
    config = dpo.Config(beta=2.0)
    levels = policy.draw_levels
    policy.draw_levels = lambda n, generator: torch.zeros(n, dtype=torch.long)
    reward = dpo.implicit_reward(policy, x, ["a number"] * 2, config, 5, seed(0))
    assert float(reward[0] - reward[1]) == pytest.approx(0.3456, abs=1e-6)
    # in units of x_0's error: (sigma / alpha)^2 times that
    other = dpo.implicit_reward(policy, x, ["a number"] * 2, dataclasses.replace(config, target="sample"), 5, seed(0))
    assert float(other[0] - other[1]) == pytest.approx(0.3456 * (0.6 / 0.8) ** 2, abs=1e-6)
    policy.draw_levels = levels
    policy.network.residual.theta.data.zero_()
    assert (dpo.implicit_reward(policy, x, ["a number"] * 2, config) == 0).all()


def test_costs_are_counted():
    world = worlds.load("ring")
    pairs = some_pairs(world.policy, world.prompts)
    rows = fit(dpo.train(world.policy, pairs, dataclasses.replace(SMALL, pairs_per_pass=4), seed(0)), progress=False)
    assert rows["network_evaluations"] == [15 * 2 * (3 + 1) * i for i in (1, 2, 3)]
    passes = dpo.floor(world.policy, dataclasses.replace(SMALL, pairs_per_pass=4), {})
    assert sum(passes["forward"]) + 3 * sum(passes["backward"]) == 15 * 2 * (3 + 1) and max(passes["forward"]) == 8
    assert rows["comparisons"] == [15, 30, 45] and rows["reward_queries"] == [0, 0, 0]
    few = fit(dpo.train(world.policy, pairs[:4], SMALL, seed(0)), progress=False)  # a batch is at most all of them
    assert few["comparisons"] == [4, 8, 12]


def test_a_run_is_resumed(tmp_path):
    def run(resume=None, number=0):
        world = worlds.load("ring")
        pairs = some_pairs(world.policy, world.prompts)
        steps = list(zip(dpo.train(world.policy, pairs, SMALL, seed(number), resume), range(9), strict=False))
        return torch.cat([p.detach().flatten() for p in world.policy.parameters()]), steps

    world = worlds.load("ring")
    pairs = some_pairs(world.policy, world.prompts)
    first = next(dpo.train(world.policy, pairs, SMALL, seed(0)))
    save_checkpoint(first.checkpoint(), tmp_path / "one.safetensors")
    resumed, rest = run(load_checkpoint(tmp_path / "one.safetensors"), 99)
    assert len(rest) == 2 and torch.equal(resumed, run()[0])


def test_what_cannot_train_is_refused():
    world = worlds.load("ring")
    pairs = some_pairs(world.policy, world.prompts)

    def refused(message, policy=world.policy, data=pairs, weights=None, **changes):
        with pytest.raises(ValueError, match=message):
            next(dpo.train(policy, data, dataclasses.replace(SMALL, **changes), weights=weights))

    with pytest.raises(Exception, match="Pairs"):  # beartype's here; ValueError by check without annotations
        next(dpo.train(world.policy, (pairs.chosen, pairs.rejected), SMALL))
    refused(r"the pairs hold \(3,\); this policy's states have shape \(2,\)", data=some_pairs(None, ["a"], shape=(3,)))
    broken = Pairs(["a point"] * 2, torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.zeros(2, 2))
    refused("1 of 2 pairs hold nan or inf", data=broken)
    refused("the pairs hold texts", data=Pairs(["a"], ["yes"], ["no"]))
    refused("label_smoothing belongs to loss 'dpo', not 'ipo'", loss="ipo", label_smoothing=0.1)
    refused(r"weights have shape \(3,\); expected \(23,\), none below 0", weights=torch.ones(3))
    refused("none below 0", weights=torch.full((23,), -1.0))
    refused("none below 0", weights=torch.full((23,), math.nan))
    refused(r"beta is 0\.0; expected a finite number above 0", beta=0.0)
    refused("loss is 'kto'; expected one of", loss="kto")
    refused(r"prompt_dropout is 0\.1, but this policy's network has no input that stands for no", prompt_dropout=0.1)
    policy = class_conditional(null_class=None)
    refused(r"prompt_dropout is 0\.1, but", policy, some_pairs(policy, ["0"]), prompt_dropout=0.1)
    refused("unknown prompt '7'", policy, some_pairs(policy, ["0", "7"]))
    tokens = worlds.load("tokens")
    refused("the policy is a LanguagePolicy; this method needs one that denoises", tokens.policy)
    with pytest.raises(ValueError, match="num_draws is 0"):
        dpo.implicit_reward(world.policy, pairs.chosen, pairs.prompts, num_draws=0)


# ---- real pipelines


def pictures(folder, n=4):
    """A folder of images and a csv, as a person has them."""
    from PIL import Image

    rows = []
    for i in range(n):
        for side in (0, 1):
            values = (255 * torch.rand(8, 8, 3, generator=seed(10 * i + side))).byte()
            Image.fromarray(values.numpy()).save(folder / f"{i}{side}.png")
        rows.append(("abc" if i % 2 else "de", f"{i}0.png", f"{i}1.png", i % 2))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "image_0", "image_1", "label"), *rows])


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_pictures_train_an_adapter_that_the_pipeline_loads(kind, tmp_path):
    build = runpy.run_path(str(MODELS))[kind]
    pipe = build(tmp_path)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=3.0)
    policy.add_lora(rank=2)
    pictures(tmp_path)

    def encode(images):
        return pipe.vae.encode(2 * images - 1).latent_dist.sample(seed(0)) * pipe.vae.config.scaling_factor

    pairs = Pairs.from_images(tmp_path, encode=encode)
    assert pairs.chosen.shape == (4, *policy.latent_shape) and pairs.prompts == ["de", "abc", "de", "abc"]
    noise = policy.draw_noise(2, seed(1))
    before = policy.sample(["abc", "de"], noise)
    config = dpo.Config(num_iterations=2, beta=5000.0, learning_rate=0.01, warmup_updates=0, prompt_dropout=0.2)
    first, last = fit(dpo.train(policy, pairs, config, seed(0)), progress=False)
    assert first["loss"] == pytest.approx(math.log(2)) and first["grad_norm"] > 0 and last["loss"] != first["loss"]
    assert first["network_evaluations"] == 4 * 2 * 4  # unguided
    after = policy.sample(["abc", "de"], noise)
    assert (after - before).abs().max() > 1e-3
    policy.save_adapter(tmp_path / "lora")
    again = build(tmp_path)
    again.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    loaded = DiffusionPolicy.from_pipeline(again, num_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(loaded.sample(["abc", "de"], noise), after, atol=1e-5, rtol=0)


def test_a_latent_consistency_model_keeps_its_guidance_and_a_flow_pipeline_trains(tmp_path):
    models = runpy.run_path(str(MODELS))
    student = DiffusionPolicy.from_pipeline(models["stable_diffusion"](tmp_path), num_steps=3, guidance_scale=1.0)
    student = ConsistencyPolicy.from_diffusion(student, guidance_dim=8)
    student.train_all_weights()
    flow = FlowPolicy.from_pipeline(models["stable_diffusion_3"](tmp_path), num_steps=2, max_sequence_length=8)
    flow.add_lora(rank=2)
    for policy in (student, flow):
        pairs = some_pairs(policy, ["abc", "de"], 4)
        config = dpo.Config(num_iterations=2, beta=1000.0, learning_rate=1e-3, warmup_updates=0, prompt_dropout=0.5)
        first, last = fit(dpo.train(policy, pairs, config, seed(0)), progress=False)
        assert first["loss"] == pytest.approx(math.log(2)) and last["loss"] != first["loss"] and first["grad_norm"] > 0


def test_a_base_in_half_precision_keeps_what_trains_in_float32(tmp_path):
    pipe = runpy.run_path(str(MODELS))["stable_diffusion"](tmp_path).to(torch.bfloat16)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
    policy.add_lora(rank=2)
    start = [p.detach().clone() for p in policy.parameters()]
    pairs = some_pairs(policy, ["abc", "de"], 4)
    rows = fit(dpo.train(policy, pairs, dataclasses.replace(SMALL, beta=1000.0), seed(0)), progress=False)
    assert rows[0]["loss"] == pytest.approx(math.log(2))  # policy and reference in one precision
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in policy.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(policy.parameters(), start, strict=True))
    with torch.no_grad():
        trajectory = policy.rollout(["abc"], generator=seed(0))
        assert float(kl_to_base(policy, trajectory).mean()) > 0
