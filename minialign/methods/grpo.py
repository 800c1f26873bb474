"""Flow-GRPO (Liu et al., 2025, arXiv 2505.05470) and DanceGRPO (Xue et al., 2025, arXiv 2505.07818): group-relative
policy optimisation (GRPO: Shao et al., 2024, arXiv 2402.03300) of flow and diffusion models.

PPO needs a critic. GRPO draws several samples of one prompt and lets the group be its own critic: its mean is the
baseline, its spread the unit. A flow is sampled by an ODE, which neither explores nor has a density, so both papers
walk an SDE that has the ODE's marginals and treat its steps as actions, as DDPO does; the rest is PPO's clipped loss.

    A = (R - mean_group) / (std_group + 1e-6), GRPO                                advantages_of
    the ODE turned SDE, with Flow-GRPO's noise or DanceGRPO's                      policies.flow, kernels.flow_step
    max(-A rho, -A clip(rho, 1 - c, 1 + c)), all steps but the last                transition_loss
    KL of a step = |mean - mean_ref|^2 / (2 s^2 |dt|), Flow-GRPO                   policy.step_kl
    the best and the worst of a group alone (DanceGRPO, video)                     extremes

Settings make the papers: Flow-GRPO is the default, with beta = .04 for its strict rewards. DanceGRPO is
`FlowPolicy(noise_level=.3, noise_schedule="constant", deterministic_last=True)` with same_noise=True,
trained_share=.6 and beta=0. For language models GRPO is `ppo.Config(advantage="grpo", kl_loss="k3")`.

As in the papers' code: log-probabilities are means over a latent's D elements (`reduction`), so ratios are D-th roots
and the clip range scales like 1 / D; several rewards are normalised separately and their losses added; samples with
advantage 0 train nothing. Unlike it: Flow-GRPO's release leaves |dt| out of the KL, so that its beta of .04 means
.04 / |dt| (kl="release" keeps that); its std over the whole batch is scale="batch"; no moving average of the weights.
Fewer steps here than in `policy.sample(..., num_steps=40)` is what Flow-GRPO calls denoising reduction.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minialign.kernels import StepOut, clipped_surrogate, group_advantages, group_ranks, means
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.methods.ddpo import chosen_steps, clip_range_of
from minialign.rewards import checked
from minialign.settings import Count, Limit, Natural, NonNegative, Settings, Share


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 60  # rounds of: roll out, score, update
    num_prompts: Count = 12  # drawn per round, over all processes (papers: 48, 16)
    group_size: Count = 16  # samples of each (papers: 24, 12)
    num_minibatches: Count = 2  # optimizer steps per round
    steps_per_pass: Count = 4  # denoising steps per network call: memory against speed, never the result
    scale: Literal["group", "batch", "none"] = "group"  # std divided by: paper's; Flow-GRPO's release; Dr. GRPO's
    advantage_clip: Limit = 5.0  # in standard deviations
    best_of: Count | None = None  # of each group this many train, the best and the worst half; None: all
    same_noise: bool = False  # one initial noise for all samples of a group (DanceGRPO)
    trained_share: Share = 1.0  # of the trained steps, drawn anew for each sample (DanceGRPO: .6)
    train_last: bool = False  # the papers train all steps but the last
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities over the latent's D elements; the paper sums
    clip_range: Limit | None = None  # on the ratio; None: 1.6 / D, at most .2 (papers: 1e-4 at D of 65,536)
    beta: NonNegative = 0.0  # weight of KL(policy || reference) per step (.04 and .01; DanceGRPO: none)
    kl: Literal["path", "release"] = "path"  # the Gaussians' own; without |dt|, as Flow-GRPO's code has it (flows)
    learning_rate: NonNegative = 3e-4  # AdamW (LoRA; 1e-5 for all weights)
    warmup_updates: Natural = 0  # over which the learning rate rises
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


def advantages_of(
    rewards: Float[Tensor, "batch"], group: Int[Tensor, "batch"], scale: str, limit: float
) -> Float[Tensor, "batch"]:
    """(R - mean_group) / std, clipped to +-limit. group: ids in [0, batch). Population stds, + 1e-6.

    Shifting the rewards, or with a std scaling them, changes nothing. A group of one, or of equal rewards, gives 0.
    "none": the mean alone goes, so beta keeps its unit, reward per nat, and nothing is clipped.
    """
    if scale == "group":
        return group_advantages(rewards, group).clamp(-limit, limit)
    centred = group_advantages(rewards, group, scale=False)
    if scale == "none":
        return centred
    std = group_advantages(rewards, torch.zeros_like(group), scale=False).square().mean().sqrt()
    return (centred / (std + 1e-6)).clamp(-limit, limit)


def extremes(
    rewards: Float[Tensor, "batch"], group: Int[Tensor, "batch"], best_of: int, tiebreak: Float[Tensor, "batch"]
) -> Bool[Tensor, "batch"]:
    """True for the best and the worst best_of / 2 of each group; ties go by `tiebreak`. Groups of best_of or more."""
    size = torch.zeros_like(group).index_add(0, group, torch.ones_like(group))[group]
    rank, half = group_ranks(rewards, group, tiebreak), best_of // 2
    return (rank < half) | (rank >= size - half)


def step_kl(policy, out: StepOut, states: Tensor, step: Tensor, condition, config: Config) -> Tensor:
    """KL(policy || reference) of single steps at stored states, (n,); its gradient goes through the mean directly."""
    with torch.no_grad():
        ref = policy.step(states, step, condition, next=out.next, reduction=config.reduction, reference=True)
    if config.kl == "path":
        return policy.step_kl(out, ref, config.reduction)
    return policy.step_kl(out._replace(std=policy.diffusion[step]), ref, "mean")


def transition_loss(policy, traj, rows: Tensor, steps: Tensor, advantages: Tensor, clip_range: float, config: Config):
    """Loss and metrics of trajectories `rows` (n,) at their `steps` (n, k), in one network call. advantages
    (rewards, batch): each reward has a loss of its own, and their sum is taken.
    """
    states, step, condition, next, log_prob_old = traj.transitions(rows, steps)
    out = policy.step(states, step, condition, next=next, reduction=config.reduction)
    repeated = advantages[:, rows].repeat_interleave(steps.shape[1], dim=1)
    losses, infos = zip(
        *(clipped_surrogate(out.log_prob, log_prob_old, one, clip_range) for one in repeated), strict=True
    )
    loss, info = torch.stack(losses).sum(0), infos[0]
    if config.beta:
        kl = step_kl(policy, out, states, step, condition, config)
        loss, info = loss + config.beta * kl, info | {"kl": kl.detach()}
    return loss.mean(), means(info)


def initial_noise(policy, batch, config: Config, generator: torch.Generator) -> Tensor:
    """The randomness of this process's rollouts; with same_noise each group starts from the noise of its first row."""
    noise = policy.draw_noise(len(batch), generator, rows=batch.own)
    if config.same_noise:
        first = batch.group[batch.own] * config.group_size
        noise[:, 0] = policy.draw_noise(len(batch), generator, rows=first)[:, 0]
    return noise


def trained_steps(policy, config: Config) -> int:
    """How many of a trajectory's steps are trained: its stochastic ones, without the sampler's last."""
    return policy.num_actions if config.train_last else min(policy.num_actions, policy.num_steps - 1)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    size, best_of = config.group_size, config.best_of
    if size < 2:
        raise ValueError("group_size is 1: a group of one is its own mean, and every advantage 0. Use at least 2.")
    if best_of is not None and (best_of % 2 or best_of > size):
        raise ValueError(f"best_of is {best_of}; expected an even number, at most the group's {size} samples.")
    if config.num_minibatches > config.num_prompts * (best_of or size):
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {config.num_prompts * (best_of or size)} "
            "samples of a round that train."
        )
    if config.kl == "release" and not hasattr(policy, "diffusion"):
        raise ValueError(f"kl='release' is of a flow's dt, and {type(policy).__name__} has none: use kl='path'.")
    policy.encode(prompts)
    policy.check_density()
    if trained_steps(policy, config) == 0:
        raise ValueError(f"of {policy.num_steps} step none is trained: set train_last=True, or sample with more steps.")


def train(
    policy, reward: Callable | Sequence[Callable], prompts, config=Config(), generator=None, resume=None
) -> Iterator[Step]:
    """Trains `policy`, of a flow or any other that denoises, in place; prompts from `prompts`; a `Step` a round.

    reward: one, or a list of them. generator: a CPU torch.Generator, the run's only randomness (seed 0 if None).
    resume: an earlier run's checkpoint. Under `torchrun` each process rolls out and differentiates its own share.
    """
    check(policy, prompts, config)
    rewards = [reward] if callable(reward) else list(reward)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    kept = {f"reward{i}": one for i, one in enumerate(rewards)} if len(rewards) > 1 else {"reward": rewards[0]}
    run = Run(config, optimizer, generator, resume, [policy], **kept)
    clip_range = clip_range_of(policy, config)
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts, config.group_size)
        with torch.no_grad():
            traj = policy.rollout(
                batch.own_prompts, initial_noise(policy, batch, config, run.generator), reduction=config.reduction
            )
            samples = policy.decode(traj.final)
            scores = torch.stack([batch.gather(checked(one, samples, batch.own_prompts)) for one in rewards])
            limit = config.advantage_clip
            advantages = torch.stack([advantages_of(one, batch.group, config.scale, limit) for one in scores])
            trains = (advantages != 0).any(0)
            if config.best_of is not None:
                tiebreak = torch.rand(len(batch), generator=run.generator).to(scores.device)
                trains &= extremes(scores.sum(0), batch.group, config.best_of, tiebreak)

        rows = trains.nonzero().flatten()
        order = chosen_steps(len(batch), trained_steps(policy, config), config.trained_share, run.generator)
        order, own = order.to(policy.device)[batch.own], advantages[:, batch.own]
        for mini in run.minibatches(rows, config.num_minibatches, batch.own):
            for steps in order[mini.rows].split(config.steps_per_pass, dim=1) if len(mini.rows) else ():
                loss, info = transition_loss(policy, traj, mini.rows, steps, own, clip_range, config)
                run.backward(loss, info, mini.share * steps.shape[1] / order.shape[1])
            run.update()

        metrics = reward_metrics(scores.sum(0)) | {"trained": trains.float().mean()}
        yield run.step(metrics, reward_queries=len(batch) * len(rewards))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """S forward passes of the round's rows, and forward and backward passes of the states that were trained."""
    rows, trained = config.num_prompts * config.group_size, trained_steps(policy, config)
    steps = max(1, round(config.trained_share * trained))
    here = round(rows * float(metrics["trained"])) // config.num_minibatches
    passes = [min(config.steps_per_pass, steps - first) for first in range(0, steps, config.steps_per_pass)]
    return {"forward": [rows] * policy.num_steps, "backward": [here * k for k in passes] * config.num_minibatches}
