"""The DDIM family of transitions (Song et al., 2021, arXiv 2010.02502), as one pure step that samples or scores.

Notation: alpha_bar is the cumulative product of 1 - beta_t, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minialign.kernels.gaussian import Reduction, StepOut, at_least_float32, expand_as, gaussian_step, same_shape

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def predict(
    model_output: Float[Tensor, "batch *dims"],
    state: Float[Tensor, "batch *dims"],
    alpha_bar: Float[Tensor, "batch"],
    prediction_type: PredictionType,
) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "batch *dims"]]:
    """What the network says, as (denoised, noise_pred), whichever of the two, or v, it was trained to predict."""
    same_shape(model_output=model_output, state=state)
    alpha_bar = expand_as(alpha_bar, state)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (state - noise * model_output) / signal, model_output
    if prediction_type == "v_prediction":
        return signal * state - noise * model_output, signal * model_output + noise * state
    if prediction_type == "sample":
        return model_output, (state - signal * model_output) / noise
    raise _unknown(prediction_type)


def add_noise(
    denoised: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"], alpha_bar: Float[Tensor, "batch"]
) -> Float[Tensor, "batch *dims"]:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    same_shape(denoised=denoised, noise=noise)
    alpha_bar = expand_as(alpha_bar, denoised)
    return alpha_bar.sqrt() * denoised + (1 - alpha_bar).sqrt() * noise


def prediction_target(
    denoised: Float[Tensor, "batch *dims"],
    noise: Float[Tensor, "batch *dims"],
    alpha_bar: Float[Tensor, "batch"],
    prediction_type: PredictionType,
) -> Float[Tensor, "batch *dims"]:
    """What a network of that type should say at `add_noise`'s x_t: `predict` of it gives (denoised, noise) back."""
    same_shape(denoised=denoised, noise=noise)
    alpha_bar = expand_as(alpha_bar, denoised)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * denoised
    if prediction_type == "sample":
        return denoised
    raise _unknown(prediction_type)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type is {prediction_type!r}; expected 'epsilon', 'v_prediction' or 'sample'.")


def ddim_std(
    alpha_bar: Float[Tensor, "*batch"], alpha_bar_next: Float[Tensor, "*batch"], eta: float
) -> Float[Tensor, "*batch"]:
    """sigma of the transition (DDIM eq. 16). eta = 1: DDPM's posterior. eta = 0 or alpha_bar_next = 1: no noise."""
    return eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()


def ddim_step(
    model_output: Float[Tensor, "batch *dims"],
    state: Float[Tensor, "batch *dims"],
    alpha_bar: Float[Tensor, "batch"],
    alpha_bar_next: Float[Tensor, "batch"],
    eta: float,
    *,
    prediction_type: PredictionType = "epsilon",
    reduction: Reduction,
    next: Float[Tensor, "batch *dims"] | None = None,
    noise: Float[Tensor, "batch *dims"] | None = None,
) -> StepOut:
    """x_t -> x_{t'} (DDIM eq. 12): N(sqrt(a') denoised + sqrt(1 - a' - sigma^2) noise_pred, sigma^2 I).

    a = alpha_bar, a' = alpha_bar_next. Scores `next` when it is given (detached: it is data), else moves to
    mean + sigma * noise, through which the gradient flows; `StepOut` says what log_prob's gradient is. The gain
    d mean / d noise_pred = sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a) is negative. Where sigma = 0 (eta = 0) `next`
    equals the mean and log_prob is nan or inf: there is no density.
    """
    state = at_least_float32(state)
    denoised, noise_pred = predict(at_least_float32(model_output), state, alpha_bar, prediction_type)
    std = ddim_std(alpha_bar, alpha_bar_next, eta)
    direction = (1 - alpha_bar_next - std**2).clamp_min(0).sqrt()
    mean = expand_as(alpha_bar_next.sqrt(), state) * denoised + expand_as(direction, state) * noise_pred
    return gaussian_step(denoised, mean, std, next=next, noise=noise, reduction=reduction)


def transport(
    noise_pred: Float[Tensor, "batch *dims"],
    state: Float[Tensor, "batch *dims"],
    level: tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]],
    level_next: tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]],
) -> Float[Tensor, "batch *dims"]:
    """A deterministic step between two levels (signal, noise), in either direction: x_0 and the noise are kept.

    x' = signal' (x - noise eps) / signal + noise' eps. Towards data, DDIM with eta = 0; towards noise, its inversion;
    with signal = 1 - t and noise = t, Euler's step of a flow. Between equal levels nothing moves.
    """
    same_shape(noise_pred=noise_pred, state=state)
    state, noise_pred = at_least_float32(state), at_least_float32(noise_pred)
    (signal, noise), (signal_next, noise_next) = ([expand_as(x, state) for x in pair] for pair in (level, level_next))
    return signal_next / signal * (state - noise * noise_pred) + noise_next * noise_pred


def posterior_std(
    level: tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]],
    level_next: tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]],
) -> Float[Tensor, "batch"]:
    """Of x at a level (signal, noise), given x_0 and x' at a noisier one: what a stochastic sampler adds going back.

    noise / noise' sqrt(noise'^2 - (signal' noise / signal)^2). Limits: where signal^2 + noise^2 = 1, `ddim_std` at
    eta = 1; 0 at a level without noise, and between equal levels.
    """
    (signal, noise), (signal_next, noise_next) = level, level_next
    return noise / noise_next * (noise_next**2 - (signal_next * noise / signal) ** 2).clamp_min(0).sqrt()


def ddim_alpha_bars(
    alphas_cumprod: Float[Tensor, "train_steps"], timesteps: Tensor, stride: int, final_alpha_bar: float
):
    """(alpha_bar, alpha_bar_next), each (steps,): the step from t leads to t - stride, past 0 to `final_alpha_bar`."""
    following = timesteps - stride
    final = torch.full_like(alphas_cumprod[timesteps], final_alpha_bar)
    return alphas_cumprod[timesteps], torch.where(following >= 0, alphas_cumprod[following.clamp_min(0)], final)
