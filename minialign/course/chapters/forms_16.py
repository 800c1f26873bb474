"""Chapter 16: right solutions as students write them."""

import math

import torch


def law_by_comparing(probs, rewards, k):
    below = (rewards.unsqueeze(0) < rewards.unsqueeze(1)).to(probs) @ probs
    level = (rewards.unsqueeze(0) == rewards.unsqueeze(1)).to(probs) @ probs
    return probs / level * ((below + level) ** k - below**k)


def law_by_loops(probs, rewards, k):
    law = torch.zeros_like(probs)
    for i in range(len(probs)):
        worse = probs[rewards < rewards[i]].sum()
        equal = probs[rewards == rewards[i]].sum()
        law[i] = probs[i] / equal * ((worse + equal) ** k - worse**k)
    return law


def law_by_levels(probs, rewards, k):
    law = torch.zeros_like(probs)
    for value in rewards.unique():
        here = rewards == value
        at_most, below = probs[rewards <= value].sum(), probs[rewards < value].sum()
        law[here] = probs[here] / probs[here].sum() * (at_most**k - below**k)
    return law


def law_by_sorting(probs, rewards, k):
    values, level = rewards.unique(return_inverse=True)
    mass = torch.zeros(len(values), dtype=probs.dtype).index_add(0, level, probs)
    cumulative = mass.cumsum(0)
    gained = cumulative**k - (cumulative - mass) ** k
    return probs * (gained / mass)[level]


def loss_by_argmin(log_prob, mask, rewards, tiebreak):
    best = rewards.amax(1, keepdim=True)
    winner = torch.where(rewards == best, tiebreak, math.inf).argmin(1)
    rows = torch.arange(len(rewards))
    chosen, valid = log_prob[rows, winner], mask[rows, winner]
    return -(chosen * valid).sum() / valid.sum()


def loss_by_sorting(log_prob, mask, rewards, tiebreak):
    order = tiebreak.argsort(1)
    first = rewards.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, 0]
    winner = order[torch.arange(len(order)), first]
    rows = torch.arange(len(rewards))
    return -log_prob[rows, winner][mask[rows, winner]].mean()


def loss_by_mask(log_prob, mask, rewards, tiebreak):
    tied = rewards == rewards.max(1, keepdim=True).values
    lowest = torch.where(tied, tiebreak, math.inf)
    kept = lowest == lowest.min(1, keepdim=True).values
    taken = mask & kept.unsqueeze(-1)
    return -(log_prob * taken).sum() / taken.sum()


def loss_by_loops(log_prob, mask, rewards, tiebreak):
    total, count = 0.0, 0
    for i in range(len(rewards)):
        best = 0
        for k in range(1, rewards.shape[1]):
            better = rewards[i, k] > rewards[i, best]
            if better or (rewards[i, k] == rewards[i, best] and tiebreak[i, k] < tiebreak[i, best]):
                best = k
        total = total - log_prob[i, best][mask[i, best]].sum()
        count = count + mask[i, best].sum()
    return total / count


def queries_by_search(strength):
    best = strength
    for k in range(2, strength + 1):
        rounds, reached = 1, k
        while reached < strength:
            rounds, reached = rounds + 1, reached * k
        best = min(best, k * rounds)
    return best


def queries_by_rounds(strength):
    costs = []
    for rounds in range(1, 12):
        k = 2
        while k**rounds < strength:
            k += 1
        costs.append(k * rounds)
    return min(costs)


FORMS = {
    "16/best_of_k_law": [law_by_comparing, law_by_loops, law_by_levels, law_by_sorting],
    "16/raft_loss": [loss_by_argmin, loss_by_sorting, loss_by_mask, loss_by_loops],
    "16/fewest_queries": [queries_by_search, queries_by_rounds],
}
