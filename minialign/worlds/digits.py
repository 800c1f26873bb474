"""`digits`: the 1,797 real handwritten digits, 8x8 grey pixels, that scikit-learn ships; the prompts are their names.

    load()                  base model: a class-conditional diffusers UNet2DModel trained on them (shipped, 0.2 M)
    load(model="flow")      base model: a StableDiffusion3Pipeline in miniature, a rectified flow (shipped, 0.6 M)
    load(model="mixture")   base model: an exact ten-component Gaussian mixture, so densities and tilts are closed forms
    oracle                  1 where a support vector machine reads the prompt's digit in what resembles any real digit
    like_bold, vendi, ...   rewards of a set, made of examples: SET_REWARDS
    ink, symmetric, ...     rewards that can be seen; ink alone is easily hacked, bold and thin pay only if legible

Latents are pixels mapped to [-1, 1]; samples are images (batch, 1, 8, 8) in [0, 1]. 1,437 digits are for fitting
(model, mixture, classifier alike), 360 are held out for checks. Data: Alpaydin and Kaynak (1998), UCI ML repository.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from minialign import show as pictures
from minialign.exact import GaussianMixture
from minialign.exemplars import FeatureReward, frechet_to, vendi
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.flow import FlowPolicy
from minialign.policies.loading import load_whole
from minialign.worlds.base import WEIGHTS, World, missing_weights, quietly, weights_of
from minialign.worlds.exact_denoiser import ExactDenoiser, ResidualMLP
from minialign.worlds.gaussian import scheduler

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NULL_CLASS = 10  # the label that means "any digit": what guidance contrasts with
NUM_HELD_OUT = 360
RIDGE = 0.01  # added to each covariance: many border pixels never vary; in squared latent units, std 0.1
T5_TOKENS = 1  # zeros in the place of a third text encoder's tokens, in the flow model's conditions
SPLITS = ("all", "train", "held_out")


# Data ---------------------------------------------------------------------------------------------------------------


@functools.cache
def data(split: str = "all") -> tuple[Float32[Tensor, "n 1 8 8"], Int[Tensor, "n"]]:
    """Images in [0, 1] and labels 0..9, in a fixed shuffled order; `split` is "all", "train" or "held_out"."""
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}. There are: {', '.join(SPLITS)}.")
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))  # the file is ordered by writer
    rows = {"all": order, "train": order[NUM_HELD_OUT:], "held_out": order[:NUM_HELD_OUT]}[split]
    images = torch.tensor(bunch.images[rows] / 16, dtype=torch.float32).unsqueeze(1)  # 17 levels of grey, 0 to 16
    return images, torch.tensor(bunch.target[rows])


def real(n: int, generator: torch.Generator | None = None, split: str = "all") -> tuple[Tensor, list[str]]:
    """n real digits (n, 1, 8, 8) in [0, 1], drawn without replacement as far as they go, and their names."""
    images, labels = data(split)
    rounds = [torch.randperm(len(images), generator=generator) for _ in range(-(-n // len(images)))]
    rows = torch.cat(rounds)[:n] if rounds else torch.arange(0)
    return images[rows], [NAMES[label] for label in labels[rows].tolist()]


def encode(images: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 1 8 8"]:
    """Pixels in [0, 1] to latents in [-1, 1]."""
    return 2 * images - 1


def decode(latents: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 1 8 8"]:
    """Latents to pixels in [0, 1], clipped. No gradient flows to a clipped pixel."""
    return ((latents + 1) / 2).clamp(0, 1)


# Rewards ------------------------------------------------------------------------------------------------------------


@functools.cache
def classifier():
    """scikit-learn's support vector machine on the training digits; fitting takes a tenth of a second."""
    from sklearn.svm import SVC

    images, labels = data("train")
    return SVC(gamma=0.5 / 8, C=10.0).fit(images.flatten(1).numpy(), labels.numpy())


@functools.cache
def reach() -> float:
    """How far a real digit may be from the nearest other one: the 0.999 quantile, L2 of the pixels (1.8)."""
    pixels = data("train")[0].flatten(1)
    distances = torch.cdist(pixels, pixels).fill_diagonal_(torch.inf)
    return distances.amin(1).quantile(0.999).item()


def labels_of(prompts: Sequence[str]) -> Int[Tensor, "b"]:
    """The number that each prompt names. Raises ValueError for a word that is none."""
    unknown = [prompt for prompt in prompts if prompt not in NAMES]
    if unknown:
        raise ValueError(f"unknown prompt {unknown[0]!r}. There are: {', '.join(NAMES)}.")
    return torch.tensor([NAMES.index(prompt) for prompt in prompts], dtype=torch.long)


def oracle(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str]) -> Float32[Tensor, "b"]:
    """1 where the classifier reads the digit that the prompt names, and the picture is within `reach` of a real digit.

    The second condition keeps the oracle from being hacked: a classifier alone calls a white rectangle a perfect one.
    No gradient.
    """
    wanted = labels_of(prompts)
    if len(wanted) == 0:
        return torch.zeros(0, device=samples.device)
    pixels = samples.detach().float().cpu().flatten(1)
    right = torch.from_numpy(classifier().predict(pixels.numpy())) == wanted
    near = torch.cdist(pixels, data("train")[0].flatten(1)).amin(1) <= reach()
    return (right & near).float().to(samples.device)


def ink(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """Mean brightness, 0 to 1 (real digits: 0.31). Its optimum is a white square: a reward to be hacked."""
    return samples.flatten(1).mean(1)


def symmetric(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """Left-right symmetry, 1 - mean |x - mirrored x| / mean (x + mirrored x), 0 to 1; an empty picture counts as 1."""
    mirrored = samples.flip(-1)
    difference, total = (samples - mirrored).abs().flatten(1).sum(1), (samples + mirrored).flatten(1).sum(1)
    return 1 - difference / total.clamp_min(1e-6)


def bold(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """Ink, paid only where the oracle can still read the digit."""
    return oracle(samples, prompts) * ink(samples, prompts)


def thin(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """1 - ink, paid only where the oracle can still read the digit."""
    return oracle(samples, prompts) * (1 - ink(samples, prompts))


def likeness(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str]) -> Float[Tensor, "b"]:
    """log p(the prompt's digit | sample), nats, under the exact mixture: smooth, differentiable, at most 0."""
    wanted = labels_of(prompts).to(samples.device)
    digits = mixture().to(samples.device)
    joint = torch.stack([digits.log_prob(encode(samples), log_weights=row) for row in _one_digit(digits)], 1)
    return joint.log_softmax(1).gather(1, wanted.unsqueeze(1)).squeeze(1)


# Rewards of a set -----------------------------------------------------------------------------------------------------


@functools.cache
def _axes() -> tuple[Float[Tensor, "64"], Float[Tensor, "64 16"]]:
    pixels = data("train")[0].flatten(1)
    return pixels.mean(0), torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[2][:16].T


def in_axes(samples: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 16"]:
    """Coordinates along the training digits' first 16 principal axes, in pixel units: 85 % of their variance."""
    mean, axes = _axes()
    return (samples.flatten(1) - mean.to(samples)) @ axes.to(samples)


def like_digits(*wanted: int) -> FeatureReward:
    """Frechet distance of a set to the real ones of these digits, `in_axes`."""
    images, labels = data("train")
    return frechet_to(images[torch.isin(labels, torch.tensor(wanted))], in_axes)


def like_bold() -> FeatureReward:
    """Frechet distance of a set to the tenth of the real digits with most ink, `in_axes`: a style, by examples."""
    images = data("train")[0]
    return frechet_to(images[images.flatten(1).mean(1).topk(len(images) // 10).indices], in_axes)


SET_REWARDS = {
    "like_bold": like_bold,
    "like_real": lambda: like_digits(*range(10)),
    "like_3_and_8": lambda: like_digits(3, 8),
    "vendi": lambda: vendi(in_axes, bandwidth=1.0),
}
REWARDS = {"oracle": oracle, "ink": ink, "bold": bold, "thin": thin, "symmetric": symmetric, "likeness": likeness}


# Base models --------------------------------------------------------------------------------------------------------


@functools.cache
def mixture() -> GaussianMixture:
    """Ten Gaussians with full covariances in the 64-dimensional latent space, one a digit, of the training split.

    Maximum likelihood plus RIDGE on the diagonal; weights are the digits' frequencies. float64.
    """
    images, labels = data("train")
    latents = encode(images).flatten(1).double()
    groups = [latents[labels == digit] for digit in range(len(NAMES))]
    covariances = torch.stack([group.T.cov(correction=0) for group in groups]) + RIDGE * torch.eye(
        64, dtype=torch.float64
    )
    weights = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    return GaussianMixture(torch.stack([group.mean(0) for group in groups]), covariances, weights)


def _one_digit(digits: GaussianMixture) -> Float[Tensor, "c 1 c"]:
    """Log-weights that leave one component, c times; each broadcasts over a batch."""
    return torch.eye(digits.num_components, device=digits.means.device).log().unsqueeze(1)


def _mixture_network(seed: int, width: int) -> ExactDenoiser:
    digits = mixture()
    single = GaussianMixture(digits.means.float(), digits.covariances.float(), digits.log_weights.exp().float())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        residual = ResidualMLP(64, len(NAMES), width=width)
    return ExactDenoiser(single, scheduler().alphas_cumprod, residual, torch.eye(len(NAMES), dtype=torch.bool))


def load_unet(folder: Path | None = None):
    """(UNet2DModel, DDIMScheduler) as shipped, or from `folder`. Raises FileNotFoundError if damaged."""
    from diffusers import DDIMScheduler, UNet2DModel

    folder = WEIGHTS / "digits" if folder is None else Path(folder)
    for part in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            raise missing_weights("digits", f"{folder / part} is missing")
    with weights_of("digits", folder):
        unet = load_whole(UNet2DModel, folder / "unet", low_cpu_mem_usage=False)
        return unet, DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)


def load_flow_pipeline(folder: str | Path | None = None):
    """The flow model as a StableDiffusion3Pipeline in float32, shipped or from `folder`, on the CPU.

    Prompts are the digits' names; call it with max_sequence_length=T5_TOKENS, as it was trained. Raises
    FileNotFoundError if damaged.
    """
    import diffusers
    from transformers import CLIPTextModelWithProjection

    folder = WEIGHTS / "digits_flow" if folder is None else Path(folder)
    if not (folder / "model_index.json").is_file():
        raise missing_weights("digits_flow", f"{folder / 'model_index.json'} is missing")
    with quietly(), weights_of("digits_flow", folder):
        text = (load_whole(CLIPTextModelWithProjection, folder / f"text_encoder{number}") for number in ("", "_2"))
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
            folder, local_files_only=True, vae=load_whole(diffusers.AutoencoderKL, folder / "vae"),
            transformer=load_whole(diffusers.SD3Transformer2DModel, folder / "transformer"), text_encoder=next(text),
            text_encoder_2=next(text), text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
        pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(kw_only=True)
class DigitsWorld(World):
    """Real digits, and the ten-component `mixture` of them in latent space that answers in closed form."""

    mixture: GaussianMixture


NUM_STEPS = {"unet": 20, "mixture": 20, "flow": 10}  # of the policy of each model, where nothing else is said


def load(
    model: str = "unet",
    *,
    num_steps: int | None = None,
    eta: float | int = 1.0,
    noise_level: float | int = 0.7,
    guidance_scale: float | int = 1.0,
    folder: str | Path | None = None,
    seed: int = 0,
    width: int = 256,
) -> DigitsWorld:
    """The world of handwritten digits, on the CPU.

    model "unet": the shipped network, or the one in `folder`. "flow": the shipped StableDiffusion3Pipeline, or the one
    in `folder`, a FlowPolicy with `noise_level` in the place of `eta`. "mixture": the exact class-conditional mixture
    plus a residual MLP that starts at zero (`seed` and `width` are its); `world.mixture` answers questions in closed
    form. `world.policies` has the other kind as it was shipped.
    """
    if model not in NUM_STEPS:
        raise ValueError(f"unknown model {model!r} of world 'digits'. There are: {', '.join(sorted(NUM_STEPS))}.")
    num_steps = NUM_STEPS[model] if num_steps is None else num_steps
    settings = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    builders = {"diffusion": _diffusion, "flow": _flow}
    if model == "flow":
        policy = _flow(folder, noise_level=noise_level, **settings)
    elif model == "unet":
        policy = _diffusion(folder, eta=eta, **settings)
    else:
        policy = DiffusionPolicy(_mixture_network(seed, width), scheduler(), eta=eta, **CLASSES, **settings)
    kind = "flow" if model == "flow" else "diffusion"
    del builders[kind]
    return DigitsWorld(
        name="digits",
        policies={kind: lambda: policy, **builders},
        prompts=list(NAMES),
        rewards=dict(REWARDS),
        set_rewards=dict(SET_REWARDS),
        default_reward="bold",
        oracle=oracle,
        real=real,
        show=show,
        encode=encode,
        mixture=mixture(),
    )


CLASSES = {"class_names": NAMES, "null_class": NULL_CLASS, "latent_shape": (1, 8, 8), "decoder": decode}


def _diffusion(folder: str | Path | None = None, **settings) -> DiffusionPolicy:
    unet, schedule = load_unet(None if folder is None else Path(folder))
    return DiffusionPolicy(unet.requires_grad_(False), schedule, **CLASSES, **settings)


def _flow(folder: str | Path | None = None, **settings) -> FlowPolicy:
    settings = {"guidance_scale": 1.0} | settings
    return FlowPolicy.from_pipeline(load_flow_pipeline(folder), max_sequence_length=T5_TOKENS, **settings)


def show(samples: Float[Tensor, "b 1 8 8"], prompts: Sequence[str], title: str | None = None):
    """The samples in a grid, each over its prompt, framed by what the oracle reads. -> Figure"""
    right = oracle(samples, prompts).bool()
    return pictures.image_grid(samples, list(prompts), min(10, len(samples)), title, good=right, scale=0.7)
