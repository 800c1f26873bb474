"""What `minialign pretrain shapes` trains: the modules of Stable Diffusion and CLIP, each in miniature, untrained."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from minialign.pretrain.formats import save_tokenizer
from minialign.worlds import shapes

CONTEXT = 16  # tokens of a prompt, padded
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(words: list[str] | None = None, context: int = CONTEXT):
    """A CLIP tokenizer of our own: each of `words`, the grammar's by default, is one token, any other word falls to its
    letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary, merges = [*letters, *(f"{letter}</w>" for letter in letters)], {}
    for word in shapes.words() if words is None else words:
        pieces = _byte_pairs([*word[:-1], f"{word[-1]}</w>"], merges)
        while len(pieces) > 1:  # new merges rank behind the old ones, so the earlier words keep their single token
            merges[pieces[0], pieces[1]] = len(merges)
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.append(pieces[0])
    ids = {token: i for i, token in enumerate([*vocabulary, START, END])}
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 and 5 agree on files, not on arguments
        (Path(folder) / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=context)


def _byte_pairs(pieces: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding (Sennrich et al., 2016, arXiv 1508.07909): join the neighbours of lowest rank, until none."""
    while ranked := [(merges[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in merges]:
        _, i = min(ranked)
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    return pieces


def token_ids(tokenizer, prompts: list[str]) -> Tensor:
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    out = tokenizer(list(unique), padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return out.input_ids[torch.tensor([unique[prompt] for prompt in prompts])]


def autoencoder():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=shapes.SIZE,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def denoiser():
    """Attention only at 4x4, where it costs a quarter: half the time of attention at both levels, as good."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shapes.SIZE // 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _text_settings(tokenizer) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**_text_settings(tokenizer)))


def contrastive_scorer(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    vision = dict(
        image_size=shapes.SIZE,
        patch_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return CLIPModel(CLIPConfig(text_config=_text_settings(tokenizer), vision_config=vision, projection_dim=32))


def noise_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,  # so that the last step keeps a variance, hence a log-probability
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="epsilon",
    )


def pipeline(vae, unet, text, tokenizer):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_scorer(scorer, tokenizer, folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPProcessor

    side = {"height": shapes.SIZE, "width": shapes.SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": shapes.SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    scorer.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
