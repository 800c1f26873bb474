"""Chapter 12: right solutions as students write them."""

import math

import torch

from minialign.kernels import expand_as, gaussian_log_prob


def action_by_kernel(next, denoised, alpha_bar, alpha_bar_next):
    mean = expand_as(alpha_bar_next.sqrt(), denoised) * denoised
    return gaussian_log_prob(next, mean, (1 - alpha_bar_next).sqrt(), "mean")


def action_by_terms(next, denoised, alpha_bar, alpha_bar_next):
    a = expand_as(alpha_bar_next, denoised)
    mean, var = a.sqrt() * denoised, 1 - a
    terms = -((next - mean) ** 2) / (2 * var) - 0.5 * (2 * math.pi * var).log()
    return terms.flatten(1).mean(1)


def action_by_distribution(next, denoised, alpha_bar, alpha_bar_next):
    shape = (-1, *[1] * (denoised.ndim - 1))
    mean = alpha_bar_next.sqrt().view(shape) * denoised
    std = (1 - alpha_bar_next).sqrt().view(shape)
    return torch.distributions.Normal(mean, std).log_prob(next).flatten(1).mean(1)


def reached_by_cumprod(carried):
    return carried.flip(0).cumprod(0)[:-1].sum()


def reached_by_loops(carried):
    total = carried.new_zeros(())
    for j in range(len(carried) - 1):
        product = carried.new_ones(())
        for i in range(j + 1, len(carried)):
            product = product * carried[i]
        total = total + product
    return total


def reached_by_recursion(carried):
    total = torch.zeros((), dtype=carried.dtype)
    for c in carried[1:]:
        total = c * (1 + total)
    return total


def reached_by_products(carried):
    calls = len(carried)
    return sum((carried[j + 1 :].prod() for j in range(calls - 1)), start=carried.new_zeros(()))


def terminal_by_kernel(denoised, noise, terminal_std):
    paid = (denoised + terminal_std * noise).detach()
    std = denoised.new_full((len(denoised),), terminal_std)
    return paid, gaussian_log_prob(paid, denoised, std, "mean")


def terminal_by_terms(denoised, noise, terminal_std):
    paid = denoised.detach() + terminal_std * noise
    terms = -0.5 * ((paid - denoised) / terminal_std) ** 2 - math.log(terminal_std) - 0.5 * math.log(2 * math.pi)
    return paid, terms.flatten(1).mean(1)


def rebel_by_totals(log_ratio, advantages, eta):
    total = log_ratio.sum(2)
    error = eta * (total[0] - total[1]) - (advantages[0] - advantages[1])
    return error.square().mean()


def rebel_by_pairs(log_ratio, advantages, eta):
    first, second = log_ratio.sum(-1)
    gap = advantages[0] - advantages[1]
    return ((eta * (first - second) - gap) ** 2).sum() / len(gap)


def rebel_by_samples(log_ratio, advantages, eta):
    surplus = eta * log_ratio.sum(2) - advantages
    return (surplus[0] - surplus[1]).pow(2).mean()


def even_by_saving(distillation, steps, calls, ratio):
    saved = 4 * steps - ratio * (calls + 3 * (calls - 1))
    return distillation / saved if saved > 0 else float("inf")


def even_by_costs(distillation, steps, calls, ratio):
    ddpo = steps + 3 * steps
    rlcm = calls + 3 * (calls - 1)
    if ddpo <= ratio * rlcm:
        return math.inf
    return distillation / (ddpo - ratio * rlcm)


FORMS = {
    "12/action_log_prob": [action_by_kernel, action_by_terms, action_by_distribution],
    "12/reached_gradient": [reached_by_cumprod, reached_by_loops, reached_by_recursion, reached_by_products],
    "12/terminal_action": [terminal_by_kernel, terminal_by_terms],
    "12/rebel": [rebel_by_totals, rebel_by_pairs, rebel_by_samples],
    "12/break_even": [even_by_saving, even_by_costs],
}
