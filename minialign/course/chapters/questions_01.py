"""Questions of chapter 01."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "01/q1",
        points=1,
        answer="a",
        why={
            "a": "Yes: when x_t says nothing about x_0, the best guess in squared error is the mean of the data. On "
            "compass that is the empty middle of the plane, on digits a grey smudge.",
            "b": "That would be a sample from the data; but a network trained with squared error answers with an "
            "average over all data that could have led to this x_t, and here that is nearly everything.",
            "c": "That is what it answers at the other end, where alpha_bar is near 1 and there is nothing to remove.",
        },
    ),
    Quiz(
        "01/q2",
        points=1,
        answer="c",
        why={
            "a": "A floor under std would remove the nan, and the log-probabilities would then be those of a sampler "
            "that nobody ran. The nan is the messenger.",
            "b": "The network's prediction and its training do not depend on eta at all: eta = 0 is a perfectly good "
            "sampler, often the better one for few steps.",
            "c": "Yes: given x_T the run is a function, not a draw. Nothing was tried that could be made more or less "
            "likely. What remains is the gradient through the sampler, if the reward can be differentiated.",
        },
    ),
    Quiz(
        "01/q3",
        points=1,
        answer="a",
        why={
            "a": "Yes: the gain k is negative at every step, so a brighter next state needs a lower noise prediction.",
            "b": "This takes the noise prediction for the thing that is drawn. It is what gets subtracted.",
            "c": "The baseline makes the average advantage zero, not the average of advantage times gradient.",
        },
    ),
    Quiz(
        "01/q4",
        points=1,
        answer="b",
        why={
            "a": "Rounding in float32 is smaller by orders of magnitude: look at the first row of the table in part 9.",
            "b": "Yes: the weights have not changed, so whatever differs between the two passes is a bug in how they "
            "are called. Dropout, another guidance scale, other eta, stored states in half precision.",
            "c": "The clip range acts on a ratio once it is computed; it cannot move it.",
        },
    ),
    Quiz(
        "01/q5",
        points=1,
        answer="b",
        why={
            "a": "It would be right for a sampler whose law is the data's. Yours is narrower, and KL training starts "
            "from what is really drawn.",
            "b": "Yes: the reference in the KL is the sampler with its 20 steps, so the target is the tilt of its law, "
            "with Var(x_0) = 0.78 where the data have 1.",
            "c": "A larger batch makes the estimate of the shift more precise, and it converges to the same number.",
        },
    ),
]
