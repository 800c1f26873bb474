"""A rectified flow seen as a policy (Flow-GRPO, Liu et al., 2025, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818).

    state     (x_t, t, prompt)                       action   x_{t'}
    policy    N(x + v dt - s^2 / 2 score dt, s^2 |dt| I), the flow's ODE turned into an SDE: kernels.flow_step
    reward    r(decode(x_0), prompt), at the end

A flow is sampled by an ODE, which has no density and explores nothing. The SDE has, in small steps, the same marginal
at every t, so the policy draws what the model draws; with finite steps it does so up to their error. `rollout` walks
the SDE, `sample` the ODE, as the pipeline does.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from minialign.kernels import (
    StepOut,
    add_flow_noise,
    expand_as,
    flow_diffusion,
    flow_step,
    predict,
    squared_error,
    variance_preserving_of,
)
from minialign.kernels.flow import NoiseSchedule
from minialign.policies import adapters
from minialign.policies.architectures import call_network
from minialign.policies.base import Policy
from minialign.policies.border import understood_flow
from minialign.policies.flow_pipelines import flow_modules
from minialign.policies.trajectory import Condition
from minialign.settings import Count, NonNegative, demand


class FlowPolicy(Policy):
    """A network that says the velocity, called as `network(x, 1000 t, **condition)`; FlowMatchEulerDiscreteScheduler.

    noise_level: Flow-GRPO's a (.7) or, with noise_schedule "constant", DanceGRPO's eta (.3); 0 is the ODE, which has no
    density. deterministic_last: the last step is the ODE's and no action, so it ends in the denoised guess (DanceGRPO),
    else every step adds noise, the last one too (Flow-GRPO).
    grid: "even", t = 1, 1 - 1/S, ..., 1/S before the scheduler's shift (FLUX), or "scheduler", as its own set_timesteps
    spaces them (Stable Diffusion 3). shift_mu: for a scheduler with dynamic shifting. The other settings are
    `Policy`'s. Raises ValueError for a scheduler's setting that would not be heard.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler=None,
        *,
        num_steps: int = 10,
        noise_level: float | int = 0.7,
        noise_schedule: NoiseSchedule = "flow_grpo",
        deterministic_last: bool = False,
        guidance_scale: float | int = 1.0,
        grid: str = "even",
        shift_mu: float | None = None,
        **modules,
    ):
        from diffusers import FlowMatchEulerDiscreteScheduler

        demand(NonNegative, noise_level=noise_level)
        demand(NoiseSchedule, noise_schedule=noise_schedule)
        self.noise_level, self.noise_schedule = float(noise_level), noise_schedule
        self.deterministic_last, self.grid, self.shift_mu = deterministic_last, grid, shift_mu
        scheduler = understood_flow(scheduler or FlowMatchEulerDiscreteScheduler())
        super().__init__(network, scheduler, num_steps=num_steps, guidance_scale=guidance_scale, **modules)

    @classmethod
    def from_pipeline(
        cls,
        pipe,
        *,
        num_steps: int = 10,
        guidance_scale: float | int | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        decode_rows: int = 64,
        **settings,
    ):
        """Wraps a StableDiffusion3Pipeline or a FluxPipeline; its modules are used, not copied, and frozen.

        guidance_scale is the pipeline's: Stable Diffusion 3 is guided (7 by default, at or below 1 the prompt alone),
        FLUX embeds it where its network has an embedding (3.5) and knows none otherwise. height, width: pixels, the
        pipeline's own by default. max_sequence_length: tokens of the T5 encoder, as in the pipeline's call. States are
        latents as the network takes them: FLUX packs 2x2 into a token. settings: noise_level and the like.
        """
        modules, own = flow_modules(pipe, guidance_scale, height, width, max_sequence_length, decode_rows)
        policy = cls(pipe.transformer, pipe.scheduler, num_steps=num_steps, **modules, **own, **settings)
        policy.pipeline = pipe
        return policy

    @classmethod
    def from_diffusion(
        cls, policy: Policy, *, num_steps: int = 10, guidance_scale: float | int | None = None, **settings
    ):
        """A diffusion policy's model on the flow's clock: a copy of its network as it is now, inside `AsVelocity`.

        Nothing is trained: at equal signal to noise both processes are one, up to scale. guidance_scale: the
        policy's own if None.
        """
        network = copy.deepcopy(policy.network)
        if adapter := policy._active_adapter(policy._adapters()):
            adapters.take_out(network, adapter, merge=True)
        scale = policy.guidance_scale if guidance_scale is None else guidance_scale
        prediction_type = policy.scheduler.config.prediction_type
        flow = cls(
            AsVelocity(network, policy.scheduler.alphas_cumprod, prediction_type), num_steps=num_steps,
            guidance_scale=scale, latent_shape=policy.latent_shape, encoder=policy._encoder, decoder=policy._decoder,
            **settings,
        )  # fmt: skip
        flow.to(policy.device)
        return flow

    def set_num_steps(self, num_steps: int) -> None:
        """Chooses the time grid, S steps from t = 1 to t = 0, shifted as the scheduler says."""
        demand(Count, num_steps=num_steps)
        self.num_steps = num_steps
        self._set_levels(1000 * self._grid(num_steps)[:-1].double())

    def _grid(self, num_steps: int) -> Tensor:
        """t of a grid, (S + 1,), by the scheduler's own set_timesteps; where the scheduler is."""
        sigmas = {} if self.grid == "scheduler" else {"sigmas": np.linspace(1, 1 / num_steps, num_steps)}
        shift = {} if self.shift_mu is None else {"mu": self.shift_mu}
        self.scheduler.set_timesteps(num_steps, **sigmas, **shift)
        return self.scheduler.sigmas

    def _set_levels(self, timesteps: Tensor) -> None:
        """timesteps: what the network takes at the start of each step, 1000 t, (S,); the last step ends at t = 0.

        `levels` are their t, `diffusion` their s_t, both (S,).
        """
        parameter = next(self.network.parameters())
        self.device, self.state_dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        self.timesteps = timesteps.to(self.device, self.state_dtype)
        self._t = torch.cat([self.timesteps / 1000, self.timesteps.new_zeros(1)])
        self.levels = self._t[:-1]
        self.diffusion = flow_diffusion(self.levels, self.noise_level, self.noise_schedule, self._t[1])
        if self.deterministic_last:
            self.diffusion[-1] = 0

    @property
    def num_actions(self) -> int:
        """How many of the steps add noise, and so have a density."""
        return self.num_steps - self.deterministic_last

    @property
    def std(self) -> Tensor:
        """s_t sqrt(|dt|) of each step, (S,)."""
        return self.diffusion * (self._t[:-1] - self._t[1:]).sqrt()

    def check_density(self) -> None:
        """Raises ValueError if no step adds noise: the ODE's steps have no log-probability."""
        if self.noise_level == 0:
            raise ValueError(
                "noise_level = 0 is the flow's ODE: no density, no policy gradient. Use noise_level = 0.7 (Flow-GRPO)."
            )
        if self.num_actions == 0:
            raise ValueError(
                "num_steps = 1 with deterministic_last has no stochastic step: use num_steps of at least 2."
            )
        if self.num_steps == 1 and self.noise_schedule == "flow_grpo":
            raise ValueError(
                "num_steps = 1 goes from t = 1 to 0, where Flow-GRPO's noise has no bound: use at least 2."
            )

    def step_from(
        self, output: Tensor, states: Tensor, step: Tensor | int, *, next=None, noise=None, reduction="mean"
    ) -> StepOut:
        """The transition that follows from a velocity already at hand; no network evaluation."""
        step = torch.as_tensor(step, device=self.device)
        t, t_next, diffusion = (
            level.expand(len(states)) for level in (self._t[step], self._t[step + 1], self.diffusion[step])
        )
        return flow_step(
            output, states.to(self.state_dtype), t, t_next, diffusion, reduction=reduction, next=next, noise=noise
        )

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """Decoded samples of the ODE, one a prompt, as the pipeline draws them. Of `noise` only [:, 0] counts.

        num_steps: of the ODE's grid, the policy's own by default. Fewer steps in training than here is what Flow-GRPO
        calls denoising reduction.
        """
        condition = prompts if isinstance(prompts, Condition) else self.encode(prompts)
        noise = self.draw_noise(len(condition), generator) if noise is None else noise
        return self.decode(self.integrate(noise[:, 0], condition, num_steps))

    def integrate(self, states: Tensor, condition: Condition, num_steps: int | None = None) -> Tensor:
        """Where the ODE takes `states` (n, *latent) from t = 1 to t = 0, by Euler's steps; differentiable."""
        grid = self._t if num_steps is None else self._grid(num_steps).to(self._t)
        if num_steps is not None:
            self._grid(self.num_steps)  # the scheduler as it was
        for t, t_next in pairwise(grid):
            velocity = self.output_at(states, (1000 * t).expand(len(states)), condition)
            states = states + (t_next - t) * velocity.to(states)
        return states

    # ---------------------------------------------------------------- training on clean samples

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n times t, (n,): of 1/1000, 2/1000, ..., 1, each with the same chance."""
        return (self._draw_integers(1000, n, generator) + 1).to(self.state_dtype) / 1000

    def corrupt(self, latents: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """x_t = (1 - t) x_0 + t noise at `levels` t, (n,) in [0, 1]."""
        return add_flow_noise(latents, noise, levels)

    def training_error(
        self,
        latents: Tensor,
        levels: Tensor,
        noise: Tensor,
        condition: Condition,
        *,
        reduction: str,
        reference: bool = False,
    ) -> Tensor:
        """The training loss of a flow, a sample (n,): squared error of the (unguided) velocity against noise - x_0."""
        output = self.velocity(self.corrupt(latents, levels, noise), levels, condition, reference)
        return squared_error(output, noise - latents, reduction)

    def signal_and_noise(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t, t), both (n,)."""
        return 1 - levels, levels

    def noise_at(self, states: Tensor, levels: Tensor, condition: Condition, reference: bool = False) -> Tensor:
        """E[noise | x_t] = x_t + (1 - t) v, unguided. At t = 0, where none is trained, that of the lowest level."""
        levels = levels.clamp_min(1 / 1000)
        return states + expand_as(1 - levels, states) * self.velocity(states, levels, condition, reference)

    @property
    def target(self) -> str:
        return "flow"

    def velocity(self, states: Tensor, levels: Tensor, condition: Condition, reference: bool = False) -> Tensor:
        """v(x, t), (n, *latent), unguided, at any t (n,)."""
        return self.output_at(states, 1000 * levels, condition, reference, guidance_scale=1.0)


class AsVelocity(nn.Module):
    """A diffusion network on a flow's clock: its noise and x_0 at the level of the same signal to noise, as a velocity.

    x_t / sqrt((1 - t)^2 + t^2) is a variance-preserving state of alpha_bar = (1 - t)^2 / ((1 - t)^2 + t^2); the
    training timestep nearest to that is asked. The noisiest one stands for all t beyond it, up to 1.
    """

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, prediction_type: str):
        super().__init__()
        self.network, self.prediction_type = network, prediction_type
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().clone())

    def forward(self, x: Tensor, t: Tensor, **inputs) -> Tensor:
        alpha_bar, scale = variance_preserving_of(t / 1000)
        table = self.alphas_cumprod.to(alpha_bar)
        alpha_bar = alpha_bar.clamp(table.min(), table.max())
        nearest = (table.logit() - alpha_bar.logit().unsqueeze(-1)).abs().argmin(-1)
        states = x / expand_as(scale.to(x), x)
        output = call_network(self.network, states, nearest, inputs)
        denoised, noise = predict(
            output.to(states), states, self.alphas_cumprod.to(states)[nearest], self.prediction_type
        )
        return noise - denoised
