"""Exercises of chapter 11: the window's schedule, what branches cost, whom to train on, and when branching pays."""

import torch

from minialign.course.chapters.questions_11 import QUESTIONS
from minialign.course.check import Exercise
from minialign.methods.b2diffurl import branch_advantage, progressive_window, select_extremes

# ---- the window ------------------------------------------------------------------------------------------------------


def _window_case(g):
    num_stages, first, more = (int(torch.randint(*ends, (), generator=g)) for ends in ((20, 120), (1, 7), (1, 13)))
    stage = int(torch.randint(num_stages, (), generator=g))
    return dict(stage=stage, num_stages=num_stages, first=first, last=first + more)


PROGRESSIVE_WINDOW = Exercise(
    "11/progressive_window",
    points=2,
    reference=progressive_window,
    cases={
        "the first stage, two lengths": dict(stage=0, num_stages=4, first=2, last=3),
        "the last stage, two lengths": dict(stage=3, num_stages=4, first=2, last=3),
        **{f"stage {k} of 100": dict(stage=k, num_stages=100, first=14, last=20) for k in (14, 15, 57, 58, 85, 86, 99)},
        **{f"stage {k} of 36": dict(stage=k, num_stages=36, first=4, last=10) for k in (0, 5, 6, 17, 18, 35)},
        "drawn": _window_case,
    },
    mistakes={
        "the last window never comes: there are last - first + 1 different lengths, both ends included.": (
            lambda stage, num_stages, first, last: first + stage * (last - first) // num_stages
        ),
        "rounded to the nearest: the last length then gets a whole part, the first half of one. Round down.": (
            lambda stage, num_stages, first, last: first + round(stage * (last - first) / (num_stages - 1))
        ),
        "the window shrinks. It starts at `first`, close to the picture, and grows towards the noise.": (
            lambda stage, num_stages, first, last: last - stage * (last - first + 1) // num_stages
        ),
        "counted from 0: at stage 0 the window is `first` steps long.": (
            lambda stage, num_stages, first, last: stage * (last - first + 1) // num_stages
        ),
        "one stage early: stages are numbered from 0.": (
            lambda stage, num_stages, first, last: first + (stage + 1) * (last - first + 1) // num_stages
        ),
    },
)

# ---- what it costs ---------------------------------------------------------------------------------------------------


def branch_cost(num_steps, window, num_branches):
    """Network evaluations of sampling one group: its prefix once, then the window once for every branch."""
    return (num_steps - window) + num_branches * window


BRANCH_COST = Exercise(
    "11/branch_cost",
    points=2,
    reference=branch_cost,
    cases={
        "the end of the chain": dict(num_steps=20, window=4, num_branches=5),
        "the whole chain": dict(num_steps=20, window=20, num_branches=5),
        "one branch": dict(num_steps=20, window=14, num_branches=1),
        "drawn": lambda g: dict(
            num_steps=30,
            window=int(torch.randint(1, 30, (), generator=g)),
            num_branches=int(torch.randint(2, 9, (), generator=g)),
        ),
    },
    mistakes={
        "that is the price of independent runs: each walks the prefix again. Branches share it.": (
            lambda num_steps, window, num_branches: num_branches * num_steps
        ),
        "the prefix is missing: it has to be walked once.": (
            lambda num_steps, window, num_branches: num_branches * window
        ),
        "window and prefix are swapped: the window is what the branches walk each on their own.": (
            lambda num_steps, window, num_branches: window + num_branches * (num_steps - window)
        ),
        "the window is walked by every branch, not once.": lambda num_steps, window, num_branches: (
            num_steps - window + num_branches
        ),
    },
)

# ---- whom to train on ------------------------------------------------------------------------------------------------


def _z(g, dtype=torch.float32):
    z = torch.randn(6, 4, generator=g, dtype=dtype)
    z[0] = z[0].abs() + 1  # all good: the worst is not bad
    z[1] = -z[1].abs() - 1
    z[2] = z[2] * 0.1  # nothing to learn
    z[3, :2] = 2.0  # a tie at the top
    z[3, 2:] = -2.0
    return dict(z=z, positive_threshold=0.5, negative_threshold=-0.5)


def _best(z):
    return torch.arange(z.shape[1]) == z.argmax(1, keepdim=True)


def _worst(z):
    return torch.arange(z.shape[1]) == z.argmin(1, keepdim=True)


SELECT_EXTREMES = Exercise(
    "11/select_extremes",
    points=5,
    reference=select_extremes,
    cases={
        "at the thresholds": dict(z=torch.tensor([[0.5, -0.5, 0.0]]), positive_threshold=0.5, negative_threshold=-0.5),
        "ties": dict(z=torch.tensor([[1.0, 1.0, -1.0, -1.0]]), positive_threshold=0.5, negative_threshold=-0.5),
        "groups of one": dict(z=torch.tensor([[0.3], [-0.3], [0.0]]), positive_threshold=0.0, negative_threshold=0.0),
        "float32": _z,
        "float64": lambda g: _z(g, torch.float64),
    },
    mistakes={
        "the best is kept AT its threshold (>=), the worst only BELOW its own (<). You took the first strictly.": (
            lambda z, positive_threshold, negative_threshold: (
                (_best(z) & (z > positive_threshold)) | (_worst(z) & (z < negative_threshold))
            )
        ),
        "the best is kept AT its threshold (>=), the worst only BELOW its own (<). You kept the second at it, too.": (
            lambda z, positive_threshold, negative_threshold: (
                (_best(z) & (z >= positive_threshold)) | (_worst(z) & (z <= negative_threshold))
            )
        ),
        "every branch past a threshold is kept; a group sends its single best and its single worst.": (
            lambda z, positive_threshold, negative_threshold: (z >= positive_threshold) | (z < negative_threshold)
        ),
        "no thresholds: groups in which all branches did much the same have nothing to teach.": (
            lambda z, positive_threshold, negative_threshold: _best(z) | _worst(z)
        ),
        "ties: two branches with the same z are both kept. Only the first goes (argmax and argmin find it).": (
            lambda z, positive_threshold, negative_threshold: (
                ((z == z.amax(1, keepdim=True)) & (z >= positive_threshold))
                | ((z == z.amin(1, keepdim=True)) & (z < negative_threshold))
            )
        ),
        "that is the best and the worst of the whole batch; each group sends its own.": (
            lambda z, positive_threshold, negative_threshold: (
                ((z == z.max()) & (z >= positive_threshold)) | ((z == z.min()) & (z < negative_threshold))
            )
        ),
    },
)

# ---- branches compared with each other -------------------------------------------------------------------------------

BRANCH_ADVANTAGE = Exercise(
    "11/branch_advantage",
    points=3,
    reference=branch_advantage,
    cases={
        "two branches": dict(z=torch.tensor([[1.0, 0.0]])),
        "two groups": dict(z=torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 6.0]])),
        "float32": lambda g: dict(z=torch.randn(5, 4, generator=g) + torch.arange(5.0).unsqueeze(1)),
        "float64": lambda g: dict(z=torch.randn(2, 7, generator=g, dtype=torch.float64)),
    },
    mistakes={
        "a sample is part of its own baseline: compare with the mean of the OTHERS, a factor b / (b - 1).": (
            lambda z: z - z.mean(1, keepdim=True)
        ),
        "the factor is upside down: leaving oneself out makes the difference larger.": (
            lambda z: (z - z.mean(1, keepdim=True)) * (z.shape[1] - 1) / z.shape[1]
        ),
        "that is the mean of the whole batch, and with it the luck of the prefix is back.": (
            lambda z: (z - z.mean()) * z.shape[1] / (z.shape[1] - 1)
        ),
        "the mean runs over the groups (axis 0), not over the branches of a group (axis 1).": (
            lambda z: (z - z.mean(0, keepdim=True)) * z.shape[1] / (z.shape[1] - 1)
        ),
        "divided by the group's std: nearly equal branches would then shout as loudly as very different ones.": (
            lambda z: (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
        ),
    },
)

# ---- when branching pays ---------------------------------------------------------------------------------------------


def baseline_variances(total, inside, q, num_branches):
    """(global, branch): variance of a sample's score-function estimate, times the number of samples."""
    return total + q, num_branches / (num_branches - 1) * (inside + q)


BASELINE_VARIANCES = Exercise(
    "11/baseline_variances",
    points=4,
    reference=baseline_variances,
    cases={
        "without q": dict(total=1.0, inside=0.25, q=0.0, num_branches=2),
        "the world's own numbers": dict(total=0.169096, inside=0.046011, q=0.02366, num_branches=5),
        "drawn": lambda g: dict(
            total=1.0 + float(torch.rand((), generator=g)),
            inside=float(torch.rand((), generator=g)),
            q=0.1 * float(torch.rand((), generator=g)) + 0.01,
            num_branches=int(torch.randint(3, 9, (), generator=g)),
        ),
    },
    mistakes={
        "the price of a baseline from few samples is missing: b / (b - 1), since the others' mean is noisy itself.": (
            lambda total, inside, q, num_branches: (total + q, inside + q)
        ),
        "what remains after branching is the variance INSIDE the window, not the prefix's.": (
            lambda total, inside, q, num_branches: (total + q, num_branches / (num_branches - 1) * (total - inside + q))
        ),
        "q is missing: the step's own noise multiplies its own share of the reward, under either baseline.": (
            lambda total, inside, q, num_branches: (total, num_branches / (num_branches - 1) * inside)
        ),
        "in the other order: (global, branch).": lambda total, inside, q, num_branches: (
            num_branches / (num_branches - 1) * (inside + q),
            total + q,
        ),
        "(b - 1) / b would make a baseline from few samples better than a perfect one.": (
            lambda total, inside, q, num_branches: (total + q, (num_branches - 1) / num_branches * (inside + q))
        ),
    },
)

exercises = [
    PROGRESSIVE_WINDOW,
    BRANCH_COST,
    SELECT_EXTREMES,
    BRANCH_ADVANTAGE,
    BASELINE_VARIANCES,
    *QUESTIONS,
]
