'''The course: exercises that check themselves, and the builder of the student's edition.

A chapter has three files: `solutions/NN_name.ipynb`, the source; `notebooks/NN_name.ipynb`, built from it by `minialign
course build`; and `chapters/chapter_NN.py`, which keeps references, cases, mistakes and answers out of both. (Beside it
stand questions, in `questions_NN.py`, and in `forms_NN.py` two or three other right solutions of each exercise, as
students write them. They must pass, and wrong answers are named by what one change makes of them: `mutants`.)

    exercises = [
        Exercise(
            "01/gaussian_log_prob",
            points=3,
            reference=gaussian_log_prob,  # the package's own; handed on to whoever has not passed
            cases={  # each with the kind of input that it is
                "one number": dict(x=torch.zeros(1, 1), mean=torch.ones(1, 1), std=torch.ones(1), reduction="sum"),
                "several axes": lambda g: dict(x=torch.randn(3, 2, 5, generator=g), ...),  # drawn afresh, four times
            },
            mistakes={"one value per sample, not one for all": lambda **k: gaussian_log_prob(**k).sum()},
            grad_wrt=("mean",),  # compare these gradients too
        ),
        Quiz("01/q1", points=1, answer="b", why={"a": "Tempting, because ... But ...", "b": "Yes: ...", "c": "..."}),
    ]

In the notebook, under a markdown cell with `Difficulty 2/5 · Importance 5/5 · 10 min · 3 points`, a solution cell and a
graded cell; for a question, the same two cells without a header:

    def gaussian_log_prob(x, mean, std, reduction):
        """log N(x; mean, std^2 I), one value per sample: (b, *dims) -> (b,)."""
        ### BEGIN SOLUTION
        return ...
        ### END SOLUTION

    gaussian_log_prob, points = check("01/gaussian_log_prob", gaussian_log_prob)
    points

    q1 = None  # "a", "b" or "c"
    ### BEGIN SOLUTION
    q1 = "b"
    ### END SOLUTION

    quiz("01/q1", q1)

Cases are keyword arguments: distinct primes for axes, batch 1, every limit and branch. Mistakes take the same
arguments; an answer that equals a mistake's on every case gets its key as the hint. The region
holds the `return`, after a docstring or a neutral line. `tests/course/test_check.py` audits every chapter: the
reference passes, each mistake is refused and named. The builder sets nbgrader's metadata.
'''

from minialign.course.check import Exercise, Quiz, check, quiz
from minialign.course.clock import start_clock
from minialign.course.stored import stored

start_clock()

__all__ = ["Exercise", "Quiz", "check", "quiz", "stored"]
