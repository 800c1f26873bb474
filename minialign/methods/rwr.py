"""Reward-weighted regression for diffusion models: DDPO's baseline (Black et al., 2023, arXiv 2305.13301, section 4.2).

Sample from the model, weight the samples by their rewards, and go on training with the usual denoising loss. It needs
no density, but the loss bounds the likelihood only loosely, and several passes take the model off its own samples.

    weights softmax(beta r) within each prompt (RWR, section 4.2)           softmax_weights
    the best share of each prompt's samples, weighted 1 (RWR-sparse)      top_weights
    E[w |noise - noise_pred|^2] over all training timesteps               policy.training_error

As in the paper: rounds of sampling and regression, weights carried on. Samples are drawn in proportion to their
weights, which has the same expectation as weighting the loss. The regression is unguided.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.loop import Step, pack, timer, unpack
from minialign.rewards import checked


@dataclass(frozen=True)
class Config:
    num_iterations: int = 10  # rounds of: sample, weight, regress
    batch_size: int = 1024  # samples, and reward queries, per round
    num_updates: int = 100  # optimizer steps per round
    minibatch_size: int = 256  # samples per optimizer step, drawn by weight
    weighting: str = "softmax"  # "softmax": RWR; "top": RWR-sparse
    beta: float = 5.0  # inverse temperature of the softmax, per unit of reward
    keep: float = 0.5  # share of each prompt's samples that RWR-sparse keeps
    learning_rate: float = 1e-3  # AdamW
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0  # l2


def softmax_weights(rewards: Tensor, group: Tensor, beta: float) -> Tensor:
    """softmax(beta r) within each group, (batch,); each group's weights sum to 1, so no prompt outweighs another.

    rewards (batch,), group (batch,) ids in [0, batch). beta = 0 is uniform; beta -> inf keeps each group's best alone.
    """
    highest = torch.full_like(rewards, -torch.inf).scatter_reduce(0, group, rewards, "amax")
    weights = (beta * (rewards - highest[group])).exp()
    return weights / torch.zeros_like(rewards).index_add(0, group, weights)[group]


def top_weights(rewards: Tensor, group: Tensor, keep: float, tiebreak: Tensor) -> Tensor:
    """1 / kept for the best `keep` share of each group, else 0, (batch,). Exactly that share: ties go by `tiebreak`.

    With a 0/1 reward, "at least the median" would keep everything while most samples fail, and learn nothing.
    """
    order = torch.argsort(tiebreak)
    order = order[torch.argsort(rewards[order], descending=True, stable=True)]
    order = order[torch.argsort(group[order], stable=True)]  # by group, then reward, then chance
    count = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
    first = count.cumsum(0) - count
    rank = torch.empty_like(group).index_copy(
        0, order, torch.arange(len(group), device=group.device) - first[group[order]]
    )
    kept = (count * keep).round().clamp_min(1)
    return (rank < kept[group]).to(rewards.dtype) / kept[group]


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place; yields a `Step` a round. generator: a CPU torch.Generator (seed 0 if None)."""
    if config.weighting not in ("softmax", "top"):
        raise ValueError(f"weighting is {config.weighting!r}; expected 'softmax' or 'top'.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    start = 0
    if resume is not None:
        counts = unpack(resume, parameters, optimizer, generator)
        start, policy.network_evaluations = counts["number"], counts["network_evaluations"]

    for number in range(start, config.num_iterations):
        lap = timer()
        drawn = torch.randint(len(prompts), (config.batch_size,), generator=generator)
        batch = [prompts[i] for i in drawn.tolist()]
        with torch.no_grad():
            traj = policy.rollout(batch, policy.draw_noise(config.batch_size, generator))
            rewards = checked(reward, policy.decode(traj.final), batch)
            group = torch.unique(drawn, return_inverse=True)[1].to(rewards.device)
            if config.weighting == "softmax":
                weights = softmax_weights(rewards, group, config.beta)
            else:
                weights = top_weights(
                    rewards, group, config.keep, torch.rand(len(batch), generator=generator).to(rewards.device)
                )

        losses = []
        for _ in range(config.num_updates):
            rows = torch.multinomial(weights.cpu(), config.minibatch_size, replacement=True, generator=generator)
            rows = rows.to(policy.device)
            levels = policy.draw_levels(len(rows), generator)
            latents = traj.final[rows]
            noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype).to(policy.device)
            loss = policy.training_error(latents, levels, noise, traj.condition[rows], reduction="mean").mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

        yield Step(
            number,
            {"reward": rewards.mean(), "reward_std": rewards.std(correction=0), "loss": torch.stack(losses).mean()},
            policy.network_evaluations,
            (number + 1) * config.batch_size,
            lap(),
            lambda done=number + 1: pack(
                parameters, optimizer, generator, number=done, network_evaluations=policy.network_evaluations
            ),
        )
