"""The checks are checked: stubs, constants, nan, wrong shapes, each listed mistake are refused, in the right words."""

import ast
import contextlib
import json
import pkgutil
import sys
import types

import jaxtyping
import pytest
import torch

import minialign.course.chapters
from minialign import cli
from minialign.course import Exercise, Quiz, check, quiz
from minialign.course.build import GRADED
from minialign.course.check import difference, find, judge, registered, unlike
from minialign.course.observe import Outcome, observe

LN2 = 0.6931471805599453


def log_prob(x, mean, std, reduction):
    """Gaussian log-density without its constant: enough structure to get wrong."""
    z = (x - mean) / std.unsqueeze(-1)
    terms = -0.5 * z**2 - std.log().unsqueeze(-1)
    return terms.sum(-1) if reduction == "sum" else terms.mean(-1)


def drawn(g, dtype=torch.float32):
    x, mean, std = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g), torch.rand(3, generator=g) + 0.5
    return dict(x=x.to(dtype), mean=mean.to(dtype), std=std.to(dtype), reduction="mean")


MISTAKES = {
    "the variance stands where the standard deviation belongs": lambda x, mean, std, reduction: log_prob(
        x, mean, std**2, reduction
    ),
    "the sum was asked for": lambda x, mean, std, reduction: log_prob(x, mean, std, "mean"),
    "the log of the standard deviation is lost": lambda x, mean, std, reduction: (
        log_prob(x, mean, std, reduction) + std.log() * (x.shape[-1] if reduction == "sum" else 1)
    ),
    "the mean must keep its gradient": lambda x, mean, std, reduction: log_prob(x, mean.detach(), std, reduction),
}
FIXED = dict(x=torch.zeros(1, 2), mean=torch.ones(1, 2), std=torch.full((1,), 2.0), reduction="sum")
EXERCISE = Exercise(
    "99/log_prob",
    points=3,
    reference=log_prob,
    cases=[drawn, lambda g: drawn(g, torch.float64), FIXED],
    mistakes=MISTAKES,
    grad_wrt=("mean",),
)
WHY = {"a": "Tempting, because it is short; but no.", "b": "Yes: all of it.", "c": "Only at eta = 0."}
QUIZ = Quiz("99/q1", points=1, answer="b", why=WHY)


class AlwaysEqual:
    def __eq__(self, other):
        return True

    __hash__ = None

    def strip(self):
        return self

    lower = strip


class Forged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (
            torch.ones(1, dtype=torch.bool)
            if func is torch.isclose
            else super().__torch_function__(func, types, args, kwargs)
        )


@pytest.fixture(autouse=True, scope="module")
def as_in_a_notebook():
    """Without the shape checks of conftest: a mistake may hand a kernel a wrong shape, which there only misleads."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def chapter(monkeypatch):
    module = types.ModuleType("minialign.course.chapters.chapter_99")
    module.exercises = [EXERCISE, QUIZ]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def verdict(function, exercise=EXERCISE, seed=0):
    cases = exercise.draw(seed)
    return judge(exercise, cases, [observe(function, case, exercise.grad_wrt) for case in cases])


def own(x, mean, std, reduction):
    """The student's own right answer, written otherwise."""
    var = std[:, None].square()
    terms = -((x - mean) ** 2) / (2 * var) - 0.5 * var.log()
    return getattr(terms, reduction)(1)


def raise_not_implemented(**k):
    raise NotImplementedError


def raise_halfway(x, mean, std, reduction):
    z = x - mean
    return z @ std[:, None, None]


def mutates(x, mean, std, reduction):
    out = log_prob(x, mean, std, reduction)
    x -= mean
    return out


def mutates_the_mean(x, mean, std, reduction):
    out = own(x, mean, std, reduction)
    mean *= 2
    return out


def only_means(x, mean, std, reduction):
    if reduction == "sum":
        raise NotImplementedError
    return own(x, mean, std, reduction)


def forgets_to_return(x, mean, std, reduction):
    terms = x - mean  # noqa: F841


def forgets_it_for_sums(x, mean, std, reduction):
    if reduction == "mean":
        return own(x, mean, std, reduction)


def noisy(x, mean, std, reduction):
    import warnings

    print("debugging")
    print("careless", file=sys.stderr)
    warnings.warn("so what", stacklevel=1)
    torch.rand(7)
    return own(x, mean, std, reduction)


def test_right_answer_passes_20_of_20_on_fresh_inputs(capsys):
    assert [check("99/log_prob", own) for _ in range(20)] == [(own, 3.0)] * 20
    assert capsys.readouterr().out == "99/log_prob: passed, 3 of 3 points (9 cases).\n" * 20


def untouched(x, mean, std, reduction):
    """As the student's edition has it: a docstring and a comment."""
    # YOUR CODE HERE


def passing(**k):
    pass


@pytest.mark.parametrize("stub", [untouched, passing, lambda **k: ..., raise_not_implemented, None, ...])
def test_stub_is_not_attempted_and_a_working_function_is_handed_on(stub, capsys):
    assert check("99/log_prob", stub) == (log_prob, 0.0)
    assert capsys.readouterr().out.startswith("99/log_prob: not attempted yet, 0 of 3 points.\n")


def test_running_the_check_twice_does_not_grade_the_reference(capsys):
    function, _ = check("99/log_prob", lambda **k: 0)
    assert check("99/log_prob", function) == (log_prob, 0.0)
    assert "not attempted yet" in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda **k: 0, "returned a number; expected a float32 tensor of shape (1,)"),
        (lambda **k: torch.zeros(()), "returned a float32 tensor of shape (); expected a float32 tensor of shape (3,)"),
        (lambda **k: own(**k) * float("nan"), "nan comes from"),
        (lambda **k: own(**k)[:, None], "only the shape is not: a float32 tensor of shape (3, 1)"),
        (lambda **k: own(**k)[:, None] + 1 + 0.3 * own(**k), "silently makes (batch, batch)"),
        (lambda **k: own(**k).bfloat16(), "brought in another dtype"),
        (lambda **k: own(**k).detach(), "no gradient flows back to mean"),
        (lambda **k: own(**k).tolist(), "only what holds them is not: 3 values"),
        (lambda **k: -own(**k), "as if the sign of the result were turned"),
        (lambda **k: own(**k) + 0.37, "0.37 more than the expected ones"),
        (lambda **k: 0.37 * own(**k), "0.37 times the expected ones"),
        (lambda **k: AlwaysEqual(), "an object of type AlwaysEqual"),
        (lambda **k: own(**k).as_subclass(Forged) + 9, "an object of type Forged"),
        (lambda x: x, "it takes other arguments than the given `def`"),
        (lambda **k: None, "a `return` is missing"),
        (forgets_to_return, "a `return` is missing"),
        (forgets_it_for_sums, "in some cases the function ends without a `return`"),
        (lambda **k: own(**k) + 0.01 * k["x"].sum(-1).square() + 0.01 * k["std"], "none of the usual mistakes"),
        (raise_halfway, "raised RuntimeError"),
        (raise_halfway, "return z @ std[:, None, None]"),
        (mutates, "changed its argument x in place"),
        (mutates_the_mean, "changed its argument mean in place"),
        (only_means, "raised NotImplementedError"),
        (lambda **k: sys.exit(0), "raised SystemExit"),
        *[(mistake, f"Hint: {hint}\n") for hint, mistake in MISTAKES.items() if "keep its gradient" not in hint],
    ],
)
def test_wrong_answers_are_refused_in_the_right_words(wrong, words):
    status, points, text = verdict(wrong)
    assert (status, points) == ("wrong", 0.0)
    assert words in text
    assert text.startswith("99/log_prob: wrong, 0 of 3 points.")


def test_detached_mean_is_named_by_its_gradient_alone():
    status, _, text = verdict(MISTAKES["the mean must keep its gradient"])
    assert status == "wrong"
    assert "no gradient flows back to mean" in text
    assert "Hint: the mean must keep its gradient" in text


def test_detached_results_have_a_hint_of_their_own():
    exercise = Exercise("99/x", 1, log_prob, EXERCISE.cases, grad_wrt=("mean", "std"))
    assert "detach(), item(), numpy or no_grad" in verdict(lambda **k: own(**k).detach(), exercise).text


def test_gradients_of_the_wrong_size_are_caught():
    def half(x, mean, std, reduction):
        return own(x, 0.5 * mean + 0.5 * mean.detach(), std, reduction)

    text = verdict(half).text
    assert "but the gradient with respect to mean is" in text
    assert "Hint: none of the usual mistakes" in text  # and not: your values are 1 times the expected ones


def test_gradients_of_a_centred_batch_are_seen():
    """Its sum is constant, so an unweighted sum of the outputs would have no gradient to lose."""
    exercise = Exercise(
        "99/centre", 1, lambda x: x - x.mean(), [lambda g: dict(x=torch.randn(5, generator=g))], {}, ("x",)
    )
    assert verdict(lambda x: x - x.mean(), exercise).status == "passed"
    assert "no gradient flows back to x" in verdict(lambda x: (x - x.mean()).detach(), exercise).text
    assert "the gradient with respect to x is" in verdict(lambda x: x - x.mean().detach(), exercise).text


def test_outcomes_are_plain_data_without_a_graph():
    outcome = observe(own, FIXED, ("mean",))
    assert not outcome.value.requires_grad
    assert not outcome.grads["mean"].requires_grad


def test_random_functions_draw_the_same_numbers_as_the_reference():
    exercise = Exercise("99/noise", 1, lambda x: x + torch.randn(3), [dict(x=torch.zeros(3))])
    assert verdict(lambda x: torch.randn(3) + x, exercise).status == "passed"


def test_smallest_failing_case_is_shown_in_full():
    # by hand: z = -1/2 twice, so the terms are -1/8 - ln 2 each: -0.25 - 2 ln 2 = -1.63629
    text = verdict(lambda x, mean, std, reduction: own(x, mean, std, reduction) ** 2).text
    assert "x = float32 tensor of shape (1, 2) [[0.0, 0.0]]\n" in text
    assert "std = float32 tensor of shape (1,) [2.0]\n" in text
    assert "reduction = 'sum'\n" in text
    assert f"at index [0]; expected {-0.25 - 2 * LN2:.6g}." in text


def test_failing_only_on_a_large_case_shows_that_one():
    text = verdict(lambda **k: own(**k) + (len(k["x"]) > 1)).text
    assert "The smallest of 8 failing cases, out of 9" in text
    assert "x = float32 tensor of shape (3, 5)" in text


def test_same_seed_same_text_and_no_seed_fresh_inputs():
    assert verdict(lambda **k: own(**k) - 1, seed=5) == verdict(lambda **k: own(**k) - 1, seed=5)
    assert not torch.equal(EXERCISE.draw()[0]["x"], EXERCISE.draw()[0]["x"])
    assert torch.equal(EXERCISE.draw(1)[0]["x"], EXERCISE.draw(1)[0]["x"])
    assert not torch.equal(EXERCISE.draw(1)[0]["x"], EXERCISE.draw(1)[1]["x"])


def test_check_is_silent_on_stderr_and_leaves_global_randomness_alone(capsys, recwarn):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert check("99/log_prob", noisy)[1] == 3.0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err, len(recwarn)) == (1, "", 0)
    assert torch.equal(torch.rand(2), expected)


def test_a_mistake_that_only_raises_names_nothing():
    exercise = Exercise("99/x", 1, log_prob, [FIXED], {"made by a bug of ours": raise_halfway})
    assert "made by a bug of ours" not in verdict(raise_halfway, exercise).text


def test_expected_exceptions_must_be_raised():
    def strict(std):
        if std <= 0:
            raise ValueError("std must be positive")
        return std

    exercise = Exercise("99/strict", 1, strict, [dict(std=1.0), dict(std=0.0)])
    assert verdict(lambda std: strict(std), exercise).status == "passed"
    assert "raised nothing; expected ValueError" in verdict(lambda std: std, exercise).text


def test_structured_results_and_other_arguments():
    def reference(items, generator, scale):
        return {"noise": torch.rand(2, generator=generator), "rest": (items[0] * scale, "name", None, True, 3)}

    case = dict(items=[torch.tensor([1, 2])], generator=torch.Generator().manual_seed(1), scale=2)
    exercise = Exercise("99/structured", 1, reference, [case])
    assert verdict(lambda **k: reference(**k), exercise).status == "passed"
    assert (
        "0 in ['rest'][4]; expected 3"
        in verdict(lambda **k: {**reference(**k), "rest": (k["items"][0] * 2, "name", None, True, 0)}, exercise).text
    )
    assert (
        "'nome' in ['rest'][1]; expected 'name'"
        in verdict(lambda **k: {**reference(**k), "rest": (k["items"][0] * 2, "nome", None, True, 3)}, exercise).text
    )

    def appends(items, generator, scale):
        out = reference(items, generator, scale)
        items.append(0)
        return out

    assert "changed its argument items in place" in verdict(appends, exercise).text


def test_nan_is_close_to_nothing_and_inf_only_to_itself():
    nan, inf = torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert unlike(nan, nan)
    assert unlike(float("nan"), float("nan"))
    assert not unlike(inf, inf)
    assert unlike(-inf, inf)
    assert unlike(torch.tensor([True, False]), torch.tensor([True, True]))
    assert not unlike(torch.tensor([1.0]), torch.tensor([1.00009]))
    assert unlike(torch.tensor([1.0]), torch.tensor([1.0003]))
    assert unlike(torch.tensor([1.0]).double(), torch.tensor([1.00009]).double())
    assert not unlike(torch.tensor([1.05]), torch.tensor([1.0]), tolerance=0.1)
    assert unlike(torch.tensor([1.00001]), torch.tensor([1.0]), tolerance=0.0)


def test_nan_inputs_left_alone_are_not_mutated():
    case = dict(x=torch.tensor([float("nan"), 1.0]))
    assert observe(lambda x: x.nan_to_num(), case).mutated == ()
    assert observe(lambda x: x.nan_to_num_(), case).mutated == ("x",)
    assert observe(lambda x: x.neg_(), case).value.tolist()[1] == -1.0
    assert case["x"][1] == 1.0


def test_judging_needs_no_call_of_the_students_function():
    cases = [FIXED]
    outcome = Outcome(value=torch.tensor([-0.25 - 2 * LN2]), grads={"mean": torch.tensor([[-0.25, -0.25]])})
    # by hand: d/dmean of -(x - mean)^2 / 8 at x - mean = -1 is -1/4
    assert judge(EXERCISE, cases, [outcome]).status == "passed"
    assert difference(Outcome(value=torch.tensor([0.0])), outcome)


@pytest.mark.parametrize(
    ("answer", "points", "words"),
    [
        (None, 0.0, "99/q1: not attempted yet, 0 of 1 points.\n"),
        ("", 0.0, "not attempted yet"),
        (" B", 1.0, "99/q1: passed, 1 of 1 points.\n  Yes: all of it."),
        ("a", 0.0, "99/q1: wrong, 0 of 1 points.\n  Tempting"),
        ("abc", 0.0, "The answer is one of: a, b, c."),
        (AlwaysEqual(), 0.0, "not attempted yet"),
    ],
)
def test_quiz(answer, points, words, capsys):
    earned = quiz("99/q1", answer)
    assert (earned, type(earned)) == (points, float)
    assert words in capsys.readouterr().out


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(
        ValueError, match=r"'99/logprob'; did you mean '99/log_prob'\? Chapter 99 has: 99/log_prob, 99/q1"
    ):
        find("99/logprob")
    with pytest.raises(ValueError, match="Chapter 98 has: none"):
        find("98/x")


# --- every chapter of the course ---

CHAPTERS = [
    m.name[-2:] for m in pkgutil.iter_modules(minialign.course.chapters.__path__) if m.name.startswith("chapter_")
]
EXERCISES = [e for chapter in CHAPTERS for e in registered(chapter) if isinstance(e, Exercise)]
QUESTIONS = [e for chapter in CHAPTERS for e in registered(chapter) if isinstance(e, Quiz)]


def name(entry):
    return entry.name


@pytest.mark.parametrize("exercise", [EXERCISE, *EXERCISES], ids=name)
def test_reference_passes_its_own_check(exercise):
    for seed in range(20):
        result = verdict(lambda **k: exercise.reference(**k), exercise, seed)
        assert result.status == "passed", result.text


def solutions(chapter):
    """(exercise, its function in solutions/) of each: imports, functions and constants are run, nothing is trained."""
    (path,) = (cli.REPOSITORY / "solutions").glob(f"{chapter}_*.ipynb")
    sources = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    space, defined = {}, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for node in [node for source in sources for node in ast.parse(source).body]:
        if isinstance(node, defined) or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
            with contextlib.suppress(NameError):  # a default argument that is the result of a run
                exec(compile(ast.Module([node], []), path.name, "exec"), space)
    checked = [found for source in sources for found in GRADED.findall(source)]
    return [(find(one), space[one.split("/")[1]]) for one in checked if isinstance(find(one), Exercise)]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_solutions_pass_100_times_out_of_100(chapter):
    found = solutions(chapter)
    assert len(found) == sum(isinstance(entry, Exercise) for entry in registered(chapter)) >= 3
    for exercise, function in found:
        assert len(exercise.mistakes) >= 3
        for seed in range(100):
            result = verdict(function, exercise, seed)
            assert result.status == "passed", f"seed {seed}: {result.text}"


@pytest.mark.parametrize("exercise", [EXERCISE, *EXERCISES], ids=name)
def test_each_mistake_is_refused_and_named(exercise):
    for hint, mistake in exercise.mistakes.items():
        for seed in range(3):
            result = verdict(lambda mistake=mistake, **k: mistake(**k), exercise, seed)
            assert result.status == "wrong", f"{exercise.name}: the check lets pass: {hint}"
            assert f"Hint: {hint}\n" in result.text, f"{exercise.name}: {hint!r} is answered with\n{result.text}"


@pytest.mark.parametrize("exercise", [EXERCISE, *EXERCISES], ids=name)
def test_lazy_answers_are_refused(exercise, monkeypatch):
    module = sys.modules["minialign.course.check"]
    monkeypatch.setattr(module, "diagnose", lambda attempt: ("", False))  # why does not matter here

    def shaped(change):
        def answer(**k):
            out = exercise.reference(**k)
            return change(out) if isinstance(out, torch.Tensor) else 0

        return answer

    assert verdict(passing, exercise).status == "not attempted"
    for lazy in (
        lambda **k: 0,
        lambda **k: AlwaysEqual(),
        shaped(torch.zeros_like),
        shaped(lambda out: out * float("nan")),
        shaped(lambda out: out.unsqueeze(-1)),
    ):
        assert verdict(lazy, exercise).status == "wrong"


@pytest.mark.parametrize("question", [QUIZ, *QUESTIONS], ids=name)
def test_questions_explain_every_option_without_naming_the_right_one(question):
    assert question.answer in question.why
    assert len(question.why) >= 2
    for option, why in question.why.items():
        assert len(why) > 10
        assert option == question.answer or f"({question.answer})" not in why


class TestParts:
    """An answer that is right for one kind of input, which the exercise declares to be worth something, gets that."""

    CASES = types.MappingProxyType({"sums": FIXED, "means": drawn})

    def verdict(self, function, **parts):
        exercise = Exercise("99/log_prob", 3, log_prob, self.CASES, parts=parts)
        cases = exercise.draw(0)
        return judge(exercise, cases, [observe(function, case) for case in cases])

    def test_what_is_right_counts_and_is_said(self):
        verdict = self.verdict(lambda x, mean, std, reduction: log_prob(x, mean, std, "mean"), sums=1, means=1.5)
        assert verdict[:2] == ("wrong", 1.5)
        assert verdict.text.startswith("99/log_prob: wrong, 1.5 of 3 points (right for: means). ")

    def test_without_parts_or_wrong_everywhere_nothing_counts(self):
        assert self.verdict(lambda x, mean, std, reduction: log_prob(x, mean, std, "mean")).points == 0
        assert self.verdict(lambda x, mean, std, reduction: 7.0, sums=1, means=1.5).points == 0

    def test_all_right_is_all_points(self):
        assert self.verdict(log_prob, sums=1, means=1.5)[:2] == ("passed", 3.0)

    @pytest.mark.parametrize("parts", [dict(squares=1), dict(sums=2, means=1)], ids=["no such case", "nothing left"])
    def test_parts_that_make_no_sense_are_refused(self, parts):
        with pytest.raises(ValueError, match=r"99/log_prob: parts is .*; expected labels of its cases"):
            self.verdict(log_prob, **parts)

    def test_eps_misplaced_keeps_two_of_three(self):
        exercise = find("10/group_advantages")
        inside = list(exercise.mistakes.values())[-1]
        assert check(exercise.name, inside, seed=0)[1] == 2.0 == exercise.parts["mixed groups"]
