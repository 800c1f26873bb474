"""EDM's grid and preconditioning: figures computed by hand, and diffusers' own scheduler."""

import math

import pytest
import torch

from minialign.kernels import edm_denoised, edm_scalings, karras_sigmas

F64 = torch.float64


def test_the_grid_of_eighteen_points():
    # sheet teleport, check 8
    grid = karras_sigmas(18, dtype=F64)
    expected = [80, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923]
    assert grid[:10].tolist() == pytest.approx(expected, abs=6e-4)
    assert len(grid) == 19 and grid[-2] == pytest.approx(0.002, rel=1e-12) and grid[-1] == 0
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("k", [1, 5, 11, 16])
def test_restarted_at_its_own_point_the_grid_is_the_same(k):
    grid = karras_sigmas(18, dtype=F64)
    torch.testing.assert_close(karras_sigmas(18 - k, sigma_max=float(grid[k]), dtype=F64), grid[k:], rtol=1e-13, atol=0)


def test_a_grid_of_one_point_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        karras_sigmas(1)


def test_the_scalings_normalise_input_and_target():
    """c_in gives the network's input unit variance, and c_out its target: checked on Gaussian data by hand."""
    sigma, sigma_data = torch.tensor([0.002, 0.1, 0.5, 3, 80], dtype=F64), 0.5
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, sigma_data)
    torch.testing.assert_close(c_in**2 * (sigma_data**2 + sigma**2), torch.ones(5, dtype=F64))
    # target (x_0 - c_skip (x_0 + n)) / c_out has variance ((1 - c_skip)^2 sigma_data^2 + c_skip^2 sigma^2) / c_out^2
    variance = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(variance, torch.ones(5, dtype=F64))
    assert c_noise.tolist() == pytest.approx([math.log(s) / 4 for s in sigma.tolist()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_limits_of_the_denoiser(dtype):
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    output = torch.ones_like(x)
    near = edm_denoised(output, x, torch.tensor([1e-6, 1e-6], dtype=dtype), 0.5)
    torch.testing.assert_close(near, x.to(near.dtype), rtol=0, atol=2e-6)
    far = edm_denoised(output, x, torch.tensor([1e5, 1e5], dtype=dtype), 0.5)
    torch.testing.assert_close(far, 0.5 * output.to(far.dtype), rtol=0, atol=1e-4)
    assert far.dtype == torch.promote_types(dtype, torch.float32)
