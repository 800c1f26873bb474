"""Exercises of chapter 21: the loss of single denoising steps within its clip, the gradient that is left of it, who is
better by several rewards, and the optimum of a bandit.
"""

import math

import torch

from minialign.course.chapters.questions_21 import QUESTIONS
from minialign.course.check import Exercise
from minialign.methods import d3po

# ---- the loss --------------------------------------------------------------------------------------------------------


def preference_loss(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
    """A scalar: mean over pairs and steps of -log sigmoid(beta (log rho_w - log rho_l)), rho the clipped ratios."""
    return d3po.step_loss(chosen - chosen_ref, rejected - rejected_ref, beta, clip_range)[0].mean()


def _soft(u):
    return torch.nn.functional.softplus(-u)


def _log_clip(log_ratio, eps):
    return torch.log(log_ratio.exp().clamp(1 - eps, 1 + eps))


def _loss(kept=_log_clip, logit=lambda good, bad, beta: beta * (good - bad), loss=_soft, reduce=torch.mean, ref=True):
    """A variant: kept(log_ratio, eps) of each side, their logit, the loss of it, and how steps are put together."""

    def wrong(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
        good, bad = (chosen - chosen_ref, rejected - rejected_ref) if ref else (chosen, rejected)
        return reduce(loss(logit(kept(good, clip_range), kept(bad, clip_range), beta)))

    return wrong


def _of_paths(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
    w, l = (_log_clip(x, clip_range).sum(1) for x in (chosen - chosen_ref, rejected - rejected_ref))  # noqa: E741
    return _soft(beta * (w - l)).mean()


def _difference_clipped(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
    return _soft(beta * _log_clip((chosen - chosen_ref) - (rejected - rejected_ref), clip_range)).mean()


def _steps(g, dtype=torch.float64, shape=(4, 5), clip_range=0.2):
    draw = dict(generator=g, dtype=dtype)
    reference = torch.randn(2, *shape, **draw)
    return dict(
        chosen=reference[0] + 0.2 * torch.randn(shape, **draw),
        rejected=reference[1] + 0.2 * torch.randn(shape, **draw),
        chosen_ref=reference[0],
        rejected_ref=reference[1],
        beta=1.5,
        clip_range=clip_range,
    )


def _one(chosen, rejected):
    """One pair of one step, log-ratios as given; beta is large, so that a mistake shows in the loss."""
    ref = torch.tensor([[-1.0]], dtype=torch.float64)
    return dict(
        chosen=ref + chosen, rejected=ref + rejected, chosen_ref=ref, rejected_ref=ref.clone(), beta=5.0, clip_range=0.2
    )


PREFERENCE_LOSS = Exercise(
    "21/preference_loss",
    points=6,
    reference=preference_loss,
    grad_wrt=("chosen", "rejected"),
    cases={
        "inside the clip": _one(0.12, -0.05),
        "the chosen one above the clip": _one(0.4, 0.05),
        "the chosen one below the clip": _one(-0.4, 0.05),
        "the rejected one below the clip": _one(0.05, -0.4),
        "several pairs and steps": _steps,
        "float32": lambda g: _steps(g, torch.float32, (3, 2), 0.1),
    },
    mistakes={
        "the sign is turned: the chosen action is to become likelier, so its log-ratio makes the loss fall.": _loss(
            logit=lambda good, bad, beta: beta * (bad - good)
        ),
        "nothing is clipped.": _loss(kept=lambda x, eps: x),
        "the RATIO is held within 1 - eps and 1 + eps; you held its logarithm within -eps and eps.": _loss(
            kept=lambda x, eps: x.clamp(-eps, eps)
        ),
        "the clipped ratios are compared where their logarithms belong.": _loss(
            kept=lambda x, eps: x.exp().clamp(1 - eps, 1 + eps)
        ),
        "the reference is missing: what counts is how much MORE likely an action has become.": _loss(ref=False),
        "the steps were added up before the loss: that is DPO on whole paths; here every step has a loss.": _of_paths,
        "each of the two ratios is clipped by itself, not their quotient.": _difference_clipped,
        "beta multiplies the difference.": _loss(logit=lambda good, bad, beta: (good - bad) / beta),
        "beta is missing.": _loss(logit=lambda good, bad, beta: good - bad),
        "beta stands with one of the two only.": _loss(logit=lambda good, bad, beta: beta * good - bad),
        "a sum over pairs and steps where their mean is asked for.": _loss(reduce=torch.sum),
        "the logarithm is missing: -sigmoid, not -log sigmoid.": _loss(loss=lambda u: -u.sigmoid()),
        "log sigmoid without its minus: training minimises.": _loss(loss=lambda u: -_soft(u)),
        "only the upper side is clipped.": _loss(kept=lambda x, eps: x.exp().clamp(max=1 + eps).log()),
        "only the lower side is clipped.": _loss(kept=lambda x, eps: x.exp().clamp(min=1 - eps).log()),
        "the two log-ratios are to be compared; you added them.": _loss(
            logit=lambda good, bad, beta: beta * (good + bad)
        ),
    },
)

# ---- what is left of the gradient ------------------------------------------------------------------------------------


def slopes(chosen, rejected, beta, clip_range):
    """(d L / d chosen, d L / d rejected), (n,) each, of each pair's own loss at log-ratios chosen, rejected (n,)."""
    w, l = _log_clip(chosen, clip_range), _log_clip(rejected, clip_range)  # noqa: E741
    pull = beta * (-beta * (w - l)).sigmoid()
    inside = [(x.exp() - 1).abs() <= clip_range for x in (chosen, rejected)]
    return -pull * inside[0], pull * inside[1]


def _slopes(
    clip=_log_clip, factor=lambda beta: beta, of=lambda u: (-u).sigmoid(), inside=lambda a, b: (a, b), sign=(-1, 1)
):
    """A variant: the pull factor(beta) of(u), and where it arrives: inside(inside the clip, of either) -> two masks."""

    def wrong(chosen, rejected, beta, clip_range):
        w, l = clip(chosen, clip_range), clip(rejected, clip_range)  # noqa: E741
        pull = factor(beta) * of(beta * (w - l))
        masks = inside(*((x.exp() - 1).abs() <= clip_range for x in (chosen, rejected)))
        return tuple(s * pull * mask for s, mask in zip(sign, masks, strict=True))

    return wrong


def _everywhere(a, b):
    return torch.ones_like(a), torch.ones_like(b)


def _slope_case(g, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    return dict(chosen=0.25 * torch.randn(7, **draw), rejected=0.25 * torch.randn(7, **draw), beta=1.3, clip_range=0.2)


SLOPES = Exercise(
    "21/slopes",
    points=4,
    reference=slopes,
    cases={
        "at the reference": dict(chosen=torch.zeros(1), rejected=torch.zeros(1), beta=0.1, clip_range=0.1),
        "inside": dict(chosen=torch.tensor([0.05]), rejected=torch.tensor([-0.05]), beta=2.0, clip_range=0.1),
        "the chosen one outside": dict(
            chosen=torch.tensor([0.3, -0.3]), rejected=torch.tensor([0.02, 0.02]), beta=2.0, clip_range=0.1
        ),
        "the rejected one outside": dict(
            chosen=torch.tensor([0.02, 0.02]), rejected=torch.tensor([0.3, -0.3]), beta=2.0, clip_range=0.1
        ),
        "several": _slope_case,
        "float32": lambda g: _slope_case(g, torch.float32),
    },
    mistakes={
        "a clamp has no slope outside its bounds: what has left the clip gets nothing.": _slopes(inside=_everywhere),
        "one member outside does not silence the other: each has its own clamp.": _slopes(
            inside=lambda a, b: (a & b, a & b)
        ),
        "the masks are swapped: it is the member that has left that gets nothing.": _slopes(inside=lambda a, b: (b, a)),
        "a member outside the clip still counts in the argument, at the clip's edge.": _slopes(clip=lambda x, eps: x),
        "the chain rule brings a factor beta.": _slopes(factor=lambda beta: 1.0),
        "one factor beta, from the chain rule; the other one stands inside the sigmoid.": _slopes(
            factor=lambda beta: beta**2
        ),
        "the derivative of -log sigmoid(u) is -sigmoid(-u): a pair that is ordered well pulls less.": _slopes(
            of=torch.sigmoid
        ),
        "the derivative of -log sigmoid(u), not of sigmoid(u).": _slopes(of=lambda u: u.sigmoid() * (-u).sigmoid()),
        "the signs are turned: the loss falls as the chosen one becomes likelier.": _slopes(sign=(1, -1)),
        "both slopes have one sign; the rejected one is to become less likely.": _slopes(sign=(-1, -1)),
        "that is the slope at the reference, everywhere: as pairs are told apart it gets smaller.": _slopes(
            of=lambda u: torch.full_like(u, 0.5)
        ),
        "these are the slopes of the mean over pairs; each pair's own was asked for.": (
            lambda chosen, rejected, beta, clip_range: tuple(
                x / len(chosen) for x in slopes(chosen, rejected, beta, clip_range)
            )
        ),
    },
)

# ---- several rewards -------------------------------------------------------------------------------------------------


def dominates(first, second):
    """(n,): 1 where the first is better by some reward and worse by none, 0 the other way round, 1/2 else."""
    return d3po.pareto(first, second)


def _by(wins):
    """A variant: wins(a, b) -> (n,) truths."""
    return lambda first, second: (1 + wins(first, second).float() - wins(second, first).float()) / 2


def _strict_case(g):
    scores = torch.randint(0, 3, (2, 3, 40), generator=g).float()
    return dict(first=scores[0], second=scores[1])


DOMINATES = Exercise(
    "21/dominates",
    points=3,
    reference=dominates,
    cases={
        "one reward": dict(first=torch.tensor([[1.0, 2.0, 3.0]]), second=torch.tensor([[2.0, 2.0, 1.0]])),
        "two rewards": dict(
            first=torch.tensor([[1.0, 1.0, 1.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0, 4.0]]),
            second=torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0], [4.0, 4.0, 5.0, 5.0, 5.0]]),
        ),
        "three rewards": _strict_case,
    },
    mistakes={
        "rewards were added up: 40 points of one would then buy 10 of another, and nobody said at what price.": _by(
            lambda a, b: a.sum(0) > b.sum(0)
        ),
        "better by SOME reward is not enough: it must be worse by none.": (
            lambda first, second: torch.where(
                (first > second).any(0), 1.0, torch.where((first < second).any(0), 0.0, 0.5)
            )
        ),
        "better by EVERY reward is too much: equal ones do not spoil it.": _by(lambda a, b: (a > b).all(0)),
        "two that are equal in everything are a tie.": (
            lambda first, second: (
                ((first >= second).all(0)).float() + 0.5 * ~((first >= second).all(0) | (second >= first).all(0))
            )
        ),
        "the majority of the rewards decided.": _by(lambda a, b: (a > b).sum(0) > (b > a).sum(0)),
        "turned round: a label is 1 where the FIRST wins.": lambda first, second: d3po.pareto(second, first),
        "where neither wins the label is 1/2, not 0.": (
            lambda first, second: (d3po.pareto(first, second) == 1).float()
        ),
        "where neither wins the label is 1/2, not 1.": (lambda first, second: (d3po.pareto(first, second) > 0).float()),
        "that is the authors' +1, 0 and -1; here a label is 1, 1/2 or 0.": (
            lambda first, second: 2 * d3po.pareto(first, second) - 1
        ),
        "only the first reward was looked at.": (lambda first, second: d3po.pareto(first[:1], second[:1])),
    },
)

# ---- the bandit ------------------------------------------------------------------------------------------------------


def best_shift(std, slope, beta):
    """delta* = std^2 slope / beta."""
    return std**2 * slope / beta


def _shift_case(g):
    s, slope, beta = (0.2 + 2 * torch.rand(3, generator=g, dtype=torch.float64)).tolist()
    return dict(std=s, slope=slope, beta=beta)


BEST_SHIFT = Exercise(
    "21/best_shift",
    points=3,
    reference=best_shift,
    cases={
        "the text's numbers": dict(std=0.5, slope=2.0, beta=0.25),
        "a narrow policy": dict(std=0.1, slope=3.0, beta=0.5),
        "drawn": _shift_case,
    },
    mistakes={
        "std is a standard deviation; a Gaussian's log-density has its square.": lambda std, slope, beta: (
            std * slope / beta
        ),
        "beta is the price of a nat: the dearer, the smaller the shift.": lambda std, slope, beta: (
            std**2 * slope * beta
        ),
        "beta is missing.": lambda std, slope, beta: std**2 * slope,
        "the slope of the reward is missing: it decides how sure the labels are.": lambda std, slope, beta: (
            std**2 / beta
        ),
        "sigma^2 divides the log-ratio, so it multiplies the shift.": lambda std, slope, beta: slope / (beta * std**2),
        "the halves of the two squares cancel: no factor 1/2 is left.": lambda std, slope, beta: (
            std**2 * slope / (2 * beta)
        ),
        "no factor 2: reward and log-ratio are both differences of the same two samples.": lambda std, slope, beta: (
            2 * std**2 * slope / beta
        ),
        "a spread of two samples (sqrt 2) is in both arguments, and cancels.": lambda std, slope, beta: (
            math.sqrt(2) * std**2 * slope / beta
        ),
        "upside down.": lambda std, slope, beta: beta / (std**2 * slope),
    },
)

exercises = [PREFERENCE_LOSS, SLOPES, DOMINATES, BEST_SHIFT, *QUESTIONS]
