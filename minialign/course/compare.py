"""What one outcome did otherwise than another, in words; and which differences are of form only.

    difference(got, want)       the first thing that differs: exception, value, argument changed, gradient, or ''
    fitted(value, like)         `value` in the form of `like` where nothing but the form differs

A number for a tensor without axes, float64 for float32 or float32 for float64 (right to its digits), a list for a
tuple are forms of one answer: they pass, and `adapted` hands on a function that returns the form that the rest of the
notebook expects. (Where the text names a dtype, `Exercise.dtype` holds.)
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minialign.course.observe import TENSORS, Outcome, call, leaves

# Relative and absolute; 2e-2 for the half precisions. A float32 constant in a float64 case is right to seven digits.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


def difference(got: Outcome, want: Outcome, tolerance: float | None = None, equal_nan: bool = False) -> str:
    """In words, the first thing that `got` did otherwise than `want`; empty if nothing."""
    if got.error == "NoReturn":
        return f"returned nothing (None); expected {want.error or kind(want.value)}"
    if got.error or want.error:
        if got.error == want.error:
            return ""
        return f"raised {got.trace}" if got.error else f"raised nothing; expected {want.error}"
    if problem := unlike(got.value, want.value, tolerance, equal_nan):
        return "returned " + problem
    if changed := [name for name in got.mutated if name not in want.mutated]:
        return f"changed its argument {changed[0]} in place; it should leave its inputs as they are"
    for name, grad in want.grads.items():
        if grad.any() and not got.grads[name].any():
            return f"returned the right values, but no gradient flows back to {name}"
        if problem := unlike(got.grads[name], grad, tolerance, equal_nan):
            return f"returned the right values, but the gradient with respect to {name} is {problem}"
    return ""


def unlike(got: Any, want: Any, tolerance: float | None = None, equal_nan: bool = False) -> str:
    """What came and what was expected at the first leaf that differs in kind, shape, device or value, or ''."""
    came, got = got, fitted(got, want)
    loosest = max((TOLERANCE.get(leaf.dtype, 0.0) for _, leaf in leaves(came) if type(leaf) in TENSORS), default=0.0)
    mine, right = dict(leaves(got)), dict(leaves(want))
    if mine.keys() != right.keys():
        return f"{kind(came)}; expected {kind(want)}"
    for path, w in right.items():
        g, at = mine[path], path and f" in {path}"
        if kind(g) != kind(w):
            return f"{kind(g)}{at}; expected {kind(w)}"
        if isinstance(w, str | None):
            if g != w:
                return f"{g!r}{at}; expected {w!r}"
            continue
        g, w = tensor(g), tensor(w)
        tol = max(loosest, TOLERANCE.get(w.dtype, 2e-2)) if tolerance is None else tolerance
        # a right answer's nan is close to nothing; two wrong ones may share theirs
        close = torch.isclose(g, w, rtol=tol, atol=tol, equal_nan=equal_nan) if w.is_floating_point() else g == w
        if not close.all():
            index = tuple((~close).nonzero()[0].tolist())
            spot = f" at index {list(index)}" if index else ""
            g, w = _apart(g[index].item(), w[index].item())
            return f"{g}{spot}{at}; expected {w}"
    return ""


def fitted(got: Any, want: Any) -> Any:
    """`got` in the form of `want`: number or 0-d tensor, float64 or float32, a tensor's rows or a tuple of them.

    Dicts are left alone: what is kept from call to call should hold what the text says, not tensors with a graph.
    """
    if isinstance(want, tuple | list):
        if type(got) in TENSORS and got.ndim and want and len(got) == len(want):
            got = list(got.unbind())
        alike = isinstance(got, tuple | list) and len(got) == len(want)
        return type(want)(fitted(g, w) for g, w in zip(got, want, strict=True)) if alike else got
    if type(want) in TENSORS:
        parts = isinstance(got, tuple | list) and want.ndim == 1 and len(got) == len(want) > 0
        if parts and all(type(g) in TENSORS and g.ndim == 0 for g in got):
            got = torch.stack([g.to(got[0].dtype) for g in got])
        if is_number(got) and want.ndim == 0 and want.dtype != torch.bool:
            return torch.tensor(got, dtype=want.dtype if want.is_floating_point() else None)
        free = type(got) in TENSORS and got.dtype in TOLERANCE and want.dtype in TOLERANCE
        return got.to(want.dtype) if free else got
    if is_number(want):
        got = got.item() if type(got) in TENSORS and got.ndim == 0 and got.dtype != torch.bool else got
        whole = isinstance(want, int) and is_number(got) and float(got).is_integer()
        return int(got) if whole else got
    return got


def adapted(function: Callable, reference: Callable, names: Sequence[str], got: Outcome, want: Outcome) -> Callable:
    """`function`, or if its form or `names` are not the reference's, one that calls it and returns that form."""
    named = _names(function)
    same = [kind(leaf) for _, leaf in leaves(got.value)] == [kind(leaf) for _, leaf in leaves(want.value)]
    if same and (named is None or set(names) <= named):
        return function

    @functools.wraps(function)
    def fitting(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(reference).bind(*args, **kwargs).arguments
        value = call(function, given)
        floats = [v.dtype for v in given.values() if type(v) in TENSORS and v.is_floating_point()]
        return fitted(value, _as_dtype(want.value, floats[0]) if floats else want.value)

    fitting.__signature__ = inspect.signature(reference)
    return fitting


def _as_dtype(template: Any, dtype: torch.dtype) -> Any:
    """The reference's result, of the dtype of the present arguments; its lists were tuples."""
    if isinstance(template, tuple | list):
        return tuple(_as_dtype(item, dtype) for item in template)
    floating = type(template) in TENSORS and template.is_floating_point()
    return template.to(dtype) if floating and template.dtype != torch.float64 else template


def _names(function: Callable) -> set[str] | None:
    """Its parameters' names; None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


def is_number(value: Any) -> bool:
    """A Python or numpy number; a truth value is none."""
    return type(value) in (int, float) or isinstance(value, np.floating | np.integer)


def tensor(leaf: Any) -> Tensor:
    """A leaf as a tensor; numbers in float64."""
    return leaf if type(leaf) in TENSORS else torch.as_tensor(leaf, dtype=torch.float64)


def kind(value: Any) -> str:
    """In words: dtype and shape of a tensor, a number, how many values, the type of anything else."""
    if type(value) in TENSORS:
        where = "" if value.device.type == "cpu" else f", on {value.device}"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}{where}"
    if is_number(value):
        return "a number"
    if isinstance(value, tuple | list):
        return f"{len(value)} values" if value else "no value"
    return "nothing (None)" if value is None else f"an object of type {type(value).__name__}"


def numbers(values: Sequence | Mapping | Any) -> list[Tensor]:
    """All leaves that hold numbers, as float64."""
    return [tensor(leaf).double() for _, leaf in leaves(values) if type(leaf) in TENSORS or is_number(leaf)]


def _apart(got: float | int, want: float | int) -> tuple[str, str]:
    """Both, with as many digits as it takes to see that they differ."""
    for digits in range(6, 18):
        pair = f"{got:.{digits}g}", f"{want:.{digits}g}"
        if pair[0] != pair[1]:
            break
    return pair
