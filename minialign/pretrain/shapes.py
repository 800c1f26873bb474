"""Remakes the weights of the world `shapes`: `minialign pretrain shapes`.

Everything is trained on rendered scenes with captions, from scratch, on one CPU thread, and saved in the usual
formats: a complete Stable Diffusion in miniature (`StableDiffusionPipeline.from_pretrained` loads the folder) and, in
`scorer/`, a CLIP of a quarter of a million parameters.

    1. autoencoder   AutoencoderKL, 32x32x3 to 8x8x4; L1 + KL
    2. denoiser      UNet2DConditionModel and CLIPTextModel together, on latents made once; epsilon prediction
                     (Ho et al., 2020, arXiv 2006.11239, eq. 14), a tenth of the captions dropped for guidance
    3. scorer        CLIPModel (Radford et al., 2021, arXiv 2103.00020), symmetric contrastive loss
    4. card          metrics of the finished model, the recipe, the hashes

Captions are noisy on purpose, like the alternative texts of web pictures: they always name the right objects, but in a
share of the two-object captions (`relation_noise`) the relation is a random one. Together with a short training, that
leaves a base model which draws clean objects and is unsure where to put them: the gap that alignment closes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minialign.pretrain.formats import save_pipeline
from minialign.pretrain.shapes_models import (
    autoencoder,
    contrastive_scorer,
    denoiser,
    noise_scheduler,
    pipeline,
    save_scorer,
    text_encoder,
    token_ids,
    tokenizer,
)
from minialign.pretrain.whole import whole
from minialign.worlds import shapes

# (steps, eta, guidance_scale) of the card's table; the first is the world's default
SAMPLERS = tuple((steps, eta, guidance) for guidance in (1.0, 3.0) for eta in (1.0, 0.0) for steps in (8, 10, 20))


@dataclass(frozen=True)
class Recipe:
    """What `minialign pretrain shapes` does. Every number enters the card."""

    num_scenes: int = 30_000  # rendered once; a quarter single, half relation, a quarter count
    relation_noise: float = 0.15  # share of two-object captions whose relation is drawn at random
    autoencoder_steps: int = 1500
    autoencoder_batch: int = 32
    kl_weight: float = 3e-4  # per latent element, against a mean absolute error per pixel
    denoiser_steps: int = 5000
    denoiser_batch: int = 64
    drop_caption: float = 0.1  # for classifier-free guidance
    scorer_steps: int = 800
    scorer_batch: int = 128
    learning_rate: float = 2e-3  # AdamW, linear warm-up over a twentieth, cosine to zero
    num_threads: int = 1  # fixed, since sums over threads differ in the last digits
    ema_horizon: int = 300  # steps; weights that are shipped are averaged over about so many
    samplers: tuple[tuple[int, float, float], ...] = SAMPLERS  # rows of the card's table
    num_samples: int = 512  # per entry of the card's table
    num_exact: int = 2000  # rendered scenes of each kind on which the oracle is checked


# ---- data ------------------------------------------------------------------------------------------------------------


def scenes(n: int, relation_noise: float, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """`n` pictures in [-1, 1] and their captions, some with a wrong relation."""
    images, truth = shapes.real(n, generator)
    return images * 2 - 1, [_blur_relation(prompt, relation_noise, generator) for prompt in truth]


def _blur_relation(prompt: str, noise: float, generator: torch.Generator) -> str:
    relation = shapes.parse(prompt).relation
    if relation is None or torch.rand((), generator=generator) >= noise:
        return prompt
    drawn = list(shapes.RELATIONS)[int(torch.randint(len(shapes.RELATIONS), (), generator=generator))]
    return prompt.replace(f" {relation} ", f" {drawn} ")


# ---- training --------------------------------------------------------------------------------------------------------


def _batches(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of row indices, without replacement within an epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator)
        yield order[:size]
        order = order[size:]


def descend(
    modules: list[nn.Module],
    loss: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    steps: int,
    recipe: Recipe,
    name: str,
) -> float:
    """AdamW on loss(rows) with warm-up and cosine; leaves the moving average in the modules. Returns the last loss."""
    from tqdm import tqdm

    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01, fused=True)
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rise, 0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3)
    )
    average, running = [p.detach().clone() for p in parameters], None
    bar = tqdm(batches, total=steps, desc=name, mininterval=1.0)
    for i, rows in enumerate(bar):
        value = loss(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        weight = max(1 / (i + 1), 1 / recipe.ema_horizon)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], weight)
        running = value.item() if running is None else running + 0.02 * (value.item() - running)
        if i % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    return running


def train_autoencoder(images: Tensor, recipe: Recipe, generator: torch.Generator):
    vae = autoencoder().to(memory_format=torch.channels_last)

    def loss(rows: Tensor) -> Tensor:
        x = images[rows]
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return (decoded - x).abs().mean() + recipe.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()

    steps = recipe.autoencoder_steps
    descend(
        [vae], loss, _batches(len(images), recipe.autoencoder_batch, steps, generator), steps, recipe, "autoencoder"
    )
    return vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def encode_all(vae, images: Tensor) -> Tensor:
    """Latent means of all pictures, scaled to unit standard deviation; sets the autoencoder's scaling_factor."""
    means = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(256)])
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return means * vae.config.scaling_factor


def train_denoiser(latents: Tensor, ids: Tensor, empty: Tensor, unet, text, recipe: Recipe, generator: torch.Generator):
    alpha_bar = noise_scheduler().alphas_cumprod

    def loss(rows: Tensor) -> Tensor:
        x, tokens = latents[rows], ids[rows]
        dropped = torch.rand(len(rows), generator=generator) < recipe.drop_caption
        tokens = torch.where(dropped[:, None], empty, tokens)
        timesteps = torch.randint(len(alpha_bar), (len(rows),), generator=generator)
        a = alpha_bar[timesteps].reshape(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=generator)
        predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, timesteps, text(tokens).last_hidden_state).sample
        return (predicted - noise).square().mean()

    steps = recipe.denoiser_steps
    batches = _batches(len(latents), recipe.denoiser_batch, steps, generator)
    descend([unet, text], loss, batches, steps, recipe, "denoiser")


def train_scorer(images: Tensor, ids: Tensor, tokenizer, recipe: Recipe, generator: torch.Generator):
    """CLIP's symmetric loss; a caption that stands twice in a batch is right for both of its pictures."""
    scorer = contrastive_scorer(tokenizer)

    def loss(rows: Tensor) -> Tensor:
        out = scorer(pixel_values=images[rows], input_ids=ids[rows])
        same = (ids[rows][:, None] == ids[rows][None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        both = nn.functional.cross_entropy(out.logits_per_text, target)
        return (both + nn.functional.cross_entropy(out.logits_per_image, target)) / 2

    steps = recipe.scorer_steps
    descend([scorer], loss, _batches(len(images), recipe.scorer_batch, steps, generator), steps, recipe, "scorer")
    return scorer


# ---- what came of it -------------------------------------------------------------------------------------------------


def evaluate_base(folder: Path, recipe: Recipe, seed: int) -> list[dict]:
    """Share of pictures that the strict oracle calls right, for each kind of prompt and each sampler."""
    pipe = shapes.load_pipeline(folder)
    rows = []
    for num_steps, eta, guidance_scale in recipe.samplers:
        policy = shapes.DiffusionPolicy.from_pipeline(pipe, num_steps=num_steps, eta=eta, guidance_scale=guidance_scale)
        row = {"num_steps": num_steps, "eta": eta, "guidance_scale": guidance_scale}
        for kind in shapes.KINDS:
            prompts = spread(shapes.all_prompts(kind), recipe.num_samples)
            samples = policy.sample(prompts, generator=torch.Generator().manual_seed(seed))
            row[kind] = shapes.oracle(samples, prompts).mean().item()
            if kind == "relation":
                held = shapes.facts(samples, prompts)
                row["both objects"] = sum(all(list(h.values())[:-2]) for h in held) / len(held)
        rows.append(row)
    return rows


def spread(prompts: tuple[str, ...], n: int) -> list[str]:
    """`n` prompts, evenly over the list."""
    return [prompts[i * len(prompts) // n] for i in range(n)]


@torch.no_grad()
def evaluate_scorer(scorer, tokenizer, num_samples: int, seed: int) -> dict[str, float]:
    """Share of fresh pictures whose own prompt scores highest: among all of its kind, and among the four relations."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for kind in shapes.KINDS:
        pool = shapes.all_prompts(kind)
        prompts = spread(pool, num_samples)
        truth = torch.tensor([pool.index(prompt) for prompt in prompts])
        images = shapes.render_scenes(prompts, generator) * 2 - 1
        scores = scorer(pixel_values=images, input_ids=token_ids(tokenizer, list(pool))).logits_per_image
        found[f"{kind}, 1 of {len(pool)}"] = (scores.argmax(1) == truth).float().mean().item()
        if kind == "relation":  # the pool has the four relations of the same two objects side by side
            four = (truth // 4 * 4)[:, None] + torch.arange(4)
            right = scores.gather(1, four).argmax(1) == truth % 4
            found["relation, 1 of 4, the objects given"] = right.float().mean().item()
    return found


def oracle_exactness(num_each: int, seed: int) -> tuple[int, int]:
    """(scenes on which the oracle says yes to the true prompt, scenes)."""
    prompts = [prompt for kind in shapes.KINDS for prompt in spread(shapes.all_prompts(kind), num_each)]
    images = shapes.render_scenes(prompts, torch.Generator().manual_seed(seed))
    return int(shapes.oracle(images, prompts).sum()), len(prompts)


def _share(value: float, n: int) -> str:
    return f"{value:.3f} ± {1.96 * math.sqrt(value * (1 - value) / n):.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _shares(row: dict, n: int) -> list[str]:
    settings = [str(row[name]) for name in ("num_steps", "eta", "guidance_scale")]
    return settings + [_share(row[name], n) for name in ("single", "relation", "both objects", "count")]


def card(facts: dict, recipe: Recipe, seed: int, hashes: dict[str, str]) -> str:
    """The README of the weights."""
    head = ["steps", "eta", "guidance", "single", "relation", "both objects", "count"]
    metrics = _table(head, [_shares(row, recipe.num_samples) for row in facts["base"]])
    parts = _table(
        ["part", "class", "parameters"], [[name, kind, f"{count:,}"] for name, kind, count in facts["parts"]]
    )
    retrieval = _table(["prompts", "share"], [[name, f"{value:.3f}"] for name, value in facts["scorer"].items()])
    sums = _table(["file", "sha256"], [[f"`{name}`", f"`{value}`"] for name, value in hashes.items()])
    right, scenes_read = facts["oracle"]
    return f"""# `shapes`: Stable Diffusion in miniature

A complete `StableDiffusionPipeline` that draws 32x32 pictures of coloured circles, squares and triangles from prompts
like "a red circle above a blue square", and in `scorer/` a small `CLIPModel`. Made by `minialign pretrain shapes`
(seed {seed}, {facts["seconds"] / 60:.1f} minutes on {recipe.num_threads} CPU thread, torch {torch.__version__}).

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("minialign/worlds/weights/shapes")
pipe("a red circle", num_inference_steps=8, eta=1.0, guidance_scale=1.0).images[0]
```

## Data

{recipe.num_scenes:,} scenes rendered by `minialign.worlds.shapes`: a quarter with one object, half with two objects and
their relation, a quarter with two or three equal objects; four colours, three shapes, all combinations.
{_about_captions(recipe)}

## Models

{parts}

Attention stands only at 4x4 latents, where it is cheap: half the time of attention at both levels.

## Metrics

Share of {recipe.num_samples} pictures with every fact of the prompt right and nothing else in the picture (strict
oracle), ± 95 % interval; prompts spread evenly over all of their kind. "both objects": the same pictures as "relation",
the relation itself not counted. The first row is the world's default sampler.

{metrics}

The oracle itself says yes to {right:,} of {scenes_read:,} rendered scenes under their true prompts. The autoencoder's
peak signal-to-noise ratio is {facts["psnr"]:.1f} dB; its latents are scaled to unit standard deviation.

Scorer: share of fresh scenes whose own prompt scores highest among the prompts named.

{retrieval}

## Recipe

`{json.dumps(asdict(recipe))}`

## Hashes

{sums}

## Limits

It knows {len(shapes.words())} words; any other falls into letters that it has never seen. A model for learning how
alignment works, of no use outside this world.
"""


def _about_captions(recipe: Recipe) -> str:
    if recipe.relation_noise == 0:
        return "Captions are true. Training stops early: objects are clean, where they stand is still often luck."
    share = f"{recipe.relation_noise:.0%}"
    return f"""Captions name the objects truly, but in {share} of the two-object captions the relation is
drawn at random (one time in four it is right by chance), as web pictures come with careless texts. So the base model
draws clean objects and is unsure where to put them: the gap that alignment closes."""


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*.safetensors"))
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    return hashes


def main(out: str | Path, seed: int = 0, recipe: Recipe = Recipe(), report: Callable[[str], None] = print) -> dict:
    """Trains everything and writes it to `out`, all or nothing: a folder beside it is filled and renamed at the end.

    Deterministic for a seed, a torch version and a kind of processor. Returns the facts that the card tells.
    """
    start = time.perf_counter()
    with whole(out, recipe.num_threads) as partial:
        torch.manual_seed(seed)  # weight initialisation
        facts = _train_all(partial, torch.Generator().manual_seed(seed), recipe, report)
        facts["oracle"] = oracle_exactness(recipe.num_exact, seed + 1)
        facts["base"] = evaluate_base(partial, recipe, seed + 1)
        facts["seconds"] = time.perf_counter() - start
        text = card(facts, recipe, seed, json.loads((partial / "hashes.json").read_text(encoding="utf-8")))
        (partial / "README.md").write_text(text, encoding="utf-8")
    report(f"wrote {out} in {facts['seconds']:.0f} s")
    return facts


def _train_all(folder: Path, generator: torch.Generator, recipe: Recipe, report: Callable[[str], None]) -> dict:
    words = tokenizer()
    images, captions = scenes(recipe.num_scenes, recipe.relation_noise, generator)
    ids, empty = token_ids(words, captions), token_ids(words, [""])
    vae = train_autoencoder(images, recipe, generator).eval()
    latents = encode_all(vae, images)
    psnr = _peak_signal_to_noise(vae, images[:1000], latents[:1000])
    report(f"autoencoder: {psnr:.1f} dB, scaling factor {vae.config.scaling_factor}")
    unet, text = denoiser(), text_encoder(words)
    train_denoiser(latents, ids, empty, unet, text, recipe, generator)
    scorer = train_scorer(images, ids, words, recipe, generator)
    save_pipeline(pipeline(vae, unet, text, words), folder)
    save_scorer(scorer, words, folder / "scorer")
    _hash_files(folder)
    named = {"vae": vae, "unet": unet, "text_encoder": text, "scorer": scorer}
    parts = [(name, type(module).__name__, _num_parameters(module)) for name, module in named.items()]
    retrieval = evaluate_scorer(scorer.eval(), words, recipe.num_samples, recipe.num_scenes)
    return {"psnr": psnr, "parts": parts, "scorer": retrieval}


@torch.no_grad()
def _peak_signal_to_noise(vae, images: Tensor, latents: Tensor) -> float:
    """In decibels, for pictures in [0, 1]."""
    decoded = torch.cat([vae.decode(z).sample for z in (latents / vae.config.scaling_factor).split(250)])
    return -10 * torch.log10(((decoded.clamp(-1, 1) - images) / 2).square().mean()).item()
