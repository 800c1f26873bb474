"""Small random models of the real classes, built locally: nothing is downloaded."""

import json

import pytest
import torch


def tokenizer(folder):
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    files = folder / "words"  # transformers 4 and 5 agree on files, not on arguments
    files.mkdir(exist_ok=True)
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(files, pad_token="<|endoftext|>", model_max_length=16)


def text_config(**extra):
    return dict(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, **extra,
    )  # fmt: skip


def unet_and_vae(cross_attention_dim, size=4, vae=None, **extra):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim, **extra,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **(vae or {}),
    )  # fmt: skip
    return unet, vae


def sd_scheduler(**changes):
    from diffusers import DDIMScheduler

    settings = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    return DDIMScheduler(**(settings | {"set_alpha_to_one": False} | changes))


def stable_diffusion(tmp_path, scheduler=None, networks=None, **changes):
    """`networks`: settings of `unet_and_vae`; the rest the scheduler's, unless one is given."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, vae = unet_and_vae(16, **(networks or {}))
    return StableDiffusionPipeline(
        vae, CLIPTextModel(CLIPTextConfig(**text_config())), tokenizer(tmp_path), unet,
        scheduler or sd_scheduler(**changes),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(tmp_path, **networks):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet, vae = unet_and_vae(
        32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, **networks,
    )  # fmt: skip
    config = CLIPTextConfig(**text_config(projection_dim=16))
    return StableDiffusionXLPipeline(
        vae, CLIPTextModel(config), CLIPTextModelWithProjection(config), tokenizer(tmp_path), tokenizer(tmp_path), unet,
        sd_scheduler(),
    )  # fmt: skip


def t5_encoder(width):
    from transformers import T5Config, T5EncoderModel

    config = dict(vocab_size=54, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=1)
    return T5EncoderModel(T5Config(**config))


def flow_vae(channels):
    """Pictures of twice the latents' side, in units that are shifted, as Stable Diffusion 3's and FLUX's are."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=8, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=1.5,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def stable_diffusion_3(tmp_path, third=True, **scheduler):
    """8x8 pixels; its last block's output layer is 0 in diffusers, so it is drawn here."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = [CLIPTextModelWithProjection(CLIPTextConfig(**text_config(projection_dim=8))) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    words = tokenizer(tmp_path)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=flow_vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        text_encoder=text[0], tokenizer=words, text_encoder_2=text[1], tokenizer_2=words,
        text_encoder_3=t5_encoder(32) if third else None, tokenizer_3=words if third else None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(tmp_path, guidance_embeds=True, **scheduler):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    words = tokenizer(tmp_path)
    settings = dict(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=16) | scheduler
    pipe = FluxPipeline(
        transformer=transformer, vae=flow_vae(4), scheduler=FlowMatchEulerDiscreteScheduler(**settings),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config())), tokenizer=words, text_encoder_2=t5_encoder(32),
        tokenizer_2=words,
    )  # fmt: skip
    pipe.default_sample_size = 4
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_conditional(num_classes=4):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=num_classes,
    )  # fmt: skip


@pytest.fixture
def sd(tmp_path):
    return stable_diffusion(tmp_path)


def redraws(policy, pipe, prompts, noise, folder, **settings):
    """Asserts that what `policy` learned, saved, is read by the loader of a fresh pipeline, which then draws alike."""
    policy.save_adapter(folder)
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    again = type(policy).from_pipeline(pipe, **settings)
    torch.testing.assert_close(again.sample(prompts, noise), policy.sample(prompts, noise), atol=1e-5, rtol=0)


def trains_in_float32(policy, run):
    """Asserts that a run, run() -> steps, of a policy over a half-precision base moves float32 weights, all finite."""
    start = [p.detach().clone() for p in policy.parameters()]
    rows = [step.row() for step in run()]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in policy.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(policy.parameters(), start, strict=True))
    assert all(value == value for row in rows for value in row.values())
