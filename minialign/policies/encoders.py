"""The border of a denoising policy: how prompts become inputs and latents images, what a pipeline must have."""

import difflib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from minialign.kernels import at_least_float32
from minialign.policies.trajectory import Encoded


def check_pipeline(pipe) -> None:
    """Raises ValueError for what is no text-to-image pipeline with a UNet and an autoencoder."""
    missing = [part for part in ("unet", "vae", "scheduler", "tokenizer") if getattr(pipe, part, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        hint = " It has a transformer: flow models are not diffusion policies." if hasattr(pipe, "transformer") else ""
        raise ValueError(
            f"cannot wrap {type(pipe).__name__}: it has no {', '.join(missing) or 'encode_prompt'}.{hint} Expected "
            "a pipeline like StableDiffusionPipeline, or build DiffusionPolicy(network, scheduler, ...) by hand."
        )
    channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent:
        raise ValueError(
            f"cannot wrap {type(pipe).__name__}: its UNet takes {channels} channels, its VAE gives {latent}. "
            "Inpainting and image-conditioned UNets need extra channels in every call; use a text-to-image one."
        )


def pipeline_modules(pipe, decode_rows: int) -> dict:
    """Encoder and decoder of a pipeline, its modules frozen. `decode_rows`: latents per call of the autoencoder."""
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    return {"encoder": _pipeline_encoder(pipe), "decoder": _vae_decoder(pipe.vae, decode_rows)}


def latent_shape_of(network: nn.Module) -> tuple[int, ...]:
    config = getattr(network, "config", None)
    if config is None or getattr(config, "sample_size", None) is None:
        raise ValueError(
            f"{type(network).__name__} does not say the shape of its samples: pass latent_shape=(channels, h, w)."
        )
    size = config.sample_size
    return (config.in_channels, *((size, size) if isinstance(size, int) else size))


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
            side = pipe.unet.config.sample_size * pipe.vae_scale_factor
            time_ids = encoded[0].new_tensor([[side, side, 0, 0, side, side]]).expand(len(prompts), 6)
            inputs |= {"text_embeds": encoded[2], "time_ids": time_ids}
            unconditional |= {"text_embeds": encoded[3], "time_ids": time_ids}
        return Encoded(inputs, unconditional)

    return encode


def _vae_decoder(vae, rows: int):
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def decode(latents: Tensor) -> Tensor:
        latents = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        images = torch.cat([vae.decode(part).sample for part in latents.split(rows)])
        return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)

    return decode
