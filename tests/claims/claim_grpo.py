"""Group-relative policies of flows in miniature (Flow-GRPO, DanceGRPO, DiffusionNFT): data N(0, I) in the plane with
its exact velocity, reward -|x - (1.5, 0)|^2, 192 samples a round, 60 rounds; the ODE's 40-step sample is judged.

    Flow-GRPO, clip .2 and 1e-4; DanceGRPO's step; DiffusionNFT     every method learns, at equal reward queries
    rewards as they are (+ 12) instead of the group's advantage      the control without a baseline
    DiffusionNFT without its negative term                           its control
    groups of 2, 16 and 192; a of .3, .7 and 1.4; beta of .1         ablations, unclaimed

and in one dimension, where the optimum of the SDE policy under a KL is known: mean shift S / beta, S = Var(x_0 | x_T).

Run by `minialign replicate grpo`; tests/claims/test_claims.py runs a small part of it.
"""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from claim_b2diffurl import bar

from minialign import worlds
from minialign.exact import GaussianMixture
from minialign.measure import mean_ci, paired_difference
from minialign.methods import diffusion_nft, grpo
from minialign.policies.flow import FlowPolicy
from minialign.worlds.exact_denoiser import ExactVelocity, ResidualMLP

SEEDS = 5
ROUNDS, QUERIES = 60, 192
GRPO = dict(
    num_iterations=ROUNDS, num_prompts=1, group_size=QUERIES, clip_range=0.2, learning_rate=3e-3, steps_per_pass=9
)
NFT = diffusion_nft.Config(
    num_iterations=ROUNDS, num_prompts=1, group_size=QUERIES, learning_rate=3e-3, levels_per_pass=9, old_rate=0.5
)
DANCE = dict(noise_level=0.3, noise_schedule="constant", deterministic_last=True)
ARMS = {  # settings of the policy, of grpo
    "Flow-GRPO": ({}, {}),
    "Flow-GRPO, clip 1e-4": ({}, dict(clip_range=1e-4)),
    "DanceGRPO": (DANCE, dict(same_noise=True, trained_share=0.6)),
    "DiffusionNFT": ({}, NFT),
    "raw rewards": ({}, {}),
    "DiffusionNFT, no negative": ({}, NFT.__class__(**vars(NFT) | dict(negative=False))),
    "groups of 2": ({}, dict(num_prompts=QUERIES // 2, group_size=2)),
    "groups of 16": ({}, dict(num_prompts=QUERIES // 16, group_size=16)),
    "a = .3": (dict(noise_level=0.3), {}),
    "a = 1.4": (dict(noise_level=1.4), {}),
    "beta = .1": ({}, dict(beta=0.1)),
}
LEARN = ("Flow-GRPO", "Flow-GRPO, clip 1e-4", "DanceGRPO", "DiffusionNFT")
OPTIMUM = {"a = .7": (0.7, 0.852452), "a = sqrt 2": (math.sqrt(2), 1.011966)}
BETA = 2.0


def target(samples, prompts):
    return -(samples - torch.tensor([1.5, 0.0]).to(samples)).square().sum(1)


def plane(seed: int, **settings) -> FlowPolicy:
    """A perfect flow of N(0, I) in the plane, with a residual MLP (64, 64) that starts at zero."""
    torch.manual_seed(seed)
    network = ExactVelocity(GaussianMixture.isotropic(torch.zeros(1, 2), 1.0), ResidualMLP(2, 0, width=64))
    return FlowPolicy(network, latent_shape=(2,), **settings)


def plane_run(arm: str, seed: int, rounds: int = ROUNDS) -> dict:
    """Reward and variance of the ODE's samples after 0, 20 and all rounds, and what was spent by then."""
    torch.set_num_threads(1)
    settings, config = ARMS[arm]
    policy, generator = plane(seed, **settings), torch.Generator().manual_seed(seed)
    watch, seconds, trace = torch.Generator().manual_seed(1_000 + seed), 0.0, {}

    def look(number: int, step=None) -> None:
        spent = policy.network_evaluations
        x = policy.sample(["a point"] * 2000, generator=watch, num_steps=40)
        policy.network_evaluations = spent  # looking is not charged
        trace[str(number)] = {
            "reward": float(target(x, None).mean()), "variance": float(x.var(0).mean()),
            "network_evaluations": step.network_evaluations if step else 0,
            "queries": step.reward_queries if step else 0, "seconds": round(seconds, 2),
        }  # fmt: skip

    look(0)
    usual = grpo.advantages_of
    if arm == "raw rewards":  # no group mean and no std: the reward itself, made positive
        grpo.advantages_of = lambda rewards, *_: rewards + 12
    try:
        if arm.startswith("DiffusionNFT"):
            steps = diffusion_nft.train(policy, target, ["a point"], config, generator)
        else:
            steps = grpo.train(policy, target, ["a point"], grpo.Config(**GRPO | config), generator)
        for number, step in enumerate(steps, 1):
            seconds += step.seconds
            if number in (20, ROUNDS):
                look(number, step)
            if number == rounds:
                break
    finally:
        grpo.advantages_of = usual
    return {"arm": arm, "seed": seed, "trace": trace}


def optimum_run(name: str, seed: int) -> dict:
    """How far the mean moved under a KL of weight BETA, the average of the last 40 rounds."""
    torch.set_num_threads(1)
    world = worlds.load("line", model="flow", noise_level=OPTIMUM[name][0])
    world.policy.network.double()
    world.policy.to("cpu")
    config = grpo.Config(
        num_iterations=80, num_prompts=1, group_size=1024, num_minibatches=1, steps_per_pass=10, scale="none",
        train_last=True, reduction="sum", clip_range=1e9, beta=BETA, learning_rate=0.03, weight_decay=0.0,
        max_grad_norm=1e9,
    )  # fmt: skip
    path, reward = [], world.rewards["first_coordinate"]
    for _ in grpo.train(world.policy, reward, world.prompts, config, torch.Generator().manual_seed(seed)):
        path.append(world.policy.network.residual.theta.detach().clone())
    moved = world.sampler.mean_at(torch.stack(path[-40:]).mean(0)) - world.sampler.sample_mean
    return {"arm": name, "seed": seed, "shift": float(moved)}


def one(job: tuple[str, int]) -> dict:
    return (optimum_run if job[0] in OPTIMUM else plane_run)(*job)


def replicate() -> dict:
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(arm, seed) for arm in (*ARMS, *OPTIMUM) for seed in range(SEEDS)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return verdict(list(pool.map(one, jobs)))


def verdict(runs: list[dict]) -> dict:
    """The sheet's bars, from the raw results that are stored beside them."""

    def column(arm: str, number: int = ROUNDS, key: str = "reward") -> list[float]:
        return [r["trace"][str(number)][key] for r in runs if r["arm"] == arm]

    bars = []
    for arm in LEARN:
        gain = paired_difference(column(arm), column(arm, 0))
        bars.append(bar(f"(a) {arm}: reward gained in {ROUNDS} rounds", gain, "> 2.5", gain.mean > 2.5))
    for name, (_, shift) in OPTIMUM.items():
        ratio = mean_ci([r["shift"] / (shift / BETA) for r in runs if r["arm"] == name]).mean
        bars.append(bar(
            f"(b) {name}: mean shift over that of the exact optimum", float(ratio), "within 3 %", abs(ratio - 1) < 0.03
        ))  # fmt: skip
    lost = paired_difference(column("Flow-GRPO"), column("raw rewards"))
    bars.append(bar("(c) Flow-GRPO minus raw rewards", lost, "> 2 s.e.", lost.mean > 2 * lost.standard_error))
    lost = paired_difference(column("DiffusionNFT"), column("DiffusionNFT, no negative"))
    bars.append(bar("(d) DiffusionNFT minus no negative term", lost, "> 2 s.e.", lost.mean > 2 * lost.standard_error))
    faster = paired_difference(column("DiffusionNFT", 20), column("Flow-GRPO", 20))
    bars.append(bar(
        "DiffusionNFT minus Flow-GRPO after 20 rounds", faster, "> 0", faster.mean > 0, claimed=False
    ))  # fmt: skip
    for arm in ("groups of 2", "groups of 16"):
        gap = paired_difference(column(arm), column("Flow-GRPO"))
        bars.append(bar(f"{arm} minus one of {QUERIES}", gap, "< 0", gap.mean < 0, claimed=False))
    for arm in ("a = .3", "a = 1.4"):
        gap = paired_difference(column(arm, 20), column("Flow-GRPO", 20))
        bars.append(bar(f"{arm} minus a = .7, after 20 rounds", gap, "< 0", gap.mean < 0, claimed=False))
    kept = paired_difference(column("beta = .1", key="variance"), column("Flow-GRPO", key="variance"))
    bars.append(bar("variance kept by beta = .1, minus without", kept, "> 0", kept.mean > 0, claimed=False))
    table = {
        arm: {
            f"{key} at {number}": str(mean_ci(column(arm, number, key)))
            for number in (20, ROUNDS)
            for key in ("reward", "variance", "network_evaluations", "queries", "seconds")
        }
        for arm in ARMS
    }
    passed = all(b["passed"] for b in bars if b["claimed"])
    return {
        "name": "Flow-GRPO", "verdict": "replicates" if passed else "does not replicate in miniature", "seeds": SEEDS,
        "bars": bars, "table": table, "runs": runs,
    }  # fmt: skip
