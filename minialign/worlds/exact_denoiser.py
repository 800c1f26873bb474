"""The exact noise prediction of a Gaussian mixture as a network, plus a residual that starts at zero and trains.

A `DiffusionPolicy` around an `ExactDenoiser` is a perfect base model with no pretraining; its reference is the residual
left out. Noise levels are variance preserving: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.

    ExactDenoiser                                the network that diffusers' schedulers and our policies call
    ExactVelocity                                the same of a rectified flow
    ResidualMLP, PerStepLinear, PerStepScalar    residuals, from an MLP down to one number a step
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minialign.exact import GaussianMixture
from minialign.kernels import Level


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
        return self.mixture.noise_pred(x, alpha_bar, self._log_weights(class_labels))

    def _log_weights(self, class_labels: Tensor | None) -> Tensor | None:
        chosen = self.class_log_weights is not None and class_labels is not None
        return self.class_log_weights[class_labels] if chosen else None

    def forward(
        self, x: Float[Tensor, "b *dims"], t: Tensor | int, class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b *dims"]:
        exact = self.reference_forward(x, t, class_labels)
        if self.residual is None:
            return exact
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return exact + self.residual(x.flatten(1), t, class_labels).reshape(x.shape)


class ExactVelocity(ExactDenoiser):
    """A network that says a rectified flow's velocity exactly, plus a residual: network(x, 1000 t, class_labels=None).

    v = (x - E[x_0 | x_t]) / t, x_t = (1 - t) x_0 + t noise, 0 < t <= 1. `residual` takes 1000 t rounded, 0 to 999, as
    ExactDenoiser's does its timestep. The other arguments are ExactDenoiser's.
    """

    def __init__(self, mixture: GaussianMixture, residual: nn.Module | None = None, class_components=None):
        super().__init__(mixture, torch.empty(0), residual, class_components)

    def reference_forward(
        self, x: Float[Tensor, "b *dims"], t: Tensor | float, class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b *dims"]:
        """The exact velocity, with no residual."""
        t = torch.as_tensor(t, device=x.device).to(torch.promote_types(x.dtype, torch.float32)).expand(len(x)) / 1000
        denoised = self.mixture.denoised(x, Level.of(1 - t, t), self._log_weights(class_labels))
        return (x - denoised) / t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    def forward(
        self, x: Float[Tensor, "b *dims"], t: Tensor | float, class_labels: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b *dims"]:
        exact = self.reference_forward(x, t, class_labels)
        if self.residual is None:
            return exact
        t = torch.as_tensor(t, device=x.device).expand(len(x)).round().long().clamp_max(999)
        return exact + self.residual(x.flatten(1), t, class_labels).reshape(x.shape)


class ResidualMLP(nn.Module):
    """A small MLP of (x, t, class) whose last layer is zero (sheet ddpo: 20-96-96-2 with SiLU).

    Inputs: x (batch, dim); sin and cos of w t / num_train_timesteps for `num_frequencies` w log-spaced from 1 to 1000;
    one-hot class.
    A label equal to num_classes means no condition: all zeros.
    """

    def __init__(
        self,
        dim: int = 2,
        num_classes: int = 2,
        width: int = 96,
        num_frequencies: int = 8,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        self.num_classes, self.num_train_timesteps = num_classes, num_train_timesteps
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
        phase = t.unsqueeze(-1) / self.num_train_timesteps * self.frequencies
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
