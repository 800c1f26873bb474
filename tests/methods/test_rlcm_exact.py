"""The closed-form checks of the rlcm sheet: an exact consistency function of a Gaussian, plus one number theta.

f(x, t) = m + s (x - sqrt(a) m) / sqrt(a s^2 + 1 - a) + theta at every call, the reward is the sample itself.
"""

import math

import pytest
import torch
from diffusers import LCMScheduler
from torch import nn

from minialign.kernels import gaussian_kl
from minialign.methods import rlcm
from minialign.policies.consistency import ConsistencyPolicy

F64, M, S = torch.float64, 0.3, 0.5


class ExactConsistency(nn.Module):
    """x, t -> the end of the trajectory through (x, t), and theta more."""

    def __init__(self, alphas_cumprod):
        super().__init__()
        self.register_buffer("alphas_cumprod", alphas_cumprod.to(F64))
        self.theta = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, t):
        a = self.alphas_cumprod[t].unsqueeze(-1)
        return M + S * (x - a.sqrt() * M) / (a * S**2 + 1 - a).sqrt() + self.theta


def gaussian_policy(num_steps=4, timesteps=None, terminal_std=0.0):
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler = LCMScheduler(prediction_type="sample", **settings)
    network = ExactConsistency(scheduler.alphas_cumprod)
    policy = ConsistencyPolicy(network, scheduler, num_steps=num_steps, latent_shape=(1,), terminal_std=terminal_std)
    policy.set_num_steps(num_steps, timesteps)
    return policy


def carried(policy):
    """c_i = sqrt(a_i) s / sqrt(a_i s^2 + 1 - a_i): d f(x_i) / d (signal that went into x_i)."""
    a = policy.network.alphas_cumprod[policy.timesteps]
    return a.sqrt() * S / (a * S**2 + 1 - a).sqrt()


def estimates(policy, rounds=60, n=4000, seed=0):
    """Score-function estimates of d E[reward] / d theta, from RLCM's own loss, (rounds,)."""
    generator, config = torch.Generator().manual_seed(seed), rlcm.Config(reduction="sum")
    found = []
    for _ in range(rounds):
        with torch.no_grad():
            traj = policy.rollout([""] * n, generator=generator, reduction="sum")
        advantages = traj.final.squeeze(-1) - M
        loss, info = rlcm.round_loss(policy, traj, torch.arange(n), advantages, 1e9, config)
        assert info["clip_fraction"] == 0 and info["approx_kl"].abs() < 1e-12
        assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-10)
        (gradient,) = torch.autograd.grad(loss * traj.log_probs.shape[1], policy.network.theta)  # sum over steps
        found.append(-gradient)
    return torch.stack(found)


def test_how_much_an_early_call_matters():
    """Check 3."""
    torch.testing.assert_close(
        carried(gaussian_policy(4)),
        torch.tensor([0.034192, 0.116556, 0.296102, 0.570728], dtype=F64),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("num_steps", "timesteps", "reached"),
    [(2, None, 0.296102), (4, None, 0.759418), (4, [999, 759, 519, 279], 0.711705), (8, None, 1.434666)],
)
def test_the_gradient_lacks_the_last_call(num_steps, timesteps, reached):
    """Checks 1 and 2: sum_j prod_{i>j} c_i of 1 + that; terminal noise brings the 1 back, whatever its size."""
    policy = gaussian_policy(num_steps, timesteps)
    c = carried(policy)
    total = sum(c[j + 1 :].prod().item() for j in range(num_steps - 1))
    assert total == pytest.approx(reached, abs=2e-6)
    noise = policy.draw_noise(7, torch.Generator().manual_seed(0))
    with torch.enable_grad():  # the true derivative, through every call
        x, theta = noise[:, 0], policy.network.theta
        for j in range(num_steps):
            x = policy.step(x, j, policy.encode([""] * 7)).mean
            x = x + policy.std[j] * noise[:, j + 1] if j + 1 < num_steps else x
        (true,) = torch.autograd.grad(x.mean(), theta)
    assert true.item() == pytest.approx(1 + reached, abs=2e-6)
    got = estimates(policy)
    error = got.std().item() / math.sqrt(len(got))
    assert abs(got.mean().item() - reached) < 4 * error and error < 0.1 * reached
    spread = {}
    for std in (0.1, 0.4):
        got = estimates(gaussian_policy(num_steps, timesteps, terminal_std=std))
        error = got.std().item() / math.sqrt(len(got))
        assert abs(got.mean().item() - (1 + reached)) < 4 * error and error < 0.1
        spread[std] = got.var().item()
    assert spread[0.1] > 1.5 * spread[0.4]  # grows like 1 / std^2, beside what the other actions contribute


@pytest.mark.parametrize("timesteps", [[999], [999, 499], [999, 759, 499, 259], [999, 100, 60]])
def test_every_choice_of_timesteps_samples_the_data(timesteps):
    """Check 4, and check 3 of the consistency sheet: nothing is added after the last call, levels are the next ones."""
    policy = gaussian_policy(len(timesteps), timesteps)
    a = policy.network.alphas_cumprod[999]
    c = carried(policy)
    mean, variance = 0.0, 1.0  # x_T ~ N(0, 1), where N(sqrt(a) m, a s^2 + 1 - a) is right
    scale = (S / (a * S**2 + 1 - a).sqrt()).item()
    mean, variance = M + scale * (mean - a.sqrt().item() * M), scale**2 * variance
    for j in range(1, len(timesteps)):  # y -> f(sqrt(a') y + sqrt(1 - a') z): slope c_j, and s^2 restored
        mean, variance = M + c[j].item() * (mean - M), c[j].item() ** 2 * variance + S**2 * (1 - c[j].item() ** 2)
    sheet = {1: (0.289742, 0.500876), 2: (0.296963, 0.500077), 4: (0.299798, 0.5)}
    if timesteps != [999, 100, 60]:
        assert (mean, variance**0.5) == pytest.approx(sheet[len(timesteps)], abs=2e-6)
    y = policy.sample([""] * 100_000, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    assert abs(y.mean().item() - mean) < 4 * 0.5 / 100_000**0.5
    assert abs(y.var().item() - variance) < 4 * 0.25 * (2 / 100_000) ** 0.5


def test_scoring_the_noise_behind_the_last_call_adds_variance_only():
    """Check 5: the authors' extra term has mean zero, because the reward was paid before that noise."""
    policy, n, extra = gaussian_policy(2), 4000, []
    a = policy.network.alphas_cumprod[policy.timesteps[-1]]  # the code re-noises to the last level's own
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        traj = policy.rollout([""] * n, generator=generator, reduction="sum")
        z = torch.randn(n, generator=generator, dtype=F64)
        reward = traj.final.detach().squeeze(-1) - M
        extra.append((reward * z * a.sqrt() / (1 - a).sqrt()).mean())  # d log N(x'; sqrt(a) y, 1 - a) / d theta
    extra = torch.stack(extra)
    plain = estimates(policy)
    assert abs(extra.mean().item()) < 4 * extra.std().item() / 60**0.5
    assert extra.var() > 0.1 * plain.var()


def test_the_exact_kl_of_a_step_is_the_mean_log_ratio():
    """Check 7: a' |f - f_ref|^2 / (2 (1 - a')), sum convention."""
    policy = gaussian_policy(4)
    policy.train_all_weights()
    policy.network.theta.data += 0.2
    n, step = 50_000, 2
    x = torch.randn(1, 1, dtype=F64).expand(n, 1)
    condition, generator = policy.encode([""] * n), torch.Generator().manual_seed(0)
    noise = torch.randn(n, 1, generator=generator, dtype=F64)
    with torch.no_grad():
        ours = policy.step(x, step, condition, noise=noise, reduction="sum")
        base = policy.step(x, step, condition, next=ours.next, reduction="sum", reference=True)
    exact = gaussian_kl(ours.mean, base.mean, ours.std, "sum")[0].item()
    a = policy.network.alphas_cumprod[policy.timesteps[step + 1]].item()
    assert exact == pytest.approx(a * 0.2**2 / (2 * (1 - a)), rel=1e-7)  # c_out is not quite 1
    ratio = ours.log_prob - base.log_prob
    assert abs(ratio.mean().item() - exact) < 4 * ratio.std().item() / n**0.5


def test_predicting_the_sample_makes_log_probs_independent_of_the_state():
    """Check 6: at these levels c_skip is nothing, f is what the network says."""
    policy = gaussian_policy(4)
    output, x = torch.randn(5, 1, dtype=F64), torch.randn(5, 1, dtype=F64)
    given = torch.randn(5, 1, dtype=F64)
    here, there = (policy.step_from(output, state, torch.tensor(1), next=given) for state in (x, 3 - x))
    torch.testing.assert_close(here.log_prob, there.log_prob, atol=1e-6, rtol=0)
