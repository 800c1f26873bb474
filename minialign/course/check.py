"""Self-checks of the exercises: decide first, then diagnose, and hand on a working function either way.

    gaussian_log_prob, points = check("01/gaussian_log_prob", gaussian_log_prob)

An answer is right if on every case it does what the reference does: values, shape, device, exceptions, arguments left
alone, gradients where the exercise asks for them (`compare`). Only then is it asked which mistake was made
(`diagnose`): one of the list, or one of those that a single change of a right solution makes (`mutants`).
"""

import difflib
import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minialign.course.compare import adapted, difference, kind, unlike
from minialign.course.diagnose import diagnose
from minialign.course.observe import TENSORS, Outcome, leaves, observe
from minialign.course.search import Attempt, size

__all__ = ["Exercise", "Quiz", "Verdict", "check", "difference", "find", "judge", "quiz", "registered", "unlike"]
GO_ON = "  Until then the notebook goes on with the package's own version."


@dataclass(frozen=True)
class Exercise:
    name: str  # "01/gaussian_log_prob": chapter, then the function
    points: int | float
    reference: Callable  # what is handed on to a student who has not passed
    cases: Mapping | Sequence  # label -> keyword arguments: a dict, or a function of a torch.Generator that draws one
    mistakes: Mapping = field(default_factory=dict)  # hint -> function with that mistake, same arguments
    grad_wrt: Sequence[str] = ()  # arguments whose gradients must agree too
    draws: int = 4  # fresh draws of each drawn case
    tolerance: float | None = None  # instead of compare.TOLERANCE
    dtype: torch.dtype | None = None  # of the result, where the text names it; else float32 and float64 both do
    also: Sequence[Callable] = ()  # other conventions that the text leaves open, right as well
    parts: Mapping[str, int | float] = field(default_factory=dict)  # label of a case -> points, right there alone

    def draw(self, seed: int | None = None) -> list[dict]:
        """Fixed cases as they are, drawn ones afresh: from `seed`, or from the operating system's entropy if None."""
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        drawn = [
            dict(case(generator)) if callable(case) else dict(case)
            for case in (self.cases.values() if isinstance(self.cases, Mapping) else self.cases)
            for _ in range(self.draws if callable(case) else 1)
        ]
        order = list(inspect.signature(self.reference).parameters)  # a student's parameters may have other names
        rank = {name: i for i, name in enumerate(order)}
        return [dict(sorted(case.items(), key=lambda item: rank.get(item[0], len(rank)))) for case in drawn]

    def __post_init__(self):
        unknown = sorted(set(self.parts) - set(self.labels))
        if unknown or (self.parts and not sum(self.parts.values()) < self.points):
            raise ValueError(
                f"{self.name}: parts is {self.parts}; expected labels of its cases with points that leave some of the "
                f"{self.points:g} for a right answer."
            )

    @property
    def labels(self) -> list[str]:
        """What kind of input each of the drawn cases is; none if the cases have no labels."""
        labelled = self.cases.items() if isinstance(self.cases, Mapping) else ()
        return [label for label, case in labelled for _ in range(self.draws if callable(case) else 1)]

    def forms(self) -> Sequence[Callable]:
        """Other right solutions, as students write them: `chapters/forms_NN.py`."""
        return _forms(self.name.partition("/")[0]).get(self.name, ())


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


@functools.cache
def _forms(chapter: str) -> Mapping[str, Sequence[Callable]]:
    try:
        return importlib.import_module(f"minialign.course.chapters.forms_{chapter}").FORMS
    except ModuleNotFoundError:
        return {}


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
        outcomes = [observe(function, case, exercise.grad_wrt) for case in cases]
        verdict = judge(exercise, cases, outcomes)
    print(verdict.text)
    if verdict.status != "passed":
        return exercise.reference, verdict.points
    want = observe(exercise.reference, cases[0])
    return adapted(function, exercise.reference, list(cases[0]), outcomes[0], want), verdict.points


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
    found = [_problems(exercise, right, cases, outcomes) for right in (exercise.reference, *exercise.also)]
    wanted, problems = min(found, key=lambda pair: sum(map(bool, pair[1])))
    failing = [i for i, problem in enumerate(problems) if problem]
    name, points = exercise.name, exercise.points
    if not failing:
        text = f"{name}: passed, {points:g} of {points:g} points ({len(cases)} cases)."
        return Verdict("passed", float(points), text)
    labels = exercise.labels if len(exercise.labels) == len(cases) else [""] * len(cases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a graded cell with anything on stderr earns nothing
        hint, shapes = diagnose(Attempt(exercise, cases, outcomes, wanted, problems, labels, exercise.forms()))
    i = min(failing, key=lambda i: (shapes and _has_axis_of_one(cases[i]), size(cases[i])))  # there, shapes look alike
    smallest = f"The smallest of {len(failing)} failing cases, out of {len(cases)}"
    right = (set(exercise.parts) & set(labels)) - {labels[i] for i in failing}
    earned = float(sum(exercise.parts[part] for part in right))
    kept = f" (right for: {', '.join(sorted(right))})" if right else ""
    text = (
        f"{name}: wrong, {earned:g} of {points:g} points{kept}. {smallest}{f' ({labels[i]})' if labels[i] else ''}:\n"
    )
    text += "".join(f"    {argument} = {_show(value)}\n" for argument, value in cases[i].items())
    return Verdict("wrong", earned, f"{text}  Your function {problems[i]}.\n  Hint: {hint}\n{GO_ON}")


def _problems(exercise: Exercise, right: Callable, cases: Sequence, outcomes: Sequence) -> tuple[list, list[str]]:
    wanted = [observe(right, case, exercise.grad_wrt) for case in cases]
    problems = [difference(g, w, exercise.tolerance) for g, w in zip(outcomes, wanted, strict=True)]
    for i, got in enumerate(outcomes):
        if exercise.dtype and not problems[i] and getattr(got.value, "dtype", exercise.dtype) != exercise.dtype:
            problems[i] = f"returned {kind(got.value)}; expected {kind(wanted[i].value)}"
    return wanted, problems


def _has_axis_of_one(case: Mapping) -> bool:
    return any(1 in leaf.shape for _, leaf in leaves(case) if isinstance(leaf, Tensor))


def _not_attempted(exercise: Exercise | Quiz, note: str = "") -> Verdict:
    text = f"{exercise.name}: not attempted yet, 0 of {exercise.points:g} points.{note}"
    return Verdict("not attempted", 0.0, text + (f"\n{GO_ON}" if isinstance(exercise, Exercise) else ""))


def _show(value: Any) -> str:
    if type(value) not in TENSORS:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:120]  # a function's address differs from run to run
    values = torch.round(value.double(), decimals=4).tolist() if value.numel() <= 12 else "..."
    return f"{kind(value).removeprefix('a ')} {values}"
