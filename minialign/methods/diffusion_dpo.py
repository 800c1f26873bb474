"""Diffusion-DPO: direct preference optimisation of diffusion models (Wallace et al., 2023, arXiv 2311.12908).

People say which of two images is better. A reward model and RL could follow; DPO goes straight to the policy whose
implicit reward beta log(pi / pi_ref) explains the labels best. For a diffusion model log pi(x_0) is a sum over paths
that nobody can take; a bound on the path's log-ratio, with the forward process in the place of the reverse one, needs
only denoising errors. What is left is a logistic regression: raise how much better than the reference you denoise the
chosen image, over how much better you denoise the rejected one.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, one t and one eps a pair       policy.corrupt
    e = |eps_theta(x_t) - eps|^2, of both images, under theta and the reference   pair_errors
    u = -beta / 2 ((e_w - e_w^ref) - (e_l - e_l^ref)), eq. 14                     denoising_log_ratio
    -log sigmoid(u)                                                               dpo_loss

As in the official code, not the paper: one noise for both images of a pair (`shared_noise`; two of them attenuate what
is learned, as errors in variables do), the mean over elements, where eq. 14 has a sum (beta T omega there is beta / 2 D
here, D elements), no t-dependent weight. Errors are those of what the network predicts; `target` converts them.
As in neither: ties count half in the implicit accuracy, so that it starts at 1/2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import (
    denoising_log_ratio,
    dpo_loss,
    error_weight,
    hinge_loss,
    ipo_loss,
    pair_accuracy,
    soft_label_loss,
)
from minialign.loop import Run, Step, check_policy, num_processes, own_rows
from minialign.pairs import Pairs
from minialign.policies.noise import row_noise
from minialign.policies.trajectory import Condition
from minialign.settings import Count, Fraction, Limit, Natural, NonNegative, Positive, Settings, demand

PROMPTS_PER_CALL = 256  # of the text encoder, where all are tried before training


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 200  # optimizer steps (paper: 2000)
    batch_size: Count = 128  # pairs a step, over all processes (paper: 2048)
    pairs_per_pass: Count = 128  # in one network call: memory against speed, never the result
    beta: Positive = 100.0  # of mean errors (paper: 2000; SDXL 5000); in proportion to the number of elements
    loss: Literal["dpo", "ipo", "hinge", "sft"] = "dpo"  # "sft": the chosen images' error alone, the usual baseline
    label_smoothing: Fraction = 0.0  # probability that a label is wrong ("dpo": conservative DPO)
    shared_noise: bool = True  # one noise for both images of a pair (paper's text: two)
    target: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None  # whose errors; None: as predicted
    prompt_dropout: Fraction = 0.0  # share of pairs trained without their prompt, for guidance later (authors: .2)
    learning_rate: NonNegative = 3e-4  # AdamW (paper: 2.048e-5 for all weights)
    warmup_updates: Natural = 20  # over which it rises
    weight_decay: NonNegative = 0.0
    max_grad_norm: Limit = 1.0  # l2


class PairErrors(NamedTuple):
    """Squared denoising errors of the two images of n pairs, under the weights and under the reference, (n,) each."""

    chosen: Float[Tensor, "n"]
    rejected: Float[Tensor, "n"]
    chosen_reference: Float[Tensor, "n"]
    rejected_reference: Float[Tensor, "n"]

    @property
    def log_ratios(self) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """(chosen, rejected): what stands for log pi / pi_ref of each."""
        return (
            denoising_log_ratio(self.chosen, self.chosen_reference),
            denoising_log_ratio(self.rejected, self.rejected_reference),
        )

    def info(self) -> dict[str, Tensor]:
        """Metrics: both errors may rise while the loss falls, so they are told apart."""
        accuracy = pair_accuracy(*self.log_ratios)
        margin = self.log_ratios[0] - self.log_ratios[1]
        found = {"accuracy": accuracy, "margin": margin, "error_chosen": self.chosen, "error_rejected": self.rejected}
        return {name: value.detach().mean() for name, value in found.items()}


def pair_errors(
    policy,
    pairs: Pairs,
    condition: Condition,
    levels: Tensor,
    noise: tuple[Tensor, Tensor],
    *,
    reduction: Literal["mean", "sum"] = "mean",
    target: str | None = None,
) -> PairErrors:
    """Errors of n pairs at `levels` (n,), corrupted with (noise of the chosen, of the rejected), (n, *latent) each.

    One network call of 2 n rows, chosen first, and one under the reference. target: see `Config`. Limits: at the
    reference's weights the last two are the first two; the same noise and the same two images give equal errors.
    """
    latents, drawn = torch.cat([pairs.chosen, pairs.rejected]).to(policy.device), torch.cat(noise)
    both = torch.arange(len(levels), device=levels.device).repeat(2)  # [w; l]: never interleaved
    errors = denoising_errors(policy, latents, condition[both], levels[both], drawn, reduction, target)
    return PairErrors(*(part for error in errors for part in error.chunk(2)))


def denoising_errors(
    policy, latents: Tensor, condition: Condition, levels: Tensor, noise: Tensor, reduction: str, target: str | None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(errors under the weights, under the reference) of the same noisy samples, (n,) each."""
    weight = 1.0 if target is None else error_weight(policy.target, target, *policy.signal_and_noise(levels))
    given = latents, levels, noise, condition
    return tuple(
        weight * policy.training_error(*given, reduction=reduction, reference=reference) for reference in (False, True)
    )


def preference_loss(
    errors: PairErrors, config: Config, weight: Tensor | float = 1.0, label: Tensor | None = None
) -> Float[Tensor, "n"]:
    """The loss of each pair; weight (n,) scales its logit (SmPO), label (n,) is the chosen one's probability to win."""
    chosen, rejected = (weight * log_ratio for log_ratio in errors.log_ratios)
    if config.loss == "sft":
        return weight * errors.chosen
    if config.loss == "ipo":
        return ipo_loss(chosen, rejected, config.beta)
    logit = config.beta * (chosen - rejected)
    if config.loss == "hinge":
        return hinge_loss(logit)
    if config.label_smoothing or label is not None:
        return soft_label_loss(logit, torch.full_like(logit, 1 - config.label_smoothing) if label is None else label)
    return dpo_loss(chosen, rejected, config.beta)


def without_prompt(condition: Condition, dropped: Tensor) -> Condition:
    """A condition encoded with guided=True, its rows `dropped` (n,) bool as the network has them without a prompt.

    What does not depend on the prompt (an embedded guidance scale) stays.
    """
    inputs = dict(condition.inputs)
    for name, nothing in condition.unconditional.items():
        inputs[name] = torch.where(dropped.view(-1, *[1] * (nothing.ndim - 1)), nothing, inputs[name])
    return Condition(inputs, {}, condition.shared, condition.rows)


Noiser = Callable[..., Tensor]  # (policy, latents, levels, condition, noise) -> the noise that corrupts the latents


def train(
    policy,
    pairs: Pairs,
    config: Config = Config(),
    generator=None,
    resume=None,
    *,
    noiser: Noiser | None = None,
    levels: Callable[[int, torch.Generator], Tensor] | None = None,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    objective: Callable[..., Tensor] | None = None,
) -> Iterator[Step]:
    """Trains `policy` in place on labelled pairs of its states; yields a `Step` an update.

    Metrics: `loss`, `accuracy` of the implicit reward on the step's pairs, `margin`, and the errors of either image.
    The cost `comparisons` counts pairs trained on, again where they come again. Errors are unguided.
    What later papers change: noiser(policy, latents, levels, condition, noise) -> the noise to corrupt with (INPO's
    inversion), levels(n, generator) -> (n,) (PSO's few), weights (pairs,) on the logits (SmPO), labels (pairs,) in
    [0, 1] in the place of certain ones (cDPO, with loss "dpo"), objective in the place of `preference_loss` (PSO's).
    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process differentiates its own share of every batch.
    """
    check(policy, pairs, config, weights)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config, optimizer, generator, resume, [policy])
    n = min(config.batch_size, len(pairs))
    for _ in run.rounds():
        rows = torch.randperm(len(pairs), generator=run.generator)[:n]
        level = (levels or policy.draw_levels)(n, run.generator)
        dropped = (torch.rand(n, generator=run.generator) < config.prompt_dropout).to(policy.device)
        own = own_rows(n)
        shape = (1 if config.shared_noise else 2, *getattr(noiser, "noise_shape", ()), *policy.latent_shape)
        noise = row_noise("standard_normal", n, shape, policy.state_dtype, run.generator, own).to(policy.device)
        for part in torch.arange(len(own)).split(config.pairs_per_pass):
            here = own[part]
            batch, drawn = pairs[rows[here]], (noise[part, 0], noise[part, -1])
            condition = policy.encode(batch.prompts, guided=config.prompt_dropout > 0)
            if config.prompt_dropout:
                condition = without_prompt(condition, dropped[here.to(policy.device)])
            t = level[here.to(level.device)]
            if noiser is not None:
                latents = torch.cat([batch.chosen, batch.rejected]).to(policy.device)
                both = torch.arange(len(t), device=t.device).repeat(2)  # in one call, as `pair_errors` does
                drawn = noiser(policy, latents, t[both], condition[both], torch.cat(drawn)).chunk(2)
            errors = pair_errors(policy, batch, condition, t, drawn, target=config.target)
            weight = 1.0 if weights is None else weights[rows[here]].to(policy.device)
            label = None if labels is None else labels[rows[here]].to(policy.device)
            loss = (objective or preference_loss)(errors, config, weight, label).mean()
            run.backward(loss, {"loss": loss} | errors.info(), len(part) / n)
        run.update()
        yield run.step({}, comparisons=n)


def check(policy, pairs: Pairs, config: Config, weights: Tensor | None = None) -> None:
    """Raises ValueError for a policy, pairs or weights that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    if not isinstance(pairs, Pairs):
        raise ValueError(f"the data is a {type(pairs).__name__}; expected Pairs, as draw_pairs gives them.")
    pairs.check_finite()
    shape = tuple(pairs.chosen.shape[1:]) if isinstance(pairs.chosen, Tensor) else "texts"
    if shape != tuple(policy.latent_shape):
        raise ValueError(
            f"the pairs hold {shape}; this policy's states have shape {tuple(policy.latent_shape)}: encode images "
            "with its autoencoder before (Pairs.from_images(encode=...))."
        )
    if min(config.batch_size, len(pairs)) < num_processes():
        raise ValueError(
            f"a step has {min(config.batch_size, len(pairs))} of {len(pairs)} pairs, for {num_processes()} processes; "
            "each needs one: raise batch_size, bring more pairs, or start fewer processes."
        )
    if config.label_smoothing and config.loss != "dpo":
        raise ValueError(f"label_smoothing belongs to loss 'dpo', not {config.loss!r}: leave it at 0.")
    if weights is not None and (weights.shape != (len(pairs),) or not (weights >= 0).all()):
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected ({len(pairs)},), none below 0.")
    prompts = list(dict.fromkeys(pairs.prompts))
    for first in range(0, len(prompts), PROMPTS_PER_CALL):
        condition = policy.encode(prompts[first : first + PROMPTS_PER_CALL], guided=config.prompt_dropout > 0)
    if config.prompt_dropout and not condition.unconditional:
        raise ValueError(
            f"prompt_dropout is {config.prompt_dropout}, but this policy's network has no input that stands for no "
            "prompt: leave it at 0, or give class names a null_class."
        )


def implicit_reward(
    policy, latents: Tensor, prompts: list, config: Config = Config(), num_draws: int = 8, generator=None
) -> Float[Tensor, "n"]:
    """beta log pi / pi_ref of clean states (n, *latent), by its bound: a mean over num_draws levels and noises.

    Its accuracy on held-out pairs: `pair_accuracy` of both sides under the same generator's state.
    """
    demand(Count, num_draws=num_draws)
    condition, total, n = policy.encode(prompts, guided=False), 0.0, len(latents)
    with torch.no_grad():
        for _ in range(num_draws):
            level = policy.draw_levels(1, generator).expand(n)
            noise = torch.randn(policy.latent_shape, generator=generator, dtype=policy.state_dtype).to(policy.device)
            given = latents.to(policy.device), condition, level, noise.expand(n, *noise.shape)
            total = total + denoising_log_ratio(*denoising_errors(policy, *given, "mean", config.target))
    return config.beta * total / num_draws


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """Both images of each pair, once under the reference and once forward and backward."""
    n = config.batch_size
    parts = [2 * min(config.pairs_per_pass, n - first) for first in range(0, n, config.pairs_per_pass)]
    return {"forward": parts, "backward": parts}
