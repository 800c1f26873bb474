"""B2-DiffuRL on a Stable Diffusion in miniature (`shapes`): an attribute decided late, and one decided early.

deep      "a red circle" should be drawn in a deep red: 1 if its ink is darker than 70 % of the base model's. The shade
          is decided late (more than half of its variance in the last 4 of 8 steps). The reward also likes objects on
          the left, by 0.4 times a number from -1 to 1; the place is decided early (1 % in the last 5).
relation  "a red circle above a blue square", the strict oracle alone; decided early (18 % in the last 4 of 6 steps).

All five methods are one `Config` with its switches set, at equal reward queries. One LoRA is shared by all steps. The
settings are `minialign run ddpo`'s (learning rate, warm-up, two minibatches, one pass), which suits DDPO: branching
keeps some twenty images a stage, and updates on so few are noisy. With stages twice as large and a third of the
learning rate (seed 0 alone) the objects stay whole, and B2-DiffuRL reaches .6 on deep with 66k (branch-relative) or 96k
evaluations and an entropy of places of .99 or .94, DDPO with 131k and .93.

Run by `minialign replicate b2diffurl_shapes` (about 25 minutes on two cores).
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import METHODS, bar

from minialign import worlds
from minialign.measure import diversity, mean_ci, paired_difference
from minialign.methods import b2diffurl
from minialign.policies.diffusion import EVERYWHERE
from minialign.worlds.shapes import PAPER

SEEDS = {"deep": 5, "relation": 3}
TARGET = 0.6  # of "deep"; the base model has .3 by construction
EXAMINED = 256  # samples, every third stage, not charged
SINGLES = ["a red circle", "a blue square", "a green triangle", "a yellow circle"]
STAGE = dict(num_prompts=26, num_branches=5, learning_rate=3e-3, warmup_updates=10, num_minibatches=2, num_epochs=1)
TASKS = {
    "deep": dict(num_steps=8, num_iterations=36, first_window=3, last_window=5),
    "relation": dict(num_steps=6, num_iterations=40, first_window=4, last_window=6),
}


def place_and_shade(images):
    """Horizontal centre of the ink in pixels, and its mean brightness, each (n,)."""
    ink = ((images - torch.tensor(PAPER).view(1, 3, 1, 1)).abs().sum(1) > 0.3).float()
    area = ink.sum((1, 2)).clamp_min(1)
    centre = (ink * (torch.arange(images.shape[-1]) + 0.5)).sum((1, 2)) / area
    return centre, (images.mean(1) * ink).sum((1, 2)) / area


def place_entropy(images) -> float:
    """Entropy, in nats, of the quarter of the picture, from left to right, in which the object lies (at most 1.386)."""
    quarter = (place_and_shade(images)[0] / images.shape[-1] * 4).long().clamp(0, 3)
    return float(torch.special.entr(torch.bincount(quarter, minlength=4) / len(images)).sum())


def deep_and_left(policy):
    """(deep, reward): deep asks for the darkest 30 % of what the base model draws for the prompt."""
    shades = {}
    for prompt in SINGLES:
        images = policy.sample([prompt] * 128, generator=torch.Generator().manual_seed(999))
        shades[prompt] = place_and_shade(images)[1].quantile(0.3)

    def deep(images, prompts):
        return (place_and_shade(images)[1] < torch.stack([shades[prompt] for prompt in prompts])).float()

    def reward(images, prompts):
        left = (1 - place_and_shade(images)[0] / (images.shape[-1] / 2)) * 2
        return deep(images, prompts) + 0.4 * left.clamp(-1, 1)

    return deep, reward


def shapes_run(task: str, method: str, seed: int) -> dict:
    """One task, method and seed; its curve holds [queries, evaluations, aim, oracle, entropy of places, diversity]."""
    torch.set_num_threads(1)
    settings = dict(TASKS[task])
    world = worlds.load("shapes", num_steps=settings.pop("num_steps"))
    policy = world.policy
    aim, reward = deep_and_left(policy) if task == "deep" else (world.oracle, world.oracle)
    prompts = SINGLES if task == "deep" else world.prompts
    policy.add_lora(rank=16, target_modules=EVERYWHERE)
    config = b2diffurl.Config(**STAGE, **settings, steps_per_pass=policy.num_steps, **METHODS[method])
    noise = policy.draw_noise(EXAMINED, torch.Generator().manual_seed(5_000 + seed))
    asked, curve = [prompts[i % len(prompts)] for i in range(EXAMINED)], []

    def examine(queries: int, evaluations: int) -> None:
        images = policy.sample(asked, noise)
        scores = [float(score(images, asked).mean()) for score in (aim, world.oracle)]
        spread = float(diversity(images, asked, reduction="mean"))
        curve.append([queries, evaluations, *(round(v, 4) for v in (*scores, place_entropy(images), spread))])
        policy.network_evaluations = evaluations

    examine(0, 0)
    for step in b2diffurl.train(policy, reward, prompts, config, torch.Generator().manual_seed(seed)):
        if step.number % 3 == 2 or step.number + 1 == config.num_iterations:
            examine(step.reward_queries, step.network_evaluations)
    return {"task": task, "method": method, "seed": seed, "curve": curve}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(task, method, seed) for task in TASKS for seed in range(SEEDS[task]) for method in METHODS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(shapes_run, *zip(*jobs, strict=True))))


def first_at(curve: list, target: float):
    """The first point of a curve whose aim is at least the target, or None."""
    return next((point for point in curve if point[2] >= target), None)


def verdict(runs: list[dict]) -> dict:
    """At equal alignment on "deep": entropy of places, network evaluations, queries. Final scores of everything."""

    def curves(task: str, method: str) -> list:
        return [r["curve"] for r in runs if r["task"] == task and r["method"] == method]

    table = {}
    for task in TASKS:
        for method in METHODS:
            end = list(zip(*(curve[-1] for curve in curves(task, method)), strict=True))
            names = ("queries", "network_evaluations", "aim", "oracle", "entropy_of_places", "diversity")
            table[f"{task}, {method}"] = {name: str(mean_ci(v)) for name, v in zip(names, end, strict=True)}
            reached = [first_at(curve, TARGET) is not None for curve in curves(task, method)]
            table[f"{task}, {method}"]["reached"] = f"{sum(reached)} of {len(reached)}"
    bars = []
    ddpo = [first_at(curve, TARGET) for curve in curves("deep", "DDPO")]
    for method, claimed in (("B2 branch-relative", True), ("B2 official", False)):
        ours = [first_at(curve, TARGET) for curve in curves("deep", method)]
        reached = sum(point is not None for point in ours)
        bars.append(bar(
            f"deep: runs of {method} that reach {TARGET}", float(reached), f"{len(ours)}", reached == len(ours), claimed
        ))  # fmt: skip
        both = [(o, d) for o, d in zip(ours, ddpo, strict=True) if o is not None and d is not None]
        if len(both) < 2:
            continue
        for column, name, wanted in ((4, "entropy of places", "> 2 s.e."), (3, "oracle", ">= 0")):
            gap = paired_difference([o[column] for o, _ in both], [d[column] for _, d in both])
            met = gap.mean > 2 * gap.standard_error if column == 4 else gap.mean >= 0
            bars.append(bar(
                f"deep: {name} at {TARGET}, {method} minus DDPO, seeds that get there", gap, wanted, met,
                claimed and column == 4,
            ))  # fmt: skip
        for column, name in ((1, "network evaluations"), (0, "reward queries")):
            share = sum(o[column] for o, _ in both) / sum(d[column] for _, d in both)
            bars.append(bar(
                f"deep: {name} to {TARGET}, {method} over DDPO, seeds that get there", share, "< 1", share < 1,
                claimed and column == 1,
            ))  # fmt: skip
    for method in ("B2 branch-relative", "B2 official"):
        gain = paired_difference(*([c[-1][2] for c in curves("relation", m)] for m in (method, "DDPO")))
        bars.append(bar(
            f"relation: oracle at the end, {method} minus DDPO, equal queries", gain, "> 0", gain.mean > 0, False
        ))  # fmt: skip
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "B2-DiffuRL on shapes", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS["deep"], "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
