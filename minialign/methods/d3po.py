"""D3PO: direct preference for denoising diffusion policy optimisation (Yang et al., 2023, arXiv 2311.13231, CVPR 2024).

Somebody compares two images; nobody says how good they are, and no reward model is fitted. Denoising is an episode, so
take the verdict on two final images as a verdict on every pair of actions that led there, step by step, as if all moves
of a won game were better than all moves of the lost one. What is left is DPO's loss on single transitions: each is
differentiated by itself, on images that the model draws now.

    l = log pi(x_{t-1} | x_t, c) - log pi_ref(...), both of stored states        policies.paths
    -log sigmoid(beta (l_chosen - l_rejected)), every step alone, eq. 14         step_loss
    rho = clip(exp l, 1 - eps, 1 + eps), in the code alone                       clipped_log_ratio
    which one is better: a reward that only ranks, a labeller of pairs.py        compared
    several rewards: better in one and worse in none                             pareto
    all pairs of the images of a prompt, ties left out (7 of them, scripts/train.py)  every_pair

At the weights of the reference the gradient is beta times that of a policy gradient whose advantages are 1 and -1.
As in the code, not the paper: log-probabilities are means over the latent's D elements (`reduction`), and the ratios
are clipped. With beta = eps = .1 the loss then lives in .693 +- .010, whatever is learned. The clip, not beta, is the
leash, and a long one: it takes a gradient away and pulls nothing back, so that several steps a round walk past it.
As in neither: ties are left out before anything is spent on them, so that they do not shrink a step; log sigmoid is
stable; steps are not shuffled, for one optimizer step sees the sum over all of them.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels import at_least_float32, clipped_log_ratio, dpo_loss, kl_k3, means, pair_accuracy, same_shape
from minialign.loop import Batch, Run, Step, check_policy, reward_metrics
from minialign.pairs import Labeller
from minialign.policies.paths import path_log_probs, reference_log_probs
from minialign.rewards import checked
from minialign.settings import Count, Limit, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 50  # rounds of: roll out, compare, update (paper: 400; with people 5 to 10)
    num_prompts: Count = 32  # prompts drawn per round, over all processes (paper: 20 a GPU)
    group_size: Count = 2  # images a prompt, at least 2, all of which are compared with each other (people: 7)
    num_minibatches: Count = 4  # optimizer steps per pass over the round's pairs
    num_epochs: Count = 1  # passes over the round's pairs; many, where comparing is dear
    steps_per_pass: Count = 4  # denoising steps per network call: memory against speed, never the result
    beta: Positive = 0.1  # of log-ratios; under "mean" as strong as beta / D under "sum"
    clip_range: Limit = 0.1  # on a step's ratio to the reference: below 1, or inf for none
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities over the latent's D elements; the paper sums
    shared_start: bool = True  # the images of a prompt start from one x_T
    refresh_reference: bool = (
        False  # each round's own model is its reference: no anchor. As with people, for few rounds
    )
    learning_rate: NonNegative = 3e-4  # AdamW, LoRA (paper: 3e-5)
    warmup_updates: Natural = 0  # over which it rises
    weight_decay: NonNegative = 1e-4
    max_grad_norm: Limit = 1.0  # l2


def pareto(first: Float[Tensor, "rewards n"], second: Float[Tensor, "rewards n"]) -> Float[Tensor, "n"]:
    """1 where the first is better by some reward and worse by none, 0 where the second is, 1/2 where neither is.

    One reward: whoever has more of it. Any increasing function of a reward leaves it as it is.
    """
    same_shape(first=first, second=second)
    wins, loses = (first > second).any(0), (second > first).any(0)  # in something; in both: they contradict, a tie
    return (1 + wins.float() - loses.float()) / 2


def every_pair(num_groups: int, size: int, device: torch.device | str = "cpu") -> Int[Tensor, "pairs 2"]:
    """Rows of all unordered pairs within groups of `size` rows side by side: size (size - 1) / 2 of each group."""
    within = torch.combinations(torch.arange(size, device=device))
    return (torch.arange(num_groups, device=device).view(-1, 1, 1) * size + within).flatten(0, 1)


def chosen_and_rejected(pairs: Int[Tensor, "pairs 2"], preference: Float[Tensor, "pairs"]) -> Int[Tensor, "decided 2"]:
    """(better, worse) rows, in the order of pairs, without the ties."""
    ordered = torch.where((preference > 0.5).unsqueeze(1), pairs, pairs.flip(1))
    return ordered[preference != 0.5]


def step_loss(
    chosen: Float[Tensor, "*any"], rejected: Float[Tensor, "*any"], beta: float | int, clip_range: float | int
) -> tuple[Float[Tensor, "*any"], dict[str, Tensor]]:
    """-log sigmoid(beta (l_w - l_l)) of the log-ratios of single steps, each held within log(1 +- clip_range).

    info, an element each: `clip_fraction` (the share of the two that is clipped), `accuracy` (1 where the chosen
    action's likelihood has grown by more).
    Limits: log 2 at the reference, gradients there -+beta / 2. The argument stays within beta log((1 + clip_range) /
    (1 - clip_range)). A member outside has no gradient in either direction, its partner keeps its own. clip_range
    inf: DPO's.
    """
    kept = [clipped_log_ratio(x, clip_range) for x in (chosen, rejected)]
    with torch.no_grad():
        out = sum((near != at_least_float32(x)).float() for near, x in zip(kept, (chosen, rejected), strict=True)) / 2
        info = {"clip_fraction": out, "accuracy": pair_accuracy(chosen, rejected)}
    return dpo_loss(*kept, beta), info


def compared(
    batch: Batch, samples: Tensor, pairs: Tensor, judge: Sequence[Callable] | Labeller, generator: torch.Generator
) -> tuple[Float[Tensor, "pairs"], dict[str, Tensor]]:
    """Each pair's preference, the same on all processes, and metrics. samples: those of this process.

    Rewards score their own process's; a labeller sees all of the round's, so that what it draws is drawn once.
    """
    if callable(judge):
        everyone = batch.gather(samples)
        first, second = (everyone[side] for side in pairs.T)
        asked = [batch.prompts[i] for i in pairs[:, 0].tolist()]
        answer = judge(first, second, asked, generator)
        preference = torch.as_tensor(answer[0] if isinstance(answer, tuple) else answer).to(pairs.device).float()
        if preference.shape != (len(pairs),) or not torch.isin(preference, preference.new_tensor([0, 0.5, 1])).all():
            gave = f"{preference.flatten().tolist()[:4]}, shape {tuple(preference.shape)}"
            raise ValueError(
                f"the labeller gave {gave}, for {len(pairs)} pairs; expected ({len(pairs)},): 1 where the first is "
                "better, 0 where the second is, 1/2 for a tie."
            )
        return preference, {}
    scores = torch.stack([batch.gather(checked(reward, samples, batch.own_prompts)) for reward in judge])
    return pareto(*(scores[:, side] for side in pairs.T)), reward_metrics(scores.sum(0))


def pair_loss(policy, traj, pairs: Tensor, places: Tensor, log_prob_ref: Tensor, config: Config):
    """Mean loss and metrics of trajectories `pairs` (n, 2) at steps `places` (k,): one call, each state in it once."""
    rows, side = pairs.unique(return_inverse=True)
    log_prob = path_log_probs(policy, traj, rows, places, reduction=config.reduction)
    at = rows.unsqueeze(1), places
    chosen, rejected = (log_prob - log_prob_ref[at])[side].unbind(1)
    loss, info = step_loss(chosen, rejected, config.beta, config.clip_range)
    with torch.no_grad():
        info |= {"loss": loss, "approx_kl": kl_k3(traj.log_probs[at] - log_prob)[side]}
    return loss.mean(), means(info)


def check(policy, reward, prompts: Sequence[Hashable], config: Config, labeller: Labeller | None) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    given = callable(reward) or bool(reward)
    if given == (labeller is not None):
        raise ValueError("who compares? Give a reward (or several), or labeller= and the reward None.")
    if config.group_size < 2:
        raise ValueError("group_size is 1; D3PO compares the images of a prompt with each other: give at least 2.")
    clipped_log_ratio(torch.zeros(()), config.clip_range)  # raises for 1 and more, whose ratio may be 0
    policy.encode(prompts)
    policy.check_density()


def train(
    policy, reward, prompts, config=Config(), generator=None, resume=None, *, labeller: Labeller | None = None
) -> Iterator[Step]:
    """Trains `policy` in place on comparisons of what it draws for `prompts`; yields a `Step` a round.

    reward: one, or a list of them; they only rank. labeller: compares in their place (reward None), a person say:
    labeller(first, second, prompts, generator) -> preference (n,), as in pairs.py: 1 where the first is better, 1/2
    for a tie. generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's
    checkpoint. Under `torchrun` each process rolls out and differentiates its own share of the prompts.
    """
    check(policy, reward, prompts, config, labeller)
    rewards = [] if reward is None else [reward] if callable(reward) else list(reward)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    judges = rewards or [labeller]
    kept = {f"reward{i}": one for i, one in enumerate(judges)} if len(judges) > 1 else {"reward": judges[0]}
    run = Run(config, optimizer, generator, resume, [policy], **kept)
    size, steps = config.group_size, torch.arange(policy.num_actions, device=policy.device)
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts, size, unit=size)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            if config.shared_start:
                noise[:, 0] = noise[::size, 0].repeat_interleave(size, 0)
            traj = policy.rollout(batch.own_prompts, noise, reduction=config.reduction)
            asked = every_pair(config.num_prompts, size, policy.device)
            judge = labeller or rewards
            preference, metrics = compared(batch, policy.decode(traj.final), asked, judge, run.generator)
            pairs = chosen_and_rejected(asked, preference)
            log_prob_ref = traj.log_probs.clone()  # of the model that drew: what a refreshed reference says
            if not config.refresh_reference:
                used = torch.isin(batch.own, pairs).nonzero().flatten()
                log_prob_ref[used] = reference_log_probs(
                    policy, traj, reduction=config.reduction, rows=used, steps_per_pass=config.steps_per_pass,
                    rows_per_pass=-(-2 * len(pairs) // config.num_minibatches) or 1,
                )  # fmt: skip
            log_ratio = batch.gather(reduce(traj.log_probs - log_prob_ref, "n t -> n", config.reduction))

        for _ in range(config.num_epochs):
            for mini in run.minibatches(pairs, config.num_minibatches, batch.own):
                for places in steps.split(config.steps_per_pass) if len(mini.rows) else ():
                    loss, info = pair_loss(policy, traj, mini.rows, places, log_prob_ref, config)
                    run.backward(loss, info, mini.share * len(places) / len(steps))
                run.update()

        metrics |= {"tied": 1 - len(pairs) / len(asked), "log_ratio": log_ratio.mean()}
        yield run.step(metrics, reward_queries=len(batch) * len(rewards), comparisons=len(asked))


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """S calls of the round's rows; the states of those in a decided pair once more under the reference, and each pass
    over the minibatches forward and backward."""
    rows = config.num_prompts * config.group_size
    decided = round((1 - float(metrics["tied"])) * config.num_prompts * config.group_size * (config.group_size - 1) / 2)
    sizes = [
        decided // config.num_minibatches + (i < decided % config.num_minibatches)
        for i in range(config.num_minibatches)
    ]
    per_pass = [
        min(config.steps_per_pass, policy.num_actions - i) for i in range(0, policy.num_actions, config.steps_per_pass)
    ]
    states = [min(2 * pairs, rows) * width for pairs in sizes if pairs for width in per_pass]
    reference = [] if config.refresh_reference else states
    return {"forward": [rows] * policy.num_steps + reference, "backward": states * config.num_epochs}
