"""Settings that check themselves, and what a command line says, read by its field's annotation."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from minialign.methods import b2diffurl, constrained, ddpo, ppo, rlcm
from minialign.settings import (
    Count,
    Fraction,
    Limit,
    Natural,
    NonNegative,
    Number,
    Positive,
    Settings,
    Share,
    annotations,
    parse,
)


@dataclass(frozen=True)
class Config(Settings):
    rounds: Count = 3
    warmup: Natural = 0
    shift: Number = 0.0
    scale: Positive = 1.0
    beta: NonNegative = 0.0
    clip: Limit | None = None
    decay: Fraction = 0.5
    keep: Share = 1.0
    kind: Literal["a", "b"] = "a"
    loss: Literal[None, "k2"] = None
    thresholds: tuple[Number, ...] = ()
    span: tuple[Number, Number] = (0.0, 1.0)
    whiten: bool = True


GOOD = {
    "rounds": [1, 10**9], "warmup": [0], "shift": [-3, 2.5], "scale": [1e-30, 7], "beta": [0, 0.5],
    "clip": [None, 0.2, math.inf], "decay": [0, 1, 0.5], "keep": [1, 0.01], "kind": ["b"], "loss": [None, "k2"],
    "thresholds": [(), (1.0, -2)], "span": [(4.0, 1.0)], "whiten": [False],
}  # fmt: skip
BAD = {
    "rounds": [0, -1, 2.0, True, "3", None], "warmup": [-1, 0.5], "shift": [math.inf, math.nan, "x", None],
    "scale": [0, -1, math.inf, math.nan], "beta": [-1e-9, math.inf], "clip": [0, -0.1, math.nan],
    "decay": [-0.1, 1.1], "keep": [0, 1.5], "kind": ["c", None, 0], "loss": ["k3", "None"],
    "thresholds": [[1.0], (math.nan,), 1.0], "span": [(1.0,), (1.0, 2.0, 3.0)], "whiten": [1, "yes", None],
}  # fmt: skip


def test_every_kind_of_field_is_tried():
    assert GOOD.keys() == BAD.keys() == annotations(Config).keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_what_fits(name, value):
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_does_not(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*; expected ") as error:
        Config(**{name: value})
    assert repr(value) in str(error.value)


def test_errors_say_what_was_expected():
    for settings, message in [
        (dict(rounds=0), "rounds is 0; expected a whole number of at least 1."),
        (dict(scale=math.inf), "scale is inf; expected a finite number above 0."),
        (dict(clip=0), "clip is 0; expected a number above 0 or None."),
        (dict(keep=2), "keep is 2; expected a finite number above 0 and at most 1."),
        (dict(kind="c"), "kind is 'c'; expected one of 'a', 'b'."),
        (dict(span=(1.0,)), "span is (1.0,); expected a tuple of 2: a finite number, a finite number."),
    ]:
        with pytest.raises(ValueError, match="expected") as error:
            Config(**settings)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rounds", "8", 8), ("shift", "-1e-3", -1e-3), ("scale", "2", 2), ("clip", "None", None),
        ("clip", "inf", math.inf),
        ("clip", ".2", 0.2), ("kind", "b", "b"), ("loss", "k2", "k2"), ("loss", "none", None), ("whiten", "0", False),
        ("whiten", "True", True), ("thresholds", "1,2.5", (1.0, 2.5)), ("thresholds", "0.5", (0.5,)),
        ("thresholds", "", ()), ("span", "(2, 3)", (2.0, 3.0)),
    ],
)  # fmt: skip
def test_a_text_is_read_by_its_fields_annotation(name, text, value):
    read = parse(text, annotations(Config)[name])
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rounds", "2.5"),
        ("rounds", ""),
        ("scale", "-1"),
        ("kind", "c"),
        ("whiten", "maybe"),
        ("span", "1"),
        ("clip", "x"),
    ],
)
def test_a_text_that_means_nothing(name, text):
    with pytest.raises(ValueError, match="is not"):
        parse(text, annotations(Config)[name])


def test_fields_that_default_to_none_are_read_as_what_they_hold():
    read = {
        (ppo, "kl_loss", "k3"): "k3", (b2diffurl, "last_window", "4"): 4, (rlcm, "trained_actions", "2"): 2,
        (ddpo, "clip_range", "0.1"): 0.1, (constrained, "thresholds", "1,2"): (1.0, 2.0),
    }  # fmt: skip
    for (method, name, text), value in read.items():
        read = parse(text, annotations(method.Config)[name])
        assert read == value and type(read) is type(value)
