"""DRAGON: distributional rewards optimize diffusion generative models (Bai et al., 2025, arXiv 2504.15217).

Much of what one wants of a generator is a property of a crowd: to look like a collection, to be diverse. Generate two
samples a prompt, sort them into two sets so that the first scores better, and pull the model towards the first set and
away from the second with a preference loss: nothing is differentiated through the reward, whatever it looks at.

    r(x, c), and r(x | exemplars), of single samples         any reward; exemplars.mahalanobis_to, frechet_of_each
    r(D) = -FAD(D, exemplars), Vendi(D), of a set            any reward of a set; exemplars.frechet_to, mmd_to, vendi
    D+, D- by instance: the better of each pair, and the other              split_by_instance
    D+, D- by distribution: greedy swaps that raise r(D+)                   split_by_swaps, Sets
    s = |eps - eps_theta|^2 - |eps - eps_ref|^2; log-ratio -s / 2           kernels.denoising_log_ratio
    -log sigmoid(-beta/2 (s(x+) - s(x-))), one t and eps a pair             kernels.dpo_loss
    1 - U(-beta/2 s(x+) - z) and 1 - U(beta/2 s(x-) + z), U = sigmoid       kernels.kto_loss, kto_reference_point

The authors' code is not public, and the text of the paper was not before us: how the sets are built, and the losses'
details, follow its abstract, captions and tables. In particular ours: a pair that the reward cannot tell apart teaches
nothing (so a constant reward moves no weight); "unpaired" splits one pool over all prompts by rank, or swaps chance
partners; t and eps are shared by the members of a pair under KTO, too. The reference stays the base model; one that is
refreshed is policy.merge() between two runs. beta weighs a log-ratio that is known up to a factor, which the kind of
error sets: on velocities it is 1 where on noise, in the same world, it is some 10.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minialign.exemplars import FeatureReward
from minialign.kernels import denoising_log_ratio, dpo_loss, kto_loss, kto_reference_point, means
from minialign.loop import Run, Step, check_policy, own_rows, reward_metrics, sum_over_processes
from minialign.measure import RunningMoments
from minialign.rewards import checked, checked_set
from minialign.settings import Count, Limit, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 24  # rounds of: generate, split, contrast
    num_prompts: Count = 192  # prompts drawn per round, over all processes: as many pairs, so large is a set
    selection: Literal["instance", "distribution"] = "instance"  # a reward of samples; a reward of a set
    paired: bool = True  # the two samples of a prompt compete; False: all of the round do
    num_passes: Count = 1  # of the greedy swaps over all pairs, "distribution"; more end nearer a local optimum
    objective: Literal["dpo", "kto"] = "dpo"  # contrast of each pair; each sample against a reference point
    beta: Positive = 1.0  # reward per nat: small moves far from the base, too small leaves the data
    reduction: Literal["sum", "mean"] = "sum"  # of squared errors over the latent's D elements; "mean": beta times D
    rollout_steps: Count | None = None  # sampling steps of the demonstrations; None: the policy's own
    num_updates: Count = 60  # optimizer steps per round
    minibatch_size: Count = 256  # pairs per optimizer step, drawn with replacement, each at a noise level of its own
    learning_rate: NonNegative = 1e-3  # AdamW
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


class Split(NamedTuple):
    """Rows of D+ and of D-, pair by pair, and which pairs the reward could tell apart."""

    chosen: Int[Tensor, "pairs"]
    rejected: Int[Tensor, "pairs"]
    decided: Bool[Tensor, "pairs"]


def partners(num_pairs: int, paired: bool, generator: torch.Generator) -> Int[Tensor, "two pairs"]:
    """Who competes with whom among 2 n rows: neighbours, the two samples of a prompt; or a random matching of all."""
    rows = torch.arange(2 * num_pairs) if paired else torch.randperm(2 * num_pairs, generator=generator)
    return rows.view(num_pairs, 2).T.contiguous()


def split_by_instance(scores: Float[Tensor, "rows"], pairs: Int[Tensor, "two pairs"], paired: bool) -> Split:
    """The better of each pair; or, unpaired, the better half of all rows, matched with the other half by chance.

    Ties stay as they came, undecided. Scaling or shifting the scores changes nothing.
    """
    if not paired:
        rows = pairs.T.flatten()  # in an order of chance, so a stable sort breaks ties and matches by it
        best = torch.zeros_like(rows, dtype=torch.bool)
        best[scores[rows].argsort(descending=True, stable=True)[: len(rows) // 2]] = True
        pairs = torch.stack([rows[best], rows[~best]])
    first, second = scores[pairs]
    better = second > first
    chosen, rejected = torch.where(better, pairs[1], pairs[0]), torch.where(better, pairs[0], pairs[1])
    return Split(chosen, rejected, first != second)


class Sets:
    """One sample of each pair is inside the set, the other outside; `swap` exchanges them, `value` scores the inside.

    A reward that needs the moments of features alone is asked in O(d^2), not O(n d^2): see `RunningMoments`.
    """

    def __init__(self, reward, samples: Tensor, prompts: Sequence[Hashable], pairs: Int[Tensor, "two pairs"]):
        self.reward, self.samples, self.prompts = reward, samples, prompts
        self.inside, self.outside = pairs.clone()
        of_moments = isinstance(reward, FeatureReward) and reward.of_moments is not None
        self.moments = RunningMoments(samples[self.inside]) if of_moments else None

    def score(self, rows: Int[Tensor, "rows"]) -> float:
        """Of any rows, after the check at the border."""
        prompts = [self.prompts[row] for row in rows.tolist()]
        return float(checked_set(self.reward, self.samples[rows.to(self.samples.device)], prompts))

    def value(self) -> float:
        if self.moments is None:
            return self.score(self.inside)
        return float(self.reward.of_moments(self.moments.mean, self.moments.covariance))

    def swap(self, pair: int) -> None:
        old, new = self.inside[pair].item(), self.outside[pair].item()
        self.inside[pair], self.outside[pair] = new, old
        if self.moments is not None:
            self.moments.swap(self.samples[old], self.samples[new])


def split_by_swaps(sets: Sets, order: Int[Tensor, "pairs"], num_passes: int = 1) -> Split:
    """Coordinate ascent on the 2^n ways to choose one of each pair: a swap stays if the inside then scores higher.

    So r(D+) never falls. n = 1: the better sample; a reward that is a sum over samples: the better of each pair. One
    pass is n evaluations, one after another. A swap that changes nothing is taken back, and its pair is undecided.
    """
    best, decided = sets.value(), torch.zeros(len(order), dtype=torch.bool)
    for pair in order.repeat(num_passes).tolist():
        sets.swap(pair)
        value = sets.value()
        decided[pair] = value != best
        if value > best:
            best = value
        else:
            sets.swap(pair)
    return Split(sets.inside, sets.outside, decided)


def split(reward, samples: Tensor, prompts: Sequence[Hashable], config: Config, generator: torch.Generator):
    """(Split, metrics, evaluations of sets) of samples (2 n, ...), the two of a prompt side by side.

    samples: what the reward sees, its scores under "instance"; the same on all processes, and so is the generator.
    """
    pairs = partners(len(samples) // 2, config.paired, generator)
    if config.selection == "instance":
        scores = samples.cpu()
        found = split_by_instance(scores, pairs, config.paired)
        metrics = reward_metrics(scores)
        sides = {"reward_chosen": scores[found.chosen].mean(), "reward_rejected": scores[found.rejected].mean()}
        return found, metrics | sides, 0
    sets = Sets(reward, samples, prompts, pairs)
    metrics = {"reward": sets.score(torch.arange(len(samples)))}  # first of all: it refuses nan, and wrong shapes
    found = split_by_swaps(sets, torch.randperm(pairs.shape[1], generator=generator), config.num_passes)
    metrics |= {"reward_chosen": sets.score(found.chosen), "reward_rejected": sets.score(found.rejected)}
    return found, metrics, config.num_passes * pairs.shape[1] + 4


def log_ratios(
    policy, latents: Tensor, condition, levels: Tensor, noise: Tensor, reduction: str
) -> Float[Tensor, "two_pairs"]:
    """-s_theta / 2 of pairs: latents (2 k, *latent) and their conditions, all of D+ first; levels (k,), noise (k, ...).

    A pair shares its noise level and its noise. 0 at theta = reference, which has no gradient.
    """
    levels, noise = levels.repeat(2), torch.cat([noise, noise])
    error = policy.training_error(latents, levels, noise, condition, reduction=reduction)
    with torch.no_grad():
        error_ref = policy.training_error(latents, levels, noise, condition, reduction=reduction, reference=True)
    return denoising_log_ratio(error, error_ref)


def contrast(log_ratio: Float[Tensor, "two_pairs"], config: Config) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean loss of this process's pairs, and its metrics; log 2 ("dpo") or 1/2 ("kto") at theta = reference.

    All processes must call it together, be it with no pair: KTO's reference point is that of the whole minibatch.
    """
    chosen, rejected = log_ratio.chunk(2)
    if config.objective == "dpo":
        loss = dpo_loss(chosen, rejected, config.beta)
    else:
        total = torch.stack([log_ratio.detach().sum(), log_ratio.new_tensor(len(log_ratio))])
        total = sum_over_processes(total)
        point = kto_reference_point(total[0] / total[1], config.beta)
        loss = (kto_loss(chosen, torch.ones_like(chosen), point, config.beta)
                + kto_loss(rejected, torch.zeros_like(rejected), point, config.beta)) / 2  # fmt: skip
    won = (chosen > rejected).to(loss.dtype)
    return loss.mean(), means({"loss": loss, "accuracy": won, "log_ratio": (chosen + rejected) / 2})


@contextmanager
def sampled_in(policy, num_steps: int | None) -> Iterator[None]:
    """The policy samples in so many steps inside, and as before behind, whatever happens; None: as before."""
    usual = policy.num_steps
    if num_steps is not None:
        policy.set_num_steps(num_steps)
    try:
        yield
    finally:
        if num_steps is not None:
            policy.set_num_steps(usual)


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on `reward`, of samples or, selection="distribution", of a set; a `Step` a round.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    A set is all of a round, whatever its prompts. Reward queries are samples scored; `set_queries` counts the sets.
    Under `torchrun` each process draws, encodes and differentiates its own share; all of them score the sets.
    """
    check_policy(policy, "rollout")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config, optimizer, generator, resume, [policy], reward=reward)
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts, 2, unit=2)
        condition = policy.encode(batch.prompts)
        with torch.no_grad(), sampled_in(policy, config.rollout_steps):
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            own = policy.rollout(condition[batch.own], noise, density=False).final
            latents, samples, judge = batch.gather(own), policy.decode(own), reward
            if config.selection == "instance":
                samples = checked(reward, samples, batch.own_prompts)
            elif isinstance(reward, FeatureReward):  # each sample is encoded once, not once a set
                samples, judge = reward.encode(samples).cpu(), reward.on_features()
            found, metrics, asked = split(judge, batch.gather(samples), batch.prompts, config, run.generator)

        usable = found.decided.nonzero().squeeze(1)
        for _ in range(config.num_updates if len(usable) else 0):
            drawn = usable[torch.randint(len(usable), (config.minibatch_size,), generator=run.generator)]
            levels = policy.draw_levels(len(drawn), run.generator)
            shape = (len(drawn), *latents.shape[1:])
            noise = torch.randn(shape, generator=run.generator, dtype=latents.dtype).to(policy.device)
            here = torch.isin(drawn, own_rows(config.num_prompts)).nonzero().squeeze(1)
            rows = torch.cat([found.chosen[drawn[here]], found.rejected[drawn[here]]]).to(policy.device)
            here, log_ratio = here.to(policy.device), latents.new_zeros(0)
            if len(here):
                given = latents[rows], condition[rows], levels[here], noise[here]
                log_ratio = log_ratios(policy, *given, config.reduction)
            loss, info = contrast(log_ratio, config)
            if len(here):
                run.backward(loss, info, len(here) / len(drawn))
            run.update()
        costs = {"set_queries": asked} if asked else {}
        yield run.step(metrics | {"decided": found.decided.float().mean()}, reward_queries=len(batch), **costs)


# On the command line ------------------------------------------------------------------------------------------------


def takes_sets(config: Config) -> bool:
    """Whether the reward is one of a set."""
    return config.selection == "distribution"


def floor(policy, config: Config, metrics: dict) -> dict:
    """S calls of the round's rows; an update's rows forward and backward, and forward under the reference."""
    rows, steps = 2 * config.minibatch_size, config.rollout_steps or policy.num_steps
    forward = [2 * config.num_prompts] * steps + [rows] * config.num_updates
    return {"forward": forward, "backward": [rows] * config.num_updates}
