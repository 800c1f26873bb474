"""Exact answers: what an alignment method should reach, where that can be written down.

Discrete laws over outcomes live in log-probabilities on the last axis; everything keeps the dtype it is given, so give
float64 where digits matter. Four families:

    exponential_tilt, gold_kl_frontier    the optimum of E[r] - beta KL(pi || pi_ref), and gold reward along it
    i_projection                          the law nearest to the reference that meets moment constraints
    best_of_n                             the law of the best of n draws, and its KL, exactly
    tilt_gaussian_mixture                 the same optimum in continuous space, for quadratic rewards
    LinearGaussianSampler                 a DDIM sampler of finite steps on Gaussian data: gradient, optimum, memory

Exact targets are tilts of the *sampler's* law, not of the data's: a DDPM sampler of 20 steps gives variance 0.78 where
the data have 1, even with the exact score (sheet ddpo, trap 4). LinearGaussianSampler knows its own law.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Discrete laws ------------------------------------------------------------------------------------------------------


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


# Continuous laws ----------------------------------------------------------------------------------------------------


class TiltedMixture(NamedTuple):
    """A Gaussian mixture, and the `log_z` of the tilt that made it."""

    means: Float[Tensor, "c d"]
    covariances: Float[Tensor, "c d d"]
    log_weights: Float[Tensor, "c"]
    log_z: Float[Tensor, ""]


def tilt_gaussian_mixture(
    means: Float[Tensor, "c d"],
    covariances: Float[Tensor, "c d d"],
    log_weights: Float[Tensor, "c"],
    beta: float,
    linear: Float[Tensor, "d"] | None = None,
    quadratic: Float[Tensor, "d d"] | None = None,
) -> TiltedMixture:
    """p(x) exp(r(x) / beta) / Z for a mixture p and r(x) = linear . x + x . quadratic . x / 2: a mixture again.

    Completing the square per component, without inverting a covariance (so flat directions are allowed): with
    A = quadratic / beta, b = linear / beta and R = (I - Sigma A)^-1, Sigma' = R Sigma, mu' = R (mu + Sigma b), and
    each weight is multiplied by the component's own E[exp(r / beta)].
    A linear reward alone moves every mean by Sigma linear / beta and keeps the covariances.
    Raises ValueError where E[exp(r / beta)] is infinite: a convex reward, and beta too small.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive KL weight (to minimise a reward, negate it)")
    dim = means.shape[-1]
    b = torch.zeros(dim).to(means) if linear is None else linear / beta
    a = torch.zeros(dim, dim).to(means) if quadratic is None else (quadratic + quadratic.T) / (2 * beta)
    eigenvalues, vectors = torch.linalg.eigh(covariances)
    root = vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)  # Sigma = root root^T
    curvature = 1 - torch.linalg.eigvalsh(root.mT @ a @ root)  # of I - Sigma A, (c, d)
    if (curvature <= 0).any():
        first = int((curvature <= 0).any(-1).nonzero()[0])
        raise ValueError(
            f"E[exp(reward / beta)] is infinite under component {first}: the reward curves up faster than that "
            f"Gaussian falls off. Use a larger beta (it is {beta}) or a concave reward."
        )
    matrix = torch.eye(dim).to(means) - covariances @ a
    new_means = torch.linalg.solve(matrix, (means + covariances @ b).unsqueeze(-1)).squeeze(-1)
    new_covariances = torch.linalg.solve(matrix, covariances)
    pull = torch.linalg.solve(matrix.mT, (b + means @ a).unsqueeze(-1)).squeeze(-1)
    log_gain = -curvature.log().sum(-1) / 2 + (new_means @ b + (means * pull).sum(-1)) / 2
    scores = log_weights + log_gain
    log_z = scores.logsumexp(-1) - log_weights.logsumexp(-1)
    return TiltedMixture(new_means, (new_covariances + new_covariances.mT) / 2, scores.log_softmax(-1), log_z)


# The linear-Gaussian sampler ----------------------------------------------------------------------------------------


def scaled_linear_alpha_bar(num_train_timesteps: int = 1000) -> Float[Tensor, "t"]:
    """Stable Diffusion's noise schedule in float64: alpha_bar[0] = .99915 (data) down to alpha_bar[999] = .00466."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), num_train_timesteps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def leading_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> Int[Tensor, "steps"]:
    """diffusers' "leading" spacing with steps_offset 1, from noise to data: 951, 901, ..., 51, 1 for 20 steps."""
    stride = num_train_timesteps // num_steps
    return torch.arange(num_steps - 1, -1, -1) * stride + 1


class LinearGaussianSampler:
    """DDIM with `eta` on 1-D data N(mean, std^2) with the exact noise prediction, plus one scalar theta_i per step.

    All closed-form (sheet ddpo, checks 1 to 3; sheet b2diffurl, check 1), in float64, time from noise to data.
    The policy is noise_pred = exact + theta_i, so step i is affine, x' = A_i x + B_i + k_i theta_i + std_i z with
    x_T ~ N(0, 1), and pushes x_0 by k_i P_i theta_i, where P_i is the product of A over the later steps.

    Attributes, each (steps,): timesteps, alpha_bar, alpha_bar_next, step_std (sigma_i), slope (A_i), offset (B_i),
    gain (k_i: d mean / d noise_pred, negative), downstream (P_i).
    `alpha_bar_table` (t,) replaces Stable Diffusion's schedule; to compare with a policy, give its scheduler's table.
    """

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        num_steps: int = 20,
        eta: float = 1.0,
        alpha_bar_table: Tensor | None = None,
    ):
        table = scaled_linear_alpha_bar() if alpha_bar_table is None else alpha_bar_table.double()
        self.data_mean, self.data_std, self.num_steps, self.eta = mean, std, num_steps, eta
        self.timesteps = leading_timesteps(num_steps, len(table))
        self.alpha_bar = a = table[self.timesteps]
        stride = len(table) // num_steps
        self.alpha_bar_next = a_next = table[(self.timesteps - stride).clamp_min(0)]
        self.step_std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        self.gain = (1 - a_next - self.step_std**2).sqrt() - (a_next * (1 - a) / a).sqrt()
        response = self.gain * (1 - a).sqrt() / (a * std**2 + 1 - a)  # of the next state to x, through noise_pred
        self.slope = (a_next / a).sqrt() + response
        self.offset = -response * a.sqrt() * mean
        later = torch.cat([self.slope[1:], torch.ones(1, dtype=a.dtype)])
        self.downstream = later.flip(0).cumprod(0).flip(0)

    @property
    def memory_slope(self) -> Tensor:
        """d x_0 / d x_T: what is left of the initial noise at the end."""
        return self.slope.prod()

    @property
    def sample_mean(self) -> Tensor:
        """E[x_0] at theta = 0. Not the data's mean: finite steps, and x_T has mean 0."""
        return (self.downstream * self.offset).sum()

    @property
    def noise_variance(self) -> Tensor:
        """Vn = Var(x_0 | x_T) = sum (P_i sigma_i)^2: all that KL-regularised training can tilt."""
        return self.window_variance(self.num_steps)

    @property
    def sample_variance(self) -> Tensor:
        """Var(x_0), at any theta: constant shifts move no variance."""
        return self.memory_slope**2 + self.noise_variance

    @property
    def memory_fraction(self) -> Tensor:
        """Share of Var(x_0) carried by x_T, which no policy can tilt."""
        return self.memory_slope**2 / self.sample_variance

    @property
    def policy_gradient(self) -> Tensor:
        """d E[x_0] / d theta_i = k_i P_i, (steps,)."""
        return self.gain * self.downstream

    def window_variance(self, window: int) -> Tensor:
        """Vs(w) = sum over the last w steps of (P_i sigma_i)^2: the variance of x_0 decided inside the window."""
        if not 0 <= window <= self.num_steps:
            raise ValueError(f"window is {window}; expected 0 to {self.num_steps}, the number of steps")
        return ((self.downstream * self.step_std) ** 2)[self.num_steps - window :].sum()

    def mean_at(self, theta: Tensor) -> Tensor:
        """E[x_0] under theta (steps,)."""
        return self.sample_mean + self.policy_gradient @ theta

    def path_kl(self, theta: Tensor) -> Tensor:
        """KL(path under theta || path under 0) in nats, sums over steps: sum k_i^2 theta_i^2 / (2 sigma_i^2).

        Exact, since no step's KL depends on the state. Raises ValueError at eta = 0: point masses have no density.
        """
        self._require_noise()
        return ((self.gain * theta / self.step_std) ** 2).sum() / 2

    def optimum(self, beta: float) -> Tensor:
        """theta* (steps,) of max E[x_0] - beta KL(path || path_ref): P_i sigma_i^2 / (beta k_i).

        Its shift of E[x_0] is `reachable_shift`, not the data's std^2 / beta. Raises ValueError at eta = 0.
        """
        self._require_noise()
        return self.downstream * self.step_std**2 / (beta * self.gain)

    def reachable_shift(self, beta: float) -> Tensor:
        """E[x_0] at the optimum minus at theta = 0: Vn / beta."""
        return self.noise_variance / beta

    def optimal_kl(self, beta: float) -> Tensor:
        """KL(path* || path_ref) in nats: Vn / (2 beta^2)."""
        return self.noise_variance / (2 * beta**2)

    def _require_noise(self) -> None:
        silent = (self.step_std == 0).nonzero()
        if len(silent):
            step = int(silent[0])
            raise ValueError(
                f"step {step} (timestep {int(self.timesteps[step])}) is deterministic (std = 0), so paths have no "
                f"density and no KL: use eta > 0 (it is {self.eta})."
            )
