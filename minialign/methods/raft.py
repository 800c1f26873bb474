"""RAFT: reward ranked fine-tuning (Dong et al., TMLR 2023, arXiv 2304.06767).

Sample K answers to each prompt, keep the best, and train on those as on any demonstration; then again, from there. The
reward only ranks. Sampling needs no gradient and the loss no density, so any generator can be trained: language models
on tokens, diffusion models on noise. A round distils the best of K of the model into the model.

    y_1 .. y_K ~ softmax(logits / lambda), for each of b prompts; y* = argmax_k r(x, y_k)      kept_samples, "local"
    the best 1/K of bK answers to as many prompts (LMFlow's default)                           kept_samples, "top"
    r - beta log(p_t(y | x) / p_0(y | x)) ranks instead: it changes who wins, not the loss     log_ratio_of
    -sum_i sum_j log p(y*_ij | x_i, y*_i<j) over the kept answers' tokens, from w_t            supervised_loss
    |noise - noise_pred|^2 on the kept pictures, at drawn levels                               policy.training_error
    p_K(y) = p(y) (F(y)^K - F(y-)^K) / P(r = r(y)): F -> F^K a round, F^(K^T) after T          exact.best_of_n

As in the paper: weights are carried on; losers and earlier rounds are forgotten. As in neither paper nor code: a
fresh Adam each round; ties fall by chance, where argmax takes the first. Not as in
LMFlow's code: no loss on the prompt; `accept` replaces its hand-written discards; `reward` is the mean over all K (its
first sample's has the same expectation, and more noise). The loss is that of the model at temperature 1 whatever
lambda, so lambda < 1 sharpens, even with K = 1. The mean over all tokens is maximum likelihood, up to its scale;
"sequence" is not: tokens of long answers count less. Pictures: the authors' notebook keeps 8 winners in 10
(`keep_winners`); the regression is unguided.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minialign.kernels import group_ranks
from minialign.loop import Batch, Run, Step, check_policy, reward_metrics
from minialign.policies.paths import reference_log_probs
from minialign.rewards import checked
from minialign.settings import Count, Fraction, Limit, NonNegative, Positive, Settings, Share


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 6  # rounds of: sample, rank, fine-tune (paper: until the reward oscillates, 10 to 18)
    num_prompts: Count = 256  # b, prompts drawn per round, over all processes (paper: 2048)
    group_size: Count = 8  # K, samples for each, of which one is kept (paper: 8 to 32); 1 is self-distillation
    strategy: Literal["local", "top"] = "local"  # the best of each prompt's K; the best 1/K over bK prompts
    keep_winners: Share = 1.0  # of the winners, by reward, over all prompts (authors' pictures: .8)
    beta: NonNegative = 0.0  # ranks by r - beta log(p / p_0), reward per nat; of a path nats need a float32 network
    temperature: Positive = 1.0  # lambda, of sampling alone (language; paper: .7 to 1)
    num_tokens: Count = 24  # of an answer at most (language)
    num_epochs: Count = 2  # passes over the kept samples; pictures get new levels and noise each time
    num_minibatches: Count = 4  # optimizer steps per pass
    average: Literal["token", "sequence"] = "token"  # over all tokens kept; within each answer first (language)
    rows_per_pass: Count = 64  # samples per network call: memory against speed, never the result
    steps_per_pass: Count = 4  # denoising steps of each of them, under the reference (beta > 0)
    learning_rate: NonNegative = 1e-3  # Adam (paper: 2e-5)
    final_lr_fraction: Fraction = 1.0  # of it at the end of each round, linearly (paper: 0; authors' code: 1)
    adam_eps: Positive = 1e-8  # a fresh Adam steps as far on rounding errors: 1e-5 over a half-precision network
    max_grad_norm: Limit = 1.0  # l2


def kept_samples(
    rewards: Float[Tensor, "batch"],
    group: Int[Tensor, "batch"],
    allowed: Bool[Tensor, "batch"],
    tiebreak: Float[Tensor, "batch"],
    config: Config,
) -> Bool[Tensor, "batch"]:
    """Which samples are trained on. A group without an allowed one has no winner; "top" ranks over all groups at once.

    Limits: group_size 1 keeps all that is allowed. "local" does not change under r -> a(x) r + c(x), a(x) > 0; "top"
    does, and then prefers easy prompts to good answers.
    """
    everyone = torch.zeros_like(group)
    ranked = torch.where(allowed, rewards, -torch.inf)
    if config.strategy == "local":
        kept = group_ranks(ranked, group, tiebreak) == 0
    else:
        kept = group_ranks(ranked, everyone, tiebreak) < round(len(rewards) / config.group_size)
    kept = kept & allowed
    winners = torch.where(kept, rewards, -torch.inf)
    return kept & (group_ranks(winners, everyone, tiebreak) < (config.keep_winners * kept.sum()).round())


class Sampled(NamedTuple):
    """One process's share of a round: `samples` are what rewards take, `record` responses or a trajectory."""

    samples: Tensor | Sequence[str]
    record: Any


def sampled(policy, prompts: list, noise: Tensor, config: Config) -> Sampled:
    """Answers of a LanguagePolicy, or what a policy that denoises draws; its density is asked for where beta ranks."""
    if hasattr(policy, "generate"):
        responses = policy.generate(prompts, config.num_tokens, noise=noise, temperature=config.temperature)
        return Sampled(responses.texts, responses)
    traj = policy.rollout(prompts, noise, reduction="sum", density=config.beta > 0)
    return Sampled(policy.decode(traj.final), traj)


def log_ratio_of(policy, sampled: Sampled, config: Config) -> Float[Tensor, "own"]:
    """log p(y | x) - log p_0(y | x), nats: of the current weights at temperature 1, over tokens or denoising steps."""
    record = sampled.record
    if not hasattr(policy, "generate"):
        passes = dict(rows_per_pass=config.rows_per_pass, steps_per_pass=config.steps_per_pass)
        log_prob_ref = reference_log_probs(policy, record, reduction="sum", **passes)
        return (record.log_probs - log_prob_ref).sum(1)
    log_prob = record.log_probs if config.temperature == 1 else policy.log_probs(record, temperature=1.0)
    return (log_prob - policy.log_probs(record, temperature=1.0, reference=True)).sum(1)


def supervised_loss(
    log_prob: Float[Tensor, "n t"], lengths: Int[Tensor, "n"], of_all: Int[Tensor, "m"], average: str
) -> Float[Tensor, ""]:
    """-log p of n answers' tokens, their part of the mean over a minibatch whose lengths are `of_all`.

    "token": over all tokens, which is maximum likelihood up to its scale. "sequence": within each answer first.
    """
    if average == "sequence":
        return -(log_prob.sum(1) / lengths).sum() / len(of_all)
    return -log_prob.sum() / of_all.sum()


def losses(policy, record, mini, batch: Batch, lengths: Tensor | None, run: Run, config: Config) -> Iterator[Tensor]:
    """The parts of a minibatch's loss that this process has, `rows_per_pass` rows each; everybody draws all noise."""
    if hasattr(policy, "generate"):
        for rows in mini.rows.split(config.rows_per_pass) if len(mini.rows) else ():
            log_prob = policy.log_probs(record[rows], temperature=1.0)
            yield supervised_loss(log_prob, record.lengths[rows], lengths[mini.everyone], config.average)
        return
    everyone = mini.everyone.sort().values
    levels = policy.draw_levels(len(everyone), run.generator)
    shape = (len(everyone), *record.final.shape[1:])
    noise = torch.randn(shape, generator=run.generator, dtype=record.final.dtype).to(policy.device)
    here = torch.isin(everyone, batch.own)
    parts = zip(*(t.split(config.rows_per_pass) for t in (mini.rows, levels[here], noise[here])), strict=True)
    for rows, level, drawn in parts if len(mini.rows) else ():
        error = policy.training_error(record.final[rows], level, drawn, record.condition[rows], reduction="mean")
        yield error.sum() / len(everyone)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    if not hasattr(policy, "generate"):
        check_policy(policy, "rollout")
    if config.num_minibatches > config.num_prompts:
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {config.num_prompts} samples that a round "
            "keeps, one a prompt."
        )
    policy.encode(prompts)
    if config.beta and not hasattr(policy, "generate"):
        policy.check_density()


def train(
    policy, reward, prompts, config=Config(), generator=None, resume=None, accept: Callable | None = None
) -> Iterator[Step]:
    """Trains `policy`, of language or of images, in place on its own best samples by `reward`; yields a `Step` a round.

    accept(samples, prompts) -> (b,) booleans: what may win; a prompt without such a sample is skipped. It sees every
    round's samples, as `reward` does: where to look for reward hacking. Metrics: `reward` of all samples, `reward_kept`
    of the winners, `kept` the number of them; of answers `length`, `length_kept`, `entropy` (nats an answer, sampled).
    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process samples, scores and differentiates its own share of every round.
    """
    check(policy, prompts, config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=config.adam_eps)
    run = Run(config, optimizer, generator, resume, [policy], reward=reward)
    talks, spread = hasattr(policy, "generate"), config.strategy == "top"
    for _ in run.rounds():
        optimizer.state.clear()  # a fresh Adam: what it remembers is of other data
        size, group_size = config.num_prompts * config.group_size, 1 if spread else config.group_size
        batch = run.draw(prompts, size // group_size, group_size)
        with torch.no_grad():
            shape = (size, config.num_tokens) if talks else (size,)
            noise = policy.draw_noise(*shape, run.generator, rows=batch.own)
            answers = sampled(policy, batch.own_prompts, noise, config)
            scores = checked(reward, answers.samples, batch.own_prompts).to(policy.device)
            allowed = torch.ones_like(scores)
            if accept is not None:
                allowed = checked(accept, answers.samples, batch.own_prompts).to(policy.device)
            log_ratio = log_ratio_of(policy, answers, config) if config.beta else torch.zeros_like(scores)
            rewards, ranked, allowed, log_ratio = (
                batch.gather(t) for t in (scores, scores - config.beta * log_ratio, allowed, log_ratio)
            )
            tiebreak = torch.rand(size, generator=run.generator).to(policy.device)
            kept = kept_samples(ranked, batch.group, allowed > 0, tiebreak, config)
            lengths = batch.gather(answers.record.lengths) if talks else None
            entropy = batch.gather(-answers.record.log_probs.sum(1)) if talks else None

        winners = kept.nonzero().flatten()
        for epoch in range(config.num_epochs if len(winners) else 0):
            minibatches = run.minibatches(winners, config.num_minibatches, batch.own)
            for number, mini in enumerate(minibatches):
                for loss in losses(policy, answers.record, mini, batch, lengths, run, config):
                    run.backward(loss, {"loss": loss})
                progress = (epoch + number / len(minibatches)) / config.num_epochs
                run.update(1 - (1 - config.final_lr_fraction) * progress)

        metrics = reward_metrics(rewards) | {"kept": len(winners)}
        if len(winners):
            metrics["reward_kept"] = rewards[winners].mean()
        if config.beta:
            metrics["kl"] = log_ratio.mean()
        if talks:
            metrics |= {"length": lengths.float().mean(), "longest": lengths.max(), "entropy": entropy.mean()}
            metrics |= {"length_kept": lengths[winners].float().mean()} if len(winners) else {}
        yield run.step(metrics, reward_queries=size)


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """A round's samples, the reference's passes if beta asks for them, and every epoch's over what was kept."""
    rows, kept = config.num_prompts * config.group_size, int(metrics["kept"])
    minibatches = [len(part) for part in torch.arange(kept).tensor_split(config.num_minibatches)]
    chunks = [min(config.rows_per_pass, n - first) for n in minibatches for first in range(0, n, config.rows_per_pass)]
    if hasattr(policy, "generate"):
        forward = [rows] if config.beta else []
        return {"length": int(metrics["longest"]), "answers": rows, "forward": forward,
                "backward": chunks * config.num_epochs}  # fmt: skip
    passes = [min(config.rows_per_pass, rows - first) for first in range(0, rows, config.rows_per_pass)]
    steps = [
        min(config.steps_per_pass, policy.num_actions - i) for i in range(0, policy.num_actions, config.steps_per_pass)
    ]
    under_reference = [n * k for n in passes for k in steps] if config.beta else []
    return {"forward": [rows] * policy.num_steps + under_reference, "backward": chunks * config.num_epochs}
