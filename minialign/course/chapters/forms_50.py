"""Chapter 50: right solutions as students write them."""

import itertools
import math

import torch
from torch.nn import functional as F


def bradley_by_logsigmoid(chosen, rejected):
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean()


def bradley_by_softplus(chosen, rejected):
    return F.softplus(-(chosen - rejected)).mean()


def bradley_by_sum(chosen, rejected):
    total = torch.stack([chosen, rejected], 1).log_softmax(1)[:, 0].sum()
    return -total / len(chosen)


def best_by_weights(proxy, gold, n):
    size = len(proxy)
    weights = [math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)]
    return torch.tensor(weights, dtype=torch.float64) @ gold.double()[proxy.argsort()]


def best_by_loop(proxy, gold, n):
    ordered = gold.double()[proxy.argsort()]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(proxy)):
        total = total + math.comb(i, n - 1) * ordered[i]
    return total / math.comb(len(proxy), n)


def best_by_subsets(proxy, gold, n):
    best = []
    for subset in itertools.combinations(range(len(proxy)), n):
        chosen = torch.tensor(subset)
        best.append(gold[chosen][proxy[chosen].argmax()])
    return torch.stack(best).double().mean()


def fit_by_lstsq(distance, gold):
    inputs = torch.stack([distance, -(distance**2)], 1)
    return torch.linalg.lstsq(inputs, gold.unsqueeze(1)).solution[:, 0]


def fit_by_normal_equations(distance, gold):
    inputs = torch.stack([distance, -(distance**2)], 1)
    return torch.linalg.solve(inputs.T @ inputs, inputs.T @ gold)


def fit_by_sums(distance, gold):
    d2, d3, d4 = (distance**2).sum(), (distance**3).sum(), (distance**4).sum()
    r1, r2 = (distance * gold).sum(), (distance**2 * gold).sum()
    determinant = d2 * d4 - d3**2
    return torch.stack([(d4 * r1 - d3 * r2) / determinant, (d3 * r1 - d2 * r2) / determinant])


def tokens_by_shift(scores, log_prob, log_prob_ref, mask, beta):
    behind = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    penalty = torch.where(mask, log_prob - log_prob_ref, 0.0)
    return torch.where(mask & ~behind, scores.unsqueeze(1), 0.0) - beta * penalty


def tokens_by_index(scores, log_prob, log_prob_ref, mask, beta):
    rewards = torch.where(mask, -beta * (log_prob - log_prob_ref), 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(mask)), last] += scores
    return rewards


def tokens_by_loop(scores, log_prob, log_prob_ref, mask, beta):
    rewards = torch.zeros_like(log_prob)
    for i in range(len(scores)):
        length = int(mask[i].sum())
        rewards[i, :length] = -beta * (log_prob[i, :length] - log_prob_ref[i, :length])
        rewards[i, length - 1] += scores[i]
    return rewards


def gae_by_columns(rewards, values, mask, gae_lambda):
    values = torch.where(mask, values, 0.0)
    ahead = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = torch.where(mask, rewards + ahead - values, 0.0)
    advantages = delta.clone()
    for t in reversed(range(delta.shape[1] - 1)):
        advantages[:, t] += gae_lambda * advantages[:, t + 1]
    return advantages


def gae_by_answers(rewards, values, mask, gae_lambda):
    advantages = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        length = int(mask[i].sum())
        following = 0.0
        for t in reversed(range(length)):
            value_next = values[i, t + 1] if t + 1 < length else 0.0
            delta = rewards[i, t] + value_next - values[i, t]
            following = delta + gae_lambda * following
            advantages[i, t] = following
    return advantages


def gae_by_powers(rewards, values, mask, gae_lambda):
    values = values.masked_fill(~mask, 0.0)
    ahead = F.pad(values, (0, 1))[:, 1:]
    delta = (rewards + ahead - values).masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(delta)
    for t in range(delta.shape[1]):
        for later in range(t, delta.shape[1]):
            advantages[:, t] += gae_lambda ** (later - t) * delta[:, later]
    return advantages


FORMS = {
    "50/bradley_terry_loss": [bradley_by_logsigmoid, bradley_by_softplus, bradley_by_sum],
    "50/best_of_n": [best_by_weights, best_by_loop, best_by_subsets],
    "50/fit_law": [fit_by_lstsq, fit_by_normal_equations, fit_by_sums],
    "50/token_rewards": [tokens_by_shift, tokens_by_index, tokens_by_loop],
    "50/gae": [gae_by_columns, gae_by_answers, gae_by_powers],
}
