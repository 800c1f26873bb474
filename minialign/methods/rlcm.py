"""RLCM: reinforcement learning of consistency models (Oertell et al., RLC 2024, arXiv 2404.03673).

A consistency model draws in H calls, 1 to 16: denoise with f, re-noise to the next level, and so on. Re-noising is
Gaussian, so f plus its noise is a policy with a density over H - 1 actions, and DDPO's clipped policy gradient applies:
fewer calls a sample, fewer transitions to share the credit.

    pi(x_{j+1} | x_j, c) = N(sqrt(a_{j+1}) f_theta(x_j, tau_j, c), (1 - a_{j+1}) I)      policy.step (ConsistencyPolicy)
    r(f_theta(x_{H-1}, tau_{H-1}, c), c) as A = (r - mean_c) / (std_c + 1e-6)            ddpo.prompt_advantages
    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), eq. 1                                   kernels.clipped_surrogate
    REBEL: (eta (log rho_1 - log rho_2) - (A_1 - A_2))^2, in the authors' repository     rebel_loss

The last call is deterministic: no gradient reaches f at the last level, and it changes only because it shares weights
with the others. The authors' code adds noise behind it and scores that noise, although the reward is paid before it: a
term of mean zero, pure variance, left out here. `terminal_std` (ours, off by default) adds a little noise and pays the
reward behind it, so that the last call learns, too. H = 1 has no action and is refused.
As in the code, not the paper: noise levels preserve variance, and mean and std are those of the NEXT level.
`trained_actions` (ours, off by default) gives a gradient to the first actions alone, where those decide the reward: a
gradient costs three calls, so on `shapes`, where the first call places the objects, it nearly halves a round.
As in neither: REBEL's log-ratios are summed within each sample (the code sums over the minibatch as well).
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import clipped_surrogate, means
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.methods.ddpo import clip_range_of, prompt_advantages
from minialign.rewards import checked
from minialign.settings import Count, Fraction, Limit, Natural, NonNegative, Positive, Settings
from minialign.statistics import Statistics


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 100  # rounds of: roll out, score, update (authors: 100 epochs of 10 batches)
    num_prompts: Count = 16  # prompts drawn per round, over all processes
    group_size: Count = 8  # samples per drawn prompt; even for "rebel", which compares two of them
    num_minibatches: Count = 4  # optimizer steps per round
    objective: Literal["ppo", "rebel"] = "ppo"  # the paper; regress the difference of two samples' advantages
    rebel_eta: Positive = 1.0  # "rebel": advantage per nat of log-ratio
    trained_actions: Count | None = None  # the first so many get a gradient; None: all, as in the paper
    terminal_std: NonNegative = 0.0  # noise behind the last call while training; 0: the paper
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities over the latent's D elements
    clip_range: Limit | None = None  # on the ratio; None: 1.6 / D, at most 0.2 (authors: 1e-4 at D = 36,864)
    buffer_size: Count = 64  # rewards remembered per prompt (authors: 16 or 32)
    min_count: Count = 16  # below so many, a prompt uses the statistics of the whole batch
    advantage_clip: Limit = 10.0  # in standard deviations
    learning_rate: NonNegative = 1e-4  # Adam, LoRA
    final_lr_fraction: Fraction = 2 / 3  # of it at the end, linearly
    warmup_updates: Natural = 0  # over which the learning rate rises
    max_grad_norm: Limit = 5.0  # l2


def rebel_loss(
    log_ratio: Float[Tensor, "two pairs"], advantages: Float[Tensor, "two pairs"], eta: float | int
) -> Float[Tensor, ""]:
    """(eta (log rho_1 - log rho_2) - (A_1 - A_2))^2 over pairs of samples of one prompt (Gao et al., 2024, eq. 9).

    log_ratio: sums over a sample's steps. At rho = 1 the gradient is that of a policy gradient with the pair's
    difference as advantage; the regression stops where the ratio explains the rewards, so nothing is clipped.
    """
    error = eta * (log_ratio[0] - log_ratio[1]) - (advantages[0] - advantages[1])
    return error.square().mean()


def round_loss(policy, traj, rows: Tensor, advantages: Tensor, clip_range: float, config: Config):
    """Loss and metrics of trajectories `rows` (n,) at their trained steps, in one call. "rebel": halves pair up."""
    places = torch.arange(traj.log_probs.shape[1], device=rows.device)[: config.trained_actions].expand(len(rows), -1)
    batch = traj.transitions(rows, places)
    out = policy.step(batch.states, batch.step, batch.condition, next=batch.next, reduction=config.reduction)
    repeated = advantages[rows].repeat_interleave(places.shape[1])
    loss, info = clipped_surrogate(out.log_prob, batch.log_prob_old, repeated, clip_range)
    if config.objective == "rebel":
        log_ratio = rearrange(out.log_prob - batch.log_prob_old, "(two n k) -> two n k", two=2, k=places.shape[1])
        loss = rebel_loss(log_ratio.sum(2), rearrange(advantages[rows], "(two n) -> two n", two=2), config.rebel_eta)
    return loss.mean(), means(info)


@contextmanager
def terminal_noise(policy, std: float | int) -> Iterator[None]:
    """The policy's terminal_std is `std` inside, and as before behind, whatever happens."""
    usual, policy.terminal_std = policy.terminal_std, std
    try:
        yield
    finally:
        policy.terminal_std = usual


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    most = policy.num_steps - (config.terminal_std == 0)
    if config.trained_actions is not None and not 1 <= config.trained_actions <= most:
        raise ValueError(f"trained_actions is {config.trained_actions}; {policy.num_steps} calls have 1 to {most}.")
    if config.objective == "rebel" and config.group_size % 2:
        raise ValueError(f"group_size is {config.group_size}; REBEL compares samples two by two: give an even number.")
    items = config.num_prompts * config.group_size // (2 if config.objective == "rebel" else 1)
    if config.num_minibatches > items:
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {items} samples or pairs of a round."
        )
    policy.encode(prompts)
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, a ConsistencyPolicy, in place on `reward`, prompts drawn from `prompts`; a `Step` a round.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process rolls out and differentiates its own share of every round. The policy's
    terminal_std is the config's while training, and as before at the end of each round.
    """
    check_policy(policy, "terminal_std")
    with terminal_noise(policy, config.terminal_std):
        check(policy, prompts, config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    statistics = Statistics(last=config.buffer_size)
    run = Run(config, optimizer, generator, resume, [policy], statistics=statistics, reward=reward)
    clip_range, pair = clip_range_of(policy, config), 2 if config.objective == "rebel" else 1
    for number in run.rounds():
        with terminal_noise(policy, config.terminal_std):
            batch = run.draw(prompts, config.num_prompts, config.group_size, unit=pair)
            with torch.no_grad():
                noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
                traj = policy.rollout(batch.own_prompts, noise, reduction=config.reduction)
                rewards = batch.gather(checked(reward, policy.decode(traj.final), batch.own_prompts))
                advantages = prompt_advantages(statistics, batch.prompts, rewards, config.min_count)[batch.own]
                advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)

            progress = 1 - (1 - config.final_lr_fraction) * number / config.num_iterations
            pairs = torch.arange(len(batch), device=policy.device).view(-1, pair)
            for mini in run.minibatches(pairs, config.num_minibatches, batch.own):
                if len(mini.rows):
                    loss, info = round_loss(policy, traj, mini.rows.T.flatten(), advantages, clip_range, config)
                    run.backward(loss, info, mini.share)
                run.update(progress)

        yield run.step(reward_metrics(rewards), reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """H calls of the round's rows, and forward and backward passes of its H - 1 transitions, minibatch by minibatch."""
    rows, actions = config.num_prompts * config.group_size, policy.num_steps - (config.terminal_std == 0)
    actions = min(actions, config.trained_actions or actions)
    backward = [rows // config.num_minibatches * actions] * config.num_minibatches
    return {"forward": [rows] * policy.num_steps, "backward": backward}
