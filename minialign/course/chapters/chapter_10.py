"""Exercises of chapter 10: advantages, the clipped surrogate, the exact KL of a step, its optimum, a planted bug."""

import torch

from minialign import kernels
from minialign.course.chapters.questions_10 import QUESTIONS
from minialign.course.check import Exercise
from minialign.exact import LinearGaussianSampler
from minialign.kernels import gaussian_kl, group_advantages, whiten

# ---- advantages of a group -------------------------------------------------------------------------------------------


def _per_group(rewards, group, formula):
    out = torch.zeros_like(rewards)
    for g in group.unique():
        out[group == g] = formula(rewards[group == g])
    return out


def _group_case(g, dtype=torch.float32):
    group = (torch.arange(7) % 3)[torch.randperm(7, generator=g)]  # sizes 3, 2, 2: no group of one
    level = torch.tensor([0.0, 5.0, -2.0], dtype=dtype)
    apart = torch.randperm(7, generator=g) + 0.3 * torch.rand(7, generator=g)  # two near-equal rewards are all rounding
    return dict(rewards=apart.to(dtype) + level[group], group=group, eps=1e-6)


GROUP_ADVANTAGES = Exercise(
    "10/group_advantages",
    points=3,
    reference=group_advantages,
    parts={"mixed groups": 2},  # the third is for eps, and for groups without any spread
    cases={
        "one group": dict(rewards=torch.tensor([1.0, 0.0]), group=torch.tensor([1, 1]), eps=1e-6),
        "groups 0 and 3": dict(
            rewards=torch.tensor([3.0, 5.0, 10.0, 14.0, 12.0]), group=torch.tensor([0, 0, 3, 3, 3]), eps=1e-6
        ),
        "equal rewards": dict(
            rewards=torch.tensor([2.0, 2.0, 2.0, 0.0, 4.0]), group=torch.tensor([0, 0, 0, 1, 1]), eps=1e-6
        ),
        "nearly equal rewards, a larger eps": dict(
            rewards=torch.tensor([0.0, 0.002, 1.0, 2.0]), group=torch.tensor([0, 0, 1, 1]), eps=1e-4
        ),
        "mixed groups": _group_case,
        "mixed groups, float64": lambda g: _group_case(g, torch.float64),
    },
    mistakes={
        "these are the mean and the std of the whole batch; an easy prompt then looks good, a hard one bad.": (
            lambda rewards, group, eps: (rewards - rewards.mean()) / (rewards.std(correction=0) + eps)
        ),
        "Bessel's correction: torch.std divides by n - 1 unless told otherwise.": lambda rewards, group, eps: (
            _per_group(rewards, group, lambda r: (r - r.mean()) / (r.std() + eps))
        ),
        "the mean is the group's, but the std is still that of the whole batch.": lambda rewards, group, eps: (
            _per_group(rewards, group, lambda r: (r - r.mean()) / (rewards.std(correction=0) + eps))
        ),
        "the mean is gone, the spread is not: advantages are counted in standard deviations.": (
            lambda rewards, group, eps: _per_group(rewards, group, lambda r: r - r.mean())
        ),
        "divided by a variance: its unit is the reward's squared.": lambda rewards, group, eps: _per_group(
            rewards, group, lambda r: (r - r.mean()) / (r.var(correction=0) + eps)
        ),
        "eps is added to the std, not to the variance under the root.": lambda rewards, group, eps: _per_group(
            rewards, group, lambda r: (r - r.mean()) / (r.var(correction=0) + eps).sqrt()
        ),
    },
)

# ---- the running buffers of the prompts ------------------------------------------------------------------------------


def running_advantages(buffers, prompts, rewards, buffer_size, min_count):
    """(advantages (batch,), new buffers): each prompt's last `buffer_size` rewards centre and scale its new ones.

    A prompt that holds fewer than `min_count` rewards, the new ones included, uses the batch's mean and std instead.
    """
    buffers = {prompt: list(held) for prompt, held in buffers.items()}
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        buffers[prompt] = [*buffers.get(prompt, []), reward][-buffer_size:]
    statistics = {}
    for prompt in set(prompts):
        held = buffers[prompt]
        values = torch.tensor(held, dtype=torch.float64) if len(held) >= min_count else rewards.double()
        statistics[prompt] = (values.mean(), values.std(correction=0))
    mean, std = (torch.stack(column) for column in zip(*(statistics[prompt] for prompt in prompts), strict=True))
    return ((rewards.double() - mean) / (std + 1e-6)).to(rewards.dtype), buffers


def _running(choose, keep=lambda held, size: held[-size:], correction=0):
    """A variant of the tracker: choose(old, new, batch, own, min_count) gives the values for the statistics."""

    def wrong(buffers, prompts, rewards, buffer_size, min_count):
        old = {prompt: list(held) for prompt, held in buffers.items()}
        new = {prompt: list(held) for prompt, held in buffers.items()}
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            new[prompt] = keep([*new.get(prompt, []), reward], buffer_size)
        out = torch.empty_like(rewards)
        for i, prompt in enumerate(prompts):
            own = rewards[torch.tensor([p == prompt for p in prompts])]
            values = choose(old.get(prompt, []), new[prompt], rewards, own, min_count)
            values = torch.as_tensor(values, dtype=rewards.dtype)
            out[i] = (rewards[i] - values.mean()) / (values.std(correction=correction) + 1e-6)
        return out, new

    return wrong


def _right(old, new, batch, own, min_count):
    return new if len(new) >= min_count else batch


def _script():
    """Three rounds: a prompt that fills up, one that stays below min_count, one that appears late and forgets."""
    rounds = [
        (["hen", "hen", "cow"], [1.0, 3.0, 10.0]),
        (["cow", "hen", "hen", "cow"], [14.0, 2.0, 6.0, 12.0]),
        (["hen", "owl", "cow", "hen"], [7.0, -4.0, 13.0, 0.5]),
    ]
    buffers, cases = {}, []
    for prompts, rewards in rounds:
        cases.append(dict(buffers=buffers, prompts=prompts, rewards=torch.tensor(rewards), buffer_size=5, min_count=3))
        buffers = running_advantages(**cases[-1])[1]
    return cases


def _running_case(g):
    prompts = [("hen", "cow", "owl")[i] for i in torch.randint(3, (7,), generator=g).tolist()]
    rewards = torch.randn(7, generator=g, dtype=torch.float64)
    held = torch.randn(6, generator=g, dtype=torch.float64).tolist()
    buffers = {"hen": held, "cow": held[:2]}
    return dict(buffers=buffers, prompts=prompts, rewards=rewards, buffer_size=6, min_count=4)


RUNNING_ADVANTAGES = Exercise(
    "10/running_advantages",
    points=5,
    reference=running_advantages,
    cases={
        **dict(zip(("the first round", "a buffer fills up", "a buffer forgets"), _script(), strict=True)),
        "nobody has enough yet": dict(
            buffers={"cow": [2.0, 5.0]},
            prompts=["cow", "hen"],
            rewards=torch.tensor([3.0, 9.0]),
            buffer_size=5,
            min_count=4,
        ),
        "equal rewards": _script()[0] | dict(buffers={"hen": [1.0]}, rewards=torch.ones(3)),
        "drawn, float64": _running_case,
    },
    mistakes={
        "the new rewards enter the buffer first; only then is it asked for its mean.": _running(
            lambda old, new, batch, own, min_count: old if len(old) >= min_count else batch
        ),
        "every prompt uses its own buffer, however few rewards it holds.": _running(
            lambda old, new, batch, own, min_count: new
        ),
        "off by one: a buffer that holds exactly min_count rewards is full enough.": _running(
            lambda old, new, batch, own, min_count: new if len(new) > min_count else batch
        ),
        "the buffer never forgets: buffer_size is not used.": _running(_right, keep=lambda held, size: held),
        "a full buffer should forget its oldest reward, not refuse the newest.": _running(
            _right, keep=lambda held, size: held[:size]
        ),
        "below min_count the statistics are those of the whole batch, not of this prompt's share of it.": _running(
            lambda old, new, batch, own, min_count: new if len(new) >= min_count else own
        ),
        "the buffers are filled but never asked: all statistics are the batch's.": _running(
            lambda old, new, batch, own, min_count: batch
        ),
        "Bessel's correction: torch.std divides by n - 1 unless told otherwise.": _running(
            lambda old, new, batch, own, min_count: new if len(new) >= min_count else batch, correction=1
        ),
    },
)

# ---- the clipped surrogate -------------------------------------------------------------------------------------------


def clipped_surrogate(log_prob, log_prob_old, advantages, clip_range):
    """PPO's loss, a scalar: the package's own, without its metrics."""
    return kernels.clipped_surrogate(log_prob, log_prob_old, advantages, clip_range)[0].mean()


def _surrogate(formula):
    """A variant: formula(ratio, advantages, clip_range) -> (n,), averaged."""

    def wrong(log_prob, log_prob_old, advantages, clip_range):
        return formula((log_prob - log_prob_old).exp(), advantages, clip_range).mean()

    return wrong


def _clip(ratio, c):
    return ratio.clamp(1 - c, 1 + c)


def _grid_case():
    """Every branch: ratios below, inside and above the interval, with a negative, a zero and a positive advantage."""
    ratio, advantages = torch.cartesian_prod(
        torch.tensor([0.5, 0.93, 1.0, 1.07, 1.5]), torch.tensor([-1.0, 0.0, 2.0])
    ).unbind(-1)
    old = torch.linspace(-2, 1, len(ratio))
    return dict(log_prob=old + ratio.log(), log_prob_old=old, advantages=advantages, clip_range=0.2)


def _surrogate_case(g, dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    old = torch.randn(11, **draw)
    return dict(
        log_prob=old + 0.4 * torch.randn(11, **draw),
        log_prob_old=old,
        advantages=torch.randn(11, **draw),
        clip_range=0.1,
    )


def _one(ratio, advantage):
    zero = torch.zeros(1)
    return dict(
        log_prob=zero + torch.tensor(ratio).log(), log_prob_old=zero, advantages=zero + advantage, clip_range=0.2
    )


CLIPPED_SURROGATE = Exercise(
    "10/clipped_surrogate",
    points=5,
    reference=clipped_surrogate,
    grad_wrt=("log_prob",),
    cases={
        **{f"ratio {r}, advantage {a}": _one(r, a) for r in (0.5, 1.5) for a in (-1.0, 2.0)},
        "all branches, averaged": _grid_case(),
        "float32": _surrogate_case,
        "float64": lambda g: _surrogate_case(g, torch.float64),
    },
    mistakes={
        "the sign: an optimizer minimises, and a good action should become likelier.": _surrogate(
            lambda ratio, a, c: -torch.maximum(-a * ratio, -a * _clip(ratio, c))
        ),
        "of the two values you keep the rosier one; the surrogate is pessimistic.": _surrogate(
            lambda ratio, a, c: torch.minimum(-a * ratio, -a * _clip(ratio, c))
        ),
        "the clamped value alone: a ratio that has gone the wrong way gets no gradient back.": _surrogate(
            lambda ratio, a, c: -a * _clip(ratio, c)
        ),
        "nothing is clipped: a large ratio goes on growing.": _surrogate(lambda ratio, a, c: -a * ratio),
        "the interval [1 - clip_range, 1 + clip_range] is one of the ratio, not of its logarithm.": _surrogate(
            lambda ratio, a, c: torch.maximum(-a * ratio, -a * ratio.log().clamp(-c, c).exp())
        ),
        "the ratio is upside down: new over old.": lambda log_prob, log_prob_old, advantages, clip_range: (
            clipped_surrogate(log_prob_old, log_prob, advantages, clip_range)
        ),
        "a sum where the mean belongs: the step then grows with the minibatch.": _surrogate(
            lambda ratio, a, c: torch.maximum(-a * ratio, -a * _clip(ratio, c)).sum()
        ),
        "a difference of log-probabilities is the logarithm of the ratio.": _surrogate(
            lambda ratio, a, c: torch.maximum(-a * ratio.log(), -a * _clip(ratio.log(), c))
        ),
    },
)

# ---- the exact KL of a step, and the optimum it leaves ---------------------------------------------------------------


def step_kl(noise_pred, noise_pred_ref, gain, std):
    """KL in nats of one transition under two noise predictions, (batch,): their means differ by gain times the gap."""
    expand = (...,) + (None,) * (noise_pred.ndim - 1)
    return gaussian_kl(gain[expand] * noise_pred, gain[expand] * noise_pred_ref, std, "sum")


def _kl_variant(formula):
    """formula(squared gap summed over the elements (batch,), number of elements, gain, std)."""

    def wrong(noise_pred, noise_pred_ref, gain, std):
        gap = (noise_pred - noise_pred_ref).flatten(1).square()
        return formula(gap.sum(1), gap.shape[1], gain, std)

    return wrong


def _kl_case(g, dtype=torch.float32, shape=(3, 2, 5)):
    draw = dict(generator=g, dtype=dtype)
    return dict(
        noise_pred=torch.randn(shape, **draw),
        noise_pred_ref=torch.randn(shape, **draw),
        gain=-0.1 - torch.rand(shape[0], **draw),
        std=0.1 + torch.rand(shape[0], **draw),
    )


STEP_KL = Exercise(
    "10/step_kl",
    points=3,
    reference=step_kl,
    grad_wrt=("noise_pred",),
    cases={
        "one number": dict(
            noise_pred=torch.tensor([[1.0]]),
            noise_pred_ref=torch.tensor([[0.0]]),
            gain=torch.tensor([-0.5]),
            std=torch.tensor([0.25]),
        ),
        "several axes": _kl_case,
        "one axis": lambda g: _kl_case(g, shape=(7, 2)),
        "float64": lambda g: _kl_case(g, torch.float64),
    },
    mistakes={
        "this is the unweighted error of the noise, as in DPOK's code: neither gain nor std is in it.": _kl_variant(
            lambda gap, n, gain, std: gap / n
        ),
        "the error of the noise is summed but not weighted by gain and std.": _kl_variant(
            lambda gap, n, gain, std: gap
        ),
        "nats are a sum over the elements, not a mean.": _kl_variant(
            lambda gap, n, gain, std: gain**2 * gap / (2 * std**2) / n
        ),
        "how far do the *means* lie apart? The gain is in the distance, and the distance is squared.": _kl_variant(
            lambda gap, n, gain, std: gain.abs() * gap / (2 * std**2)
        ),
        "the gain is missing: the network moves the mean through it.": _kl_variant(
            lambda gap, n, gain, std: gap / (2 * std**2)
        ),
        "a distance is measured in standard deviations before it is squared.": _kl_variant(
            lambda gap, n, gain, std: gain**2 * gap / (2 * std)
        ),
        "the KL holds half a squared distance; the half is missing.": _kl_variant(
            lambda gap, n, gain, std: gain**2 * gap / std**2
        ),
    },
)


def best_theta(gain, downstream, std, beta):
    """theta* (steps,) of max E[x_0] - beta KL in the linear-Gaussian world."""
    return downstream * std**2 / (beta * gain)


def _theta_case(g, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    gain, std = -0.1 - torch.rand(5, **draw), 0.1 + torch.rand(5, **draw)
    return dict(gain=gain, downstream=0.2 + torch.rand(5, **draw), std=std, beta=0.5)


_SAMPLER = LinearGaussianSampler(mean=0.3, std=0.5, num_steps=5)

BEST_THETA = Exercise(
    "10/best_theta",
    points=4,
    reference=best_theta,
    cases={
        "one step": dict(gain=torch.tensor([-2.0]), downstream=torch.tensor([0.5]), std=torch.tensor([1.0]), beta=4.0),
        "the sampler's own steps": dict(
            gain=_SAMPLER.gain, downstream=_SAMPLER.downstream, std=_SAMPLER.step_std, beta=2.0
        ),
        "drawn, float64": _theta_case,
    },
    mistakes={
        "the sign: gain is negative, and to push x_0 up the network has to predict less noise.": (
            lambda gain, downstream, std, beta: downstream * std**2 / (beta * gain.abs())
        ),
        "gain appears once in the objective's slope and twice in the KL's; what is left of it?": (
            lambda gain, downstream, std, beta: gain * downstream * std**2 / beta
        ),
        "what happens to this step's push in the steps that follow?": lambda gain, downstream, std, beta: (
            std**2 / (beta * gain)
        ),
        "a larger beta should hold theta closer to 0.": lambda gain, downstream, std, beta: (
            beta * downstream * std**2 / gain
        ),
        "the KL of a step has the variance in its denominator, not the std.": (
            lambda gain, downstream, std, beta: downstream * std / (beta * gain)
        ),
        "a step whose push is damped later on should be used less, not more.": (
            lambda gain, downstream, std, beta: std**2 / (beta * gain * downstream)
        ),
        "the derivative of a square has a 2, which meets the half of the KL.": (
            lambda gain, downstream, std, beta: downstream * std**2 / (2 * beta * gain)
        ),
    },
)

# ---- the planted bug -------------------------------------------------------------------------------------------------


def repaired_loss(log_prob, log_prob_old, rewards, clip_range):
    """The surrogate with whitened rewards (batch, 1), as a linear head returns them."""
    return clipped_surrogate(log_prob, log_prob_old, whiten(rewards.squeeze(-1)), clip_range)


def _bessel(log_prob, log_prob_old, rewards, clip_range):
    """The text does not say how to whiten."""
    advantages = (rewards.squeeze(-1) - rewards.mean()) / (rewards.std() + 1e-8)
    return clipped_surrogate(log_prob, log_prob_old, advantages, clip_range)


def _planted(log_prob, log_prob_old, rewards, clip_range):
    ratio, advantages = (log_prob - log_prob_old).exp(), whiten(rewards)  # by hand: the kernel may refuse the shape
    return torch.maximum(-advantages * ratio, -advantages * _clip(ratio, clip_range)).mean()


def _bug_case(g):
    old = torch.randn(7, generator=g)
    new = old + 0.3 * torch.randn(7, generator=g)
    return dict(log_prob=new, log_prob_old=old, rewards=torch.randn(7, 1, generator=g), clip_range=0.2)


REPAIRED_LOSS = Exercise(
    "10/repaired_loss",
    points=3,
    reference=repaired_loss,
    also=[_bessel],
    grad_wrt=("log_prob",),
    cases={
        "two samples": dict(
            log_prob=torch.tensor([0.1, -0.1]),
            log_prob_old=torch.zeros(2),
            rewards=torch.tensor([[1.0], [0.0]]),
            clip_range=0.2,
        ),
        "drawn": _bug_case,
    },
    mistakes={
        "that is the planted bug still: print the shape of whiten(rewards) * log_prob.": _planted,
        "the shape is right now, but the rewards are no longer whitened.": (
            lambda log_prob, log_prob_old, rewards, clip_range: clipped_surrogate(
                log_prob, log_prob_old, rewards.squeeze(-1), clip_range
            )
        ),
        "centred but not scaled: whiten divides by the std, too.": lambda log_prob, log_prob_old, rewards, clip_range: (
            clipped_surrogate(log_prob, log_prob_old, (rewards - rewards.mean()).squeeze(-1), clip_range)
        ),
        "whitened over the last axis, each sample against itself alone: all advantages are 0.": (
            lambda log_prob, log_prob_old, rewards, clip_range: clipped_surrogate(
                log_prob, log_prob_old, (rewards - rewards.mean(-1, keepdim=True)).squeeze(-1), clip_range
            )
        ),
    },
)

exercises = [
    GROUP_ADVANTAGES,
    RUNNING_ADVANTAGES,
    CLIPPED_SURROGATE,
    STEP_KL,
    BEST_THETA,
    REPAIRED_LOSS,
    *QUESTIONS,
]
