"""Questions of chapter 24."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "24/q1",
        points=1,
        answer="c",
        why={
            "a": "The preferred samples are as sharp as the student that drew them. Look at what the loss asks of it.",
            "b": "A smaller step goes the same way, only later; the loss has its minimum where it had it.",
            "c": "Yes: the mean of what could have been has the least squared error, and it lies between them.",
        },
    ),
    Quiz(
        "24/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: no noise is drawn behind it, so its density is none; the others are Gaussian.",
            "b": "It costs as much as each of the others.",
            "c": "It decides the finest detail, and a reward may well look at that.",
        },
    ),
    Quiz(
        "24/q3",
        points=1,
        answer="b",
        why={
            "a": "Both likelier would be no comparison at all: nothing would hold them.",
            "b": "Yes: h = 0 makes the argument 0 whatever the ratios are, so the loss is log 2 and has no slope.",
            "c": "That is what a program does that asks 'is the first greater?' and takes no for an answer.",
        },
    ),
    Quiz(
        "24/q4",
        points=1,
        answer="c",
        why={
            "a": "They share a sampler, not a unit: what does each of the two betas multiply?",
            "b": "Which way it goes depends on the level and on the number of elements; there is no such rule.",
            "c": "Yes: one weighs nats, the other squared errors, and both depend on mean or sum over the elements.",
        },
    ),
]
