"""Questions of chapter 13."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "13/q1",
        points=1,
        answer="c",
        why={
            "a": "More noise alone would spread the samples. What stands against it?",
            "b": "The network is the same in both; it is asked at other points, that is all.",
            "c": "Yes. What noise spreads, the score's term draws together again; only the paths differ, and the size "
            "of the steps leaves an error in either.",
        },
    ),
    Quiz(
        "13/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: the group's mean and std move along, and the advantages stay. Only beta, if it is not 0, would "
            "notice, had the std not been divided out.",
            "b": "An advantage is measured in the group's own standard deviations. What does a factor do to that?",
            "c": "The clip is on the ratio of probabilities, which know nothing of rewards.",
        },
    ),
    Quiz(
        "13/q3",
        points=1,
        answer="b",
        why={
            "a": "Every sample has an advantage against that mean, above or below it.",
            "b": "Yes. All rewards equal: the mean is each of them, nothing is left over, the samples were paid for in "
            "vain. Flow-GRPO's code throws such groups away.",
            "c": "Clipping needs a ratio that has moved. In the first update of a round all ratios are 1.",
        },
    ),
    Quiz(
        "13/q4",
        points=1,
        answer="c",
        why={
            "a": "It runs no SDE at all: the samples may come from any sampler.",
            "b": "It has advantages, too, under the name of r.",
            "c": "Yes: it noises finished samples again, and asks the network one velocity at a time. Nothing of how "
            "they were drawn is kept.",
        },
    ),
]
