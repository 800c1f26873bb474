"""Chapter 13: right solutions as students write them."""

import torch


def step_by_score(velocity, x, t, t_next, s):
    dt = t_next - t
    noise = x + (1 - t) * velocity
    score = -noise / t
    mean = x + velocity * dt - 0.5 * s**2 * score * dt
    return mean, s * torch.sqrt(-dt)


def step_as_printed(velocity, x, t, t_next, s):
    dt = t_next - t
    mean = x + (velocity + s**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    return mean, torch.sqrt(s**2 * (t - t_next))


def loss_by_where(log_ratio, advantages, velocity, velocity_ref, t, dt, s, clip_range, beta):
    rho = torch.exp(log_ratio)
    clipped = torch.clamp(rho, 1 - clip_range, 1 + clip_range)
    objective = torch.min(rho * advantages, clipped * advantages)
    factor = s * (1 - t) / (2 * t) + 1 / s
    kl = -dt / 2 * factor**2 * ((velocity - velocity_ref) ** 2).sum(-1)
    return -(objective - beta * kl).mean()


def loss_by_means(log_ratio, advantages, velocity, velocity_ref, t, dt, s, clip_range, beta):
    rho = log_ratio.exp()
    loss = torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - clip_range, 1 + clip_range))
    gain = dt * (1 + s**2 * (1 - t) / (2 * t))
    difference = gain[:, None] * (velocity - velocity_ref)
    std = s * (-dt).sqrt()
    kl = 0.5 * ((difference / std[:, None]) ** 2).sum(1)
    return loss.mean() + beta * kl.mean()


def variance_by_loops(slopes, stds):
    total = slopes.new_zeros(())
    for i in range(len(slopes)):
        carried = stds[i]
        for j in range(i + 1, len(slopes)):
            carried = carried * slopes[j]
        total = total + carried**2
    return total


def variance_by_recursion(slopes, stds):
    variance = slopes.new_zeros(())
    for slope, std in zip(slopes, stds, strict=True):
        variance = slope**2 * variance + std**2
    return variance


def variance_by_products(slopes, stds):
    n = len(slopes)
    carried = torch.stack([slopes[i + 1 :].prod() for i in range(n)])
    return ((stds * carried) ** 2).sum()


def nft_by_mixing(velocity, velocity_old, target, r, b):
    old = velocity_old.detach()
    plus = (1 - b) * old + b * velocity
    minus = (1 + b) * old - b * velocity
    good = ((plus - target) ** 2).mean(1)
    bad = ((minus - target) ** 2).mean(1)
    return (r * good + (1 - r) * bad).mean()


def nft_by_elements(velocity, velocity_old, target, r, b):
    old = velocity_old.detach()
    moved = b * (velocity - old)
    good, bad = (old + moved - target).square(), (old - moved - target).square()
    return (r[:, None] * good + (1 - r)[:, None] * bad).mean()


FORMS = {
    "13/sde_step": (step_by_score, step_as_printed),
    "13/flow_grpo_loss": (loss_by_where, loss_by_means),
    "13/tiltable_variance": (variance_by_loops, variance_by_recursion, variance_by_products),
    "13/nft_loss": (nft_by_mixing, nft_by_elements),
}
