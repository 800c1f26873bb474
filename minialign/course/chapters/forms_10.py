"""Chapter 10: right solutions as students write them."""

import torch

from minialign.kernels import whiten


def group_by_loop(rewards, group, eps):
    advantages = torch.zeros_like(rewards)
    for g in group.unique():
        own = rewards[group == g]
        advantages[group == g] = (own - own.mean()) / (own.std(correction=0) + eps)
    return advantages


def group_by_index(rewards, group, eps):
    _, place = group.unique(return_inverse=True)
    zeros = rewards.new_zeros(int(place.max()) + 1)
    count = zeros.index_add(0, place, torch.ones_like(rewards))
    mean = zeros.index_add(0, place, rewards) / count
    gap = rewards - mean[place]
    std = (zeros.index_add(0, place, gap**2) / count).sqrt()
    return gap / (std[place] + eps)


def group_by_table(rewards, group, eps):
    same = (group[:, None] == group[None, :]).to(rewards.dtype)
    count = same.sum(1)
    mean = same @ rewards / count
    var = (same * (rewards[None, :] - mean[:, None]) ** 2).sum(1) / count
    return (rewards - mean) / (var.sqrt() + eps)


def running_in_two_loops(buffers, prompts, rewards, buffer_size, min_count):
    buffers = {prompt: list(held) for prompt, held in buffers.items()}
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        held = [*buffers.get(prompt, []), reward]
        buffers[prompt] = held[-buffer_size:]
    advantages = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        held = torch.tensor(buffers[prompt], dtype=rewards.dtype)
        values = held if len(held) >= min_count else rewards
        advantages.append((reward - values.mean()) / (values.std(correction=0) + 1e-6))
    return torch.stack(advantages), buffers


def running_by_append(buffers, prompts, rewards, buffer_size, min_count):
    new = {}
    for prompt in buffers:
        new[prompt] = buffers[prompt][:]
    for i in range(len(prompts)):
        held = new.setdefault(prompts[i], [])
        held.append(rewards[i].item())
        if len(held) > buffer_size:
            held.pop(0)
    advantages = torch.zeros_like(rewards)
    for i in range(len(prompts)):
        mean, std = rewards.mean(), rewards.std(correction=0)
        if len(new[prompts[i]]) >= min_count:
            values = torch.tensor(new[prompts[i]], dtype=rewards.dtype)
            mean, std = values.mean(), values.std(correction=0)
        advantages[i] = (rewards[i] - mean) / (std + 1e-6)
    return advantages, new


def surrogate_by_losses(log_prob, log_prob_old, advantages, clip_range):
    ratio = (log_prob - log_prob_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def surrogate_by_gains(log_prob, log_prob_old, advantages, clip_range):
    ratio = torch.exp(log_prob - log_prob_old)
    gains = advantages * ratio
    clipped = advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -torch.min(gains, clipped).mean()


def surrogate_by_sign(log_prob, log_prob_old, advantages, clip_range):
    ratio = (log_prob - log_prob_old).exp()
    high, low = ratio.clamp(max=1 + clip_range), ratio.clamp(min=1 - clip_range)
    return -torch.where(advantages >= 0, advantages * high, advantages * low).mean()


def kl_by_gap(noise_pred, noise_pred_ref, gain, std):
    squared = (noise_pred - noise_pred_ref).flatten(1).square().sum(1)
    return gain**2 * squared / (2 * std**2)


def kl_by_means(noise_pred, noise_pred_ref, gain, std):
    shape = (-1,) + (1,) * (noise_pred.ndim - 1)
    gap = gain.view(shape) * noise_pred - gain.view(shape) * noise_pred_ref
    return (gap**2 / (2 * std.view(shape) ** 2)).flatten(1).sum(1)


def kl_by_norm(noise_pred, noise_pred_ref, gain, std):
    distance = gain.abs() * (noise_pred - noise_pred_ref).flatten(1).norm(dim=1)
    return 0.5 * (distance / std) ** 2


def theta_by_formula(gain, downstream, std, beta):
    return downstream * std**2 / (beta * gain)


def theta_by_slopes(gain, downstream, std, beta):
    slope = gain * downstream
    curvature = beta * gain**2 / std**2
    return slope / curvature


def repaired_by_hand(log_prob, log_prob_old, rewards, clip_range):
    ratio = (log_prob - log_prob_old).exp()
    advantages = whiten(rewards.squeeze(-1))
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def repaired_with_own_whitening(log_prob, log_prob_old, rewards, clip_range):
    flat = rewards[:, 0]
    advantages = (flat - flat.mean()) / (flat.std(correction=0) + 1e-8)
    ratio = torch.exp(log_prob - log_prob_old)
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -torch.min(advantages * ratio, advantages * clipped).mean()


FORMS = {
    "10/group_advantages": [group_by_loop, group_by_index, group_by_table],
    "10/running_advantages": [running_in_two_loops, running_by_append],
    "10/clipped_surrogate": [surrogate_by_losses, surrogate_by_gains, surrogate_by_sign],
    "10/step_kl": [kl_by_gap, kl_by_means, kl_by_norm],
    "10/best_theta": [theta_by_formula, theta_by_slopes],
    "10/repaired_loss": [repaired_by_hand, repaired_with_own_whitening],
}
