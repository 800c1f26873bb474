"""`shapes`: text to image in miniature, with an oracle that reads the facts of a prompt from the pixels.

A scene is a 32x32 RGB picture: one to three flat objects (four colours, three shapes) on warm off-white paper. A prompt
names its objects and sometimes how they stand to each other; `grammar()` says all of it. Everything here is exact:
`render_scenes` draws what a prompt says, `read_objects` reads it back, so a reward knows the truth and not an opinion.

    render_scenes         prompts -> pictures, anti-aliased by coverage (no supersampling)
    read_objects          pictures -> objects: palette map, connected components, best matching ideal shape
    oracle, graded        every fact of the prompt right (0 or 1); the share of its facts that are right
    load                  the World: Stable Diffusion in miniature, prompts, rewards, a contrastive scorer to be hacked

Image coordinates: x to the right, y downwards, in pixels, pixel (0, 0) covering [0, 1] x [0, 1].
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minialign import show as pictures
from minialign.exemplars import FeatureReward, frechet_to, vendi
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.encoders import latent_units
from minialign.policies.flow import FlowPolicy
from minialign.policies.loading import load_whole
from minialign.rewards import clip_embedders, clip_scorer
from minialign.subjects import SubjectTask
from minialign.worlds.base import WEIGHTS, World, missing_weights, quietly, weights_of
from minialign.worlds.shapes_oracle import UNKNOWN, Objects, facts, graded, inks, oracle, read_objects
from minialign.worlds.shapes_scenes import (
    COLOURS,
    COUNTS,
    KINDS,
    PAPER,
    RELATIONS,
    SHAPES,
    SIZE,
    Layout,
    Scene,
    all_prompts,
    draw,
    grammar,
    layouts,
    parse,
    render_scenes,
    words,
)
from minialign.worlds.shapes_subject import subject

__all__ = [
    "COLOURS",
    "COUNTS",
    "KINDS",
    "MODELS",
    "PAPER",
    "PROMPTS",
    "RELATIONS",
    "SHAPES",
    "SIZE",
    "UNKNOWN",
    "Layout",
    "Objects",
    "Scene",
    "ShapesWorld",
    "all_prompts",
    "check_weights",
    "draw",
    "draw_prompts",
    "encode",
    "facts",
    "graded",
    "grammar",
    "held_out_prompts",
    "ink_share",
    "inks",
    "layouts",
    "like_large",
    "like_red_captions",
    "like_scenes",
    "load",
    "load_embedders",
    "load_pipeline",
    "load_scorer",
    "oracle",
    "parse",
    "read_objects",
    "real",
    "render_scenes",
    "show",
    "subject",
    "words",
]

# the model's name: its folder of weights, its pipeline, its sampler if nothing is said
MODELS = {
    "diffusion": ("shapes", "StableDiffusionPipeline", dict(num_steps=8, guidance_scale=1.0)),
    "consistency": ("shapes_lcm", "LatentConsistencyModelPipeline", dict(num_steps=4, guidance_scale=2.5)),
}
FLOW = dict(num_steps=8, noise_level=0.7, guidance_scale=1.0)  # the diffusion model on a flow's clock
PROMPTS = (
    "a red circle above a blue square",
    "a green triangle above a yellow circle",
    "a blue square below a red triangle",
    "a yellow circle below a green square",
    "a red triangle left of a green circle",
    "a blue circle left of a yellow triangle",
    "a green square right of a blue circle",
    "a yellow square right of a red triangle",
)


def held_out_prompts() -> list[str]:
    """Sixteen relation prompts, four for each relation, none of them in PROMPTS."""
    return [prompt for prompt in all_prompts("relation")[13::27] if prompt not in PROMPTS]


def real(n: int, generator: torch.Generator | None = None) -> tuple[Float[Tensor, "n 3 h w"], list[str]]:
    """`n` rendered scenes with true prompts: a quarter single, half relation, a quarter count."""
    prompts = draw_prompts(n, generator)
    return render_scenes(prompts, generator), prompts


def draw_prompts(n: int, generator: torch.Generator | None = None) -> list[str]:
    """`n` prompts: in turn single, relation, count, relation, each uniform over its kind."""
    pools = [all_prompts(kind) for kind in ("single", "relation", "count", "relation")]
    uniform = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
    return [pools[i % 4][int(u * len(pools[i % 4]))] for i, u in enumerate(uniform)]


def show(samples: Float[Tensor, "batch 3 h w"], prompts: Sequence[str], title: str | None = None):
    """The pictures in a grid, each over its prompt, framed by what the oracle says. -> Figure"""
    return pictures.image_grid(samples, captions=list(prompts), good=oracle(samples, prompts).bool(), title=title)


def check_weights(folder: Path, name: str = "shapes") -> None:
    """Raises FileNotFoundError, which says how to remake them, unless each file has its hash from `hashes.json`."""
    try:
        hashes = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise missing_weights(name, f"{folder / 'hashes.json'} cannot be read ({error})") from None
    for file, expected in hashes.items():
        if not (folder / file).is_file():
            raise missing_weights(name, f"{folder / file} is missing")
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != expected:
            raise missing_weights(name, f"{folder / file} is damaged (its sha256 is not the one in hashes.json)")


def load_pipeline(folder: str | Path | None = None, model: str = "diffusion"):
    """The base model as a StableDiffusionPipeline, or its twin as a LatentConsistencyModelPipeline, on the CPU."""
    import diffusers
    from transformers import CLIPTextModel

    if model not in MODELS:
        raise ValueError(f"unknown model {model!r} of world 'shapes'. There are: {', '.join(MODELS)}.")
    name, pipeline_class, _ = MODELS[model]
    folder = WEIGHTS / name if folder is None else Path(folder)
    check_weights(folder, name)
    with quietly(), weights_of(name, folder):
        parts = dict(  # one by one, since a pipeline does not tell what its parts lacked
            vae=load_whole(diffusers.AutoencoderKL, folder / "vae"),
            unet=load_whole(diffusers.UNet2DConditionModel, folder / "unet"),
            text_encoder=load_whole(CLIPTextModel, folder / "text_encoder"),
        )
        pipe = getattr(diffusers, pipeline_class).from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_clip(folder: str | Path | None = None):
    """(CLIPModel, tokenizer) of the scorer, shipped or from `folder`/scorer. Raises FileNotFoundError if damaged."""
    from transformers import AutoTokenizer, CLIPModel

    folder = (WEIGHTS / "shapes" if folder is None else Path(folder)) / "scorer"
    with quietly(), weights_of("shapes", folder):
        return load_whole(CLIPModel, folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_scorer(folder: str | Path | None = None) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The contrastive scorer as a reward: cosine of picture and prompt, differentiable in the picture.

    A proxy: it can be fooled, and it knows little about relations.
    """
    return clip_scorer(*load_clip(folder), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def load_embedders(folder: str | Path | None = None) -> tuple[Callable, Callable]:
    """(images -> (n, 32), texts -> (n, 32)): the scorer's one space for both."""
    return clip_embedders(*load_clip(folder), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _main_axes(features: Float[Tensor, "n d"], k: int = 8) -> Float[Tensor, "d k"]:
    return torch.linalg.svd(features - features.mean(0), full_matrices=False)[2][:k].T


def ink_share(samples: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1"]:
    """How much of each picture belongs to an ink, in percent: the size of its objects."""
    return 100 * inks(samples)[1][:, : len(COLOURS)].any(1).float().mean((1, 2)).unsqueeze(1)


def like_large() -> FeatureReward:
    """Frechet distance of a set's `ink_share` to that of the quarter of 320 scenes of PROMPTS with most ink."""
    scenes = render_scenes(list(PROMPTS) * 40, torch.Generator().manual_seed(0))
    large = scenes[ink_share(scenes)[:, 0].topk(len(scenes) // 4).indices]
    return frechet_to(large, ink_share, name="like_large")


def like_scenes(folder: str | Path | None = None) -> FeatureReward:
    """Frechet distance of a set of pictures to 200 rendered scenes of PROMPTS, in the scorer's space.

    Along the scenes' first 8 principal axes, so that sets of some forty will do.
    """
    of_images, _ = load_embedders(folder)
    scenes = render_scenes(list(PROMPTS) * 25, torch.Generator().manual_seed(0))
    axes = _main_axes(of_images(scenes))
    return frechet_to(scenes, lambda images: of_images(images) @ axes, name="like_scenes")


def like_red_captions(folder: str | Path | None = None) -> FeatureReward:
    """The same with texts for exemplars: all captions of the grammar that name red things alone, and no picture."""
    of_images, of_texts = load_embedders(folder)
    captions = all_prompts("single") + all_prompts("relation") + all_prompts("count")
    others = [colour for colour in COLOURS if colour != "red"]
    red = [text for text in captions if "red" in text and not any(colour in text for colour in others)]
    axes = _main_axes(of_texts(captions))
    both = (lambda images: of_images(images) @ axes), (lambda texts: of_texts(texts) @ axes)
    return frechet_to(red, *both, name="like_red_captions")


@dataclass(kw_only=True)
class ShapesWorld(World):
    """`facts(samples, prompts)`: which facts of each prompt hold; `prompts_of` kind ("single", "relation", "count").

    subject(seed): a new object to be taught from four pictures.
    """

    facts: Callable[..., Any]
    prompts_of: dict[str, list[str]]
    subject: Callable[[int], SubjectTask] = subject


def _policy(
    model: str, folder: str | Path | None = None, eta: float | int = 1.0, **given: float | int
) -> DiffusionPolicy | ConsistencyPolicy | FlowPolicy:
    if model == "flow":
        return FlowPolicy.from_diffusion(_policy("diffusion", folder), **FLOW | given)
    pipe = load_pipeline(folder, model)
    settings = MODELS[model][2] | given
    if model == "diffusion":
        return DiffusionPolicy.from_pipeline(pipe, eta=eta, **settings)
    return ConsistencyPolicy.from_pipeline(pipe, **settings)


@torch.no_grad()
def encode(policy, samples: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c u v"]:
    """Pictures in [0, 1] as the policy's states: the means of its autoencoder's latents."""
    vae = (policy.pipeline or load_pipeline()).vae
    scale, shift = latent_units(vae.config)
    latents = vae.encode((2 * samples - 1).to(vae.device, vae.dtype)).latent_dist.mean
    return (latents - shift.to(latents)) / scale.to(latents)


def load(
    *,
    model: str = "diffusion",
    num_steps: int | None = None,
    eta: float | int = 1.0,
    noise_level: float | int = FLOW["noise_level"],
    guidance_scale: float | int | None = None,
    folder: str | Path | None = None,
) -> ShapesWorld:
    """The world of shapes, on the CPU, with the base model shipped or in `folder`.

    model "diffusion": 8 steps, no guidance, if nothing else is said. "consistency": the twin, 4 calls, the guidance 2.5
    that was distilled into it, no eta. "flow": the diffusion model on a flow's clock (`policies.flow.AsVelocity`), 8
    steps, `noise_level` in the place of eta. The settings are those of `world.policy`; `world.policies` has the
    others as they were shipped. `prompts` are eight relation prompts; sixteen others are held out.
    """
    given = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    given |= {"noise_level": noise_level} if model == "flow" else {}
    policy = _policy(model, folder, eta, **{name: value for name, value in given.items() if value is not None})
    scorer = load_scorer(None if model == "consistency" else folder)
    others = {kind: functools.partial(_policy, kind) for kind in (*MODELS, "flow") if kind != model}
    return ShapesWorld(
        name="shapes",
        policies={model: lambda: policy, **others},
        prompts=list(PROMPTS),
        rewards={"graded": graded, "oracle": oracle, "scorer": scorer},
        set_rewards={
            "like_large": like_large,
            "like_scenes": lambda: like_scenes(folder if model == "diffusion" else None),
            "like_red_captions": lambda: like_red_captions(folder if model == "diffusion" else None),
            "vendi": lambda: vendi(load_embedders(folder if model == "diffusion" else None)[0]),
        },
        default_reward="oracle",
        oracle=oracle,
        real=real,
        show=show,
        held_out=held_out_prompts(),
        facts=facts,
        prompts_of={kind: list(all_prompts(kind)) for kind in KINDS},
        encode=functools.partial(encode, policy),
    )
