"""DRAGON's claims in miniature: a reward of a set against the reward of single samples that is made of the same
exemplars, and D+ chosen for the reward that it is meant for.

    plane     base: four equal modes, a velocity network of 64 x 3 trained on them; exemplars: 500 points of two modes.
              "dataset": Frechet distance of the set; "instance": each sample's distance from the exemplars' middle.
    table     no training: D+ of one and the same 192 pairs, chosen by instance, by greedy swaps, by chance
    digits    base: the digits' UNet without a prompt; exemplars: the real 3 and 8, in their 16 first principal axes

The sheet's protocol: DPO by pairs, 192 pairs, 24 rounds of 60 updates, learning rate 1e-3, beta 1 on velocity errors
that are summed; on digits 96 pairs, 6 rounds of 10, learning rate 1e-4, beta 3.5 (224 a pixel). "KTO", "unpaired" and
"shuffled" (a reward that knows nothing of the sample) stand beside them. Sets of 500 are compared, with 500 exemplars.

Run by `minialign replicate dragon`; tests/claims/test_claims.py runs a small part of it.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar
from torch import nn

from minialign import exemplars, worlds
from minialign.loop import fit
from minialign.measure import mean_ci, paired_difference
from minialign.methods import dragon
from minialign.policies.diffusion import DiffusionPolicy
from minialign.worlds import digits

SEEDS = 5
SAMPLES = 500
PRETRAINING = 4000  # updates of 512
PLANE = {
    "dataset": dict(selection="distribution"),
    "instance": dict(selection="instance"),
    "KTO": dict(selection="distribution", objective="kto"),
    "unpaired": dict(selection="distribution", paired=False),
    "shuffled": dict(selection="instance"),
}
DIGITS = dict(
    selection="distribution", num_iterations=6, num_prompts=96, num_updates=10, minibatch_size=64, beta=3.5,
    learning_rate=1e-4,
)  # fmt: skip


class Velocity(nn.Module):
    """network(x, t): 64 x 3, SiLU, of x and eight frequencies of t."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, 8))
        layers = [nn.Linear(2 + 16, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t):
        phase = t.unsqueeze(-1) / 1000 * self.frequencies
        return self.net(torch.cat([x, phase.sin(), phase.cos()], -1))


@functools.cache
def plane():
    return worlds.load("ring", num_modes=4, std=0.35)


@functools.cache
def base_weights(seed: int) -> dict:
    """What `PRETRAINING` updates of the usual loss make of the network: not charged to any arm."""
    policy, world = bare_policy(seed), plane()
    optimizer = torch.optim.Adam(policy.network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, PRETRAINING)
    generator = torch.Generator().manual_seed(2_000 + seed)
    for _ in range(PRETRAINING):
        points, _ = world.mixture.sample(512, generator)
        levels, noise = policy.draw_levels(512, generator), torch.randn(512, 2, generator=generator)
        error = policy.training_error(points, levels, noise, policy.encode(["a point"] * 512), reduction="sum")
        error.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return policy.network.state_dict()


def bare_policy(seed: int) -> DiffusionPolicy:
    """Velocity prediction, 20 deterministic steps, random weights."""
    schedule = worlds.gaussian.scheduler()
    schedule.register_to_config(prediction_type="v_prediction")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Velocity()
    return DiffusionPolicy(network, schedule, latent_shape=(2,), num_steps=20, eta=0.0)


def base_policy(seed: int) -> DiffusionPolicy:
    policy = bare_policy(seed)
    policy.network.load_state_dict(base_weights(seed))
    policy.train_all_weights()
    return policy


def rewards_of(seed: int) -> tuple:
    """Frechet distance to 500 points of the modes on the first axis, a sample's from their middle, Vendi score."""
    points, mode = plane().mixture.sample(2_000, torch.Generator().manual_seed(3_000 + seed))
    points = points[mode % 2 == 0][:500]
    return exemplars.frechet_to(points), exemplars.mahalanobis_to(points), exemplars.vendi(bandwidth=0.5**0.5)


def chance(samples, prompts):
    """A number that has nothing to do with what a sample is worth."""
    return (samples.sum(1) * 1e4) % 1


def measured(policy, seed: int) -> dict:
    frechet, instance, vendi = rewards_of(seed)
    points = policy.sample(["a point"] * SAMPLES, generator=torch.Generator().manual_seed(1_000 + seed))
    covariance = points.T.cov()
    return {
        "frechet": -float(frechet(points, [])), "vendi": float(vendi(points, [])),
        "instance": float(instance(points, []).mean()), "var_1": float(covariance[0, 0]),
        "var_2": float(covariance[1, 1]),
    }  # fmt: skip


def plane_run(arm: str, seed: int) -> dict:
    torch.set_num_threads(1)
    policy, (frechet, instance, _) = base_policy(seed), rewards_of(seed)
    before = measured(policy, seed)
    policy.network_evaluations = 0
    reward = {"instance": instance, "shuffled": chance}.get(arm, frechet)
    config = dragon.Config(**PLANE[arm])
    history = fit(
        dragon.train(policy, reward, ["a point"], config, torch.Generator().manual_seed(seed)), progress=False
    )
    spent = {key: history[-1].get(key, 0) for key in ("reward_queries", "set_queries", "network_evaluations")}
    return {"part": "plane", "arm": arm, "seed": seed, "before": before, **measured(policy, seed), **spent}


def table_run(seed: int) -> dict:
    """r_instance (mean) and r_dataset of D+, by how it was chosen among the same pairs of the base."""
    torch.set_num_threads(1)
    frechet, instance, _ = rewards_of(seed)
    points = base_policy(seed).sample(["a point"] * 384, generator=torch.Generator().manual_seed(4_000 + seed))
    prompts, pairs = ["a point"] * 384, dragon.partners(192, True, torch.Generator())
    order = torch.randperm(192, generator=torch.Generator().manual_seed(seed))
    chosen = {
        "instance": dragon.split_by_instance(instance(points, prompts), pairs, True).chosen,
        "swaps": dragon.split_by_swaps(dragon.Sets(frechet, points, prompts, pairs), order).chosen,
        "chance": pairs[0],
    }
    values = {
        f"{name}, {rule}": float(reward(points[rows], prompts).mean())
        for rule, rows in chosen.items()
        for name, reward in (("r_instance", instance), ("r_dataset", frechet))
    }
    return {"part": "table", "seed": seed, **values}


def digits_policy() -> DiffusionPolicy:
    """The shipped UNet asked for any digit."""
    unet, schedule = digits.load_unet()

    def no_prompt(prompts):
        return ({"class_labels": torch.full((len(prompts),), digits.NULL_CLASS)},)

    policy = DiffusionPolicy(
        unet, schedule, encoder=no_prompt, latent_shape=(1, 8, 8), decoder=digits.decode, num_steps=10
    )
    policy.train_all_weights()
    return policy


def digits_run(seed: int) -> dict:
    torch.set_num_threads(1)
    frechet = digits.like_digits(3, 8)
    policy, found = digits_policy(), {}

    def look(when: str) -> None:
        samples = policy.sample(["a digit"] * SAMPLES, generator=torch.Generator().manual_seed(1_000 + seed))
        read = torch.from_numpy(digits.classifier().predict(samples.flatten(1).numpy()))
        near = torch.cdist(samples.flatten(1), digits.data("train")[0].flatten(1)).amin(1) <= digits.reach()
        found[f"frechet_{when}"] = -float(frechet(samples, []))
        found[f"share_{when}"] = float(((read == 3) | (read == 8)).float().mean())
        found[f"near_{when}"] = float(near.float().mean())

    look("before")
    policy.network_evaluations = 0
    generator = torch.Generator().manual_seed(seed)
    history = fit(dragon.train(policy, frechet, ["a digit"], dragon.Config(**DIGITS), generator), progress=False)
    look("after")
    spent = {key: history[-1][key] for key in ("reward_queries", "set_queries", "network_evaluations")}
    return {"part": "digits", "seed": seed, **found, **spent}


def seed_run(seed: int) -> list[dict]:
    """All of a seed: its base is trained once."""
    return [*(plane_run(arm, seed) for arm in PLANE), table_run(seed), digits_run(seed)]


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict([run for runs in pool.map(seed_run, range(SEEDS)) for run in runs])


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def column(key: str, **which) -> list[float]:
        return [r[key] for r in runs if all(r.get(name) == value for name, value in which.items())]

    base = [r["before"] for r in runs if r.get("arm") == "dataset"]
    ours, each = ({key: column(key, arm=arm) for key in ("frechet", "vendi")} for arm in ("dataset", "instance"))
    reached = sum(after <= 0.4 * before["frechet"] for after, before in zip(ours["frechet"], base, strict=True))
    gap = paired_difference(each["frechet"], ours["frechet"])
    vendi = sum(each["vendi"]) / sum(ours["vendi"])
    rules = ("instance", "swaps", "chance")
    tables = [r for r in runs if r["part"] == "table"]
    ordered = {
        name: sum(max(rules, key=lambda rule: r[f"{name}, {rule}"]) == best for r in tables)
        for name, best in (("r_instance", "instance"), ("r_dataset", "swaps"))
    }
    fall = paired_difference(column("frechet_before", part="digits"), column("frechet_after", part="digits"))
    shares = [sum(column(f"share_{when}", part="digits")) / SEEDS for when in ("before", "after")]
    near = paired_difference(column("near_after", part="digits"), column("near_before", part="digits"))
    shuffled = paired_difference(column("frechet", arm="shuffled"), [row["frechet"] for row in base])
    bars = [
        bar("plane, dataset reward: seeds with a Frechet distance of at most 0.4 of the base's", float(reached), ">= 4",
            reached >= 4),
        bar("plane: Frechet distance, instance reward minus dataset reward", gap, "> 2 s.e.",
            gap.mean > 2 * gap.standard_error),
        bar("plane: Vendi score, instance reward over dataset reward", vendi, "< 0.5", vendi < 0.5),
        bar("table: seeds where D+ chosen by instance has the best instance reward", float(ordered["r_instance"]),
            str(SEEDS), ordered["r_instance"] == SEEDS),
        bar("table: seeds where D+ of greedy swaps has the best dataset reward", float(ordered["r_dataset"]),
            str(SEEDS), ordered["r_dataset"] == SEEDS),
        bar("digits: fall of the Frechet distance to the real 3 and 8", fall, "> 2 s.e.",
            fall.mean > 2 * fall.standard_error),
        bar(f"digits: share read as 3 or 8 (base {shares[0]:.2f})", shares[1], "> 0.35", shares[1] > 0.35),
    ]  # fmt: skip
    bars += [
        bar("its cost: digits within reach of a real one, after minus before", near, ">= 0", near.mean >= 0,
            claimed=False),
        bar("control: Frechet distance, shuffled minus base", shuffled, "> 0", shuffled.mean > 0, claimed=False),
    ]  # fmt: skip
    for arm in ("KTO", "unpaired"):
        found = zip(column("frechet", arm=arm), base, strict=True)
        count = float(sum(after <= 0.4 * before["frechet"] for after, before in found))
        bars.append(bar(f"the first bar's seeds, {arm}", count, ">= 4", count >= 4, claimed=False))
    keys = ("frechet", "vendi", "instance", "reward_queries", "set_queries", "network_evaluations")
    table = {arm: {key: str(mean_ci(column(key, arm=arm))) for key in keys} for arm in PLANE}
    table["base"] = {key: str(mean_ci([row[key] for row in base])) for key in ("frechet", "vendi", "instance")}
    table["digits"] = {
        f"{key}_{when}": str(mean_ci(column(f"{key}_{when}", part="digits")))
        for key in ("frechet", "share", "near") for when in ("before", "after")
    }  # fmt: skip
    for name in ("r_instance", "r_dataset"):
        table[f"D+, {name}"] = {rule: str(mean_ci(column(f"{name}, {rule}", part="table"))) for rule in rules}
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "DRAGON", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
