"""Exercises of chapter 25: the harmonic reward, the loss of a pair, its first step, which checkpoint to keep."""

import torch
from torch.nn import functional as F

from minialign.course.chapters.questions_25 import QUESTIONS
from minialign.course.check import Exercise
from minialign.methods.rpo_subject import harmonic_mean, subject_losses

# ---- the harmonic reward ---------------------------------------------------------------------------------------------


def harmonic(image, text, lam):
    """1 / (lam / S_I + (1 - lam) / S_T), (n,); S_T at lam = 0, S_I at lam = 1, and 0 where one of the two is 0."""
    return harmonic_mean(image, text, lam)


def _combined(inside):
    """A variant: inside(image, text, lam) where nothing is 0; the limits are right."""

    def wrong(image, text, lam):
        if lam == 0:
            return text
        if lam == 1:
            return image
        return inside(image, text, lam).nan_to_num(0.0)

    return wrong


def _without_limits(image, text, lam):
    found = 1 / (lam / image + (1 - lam) / text)
    return found


def _of(*values):
    return torch.tensor(values)


def _similarities(g, n=6):
    image, text = 0.05 + 0.9 * torch.rand(2, n, generator=g)
    return dict(image=image, text=text, lam=0.3)


HARMONIC = Exercise(
    "25/harmonic",
    points=3,
    reference=harmonic,
    cases={
        "lam = 0.3": dict(image=_of(0.9, 0.5), text=_of(0.1, 0.5), lam=0.3),
        "drawn": _similarities,
        "lam = 0: the text alone, whatever the image": dict(image=_of(0.0, 0.4), text=_of(0.7, 0.2), lam=0.0),
        "lam = 1: the image alone, whatever the text": dict(image=_of(0.3, 0.4), text=_of(0.0, 0.2), lam=1.0),
        "one of the two is 0": dict(image=_of(0.0, 0.8, 0.6), text=_of(0.9, 0.0, 0.6), lam=0.5),
        "both are 0": dict(image=_of(0.0, 0.5), text=_of(0.0, 0.25), lam=0.5),
    },
    mistakes={
        "that is the weighted ARITHMETIC mean: a sample that copies and ignores the prompt scores well in it.": (
            lambda image, text, lam: lam * image + (1 - lam) * text
        ),
        "that is the geometric mean; the harmonic one averages 1 / S.": _combined(
            lambda image, text, lam: image**lam * text ** (1 - lam)
        ),
        "lam belongs to the image, 1 - lam to the text.": lambda image, text, lam: harmonic(image, text, 1 - lam),
        "the inverse is missing: the average of 1 / S falls where S rises.": _combined(
            lambda image, text, lam: lam / image + (1 - lam) / text
        ),
        "the weights are left out (or both are 1/2).": _combined(
            lambda image, text, lam: 2 * image * text / (image + text)
        ),
        "that is the smaller of the two; the harmonic mean lies above it.": _combined(
            lambda image, text, lam: torch.minimum(image, text)
        ),
        "that is the product of the two: at S_I = S_T = 1/2 it should still be 1/2.": _combined(
            lambda image, text, lam: image * text
        ),
        "0 / 0 is nan: at lam = 0 or 1 what has no weight may be 0, and where both are 0 the mean is 0.": (
            _without_limits
        ),
        "a weight is missing in the inverse: (1 - lam) stands before the text's term.": _combined(
            lambda image, text, lam: 1 / (lam / image + 1 / text)
        ),
        "a weight is missing in the inverse: lam stands before the image's term.": _combined(
            lambda image, text, lam: 1 / (1 / image + (1 - lam) / text)
        ),
        "at lam = 0 the text alone counts, at lam = 1 the image alone: not the other way round.": (
            lambda image, text, lam: image if lam == 0 else text if lam == 1 else harmonic(image, text, lam)
        ),
    },
)

# ---- the loss of a pair ----------------------------------------------------------------------------------------------


def rpo_loss(error_ref, error_gen, base_ref, base_gen, p, beta):
    """e_R - p log sigmoid(beta k) - (1 - p) log sigmoid(-beta k), k = (e0_R - e_R) - (e0_G - e_G), (n,)."""
    similarity, preference, _ = subject_losses(error_ref, error_gen, base_ref, base_gen, p, beta)
    return similarity + preference


def _loss(gain=lambda r, g, b, c: (b - r) - (c - g), term=None, similarity=lambda r, g: r):
    """A variant: gain(e_R, e_G, e0_R, e0_G); term(beta k, p); what is added."""
    term = term or (lambda u, p: p * F.softplus(-u) + (1 - p) * F.softplus(u))

    def wrong(error_ref, error_gen, base_ref, base_gen, p, beta):
        k = gain(error_ref, error_gen, base_ref.detach(), base_gen.detach())
        return similarity(error_ref, error_gen) + term(beta * k, p)

    return wrong


def _errors(g, n=5, beta=3.0):
    r, e, b, c = 0.1 + torch.rand(4, n, generator=g)
    return dict(error_ref=r, error_gen=e, base_ref=b, base_gen=c, p=torch.rand(n, generator=g), beta=beta)


def _soft(u, p):
    return p * F.softplus(-u) + (1 - p) * F.softplus(u)


RPO_LOSS = Exercise(
    "25/rpo_loss",
    points=5,
    reference=rpo_loss,
    cases={
        "near the base": dict(
            error_ref=_of(0.45, 0.2), error_gen=_of(0.3, 0.8), base_ref=_of(0.5, 0.25), base_gen=_of(0.32, 0.9),
            p=_of(0.9, 0.1), beta=2.0,
        ),
        "the reference improved most": dict(
            error_ref=_of(0.1), error_gen=_of(0.45), base_ref=_of(0.6), base_gen=_of(0.5), p=_of(0.3), beta=4.0
        ),
        "five drawn pairs": _errors,
        "a label that is sure": dict(
            error_ref=_of(0.2, 0.2), error_gen=_of(0.4, 0.1), base_ref=_of(0.3, 0.3), base_gen=_of(0.2, 0.4),
            p=_of(1.0, 0.0), beta=2.0,
        ),
        "beta = 0: the preference is a constant": lambda g: _errors(g, beta=0.0),
        "beta k = 200: no overflow": dict(
            error_ref=_of(0.0), error_gen=_of(1.0), base_ref=_of(1.0), base_gen=_of(0.0), p=_of(0.25), beta=100.0
        ),
    },
    mistakes={
        "k has the wrong sign (an error that FELL is an improvement), or p and 1 - p are swapped.": _loss(
            lambda r, g, b, c: (r - b) - (g - c)
        ),
        "the two improvements are added; k is the reference's MINUS the other's.": _loss(
            lambda r, g, b, c: (b - r) + (c - g)
        ),
        "only the chosen half: the term of 1 - p is missing, and the loss has no finite minimum.": _loss(
            term=lambda u, p: p * F.softplus(-u)
        ),
        "only one half: the term of p is missing, and the loss has no finite minimum.": _loss(
            term=lambda u, p: (1 - p) * F.softplus(u)
        ),
        "the label's own weights are left out: that is DPO, the reference always wins.": _loss(
            term=lambda u, p: F.softplus(-u)
        ),
        "the similarity loss e_R is missing: nothing but the preference would be learned.": _loss(
            similarity=lambda r, g: 0.0
        ),
        "the generated picture's error is fitted too: that is prior preservation, another loss.": _loss(
            similarity=lambda r, g: r + g
        ),
        "the base is left out of k: an improvement is measured from the base's error.": _loss(
            lambda r, g, b, c: g - r
        ),
        "the base of the generated picture is left out of k.": _loss(lambda r, g, b, c: (b - r) + g),
        "the base of the reference is left out of k.": _loss(lambda r, g, b, c: -r - (c - g)),
        "half of k, as in Diffusion-DPO; RPO has no 1/2.": _loss(lambda r, g, b, c: ((b - r) - (c - g)) / 2),
        "beta is not there.": lambda error_ref, error_gen, base_ref, base_gen, p, beta: rpo_loss(
            error_ref, error_gen, base_ref, base_gen, p, 1.0
        ),
        "the logarithms have the wrong sign: the loss would be smallest where the labels are contradicted.": _loss(
            term=lambda u, p: -_soft(u, p)
        ),
        "the sigmoid itself, not its logarithm.": _loss(
            term=lambda u, p: -(p * torch.sigmoid(u) + (1 - p) * torch.sigmoid(-u))
        ),
        "log(sigmoid(u)) overflows to -inf; F.logsigmoid(u) does not.": _loss(
            term=lambda u, p: -(p * torch.sigmoid(u).log() + (1 - p) * torch.sigmoid(-u).log())
        ),
    },
    grad_wrt=("error_ref", "error_gen"),
)  # fmt: skip

# ---- its first step --------------------------------------------------------------------------------------------------


def first_step(p, beta):
    """What the gradients of e_R and of e_G are multiplied by at the base: (1 + beta (p - 1/2), beta (1/2 - p))."""
    return 1 + beta * (p - 0.5), beta * (0.5 - p)


FIRST_STEP = Exercise(
    "25/first_step",
    points=3,
    reference=first_step,
    cases={
        "the sheet's numbers": dict(p=0.475, beta=1.0),
        "the reference wins": dict(p=0.9, beta=2.0),
        "beta = 0: DreamBooth": dict(p=0.2, beta=0.0),
        "no opinion: p = 1/2": dict(p=0.5, beta=3.0),
        "drawn": lambda g: dict(p=float(torch.rand((), generator=g)), beta=float(3 * torch.rand((), generator=g))),
    },
    mistakes={
        "the similarity loss is part of it: e_R has a weight of 1 from there.": (
            lambda p, beta: (beta * (p - 0.5), beta * (0.5 - p))
        ),
        "both signs are turned: where p < 1/2 the reference LOSES, so it is fitted less.": (
            lambda p, beta: (1 - beta * (p - 0.5), beta * (p - 0.5))
        ),
        "the sign of e_R's share is turned: dk / d e_R = -1.": lambda p, beta: (1 + beta * (0.5 - p), beta * (0.5 - p)),
        "the sign of e_G's weight is turned: dk / d e_G = +1.": lambda p, beta: (
            1 + beta * (p - 0.5),
            beta * (p - 0.5),
        ),
        "sigmoid(0) is 1/2, not 0: d L_pref / du = sigmoid(u) - p.": lambda p, beta: (1 + beta * p, -beta * p),
        "sigmoid(0) is 1/2, not 1: d L_pref / du = sigmoid(u) - p.": (
            lambda p, beta: (1 + beta * (p - 1), beta * (1 - p))
        ),
        "beta is not there: u = beta k, so du / dk = beta.": lambda p, beta: (1 + p - 0.5, 0.5 - p),
        "e_G's weight comes from the preference alone: no 1 there.": (
            lambda p, beta: (1 + beta * (p - 0.5), 1 + beta * (0.5 - p))
        ),
        "the two are returned in the other order: first e_R's.": lambda p, beta: first_step(p, beta)[::-1],
        "dk / d e is 1, not 1/2: k is a difference of errors, with no half.": (
            lambda p, beta: (1 + beta * (p - 0.5) / 2, beta * (0.5 - p) / 2)
        ),
    },
)

# ---- which checkpoint ------------------------------------------------------------------------------------------------


def best_checkpoint(steps, image, text, lam):
    """The step whose samples have the highest MEAN harmonic reward; of equal ones the first. image, text (looks, n)."""
    rewards = harmonic_mean(image, text, lam).mean(1)
    return int(steps[int((rewards == rewards.max()).nonzero()[0])])


def _choice(score, pick=lambda rewards: int((rewards == rewards.max()).nonzero()[0])):
    """A variant: score(image, text, lam) -> (looks,); pick(rewards) -> a place."""

    def wrong(steps, image, text, lam):
        return int(steps[pick(score(image, text, lam))])

    return wrong


def _scores(image, text, lam):
    return harmonic_mean(image, text, lam).mean(1)


BEST_CHECKPOINT = Exercise(
    "25/best_checkpoint",
    points=4,
    reference=best_checkpoint,
    cases={
        "a maximum in the middle": dict(
            steps=[20, 40, 60], image=torch.tensor([[0.1, 0.2], [0.6, 0.5], [0.9, 0.95]]),
            text=torch.tensor([[0.9, 0.9], [0.7, 0.8], [0.1, 0.05]]), lam=0.5,
        ),
        "half of the samples copy, half obey": dict(
            steps=[20, 40], image=torch.tensor([[1.0, 0.1], [0.4, 0.4]]),
            text=torch.tensor([[0.1, 1.0], [0.4, 0.4]]), lam=0.5,
        ),
        "two are equal": dict(
            steps=[10, 20, 30], image=torch.tensor([[0.2], [0.5], [0.5]]), text=torch.tensor([[0.9], [0.5], [0.5]]),
            lam=0.3,
        ),
        "lam = 0.1: the prompt matters most": dict(
            steps=[20, 40, 60], image=torch.tensor([[0.4], [0.6], [0.9]]), text=torch.tensor([[0.9], [0.75], [0.5]]),
            lam=0.1,
        ),
        "lam = 0.9: the subject matters most": dict(
            steps=[20, 40, 60], image=torch.tensor([[0.4], [0.6], [0.9]]), text=torch.tensor([[0.9], [0.75], [0.5]]),
            lam=0.9,
        ),
        "one sample is worth nothing": dict(
            steps=[5, 10], image=torch.tensor([[0.9, 0.9, 0.0], [0.5, 0.5, 0.5]]),
            text=torch.tensor([[0.9, 0.9, 0.9], [0.5, 0.5, 0.5]]), lam=0.5,
        ),
        "drawn": lambda g: dict(
            steps=[20, 40, 60, 80], image=torch.rand(4, 5, generator=g), text=torch.rand(4, 5, generator=g), lam=0.4
        ),
    },
    mistakes={
        "combine first, average afterwards: averaged similarities hide that half of the samples copy and half obey.": (
            _choice(lambda image, text, lam: harmonic_mean(image.mean(1), text.mean(1), lam))
        ),
        "of equal ones the FIRST: a later checkpoint must be strictly better.": _choice(
            _scores, lambda rewards: int((rewards == rewards.max()).nonzero()[-1])
        ),
        "that is the place in the list; return the step.": lambda steps, image, text, lam: int(
            _scores(image, text, lam).argmax()
        ),
        "that is the last checkpoint.": lambda steps, image, text, lam: steps[-1],
        "that is the worst checkpoint.": _choice(_scores, lambda rewards: int(rewards.argmin())),
        "an arithmetic mean of the two: one of them pays for the other.": _choice(
            lambda image, text, lam: (lam * image + (1 - lam) * text).mean(1)
        ),
        "lam and 1 - lam are swapped.": _choice(lambda image, text, lam: _scores(image, text, 1 - lam)),
        "lam is not used.": _choice(lambda image, text, lam: _scores(image, text, 0.5)),
        "the image alone: it rises as long as the model overfits.": _choice(lambda image, text, lam: image.mean(1)),
        "the text alone: it is highest where nothing was learned.": _choice(lambda image, text, lam: text.mean(1)),
        "the best sample of each look; the mean over its samples counts.": _choice(
            lambda image, text, lam: harmonic_mean(image, text, lam).amax(1)
        ),
        "the worst sample of each look; the mean over its samples counts.": _choice(
            lambda image, text, lam: harmonic_mean(image, text, lam).amin(1)
        ),
    },
)  # fmt: skip

exercises = [HARMONIC, RPO_LOSS, FIRST_STEP, BEST_CHECKPOINT, *QUESTIONS]
