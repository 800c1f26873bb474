"""Run a student's function and say what it did, as plain data, knowing no reference and no answer.

Apart from `check`, so that a grader can observe in one process and judge in another.
"""

import copy
import dis
import inspect
import os
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TENSORS = (Tensor, torch.nn.Parameter)  # by type(), never isinstance: a subclass may redefine what == means


@dataclass(frozen=True)
class Outcome:
    """What one call did."""

    value: Any = None  # tensors, numbers and strings in lists and dicts
    error: str = ""  # the exception's type, or "NoReturn"
    trace: str = ""  # its message and the line of the student's that led to it
    mutated: tuple[str, ...] = ()  # arguments changed in place
    grads: Mapping[str, Tensor] = field(default_factory=dict)  # of a weighted sum of the value; zero if detached


def observe(function: Any, case: Mapping[str, Any], grad_wrt: Sequence[str] = ()) -> Outcome:
    """Call `function(**case)` on copies, silenced; torch's global random numbers start at 0 and are put back."""
    given = {name: _copy(value) for name, value in case.items()}
    sources = {name: given[name].requires_grad_() for name in grad_wrt}
    given |= {name: source.clone() for name, source in sources.items()}  # no leaves: they may change in place
    try:
        with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a graded cell with anything on stderr earns nothing
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.default_generator.manual_seed(0)
                value = call(function, given)
            if value is None and not _untouched(function):
                return Outcome(error="NoReturn", trace="NoReturn: it computes something, and returns nothing")
            mutated = tuple(name for name in case if _bits(given[name]) != _bits(case[name]))
            return Outcome(_detach(value), mutated=mutated, grads=_gradients(value, sources))
    except (Exception, SystemExit) as error:
        return Outcome(error=type(error).__name__, trace=_blame(error, function))


def call(function: Callable, given: Mapping[str, Any]) -> Any:
    """By name; by position if the student's parameters are as many, and are called otherwise."""
    try:
        signature = inspect.signature(function)
        signature.bind(**given)
    except TypeError:  # no such names
        try:
            signature.bind(*given.values())
        except (TypeError, NameError):  # nor so many: the call itself says it best
            return function(**given)
        return function(*given.values())
    except ValueError:  # a builtin without a signature
        pass
    return function(**given)


def _untouched(function: Any) -> bool:
    """Is it a stub, a `def` of nothing but a docstring, `...` or `pass`? (A lambda that returns None was written.)"""
    code = getattr(function, "__code__", None)
    if code is None or code.co_name == "<lambda>":
        return False
    idle = ("RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "POP_TOP", "CACHE", "COPY_FREE_VARS")
    return all(step.opname in idle for step in dis.get_instructions(code))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested tuples, lists and dicts."""
    if isinstance(value, Mapping | tuple | list | deque):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{path}[{key!r}]")
    else:
        yield path, value


def _gradients(value: Any, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of the value's elements, weighted from 1 to 2: equally weighted, a whitened batch would have none."""
    outputs = [leaf for _, leaf in leaves(value) if type(leaf) in TENSORS and leaf.requires_grad]
    if not outputs or not sources:
        return {name: torch.zeros_like(source) for name, source in sources.items()}
    weights = (torch.linspace(1, 2, out.numel(), dtype=torch.float64).to(out).reshape(out.shape) for out in outputs)
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, list(sources.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(sources, grads, strict=True))


def _blame(error: BaseException, function: Any) -> str:
    """The message, and the last line of the file (or cell) that holds the function."""
    home = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == home]
    where = f"\n    line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _detach(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _detach(item) for key, item in value.items()}
    if isinstance(value, tuple | list | deque):
        return [_detach(item) for item in value]
    return value.detach() if type(value) in TENSORS else value


def _bits(value: Any) -> dict[str, Any]:
    """What an argument holds, bit for bit, so that nan equals itself; other objects are not looked into."""
    bits = {}
    for path, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            raw = leaf.detach().cpu().flatten().contiguous().view(torch.uint8)
            bits[path] = tuple(leaf.shape), raw.numpy().tobytes()
        else:
            bits[path] = repr(leaf) if type(leaf) in (bool, int, float, str) else None
    return bits
