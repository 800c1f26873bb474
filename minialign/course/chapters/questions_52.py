"""Questions of chapter 52."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "52/q1",
        points=1,
        answer="b",
        why={
            "a": "For any pair of means that a policy can have, short of the edge, some weights lead exactly there.",
            "b": "Yes: a weight is a price, and where it leads depends on who pays it. A threshold says where to be.",
            "c": "They can: tuned on one model they did nearly as well as tuned thresholds on models of the same kind.",
        },
    ),
    Quiz(
        "52/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: the constraint holds already; the nearest policy that fulfils it is the base model.",
            "b": "That is what an equality would ask for. The constraint of mu-PPO says *at least*.",
            "c": "A multiplier above 0 pays for reward only while there is too little. Here it falls, and KL rules.",
        },
    ),
    Quiz(
        "52/q3",
        points=1,
        answer="c",
        why={
            "a": "A reward and its threshold share a scale, and each multiplier has a violation of its own.",
            "b": "Both are means over many numbers; a small round makes either noisy.",
            "c": "Yes: an answer of forty tokens then counts ten times one of four.",
        },
    ),
    Quiz(
        "52/q4",
        points=1,
        answer="b",
        why={
            "a": "Advantages are standardised, so the policy sees no difference. But who else reads v - theta?",
            "b": "Yes: ten times as far, until the gradient's clip cuts in (which then slows the other one, too).",
            "c": "Standardising each advantage by itself is there so that this cannot happen; later it will, by l.",
        },
    ),
    Quiz(
        "52/q5",
        points=1,
        answer="a",
        why={
            "a": "Yes: a value then belongs to some point on the way, and which depends on what was asked before.",
            "b": "A cold start's values are no less noisy, and that search does better.",
            "c": "The simplex may be small or large: what it is told about its corners is the trouble.",
        },
    ),
]
