"""diffusers' schedulers that start late: their grids without the first steps, and the noise level of each step.

For methods that get to a later noise level by other means than the network: teleportation, editing a given image.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Late:
    """Mixed into a diffusers scheduler: each grid that `set_timesteps` makes loses its first `num_skipped` steps."""

    num_skipped = 0

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        first = self.num_skipped * self.order  # Heun's scheduler lists every level twice
        self.timesteps = self.timesteps[first:]
        if hasattr(self, "sigmas"):
            self.sigmas = self.sigmas[first:]


def late(scheduler, num_skipped: int):
    """A copy of the scheduler whose every grid lacks its first `num_skipped` steps. It is not set yet.

    Works with diffusers' schedulers whose state is x_0 and noise alone: DDIM, DDPM, DPM-Solver (single and multistep),
    DEIS, UniPC, Euler, Heun, LMS, EDM. Raises ValueError for others.
    """
    kind = type(scheduler)
    flow = scheduler.config.get("use_flow_sigmas", False) or kind.__name__.startswith("FlowMatch")
    if flow or not (hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sigmas")) or "PNDM" in kind.__name__:
        raise ValueError(
            f"{kind.__name__} cannot start late: its state is not x_0 and noise at one level. Use for example "
            "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)."
        )
    copy = type(kind.__name__, (Late, kind), {}).from_config(scheduler.config)
    copy.num_skipped = num_skipped
    return copy


def noise_levels(scheduler) -> Float[Tensor, "steps 2"]:
    """(alpha, sigma) of the state at the start of each step of a diffusers scheduler that has been set, float64."""
    timesteps = scheduler.timesteps[:: scheduler.order]
    if hasattr(scheduler, "sigmas"):
        ratio = scheduler.sigmas.double().cpu()[:: scheduler.order][: len(timesteps)]
        # Either the state is x_0 + sigma noise, started from noise times the largest sigma, or it preserves variance.
        alpha = torch.ones_like(ratio) if float(scheduler.init_noise_sigma) != 1 else (1 + ratio**2).rsqrt()
        return torch.stack([alpha, ratio * alpha], 1)
    alpha_bar = scheduler.alphas_cumprod.double().cpu()[timesteps.long().cpu()]
    return torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1)
