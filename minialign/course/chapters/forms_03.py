"""Chapter 03: right solutions as students write them."""

import torch


def grid_by_arange(num_points, sigma_min, sigma_max, rho):
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    u = torch.arange(num_points) / (num_points - 1)
    levels = (high + u * (low - high)) ** rho
    return torch.cat([levels, torch.zeros(1)])


def grid_by_linspace(num_points, sigma_min, sigma_max, rho):
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_points)
    return torch.cat([roots**rho, torch.tensor([0.0])])


def grid_by_loop(num_points, sigma_min, sigma_max, rho):
    levels = []
    for i in range(num_points):
        u = i / (num_points - 1)
        levels.append((sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho)
    return torch.tensor([*levels, 0.0])


def heun_by_slopes(denoise, x, sigma, sigma_next):
    step = sigma_next - sigma
    slope = (x - denoise(x, sigma)) / sigma
    proposed = x + step * slope
    if sigma_next == 0:
        return proposed
    slope_next = (proposed - denoise(proposed, sigma_next)) / sigma_next
    return x + step * (slope + slope_next) / 2


def heun_by_correction(denoise, x, sigma, sigma_next):
    d = (x - denoise(x, sigma)) / sigma
    y = x + d * (sigma_next - sigma)
    if sigma_next > 0:
        d_next = (y - denoise(y, sigma_next)) / sigma_next
        y = x + (0.5 * d + 0.5 * d_next) * (sigma_next - sigma)
    return y


def start_by_count(noise, flow, sigmas, sigma_skip):
    first = int((sigmas > sigma_skip).sum())
    rest = sigmas[first:]
    x = sigmas[0] * noise
    return flow(x, sigmas[0], rest[0]), rest


def start_by_mask(noise, flow, sigmas, sigma_skip):
    rest = sigmas[sigmas <= sigma_skip]
    return flow(noise * sigmas[0], sigmas[0], rest[0]), rest


def start_by_loop(noise, flow, sigmas, sigma_skip):
    i = 0
    while sigmas[i] > sigma_skip:
        i += 1
    state = flow(sigmas[0] * noise, sigmas[0], sigmas[i])
    return state, sigmas[i:]


def revealed_by_shares(values, sigmas):
    levels = sigmas[:, None]
    return (values**2 / (values + levels**2)).sum(1) / values.sum()


def revealed_by_gain(values, sigmas):
    gain = values / (values + sigmas.unsqueeze(-1) ** 2)
    return gain @ values / values.sum()


def revealed_by_level(values, sigmas):
    shares = []
    for sigma in sigmas:
        shares.append((values * values / (values + sigma * sigma)).sum() / values.sum())
    return torch.stack(shares)


def range_by_formula(mean, values):
    return 2 * mean - 1, 2**2 * values


def range_by_factor(mean, values):
    factor, shift = 2.0, -1.0
    return factor * mean + shift, factor**2 * values


def jump_by_pieces(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
    a, b = alpha_bar_from, alpha_bar_to
    y = x - a**0.5 * mean
    inside = y @ vectors
    stretch = ((b * values + 1 - b) / (a * values + 1 - a)) ** 0.5
    outside = ((1 - b) / (1 - a)) ** 0.5
    return b**0.5 * mean + (inside * stretch) @ vectors.mT + outside * (y - inside @ vectors.mT)


def jump_by_difference(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
    y = x - alpha_bar_from**0.5 * mean
    ratio = ((1 - alpha_bar_to) / (1 - alpha_bar_from)) ** 0.5
    before = alpha_bar_from * values + 1 - alpha_bar_from
    after = alpha_bar_to * values + 1 - alpha_bar_to
    moved = ratio * y + (y @ vectors * ((after / before).sqrt() - ratio)) @ vectors.T
    return alpha_bar_to**0.5 * mean + moved


def jump_by_sigmas(x, mean, vectors, values, alpha_bar_from, alpha_bar_to):
    sigma, sigma_next = ((1 - alpha_bar_from) / alpha_bar_from) ** 0.5, ((1 - alpha_bar_to) / alpha_bar_to) ** 0.5
    y = x / alpha_bar_from**0.5 - mean
    inside = y @ vectors
    stretch = ((sigma_next**2 + values) / (sigma**2 + values)) ** 0.5
    moved = mean + (inside * stretch) @ vectors.T + sigma_next / sigma * (y - inside @ vectors.T)
    return alpha_bar_to**0.5 * moved


FORMS = {
    "03/karras_sigmas": [grid_by_arange, grid_by_linspace, grid_by_loop],
    "03/heun_step": [heun_by_slopes, heun_by_correction],
    "03/late_start": [start_by_count, start_by_mask, start_by_loop],
    "03/revealed": [revealed_by_shares, revealed_by_gain, revealed_by_level],
    "03/to_network_range": [range_by_formula, range_by_factor],
    "03/vp_jump": [jump_by_pieces, jump_by_difference, jump_by_sigmas],
}
