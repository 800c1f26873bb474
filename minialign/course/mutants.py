"""Wrong answers, made of right ones: every change of one place in a function's syntax tree, each with its name.

    mutants(function)               (words, function) of each: "as if" a factor, root, sign, axis or index were wrong
    parameter_mutants(function)     the same for a whole parameter: squared, zeroed, exchanged with another
    RESULTS                         changes of a result: its sign, its sum, its root

A student's answer whose values are those of a mutant has made that mistake, whichever way it is written. Mutants are
built when an answer is wrong, and kept; they run in a copy of the function's namespace, and no loop of theirs is longer
than LIMIT. What is changed, and how that is called, stands in `operators`.
"""

import ast
import copy
import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from minialign.course.operators import OPERATORS, UNARY, is_library, make

LIMIT = 2_000  # rounds of one loop; every case is far smaller


class Mutant(NamedTuple):
    words: str  # after "as if"
    function: Callable


# ---- building --------------------------------------------------------------------------------------------------------


@functools.cache
def mutants(function: Callable) -> tuple[Mutant, ...]:
    """All of them; none if the function's source cannot be had."""
    function = inspect.unwrap(function)  # tests decorate the whole package
    if not isinstance(function, types.FunctionType):
        return ()
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    space = function.__globals__ | {name: cell.cell_contents for name, cell in cells} | {"torch": _QUIET}
    space |= {"__limited": _limited, "__ticking": _ticking}
    made = []
    for words, code in _compiled(function.__code__, function.__module__):
        exec(code, space)
        made.append(Mutant(words, space["mutant"]))
    return tuple(made)


@functools.cache
def _compiled(code: types.CodeType, module: str | None) -> tuple[tuple[str, types.CodeType], ...]:
    """Words and code of each; functions that differ in their closures alone have them in common."""
    tree, made = _tree(code, sys.modules.get(module)), []
    if tree is None:
        return ()
    _annotate(tree)
    whole = ast.fix_missing_locations(ast.Module([tree], []))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's opinion of a mutant
        for node, put in list(_sites(tree)):
            for wrong, words in (found for change in OPERATORS for found in change(node)):
                put(ast.fix_missing_locations(wrong))
                with suppress(SyntaxError, ValueError, TypeError):  # no Python: an assignment to a sum, say
                    made.append((words, compile(whole, "<mutant>", "exec")))
                put(node)
    return tuple(made)


def _tree(code: types.CodeType, module: types.ModuleType | None) -> ast.FunctionDef | None:
    """A function's own tree, out of its module's; a lambda's as a function."""
    parsed = module and _parsed(module)
    for node in ast.walk(parsed) if parsed else ():
        first = min([getattr(node, "lineno", 0), *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if isinstance(node, ast.FunctionDef | ast.Lambda) and first == code.co_firstlineno:
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if names == list(code.co_varnames[: len(names)]) and getattr(node, "name", "<lambda>") == code.co_name:
                return _as_function(copy.deepcopy(node))
    return None


def _as_function(node: ast.FunctionDef | ast.Lambda) -> ast.FunctionDef:
    body = [ast.Return(node.body)] if isinstance(node, ast.Lambda) else node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # the docstring
    plain = ast.parse("def mutant(): pass").body[0]
    plain.args, plain.body = node.args, body
    plain.args.defaults, plain.args.kw_defaults = [], [None] * len(node.args.kwonlyargs)
    for argument in plain.args.args:
        argument.annotation = None
    return _Bounded().visit(plain)


class _Bounded(ast.NodeTransformer):
    """No loop goes on for ever, whatever became of its condition."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        node.iter = make("__limited(A)", A=node.iter)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.comprehension:
        self.generic_visit(node)
        node.iter = make("__limited(A)", A=node.iter)
        return node

    def visit_While(self, node: ast.While) -> list[ast.stmt]:
        self.generic_visit(node)
        node.body.insert(0, ast.parse("next(__ticks)").body[0])
        return [ast.parse("__ticks = __ticking()").body[0], node]


def _limited(items: Iterable) -> Iterator:
    for i, item in enumerate(items):
        if i > LIMIT:
            raise RuntimeError("too many rounds")
        yield item


def _finite(function: Callable) -> Callable:
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not all(arg.isfinite().all() for arg in args if isinstance(arg, torch.Tensor)):
            raise ValueError("nan")
        return function(*args, **kwargs)

    return checked


class _Quiet(types.ModuleType):
    """torch, but LAPACK is not asked about nan: it would print its opinion past all of Python's redirections."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_QUIET = _Quiet("torch")
_QUIET.linalg = types.SimpleNamespace(**vars(torch.linalg))
_QUIET.linalg.lstsq = _finite(torch.linalg.lstsq)


def _ticking() -> Iterator[int]:
    yield from _limited(iter(int, 1))


@functools.cache
def _parsed(module: types.ModuleType) -> ast.Module | None:
    try:
        return ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # defined in a session
        return None


def _annotate(tree: ast.FunctionDef) -> None:
    """Tell each name that is read which others could stand there."""
    parameters = [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)]
    stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    known = list(dict.fromkeys([*parameters, *stored]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
            node.parameter, node.parameters = node.id in parameters, parameters
            node.others = [name for name in known if name != node.id and not name.startswith("_")]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            node.known_parameters = parameters


def _sites(node: ast.AST) -> Iterator[tuple[ast.AST, Callable]]:
    """(node, what puts another in its place) of all nodes but those that name a function."""
    for field, value in ast.iter_fields(node):
        if field in ("args", "ctx", "op") and not isinstance(value, list):
            continue
        if isinstance(node, ast.Call) and field == "func":
            if isinstance(value, ast.Attribute) and not is_library(value.value):
                yield value.value, functools.partial(setattr, value, "value")
                yield from _sites(value.value)
            continue
        for i, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, ast.AST):
                put = functools.partial(setattr, node, field) if i is None else functools.partial(value.__setitem__, i)
                yield item, put
                yield from _sites(item)


# ---- parameters and results ------------------------------------------------------------------------------------------


@functools.cache
def parameter_mutants(function: Callable) -> tuple[Mutant, ...]:
    """Of every parameter as a whole, wherever it is used; and of each pair, exchanged."""
    names = list(inspect.signature(function).parameters)
    made = []
    for i, name in enumerate(names):
        for source, words in UNARY.items():
            made.append(Mutant(words.format(f"`{name}`"), _with(function, name, CHANGES[source])))
        for other in names[i + 1 :]:
            made.append(Mutant(f"`{name}` and `{other}` had changed places", _swapped(function, name, other)))
    return tuple(made)


def _with(function: Callable, name: str, change: Callable) -> Callable:
    finite = _finite(lambda changed, given: function(**given | {name: changed}))
    return lambda **given: finite(change(given[name]), given)


def _swapped(function: Callable, one: str, other: str) -> Callable:
    return lambda **given: function(**given | {one: given[other], other: given[one]})


def _value(source: str) -> Callable[[Any], Any]:
    return eval(compile(f"lambda A: {source}", "<change>", "eval"), {"torch": torch})


CHANGES = {source: _value(source) for source in UNARY}
RESULTS = {words.format("the result"): CHANGES[source] for source, words in UNARY.items() if "detach" not in source} | {
    "the result were twice as large": _value("2 * A"),
    "the result were half as large": _value("A / 2"),
    "the result were averaged over its last axis": _value("A.mean(-1)"),
    "the result were summed over its last axis": _value("A.sum(-1)"),
    "the result were a mean over its first axis": _value("A.mean(0)"),
    "the result were normalised to sum 1": _value("A / A.sum()"),
    "the result were a softmax": _value("A.softmax(-1)"),
    "the result were sorted": _value("A.sort().values"),
    "the result were in bits, or another base of the logarithm": _value("A / torch.tensor(2.0, dtype=A.dtype).log()"),
}
