"""Questions of chapter 17."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "17/q1",
        points=1,
        answer="c",
        why={
            "a": "They may lie anywhere: with equal moments the distance is 0, however the points are spread.",
            "b": "Samples that all lie there have the right mean and no spread at all: the trace of the exemplars' "
            "covariance is what is left.",
            "c": "Yes: mean and covariance are all that it sees. Two shapes with equal moments tie.",
        },
    ),
    Quiz(
        "17/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: sums fall apart into samples, so each pair decides for itself, in whatever order.",
            "b": "A reward of a set whose terms meet (a variance, say) is what makes order matter. A mean has no such "
            "terms.",
            "c": "It is a special case, and a good test: both rules must then choose alike.",
        },
    ),
    Quiz(
        "17/q3",
        points=1,
        answer="b",
        why={
            "a": "More passes sort the same samples better; what the policy draws has changed since.",
            "b": "Yes: D+ is better than what the OLD policy draws. Nothing says that it is better than what this one "
            "draws.",
            "c": "It scores what it is given, whoever drew it.",
        },
    ),
]
