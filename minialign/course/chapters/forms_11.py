"""Chapter 11: right solutions as students write them."""

import math

import torch


def window_by_floor(stage, num_stages, first, last):
    lengths = last - first + 1
    return first + stage * lengths // num_stages


def window_by_math(stage, num_stages, first, last):
    return first + math.floor(stage * (last - first + 1) / num_stages)


def cost_by_parts(num_steps, window, num_branches):
    prefix = num_steps - window
    return prefix + num_branches * window


def cost_by_saving(num_steps, window, num_branches):
    return num_steps * num_branches - (num_branches - 1) * (num_steps - window)


def extremes_by_column(z, positive_threshold, negative_threshold):
    column = torch.arange(z.shape[1])
    best = (column == z.argmax(1, keepdim=True)) & (z >= positive_threshold)
    worst = (column == z.argmin(1, keepdim=True)) & (z < negative_threshold)
    return best | worst


def extremes_by_loop(z, positive_threshold, negative_threshold):
    kept = torch.zeros_like(z, dtype=torch.bool)
    for i in range(len(z)):
        best, worst = z[i].argmax(), z[i].argmin()
        if z[i, best] >= positive_threshold:
            kept[i, best] = True
        if z[i, worst] < negative_threshold:
            kept[i, worst] = True
    return kept


def extremes_by_rows(z, positive_threshold, negative_threshold):
    rows = torch.arange(len(z))
    high, best = z.max(1)
    low, worst = z.min(1)
    kept = torch.zeros(z.shape, dtype=torch.bool)
    kept[rows, best] |= high >= positive_threshold
    kept[rows, worst] |= low < negative_threshold
    return kept


def advantage_by_factor(z):
    b = z.shape[1]
    return (z - z.mean(1, keepdim=True)) * b / (b - 1)


def advantage_by_others(z):
    others = z.sum(1, keepdim=True) - z
    return z - others / (z.shape[1] - 1)


def advantage_by_loop(z):
    columns = []
    for i in range(z.shape[1]):
        others = torch.cat([z[:, :i], z[:, i + 1 :]], 1)
        columns.append(z[:, i] - others.mean(1))
    return torch.stack(columns, 1)


def variances_by_factor(total, inside, q, num_branches):
    factor = num_branches / (num_branches - 1)
    return total + q, factor * (inside + q)


def variances_by_covariance(total, inside, q, num_branches):
    one_group = (inside + q) / (num_branches - 1)
    return 1.0 * total + q, num_branches * one_group


FORMS = {
    "11/progressive_window": [window_by_floor, window_by_math],
    "11/branch_cost": [cost_by_parts, cost_by_saving],
    "11/select_extremes": [extremes_by_column, extremes_by_loop, extremes_by_rows],
    "11/branch_advantage": [advantage_by_factor, advantage_by_others, advantage_by_loop],
    "11/baseline_variances": [variances_by_factor, variances_by_covariance],
}
