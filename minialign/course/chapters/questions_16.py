"""Questions of chapter 16."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "16/q1",
        points=1,
        answer="c",
        why={
            "a": "Rankings are what the loss is made from. Does any order change when all rewards are doubled?",
            "b": "A larger reward does not pull harder here: nothing in the loss is multiplied by it.",
            "c": "Yes: the same answers win, so the same loss is minimised.",
        },
    ),
    Quiz(
        "16/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: on average the model's own samples pull it nowhere; what moves it is that they are few.",
            "b": "For that something would have to prefer the better ones, and nobody has compared them.",
            "c": "It does move: 256 samples are not the law they were drawn from, and the next round draws from them.",
        },
    ),
    Quiz(
        "16/q3",
        points=1,
        answer="b",
        why={
            "a": "It does not fall for lack of samples; every round draws as many as before.",
            "b": "Yes: each round raises F to the K-th power again, and what is left under F^4096 is a handful.",
            "c": "The ranking KL is off by default, and where it is on it slows the fall down.",
        },
    ),
    Quiz(
        "16/q4",
        points=1,
        answer="b",
        why={
            "a": "Its scores differ from one answer of a question to the next; that much is not the trouble.",
            "b": "Yes: answers to easy questions are ranked against answers to hard ones, and take the places.",
            "c": "Both keep one answer in K, so both train on as many.",
        },
    ),
]
