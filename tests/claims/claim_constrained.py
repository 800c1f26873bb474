"""Constrained RLHF in miniature: 6 words, length 4, a table for a policy, two correlated rewards that are each worth
having up to a point. The evaluation is one of the corpus: of the rewards' means and the KL, exact at every look,

    E = -((v_1 - .5) / .2)^2 / 2 - ((v_2 - .4) / .15)^2 / 2 - .2 KL(pi || pi_ref)

    methods    worlds 1 to 5 (mu, xi: to 20), 800 rounds of 128 responses: PPO on the sum, PPO-SAT at four KL weights,
               All-, mu- and xi-PPO at theta = (.5, .4), two unsquashed duals, a fast multiplier
    transfer   weights lambda, and thresholds theta, both tuned exactly on world 0, carried to worlds 1 to 5 (trained)
               and 1 to 9 (exact tilts): as they are, with the two words raised by 1 in the reference, lowered by 1
    points     where a polynomial fitted to E along runs peaks, for one reward at a time and for both
    search     theta hidden, Nelder-Mead: a new policy for each function value, or, as in the paper, one that goes on

Run by `minialign replicate constrained` (about ten minutes of CPU); tests/claims/test_claims.py runs a part of it.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar
from scipy.optimize import minimize

from minialign import exact, search, worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import constrained
from minialign.rewards import Saturated, weighted_sum
from minialign.worlds import tokens

SEEDS = 5  # worlds 1 to 5; world 0 is for tuning
MORE = 20  # worlds for the distance of mu and xi to the I-projection, which varies much
ROUNDS = 800
THETA = (0.5, 0.4)
EVERY = 10  # rounds between two looks at the exact law
LAST = 20  # looks, the last 200 rounds: descent-ascent promises something of averages alone (sheet, trap 9)
TABLE = dict(
    num_tokens=4, baseline="batch", gae_lambda=1.0, learning_rate=0.02, rows_per_pass=128, max_grad_norm=1e9,
)  # fmt: skip
SAT_BETAS = (0.005, 0.01, 0.02, 0.05)
REFERENCES = {"same": 0.0, "raised": 1.0, "lowered": -1.0}
NAMES = ("fives", "fours")
CONSTRAINED = {
    "mu": dict(variant="mu"),
    "xi": dict(variant="xi"),
    "all": dict(variant="all"),
    "dual, standardised": dict(variant="mu", squash=False),
    "dual": dict(variant="mu", squash=False, standardise=False, multiplier_lr=2.0),
    "xi, lr 0.5": dict(variant="xi", multiplier_lr=0.5),
    "xi, lr 0.025": dict(variant="xi", multiplier_lr=0.025),  # tanh is four times as steep at 0 as a sigmoid
}
LANDING = ("mu", "xi", "xi, lr 0.025")  # in all MORE worlds
FIXED = {"ppo": (1.0, 1.0), "ppo on fives": (1.0, 0.0), "ppo on fours": (0.0, 1.0)}


def evaluation(v1: float, v2: float, kl: float) -> float:
    """The corpus's score, as in the paper: what the rewards' means are worth, minus what was given up for it."""
    return -(((v1 - 0.5) / 0.2) ** 2) / 2 - ((v2 - 0.4) / 0.15) ** 2 / 2 - 0.2 * kl


class Run:
    """A policy in its world, trained for some rounds, and looked at exactly."""

    def __init__(self, seed: int, raised: float = 0.0):
        world = worlds.load("tokens", kind="constrained", seed=seed, raised=raised)
        self.table, self.policy, self.prompts = world.exact, world.policy, world.prompts
        self.rewards = [world.rewards[name] for name in NAMES]
        self.policy.train_all_weights()
        self.generator, self.resume, self.done = torch.Generator().manual_seed(seed), None, 0
        self.curve: dict[str, list[float]] = {"v1": [], "v2": [], "kl": [], "l1": [], "l2": []}
        self.laws: list[torch.Tensor] = []

    def look(self) -> tuple[float, float, float]:
        """v_1, v_2, KL to the reference."""
        law = self.table.log_probs(self.policy.network)
        self.laws = [*self.laws, law][-LAST:]
        return (*(self.table.mean(law, self.table.proxies[name]) for name in NAMES), self.table.kl(law))

    def train(self, rounds: int, rewards=None, every: int = EVERY, **settings) -> "Run":
        """Goes on for `rounds` rounds, multipliers and optimizer included."""
        config = constrained.Config(num_iterations=self.done + rounds, **TABLE | settings)
        rewards = self.rewards if rewards is None else rewards
        steps = constrained.train(self.policy, rewards, self.prompts, config, self.generator, self.resume)
        for step in steps:
            if step.number % every == every - 1:
                row = (*self.look(), *(float(step.metrics.get(f"multiplier_{i}", 0.0)) for i in range(2)))
                for name, value in zip(self.curve, row, strict=True):
                    self.curve[name].append(round(value, 5))
        self.done, self.resume = self.done + rounds, step.checkpoint()
        return self

    def weighted(self, weights: tuple[float, float], beta: float, rounds: int = ROUNDS) -> "Run":
        reward = weighted_sum(dict(zip(NAMES, self.rewards, strict=True)), dict(zip(NAMES, weights, strict=True)))
        return self.train(rounds, [reward], variant="fixed", beta=beta)

    def to_projection(self, theta: tuple[float, ...]) -> tuple[float, float]:
        """KL(pi || I-projection of the reference onto v = theta), nats: of the last law, of the mean of the last 20."""
        target, mean = projection(self.table, theta), torch.stack(self.laws).logsumexp(0) - math.log(len(self.laws))
        last, average = (float(exact.discrete_kl(law[0], target)) for law in (self.laws[-1], mean))
        return last, average


def features(table: tokens.Enumerated) -> torch.Tensor:
    return torch.cat([table.proxies[name] for name in NAMES]).T


def projection(table: tokens.Enumerated, theta: tuple[float, ...]) -> torch.Tensor:
    return exact.i_projection(table.log_prob_ref[0], features(table), torch.tensor(theta, dtype=torch.float64))[0]


def tilted(table: tokens.Enumerated, weights) -> tuple[float, float, float]:
    """(v_1, v_2, KL) of pi_ref exp(weights . r) / Z."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    law = (table.log_prob_ref[0] + features(table) @ weights).log_softmax(-1)
    return (*(law.exp() @ features(table)).tolist(), float(exact.discrete_kl(law, table.log_prob_ref[0])))


def best_tilt(table: tokens.Enumerated) -> tuple[float, float]:
    """lambda of the tilt with the largest E. That tilt's means are the best thresholds."""
    found = minimize(lambda w: -evaluation(*tilted(table, w)), (5.0, 5.0), method="Nelder-Mead")
    return tuple(found.x.tolist())


def tuned() -> tuple[tuple[float, float], tuple[float, float]]:
    """(lambda, theta): the best fixed weighting of world 0, and the thresholds that it reaches there."""
    table = tokens.constrained(0)
    weights = best_tilt(table)
    return weights, tilted(table, weights)[:2]


def method_run(method: str, seed: int) -> dict:
    """One method on one world: v_1, v_2, KL and the multipliers on the way; gold per response at the end."""
    torch.set_num_threads(1)
    run, found = Run(seed), {"part": "methods", "method": method, "seed": seed}
    if method in FIXED:
        run.weighted(FIXED[method], beta=0.02)
    elif method.startswith("sat"):
        reward = Saturated(run.rewards, THETA)
        run.train(ROUNDS, [reward], variant="fixed", beta=float(method.split()[1]))
    else:
        run.train(ROUNDS, thresholds=THETA, **CONSTRAINED[method])
    last, average = run.to_projection(THETA)
    return found | run.curve | {
        "to_projection": last, "average_to_projection": average,
        "per_response": run.table.mean(run.laws[-1], run.table.gold),
    }  # fmt: skip


def transfer_run(method: str, reference: str, seed: int) -> dict:
    """mu, xi at the tuned thresholds, or the tuned weights, in another world and with another reference."""
    torch.set_num_threads(1)
    weights, theta = tuned()
    run = Run(seed, REFERENCES[reference])
    if method == "weights":
        run.weighted(weights, beta=1.0)
    else:
        run.train(ROUNDS, thresholds=theta, variant=method)
    return {"part": "transfer", "method": method, "reference": reference, "seed": seed, **run.curve}


def exact_run(seed: int) -> dict:
    """E of exact tilts in world `seed`: by the tuned thresholds, by the tuned weights, and the best there is."""
    torch.set_num_threads(1)
    weights, theta = tuned()
    found: dict = {"part": "exact", "seed": seed, "weights": list(weights), "theta": list(theta)}
    for name, raised in REFERENCES.items():
        table = tokens.constrained(seed, raised=raised)
        law = projection(table, theta)
        kl = float(exact.discrete_kl(law, table.log_prob_ref[0]))
        found[name] = {
            "theta": evaluation(*theta, kl), "weights": evaluation(*tilted(table, weights)),
            "best": evaluation(*tilted(table, best_tilt(table))),
        }  # fmt: skip
    return found


def search_run(seed: int) -> dict:
    """Nelder-Mead over hidden thresholds, cold and warm; its simplex lies between the base and what PPO has seen."""
    torch.set_num_threads(1)
    seen = Run(seed)
    low = torch.tensor(seen.look()[:2])
    seen.weighted((1.0, 1.0), beta=0.02)
    high = torch.tensor([max(seen.curve["v1"]), max(seen.curve["v2"])])
    simplex = low + (high - low) * torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))

    def cold(theta: list[float]) -> float:
        return evaluation(*Run(seed).train(250, thresholds=tuple(theta), every=250).look())

    going_on = Run(seed)

    def warm(theta: list[float]) -> float:
        return evaluation(*going_on.train(60, thresholds=tuple(theta), every=60).look())

    table = tokens.constrained(seed)
    found: dict = {"part": "search", "seed": seed, "best_theta": list(tilted(table, best_tilt(table))[:2])}
    for name, evaluate, values in (("cold", cold, 20), ("warm", warm, 25)):
        theta, value, tried = search.nelder_mead(evaluate, simplex, values)
        found[name] = {"theta": theta, "best_seen": value, "tried": tried}
    final = Run(seed)
    final.generator.manual_seed(100 + seed)  # not the noise that the search has seen
    found["cold"]["final"] = evaluation(*final.train(ROUNDS, thresholds=tuple(found["cold"]["theta"])).look())
    found["warm"]["final"] = evaluation(*going_on.look())
    return found


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    seeds = range(1, SEEDS + 1)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(search_run, seed) for seed in seeds]
        methods = [*FIXED, *(f"sat {beta:g}" for beta in SAT_BETAS), *CONSTRAINED]
        jobs += [pool.submit(method_run, method, seed) for method in methods for seed in seeds]
        jobs += [pool.submit(method_run, m, seed) for m in LANDING for seed in range(SEEDS + 1, MORE + 1)]
        jobs += [pool.submit(transfer_run, method, reference, seed) for method in ("mu", "xi", "weights")
                 for reference in REFERENCES for seed in seeds]  # fmt: skip
        jobs += [pool.submit(exact_run, seed) for seed in range(1, 10)]
        return verdict([job.result() for job in jobs])


def curve_of(run: dict) -> list[float]:
    return [evaluation(*row) for row in zip(run["v1"], run["v2"], run["kl"], strict=True)]


def proxy_points(runs: list[dict]) -> dict[str, list[float]]:
    """theta fitted to E along the runs of plain PPO of one world: each reward by its own run, and both by all three."""
    by = {r["method"]: r for r in runs if r["method"] in FIXED}
    first, second = by["ppo on fives"], by["ppo on fours"]

    def fit(columns: list[list[float]], e: list[float]) -> list[float]:
        points = torch.tensor(columns, dtype=torch.float64).T
        return search.fit_proxy_points(points, torch.tensor(e, dtype=torch.float64)).tolist()

    alone = fit([first["v1"]], curve_of(first)) + fit([second["v2"]], curve_of(second))
    columns = [[v for r in by.values() for v in r[key]] for key in ("v1", "v2")]
    return {"alone": alone, "joint": fit(columns, [e for r in by.values() for e in curve_of(r)])}


def at_thresholds(seed: int, theta) -> float:
    """E of the I-projection onto v = theta."""
    table = tokens.constrained(seed)
    return evaluation(*theta, float(exact.discrete_kl(projection(table, theta), table.log_prob_ref[0])))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def part(name: str, **wanted) -> list[dict]:
        return [r for r in runs if r["part"] == name and all(r[k] == v for k, v in wanted.items())]

    def five(method: str) -> list[dict]:
        return [r for r in part("methods", method=method) if r["seed"] <= SEEDS]

    def final(method: str, reference: str | None = None) -> list[float]:
        found = five(method) if reference is None else part("transfer", method=method, reference=reference)
        return [curve_of(r)[-1] for r in found]

    bars = []

    def clear(name: str, a: list[float], b: list[float], claimed: bool = True) -> None:
        difference = paired_difference(a, b)
        bars.append(bar(name, difference, "> 2 s.e.", difference.mean > 2 * difference.standard_error, claimed))

    for method in ("mu", "xi"):
        clear(f"final E, {method}-PPO minus PPO on the sum", final(method), final("ppo"))
    sats = [f"sat {beta:g}" for beta in SAT_BETAS]
    best_sat = max(sats, key=lambda name: sum(final(name)))
    clear(f"final E, mu-PPO minus PPO-SAT at its best KL weight, {best_sat.split()[1]}", final("mu"), final(best_sat))

    def below(name: str, value: float, limit: float, claimed: bool = False) -> None:
        bars.append(bar(name, value, f"< {limit:g}", value < limit, claimed))

    for method in ("mu", "xi"):
        found = part("methods", method=method)
        ends = [(theta, [r[key][-1] for r in found]) for key, theta in zip(("v1", "v2"), THETA, strict=True)]
        mean_off = max(abs(sum(vs) / len(vs) - theta) for theta, vs in ends)
        far, average = ([r[key] for r in found] for key in ("to_projection", "average_to_projection"))
        name = f"{method}-PPO"
        below(f"{name}: distance of v from theta, mean of twenty worlds, worse reward", mean_off, 0.03, True)
        below(f"{name}: the same, worst world", max(abs(v - theta) for theta, vs in ends for v in vs), 0.03)
        below(f"{name}: KL to the I-projection, nats, mean over twenty worlds", sum(far) / len(far), 0.15, True)
        below(f"{name}: the same, worlds 1 to 5", sum(far[:SEEDS]) / SEEDS, 0.15)
        below(f"{name}: the same, worst world", max(far), 0.15)
        below(f"{name}: the same of the mean law of the last 200 rounds", sum(average) / len(average), 0.15)
    far = [r["to_projection"] for r in part("methods", method="xi, lr 0.025")]
    below("xi-PPO, a quarter of the multipliers' lr: KL to the I-projection", sum(far) / len(far), 0.15)
    for reference in REFERENCES:
        for method in ("mu", "xi"):
            clear(f"{reference} reference: final E, {method}-PPO minus fixed weights, both tuned on world 0",
                  final(method, reference), final("weights", reference), claimed=reference == "raised")  # fmt: skip
        by_theta, by_weights = ([r[reference][key] for r in part("exact")] for key in ("theta", "weights"))
        clear(f"{reference} reference, exact, nine worlds: E by thresholds minus by weights", by_theta, by_weights,
              claimed=reference == "raised")  # fmt: skip
    search = part("search")
    clear("Nelder-Mead, cold start: final E minus PPO's", [r["cold"]["final"] for r in search], final("ppo"))
    clear("Nelder-Mead, warm start: final E minus cold start's", [r["warm"]["final"] for r in search],
          [r["cold"]["final"] for r in search], claimed=False)  # fmt: skip
    per_response = {m: [r["per_response"] for r in five(m)] for m in ("mu", *sats)}
    winner = max(sats, key=lambda name: sum(per_response[name]))
    clear(f"gold quadratic per response: mu-PPO minus PPO-SAT at KL weight {winner.split()[1]}", per_response["mu"],
          per_response[winner], claimed=False)  # fmt: skip

    def distance(theta: list[float], target: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(theta, target, strict=True))

    table: dict = {
        method: {
            "final E": str(mean_ci(final(method))),
            "best E": str(mean_ci([max(curve_of(r)) for r in five(method)])),
            **{key: str(mean_ci([r[key][-1] for r in five(method)])) for key in ("v1", "v2", "kl")},
            "per response": str(mean_ci([r["per_response"] for r in five(method)])),
        }
        for method in (*FIXED, *sats, *CONSTRAINED)
    }
    table |= {
        f"{reference} reference": {m: str(mean_ci(final(m, reference))) for m in ("mu", "xi", "weights")}
        for reference in REFERENCES
    }
    table["lowered reference, most v1"] = {
        m: [max(r["v1"]) for r in part("transfer", method=m, reference="lowered")] for m in ("mu", "xi")
    }
    table["tuned on world 0"] = {key: [round(x, 3) for x in part("exact")[0][key]] for key in ("weights", "theta")}
    for name in ("cold", "warm"):
        table[f"Nelder-Mead, {name}"] = {
            "final E": [round(r[name]["final"], 3) for r in search],
            "best E seen": [round(r[name]["best_seen"], 3) for r in search],
            "error of theta": [round(distance(r[name]["theta"], r["best_theta"]), 3) for r in search],
        }
    fitted = {r["seed"]: proxy_points(part("methods", seed=r["seed"])) for r in search}
    by_joint, by_alone, by_theta = (
        [at_thresholds(seed, theta or points[key]) for seed, points in fitted.items()]
        for key, theta in (("joint", None), ("alone", None), ("", THETA))
    )
    clear("exact: E at thresholds fitted jointly minus at those fitted alone", by_joint, by_alone, claimed=False)
    clear("exact: E at thresholds fitted jointly minus at (.5, .4)", by_joint, by_theta, claimed=False)
    table["proxy points"] = {
        name: [[round(x, 2) for x in points[name]] for points in fitted.values()] for name in ("alone", "joint")
    } | {"exact": [[round(x, 2) for x in r["best_theta"]] for r in search]}
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Constrained RLHF", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
