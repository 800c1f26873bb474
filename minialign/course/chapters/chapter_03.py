"""Exercises of chapter 3: the grid, Heun's step, a late start, what noise reveals, the range, the jump in VP."""

import torch

from minialign import kernels
from minialign.course.chapters.questions_03 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import Level
from minialign.kernels import karras_sigmas as package_sigmas

# ---- the grid --------------------------------------------------------------------------------------------------------


def karras_sigmas(num_points, sigma_min, sigma_max, rho):
    """num_points levels, evenly spaced in sigma^(1/rho), noisiest first, and a last 0: (num_points + 1,)."""
    return package_sigmas(num_points, sigma_min, sigma_max, rho)


def _grid(formula):
    """A variant: formula(u, low, high, rho) -> levels, with u from 0 to 1."""

    def wrong(num_points, sigma_min, sigma_max, rho):
        u = torch.arange(num_points) / (num_points - 1)
        return torch.cat([formula(u, sigma_min, sigma_max, rho), torch.zeros(1)])

    return wrong


def _too_fine(num_points, sigma_min, sigma_max, rho):
    u = torch.arange(num_points) / num_points
    levels = (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, torch.zeros(1)])


def _grid_case(g):
    u, v, w = torch.rand(3, generator=g).tolist()
    points = int(torch.randint(3, 21, (), generator=g))
    return dict(num_points=points, sigma_min=0.002 + 0.1 * u, sigma_max=1 + 80 * v, rho=2 + 6 * w)


KARRAS_SIGMAS = Exercise(
    "03/karras_sigmas",
    points=2,
    reference=karras_sigmas,
    cases={
        "three levels, rho = 2": dict(num_points=3, sigma_min=1.0, sigma_max=9.0, rho=2.0),
        "the usual grid": dict(num_points=18, sigma_min=0.002, sigma_max=80.0, rho=7.0),
        "five levels": dict(num_points=5, sigma_min=0.01, sigma_max=2.5, rho=7.0),
        "drawn": _grid_case,
    },
    mistakes={
        "after sigma_min the noise is gone: a last level 0 is missing.": lambda *a, **k: karras_sigmas(*a, **k)[:-1],
        "noisiest first: the sampler goes down.": lambda *a, **k: karras_sigmas(*a, **k).flip(0),
        "the levels are evenly spaced in sigma itself; it is sigma^(1/rho) that should be.": _grid(
            lambda u, low, high, rho: high + u * (low - high)
        ),
        "the rho-th power at the end is missing.": _grid(
            lambda u, low, high, rho: high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))
        ),
        "power and root are swapped: evenly spaced in the root, then taken to the power.": _grid(
            lambda u, low, high, rho: (high**rho + u * (low**rho - high**rho)) ** (1 / rho)
        ),
        "divided by num_points: then sigma_min itself is never reached. Both ends belong to the grid.": _too_fine,
        "this spaces the levels evenly in log sigma.": _grid(lambda u, low, high, rho: high * (low / high) ** u),
    },
)

# ---- Heun's step -----------------------------------------------------------------------------------------------------


def heun_step(denoise, x, sigma, sigma_next):
    """x at sigma_next from x at sigma: Euler's step, corrected by the mean slope of both ends; Euler alone to 0."""
    slope = (x - denoise(x, sigma)) / sigma
    proposed = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return proposed
    slope_next = (proposed - denoise(proposed, sigma_next)) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2


def _gaussian(x, sigma):
    """Denoiser of N(1, 4)."""
    return 1 + 4 / (4 + sigma**2) * (x - 1)


def _two_points(x, sigma):
    """Denoiser of two points, -1 and 1."""
    return (x / sigma**2).tanh()


def _heun(formula):
    """A variant: formula(x, s, n, d, slope, proposed, again), where again(y, level) is the slope there."""

    def wrong(denoise, x, sigma, sigma_next):
        def again(y, level):
            return (y - denoise(y, level)) / level

        slope = again(x, sigma)
        proposed = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return proposed
        return formula(x, sigma, sigma_next, denoise, slope, proposed, again)

    return wrong


def _uphill(denoise, x, sigma, sigma_next):
    """The step's sign turned round."""
    slope = (x - denoise(x, sigma)) / sigma
    proposed = x + (sigma - sigma_next) * slope
    if sigma_next == 0:
        return proposed
    return x + (sigma - sigma_next) * (slope + (proposed - denoise(proposed, sigma_next)) / sigma_next) / 2


def _score(denoise, x, sigma, sigma_next):
    """The score, of the other sign and scale, in place of the slope."""
    slope = (denoise(x, sigma) - x) / sigma**2
    proposed = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return proposed
    return x + (sigma_next - sigma) * (slope + (denoise(proposed, sigma_next) - proposed) / sigma_next**2) / 2


def _heun_case(denoise, dtype=torch.float32):
    def case(g):
        high = 1 + 9 * float(torch.rand((), generator=g))
        low = high * (0.3 + 0.5 * float(torch.rand((), generator=g)))
        return dict(denoise=denoise, x=high * torch.randn(3, 2, generator=g, dtype=dtype), sigma=high, sigma_next=low)

    return case


HEUN_STEP = Exercise(
    "03/heun_step",
    points=3,
    reference=heun_step,
    cases={
        "Gaussian data, one number": dict(denoise=_gaussian, x=torch.tensor([[3.0]]), sigma=2.0, sigma_next=1.0),
        "into sigma 0": dict(denoise=_gaussian, x=torch.tensor([[2.0, -1.0]]), sigma=0.5, sigma_next=0.0),
        "two points": dict(denoise=_two_points, x=torch.tensor([[0.5, -2.0]]), sigma=1.0, sigma_next=0.5),
        "Gaussian data": _heun_case(_gaussian),
        "two points, float64": _heun_case(_two_points, torch.float64),
    },
    mistakes={
        "this is Euler's step: the slope at the new level is never asked for.": _heun(
            lambda x, s, n, d, slope, y, again: y
        ),
        "both slopes count half; their sum takes a step twice as long.": _heun(
            lambda x, s, n, d, slope, y, again: x + (n - s) * (slope + again(y, n))
        ),
        "the second slope belongs to the proposed point, not to x.": _heun(
            lambda x, s, n, d, slope, y, again: x + (n - s) * (slope + again(x, n)) / 2
        ),
        "the proposed point stands at sigma_next: ask the denoiser there, not at sigma.": _heun(
            lambda x, s, n, d, slope, y, again: x + (n - s) * (slope + again(y, s)) / 2
        ),
        "the corrected step starts from x; yours goes on from the proposed point.": _heun(
            lambda x, s, n, d, slope, y, again: y + (n - s) * (slope + again(y, n)) / 2
        ),
        "the denoiser is asked about sigma_next, but its answer is then divided by sigma.": _heun(
            lambda x, s, n, d, slope, y, again: x + (n - s) * (slope + (y - d(y, n)) / s) / 2
        ),
        "the new slope alone: Heun takes the mean of both.": _heun(
            lambda x, s, n, d, slope, y, again: x + (n - s) * again(y, n)
        ),
        "the step is sigma_next - sigma, a negative number: noise goes down.": _uphill,
        "that is the score (D - x) / sigma^2; the slope of the ODE is -sigma times it, (x - D) / sigma.": _score,
    },
)

# ---- the late start --------------------------------------------------------------------------------------------------


def late_start(noise, flow, sigmas, sigma_skip):
    """(state, grid): the grid's tail from its first level at or below sigma_skip, and the state teleported there."""
    grid = sigmas[int((sigmas > sigma_skip).sum()) :]
    return flow(sigmas[0] * noise, sigmas[0], grid[0]), grid


VARIANCES = torch.tensor([9.0, 1.0, 0.04])


def _flow(x, sigma_from, sigma_to):
    """The flow of a Gaussian with mean 0.5 in each of three directions."""
    values = VARIANCES.to(x.dtype)
    return 0.5 + ((sigma_to**2 + values) / (sigma_from**2 + values)).sqrt() * (x - 0.5)


def _start(state=None, count=None):
    """A variant: count(sigmas, sigma_skip) levels are dropped; state(noise, flow, sigmas, grid, sigma_skip)."""

    def wrong(noise, flow, sigmas, sigma_skip):
        dropped = int((sigmas > sigma_skip).sum()) if count is None else count(sigmas, sigma_skip)
        grid = sigmas[dropped:]
        if state is None:
            return flow(sigmas[0] * noise, sigmas[0], grid[0]), grid
        return state(noise, flow, sigmas, grid, sigma_skip), grid

    return wrong


def _renormalised(noise, flow, sigmas, grid, sigma_skip):
    x = flow(sigmas[0] * noise, sigmas[0], grid[0])
    return x / x.std() * grid[0]


def _start_case(g, sigma_skip=None, dtype=torch.float32):
    skip = 0.5 + 20 * float(torch.rand((), generator=g)) if sigma_skip is None else sigma_skip
    return dict(
        noise=torch.randn(5, 3, generator=g, dtype=dtype), flow=_flow, sigmas=package_sigmas(18, dtype=dtype),
        sigma_skip=skip,
    )  # fmt: skip


LATE_START = Exercise(
    "03/late_start",
    points=3,
    reference=late_start,
    cases={
        "a level between two of the grid": dict(
            noise=torch.tensor([[1.0, -1.0, 0.5]]),
            flow=_flow,
            sigmas=torch.tensor([10.0, 4.0, 2.0, 1.0, 0.0]),
            sigma_skip=2.5,
        ),
        "a level of the grid": dict(  # a level of the grid is itself at or below sigma_skip
            noise=torch.tensor([[1.0, 2.0, 0.5]]),
            flow=_flow,
            sigmas=torch.tensor([10.0, 4.0, 2.0, 1.0, 0.0]),
            sigma_skip=4.0,
        ),
        "above the grid": dict(  # above the grid: nothing is dropped, and the flow from 10 to 10 moves nothing
            noise=torch.tensor([[1.0, 2.0, 0.5]]),
            flow=_flow,
            sigmas=torch.tensor([10.0, 4.0, 2.0, 1.0, 0.0]),
            sigma_skip=12.0,
        ),
        "drawn": _start_case,
        "float64": lambda g: _start_case(g, dtype=torch.float64),
    },
    mistakes={
        "sigma_skip is a noise level, not the number of a step: compare it with the levels.": _start(
            count=lambda sigmas, sigma_skip: int(sigma_skip)
        ),
        "you jump to sigma_skip, but the grid begins at its own first level below: state and level must agree.": _start(
            lambda noise, flow, sigmas, grid, skip: flow(sigmas[0] * noise, sigmas[0], sigmas[0].new_tensor(skip))
        ),
        "the state is brought to standard deviation sigma; its data part, sqrt(lambda), belongs to it.": (
            _start(_renormalised)
        ),
        "the run begins with sigmas[0] * noise; unit noise has no business at that level.": _start(
            lambda noise, flow, sigmas, grid, skip: flow(noise, sigmas[0], grid[0])
        ),
        "that is noise of the right level and nothing else: the flow is not used.": _start(
            lambda noise, flow, sigmas, grid, skip: grid[0] * noise
        ),
        "one level too many is kept: the grid should begin at or below sigma_skip.": _start(
            count=lambda sigmas, sigma_skip: max(int((sigmas > sigma_skip).sum()) - 1, 0)
        ),
        "a level equal to sigma_skip may stay: drop those above it only.": _start(
            count=lambda sigmas, sigma_skip: int((sigmas >= sigma_skip).sum())
        ),
        "the flow goes from the grid's first level to the new one, not back.": _start(
            lambda noise, flow, sigmas, grid, skip: flow(sigmas[0] * noise, grid[0], sigmas[0])
        ),
    },
)

# ---- the range -------------------------------------------------------------------------------------------------------


def to_network_range(mean, values):
    """Mean (d,) and eigenvalues (r,) of pixels p in [0, 1] -> those of the network's range, 2 p - 1."""
    return 2 * mean - 1, 4 * values


TO_NETWORK_RANGE = Exercise(
    "03/to_network_range",
    points=1,
    reference=to_network_range,
    cases={
        "two pixels": dict(mean=torch.tensor([0.5, 0.25]), values=torch.tensor([0.09, 0.04])),
        "float32": lambda g: dict(mean=torch.rand(5, generator=g), values=torch.rand(3, generator=g)),
        "float64": lambda g: dict(
            mean=torch.rand(4, generator=g, dtype=torch.float64), values=torch.rand(4, generator=g).double()
        ),
    },
    mistakes={
        "eigenvalues are variances: twice the pixel is four times the variance.": lambda mean, values: (
            2 * mean - 1,
            2 * values,
        ),
        "the spread changes too, not only the mean.": lambda mean, values: (2 * mean - 1, values),
        "the mean is mapped as every pixel is: times 2, minus 1.": lambda mean, values: (2 * mean, 4 * values),
        "the mean has to move as well.": lambda mean, values: (mean, 4 * values),
        "a shift does not touch a variance.": lambda mean, values: (2 * mean - 1, 4 * values - 1),
        "this goes the other way, from [-1, 1] to [0, 1].": lambda mean, values: ((mean + 1) / 2, values / 4),
    },
)

# ---- what a noise level reveals --------------------------------------------------------------------------------------


def revealed(values, sigmas):
    """Share of the data's variance in the Gaussian denoiser's answers: eigenvalues (r,), levels (t,) -> (t,)."""
    levels = sigmas.unsqueeze(-1)
    return (values**2 / (values + levels**2)).sum(-1) / values.sum()


def _share(numerator, denominator=lambda values: values.sum()):
    """A variant: numerator(values, levels) summed over modes; levels (t, 1)."""

    def wrong(values, sigmas):
        return numerator(values, sigmas.unsqueeze(-1)).sum(-1) / denominator(values)

    return wrong


REVEALED = Exercise(
    "03/revealed",
    points=2,
    reference=revealed,
    cases={
        "one mode, one level": dict(values=torch.tensor([4.0]), sigmas=torch.tensor([2.0])),
        "three modes and levels": dict(values=torch.tensor([9.0, 1.0, 0.04]), sigmas=torch.tensor([10.0, 1.0, 0.1])),
        "float32": lambda g: dict(values=5 * torch.rand(7, generator=g), sigmas=3 * torch.rand(4, generator=g) + 0.1),
        "float64": lambda g: dict(
            values=5 * torch.rand(3, generator=g, dtype=torch.float64), sigmas=torch.rand(5, generator=g).double() + 0.1
        ),
    },
    mistakes={
        "this is the mean gain: every mode counts alike. Weigh each by its variance.": _share(
            lambda v, s: v / (v + s**2), len
        ),
        "the eigenvalues are variances already: sigma enters squared, lambda does not.": _share(
            lambda v, s: v**3 / (v**2 + s**2), lambda v: (v**2).sum()
        ),
        "sigma is a standard deviation: square it before adding it to a variance.": _share(lambda v, s: v**2 / (v + s)),
        "gain^2 times lambda is the answer's variance if the input had no noise; its variance is lambda + sigma^2.": (
            _share(lambda v, s: v**3 / (v + s**2) ** 2)
        ),
        "this is the variance in squared units of data; divide by the whole, sum of lambda.": _share(
            lambda v, s: v**2 / (v + s**2), lambda v: 1.0
        ),
        "that is what is still hidden; the question is what is revealed.": lambda values, sigmas: (
            1 - revealed(values, sigmas)
        ),
        "divide the summed variance by sum of lambda, not by that of all (lambda + sigma^2).": (
            lambda values, sigmas: (values**2).sum() / (values.sum() * (values + sigmas.unsqueeze(-1) ** 2).sum(-1))
        ),
    },
)

# ---- the jump, variance preserving -----------------------------------------------------------------------------------


def vp_jump(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
    """x (b, d) between two levels of a variance-preserving scheduler; mean (d,), vectors (d, r), values (r,)."""
    levels = map(Level.variance_preserving, (alpha_bar_from, alpha_bar_to))
    return kernels.gaussian_flow(x, *levels, mean, vectors, values)


def _vp(formula):
    """A variant: formula(y, vectors, values, a, b) -> moved deviation, or with the means for the two levels."""

    def wrong(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
        a, b = alpha_bar_from, alpha_bar_to
        return b**0.5 * mean + formula(x - a**0.5 * mean, vectors, values, a, b)

    return wrong


def _stretched(y, vectors, stretch, outside):
    """U stretch U'y + outside (I - UU')y."""
    return outside * y + (y @ vectors * (stretch - outside)) @ vectors.mT


def _ratio(values, a, b):
    return ((b * values + 1 - b) / (a * values + 1 - a)) ** 0.5


def _outside(a, b):
    return ((1 - b) / (1 - a)) ** 0.5


def _vp_mean_unscaled(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
    a, b = alpha_bar_from, alpha_bar_to
    return mean + _stretched(x - mean, vectors, _ratio(values, a, b), _outside(a, b))


def _vp_amplitudes(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
    """alpha_bar taken for the amplitude alpha."""
    return vp_jump(x, mean, vectors, values, alpha_bar_from**2, alpha_bar_to**2)


def _vp_case(g, rank=2, dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    first, second = torch.rand(2, generator=g).sort().values.tolist()
    return dict(
        x=torch.randn(3, 5, **draw),
        mean=torch.randn(5, **draw),
        vectors=torch.linalg.qr(torch.randn(5, rank, **draw)).Q,
        values=4 * torch.rand(rank, **draw) + 0.1,
        alpha_bar_from=0.01 + 0.3 * first,
        alpha_bar_to=0.4 + 0.5 * second,
    )


ONE = torch.ones(1, 1, dtype=torch.float64)
VP_JUMP = Exercise(
    "03/vp_jump",
    points=4,
    reference=vp_jump,
    cases={
        "one number": dict(
            x=0.5 * ONE, mean=ONE[0], vectors=ONE, values=4 * ONE[0], alpha_bar_from=1e-4, alpha_bar_to=0.36
        ),
        "fewer modes than axes": _vp_case,
        "one mode, float64": lambda g: _vp_case(g, rank=1, dtype=torch.float64),
        "as many modes as axes": lambda g: _vp_case(g, rank=5),
    },
    mistakes={
        "the part outside span(U) is lost: its noise must stay, shrunk by sigma_to / sigma_from.": _vp(
            lambda y, u, v, a, b: (y @ u * _ratio(v, a, b)) @ u.mT
        ),
        "the part outside span(U) keeps its size; it is all noise, so it shrinks by sigma_to / sigma_from.": _vp(
            lambda y, u, v, a, b: _stretched(y, u, _ratio(v, a, b), 1.0)
        ),
        "the root is missing: the stretch is a ratio of standard deviations.": _vp(
            lambda y, u, v, a, b: _stretched(y, u, _ratio(v, a, b) ** 2, _outside(a, b))
        ),
        "the ratio is upside down: the new level's spread over the old one's.": _vp(
            lambda y, u, v, a, b: _stretched(y, u, 1 / _ratio(v, a, b), 1 / _outside(a, b))
        ),
        "at level alpha_bar the mean is sqrt(alpha_bar) mean, before the jump and after it.": _vp_mean_unscaled,
        "alpha_bar is a share of variance; the signal's amplitude is its root.": _vp_amplitudes,
        "at level alpha_bar the data's variance is alpha_bar lambda: lambda shrinks with the signal.": _vp(
            lambda y, u, v, a, b: _stretched(y, u, ((v + 1 - b) / (v + 1 - a)) ** 0.5, _outside(a, b))
        ),
        "the two levels are swapped.": lambda x, mean, vectors, values, alpha_bar_from, alpha_bar_to: vp_jump(
            x, mean, vectors, values, alpha_bar_to, alpha_bar_from
        ),
        "eigenvectors are the columns of U: coordinates are y @ U, not y @ U'.": _vp(
            lambda y, u, v, a, b: _stretched(y, u.mT, _ratio(v, a, b), _outside(a, b))
        ),
    },
)

exercises = [KARRAS_SIGMAS, HEUN_STEP, LATE_START, REVEALED, TO_NETWORK_RANGE, VP_JUMP, *QUESTIONS]
