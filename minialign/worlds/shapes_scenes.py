"""Scenes of the world `shapes`: what its prompts may say, and how a scene that fits them is drawn.

parse, all_prompts, grammar    the prompts, and the scene that each describes
layouts, draw                  where its objects stand, at random; their pixels, anti-aliased by coverage
render_scenes                  both
"""

import difflib
import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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


def depth(shape: int, centre: Float[Tensor, "n 2"], half: Float[Tensor, "n 2"]) -> Float[Tensor, "n h w"]:
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


def coverage(
    shape: Int[Tensor, "n"], centre: Float[Tensor, "n 2"], half: Float[Tensor, "n 2"]
) -> Float[Tensor, "n h w"]:
    """Share of each pixel inside a shape: the depth, cut off half a pixel to either side of the edge."""
    out = centre.new_zeros(len(shape), SIZE, SIZE)
    for k in range(len(SHAPES)):
        rows = (shape == k).nonzero().squeeze(1)
        out[rows] = (depth(k, centre[rows], half[rows]) + 0.5).clamp(0, 1)
    return out


class Layout(NamedTuple):
    """Where the objects of a batch stand, in pixels, padded to MAX_OBJECTS; `radius`: half the width, 0: absent."""

    colour: Int[Tensor, "batch objects"]
    shape: Int[Tensor, "batch objects"]
    centre: Float[Tensor, "batch objects 2"]
    radius: Float[Tensor, "batch objects"]


def half_box(shape: Int[Tensor, "*n"], radius: Float[Tensor, "*n"]) -> Float[Tensor, "*n 2"]:
    return torch.stack([radius, torch.where(shape == 2, radius * TRIANGLE_HEIGHT, radius)], dim=-1)


def draw(layout: Layout) -> Float[Tensor, "batch 3 h w"]:
    """Paint the objects on the paper, later ones over earlier ones."""
    images = torch.tensor(PAPER).reshape(1, 3, 1, 1).repeat(len(layout.colour), 1, SIZE, SIZE)
    inks = torch.tensor(list(COLOURS.values()))
    for k in range(layout.colour.shape[1]):
        radius = layout.radius[:, k]
        half = half_box(layout.shape[:, k], radius.clamp(min=1e-3))
        alpha = coverage(layout.shape[:, k], layout.centre[:, k], half)[:, None] * (radius > 0)[:, None, None, None]
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
