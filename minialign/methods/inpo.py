"""InPO: inversion preference optimisation (Lu et al., CVPR 2025, arXiv 2503.18454).

Diffusion-DPO judges an image at noisy versions of it that a coin flip chose; most of them the model would never have
met on its way to that image, so the gradient is noisy and training long. InPO asks which noisy version the model itself
would have made the image from, by DDIM inversion, and compares there: x_t becomes a function of the image. Seen from
one level t the network is a one-step generator of x_0, and the pair (x_0, x_t) has a reward of its own.

    x_t = inversion of x_0 up to t, no gradient                       policies.inversion.invert
    tau = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)                 implied_noise, by which x_t is corrupted exactly
    x_0 - x0hat_theta(x_t) = sqrt(1 - abar_t) / sqrt(abar_t) (eps_theta(x_t) - tau): an error of the noise again
    Diffusion-DPO's loss with tau in the place of eps                 diffusion_dpo.train(noiser=Inversion(...))

Limit: the forward process as the noiser is Diffusion-DPO, bit for bit. In a world of one Gaussian InPO is Diffusion-DPO
with each level's logit weighted by a number between 1/2 and 1: what it gains, it gains where there are several modes.

Not as in the official code: a row's inversion ends at the level that is named (there, at the next one of a fixed grid,
up to 99 of 1000 away: `official_grid`), and the reference inverts (there, the policy of the moment, whose drift feeds
back: `invert_with`). A step costs more than Diffusion-DPO's, (8 + 2 n) / 8 of its network evaluations with n inversion
steps: compare on that axis too.
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
from minialign.pairs import Pairs
from minialign.policies.inversion import implied_noise, invert
from minialign.policies.trajectory import Condition
from minialign.settings import Count, Natural, NonNegative


@dataclass(frozen=True)
class Config(diffusion_dpo.Config):
    num_iterations: Count = 100  # optimizer steps (paper: 400)
    warmup_updates: Natural = 10  # over which the learning rate rises (code: 200)
    num_inversion_steps: Count = 5  # network calls from the image to its level (code: 10)
    invert_with: Literal["reference", "policy"] = "reference"  # whose sampler is read backwards (paper: the policy's)
    inversion_noise: NonNegative = 0.0  # added after each step, in the posterior's standard deviations (code: .1)
    official_grid: bool = False  # stops at the next level of a fixed grid, and says it were the one asked for


@dataclass(frozen=True)
class Inversion:
    """A noiser: the noise that takes an image to where the model's own sampler would have come from.

    renoise, level: see `invert` (SmPO). noise_shape: of what it is given beside the latent's own axes, a draw for each
    step where random_term, in standard deviations, is not 0.
    """

    num_steps: int = 5
    invert_with: Literal["reference", "policy"] = "reference"
    random_term: float | int = 0.0
    official_grid: bool = False
    renoise: bool = False
    level: Literal["new", "old"] = "new"

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.num_steps,) if self.random_term else ()

    def __call__(
        self, policy, latents: Tensor, levels: Float[Tensor, "n"] | Tensor, condition: Condition, noise: Tensor
    ) -> Tensor:
        """tau (n, *latent) of latents at `levels` (n,). noise (n, *noise_shape, *latent): standard normal.

        No gradient. At a diffusion policy's level 0 no step is left to make and tau is a shrunken image, no noise.
        """
        states = invert(
            policy,
            latents,
            official_levels(policy, levels, self.num_steps) if self.official_grid else levels,
            condition,
            num_steps=self.num_steps,
            renoise=self.renoise,
            level=self.level,
            reference=self.invert_with == "reference",
            noise=self.random_term * noise if self.random_term else None,
        )
        return implied_noise(policy, latents, levels, states)


def official_levels(policy, levels: Tensor, num_steps: int) -> Tensor:
    """Where the official code's inversion ends when `levels` (n,) are asked for, and named: the next of a fixed grid.

    The grid has num_steps levels, 1, 1 + T / num_steps, ..., so beyond its last one the inversion falls short instead.
    Of a flow: 1 / num_steps, ..., 1.
    """
    if levels.is_floating_point():
        return (levels * num_steps - 1e-4).ceil() / num_steps
    stride = max(1, policy.scheduler.config.num_train_timesteps // num_steps)
    steps = torch.div(levels + stride - 2, stride, rounding_mode="floor")  # (level - 1) / stride, rounded up
    return 1 + stride * steps.clamp(0, num_steps - 1)


def invertible_levels(policy, n: int, generator: torch.Generator | None = None) -> Tensor:
    """The policy's own levels; timestep 0, up to which nothing is inverted, so that tau is no noise, becomes 1."""
    levels = policy.draw_levels(n, generator)
    return levels if levels.is_floating_point() else levels.clamp_min(1)


def train(policy, pairs: Pairs, config: Config = Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy` in place on labelled pairs of its states; yields a `Step` an update: `diffusion_dpo.train`.

    Raises ValueError for a policy that no ODE samples, and for what Diffusion-DPO refuses.
    """
    if hasattr(policy, "terminal_std"):
        raise ValueError(
            f"the policy is a {type(policy).__name__}, which jumps to data, and inversion reads small steps back: use "
            "a DiffusionPolicy or a FlowPolicy."
        )
    noiser = Inversion(
        config.num_inversion_steps, config.invert_with, config.inversion_noise, config.official_grid
    )  # fmt: skip
    levels = partial(invertible_levels, policy)
    yield from diffusion_dpo.train(policy, pairs, config, generator, resume, noiser=noiser, levels=levels)


def floor(policy, config: Config, metrics: dict) -> dict:
    """Diffusion-DPO's passes, and both images of each pair once an inversion step."""
    passes = diffusion_dpo.floor(policy, config, metrics)
    return passes | {"forward": passes["forward"] * (1 + config.num_inversion_steps)}
