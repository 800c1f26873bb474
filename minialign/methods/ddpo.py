"""DDPO: training diffusion models with reinforcement learning (Black et al., 2023, arXiv 2305.13301), and DPOK's KL
(Fan et al., 2023, arXiv 2305.16381).

A sampler that adds noise is a policy with a density: each denoising transition is a Gaussian whose log-probability we
know. Treat a denoising run as an episode, pay the reward at its end, and do policy gradient on the transitions.

    pi(x_{t-1} | x_t, c) = N(mu_theta(x_t, t, c), sigma_t^2 I), section 4.2     policy.step, which samples or scores
    A = (r - mean_c) / (std_c + 1e-6), per prompt, section 4.4                  prompt_advantages
    DDPO_SF: grad E r = E sum_t A grad log pi(x_{t-1} | x_t, c), eq. 3          num_minibatches=1: then rho is 1
    DDPO_IS: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), eq. 4 with PPO's clip kernels.clipped_surrogate
    rho = pi(x_{t-1} | x_t, c) / pi_old(x_{t-1} | x_t, c)                       the same
    KL(p_theta || p_ref) = |mu_theta - mu_ref|^2 / (2 sigma_t^2), DPOK          policy.step_kl
    |noise_theta - noise_ref|^2, unweighted, in DPOK's code                     step_kl, "noise_mse"

As in the authors' code, not the paper: log-probabilities are means over the latent's D elements (`reduction`), the loss
a mean over steps; one AdamW step sees all denoising steps of its trajectories.
As in neither: the steps are not shuffled (their gradients are summed before the one optimizer step, so their order
cannot matter); a deterministic step (std = 0) raises instead of giving nan; the exact KL is the default. DPOK's value
network is left out: prompts have a baseline already.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minialign.kernels import StepOut, at_least_float32, clipped_surrogate, group_advantages, means, whiten
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.rewards import checked
from minialign.settings import Count, Limit, Natural, NonNegative, Settings, Share
from minialign.statistics import Moments, Statistics


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 50  # rounds of: roll out, score, update
    num_prompts: Count = 16  # prompts drawn per round, over all processes
    group_size: Count = 8  # samples per drawn prompt
    num_minibatches: Count = 2  # optimizer steps per pass over the round's samples; 1 is plain REINFORCE (DDPO_SF)
    num_epochs: Count = 1  # passes over the round's samples; 1 in the paper
    timestep_fraction: Share = 1.0  # share of a trajectory's steps trained on, drawn anew (authors' default: 1)
    steps_per_pass: Count = 4  # denoising steps per network call: memory against speed, never the result
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities over the latent's D elements; the paper sums
    clip_range: Limit | None = None  # on the ratio; None: 1.6 / D, at most 0.2 (authors: 1e-4 at D = 16,384)
    baseline: Literal["prompt", "group", "batch"] = "prompt"  # its running buffer; this round's samples of it; of all
    scale_advantages: bool = True  # divide by the std; False keeps the reward's unit, so that beta means reward per nat
    buffer_size: Count = 64  # rewards remembered per prompt
    min_count: Count = 16  # below so many, a prompt uses the statistics of the whole batch
    advantage_clip: Limit = 5.0  # in standard deviations (the JAX code: 10)
    beta: NonNegative = 0.0  # weight of KL(policy || reference) per step (DPOK); 0 does not evaluate the reference
    kl: Literal["exact", "noise_mse"] = "exact"  # of the two Gaussians; DPOK's code: late steps weigh too little
    learning_rate: NonNegative = 3e-4  # AdamW (paper: 1e-5 for all weights, 3e-4 for LoRA)
    warmup_updates: Natural = 0  # over which the learning rate rises; AdamW's first steps are as long on noise
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


def default_clip_range(num_elements: int, reduction: str) -> float:
    """Under "mean" the log-ratio is divided by D, so the authors' 1e-4 at D = 16,384 is 1.6 / D elsewhere."""
    return min(1.6 / num_elements, 0.2) if reduction == "mean" else 0.2


def clip_range_of(policy, config) -> float:
    """The config's own, or the default for this policy's latents."""
    usual = default_clip_range(torch.Size(policy.latent_shape).numel(), config.reduction)
    return usual if config.clip_range is None else config.clip_range


def prompt_advantages(
    statistics: Statistics, prompts: list, rewards: Tensor, min_count: int, scale: bool = True
) -> Tensor:
    """(r - mean) / (std + 1e-6), (batch,), against a running buffer a prompt (section 4.4; the authors' tracker).

    First the new rewards enter their prompts' buffers; then each reward is centred and scaled by its prompt's buffer,
    or, while that holds fewer than `min_count`, by the current batch. Population std. Equal rewards give exact zeros.
    """
    held, batch = statistics.update(prompts, rewards), rewards.cpu().double()
    enough, everyone = held.count >= min_count, Moments.of(batch)
    centred = batch - torch.where(enough, held.mean, everyone.mean)
    std = torch.where(enough, held.std, everyone.std)
    return (centred / (std + 1e-6) if scale else centred).to(rewards)


def round_advantages(rewards: Tensor, prompts: list, statistics: Statistics, config: Config) -> Tensor:
    """Advantages (batch,) of one round's rewards, by the baseline that `config` names."""
    if config.baseline == "prompt":
        advantages = prompt_advantages(statistics, prompts, rewards, config.min_count, config.scale_advantages)
    elif config.baseline == "group":
        ids = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([ids[prompt] for prompt in prompts], device=rewards.device)
        advantages = group_advantages(rewards, group, scale=config.scale_advantages)
    elif config.scale_advantages:
        advantages = whiten(rewards)
    else:
        advantages = group_advantages(rewards, torch.zeros_like(rewards, dtype=torch.long), scale=False)
    return advantages.clamp(-config.advantage_clip, config.advantage_clip) if config.scale_advantages else advantages


def chosen_steps(num_rows: int, num_steps: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Which steps of each trajectory to train on, (num_rows, k): all, or a share drawn for each row on its own."""
    if fraction == 1:
        return torch.arange(num_steps).expand(num_rows, num_steps)
    count = max(1, round(fraction * num_steps))
    return torch.rand(num_rows, num_steps, generator=generator).argsort(1)[:, :count]


def step_kl(policy, output: Tensor, states: Tensor, step: Tensor, condition, out: StepOut, config: Config) -> Tensor:
    """DPOK's regulariser at stored states, (n,): the gradient goes through theta directly, not through the states."""
    with torch.no_grad():
        output_ref = policy.model_output(states, step, condition, reference=True)
    if config.kl == "noise_mse":
        return at_least_float32(output - output_ref).square().flatten(1).mean(1)
    out_ref = policy.step_from(output_ref, states, step, reduction=config.reduction)
    return policy.step_kl(out, out_ref, config.reduction)


def transition_loss(policy, traj, rows: Tensor, steps: Tensor, advantages: Tensor, clip_range: float, config: Config):
    """Loss and metrics of trajectories `rows` (n,) at their `steps` (n, k): one network call for all n * k states."""
    states, step, condition, next, log_prob_old = traj.transitions(rows, steps)
    output = policy.model_output(states, step, condition)
    out = policy.step_from(output, states, step, next=next, reduction=config.reduction)
    loss, info = clipped_surrogate(
        out.log_prob, log_prob_old, advantages[rows].repeat_interleave(steps.shape[1]), clip_range
    )
    if config.beta:
        kl = step_kl(policy, output, states, step, condition, out, config)
        loss, info = loss + config.beta * kl, info | {"kl": kl.detach()}
    return loss.mean(), means(info)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    batch_size = config.num_prompts * config.group_size
    if config.num_minibatches > batch_size:
        raise ValueError(f"num_minibatches is {config.num_minibatches}, more than the {batch_size} samples of a round.")
    policy.encode(prompts)
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on `reward`, prompts drawn from `prompts`; yields a `Step` an iteration.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process rolls out and differentiates its own share of every round.
    """
    check(policy, prompts, config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    statistics = Statistics(last=config.buffer_size)
    run = Run(config, optimizer, generator, resume, [policy], statistics=statistics, reward=reward)
    clip_range = clip_range_of(policy, config)
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts, config.group_size)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            traj = policy.rollout(batch.own_prompts, noise, reduction=config.reduction)
            rewards = batch.gather(checked(reward, policy.decode(traj.final), batch.own_prompts))
            advantages = round_advantages(rewards, batch.prompts, statistics, config)[batch.own]

        for _ in range(config.num_epochs):
            minibatches = run.minibatches(len(batch), config.num_minibatches, batch.own)
            order = chosen_steps(len(batch), policy.num_actions, config.timestep_fraction, run.generator)
            order = order.to(policy.device)[batch.own]
            for mini in minibatches:
                for steps in order[mini.rows].split(config.steps_per_pass, dim=1) if len(mini.rows) else ():
                    loss, info = transition_loss(policy, traj, mini.rows, steps, advantages, clip_range, config)
                    run.backward(loss, info, mini.share * steps.shape[1] / order.shape[1])
                run.update()

        yield run.step(reward_metrics(rewards), reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """S forward passes of the round's rows, and forward and backward passes of all its states."""
    rows = config.num_prompts * config.group_size
    passes = range(0, policy.num_steps, config.steps_per_pass)
    backward = [rows * min(config.steps_per_pass, policy.num_steps - first) for first in passes]
    return {"forward": [rows] * policy.num_steps, "backward": backward * config.num_epochs}
