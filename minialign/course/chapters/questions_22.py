"""Questions of chapter 22."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "22/q1",
        points=1,
        answer="c",
        why={
            "a": "Try it: x_t and its target then contradict each other, and the errors are those of no noise.",
            "b": "Both get the same t, but each has its own state, and so its own implied noise.",
            "c": "Yes: each state is inverted from its own image, and its target is what takes that image there.",
        },
    ),
    Quiz(
        "22/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: five calls an image more, ten a pair, beside the eight evaluations of Diffusion-DPO.",
            "b": "Only the two last evaluations of a pair are differentiated; the inversion has no gradient.",
            "c": "The reference was there before; it is what every logit is measured against.",
        },
    ),
    Quiz(
        "22/q3",
        points=1,
        answer="b",
        why={
            "a": "The code runs without a complaint: every number is finite.",
            "b": "Yes: a state of a noisier level is described as one of a cleaner level: its noise looks too big.",
            "c": "The reference is asked at the same wrong level, but it makes the same error only at the first step.",
        },
    ),
    Quiz(
        "22/q4",
        points=1,
        answer="b",
        why={
            "a": "More seeds make the comparison sharper, not fairer: both still differ in two things.",
            "b": "Yes: a smaller logit acts like a smaller beta, so part of the gain may be only that.",
            "c": "Equal network evaluations answer another question, what it costs.",
        },
    ),
]
