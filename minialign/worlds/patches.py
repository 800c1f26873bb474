"""`patches`: 12x12 grey patches of the two photographs that scikit-learn ships, a temple and a flower.

    data()          the patches, in [0, 1]; encode, decode: to the network's range [-1, 1] and back
    denoiser()      a small unconditional UNet2DModel in EDM's parametrisation, trained on them (shipped)
    scheduler()     EDM's noise levels

Natural images have no classes and no sharp modes, but a spectrum: a few coarse features hold most of the variance, and
it falls steadily from there. Photographs: "china" by Paul Sabatier and "flower" by dany13 (both CC BY 2.0).
"""

import functools
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from minialign.policies.edm import EDMDenoiser
from minialign.worlds.base import WEIGHTS, missing_weights, weights_of
from minialign.worlds.digits import SPLITS

SIDE = 12
NUM_PATCHES = 8000
NUM_HELD_OUT = 2000


@functools.cache
def data(split: str = "all") -> Float32[Tensor, "n 1 12 12"]:
    """8,000 patches in [0, 1] at fixed random places of the photographs at half size; the last 2,000 are held out.

    `split` is "all", "train" or "held_out". Places may overlap: held-out patches are new places, not new photographs.
    """
    from sklearn.datasets import load_sample_images

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}. There are: {', '.join(SPLITS)}.")
    generator = torch.Generator().manual_seed(0)
    photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float() / 255
    grey = torch.nn.functional.avg_pool2d(photographs.mean(1, keepdim=True), 2)[:, 0]
    windows = grey.unfold(1, SIDE, 1).unfold(2, SIDE, 1).flatten(0, 2)
    rows = torch.randperm(len(windows), generator=generator)[:NUM_PATCHES]
    patches = windows[rows].unsqueeze(1).contiguous()
    first = NUM_PATCHES - NUM_HELD_OUT
    return {"all": patches, "train": patches[:first], "held_out": patches[first:]}[split]


def encode(images: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Pixels in [0, 1] to the network's range, [-1, 1]."""
    return 2 * images - 1


def decode(latents: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """The network's range to pixels in [0, 1], clipped."""
    return ((latents + 1) / 2).clamp(0, 1)


def scheduler():
    """EDM's noise levels for diffusers: rho = 7, from 80 to .002, data of standard deviation .5."""
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)


def denoiser(name: str = "patches", folder: str | Path | None = None) -> EDMDenoiser:
    """The shipped EDM network of `patches` or `digits_edm`, or the one in `folder`; FileNotFoundError if damaged."""
    folder = WEIGHTS / name if folder is None else Path(folder)
    for part in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            raise missing_weights(name, f"{folder / part} is missing")
    with weights_of(name, folder):
        return EDMDenoiser.from_pretrained(folder)
