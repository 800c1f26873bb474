"""Over-optimisation in miniature: gold and proxy against sqrt(KL), best of n and RL, small and large reward models.

    exact     6 words, length 6, 46,656 responses: the best of n by a proxy fitted to 5,000 comparisons, n to 60,000,
              by order statistics; a small proxy (which word stands where) and a large one (pairs of neighbours, too)
    control   a gold reward without the inverted U: selection noise alone, nothing turns down
    ppo       length 4, a table for a policy and one for a critic: 300 rounds without KL, 500 with beta = .5, and the
              distance of the latter from the exact optimum pi_ref exp(proxy / beta) / Z

Run by `minialign replicate ppo` (about two minutes); tests/claims/test_claims.py runs a part of it.
"""

import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.exact import exponential_tilt
from minialign.measure import mean_ci, overoptimisation_law, paired_difference
from minialign.methods import ppo
from minialign.worlds import tokens

SEEDS = 5
NUMBERS = [round(60_000 ** (i / 39)) for i in range(40)]
SIZES = ("small", "large")
PPO = dict(num_prompts=128, num_tokens=4, num_epochs=2, learning_rate=0.02)
ROUNDS = {0.0: 300, 0.5: 500}  # by KL weight
EVERY = 10  # rounds between two looks at the exact law


def exact_run(seed: int, inverted_u: bool) -> dict:
    """Curves of both proxies along n, and the law fitted to each."""
    torch.set_num_threads(1)
    world = tokens.overoptimisation(seed, inverted_u=inverted_u)
    found: dict = {"part": "exact" if inverted_u else "control", "seed": seed}
    for size in SIZES:
        curve = tokens.best_of_n_curve(world.log_prob_ref[0], world.proxies[size][0], world.gold[0], NUMBERS)
        law = overoptimisation_law(curve.kl.sqrt(), curve.gold)
        found[size] = {
            "kl": [round(v, 5) for v in curve.kl.tolist()], "proxy": [round(v, 5) for v in curve.proxy.tolist()],
            "gold": [round(v, 5) for v in curve.gold.tolist()], "law": list(law),
        }  # fmt: skip
    return found


def ppo_run(seed: int, beta: float, rounds: int | None = None) -> dict:
    """Exact gold, proxy and KL along a run of PPO; at its end the KL to the optimum of that beta."""
    torch.set_num_threads(1)
    world = worlds.load("tokens", kind="overoptimisation", seed=seed, length=4)
    table, policy = world.exact, world.policy
    policy.train_all_weights()
    policy.add_value_heads(network=world.critic())
    config = ppo.Config(**PPO, num_iterations=rounds or ROUNDS[beta], beta=beta)
    found: dict = {"part": "ppo", "seed": seed, "beta": beta, "gold": [], "proxy": [], "kl": []}
    for step in ppo.train(policy, world.rewards["small"], world.prompts, config, torch.Generator().manual_seed(seed)):
        if step.number % EVERY == EVERY - 1:
            law = table.log_probs(policy.network)
            found["gold"].append(round(table.mean(law, table.gold), 5))
            found["proxy"].append(round(table.mean(law, table.proxies["small"]), 5))
            found["kl"].append(round(table.kl(law), 5))
    if beta:
        optimum, _ = exponential_tilt(table.log_prob_ref, table.proxies["small"], beta)
        found["to_optimum"] = table.kl(table.log_probs(policy.network), optimum)
    return found


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(ppo_run, seed, beta) for seed in range(SEEDS) for beta in ROUNDS]
        jobs += [pool.submit(exact_run, seed, u) for seed in range(SEEDS) for u in (True, False)]
        return verdict([job.result() for job in jobs])


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""
    exact = [r for r in runs if r["part"] == "exact"]
    control = [r for r in runs if r["part"] == "control"]
    free, held = ([r for r in runs if r["part"] == "ppo" and r["beta"] == beta] for beta in ROUNDS)

    def fall(curve: list[float]) -> float:
        return max(curve) - curve[-1]

    rises = all(b >= a - 1e-4 for r in exact for size in SIZES for a, b in zip(
        r[size]["proxy"], r[size]["proxy"][1:], strict=False))  # fmt: skip
    least = min(fall(r["small"]["gold"]) for r in exact)
    slopes = [r["small"]["law"][1] - r["large"]["law"][1] for r in exact]
    peaks = paired_difference(*([max(r[size]["gold"]) for r in exact] for size in ("large", "small")))
    r2 = statistics.median(r[size]["law"][2] for r in exact for size in SIZES)
    falls = [fall(r["gold"]) for r in free]
    climbs = min(r["proxy"][-1] - r["proxy"][0] for r in free)
    farthest = max(r["to_optimum"] for r in held)
    without = max(fall(r[size]["gold"]) for r in control for size in SIZES)
    bars = [
        bar("best of n: proxy rises with n, every seed and proxy", float(rises), "1", rises),
        bar("best of n, small proxy: gold's peak minus its end, least of the seeds", least, "> 0.5", least > 0.5),
        bar("best of n: small proxy's beta_bon minus the large one's, least of the seeds", min(slopes), "> 0",
            min(slopes) > 0),
        bar("best of n: gold's peak, large proxy minus small", peaks, "> 2 s.e.",
            peaks.mean > 2 * peaks.standard_error),
        bar("best of n: R^2 of d (alpha - beta d), median", r2, ">= 0.85", r2 >= 0.85),
        bar("PPO, beta 0: gold's peak minus its end, mean", statistics.fmean(falls), "> 0.5",
            statistics.fmean(falls) > 0.5),
        bar("PPO, beta 0: rise of the proxy, least of the seeds", climbs, "> 0", climbs > 0),
        bar("PPO, beta 0.5: KL to the exact optimum, nats, worst seed", farthest, "< 0.05", farthest < 0.05),
        bar("control without inverted U: gold's peak minus its end, most", without, "< 0.1", without < 0.1,
            claimed=False),
    ]  # fmt: skip
    table = {
        f"best of n, {size}": {
            "peak": str(mean_ci([max(r[size]["gold"]) for r in exact])),
            "end": str(mean_ci([r[size]["gold"][-1] for r in exact])),
            "beta_bon": str(mean_ci([r[size]["law"][1] for r in exact])),
            "R^2": str(mean_ci([r[size]["law"][2] for r in exact])),
        }
        for size in SIZES
    }
    for name, part in (("PPO, beta 0", free), ("PPO, beta 0.5", held)):
        table[name] = {key: str(mean_ci([r[key][-1] for r in part])) for key in ("gold", "proxy", "kl")}
        table[name]["gold's peak"] = str(mean_ci([max(r["gold"]) for r in part]))
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "PPO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
