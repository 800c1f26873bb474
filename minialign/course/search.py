"""Search the mutants of all right solutions, and of the listed mistakes, for one that does what a student's answer did.

    as_if(attempt)      "your values are those that come out as if ...", or ''

First one change of a right solution; then two, of which one is a listed mistake or a change of the result.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minialign.course.compare import TOLERANCE, is_number, numbers, unlike
from minialign.course.mutants import RESULTS, Mutant, mutants, parameter_mutants
from minialign.course.observe import Outcome, leaves, observe

CLOSE = 2e-4  # of a mutant's values to the student's: both are rounded, each in its own way
MOST = (
    3_000  # mutants of all listed mistakes of an exercise that are tried; more only where mistakes are long functions
)
UNDONE = {  # a second mistake, and what undoes it
    "the sign of the result were turned": torch.neg,
    "the result were squared": torch.sqrt,
    "a root of the result were taken": torch.square,
    "the result stood upside down (one over it)": torch.reciprocal,
    "1 minus it stood in the place of the result": lambda value: 1 - value,
    "the result were twice as large": lambda value: value / 2,
    "the result were half as large": lambda value: 2 * value,
    "a logarithm of the result were taken": torch.exp,
    "an exponential of the result were taken": torch.log,
}


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
    """What the values come out as if, or ''."""
    search, mistakes = Search(attempt), attempt.exercise.mistakes
    if all(got.error for got in attempt.outcomes) or not search.numbers():  # nan of two kinds is nan
        return ""
    reference = attempt.exercise.reference
    right = attempt.forms or [reference]  # the package's own may do it all in one call of a kernel
    with torch.set_grad_enabled(search.gradients):
        if hint := search.first(Mutant(hint, mistake) for hint, mistake in mistakes.items()):
            return hint  # its values; the gradients differ, or the rounding
        search.seen.clear()
        pools = (parameter_mutants(reference), _results(reference), _fixed(attempt), *map(mutants, right))
        if words := search.first(mutant for pool in pools for mutant in pool):
            return f"your values are those that come out as if {words}."
        if search.gradients:
            return ""
        if words := search.undone():
            return f"two things at once: your values are those that come out as if {words}."
        for hint, mistake in mistakes.items():
            changed = _mutants_of_a_mistake(mistake)
            step = max(1, len(changed) * len(mistakes) // MOST)
            if words := search.first([*_results(mistake), *changed[::step]]):
                return f"two things at once. One: {hint.rstrip('.')}. The other: it comes out as if {words}."
    return ""


# ---- what is searched ------------------------------------------------------------------------------------------------


def _fixed(attempt: Attempt) -> tuple[Mutant, ...]:
    """A number that should come in is always that of another case."""
    reference, made = attempt.exercise.reference, []
    for name, value in attempt.cases[0].items():
        for fixed in sorted({case[name] for case in attempt.cases if is_number(case[name])}):
            changed = functools.partial(_with_fixed, reference, name, fixed)
            made += [Mutant(f"`{name}` were {fixed:.4g} in every case", changed)] if is_number(value) else []
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


# ---- how -------------------------------------------------------------------------------------------------------------


class Search:
    """Compares mutants with what the student's function did: the values, or the gradients if the values are right."""

    def __init__(self, attempt: Attempt):
        self.attempt = attempt
        tolerance = attempt.exercise.tolerance
        pairs = list(zip(attempt.outcomes, attempt.wanted, strict=True))
        self.gradients = not any(g.error or unlike(g.value, w.value, tolerance) for g, w in pairs)
        self.mine = [self._numbers(outcome) for outcome in attempt.outcomes]
        self.right = [self._numbers(outcome) for outcome in attempt.wanted]
        failing = [i for i, problem in enumerate(attempt.problems) if problem]
        # a failing case with many numbers first: there, few mutants agree by chance
        self.order = sorted(failing, key=lambda i: (bool(attempt.outcomes[i].error), -sum(map(len, self._flat(i)))))
        self.order += [i for i in range(len(pairs)) if i not in failing]
        self.given: dict[int, tuple[dict, list[int]]] = {}
        self.seen: list[tuple[Mutant, list[Tensor]]] = []  # with their values in the first case

    def numbers(self) -> bool:
        """Is there a wrong number that is not nan?"""
        return any((~value.isnan()).any() for i in self.order if self.attempt.problems[i] for value in self.mine[i])

    def first(self, pool: Iterable[Mutant]) -> str:
        """The words of the first mutant that agrees in every case."""
        return next((mutant.words for mutant in pool if self._agrees(mutant)), "")

    def undone(self) -> str:
        """The words of a mutant seen before whose result, changed once more, agrees in every case."""
        for words, undo in UNDONE.items():
            target = [undo(value) for value in self.mine[self.order[0]]]
            for mutant, values in self.seen:
                both = Mutant(f"{mutant.words}, and {words}", _then(RESULTS[words], mutant.function))
                if _near(target, values) and all(self._same(both, i, False) for i in self.order):
                    return both.words
        return ""

    def _agrees(self, mutant: Mutant) -> bool:
        return all(self._same(mutant, i, i == self.order[0]) for i in self.order)

    def _same(self, mutant: Mutant, i: int, first: bool) -> bool:
        error = self.attempt.outcomes[i].error
        if self.gradients:
            other = observe(mutant.function, self.attempt.cases[i], self.attempt.exercise.grad_wrt)
            return not other.error and _near(self.mine[i], self._numbers(other))
        try:
            other = numbers(mutant.function(**self._given(i)))
        except Exception as problem:  # whatever a mutant does
            return type(problem).__name__ == error
        if first:
            self.seen.append((mutant, other))
        if error or not _near(self.mine[i], other):
            return False
        # it must explain the error, not only be as near to the right answer as the student's
        return not self.attempt.problems[i] or not _near(self.right[i], other, TOLERANCE[torch.float64])

    def _given(self, i: int) -> dict:
        """A copy of the case's arguments, made anew if a mutant changed them."""
        given, versions = self.given.get(i, ({}, None))
        if versions is None or versions != _versions(given):
            given = {name: _copied(value) for name, value in self.attempt.cases[i].items()}
            self.given[i] = given, _versions(given)
        return {k: _copied(v) if isinstance(v, dict | list | torch.Generator) else v for k, v in given.items()}

    def _numbers(self, outcome: Outcome) -> list[Tensor]:
        return numbers(outcome.value) + (numbers(outcome.grads) if self.gradients else [])

    def _flat(self, i: int) -> list[Tensor]:
        return [value.flatten() for value in self.mine[i]]


def _versions(given: Mapping) -> list[int]:
    """How often each tensor was changed in place."""
    return [value._version for value in given.values() if isinstance(value, Tensor)]


def _near(mine: Sequence[Tensor], other: Sequence[Tensor], close: float = CLOSE) -> bool:
    if len(mine) != len(other) or any(m.shape != o.shape for m, o in zip(mine, other, strict=True)):
        return False
    for m, o in zip(mine, other, strict=True):
        if m.numel() and abs(m.reshape(-1)[0].item() - (one := o.reshape(-1)[0].item())) > close + close * abs(one):
            return False  # cheaper than allclose, and nearly always enough
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
