"""Over-optimisation in sentences: a tiny assistant climbs a reward model learned from 4,000 noisy preferences.

    vanilla    PPO on the reward model's score, beta = .01, 120 rounds of 64 answers
    PAR        the same on the score shaped by 10 answers of the base model a question, 240 rounds
    equal KL   vanilla at larger beta and PAR at smaller, so that each curve of gold against KL can be read at one KL

The reward model descends from the base model, sees each pair once (one label in ten is wrong) and orders some 60 % of
unseen pairs as gold does. Gold and proxy are those of the answers that each round trains on.

Run by `minialign replicate assistant` (about 20 minutes of CPU); tests/claims/test_claims.py runs a part of it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import par, ppo, reward_model
from minialign.pairs import Pairs

SEEDS = 5
PAIRS = 4000
BETA, ROUNDS = 0.01, 120
WINDOW = 10  # rounds of 64 answers over which gold is averaged: standard error about .07 points
EQUAL_KL = {"vanilla": (0.03, 0.06, 0.12), "par": (0.003,)}  # other betas; 120 rounds
SETTINGS = dict(learning_rate=3e-4)


def learned_proxy(world, seed: int, pairs: int = PAIRS):
    """(reward model, its accuracy on pairs of questions it has not seen): normalised over answers of the base model."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    model = reward_model.RewardModel(world.reward_network(seed=seed), world.policy.tokenizer)
    data = Pairs(*world.preferences(pairs, generator))
    for _ in reward_model.train(model, data, generator=generator):
        pass
    base = world.answers()
    model.normalise([t for p in world.prompts for t in base[p][:16]], [p for p in world.prompts for _ in range(16)])
    prompts, chosen, rejected = world.preferences(2000, torch.Generator().manual_seed(0), 0.0, prompts=world.held_out)
    return model, float((model(chosen, prompts) > model(rejected, prompts)).float().mean())


def train_run(method: str, beta: float, seed: int, rounds: int) -> dict:
    """Gold, proxy and KL of every round, and the answer to one question on the way."""
    torch.set_num_threads(1)
    world = worlds.load("assistant")
    proxy, accuracy = learned_proxy(world, seed)
    rows = {"gold": [], "proxy": [], "kl": [], "right": [], "courtesies": []}

    def watched(texts, prompts):
        scores = proxy(texts, prompts)
        rows["proxy"].append(round(float(scores.mean()), 4))
        for name in ("gold", "right", "courtesies"):
            rows[name].append(round(float(world.rewards[name](texts, prompts).mean()), 4))
        return scores

    base = world.answers()
    references = {p: proxy(base[p][:10], [p] * 10) for p in world.prompts}
    reward = watched if method == "vanilla" else par.Shaped(watched, references, par.Config(method))
    world.policy.train_all_weights()
    world.policy.add_value_heads(own_trunk=True)
    config = ppo.Config(num_iterations=rounds, beta=beta, **SETTINGS)
    for step in ppo.train(world.policy, reward, world.prompts, config, torch.Generator().manual_seed(seed)):
        rows["kl"].append(round(float(step.metrics["kl"]), 4))
    held_out = world.held_out
    noise = world.policy.draw_noise(len(held_out), world.num_tokens, torch.Generator().manual_seed(seed))
    answers = world.policy.generate(held_out, world.num_tokens, noise=noise).texts
    return {"method": method, "beta": beta, "seed": seed, "accuracy": accuracy, **rows,
            "held_out_gold": float(world.oracle(answers, held_out).mean()),
            "answers": dict(zip(held_out[:3], answers[:3], strict=True))}  # fmt: skip


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = []
        for seed in range(SEEDS):
            jobs.append(pool.submit(train_run, "par", BETA, seed, 2 * ROUNDS))
            jobs.append(pool.submit(train_run, "vanilla", BETA, seed, ROUNDS))
            jobs += [pool.submit(train_run, m, beta, seed, ROUNDS) for m in EQUAL_KL for beta in EQUAL_KL[m]]
        return verdict([job.result() for job in jobs])


def windows(values: list[float]) -> list[float]:
    """Means of WINDOW rounds, one after the other."""
    return [sum(values[i : i + WINDOW]) / WINDOW for i in range(0, len(values), WINDOW)]


def fall(run: dict) -> float:
    """By how much gold ends below its best window."""
    gold = windows(run["gold"])
    return max(gold) - gold[-1]


def proxy_since_peak(run: dict) -> float:
    """What the proxy has gained since gold was best; 0 if that was at the end."""
    gold, proxy = windows(run["gold"]), windows(run["proxy"])
    return proxy[-1] - proxy[gold.index(max(gold))]


def at_kl(runs: list[dict], kl: float) -> float:
    """Final gold of runs at several betas, interpolated to a KL; the nearest one's where none lies beyond."""
    points = sorted((windows(r["kl"])[-1], windows(r["gold"])[-1]) for r in runs)
    for (low, a), (high, b) in pairwise(points):
        if low <= kl <= high:
            return a + (b - a) * (kl - low) / (high - low)
    return min(points, key=lambda point: abs(point[0] - kl))[1]


def verdict(runs: list[dict]) -> dict:
    """The bars, from the raw results that are stored beside them."""

    def of(method: str, beta: float = BETA) -> list[dict]:
        return [r for r in runs if r["method"] == method and r["beta"] == beta]

    vanilla, shaped = of("vanilla"), of("par")
    bars = []

    def clear(name: str, difference, claimed: bool = True) -> None:
        above = difference.mean > 2 * difference.standard_error
        bars.append(bar(name, difference, "> 2 s.e.", above, claimed))

    zeros = [0.0] * SEEDS
    clear("vanilla: gold's fall from its best 10 rounds to the last 10", paired_difference(list(map(fall, vanilla)),
                                                                                         zeros))  # fmt: skip
    clear("vanilla: the proxy's gain meanwhile", paired_difference(list(map(proxy_since_peak, vanilla)), zeros))
    clear("the fall, vanilla minus PAR in twice the rounds", paired_difference(list(map(fall, vanilla)), list(map(
        fall, shaped))))  # fmt: skip
    most = max(map(fall, shaped))
    bars.append(bar("PAR: largest fall in twice the rounds, of five seeds", most, "< 0.3", most < 0.3))
    last = {name: [windows(r["gold"])[-1] for r in found] for name, found in (("vanilla", vanilla), ("par", shaped))}
    at_120 = [windows(r["gold"][:ROUNDS])[-1] for r in shaped]
    clear("equal steps: final gold, PAR minus vanilla", paired_difference(at_120, last["vanilla"]))
    matched = [
        at_kl([r for r in runs if r["method"] == "vanilla" and r["seed"] == run["seed"]], windows(run["kl"])[-1])
        for run in shaped
    ]
    clear("equal KL (PAR's): final gold, PAR minus vanilla", paired_difference(last["par"], matched), claimed=False)
    table = {"accuracy of the reward models": str(mean_ci([r["accuracy"] for r in vanilla]))}
    for method in ("vanilla", "par"):
        for beta in sorted({r["beta"] for r in runs if r["method"] == method}):
            found = of(method, beta)
            table[f"{method}, beta {beta:g}"] = {
                "best gold": str(mean_ci([max(windows(r["gold"])) for r in found])),
                "final gold": str(mean_ci([windows(r["gold"])[-1] for r in found])),
                "final proxy": str(mean_ci([windows(r["proxy"])[-1] for r in found])),
                "KL": str(mean_ci([windows(r["kl"])[-1] for r in found])),
                "falls": [round(fall(r), 2) for r in found],
            }
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "PAR, assistant", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
