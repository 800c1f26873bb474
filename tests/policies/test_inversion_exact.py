"""Inversion against the closed forms of one Gaussian, and on every kind of policy that an ODE samples."""

import math
from itertools import pairwise

import pytest
import torch

from minialign import worlds
from minialign.kernels import ddim_std, expand_as, posterior_std, transport
from minialign.policies.inversion import implied_noise, invert
from minialign.policies.trajectory import Condition


class GaussianPolicy:
    """Data N(m, s^2) in one dimension; a level is an angle: signal cos, noise sin, so that it is continuous.

    Away from the reference, the noise is that of data moved by `shift`, if only to first order: eps - k shift.
    """

    state_dtype, device, target = torch.float64, torch.device("cpu"), "epsilon"

    def __init__(self, mean=0.0, std=1.0, shift=0.0):
        self.mean, self.std, self.shift = mean, std, shift

    def signal_and_noise(self, levels):
        return levels.cos(), levels.sin()

    def spread(self, levels):
        """sqrt(v_t), the standard deviation of x_t."""
        signal, noise = self.signal_and_noise(levels)
        return ((signal * self.std) ** 2 + noise**2).sqrt()

    def noise_at(self, states, levels, condition=None, reference=False):
        signal, noise = (expand_as(x, states) for x in self.signal_and_noise(levels))
        v = expand_as(self.spread(levels), states) ** 2
        k = noise * signal / v
        return noise * (states - signal * self.mean) / v - (0 if reference else k * self.shift)

    def training_error(self, latents, levels, noise, condition, *, reduction, reference=False):
        signal, sigma = (expand_as(x, latents) for x in self.signal_and_noise(levels))
        seen = self.noise_at(signal * latents + sigma * noise, levels, condition, reference)
        return (seen - noise).square().flatten(1).mean(1)

    def exact(self, latents, levels):
        """Where the flow takes clean latents: signal m + sqrt(v) / s (x_0 - m)."""
        signal, _ = self.signal_and_noise(levels)
        return expand_as(signal, latents) * self.mean + expand_as(self.spread(levels), latents) / self.std * (
            latents - self.mean
        )


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


NOTHING = Condition({}, {}, {}, torch.zeros(1, dtype=torch.long))  # to be told
LEVEL = f64(math.acos(0.8))  # signal .8, noise .6
WORLDS = {
    "diffusion": dict(name="ring", schedule="cosine"),
    "flow": dict(name="ring", model="flow"),
    "v": dict(name="compass"),
}


def policy_of(kind):
    """In float64, with weights that are not the reference's."""
    settings = dict(WORLDS[kind])
    policy = worlds.load(settings.pop("name"), **settings).policy
    policy.network.double()
    policy.to("cpu")
    for p in policy.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    return policy


def given(policy, n=7):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(n, *policy.latent_shape, generator=generator, dtype=torch.float64)
    return latents, policy.draw_levels(n, generator), policy.encode((["inner"] if policy._encoder else [0]) * n)


@pytest.mark.parametrize("renoise", [False, True])
def test_a_fine_inversion_is_the_gaussians_flow(renoise):
    """Sheet InPO, check 2: s = .5, x_0 = 1, signal .8: x_t = 1.442221, tau = 1.070368; and with a mean."""
    policy = GaussianPolicy(std=0.5)
    steps, tolerance = (500, 2e-6) if renoise else (400, 2e-3)
    states = invert(policy, f64([1.0]), LEVEL, NOTHING, num_steps=steps, renoise=renoise)
    assert states.item() == pytest.approx(1.442221, abs=tolerance)
    assert implied_noise(policy, f64([1.0]), LEVEL, states).item() == pytest.approx(1.070368, abs=tolerance / 0.6)
    moved = GaussianPolicy(mean=-0.7, std=0.5)
    latents = f64([1.0], [0.2], [-1.4])
    levels = f64(0.3, 0.9, 1.2)
    states = invert(moved, latents, levels, NOTHING, num_steps=steps, renoise=renoise)
    torch.testing.assert_close(states, moved.exact(latents, levels), atol=5 * tolerance, rtol=0)


@pytest.mark.parametrize(("renoise", "order"), [(False, 1), (True, 2)])
def test_there_and_back_again(renoise, order):
    """Check 4: inverted in n steps and sampled back by DDIM's n on the same grid: an error of order 1 / n.

    With ReNoise's second evaluation the inversion itself is of second order."""
    policy, latents = GaussianPolicy(std=0.5), f64([1.0])

    def returned(n):
        states = invert(policy, latents, LEVEL, NOTHING, num_steps=n)
        grid = [LEVEL * i / n for i in range(n, -1, -1)]
        for level, following in pairwise(grid):
            levels = policy.signal_and_noise(level), policy.signal_and_noise(following)
            states = transport(policy.noise_at(states, level), states, *levels)
        return (states - latents).abs().item()

    def missed(n):
        states = invert(policy, latents, LEVEL, NOTHING, num_steps=n, renoise=renoise)
        return (states - policy.exact(latents, LEVEL)).abs().item()

    for error in [missed, *([] if renoise else [returned])]:
        assert error(40) / error(80) == pytest.approx(2**order, rel=0.1) and error(80) > 1e-6


@pytest.mark.parametrize("kind", WORLDS)
def test_the_implied_noise_corrupts_to_just_these_states(kind):
    """Check 1, for any network; each row has its own level, whatever the other rows have; no gradient."""
    policy = policy_of(kind)
    latents, levels, condition = given(policy)
    for settings in ({}, dict(renoise=True, num_steps=3), dict(reference=False)):
        states = invert(policy, latents, levels, condition, **settings)
        tau = implied_noise(policy, latents, levels, states)
        torch.testing.assert_close(policy.corrupt(latents, levels, tau), states, atol=1e-9, rtol=0)
        alone = invert(policy, latents[3:4], levels[3:4], condition[torch.tensor([3])], **settings)
        torch.testing.assert_close(states[3:4], alone)
        assert not tau.requires_grad and tau.isfinite().all()


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_who_inverts_and_what_it_costs(kind):
    policy = policy_of(kind)
    latents, levels, condition = given(policy)
    ours, base = (invert(policy, latents, levels, condition, reference=which) for which in (False, True))
    assert (ours - base).abs().max() > 1e-3
    for p in policy.parameters():
        p.data.zero_()
    torch.testing.assert_close(invert(policy, latents, levels, condition, reference=False), base)
    before = policy.network_evaluations
    invert(policy, latents, levels, condition, num_steps=4)
    invert(policy, latents, levels, condition, num_steps=4, renoise=True)
    assert policy.network_evaluations - before == 7 * 4 + 7 * 8
    with pytest.raises(ValueError, match="num_steps is 0"):
        invert(policy, latents, levels, condition, num_steps=0)


def test_a_few_steps_already_come_back_to_the_image():
    """In ring, sampled from where inversion ended: with 50 steps the 50-step sampler returns to the image."""
    policy = worlds.load("ring", schedule="cosine", num_steps=50, eta=0.0).policy
    latents = policy.rollout([0] * 64, generator=torch.Generator().manual_seed(0), density=False).final
    levels = policy.timesteps[:1].expand(64)
    away = {}
    for n in (5, 50):
        states = invert(policy, latents, levels, policy.encode([0] * 64), num_steps=n)
        noise = policy.draw_noise(64, torch.Generator().manual_seed(1))
        noise[:, 0] = states
        away[n] = (policy.rollout([0] * 64, noise, density=False).final - latents).norm(dim=1).median()
    assert away[50] < 0.2 and away[50] < away[5] / 2


def test_the_last_level_may_be_noise_alone():
    policy = policy_of("flow")
    latents, _, condition = given(policy)
    levels = torch.ones(7, dtype=torch.float64)
    for renoise in (False, True):
        states = invert(policy, latents, levels, condition, renoise=renoise)
        assert states.isfinite().all() and torch.equal(implied_noise(policy, latents, levels, states), states)


def test_the_random_term_is_a_stochastic_samplers():
    """By hand: noises .6 and .28 of signals .8 and .96: .28 / .6 sqrt(.36 - (.8 .28 / .96)^2) = .25796."""
    level, following = (f64(0.96), f64(0.28)), (f64(0.8), f64(0.6))
    assert posterior_std(level, following).item() == pytest.approx(0.257960, abs=1e-6)
    alpha_bars = f64(0.8**2), f64(0.96**2)
    torch.testing.assert_close(posterior_std(level, following), ddim_std(*alpha_bars, 1.0))
    assert posterior_std(level, level).item() == 0
    assert posterior_std((f64(1.0), f64(0.0)), following).item() == 0
    policy = policy_of("diffusion")
    latents, levels, condition = given(policy)
    noise = torch.randn(7, 1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain, moved = (
        invert(policy, latents, levels, condition, num_steps=1, noise=given) for given in (None, 0.1 * noise)
    )
    start, end = (policy.signal_and_noise(x) for x in (torch.zeros_like(levels), levels))
    torch.testing.assert_close(moved - plain, 0.1 * noise[:, 0] * posterior_std(start, end).unsqueeze(1))
