"""DiffusionNFT: online reinforcement with the forward process (Zheng et al., 2025, arXiv 2509.16117).

Flow-GRPO needs an SDE and the density of its steps. DiffusionNFT needs neither: draw samples with any sampler, noise
them again, and regress a velocity. The rewards say how far each sample is a good one (r) and how far a bad one (1 - r);
good ones pull the velocity towards themselves, bad ones pull its mirror image, through the same network.

    r = 1/2 + clip((R - mean_prompt) / Z, -1, 1) / 2                                        optimality
    v+ = (1 - b) v_old + b v_theta,  v- = (1 + b) v_old - b v_theta                         implicit_velocities
    r |v+ - v|^2 + (1 - r) |v- - v|^2 at x_t = (1 - t) x_0 + t noise, v = noise - x_0       contrastive_loss
    optimum v_old + (2 / b) Cov(r, v | x_t)                                                 the tests
    theta_old <- eta theta_old + (1 - eta) theta after each round                           Old.follow

The paper writes velocities. Its code compares the denoised guesses x_t - t v, each error divided by its own size
without gradient (weighting="adaptive"); "none" is the paper's equation. As in the code, samples are drawn from v_old by
the ODE, without guidance, and a weight of 1e-4 holds v_theta to the base. `negative=False` leaves the second term out:
the paper's control, which collapses there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels import at_least_float32, expand_as, group_advantages, means, squared_error
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.rewards import checked
from minialign.settings import Count, Fraction, Limit, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 60  # rounds of: draw, score, update
    num_prompts: Count = 12  # drawn per round, over all processes (paper: 48)
    group_size: Count = 16  # samples of each (paper: 24)
    num_minibatches: Count = 2  # optimizer steps per round
    num_levels: Count | None = None  # of the sampler's t that each sample is noised to, drawn; None: all but one
    levels_per_pass: Count = 4  # per network call: memory against speed, never the result
    strength: Positive = 1.0  # b: the smaller, the further the optimum is from v_old (paper: 1 or .1)
    spread: Positive = 5.0  # Z in standard deviations of all centred rewards; within it r is linear
    negative: bool = True  # the term of v-
    weighting: Literal["adaptive", "none"] = "adaptive"  # of the denoised errors (code); of velocities (paper)
    old_rate: NonNegative = 0.001  # eta rises by so much a round ...
    old_limit: Fraction = 0.5  # ... up to this; 0: v_old is the model as it is
    beta: NonNegative = 1e-4  # weight of |v_theta - v_ref|^2
    learning_rate: NonNegative = 3e-4  # AdamW
    warmup_updates: Natural = 0  # over which the learning rate rises
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


def optimality(
    rewards: Float[Tensor, "batch"], group: Int[Tensor, "batch"], spread: float | int
) -> Float[Tensor, "batch"]:
    """r in [0, 1]: 1/2 + clip((R - mean_group) / (spread std), -1, 1) / 2, std of all centred rewards (population).

    A group of one, or of equal rewards, gives 1/2, which trains nothing.
    """
    centred = group_advantages(rewards, group, scale=False)
    scale = spread * centred.square().mean().sqrt() + 1e-6
    return 0.5 + 0.5 * (centred / scale).clamp(-1, 1)


def implicit_velocities(
    velocity: Float[Tensor, "b *dims"], old: Float[Tensor, "b *dims"], strength: float | int
) -> tuple[Float[Tensor, "b *dims"], Float[Tensor, "b *dims"]]:
    """(v+, v-): v_old moved towards v_theta by b, and by -b; their mean is v_old. `old` is data."""
    old = old.detach()
    return old + strength * (velocity - old), old - strength * (velocity - old)


def contrastive_loss(
    velocity: Float[Tensor, "b *dims"],
    old: Float[Tensor, "b *dims"],
    states: Float[Tensor, "b *dims"],
    t: Float[Tensor, "b"],
    denoised: Float[Tensor, "b *dims"],
    noise: Float[Tensor, "b *dims"],
    r: Float[Tensor, "b"],
    strength: float | int,
    weighting: str = "none",
    negative: bool = True,
) -> Float[Tensor, "b"]:
    """r |v+ - v|^2 + (1 - r) |v- - v|^2, a mean over elements; denoised is x_0, so that v = noise - x_0.

    "adaptive": of the guesses x_t - t v+-, each squared error over its own mean absolute error, times 5 / b.
    """
    plus, minus = implicit_velocities(at_least_float32(velocity), at_least_float32(old), strength)
    if weighting == "none":
        errors = [squared_error(v, noise - denoised, "mean") for v in (plus, minus)]
    else:
        guesses = [states - expand_as(t, states) * v for v in (plus, minus)]
        sizes = [(guess - denoised).abs().flatten(1).mean(1).detach().clamp_min(1e-5) for guess in guesses]
        errors = [
            5 / strength * squared_error(guess, denoised, "mean") / size
            for guess, size in zip(guesses, sizes, strict=True)
        ]
    return r * errors[0] + (1 - r) * errors[1] * negative


class Old:
    """theta_old: a copy of what trains, used in its place inside `weights()`, and saved with the checkpoint."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters, self.values = parameters, [p.detach().clone() for p in parameters]

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The network is v_old inside, without gradient."""
        current = [p.data for p in self.parameters]
        try:
            for p, value in zip(self.parameters, self.values, strict=True):
                p.data = value
            with torch.no_grad():
                yield
        finally:
            for p, value in zip(self.parameters, current, strict=True):
                p.data = value

    def follow(self, keep: float) -> None:
        """theta_old <- keep theta_old + (1 - keep) theta."""
        for p, value in zip(self.parameters, self.values, strict=True):
            value.lerp_(p.detach(), 1 - keep)

    def tensors(self) -> dict[str, Tensor]:
        return {str(i): value for i, value in enumerate(self.values)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, value in enumerate(self.values):
            value.copy_(tensors[str(i)])


def level_loss(policy, old: Old, latents, condition, levels: Tensor, noise: Tensor, r: Tensor, config: Config):
    """Loss and metrics of clean `latents` (n, *latent) at `levels` (n, k), with `noise` (n, k, *latent), one call."""
    k = levels.shape[1]
    t, eps = levels.flatten(), noise.flatten(0, 1)
    clean, each = latents.repeat_interleave(k, 0), condition[torch.arange(len(latents)).repeat_interleave(k)]
    states = policy.corrupt(clean, t, eps)
    with old.weights():
        velocity_old = policy.velocity(states, t, each)
    velocity = policy.velocity(states, t, each)
    loss = contrastive_loss(
        velocity, velocity_old, states, t, clean, eps, r.repeat_interleave(k), config.strength, config.weighting,
        config.negative,
    )  # fmt: skip
    info = {"moved": squared_error(velocity.detach(), velocity_old, "mean")}
    if config.beta:
        held = squared_error(velocity, policy.velocity(states, t, each, reference=True), "mean")
        loss, info = loss + config.beta * held, info | {"held": held.detach()}
    return loss.mean(), means(info)


def check(policy, prompts, config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "velocity")
    if config.group_size < 2:
        raise ValueError("group_size is 1: a group of one is its own mean, and every r 1/2. Use at least 2.")
    if config.num_minibatches > config.num_prompts * config.group_size:
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {config.num_prompts * config.group_size} "
            "samples of a round."
        )
    if config.num_levels is not None and config.num_levels > policy.num_steps:
        raise ValueError(f"num_levels is {config.num_levels}; the sampler's grid has {policy.num_steps}.")
    policy.encode(prompts)


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, a FlowPolicy, in place; prompts from `prompts`; a `Step` a round.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process draws and differentiates its own share of every round.
    """
    check(policy, prompts, config)
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    old = Old(parameters)
    run = Run(config, optimizer, generator, resume, [policy], old=old, reward=reward)
    num_levels = config.num_levels or max(1, policy.num_steps - 1)
    for number in run.rounds():
        batch = run.draw(prompts, config.num_prompts, config.group_size)
        with old.weights():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            condition = policy.encode(batch.own_prompts)
            latents = policy.integrate(noise[:, 0], condition)
            rewards = batch.gather(checked(reward, policy.decode(latents), batch.own_prompts))
            r = optimality(rewards, batch.group, config.spread)[batch.own]

        places = torch.rand(len(batch), policy.num_steps, generator=run.generator).argsort(1)[:, :num_levels]
        levels = policy.levels[places.to(policy.device)][batch.own]
        noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)[:, 1 : 1 + num_levels]
        for mini in run.minibatches(len(batch), config.num_minibatches, batch.own):
            for k in torch.arange(num_levels).split(config.levels_per_pass) if len(mini.rows) else ():
                rows = mini.rows
                part = condition[rows], levels[rows][:, k], noise[rows][:, k], r[rows]
                loss, info = level_loss(policy, old, latents[rows], *part, config)
                run.backward(loss, info, mini.share * len(k) / num_levels)
            run.update()
        old.follow(min(config.old_rate * (number + 1), config.old_limit))

        yield run.step(reward_metrics(rewards), reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """S forward passes of the round's rows; of each noised sample one of v_old, one of the base, and a backward one."""
    rows, levels = config.num_prompts * config.group_size, config.num_levels or max(1, policy.num_steps - 1)
    passes = [min(config.levels_per_pass, levels - first) for first in range(0, levels, config.levels_per_pass)]
    backward = [rows // config.num_minibatches * k for k in passes] * config.num_minibatches
    return {"forward": [rows] * policy.num_steps + backward * (2 if config.beta else 1), "backward": backward}
