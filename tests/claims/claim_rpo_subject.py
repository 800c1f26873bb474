"""RPO's claims in miniature: a reward that wants both has its maximum inside the training, and the preference keeps the
prompt.

    dogs      who and where, two numbers each; the base an MLP that was taught the exact one, so that it can forget
    shapes    a red and yellow disc from four pictures, LoRA; the similarities are the oracle's

Arms: the denoising error of the references alone (DreamBooth without prior), the same with prior preservation, RPO, and
RPO with a stronger anchor, with labels that are not compressed, with drawn labels, and on a base that cannot forget.
RPO's labels are compressed as the sheet has it (label_scale .1: the similarities of real encoders differ by some .05,
those here by .9). Each run looks at its 20 checkpoints with all three rewards, and is judged by fresh samples: of the
checkpoint that each reward selects, and of the last. Equal steps; what they cost is beside them.

Run by `minialign replicate rpo_subject` (about 5 minutes on two cores); test_claims.py runs a little of it.
"""

import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import rpo_subject as rpo
from minialign.policies.diffusion import EVERYWHERE
from minialign.subjects import Subject
from minialign.worlds import dogs

SEEDS = 5
SHEET = rpo.Config(samples_per_prompt=64, learning_rate=5e-4, label_scale=0.1, selection="last")
ALONE = dataclasses.replace(SHEET, preference_weight=0.0)
ARMS = {  # settings, base
    "references alone": (ALONE, "learned"),
    "prior preservation": (dataclasses.replace(ALONE, prior_weight=1.0), "learned"),
    "RPO": (SHEET, "learned"),
    "RPO, beta 10": (dataclasses.replace(SHEET, beta=10.0), "learned"),
    "RPO, labels of scale 1": (dataclasses.replace(SHEET, label_scale=1.0), "learned"),
    "RPO, drawn labels": (dataclasses.replace(SHEET, labels="hard"), "learned"),
    "references alone, exact base": (ALONE, "exact"),
    "RPO, exact base": (SHEET, "exact"),
}
PICTURES = rpo.Config(
    num_iterations=120, batch_size=8, validate_every=15, samples_per_prompt=3, learning_rate=3e-4, label_scale=0.1,
    selection="last",
)  # fmt: skip
ON_SHAPES = {
    "references alone": dataclasses.replace(PICTURES, preference_weight=0.0),
    "prior preservation": dataclasses.replace(PICTURES, preference_weight=0.0, prior_weight=1.0),
    "RPO": PICTURES,
}
TEST = {"dogs": 64, "shapes": 12}  # fresh samples a prompt
SELECTORS = {"harmonic": 0.5, "image alone": 1.0}  # lambda_validation


class Best:
    """Weights of the best look by each selector, and the looks."""

    def __init__(self, policy):
        self.stoppers = {name: rpo.EarlyStopper(policy.parameters()) for name in SELECTORS}
        self.looks = []

    def look(self, row: dict) -> None:
        image, text = torch.tensor(row["image_similarity"]), torch.tensor(row["text_similarity"])
        self.looks.append([row["step"] + 1, row["reward"], float(image), float(text)])
        self.stoppers["harmonic"].update(row["step"] + 1, row["reward"])
        self.stoppers["image alone"].update(row["step"] + 1, float(image))


def judged(policy, task, prompts: list, noise) -> list[float]:
    """(harmonic reward, S_I, S_T) of fresh samples, not charged."""
    spent = policy.network_evaluations
    parts = rpo.HarmonicReward(*task.similarities, 0.5, task.token).parts(policy.sample(prompts, noise), prompts)
    policy.network_evaluations = spent
    return [float(value.mean()) for value in (rpo.harmonic_mean(*parts, 0.5), *parts)]


def trained(world: str, name: str, seed: int, policy, task, references, config) -> dict:
    """A run: its looks, and fresh samples of the base, of the last weights and of those that each reward selects."""
    of_class = not config.preference_weight
    subject = Subject.draw(
        policy, task, references, of_class=of_class, generator=torch.Generator().manual_seed(100 + seed)
    )
    drawn, policy.network_evaluations = policy.network_evaluations, 0
    prompts = [prompt for prompt in task.test_prompts for _ in range(TEST[world])]
    noise = policy.draw_noise(len(prompts), torch.Generator().manual_seed(1_000 + seed))
    found, best, seconds = {"base": judged(policy, task, prompts, noise)}, Best(policy), 0.0
    for step in rpo.train(policy, task.similarities, subject, config, torch.Generator().manual_seed(seed)):
        seconds += step.seconds
        if "reward" in step.metrics:
            best.look(step.row())
    found["last"] = judged(policy, task, prompts, noise)
    steps = {}
    for selector, stopper in best.stoppers.items():
        stopper.restore()
        found[selector], steps[selector] = judged(policy, task, prompts, noise), stopper.step
    return {
        "world": world, "arm": name, "seed": seed, "looks": best.looks, "selected": steps, "judged": found,
        "network_evaluations": step.network_evaluations, "drawn_before": drawn, "reward_queries": step.reward_queries,
        "seconds": round(seconds, 2), "last_step": config.num_iterations,
    }  # fmt: skip


def dogs_run(name: str, seed: int) -> dict:
    torch.set_num_threads(1)
    config, base = ARMS[name]
    policy, task = dogs.load(seed, base)
    return trained("dogs", name, seed, policy, task, task.references, config)


def shapes_run(name: str, seed: int) -> dict:
    torch.set_num_threads(1)
    world = worlds.load("shapes", num_steps=12)
    world.policy.add_lora(rank=16, target_modules=EVERYWHERE, seed=seed)
    task = world.subject(seed)
    return trained("shapes", name, seed, world.policy, task, world.encode(task.references), ON_SHAPES[name])


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        pictures = [pool.submit(shapes_run, name, seed) for seed in range(SEEDS) for name in ON_SHAPES]
        jobs = [pool.submit(dogs_run, name, seed) for seed in range(SEEDS) for name in ARMS]
        return verdict([job.result() for job in jobs + pictures])


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def column(world: str, arm: str, which: str, part: int) -> list[float]:
        return [r["judged"][which][part] for r in runs if r["world"] == world and r["arm"] == arm]

    def chosen(world: str, arm: str, selector: str = "harmonic") -> list[int]:
        return [r["selected"][selector] for r in runs if r["world"] == world and r["arm"] == arm]

    def inside(world: str, arm: str) -> bool:
        last = next(r["last_step"] for r in runs if r["world"] == world and r["arm"] == arm)
        first = min(r["looks"][0][0] for r in runs if r["world"] == world and r["arm"] == arm)
        return all(first <= step < last for step in chosen(world, arm))

    bars, clear = [], "> 2 s.e."
    alone, arms = "references alone", ("references alone", "RPO")
    for arm in arms:
        gap = paired_difference(column("dogs", arm, "harmonic", 0), column("dogs", arm, "last", 0))
        within = inside("dogs", arm)
        bars.append(bar(
            f"dogs, {arm}: reward of the selected weights minus the last", gap, f"{clear}, selected inside",
            gap.mean > 2 * gap.standard_error and within,
        ))  # fmt: skip
    text = paired_difference(column("dogs", "RPO", "last", 2), column("dogs", alone, "last", 2))
    bars.append(bar("dogs: S_T at the last step, RPO minus references alone", text, clear,
                    text.mean > 2 * text.standard_error))  # fmt: skip
    for arm in arms:
        later = paired_difference(chosen("dogs", arm, "image alone"), chosen("dogs", arm))
        lower = paired_difference(column("dogs", arm, "image alone", 2), column("dogs", arm, "harmonic", 2))
        bars.append(bar(
            f"dogs, {arm}: step selected by S_I alone minus by both; its S_T {lower.mean:+.3f}", later,
            "later, with lower S_T", later.mean > 0 and lower.mean < 0,
        ))  # fmt: skip

    def aside(label: str, gap, threshold: str, passed: bool) -> None:
        bars.append(bar(label, gap, threshold, passed, claimed=False))

    best = paired_difference(column("dogs", "RPO", "harmonic", 0), column("dogs", alone, "harmonic", 0))
    aside("dogs: reward of the selected weights, RPO minus references alone", best, ">= 0", best.mean >= 0)
    for arm in ("RPO, beta 10", "RPO, labels of scale 1"):
        image = paired_difference(column("dogs", arm, "last", 1), column("dogs", "RPO", "last", 1))
        aside(f"dogs: S_I at the last step, {arm} minus RPO", image, "< 0", image.mean < 0)
    drawn = paired_difference(column("dogs", "RPO, drawn labels", "last", 0), column("dogs", "RPO", "last", 0))
    aside("dogs: reward at the last step, drawn labels minus soft", drawn, "<= 0", drawn.mean <= 0)
    kept = paired_difference(column("dogs", f"{alone}, exact base", "last", 2), column("dogs", alone, "last", 2))
    aside("dogs: S_T at the last step, references alone, exact base minus learned", kept, clear,
          kept.mean > 2 * kept.standard_error)  # fmt: skip
    prior = paired_difference(column("dogs", "prior preservation", "last", 2), column("dogs", alone, "last", 2))
    aside("dogs: S_T at the last step, prior preservation minus references alone", prior, clear,
          prior.mean > 2 * prior.standard_error)  # fmt: skip
    if any(r["world"] == "shapes" for r in runs):
        for arm in ON_SHAPES:
            gap = paired_difference(column("shapes", arm, "harmonic", 0), column("shapes", arm, "base", 0))
            aside(f"shapes, {arm}: reward of the selected weights minus the base", gap, clear,
                  gap.mean > 2 * gap.standard_error)  # fmt: skip
            stop = paired_difference(column("shapes", arm, "harmonic", 0), column("shapes", arm, "last", 0))
            aside(f"shapes, {arm}: reward of the selected weights minus the last", stop, clear,
                  stop.mean > 2 * stop.standard_error)  # fmt: skip
        for arm in ("prior preservation", "RPO"):
            text = paired_difference(column("shapes", arm, "last", 2), column("shapes", alone, "last", 2))
            aside(f"shapes: S_T at the last step, {arm} minus references alone", text, clear,
                  text.mean > 2 * text.standard_error)  # fmt: skip
    table = {}
    for world, arm in dict.fromkeys((r["world"], r["arm"]) for r in runs):
        own = [r for r in runs if (r["world"], r["arm"]) == (world, arm)]
        line = {f"{part}, {which}": str(mean_ci(column(world, arm, which, i)))
                for which in ("harmonic", "last") for i, part in enumerate(("reward", "S_I", "S_T"))}  # fmt: skip
        line["selected step"] = str(chosen(world, arm))
        line |= {k: str(own[0][k]) for k in ("network_evaluations", "drawn_before", "reward_queries")}
        table[f"{world}, {arm}"] = line
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "RPO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
