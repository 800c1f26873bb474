"""Consistency distillation (Song et al., 2023, arXiv 2303.01469), as latent consistency models do it (Luo et al., 2023,
arXiv 2310.04378).

A diffusion model's probability-flow ODE carries each noisy point to one clean point. The student learns that map whole:
one step of the ODE with the frozen teacher must not change its answer. With f(x, 0) = x the answers are tied to the
data; without that boundary, or with the target's time wrong, any constant would do.

    x_t = sqrt(a) x_0 + sqrt(1 - a) noise, t on the solver's grid                      solver_grid, of the LCMScheduler
    e_u + g (e_c - e_u), g ~ U(low, high): the guided teacher                          guided_condition
    x_{t'} = sqrt(a') x_0_hat + sqrt(1 - a') noise_hat: one DDIM step of the teacher   ddim_jump
    d(f_theta(x_t, t), f_ema(x_{t'}, t')), no gradient in the second                   distillation_loss
    theta_ema <- decay theta_ema + (1 - decay) theta                                   EMA

As in diffusers' training script: the DDIM step goes from timestep to timestep without correction, and the grid's last
step ends at timestep 0. As in neither code nor paper: guidance ranges are given in diffusers' convention g (the papers'
w is g - 1), so (1, 1) is no guidance at all.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from minialign.evaluate import Trial, from_pure_noise, sampler_trial, walk
from minialign.kernels import at_least_float32, expand_as, predict
from minialign.loop import Run, Step, num_processes, own_rows
from minialign.settings import Count, Fraction, Limit, NonNegative, Number, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 4000  # optimizer steps
    batch_size: Count = 256
    metric: Literal["l2", "huber"] = "l2"  # squared error, mean over elements; sqrt(d^2 + c^2) - c
    huber_c: Positive = 0.001
    guidance_range: tuple[Number, Number] = (1.0, 1.0)  # of g, drawn for each sample; needs a guided teacher
    ema_decay: Fraction = 0.95  # of the target network
    learning_rate: NonNegative = 2e-3  # AdamW, cosine to zero (LCM: 1e-4, constant)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Limit = 1.0  # l2


def solver_grid(solver_steps: int, num_train_timesteps: int = 1000) -> tuple[Tensor, Tensor]:
    """(t, t') of every step of the solver, each (solver_steps,): 19 -> 0, 39 -> 19, ..., 999 -> 979 for fifty steps."""
    stride = num_train_timesteps // solver_steps
    timesteps = stride * torch.arange(1, solver_steps + 1) - 1
    return timesteps, (timesteps - stride).clamp_min(0)


def ddim_jump(
    output: Float[Tensor, "b *dims"],
    states: Float[Tensor, "b *dims"],
    alpha_bar: Float[Tensor, "b"],
    alpha_bar_next: Float[Tensor, "b"],
    prediction_type: str = "epsilon",
) -> Float[Tensor, "b *dims"]:
    """One DDIM step (Song et al., 2021, eq. 12) at sigma = 0: sqrt(a') denoised + sqrt(1 - a') noise_pred.

    Exact where the noise prediction is constant along the way; else off by what twenty timesteps in one leave.
    """
    denoised, noise_pred = predict(at_least_float32(output), at_least_float32(states), alpha_bar, prediction_type)
    return (
        expand_as(alpha_bar_next.sqrt(), states) * denoised
        + expand_as((1 - alpha_bar_next).sqrt(), states) * noise_pred
    )


def distance(
    prediction: Float[Tensor, "b *dims"], target: Float[Tensor, "b *dims"], metric: str = "l2", huber_c: float = 0.001
) -> Float[Tensor, ""]:
    """How far two answers are apart: mean over elements, in float32 at least."""
    squared = (at_least_float32(prediction) - at_least_float32(target)).square()
    return squared.mean() if metric == "l2" else ((squared + huber_c**2).sqrt() - huber_c).mean()


class EMA:
    """A copy of a policy whose weights follow it: an exponential moving average, saved with the run."""

    def __init__(self, policy, decay: float):
        self.policy, self.decay = copy.copy(policy), decay
        self.policy.network = copy.deepcopy(policy.network).requires_grad_(False)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """All weights at once; buffers do not change."""
        targets, students = list(self.policy.network.parameters()), [p.detach() for p in student.parameters()]
        torch._foreach_lerp_(targets, students, 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}": p.detach() for i, p in enumerate(self.policy.network.parameters())}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, p in enumerate(self.policy.network.parameters()):
            p.data.copy_(tensors[f"{i}"])


def guided_condition(policy, teacher, prompts: list, own: Tensor, config: Config, generator: torch.Generator):
    """(the student's condition, the teacher's, g) of rows `own`: g drawn from the range, 1 if that is (1, 1)."""
    low, high = config.guidance_range
    own_prompts = [prompts[i] for i in own.tolist()]
    condition = policy.encode(own_prompts)
    if low == high == 1:
        return condition, teacher.encode(own_prompts, guided=False), 1.0
    scale = low + (high - low) * torch.rand(len(prompts), generator=generator).to(policy.device)[own]
    return policy.with_guidance(condition, scale), teacher.encode(own_prompts, guided=True), scale


def distillation_loss(
    policy, target, teacher, latents: Tensor, prompts: list[str], config: Config, generator: torch.Generator
) -> Tensor:
    """The loss of this process's rows of a batch, which is drawn whole. latents (n, *latent) are data."""
    solver_steps = policy.scheduler.config.original_inference_steps
    grid, grid_next = (t.to(policy.device) for t in solver_grid(solver_steps))
    alpha_bar = teacher.scheduler.alphas_cumprod.to(policy.device, latents.dtype)
    n = torch.randint(solver_steps, (len(latents),), generator=generator).to(policy.device)
    noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype).to(policy.device)
    own = own_rows(len(latents), policy.device)
    t, t_next, latents, noise = grid[n][own], grid_next[n][own], latents[own], noise[own]
    states = policy.corrupt(latents, t, noise)
    condition, condition_teacher, scale = guided_condition(policy, teacher, prompts, own, config, generator)
    prediction = policy.denoise(states, t, condition)
    with torch.no_grad():
        output = teacher.output_at(states, t, condition_teacher, guidance_scale=scale)
        states_next = ddim_jump(
            output, states, alpha_bar[t], alpha_bar[t_next], teacher.scheduler.config.prediction_type
        )
        answer = target.denoise(states_next, t_next, condition)  # its own point, at its own time
    return distance(prediction, answer, config.metric, config.huber_c)


def check(policy, teacher, config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    if config.batch_size < num_processes():
        raise ValueError(
            f"batch_size is {config.batch_size} for {num_processes()} processes; each needs a sample: raise it."
        )
    low, high = config.guidance_range
    if not low <= high:
        raise ValueError(f"guidance_range is ({low}, {high}); expected (lowest g, highest g), (1, 1) for no guidance.")
    if low < high and not policy.guidance_dim:
        raise ValueError(
            f"guidance_range is ({low}, {high}), but the student's network cannot be told the scale: make it with "
            "ConsistencyPolicy.from_diffusion(teacher, guidance_dim=256), or fix the scale with (g, g)."
        )
    if policy.scheduler.config.prediction_type != teacher.scheduler.config.prediction_type:
        raise ValueError("student and teacher have schedulers of different prediction_type; they share one network.")


def train(
    policy,
    teacher,
    data: Callable[[int, torch.Generator], tuple[Tensor, list[str]]],
    config: Config = Config(),
    generator: torch.Generator | None = None,
    resume=None,
) -> Iterator[Step]:
    """Trains the consistency `policy` in place to jump where `teacher`'s ODE leads; yields a `Step` an update.

    data(n, generator) -> (latents (n, *latent), prompts): where the noise is put on. generator: a CPU torch.Generator
    (seed 0 if None). Network evaluations are the student's, the target's and the teacher's together.
    """
    check(policy, teacher, config)
    policy.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    target = EMA(policy, config.ema_decay)
    run = Run(config, optimizer, generator, resume, [policy, target.policy, teacher], target=target)
    for number in run.rounds():
        latents, prompts = data(config.batch_size, run.generator)
        loss = distillation_loss(policy, target.policy, teacher, latents, prompts, config, run.generator)
        run.backward(loss, {"loss": loss}, len(own_rows(len(latents))) / len(latents))
        run.update((1 + math.cos(math.pi * number / config.num_iterations)) / 2)
        target.update(policy.network)
        yield run.step({})
    policy.network.requires_grad_(False)


# On the command line ------------------------------------------------------------------------------------------------

CALLS = (1, 2, 4, 8)  # network evaluations a sample, at which student and teacher are compared


def states_of(world) -> Callable[[int, torch.Generator], tuple[Tensor, list]]:
    """data(n, generator) of a world's real samples, as its policies' states."""

    def data(n: int, generator: torch.Generator) -> tuple[Tensor, list]:
        samples, prompts = world.real(n, generator)
        return world.encode(samples), prompts

    return data


def trial(world, config: Config, seed: int) -> Trial:
    """The teacher's deterministic sampler (DDIM) and the student's, at equal network evaluations."""
    from minialign.policies.consistency import ConsistencyPolicy

    teacher, student = world.policy, ConsistencyPolicy.from_diffusion(world.policy)

    def in_steps(num_steps: int, prompts: list, generator: torch.Generator) -> Tensor:
        scheduler = from_pure_noise(teacher.scheduler)
        scheduler.set_timesteps(num_steps)
        return walk(teacher, scheduler, teacher.draw_noise(len(prompts), generator)[:, 0], prompts)

    def in_jumps(num_steps: int, prompts: list, generator: torch.Generator) -> Tensor:
        student.set_num_steps(num_steps)
        return student.rollout(prompts, student.draw_noise(len(prompts), generator), density=False).final

    def steps(generator: torch.Generator, resume=None) -> Iterator[Step]:
        return train(student, teacher, states_of(world), config, generator, resume)

    def save(folder) -> None:
        weights = {name: tensor.contiguous() for name, tensor in student.network.state_dict().items()}
        save_file(weights, folder / "student.safetensors")

    return sampler_trial(
        world, in_steps, in_jumps, CALLS, seed, ("teacher", "student"), steps=steps, total=config.num_iterations,
        save=save,
    )  # fmt: skip
