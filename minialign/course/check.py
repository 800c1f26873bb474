"""Self-checks of the exercises: decide first, then diagnose, and hand on a working function either way.

    gaussian_log_prob, points = check("01/gaussian_log_prob", gaussian_log_prob)

An answer is right if on every case it does what the reference does: values, shape, dtype, device, exceptions, arguments
left alone, gradients where the exercise asks for them. Only then are the usual mistakes recomputed, to name the one
that was made.
"""

import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minialign.course.observe import TENSORS, Outcome, leaves, observe

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative and absolute; 2e-2 for the half precisions
GO_ON = "  Until then the notebook goes on with the package's own version."


@dataclass(frozen=True)
class Exercise:
    name: str  # "01/gaussian_log_prob": chapter, then the function
    points: int | float
    reference: Callable  # what is handed on to a student who has not passed
    cases: Sequence  # keyword arguments: a dict, or a function of a torch.Generator that draws one
    mistakes: Mapping = field(default_factory=dict)  # hint -> function with that mistake, same arguments
    grad_wrt: Sequence[str] = ()  # arguments whose gradients must agree too
    draws: int = 4  # fresh draws of each drawn case
    tolerance: float | None = None  # instead of TOLERANCE

    def draw(self, seed: int | None = None) -> list[dict]:
        """Fixed cases as they are, drawn ones afresh: from `seed`, or from the operating system's entropy if None."""
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        return [
            dict(case(generator)) if callable(case) else dict(case)
            for case in self.cases
            for _ in range(self.draws if callable(case) else 1)
        ]


@dataclass(frozen=True)
class Quiz:
    name: str  # "01/q1"
    points: int | float
    answer: str
    why: Mapping[str, str]  # option -> why it is right, or why it tempts and is wrong (without naming the right one)


class Verdict(NamedTuple):
    status: str  # "passed", "wrong" or "not attempted"
    points: float
    text: str


def registered(chapter: str) -> list[Exercise | Quiz]:
    """What `chapter_NN.py` registers; nothing if there is no such module."""
    module = f"minialign.course.chapters.chapter_{chapter}"
    try:
        return importlib.import_module(module).exercises
    except ModuleNotFoundError as error:
        if error.name != module:  # the module is there, and misses something itself
            raise
        return []


def find(name: str) -> Exercise | Quiz:
    """The exercise of that name; ValueError with the nearest name if there is none."""
    chapter = name.partition("/")[0]
    exercises = {exercise.name: exercise for exercise in registered(chapter)}
    if name not in exercises:
        near = "".join(f"; did you mean {other!r}?" for other in difflib.get_close_matches(name, exercises, 1)) or "."
        raise ValueError(f"unknown exercise {name!r}{near} Chapter {chapter} has: {', '.join(exercises) or 'none'}.")
    return exercises[name]


def check(name: str, function: Any, seed: int | None = None) -> tuple[Callable, float]:
    """Print a verdict on `function`; return it if it passed, else the package's own, and the points earned."""
    exercise = find(name)
    if function is exercise.reference:  # this cell was run twice: without this line the second time would pass
        verdict = _not_attempted(exercise, " (This is the package's own: run the cell with yours, then this one.)")
    elif function is None or function is ...:
        verdict = _not_attempted(exercise)
    else:
        cases = exercise.draw(seed)
        verdict = judge(exercise, cases, [observe(function, case, exercise.grad_wrt) for case in cases])
    print(verdict.text)
    return function if verdict.status == "passed" else exercise.reference, verdict.points


def quiz(name: str, answer: Any) -> float:
    """Print why `answer`, a letter, is right or wrong; return the points earned."""
    question = find(name)
    given = answer.strip().lower() if type(answer) is str else ""
    points = float(question.points) if given == question.answer else 0.0
    if not given:
        print(_not_attempted(question).text)
    else:
        why = question.why.get(given, f"The answer is one of: {', '.join(question.why)}.")
        print(f"{name}: {'passed' if points else 'wrong'}, {points:g} of {question.points:g} points.\n  {why}")
    return points


def judge(exercise: Exercise, cases: Sequence[Mapping], outcomes: Sequence[Outcome]) -> Verdict:
    """The verdict on what a student's function did in `cases`, with the smallest failing one and a hint."""
    if all(o.error == "NotImplementedError" or (not o.error and (o.value is None or o.value is ...)) for o in outcomes):
        return _not_attempted(exercise)
    wanted = [observe(exercise.reference, case, exercise.grad_wrt) for case in cases]
    problems = [difference(got, want, exercise.tolerance) for got, want in zip(outcomes, wanted, strict=True)]
    failing = [i for i, problem in enumerate(problems) if problem]
    name, points = exercise.name, exercise.points
    if not failing:
        text = f"{name}: passed, {points:g} of {points:g} points ({len(cases)} cases)."
        return Verdict("passed", float(points), text)
    i = min(failing, key=lambda i: sum(leaf.numel() for _, leaf in leaves(cases[i]) if isinstance(leaf, Tensor)))
    hint = _usual_mistake(exercise, cases, outcomes) or _hint(outcomes[i], wanted[i]) or _factor(outcomes, wanted)
    text = (
        f"{name}: wrong, 0 of {points:g} points. The smallest of {len(failing)} failing cases, out of {len(cases)}:\n"
    )
    text += "".join(f"    {argument} = {_show(value)}\n" for argument, value in cases[i].items())
    hint = hint or "none of the usual mistakes. Work this case out by hand, term by term."
    return Verdict("wrong", 0.0, f"{text}  Your function {problems[i]}.\n  Hint: {hint}\n{GO_ON}")


def difference(got: Outcome, want: Outcome, tolerance: float | None = None) -> str:
    """In words, the first thing that `got` did otherwise than `want`; empty if nothing."""
    if got.error or want.error:
        if got.error == want.error:
            return ""
        return f"raised {got.trace}" if got.error else f"raised nothing; expected {want.error}"
    if problem := unlike(got.value, want.value, tolerance):
        return "returned " + problem
    if changed := [name for name in got.mutated if name not in want.mutated]:
        return f"changed its argument {changed[0]} in place; it should leave its inputs as they are"
    for name, grad in want.grads.items():
        if grad.any() and not got.grads[name].any():
            return f"returned the right values, but no gradient flows back to {name}"
        if problem := unlike(got.grads[name], grad, tolerance):
            return f"returned the right values, but the gradient with respect to {name} is {problem}"
    return ""


def unlike(got: Any, want: Any, tolerance: float | None = None) -> str:
    """What came and what was expected at the first leaf that differs in type, shape, dtype, device or value, or ''."""
    mine, right = dict(leaves(got)), dict(leaves(want))
    if mine.keys() != right.keys():
        return f"{_kind(got)}; expected {_kind(want)}"
    for path, w in right.items():
        g, at = mine[path], path and f" in {path}"
        if _kind(g) != _kind(w):
            return f"{_kind(g)}{at}; expected {_kind(w)}"
        if isinstance(w, str | None):
            if g != w:
                return f"{g!r}{at}; expected {w!r}"
            continue
        g, w = _tensor(g), _tensor(w)
        tol = TOLERANCE.get(w.dtype, 2e-2) if tolerance is None else tolerance
        close = torch.isclose(g, w, rtol=tol, atol=tol) if w.is_floating_point() else g == w  # nan is close to nothing
        if not close.all():
            index = tuple((~close).nonzero()[0].tolist())
            spot = f" at index {list(index)}" if index else ""
            return f"{g[index].item():.6g}{spot}{at}; expected {w[index].item():.6g}"
    return ""


def _usual_mistake(exercise: Exercise, cases: Sequence, outcomes: Sequence) -> str:
    """The hint of the first mistake whose function does what the student's did, on every case."""
    if all(got.error for got in outcomes):  # two functions that only raise have little in common
        return ""
    for hint, mistake in exercise.mistakes.items():
        pairs = zip(outcomes, cases, strict=True)
        theirs = ((got, observe(mistake, case, exercise.grad_wrt)) for got, case in pairs)
        if not any(difference(got, other, exercise.tolerance) for got, other in theirs):
            return hint
    return ""


def _hint(got: Outcome, want: Outcome) -> str:
    """What the kind of failure alone suggests."""
    if got.error or want.error or got.mutated != want.mutated:
        return "call your function on this case in a cell of your own, and look at each line."
    mine, right = got.value, want.value
    if type(mine) not in TENSORS or type(right) not in TENSORS:
        return "" if _kind(mine) == _kind(right) else "the docstring says what to return."
    came, due = tuple(mine.shape), tuple(right.shape)
    cut_off = any(grad.any() and not got.grads[name].any() for name, grad in want.grads.items())
    suggestions = [
        (came == (*due, 1), "a last axis of size 1 is left over; against (batch,) it silently makes (batch, batch)."),
        (len(due) == 1 and came == due * 2, "(batch, 1) met (batch,), which silently makes (batch, batch)."),
        (came != due and came == due[::-1], "two axes are swapped."),
        (len(came) < len(due), "an axis too many was reduced."),
        (len(came) > len(due), "some axes are still to be reduced."),
        (mine.dtype != right.dtype, "a constant or a conversion brought in another dtype."),
        (mine.isnan().any(), "nan comes from 0/0, inf - inf, log(0) or the root of a negative number."),
        (cut_off and not unlike(mine, right), "detach(), item(), numpy or no_grad cut the result off from its inputs."),
    ]
    return next((hint for applies, hint in suggestions if applies), "")


def _factor(outcomes: Sequence[Outcome], wanted: Sequence[Outcome]) -> str:
    """A hint if all values of all cases are off by one factor or by one constant."""
    pairs = [
        (_tensor(g).flatten().double(), _tensor(w).flatten().double())
        for got, want in zip(outcomes, wanted, strict=True)
        for (_, g), (_, w) in zip(leaves(got.value), leaves(want.value), strict=False)
        if _kind(g) == _kind(w) and not isinstance(w, str | None)
    ]
    if not pairs:
        return ""
    mine, right = (torch.cat(values) for values in zip(*pairs, strict=True))
    for form, off, neutral in (("{:.4g} times", mine / right, 1), ("{:.4g} more than", mine - right, 0)):
        off = off[right != 0]
        if len(off) > 1 and off.std() <= 1e-4 * off.mean().abs() and (off.mean() - neutral).abs() > 1e-3:
            return f"in every case your values are {form.format(off.mean().item())} the expected ones."
    return ""


def _not_attempted(exercise: Exercise | Quiz, note: str = "") -> Verdict:
    text = f"{exercise.name}: not attempted yet, 0 of {exercise.points:g} points.{note}"
    return Verdict("not attempted", 0.0, text + (f"\n{GO_ON}" if isinstance(exercise, Exercise) else ""))


def _tensor(leaf: Any) -> Tensor:
    return leaf if type(leaf) in TENSORS else torch.as_tensor(leaf, dtype=torch.float64)


def _kind(value: Any) -> str:
    if type(value) in TENSORS:
        where = "" if value.device.type == "cpu" else f", on {value.device}"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}{where}"
    if type(value) in (int, float) or isinstance(value, np.floating | np.integer):
        return "a number"
    if isinstance(value, tuple | list):
        return f"{len(value)} values" if value else "no value"
    return "nothing (None)" if value is None else f"an object of type {type(value).__name__}"


def _show(value: Any) -> str:
    if type(value) not in TENSORS:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:120]  # a function's address differs from run to run
    values = torch.round(value.double(), decimals=4).tolist() if value.numel() <= 12 else "..."
    return f"{_kind(value).removeprefix('a ')} {values}"
