"""What training did, prompt by prompt: before on the left, after on the right."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minialign.show.canvas import (
    FAINT,
    FONT_SIZE,
    GAP,
    INK,
    QUIET,
    SMALL_SIZE,
    TITLE_SIZE,
    Numbers,
    canvas,
    rows_by_prompt,
    same_length,
    save,
    style,
    text_width,
    wrap,
    write,
)
from minialign.show.images import draw_image, row_label, to_array


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
    old, new = to_array(before), to_array(after)
    scores = [torch.as_tensor(s).detach().float().cpu() for s in (scores_before, scores_after)]
    same_length(
        len(old), "samples in before", after=new, prompts=prompts, scores_before=scores[0], scores_after=scores[1]
    )
    groups = rows_by_prompt(prompts)
    shown = dict(list(groups.items())[:rows])
    columns = min(columns, max(len(members) for members in shown.values()))
    binary = all(bool(((s == 0) | (s == 1)).all()) for s in scores)
    headings = [_heading(label, s, score_name, binary) for label, s in zip(labels, scores, strict=True)]
    inches, text, above = 1.0, 2.75, (1.05 if title else 0.62)
    block = max(columns + GAP * (columns - 1), *(text_width(heading, TITLE_SIZE, inches) for heading in headings))
    starts, pitch = (text, text + block + 0.55), (1.2 if binary else 1.44)
    width = max(starts[1] + block + 0.25, 0.4 + text_width(title, TITLE_SIZE + 2, inches))
    height = above + pitch * len(shown) + 0.2
    sides = f"{headings[0]} on the left, {headings[1]} on the right."
    description = f"{title + '. ' if title else ''}Samples for {len(shown)} prompts. {sides}"
    with style():
        ax = canvas(None, width, height, description, inches)
        ax.text(0.2, 0.14, title or "", fontsize=TITLE_SIZE + 2, va="top", weight="bold")
        ax.plot([starts[1] - 0.27] * 2, [above, height - 0.4], color=FAINT, linewidth=1.5)
        for row, (prompt, members) in enumerate(shown.items()):
            tally = _tally(scores, members, score_name, binary)
            row_label(ax, above + row * pitch, text, inches, prompt, tally)
        for start, heading, color, pixels, score in zip(
            starts, headings, (QUIET, INK), (old, new), scores, strict=True
        ):
            ax.text(start, above - 0.16, heading, fontsize=TITLE_SIZE, va="bottom", weight="bold", color=color)
            for row, members in enumerate(shown.values()):
                for column, index in enumerate(members[:columns]):
                    x, y = start + column * (1 + GAP), above + row * pitch
                    draw_image(ax, pixels[index], x, y, bool(score[index]) if binary else None)
                    if not binary:
                        write(
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
    same_length(
        len(before), "texts in before", after=after, prompts=prompts, scores_before=scores[0], scores_after=scores[1]
    )
    first = [members[0] for members in list(rows_by_prompt(prompts).values())[:rows]]
    left, column, pitch = 2.7, 4.3, 1.22 * FONT_SIZE / 72
    blocks = [[wrap(side[i], column - 0.6, FONT_SIZE) for side in (before, after)] for i in first]
    heights = [max(map(len, pair)) * pitch + 0.22 for pair in blocks]
    above, width = 1.0 if title else 0.6, left + 2 * column + 0.2
    headings = [_heading(label, s, score_name, False) for label, s in zip(labels, scores, strict=True)]
    description = f"{title + '. ' if title else ''}Answers to {len(first)} prompts. {headings[0]}, {headings[1]}."
    with style():
        ax = canvas(None, width, above + sum(heights) + 0.1, description, 1.0)
        ax.text(0.2, 0.14, title or "", fontsize=TITLE_SIZE, va="top", weight="bold")
        for side, (heading, color) in enumerate(zip(headings, (QUIET, INK), strict=True)):
            ax.text(left + side * column, above - 0.14, heading, fontsize=FONT_SIZE, weight="bold", color=color)
        y = above
        for i, pair, height in zip(first, blocks, heights, strict=True):
            ax.plot([0.2, width - 0.2], [y, y], color=FAINT, linewidth=1)
            write(ax, 0.2, y + 0.07, wrap(prompts[i], left - 0.5, FONT_SIZE), FONT_SIZE, 1.0, color=QUIET)
            for side, (lines, score) in enumerate(zip(pair, scores, strict=True)):
                x = left + side * column
                write(ax, x, y + 0.07, lines, FONT_SIZE, 1.0)
                write(ax, x + column - 0.25, y + 0.07, [f"{score[i]:+.1f}"], FONT_SIZE, 1.0, ha="right", color=QUIET)
            y += height
    if path is not None:
        save(ax.figure, path, description)
    return ax.figure


def _heading(label: str, scores: Tensor, score_name: str, binary: bool) -> str:
    mean = scores.mean().item()
    return f"{label}: {mean:.0%} {score_name}" if binary else f"{label}: {score_name} {mean:.2f}"


def _tally(scores: Sequence[Tensor], members: Sequence[int], score_name: str, binary: bool) -> str:
    old, new = (s[list(members)] for s in scores)
    if binary:
        return f"{int(old.sum())} → {int(new.sum())} of {len(members)} {score_name}"
    return f"{old.mean():.2f} → {new.mean():.2f}"
