"""Questions of chapter 12."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "12/q1",
        points=1,
        answer="b",
        why={
            "a": "It is differentiable like the others, and rewards are never differentiated here anyway.",
            "b": "Yes: a policy gradient makes random decisions likelier or less likely, and none follows that call.",
            "c": "They are the same weights that the other calls train; but what would train them at that level?",
        },
    ),
    Quiz(
        "12/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: reward and noise are independent, so its mean is zero, and its variance is not.",
            "b": "A term of mean zero moves no optimum, on average.",
            "c": "To learn from noise, the reward has to be told what the noise did. Here it was paid before.",
        },
    ),
    Quiz(
        "12/q3",
        points=1,
        answer="c",
        why={
            "a": "The error bars would shrink around the same unequal comparison.",
            "b": "They say how much chance there is in these runs, not what another setting would have done.",
            "c": "Yes: the comparison was between a tuned method and one that was not. In section 6 it turned round.",
        },
    ),
    Quiz(
        "12/q4",
        points=1,
        answer="c",
        why={
            "a": "A few more of the calls are then followed by an action. The one that paints is still the last.",
            "b": "A longer run repeats the same gradient, and what is missing in it stays missing.",
            "c": "Yes: noise behind it makes the last call an action, at the price of a noisier gradient.",
        },
    ),
    Quiz(
        "12/q5",
        points=1,
        answer="b",
        why={
            "a": "Distillation made f agree with itself from level to level. Was that part of the reward?",
            "b": "Yes: the reward saw only samples of four calls, and nothing kept f consistent with itself.",
            "c": "More calls are better for a distilled model. This one has been changed since.",
        },
    ),
]
