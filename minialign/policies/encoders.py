"""How prompts become a network's inputs, and its latents images, as the pipeline does it."""

import copy
import difflib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from minialign.kernels import at_least_float32
from minialign.policies.border import unconditional
from minialign.policies.trajectory import Encoded


def pipeline_modules(pipe, decode_rows: int) -> dict:
    """Encoder and decoder of a pipeline, its modules frozen. `decode_rows`: latents per call of the autoencoder."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(pipe, name, None)) is not None:
            module.requires_grad_(False).eval()
    if unconditional(pipe):
        return {"decoder": to_pixels}
    heard = ("latents_mean", "latents_std") if hasattr(pipe, "text_encoder_2") else ()
    return {"encoder": _pipeline_encoder(pipe), "decoder": vae_decoder(pipe, decode_rows, heard)}


def latent_shape_of(network: nn.Module) -> tuple[int, ...]:
    config = getattr(network, "config", None)
    if config is None or getattr(config, "sample_size", None) is None:
        raise ValueError(
            f"{type(network).__name__} does not say the shape of its samples: pass latent_shape=(channels, h, w)."
        )
    return (config.in_channels, *height_and_width(config.sample_size))


def height_and_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """What diffusers' configs mean by a sample's size: the side of a square, or (height, width)."""
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def class_encoder(class_names: Sequence[Hashable] | None, null_class: int | None):
    """Prompts that are the names of classes; without names, every prompt is accepted and means nothing."""
    labels = {name: i for i, name in enumerate(class_names or ())}

    def encode(prompts: list[Hashable]) -> Encoded:
        if not labels:
            return Encoded({})
        for prompt in prompts:
            if prompt not in labels:
                known = [str(name) for name in labels]
                near = difflib.get_close_matches(str(prompt), known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown prompt {prompt!r}; {hint}This policy knows: {', '.join(known)}.")
        unconditional = {} if null_class is None else {"class_labels": torch.full((len(prompts),), null_class)}
        return Encoded({"class_labels": torch.tensor([labels[prompt] for prompt in prompts])}, unconditional)

    return encode


def _pipeline_encoder(pipe):
    """The pipeline's own encode_prompt. XL pipelines add pooled embeddings, and want the image's size (time_ids)."""

    @torch.no_grad()
    def encode(prompts: list[str]) -> Encoded:
        encoded = pipe.encode_prompt(
            prompts, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        inputs, unconditional = {"encoder_hidden_states": encoded[0]}, {"encoder_hidden_states": encoded[1]}
        if len(encoded) == 4:
            size = tuple(side * pipe.vae_scale_factor for side in height_and_width(pipe.unet.config.sample_size))
            projection = encoded[2].shape[-1]
            time_ids = pipe._get_add_time_ids(size, (0, 0), size, encoded[0].dtype, projection)
            time_ids = time_ids.to(encoded[0].device).expand(len(prompts), -1)
            inputs |= {"text_embeds": encoded[2], "time_ids": time_ids}
            unconditional |= {"text_embeds": encoded[3], "time_ids": time_ids}
        return Encoded(inputs, unconditional)

    return encode


def latent_units(config) -> tuple[Tensor, Tensor]:
    """(scale, shift) of an autoencoder's config: its own latents are scale times the UNet's, plus shift. (1, c, 1, 1)
    or (1, 1, 1, 1), in float64."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return std / config.scaling_factor, mean


def without_overflow(vae):
    """The autoencoder, or if it is one that overflows in float16, and is in float16 (force_upcast), a float32 copy."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    return copy.deepcopy(vae).float() if upcast else vae


def to_pixels(images: Tensor) -> Tensor:
    """From [-1, 1], as networks have it, to [0, 1], in float32 at least."""
    return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)


def vae_decoder(pipe, rows: int, heard: tuple[str, ...]):
    """As the pipeline decodes; a float32 copy is made here, of an autoencoder that needs one.

    heard: which units of the autoencoder the pipeline itself uses; ValueError for others.
    """
    _check_units(pipe, heard)
    vae = without_overflow(pipe.vae)
    scale, shift = latent_units(vae.config)

    def decode(latents: Tensor) -> Tensor:
        vae.to(latents.device)
        own = (latents * scale.to(latents) + shift.to(latents)).to(vae.dtype)
        return to_pixels(torch.cat([vae.decode(part).sample for part in own.split(rows)]))

    return decode


def _check_units(pipe, heard: tuple[str, ...]) -> None:
    """Raises ValueError for units of the autoencoder that the pipeline itself does not hear."""
    config = pipe.vae.config
    for name in ("latents_mean", "latents_std", "shift_factor"):
        other = {"latents_mean": "latents_std", "latents_std": "latents_mean"}.get(name)
        alone = name in heard and other is not None and config.get(other) is None
        if config.get(name) and (name not in heard or alone):
            why = f"without {other}" if alone else f"which {type(pipe).__name__} does not use"
            raise ValueError(
                f"the autoencoder has {name}={config[name]!r}, {why}. If its pictures are right without, "
                f"call pipe.vae.register_to_config({name}=None)."
            )
