"""PSO: pairwise sample optimisation of timestep-distilled models (Miao et al., ICLR 2025, 2024, arXiv 2410.03190).

A distilled student, four network calls a sample, answers x_t with one sharp sample. Any denoising loss asks it for the
mean of all that could have been, and drags it back to blur. PSO asks for differences only: two samples, one preferred,
each measured against the frozen student, so that what both have in common, the pull towards the mean, cancels.

    ts = (N ... 1) 1000 / N - 1, the sampler's own few levels         policy.timesteps
    online     two runs of the current student, ranked by a reward: `train`
    l_a = log pi(x_prev | x_t) - log pi_ref, a = 0, 1                 policies.paths
    -log sigmoid(beta h (log rho_0 - log rho_1)), rho = clip(exp l)   online_loss
    offline    pairs that somebody labelled: `train_offline`, Diffusion-DPO's loop at t in ts
    e = |x^_0(x_t) - x_0|^2, one t and one eps a pair                 diffusion_dpo.pair_errors
    u = beta ((e_w^ref - k e_l^ref) - (e_w - k e_l)), k loser_weight  offline_loss
    max(0, 1 - beta (k e_l - e_w)) + prior_weight e_l                 reference_free_loss

Online it is D3PO's loss on a few-step sampler. The last call adds no noise: it has no density and is left out; it
changes because it shares weights with the others. A ConsistencyPolicy re-noises, as DMD2's and LCM's samplers do;
SDXL-Turbo's Euler-ancestral step is, in other units, DDPM's own: a DiffusionPolicy with eta = 1.
`mode` says what `train` does: "offline" draws `data_size` pairs of the untrained student, labels them by the reward,
and goes on as `train_offline`; so one Config has the fields of both. beta weighs nats online, squared errors offline.
As in the code: log-probabilities and errors are means over elements (beta scales with their number); the two runs of
a pair start from noises of their own (`shared_start`: from one, as D3PO's). As in neither: each sample has its own
noise (the code's DMD2 step gives one draw to the whole batch); ties have no gradient, and count in the mean.
`loss`: "reference_free" is the personalisation script's hinge: no reference, so a method of its own under the same
name; rejected are then samples of the class that the student drew before. "sft" is what PSO is there to replace.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from minialign.kernels import (
    at_least_float32,
    clipped_log_ratio,
    denoising_log_ratio,
    dpo_loss,
    hinge_loss,
    kl_k3,
    means,
    pair_accuracy,
    same_shape,
)
from minialign.loop import Run, Step, check_policy, reward_metrics
from minialign.methods import diffusion_dpo
from minialign.methods.diffusion_dpo import PairErrors
from minialign.pairs import Pairs, by_reward, draw_pairs
from minialign.policies.paths import path_log_probs, reference_log_probs
from minialign.rewards import checked
from minialign.settings import Count, Limit, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Config(Settings):
    mode: Literal["online", "offline"] = "online"  # whose samples: of the student as it is now; of before the run
    num_iterations: Count = 100  # online: rounds of roll out, compare; offline: optimizer steps
    batch_size: Count = 64  # pairs of each, over all processes (paper: 16 a GPU)
    pairs_per_pass: Count = 64  # in one network call: memory against speed, never the result
    beta: Positive = 50.0  # of the mean log-ratios (code); of mean errors, there half of Diffusion-DPO's for the same
    # online
    reduction: Literal["mean", "sum"] = "mean"  # of log-probabilities over elements; "sum" makes beta D times more
    clip_range: Limit = 0.1  # on each step's ratio, below 1; inf: no clipping
    shared_start: bool = False  # the two runs of a pair from one x_T
    num_minibatches: Count = 1  # optimizer steps a round
    steps_per_pass: Count | None = None  # transitions in one network call; None: all
    # offline
    loss: Literal["dpo", "reference_free", "sft"] = "dpo"  # against the reference; without; the chosen one's error
    target: Literal["sample", "epsilon"] = "sample"  # whose errors; epsilon's are sigma^-2 times x_0's: 0 at first
    loser_weight: NonNegative = 1.0  # lambda, of the rejected one's errors ("reference_free": 0.1)
    prior_weight: NonNegative = 0.5  # "reference_free": of the rejected one's error, as prior preservation
    data_size: Count = 1024  # mode "offline": pairs that `train` draws first
    data_seed: Natural = 0  # and from which noise
    learning_rate: NonNegative = 3e-4  # AdamW (paper: 1e-5 for LoRA)
    warmup_updates: Natural = 0  # over which it rises
    weight_decay: NonNegative = 0.0
    max_grad_norm: Limit = 1.0  # l2


def online_loss(
    log_prob: Float[Tensor, "two n k"],
    log_prob_ref: Float[Tensor, "two n k"],
    preference: Float[Tensor, "n"],
    beta: float | int,
    clip_range: float | int,
) -> tuple[Float[Tensor, "n k"], dict[str, Tensor]]:
    """The loss of each pair and step; preference is 1 where the first wins, 0 where the second does, 1/2 for a tie.

    Limits: log 2 at the reference's weights, and for ties, which have no gradient; swapping the two and the preference
    changes nothing; |argument| <= beta log((1 + clip) / (1 - clip)). A ratio outside the clip has no gradient.
    info: `clip_fraction`, `approx_kl` (k3 of KL(policy || reference), a step) and `accuracy`, ties 1/2.
    """
    same_shape(log_prob=log_prob, log_prob_ref=log_prob_ref)
    log_ratio = at_least_float32(log_prob) - at_least_float32(log_prob_ref).detach()
    clipped = clipped_log_ratio(log_ratio, clip_range)
    sign = (2 * at_least_float32(preference) - 1).unsqueeze(-1)
    loss = dpo_loss(sign * clipped[0], sign * clipped[1], beta)
    with torch.no_grad():
        info = {
            "loss": loss, "accuracy": pair_accuracy(sign * log_ratio[0], sign * log_ratio[1]),
            "clip_fraction": (clipped != log_ratio).to(loss.dtype), "approx_kl": kl_k3(log_ratio),
        }  # fmt: skip
    return loss, info


def offline_loss(
    chosen: Float[Tensor, "n"],
    rejected: Float[Tensor, "n"],
    chosen_ref: Float[Tensor, "n"],
    rejected_ref: Float[Tensor, "n"],
    beta: float | int,
    loser_weight: float | int = 1.0,
) -> Float[Tensor, "n"]:
    """-log sigmoid(u) of each pair, from squared errors under the weights and under the reference.

    Limits: log 2 at the reference; loser_weight 1 is Diffusion-DPO's loss at twice the beta; 0 is the chosen one's
    error, under a sigmoid that lets go where it has fallen.
    """
    better = denoising_log_ratio(chosen, chosen_ref), denoising_log_ratio(rejected, rejected_ref)
    return dpo_loss(better[0], loser_weight * better[1], 2 * beta)  # each is half a difference of errors


def reference_free_loss(
    chosen: Float[Tensor, "n"],
    rejected: Float[Tensor, "n"],
    beta: float | int,
    loser_weight: float | int,
    prior_weight: float | int,
) -> Float[Tensor, "n"]:
    """The hinge of the personalisation script, and prior preservation, from squared errors; no reference is asked.

    While the hinge is active, the rejected one's error has the weight prior_weight - beta loser_weight, which is 0 at
    the script's 0.5, 5 and 0.1: what is left is the diffusion loss of the chosen ones. Beyond it, prior preservation.
    """
    same_shape(chosen=chosen, rejected=rejected)
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    return hinge_loss(beta * (loser_weight * rejected - chosen)) + prior_weight * rejected


def round_loss(policy, traj, pairs: Tensor, places: Tensor, log_prob_ref: Tensor, preference: Tensor, config: Config):
    """Loss and metrics of the trajectories `pairs` (n, 2) at steps `places` (k,), in one network call."""
    log_prob = path_log_probs(policy, traj, pairs.T.flatten(), places, reduction=config.reduction)
    log_prob = log_prob.view(2, len(pairs), -1)
    loss, info = online_loss(
        log_prob, log_prob_ref[pairs.T][..., places], preference, config.beta, config.clip_range
    )  # fmt: skip
    return loss.mean(), means(info)


def check(policy, prompts: Sequence[Hashable], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    check_policy(policy, "rollout")
    if 1 <= config.clip_range < float("inf"):
        raise ValueError(f"clip_range is {config.clip_range}; expected below 1 (a ratio of 0 has no log), or inf.")
    if config.num_minibatches > config.batch_size:
        raise ValueError(
            f"num_minibatches is {config.num_minibatches}, more than the {config.batch_size} pairs of a round."
        )
    policy.encode(prompts)
    policy.check_density()


def train(policy, reward, prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on which of two samples has more `reward`, prompts drawn from `prompts`.

    Online (see the module for `mode` "offline"): yields a `Step` a round, its reward the samples' mean.
    generator: a CPU torch.Generator, the run's only randomness but for data_seed (seed 0 if None). resume: an earlier
    run's checkpoint; offline, the policy is then given as it was given before: pairs are drawn again from it.
    Under `torchrun` each process rolls out and differentiates its own share of the pairs.
    """
    check_policy(policy, "rollout")
    if config.mode == "offline":
        drawn = torch.Generator().manual_seed(config.data_seed)
        pairs = draw_pairs(policy, by_reward(reward), prompts, config.data_size, drawn)
        yield from train_offline(policy, pairs, config, generator, resume)
        return
    check(policy, prompts, config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config, optimizer, generator, resume, [policy], reward=reward)
    steps, steps_per_pass = policy.num_actions, config.steps_per_pass or policy.num_actions
    for _ in run.rounds():
        batch = run.draw(prompts, config.batch_size, 2, unit=2)
        with torch.no_grad():
            noise = policy.draw_noise(len(batch), run.generator, rows=batch.own)
            if config.shared_start:
                noise[1::2, 0] = noise[::2, 0]
            traj = policy.rollout(batch.own_prompts, noise, reduction=config.reduction)
            rewards = batch.gather(checked(reward, policy.decode(traj.final), batch.own_prompts))
            preference = pair_accuracy(*rewards[batch.own].view(-1, 2).T)
            log_prob_ref = reference_log_probs(
                policy, traj, reduction=config.reduction, rows_per_pass=2 * config.pairs_per_pass,
                steps_per_pass=steps_per_pass,
            )  # fmt: skip
            log_ratio = batch.gather(reduce(traj.log_probs - log_prob_ref, "n t -> n", "sum"))

        everyone = torch.arange(len(batch), device=policy.device).view(-1, 2)
        for mini in run.minibatches(everyone, config.num_minibatches, batch.own):
            for pairs in mini.rows.split(config.pairs_per_pass) if len(mini.rows) else ():  # a process may have none
                for places in torch.arange(steps, device=policy.device).split(steps_per_pass):
                    given = log_prob_ref, preference[pairs[:, 0] // 2], config
                    loss, info = round_loss(policy, traj, pairs, places, *given)
                    share = len(pairs) / len(mini.everyone)
                    run.backward(loss, info, share * len(places) / steps)
            run.update()

        metrics = reward_metrics(rewards) | {"kl": log_ratio.mean()}
        yield run.step(metrics, reward_queries=len(batch), comparisons=len(batch) // 2)


def train_offline(policy, pairs: Pairs, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on labelled pairs of its states; yields a `Step` an update, as `diffusion_dpo.train`.

    Only at the sampler's own levels, `policy.timesteps`: elsewhere the student is never asked. The other settings, the
    generator, resume and several processes are as in `diffusion_dpo.train`.
    """

    def levels(n: int, generator: torch.Generator) -> Tensor:
        return policy.timesteps[torch.randint(policy.num_steps, (n,), generator=generator).to(policy.device)]

    def objective(errors: PairErrors, *_) -> Float[Tensor, "n"]:
        if config.loss == "sft":
            return errors.chosen
        if config.loss == "reference_free":
            return reference_free_loss(*errors[:2], config.beta, config.loser_weight, config.prior_weight)
        return offline_loss(*errors, config.beta, config.loser_weight)

    check_policy(policy, "rollout")
    settings = diffusion_dpo.Config(
        num_iterations=config.num_iterations, batch_size=config.batch_size, pairs_per_pass=config.pairs_per_pass,
        target=config.target, learning_rate=config.learning_rate, warmup_updates=config.warmup_updates,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    yield from diffusion_dpo.train(policy, pairs, settings, generator, resume, levels=levels, objective=objective)


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """Online: N calls of the round's rows, one of its transitions under the reference, and one forward and backward.
    Offline: both images of each pair, once under the reference and once forward and backward."""
    if config.mode == "offline":
        return diffusion_dpo.floor(policy, config, metrics)
    n, steps = config.batch_size, config.steps_per_pass or policy.num_actions
    widths = [min(steps, policy.num_actions - first) for first in range(0, policy.num_actions, steps)]
    parts = [2 * min(config.pairs_per_pass, n - first) for first in range(0, n, config.pairs_per_pass)]
    minis = [n // config.num_minibatches + (i < n % config.num_minibatches) for i in range(config.num_minibatches)]
    trained = [2 * min(config.pairs_per_pass, m - first) for m in minis for first in range(0, m, config.pairs_per_pass)]
    return {
        "forward": [2 * n] * policy.num_steps + [rows * width for rows in parts for width in widths],
        "backward": [rows * width for rows in trained for width in widths],
    }
