"""Mutants: they are what their words say, they end, they keep no state; and most wrong answers are named by them."""

import math
import random
import time

import pytest
import torch
from test_check import EXERCISES, name, verdict

from minialign.course import Exercise
from minialign.course.check import find, judge
from minialign.course.mutants import LIMIT, mutants, parameter_mutants
from minialign.course.observe import observe

GENERAL = ("none of the usual", "call your function", "the docstring", "a last axis of size 1", "(batch, 1) met",
           "two axes are swapped", "an axis too many", "some axes are still", "in every case your values")  # fmt: skip


def spread(values, offset):
    squares = (values - values.mean()) ** 2
    return (squares.sum() / (len(values) - 1)).sqrt() + offset


def counting(n):
    i, total = 0, 0
    while i < n:
        i += 1
        total += i
    return total


def told(found, words):
    return [mutant for mutant in found if words in mutant.words]


def hint(text):
    return text.split("Hint: ")[1].split("\n")[0]


def test_mutants_are_what_their_words_say():
    values = torch.tensor([1.0, 2.0, 6.0])  # mean 3; squares 4, 1, 9: variance 7
    found = mutants(spread)
    without_root = [m.function(values, torch.tensor(0.0)) for m in told(found, "a root were left out")]
    assert any(value == 7 for value in without_root)
    turned = [m.function(values, torch.tensor(1.0)).item() for m in told(found, "a sign were turned")]
    assert any(value == pytest.approx(math.sqrt(7) - 1) for value in turned)
    means = [m.function(values, torch.tensor(0.0)) for m in told(found, "mean stood where sum is due")]
    assert any(torch.isclose(value, torch.tensor(14 / 3 / 2).sqrt()) for value in means)
    (zeroed,) = told(parameter_mutants(spread), "0 stood in the place of `offset`")
    assert zeroed.function(values=values, offset=torch.tensor(5.0)) == spread(values, 0)


def test_mutants_leave_the_function_and_its_namespace_as_they_were():
    before = dict(spread.__globals__)
    assert len(mutants(spread)) > 50
    assert mutants(spread) is mutants(spread)  # kept
    assert dict(spread.__globals__) == before
    assert spread(torch.tensor([1.0, 2.0, 6.0]), 0).item() == pytest.approx(math.sqrt(7))


def test_no_mutant_goes_on_for_ever():
    ended = 0
    for mutant in mutants(counting):
        try:
            mutant.function(5)
        except Exception as error:
            ended += "too many rounds" in str(error)
    assert ended > 0 and LIMIT < 10_000  # `while True`, and a counter that goes down


def test_a_function_without_source_has_none():
    space = {}
    exec("def made(x):\n    return x + 1", space)
    assert mutants(space["made"]) == ()


def test_two_mistakes_at_once_are_named():
    exercise = Exercise(
        "99/spread",
        1,
        spread,
        [lambda g: dict(values=torch.randn(7, generator=g), offset=torch.rand((), generator=g))],
        {"the offset is missing": lambda values, offset: spread(values, 0.0)},
    )
    text = verdict(lambda values, offset: 1 / spread(values, 0.0), exercise).text
    assert "0 stood in the place of `offset`, and the result stood upside down (one over it)" in hint(text)
    text = verdict(lambda values, offset: spread(values, 0.0).tanh(), exercise).text
    assert "none of the usual" in hint(text)
    text = verdict(lambda values, offset: spread(values, 0.0).sigmoid(), exercise).text
    assert "One: the offset is missing. The other: it comes out as if a sigmoid of the result were taken" in hint(text)
    text = verdict(lambda values, offset: -(values.var() + offset), exercise).text
    assert "an intermediate result were squared, and the sign of the result were turned" in hint(text)


def test_the_search_is_silent(capfd, recwarn):
    """LAPACK prints past Python's own redirections if it is given nan; torch warns of an .mT without axes."""
    verdict(lambda **k: 0.37 * find("50/bradley_terry_loss").reference(**k), find("50/bradley_terry_loss"))
    verdict(lambda distance, gold: 1.37 * find("50/fit_law").reference(distance, gold), find("50/fit_law"))
    assert (capfd.readouterr(), len(recwarn)) == (("", ""), 0)


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_natural_forms_pass(exercise):
    assert len(exercise.forms()) >= 2
    for form in exercise.forms():
        for seed in range(10):
            result = verdict(form, exercise, seed)
            assert result.status == "passed", f"{form.__name__}, seed {seed}: {result.text}"


def seeded(exercise, count, seed):
    """Verdicts on mutants drawn from the natural forms that are wrong, and say something."""
    drawn = random.Random(seed)
    pool = [mutant for form in exercise.forms() for mutant in mutants(form) if "no gradient" not in mutant.words]
    results, cases = [], exercise.draw(seed)
    for mutant in drawn.sample(pool, min(len(pool), 20 * count)):
        outcomes = [observe(mutant.function, case, exercise.grad_wrt) for case in cases]
        if any(outcome.error for outcome in outcomes):
            continue
        started = time.process_time()
        result = judge(exercise, cases, outcomes)
        results += [(result, time.process_time() - started, mutant.words)] if result.status == "wrong" else []
        if len(results) == count:
            break
    return results


def test_seeded_mutants_are_named_nine_times_in_ten_and_soon():
    found = [result for exercise in EXERCISES[::3] for result in seeded(exercise, 5, 3)]
    named = [not hint(result.text).startswith(GENERAL) for result, _, _ in found]
    assert len(found) > 80
    assert sum(named) / len(named) >= 0.9
    assert sorted(seconds for _, seconds, _ in found)[len(found) * 9 // 10] < 2  # a busy machine may take its time


def test_a_mistake_in_one_form_is_named_by_the_others():
    """As an answer that is written as none of the forms is: the one that it was drawn from is hidden."""
    named = []
    for exercise in EXERCISES[::8]:
        hidden, *others = exercise.forms()
        if len(others) < 2:
            continue
        cases, drawn = exercise.draw(5), random.Random(5)
        narrowed = Exercise(exercise.name, 1, exercise.reference, exercise.cases, exercise.mistakes, exercise.grad_wrt)
        object.__setattr__(narrowed, "forms", lambda others=others: others)
        for mutant in drawn.sample(mutants(hidden), 12):
            outcomes = [observe(mutant.function, case, exercise.grad_wrt) for case in cases]
            if not any(outcome.error for outcome in outcomes):
                result = judge(narrowed, cases, outcomes)
                named += [not hint(result.text).startswith(GENERAL)] if result.status == "wrong" else []
    assert len(named) > 20 and sum(named) / len(named) > 0.6
