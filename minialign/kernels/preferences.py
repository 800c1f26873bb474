"""Preference losses on log-ratios: how much more probable than the reference a policy makes what was preferred.

A log-ratio log pi(x) - log pi_ref(x) is in nats, and reward is beta times it. Pairs are (chosen, rejected), in that
order; a label is 1 where the first wins, or where a sample alone is desirable. A denoising model has no cheap
log-ratio; half the drop of its training error stands in for one: `denoising_log_ratio`.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from minialign.kernels.gaussian import at_least_float32, same_shape


def denoising_log_ratio(error: Float[Tensor, "*any"], error_reference: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """-(error - error_reference) / 2, squared errors of the same noisy sample: > 0 where theta denoises it better.

    Up to the weight of its noise level, which beta absorbs, the bound on log pi - log pi_ref of Wallace et al. (2023,
    arXiv 2311.12908, eq. 14). No gradient reaches the reference.
    """
    same_shape(error=error, error_reference=error_reference)
    return (at_least_float32(error_reference).detach() - at_least_float32(error)) / 2


def dpo_loss(
    chosen: Float[Tensor, "*any"], rejected: Float[Tensor, "*any"], beta: float | int
) -> Float[Tensor, "*any"]:
    """-log sigmoid(beta (chosen - rejected)), a pair each (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

    Limits: log 2 where the log-ratios agree, its gradient there -beta / 2 (grad chosen - grad rejected); a pair of one
    and the same sample has no gradient, at any weights.
    """
    same_shape(chosen=chosen, rejected=rejected)
    return F.softplus(-beta * (at_least_float32(chosen) - at_least_float32(rejected)))


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
