"""`minialign pretrain digits_edm` and `minialign pretrain patches`: the shipped EDM networks, in some minutes each.

Unconditional UNet2DModels in EDM's parametrisation (Karras et al., 2022), moving average of the weights. On the way it
records what the network has learned: how much of its denoiser the closed forms of `kernels` explain, at each
noise level (history.json). One thread and a fixed seed: the same bytes again on the same machine and torch.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minialign.kernels import edm_scalings, expand_as
from minialign.measure import frechet_distance
from minialign.policies.edm import EDMDenoiser
from minialign.pretrain.whole import whole
from minialign.worlds import digits, patches

SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Recipe:
    num_steps: int = 6000  # optimizer steps
    batch_size: int = 128
    learning_rate: float = 2e-3  # AdamW, cosine to zero after a short warm-up
    weight_decay: float = 1e-2
    num_warmup: int = 100
    ema_decay: float = 0.998
    sigma_log_mean: float = -0.6  # of ln sigma in training (EDM: -1.2, 1.2; here sigma = 80 must not be rare)
    sigma_log_std: float = 1.7
    block_out_channels: tuple[int, ...] = (16, 32)
    dropout: float = 0.05
    checkpoints: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000)  # steps at which snapshots are kept, beside the last


def data_of(name: str, split: str) -> Tensor:
    """The training range: (n, 1, side, side) in [-1, 1]."""
    return digits.encode(digits.data(split)[0]) if name == "digits_edm" else patches.encode(patches.data(split))


def build(name: str, recipe: Recipe):
    """The network, untrained: two levels, one residual block each way, attention at the lower one."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8 if name == "digits_edm" else patches.SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=recipe.block_out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        dropout=recipe.dropout,
    )


def denoising_loss(network, x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """EDM's weighted denoising error (eq. 8), which is |F - target|^2; ln sigma stratified over the batch."""
    n = len(x)
    strata = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    log_sigma = recipe.sigma_log_mean + recipe.sigma_log_std * torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))
    sigma = log_sigma.clamp(math.log(0.002), math.log(80)).exp()
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, SIGMA_DATA)
    noised = x + expand_as(sigma, x) * torch.randn(x.shape, generator=generator)
    target = (x - expand_as(c_skip, x) * noised) / expand_as(c_out, x)
    return (network(expand_as(c_in, x) * noised, c_noise).sample - target).square().mean()


def train(name: str, recipe: Recipe, seed: int, report=print):
    """(the moving average of the weights, {step: snapshot of it}). Seeds the global random state."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, network = data_of(name, "train"), build(name, recipe).train()
    average = {key: value.clone() for key, value in network.state_dict().items()}
    snapshots = {0: {key: value.clone() for key, value in average.items()}}
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    start = time.perf_counter()
    for step in range(recipe.num_steps):
        rate = min((step + 1) / recipe.num_warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps)))
        optimizer.param_groups[0]["lr"] = rate * recipe.learning_rate
        rows = torch.randint(len(data), (recipe.batch_size,), generator=generator)
        loss = denoising_loss(network, data[rows], recipe, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1 - decay)
        if step + 1 in recipe.checkpoints or step + 1 == recipe.num_steps:
            snapshots[step + 1] = {key: value.clone() for key, value in average.items()}
        if (step + 1) % 250 == 0:
            report(
                f"step {step + 1:>5}/{recipe.num_steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s"
            )
    network.load_state_dict(average)
    return network.eval(), snapshots


# What the card says -------------------------------------------------------------------------------------------------

LEVELS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0)


def explained(target: Tensor, approximation: Tensor, mean: Tensor) -> float:
    """Share of the denoiser's structure, 1 - |D - A|^2 / |D - mean|^2, sums over the batch."""
    return float(1 - (target - approximation).square().sum() / (target - mean).square().sum())


def gaussian_denoised(x: Tensor, sigma: float, data: Tensor) -> Tensor:
    """E[x_0 | x] if the data were one Gaussian with their mean and covariance (Wang and Vastola, 2024)."""
    mean, covariance = data.mean(0), data.T.cov()
    gain = torch.linalg.solve(covariance + sigma**2 * torch.eye(len(mean)), covariance)
    return mean + (x - mean) @ gain


def deltas_denoised(x: Tensor, sigma: float, data: Tensor) -> Tensor:
    """E[x_0 | x] if the data were the training set itself."""
    return (-(torch.cdist(x, data) ** 2) / (2 * sigma**2)).softmax(1) @ data


@torch.no_grad()
def learned(name: str, network, num_samples: int = 1000, seed: int = 1) -> list[dict[str, float]]:
    """At each level: the network's error on held-out data, and how much the two closed forms explain of it."""
    data = data_of(name, "train").flatten(1)
    held_out = data_of(name, "held_out").flatten(1)
    held_out = held_out.repeat(-(-num_samples // len(held_out)), 1)[:num_samples]
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(seed))
    denoiser, mean, rows = EDMDenoiser(network, SIGMA_DATA), data.mean(0), []
    for sigma in LEVELS:
        x = held_out + sigma * noise
        output = denoiser(x.view(-1, *denoiser.sample_shape), sigma).flatten(1)
        closed = {"gaussian": gaussian_denoised(x, sigma, data), "deltas": deltas_denoised(x, sigma, data)}
        row = {"sigma": sigma, "error": float((output - held_out).square().mean())}
        row |= {f"error, {key}": float((value - held_out).square().mean()) for key, value in closed.items()}
        row |= {f"explained by {key}": explained(output, value, mean) for key, value in closed.items()}
        rows.append({key: round(value, 5) for key, value in row.items()})
    return rows


@torch.no_grad()
def evaluate(name: str, network, num_samples: int = 2000, seed: int = 1) -> dict[str, float]:
    """Frechet distance, per pixel in the training range, of Euler samples to all data, by number of evaluations."""
    from diffusers import EDMDPMSolverMultistepScheduler

    denoiser, data = EDMDenoiser(network, SIGMA_DATA), data_of(name, "all").flatten(1)
    figures = {}
    for num_steps in (10, 20, 40):
        scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA)
        scheduler.set_timesteps(num_steps)
        x = torch.randn(num_samples, *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed))
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t.expand(num_samples)).sample
            x = scheduler.step(output, t, x).prev_sample
        distance = float(frechet_distance(x.clamp(-1, 1).flatten(1), data))
        figures[f"Frechet distance, DPM-Solver++, {num_steps} steps"] = distance
    first, second = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))].chunk(2)
    figures["Frechet distance, two halves of the data"] = float(frechet_distance(first, second))
    return figures


def card(
    name: str, recipe: Recipe, seed: int, figures: dict, history: dict, size: int, seconds: float, sha: str
) -> str:
    """The README.md beside the weights."""
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in figures.items())
    last = history[str(recipe.num_steps)]
    keys = ("error", "error, gaussian", "error, deltas", "explained by gaussian", "explained by deltas")
    table = "\n".join("| " + " | ".join(f"{row[key]:.4g}" for key in ("sigma", *keys)) + " |" for row in last)
    source = {
        "digits_edm": "scikit-learn's `load_digits`: 1,797 digits by 13 people (Alpaydin and Kaynak, 1998, UCI Machine "
        "Learning Repository). Trained on 1,437; 360 are held out.",
        "patches": "12x12 grey patches of scikit-learn's two sample photographs at half size, by Paul Sabatier and "
        "dany13 (CC BY 2.0). Trained on 6,000; 2,000 are held out.",
    }[name]
    return f"""# EDM network `{name}`

An unconditional `UNet2DModel` (diffusers) with {size:,} parameters in EDM's parametrisation, for diffusers' EDM
schedulers or `minialign.policies.edm.EDMDenoiser`. Pixels in [-1, 1], sigma_data {SIGMA_DATA}; half
precision.

**Data.** {source}

**Recipe.** `minialign pretrain {name} --seed {seed}`, {seconds:.0f} s of CPU time, torch {torch.__version__}:
`{json.dumps(asdict(recipe))}`

**Figures.** Samples against all data, squared pixel units of [-1, 1], sum over pixels.

| | |
|---|---|
{rows}

Mean squared error on held-out data at each noise level, of the network, of the Gaussian with the data's mean and
covariance, and of the training set itself; and how much of the network's denoiser (beyond the mean) the two explain.
history.json holds the same at steps {", ".join(map(str, history))} of training.

| sigma | error | error, Gaussian | error, training set | explained by Gaussian | explained by training set |
|---|---|---|---|---|---|
{table}

**Limits.** Small and grey; a teaching object.

**sha256** of `unet/diffusion_pytorch_model.safetensors`: `{sha}`
"""


def main(out: str | Path, seed: int = 0, recipe: Recipe = Recipe(), report=print, *, name: str) -> dict[str, float]:
    """Trains, measures, and writes unet/, scheduler/, history.json and README.md into `out`, all or nothing."""
    with whole(out) as partial:
        start = time.process_time()
        network, snapshots = train(name, recipe, seed, report)
        history, best = {}, network.state_dict()
        for step, snapshot in snapshots.items():
            network.load_state_dict(snapshot)
            history[str(step)] = learned(name, network)
        network.load_state_dict(best)
        network = network.half().float()  # as it will be stored
        figures = evaluate(name, network)
        seconds = time.process_time() - start
        network.half().save_pretrained(partial / "unet")
        patches.scheduler().save_pretrained(partial / "scheduler")
        (partial / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
        sha = hashlib.sha256((partial / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        size = sum(p.numel() for p in network.parameters())
        text = card(name, recipe, seed, figures, history, size, seconds, sha)
        (partial / "README.md").write_text(text, encoding="utf-8")
    for key, value in figures.items():
        report(f"{key}: {value:.4f}")
    return figures
