"""`minialign pretrain digits_flow`: a Stable Diffusion 3 in miniature that draws the real digits, a rectified flow.

Flow matching (Lipman et al., 2022; Liu et al., 2022): regress noise - x_0 at x_t = (1 - t) x_0 + t noise, t
logit-normal (Esser et al., 2024, arXiv 2403.03206, section 3.1), prompts dropped one time in ten for guidance, moving
average of the weights. The autoencoder is trained to be the identity: 8x8 pixels need no smaller space. Text encoders
are random and frozen: eleven prompts only have to differ. One thread and a fixed seed: the same bytes again on the same
machine.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minialign.kernels import add_flow_noise
from minialign.measure import frechet_distance
from minialign.policies.flow import FlowPolicy
from minialign.pretrain.formats import save_flow_pipeline
from minialign.pretrain.shapes_models import tokenizer
from minialign.pretrain.whole import whole
from minialign.worlds import digits

CONTEXT = 4  # tokens of a prompt: start, the word, end, padding
WIDTH = 16  # of either text encoder


@dataclass(frozen=True)
class Recipe:
    num_steps: int = 6000  # optimizer steps of the transformer
    autoencoder_steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3  # AdamW, cosine to zero after a short warm-up; both networks
    weight_decay: float = 1e-2
    num_warmup: int = 200
    ema_decay: float = 0.998
    prompt_dropout: float = 0.1
    num_layers: int = 4
    num_heads: int = 4


def autoencoder():
    """No smaller space and no attention: 8x8x1 latents of 8x8x1 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0,
        shift_factor=0.0,
    )  # fmt: skip


def transformer(recipe: Recipe):
    """MMDiT: 16 patches of 2x2 pixels, and the tokens of the prompt, attend to each other."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads, attention_head_dim=16, caption_projection_dim=16 * recipe.num_heads,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=4,
    )  # fmt: skip


def text_encoder(words):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CONTEXT, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        initializer_factor=2.0,  # elements of about 1, of which half differs from prompt to prompt
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).requires_grad_(False)


def pipeline(recipe: Recipe):
    """The whole of it, untrained."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    words = tokenizer(list(digits.NAMES), CONTEXT)
    return StableDiffusion3Pipeline(
        transformer=transformer(recipe), vae=autoencoder(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=text_encoder(words), tokenizer=words, text_encoder_2=text_encoder(words), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def autoencoder_loss(vae, latents: Tensor, noise: Tensor) -> Tensor:
    """The identity, either way; the decoder also sees latents that are not quite a digit's."""
    encoded = vae.encode(latents).latent_dist.mean
    decoded = vae.decode(latents + 0.1 * noise).sample
    return (encoded - latents).square().mean() + (decoded - latents - 0.1 * noise).square().mean()


def flow_matching_loss(network, latents: Tensor, inputs: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
    """mean |v - (noise - x_0)|^2 over elements."""
    velocity = network(hidden_states=add_flow_noise(latents, noise, t), timestep=1000 * t, **inputs).sample
    return (velocity - (noise - latents)).square().mean()


def optimise(network, recipe: Recipe, num_steps: int, loss, report, name: str) -> None:
    """AdamW on `loss()`; the network ends as the moving average of its weights."""
    average = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    start = time.perf_counter()
    for step in range(num_steps):
        rate = min((step + 1) / recipe.num_warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
        optimizer.param_groups[0]["lr"] = rate * recipe.learning_rate
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))
        for key, tensor in network.state_dict().items():
            average[key].lerp_(tensor, 1 - decay)
        if (step + 1) % 500 == 0:
            report(
                f"{name}: step {step + 1:>5}/{num_steps}  loss {value.item():.4f}  {time.perf_counter() - start:.0f} s"
            )
    network.load_state_dict(average)
    network.eval()


def train(recipe: Recipe, seed: int, report=print):
    """The trained pipeline. Seeds the global random state."""
    torch.manual_seed(seed)
    pipe = pipeline(recipe)
    images, labels = digits.data("train")
    latents = digits.encode(images)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(latents), (recipe.batch_size,))
        return rows, torch.randn(recipe.batch_size, *latents.shape[1:])

    def of_autoencoder() -> Tensor:
        rows, noise = batch()
        return autoencoder_loss(pipe.vae, latents[rows], noise)

    optimise(pipe.vae.train(), recipe, recipe.autoencoder_steps, of_autoencoder, report, "autoencoder")
    hidden, _, pooled, _ = pipe.encode_prompt(
        [*digits.NAMES, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=digits.T5_TOKENS
    )

    def of_transformer() -> Tensor:
        rows, noise = batch()
        dropped = torch.rand(recipe.batch_size) < recipe.prompt_dropout
        prompts = labels[rows].masked_fill(dropped, len(digits.NAMES))
        inputs = {"encoder_hidden_states": hidden[prompts], "pooled_projections": pooled[prompts]}
        t = torch.randn(recipe.batch_size).sigmoid()
        return flow_matching_loss(pipe.transformer, latents[rows], inputs, t, noise)

    optimise(pipe.transformer.train(), recipe, recipe.num_steps, of_transformer, report, "transformer")
    return pipe


# What the card says -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(pipe, num_samples: int = 2000, seed: int = 1) -> dict[str, float]:
    """The figures of the card."""
    latents = digits.encode(digits.data("held_out")[0])
    figures = {
        "error of the autoencoder, held-out digits (root mean square, of 2)": float(
            (pipe.vae.decode(pipe.vae.encode(latents).latent_dist.mean).sample - latents).square().mean().sqrt()
        )
    }
    real, prompts = digits.data("all")[0], [digits.NAMES[i % 10] for i in range(num_samples)]
    for num_steps in (40, 20, 10, 5):
        policy = FlowPolicy.from_pipeline(
            pipe, num_steps=num_steps, guidance_scale=1.0, max_sequence_length=digits.T5_TOKENS
        )
        for name, drawn in (
            ("ODE", policy.sample(prompts, generator=torch.Generator().manual_seed(seed))),
            (
                "SDE, a = .7",
                policy.decode(policy.rollout(prompts, generator=torch.Generator().manual_seed(seed)).final),
            ),
        ):
            figures[f"oracle accuracy, {name}, {num_steps} steps"] = float(digits.oracle(drawn, prompts).mean())
            figures[f"Frechet distance, {name}, {num_steps} steps"] = float(
                frechet_distance(drawn.flatten(1), real.flatten(1))
            )
    return figures


def card(recipe: Recipe, seed: int, figures: dict[str, float], num_parameters: int, seconds: float, sha256: str) -> str:
    """The README.md beside the weights."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    return f"""# Flow model of the world `digits`

A Stable Diffusion 3 in miniature (diffusers' `StableDiffusion3Pipeline`): a transformer of {num_parameters:,}
parameters, a rectified flow on 8x8 latents, an autoencoder that is nearly the identity, two random text encoders, no
third. Prompts are "zero" to "nine"; the empty prompt is "any digit" (guidance). `pipe(prompt,
max_sequence_length={digits.T5_TOKENS})`: as many zeros stood for the third text encoder's tokens in training.

**Data.** scikit-learn's `load_digits`, as for the world's diffusion model: 1,437 digits, 360 held out.

**Recipe.** `minialign pretrain digits_flow --seed {seed}`, {seconds:.0f} s of CPU time, torch {torch.__version__}:
`{json.dumps(asdict(recipe))}`. Stored in float16.

**Figures.** Without guidance; Frechet distance of the 64 pixels (in [0, 1]) to all real digits.

| | |
|---|---|
{rows}

**Limits.** Small, grey, ten words.

**sha256** of `transformer/diffusion_pytorch_model.safetensors`: `{sha256}`
"""


def main(out: str | Path, seed: int = 0, recipe: Recipe = Recipe(), report=print) -> dict[str, float]:
    """Trains, measures, and writes a StableDiffusion3Pipeline and README.md into `out`, all or nothing; the figures."""
    with whole(out) as partial:
        start = time.process_time()
        pipe = train(recipe, seed, report)
        save_flow_pipeline(pipe, partial)
        figures = evaluate(digits.load_flow_pipeline(partial))
        seconds = time.process_time() - start
        weights = partial / "transformer" / "diffusion_pytorch_model.safetensors"
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        num_parameters = sum(p.numel() for p in pipe.transformer.parameters())
        (partial / "README.md").write_text(
            card(recipe, seed, figures, num_parameters, seconds, sha256), encoding="utf-8"
        )
    for name, value in figures.items():
        report(f"{name}: {value:.4f}")
    return figures
