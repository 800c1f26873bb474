"""Preference losses on log-ratios: numbers by hand, limits, gradients at theta = reference."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from minialign.kernels import denoising_log_ratio, dpo_loss, kto_loss, kto_reference_point


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
