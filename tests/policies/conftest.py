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
