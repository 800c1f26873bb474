"""Gaussian mixtures as worlds: the exact score is known at every noise level, so the base model needs no training.

    compass    2-D, four coarse modes, each inner or outer: what the prompt asks for
    ring       2-D, eight modes on a circle
    line       1-D, one Gaussian: the sampler's law, its optimum and its gradient are numbers in closed form

The base model is an `ExactDenoiser`, the data an `exact.GaussianMixture`.
Sheets: ddpo and b2diffurl (compass, line), rlcm (compass's rewards), diffusion_dpo (ring).
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.exact import GaussianMixture, LinearGaussianFlow, LinearGaussianSampler
from minialign.exemplars import FeatureReward, frechet_to, mmd_to, vendi
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.flow import FlowPolicy
from minialign.settings import Count, demand
from minialign.worlds import gaussian_pictures
from minialign.worlds.base import World
from minialign.worlds.exact_denoiser import ExactDenoiser, ExactVelocity, PerStepLinear, PerStepScalar, ResidualMLP

# The three mixtures -------------------------------------------------------------------------------------------------

COMPASS_CLASSES = ("inner", "outer")
COMPASS_STD = 0.08
COMPASS_STYLE = (1.0, 0.3, -0.3, -1.0)  # what the nuisance reward pays for each coarse mode, in compass_modes' order


def compass_modes() -> Float[Tensor, "4 2"]:
    """The four coarse modes: right-up, right-down, left-up, left-down."""
    return 1.1 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def compass_submodes() -> Float[Tensor, "4 2 2"]:
    """Centres (coarse mode, inner or outer, xy): each coarse mode moved by -0.3 or +0.3 along its own diagonal."""
    modes = compass_modes().unsqueeze(1)
    return modes + torch.tensor([-0.3, 0.3]).reshape(1, 2, 1) * modes / modes.norm(dim=-1, keepdim=True)


def compass() -> GaussianMixture:
    """Eight equal components of sd 0.08, component 2 m + s: coarse mode m, inner (s = 0) or outer (s = 1)."""
    return GaussianMixture.isotropic(compass_submodes().flatten(0, 1), COMPASS_STD)


def ring_modes(radius: float = 2.0, num_modes: int = 8) -> Float[Tensor, "modes 2"]:
    """Equal angles on a circle, anticlockwise from (radius, 0)."""
    angle = torch.arange(num_modes) * (2 * math.pi / num_modes)
    return radius * torch.stack([angle.cos(), angle.sin()], -1)


def ring(radius: float = 2.0, std: float = 0.25, num_modes: int = 8) -> GaussianMixture:
    """Equal components of one sd on a circle."""
    return GaussianMixture.isotropic(ring_modes(radius, num_modes), std)


def line(mean: float = 0.0, std: float = 1.0) -> GaussianMixture:
    """One Gaussian in one dimension."""
    return GaussianMixture.isotropic(torch.tensor([[mean]]), std)


# Measures -----------------------------------------------------------------------------------------------------------


def nearest_mode(samples: Float[Tensor, "b d"], modes: Float[Tensor, "m d"]) -> Int[Tensor, "b"]:
    """Index of the nearest centre."""
    return torch.cdist(samples, modes.to(samples)).argmin(-1)


def mode_entropy(samples: Float[Tensor, "b d"], modes: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Entropy, in nats, of how the samples share out over their nearest modes; at most log m (four modes: 1.386)."""
    counts = torch.bincount(nearest_mode(samples, modes), minlength=len(modes))
    return torch.special.entr(counts / counts.sum()).sum()


# Rewards ------------------------------------------------------------------------------------------------------------


def _wanted(prompts: Sequence[str], samples: Tensor) -> Int[Tensor, "b"]:
    """0 for "inner", 1 for "outer"."""
    for prompt in prompts:
        if prompt not in COMPASS_CLASSES:
            raise ValueError(f"unknown prompt {prompt!r}; compass has: {', '.join(COMPASS_CLASSES)}.")
    return torch.tensor([COMPASS_CLASSES.index(prompt) for prompt in prompts], device=samples.device)


def gold(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """1 within 0.2 of the centre of a sub-mode of the prompted kind, else 0. The base model gets 0.43 to 0.45."""
    centres = compass_submodes().to(samples)[:, _wanted(prompts, samples)]  # (mode, b, 2)
    return ((samples - centres).norm(dim=-1).amin(0) < 0.2).to(samples.dtype)


def side(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """1 on the left (x_1 < 0) for "inner", on the right for "outer": decided early, by the coarse mode (sheet rlcm)."""
    return ((samples[:, 0] > 0) == (_wanted(prompts, samples) == 1)).to(samples.dtype)


def side_and_quality(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """`side`, and within 0.25 of some component's centre."""
    distance = torch.cdist(samples, compass_submodes().flatten(0, 1).to(samples)).amin(-1)
    return side(samples, prompts) * (distance < 0.25).to(samples.dtype)


def style(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """What a reward model likes for no good reason: 1, .3, -.3 or -1 by coarse mode, whatever the prompt."""
    return torch.tensor(COMPASS_STYLE).to(samples)[nearest_mode(samples, compass_modes())]


def styled_gold(samples: Float[Tensor, "b 2"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """gold + 0.4 style: the nuisance is decided by the early steps, the gold attribute by the last six or so."""
    return gold(samples, prompts) + 0.4 * style(samples, prompts)


def first_coordinate(samples: Float[Tensor, "b d"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """x_1: linear, so the optimum is a mixture in closed form (`GaussianMixture.tilt`)."""
    return samples[:, 0]


def mode_value(modes: Float[Tensor, "m d"], values: Float[Tensor, "m"]) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A reward that pays values[nearest mode]: the optimum over modes is a table, `exact.exponential_tilt`."""

    def mode_value(samples: Float[Tensor, "b d"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        return values.to(samples)[nearest_mode(samples, modes)]

    return mode_value


def on_mode(centre: Float[Tensor, "d"], radius: float) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A 0/1 reward: within `radius` of one centre."""

    def on_mode(samples: Float[Tensor, "b d"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        return ((samples - centre.to(samples)).norm(dim=-1) < radius).to(samples.dtype)

    return on_mode


def sets_like(mixture: GaussianMixture, component: Int[Tensor, "k"]) -> dict[str, Callable[[], FeatureReward]]:
    """Rewards of a set: near 500 points of some components of the data, in two ways; diverse, by the distance."""

    def exemplars() -> Tensor:
        wanted = torch.zeros(500, mixture.num_components).index_fill(1, component, 1.0)
        return mixture.sample(500, torch.Generator().manual_seed(0), wanted.log())[0]

    return {
        "like_exemplars": lambda: frechet_to(exemplars()),
        "mmd_to_exemplars": lambda: mmd_to(exemplars()),
        "vendi": lambda: vendi(bandwidth=0.5**0.5),
    }


# Worlds -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class GaussianWorld(World):
    """A world whose data is `mixture`.

    In the plane: `modes` (m, 2), their `submodes` (m, 2, 2) or `mode_values` (m,). On the line: `sampler`, the policy's
    own law in closed form.
    """

    mixture: GaussianMixture
    modes: Tensor | None = None
    submodes: Tensor | None = None
    mode_values: Tensor | None = None
    sampler: LinearGaussianSampler | None = None


RESIDUALS = ("mlp", "per_step_linear", "per_step_scalar")
NUM_STEPS = {"diffusion": 20, "flow": 10}  # of a policy, where nothing else is said
MODELS = tuple(NUM_STEPS)
SCHEDULES = ("stable_diffusion", "cosine")


def load(
    name: str = "compass",
    *,
    model: str = "diffusion",
    num_steps: int | None = None,
    eta: float | int = 1.0,
    noise_level: float | int = 0.7,
    schedule: str = "stable_diffusion",
    residual: str | None = None,
    seed: int = 0,
    **settings: float | int,
) -> GaussianWorld:
    """compass, ring or line, its policy a perfect base model that has not been trained.

    model "diffusion": a DiffusionPolicy of 20 steps, `eta` and `schedule` ("stable_diffusion", or "cosine": 100 levels,
    of which more lie where modes are told apart); "flow": a FlowPolicy of 10 steps and `noise_level`.
    residual: "mlp" (compass and ring's own), "per_step_linear" or "per_step_scalar" (line's own); `seed` draws the
    MLP's weights. settings: radius, std and num_modes of ring, mean and std of line.
    """
    builders = {"compass": _compass, "ring": _ring, "line": _line}
    known = {"compass": (), "ring": ("radius", "std", "num_modes"), "line": ("mean", "std")}
    if name not in builders:
        raise ValueError(f"unknown gaussian world {name!r};{_near(name, builders)} There are: {', '.join(builders)}.")
    for setting in settings:
        if setting not in known[name]:
            own = ", ".join(("model", "num_steps", "eta", "noise_level", "schedule", "residual", "seed", *known[name]))
            raise ValueError(f"world {name!r} has no setting {setting!r}. There are: {own}.")
    if residual is not None and residual not in RESIDUALS:
        known = ", ".join(RESIDUALS)
        raise ValueError(f"unknown residual {residual!r};{_near(residual, RESIDUALS)} There are: {known}.")

    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"unknown schedule {schedule!r};{_near(schedule, SCHEDULES)} There are: {known}.")
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r};{_near(model, MODELS)} There are: {', '.join(MODELS)}.")

    def policies(mixture: GaussianMixture, classes: tuple[str, ...] | None, own_residual: str) -> dict[str, Callable]:
        steps = {kind: num_steps if kind == model and num_steps is not None else own for kind, own in NUM_STEPS.items()}
        given = mixture, classes, residual or own_residual
        builders = {
            "diffusion": lambda: _policy(*given, steps["diffusion"], eta, schedule, seed),
            "flow": lambda: _flow_policy(*given, steps["flow"], noise_level, seed),
        }
        return {model: builders.pop(model), **builders}

    world = builders[name](policies, **settings)
    world.policy  # noqa: B018 (built now, so that what is wrong with its settings is said here)
    return world


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" did you mean {near[0]!r}?" if near else ""


def scheduler(schedule: str = "stable_diffusion"):
    """Stable Diffusion's noise levels, or 100 of a cosine, which has more in the middle (Nichol and Dhariwal, 2021).

    The cosine's alpha_bar = cos^2 of an even grid of angles, from .9999 to .001: at lower ones a small error of the
    noise, which preference losses weigh alike at all levels, is a large one of x_0.
    The last step is still noisy (timestep 1), which a density needs.
    """
    from diffusers import DDIMScheduler

    if schedule == "cosine":
        alpha_bar = torch.linspace(math.acos(0.9999**0.5), math.acos(0.001**0.5), 100, dtype=torch.float64).cos() ** 2
        betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return DDIMScheduler(
            num_train_timesteps=100, trained_betas=betas.tolist(), steps_offset=1, clip_sample=False,
            set_alpha_to_one=False,
        )  # fmt: skip
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _residual(name: str, timesteps: Tensor, dim: int, num_classes: int, seed: int, train_steps: int = 1000):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return ResidualMLP(dim, num_classes, num_train_timesteps=train_steps)
        return PerStepLinear(timesteps, dim, num_classes) if name == "per_step_linear" else PerStepScalar(timesteps)


def _policy(
    mixture: GaussianMixture,
    classes: tuple[str, ...] | None,
    residual: str,
    num_steps: int,
    eta: float | int,
    schedule: str,
    seed: int,
) -> DiffusionPolicy:
    levels = scheduler(schedule)
    demand(Count, num_steps=num_steps)
    levels.set_timesteps(num_steps)
    train_steps = levels.config.num_train_timesteps
    network = _residual(residual, levels.timesteps, mixture.dim, len(classes or ()), seed, train_steps)
    return DiffusionPolicy(
        ExactDenoiser(mixture, levels.alphas_cumprod, network), levels, latent_shape=(mixture.dim,),
        class_names=classes, num_steps=num_steps, eta=eta,
    )  # fmt: skip


def _flow_policy(
    mixture: GaussianMixture,
    classes: tuple[str, ...] | None,
    residual: str,
    num_steps: int,
    noise_level: float | int,
    seed: int,
) -> FlowPolicy:
    demand(Count, num_steps=num_steps)
    timesteps = (1000 * torch.linspace(1, 1 / num_steps, num_steps)).round().long().clamp_max(999)
    network = _residual(residual, timesteps, mixture.dim, len(classes or ()), seed)
    return FlowPolicy(
        ExactVelocity(mixture, network), latent_shape=(mixture.dim,), class_names=classes, num_steps=num_steps,
        noise_level=noise_level,
    )  # fmt: skip


def _compass(policies: Callable[..., dict[str, Callable]]) -> GaussianWorld:
    mixture = compass()

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        samples, component = mixture.sample(n, generator)
        return samples, [COMPASS_CLASSES[i % 2] for i in component.tolist()]

    return GaussianWorld(
        name="compass",
        policies=policies(mixture, COMPASS_CLASSES, "mlp"),
        prompts=list(COMPASS_CLASSES),
        rewards={
            "gold": gold,
            "side": side,
            "side_and_quality": side_and_quality,
            "style": style,
            "styled_gold": styled_gold,
        },
        set_rewards=sets_like(mixture, torch.tensor([0, 1, 6, 7])),  # right-up and left-down
        default_reward="gold",
        oracle=gold,
        real=real,
        show=gaussian_pictures.plane(mixture, lambda samples: nearest_mode(samples, compass_modes()), gold),
        mixture=mixture,
        modes=compass_modes(),
        submodes=compass_submodes(),
    )


def _ring(
    policies: Callable[..., dict[str, Callable]], radius: float = 2.0, std: float = 0.25, num_modes: int = 8
) -> GaussianWorld:
    mixture, modes = ring(radius, std, num_modes), ring_modes(radius, num_modes)
    values = 1 - torch.arange(num_modes) / num_modes  # lopsided on purpose: mode 0, on the right, is the best
    oracle = on_mode(modes[0], 3 * std)

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        return mixture.sample(n, generator)[0], ["a point"] * n

    return GaussianWorld(
        name="ring",
        policies=policies(mixture, None, "mlp"),
        prompts=["a point"],
        set_rewards=sets_like(mixture, torch.tensor([0, num_modes // 2])),  # right and left
        rewards={"first_coordinate": first_coordinate, "mode_value": mode_value(modes, values), "on_mode": oracle},
        default_reward="first_coordinate",
        oracle=oracle,
        real=real,
        show=gaussian_pictures.plane(mixture, lambda samples: nearest_mode(samples, modes), oracle),
        mixture=mixture,
        modes=modes,
        mode_values=values,
    )


def _line(policies: Callable[..., dict[str, Callable]], mean: float = 0.0, std: float = 1.0) -> GaussianWorld:
    mixture = line(mean, std)

    def above_most_data(samples: Float[Tensor, "b 1"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        return (samples[:, 0] > mean + std).to(samples.dtype)

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        return mixture.sample(n, generator)[0], ["a number"] * n

    world = GaussianWorld(
        name="line",
        policies=policies(mixture, None, "per_step_scalar"),
        prompts=["a number"],
        rewards={"first_coordinate": first_coordinate, "above_most_data": above_most_data},
        default_reward="first_coordinate",
        oracle=above_most_data,
        real=real,
        show=gaussian_pictures.line(mixture),
        mixture=mixture,
    )
    base = world.policy
    if world.policy_kind == "flow":
        world.sampler = LinearGaussianFlow(mean, std, base.num_steps, base.noise_level)
    else:
        world.sampler = LinearGaussianSampler(mean, std, base.num_steps, base.eta, base.scheduler.alphas_cumprod)
    return world
