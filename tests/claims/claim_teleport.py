"""Teleportation in miniature: the closed form of a Gaussian replaces the first sampling steps, at no loss.

    exact      the digits as a mixture of ten Gaussians, whose score is known: Heun, grids of 5 to 18 points, jumps to
               ten noise levels, the same budget below (B) or fewer evaluations (A); naive starts at the same levels
    networks   the shipped EDM networks of `digits` and `patches` (Heun, DPM-Solver++), the shipped class-conditional
               digits network (DDIM, UniPC; one Gaussian a class), and the latent model of `shapes` (Heun, DPM-Solver++,
               UniPC; one Gaussian a prompt, and one for all prompts as a control): what skipping 15 to 30 % of the
               steps costs

Distances: Frechet, of the exact mixture to its own moments, of networks' samples to as many real ones (`shapes`: in the
scorer's image features). Samples of a seed start from the same noise, skipped or not, and are compared in pairs.

Run by `minialign replicate teleport` (about 25 minutes on two free cores); tests/claims/test_claims.py runs a part
of it.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from minialign import worlds
from minialign.exact import Gaussian, GaussianMixture
from minialign.kernels import karras_sigmas
from minialign.measure import frechet_distance, frechet_gaussian, mean_ci, paired_difference
from minialign.methods import teleport
from minialign.pretrain import edm as pretrain_edm
from minialign.pretrain import shapes_lcm
from minialign.worlds import digits, patches, shapes

SEEDS = 5
SAMPLES = 2000
SIGMA_MAX = 80.0
BUDGETS = (9, 13, 35)  # network evaluations of Heun
LEVELS = (80.0, 20.0, 10.0, 5.0, 2.5, 1.0, 0.5)
DROPPED = (0, 4, 6, 8, 9, 10, 11)  # of 18 points
STARTS = ("noise", "mean", "isotropic", "rank 2", "rank 8", "teleport")
NETWORKS = {
    "digits_edm": ("Heun", "DPM-Solver++"),
    "patches": ("Heun", "DPM-Solver++"),
    "digits": ("DDIM", "UniPC"),
    "shapes": ("Heun", "DPM-Solver++", "UniPC"),
    "shapes, one Gaussian": ("UniPC",),
}
STEPS = {"digits_edm": 18, "patches": 18, "digits": 20, "shapes": 20}
SHARES = (0.0, 0.15, 0.3, 0.5)  # of the steps, skipped


# The exact mixture ----------------------------------------------------------------------------------------------------


@functools.cache
def mixture() -> GaussianMixture:
    """The sheet's: equal weights, divisor n - 1, + 1e-3 on the diagonals, all digits."""
    images, labels = digits.data("all")
    latents = digits.encode(images).flatten(1).double()
    groups = [latents[labels == digit] for digit in range(10)]
    ridge = 1e-3 * torch.eye(64, dtype=torch.float64)
    means, covariances = (torch.stack(list(part)) for part in zip(*((g.mean(0), g.T.cov() + ridge) for g in groups),
                                                                  strict=True))  # fmt: skip
    return GaussianMixture(means, covariances).float()


def exact_denoiser(x, sigma):
    """E[x_0 | x_0 + sigma noise = x], from the variance-preserving form of the mixture."""
    alpha_bar = 1 / (1 + sigma**2)
    return mixture().denoised(x * alpha_bar**0.5, alpha_bar)


def distance(x) -> float:
    mean, covariance = mixture().moments()
    return float(frechet_gaussian(x.double().mean(0), x.double().T.cov(), mean, covariance))


def start(kind: str, noise, sigma: float, statistics: Gaussian):
    """The state at sigma: teleported, or one of the guesses that know less."""
    if kind == "teleport":
        return statistics.flow(SIGMA_MAX * noise, SIGMA_MAX, sigma)
    if kind.startswith("rank"):
        return statistics.truncated(int(kind.split()[1])).flow(SIGMA_MAX * noise, SIGMA_MAX, sigma)
    spread = sigma if kind != "isotropic" else (sigma**2 + float(statistics.values.sum()) / len(statistics.mean)) ** 0.5
    return spread * noise + (0 if kind == "noise" else statistics.mean)


@torch.no_grad()
def exact_run(seed: int) -> dict:
    torch.set_num_threads(1)
    noise = torch.randn(SAMPLES, 64, generator=torch.Generator().manual_seed(seed))
    g = Gaussian.from_moments(*mixture().moments())
    found: dict = {"world": "exact", "seed": seed, "budget": {}, "dropped": {}, "start": {}}
    for evaluations in BUDGETS:
        for level in LEVELS:
            grid = karras_sigmas((evaluations + 1) // 2, sigma_max=level)
            x = teleport.sample(exact_denoiser, noise, grid, g if level < SIGMA_MAX else None)
            found["budget"][f"{evaluations}, {level:g}"] = distance(x)
    grid = karras_sigmas(18)
    for dropped in DROPPED:
        x = teleport.sample(exact_denoiser, noise, grid[dropped:], g if dropped else None)
        found["dropped"][str(dropped)] = distance(x)
    for level in (10.0, 2.5, 1.0):
        for kind in STARTS:
            x = teleport.heun(exact_denoiser, start(kind, noise, level, g), karras_sigmas(10, sigma_max=level))
            found["start"][f"{kind}, {level:g}"] = distance(x)
    return found


# Trained networks -----------------------------------------------------------------------------------------------------


@functools.cache
def edm(name: str):
    """(denoiser, statistics of its training data)."""
    return patches.denoiser(name), Gaussian.fit(pretrain_edm.data_of(name, "train"))


def edm_samples(name: str, solver: str, skipped: int, seed: int):
    denoiser, g = edm(name)
    noise = torch.randn(SAMPLES, *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed))
    grid = karras_sigmas(STEPS[name])
    if solver == "Heun":
        return teleport.sample(denoiser, noise, grid[skipped:], g).flatten(1)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=SIGMA_MAX, sigma_data=0.5)
    begun = teleport.skip_steps(scheduler, noise, g, float(grid[skipped]) * 1.001, STEPS[name])
    return late_loop(begun, lambda x, t: denoiser.network(x, t.expand(len(x))).sample).flatten(1)


def late_loop(begun: teleport.Start, network):
    """The loop of every diffusers pipeline."""
    x = begun.states
    for t in begun.scheduler.timesteps:
        x = begun.scheduler.step(network(begun.scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@functools.cache
def class_statistics() -> list[Gaussian]:
    images, labels = digits.data("train")
    return [Gaussian.fit(digits.encode(images[labels == digit])) for digit in range(10)]


def level_of(scheduler, steps: int, skipped: int) -> float:
    """sigma / alpha at the start of step `skipped`."""
    scheduler.set_timesteps(steps)
    alpha, sigma = teleport.noise_levels(scheduler)[skipped].tolist()
    return sigma / alpha * 1.001


def digits_samples(solver: str, skipped: int, seed: int):
    """The shipped class-conditional network; every class jumps by its own Gaussian."""
    policy = digits.load().policy
    kind = {"DDIM": DDIMScheduler, "UniPC": UniPCMultistepScheduler}[solver]
    scheduler = kind.from_config(policy.scheduler.config)
    noise = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(SAMPLES) % 10
    statistics = [class_statistics()[label] for label in labels.tolist()]
    level = level_of(scheduler, STEPS["digits"], skipped) if skipped else 1e9
    begun = teleport.skip_steps(scheduler, noise, statistics, level, STEPS["digits"])
    return late_loop(begun, lambda x, t: policy.network(x, t.expand(len(x)), class_labels=labels).sample).flatten(1)


@functools.cache
def shapes_parts():
    """(policy, the scorer that gives features)."""
    return worlds.load("shapes").policy, shapes_lcm.load_scorer()


@functools.cache
def latent_statistics(prompt: str | None) -> Gaussian:
    """Of 256 scenes that the prompt describes, or of 4,000 of all prompts."""
    generator = torch.Generator().manual_seed(0)
    images = shapes.render_scenes([prompt] * 256, generator) if prompt else shapes.real(4000, generator)[0]
    return teleport.latent_statistics(shapes_parts()[0].pipeline.vae, images, generator=generator)


SHAPES_SOLVERS = {
    "Heun": HeunDiscreteScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}


def shapes_samples(solver: str, skipped: int, seed: int, per_prompt: bool, samples: int = 1024):
    """(features, oracle accuracy) of scenes drawn with half as many steps by Heun, which calls the network twice."""
    policy, scorer = shapes_parts()
    scheduler = SHAPES_SOLVERS[solver].from_config(policy.scheduler.config)
    steps = STEPS["shapes"] // (2 if solver == "Heun" else 1)
    skipped = round(skipped * steps / STEPS["shapes"])
    level = level_of(scheduler, steps, skipped) if skipped else 1e9
    prompts = shapes.draw_prompts(samples, torch.Generator().manual_seed(100 + seed))
    noise = torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    statistics = [latent_statistics(prompt) for prompt in prompts] if per_prompt else latent_statistics(None)
    condition = policy.encode(prompts)
    begun = teleport.skip_steps(scheduler, noise, statistics, level, steps)
    latents = late_loop(begun, lambda x, t: policy.output_at(x, t.expand(len(x)), condition))
    images = policy.decode(latents)
    return shapes_lcm.features(images, scorer), float(shapes.oracle(images, prompts).mean())


@functools.cache
def real_features(name: str, seed: int):
    """As many real ones as there are samples."""
    generator = torch.Generator().manual_seed(500 + seed)
    if name == "shapes":
        return shapes_lcm.features(shapes.real(1024, generator)[0], shapes_parts()[1])
    everything = pretrain_edm.data_of("patches" if name == "patches" else "digits_edm", "all").flatten(1)
    return everything[torch.randint(len(everything), (SAMPLES,), generator=generator)]


@torch.no_grad()
def network_run(name: str, solver: str, seed: int) -> dict:
    torch.set_num_threads(1)
    found = {"world": name, "solver": solver, "seed": seed, "distance": {}, "oracle": {}}
    world = name.split(",")[0]
    for share in SHARES:
        skipped = round(share * STEPS[world])
        if world == "shapes":
            samples, found["oracle"][f"{share:g}"] = shapes_samples(solver, skipped, seed, name == "shapes")
        elif name == "digits":
            samples = digits_samples(solver, skipped, seed)
        else:
            samples = edm_samples(name, solver, skipped, seed)
        found["distance"][f"{share:g}"] = float(frechet_distance(samples, real_features(world, seed)))
    return found


# Verdict --------------------------------------------------------------------------------------------------------------


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(network_run, name, solver, seed)
                for name in reversed(NETWORKS) for solver in NETWORKS[name] for seed in range(SEEDS)]  # fmt: skip
        jobs += [pool.submit(exact_run, seed) for seed in range(SEEDS)]
        return verdict([job.result() for job in jobs])


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""
    exact = [r for r in runs if r["world"] == "exact"]

    def of(part: str, key: str) -> list[float]:
        return [r[part][key] for r in exact]

    share = sum(of("budget", "9, 2.5")) / sum(of("budget", "9, 80"))
    free = paired_difference(of("dropped", "8"), of("dropped", "0"))
    dear = paired_difference(of("dropped", "11"), of("dropped", "0"))
    turn = paired_difference(of("budget", "35, 0.5"), of("budget", "35, 2.5"))
    starts = {level: sum(of("start", f"teleport, {level}")) / sum(of("start", f"isotropic, {level}"))
              for level in ("1", "2.5", "10")}  # fmt: skip
    bars = [
        bar("exact digits, 9 evaluations: Frechet distance, jump to 2.5 over none", share, "< 0.1", share < 0.1),
        bar("exact digits, 18 points: cost of dropping 8 (19 evaluations, not 35)", free, "< 0.02", free.mean < 0.02),
        bar("exact digits, 18 points: cost of dropping 11", dear, "> 0.1", dear.mean > 0.1),
        bar("exact digits, 35 evaluations: jump to 0.5 minus jump to 2.5", turn, "> 2 s.e.",
            turn.mean > 2 * turn.standard_error),
        bar("exact digits, start at 1: teleport over isotropic", starts["1"], "< 0.3", starts["1"] < 0.3),
        bar("exact digits, start at 2.5: teleport over isotropic", starts["2.5"], "< 1", starts["2.5"] < 1),
        bar("null: start at 10: teleport over isotropic", starts["10"], "< 0.9", starts["10"] < 0.9, claimed=False),
    ]  # fmt: skip
    table = {}
    for name, solvers in NETWORKS.items():
        for solver in solvers:
            mine = [r for r in runs if r["world"] == name and r["solver"] == solver]
            none = [r["distance"]["0"] for r in mine]
            error = float(torch.tensor(none).std())  # of one measured distance
            for skipped in ("0.15", "0.3", "0.5"):
                cost = paired_difference([r["distance"][skipped] for r in mine], none)
                bars.append(bar(
                    f"{name}, {solver}: cost of skipping {float(skipped):.0%} of the steps", cost, f"<= {error:.3g}",
                    cost.mean <= error, claimed=skipped != "0.5" and "," not in name,
                ))  # fmt: skip
            table[f"{name}, {solver}"] = {
                f"{float(k):.0%}": str(mean_ci([r["distance"][k] for r in mine])) for k in mine[0]["distance"]
            }
            if mine[0]["oracle"]:
                table[f"{name}, {solver}, oracle"] = {
                    f"{float(k):.0%}": str(mean_ci([r["oracle"][k] for r in mine])) for k in mine[0]["oracle"]
                }
    for part in ("budget", "dropped", "start"):
        table[f"exact, {part}"] = {key: str(mean_ci(of(part, key))) for key in exact[0][part]}
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Teleportation", "verdict": "replicates" if passed else "does not replicate in miniature",
        "seeds": SEEDS, "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
