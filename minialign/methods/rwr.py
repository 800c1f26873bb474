"""Reward-weighted regression for diffusion models: DDPO's baseline (Black et al., 2023, arXiv 2305.13301, section 4.2).

Sample from the model, weight the samples by their rewards, and go on training with the usual denoising loss. It needs
no density, but the loss bounds the likelihood only loosely, and several passes take the model off its own samples.

    w_i = exp(beta r_i) / sum_j exp(beta r_j) within each prompt (RWR, section 4.2)    softmax_weights
    w_i = 1 for the best share of each prompt's samples, else 0 (RWR-sparse)           top_weights
    E[w |noise - noise_pred|^2] over all training timesteps                            policy.training_error

As in the paper: rounds of sampling and regression, weights carried on. Samples are drawn in proportion to their
weights, which has the same expectation as weighting the loss. The regression is unguided.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minialign.kernels import group_ranks
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.rewards import checked
from minialign.settings import Count, Limit, NonNegative, Settings, Share


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 10  # rounds of: sample, weight, regress
    batch_size: Count = 1024  # samples, and reward queries, per round
    num_updates: Count = 100  # optimizer steps per round
    minibatch_size: Count = 256  # samples per optimizer step, drawn by weight
    weighting: Literal["softmax", "top"] = "softmax"  # RWR; RWR-sparse
    beta: NonNegative = 5.0  # inverse temperature of the softmax, per unit of reward
    keep: Share = 0.5  # share of each prompt's samples that RWR-sparse keeps
    learning_rate: NonNegative = 1e-3  # AdamW
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


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
    count = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))
    rank = group_ranks(rewards, group, tiebreak)
    kept = (count * keep).round().clamp_min(1)
    return (rank < kept[group]).to(rewards.dtype) / kept[group]


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place; yields a `Step` a round. generator: a CPU torch.Generator (seed 0 if None).

    Under `torchrun` each process samples its own share of a round and regresses on it.
    """
    check_policy(policy, "rollout")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config, optimizer, generator, resume, [policy], reward=reward)
    for _ in run.rounds():
        batch = run.draw(prompts, config.batch_size)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            traj = policy.rollout(batch.own_prompts, noise)
            rewards = batch.gather(checked(reward, policy.decode(traj.final), batch.own_prompts))
            group = torch.unique(batch.drawn, return_inverse=True)[1]
            if config.weighting == "softmax":
                weights = softmax_weights(rewards, group, config.beta)
            else:
                tiebreak = torch.rand(len(batch), generator=run.generator).to(rewards.device)
                weights = top_weights(rewards, group, config.keep, tiebreak)

        for _ in range(config.num_updates):
            drawn = torch.multinomial(weights.cpu(), config.minibatch_size, replacement=True, generator=run.generator)
            drawn = drawn.to(policy.device)
            levels = policy.draw_levels(len(drawn), run.generator)
            shape = (len(drawn), *traj.final.shape[1:])
            noise = torch.randn(shape, generator=run.generator, dtype=traj.final.dtype).to(policy.device)
            here = torch.isin(drawn, batch.own)
            if here.any():
                rows = torch.searchsorted(batch.own, drawn[here])
                error = policy.training_error(
                    traj.final[rows], levels[here], noise[here], traj.condition[rows], reduction="mean"
                )
                run.backward(error.mean(), {"loss": error.mean()}, len(rows) / len(drawn))
            run.update()
        yield run.step(reward_metrics(rewards), reward_queries=len(batch))
