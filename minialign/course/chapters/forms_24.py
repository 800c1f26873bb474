"""Chapter 24: right solutions as students write them."""

import math

import torch
from torch.nn import functional as F

from minialign.kernels import expand_as, gaussian_log_prob


def logit_by_sides(chosen, rejected, chosen_ref, rejected_ref, beta, loser_weight):
    before = chosen_ref - loser_weight * rejected_ref
    now = chosen - loser_weight * rejected
    return beta * (before - now)


def logit_by_drops(chosen, rejected, chosen_ref, rejected_ref, beta, loser_weight):
    better = chosen_ref - chosen
    worse = rejected_ref - rejected
    return beta * (better - loser_weight * worse)


def logit_by_rises(chosen, rejected, chosen_ref, rejected_ref, beta, loser_weight):
    return -beta * (chosen - chosen_ref) + beta * loser_weight * (rejected - rejected_ref)


def ratio_by_squares(next, denoised, denoised_ref, alpha_bar_next):
    signal = expand_as(alpha_bar_next.sqrt(), denoised)
    near = (next - signal * denoised) ** 2
    far = (next - signal * denoised_ref) ** 2
    return (far - near).flatten(1).mean(1) / (2 * (1 - alpha_bar_next))


def ratio_by_densities(next, denoised, denoised_ref, alpha_bar_next):
    signal, std = expand_as(alpha_bar_next.sqrt(), denoised), (1 - alpha_bar_next).sqrt()
    now = gaussian_log_prob(next, signal * denoised, std, "mean")
    return now - gaussian_log_prob(next, signal * denoised_ref, std, "mean")


def ratio_by_product(next, denoised, denoised_ref, alpha_bar_next):
    shape = (-1, *[1] * (denoised.ndim - 1))
    a = alpha_bar_next.view(shape)
    terms = (2 * next - a.sqrt() * (denoised + denoised_ref)) * a.sqrt() * (denoised - denoised_ref) / (2 * (1 - a))
    return terms.flatten(1).mean(1)


def ratio_by_distributions(next, denoised, denoised_ref, alpha_bar_next):
    shape = (-1, *[1] * (denoised.ndim - 1))
    root, std = alpha_bar_next.sqrt().view(shape), (1 - alpha_bar_next).sqrt().view(shape)
    now = torch.distributions.Normal(root * denoised, std).log_prob(next)
    before = torch.distributions.Normal(root * denoised_ref, std).log_prob(next)
    return (now - before).flatten(1).mean(1)


def comparison_by_sign(log_ratio, preference, beta, clip_range):
    held = log_ratio.clamp(math.log(1 - clip_range), math.log(1 + clip_range))
    sign = 2 * preference - 1
    return F.softplus(-beta * sign[:, None] * (held[0] - held[1])).mean()


def comparison_by_ratios(log_ratio, preference, beta, clip_range):
    rho = log_ratio.exp().clamp(1 - clip_range, 1 + clip_range)
    first, second = rho.log()
    h = preference.sub(0.5).sign().unsqueeze(1)
    return -F.logsigmoid(beta * h * (first - second)).mean()


def comparison_by_sides(log_ratio, preference, beta, clip_range):
    held = torch.log(torch.clamp(torch.exp(log_ratio), 1 - clip_range, 1 + clip_range))
    h = (2 * preference - 1).view(-1, 1)
    argument = beta * h * held[0] - beta * h * held[1]
    return -torch.nn.functional.logsigmoid(argument).mean()


def shift_by_formula(alpha_bar_next, slope, reward_slope, beta):
    return (1 - alpha_bar_next) / math.sqrt(alpha_bar_next) * slope * reward_slope / beta


def shift_by_steps(alpha_bar_next, slope, reward_slope, beta):
    variance = 1 - alpha_bar_next
    of_mean = variance * slope * reward_slope / beta
    return of_mean / alpha_bar_next**0.5


FORMS = {
    "24/pair_logit": [logit_by_sides, logit_by_drops, logit_by_rises],
    "24/renoise_log_ratio": [ratio_by_squares, ratio_by_densities, ratio_by_product, ratio_by_distributions],
    "24/comparison_loss": [comparison_by_sign, comparison_by_ratios, comparison_by_sides],
    "24/best_shift": [shift_by_formula, shift_by_steps],
}
