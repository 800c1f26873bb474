"""Constrained RLHF in sentences: the tiny assistant, and two reward models learned from noisy preferences, one about
being right, one about courtesies. Gold likes both, but of courtesies only one or two.

    runs     PPO at beta .01 on each reward model alone, and on their sum
    theta    where a polynomial fitted to gold along these three runs peaks, the paper's proxy points, seed by seed
    then     mu-, xi- and All-PPO and PPO-SAT at these thresholds, and PPO on the sum at larger beta: a fixed weighting
             that was told how much is enough in another way

Everything else is equal: 80 rounds of 64 answers, a critic with its own trunk, one loop. Gold is that of the answers
that each round trains on, over the last ten rounds.

Run by `minialign replicate constrained_assistant` (about 20 minutes of CPU).
"""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_assistant import windows
from claim_b2diffurl import bar

from minialign import search, worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import constrained, reward_model
from minialign.pairs import Pairs
from minialign.rewards import Saturated, weighted_sum
from minialign.worlds import assistant

SEEDS = 5
PAIRS, NOISE = 4000, 0.1
BETA, BETAS = 0.01, (0.06, 0.12)
ROUNDS = 80
NAMES = ("right", "courtesies")
SETTINGS = dict(num_prompts=64, num_epochs=4, learning_rate=3e-4, max_grad_norm=1.0)
ALONE = {"PPO": (1.0, 1.0), "PPO on right": (1.0, 0.0), "PPO on courtesies": (0.0, 1.0)}


def preferences(name: str, generator: torch.Generator, num_pairs: int = PAIRS, noise: float = NOISE):
    """(prompts, chosen, rejected): pairs of base answers that differ in `name`; one label in ten is turned round."""
    rng, source = random.Random(int(torch.randint(2**62, (1,), generator=generator))), assistant.answers()
    of = {"right": assistant.right, "courtesies": assistant.courtesies}[name]
    scores = {prompt: of(texts, [prompt] * len(texts)).tolist() for prompt, texts in source.items()}
    rows: tuple[list, list, list] = ([], [], [])
    while len(rows[0]) < num_pairs:
        prompt = rng.choice(assistant.PROMPTS)
        first, second = (rng.randrange(len(source[prompt])) for _ in range(2))
        margin = scores[prompt][first] - scores[prompt][second]
        if margin == 0:
            continue
        if (margin > 0) == (rng.random() < noise):
            first, second = second, first
        for column, value in zip(rows, (prompt, source[prompt][first], source[prompt][second]), strict=True):
            column.append(value)
    return rows


def reward_models(world, seed: int) -> dict:
    """Both, fitted to their preferences and normalised over answers of the base model."""
    models, base = {}, assistant.answers()
    texts, prompts = [t for p in world.prompts for t in base[p][:16]], [p for p in world.prompts for _ in range(16)]
    for i, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(1_000 + 100 * i + seed)
        model = reward_model.RewardModel(world.reward_network(seed=seed), world.policy.tokenizer)
        for _ in reward_model.train(model, Pairs(*preferences(name, generator)), generator=generator):
            pass
        model.normalise(texts, prompts)
        models[name] = model
    return models


def train_run(models: dict, method: str, seed: int, theta=None, rounds: int = ROUNDS) -> dict:
    """Gold, both reward models' scores, KL and multipliers of every round."""
    world = worlds.load("assistant")
    found: dict = {"method": method, "seed": seed, "gold": [], "right": [], "courtesies": [], "v": [[], []], "kl": [],
                   "l": [[], []]}  # fmt: skip

    def watched(i: int):
        def reward(texts, prompts):
            scores = models[NAMES[i]](texts, prompts)
            found["v"][i].append(round(float(scores.mean()), 4))
            if i == 0:
                for name in ("gold", "right", "courtesies"):
                    found[name].append(round(float(world.rewards[name](texts, prompts).mean()), 4))
            return scores

        return reward

    rewards = [watched(0), watched(1)]
    if method.startswith("PPO"):
        name, _, beta = method.partition(", beta ")
        weights = dict(zip(NAMES, ALONE.get(name, ALONE["PPO"]), strict=True))
        rewards = [Saturated(rewards, theta) if name == "PPO-SAT" else
                   weighted_sum(dict(zip(NAMES, rewards, strict=True)), weights)]  # fmt: skip
        config = constrained.Config(variant="fixed", beta=float(beta or BETA), num_iterations=rounds, **SETTINGS)
    else:
        config = constrained.Config(tuple(theta), method, beta=BETA, num_iterations=rounds, **SETTINGS)
    world.policy.train_all_weights()
    world.policy.add_value_heads(len(rewards) + 1, own_trunk=True)
    for step in constrained.train(world.policy, rewards, world.prompts, config, torch.Generator().manual_seed(seed)):
        found["kl"].append(round(float(step.metrics["kl"]), 4))
        for i in range(2):
            found["l"][i].append(round(float(step.metrics.get(f"multiplier_{i}", 0.0)), 4))
    return found


def seed_run(seed: int, rounds: int = ROUNDS) -> list[dict]:
    """All runs of one seed, which share their reward models and the thresholds fitted to the first three."""
    torch.set_num_threads(1)
    world = worlds.load("assistant")
    models = reward_models(world, seed)
    runs = [train_run(models, name, seed, rounds=rounds) for name in ALONE]
    theta = proxy_points(runs)
    methods = ["mu", "xi", "all", "PPO-SAT", *(f"PPO, beta {beta:g}" for beta in BETAS)]
    runs += [train_run(models, method, seed, theta, rounds) for method in methods]
    return [run | {"theta": theta} for run in runs]


def proxy_points(runs: list[dict]) -> list[float]:
    """Thresholds of both reward models, fitted to gold along the runs, in means of five rounds (320 answers)."""

    def smooth(values: list[float]) -> list[float]:
        return [sum(values[i : i + 5]) / 5 for i in range(0, len(values), 5)]

    values = torch.tensor([[v for run in runs for v in smooth(run["v"][i])] for i in range(2)], dtype=torch.float64)
    gold = torch.tensor([g for run in runs for g in smooth(run["gold"])], dtype=torch.float64)
    return search.fit_proxy_points(values.T, gold).tolist()


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict([run for runs in pool.map(seed_run, range(SEEDS)) for run in runs])


def verdict(runs: list[dict]) -> dict:
    """The paper's ordering, from the raw results that are stored beside it."""

    def of(method: str) -> list[dict]:
        return [r for r in runs if r["method"] == method]

    def final(method: str, key: str = "gold") -> list[float]:
        return [windows(r[key])[-1] for r in of(method)]

    bars = []

    def clear(name: str, a: list[float], b: list[float], claimed: bool = True) -> None:
        difference = paired_difference(a, b)
        bars.append(bar(name, difference, "> 2 s.e.", difference.mean > 2 * difference.standard_error, claimed))

    for method in ("mu", "xi"):
        for other in ("PPO", "PPO-SAT", "all"):
            clear(f"final gold, {method}-PPO minus {'All-PPO' if other == 'all' else other}", final(method),
                  final(other))  # fmt: skip
    tuned = max((f"PPO, beta {beta:g}" for beta in BETAS), key=lambda method: sum(final(method)))
    for method in ("mu", "xi"):
        clear(f"final gold, {method}-PPO minus PPO at its best beta, {tuned.split()[-1]}", final(method), final(tuned),
              claimed=False)  # fmt: skip
    clear("gold's best ten rounds minus its last ten, PPO", [max(windows(r["gold"])) for r in of("PPO")], final("PPO"))
    for method in ("mu", "xi"):
        off = [max(abs(windows(r["v"][i])[-1] - r["theta"][i]) for r in of(method)) for i in range(2)]
        name = f"{method}-PPO: distance from theta in the last ten rounds, worst seed and reward"
        bars.append(bar(name, max(off), "< 0.3", max(off) < 0.3))
    table = {
        method: {
            **{key: str(mean_ci(final(method, key))) for key in ("gold", "right", "courtesies", "kl")},
            "best gold": str(mean_ci([max(windows(r["gold"])) for r in of(method)])),
            "scores": [[round(windows(r["v"][i])[-1], 2) for i in range(2)] for r in of(method)],
        }
        for method in dict.fromkeys(r["method"] for r in runs)
    }
    table["theta"] = [[round(x, 2) for x in r["theta"]] for r in of("PPO")]
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Constrained RLHF, assistant",
        "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": len(of("PPO")), "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
