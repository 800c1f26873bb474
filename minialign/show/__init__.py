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

from minialign.show.canvas import (
    COLORS,
    FAINT,
    FONT_SIZE,
    GAP,
    INK,
    QUIET,
    RIGHT,
    SERVERS,
    SMALL_SIZE,
    TITLE_SIZE,
    WRONG,
    Numbers,
    figure,
    html,
    live,
    save,
    style,
)
from minialign.show.compare import before_after, before_after_texts
from minialign.show.images import film_strip, image_grid
from minialign.show.plots import curves, pareto, pareto_front, point_cloud

__all__ = [
    "COLORS",
    "FAINT",
    "FONT_SIZE",
    "GAP",
    "INK",
    "QUIET",
    "RIGHT",
    "SERVERS",
    "SMALL_SIZE",
    "TITLE_SIZE",
    "WRONG",
    "Numbers",
    "before_after",
    "before_after_texts",
    "curves",
    "figure",
    "film_strip",
    "html",
    "image_grid",
    "live",
    "pareto",
    "pareto_front",
    "point_cloud",
    "save",
    "style",
]
