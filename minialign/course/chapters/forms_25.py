"""Chapter 25: right solutions as students write them."""

import torch
from torch.nn import functional as F


def harmonic_by_product(image, text, lam):
    if lam == 0:
        return text
    if lam == 1:
        return image
    below = lam * text + (1 - lam) * image
    return torch.where(below > 0, image * text / below.clamp(min=1e-30), 0.0)


def harmonic_by_inverses(image, text, lam):
    if lam in (0, 1):
        return image if lam else text
    return 1 / (lam / image + (1 - lam) / text)


def harmonic_with_torch_where(image, text, lam):
    if lam == 0.0:
        return text.clone()
    if lam == 1.0:
        return image.clone()
    nothing = (image == 0) | (text == 0)
    return torch.where(nothing, torch.zeros_like(image), (lam / image + (1 - lam) / text) ** -1)


def rpo_loss_by_logsigmoid(error_ref, error_gen, base_ref, base_gen, p, beta):
    k = (base_ref.detach() - error_ref) - (base_gen.detach() - error_gen)
    preference = -(p * F.logsigmoid(beta * k) + (1 - p) * F.logsigmoid(-beta * k))
    return error_ref + preference


def rpo_loss_by_softplus(error_ref, error_gen, base_ref, base_gen, p, beta):
    u = beta * (base_ref - error_ref - base_gen + error_gen)
    return error_ref + F.softplus(u) - p * u


def rpo_loss_by_cross_entropy(error_ref, error_gen, base_ref, base_gen, p, beta):
    better = (base_ref - error_ref) - (base_gen - error_gen)
    return error_ref + F.binary_cross_entropy_with_logits(beta * better, p, reduction="none")


def first_step_by_hand(p, beta):
    slope = beta * (0.5 - p)  # d L_pref / dk
    return 1 - slope, slope


def first_step_term_by_term(p, beta):
    slope = beta * (torch.sigmoid(torch.tensor(0.0)).item() - p)
    by_reference, by_generated = -slope, slope
    return 1 + by_reference, by_generated


def first_step_in_one_line(p, beta):
    return 1 + beta * (p - 1 / 2), beta * (1 / 2 - p)


def best_checkpoint_in_a_loop(steps, image, text, lam):
    best, kept = -1.0, None
    for step, i, t in zip(steps, image, text, strict=True):
        reward = harmonic_by_product(i, t, lam).mean().item()
        if reward > best:
            best, kept = reward, step
    return kept


def best_checkpoint_by_argmax(steps, image, text, lam):
    rewards = harmonic_by_product(image, text, lam).mean(dim=1)
    return steps[int(torch.argmax(rewards))]


FORMS = {
    "25/harmonic": (harmonic_by_product, harmonic_by_inverses, harmonic_with_torch_where),
    "25/rpo_loss": (rpo_loss_by_logsigmoid, rpo_loss_by_softplus, rpo_loss_by_cross_entropy),
    "25/first_step": (first_step_by_hand, first_step_term_by_term, first_step_in_one_line),
    "25/best_checkpoint": (best_checkpoint_in_a_loop, best_checkpoint_by_argmax),
}
