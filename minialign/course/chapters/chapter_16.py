"""Exercises of chapter 16: the law of the best of K, RAFT's loss from a group of answers, and how to buy selection."""

import torch

from minialign.course.chapters.questions_16 import QUESTIONS
from minialign.course.check import Exercise

# ---- the law of the best of K ----------------------------------------------------------------------------------------


def _below_and_level(probs, rewards):
    """(P(r < r(y)), P(r = r(y))), (n,) each."""
    below = (rewards.unsqueeze(0) < rewards.unsqueeze(1)).to(probs) @ probs
    level = (rewards.unsqueeze(0) == rewards.unsqueeze(1)).to(probs) @ probs
    return below, level


def best_of_k_law(probs, rewards, k):
    """The law of the best of k draws from `probs` (n,), ties broken at random: p (F^k - F_below^k) / P(level)."""
    below, level = _below_and_level(probs, rewards)
    return probs / level * ((below + level) ** k - below**k)


def _ties_in_order(probs, rewards, k):
    order = rewards.argsort(stable=True)
    cumulative = probs[order].cumsum(0)
    law = cumulative**k - (cumulative - probs[order]) ** k
    return torch.empty_like(probs).scatter(0, order, law)


def _level_shared(share):
    """A variant: share(probs, level, members) of the mass that a level of reward gets."""

    def wrong(probs, rewards, k):
        below, level = _below_and_level(probs, rewards)
        members = (rewards.unsqueeze(0) == rewards.unsqueeze(1)).to(probs).sum(1)
        return share(probs, level, members) * ((below + level) ** k - below**k)

    return wrong


def _mass(gain):
    """A variant: gain(F_below, P(level), k), shared in proportion."""

    def wrong(probs, rewards, k):
        below, level = _below_and_level(probs, rewards)
        return probs / level * gain(below, level, k)

    return wrong


def _law_case(g, ties=False, dtype=torch.float64):
    rewards = torch.randn(7, generator=g, dtype=dtype)
    return dict(
        probs=torch.randn(7, generator=g, dtype=dtype).softmax(0),
        rewards=rewards.round() if ties else rewards,
        k=int(torch.randint(2, 6, (), generator=g)),
    )


BEST_OF_K_LAW = Exercise(
    "16/best_of_k_law",
    points=4,
    reference=best_of_k_law,
    cases={
        "three answers, two draws": dict(
            probs=torch.tensor([0.5, 0.3, 0.2]), rewards=torch.tensor([0.0, 1.0, 2.0]), k=2
        ),
        "one draw": dict(probs=torch.tensor([0.4, 0.6]), rewards=torch.tensor([3.0, -1.0]), k=1),
        "a tie": dict(probs=torch.tensor([0.4, 0.3, 0.2, 0.1]), rewards=torch.tensor([0.0, 1.0, 1.0, 3.0]), k=3),
        "rewards in no order": _law_case,
        "several ties": lambda g: _law_case(g, ties=True),
        "float32": lambda g: _law_case(g, True, torch.float32),
    },
    mistakes={
        "equal rewards were put into an order; a tie is broken at random, so they share their level's mass.": (
            _ties_in_order
        ),
        "every answer of a level gets the whole level's mass; the law then sums to more than 1.": _level_shared(
            lambda probs, level, members: torch.ones_like(probs)
        ),
        "the answers of a level share equally; a likelier one is drawn more often, so they share in proportion.": (
            _level_shared(lambda probs, level, members: 1 / members)
        ),
        "the difference of powers is the mass of the LEVEL: divide by the level's probability before sharing it.": (
            _level_shared(lambda probs, level, members: probs)
        ),
        "F^K is the probability that the best is AT MOST this good; subtract that it is worse.": _mass(
            lambda below, level, k: (below + level) ** k
        ),
        "the power was taken of the level's probability; it belongs to the cumulative ones, above and below.": _mass(
            lambda below, level, k: level**k
        ),
        "K F^(K-1) p is the density where no two rewards are equal and none has mass of its own.": _mass(
            lambda below, level, k: k * (below + level) ** (k - 1) * level
        ),
        "that is the worst of K: the cumulative probability runs from the lowest reward upwards.": _mass(
            lambda below, level, k: (1 - below) ** k - (1 - below - level) ** k
        ),
        "one power too few: all K draws are at most that good, the winner among them.": _mass(
            lambda below, level, k: (below + level) ** (k - 1) - below ** (k - 1)
        ),
    },
)

# ---- RAFT's loss -----------------------------------------------------------------------------------------------------


def raft_loss(log_prob, mask, rewards, tiebreak):
    """-log p a token of each prompt's best answer; log_prob, mask (b, K, t), rewards, tiebreak (b, K) -> a scalar.

    Of equal rewards the answer of the lowest tiebreak is kept.
    """
    tied = torch.where(rewards == rewards.amax(1, keepdim=True), tiebreak, torch.inf)
    return _likelihood(log_prob, mask, tied.argmin(1))


def _chosen(x, winner):
    return x[torch.arange(len(winner)), winner]


def _likelihood(log_prob, mask, winner):
    valid = _chosen(mask, winner)
    return -torch.where(valid, _chosen(log_prob, winner), 0.0).sum() / valid.sum()


def _winner(rewards, tiebreak):
    return torch.where(rewards == rewards.amax(1, keepdim=True), tiebreak, torch.inf).argmin(1)


def _other_winner(choose):
    """A variant: another answer of each prompt is kept."""
    return lambda log_prob, mask, rewards, tiebreak: _likelihood(log_prob, mask, choose(rewards, tiebreak))


def _other_mean(reduce):
    """A variant: reduce(log_prob (b, t), mask (b, t)) of the right winners."""

    def wrong(log_prob, mask, rewards, tiebreak):
        winner = _winner(rewards, tiebreak)
        valid = _chosen(mask, winner)
        return reduce(torch.where(valid, _chosen(log_prob, winner), 0.0), valid)

    return wrong


def _pushed_down(log_prob, mask, rewards, tiebreak):
    sign = torch.where(torch.arange(rewards.shape[1]) == _winner(rewards, tiebreak).unsqueeze(1), 1.0, -1.0)
    return -(torch.where(mask, log_prob, 0.0) * sign.unsqueeze(2).to(log_prob)).sum() / mask.sum()


def _weighted(log_prob, mask, rewards, tiebreak):
    winner = _winner(rewards, tiebreak)
    valid = _chosen(mask, winner)
    total = torch.where(valid, _chosen(log_prob, winner), 0.0).sum(1) * _chosen(rewards, winner)
    return -total.sum() / valid.sum()


def _everything(log_prob, mask, rewards, tiebreak):
    return -torch.where(mask, log_prob, 0.0).sum() / mask.sum()


def _behind_the_end(log_prob, mask, rewards, tiebreak):
    return -_chosen(log_prob, _winner(rewards, tiebreak)).mean()


def _over_all(log_prob, mask, rewards, tiebreak):
    kept = rewards >= rewards.flatten().sort(descending=True).values[len(rewards) - 1]
    valid = mask & kept.unsqueeze(2)
    return -torch.where(valid, log_prob, 0.0).sum() / valid.sum()


def _answers(g, b=5, k=4, t=3, dtype=torch.float32, ties=False):
    lengths = torch.randint(1, t + 1, (b, k, 1), generator=g)
    rewards = torch.randn(b, k, generator=g)
    return dict(
        log_prob=-torch.rand(b, k, t, generator=g, dtype=dtype),  # what stands behind the end means nothing
        mask=torch.arange(t) < lengths,
        rewards=rewards.round() if ties else rewards,
        tiebreak=torch.rand(b, k, generator=g),
    )


RAFT_LOSS = Exercise(
    "16/raft_loss",
    points=5,
    reference=raft_loss,
    grad_wrt=("log_prob",),
    cases={
        "one prompt": dict(
            log_prob=torch.tensor([[[-1.0, -2.0], [-3.0, -9.0]]]),
            mask=torch.tensor([[[True, True], [True, False]]]),
            rewards=torch.tensor([[0.5, 2.0]]),
            tiebreak=torch.tensor([[0.1, 0.2]]),
        ),
        "a tie": dict(
            log_prob=torch.tensor([[[-1.0], [-2.0], [-4.0]], [[-1.0], [-2.0], [-4.0]]]),
            mask=torch.ones(2, 3, 1, dtype=torch.bool),
            rewards=torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 3.0]]),
            tiebreak=torch.tensor([[0.7, 0.3, 0.1], [0.1, 0.2, 0.9]]),
        ),
        "several prompts": _answers,
        "several ties": lambda g: _answers(g, ties=True),
        "float64": lambda g: _answers(g, 3, 5, 7, torch.float64),
    },
    mistakes={
        "a tie goes to the answer that was drawn first; here it goes to the lowest tiebreak.": _other_winner(
            lambda rewards, tiebreak: rewards.argmax(1)
        ),
        "a tie goes to the HIGHEST tiebreak.": _other_winner(
            lambda rewards, tiebreak: torch.where(rewards == rewards.amax(1, keepdim=True), tiebreak, -1.0).argmax(1)
        ),
        "the tiebreak alone chose the winner.": _other_winner(lambda rewards, tiebreak: tiebreak.argmin(1)),
        "the worst answer is kept.": _other_winner(
            lambda rewards, tiebreak: torch.where(rewards == rewards.amin(1, keepdim=True), tiebreak, torch.inf).argmin(
                1
            )
        ),
        "the best b answers of the whole batch are kept; each prompt has a winner of its own.": _over_all,
        "all answers are trained on, so nothing is selected.": _everything,
        "the losers are pushed down; in RAFT they never enter the loss.": _pushed_down,
        "the reward weighs the loss; it only ranks, and its scale must not matter.": _weighted,
        "what stands behind the end of an answer was counted: use the mask.": _behind_the_end,
        "the sign: a loss is minimised, and the winners are to become likelier.": _other_mean(
            lambda log_prob, valid: log_prob.sum() / valid.sum()
        ),
        "averaged within each answer first: a token of a long answer then counts less than one of a short one.": (
            _other_mean(lambda log_prob, valid: -(log_prob.sum(1) / valid.sum(1)).mean())
        ),
        "a mean over answers of the sums over their tokens; the mean here is over all tokens that were kept.": (
            _other_mean(lambda log_prob, valid: -log_prob.sum(1).mean())
        ),
        "the sum over the winners' tokens; divide it by how many they are.": _other_mean(
            lambda log_prob, valid: -log_prob.sum()
        ),
        "divided by the number of places, padding included; count the tokens.": _other_mean(
            lambda log_prob, valid: -log_prob.mean()
        ),
    },
)

# ---- what selection costs --------------------------------------------------------------------------------------------


def fewest_queries(strength):
    """The least K T, samples a prompt over T rounds of best-of-K, K >= 2, with K^T >= strength."""
    best = strength
    for k in range(2, strength + 1):
        rounds = 1
        while k**rounds < strength:
            rounds += 1
        best = min(best, k * rounds)
    return best


def _search(cost, enough=lambda k, rounds, strength: k**rounds >= strength):
    """A variant: cost(K, T) of the first T that is enough, least over K."""

    def wrong(strength):
        found = []
        for k in range(2, strength + 1):
            rounds = 1
            while not enough(k, rounds, strength):
                rounds += 1
            found.append(cost(k, rounds))
        return min(found)

    return wrong


def _only(k):
    def wrong(strength):
        rounds = 1
        while k**rounds < strength:
            rounds += 1
        return k * rounds

    return wrong


FEWEST_QUERIES = Exercise(
    "16/fewest_queries",
    points=3,
    reference=fewest_queries,
    cases={
        "best of 2": dict(strength=2),
        "best of 5": dict(strength=5),
        "best of 9": dict(strength=9),
        "best of 81": dict(strength=81),
        "best of 125": dict(strength=125),
        "best of 300": dict(strength=300),
        "best of 1024": dict(strength=1024),
        "drawn": lambda g: dict(strength=int(torch.randint(6, 2000, (), generator=g))),
    },
    mistakes={
        "that is what one round of best-of-strength asks; T rounds of K samples reach K^T, and ask K T.": (
            lambda strength: strength
        ),
        "K + T; each of the T rounds asks K samples.": _search(lambda k, rounds: k + rounds),
        "K = 2 only; for some strengths a larger K wastes less.": _only(2),
        "K = 3 only, the whole number nearest to e; it may overshoot where another K does not.": _only(3),
        "that is the number of rounds.": _search(lambda k, rounds: rounds),
        "a strength that is met exactly is enough.": _search(
            lambda k, rounds: k * rounds, lambda k, rounds, strength: k**rounds > strength
        ),
    },
)

exercises = [BEST_OF_K_LAW, RAFT_LOSS, FEWEST_QUERIES, *QUESTIONS]
