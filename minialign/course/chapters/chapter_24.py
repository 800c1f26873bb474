"""Exercises of chapter 24: the logit of a labelled pair, the log-ratio of a re-noising step, the loss of a comparison,
and the optimum of a linear-Gaussian student.
"""

import math

import torch
from torch.nn import functional as F

from minialign.course.chapters.questions_24 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import expand_as
from minialign.methods import pso

# ---- a labelled pair -------------------------------------------------------------------------------------------------


def pair_logit(chosen, rejected, chosen_ref, rejected_ref, beta, loser_weight):
    """u of each pair (n,), from the squared errors (n,) of its two samples under student and frozen student."""
    return beta * ((chosen_ref - loser_weight * rejected_ref) - (chosen - loser_weight * rejected))


def _logit(inner, outer=lambda u: u):
    """A variant: inner(w, l, w_ref, l_ref, k) -> (n,), times beta."""

    def wrong(chosen, rejected, chosen_ref, rejected_ref, beta, loser_weight):
        return outer(beta * inner(chosen, rejected, chosen_ref, rejected_ref, loser_weight))

    return wrong


def _drop(w, l, w_ref, l_ref, k):  # noqa: E741
    return (w_ref - w) - k * (l_ref - l)


def _errors(g, dtype=torch.float32):
    names = ("chosen", "rejected", "chosen_ref", "rejected_ref")
    return {name: torch.rand(5, generator=g, dtype=dtype) for name in names} | dict(beta=3.0, loser_weight=0.4)


PAIR_LOGIT = Exercise(
    "24/pair_logit",
    points=4,
    reference=pair_logit,
    grad_wrt=("chosen", "rejected"),
    cases={
        "one pair": dict(
            chosen=torch.tensor([0.5]),
            rejected=torch.tensor([1.0]),
            chosen_ref=torch.tensor([0.75]),
            rejected_ref=torch.tensor([0.5]),
            beta=2.0,
            loser_weight=0.5,
        ),
        "several": _errors,
        "float64": lambda g: _errors(g, torch.float64),
    },
    mistakes={
        "the sign: errors are bad, so u grows where the chosen one's error falls below the reference's.": _logit(
            lambda *e: -_drop(*e)
        ),
        "no half here: that is Diffusion-DPO's convention.": _logit(_drop, lambda u: u / 2),
        "loser_weight is missing.": _logit(lambda w, l, w_ref, l_ref, k: _drop(w, l, w_ref, l_ref, 1.0)),  # noqa: E741
        "loser_weight belongs to the rejected one's errors alone.": _logit(lambda *e: e[4] * _drop(*e[:4], 1.0)),
        "loser_weight belongs to the frozen student's error of the rejected one, too.": _logit(
            lambda w, l, w_ref, l_ref, k: (w_ref - w) - (l_ref - k * l)  # noqa: E741
        ),
        "without the frozen student it is the personalisation script's hinge: measure both against it.": _logit(
            lambda w, l, w_ref, l_ref, k: k * l - w  # noqa: E741
        ),
        "the rejected one's drop has to be taken away, not added: both would be asked to fall.": _logit(
            lambda w, l, w_ref, l_ref, k: (w_ref - w) + k * (l_ref - l)  # noqa: E741
        ),
        "u is asked for, not yet its loss.": _logit(_drop, lambda u: F.softplus(-u)),
        "one number for the whole batch; each pair has a logit of its own.": _logit(_drop, lambda u: u.mean()),
    },
)

# ---- a step of the sampler -------------------------------------------------------------------------------------------


def renoise_log_ratio(next, denoised, denoised_ref, alpha_bar_next):
    """log pi(next) - log pi_ref(next), (n,), a mean over elements, of N(sqrt(abar') denoised, (1 - abar') I)."""
    signal = expand_as(alpha_bar_next.sqrt(), denoised)
    gap = (next - signal * denoised_ref).square() - (next - signal * denoised).square()
    return gap.flatten(1).mean(1) / (2 * (1 - alpha_bar_next))


def _ratio(signal=torch.sqrt, scale=lambda a: 2 * (1 - a), reduce=lambda gap: gap.flatten(1).mean(1), sign=1):
    """A variant."""

    def wrong(next, denoised, denoised_ref, alpha_bar_next):
        root = expand_as(signal(alpha_bar_next), denoised)
        gap = (next - root * denoised_ref).square() - (next - root * denoised).square()
        return sign * reduce(gap) / scale(alpha_bar_next)

    return wrong


def _step(g, shape=(4, 3), dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    alpha_bar_next = 0.1 + 0.8 * torch.rand(shape[0], **draw)
    names = ("next", "denoised", "denoised_ref")
    return {name: torch.randn(shape, **draw) for name in names} | dict(alpha_bar_next=alpha_bar_next)


RENOISE_LOG_RATIO = Exercise(
    "24/renoise_log_ratio",
    points=4,
    reference=renoise_log_ratio,
    grad_wrt=("denoised",),
    cases={
        "one number": dict(
            next=torch.tensor([[1.0]]),
            denoised=torch.tensor([[1.5]]),
            denoised_ref=torch.tensor([[0.5]]),
            alpha_bar_next=torch.tensor([0.25]),
        ),
        "one axis": _step,
        "several axes": lambda g: _step(g, (3, 2, 4)),
        "float64": lambda g: _step(g, (5, 2), torch.float64),
    },
    mistakes={
        "the sign: the policy's log-density comes first, the reference's is taken away.": _ratio(sign=-1),
        "the mean is sqrt(abar') times the guess: a share of signal, by its root.": _ratio(lambda a: a),
        "the mean is not the guess itself: at the next level only a part of it is left as signal.": _ratio(
            torch.ones_like
        ),
        "the half of the Gaussian's exponent is missing.": _ratio(scale=lambda a: 1 - a),
        "1 - abar' is the variance already.": _ratio(scale=lambda a: 2 * (1 - a).sqrt()),
        "abar' is the share of signal; the noise has the variance that is left.": _ratio(scale=lambda a: 2 * a),
        "a sum over the elements; PSO's code takes the mean.": _ratio(reduce=lambda gap: gap.flatten(1).sum(1)),
        "one number for the whole batch; every sample took a step of its own.": _ratio(reduce=lambda gap: gap.mean()),
        "a ratio; its logarithm is asked for.": (lambda *args, **kwargs: renoise_log_ratio(*args, **kwargs).exp()),
    },
)

# ---- a comparison ----------------------------------------------------------------------------------------------------


def comparison_loss(log_ratio, preference, beta, clip_range):
    """A scalar: -log sigmoid(beta h (log rho_0 - log rho_1)), a mean over pairs and steps; log_ratio (2, n, k)."""
    loss, _ = pso.online_loss(log_ratio, torch.zeros_like(log_ratio), preference, beta, clip_range)
    return loss.mean()


def _held(log_ratio, c):
    return log_ratio.clamp(math.log1p(-c), math.log1p(c))


def _sign(preference):
    return (2 * preference - 1).unsqueeze(-1)


def _comparison(argument, reduce=lambda loss: loss.mean(), loss=lambda u: F.softplus(-u)):
    """A variant: argument(log_ratio, preference, clip_range), times beta."""

    def wrong(log_ratio, preference, beta, clip_range):
        return reduce(loss(beta * argument(log_ratio, preference, clip_range)))

    return wrong


def _right(log_ratio, preference, c):
    held = _held(log_ratio, c)
    return _sign(preference) * (held[0] - held[1])


def _comparisons(g, dtype=torch.float32):
    log_ratio = 0.15 * torch.randn(2, 5, 3, generator=g, dtype=dtype)
    preference = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=dtype)
    return dict(log_ratio=log_ratio, preference=preference, beta=4.0, clip_range=0.1)


COMPARISON_LOSS = Exercise(
    "24/comparison_loss",
    points=5,
    reference=comparison_loss,
    grad_wrt=("log_ratio",),
    cases={
        "the first wins, one step": dict(
            log_ratio=torch.tensor([[[0.05]], [[-0.02]]]), preference=torch.tensor([1.0]), beta=10.0, clip_range=0.1
        ),
        "the second wins, two steps": dict(
            log_ratio=torch.tensor([[[0.05, -0.08]], [[-0.02, 0.01]]]),
            preference=torch.tensor([0.0]),
            beta=10.0,
            clip_range=0.1,
        ),
        "a tie": dict(
            log_ratio=torch.tensor([[[0.05]], [[-0.02]]]), preference=torch.tensor([0.5]), beta=10.0, clip_range=0.1
        ),
        "beyond the clip": dict(
            log_ratio=torch.tensor([[[0.5]], [[-0.02]]]), preference=torch.tensor([1.0]), beta=10.0, clip_range=0.1
        ),
        "several": _comparisons,
        "float64": lambda g: _comparisons(g, torch.float64),
    },
    mistakes={
        "h is +1, -1, or 0 for a tie; the preference itself is 1, 0, or 1/2.": _comparison(
            lambda u, p, c: p.unsqueeze(-1) * (_held(u, c)[0] - _held(u, c)[1])
        ),
        "the sign: what won is to become likelier.": _comparison(lambda *a: -_right(*a)),
        "the ratio is clipped, 1 - c to 1 + c; its logarithm lies between log(1 - c) and log(1 + c).": _comparison(
            lambda u, p, c: _sign(p) * (u.clamp(-c, c)[0] - u.clamp(-c, c)[1])
        ),
        "each ratio is clipped, not the difference of the two.": _comparison(
            lambda u, p, c: _sign(p) * _held(u[0] - u[1], c)
        ),
        "nothing is clipped.": _comparison(lambda u, p, c: _sign(p) * (u[0] - u[1])),
        "the logarithm of the clipped ratio is missing.": _comparison(
            lambda u, p, c: _sign(p) * (_held(u, c)[0].exp() - _held(u, c)[1].exp())
        ),
        "each step has a loss of its own; steps are not summed inside the sigmoid.": _comparison(
            lambda *a: _right(*a).sum(-1)
        ),
        "the second's ratio has to be taken away.": _comparison(
            lambda u, p, c: _sign(p) * (_held(u, c)[0] + _held(u, c)[1])
        ),
        "ties are counted in the mean, with log 2 each.": (
            lambda log_ratio, preference, beta, clip_range: comparison_loss(
                log_ratio[:, preference != 0.5], preference[preference != 0.5], beta, clip_range
            )
        ),
        "a sum over pairs and steps where the mean is due.": _comparison(_right, lambda loss: loss.sum()),
        "one number is asked for: the mean over pairs and steps.": _comparison(_right, lambda loss: loss),
        "the log is missing: a sigmoid saturates where the student errs most.": _comparison(
            _right, loss=lambda u: (-u).sigmoid()
        ),
        "log sigmoid is to be made large; a loss is its negative.": _comparison(_right, loss=F.logsigmoid),
    },
)

# ---- where it ends ---------------------------------------------------------------------------------------------------


def best_shift(alpha_bar_next, slope, reward_slope, beta):
    """The shift of the student's guess at which the comparisons are explained: (1 - a) / sqrt(a) A g / beta."""
    return (1 - alpha_bar_next) / alpha_bar_next**0.5 * slope * reward_slope / beta


def _shift(change):
    """A variant: change(a, A, g, beta)."""
    return lambda alpha_bar_next, slope, reward_slope, beta: change(alpha_bar_next, slope, reward_slope, beta)


BEST_SHIFT = Exercise(
    "24/best_shift",
    points=3,
    reference=best_shift,
    cases={
        "round numbers": dict(alpha_bar_next=0.25, slope=0.5, reward_slope=2.0, beta=4.0),  # .75 / .5 * 1 / 4
        "drawn": lambda g: dict(
            alpha_bar_next=0.1 + 0.8 * float(torch.rand((), generator=g)),
            slope=0.2 + float(torch.rand((), generator=g)),
            reward_slope=0.5 + float(torch.rand((), generator=g)),
            beta=1.0 + float(torch.rand((), generator=g)),
        ),
    },
    mistakes={
        "that is the shift of the step's mean; the guess is scaled by sqrt(abar') on the way there.": _shift(
            lambda a, slope, g, beta: (1 - a) * slope * g / beta
        ),
        "the variance of the step, 1 - abar', not its root.": _shift(
            lambda a, slope, g, beta: ((1 - a) / a) ** 0.5 * slope * g / beta
        ),
        "more beta holds the student back: the shift falls with it.": _shift(
            lambda a, slope, g, beta: (1 - a) / a**0.5 * slope * g * beta
        ),
        "A, what the last call makes of a move, is missing.": _shift(
            lambda a, slope, g, beta: (1 - a) / a**0.5 * g / beta
        ),
        "the reward's slope is missing.": _shift(lambda a, slope, g, beta: (1 - a) / a**0.5 * slope / beta),
        "divided by A, where a move that matters more is worth more.": _shift(
            lambda a, slope, g, beta: (1 - a) / a**0.5 / slope * g / beta
        ),
        "sqrt(abar') upside down.": _shift(lambda a, slope, g, beta: (1 - a) * a**0.5 * slope * g / beta),
        "signal and noise are exchanged: the variance is 1 - abar'.": _shift(
            lambda a, slope, g, beta: a / (1 - a) ** 0.5 * slope * g / beta
        ),
    },
)

exercises = [PAIR_LOGIT, RENOISE_LOG_RATIO, COMPARISON_LOSS, BEST_SHIFT, *QUESTIONS]
