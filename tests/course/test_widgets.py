"""Widgets, driven without a browser: sliders and buttons move what is shown, and on paper there is a picture."""

import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from minialign import show
from minialign.course.widgets import Drag, Labeller, live, scrub

WIDGET = "application/vnd.jupyter.widget-view+json"
ui = pytest.importorskip("ipywidgets")


@pytest.fixture
def looking(monkeypatch):
    monkeypatch.setenv("MINIALIGN_LIVE", "1")


def of(root, kind):
    """All widgets of a kind below `root`, in the order in which they are shown."""
    below = [found for child in getattr(root, "children", ()) for found in of(child, kind)]
    return [root, *below] if type(root) is kind else below


def test_live_is_a_notebook_servers_kernel(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delenv("MINIALIGN_LIVE", raising=False)
    assert not live()
    monkeypatch.setenv("JPY_SESSION_NAME", "chapter.ipynb")
    assert live()
    monkeypatch.setenv("MINIALIGN_LIVE", "0")
    assert not live()
    monkeypatch.delenv("JPY_SESSION_NAME")
    monkeypatch.setenv("MINIALIGN_LIVE", "1")
    assert live()


def bars(drawn):
    def draw(value):
        drawn.append(value)
        fig = show.figure(2.0, 1.0, f'a "bar" of {value}')
        fig.subplots().bar([0], [value])
        return fig

    return draw


def test_dragging_redraws_once_for_each_value(looking):
    drawn = []
    box = Drag(bars(drawn), [0.5, 1.0, 2.0], "weight", start=1).widget()
    (slider,), (picture,) = of(box, ui.SelectionSlider), of(box, ui.HTML)
    assert drawn == [1.0] and 'alt="a &quot;bar&quot; of 1.0"' in picture.value
    slider.index = 2
    assert drawn == [1.0, 2.0] and "of 2.0" in picture.value
    slider.index = 1
    assert drawn == [1.0, 2.0] and "of 1.0" in picture.value
    (play,) = of(box, ui.Play)
    play.value = 0
    assert slider.index == 0 and drawn[-1] == 0.5
    assert [label for label, _ in slider.options] == ["0.5", "1", "2"]


def test_a_picture_where_nobody_looks_and_both_in_a_live_session(monkeypatch, looking):
    drag = Drag(bars([]), [1, 2], "weight")
    data, metadata = drag._repr_mimebundle_()
    assert WIDGET in data and data["image/png"][:4] == b"\x89PNG" and metadata["image/png"]["alt"] == 'a "bar" of 1'
    monkeypatch.setenv("MINIALIGN_LIVE", "0")
    assert set(drag._repr_mimebundle_()[0]) == {"image/png"}
    with pytest.raises(ValueError, match="start is 2; expected an index of the 2 values"):
        Drag(bars([]), [1, 2], "weight", start=2)


def test_scrubbing_a_run(looking):
    frames = torch.linspace(0, 1, 4).reshape(4, 1, 1, 1, 1).expand(4, 3, 1, 8, 8)
    run = scrub(frames, [900, 600, 300, 0], "one run")
    (slider,), (picture,) = (of(run.widget(), kind) for kind in (ui.SelectionSlider, ui.HTML))
    assert [label for label, _ in slider.options] == ["900", "600", "300", "0"]
    assert "one run, t = 900" in picture.value
    assert run.still().get_size_inches()[0] > run.draw(0).get_size_inches()[0] / 2  # a strip, not one frame
    assert run.still().get_label() == "one run"
    with pytest.raises(ValueError, match="4 frames and 2 timesteps"):
        scrub(frames, [900, 0], "one run")


def taste(seed=0, m=120):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(m, 4, generator=generator)
    worth = features @ torch.tensor([2.0, -1.0, 0.0, 0.5])
    return torch.rand(m, 1, 8, 8, generator=generator), features, worth


def test_a_reward_model_learns_from_fifty_choices():
    images, features, worth = taste()
    labeller = Labeller(images, features, stand_in=-worth)
    assert all(first != second for first, second in labeller.pairs) and len(labeller.pairs) == 50
    for first, second in labeller.pairs:
        labeller.choose(bool(worth[first] > worth[second]))
    corr = torch.corrcoef(torch.stack([labeller.scores(), worth]))[0, 1]
    assert corr > 0.9  # the stand-in's taste, the opposite one, has not been asked
    assert sum(labeller.guesses[25:]) >= 20  # each guess was made before its choice
    labeller.choose(True)
    assert len(labeller.choices) == 50
    assert "50 of your choices" in labeller.ranking().get_label()


def test_the_stand_in_is_asked_until_there_are_five():
    images, features, worth = taste(1)
    labeller = Labeller(images, features, stand_in=worth, count=40)
    labeller.choose(True)
    assert torch.corrcoef(torch.stack([labeller.scores(), worth]))[0, 1] > 0.9
    assert "40 choices of a stand-in" in labeller.still().get_label()
    torch.testing.assert_close(labeller.scores(features[:7]), labeller.scores()[:7])  # features of other pictures
    with pytest.raises(ValueError, match="one of each a picture"):
        Labeller(images, features[:3], stand_in=worth)


def test_clicking_through_the_labeller(looking):
    images, features, worth = taste(2, m=20)
    labeller = Labeller(images, features, stand_in=worth, count=7)
    box = labeller.widget()
    left, right, undo = of(box, ui.Button)
    _, first_picture, _, status, learned = of(box, ui.HTML)
    assert undo.disabled and "0 of 7" in status.value
    before = first_picture.value
    left.click()
    assert labeller.choices == [True] and first_picture.value != before and "1 of 7" in status.value
    undo.click()
    assert labeller.choices == [] and first_picture.value == before
    for _ in range(3):
        left.click()
        right.click()
    assert labeller.choices == [True, False] * 3 and "<img" in learned.value
    right.click()
    assert left.disabled and right.disabled and "run the cells below" in status.value
    left.click()
    assert len(labeller.choices) == 7


def test_the_clock_runs_under_long_cells_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIALIGN_LIVE", "1")
    cells = ["import minialign.course", "import time; time.sleep(3.5)", "1 + 1"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    short, long, quick = (cell.outputs for cell in notebook.cells)
    assert short == [] and len(quick) == 1
    assert re.fullmatch(r"<small>\d+ s</small>", long[0].data["text/html"])
