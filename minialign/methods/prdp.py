"""PRDP: proximal reward difference prediction (Deng et al., CVPR 2024, arXiv 2402.08714).

Of all laws of denoising paths, exp(r / beta) tilts of the base model earn most per nat of distance from it, and their
log-ratios differ from path to path as r / beta does; the normaliser log Z(c) is the same for all paths of a prompt. So
take two paths of one prompt and let the model's own log-ratios predict the difference of their rewards: a regression,
whose errors vanish at the optimum, where a policy gradient would go on. What prompts pay on average cancels as well.

    q_t = log pi(x_{t-1} | x_t, c) - log pi_ref(...), eq. 10                policies.paths
    r^_i = sum_t q_t, and r^_i - r^_j predicts (r_i - r_j) / beta           prdp_loss
    (r^_i - r^_j - (r_i - r_j) / beta)^2, mean over the pairs of a prompt   the same, clip_range=inf
    q_t^clip = clip(q_t, q_t^old - eps, q_t^old + eps), step by step        the same
    max of the error and the one of the clipped log-ratios, eq. 21          the same

At the weights that drew the paths this is the policy gradient of r - beta log-ratio with the prompt's mean as baseline;
the first noise x_T, which no policy can tilt, adds variance to it and moves no optimum.
As in the equations: sums over steps and elements (`reduction`; the listing in appendix G takes means over steps: with
beta / T the same). As in the listing, not the equations: pairs of equal rewards are left out (`ties`).
As in neither: errors are in units of reward, beta^2 times the paper's, so that gradients keep their size when beta
changes; several prompts share a network call.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import at_least_float32, kl_k3, means, same_shape
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.policies.paths import path_log_probs, reference_log_probs
from minialign.rewards import checked
from minialign.settings import Count, Limit, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 100  # rounds of: roll out, score, regress
    num_prompts: Count = 16  # prompts drawn per round, over all processes (paper: 32; 64 of more than 100,000)
    group_size: Count = 8  # paths per drawn prompt, at least 2: all their pairs are compared (paper: 16; 8)
    num_updates: Count = 4  # optimizer steps per round, each on all of it; with 1 nothing is clipped (paper: 10; 1)
    beta: Positive = 0.1  # reward per nat of a path (paper: 3e-5; 3e-6; 10 where it is to hold the model back)
    clip_range: Limit = 0.05  # on each step's log-ratio; inf: no clipping (paper: 1e-6; 1e-4)
    reduction: Literal["sum", "mean"] = "sum"  # of log-ratios over elements and steps; "mean" makes beta D T times less
    ties: bool = False  # also pairs of equal rewards, whose log-ratios should be equal
    shared_start: bool = False  # the paths of a prompt start from one x_T: then their rewards can be explained whole
    prompts_per_pass: Count = 4  # whose paths share a network call: memory against speed, never the result
    steps_per_pass: Count | None = None  # denoising steps per call; None: all. Fewer cost a forward pass more an update
    learning_rate: NonNegative = 3e-4  # AdamW, LoRA (paper: 1e-5 for all weights)
    warmup_updates: Natural = 0  # over which the learning rate rises
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


def differences(x: Float[Tensor, "n b"]) -> Float[Tensor, "n b b"]:
    """x_i - x_j at [:, i, j], of each prompt's own paths."""
    return x.unsqueeze(2) - x.unsqueeze(1)


def prdp_loss(
    log_prob: Float[Tensor, "n b t"],
    log_prob_old: Float[Tensor, "n b t"],
    log_prob_ref: Float[Tensor, "n b t"],
    rewards: Float[Tensor, "n b"],
    beta: float | int,
    clip_range: float | int,
    reduction: str = "sum",
    ties: bool = False,
) -> tuple[Float[Tensor, "n"], dict[str, Tensor]]:
    """max(l, l_clip), a mean over the pairs of each of n prompts, from the log-probabilities of its b paths' t steps.

    info, an element each: `clip_fraction` (1 where a step lies outside) and `approx_kl` (k3 of KL(old || new)).
    Limits: 0 where the sums of log_prob - log_prob_ref are r / beta + a number of the prompt's own; the same for
    rewards moved by such a number, and for log-probabilities all moved by one. Where all three log-probabilities are
    equal, and rewards are distinct, the gradient of a path's sum is -4 (r - mean) / (beta (b - 1)). clip_range = inf: l
    alone. A clipped step has no gradient where going on would bring the prediction nearer, all of it where it would
    not. No pair: 0. Raises ValueError for shapes that would have to be broadcast.
    """
    same_shape(log_prob=log_prob, log_prob_old=log_prob_old, log_prob_ref=log_prob_ref)
    same_shape(rewards=rewards, paths=log_prob[..., 0])
    log_ratio, change = (at_least_float32(log_prob) - at_least_float32(x) for x in (log_prob_ref, log_prob_old))
    beyond = change - change.clamp(-clip_range, clip_range)  # exactly 0 inside, where both losses are one
    predicted, clipped = (differences(reduce(q, "n b t -> n b", reduction)) for q in (log_ratio, log_ratio - beyond))
    gap = differences(at_least_float32(rewards))
    loss = torch.maximum((predicted - gap / beta).square(), (clipped - gap / beta).square())
    pairs = torch.ones_like(gap).triu(1) > 0 if ties else gap > 0  # each pair once, all of them or the decided ones
    loss = torch.where(pairs, loss, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
    with torch.no_grad():
        info = {"clip_fraction": (beyond != 0).to(loss.dtype), "approx_kl": kl_k3(-change)}
    return loss, info


def prediction(log_ratio: Float[Tensor, "n b"], rewards: Float[Tensor, "n b"], beta: float | int) -> dict[str, Tensor]:
    """How well beta r^ predicts rewards within prompts: the `slope` of predicted on true differences, and their
    `explained` share, 1 - sum of squared errors / sum of squares. Both 0 at the reference, 1 at the optimum.

    What x_T decides stays unexplained, and an over-trained model has a slope above 1. Constant rewards: 0 and 1.
    """
    true, predicted = (x - x.mean(1, keepdim=True) for x in (rewards, beta * log_ratio))
    total = true.square().sum()
    total = torch.where(total > 0, total, torch.inf)
    return {"slope": (true * predicted).sum() / total, "explained": 1 - (predicted - true).square().sum() / total}


def partial_losses(policy, traj, rows: Tensor, log_prob_ref: Tensor, rewards: Tensor, moved: bool, config: Config):
    """Yields (loss, metrics) of trajectories `rows` (n, b), a network call each: their gradients add up to the loss's.

    A square of a sum over steps is not a sum over steps. So where the steps do not share one call, all of them are
    scored first, without graph (`moved`: since the rollout; else they are known), and each is differentiated with the
    slope that the loss has there.
    """
    measured = partial(
        prdp_loss,
        log_prob_old=traj.log_probs[rows], log_prob_ref=log_prob_ref[rows], rewards=rewards[rows], beta=config.beta,
        clip_range=config.clip_range, reduction=config.reduction, ties=config.ties,
    )  # fmt: skip

    def score(places: Tensor) -> Tensor:
        return path_log_probs(policy, traj, rows.flatten(), places, reduction=config.reduction).view(*rows.shape, -1)

    places = torch.arange(traj.log_probs.shape[1], device=rows.device)
    parts, unit = places.split(config.steps_per_pass or len(places)), config.beta**2
    if len(parts) == 1:
        loss, info = measured(score(places))
        yield unit * loss.mean(), means(info)
        return
    with torch.no_grad():
        log_prob = torch.cat([score(part) for part in parts], 2) if moved else traj.log_probs[rows]
    loss, info = measured(log_prob.requires_grad_())
    (slope,) = torch.autograd.grad(unit * loss.mean(), log_prob)
    for number, part in enumerate(parts):
        yield (slope[..., part] * score(part)).sum(), {} if number else means(info)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    if config.group_size < 2:
        raise ValueError("group_size is 1; PRDP compares the paths of a prompt with each other: give at least 2.")
    policy.encode(prompts)
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on `reward`, prompts drawn from `prompts`; yields a `Step` a round.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process rolls out and differentiates the paths of its own share of the prompts.
    """
    check(policy, prompts, config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config, optimizer, generator, resume, [policy], reward=reward)
    b, prompts_per_pass = config.group_size, config.prompts_per_pass
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts, b, unit=b)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            if config.shared_start:
                noise[:, 0] = noise[::b, 0].repeat_interleave(b, 0)
            traj = policy.rollout(batch.own_prompts, noise, reduction=config.reduction)
            rewards = batch.gather(checked(reward, policy.decode(traj.final), batch.own_prompts))
            log_prob_ref = reference_log_probs(
                policy, traj, reduction=config.reduction, rows_per_pass=b * prompts_per_pass,
                steps_per_pass=config.steps_per_pass or policy.num_actions,
            )  # fmt: skip
            log_ratio = batch.gather(reduce(traj.log_probs - log_prob_ref, "n t -> n", config.reduction))
            own = rewards[batch.own]

        groups = torch.arange(len(batch.own), device=policy.device).view(-1, b)
        for update in range(config.num_updates):
            for rows in groups.split(prompts_per_pass):
                for loss, info in partial_losses(policy, traj, rows, log_prob_ref, own, update > 0, config):
                    run.backward(loss, info, len(rows) / config.num_prompts)
            run.update()

        found = prediction(log_ratio.view(-1, b), rewards.view(-1, b), config.beta)
        yield run.step(reward_metrics(rewards) | found | {"kl": log_ratio.mean()}, reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """S calls of the round's rows, one more of all its states under the reference, and K times forward and backward
    through these."""
    rows, together = config.num_prompts * config.group_size, config.prompts_per_pass * config.group_size
    per_pass = config.steps_per_pass or policy.num_actions
    widths = [min(per_pass, policy.num_actions - first) for first in range(0, policy.num_actions, per_pass)]
    states = [min(together, rows - first) * width for first in range(0, rows, together) for width in widths]
    again = config.num_updates - 1 if len(widths) > 1 else 0
    return {
        "forward": [rows] * policy.num_steps + states * (1 + again),
        "backward": states * config.num_updates,
    }
