"""Token sequences: log-probabilities indexed by the action, masked statistics, token rewards and advantages (PPO).

Axes: b responses, t tokens of a response, v vocabulary, k value heads. `mask` is True on the tokens of a response, its
EOS included, and False behind the end; what stands there, nan even, changes nothing. Sheet: Ziegler et al., 2019,
arXiv 1909.08593; Schulman et al., 2016, arXiv 1506.02438 (GAE).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minialign.kernels.gaussian import at_least_float32, same_shape


def token_log_probs(
    logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"], temperature: float | int = 1.0
) -> Float[Tensor, "b t"]:
    """log softmax(logits / temperature) at `tokens`: logits[:, i] must be those that predict tokens[:, i]."""
    same_shape(logits=logits[..., 0], tokens=tokens)
    log_probs = (at_least_float32(logits) / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Float[Tensor, "b t v"], temperature: float | int = 1.0) -> Float[Tensor, "b t"]:
    """Entropy of each next-token distribution, nats: log v where it is uniform. Tokens of logit -inf count 0."""
    log_probs = (at_least_float32(logits) / temperature).log_softmax(-1)
    finite = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)  # 0 * -inf would be nan
    return -(log_probs.exp() * finite).sum(-1)


def sample_tokens(
    logits: Float[Tensor, "b v"], uniform: Float[Tensor, "b"], temperature: float | int = 1.0
) -> Int[Tensor, "b"]:
    """Inverse transform: the first token whose cumulative probability exceeds `uniform`, in [0, 1); float64 if that is.

    One number a token is all the randomness, so that a response depends on its own noise and not on its batch.
    """
    same_shape(logits=logits[..., 0], uniform=uniform)
    logits = logits.to(torch.promote_types(logits.dtype, uniform.dtype))
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    # Rounding leaves the last sum near 1, not at 1; measured against it, no token of probability 0 is ever drawn.
    threshold = (uniform * cumulative[:, -1]).unsqueeze(-1)
    return (cumulative <= threshold).sum(-1).clamp_max(logits.shape[-1] - 1)


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*rest"]:
    """Mean of x where mask is True, over all elements or along `dim`; 0 where nothing is."""
    same_shape(x=x, mask=mask)
    x = torch.where(mask, at_least_float32(x), 0.0)
    if dim is None:
        return x.sum() / mask.sum().clamp_min(1)
    return x.sum(dim) / mask.sum(dim).clamp_min(1)


def masked_whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    shift_mean: bool = True,
    correction: int = 0,
    eps: float | Float[Tensor, ""] = 1e-8,
) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + eps) over the True elements; 0 elsewhere. A constant x gives exact zeros.

    correction: 0 for the population's variance (Ziegler), 1 for Bessel's (TRL). shift_mean=False puts the mean back:
    a whitened reward must keep its sign.
    """
    same_shape(x=x, mask=mask)
    x, count = at_least_float32(x), mask.sum()
    # Equal values then differ by an exact 0, as in `whiten`.
    lowest = torch.where(mask, x, torch.inf).amin()
    shifted = torch.where(mask, x - lowest, 0.0)
    mean = shifted.sum() / count.clamp_min(1)
    centred = torch.where(mask, shifted - mean, 0.0)
    var = (centred**2).sum() / (count - correction).clamp_min(1)
    whitened = centred / (var + eps).sqrt()
    return whitened if shift_mean else torch.where(mask, whitened + mean + lowest, 0.0)


def standardise_heads(
    advantages: Float[Tensor, "b t heads"], mask: Bool[Tensor, "b t"], floor: Float[Tensor, "heads"] | float = 1e-8
) -> Float[Tensor, "b t heads"]:
    """Each head to mean 0 and variance 1 (Bessel; + floor^2) over the valid tokens, by itself; 0 behind the end.

    floor, in the head's units: a spread far below it is rounding, and must not become signal.
    """
    floors = torch.as_tensor(floor, device=advantages.device, dtype=torch.float32).expand(advantages.shape[-1])
    heads = zip(advantages.unbind(-1), (floors**2).unbind(), strict=True)
    return torch.stack([masked_whiten(head, mask, eps=eps, correction=1) for head, eps in heads], -1)


def group_baselines(
    to_come: Float[Tensor, "b t heads"], mask: Bool[Tensor, "b t"], group: Int[Tensor, "b"]
) -> Float[Tensor, "b t heads"]:
    """At each action and head the mean, over the episodes of a group that get so far, of what is still to come."""
    same_shape(to_come=to_come[..., 0], mask=mask)
    valid = mask.unsqueeze(-1).to(to_come)
    same = (group.unsqueeze(0) == group.unsqueeze(1)).to(to_come)
    totals = torch.einsum("ij,jth->ith", same, to_come * valid)
    return totals / torch.einsum("ij,jth->ith", same, valid).clamp_min(1)


def last_token(mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True on the last valid token of each row (its EOS, if it has one), nowhere in a row without tokens."""
    return mask & ~_next(mask)


def _next(x: Tensor) -> Tensor:
    """x[:, 1:] with 0 (False) behind the end."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


def token_rewards(
    scores: Float[Tensor, "b"],
    log_prob: Float[Tensor, "b t"],
    log_prob_ref: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    beta: float | int | Float[Tensor, ""],
) -> Float[Tensor, "b t"]:
    """R_t = -beta (log pi - log pi_ref), and the score on the last token (Ziegler et al., eq. 2). No gradient.

    Over a row they sum to score - beta log pi(y) / pi_ref(y): the k1 estimate of KL(pi || pi_ref), often negative.
    """
    same_shape(log_prob=log_prob, log_prob_ref=log_prob_ref, mask=mask)
    same_shape(scores=scores, mask=mask[:, 0])
    penalty = torch.where(mask, at_least_float32(log_prob.detach()) - at_least_float32(log_prob_ref.detach()), 0.0)
    score = torch.where(last_token(mask), at_least_float32(scores.detach()).unsqueeze(1), 0.0)
    return score - beta * penalty


def gae(
    rewards: Float[Tensor, "b t *k"],
    values: Float[Tensor, "b t *k"],
    mask: Bool[Tensor, "b t"],
    gamma: float | int = 1.0,
    gae_lambda: float | int = 0.95,
) -> tuple[Float[Tensor, "b t *k"], Float[Tensor, "b t *k"]]:
    """(advantages, returns): A_t = delta_t + gamma lambda A_{t+1}, delta_t = R_t + gamma V_{t+1} - V_t; returns A + V.

    values[:, i] is of the state before token i; behind the last token V = 0: the episode is over, whether by EOS or by
    the limit on tokens. One head, or k of them, each with rewards of its own. lambda = 1: sum of the rewards to come
    minus V. lambda = 0: delta. Not whitened. Gradients do pass; call it on detached values.
    """
    same_shape(rewards=rewards, values=values)
    same_shape(values=values.flatten(2)[..., 0] if values.ndim > 2 else values, mask=mask)
    valid = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    values = torch.where(valid, at_least_float32(values), 0.0)
    advantages = torch.where(valid, at_least_float32(rewards) + gamma * _next(values) - values, 0.0)
    # Doubling: with sums over s terms at hand, sums over 2 s are A_t + (gamma lambda)^s A_{t+s}; log2(t) additions.
    span, steps = 1, mask.shape[1]
    while span < steps:
        ahead = torch.cat([advantages[:, span:], torch.zeros_like(advantages[:, :span])], 1)
        advantages, span = advantages + (gamma * gae_lambda) ** span * ahead, 2 * span
    return advantages, advantages + values


def clipped_value_loss(
    values: Float[Tensor, "*any"],
    values_old: Float[Tensor, "*any"],
    returns: Float[Tensor, "*any"],
    clip_range: float | int,
) -> Float[Tensor, "*any"]:
    """0.5 max((V - G)^2, (V_old + clip(V - V_old) - G)^2), an element each: reduce it with `masked_mean`.

    Limits: at V = V_old, or with an infinite clip_range, half the squared error. The gradient vanishes only where V has
    moved more than clip_range TOWARDS the return; a move away from it is never excused.
    """
    same_shape(values=values, values_old=values_old, returns=returns)
    clipped = values_old + (values - values_old).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
