"""FIND's claims in miniature: a frozen sampler whose noise is learned reaches what is asked for, with calibration and
clipping as its two legs, and ten times faster than reinforcement learning on the weights.

    ring      six modes of which the reward wants one, 20 deterministic steps: the sheet's world A, and its ablations
    shapes    of the world's 24 relation prompts the one that the base draws right least often (22 % of 64 samples, 20
              steps), the strict oracle as reward, against DDPO on all weights, 800 queries each

DDPO starts from the same base with its noise on (eta = 1); DPOK is DDPO with the KL of each step, weighted like FIND's.
On ring either has rounds of 8, like FIND, or 32, at two rates; on shapes DDPO has FIND's rounds of 16, and two rates
(tried on another seed, 1e-3 and one update a round collapsed). Each is judged at its best setting, on these very seeds.
FIND has the sheet's settings throughout. On shapes all runs of a seed are made in one process, one after the other, so
that their seconds can be compared.

Run by `minialign replicate find_noise` (about 8 minutes on two cores); tests/claims/test_claims.py runs a little of it.
"""

import dataclasses
import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import diversity, mean_ci, paired_difference
from minialign.methods import ddpo, find_noise
from minialign.policies.initial_noise import NoisePolicy

SEEDS = 5
EXAMINED = {"ring": 256, "shapes": 128}  # fresh samples, not charged
PROMPT = "a blue triangle above a green triangle"
STEPS = {"sheet": 20, "compared": 6}  # on shapes: the sheet's own, and those at which DDPO is compared

FULL = find_noise.Config(
    num_iterations=60, group_size=8, num_epochs=3, reduction="sum", clip_range=0.2, beta=0.02, learning_rate=0.05
)
LONG = dataclasses.replace(FULL, num_epochs=8)
VARIANTS = {  # (settings, what is added to the reward)
    "full": (FULL, 0.0),
    "full, reward + 2": (FULL, 2.0),
    "no calibration": (dataclasses.replace(FULL, baseline="none"), 0.0),
    "no calibration, reward + 2": (dataclasses.replace(FULL, baseline="none"), 2.0),
    "a network for V": (dataclasses.replace(FULL, baseline="value"), 0.0),
    "8 inner steps": (LONG, 0.0),
    "8 inner steps, no clip": (dataclasses.replace(LONG, clip_range=math.inf), 0.0),
    "8 inner steps, ratio to N(0, I)": (dataclasses.replace(LONG, ratio_reference="initial"), 0.0),
    "no KL": (dataclasses.replace(FULL, beta=0.0), 0.0),
    "shuffled": (FULL, 0.0),
}
# Two of the sheet's bars are about how often a run fails, of which five seeds say little: these have twenty more, which
# judge nothing. (That gradients are clipped is not why so few fail: without it the five end alike.)
OFTEN = ("full", "no calibration, reward + 2", "8 inner steps", "8 inner steps, no clip")
MORE = 20
PLAIN = ddpo.Config(num_iterations=120, num_prompts=1, num_minibatches=2, steps_per_pass=20)
DPOK = dataclasses.replace(PLAIN, beta=0.02, reduction="sum")
WEIGHTS = {
    f"{name}, rounds of {rows}, lr {rate}": dataclasses.replace(config, learning_rate=rate, group_size=rows)
    for name, config in (("DDPO", PLAIN), ("DPOK", DPOK))
    for rows in (8, 32)
    for rate in (3e-3, 1e-2)
}
SHAPES = find_noise.Config(num_iterations=50, group_size=16)  # the defaults are the sheet's
ON_SHAPES = {
    f"DDPO lr {rate}": ddpo.Config(
        num_iterations=50, num_prompts=1, group_size=16, num_minibatches=2, steps_per_pass=6, learning_rate=rate
    )
    for rate in (1e-4, 3e-4)
}


def rare(samples, prompts):
    """exp(-|x - m_0|^2 / (2 0.4^2)): one mode of six. The base model gets 0.13."""
    return (-(samples - torch.tensor([2.0, 0.0])).square().sum(1) / (2 * 0.4**2)).exp()


def unchanged(before: dict, network) -> bool:
    """Whether every weight is the same, bit by bit."""
    return all(torch.equal(before[name], weight) for name, weight in network.state_dict().items())


def trained(method, policy, reward, prompts, config, seed, watch, every=1) -> dict:
    """Rewards of fresh samples before the first round and after every `every`, and what was spent by then."""
    curve, seconds = [[0, 0, 0.0, watch()]], 0.0
    for step in method.train(policy, reward, prompts, config, torch.Generator().manual_seed(seed)):
        seconds += step.seconds
        if (step.number + 1) % every == 0:
            curve.append([step.reward_queries, step.network_evaluations, round(seconds, 4), watch()])
    return {"curve": curve, "round": float(step.metrics["reward"])}


def ring_run(name: str, seed: int) -> dict:
    """A variant of FIND, or DDPO or DPOK at one rate."""
    torch.set_num_threads(1)
    steers = name in VARIANTS
    world = worlds.load("ring", num_steps=20, eta=0.0 if steers else 1.0, std=0.2, num_modes=6, seed=seed)
    policy = NoisePolicy(world.policy, world.prompts) if steers else world.policy
    config, offset = VARIANTS[name] if steers else (WEIGHTS[name], 0.0)
    noise, shuffle = (torch.Generator().manual_seed(number + seed) for number in (1_000, 2_000))
    prompts = world.prompts * EXAMINED["ring"]

    def reward(samples, prompts):
        scores = rare(samples, prompts) + offset
        return scores[torch.randperm(len(scores), generator=shuffle)] if name == "shuffled" else scores

    def watch() -> float:
        return float(rare(policy.sample(prompts, generator=noise), prompts).mean())

    before = {key: weight.clone() for key, weight in world.policy.network.state_dict().items()}
    every = {"full": 1}.get(name, 15) if steers else 2
    found = trained(find_noise if steers else ddpo, policy, reward, world.prompts, config, seed, watch, every)
    samples = policy.sample(prompts, generator=noise)
    return {
        "world": "ring", "method": name, "seed": seed, **found, "std": float(samples.std(0).mean()),
        "frozen": unchanged(before, world.policy.network),
    }  # fmt: skip


def shapes_runs(seed: int) -> list[dict]:
    """FIND with the sheet's steps, then FIND and DDPO with fewer ones, the same: reward, diversity, costs."""
    torch.set_num_threads(1)
    runs = []
    for name in ("FIND, 20 steps", "FIND", *ON_SHAPES):
        arm, steers = "sheet" if "20" in name else "compared", name not in ON_SHAPES
        world = worlds.load("shapes", num_steps=STEPS[arm], eta=0.0 if steers else 1.0)
        asked = [PROMPT] * EXAMINED["shapes"]
        noise = world.policy.draw_noise(len(asked), torch.Generator().manual_seed(1_000 + seed))
        before = {key: weight.clone() for key, weight in world.policy.network.state_dict().items()}
        if steers:
            policy = NoisePolicy(world.policy, [PROMPT])
        else:
            policy = world.policy
            policy.train_all_weights()
        looks = []

        def watch(policy=policy, asked=asked, noise=noise, world=world, looks=looks) -> float:
            samples = policy.sample(asked, noise)
            looks.append([float(f(samples, asked).mean()) for f in (world.rewards["graded"], world.rewards["scorer"])])
            looks[-1].append(float(diversity(samples, asked, reduction="mean")))
            return float(world.oracle(samples, asked).mean())

        every = 50 if arm == "sheet" else 10
        method, config = (find_noise, SHAPES) if steers else (ddpo, ON_SHAPES[name])
        found = trained(method, policy, world.oracle, [PROMPT], config, seed, watch, every)
        runs.append({
            "world": "shapes", "method": name, "seed": seed, **found, "graded_scorer_diversity": looks,
            "frozen": unchanged(before, world.policy.network),
        })  # fmt: skip
    return runs


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(shapes_runs, seed) for seed in range(SEEDS)]
        names = [(name, seed) for name in (*VARIANTS, *WEIGHTS) for seed in range(SEEDS)]
        names += [(name, seed) for name in OFTEN for seed in range(SEEDS, SEEDS + MORE)]
        ring = list(pool.map(ring_run, *zip(*names, strict=True)))
        return verdict(ring + [run for job in jobs for run in job.result()])


# The verdict ----------------------------------------------------------------------------------------------------------


def first(curve: list, target: float) -> list:
    """(queries, evaluations, seconds) when fresh samples first reached the target; all of them if never."""
    return next((row[:3] for row in curve if row[3] >= target), curve[-1][:3])


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars and the paper's tenfold, from the raw results that are stored beside them."""
    more = [run for run in runs if run["seed"] >= SEEDS]
    runs, everything = [run for run in runs if run["seed"] < SEEDS], runs
    names = list(dict.fromkeys((run["world"], run["method"]) for run in runs))
    curves = {key: [run["curve"] for run in runs if (run["world"], run["method"]) == key] for key in names}

    def final(world: str, method: str) -> list[float]:
        return [curve[-1][3] for curve in curves[world, method]]

    def spent(world: str, method: str, target: float | None, axis: int) -> list[float]:
        """Until the target, or, without one, until 90 % of what the run itself ends with."""
        return [first(curve, target or 0.9 * curve[-1][3])[axis] for curve in curves[world, method]]

    def soonest(world: str, name: str, target: float) -> str:
        """The arm that gets to the target with the fewest queries; those that never do, by where they end."""
        arms = [arm for at, arm in names if at == world and arm.startswith(name)]
        return min(arms, key=lambda arm: (sum(spent(world, arm, target, 0)), -sum(final(world, arm))))

    full, shifted = final("ring", "full"), final("ring", "no calibration, reward + 2")
    lost, clear = paired_difference(full, shifted), "> 2 s.e."
    spread = [torch.tensor(final("ring", f"8 inner steps{rest}")).std().item() for rest in ("", ", no clip")]
    moved = [run for run in runs if not run["frozen"] and (run["method"] in VARIANTS or "FIND" in run["method"])]
    gain = paired_difference(final("shapes", "FIND, 20 steps"), [c[0][3] for c in curves["shapes", "FIND, 20 steps"]])
    best = max((final("shapes", arm) for arm in ON_SHAPES), key=sum)
    equal = paired_difference(final("shapes", "FIND"), best)
    bars = [
        bar("ring: reward of FIND at 480 queries, worst seed", min(full), ">= 0.9", min(full) >= 0.9),
        bar("ring: FIND minus FIND without calibration, reward + 2", lost, clear, lost.mean > 2 * lost.standard_error),
        bar(
            "ring, 8 inner steps: sd over seeds with clipping, over that without", spread[0] / spread[1], "< 0.33",
            spread[0] < spread[1] / 3,
        ),
        bar("runs of FIND in which a weight of the network moved", float(len(moved)), "0", not moved),
        bar("shapes, 20 steps: oracle, FIND minus frozen base", gain, clear, gain.mean > 2 * gain.standard_error),
        bar("shapes, 6 steps: oracle at 800 queries, FIND minus DDPO on all weights", equal, ">= 0", equal.mean >= 0),
    ]  # fmt: skip

    for world, ours, rivals in (("ring", "full", ("DDPO", "DPOK")), ("shapes", "FIND", ("DDPO",))):
        ends = final(world, ours)
        target = 0.9 * sum(ends) / len(ends)
        for rival in rivals:
            theirs = soonest(world, rival, target)
            share = sum(spent(world, ours, None, 0)) / max(1, sum(spent(world, theirs, None, 0)))
            bars.append(bar(
                f"{world}: queries to 90 % of its own final reward, FIND over {rival}", share, "<= 0.33", share <= 1 / 3
            ))  # fmt: skip
            missed = sum(max(row[3] for row in curve) < target for curve in curves[world, theirs])
            whole = f" ({missed} of {len(curves[world, theirs])} {rival} runs never: all they spent)" if missed else ""
            for axis, unit, claimed in ((0, "queries", True), (2, "seconds", True), (1, "network evaluations", False)):
                share = sum(spent(world, ours, target, axis)) / max(1e-9, sum(spent(world, theirs, target, axis)))
                bars.append(bar(
                    f"{world}: {unit} to equal reward, FIND over {rival}{whole}", share, "<= 0.1", share <= 0.1
                ) | ({} if claimed else {"claimed": False}))  # fmt: skip
    chance = paired_difference(final("ring", "shuffled"), [curve[0][3] for curve in curves["ring", "shuffled"]])
    offset = paired_difference(final("ring", "full, reward + 2"), full)
    looks = [run["graded_scorer_diversity"] for run in runs if run["method"] == "FIND, 20 steps"]
    narrower = paired_difference([look[-1][2] for look in looks], [look[0][2] for look in looks])
    aside = [
        bar("control: ring, shuffled rewards, gain", chance, "< 2 s.e.", abs(chance.mean) < 2 * chance.standard_error),
        bar("control: ring, FIND with reward + 2 minus FIND", offset, "within 0.01", abs(offset.mean) < 0.01),
        bar("its cost: diversity on shapes, FIND minus frozen base", narrower, ">= 0", narrower.mean >= 0),
    ]
    ends = {name: [run["curve"][-1][3] for run in more if run["method"] == name] for name in OFTEN}
    if more:
        again = paired_difference(ends["full"], ends["no calibration, reward + 2"])
        aside.append(bar(
            f"{MORE} further seeds: FIND minus FIND without calibration, reward + 2", again, clear,
            again.mean > 2 * again.standard_error,
        ))  # fmt: skip
        clipped, free = (torch.tensor(ends[name]).std().item() for name in OFTEN[2:])
        aside.append(bar(
            f"{MORE} further seeds, 8 inner steps: sd with clipping, over that without", clipped / free, "< 0.33",
            clipped < free / 3,
        ))  # fmt: skip
    # the arm that is soonest at the target may collapse later, and be soon at 90 % of very little: so also this
    steady = max(
        (arm for at, arm in names if at == "ring" and arm.startswith("DDPO")), key=lambda a: sum(final("ring", a))
    )
    share = sum(spent("ring", "full", None, 0)) / max(1, sum(spent("ring", steady, None, 0)))
    label = "ring: queries to 90 % of its own final reward, FIND over the DDPO that ends highest"
    aside.append(bar(label, share, "<= 0.33", share <= 1 / 3))
    bars += [line | {"claimed": False} for line in aside]
    table = {
        f"{world}, {method}": {
            "start": str(mean_ci([curve[0][3] for curve in curves[world, method]])),
            "end": str(mean_ci(final(world, method))),
        } for world, method in names
    }  # fmt: skip
    passed = all(b["passed"] for b in bars if b.get("claimed", True))
    return {
        "name": "FIND", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": everything,
    }  # fmt: skip
