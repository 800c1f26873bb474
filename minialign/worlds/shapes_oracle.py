"""The oracle of the world `shapes`: it reads the objects from the pixels, and checks the facts of the prompt.

read_objects      pictures -> objects: palette map, connected components, best matching ideal shape
facts             which facts of its prompt hold in each picture
oracle, graded    all of them (0 or 1); their share
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minialign.worlds.shapes_scenes import COLOURS, PAPER, RELATIONS, SHAPES, SIZE, Scene, depth, half_box, parse

MIN_AREA = 4  # pixels; smaller specks are no objects
MIN_OVERLAP = 0.85  # intersection over union with the ideal shape of that place and area; below it: unknown
STRAY = 0.18  # distance (RGB) from paper and from every paper-to-ink line at which a pixel has a fifth, foreign colour
UNKNOWN = -1


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
        half = half_box(torch.full_like(area, k, dtype=torch.long), radius[k])
        up = half.new_tensor((0, 1 / 3 if name == "triangle" else 0))  # centre of mass to middle of the box, in halves
        ideal = (depth(k, mass - half * up, half) + 0.5).clamp(0, 1)
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
