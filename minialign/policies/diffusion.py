"""A diffusion model seen as a policy (Black et al., 2023, section 4.2): denoising is an episode, each step an action.

    state     (x_t, t, prompt)                 action   x_{t-1}
    policy    N(mean_theta(x_t, t, prompt), sigma_t^2 I), the DDIM transition with eta > 0
    reward    r(decode(x_0), prompt), at the end

`DiffusionPolicy` wraps diffusers' own modules and never replaces them: the network, the scheduler's noise levels, the
pipeline's text encoders and autoencoder. Guidance acts in sampling and in scoring alike, so both see one policy.
"""

import torch
from torch import Tensor

from minialign.kernels import StepOut, ddim_alpha_bars, ddim_std, ddim_step, prediction_target, squared_error
from minialign.policies.base import ATTENTION, EVERYWHERE, Policy
from minialign.policies.border import check_pipeline, repair, unconditional, understood
from minialign.policies.encoders import pipeline_modules
from minialign.policies.trajectory import Condition, Trajectory
from minialign.settings import Count, Fraction, demand

__all__ = ["ATTENTION", "EVERYWHERE", "Condition", "DiffusionPolicy", "Trajectory"]


class DiffusionPolicy(Policy):
    """Any diffusers UNet (or module called as `network(x, t, **condition)`) with a scheduler's noise levels.

    eta: in [0, 1]; 1 is DDPM, 0 has no density. The other settings are `Policy`'s. A scheduler of another family
    (`border.FAMILY`) is replaced by DDIM on the same noise levels.

    Raises ValueError for a scheduler's setting that would not be heard: one that clips samples, for example, for the
    density would be that of another mean.
    """

    def __init__(
        self, network, scheduler, *, num_steps: int = 20, eta: float | int = 1.0, guidance_scale=1.0, **modules
    ):
        from diffusers import DDIMScheduler

        demand(Fraction, eta=eta)
        self.eta = float(eta)
        scheduler = understood(scheduler, DDIMScheduler)
        super().__init__(network, scheduler, num_steps=num_steps, guidance_scale=guidance_scale, **modules)

    @classmethod
    def from_pipeline(
        cls,
        pipe,
        *,
        num_steps: int = 20,
        eta: float | int = 1.0,
        guidance_scale: float | int | None = None,
        decode_rows: int = 64,
    ):
        """Wraps a StableDiffusion- or StableDiffusionXL-like pipeline; its modules are used, not copied, and frozen.

        Pipelines of a UNet alone (DDPMPipeline, DDIMPipeline) give a policy of pixels, for which prompts mean nothing.
        guidance_scale is diffusers': at or below 1 the prompt alone; 5 by default, 1 where prompts mean nothing.
        decode_rows: latents per VAE call. Pictures are those of the pipeline before its safety checker and watermark.
        """
        check_pipeline(pipe)
        if getattr(pipe.unet.config, "time_cond_proj_dim", None):
            raise ValueError(
                f"cannot wrap {type(pipe).__name__}: its UNet embeds the guidance scale; it is a consistency model."
            )
        if guidance_scale is None:
            guidance_scale = 1.0 if unconditional(pipe) else 5.0
        elif guidance_scale > 1 and unconditional(pipe):
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but {type(pipe).__name__} takes no prompts to be guided by: "
                "leave it out."
            )
        modules = pipeline_modules(pipe, decode_rows)
        policy = cls(pipe.unet, pipe.scheduler, num_steps=num_steps, eta=eta, guidance_scale=guidance_scale, **modules)
        policy.pipeline = pipe
        return policy

    def set_num_steps(self, num_steps: int) -> None:
        """Chooses the time grid, as the scheduler spaces it: `timesteps` (S,), descending, and their noise levels."""
        demand(Count, num_steps=num_steps)
        self.scheduler.set_timesteps(num_steps)
        self.num_steps = num_steps
        self._set_levels(self.scheduler.timesteps)

    def _set_levels(self, timesteps: Tensor) -> None:
        super()._set_levels(timesteps)
        self._alpha_bar, self._alpha_bar_next = ddim_alpha_bars(
            self._alphas_cumprod,
            self.timesteps,
            self.scheduler.config.num_train_timesteps // self.num_steps,
            float(getattr(self.scheduler, "final_alpha_cumprod", 1.0)),
        )

    @property
    def num_actions(self) -> int:
        """How many of the steps have a density: all of them."""
        return self.num_steps

    @property
    def std(self) -> Tensor:
        """sigma of each step (S,)."""
        return ddim_std(self._alpha_bar, self._alpha_bar_next, self.eta)

    def check_density(self) -> None:
        """Raises ValueError if a step of the grid is deterministic: then its actions have no log-probability."""
        zero = (self.std == 0).nonzero().flatten().tolist()
        if zero and self.eta == 0:
            raise ValueError(
                "eta = 0 makes every step deterministic: no density, no policy gradient. Use eta = 1 (DDPM)."
            )
        if zero:
            raise ValueError(
                f"step {zero[0]} (timestep {int(self.timesteps[zero[0]])}) is deterministic (std = 0), so it has no "
                "log-probability. "
                + repair(type(self.scheduler), timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
            )

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n of the scheduler's training timesteps, each with the same chance."""
        return self._draw_integers(self.scheduler.config.num_train_timesteps, n, generator)

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
        """The training loss of a diffusion model, a sample (n,): squared error of the (unguided) network output.

        latents (n, *latent) are corrupted with `noise` to `levels` (n,), any training timesteps; the target is the
        noise, v or x_0, as the scheduler's prediction_type says. reduction: "sum" over a sample's elements, or "mean".
        The same levels and noise may be given again, for the other of a pair, or with reference=True (no gradient).
        """
        states = self.corrupt(latents, levels, noise)
        output = self.output_at(states, levels, condition, reference, guidance_scale=1.0)
        alpha_bar, kind = self._alphas_cumprod[levels], self.scheduler.config.prediction_type
        return squared_error(output, prediction_target(latents, noise, alpha_bar, kind), reduction)

    def step_from(
        self, output: Tensor, states: Tensor, step: Tensor | int, *, next=None, noise=None, reduction="mean"
    ) -> StepOut:
        """The transition that follows from a model output already at hand; no network evaluation."""
        rows = (len(states),)
        return ddim_step(
            output,
            states.to(self.state_dtype),
            self._alpha_bar[step].expand(rows),
            self._alpha_bar_next[step].expand(rows),
            self.eta,
            prediction_type=self.scheduler.config.prediction_type,
            reduction=reduction,
            next=next,
            noise=noise,
        )
