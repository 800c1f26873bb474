"""A denoiser in EDM's parametrisation (Karras et al., 2022, arXiv 2206.00364): D(x, sigma) around a diffusers network.

    x = x_0 + sigma noise;  D = c_skip x + c_out F(c_in x, c_noise)        kernels.edm_denoised, kernels.edm_scalings

It is called at any noise level, so any ODE solver can use it, and diffusers' EDM schedulers, which do the same scalings
themselves, sample from the same network F.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minialign.kernels import at_least_float32, edm_denoised, edm_scalings, expand_as
from minialign.policies.encoders import height_and_width
from minialign.policies.loading import load_whole


class EDMDenoiser(nn.Module):
    """denoiser(x, sigma) -> E[x_0 | x], for x (batch, *dims) at noise level sigma, (batch,) or a number, sigma > 0.

    network: a diffusers UNet2DModel, or any module called as `network(x, c_noise)`; sigma_data: the data's standard
    deviation an element, as it was trained. Results have float32 at least. network_evaluations counts rows; a row that
    will be differentiated counts 3.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.network, self.sigma_data = network, sigma_data
        self.network_evaluations = 0

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "EDMDenoiser":
        """From `folder`/unet (UNet2DModel) and `folder`/scheduler (any of diffusers' EDM schedulers).

        Raises ValueError for another scheduler, and for a network that predicts v: c_out would have another sign.
        """
        from diffusers import EDMEulerScheduler, UNet2DModel

        unet = load_whole(UNet2DModel, Path(folder) / "unet", low_cpu_mem_usage=False)
        config, _ = EDMEulerScheduler.load_config(
            Path(folder) / "scheduler", return_unused_kwargs=True, local_files_only=True
        )
        kind, says = config["_class_name"], config.get("prediction_type", "epsilon")
        if not kind.startswith("EDM") or says != "epsilon":
            raise ValueError(
                f"{folder} has a {kind} with prediction_type={says!r}; expected one of diffusers' EDM schedulers, such "
                "as EDMEulerScheduler, with prediction_type='epsilon': F of D = c_skip x + c_out F."
            )
        scheduler = EDMEulerScheduler.from_config(config)
        return cls(unet.requires_grad_(False).eval(), scheduler.config.sigma_data)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample."""
        config = self.network.config
        return config.in_channels, *height_and_width(config.sample_size)

    def forward(
        self,
        x: Float[Tensor, "b *dims"],
        sigma: Float[Tensor, "..."] | float | int,
        class_labels: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b *dims"]:
        x = at_least_float32(x)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        _, _, c_in, c_noise = edm_scalings(sigma, self.sigma_data)
        dtype = next(self.network.parameters()).dtype
        labels = {} if class_labels is None else {"class_labels": class_labels}
        output = self.network((expand_as(c_in, x) * x).to(dtype), c_noise.to(dtype), **labels)
        self.network_evaluations += len(x) * (3 if torch.is_grad_enabled() else 1)
        return edm_denoised(getattr(output, "sample", output), x, sigma, self.sigma_data)
