"""Questions of chapter 15."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "15/q1",
        points=1,
        answer="b",
        why={
            "a": "The score of the noise is exact whatever comes after it; only what it is multiplied with is noisier.",
            "b": "Yes: the later noises move the sample too, and to the learner that is luck in the reward.",
            "c": "The KL compares two laws of the first noise. It does not know what the sampler does with it.",
        },
    ),
    Quiz(
        "15/q2",
        points=1,
        answer="c",
        why={
            "a": "The score has mean zero, so a constant times it has, too.",
            "b": "A step may well go the wrong way, by bad luck. Does it so on average?",
            "c": "Yes: a constant times the score is zero on average, and its square is not.",
        },
    ),
    Quiz(
        "15/q3",
        points=1,
        answer="a",
        why={
            "a": "Yes: under other steps a noise may become another picture. One law here kept its worth: measure.",
            "b": "It would be nearer to the exact flow; but the law has learned the errors of this one, too.",
            "c": "The weights are as they were. But what does a noise become under other steps?",
        },
    ),
    Quiz(
        "15/q4",
        points=1,
        answer="b",
        why={
            "a": "Every reward would be 0, as before, and so would every advantage.",
            "b": "Yes: a law of the noise chooses among what the model draws, and this it does not draw.",
            "c": "The KL holds a law that is pulled somewhere. Here nothing pulls.",
        },
    ),
]
