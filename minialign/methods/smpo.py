"""SmPO-Diffusion: smoothed preference optimisation with ReNoise inversion (Lu et al., 2025, arXiv 2506.02698).

One label a pair says that everybody agrees, and as firmly about a near-tie as about a clear win. SmPO puts the winner
and the loser of Diffusion-DPO each into a blend of both, by how sure a reward model is; what is left of it is a factor
on the logit. And it compares the two images at noisy versions from which the model's own sampler would have made them.

    p~(x_w) ~ p(x_w)^alpha p(x_l)^(gamma - alpha), p~(x_l) the mirror image, eq. 8; alpha / gamma = sigmoid(r_w - r_l)
    logit of the blends = (2 alpha - gamma) times DPO's, eq. 9              smooth_weights
    x_t by ReNoise inversion, tau = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)     inpo.Inversion
    the winner is whom the reward model prefers                             pairs.relabel, before training
    -log sigmoid(w u), u with tau in the place of eps                       diffusion_dpo.train

Smoothed are margins, not labels: -log sigmoid(w u) falls for ever in u, near-ties only slower. Smoothed labels (cDPO,
smoothing "label") have their minimum at u = logit p. Limits: smoothing "none" with num_inversion_steps 0 is
Diffusion-DPO, bit for bit; beta and gamma only matter as their product.

Not as in the official code: a weight each pair (there the batch's first); ReNoise asks its second time at the level
where its guess arrives (there at the old one: `level`, three times the error); inversion ends at the level that is
named, and the reference inverts, not the drifting policy. Scores are divided by the range that they span in the data;
pairs know differences alone, so None stands for the largest of those: the same up to gamma while they are small.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.loop import Step
from minialign.methods import diffusion_dpo
from minialign.methods.inpo import Inversion, invertible_levels
from minialign.pairs import Pairs
from minialign.settings import Count, Natural, Positive


@dataclass(frozen=True)
class Config(diffusion_dpo.Config):
    num_iterations: Count = 100  # optimizer steps (authors: 200)
    warmup_updates: Natural = 10  # over which the learning rate rises (authors: 100)
    smoothing: Literal["margin", "label", "none"] = "margin"  # the paper; cDPO, for contrast; every pair alike
    gamma: Positive | None = None  # of the weights (paper: 10); None: so that their mean is 1, and beta is DPO's
    score_range: Positive | None = None  # r_max - r_min (authors: .166581 of PickScore); None: the largest margin
    num_inversion_steps: Natural = 5  # grid (authors: 5); 0: random noise, as in Diffusion-DPO
    renoise: bool = True  # a second evaluation an inversion step; False: DDIM inversion, as in InPO
    level: Literal["new", "old"] = "new"  # at which it is made ("old": the official code)


def smooth_labels(
    r_w: Float[Tensor, "n"], r_l: Float[Tensor, "n"], r_min: Tensor | float | int, r_max: Tensor | float | int
) -> Float[Tensor, "n"]:
    """p = sigmoid(r'_w - r'_l), r' = (r - r_min) / (r_max - r_min): how sure the scores are, (n,), 1/2 at a tie."""
    return ((r_w - r_l) / (r_max - r_min)).sigmoid()


def smooth_weights(
    r_w: Float[Tensor, "n"],
    r_l: Float[Tensor, "n"],
    r_min: Tensor | float | int,
    r_max: Tensor | float | int,
    gamma: Tensor | float | int,
) -> Float[Tensor, "n"]:
    """w = 2 alpha - gamma = gamma (2 p - 1) = gamma tanh((r'_w - r'_l) / 2), eq. 9, (n,).

    r_min, r_max: of all the scores of a data set, not of a batch. Limits: 0 at a tie, whose loss is log 2 with no
    gradient; gamma tanh(1/2) = .4621 gamma for the widest possible margin; below 0 where label and scores disagree.
    """
    return gamma * (((r_w - r_l) / (r_max - r_min)) / 2).tanh()


def scores_of(pairs: Pairs, config: Config) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
    """(r_w, r_l, r_min, r_max) as far as pairs know them, the losers' as 0: what the smoothing takes.

    Raises ValueError for pairs whose strengths are not what a reward model that labelled them would have left.
    """
    repair = "label them by a reward model: pairs.relabel(pairs, by_reward(reward))."
    strengths = pairs.strengths
    if strengths is None:
        raise ValueError(f"the pairs have no strengths, from which SmPO takes its weights; {repair}")
    if strengths.ndim != 1:
        raise ValueError(
            f"the pairs have strengths of shape {tuple(strengths.shape)}; expected one each, ({len(pairs)},): sum over "
            "segments."
        )
    if not strengths.isfinite().all():
        raise ValueError(f"{int((~strengths.isfinite()).sum())} of {len(pairs)} strengths are nan or inf; {repair}")
    if below := int((strengths < 0).sum()):
        raise ValueError(
            f"{below} of {len(pairs)} strengths are below 0: there the label contradicts the scores, and SmPO would "
            f"push the wrong way; {repair}"
        )
    if not strengths.any():
        raise ValueError(f"all {len(pairs)} strengths are 0: every pair is a tie, and no weight is left; {repair}")
    span = strengths.max() if config.score_range is None else strengths.new_tensor(config.score_range)
    if strengths.max() > span * (1 + 1e-6):
        raise ValueError(
            f"score_range is {config.score_range:g}, but one strength is {float(strengths.max()):g}: give r_max - "
            "r_min of all scores, or None."
        )
    return strengths, torch.zeros_like(strengths), torch.zeros_like(span), span


def weights_of(pairs: Pairs, config: Config = Config()) -> Float[Tensor, "pairs"]:
    """Each pair's weight w, (pairs,), never below 0. See `scores_of` for what is refused."""
    scores = scores_of(pairs, config)
    if config.gamma is not None:
        return smooth_weights(*scores, config.gamma)
    weights = smooth_weights(*scores, 1.0)
    return weights / weights.mean()


def train(policy, pairs: Pairs, config: Config = Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on labelled pairs of its states; yields a `Step` an update: `diffusion_dpo.train`.

    The pairs' strengths (winner's score - loser's, of the model that labelled them) give the weights, once, over all
    pairs; smoothing "none" asks for none. Raises ValueError where they are missing, or contradict the labels.
    """
    if config.smoothing == "label" and (config.loss != "dpo" or config.label_smoothing):
        raise ValueError("smoothing 'label' is a loss of its own: leave loss at 'dpo' and label_smoothing at 0.")
    if config.num_inversion_steps and hasattr(policy, "terminal_std"):
        raise ValueError(
            f"the policy is a {type(policy).__name__}, which draws by jumps: no small steps to be read backwards. Set "
            "num_inversion_steps to 0, or use a DiffusionPolicy or a FlowPolicy."
        )
    diffusion_dpo.check(policy, pairs, config)
    changed = {}
    if config.num_inversion_steps:
        changed["noiser"] = Inversion(config.num_inversion_steps, renoise=config.renoise, level=config.level)
        changed["levels"] = partial(invertible_levels, policy)
    if config.smoothing == "margin":
        changed["weights"] = weights_of(pairs, config)
    if config.smoothing == "label":
        changed["labels"] = smooth_labels(*scores_of(pairs, config))
    yield from diffusion_dpo.train(policy, pairs, config, generator, resume, **changed)


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """Diffusion-DPO's passes, and both images of each pair once or, with ReNoise, twice an inversion step."""
    passes = diffusion_dpo.floor(policy, config, metrics)
    return passes | {"forward": passes["forward"] * (1 + config.num_inversion_steps * (1 + config.renoise))}
