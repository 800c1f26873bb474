"""Samples as pictures: a grid, and a denoising run from noise to data."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minialign.show.canvas import (
    COLORS,
    FAINT,
    GAP,
    QUIET,
    RIGHT,
    SMALL_SIZE,
    TITLE_SIZE,
    WRONG,
    Numbers,
    canvas,
    same_length,
    style,
    text_width,
    wrap,
    write,
)


def to_array(images: Tensor | np.ndarray) -> np.ndarray:
    """(n, C, h, w) in [0, 1] -> (n, h, w, 3), float32 on the host; nan becomes magenta, so that nobody misses it."""
    images = torch.as_tensor(images).detach().float().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images of shape (n, 1 or 3, h, w) in [0, 1]; got {tuple(images.shape)}.")
    images = images.expand(-1, 3, -1, -1).movedim(1, -1)
    broken = images.isnan().any(-1, keepdim=True)
    return torch.where(broken, torch.tensor([1.0, 0.0, 1.0]), images.clamp(0, 1)).numpy()


def draw_image(ax, image: np.ndarray, x: float, y: float, good: bool | None = None) -> None:
    """One picture in the cell at (x, y), enlarged without blurring; right and wrong differ in colour and badge."""
    from matplotlib.patches import Circle, Rectangle

    ax.imshow(image, extent=(x, x + 1, y + 1, y), interpolation="nearest", aspect="equal", zorder=1)
    color, width = (FAINT, 1.0) if good is None else (RIGHT if good else WRONG, 3.2)
    ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=width, joinstyle="round", zorder=2))
    if good is None:
        return
    center, radius = (x + 0.97, y + 0.03), 0.115
    ax.add_patch(Circle(center, radius, facecolor=color, edgecolor="white", linewidth=1.4, zorder=3, clip_on=False))
    tick, cross = [[(-0.5, 0.05), (-0.12, 0.42), (0.5, -0.4)]], [[(-0.4, -0.4), (0.4, 0.4)], [(-0.4, 0.4), (0.4, -0.4)]]
    for stroke in tick if good else cross:
        points = np.array(stroke) * radius + np.array(center)
        ax.plot(*points.T, color="white", linewidth=1.9, solid_capstyle="round", solid_joinstyle="round", zorder=4)


def row_label(ax, y: float, width: float, inches: float, prompt: str, tally: str = "") -> None:
    """The prompt, right-aligned and vertically centred beside its row, and a quiet second line."""
    wrapped = wrap(prompt, (width - 0.4) * inches, 13.5)
    height = (13.5 * len(wrapped) + (SMALL_SIZE + 3 if tally else 0)) * 1.22 / 72 / inches
    y = write(ax, width - 0.22, y + 0.5 - height / 2, wrapped, 13.5, inches, ha="right")
    write(ax, width - 0.22, y + 0.05, [tally], SMALL_SIZE, inches, ha="right", color=QUIET)


def image_grid(
    images: Tensor,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    title: str | None = None,
    good: Numbers | None = None,
    scale: float | int = 1.0,
    ax=None,
):
    """Images (n, C, h, w) in [0, 1], side by side. `good`, one bool an image, frames and ticks them. -> Figure

    Without `columns`, as many as make the grid about twice as wide as high. A cell is 1.1 inches wide, times `scale`.
    """
    pixels = to_array(images)
    same_length(len(pixels), "images", captions=captions, good=good)
    if len(pixels) == 0:
        raise ValueError("there are no images to show.")
    columns = columns or min(len(pixels), max(4, math.ceil(math.sqrt(2 * len(pixels)))))
    columns = min(columns, len(pixels))
    inches = scale * (1.1 if captions is None else 1.45)
    wrapped = None if captions is None else [wrap(str(text), inches, SMALL_SIZE) for text in captions]
    below = 0.06 + SMALL_SIZE * 1.22 / 72 / inches * max(map(len, wrapped)) if wrapped else 0.0
    above = 0.2 + TITLE_SIZE * 1.3 / 72 / inches if title else 0.2
    rows = math.ceil(len(pixels) / columns)
    width = 0.4 + max(columns + GAP * (columns - 1), text_width(title, TITLE_SIZE, inches))
    height = above + rows * (1 + below) + GAP * (rows - 1) + 0.2
    with style():
        ax = canvas(ax, width, height, title or f"{len(pixels)} images", inches)
        if title:
            ax.text(0.2, 0.12, title, fontsize=TITLE_SIZE, va="top", weight="bold")
        for i, image in enumerate(pixels):
            x, y = 0.2 + (i % columns) * (1 + GAP), above + (i // columns) * (1 + below + GAP)
            draw_image(ax, image, x, y, None if good is None else bool(good[i]))
            if wrapped:
                write(ax, x + 0.5, y + 1.06, wrapped[i], SMALL_SIZE, inches, ha="center")
    return ax.figure


def film_strip(
    frames: Tensor,
    timesteps: Numbers | None = None,
    captions: Sequence[str] | None = None,
    columns: int = 9,
    title: str | None = None,
    good: Numbers | None = None,
    limits: float | int | None = None,
    ax=None,
):
    """A denoising run from noise (left) to data (right), one row a sample. -> Figure

    frames: images (steps, n, C, h, w) in [0, 1] or (steps, C, h, w) for a single run, or point clouds (steps, n, 2), of
    which each frame is one picture. At most `columns` frames are shown, evenly spaced, the first and last among them.
    `timesteps`, one a frame, label them; `good`, one a row, ticks the last frame; `limits`: points within +- limits.
    """
    frames = torch.as_tensor(frames).detach().float().cpu()
    points = frames.ndim == 3 and frames.shape[-1] == 2
    if frames.ndim == 4 or points:
        frames = frames.unsqueeze(1)
    if frames.ndim not in (4, 5) or len(frames) == 0:
        raise ValueError(f"expected (steps, n, C, h, w), (steps, C, h, w) or (steps, n, 2); got {tuple(frames.shape)}.")
    num_rows = frames.shape[1]
    same_length(len(frames), "frames", timesteps=timesteps)
    same_length(num_rows, "rows", captions=captions, good=good)
    chosen = sorted(set(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int).tolist()))
    inches, left = 1.05, (2.4 if captions is not None else 0.2)
    above = (0.5 if title else 0.15) + (0.2 if timesteps is not None else 0.0)
    width = max(left + len(chosen) * (1 + GAP) + 0.15, 0.4 + text_width(title, TITLE_SIZE, inches))
    height = above + num_rows * (1 + GAP) + 0.42
    if points and limits is None:
        limits = 1.15 * frames[-1].abs().max().item()
    with style():
        ax = canvas(ax, width, height, title or f"{num_rows} denoising runs, from noise to data", inches)
        if title:
            ax.text(0.2, 0.12, title, fontsize=TITLE_SIZE, va="top", weight="bold")
        for column, frame in enumerate(chosen):
            x = left + column * (1 + GAP)
            if timesteps is not None:
                write(ax, x + 0.5, above - 0.25, [f"t = {int(timesteps[frame])}"], SMALL_SIZE, inches, ha="center")
            for row in range(num_rows):
                y, last = above + row * (1 + GAP), column == len(chosen) - 1
                if points:
                    _draw_points(ax, frames[frame, row].numpy(), x, y, limits)
                else:
                    verdict = bool(good[row]) if good is not None and last else None
                    draw_image(ax, to_array(frames[frame, row][None])[0], x, y, verdict)
        for row, caption in enumerate(captions or ()):
            row_label(ax, above + row * (1 + GAP), left, inches, str(caption))
        _arrow(ax, left, left + len(chosen) * (1 + GAP) - GAP, height - 0.24)
    return ax.figure


def _draw_points(ax, points: np.ndarray, x: float, y: float, limits: float) -> None:
    from matplotlib.patches import Rectangle

    inside = points[(np.abs(points) < limits).all(1)]
    places = (inside / limits * np.array([1, -1]) + 1) / 2 + np.array([x, y])  # the canvas counts y downwards
    ax.scatter(*places.T, s=3.0, color=COLORS[0], alpha=0.5, linewidths=0, zorder=2, rasterized=True)
    ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=FAINT, linewidth=1.0))


def _arrow(ax, start: float, end: float, y: float) -> None:
    ax.annotate(
        "", (end - 0.5, y), (start + 0.58, y), arrowprops={"arrowstyle": "-|>", "color": QUIET, "linewidth": 1.2}
    )
    ax.text(start, y, "noise", fontsize=SMALL_SIZE, va="center", color=QUIET)
    ax.text(end, y, "data", fontsize=SMALL_SIZE, va="center", ha="right", color=QUIET)
