"""Exercises of chapter 13: the SDE's step, Flow-GRPO's loss, what the initial noise keeps, DiffusionNFT's loss."""

import torch

from minialign.course.chapters.questions_13 import QUESTIONS
from minialign.course.check import Exercise

# ---- the ODE turned SDE ----------------------------------------------------------------------------------------------


def sde_step(velocity, x, t, t_next, s):
    """(mean, std) of the step from t to t_next of the SDE with the flow's marginals; five tensors of one shape."""
    score = -(x + (1 - t) * velocity) / t
    dt = t_next - t
    return x + (velocity - s**2 / 2 * score) * dt, s * (-dt).sqrt()


def _step(score=lambda v, x, t: -(x + (1 - t) * v) / t, half=0.5, sign=-1, std=lambda s, dt: s * (-dt).sqrt()):
    """A variant: another score, another weight or sign of its term, another std."""

    def wrong(velocity, x, t, t_next, s):
        dt = t_next - t
        return x + (velocity + sign * half * s**2 * score(velocity, x, t)) * dt, std(s, dt)

    return wrong


def _step_case(g, dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    t = 0.3 + 0.6 * torch.rand(5, **draw)
    return dict(
        velocity=torch.randn(5, **draw), x=torch.randn(5, **draw), t=t,
        t_next=t * (0.4 + 0.5 * torch.rand(5, **draw)), s=0.3 + torch.rand(5, **draw),
    )  # fmt: skip


def _numbers(*values):
    names = ("velocity", "x", "t", "t_next", "s")
    return {name: torch.tensor([float(value)]) for name, value in zip(names, values, strict=True)}


SDE_STEP = Exercise(
    "13/sde_step",
    points=4,
    reference=sde_step,
    grad_wrt=("velocity",),
    cases={
        "one step": _numbers(0.3, 1.0, 0.5, 0.4, 0.7),
        "no noise": _numbers(0.3, 1.0, 0.5, 0.4, 0.0),  # Euler's step
        "from pure noise": _numbers(0.3, 1.0, 1.0, 0.9, 0.7),
        "to the data": _numbers(0.3, 1.0, 0.1, 0.0, 0.7),
        "several": _step_case,
        "several, float64": lambda g: _step_case(g, torch.float64),
    },
    mistakes={
        "the score's term is missing: noise alone spreads the samples, and nothing pays it back.": _step(half=0.0),
        "the score's term has the wrong sign: backwards in time, dt is negative.": _step(sign=1),
        "the score's term is weighed by s^2; a half is missing.": _step(half=1.0),
        "that is not the score: it is -E[noise | x] over the noise's own level, t.": _step(
            lambda v, x, t: -(x + (1 - t) * v)
        ),
        "E[noise | x] is x + (1 - t) v; you have E[x_0 | x] = x - t v.": _step(lambda v, x, t: -(x - t * v) / t),
        "s |dt| is no std: noise grows like the root of time.": _step(std=lambda s, dt: -s * dt),
        "the variance s^2 |dt| was returned; a std was asked for.": _step(std=lambda s, dt: -(s**2) * dt),
    },
)

# ---- Flow-GRPO's loss ------------------------------------------------------------------------------------------------


def flow_grpo_loss(log_ratio, advantages, velocity, velocity_ref, t, dt, s, clip_range, beta):
    """Mean over steps of max(-A rho, -A clip(rho)) + beta KL of the two Gaussian steps, all (n,) and (n, d)."""
    rho = log_ratio.exp()
    surrogate = torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - clip_range, 1 + clip_range))
    gain = dt.abs() * (1 + s**2 * (1 - t) / (2 * t))  # d mean / d velocity
    kl = (gain**2 * (velocity - velocity_ref).square().sum(1)) / (2 * s**2 * dt.abs())
    return (surrogate + beta * kl).mean()


def _loss(surrogate=None, gain=None, scale=lambda s, dt: 2 * s**2 * dt.abs(), reduce=lambda e: e.sum(1), sign=1.0):
    surrogate = surrogate or (lambda a, rho, c: torch.maximum(-a * rho, -a * rho.clamp(1 - c, 1 + c)))
    gain = gain or (lambda t, dt, s: dt.abs() * (1 + s**2 * (1 - t) / (2 * t)))

    def wrong(log_ratio, advantages, velocity, velocity_ref, t, dt, s, clip_range, beta):
        kl = gain(t, dt, s) ** 2 * reduce((velocity - velocity_ref).square()) / scale(s, dt)
        return (surrogate(advantages, log_ratio.exp(), clip_range) + sign * beta * kl).mean()

    return wrong


def _loss_case(g, dtype=torch.float32, n=6, d=3, **given):
    draw = dict(generator=g, dtype=dtype)
    case = dict(
        log_ratio=0.4 * torch.randn(n, **draw), advantages=torch.randn(n, **draw), velocity=torch.randn(n, d, **draw),
        velocity_ref=torch.randn(n, d, **draw), t=0.3 + 0.5 * torch.rand(n, **draw),
        dt=-0.1 - 0.1 * torch.rand(n, **draw), s=0.4 + torch.rand(n, **draw), clip_range=0.2, beta=0.7,
    )  # fmt: skip
    return case | given


FLOW_GRPO_LOSS = Exercise(
    "13/flow_grpo_loss",
    points=5,
    reference=flow_grpo_loss,
    grad_wrt=("log_ratio", "velocity"),
    draws=2,
    parts={"no KL": 2},
    cases={
        "one step": lambda g: _loss_case(g, n=1, d=2),
        "no KL": lambda g: _loss_case(g, beta=0.0),
        "no advantage": lambda g: _loss_case(g, advantages=torch.zeros(6)),
        "several": _loss_case,
        "float64": lambda g: _loss_case(g, torch.float64),
    },
    mistakes={
        "without the clip; a ratio that has run away goes on paying.": _loss(lambda a, rho, c: -a * rho),
        "the clipped term alone; where the ratio has gone the wrong way, nothing brings it back.": _loss(
            lambda a, rho, c: -a * rho.clamp(1 - c, 1 + c)
        ),
        "the better of the two; PPO takes the worse, as a loss the larger.": _loss(
            lambda a, rho, c: torch.minimum(-a * rho, -a * rho.clamp(1 - c, 1 + c))
        ),
        "the KL is subtracted from the loss: that rewards running away.": _loss(sign=-1.0),
        "the velocity also moves the mean through the score's term: the gain is more than |dt|.": _loss(
            gain=lambda t, dt, s: dt.abs()
        ),
        "the score's part of the gain lacks (1 - t).": _loss(gain=lambda t, dt, s: dt.abs() * (1 + s**2 / (2 * t))),
        "|dt| is missing in the step's variance, as in the authors' release.": _loss(scale=lambda s, dt: 2 * s**2),
        "a KL is a sum over the elements; you have their mean.": _loss(reduce=lambda e: e.mean(1)),
        "the two squared errors are divided by 2 s^2 |dt|; the factor 2 is missing.": _loss(
            scale=lambda s, dt: s**2 * dt.abs()
        ),
    },
)

# ---- what a policy can tilt ------------------------------------------------------------------------------------------


def tiltable_variance(slopes, stds):
    """Var(x_0 | x_T) of x' = slope x + std z, step by step: sum of (std_i prod_{j > i} slope_j)^2, a scalar."""
    carried = torch.cat([slopes.flip(0).cumprod(0).flip(0)[1:], slopes.new_ones(1)])
    return ((carried * stds) ** 2).sum()


def _carried(shift=1):
    def wrong(slopes, stds):
        products = slopes.flip(0).cumprod(0).flip(0)
        return (((torch.cat([products[1:], slopes.new_ones(1)]) if shift else products) * stds) ** 2).sum()

    return wrong


def _walk(g):
    n = int(torch.randint(3, 8, (), generator=g))
    draw = dict(generator=g, dtype=torch.float64)
    return dict(slopes=0.5 + torch.rand(n, **draw), stds=0.1 + 0.5 * torch.rand(n, **draw))


TILTABLE_VARIANCE = Exercise(
    "13/tiltable_variance",
    points=3,
    reference=tiltable_variance,
    cases={
        "one step": dict(slopes=torch.tensor([0.5]), stds=torch.tensor([0.3])),
        "two steps": dict(slopes=torch.tensor([0.5, 0.8]), stds=torch.tensor([0.3, 0.2])),
        "the last step without noise": dict(slopes=torch.tensor([0.5, 0.8, 0.9]), stds=torch.tensor([0.3, 0.2, 0.0])),
        "drawn": _walk,
    },
    mistakes={
        "each step's noise is carried by the LATER steps alone, not by its own slope.": _carried(shift=0),
        "nothing was carried: the variances were added as they are.": lambda slopes, stds: (stds**2).sum(),
        "the variances were carried by the slopes; a variance is carried by their squares.": lambda slopes, stds: (
            torch.cat([slopes.flip(0).cumprod(0).flip(0)[1:], slopes.new_ones(1)]) * stds**2
        ).sum(),
        "that is the whole variance: the initial noise's share must stay out.": lambda slopes, stds: (
            tiltable_variance(slopes, stds) + slopes.prod() ** 2
        ),
        "that is the initial noise's share, which no policy can tilt.": lambda slopes, stds: slopes.prod() ** 2,
        "a variance was asked for, not a standard deviation.": lambda slopes, stds: tiltable_variance(
            slopes, stds
        ).sqrt(),
        "the products run from the wrong end: they carry a noise back to the start.": lambda slopes, stds: (
            (torch.cat([slopes.new_ones(1), slopes.cumprod(0)[:-1]]) * stds) ** 2
        ).sum(),
    },
)

# ---- DiffusionNFT's loss ---------------------------------------------------------------------------------------------


def nft_loss(velocity, velocity_old, target, r, b):
    """Mean of r |v+ - v|^2 + (1 - r) |v- - v|^2 over samples and elements: (n, d), (n, d), (n, d), (n,) -> scalar."""
    old = velocity_old.detach()
    plus, minus = old + b * (velocity - old), old - b * (velocity - old)
    r = r.unsqueeze(1)
    return (r * (plus - target) ** 2 + (1 - r) * (minus - target) ** 2).mean()


def _nft(plus=lambda v, o, b: o + b * (v - o), minus=lambda v, o, b: o - b * (v - o), weights=lambda r: (r, 1 - r)):
    def wrong(velocity, velocity_old, target, r, b):
        old = velocity_old.detach()
        good, bad = weights(r.unsqueeze(1))
        return (good * (plus(velocity, old, b) - target) ** 2 + bad * (minus(velocity, old, b) - target) ** 2).mean()

    return wrong


def _nft_case(g, dtype=torch.float32, **given):
    draw = dict(generator=g, dtype=dtype)
    velocity, old, target = torch.randn(3, 5, 2, **draw)
    return dict(velocity=velocity, velocity_old=old, target=target, r=torch.rand(5, **draw), b=0.6) | given


NFT_LOSS = Exercise(
    "13/nft_loss",
    points=4,
    reference=nft_loss,
    grad_wrt=("velocity", "velocity_old"),
    draws=2,
    cases={
        "good samples": lambda g: _nft_case(g, r=torch.ones(5)),
        "bad samples": lambda g: _nft_case(g, r=torch.zeros(5)),
        "b of one": lambda g: _nft_case(g, b=1.0),
        "drawn": _nft_case,
        "float64": lambda g: _nft_case(g, torch.float64),
    },
    mistakes={
        "the bad samples train nothing: the second term is missing.": _nft(weights=lambda r: (r, 0 * r)),
        "both terms pull the network itself towards the sample; for the bad ones it must be the mirror image.": _nft(
            minus=lambda v, o, b: o + b * (v - o)
        ),
        "good and bad are swapped.": _nft(weights=lambda r: (1 - r, r)),
        "b weighs v_old; it is how far v+ goes from v_old towards the network.": _nft(
            lambda v, o, b: b * o + (1 - b) * v, lambda v, o, b: (2 - b) * o - (1 - b) * v
        ),
        "v- is (1 + b) v_old - b v; the weights do not add up to 1.": _nft(minus=lambda v, o, b: o - b * v),
        "r and 1 - r weigh the squared errors, not the errors.": _nft(weights=lambda r: (r**2, (1 - r) ** 2)),
        "v_old is data: no gradient may reach it.": lambda velocity, velocity_old, target, r, b: (
            r[:, None] * (velocity_old + b * (velocity - velocity_old) - target) ** 2
            + (1 - r[:, None]) * (velocity_old - b * (velocity - velocity_old) - target) ** 2
        ).mean(),
    },
)

exercises = [SDE_STEP, FLOW_GRPO_LOSS, TILTABLE_VARIANCE, NFT_LOSS, *QUESTIONS]
