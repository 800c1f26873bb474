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

import difflib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minialign import show as pictures
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy
from minialign.rewards import clip_scorer
from minialign.worlds.base import WEIGHTS, World, missing_weights, quietly

SIZE = 32  # pixels a side
PAPER = (0.965, 0.945, 0.910)  # warm off-white
COLOURS = {
    "red": (0.835, 0.225, 0.205),
    "green": (0.250, 0.590, 0.330),
    "blue": (0.180, 0.370, 0.720),
    "yellow": (0.945, 0.740, 0.170),
}
SHAPES = ("circle", "square", "triangle")
# axis (0: x, 1: y) and sign of first minus second object's position
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
COUNTS = {"two": 2, "three": 3}
TRIANGLE_HEIGHT = 3**0.5 / 2  # of an equilateral triangle, in sides
MAX_OBJECTS = 3
KINDS = ("single", "relation", "count")

MIN_AREA = 4  # pixels; smaller specks are no objects
MIN_OVERLAP = 0.85  # intersection over union with the ideal shape of that place and area; below it: unknown
STRAY = 0.18  # distance (RGB) from paper and from every paper-to-ink line at which a pixel has a fifth, foreign colour
UNKNOWN = -1


# ---- grammar ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a prompt says: its objects as (colour, shape) indices, and the relation of the first to the second."""

    objects: tuple[tuple[int, int], ...]
    relation: str | None = None

    @property
    def kind(self) -> str:
        return "relation" if self.relation else "single" if len(self.objects) == 1 else "count"


def grammar() -> str:
    """The prompts of this world, in one sentence."""
    colours, shapes, relations = ", ".join(COLOURS), ", ".join(SHAPES), ", ".join(RELATIONS)
    return (
        "'a COLOUR SHAPE', 'two|three COLOUR SHAPEs', or 'a COLOUR SHAPE RELATION a COLOUR SHAPE' with two different "
        f"colours; COLOUR is one of {colours}; SHAPE one of {shapes}; RELATION one of {relations}"
    )


@functools.cache
def all_prompts(kind: str) -> tuple[str, ...]:
    """Every prompt of one kind, in a fixed order: 12 single, 432 relation, 24 count."""
    nouns = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if kind == "single":
        return tuple(f"a {colour} {shape}" for colour, shape in nouns)
    if kind == "count":
        return tuple(f"{count} {colour} {shape}s" for count in COUNTS for colour, shape in nouns)
    if kind == "relation":
        pairs = [(a, b) for a in nouns for b in nouns if a[0] != b[0]]
        return tuple(f"a {a[0]} {a[1]} {relation} a {b[0]} {b[1]}" for a, b in pairs for relation in RELATIONS)
    raise ValueError(f"unknown kind of prompt {kind!r}; there are: {', '.join(KINDS)}.")


@functools.cache
def _scenes() -> dict[str, Scene]:
    colours, scenes = list(COLOURS), {}
    for kind in KINDS:
        for prompt in all_prompts(kind):
            words = prompt.split()
            first = (colours.index(words[1]), SHAPES.index(words[2].removesuffix("s")))
            if kind == "relation":
                second = (colours.index(words[-2]), SHAPES.index(words[-1]))
                scenes[prompt] = Scene((first, second), " ".join(words[3:-3]))
            else:
                scenes[prompt] = Scene((first,) * COUNTS.get(words[0], 1))
    return scenes


@functools.cache
def parse(prompt: object) -> Scene:
    """The scene that a prompt describes. A prompt outside the grammar raises ValueError with the nearest one inside."""
    scene = _scenes().get(" ".join(prompt.lower().split())) if isinstance(prompt, str) else None
    if scene is None:
        raise ValueError(_complaint(prompt))
    return scene


def _complaint(prompt: object) -> str:
    if not isinstance(prompt, str):
        return f"prompt {prompt!r} is a {type(prompt).__name__}, not a string; the world 'shapes' knows {grammar()}."
    vocabulary = words()
    strange = [word for word in prompt.lower().split() if word not in vocabulary]
    near = difflib.get_close_matches(strange[0], vocabulary, 1) if strange else []
    nearest = difflib.get_close_matches(prompt.lower(), _scenes(), 1)
    hint = f" It does not know the word {strange[0]!r}" if strange else ""
    hint += f"; did you mean {near[0]!r}?" if near else "." if strange else ""
    hint += f" The nearest prompt is {nearest[0]!r}." if nearest else ""
    return f"the world 'shapes' cannot draw or check the prompt {prompt!r}.{hint} It knows {grammar()}."


def words() -> tuple[str, ...]:
    """Every word of the grammar, in a fixed order; each is one token of the text encoder."""
    relation_words = dict.fromkeys(word for relation in RELATIONS for word in relation.split())
    return ("a", *COUNTS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *relation_words)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _depth(shape: int, centre: Float[Tensor, "n 2"], half: Float[Tensor, "n 2"]) -> Float[Tensor, "n h w"]:
    """How far inside a shape each pixel's midpoint lies: pixels, negative outside. `half` is half its bounding box."""
    grid = torch.arange(SIZE, dtype=centre.dtype) + 0.5
    x, y = (grid - centre[:, 0, None])[:, None, :], (grid - centre[:, 1, None])[:, :, None]
    half_x, half_y = half[:, 0, None, None], half[:, 1, None, None]
    if SHAPES[shape] == "circle":
        return (1 - ((x / half_x).square() + (y / half_y).square()).sqrt()) * torch.minimum(half_x, half_y)
    if SHAPES[shape] == "square":
        return torch.minimum(half_x - x.abs(), half_y - y.abs())
    slant = half_x / (half_x.square() + (2 * half_y).square()).sqrt()  # height under a side -> distance from it
    return torch.minimum((half_y + y - 2 * half_y / half_x * x.abs()) * slant, half_y - y)


def _coverage(
    shape: Int[Tensor, "n"], centre: Float[Tensor, "n 2"], half: Float[Tensor, "n 2"]
) -> Float[Tensor, "n h w"]:
    """Share of each pixel inside a shape: the depth, cut off half a pixel to either side of the edge."""
    out = centre.new_zeros(len(shape), SIZE, SIZE)
    for k in range(len(SHAPES)):
        rows = (shape == k).nonzero().squeeze(1)
        out[rows] = (_depth(k, centre[rows], half[rows]) + 0.5).clamp(0, 1)
    return out


class Layout(NamedTuple):
    """Where the objects of a batch stand, in pixels, padded to MAX_OBJECTS; `radius`: half the width, 0: absent."""

    colour: Int[Tensor, "batch objects"]
    shape: Int[Tensor, "batch objects"]
    centre: Float[Tensor, "batch objects 2"]
    radius: Float[Tensor, "batch objects"]


def _half_box(shape: Int[Tensor, "*n"], radius: Float[Tensor, "*n"]) -> Float[Tensor, "*n 2"]:
    return torch.stack([radius, torch.where(shape == 2, radius * TRIANGLE_HEIGHT, radius)], dim=-1)


def draw(layout: Layout) -> Float[Tensor, "batch 3 h w"]:
    """Paint the objects on the paper, later ones over earlier ones."""
    images = torch.tensor(PAPER).reshape(1, 3, 1, 1).repeat(len(layout.colour), 1, SIZE, SIZE)
    inks = torch.tensor(list(COLOURS.values()))
    for k in range(layout.colour.shape[1]):
        radius = layout.radius[:, k]
        half = _half_box(layout.shape[:, k], radius.clamp(min=1e-3))
        alpha = _coverage(layout.shape[:, k], layout.centre[:, k], half)[:, None] * (radius > 0)[:, None, None, None]
        images = images + alpha * (inks[layout.colour[:, k]][:, :, None, None] - images)
    return images


def _uniform(rng: np.random.Generator, low, high):
    return low + (high - low) * rng.random(np.broadcast(low, high).shape)


def _place_single(rng, n: int):
    radius = _uniform(rng, np.full((n, 1), 4.5), 8.5)
    return _uniform(rng, radius[..., None] + 1, SIZE - 1 - radius[..., None].repeat(2, -1)), radius


def _place_pair(rng, n: int, axis: np.ndarray, sign: np.ndarray):
    """First and second object along an axis, at least 2.5 pixels apart, and less far apart across than along."""
    radius = _uniform(rng, np.full((n, 2), 4.0), 6.0)
    reach = radius.sum(1)
    gap = _uniform(rng, np.full(n, 2.5), np.minimum(SIZE - 2 - 2 * reach, 8.0))
    low = _uniform(rng, np.ones(n), SIZE - 1 - 2 * reach - gap)  # the pair's near edge
    first_is_low = sign < 0
    near, far = np.where(first_is_low, radius[:, 0], radius[:, 1]), np.where(first_is_low, radius[:, 1], radius[:, 0])
    along_near, along_far = low + near, low + 2 * near + gap + far
    across = _uniform(rng, np.full(n, 7.0 + 1), SIZE - 7.0 - 1)
    shift = _uniform(rng, np.full(n, -0.5), 0.5) * (along_far - along_near)
    across_far = np.clip(across + shift, 7.0, SIZE - 7.0)
    position = np.stack([np.stack([along_near, across], -1), np.stack([along_far, across_far], -1)], 1)
    position = np.where(first_is_low[:, None, None], position, position[:, ::-1])
    return np.where((axis == 0)[:, None, None], position, position[..., ::-1]), radius


def _place_group(rng, n: int, count: int):
    """`count` objects at least 2.5 pixels apart, by rejection: all scenes still unsettled are drawn again at once."""
    centre, radius = np.zeros((n, count, 2)), np.zeros((n, count))
    todo = np.arange(n)
    while len(todo):
        r = _uniform(rng, np.full((len(todo), 1), 3.5), 5.5).repeat(count, 1)  # one size a scene
        c = _uniform(rng, r[..., None] + 1, SIZE - 1 - r[..., None].repeat(2, -1))
        centre[todo], radius[todo] = c, r
        apart = np.abs(c[:, :, None] - c[:, None]).max(-1)  # boxes, so that squares keep their distance too
        clear = (apart >= r[:, :, None] + r[:, None] + 2.5) | np.eye(count, dtype=bool)
        todo = todo[~clear.all((1, 2))]
    return centre, radius


def layouts(prompts: list[str], rng: np.random.Generator) -> Layout:
    """A random layout for each prompt, in which every fact of the prompt holds."""
    scenes = [parse(prompt) for prompt in prompts]
    n = len(scenes)
    centre, radius = np.full((n, MAX_OBJECTS, 2), SIZE / 2), np.zeros((n, MAX_OBJECTS))
    kinds = np.array([(0 if s.relation else len(s.objects)) for s in scenes], dtype=int)
    for code in (0, 1, 2, 3):
        rows = np.flatnonzero(kinds == code)
        count = code or 2
        if code == 0:
            axis, sign = np.array([RELATIONS[scenes[i].relation] for i in rows], dtype=int).reshape(-1, 2).T
            placed = _place_pair(rng, len(rows), axis, sign)
        else:
            placed = _place_single(rng, len(rows)) if code == 1 else _place_group(rng, len(rows), count)
        centre[rows, :count], radius[rows, :count] = placed
    kinds_of = np.zeros((n, MAX_OBJECTS, 2), dtype=int)
    for row, scene in enumerate(scenes):
        kinds_of[row, : len(scene.objects)] = scene.objects
    return Layout(
        torch.from_numpy(kinds_of[..., 0]),
        torch.from_numpy(kinds_of[..., 1]),
        torch.from_numpy(centre).float(),
        torch.from_numpy(radius).float(),
    )


def _rng(generator: torch.Generator | None) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def render_scenes(prompts: list[str], generator: torch.Generator | None = None) -> Float[Tensor, "batch 3 h w"]:
    """Pictures in [0, 1] of what each prompt says, at random places and sizes. The generator lives on the CPU."""
    return draw(layouts(prompts, _rng(generator)))


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Objects(NamedTuple):
    """Objects found in a batch of pictures, one row each; `colour` and `shape` are UNKNOWN (-1) where neither fits."""

    image: Int[Tensor, "n"]
    colour: Int[Tensor, "n"]
    shape: Int[Tensor, "n"]
    centre: Float[Tensor, "n 2"]


def inks(
    samples: Float[Tensor, "batch 3 h w"],
) -> tuple[Float[Tensor, "batch inks h w"], Bool[Tensor, "batch planes h w"]]:
    """How much of each pixel each ink covers, and the pixels that belong to it; fifth plane: a foreign colour.

    An anti-aliased edge lies on the straight line from paper to ink, so each pixel goes to the nearest such line, not
    to the nearest ink (the edge of a red circle is as near to yellow as to red), and counts from half-way along.
    """
    paper = samples.new_tensor(PAPER)[:, None, None]
    lines = samples.new_tensor(list(COLOURS.values())) - samples.new_tensor(PAPER)
    length = lines.square().sum(1)[:, None, None]
    offset = samples - paper
    dot = torch.einsum("bchw,kc->bkhw", offset, lines)
    cover = (dot / length).clamp(0, 1)
    # |offset - cover * line|^2, written out so as not to hold a (batch, inks, 3, h, w) tensor
    distance = offset.square().sum(1, keepdim=True) - 2 * cover * dot + cover.square() * length
    least, nearest = distance.min(1, keepdim=True)
    stray = least > STRAY**2
    own = nearest == torch.arange(len(COLOURS))[:, None, None]
    return cover, torch.cat([own & (cover >= 0.5) & ~stray, stray], dim=1)


def read_objects(samples: Float[Tensor, "batch 3 h w"]) -> Objects:
    """All objects in the pictures: components of one ink (8-connected), of at least MIN_AREA pixels.

    The shape is the one whose ideal picture, with the component's own centre of mass and area, overlaps it best;
    UNKNOWN below MIN_OVERLAP, so that blobs, rings, ellipses and fragments are no circles.
    """
    from scipy import ndimage

    cover, masks = inks(samples.detach().float().cpu())
    image, plane = masks.any(-1).any(-1).nonzero(as_tuple=True)
    if len(image) == 0:
        return Objects(image, plane, plane, torch.zeros(0, 2))
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True  # connects pixels, never pictures or inks: one call for the whole batch
    labels, n = ndimage.label(masks[image, plane].numpy(), structure)
    area = torch.from_numpy(np.bincount(labels.ravel(), minlength=n + 1)[1:])
    slices = ndimage.find_objects(labels)
    row = torch.tensor([where[0].start for where in slices], dtype=torch.long)
    number = torch.arange(1, n + 1)
    keep = area >= MIN_AREA
    if not keep.any():  # specks alone
        return Objects(image[:0], plane[:0], plane[:0], torch.zeros(0, 2))
    row, number = row[keep], number[keep]
    image, plane = image[row], plane[row]
    foreign = plane == len(COLOURS)
    component = (torch.from_numpy(labels)[row] == number[:, None, None]).float()
    halo = torch.nn.functional.max_pool2d(component, 3, stride=1, padding=1)  # the soft edge belongs to it
    soft = torch.where(foreign[:, None, None], component, halo * cover[image, plane.clamp(max=len(COLOURS) - 1)])
    shape, centre = _best_shape(soft)
    return Objects(image, plane.masked_fill(foreign, UNKNOWN), shape.masked_fill(foreign, UNKNOWN), centre)


def _best_shape(soft: Float[Tensor, "n h w"]) -> tuple[Int[Tensor, "n"], Float[Tensor, "n 2"]]:
    """Best matching shape of each component, and its centre of mass (x, y)."""
    area = soft.sum((1, 2)).clamp(min=1)
    grid = torch.arange(SIZE) + 0.5
    mass = torch.stack([(soft.sum(1) * grid).sum(1), (soft.sum(2) * grid).sum(1)], dim=1) / area[:, None]
    radius = torch.stack([(area / torch.pi).sqrt(), area.sqrt() / 2, (area / 3**0.5).sqrt()])
    overlaps = []
    for k, name in enumerate(SHAPES):
        half = _half_box(torch.full_like(area, k, dtype=torch.long), radius[k])
        up = half.new_tensor((0, 1 / 3 if name == "triangle" else 0))  # centre of mass to middle of the box, in halves
        ideal = (_depth(k, mass - half * up, half) + 0.5).clamp(0, 1)
        overlaps.append(torch.minimum(ideal, soft).sum((1, 2)) / torch.maximum(ideal, soft).sum((1, 2)))
    best = torch.stack(overlaps).max(0)
    return best.indices.masked_fill(best.values < MIN_OVERLAP, UNKNOWN), mass


# ---- rewards ---------------------------------------------------------------------------------------------------------


def facts(samples: Tensor, prompts: Sequence) -> list[dict[str, bool]]:
    """Which facts of its prompt hold in each picture: each colour, each coloured shape, the number, the relation.

    The relation is two facts, the side and that it prevails ("above": higher, and more above than beside); it is read
    from centres of mass, of the right shapes where they exist, else of anything in the two colours, so that a picture
    with one wrong shape can still be praised for its composition. A prompt outside the grammar raises ValueError.
    """
    scenes = [parse(prompt) for prompt in prompts]
    if tuple(samples.shape) != (len(scenes), 3, SIZE, SIZE):
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}; for {len(scenes)} prompts the oracle of 'shapes' expected "
            f"({len(scenes)}, 3, {SIZE}, {SIZE}), images in [0, 1]."
        )
    objects = read_objects(samples)
    found: list[list] = [[] for _ in scenes]
    columns = (objects.image, objects.colour, objects.shape, objects.centre)
    for image, colour, shape, centre in zip(*(column.tolist() for column in columns), strict=True):
        found[image].append((colour, shape, centre))
    return [_facts(scene, mine) for scene, mine in zip(scenes, found, strict=True)]


def _facts(scene: Scene, found: list[tuple[int, int, list[float]]]) -> dict[str, bool]:
    colours, held = list(COLOURS), {}
    wanted_colours, found_colours = Counter(c for c, _ in scene.objects), Counter(c for c, _, _ in found)
    wanted_kinds, found_kinds = Counter(scene.objects), Counter((c, s) for c, s, _ in found)
    for colour, n in wanted_colours.items():
        held |= {f"{colours[colour]} object {i + 1}": found_colours[colour] > i for i in range(n)}
    for (colour, shape), n in wanted_kinds.items():
        held |= {f"{colours[colour]} {SHAPES[shape]} {i + 1}": found_kinds[colour, shape] > i for i in range(n)}
    held[f"{len(scene.objects)} in all"] = len(found) == len(scene.objects)
    if scene.relation:
        axis, sign = RELATIONS[scene.relation]
        first, second = (_centre(kind, found) for kind in scene.objects)
        there = first is not None and second is not None
        apart = [a - b for a, b in zip(first, second, strict=True)] if there else [0.0, 0.0]
        held[scene.relation] = sign * apart[axis] > 0
        held[f"{scene.relation}, foremost"] = abs(apart[axis]) > abs(apart[1 - axis])
    return held


def _centre(kind: tuple[int, int], found: list[tuple[int, int, list[float]]]) -> list[float] | None:
    """Where the object of this kind is, else the first of its colour, else None."""
    same_colour = [entry for entry in found if entry[0] == kind[0]]
    exact = [entry for entry in same_colour if entry[1] == kind[1]]
    return (exact or same_colour)[0][2] if same_colour else None


def oracle(samples: Tensor, prompts: Sequence) -> Float[Tensor, "batch"]:
    """1 where every fact of the prompt holds and nothing else is in the picture, else 0."""
    return torch.tensor([float(all(held.values())) for held in facts(samples, prompts)], device=samples.device)


def graded(samples: Tensor, prompts: Sequence) -> Float[Tensor, "batch"]:
    """Share of the prompt's facts that hold (`facts` lists them): 1 exactly where the oracle says 1."""
    shares = [sum(held.values()) / len(held) for held in facts(samples, prompts)]
    return torch.tensor(shares, dtype=torch.float32, device=samples.device)


# ---- the world -------------------------------------------------------------------------------------------------------

# the model's name: its folder of weights, its pipeline, its sampler if nothing is said
MODELS = {
    "diffusion": ("shapes", "StableDiffusionPipeline", dict(num_steps=8, guidance_scale=1.0)),
    "consistency": ("shapes_lcm", "LatentConsistencyModelPipeline", dict(num_steps=4, guidance_scale=2.5)),
}
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
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r} of world 'shapes'. There are: {', '.join(MODELS)}.")
    name, pipeline_class, _ = MODELS[model]
    folder = WEIGHTS / name if folder is None else Path(folder)
    check_weights(folder, name)
    with quietly():
        import diffusers

        pipe = getattr(diffusers, pipeline_class).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_scorer(folder: str | Path | None = None) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The contrastive scorer as a reward: cosine of picture and prompt, differentiable in the picture.

    A proxy: it can be fooled, and it knows little about relations.
    """
    from transformers import AutoTokenizer, CLIPModel

    folder = (WEIGHTS / "shapes" if folder is None else Path(folder)) / "scorer"
    with quietly():
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return clip_scorer(model, tokenizer, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(kw_only=True)
class ShapesWorld(World):
    """`facts(samples, prompts)`: which facts of each prompt hold; `prompts_of` kind ("single", "relation", "count")."""

    facts: Callable[..., Any]
    prompts_of: dict[str, list[str]]


def _policy(
    model: str, folder: str | Path | None = None, eta: float = 1.0, **given: float | int
) -> DiffusionPolicy | ConsistencyPolicy:
    pipe = load_pipeline(folder, model)
    settings = MODELS[model][2] | given
    if model == "diffusion":
        return DiffusionPolicy.from_pipeline(pipe, eta=eta, **settings)
    return ConsistencyPolicy.from_pipeline(pipe, **settings)


def load(
    *,
    model: str = "diffusion",
    num_steps: int | None = None,
    eta: float = 1.0,
    guidance_scale: float | None = None,
    folder: str | Path | None = None,
) -> ShapesWorld:
    """The world of shapes, on the CPU, with the base model shipped or in `folder`.

    model "diffusion": 8 steps, no guidance, if nothing else is said. "consistency": the twin, 4 calls, the guidance 2.5
    that was distilled into it, no eta. The settings are those of `world.policy`; `world.policies` has the other model
    as it was shipped. `prompts` are eight relation prompts; sixteen others are held out.
    """
    given = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    policy = _policy(model, folder, eta, **{name: value for name, value in given.items() if value is not None})
    scorer = load_scorer(folder if model == "diffusion" else None)
    others = {kind: functools.partial(_policy, kind) for kind in MODELS if kind != model}
    return ShapesWorld(
        name="shapes",
        policies={model: lambda: policy, **others},
        prompts=list(PROMPTS),
        rewards={"graded": graded, "oracle": oracle, "scorer": scorer},
        default_reward="oracle",
        oracle=oracle,
        real=real,
        show=show,
        held_out=held_out_prompts(),
        facts=facts,
        prompts_of={kind: list(all_prompts(kind)) for kind in KINDS},
    )
