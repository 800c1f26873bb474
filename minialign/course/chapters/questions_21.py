"""Questions of chapter 21."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "21/q1",
        points=1,
        answer="c",
        why={
            "a": "The loss of section 3 stood there, too, while the samples went where they should.",
            "b": "More of beta would widen the band a little. It says nothing about what was learned.",
            "c": "Yes: the clip leaves the loss a band of two hundredths. Look at the reward, and at log p beside it.",
        },
    ),
    Quiz(
        "21/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: a clamp is flat outside. But weights are shared, and other states still move them.",
            "b": "Nothing pulls at it any more, in either direction.",
            "c": "Each ratio has a clamp of its own; the partner that is still inside keeps its slope.",
        },
    ),
    Quiz(
        "21/q3",
        points=1,
        answer="b",
        why={
            "a": "They have noise: without any, the step would have no density at all, and training would not start.",
            "b": "Yes: for that step the label is noisy, and a noisy label is explained by a smaller slope.",
            "c": "Both paths are drawn by the same model, with independent noise after the shared start.",
        },
    ),
]
