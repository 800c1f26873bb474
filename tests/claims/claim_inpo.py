"""InPO's claims in miniature, in `ring`: fewer optimizer steps than Diffusion-DPO to the same reward, and what is left
of that when network evaluations are counted.

2,000 pairs of the base model's samples, labelled by Bradley and Terry's law on the first coordinate; every arm of a
seed has the same pairs. 256 pairs a step, beta = 120 on mean errors of two elements (the sheet's 30 on their sum),
AdamW at 1e-3, ten warm-up steps. Measured on 4,000 samples of DDIM's 50 steps, from the same noise: the mean reward,
and the mean log-density under the base model's data, which tells a good sample from one nobody would have drawn.

The bars are the sheet's, run once. Not claimed: the same at equal network evaluations (a step of InPO with five
inversion steps costs 2.25 of Diffusion-DPO's, so 100 against 225 and 400 against 900); Diffusion-DPO at half of beta,
for in one Gaussian InPO is Diffusion-DPO with a logit of .5 to 1 times the weight, and a smaller beta goes further; one
mode alone, where the theory promises no new direction; other numbers of inversion steps; the policy as the one that
inverts, at this beta and at 4; the official code's level, next on a grid of ten (the fair one beside it has ten steps
too). The comparison at equal log-density was added after the runs had been seen.

Run by `minialign replicate inpo`; tests/claims/test_claims.py runs a small part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import diffusion_dpo, inpo
from minialign.pairs import bradley_terry, draw_pairs

SEEDS, SAMPLES, PAIRS = 5, 4000, 2000
CONFIG = dict(batch_size=256, pairs_per_pass=256, beta=120.0, learning_rate=1e-3, warmup_updates=10)
RING, ONE_MODE = dict(num_modes=8), dict(num_modes=1, radius=0.0, std=1.0)
SHORT, LONG = (50, 100, 200), (25, 50, 100, 200, 400)
BASELINE = (25, 50, 100, 225, 400, 900)
ARMS = {
    "Diffusion-DPO": (RING, diffusion_dpo, {}, BASELINE),
    "InPO": (RING, inpo, {}, LONG),
    "Diffusion-DPO, beta 60": (RING, diffusion_dpo, dict(beta=60.0), BASELINE),
    "InPO, 1 step": (RING, inpo, dict(num_inversion_steps=1), SHORT),
    "InPO, 2 steps": (RING, inpo, dict(num_inversion_steps=2), SHORT),
    "InPO, 10 steps": (RING, inpo, dict(num_inversion_steps=10), SHORT),
    "InPO, official grid of 10": (RING, inpo, dict(num_inversion_steps=10, official_grid=True), SHORT),
    "InPO by the policy": (RING, inpo, dict(invert_with="policy"), SHORT),
    "InPO, beta 4": (RING, inpo, dict(beta=4.0), LONG[1:]),
    "InPO by the policy, beta 4": (RING, inpo, dict(beta=4.0, invert_with="policy"), LONG[1:]),
    "Diffusion-DPO, one mode": (ONE_MODE, diffusion_dpo, {}, SHORT),
    "InPO, one mode": (ONE_MODE, inpo, {}, SHORT),
}


def ring_run(arm: str, seed: int) -> dict:
    """One arm and seed: reward, log-density under the data, and evaluations spent, at the arm's checkpoints."""
    torch.set_num_threads(1)
    of_world, method, settings, checkpoints = ARMS[arm]
    world = worlds.load("ring", schedule="cosine", num_steps=50, eta=0.0, seed=seed, **of_world)
    policy, labeller = world.policy, bradley_terry(world.rewards["first_coordinate"])
    pairs = draw_pairs(policy, labeller, world.prompts, PAIRS, torch.Generator().manual_seed(100 + seed))
    noise = policy.draw_noise(SAMPLES, torch.Generator().manual_seed(1_000 + seed))
    config = method.Config(**CONFIG | settings, num_iterations=checkpoints[-1])
    policy.network_evaluations, found = 0, {"reward": [], "log_prob": [], "network_evaluations": []}

    def look(spent: int) -> None:
        samples = policy.sample(world.prompts * SAMPLES, noise)
        policy.network_evaluations = spent  # looking is not charged
        found["reward"].append(samples[:, 0].mean().item())
        found["log_prob"].append(world.mixture.log_prob(samples).mean().item())
        found["network_evaluations"].append(spent)

    look(0)
    for step in method.train(policy, pairs, config, torch.Generator().manual_seed(seed)):
        if step.number + 1 in checkpoints:
            look(step.network_evaluations)
    return {"arm": arm, "seed": seed, "steps": [0, *checkpoints], **found}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(arm, seed) for arm in ARMS for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(ring_run, *zip(*jobs, strict=True))))


def reward_where(run: dict, log_prob: float) -> float:
    """A run's reward where its samples' log-density has fallen to `log_prob`, between checkpoints; the last at most."""
    lowest = np.minimum.accumulate(run["log_prob"])
    return float(np.interp(-log_prob, -lowest, run["reward"]))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def at(arm: str, step: int, key: str = "reward") -> list[float]:
        return [run[key][run["steps"].index(step)] for run in runs if run["arm"] == arm]

    def gain(arm: str, step: int, other: str, step_other: int):
        return paired_difference(at(arm, step), at(other, step_other))

    bars = []
    fewer = gain("InPO", 100, "Diffusion-DPO", 400)
    bars.append(bar("reward: InPO at 100 steps minus Diffusion-DPO at 400", fewer, ">= -1 s.e.",
                    fewer.mean >= -fewer.standard_error))  # fmt: skip
    equal = gain("InPO", 100, "Diffusion-DPO", 100)
    bars.append(bar("reward: InPO minus Diffusion-DPO, both at 100 steps", equal, "> 2 s.e.",
                    equal.mean > 2 * equal.standard_error))  # fmt: skip
    quality = min(at("InPO", 100, "log_prob"))
    bars.append(bar("log-density of InPO's samples at 100 steps, worst seed", quality, "> -3", quality > -3))
    named, equal_cost = "InPO minus Diffusion-DPO", "reward at equal network evaluations"
    for name, ours, theirs in [
        (f"{equal_cost}, 100 and 225 steps: {named}", ("InPO", 100), ("Diffusion-DPO", 225)),
        (f"{equal_cost}, 400 and 900 steps: {named}", ("InPO", 400), ("Diffusion-DPO", 900)),
        (f"reward at 100 steps: {named} at half of beta", ("InPO", 100), ("Diffusion-DPO, beta 60", 100)),
        (f"{equal_cost}, 100 and 225 steps: {named} at half of beta", ("InPO", 100), ("Diffusion-DPO, beta 60", 225)),
        (f"reward, one mode, 100 steps: {named}", ("InPO, one mode", 100), ("Diffusion-DPO, one mode", 100)),
        ("reward at 100 steps: the reference inverts, minus the policy", ("InPO", 100), ("InPO by the policy", 100)),
        ("reward at 100 steps: the level that is named, minus the official grid's", ("InPO, 10 steps", 100),
         ("InPO, official grid of 10", 100)),
        ("reward at 100 steps: five inversion steps, minus one", ("InPO", 100), ("InPO, 1 step", 100)),
    ]:  # fmt: skip
        difference = gain(*ours, *theirs)
        passed = difference.mean > 2 * difference.standard_error
        bars.append(bar(name, difference, "> 2 s.e.", passed, claimed=False))
    frontier = paired_difference(
        at("InPO", 200),
        [
            reward_where(run, density)
            for run, density in zip(
                (run for run in runs if run["arm"] == "Diffusion-DPO, beta 60"),
                at("InPO", 200, "log_prob"),
                strict=True,
            )
        ],
    )
    bars.append(bar("reward at the log-density of InPO's 200 steps: InPO minus Diffusion-DPO at half of beta", frontier,
                    "> 2 s.e.", frontier.mean > 2 * frontier.standard_error, claimed=False))  # fmt: skip
    drift = paired_difference(*(at(f"InPO{who}, beta 4", 400, "log_prob") for who in ("", " by the policy")))
    bars.append(bar("log-density at beta 4, 400 steps: the reference inverts, minus the policy", drift, "> 2 s.e.",
                    drift.mean > 2 * drift.standard_error, claimed=False))  # fmt: skip

    table = {}
    for arm, (_, _, _, checkpoints) in ARMS.items():
        for step in checkpoints:
            table[f"{arm}, {step} steps"] = {
                "network_evaluations": int(at(arm, step, "network_evaluations")[0]),
                **{key: str(mean_ci(at(arm, step, key))) for key in ("reward", "log_prob")},
            }
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "InPO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
