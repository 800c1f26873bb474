"""Questions of chapter 51."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "51/q1",
        points=1,
        answer="c",
        why={
            "a": "It is bounded, true. But what becomes of a shift and a scale when the group is centred and scaled?",
            "b": "A smaller spread would act as a larger KL weight under PPO. Here the group's std divides it away.",
            "c": "Yes: minmax is affine, and a group's mean and std undo any shift and scale. Something else differed: "
            "the seed, or a statistic that moved within the round.",
        },
    ),
    Quiz(
        "51/q2",
        points=1,
        answer="a",
        why={
            "a": "Yes: 0.999 beats 0.998, and whitening makes a whole standard deviation of it. Without a price per "
            "nat nothing says that the rest is not worth the journey.",
            "b": "The reward stays below 1, but whitened advantages compare, however small differences have become.",
            "c": "The slope is small there, not zero, and float32 still tells such win rates apart.",
        },
    ),
    Quiz(
        "51/q3",
        points=1,
        answer="b",
        why={
            "a": "It is one standard deviation on either side, as in the authors' code. A wider one binds less.",
            "b": "Yes: mean and std are those of the policy's own rewards. As it hacks, the window follows it.",
            "c": "Being uncentred mixes the prompts up, which costs something, but not the bound.",
        },
    ),
    Quiz(
        "51/q4",
        points=1,
        answer="c",
        why={
            "a": "All come from the same base model, but ten and one are not the same numbers: look at the curves.",
            "b": "Advantages are centred in the batch, but one reference shifts the argument of a sigmoid, not f.",
            "c": "Yes: the references only say where f bends, and a noise of one base standard deviation there is "
            "small beside the distance that the policy travels.",
        },
    ),
    Quiz(
        "51/q5",
        points=1,
        answer="a",
        why={
            "a": "Yes: then a higher score always means a better response on average, and flattening the top can only "
            "throw information away.",
            "b": "Exploits are scores that no honest response reaches; a bounded reward does not chase them far.",
            "c": "Heavy tails are where it helps most: the highest scores are then mostly error.",
        },
    ),
]
