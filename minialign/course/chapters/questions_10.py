"""Questions of chapter 10."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "10/q1",
        points=1,
        answer="a",
        why={
            "a": "Yes: before any update both log-probabilities belong to the same weights, so any difference comes "
            "from computing them in two ways: dropout, guidance in one of them only, half precision, a rounded state.",
            "b": "The clip range decides what is done with a ratio, not what the ratio is.",
            "c": "Tempting, because a large step does move the ratio. But no step has been taken yet.",
        },
    ),
    Quiz(
        "10/q2",
        points=1,
        answer="c",
        why={
            "a": "Whether a ratio is clipped depends on the ratio alone. What is its logarithm a mean of?",
            "b": "Then the gradient would vanish too. Here every sample still pushes with full force.",
            "c": "Yes: the log-ratio is a mean over 16,384 elements, so it stays near 0; the authors use 1e-4 there.",
        },
    ),
    Quiz(
        "10/q3",
        points=1,
        answer="b",
        why={
            "a": "The reward is high, but an advantage compares: high against what?",
            "b": "Yes: all eight equal their mean. Eight queries were spent, and nothing was learned from them.",
            "c": "A division by zero is what eps prevents; 0 / (0 + eps) is an honest number.",
        },
    ),
    Quiz(
        "10/q4",
        points=1,
        answer="a",
        why={
            "a": "Yes: training tilts what the sampler does by chance. Twenty steps give less variance than the data "
            "have, and the part that the starting noise decides cannot be tilted at all.",
            "b": "Noise in the estimate would scatter the shift around the target; it does not move the target itself.",
            "c": "This objective was not clipped: one minibatch, ratio 1.",
        },
    ),
    Quiz(
        "10/q5",
        points=1,
        answer="b",
        why={
            "a": "Reward is what was optimised: it is the last number to be suspicious of itself.",
            "b": "Yes: an independent judge, and what was given up. A scorer cannot say that it is being fooled.",
            "c": "A loss says little in policy gradient: at ratio 1 it is minus the mean advantage, about 0.",
        },
    ),
]
