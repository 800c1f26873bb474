"""Pure tensor functions that several papers share. Any device; float64, float32, bfloat16; no loop over the batch."""

from minialign.kernels.consistency import (
    boundary_scalings,
    consistency_function,
    consistency_step,
    diffusers_guidance,
    guidance_embedding,
    lcm_guidance,
    lcm_timesteps,
)
from minialign.kernels.diffusion import ddim_alpha_bars, ddim_std, ddim_step, predict
from minialign.kernels.edm import edm_denoised, edm_scalings, karras_sigmas
from minialign.kernels.gaussian import StepOut, at_least_float32, expand_as, gaussian_kl, gaussian_log_prob
from minialign.kernels.language import (
    clipped_value_loss,
    gae,
    last_token,
    masked_mean,
    masked_whiten,
    sample_tokens,
    token_entropy,
    token_log_probs,
    token_rewards,
)
from minialign.kernels.policy_gradient import (
    clipped_surrogate,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    means,
    weighted_sums,
    whiten,
)

__all__ = [
    "StepOut",
    "at_least_float32",
    "boundary_scalings",
    "clipped_surrogate",
    "clipped_value_loss",
    "consistency_function",
    "consistency_step",
    "ddim_alpha_bars",
    "ddim_std",
    "ddim_step",
    "diffusers_guidance",
    "edm_denoised",
    "edm_scalings",
    "expand_as",
    "gae",
    "gaussian_kl",
    "gaussian_log_prob",
    "group_advantages",
    "guidance_embedding",
    "karras_sigmas",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "last_token",
    "lcm_guidance",
    "lcm_timesteps",
    "masked_mean",
    "masked_whiten",
    "means",
    "predict",
    "sample_tokens",
    "token_entropy",
    "token_log_probs",
    "token_rewards",
    "weighted_sums",
    "whiten",
]
