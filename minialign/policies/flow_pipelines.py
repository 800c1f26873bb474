"""What FlowPolicy.from_pipeline needs of Stable Diffusion 3 and FLUX: conditions, guidance, shift, latents, images."""

import torch
from torch import Tensor

from minialign.policies.border import check_flow_pipeline
from minialign.policies.encoders import vae_decoder
from minialign.policies.trajectory import Encoded

MODULES = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def flow_modules(
    pipe, guidance_scale: float | None, height: int | None, width: int | None, max_length: int | None, decode_rows: int
) -> tuple[dict, dict]:
    """(encoder, decoder and latent shape; guidance scale, grid and shift) of a pipeline, its modules frozen."""
    check_flow_pipeline(pipe)
    for name in MODULES:
        if (module := getattr(pipe, name, None)) is not None:
            module.requires_grad_(False).eval()
    flux = hasattr(pipe, "_pack_latents")
    patch = 2 if flux else pipe.transformer.config.patch_size
    size = [side or pipe.default_sample_size * pipe.vae_scale_factor for side in (height, width)]
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels % (patch * pipe.vae_scale_factor):
            raise ValueError(f"{name} is {pixels}; expected a multiple of {patch * pipe.vae_scale_factor} pixels.")
    rows, columns = (pixels // pipe.vae_scale_factor for pixels in size)
    length = {} if max_length is None else {"max_sequence_length": max_length}
    tokens = (rows // patch) * (columns // patch)
    decode = vae_decoder(pipe, decode_rows, heard=("shift_factor",))
    if flux:
        embedded = pipe.transformer.config.guidance_embeds
        if guidance_scale is not None and guidance_scale > 1 and not embedded:
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but this {type(pipe).__name__} has no guidance embedding, and "
                "its pipeline would not hear it: leave it out."
            )
        scale = 3.5 if guidance_scale is None else float(guidance_scale)
        modules = dict(
            encoder=_flux_encoder(pipe, (rows // 2, columns // 2), scale if embedded else None, length),
            decoder=lambda latents: decode(pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)),
            latent_shape=(tokens, pipe.transformer.config.in_channels),
        )
        return modules, dict(guidance_scale=1.0, grid="even", shift_mu=_shift_mu(pipe, tokens))
    modules = dict(
        encoder=_sd3_encoder(pipe, length), decoder=decode,
        latent_shape=(pipe.transformer.config.in_channels, rows, columns),
    )  # fmt: skip
    scale = 7.0 if guidance_scale is None else guidance_scale
    return modules, dict(guidance_scale=scale, grid="scheduler", shift_mu=_shift_mu(pipe, tokens))


def _shift_mu(pipe, tokens: int) -> float | None:
    """A shift that grows with the picture, for schedulers that want one; by the pipelines' own rule."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


def _sd3_encoder(pipe, length: dict):
    @torch.no_grad()
    def encode(prompts: list[str]) -> Encoded:
        hidden, no_hidden, pooled, no_pooled = pipe.encode_prompt(
            prompts, None, None, device=pipe.transformer.device, do_classifier_free_guidance=True, **length
        )
        inputs = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
        return Encoded(inputs, {"encoder_hidden_states": no_hidden, "pooled_projections": no_pooled})

    return encode


def _flux_encoder(pipe, size: tuple[int, int], guidance: float | None, length: dict):
    @torch.no_grad()
    def encode(prompts: list[str]) -> Encoded:
        device, dtype = pipe.transformer.device, pipe.transformer.dtype
        hidden, pooled, text_ids = pipe.encode_prompt(prompts, None, device=device, **length)
        inputs: dict[str, Tensor] = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
        if guidance is not None:
            inputs["guidance"] = torch.full((len(prompts),), guidance, device=device)
        image_ids = pipe._prepare_latent_image_ids(1, *size, device, dtype)
        return Encoded(inputs, {}, {"txt_ids": text_ids, "img_ids": image_ids})

    return encode
