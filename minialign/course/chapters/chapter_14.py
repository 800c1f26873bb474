"""Exercises of chapter 14: what a model predicts of rewards, PRDP's loss with its clip, how hard that pulls at a path,
and the optimum of a linear-Gaussian chain.
"""

import torch

from minialign.course.chapters.questions_14 import QUESTIONS
from minialign.course.check import Exercise
from minialign.methods import prdp

# ---- what is predicted -----------------------------------------------------------------------------------------------


def predicted_gaps(log_prob, log_prob_ref, beta):
    """beta (r^_i - r^_j) at [:, i, j], (n, b, b), from the steps' log-probabilities (n, b, t)."""
    return beta * prdp.differences((log_prob - log_prob_ref).sum(2))


def _gaps(of_paths=lambda q: q.sum(2), scale=lambda beta: beta, ratio=lambda p, ref: p - ref):
    """A variant: steps' log-ratios, put together to one number a path, times a factor."""
    return lambda log_prob, log_prob_ref, beta: scale(beta) * prdp.differences(of_paths(ratio(log_prob, log_prob_ref)))


def _paths(g, shape=(2, 3, 5), dtype=torch.float32):
    draw = dict(generator=g, dtype=dtype)
    return dict(log_prob=torch.randn(shape, **draw), log_prob_ref=torch.randn(shape, **draw), beta=0.7)


PREDICTED_GAPS = Exercise(
    "14/predicted_gaps",
    points=3,
    reference=predicted_gaps,
    grad_wrt=("log_prob",),
    cases={
        "one prompt, two paths of one step": dict(
            log_prob=torch.tensor([[[0.5], [0.25]]]), log_prob_ref=torch.tensor([[[0.0], [0.75]]]), beta=2.0
        ),
        "several": _paths,
        "float64": lambda g: _paths(g, (3, 5, 2), torch.float64),
    },
    mistakes={
        "a path's log-ratio is the sum over its steps, not their mean: densities of steps multiply.": _gaps(
            lambda q: q.mean(2)
        ),
        "the reference is missing: what counts is how much MORE probable a path has become.": _gaps(
            ratio=lambda p, ref: p
        ),
        "policy minus reference, not the other way round: paths that pay more are to become more probable.": _gaps(
            ratio=lambda p, ref: ref - p
        ),
        "beta is reward per nat, so nats TIMES beta are reward.": _gaps(scale=lambda beta: 1 / beta),
        "these are nats; what is asked for has the unit of the reward.": _gaps(scale=lambda beta: 1.0),
        "differences of ratios, not of log-ratios.": _gaps(lambda q: q.sum(2).exp()),
        "differences of steps: sum over the steps first, then compare the paths.": (
            lambda log_prob, log_prob_ref, beta: beta * prdp.differences((log_prob - log_prob_ref)[..., 0])
        ),
    },
)

# ---- the loss --------------------------------------------------------------------------------------------------------


def proximal_loss(log_prob, log_prob_old, log_prob_ref, rewards, beta, clip_range):
    """A scalar: max(l, l_clip), in units of reward squared, mean over each prompt's pairs and over prompts."""
    loss, _ = prdp.prdp_loss(log_prob, log_prob_old, log_prob_ref, rewards, beta, clip_range)
    return beta**2 * loss.mean()


def _loss(clipped=None, both=torch.maximum, error=torch.square, pairs=lambda b: b * (b - 1), gap=None, total=None):
    """A variant. clipped(q, q_old, eps) -> steps' clipped log-ratios; total(q) -> a number a path."""

    def wrong(log_prob, log_prob_old, log_prob_ref, rewards, beta, clip_range):
        q, old, b = log_prob - log_prob_ref, log_prob_old - log_prob_ref, rewards.shape[1]
        bent = q.clamp(old - clip_range, old + clip_range) if clipped is None else clipped(q, old, clip_range)
        true = prdp.differences(rewards) if gap is None else gap(rewards, beta)
        put = (lambda steps: steps.sum(2)) if total is None else total
        errors = [error(beta * prdp.differences(put(steps)) - true) for steps in (q, bent)]
        return both(*errors).sum() / (len(rewards) * pairs(b))

    return wrong


def _of_the_sum(q, old, eps):
    """As if the path's sum were clipped: all of its change is put on the first step."""
    change = (q - old).sum(2, keepdim=True).clamp(-eps, eps)
    return old + torch.cat([change, torch.zeros_like(q[..., 1:])], 2)


def _loss_case(g, shape=(2, 4, 3), dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    log_prob, noise = torch.randn(shape, **draw), torch.randn(shape, **draw)
    return dict(
        log_prob=log_prob,
        log_prob_old=log_prob + 0.3 * noise,
        log_prob_ref=log_prob + 0.5 * torch.randn(shape, **draw),
        rewards=torch.randn(shape[:2], **draw),
        beta=0.7,
        clip_range=0.2,
    )


def _one_step(q, old=0.0):
    """The sheet's cases: two paths of one step, the other one fixed at 0, a target of .5, eps = .1."""
    return dict(
        log_prob=torch.tensor([[[q], [0.0]]], dtype=torch.float64),
        log_prob_old=torch.tensor([[[old], [0.0]]], dtype=torch.float64),
        log_prob_ref=torch.zeros(1, 2, 1, dtype=torch.float64),
        rewards=torch.tensor([[0.5, 0.0]], dtype=torch.float64),
        beta=1.0,
        clip_range=0.1,
    )


PROXIMAL_LOSS = Exercise(
    "14/proximal_loss",
    points=6,
    reference=proximal_loss,
    grad_wrt=("log_prob",),
    cases={
        "inside the clip": _one_step(0.05),
        "clipped on the way to the target": _one_step(0.3),
        "past the target": _one_step(1.2),
        "clipped on the wrong side": _one_step(-0.3),
        "an old policy away from the reference": _one_step(0.45, old=0.4),
        "several prompts, paths and steps": _loss_case,
        "float32": lambda g: _loss_case(g, (3, 2, 5), torch.float32),
    },
    mistakes={
        "the smaller of the two errors: a step that has gone far then looks better than it is.": _loss(
            both=torch.minimum
        ),
        "only the clipped error: a prediction that has overshot by a clipped step cannot come back.": _loss(
            both=lambda plain, clipped: clipped
        ),
        "nothing is clipped.": _loss(both=lambda plain, clipped: plain),
        "clipped around the reference; the centre is where the old policy was.": _loss(
            lambda q, old, eps: q.clamp(-eps, eps)
        ),
        "the sum over the steps was clipped; each step is clipped by itself.": _loss(_of_the_sum),
        "the two paths of a pair are predicted in one order and paid in the other.": _loss(
            gap=lambda rewards, beta: -prdp.differences(rewards)
        ),
        "in units of reward the target is the difference itself: beta stands with the log-ratios.": _loss(
            gap=lambda rewards, beta: prdp.differences(rewards) / beta
        ),
        "absolute errors; a regression to a mean has squares.": _loss(error=torch.abs),
        "a path compared with itself is no pair: there are b (b - 1) ordered ones, not b^2.": _loss(
            pairs=lambda b: b * b
        ),
        "each pair counts twice: mean over the pairs, not over half as many.": _loss(pairs=lambda b: b * (b - 1) / 2),
        "a sum over the pairs where their mean is asked for.": _loss(pairs=lambda b: 1),
        "a path's log-ratio is the sum over its steps, not their mean.": _loss(total=lambda q: q.mean(2)),
    },
)

# ---- how hard it pulls -----------------------------------------------------------------------------------------------


def pull(predicted, rewards):
    """d L / d v_i, (n, b), of L = mean over pairs ((v_i - v_j) - (r_i - r_j))^2: 4 (e_i - mean of e) / (b - 1)."""
    error = predicted - rewards
    return 4 * (error - error.mean(1, keepdim=True)) / (rewards.shape[1] - 1)


def _pull(error=lambda v, r: v - r, centre=lambda e: e.mean(1, keepdim=True), factor=lambda b: 4 / (b - 1)):
    """A variant: factor(b) (e - centre(e))."""

    def wrong(predicted, rewards):
        e = error(predicted, rewards)
        return factor(rewards.shape[1]) * (e - centre(e))

    return wrong


def _pull_case(g, shape=(3, 5), dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    return dict(predicted=torch.randn(shape, **draw), rewards=torch.randn(shape, **draw))


PULL = Exercise(
    "14/pull",
    points=4,
    reference=pull,
    cases={
        "nothing predicted yet": dict(
            predicted=torch.zeros(1, 4, dtype=torch.float64),
            rewards=torch.tensor([[1.0, 3.0, -2.0, 0.5]], dtype=torch.float64),
        ),
        "all explained, but for the prompt's own number": dict(
            predicted=torch.tensor([[4.0, 6.0, 1.0]]), rewards=torch.tensor([[1.0, 3.0, -2.0]])
        ),
        "pairs": lambda g: _pull_case(g, (4, 2)),
        "several": _pull_case,
        "float32": lambda g: _pull_case(g, (2, 7), torch.float32),
    },
    mistakes={
        "the sign is turned: where a path pays more than predicted, the loss falls as its prediction rises.": _pull(
            lambda v, r: r - v
        ),
        "the derivative of a square brings a factor 2 with it.": _pull(factor=lambda b: 2 / (b - 1)),
        "b - 1, not b: a path has b - 1 others to be compared with.": _pull(factor=lambda b: 4 / b),
        "no mean was taken off: an average reward of the prompt must not pull at anything.": _pull(
            centre=lambda e: torch.zeros_like(e)
        ),
        "the mean of all prompts was taken off, not of each prompt's own paths.": _pull(centre=lambda e: e.mean()),
        "what is predicted already is missing: this pull would never end.": _pull(lambda v, r: -r),
        "a sum over the pairs where their mean is asked for.": _pull(factor=lambda b: 2 * b),
        "the mean of the OTHER paths was taken off as well as the factor b / (b - 1) that this brings.": _pull(
            factor=lambda b: 4 * b / (b - 1) ** 2
        ),
    },
)

# ---- the optimum of a chain ------------------------------------------------------------------------------------------


def best_shifts(std, downstream, beta):
    """(shift of each step's mean (steps,), shift of E[x_0], a scalar): sigma^2 A / beta, and sum A^2 sigma^2 / beta."""
    steps = std**2 * downstream / beta
    return steps, (downstream * steps).sum()


def _shifts(steps, total=lambda steps, downstream: (downstream * steps).sum()):
    """A variant: steps(std, downstream, beta) and how they add up."""

    def wrong(std, downstream, beta):
        found = steps(std, downstream, beta)
        return found, total(found, downstream)

    return wrong


def _right(std, downstream, beta):
    return std**2 * downstream / beta


def _chain(g, steps=6, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    return dict(std=0.1 + torch.rand(steps, **draw), downstream=0.2 + torch.rand(steps, **draw), beta=1.5)


BEST_SHIFTS = Exercise(
    "14/best_shifts",
    points=4,
    reference=best_shifts,
    cases={
        "one step": dict(std=torch.tensor([0.5]), downstream=torch.tensor([1.0]), beta=2.0),
        "two steps": dict(std=torch.tensor([0.5, 0.25]), downstream=torch.tensor([0.5, 1.0]), beta=0.5),
        "several, float64": _chain,
        "float32": lambda g: _chain(g, 4, torch.float32),
    },
    mistakes={
        "std is a standard deviation: a nat buys a shift in proportion to its square.": _shifts(
            lambda std, downstream, beta: std * downstream / beta
        ),
        "what a step's shift is worth is missing: x_0 moves by A times it.": _shifts(
            lambda std, downstream, beta: std**2 / beta
        ),
        "the half of the KL is gone when it is differentiated.": _shifts(
            lambda std, downstream, beta: std**2 * downstream / (2 * beta)
        ),
        "beta is the price of a nat: the dearer, the smaller the shift.": _shifts(
            lambda std, downstream, beta: std**2 * downstream * beta
        ),
        "the steps are right, but on its way to x_0 each shift is multiplied by A once more.": _shifts(
            _right, lambda steps, downstream: steps.sum()
        ),
        "the steps are right, but their mean does not move x_0: every one of them does, and they add up.": _shifts(
            _right, lambda steps, downstream: (downstream * steps).mean()
        ),
        "the steps are right; the shift of x_0 takes A once more, not its square.": _shifts(
            _right, lambda steps, downstream: (downstream**2 * steps).sum()
        ),
    },
)

exercises = [PREDICTED_GAPS, PROXIMAL_LOSS, PULL, BEST_SHIFTS, *QUESTIONS]
