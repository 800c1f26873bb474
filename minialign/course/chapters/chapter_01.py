"""Exercises of chapter 01: one denoising step, its density, and the gradient that follows from it."""

import math

import torch
from torch import Tensor

from minialign.course.chapters.questions_01 import QUESTIONS
from minialign.course.check import Exercise
from minialign.kernels import ddim_std, expand_as, gaussian_log_prob, predict

# The references whose signature is simpler than the package's own ----------------------------------------------------


def predict_denoised(model_output: Tensor, state: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """E[x_0 | x_t] out of a network that predicts the noise, v, or x_0 itself."""
    return predict(model_output, state, alpha_bar, prediction_type)[0]


def ddim_mean(denoised: Tensor, noise_pred: Tensor, alpha_bar_next: Tensor, std: Tensor) -> Tensor:
    """sqrt(a') denoised + sqrt(1 - a' - std^2) noise_pred (DDIM eq. 12)."""
    direction = (1 - alpha_bar_next - std**2).clamp_min(0).sqrt()
    return expand_as(alpha_bar_next.sqrt(), denoised) * denoised + expand_as(direction, denoised) * noise_pred


def gain(alpha_bar: Tensor, alpha_bar_next: Tensor, std: Tensor) -> Tensor:
    """k = d mean / d noise_pred of a DDIM step: negative (sheet ddpo)."""
    direction = (1 - alpha_bar_next - std**2).clamp_min(0).sqrt()
    return direction - (alpha_bar_next * (1 - alpha_bar) / alpha_bar).sqrt()


def reinforce_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """-mean over samples of (reward - mean reward) * log p(path): its gradient is that of -E[reward], estimated."""
    advantages = (rewards - rewards.mean()).detach()
    return -(advantages * log_probs.sum(1)).mean()


# Cases --------------------------------------------------------------------------------------------------------------


def _levels(g: torch.Generator, n: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """alpha_bar (n,) and alpha_bar_next (n,), the less noisy of the two."""
    low = 0.05 + 0.55 * torch.rand(n, generator=g)
    return low.to(dtype), (low + (0.3 + 0.6 * torch.rand(n, generator=g)) * (1 - low)).to(dtype)


def _prediction(kind: str, dims: tuple[int, ...] = (2, 5), dtype=torch.float32):
    def case(g: torch.Generator) -> dict:
        output, state = torch.randn(2, 3, *dims, generator=g).to(dtype).unbind(0)
        return dict(model_output=output, state=state, alpha_bar=_levels(g, 3, dtype)[0], prediction_type=kind)

    return case


def _std(eta: float, dtype=torch.float32):
    def case(g: torch.Generator) -> dict:
        alpha_bar, alpha_bar_next = _levels(g, 5, dtype)
        return dict(alpha_bar=alpha_bar, alpha_bar_next=alpha_bar_next, eta=eta)

    return case


def _mean(dims: tuple[int, ...], dtype=torch.float32):
    def case(g: torch.Generator) -> dict:
        denoised, noise_pred = torch.randn(2, 3, *dims, generator=g).to(dtype).unbind(0)
        alpha_bar_next = _levels(g, 3, dtype)[1]
        std = (0.2 + 0.6 * torch.rand(3, generator=g)).to(dtype) * (1 - alpha_bar_next)
        return dict(denoised=denoised, noise_pred=noise_pred, alpha_bar_next=alpha_bar_next, std=std)

    return case


def _density(reduction: str, dims: tuple[int, ...] = (2, 5), dtype=torch.float32):
    def case(g: torch.Generator) -> dict:
        x, mean = torch.randn(2, 3, *dims, generator=g).to(dtype).unbind(0)
        std = (0.3 + torch.rand(3, generator=g)).to(dtype)
        return dict(x=x, mean=mean, std=std, reduction=reduction)

    return case


def _gain(dtype=torch.float32):
    def case(g: torch.Generator) -> dict:
        alpha_bar, alpha_bar_next = _levels(g, 5, dtype)
        std = ddim_std(alpha_bar, alpha_bar_next, 0.7)
        return dict(alpha_bar=alpha_bar, alpha_bar_next=alpha_bar_next, std=std)

    return case


def _episode(n: int, steps: int, dtype=torch.float32):
    def case(g: torch.Generator) -> dict:
        rewards = 2 + 3 * torch.rand(n, generator=g)
        return dict(log_probs=torch.randn(n, steps, generator=g).to(dtype), rewards=rewards.to(dtype))

    return case


# Mistakes -----------------------------------------------------------------------------------------------------------


def _denoised_with(change):
    """predict_denoised whose epsilon branch is `change(model_output, state, signal, noise)`; the others stay right."""

    def mistake(model_output, state, alpha_bar, prediction_type):
        if prediction_type != "epsilon":
            return predict_denoised(model_output, state, alpha_bar, prediction_type)
        a = expand_as(alpha_bar, state)
        return change(model_output, state, a.sqrt(), (1 - a).sqrt())

    return mistake


LINED_UP = "an entry a sample, (b,), met (b, *dims) without expand_as: PyTorch lined it up with the last axis"


def _denoised_unexpanded(model_output, state, alpha_bar, prediction_type):
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (state - noise * model_output) / signal
    return signal * state - noise * model_output if prediction_type == "v_prediction" else model_output


def _mean_unexpanded(denoised, noise_pred, alpha_bar_next, std):
    return alpha_bar_next.sqrt() * denoised + (1 - alpha_bar_next - std**2).clamp_min(0).sqrt() * noise_pred


def _density_unexpanded(x, mean, std, reduction):
    return _reduced(-0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def _always_epsilon(model_output, state, alpha_bar, prediction_type):
    return predict_denoised(model_output, state, alpha_bar, "epsilon")


def _v_with_plus(model_output, state, alpha_bar, prediction_type):
    output = -model_output if prediction_type == "v_prediction" else model_output
    return predict_denoised(output, state, alpha_bar, prediction_type)


def _v_gives_noise(model_output, state, alpha_bar, prediction_type):
    denoised, noise = predict(model_output, state, alpha_bar, prediction_type)
    return noise if prediction_type == "v_prediction" else denoised


def _sample_is_noise(model_output, state, alpha_bar, prediction_type):
    kind = "epsilon" if prediction_type == "sample" else prediction_type
    return predict_denoised(model_output, state, alpha_bar, kind)


def _terms(x, mean, std):
    """Quadratic term, log std and the constant of a Gaussian log-density, an element each."""
    s = expand_as(std, x)
    return -0.5 * ((x - mean) / s) ** 2, s.log().expand_as(x), 0.5 * math.log(2 * math.pi)


def _reduced(elements, reduction):
    return getattr(elements.flatten(1), reduction)(1)


def _density_with(change):
    """gaussian_log_prob whose elements are `change(quadratic, log_std, constant)`."""

    def mistake(x, mean, std, reduction):
        return _reduced(change(*_terms(x, mean, std)), reduction)

    return mistake


def _log_std_once(x, mean, std, reduction):
    quadratic, _, constant = _terms(x, mean, std)
    return _reduced(quadratic - constant, reduction) - std.log()


def _column_of_advantages(log_probs, rewards):
    advantages = (rewards - rewards.mean()).detach().unsqueeze(1)
    return -(advantages * log_probs.sum(1)).mean()


def _rewards_attached(log_probs, rewards):
    return -((rewards - rewards.mean()) * log_probs.sum(1)).mean()


def _whitened(log_probs, rewards):
    advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
    return reinforce_loss(log_probs, advantages)


F64 = torch.float64
_SHEET = dict(  # S = 5 of the sheet ddpo: timesteps 801, 601, 401, 201, 1
    alpha_bar=torch.tensor([0.036543, 0.159823, 0.422877, 0.752129, 0.998297], dtype=F64),
    alpha_bar_next=torch.tensor([0.159823, 0.422877, 0.752129, 0.998297, 0.999150], dtype=F64),
)

exercises = [
    Exercise(
        "01/predict_denoised",
        points=2,
        reference=predict_denoised,
        cases={
            "one number, epsilon": dict(
                model_output=torch.tensor([[0.5]]),
                state=torch.tensor([[2.0]]),
                alpha_bar=torch.tensor([0.36]),
                prediction_type="epsilon",
            ),
            "epsilon": _prediction("epsilon"),
            "v_prediction": _prediction("v_prediction"),
            "sample": _prediction("sample"),
            "a square batch, float64": _prediction(
                "epsilon", (3,), F64
            ),  # a square: silent if alpha_bar lines up with the wrong axis
        },
        mistakes={
            LINED_UP: _denoised_unexpanded,
            "all three prediction types are treated as noise predictions": _always_epsilon,
            "solve x_t = signal * x_0 + noise_level * eps for x_0: one sign is wrong": _denoised_with(
                lambda e, x, s, n: (x + n * e) / s
            ),
            "what is left after the noise is taken away is signal * x_0, not yet x_0": _denoised_with(
                lambda e, x, s, n: x - n * e
            ),
            "alpha_bar is a variance: amplitudes are its square roots": _denoised_with(
                lambda e, x, s, n: (x - n**2 * e) / s**2
            ),
            "the amplitudes of signal and noise have changed places": _denoised_with(
                lambda e, x, s, n: (x - s * e) / n
            ),
            "for v: signal * x_t - noise_level * v, check the sign": _v_with_plus,
            "for v you returned the noise; the denoised sample is the other combination": _v_gives_noise,
            "a network of type 'sample' has said x_0 already": _sample_is_noise,
        },
    ),
    Exercise(
        "01/ddim_std",
        points=2,
        reference=ddim_std,
        cases={
            "eta = 1": dict(alpha_bar=torch.tensor([0.2]), alpha_bar_next=torch.tensor([0.6]), eta=1.0),
            "a last step, to alpha_bar 1": dict(
                alpha_bar=torch.tensor([0.2, 0.9]), alpha_bar_next=torch.tensor([0.6, 1.0]), eta=1.0
            ),
            "eta = 1, drawn": _std(1.0),
            "eta below 1, float64": _std(0.3, F64),
            "eta = 0": _std(0.0),
        },
        mistakes={
            "this is the variance; the standard deviation is its root": lambda alpha_bar, alpha_bar_next, eta: (
                ddim_std(alpha_bar, alpha_bar_next, eta) ** 2
            ),
            "eta scales the standard deviation, so it stands outside the root": lambda alpha_bar, alpha_bar_next, eta: (
                ddim_std(alpha_bar, alpha_bar_next, eta**0.5)
            ),
            "eta is left out": lambda alpha_bar, alpha_bar_next, eta: ddim_std(alpha_bar, alpha_bar_next, 1.0),
            "the first factor is missing, so noise is added even in a last step to alpha_bar_next = 1": (
                lambda alpha_bar, alpha_bar_next, eta: eta * (1 - alpha_bar / alpha_bar_next).sqrt()
            ),
            "alpha_bar and alpha_bar_next are swapped in the first factor": lambda alpha_bar, alpha_bar_next, eta: (
                eta * ((1 - alpha_bar) / (1 - alpha_bar_next) * (1 - alpha_bar / alpha_bar_next)).sqrt()
            ),
        },
    ),
    Exercise(
        "01/ddim_mean",
        points=2,
        reference=ddim_mean,
        cases={
            "one number": dict(
                denoised=torch.tensor([[1.0]]),
                noise_pred=torch.tensor([[-1.0]]),
                alpha_bar_next=torch.tensor([0.64]),
                std=torch.tensor([0.3]),
            ),
            "a last step, to alpha_bar 1": dict(
                denoised=torch.tensor([[1.0, 3.0]]),
                noise_pred=torch.tensor([[2.0, -1.0]]),
                alpha_bar_next=torch.ones(1),
                std=torch.zeros(1),
            ),
            "several axes": _mean((2, 5)),
            "float64": _mean((7,), F64),
        },
        mistakes={
            LINED_UP: _mean_unexpanded,
            "denoised and noise_pred have changed places": lambda denoised, noise_pred, alpha_bar_next, std: ddim_mean(
                noise_pred, denoised, alpha_bar_next, std
            ),
            "part of the variance 1 - alpha_bar_next is left for the fresh noise: std is not taken off": (
                lambda denoised, noise_pred, alpha_bar_next, std: ddim_mean(
                    denoised, noise_pred, alpha_bar_next, torch.zeros_like(std)
                )
            ),
            "a standard deviation was taken from a variance: std belongs there squared": (
                lambda denoised, noise_pred, alpha_bar_next, std: ddim_mean(
                    denoised, noise_pred, alpha_bar_next, std.sqrt()
                )
            ),
            "alpha_bar_next is a variance: the amplitude of the signal is its root": (
                lambda denoised, noise_pred, alpha_bar_next, std: (
                    ddim_mean(denoised, noise_pred, alpha_bar_next, std)
                    + expand_as(alpha_bar_next - alpha_bar_next.sqrt(), denoised) * denoised
                )
            ),
        },
        grad_wrt=("noise_pred",),
    ),
    Exercise(
        "01/gaussian_log_prob",
        points=3,
        reference=gaussian_log_prob,
        cases={
            "one number": dict(
                x=torch.tensor([[1.0]]), mean=torch.zeros(1, 1), std=torch.tensor([2.0]), reduction="sum"
            ),
            "x at its mean": dict(
                x=torch.ones(2, 3), mean=torch.ones(2, 3), std=torch.tensor([0.5, 3.0]), reduction="sum"
            ),
            "sum": _density("sum"),
            "mean": _density("mean"),
            "mean, float64": _density("mean", (7,), F64),
        },
        mistakes={
            LINED_UP: _density_unexpanded,
            "only the quadratic term is there: what makes the density integrate to 1 is missing": _density_with(
                lambda q, s, c: q
            ),
            "reduction is ignored: the mean over elements is asked for in some cases": lambda x, mean, std, reduction: (
                gaussian_log_prob(x, mean, std, "sum")
            ),
            "reduction is ignored: the sum over elements is asked for in some cases": lambda x, mean, std, reduction: (
                gaussian_log_prob(x, mean, std, "mean")
            ),
            "the variance stands where the standard deviation belongs, or the other way round": (
                lambda x, mean, std, reduction: gaussian_log_prob(x, mean, std**2, reduction)
            ),
            "the quadratic term is divided by std; it needs std squared": lambda x, mean, std, reduction: _reduced(
                _terms(x, mean, std)[0] * expand_as(std, x) - _terms(x, mean, std)[1] - _terms(x, mean, std)[2],
                reduction,
            ),
            "log std is lost: a wide Gaussian must be lower at its peak": _density_with(lambda q, s, c: q - c),
            "log std has the wrong sign": _density_with(lambda q, s, c: q + s - c),
            "log std belongs to every element, so a sum over D elements holds it D times": _log_std_once,
            "the constant, half of log(2 pi) an element, is lost": _density_with(lambda q, s, c: q - s),
            "log(2 pi) needs its factor of one half": _density_with(lambda q, s, c: q - s - 2 * c),
            "the quadratic term needs its factor of one half": _density_with(lambda q, s, c: 2 * q - s - c),
            "the quadratic term has the wrong sign: far from the mean is less likely": _density_with(
                lambda q, s, c: -q - s - c
            ),
            "the mean must keep its gradient: it is what training moves": lambda x, mean, std, reduction: (
                gaussian_log_prob(x, mean.detach(), std, reduction)
            ),
        },
        grad_wrt=("mean",),
    ),
    Exercise(
        "01/gain",
        points=2,
        reference=gain,
        cases={
            "one step": dict(
                alpha_bar=torch.tensor([0.36]), alpha_bar_next=torch.tensor([0.64]), std=torch.tensor([0.3])
            ),
            "a last step, to alpha_bar 1": dict(
                alpha_bar=torch.tensor([0.36]), alpha_bar_next=torch.ones(1), std=torch.zeros(1)
            ),
            "five timesteps of a scheduler": _SHEET | {"std": ddim_std(*_SHEET.values(), 1.0)},
            "float32": _gain(),
            "float64": _gain(F64),
        },
        mistakes={
            "the sign is wrong: more predicted noise means that more is taken off": lambda **k: -gain(**k),
            "noise_pred enters the mean twice: denoised depends on it as well": lambda alpha_bar, alpha_bar_next, std: (
                (1 - alpha_bar_next - std**2).clamp_min(0).sqrt()
            ),
            "that is the way through denoised alone; noise_pred also enters the mean directly": (
                lambda alpha_bar, alpha_bar_next, std: -(alpha_bar_next * (1 - alpha_bar) / alpha_bar).sqrt()
            ),
            "that is the derivative of denoised; in the mean it is scaled by sqrt(alpha_bar_next)": (
                lambda alpha_bar, alpha_bar_next, std: (
                    (1 - alpha_bar_next - std**2).clamp_min(0).sqrt() - ((1 - alpha_bar) / alpha_bar).sqrt()
                )
            ),
            "both ways through the mean count with their signs: the one through denoised is negative": (
                lambda alpha_bar, alpha_bar_next, std: (
                    (1 - alpha_bar_next - std**2).clamp_min(0).sqrt()
                    + (alpha_bar_next * (1 - alpha_bar) / alpha_bar).sqrt()
                )
            ),
            "alpha_bar and alpha_bar_next are swapped in the way through denoised": (
                lambda alpha_bar, alpha_bar_next, std: (
                    (1 - alpha_bar_next - std**2).clamp_min(0).sqrt()
                    - (alpha_bar * (1 - alpha_bar_next) / alpha_bar_next).sqrt()
                )
            ),
            "std is not taken off: the old noise keeps only 1 - alpha_bar_next - std^2": (
                lambda alpha_bar, alpha_bar_next, std: gain(alpha_bar, alpha_bar_next, torch.zeros_like(std))
            ),
        },
    ),
    Exercise(
        "01/reinforce_loss",
        points=3,
        reference=reinforce_loss,
        cases={
            "two runs": dict(log_probs=torch.tensor([[1.0, 2.0], [0.0, -1.0]]), rewards=torch.tensor([1.0, 0.0])),
            "equal rewards": dict(log_probs=torch.tensor([[1.0, 2.0], [0.0, -1.0]]), rewards=torch.tensor([5.0, 5.0])),
            "float32": _episode(5, 3),
            "float64": _episode(3, 7, F64),
        },
        mistakes={
            "optimizers minimise: a gradient step on this lowers the reward": lambda **k: -reinforce_loss(**k),
            "the baseline is missing: take the batch's mean reward off first": lambda log_probs, rewards: (
                -(rewards.detach() * log_probs.sum(1)).mean()
            ),
            "a column (b, 1) met a row (b,): every sample is paid the mean advantage, which is 0": (
                _column_of_advantages
            ),
            "the log-probability of a path is a sum over its steps, not a mean": lambda log_probs, rewards: (
                reinforce_loss(log_probs, rewards) / log_probs.shape[1]
            ),
            "an average over samples is asked for, not their sum": lambda log_probs, rewards: (
                reinforce_loss(log_probs, rewards) * len(rewards)
            ),
            "the reward is a number that is paid, not something to differentiate: detach it": _rewards_attached,
            "dividing by the rewards' standard deviation is another (common) estimator; here the gradient is asked for "
            "in the reward's own unit": _whitened,
        },
        grad_wrt=("log_probs", "rewards"),
    ),
    *QUESTIONS,
]
