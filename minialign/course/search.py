"""Search the mutants of all right solutions, and of the listed mistakes, for one that does what a student's answer did.

    as_if(attempt)      "your values are those that come out as if ...", or ''

First one change of a right solution; then two, of which one is a listed mistake or a change of the result.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minialign.course.compare import TOLERANCE, is_number, numbers, unlike
from minialign.course.mutants import RESULTS, Mutant, mutants, parameter_mutants
from minialign.course.observe import Outcome, leaves, observe

CLOSE = 2e-4  # of a mutant's values to the student's: both are rounded, each in its own way


class Attempt(NamedTuple):
    """A wrong answer: what it did in each case, what was wanted, and what differed ('' where nothing)."""

    exercise: Any
    cases: Sequence[Mapping]
    outcomes: Sequence[Outcome]
    wanted: Sequence[Outcome]
    problems: Sequence[str]
    labels: Sequence[str]
    forms: Sequence[Callable]  # other right solutions


def as_if(attempt: Attempt) -> str:
    """What the values come out as if, or ''. First one change of a right solution, then two: of a listed mistake."""
    if all(got.error for got in attempt.outcomes):
        return ""
    search = Search(attempt)
    right = [attempt.exercise.reference, *attempt.forms]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pools = [parameter_mutants(right[0]), _results(right[0]), _fixed(attempt), *map(mutants, right)]
        known = [Mutant(hint, mistake) for hint, mistake in attempt.exercise.mistakes.items()]
        if hint := search.first(known):  # values before gradients
            return hint
        for pool in pools:
            if words := search.first(pool):
                return f"your values are those that come out as if {words}."
        if search.gradients:
            return ""
        for hint, mistake in attempt.exercise.mistakes.items():
            if words := search.first([*_results(mistake), *_mutants_of_a_mistake(mistake)]):
                return f"two things at once. One: {hint.rstrip('.')}. The other: it comes out as if {words}."
        for form in right:
            if words := search.first(_two(form)):
                return f"two things at once: your values are those that come out as if {words}."
    return ""


def _fixed(attempt: Attempt) -> tuple[Mutant, ...]:
    """A number that should come in is always that of another case."""
    reference, made = attempt.exercise.reference, []
    for name, value in attempt.cases[0].items():
        for fixed in sorted({case[name] for case in attempt.cases}) if is_number(value) else ():
            changed = functools.partial(_with_fixed, reference, name, fixed)
            made.append(Mutant(f"`{name}` were {fixed:.4g} in every case", changed))
    return tuple(made)


def _with_fixed(reference: Callable, name: str, fixed: float, **given: Any) -> Any:
    return reference(**given | {name: fixed})


@functools.cache
def _results(function: Callable) -> tuple[Mutant, ...]:
    return tuple(Mutant(words, _then(change, function)) for words, change in RESULTS.items())


def _then(change: Callable, function: Callable) -> Callable:
    def changed(**given: Any) -> Any:
        return _each(change, function(**given))

    return changed


def _each(change: Callable, value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_each(change, item) for item in value]
    return change(torch.as_tensor(value, dtype=torch.float64) if is_number(value) else value)


@functools.cache
def _mutants_of_a_mistake(mistake: Callable) -> tuple[Mutant, ...]:
    with suppress(Exception):
        return mutants(mistake)
    return ()


@functools.cache
def _two(form: Callable) -> tuple[Mutant, ...]:
    """A mutant of the form whose result is changed as well: by its sign, a root, a mean."""
    simple = {words: RESULTS[words] for words in [*list(RESULTS)[:2], "the sign of the result were turned"]}
    return tuple(
        Mutant(f"{mutant.words}, and {words}", _then(change, mutant.function))
        for words, change in simple.items()
        for mutant in mutants(form)
    )


class Search:
    """Compares mutants with what the student's function did: the values, or the gradients if the values are right."""

    def __init__(self, attempt: Attempt):
        self.attempt = attempt
        tolerance = attempt.exercise.tolerance
        pairs = list(zip(attempt.outcomes, attempt.wanted, strict=True))
        self.gradients = not any(g.error or unlike(g.value, w.value, tolerance) for g, w in pairs)
        failing = [i for i, problem in enumerate(attempt.problems) if problem]
        order = sorted(failing, key=lambda i: (bool(attempt.outcomes[i].error), size(attempt.cases[i])))
        self.order = order + [i for i in range(len(pairs)) if i not in failing]
        self.mine = [self._numbers(outcome) for outcome in attempt.outcomes]
        self.right = [self._numbers(outcome) for outcome in attempt.wanted]

    def first(self, pool: Sequence[Mutant]) -> str:
        """The words of the first mutant that agrees in every case."""
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(self.gradients), Finite():
            return next((mutant.words for mutant in pool if self._agrees(mutant.function)), "")

    def _agrees(self, function: Callable) -> bool:
        return all(self._same(function, i) for i in self.order)

    def _same(self, function: Callable, i: int) -> bool:
        got, case = self.attempt.outcomes[i], self.attempt.cases[i]
        if self.gradients:
            other = observe(function, case, self.attempt.exercise.grad_wrt)
            return not other.error and _near(self.mine[i], self._numbers(other))
        try:
            torch.default_generator.manual_seed(0)
            value = function(**{name: _copied(value) for name, value in case.items()})
            if got.error:
                return False
            other = numbers(value)
        except Exception as error:  # whatever a mutant does
            return type(error).__name__ == got.error
        if not _near(self.mine[i], other):
            return False
        # it must explain the error, not only be as near to the right answer as the student's
        return not self.attempt.problems[i] or not _near(self.right[i], other, TOLERANCE[torch.float64])

    def _numbers(self, outcome: Outcome) -> list[Tensor]:
        if self.gradients:
            return numbers(outcome.value) + numbers(outcome.grads)
        return numbers(outcome.value)


class Finite(TorchFunctionMode):
    """LAPACK prints, past all of Python's redirections, what it thinks of nan."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        if func in (torch.linalg.lstsq, torch.linalg.solve, torch.linalg.inv):
            if not all(leaf.isfinite().all() for leaf in args if isinstance(leaf, Tensor)):
                raise RuntimeError("nan")
        return func(*args, **kwargs or {})


def _near(mine: Sequence[Tensor], other: Sequence[Tensor], close: float = CLOSE) -> bool:
    if len(mine) != len(other) or any(m.shape != o.shape for m, o in zip(mine, other, strict=True)):
        return False
    return all(torch.allclose(m, o, rtol=close, atol=close, equal_nan=True) for m, o in zip(mine, other, strict=True))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def size(case: Mapping) -> int:
    """Numbers in a case's tensors."""
    return sum(leaf.numel() for _, leaf in leaves(case) if isinstance(leaf, Tensor))
