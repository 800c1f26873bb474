"""Exercises of chapter 12: the action of a consistency sampler, what its last call learns, REBEL, the break-even."""

import torch

from minialign.course.check import Exercise, Quiz
from minialign.kernels import gaussian_log_prob
from minialign.methods.rlcm import rebel_loss

# ---- the action ------------------------------------------------------------------------------------------------------


def renoise_log_prob(denoised, next, alpha_bar_next):
    """log N(next; sqrt(a') denoised, (1 - a') I), (batch,), mean over elements; a' is the NEXT level's alpha_bar."""
    signal = alpha_bar_next.sqrt().reshape(-1, *[1] * (denoised.ndim - 1))
    return gaussian_log_prob(next, signal * denoised, (1 - alpha_bar_next).sqrt(), "mean")


def _log_prob(denoised, next, scale, std):
    scale, std = (x.reshape(-1, *[1] * (denoised.ndim - 1)) for x in (scale, std))
    return torch.distributions.Normal(scale * denoised, std.expand_as(denoised)).log_prob(next).flatten(1)


def _action(g, shape=(4, 3), dtype=torch.float32):
    denoised = torch.randn(shape, generator=g, dtype=dtype)
    alpha_bar_next = torch.rand(shape[0], generator=g, dtype=dtype) * 0.9 + 0.05
    next = denoised + torch.randn(shape, generator=g, dtype=dtype)
    return dict(denoised=denoised, next=next, alpha_bar_next=alpha_bar_next)


RENOISE_LOG_PROB = Exercise(
    "12/renoise_log_prob",
    points=4,
    reference=renoise_log_prob,
    grad_wrt=("denoised",),
    cases=[
        dict(denoised=torch.tensor([[2.0]]), next=torch.tensor([[1.0]]), alpha_bar_next=torch.tensor([0.25])),
        _action,
        lambda g: _action(g, (3, 2, 4, 5), torch.float64),
    ],
    mistakes={
        "the mean is sqrt(a') times the denoised guess: a' itself is the share of the variance.": (
            lambda denoised, next, alpha_bar_next: _log_prob(
                denoised, next, alpha_bar_next, (1 - alpha_bar_next).sqrt()
            ).mean(1)
        ),
        "the density is centred on the denoised guess itself; the next level keeps only sqrt(a') of it.": (
            lambda denoised, next, alpha_bar_next: _log_prob(
                denoised, next, torch.ones_like(alpha_bar_next), (1 - alpha_bar_next).sqrt()
            ).mean(1)
        ),
        "1 - a' is the variance: the standard deviation is its root.": (
            lambda denoised, next, alpha_bar_next: _log_prob(
                denoised, next, alpha_bar_next.sqrt(), 1 - alpha_bar_next
            ).mean(1)
        ),
        "summed over the elements; the clip range of a large latent wants the mean.": (
            lambda denoised, next, alpha_bar_next: _log_prob(
                denoised, next, alpha_bar_next.sqrt(), (1 - alpha_bar_next).sqrt()
            ).sum(1)
        ),
        "that is one number for the batch; each sample has an action of its own.": (
            lambda denoised, next, alpha_bar_next: _log_prob(
                denoised, next, alpha_bar_next.sqrt(), (1 - alpha_bar_next).sqrt()
            ).mean()
        ),
    },
)

# ---- what the policy gradient reaches --------------------------------------------------------------------------------


def reached_gradient(carried):
    """sum_{j=0}^{H-2} prod_{i=j+1}^{H-1} c_i: the part of d E[y] / d theta that the H - 1 actions account for.

    carried (H,): c_i = d f_i / d (what went into call i as signal). The whole derivative is 1 more: the last call's.
    """
    later = carried.flip(0).cumprod(0).flip(0)  # prod_{i >= j} c_i
    return later[1:].sum()


def _carried(g):
    return dict(
        carried=torch.rand(int(torch.randint(3, 8, (), generator=g)), generator=g, dtype=torch.float64) * 0.8 + 0.1
    )


REACHED_GRADIENT = Exercise(
    "12/reached_gradient",
    points=5,
    reference=reached_gradient,
    cases=[
        dict(carried=torch.tensor([0.25, 0.5])),
        dict(carried=torch.tensor([0.5, 0.25, 0.5])),
        dict(carried=torch.tensor([0.034192, 0.116556, 0.296102, 0.570728], dtype=torch.float64)),
        _carried,
    ],
    mistakes={
        "that is the whole derivative: the 1 belongs to the last call, behind which there is no noise.": (
            lambda carried: 1 + reached_gradient(carried)
        ),
        "an action's push is carried by ALL calls behind it: a product, not the next factor alone.": (
            lambda carried: carried[1:].sum()
        ),
        "the first action comes AFTER the first call, so c_0 carries none of them.": (
            lambda carried: carried.flip(0).cumprod(0).sum()
        ),
        "the products run the wrong way: from each action to the end, not from the start to it.": (
            lambda carried: carried[:-1].cumprod(0).sum()
        ),
        "only the first action was counted; there are H - 1 of them.": lambda carried: carried[1:].prod(),
    },
)

# ---- REBEL -----------------------------------------------------------------------------------------------------------


def rebel(log_ratio, advantages, eta):
    """mean over pairs of (eta (sum_j log rho_1j - sum_j log rho_2j) - (A_1 - A_2))^2; log_ratio (2, pairs, steps)."""
    return rebel_loss(log_ratio.sum(2), advantages, eta)


def _pairs(g):
    log_ratio = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    return dict(log_ratio=log_ratio, advantages=torch.randn(2, 5, generator=g, dtype=torch.float64), eta=1.5)


REBEL = Exercise(
    "12/rebel",
    points=4,
    reference=rebel,
    grad_wrt=("log_ratio",),
    cases=[
        dict(log_ratio=torch.tensor([[[0.1, 0.2]], [[0.0, 0.1]]]), advantages=torch.tensor([[1.0], [0.5]]), eta=2.0),
        _pairs,
    ],
    mistakes={
        "summed over the pairs as well, so that samples mix: the sum runs over a sample's own steps.": (
            lambda log_ratio, advantages, eta: (
                (eta * (log_ratio[0].sum() - log_ratio[1].sum()) - (advantages[0] - advantages[1])).square().mean()
            )
        ),
        "a trajectory's log-ratio is the sum over its steps, not their mean.": (
            lambda log_ratio, advantages, eta: (
                (eta * (log_ratio.mean(2)[0] - log_ratio.mean(2)[1]) - (advantages[0] - advantages[1])).square().mean()
            )
        ),
        "eta belongs to the log-ratios: advantages have a unit of their own.": (
            lambda log_ratio, advantages, eta: (
                (log_ratio.sum(2)[0] - log_ratio.sum(2)[1] - eta * (advantages[0] - advantages[1])).square().mean()
            )
        ),
        "the two differences have opposite signs: the better sample should become MORE likely.": (
            lambda log_ratio, advantages, eta: (
                (eta * (log_ratio.sum(2)[0] - log_ratio.sum(2)[1]) + (advantages[0] - advantages[1])).square().mean()
            )
        ),
        "not squared: this difference can fall for ever.": lambda log_ratio, advantages, eta: (
            eta * (log_ratio.sum(2)[0] - log_ratio.sum(2)[1]) - (advantages[0] - advantages[1])
        ).mean(),
    },
)

# ---- when distillation has paid --------------------------------------------------------------------------------------


def break_even(distillation, steps, calls, queries, queries_rlcm):
    """How many trainings it takes until distillation has paid: evaluations spent once over evaluations saved each time.

    A query costs DDPO 4 S evaluations (S to sample, 3 S to train), RLCM H + 3 (H - 1).
    """
    saved = queries * 4 * steps - queries_rlcm * (calls + 3 * (calls - 1))
    return distillation / saved if saved > 0 else float("inf")


BREAK_EVEN = Exercise(
    "12/break_even",
    points=3,
    reference=break_even,
    cases=[
        dict(distillation=5_000_000, steps=50, calls=4, queries=1877, queries_rlcm=3925),
        dict(distillation=100.0, steps=2, calls=2, queries=10, queries_rlcm=1000),  # never
        lambda g: dict(
            distillation=1e6 * float(torch.rand((), generator=g)) + 1e5,
            steps=int(torch.randint(20, 60, (), generator=g)),
            calls=int(torch.randint(2, 6, (), generator=g)),
            queries=int(torch.randint(1000, 2000, (), generator=g)),
            queries_rlcm=int(torch.randint(1000, 2000, (), generator=g)),
        ),
    ],
    mistakes={
        "training was forgotten: a differentiated row costs three evaluations beside its sampling.": (
            lambda distillation, steps, calls, queries, queries_rlcm: (
                distillation / (queries * steps - queries_rlcm * calls)
                if queries * steps > queries_rlcm * calls
                else float("inf")
            )
        ),
        "the last call is not trained: H calls to sample, but H - 1 transitions.": (
            lambda distillation, steps, calls, queries, queries_rlcm: (
                distillation / (4 * queries * steps - 4 * queries_rlcm * calls)
                if queries * steps > queries_rlcm * calls
                else float("inf")
            )
        ),
        "both were given DDPO's number of queries; RLCM has its own.": (
            lambda distillation, steps, calls, queries, queries_rlcm: break_even(
                distillation, steps, calls, queries, queries
            )
        ),
        "where RLCM saves nothing, it never pays: float('inf'), not a negative number of trainings.": (
            lambda distillation, steps, calls, queries, queries_rlcm: (
                distillation / (queries * 4 * steps - queries_rlcm * (calls + 3 * (calls - 1)))
            )
        ),
    },
)

# ---- questions -------------------------------------------------------------------------------------------------------

QUESTIONS = [
    Quiz(
        "12/q1",
        points=1,
        answer="b",
        why={
            "a": "The call is differentiable like the others. What would be the action whose likelihood it changes?",
            "b": "Yes: no noise follows it, so it takes no random decision that could be called good or bad.",
            "c": "Its weights are the same network's. They are trained, only not by anything that happens there.",
        },
    ),
    Quiz(
        "12/q2",
        points=1,
        answer="c",
        why={
            "a": "The reward is paid before that noise is added, so the term says nothing about it.",
            "b": "Its mean is zero, so it cannot move the optimum. What else can a random term of mean zero do?",
            "c": "Yes: mean zero, variance not. It makes every estimate noisier and teaches nothing.",
        },
    ),
    Quiz(
        "12/q3",
        points=1,
        answer="a",
        why={
            "a": "Yes: a fifth of the evaluations and twice the queries, in one and the same table.",
            "b": "Measured here: more queries, not fewer. The paper's claim may rest on how good its LCM was at first.",
            "c": "Per network evaluation it is far ahead. Read the other axis.",
        },
    ),
    Quiz(
        "12/q4",
        points=1,
        answer="b",
        why={
            "a": "More calls do add actions. But the last one is still deterministic.",
            "b": "Yes: noise behind the last call makes it an action, at the price of a noisier gradient.",
            "c": "Then there is no action left at all, and the package refuses.",
        },
    ),
    Quiz(
        "12/q5",
        points=1,
        answer="c",
        why={
            "a": "The network can be called at any level. Was it trained to agree with itself there?",
            "b": "Fewer calls are faster, whatever the training was.",
            "c": "Yes: reinforcement learning changed f at the levels that it visited, and self-consistency was not "
            "part of the reward.",
        },
    ),
]

exercises = [RENOISE_LOG_PROB, REACHED_GRADIENT, REBEL, BREAK_EVEN, *QUESTIONS]
