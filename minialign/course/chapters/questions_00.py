"""Questions of chapter 00."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "00/q1",
        points=1,
        answer="a",
        why={
            "a": "Yes. It compares the numbers of its own samples and makes the better ones likelier.",
            "b": "Tempting, because networks are trained by gradients. But our oracle counts connected pixels, which "
            "has no gradient, and the training went well.",
            "c": "Tempting, because that is how the base model came about. But in this training no example was shown "
            "to the model; it saw its own pictures and their scores.",
        },
    ),
    Quiz(
        "00/q2",
        points=1,
        answer="c",
        why={
            "a": "Tempting, because the number went up. But two such numbers differ by about as much when nothing "
            "has changed at all: work out the standard error of the difference.",
            "b": "Tempting, because the error bars overlap. But not being sure of a difference is not the same as "
            "being sure that there is none.",
            "c": "Yes. The errors of the two add as squares: sqrt(0.05^2 + 0.05^2) is 0.07, more than the difference.",
        },
    ),
    Quiz(
        "00/q3",
        points=1,
        answer="b",
        why={
            "a": "Tempting, because every axis is kept somewhere. But an axis of size 1 costs nothing: it is the "
            "same 64 numbers.",
            "b": "Yes. Broadcasting is silent: each score meets each sample, the averages cancel, and the run looks "
            "alive while it learns nothing. Chapter 10 has you find that bug.",
            "c": "Tempting, because a reward may well stop the gradient. But an axis of size 1 does not, and most "
            "methods ask for no gradient of the reward.",
        },
    ),
    Quiz(
        "00/q4",
        points=1,
        answer="c",
        why={
            "a": "Tempting, because a scorer that is right more often than not should be right more and more often. "
            "But selection looks only at the very top of its ranking, and there its errors are what is selected.",
            "b": "Tempting, because over-optimisation is known for its falling curves. But with a good scorer the "
            "oracle keeps rising; it depends on how far the two agree at the top.",
            "c": "Yes. The score must rise, for it is what is selected. What comes with it depends on how far the two "
            "agree among the highest scores.",
        },
    ),
    Quiz(
        "00/q5",
        points=1,
        answer="b",
        why={
            "a": "Tempting, because another network means other densities. But the method file asks the policy for "
            "them, and the policy asks the pipeline's own modules.",
            "b": "Yes: only you know what you want. The policy wraps the pipeline; the method takes both as they are.",
            "c": "Tempting, because here an exact oracle was at hand. But training never used anything but the reward; "
            "an oracle is for checking, and few real problems have one.",
        },
    ),
]
