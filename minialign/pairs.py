"""Pairs of samples of which one is preferred: where they come from, and the file that keeps them.

    Pairs                  prompts, chosen, rejected; how much better, and who said so, where that is known
    draw_pairs             two samples a prompt from any policy, and a labeller's word on which is better
    by_reward              a labeller that never errs; bradley_terry: one that errs as people do
    by_segments            one that judges part by part
    relabel                the same pairs under another labeller (AI feedback)
    Pairs.from_images      a folder of images and a csv, what a person with real preferences has

A labeller is any callable labeller(first, second, prompts, generator) -> (preference (n,), strength (n,), (n, s) or
None): 1 where the first wins, 0 where the second, 1/2 for a tie, which is left out of the data; strength is by how much
the first is better, below 0 where it is worse. A reward model is a reward.
"""

import csv
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minialign.checkpoint import load_checkpoint, read_about, save_checkpoint
from minialign.kernels import preference_probability
from minialign.rewards import Reward, RewardError, checked
from minialign.settings import Count, Positive, demand

Labels = tuple[Tensor, Tensor | None]
Labeller = Callable[[Any, Any, Sequence[Hashable], torch.Generator | None], Labels]


@dataclass(frozen=True)
class Pairs:
    """chosen[i] won against rejected[i], both to prompts[i]. `pairs[rows]` selects, `len(pairs)` counts.

    chosen, rejected: what a policy trains on, states (n, *latent), or texts, a list. strengths (n,) or (n, segments):
    score of the chosen one - score of the other; where a labeller erred it is negative. labellers: a name a pair.
    Raises ValueError for parts that do not fit together.
    """

    prompts: list[Hashable]
    chosen: Tensor | list[str]
    rejected: Tensor | list[str]
    strengths: Tensor | None = None
    labellers: list[str] | None = None

    def __post_init__(self):
        sizes = {name: len(part) for name, part in vars(self).items() if part is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the parts of these pairs differ in length: {sizes}; expected one of each a pair.")
        if isinstance(self.chosen, Tensor) != isinstance(self.rejected, Tensor):
            raise ValueError("one of chosen and rejected is a tensor, the other is not; expected two of a kind.")
        if isinstance(self.chosen, Tensor) and self.chosen.shape != self.rejected.shape:
            shapes = f"{tuple(self.chosen.shape)} and {tuple(self.rejected.shape)}"
            raise ValueError(f"chosen and rejected have shapes {shapes}; expected one shape.")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Sequence[int] | Tensor | slice) -> "Pairs":
        index = torch.arange(len(self))[rows]
        chosen_rows = index.tolist()

        def part(values):
            if values is None:
                return None
            return values[index.to(values.device)] if isinstance(values, Tensor) else [values[i] for i in chosen_rows]

        return Pairs(*map(part, vars(self).values()))

    def swapped(self) -> "Pairs":
        """Every label turned round."""
        strengths = None if self.strengths is None else -self.strengths
        return Pairs(self.prompts, self.rejected, self.chosen, strengths, self.labellers)

    def check_finite(self) -> None:
        """Raises ValueError that counts the pairs with nan or inf."""
        if isinstance(self.chosen, Tensor):
            finite = [side.flatten(1).isfinite().all(1) for side in (self.chosen, self.rejected)]
            if broken := int((~(finite[0] & finite[1])).sum()):
                raise ValueError(f"{broken} of {len(self)} pairs hold nan or inf; leave them out: pairs[rows].")

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or absent: tensors, and as json in its header prompts, texts and labellers.

        Raises ValueError for prompts that json would not give back: they are strings or numbers.
        """
        for prompt in self.prompts:
            if not isinstance(prompt, str | int | float):
                raise ValueError(f"cannot save the prompt {prompt!r}; expected strings or numbers.")
        parts = {name: value for name, value in vars(self).items() if value is not None}
        tensors = {name: value.detach().clone() for name, value in parts.items() if isinstance(value, Tensor)}
        texts = {name: value for name, value in parts.items() if name not in tensors}
        # a file of tensors holds at least one
        save_checkpoint(tensors | {"count": torch.tensor(len(self))}, path, {"pairs": json.dumps(texts)})

    @classmethod
    def load(cls, path: str | Path) -> "Pairs":
        """What `save` wrote. Raises ValueError for another file."""
        about = read_about(path)
        if "pairs" not in about:
            raise ValueError(f"{path} holds no pairs: it was not written by Pairs.save.")
        tensors = load_checkpoint(path)
        tensors.pop("count")
        return cls(**json.loads(about["pairs"]), **tensors)

    @classmethod
    def from_images(
        cls, folder: str | Path, table: str = "pairs.csv", *, size: int | tuple[int, int] | None = None, encode=None
    ) -> "Pairs":
        """Images of a folder and a csv with columns prompt, image_0, image_1, label; strength and labeller if known.

        label: 1 where image_0 is better, 0 where image_1 is, .5 for a tie (left out). image_0, image_1: file names
        within the folder. size: pixels, (height, width) or one for both, to which all are cropped at the centre and
        scaled; needed where they differ. encode(images (k, 3, h, w) in [0, 1]) -> latents: a policy's states; pixels
        in [-1, 1] if None. Raises ValueError that names the line for what is missing or unreadable.
        """
        rows = _read_table(Path(folder) / table)
        first, second = ([_read_image(Path(folder), row, name, size) for row in rows] for name in IMAGES)
        shapes = {tuple(image.shape[1:]) for image in first + second}
        if len(shapes) > 1:
            raise ValueError(f"the images of {folder} have different sizes, {sorted(shapes)[:3]}; give size=.")
        encode = encode or (lambda images: 2 * images - 1)
        first, second = (
            torch.cat([encode(torch.stack(images[i : i + 64])).detach() for i in range(0, len(images), 64)])
            for images in (first, second)
        )
        labels = torch.tensor([row["label"] for row in rows])
        known = all(row.get("strength") not in (None, "") for row in rows)
        strengths = torch.tensor([float(row["strength"]) for row in rows]) if known else None
        strengths = None if strengths is None else torch.where(labels > 0.5, strengths, -strengths)
        labellers = [row["labeller"] for row in rows] if all(row.get("labeller") for row in rows) else None
        return arranged([row["prompt"] for row in rows], first, second, (labels, strengths), labellers)


IMAGES = ("image_0", "image_1")


def _read_table(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"there is no {path}: expected a csv with columns prompt, image_0, image_1, label.")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"prompt", *IMAGES, "label"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has {reader.fieldnames}.")
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        try:
            row["label"], row["line"] = float(row["label"]), number
        except (TypeError, ValueError):
            row["label"] = -1.0
        if row["label"] not in (0.0, 0.5, 1.0):
            raise ValueError(f"{path}, line {number}: the label is not 0, .5 or 1: 1 means that image_0 is better.")
        if row.get("strength") not in (None, ""):
            try:
                float(row["strength"])
            except ValueError:
                raise ValueError(f"{path}, line {number}: strength {row['strength']!r} is no number.") from None
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def _read_image(folder: Path, row: dict, column: str, size: int | tuple[int, int] | None) -> Tensor:
    from PIL import Image, ImageOps

    path = folder / str(row[column])
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise ValueError(f"line {row['line']}: {column} {str(path)!r} cannot be read ({error}).") from None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


# Labellers ------------------------------------------------------------------------------------------------------------


def by_reward(reward: Reward) -> Labeller:
    """Whoever has more of the reward wins; equal rewards tie. A deterministic label has no finite DPO optimum."""

    def label(first, second, prompts, generator=None) -> Labels:
        strength = checked(reward, first, prompts) - checked(reward, second, prompts)
        return (strength.sign() + 1) / 2, strength

    return label


def bradley_terry(reward: Reward, scale: float | int = 1.0, tie: float | int = 0.0) -> Labeller:
    """Drawn: the first wins with probability sigmoid(scale (r_1 - r_2)); tie: see `preference_probability`."""
    demand(Positive, scale=scale)

    def label(first, second, prompts, generator=None) -> Labels:
        strength = checked(reward, first, prompts) - checked(reward, second, prompts)
        wins, neither, _ = preference_probability(strength, scale, tie)
        drawn = torch.rand(strength.shape, generator=generator).to(strength)
        return torch.where(drawn < wins, 1.0, torch.where(drawn < wins + neither, 0.5, 0.0)), strength

    return label


def by_segments(reward: Callable[[Any, Sequence[Hashable]], Tensor]) -> Labeller:
    """reward(samples, prompts) -> (n, s), one a segment: the larger sum wins, strengths are kept segment by segment."""

    def label(first, second, prompts, generator=None) -> Labels:
        one, other = (torch.as_tensor(reward(samples, prompts)).float() for samples in (first, second))
        if one.ndim != 2 or one.shape != other.shape or len(one) != len(prompts):
            raise RewardError(f"the segments' rewards have shape {tuple(one.shape)}; expected ({len(prompts)}, s).")
        strength = one - other
        return (strength.sum(1).sign() + 1) / 2, strength

    return label


# Making them ----------------------------------------------------------------------------------------------------------


def arranged(
    prompts: list, first: Tensor | list, second: Tensor | list, labels: Labels, labellers: list[str] | None = None
) -> Pairs:
    """The better one of each pair first, and ties left out. Raises ValueError where nothing is left."""
    preference, strength = labels
    if preference.shape != (len(prompts),) or not torch.isin(preference.cpu(), torch.tensor([0.0, 0.5, 1.0])).all():
        raise ValueError(f"expected {len(prompts)} labels of 0, 1/2 or 1, got shape {tuple(preference.shape)}.")
    if (preference == 0.5).all():
        raise ValueError(
            f"all {len(prompts)} pairs are ties: nothing to learn from. Draw more, or ask another labeller."
        )
    pairs = Pairs(prompts, first, second, strength, labellers)
    won, lost = ((preference == value).nonzero().flatten().tolist() for value in (1, 0))
    sides = [pairs[won]] * bool(won) + [pairs[lost].swapped()] * bool(lost)
    order = torch.tensor(won + lost).argsort()
    return _joined(sides)[order]


def _joined(parts: Sequence[Pairs]) -> Pairs:
    """Pairs of the same kind, one after the other."""
    return Pairs(*map(_join, zip(*(vars(part).values() for part in parts), strict=True)))


def _join(parts: Sequence):
    if parts[0] is None:
        return None
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]


@torch.no_grad()
def draw_pairs(
    policy,
    labeller: Labeller,
    prompts: Sequence[Hashable],
    num_pairs: int,
    generator: torch.Generator | None = None,
    *,
    num_tokens: int | None = None,
    same_start: bool = False,
    rows_per_pass: int = 512,
) -> Pairs:
    """Two samples of `policy` for each of num_pairs prompts, drawn from `prompts`, and which of them is better.

    Ties are left out, so there may be fewer. chosen and rejected are the policy's states (latents), which the labeller
    sees decoded; of a LanguagePolicy texts of at most num_tokens. same_start: both from one first noise.
    """
    demand(Count, num_pairs=num_pairs, rows_per_pass=rows_per_pass)
    talks = hasattr(policy, "generate")
    if talks and num_tokens is None:
        raise ValueError("num_tokens is None; a LanguagePolicy needs to know how long its answers may be.")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    places = torch.randint(len(prompts), (num_pairs,), generator=generator)
    asked, parts = [prompts[i] for i in places.tolist()], []
    draw = _noise_by_row(policy, 2 * num_pairs, num_tokens, generator)
    for rows in torch.arange(num_pairs).split(rows_per_pass):
        here = [asked[i] for i in rows.tolist()]
        noise = [draw(rows), draw(rows + num_pairs)]
        if same_start:
            noise[1][:, 0] = noise[0][:, 0]
        first, second = (_sampled(policy, here, drawn, num_tokens) for drawn in noise)
        seen = (first, second) if talks else (policy.decode(first), policy.decode(second))
        parts.append((here, first, second, labeller(*seen, here, generator)))
    prompts, first, second, labels = zip(*parts, strict=True)
    preference, strength = (_join(part) for part in zip(*labels, strict=True))
    return arranged(_join(prompts), _join(first), _join(second), (preference, strength))


def _noise_by_row(policy, n: int, num_tokens: int | None, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """rows -> their part of draw_noise(n), which as a whole would be the number of steps times the data."""
    shape = (n,) if num_tokens is None else (n, num_tokens)
    again = torch.Generator()
    start = generator.get_state()
    policy.draw_noise(*shape, generator, rows=[])  # moves on as if all of it had been drawn

    def draw(rows: Tensor) -> Tensor:
        again.set_state(start)
        return policy.draw_noise(*shape, again, rows=rows)

    return draw


def _sampled(policy, prompts: list, noise: Tensor, num_tokens: int | None) -> Tensor | list[str]:
    if hasattr(policy, "generate"):
        return policy.generate(prompts, num_tokens, noise=noise).texts
    if hasattr(policy, "integrate"):  # a flow's own samples are those of its ODE
        return policy.integrate(noise[:, 0], policy.encode(prompts))
    return policy.rollout(prompts, noise, density=False).final


def relabel(
    pairs: Pairs, labeller: Labeller, generator: torch.Generator | None = None, decode: Callable = lambda states: states
) -> Pairs:
    """The same pairs under another labeller, in this order of pairs; ties are left out. decode: states to samples."""
    with torch.no_grad():
        labels = labeller(decode(pairs.chosen), decode(pairs.rejected), pairs.prompts, generator)
    return arranged(pairs.prompts, pairs.chosen, pairs.rejected, labels, pairs.labellers)
