"""Pure tensor functions that several papers share. Any device; float64, float32, bfloat16; no loop over the batch."""

from minialign.kernels.diffusion import ddim_alpha_bars, ddim_std, ddim_step, predict
from minialign.kernels.gaussian import StepOut, at_least_float32, expand_as, gaussian_kl, gaussian_log_prob
from minialign.kernels.policy_gradient import clipped_surrogate, group_advantages, kl_k1, kl_k2, kl_k3, whiten

__all__ = [
    "StepOut",
    "at_least_float32",
    "clipped_surrogate",
    "ddim_alpha_bars",
    "ddim_std",
    "ddim_step",
    "expand_as",
    "gaussian_kl",
    "gaussian_log_prob",
    "group_advantages",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "predict",
    "whiten",
]
