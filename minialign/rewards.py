"""Rewards: any callable `reward(samples, prompts) -> Tensor[batch]`, the check at the border, and a few ready ones.

    checked          what every loop calls instead of the reward itself: refuses wrong shapes, nan, lists, and says why
    jpeg_size        kilobytes after JPEG coding; compressibility, incompressibility: two of DDPO's rewards
    clip_scorer      cosine similarity under any transformers CLIPModel; gradients flow into the images
    clip_embedders   images and texts as vectors of its space, for rewards made of exemplars
    weighted_sum     several rewards as one, with the terms kept apart for plotting; Saturated: near enough of each

    checked_set      the border of a reward of a *set*: reward(samples, prompts) -> one number for all of them together;
                     ready ones, and rewards of samples beside exemplars, are in exemplars.py

Samples are images (batch, C, h, w) in [0, 1] in the image worlds, points in the 2-D worlds, token ids or strings in the
language worlds, or a list of anything; a prompt is any hashable. A reward may be differentiable; whoever wants no
gradient calls it under `torch.no_grad()`.
"""

import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

Reward = Callable[[Any, Sequence[Hashable]], Tensor]
SetReward = Callable[[Any, Sequence[Hashable]], Tensor | float]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB statistics of CLIP's training images (Radford et al., 2021)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class RewardError(ValueError):
    """A reward broke its contract; the message names the reward, the offending samples and the likeliest cause."""


def states(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """{name.key: tensor} of those things that have a state (`tensors()`), for a checkpoint; the others are left out."""
    kept = {name: value.tensors() for name, value in named.items() if hasattr(value, "tensors")}
    return {f"{name}.{key}": tensor.detach().clone() for name, part in kept.items() for key, tensor in part.items()}


def load_states(named: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Gives each thing that has a state what `states` took of it (`load(tensors)`). Raises ValueError if that lacks."""
    kept = {name: value for name, value in named.items() if hasattr(value, "tensors")}
    for name, value in kept.items():
        part = within(tensors, name)
        missing = set(value.tensors()) - set(part)
        if missing:
            raise ValueError(
                f"the checkpoint has no {min(missing)!r} of the {name}: was it made by another method or reward?"
            )
    for name, value in kept.items():
        value.load(within(tensors, name))


def within(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What stands in a checkpoint under `name.`."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def name_of(reward: Reward) -> str:
    """The reward's name for tables and errors: its `__name__`, through functools.partial, else its class's."""
    return getattr(getattr(reward, "func", reward), "__name__", type(reward).__name__)


def checked(reward: Reward, samples: Tensor | Sequence, prompts: Sequence[Hashable]) -> Float32[Tensor, "batch"]:
    """The reward of each sample, float32, after the one check at the border.

    Numbers, integers, booleans and NumPy vectors are converted; autograd flows through. Tensors come back on the
    samples' device. Raises RewardError (a ValueError) for everything else; if the reward itself raised, its exception
    is kept as the cause, so that the traceback still shows the line.
    """
    name, num_samples = name_of(reward), len(samples)
    _check_lengths(name, samples, prompts)
    scores = _call(name, reward, samples, prompts)
    scores = _as_tensor(name, scores, num_samples)
    if scores.shape != (num_samples,):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {num_samples} samples; expected "
            f"({num_samples},). {_why_shape(tuple(scores.shape), num_samples)}"
        )
    if scores.is_complex():
        raise RewardError(f"reward {name!r} returned complex numbers; return their .abs() or .real.")
    scores = scores.to(device=samples.device if isinstance(samples, Tensor) else None, dtype=torch.float32)
    _check_finite(name, scores, prompts)
    return scores


def _check_lengths(name: str, samples: Tensor | Sequence, prompts: Sequence[Hashable]) -> None:
    if len(prompts) != len(samples):
        raise RewardError(f"reward {name!r} was given {len(samples)} samples but {len(prompts)} prompts.")


def _call(name: str, reward: Callable, samples: Tensor | Sequence, prompts: Sequence[Hashable]) -> object:
    try:
        return reward(samples, prompts)
    except RewardError:  # a term of a weighted sum has already explained itself
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error}. It was called with {_describe(samples)} and "
            f"{len(samples)} prompts; a reward takes (samples, prompts)."
        ) from error


def _as_tensor(name: str, scores: object, num_samples: int) -> Tensor:
    if isinstance(scores, Tensor):
        return scores
    expected = f"for {num_samples} samples; expected a tensor of shape ({num_samples},)."
    if isinstance(scores, np.ndarray) and scores.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(scores))
    if scores is None:
        raise RewardError(f"reward {name!r} returned None {expected} Probably its return statement is missing.")
    if isinstance(scores, (list, tuple)):
        repair = "torch.stack(scores)" if any(isinstance(s, Tensor) for s in scores) else "torch.tensor(scores)"
        raise RewardError(f"reward {name!r} returned a {type(scores).__name__} {expected} Return {repair}.")
    if isinstance(scores, (bool, int, float, np.generic)):
        raise RewardError(
            f"reward {name!r} returned one number, {scores}, {expected} Probably an average over the batch: drop it. "
            "Or a reward of a set, where one of samples is asked for."
        )
    raise RewardError(f"reward {name!r} returned a {type(scores).__name__} {expected} Convert it with torch.as_tensor.")


def _why_shape(shape: tuple[int, ...], num_samples: int) -> str:
    if shape == (num_samples, 1):
        return "Probably a linear head: return scores.squeeze(-1)."
    if shape == (1, num_samples):
        return "Probably an extra batch axis: return scores.squeeze(0)."
    if shape == ():
        return (
            "Probably an average over the batch: leave it out. Or a reward of a set, where one of samples is asked for."
        )
    if len(shape) == 1:
        return "Probably some samples were dropped, or scored twice: return one score for each, in order."
    if len(shape) == 2 and shape[0] == num_samples:
        return "Probably one score per class: pick the column that you mean, or return scores.mean(-1)."
    if shape[0] == num_samples:
        return "Probably a map of scores per pixel or token: return scores.flatten(1).mean(1)."
    return "Return one score per sample."


def _check_finite(name: str, scores: Tensor, prompts: Sequence[Hashable]) -> None:
    bad = ~scores.detach().isfinite()
    if not bad.any():
        return
    first = int(bad.nonzero()[0])
    kinds = {"nan" if value != value else "inf" for value in scores.detach()[bad].tolist()}
    what = " and ".join(sorted(kinds, reverse=True))
    raise RewardError(
        f"reward {name!r} returned {what} for {int(bad.sum())} of {len(prompts)} samples, "
        f"first at index {first} (prompt {prompts[first]!r}). Look at samples[{first}] before filtering it out."
    )


def _describe(samples: Tensor | Sequence) -> str:
    shape = f" of shape {tuple(samples.shape[1:])}" if isinstance(samples, Tensor) else ""
    return f"{len(samples)} samples{shape}"


# ---------------------------------------------------------------------------------------------- rewards of a set


def checked_set(
    reward: SetReward,
    samples: Tensor | Sequence,
    prompts: Sequence[Hashable],
    group: Int[Tensor, "batch"] | Sequence[int] | None = None,
) -> Float32[Tensor, "groups"]:
    """One number for each group of samples, float32, after the one check at the border.

    group (batch,): which samples belong together, any integers; the result is in ascending order of them. None: all
    are one set, and the result is (1,). The reward is called once a group with that group's samples and prompts, and
    returns one number: a 0-dimensional tensor (autograd flows through), a NumPy or a Python one.
    Raises RewardError (a ValueError) for everything else; what the reward itself raised is kept as the cause.
    """
    name = name_of(reward)
    _check_lengths(name, samples, prompts)
    if len(samples) == 0:
        raise RewardError(f"reward {name!r} is one of a set, and was given no samples.")
    group = torch.zeros(len(samples), dtype=torch.long) if group is None else torch.as_tensor(group).cpu()
    if group.shape != (len(samples),):
        raise RewardError(f"group has shape {tuple(group.shape)} for {len(samples)} samples; expected one id a sample.")
    device = samples.device if isinstance(samples, Tensor) else None
    scores = []
    for number in group.unique().tolist():
        rows = (group == number).nonzero()[:, 0]
        members = samples[rows.to(device)] if isinstance(samples, Tensor) else [samples[row] for row in rows.tolist()]
        score = _call(name, reward, members, [prompts[row] for row in rows.tolist()])
        scores.append(_as_number(name, score, len(members), number).to(device=device, dtype=torch.float32))
        if not scores[-1].detach().isfinite():
            raise RewardError(
                f"reward {name!r} returned {float(scores[-1])} for group {number} of {len(members)} samples. "
                "Probably the set is too small, or all its samples are equal."
            )
    return torch.stack(scores)


def _as_number(name: str, score: object, num_samples: int, group: int) -> Tensor:
    expected = f"for group {group}, a set of {num_samples} samples; expected one number for the whole set."
    if isinstance(score, (bool, int, float, np.generic)) and not isinstance(score, (np.complexfloating, np.str_)):
        return torch.tensor(score.item() if isinstance(score, np.generic) else score)
    if score is None:
        raise RewardError(f"reward {name!r} returned None {expected} Probably its return statement is missing.")
    if not isinstance(score, Tensor):
        raise RewardError(f"reward {name!r} returned a {type(score).__name__} {expected}")
    if score.shape == (num_samples,) and num_samples > 1:
        raise RewardError(
            f"reward {name!r} returned shape ({num_samples},) {expected} It scores each sample: use it without groups, "
            "where rewards of samples are asked for, or return scores.mean()."
        )
    if score.shape != () or score.is_complex():
        raise RewardError(f"reward {name!r} returned {score.dtype} of shape {tuple(score.shape)} {expected}")
    return score


# ---------------------------------------------------------------------------------------------- JPEG size


def jpeg_size(images: Tensor, prompts: Sequence[Hashable], quality: int = 95) -> Float32[Tensor, "batch"]:
    """Size after JPEG coding, in kilobytes (1,000 bytes), at the images' own resolution; not differentiable.

    images (batch, C, h, w), C = 1 or 3, values beyond [0, 1] are clipped, as a file would. An image that holds nan or
    inf has no size: its score is nan, which `checked` then reports. The header counts (about 0.6 kB in colour).
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise RewardError(f"jpeg_size reads images of shape (batch, 1 or 3, h, w); it was given {tuple(images.shape)}.")
    pixels = images.detach().float().cpu()
    broken = ~pixels.isfinite().flatten(1).all(1)
    pixels = pixels.nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    kilobytes = torch.tensor([_jpeg_bytes(image, quality) / 1000 for image in pixels], dtype=torch.float32)
    return kilobytes.masked_fill(broken, float("nan")).to(images.device)


def _jpeg_bytes(image: np.ndarray, quality: int) -> int:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=quality)
    return buffer.tell()


def compressibility(images: Tensor, prompts: Sequence[Hashable]) -> Float32[Tensor, "batch"]:
    """Minus the JPEG size in kilobytes: smooth images win (Black et al., 2023, section 5.1)."""
    return -jpeg_size(images, prompts)


def incompressibility(images: Tensor, prompts: Sequence[Hashable]) -> Float32[Tensor, "batch"]:
    """The JPEG size in kilobytes: busy images win (Black et al., 2023, section 5.1)."""
    return jpeg_size(images, prompts)


# ---------------------------------------------------------------------------------------------- sums of rewards


@dataclass(frozen=True)
class WeightedSum:
    """sum_k weight_k reward_k(samples, prompts); each term is checked, so an error names the term that caused it."""

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float | int]

    @property
    def __name__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items()).replace("+ -", "- ")

    def terms(self, samples: Tensor | Sequence, prompts: Sequence[Hashable]) -> dict[str, Tensor]:
        """Each reward on its own, unweighted, (batch,)."""
        return {name: checked(self.rewards[name], samples, prompts) for name in self.weights}

    def __call__(self, samples: Tensor | Sequence, prompts: Sequence[Hashable]) -> Tensor:
        terms = self.terms(samples, prompts)
        return sum(weight * terms[name] for name, weight in self.weights.items())

    def tensors(self) -> dict[str, Tensor]:
        return states(self.rewards)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        load_states(self.rewards, tensors)


def weighted_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float | int]) -> WeightedSum:
    """One reward out of several, e.g. `weighted_sum(world.rewards, {"ink": 1.0, "symmetric": 0.5})`.

    The rewards keep their own units: look at the spread of each term (`.terms`) before choosing weights.
    """
    unknown = [name for name in weights if name not in rewards]
    if unknown:
        raise ValueError(f"unknown reward {unknown[0]!r}. There are: {', '.join(sorted(rewards))}.")
    if not weights:
        raise ValueError("weighted_sum needs at least one weight.")
    return WeightedSum(dict(rewards), dict(weights))


@dataclass(frozen=True)
class Saturated:
    """PPO-SAT's reward: -sum_i (r_i - theta_i)^2 of each sample. It also pays for a small variance."""

    rewards: Sequence[Reward]
    thresholds: Sequence[float | int]

    def __call__(self, samples: Tensor | Sequence, prompts: Sequence[Hashable]) -> Tensor:
        scores = (checked(reward, samples, prompts) for reward in self.rewards)
        return -sum((score - theta) ** 2 for score, theta in zip(scores, self.thresholds, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        return states({str(i): reward for i, reward in enumerate(self.rewards)})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        load_states({str(i): reward for i, reward in enumerate(self.rewards)}, tensors)


# ---------------------------------------------------------------------------------------------- CLIP


def clip_scorer(
    model: torch.nn.Module,
    tokenizer: Callable,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Reward:
    """Cosine similarity, in [-1, 1], of image and prompt under a transformers CLIPModel; differentiable in the images.

    Preparation is that of CLIPImageProcessor, in torch so that gradients pass: shorter edge to the model's image size
    (bicubic, antialiased), centre crop, then (x - mean) / std; grey images become three equal channels. `mean` and
    `std` are the processor's `image_mean` and `image_std`. The model is put in eval mode and frozen, in place.
    """
    model.eval().requires_grad_(False)
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))

    def clip_score(images: Float[Tensor, "batch channels height width"], prompts: Sequence[str]) -> Tensor:
        pixels = (_resize_and_crop(images, size) - mean.to(images)) / std.to(images)  # grey becomes three channels
        texts = list(dict.fromkeys(prompts))  # groups share a prompt: encode each once
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        outputs = model(pixel_values=pixels.to(model.device, model.dtype), **tokens)
        rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=model.device)
        return (outputs.image_embeds * outputs.text_embeds[rows]).sum(-1)

    return clip_score


def clip_embedders(
    model: torch.nn.Module, tokenizer: Callable, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """(images -> (n, d), texts -> (n, d)), unit vectors of one space, of a transformers CLIPModel; see `clip_scorer`.

    So that a set of texts may be the exemplars of a set of images. No gradient.
    """
    model.eval().requires_grad_(False)
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(list(values)).view(1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def of_images(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch d"]:
        pixels = (_resize_and_crop(images, size) - mean.to(images)) / std.to(images)
        pooled = model.vision_model(pixel_values=pixels.to(model.device, model.dtype)).pooler_output
        return torch.nn.functional.normalize(model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def of_texts(texts: Sequence[str]) -> Float[Tensor, "batch d"]:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(model.device)
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return torch.nn.functional.normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=1)

    return of_images, of_texts


def _resize_and_crop(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = (int(height * scale + 1e-6), int(width * scale + 1e-6))
        images = torch.nn.functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
