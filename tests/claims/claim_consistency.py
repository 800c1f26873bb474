"""Consistency distillation in miniature: one jump for fifty steps, in `compass` (exact teacher, sliced Wasserstein
distance), on `digits` (oracle accuracy), and the shipped twin of `shapes` beside its teacher.

The baseline is the undistilled student: the same sampler on the teacher's own denoised guess. Two controls: the target
asked at the student's time instead of its own (nothing then ties the student to the data), and the gradient let into
the target. The second was expected to hurt at one call and does not: with f(x, 0) = x the only function without loss
is the same. (At four calls it costs a third more error.)

Run by `minialign replicate consistency`; tests/claims/test_claims.py runs a small part of it.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.measure import mean_ci, paired_difference
from minialign.methods import consistency_distillation as distillation
from minialign.policies.consistency import ConsistencyPolicy
from minialign.pretrain import shapes_lcm

SEEDS = 5
CALLS = (1, 2, 4, 8)
COMPASS = distillation.Config(num_iterations=4000, batch_size=256, learning_rate=2e-3)
SHORT = distillation.Config(num_iterations=1500, batch_size=256, learning_rate=2e-3)
ARMS = ("undistilled", "4000", "1500", "gradient into the target", "target at the wrong time", "teacher")
DIGITS = distillation.Config(num_iterations=800, batch_size=64, learning_rate=1e-3)


def sliced_wasserstein(samples, real) -> float:
    """Root mean squared distance of sorted projections, over 64 directions at angles pi k / 64."""
    angle = torch.pi * torch.arange(64) / 64
    directions = torch.stack([angle.cos(), angle.sin()])
    ours, theirs = (points @ directions for points in (samples, real))
    return float((ours.sort(0).values - theirs.sort(0).values).square().mean().sqrt())


def with_gradient_into_the_target(student, teacher, world, config, generator) -> None:
    """A control: the student's own answer at (x', t') as target, gradient and all."""
    student.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.0)
    grid, grid_next = distillation.solver_grid(50)
    table = teacher.scheduler.alphas_cumprod
    for number in range(config.num_iterations):
        latents, prompts = world.real(config.batch_size, generator)
        n = torch.randint(50, (len(latents),), generator=generator)
        noise, a = torch.randn(latents.shape, generator=generator), table[grid[n]].unsqueeze(1)
        states, condition = a.sqrt() * latents + (1 - a).sqrt() * noise, student.encode(prompts)
        with torch.no_grad():
            output = teacher.output_at(states, grid[n], teacher.encode(prompts))
            states_next = distillation.ddim_jump(output, states, table[grid[n]], table[grid_next[n]])
        answers = [student.denoise(states, grid[n], condition), student.denoise(states_next, grid_next[n], condition)]
        distillation.distance(*answers).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = (
            config.learning_rate * (1 + math.cos(math.pi * number / config.num_iterations)) / 2
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class AskedAtTheWrongTime(ConsistencyPolicy):
    """The other control: in training, the target (the call without gradient) is asked at t_n instead of t'."""

    def denoise(self, states, timesteps, condition, reference=False):
        later = timesteps if torch.is_grad_enabled() else (timesteps + 20).clamp(max=999)
        return super().denoise(states, later, condition, reference)


def compass_run(arm: str, seed: int) -> dict:
    """arm: one of ARMS. "teacher" takes 50 DDIM steps, the numbers are iterations."""
    torch.set_num_threads(1)
    world = worlds.load("compass", seed=seed, num_steps=50, eta=0.0)
    student, generator = ConsistencyPolicy.from_diffusion(world.policy), torch.Generator().manual_seed(seed)
    if arm in ("4000", "1500"):
        config = COMPASS if arm == "4000" else SHORT
        for _ in distillation.train(student, world.policy, world.real, config, generator):
            pass
    elif arm == "target at the wrong time":
        student.__class__ = AskedAtTheWrongTime
        for _ in distillation.train(student, world.policy, world.real, SHORT, generator):
            pass
        student.__class__ = ConsistencyPolicy
    elif arm == "gradient into the target":
        with_gradient_into_the_target(student, world.policy, world, SHORT, generator)
    real, _ = world.real(4096, torch.Generator().manual_seed(100 + seed))
    errors, policy = {}, world.policy if arm == "teacher" else student
    for calls in (50,) if arm == "teacher" else CALLS:
        policy.set_num_steps(calls)
        samples = policy.sample(world.prompts * 2048, generator=torch.Generator().manual_seed(1_000 + seed))
        errors[str(calls)] = sliced_wasserstein(samples, real)
    return {"world": "compass", "arm": arm, "seed": seed, "error": errors}


def digits_run(seed: int) -> dict:
    """The shipped digits network distilled in 800 updates of 64: oracle accuracy beside the teacher's."""
    torch.set_num_threads(1)
    world = worlds.load("digits", eta=0.0)
    student = ConsistencyPolicy.from_diffusion(world.policy)

    def data(n, generator):
        images, prompts = world.real(n, generator)
        return world.encode(images), prompts

    def accuracy(policy, calls):
        policy.set_num_steps(calls)
        prompts = world.prompts * 100
        samples = policy.sample(prompts, generator=torch.Generator().manual_seed(1_000 + seed))
        return float(world.oracle(samples, prompts).mean())

    found = {f"undistilled {h}": accuracy(student, h) for h in CALLS}
    for _ in distillation.train(student, world.policy, data, DIGITS, torch.Generator().manual_seed(seed)):
        pass
    found |= {f"student {h}": accuracy(student, h) for h in CALLS}
    found |= {f"teacher {h}": accuracy(world.policy, h) for h in (*CALLS, 50)}
    return {"world": "digits", "arm": "800", "seed": seed, "accuracy": found}


def shapes_run() -> dict:
    """The shipped twin and its teacher, measured in one run: the rows of the card."""
    torch.set_num_threads(1)
    teacher, student = worlds.load("shapes").policy, worlds.load("shapes", model="consistency").policy
    rows = list(shapes_lcm.rows(teacher, student, num_samples=512))
    return {"world": "shapes", "rows": [[name, calls, found] for name, calls, found in rows]}


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(shapes_run)]
        jobs += [pool.submit(digits_run, seed) for seed in range(SEEDS)]
        jobs += [pool.submit(compass_run, arm, seed) for seed in range(SEEDS) for arm in ARMS]
        return verdict([job.result() for job in jobs])


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def errors(arm: str, calls: int) -> list[float]:
        return [r["error"][str(calls)] for r in runs if r["world"] == "compass" and r["arm"] == arm]

    def accuracy(name: str) -> list[float]:
        return [r["accuracy"][name] for r in runs if r["world"] == "digits"]

    share = sum(errors("4000", 1)) / sum(errors("undistilled", 1))
    above = paired_difference(errors("4000", 1), errors("teacher", 50))
    more = paired_difference(errors("1500", 8), errors("1500", 1))
    wrong_time = paired_difference(errors("target at the wrong time", 1), errors("1500", 1))
    control = paired_difference(errors("gradient into the target", 1), errors("1500", 1))
    close = paired_difference(accuracy("student 4"), accuracy("teacher 50"))
    better = paired_difference(accuracy("student 4"), accuracy("teacher 4"))
    over = paired_difference(accuracy("student 4"), accuracy("undistilled 4"))
    (shapes,) = (r["rows"] for r in runs if r["world"] == "shapes")
    distance = {(name, calls): found["frechet"] for name, calls, found in shapes}
    few = {h: distance["student", h] / distance["undistilled", h] for h in (1, 2)}
    four = distance["student", 4] / distance["undistilled", 4]
    bars = [
        bar("compass, 1 call: error over that of the undistilled student", share, "< 0.35", share < 0.35),
        bar("compass, 1 call: error minus that of 50 teacher steps", above, "< 0.15", above.mean < 0.15),
        bar("compass, 1,500 updates: error with 8 calls minus with 1", more, "< 0", more.mean < 0),
        bar("control: target at the wrong time, error it adds", wrong_time, "> 2 s.e.",
            wrong_time.mean > 2 * wrong_time.standard_error),
        bar("control: gradient into the target, error it adds", control, "> 2 s.e.",
            control.mean > 2 * control.standard_error, claimed=False),
        bar("digits, 4 calls: accuracy minus 50 teacher steps'", close, "> -0.10", close.mean > -0.10),
        bar("digits, 4 calls: accuracy minus 4 teacher steps'", better, "> 0", better.mean > 0),
        bar("digits, 4 calls: accuracy minus the undistilled student's", over, "> 0", over.mean > 0, claimed=False),
        bar("shapes, 1 call: Frechet distance over the undistilled student's", few[1], "< 1", few[1] < 1),
        bar("shapes, 2 calls: Frechet distance over the undistilled student's", few[2], "< 1", few[2] < 1),
        bar("shapes, 4 calls: Frechet distance over the undistilled student's", four, "< 1", four < 1, claimed=False),
    ]  # fmt: skip
    table = {
        f"compass, {arm}": {f"{h} calls": str(mean_ci(errors(arm, h))) for h in ((50,) if arm == "teacher" else CALLS)}
        for arm in ARMS
    }
    table["digits"] = {
        name: str(mean_ci(accuracy(name))) for name in next(r for r in runs if r["world"] == "digits")["accuracy"]
    }
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Consistency", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
