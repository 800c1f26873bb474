"""B2-DiffuRL's claims in miniature: alignment without collapse, and fewer network evaluations, when a reward also likes
a style. In `compass` the prompted attribute (inner or outer, gold) is decided by the last six of twenty steps; the
nuisance, which of the four coarse modes, by the steps before. Policies have weights of their own for every step.

All five methods are one `Config` with its switches set, at equal reward queries a stage and both learning rates, 520
samples of evaluation a prompt and stage (not charged). What is compared: the state of each run when its success rate
first reaches .85.

Run by `minialign replicate b2diffurl`; tests/claims/test_claims.py runs a small part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import b2diffurl
from minialign.worlds.gaussian import mode_entropy

SEEDS = 6
LEARNING_RATES = (0.01, 0.02)
TARGET = 0.85
STAGE = dict(
    num_iterations=36, num_prompts=52, num_branches=5, first_window=4, last_window=10, clip_range=0.1, steps_per_pass=20
)
METHODS = {
    "DDPO": dict(backward_progressive=False, branch_sampling=False),
    "progressive only": dict(branch_sampling=False),
    "branches only": dict(backward_progressive=False),
    "B2 official": dict(),
    "B2 branch-relative": dict(advantage="branch"),
}
COLUMNS = ("queries", "network_evaluations", "entropy", "final_gold", "final_entropy")


def examine(world, generator) -> tuple[float, float]:
    """(success, coarse-mode entropy) of 1,024 fresh samples, not charged to training."""
    spent, prompts = world.policy.network_evaluations, world.prompts * 512
    samples = world.policy.sample(prompts, generator=generator)
    world.policy.network_evaluations = spent
    return float(world.oracle(samples, prompts).mean()), float(mode_entropy(samples, world.modes))


def compass_run(method: str, learning_rate: float, seed: int) -> dict:
    """One method, learning rate and seed; costs and entropy when success first reached the target (None if never)."""
    torch.set_num_threads(1)
    world = worlds.load("compass", residual="per_step_linear")
    config = b2diffurl.Config(**STAGE, learning_rate=learning_rate, **METHODS[method])
    train, watch = (torch.Generator().manual_seed(s) for s in (seed, 1_000 + seed))
    first, curve = None, [(0, 0, *examine(world, watch))]
    for step in b2diffurl.train(world.policy, world.rewards["styled_gold"], world.prompts, config, train):
        curve.append((step.reward_queries, step.network_evaluations, *examine(world, watch)))
        if first is None and curve[-1][2] >= TARGET:
            first = curve[-1]
    queries, evaluations, _, entropy = first or (None, None, None, None)
    return {
        "method": method, "learning_rate": learning_rate, "seed": seed, "queries": queries,
        "network_evaluations": evaluations, "entropy": entropy, "final_gold": curve[-1][2],
        "final_entropy": curve[-1][3], "curve": [[round(v, 4) for v in point] for point in curve],
    }  # fmt: skip


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(m, rate, seed) for m in METHODS for rate in LEARNING_RATES for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(compass_run, *zip(*jobs, strict=True))))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def column(method: str, rate: float, key: str) -> list[float]:
        return [r[key] for r in runs if r["method"] == method and r["learning_rate"] == rate]

    bars, table = [], {}
    for rate in LEARNING_RATES:
        for method in METHODS:
            columns = {key: column(method, rate, key) for key in COLUMNS}
            reached = [q is not None for q in columns["queries"]]
            table[f"{method}, lr {rate}"] = {"reached": f"{sum(reached)} of {len(reached)}"} | {
                key: str(mean_ci(values)) if all(reached) else "target not always reached"
                for key, values in columns.items()
            }
        if not all(r["queries"] for r in runs if r["learning_rate"] == rate and not r["method"].startswith("branches")):
            bars.append(bar(f"every run reaches {TARGET}, lr {rate}", 0.0, "all", False))
            continue
        entropy = paired_difference(column("B2 official", rate, "entropy"), column("DDPO", rate, "entropy"))
        bars.append(bar(
            f"mode entropy at success {TARGET}, B2 minus DDPO, lr {rate}", entropy, "> 0.15 and > 2 s.e.",
            entropy.mean > max(0.15, 2 * entropy.standard_error),
        ))  # fmt: skip
        cost = {m: sum(column(m, rate, "network_evaluations")) for m in METHODS if m != "branches only"}
        share = cost["B2 official"] / cost["DDPO"]
        bars.append(bar(
            f"network evaluations to success {TARGET}, B2 over DDPO, lr {rate}", share, "<= 0.6", share <= 0.6
        ))  # fmt: skip
        fewer = paired_difference(column("B2 branch-relative", rate, "queries"), column("B2 official", rate, "queries"))
        bars.append(bar(
            f"reward queries to it, branch-relative minus official, lr {rate}", fewer, "< 0", fewer.mean < 0
        ))  # fmt: skip
        queries = sum(column("B2 official", rate, "queries")) / sum(column("DDPO", rate, "queries"))
        bars.append(bar(
            f"reward queries to it, B2 over DDPO, lr {rate}", queries, "< 1", queries < 1, claimed=False
        ))  # fmt: skip
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "B2-DiffuRL", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip


def bar(name: str, value, threshold: str, passed: bool, claimed: bool = True) -> dict:
    """One line of the verdict, a difference with its standard error. claimed=False: expected not to replicate."""
    common = {"id": name, "threshold": threshold, "passed": bool(passed), "claimed": claimed}
    if isinstance(value, float):
        return common | {"value": value}
    digits = 3 if abs(value.mean) < 10 else 0
    text = f"{value.mean:+,.{digits}f} +- {value.standard_error:,.{digits}f}"
    return common | {"value": value.mean, "text": text}
