"""Questions of chapter 23."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "23/q1",
        points=1,
        answer="b",
        why={
            "a": "Twice a factor that is 0 is still 0; and who wins does not depend on it.",
            "b": "Yes: alpha = gamma / 2 makes both blends the same density, and a ratio of equals says nothing.",
            "c": "Its loss is log 2 whatever the weights are, so what would push it there?",
        },
    ),
    Quiz(
        "23/q2",
        points=1,
        answer="c",
        why={
            "a": "A larger gamma makes the same loss fall faster. Does it end anywhere?",
            "b": "It divides the same logits by a number. A function that falls for ever still does.",
            "c": "Yes: with 1 - p on the other side a large logit costs, and the sum has its minimum at logit p.",
        },
    ),
    Quiz(
        "23/q3",
        points=1,
        answer="a",
        why={
            "a": "Yes: 14 evaluations an image and step against 4, so the axis decides who is ahead.",
            "b": "Is a step of one worth a step of the other? Count what each asks of the network.",
            "c": "The pairs are the same, and each is labelled once. What differs is what is done with them.",
        },
    ),
    Quiz(
        "23/q4",
        points=1,
        answer="b",
        why={
            "a": "It shrinks both arms' error bars around one and the same confounded difference.",
            "b": "Yes: three things changed at once. Only an arm that changes one of them can say which it was.",
            "c": "A larger gain would not say where it comes from either.",
        },
    ),
]
