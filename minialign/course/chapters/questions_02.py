"""Questions of chapter 02."""

from minialign.course.check import Quiz

QUESTIONS = [
    Quiz(
        "02/q1",
        points=1,
        answer="c",
        why={
            "a": "Compare with an approximation that knows nothing of the data but their mean. What does it score?",
            "b": "The figure is right. It is the denominator that needs a second look.",
            "c": "Yes: at high noise the score is nearly -noise / sigma whatever the data are, and D = mean explains "
            "99.9 % of it. Put the mean in the denominator, and only what the data are about counts.",
        },
    ),
    Quiz(
        "02/q2",
        points=1,
        answer="b",
        why={
            "a": "The sigma^-2 term is made of x and the mean, and these two agree.",
            "b": "Yes: the terms in sigma^-1 to sigma^-3 need mean and covariance only; at sigma^-4 the third moment "
            "comes in. By how much they differ there depends on how lopsided the data are.",
            "c": "If they never differed, noise would have erased the difference for good; but one can go back along "
            "the path to the data.",
        },
    ),
    Quiz(
        "02/q3",
        points=1,
        answer="c",
        why={
            "a": "More training does bring it nearer to its training set, in the end. But its error on points that it "
            "has never seen is nearly the same, and below all closed forms there. Is that a lack?",
            "b": "With a wrong sigma it would be far off for new pictures, too; there it is better than all others.",
            "c": "Yes: at this level the training set answers with the nearest point. The network answers as if there "
            "were data between the points as well, for old and for new pictures alike.",
        },
    ),
    Quiz(
        "02/q4",
        points=1,
        answer="a",
        why={
            "a": "Yes: 1,437 digits in 50 clusters are 29 each, too few for a covariance in 64 dimensions. Most "
            "directions get no variance, and at low noise every direction counts.",
            "b": "At higher noise 50 clusters do as well as 10: the centres are good enough.",
            "c": "The limit of ever more clusters is the training set, and the network is *not* there.",
        },
    ),
    Quiz(
        "02/q5",
        points=1,
        answer="a",
        why={
            "a": "Yes: F starts near 0, so D is near c_skip x, the denoiser of an isotropic Gaussian; and at low "
            "noise any denoiser is nearly x. Judge learning where c_skip is small, or count from that baseline.",
            "b": "The levels near sigma = 0.1 are rare in training, but there was no training.",
            "c": "It has not seen a single picture yet.",
        },
    ),
]
