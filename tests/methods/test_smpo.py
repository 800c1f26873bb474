"""SmPO: the sheet's numbers, Diffusion-DPO as its limit, a weight a pair, a finite optimum or none, a real pipeline."""

import dataclasses
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minialign import pairs as pairs_of
from minialign import worlds
from minialign.kernels import soft_label_loss
from minialign.loop import fit
from minialign.methods import diffusion_dpo, smpo
from minialign.pairs import Pairs, by_reward, draw_pairs, relabel
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy

MODELS = Path(__file__).parent.parent / "policies" / "conftest.py"
SMALL = smpo.Config(num_iterations=3, batch_size=6, learning_rate=3e-3, beta=40.0)
FORWARD = dataclasses.replace(SMALL, smoothing="none", num_inversion_steps=0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def first(samples, prompts):
    return samples.flatten(1)[:, 0].float()


def compass(n=20, dtype=torch.float64, model="diffusion"):
    """A policy, and n pairs of its samples, labelled by their first coordinate."""
    world = worlds.load("compass", model=model, num_steps=5)
    world.policy.network.to(dtype)
    world.policy.to("cpu")
    drawn = torch.randn(2, n, 2, dtype=dtype, generator=rng(5))
    labels = by_reward(first)(*drawn, ["inner"] * n)
    return world.policy, pairs_of.arranged((["inner", "outer"] * n)[:n], *drawn, labels)


def trained(config, method=smpo, seed=0, **change):
    policy, pairs = compass()
    pairs = dataclasses.replace(pairs, **change)
    rows = fit(method.train(policy, pairs, config, rng(seed)), progress=False)
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), rows


# ---- the weights


def test_the_weights_to_the_sheets_digits():
    """Sheet, check 1: 2 sigmoid(x) - 1 = tanh(x / 2), at gamma 10; min-max makes scale and origin of scores vanish."""
    gap, due = f64(0.05, 0.2, 0.5, 1), f64(0.249948, 0.996680, 2.449187, 4.621172)
    weights = smpo.smooth_weights(gap, torch.zeros_like(gap), 0, 1, 10)
    torch.testing.assert_close(weights, due, atol=5e-7, rtol=0)
    r_l = f64(0.3, 0.1, 0.2, 0)  # another origin and scale: r = 4 r' - 7
    scores = 4 * (r_l + gap) - 7, 4 * r_l - 7, -7, -3
    torch.testing.assert_close(smpo.smooth_weights(*scores, 10), weights)
    p = smpo.smooth_labels(*scores)
    torch.testing.assert_close(10 * (2 * p - 1), weights)
    torch.testing.assert_close(p.logit(), gap)


def test_the_limits_of_the_weights():
    tie = smpo.smooth_weights(f64(2.0), f64(2.0), 0, 5, 10)
    assert tie.item() == 0 and smpo.smooth_labels(f64(2.0), f64(2.0), 0, 5).item() == 0.5
    assert smpo.smooth_weights(f64(5.0), f64(0.0), 0, 5, 3).item() == pytest.approx(3 * math.tanh(0.5))
    assert smpo.smooth_weights(f64(0.0), f64(5.0), 0, 5, 3).item() == pytest.approx(-3 * math.tanh(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_pairs(dtype):
    _, pairs = compass()
    weights = smpo.weights_of(pairs)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6) and weights.std() > 0.3
    assert weights.argsort().tolist() == pairs.strengths.argsort().tolist()
    span = pairs.strengths.max().item()
    due = 10 * (2 * (pairs.strengths.double() / span).sigmoid() - 1)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    given = dataclasses.replace(pairs, strengths=pairs.strengths.to(dtype))
    for score_range in (None, span):
        found = smpo.weights_of(given, smpo.Config(gamma=10, score_range=score_range and 1.01 * span))
        torch.testing.assert_close(found.double(), due, atol=10 * tolerance if score_range is None else 0.1, rtol=0)
    wide = smpo.weights_of(pairs, smpo.Config(gamma=10, score_range=1000 * span))  # margins small: proportional
    torch.testing.assert_close(wide, 10 * pairs.strengths / (2000 * span), rtol=1e-5, atol=0)


def test_pairs_whose_strengths_cannot_weigh_are_refused():
    policy, pairs = compass()
    n = len(pairs)
    for strengths, message in [
        (None, r"the pairs have no strengths.*relabel\(pairs, by_reward\(reward\)\)"),
        (torch.cat([f64(-0.1), torch.ones(n - 1).double()]), f"1 of {n} strengths are below 0.*relabel"),
        (torch.zeros(n), f"all {n} strengths are 0: every pair is a tie"),
        (torch.ones(n, 2), r"strengths of shape \(20, 2\); expected one each, \(20,\): sum over segments"),
        (torch.tensor([math.nan, *[1.0] * (n - 1)]), f"1 of {n} strengths are nan or inf"),
    ]:
        given = dataclasses.replace(pairs, strengths=strengths)
        for smoothing in ("margin", "label"):
            with pytest.raises(ValueError, match=message):
                next(smpo.train(policy, given, dataclasses.replace(SMALL, smoothing=smoothing)))
        next(smpo.train(policy, given, dataclasses.replace(SMALL, smoothing="none")))  # asks for none
    for change, message in [
        ({"score_range": 0.01}, "score_range is 0.01, but one strength is"),
        ({"smoothing": "label", "loss": "ipo"}, "smoothing 'label' is a loss of its own"),
        ({"smoothing": "label", "label_smoothing": 0.1}, "label_smoothing at 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(smpo.train(policy, pairs, dataclasses.replace(SMALL, **change)))
    for change, message in [
        ({"gamma": 0}, "gamma is 0; expected a finite number above 0 or None"),
        ({"num_inversion_steps": -1}, "num_inversion_steps is -1"),
        ({"level": "next"}, "level is 'next'; expected one of 'new', 'old'"),
        ({"smoothing": "labels"}, "expected one of 'margin', 'label', 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
    other = dataclasses.replace(pairs, chosen=pairs.chosen[:, :1], rejected=pairs.rejected[:, :1], strengths=None)
    with pytest.raises(ValueError, match=r"the pairs hold \(1,\); this policy's states have shape \(2,\)"):
        next(smpo.train(policy, other, SMALL))


def test_human_labels_are_refused_and_relabelled_ones_are_not():
    policy, pairs = compass(60)
    human = pairs_of.bradley_terry(first)(pairs.chosen, pairs.rejected, pairs.prompts, rng(2))
    human = pairs_of.arranged(pairs.prompts, pairs.chosen, pairs.rejected, human)
    with pytest.raises(ValueError, match=r"of 60 strengths are below 0: there the label contradicts"):
        next(smpo.train(policy, human, SMALL))
    again = relabel(human, by_reward(first))
    assert (again.chosen[:, 0] > again.rejected[:, 0]).all()
    next(smpo.train(policy, again, SMALL))


# ---- Diffusion-DPO is its limit


def test_without_smoothing_and_inversion_it_is_diffusion_dpo_bit_for_bit():
    """Sheet, check 2."""
    config = {f.name: getattr(FORWARD, f.name) for f in dataclasses.fields(diffusion_dpo.Config)}
    ours, rows = trained(FORWARD)
    theirs, other = trained(diffusion_dpo.Config(**config), diffusion_dpo)
    assert torch.equal(ours, theirs) and [r["loss"] for r in rows] == [r["loss"] for r in other]
    alike, _ = trained(
        dataclasses.replace(FORWARD, smoothing="margin", gamma=1 / math.tanh(0.5)),
        strengths=torch.full((20,), 0.7, dtype=torch.float64),
    )
    torch.testing.assert_close(alike, ours, atol=1e-9, rtol=0)  # every margin the widest, w = 1


def test_beta_and_gamma_matter_as_their_product_alone():
    one, _ = trained(dataclasses.replace(SMALL, beta=40.0, gamma=10.0))
    other, _ = trained(dataclasses.replace(SMALL, beta=400.0, gamma=1.0))
    third, _ = trained(dataclasses.replace(SMALL, beta=40.0, gamma=1.0))
    torch.testing.assert_close(other, one, atol=1e-7, rtol=0)
    assert not torch.allclose(third, one, atol=1e-5)


def errors(chosen, rejected):
    zero = torch.zeros_like(chosen)
    return diffusion_dpo.PairErrors(chosen, rejected, zero, zero)


def test_a_tie_has_loss_log_two_and_no_gradient():
    """Sheet, check 2: w = 0. The second pair, w = 2, by hand: u = -beta / 2 (.3 - .5) = .4, loss softplus(-.8)."""
    chosen = f64(0.3, 0.3).requires_grad_()
    loss = diffusion_dpo.preference_loss(errors(chosen, f64(0.5, 0.5)), smpo.Config(beta=4.0), f64(0, 2))
    torch.testing.assert_close(loss, f64(math.log(2), math.log1p(math.exp(-0.8))))
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, f64(0, 2 * 4 / 2 / (1 + math.exp(0.8))))


@pytest.mark.parametrize("smoothing", ["margin", "label"])
def test_each_pair_has_its_own_weight_or_label(smoothing, monkeypatch):
    """The authors' code takes the batch's first for all. Cut in passes of 4 and 2, rows drawn at random."""
    policy, pairs = compass()
    due = smpo.weights_of(pairs) if smoothing == "margin" else smpo.smooth_labels(*smpo.scores_of(pairs, SMALL))
    due, met, asked = dict(zip(pairs.strengths.tolist(), due.tolist(), strict=True)), [], []
    pair_errors, preference_loss = diffusion_dpo.pair_errors, diffusion_dpo.preference_loss

    def errors_of(policy, batch, *rest, **named):
        met.append(batch.strengths)
        return pair_errors(policy, batch, *rest, **named)

    def loss_of(errors, config, weight, label):
        asked.append(weight if smoothing == "margin" else label)
        assert (label is None) if smoothing == "margin" else weight == 1
        return preference_loss(errors, config, weight, label)

    monkeypatch.setattr(diffusion_dpo, "pair_errors", errors_of)
    monkeypatch.setattr(diffusion_dpo, "preference_loss", loss_of)
    config = dataclasses.replace(SMALL, pairs_per_pass=4, smoothing=smoothing)
    fit(smpo.train(policy, pairs, config, rng()), progress=False)
    assert [len(values) for values in asked] == [4, 2] * 3
    for strengths, values in zip(met, asked, strict=True):
        assert values.tolist() == pytest.approx([due[s] for s in strengths.tolist()])


# ---- margins are scaled, not bounded; labels that are smoothed have an optimum


def test_smoothed_margins_have_no_stationary_point_and_smoothed_labels_have_one():
    """Sheet, check 4."""
    u, p = torch.linspace(-20, 20, 81, dtype=torch.float64), f64(0.6, 0.73, 0.9).view(3, 1)
    u = u.expand(3, -1).clone().requires_grad_()
    weight = 10 * (2 * p - 1)
    (gradient,) = torch.autograd.grad(F.softplus(-weight * u).sum(), u)
    torch.testing.assert_close(gradient, -weight * (-weight * u).sigmoid())
    assert (gradient < 0).all()
    best = (p / (1 - p)).log().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_label_loss(best, p).sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-15, rtol=0)
    (gradient,) = torch.autograd.grad(soft_label_loss(u, p.expand_as(u)).sum(), u)
    assert ((gradient > 0) == (u > best)).all()


def test_smoothed_labels_have_their_optimum_in_the_linear_world_and_smoothed_margins_go_past_it():
    """One Gaussian, r = x, a shift at one level: every logit is 2 beta' k^2 Delta (x_w - x_l), sheet diffusion_dpo.

    cDPO's optimum, logit p = (x_w - x_l) / range, asks all pairs for the same shift: all their gradients vanish there.
    """
    drawn = torch.randn(2, 40, 1, generator=rng(1))
    pairs = pairs_of.arranged(["a number"] * 40, *drawn, by_reward(first)(*drawn, ["a number"] * 40))
    policy = worlds.load("line", schedule="cosine", num_steps=10).policy
    policy.to("cpu")
    level, theta = policy.timesteps[4].expand(40), policy.network.residual.theta
    variance = policy.scheduler.alphas_cumprod[level[0]] * (1 - policy.scheduler.alphas_cumprod[level[0]])  # k^2, v = 1
    config, noise = smpo.Config(beta=4.0), torch.randn(40, 1, generator=rng(2))
    best = float(1 / (pairs.strengths.max() * 2 * 2 * variance.sqrt()))  # k Delta, beta' = 2
    changed = {
        "label": (1.0, smpo.smooth_labels(*smpo.scores_of(pairs, config))),
        "margin": (smpo.weights_of(pairs, config), None),
    }
    found = {}
    for smoothing, given in changed.items():
        for share in (0.8, 1.0, 1.2, 5.0):
            theta.data[4], theta.grad = -share * best, None
            errors = diffusion_dpo.pair_errors(policy, pairs, policy.encode(pairs.prompts), level, (noise, noise))
            diffusion_dpo.preference_loss(errors, config, *given).mean().backward()
            found[smoothing, share] = -theta.grad[4].item()
    assert found["label", 1.0] == pytest.approx(0, abs=1e-5)
    assert found["label", 0.8] < -0.01 and found["label", 1.2] > 0.01  # pushed back from either side
    assert all(found["margin", share] < -1e-3 for share in (0.8, 1.0, 1.2, 5.0))


class Shifted(nn.Module):
    """The exact noise of N(0, 1), sigma x, moved by -k Delta = -sigma alpha Delta: a mean shift of Delta."""

    def __init__(self, alphas_cumprod, shift):
        super().__init__()
        self.register_buffer("alpha_bar", alphas_cumprod)
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def reference_forward(self, x, t, **inputs):
        return (1 - self.alpha_bar[t]).sqrt().view(-1, 1) * x

    def forward(self, x, t, **inputs):
        alpha_bar = self.alpha_bar[t].view(-1, 1)
        return self.reference_forward(x, t) - ((1 - alpha_bar) * alpha_bar).sqrt() * self.shift


@pytest.mark.parametrize("renoise", [True, False])
def test_the_logit_of_the_linear_world_to_the_sheets_digits(renoise):
    """Sheet, check 5, h from the sheet inpo, check 3: alpha .8, sigma .6, s 1: k .48, h = .5556 k = .266667.

    u = w 2 beta' k h Delta (x_w - x_l) = w * 2 * .48 * .266667 * .5 * 1.5 = .192 w, at beta' = 1, beta = 2.
    """
    from diffusers import DDIMScheduler

    ends = [math.acos(0.9999**0.5), math.acos(0.8)]
    scheduler = DDIMScheduler(num_train_timesteps=401, clip_sample=False)
    scheduler.alphas_cumprod = torch.linspace(*ends, 401, dtype=torch.float64).cos() ** 2
    policy = DiffusionPolicy(Shifted(scheduler.alphas_cumprod, 0.5), scheduler, latent_shape=(1,), num_steps=2)
    pairs, level = Pairs(["", ""], f64(1.2, 1.2).view(2, 1), f64(-0.3, -0.3).view(2, 1)), torch.tensor([400, 400])
    condition, noiser, nothing = policy.encode(pairs.prompts), smpo.Inversion(400, renoise=renoise), torch.empty(2, 1)
    noise = tuple(noiser(policy, x, level, condition, nothing) for x in (pairs.chosen, pairs.rejected))
    found = diffusion_dpo.pair_errors(policy, pairs, condition, level, noise)
    weight = smpo.smooth_weights(f64(0.5, 0.05), f64(0, 0), 0, 1, 10)
    loss = diffusion_dpo.preference_loss(found, smpo.Config(beta=2.0), weight)
    logit = -(loss.exp() - 1).log()
    torch.testing.assert_close(logit, f64(2.449187, 0.249948) * 0.192, atol=1e-4 if renoise else 2e-3, rtol=0)


# ---- the noiser in the loop


@pytest.mark.parametrize("model", ["diffusion", "flow"])
def test_what_is_compared_is_a_function_of_the_image(model):
    """Inverted by the base, whatever the policy has become and the noise is; corrupting by tau gives x_t back."""
    policy, pairs = compass(6, model=model)
    level = (
        torch.tensor([0.1, 0.4, 0.6, 0.8, 0.9, 1.0]) if model == "flow" else torch.tensor([1, 40, 200, 500, 800, 999])
    )
    condition, nothing = policy.encode(pairs.prompts), torch.zeros(6, 2)
    one = smpo.Inversion(renoise=True)(policy, pairs.chosen, level, condition, nothing)
    with torch.no_grad():
        policy.network.residual.net[-1].bias.fill_(0.5)
    spent = policy.network_evaluations
    other = smpo.Inversion(renoise=True)(policy, pairs.chosen, level, condition, torch.ones(6, 2))
    assert torch.equal(one, other) and not one.requires_grad and policy.network_evaluations - spent == 6 * 10
    differ = [
        smpo.Inversion(5)(policy, pairs.chosen, level, condition, nothing),
        smpo.Inversion(5, renoise=True, level="old")(policy, pairs.chosen, level, condition, nothing),
    ]
    assert all((tau - one).abs().max() > 1e-3 for tau in differ)
    levels = smpo.invertible_levels(policy, 4000, rng())
    assert levels.min() > 0 and (model == "flow" or set(range(1, 20)) <= set(levels.tolist()))


def test_the_arms_of_the_ladder_differ_and_their_costs_are_counted():
    """A step: 2 images of 6 pairs, forward and backward (3) and under the reference (1), and their inversions."""
    runs = {}
    for name, change, evaluations in [
        ("forward", {"num_inversion_steps": 0}, 4), ("ddim", {"renoise": False}, 4 + 5), ("renoise", {}, 4 + 10),
        ("old level", {"level": "old"}, 4 + 10), ("label", {"smoothing": "label"}, 4 + 10),
    ]:  # fmt: skip
        runs[name], rows = trained(dataclasses.replace(SMALL, **change))
        assert [row["network_evaluations"] for row in rows] == [12 * evaluations * n for n in (1, 2, 3)]
        assert rows[-1]["comparisons"] == 18 and rows[-1]["reward_queries"] == 0
        assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["accuracy"] == 0.5
        assert all(row["grad_norm"] > 0 for row in rows)
    names = list(runs)
    assert all((runs[a] - runs[b]).abs().max() > 1e-5 for i, a in enumerate(names) for b in names[:i])


def test_a_consistency_model_has_no_path_to_invert():
    _, pairs = compass(6, torch.float32)
    policy = ConsistencyPolicy.from_diffusion(worlds.load("compass").policy, num_steps=4)
    policy.train_all_weights()
    with pytest.raises(ValueError, match=r"ConsistencyPolicy, which draws by jumps.*num_inversion_steps to 0"):
        next(smpo.train(policy, pairs, SMALL))
    assert next(smpo.train(policy, pairs, dataclasses.replace(SMALL, num_inversion_steps=0))).metrics["grad_norm"] > 0


# ---- on the ecosystem's classes


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stable_diffusion_pipeline_learns_and_its_own_loader_reads_what_it_learned(tmp_path, dtype):
    stable_diffusion = runpy.run_path(str(MODELS))["stable_diffusion"]
    policy = DiffusionPolicy.from_pipeline(
        stable_diffusion(tmp_path).to(dtype=dtype), num_steps=3, guidance_scale=1.0, eta=0.0
    )
    pairs = draw_pairs(policy, by_reward(brightness), ["a dog", "a cat"], 6, rng())
    pairs.save(tmp_path / "pairs.safetensors")
    pairs = Pairs.load(tmp_path / "pairs.safetensors")
    policy.add_lora(rank=2)
    config = dataclasses.replace(SMALL, num_iterations=2, num_inversion_steps=2, learning_rate=1e-2, prompt_dropout=0.2)
    rows = fit(smpo.train(policy, pairs, config), progress=False)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    noise = policy.draw_noise(2, rng(3))
    policy.save_adapter(tmp_path / "adapter")
    again = stable_diffusion(tmp_path).to(dtype=dtype)
    before = DiffusionPolicy.from_pipeline(again, num_steps=3, guidance_scale=1.0, eta=0.0).sample(["a dog"] * 2, noise)
    again.load_lora_weights(tmp_path / "adapter")
    redrawn = DiffusionPolicy.from_pipeline(again, num_steps=3, guidance_scale=1.0, eta=0.0).sample(
        ["a dog"] * 2, noise
    )
    images = policy.sample(["a dog"] * 2, noise)
    torch.testing.assert_close(redrawn, images, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    if dtype == torch.float32:
        assert (images - before).abs().max() > 1e-3
