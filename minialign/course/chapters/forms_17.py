"""Chapter 17: right solutions as students write them."""

import torch
from torch.nn import functional as F

from minialign.measure import frechet_gaussian


def frechet_by_roots(mean_a, cov_a, mean_b, cov_b):
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def frechet_by_a_function(mean_a, cov_a, mean_b, cov_b):
    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    inner = root(root(cov_a) @ cov_b @ root(cov_a))
    return (mean_a - mean_b).square().sum() + torch.trace(cov_a + cov_b - 2 * inner)


def frechet_by_svd(mean_a, cov_a, mean_b, cov_b):
    u, s, _ = torch.linalg.svd(cov_b)
    root = u * s.sqrt() @ u.T
    gap = mean_a - mean_b
    inside = torch.linalg.eigvalsh(root @ cov_a @ root)
    return gap @ gap + torch.diagonal(cov_a).sum() + torch.diagonal(cov_b).sum() - 2 * inside.clamp(min=0).sqrt().sum()


def frechet_by_the_package(mean_a, cov_a, mean_b, cov_b):
    return frechet_gaussian(mean_a, cov_a, mean_b, cov_b)


def swapped_by_offsets(n, mean, covariance, old, new):
    step = (new - old) / n
    came, went = new - mean, old - mean
    products = (n - 1) * covariance + torch.outer(came, came) - torch.outer(went, went)
    return mean + step, (products - n * torch.outer(step, step)) / (n - 1)


def swapped_by_second_moments(n, mean, covariance, old, new):
    second = (n - 1) * covariance + n * torch.outer(mean, mean)
    second = second + torch.outer(new, new) - torch.outer(old, old)
    mean = mean + (new - old) / n
    return mean, (second - n * torch.outer(mean, mean)) / (n - 1)


def swapped_by_out_and_in(n, mean, covariance, old, new):
    products = (n - 1) * covariance
    left = mean + (mean - old) / (n - 1)
    products = products - torch.outer(old - mean, old - left)
    mean = left + (new - left) / n
    return mean, (products + torch.outer(new - left, new - mean)) / (n - 1)


def swaps_in_a_loop(pairs, score, order):
    chosen = torch.zeros(len(pairs), dtype=torch.long)
    rows = torch.arange(len(pairs))
    best = score(pairs[rows, chosen])
    for i in order:
        chosen[i] = 1
        value = score(pairs[rows, chosen])
        if value > best:
            best = value
        else:
            chosen[i] = 0
    return chosen


def swaps_of_two_sets(pairs, score, order):
    inside, outside = pairs[:, 0].clone(), pairs[:, 1].clone()
    chosen, best = [0] * len(pairs), score(inside)
    for i in order:
        trial = inside.clone()
        trial[i] = outside[i]
        value = score(trial)
        if value > best:
            inside, best, chosen[i] = trial, value, 1
    return torch.tensor(chosen)


def swaps_by_stacking(pairs, score, order):
    chosen = torch.zeros(len(pairs), dtype=torch.int64)
    for i in order:
        trial = chosen.clone()
        trial[i] = 1
        old, new = (torch.stack([pair[c] for pair, c in zip(pairs, which, strict=True)]) for which in (chosen, trial))
        if score(new) > score(old):
            chosen = trial
    return chosen


def contrast_by_softplus(error_chosen, error_rejected, reference_chosen, reference_rejected, beta):
    chosen = error_chosen - reference_chosen.detach()
    rejected = error_rejected - reference_rejected.detach()
    return F.softplus(beta / 2 * (chosen - rejected)).mean()


def contrast_by_logsigmoid(error_chosen, error_rejected, reference_chosen, reference_rejected, beta):
    chosen = -(error_chosen - reference_chosen.detach()) / 2
    rejected = -(error_rejected - reference_rejected.detach()) / 2
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def contrast_by_one_line(error_chosen, error_rejected, reference_chosen, reference_rejected, beta):
    with torch.no_grad():
        reference = reference_chosen - reference_rejected
    return torch.log(1 + torch.exp(beta / 2 * (error_chosen - error_rejected - reference))).mean()


FORMS = {
    "17/frechet": (frechet_by_roots, frechet_by_a_function, frechet_by_svd, frechet_by_the_package),
    "17/swapped": (swapped_by_offsets, swapped_by_second_moments, swapped_by_out_and_in),
    "17/greedy_swaps": (swaps_in_a_loop, swaps_of_two_sets, swaps_by_stacking),
    "17/contrast": (contrast_by_softplus, contrast_by_logsigmoid, contrast_by_one_line),
}
