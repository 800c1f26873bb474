"""RLCM: reinforcement learning of consistency models (Oertell et al., RLC 2024, arXiv 2404.03673).

A consistency model draws in H calls, 1 to 16: denoise with f, re-noise to the next level, and so on. Re-noising is
Gaussian, so f plus its noise is a policy with a density over H - 1 actions, and DDPO's clipped policy gradient applies:
fewer calls a sample, fewer transitions to share the credit.

    pi(x_{j+1} | x_j, c) = N(sqrt(a_{j+1}) f_theta(x_j, tau_j, c), (1 - a_{j+1}) I)      policy.step (ConsistencyPolicy)
    reward of f_theta(x_{H-1}, tau_{H-1}, c), normalised per prompt                      ddpo.PromptStatistics
    clipped surrogate, eq. 1                                                             kernels.clipped_surrogate
    REBEL, in the authors' repository                                                    rebel_loss

The last call is deterministic: no gradient reaches f at the last level, and it changes only because it shares weights
with the others. The authors' code adds noise behind it and scores that noise, although the reward is paid before it: a
term of mean zero, pure variance, left out here. `terminal_std` (ours, off by default) adds a little noise and pays the
reward behind it, so that the last call learns, too. H = 1 has no action and is refused.
As in the code, not the paper: noise levels preserve variance, and mean and std are those of the NEXT level.
`trained_actions` (ours, off by default) gives a gradient to the first actions alone, where those decide the reward: a
gradient costs three calls, so on `shapes`, where the first call places the objects, it nearly halves a round.
As in neither: REBEL's log-ratios are summed within each sample (the code sums over the minibatch as well).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import clipped_surrogate
from minialign.loop import Step, gather_rows, own_rows, pack, sum_gradients, sum_over_processes, timer, unpack
from minialign.methods.ddpo import PromptStatistics, default_clip_range
from minialign.rewards import checked


@dataclass(frozen=True)
class Config:
    num_iterations: int = 100  # rounds of: roll out, score, update (authors: 100 epochs of 10 batches)
    num_prompts: int = 16  # prompts drawn per round, over all processes
    group_size: int = 8  # samples per drawn prompt; even for "rebel", which compares two of them
    num_minibatches: int = 4  # optimizer steps per round
    objective: str = "ppo"  # "ppo": the paper; "rebel": regress the difference of two samples' advantages
    rebel_eta: float = 1.0  # "rebel": advantage per nat of log-ratio
    trained_actions: int | None = None  # the first so many get a gradient; None: all, as in the paper
    terminal_std: float = 0.0  # noise behind the last call while training; 0: the paper
    reduction: str = "mean"  # of log-probabilities over the latent's D elements
    clip_range: float | None = None  # on the ratio; None: 1.6 / D, at most 0.2 (authors: 1e-4 at D = 36,864)
    buffer_size: int = 64  # rewards remembered per prompt (authors: 16 or 32)
    min_count: int = 16  # below so many, a prompt uses the statistics of the whole batch
    advantage_clip: float = 10.0  # in standard deviations
    learning_rate: float = 1e-4  # Adam, LoRA
    final_lr_fraction: float = 2 / 3  # of it at the end, linearly
    warmup_updates: int = 0  # over which the learning rate rises
    max_grad_norm: float = 5.0  # l2


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
    return loss, info


def check(policy, prompts: list[str], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    for name, allowed in {"objective": ("ppo", "rebel"), "reduction": ("mean", "sum")}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
    for name in ("num_iterations", "num_prompts", "group_size", "num_minibatches"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    if config.terminal_std < 0:
        raise ValueError(f"terminal_std is {config.terminal_std}; it is a standard deviation: 0 or more.")
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
    policy.encode(list(prompts))
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, a ConsistencyPolicy, in place on `reward`, prompts drawn from `prompts`; a `Step` a round.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `accelerate launch` each process rolls out and differentiates its own share of every round. The policy's
    terminal_std is the config's while training, and as before at the end of each round.
    """
    usual, policy.terminal_std = policy.terminal_std, config.terminal_std
    try:
        check(policy, prompts, config)
    finally:
        policy.terminal_std = usual
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = policy.parameters()
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    statistics = PromptStatistics(list(prompts), config.buffer_size, config.min_count)
    num_elements = torch.Size(policy.latent_shape).numel()
    clip_range = default_clip_range(num_elements, config.reduction) if config.clip_range is None else config.clip_range
    pair = 2 if config.objective == "rebel" else 1
    batch_size = config.num_prompts * config.group_size
    start = 0
    if resume is not None:
        counts = unpack(resume, parameters, optimizer, generator)
        start, policy.network_evaluations = counts["number"], counts["network_evaluations"]
        statistics.load(resume)
    own_items = own_rows(batch_size // pair, policy.device)
    own = (own_items.unsqueeze(1) * pair + torch.arange(pair, device=policy.device)).flatten()
    updates = start * config.num_minibatches

    for number in range(start, config.num_iterations):
        lap, policy.terminal_std = timer(), config.terminal_std
        drawn = torch.randint(len(prompts), (config.num_prompts,), generator=generator)
        batch = [prompts[i] for i in drawn.tolist() for _ in range(config.group_size)]
        with torch.no_grad():
            noise = policy.draw_noise(batch_size, generator)[own]
            own_prompts = [batch[i] for i in own.tolist()]
            traj = policy.rollout(own_prompts, noise, reduction=config.reduction)
            rewards = gather_rows(checked(reward, policy.decode(traj.final), own_prompts), own, batch_size)
            advantages = statistics.update(batch, rewards)[own].clamp(-config.advantage_clip, config.advantage_clip)

        infos, norms = [], []
        progress = 1 - (1 - config.final_lr_fraction) * number / config.num_iterations
        for minibatch in torch.randperm(batch_size // pair, generator=generator).tensor_split(config.num_minibatches):
            mine = torch.isin(own_items, minibatch.to(policy.device)).nonzero().flatten()
            share = len(mine) / len(minibatch)  # this process's weight in the mean over the global minibatch
            if len(mine):
                rows = torch.cat([mine * pair + i for i in range(pair)])
                loss, info = round_loss(policy, traj, rows, advantages, clip_range, config)
                (loss * share).backward()
                infos.append(info)
            sum_gradients(parameters)
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            updates += 1
            warm = min(1, updates / max(1, config.warmup_updates))
            optimizer.param_groups[0]["lr"] = config.learning_rate * progress * warm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        policy.terminal_std = usual

        metrics = {name: torch.stack([info[name] for info in infos]).mean() for name in infos[0]}
        metrics |= {
            "reward": rewards.mean(),
            "reward_std": rewards.std(correction=0),
            "grad_norm": torch.stack(norms).mean(),
        }
        evaluations = int(sum_over_processes(torch.tensor(policy.network_evaluations, device=policy.device)))
        yield Step(
            number,
            metrics,
            evaluations,
            (number + 1) * batch_size,
            lap(),
            lambda done=number + 1: (
                pack(parameters, optimizer, generator, number=done, network_evaluations=policy.network_evaluations)
                | statistics.tensors()
            ),
        )
