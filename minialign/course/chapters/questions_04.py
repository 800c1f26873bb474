"""Questions of chapter 04."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "04/q1",
        points=1,
        answer="c",
        why={
            "a": "The teacher enters only through one small step, from t to t'. It never says where a run ends.",
            "b": "The average slows the target down. Slow or fast, a constant would still have no loss.",
            "c": "Yes: agreement with a neighbour spreads whatever is known somewhere, and only at t = 0 is anything "
            "known. Without that anchor a constant agrees with itself perfectly.",
        },
    ),
    Quiz(
        "04/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: the student learns to agree with DDIM steps, and so learns what those steps compose to. A finer "
            "grid or a better solver moves the fixed point; training only approaches it.",
            "b": "A larger network could represent the exact map as well as a wrong one; which one is it asked for?",
            "c": "More iterations bring the student nearer to its fixed point. Where is that point?",
        },
    ),
    Quiz(
        "04/q3",
        points=1,
        answer="a",
        why={
            "a": "Yes: g = w + 1. The paper's w counts what is added to the conditional prediction, the pipeline's "
            "guidance_scale what multiplies the difference, starting from the unconditional one.",
            "b": "At w = 8 the picture is guided a little too strongly: the two scales do not have the same zero.",
            "c": "The scales do differ by one. But which of them calls no guidance 0, and which calls it 1?",
        },
    ),
    Quiz(
        "04/q4",
        points=1,
        answer="b",
        why={
            "a": "The last call adds no noise, so it is a function, not a draw. How many draws are left?",
            "b": "Yes: a density needs noise, and noise follows every call but the last. With one call there is none, "
            "and nothing for a policy gradient to hold on to.",
            "c": "The starting noise is drawn, but not by the network: its density has no parameters.",
        },
    ),
    Quiz(
        "04/q5",
        points=1,
        answer="c",
        why={
            "a": "For an exact f and an exact start this holds at any number of calls: it is what check 3 says. A "
            "trained f is not exact.",
            "b": "Noise alone does no harm: with an exact f re-noising leaves the distribution as it is.",
            "c": "Yes: each call brings its own error, and the starting points of the next are as wrong as the "
            "answers of the last. Whether a further call pays has to be measured.",
        },
    ),
]
