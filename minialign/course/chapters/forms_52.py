"""Chapter 52: right solutions as students write them."""

import torch


def standardise_by_signal(advantages, mask):
    signals = []
    for signal in advantages.unbind(-1):
        values = signal[mask]
        signals.append(torch.where(mask, (signal - values.mean()) / (values.std() + 1e-8), 0.0))
    return torch.stack(signals, -1)


def standardise_by_tokens(advantages, mask):
    out = torch.zeros_like(advantages)
    tokens = advantages[mask]
    out[mask] = (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-8)
    return out


def standardise_by_sums(advantages, mask):
    real = mask.unsqueeze(-1)
    count = mask.sum()
    mean = torch.where(real, advantages, 0.0).sum((0, 1)) / count
    gap = torch.where(real, advantages - mean, 0.0)
    std = ((gap**2).sum((0, 1)) / (count - 1)).sqrt()
    return gap / (std + 1e-8)


def mix_by_weight(advantages, multipliers):
    kl_weight = len(multipliers) - multipliers.sum()
    return advantages[..., :-1] @ multipliers + kl_weight * advantages[..., -1]


def mix_by_all_weights(advantages, multipliers):
    rest = (1 - multipliers).sum().unsqueeze(0)
    weights = torch.cat([multipliers, rest])
    return (advantages * weights).sum(-1)


def mix_by_loop(advantages, multipliers):
    mixed = (advantages.shape[-1] - 1 - multipliers.sum()) * advantages[..., -1]
    for i in range(len(multipliers)):
        mixed = mixed + multipliers[i] * advantages[..., i]
    return mixed


def step_by_level(raw, reached, thresholds, lr):
    level = raw.sigmoid()
    return raw - lr * level * (1 - level) * (reached - thresholds)


def step_by_exponentials(raw, reached, thresholds, lr):
    level = 1 / (1 + torch.exp(-raw))
    slope = level - level**2
    violation = reached - thresholds
    return raw - lr * slope * violation


def step_by_autograd(raw, reached, thresholds, lr):
    with torch.enable_grad():
        mu = raw.detach().clone().requires_grad_()
        objective = (mu.sigmoid() * (reached - thresholds)).sum()
        return raw - lr * torch.autograd.grad(objective, mu)[0]


def newton_by_centring(log_prior, features, targets, weights):
    law = (log_prior + features @ weights).softmax(0)
    means = law @ features
    centred = features - means
    covariance = centred.T @ (law.unsqueeze(1) * centred)
    return weights + torch.linalg.solve(covariance, targets - means)


def newton_by_moments(log_prior, features, targets, weights):
    tilted = (log_prior + features @ weights).exp()
    law = tilted / tilted.sum()
    means = (law[:, None] * features).sum(0)
    second = torch.einsum("n,ni,nj->ij", law, features, features)
    covariance = second - torch.outer(means, means)
    return weights + torch.linalg.inv(covariance) @ (targets - means)


def candidates_by_mask(simplex, scores):
    worst = scores.argmin()
    centre = simplex[torch.arange(len(scores)) != worst].mean(0)
    reflected = centre + (centre - simplex[worst])
    return reflected, centre + 2 * (reflected - centre), centre + 0.5 * (simplex[worst] - centre)


def candidates_by_sum(simplex, scores):
    low = simplex[scores.argmin()]
    centre = (simplex.sum(0) - low) / (len(simplex) - 1)
    return 2 * centre - low, 3 * centre - 2 * low, (centre + low) / 2


def candidates_by_order(simplex, scores):
    order = scores.argsort()
    low, others = simplex[order[0]], simplex[order[1:]]
    centre = others.mean(0)
    way = centre - low
    return centre + way, centre + 2 * way, centre - 0.5 * way


FORMS = {
    "52/standardise": [standardise_by_signal, standardise_by_tokens, standardise_by_sums],
    "52/mix": [mix_by_weight, mix_by_all_weights, mix_by_loop],
    "52/multiplier_step": [step_by_level, step_by_exponentials, step_by_autograd],
    "52/newton_step": [newton_by_centring, newton_by_moments],
    "52/candidates": [candidates_by_mask, candidates_by_sum, candidates_by_order],
}
