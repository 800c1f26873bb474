"""Forms of one answer: what passes, what is refused in which words, and what is handed on."""

import re
from collections import deque

import pytest
import torch
from test_check import EXERCISES, name, verdict

from minialign.course import Exercise, check
from minialign.course.check import find, unlike
from minialign.course.compare import fitted

SCALAR, ROW = torch.tensor(2.0), torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (2.0, SCALAR),
        (torch.tensor(2.0).numpy()[()], SCALAR),
        (SCALAR, 2.0),
        (SCALAR.double(), SCALAR),
        (SCALAR, SCALAR.double()),
        (3.0, 3),
        (torch.tensor(3), 3),
        ([1.0, 2], [1.0, 2.0]),
        ([torch.tensor(1.0), torch.tensor(2.0)], ROW),  # (alpha, beta)
        (ROW, [1.0, 2.0]),
        (torch.stack([ROW, ROW]), [ROW, ROW]),
        (torch.tensor(1 + 3e-6).double(), torch.tensor(1.0).double()),  # a float32 constant
    ],
)
def test_forms_of_one_answer_are_alike(got, want):
    assert unlike(got, want) == ""
    assert type(fitted(got, want)) is type(want)


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        (ROW[:1], SCALAR, "of shape (1,)"),
        (3.5, 3, "3.5; expected 3"),
        ([1.0, 2.0], ROW, "2 values; expected a float32 tensor"),
        (torch.tensor([True]), torch.tensor([1.0]), "a bool tensor"),
        ({"hen": [SCALAR]}, {"hen": [2.0]}, "expected a number"),  # kept from call to call, and with it a graph
        (ROW.half(), ROW, "a float16 tensor"),
        (torch.tensor(0.57709412).double(), torch.tensor(0.5774).double(), "expected 0.5774"),
    ],
)
def test_other_things_are_not(got, want, words):
    assert words in unlike(got, want)


def test_two_numbers_in_a_message_are_never_the_same():
    problem = unlike(torch.tensor(1.00001234, dtype=torch.float64), torch.tensor(1.0).double(), tolerance=0.0)
    assert problem == "1.000012; expected 1.000000" or problem.startswith("1.00001; expected 1")
    problem = unlike(torch.tensor(0.57709412345, dtype=torch.float64), torch.tensor(0.577094123).double(), 0.0)
    came, due = problem.split("; expected ")
    assert came != due


def test_small_differences_are_said_to_be_small():
    exercise = Exercise("99/x", 1, lambda x: x * 3, [lambda g: dict(x=torch.rand(4, generator=g, dtype=torch.float64))])
    text = verdict(lambda x: x * 3 * (1 + 2e-4 * x.sin()), exercise).text
    assert "digit only: a float32 constant, rounding" in text


def test_what_is_handed_on_has_the_form_that_the_notebook_expects(capsys):
    function, points = check("00/standard_error", lambda v: float(v.std() / len(v) ** 0.5))  # another name, a number
    assert points == 2
    assert function(torch.tensor([1.0, 0.0])).item() == pytest.approx(0.5)
    assert function(values=torch.tensor([1.0, 0.0]).double()).dtype == torch.float64
    function, points = check("50/fit_law", lambda distance, gold: tuple(find("50/fit_law").reference(distance, gold)))
    assert points == 3
    assert function(torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, 1.0, 1.0]).double()).shape == (2,)
    assert check("00/standard_error", function)[1] == 0  # and what is not right does not become so
    capsys.readouterr()


def test_what_is_handed_on_passes_again_and_keeps_its_gradient(capsys):
    loss = find("50/bradley_terry_loss").reference
    function, _ = check("50/bradley_terry_loss", lambda a, b: loss(a.double(), b.double()))
    assert check("50/bradley_terry_loss", function) == (function, 3.0)
    scores = torch.zeros(2, requires_grad=True)
    value = function(scores, torch.ones(2))
    value.backward()
    assert value.dtype == torch.float32 and scores.grad.abs().sum() > 0


def test_a_number_for_a_loss_is_refused_for_its_gradient():
    exercise = find("50/bradley_terry_loss")
    text = verdict(lambda **k: float(exercise.reference(**k)), exercise).text
    assert "the values are right; detach(), item(), numpy or no_grad" in text


def test_the_dtype_that_the_text_names_is_asked_for():
    for one in ("50/best_of_n", "50/fit_law"):
        exercise = find(one)
        text = verdict(lambda exercise=exercise, **k: exercise.reference(**k).float(), exercise).text
        assert "the values are right; only the dtype is not" in text


def test_other_conventions_that_the_text_leaves_open_pass():
    def bessel(log_prob, log_prob_old, rewards, clip_range):
        advantages = (rewards[:, 0] - rewards.mean()) / rewards.std()
        ratio = (log_prob - log_prob_old).exp()
        return -torch.min(advantages * ratio, advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()

    exercise = find("10/repaired_loss")
    assert all(verdict(bessel, exercise, seed).status == "passed" for seed in range(20))
    assert verdict(lambda **k: 2 * bessel(**k), exercise).status == "wrong"


def test_deques_for_lists_pass():
    exercise = find("10/running_advantages")

    def kept(**k):
        advantages, buffers = exercise.reference(**k)
        return advantages, {prompt: deque(held) for prompt, held in buffers.items()}

    assert verdict(kept, exercise).status == "passed"


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_other_names_for_the_parameters_do_not_matter(exercise):
    names = list(exercise.draw(0)[0])
    assert all(
        verdict(lambda *values: exercise.reference(**dict(zip(names, values, strict=True))), exercise).status
        == "passed"
        for _ in range(2)
    )


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_a_hint_about_shapes_shows_a_case_without_an_axis_of_one(exercise):
    def wider(**k):
        out = exercise.reference(**k)
        return out.unsqueeze(-1) if isinstance(out, torch.Tensor) and out.ndim else None

    text = verdict(wider, exercise).text
    if "return" not in text.split("Hint: ")[1]:
        shown = re.findall(r"of shape \(([^)]*)\)", text.split("  Your function")[0])
        assert "shape" in text.split("Hint: ")[1]
        assert not any("1" in shape.replace(",", "").split() for shape in shown)


@pytest.mark.parametrize("exercise", EXERCISES, ids=name)
def test_cases_have_labels_and_hints_name_no_document_of_ours(exercise):
    assert len(exercise.labels) == len(exercise.draw(0))
    assert all(2 < len(label) < 50 for label in exercise.labels)
    assert not any(word in hint for hint in exercise.mistakes for word in ("trap ", "sheet", "DESIGN"))


def test_where_no_mistake_is_recognised_the_kinds_of_input_are_sorted():
    def odd(values):
        return values.std() / len(values) ** 0.5 * (1 + 0.31 * values.var().sin() + values.sum().cos() * values.var())

    text = verdict(odd, find("00/standard_error")).text
    assert "none of the usual mistakes" in text
    assert "Right: equal values. Wrong: two values, values of 0 and 1, float32, float64." in text
