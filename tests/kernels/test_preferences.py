"""Preference losses on log-ratios: numbers by hand, limits, gradients at theta = reference."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from minialign.kernels import (
    clipped_log_ratio,
    denoising_log_ratio,
    dpo_loss,
    error_weight,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    pair_accuracy,
    predict,
    prediction_target,
    preference_probability,
    sequence_log_ratio,
    soft_label_loss,
    squared_error,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_dpo_by_hand_and_from_errors():
    # s+ = 1 - 3 = -2, s- = 5 - 4 = 1: -beta/2 (s+ - s-) = 3 at beta 2; -log sigmoid(3) = log(1 + e^-3) = 0.048587
    chosen, rejected = denoising_log_ratio(f64(1), f64(3)), denoising_log_ratio(f64(5), f64(4))
    torch.testing.assert_close(torch.cat([chosen, rejected]), f64(1, -0.5))
    assert dpo_loss(chosen, rejected, 2.0).item() == pytest.approx(0.0485873516, abs=1e-9)
    assert dpo_loss(rejected, chosen, 2.0).item() == pytest.approx(3.0485873516, abs=1e-9)


def test_at_the_reference_dpo_is_log_2_and_its_gradient_a_quarter_of_beta():
    """Sheet, check 4: beta/4 grad (s+ - s-); swapping the sides negates it."""
    error, beta = f64(0.7, 1.9).requires_grad_(), 3.0
    better, worse = denoising_log_ratio(error, error.detach())
    loss = dpo_loss(better, worse, beta)
    assert loss.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(loss, error, retain_graph=True)
    torch.testing.assert_close(gradient, f64(beta / 4, -beta / 4))
    (swapped,) = torch.autograd.grad(dpo_loss(worse, better, beta), error)
    torch.testing.assert_close(swapped, -gradient)


def test_a_pair_of_one_sample_has_no_gradient_anywhere():
    """Sheet, check 5."""
    log_ratio = f64(-3, 0, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(dpo_loss(log_ratio, log_ratio, 2.0).sum(), log_ratio)
    assert torch.equal(gradient, torch.zeros(3, dtype=torch.float64))


def test_kto_by_hand():
    # beta 2, z = 1: good 1 - sigmoid(2 * 1.5 - 1) = 1 - .880797; bad 1 - sigmoid(1 - 2 * 1.5) = .880797
    log_ratio, z = f64(1.5, 1.5), f64(1).squeeze()
    torch.testing.assert_close(kto_loss(log_ratio, f64(1, 0), z, 2.0), f64(0.1192029220, 0.8807970780))
    # a reference point below zero would call less than nothing a gain
    torch.testing.assert_close(kto_reference_point(f64(1, 2, -0.6), 3.0), f64(2.4).squeeze())
    assert kto_reference_point(f64(-1, -2), 3.0).item() == 0


def test_at_the_reference_kto_is_a_half_and_its_gradient_an_eighth_of_beta():
    """Sheet, check 6: U'(0) beta/2 = beta/8 on s, against DPO's beta/4; far away it saturates, on both sides."""
    error, beta = f64(0.7, 1.9).requires_grad_(), 3.0
    log_ratio = denoising_log_ratio(error, error.detach())
    loss = kto_loss(log_ratio, f64(1, 0), kto_reference_point(log_ratio, beta), beta)
    torch.testing.assert_close(loss.detach(), f64(0.5, 0.5))
    (gradient,) = torch.autograd.grad(loss.sum(), error)
    torch.testing.assert_close(gradient, f64(beta / 8, -beta / 8))
    far = f64(-30, 30).requires_grad_()
    (gradient,) = torch.autograd.grad(kto_loss(far, f64(1, 1), f64(0).squeeze(), 1.0).sum(), far)
    assert gradient.abs().max() < 1e-12


def test_no_gradient_reaches_the_reference_or_its_point():
    reference, error = f64(1, 2).requires_grad_(), f64(3, 1).requires_grad_()
    log_ratio = denoising_log_ratio(error, reference)
    assert torch.autograd.grad(log_ratio.sum(), reference, allow_unused=True, retain_graph=True) == (None,)
    assert not kto_reference_point(log_ratio, 1.0).requires_grad
    z = f64(0.3).squeeze().requires_grad_()
    assert torch.autograd.grad(kto_loss(log_ratio, f64(1, 0), z, 1.0).sum(), z, allow_unused=True) == (None,)


def test_gradients_and_half_precision():
    point = f64(0.2).squeeze()
    assert gradcheck(lambda c, r: dpo_loss(c, r, 0.7), (random(5).requires_grad_(), random(5, seed=1).requires_grad_()))
    assert gradcheck(lambda x: kto_loss(x, f64(1, 0, 1, 0, 1), point, 0.7), (random(5).requires_grad_(),))
    half = random(5).bfloat16()
    for loss in (
        dpo_loss(half, -half, 2.0),
        kto_loss(half, torch.ones(5), point, 2.0),
        denoising_log_ratio(half, half),
    ):
        assert loss.dtype == torch.float32
    assert dpo_loss(f64(-1e4), f64(1e4), 1.0).item() == 2e4  # no overflow


# Errors of one target from those of another ---------------------------------------------------------------------------


@pytest.mark.parametrize("measured", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("wanted", ["epsilon", "v_prediction", "sample"])
def test_an_error_of_one_target_becomes_that_of_another(measured, wanted):
    """Whatever a network predicts: its guess as the other target, and the squared error of that."""
    clean, noise, output = (random(4, 3, seed=i) for i in range(3))
    alpha_bar = f64(0.9, 0.5, 0.2, 0.01)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    states = signal.unsqueeze(1) * clean + sigma.unsqueeze(1) * noise
    x0, eps = predict(output, states, alpha_bar, measured)
    guess = prediction_target(x0, eps, alpha_bar, wanted)
    direct = squared_error(guess, prediction_target(clean, noise, alpha_bar, wanted), "sum")
    own = squared_error(output, prediction_target(clean, noise, alpha_bar, measured), "sum")
    torch.testing.assert_close(error_weight(measured, wanted, signal, sigma) * own, direct)


def test_an_error_of_the_velocity_of_a_flow_as_one_of_noise_and_of_x_0():
    clean, noise, velocity, t = random(3, 2), random(3, 2, seed=1), random(3, 2, seed=2), f64(0.1, 0.5, 0.9)
    column = t.unsqueeze(1)
    states = (1 - column) * clean + column * noise
    own = squared_error(velocity, noise - clean, "sum")
    to_noise = squared_error(states + (1 - column) * velocity, noise, "sum")
    to_clean = squared_error(states - column * velocity, clean, "sum")
    torch.testing.assert_close(error_weight("flow", "epsilon", 1 - t, t) * own, to_noise)
    torch.testing.assert_close(error_weight("flow", "sample", 1 - t, t) * own, to_clean)
    alone = f64(0), f64(1)  # t = 1, a level that flows draw: states - v is x_0, and nothing is known of the noise
    assert error_weight("flow", "sample", *alone) == 1 and error_weight("flow", "epsilon", *alone) == 0


# Log-ratios of steps and of tokens ------------------------------------------------------------------------------------


def test_a_clipped_log_ratio_has_no_gradient_outside_and_dpo_of_two_of_them_is_bounded():
    log_ratio = f64(-0.3, -0.05, 0.0, 0.05, 0.3).requires_grad_()
    clipped = clipped_log_ratio(log_ratio, 0.1)
    torch.testing.assert_close(clipped.detach(), f64(math.log(0.9), -0.05, 0, 0.05, math.log(1.1)))
    (gradient,) = torch.autograd.grad(clipped.sum(), log_ratio)
    assert gradient.tolist() == [0, 1, 1, 1, 0]
    ends = dpo_loss(clipped[[4, 0]].detach(), clipped[[0, 4]].detach(), 0.1)  # D3PO's beta and range
    assert ends.tolist() == pytest.approx([0.683164, 0.703231], abs=1e-6)
    assert torch.equal(clipped_log_ratio(log_ratio, math.inf), log_ratio)
    for bad in (0, 1, 2.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1, or inf"):
            clipped_log_ratio(log_ratio, bad)


def test_a_text_counts_its_own_tokens_only():
    log_prob, reference = f64(-1, -2, -3).repeat(2, 1).requires_grad_(), f64(-2, -2, math.nan).repeat(2, 1)
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    total = sequence_log_ratio(log_prob, reference, mask)
    assert total.tolist() == [1, 0] and sequence_log_ratio(log_prob, reference, mask, "mean").tolist() == [0.5, 0]
    (gradient,) = torch.autograd.grad(total.sum(), log_prob)
    assert gradient.tolist() == [[1, 1, 0], [0, 0, 0]]


# Losses ---------------------------------------------------------------------------------------------------------------


def test_soft_labels_have_a_finite_minimum_and_label_1_is_dpo():
    """Sheet smpo, check 4: the gradient vanishes at u = log(p / (1 - p)); lopsided: .731 and 1."""
    p = f64(0.6, 0.9, 0.731058578630005)
    logit = (p / (1 - p)).log().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_label_loss(logit, p).sum(), logit)
    assert gradient.abs().max() < 1e-12 and logit[2].item() == pytest.approx(1)
    u, v = random(5), random(5, seed=1)
    torch.testing.assert_close(soft_label_loss(0.7 * (u - v), torch.ones(5, dtype=torch.float64)), dpo_loss(u, v, 0.7))
    q = f64(0.1, 0.3, 0.5, 0.8, 1)
    torch.testing.assert_close(soft_label_loss(u, q), soft_label_loss(-u, 1 - q))


def test_hinge_and_ipo_by_hand():
    u = f64(-0.5, 0.25, 2).requires_grad_()
    assert hinge_loss(u).tolist() == [1.5, 0.75, 0] and hinge_loss(u, 3).tolist() == [3.5, 2.75, 1]
    (gradient,) = torch.autograd.grad(hinge_loss(u).sum(), u)
    assert gradient.tolist() == [-1, -1, 0]
    # beta 2: the margin is to be 1/4; (1.5 - .25 - .25)^2 = 1, the other way round (-1.25 - .25)^2 = 2.25
    assert ipo_loss(f64(1.5), f64(0.25), 2).item() == 1 and ipo_loss(f64(0.25), f64(1.5), 2).item() == 2.25
    assert ipo_loss(f64(0.25), f64(0), 2).item() == 0


def test_the_accuracy_is_a_half_where_nothing_is_said():
    assert pair_accuracy(f64(1, 0, 2, 2), f64(0, 1, 2, -5)).tolist() == [1, 0, 0.5, 1]


def test_preferences_with_and_without_ties():
    """Rao and Kupper by their own formula, w_1 / (w_1 + theta w_2), at lopsided scores 2 and -1."""
    first, neither, _ = preference_probability(f64(3), scale=0.5)
    assert neither.item() == pytest.approx(0, abs=1e-12) and first.item() == pytest.approx(1 / (1 + math.exp(-1.5)))
    theta, w = 1.7, (math.exp(2), math.exp(-1))
    found = preference_probability(f64(3), tie=math.log(theta))
    due = [w[0] / (w[0] + theta * w[1]), None, w[1] / (w[1] + theta * w[0])]
    due[1] = (theta**2 - 1) * w[0] * w[1] / ((w[0] + theta * w[1]) * (theta * w[0] + w[1]))
    assert [x.item() for x in found] == pytest.approx(due)
    swapped = preference_probability(f64(-3), tie=math.log(theta))
    assert [x.item() for x in swapped] == pytest.approx(due[::-1])
    assert preference_probability(f64(0), tie=0.8)[1].item() == pytest.approx(math.tanh(0.4))


def test_the_other_losses_have_gradients_and_half_precision():
    p = f64(0.2, 0.9, 0.5, 1, 0)
    assert gradcheck(lambda u: soft_label_loss(u, p), (random(5).requires_grad_(),))
    assert gradcheck(lambda c, r: ipo_loss(c, r, 0.7), (random(5).requires_grad_(), random(5, seed=1).requires_grad_()))
    half = random(5).bfloat16()
    found = [
        soft_label_loss(half, p.bfloat16()),
        ipo_loss(half, -half, 1),
        hinge_loss(half),
        clipped_log_ratio(half, 0.2),
    ]
    found += [pair_accuracy(half, -half), sequence_log_ratio(half, half, half), *preference_probability(half)]
    assert {x.dtype for x in found} == {torch.float32}
