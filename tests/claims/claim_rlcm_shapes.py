"""RLCM beside DDPO on the real classes: the consistency twin of `shapes` (4 calls, LatentConsistencyModelPipeline) and
`shapes` itself (6 steps, StableDiffusionPipeline), by the settings of `minialign run`, on four rewards.

compressibility and incompressibility (JPEG size), the contrastive scorer, and the strict oracle. Both methods of a seed
run one after the other in one process, so that their seconds can be compared. DDPO at 6 steps is the cheap baseline: at
the papers' 50 it would cost eight times as much.

Run by `minialign replicate rlcm_shapes` (about 10 minutes on two cores).
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import prepare, rewards
from minialign.measure import diversity, mean_ci, paired_difference
from minialign.methods import CATALOGUE

SEEDS = 3
EXAMINED = 256  # samples, every fourth round, not charged
ROUNDS = {"oracle": {"ddpo": 50, "rlcm": 36}}  # of 128 queries; the other rewards take 16 of each
FEW = {"ddpo": 16, "rlcm": 16}
TASKS = ("oracle", "scorer", "compressibility", "incompressibility")


def run(task: str, method: str, seed: int) -> list[list[float]]:
    """[queries, evaluations, seconds of training, reward, oracle, diversity] over time, from before the first round."""
    rounds = ROUNDS.get(task, FEW)[method]
    entry = CATALOGUE[method]
    chosen = prepare.settings(entry, "shapes", [], rounds)
    world, config = prepare.ready_world(entry, "shapes", chosen), chosen.config
    reward = world.rewards.get(task) or getattr(rewards, task)
    policy, asked, curve = world.policy, [world.prompts[i % 8] for i in range(EXAMINED)], []
    noise = policy.draw_noise(EXAMINED, torch.Generator().manual_seed(5_000 + seed))

    def examine(queries: int, evaluations: int, seconds: float) -> None:
        images = policy.sample(asked, noise)
        scores = [float(score(images, asked).mean()) for score in (reward, world.oracle)]
        spread = float(diversity(images, asked, reduction="mean"))
        curve.append([queries, evaluations, round(seconds, 2), *(round(v, 4) for v in (*scores, spread))])
        policy.network_evaluations = evaluations

    examine(0, 0, 0.0)
    seconds = 0.0
    for step in entry.module.train(policy, reward, world.prompts, config, torch.Generator().manual_seed(seed)):
        seconds += step.seconds
        if step.number % 4 == 3 or step.number + 1 == rounds:
            examine(step.reward_queries, step.network_evaluations, seconds)
    return curve


def shapes_run(task: str, seed: int) -> dict:
    torch.set_num_threads(1)
    return {"task": task, "seed": seed, "curves": {method: run(task, method, seed) for method in ("ddpo", "rlcm")}}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(task, seed) for task in TASKS for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(shapes_run, *zip(*jobs, strict=True))))


def mean_curve(curves: list) -> list[list[float]]:
    """The mean over seeds of curves that were examined at the same rounds."""
    return torch.tensor(curves, dtype=torch.float64).mean(0).tolist()


def verdict(runs: list[dict]) -> dict:
    """RLCM's costs when its mean reward over seeds passes what DDPO's mean ends with, on three axes."""
    bars, table = [], {}
    for task in TASKS:
        pairs = [r["curves"] for r in runs if r["task"] == task]
        for method in ("ddpo", "rlcm"):
            end = zip(*(pair[method][-1] for pair in pairs), strict=True)
            names = ("queries", "network_evaluations", "seconds", "reward", "oracle", "diversity")
            table[f"{task}, {method}"] = {name: str(mean_ci(values)) for name, values in zip(names, end, strict=True)}
        claimed = task == "oracle"
        gain = paired_difference(*([pair[m][-1][3] - pair[m][0][3] for pair in pairs] for m in ("rlcm", "ddpo")))
        bars.append(bar(f"{task}: gain in reward at the end, RLCM minus DDPO", gain, ">= 0", gain.mean >= 0, claimed))
        ddpo = mean_curve([pair["ddpo"] for pair in pairs])[-1]
        passing = [point for point in mean_curve([pair["rlcm"] for pair in pairs]) if point[3] >= ddpo[3]]
        if not passing or passing[0][0] == 0:  # never, or before the first round: nothing to compare
            where = "never" if not passing else "before training"
            bars.append(
                bar(f"{task}: RLCM passes DDPO's last mean reward", 0.0, f"in training ({where})", False, claimed)
            )
            continue
        for column, name, most in (
            (2, "seconds", 1 / 3),
            (1, "network evaluations", 1 / 3),
            (0, "reward queries", 1.0),
        ):
            share = passing[0][column] / ddpo[column]
            bars.append(bar(
                f"{task}: {name} to DDPO's last mean reward, RLCM over DDPO", share, f"<= {most:.2g}", share <= most,
                claimed,
            ))  # fmt: skip
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "RLCM on shapes", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
