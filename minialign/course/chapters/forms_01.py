"""Chapter 01: right solutions as students write them."""

import math

import torch

from minialign.kernels import expand_as


def denoised_by_amplitudes(model_output, state, alpha_bar, prediction_type):
    signal = expand_as(alpha_bar, state).sqrt()
    noise_level = (1 - expand_as(alpha_bar, state)).sqrt()
    if prediction_type == "epsilon":
        return (state - noise_level * model_output) / signal
    if prediction_type == "v_prediction":
        return signal * state - noise_level * model_output
    return model_output


def denoised_by_sample(model_output, state, alpha_bar, prediction_type):
    guesses = []
    for out, x, a in zip(model_output, state, alpha_bar, strict=True):
        if prediction_type == "epsilon":
            guess = (x - (1 - a) ** 0.5 * out) / a**0.5
        elif prediction_type == "v_prediction":
            guess = a**0.5 * x - (1 - a) ** 0.5 * out
        else:
            guess = out
        guesses.append(guess)
    return torch.stack(guesses)


def std_by_root(alpha_bar, alpha_bar_next, eta):
    first = (1 - alpha_bar_next) / (1 - alpha_bar)
    second = 1 - alpha_bar / alpha_bar_next
    return eta * (first * second).sqrt()


def std_by_two_roots(alpha_bar, alpha_bar_next, eta):
    noise = ((1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
    return eta * noise * (1 - alpha_bar / alpha_bar_next).sqrt()


def mean_by_amplitudes(denoised, noise_pred, alpha_bar_next, std):
    signal = expand_as(alpha_bar_next, denoised).sqrt()
    direction = (1 - expand_as(alpha_bar_next, denoised) - expand_as(std, denoised) ** 2).sqrt()
    return signal * denoised + direction * noise_pred


def mean_by_sample(denoised, noise_pred, alpha_bar_next, std):
    means = []
    for i in range(len(denoised)):
        direction = (1 - alpha_bar_next[i] - std[i] ** 2) ** 0.5
        means.append(alpha_bar_next[i] ** 0.5 * denoised[i] + direction * noise_pred[i])
    return torch.stack(means)


def density_by_terms(x, mean, std, reduction):
    s = expand_as(std, x)
    elements = -0.5 * ((x - mean) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)
    elements = elements.flatten(1)
    return elements.sum(1) if reduction == "sum" else elements.mean(1)


def density_by_variance(x, mean, std, reduction):
    var = expand_as(std, x) ** 2
    elements = -((x - mean) ** 2) / (2 * var) - 0.5 * (2 * math.pi * var).log()
    total = elements.flatten(1).sum(1)
    return total if reduction == "sum" else total / x[0].numel()


def density_by_totals(x, mean, std, reduction):
    size = x[0].numel()
    squares = ((x - mean) ** 2).flatten(1).sum(1)
    total = -squares / (2 * std**2) - size * std.log() - size / 2 * math.log(2 * math.pi)
    return total if reduction == "sum" else total / size


def gain_by_two_ways(alpha_bar, alpha_bar_next, std):
    direct = (1 - alpha_bar_next - std**2).clamp(min=0).sqrt()
    through_denoised = -(alpha_bar_next * (1 - alpha_bar) / alpha_bar).sqrt()
    return direct + through_denoised


def gain_by_roots(alpha_bar, alpha_bar_next, std):
    slope = -((1 - alpha_bar).sqrt()) / alpha_bar.sqrt()
    return alpha_bar_next.sqrt() * slope + (1 - alpha_bar_next - std**2).sqrt()


def loss_by_path(log_probs, rewards):
    baseline = rewards.mean()
    advantages = (rewards - baseline).detach()
    path = log_probs.sum(1)
    return -(advantages * path).mean()


def loss_by_sum(log_probs, rewards):
    advantages = rewards.detach() - rewards.detach().mean()
    return -(advantages.unsqueeze(1) * log_probs).sum() / len(rewards)


FORMS = {
    "01/predict_denoised": [denoised_by_amplitudes, denoised_by_sample],
    "01/ddim_std": [std_by_root, std_by_two_roots],
    "01/ddim_mean": [mean_by_amplitudes, mean_by_sample],
    "01/gaussian_log_prob": [density_by_terms, density_by_variance, density_by_totals],
    "01/gain": [gain_by_two_ways, gain_by_roots],
    "01/reinforce_loss": [loss_by_path, loss_by_sum],
}
