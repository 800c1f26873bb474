"""Gaussian transitions and the DDIM step: numbers by hand, slow float64 loops from the papers, diffusers itself."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.autograd import gradcheck

from minialign.kernels import (
    StepOut,
    add_noise,
    consistency_step,
    ddim_alpha_bars,
    ddim_std,
    ddim_step,
    gaussian_kl,
    gaussian_log_prob,
    predict,
    prediction_target,
    squared_error,
)

REDUCTIONS = ("sum", "mean")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- log-density


def test_log_prob_by_hand():
    # log N(1; 0, 2^2) = -1/8 - log 2 - .5 log 2 pi = -.125 - .693147 - .918939; log N(3; 1, 2^2): -.5 for -.125.
    x, mean, std = f64(1, 3).reshape(1, 2), f64(0, 1).reshape(1, 2), f64(2)
    assert gaussian_log_prob(x, mean, std, "sum").item() == pytest.approx(-0.625 - 2 * 1.612086, abs=2e-6)
    assert gaussian_log_prob(x, mean, std, "mean").item() == pytest.approx(-0.3125 - 1.612086, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (1, 11), (1, 1), (2, 13)])
def test_log_prob_element_by_element(shape):
    x, mean, std = random(*shape, seed=1), random(*shape, seed=2), 0.3 + random(shape[0], seed=3).abs()
    for b in range(shape[0]):
        total, count = 0.0, 0
        for value, centre in zip(x[b].flatten().tolist(), mean[b].flatten().tolist(), strict=True):
            sigma = std[b].item()
            total += math.log(math.exp(-((value - centre) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2))
            count += 1
        assert gaussian_log_prob(x, mean, std, "sum")[b].item() == pytest.approx(total, abs=1e-10)
        assert gaussian_log_prob(x, mean, std, "mean")[b].item() == pytest.approx(total / count, abs=1e-10)


def test_log_prob_integrates_to_one():
    # So no constant is lost: 2-D, std .7, the trapezoid rule on a wide grid.
    axis = torch.linspace(-7, 7, 141, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mean, std = f64(0.3, -0.2).expand(len(grid), 2), f64(0.7).expand(len(grid))
    mass = gaussian_log_prob(grid, mean, std, "sum").exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-12)


def test_log_prob_at_its_mean_and_without_width():
    x, std = random(3, 5), f64(0.5, 1.0, 2.0)
    torch.testing.assert_close(gaussian_log_prob(x, x, std, "mean"), -std.log() - 0.5 * math.log(2 * math.pi))
    assert not gaussian_log_prob(x, x, f64(1, 0, 1), "sum")[1].isfinite()
    assert not gaussian_log_prob(x, x + 1, f64(1, 0, 1), "sum")[1].isfinite()
    assert gaussian_log_prob(x, x + 1, f64(1, 0, 1), "sum")[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gaussian_gradients(reduction):
    x, mean = random(2, 3, 5, seed=1).requires_grad_(), random(2, 3, 5, seed=2).requires_grad_()
    std = f64(0.6, 1.7).requires_grad_()
    assert gradcheck(lambda *args: gaussian_log_prob(*args, reduction), (x, mean, std))
    assert gradcheck(lambda *args: gaussian_kl(*args, reduction), (x, mean, std))


# ---------------------------------------------------------------------------------------------- KL


def test_kl_by_hand():
    # Differences .5 and -1, std .25: .25 / .125 = 2 and 1 / .125 = 8.
    mean, mean_ref, std = f64(0.5, 0).reshape(1, 2), f64(0, 1).reshape(1, 2), f64(0.25)
    assert gaussian_kl(mean, mean_ref, std, "sum").item() == pytest.approx(10)
    assert gaussian_kl(mean, mean_ref, std, "mean").item() == pytest.approx(5)


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (1, 11), (2, 1)])
def test_kl_element_by_element(shape):
    mean, mean_ref, std = random(*shape, seed=1), random(*shape, seed=2), 0.3 + random(shape[0], seed=3).abs()
    width = std.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    elements = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, width), torch.distributions.Normal(mean_ref, width)
    ).flatten(1)
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std, "sum"), elements.sum(1))
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std, "mean"), elements.mean(1))


def test_kl_is_the_integral_of_the_log_ratio():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(-1)
    std = f64(0.8).expand(len(x))
    p = gaussian_log_prob(x, torch.full_like(x, 0.7), std, "sum")
    q = gaussian_log_prob(x, torch.full_like(x, -0.4), std, "sum")
    integral = ((p.exp() * (p - q)).sum() * (x[1] - x[0])).item()
    assert gaussian_kl(f64(0.7).reshape(1, 1), f64(-0.4).reshape(1, 1), f64(0.8), "sum").item() == pytest.approx(
        integral
    )


def test_kl_limits():
    mean, mean_ref, std = random(3, 5), random(3, 5, seed=1), f64(0.5, 1, 2)
    assert gaussian_kl(mean, mean, std, "sum").tolist() == [0, 0, 0]
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std, "sum"), gaussian_kl(mean_ref, mean, std, "sum"))
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, 2 * std, "sum"), gaussian_kl(mean, mean_ref, std, "sum") / 4)


# ---------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("prediction_type", "output", "denoised", "noise"),
    [
        # alpha_bar .64: signal .8, noise .6; state 1.
        ("epsilon", 0.5, 0.875, 0.5),  # (1 - .6 * .5) / .8
        ("v_prediction", 0.5, 0.5, 1.0),  # .8 * 1 - .6 * .5 and .8 * .5 + .6 * 1
        ("sample", 0.5, 0.5, 1.0),  # (1 - .8 * .5) / .6
    ],
)
def test_predict_by_hand(prediction_type, output, denoised, noise):
    got = predict(f64(output).reshape(1, 1), f64(1).reshape(1, 1), f64(0.64), prediction_type)
    assert (got[0].item(), got[1].item()) == pytest.approx((denoised, noise))


def test_predictions_of_one_network_agree():
    """The three parametrisations of the same truth give back the same x_0 and noise."""
    x0, noise, alpha_bar = random(3, 2, 5, seed=1), random(3, 2, 5, seed=2), f64(0.9, 0.5, 0.05)
    a = alpha_bar.reshape(3, 1, 1)
    state = a.sqrt() * x0 + (1 - a).sqrt() * noise
    outputs = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0, "sample": x0}
    for prediction_type, output in outputs.items():
        got = predict(output, state, alpha_bar, prediction_type)
        torch.testing.assert_close(got[0], x0, atol=1e-12, rtol=0)
        torch.testing.assert_close(got[1], noise, atol=1e-12, rtol=0)


def test_predict_refuses_other_types():
    with pytest.raises(Exception, match="prediction_type"):  # beartype refuses the literal before our ValueError can
        predict(f64(1).reshape(1, 1), f64(1).reshape(1, 1), f64(0.5), "eps")


# ---------------------------------------------------------------------------------------------- the DDIM step


def test_std_by_hand_and_its_limits():
    # a = .5, a' = .8: (.2 / .5) (1 - .5 / .8) = .4 * .375 = .15.
    assert ddim_std(f64(0.5), f64(0.8), 1.0).item() == pytest.approx(math.sqrt(0.15))
    assert ddim_std(f64(0.5), f64(0.8), 0.3).item() == pytest.approx(0.3 * math.sqrt(0.15))
    assert ddim_std(f64(0.5), f64(0.8), 0.0).item() == 0
    assert ddim_std(f64(0.5), f64(1.0), 1.0).item() == 0
    beta = 0.02  # DDPM's posterior variance (1 - a') / (1 - a) beta, with a = a' (1 - beta)
    a_next = f64(0.3, 0.9)
    expected = ((1 - a_next) / (1 - a_next * (1 - beta)) * beta).sqrt()
    torch.testing.assert_close(ddim_std(a_next * (1 - beta), a_next, 1.0), expected)


def ddim_loop(output, state, a, a_next, eta, prediction_type):
    """One element, from the sheet: (mean, std)."""
    if prediction_type == "epsilon":
        eps, x0 = output, (state - math.sqrt(1 - a) * output) / math.sqrt(a)
    elif prediction_type == "v_prediction":
        eps, x0 = math.sqrt(a) * output + math.sqrt(1 - a) * state, math.sqrt(a) * state - math.sqrt(1 - a) * output
    else:
        eps, x0 = (state - math.sqrt(a) * output) / math.sqrt(1 - a), output
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
    return math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - variance) * eps, math.sqrt(variance)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 7)])
def test_step_element_by_element(prediction_type, eta, shape):
    output, state, noise = (random(*shape, seed=s) for s in range(3))
    a, a_next = f64(0.01, 0.4, 0.97)[: shape[0]], f64(0.03, 0.6, 0.999)[: shape[0]]
    given = {"prediction_type": prediction_type, "reduction": "sum"}
    out = ddim_step(output, state, a, a_next, eta, noise=noise, **given)
    for b in range(shape[0]):
        log_prob = 0.0
        flat = zip(*(t[b].flatten().tolist() for t in (output, state, noise, out.next, out.mean)), strict=True)
        for o, s, z, moved, centre in flat:
            mean, std = ddim_loop(o, s, a[b].item(), a_next[b].item(), eta, prediction_type)
            assert centre == pytest.approx(mean, abs=1e-12)
            assert moved == pytest.approx(mean + std * z, abs=1e-12)
            log_prob += -(z**2) / 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
        assert out.std[b].item() == pytest.approx(std, abs=1e-14)
        assert out.log_prob[b].item() == pytest.approx(log_prob, abs=1e-10)
    scored = ddim_step(output, state, a, a_next, eta, next=out.next, **given)
    for got, expected in zip(scored, out, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    mean_reduced = ddim_step(
        output, state, a, a_next, eta, next=out.next, prediction_type=prediction_type, reduction="mean"
    )
    torch.testing.assert_close(mean_reduced.log_prob, out.log_prob / state[0].numel())


def stable_diffusion_scheduler(prediction_type, num_steps):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_is_diffusers_step(prediction_type, eta):
    num_steps, shape = 20, (2, 3, 5)
    scheduler = stable_diffusion_scheduler(prediction_type, num_steps)
    output, state, noise = (random(*shape, seed=s).float() for s in range(3))
    alpha_bar, alpha_bar_next = ddim_alpha_bars(
        scheduler.alphas_cumprod, scheduler.timesteps, 1000 // num_steps, float(scheduler.final_alpha_cumprod)
    )
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, t, state, eta=eta, variance_noise=noise if eta else None).prev_sample
        rows = alpha_bar[i].expand(2), alpha_bar_next[i].expand(2)
        ours = ddim_step(output, state, *rows, eta, prediction_type=prediction_type, reduction="sum", noise=noise)
        scale = theirs.abs().amax().clamp_min(1)  # epsilon prediction divides by sqrt(alpha_bar) = .07 at t = 951
        torch.testing.assert_close(ours.next / scale, theirs / scale, atol=1e-6, rtol=0)


def test_gain_of_the_noise_prediction():
    """d mean / d noise_pred = sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a) < 0; the five steps of check 1 (sheet)."""
    scheduler = stable_diffusion_scheduler("epsilon", 5)
    table = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    a, a_next = ddim_alpha_bars(table, scheduler.timesteps, 200, table[0].item())
    output = torch.zeros(5, 1, dtype=torch.float64, requires_grad=True)
    out = ddim_step(output, random(5, 1), a, a_next, 1.0, reduction="sum")
    (gain,) = torch.autograd.grad(out.mean.sum(), output)
    figures = f64(-1.643266, -1.103967, -0.768510, -0.570590, -0.020714)
    torch.testing.assert_close(gain.squeeze(-1), figures, atol=5e-7, rtol=0)
    torch.testing.assert_close(gain.squeeze(-1), (1 - a_next - out.std**2).sqrt() - (a_next * (1 - a) / a).sqrt())
    std = f64(0.820143, 0.653684, 0.433599, 0.041172, 0.020648)
    torch.testing.assert_close(out.std, std, atol=5e-7, rtol=0)


def test_late_steps_weigh_most():
    # Sheet ddpo: k^2 / (2 sigma^2), what a squared noise error costs in nats, and |k| / sigma, at S = 50.
    table = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    t = torch.tensor([981, 481, 21, 1])
    a, a_next = ddim_alpha_bars(table, t, 20, table[0].item())
    zeros = torch.zeros(4, 1, dtype=torch.float64)
    base = ddim_step(zeros, zeros, a, a_next, 1.0, reduction="sum")
    moved = ddim_step(zeros + 1, zeros, a, a_next, 1.0, reduction="sum")
    factor = gaussian_kl(moved.mean, base.mean, base.std, "sum").tolist()
    assert factor[0] == pytest.approx(0.131, abs=5e-4)
    assert factor[1] == pytest.approx(0.071, abs=5e-4)
    assert factor[2] == pytest.approx(5.36, abs=5e-3)
    assert factor[3] == pytest.approx(0.503, abs=5e-4)
    ratio = ((moved.mean - base.mean).abs().squeeze(-1) / base.std).tolist()
    assert [round(r, 2) for r in ratio[:2]] == [0.51, 0.38]
    assert [round(r, 1) for r in ratio[2:]] == [3.3, 1.0]


def test_a_given_next_is_data_and_a_sampled_one_carries_the_gradient():
    output, state = random(2, 3).requires_grad_(), random(2, 3, seed=1)
    a, a_next = f64(0.3, 0.6), f64(0.5, 0.8)
    given = random(2, 3, seed=2).requires_grad_()
    out = ddim_step(output, state, a, a_next, 1.0, reduction="sum", next=given)
    grads = torch.autograd.grad(out.log_prob.sum(), (output, given), allow_unused=True)
    assert grads[1] is None
    gain = ((1 - a_next - out.std**2).sqrt() - (a_next * (1 - a) / a).sqrt()).unsqueeze(-1)
    torch.testing.assert_close(grads[0], gain * (given - out.mean) / out.std.unsqueeze(-1) ** 2)
    sampled = ddim_step(output, state, a, a_next, 1.0, reduction="sum", noise=random(2, 3, seed=4))
    (pathwise,) = torch.autograd.grad(sampled.next.sum(), output, retain_graph=True)
    torch.testing.assert_close(pathwise, gain.expand_as(output))
    # The density is of the sample as data: that of a live sample, whose noise is a constant, has gradient 0 exactly.
    (score,) = torch.autograd.grad(sampled.log_prob.sum(), output)
    torch.testing.assert_close(score, gain * random(2, 3, seed=4) / out.std.unsqueeze(-1))
    assert score.abs().min() > 1e-3


def test_steps_say_what_they_took_for_the_sample():
    """denoised: (x - sqrt(1 - a) noise_pred) / sqrt(a), or f's output; given or sampled alike."""
    output, state, a, a_next = random(2, 3), random(2, 3, seed=1), f64(0.3, 0.6), f64(0.5, 0.8)
    column = a.unsqueeze(-1)
    for given in ({}, {"next": random(2, 3, seed=2)}, {"noise": random(2, 3, seed=2)}):
        out = ddim_step(output, state, a, a_next, 1.0, reduction="sum", **given)
        torch.testing.assert_close(out.denoised, (state - (1 - column).sqrt() * output) / column.sqrt())
        out = consistency_step(state, a_next.sqrt(), (1 - a_next).sqrt(), reduction="sum", **given)
        assert torch.equal(out.denoised, state)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_target_is_what_predicts_sample_and_noise(prediction_type):
    x0, noise, alpha_bar = random(3, 2, 5, seed=1), random(3, 2, 5, seed=2), f64(0.9, 0.5, 0.05)
    target = prediction_target(x0, noise, alpha_bar, prediction_type)
    denoised, noise_pred = predict(target, add_noise(x0, noise, alpha_bar), alpha_bar, prediction_type)
    torch.testing.assert_close(denoised, x0)
    torch.testing.assert_close(noise_pred, noise)
    with pytest.raises(ValueError, match="prediction_type is 'x0'; expected 'epsilon'"):
        prediction_target.__wrapped__(x0, noise, alpha_bar, "x0")


def test_squared_error_by_hand():
    # Differences 1, -2 and 3, 0 (row 0), 0, .5 and 0, 0 (row 1): sums 14 and .25.
    x = f64(1, -2, 3, 0, 0, 0.5, 0, 0).reshape(2, 2, 2)
    assert squared_error(x, 0 * x, "sum").tolist() == [14, 0.25]
    assert squared_error(x.bfloat16(), 0 * x.bfloat16(), "mean").tolist() == [3.5, 0.0625]
    assert squared_error(x.bfloat16(), 0 * x.bfloat16(), "mean").dtype == torch.float32


def test_step_gradcheck():
    output, state = random(2, 3, seed=1).requires_grad_(), random(2, 3, seed=2).requires_grad_()
    given = random(2, 3, seed=3)
    for prediction_type in PREDICTIONS:

        def step(output, state, prediction_type=prediction_type):
            kwargs = {"prediction_type": prediction_type, "reduction": "sum", "next": given}
            out = ddim_step(output, state, f64(0.3, 0.9), f64(0.5, 0.95), 0.7, **kwargs)
            return out.mean, out.log_prob

        assert gradcheck(step, (output, state))


def test_step_without_noise_moves_to_its_mean():
    output, state = random(2, 3), random(2, 3, seed=1)
    out = ddim_step(output, state, f64(0.3, 0.6), f64(0.5, 0.8), 1.0, reduction="sum")
    assert isinstance(out, StepOut)
    torch.testing.assert_close(out.next, out.mean)
    still = ddim_step(output, state, f64(0.3, 0.6), f64(0.5, 0.8), 0.0, reduction="sum", noise=random(2, 3, seed=2))
    torch.testing.assert_close(still.next, still.mean)
    assert not still.log_prob.isfinite().any()


def test_alpha_bars_against_a_loop():
    table = torch.linspace(0.99, 0.01, 100, dtype=torch.float64)
    timesteps = torch.tensor([91, 61, 31, 1])
    a, a_next = ddim_alpha_bars(table, timesteps, 30, 0.995)
    assert a.tolist() == [table[t].item() for t in timesteps.tolist()]
    assert a_next.tolist() == [table[t - 30].item() if t >= 30 else 0.995 for t in timesteps.tolist()]
    at_zero = ddim_alpha_bars(table, torch.tensor([60, 30]), 30, 0.995)[1]
    assert at_zero.tolist() == [table[30].item(), table[0].item()]


# ---------------------------------------------------------------------------------------------- shapes and precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions(dtype):
    """Half precision is computed in float32: the answer is that of the rounded inputs, to float32's accuracy."""
    x, mean = random(3, 2, 5, seed=1).to(dtype), random(3, 2, 5, seed=2).to(dtype)
    std, a, a_next = f64(0.5, 1, 2).to(dtype), f64(0.25, 0.5, 0.75).to(dtype), f64(0.5, 0.75, 0.875).to(dtype)
    expected_dtype = torch.promote_types(dtype, torch.float32)
    tol = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    for fn in (gaussian_log_prob, gaussian_kl):
        got = fn(x, mean, std, "sum")
        assert got.dtype == expected_dtype
        torch.testing.assert_close(got.double(), fn(x.double(), mean.double(), std.double(), "sum"), **tol)
    levels = a.to(expected_dtype), a_next.to(expected_dtype)
    out = ddim_step(x, mean, *levels, 1.0, reduction="mean", noise=x)
    exact = ddim_step(x.double(), mean.double(), a.double(), a_next.double(), 1.0, reduction="mean", noise=x.double())
    for got, expected in zip(out, exact, strict=True):
        assert got.dtype == expected_dtype
        torch.testing.assert_close(got.double(), expected, **tol)
    scored = ddim_step(x, mean, *levels, 1.0, reduction="mean", next=x)  # a stored state in half precision
    assert [part.dtype for part in scored] == [expected_dtype] * 5


def test_a_column_of_stds_is_refused_by_name():
    x = random(4, 3)
    for std in (torch.ones(4, 1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(Exception, match="std"):
            gaussian_log_prob(x, x, std, "sum")
    with pytest.raises(Exception, match="reduction"):
        gaussian_log_prob(x, x, torch.ones(4, dtype=torch.float64), "none")


def test_no_axes_are_mixed_up():
    """A row's result depends on that row alone, whatever the shape: axes of distinct primes, rows permuted."""
    x, mean, std = random(5, 2, 3, 7, seed=1), random(5, 2, 3, 7, seed=2), f64(1, 2, 3, 4, 5)
    order = torch.tensor(np.random.default_rng(0).permutation(5))
    for fn in (gaussian_log_prob, gaussian_kl):
        torch.testing.assert_close(fn(x[order], mean[order], std[order], "sum"), fn(x, mean, std, "sum")[order])
