"""A subject for the world `shapes`: a disc with a red upper and a yellow lower half, of which four pictures are given.

The base draws one colour an object and has never seen it. Its word is "w", a token that the text encoder knows and that
means nothing: to "a w circle above a blue square" the base draws some circle above a blue square.

    S_I    how much some connected piece of red or yellow is like the references: features of the oracle's inks
    S_T    share of three facts: an object of the named colour, of the named shape, and all else where it should be
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.subjects import SubjectTask
from minialign.worlds.shapes_oracle import MIN_AREA, inks, read_objects
from minialign.worlds.shapes_scenes import COLOURS, PAPER, RELATIONS, SHAPES, SIZE, coverage

TOKEN = "w"
NOUN = "circle"
UPPER, LOWER = "red", "yellow"
REFERENCE_PROMPT = f"a {TOKEN} {NOUN}"
PROMPTS = (
    "above a blue square", "below a blue triangle", "left of a green square", "right of a green triangle",
    "above a green triangle", "below a green square", "left of a blue triangle", "right of a blue square",
)  # fmt: skip
TEST_PROMPTS = (
    "above a green square", "below a green triangle", "left of a blue square", "right of a blue triangle"
)  # fmt: skip
WIDTH = 0.2  # of S_I, in squared feature units: a disc of one colour is 0.48 away


def draw_subject(centre: Float[Tensor, "n 2"], radius: Float[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """The two-coloured disc on the paper, anti-aliased; centres and radii in pixels."""
    half = radius[:, None].expand(-1, 2)
    disc = coverage(torch.full((len(radius),), SHAPES.index("circle")), centre, half)[:, None]
    rows = torch.arange(SIZE, dtype=centre.dtype) + 0.5
    upper = (centre[:, 1, None] - rows[None] + 0.5).clamp(0, 1)[:, None, :, None]
    red, yellow, paper = (torch.tensor(c).view(1, 3, 1, 1) for c in (COLOURS[UPPER], COLOURS[LOWER], PAPER))
    return paper + disc * (upper * red + (1 - upper) * yellow - paper)


def references(n: int = 4, generator: torch.Generator | None = None) -> Float[Tensor, "n 3 h w"]:
    """Pictures of the subject alone, at random places and sizes."""
    radius = 5 + 2 * torch.rand(n, generator=generator)
    room = SIZE / 2 - radius - 1
    centre = SIZE / 2 + room[:, None] * (2 * torch.rand(n, 2, generator=generator) - 1)
    return draw_subject(centre, radius)


def features(samples: Float[Tensor, "n 3 h w"]) -> tuple[Int[Tensor, "k"], Float[Tensor, "k 3"]]:
    """(picture, features) of every connected piece of red or yellow: share of red, and x and y from the centre of the
    red to that of the yellow part, in sides of a square of the piece's area.

    The subject: (1/2, 0, 0.48). A piece of one colour: (0 or 1, 0, 0).
    """
    from scipy import ndimage

    planes = inks(samples.detach().float().cpu())[1]
    red, yellow = (planes[:, list(COLOURS).index(name)] for name in (UPPER, LOWER))
    both_and_between = red | yellow | planes[:, len(COLOURS)]  # where they meet, a decoder's pixels are neither
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True  # connects pixels, never pictures
    labels, count = ndimage.label(both_and_between.numpy(), structure)
    area = np.bincount(labels[(red | yellow).numpy()], minlength=count + 1)
    pieces = [i for i in range(1, count + 1) if area[i] >= MIN_AREA]
    where = ndimage.find_objects(labels)
    image = torch.tensor([where[i - 1][0].start for i in pieces], dtype=torch.long)
    piece = torch.from_numpy(labels)[image] == torch.tensor(pieces).view(-1, 1, 1)
    grid, parts = torch.arange(SIZE) + 0.5, torch.stack([red[image] & piece, yellow[image] & piece]).float()
    size = parts.sum((2, 3))
    centre = torch.stack([(parts.sum(2) * grid).sum(-1), (parts.sum(3) * grid).sum(-1)], -1)
    centre = centre / size.clamp_min(1)[..., None]
    total, both = size.sum(0), (size > 0).all(0)
    offset = (centre[1] - centre[0]) * both[:, None] / total.sqrt()[:, None]
    return image, torch.cat([(size[0] / total)[:, None], offset], 1)


def image_similarity_to(pictures: Float[Tensor, "r 3 h w"]):
    """S_I: exp(-|features - theirs|^2 / WIDTH), mean over the references, of the piece that is most like them; or 0."""
    known = features(pictures)[1]

    def image_similarity(samples: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "n"]:
        image, found = features(samples)
        likeness = (-(found[:, None] - known).square().sum(-1) / WIDTH).exp().mean(1)
        best = torch.zeros(len(samples)).scatter_reduce(0, image, likeness, "amax")
        return best.to(samples.device)

    return image_similarity


def text_similarity(samples: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "n"]:
    """S_T: share of the facts of "a circle RELATION a COLOUR SHAPE": that colour, that shape, all other inks there.

    1 where the prompt names nothing else. "There": the centre of what has another ink lies to the named side of the
    named object's, and more so than to another side.
    """
    objects = read_objects(samples)
    masks = inks(samples.detach().float().cpu())[1][:, : len(COLOURS)].float()
    grid, scores = torch.arange(SIZE) + 0.5, []
    for row, prompt in enumerate(prompts):
        words = prompt.split()
        relation = next((name for name in RELATIONS if f" {name} " in prompt), None)
        if relation is None:
            scores.append(1.0)
            continue
        colour, shape = list(COLOURS).index(words[-2]), SHAPES.index(words[-1])
        found = (objects.image == row) & (objects.colour == colour)
        others = masks[row, [k for k in range(len(COLOURS)) if k != colour]].amax(0)
        held = [bool(found.any()), bool((found & (objects.shape == shape)).any()), False]
        if held[0] and others.sum() > 0:
            there = objects.centre[found].mean(0)
            centre = torch.stack([(others.sum(0) * grid).sum(), (others.sum(1) * grid).sum()]) / others.sum()
            axis, sign = RELATIONS[relation]
            apart = centre - there
            held[2] = bool(sign * apart[axis] > 0 and apart[axis].abs() > apart[1 - axis].abs())
        scores.append(sum(held) / 3)
    return torch.tensor(scores, device=samples.device)


def subject(seed: int = 0) -> SubjectTask:
    """Four pictures of the subject, eight training prompts, four others to judge with; seed draws the pictures."""
    pictures = references(4, torch.Generator().manual_seed(seed))
    train, test = ([f"{REFERENCE_PROMPT} {place}" for place in places] for places in (PROMPTS, TEST_PROMPTS))
    return SubjectTask(
        pictures, REFERENCE_PROMPT, train, [f"a {NOUN}"], test, (image_similarity_to(pictures), text_similarity), TOKEN
    )
