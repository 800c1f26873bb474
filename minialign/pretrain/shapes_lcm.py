"""Remakes the consistency twin of the world `shapes`: `minialign pretrain shapes_lcm`.

The shipped Stable Diffusion in miniature is distilled (methods/consistency_distillation.py) on rendered scenes into a
UNet of the same shape plus an embedding of the guidance scale, and saved as a LatentConsistencyModelPipeline. Encoder
and autoencoder are the teacher's. The UNet is saved in half precision: its size on disk is what a course downloads.

    1. without guidance     the map itself is learned; few-step pictures become sharp
    2. guided teacher       2.5: relations then hold about as often as with the teacher's best samplers

Rounding to half precision between the phases makes phase 2 the same whether it follows at once or from a folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minialign.loop import watch
from minialign.measure import frechet_distance
from minialign.methods import consistency_distillation as distillation
from minialign.policies.consistency import ConsistencyPolicy
from minialign.pretrain import shapes as pretrain_shapes
from minialign.pretrain.formats import save_pipeline
from minialign.pretrain.whole import whole
from minialign.worlds import shapes


@dataclass(frozen=True)
class Recipe:
    num_scenes: int = 30_000  # captioned as the teacher's were
    relation_noise: float = pretrain_shapes.Recipe.relation_noise
    solver_steps: int = 50  # of the distillation grid
    guidance_dim: int = 256
    num_iterations: int = 5000  # of phase 1
    guided_iterations: int = 1500  # of phase 2
    guidance_scale: float = 2.5  # of phase 2: diffusers' g, 1 is off
    batch_size: int = 64
    learning_rate: float = 3e-4  # at 1e-3 the teacher's weights are lost before the student has learned
    ema_decay: float = 0.95
    num_threads: int = 1  # fixed, since sums over threads differ in the last digits
    num_samples: int = 512  # per row of the card's table


def latent_data(vae, recipe: Recipe, generator: torch.Generator) -> Callable:
    """data(n, generator) -> (latents, captions), scenes rendered and encoded once."""
    images, captions = pretrain_shapes.scenes(recipe.num_scenes, recipe.relation_noise, generator)
    with torch.no_grad():
        means = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(256)])
    latents = means * vae.config.scaling_factor

    def data(n: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        rows = torch.randint(len(latents), (n,), generator=generator)
        return latents[rows], [captions[i] for i in rows.tolist()]

    return data


def distil(teacher, recipe: Recipe, seed: int, first_phase: Path | None = None) -> ConsistencyPolicy:
    """The distilled student of the shipped model. Seeds the global random state (weights of the new embedding).

    first_phase: a folder with phase 1's result; None runs it.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = latent_data(teacher.pipeline.vae, recipe, generator)
    if first_phase is None:
        student = ConsistencyPolicy.from_diffusion(
            teacher, solver_steps=recipe.solver_steps, guidance_dim=recipe.guidance_dim
        )
        run_phase(student, teacher, data, recipe, recipe.num_iterations, 1.0, generator)
    else:
        student = shapes.load(model="consistency", folder=first_phase).policy
    student.network.half().float()
    student.embedded_guidance = recipe.guidance_scale
    generator = torch.Generator().manual_seed(seed + 1)
    run_phase(student, teacher, data, recipe, recipe.guided_iterations, recipe.guidance_scale, generator)
    student.network.half().float()  # what is measured is what is saved
    return student


def run_phase(student, teacher, data, recipe: Recipe, num_iterations: int, guidance_scale: float, generator) -> None:
    config = distillation.Config(
        num_iterations=num_iterations, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
        ema_decay=recipe.ema_decay, guidance_range=(guidance_scale, guidance_scale),
    )  # fmt: skip
    for _ in watch(distillation.train(student, teacher, data, config, generator), num_iterations):
        pass


# What the card says -------------------------------------------------------------------------------------------------


def features(images: Tensor, scorer) -> Tensor:
    """The scorer's picture embeddings, (n, 32), in which the Frechet distance is taken."""
    with torch.no_grad():
        pooled = [scorer.vision_model(pixel_values=x * 2 - 1).pooler_output for x in images.split(256)]
        return torch.nn.functional.normalize(scorer.visual_projection(torch.cat(pooled)), dim=-1)


def quality(policy, num_samples: int, real: Tensor, scorer, seed: int = 1) -> dict[str, float]:
    """Oracle accuracy of each kind of prompt, and the Frechet distance of all of them together to real scenes."""
    found, images = {}, []
    for kind in ("single", "relation", "count"):
        prompts = pretrain_shapes.spread(
            shapes.all_prompts(kind), num_samples // 2 if kind != "relation" else num_samples
        )
        samples = policy.sample(prompts, generator=torch.Generator().manual_seed(seed))
        found[kind] = float(shapes.oracle(samples, prompts).mean())
        images.append(samples)
    found["frechet"] = float(frechet_distance(features(torch.cat(images), scorer), real))
    return found


def rows(teacher, student, num_samples: int) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(model, network calls, quality): teacher (DDIM, eta 0 and 1), undistilled student, student, side by side."""
    scorer = load_scorer()
    generator = torch.Generator().manual_seed(2)
    real = features(shapes.real(2 * num_samples, generator)[0], scorer)
    untrained = ConsistencyPolicy.from_diffusion(
        teacher, solver_steps=student.scheduler.config.original_inference_steps
    )
    for name, policy, steps in (
        ("teacher, eta 0", teacher, (1, 2, 4, 8, 20)),
        ("teacher, eta 1", teacher, (4, 8, 20)),
        ("teacher, eta 0, guidance 2.5", teacher, (4, 8, 20)),
        ("undistilled", untrained, (1, 2, 4, 8)),
        ("student", student, (1, 2, 4, 8)),
    ):
        for num_steps in steps:
            if policy is teacher:
                policy.eta = 1.0 if "eta 1" in name else 0.0
                policy.guidance_scale = 2.5 if "guidance" in name else 1.0
            policy.set_num_steps(num_steps)
            yield name, num_steps, quality(policy, num_samples, real, scorer)


def load_scorer():
    """The CLIPModel of `shapes`."""
    return shapes.load_clip()[0]


def card(table: list, recipe: Recipe, seed: int, seconds: float, num_parameters: int, hashes: dict[str, str]) -> str:
    """The README.md beside the weights."""
    lines = [
        f"| {name} | {steps} | {q['single']:.3f} | {q['relation']:.3f} | {q['count']:.3f} | {q['frechet']:.4f} |"
        for name, steps, q in table
    ]
    sums = "\n".join(f"| `{name}` | `{value}` |" for name, value in hashes.items())
    return f"""# `shapes_lcm`: the consistency twin of `shapes`

A complete `LatentConsistencyModelPipeline` that draws the pictures of `shapes` in 1 to 8 network calls. Its UNet
({num_parameters:,} parameters, saved in half precision) was distilled from that of `shapes`; text encoder and
autoencoder are the same. Made by `minialign pretrain shapes_lcm` (seed {seed}, {seconds / 60:.1f} minutes on
{recipe.num_threads} CPU thread, torch {torch.__version__}).

```python
from diffusers import LatentConsistencyModelPipeline

pipe = LatentConsistencyModelPipeline.from_pretrained("minialign/worlds/weights/shapes_lcm")
pipe("a red circle", num_inference_steps=4, guidance_scale={recipe.guidance_scale}).images[0]
```

Call it with guidance_scale = {recipe.guidance_scale}, the one that was distilled into it; other values it has not seen.

## Metrics

Oracle accuracy (every fact right) on prompts spread evenly over all of their kind, {recipe.num_samples} relations,
half as many singles and counts; Frechet distance between the scorer's embeddings of these pictures and of
{2 * recipe.num_samples} rendered scenes. All rows were measured in one run.

| model | calls | single | relation | count | Frechet distance |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

"undistilled" is the student before training: the teacher's denoised guess, re-noised to the next level. The teacher is
sampled without guidance, but for the rows that say so; its grid is diffusers' "leading" one, which for one step begins
at timestep 1 and for two at 501, so compare few calls with "undistilled".

## Recipe

`{json.dumps(asdict(recipe))}`

## Hashes

| file | sha256 |
| --- | --- |
{sums}
"""


def pipeline(teacher, student):
    from diffusers import LatentConsistencyModelPipeline

    pipe = teacher.pipeline
    return LatentConsistencyModelPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=student.network,
        scheduler=student.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def main(
    out: str | Path,
    seed: int = 0,
    recipe: Recipe = Recipe(),
    report: Callable[[str], None] = print,
    first_phase: Path | None = None,
) -> list:
    """Distils, measures, and writes the pipeline and its card into `out`, all or nothing; returns the card's rows."""
    start = time.perf_counter()
    with whole(out, recipe.num_threads) as partial:
        teacher = shapes.load(num_steps=8).policy
        student = distil(teacher, recipe, seed, first_phase)
        seconds = time.perf_counter() - start
        table = list(rows(teacher, student, recipe.num_samples))
        student.scheduler.set_timesteps(4)
        pipe = pipeline(teacher, student)
        save_pipeline(pipe, partial)
        student.network.half().save_pretrained(partial / "unet")
        for config in partial.rglob(
            "config.json"
        ):  # diffusers notes where a module was loaded from: nobody else's business
            settings = json.loads(config.read_text(encoding="utf-8"))
            settings.pop("_name_or_path", None)
            config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files = sorted(partial.rglob("*.safetensors"))
        hashes = {p.relative_to(partial).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        (partial / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        num_parameters = sum(p.numel() for p in student.network.parameters())
        text = card(table, recipe, seed, seconds, num_parameters, hashes)
        (partial / "README.md").write_text(text, encoding="utf-8")
    for name, steps, found in table:
        report(f"{name}, {steps} calls: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return table
