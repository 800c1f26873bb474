"""A consistency model seen as a policy (Oertell et al., 2024, arXiv 2404.03673): denoise, re-noise, a few times.

    state     (x_j, tau_j, prompt)             action   x_{j+1}
    policy    N(sqrt(a) f(x_j, tau_j, prompt), (1 - a) I), a = alpha_bar_{j+1}: denoise, re-noise to the next level
    reward    r(decode(f(x_{H-1}, tau_{H-1})), prompt), at the end

H network calls make H - 1 actions: the last call is deterministic and has no density. `terminal_std` adds a little
noise behind it, in rollouts only, so that the last call becomes an action too.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from minialign.kernels import (
    StepOut,
    consistency_function,
    consistency_step,
    guidance_embedding,
    lcm_guidance,
    squared_error,
)
from minialign.policies import adapters
from minialign.policies.base import Policy
from minialign.policies.border import check_pipeline, understood
from minialign.policies.encoders import pipeline_modules
from minialign.policies.trajectory import Condition
from minialign.settings import Count, NonNegative, demand


class ConsistencyPolicy(Policy):
    """Any diffusers UNet (or module called as `network(x, t, **condition)`) as a consistency function; an LCMScheduler.

    A scheduler of another family (`border.FAMILY`) is replaced by an LCMScheduler on the same noise levels.
    guidance_scale g: where the network embeds it (`time_cond_proj_dim`), w = g - 1 goes in as `timestep_cond`, whatever
    its sign, and no second pass is made; elsewhere e_u + g (e_c - e_u), and at or below 1 the prompt alone.
    terminal_std: see the module. The other settings are `Policy`'s; num_steps is H, the number of network calls.
    """

    def __init__(
        self, network, scheduler, *, num_steps: int = 4, guidance_scale: float | int = 1.0, terminal_std=0.0, **modules
    ):
        from diffusers import LCMScheduler

        demand(NonNegative, terminal_std=terminal_std)
        self.terminal_std = float(terminal_std)
        self.guidance_dim = getattr(getattr(network, "config", None), "time_cond_proj_dim", None)
        self.embedded_guidance = float(guidance_scale)
        outside = 1.0 if self.guidance_dim else guidance_scale
        scheduler = understood(scheduler, LCMScheduler)
        super().__init__(network, scheduler, num_steps=num_steps, guidance_scale=outside, **modules)

    @classmethod
    def from_pipeline(cls, pipe, *, num_steps: int = 4, guidance_scale: float | int = 8.0, decode_rows: int = 64):
        """Wraps a LatentConsistencyModelPipeline, or a StableDiffusionPipeline whose UNet is a consistency function.

        Its modules are used, not copied, and frozen. guidance_scale is diffusers' (RLCM: 8). `decode_rows`: latents per
        call of the autoencoder.
        """
        check_pipeline(pipe)
        modules = pipeline_modules(pipe, decode_rows)
        policy = cls(pipe.unet, pipe.scheduler, num_steps=num_steps, guidance_scale=guidance_scale, **modules)
        policy.pipeline = pipe
        return policy

    @classmethod
    def from_diffusion(
        cls, policy: Policy, *, num_steps: int = 4, solver_steps: int = 50, guidance_dim: int | None = None
    ):
        """The undistilled student of a diffusion policy: a copy of its network as it is now, asked for a whole jump.

        Its f is the denoised guess, the mean of all that could follow. solver_steps: of the grid that it will be
        distilled on, from which the sampler's timesteps are chosen. guidance_dim: give a UNet an embedding of the
        guidance scale of that size, zero at first (LatentConsistencyModelPipeline needs one). The copy is float32 at
        least, for all of it will train.
        """
        from diffusers import LCMScheduler

        network = copy.deepcopy(policy.network)
        if adapter := policy._active_adapter(policy._adapters()):
            adapters.take_out(network, adapter, merge=True)
        if guidance_dim:
            weights = network.state_dict()
            network = type(network).from_config(network.config, time_cond_proj_dim=guidance_dim)
            network.load_state_dict(weights, strict=False)
            network.time_embedding.cond_proj.weight.data.zero_()
        network.to(policy.state_dtype)
        scheduler = LCMScheduler.from_config(
            policy.scheduler.config, clip_sample=False, original_inference_steps=solver_steps
        )
        student = cls(
            network, scheduler, num_steps=num_steps, latent_shape=policy.latent_shape, encoder=policy._encoder,
            decoder=policy._decoder,
        )  # fmt: skip
        student.to(policy.device)
        return student

    def set_num_steps(self, num_steps: int, timesteps: list[int] | None = None) -> None:
        """Chooses H and with it `timesteps` (H,), as the LCMScheduler spaces them, or those given (descending)."""
        demand(Count, num_steps=num_steps)
        if timesteps is None:
            self.scheduler.set_timesteps(num_steps)
        elif len(timesteps) != num_steps:
            raise ValueError(f"num_steps is {num_steps}, but there are {len(timesteps)} timesteps.")
        else:
            self.scheduler.set_timesteps(timesteps=timesteps)
        self.num_steps = num_steps
        self._set_levels(self.scheduler.timesteps)

    def _set_levels(self, timesteps: Tensor) -> None:
        super()._set_levels(timesteps)
        following = self._alphas_cumprod[self.timesteps[1:]]
        self._signal = torch.cat([following.sqrt(), following.new_ones(1)])  # the last call's output is kept as it is
        self._next_noise = (1 - following).sqrt()

    @property
    def num_actions(self) -> int:
        """How many of the H calls are followed by noise: H - 1, or all with a terminal_std."""
        return self.num_steps if self.terminal_std else self.num_steps - 1

    @property
    def std(self) -> Tensor:
        """sqrt(1 - alpha_bar) of the level that each call is re-noised to, (H,); the last is terminal_std."""
        return torch.cat([self._next_noise, self._next_noise.new_full((1,), self.terminal_std)])

    def check_density(self) -> None:
        """Raises ValueError if no call is followed by noise."""
        if self.num_actions == 0:
            raise ValueError(
                "num_steps = 1 has no stochastic step: one deterministic call, no density, no policy gradient. Use "
                "num_steps of at least 2, or a terminal_std > 0, or back-propagate the reward through the call."
            )

    def encode(self, prompts, guided: bool | None = None) -> Condition:
        condition = super().encode(prompts, guided)
        return self.with_guidance(condition, torch.full((len(condition),), self.embedded_guidance, device=self.device))

    def with_guidance(self, condition: Condition, guidance_scale: Tensor) -> Condition:
        """The condition with guidance_scale (n,) embedded, row by row, where the network takes one."""
        if not self.guidance_dim:
            return condition
        embedded = guidance_embedding(lcm_guidance(guidance_scale.float()), self.guidance_dim)
        return replace(condition, inputs=condition.inputs | {"timestep_cond": embedded})

    # ---------------------------------------------------------------- training on clean samples

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n timesteps, each of the solver's grid (19, 39, ..., 999 for fifty steps) with the same chance."""
        config = self.scheduler.config
        stride = config.num_train_timesteps // config.original_inference_steps
        return stride * (self._draw_integers(config.original_inference_steps, n, generator) + 1) - 1

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
        """Squared error of f(x_t, t) against x_0, a sample (n,); unguided, unless the network embeds the guidance.

        Its minimum is the mean of x_0 given x_t, f's value on the trajectory only where one clean point follows from
        x_t: it fits single samples, as supervised and preference losses want; what makes f consistent is distillation.
        """
        states = self.corrupt(latents, levels, noise)
        output = self.output_at(states, levels, condition, reference, guidance_scale=1.0)
        return squared_error(self._consistent(output, states, levels), latents, reduction)

    @property
    def target(self) -> str:
        """The training error is one of x_0, whatever the network predicts."""
        return "sample"

    def denoise(self, states: Tensor, timesteps: Tensor, condition: Condition, reference: bool = False) -> Tensor:
        """f(x, t, prompt), (n, *latent), at any training timesteps (n,)."""
        output = self.output_at(states, timesteps, condition, reference)
        return self._consistent(output, states, timesteps)

    def _consistent(self, output: Tensor, states: Tensor, timesteps: Tensor) -> Tensor:
        config = self.scheduler.config
        return consistency_function(
            output, states.to(self.state_dtype), self._alphas_cumprod[timesteps], timesteps, config.prediction_type,
            config.timestep_scaling,
        )  # fmt: skip

    def step_from(
        self, output: Tensor, states: Tensor, step: Tensor | int, *, next=None, noise=None, reduction="mean"
    ) -> StepOut:
        """The transition that follows from a model output already at hand; no network evaluation."""
        rows = (len(states),)
        denoised = self._consistent(output, states, self.timesteps[step].expand(rows))
        signal, std = self._signal[step].expand(rows), self.std[step].expand(rows)
        return consistency_step(denoised, signal, std, reduction=reduction, next=next, noise=noise)

    @torch.no_grad()
    def sample(self, prompts, noise: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Decoded samples, one a prompt, without terminal noise; one step will do."""
        condition = self.encode(prompts)
        noise = self.draw_noise(len(condition), generator) if noise is None else noise
        *_, out = self._walk(noise[:, 0], range(self.num_steps), condition, noise, "mean")
        return self.decode(out.denoised)
