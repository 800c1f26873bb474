"""Questions of chapter 20."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "20/q1",
        points=1,
        answer="a",
        why={
            "a": "Yes: turned round, the votes are as easy to learn, and loss and accuracy look the same.",
            "b": "A large beta keeps the model near the base, or makes it jumpy; it does not turn a preference round.",
            "c": "Two noises weaken what is learned, by a factor between 0 and 1. They do not turn it round.",
        },
    ),
    Quiz(
        "20/q2",
        points=1,
        answer="c",
        why={
            "a": "It would, if the noises were not squared against anything. Draw many pairs: which way does u err?",
            "b": "A bias it is, but in which direction? The margin that is seen is larger in size than the true one.",
            "c": "Yes: the margin is seen with an error, and a regression on inexact numbers finds too small a slope.",
        },
    ),
    Quiz(
        "20/q3",
        points=1,
        answer="b",
        why={
            "a": "A wrong sign makes the margin fall. Here it rises: the rejected error rises more.",
            "b": "Yes: the loss knows the two errors only by their difference.",
            "c": "The noise is the same for both errors and both models, so it cancels in what is compared.",
        },
    ),
    Quiz(
        "20/q4",
        points=1,
        answer="c",
        why={
            "a": "The tilt is what a model of erring voters leads to, at one level, with one beta. Who never errs?",
            "b": "The mean of the winners is where SFT ends. DPO goes on.",
            "c": "Yes: doubling every logit always makes the loss smaller, so only the end of training stops it.",
        },
    ),
]
