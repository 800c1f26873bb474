"""Preference losses on log-ratios: how much more probable than the reference a policy makes what was preferred.

A log-ratio log pi(x) - log pi_ref(x) is in nats, and reward is beta times it. Pairs are (chosen, rejected), in that
order; a label is 1 where the first wins, 1/2 where neither does, or 1 where a sample alone is desirable.

    what stands for the log-ratio       denoising_log_ratio   a drop of the training error: no density is needed
                                        clipped_log_ratio     one denoising step, held within a trust region
                                        sequence_log_ratio    the tokens of a text
    a loss on logit = beta (chosen - rejected)                dpo_loss, soft_label_loss, hinge_loss
    one on the log-ratios themselves                          ipo_loss, kto_loss
    of scores                           preference_probability, with or without ties
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from minialign.kernels.gaussian import at_least_float32, same_shape

Target = Literal["epsilon", "v_prediction", "sample", "flow"]


def error_weight(
    measured: Target, wanted: Target, signal: Float[Tensor, "*any"], noise: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """What turns squared errors of one target into those of another, at x_t = signal x_0 + noise eps.

    Whichever a network predicts, the state fixes the rest: an error d of eps is one of -d noise / signal of x_0, of
    d / signal of v (signal^2 + noise^2 = 1) and of d / signal of a flow's velocity (signal = 1 - t, noise = t).
    Limits: 1 where the two are the same; at noise alone (signal 0) an error of a velocity is one of x_0, and says
    nothing of eps (0); one of eps there says all too much of the others (inf).
    """
    one = torch.ones_like(signal)
    scaled = {"epsilon": signal, "sample": noise, "v_prediction": one, "flow": one}  # signal d of each: finite at 0
    if measured == wanted:
        return one
    return (scaled[wanted] / scaled[measured]) ** 2


def denoising_log_ratio(error: Float[Tensor, "*any"], error_reference: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """-(error - error_reference) / 2, squared errors of the same noisy sample: > 0 where theta denoises it better.

    Up to the weight of its noise level, which beta absorbs, the bound on log pi - log pi_ref of Wallace et al. (2023,
    arXiv 2311.12908, eq. 14). No gradient reaches the reference.
    """
    same_shape(error=error, error_reference=error_reference)
    return (at_least_float32(error_reference).detach() - at_least_float32(error)) / 2


def clipped_log_ratio(log_ratio: Float[Tensor, "*any"], clip_range: float | int) -> Float[Tensor, "*any"]:
    """log clip(exp(log_ratio), 1 - clip_range, 1 + clip_range): a denoising step's, within a trust region.

    The gradient is 0 outside, in both directions: what has left is not pulled back. inf: not clipped. clip_range is
    below 1 or inf; 1 and more would allow a ratio of 0, whose logarithm is -inf.
    """
    log_ratio = at_least_float32(log_ratio)
    if clip_range == math.inf:
        return log_ratio
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range is {clip_range}; expected a number between 0 and 1, or inf for no clipping.")
    return log_ratio.clamp(math.log1p(-clip_range), math.log1p(clip_range))


def sequence_log_ratio(
    log_prob: Float[Tensor, "*batch t"],
    log_prob_reference: Float[Tensor, "*batch t"],
    mask: Float[Tensor, "*batch t"],
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, "*batch"]:
    """A text's log pi - log pi_ref from those of its tokens; mask: 1 where a token counts, 0 at padding and prompt.

    "mean" divides by the number of tokens (length-normalised DPO); a text without any has 0. Masked places may hold
    anything, nan too.
    """
    same_shape(log_prob=log_prob, log_prob_reference=log_prob_reference, mask=mask)
    difference = at_least_float32(log_prob) - at_least_float32(log_prob_reference).detach()
    total = torch.where(mask > 0, difference, 0.0).sum(-1)
    return total if reduction == "sum" else total / mask.sum(-1).clamp_min(1)


def dpo_loss(
    chosen: Float[Tensor, "*any"], rejected: Float[Tensor, "*any"], beta: float | int
) -> Float[Tensor, "*any"]:
    """-log sigmoid(beta (chosen - rejected)), a pair each (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

    Limits: log 2 where the log-ratios agree, its gradient there -beta / 2 (grad chosen - grad rejected); a pair of one
    and the same sample has no gradient, at any weights.
    """
    same_shape(chosen=chosen, rejected=rejected)
    return F.softplus(-beta * (at_least_float32(chosen) - at_least_float32(rejected)))


def soft_label_loss(logit: Float[Tensor, "*any"], label: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """-p log sigmoid(u) - (1 - p) log sigmoid(-u), p = label the probability that the first wins (conservative DPO).

    Unlike DPO's, finite at its minimum: u = log(p / (1 - p)). Limits: label 1 is `dpo_loss`; label 1/2 has the minimum
    log 2 at u = 0. Swapping the pair, u -> -u and p -> 1 - p, changes nothing.
    """
    same_shape(logit=logit, label=label)
    logit, label = at_least_float32(logit), at_least_float32(label)
    return label * F.softplus(-logit) + (1 - label) * F.softplus(logit)


def hinge_loss(logit: Float[Tensor, "*any"], margin: float | int = 1.0) -> Float[Tensor, "*any"]:
    """max(0, margin - u): SLiC's (Zhao et al., 2023, arXiv 2305.10425). No gradient beyond the margin."""
    return (margin - at_least_float32(logit)).clamp_min(0)


def ipo_loss(
    chosen: Float[Tensor, "*any"], rejected: Float[Tensor, "*any"], beta: float | int
) -> Float[Tensor, "*any"]:
    """(chosen - rejected - 1 / (2 beta))^2 (Azar et al., 2023, arXiv 2310.12036, eq. 17): a margin to be met, not
    exceeded, so that labels without noise have a finite optimum too."""
    same_shape(chosen=chosen, rejected=rejected)
    return (at_least_float32(chosen) - at_least_float32(rejected) - 1 / (2 * beta)).square()


def pair_accuracy(chosen: Float[Tensor, "*any"], rejected: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """1 where the chosen one has more, 0 where it has less, 1/2 where they are equal, as all are at the reference.

    Of log-ratios: the accuracy of the implicit reward beta (log pi - log pi_ref). Its mean is the share of pairs.
    """
    same_shape(chosen=chosen, rejected=rejected)
    difference = at_least_float32(chosen) - at_least_float32(rejected)
    return (difference.sign() + 1) / 2


def preference_probability(
    difference: Float[Tensor, "*any"], scale: float | int = 1.0, tie: float | int = 0.0
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """(first wins, neither, second wins) by the difference of two scores, first - second.

    Bradley and Terry (1952): sigmoid(scale difference), and never a tie. With tie = log theta > 0, Rao and Kupper's
    (1967): a win needs a lead, sigmoid(scale difference - tie), and what is left is a tie. They sum to 1; swapping the
    two swaps the outer ones. Limits: a tie at difference 0 has probability tanh(tie / 2); scale -> inf: more wins.
    """
    difference = scale * at_least_float32(difference)
    first, second = (difference - tie).sigmoid(), (-difference - tie).sigmoid()
    return first, 1 - first - second, second


def kto_loss(
    log_ratio: Float[Tensor, "*any"],
    preference: Float[Tensor, "*any"],
    reference_point: Float[Tensor, ""],
    beta: float | int,
) -> Float[Tensor, "*any"]:
    """1 - sigmoid(+-(beta log_ratio - z)), + where preference is 1, - where it is 0 (Ethayarajh et al., 2024, arXiv
    2402.01306, eq. 8): each sample is good or bad on its own, no pair is needed.

    reference_point z: the reward above which a sample counts as a gain, see `kto_reference_point`; constant. Limits:
    1/2 at log_ratio = z = 0, its gradient there -+beta / 4 grad log_ratio; a sample far on either side has none.
    """
    same_shape(log_ratio=log_ratio, preference=preference)
    sign = 2 * preference - 1
    return 1 - (sign * (beta * at_least_float32(log_ratio) - reference_point.detach())).sigmoid()


def kto_reference_point(log_ratio: Float[Tensor, "*any"], beta: float | int) -> Float[Tensor, ""]:
    """z = max(0, mean of beta log_ratio), no gradient: a batch's estimate of beta KL(policy || reference)."""
    return (beta * at_least_float32(log_ratio).detach()).mean().clamp_min(0)
