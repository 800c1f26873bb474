"""Constrained RLHF (Moskovitz et al., 2023, arXiv 2310.04373): enough of each reward, not ever more of their sum.

Each learned reward is worth having up to a point, its proxy point theta_i; beyond, it is over-optimised. A weight says
how much more of something one wants, for ever; a constraint says how much is enough. So the task is to stay near the
base model, each reward is a constraint, and the Lagrange multipliers, learned beside the policy, are the weights that
one would have had to guess. They change as training goes.

    PPO       sum_i w_i r_i - beta KL                          variant "fixed" on rewards.weighted_sum
    PPO-SAT   -sum_i (r_i - theta_i)^2 per episode - beta KL   variant "fixed" on rewards.Saturated
    mu-PPO    max -KL, v_i >= theta_i, l = sigmoid(mu)         variant "mu"
    xi-PPO    max -KL, v_i = theta_i, l = tanh(xi)             variant "xi"
    All-PPO   max sum_i v_i - KL, v_i <= theta_i               variant "all"
    the dual  A_0 + sum_i mu_i A_i, mu_i >= 0                  "mu" with squash=False, standardise=False
    max(-A rho, -A clip(rho, 1 - eps, 1 + eps))                kernels.clipped_surrogate
    A = (N - sum l) A_0 + sum_i l_i A_i                        mixing_weights, mix_advantages
    mu <- mu - lr dl/dmu (v_i - theta_i)                       multiplier_step
    theta from runs: where a fitted evaluation peaks           search.fit_proxy_points
    theta by search                                            search.nelder_mead

Every A_i is standardised by itself BEFORE mixing, so multipliers weigh signals of unit variance and the KL's own
coefficient cancels. As in the paper: N + 1 value heads, the last one for the KL. As in neither: violations are means
over episodes, not tokens (long answers would count more, sheet trap 10); standardising runs over the whole round; value
losses are clipped; the baseline may be the round's own mean at each action ("batch", "prompt"), which needs no critic.
The official code's swapped thresholds, its slice of the value heads and its unsquashed mixing (traps 1 to 3) are not
kept. Beyond the paper: an action may be a denoising step as well as a token (policies/episodes.py).

Three limits that the paper does not name. A tilt by lambda gives A_0 about |lambda| times the reward's spread, so with
one reward standardised signals balance at |l| = N - sum l whatever lambda is: multipliers know the direction of the
tilt and hardly its size. Little but noise and a small multiplier_lr damps v's swings round theta, then (sheet, trap 8).
With tanh(xi) < 0 the right side is always the larger: with one reward or two, xi-PPO cannot hold one BELOW the base
model's value. And where one of two constraints is slack its l goes to 0, the KL weighs 2 - l > 1 > l, and mu-PPO cannot
hold the other: it falls back to the base. The dual (squash=False, standardise=False) has none of these limits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from minialign.kernels import (
    clipped_surrogate,
    clipped_value_loss,
    gae,
    group_baselines,
    standardise_heads,
    token_rewards,
    weighted_sums,
)
from minialign.loop import Batch, Run, Step
from minialign.methods.ddpo import default_clip_range
from minialign.policies.episodes import Episodes, denoise, respond
from minialign.rewards import checked
from minialign.settings import Count, Fraction, Limit, NonNegative, Number, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    thresholds: tuple[Number, ...] = ()  # theta, one for each reward, in its units; none for "fixed"
    variant: Literal["mu", "xi", "all", "fixed"] = "mu"  # at least theta; exactly; at most, all being the task; PPO
    squash: bool = True  # multipliers through sigmoid or tanh; False: the textbook's dual
    standardise: bool = True  # each advantage by itself, before mixing; False: multipliers are the tilt itself
    multiplier_lr: NonNegative = 0.1  # SGD, one step after every policy step; .5 oscillates
    multiplier_momentum: Fraction = 0.1
    multiplier_max_norm: Limit = 0.5  # l2, of the multipliers' gradient
    beta: NonNegative = 0.02  # reward per nat inside each reward of "all" and "fixed"; it cancels elsewhere
    num_iterations: Count = 100  # rounds of: sample, score, update
    num_prompts: Count = 128  # prompts drawn per round, over all processes
    group_size: Count = 1  # samples for each
    num_tokens: Count = 24  # of a response at most (language policies)
    num_minibatches: Count = 1  # optimizer steps per pass over the round
    num_epochs: Count = 1  # passes over the round (paper: 5)
    rows_per_pass: Count = 64  # samples per network call: memory against speed, never the result
    steps_per_pass: Count = 4  # denoising steps of each of them per network call (diffusion policies)
    baseline: Literal["critic", "batch", "prompt"] = "critic"  # N + 1 heads; mean of the round, of its prompt
    reduction: Literal["mean", "sum"] = "mean"  # of the ratio's log-probabilities, as ddpo; KLs are always sums
    temperature: Positive = 1.0
    gamma: Fraction = 1.0  # authors: .99, with which the solution is no longer an I-projection
    gae_lambda: Fraction = 0.95
    clip_range: Limit | None = None  # on the ratio of each action; None: .2, of denoising steps 1.6 / D
    value_clip_range: Limit = 0.2
    value_coefficient: NonNegative = 0.5  # of half the squared error of the rewards' heads (authors: of the whole)
    kl_value_coefficient: NonNegative = 0.2  # the same of the KL's head
    learning_rate: NonNegative = 1e-3  # AdamW (paper: 1e-6 for GPT-2; 0.02 for a table)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Limit = 0.5  # l2


def squashed(raw: Float[Tensor, "n"], variant: str, squash: bool = True) -> Float[Tensor, "n"]:
    """Multipliers l: sigmoid in (0, 1), for "xi" tanh in (-1, 1); as they are without squashing."""
    if not squash:
        return raw
    return raw.tanh() if variant == "xi" else raw.sigmoid()


def mixing_weights(
    multipliers: Float[Tensor, "n"], variant: str, squash: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """(weight of the KL's advantage, weights of the rewards' advantages).

    "mu", "xi": N - sum l, l. "all": the KL stands inside the rewards; 0, N - sum l - l_i. Unsquashed: 1, l ("all": 1 -
    l_i). "fixed": 0, 1. At l = 1 for all, xi gives the KL weight 0, at l = -1 twice N.
    """
    if variant == "fixed":
        return torch.zeros_like(multipliers.sum()), torch.ones_like(multipliers)
    rest = len(multipliers) - multipliers.sum() if squash else torch.ones_like(multipliers.sum())
    if variant == "all":
        return torch.zeros_like(rest), rest - multipliers
    return rest, multipliers


def mix_advantages(
    advantages: Float[Tensor, "b t heads"], weights: tuple[Float[Tensor, ""], Float[Tensor, "n"]]
) -> Float[Tensor, "b t"]:
    """(N - sum l) A_0 + sum_i l_i A_i, of advantages standardised before; the KL's head is the last."""
    kl_weight, reward_weights = weights
    return advantages[..., :-1] @ reward_weights.to(advantages) + kl_weight.to(advantages) * advantages[..., -1]


def multiplier_step(
    raw: Float[Tensor, "n"], velocity: Float[Tensor, "n"], violation: Float[Tensor, "n"], config: Config
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(raw, velocity) after one step of SGD with momentum down sum_i l_i (v_i - theta_i).

    violation: v - theta. Too little reward raises l, enough lowers it ("all": the other way round). From raw = 0 with
    lr .1 and violation .1: -.0025 (sigmoid), -.01 (tanh). Unsquashed multipliers of inequalities stay at 0 or above.
    """
    slope = torch.ones_like(raw)
    if config.squash:
        level = squashed(raw, config.variant)
        slope = 1 - level**2 if config.variant == "xi" else level * (1 - level)
    gradient = slope * (-violation if config.variant == "all" else violation)
    gradient = gradient * (config.multiplier_max_norm / gradient.norm().clamp_min(1e-12)).clamp_max(1.0)
    velocity = config.multiplier_momentum * velocity + gradient
    raw, free = raw - config.multiplier_lr * velocity, config.squash or config.variant == "xi"
    return raw if free else raw.clamp_min(0), velocity


class Multipliers:
    """Raw multipliers and their momentum, saved with the run; `levels` are what weighs the advantages."""

    def __init__(self, raw: Float[Tensor, "n"], config: Config):
        self.raw, self.velocity, self.config = raw, torch.zeros_like(raw), config

    @property
    def levels(self) -> Float[Tensor, "n"]:
        return squashed(self.raw, self.config.variant, self.config.squash)

    @property
    def weights(self) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
        return mixing_weights(self.levels, self.config.variant, self.config.squash)

    def step(self, violation: Float[Tensor, "n"]) -> None:
        self.raw, self.velocity = multiplier_step(self.raw, self.velocity, violation, self.config)

    def tensors(self) -> dict[str, Tensor]:
        return {"raw": self.raw, "velocity": self.velocity}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.raw, self.velocity = (tensors[name].to(self.raw.device) for name in ("raw", "velocity"))


def round_advantages(episodes: Episodes, scores: Float[Tensor, "round n"], batch: Batch, config: Config):
    """(advantages (b, t, N + 1), returns, KL of each episode of the round), before the update.

    Means and spreads are of the whole round, so rows are gathered from all processes, padded to the longest.
    """
    mask, log_ref, own = episodes.mask, episodes.log_prob_ref, batch.own
    inside = config.beta if config.variant in ("all", "fixed") else 0.0
    heads = [token_rewards(s, episodes.log_probs, log_ref, mask, inside) for s in scores[own].unbind(1)]
    heads.append(token_rewards(torch.zeros_like(scores[own, 0]), episodes.log_probs, log_ref, mask, 1.0))
    rewards = torch.stack(heads, -1)
    right = (0, int(batch.gather(mask.sum(1)).max()) - mask.shape[1])
    whole_mask = batch.gather(pad(mask.to(rewards), right)).bool()
    if config.baseline == "critic":
        values = episodes.values
    else:
        to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, config.gamma, 1.0)
        group = batch.drawn if config.baseline == "prompt" else torch.zeros_like(batch.drawn)
        whole = batch.gather(pad(to_come, (0, 0, *right)))
        values = group_baselines(whole, whole_mask, group)[own, : mask.shape[1]]
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    if config.standardise:
        # a reward that is the same for all, and the KL of a policy that has not moved, are rounding errors by now
        floor = torch.cat([(1e-5 * scores.abs().amax(0)).clamp_min(1e-8), scores.new_full((1,), 1e-3)])
        whole = batch.gather(pad(advantages, (0, 0, *right)))
        advantages = standardise_heads(whole, whole_mask, floor)[own, : mask.shape[1]]
    kl = torch.where(mask, episodes.log_probs - log_ref, 0.0).sum(1)
    return advantages, returns, batch.gather(kl)


def episode_loss(episodes: Episodes, rows: Tensor, places: Tensor, batch: dict[str, Tensor], config: Config):
    """(loss, metrics) of those actions of episodes `rows`, from one network call: clipped surrogate and value losses.

    Sums times `batch["weight"]`, whose entries over a minibatch sum to 1, so that losses of its parts add up.
    """
    b, t = rows.unsqueeze(1), places
    log_prob, values = episodes.score(rows, places)
    elements = episodes.num_elements if config.reduction == "mean" else 1
    usual = default_clip_range(episodes.num_elements, config.reduction)
    clip_range = usual if config.clip_range is None else config.clip_range
    old, mixed = episodes.log_probs[b, t] / elements, batch["mixed"][b, t]
    loss, info = clipped_surrogate(log_prob / elements, old, mixed, clip_range)
    weight = batch["weight"][b, t]
    loss, info = (weight * loss).sum(), weighted_sums(info, weight)
    if values is not None:
        error = clipped_value_loss(values, episodes.values[rows], batch["returns"][rows], config.value_clip_range)
        terms = (weight.unsqueeze(-1) * error).sum((0, 1))
        value_loss = config.value_coefficient * terms[:-1].mean() + config.kl_value_coefficient * terms[-1]
        loss, info = loss + value_loss, info | {"value_loss": value_loss.detach()}
    return loss, info


def check(policy, rewards: Sequence[Callable], prompts: Sequence[str], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    if config.variant == "fixed" and (len(rewards) != 1 or config.thresholds):
        raise ValueError(
            f"variant 'fixed' takes one reward and no thresholds, not {len(rewards)} and {len(config.thresholds)}: "
            "pass [rewards.weighted_sum(...)] or [Saturated(rewards, thresholds)]."
        )
    if config.variant != "fixed" and (len(config.thresholds) != len(rewards) or not rewards):
        raise ValueError(
            f"there are {len(rewards)} rewards and {len(config.thresholds)} thresholds: give one threshold for each "
            "reward, in the same order."
        )
    round_size = config.num_prompts * config.group_size
    if config.num_minibatches > round_size:
        raise ValueError(f"num_minibatches is {config.num_minibatches}, more than the {round_size} samples of a round.")
    if config.baseline == "prompt" and config.group_size < 2:
        raise ValueError("baseline 'prompt' compares samples of one prompt: set group_size above 1.")
    policy.encode(prompts)
    if not hasattr(policy, "generate"):
        if config.baseline == "critic":
            raise ValueError("denoising steps have no value heads here: set baseline to 'prompt' or 'batch'.")
        policy.check_density()


def train(policy, rewards: Sequence[Callable], prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, of language or images, in place to bring `rewards` to their thresholds; yields a `Step` a round.

    rewards: callables `reward(samples, prompts) -> (b,)`, one for each of config.thresholds. Metrics: `reward` (their
    sum), `reward_0`, `multiplier_0`, ..., `kl`. With baseline "critic" N + 1 heads are added to the trunk if the policy
    has none; the paper's critic is a copy of the model: policy.add_value_heads(N + 1, own_trunk=True).
    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint;
    thresholds may be others, which is how a warm-started search goes on.
    """
    check(policy, rewards, prompts, config)
    count, device, talks = len(rewards), policy.device, hasattr(policy, "generate")
    heads = count + 1 if config.baseline == "critic" else 0
    if heads and not policy.value_parameters():
        policy.add_value_heads(heads)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    thresholds = torch.tensor(config.thresholds, device=device, dtype=torch.float32)
    first = 0.01 * torch.randn((), generator=generator) if config.squash else torch.tensor(0.5)
    multipliers = Multipliers(first.to(device).expand(count).clone(), config)
    kept = {f"reward_{i}": reward for i, reward in enumerate(rewards)}
    run = Run(config, optimizer, generator, resume, [policy], multipliers=multipliers, **kept)
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts, config.group_size)
        own_prompts = batch.own_prompts
        with torch.no_grad():
            size = (len(batch), config.num_tokens) if talks else (len(batch),)
            noise = policy.draw_noise(*size, run.generator, rows=batch.own)
            if talks:
                episodes = respond(policy, own_prompts, noise, config.num_tokens, config.temperature, heads)
            else:
                episodes = denoise(policy, own_prompts, noise, config.rows_per_pass, config.steps_per_pass)
            scores = torch.stack([checked(reward, episodes.samples, own_prompts).to(device) for reward in rewards], 1)
            scores, lengths = batch.gather(scores), batch.gather(episodes.mask.sum(1))
            advantages, returns, kl = round_advantages(episodes, scores, batch, config)

        for _ in range(config.num_epochs):
            for mini in run.minibatches(len(batch), config.num_minibatches, batch.own):
                taken = torch.isin(batch.own, mini.everyone).unsqueeze(1) & episodes.mask
                update = {"returns": returns, "weight": taken / lengths[mini.everyone].sum()}
                update["mixed"] = mix_advantages(advantages, multipliers.weights)
                for rows in mini.rows.split(config.rows_per_pass) if len(mini.rows) else ():
                    for places in episodes.places:
                        run.backward(*episode_loss(episodes, rows, places, update, config))
                run.update()
                if config.variant != "fixed":
                    multipliers.step(scores[mini.everyone].mean(0) - thresholds)

        metrics = {"reward": scores.sum(1).mean(), "kl": kl.mean(), "length": lengths.float().mean()}
        metrics |= {f"reward_{i}": score for i, score in enumerate(scores.mean(0))}
        if config.variant != "fixed":
            metrics |= {f"multiplier_{i}": level for i, level in enumerate(multipliers.levels)}
        yield run.step(metrics, reward_queries=len(batch) * count)


def num_value_heads(config: Config) -> int:
    """Heads of the critic that `minialign run` gives a language model: one a reward, and one for the KL."""
    return max(len(config.thresholds), 1) + 1 if config.baseline == "critic" else 0
