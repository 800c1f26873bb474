"""Chapter 21: right solutions as students write them."""

import math

import torch
from torch.nn import functional as F


def loss_by_ratios(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
    ratio_w = torch.exp(chosen - chosen_ref).clamp(1 - clip_range, 1 + clip_range)
    ratio_l = torch.exp(rejected - rejected_ref).clamp(1 - clip_range, 1 + clip_range)
    logit = beta * (ratio_w.log() - ratio_l.log())
    return -F.logsigmoid(logit).mean()


def loss_by_bounds(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
    low, high = math.log(1 - clip_range), math.log(1 + clip_range)
    better = (chosen - chosen_ref).clamp(low, high)
    worse = (rejected - rejected_ref).clamp(low, high)
    return F.softplus(beta * (worse - better)).mean()


def loss_by_sides(chosen, rejected, chosen_ref, rejected_ref, beta, clip_range):
    log_ratio = torch.stack([chosen - chosen_ref, rejected - rejected_ref])
    kept = log_ratio.exp().clip(1 - clip_range, 1 + clip_range).log()
    logit = beta * kept[0] - beta * kept[1]
    return -logit.sigmoid().log().mean()


def slopes_by_formula(chosen, rejected, beta, clip_range):
    low, high = math.log(1 - clip_range), math.log(1 + clip_range)
    u = beta * (chosen.clamp(low, high) - rejected.clamp(low, high))
    pull = beta * torch.sigmoid(-u)
    w_inside = ((chosen >= low) & (chosen <= high)).to(pull)
    l_inside = ((rejected >= low) & (rejected <= high)).to(pull)
    return -pull * w_inside, pull * l_inside


def slopes_by_where(chosen, rejected, beta, clip_range):
    ratio_w, ratio_l = chosen.exp(), rejected.exp()
    near_w = ratio_w.clamp(1 - clip_range, 1 + clip_range)
    near_l = ratio_l.clamp(1 - clip_range, 1 + clip_range)
    pull = beta * torch.sigmoid(beta * (near_l.log() - near_w.log()))
    zero = torch.zeros_like(pull)
    return torch.where(ratio_w == near_w, -pull, zero), torch.where(ratio_l == near_l, pull, zero)


def slopes_by_autograd(chosen, rejected, beta, clip_range):
    w = chosen.detach().clone().requires_grad_()
    l = rejected.detach().clone().requires_grad_()  # noqa: E741
    near = [x.exp().clamp(1 - clip_range, 1 + clip_range).log() for x in (w, l)]
    loss = F.softplus(-beta * (near[0] - near[1])).sum()
    return torch.autograd.grad(loss, (w, l))


def dominates_by_labels(first, second):
    label = torch.full_like(first[0], 0.5)
    no_worse, no_better = (first >= second).all(0), (first <= second).all(0)
    label[no_worse & ~no_better] = 1.0
    label[no_better & ~no_worse] = 0.0
    return label


def dominates_by_differences(first, second):
    gap = first - second
    wins = (gap.amin(0) >= 0) & (gap.amax(0) > 0)
    loses = (gap.amax(0) <= 0) & (gap.amin(0) < 0)
    return 0.5 + 0.5 * wins.float() - 0.5 * loses.float()


def dominates_by_where(first, second):
    better, worse = (first > second).any(0), (first < second).any(0)
    tie = torch.full_like(first[0], 0.5)
    return torch.where(better & ~worse, torch.ones_like(tie), torch.where(worse & ~better, torch.zeros_like(tie), tie))


def shift_by_variance(std, slope, beta):
    variance = std * std
    return variance * slope / beta


def shift_by_slopes(std, slope, beta):
    per_shift = beta / std**2
    return slope / per_shift


FORMS = {
    "21/preference_loss": [loss_by_ratios, loss_by_bounds, loss_by_sides],
    "21/slopes": [slopes_by_formula, slopes_by_where, slopes_by_autograd],
    "21/dominates": [dominates_by_labels, dominates_by_differences, dominates_by_where],
    "21/best_shift": [shift_by_variance, shift_by_slopes],
}
