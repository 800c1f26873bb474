"""DRAGON on twenty rewards: how often does the tuned model beat the base at the very reward that it was tuned for?

The paper tunes one music model on 20 rewards and wins 81.45 % on average. Here six are of points (plane), seven of
digits, seven of shapes; nine are of single samples, four set a sample beside exemplars or a learned model, seven are
of a set, one of these with texts for exemplars of pictures. All are trained alike within a world: no reward has
settings of its own.

    win rate, a reward of samples    same prompt, same noise: share of pairs where the tuned sample scores higher
    win rate, a reward of a set      sets of 32 of these samples against each other
    control                          the same training on a number that has nothing to do with the sample

A quality beside the reward: Frechet distance to the data (plane), within reach of a real digit, oracle (shapes).

Run by `minialign replicate dragon_rewards`; tests/claims/test_claims.py runs a small part of it.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar
from claim_dragon import base_policy, plane, rewards_of

from minialign import exemplars, worlds
from minialign.loop import fit
from minialign.measure import frechet_distance, mean_ci, paired_difference, win_rate
from minialign.methods import dragon
from minialign.policies.diffusion import EVERYWHERE
from minialign.rewards import checked, checked_set, compressibility
from minialign.worlds import digits, gaussian, shapes

SEEDS = 5
SET = 32  # samples in a set
PAPER = 0.8145
CONFIGS = {
    "plane": dict(num_iterations=8),
    "digits": dict(num_iterations=3, num_prompts=64, num_updates=8, minibatch_size=64, beta=3.5, learning_rate=5e-4),
    "shapes": dict(num_iterations=4, num_prompts=32, num_updates=4, minibatch_size=32, beta=0.9, learning_rate=5e-4),
}
SAMPLES = {"plane": 1024, "digits": 512, "shapes": 256}


def redness(samples, prompts):
    """Share of the picture that red ink covers."""
    return shapes.inks(samples)[0][:, 0].mean((1, 2))


def leftness(samples, prompts):
    """Where the ink is, on average: 1 at the left edge, 0 at the right."""
    ink = shapes.inks(samples)[0].sum((1, 2))
    place = torch.linspace(1, 0, ink.shape[1])
    return (ink * place).sum(1) / ink.sum(1).clamp_min(1e-6)


def count(samples, prompts):
    """How many objects the oracle finds."""
    return torch.bincount(shapes.read_objects(samples).image, minlength=len(samples)).float()


def patches(samples):
    """Sixteen 2 x 2 patches of a digit, 4 numbers each."""
    return torch.nn.functional.unfold(samples, 2, stride=2).mT


def shuffled(samples, prompts):
    """A number that has nothing to do with what a sample is worth."""
    return (samples.flatten(1).double().mean(1) * 1e6) % 1  # in float32 a picture's sum has no digits to spare


@functools.cache
def rewards_in(world: str, seed: int) -> dict:
    """{name: (kind, reward)} of a world."""
    if world == "plane":
        frechet, mahalanobis, vendi = rewards_of(seed)
        points, mode = plane().mixture.sample(2_000, torch.Generator().manual_seed(3_000 + seed))
        return {
            "position": ("sample", gaussian.first_coordinate), "mode value": ("sample", plane().rewards["mode_value"]),
            "distance from exemplars": ("exemplars", mahalanobis), "Frechet distance to exemplars": ("set", frechet),
            "MMD to exemplars": ("set", exemplars.mmd_to(points[mode % 2 == 0][:500])), "Vendi": ("set", vendi),
        }  # fmt: skip
    if world == "digits":
        found = worlds.load("digits")
        images = digits.data("train")[0]
        each = exemplars.frechet_of_each(images[images.flatten(1).mean(1).argsort(descending=True)[:144]], patches)
        return {
            **{name: ("sample", found.rewards[name]) for name in ("ink", "symmetric", "bold")},
            "likeness": ("exemplars", found.rewards["likeness"]), "patches like bold ones": ("exemplars", each),
            "like bold ones": ("set", digits.like_bold()), "Vendi": ("set", found.set_rewards["vendi"]()),
        }  # fmt: skip
    found = worlds.load("shapes")
    return {
        "red": ("sample", redness), "left": ("sample", leftness), "number": ("sample", count),
        "compressibility": ("sample", compressibility), "scorer": ("exemplars", found.rewards["scorer"]),
        "like scenes": ("set", shapes.like_scenes()), "like red captions": ("set", shapes.like_red_captions()),
    }  # fmt: skip


NAMES = {
    "plane": ("position", "mode value", "distance from exemplars", "Frechet distance to exemplars", "MMD to exemplars",
              "Vendi"),
    "digits": ("ink", "symmetric", "bold", "likeness", "patches like bold ones", "like bold ones", "Vendi"),
    "shapes": ("red", "left", "number", "compressibility", "scorer", "like scenes", "like red captions"),
}  # fmt: skip
JOBS = [(world, seed) for seed in range(SEEDS) for world in ("shapes", "digits", "plane")]


def fresh(world: str, seed: int):
    """(policy ready to train, its prompts)."""
    if world == "plane":
        return base_policy(seed), ["a point"]
    found = worlds.load(world, num_steps=6 if world == "shapes" else 10)
    found.policy.add_lora(16, target_modules=EVERYWHERE, seed=seed)
    return found.policy, found.prompts


def drawn(policy, prompts: list, world: str, seed: int) -> tuple[torch.Tensor, list]:
    many = [prompts[i % len(prompts)] for i in range(SAMPLES[world])]
    noise = policy.draw_noise(len(many), torch.Generator().manual_seed(1_000 + seed))
    return torch.cat([policy.sample(many[i : i + 256], noise[i : i + 256]) for i in range(0, len(many), 256)]), many


def wins(kind: str, reward, ours: torch.Tensor, base: torch.Tensor, prompts: list) -> float:
    if kind != "set":
        return win_rate(checked(reward, ours, prompts), checked(reward, base, prompts))
    group = torch.arange(len(prompts)) // SET
    return win_rate(checked_set(reward, ours, prompts, group), checked_set(reward, base, prompts, group))


def quality(world: str, samples: torch.Tensor, prompts: list) -> float:
    if world == "plane":
        return -float(frechet_distance(samples, plane().mixture.sample(1024, torch.Generator().manual_seed(9))[0]))
    if world == "digits":
        near = torch.cdist(samples.flatten(1), digits.data("train")[0].flatten(1)).amin(1) <= digits.reach()
        return float(near.float().mean())
    return float(shapes.oracle(samples, prompts).mean())


def tuned(world: str, name: str, seed: int) -> dict:
    """One reward, or the control, whose samples are held against the base's under every reward of the world."""
    known = rewards_in(world, seed)
    kind, reward = known.get(name, ("sample", shuffled))
    policy, prompts = fresh(world, seed)
    before, many = drawn(policy, prompts, world, seed)
    policy.network_evaluations = 0
    config = dragon.Config(**CONFIGS[world], selection="distribution" if kind == "set" else "instance")
    history = fit(dragon.train(policy, reward, prompts, config, torch.Generator().manual_seed(seed)), progress=False)
    after, _ = drawn(policy, prompts, world, seed)
    judged = {name: known[name]} if name in known else known
    found = {other: wins(*known[other], after, before, many) for other in judged}
    spent = {key: history[-1].get(key, 0) for key in ("reward_queries", "set_queries", "network_evaluations")}
    qualities = {"quality_before": quality(world, before, many), "quality_after": quality(world, after, many)}
    return {"world": world, "reward": name, "kind": kind, "seed": seed, "wins": found, **qualities, **spent}


def world_run(world: str, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    return [tuned(world, name, seed) for name in (*NAMES[world], "shuffled")]


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict([run for runs in pool.map(world_run, *zip(*JOBS, strict=True)) for run in runs])


def verdict(runs: list[dict]) -> dict:
    """The average over the twenty rewards, seed by seed, from the raw results that are stored beside them."""
    ours = {(r["world"], r["reward"], r["seed"]): r["wins"][r["reward"]] for r in runs if r["reward"] != "shuffled"}
    rewards = list(dict.fromkeys((world, name) for world, name, _ in ours))
    control = {
        (r["world"], name, r["seed"]): won for r in runs if r["reward"] == "shuffled" for name, won in r["wins"].items()
    }
    seeds = sorted({seed for *_, seed in ours})

    def averages(found: dict) -> list[float]:
        return [sum(found[*reward, seed] for reward in rewards) / len(rewards) for seed in seeds]

    average, chance = averages(ours), averages(control)
    over_half = paired_difference(average, [0.5] * len(seeds))
    over_control = paired_difference(average, chance)
    mean = paired_difference(average, [0.0] * len(seeds))
    each = {reward: [ours[*reward, seed] for seed in seeds] for reward in rewards}
    worst = min(each, key=lambda reward: sum(each[reward]))
    kinds = {(r["world"], r["reward"]): r["kind"] for r in runs}
    bars = [
        bar(f"average win rate over {len(rewards)} rewards (the paper: {PAPER})", mean, f">= {PAPER}",
            mean.mean >= PAPER),
        bar("average win rate minus one half", over_half, "> 2 s.e.", over_half.mean > 2 * over_half.standard_error),
        bar("average win rate minus that of the shuffled control", over_control, "> 2 s.e.",
            over_control.mean > 2 * over_control.standard_error),
    ]  # fmt: skip
    for kind, words in (("sample", "of samples"), ("exemplars", "of samples, learned or beside exemplars"),
                        ("set", "of a set")):  # fmt: skip
        share = [rate for reward, rates in each.items() if kinds[reward] == kind for rate in rates]
        value = sum(share) / len(share)
        bars.append(bar(f"the same, rewards {words}", value, f">= {PAPER}", value >= PAPER, claimed=False))
    lowest = sum(each[worst]) / len(seeds)
    text = f"the worst of them: {worst[1]}, {worst[0]}"
    bars.append(bar(text, lowest, "> 0.5", lowest > 0.5, claimed=False))
    pictures = [r for r in runs if r["world"] != "plane" and r["reward"] != "shuffled"]
    losses = [r["quality_after"] - r["quality_before"] for r in pictures]
    cost = paired_difference(losses, [0.0] * len(losses))
    bars.append(bar("its cost: quality of digits and shapes, tuned minus base", cost, ">= 0", cost.mean >= 0,
                    claimed=False))  # fmt: skip
    table = {}
    for reward in rewards:
        mine = [r for r in runs if (r["world"], r["reward"]) == reward]
        numbers = {
            "win rate": each[reward], "control": [control[*reward, seed] for seed in seeds],
            **{key: [r[key] for r in mine] for key in ("quality_before", "quality_after", "reward_queries",
                                                       "set_queries", "network_evaluations")},
        }  # fmt: skip
        table[f"{reward[0]}, {reward[1]} ({kinds[reward]})"] = {key: str(mean_ci(v)) for key, v in numbers.items()}
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "DRAGON, 20 rewards", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
