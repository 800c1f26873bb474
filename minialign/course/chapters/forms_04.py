"""Chapter 04: right solutions as students write them."""

from itertools import pairwise

import torch

from minialign.kernels import expand_as


def scalings_by_tau(timesteps, timestep_scaling, sigma_data):
    tau = timestep_scaling * timesteps.float()
    c_skip = sigma_data**2 / (tau**2 + sigma_data**2)
    c_out = tau / (tau**2 + sigma_data**2).sqrt()
    return c_skip, c_out


def scalings_by_total(timesteps, timestep_scaling, sigma_data):
    scaled = timesteps * timestep_scaling
    total = scaled**2 + sigma_data**2
    return sigma_data**2 / total, scaled / total**0.5


def jump_by_guess(noise_pred, x, alpha_bar, alpha_bar_next):
    a, a_next = expand_as(alpha_bar, x), expand_as(alpha_bar_next, x)
    denoised = (x - (1 - a).sqrt() * noise_pred) / a.sqrt()
    return a_next.sqrt() * denoised + (1 - a_next).sqrt() * noise_pred


def jump_by_factors(noise_pred, x, alpha_bar, alpha_bar_next):
    ratio = (alpha_bar_next / alpha_bar).sqrt()
    shift = (1 - alpha_bar_next).sqrt() - ratio * (1 - alpha_bar).sqrt()
    return expand_as(ratio, x) * x + expand_as(shift, x) * noise_pred


def jump_by_sample(noise_pred, x, alpha_bar, alpha_bar_next):
    moved = []
    for i in range(len(x)):
        denoised = (x[i] - (1 - alpha_bar[i]) ** 0.5 * noise_pred[i]) / alpha_bar[i] ** 0.5
        moved.append(alpha_bar_next[i] ** 0.5 * denoised + (1 - alpha_bar_next[i]) ** 0.5 * noise_pred[i])
    return torch.stack(moved)


def slope_by_walk(alpha_bar, std):
    x = torch.ones((), dtype=alpha_bar.dtype)
    for i in range(len(alpha_bar) - 1):
        a, b = alpha_bar[i], alpha_bar[i + 1]
        noise = (1 - a).sqrt() * x / (a * std**2 + 1 - a)
        denoised = (x - (1 - a).sqrt() * noise) / a.sqrt()
        x = b.sqrt() * denoised + (1 - b).sqrt() * noise
    return x


def slope_by_product(alpha_bar, std):
    a, b = alpha_bar[:-1], alpha_bar[1:]
    noise = (1 - a).sqrt() / (a * std**2 + 1 - a)
    steps = b.sqrt() * (1 - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    return steps.prod()


def slope_by_closed_step(alpha_bar, std):
    slope = alpha_bar.new_tensor(1.0)
    for a, b in pairwise(alpha_bar):
        variance = a * std**2 + 1 - a
        slope = slope * ((a * b).sqrt() * std**2 + ((1 - a) * (1 - b)).sqrt()) / variance
    return slope


def step_by_case(f, x, t, t_next, alphas_cumprod, noise):
    denoised = f(x, t)
    if t_next is None:
        return denoised
    a = alphas_cumprod[t_next]
    return a.sqrt() * denoised + (1 - a).sqrt() * noise


def step_by_amplitudes(f, x, t, t_next, alphas_cumprod, noise):
    signal, spread = 1.0, 0.0
    if t_next is not None:
        signal, spread = alphas_cumprod[t_next] ** 0.5, (1 - alphas_cumprod[t_next]) ** 0.5
    return signal * f(x, t) + spread * noise


def loss_by_no_grad(f, student, target, x, t, x_next, t_next):
    with torch.no_grad():
        answer = f(target, x_next, t_next)
    return ((f(student, x, t) - answer) ** 2).mean()


def loss_by_detach(f, student, target, x, t, x_next, t_next):
    ours = f(student, x, t)
    theirs = f(target, x_next, t_next).detach()
    return torch.nn.functional.mse_loss(ours, theirs)


def loss_by_sum(f, student, target, x, t, x_next, t_next):
    gap = f(student, x, t) - f(target.detach(), x_next, t_next)
    return (gap * gap).sum() / gap.numel()


FORMS = {
    "04/boundary_scalings": [scalings_by_tau, scalings_by_total],
    "04/ddim_jump": [jump_by_guess, jump_by_factors, jump_by_sample],
    "04/fixed_point_slope": [slope_by_walk, slope_by_product, slope_by_closed_step],
    "04/consistency_step": [step_by_case, step_by_amplitudes],
    "04/distillation_loss": [loss_by_no_grad, loss_by_detach, loss_by_sum],
}
