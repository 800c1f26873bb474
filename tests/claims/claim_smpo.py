"""SmPO's claims in miniature, in `ring` (eight modes, 100 cosine levels, an ODE sampler): which part does the work.

2,000 pairs of the base's samples, one reward r, the first coordinate. People label by Bradley-Terry, the reward model
by r itself. A ladder, each rung with all that stands below it, at equal optimizer steps:

    1 human labels        Diffusion-DPO                                  2,000 human labels
    2 relabelled          the reward model says who won                  4,000 reward queries, once, here and above
    3 DDIM inversion      x_t from the sampler read backwards
    4 ReNoise             a second evaluation each step
    5 smoothed            the logits weighed by margin, mean weight 1: SmPO

Beside it: smoothing without inversion, cDPO (labels smoothed, not margins), ReNoise at the official code's level, and
smoothing alone, by |2 p - 1|, on human labels at a third of beta. Measured at five moments: mean reward of 4,000
samples, their mean log-density under the base (quality), network evaluations.

Run by `minialign replicate smpo`; tests/claims/test_claims.py runs a small part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import diffusion_dpo, smpo
from minialign.pairs import bradley_terry, by_reward, draw_pairs, relabel
from minialign.policies.inversion import invert

SEEDS = 5
MOMENTS = (25, 50, 100, 200, 400)
RING = dict(schedule="cosine", num_steps=50, eta=0.0)
SETTINGS = dict(num_iterations=400, batch_size=256, pairs_per_pass=256, learning_rate=1e-3, warmup_updates=10)
# beta is of mean errors: 2 D = 4 times the sheet's coefficient of their sum
BETA, BETA_HUMAN = 4 * 30.0, 4 * 10.0
FORWARD = dict(num_inversion_steps=0)
ARMS = {
    "1 human labels": FORWARD | dict(smoothing="none"),
    "2 relabelled": FORWARD | dict(smoothing="none"),
    "3 DDIM inversion": dict(renoise=False, smoothing="none"),
    "4 ReNoise": dict(smoothing="none"),
    "5 smoothed": {},
    "2 and smoothed": FORWARD,
    "2 and cDPO": FORWARD | dict(smoothing="label"),
    "4 and cDPO": dict(smoothing="label"),
    "5 at the old level": dict(level="old"),
    "human, beta / 3": FORWARD | dict(smoothing="none"),
    "human, beta / 3, smoothed": FORWARD | dict(smoothing="none"),
}
LADDER = [name for name in ARMS if name[1] == " " and "and" not in name and "old" not in name]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pairs_of(world, seed: int):
    """(the pairs as people labelled them, the same relabelled by the reward)."""
    reward = world.rewards["first_coordinate"]
    human = draw_pairs(world.policy, bradley_terry(reward), world.prompts, 2000, generator(100 + seed))
    return human, relabel(human, by_reward(reward))


def examine(world, seed: int) -> tuple[float, float]:
    """(mean reward, mean log-density under the base) of 4,000 samples from the same noise; not charged to training."""
    spent = world.policy.network_evaluations
    samples = world.policy.sample(world.prompts * 4000, generator=generator(1000 + seed))
    world.policy.network_evaluations = spent
    return float(samples[:, 0].mean()), float(world.mixture.log_prob(samples).mean())


def ladder_run(arm: str, seed: int) -> dict:
    """One arm and seed: [steps, network evaluations, reward, log-density] at each moment; 0 steps is the base."""
    torch.set_num_threads(1)
    world = worlds.load("ring", **RING, seed=seed)
    human, relabelled = pairs_of(world, seed)
    beta = BETA_HUMAN if arm.startswith("human") else BETA
    config = smpo.Config(**SETTINGS, beta=beta, **ARMS[arm])
    if arm.startswith("human") and "smoothed" in arm:  # by how sure the scores are, whatever the label says
        zero = torch.zeros_like(human.strengths)
        weights = smpo.smooth_weights(human.strengths, zero, 0.0, human.strengths.abs().max(), 1.0).abs()
        steps = diffusion_dpo.train(
            world.policy, human, config, generator(seed), weights=weights / weights.mean()
        )  # fmt: skip
    else:
        pairs = human if arm.startswith(("1", "human")) else relabelled
        steps = smpo.train(world.policy, pairs, config, generator(seed))
    world.policy.network_evaluations = 0
    curve, seconds = [[0, 0, *examine(world, seed)]], 0.0
    for step in steps:
        seconds += step.seconds
        if step.number + 1 in MOMENTS:
            curve.append([step.number + 1, step.network_evaluations, *examine(world, seed)])
    rounded = [[*point[:2], *(round(value, 4) for value in point[2:])] for point in curve]
    return {"arm": arm, "seed": seed, "curve": rounded, "seconds": round(seconds, 2)}


def inversion_run(seed: int) -> dict:
    """Mean distance of five-step inversions of 1,000 samples, to levels as training draws them, from a fine one."""
    torch.set_num_threads(1)
    world = worlds.load("ring", **RING, seed=seed)
    latents = pairs_of(world, seed)[0].chosen[:1000]
    levels = smpo.invertible_levels(world.policy, len(latents), generator(seed))
    given = world.policy, latents, levels, world.policy.encode(world.prompts * len(latents))
    fine = invert(*given, num_steps=200, renoise=True)
    kinds = {"DDIM": {}, "ReNoise": dict(renoise=True), "ReNoise, old level": dict(renoise=True, level="old")}
    found = {name: float((invert(*given, **kind) - fine).norm(dim=1).mean()) for name, kind in kinds.items()}
    return {"arm": "inversion error", "seed": seed, "error": found}


def gradient_run(seed: int) -> dict:
    """Per-pair gradient norms at the reference (u = 0) against margins r'_w - r'_l: slope over mean norm, and at a tie.

    Under rung 2 and rung 5, 500 pairs, each at a level (and with a noise) of its own. The norm is w beta / 4 times that
    of the gradient of a difference of errors, and that grows with the images' distance, as the margin does: in the
    linear world it is proportional to x_w - x_l. So the bar that it be flat under rung 2 is at odds with the sheet's
    own check 5; it stands as it was set.
    """
    torch.set_num_threads(1)
    world = worlds.load("ring", **RING, seed=seed)
    policy, pairs = world.policy, pairs_of(world, seed)[1]
    weights, margins = smpo.weights_of(pairs), pairs.strengths / pairs.strengths.max()
    weights = torch.cat([weights[:499], weights.new_zeros(1)])  # the last is made a tie
    margins, pairs = torch.cat([margins[:499], margins.new_zeros(1)]), pairs[:500]
    condition, levels = policy.encode(pairs.prompts), smpo.invertible_levels(policy, 500, generator(seed))
    noise, found = torch.randn(500, 2, generator=generator(seed)), {}
    for name, weight in (("2 relabelled", torch.ones(500)), ("5 smoothed", weights)):
        drawn = (noise, noise)
        if name[0] == "5":
            drawn = tuple(
                smpo.Inversion(renoise=True)(policy, x, levels, condition, noise)
                for x in (pairs.chosen, pairs.rejected)
            )
        errors = diffusion_dpo.pair_errors(policy, pairs, condition, levels, drawn)
        losses = diffusion_dpo.preference_loss(errors, smpo.Config(beta=BETA), weight)
        norms = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters(), retain_graph=True)]).norm()
            for loss in losses
        ])  # fmt: skip
        slope = np.polyfit(margins[:499].numpy(), norms[:499].numpy(), 1)[0] / float(norms[:499].mean())
        found[name] = {"slope": float(slope), "tie": float(norms[499] / norms[:499].mean())}
    return {"arm": "gradients", "seed": seed, "norms": found}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(arm, seed) for arm in reversed(ARMS) for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(ladder_run, *zip(*jobs, strict=True)))
        runs += [*pool.map(inversion_run, range(SEEDS)), *pool.map(gradient_run, range(SEEDS))]
    return verdict(runs)


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def of(arm: str) -> list[dict]:
        return sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])

    def at(arm: str, steps: int, what: int) -> list[float]:
        """Column `what` of the curves (1 evaluations, 2 reward, 3 log-density) after so many steps."""
        return [next(point[what] for point in r["curve"] if point[0] == steps) for r in of(arm)]

    def above_frontier(arm: str, other: str):
        """Log-density of `arm` minus that of `other` at the largest reward that both reached, between the moments."""
        gaps = []
        for pair in zip(of(arm), of(other), strict=True):
            tracks = [sorted((point[2], point[3]) for point in run["curve"]) for run in pair]
            reward = min(track[-1][0] for track in tracks)
            ours, theirs = (float(np.interp(reward, *zip(*track, strict=True))) for track in tracks)
            gaps.append(ours - theirs)
        return paired_difference(gaps, [0.0] * len(gaps))

    def gain(upper: str, lower: str, steps: int = 100):
        return paired_difference(at(upper, steps, 2), at(lower, steps, 2))

    def frontier_bar(name: str, arm: str, other: str, claimed: bool) -> dict:
        gap = above_frontier(arm, other)
        return bar(name, gap, ">= -2 s.e.", gap.mean >= -2 * gap.standard_error, claimed=claimed)

    bars, errors, norms = [], [r["error"] for r in of("inversion error")], [r["norms"] for r in of("gradients")]
    total = {name: sum(e[name] for e in errors) for name in errors[0]}
    ratio = total["ReNoise"] / total["DDIM"]
    bars.append(bar("inversion error at five steps, ReNoise over DDIM", ratio, "< 0.6", ratio < 0.6))
    ratio = total["ReNoise, old level"] / total["ReNoise"]
    bars.append(bar("its error at the official code's level, over ReNoise's", ratio, "> 1", ratio > 1, claimed=False))

    step = gain("3 DDIM inversion", "2 relabelled")
    bars.append(
        bar("reward after 100 steps, rung 3 minus rung 2", step, "> 2 s.e.", step.mean > 2 * step.standard_error)
    )

    slopes = {name: mean_ci([n[name]["slope"] for n in norms]) for name in norms[0]}
    error = {name: slopes[name].half_width / 2.776 for name in slopes}  # t of 4 degrees of freedom, at 95 %
    sure, flat = slopes["5 smoothed"].mean, slopes["2 relabelled"].mean
    bars.append(bar("a pair's gradient norm against its margin, relative slope, rung 5", sure, "> 2 s.e.",
                    sure > 2 * error["5 smoothed"]))  # fmt: skip
    tie = max(n["5 smoothed"]["tie"] for n in norms)
    bars.append(bar("a tie's gradient norm over the mean, rung 5", tie, "0", tie < 1e-6))
    bars.append(bar("a pair's gradient norm against its margin, relative slope, rung 2", flat, "within 2 s.e. of 0",
                    abs(flat) <= 2 * error["2 relabelled"]))  # fmt: skip

    bars.append(frontier_bar("log-density at equal reward, human labels, smoothed minus not",
                             "human, beta / 3, smoothed", "human, beta / 3", True))  # fmt: skip
    bars.append(frontier_bar("the same, relabelled", "2 and smoothed", "2 relabelled", False))
    rungs = [gain(upper, lower) for lower, upper in pairwise(LADDER)]
    for number, rung in enumerate(rungs, 2):
        others = max(r.mean for r in rungs if r is not rung)
        bars.append(bar(f"reward after 100 steps that rung {number} adds", rung,
                        "> each other rung" if number == 2 else "> 2 s.e.",
                        rung.mean > others if number == 2 else rung.mean > 2 * rung.standard_error,
                        claimed=False))  # fmt: skip
    # rung 4 costs 14 evaluations an image and step where rung 2 costs 4, so 100 steps of it are 350
    equal = paired_difference(at("4 ReNoise", 100, 2), at("2 relabelled", 400, 2))
    bars.append(bar("at equal network evaluations: rung 4 after 100 steps minus rung 2 after 400 (14 % more)", equal,
                    "> 2 s.e.", equal.mean > 2 * equal.standard_error, claimed=False))  # fmt: skip
    bounded = paired_difference(at("2 and cDPO", 400, 3), at("2 relabelled", 400, 3))
    bars.append(bar("log-density after 400 steps, cDPO minus rung 2", bounded, "> 2 s.e.",
                    bounded.mean > 2 * bounded.standard_error, claimed=False))  # fmt: skip

    table = {}
    for arm in ARMS:
        for steps in (0, *MOMENTS):
            table[f"{arm}, {steps} steps"] = {
                "reward": str(mean_ci(at(arm, steps, 2))),
                "log-density under the base": str(mean_ci(at(arm, steps, 3))),
                "network evaluations": f"{at(arm, steps, 1)[0]:,}",
            }  # fmt: skip
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "SmPO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
