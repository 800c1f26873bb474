"""PPO for language models (Ziegler et al., 2019, arXiv 1909.08593; Stiennon et al., 2020, arXiv 2009.01325), and its
relatives without a critic: GRPO (Shao et al., 2024, arXiv 2402.03300), RLOO (Ahmadian et al., 2024, arXiv 2402.14740),
REINFORCE.

Each token is an action. The score of a response is paid at its last token, and every token pays for having moved away
from the reference model. A critic guesses what is still to come, so that a token is blamed for what it changed; where
several responses to a prompt are at hand, their mean score serves instead.

    R_t = -beta (log pi_old - log pi_ref) + [t = T] score               kernels.token_rewards
    A_t by GAE, whitened over valid tokens; returns A + V before that   kernels.gae, kernels.masked_whiten
    clipped policy loss and clipped value loss                          response_loss
    beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)       AdaptiveKL
    A_i = (f_i - group mean) / group std;  f_i - mean of the others     group_estimates
    KL as a loss: k2 descends KL(pi || ref), k3 the reverse             config.kl_loss

As in Ziegler's code: value targets are made before whitening, population variance, KL summed over tokens in the
controller. As in TRL: whitening over the whole round, not the minibatch. As in neither: log-probabilities are those of
the distribution that was sampled (no top-k or top-p; one temperature for sampling, scoring and reference), so no KL
estimate is biased; the learning rate is constant unless told to fall.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from minialign.kernels import (
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k2,
    kl_k3,
    masked_whiten,
    token_rewards,
)
from minialign.loop import (
    Step,
    gather_rows,
    own_rows,
    pack,
    sum_gradients,
    sum_over_processes,
    sum_parts,
    timer,
    unpack,
)
from minialign.rewards import checked


@dataclass(frozen=True)
class Config:
    num_iterations: int = 100  # rounds of: respond, score, update
    num_prompts: int = 64  # prompts drawn per round, over all processes
    group_size: int = 1  # responses to each; more than one for "grpo" and "rloo"
    num_tokens: int = 24  # of a response at most
    advantage: str = "gae"  # "gae": PPO's critic; "grpo", "rloo", "reinforce": none
    num_minibatches: int = 1  # optimizer steps per pass over the round
    num_epochs: int = 4  # passes over the round
    rows_per_pass: int = 64  # responses per network call: memory against speed, never the result
    beta: float = 0.05  # KL weight in the token reward, reward per nat
    kl_target: float | None = None  # nats a response; None: beta stays
    kl_horizon: int = 10_000  # responses over which the controller moves beta
    kl_loss: str | None = None  # "k2" or "k3": beta weighs a loss term instead of the reward (GRPO: "k3")
    missing_eos: float | None = None  # score of a response without end (TRL: -1); None: it is scored as it is
    temperature: float = 1.0  # of sampling, scoring and reference alike
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2  # on the ratio of each token
    value_clip_range: float = 0.2
    value_coefficient: float = 0.1
    whiten: bool = True  # advantages ("gae" and "reinforce"), over the round's valid tokens
    average: str = "token"  # "token": mean over all tokens; "sequence": mean within each response first (GRPO's paper)
    learning_rate: float = 1e-3  # Adam (tiny models; 1e-5 to 1e-6 for large ones)
    final_lr_fraction: float = 1.0  # of it at the end, linearly
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0  # l2


class AdaptiveKL:
    """Ziegler's controller: beta grows where a response's KL exceeds the target, by at most .2 n / horizon a round."""

    def __init__(self, beta: float, target: float | None, horizon: int):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, num_responses: int) -> None:
        """kl: mean over responses of the sum over tokens, nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * num_responses / self.horizon


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
    return scores - scores.mean()


def response_loss(policy, responses, rows: Tensor, batch: dict[str, Tensor], beta: float, config: Config):
    """(loss, metrics) of responses `rows`, from one network call; sums over tokens times `batch["weight"]`.

    The weights of all tokens of a minibatch sum to 1, so that losses of its parts add up, on any process.
    """
    part = responses[rows]
    log_prob, values, _ = policy.score(part, values=config.advantage == "gae")
    mask, weight = part.mask, batch["weight"][rows]
    log_ratio = torch.where(mask, log_prob - part.log_probs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    advantages = batch["advantages"][rows]
    loss = (weight * torch.maximum(-advantages * ratio, -advantages * clipped)).sum()
    with torch.no_grad():
        info = {
            "approx_kl": (weight * kl_k3(-log_ratio)).sum(),
            "clip_fraction": (weight * (ratio != clipped)).sum(),
        }
    if values is not None:
        error = clipped_value_loss(
            values[..., 0], batch["values"][rows], batch["returns"][rows], config.value_clip_range
        )
        value_loss = (weight * error).sum()
        loss, info = loss + config.value_coefficient * value_loss, info | {"value_loss": value_loss.detach()}
    if config.kl_loss:
        gap = torch.where(mask, log_prob - batch["log_prob_ref"][rows], 0.0)
        kl = (weight * (kl_k2(gap) if config.kl_loss == "k2" else kl_k3(gap))).sum()
        loss = loss + beta * kl
    return loss, info


def round_estimates(policy, responses, scores: Tensor, group: Tensor, own: Tensor, beta: float, config: Config):
    """What a round's update needs, computed before it: advantages (b, t), values, returns, log_prob_ref, and the KL.

    Whitening and group statistics run over the whole round, so those rows are gathered from all processes.
    """
    mask, num_rows = responses.mask, len(group)
    log_prob_ref = policy.log_probs(responses, reference=True)
    gap = torch.where(mask, responses.log_probs - log_prob_ref, 0.0)
    batch = {"log_prob_ref": log_prob_ref}
    token_beta = 0.0 if config.kl_loss else beta
    if config.advantage == "gae":
        rewards = token_rewards(scores[own], responses.log_probs, log_prob_ref, mask, token_beta)
        values = policy.values(responses)[..., 0]
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        batch |= {"values": values, "returns": returns}
    else:  # one number a response; the KL that its tokens pay counts as part of its score
        paid = scores - token_beta * gather_rows(gap.sum(1), own, num_rows)
        estimates = group_estimates(paid, group, config.advantage, config.group_size)[own]
        advantages = estimates.unsqueeze(1).expand(mask.shape)
    if config.whiten and config.advantage in ("gae", "reinforce"):
        gap_right = (0, config.num_tokens - mask.shape[1])  # processes pad to the longest of their own responses
        everything, everywhere = (gather_rows(pad(t.to(gap), gap_right), own, num_rows) for t in (advantages, mask))
        advantages = masked_whiten(everything, everywhere.bool())[own, : mask.shape[1]]
    return batch | {"advantages": torch.where(mask, advantages, 0.0)}, gap.sum(1)


def check(policy, prompts: list[str], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    for name, allowed in {
        "advantage": ("gae", "grpo", "rloo", "reinforce"),
        "kl_loss": (None, "k2", "k3"),
        "average": ("token", "sequence"),
    }.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
    for name in ("num_iterations", "num_prompts", "group_size", "num_tokens", "num_minibatches", "num_epochs",
                 "rows_per_pass"):  # fmt: skip
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    if config.advantage in ("grpo", "rloo") and config.group_size < 2:
        raise ValueError(f"advantage={config.advantage!r} compares responses to one prompt: set group_size above 1.")
    if config.num_minibatches > config.num_prompts * config.group_size:
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {config.num_prompts * config.group_size} "
            "responses of a round."
        )
    policy.encode(list(prompts))


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, a LanguagePolicy, in place on `reward(texts, prompts)`; yields a `Step` a round.

    A critic is added if the config needs one and the policy has none (one head on its trunk). generator: a CPU
    torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint. Under
    `accelerate launch` each process generates, scores and differentiates its own share of every round.
    """
    check(policy, prompts, config)
    if config.advantage == "gae" and not policy.value_parameters():
        policy.add_value_heads(1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = policy.parameters()
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=config.adam_eps)
    controller = AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
    batch_size = config.num_prompts * config.group_size
    start = 0
    if resume is not None:
        counts = unpack(resume, parameters, optimizer, generator)
        start, policy.network_evaluations = counts["number"], counts["network_evaluations"]
        controller.beta = float(resume["beta"])
    own = own_rows(batch_size, policy.device)
    group = torch.arange(config.num_prompts, device=policy.device).repeat_interleave(config.group_size)

    for number in range(start, config.num_iterations):
        lap = timer()
        drawn = torch.randint(len(prompts), (config.num_prompts,), generator=generator)
        asked = [prompts[i] for i in drawn.tolist() for _ in range(config.group_size)]
        with torch.no_grad():
            noise = policy.draw_noise(batch_size, config.num_tokens, generator)[own.cpu()]
            own_prompts = [asked[i] for i in own.tolist()]
            responses = policy.generate(own_prompts, config.num_tokens, noise=noise, temperature=config.temperature)
            scores = checked(reward, responses.texts, own_prompts).to(policy.device)
            if config.missing_eos is not None:
                scores = torch.where(responses.ended, scores, config.missing_eos)
            scores = gather_rows(scores, own, batch_size)
            lengths = gather_rows(responses.lengths, own, batch_size)
            batch, kl = round_estimates(policy, responses, scores, group, own, controller.beta, config)
            kl = gather_rows(kl, own, batch_size)

        infos, norms = [], []
        progress = 1 - (1 - config.final_lr_fraction) * number / config.num_iterations
        optimizer.param_groups[0]["lr"] = config.learning_rate * progress
        for _ in range(config.num_epochs):
            for minibatch in torch.randperm(batch_size, generator=generator).tensor_split(config.num_minibatches):
                mine = torch.isin(own, minibatch.to(policy.device))
                taken = mine.unsqueeze(1) & responses.mask
                # weights of the whole minibatch sum to 1, over all processes
                per_row = 1 / lengths[own].unsqueeze(1) / len(minibatch)
                per_token = 1 / lengths[minibatch.to(policy.device)].sum()
                batch["weight"] = taken * (per_row if config.average == "sequence" else per_token)
                for rows in mine.nonzero().flatten().split(config.rows_per_pass):
                    loss, info = response_loss(policy, responses, rows, batch, controller.beta, config)
                    loss.backward()
                    infos.append(info)
                sum_gradients(parameters)
                norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        passes = config.num_epochs * config.num_minibatches  # the weights of each sum to 1
        names = ["approx_kl", "clip_fraction", *(["value_loss"] if config.advantage == "gae" else [])]
        metrics = {name: total / passes for name, total in sum_parts(infos, names, policy.device).items()}
        metrics |= {
            "reward": scores.mean(), "reward_std": scores.std(correction=0), "kl": kl.mean(), "beta": controller.beta,
            "length": lengths.float().mean(), "longest": lengths.max(), "grad_norm": torch.stack(norms).mean(),
        }  # fmt: skip
        controller.update(float(kl.mean()), batch_size)
        evaluations = int(sum_over_processes(torch.tensor(policy.network_evaluations, device=policy.device)))
        yield Step(
            number,
            metrics,
            evaluations,
            (number + 1) * batch_size,
            lap(),
            lambda done=number + 1: (
                pack(parameters, optimizer, generator, number=done, network_evaluations=policy.network_evaluations)
                | {"beta": torch.tensor(controller.beta, dtype=torch.float64)}
            ),
        )
