"""Policy gradients: advantages, the clipped surrogate, and the three estimators of a KL divergence from samples."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels.gaussian import at_least_float32, same_shape


def whiten(x: Float[Tensor, "*batch"], eps: float = 1e-8) -> Float[Tensor, "*batch"]:
    """(x - mean) / (std + eps), over all elements, population std. A constant x gives exact zeros."""
    x = at_least_float32(x)
    # Equal rewards then differ by an exact 0, where x - x.mean() leaves rounding noise to be divided by eps.
    x = x - x.min()
    return (x - x.mean()) / (x.std(correction=0) + eps)


def group_advantages(
    rewards: Float[Tensor, "batch"], group: Int[Tensor, "batch"], *, scale: bool = True, eps: float = 1e-6
) -> Float[Tensor, "batch"]:
    """Rewards minus their group's mean, over its population std + eps. `group` holds ids in [0, batch).

    Unchanged when the rewards of a group are shifted, or scaled by a positive number (up to eps). A group of one, or of
    equal rewards, gives exact zeros. With scale=False only the mean goes: advantages keep the reward's unit, and a KL
    weight keeps its meaning (sheet ddpo, trap 9).
    """
    same_shape(rewards=rewards, group=group)
    rewards = at_least_float32(rewards)
    count = torch.zeros_like(rewards).index_add(0, group, torch.ones_like(rewards)).clamp_min(1)
    lowest = torch.zeros_like(rewards).scatter_reduce(0, group, rewards, "amin", include_self=False)
    shifted = rewards - lowest[group]  # exact zeros for a constant group, see whiten
    centred = shifted - (torch.zeros_like(rewards).index_add(0, group, shifted) / count)[group]
    if not scale:
        return centred
    variance = torch.zeros_like(rewards).index_add(0, group, centred**2) / count
    return centred / (variance.sqrt() + eps)[group]


def clipped_surrogate(
    log_prob: Float[Tensor, "*any"],
    log_prob_old: Float[Tensor, "*any"],
    advantages: Float[Tensor, "*any"],
    clip_range: float | int,
) -> tuple[Float[Tensor, "*any"], dict[str, Float[Tensor, "*any"]]]:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) with rho = exp(log_prob - log_prob_old): PPO's pessimistic surrogate
    (Schulman et al., 2017, arXiv 1707.06347, eq. 7) as a loss to minimise, an element each, and what is worth knowing
    of each: `approx_kl` (k3 of KL(old || new), nats) and `clip_fraction` (1 where the ratio lies outside).

    Masks, weights and means stand with the caller. Limits: at log_prob == log_prob_old the loss is -A, its gradient
    -A grad log_prob. The gradient vanishes only where going on would pay: ratio > 1 + eps and A > 0, or the mirror
    image. Raises ValueError for shapes that would have to be broadcast.
    """
    same_shape(log_prob=log_prob, log_prob_old=log_prob_old, advantages=advantages)
    log_ratio = at_least_float32(log_prob) - at_least_float32(log_prob_old)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    with torch.no_grad():
        info = {"approx_kl": kl_k3(-log_ratio), "clip_fraction": (ratio != clipped).to(ratio.dtype)}
    return loss, info


def weighted_sums(
    values: dict[str, Float[Tensor, "*any"]], weight: Float[Tensor, "*any"]
) -> dict[str, Float[Tensor, ""]]:
    """{name: sum of weight * value}: a mean, where the weights sum to 1."""
    same_shape(weight=weight, **values)
    return {name: (weight * value).sum() for name, value in values.items()}


def means(values: dict[str, Float[Tensor, "*any"]]) -> dict[str, Float[Tensor, ""]]:
    """{name: mean over all elements}."""
    return {name: value.mean() for name, value in values.items()}


def kl_k1(log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) from x ~ p with log_ratio = log p(x) - log q(x): unbiased, and often negative on a sample."""
    return log_ratio


def kl_k2(log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log_ratio^2 / 2: never negative, biased, low variance; its gradient under x ~ p is the KL's (Schulman, 2020)."""
    return 0.5 * log_ratio**2


def kl_k3(log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) from x ~ p as q/p - 1 - log(q/p): unbiased AND never negative.

    With log_ratio = log p - log q. Turned round it estimates a chi-squared minus a KL instead: mind the direction.
    """
    return torch.expm1(-log_ratio) + log_ratio
