"""Flow-GRPO on `shapes`: composition under a strict oracle, fewer steps in training than in use, a KL against a proxy.

    oracle, 8 steps         the stand-in for GenEval and text rendering: 0 or 1 a picture, relations of two objects
    oracle, 4 steps         denoising reduction: the same queries for half the network evaluations
    proxy, proxy and a KL   the contrastive scorer as reward, which knows little of relations

The policy is the world's diffusion model on a flow's clock, with a LoRA; 25 rounds of 8 prompts with 12 samples each.
Everything is judged on the ODE's 20-step pictures: 256 of the eight training prompts, and of sixteen held-out ones.

Run by `minialign replicate grpo_shapes`; tests/claims/test_claims.py runs a small part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import measure, worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import grpo
from minialign.policies.diffusion import EVERYWHERE

SEEDS = 5
CONFIG = dict(num_iterations=25, num_prompts=8, group_size=12, learning_rate=3e-3, warmup_updates=10, steps_per_pass=7)
ARMS = {  # training steps, reward, settings
    "oracle, 8 steps": (8, "oracle", {}),
    "oracle, 4 steps": (4, "oracle", {}),
    "proxy": (4, "scorer", {}),
    "proxy, beta = .04": (4, "scorer", dict(beta=0.04)),
}


def looked_at(world, seed: int) -> dict:
    """What the ODE's pictures score; not charged."""
    policy, generator = world.policy, torch.Generator().manual_seed(1_000 + seed)
    spent, found = policy.network_evaluations, {}
    for name, prompts in (("", world.prompts * 32), (", held out", world.held_out * 16)):
        samples = policy.sample(prompts, generator=generator, num_steps=20)
        found[f"oracle{name}"] = float(world.oracle(samples, prompts).mean())
        found[f"scorer{name}"] = float(world.rewards["scorer"](samples, prompts).mean())
        found[f"diversity{name}"] = float(measure.diversity(samples, prompts, reduction="mean"))
    policy.network_evaluations = spent
    return found


def shapes_run(arm: str, seed: int, rounds: int | None = None) -> dict:
    torch.set_num_threads(1)
    num_steps, reward, settings = ARMS[arm]
    world = worlds.load("shapes", model="flow", num_steps=num_steps)
    world.policy.deterministic_last = True
    world.policy.set_num_steps(num_steps)
    world.policy.add_lora(rank=16, target_modules=EVERYWHERE, seed=seed)
    before, seconds = looked_at(world, seed), 0.0
    config = grpo.Config(**CONFIG | settings)
    steps = grpo.train(world.policy, world.rewards[reward], world.prompts, config, torch.Generator().manual_seed(seed))
    for number, step in enumerate(steps, 1):
        seconds += step.seconds
        if number == rounds:
            break
    with torch.no_grad():
        traj = world.policy.rollout(world.prompts * 4, generator=torch.Generator().manual_seed(seed))
        kl = float(measure.kl_to_base(world.policy, traj))
    return {
        "arm": arm, "seed": seed, "before": before, "after": looked_at(world, seed), "kl": kl,
        "network_evaluations": step.network_evaluations, "queries": step.reward_queries, "seconds": round(seconds, 1),
    }  # fmt: skip


def one(job: tuple[str, int]) -> dict:
    return shapes_run(*job)


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(arm, seed) for arm in ARMS for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(one, jobs)))


def verdict(runs: list[dict]) -> dict:
    """The bars, from the raw results that are stored beside them."""

    def column(arm: str, side: str, key: str = "oracle") -> list[float]:
        return [r[side][key] for r in runs if r["arm"] == arm]

    def spent(arm: str, key: str = "network_evaluations") -> list[float]:
        return [float(r[key]) for r in runs if r["arm"] == arm]

    bars, long, short, leash = [], "oracle, 8 steps", "oracle, 4 steps", "proxy, beta = .04"
    gain = paired_difference(column(long, "after"), column(long, "before"))
    bars.append(bar("oracle gained by 8-step training", gain, "> 2 s.e.", gain.mean > 2 * gain.standard_error))
    gain = paired_difference(column(long, "after", "oracle, held out"), column(long, "before", "oracle, held out"))
    bars.append(bar("the same on held-out prompts", gain, "> 0", gain.mean > 0, claimed=False))
    gap = paired_difference(column(short, "after"), column(long, "after"))
    bars.append(bar("oracle at the end, 4 training steps minus 8", gap, "> -.05", gap.mean > -0.05))
    share = sum(spent(short)) / sum(spent(long))
    bars.append(bar("network evaluations, 4 training steps over 8", share, "< .6", share < 0.6, claimed=False))
    hacked = paired_difference(column("proxy", "after", "scorer"), column("proxy", "before", "scorer"))
    bars.append(bar("scorer gained by training on it", hacked, "> 2 s.e.", hacked.mean > 2 * hacked.standard_error))
    kept = paired_difference(column(leash, "after"), column("proxy", "after"))
    bars.append(bar("oracle under the proxy, with a KL minus without", kept, "> 0", kept.mean > 0, claimed=False))
    nearer = paired_difference(spent(leash, "kl"), spent("proxy", "kl"))
    bars.append(bar("KL to the base, with a KL minus without", nearer, "< 0", nearer.mean < 0))
    diverse = paired_difference(column(leash, "after", "diversity"), column("proxy", "after", "diversity"))
    bars.append(bar("diversity, with a KL minus without", diverse, "> 0", diverse.mean > 0, claimed=False))
    table = {
        arm: {f"{key} {side}": str(mean_ci(column(arm, side, key))) for side in ("before", "after")
              for key in runs[0]["after"]}
        | {key: str(mean_ci(spent(arm, key))) for key in ("kl", "network_evaluations", "queries", "seconds")}
        for arm in ARMS
    }  # fmt: skip
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Flow-GRPO on shapes", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
