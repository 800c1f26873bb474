"""Chapter 02: right solutions as students write them."""

import torch


def score_by_brackets(x, sigma, mean, vectors, values):
    y = x - mean
    explained = (y @ vectors * (values / (values + sigma**2))) @ vectors.T
    return -(y - explained) / sigma**2


def score_by_parts(x, sigma, mean, vectors, values):
    y = x - mean
    inside = y @ vectors
    outside = y - inside @ vectors.T
    return -(inside / (values + sigma**2)) @ vectors.T - outside / sigma**2


def score_by_matrix(x, sigma, mean, vectors, values):
    covariance = vectors @ torch.diag(values) @ vectors.T + sigma**2 * torch.eye(len(mean), dtype=x.dtype)
    return torch.linalg.solve(covariance, (mean - x).T).T


def denoised_by_tweedie(x, sigma, mean, vectors, values):
    y = x - mean
    score = -(y - (y @ vectors * (values / (values + sigma**2))) @ vectors.T) / sigma**2
    return x + sigma**2 * score


def denoised_by_gain(x, sigma, mean, vectors, values):
    gain = values / (values + sigma**2)
    return mean + ((x - mean) @ vectors * gain) @ vectors.T


def denoised_by_mode(x, sigma, mean, vectors, values):
    guess = mean.expand(x.shape)
    for k in range(len(values)):
        coordinate = (x - mean) @ vectors[:, k]
        guess = guess + values[k] / (values[k] + sigma**2) * coordinate.unsqueeze(1) * vectors[:, k]
    return guess


def switch_by_root(values, share):
    squared = values / share - values
    return squared.sqrt()


def switch_by_odds(values, share):
    return ((1 - share) / share * values) ** 0.5


def explained_by_sums(target, approximation, centre):
    unexplained = ((target - approximation) ** 2).sum()
    total = ((target - centre) ** 2).sum()
    return 1 - unexplained / total


def explained_by_norms(target, approximation, centre):
    return 1 - (target - approximation).norm() ** 2 / (target - centre).norm() ** 2


def explained_by_means(target, approximation, centre):
    unexplained = (target - approximation).square().mean()
    total = (target - centre).square().mean()
    return (total - unexplained) / total


def delta_by_softmax(x, sigma, data):
    squared = torch.cdist(x, data) ** 2
    weights = torch.softmax(-squared / (2 * sigma**2), dim=1)
    return weights @ data


def delta_by_differences(x, sigma, data):
    squared = (x[:, None] - data[None]).square().sum(-1)
    logits = -squared / (2 * sigma**2)
    weights = (logits - logits.max(1, keepdim=True).values).exp()
    weights = weights / weights.sum(1, keepdim=True)
    return (weights[:, :, None] * data).sum(1)


def delta_by_point(x, sigma, data):
    guesses = []
    for point in x:
        logits = -((point - data) ** 2).sum(1) / (2 * sigma**2)
        guesses.append(logits.softmax(0) @ data)
    return torch.stack(guesses)


def flow_by_pieces(x, sigma_from, sigma_to, mean, vectors, values):
    y = x - mean
    inside = y @ vectors
    outside = y - inside @ vectors.T
    stretch = ((sigma_to**2 + values) / (sigma_from**2 + values)).sqrt()
    return mean + (inside * stretch) @ vectors.T + sigma_to / sigma_from * outside


def flow_by_difference(x, sigma_from, sigma_to, mean, vectors, values):
    y = x - mean
    ratio = sigma_to / sigma_from
    stretch = (sigma_to**2 + values).sqrt() / (sigma_from**2 + values).sqrt()
    return mean + ratio * y + ((stretch - ratio) * (y @ vectors)) @ vectors.T


def flow_by_mode(x, sigma_from, sigma_to, mean, vectors, values):
    y = x - mean
    moved = torch.zeros_like(y)
    outside = y
    for k in range(len(values)):
        part = (y @ vectors[:, k]).unsqueeze(1) * vectors[:, k]
        outside = outside - part
        moved = moved + ((sigma_to**2 + values[k]) / (sigma_from**2 + values[k])) ** 0.5 * part
    return mean + moved + sigma_to / sigma_from * outside


FORMS = {
    "02/gaussian_score": [score_by_brackets, score_by_parts, score_by_matrix],
    "02/gaussian_denoised": [denoised_by_tweedie, denoised_by_gain, denoised_by_mode],
    "02/switch_on": [switch_by_root, switch_by_odds],
    "02/explained_variance": [explained_by_sums, explained_by_norms, explained_by_means],
    "02/delta_denoised": [delta_by_softmax, delta_by_differences, delta_by_point],
    "02/gaussian_flow": [flow_by_pieces, flow_by_difference, flow_by_mode],
}
