"""Exercises of chapter 00: a reward, a standard error, and the best of n."""

import torch

from minialign.course.chapters.questions_00 import QUESTIONS
from minialign.course.check import Exercise

# ---- a reward of one's own -------------------------------------------------------------------------------------------


def redness(images, prompts):
    """How red each picture is, (batch,): the red channel minus the mean of the other two, averaged over its pixels."""
    red, green, blue = images.unbind(1)
    return (red - (green + blue) / 2).mean((-2, -1))


def _pictures(g, dtype=torch.float32):
    return dict(images=torch.rand(5, 3, 7, 2, generator=g, dtype=dtype), prompts=["a red circle"] * 5)


_RED_THEN_PAPER = torch.stack([torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.75, 0.75, 0.5])]).reshape(2, 3, 1, 1)

REDNESS = Exercise(
    "00/redness",
    points=2,
    reference=redness,
    cases={
        "a red and a paper-white pixel": dict(images=_RED_THEN_PAPER, prompts=["a red circle", "a blue square"]),
        "one picture": dict(images=_RED_THEN_PAPER[:1].expand(1, 3, 3, 2), prompts=["a red circle"]),
        "several pictures": _pictures,
        "float64": lambda g: _pictures(g, torch.float64),
    },
    mistakes={
        "one number for the whole batch: then no picture is better than another, and nothing can be learned.": (
            lambda images, prompts: redness(images, prompts).mean()
        ),
        "shape (batch, 1), as from keepdim=True; a reward is a plain list of numbers, (batch,).": (
            lambda images, prompts: redness(images, prompts).unsqueeze(-1)
        ),
        "the red channel alone calls white paper very red: white is red, green and blue in equal parts.": (
            lambda images, prompts: images[:, 0].mean((1, 2))
        ),
        "the other two channels are averaged, not added: a grey picture has redness 0.": (
            lambda images, prompts: (images[:, 0] - images[:, 1] - images[:, 2]).mean((1, 2))
        ),
        "summed over the pixels, not averaged: a larger picture would count as redder.": (
            lambda images, prompts: (images[:, 0] - (images[:, 1] + images[:, 2]) / 2).sum((1, 2))
        ),
        "the channels are in the order red, green, blue; you took the last one for red.": (
            lambda images, prompts: redness(images.flip(1), prompts)
        ),
        "the sign: red counts for the picture, green and blue against it.": (
            lambda images, prompts: -redness(images, prompts)
        ),
    },
)

# ---- how sure one is of a mean ---------------------------------------------------------------------------------------


def standard_error(values):
    """Standard error of the mean of independent values (n,), a scalar: their std (n - 1) over the root of n."""
    return values.std() / len(values) ** 0.5


STANDARD_ERROR = Exercise(
    "00/standard_error",
    points=2,
    reference=standard_error,
    cases={
        "two values": dict(values=torch.tensor([1.0, 0.0])),
        "values of 0 and 1": dict(values=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])),
        "equal values": dict(values=torch.full((5,), 0.5)),
        "float32": lambda g: dict(values=3 + 2 * torch.randn(11, generator=g)),
        "float64": lambda g: dict(values=torch.randn(7, generator=g, dtype=torch.float64)),
    },
    mistakes={
        "this is the spread of single values; that of their mean shrinks as n grows.": lambda values: values.std(),
        "divided by n; errors partly cancel, and the mean's shrinks with the root of n only.": lambda values: (
            values.std() / len(values)
        ),
        "this is the variance of the mean; its unit is that of the values, squared.": lambda values: (
            values.var() / len(values)
        ),
        "the std over n underestimates the spread; use the one over n - 1, torch's default.": lambda values: (
            values.std(correction=0) / len(values) ** 0.5
        ),
        "divided by the root of n - 1; the n - 1 is inside the std already.": lambda values: (
            values.std() / (len(values) - 1) ** 0.5
        ),
        "sqrt(p (1 - p) / n) holds for values that are 0 or 1, and only nearly: take the std of the values.": (
            lambda values: (values.mean() * (1 - values.mean())).clamp(min=0).sqrt() / len(values) ** 0.5
        ),
    },
)

# ---- the best of n ---------------------------------------------------------------------------------------------------


def best_of_n(samples, scores, n):
    """Of every n consecutive samples (g * n, *dims) the one with the highest of scores (g * n,) -> (g, *dims)."""
    best = scores.view(-1, n).argmax(1)
    return samples[best + torch.arange(len(best)) * n]


def _numbered(count, dims=(3, 2)):
    """Samples that can be told apart: number i is filled with i."""
    return torch.arange(float(count)).view(-1, *(1 for _ in dims)).expand(count, *dims).clone()


def _shuffled(groups, n, dims):
    def case(g):
        return dict(
            samples=torch.randn(groups * n, *dims, generator=g), scores=torch.rand(groups * n, generator=g), n=n
        )

    return case


def _by(scores_of):
    """The right selection, by other scores."""
    return lambda samples, scores, n: best_of_n(samples, scores_of(scores), n)


BEST_OF_N = Exercise(
    "00/best_of_n",
    points=3,
    reference=best_of_n,
    cases={
        "one group": dict(samples=_numbered(2, (1,)), scores=torch.tensor([0.25, 0.75]), n=2),
        "two groups": dict(samples=_numbered(6), scores=torch.tensor([0.5, 0.25, 1.0, 0.0, 0.75, 0.125]), n=3),
        "three groups": dict(samples=_numbered(6), scores=torch.tensor([0.9, 0.8, 0.1, 0.2, 0.7, 0.6]), n=2),
        "groups of one": dict(samples=_numbered(3), scores=torch.tensor([0.5, 0.25, 1.0]), n=1),
        "many axes": _shuffled(5, 3, (3, 2, 2)),
        "larger groups": _shuffled(2, 7, (2,)),
    },
    mistakes={
        "argmax counts within its group, from 0 to n - 1; the third group starts at sample 2 n.": (
            lambda samples, scores, n: samples[scores.view(-1, n).argmax(1)]
        ),
        "these are the worst of each group: argmin for argmax.": _by(lambda scores: -scores),
        "the best of the whole batch; each group should send one.": lambda samples, scores, n: samples[
            scores.topk(len(scores) // n).indices
        ],
        "a group is n consecutive samples; .view(n, -1) puts every g-th sample into one.": (
            lambda samples, scores, n: samples[
                scores.view(n, -1).argmax(0) * (len(scores) // n) + torch.arange(len(scores) // n)
            ]
        ),
        "the first of each group, whatever its score.": _by(lambda scores: torch.zeros_like(scores)),
        "these are the highest scores; the samples that have them are wanted.": lambda samples, scores, n: (
            scores.view(-1, n).max(1).values
        ),
    },
)

exercises = [REDNESS, STANDARD_ERROR, BEST_OF_N, *QUESTIONS]
