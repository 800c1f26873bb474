"""diffusers' schedulers that start late: their grids without the first steps, and the noise level of each step.

For methods that get to a later noise level by other means than the network: teleportation, editing a given image.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Each was tried: with the exact network of a Gaussian, a late start ends in the same Gaussian (test_teleport).
TRIED = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
GRIDS = ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down")  # what a scheduler lists beside its timesteps


class Late:
    """Mixed into a diffusers scheduler: each grid that `set_timesteps` makes loses its first `num_skipped` steps."""

    num_skipped = 0

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        first = self.num_skipped * self.order  # second-order schedulers list every level twice
        self.timesteps = self.timesteps[first:]
        for name in GRIDS:
            if hasattr(self, name):
                setattr(self, name, getattr(self, name)[first:])
        if hasattr(self, "order_list"):  # the single-step solver's plan, in cycles from its first step
            if len(self.timesteps) % self.config.solver_order:
                self.register_to_config(lower_order_final=True)  # as it does itself where its cycles do not fit
            self.order_list = self.get_order_list(len(self.timesteps))


def late(scheduler, num_skipped: int):
    """A copy of the scheduler whose every grid lacks its first `num_skipped` steps. It is not set yet.

    Raises ValueError for a scheduler that is not among those tried (`TRIED`): its state may be more than x_0 and noise
    at one level, its steps may count from the start of its grid.
    """
    kind = type(scheduler)
    if kind.__name__ not in TRIED or scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(
            f"{kind.__name__} cannot start late: it is not among the schedulers that were tried. Use for example "
            "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=False)."
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
