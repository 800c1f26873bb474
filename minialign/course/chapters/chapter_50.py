"""Exercises of chapter 50: Bradley-Terry, the best of n without bias, token rewards, GAE, and the law."""

import math

import torch
from torch.nn.functional import logsigmoid

from minialign import kernels, measure
from minialign.course.chapters.questions_50 import QUESTIONS
from minialign.course.check import Exercise
from minialign.methods import reward_model

# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), mean over pairs: (n,), (n,) -> scalar. The package's own."""
    return reward_model.bradley_terry_loss(chosen, rejected)


def _pairs(g, dtype=torch.float32):
    return dict(
        chosen=2 * torch.randn(7, generator=g, dtype=dtype) + 0.5, rejected=2 * torch.randn(7, generator=g, dtype=dtype)
    )


BRADLEY_TERRY = Exercise(
    "50/bradley_terry_loss",
    points=3,
    reference=bradley_terry_loss,
    cases={
        "equal scores": dict(chosen=torch.tensor([1.0]), rejected=torch.tensor([1.0])),  # log 2
        "a margin of 180": dict(
            chosen=torch.tensor([90.0, -90.0]), rejected=torch.tensor([-90.0, 90.0])
        ),  # 0 and 180: no infinity
        "float32": _pairs,
        "float64": lambda g: _pairs(g, torch.float64),
    },
    mistakes={
        "the pair is turned round: the chosen one should score higher.": lambda chosen, rejected: bradley_terry_loss(
            rejected, chosen
        ),
        "a loss is minus the log-likelihood: the sign is missing.": lambda chosen, rejected: (
            -bradley_terry_loss(chosen, rejected)
        ),
        "the mean over pairs is meant, not the sum.": lambda chosen, rejected: (
            bradley_terry_loss(chosen, rejected) * len(chosen)
        ),
        "that is the probability of the wrong label; its log-likelihood is meant.": lambda chosen, rejected: (
            (rejected - chosen).sigmoid().mean()
        ),
        "the mean comes last: the log of the mean probability is another number.": lambda chosen, rejected: (
            -(chosen - rejected).sigmoid().mean().log()
        ),
        "each score alone is pushed up or down; only their difference is known.": lambda chosen, rejected: (
            -(logsigmoid(chosen) + logsigmoid(-rejected)).mean()
        ),
    },
    grad_wrt=("chosen", "rejected"),
)

# ---- best of n -------------------------------------------------------------------------------------------------------


def best_of_n(proxy, gold, n):
    """Mean gold of the best of n by proxy, over all subsets of the pool (N,). The package's own."""
    return measure.best_of_n_estimate(proxy, gold, n)


def _weights(size, n):
    i = torch.arange(1, size + 1, dtype=torch.float64)
    choose = torch.tensor([math.comb(int(k) - 1, n - 1) for k in i], dtype=torch.float64)
    return choose / math.comb(size, n)


def _pool(g, size=7, n=3):
    """Gold goes with the proxy, but not too closely, so that the two orders differ."""
    proxy = torch.randn(size, generator=g, dtype=torch.float64)
    return dict(proxy=proxy, gold=proxy + torch.randn(size, generator=g, dtype=torch.float64), n=n)


def _replaced(proxy, gold, n):
    size = len(proxy)
    share = torch.arange(size + 1, dtype=torch.float64) / size
    return (share**n).diff() @ gold.double()[proxy.argsort()]


def _next_n(proxy, gold, n):
    return best_of_n(proxy, gold, n - 1 if n == len(proxy) else n + 1)


BEST_OF_N = Exercise(
    "50/best_of_n",
    points=4,
    reference=best_of_n,
    cases={
        # the sheet's weights for N = 5, n = 2: (0, .1, .2, .3, .4)
        "the best of two of five": dict(
            proxy=torch.tensor([0.0, 1, 2, 3, 4]).double(), gold=torch.tensor([5.0, -1, 4, 2, 0]).double(), n=2
        ),
        "n = N": dict(
            proxy=torch.tensor([2.0, 0, 1]).double(), gold=torch.tensor([1.0, 4, 9]).double(), n=3
        ),  # the top sample
        "the best of 3": _pool,
        "the best of 5": lambda g: _pool(g, 11, 5),
        "the best of 4": lambda g: _pool(g, 6, 4),
    },
    mistakes={
        "the pool is sorted by gold, but the choice is made by proxy.": lambda proxy, gold, n: best_of_n(gold, gold, n),
        "that is the proxy of the best of n: its gold is meant.": lambda proxy, gold, n: best_of_n(proxy, proxy, n),
        "the order is turned round: this is the worst of n.": lambda proxy, gold, n: best_of_n(-proxy, gold, n),
        "n is off by one: of i samples at most this good, n - 1 join sample i.": _next_n,
        "that is the gold of the best of the whole pool.": lambda proxy, gold, n: gold[proxy.argmax()].double(),
        "draws with replacement: (i / N)^n - ((i - 1) / N)^n is biased; count subsets, C(i - 1, n - 1) / C(N, n).": (
            _replaced
        ),
        "the mean of the first n of the pool, chosen or not, is not the best of n.": lambda proxy, gold, n: (
            gold[:n].double().mean()
        ),
    },
    dtype=torch.float64,
)

# ---- what a token is paid --------------------------------------------------------------------------------------------


def token_rewards(scores, log_prob, log_prob_ref, mask, beta):
    """-beta (log pi - log pi_ref) on every token, and the score on the last: (b, t). The package's own."""
    return kernels.token_rewards(scores, log_prob, log_prob_ref, mask, beta)


def _tokens(g, lengths=(3, 5, 1), width=5):
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    ours, theirs = (-torch.rand(len(lengths), width, generator=g) * 3 for _ in range(2))
    scores = torch.randn(len(lengths), generator=g)
    return dict(scores=scores, log_prob=ours, log_prob_ref=theirs, mask=mask, beta=0.3)  # padding holds numbers, too


def _padded(case, *names):
    """Padding that holds what no sum survives."""
    rows, columns = (~case["mask"]).nonzero().unbind(1)
    for name, value in zip(names, (float("nan"), float("inf")), strict=False):
        case[name][rows, columns] = value
    return case


def _pay(place):
    """A variant: the score is paid where place(mask) is True."""

    def wrong(scores, log_prob, log_prob_ref, mask, beta):
        kl = torch.where(mask, log_prob - log_prob_ref, 0.0)
        return torch.where(place(mask), scores.unsqueeze(1), 0.0) - beta * kl

    return wrong


def _last_column(mask):
    return torch.arange(mask.shape[1]).expand(mask.shape) == mask.shape[1] - 1


TOKEN_REWARDS = Exercise(
    "50/token_rewards",
    points=3,
    reference=token_rewards,
    cases={
        "answers of several lengths": _tokens,
        "two answers": lambda g: _tokens(g, (2, 7), 7),
        "padding that holds nan or inf": lambda g: _padded(_tokens(g, (2, 5, 3)), "log_prob", "log_prob_ref"),
        "one answer, with padding": dict(
            scores=torch.tensor([1.0]),
            log_prob=torch.tensor([[-1.0, -2.0, 7.0]]),
            log_prob_ref=torch.tensor([[-1.5, -1.0, -7.0]]),
            mask=torch.tensor([[True, True, False]]),
            beta=0.1,
        ),
    },
    mistakes={
        "moving away from the reference is paid for, not rewarded: the sign of the KL term.": (
            lambda scores, log_prob, log_prob_ref, mask, beta: token_rewards(scores, log_prob_ref, log_prob, mask, beta)
        ),
        "the score is paid on every token; it comes once, on the last.": _pay(lambda mask: mask),
        "the score stands in the last column; a shorter response ends before it, at its own last True.": _pay(
            _last_column
        ),
        "the score is paid on the first token; the last one earns it.": _pay(
            lambda mask: torch.arange(mask.shape[1]).expand(mask.shape) == 0
        ),
        "padding is no token: what it holds must not be paid.": (
            lambda scores, log_prob, log_prob_ref, mask, beta: (
                token_rewards(scores, log_prob, log_prob_ref, mask, beta)
                - beta * torch.where(mask, 0.0, log_prob - log_prob_ref)
            )
        ),
        "beta multiplies the KL, not the score.": (
            lambda scores, log_prob, log_prob_ref, mask, beta: token_rewards(
                beta * scores, log_prob, log_prob_ref, mask, beta
            )
        ),
        "the KL term has no beta.": (
            lambda scores, log_prob, log_prob_ref, mask, beta: token_rewards(scores, log_prob, log_prob_ref, mask, 1.0)
        ),
    },
)

# ---- generalised advantage estimation --------------------------------------------------------------------------------


def gae(rewards, values, mask, gae_lambda):
    """Advantages (b, t), gamma = 1. The package's own."""
    return kernels.gae(rewards, values, mask, 1.0, gae_lambda)[0]


def _episodes(g, lengths=(5, 3, 1), width=5, gae_lambda=0.9):
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = (torch.randn(len(lengths), width, generator=g) for _ in range(2))
    return dict(rewards=torch.where(mask, rewards, 0.0), values=values, mask=mask, gae_lambda=gae_lambda)


def _plain_gae(rewards, values, mask, gae_lambda, bootstrap=False, carry=1.0, discount=1.0):
    ahead = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    if not bootstrap:
        ahead = ahead * torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    delta = torch.where(mask, rewards + discount * ahead - values, 0.0)
    out, last = torch.zeros_like(delta), torch.zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        last = delta[:, t] + carry * gae_lambda * last
        out[:, t] = last
    return torch.where(mask, out, 0.0)


def _forwards(rewards, values, mask, gae_lambda):
    ahead = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1) * torch.cat(
        [mask[:, 1:], torch.zeros_like(mask[:, :1])], 1
    )
    delta = torch.where(mask, rewards + ahead - values, 0.0)
    out, last = torch.zeros_like(delta), torch.zeros(len(delta))
    for t in range(delta.shape[1]):
        last = delta[:, t] + gae_lambda * last
        out[:, t] = last
    return torch.where(mask, out, 0.0)


GAE = Exercise(
    "50/gae",
    points=4,
    reference=gae,
    cases={
        # by hand: deltas .08, .11, .3
        "one answer without padding": dict(
            rewards=torch.tensor([[-0.02, 0.01, 1.0]]),
            values=torch.tensor([[0.5, 0.6, 0.7]]),
            mask=torch.ones(1, 3, dtype=torch.bool),
            gae_lambda=0.95,
        ),
        "answers of several lengths": _episodes,
        "padding that holds nan": lambda g: _padded(_episodes(g, (2, 5, 3)), "values"),
        "a smaller lambda": lambda g: _episodes(g, (4, 2, 3), 6, 0.5),
        "lambda = 1": lambda g: _episodes(g, (3, 1), 3, 1.0),
    },
    mistakes={
        "behind its last token an episode is over: V counts 0 there, whatever the critic says of padding.": (
            lambda rewards, values, mask, gae_lambda: _plain_gae(rewards, values, mask, gae_lambda, bootstrap=True)
        ),
        "those are the returns, A + V: the value is not taken off.": lambda rewards, values, mask, gae_lambda: (
            torch.where(mask, gae(rewards, values, mask, gae_lambda) + values, 0.0)
        ),
        "that is delta alone, lambda = 0: what comes later is missing.": lambda rewards, values, mask, gae_lambda: gae(
            rewards, values, mask, 0.0
        ),
        "lambda is missing: these are plain sums of the rewards to come, minus V.": (
            lambda rewards, values, mask, gae_lambda: gae(rewards, values, mask, 1.0 if gae_lambda < 1 else 0.5)
        ),
        "the recursion runs backwards in time: A_t needs A_{t+1}, not A_{t-1}.": _forwards,
        "the next value is missing in delta: r + V' - V.": lambda rewards, values, mask, gae_lambda: _plain_gae(
            rewards, values, mask, gae_lambda, discount=0.0
        ),
        "the sign of delta: r + V' - V, not V - r - V'.": lambda rewards, values, mask, gae_lambda: (
            -gae(rewards, values, mask, gae_lambda)
        ),
    },
)

# ---- the law ---------------------------------------------------------------------------------------------------------


def fit_law(distance, gold):
    """(alpha, beta) of R = d (alpha - beta d), least squares: (n,), (n,) -> two numbers. The package's own."""
    law = measure.overoptimisation_law(distance, gold)
    return torch.tensor([law.alpha, law.beta], dtype=torch.float64)


def _curve(g, size=9):
    d = torch.rand(size, generator=g, dtype=torch.float64) * 3 + 0.1
    return dict(distance=d, gold=d * (2 - 0.6 * d) + 0.1 * torch.randn(size, generator=g, dtype=torch.float64))


def _solve(inputs, gold):
    return torch.linalg.solve(inputs.T @ inputs, inputs.T @ gold.double())[:2]


FIT_LAW = Exercise(
    "50/fit_law",
    points=3,
    reference=fit_law,
    cases={
        "three points": dict(distance=torch.tensor([1.0, 2, 3]).double(), gold=torch.tensor([1.5, 2.0, 1.6]).double()),
        "nine points": _curve,
        "five points": lambda g: _curve(g, 5),
    },
    mistakes={
        "the sign of beta: R = d (alpha - beta d), so its column is -d^2.": lambda distance, gold: _solve(
            torch.stack([distance, distance**2], 1), gold
        ),
        "an intercept slipped in: at distance 0 nothing was gained, so R(0) = 0.": lambda distance, gold: _solve(
            torch.stack([distance, -(distance**2), torch.ones_like(distance)], 1), gold
        ),
        "that is the law of RL, with d log d; for the best of n it is d^2.": lambda distance, gold: _solve(
            torch.stack([distance, -distance * distance.log()], 1), gold
        ),
        "d is the square root of the KL already: do not take the root, or the square, once more.": (
            lambda distance, gold: _solve(torch.stack([distance**2, -(distance**4)], 1), gold)
        ),
        "R / d is a straight line, but fitting R / d weighs the points otherwise: fit R itself.": (
            lambda distance, gold: _solve(torch.stack([torch.ones_like(distance), -distance], 1), gold / distance)
        ),
        "alpha and beta have changed places.": lambda distance, gold: fit_law(distance, gold).flip(0),
    },
    dtype=torch.float64,
)

exercises = [
    BRADLEY_TERRY,
    BEST_OF_N,
    TOKEN_REWARDS,
    GAE,
    FIT_LAW,
    *QUESTIONS,
]
