"""Pictures: one visual language for the whole project.

    image_grid, before_after, film_strip   images (n, C, h, w) in [0, 1], grey or colour, or points (n, 2)
    point_cloud                            samples of the 2-D worlds
    curves, pareto                         numbers: with bands, baselines and units
    save                                   to a file, with a description in its metadata for those who cannot see it
    live, html                             whether a notebook server runs this kernel; a figure as an HTML element

Every function returns a matplotlib Figure and draws into `ax` instead when given one. Figures are white whatever the
notebook's theme, use colours that colour-blind readers tell apart, and never say anything by colour alone. They do not
touch pyplot's global state, and display themselves as the last expression of a notebook cell.
"""

import base64
import functools
import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Numbers = Sequence | Tensor | np.ndarray  # anything that becomes an array

INK, QUIET, FAINT = "#1f2430", "#69707d", "#d9dde3"
RIGHT, WRONG = "#00876c", "#d1495b"
# Dark enough for white paper, and apart in lightness as well as hue (after Okabe and Ito, 2008).
COLORS = ("#0b6fb8", "#d55e00", "#00876c", "#a23b8f", "#b8860b", "#3a3f4b", "#4db6e2", "#8c564b")
GAP = 0.1  # between cells, in cells
FONT_SIZE, TITLE_SIZE, SMALL_SIZE = 12.0, 15.0, 11.0
SERVERS = ("JPY_SESSION_NAME", "COLAB_RELEASE_TAG")  # set in kernels of JupyterLab and Notebook, of Colab


def style() -> AbstractContextManager:
    """The house style, as a context: `with show.style(): ...` makes your own matplotlib code look like ours."""
    import matplotlib as mpl

    return mpl.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": FONT_SIZE,
            "axes.titlesize": TITLE_SIZE,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 12,
            "axes.labelsize": FONT_SIZE,
            "xtick.labelsize": SMALL_SIZE,
            "ytick.labelsize": SMALL_SIZE,
            "legend.fontsize": SMALL_SIZE,
            "legend.frameon": False,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.h_pad": 0.12,  # inches, or titles touch the edge
            "figure.constrained_layout.w_pad": 0.08,
            "axes.facecolor": "white",
            "axes.edgecolor": QUIET,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "text.color": INK,
            "xtick.color": QUIET,
            "ytick.color": QUIET,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": FAINT,
            "grid.linewidth": 0.8,
            "lines.linewidth": 2.2,
            "lines.solid_capstyle": "round",
            "axes.prop_cycle": mpl.cycler(color=COLORS),
        }
    )


def save(fig, path: str | Path, description: str = "", dpi: int = 150) -> Path:
    """Write `fig` to .png or .svg; the description (else the figure's label) becomes its alternative text.

    The same figure always gives the same bytes: no date and no version is stored.
    """
    import matplotlib as mpl

    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"cannot save a figure as {path.suffix or 'a file without ending'!r}. There are: .png, .svg.")
    neutral = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with mpl.rc_context({"svg.hashsalt": "minialign"}):  # else an .svg names its parts at random
        fig.savefig(path, dpi=dpi, metadata={"Description": description or fig.get_label(), **neutral})
    return path


def live() -> bool:
    """Whether a person may be looking: this kernel belongs to a notebook server. MINIALIGN_LIVE=0 or =1 overrules."""
    wanted = os.environ.get("MINIALIGN_LIVE")
    return any(name in os.environ for name in SERVERS) if wanted is None else wanted != "0"


def html(fig) -> str:
    """The figure as an <img> that holds its picture and its label as alternative text."""
    data, size = _png(fig)
    alt, source = escape(size["alt"]), base64.b64encode(data).decode()
    return f'<img alt="{alt}" width="{size["width"]}" height="{size["height"]}" src="data:image/png;base64,{source}">'


def _png(fig) -> tuple[bytes, dict]:
    """(PNG, its width, height and alternative text as Jupyter's metadata)."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=144)
    # 256 colours make a notebook a third as large, and no eye sees it
    Image.open(buffer).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    width, height = (round(inches * 72 * 1.1) for inches in fig.get_size_inches())
    return small.getvalue(), {"width": width, "height": height, "alt": fig.get_label()}


@functools.cache
def _figure_class() -> type:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A Figure outside pyplot's registry that Jupyter shows sharply, once, with its label as alt text."""

        def _repr_mimebundle_(self, include=None, exclude=None):
            data, size = _png(self)
            bundle = {"image/png": data}
            if live():  # JupyterLab drops the alternative text of an image, and keeps that of an HTML element
                bundle["text/html"] = html(self)
            return bundle, {"image/png": size}

    return Picture


def figure(width: float, height: float, label: str):
    """An empty figure, width x height in inches; `label` is its alternative text. Use it within `style()`."""
    fig = _figure_class()(figsize=(width, height))
    fig.set_label(label)
    return fig


def _canvas(ax, width: float, height: float, label: str, inches: float):
    """A blank axes in units of cells, y downwards, width x height of them; a cell is `inches` wide in a new figure."""
    if ax is None:
        ax = figure(width * inches, height * inches, label).add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    return ax


def _plot(ax, width: float, height: float, label: str):
    """Axes for a plot, in a figure that makes room for labels by itself."""
    if ax is not None:
        return ax
    fig = figure(width, height, label)
    fig.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98))
    return fig.add_subplot()


# ---------------------------------------------------------------------------------------------- images


def _to_array(images: Tensor | np.ndarray) -> np.ndarray:
    """(n, C, h, w) in [0, 1] -> (n, h, w, 3), float32 on the host; nan becomes magenta, so that nobody misses it."""
    images = torch.as_tensor(images).detach().float().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images of shape (n, 1 or 3, h, w) in [0, 1]; got {tuple(images.shape)}.")
    images = images.expand(-1, 3, -1, -1).movedim(1, -1)
    broken = images.isnan().any(-1, keepdim=True)
    return torch.where(broken, torch.tensor([1.0, 0.0, 1.0]), images.clamp(0, 1)).numpy()


def _same_length(expected: int, of: str, **values) -> None:
    for name, value in values.items():
        if value is not None and len(value) != expected:
            raise ValueError(f"there are {expected} {of} but {len(value)} {name}.")


def _text_width(text: str | None, size: float, inches: float) -> float:
    """About how many cells a bold line takes: an average bold letter of DejaVu Sans is 0.68 of its size wide."""
    return len(text or "") * 0.68 * size / 72 / inches


def _wrap(text: str, inches: float, size: float) -> list[str]:
    """A caption in lines of about equal length that fit; an average letter of DejaVu Sans is 0.6 of its size wide."""
    most = max(6, int(inches * 72 / (0.6 * size)))
    lines = textwrap.wrap(text, most) or [""]
    even = textwrap.wrap(text, max(1, math.ceil(len(text) / len(lines)) + 3)) or [""]
    return even if len(even) == len(lines) and max(map(len, even)) <= most else lines


def _lines(ax, x: float, y: float, lines: Sequence[str], size: float, inches: float, **style) -> float:
    """Write lines downwards from y at an even pitch (matplotlib's varies) -> where the next would go."""
    pitch = size * 1.22 / 72 / inches
    for i, line in enumerate(lines):
        ax.text(x, y + (i + 0.78) * pitch, line, fontsize=size, va="baseline", **style)
    return y + len(lines) * pitch


def _draw_image(ax, image: np.ndarray, x: float, y: float, good: bool | None = None) -> None:
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
    pixels = _to_array(images)
    _same_length(len(pixels), "images", captions=captions, good=good)
    if len(pixels) == 0:
        raise ValueError("there are no images to show.")
    columns = columns or min(len(pixels), max(4, math.ceil(math.sqrt(2 * len(pixels)))))
    columns = min(columns, len(pixels))
    inches = scale * (1.1 if captions is None else 1.45)
    wrapped = None if captions is None else [_wrap(str(text), inches, SMALL_SIZE) for text in captions]
    below = 0.06 + SMALL_SIZE * 1.22 / 72 / inches * max(map(len, wrapped)) if wrapped else 0.0
    above = 0.2 + TITLE_SIZE * 1.3 / 72 / inches if title else 0.2
    rows = math.ceil(len(pixels) / columns)
    width = 0.4 + max(columns + GAP * (columns - 1), _text_width(title, TITLE_SIZE, inches))
    height = above + rows * (1 + below) + GAP * (rows - 1) + 0.2
    with style():
        ax = _canvas(ax, width, height, title or f"{len(pixels)} images", inches)
        if title:
            ax.text(0.2, 0.12, title, fontsize=TITLE_SIZE, va="top", weight="bold")
        for i, image in enumerate(pixels):
            x, y = 0.2 + (i % columns) * (1 + GAP), above + (i // columns) * (1 + below + GAP)
            _draw_image(ax, image, x, y, None if good is None else bool(good[i]))
            if wrapped:
                _lines(ax, x + 0.5, y + 1.06, wrapped[i], SMALL_SIZE, inches, ha="center")
    return ax.figure


def before_after(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    scores_before: Numbers,
    scores_after: Numbers,
    path: str | Path | None = None,
    *,
    rows: int = 6,
    columns: int = 4,
    labels: tuple[str, str] = ("before", "after"),
    score_name: str = "right",
    title: str | None = None,
):
    """What training did, prompt by prompt: the base model's samples on the left, the trained model's on the right.

    before, after (n, C, h, w), drawn for the same `prompts` (n), if possible from the same noise. Nothing is selected:
    each row shows the first `columns` samples of its prompt, in order; the shares count all n. Scores that are all 0
    or 1 become ticks and frames, others are printed beneath. With `path` it is saved, described in words. -> Figure
    """
    old, new = _to_array(before), _to_array(after)
    scores = [torch.as_tensor(s).detach().float().cpu() for s in (scores_before, scores_after)]
    _same_length(
        len(old), "samples in before", after=new, prompts=prompts, scores_before=scores[0], scores_after=scores[1]
    )
    groups = _rows_by_prompt(prompts)
    shown = dict(list(groups.items())[:rows])
    columns = min(columns, max(len(members) for members in shown.values()))
    binary = all(bool(((s == 0) | (s == 1)).all()) for s in scores)
    headings = [_heading(label, s, score_name, binary) for label, s in zip(labels, scores, strict=True)]
    inches, text, above = 1.0, 2.75, (1.05 if title else 0.62)
    block = max(columns + GAP * (columns - 1), *(_text_width(heading, TITLE_SIZE, inches) for heading in headings))
    starts, pitch = (text, text + block + 0.55), (1.2 if binary else 1.44)
    width = max(starts[1] + block + 0.25, 0.4 + _text_width(title, TITLE_SIZE + 2, inches))
    height = above + pitch * len(shown) + 0.2
    sides = f"{headings[0]} on the left, {headings[1]} on the right."
    description = f"{title + '. ' if title else ''}Samples for {len(shown)} prompts. {sides}"
    with style():
        ax = _canvas(None, width, height, description, inches)
        ax.text(0.2, 0.14, title or "", fontsize=TITLE_SIZE + 2, va="top", weight="bold")
        ax.plot([starts[1] - 0.27] * 2, [above, height - 0.4], color=FAINT, linewidth=1.5)
        for row, (prompt, members) in enumerate(shown.items()):
            tally = _tally(scores, members, score_name, binary)
            _row_label(ax, above + row * pitch, text, inches, prompt, tally)
        for start, heading, color, pixels, score in zip(
            starts, headings, (QUIET, INK), (old, new), scores, strict=True
        ):
            ax.text(start, above - 0.16, heading, fontsize=TITLE_SIZE, va="bottom", weight="bold", color=color)
            for row, members in enumerate(shown.values()):
                for column, index in enumerate(members[:columns]):
                    x, y = start + column * (1 + GAP), above + row * pitch
                    _draw_image(ax, pixels[index], x, y, bool(score[index]) if binary else None)
                    if not binary:
                        _lines(
                            ax, x + 0.5, y + 1.04, [f"{score[index]:.2f}"], SMALL_SIZE, inches, ha="center", color=QUIET
                        )
    if path is not None:
        save(ax.figure, path, description)
    return ax.figure


def before_after_texts(
    before: Sequence[str],
    after: Sequence[str],
    prompts: Sequence[str],
    scores_before: Numbers,
    scores_after: Numbers,
    path: str | Path | None = None,
    *,
    rows: int = 8,
    labels: tuple[str, str] = ("before", "after"),
    score_name: str = "score",
    title: str | None = None,
):
    """What training did, in sentences: the first answer to each of the first `rows` prompts, before and after.

    All n answers count for the means above the columns. With `path` it is saved, described in words. -> Figure
    """
    scores = [torch.as_tensor(s).detach().float().cpu() for s in (scores_before, scores_after)]
    _same_length(
        len(before), "texts in before", after=after, prompts=prompts, scores_before=scores[0], scores_after=scores[1]
    )
    first = [members[0] for members in list(_rows_by_prompt(prompts).values())[:rows]]
    left, column, pitch = 2.7, 4.3, 1.22 * FONT_SIZE / 72
    blocks = [[_wrap(side[i], column - 0.6, FONT_SIZE) for side in (before, after)] for i in first]
    heights = [max(map(len, pair)) * pitch + 0.22 for pair in blocks]
    above, width = 1.0 if title else 0.6, left + 2 * column + 0.2
    headings = [_heading(label, s, score_name, False) for label, s in zip(labels, scores, strict=True)]
    description = f"{title + '. ' if title else ''}Answers to {len(first)} prompts. {headings[0]}, {headings[1]}."
    with style():
        ax = _canvas(None, width, above + sum(heights) + 0.1, description, 1.0)
        ax.text(0.2, 0.14, title or "", fontsize=TITLE_SIZE, va="top", weight="bold")
        for side, (heading, color) in enumerate(zip(headings, (QUIET, INK), strict=True)):
            ax.text(left + side * column, above - 0.14, heading, fontsize=FONT_SIZE, weight="bold", color=color)
        y = above
        for i, pair, height in zip(first, blocks, heights, strict=True):
            ax.plot([0.2, width - 0.2], [y, y], color=FAINT, linewidth=1)
            _lines(ax, 0.2, y + 0.07, _wrap(prompts[i], left - 0.5, FONT_SIZE), FONT_SIZE, 1.0, color=QUIET)
            for side, (lines, score) in enumerate(zip(pair, scores, strict=True)):
                x = left + side * column
                _lines(ax, x, y + 0.07, lines, FONT_SIZE, 1.0)
                _lines(ax, x + column - 0.25, y + 0.07, [f"{score[i]:+.1f}"], FONT_SIZE, 1.0, ha="right", color=QUIET)
            y += height
    if path is not None:
        save(ax.figure, path, description)
    return ax.figure


def _rows_by_prompt(prompts: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return groups


def _heading(label: str, scores: Tensor, score_name: str, binary: bool) -> str:
    mean = scores.mean().item()
    return f"{label}: {mean:.0%} {score_name}" if binary else f"{label}: {score_name} {mean:.2f}"


def _tally(scores: Sequence[Tensor], members: Sequence[int], score_name: str, binary: bool) -> str:
    old, new = (s[list(members)] for s in scores)
    if binary:
        return f"{int(old.sum())} → {int(new.sum())} of {len(members)} {score_name}"
    return f"{old.mean():.2f} → {new.mean():.2f}"


def _row_label(ax, y: float, width: float, inches: float, prompt: str, tally: str = "") -> None:
    """The prompt, right-aligned and vertically centred beside its row, and a quiet second line."""
    wrapped = _wrap(prompt, (width - 0.4) * inches, 13.5)
    height = (13.5 * len(wrapped) + (SMALL_SIZE + 3 if tally else 0)) * 1.22 / 72 / inches
    y = _lines(ax, width - 0.22, y + 0.5 - height / 2, wrapped, 13.5, inches, ha="right")
    _lines(ax, width - 0.22, y + 0.05, [tally], SMALL_SIZE, inches, ha="right", color=QUIET)


# ---------------------------------------------------------------------------------------------- film strips


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
    _same_length(len(frames), "frames", timesteps=timesteps)
    _same_length(num_rows, "rows", captions=captions, good=good)
    chosen = sorted(set(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int).tolist()))
    inches, left = 1.05, (2.4 if captions is not None else 0.2)
    above = (0.5 if title else 0.15) + (0.2 if timesteps is not None else 0.0)
    width = max(left + len(chosen) * (1 + GAP) + 0.15, 0.4 + _text_width(title, TITLE_SIZE, inches))
    height = above + num_rows * (1 + GAP) + 0.42
    if points and limits is None:
        limits = 1.15 * frames[-1].abs().max().item()
    with style():
        ax = _canvas(ax, width, height, title or f"{num_rows} denoising runs, from noise to data", inches)
        if title:
            ax.text(0.2, 0.12, title, fontsize=TITLE_SIZE, va="top", weight="bold")
        for column, frame in enumerate(chosen):
            x = left + column * (1 + GAP)
            if timesteps is not None:
                _lines(ax, x + 0.5, above - 0.25, [f"t = {int(timesteps[frame])}"], SMALL_SIZE, inches, ha="center")
            for row in range(num_rows):
                y, last = above + row * (1 + GAP), column == len(chosen) - 1
                if points:
                    _draw_points(ax, frames[frame, row].numpy(), x, y, limits)
                else:
                    verdict = bool(good[row]) if good is not None and last else None
                    _draw_image(ax, _to_array(frames[frame, row][None])[0], x, y, verdict)
        for row, caption in enumerate(captions or ()):
            _row_label(ax, above + row * (1 + GAP), left, inches, str(caption))
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


def point_cloud(
    points: Tensor,
    prompts: Sequence[str] | None = None,
    title: str | None = None,
    limits: float | int | None = None,
    log_density=None,
    ax=None,
):
    """Samples (n, 2) of a 2-D world, one colour a prompt; `log_density((m, 2)) -> (m,)` shades the truth. -> Figure"""
    points = torch.as_tensor(points).detach().float().cpu()
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"expected points of shape (n, 2); got {tuple(points.shape)}.")
    groups = _rows_by_prompt(prompts) if prompts is not None else {"": list(range(len(points)))}
    limits = limits or 1.15 * points.abs().max().item()
    with style():
        ax = _plot(ax, 4.6, 4.6, title or f"{len(points)} samples in the plane")
        if log_density is not None:
            _shade(ax, log_density, limits)
        for (prompt, members), color in zip(groups.items(), COLORS * len(groups), strict=False):
            ax.scatter(
                *points[members].T, s=11, color=color, alpha=0.6, linewidths=0, label=prompt or None, rasterized=True
            )
        ax.set(xlim=(-limits, limits), ylim=(-limits, limits), aspect="equal", title=title or "")
        if len(groups) > 1:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=2.2, handletextpad=0.2)
    return ax.figure


def _shade(ax, log_density, limits: float) -> None:
    axis = torch.linspace(-limits, limits, 121)
    grid = torch.cartesian_prod(axis, axis)
    density = log_density(grid).exp().reshape(121, 121).T
    levels = density.max().item() * torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 1.0])
    ax.contourf(axis, axis, density, levels=levels.tolist(), cmap="Greys", vmin=0, vmax=2.2 * density.max().item())
    ax.grid(False)


# ---------------------------------------------------------------------------------------------- numbers


def curves(
    series: Mapping[str, Numbers],
    x: Numbers | None = None,
    xlabel: str = "iteration",
    ylabel: str = "",
    band: Mapping[str, Numbers] | float | None = 0.95,
    baseline: float | int | None = None,
    baseline_label: str = "base model",
    title: str | None = None,
    ax=None,
):
    """Curves over training, named at their right end. -> Figure

    A series is (points,), or (seeds, points): then its mean is drawn, with Student's t interval at level `band`. A
    tuple (x, series) brings its own x. For one-dimensional series `band` may map a name to its half-widths (points,).
    `baseline` is a dashed line. nan is a gap.
    """
    if not series:
        raise ValueError("there are no curves to draw.")
    with style():
        names = [*series, *([baseline_label] if baseline is not None else [])]
        margin = 0.65 * SMALL_SIZE / 72 * max(map(len, names))  # inches, for the names at the right
        ax = _plot(ax, 6.0 + margin, 4.2, title or f"{ylabel or 'value'} over {xlabel}")
        ends = []
        for (name, values), color in zip(series.items(), COLORS * len(series), strict=False):
            own_x, values = values if isinstance(values, tuple) else (x, values)
            mean, half = _mean_and_band(name, _numbers(values), band)
            places = np.arange(len(mean)) if own_x is None else _numbers(own_x)
            if len(places) != len(mean):
                raise ValueError(f"series {name!r} has {len(mean)} points but x has {len(places)}.")
            ax.plot(places, mean, color=color, marker="o" if len(mean) == 1 else None)
            if half is not None:
                ax.fill_between(places, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
            finite = np.isfinite(mean)
            if finite.any():
                ends.append((mean[finite][-1], name, color))
        if baseline is not None:
            ax.axhline(baseline, color=QUIET, linewidth=1.6, linestyle=(0, (4, 3)), zorder=1)
            ends.append((baseline, baseline_label, QUIET))
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
        ax.margins(x=0.02)
        ax.locator_params(axis="x", nbins=6)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        _label_ends(ax, ends)
    return ax.figure


def _numbers(values: Numbers) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _mean_and_band(name: str, values: np.ndarray, band) -> tuple[np.ndarray, np.ndarray | None]:
    if values.ndim == 1:
        half = _numbers(band[name]) if isinstance(band, Mapping) and name in band else None
        return values, half
    if values.ndim != 2:
        raise ValueError(f"series {name!r} has shape {values.shape}; expected (points,) or (seeds, points).")
    seeds = len(values)
    if seeds < 2 or not isinstance(band, float):
        return values.mean(0), None
    from scipy.stats import t

    return values.mean(0), t.ppf((1 + band) / 2, seeds - 1) * values.std(0, ddof=1) / math.sqrt(seeds)


def _label_ends(ax, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right edge instead of a legend, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    pixels = ax.get_window_extent().height or 300.0
    step = (high - low) * SMALL_SIZE * 1.5 * ax.figure.dpi / 72 / pixels
    ordered = sorted(ends)
    places = [end[0] for end in ordered]
    for _ in range(50):  # relax: each too-close pair moves half the overlap apart
        for i in range(len(places) - 1):
            overlap = step - (places[i + 1] - places[i])
            if overlap > 1e-9:
                places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
    for (_, name, color), place in zip(ordered, places, strict=True):
        height = (place - low) / (high - low)
        text = {"textcoords": "offset points", "color": color, "weight": "bold", "fontsize": SMALL_SIZE, "va": "center"}
        ax.annotate(name, (1.0, height), xytext=(8, 0), xycoords="axes fraction", annotation_clip=False, **text)
    ax.set_ylim(low, high)


def pareto(
    points: Mapping[str, Numbers],
    xlabel: str = "KL to the base (nats)",
    ylabel: str = "reward",
    maximise: tuple[bool, bool] = (False, True),
    title: str | None = None,
    ax=None,
):
    """Two aims against each other: one point a method, and the staircase of those that none beats on both. -> Figure

    A value is (x, y), or (x, y, x_error, y_error) with half-widths, or several such rows, (k, 2) or (k, 4), joined in
    order: a run over its training, or a frontier. `maximise` says for x and y whether more is better.
    """
    if not points:
        raise ValueError("there are no points to draw.")
    tables = {name: np.atleast_2d(_numbers(value)) for name, value in points.items()}
    for name, table in tables.items():
        if table.ndim != 2 or table.shape[1] not in (2, 4):
            raise ValueError(f"point {name!r} has shape {table.shape}; expected (x, y) or (x, y, x_error, y_error).")
    with style():
        ax = _plot(ax, 6.4, 4.6, title or f"{ylabel} against {xlabel}")
        _draw_frontier(ax, np.concatenate([table[:, :2] for table in tables.values()]), maximise)
        for table, color in zip(tables.values(), COLORS * len(tables), strict=False):
            errors = dict(zip(("xerr", "yerr"), table[:, 2:].T, strict=True)) if table.shape[1] == 4 else {}
            ax.errorbar(*table[:, :2].T, **errors, color=color, marker="o", markersize=8, linewidth=1.8, elinewidth=1.6,
                        markeredgecolor="white", linestyle="-" if len(table) > 1 else "none")  # fmt: skip
        hints = ["more is better" if up else "less is better" for up in maximise]
        ax.set(xlabel=f"{xlabel}, {hints[0]}", ylabel=f"{ylabel}, {hints[1]}", title=title or "")
        ax.margins(0.14)
        _label_points(ax, tables)
    return ax.figure


def _label_points(ax, tables: Mapping[str, np.ndarray]) -> None:
    """Each name beside its last point, on the first of four sides where it hides no point and no earlier name."""
    ax.figure.draw_without_rendering()  # fixes the limits and the layout, which the pixels below depend on
    scale = ax.figure.dpi / 72
    points = [ax.transData.transform(table[:, :2]) for table in tables.values()]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for table in points for x, y in table]
    for table in tables.values():  # error bars: two thin boxes each
        for x, y, dx, dy in table if table.shape[1] == 4 else ():
            bars = ax.transData.transform([(x - dx, y), (x + dx, y), (x, y - dy), (x, y + dy)])
            taken += [(*bars[0] - scale, *bars[1] + scale), (*bars[2] - scale, *bars[3] + scale)]
    for (name, table), pixels, color in zip(tables.items(), points, COLORS * len(tables), strict=False):
        width, height = 0.66 * SMALL_SIZE * len(name) * scale, SMALL_SIZE * scale
        x, y = pixels[-1]
        sides = [(8, 7, "left"), (-8, 7, "right"), (8, -16, "left"), (-8, -16, "right")]
        boxes = [_box(x + dx * scale, y + dy * scale, width, height, align) for dx, dy, align in sides]
        free = [not any(_overlap(box, other) for other in taken) for box in boxes]
        side = free.index(True) if any(free) else 0
        dx, dy, align = sides[side]
        text = {"textcoords": "offset points", "color": color, "weight": "bold", "fontsize": SMALL_SIZE}
        ax.annotate(name, table[-1, :2], xytext=(dx, dy), ha=align, **text)
        taken.append(boxes[side])


def _box(x: float, y: float, width: float, height: float, align: str) -> tuple[float, float, float, float]:
    left = x if align == "left" else x - width
    return left, y, left + width, y + height


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def pareto_front(points: np.ndarray, maximise: tuple[bool, bool]) -> np.ndarray:
    """Indices of the points (n, 2) that no other point beats on one axis without losing on the other, by rising x."""
    signed = points * np.where(maximise, 1.0, -1.0)
    beaten = ((signed[None] >= signed[:, None]).all(-1) & (signed[None] > signed[:, None]).any(-1)).any(1)
    front = np.flatnonzero(~beaten)
    return front[np.argsort(points[front, 0], kind="stable")]


def _draw_frontier(ax, points: np.ndarray, maximise: tuple[bool, bool]) -> None:
    front = points[pareto_front(points, maximise)]
    if len(front) > 1:  # the region that is reached: with less-is-better x, a point's height holds from it to the right
        ax.step(
            *front.T,
            where="pre" if maximise[0] else "post",
            color=FAINT,
            linewidth=7,
            zorder=0,
            solid_joinstyle="round",
        )
