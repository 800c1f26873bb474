"""FIND: learning the initial noise distribution with policy optimisation (Chen et al., ACM MM 2024, arXiv 2407.19453).

No weight moves. For each prompt the Gaussian that the initial noise is drawn from is learned: some regions of noise
space decode to what is wanted, and probability goes there. The sampler is one black-box step of a bandit: the action is
the noise z, the reward that of the sample it becomes, so there is no path to store and no credit to assign.

    pi_phi(z) = N(mu, diag(sigma^2)), one of each prompt, (0, 1) at first    policies.NoisePolicy
    A = r - V(phi, c): "dynamic reward calibration"                          Calibration
    L_V = (V(phi, c) - r)^2 on the fresh rewards, before A is formed         Calibration, baseline="value"
    rho = pi_phi(z) / pi_old(z), max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) kernels.clipped_surrogate
    KL(pi_phi || N(0, I)), the pull towards the usual noise                  policy.noise_kl
    mu^2 + (sigma - 1)^2 in its place, in the authors' code                  moment_distance, kl="moments"
    earlier samples re-used, "historical data"                               Buffer, buffer_rounds

As in the authors' code: log-probabilities and KL are means over the latent's D elements by default (a tempered ratio,
hence the wide clip); its weights 10 (reward) and 0.01 (KL) are beta = 0.001, for Adam does not see a common factor.
Not as there: pi_old is the law that drew z, not for ever N(0, I) (ratio_reference="initial"); the clip has PPO's
minimum, without which a sample beyond it is frozen on the wrong side; each z has its own reward, not the oldest one
stored; several updates a round; gradients are clipped. One prompt's V is a number that drifts: a moving average, the
default, is V without a network.

A law is learned for its prompt and its sampler (steps, guidance, eta). At eta = 0 the noise decides the whole sample.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from minialign.checkpoint import pack, unpack
from minialign.kernels import at_least_float32, clipped_surrogate, diagonal_log_prob, means
from minialign.loop import Run, Step, check_policy, num_processes, reward_metrics
from minialign.policies.initial_noise import NoisePolicy
from minialign.rewards import checked
from minialign.settings import Count, Fraction, Limit, NonNegative, Settings
from minialign.statistics import Moments


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 50  # rounds of: draw noise, score its samples, update (authors: 150 to 300)
    group_size: Count = 16  # samples per prompt and round; every prompt has its turn in each (authors: 1)
    num_epochs: Count = 3  # optimizer steps per round, each on all of the buffer; no network is called (authors: 1)
    buffer_rounds: Count = 1  # rounds whose samples are used; 1 is plain PPO
    baseline: Literal["ema", "value", "batch", "none"] = "ema"  # V: moving average; network; mean of the round; 0
    ema_decay: Fraction = 0.9  # "ema"; it starts at the first round's mean
    value_learning_rate: NonNegative = 1e-2  # "value": Adam (authors: 1e-4)
    value_updates: Count = 5  # "value": steps per round
    ratio_reference: Literal["rollout", "initial"] = "rollout"  # pi_old; "initial" is the authors' code
    clip_range: Limit = 0.2  # on the ratio; math.inf: none
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities and KL over the latent's D elements
    beta: NonNegative = 0.002  # weight of the KL: reward per nat, whatever the reduction, for both have the same
    kl: Literal["exact", "moments"] = "exact"  # to N(0, I); the authors' code
    learning_rate: NonNegative = 0.02  # Adam, on mean and log std; about the move of each coordinate per step
    max_grad_norm: Limit = 1.0  # l2, of all prompts together


def find_loss(
    log_prob: Float[Tensor, "n"],
    log_prob_old: Float[Tensor, "n"],
    advantages: Float[Tensor, "n"],
    kl: Float[Tensor, "prompts"],
    clip_range: float | int,
    beta: float | int,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """-mean min(A rho, A clip(rho)) + beta mean KL: the loss of the laws, samples and prompts each averaged.

    Limits: at rho = 1 its gradient is REINFORCE's with a baseline, and clipping does nothing; with A = 0 only the KL is
    left, whose gradient is zero at N(0, I).
    """
    surrogate, info = clipped_surrogate(log_prob, log_prob_old, advantages, clip_range)
    return surrogate.mean() + beta * kl.mean(), means(info)


def moment_distance(
    mean: Float[Tensor, "n *latent"], log_std: Float[Tensor, "n *latent"], reduction: str
) -> Float[Tensor, "n"]:
    """mu^2 + (sigma - 1)^2 an element: what the authors' code calls KL. Near (0, 1) the mean's part is twice the KL's,
    the std's part equal to second order; a std that vanishes costs it 1, and the KL everything."""
    elements = at_least_float32(mean) ** 2 + torch.expm1(at_least_float32(log_std)) ** 2
    return reduce(elements, "n ... -> n", reduction)


def pull(policy: NoisePolicy, rows: Tensor, config: Config) -> Float[Tensor, "prompts"]:
    """How far the laws in `rows` are from N(0, I), as `config.kl` measures it."""
    if config.kl == "moments":
        return moment_distance(policy.mean[rows], policy.log_std[rows], config.reduction)
    return policy.noise_kl(rows, config.reduction)


# What a law is expected to earn ---------------------------------------------------------------------------------------


class ValueNetwork(nn.Sequential):
    """V(phi, c): (mu, sigma, prompt) -> 256 -> 256 -> 256 -> 1 with ReLU, as the authors'; 0 at first.

    The prompt is one-hot among the policy's, where theirs has CLIP's text embedding.
    """

    def __init__(self, policy: NoisePolicy):
        sizes = [2 * policy.mean[0].numel() + len(policy.prompts), 256, 256, 256]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*layers, nn.Linear(sizes[-1], 1))
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)
        self.to(policy.mean)

    def forward(self, policy: NoisePolicy) -> Float[Tensor, "prompts"]:
        mean, std = policy.mean.detach().flatten(1), policy.log_std.detach().exp().flatten(1)
        return super().forward(torch.cat([mean, std, torch.eye(len(mean)).to(mean)], 1)).squeeze(1)


class Calibration:
    """V of each prompt's current law, (prompts,), by `config.baseline`. Every process makes the same one."""

    def __init__(self, policy: NoisePolicy, config: Config):
        self.policy, self.config = policy, config
        self.values = torch.full((len(policy.prompts),), torch.nan, device=policy.device)
        self.network = None
        if config.baseline == "value":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.network = ValueNetwork(policy)
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.value_learning_rate)

    def update(self, rewards: Float[Tensor, "n"], rows: Tensor) -> Float[Tensor, "prompts"]:
        """Takes the rewards of a round's fresh samples, of the laws in `rows` (n,), in, and gives the values.

        A stale or offset V would make every sample a good one, or a bad one: so it learns before it is used.
        """
        round_means = Moments.by_index(rewards, rows, len(self.values))
        seen = round_means.count > 0
        if self.config.baseline == "value":
            for _ in range(self.config.value_updates):
                loss = (self.network(self.policy)[rows] - rewards).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            with torch.no_grad():
                self.values = self.network(self.policy).to(rewards)
        elif self.config.baseline == "none":
            self.values = torch.zeros_like(self.values)
        else:
            decay = self.config.ema_decay if self.config.baseline == "ema" else 0.0
            before = torch.where(self.values.isnan(), round_means.mean, self.values)
            self.values = torch.where(seen, before + (1 - decay) * (round_means.mean - before), self.values)
        return self.values

    def tensors(self) -> dict[str, Tensor]:
        network = {}
        if self.network is not None:
            network = pack(list(self.network.parameters()), self.optimizer, torch.Generator(), number=0)
        return {"values": self.values} | network

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.values = tensors["values"].to(self.values)
        if self.network is not None:
            unpack(tensors, list(self.network.parameters()), self.optimizer, torch.Generator())


class Samples(NamedTuple):
    """Noise that was drawn, (n, *latent), the reward of what it became, its law's row, and its log-density then."""

    latents: Tensor
    rewards: Tensor
    rows: Tensor
    log_prob_old: Tensor


class Buffer:
    """The samples of the last rounds, all processes' on each: they are noise and numbers, and small."""

    def __init__(self, num_rounds: int):
        self.num_rounds, self.samples = num_rounds, None

    def push(self, new: Samples) -> Samples:
        """All that is held, the new ones included."""
        if self.samples is not None and self.num_rounds > 1:
            keep = (self.num_rounds - 1) * len(new.rows)
            new = Samples(*(torch.cat([a[-keep:].to(b), b]) for a, b in zip(self.samples, new, strict=True)))
        self.samples = new
        return new

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.samples is None or self.num_rounds == 1 else self.samples._asdict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.samples = Samples(**{name: value.clone() for name, value in tensors.items()}) if tensors else None


# The loop -------------------------------------------------------------------------------------------------------------


def wrap(policy, prompts: Sequence[Hashable]) -> NoisePolicy:
    """What is trained in the place of the policy's weights."""
    return NoisePolicy(policy, prompts)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "noise_log_prob")
    policy.encode(prompts)
    unknown = [prompt for prompt in prompts if prompt not in policy.prompts]
    if unknown:
        raise ValueError(f"prompt {unknown[0]!r} has no law: make the NoisePolicy with all prompts that are to learn.")
    if config.baseline == "batch" and config.group_size == 1:
        raise ValueError("baseline 'batch' with group_size 1: each reward is its own mean, and every advantage is 0.")


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains the laws of `policy`, a NoisePolicy, in place on `reward`, for each of `prompts`; yields a `Step` a round.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process samples its own share of a round; the update, which calls no network, is everybody's.
    """
    check(policy, prompts, config)
    prompts = list(dict.fromkeys(prompts))
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    calibration, buffer = Calibration(policy, config), Buffer(config.buffer_rounds)
    run = Run(config, optimizer, generator, resume, [policy], calibration=calibration, buffer=buffer, reward=reward)
    learning = policy.rows(prompts)
    for _ in run.rounds():
        batch = run.draw(prompts, None, config.group_size)
        with torch.no_grad():
            noise = policy.shifted(batch.own_prompts, policy.draw_noise(len(batch), run.generator, rows=batch.own))
            samples = policy.sampler.sample(batch.own_prompts, noise)
            rewards = batch.gather(checked(reward, samples, batch.own_prompts))
            latents, rows = batch.gather(noise[:, 0]), learning[batch.drawn]
            if config.ratio_reference == "initial":
                log_prob_old = diagonal_log_prob(latents, *(torch.zeros_like(latents),) * 2, config.reduction)
            else:
                log_prob_old = policy.noise_log_prob(latents, rows, config.reduction)
        values = calibration.update(rewards, rows)
        held = buffer.push(Samples(latents, rewards, rows, log_prob_old))

        for _ in range(config.num_epochs):
            log_prob = policy.noise_log_prob(held.latents, held.rows, config.reduction)
            kl, advantages = pull(policy, learning, config), held.rewards - values[held.rows]
            loss, info = find_loss(log_prob, held.log_prob_old, advantages, kl, config.clip_range, config.beta)
            run.backward(loss, info, 1 / num_processes())
            run.update()

        with torch.no_grad():
            law = {"kl": policy.noise_kl(learning, "sum").mean(), "std": policy.log_std[learning].exp().mean()}
        yield run.step(reward_metrics(rewards) | law | {"value": values[learning].mean()}, reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """The sampler's passes of a round's rows, the decoder's with them, and no backward one."""
    rows = config.group_size * len(policy.prompts)
    return {"forward": [rows] * policy.num_steps, "backward": [], "decode": rows}
