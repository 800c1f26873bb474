"""Exercises of chapter 4: the boundary, a step along the flow, distillation's fixed point, the sampler, the loss."""

from itertools import pairwise

import torch

from minialign.course.chapters.questions_04 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import boundary_scalings as package_scalings
from minialign.kernels import expand_as
from minialign.methods import consistency_distillation as distillation

# ---- the boundary ----------------------------------------------------------------------------------------------------


def boundary_scalings(timesteps, timestep_scaling, sigma_data):
    """(c_skip, c_out), each (batch,) float32, from integer timesteps (batch,)."""
    return package_scalings(timesteps, timestep_scaling, sigma_data)


def _scalings(formula):
    """A variant: formula(tau, sigma_data, timesteps) -> (c_skip, c_out)."""

    def wrong(timesteps, timestep_scaling, sigma_data):
        return formula(timestep_scaling * timesteps.float(), sigma_data, timesteps)

    return wrong


def _skip(tau, s):
    return s**2 / (tau**2 + s**2)


def _out(tau, s):
    return tau / (tau**2 + s**2).sqrt()


def _timesteps_case(g):
    timesteps = torch.randint(1, 12, (7,), generator=g)  # near the boundary, where something happens
    return dict(timesteps=timesteps, timestep_scaling=0.3, sigma_data=0.7)


BOUNDARY_SCALINGS = Exercise(
    "04/boundary_scalings",
    points=2,
    reference=boundary_scalings,
    cases={
        "t = 0": dict(timesteps=torch.tensor([0]), timestep_scaling=10.0, sigma_data=0.5),
        "the usual scaling": dict(timesteps=torch.tensor([0, 1, 19, 999]), timestep_scaling=10.0, sigma_data=0.5),
        "near the boundary": dict(timesteps=torch.tensor([1, 2, 3]), timestep_scaling=0.1, sigma_data=0.5),
        "drawn, another sigma_data": _timesteps_case,
    },
    mistakes={
        "the two are swapped: at t = 0 the state itself is the answer, so c_skip is 1 there.": _scalings(
            lambda tau, s, t: (_out(tau, s), _skip(tau, s))
        ),
        "c_out has a root in its denominator; without it the two do not fit together for large tau.": _scalings(
            lambda tau, s, t: (_skip(tau, s), tau / (tau**2 + s**2))
        ),
        "c_skip has no root: it is a ratio of squares.": _scalings(
            lambda tau, s, t: (s / (tau**2 + s**2).sqrt(), _out(tau, s))
        ),
        "the timesteps are not scaled: tau = timestep_scaling * t.": _scalings(
            lambda tau, s, t: (_skip(t.float(), s), _out(t.float(), s))
        ),
        "t / 1000 is another clock: here tau is the scaled timestep itself, which at t = 1 is already 10.": _scalings(
            lambda tau, s, t: (_skip(tau / 1000, s), _out(tau / 1000, s))
        ),
        "sigma_data enters squared, in both.": _scalings(
            lambda tau, s, t: (s / (tau**2 + s), tau / (tau**2 + s).sqrt())
        ),
        "c_out = 1 - c_skip looks natural and keeps the boundary, but it is not what diffusers computes.": _scalings(
            lambda tau, s, t: (_skip(tau, s), 1 - _skip(tau, s))
        ),
        "c_out in the older form for noise that explodes: there sigma_data stands in the numerator.": _scalings(
            lambda tau, s, t: (_skip(tau, s), tau * s / (tau**2 + s**2).sqrt())
        ),
    },
)

# ---- one step along the flow -----------------------------------------------------------------------------------------


def ddim_jump(noise_pred, x, alpha_bar, alpha_bar_next):
    """The next point of the flow, (batch, *dims), from the noise predicted at x; levels (batch,)."""
    return distillation.ddim_jump(noise_pred, x, alpha_bar, alpha_bar_next)


def _jump(formula):
    """A variant: formula(noise_pred, x, a, a_next), the levels already shaped like x."""

    def wrong(noise_pred, x, alpha_bar, alpha_bar_next):
        return formula(noise_pred, x, expand_as(alpha_bar, x), expand_as(alpha_bar_next, x))

    return wrong


def _guess(e, x, a):
    return (x - (1 - a).sqrt() * e) / a.sqrt()


def _jump_case(g, dtype=torch.float32, shape=(5, 2, 3)):
    draw = dict(generator=g, dtype=dtype)
    levels = 0.05 + 0.9 * torch.rand(2, shape[0], **draw).sort(0).values
    return dict(
        noise_pred=torch.randn(shape, **draw),
        x=torch.randn(shape, **draw),
        alpha_bar=levels[0],
        alpha_bar_next=levels[1],
    )


DDIM_JUMP = Exercise(
    "04/ddim_jump",
    points=3,
    reference=ddim_jump,
    cases={
        "one number": dict(
            noise_pred=torch.tensor([[1.0]]),
            x=torch.tensor([[1.0]]),
            alpha_bar=torch.tensor([0.36]),
            alpha_bar_next=torch.tensor([0.64]),
        ),
        "a last step, to alpha_bar 1": dict(
            noise_pred=torch.tensor([[0.5, -1.0]]),
            x=torch.tensor([[2.0, 1.0]]),
            alpha_bar=torch.tensor([0.25]),
            alpha_bar_next=torch.tensor([1.0]),
        ),
        "several axes": _jump_case,
        "float64": lambda g: _jump_case(g, torch.float64, (7, 2)),
    },
    mistakes={
        "the two levels are swapped: undo the noise of the present one, put back that of the next.": _jump(
            lambda e, x, a, b: a.sqrt() * _guess(e, x, b) + (1 - a).sqrt() * e
        ),
        "this is the guess of x_0 brought to the next level's scale; the next level's noise is missing.": _jump(
            lambda e, x, a, b: b.sqrt() * _guess(e, x, a)
        ),
        "the guess of x_0 itself: that is the whole jump, not one step.": _jump(lambda e, x, a, b: _guess(e, x, a)),
        "alpha_bar is a share of the variance: amplitudes are square roots.": _jump(
            lambda e, x, a, b: b * (x - (1 - a) * e) / a + (1 - b) * e
        ),
        "the guess of x_0 is not divided by the signal's amplitude sqrt(alpha_bar).": _jump(
            lambda e, x, a, b: b.sqrt() * (x - (1 - a).sqrt() * e) + (1 - b).sqrt() * e
        ),
        "the noise is put back at the present level; the next one has less of it.": _jump(
            lambda e, x, a, b: b.sqrt() * _guess(e, x, a) + (1 - a).sqrt() * e
        ),
        "the guess of x_0 needs the next level's amplitude too: sqrt(alpha_bar_next).": _jump(
            lambda e, x, a, b: _guess(e, x, a) + (1 - b).sqrt() * e
        ),
    },
)

# ---- where distillation ends -----------------------------------------------------------------------------------------


def fixed_point_slope(alpha_bar, std):
    """Slope of x_0 against x_T when steps of `ddim_jump` lead through the levels (n,), data N(m, std^2). A scalar."""
    slope = torch.ones_like(alpha_bar[0])
    for a, a_next in pairwise(alpha_bar):
        slope = slope * _step_slope(a, a_next, std)
    return slope


def _step_slope(a, b, std):
    """Slope of one step: noise_pred = sqrt(1 - a) (x - sqrt(a) m) / (a std^2 + 1 - a)."""
    return ((a * b).sqrt() * std**2 + ((1 - a) * (1 - b)).sqrt()) / (a * std**2 + 1 - a)


def _slope(step):
    """A variant: the product of step(a, a_next, std)."""

    def wrong(alpha_bar, std):
        slope = torch.ones_like(alpha_bar[0])
        for a, b in pairwise(alpha_bar):
            slope = slope * step(a, b, std)
        return slope

    return wrong


def _spread(a, std):
    return (a * std**2 + 1 - a).sqrt()


def _levels_case(g):
    levels = (0.01 + 0.98 * torch.rand(6, generator=g, dtype=torch.float64)).sort().values
    return dict(alpha_bar=levels, std=0.3 + float(torch.rand((), generator=g)))


FIXED_POINT_SLOPE = Exercise(
    "04/fixed_point_slope",
    points=4,
    reference=fixed_point_slope,
    tolerance=1e-5,
    cases={
        "one step": dict(alpha_bar=torch.tensor([0.36, 0.64]), std=1.0),
        "two steps, float64": dict(alpha_bar=torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64), std=0.5),
        "several steps, float64": _levels_case,
    },
    mistakes={
        "this is the exact flow, as if every step were solved without error; a DDIM step is not.": (
            lambda alpha_bar, std: _spread(alpha_bar[-1], std) / _spread(alpha_bar[0], std)
        ),
        "one giant step from the first level to the last: every level in between gets a step of its own.": (
            lambda alpha_bar, std: _step_slope(alpha_bar[0], alpha_bar[-1], std)
        ),
        "slopes of maps that follow each other are multiplied, not added.": lambda alpha_bar, std: sum(
            _step_slope(a, b, std) for a, b in pairwise(alpha_bar)
        ),
        "the noise prediction divides by the variance of x_t, in which std enters squared.": _slope(
            lambda a, b, s: _step_slope(a, b, s**0.5)
        ),
        "the noise prediction's slope changes as you go: after each step, ask at the new level.": (
            lambda alpha_bar, std: _frozen(alpha_bar, std)
        ),
        "the slope so far belongs to x at this level: the noise predicted there is its multiple too.": (
            lambda alpha_bar, std: _unscaled(alpha_bar, std)
        ),
        "the noise prediction is -sqrt(1 - a) times the score; the root is missing.": _slope(
            lambda a, b, s: _with(a, b, (1 - a) / (a * s**2 + 1 - a))
        ),
        "you divide by the std of x_t; the score of a Gaussian divides by its variance.": _slope(
            lambda a, b, s: _with(a, b, (1 - a).sqrt() / _spread(a, s))
        ),
    },
)


def _with(a, b, e):
    """Slope of a DDIM step whose noise prediction has slope e."""
    return b.sqrt() * (1 - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e


def _frozen(alpha_bar, std):
    first = alpha_bar[0]
    e, slope = (1 - first).sqrt() / (first * std**2 + 1 - first), torch.ones_like(first)
    for a, b in pairwise(alpha_bar):
        slope = slope * _with(a, b, e)
    return slope


def _unscaled(alpha_bar, std):
    slope = torch.ones_like(alpha_bar[0])
    for a, b in pairwise(alpha_bar):
        e = (1 - a).sqrt() / (a * std**2 + 1 - a)
        slope = b.sqrt() * (slope - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    return slope


# ---- one call of the sampler -----------------------------------------------------------------------------------------


def consistency_step(f, x, t, t_next, alphas_cumprod, noise):
    """Denoise x (batch, *dims) at the number t, then re-noise to the number t_next; None: the sample itself."""
    denoised = f(x, t)
    if t_next is None:
        return denoised
    a = alphas_cumprod[t_next]
    return a.sqrt() * denoised + (1 - a).sqrt() * noise


def _f(x, t):
    """Stands in for a consistency function: it answers differently at every t."""
    return x / (1 + t / 100) + t / 1000


def _step(formula, at=lambda t, t_next: t):
    """A variant: formula(denoised, x, a, a_next, noise, last)."""

    def wrong(f, x, t, t_next, alphas_cumprod, noise):
        a, last = alphas_cumprod[t], t_next is None
        a_next = torch.ones_like(a) if last else alphas_cumprod[t_next]
        return formula(f(x, at(t, t_next)), x, a, a_next, noise, last)

    return wrong


def _renoise(y, a, z):
    return a.sqrt() * y + (1 - a).sqrt() * z


_TABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)


def _sampler_case(g, last=False, dtype=torch.float32):
    t, t_next = torch.randint(100, 1000, (2,), generator=g).sort(descending=True).values.tolist()
    draw = dict(generator=g, dtype=dtype)
    x, noise = torch.randn(2, 3, 2, **draw), torch.randn(2, 3, 2, **draw)
    return dict(
        f=_f, x=x, t=t, t_next=None if last else t_next - 50,
        alphas_cumprod=_TABLE.to(dtype), noise=noise,
    )  # fmt: skip


CONSISTENCY_STEP = Exercise(
    "04/consistency_step",
    points=4,
    reference=consistency_step,
    cases={
        "one number": dict(
            f=_f,
            x=torch.ones(1, 1),
            t=2,
            t_next=1,
            alphas_cumprod=torch.tensor([0.99, 0.64, 0.36]),
            noise=torch.ones(1, 1),
        ),
        "to t_next = 0": dict(
            f=_f,
            x=torch.ones(1, 2),
            t=1,
            t_next=0,
            alphas_cumprod=torch.tensor([0.81, 0.49]),
            noise=torch.tensor([[1.0, -1.0]]),
        ),
        "another call follows": _sampler_case,
        "the last call": lambda g: _sampler_case(g, last=True),
        "float64": lambda g: _sampler_case(g, dtype=torch.float64),
    },
    mistakes={
        "re-noised to the level you come from: then no call gets you any further.": _step(
            lambda y, x, a, b, z, last: y if last else _renoise(y, a, z)
        ),
        "the amplitudes are square roots of alpha_bar and 1 - alpha_bar.": _step(
            lambda y, x, a, b, z, last: y if last else b * y + (1 - b) * z
        ),
        "after the last call nothing is added: what f says is the sample.": _step(
            lambda y, x, a, b, z, last: _renoise(y, a if last else b, z)
        ),
        "it is f's answer that gets new noise, not the state that f was asked about.": _step(
            lambda y, x, a, b, z, last: y if last else _renoise(x, b, z)
        ),
        "the signal shrinks as well: sqrt(alpha_bar) times f, or the variance grows beyond what f has seen.": _step(
            lambda y, x, a, b, z, last: y if last else y + (1 - b).sqrt() * z
        ),
        "f is asked about x at the time at which x is: t, not the next one.": _step(
            lambda y, x, a, b, z, last: y if last else _renoise(y, b, z), at=lambda t, n: t if n is None else n
        ),
        "without noise this is no move to a noisier level: f has never seen such clean points there.": _step(
            lambda y, x, a, b, z, last: y if last else b.sqrt() * y
        ),
        "t_next = 0 is a level like any other, with a little noise; only None is the end.": (
            lambda f, x, t, t_next, alphas_cumprod, noise: (
                _renoise(f(x, t), alphas_cumprod[t_next], noise) if t_next else f(x, t)
            )
        ),
    },
)

# ---- the loss --------------------------------------------------------------------------------------------------------


def distillation_loss(f, student, target, x, t, x_next, t_next):
    """Mean squared difference of f(student, x, t) and f(target, x_next, t_next), no gradient into the target."""
    with torch.no_grad():
        answer = f(target, x_next, t_next)
    return (f(student, x, t) - answer).square().mean()


def _table(weights, x, t):
    """A consistency function with one weight a timestep: weights (times,), x (batch, dims), t (batch,)."""
    return weights[t].unsqueeze(-1) * x


def _loss(answer, distance=lambda gap: gap.square().mean()):
    """A variant: answer(f, student, target, x, t, x_next, t_next) is what the student is compared with."""

    def wrong(f, student, target, x, t, x_next, t_next):
        return distance(f(student, x, t) - answer(f, student, target, x, t, x_next, t_next))

    return wrong


def _loss_case(g, dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    t = torch.randperm(8, generator=g)[:5] + 1
    return dict(
        f=_table, student=torch.randn(9, **draw), target=torch.randn(9, **draw), x=torch.randn(5, 2, **draw), t=t,
        x_next=torch.randn(5, 2, **draw), t_next=t - 1,
    )  # fmt: skip


DISTILLATION_LOSS = Exercise(
    "04/distillation_loss",
    points=4,
    reference=distillation_loss,
    grad_wrt=("student", "target"),
    cases={
        "one sample": dict(
            f=_table,
            student=torch.tensor([1.0, 3.0]),
            target=torch.tensor([1.0, 2.0]),
            x=torch.tensor([[1.0, 2.0]]),
            t=torch.tensor([1]),
            x_next=torch.tensor([[1.0, 4.0]]),
            t_next=torch.tensor([0]),
        ),
        "float32": _loss_case,
        "float64": lambda g: _loss_case(g, torch.float64),
    },
    mistakes={
        "the gradient reaches the target: a target that can move comes to meet the student.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(target, x_next, t_next)
        ),
        "the target is asked about x_next at its own time, t_next. At t, nobody is ever asked at the boundary.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(target, x_next, t).detach()
        ),
        "the averaged weights answer for the target, not the student's own.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(student, x_next, t_next).detach()
        ),
        "the student's own answer, gradient and all: both ends move, and a constant satisfies both.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(student, x_next, t_next)
        ),
        "the target stands one step further along the flow: ask it about x_next.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(target, x, t_next).detach()
        ),
        "the answers of two networks are compared, not an answer with the point x_next itself.": _loss(
            lambda f, student, target, x, t, x_next, t_next: x_next
        ),
        "the mean over all elements: with a sum the step grows with the batch.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(target, x_next, t_next).detach(),
            lambda gap: gap.square().sum(),
        ),
        "this is the absolute difference; the loss squares it.": _loss(
            lambda f, student, target, x, t, x_next, t_next: f(target, x_next, t_next).detach(),
            lambda gap: gap.abs().mean(),
        ),
    },
)

exercises = [
    BOUNDARY_SCALINGS,
    DDIM_JUMP,
    FIXED_POINT_SLOPE,
    CONSISTENCY_STEP,
    DISTILLATION_LOSS,
    *QUESTIONS,
]
