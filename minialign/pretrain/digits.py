"""`minialign pretrain digits`: trains the shipped class-conditional UNet2DModel on the real digits, in a few minutes.

Denoising score matching with epsilon prediction (Ho et al., 2020, eq. 14), labels dropped one time in ten for guidance
(Ho and Salimans, 2022), exponential moving average of the weights. One thread and a fixed seed: the same bytes again on
the same machine and torch.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minialign.measure import frechet_distance
from minialign.policies.diffusion import DiffusionPolicy
from minialign.pretrain.whole import whole
from minialign.worlds import digits
from minialign.worlds.gaussian import scheduler


@dataclass(frozen=True)
class Recipe:
    num_steps: int = 2500  # optimizer steps
    batch_size: int = 128
    learning_rate: float = 2e-3  # AdamW, cosine to zero after a short warm-up
    weight_decay: float = 1e-2
    num_warmup: int = 100
    ema_decay: float = 0.995
    label_dropout: float = 0.1  # share of labels replaced by the null class
    block_out_channels: tuple[int, ...] = (16, 32)
    dropout: float = 0.05


def build(recipe: Recipe):
    """The network, untrained: 8x8 and 4x4 levels, one residual block each way, attention at 4x4."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=recipe.block_out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=digits.NULL_CLASS + 1,
        dropout=recipe.dropout,
    )


def denoising_loss(
    network, alphas_cumprod: Tensor, latents: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """mean |noise - noise_pred|^2 over elements; timesteps stratified over the batch, which lowers the variance."""
    n = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    strata = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    timesteps = (strata * len(alphas_cumprod)).long()[torch.randperm(n, generator=generator)]
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    states = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    return (network(states, timesteps, class_labels=labels).sample - noise).square().mean()


def train(recipe: Recipe, seed: int, report=print):
    """The trained network: the moving average of its weights. Seeds the global random state."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits.data("train")
    latents, alphas_cumprod = digits.encode(images), scheduler().alphas_cumprod
    network = build(recipe).train()
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    start = time.perf_counter()
    for step in range(recipe.num_steps):
        progress = step / recipe.num_steps
        rate = min((step + 1) / recipe.num_warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = rate * recipe.learning_rate
        rows = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.label_dropout
        loss = denoising_loss(
            network, alphas_cumprod, latents[rows], labels[rows].masked_fill(dropped, digits.NULL_CLASS), generator
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))
        for name, value in network.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if (step + 1) % 250 == 0:
            report(
                f"step {step + 1:>5}/{recipe.num_steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s"
            )
    network.load_state_dict(average)
    return network.eval()


# What the card says -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(network, num_samples: int = 2000, seed: int = 1) -> dict[str, float]:
    """The figures of the card: oracle accuracy and Frechet distance (64 pixels, against all real digits) of samples."""
    real, _ = digits.data("all")
    held_out, held_out_labels = digits.data("held_out")
    read = digits.classifier().predict(held_out.flatten(1).numpy())
    figures = {
        "classifier accuracy, held-out digits": float((torch.from_numpy(read) == held_out_labels).float().mean())
    }
    alphas_cumprod = scheduler().alphas_cumprod
    for split in ("train", "held_out"):
        images, labels = digits.data(split)
        losses = [
            denoising_loss(network, alphas_cumprod, digits.encode(images), labels, torch.Generator().manual_seed(i))
            for i in range(8)
        ]
        figures[f"denoising loss, {split}"] = float(torch.stack(losses).mean())
    prompts = [digits.NAMES[i % 10] for i in range(num_samples)]
    for num_steps in (20, 10):
        policy = DiffusionPolicy(
            network, scheduler(), class_names=digits.NAMES, null_class=digits.NULL_CLASS, decoder=digits.decode,
            num_steps=num_steps,
        )  # fmt: skip
        samples = policy.sample(prompts, generator=torch.Generator().manual_seed(seed))
        figures[f"oracle accuracy, {num_steps} steps"] = float(digits.oracle(samples, prompts).mean())
        figures[f"Frechet distance, {num_steps} steps"] = float(frechet_distance(samples.flatten(1), real.flatten(1)))
    drawn, component = digits.mixture().sample(num_samples, torch.Generator().manual_seed(seed))
    drawn = digits.decode(drawn.float().view(-1, 1, 8, 8))
    figures["oracle accuracy, exact mixture"] = float(digits.oracle(drawn, [digits.NAMES[c] for c in component]).mean())
    figures["Frechet distance, exact mixture"] = float(frechet_distance(drawn.flatten(1), real.flatten(1)))
    first, second = digits.real(len(real), torch.Generator().manual_seed(seed))[0].flatten(1).chunk(2)
    figures["Frechet distance, two halves of the real digits"] = float(frechet_distance(first, second))
    return figures


def card(recipe: Recipe, seed: int, figures: dict[str, float], num_parameters: int, seconds: float, sha256: str) -> str:
    """The README.md beside the weights."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    return f"""# Base model of the world `digits`

A class-conditional `UNet2DModel` (diffusers) with {num_parameters:,} parameters that draws 8x8 handwritten digits.
Labels 0 to 9, and {digits.NULL_CLASS} for "any digit" (guidance). Latents are pixels in [-1, 1]; epsilon prediction.

**Data.** scikit-learn's `load_digits`: 1,797 digits by 13 people, the test part of "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak, 1998, UCI Machine Learning Repository). Trained on 1,437; 360 are held out.

**Recipe.** `minialign pretrain digits --seed {seed}`, {seconds:.0f} s of CPU time, torch {torch.__version__}:
`{json.dumps(asdict(recipe))}`

**Figures.** Samples at eta = 1 without guidance; Frechet distance of the 64 pixels (in [0, 1]) to all real digits.

| | |
|---|---|
{rows}

**Limits.** Small, grey, ten words. A model of these digits, not of handwriting at large.

**sha256** of `unet/diffusion_pytorch_model.safetensors`: `{sha256}`
"""


def main(out: str | Path, seed: int = 0, recipe: Recipe = Recipe(), report=print) -> dict[str, float]:
    """Trains, measures, and writes unet/, scheduler/ and README.md into `out`, all or nothing; returns the figures."""
    with whole(out) as partial:
        start = time.process_time()
        network = train(recipe, seed, report)
        figures = evaluate(network)
        seconds = time.process_time() - start
        network.save_pretrained(partial / "unet")
        scheduler().save_pretrained(partial / "scheduler")
        sha256 = hashlib.sha256((partial / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        num_parameters = sum(p.numel() for p in network.parameters())
        (partial / "README.md").write_text(
            card(recipe, seed, figures, num_parameters, seconds, sha256), encoding="utf-8"
        )
    for name, value in figures.items():
        report(f"{name}: {value:.4f}")
    return figures
