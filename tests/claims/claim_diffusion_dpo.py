"""Diffusion-DPO's claims in miniature.

    (a) at equal steps DPO is above fine-tuning on the chosen samples (SFT), and both above the base     ring
    (b) labels of a scorer (AI feedback), which never err, are worth more than people's, which do        ring
    (c) one noise for both samples of a pair is better than two, the official code's choice              ring

`ring`: eight modes, 100 cosine levels, r = x_1; 2,000 pairs of the base model's own samples, people being Bradley and
Terry at scale 1; the sheet's settings, nothing searched. beta' is eq. 14's beta T omega, of sums: beta = 2 D beta'.
SFT cannot be tuned past a ceiling that is known beforehand, the chosen samples' own mean reward; it stands beside it,
and so does SFT with DPO's network evaluations. Quality: log-density under the data, beside that of the exact tilt with
the same mean reward. Control: the same training on shuffled labels.

`digits`, a UNet with LoRA: the same three, on the reward `thin`, for something to be seen. No bar of the sheet.

Run by `minialign replicate diffusion_dpo`; tests/claims/test_claims.py runs a small part of it.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar
from scipy.optimize import brentq

from minialign import pairs as make
from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import diffusion_dpo
from minialign.policies.diffusion import EVERYWHERE
from minialign.worlds import gaussian

SEEDS = 5
DIM, NUM_PAIRS, EXAMINED = 2, 2000, 4000
COMMON = dict(batch_size=256, pairs_per_pass=256, learning_rate=1e-3)


def settings(steps: int, beta_sum: float = 10.0, **changes) -> dict:
    return dict(num_iterations=steps, warmup_updates=steps // 10, beta=2 * DIM * beta_sum) | changes


RING = {  # (labels, settings)
    "DPO": ("people", settings(200)),
    "SFT": ("people", settings(200, loss="sft")),
    "SFT, DPO's evaluations": ("people", settings(533, loss="sft")),
    "DPO, shuffled labels": ("shuffled", settings(200)),
    "people": ("people", settings(100, 30.0)),
    "scorer": ("scorer", settings(100, 30.0)),
    "one noise": ("people", settings(400, 30.0)),
    "two noises": ("people", settings(400, 30.0, shared_noise=False)),
}


def labeller(kind: str, reward, scale: float = 1.0):
    """scorer: who has more reward wins; people: mostly; shuffled: a coin is tossed."""
    if kind == "scorer":
        return make.by_reward(reward)
    return make.bradley_terry(reward, scale if kind == "people" else 1e-9)


def needed(config, evaluations: int) -> int:
    """Evaluations that the method could not do without: SFT needs the chosen samples and no reference, 3 of 8."""
    return evaluations * 3 // 8 if config.loss == "sft" else evaluations


def ring_run(arm: str, seed: int, num_steps: int | None = None) -> dict:
    torch.set_num_threads(1)
    world = worlds.load("ring", schedule="cosine", num_steps=50, eta=0.0, seed=seed)
    kind, chosen = RING[arm]
    config = diffusion_dpo.Config(**COMMON | chosen | ({} if num_steps is None else {"num_iterations": num_steps}))
    policy, reward = world.policy, world.rewards["first_coordinate"]
    generator = torch.Generator().manual_seed(100 + seed)
    pairs = make.draw_pairs(policy, labeller(kind, reward), world.prompts, NUM_PAIRS, generator)
    noise = policy.draw_noise(EXAMINED, torch.Generator().manual_seed(1_000 + seed))
    before = policy.sample(world.prompts * EXAMINED, noise)
    policy.network_evaluations, seconds = 0, 0.0
    for step in diffusion_dpo.train(policy, pairs, config, torch.Generator().manual_seed(seed)):
        seconds += step.seconds
    samples = policy.sample(world.prompts * EXAMINED, noise)
    return {
        "world": "ring", "arm": arm, "seed": seed, "base": float(before[:, 0].mean()),
        "reward": float(samples[:, 0].mean()), "log_prob": float(world.mixture.log_prob(samples).mean()),
        "base_log_prob": float(world.mixture.log_prob(before).mean()),
        "tilted_log_prob": tilted_log_prob(rate_of(float(samples[:, 0].mean()))),
        "ceiling": float(pairs.chosen[:, 0].mean()),
        "accuracy": float(step.metrics["accuracy"]), "labels": len(pairs), "steps": config.num_iterations,
        "network_evaluations": needed(config, step.network_evaluations), "seconds": round(seconds, 2),
    }  # fmt: skip


@functools.cache
def mixture():
    return gaussian.ring()


def tilt(rate: float):
    """The data's exact tilt p exp(rate x_1) / Z."""
    return mixture().tilt(1 / rate, torch.tensor([1.0, 0.0]).to(mixture().means))[0]


def tilted_log_prob(rate: float, num_samples: int = 50_000) -> float:
    """Mean log-density under the data of the samples of its tilt."""
    samples, _ = tilt(rate).sample(num_samples, torch.Generator().manual_seed(0))
    return float(mixture().log_prob(samples).mean())


def rate_of(reward: float) -> float:
    """That of the tilt whose mean reward is this: of all laws with this reward the one nearest to the data."""
    return brentq(lambda rate: float(tilt(rate).moments()[0][0]) - max(reward, 1e-3), 1e-6, 60.0)


# digits ---------------------------------------------------------------------------------------------------------------

DIGITS = dict(num_iterations=30, batch_size=64, pairs_per_pass=64, beta=1500.0, learning_rate=5e-4, warmup_updates=6)
DIGITS_ARMS = {"people": {}, "scorer": {}, "SFT": dict(loss="sft")}
DIGITS_PAIRS, DIGITS_EXAMINED, CERTAINTY = 256, 128, 40.0  # CERTAINTY: people's scale; three votes in four are right


def digits_run(arm: str, seed: int) -> dict:
    """The reward `thin`: less ink, as long as the digit can be read."""
    torch.set_num_threads(1)
    world = worlds.load("digits", num_steps=10)
    policy, reward = world.policy, world.rewards["thin"]
    policy.add_lora(rank=16, target_modules=EVERYWHERE, seed=seed)
    kind = "scorer" if arm == "scorer" else "people"
    data = make.draw_pairs(
        policy,
        labeller(kind, reward, CERTAINTY),
        world.prompts,
        DIGITS_PAIRS,
        torch.Generator().manual_seed(100 + seed),
    )
    config = diffusion_dpo.Config(**DIGITS | DIGITS_ARMS[arm])
    prompts = [world.prompts[i % 10] for i in range(DIGITS_EXAMINED)]
    noise = policy.draw_noise(len(prompts), torch.Generator().manual_seed(1_000 + seed))
    before = policy.sample(prompts, noise)
    policy.network_evaluations = 0
    *_, last = diffusion_dpo.train(policy, data, config, torch.Generator().manual_seed(seed))
    after = policy.sample(prompts, noise)
    return {
        "world": "digits", "arm": arm, "seed": seed, "steps": config.num_iterations, "labels": len(data),
        "base": float(reward(before, prompts).mean()), "reward": float(reward(after, prompts).mean()),
        "ceiling": float(reward(policy.decode(data.chosen), data.prompts).mean()),
        "right": float((reward(policy.decode(data.chosen), data.prompts)
                        >= reward(policy.decode(data.rejected), data.prompts)).float().mean()),
        "read": float(world.oracle(after, prompts).mean()), "base_read": float(world.oracle(before, prompts).mean()),
        "network_evaluations": needed(config, last.network_evaluations),
    }  # fmt: skip


def run(world: str, arm: str, seed: int) -> dict:
    return (ring_run if world == "ring" else digits_run)(arm, seed)


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(world, arm, seed) for world, arms in (("digits", DIGITS_ARMS), ("ring", RING)) for arm in arms
            for seed in range(SEEDS)]  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = verdict(list(pool.map(run, *zip(*jobs, strict=True))))
    rates = (0.01, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0)
    frontier = [[float(tilt(rate).moments()[0][0]), tilted_log_prob(rate)] for rate in rates]
    return found | {"frontier": frontier}


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def column(arm: str, key: str = "reward", world: str = "ring") -> list:
        return [r[key] for r in runs if (r["world"], r["arm"]) == (world, arm)]

    bars = []

    def above(name: str, ours: list, theirs: list, least: float = 0.0, claimed: bool = True) -> None:
        gap = paired_difference(ours, theirs)
        holds = gap.mean > 2 * gap.standard_error and gap.mean > least
        asked = f"> {least} and > 2 s.e." if least else "> 2 s.e."
        bars.append(bar(name, gap, asked, holds, claimed=claimed))

    above("(a) reward after 200 steps, DPO minus SFT", column("DPO"), column("SFT"), 0.5)
    above("(a) reward after 200 steps, SFT minus base", column("SFT"), column("SFT", "base"))
    above("(b) reward after 100 steps, a scorer's labels minus people's", column("scorer"), column("people"))
    above("(c) reward after 400 steps, one noise minus two", column("one noise"), column("two noises"))
    above("equal network evaluations: DPO minus SFT", column("DPO"), column("SFT, DPO's evaluations"), claimed=False)
    above(
        "DPO minus SFT's ceiling, the chosen samples' own mean", column("DPO"), column("DPO", "ceiling"), claimed=False
    )
    chance = paired_difference(column("DPO, shuffled labels"), column("DPO, shuffled labels", "base"))
    bars.append(bar("control: shuffled labels minus base", chance, "within 0.3", abs(chance.mean) < 0.3, claimed=False))
    price = paired_difference(column("DPO", "log_prob"), column("DPO", "tilted_log_prob"))
    bars.append(bar("its price: log-density, DPO minus the exact tilt of equal reward", price, "> -0.1 nats",
                    price.mean > -0.1, claimed=False))  # fmt: skip
    for ours, theirs in (("people", "SFT"), ("scorer", "people")):
        above(f"digits: reward, {ours} minus {theirs}", column(ours, world="digits"), column(theirs, world="digits"),
              claimed=False)  # fmt: skip
    keys = ("reward", "log_prob", "read", "network_evaluations", "accuracy", "ceiling")
    table = {
        f"{world}, {arm}": {key: str(mean_ci(column(arm, key, world))) for key in keys if key in first}
        for world, arm, first in {(r["world"], r["arm"]): (r["world"], r["arm"], r) for r in runs}.values()
    }
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Diffusion-DPO", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "arms": list(RING),
        "runs": runs,
    }  # fmt: skip
