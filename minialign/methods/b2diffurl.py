"""B2-DiffuRL: reinforcement learning of diffusion models on sparse rewards (Hu et al., CVPR 2025, arXiv 2503.11240).

DDPO pays every denoising step the reward of the final image, also the steps that had no part in it. Two changes to how
data are collected share the credit out better. Backward progressive training: train only the last `window` steps, and
let the window grow towards the noise. Branch-based sampling: grow `num_branches` continuations from one prefix, so that
they differ only in what the window did, and train on the best and the worst of each branch.

    window of stage k, from the authors' script      progressive_window
    one prefix, b continuations                      branch_rollout: (S - w) + b w network evaluations, not b S
    z-score of a prompt over the last stages         HistoryZScore
    best and worst of a branch, with thresholds      select_extremes
    DDPO's clipped loss, or best against worst       objective_loss, pairwise_loss

As in the authors' code: the branch only chooses the images, their advantage is the prompt's z-score, which still holds
the luck of the prefix. As in the abstract: branches are compared with each other, advantage="branch". It is an unbiased
baseline only if all branches are trained on (select="all"); keeping the extremes is not: which image is kept depends on
its own reward. As in neither: minibatches are shares of what was kept, so that no leftover image is dropped; the window
may start anywhere (the authors' 14 of 20 steps is no "backward from the end", and there branching costs variance: see
chapter 11). Without branching or thresholds this is DDPO, the same numbers from the same trajectories.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from minialign.kernels import at_least_float32, clipped_surrogate
from minialign.loop import Step, gather_rows, own_rows, pack, sum_gradients, sum_over_processes, timer, unpack
from minialign.methods.ddpo import default_clip_range
from minialign.policies.base import Trajectory
from minialign.rewards import checked


@dataclass(frozen=True)
class Config:
    num_iterations: int = 100  # stages of: branch, score, select, update; the window's schedule is spread over them
    num_prompts: int = 256  # prompts drawn per stage, over all processes, each the root of one group of branches
    num_branches: int = 5  # continuations of one prefix
    backward_progressive: bool = True  # False: every stage trains all steps, and branches share only the first noise
    branch_sampling: bool = True  # False: the same number of independent trajectories, and trains on all of them
    first_window: int = 14  # trained last steps at the first stage (authors: 14 of 20)
    last_window: int | None = None  # at the last stages; None: all steps
    advantage: str = "global"  # "global": z-score of the prompt (authors' code); "branch": less its branch's mean
    select: str = "extremes"  # "extremes": best and worst of a branch, past the thresholds; "all"
    positive_threshold: float = 0.5  # the best is kept from here up; of z, or of the branch-relative z
    negative_threshold: float = -0.5  # the worst is kept below
    history_stages: int = 8  # earlier stages whose rewards enter a prompt's mean and std, beside the current one
    objective: str = "clip"  # "clip": DDPO's clipped surrogate; "pairwise": best against worst (with "extremes")
    pair_beta: float = 1.0  # "pairwise": how soon a pair counts as won, per nat (or nat an element) of log-ratio
    num_minibatches: int = 4  # optimizer steps per pass over the kept images
    num_epochs: int = 2  # passes over the kept images
    steps_per_pass: int = 4  # denoising steps per network call: memory against speed, never the result
    reduction: str = "mean"  # of log-probabilities over the latent's D elements
    clip_range: float | None = None  # on the ratio; None: ddpo.default_clip_range (authors: .1 at D = 16,384: no clip)
    advantage_clip: float = 5.0  # in standard deviations
    learning_rate: float = 1e-4  # AdamW, LoRA
    warmup_updates: int = 0  # over which the learning rate rises
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0  # l2


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


class HistoryZScore:
    """(R - mean) / (std + 1e-8) of each prompt's rewards, over this stage and up to `history_stages` before it.

    Unbiased std, as in the authors' code (a prompt seen once has none, and gets 0). A prompt need not come every stage;
    what ages is the stage.
    """

    def __init__(self, prompts: list[str], history_stages: int):
        self.index = {prompt: i for i, prompt in enumerate(prompts)}
        self.stages = deque(maxlen=history_stages + 1)

    def update(self, prompts: list[str], rewards: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        index = torch.tensor([self.index[prompt] for prompt in prompts])
        self.stages.append((index, rewards.double().cpu()))
        held_index, held = (torch.cat(parts) for parts in zip(*self.stages, strict=True))
        z = torch.zeros(len(prompts), dtype=torch.float64)
        for i in index.unique():
            values, mine = held[held_index == i], index == i
            shifted = values - values[0]  # equal rewards are then exact zeros; rounding would survive the division
            if len(values) > 1:
                z[mine] = (self.stages[-1][1][mine] - values[0] - shifted.mean()) / (shifted.std() + 1e-8)
        return z.to(rewards)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"history.{i}.prompt": index for i, (index, _) in enumerate(self.stages)}
        return named | {f"history.{i}.reward": rewards for i, (_, rewards) in enumerate(self.stages)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        count = sum(name.startswith("history.") for name in tensors) // 2
        self.stages.extend((tensors[f"history.{i}.prompt"], tensors[f"history.{i}.reward"]) for i in range(count))


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
    """Pairs (chosen, rejected) as rows g b + branch: of the groups that kept both their best and their worst."""
    pairs = torch.stack([score.argmax(1), score.argmin(1)], 1)
    first = torch.arange(len(score), device=score.device).unsqueeze(1) * score.shape[1]
    return (first + pairs)[keep.gather(1, pairs).all(1)]


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
    return loss, info


def check(policy, prompts: list[str], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    for name, allowed in {
        "advantage": ("global", "branch"),
        "select": ("extremes", "all"),
        "objective": ("clip", "pairwise"),
        "reduction": ("mean", "sum"),
    }.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
    for name in (
        "num_iterations", "num_prompts", "num_branches", "num_minibatches", "num_epochs", "steps_per_pass",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
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
    policy.encode(list(prompts))
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on `reward`, prompts drawn from `prompts`; yields a `Step` a stage.

    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    Under `accelerate launch` each process grows and differentiates its own share of every stage's branches.
    """
    check(policy, prompts, config)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    history = HistoryZScore(list(prompts), config.history_stages)
    num_elements = torch.Size(policy.latent_shape).numel()
    clip_range = default_clip_range(num_elements, config.reduction) if config.clip_range is None else config.clip_range
    last_window = policy.num_actions if config.last_window is None else config.last_window
    b = config.num_branches if config.branch_sampling else 1
    batch_size = config.num_prompts * config.num_branches
    start = updates = 0
    if resume is not None:
        counts = unpack(resume, parameters, optimizer, generator)
        start, updates, policy.network_evaluations = (counts[k] for k in ("number", "updates", "network_evaluations"))
        history.load(resume)
    own_groups = own_rows(batch_size // b, policy.device)
    own = (own_groups.unsqueeze(1) * b + torch.arange(b, device=policy.device)).flatten()

    for number in range(start, config.num_iterations):
        lap = timer()
        window = policy.num_actions
        if config.backward_progressive:
            window = progressive_window(number, config.num_iterations, config.first_window, last_window)
        drawn = torch.randint(len(prompts), (batch_size // b,), generator=generator).tolist()
        batch = [prompts[i] for i in drawn for _ in range(b)]
        with torch.no_grad():
            noise = policy.draw_noise(batch_size, generator)[own]
            roots = [prompts[drawn[g]] for g in own_groups.tolist()]
            traj = branch_rollout(policy, roots, noise, window, b, config.reduction)
            own_prompts = [batch[i] for i in own.tolist()]
            rewards = gather_rows(checked(reward, policy.decode(traj.final), own_prompts), own, batch_size)
            z = rearrange(history.update(batch, rewards), "(g b) -> g b", b=b)
            z = branch_advantage(z) if config.advantage == "branch" else z
            keep = torch.ones_like(z, dtype=torch.bool)
            if config.branch_sampling and config.select == "extremes":
                keep = select_extremes(z, config.positive_threshold, config.negative_threshold)
            advantages = z.clamp(-config.advantage_clip, config.advantage_clip).flatten()[own]
            kept = best_and_worst(z, keep) if config.objective == "pairwise" else keep.flatten().nonzero()

        infos, norms = [], []
        for _ in range(config.num_epochs):
            shuffled = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
            for minibatch in shuffled.tensor_split(config.num_minibatches):
                if not len(minibatch):  # few images kept
                    continue
                mine = minibatch[torch.isin(minibatch[:, 0], own)]
                rows = torch.searchsorted(own, mine)  # where this process holds them
                share = len(mine) / len(minibatch)  # this process's weight in the mean over the global minibatch
                for places in (
                    torch.arange(window, device=policy.device).split(config.steps_per_pass) if len(mine) else ()
                ):
                    places = places.expand(len(rows), -1)
                    loss, info = objective_loss(policy, traj, rows, places, advantages, clip_range, config)
                    (loss * share * places.shape[1] / window).backward()
                    infos.append(info)
                sum_gradients(parameters)
                norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                updates += 1
                optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, updates / max(1, config.warmup_updates))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        zero = [rewards.new_zeros(())]  # a stage that keeps nothing, or nothing of this process, moves nothing
        metrics = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(correction=0),
            "window": float(window),
            "kept_positive": (keep & (z > 0)).sum(),
            "kept_negative": (keep & (z <= 0)).sum(),
            "clip_fraction": torch.stack([info["clip_fraction"] for info in infos] or zero).mean(),
            "approx_kl": torch.stack([info["approx_kl"] for info in infos] or zero).mean(),
            "grad_norm": torch.stack(norms or zero).mean(),
        }
        evaluations = int(sum_over_processes(torch.tensor(policy.network_evaluations, device=policy.device)))
        yield Step(
            number,
            metrics,
            evaluations,
            (number + 1) * batch_size,
            lap(),
            lambda done=number + 1, updates=updates: (
                pack(
                    parameters,
                    optimizer,
                    generator,
                    number=done,
                    updates=updates,
                    network_evaluations=policy.network_evaluations,
                )
                | history.tensors()
            ),
        )
