"""Chapter 22: right solutions as students write them."""

import math

import torch

from minialign.kernels import denoising_log_ratio, expand_as, squared_error, transport


def step_by_kernel(states, noise_pred, alpha_bar, alpha_bar_next):
    levels = ((a.sqrt(), (1 - a).sqrt()) for a in (alpha_bar, alpha_bar_next))
    return transport(noise_pred, states, *levels)


def step_by_terms(states, noise_pred, alpha_bar, alpha_bar_next):
    a, b = expand_as(alpha_bar, states), expand_as(alpha_bar_next, states)
    factor = torch.sqrt(b / a)
    return factor * states + (torch.sqrt(1 - b) - factor * torch.sqrt(1 - a)) * noise_pred


def step_by_view(states, noise_pred, alpha_bar, alpha_bar_next):
    shape = (-1, *[1] * (states.ndim - 1))
    a, b = alpha_bar.view(shape), alpha_bar_next.view(shape)
    x0 = (states - (1 - a) ** 0.5 * noise_pred) / a**0.5
    return b**0.5 * x0 + (1 - b) ** 0.5 * noise_pred


def logits_by_errors(latents, inverted, noise_pred, noise_pred_ref, alpha_bar, beta):
    signal = alpha_bar.sqrt().view(1, -1, *[1] * (latents.ndim - 2))
    noise = (1 - alpha_bar).sqrt().view(1, -1, *[1] * (latents.ndim - 2))
    tau = (inverted - signal * latents) / noise
    axes = tuple(range(2, latents.ndim))
    error = ((noise_pred - tau) ** 2).mean(axes)
    error_ref = ((noise_pred_ref - tau) ** 2).mean(axes)
    return -0.5 * beta * ((error[0] - error[1]) - (error_ref[0] - error_ref[1]))


def logits_by_side(latents, inverted, noise_pred, noise_pred_ref, alpha_bar, beta):
    ratios = []
    for side in range(2):
        a = expand_as(alpha_bar, latents[side])
        tau = (inverted[side] - a.sqrt() * latents[side]) / (1 - a).sqrt()
        errors = [squared_error(pred[side], tau, "mean") for pred in (noise_pred, noise_pred_ref)]
        ratios.append(denoising_log_ratio(*errors))
    return beta * (ratios[0] - ratios[1])


def ratio_by_parts(alpha_bar, std):
    v = alpha_bar * std**2 + (1 - alpha_bar)
    h = alpha_bar.sqrt() * (1 - alpha_bar).sqrt() / (v.sqrt() * (v.sqrt() + alpha_bar.sqrt() * std))
    k = alpha_bar.sqrt() * (1 - alpha_bar).sqrt() / v
    return h / k


def ratio_by_division(alpha_bar, std):
    return 1 / (1 + alpha_bar.sqrt() * std / (alpha_bar * std**2 + 1 - alpha_bar).sqrt())


def ratio_by_difference(alpha_bar, std):
    alpha, sigma2 = alpha_bar.sqrt(), 1 - alpha_bar
    root = (alpha**2 * std**2 + sigma2).sqrt()
    return root * (root - alpha * std) / sigma2


def level_by_search(level, num_train, num_steps):
    grid = 1 + (num_train // num_steps) * torch.arange(num_steps)
    return grid[torch.searchsorted(grid, level).clamp_max(num_steps - 1)]


def level_by_loop(level, num_train, num_steps):
    stride, ends = num_train // num_steps, []
    for t in level.tolist():
        reached = 1
        while reached < t and reached + stride <= 1 + stride * (num_steps - 1):
            reached += stride
        ends.append(reached)
    return torch.tensor(ends)


def level_by_ceil(level, num_train, num_steps):
    stride = num_train // num_steps
    return torch.tensor([1 + stride * min(math.ceil((t - 1) / stride), num_steps - 1) for t in level.tolist()])


FORMS = {
    "22/inverted_step": [step_by_kernel, step_by_terms, step_by_view],
    "22/inpo_logits": [logits_by_errors, logits_by_side],
    "22/weight_ratio": [ratio_by_parts, ratio_by_division, ratio_by_difference],
    "22/official_level": [level_by_search, level_by_loop, level_by_ceil],
}
