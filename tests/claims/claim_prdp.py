"""PRDP's claims in miniature, in `crowd`: a regression stops at the optimum, whatever level of reward a prompt has, and
with as many prompts as there are draws; a policy gradient whose statistics mix prompts does neither.

    few       8 prompts, 16 samples of each a round: the sheet's protocol
    many      4,096 prompts, of which a round draws 64, two samples each (DDPO: 128, one each): hardly any comes twice,
              so a prompt has no statistics of its own; the gain is measured on 256 prompts that are never drawn
    uneven    levels spread over +-10, sd 6, where a prompt's own rewards have .4; even: no levels

A round is 128 reward queries and four optimizer steps on all of them, for every arm but those named; AdamW's learning
rate is 1e-3, for DDPO where it struggles 3e-3 as well, and nobody's settings were searched. Gain: by how much the mean
of g . (x - m_c) exceeds the base model's from the same noise. Bars (a) to (d) are the sheet's, judged on the worst of
five seeds where they name a target. Controls, not claimed: DDPO with statistics a prompt (few) or of a pair (many),
which have no levels in them, and DDPO with PRDP's KL, whose optimum is the same. Chosen after (d) had failed, to see
where the clip does matter: "far", an optimum hundreds of nats away, as the paper's beta has it, and its 10 updates.

Run by `minialign replicate prdp`; tests/claims/test_claims.py runs a small part of it.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import kl_to_base, mean_ci, paired_difference
from minialign.methods import ddpo, prdp

SEEDS, ROUNDS, EVERY = 5, 60, 4
BETA = 0.5  # reward per nat
FEW, MANY = dict(num_prompts=8, num_held_out=8), dict(num_prompts=4096, num_held_out=256)
BY_16, BY_2, BY_1 = (dict(num_prompts=128 // size, group_size=size) for size in (16, 2, 1))
REGRESSION = dict(beta=BETA, clip_range=0.05, num_updates=4, learning_rate=1e-3, weight_decay=0.0, prompts_per_pass=64)
HOT = dict(num_updates=20, learning_rate=1e-2)
FAR = dict(num_updates=10, beta=0.002)
GRADIENT = dict(
    num_minibatches=1, num_epochs=4, steps_per_pass=10, reduction="sum", clip_range=0.2, learning_rate=1e-3,
    weight_decay=0.0,
)  # fmt: skip
ARMS = {
    "PRDP, few, uneven": (FEW, "uneven", prdp, BY_16),
    "PRDP, few, even": (FEW, "even", prdp, BY_16),
    "PRDP without clip, few, uneven": (FEW, "uneven", prdp, BY_16 | dict(clip_range=math.inf)),
    "PRDP hot, few, uneven": (FEW, "uneven", prdp, BY_16 | HOT),
    "PRDP hot without clip, few, uneven": (FEW, "uneven", prdp, BY_16 | HOT | dict(clip_range=math.inf)),
    "PRDP far, few, uneven": (FEW, "uneven", prdp, BY_16 | FAR),
    "PRDP far without clip, few, uneven": (FEW, "uneven", prdp, BY_16 | FAR | dict(clip_range=math.inf)),
    "DDPO batch, few, uneven": (FEW, "uneven", ddpo, BY_16 | dict(baseline="batch")),
    "DDPO batch, few, even": (FEW, "even", ddpo, BY_16 | dict(baseline="batch")),
    "DDPO batch, few, uneven, lr 3e-3": (FEW, "uneven", ddpo, BY_16 | dict(baseline="batch", learning_rate=3e-3)),
    "DDPO prompt, few, uneven": (FEW, "uneven", ddpo, BY_16),
    "DDPO group and KL, few, uneven": (
        FEW, "uneven", ddpo, BY_16 | dict(baseline="group", scale_advantages=False, beta=BETA)
    ),
    "PRDP, many, uneven": (MANY, "uneven", prdp, BY_2),
    "DDPO prompt, many, uneven": (MANY, "uneven", ddpo, BY_1),
    "DDPO prompt, many, uneven, lr 3e-3": (MANY, "uneven", ddpo, BY_1 | dict(learning_rate=3e-3)),
    "DDPO prompt, many, even": (MANY, "even", ddpo, BY_1),
    "DDPO group, many, uneven": (MANY, "uneven", ddpo, BY_2 | dict(baseline="group")),
}  # fmt: skip


def crowd_run(arm: str, seed: int, rounds: int | None = None) -> dict:
    """One arm and seed: the gain every few rounds, costs, and at the end the oracle and the KL of paths."""
    torch.set_num_threads(1)
    place, reward, method, settings = ARMS[arm]
    world = worlds.load("crowd", seed=seed, **place)
    policy, even = world.policy, world.rewards["even"]
    config = method.Config(**dict(num_iterations=ROUNDS) | (REGRESSION if method is prdp else GRADIENT) | settings)
    prompts = (world.held_out if place is MANY else world.prompts) * (512 // len(world.held_out))
    noise = policy.draw_noise(len(prompts), torch.Generator().manual_seed(1_000 + seed))
    before, curve = even(policy.sample(prompts, noise), prompts).mean(), {"round": [0], "gain": [0.0]}
    policy.network_evaluations = 0
    steps = method.train(policy, world.rewards[reward], world.prompts, config, torch.Generator().manual_seed(seed))
    try:
        for step in steps:
            if (step.number + 1) % EVERY == 0:
                samples = policy.sample(prompts, noise)
                policy.network_evaluations = step.network_evaluations  # looking is not charged
                curve["round"].append(step.number + 1)
                curve["gain"].append(round(float(even(samples, prompts).mean() - before), 5))
            if step.number + 1 == rounds:
                break
        failed = None
    except FloatingPointError:  # the gradient is no longer finite; the weights still are
        failed = step.number + 1
    with torch.no_grad():
        traj = policy.rollout(prompts, noise, reduction="sum")
    return {
        "arm": arm, "seed": seed, "target": world.reachable_gain(config.beta or BETA), **curve, "failed_after": failed,
        "queries": step.reward_queries, "network_evaluations": step.network_evaluations,
        "oracle": float(world.oracle(traj.final, prompts).mean()), "kl": round(float(kl_to_base(policy, traj)), 4),
    }  # fmt: skip


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(arm, seed) for arm in ARMS for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(crowd_run, *zip(*jobs, strict=True))))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, and the issue's on many prompts, from the raw results that are stored beside them."""

    def of(arm: str, rounds: int = ROUNDS) -> list[float]:
        return [r["gain"][r["round"].index(rounds)] for r in runs if r["arm"] == arm]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def farthest(arm: str, rounds: int = ROUNDS) -> float:
        """The largest relative error of a seed's gain."""
        return max(abs(gain / target - 1) for gain in of(arm, rounds))

    def end(arm: str, key: str) -> list[float]:
        return [r[key] for r in runs if r["arm"] == arm]

    target, bars = runs[0]["target"], []
    for rounds in (40, 60):
        error = farthest("PRDP, few, uneven", rounds)
        bars.append(bar(f"(a) few prompts, PRDP after {rounds} rounds: largest relative error of the gain",
                        error, "< 0.1", error < 0.1))  # fmt: skip
    shares = [a / b for a, b in zip(of("PRDP, few, uneven"), of("PRDP, few, even"), strict=True)]
    worst = max(shares, key=lambda share: abs(share - 1))
    bars.append(bar("(b) few prompts, PRDP: gain uneven over gain even, the seed farthest from 1", worst,
                    "0.9 to 1.1", 0.9 <= worst <= 1.1))  # fmt: skip
    drowned = mean(of("DDPO batch, few, uneven", 20)) / mean(of("DDPO batch, few, even", 20))
    bars.append(bar("(c) few prompts, DDPO with the batch's statistics after 20 rounds: gain uneven over gain even",
                    drowned, "< 0.3", drowned < 0.3))  # fmt: skip
    held, free = (farthest(f"PRDP hot{clip}, few, uneven") for clip in ("", " without clip"))
    bars.append(bar("(d) ten times the learning rate, 20 updates a round: largest relative error with the clip", held,
                    "< 0.3", held < 0.3))  # fmt: skip
    bars.append(bar("(d) the same without the clip", free, "> 0.3", free > 0.3))
    error = farthest("PRDP, many, uneven")
    bars.append(bar("many prompts, PRDP by pairs after 60 rounds: largest relative error on prompts never drawn", error,
                    "< 0.1", error < 0.1))  # fmt: skip
    drowned = mean(of("DDPO prompt, many, uneven", 20)) / mean(of("DDPO prompt, many, even", 20))
    bars.append(bar("many prompts, DDPO with its buffers after 20 rounds: gain uneven over gain even", drowned, "< 0.3",
                    drowned < 0.3))  # fmt: skip
    for text, arm in (
        ("few prompts, PRDP without clip at the usual rate: largest relative error", "PRDP without clip, few, uneven"),
        ("few prompts, DDPO with the group's mean and PRDP's KL: the same", "DDPO group and KL, few, uneven"),
    ):
        error = farthest(arm)
        bars.append(bar(text, error, "< 0.1", error < 0.1, claimed=False))
    far = {
        clip: sum(
            r["failed_after"] is None and r["gain"][-1] > 0 for r in runs if r["arm"] == f"PRDP far{clip}, few, uneven"
        )
        for clip in ("", " without clip")
    }
    text = "few prompts, far optimum {} the clip: seeds that end better than the base"
    bars.append(bar(text.format("with"), float(far[""]), str(SEEDS), far[""] == SEEDS, claimed=False))
    free = far[" without clip"]
    bars.append(bar(text.format("without"), float(free), f"< {SEEDS}", free < SEEDS, claimed=False))
    for place, arm in (("few", "DDPO batch"), ("many", "DDPO prompt")):
        off = min(mean([abs(g / target - 1) for g in of(f"{arm}, {place}, uneven{lr}")]) for lr in ("", ", lr 3e-3"))
        bars.append(bar(f"{place} prompts, {arm}, the better of two rates after 60 rounds: mean relative error", off,
                        "< 0.1", off < 0.1, claimed=False))  # fmt: skip
    for text, arm in (
        (
            "few prompts, DDPO with statistics a prompt: gain after 60 rounds over the target",
            "DDPO prompt, few, uneven",
        ),
        ("many prompts, DDPO with a pair's statistics: the same", "DDPO group, many, uneven"),
    ):
        gain = mean(of(arm)) / target
        bars.append(bar(text, gain, "> 2", gain > 2, claimed=False))
    oracle = paired_difference(end("PRDP, many, uneven", "oracle"), end("DDPO group, many, uneven", "oracle"))
    bars.append(bar("many prompts, share that is better and real: PRDP minus DDPO with a pair's statistics", oracle,
                    "> 0", oracle.mean > 0, claimed=False))  # fmt: skip
    table = {}
    for arm in ARMS:
        failed = [r["failed_after"] for r in runs if r["arm"] == arm and r.get("failed_after")]
        if failed:
            table[arm] = {"gradient not finite": f"{len(failed)} of {SEEDS} seeds, after rounds {failed}"}
            continue
        gains = {f"gain after {n}": str(mean_ci(of(arm, n))) for n in (20, 40, 60)}
        rest = {key: str(mean_ci(end(arm, key))) for key in ("oracle", "kl", "queries", "network_evaluations")}
        table[arm] = gains | rest
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "PRDP", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "target": target, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
