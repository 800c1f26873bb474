"""Exercises of chapter 12: a consistency sampler's action, what its gradient reaches, an action for the last call,
REBEL, and when a distillation has paid for itself.
"""

import torch

from minialign.course.chapters.questions_12 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import gaussian_log_prob
from minialign.methods.rlcm import rebel_loss

# ---- the density of an action ----------------------------------------------------------------------------------------


def _column(level, denoised):
    return level.reshape(-1, *[1] * (denoised.ndim - 1))


def action_log_prob(next, denoised, alpha_bar, alpha_bar_next):
    """log N(next; sqrt(a') denoised, (1 - a') I), (batch,), mean over the elements; a' is the NEXT level."""
    mean = _column(alpha_bar_next.sqrt(), denoised) * denoised
    return gaussian_log_prob(next.detach(), mean, (1 - alpha_bar_next).sqrt(), "mean")


def _density(signal, std, reduce=lambda terms: terms.mean(1)):
    """A variant: signal(a, a') and std(a, a') of the transition, and how its elements are put together."""

    def wrong(next, denoised, alpha_bar, alpha_bar_next):
        factor = _column(signal(alpha_bar, alpha_bar_next), denoised)
        spread = _column(std(alpha_bar, alpha_bar_next), denoised).expand_as(denoised)
        terms = torch.distributions.Normal(factor * denoised, spread).log_prob(next.detach())
        return reduce(terms.flatten(1))

    return wrong


def _signal(a, b):
    return b.sqrt()


def _noise(a, b):
    return (1 - b).sqrt()


def _action_case(g, shape=(4, 3), dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    denoised = torch.randn(shape, **draw)
    alpha_bar = 0.05 + 0.3 * torch.rand(shape[0], **draw)
    return dict(
        next=denoised + torch.randn(shape, **draw),
        denoised=denoised,
        alpha_bar=alpha_bar,
        alpha_bar_next=alpha_bar + 0.1 + 0.4 * torch.rand(shape[0], **draw),
    )


ACTION_LOG_PROB = Exercise(
    "12/action_log_prob",
    points=4,
    reference=action_log_prob,
    grad_wrt=("denoised",),
    cases={
        "one number": dict(
            next=torch.tensor([[1.5]]),
            denoised=torch.tensor([[2.0]]),
            alpha_bar=torch.tensor([0.04]),
            alpha_bar_next=torch.tensor([0.36]),
        ),
        "one axis": _action_case,
        "several axes": lambda g: _action_case(g, (3, 2, 4, 5)),
        "float64": lambda g: _action_case(g, (5, 2), torch.float64),
    },
    mistakes={
        "mean and std are both those of the level that the sample comes from; it is re-noised to the next one.": (
            _density(lambda a, b: a.sqrt(), lambda a, b: (1 - a).sqrt())
        ),
        "the std is right, but the mean is scaled for the level that the sample comes from.": _density(
            lambda a, b: a.sqrt(), _noise
        ),
        "the mean is right, but the std is that of the level that the sample comes from.": _density(
            _signal, lambda a, b: (1 - a).sqrt()
        ),
        "alpha_bar is a share of the variance; the mean is scaled by its root.": _density(lambda a, b: b, _noise),
        "the mean is not the denoised sample itself: at the next level only a part of it is left as signal.": _density(
            lambda a, b: torch.ones_like(b), _noise
        ),
        "1 - alpha_bar is a variance, and a Gaussian with std wants its root.": _density(_signal, lambda a, b: 1 - b),
        "a sum over the elements; with the mean the size of a log-ratio does not depend on the latent's.": _density(
            _signal, _noise, lambda terms: terms.sum(1)
        ),
        "one number for the whole batch; every sample has an action of its own.": _density(
            _signal, _noise, lambda terms: terms.mean()
        ),
    },
)

# ---- what the policy gradient reaches --------------------------------------------------------------------------------


def reached_gradient(carried):
    """sum_{j=0}^{H-2} prod_{i=j+1}^{H-1} c_i, a scalar: the part of d E[y] / d theta that H - 1 actions account for.

    carried (H,): c_i = d f_i / d (the signal that went into call i). The whole derivative is 1 more: the last call's.
    """
    return carried.flip(0).cumprod(0)[:-1].sum()


def _carried(g):
    calls = int(torch.randint(3, 8, (), generator=g))
    return dict(carried=0.1 + 0.8 * torch.rand(calls, generator=g, dtype=torch.float64))


REACHED_GRADIENT = Exercise(
    "12/reached_gradient",
    points=4,
    reference=reached_gradient,
    cases={
        "one call": dict(carried=torch.tensor([0.25])),  # no action at all
        "two calls": dict(carried=torch.tensor([0.25, 0.5])),
        "three calls": dict(carried=torch.tensor([0.3, 0.25, 0.5])),
        "four calls, float64": dict(
            carried=torch.tensor([0.034192, 0.116556, 0.296102, 0.570728], dtype=torch.float64)
        ),
        "several calls, float64": _carried,
    },
    mistakes={
        "that is the whole derivative: the 1 belongs to the last call, and no action follows it.": (
            lambda carried: 1 + reached_gradient(carried)
        ),
        "a push is carried by ALL calls behind it, so each of them contributes a factor, not the next one alone.": (
            lambda carried: carried[1:].sum()
        ),
        "the first push is made AT call 0; what call 0 carries went into it before, and that is noise.": (
            lambda carried: carried.flip(0).cumprod(0).sum()
        ),
        "the products run the wrong way: from each call to the end, not from the start to it.": (
            lambda carried: carried[:-1].cumprod(0).sum()
        ),
        "only the first call's push was counted; there are H - 1 that are followed by an action.": (
            lambda carried: carried[1:].prod()
        ),
    },
)

# ---- an action for the last call -------------------------------------------------------------------------------------


def terminal_action(denoised, noise, terminal_std):
    """(what the reward is paid for, detached; its log-probability (batch,), mean over elements)."""
    paid = (denoised + terminal_std * noise).detach()
    return paid, gaussian_log_prob(paid, denoised, denoised.new_full((len(denoised),), terminal_std), "mean")


def _log_density(x, mean, std):
    return torch.distributions.Normal(mean, torch.full_like(mean, std)).log_prob(x).flatten(1)


def _paid(denoised, noise, std):
    return (denoised + std * noise).detach()


def _attached(denoised, noise, terminal_std):
    paid = denoised + terminal_std * noise
    return paid, _log_density(paid, denoised, terminal_std).mean(1)


def _terminal_case(g, shape=(4, 3), dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    std = 0.1 + 0.3 * float(torch.rand((), generator=g))
    return dict(denoised=torch.randn(shape, **draw), noise=torch.randn(shape, **draw), terminal_std=std)


TERMINAL_ACTION = Exercise(
    "12/terminal_action",
    points=4,
    reference=terminal_action,
    grad_wrt=("denoised",),
    cases={
        "one number": dict(denoised=torch.tensor([[2.0]]), noise=torch.tensor([[-1.0]]), terminal_std=0.5),
        "one axis": _terminal_case,
        "several axes": lambda g: _terminal_case(g, (3, 2, 4)),
        "float64": lambda g: _terminal_case(g, (5, 2), torch.float64),
    },
    mistakes={
        "the action still hangs on the network: mean and action then move together, and the gradient is zero.": (
            _attached
        ),
        "the reward is paid for the sample BEFORE its noise: nobody learns what the noise was worth.": (
            lambda denoised, noise, terminal_std: (
                denoised.detach(),
                _log_density(_paid(denoised, noise, terminal_std), denoised, terminal_std).mean(1),
            )
        ),
        "you score the denoised sample, which is the mean of its own density; score what was done.": (
            lambda denoised, noise, terminal_std: (
                _paid(denoised, noise, terminal_std),
                _log_density(denoised.detach(), denoised, terminal_std).mean(1),
            )
        ),
        "terminal_std is a standard deviation; the density has its square in it already.": (
            lambda denoised, noise, terminal_std: (
                _paid(denoised, noise, terminal_std),
                _log_density(_paid(denoised, noise, terminal_std), denoised, terminal_std**2).mean(1),
            )
        ),
        "a sum over the elements; the other actions of the chain take the mean.": (
            lambda denoised, noise, terminal_std: (
                _paid(denoised, noise, terminal_std),
                _log_density(_paid(denoised, noise, terminal_std), denoised, terminal_std).sum(1),
            )
        ),
        "noise of standard deviation 1 was added, and scored as if it were smaller.": (
            lambda denoised, noise, terminal_std: (
                _paid(denoised, noise, 1.0),
                _log_density(_paid(denoised, noise, 1.0), denoised, terminal_std).mean(1),
            )
        ),
    },
)

# ---- REBEL -----------------------------------------------------------------------------------------------------------


def rebel(log_ratio, advantages, eta):
    """mean over pairs of (eta (sum_j log rho_1j - sum_j log rho_2j) - (A_1 - A_2))^2; log_ratio (2, pairs, steps)."""
    return rebel_loss(log_ratio.sum(2), advantages, eta)


def _regression(error, reduce=lambda error: error.square().mean()):
    """A variant: error(log_ratio, advantages, eta) -> (pairs,)."""
    return lambda log_ratio, advantages, eta: reduce(error(log_ratio, advantages, eta))


def _gap(pair):
    return pair[0] - pair[1]


def _pairs(g, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    return dict(log_ratio=torch.randn(2, 5, 3, **draw), advantages=torch.randn(2, 5, **draw), eta=1.5)


REBEL = Exercise(
    "12/rebel",
    points=3,
    reference=rebel,
    grad_wrt=("log_ratio",),
    cases={
        "one pair": dict(
            log_ratio=torch.tensor([[[0.1, 0.2]], [[0.0, 0.1]]]), advantages=torch.tensor([[1.0], [0.5]]), eta=2.0
        ),
        "float64": _pairs,
        "float32": lambda g: _pairs(g, torch.float32),
    },
    mistakes={
        "summed over the pairs as well, so that samples mix: a sum runs over one sample's own steps.": _regression(
            lambda log_ratio, advantages, eta: eta * (log_ratio[0].sum() - log_ratio[1].sum()) - _gap(advantages)
        ),
        "a trajectory's log-ratio is the sum over its steps, not their mean.": _regression(
            lambda log_ratio, advantages, eta: eta * _gap(log_ratio.mean(2)) - _gap(advantages)
        ),
        "eta belongs to the log-ratios: it says how much advantage a nat is worth.": _regression(
            lambda log_ratio, advantages, eta: _gap(log_ratio.sum(2)) - eta * _gap(advantages)
        ),
        "the two differences should agree, not cancel: the better sample is to become likelier.": _regression(
            lambda log_ratio, advantages, eta: eta * _gap(log_ratio.sum(2)) + _gap(advantages)
        ),
        "each step was regressed on the advantages alone; it is the whole trajectory that earned them.": (
            lambda log_ratio, advantages, eta: (eta * _gap(log_ratio) - _gap(advantages).unsqueeze(-1)).square().mean()
        ),
        "a sum over the pairs where the mean belongs.": _regression(
            lambda log_ratio, advantages, eta: eta * _gap(log_ratio.sum(2)) - _gap(advantages),
            lambda error: error.square().sum(),
        ),
        "not squared: such a difference can fall for ever.": _regression(
            lambda log_ratio, advantages, eta: eta * _gap(log_ratio.sum(2)) - _gap(advantages),
            lambda error: error.mean(),
        ),
    },
)

# ---- when a distillation has paid for itself -------------------------------------------------------------------------


def break_even(distillation, steps, calls, ratio):
    """Queries of DDPO until RLCM, its distillation included, has spent as many network evaluations; inf if never.

    A query costs DDPO S + 3 S evaluations, RLCM H + 3 (H - 1); where DDPO asks once, RLCM asks `ratio` times.
    """
    saved = 4 * steps - ratio * (4 * calls - 3)
    return distillation / saved if saved > 0 else float("inf")


def _when(saved):
    """A variant: saved(S, H, ratio) evaluations a query of DDPO."""

    def wrong(distillation, steps, calls, ratio):
        gain = saved(steps, calls, ratio)
        return distillation / gain if gain > 0 else float("inf")

    return wrong


BREAK_EVEN = Exercise(
    "12/break_even",
    points=3,
    reference=break_even,
    cases={
        "one call": dict(distillation=770.0, steps=20, calls=1, ratio=3.0),  # 80 - 3: ten queries
        "the paper's numbers": dict(distillation=1_920_000, steps=50, calls=4, ratio=2.4),
        "more spent": dict(distillation=1_920_000, steps=4, calls=4, ratio=2.0),  # never
        "nothing saved": dict(distillation=1_000_000, steps=5, calls=2, ratio=4.0),  # 20 - 4 * 5: no division by it
        "drawn": lambda g: dict(
            distillation=1e5 + 1e6 * float(torch.rand((), generator=g)),
            steps=int(torch.randint(20, 60, (), generator=g)),
            calls=int(torch.randint(2, 6, (), generator=g)),
            ratio=1.5 + float(torch.rand((), generator=g)),
        ),
    },
    mistakes={
        "only the sampling was counted; a state that is trained on costs three evaluations more.": _when(
            lambda steps, calls, ratio: steps - ratio * calls
        ),
        "RLCM's last call is made but not trained on: H calls, H - 1 actions.": _when(
            lambda steps, calls, ratio: 4 * steps - ratio * 4 * calls
        ),
        "a trained state counts 3, and 1 on top for having been sampled.": _when(
            lambda steps, calls, ratio: 3 * steps - ratio * 3 * (calls - 1)
        ),
        "both were charged for the same number of queries; RLCM asks `ratio` times as often.": _when(
            lambda steps, calls, ratio: 4 * steps - (4 * calls - 3)
        ),
        "the ratio is RLCM's queries over DDPO's; you have used it upside down.": _when(
            lambda steps, calls, ratio: ratio * 4 * steps - (4 * calls - 3)
        ),
        "where RLCM saves nothing the distillation never pays: float('inf'), not a negative number.": (
            lambda distillation, steps, calls, ratio: distillation / (4 * steps - ratio * (4 * calls - 3))
        ),
    },
)

exercises = [ACTION_LOG_PROB, REACHED_GRADIENT, TERMINAL_ACTION, REBEL, BREAK_EVEN, *QUESTIONS]
