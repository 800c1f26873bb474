"""Questions of chapter 50."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "50/q1",
        points=1,
        answer="a",
        why={
            "a": "Yes. Only differences within a question were learned. Normalising over base answers fixes shift and "
            "scale on average; subtracting references of the same question (chapter 51) does it one by one.",
            "b": "The loss cannot tell them apart: a constant added to all answers of one question changes no "
            "comparison.",
            "c": "It can: the loss is blind to levels of questions, so training leaves them wherever they started.",
        },
    ),
    Quiz(
        "50/q2",
        points=1,
        answer="b",
        why={
            "a": "Too much: log n would be reached if the whole mass sat on the top n-th of the base's answers.",
            "b": "Yes: log n - (n - 1) / n, 4.5 nats at n = 256. Ties, as in a small world, make it less.",
            "c": "It does not depend on the reward as long as no two answers score the same: only ranks enter.",
        },
    ),
    Quiz(
        "50/q3",
        points=1,
        answer="c",
        why={
            "a": "Bounds on beta change what is paid for the log-ratio, not its mean.",
            "b": "A KL is never negative; what was averaged must be something else.",
            "c": "Yes. Each sampled log-ratio may have either sign; only its mean under the policy is the KL, and "
            "that is never negative. A negative mean again and again says: sampled from one law, scored by another.",
        },
    ),
    Quiz(
        "50/q4",
        points=1,
        answer="c",
        why={
            "a": "Long before the plateau gold may have turned: look at section 1.",
            "b": "The slope is positive before gold turns and after.",
            "c": "Yes: gold on held-out questions, which costs people. The KL at least says how far one has gone.",
        },
    ),
    Quiz(
        "50/q5",
        points=1,
        answer="a",
        why={
            "a": "Yes: a constant factor that a learning rate can take up; GRPO then also divides by the std.",
            "b": "It is RLOO that leaves it out.",
            "c": "No critic enters either of them.",
        },
    ),
]
