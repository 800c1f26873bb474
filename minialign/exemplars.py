"""Rewards made of examples: choose an encoder and a set of exemplars, and what is like them is good.

    frechet_to, mmd_to   of a set: how near its features are, all together, to those of the exemplars
    vendi                of a set: how diverse it is, without exemplars
    mahalanobis_to       of a sample: how far its features are from the middle of the exemplars'
    frechet_of_each      of a sample: how near its own parts (patches, frames) are to the exemplars'

A reward of a set is any callable reward(samples, prompts) -> one number (`rewards.checked_set`); those of here are
`FeatureReward`s, which encode each sample once however many sets it is scored in. Exemplars may be of another kind than
the samples, texts for images, where an encoder puts both in one space.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minialign import measure
from minialign.rewards import Reward, RewardError


def _flat(samples: Tensor) -> Tensor:
    return samples.flatten(1)


@dataclass(frozen=True)
class FeatureReward:
    """A reward of a set that sees its samples through `features` alone, (n, d): the number score(features(samples)).

    So whoever scores many sets of the same samples, as DRAGON does, encodes each once. of_moments(mean (d,),
    covariance (d, d)): the same number, where it depends on nothing else.
    """

    name: str
    score: Callable[[Tensor], Tensor | float]
    features: Callable[[Any], Tensor] = _flat
    of_moments: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, samples: Any, prompts: Sequence[Hashable]) -> Tensor | float:
        return self.score(self.encode(samples))

    def encode(self, samples: Any) -> Tensor:
        """The features, (n, d). Raises RewardError for any other shape."""
        found = self.features(samples)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(samples):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise RewardError(
                f"the features of reward {self.name!r} are {what} for {len(samples)} samples; expected a tensor of "
                f"shape ({len(samples)}, d), a row a sample: .flatten(1)."
            )
        return found

    def on_features(self) -> "FeatureReward":
        """The same reward of sets of features."""
        return dataclasses.replace(self, features=_flat)


def frechet_to(
    exemplars: Any,
    features: Callable[[Any], Tensor] = _flat,
    of_exemplars: Callable[[Any], Tensor] | None = None,
    name: str = "frechet_to_exemplars",
) -> FeatureReward:
    """Minus the squared Frechet distance of the set's features to those of `exemplars`: see `measure.frechet_distance`.

    features(samples) -> (n, d); without it the samples' own elements. of_exemplars: the exemplars' own encoder, if they
    are of another kind. Sets of equal size alone compare.
    """
    target = measure.RunningMoments((of_exemplars or features)(exemplars))

    def of_moments(mean: Tensor, covariance: Tensor) -> Tensor:
        return -measure.frechet_gaussian(mean, covariance, target.mean.to(mean), target.covariance.to(mean))

    def score(found: Tensor) -> Tensor:
        moments = measure.RunningMoments(found)
        return of_moments(moments.mean, moments.covariance)

    return FeatureReward(name, score, features, of_moments)


def mmd_to(exemplars: Any, bandwidth: float | None = None, features: Callable[[Any], Tensor] = _flat) -> FeatureReward:
    """Minus the squared MMD of the set's features to those of `exemplars`, without bias: see `measure.mmd`.

    bandwidth: of the Gaussian kernel; if none is given the median distance within the exemplars, whatever the set.
    """
    target = features(exemplars)
    bandwidth = float(torch.pdist(target.double()).median()) if bandwidth is None else bandwidth
    return FeatureReward("mmd_to_exemplars", lambda found: -measure.mmd(found, target.to(found), bandwidth), features)


def vendi(features: Callable[[Any], Tensor] = _flat, bandwidth: float | None = None) -> FeatureReward:
    """The effective number of different samples in the set, from 1 to its size: see `measure.vendi_score`.

    bandwidth: alike are points that are near, exp(-|x - y|^2 / (2 bandwidth^2)); None: those in one direction, by the
    cosine, which tells few points of a plane apart.
    """

    def score(found: Tensor) -> Tensor:
        if bandwidth is None:
            return measure.vendi_score(found)
        distance = torch.cdist(found.double(), found.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return measure.vendi_score(similarity=(-distance.square() / (2 * bandwidth**2)).exp())

    return FeatureReward("vendi", score, features)


def mahalanobis_to(exemplars: Any, features: Callable[[Any], Tensor] = _flat, ridge: float = 1e-6) -> Reward:
    """-(f - m)^T (S + ridge I)^-1 (f - m) of each sample's features f, m and S being the exemplars' moments.

    In squared standard deviations. Its optimum is the exemplars' mean, again and again: a set of such samples is
    nothing like the exemplars.
    """
    target = measure.RunningMoments(features(exemplars))
    precision = torch.linalg.inv(target.covariance + ridge * torch.eye(len(target.mean)).to(target.covariance))

    def mahalanobis_to_exemplars(samples: Any, prompts: Sequence[Hashable]) -> Tensor:
        offset = features(samples).double()
        offset = offset - target.mean.to(offset)
        return -torch.einsum("nd,de,ne->n", offset, precision.to(offset), offset)

    return mahalanobis_to_exemplars


def frechet_of_each(exemplars: Any, parts: Callable[[Any], Tensor]) -> Reward:
    """Minus the squared Frechet distance of each sample's own parts to those of all exemplars (the paper's FAD a song).

    parts(samples) -> (n, p, d): frames, patches, pixels, p of them a sample, at least 2.
    """
    target = measure.RunningMoments(parts(exemplars).flatten(0, 1))

    def frechet_of_each_sample(samples: Any, prompts: Sequence[Hashable]) -> Tensor:
        found = parts(samples).double()
        centred = found - found.mean(1, keepdim=True)
        covariance = centred.mT @ centred / (found.shape[1] - 1)
        distance = torch.func.vmap(measure.frechet_gaussian, in_dims=(0, 0, None, None))
        return -distance(found.mean(1), covariance, target.mean.to(found), target.covariance.to(found))

    return frechet_of_each_sample
