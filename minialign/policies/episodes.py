"""What tokens and denoising steps have in common: an episode is a row of actions, each with a log-probability.

    respond     a LanguagePolicy's responses: an action is a token
    denoise     a diffusion or consistency policy's trajectories: an action is a denoising step

A method that is written on `Episodes` trains either. The KL of a denoising step is here the log-ratio of the step
taken, (log p - log p_ref)(x_{t-1} | x_t), not the exact KL of the two Gaussians, though that has less noise: given the
state it does not depend on the action, so a step would not answer for its own KL, and the solution would be no tilt.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Episodes(NamedTuple):
    """One process's share of a round, an episode a row: b episodes of at most t actions, tokens or denoising steps.

    samples: what rewards take. log_probs, log_prob_ref, mask (b, t), sums over a latent's elements; values
    (b, t, N + 1) or None. `score(rows, places)` scores them again under the weights as they are then: (log_prob,
    values), (n, k); `places` lists which actions to put into one network call. num_elements: D, 1 for tokens.
    """

    samples: Tensor | Sequence[str]
    log_probs: Tensor
    log_prob_ref: Tensor
    mask: Tensor
    values: Tensor | None
    score: Callable
    places: Sequence[Tensor]
    num_elements: int


def respond(
    policy, prompts: list[str], noise: Tensor, num_tokens: int, temperature: float | int = 1.0, num_heads: int = 0
) -> Episodes:
    """Responses of a LanguagePolicy, at most `num_tokens` long; with the critic's values, if it is to have `num_heads`.

    Raises ValueError for a critic of another number of heads.
    """
    responses = policy.generate(prompts, num_tokens, noise=noise, temperature=temperature)

    def score(rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
        log_prob, values, _ = policy.score(responses[rows], values=num_heads > 0)
        return log_prob, values

    places = [torch.arange(responses.mask.shape[1], device=policy.device)]
    log_prob_ref = policy.log_probs(responses, reference=True)
    values = critic_values(policy, responses, num_heads) if num_heads else None
    return Episodes(responses.texts, responses.log_probs, log_prob_ref, responses.mask, values, score, places, 1)


def critic_values(policy, responses, num_heads: int) -> Tensor:
    """What a LanguagePolicy's critic expects before each token, (b, t, num_heads); ValueError for another number."""
    values = policy.values(responses)
    if values.shape[-1] != num_heads:
        raise ValueError(
            f"the critic has {values.shape[-1]} heads; this method needs {num_heads}: call "
            f"policy.add_value_heads({num_heads}) before."
        )
    return values


def denoise(policy, prompts: list[str], noise: Tensor, rows_per_pass: int, steps_per_pass: int) -> Episodes:
    """Trajectories of a diffusion or consistency policy; a network call takes `steps_per_pass` steps of each row.

    rows_per_pass: rows of one call under the reference, here; the caller chooses its own when it scores.
    """
    traj = policy.rollout(prompts, noise, reduction="sum")

    def score(rows: Tensor, places: Tensor) -> tuple[Tensor, None]:
        return path_log_probs(policy, traj, rows, places), None

    places = torch.arange(traj.log_probs.shape[1], device=policy.device).split(steps_per_pass)
    log_prob_ref = reference_log_probs(policy, traj, rows_per_pass, steps_per_pass)
    mask = torch.ones_like(traj.log_probs, dtype=torch.bool)
    num_elements = torch.Size(policy.latent_shape).numel()
    samples = policy.decode(traj.final)
    return Episodes(samples, traj.log_probs, log_prob_ref, mask, None, score, places, num_elements)


def path_log_probs(policy, traj, rows: Tensor, places: Tensor, reference: bool = False) -> Tensor:
    """log p of the steps that trajectories `rows` (n,) took at `places` (k,), now or under the reference: (n, k)."""
    states, step, condition, next, _ = traj.transitions(rows, places.expand(len(rows), -1))
    out = policy.step(states, step, condition, next=next, reduction="sum", reference=reference)
    return out.log_prob.view(len(rows), -1)


def reference_log_probs(policy, traj, rows_per_pass: int, steps_per_pass: int) -> Tensor:
    """The same of whole trajectories under the reference, (b, t); so many rows and steps of each in a network call."""
    num_rows, num_actions = traj.log_probs.shape
    places = torch.arange(num_actions, device=policy.device).split(steps_per_pass)
    passes = torch.arange(num_rows, device=policy.device).split(rows_per_pass)
    rows_of = [[path_log_probs(policy, traj, rows, p, reference=True) for p in places] for rows in passes]
    return torch.cat([torch.cat(parts, 1) for parts in rows_of])
