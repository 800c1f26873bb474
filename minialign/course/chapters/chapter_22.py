"""Exercises of chapter 22: a sampler's step read backwards, the logit at the states that it finds, what one Gaussian
says of its weight, and the level that the official code ends at.
"""

import torch

from minialign.course.chapters.questions_22 import QUESTIONS
from minialign.course.check import Exercise

# ---- a sampler's step, read backwards --------------------------------------------------------------------------------


def _column(level, states):
    return level.reshape(-1, *[1] * (states.ndim - 1))


def inverted_step(states, noise_pred, alpha_bar, alpha_bar_next):
    """sqrt(a') (x - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps, (batch, *dims); a, a' (batch,), a' the noisier."""
    a, b = _column(alpha_bar, states), _column(alpha_bar_next, states)
    denoised = (states - (1 - a).sqrt() * noise_pred) / a.sqrt()
    return b.sqrt() * denoised + (1 - b).sqrt() * noise_pred


def _stepped(denoise, renoise):
    """A variant: denoise(x, eps, a) to the clean image, renoise(clean, eps, a') from it."""

    def wrong(states, noise_pred, alpha_bar, alpha_bar_next):
        a, b = _column(alpha_bar, states), _column(alpha_bar_next, states)
        return renoise(denoise(states, noise_pred, a), noise_pred, b)

    return wrong


def _denoise(x, eps, a):
    return (x - (1 - a).sqrt() * eps) / a.sqrt()


def _renoise(clean, eps, b):
    return b.sqrt() * clean + (1 - b).sqrt() * eps


def _step_case(g, shape=(4, 3), dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    alpha_bar_next = 0.1 + 0.4 * torch.rand(shape[0], **draw)
    return dict(
        states=torch.randn(shape, **draw),
        noise_pred=torch.randn(shape, **draw),
        alpha_bar=alpha_bar_next + 0.1 + 0.3 * torch.rand(shape[0], **draw),
        alpha_bar_next=alpha_bar_next,
    )


INVERTED_STEP = Exercise(
    "22/inverted_step",
    points=3,
    reference=inverted_step,
    cases={
        "one number": dict(
            states=torch.tensor([[1.4]]),
            noise_pred=torch.tensor([[0.5]]),
            alpha_bar=torch.tensor([0.64]),
            alpha_bar_next=torch.tensor([0.36]),
        ),
        "one axis": _step_case,
        "several axes": lambda g: _step_case(g, (3, 2, 4, 5)),
        "float64": lambda g: _step_case(g, (5, 2), torch.float64),
    },
    mistakes={
        "that is the sampler's own direction: the state stands at `alpha_bar` and goes to `alpha_bar_next`.": (
            lambda states, noise_pred, alpha_bar, alpha_bar_next: inverted_step(
                states, noise_pred, alpha_bar_next, alpha_bar
            )
        ),
        "the clean image is not divided by its signal, sqrt(alpha_bar) (the poster leaves it out, too).": _stepped(
            lambda x, eps, a: x - (1 - a).sqrt() * eps, _renoise
        ),
        "alpha_bar is a share of the variance; signal and noise are the roots.": _stepped(
            lambda x, eps, a: (x - (1 - a) * eps) / a, lambda clean, eps, b: b * clean + (1 - b) * eps
        ),
        "the noise of the new level is missing: this ends in a scaled clean image.": _stepped(
            _denoise, lambda clean, eps, b: b.sqrt() * clean
        ),
        "the clean image is not scaled for the new level.": _stepped(
            _denoise, lambda clean, eps, b: clean + (1 - b).sqrt() * eps
        ),
        "the old noise was not taken out before the new was put in.": _stepped(
            lambda x, eps, a: x / a.sqrt(), _renoise
        ),
        "that is the forward process from a clean image: the state already has noise in it.": _stepped(
            lambda x, eps, a: x, _renoise
        ),
        "the noise that is put back is that of the old level.": (
            lambda states, noise_pred, alpha_bar, alpha_bar_next: (
                _column(alpha_bar_next, states).sqrt() * _denoise(states, noise_pred, _column(alpha_bar, states))
                + (1 - _column(alpha_bar, states)).sqrt() * noise_pred
            )
        ),
        "the predicted noise enters with the wrong sign.": (
            lambda states, noise_pred, alpha_bar, alpha_bar_next: inverted_step(
                states, -noise_pred, alpha_bar, alpha_bar_next
            )
        ),
    },
)

# ---- the logit at inverted states ------------------------------------------------------------------------------------


def inpo_logits(latents, inverted, noise_pred, noise_pred_ref, alpha_bar, beta):
    """-beta / 2 ((e_w - e_w^ref) - (e_l - e_l^ref)), (n,): errors to each state's own tau, means over its elements.

    The first four are (2, n, *dims), the chosen one first; alpha_bar (n,).
    """
    level = _column(alpha_bar, latents[0])
    tau = (inverted - level.sqrt() * latents) / (1 - level).sqrt()
    error, error_ref = ((pred - tau).square().flatten(2).mean(2) for pred in (noise_pred, noise_pred_ref))
    gain = error_ref - error
    return beta / 2 * (gain[0] - gain[1])


def _tau(latents, inverted, alpha_bar):
    level = _column(alpha_bar, latents[0])
    return (inverted - level.sqrt() * latents) / (1 - level).sqrt()


def _logits(tau=_tau, reduce=lambda squares: squares.flatten(2).mean(2), logit=None):
    """A variant: tau(latents, inverted, alpha_bar), how squares become an error, and what is made of the errors."""
    logit = logit or (lambda e, ref, beta: beta / 2 * ((ref - e)[0] - (ref - e)[1]))

    def wrong(latents, inverted, noise_pred, noise_pred_ref, alpha_bar, beta):
        target = tau(latents, inverted, alpha_bar)
        return logit(*(reduce((pred - target).square()) for pred in (noise_pred, noise_pred_ref)), beta)

    return wrong


def _pair_case(g, shape=(4, 3), dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    names = ("latents", "inverted", "noise_pred", "noise_pred_ref")
    return dict(
        **{name: torch.randn(2, *shape, **draw) for name in names},
        alpha_bar=0.1 + 0.8 * torch.rand(shape[0], **draw),
        beta=3.0,
    )


INPO_LOGITS = Exercise(
    "22/inpo_logits",
    points=6,
    reference=inpo_logits,
    grad_wrt=("noise_pred",),
    cases={
        "one pair": dict(
            latents=torch.tensor([[[1.0]], [[-0.5]]]),
            inverted=torch.tensor([[[1.4]], [[-1.0]]]),
            noise_pred=torch.tensor([[[0.9]], [[-1.2]]]),
            noise_pred_ref=torch.tensor([[[0.7]], [[-0.8]]]),
            alpha_bar=torch.tensor([0.64]),
            beta=10.0,
        ),
        "one axis": _pair_case,
        "several axes": lambda g: _pair_case(g, (3, 2, 4)),
        "float64": lambda g: _pair_case(g, (5, 2), torch.float64),
    },
    mistakes={
        "the sign: the logit must rise where the CHOSEN image's error falls below the reference's.": _logits(
            logit=lambda e, ref, beta: -beta / 2 * ((ref - e)[0] - (ref - e)[1])
        ),
        "both images were measured against the chosen one's tau; each state has its own.": _logits(
            tau=lambda latents, inverted, alpha_bar: _tau(latents, inverted, alpha_bar)[:1].expand_as(latents)
        ),
        "the target is what is left when the image's share is taken off, in units of the noise: divide by it.": _logits(
            tau=lambda latents, inverted, alpha_bar: inverted - _column(alpha_bar, latents[0]).sqrt() * latents
        ),
        "the image's share of the state is sqrt(alpha_bar) of it, not all.": _logits(
            tau=lambda latents, inverted, alpha_bar: (inverted - latents) / (1 - _column(alpha_bar, latents[0])).sqrt()
        ),
        "alpha_bar is a share of the variance; signal and noise are the roots.": _logits(
            tau=lambda latents, inverted, alpha_bar: (
                (inverted - _column(alpha_bar, latents[0]) * latents) / (1 - _column(alpha_bar, latents[0]))
            )
        ),
        "alpha_bar is the product of all steps already: its root is the signal, not its square's.": _logits(
            tau=lambda latents, inverted, alpha_bar: _tau(latents, inverted, alpha_bar**2)
        ),
        "the networks predict the noise; you compared them with the inverted state.": _logits(
            tau=lambda latents, inverted, alpha_bar: inverted
        ),
        "the networks predict the noise; you compared them with the clean image.": _logits(
            tau=lambda latents, inverted, alpha_bar: latents
        ),
        "errors are means over a sample's elements here; the paper's text sums.": _logits(
            reduce=lambda squares: squares.flatten(2).sum(2)
        ),
        "an error is squared.": _logits(reduce=lambda squares: squares.sqrt().flatten(2).mean(2)),
        "one number for the batch; every pair has a logit of its own.": _logits(
            logit=lambda e, ref, beta: beta / 2 * ((ref - e)[0] - (ref - e)[1]).mean()
        ),
        "the factor 1/2 of a Gaussian's log-density is missing.": _logits(
            logit=lambda e, ref, beta: beta * ((ref - e)[0] - (ref - e)[1])
        ),
        "without the reference the logit is not 0 at the start, and nothing holds the policy.": _logits(
            logit=lambda e, ref, beta: beta / 2 * (e[1] - e[0])
        ),
        "the two gains are added; a preference is their difference.": _logits(
            logit=lambda e, ref, beta: beta / 2 * ((ref - e)[0] + (ref - e)[1])
        ),
    },
)

# ---- one Gaussian ----------------------------------------------------------------------------------------------------


def weight_ratio(alpha_bar, std):
    """h / k = sqrt(v) / (sqrt(v) + sqrt(abar) s), v = abar s^2 + 1 - abar: what is left of Diffusion-DPO's logit."""
    signal = alpha_bar.sqrt()
    spread = (alpha_bar * std**2 + 1 - alpha_bar).sqrt()
    return spread / (spread + signal * std)


def _ratio_case(g):
    draw = dict(generator=g, dtype=torch.float64)
    return dict(alpha_bar=0.05 + 0.9 * torch.rand(6, **draw), std=0.3 + float(torch.rand((), **draw)))


WEIGHT_RATIO = Exercise(
    "22/weight_ratio",
    points=4,
    reference=weight_ratio,
    cases={
        "s = 1": dict(alpha_bar=torch.tensor([0.64, 0.9801, 0.01]), std=1.0),
        "narrow data": dict(alpha_bar=torch.tensor([0.2, 0.5, 0.9]), std=0.25),
        "drawn": _ratio_case,
    },
    mistakes={
        "that is h itself; divide by k = noise signal / v.": (
            lambda alpha_bar, std: weight_ratio(alpha_bar, std)
            * (alpha_bar * (1 - alpha_bar)).sqrt() / (alpha_bar * std**2 + 1 - alpha_bar)
        ),
        "upside down: k / h.": lambda alpha_bar, std: 1 / weight_ratio(alpha_bar, std),
        "v is a variance; x_t spreads by its root.": (
            lambda alpha_bar, std: (alpha_bar * std**2 + 1 - alpha_bar)
            / (alpha_bar * std**2 + 1 - alpha_bar + alpha_bar.sqrt() * std)
        ),
        "tau is not the noise of x_t around the origin: the image's own share signal x_0 was not taken off.": (
            lambda alpha_bar, std: alpha_bar.sqrt() * std / (alpha_bar * std**2 + 1 - alpha_bar).sqrt()
        ),
        "only right where s = 1: the data's own spread is missing.": (
            lambda alpha_bar, std: weight_ratio(alpha_bar, 1.0)
        ),
        "the signal is sqrt(alpha_bar).": (
            lambda alpha_bar, std: (alpha_bar * std**2 + 1 - alpha_bar).sqrt()
            / ((alpha_bar * std**2 + 1 - alpha_bar).sqrt() + alpha_bar * std)
        ),
        "v has both parts: the data's spread, scaled by the signal, and the noise.": (
            lambda alpha_bar, std: (1 - alpha_bar).sqrt() / ((1 - alpha_bar).sqrt() + alpha_bar.sqrt() * std)
        ),
        "1 minus the answer: x_t is inverted, the eps that is predicted stays the same.": (
            lambda alpha_bar, std: 1 - weight_ratio(alpha_bar, std)
        ),
    },
)  # fmt: skip

# ---- the official level ----------------------------------------------------------------------------------------------


def official_level(level, num_train, num_steps):
    """First of 1, 1 + stride, ..., num_steps of them, that is not below `level`; the last one if all are."""
    stride = num_train // num_steps
    steps = (level + stride - 2) // stride
    return 1 + stride * steps.clamp(0, num_steps - 1)


def _grid(start, choose):
    """A variant: the grid's first level, and which of it is chosen (grid (s,), levels (n, 1)) -> index (n,)."""

    def wrong(level, num_train, num_steps):
        grid = start + num_train // num_steps * torch.arange(num_steps)
        index = choose(grid, level.unsqueeze(1)).clamp(0, num_steps - 1)
        return grid[index]

    return wrong


def _levels(g):
    return dict(level=torch.randint(1, 1000, (40,), generator=g), num_train=1000, num_steps=10)


OFFICIAL_LEVEL = Exercise(
    "22/official_level",
    points=3,
    reference=official_level,
    cases={
        "the paper's": dict(level=torch.tensor([350, 101, 102, 100]), num_train=1000, num_steps=10),
        "ends": dict(level=torch.tensor([1, 2, 901, 902, 999]), num_train=1000, num_steps=10),
        "ours": dict(level=torch.tensor([5, 21, 22, 50, 81, 99]), num_train=100, num_steps=5),
        "drawn": _levels,
    },
    mistakes={
        "the inversion goes on as long as it stands BELOW the level that is asked for: it ends at or above it.": _grid(
            1, lambda grid, level: (grid <= level).sum(1) - 1
        ),
        "nearest is not next: the loop stops at the first level that is not below.": _grid(
            1, lambda grid, level: (grid - level).abs().argmin(1)
        ),
        "the grid starts at 1, not at 0: 1, 101, 201, ...": _grid(0, lambda grid, level: (grid < level).sum(1)),
        "a level of the grid itself is reached exactly, and not passed.": _grid(
            1, lambda grid, level: (grid <= level).sum(1)
        ),
        "there is no level behind the grid's last: what lies above 901 ends at 901.": (
            lambda level, num_train, num_steps: (
                1 + num_train // num_steps * ((level + num_train // num_steps - 2) // (num_train // num_steps))
            )
        ),
        "that is where it SHOULD end.": lambda level, num_train, num_steps: level.clone(),
        "that is the number of steps; the question is for the level.": (
            lambda level, num_train, num_steps: (
                (official_level(level, num_train, num_steps) - 1) // (num_train // num_steps)
            )
        ),
    },
)

exercises = [INVERTED_STEP, INPO_LOGITS, WEIGHT_RATIO, OFFICIAL_LEVEL, *QUESTIONS]
