"""Exact answers for discrete laws, kept as log-probabilities on the last axis: tilts, I-projections, best of n."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def exponential_tilt(
    log_prob_ref: Float[Tensor, "*batch n"], reward: Float[Tensor, "*#batch n"], beta: float
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch"]]:
    """The KL-regularised optimum pi* = pi_ref exp(reward / beta) / Z, as (log pi*, log Z).

    beta is the KL weight, reward per nat: pi* maximises E[reward] - beta KL(pi || pi_ref), with value beta log Z.
    `log_prob_ref` must be normalised for log Z to mean that; outcomes of probability zero (-inf) keep it.
    Limits: beta -> infinity gives pi_ref; beta -> 0 gives pi_ref restricted to the best outcomes. beta <= 0 raises.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive KL weight (to minimise a reward, negate it)")
    tilted = log_prob_ref + reward / beta
    log_z = tilted.logsumexp(-1)
    return tilted - log_z.unsqueeze(-1), log_z


def discrete_kl(log_p: Float[Tensor, "*batch n"], log_q: Float[Tensor, "*#batch n"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats, enumerated; outcomes with p = 0 count nothing, q = 0 < p gives infinity."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, torch.zeros_like(terms), terms).sum(-1)


class Frontier(NamedTuple):
    """Along the tilt, one entry per beta: KL(pi* || pi_ref) in nats, mean proxy and mean gold reward under pi*."""

    kl: Float[Tensor, "betas"]
    proxy: Float[Tensor, "betas"]
    gold: Float[Tensor, "betas"]


def gold_kl_frontier(
    log_prob_ref: Float[Tensor, "n"],
    proxy: Float[Tensor, "n"],
    gold: Float[Tensor, "n"],
    betas: Float[Tensor, "betas"],
) -> Frontier:
    """What optimising `proxy` alone does to `gold`: the exact tilts by proxy / beta (Gao et al., 2210.10760).

    Limits: with gold == proxy the two means are equal and fall as beta rises; beta -> infinity gives the reference's.
    """
    log_probs = torch.stack([exponential_tilt(log_prob_ref, proxy, float(beta))[0] for beta in betas])
    probs = log_probs.exp()
    return Frontier(discrete_kl(log_probs, log_prob_ref), probs @ proxy, probs @ gold)


def i_projection(
    log_prob_ref: Float[Tensor, "n"],
    features: Float[Tensor, "n k"],
    targets: Float[Tensor, "k"],
    *,
    tol: float = 1e-10,
    max_iter: int = 200,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "k"]]:
    """The law nearest to pi_ref in KL(pi || pi_ref) with E_pi[features] = targets, as (log pi, multipliers).

    pi = pi_ref exp(features @ multipliers) / Z (Csiszar's I-projection), found by damped Newton on the convex dual
    log Z(multipliers) - multipliers . targets. `tol` bounds the largest moment error, in units of the features' range.
    Redundant features are fine (the law is unique, the multipliers are then one choice of many).
    On the edge of the features' convex hull the true multipliers are infinite: the law returned meets the targets to
    `tol` with large ones. Outside the hull no law has these means, and that raises ValueError.
    """
    support = log_prob_ref > -math.inf
    ref, feats = log_prob_ref[support], features[support]
    rounding = 16 * torch.finfo(feats.dtype).eps
    tol = max(tol, rounding)
    span = (feats.amax(0) - feats.amin(0)).clamp_min(torch.finfo(feats.dtype).tiny)
    centred = (feats - targets) / span  # solve in units of the range: one tolerance, one ridge for every feature
    dual = torch.zeros_like(targets)
    # Weak duality: a law on the support with these means has KL >= -value, and no law there has KL > -min(log ref).
    limit = float(ref.min()) - 1e-6
    value, log_prob = _dual(ref, centred, dual)
    ridge = None
    for _ in range(max_iter):
        prob = log_prob.exp()
        error = prob @ centred
        if error.abs().max() <= tol:
            full = torch.full_like(log_prob_ref, -math.inf)
            full[support] = log_prob
            return full, dual / span
        if float(value) < limit:
            break
        deviation = centred - error
        hessian = deviation.T @ (prob.unsqueeze(-1) * deviation)
        # Relative to the first Hessian: as an infeasible target drives pi onto a face, curvature dies out and the
        # ridge turns Newton's step into a long gradient step, which reaches the infeasibility bound quickly.
        ridge = hessian.trace() * 1e-10 + rounding if ridge is None else ridge
        direction = -torch.linalg.solve(hessian + ridge * torch.eye(len(dual)).to(hessian), error)
        step, slope = 1.0, error @ direction
        while step > 1e-12:
            candidate = dual + step * direction
            new_value, new_log_prob = _dual(ref, centred, candidate)
            if new_value <= value + 1e-4 * step * slope + rounding * value.abs().clamp_min(1):
                break  # enough decrease, up to what this precision can see
            step /= 2
        dual, value, log_prob = candidate, new_value, new_log_prob
    raise ValueError(
        f"no law on the reference's support has feature means {_short(targets)}: they lie outside the convex hull of "
        f"the features (each by itself reaches from {_short(feats.amin(0))} to {_short(feats.amax(0))})."
    )


def _dual(ref: Tensor, centred: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    tilted = ref + centred @ dual
    log_z = tilted.logsumexp(-1)
    return log_z, tilted - log_z


def _short(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]


class BestOfN(NamedTuple):
    """`log_prob` of each outcome; its exact `kl` to the reference in nats; the usual `bound` log n - (n - 1) / n."""

    log_prob: Float[Tensor, "*batch n"]
    kl: Float[Tensor, "*batch"]
    bound: float


def best_of_n(log_prob_ref: Float[Tensor, "*batch n"], reward: Float[Tensor, "*batch n"], n: int) -> BestOfN:
    """The law of the highest-reward draw among n independent ones from pi_ref; ties are broken at random.

    With F the reference's cumulative probability by reward, a set of equal rewards is chosen with probability
    F_up^n - F_below^n and shared in proportion to pi_ref. `log_prob_ref` must be normalised.
    Limits: n = 1 and a constant reward give pi_ref, KL 0. The KL never exceeds the bound and tends to it as all
    atoms shrink and ties vanish. n < 1 raises.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least one draw")
    ranked, order = reward.sort(-1)
    cumulative = log_prob_ref.gather(-1, order).logcumsumexp(-1)
    cumulative = cumulative - cumulative[..., -1:]  # log F, exactly 0 at the top: n multiplies its rounding error
    bottom = torch.full_like(cumulative[..., :1], -math.inf)
    padded = torch.cat([bottom, cumulative], -1)
    log_up = padded.gather(-1, torch.searchsorted(ranked, ranked, right=True))
    log_below = padded.gather(-1, torch.searchsorted(ranked, ranked))
    drop = log_below - log_up
    # log of (F_up^n - F_below^n) / (F_up - F_below); numerator and denominator share `drop`, so its rounding cancels,
    # and where an atom is too small to move F at all their ratio is its limit, n F^(n-1).
    ratio = torch.where(drop < 0, torch.log(torch.expm1(n * drop) / torch.expm1(drop)), math.log(n))
    log_gain = torch.empty_like(ratio).scatter(-1, order, (n - 1) * log_up + ratio)
    possible = log_prob_ref > -math.inf
    log_prob = torch.where(possible, log_prob_ref + log_gain, torch.full_like(log_prob_ref, -math.inf))
    return BestOfN(log_prob, discrete_kl(log_prob, log_prob_ref), math.log(n) - (n - 1) / n)
