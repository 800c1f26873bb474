"""Inversion on a Gaussian, where the flow is known; the level that was asked for; every kind of policy."""

import math

import pytest
import torch
from torch import nn

from minialign import worlds
from minialign.kernels import transport
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.inversion import implied_noise, invert


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


class GaussianNoise(nn.Module):
    """The exact noise prediction of N(0, std^2) under a table of alpha_bar, sigma x / (alpha^2 std^2 + sigma^2)."""

    def __init__(self, std, alphas_cumprod):
        super().__init__()
        self.std, self.asked = std, []
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("alpha_bar", alphas_cumprod)

    def forward(self, x, t, **inputs):
        self.asked.append(t.tolist())
        alpha_bar = self.alpha_bar[t].unsqueeze(1)
        return (1 - alpha_bar).sqrt() * x / (alpha_bar * self.std**2 + 1 - alpha_bar) + 0 * self.weight


def gaussian_policy(levels=11, std=0.5, first=0.9999, last=0.05):
    """A table of `levels` noise levels, even in the angle of the cosine, as the sheet's check has it."""
    from diffusers import DDIMScheduler

    ends = [math.acos(math.sqrt(alpha_bar)) for alpha_bar in (first, last)]
    alpha_bar = torch.linspace(*ends, levels, dtype=torch.float64).cos() ** 2
    scheduler = DDIMScheduler(num_train_timesteps=levels, clip_sample=False)
    scheduler.alphas_cumprod = alpha_bar
    return DiffusionPolicy(GaussianNoise(std, alpha_bar), scheduler, latent_shape=(1,), num_steps=2)


@pytest.mark.parametrize(
    ("steps", "renoise", "due"),
    [
        (5, False, -0.44134),
        (5, True, -0.12279),
        (5, "old", -0.31749),
        (10, False, -0.23099),
        (10, True, -0.03165),
        (10, "old", -0.13966),
    ],
)
def test_the_error_of_either_inversion_to_the_sheets_digits(steps, renoise, due):
    """Sheet smpo, check 3: N(0, .5^2), x_0 = 1, from alpha_bar .9999 to .05, where x_t is 1.96214."""
    policy = gaussian_policy()
    exact = [math.sqrt(alpha_bar * 0.25 + 1 - alpha_bar) / 0.5 for alpha_bar in (0.9999, 0.05)]
    assert exact[1] == pytest.approx(1.96214, abs=1e-5)
    given = f64(exact[0]).view(1, 1), torch.tensor([10]), policy.encode([""])
    level = "old" if renoise == "old" else "new"
    states = invert(policy, *given, num_steps=steps, renoise=bool(renoise), reference=False, level=level)
    assert states.item() - exact[1] == pytest.approx(due, abs=1e-5)


def test_the_orders_are_one_and_two():
    """A grid that is fine enough: twice the steps halve DDIM's error and quarter ReNoise's."""
    policy = gaussian_policy(levels=801)
    given = torch.ones(1, 1, dtype=torch.float64), torch.tensor([800]), policy.encode([""])
    exact = math.sqrt((0.05 * 0.25 + 0.95) / (0.9999 * 0.25 + 0.0001))
    for renoise, order in ((False, 1), (True, 2)):
        error = [
            (invert(policy, *given, num_steps=n, renoise=renoise, reference=False) - exact).abs().item()
            for n in (50, 100)
        ]
        assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.1)


def test_each_row_ends_at_its_own_level_and_asks_at_its_own_grid():
    policy = gaussian_policy(levels=101)
    levels = torch.tensor([0, 1, 50, 100])
    latents = torch.full((4, 1), 0.7, dtype=torch.float64)
    states = invert(policy, latents, levels, policy.encode([""] * 4), num_steps=2, reference=False)
    assert policy.network.asked == [[0, 0, 0, 0], [0, 0, 25, 50]]
    for i in range(4):
        alone = invert(policy, latents[:1], levels[i : i + 1], policy.encode([""]), num_steps=2, reference=False)
        torch.testing.assert_close(states[i : i + 1], alone)
        noise = implied_noise(policy, latents[i : i + 1], levels[i : i + 1], alone)
        back = policy.corrupt(latents[i : i + 1], levels[i : i + 1], noise)
        torch.testing.assert_close(back, alone)
    assert torch.equal(states[0], latents[0])  # level 0 is where it starts
    assert policy.network_evaluations == 2 * 4 + 2 * 4


def test_there_and_back_again():
    """Inverted with n steps and sampled back over the same grid with n: an error of first order."""
    policy = worlds.load("ring", schedule="cosine", num_steps=2).policy
    policy.network.double()
    policy.to("cpu")
    latents = f64(2.1, 0.2, -0.3, 1.8).view(2, 2)
    condition, errors = policy.encode(["a point"] * 2), []
    for n in (33, 99):
        states = invert(policy, latents, torch.tensor([99, 99]), condition, num_steps=n)
        for after, before in zip(range(n, 0, -1), range(n - 1, -1, -1), strict=True):
            here, there = (torch.tensor([99 * k // n] * 2) for k in (after, before))
            noise = policy.noise_at(states, here, condition, True)
            states = transport(noise, states, policy.signal_and_noise(here), policy.signal_and_noise(there))
        errors.append((states - latents).abs().max().item())
    assert errors[1] < 0.5 * errors[0] < 0.1


def test_a_flow_is_inverted_by_its_own_ode():
    """On a Gaussian N(m, s^2) the ODE moves x_0 to t (x_0 - m) sqrt((1-t)^2 s^2 + t^2) / s + (1 - t) m."""
    policy = worlds.load("line", model="flow", mean=0.3, std=0.5).policy
    policy.network.double()
    policy.to("cpu")
    latents, t = f64(0.9, -0.4, 1.3).view(3, 1), f64(0.2, 0.6, 1.0)
    found = invert(policy, latents, t, policy.encode(["a number"] * 3), num_steps=200, renoise=True)
    column = t.view(3, 1)
    exact = (1 - column) * 0.3 + (latents - 0.3) * ((1 - column) ** 2 * 0.25 + column**2).sqrt() / 0.5
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)
    noise = implied_noise(policy, latents, t, found)
    torch.testing.assert_close(policy.corrupt(latents, t, noise), found)


def test_the_base_inverts_unless_the_policy_is_asked():
    policy = worlds.load("ring", schedule="cosine").policy
    given = torch.tensor([[2.0, 0.0]]), torch.tensor([60]), policy.encode(["a point"])
    base = invert(policy, *given)
    torch.testing.assert_close(invert(policy, *given, reference=False), base)
    with torch.no_grad():
        policy.network.residual.net[-1].bias.fill_(0.5)
    torch.testing.assert_close(invert(policy, *given), base)
    assert not torch.allclose(invert(policy, *given, reference=False), base)
    with pytest.raises(ValueError, match="num_steps is 0"):
        invert(policy, *given, num_steps=0)
