"""A DDIM sampler of finite steps on one-dimensional Gaussian data: its law, gradient, optimum and memory, exactly."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels.flow import NoiseSchedule, flow_diffusion


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
                f"density and no KL: use more noise than {self.eta}."
            )


class LinearGaussianFlow(LinearGaussianSampler):
    """The same of a rectified flow's SDE (kernels.flow_step) on 1-D data N(mean, std^2), velocity exact + theta_i.

    `noise_level` and `schedule` as in kernels.flow_diffusion; the grid is t = 1, 1 - 1/S, ..., 0, shifted by `shift`.
    gain is d mean / d velocity. Sheet grpo, checks 4 and 6: `sample_variance` is V, `noise_variance` S, all that
    KL-regularised training can tilt; in the limit of small steps V is std^2, S only where the SDE forgets its noise.
    """

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        num_steps: int = 10,
        noise_level: float | int = 0.7,
        schedule: NoiseSchedule = "flow_grpo",
        shift: float = 1.0,
    ):
        self.data_mean, self.data_std, self.num_steps, self.eta = mean, std, num_steps, noise_level
        grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        grid = shift * grid / (1 + (shift - 1) * grid)
        t, dt = grid[:-1], grid[1:] - grid[:-1]
        self.timesteps = 1000 * t
        diffusion = flow_diffusion(t, noise_level, schedule, grid[1])
        self.step_std = diffusion * (-dt).sqrt()
        shrink = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)  # of E[x_0 | x_t]
        response, drift = (1 - shrink) / t, diffusion**2 / (2 * t)  # of the velocity to x; score's weight, s^2 / (2 t)
        self.gain = dt * (1 + drift * (1 - t))
        self.slope = 1 + dt * drift + self.gain * response
        self.offset = -self.gain * mean * (1 - shrink * (1 - t)) / t
        later = torch.cat([self.slope[1:], torch.ones(1, dtype=t.dtype)])
        self.downstream = later.flip(0).cumprod(0).flip(0)
