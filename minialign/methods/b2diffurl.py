"""B2-DiffuRL: reinforcement learning of diffusion models on sparse rewards (Hu et al., CVPR 2025, arXiv 2503.11240).

DDPO pays every denoising step the reward of the final image, also the steps that had no part in it. Two changes to how
data are collected share the credit out better. Backward progressive training: train only the last `window` steps, and
let the window grow towards the noise. Branch-based sampling: grow `num_branches` continuations from one prefix, so that
they differ only in what the window did, and train on the best and the worst of each branch.

    w_k = first + floor(k (last - first + 1) / stages), the last w_k steps are trained   progressive_window
    one prefix, b continuations: (S - w) + b w network evaluations, not b S             branch_rollout
    z = (R - mean_c) / (std_c + 1e-8), over a prompt's last stages                       history_zscore
    best of a branch if z >= .5, worst if z < -.5                                        select_extremes
    max(-z rho, -z clip(rho, 1 - eps, 1 + eps)), DDPO's loss                             objective_loss
    z_i - mean of the other branches, advantage="branch"                                 branch_advantage
    -log sigmoid(beta (log rho_best - log rho_worst)), objective="pairwise"              pairwise_loss

As in the authors' code: the branch only chooses the images, their advantage is the prompt's z-score, which still holds
the luck of the prefix. As in the abstract: branches are compared with each other, advantage="branch". It is an unbiased
baseline only if all branches are trained on (select="all"); keeping the extremes is not: which image is kept depends on
its own reward. As in neither: minibatches are shares of what was kept, so that no leftover image is dropped; the window
may start anywhere (the authors' 14 of 20 steps is no "backward from the end", and there branching costs variance: see
chapter 11). Without branching or thresholds this is DDPO, the same numbers from the same trajectories.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from minialign.kernels import at_least_float32, clipped_surrogate, means
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.methods.ddpo import clip_range_of
from minialign.policies.trajectory import Trajectory
from minialign.rewards import checked
from minialign.settings import Count, Limit, Natural, NonNegative, Number, Positive, Settings
from minialign.statistics import Statistics


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 100  # stages of: branch, score, select, update; the window's schedule is spread over them
    num_prompts: Count = 256  # prompts drawn per stage, over all processes, each the root of one group of branches
    num_branches: Count = 5  # continuations of one prefix
    backward_progressive: bool = True  # False: every stage trains all steps, and branches share only the first noise
    branch_sampling: bool = True  # False: the same number of independent trajectories, and trains on all of them
    first_window: Count = 14  # trained last steps at the first stage (authors: 14 of 20)
    last_window: Count | None = None  # at the last stages; None: all steps
    advantage: Literal["global", "branch"] = "global"  # z of the prompt (authors' code); less its branch's mean
    select: Literal["extremes", "all"] = "extremes"  # best and worst of a branch, past the thresholds
    positive_threshold: Number = 0.5  # the best is kept from here up; of z, or of the branch-relative z
    negative_threshold: Number = -0.5  # the worst is kept below
    history_stages: Natural = 8  # earlier stages whose rewards enter a prompt's mean and std, beside the current one
    objective: Literal["clip", "pairwise"] = "clip"  # DDPO's clipped surrogate; best against worst (with "extremes")
    pair_beta: Positive = 1.0  # "pairwise": how soon a pair counts as won, per nat (or nat an element) of log-ratio
    num_minibatches: Count = 4  # optimizer steps per pass over the kept images
    num_epochs: Count = 2  # passes over the kept images
    steps_per_pass: Count = 4  # denoising steps per network call: memory against speed, never the result
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities over the latent's D elements
    clip_range: Limit | None = None  # on the ratio; None: ddpo.default_clip_range (authors: .1 at D = 16,384: no clip)
    advantage_clip: Limit = 5.0  # in standard deviations
    learning_rate: NonNegative = 1e-4  # AdamW, LoRA
    warmup_updates: Natural = 0  # over which the learning rate rises
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


def progressive_window(stage: int, num_stages: int, first: int, last: int) -> int:
    """How many of the last denoising steps stage 0 to num_stages - 1 trains: from `first` to `last`, in equal parts."""
    return first + stage * (last - first + 1) // num_stages


def branch_rollout(
    policy, prompts: list[str], noise: Float[Tensor, "n ..."], window: int, num_branches: int, reduction: str = "mean"
) -> Trajectory:
    """The last `window` steps of num_branches continuations of each prompt's prefix, as a trajectory of n rows.

    prompts: one a group, n / num_branches of them. noise: from `policy.draw_noise(n)`; rows of a group lie side by
    side, their prefix uses the noise of its first row. Costs (S - w) + b w network evaluations a group.
    """
    condition, split = policy.encode(prompts), policy.num_actions - window
    prefix = policy.rollout(condition, noise[::num_branches], last=split)
    states = repeat(prefix.states[:, -1], "g ... -> (g b) ...", b=num_branches)
    rows = repeat(torch.arange(len(prompts), device=noise.device), "g -> (g b)", b=num_branches)
    return policy.rollout(condition[rows], noise, states=states, first=split, reduction=reduction)


def history_zscore(statistics: Statistics, prompts: list, rewards: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """(R - mean) / (std + 1e-8) of each prompt's rewards, over this stage and up to `history_stages` before it.

    Unbiased std, as in the authors' code (a prompt seen once has none, and gets 0). A prompt need not come every stage;
    what ages is the stage.
    """
    held = statistics.update(prompts, rewards)
    return ((rewards.cpu().double() - held.mean) / (held.unbiased_std + 1e-8)).to(rewards)


def branch_advantage(z: Float[Tensor, "g b"]) -> Float[Tensor, "g b"]:
    """b / (b - 1) (z - mean of its group): z less the mean of the OTHER branches, so a sample is not its own baseline.

    The mean's gradient is the policy gradient's, if all branches are trained on; b / (b - 1) is what the own share in
    the mean would have taken away. Raises nothing for b = 1 and gives nan: a lone branch has no others.
    """
    num_branches = z.shape[1]
    z = at_least_float32(z)
    return (z - z.mean(1, keepdim=True)) * (num_branches / (num_branches - 1) if num_branches > 1 else torch.nan)


def select_extremes(
    z: Float[Tensor, "g b"], positive_threshold: float | int, negative_threshold: float | int
) -> Bool[Tensor, "g b"]:
    """Which images to train on: a group's best if it is >= the positive threshold, its worst if < the negative one.

    Ties go to the first. A group keeps 0, 1 or 2 images; with b = 1 and both thresholds 0, every image is kept once.
    """
    best, worst = z.argmax(1, keepdim=True), z.argmin(1, keepdim=True)
    column = torch.arange(z.shape[1], device=z.device)
    return ((column == best) & (z >= positive_threshold)) | ((column == worst) & (z < negative_threshold))


def best_and_worst(score: Float[Tensor, "g b"], keep: Bool[Tensor, "g b"]) -> Int[Tensor, "m 2"]:
    """Pairs (chosen, rejected) as rows g b + branch: of the groups that kept both their best and their worst.

    A group whose branches all have the same score has no best and no worst.
    """
    pairs = torch.stack([score.argmax(1), score.argmin(1)], 1)
    first = torch.arange(len(score), device=score.device).unsqueeze(1) * score.shape[1]
    return (first + pairs)[keep.gather(1, pairs).all(1) & (pairs[:, 0] != pairs[:, 1])]


def chosen_images(
    z: Float[Tensor, "g b"], config: Config
) -> tuple[Float[Tensor, "g b"], Int[Tensor, "m w"], Bool[Tensor, "g b"]]:
    """(advantages, rows g b + branch to train on, (m, 1), or best and worst, (m, 2), which images were kept)."""
    z = branch_advantage(z) if config.advantage == "branch" else z
    keep = torch.ones_like(z, dtype=torch.bool)
    if config.branch_sampling and config.select == "extremes":
        keep = select_extremes(z, config.positive_threshold, config.negative_threshold)
    return z, best_and_worst(z, keep) if config.objective == "pairwise" else keep.flatten().nonzero(), keep


def pairwise_loss(
    log_ratio_chosen: Float[Tensor, "n"], log_ratio_rejected: Float[Tensor, "n"], beta: float | int
) -> Float[Tensor, ""]:
    """-log sigmoid(beta (log rho_chosen - log rho_rejected)), one term a step, rho against the stage's sampling policy.

    D3PO's loss (Yang et al., 2023, arXiv 2311.13231) with another reference. At rho = 1 it is log 2, and its gradient
    the policy gradient's with advantages +beta/2 and -beta/2; as a pair is won the gradient fades, where PPO clips.
    """
    return -logsigmoid(beta * (log_ratio_chosen - log_ratio_rejected)).mean()


def objective_loss(policy, traj, rows: Tensor, places: Tensor, advantages: Tensor, clip_range: float, config: Config):
    """Loss and metrics of images `rows` (n, 1), or of pairs (n, 2), at `places` (n, k) of the window: one network call.

    A pair trains on the same places of both its branches.
    """
    width = rows.shape[1]
    batch = traj.transitions(rows.flatten(), places.repeat_interleave(width, 0))
    out = policy.step(batch.states, batch.step, batch.condition, next=batch.next, reduction=config.reduction)
    repeated = advantages[rows.flatten()].repeat_interleave(places.shape[1])
    loss, info = clipped_surrogate(out.log_prob, batch.log_prob_old, repeated, clip_range)
    if config.objective == "pairwise":
        log_ratio = rearrange(out.log_prob - batch.log_prob_old, "(n pair k) -> pair (n k)", n=len(rows), pair=width)
        loss = pairwise_loss(*log_ratio, config.pair_beta)
    return loss.mean(), means(info)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    last = policy.num_actions if config.last_window is None else config.last_window
    if config.backward_progressive and not 1 <= config.first_window <= last <= policy.num_actions:
        raise ValueError(
            f"the window grows from {config.first_window} to {last} steps, but must stay within 1 and the "
            f"{policy.num_actions} stochastic steps of the sampler, and not shrink: set first_window and last_window."
        )
    compares = config.advantage == "branch" or config.objective == "pairwise"
    if compares and (not config.branch_sampling or config.num_branches < 2):
        raise ValueError(
            f"advantage={config.advantage!r} with objective={config.objective!r} compares the branches of a group: it "
            "needs branch_sampling=True and num_branches of at least 2."
        )
    if config.objective == "pairwise" and config.select == "all":
        raise ValueError("objective='pairwise' trains on a branch's best and worst: use select='extremes'.")
    policy.encode(prompts)
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on `reward`, prompts drawn from `prompts`; yields a `Step` a stage.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `torchrun` each process grows and differentiates its own share of every stage's branches.
    """
    check(policy, prompts, config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    history = Statistics(rounds=config.history_stages + 1)
    run = Run(config, optimizer, generator, resume, [policy], history=history, reward=reward)
    clip_range = clip_range_of(policy, config)
    last_window = policy.num_actions if config.last_window is None else config.last_window
    b = config.num_branches if config.branch_sampling else 1
    for number in run.rounds():
        window = policy.num_actions
        if config.backward_progressive:
            window = progressive_window(number, config.num_iterations, config.first_window, last_window)
        batch = run.draw(prompts, config.num_prompts * config.num_branches // b, b, unit=b)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            traj = branch_rollout(policy, batch.own_prompts[::b], noise, window, b, config.reduction)
            rewards = batch.gather(checked(reward, policy.decode(traj.final), batch.own_prompts))
            z = rearrange(history_zscore(history, batch.prompts, rewards), "(g b) -> g b", b=b)
            z, kept, keep = chosen_images(z, config)
            advantages = z.clamp(-config.advantage_clip, config.advantage_clip).flatten()[batch.own]

        for _ in range(config.num_epochs):
            for mini in run.minibatches(kept, config.num_minibatches, batch.own):
                places = torch.arange(window, device=policy.device).expand(len(mini.rows), -1)
                for part in places.split(config.steps_per_pass, 1) if len(mini.rows) else ():
                    loss, info = objective_loss(policy, traj, mini.rows, part, advantages, clip_range, config)
                    run.backward(loss, info, mini.share * part.shape[1] / window)
                run.update()

        counts = {"kept_positive": (keep & (z > 0)).sum(), "kept_negative": (keep & (z <= 0)).sum()}
        yield run.step(reward_metrics(rewards) | {"window": window} | counts, reward_queries=len(batch))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """Prefixes once, branches b times, and the window of the images that this stage kept."""
    window, kept = int(metrics["window"]), int(metrics["kept_positive"] + metrics["kept_negative"])
    branches = config.num_prompts * config.num_branches
    forward = [config.num_prompts] * (policy.num_steps - window) + [branches] * window
    passes = range(0, window, config.steps_per_pass)
    backward = [kept * min(config.steps_per_pass, window - first) for first in passes]
    return {"forward": forward, "backward": backward * config.num_epochs}
