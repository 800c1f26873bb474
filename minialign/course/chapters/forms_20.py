"""Chapter 20: right solutions as students write them."""

import torch
from einops import reduce
from torch.nn import functional as F


def logit_by_errors(chosen, rejected, chosen_ref, rejected_ref, noise, beta, reduction):
    dims = tuple(range(1, noise.ndim))
    e = [(p - noise) ** 2 for p in (chosen, rejected, chosen_ref, rejected_ref)]
    if reduction == "sum":
        w, l, w_ref, l_ref = (x.sum(dims) for x in e)  # noqa: E741
        return -beta * ((w - l) - (w_ref - l_ref))
    w, l, w_ref, l_ref = (x.mean(dims) for x in e)  # noqa: E741
    return -beta / 2 * ((w - l) - (w_ref - l_ref))


def logit_by_gains(chosen, rejected, chosen_ref, rejected_ref, noise, beta, reduction):
    def gain(prediction, reference):
        difference = (reference - noise).pow(2) - (prediction - noise).pow(2)
        return getattr(difference.flatten(1), reduction)(-1)

    scale = 0.5 * beta if reduction == "mean" else beta
    return scale * (gain(chosen, chosen_ref) - gain(rejected, rejected_ref))


def logit_by_einops(chosen, rejected, chosen_ref, rejected_ref, noise, beta, reduction):
    def error(prediction):
        return reduce((prediction - noise) ** 2, "n ... -> n", reduction)

    theta = error(chosen) - error(rejected)
    ref = error(chosen_ref) - error(rejected_ref)
    half = 2 if reduction == "mean" else 1
    return beta * (ref - theta) / half


def line_by_errors(chosen, rejected, noise_chosen, noise_rejected, alpha_bar, shift):
    a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def gain(x, e):
        ref = s * (a * x + s * e)
        theta = ref - a * s * shift
        return (ref - e) ** 2 - (theta - e) ** 2

    return gain(chosen, noise_chosen) - gain(rejected, noise_rejected)


def line_by_hand(chosen, rejected, noise_chosen, noise_rejected, alpha_bar, shift):
    var = alpha_bar * (1 - alpha_bar)
    u = 2 * var * shift * (chosen - rejected)
    return u - 2 * var * shift * (alpha_bar / (1 - alpha_bar)) ** 0.5 * (noise_chosen - noise_rejected)


def line_by_logit(chosen, rejected, noise_chosen, noise_rejected, alpha_bar, shift):
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    total = 0
    for sign, x, noise in ((1, chosen, noise_chosen), (-1, rejected, noise_rejected)):
        state = signal * x + sigma * noise
        prediction = sigma * state - signal * sigma * shift
        total = total - sign * ((prediction - noise) ** 2 - (sigma * state - noise) ** 2)
    return total


def slope_by_newton(margins):
    b = torch.tensor(0.0, dtype=torch.float64)
    z = margins.to(torch.float64)
    for _ in range(20):
        p = torch.sigmoid(b * z)
        gradient = -(z * (1 - p)).sum()
        hessian = (z**2 * p * (1 - p)).sum()
        b = b - gradient / hessian
    return b.to(margins)


def slope_by_bisection(margins):
    low, high = -50.0, 50.0
    z = margins.double()
    for _ in range(50):
        middle = (low + high) / 2
        if (z * torch.sigmoid(-middle * z)).sum() > 0:
            low = middle
        else:
            high = middle
    return torch.tensor(middle, dtype=margins.dtype)


def smoothed_by_cases(logit, wrong):
    loss = (1 - wrong) * F.softplus(-logit) + wrong * F.softplus(logit)
    return loss, torch.tensor((1 - wrong) / wrong, dtype=logit.dtype).log()


def smoothed_by_sigmoids(logit, wrong):
    right = 1 - wrong
    loss = -right * F.logsigmoid(logit) - wrong * F.logsigmoid(-logit)
    return loss, torch.logit(torch.tensor(right, dtype=logit.dtype))


def smoothed_by_swap(logit, wrong):
    best = torch.log(torch.tensor(1 - wrong, dtype=logit.dtype)) - torch.log(torch.tensor(wrong, dtype=logit.dtype))
    return -F.logsigmoid(logit) + wrong * logit, best


FORMS = {
    "20/preference_logit": [logit_by_errors, logit_by_gains, logit_by_einops],
    "20/line_logit": [line_by_errors, line_by_hand, line_by_logit],
    "20/fitted_slope": [slope_by_newton, slope_by_bisection],
    "20/smoothed_loss": [smoothed_by_cases, smoothed_by_sigmoids, smoothed_by_swap],
}
