"""A subject for the world `shapes`: a disc with a red upper and a yellow lower half, of which four pictures are given.

The base draws one colour an object and has never seen it. Its word is "w", a token that the text encoder knows and that
means nothing: to "a w circle above a blue square" the base draws some circle above a blue square.

    S_I    how much what is red or yellow in a picture is like that in the references: features of the oracle's inks
    S_T    share of three facts: an object of the named colour, of the named shape, and all else where it should be
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.subjects import SubjectTask
from minialign.worlds.shapes_oracle import inks, read_objects
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


def features(samples: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3"]:
    """(share of red, x and y from the centre of red to that of yellow in sides of their area) of what has these inks.

    The subject: (1/2, 0, 0.48). One colour alone: (0 or 1, 0, 0). Neither: far from all, as is what fills the picture.
    """
    planes = inks(samples.detach().float().cpu())[1].float()
    red, yellow = (planes[:, list(COLOURS).index(name)] for name in (UPPER, LOWER))
    area = torch.stack([red.sum((1, 2)), yellow.sum((1, 2))])
    total = area.sum(0)
    grid = torch.arange(SIZE) + 0.5
    centre = torch.stack([torch.stack([(p.sum(1) * grid).sum(1), (p.sum(2) * grid).sum(1)], 1) for p in (red, yellow)])
    centre = centre / area.clamp_min(1)[..., None]
    both = (area > 0).all(0)
    offset = (centre[1] - centre[0]) / total.clamp_min(1).sqrt()[:, None] * both[:, None]
    share = torch.where(total > 0, area[0] / total.clamp_min(1), 5.0)
    return torch.cat([share[:, None], offset], 1)


def image_similarity_to(pictures: Float[Tensor, "r 3 h w"]):
    """S_I: mean over the references of exp(-|features - theirs|^2 / WIDTH)."""
    known = features(pictures)

    def image_similarity(samples: Float[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "n"]:
        distance = (features(samples)[:, None] - known).square().sum(-1)
        return (-distance / WIDTH).exp().mean(1).to(samples.device)

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
