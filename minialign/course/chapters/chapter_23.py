"""Exercises of chapter 23: the weight of a pair, scaled margins and smoothed labels, where each ends, ReNoise."""

import math
from itertools import pairwise

import torch
from torch.nn import functional as F

from minialign.course.chapters.questions_23 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import soft_label_loss
from minialign.methods import smpo

# ---- the weight of a pair --------------------------------------------------------------------------------------------


def smooth_weights(r_w, r_l, r_min, r_max, gamma):
    """w = 2 alpha - gamma with alpha = gamma sigmoid(r'_w - r'_l), r' = (r - r_min) / (r_max - r_min), (n,)."""
    return smpo.smooth_weights(r_w, r_l, r_min, r_max, gamma)


def _weight(formula):
    """A variant: formula(x, gamma), x the difference of the normalised scores."""
    return lambda r_w, r_l, r_min, r_max, gamma: formula((r_w - r_l) / (r_max - r_min), gamma)


def _by_the_batch(r_w, r_l, r_min, r_max, gamma):
    scores = torch.cat([r_w, r_l])
    return gamma * (2 * ((r_w - r_l) / (scores.max() - scores.min()).clamp_min(1e-9)).sigmoid() - 1)


def _scores(dtype):
    def case(g):
        r_l = torch.randn(6, generator=g, dtype=dtype)
        r_w = r_l + 2 * torch.rand(6, generator=g, dtype=dtype)
        low, high = float(r_l.min()) - 0.3, float(r_w.max()) + 0.4
        return dict(r_w=r_w, r_l=r_l, r_min=low, r_max=high, gamma=2 + 8 * float(torch.rand((), generator=g)))

    return case


SMOOTH_WEIGHTS = Exercise(
    "23/smooth_weights",
    points=4,
    reference=smooth_weights,
    cases={
        "a tie": dict(r_w=torch.tensor([0.4]), r_l=torch.tensor([0.4]), r_min=0.0, r_max=1.0, gamma=10.0),
        "scores from 0 to 1": dict(
            r_w=torch.tensor([0.55, 0.7, 1.0]), r_l=torch.tensor([0.5, 0.2, 0.0]), r_min=0.0, r_max=1.0, gamma=10.0
        ),
        "PickScore's scale": dict(
            r_w=torch.tensor([0.2312, 0.2105]), r_l=torch.tensor([0.2011, 0.2101]), r_min=0.115435, r_max=0.282016,
            gamma=10.0,
        ),
        "drawn": _scores(torch.float32),
        "float64": _scores(torch.float64),
    },
    mistakes={
        "that is alpha = gamma p, an exponent. The logit's factor is alpha minus the OTHER exponent, gamma - alpha.": (
            _weight(lambda x, gamma: gamma * x.sigmoid())
        ),
        "alpha is gamma p, not p: both terms of 2 alpha - gamma carry gamma.": _weight(
            lambda x, gamma: 2 * x.sigmoid() - gamma
        ),
        "2 p - 1 is right, and gamma is missing.": _weight(lambda x, gamma: 2 * x.sigmoid() - 1),
        "2 sigmoid(x) - 1 is tanh(x / 2); yours is tanh(x).": _weight(lambda x, gamma: gamma * x.tanh()),
        "the scores were not normalised: with PickScore's scale every pair would look like a near-tie.": (
            lambda r_w, r_l, r_min, r_max, gamma: gamma * (2 * (r_w - r_l).sigmoid() - 1)
        ),
        "normalised by the smallest and largest score of this batch; r_min and r_max are those of the data set.": (
            _by_the_batch
        ),
        "divided by r_max; the scores span r_max - r_min.": (
            lambda r_w, r_l, r_min, r_max, gamma: gamma * (2 * ((r_w - r_l) / r_max).sigmoid() - 1)
        ),
        "the other way round: a clear win would push the winner away.": _weight(
            lambda x, gamma: gamma * (2 * (-x).sigmoid() - 1)
        ),
        "half of it: 2 alpha - gamma is gamma (2 p - 1).": _weight(lambda x, gamma: gamma * (x.sigmoid() - 0.5)),
    },
)  # fmt: skip

# ---- two ways to be soft ---------------------------------------------------------------------------------------------


def soft_losses(logit, p, gamma):
    """(SmPO's -log sigmoid(w u), cDPO's -p log sigmoid(u) - (1 - p) log sigmoid(-u)), (n,); w = gamma (2 p - 1)."""
    return F.softplus(-gamma * (2 * p - 1) * logit), soft_label_loss(logit, p)


def _losses(margin, label):
    """A variant of either loss: margin(u, p, w), label(u, p)."""

    def wrong(logit, p, gamma):
        return margin(logit, p, gamma * (2 * p - 1)), label(logit, p)

    return wrong


def _margin(u, p, w):
    return F.softplus(-w * u)


def _label(u, p):
    return p * F.softplus(-u) + (1 - p) * F.softplus(u)


def _logits(dtype):
    def case(g):
        return dict(
            logit=3 * torch.randn(7, generator=g, dtype=dtype),
            p=0.5 + 0.45 * torch.rand(7, generator=g, dtype=dtype),
            gamma=1 + 4 * float(torch.rand((), generator=g)),
        )

    return case


SOFT_LOSSES = Exercise(
    "23/soft_losses",
    points=4,
    reference=soft_losses,
    grad_wrt=("logit",),
    cases={
        "at the start, u = 0": dict(logit=torch.zeros(2), p=torch.tensor([0.6, 0.9]), gamma=2.0),
        "a near-tie and a clear win": dict(logit=torch.tensor([1.5, 1.5]), p=torch.tensor([0.51, 0.95]), gamma=4.0),
        "drawn": _logits(torch.float32),
        "float64": _logits(torch.float64),
        "far away": dict(logit=torch.tensor([-150.0, 150.0]), p=torch.tensor([0.8, 0.7]), gamma=2.0),
    },
    mistakes={
        "the first loss is weighed from outside; SmPO's factor stands on the logit, INSIDE the sigmoid.": _losses(
            lambda u, p, w: w * F.softplus(-u), _label
        ),
        "the first loss takes gamma p as its factor; a tie would still push. It is gamma (2 p - 1).": (
            lambda logit, p, gamma: (F.softplus(-gamma * p * logit), _label(logit, p))
        ),
        "the first loss has lost gamma.": lambda logit, p, gamma: (F.softplus(-(2 * p - 1) * logit), _label(logit, p)),
        "the first loss pushes the wrong way: it should fall as the logit grows.": _losses(
            lambda u, p, w: F.softplus(w * u), _label
        ),
        "the second loss lacks the term of the other label: with probability 1 - p the LOSER would win.": _losses(
            _margin, lambda u, p: p * F.softplus(-u)
        ),
        "the second loss has p and 1 - p swapped.": _losses(_margin, lambda u, p: _label(-u, p)),
        "the second loss weighs both labels alike.": _losses(_margin, lambda u, p: _label(u, torch.full_like(p, 0.5))),
        "the second loss has gamma in it; labels that are smoothed know no gamma.": (
            lambda logit, p, gamma: (_margin(logit, p, gamma * (2 * p - 1)), _label(gamma * logit, p))
        ),
        "the two losses are right, in the other order.": lambda logit, p, gamma: soft_losses(logit, p, gamma)[::-1],
        "far from 0 your sigmoid rounds to 0 and its logarithm to -inf: use F.logsigmoid, or softplus.": _losses(
            lambda u, p, w: -(w * u).sigmoid().log(),
            lambda u, p: -p * u.sigmoid().log() - (1 - p) * (-u).sigmoid().log(),
        ),
        "a mean over the pairs; one loss a pair.": lambda logit, p, gamma: tuple(
            loss.mean() for loss in soft_losses(logit, p, gamma)
        ),
    },
)

# ---- where each of them ends -----------------------------------------------------------------------------------------


def best_logits(p):
    """(the logit where SmPO's loss is least, the one where cDPO's is), p > 1/2, (n,) each; inf: it falls for ever."""
    return torch.full_like(p, math.inf), (p / (1 - p)).log()


def _ends(label, margin=lambda p: torch.full_like(p, math.inf)):
    return lambda p: (margin(p), label(p))


def _logit(p):
    return p.log() - (1 - p).log()


BEST_LOGITS = Exercise(
    "23/best_logits",
    points=3,
    reference=best_logits,
    cases={
        "three to one": dict(p=torch.tensor([0.75])),
        "nearly a tie, nearly sure": dict(p=torch.tensor([0.501, 0.999])),
        "drawn": lambda g: dict(p=0.52 + 0.45 * torch.rand(5, generator=g)),
        "float64": lambda g: dict(p=0.52 + 0.45 * torch.rand(5, generator=g, dtype=torch.float64)),
    },
    mistakes={
        "SmPO's loss has no minimum: its slope -w sigmoid(-w u) is below 0 at every u. Say float('inf').": _ends(
            _logit, _logit
        ),
        "at u = 0 SmPO's loss is log 2, and it goes on falling from there.": _ends(_logit, torch.zeros_like),
        "cDPO's loss has its minimum where sigmoid(u) = p; yours is p itself, a probability and no logit.": _ends(
            lambda p: p
        ),
        "cDPO: 2 p - 1 is SmPO's factor. Set the slope of cDPO's loss to 0: sigmoid(u) = p.": _ends(
            lambda p: 2 * p - 1
        ),
        "cDPO: log p is a log-probability; the sigmoid is undone by the logit, log p - log(1 - p).": _ends(torch.log),
        "cDPO: the sign is turned; a likely winner wants a POSITIVE logit.": _ends(lambda p: -_logit(p)),
        "cDPO: the odds p / (1 - p); their logarithm is missing.": _ends(lambda p: p / (1 - p)),
        "cDPO falls to a finite end: with 1 - p > 0 a large logit costs (1 - p) u.": _ends(
            lambda p: torch.full_like(p, math.inf)
        ),
        "in the other order: SmPO's first.": lambda p: best_logits(p)[::-1],
    },
)

# ---- ReNoise ---------------------------------------------------------------------------------------------------------


def renoise_inversion(predict, x, alpha_bar):
    """The states of a ReNoise inversion (n + 1, *x.shape), x first, over the levels alpha_bar (n + 1,)."""
    return _inverted(predict, x, alpha_bar)


def _mean_of_both(predict, x, now, then, move):
    first = predict(x, now)
    return move(x, (first + predict(move(x, first, now, then), then)) / 2, now, then)


def _moved(x, noise, now, then):
    """The step S: the image that x and the noise imply, at the level `then`."""
    return then.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise


def _inverted(predict, x, alpha_bar, step=_mean_of_both, move=_moved):
    """A variant: step(predict, x, now, then, move) -> the next state; move(x, noise, now, then): S."""
    states = [x]
    for now, then in pairwise(alpha_bar):
        states.append(step(predict, states[-1], now, then, move))
    return torch.stack(states)


def _walk(step=_mean_of_both, move=_moved):
    return lambda predict, x, alpha_bar: _inverted(predict, x, alpha_bar, step, move)


def _old_level(predict, x, now, then, move):
    first = predict(x, now)
    return move(x, (first + predict(move(x, first, now, then), now)) / 2, now, then)


def _from_the_guess(predict, x, now, then, move):
    first = predict(x, now)
    guess = move(x, first, now, then)
    return move(guess, (first + predict(guess, then)) / 2, now, then)


def _old_point(predict, x, now, then, move):
    return move(x, (predict(x, now) + predict(x, then)) / 2, now, then)


def _second_alone(predict, x, now, then, move):
    return move(x, predict(move(x, predict(x, now), now, then), then), now, then)


def _sum(predict, x, now, then, move):
    first = predict(x, now)
    return move(x, first + predict(move(x, first, now, then), then), now, then)


def gaussian_noise(x, alpha_bar):
    """The exact noise prediction of N(0, .5^2)."""
    return (1 - alpha_bar).sqrt() * x / (0.25 * alpha_bar + 1 - alpha_bar)


def two_points_noise(x, alpha_bar):
    """That of two points, -1 and 1."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return (x - signal * (signal * x / noise**2).tanh()) / noise


def cosine_levels(n, first=0.9999, last=0.05, dtype=torch.float32):
    """n + 1 levels, even in the angle of the cosine."""
    ends = math.acos(first**0.5), math.acos(last**0.5)
    return (torch.linspace(*ends, n + 1, dtype=torch.float64).cos() ** 2).to(dtype)


def _states(predict, dtype):
    def case(g):
        n = int(torch.randint(2, 6, (), generator=g))
        last = 0.05 + 0.4 * float(torch.rand((), generator=g))
        x = torch.randn(3, 2, generator=g, dtype=dtype)
        return dict(predict=predict, x=x, alpha_bar=cosine_levels(n, 0.99, last, dtype))

    return case


RENOISE_INVERSION = Exercise(
    "23/renoise_inversion",
    points=6,
    reference=renoise_inversion,
    cases={
        "one step": dict(predict=gaussian_noise, x=torch.tensor([1.0]), alpha_bar=torch.tensor([0.81, 0.36])),
        "five steps": dict(predict=gaussian_noise, x=torch.tensor([1.0]), alpha_bar=cosine_levels(5)),
        "two points of data": _states(two_points_noise, torch.float32),
        "float64": _states(gaussian_noise, torch.float64),
    },
    parts={"one step": 3},
    mistakes={
        "this is DDIM inversion: the network was asked once a step, at the point that is left.": _walk(
            lambda predict, x, now, then, move: move(x, predict(x, now), now, then)
        ),
        "asked the second time at the OLD level: a point of the new level needs the new level's network.": _walk(
            _old_level
        ),
        "the second question was put at the old POINT; it belongs to the guess.": _walk(_old_point),
        "the corrected step was taken from the guess; it starts again where the first one started.": _walk(
            _from_the_guess
        ),
        "only the second answer was used; the two errors cancel in the mean of both.": _walk(_second_alone),
        "the two predictions were added; their mean is due.": _walk(_sum),
        "alpha_bar is a share of the variance: signal and noise have its root, and that of 1 - alpha_bar.": _walk(
            move=lambda x, e, a, b: b * (x - (1 - a) * e) / a + (1 - b) * e
        ),
        "the image that x implies is (x - noise) / sqrt(alpha_bar): the division is missing.": _walk(
            move=lambda x, e, a, b: b.sqrt() * (x - (1 - a).sqrt() * e) + (1 - b).sqrt() * e
        ),
        "the noise was taken off and not put back at the new level.": _walk(
            move=lambda x, e, a, b: b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt()
        ),
        "the noise was put back at the old level's size.": _walk(
            move=lambda x, e, a, b: b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - a).sqrt() * e
        ),
        "old and new level are swapped in the step: that way leads back to the data.": _walk(
            move=lambda x, e, a, b: _moved(x, e, b, a)
        ),
        "the walk goes from the last level to the first; the image lies at the first.": (
            lambda predict, x, alpha_bar: _inverted(predict, x, alpha_bar.flip(0))
        ),
        "only the last state came back; the whole path is due, x first.": (
            lambda predict, x, alpha_bar: _inverted(predict, x, alpha_bar)[-1]
        ),
        "x itself, where the path begins, is missing.": lambda predict, x, alpha_bar: _inverted(predict, x, alpha_bar)[
            1:
        ],
    },
)

exercises = [SMOOTH_WEIGHTS, SOFT_LOSSES, BEST_LOGITS, RENOISE_INVERSION, *QUESTIONS]
