"""What every picture is drawn on: colours, type, figures that a notebook shows sharply, a canvas, text that fits."""

import base64
import functools
import io
import math
import os
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path

import numpy as np
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


def canvas(ax, width: float, height: float, label: str, inches: float):
    """A blank axes in units of cells, y downwards, width x height of them; a cell is `inches` wide in a new figure."""
    if ax is None:
        ax = figure(width * inches, height * inches, label).add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    return ax


def plot_axes(ax, width: float, height: float, label: str):
    """Axes for a plot, in a figure that makes room for labels by itself."""
    if ax is not None:
        return ax
    fig = figure(width, height, label)
    fig.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98))
    return fig.add_subplot()


def text_width(text: str | None, size: float, inches: float) -> float:
    """About how many cells a bold line takes: an average bold letter of DejaVu Sans is 0.68 of its size wide."""
    return len(text or "") * 0.68 * size / 72 / inches


def wrap(text: str, inches: float, size: float) -> list[str]:
    """A caption in lines of about equal length that fit; an average letter of DejaVu Sans is 0.6 of its size wide."""
    most = max(6, int(inches * 72 / (0.6 * size)))
    lines = textwrap.wrap(text, most) or [""]
    even = textwrap.wrap(text, max(1, math.ceil(len(text) / len(lines)) + 3)) or [""]
    return even if len(even) == len(lines) and max(map(len, even)) <= most else lines


def write(ax, x: float, y: float, lines: Sequence[str], size: float, inches: float, **style) -> float:
    """Write lines downwards from y at an even pitch (matplotlib's varies) -> where the next would go."""
    pitch = size * 1.22 / 72 / inches
    for i, line in enumerate(lines):
        ax.text(x, y + (i + 0.78) * pitch, line, fontsize=size, va="baseline", **style)
    return y + len(lines) * pitch


def same_length(expected: int, of: str, **values) -> None:
    for name, value in values.items():
        if value is not None and len(value) != expected:
            raise ValueError(f"there are {expected} {of} but {len(value)} {name}.")


def rows_by_prompt(prompts: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return groups
