"""Exact answers: what an alignment method should reach, where that can be written down.

Everything keeps the dtype it is given, so give float64 where digits matter.

    exponential_tilt, gold_kl_frontier    the optimum of E[r] - beta KL(pi || pi_ref), and gold reward along it
    i_projection                          the law nearest to the reference that meets moment constraints
    best_of_n                             the law of the best of n draws, and its KL, exactly
    Gaussian, GaussianMixture             density, score, posterior mean, flow and samples of noised data, of any rank
    tilt_gaussian_mixture                 the optimum in continuous space, for quadratic rewards: a mixture again
    LinearGaussianSampler                 a DDIM sampler of finite steps on Gaussian data: gradient, optimum, memory
    LinearGaussianFlow                    the same of a rectified flow's SDE

Exact targets are tilts of the *sampler's* law, not of the data's: a DDPM sampler of 20 steps gives variance 0.78 where
the data have 1, even with the exact score (sheet ddpo, trap 4). LinearGaussianSampler knows its own law.
"""

from minialign.exact.discrete import (
    BestOfN,
    Frontier,
    best_of_n,
    discrete_kl,
    exponential_tilt,
    gold_kl_frontier,
    i_projection,
)
from minialign.exact.gaussian import Gaussian
from minialign.exact.mixture import GaussianMixture, TiltedMixture, tilt_gaussian_mixture
from minialign.exact.sampler import (
    LinearGaussianFlow,
    LinearGaussianSampler,
    leading_timesteps,
    scaled_linear_alpha_bar,
)

__all__ = [
    "BestOfN",
    "Frontier",
    "Gaussian",
    "GaussianMixture",
    "LinearGaussianFlow",
    "LinearGaussianSampler",
    "TiltedMixture",
    "best_of_n",
    "discrete_kl",
    "exponential_tilt",
    "gold_kl_frontier",
    "i_projection",
    "leading_timesteps",
    "scaled_linear_alpha_bar",
    "tilt_gaussian_mixture",
]
