"""Measures: how far from the data, how diverse, how far from the base, and how sure we are.

    distance to data      frechet_distance, mmd, sliced_wasserstein; RunningMoments of a set whose members change
    diversity             diversity (mean pairwise distance within a prompt), vendi_score
    distance to the base  path_kl, kl_to_base: exact Gaussian KL of every transition, in nats
    over-optimisation     best_of_n_estimate, overoptimisation_law: gold reward against the distance from the base
    certainty             mean_ci, paired_difference, win_rate

Distances and eigenvalues are computed in float64. Report a reward together with a diversity and a distance to the base.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from minialign.kernels import StepOut

# ---------------------------------------------------------------------------------------------- distances to data


def frechet_gaussian(
    mean_a: Float[Tensor, "d"], cov_a: Float[Tensor, "d d"], mean_b: Float[Tensor, "d"], cov_b: Float[Tensor, "d d"]
) -> Float64[Tensor, ""]:
    """Squared 2-Wasserstein distance of two Gaussians, |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Dowson and Landau (1982). Units: squared feature units. The inner product is symmetric positive, so two symmetric
    eigendecompositions replace the matrix square root of AB and its complex round-off; rank-deficient A and B are fine.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp(min=0)


def frechet_distance(features_a: Num[Tensor, "n d"], features_b: Num[Tensor, "m d"]) -> Float64[Tensor, ""]:
    """Frechet distance of two samples: `frechet_gaussian` of their means and covariances (denominator n - 1).

    Heusel et al. (2017, 1706.08500) with Inception features as FID. Biased upwards for small samples (by about
    d / n of the spread): compare only at equal n, and quote the distance of two halves of the real data beside it.
    """
    _same_width(features_a, features_b)
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 samples; {name} has {len(features)}.")
    a, b = features_a.double(), features_b.double()
    return frechet_gaussian(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def _same_width(a: Tensor, b: Tensor) -> None:
    """Two samples of points, each (number, dimensions); a single column would broadcast against many in silence."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"the two samples have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (n, d) and (m, d), d being "
            "the same. Images and the like: samples.flatten(1)."
        )


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


class RunningMoments:
    """Mean (d,) and covariance (d, d; denominator n - 1) of n points, kept up to date while points are exchanged.

    An exchange costs O(d^2), where computing them anew costs O(n d^2). float64, on the points' device.
    """

    def __init__(self, features: Num[Tensor, "n d"]):
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 samples; there is {len(features)}.")
        self.n, self._origin = len(features), features.double().mean(0)  # sums from here lose no digits
        centred = features.double() - self._origin
        self._sum, self._products = centred.sum(0), centred.T @ centred

    def swap(self, old: Num[Tensor, "d"], new: Num[Tensor, "d"]) -> None:
        """`new` takes the place of `old`."""
        old, new = old.double() - self._origin, new.double() - self._origin
        self._sum += new - old
        self._products += torch.outer(new, new) - torch.outer(old, old)

    @property
    def mean(self) -> Float64[Tensor, "d"]:
        return self._origin + self._sum / self.n

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        return (self._products - torch.outer(self._sum, self._sum) / self.n) / (self.n - 1)


def mmd(a: Num[Tensor, "n d"], b: Num[Tensor, "m d"], bandwidth: float | None = None) -> Float64[Tensor, ""]:
    """Squared maximum mean discrepancy, unbiased, with k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    Gretton et al. (2012), eq. 3; no unit, at most 2. Being unbiased it goes below zero when the distributions agree.
    The default bandwidth is the median distance between different points of the pooled sample: fix it when several
    models are compared, because it depends on both samples. Memory (n + m)^2.
    """
    _same_width(a, b)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"the unbiased estimate needs at least 2 samples on each side; there are {n} and {m}.")
    pooled = torch.cat([a, b]).double()
    distances = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    if bandwidth is None:
        bandwidth = distances[tuple(torch.triu_indices(n + m, n + m, offset=1))].median().item()
    if not bandwidth > 0:
        raise ValueError("the bandwidth is 0: more than half of the pooled points coincide. Pass bandwidth=.")
    kernel = (-distances.square() / (2 * bandwidth**2)).exp()
    within_a = (kernel[:n, :n].sum() - n) / (n * (n - 1))  # the diagonal is exactly 1
    within_b = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return within_a + within_b - 2 * kernel[:n, n:].mean()


def sliced_wasserstein(
    a: Num[Tensor, "n d"], b: Num[Tensor, "m d"], num_directions: int = 128, generator: torch.Generator | None = None
) -> Float64[Tensor, ""]:
    """Sliced 2-Wasserstein distance, sqrt(mean over random unit directions of W_2^2 of the projections).

    Bonneel et al. (2015). Units: those of the points. W_2 of two projections is exact for any n and m: the two
    quantile functions are step functions, and they are integrated over the union of their steps.
    """
    _same_width(a, b)
    directions = torch.randn(a.shape[1], num_directions, generator=generator, dtype=torch.float64).to(a.device)
    directions = directions / directions.norm(dim=0)
    projected_a, projected_b = (a.double() @ directions).sort(0).values, (b.double() @ directions).sort(0).values
    n, m = len(a), len(b)
    # Levels in units of 1 / (n m), so that "which sample holds this quantile" is exact integer arithmetic.
    steps_a, steps_b = torch.arange(1, n + 1, device=a.device) * m, torch.arange(1, m + 1, device=a.device) * n
    levels = torch.cat([steps_a, steps_b]).sort().values
    widths = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)
    gaps = projected_a[(levels - 1) // m] - projected_b[(levels - 1) // n]
    return (widths @ gaps.square()).mean().sqrt()


# ---------------------------------------------------------------------------------------------- diversity


def diversity(
    samples: Num[Tensor, "batch *dims"], prompts: Sequence[Hashable], *, reduction: str
) -> Float64[Tensor, ""]:
    """Mean distance between two different samples of the same prompt, averaged over the prompts.

    reduction "sum": the L2 distance; "mean": root mean square over elements, so that sizes compare (in units of full
    brightness for images in [0, 1]). Prompts with a single sample say nothing and are left out; if all are, it raises.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"unknown reduction {reduction!r}. There are: mean, sum.")
    if len(samples) != len(prompts):
        raise ValueError(f"there are {len(samples)} samples and {len(prompts)} prompts; expected one prompt a sample.")
    flat = samples.flatten(1).double()
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    means = [torch.pdist(flat[group]).mean() for group in rows.values() if len(group) > 1]
    if not means:
        raise ValueError(
            f"no prompt has two samples ({len(prompts)} samples, {len(rows)} prompts): nothing to compare."
        )
    return torch.stack(means).mean() / (math.sqrt(flat.shape[1]) if reduction == "mean" else 1.0)


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al., 2016): how many different n-grams of words there are, over how many there are in all.

    In (0, 1]; it falls as the number of texts grows, so compare equal numbers. 0 where no text has n words.
    """
    if isinstance(texts, str) or n < 1:
        raise ValueError(f"n is {n} and texts {type(texts).__name__}; expected n of at least 1 and a list of strings.")
    words = [text.split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def vendi_score(
    features: Num[Tensor, "n d"] | None = None, *, similarity: Num[Tensor, "n n"] | None = None
) -> Float64[Tensor, ""]:
    """Vendi score, exp(entropy of the eigenvalues of K / n): the effective number of different samples, from 1 to n.

    Friedman and Dieng (2023, 2210.02410), eq. 1. K is `similarity` (symmetric, positive, ones on the diagonal), or
    the cosine similarity of `features`. Limits: 1 if all samples are equal, n if all are orthogonal.
    """
    if (features is None) == (similarity is None):
        raise ValueError("give either features or similarity=, not both.")
    if features is not None:
        if features.ndim != 2 or len(features) == 0:
            shape = tuple(features.shape)
            raise ValueError(f"features have shape {shape}; expected (n, d), n of at least 1: features.flatten(1).")
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        matrix = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit  # the same non-zero eigenvalues
        values = torch.linalg.eigvalsh(matrix / len(unit))
    else:
        if not ((similarity.diagonal() - 1).abs() < 1e-4).all():
            raise ValueError("similarity needs ones on its diagonal: a sample is wholly similar to itself.")
        values = torch.linalg.eigvalsh(similarity.double() / len(similarity))
    return torch.special.entr(values.clamp(min=0)).sum().exp()


# ---------------------------------------------------------------------------------------------- distance to the base


@torch.no_grad()
def path_kl(policy, trajectory, steps_per_pass: int = 4) -> Float[Tensor, "batch"]:
    """KL(policy || base) of the denoising path, per trajectory, in nats: sum over steps of the exact Gaussian KL.

    The trajectories must have been drawn from `policy` as it stands: then the mean over them estimates the KL of the
    two path distributions without bias, and by the data processing inequality bounds the KL of the samples from above.
    Both passes count in `policy.network_evaluations`: two per state.
    """
    num_rows, num_steps = trajectory.log_probs.shape
    total = torch.zeros(num_rows, dtype=torch.float64, device=trajectory.states.device)
    for chunk in torch.arange(num_steps, device=trajectory.states.device).split(steps_per_pass):
        rows, columns = torch.cartesian_prod(torch.arange(num_rows, device=chunk.device), chunk).view(-1, 2).unbind(-1)
        states = trajectory.states[rows, columns]
        steps = trajectory.steps.to(chunk.device)[columns]
        condition = trajectory.condition[rows]
        outs = [policy.step(states, steps, condition, reduction="sum", reference=base) for base in (False, True)]
        ours, base = (StepOut(*(part.double() for part in out)) for out in outs)
        total.index_add_(0, rows, policy.step_kl(ours, base, "sum"))
    return total


def kl_to_base(policy, trajectory, steps_per_pass: int = 4) -> Float[Tensor, ""]:
    """Mean of `path_kl` over the trajectories, nats. Zero exactly when the policy is still the base."""
    return path_kl(policy, trajectory, steps_per_pass).mean()


# ---------------------------------------------------------------------------------------------- over-optimisation


def best_of_n_estimate(proxy: Num[Tensor, "pool"], gold: Num[Tensor, "pool"], n: int) -> Float64[Tensor, ""]:
    """Mean gold reward of the best of n by proxy, from a pool of N >= n scored samples, without bias.

    sum_i C(i - 1, n - 1) / C(N, n) gold_(i), samples in ascending order of proxy (Nakano et al., 2021, arXiv
    2112.09332, appendix I): the mean over all subsets of size n. n = 1: the mean; n = N: the top sample.
    """
    proxy, gold = _paired(proxy, gold)
    size = len(proxy)
    if not 1 <= n <= size:
        raise ValueError(f"n is {n}; a pool of {size} samples serves n from 1 to {size}.")
    rank = torch.arange(1, size + 1, dtype=torch.float64)

    def log_choose(a: Tensor, b: int) -> Tensor:
        return torch.lgamma(a + 1) - math.lgamma(b + 1) - torch.lgamma(a - b + 1)

    log_weights = log_choose(rank[n - 1 :] - 1, n - 1) - log_choose(rank[-1], n)
    return log_weights.exp() @ gold.double()[proxy.argsort()][n - 1 :]


class Law(NamedTuple):
    """R = d (alpha - beta d), or d (alpha - beta log d); r2: share of the variance that it explains."""

    alpha: float
    beta: float
    r2: float


def overoptimisation_law(distance: Num[Tensor, "n"], gold: Num[Tensor, "n"], form: str = "bon") -> Law:
    """Least squares fit of gold reward against d = sqrt(KL), nats^1/2 (Gao, Schulman and Hilton, 2022, 2210.10760).

    form "bon", best of n: R = d (alpha - beta d), peak at d = alpha / (2 beta). "rl": R = d (alpha - beta log d), peak
    at log d = alpha / beta - 1. R(0) = 0, so gold must have mean 0 under the base. Points at d = 0 say nothing.
    """
    if form not in ("bon", "rl"):
        raise ValueError(f"form is {form!r}; expected 'bon' or 'rl'.")
    distance, gold = _paired(distance, gold)
    keep = distance > 0
    d, r = distance[keep].double(), gold[keep].double()
    if len(d) < 3:
        raise ValueError(f"two coefficients from {len(d)} points with d > 0: give at least 3.")
    inputs = torch.stack([d, -d * (d if form == "bon" else d.log())], 1)
    alpha, beta = torch.linalg.lstsq(inputs, r.unsqueeze(1)).solution[:, 0]
    error = (inputs @ torch.stack([alpha, beta]) - r).square().sum()
    return Law(float(alpha), float(beta), float(1 - error / (r - r.mean()).square().sum()))


# ---------------------------------------------------------------------------------------------- certainty


class Interval(NamedTuple):
    """A mean with its confidence interval; prints as `0.712 +- 0.034`."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.mean:.3f} +- {self.half_width:.3f}"


class PairedDifference(NamedTuple):
    """Mean of a - b over pairs, its standard error, and their quotient t (n - 1 degrees of freedom)."""

    mean: float
    standard_error: float
    t: float


def mean_ci(x: Num[Tensor, "n"] | Sequence, level: float = 0.95) -> Interval:
    """Student's t interval of a mean: mean +- t_{n-1} s / sqrt(n). For n independent values, e.g. one per seed."""
    from scipy.stats import t

    values = torch.as_tensor(x, dtype=torch.float64)
    if values.ndim != 1:
        raise ValueError(f"the values have shape {tuple(values.shape)}; expected (n,), n independent ones.")
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values; there is {len(values)}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}.")
    half = t.ppf((1 + level) / 2, len(values) - 1) * (values.std() / math.sqrt(len(values))).item()
    mean = values.mean().item()
    return Interval(mean, mean - half, mean + half)


def _paired(a: Tensor | Sequence, b: Tensor | Sequence) -> tuple[Tensor, Tensor]:
    """Both as float64 vectors of one length: (n,) against (n, 1) would broadcast to every pair of an a with a b."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if a.ndim != 1 or a.shape != b.shape:
        hint = " Take the last axis away: x.squeeze(-1)." if {a.ndim, b.ndim} == {1, 2} else ""
        raise ValueError(f"pairs have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (n,) twice.{hint}")
    return a, b


def paired_difference(a: Num[Tensor, "n"] | Sequence, b: Num[Tensor, "n"] | Sequence) -> PairedDifference:
    """Paired t statistic of a - b: pair runs that share a seed, or samples that share a noise.

    With all differences equal the standard error is 0; t is then infinite, or 0 where there is no difference at all.
    """
    a, b = _paired(a, b)
    differences = a - b
    if len(differences) < 2:
        raise ValueError(f"a standard error needs at least 2 pairs; there is {len(differences)}.")
    mean = differences.mean().item()
    error = (differences.std() / math.sqrt(len(differences))).item()
    t = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return PairedDifference(mean, error, t)


def win_rate(scores: Num[Tensor, "n"], scores_base: Num[Tensor, "n"]) -> float:
    """Share of pairs in which the first score is higher; a tie counts one half. Pair by prompt, and noise."""
    scores, scores_base = _paired(scores, scores_base)
    return ((scores > scores_base).double() + 0.5 * (scores == scores_base).double()).mean().item()
