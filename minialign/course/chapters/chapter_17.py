"""Exercises of chapter 17: the distance of two Gaussians, moments after an exchange, greedy swaps, the contrast."""

import torch

from minialign.course.chapters.questions_17 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import denoising_log_ratio, dpo_loss
from minialign.measure import frechet_gaussian

# ---- the Frechet distance --------------------------------------------------------------------------------------------


def frechet(mean_a, cov_a, mean_b, cov_b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), a scalar; no square root at the end."""
    return frechet_gaussian(mean_a, cov_a, mean_b, cov_b).to(mean_a.dtype)


def _root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def _distance(cross, mean=lambda gap: gap.square().sum(), end=lambda distance: distance):
    """A variant: cross(A, B), the trace that is taken off twice; mean(gap); end(distance)."""

    def wrong(mean_a, cov_a, mean_b, cov_b):
        spread = cov_a.trace() + cov_b.trace() - cross(cov_a, cov_b)
        return end(mean(mean_a - mean_b) + spread)

    return wrong


def _cross(a, b):
    root = _root(a)
    return _root(root @ b @ root).trace()


def _spd(g, d):
    factor = torch.randn(d, d, generator=g, dtype=torch.float64)
    return factor @ factor.T / d + 0.2 * torch.eye(d, dtype=torch.float64)


def _gaussians(g, d=3):
    mean_a, mean_b = torch.randn(2, d, generator=g, dtype=torch.float64)
    return dict(mean_a=mean_a, cov_a=_spd(g, d), mean_b=mean_b, cov_b=_spd(g, d))


FRECHET = Exercise(
    "17/frechet",
    points=4,
    reference=frechet,
    tolerance=1e-6,
    cases={
        "one dimension": dict(
            mean_a=torch.tensor([0.0]), cov_a=torch.tensor([[4.0]]), mean_b=torch.tensor([1.0]),
            cov_b=torch.tensor([[1.0]]),
        ),
        "matrices that do not commute": dict(
            mean_a=torch.zeros(2, dtype=torch.float64),
            cov_a=torch.tensor([[2, 0.5], [0.5, 1]], dtype=torch.float64),
            mean_b=torch.tensor([1.0, 2.0], dtype=torch.float64),
            cov_b=torch.tensor([[1, -0.3], [-0.3, 0.5]], dtype=torch.float64),
        ),
        "three dimensions": _gaussians,
        "one direction never varies": dict(
            mean_a=torch.zeros(2, dtype=torch.float64), cov_a=torch.diag(torch.tensor([4.0, 0.0])).double(),
            mean_b=torch.ones(2, dtype=torch.float64), cov_b=torch.diag(torch.tensor([1.0, 0.25])).double(),
        ),
    },
    mistakes={
        "the cross term is taken off once; it belongs there twice.": _distance(_cross),
        "the distance between the means enters squared.": _distance(
            lambda a, b: 2 * _cross(a, b), lambda gap: gap.norm()
        ),
        "the root was taken of every element; a matrix root R of A has R @ R = A.": _distance(
            lambda a, b: 2 * (a.sqrt() @ b @ a.sqrt()).clamp(min=0).sqrt().trace()
        ),
        "tr(A^1/2 B^1/2) is the cross term only where A and B commute.": _distance(
            lambda a, b: 2 * (_root(a) @ _root(b)).trace()
        ),
        "the outer root is missing: A^1/2 B A^1/2 is still a product of two variances.": _distance(
            lambda a, b: 2 * (_root(a) @ b @ _root(a)).trace()
        ),
        "no square root at the end: the trace formula is the SQUARED distance, as FID and FAD report it.": _distance(
            lambda a, b: 2 * _cross(a, b), end=lambda distance: distance.clamp(min=0).sqrt()
        ),
        "the means are left out: two clouds of one shape then never differ, wherever they lie.": _distance(
            lambda a, b: 2 * _cross(a, b), lambda gap: 0.0
        ),
        "a mean over the coordinates of the gap between the means, where the sum belongs.": _distance(
            lambda a, b: 2 * _cross(a, b), lambda gap: gap.square().mean()
        ),
    },
)  # fmt: skip

# ---- moments after an exchange ---------------------------------------------------------------------------------------


def swapped(n, mean, covariance, old, new):
    """(mean, covariance) of n points after `new` took the place of `old`; covariance with denominator n - 1."""
    step = (new - old) / n
    came, went = new - mean, old - mean
    change = torch.outer(came, came) - torch.outer(went, went) - n * torch.outer(step, step)
    return mean + step, covariance + change / (n - 1)


def _exchange(change, step=lambda n, gap: gap / n, over=lambda n: n - 1):
    """A variant: change(n, came, went, step) of the sum of products, the mean's step, and the denominator."""

    def wrong(n, mean, covariance, old, new):
        moved = step(n, new - old)
        return mean + moved, covariance + change(n, new - mean, old - mean, moved) / over(n)

    return wrong


def _products(n, came, went, step):
    return torch.outer(came, came) - torch.outer(went, went) - n * torch.outer(step, step)


def _from_points(n, came, went, step):
    return torch.outer(came, came) - torch.outer(went, went)


def _points(g, n=7, d=3):
    points = 2 + torch.randn(n + 1, d, generator=g, dtype=torch.float64)
    return dict(n=n, mean=points[:n].mean(0), covariance=points[:n].T.cov(), old=points[2], new=points[n])


SWAPPED = Exercise(
    "17/swapped",
    points=4,
    reference=swapped,
    cases={
        # points 0, 2 -> 4, 2: mean 1 -> 3, variance 2 -> 2
        "two points on a line": dict(
            n=2, mean=torch.tensor([1.0]), covariance=torch.tensor([[2.0]]), old=torch.tensor([0.0]),
            new=torch.tensor([4.0]),
        ),
        "seven points in space": _points,
        "many points": lambda g: _points(g, 40, 2),
        "nothing changes": dict(
            n=3, mean=torch.tensor([1.0, 0.0]), covariance=torch.eye(2), old=torch.tensor([1.0, 2.0]),
            new=torch.tensor([1.0, 2.0]),
        ),
    },
    mistakes={
        "the mean moves, too: n step step^T comes off the sum of products about it.": _exchange(_from_points),
        "the covariance has n - 1 below, not n.": _exchange(_products, over=lambda n: n),
        "`new` comes in and `old` goes: the products have the wrong signs.": _exchange(
            lambda n, came, went, step: -_from_points(n, came, went, step) - n * torch.outer(step, step)
        ),
        "one point in n is exchanged: the mean moves by (new - old) / n.": _exchange(
            _products, step=lambda n, gap: gap / (n - 1)
        ),
        "the mean moves by the whole of new - old; only one point in n did.": _exchange(
            _products, step=lambda n, gap: gap
        ),
        "the product of the difference with itself; what counts is each point's offset from the mean.": _exchange(
            lambda n, came, went, step: torch.outer(came - went, came - went)
        ),
        "step step^T once; all n points have moved against the mean.": _exchange(
            lambda n, came, went, step: _from_points(n, came, went, step) - torch.outer(step, step)
        ),
        "n step step^T comes off; you have added it.": _exchange(
            lambda n, came, went, step: _from_points(n, came, went, step) + n * torch.outer(step, step)
        ),
    },
)  # fmt: skip

# ---- greedy swaps ----------------------------------------------------------------------------------------------------


def greedy_swaps(pairs, score, order):
    """Which of each pair is in D+, (n,), 0 or 1: all begin at 0; each pair in `order` is swapped if the set gains."""
    chosen, rows = torch.zeros(len(pairs), dtype=torch.long), torch.arange(len(pairs))
    best = score(pairs[rows, chosen])
    for i in order:
        chosen[i] = 1
        value = score(pairs[rows, chosen])
        if value > best:
            best = value
        else:
            chosen[i] = 0
    return chosen


def _greedy(keeps=lambda value, best: value > best, follow=True, restart=False, start=0, ordered=True):
    """A variant: keeps(value, best); follow: best is updated; restart: every swap is judged beside the first set."""

    def wrong(pairs, score, order):
        rows = torch.arange(len(pairs))
        chosen = torch.full((len(pairs),), start)
        kept, best = chosen.clone(), score(pairs[rows, chosen])
        for i in order if ordered else range(len(pairs)):
            tried = chosen.clone() if restart else kept.clone()
            tried[i] = 1 - tried[i]
            value = score(pairs[rows, tried])
            if keeps(value, best):
                kept[i] = tried[i]
                best = value if follow else best
        return kept

    return wrong


def _one_by_one(pairs, score, order):
    return (score(pairs[:, 1:].mean(1)) > score(pairs[:, :1].mean(1))).long().expand(len(pairs)).clone()


def _each_alone(pairs, score, order):
    return torch.stack([torch.as_tensor(score(pair[1:]) > score(pair[:1])) for pair in pairs]).long()


def in_the_middle(samples):
    """-|mean - (1, 0, ...)|^2: a crowd may be right whose members are all wrong."""
    return -((samples.mean(0) - torch.eye(samples.shape[1])[0].to(samples)) ** 2).sum()


def total(samples):
    return samples.sum()


def spread_out(samples):
    return samples.var(0, correction=0).sum()


def half_positive(samples):
    return -((samples[:, 0] > 0).double().mean() - 0.5).abs()


def _crowd(score):
    def case(g):
        pairs = 0.5 + torch.randn(8, 2, 2, generator=g, dtype=torch.float64)
        return dict(pairs=pairs, score=score, order=torch.randperm(8, generator=g).tolist())

    return case


GREEDY_SWAPS = Exercise(
    "17/greedy_swaps",
    points=5,
    reference=greedy_swaps,
    dtype=torch.long,
    draws=2,
    cases={
        "one pair": dict(pairs=torch.tensor([[[1.0], [3.0]]]), score=total, order=[0]),
        "a tie": dict(pairs=torch.tensor([[[1.0], [2.0]], [[3.0], [-3.0]]]), score=half_positive, order=[0, 1]),
        "the order matters": dict(
            pairs=torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [2.2, 0.0]]]), score=in_the_middle, order=[1, 0]
        ),
        "a sum": _crowd(total),
        "a mean that should be right": _crowd(in_the_middle),
        "a spread": _crowd(spread_out),
    },
    mistakes={
        "a swap that changes nothing was kept: ties stay as they came.": _greedy(lambda value, best: value >= best),
        "swaps that lower the score were kept: a reward is to rise.": _greedy(lambda value, best: value < best),
        "a swap was judged beside the first set; the next one starts from what has been kept.": _greedy(restart=True),
        "the best value is not updated: later swaps are judged beside the first score.": _greedy(follow=False),
        "the pairs were taken from first to last; the order is given.": _greedy(ordered=False),
        "all begin with the second of each pair inside; begin with the first.": _greedy(start=1),
        "each pair was judged on its own; the score is one of the whole set.": _each_alone,
        "that returns what stays outside, D-; asked for is which of each pair is in D+.": (
            lambda pairs, score, order: 1 - greedy_swaps(pairs, score, order)
        ),
        "all pairs were swapped together; each is decided in its turn.": _one_by_one,
    },
)

# ---- the contrast ----------------------------------------------------------------------------------------------------


def contrast(error_chosen, error_rejected, reference_chosen, reference_rejected, beta):
    """-log sigmoid(-beta/2 (s(x+) - s(x-))), mean over pairs; s is the error less the reference's, all (batch,)."""
    chosen = denoising_log_ratio(error_chosen, reference_chosen)
    rejected = denoising_log_ratio(error_rejected, reference_rejected)
    return dpo_loss(chosen, rejected, beta).mean().to(error_chosen.dtype)


def _sides(logit, reduce=lambda loss: loss.mean()):
    """A variant: -log sigmoid of logit(s+, s-, beta)."""

    def wrong(error_chosen, error_rejected, reference_chosen, reference_rejected, beta):
        gains = error_chosen - reference_chosen.detach(), error_rejected - reference_rejected.detach()
        return reduce(torch.nn.functional.softplus(-logit(*gains, beta)))

    return wrong


def _errors(g, dtype=torch.float64):
    names = ("error_chosen", "error_rejected", "reference_chosen", "reference_rejected")
    return {name: 3 * torch.rand(6, generator=g, dtype=dtype) for name in names} | {"beta": 1.6}


CONTRAST = Exercise(
    "17/contrast",
    points=4,
    reference=contrast,
    grad_wrt=("error_chosen", "error_rejected", "reference_chosen"),
    cases={
        "one pair": dict(
            error_chosen=torch.tensor([1.0]), error_rejected=torch.tensor([5.0]), reference_chosen=torch.tensor([3.0]),
            reference_rejected=torch.tensor([4.0]), beta=2.0,
        ),
        "float64": _errors,
        "float32": lambda g: _errors(g, torch.float32),
    },
    mistakes={
        "the model is pushed away from D+: an error that FALLS is a log-ratio that rises.": _sides(
            lambda chosen, rejected, beta: beta / 2 * (chosen - rejected)
        ),
        "the half is missing: a squared error is twice a negative log-density.": _sides(
            lambda chosen, rejected, beta: -beta * (chosen - rejected)
        ),
        "the two sides are added; it is their difference that D+ and D- are to open.": _sides(
            lambda chosen, rejected, beta: -beta / 2 * (chosen + rejected)
        ),
        "beta weighs the log-ratio, it does not divide it.": _sides(
            lambda chosen, rejected, beta: -(chosen - rejected) / (2 * beta)
        ),
        "the reference is missing: what the base cannot denoise either is no fault of the policy.": (
            lambda error_chosen, error_rejected, reference_chosen, reference_rejected, beta: (
                torch.nn.functional.softplus(beta / 2 * (error_chosen - error_rejected)).mean()
            )
        ),
        "a sum over the pairs, where their mean belongs.": _sides(
            lambda chosen, rejected, beta: -beta / 2 * (chosen - rejected), lambda loss: loss.sum()
        ),
        "a sigmoid without its logarithm: it saturates where the pair is most wrong.": (
            lambda error_chosen, error_rejected, reference_chosen, reference_rejected, beta: (
                -torch.sigmoid(
                    -beta / 2 * (error_chosen - reference_chosen.detach() - error_rejected + reference_rejected)
                ).mean()
            )
        ),
        "a gradient reaches the reference, which is to stay where it is.": (
            lambda error_chosen, error_rejected, reference_chosen, reference_rejected, beta: (
                torch.nn.functional.softplus(
                    beta / 2 * (error_chosen - reference_chosen - error_rejected + reference_rejected)
                ).mean()
            )
        ),
    },
)  # fmt: skip

exercises = [FRECHET, SWAPPED, GREEDY_SWAPS, CONTRAST, *QUESTIONS]
