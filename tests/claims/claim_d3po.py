"""D3PO's claims in miniature, on `ring`: 60 rounds of 64 pairs, and of each it is told which one lies further right.

Everyone draws 128 images a round and makes one optimizer step a round at learning rate 1e-3, but for the arms that are
named; 20 denoising steps, eta 1. The sheet leaves open how many steps a round makes: one reproduces its trial values
(on a seed of its own), the eight that stand closer to the authors' code are a control. Baselines: fine-tuning on the
preferred image of each pair, round by round (RAFT, best of two, at two rates, with eight steps a round, so that it gets
the better hand) and offline (7,680 images of the base model); DDPO, which sees the reward itself, with the same rounds,
steps and rate. Quality: mean log p of the samples under the data's density, of which the base model has about -1.9.

The bars are the sheet's. Controls, not claimed: the same comparison where samples are still data (log p above -4), with
neither method held, with DPOK's KL, before the clip binds; what the shared start, the reference's refreshment, seven
images a prompt, and a labeller that errs as people do (Bradley-Terry) change.

Run by `minialign replicate d3po`; tests/claims/test_claims.py runs a small part of it.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import d3po, ddpo, diffusion_dpo, raft
from minialign.pairs import bradley_terry, by_reward, draw_pairs

SEEDS, ROUNDS, EVERY, PAIRS = 5, 60, 4, 64
REGION = -4.0  # mean log p below which samples are no longer data
D3PO = dict(
    num_iterations=ROUNDS, num_prompts=PAIRS, num_minibatches=1, steps_per_pass=20, learning_rate=1e-3, weight_decay=0.0
)
DDPO = dict(
    num_iterations=ROUNDS, num_prompts=2 * PAIRS, group_size=1, num_minibatches=1, steps_per_pass=20,
    learning_rate=1e-3, weight_decay=0.0,
)  # fmt: skip
SFT = dict(num_iterations=ROUNDS, num_prompts=PAIRS, group_size=2, rows_per_pass=128)
OFFLINE = dict(num_iterations=480, loss="sft", learning_rate=1e-3)
ARMS = {
    "D3PO": (d3po, D3PO),
    "D3PO without clip": (d3po, D3PO | dict(clip_range=math.inf)),
    "D3PO, refreshed reference": (d3po, D3PO | dict(refresh_reference=True)),
    "D3PO, independent starts": (d3po, D3PO | dict(shared_start=False)),
    "D3PO, 8 steps a round": (d3po, D3PO | dict(num_minibatches=8)),
    "D3PO, 7 images a prompt": (d3po, D3PO | dict(num_prompts=18, group_size=7)),
    "D3PO, labels that err": (d3po, D3PO),
    "SFT on preferred": (raft, SFT),
    "SFT on preferred, lr 3e-3": (raft, SFT | dict(learning_rate=3e-3)),
    "SFT on preferred, 1 step a round": (raft, SFT | dict(num_epochs=1, num_minibatches=1)),
    "SFT on preferred, offline": (diffusion_dpo, OFFLINE),
    "DDPO": (ddpo, DDPO),
    "DDPO, lr 3e-3": (ddpo, DDPO | dict(learning_rate=3e-3)),
    "DDPO, 8 steps a round": (ddpo, DDPO | dict(num_minibatches=8)),
    "DDPO, KL 0.1": (ddpo, DDPO | dict(beta=0.1)),
    "DDPO, KL 1": (ddpo, DDPO | dict(beta=1.0)),
}
TUNED_SFT = [arm for arm in ARMS if arm.startswith("SFT")]
TUNED_DDPO = [arm for arm in ARMS if arm.startswith("DDPO")]


def ring_run(arm: str, seed: int, rounds: int = ROUNDS) -> dict:
    """One arm and seed: reward and log p every few rounds on fixed noise, costs, and what is clipped at the end."""
    torch.set_num_threads(1)
    method, settings = ARMS[arm]
    world, generator = worlds.load("ring", seed=seed), torch.Generator().manual_seed(seed)
    policy, reward, config = world.policy, world.rewards["first_coordinate"], method.Config(**settings)
    noise = policy.draw_noise(2000, torch.Generator().manual_seed(1_000 + seed))
    curve = {"round": [], "reward": [], "log_p": []}

    def look(number: int) -> None:
        spent = policy.network_evaluations
        samples = policy.sample(world.prompts * len(noise), noise)
        policy.network_evaluations = spent  # looking is not charged
        values = number, float(reward(samples, world.prompts).mean()), float(world.mixture.log_prob(samples).mean())
        for name, value in zip(curve, values, strict=True):
            curve[name].append(round(value, 4))

    look(0)
    if method is diffusion_dpo:
        pairs = draw_pairs(policy, by_reward(reward), world.prompts, ROUNDS * PAIRS, generator, same_start=True)
        steps = method.train(policy, pairs, config, generator)
    elif arm == "D3PO, labels that err":
        labeller = bradley_terry(reward)
        steps = d3po.train(policy, None, world.prompts, config, generator, labeller=labeller)
    else:
        steps = method.train(policy, reward, world.prompts, config, generator)
    failed, length = None, config.num_iterations // ROUNDS  # of a round, in steps of the loop
    try:
        for step in steps:
            if (step.number + 1) % (EVERY * length) == 0:
                look((step.number + 1) // length)
            if step.number + 1 == rounds * length:
                break
    except FloatingPointError:
        failed = step.number + 1
    row = step.row()
    images = rounds * (config.num_prompts * config.group_size if method is not diffusion_dpo else 2 * PAIRS)
    comparisons = images // 2 if method in (raft, diffusion_dpo) else row.get("comparisons", 0)
    return {
        "arm": arm, "seed": seed, **curve, "failed_after": failed, "images": images, "comparisons": comparisons,
        "values_seen": images if method is ddpo else 0, "network_evaluations": policy.network_evaluations,
        "clip_fraction": round(row.get("clip_fraction", 0.0), 4),
    }  # fmt: skip


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(arm, seed) for arm in ARMS for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(ring_run, *zip(*jobs, strict=True))))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def of(arm: str, key: str = "reward", rounds: int = ROUNDS) -> list[float]:
        """A failed run keeps its last look."""
        mine = [r for r in runs if r["arm"] == arm]
        return [r[key][r["round"].index(rounds) if rounds in r["round"] else -1] for r in mine]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def gain(arm: str, rounds: int = ROUNDS) -> float:
        return mean(of(arm, "reward", rounds)) - mean(of(arm, "reward", 0))

    def gain_as_data(arm: str) -> float:
        """The best gain of each seed at any look where its samples are still data, averaged."""
        best = []
        for r in (r for r in runs if r["arm"] == arm):
            looks = zip(r["reward"], r["log_p"], strict=True)
            best.append(max(reward - r["reward"][0] for reward, log_p in looks if log_p > REGION))
        return mean(best)

    bars = []

    def add(text: str, value, threshold: str, passed: bool, **claimed) -> None:
        bars.append(bar(text, value, threshold, bool(passed), **claimed))

    reward = mean(of("D3PO"))
    add("reward of D3PO after 60 rounds", reward, ">= 1.5", reward >= 1.5)
    best = max(TUNED_SFT, key=lambda arm: mean(of(arm)))
    margin = paired_difference(of("D3PO"), of(best))
    add("D3PO minus the best fine-tuning on the preferred images", margin, "> 2 standard errors",
        margin.mean > 2 * margin.standard_error)  # fmt: skip
    share = gain("D3PO") / gain("DDPO")
    add("gain of D3PO over that of DDPO, which sees the reward, at equal images", share, ">= 0.8", share >= 0.8)
    lowest = min(of("D3PO", "log_p"))
    add("mean log p of D3PO's samples, the worst seed", lowest, "> -4", lowest > -4)
    free = max(of("D3PO without clip", "log_p"))
    add("the same without the clip, the best seed", free, "< -20", free < -20)

    control = partial(add, claimed=False)
    rival = max(TUNED_DDPO, key=gain_as_data)
    share = gain_as_data("D3PO") / gain_as_data(rival)
    control("where samples are data (log p > -4): gain of D3PO over the best of DDPO's five settings", share,
            ">= 0.8", share >= 0.8)  # fmt: skip
    share = gain("D3PO without clip") / gain("DDPO")
    control("neither held: gain of D3PO without clip over DDPO's", share, ">= 0.8", share >= 0.8)
    share = gain("D3PO", 20) / gain("DDPO", 20)
    control("after 20 rounds: gain of D3PO over DDPO's", share, ">= 0.8", share >= 0.8)
    margin = paired_difference(of("D3PO"), of("SFT on preferred, 1 step a round"))
    control("D3PO minus fine-tuning on the preferred images with as many steps and the same rate", margin,
            "> 2 standard errors", margin.mean > 2 * margin.standard_error)  # fmt: skip
    off = mean(of("DDPO", "log_p"))
    control("mean log p of DDPO's samples after 60 rounds", off, "< -4", off < -4)
    gone = max(of("D3PO, refreshed reference", "log_p"))
    control("mean log p with a refreshed reference, the best seed", gone, "< -20", gone < -20)
    many = max(of("D3PO, 8 steps a round", "log_p"))
    control("mean log p with the clip and 8 steps a round, the best seed", many, "> -4", many > -4)
    shared = paired_difference(of("D3PO"), of("D3PO, independent starts"))
    control("reward, shared starts minus independent ones", shared, "> 2 standard errors",
            shared.mean > 2 * shared.standard_error)  # fmt: skip
    erring = gain("D3PO, labels that err") / gain("D3PO")
    control("gain with labels that err over that with labels that do not", erring, ">= 0.8", erring >= 0.8)

    table = {}
    for arm in ARMS:
        mine = [r for r in runs if r["arm"] == arm]
        looks = {f"reward after {n}": str(mean_ci(of(arm, "reward", n))) for n in (20, 40, 60)}
        costs = {key: mine[0][key] for key in ("images", "comparisons", "values_seen", "network_evaluations")}
        table[arm] = looks | {"log p": str(mean_ci(of(arm, "log_p")))} | costs
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "D3PO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "best_sft": best, "best_ddpo_as_data": rival, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
