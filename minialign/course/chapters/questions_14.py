"""Questions of chapter 14."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "14/q1",
        points=1,
        answer="c",
        why={
            "a": "The reference stays in every log-ratio. What is it that only one thing in the equation can tell you?",
            "b": "The first noise differs from path to path, so a difference does not remove it.",
            "c": "Yes: log Z is one number a prompt, and both paths of a pair have it.",
        },
    ),
    Quiz(
        "14/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: rewards only ever enter as differences within the prompt, so 1,000 is gone.",
            "b": "It would, if the prompt's level entered the loss. Where does it enter?",
            "c": "AdamW hides a factor on the whole gradient. This is no factor; look at how rewards enter.",
        },
    ),
    Quiz(
        "14/q3",
        points=1,
        answer="b",
        why={
            "a": "Then the loss would keep its gradient wherever a step has gone too far, in both directions.",
            "b": "Yes: the step is outside and the clipped error, which does not depend on it, is the larger one.",
            "c": "Rewards are data. The loss moves probabilities, whatever it is clipped by.",
        },
    ),
    Quiz(
        "14/q4",
        points=1,
        answer="a",
        why={
            "a": "Yes: what x_T decides of the reward is no policy's doing, and two starts differ in it.",
            "b": "A clip that is never reached changes nothing; here the errors do not shrink at the optimum itself.",
            "c": "More updates bring a model nearer to the best prediction. Is there one that predicts this?",
        },
    ),
]
