"""Exercises of chapter 15: the gradient of a noise law, its calibration, its loss, and where it must end on a line."""

import math

import torch

from minialign.course.chapters.questions_15 import QUESTIONS
from minialign.course.check import Exercise

F64 = torch.float64

# ---- the score-function gradient -------------------------------------------------------------------------------------


def noise_gradient(z, advantages, mean, std):
    """(d/d mean, d/d log std) of E[r], each shaped like mean: averages over z (n, *latent) of advantage times score."""
    u = (z - mean) / std
    weight = advantages.reshape(-1, *[1] * mean.ndim)
    return (weight * u / std).mean(0), (weight * (u**2 - 1)).mean(0)


def _scores(first, second, reduce=lambda x: x.mean(0)):
    """A variant: first and second are the scores as functions of (u, std)."""

    def wrong(z, advantages, mean, std):
        u, weight = (z - mean) / std, advantages.reshape(-1, *[1] * mean.ndim)
        return reduce(weight * first(u, std)), reduce(weight * second(u, std))

    return wrong


def _of_mean(u, std):
    return u / std


def _of_log_std(u, std):
    return u**2 - 1


def _gradient_case(g, n=5, shape=(3,), dtype=F64):
    draw = dict(generator=g, dtype=dtype)
    mean, std = torch.randn(shape, **draw), 0.5 + torch.rand(shape, **draw)
    return dict(
        z=mean + 1.3 * torch.randn(n, *shape, **draw), advantages=torch.randn(n, **draw) + 0.5, mean=mean, std=std
    )


NOISE_GRADIENT = Exercise(
    "15/noise_gradient",
    points=4,
    reference=noise_gradient,
    cases={
        "one sample": dict(
            z=torch.tensor([[2.0]]),
            advantages=torch.tensor([3.0]),
            mean=torch.tensor([1.0]),
            std=torch.tensor([0.5]),
        ),
        "one axis": _gradient_case,
        "several axes": lambda g: _gradient_case(g, 7, (2, 3, 5)),
        "as many samples as coordinates": lambda g: _gradient_case(g, 3, (3,)),
        "float32": lambda g: _gradient_case(g, 5, (2,), torch.float32),
    },
    mistakes={
        "d log pi / d mean is (z - mean) / std^2; you divided by std once.": _scores(lambda u, std: u, _of_log_std),
        "d log pi / d mean is (z - mean) / std^2; you did not divide by std at all.": _scores(
            lambda u, std: u * std, _of_log_std
        ),
        "that is the gradient for std; the parameter is log std, which gives a factor std more.": _scores(
            _of_mean, lambda u, std: (u**2 - 1) / std
        ),
        "the -1 is missing: it comes from -log std, the normaliser of the density.": _scores(
            _of_mean, lambda u, std: u**2
        ),
        "the second part has the wrong sign: noise far out, well paid, asks for a LARGER std.": _scores(
            _of_mean, lambda u, std: 1 - u**2
        ),
        "both have the wrong sign: this is the gradient of what is earned, not of a loss.": _scores(
            lambda u, std: -u / std, lambda u, std: 1 - u**2
        ),
        "a sum over the samples where the mean belongs.": _scores(_of_mean, _of_log_std, lambda x: x.sum(0)),
        "one number for the whole latent; every coordinate has a mean and a std of its own.": _scores(
            _of_mean, _of_log_std, lambda x: x.mean()
        ),
        "the scores were averaged without their advantages.": (
            lambda z, advantages, mean, std: noise_gradient(z, torch.ones_like(advantages), mean, std)
        ),
    },
)

# ---- calibration -----------------------------------------------------------------------------------------------------


def calibrate(rewards, value, decay):
    """(advantages (n,), the new value): the value moves to the round's mean first, and is then subtracted.

    value: what was expected before, a number; None in the first round, whose mean it becomes.
    """
    mean = rewards.mean()
    value = mean if value is None else decay * value + (1 - decay) * mean
    return rewards - value, value


def _moving(update, subtract=lambda old, new, mean: new):
    """A variant: update(value, mean, decay) -> new value; subtract(old, new, mean) is taken off the rewards."""

    def wrong(rewards, value, decay):
        mean = rewards.mean()
        new = mean if value is None else update(value, mean, decay)
        return rewards - subtract(mean if value is None else value, new, mean), new

    return wrong


def _average(value, mean, decay):
    return decay * value + (1 - decay) * mean


def _from_zero(rewards, value, decay):
    new = _average(0.0 if value is None else value, rewards.mean(), decay)
    return rewards - new, new


def _rounds(g, first=False):
    value = None if first else 3 * torch.rand((), generator=g, dtype=F64)
    decay = 0.6 + 0.3 * float(torch.rand((), generator=g))
    return dict(rewards=torch.randn(5, generator=g, dtype=F64) + 1, value=value, decay=decay)


CALIBRATE = Exercise(
    "15/calibrate",
    points=3,
    reference=calibrate,
    cases={
        "one reward": dict(rewards=torch.tensor([2.0]), value=torch.tensor(1.0), decay=0.75),
        "the first round": lambda g: _rounds(g, True),
        "a later round": _rounds,
        "never moves": dict(rewards=torch.tensor([2.0, 4.0, 9.0]), value=torch.tensor(1.0), decay=1.0),
        "value zero": dict(rewards=torch.tensor([2.0, 4.0, 9.0]), value=torch.tensor(0.0), decay=0.75),
    },
    mistakes={
        "the old value was subtracted: let it learn from the new rewards first.": _moving(
            _average, lambda old, new, mean: old
        ),
        "the round's own mean was subtracted: the moving average then does nothing.": _moving(
            _average, lambda old, new, mean: mean
        ),
        "decay is the share that the OLD value keeps.": _moving(
            lambda value, mean, decay: (1 - decay) * value + decay * mean
        ),
        "in the first round there is no old value: start at that round's mean, not at zero.": _from_zero,
        "nothing was kept: the value is the round's mean and forgets the rounds before.": _moving(
            lambda value, mean, decay: mean
        ),
        "the new mean was added without taking any of the old value away.": _moving(
            lambda value, mean, decay: value + (1 - decay) * mean
        ),
        "advantages are rewards minus what was expected, not the other way round.": (
            lambda rewards, value, decay: (-calibrate(rewards, value, decay)[0], calibrate(rewards, value, decay)[1])
        ),
    },
)

# ---- the loss --------------------------------------------------------------------------------------------------------


def noise_loss(log_prob, log_prob_old, advantages, mean, std, clip_range, beta):
    """-mean min(A rho, A clip(rho)) + beta KL(N(mean, std^2) || N(0, I)), a scalar; KL: a sum over the coordinates."""
    ratio = (log_prob - log_prob_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    earned = torch.minimum(advantages * ratio, advantages * clipped).mean()
    return -earned + beta * _kl(mean, std)


def _kl(mean, std):
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).sum()


def _earned(ratio, advantages, eps):
    return torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - eps, 1 + eps)).mean()


def _loss(earned=_earned, kl=_kl, sign=1.0, minus=1.0):
    """A variant: earned(ratio, advantages, clip_range), kl(mean, std)."""

    def wrong(log_prob, log_prob_old, advantages, mean, std, clip_range, beta):
        ratio = (log_prob - log_prob_old).exp()
        return -minus * earned(ratio, advantages, clip_range) + sign * beta * kl(mean, std)

    return wrong


def _clamped(ratio, eps):
    return ratio.clamp(1 - eps, 1 + eps)


def _loss_case(g, shape=(3,), dtype=F64, spread=0.5):
    draw = dict(generator=g, dtype=dtype)
    return dict(
        log_prob=spread * torch.randn(11, **draw),
        log_prob_old=spread * torch.randn(11, **draw),
        advantages=torch.randn(11, **draw),
        mean=torch.randn(shape, **draw),
        std=0.4 + torch.rand(shape, **draw),
        clip_range=0.2,
        beta=0.3,
    )


def _grid(beta=0.0):
    ratios, advantages = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5], dtype=F64), torch.tensor([-1.0, 2.0], dtype=F64)
    ratio, advantage = torch.cartesian_prod(ratios, advantages).unbind(1)
    law = dict(mean=torch.tensor([0.3], dtype=F64), std=torch.tensor([0.8], dtype=F64), clip_range=0.2, beta=beta)
    return dict(log_prob=ratio.log(), log_prob_old=torch.zeros_like(ratio), advantages=advantage, **law)


NOISE_LOSS = Exercise(
    "15/noise_loss",
    points=5,
    reference=noise_loss,
    grad_wrt=("log_prob", "mean", "std"),
    cases={
        "no KL": _grid(),
        "one coordinate": _grid(beta=2.0),
        "several coordinates": _loss_case,
        "an image's latent": lambda g: _loss_case(g, (2, 3, 5)),
        "nothing clipped": lambda g: _loss_case(g, spread=0.02),
        "float32": lambda g: _loss_case(g, dtype=torch.float32),
    },
    mistakes={
        "the clamp stands alone: beyond it no sample has a gradient, not even one that should be taken back.": _loss(
            lambda r, a, eps: (a * _clamped(r, eps)).mean()
        ),
        "nothing is clipped.": _loss(lambda r, a, eps: (a * r).mean()),
        "the larger of the two was taken: PPO is the pessimist and takes the smaller.": _loss(
            lambda r, a, eps: torch.maximum(a * r, a * _clamped(r, eps)).mean()
        ),
        "the smaller ratio was taken before it met the advantage: with a negative one it is the wrong choice.": _loss(
            lambda r, a, eps: (a * torch.minimum(r, _clamped(r, eps))).mean()
        ),
        "clipped from above only.": _loss(lambda r, a, eps: torch.minimum(a * r, a * r.clamp(max=1 + eps)).mean()),
        "the log-ratio stands where the ratio belongs.": _loss(
            lambda r, a, eps: torch.minimum(a * r.log(), a * _clamped(r.log(), eps)).mean()
        ),
        "what is earned has the wrong sign: the optimiser minimises.": _loss(minus=-1.0),
        "the KL is subtracted: it would push the law away from the usual noise.": _loss(sign=-1.0),
        "a sum over the samples where the mean belongs.": _loss(lambda r, a, eps: len(a) * _earned(r, a, eps)),
        "the KL is the mean over the coordinates; here it is the sum, the KL of the whole latent.": _loss(
            kl=lambda mean, std: (0.5 * (mean**2 + std**2 - 1) - std.log()).mean()
        ),
        "that is the authors' stand-in mean^2 + (std - 1)^2, which lets std vanish for a price of 1.": _loss(
            kl=lambda mean, std: (mean**2 + (std - 1) ** 2).sum()
        ),
        "the KL runs the other way: from N(0, I) to the law.": _loss(
            kl=lambda mean, std: (0.5 * ((1 + mean**2) / std**2 - 1) + std.log()).sum()
        ),
        "the KL lacks its -log std, which keeps the std from vanishing.": _loss(
            kl=lambda mean, std: (0.5 * (mean**2 + std**2 - 1)).sum()
        ),
        "the KL lacks its half.": _loss(kl=lambda mean, std: (mean**2 + std**2 - 1 - std.log()).sum()),
    },
)

# ---- where it must end -----------------------------------------------------------------------------------------------


def optimal_noise(slope, offset, target, beta):
    """(mean, std) of the noise that maximises E[-(x - target)^2] - beta KL, for x = offset + slope z; numbers."""
    pull = 2 * slope**2 + beta
    return 2 * slope * (target - offset) / pull, math.sqrt(beta / pull)


def _optimum(mean, std):
    """A variant: mean(slope, gap, beta) and std(slope, beta)."""
    return lambda slope, offset, target, beta: (mean(slope, target - offset, beta), std(slope, beta))


def _best_mean(s, gap, beta):
    return 2 * s * gap / (2 * s**2 + beta)


def _best_std(s, beta):
    return math.sqrt(beta / (2 * s**2 + beta))


def _line(g):
    slope, offset, gap, beta = (0.3 + torch.rand(4, generator=g, dtype=F64)).tolist()
    return dict(slope=slope, offset=offset, target=offset + gap, beta=beta)


OPTIMAL_NOISE = Exercise(
    "15/optimal_noise",
    points=3,
    reference=optimal_noise,
    cases={
        "the sheet's": dict(slope=0.5, offset=1.0, target=2.0, beta=0.1),
        "already there": dict(slope=0.7, offset=2.0, target=2.0, beta=0.4),
        "a strong pull": dict(slope=0.5, offset=1.0, target=2.0, beta=1e4),
        "drawn": _line,
    },
    mistakes={
        "a factor 2 of the square's derivative is missing.": _optimum(
            lambda s, gap, beta: s * gap / (s**2 + beta), lambda s, beta: math.sqrt(beta / (s**2 + beta))
        ),
        "the sampler's slope enters twice: x moves by slope for each unit of z, and so does the gradient.": _optimum(
            lambda s, gap, beta: 2 * gap / (2 + beta), _best_std
        ),
        "that is the noise whose sample hits the target; the KL makes it stop earlier.": _optimum(
            lambda s, gap, beta: gap / s, _best_std
        ),
        "the std stayed 1: the reward is curved, so a narrower law earns more.": _optimum(
            _best_mean, lambda s, beta: 1.0
        ),
        "that is the variance; std is its root.": _optimum(_best_mean, lambda s, beta: beta / (2 * s**2 + beta)),
        "those are mean and std of the sample x; what was asked for is the noise z.": (
            lambda slope, offset, target, beta: (
                offset + slope * _best_mean(slope, target - offset, beta), slope * _best_std(slope, beta)
            )
        ),
        "the offset is missing: without any noise the sample is there, not at 0.": (
            lambda slope, offset, target, beta: (_best_mean(slope, target, beta), _best_std(slope, beta))
        ),
        "target and offset are exchanged.": _optimum(lambda s, gap, beta: _best_mean(s, -gap, beta), _best_std),
    },
)  # fmt: skip

exercises = [NOISE_GRADIENT, CALIBRATE, NOISE_LOSS, OPTIMAL_NOISE, *QUESTIONS]
