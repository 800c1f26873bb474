"""RLCM's claims in miniature, in `compass`: the same reward for far fewer network evaluations than DDPO, and what the
last, deterministic call cannot learn.

    side               the coarse mode's side, decided early                   RLCM (H = 2, 4, 8) and DDPO (S = 20, 50)
    side_and_quality   and close to a component, decided by the last call      RLCM with and without terminal noise
    gold               the prompted sub-mode, decided by the last call         RLCM with and without terminal noise

Equal batches of 256 queries, 4 minibatches, 40 rounds; two learning rates for every arm, and each arm is judged at the
better of its two, on these very seeds.
One distilled model serves all runs; its cost is reported beside them and not charged.

Run by `minialign replicate rlcm`; tests/claims/test_claims.py runs a small part of it.
"""

import functools
import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import consistency_distillation as distillation
from minialign.methods import ddpo, rlcm
from minialign.policies.consistency import ConsistencyPolicy

SEEDS = 5
TARGET = 0.9
ROUNDS = dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4)
DISTILLATION = distillation.Config(num_iterations=4000, batch_size=256, learning_rate=2e-3)
RATES = (1e-3, 3e-3)
ARMS = {"RLCM H 2": (2, 0.0), "RLCM H 4": (4, 0.0), "RLCM H 8": (8, 0.0), "RLCM H 4, terminal noise": (4, 0.1)}
RLCM = {f"{arm} lr {rate}": (*settings, rate) for arm, settings in ARMS.items() for rate in RATES}
DDPO = {f"DDPO S {s} lr {rate}": (s, rate) for s in (20, 50) for rate in RATES}
LAST_CALL = [name for name in RLCM if not name.startswith("RLCM H 2")]
JOBS = (
    [("side", name) for name in (*RLCM, *DDPO)]
    + [("side_and_quality", name) for name in LAST_CALL]
    + [("gold", name) for name in LAST_CALL]
)


@functools.cache
def distilled():
    """The compass student, the same in every process: about 14 seconds, 5.3 million network evaluations."""
    world = worlds.load("compass")
    student = ConsistencyPolicy.from_diffusion(world.policy)
    for _ in distillation.train(student, world.policy, world.real, DISTILLATION, torch.Generator().manual_seed(0)):
        pass
    return student


def learner(name: str, seed: int):
    """(world, policy ready to train, the method's steps as a function of the reward)."""
    world, generator = worlds.load("compass", seed=seed), torch.Generator().manual_seed(seed)
    if name in DDPO:
        num_steps, rate = DDPO[name]
        world.policy.set_num_steps(num_steps)
        config = ddpo.Config(**ROUNDS, learning_rate=rate, steps_per_pass=num_steps)
        return world, world.policy, lambda reward: ddpo.train(world.policy, reward, world.prompts, config, generator)
    num_steps, terminal_std, rate = RLCM[name]
    policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=num_steps)
    policy.network.load_state_dict(distilled().network.state_dict())
    policy.train_all_weights()
    config = rlcm.Config(**ROUNDS, learning_rate=rate, clip_range=0.1, terminal_std=terminal_std)
    return world, policy, lambda reward: rlcm.train(policy, reward, world.prompts, config, generator)


def compass_run(task: str, name: str, seed: int) -> dict:
    """One reward, method and seed: the costs when success first reached the target, and where it ended."""
    torch.set_num_threads(1)
    world, policy, steps = learner(name, seed)
    reward, watch, first, seconds = world.rewards[task], torch.Generator().manual_seed(1_000 + seed), None, 0.0
    prompts = world.prompts * 256
    for step in steps(reward):
        seconds += step.seconds
        samples = policy.sample(prompts, generator=watch)
        policy.network_evaluations = step.network_evaluations  # looking is not charged
        success = float(reward(samples, prompts).mean())
        if first is None and success >= TARGET:
            first = (step.reward_queries, step.network_evaluations, round(seconds, 3))
    centres = world.submodes.flatten(0, 1)
    queries, evaluations, until = first or (None, None, None)
    return {
        "task": task, "method": name, "seed": seed, "queries": queries, "network_evaluations": evaluations,
        "seconds": until, "final": success, "distance": float(torch.cdist(samples, centres).amin(1).mean()),
        "calls": policy.num_steps,
    }  # fmt: skip


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(task, name, seed) for task, name in JOBS for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(compass_run, *zip(*jobs, strict=True))))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def column(task: str, method: str, key: str) -> list:
        return [r[key] for r in runs if r["task"] == task and r["method"] == method]

    def cheapest(arm: str) -> str:
        """The arm at the learning rate that reaches the target soonest; a rate at which a run never does is last."""
        return min((f"{arm} lr {rate}" for rate in RATES), key=lambda name: sum(
            math.inf if q is None else q for q in column("side", name, "queries")))  # fmt: skip

    def best(task: str, arm: str) -> list[float]:
        """Success at the end, at the arm's better learning rate."""
        return max((column(task, f"{arm} lr {rate}", "final") for rate in RATES), key=sum)

    bars, ours = [], cheapest("RLCM H 4")
    reached = all(q is not None for q in column("side", ours, "queries"))
    bars.append(bar(f"side: runs of H 4 that reach {TARGET}", float(sum(q is not None for q in column(
        "side", ours, "queries"))), str(SEEDS), reached))  # fmt: skip
    if reached:
        for num_steps, most in ((50, 1 / 3), (20, 1.0)):
            theirs = cheapest(f"DDPO S {num_steps}")
            logs = [[math.log(v) for v in column("side", m, "network_evaluations")] for m in (ours, theirs)]
            gap = paired_difference(*logs)
            share = math.exp(gap.mean)
            bars.append(bar(
                f"side: network evaluations to {TARGET}, H 4 over the best DDPO S {num_steps}", share,
                f"<= {most:.2g} and > 2 s.e. of the log", share <= most and -gap.mean > 2 * gap.standard_error,
            ))  # fmt: skip
            seconds = sum(column("side", ours, "seconds")) / sum(column("side", theirs, "seconds"))
            bars.append(
                bar(f"side: seconds to {TARGET}, H 4 over the best DDPO S {num_steps}", seconds, "< 1", seconds < 1)
            )
            queries = sum(column("side", ours, "queries")) / sum(column("side", theirs, "queries"))
            bars.append(bar(
                f"side: reward queries to {TARGET}, H 4 over the best DDPO S {num_steps}", queries, "< 1", queries < 1,
                claimed=False,
            ))  # fmt: skip
    calls = 4 / 50
    bars.append(bar("network calls an image, H 4 over S 50", calls, "<= 0.1", calls <= 0.1))
    for task in ("side_and_quality", "gold"):
        gap = paired_difference(best(task, "RLCM H 4, terminal noise"), best(task, "RLCM H 4"))
        bars.append(bar(f"{task}: success at the end, terminal noise minus none", gap, "> 0.3", gap.mean > 0.3))
    longer = paired_difference(best("side_and_quality", "RLCM H 8"), best("side_and_quality", "RLCM H 4"))
    bars.append(
        bar("side_and_quality, no terminal noise: H 8 minus H 4", longer, "> 0", longer.mean > 0, claimed=False)
    )
    drift = paired_difference(column("side", ours, "distance"), column("side", cheapest("DDPO S 20"), "distance"))
    bars.append(bar(
        "its cost: distance to the nearest component after side, H 4 minus DDPO", drift, "<= 0", drift.mean <= 0,
        claimed=False,
    ))  # fmt: skip
    table = {}
    for task, method in JOBS:
        numbers = {
            key: column(task, method, key) for key in ("queries", "network_evaluations", "seconds", "final", "distance")
        }
        table[f"{task}, {method}"] = {
            key: str(mean_ci(values)) if None not in values else "target not always reached"
            for key, values in numbers.items()
        }
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "RLCM", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
