"""Exercises of chapter 2: the Gaussian's score, denoiser and path, its modes, explained variance, the training set."""

import torch

from minialign import kernels
from minialign.course.chapters.questions_02 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import Level
from minialign.methods import teleport

# ---- cases that several exercises share ------------------------------------------------------------------------------


def _statistics(g, d, r, dtype=torch.float64):
    """A mean (d,), orthonormal columns (d, r) and variances (r,), some far below 1 and some above."""
    draw = dict(generator=g, dtype=dtype)
    vectors = torch.linalg.qr(torch.randn(d, d, **draw)).Q[:, :r].contiguous()
    return dict(mean=torch.randn(d, **draw), vectors=vectors, values=0.1 + 4 * torch.rand(r, **draw))


def _one_direction(x, **levels):
    """A plane whose first axis alone varies, with variance 4; mean (1, 2)."""
    return dict(
        x=torch.tensor([x]),
        **levels,
        mean=torch.tensor([1.0, 2.0]),
        vectors=torch.tensor([[1.0], [0.0]]),
        values=torch.tensor([4.0]),
    )


def _point_case(d, r, dtype=torch.float64):
    def case(g):
        sigma = 0.3 + 2 * float(torch.rand((), generator=g))
        x = 2 * torch.randn(3, d, generator=g, dtype=dtype)
        return dict(x=x, sigma=sigma, **_statistics(g, d, r, dtype))

    return case


POINT_CASES = {
    "a plane, one mode": _one_direction([3.0, 5.0], sigma=2.0),
    "fewer modes than axes": _point_case(5, 2),
    "as many modes as axes": _point_case(3, 3),
    "float32": _point_case(4, 1, torch.float32),
}

# ---- the score of a Gaussian -----------------------------------------------------------------------------------------


def gaussian_score(x, sigma, mean, vectors, values):
    """grad log N(x; mean, U diag(values) U' + sigma^2 I), (b, d), without any d x d matrix."""
    return kernels.gaussian_score(x, Level.edm(sigma), mean, vectors, values)


def _score(formula):
    """A variant: formula(y, inside, gain, sigma) with y = x - mean; inside(c) is U diag(c) U'y, gain the right one."""

    def wrong(x, sigma, mean, vectors, values):
        y = x - mean

        def inside(c):
            return (y @ vectors * c) @ vectors.T

        return formula(y, inside, values, sigma)

    return wrong


def _mean_forgotten(x, sigma, mean, vectors, values):
    return gaussian_score(x, sigma, torch.zeros_like(mean), vectors, values)


GAUSSIAN_SCORE = Exercise(
    "02/gaussian_score",
    points=3,
    reference=gaussian_score,
    cases=POINT_CASES,
    mistakes={
        "the sign is turned: the score points to where there is more probability, towards the mean.": _score(
            lambda y, inside, v, s: (y - inside(v / (v + s**2))) / s**2
        ),
        "sigma stands where the variance sigma^2 belongs, in the modes' denominator.": _score(
            lambda y, inside, v, s: (inside(v / (v + s)) - y) / s**2
        ),
        "the factor in front is 1 / sigma^2, not 1 / sigma.": _score(
            lambda y, inside, v, s: (inside(v / (v + s**2)) - y) / s
        ),
        "everything outside the span of U is dropped. There the data do not vary, but the noise does: -y / sigma^2.": (
            _score(lambda y, inside, v, s: -inside(1 / (v + s**2)))
        ),
        "the mean is not subtracted from x.": _mean_forgotten,
        "the modes get sigma^2 / (values + sigma^2), the noise's share; the bracket takes away the data's share.": (
            _score(lambda y, inside, v, s: (inside(s**2 / (v + s**2)) - y) / s**2)
        ),
        "values are variances already: do not square them.": _score(
            lambda y, inside, v, s: (inside(v**2 / (v**2 + s**2)) - y) / s**2
        ),
        "a root too many: the score divides by the variance, not by the standard deviation.": _score(
            lambda y, inside, v, s: (inside((v / (v + s**2)).sqrt()) - y) / s**2
        ),
        "the data's part is added to the noise's: the bracket is y minus U ... U'y.": _score(
            lambda y, inside, v, s: -(y + inside(v / (v + s**2))) / s**2
        ),
    },
)

# ---- the denoiser ----------------------------------------------------------------------------------------------------


def gaussian_denoised(x, sigma, mean, vectors, values):
    """E[x_0 | x] if the data are N(mean, U diag(values) U'), (b, d)."""
    return kernels.gaussian_denoised(x, Level.edm(sigma), mean, vectors, values)


def _tweedie(formula):
    """A variant: formula(x, score, sigma, mean)."""

    def wrong(x, sigma, mean, vectors, values):
        return formula(x, gaussian_score(x, sigma, mean, vectors, values), sigma, mean)

    return wrong


def _gain(formula):
    """A variant: mean + U formula(values, sigma) U'(x - mean)."""

    def wrong(x, sigma, mean, vectors, values):
        return mean + ((x - mean) @ vectors * formula(values, sigma)) @ vectors.T

    return wrong


GAUSSIAN_DENOISED = Exercise(
    "02/gaussian_denoised",
    points=2,
    reference=gaussian_denoised,
    cases=POINT_CASES,
    mistakes={
        "sigma^2 times the score: sigma itself has the wrong unit.": _tweedie(lambda x, s, sigma, mean: x + sigma * s),
        "the score points away from the noise: it is added to x, not subtracted.": _tweedie(
            lambda x, s, sigma, mean: x - sigma**2 * s
        ),
        "this is the noise, sigma^2 times the score, without the x from which it is taken.": _tweedie(
            lambda x, s, sigma, mean: sigma**2 * s
        ),
        "the score is added to the mean; it belongs to x.": _tweedie(lambda x, s, sigma, mean: mean + sigma**2 * s),
        "sigma^2 is missing: x + score.": _tweedie(lambda x, s, sigma, mean: x + s),
        "the score's mean is subtracted as well: at the end the answer is a picture, mean included.": _tweedie(
            lambda x, s, sigma, mean: x + sigma**2 * s - mean
        ),
        "the share of a mode is lambda / (lambda + sigma^2), without a root: that is the path's.": _gain(
            lambda v, s: (v / (v + s**2)).sqrt()
        ),
        "this keeps the noise's share, sigma^2 / (lambda + sigma^2), and throws away the data's.": _gain(
            lambda v, s: s**2 / (v + s**2)
        ),
    },
)

# ---- when a mode appears ---------------------------------------------------------------------------------------------


def switch_on(values, share):
    """The noise level at which the denoiser shows each mode with `share` of its amplitude, (r,)."""
    return (values * (1 - share) / share).sqrt()


def _switch_case(g):
    return dict(
        values=0.01 + 5 * torch.rand(4, generator=g, dtype=torch.float64),
        share=0.1 + 0.8 * float(torch.rand((), generator=g)),
    )


SWITCH_ON = Exercise(
    "02/switch_on",
    points=2,
    reference=switch_on,
    cases={
        "share 1/2": dict(values=torch.tensor([4.0]), share=0.5),
        "three modes": dict(values=torch.tensor([9.0, 1.0, 0.04]), share=0.9),
        "drawn": _switch_case,
    },
    mistakes={
        "this is sigma^2: the noise level is its root.": lambda values, share: values * (1 - share) / share,
        "share and 1 - share are swapped: to see more of a mode takes less noise.": lambda values, share: (
            values * share / (1 - share)
        ).sqrt(),
        "sqrt(lambda) is the level of one half only; the share must enter.": lambda values, share: values.sqrt(),
        "the share belongs under the root, with lambda.": lambda values, share: values.sqrt() * (1 - share) / share,
        "solve lambda / (lambda + sigma^2) = share for sigma; 1 - share is missing.": lambda values, share: (
            values / share
        ).sqrt(),
        "values are variances already, not standard deviations.": lambda values, share: (
            values * ((1 - share) / share) ** 0.5
        ),
        "this solves for the root of the share: the denoiser's factor has none.": lambda values, share: (
            values * (1 - share**2) / share**2
        ).sqrt(),
    },
)

# ---- explained variance ----------------------------------------------------------------------------------------------


def explained_variance(target, approximation, centre):
    """1 - |target - approximation|^2 / |target - centre|^2, a scalar: sums over the batch and all elements."""
    return teleport.explained_variance(target, approximation, centre)


def _ev_case(dtype=torch.float32, shape=(5, 3), one_centre=True):
    def case(g):
        draw = dict(generator=g, dtype=dtype)
        target = 1 + torch.randn(shape, **draw)
        near = target + 0.5 * torch.randn(shape, **draw)
        return dict(target=target, approximation=near, centre=torch.randn(shape[1:] if one_centre else shape, **draw))

    return case


EXPLAINED_VARIANCE = Exercise(
    "02/explained_variance",
    points=2,
    reference=explained_variance,
    cases={
        "one sample": dict(
            target=torch.tensor([[2.0, 0.0]]),
            approximation=torch.tensor([[1.0, 0.0]]),
            centre=torch.tensor([0.0, 1.0]),
        ),
        "one centre for all": _ev_case(),
        "a centre each": _ev_case(torch.float64, (4, 2), one_centre=False),
        "pictures": _ev_case(torch.float64, (3, 1, 2, 2)),
    },
    mistakes={
        "this is the share that is left unexplained: subtract it from 1.": lambda target, approximation, centre: (
            (target - approximation).square().sum() / (target - centre).square().sum()
        ),
        "the centre is not subtracted: then a large mean explains everything.": lambda target, approximation, centre: (
            1 - (target - approximation).square().sum() / target.square().sum()
        ),
        "the denominator is about the target; yours is about the approximation.": (
            lambda target, approximation, centre: (
                1 - (target - approximation).square().sum() / (approximation - centre).square().sum()
            )
        ),
        "a mean of each sample's own ratio: samples near the centre then count as much as those far from it. Sum "
        "above and below, then divide.": lambda target, approximation, centre: (
            1
            - (
                (target - approximation).square().flatten(1).sum(1) / (target - centre).square().flatten(1).sum(1)
            ).mean()
        ),
        "a ratio of lengths; variance is about their squares.": lambda target, approximation, centre: (
            1 - (target - approximation).norm() / (target - centre).norm()
        ),
        "the batch's own mean is taken for the centre, which is given.": lambda target, approximation, centre: (
            1 - (target - approximation).square().sum() / (target - target.mean(0)).square().sum()
        ),
        "this is the share of the approximation's variance in the target's: it does not ask whether they agree.": (
            lambda target, approximation, centre: (
                (approximation - centre).square().sum() / (target - centre).square().sum()
            )
        ),
    },
)

# ---- the training set itself -----------------------------------------------------------------------------------------


def delta_denoised(x, sigma, data):
    """E[x_0 | x] if the data are these n points, equally likely: x (b, d), data (n, d) -> (b, d)."""
    return (-torch.cdist(x, data).square() / (2 * sigma**2)).softmax(-1) @ data


def _deltas(formula):
    """A variant: formula(squared distances (b, n), sigma) -> weights (b, n)."""

    def wrong(x, sigma, data):
        squared = (x[:, None] - data).square().sum(-1)
        return formula(squared, sigma) @ data

    return wrong


def _naive(squared, sigma):
    weights = (-squared / (2 * sigma**2)).exp()
    return weights / (weights.sum(-1, keepdim=True) + 1e-12)


def _nearest(squared, sigma):
    return torch.nn.functional.one_hot(squared.argmin(-1), squared.shape[-1]).to(squared)


def _delta_case(sigma, dtype=torch.float64, n=6):
    def case(g):
        draw = dict(generator=g, dtype=dtype)
        return dict(x=torch.randn(3, 2, **draw), sigma=sigma, data=torch.randn(n, 2, **draw))

    return case


DELTA_DENOISED = Exercise(
    "02/delta_denoised",
    points=3,
    reference=delta_denoised,
    tolerance=1e-4,
    cases={
        "one axis": dict(x=torch.tensor([[1.0]]), sigma=2.0, data=torch.tensor([[0.0], [4.0]])),
        "a small sigma": dict(
            x=torch.tensor([[1.0, 0.0], [9.0, 9.0]]), sigma=0.05, data=torch.tensor([[0.0, 0.0], [4.0, 4.0]])
        ),
        "sigma below 1": _delta_case(0.8),
        "sigma above 1": _delta_case(1.7),
        "float32": _delta_case(0.6, torch.float32, 3),
    },
    mistakes={
        "exp underflows: at small sigma all weights are 0. softmax subtracts the largest exponent first.": _deltas(
            _naive
        ),
        "the 2 in 2 sigma^2 is missing.": _deltas(lambda q, s: (-q / s**2).softmax(-1)),
        "sigma^2 is missing, or is sigma: the exponent is -distance^2 / (2 sigma^2).": _deltas(
            lambda q, s: (-q / (2 * s)).softmax(-1)
        ),
        "the sign is turned: the far points get the weight.": _deltas(lambda q, s: (q / (2 * s**2)).softmax(-1)),
        "the distance is not squared.": _deltas(lambda q, s: (-q.sqrt() / (2 * s**2)).softmax(-1)),
        "the softmax runs over the x, not over the data points.": _deltas(lambda q, s: (-q / (2 * s**2)).softmax(0)),
        "the nearest point alone is the answer at sigma -> 0 only; here all points have a say.": _deltas(_nearest),
        "this is the score; the denoised guess is x + sigma^2 score, that is, the weighted mean itself.": (
            lambda x, sigma, data: (delta_denoised(x, sigma, data) - x) / sigma**2
        ),
    },
)

# ---- the whole path --------------------------------------------------------------------------------------------------


def gaussian_flow(x, sigma_from, sigma_to, mean, vectors, values):
    """Where the probability-flow ODE of N(mean, U diag(values) U') takes x (b, d) from sigma_from to sigma_to."""
    return kernels.gaussian_flow(x, Level.edm(sigma_from), Level.edm(sigma_to), mean, vectors, values)


def _flow(formula):
    """A variant: formula(y, inside, v, s, n), inside(c) = U diag(c) U'y, s and n the levels from and to."""

    def wrong(x, sigma_from, sigma_to, mean, vectors, values):
        y = x - mean

        def inside(c):
            return (y @ vectors * c) @ vectors.T

        return mean + formula(y, inside, values, sigma_from, sigma_to)

    return wrong


def _stretch(v, s, n):
    return ((n**2 + v) / (s**2 + v)).sqrt()


def _outside(y, inside, v):
    return y - inside(torch.ones_like(v))


def _path_case(d, r, dtype=torch.float64):
    def case(g):
        high = 2 + 8 * float(torch.rand((), generator=g))
        low = high * (0.1 + 0.6 * float(torch.rand((), generator=g)))
        statistics = _statistics(g, d, r, dtype)
        return dict(x=high * torch.randn(3, d, generator=g, dtype=dtype), sigma_from=high, sigma_to=low, **statistics)

    return case


def _line(sigma_to):
    """The sheet's first check: mean 1, variance 4, from 80 at sigma 80."""
    one = torch.ones(1, dtype=torch.float64)
    return dict(x=80 * one[None], sigma_from=80.0, sigma_to=sigma_to, mean=one, vectors=one[None], values=4 * one)


GAUSSIAN_FLOW = Exercise(
    "02/gaussian_flow",
    points=4,
    reference=gaussian_flow,
    cases={
        "a plane, one mode": _one_direction([4.0, 5.0], sigma_from=3.0, sigma_to=1.0),
        "a line, from far out": _line(10.0),
        "to sigma 0": _line(0.0),
        "fewer modes than axes": _path_case(5, 2),
        "as many modes as axes": _path_case(4, 4),
        "float32": _path_case(4, 1, torch.float32),
    },
    mistakes={
        "the root is missing: y shrinks like the standard deviation sqrt(sigma^2 + lambda), not like the variance.": (
            _flow(lambda y, inside, v, s, n: inside((n**2 + v) / (s**2 + v)) + n / s * _outside(y, inside, v))
        ),
        "what lies outside the span of U is gone. There lambda = 0, and y shrinks like sigma itself.": _flow(
            lambda y, inside, v, s, n: inside(_stretch(v, s, n))
        ),
        "what lies outside the span of U does not stay as it is: it is noise, and shrinks as sigma_to / sigma_from.": (
            _flow(lambda y, inside, v, s, n: inside(_stretch(v, s, n)) + _outside(y, inside, v))
        ),
        "the part inside the span is counted twice: outside means y - U U'y.": _flow(
            lambda y, inside, v, s, n: inside(_stretch(v, s, n)) + n / s * y
        ),
        "the two levels are swapped: on the way down y shrinks.": _flow(
            lambda y, inside, v, s, n: inside(1 / _stretch(v, s, n)) + n / s * _outside(y, inside, v)
        ),
        "variances add: sigma^2 + lambda, not sigma + lambda.": _flow(
            lambda y, inside, v, s, n: inside(((n + v) / (s + v)).sqrt()) + n / s * _outside(y, inside, v)
        ),
        "values are variances already: do not square them.": _flow(
            lambda y, inside, v, s, n: inside(_stretch(v**2, s, n)) + n / s * _outside(y, inside, v)
        ),
        "outside the span it is sigma_to / sigma_from, not the ratio of the squares.": _flow(
            lambda y, inside, v, s, n: inside(_stretch(v, s, n)) + (n / s) ** 2 * _outside(y, inside, v)
        ),
        "this is the denoiser's answer at x, one picture. The path keeps the noise that belongs to sigma_to.": (
            lambda x, sigma_from, sigma_to, mean, vectors, values: gaussian_denoised(
                x, sigma_from, mean, vectors, values
            )
        ),
        "the mean is taken off and never put back.": lambda x, sigma_from, sigma_to, mean, vectors, values: (
            gaussian_flow(x, sigma_from, sigma_to, mean, vectors, values) - mean
        ),
        "the mean is not taken off before the modes are stretched.": (
            lambda x, sigma_from, sigma_to, mean, vectors, values: gaussian_flow(
                x, sigma_from, sigma_to, torch.zeros_like(mean), vectors, values
            )
        ),
    },
)

exercises = [
    GAUSSIAN_SCORE,
    GAUSSIAN_DENOISED,
    SWITCH_ON,
    EXPLAINED_VARIANCE,
    DELTA_DENOISED,
    GAUSSIAN_FLOW,
    *QUESTIONS,
]
