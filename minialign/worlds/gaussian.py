"""Gaussian mixtures as worlds: the exact score is known at every noise level, so the base model needs no training.

    GaussianMixture      density, samples, exact noise prediction, posterior mean, tilts; any dimension and covariance
    ExactDenoiser        that noise prediction as a network, plus a residual that starts at zero and is all that trains
    compass ring line    2-D, four coarse modes, each inner or outer; 2-D, eight modes on a circle; 1-D, one Gaussian

A `DiffusionPolicy` around an `ExactDenoiser` is a perfect base model with no pretraining; its reference is the residual
left out. Noise levels are variance preserving: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.
Sheets: ddpo and b2diffurl (compass, line), rlcm (compass's rewards), diffusion_dpo (ring), teleport (mixtures).
"""

import difflib
import math
from collections.abc import Callable, Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minialign import show as pictures
from minialign.exact import LinearGaussianSampler, tilt_gaussian_mixture
from minialign.policies.diffusion import DiffusionPolicy
from minialign.worlds.base import World

# The mixture --------------------------------------------------------------------------------------------------------


class GaussianMixture(nn.Module):
    """sum_c weights_c N(means_c, covariances_c), and every question about its noised versions answered exactly.

    Covariances are diagonalised once: noise only shifts their eigenvalues, to alpha_bar lambda + 1 - alpha_bar, so no
    call inverts a matrix. x is (batch, *dims) with d = prod(dims) elements, so images need no reshaping;
    alpha_bar is (batch,) or a number. `log_weights` (batch, c) replaces the mixture's own row by row: a question about
    a class. Results have x's dtype; the arithmetic is in float32 at least.
    Raises ValueError for covariances that are not symmetric and positive semi-definite, and for negative weights.
    """

    def __init__(
        self,
        means: Float[Tensor, "c d"],
        covariances: Float[Tensor, "c d d"],
        weights: Float[Tensor, "c"] | None = None,
    ):
        super().__init__()
        weights = torch.ones_like(means[:, 0]) if weights is None else weights
        if (weights < 0).any() or weights.sum() <= 0:
            raise ValueError(f"mixture weights are {weights.tolist()}; expected none negative and not all zero.")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
        slack = 1e-5 * covariances.abs().amax()
        if (eigenvalues < -slack).any() or ((covariances - covariances.mT).abs() > slack).any():
            raise ValueError("a covariance is not symmetric positive semi-definite; (A + A.mT) / 2 repairs rounding.")
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("eigenvalues", eigenvalues.clamp_min(0))  # (c, d)
        self.register_buffer("eigenvectors", eigenvectors)  # (c, d, k): columns

    @classmethod
    def isotropic(cls, means: Float[Tensor, "c d"], std: float, weights: Tensor | None = None) -> "GaussianMixture":
        """Components of one standard deviation `std` in every direction."""
        eye = torch.eye(means.shape[-1]).to(means)
        return cls(means, (std**2 * eye).expand(len(means), -1, -1), weights)

    @property
    def num_components(self) -> int:
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def covariances(self) -> Float[Tensor, "c d d"]:
        return self.eigenvectors * self.eigenvalues.unsqueeze(-2) @ self.eigenvectors.mT

    def moments(self) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
        """Mean and covariance of the whole mixture (law of total covariance)."""
        weights = self.log_weights.exp()
        mean = weights @ self.means
        centred = self.means - mean
        between = centred.T @ (weights.unsqueeze(-1) * centred)
        return mean, einsum(weights, self.covariances, "c, c i j -> i j") + between

    def sample(
        self, n: int, generator: torch.Generator | None = None, log_weights: Float[Tensor, "n c"] | None = None
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
        """n draws from the data, and the component that each came from."""
        weights = (self.log_weights.expand(n, -1) if log_weights is None else log_weights).exp()
        component = torch.multinomial(weights, 1, generator=generator).squeeze(-1)
        noise = torch.randn(n, self.dim, generator=generator, dtype=self.means.dtype, device=self.means.device)
        noise = noise * self.eigenvalues[component].sqrt()
        return self.means[component] + einsum(self.eigenvectors[component], noise, "n d k, n k -> n d"), component

    def _components(self, x: Tensor, alpha_bar: Tensor | float, log_weights: Tensor | None):
        """Eigen-coordinates of x - sqrt(alpha_bar) mean and their variances, (batch, c, k); log joint (batch, c)."""
        x = x.flatten(1)
        if x.shape[1] != self.dim:
            raise ValueError(f"x has {x.shape[1]} elements a sample; this mixture lives in {self.dim} dimensions.")
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.means.dtype), torch.float32)
        alpha_bar = torch.as_tensor(alpha_bar, dtype=dtype, device=x.device).reshape(-1, 1, 1)
        vectors, means = self.eigenvectors.to(dtype), self.means.to(dtype)
        rotated = einsum(means, vectors, "c d, c d k -> c k")
        y = einsum(x.to(dtype), vectors, "b d, c d k -> b c k") - alpha_bar.sqrt() * rotated
        variance = alpha_bar * self.eigenvalues.to(dtype) + (1 - alpha_bar)
        weights = (self.log_weights if log_weights is None else log_weights).to(dtype)
        joint = weights - ((y**2 / variance + variance.log()).sum(-1) + self.dim * math.log(2 * math.pi)) / 2
        return y, variance, joint

    def log_prob(
        self, x: Float[Tensor, "b *dims"], alpha_bar: Tensor | float = 1.0, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b"]:
        """log p(x_t) in nats; alpha_bar = 1 is the data."""
        return self._components(x, alpha_bar, log_weights)[2].logsumexp(-1).to(x.dtype)

    def responsibilities(
        self, x: Float[Tensor, "b *dims"], alpha_bar: Tensor | float = 1.0, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b c"]:
        """p(component | x_t)."""
        return self._components(x, alpha_bar, log_weights)[2].softmax(-1).to(x.dtype)

    def score(
        self, x: Float[Tensor, "b *dims"], alpha_bar: Tensor | float = 1.0, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b *dims"]:
        """grad_x log p(x_t)."""
        y, variance, joint = self._components(x, alpha_bar, log_weights)
        pull = joint.softmax(-1).unsqueeze(-1) * y / variance
        score = -einsum(pull, self.eigenvectors.to(pull.dtype), "b c k, c d k -> b d")
        return score.to(x.dtype).reshape(x.shape)

    def noise_pred(
        self, x: Float[Tensor, "b *dims"], alpha_bar: Tensor | float, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b *dims"]:
        """E[noise | x_t] = -sqrt(1 - alpha_bar) score: what a perfect epsilon network says."""
        alpha_bar = torch.as_tensor(alpha_bar, dtype=x.dtype, device=x.device)
        scale = rearrange((1 - alpha_bar).sqrt().reshape(-1), "b -> b" + " 1" * (x.ndim - 1))
        return -scale * self.score(x, alpha_bar, log_weights)

    def denoised(
        self, x: Float[Tensor, "b *dims"], alpha_bar: Tensor | float, log_weights: Tensor | None = None
    ) -> Float[Tensor, "b *dims"]:
        """E[x_0 | x_t], also at alpha_bar = 0, where it is the data's mean and noise_pred says nothing."""
        y, variance, joint = self._components(x, alpha_bar, log_weights)
        prob = joint.softmax(-1)
        signal = torch.as_tensor(alpha_bar, dtype=y.dtype, device=y.device).sqrt().reshape(-1, 1, 1)
        shrunk = prob.unsqueeze(-1) * signal * self.eigenvalues.to(y.dtype) / variance * y
        denoised = prob @ self.means.to(y.dtype) + einsum(shrunk, self.eigenvectors.to(y.dtype), "b c k, c d k -> b d")
        return denoised.to(x.dtype).reshape(x.shape)

    def probability_flow(
        self, x: Float[Tensor, "b *dims"], alpha_bar_from: float, alpha_bar_to: float
    ) -> Float[Tensor, "b *dims"]:
        """Where the probability-flow ODE takes x between two noise levels (sheet teleport): closed form, one Gaussian.

        Raises ValueError for a mixture of several, whose flow has no closed form: take `moments()` for its Gaussian.
        """
        if self.num_components != 1:
            raise ValueError(
                f"the flow of {self.num_components} components has no closed form; for the Gaussian of its "
                "moments: mean, covariance = mixture.moments(); GaussianMixture(mean[None], covariance[None])."
            )
        y, variance, _ = self._components(x, alpha_bar_from, None)
        variance_to = alpha_bar_to * self.eigenvalues.to(y.dtype) + 1 - alpha_bar_to
        moved = einsum(y * (variance_to / variance).sqrt(), self.eigenvectors.to(y.dtype), "b c k, c d k -> b d")
        return (math.sqrt(alpha_bar_to) * self.means.to(y.dtype) + moved).to(x.dtype).reshape(x.shape)

    def tilt(
        self, beta: float, linear: Tensor | None = None, quadratic: Tensor | None = None
    ) -> tuple["GaussianMixture", Float[Tensor, ""]]:
        """(p exp(r / beta) / Z, log Z), r = linear . x + x . quadratic . x / 2: see `exact.tilt_gaussian_mixture`."""
        out = tilt_gaussian_mixture(self.means, self.covariances, self.log_weights, beta, linear, quadratic)
        return GaussianMixture(out.means, out.covariances, out.log_weights.exp()), out.log_z


# Networks -----------------------------------------------------------------------------------------------------------


class ExactDenoiser(nn.Module):
    """A network that predicts the noise exactly, plus a residual: network(x, t, class_labels=None), as in diffusers.

    x (batch, *dims); t the training timestep, (batch,) or one for all; class_labels (batch,) int.
    The exact part has no parameters; `residual(x, t, class_labels)` starts at zero and is what training moves.
    `reference_forward` is the exact part alone: the frozen base model.
    alphas_cumprod (train_steps,): the scheduler's table. class_components, (classes, components) True where a class
    owns a component: the exact part then follows class_labels, and label `classes` (one too many) means no condition.
    Without it the base ignores the labels and only the residual sees them.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        alphas_cumprod: Float[Tensor, "t"],
        residual: nn.Module | None = None,
        class_components: Bool[Tensor, "classes c"] | None = None,
    ):
        super().__init__()
        self.mixture, self.residual = mixture, residual
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().clone())
        self.register_buffer("class_log_weights", None)
        if class_components is not None:
            rows = torch.cat([class_components, torch.ones_like(class_components[:1])])
            allowed = mixture.log_weights.masked_fill(~rows, -math.inf)
            self.class_log_weights = allowed.log_softmax(-1)

    def reference_forward(
        self, x: Float[Tensor, "b *dims"], t: Tensor | int, class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b *dims"]:
        """The exact noise prediction, with no residual."""
        alpha_bar = self.alphas_cumprod[torch.as_tensor(t, device=x.device)]
        chosen = self.class_log_weights is not None and class_labels is not None
        return self.mixture.noise_pred(x, alpha_bar, self.class_log_weights[class_labels] if chosen else None)

    def forward(
        self, x: Float[Tensor, "b *dims"], t: Tensor | int, class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b *dims"]:
        exact = self.reference_forward(x, t, class_labels)
        if self.residual is None:
            return exact
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return exact + self.residual(x.flatten(1), t, class_labels).reshape(x.shape)


class ResidualMLP(nn.Module):
    """A small MLP of (x, t, class) whose last layer is zero (sheet ddpo: 20-96-96-2 with SiLU).

    Inputs: x (batch, dim); sin and cos of w t / 1000 for `num_frequencies` w log-spaced from 1 to 1000; one-hot class.
    A label equal to num_classes means no condition: all zeros.
    """

    def __init__(self, dim: int = 2, num_classes: int = 2, width: int = 96, num_frequencies: int = 8):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("frequencies", torch.logspace(0, 3, num_frequencies))
        self.net = nn.Sequential(
            nn.Linear(dim + 2 * num_frequencies + num_classes, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dim),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(
        self, x: Float[Tensor, "b d"], t: Int[Tensor, "b"], class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b d"]:
        phase = t.unsqueeze(-1) / 1000 * self.frequencies
        parts = [x, phase.sin().to(x.dtype), phase.cos().to(x.dtype)]
        if self.num_classes:
            labels = torch.full_like(t, self.num_classes) if class_labels is None else class_labels
            parts.append(nn.functional.one_hot(labels, self.num_classes + 1)[:, :-1].to(x.dtype))
        return self.net(torch.cat(parts, -1))


class _PerStep(nn.Module):
    """Parameters of their own for every step of a time grid; a timestep off the grid uses the nearest step's."""

    def __init__(self, timesteps: Int[Tensor, "steps"], num_train_timesteps: int):
        super().__init__()
        distance = (torch.arange(num_train_timesteps).unsqueeze(-1) - timesteps.cpu()).abs()
        self.register_buffer("step_of", distance.argmin(-1))


class PerStepLinear(_PerStep):
    """weight[step, class] @ [x; 1], zero at first (sheet b2diffurl): training one step moves no other.

    weight (steps, classes, dim, dim + 1), the bias in the last column.
    """

    def __init__(
        self, timesteps: Int[Tensor, "steps"], dim: int = 2, num_classes: int = 2, num_train_timesteps: int = 1000
    ):
        super().__init__(timesteps, num_train_timesteps)
        self.weight = nn.Parameter(torch.zeros(len(timesteps), max(num_classes, 1), dim, dim + 1))

    def forward(
        self, x: Float[Tensor, "b d"], t: Int[Tensor, "b"], class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b d"]:
        labels = torch.zeros_like(t) if class_labels is None else class_labels
        weight = self.weight[self.step_of[t], labels]
        return (weight[..., :-1] @ x.unsqueeze(-1)).squeeze(-1) + weight[..., -1]


class PerStepScalar(_PerStep):
    """theta_i, one number a step, added to every element: the policy of the linear-Gaussian world (sheet ddpo)."""

    def __init__(self, timesteps: Int[Tensor, "steps"], num_train_timesteps: int = 1000):
        super().__init__(timesteps, num_train_timesteps)
        self.theta = nn.Parameter(torch.zeros(len(timesteps)))

    def forward(
        self, x: Float[Tensor, "b d"], t: Int[Tensor, "b"], class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b d"]:
        return self.theta[self.step_of[t]].unsqueeze(-1).expand_as(x)


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


# Pictures -----------------------------------------------------------------------------------------------------------


def _show_plane(mixture: GaussianMixture, modes: Tensor, oracle: Callable) -> Callable:
    """A picture of samples: a panel for each prompt, a colour for each mode, the data's density as lines."""
    reach = float(mixture.means.abs().amax() + 4 * mixture.eigenvalues.amax().sqrt())

    def show(samples: Float[Tensor, "b 2"], prompts: Sequence[str]):
        samples, unique = samples.detach().float().cpu(), list(dict.fromkeys(prompts))
        limits = min(max(reach, 1.05 * float(samples.abs().amax())), 2 * reach)
        with pictures.style():
            label = f"{len(samples)} samples of the plane, coloured by mode"
            fig = pictures.figure(0.6 + 4.2 * len(unique), 4.9, label)
            fig.set_layout_engine("compressed")
            axes = fig.subplots(1, len(unique), squeeze=False, sharex=True, sharey=True)[0]
            for ax, prompt in zip(axes, unique, strict=True):
                rows = torch.tensor([i for i, name in enumerate(prompts) if name == prompt])
                _draw_panel(ax, samples[rows], mixture, modes, limits)
                right = float(oracle(samples[rows], [prompt] * len(rows)).mean())
                ax.set(title=f"{prompt}: {right:.0%} right", xlabel="$x_1$")
            axes[0].set_ylabel("$x_2$")
        return fig

    return show


def _draw_panel(ax, samples: Tensor, mixture: GaussianMixture, modes: Tensor, limits: float) -> None:
    axis = torch.linspace(-limits, limits, 161)
    density = mixture.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(161, 161).T
    levels = [float(density.max()) * share for share in (0.02, 0.15, 0.5)]
    ax.contour(axis, axis, density, levels=levels, colors=pictures.QUIET, linewidths=0.8, alpha=0.7, zorder=1)
    mode = nearest_mode(samples, modes)
    for m in range(len(modes)):
        color = pictures.COLORS[m % len(pictures.COLORS)]
        ax.scatter(*samples[mode == m].T, s=9, color=color, alpha=0.55, linewidths=0, zorder=2, rasterized=True)
    ax.set(xlim=(-limits, limits), ylim=(-limits, limits), aspect="equal")
    ax.grid(False)


def _show_line(mixture: GaussianMixture) -> Callable:
    """A histogram of samples of the line, and the data's density."""

    def show(samples: Float[Tensor, "b 1"], prompts: Sequence[str]):
        samples = samples.detach().float().cpu().squeeze(-1)
        centre, spread = float(mixture.means), float(mixture.eigenvalues.sqrt())
        low = min(centre - 4 * spread, float(samples.min()))
        high = max(centre + 4 * spread, float(samples.max()))
        axis = torch.linspace(low, high, 400)
        with pictures.style():
            fig = pictures.figure(5.6, 3.6, f"{len(samples)} samples of the line")
            fig.set_layout_engine("constrained")
            ax = fig.add_subplot()
            look = {"color": pictures.COLORS[0], "alpha": 0.5, "label": "samples"}
            ax.hist(samples, bins=60, range=(low, high), density=True, **look)
            ax.plot(axis, mixture.log_prob(axis.unsqueeze(-1)).exp(), color=pictures.INK, label="data")
            ax.set(xlabel="$x$", ylabel="density", title=f"mean {samples.mean():.2f}, sd {samples.std():.2f}")
            ax.legend()
        return fig

    return show


# Worlds -------------------------------------------------------------------------------------------------------------

RESIDUALS = ("mlp", "per_step_linear", "per_step_scalar")


def load(
    name: str = "compass",
    *,
    num_steps: int = 20,
    eta: float = 1.0,
    residual: str | None = None,
    seed: int = 0,
    **settings: float,
) -> World:
    """compass, ring or line, its policy a perfect base model that has not been trained.

    residual: "mlp" (compass and ring's own), "per_step_linear" or "per_step_scalar" (line's own); `seed` draws the
    MLP's weights. settings: radius, std and num_modes of ring, mean and std of line.
    """
    builders = {"compass": _compass, "ring": _ring, "line": _line}
    known = {"compass": (), "ring": ("radius", "std", "num_modes"), "line": ("mean", "std")}
    if name not in builders:
        raise ValueError(f"unknown gaussian world {name!r};{_near(name, builders)} There are: {', '.join(builders)}.")
    for setting in settings:
        if setting not in known[name]:
            own = ", ".join(("num_steps", "eta", "residual", "seed", *known[name]))
            raise ValueError(f"world {name!r} has no setting {setting!r}. There are: {own}.")
    if residual is not None and residual not in RESIDUALS:
        known = ", ".join(RESIDUALS)
        raise ValueError(f"unknown residual {residual!r};{_near(residual, RESIDUALS)} There are: {known}.")

    def policy(mixture: GaussianMixture, classes: tuple[str, ...] | None, own_residual: str) -> DiffusionPolicy:
        return _policy(mixture, classes, residual or own_residual, num_steps, eta, seed)

    return builders[name](policy, **settings)


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" did you mean {near[0]!r}?" if near else ""


def scheduler():
    """Stable Diffusion's noise levels, and a last step that is still noisy (timestep 1), which a density needs."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def _policy(
    mixture: GaussianMixture, classes: tuple[str, ...] | None, residual: str, num_steps: int, eta: float, seed: int
) -> DiffusionPolicy:
    schedule, num_classes = scheduler(), len(classes or ())
    schedule.set_timesteps(num_steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if residual == "mlp":
            network = ResidualMLP(mixture.dim, num_classes)
        elif residual == "per_step_linear":
            network = PerStepLinear(schedule.timesteps, mixture.dim, num_classes)
        else:
            network = PerStepScalar(schedule.timesteps)
    denoiser = ExactDenoiser(mixture, schedule.alphas_cumprod, network)
    return DiffusionPolicy(
        denoiser, schedule, latent_shape=(mixture.dim,), class_names=classes, num_steps=num_steps, eta=eta
    )


def _compass(policy: Callable[..., DiffusionPolicy]) -> World:
    mixture = compass()

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        samples, component = mixture.sample(n, generator)
        return samples, [COMPASS_CLASSES[i % 2] for i in component.tolist()]

    return World(
        name="compass",
        policy=policy(mixture, COMPASS_CLASSES, "mlp"),
        prompts=list(COMPASS_CLASSES),
        rewards={
            "gold": gold,
            "side": side,
            "side_and_quality": side_and_quality,
            "style": style,
            "styled_gold": styled_gold,
        },
        default_reward="gold",
        oracle=gold,
        real=real,
        show=_show_plane(mixture, compass_modes(), gold),
        extras={"mixture": mixture, "modes": compass_modes(), "submodes": compass_submodes()},
    )


def _ring(policy: Callable[..., DiffusionPolicy], radius: float = 2.0, std: float = 0.25, num_modes: int = 8) -> World:
    mixture, modes = ring(radius, std, num_modes), ring_modes(radius, num_modes)
    values = 1 - torch.arange(num_modes) / num_modes  # lopsided on purpose: mode 0, on the right, is the best
    oracle = on_mode(modes[0], 3 * std)

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        return mixture.sample(n, generator)[0], ["a point"] * n

    return World(
        name="ring",
        policy=policy(mixture, None, "mlp"),
        prompts=["a point"],
        rewards={"first_coordinate": first_coordinate, "mode_value": mode_value(modes, values), "on_mode": oracle},
        default_reward="first_coordinate",
        oracle=oracle,
        real=real,
        show=_show_plane(mixture, modes, oracle),
        extras={"mixture": mixture, "modes": modes, "mode_values": values},
    )


def _line(policy: Callable[..., DiffusionPolicy], mean: float = 0.0, std: float = 1.0) -> World:
    mixture = line(mean, std)
    built = policy(mixture, None, "per_step_scalar")
    sampler = LinearGaussianSampler(mean, std, built.num_steps, built.eta, built.scheduler.alphas_cumprod)

    def above_most_data(samples: Float[Tensor, "b 1"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        return (samples[:, 0] > mean + std).to(samples.dtype)

    def real(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, list[str]]:
        return mixture.sample(n, generator)[0], ["a number"] * n

    return World(
        name="line",
        policy=built,
        prompts=["a number"],
        rewards={"first_coordinate": first_coordinate, "above_most_data": above_most_data},
        default_reward="first_coordinate",
        oracle=above_most_data,
        real=real,
        show=_show_line(mixture),
        extras={"mixture": mixture, "sampler": sampler},
    )
