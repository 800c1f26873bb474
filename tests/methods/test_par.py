"""Reward shapings: the sheet's numbers, invariances, running statistics, and a shaped reward inside real loops."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from minialign import worlds
from minialign.exact import exponential_tilt
from minialign.kernels import group_advantages
from minialign.loop import fit
from minialign.methods import ddpo, par
from minialign.methods.par import Config, Shaped, shape_reward
from minialign.settings import annotations
from minialign.statistics import Moments

F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


R, REFS = f64(2.0, -1.0, 0.3), f64(1.0, 0.5, -2.0, 0.0, 0.3, 0.3).view(3, 2)


def test_check_1_par_and_lsc_by_hand():
    r, refs = f64(2.0), f64(1.0, 0.5)[None]
    assert float(shape_reward(r, refs)) == pytest.approx(0.774317, abs=1e-6)  # (sigmoid(1) + sigmoid(1.5)) / 2
    assert float(shape_reward(r, refs, "lsc")) == pytest.approx(-0.345935, abs=1e-6)
    assert float(shape_reward(f64(0.7), f64(0.7)[None])) == 0.5
    assert float(shape_reward(f64(2.0), f64(0.5)[None]) + shape_reward(f64(0.5), f64(2.0)[None])) == pytest.approx(1)
    # one reference has no spread: q is the reference itself, up to 1e-5
    assert float(shape_reward(r, f64(1.0)[None], "lsc")) == pytest.approx(math.log(sigmoid(1)), abs=1e-5)


def slow(method, r, refs, s, c):
    """One sample at a time, from the sheet's table."""
    mean, std, low, high = s
    poly = np.polyfit(np.linspace(-5, 5, 100), 1 / (1 + np.exp(-np.linspace(-5, 5, 100))), 5)

    def fitted(z):
        return 0.0 if z < -5 else 1.0 if z > 5 else float(np.polyval(poly, z))

    average = lambda f: sum(f(r - ref) for ref in refs) / len(refs)  # noqa: E731
    spread = np.std(refs, ddof=1) + 1e-5
    return {
        "vanilla": r, "centred": r - sum(refs) / len(refs), "ceil": min(r, c.ceiling), "meanstd": (r - mean) / std,
        "clip": min(max(r, mean - std), mean + std), "minmax": (r - low) / (high - low),
        "lsc": math.log(sigmoid(r - (sum(refs) / len(refs) + 1.0364334 * spread))), "sigmoid": sigmoid(c.k * r),
        "tanh": math.tanh(r), "tanh_centred": average(math.tanh), "poly": fitted(r), "poly_centred": average(fitted),
        "sgfc": average(lambda z: sigmoid(c.k * (z - 3))), "par": average(lambda z: sigmoid(c.k * z)),
    }[method]  # fmt: skip


def test_every_shaping_can_be_asked_for():
    assert set(get_args(annotations(Config)["method"])) == set(par.SHAPINGS)


@pytest.mark.parametrize("method", par.SHAPINGS)
@pytest.mark.parametrize("k", [1.0, 2.0])
def test_every_shaping_against_the_table(method, k):
    config = Config(method, k=k, ceiling=1.5)
    r, refs = torch.cat([R, f64(7.0, -9.0)]), torch.cat([REFS, f64(0, 1, 2, -1).view(2, 2)])
    statistics = Moments.of(r)
    s = [float(v) for v in (statistics.mean, statistics.std, statistics.low, statistics.high)]
    expected = [slow(method, float(a), b.tolist(), s, config) for a, b in zip(r, refs, strict=True)]
    got = shape_reward(r, refs, config, statistics)
    assert got.tolist() == pytest.approx(expected, abs=2e-6)  # the polynomial's coefficients have seven digits
    assert not shape_reward(r.requires_grad_(), refs, config, statistics).requires_grad


@pytest.mark.parametrize("method", ["par", "centred", "tanh_centred", "lsc", "sgfc", "poly_centred"])
def test_check_2_a_shift_of_a_prompt_changes_nothing(method):
    shift = f64(0.4, -3.0, 11.0)
    torch.testing.assert_close(
        shape_reward(R + shift, REFS + shift[:, None], method), shape_reward(R, REFS, method), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("method", ["sigmoid", "ceil", "meanstd", "minmax", "clip"])
def test_check_2_but_it_does_change_the_uncentred_ones(method):
    shift = f64(0.4, -3.0, 11.0)
    a, b = (shape_reward(r, None, method, Moments.of(r)) for r in (R, R + shift))
    centred = (a - a.mean()) - (b - b.mean())
    assert centred.abs().max() > 0.01


def test_check_3_slopes():
    zeros = torch.zeros(4, 1, dtype=F64)
    r, h = f64(0.0, 1.0, 3.0, 5.0), 1e-6
    slope = (shape_reward(r + h, zeros) - shape_reward(r - h, zeros)) / (2 * h)
    assert slope.tolist() == pytest.approx([0.25, 0.196612, 0.045177, 0.006648], abs=1e-6)
    slope = (shape_reward(r + h, zeros, "sgfc") - shape_reward(r - h, zeros, "sgfc")) / (2 * h)
    assert float(slope[0]) == pytest.approx(0.045177, abs=1e-6) and slope.argmax() == 2


def test_check_4_a_bounded_reward_bounds_the_optimum():
    prior, f, beta = f64(0.4, 0.3, 0.2, 0.1), f64(0.1, 0.4, 0.6, 0.95), 0.5
    optimum = exponential_tilt(prior.log(), f, beta)[0].exp()
    assert optimum.tolist() == pytest.approx([0.196301, 0.268263, 0.266801, 0.268635], abs=1e-6)
    kl = float((optimum * (optimum / prior).log()).sum())
    width = float(f.max() - f.min())
    assert kl == pytest.approx(0.172623, abs=1e-6) and kl <= width**2 / (8 * beta**2) == pytest.approx(0.361250)


def test_check_5_affine_shapings_are_vanilla_under_group_normalisation():
    r, group = torch.randn(20, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(5)
    refs = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(1))[group]
    vanilla = group_advantages(r, group, eps=1e-12)
    for method in ("centred", "meanstd", "minmax"):
        shaped = shape_reward(r, refs, method, Moments.of(r))
        torch.testing.assert_close(group_advantages(shaped, group, eps=1e-12), vanilla, rtol=0, atol=1e-6)
    assert (group_advantages(shape_reward(r, refs), group, eps=1e-12) - vanilla).abs().max() > 0.01


def test_check_6_running_statistics():
    s = Moments.of(f64(1, 2, 3)).merge(Moments.of(f64(4)))
    assert (float(s.mean), float(s.var), float(s.low), float(s.high), float(s.count)) == (2.5, 1.25, 1, 4, 4)
    batches = torch.randn(7, 11, dtype=F64, generator=torch.Generator().manual_seed(0)).exp()
    s = Moments.of(batches[0])
    for batch in batches[1:]:
        s = s.merge(Moments.of(batch))
    torch.testing.assert_close(s.var, batches.flatten().var(correction=0))
    torch.testing.assert_close(s.mean, batches.mean())


def test_bfloat16_rewards_do_not_saturate():
    """Sheet, trap 5: the formula in bfloat16 gives exactly 1 from 5.5625 on."""
    r = torch.tensor([5.75, 7.0], dtype=torch.bfloat16)
    f = shape_reward(r, torch.zeros(2, 1, dtype=torch.bfloat16))
    assert f.dtype == torch.float32 and (f < 1).all() and f[0] < f[1]


def test_a_running_clip_drifts_with_the_policy_and_a_frozen_one_does_not():
    """Sheet, trap 3."""
    references = {"p": f64(-1.0, 1.0, 0.0, 0.5)}
    bounds = {}
    for freeze in (False, True):
        shaped = Shaped(lambda samples, prompts: samples, references, Config("clip", freeze=freeze))
        for level in range(50):
            out = shaped(torch.full((8,), float(level)), ["p"] * 8)
        bounds[freeze] = float(out.max())
    assert bounds[True] == pytest.approx(float(f64(-1, 1, 0, 0.5).mean() + f64(-1, 1, 0, 0.5).std(correction=0)))
    assert bounds[False] > 20


def test_shaped_looks_up_the_prompt_s_own_references_and_keeps_the_raw_reward():
    references = {"a": torch.tensor([0.0]), "b": torch.tensor([10.0])}
    shaped = Shaped(lambda samples, prompts: samples, references)
    out = shaped(torch.tensor([1.0, 1.0]), ["b", "a"])
    assert out.tolist() == pytest.approx([sigmoid(-9), sigmoid(1)])
    assert shaped.raw.tolist() == [1, 1] and shaped.__name__.startswith("par of")
    with pytest.raises(ValueError, match="no reference rewards for prompt 'c'"):
        shaped(torch.tensor([1.0]), ["c"])


def test_the_length_penalty_comes_first():
    shaped = Shaped(
        lambda samples, prompts: samples.sum(1), None, Config("minmax", length_limit=2), length_of=lambda s: f64(1, 5)
    )
    shaped(torch.ones(2, 3), ["p", "p"])  # rewards 3 and 3; the second loses .03
    assert float(shaped.statistics.low) == pytest.approx(2.97) and float(shaped.statistics.high) == pytest.approx(3)


# What equal rewards r are worth, with references that score r as well; "lsc" adds 1e-5 to their spread.
EQUAL = {
    "meanstd": lambda r: 0, "minmax": lambda r: 0, "clip": lambda r: r, "centred": lambda r: 0,
    "tanh_centred": lambda r: 0, "par": lambda r: 0.5, "poly_centred": lambda r: 0.5, "vanilla": lambda r: r,
    "lsc": lambda r: -math.log(2), "sgfc": lambda r: sigmoid(-3),
}  # fmt: skip


@pytest.mark.parametrize("method", EQUAL)
@pytest.mark.parametrize("r", [0.0, 0.3, -7.1])
@pytest.mark.parametrize("num", [1, 4])
def test_equal_rewards_are_no_signal(method, r, num):
    """Nor is a single one: no spread to divide by, in any batch, and no rounding made large. The next one counts."""
    references = {"x": torch.full((3,), r)}
    shaped = Shaped(lambda samples, prompts: samples, references, Config(method))
    for _ in range(3):
        out = shaped(torch.full((num,), r), ["x"] * num)
        assert out.tolist() == pytest.approx([EQUAL[method](r)] * num, abs=2e-5)
        assert (out == out[0]).all()
    if method in ("meanstd", "minmax"):
        assert (out == 0).all()
        after = shaped(torch.tensor([r + 1.0, r]), ["x"] * 2)
        n = 3 * num + 2  # one of them a unit above the others: mean 1 / n, variance (1 - 1 / n) / n
        std = math.sqrt((1 - 1 / n) / n)
        expected = [1, 0] if method == "minmax" else [(1 - 1 / n) / std, -1 / n / std]
        assert after.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["meanstd", "minmax"])
def test_frozen_statistics_without_spread_are_refused(method):
    with pytest.raises(ValueError, match=r"all have the same reward, 0.3.*freeze=False"):
        Shaped(len, {"x": torch.full((4,), 0.3), "y": torch.full((4,), 0.3)}, Config(method, freeze=True))
    Shaped(len, {"x": torch.full((4,), 0.3), "y": torch.full((4,), 0.4)}, Config(method, freeze=True))
    Shaped(len, {"x": torch.full((4,), 0.3)}, Config("clip", freeze=True))  # bounds, no division


STATISTICS_OF_TWO = """
import sys, torch
from accelerate import PartialState
from minialign import worlds
from minialign.methods import ddpo, par
state = PartialState(cpu=True)
sys.path[:0] = [{folder!r} + "/methods"]
from test_par import shaped_run
statistics, saved = shaped_run()
both = [None, None]
torch.distributed.all_gather_object(both, (statistics, saved))
if state.is_main_process:
    torch.save(both, {out!r})
state.destroy_process_group()
"""


def shaped_run():
    """(the running statistics, and those in the checkpoint) after two rounds of DDPO with 7 x 2 rows."""
    world = worlds.load("compass", num_steps=5)
    world.policy.network.double()
    world.policy.to("cpu")
    shaped = Shaped(lambda samples, prompts: -(samples - 1).square().sum(1), config=Config("meanstd"))
    config = ddpo.Config(num_iterations=2, num_prompts=7, group_size=2, num_minibatches=1, steps_per_pass=5)
    *_, last = ddpo.train(world.policy, shaped, world.prompts, config, torch.Generator().manual_seed(0))
    saved = {key: value.clone() for key, value in last.checkpoint().items() if key.startswith("reward.statistics.")}
    return shaped.statistics.tensors(), saved


def test_running_statistics_are_in_the_checkpoint_and_those_of_all_processes(two_processes):
    one, saved = shaped_run()
    assert {key.rpartition(".")[2]: value for key, value in saved.items()} == one
    assert one["count"] == 28
    first, second = two_processes(STATISTICS_OF_TWO)
    assert first == second
    theirs, theirs_saved = first
    assert {key.rpartition(".")[2]: value for key, value in theirs_saved.items()} == theirs
    for name, value in one.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: shape_reward(R, REFS, "parr"), "method is 'parr'; expected one of 'vanilla', 'centred'"),
        (lambda: shape_reward(R), "needs references"),
        (lambda: shape_reward(R, config="clip"), "needs statistics"),
        (lambda: shape_reward(R, config=Config("vanilla", length_limit=3)), "no lengths"),
        (lambda: Shaped(len), "needs references"),
        (lambda: Shaped(len, config=Config("clip", freeze=True)), "needs references"),
        (lambda: Shaped(len, config=Config("vanilla", length_limit=3)), "length_of"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_shaped_image_reward_trains_by_ddpo():
    """The same loop, the same policy: the reward is wrapped, nothing else. Shaping is seen by the loop, raw is kept."""
    world = worlds.load("compass")
    reward = world.rewards["side"]
    references = par.reference_rewards(world.policy, reward, world.prompts, 16, torch.Generator().manual_seed(0))
    assert set(references) == set(world.prompts) and references[world.prompts[0]].shape == (16,)
    shaped = Shaped(reward, references)
    world.policy.train_all_weights()
    config = ddpo.Config(num_iterations=3, num_prompts=16, group_size=4, num_minibatches=2, learning_rate=3e-3)
    history = fit(ddpo.train(world.policy, shaped, world.prompts, config), progress=False)
    assert all(0 < value < 1 for value in history["reward"]) and shaped.raw.shape == (64,)
