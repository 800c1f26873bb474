"""Consistency kernels against hand-computed values and diffusers' own LCMScheduler."""

import pytest
import torch

from minialign import kernels
from minialign.kernels import boundary_scalings, consistency_function, consistency_step, lcm_timesteps

F64 = torch.float64


def lcm_scheduler(**changes):
    from diffusers import LCMScheduler

    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **changes)


def test_boundary_scalings_by_hand():
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 19]), dtype=F64)
    # tau = 10 t: .25 / 100.25 and 10 / sqrt(100.25) at t = 1
    torch.testing.assert_close(c_skip, torch.tensor([1, 0.25 / 100.25, 0.25 / 36100.25], dtype=F64))
    torch.testing.assert_close(c_out, torch.tensor([0, 10 / 100.25**0.5, 190 / 36100.25**0.5], dtype=F64))
    assert c_skip[2].item() == pytest.approx(6.9e-6, rel=0.01) and c_out[2].item() == pytest.approx(0.9999965, abs=1e-7)
    late = boundary_scalings(torch.tensor([139, 999]))
    assert (late[0] < 1.3e-7).all() and (late[1] - 1).abs().max() < 1e-7  # RLCM sheet, check 6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_the_boundary_the_function_is_the_identity(prediction_type, dtype, generator):
    x, output = (torch.randn(5, 2, 3, generator=generator).to(dtype) for _ in range(2))
    alpha_bar, t = torch.full((5,), 0.99915, dtype=torch.float32), torch.zeros(5, dtype=torch.long)
    f = consistency_function(output, x, alpha_bar, t, prediction_type)
    torch.testing.assert_close(f, x.to(f.dtype), rtol=0, atol=0)
    assert f.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 16, 50])
def test_timesteps_are_diffusers_timesteps(num_steps):
    scheduler = lcm_scheduler()
    scheduler.set_timesteps(num_steps)
    assert lcm_timesteps(num_steps) == scheduler.timesteps.tolist()


def test_timesteps_by_hand():
    assert lcm_timesteps(4) == [999, 759, 499, 259]
    assert lcm_timesteps(8) == [999, 879, 759, 639, 499, 379, 259, 139]
    assert lcm_timesteps(4, style="stride") == [999, 759, 519, 279]
    assert lcm_timesteps(8, style="stride") == [999, 879, 759, 639, 519, 399, 279, 159]
    with pytest.raises(ValueError, match="num_steps is 51"):
        lcm_timesteps(51)
    with pytest.raises(ValueError, match="expected 'linspace' or 'stride'"):
        lcm_timesteps(4, style="linspce")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_the_lcm_schedulers_step(prediction_type, generator):
    """To 1e-6 in float32, from the first step to the last, with the same noise."""
    scheduler = lcm_scheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    table, x = scheduler.alphas_cumprod, torch.randn(3, 4, 8, 8, generator=generator)
    for j, t in enumerate(scheduler.timesteps):
        output = 0.3 * torch.randn(x.shape, generator=generator)
        noise = torch.Generator().manual_seed(j)
        theirs = scheduler.step(output, t, x, generator=noise)
        denoised = consistency_function(output, x, table[t].expand(3), t.expand(3), prediction_type)
        torch.testing.assert_close(denoised, theirs.denoised, atol=1e-6 * float(denoised.abs().max()), rtol=0)
        if j < 3:
            a = table[scheduler.timesteps[j + 1]]
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(j))
            out = consistency_step(denoised, a.sqrt().expand(3), (1 - a).sqrt().expand(3), reduction="mean", noise=z)
            torch.testing.assert_close(out.next, theirs.prev_sample, atol=1e-6 * float(denoised.abs().max()), rtol=0)
        else:
            assert torch.equal(theirs.prev_sample, theirs.denoised)  # no noise behind the last call
        x = theirs.prev_sample


def test_a_step_scores_what_it_is_given(generator):
    denoised = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    signal, std = torch.full((5,), 0.6, dtype=F64), torch.full((5,), 0.8, dtype=F64)
    given = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    out = consistency_step(denoised, signal, std, reduction="sum", next=given)
    density = torch.distributions.Normal(0.6 * denoised, 0.8).log_prob(given.detach()).sum(1)
    torch.testing.assert_close(out.log_prob, density)
    out.log_prob.sum().backward()
    torch.testing.assert_close(denoised.grad, 0.6 * (given - 0.6 * denoised).detach() / 0.64)
    assert given.grad is None  # an action is data
    noise = torch.randn(5, 3, generator=generator, dtype=F64)
    sampled = consistency_step(denoised, signal, std, reduction="sum", noise=noise)
    (pathwise,) = torch.autograd.grad(sampled.next.sum(), denoised, retain_graph=True)
    (score,) = torch.autograd.grad(sampled.log_prob.sum(), denoised)
    torch.testing.assert_close(pathwise, torch.full_like(pathwise, 0.6))
    torch.testing.assert_close(score, 0.6 * noise / 0.8)  # the sample as data, not the constant noise


def test_the_guidance_embedding_is_the_pipelines():
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 1.5, 7.0])
    for dim in (8, 9, 256):
        theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
        torch.testing.assert_close(kernels.guidance_embedding(w, dim), theirs, atol=2e-4, rtol=0)  # sin of thousands


def test_the_two_conventions_of_guidance():
    conditional, unconditional = torch.tensor(2.0), torch.tensor(0.5)
    for g in (1.0, 2.5, 8.0):
        w = kernels.lcm_guidance(g)
        lcm = conditional + w * (conditional - unconditional)
        assert lcm == unconditional + g * (conditional - unconditional) and kernels.diffusers_guidance(w) == g
    assert kernels.lcm_guidance(1.0) == 0  # no guidance
