"""The flow's SDE: the sheet's numbers, its marginals, its limits, and the same model on either clock."""

import math

import pytest
import torch

from minialign.exact import LinearGaussianFlow
from minialign.kernels import add_flow_noise, flow_diffusion, flow_step, gaussian_kl, variance_preserving_of

ONE = dict(dtype=torch.float64)


def one_step(noise_level, velocity=0.3, schedule="flow_grpo", **given):
    """Sheet grpo, check 2: t = .5 to .4 from x = 1."""
    t, t_next, x = (torch.tensor([value], **ONE) for value in (0.5, 0.4, 1.0))
    s = flow_diffusion(t, noise_level, schedule, t_next[0])
    return flow_step(torch.tensor([[velocity]], **ONE), x[None], t, t_next, s, reduction="sum", **given), s


class TestOneStep:
    def test_mean_std_and_density(self):
        out, s = one_step(0.7, next=torch.ones(1, 1, **ONE))
        assert s.item() == pytest.approx(0.7)
        assert out.mean.item() == pytest.approx(0.913650, abs=1e-6)
        assert out.std.item() == pytest.approx(0.221359, abs=1e-6)
        assert out.log_prob.item() == pytest.approx(0.512944, abs=1e-6)
        assert out.denoised.item() == pytest.approx(1 - 0.5 * 0.3)

    def test_a_constant_of_that_size_is_the_same_step(self):
        ours, theirs = one_step(0.7)[0], one_step(0.7, schedule="constant")[0]
        assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.std, theirs.std)

    def test_without_noise_it_is_eulers(self):
        assert one_step(0.0)[0].mean.item() == pytest.approx(0.97)

    def test_kl_by_means_and_by_velocities(self):
        """Check 3: the two formulas of the paper, and what the release computes."""
        out, ref = one_step(0.7)[0], one_step(0.7, velocity=0.1)[0]
        kl = gaussian_kl(out.mean, ref.mean, out.std, "sum").item()
        assert kl == pytest.approx(0.00632663, abs=1e-8)
        s, t, dt = 0.7, 0.5, 0.1
        assert kl == pytest.approx(dt / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * 0.2**2)
        assert kl * dt == pytest.approx(0.000632663, abs=1e-9)

    def test_at_pure_noise_only_the_denominator_is_patched(self):
        t, second = torch.tensor([1.0, 0.9], **ONE), torch.tensor(0.9, **ONE)
        s = flow_diffusion(t, 0.7, "flow_grpo", second)
        assert s.tolist() == pytest.approx([0.7 * math.sqrt(1 / 0.1), 0.7 * math.sqrt(0.9 / 0.1)])
        assert flow_diffusion(t, 0.3, "constant", second).tolist() == [0.3, 0.3]

    def test_its_mean_carries_the_gradient_and_the_score_is_a_constant_of_nothing(self):
        velocity = torch.tensor([[0.3]], requires_grad=True, **ONE)
        t, t_next = torch.tensor([0.5], **ONE), torch.tensor([0.4], **ONE)
        s = torch.tensor([0.7], **ONE)
        flow_step(velocity, torch.ones(1, 1, **ONE), t, t_next, s, reduction="sum").mean.sum().backward()
        assert velocity.grad.item() == pytest.approx(-0.1 * (1 + 0.7**2 * 0.5 / (2 * 0.5)))  # exact.sampler's gain


class TestMarginals:
    """Check 4, N(0, 1) data with its exact velocity: ODE and SDE draw the same, each up to the error of its steps."""

    @pytest.mark.parametrize(
        ("noise_level", "num_steps", "variance"),
        [
            (0, 10, 0.772614),
            (0, 1000, 0.997433),
            (0.7, 10, 0.931287),
            (0.7, 40, 0.999014),
            (math.sqrt(2), 10, 1.011969),
            (math.sqrt(2), 1000, 1.000001),
        ],
    )
    def test_variance(self, noise_level, num_steps, variance):
        flow = LinearGaussianFlow(num_steps=num_steps, noise_level=noise_level)
        assert flow.sample_variance.item() == pytest.approx(variance, abs=1e-6)

    @pytest.mark.parametrize(
        ("noise_level", "schedule", "all_steps", "nine_steps"),
        [
            (0.7, "flow_grpo", 0.852452, 0.847007),
            (math.sqrt(2), "flow_grpo", 1.011966, 0.989744),
            (0.3, "constant", 0.117784, 0.108784),
        ],
    )
    def test_what_training_can_tilt(self, noise_level, schedule, all_steps, nine_steps):
        """Check 6: S = Var(x_0 | x_T), of all steps, and of the first nine."""
        flow = LinearGaussianFlow(num_steps=10, noise_level=noise_level, schedule=schedule)
        share = (flow.downstream * flow.step_std) ** 2
        assert share.sum().item() == pytest.approx(all_steps, abs=1e-6)
        assert share[:9].sum().item() == pytest.approx(nine_steps, abs=1e-6)
        beta = 0.5
        assert (flow.mean_at(flow.optimum(beta)) - flow.sample_mean).item() == pytest.approx(all_steps / beta, abs=1e-5)

    def test_a_mean_that_is_not_zero_is_reached(self):
        flow = LinearGaussianFlow(mean=2.0, std=0.5, num_steps=1000)
        assert flow.sample_mean.item() == pytest.approx(2.0, abs=1e-2)
        assert flow.sample_variance.item() == pytest.approx(0.25, abs=5e-3)


def test_the_two_clocks_agree_on_the_signal_to_noise():
    t = torch.rand(5, **ONE)
    alpha_bar, scale = variance_preserving_of(t)
    x, noise = torch.randn(5, 3, **ONE), torch.randn(5, 3, **ONE)
    state = add_flow_noise(x, noise, t) / scale[:, None]
    assert torch.allclose(state, alpha_bar.sqrt()[:, None] * x + (1 - alpha_bar).sqrt()[:, None] * noise)
    ends = variance_preserving_of(torch.tensor([0.0, 1.0]))[0]
    assert ends.tolist() == [1.0, 0.0]


def test_half_precision_is_computed_in_single():
    out = flow_step(
        torch.full((2, 3), 0.3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2,), 0.5),
        torch.full((2,), 0.4), torch.full((2,), 0.7), reduction="mean", next=torch.ones(2, 3, dtype=torch.bfloat16),
    )  # fmt: skip
    assert out.mean.dtype == torch.float32 and out.log_prob.dtype == torch.float32
    assert out.log_prob[0].item() == pytest.approx(0.512944, abs=2e-3)
