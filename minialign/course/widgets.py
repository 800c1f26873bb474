"""Where looking beats reading: drag a number, scrub through a run, be the labeller. Pictures where nobody can click.

    Drag(draw, values, name)       a slider over `draw(value)`
    scrub(frames, timesteps)       a denoising run, frame by frame
    Labeller(images, features)     choose the better of two, fifty times, and see a reward model learn from it

Each is a widget in a live session (`show.live`), and a still picture everywhere else: nbval, the builder, GitHub.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minialign import show
from minialign.methods.reward_model import bradley_terry_loss


def live() -> bool:
    """Whether somebody may click: a notebook server's kernel, and ipywidgets is there."""
    return show.live() and importlib.util.find_spec("ipywidgets") is not None


class Interactive:
    """Shown as `widget()` in a live session; otherwise, and in a saved notebook, as the picture `still()`."""

    def widget(self):
        raise NotImplementedError

    def still(self):
        raise NotImplementedError

    def _repr_mimebundle_(self, include=None, exclude=None):
        data, metadata = self.still()._repr_mimebundle_()
        if live():
            data = data | self.widget()._repr_mimebundle_()
        return data, metadata


class Drag(Interactive):
    """A slider over `values`; each picture `draw(value)`, a figure, is drawn when first looked at, then kept."""

    def __init__(self, draw: Callable, values: Sequence, name: str, start: int = 0, still: Callable | None = None):
        """name: what is dragged; start: the index shown first; still(): for paper, if not that one."""
        if not 0 <= start < len(values):
            raise ValueError(f"start is {start}; expected an index of the {len(values)} values.")
        self.draw, self.values, self.name, self.start = draw, list(values), name, start
        self._still, self._drawn = still, {}

    def still(self):
        return self._still() if self._still else self.draw(self.values[self.start])

    def picture(self, index: int) -> str:
        """HTML of the picture at one position of the slider."""
        if index not in self._drawn:
            self._drawn[index] = show.html(self.draw(self.values[index]))
        return self._drawn[index]

    def widget(self):
        import ipywidgets as ui

        options = [(f"{value:g}" if isinstance(value, float) else str(value), i) for i, value in enumerate(self.values)]
        wide = ui.Layout(width="36em")
        slider = ui.SelectionSlider(options=options, index=self.start, description=self.name, layout=wide)
        slider.style.description_width = "initial"
        play = ui.Play(min=0, max=len(options) - 1, value=self.start, interval=400)
        ui.link((play, "value"), (slider, "index"))
        picture = ui.HTML(self.picture(self.start))
        slider.observe(lambda change: setattr(picture, "value", self.picture(change["new"])), "index")
        return ui.VBox([ui.HBox([play, slider]), picture])


def scrub(frames: Tensor, timesteps: Sequence[int], title: str, columns: int = 8) -> Drag:
    """A denoising run to scrub through. frames (steps, n, C, h, w) in [0, 1], noise first; one timestep a frame.

    Still: a film strip of the first run.
    """
    if len(frames) != len(timesteps):
        raise ValueError(f"there are {len(frames)} frames and {len(timesteps)} timesteps; give one for each.")
    positions = {timestep: i for i, timestep in enumerate(timesteps)}

    def draw(timestep):
        return show.image_grid(frames[positions[timestep]], columns=columns, title=f"{title}, t = {timestep}")

    def still():
        return show.film_strip(frames[:, 0], timesteps=list(timesteps), title=title)

    return Drag(draw, list(timesteps), "timestep", still=still)


class Labeller(Interactive):
    """You choose the better of two pictures; a reward model, linear in `features`, learns from it after every choice.

    images (m, C, h, w) in [0, 1]; features (m, d); `stand_in` (m,): the taste of whoever chooses where nobody can click
    (and, if fewer than five choices were made by hand, for the cells below).
    """

    def __init__(self, images: Tensor, features: Tensor, stand_in: Tensor, count: int = 50, seed: int = 0):
        if not len(images) == len(features) == len(stand_in):
            raise ValueError(
                f"{len(images)} images, {len(features)} rows of features, {len(stand_in)} scores of the stand-in: "
                "give one of each a picture."
            )
        self.images, self.stand_in = images, stand_in
        self.centre, self.spread = features.mean(0), features.std(0).clamp_min(1e-6)
        self.features = self._standard(features)
        draws = torch.rand(count, len(images), generator=torch.Generator().manual_seed(seed))
        self.pairs = draws.topk(2, 1).indices.tolist()  # two different pictures each
        self.choices: list[bool] = []  # whether the left one was chosen
        self.guesses: list[bool] = []  # whether the model, before that choice, guessed it

    def choose(self, left: bool) -> None:
        """Note one choice; the model's guess is noted first, so it is an honest one."""
        if len(self.choices) == len(self.pairs):
            return
        first, second = self.pairs[len(self.choices)]
        guess = self.features @ self._learn(self.choices)
        self.guesses.append(bool(guess[first] > guess[second]) == left)
        self.choices.append(left)

    def undo(self) -> None:
        del self.choices[-1:], self.guesses[-1:]

    def scores(self, features: Tensor | None = None) -> Tensor:
        """(n,): the learned reward of pictures with those features (n, d), of its own if None.

        With fewer than five choices made by hand it is learned from the stand-in's.
        """
        choices = self.choices
        if len(choices) < 5:
            choices = [bool(self.stand_in[first] > self.stand_in[second]) for first, second in self.pairs]
        return (self.features if features is None else self._standard(features)) @ self._learn(choices)

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.centre) / self.spread

    def _learn(self, choices: list[bool]) -> Tensor:
        """(d,) weights: Bradley and Terry's loss plus .05 |w|^2, by L-BFGS. No choices, no weights."""
        weights = torch.zeros(self.features.shape[1], requires_grad=True)
        if not choices:
            return weights.detach()
        pairs = [pair if left else pair[::-1] for pair, left in zip(self.pairs, choices, strict=False)]
        better, worse = (self.features[list(side)] for side in zip(*pairs, strict=True))
        optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = bradley_terry_loss(better @ weights, worse @ weights) + 0.05 * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return weights.detach()

    def still(self):
        return self.ranking()

    def ranking(self, columns: int = 8):
        """The pictures that the learned reward likes most, and least. -> Figure"""
        order = self.scores().argsort(descending=True)
        rows = torch.cat([self.images[order[:columns]], self.images[order[-columns:]]])
        by = (
            f"{len(self.choices)} of your choices"
            if len(self.choices) >= 5
            else f"{len(self.pairs)} choices of a stand-in"
        )
        return show.image_grid(rows, columns=columns, scale=0.8, title=f"Best (top) and worst (bottom), {by}")

    def widget(self):
        import ipywidgets as ui

        sides = [ui.HTML(), ui.HTML()]
        buttons = [ui.Button(description=f"the {side} one", button_style="primary") for side in ("left", "right")]
        back, status, learned = ui.Button(description="undo", icon="undo"), ui.HTML(), ui.HTML()

        def refresh() -> None:
            done = len(self.choices)
            for button in buttons:
                button.disabled = done == len(self.pairs)
            back.disabled = done == 0
            if done < len(self.pairs):
                for side, index, name in zip(sides, self.pairs[done], ("left", "right"), strict=True):
                    side.value = show.html(
                        show.image_grid(self.images[index : index + 1], columns=1, title=name, scale=1.6)
                    )
            recent = self.guesses[-10:]
            guessed = f"; it guessed {sum(recent)} of your last {len(recent)} beforehand" if done > 10 else ""
            end = " Thank you: run the cells below." if done == len(self.pairs) else ""
            status.value = f"{done} of {len(self.pairs)} choices{guessed}.{end}"
            learned.value = (
                show.html(self.ranking()) if done >= 5 else "The model shows what it has learned after five."
            )

        def click(act: Callable, *arguments: bool) -> Callable:
            def handler(_) -> None:
                act(*arguments)
                refresh()

            return handler

        for button, left in zip(buttons, (True, False), strict=True):
            button.on_click(click(self.choose, left))
        back.on_click(click(self.undo))
        refresh()
        pair = ui.HBox([ui.VBox([side, button]) for side, button in zip(sides, buttons, strict=True)])
        return ui.VBox(
            [ui.HTML("<b>Which drawing is better?</b> There is no right answer."), pair, back, status, learned]
        )
