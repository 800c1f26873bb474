"""DDPO's claims in miniature: importance sampling against reward-weighted regression at 10,240 reward queries in
`compass`, its cost in diversity, and the KL-regularised optimum of a linear-Gaussian world.

The baseline gets the better hand: its best setting is chosen on the very seeds it is judged on, from beta in {1, 5, 20}
and RWR-sparse, each at two learning rates, while DDPO keeps one setting throughout.

Run by `minialign replicate ddpo`; tests/claims/test_claims.py runs a small part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from minialign import worlds
from minialign.exact import LinearGaussianSampler
from minialign.loop import fit
from minialign.measure import mean_ci, paired_difference
from minialign.methods import ddpo, rwr
from minialign.worlds.gaussian import mode_entropy

SEEDS = 5
QUERIES = 10_240
IS = ddpo.Config(
    num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3, steps_per_pass=20
)
SF = ddpo.Config(
    num_iterations=40, num_prompts=256, group_size=1, num_minibatches=1, learning_rate=3e-3, steps_per_pass=20
)
RWR = {
    **{
        f"RWR beta {beta} lr {lr}": rwr.Config(beta=beta, learning_rate=lr)
        for beta in (1.0, 5.0, 20.0)
        for lr in (1e-3, 3e-3)
    },
    **{f"RWR-sparse lr {lr}": rwr.Config(weighting="top", learning_rate=lr) for lr in (1e-3, 3e-3)},
}
METHODS = {"DDPO_IS": (ddpo, IS), "DDPO_SF": (ddpo, SF)} | {name: (rwr, config) for name, config in RWR.items()}
BETA = 2.0  # reward per nat in the KL arm


def compass_run(name: str, seed: int) -> dict:
    """One method, one seed: success and coarse-mode entropy of 4,096 fresh samples after 10,240 reward queries."""
    torch.set_num_threads(1)
    method, config = METHODS[name]
    world = worlds.load("compass", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    steps = method.train(world.policy, world.rewards["gold"], world.prompts, config, generator)
    history = fit(steps, progress=False)
    spent = history[-1]["reward_queries"]
    assert spent == QUERIES, f"{name} spent {spent} queries, not {QUERIES}"
    prompts = world.prompts * 2048
    samples = world.policy.sample(prompts, generator=torch.Generator().manual_seed(1_000 + seed))
    return {
        "method": name, "seed": seed, "success": float(world.oracle(samples, prompts).mean()),
        "entropy": float(mode_entropy(samples, world.modes)),
        "network_evaluations": history[-1]["network_evaluations"],
    }  # fmt: skip


def kl_run(seed: int, iterations: int = 1500) -> dict:
    """DPOK's KL in the line: the shift of the sampler's mean, averaged over the last third, against its closed form."""
    torch.set_num_threads(1)
    world = worlds.load("line", num_steps=20)
    config = ddpo.Config(
        num_iterations=iterations, num_prompts=512, group_size=1, num_minibatches=1, steps_per_pass=20, reduction="sum",
        baseline="batch", scale_advantages=False, beta=BETA, learning_rate=5e-3, weight_decay=0.0, max_grad_norm=1e9,
    )  # fmt: skip
    exact = LinearGaussianSampler(mean=0.0, std=1.0, num_steps=20, eta=1.0)
    shifts = []
    for _ in ddpo.train(
        world.policy, world.rewards["first_coordinate"], world.prompts, config, torch.Generator().manual_seed(seed)
    ):
        theta = world.policy.parameters()[0].detach().double().flatten()
        shifts.append(float(exact.mean_at(theta) - exact.sample_mean))
    tail = shifts[-iterations // 3 :]
    return {"seed": seed, "shift": sum(tail) / len(tail), "target": float(exact.reachable_shift(BETA))}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [(name, seed) for name in METHODS for seed in range(SEEDS)]
        kl_jobs = [pool.submit(kl_run, seed) for seed in range(SEEDS)]
        runs = list(pool.map(compass_run, *zip(*jobs, strict=True)))
        kl = [job.result() for job in kl_jobs]
    return verdict(runs, kl)


def verdict(runs: list[dict], kl: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""
    values = {
        name: {key: [r[key] for r in runs if r["method"] == name] for key in ("success", "entropy")} for name in METHODS
    }
    best = max(RWR, key=lambda name: sum(values[name]["success"]))
    margin = paired_difference(values["DDPO_IS"]["success"], values[best]["success"])
    over_sf = paired_difference(values["DDPO_IS"]["success"], values["DDPO_SF"]["success"])
    entropy = paired_difference(values["DDPO_IS"]["entropy"], values[best]["entropy"])
    error = max(abs(r["shift"] / r["target"] - 1) for r in kl)
    table = {name: {key: str(mean_ci(v)) for key, v in columns.items()} for name, columns in values.items()}
    bars = [
        bar("DDPO_IS minus best RWR, success at equal queries", margin, "> 0.08", margin.mean > 0.08),
        bar(
            "the same in standard errors",
            margin.mean / margin.standard_error,
            "> 2",
            margin.mean > 2 * margin.standard_error,
        ),
        bar("DDPO_IS minus DDPO_SF, success", over_sf, ">= 0", over_sf.mean >= 0),
        bar("its cost: mode entropy, DDPO_IS minus best RWR", entropy, "< 0", entropy.mean < 0),
        bar("KL arm: worst relative error of the shift over seeds", error, "< 0.05", error < 0.05),
    ]
    passed = all(b["passed"] for b in bars)
    return {
        "name": "DDPO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "best_rwr": best, "table": table, "runs": runs, "kl_runs": kl,
    }  # fmt: skip


def bar(name: str, value, threshold: str, passed: bool) -> dict:
    """One line of the verdict; a paired difference is printed with its standard error."""
    if isinstance(value, float):
        return {"id": name, "value": value, "threshold": threshold, "passed": bool(passed)}
    text = f"{value.mean:+.3f} +- {value.standard_error:.3f}"
    return {"id": name, "value": value.mean, "threshold": threshold, "passed": bool(passed), "text": text}
