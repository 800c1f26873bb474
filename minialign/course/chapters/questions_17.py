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
            "a": "A quarter of beta times the difference of the two gradients is left: the loss is log 2, not flat.",
            "b": "Yes: both errors may rise together, and the loss is content while their difference grows. Beta alone "
            "holds the policy back, and too small it does not.",
            "c": "It is frozen. What it knows cannot change, only how far the policy has gone from it.",
        },
    ),
    Quiz(
        "17/q4",
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
