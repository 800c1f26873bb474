"""Chapter 23: right solutions as students write them."""

import math
from itertools import pairwise

import torch
from torch.nn import functional as F


def weights_by_exponents(r_w, r_l, r_min, r_max, gamma):
    p = torch.sigmoid((r_w - r_l) / (r_max - r_min))
    alpha = gamma * p
    return 2 * alpha - gamma


def weights_by_scores(r_w, r_l, r_min, r_max, gamma):
    winner = (r_w - r_min) / (r_max - r_min)
    loser = (r_l - r_min) / (r_max - r_min)
    p = winner.exp() / (winner.exp() + loser.exp())
    return gamma * (2 * p - 1)


def weights_by_tanh(r_w, r_l, r_min, r_max, gamma):
    return gamma * torch.tanh((r_w - r_l) / (2 * (r_max - r_min)))


def losses_by_logsigmoid(logit, p, gamma):
    w = gamma * (2 * p - 1)
    margin = -F.logsigmoid(w * logit)
    label = -p * F.logsigmoid(logit) - (1 - p) * F.logsigmoid(-logit)
    return margin, label


def losses_by_softplus(logit, p, gamma):
    margin = F.softplus(-gamma * (2 * p - 1) * logit)
    return margin, p * F.softplus(-logit) + (1 - p) * F.softplus(logit)


def losses_by_cross_entropy(logit, p, gamma):
    label = F.binary_cross_entropy_with_logits(logit, p, reduction="none")
    alpha = gamma * p
    return F.softplus((gamma - 2 * alpha) * logit), label


def best_by_logs(p):
    return torch.full_like(p, float("inf")), torch.log(p) - torch.log(1 - p)


def best_by_logit(p):
    return torch.full_like(p, math.inf), torch.logit(p)


def best_by_odds(p):
    odds = p / (1 - p)
    return torch.ones_like(p) * math.inf, odds.log()


def renoise_by_index(predict, x, alpha_bar):
    states = [x]
    for j in range(len(alpha_bar) - 1):
        a, b = alpha_bar[j], alpha_bar[j + 1]
        here = states[-1]
        e1 = predict(here, a)
        guess = b.sqrt() * (here - (1 - a).sqrt() * e1) / a.sqrt() + (1 - b).sqrt() * e1
        e2 = predict(guess, b)
        noise = (e1 + e2) / 2
        states.append(b.sqrt() * (here - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise)
    return torch.stack(states)


def renoise_by_helper(predict, x, alpha_bar):
    def step(x, noise, a, b):
        image = (x - (1 - a).sqrt() * noise) / a.sqrt()
        return b.sqrt() * image + (1 - b).sqrt() * noise

    path = [x]
    for a, b in pairwise(alpha_bar):
        first = predict(x, a)
        second = predict(step(x, first, a, b), b)
        x = step(x, 0.5 * (first + second), a, b)
        path.append(x)
    return torch.stack(path)


def renoise_by_means(predict, x, alpha_bar):
    """The step is linear in the noise: the mean of two steps is the step of the mean."""
    path = x.new_zeros(len(alpha_bar), *x.shape)
    path[0] = x
    for j in range(1, len(alpha_bar)):
        a, b = alpha_bar[j - 1], alpha_bar[j]
        x = path[j - 1]
        ratio = (b / a).sqrt()
        added = (1 - b).sqrt() - ratio * (1 - a).sqrt()
        guess = ratio * x + added * predict(x, a)
        again = ratio * x + added * predict(guess, b)
        path[j] = (guess + again) / 2
    return path


FORMS = {
    "23/smooth_weights": [weights_by_exponents, weights_by_scores, weights_by_tanh],
    "23/soft_losses": [losses_by_logsigmoid, losses_by_softplus, losses_by_cross_entropy],
    "23/best_logits": [best_by_logs, best_by_logit, best_by_odds],
    "23/renoise_inversion": [renoise_by_index, renoise_by_helper, renoise_by_means],
}
