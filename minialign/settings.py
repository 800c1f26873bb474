"""Settings that check themselves: ranges and choices stand on a Config's fields, and are checked when one is made.

    @dataclass(frozen=True)
    class Config(Settings):
        num_iterations: Count = 50
        clip_range: Limit | None = None
        baseline: Literal["prompt", "batch"] = "prompt"

`Config(num_iterations=0)` raises ValueError: "num_iterations is 0; expected a whole number of at least 1." What two
fields must have in common, or a field and a policy, only the method can know: that is its `check`.
"""

import math
import types
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; `above`: low itself is not one of them.

    finite: infinity is not, whatever high is, nor what would be infinite in float32.
    """

    low: float | int = -math.inf
    high: float | int = math.inf
    above: bool = False
    finite: bool = True

    def __contains__(self, value: float | int) -> bool:
        if math.isnan(value) or (self.finite and abs(value) > FLOAT32_MAX):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"above {self.low:g}" if self.above else f"of at least {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'and ' if parts else ''}at most {self.high:g}")
        return " ".join(parts)


Count = Annotated[int, Range(1)]  # rounds, samples, passes
Natural = Annotated[int, Range(0)]  # what may be none
Number = Annotated[float | int, Range()]
Positive = Annotated[float | int, Range(0, above=True)]
NonNegative = Annotated[float | int, Range(0)]
Limit = Annotated[float | int, Range(0, above=True, finite=False)]  # a clip or a norm; math.inf is none
Fraction = Annotated[float | int, Range(0, 1)]
Share = Annotated[float | int, Range(0, 1, above=True)]  # of something, and not nothing of it


class Settings:
    """A base for frozen dataclasses of settings: making one with an impossible value raises ValueError."""

    __no_type_check__ = True  # it checks itself; a checker of annotations would come first, in other words

    def __post_init__(self) -> None:
        for name, annotation in annotations(type(self)).items():
            demand(annotation, **{name: getattr(self, name)})


def demand(annotation: Any, **values: Any) -> None:
    """The same check for arguments: `demand(Count, num_steps=num_steps)`. NumPy's and torch's scalars are numbers."""
    for name, value in values.items():
        value = value.item() if hasattr(value, "item") else value
        if not fits(value, annotation):
            raise ValueError(f"{name} is {value!r}; expected {expected(annotation)}.")


def annotations(settings: type) -> dict[str, Any]:
    """{field: what it may hold} of a Settings class."""
    return {field.name: field.type for field in fields(settings)}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a field of that annotation may hold the value. True is not 1."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return fits(value, parts[0]) and all(value in part for part in parts[1:] if isinstance(part, Range))
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in parts)
    if origin is tuple:
        items = (parts[0],) * len(value) if isinstance(value, tuple) and parts[1:] == (...,) else parts
        return isinstance(value, tuple) and len(value) == len(items) and all(map(fits, value, items))
    if annotation in (int, float):
        return isinstance(value, annotation) and not isinstance(value, bool)
    return value is None if annotation is type(None) else isinstance(value, annotation)


def expected(annotation: Any) -> str:
    """What a field of that annotation may hold, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, *ranges = parts
        finite = "a finite number" if kind is not int and any(part.finite for part in ranges) else expected(kind)
        return " ".join([finite, *map(str, ranges)]).strip()
    if annotation == float | int:
        return "a number"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        each = [expected(part) for part in parts if part is not ...]
        return f"a tuple, each {each[0]}" if parts[1:] == (...,) else f"a tuple of {len(each)}: {', '.join(each)}"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def parse(text: str, annotation: Any) -> Any:
    """A field's value from a command line, read by its annotation: `None`, `true`, `8`, `.5`, a choice, `1,2.5`.

    Raises ValueError, in the words of `expected`, for a text that means no value of that kind.
    """
    for read in (_none, _boolean, int, float, _numbers, str):
        try:
            value = read(text)
        except ValueError:
            continue
        if fits(value, annotation):
            return value
    raise ValueError(f"{text!r} is not {expected(annotation)}.")


def _none(text: str) -> None:
    if text.lower() not in ("none", "null"):
        raise ValueError


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise ValueError
    return known[text.lower()]


def _numbers(text: str) -> tuple[float | int, ...]:
    parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
    return tuple(int(part) if part.isdigit() else float(part) for part in parts)
