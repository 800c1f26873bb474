"""Questions of chapter 25."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "25/q1",
        points=1,
        answer="b",
        why={
            "a": "Labels of the method look at the text alone: the references show no moon.",
            "b": "Yes: judged by the prompt alone, the base's picture is the better one, and p is below 1/2.",
            "c": "It would be so at equal rewards. The references do not fit the prompt, and the label says so.",
        },
    ),
    Quiz(
        "25/q2",
        points=1,
        answer="c",
        why={
            "a": "beta k = log(p / (1 - p)) is where it is smallest, and that is finite for soft labels.",
            "b": "L_sim alone would do that; the preference is what speaks against it.",
            "c": "Yes: whatever is fitted to the base's pictures at those prompts is not the subject. The better the "
            "network tells the prompts apart, the more completely.",
        },
    ),
    Quiz(
        "25/q3",
        points=1,
        answer="a",
        why={
            "a": "Yes: the highest of many noisy looks is high by luck as well. Judge with fresh samples and prompts.",
            "b": "It is measured with the same model; the samples are what differs.",
            "c": "The mean of many samples would still be the highest of twenty such means.",
        },
    ),
]
