"""Preference As Reward in miniature: four prompts, 1,296 responses each, a proxy with the right slope near the base and
the wrong one far away; gold is evaluated exactly.

    training    policy gradient without critic, 300 rounds of 64 responses, beta = .05, one shaping after another
    equal KL    PAR at beta = .1 against vanilla at seven betas, interpolated to PAR's KL; and exactly, by tilting the
                base to a given KL, no training
    control     a proxy whose error has light tails, where shaping does not help; heavy tails; one exploit in a hundred

Run by `minialign replicate par` (about five minutes); tests/claims/test_claims.py runs a part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import par, ppo
from minialign.statistics import Moments
from minialign.worlds import tokens

SEEDS = 10
FIRST = 5  # seeds of the bars that the sheet sets for five
METHODS = ("vanilla", "meanstd", "clip", "minmax", "lsc", "sigmoid", "sgfc", "par", "par, one reference")
VANILLA_BETAS = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
KLS = (0.5, 1.0, 1.25, 2.0, 4.0)
TILTED = ("vanilla", "sigmoid", "sgfc", "par")
ERRORS = ("normal", "student", "exploit")
# lambda = 1 and a critic that stays at 0: plain sums of the rewards to come, whitened over the round
TRAINING = dict(
    num_prompts=64, num_tokens=4, num_epochs=1, gae_lambda=1.0, value_coefficient=0.0, learning_rate=0.03,
    adam_eps=1e-8, max_grad_norm=1e9,
)  # fmt: skip


def train_run(method: str, beta: float, seed: int, rounds: int = 300) -> dict:
    """Exact gold along one run, and its KL at the end."""
    torch.set_num_threads(1)
    world = worlds.load("tokens", seed=seed)
    table, policy, reward = world.exact, world.policy, world.rewards["proxy"]
    policy.train_all_weights()
    policy.add_value_heads(network=world.critic())
    count = 1 if method.endswith("one reference") else 10
    references = par.reference_rewards(
        policy, reward, world.prompts, count, torch.Generator().manual_seed(1_000 + seed), num_tokens=4
    )
    shaped = par.Shaped(reward, references, par.Config(method.split(",")[0]))
    config = ppo.Config(**TRAINING, num_iterations=rounds, beta=beta)
    gold = []
    for step in ppo.train(policy, shaped, world.prompts, config, torch.Generator().manual_seed(seed)):
        if step.number % 10 == 9:
            gold.append(round(table.mean(table.log_probs(policy.network), table.gold), 5))
    law = table.log_probs(policy.network)
    return {"part": "train", "method": method, "beta": beta, "seed": seed, "gold": gold, "kl": table.kl(law),
            "proxy": table.mean(law, table.proxies["proxy"])}  # fmt: skip


def tilt_run(seed: int) -> dict:
    """Gold of the exact tilts of the base by each shaped reward, at given KLs, mean over prompts."""
    torch.set_num_threads(1)
    world = tokens.padding(seed)
    proxy, ref = world.proxies["proxy"], world.log_prob_ref
    generator = torch.Generator().manual_seed(1_000 + seed)
    drawn = torch.multinomial(ref.exp(), 10, replacement=True, generator=generator)
    gold = {}
    for method in TILTED:
        for kl in KLS:
            rows = [
                tilt(ref[p], par.shape_reward(r, r[d].expand(len(r), -1), method), kl)
                for p, (r, d) in enumerate(zip(proxy, drawn, strict=True))
            ]
            gold[f"{method}, {kl:g}"] = world.mean(torch.stack(rows), world.gold)
    return {"part": "tilt", "seed": seed, "gold": gold}


def tilt(ref: torch.Tensor, f: torch.Tensor, kl: float) -> torch.Tensor:
    """The tilt at that KL, or at the most that is possible where many share the best f (a clip's ceiling)."""
    most = -float(torch.where(f == f.max(), ref, -torch.inf).logsumexp(-1))
    return tokens.tilt_to_kl(ref, f, min(kl, 0.999 * most))


def control_run(error: str, seed: int) -> dict:
    """Gold of exact tilts in a world without structure, where the proxy is gold plus an error."""
    ref, gold, proxy, refs = tokens.unstructured(error, seed=seed)
    found = {}
    for method in ("vanilla", "sgfc", "par", "frozen clip"):
        frozen = Moments.of(proxy)
        f = par.shape_reward(proxy, refs.expand(len(proxy), -1), method.split()[-1], frozen)
        for kl in (0.5, 1.0, 2.0):
            law = tilt(ref, f, kl)
            found[f"{method}, {kl:g}"] = float((law.exp() * gold).sum())
    return {"part": "control", "error": error, "seed": seed, "gold": found}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(train_run, method, 0.05, seed) for method in METHODS for seed in range(SEEDS)]
        jobs += [pool.submit(train_run, "par", 0.1, seed) for seed in range(SEEDS)]
        jobs += [pool.submit(train_run, "vanilla", beta, seed) for beta in VANILLA_BETAS for seed in range(SEEDS)]
        jobs += [pool.submit(tilt_run, seed) for seed in range(SEEDS)]
        jobs += [pool.submit(control_run, error, seed) for error in ERRORS for seed in range(SEEDS)]
        return verdict([job.result() for job in jobs])


def at_kl(runs: list[dict], kl: float) -> float:
    """Gold of vanilla runs at several betas, interpolated to a KL that they bracket."""
    points = sorted((r["kl"], r["gold"][-1]) for r in runs)
    for (low, a), (high, b) in pairwise(points):
        if low <= kl <= high:
            return a + (b - a) * (kl - low) / (high - low)
    raise ValueError(f"KL {kl:.2f} lies outside {points[0][0]:.2f} to {points[-1][0]:.2f}: widen VANILLA_BETAS.")


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""
    train = [r for r in runs if r["part"] == "train"]

    def final(method: str, seeds: int = SEEDS, beta: float = 0.05) -> list[float]:
        return [r["gold"][-1] for r in train if r["method"] == method and r["beta"] == beta and r["seed"] < seeds]

    def tilted(method: str, kl: float) -> list[float]:
        return [r["gold"][f"{method}, {kl:g}"] for r in runs if r["part"] == "tilt"]

    def control(error: str, method: str, kl: str = "1") -> list[float]:
        return [r["gold"][f"{method}, {kl}"] for r in runs if r["part"] == "control" and r["error"] == error]

    par_runs = [r for r in train if r["method"] == "par" and r["beta"] == 0.1]
    matched = [
        at_kl([r for r in train if r["method"] == "vanilla" and r["beta"] in VANILLA_BETAS and r["seed"] == p["seed"]],
              p["kl"])
        for p in par_runs
    ]  # fmt: skip
    bars = []

    def clear(name: str, difference, claimed: bool = True) -> None:
        above = difference.mean > 2 * difference.standard_error
        bars.append(bar(name, difference, "> 2 s.e.", above, claimed))

    clear("equal steps: final gold, PAR minus vanilla, 5 seeds", paired_difference(final("par", FIRST), final(
        "vanilla", FIRST)))  # fmt: skip
    clear("equal steps: final gold, PAR minus SgFc, 10 seeds", paired_difference(final("par"), final("sgfc")))
    one = paired_difference(final("par, one reference"), final("par"))
    bars.append(bar("final gold, one reference minus ten", one, "within 0.25", abs(one.mean) < 0.25))
    clear("equal KL, trained: PAR at beta 0.1 minus vanilla", paired_difference([r["gold"][-1] for r in par_runs],
                                                                              matched))  # fmt: skip
    for kl in (1.0, 2.0):
        clear(f"KL {kl:g}, exact tilt: PAR minus vanilla", paired_difference(tilted("par", kl), tilted("vanilla", kl)))
    peak = {m: [max(r["gold"]) for r in train if r["method"] == m and r["beta"] == 0.05] for m in ("par", "vanilla")}
    gain = paired_difference(peak["par"], peak["vanilla"])
    bars.append(bar("peak gold on the way, PAR minus vanilla", gain, "> 0", gain.mean > 0, claimed=False))
    for error in ERRORS:
        clear(f"control, {error} error, KL 1: PAR minus vanilla",
              paired_difference(control(error, "par"), control(error, "vanilla")), claimed=False)  # fmt: skip
    clear("control, exploits, KL 1: frozen clip minus PAR",
          paired_difference(control("exploit", "frozen clip"), control("exploit", "par")), claimed=False)  # fmt: skip
    table = {
        method: {"final gold": str(mean_ci(final(method))),
                 "KL": str(mean_ci([r["kl"] for r in train if r["method"] == method and r["beta"] == 0.05]))}
        for method in METHODS
    }  # fmt: skip
    table |= {f"exact tilt, KL {kl:g}": {m: str(mean_ci(tilted(m, kl))) for m in TILTED} for kl in KLS}
    table |= {
        f"control, {error}": {f"{m}, KL {kl}": str(mean_ci(control(error, m, kl)))
                              for m in ("vanilla", "sgfc", "par", "frozen clip") for kl in ("0.5", "1", "2")}
        for error in ERRORS
    }  # fmt: skip
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "PAR", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
