"""Questions of chapter 03."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "03/q1",
        points=1,
        answer="a",
        why={
            "a": "Yes: a start of plain noise and mean at that level gains nearly as much. What the closed form itself "
            "adds shows below, where the naive starts fall behind.",
            "b": "The closed form is exact for one Gaussian only; above sigma_skip the network is, if anything, the "
            "better of the two. What else is different between the two runs?",
            "c": "Both runs make the same number of evaluations.",
        },
    ),
    Quiz(
        "03/q2",
        points=1,
        answer="b",
        why={
            "a": "With five seeds it is still there. What can this distance see, and what not?",
            "b": "Yes: it compares means and covariances, and those are all that the jump puts in. A start that knows "
            "nothing else gets a perfect mark from a judge that looks at nothing else.",
            "c": "Compare pictures, or the likelihood, before you believe it.",
        },
    ),
    Quiz(
        "03/q3",
        points=1,
        answer="c",
        why={
            "a": "With exact arithmetic it would be the same.",
            "b": "The flow knows no range; shift and scale the data and everything shifts and scales along.",
            "c": "Yes: the flow carries the marginal at 80 onto that at sigma_skip, and noise without the mean, or "
            "without the data's own spread, is not that marginal. Draw from N(mean, Sigma + 80^2 I) instead.",
        },
    ),
    Quiz(
        "03/q4",
        points=1,
        answer="b",
        why={
            "a": "The harm is done before the first step: more of them start from the same wrong place.",
            "b": "Yes: the network aims at a small part of the data, and the start was drawn from all of it. Far below "
            "the data's scale it is too late to go elsewhere.",
            "c": "Guidance pulls harder towards the prompt. It may hide a bad start; it does not make a good one.",
        },
    ),
    Quiz(
        "03/q5",
        points=1,
        answer="a",
        why={
            "a": "Yes: means and covariances of true scenes say where red and blue belong, which this network does not "
            "know. A good trick if you have such pictures; but then it is no proof that the jump is free.",
            "b": "Fewer steps alone leave the accuracy where it is: that was the control.",
            "c": "Then the prompt's statistics of the model's own pictures would help as much. They do not.",
        },
    ),
]
