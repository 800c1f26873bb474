"""Pictures: what is drawn where, what a caller is told, and that nothing leaks."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from minialign import show


def images(n, channels=3, size=4, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def pictures_at(fig):
    """{(x, y): pixels} of every image in the figure, by its upper left corner, rounded."""
    shown = {}
    for image in fig.axes[0].images:
        left, _, _, top = image.get_extent()
        shown[round(left, 3), round(top, 3)] = np.asarray(image.get_array())
    return shown


def frames(fig):
    """Frame colours in drawing order."""
    from matplotlib.patches import Rectangle

    return [to_rgb(p.get_edgecolor()) for p in fig.axes[0].patches if isinstance(p, Rectangle)]


def in_reading_order(fig):
    shown = pictures_at(fig)
    return [shown[place] for place in sorted(shown, key=lambda place: (place[1], place[0]))]


# ---- grids


def test_a_grid_reads_like_a_page():
    batch = images(7)
    fig = show.image_grid(batch, columns=3)
    for drawn, image in zip(in_reading_order(fig), batch, strict=True):
        np.testing.assert_allclose(drawn, image.movedim(0, -1))
    assert len({y for _, y in pictures_at(fig)}) == 3


def test_grey_is_repeated_out_of_range_is_clipped_and_nan_is_magenta(caplog):
    batch = torch.tensor([-1.0, 0.25, 2.0, torch.nan]).view(1, 1, 2, 2)
    (drawn,) = in_reading_order(show.image_grid(batch))
    np.testing.assert_allclose(drawn, [[[0, 0, 0], [0.25] * 3], [[1, 1, 1], [1, 0, 1]]])
    assert not caplog.records  # matplotlib clips too, but complains


def test_enlargement_does_not_blur(tmp_path):
    checkers = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    show.save(show.image_grid(checkers, scale=2), tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    middle = pixels[
        pixels.shape[0] // 2 - 40 : pixels.shape[0] // 2 + 40, pixels.shape[1] // 2 - 40 : pixels.shape[1] // 2 + 40
    ]
    assert np.isin(middle, (0, 255)).mean() > 0.97  # bicubic would fill it with greys


def test_right_and_wrong_are_told_by_colour_and_by_sign():
    fig = show.image_grid(images(3), good=[True, False, True])
    assert frames(fig) == [to_rgb(show.RIGHT), to_rgb(show.WRONG), to_rgb(show.RIGHT)]
    assert len(fig.axes[0].lines) == 1 + 2 + 1  # a tick is one stroke, a cross two
    assert frames(show.image_grid(images(2))) == [to_rgb(show.FAINT)] * 2


def test_captions_stand_below_their_images_whole_and_in_order():
    captions = ["a red circle above a blue square", "one", "a green triangle left of a yellow circle"]
    fig = show.image_grid(images(3), captions=captions, columns=2)
    words = " ".join(texts(fig))
    assert words == " ".join(captions)
    (_, first_row), (_, second_row) = sorted(pictures_at(fig))[0], sorted(pictures_at(fig))[1]
    for text in fig.axes[0].texts:
        assert first_row + 1 < text.get_position()[1] < second_row or text.get_position()[1] > second_row + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": images(3), "captions": ["a"]}, "3 images but 1 captions"),
        ({"images": images(3), "good": [True]}, "3 images but 1 good"),
        ({"images": images(3)[:0]}, "no images"),
        ({"images": torch.zeros(3, 2)}, r"got \(3, 2\)"),
        ({"images": torch.zeros(3, 4, 8, 8)}, r"got \(3, 4, 8, 8\)"),
    ],
)
def test_grids_refuse_what_they_cannot_draw(arguments, words):
    with pytest.raises(ValueError, match=words):
        show.image_grid(**arguments)


# ---- before and after

PROMPTS = ["b", "a", "b", "a", "b"]
OLD, NEW = torch.tensor([0.0, 0, 1, 0, 0]), torch.tensor([1.0, 1, 1, 0, 1])


def test_before_is_left_after_is_right_rows_are_prompts_in_order():
    before, after = images(5, seed=1), images(5, seed=2)
    fig = show.before_after(before, after, PROMPTS, OLD, NEW, columns=2)
    expected = [before[0], before[2], after[0], after[2], before[1], before[3], after[1], after[3]]
    for drawn, image in zip(in_reading_order(fig), expected, strict=True):
        np.testing.assert_allclose(drawn, image.movedim(0, -1))


def test_before_after_counts_all_samples_not_only_those_shown():
    fig = show.before_after(images(5), images(5), PROMPTS, OLD, NEW, columns=1, rows=1, labels=("base", "DDPO"))
    words = texts(fig)
    assert {"base: 20% right", "DDPO: 80% right", "1 → 3 of 3 right", "b"} <= set(words)
    assert "a" not in words
    assert frames(fig) == [to_rgb(show.WRONG), to_rgb(show.RIGHT)]
    assert "base: 20% right on the left, DDPO: 80% right on the right" in fig.get_label()


def test_scores_that_are_no_verdicts_are_printed_not_ticked():
    fig = show.before_after(images(5), images(5), PROMPTS, OLD / 2, NEW * 3, columns=1, score_name="ink")
    assert {"before: ink 0.10", "after: ink 2.40", "0.17 → 3.00", "0.00", "3.00"} <= set(texts(fig))
    assert set(frames(fig)) == {to_rgb(show.FAINT)}


def test_before_after_refuses_lengths_that_disagree():
    with pytest.raises(ValueError, match="5 samples in before but 4 scores_after"):
        show.before_after(images(5), images(5), PROMPTS, OLD, NEW[:4])


def test_texts_before_and_after_show_the_first_of_each_prompt_and_count_all():
    before, after = [f"old {i}" for i in range(5)], [f"new {i}" for i in range(5)]
    fig = show.before_after_texts(before, after, PROMPTS, OLD / 2, NEW * 3, rows=2, score_name="gold")
    words = texts(fig)
    first = {prompt: PROMPTS.index(prompt) for prompt in dict.fromkeys(PROMPTS)}
    shown = list(first.values())[:2]
    assert {"before: gold 0.10", "after: gold 2.40"} <= set(words)
    assert [w for w in words if w[:3] in ("old", "new")] == [f"{side} {i}" for i in shown for side in ("old", "new")]
    assert [w for w in words if w[:1] in ("+", "-")] == [f"{s[i]:+.1f}" for i in shown for s in (OLD / 2, NEW * 3)]
    with pytest.raises(ValueError, match="5 texts in before but 4 after"):
        show.before_after_texts(before, after[:4], PROMPTS, OLD, NEW)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: show.before_after_texts(
            ["a rather long answer that takes two lines or three and says nothing at all in them"] * 5,
            ["short"] * 5,
            PROMPTS,
            OLD,
            NEW,
            title="a title",
        ),
        lambda: show.image_grid(images(1), title="a title much wider than its only picture"),
        lambda: show.film_strip(images(2), title="a title much wider than its two pictures"),
        lambda: show.before_after(
            images(5), images(5), PROMPTS, OLD, NEW, columns=1, labels=("the base model", "DDPO, 90 s")
        ),
    ],
)
def test_text_stays_inside_the_figure_and_apart(draw):
    fig = draw()
    fig.draw_without_rendering()
    boxes = [text.get_window_extent() for text in fig.axes[0].texts if text.get_text()]
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= fig.bbox.x1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---- film strips and points


def test_a_film_strip_runs_to_the_right_and_keeps_both_ends():
    runs = images(21 * 2).view(21, 2, 3, 4, 4)
    fig = show.film_strip(runs, timesteps=range(1000, 895, -5), columns=5, captions=["one", "two"], good=[True, False])
    chosen = [0, 5, 10, 15, 20]
    expected = [runs[frame, row] for row in range(2) for frame in chosen]
    for drawn, image in zip(in_reading_order(fig), expected, strict=True):
        np.testing.assert_allclose(drawn, image.movedim(0, -1))
    labels = [text for text in texts(fig) if text.startswith("t = ")]
    assert labels == [f"t = {1000 - 5 * frame}" for frame in chosen]
    assert frames(fig)[8] == to_rgb(show.RIGHT)
    assert frames(fig)[9] == to_rgb(show.WRONG)
    assert frames(fig).count(to_rgb(show.FAINT)) == 8


def test_a_single_run_and_a_cloud_are_strips_too():
    assert len(pictures_at(show.film_strip(images(4)))) == 4
    cloud = torch.tensor([[[0.0, 0.0], [0.5, 0.5]]] * 3)
    fig = show.film_strip(cloud, limits=1.0)
    places = fig.axes[0].collections[0].get_offsets() - fig.axes[0].collections[0].get_offsets()[0]
    np.testing.assert_allclose(places[1], [0.25, -0.25])  # half of half a cell, right and up


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frames": torch.zeros(5, 3)}, r"got \(5, 3\)"),
        ({"frames": images(4), "timesteps": [1, 2]}, "4 frames but 2 timesteps"),
        ({"frames": images(4), "captions": ["a", "b"]}, "1 rows but 2 captions"),
    ],
)
def test_film_strips_refuse_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        show.film_strip(**arguments)


def test_points_have_a_colour_and_a_name_for_each_prompt():
    points = torch.tensor([[0.0, 1], [2, 3], [4, 5]])
    fig = show.point_cloud(points, ["in", "out", "in"], log_density=lambda x: -x.square().sum(-1))
    first, second = (c for c in fig.axes[0].collections if c.get_label() in ("in", "out"))
    np.testing.assert_allclose(first.get_offsets(), points[[0, 2]])
    np.testing.assert_allclose(second.get_offsets(), points[[1]])
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["in", "out"]
    with pytest.raises(ValueError, match=r"got \(3, 3\)"):
        show.point_cloud(torch.zeros(3, 3))


# ---- curves


def test_seeds_become_a_mean_and_students_band():
    runs = torch.tensor([[0.0, 1, 2], [2.0, 5, 2]])
    fig = show.curves({"a": runs}, x=[0, 10, 20], baseline=0.5)
    line = fig.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[0, 1], [10, 3], [20, 2]])
    # two values x -+ h: s = h sqrt(2), s / sqrt(2) = h, and t_1(0.975) = 12.7062
    heights = [p for p in fig.axes[0].collections[0].get_paths()[0].vertices if p[0] == 10]
    assert max(y for _, y in heights) == pytest.approx(3 + 12.7062 * 2, rel=1e-5)
    assert min(y for _, y in heights) == pytest.approx(3 - 12.7062 * 2, rel=1e-5)
    assert fig.axes[0].lines[1].get_ydata()[0] == 0.5


def test_a_series_may_bring_its_x_and_its_band():
    fig = show.curves({"a": ([5, 6], [1.0, 2.0]), "b": [3.0, 4.0, 5.0]}, band={"b": [0.5, 0.5, 1.0]})
    np.testing.assert_allclose(fig.axes[0].lines[0].get_xydata(), [[5, 1], [6, 2]])
    assert fig.axes[0].collections[0].get_paths()[0].vertices[:, 1].max() == 6.0
    assert len(fig.axes[0].collections) == 1


def test_names_stand_at_the_ends_in_order_and_apart():
    fig = show.curves({"low": [0.0, 0.50], "high": [0.0, 0.51], "top": [0.0, 1.0]}, baseline=0.505)
    heights = {text.get_text(): text.xy[1] for text in fig.axes[0].texts}
    order = ["low", "base model", "high", "top"]
    assert sorted(heights, key=heights.get) == order
    gaps = np.diff([heights[name] for name in order]) * fig.axes[0].get_window_extent().height * 72 / fig.dpi
    assert (gaps > show.SMALL_SIZE * 1.2).all()  # in points: more than a line of text


def test_gaps_and_empty_starts_are_drawn():
    fig = show.curves({"a": [float("nan"), 1.0, float("nan")]})
    (name,) = fig.axes[0].texts
    assert name.get_text() == "a"
    assert 0 < name.xy[1] < 1  # beside the last number, not beside the last gap


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"series": {}}, "no curves"),
        ({"series": {"a": [1.0, 2.0]}, "x": [1]}, "'a' has 2 points but x has 1"),
        ({"series": {"a": torch.zeros(2, 2, 2)}}, r"'a' has shape \(2, 2, 2\)"),
    ],
)
def test_curves_refuse_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        show.curves(**arguments)


# ---- Pareto


def test_the_front_is_what_nothing_beats():
    points = np.array([[1.0, 1], [2, 3], [3, 2], [4, 4], [1, 0.5], [4, 4]])
    assert show.pareto_front(points, (False, True)).tolist() == [0, 1, 3, 5]  # less x, more y; twins both stay
    assert show.pareto_front(points, (True, True)).tolist() == [3, 5]
    assert show.pareto_front(points, (False, False)).tolist() == [4]
    assert show.pareto_front(points, (True, False)).tolist() == [4, 2, 3, 5]


def test_points_paths_and_errors_are_drawn_and_labels_keep_clear():
    fig = show.pareto({"base": (0, 0.4), "run": [(1, 0.5), (2, 0.7)], "sure": (3, 0.9, 0.1, 0.02)})
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.texts] == ["base", "run", "sure"]
    assert "less is better" in ax.get_xlabel()
    assert "more is better" in ax.get_ylabel()
    with pytest.raises(ValueError, match="point 'a' has shape"):
        show.pareto({"a": (1, 2, 3)})
    crowded = show.pareto({"one": (0, 0), "two": (0.001, 0.001), "three": (1, 1)})
    boxes = [text.get_window_extent() for text in crowded.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---- all of them

DRAW = {
    "image_grid": lambda ax: show.image_grid(images(2), captions=["a", "b"], title="title", ax=ax),
    "film_strip": lambda ax: show.film_strip(images(3), title="title", ax=ax),
    "point_cloud": lambda ax: show.point_cloud(torch.rand(5, 2), title="title", ax=ax),
    "curves": lambda ax: show.curves({"a": [1, 2]}, title="title", ax=ax),
    "pareto": lambda ax: show.pareto({"a": (1, 2)}, title="title", ax=ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_each_draws_into_a_given_axes_or_makes_a_white_figure_outside_pyplot(name):
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcdefaults()
    mpl.use("Agg")
    before = dict(mpl.rcParams)
    fig = DRAW[name](None)
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before
    assert to_rgb(fig.get_facecolor()) == (1, 1, 1)
    assert fig.get_label()
    sizes = [text.get_fontsize() for ax in fig.axes for text in ax.texts] + [
        ax.xaxis.label.get_size() for ax in fig.axes
    ]
    assert min(sizes) >= 11
    own, ax = plt.subplots()
    assert DRAW[name](ax) is own
    assert len(own.axes) == 1
    plt.close(own)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_saved_files_carry_their_description_and_are_the_same_each_time(tmp_path, suffix):
    for name in ("first", "second"):
        show.save(show.curves({"a": [1, 2]}), tmp_path / f"{name}{suffix}", "Reward rises from 1 to 2.")
    first = (tmp_path / f"first{suffix}").read_bytes()
    assert first == (tmp_path / f"second{suffix}").read_bytes()
    if suffix == ".png":  # neither the date nor matplotlib's version
        assert Image.open(tmp_path / "first.png").text == {"Description": "Reward rises from 1 to 2."}
    else:
        assert b"Reward rises from 1 to 2." in first
        assert b"dc:date" not in first


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'\.jpg'\. There are: \.png, \.svg"):
        show.save(show.curves({"a": [1, 2]}), tmp_path / "curve.jpg")


def test_a_figure_displays_itself_in_a_notebook_with_alternative_text():
    fig = show.image_grid(images(2), title="Two samples")
    data, metadata = fig._repr_mimebundle_()
    assert data["image/png"][:4] == b"\x89PNG"
    assert metadata["image/png"]["alt"] == "Two samples"
    width = Image.open(io.BytesIO(data["image/png"])).width
    assert width > 1.5 * metadata["image/png"]["width"]  # sharp on a screen with two pixels a point


def test_before_an_audience_the_alternative_text_survives_jupyterlab(monkeypatch):
    fig = show.image_grid(images(2), title='Two "samples" & more')
    for name in show.SERVERS:
        monkeypatch.delenv(name, raising=False)
    assert not show.live() and set(fig._repr_mimebundle_()[0]) == {"image/png"}  # as stored in the repository
    monkeypatch.setenv("JPY_SESSION_NAME", "chapter.ipynb")
    assert show.live() and 'alt="Two &quot;samples&quot; &amp; more"' in fig._repr_mimebundle_()[0]["text/html"]
    monkeypatch.setenv("MINIALIGN_LIVE", "0")
    assert not show.live()


def test_importing_show_does_not_import_matplotlib():
    code = "import sys, minialign.show; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
