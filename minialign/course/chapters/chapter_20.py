"""Exercises of chapter 20: the logit of a pair, the same in closed form on the line, the regression that DPO is, and
what labels that err do to its optimum.
"""

import torch
from torch.nn import functional as F

from minialign.course.chapters.questions_20 import QUESTIONS
from minialign.course.check import Exercise

# ---- the logit of a pair ---------------------------------------------------------------------------------------------


def preference_logit(chosen, rejected, chosen_ref, rejected_ref, noise, beta, reduction):
    """u (n,) from predictions of the noise that a pair shares, (n, ...) each.

    "mean": -beta/2 [...] of means of squared errors; "sum": -beta [...] of their sums.
    """

    def error(prediction):
        squares = (prediction - noise).square().flatten(1)
        return squares.mean(1) if reduction == "mean" else squares.sum(1)

    margin = (error(chosen) - error(chosen_ref)) - (error(rejected) - error(rejected_ref))
    return -beta * margin / 2 if reduction == "mean" else -beta * margin


def _logit(
    error=lambda p, e: (p - e).square(),
    put=None,
    margin=lambda w, l, w_ref, l_ref: (w - w_ref) - (l - l_ref),  # noqa: E741
    factor=lambda reduction: -0.5 if reduction == "mean" else -1.0,
):
    """A variant: factor(reduction) beta margin(errors)."""

    def wrong(chosen, rejected, chosen_ref, rejected_ref, noise, beta, reduction):
        def reduced(prediction):
            x = error(prediction, noise).flatten(1)
            return put(x, reduction) if put is not None else (x.mean(1) if reduction == "mean" else x.sum(1))

        return factor(reduction) * beta * margin(*map(reduced, (chosen, rejected, chosen_ref, rejected_ref)))

    return wrong


PREDICTIONS = ("chosen", "rejected", "chosen_ref", "rejected_ref", "noise")


def _logit_case(g, reduction="mean", shape=(3, 2, 5), dtype=torch.float32):
    drawn = {name: torch.randn(shape, generator=g, dtype=dtype) for name in PREDICTIONS}
    return drawn | dict(beta=3.0, reduction=reduction)


def _logit_numbers(*values, reduction, beta):
    numbers = {name: torch.tensor([[float(v)]]) for name, v in zip(PREDICTIONS, values, strict=True)}
    return numbers | dict(beta=beta, reduction=reduction)


PREFERENCE_LOGIT = Exercise(
    "20/preference_logit",
    points=6,
    reference=preference_logit,
    grad_wrt=("chosen", "rejected"),
    cases={
        "one pair of numbers, sums": _logit_numbers(0.5, 2.0, 1.0, 1.5, 0.0, reduction="sum", beta=1.0),
        "one pair of numbers, means": _logit_numbers(0.5, 2.0, 1.0, 1.5, 1.0, reduction="mean", beta=4.0),
        "images, means": _logit_case,
        "images, sums": lambda g: _logit_case(g, "sum"),
        "float64": lambda g: _logit_case(g, "mean", (4, 7), torch.float64),
    },
    mistakes={
        "the sign (or the pair is swapped): an error that FALLS below the reference's speaks for an image.": _logit(
            factor=lambda r: 0.5 if r == "mean" else 1.0
        ),
        "under 'mean' beta comes with a half, as in the official code.": _logit(factor=lambda r: -1.0),
        "the half belongs to 'mean' alone; eq. 14, of sums, has none.": _logit(factor=lambda r: -0.5),
        "the half is on the wrong one: 'mean' has it, 'sum' does not.": _logit(
            factor=lambda r: -1.0 if r == "mean" else -0.5
        ),
        "the reference is missing: what counts is how much BETTER than it an image is denoised.": _logit(
            margin=lambda w, l, w_ref, l_ref: w - l  # noqa: E741
        ),
        "the rejected image is missing: that is fine-tuning on the chosen ones.": _logit(
            margin=lambda w, l, w_ref, l_ref: w - w_ref  # noqa: E741
        ),
        "the two margins are added where their difference is due.": _logit(
            margin=lambda w, l, w_ref, l_ref: (w - w_ref) + (l - l_ref)  # noqa: E741
        ),
        "errors are squared.": _logit(error=lambda p, e: (p - e).abs()),
        "the noise is missing: an error is prediction minus noise.": _logit(error=lambda p, e: p.square()),
        "'mean' and 'sum' are exchanged.": _logit(put=lambda x, r: x.sum(1) if r == "mean" else x.mean(1)),
        "a root too many: the squares are summed, their root is not taken.": _logit(
            put=lambda x, r: (x.mean(1) if r == "mean" else x.sum(1)).sqrt()
        ),
    },
)

# ---- a pair on the line ----------------------------------------------------------------------------------------------


def line_logit(chosen, rejected, noise_chosen, noise_rejected, alpha_bar, shift):
    """u (n,), beta = 1 of sums, data N(0, 1), eps_theta = eps_ref - k shift: 2 k^2 shift (lead - a/s gap of noise)."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    k = signal * sigma
    seen = (chosen - rejected) - signal / sigma * (noise_chosen - noise_rejected)
    return 2 * k**2 * shift * seen


def _line(
    slope=lambda a, s: a * s,
    noises=lambda w, l: (w, l),  # noqa: E741
    reference=lambda x, s: s * x,
    moved=lambda ref, k, shift: ref - k * shift,
    level=lambda alpha_bar: (alpha_bar**0.5, (1 - alpha_bar) ** 0.5),
    out=lambda u: u,
):
    """A variant, by the errors themselves."""

    def wrong(chosen, rejected, noise_chosen, noise_rejected, alpha_bar, shift):
        signal, sigma = level(alpha_bar)
        noise = noises(noise_chosen, noise_rejected)

        def gain(x, e):
            ref = reference(signal * x + sigma * e, sigma)
            return (ref - e) ** 2 - (moved(ref, slope(signal, sigma), shift) - e) ** 2

        return out(gain(chosen, noise[0]) - gain(rejected, noise[1]))

    return wrong


LINE = ("chosen", "rejected", "noise_chosen", "noise_rejected")


def _line_case(g, dtype=torch.float64, shared=False):
    drawn = {name: torch.randn(6, generator=g, dtype=dtype) for name in LINE}
    if shared:
        drawn["noise_rejected"] = drawn["noise_chosen"].clone()
    return drawn | dict(alpha_bar=float(0.1 + 0.8 * torch.rand((), generator=g)), shift=0.7)


def _line_numbers(*values):
    numbers = {name: torch.tensor([float(v)], dtype=torch.float64) for name, v in zip(LINE, values, strict=True)}
    return numbers | dict(alpha_bar=0.64, shift=0.5)


LINE_LOGIT = Exercise(
    "20/line_logit",
    points=4,
    reference=line_logit,
    cases={
        "the same noise for both": _line_numbers(1.2, -0.3, 0.5, 0.5),
        "two noises": _line_numbers(1.2, -0.3, 0.5, -0.2),
        "several, one noise": lambda g: _line_case(g, shared=True),
        "several, two noises": _line_case,
        "float32": lambda g: _line_case(g, torch.float32),
    },
    mistakes={
        "both images were corrupted with the noise of the chosen one; here each has its own.": _line(
            noises=lambda w, l: (w, w)  # noqa: E741
        ),
        "the noises are exchanged.": _line(noises=lambda w, l: (l, w)),  # noqa: E741
        "the sign, of u or of the shift: a mean further right means LESS noise there, eps_ref - k shift.": _line(
            moved=lambda ref, k, shift: ref + k * shift
        ),
        "k is alpha times sigma, one of the two is missing.": _line(slope=lambda a, s: s),
        "k is alpha times sigma; the other one is missing.": _line(slope=lambda a, s: a),
        "k is missing.": _line(slope=lambda a, s: 1.0),
        "the levels: signal is the ROOT of alpha_bar, sigma that of 1 - alpha_bar.": _line(
            level=lambda alpha_bar: (alpha_bar, 1 - alpha_bar)
        ),
        "signal and sigma are exchanged.": _line(level=lambda alpha_bar: ((1 - alpha_bar) ** 0.5, alpha_bar**0.5)),
        "the base model says sigma x_t: its noise grows with the level.": _line(reference=lambda x, s: x),
        "there is no half in the convention of sums.": _line(out=lambda u: u / 2),
    },
)

# ---- the regression --------------------------------------------------------------------------------------------------


def fitted_slope(margins):
    """The b at which mean -log sigmoid(b margins) is smallest, a scalar: Newton's method from 0."""
    z, b = margins.double(), torch.zeros((), dtype=torch.float64)
    for _ in range(15):
        wrong = (-b * z).sigmoid()
        b = b + (z * wrong).mean() / (z.square() * wrong * (1 - wrong)).mean()
    return b.to(margins.dtype)


def _slope(steps=15, direction=1.0, z_of=lambda m: m, curvature=lambda z, w: z.square() * w * (1 - w), out=lambda b: b):
    """A variant of Newton's method."""

    def wrong(margins):
        z, b = z_of(margins.double()), torch.zeros((), dtype=torch.float64)
        for _ in range(steps):
            miss = (-b * z).sigmoid()
            b = b + direction * (z * miss).mean() / curvature(z, miss).mean()
        return out(b).to(margins.dtype)

    return wrong


def _margins(g, n=60, slope=1.2, dtype=torch.float64):
    """Margins of the winner over the loser, labels drawn by Bradley and Terry; some of them negative."""
    z = torch.randn(n, generator=g, dtype=dtype)
    won = torch.rand(n, generator=g, dtype=dtype) < (slope * z).sigmoid()
    found = torch.where(won, z, -z)
    found[0], found[1] = -0.5, 1.5  # a finite optimum, whatever was drawn
    return dict(margins=found)


FITTED_SLOPE = Exercise(
    "20/fitted_slope",
    points=4,
    reference=fitted_slope,
    tolerance=1e-4,
    cases={
        "three pairs": dict(margins=torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)),  # b = log 2
        "wrong as often as right": dict(margins=torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)),
        "several": _margins,
        "float32": lambda g: _margins(g, 40, 0.7, torch.float32),
    },
    mistakes={
        "one step of Newton's method (or least squares); it has to be repeated until it stands still.": _slope(steps=1),
        "three steps are not always enough: repeat until it stands still.": _slope(steps=3),
        "the sign of the slope: larger margins are to be MORE probable.": _slope(out=lambda b: -b),
        "least squares: the labels are votes, not numbers; minimise -log sigmoid.": (
            lambda margins: margins.mean() / margins.square().mean()
        ),
        "the size of the margins is thrown away.": _slope(z_of=lambda m: m.sign()),
        "the mean margin is no slope.": lambda margins: margins.mean(),
        "one over the slope.": _slope(out=lambda b: 1 / b),
    },
)

# ---- labels that err -------------------------------------------------------------------------------------------------


def smoothed_loss(logit, wrong):
    """(expected -log sigmoid of a pair whose label is wrong with that probability (n,), the logit at its minimum)."""
    best = torch.as_tensor((1 - wrong) / wrong, dtype=logit.dtype).log()
    return F.softplus(-logit) + wrong * logit, best


def _smoothed(loss=lambda u, p: F.softplus(-u) + p * u, best=lambda p: ((1 - p) / p).log()):
    """A variant: another loss, another place of its minimum."""
    return lambda logit, wrong: (loss(logit, wrong), best(torch.as_tensor(wrong, dtype=logit.dtype)))


def _smoothed_case(g, dtype=torch.float64):
    return dict(
        logit=2 * torch.randn(7, generator=g, dtype=dtype), wrong=float(0.05 + 0.3 * torch.rand((), generator=g))
    )


SMOOTHED_LOSS = Exercise(
    "20/smoothed_loss",
    points=3,
    reference=smoothed_loss,
    grad_wrt=("logit",),
    cases={
        "one label in four is wrong": dict(logit=torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), wrong=0.25),
        "several": _smoothed_case,
        "float32": lambda g: _smoothed_case(g, torch.float32),
    },
    mistakes={
        "the two cases are exchanged: the label is RIGHT with probability 1 - wrong.": _smoothed(
            lambda u, p: F.softplus(-u) + (1 - p) * u, lambda p: (p / (1 - p)).log()
        ),
        "only the right labels are counted, with their share.": _smoothed(lambda u, p: (1 - p) * F.softplus(-u)),
        "a wrong label does not take the loss away: it turns the pair round, u -> -u.": _smoothed(
            lambda u, p: (1 - p) * F.softplus(-u) - p * F.softplus(-u)
        ),
        "swapping a pair ADDS its logit to the loss.": _smoothed(lambda u, p: F.softplus(-u) - p * u),
        "the labels still count as if all were right.": _smoothed(lambda u, p: F.softplus(-u)),
        "the loss is right; its minimum is at the LOG of the odds.": _smoothed(best=lambda p: (1 - p) / p),
        "the loss is right; its minimum is on the other side: right labels are the more frequent.": _smoothed(
            best=lambda p: (p / (1 - p)).log()
        ),
        "the loss is right; at its minimum sigmoid(u) is the share of right labels, so u is not that share.": _smoothed(
            best=lambda p: 1 - p
        ),
        "the loss is right; of right AGAINST wrong: (1 - p) over p, not over 1.": _smoothed(
            best=lambda p: (1 - p).log()
        ),
    },
)

exercises = [PREFERENCE_LOGIT, LINE_LOGIT, FITTED_SLOPE, SMOOTHED_LOSS, *QUESTIONS]
