"""Chapter 15: right solutions as students write them."""

import math

import torch


def gradient_by_scores(z, advantages, mean, std):
    u = (z - mean) / std
    weight = advantages.view(-1, *[1] * mean.ndim)
    return (weight * u / std).mean(0), (weight * (u**2 - 1)).mean(0)


def gradient_by_einsum(z, advantages, mean, std):
    n = len(z)
    d_mean = (z - mean) / std**2
    d_log_std = (z - mean) ** 2 / std**2 - 1
    return torch.einsum("n,n...->...", advantages, d_mean) / n, torch.einsum("n,n...->...", advantages, d_log_std) / n


def gradient_by_loop(z, advantages, mean, std):
    first, second = torch.zeros_like(mean), torch.zeros_like(mean)
    for noise, advantage in zip(z, advantages, strict=True):
        first = first + advantage * (noise - mean) / std**2
        second = second + advantage * (((noise - mean) / std) ** 2 - 1)
    return first / len(z), second / len(z)


def gradient_by_autograd(z, advantages, mean, std):
    m, s = mean.clone().requires_grad_(), std.log().requires_grad_()
    log_prob = (-0.5 * ((z - m) / s.exp()) ** 2 - s).flatten(1).sum(1)
    return torch.autograd.grad((advantages * log_prob).mean(), (m, s))


def calibrate_by_mixing(rewards, value, decay):
    mean = rewards.mean()
    value = mean if value is None else decay * value + (1 - decay) * mean
    return rewards - value, value


def calibrate_by_steps(rewards, value, decay):
    if value is None:
        value = rewards.mean()
    value = value + (1 - decay) * (rewards.mean() - value)
    return rewards - value, value


def calibrate_by_sums(rewards, value, decay):
    new = rewards.sum() / len(rewards)
    if value is not None:
        new = value * decay + new - new * decay
    return rewards - new, new


def loss_by_minimum(log_prob, log_prob_old, advantages, mean, std, clip_range, beta):
    ratio = (log_prob - log_prob_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    earned = torch.minimum(advantages * ratio, advantages * clipped).mean()
    kl = (0.5 * (mean**2 + std**2 - 1) - std.log()).sum()
    return -earned + beta * kl


def loss_by_maximum(log_prob, log_prob_old, advantages, mean, std, clip_range, beta):
    rho = torch.exp(log_prob - log_prob_old)
    surrogate = torch.max(-advantages * rho, -advantages * torch.clamp(rho, 1 - clip_range, 1 + clip_range))
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * torch.log(std))
    return surrogate.mean() + beta * kl.sum()


def loss_by_distributions(log_prob, log_prob_old, advantages, mean, std, clip_range, beta):
    ratio = log_prob.exp() / log_prob_old.exp()
    low, high = 1 - clip_range, 1 + clip_range
    per_sample = torch.where(advantages > 0, advantages * ratio.clamp(max=high), advantages * ratio.clamp(min=low))
    law = torch.distributions.Normal(mean, std)
    usual = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(std))
    return beta * torch.distributions.kl_divergence(law, usual).sum() - per_sample.mean()


def optimum_by_formula(slope, offset, target, beta):
    mean = 2 * slope * (target - offset) / (2 * slope**2 + beta)
    std = math.sqrt(beta / (2 * slope**2 + beta))
    return mean, std


def optimum_by_precisions(slope, offset, target, beta):
    precision = 1 + 2 * slope**2 / beta
    return 2 * slope / beta * (target - offset) / precision, precision**-0.5


def optimum_by_curvature(slope, offset, target, beta):
    curvature = slope * slope + beta / 2
    return slope * (target - offset) / curvature, (beta / 2 / curvature) ** 0.5


FORMS = {
    "15/noise_gradient": [gradient_by_scores, gradient_by_einsum, gradient_by_loop, gradient_by_autograd],
    "15/calibrate": [calibrate_by_mixing, calibrate_by_steps, calibrate_by_sums],
    "15/noise_loss": [loss_by_minimum, loss_by_maximum, loss_by_distributions],
    "15/optimal_noise": [optimum_by_formula, optimum_by_precisions, optimum_by_curvature],
}
