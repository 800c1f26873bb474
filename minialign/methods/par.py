"""PAR, "Preference As Reward", and the reward shapings it is compared with (Fu et al., 2025, arXiv 2502.18770).

A policy that climbs a learned reward soon finds where the reward model errs upwards. So do not ask how high the score
is; ask how often the reward model itself would prefer this response to what the base model had to say. That is the
Bradley-Terry probability against reference responses: bounded by 1, fast at first and slow later, and centred.

    f = mean_m sigmoid(k (r - r_ref^m))                         shape_reward(..., "par")
    every other shaping of the paper's table                    SHAPINGS
    running mean, population std, minimum and maximum           statistics.Moments, merged
    M reference responses a prompt, scored once before RL       reference_rewards
    the same as a reward for any loop of this package           Shaped

`Shaped(reward, references)` is again `reward(samples, prompts)`, of texts and of images alike: PPO, DDPO and RLCM take
it as it is. As in the paper no gradient passes through f. As in the code: statistics take in the batch before it is
normalised. As in neither: shaping is done in float32 at least (in bfloat16 the sigmoid is exactly 1 from 5.6 on), only
training batches count, and `freeze` keeps the statistics at those of the reference responses, without which Clip drifts
with the policy and bounds nothing. Affine shapings (centred, meanstd, minmax) only rescale the KL weight: compare at
equal KL, not at equal steps (sheet par, trap 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from minialign.kernels import at_least_float32
from minialign.loop import gather_everything
from minialign.rewards import checked, load_states, name_of, states, within
from minialign.settings import Count, NonNegative, Number, Positive, Settings
from minialign.statistics import Moments

Z_85 = 1.0364333894937898  # the .85 quantile of a standard normal
# Least squares of the sigmoid on 100 points of [-5, 5], from x^5 down; even terms vanish by symmetry, but for the .5.
POLYNOMIAL = (2.0267e-4, 0.0, -1.01309e-2, 0.0, 2.287885e-1, 0.5)


@dataclass(frozen=True)
class Config(Settings):
    method: Literal[
        "vanilla", "centred", "ceil", "meanstd", "clip", "minmax", "lsc", "sigmoid", "tanh", "tanh_centred", "poly",
        "poly_centred", "sgfc", "par",
    ] = "par"  # fmt: skip
    k: Positive = 1.0  # steepness of the sigmoids (ablated: 2, 3)
    shift: Number = 3.0  # of "sgfc": slow growth, fast convergence
    ceiling: Number = 5.0  # of "ceil" (ablated: 4, 3)
    freeze: bool = False  # statistics of the reference responses alone, instead of running ones
    length_limit: Count | None = None  # longer responses lose length_penalty an extra token (authors: 300, always on)
    length_penalty: NonNegative = 0.01


# The shapings: rewards r (b,), reference rewards refs (b, m), statistics s, config c -> (b,) ------------------------


def _polynomial(x: Tensor) -> Tensor:
    value = torch.zeros_like(x)
    for coefficient in POLYNOMIAL:
        value = value * x + coefficient
    return torch.where(x < -5, 0.0, torch.where(x > 5, 1.0, value))


def _over(distance: Tensor, spread: Tensor) -> Tensor:
    """distance / spread; 0 where rewards have no spread: there is no signal, and the distance is rounding."""
    return torch.where(spread > 0, distance / torch.where(spread > 0, spread, 1.0), 0.0)


def _log_sigmoid_centred(r: Tensor, refs: Tensor) -> Tensor:
    """log sigmoid(r - q), q the .85 quantile of the normal with the references' mean and Bessel std (0 if M = 1)."""
    std = refs.std(1) if refs.shape[1] > 1 else torch.zeros_like(r)
    return logsigmoid(r - (refs.mean(1) + Z_85 * (std + 1e-5)))


SHAPINGS = {
    "vanilla": lambda r, refs, s, c: r,
    "centred": lambda r, refs, s, c: (r[:, None] - refs).mean(1),
    "ceil": lambda r, refs, s, c: r.clamp_max(c.ceiling),
    "meanstd": lambda r, refs, s, c: _over(r - s.mean, s.std),
    "clip": lambda r, refs, s, c: r.clamp(s.mean - s.std, s.mean + s.std),
    "minmax": lambda r, refs, s, c: _over(r - s.low, s.high - s.low),
    "lsc": lambda r, refs, s, c: _log_sigmoid_centred(r, refs),
    "sigmoid": lambda r, refs, s, c: (c.k * r).sigmoid(),
    "tanh": lambda r, refs, s, c: r.tanh(),
    "tanh_centred": lambda r, refs, s, c: (r[:, None] - refs).tanh().mean(1),
    "poly": lambda r, refs, s, c: _polynomial(r),
    "poly_centred": lambda r, refs, s, c: _polynomial(r[:, None] - refs).mean(1),
    "sgfc": lambda r, refs, s, c: (c.k * (r[:, None] - c.shift - refs)).sigmoid().mean(1),
    "par": lambda r, refs, s, c: (c.k * (r[:, None] - refs)).sigmoid().mean(1),
}
NEEDS_REFERENCES = ("centred", "lsc", "tanh_centred", "poly_centred", "sgfc", "par")
NEEDS_STATISTICS = ("meanstd", "clip", "minmax")


def shape_reward(
    rewards: Float[Tensor, "b"],
    references: Float[Tensor, "b m"] | None = None,
    config: Config | str = Config(),
    statistics: Moments | None = None,
    lengths: Tensor | None = None,
) -> Float[Tensor, "b"]:
    """The number that RL maximises instead of the reward: one of SHAPINGS, outside autograd, float32 at least.

    references: rewards of M responses of the base model to the same prompt, a row a sample. statistics: those of all
    rewards so far, this batch included. lengths (b,) in tokens, where the config has a length_limit.
    Raises ValueError for an unknown method, or for references or statistics that it needs and did not get.
    """
    config = Config(method=config) if isinstance(config, str) else config
    for kind, needed, given in (
        ("references", NEEDS_REFERENCES, references),
        ("statistics", NEEDS_STATISTICS, statistics),
    ):
        if config.method in needed and given is None:
            raise ValueError(f"shaping {config.method!r} needs {kind}: pass {kind}=, or use Shaped, which keeps them.")
    r = at_least_float32(rewards.detach())
    if config.length_limit is not None:
        if lengths is None:
            raise ValueError(f"length_limit is {config.length_limit}, but no lengths were given.")
        r = r - config.length_penalty * (lengths - config.length_limit).clamp_min(0)
    refs = None if references is None else at_least_float32(references.detach())
    return SHAPINGS[config.method](r, refs, statistics, config)


# With a policy ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_rewards(
    policy,
    reward,
    prompts: Sequence[str],
    num_references: int = 10,
    generator: torch.Generator | None = None,
    **sampling,
) -> dict[str, Float[Tensor, "m"]]:
    """{prompt: rewards of M of the policy's own responses}: call it before training, while the policy is the base.

    sampling: what `policy.sample` wants besides, for example num_tokens of a language policy.
    """
    unique = list(dict.fromkeys(prompts))
    repeated = [prompt for prompt in unique for _ in range(num_references)]
    scores = checked(reward, policy.sample(repeated, generator=generator, **sampling), repeated)
    return dict(zip(unique, scores.view(len(unique), num_references), strict=True))


class Shaped:
    """A shaped reward, itself a reward: `Shaped(reward, references)(samples, prompts) -> (b,)`, for any training loop.

    references: from `reference_rewards`; needed by some shapings, and for `freeze`. Running statistics take in every
    batch that it is called with, so watch progress with the reward itself. `raw` holds the last batch's own rewards.
    length_of(samples) -> (b,): tokens, for a length_limit. With DDPO set scale_advantages=False: dividing by a
    group's std blows up again what shaping has made small.
    """

    def __init__(self, reward, references: dict[str, Tensor] | None = None, config: Config = Config(), length_of=None):
        if references is None and (config.freeze or config.method in NEEDS_REFERENCES):
            raise ValueError(f"shaping {config.method!r} needs references: reference_rewards(policy, reward, prompts).")
        if config.length_limit is not None and length_of is None:
            raise ValueError("length_limit needs length_of, which counts the tokens of samples.")
        self.reward, self.references, self.config, self.length_of = reward, references, config, length_of
        self.__name__ = f"{config.method} of {name_of(reward)}"
        self.raw: Tensor | None = None
        self.statistics = Moments.of(torch.stack(list(references.values()))) if config.freeze else None
        if config.freeze and config.method in ("meanstd", "minmax") and not self.statistics.std > 0:
            raise ValueError(
                f"the references all have the same reward, {float(self.statistics.mean):g}, so frozen statistics give "
                f"{config.method!r} nothing to divide by: draw more of them, or set freeze=False."
            )

    def __call__(self, samples, prompts: Sequence[str]) -> Float[Tensor, "b"]:
        self.raw = checked(self.reward, samples, prompts).detach()
        lengths = self.length_of(samples) if self.length_of else None
        rewards = self.raw
        if lengths is not None and self.config.length_limit is not None:  # before everything else, statistics included
            rewards = shape_reward(rewards, config=replace(self.config, method="vanilla"), lengths=lengths)
        if not self.config.freeze:
            new = Moments.of(gather_everything(rewards))
            self.statistics = new if self.statistics is None else self.statistics.merge(new)
        refs = None if self.references is None else self._rows(prompts).to(rewards.device)
        return shape_reward(rewards, refs, replace(self.config, length_limit=None), self.statistics)

    def tensors(self) -> dict[str, Tensor]:
        """The running statistics, and the state of the reward that is shaped, for a run's checkpoint."""
        own = {} if self.statistics is None else {"statistics": self.statistics}
        return states(own | {"reward": self.reward})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Statistics that a checkpoint does not hold stay as they are."""
        load_states({"reward": self.reward}, tensors)
        if found := within(tensors, "statistics"):
            self.statistics = Moments(**found)

    def _rows(self, prompts: Sequence[str]) -> Float[Tensor, "b m"]:
        unknown = next((prompt for prompt in prompts if prompt not in self.references), None)
        if unknown is not None:
            raise ValueError(
                f"no reference rewards for prompt {unknown!r}; score its base responses first: reference_rewards."
            )
        return torch.stack([self.references[prompt] for prompt in prompts])


# On the command line --------------------------------------------------------------------------------------------------


def shape(policy, reward, prompts, config: Config, generator: torch.Generator, **sampling) -> Shaped:
    """The reward that another method's loop maximises instead; ten responses a prompt, drawn before training."""
    needed = config.freeze or config.method in NEEDS_REFERENCES
    references = reference_rewards(policy, reward, prompts, generator=generator, **sampling) if needed else None
    return Shaped(reward, references, config)
