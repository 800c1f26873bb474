"""Chapter 14: right solutions as students write them."""

import torch
from einops import rearrange


def gaps_by_paths(log_prob, log_prob_ref, beta):
    score = beta * (log_prob - log_prob_ref).sum(2)
    return score[:, :, None] - score[:, None, :]


def gaps_by_sums(log_prob, log_prob_ref, beta):
    now, before = log_prob.sum(-1), log_prob_ref.sum(-1)
    r_hat = now - before
    return beta * (r_hat.unsqueeze(2) - r_hat.unsqueeze(1))


def gaps_by_einops(log_prob, log_prob_ref, beta):
    q = log_prob - log_prob_ref
    first, second = rearrange(q, "n i t -> n i 1 t"), rearrange(q, "n j t -> n 1 j t")
    return (beta * (first - second)).sum(-1)


def loss_by_matrices(log_prob, log_prob_old, log_prob_ref, rewards, beta, clip_range):
    q, q_old = log_prob - log_prob_ref, log_prob_old - log_prob_ref
    q_clip = torch.clamp(q, q_old - clip_range, q_old + clip_range)
    true = rewards[:, :, None] - rewards[:, None, :]
    score, clipped = beta * q.sum(2), beta * q_clip.sum(2)
    error = (score[:, :, None] - score[:, None, :] - true) ** 2
    error_clip = (clipped[:, :, None] - clipped[:, None, :] - true) ** 2
    b = rewards.shape[1]
    return torch.maximum(error, error_clip).sum() / (len(rewards) * b * (b - 1))


def loss_by_pairs(log_prob, log_prob_old, log_prob_ref, rewards, beta, clip_range):
    change = (log_prob - log_prob_old).clamp(-clip_range, clip_range)
    plain = (log_prob - log_prob_ref).sum(2)
    clipped = (log_prob_old + change - log_prob_ref).sum(2)
    i, j = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1)
    target = rewards[:, i] - rewards[:, j]
    errors = [(beta * (r_hat[:, i] - r_hat[:, j]) - target).square() for r_hat in (plain, clipped)]
    return torch.maximum(errors[0], errors[1]).mean()


def loss_by_gaps(log_prob, log_prob_old, log_prob_ref, rewards, beta, clip_range):
    low, high = log_prob_old - clip_range, log_prob_old + clip_range
    near = torch.minimum(torch.maximum(log_prob, low), high)
    true = gaps_by_paths(rewards.unsqueeze(2), torch.zeros_like(rewards).unsqueeze(2), 1.0)
    loss = (gaps_by_paths(log_prob, log_prob_ref, beta) - true).pow(2)
    loss = torch.max(loss, (gaps_by_paths(near, log_prob_ref, beta) - true).pow(2))
    b = rewards.size(1)
    return (loss.sum(dim=(1, 2)) / (b * b - b)).mean()


def pull_by_errors(predicted, rewards):
    error = predicted - rewards
    return 4 / (rewards.shape[1] - 1) * (error - error.mean(dim=1, keepdim=True))


def pull_by_pairs(predicted, rewards):
    error, b = predicted - rewards, rewards.shape[1]
    gaps = error[:, :, None] - error[:, None, :]
    return 4 * gaps.sum(2) / (b * (b - 1))


def pull_by_autograd(predicted, rewards):
    v = predicted.clone().requires_grad_()
    e, b = v - rewards, rewards.shape[1]
    loss = (e[:, :, None] - e[:, None, :]).square().sum() / (b * (b - 1))
    return torch.autograd.grad(loss, v)[0]


def shifts_by_steps(std, downstream, beta):
    steps = downstream * std**2 / beta
    return steps, (steps * downstream).sum()


def shifts_by_variance(std, downstream, beta):
    variance = std.square()
    return variance / beta * downstream, (downstream.square() * variance).sum() / beta


def shifts_by_dot(std, downstream, beta):
    steps = std * std * downstream
    return steps / beta, downstream @ steps / beta


FORMS = {
    "14/predicted_gaps": [gaps_by_paths, gaps_by_sums, gaps_by_einops],
    "14/proximal_loss": [loss_by_matrices, loss_by_pairs, loss_by_gaps],
    "14/pull": [pull_by_errors, pull_by_pairs, pull_by_autograd],
    "14/best_shifts": [shifts_by_steps, shifts_by_variance, shifts_by_dot],
}
