"""PPO for language models (Ziegler et al., 2019, arXiv 1909.08593; Stiennon et al., 2020, arXiv 2009.01325), and its
relatives without a critic: GRPO (Shao et al., 2024, arXiv 2402.03300), RLOO (Ahmadian et al., 2024, arXiv 2402.14740),
REINFORCE.

Each token is an action. The score of a response is paid at its last token, and every token pays for having moved away
from the reference model. A critic guesses what is still to come, so that a token is blamed for what it changed; where
several responses to a prompt are at hand, their mean score serves instead.

    R_t = -beta (log pi_old - log pi_ref) + [t = T] score                              kernels.token_rewards
    A_t = delta_t + gamma lambda A_{t+1}, delta_t = R_t + gamma V_{t+1} - V_t          kernels.gae
    (A - mean) / std over valid tokens; returns G = A + V before that                  kernels.masked_whiten
    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old                     kernels.clipped_surrogate
    max((V - G)^2, (V_old + clip(V - V_old, -eps_v, eps_v) - G)^2) / 2                 kernels.clipped_value_loss
    beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)                      AdaptiveKL
    GRPO: A_i = (f_i - group mean) / group std; RLOO: f_i - mean of the others         group_estimates
    KL as a loss: k2 = u^2 / 2 descends KL(pi || ref), k3 = e^-u - 1 + u the reverse   kl_loss; u = log pi / pi_ref

As in Ziegler's code: value targets are made before whitening, population variance, KL summed over tokens in the
controller. As in TRL: whitening over the whole round, not the minibatch. As in neither: log-probabilities are those of
the distribution that was sampled (no top-k or top-p; one temperature for sampling, scoring and reference), so no KL
estimate is biased; the learning rate is constant unless told to fall.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from minialign.kernels import (
    clipped_surrogate,
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k2,
    kl_k3,
    masked_whiten,
    token_rewards,
    weighted_sums,
)
from minialign.loop import Batch, Run, Step, check_policy, reward_metrics
from minialign.policies.episodes import critic_values
from minialign.rewards import checked
from minialign.settings import Count, Fraction, Limit, NonNegative, Number, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 100  # rounds of: respond, score, update
    num_prompts: Count = 64  # prompts drawn per round, over all processes
    group_size: Count = 1  # responses to each; more than one for "grpo" and "rloo"
    num_tokens: Count = 24  # of a response at most
    advantage: Literal["gae", "grpo", "rloo", "reinforce"] = "gae"  # PPO's critic; the others have none
    num_minibatches: Count = 1  # optimizer steps per pass over the round
    num_epochs: Count = 4  # passes over the round
    rows_per_pass: Count = 64  # responses per network call: memory against speed, never the result
    beta: NonNegative = 0.05  # KL weight in the token reward, reward per nat
    kl_target: Positive | None = None  # nats a response; None: beta stays
    kl_horizon: Count = 10_000  # responses over which the controller moves beta
    kl_loss: Literal[None, "k2", "k3"] = None  # beta weighs a loss term instead of the reward (GRPO: "k3")
    missing_eos: Number | None = None  # score of a response without end (TRL: -1); None: it is scored as it is
    temperature: Positive = 1.0  # of sampling, scoring and reference alike
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    clip_range: Limit = 0.2  # on the ratio of each token
    value_clip_range: Limit = 0.2
    value_coefficient: NonNegative = 0.1
    whiten: bool = True  # advantages ("gae" and "reinforce"), over the round's valid tokens
    average: Literal["token", "sequence"] = "token"  # mean over all tokens; within each response first (GRPO's paper)
    learning_rate: NonNegative = 1e-3  # Adam (tiny models; 1e-5 to 1e-6 for large ones)
    final_lr_fraction: Fraction = 1.0  # of it at the end, linearly
    adam_eps: Positive = 1e-5
    max_grad_norm: Limit = 1.0  # l2


class AdaptiveKL:
    """Ziegler's controller: beta grows where a response's KL exceeds the target, by at most .2 n / horizon a round."""

    def __init__(self, beta: float, target: float | None, horizon: int):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, num_responses: int) -> None:
        """kl: mean over responses of the sum over tokens, nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * num_responses / self.horizon

    def tensors(self) -> dict[str, Tensor]:
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.beta = float(tensors["beta"])


def group_estimates(
    scores: Float[Tensor, "b"], group: Int[Tensor, "b"], kind: str, group_size: int
) -> Float[Tensor, "b"]:
    """A response's advantage without a critic.

    "grpo": centred and scaled within its group; "rloo": minus the mean of the OTHERS of its group, unbiased, which is
    the centred score times n / (n - 1); "reinforce": minus the mean of the round.
    """
    if kind == "grpo":
        return group_advantages(scores, group)
    if kind == "rloo":
        return group_advantages(scores, group, scale=False) * group_size / (group_size - 1)
    return group_advantages(scores, torch.zeros_like(group), scale=False)


def response_loss(policy, responses, rows: Tensor, batch: dict[str, Tensor], beta: float, config: Config):
    """(loss, metrics) of responses `rows`, from one network call; sums over tokens times `batch["weight"]`.

    The weights of all tokens of a minibatch sum to 1, so that losses of its parts add up, on any process.
    """
    part = responses[rows]
    log_prob, values, _ = policy.score(part, values=config.advantage == "gae")
    weight = batch["weight"][rows]
    loss, info = clipped_surrogate(log_prob, part.log_probs, batch["advantages"][rows], config.clip_range)
    loss, info = (weight * loss).sum(), weighted_sums(info, weight)
    if values is not None:
        error = clipped_value_loss(
            values[..., 0], batch["values"][rows], batch["returns"][rows], config.value_clip_range
        )
        value_loss = (weight * error).sum()
        loss, info = loss + config.value_coefficient * value_loss, info | {"value_loss": value_loss.detach()}
    if config.kl_loss:
        gap = log_prob - batch["log_prob_ref"][rows]
        kl = (weight * (kl_k2(gap) if config.kl_loss == "k2" else kl_k3(gap))).sum()
        loss = loss + beta * kl
    return loss, info


def round_estimates(policy, responses, scores: Tensor, batch: Batch, beta: float, config: Config):
    """What a round's update needs, computed before it: advantages (b, t), values, returns, log_prob_ref, and the KL.

    Whitening and group statistics run over the whole round, so those rows are gathered from all processes.
    """
    mask, log_prob_ref = responses.mask, policy.log_probs(responses, reference=True)
    gap = torch.where(mask, responses.log_probs - log_prob_ref, 0.0)
    estimates = {"log_prob_ref": log_prob_ref}
    token_beta = 0.0 if config.kl_loss else beta
    if config.advantage == "gae":
        rewards = token_rewards(scores[batch.own], responses.log_probs, log_prob_ref, mask, token_beta)
        values = critic_values(policy, responses, 1)[..., 0]
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        estimates |= {"values": values, "returns": returns}
    else:  # one number a response; the KL that its tokens pay counts as part of its score
        paid = scores - token_beta * batch.gather(gap.sum(1))
        own = group_estimates(paid, batch.group, config.advantage, config.group_size)[batch.own]
        advantages = own.unsqueeze(1).expand(mask.shape)
    if config.whiten and config.advantage in ("gae", "reinforce"):
        gap_right = (0, config.num_tokens - mask.shape[1])  # processes pad to the longest of their own responses
        everything, everywhere = (batch.gather(pad(t.to(gap), gap_right)) for t in (advantages, mask))
        advantages = masked_whiten(everything, everywhere.bool())[batch.own, : mask.shape[1]]
    return estimates | {"advantages": torch.where(mask, advantages, 0.0)}, batch.gather(gap.sum(1))


def token_weights(mask: Tensor, lengths: Tensor, own: Tensor, everyone: Tensor, average: str) -> Tensor:
    """Weights (b, t) of this process's tokens, which over the minibatch `everyone`, on all processes, sum to 1."""
    taken = torch.isin(own, everyone).unsqueeze(1) & mask
    if average == "sequence":
        return taken / lengths[own].unsqueeze(1) / len(everyone)
    return taken / lengths[everyone].sum()


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "generate")
    if config.advantage in ("grpo", "rloo") and config.group_size < 2:
        raise ValueError(f"advantage={config.advantage!r} compares responses to one prompt: set group_size above 1.")
    if config.num_minibatches > config.num_prompts * config.group_size:
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {config.num_prompts * config.group_size} "
            "responses of a round."
        )
    policy.encode(prompts)


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, a LanguagePolicy, in place on `reward(texts, prompts)`; yields a `Step` a round.

    A critic is added if the config needs one and the policy has none (one head on its trunk). generator: a CPU
    torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint. Under
    `torchrun` each process generates, scores and differentiates its own share of every round.
    """
    check(policy, prompts, config)
    if config.advantage == "gae" and not policy.value_parameters():
        policy.add_value_heads(1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=config.adam_eps)
    controller = AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
    run = Run(config, optimizer, generator, resume, [policy], controller=controller, reward=reward)
    for number in run.rounds():
        batch, beta = run.draw(prompts, config.num_prompts, config.group_size), controller.beta
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), config.num_tokens, run.generator, rows=batch.own)
            own_prompts = batch.own_prompts
            responses = policy.generate(own_prompts, config.num_tokens, noise=noise, temperature=config.temperature)
            scores = checked(reward, responses.texts, own_prompts).to(policy.device)
            if config.missing_eos is not None:
                scores = torch.where(responses.ended, scores, config.missing_eos)
            scores, lengths = batch.gather(scores), batch.gather(responses.lengths)
            estimates, kl = round_estimates(policy, responses, scores, batch, beta, config)

        progress = 1 - (1 - config.final_lr_fraction) * number / config.num_iterations
        for _ in range(config.num_epochs):
            for mini in run.minibatches(len(batch), config.num_minibatches, batch.own):
                weight = token_weights(responses.mask, lengths, batch.own, mini.everyone, config.average)
                for rows in mini.rows.split(config.rows_per_pass) if len(mini.rows) else ():
                    loss, info = response_loss(policy, responses, rows, estimates | {"weight": weight}, beta, config)
                    run.backward(loss, info)
                run.update(progress)

        controller.update(float(kl.mean()), len(batch))
        extent = {"length": lengths.float().mean(), "longest": lengths.max()}
        metrics = reward_metrics(scores) | {"kl": kl.mean(), "beta": beta} | extent
        yield run.step(metrics, reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def num_value_heads(config: Config) -> int:
    return int(config.advantage == "gae")


def floor(policy, config: Config, metrics: dict) -> dict:
    """A round's answers word by word, the reference's and the critic's pass, and every epoch's through both."""
    rows = config.num_prompts * config.group_size
    passes = [min(config.rows_per_pass, rows - first) for first in range(0, rows, config.rows_per_pass)]
    return {"length": int(metrics["longest"]), "forward": [rows], "backward": passes * config.num_epochs}
