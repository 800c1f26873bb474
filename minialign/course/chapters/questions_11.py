"""Questions of chapter 11."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "11/q1",
        points=1,
        answer="c",
        why={
            "a": "The prefix has no gradient, but not because of its length. Who walks it, and how often?",
            "b": "Its transitions are Gaussian like all others; their densities exist and are simply not needed.",
            "c": "Yes: all branches of a group share it, so it cannot explain why one of them did better.",
        },
    ),
    Quiz(
        "11/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: which image is kept depends on its own reward, so the mean over kept images is no longer the "
            "policy gradient. It is a useful direction, and another one.",
            "b": "The thresholds decide how many are kept; without them the choice would still depend on the outcome.",
            "c": "The extremes do carry more signal. The question is what choosing by the outcome does to a mean.",
        },
    ),
    Quiz(
        "11/q3",
        points=1,
        answer="b",
        why={
            "a": "The window is what it was; what differs is who else feels the update.",
            "b": "Yes: with one weight for all steps, what late steps learn also moves the early ones, and with them "
            "the composition that was to be left alone.",
            "c": "More weights would rather overfit more. Think about which steps a gradient reaches.",
        },
    ),
    Quiz(
        "11/q4",
        points=1,
        answer="b",
        why={
            "a": "It counts: five queries a group, of which at most two images are trained on.",
            "b": "Yes: network evaluations fall to a third, reward queries rise. If a person gives the rewards, think "
            "twice.",
            "c": "Both axes were measured, and they disagree. Which one is dear in your own problem?",
        },
    ),
    Quiz(
        "11/q5",
        points=1,
        answer="c",
        why={
            "a": "A later start of the window leaves even less of that variance inside it.",
            "b": "More branches make a better baseline for what the window decides. It decides next to nothing here.",
            "c": "Yes: no baseline and no selection helps where the window's own actions do not matter. Lengthen the "
            "window until it decides the attribute, or train all steps.",
        },
    ),
]
