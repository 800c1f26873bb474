"""What `minialign run` measures before and after, and the pictures that it makes of it, by kind of policy.

`policy_trial` serves every method that trains a policy on rewards, `sampler_trial` every method that draws faster.
A method that is neither makes a `Trial` of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minialign import measure, show
from minialign.rewards import checked, checked_set

EVALUATION_SAMPLES = 512
KL_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `minialign run` does with a method in a world.

    before(), after(): dicts of what is measured; `labels` names the numbers among it that are printed and kept, in that
    order, and the rest is for the pictures. "oracle_scores" (n,) in both are compared in pairs. columns: what the two
    are called. steps(generator, resume): the training in between, `total` iterations; None where nothing is trained.
    draw(before, after, rows, folder, title): before_after.png, and curves.png where there are curves; rows are those of
    metrics.csv. save(folder): what was trained.
    """

    before: Callable[[], dict[str, Any]]
    after: Callable[[], dict[str, Any]]
    labels: Mapping[str, str]
    draw: Callable[[dict, dict, list[dict], Path, str], None]
    columns: tuple[str, str] = ("before", "after")
    steps: Callable[..., Iterator] | None = None
    total: int = 0
    save: Callable[[Path], None] = field(default=lambda folder: None)


# Policies trained on rewards ------------------------------------------------------------------------------------------


def policy_trial(
    world,
    rewards: Mapping[str, Callable],
    seed: int,
    steps: Callable[..., Iterator],
    total: int,
    shaped: bool = False,
    of_sets: bool = False,
) -> Trial:
    """The world's policy before and after training on `rewards`, by name, from the same noise.

    shaped: it is trained on a reward made from these, so that the curve of training has another scale. of_sets: they
    are rewards of a set, of all that is drawn here.
    """
    judge = checked_set if of_sets else checked
    levels = {name: partial(judge, reward) for name, reward in rewards.items()}
    talks = hasattr(world.policy, "generate")
    evaluate = evaluate_texts if talks else evaluate_samples

    def measured() -> dict[str, Any]:
        spent = world.policy.network_evaluations
        with torch.no_grad():
            result = evaluate(world, levels, seed)
        world.policy.network_evaluations = spent  # not charged to training
        return result

    def draw(before: dict, after: dict, rows: list[dict], folder: Path, title: str) -> None:
        before_after(world, before, after, folder / "before_after.png", title)
        if rows:
            figure = training_curve(rows, None if shaped else before["reward"])
            show.save(figure, folder / "curves.png", "over training")

    several = {f"reward_{i}": f"reward {name!r}" for i, name in enumerate(rewards)} if len(rewards) > 1 else {}
    labels = {
        "reward": "sum of the rewards" if several else "reward",
        **several,
        "oracle": "oracle accuracy" if world.oracle_scale == "binary" else "oracle (gold reward)",
        "oracle_held_out": "oracle, held-out prompts",
        "diversity": "distinct word pairs" if talks else "diversity",
        "kl": f"KL to base (nats a {'response' if talks else 'path'})",
    }
    return Trial(
        before=measured, after=measured, labels=labels, draw=draw, steps=steps, total=total,
        save=world.policy.save_adapter,
    )  # fmt: skip


def in_turn(prompts: list, n: int = 0) -> list:
    """n of the prompts, one after the other, from the first again when all have had their turn."""
    return [prompts[i % len(prompts)] for i in range(n or EVALUATION_SAMPLES)]


def scored(world, levels: Mapping[str, Callable], samples, prompts: list) -> dict[str, Any]:
    """What any samples score: the oracle, each reward (checked), and their sum."""
    means = [float(level(samples, prompts).mean()) for level in levels.values()]
    scores = checked(world.oracle, samples, prompts)
    several = {f"reward_{i}": mean for i, mean in enumerate(means)} if len(means) > 1 else {}
    return {
        "samples": samples, "prompts": prompts, "oracle_scores": scores, "oracle": float(scores.mean()),
        "reward": sum(means), **several,
    }  # fmt: skip


def evaluate_samples(world, levels: Mapping[str, Callable], seed: int) -> dict[str, Any]:
    """Samples of a policy that denoises for the world's prompts from fixed noise, and what they score."""
    policy, generator = world.policy, torch.Generator().manual_seed(10_000 + seed)
    prompts = in_turn(world.prompts)
    samples = policy.sample(prompts, policy.draw_noise(len(prompts), generator))
    noise = policy.draw_noise(KL_SAMPLES, generator)
    result = scored(world, levels, samples, prompts)
    result["diversity"] = float(measure.diversity(samples, prompts, reduction="mean"))
    if hasattr(policy, "noise_kl"):  # the path behind the noise is the base's own
        result["kl"] = float(policy.noise_kl(policy.rows(prompts), "sum").mean())
    else:
        result["kl"] = float(measure.kl_to_base(policy, policy.rollout(prompts[:KL_SAMPLES], noise)))
    if world.held_out:
        prompts = in_turn(world.held_out)
        samples = policy.sample(prompts, policy.draw_noise(len(prompts), generator))
        result["oracle_held_out"] = float(checked(world.oracle, samples, prompts).mean())
    return result


def evaluate_texts(world, levels: Mapping[str, Callable], seed: int) -> dict[str, Any]:
    """The same of a policy that answers; diversity is the share of different word pairs among all."""
    policy, generator = world.policy, torch.Generator().manual_seed(10_000 + seed)
    prompts = in_turn(world.prompts)
    responses = policy.generate(prompts, world.num_tokens, generator=generator)
    log_ratio = policy.log_probs(responses) - policy.log_probs(responses, reference=True)
    result = scored(world, levels, responses.texts, prompts)
    result["diversity"] = measure.distinct(responses.texts, 2)
    result["kl"] = float(log_ratio.sum(1).mean())
    if world.held_out:
        prompts = in_turn(world.held_out)
        texts = policy.sample(prompts, num_tokens=world.num_tokens, generator=generator)
        result["oracle_held_out"] = float(checked(world.oracle, texts, prompts).mean())
    return result


def before_after(
    world, before: dict, after: dict, path: Path, title: str, columns: tuple[str, str] = ("before", "after")
) -> None:
    """Texts or images side by side; of points, which have no sides, those of after."""
    parts = [side[key] for key in ("samples", "oracle_scores") for side in (before, after)]
    parts.insert(2, before["prompts"])
    if isinstance(before["samples"], list):
        show.before_after_texts(*parts, path, labels=columns, title=title, score_name="gold")
    elif before["samples"].ndim == 4:
        show.before_after(*parts, path, labels=columns, title=title)
    else:
        show.save(world.show(after["samples"], after["prompts"]), path, f"samples, {columns[1]}")


def training_curve(rows: list[dict], baseline: float | None):
    """Of the reward; where no sample is drawn in training, of the share of pairs that are ordered as labelled."""
    if "reward" not in rows[0]:
        return show.curves(
            {"accuracy": [row["accuracy"] for row in rows]}, [row["comparisons"] for row in rows],
            xlabel="comparisons", ylabel="pairs ordered as labelled", baseline=0.5, title="Accuracy over training",
        )  # fmt: skip
    queries = [row["reward_queries"] for row in rows]
    return show.curves(
        {"reward": [row["reward"] for row in rows]}, queries, xlabel="reward queries",
        ylabel="mean reward of the round", baseline=baseline, title="Reward over training",
    )  # fmt: skip


# Samplers at equal network evaluations --------------------------------------------------------------------------------


def sampler_trial(
    world,
    before: Callable[[int, list, torch.Generator], Tensor],
    after: Callable[[int, list, torch.Generator], Tensor],
    budgets: tuple[int, ...],
    seed: int,
    columns: tuple[str, str],
    **training,
) -> Trial:
    """Two ways to draw from the world's policy, at equal network evaluations a sample.

    before, after: (evaluations, prompts, generator) -> states (n, *latent), from the same noise. Measured at each of
    `budgets`: the Frechet distance of the states to as many real ones, and the oracle. training: steps, total, save.
    """

    def measured(draw: Callable) -> dict[str, Any]:
        real, prompts = world.real(EVALUATION_SAMPLES, torch.Generator().manual_seed(20_000 + seed))
        real, result = world.encode(real).flatten(1), {"prompts": prompts, "budgets": budgets}
        for budget in sorted(budgets, reverse=True):  # the samples that are shown are those of the smallest
            with torch.no_grad():
                states = draw(budget, prompts, torch.Generator().manual_seed(10_000 + seed))
                samples = world.policy.decode(states)
            result[f"distance_{budget}"] = float(measure.frechet_distance(states.flatten(1), real))
            scores = checked(world.oracle, samples, prompts)
            result |= {f"oracle_{budget}": float(scores.mean()), "samples": samples, "oracle_scores": scores}
        return result

    def draw_pictures(a: dict, b: dict, rows: list[dict], folder: Path, title: str) -> None:
        before_after(world, a, b, folder / "before_after.png", f"{title}: {min(budgets)} evaluations", columns)
        order = sorted(budgets)
        curves = {name: [side[f"distance_{n}"] for n in order] for name, side in zip(columns, (a, b), strict=True)}
        figure = show.curves(
            curves, order, xlabel="network evaluations a sample", ylabel="Frechet distance to real data", title=title
        )
        show.save(figure, folder / "curves.png", "quality at equal network evaluations")

    labels = {f"distance_{n}": f"Frechet distance, {n} calls" for n in budgets}
    labels |= {f"oracle_{n}": f"oracle, {n} calls" for n in budgets}
    return Trial(
        before=lambda: measured(before), after=lambda: measured(after), labels=labels, draw=draw_pictures,
        columns=columns, **training,
    )  # fmt: skip


def from_pure_noise(scheduler):
    """A copy whose grids begin at the noisiest timestep, however few their steps; "leading" ones start half-way."""
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


def walk(policy, scheduler, states: Tensor, prompts: list) -> Tensor:
    """The loop of every diffusers pipeline: a policy's network under a scheduler whose timesteps are set."""
    condition = policy.encode(prompts)
    for t in scheduler.timesteps:
        output = policy.output_at(scheduler.scale_model_input(states, t), t.expand(len(states)), condition)
        states = scheduler.step(output, t, states).prev_sample
    return states
