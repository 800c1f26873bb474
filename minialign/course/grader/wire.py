"""What passes between the grader and its sandbox: arguments in, results out. Always JSON, never a pickle.

    Packer, unpack                  arguments: tensors, numbers, containers, functions. This way is the trusted one.
    plain, read_result              results: tensors, numbers, strings, containers. Here whatever comes is a claim.

`plain` runs in a process that belongs to the student, who may have replaced it; so `read_result`, in the grader,
refuses whatever `plain` would not have written, and builds nothing of a type that the bytes name.
"""

import base64
import builtins
import dis
import importlib
import json
import marshal
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minialign.course.observe import TENSORS, Outcome

MAX_DEPTH = 20  # of containers in a result
MAX_LEAVES, MAX_KEY = 10_000, 60  # of one result; characters of a key. Comparing writes out each leaf's whole path
TEXT = 600  # characters kept of a message or string
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


class Unreadable(Exception):
    """A submission, or a result, that is not what it should be. Its text is the message to the student."""


# ---------------------------------------------------------------------------------- arguments, on their way in


class Packer:
    """Arguments as JSON. Functions travel as code, with the globals that they name; a forbidden one raises ValueError.

    This way is the trusted one: what the grader sends, the sandbox believes.
    """

    def __init__(self, forbidden: Sequence[Callable] = ()):
        self.forbidden = {id(function) for function in forbidden}
        self.functions, self.numbers = [], {}

    def pack(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if kind in TENSORS:
            return {"tensor": _tensor_out(value)}
        if kind in (list, tuple):
            return {kind.__name__: [self.pack(item) for item in value]}
        if kind is dict:
            return {"dict": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        if isinstance(value, torch.Generator):
            return {"generator": _tensor_out(value.get_state())}
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            scalar = isinstance(value, np.generic)
            return {"numpy": [value.dtype.str, value.shape, _base64(np.ascontiguousarray(value).tobytes()), scalar]}
        if isinstance(value, torch.dtype | torch.device):
            return {"torch": str(value).removeprefix("torch."), "device": isinstance(value, torch.device)}
        if isinstance(value, types.ModuleType):
            return {"import": [value.__name__, ""]}
        if id(value) in self.forbidden:
            raise ValueError("it leads to an answer, which must not enter the sandbox")
        if name := _importable(value):
            return {"import": name}
        if isinstance(value, types.FunctionType):
            return {"function": self._function(value)}
        if hasattr(value, "__dict__") and (name := _importable(kind)):
            return {"object": name, "items": self.pack(dict(vars(value)))}
        raise ValueError(f"the grader cannot send an object of type {kind.__name__}")

    def _function(self, function: types.FunctionType) -> int:
        while hasattr(function, "__wrapped__") and "jaxtyping" in function.__code__.co_filename:
            function = function.__wrapped__  # in tests, annotations are checked; the sandbox has no such hook
        if id(function) not in self.numbers:
            number = self.numbers[id(function)] = len(self.functions)
            self.functions.append(None)  # its place is taken before its globals are looked at: they may name it
            names = {name for name in _globals(function.__code__) if name in function.__globals__}
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
            self.functions[number] = {
                "code": _base64(marshal.dumps(function.__code__)),
                "globals": self.pack({name: function.__globals__[name] for name in sorted(names)}),
                "defaults": self.pack(function.__defaults__),
                "keywords": self.pack(function.__kwdefaults__),
                "cells": self.pack(cells),
            }
        return self.numbers[id(function)]


def unpack(packed: Any, functions: Sequence[dict], made: dict | None = None) -> Any:
    """What Packer.pack made `packed` of."""
    made = {} if made is None else made
    if not isinstance(packed, dict):
        return packed
    (kind, value), *rest = packed.items()
    if kind == "tensor":
        return _tensor_in(value)
    if kind in ("list", "tuple"):
        items = (unpack(item, functions, made) for item in value)
        return list(items) if kind == "list" else tuple(items)
    if kind == "dict":
        return {unpack(key, functions, made): unpack(item, functions, made) for key, item in value}
    if kind == "generator":
        generator = torch.Generator()
        return generator.set_state(_tensor_in(value))
    if kind == "numpy":
        array = np.frombuffer(base64.b64decode(value[2]), dtype=value[0]).reshape(value[1]).copy()
        return array[()] if value[3] else array
    if kind == "torch":
        return torch.device(value) if packed["device"] else getattr(torch, value)
    if kind == "import":
        found = importlib.import_module(value[0])
        for part in filter(None, value[1].split(".")):
            found = getattr(found, part)
        return found
    if kind == "object":
        new = object.__new__(unpack({"import": value}, functions))
        vars(new).update(unpack(rest[0][1], functions, made))
        return new
    if value not in made:
        parts = functions[value]
        scope = {"__builtins__": builtins}
        cells = [types.CellType() for _ in parts["cells"]["list"]]
        code = marshal.loads(base64.b64decode(parts["code"]))
        defaults = unpack(parts["defaults"], functions, made)
        made[value] = types.FunctionType(code, scope, closure=tuple(cells), argdefs=defaults)
        made[value].__kwdefaults__ = unpack(parts["keywords"], functions, made)
        scope |= unpack(parts["globals"], functions, made)
        for cell, content in zip(cells, parts["cells"]["list"], strict=True):
            cell.cell_contents = unpack(content, functions, made)
    return made[value]


def _globals(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


def _importable(value: Any) -> list[str] | None:
    """[module, qualified name] if that leads to `value` in the sandbox, too, where minialign.course is empty."""
    name = getattr(value, "__qualname__", None)
    for module in filter(None, (getattr(value, "__module__", None), "torch")):
        if isinstance(name, str) and not module.startswith(("minialign.course", "__main__")) and module in sys.modules:
            found = sys.modules[module]
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is value and _installed(module):
                return [module, name]
    return None


def _installed(module: str) -> bool:
    """Whether the sandbox has the module: the package's own, the standard library's, or an installed one."""
    file = getattr(sys.modules[module], "__file__", None)
    return file is None or module.startswith("minialign.") or file.startswith((sys.prefix, sys.base_prefix))


def _tensor_out(tensor: torch.Tensor) -> list:
    """[dtype, shape, order of the axes in memory, bytes]: dense strides are kept, as by clone()."""
    tensor = tensor.detach().clone()
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    raw = tensor.permute(order).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), order, _base64(raw)]


def _tensor_in(packed: list) -> torch.Tensor:
    dtype, shape, order, raw = packed
    buffer = bytearray(base64.b64decode(raw))
    tensor = torch.frombuffer(buffer, dtype=getattr(torch, dtype)) if buffer else torch.empty(0)
    tensor = tensor.to(getattr(torch, dtype)).clone().view([shape[axis] for axis in order])
    return tensor.permute([order.index(axis) for axis in range(len(order))]) if order else tensor


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


# ---------------------------------------------------------------------------------- results, on their way out


def plain(outcome: Outcome) -> dict:
    """The outcome as JSON; an object that is none of tensor, number, string and container only leaves its type."""
    return {
        "value": _plain(outcome.value),
        "error": str(outcome.error)[:100],
        "trace": str(outcome.trace)[:TEXT],
        "mutated": list(outcome.mutated),
        "grads": {name: _plain(grad) for name, grad in outcome.grads.items()},
    }


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return value[:TEXT]
    if type(value) is float or isinstance(value, np.floating):
        return float(value)
    if (type(value) is int or isinstance(value, np.integer)) and abs(int(value)) < 2**63:
        return int(value)
    if value is ...:
        return {"ellipsis": 1}
    if type(value) in TENSORS and value.layout == torch.strided and value.device.type == "cpu":
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype in DTYPES:
            raw = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return {"tensor": [dtype, list(value.shape), _base64(raw)]}
    if depth < MAX_DEPTH and isinstance(value, tuple | list):
        return {"list": [_plain(item, depth + 1) for item in value]}
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {"dict": [[_plain(key, depth + 1), _plain(item, depth + 1)] for key, item in value.items()]}
    return {"object": type(value).__name__[:60]}


# ---------------------------------------------------------------------------------- results, read by the grader


class Opaque:
    """Stands for an object that is no plain data; only the name of its type is known."""


def read_stated(body: bytes) -> dict[str, list[str]]:
    """{"uses": what it imports of minialign, "needs": earlier solutions}: the first line; empty if it is no such."""
    try:
        claim = json.loads(body.partition(b"\n")[0].decode("utf-8"))
        return {key: [str(name)[:100] for name in claim[key][:20]] for key in ("uses", "needs")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"uses": [], "needs": []}


def read_result(body: bytes, cases: Sequence[Mapping], grad_wrt: Sequence[str]) -> list[Outcome]:
    """The outcome of each case, from the bytes of a student's process, behind their first line. Raises Unreadable."""
    try:
        _, _, results = body.partition(b"\n")
        entries = json.loads(results.decode("utf-8"))
        if not isinstance(entries, list) or len(entries) != max(len(cases), 1):
            raise Unreadable("its result is not one outcome a case")
        budget = [MAX_LEAVES]
        return [_outcome(entry, case, grad_wrt, budget) for entry, case in zip(entries, cases or [{}], strict=True)]
    except Unreadable:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, RuntimeError):
        raise Unreadable("its result could not be read; something other than the grader's own code wrote it") from None


def _outcome(entry: Mapping, case: Mapping, grad_wrt: Sequence[str], budget: list[int]) -> Outcome:
    error, trace = entry["error"], entry["trace"]
    if not (isinstance(error, str) and isinstance(trace, str)):
        raise Unreadable("its result holds an exception that is no text")
    if error:
        return Outcome(error=error[:100], trace=trace[:TEXT])
    grads = {name: _value(entry["grads"].get(name), budget) for name in grad_wrt}
    if entry["value"] is not None:
        for name, grad in grads.items():
            if not isinstance(grad, torch.Tensor) or grad.shape != case[name].shape or grad.dtype != case[name].dtype:
                raise Unreadable(f"its result holds a gradient that does not fit {name}")
    mutated = tuple(name for name in case if name in entry["mutated"])
    return Outcome(_value(entry["value"], budget), mutated=mutated, grads=grads)


def _value(packed: Any, budget: list[int], depth: int = 0) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH + 1:
        raise Unreadable("its result is too large")
    if packed is None or isinstance(packed, bool | float):
        return packed
    if isinstance(packed, str):
        return packed[:TEXT]
    if isinstance(packed, int):
        if abs(packed) >= 2**63:
            raise Unreadable("its result holds a number beyond 64 bits")
        return packed
    ((kind, value),) = packed.items()
    if kind == "ellipsis":
        return ...
    if kind == "list":
        return [_value(item, budget, depth + 1) for item in value]
    if kind == "dict":
        pairs = [(_value(key, budget, depth + 1), _value(item, budget, depth + 1)) for key, item in value]
        odd = any(isinstance(key, torch.Tensor) or len(str(key)) > MAX_KEY for key, _ in pairs)
        if odd or len({key for key, _ in pairs}) != len(pairs):
            raise Unreadable("its result holds a dict with odd keys")
        return dict(pairs)
    if kind == "tensor":
        return _tensor(*value)
    if kind == "object":
        return type(value[:60] if value.isidentifier() else "object", (Opaque,), {})()
    raise Unreadable("its result holds something unknown")


def _tensor(dtype: str, shape: list, raw: str) -> torch.Tensor:
    if dtype not in DTYPES or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 32:
        raise Unreadable("its result holds a tensor of an unknown kind")
    data = base64.b64decode(raw, validate=True)
    kind, count = getattr(torch, dtype), 1
    for n in shape:
        count *= n
    if len(data) != count * kind.itemsize:
        raise Unreadable("its result holds a tensor whose size is not that of its shape")
    if kind is torch.bool and not set(data) <= {0, 1}:
        raise Unreadable("its result holds a truth value that is neither")
    return (torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)).view(shape)
