"""Why an answer is wrong, in one sentence: a listed mistake, its form, an exception, a mutant, or the kinds of input.

    diagnose(attempt)       the hint, and whether it is one about shapes

All that is known is what the student's function did (`Outcome`), so a grader may ask as well, in a process of its own.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from minialign.course.compare import TOLERANCE, difference, kind, numbers, tensor, unlike
from minialign.course.observe import TENSORS, Outcome, leaves, observe
from minialign.course.search import Attempt, as_if


def diagnose(attempt: Attempt) -> tuple[str, bool]:
    """The hint; and is it about shapes?"""
    first = next(i for i, problem in enumerate(attempt.problems) if problem)
    got, want = attempt.outcomes[first], attempt.wanted[first]
    if hint := _no_return(attempt) or _listed(attempt) or _form(attempt):
        return hint, "shape" in hint
    if hint := _exception(attempt):
        return hint, "axes" in hint or "shape" in hint
    if hint := _in_place(got, want) or _cut_off(got, want) or as_if(attempt) or _part(attempt):
        return hint, False
    if hint := _shape(got, want):
        return hint, True
    return _digits(attempt) or _place(attempt) or _hint(got, want) or _factor(attempt) or _kinds(attempt), False


# ---- what the listed mistakes and the form tell ----------------------------------------------------------------------


def _no_return(attempt: Attempt) -> str:
    missing = [got.error == "NoReturn" for got in attempt.outcomes]
    if all(missing):
        return "a `return` is missing: the function computes something, and hands nothing back."
    return "in some cases the function ends without a `return`." if any(missing) else ""


def _listed(attempt: Attempt) -> str:
    """The hint of the first mistake whose function does what the student's did, on every case."""
    if all(got.error for got in attempt.outcomes):  # two functions that only raise have little in common
        return ""
    for hint, mistake in attempt.exercise.mistakes.items():
        pairs = zip(attempt.outcomes, attempt.cases, strict=True)
        theirs = ((got, observe(mistake, case, attempt.exercise.grad_wrt)) for got, case in pairs)
        if not any(difference(got, other, attempt.exercise.tolerance, equal_nan=True) for got, other in theirs):
            return hint
    return ""


def _form(attempt: Attempt) -> str:
    """The values are right in every case, and something else is not: dtype, shape, list, gradient."""
    if any(got.error or want.error for got, want in zip(attempt.outcomes, attempt.wanted, strict=True)):
        return ""
    pairs = [(got.value, want.value) for got, want in zip(attempt.outcomes, attempt.wanted, strict=True)]
    i = next((i for i, (got, want) in enumerate(pairs) if unlike(got, want, attempt.exercise.tolerance)), None)
    if attempt.exercise.dtype and i is None:
        i = next((i for i, problem in enumerate(attempt.problems) if problem.startswith("returned a float")), None)
    if i is None:
        return ""
    came, due = pairs[i]
    for words, change in FORMS.items():
        with suppress(Exception):
            if not any(unlike(change(got, want), want, attempt.exercise.tolerance) for got, want in pairs):
                return words.format(came=kind(came), due=kind(due))
    return ""


def _both(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """A change of every leaf that is a tensor."""

    def changed(got: Any, want: Any) -> Any:
        if isinstance(want, list | tuple) and isinstance(got, list | tuple):
            return [changed(g, w) for g, w in zip(got, want, strict=True)]
        return change(got, want) if type(got) in TENSORS else got

    return changed


FORMS = {  # words -> change of (got, want) that makes the answer right
    "the values are right; only the dtype is not: {came}, where {due} is due. A list becomes float32 in torch.tensor, "
    "and so does torch.zeros(n): give them the dtype of what came in.": _both(lambda g, w: g.to(w.dtype)),
    "the values are right; only the shape is not: {came}, where {due} is due.": _both(
        lambda g, w: g.reshape(w.shape).to(w.dtype) if g.squeeze().shape == w.squeeze().shape else g
    ),
    "the values are right, but two axes have changed places: {came}, where {due} is due (shape).": _both(
        lambda g, w: g.mT if g.shape != w.shape else g
    ),
    "the values are right; only what holds them is not: {came}, where {due} is due (torch.stack or torch.tensor).": (
        lambda g, w: torch.stack([torch.as_tensor(item, dtype=w.dtype) for item in g])
    ),
    "the values are right, in the wrong order: what is returned first should come last.": lambda g, w: g[::-1],
    "only the first of the things to be returned is there; it is right.": lambda g, w: _only(g, w, 0),
    "only the last of the things to be returned is there; it is right.": lambda g, w: _only(g, w, -1),
}


def _only(got: Any, want: Any, at: int) -> Any:
    return want if isinstance(want, list) and not unlike(got, want[at]) else got


def _in_place(got: Outcome, want: Outcome) -> str:
    changed = [name for name in got.mutated if name not in want.mutated]
    if got.error or unlike(got.value, want.value) or not changed:
        return ""
    return f"the values are right, but `{changed[0]}` is the caller's: work on a copy (clone(), a new list or dict)."


def _cut_off(got: Outcome, want: Outcome) -> str:
    due = [name for name, grad in want.grads.items() if grad.any()]
    if got.error or not due or unlike(got.value, want.value) or any(got.grads[name].any() for name in due):
        return ""
    return "the values are right; detach(), item(), numpy or no_grad cut the result off from its inputs (the gradient)."


EXCEPTIONS = {  # a pattern of the message -> hint
    r"missing \d+ required|unexpected keyword|takes \d+ positional": "it takes other arguments than the given `def`: "
    "leave that line as it was.",
    r"name '(\w+)' is not defined|local variable '(\w+)'|cannot access": "a name is used that is not defined at that "
    "line: a typing error, or it is set in one branch only.",
    r"must match the size|same size|not broadcastable|shape mismatch|invalid for input|mat1 and mat2|size mismatch|"
    r"vector \+ matrix|inconsistent tensor|expanded size|can't be broadcast|equal size": "two shapes do not meet: "
    "print them. PyTorch lines up the last axes; unsqueeze gives (n,) the axis that it lacks.",
    r"but found|same dtype|expected scalar type|expected \w+ dtype": "two dtypes do not meet, float32 and float64: a "
    "list becomes float32 in torch.tensor unless it is told dtype=...",
    r"Dimension out of range|too many indices|IndexError: index|out of bounds|out of range": "an axis or an index is "
    "asked for that is not there: print the shape and the index.",
    r"has no attribute": "an object has no such method: is it a list or a number, where you think of a tensor?",
    r"in-place|inplace|leaf Variable": "autograd forbids a change in place here: build a new tensor.",
    r"requires grad|numpy\(\)": "numpy cannot take a tensor that has a gradient: stay with torch, or detach what is a "
    "constant.",
    r"division by zero": "there is a division by zero in this case: what is due there?",
    r"must be Tensor, not|must be tensor|argument 'input'": "a function of torch got a plain number: numbers take "
    "`** 0.5`, `abs` and math's functions.",
    r"only integer tensors|indices must be|list indices|cannot be interpreted as an integer|as an index": "an index "
    "must be a whole number, or a tensor of them: `//` instead of `/`, or int(...).",
    r"only one element tensors|ambiguous": "Python's `if`, `and`, `float` want one number, and got a whole tensor: use "
    "torch.where, `&`, or a loop.",
    r"unsupported operand|not supported between": "an operation got something that it cannot work with (None? a list? "
    "text?): print the types at that line.",
    r"KeyError": "a key is asked for that the dictionary does not have yet: .get(key, ...).",
    r"SystemExit|KeyboardInterrupt": "it ends the whole program: leave `exit` out.",
}


def _exception(attempt: Attempt) -> str:
    """If it raises wherever it is wrong: what such a message means."""
    failing = [i for i, problem in enumerate(attempt.problems) if problem]
    if not all(attempt.outcomes[i].error for i in failing) or attempt.wanted[failing[0]].error:
        return ""
    trace = attempt.outcomes[failing[0]].trace
    hint = next((hint for pattern, hint in EXCEPTIONS.items() if re.search(pattern, trace)), "")
    only = "" if len(failing) == len(attempt.problems) else _kinds(attempt, only=True)
    return f"{hint}{only}" if hint else ""


# ---- what the numbers alone tell -------------------------------------------------------------------------------------


def _part(attempt: Attempt) -> str:
    """Of several things returned, which are right?"""
    verdicts = set()
    for got, want in zip(attempt.outcomes, attempt.wanted, strict=True):
        if not (isinstance(got.value, list) and isinstance(want.value, list) and len(got.value) == len(want.value)):
            return ""
        pairs = zip(got.value, want.value, strict=True)
        verdicts |= {i for i, (g, w) in enumerate(pairs) if unlike(g, w, attempt.exercise.tolerance)}
    places = [("first", "second", "third", "fourth")[i] for i in sorted(verdicts)]
    if len(places) == len(attempt.wanted[0].value) or not places:
        return ""
    return f"of the things returned, only the {' and the '.join(places)} is wrong; the rest is right in every case."


def _place(attempt: Attempt) -> str:
    """If the wrong numbers stand in the same place in every case: where? At an end of an axis, or behind a mask."""
    found = []
    for case, got, want in zip(attempt.cases, attempt.outcomes, attempt.wanted, strict=True):
        mine, right = got.value, want.value
        if type(mine) not in TENSORS or type(right) not in TENSORS or mine.shape != right.shape or not right.ndim:
            return ""
        close = TOLERANCE.get(right.dtype, 0.0)
        wrong = ~torch.isclose(mine.double(), right.double(), rtol=close, atol=close)
        if wrong.any():
            found.append((wrong, dict(_places(case, wrong))))
    for words in found[0][1] if found else ():
        places = [places.get(words) for _, places in found]
        there = [at is not None and not (wrong & ~at).any() for at, (wrong, _) in zip(places, found, strict=True)]
        if all(there) and not all(at.all() for at in places):
            return f"your values are right in all places but these: {words}."
    return ""


def _places(case: Mapping, wrong: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Words, and True there."""
    for name, mask in case.items():
        if type(mask) in TENSORS and mask.dtype == torch.bool and mask.shape == wrong.shape[: mask.ndim]:
            mask = mask.reshape(*mask.shape, *[1] * (wrong.ndim - mask.ndim))
            yield f"where `{name}` is False", ~mask.expand(wrong.shape)
            yield f"where `{name}` is True", mask.expand(wrong.shape)
    for axis in range(-1, -1 - min(wrong.ndim, 2), -1):
        at = torch.arange(wrong.shape[axis]).view(-1, *[1] * (-1 - axis)).expand(wrong.shape)
        where = "" if wrong.ndim == 1 else f" of axis {axis + wrong.ndim}"
        last = wrong.shape[axis] - 1
        yield f"the first{where}", at == 0
        yield f"the last{where}", at == last
        yield f"all but the last{where}", at < last
        yield f"all but the first{where}", at > 0


def _shape(got: Outcome, want: Outcome) -> str:
    mine, right = got.value, want.value
    if type(mine) not in TENSORS or type(right) not in TENSORS:
        return ""
    came, due = tuple(mine.shape), tuple(right.shape)
    suggestions = [
        (came == (*due, 1), "a last axis of size 1 is left over; against (batch,) it silently makes (batch, batch)."),
        (len(due) == 1 and came == due * 2, "(batch, 1) met (batch,), which silently makes (batch, batch)."),
        (came != due and came == due[::-1], "two axes are swapped."),
        (len(came) < len(due), "an axis too many was reduced."),
        (len(came) > len(due), "some axes are still to be reduced."),
    ]
    return next((hint for applies, hint in suggestions if applies), "")


def _digits(attempt: Attempt) -> str:
    """If the values are right to some digits in all cases: to how many?"""
    worst, tolerance = 0.0, attempt.exercise.tolerance
    if not any(unlike(g.value, w.value, tolerance) for g, w in zip(attempt.outcomes, attempt.wanted, strict=True)):
        return ""  # the gradients are wrong
    for got, want in zip(attempt.outcomes, attempt.wanted, strict=True):
        mine, right = numbers(got.value), numbers(want.value)
        if got.error or want.error or [m.shape for m in mine] != [r.shape for r in right]:
            return ""
        for m, r in zip(mine, right, strict=True):
            off = ((m - r).abs() / r.abs().clamp_min(1e-3)).nan_to_num(torch.inf)
            worst = max(worst, off[m != r].max().item() if (m != r).any() else 0.0)
    if not 0 < worst < 1e-3:
        return ""
    digit = max(int(-torch.tensor(worst).log10().floor().item()), 4)
    return f"differs in the {digit}th digit only: a float32 constant, rounding, or a small constant (an eps)?"


def _hint(got: Outcome, want: Outcome) -> str:
    """What the kind of failure alone suggests."""
    if got.error or want.error or got.mutated != want.mutated:
        return "call your function on this case in a cell of your own, and look at each line."
    mine, right = got.value, want.value
    if type(mine) not in TENSORS or type(right) not in TENSORS:
        return "" if kind(mine) == kind(right) else "the docstring says what to return."
    suggestions = [
        (mine.dtype != right.dtype, "a constant or a conversion brought in another dtype."),
        (mine.isnan().any(), "nan comes from 0/0, inf - inf, log(0) or the root of a negative number."),
    ]
    return next((hint for applies, hint in suggestions if applies), "")


def _factor(attempt: Attempt) -> str:
    """A hint if all values of all cases are off by one factor or by one constant."""
    pairs = [
        (tensor(g).flatten().double(), tensor(w).flatten().double())
        for got, want in zip(attempt.outcomes, attempt.wanted, strict=True)
        for (_, g), (_, w) in zip(leaves(got.value), leaves(want.value), strict=False)
        if kind(g) == kind(w) and not isinstance(w, str | None)
    ]
    if not pairs:
        return ""
    mine, right = (torch.cat(values) for values in zip(*pairs, strict=True))
    for form, off, neutral in (("{:.4g} times", mine / right, 1), ("{:.4g} more than", mine - right, 0)):
        off = off[right != 0]
        if len(off) > 1 and off.std() <= 1e-4 * off.mean().abs() and (off.mean() - neutral).abs() > 1e-3:
            return f"in every case your values are {form.format(off.mean().item())} the expected ones."
    return ""


def _kinds(attempt: Attempt, only: bool = False) -> str:
    """For which kinds of input it is right, and for which wrong."""
    right = dict.fromkeys(label for label, problem in _labelled(attempt) if not problem)
    wrong = dict.fromkeys(label for label, problem in _labelled(attempt) if problem)
    sorted_out = [label for label in right if label not in wrong], list(wrong)
    said = "".join(
        f" {word}: {', '.join(kinds)}." for word, kinds in zip(("Right", "Wrong"), sorted_out, strict=True) if kinds
    )
    if only:
        return said
    hint = "none of the usual mistakes. Work this case out by hand, term by term."
    return hint + (said if attempt.labels and sorted_out[0] else "")


def _labelled(attempt: Attempt) -> Iterator[tuple[str, str]]:
    return zip(attempt.labels, attempt.problems, strict=False)
