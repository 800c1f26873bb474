"""DDPO: training diffusion models with reinforcement learning (Black et al., 2023, arXiv 2305.13301), and DPOK's KL
(Fan et al., 2023, arXiv 2305.16381).

A sampler that adds noise is a policy with a density: each denoising transition is a Gaussian whose log-probability we
know. Treat a denoising run as an episode, pay the reward at its end, and do policy gradient on the transitions.

    p(x_{t-1} | x_t, c), sections 4.1-4.2        policy.step, which samples, or scores a given next state
    reward normalised per prompt, section 4.4    PromptStatistics (a running buffer a prompt), or group_advantages
    DDPO_SF, eq. 3                               num_minibatches=1, num_epochs=1: the ratio is 1, plain REINFORCE
    DDPO_IS, eq. 4 with PPO's clip               kernels.clipped_surrogate
    KL(p_theta || p_ref) of a step (DPOK)        policy.step_kl; in DPOK's code, the unweighted error of the noise

As in the authors' code, not the paper: log-probabilities are means over the latent's D elements (`reduction`), the loss
a mean over steps; one AdamW step sees all denoising steps of its trajectories.
As in neither: the steps are not shuffled (their gradients are summed before the one optimizer step, so their order
cannot matter); a deterministic step (std = 0) raises instead of giving nan; the exact KL is the default. DPOK's value
network is left out: prompts have a baseline already.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minialign.kernels import StepOut, at_least_float32, clipped_surrogate, group_advantages, whiten
from minialign.loop import Step, gather_rows, own_rows, pack, sum_gradients, sum_over_processes, timer, unpack
from minialign.rewards import checked


@dataclass(frozen=True)
class Config:
    num_iterations: int = 50  # rounds of: roll out, score, update
    num_prompts: int = 16  # prompts drawn per round, over all processes
    group_size: int = 8  # samples per drawn prompt
    num_minibatches: int = 2  # optimizer steps per pass over the round's samples; 1 is plain REINFORCE (DDPO_SF)
    num_epochs: int = 1  # passes over the round's samples; 1 in the paper
    timestep_fraction: float = 1.0  # share of a trajectory's steps trained on, drawn anew (authors' default: 1)
    steps_per_pass: int = 4  # denoising steps per network call: memory against speed, never the result
    reduction: str = "mean"  # of log-probabilities over the latent's D elements; the paper sums
    clip_range: float | None = None  # on the ratio; None: 1.6 / D, at most 0.2 (authors: 1e-4 at D = 16,384)
    baseline: str = "prompt"  # "prompt": running buffer a prompt; "group": this round's samples of it; "batch": all
    scale_advantages: bool = True  # divide by the std; False keeps the reward's unit, so that beta means reward per nat
    buffer_size: int = 64  # rewards remembered per prompt
    min_count: int = 16  # below so many, a prompt uses the statistics of the whole batch
    advantage_clip: float = 5.0  # in standard deviations (the JAX code: 10)
    beta: float = 0.0  # weight of KL(policy || reference) per step (DPOK); 0 does not evaluate the reference
    kl: str = "exact"  # "exact": of the two Gaussians; "noise_mse": DPOK's code, which weights late steps too little
    learning_rate: float = 3e-4  # AdamW (paper: 1e-5 for all weights, 3e-4 for LoRA)
    warmup_updates: int = 0  # over which the learning rate rises; AdamW's first steps are as long on noise as on signal
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0  # l2


class PromptStatistics:
    """Per-prompt reward statistics over a running buffer (section 4.4; the authors' PerPromptStatTracker).

    First the new rewards enter their prompts' buffers; then each reward is centred and scaled by its prompt's buffer,
    or, while that holds fewer than `min_count`, by the current batch. Population std, + 1e-6.
    """

    def __init__(self, prompts: list[str], buffer_size: int, min_count: int):
        self.min_count = min_count
        self.buffers = {prompt: deque(maxlen=buffer_size) for prompt in prompts}

    def update(self, prompts: list[str], rewards: Tensor, scale: bool = True) -> Tensor:
        """rewards (batch,) in, advantages (batch,) out. A prompt whose rewards are all equal gets exact zeros."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.buffers[prompt].append(reward)
        batch = rewards.cpu().double()
        moments = {}
        for prompt in set(prompts):
            held = self.buffers[prompt]
            values = torch.tensor(held, dtype=torch.float64) if len(held) >= self.min_count else batch
            shifted = values - values[0]  # equal rewards are then exact zeros; rounding would survive the division
            moments[prompt] = (float(values[0] + shifted.mean()), float(shifted.std(correction=0)))
        mean, std = batch.new_tensor([moments[prompt] for prompt in prompts]).unbind(-1)
        return ((batch - mean) / (std + 1e-6) if scale else batch - mean).to(rewards)

    def tensors(self) -> dict[str, Tensor]:
        return {f"buffer.{i}": torch.tensor(list(held)) for i, held in enumerate(self.buffers.values())}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, held in enumerate(self.buffers.values()):
            held.extend(tensors[f"buffer.{i}"].tolist())


def default_clip_range(num_elements: int, reduction: str) -> float:
    """Under "mean" the log-ratio is divided by D, so the authors' 1e-4 at D = 16,384 is 1.6 / D elsewhere."""
    return min(1.6 / num_elements, 0.2) if reduction == "mean" else 0.2


def round_advantages(rewards: Tensor, prompts: list[str], statistics: PromptStatistics, config: Config) -> Tensor:
    """Advantages (batch,) of one round's rewards, by the baseline that `config` names."""
    if config.baseline == "prompt":
        advantages = statistics.update(prompts, rewards, config.scale_advantages)
    elif config.baseline == "group":
        names = list(dict.fromkeys(prompts))
        group = torch.tensor([names.index(prompt) for prompt in prompts], device=rewards.device)
        advantages = group_advantages(rewards, group, scale=config.scale_advantages)
    else:
        advantages = whiten(rewards) if config.scale_advantages else rewards - rewards.mean()
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
    advantages = advantages[rows].repeat_interleave(steps.shape[1])
    loss, info = clipped_surrogate(out.log_prob, log_prob_old, advantages, clip_range)
    if config.beta:
        kl = step_kl(policy, output, states, step, condition, out, config).mean()
        loss, info = loss + config.beta * kl, info | {"kl": kl.detach()}
    return loss, info


def check(policy, prompts: list[str], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    for name, allowed in {
        "baseline": ("prompt", "group", "batch"),
        "kl": ("exact", "noise_mse"),
        "reduction": ("mean", "sum"),
    }.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
    for name in ("num_iterations", "num_prompts", "group_size", "num_minibatches", "num_epochs", "steps_per_pass"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    if not 0 < config.timestep_fraction <= 1:
        raise ValueError(f"timestep_fraction is {config.timestep_fraction}; it must lie in (0, 1].")
    batch_size = config.num_prompts * config.group_size
    if config.num_minibatches > batch_size:
        raise ValueError(f"num_minibatches is {config.num_minibatches}, more than the {batch_size} samples of a round.")
    policy.encode(list(prompts))
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on `reward`, prompts drawn from `prompts`; yields a `Step` an iteration.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `accelerate launch` each process rolls out and differentiates its own share of every round.
    """
    check(policy, prompts, config)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    statistics = PromptStatistics(list(prompts), config.buffer_size, config.min_count)
    num_elements = torch.Size(policy.latent_shape).numel()
    clip_range = default_clip_range(num_elements, config.reduction) if config.clip_range is None else config.clip_range
    batch_size = config.num_prompts * config.group_size
    start = 0
    if resume is not None:
        counts = unpack(resume, parameters, optimizer, generator)
        start, policy.network_evaluations = counts["number"], counts["network_evaluations"]
        statistics.load(resume)
    own = own_rows(batch_size, policy.device)
    updates = start * config.num_epochs * config.num_minibatches

    for number in range(start, config.num_iterations):
        lap = timer()
        drawn = torch.randint(len(prompts), (config.num_prompts,), generator=generator)
        batch = [prompts[i] for i in drawn.tolist() for _ in range(config.group_size)]
        with torch.no_grad():
            noise = policy.draw_noise(batch_size, generator)[own]
            own_prompts = [batch[i] for i in own.tolist()]
            traj = policy.rollout(own_prompts, noise, reduction=config.reduction)
            rewards = gather_rows(checked(reward, policy.decode(traj.final), own_prompts), own, batch_size)
            advantages = round_advantages(rewards, batch, statistics, config)[own]

        infos, norms = [], []
        for _ in range(config.num_epochs):
            shuffled = torch.randperm(batch_size, generator=generator).to(policy.device)
            order = chosen_steps(batch_size, policy.num_steps, config.timestep_fraction, generator)
            order = order.to(policy.device)[own]
            for minibatch in shuffled.tensor_split(config.num_minibatches):
                rows = torch.isin(own, minibatch).nonzero().flatten()
                share = len(rows) / len(minibatch)  # this process's weight in the mean over the global minibatch
                for steps in order[rows].split(config.steps_per_pass, dim=1) if len(rows) else ():
                    loss, info = transition_loss(policy, traj, rows, steps, advantages, clip_range, config)
                    (loss * share * steps.shape[1] / order.shape[1]).backward()
                    infos.append(info)
                sum_gradients(parameters)
                norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                updates += 1
                optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, updates / max(1, config.warmup_updates))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

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
