"""Numbers as pictures: curves over training, two aims against each other, points in the plane."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minialign.show.canvas import COLORS, FAINT, QUIET, SMALL_SIZE, Numbers, plot_axes, rows_by_prompt, style


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
        ax = plot_axes(ax, 6.0 + margin, 4.2, title or f"{ylabel or 'value'} over {xlabel}")
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
        ax = plot_axes(ax, 6.4, 4.6, title or f"{ylabel} against {xlabel}")
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
    groups = rows_by_prompt(prompts) if prompts is not None else {"": list(range(len(points)))}
    limits = limits or 1.15 * points.abs().max().item()
    with style():
        ax = plot_axes(ax, 4.6, 4.6, title or f"{len(points)} samples in the plane")
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
