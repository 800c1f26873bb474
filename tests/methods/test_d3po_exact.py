"""D3PO where everything is known: a Gaussian bandit, and the linear-Gaussian line through the real policy and loop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from minialign.methods import d3po
from minialign.pairs import bradley_terry
from minialign.worlds import gaussian

F64 = torch.float64


def hermite(n=60):
    """Nodes and weights of a standard normal's expectation."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def test_the_bandits_optimum_is_the_kl_tilt():
    """Check 5: x = s z, reward 2 x, s = .5, beta = .25, Bradley-Terry labels: shift s^2 g / beta = 2, and a live slope
    on either side of it."""
    s, g, beta = 0.5, 2.0, 0.25
    z, weight = hermite()
    gap = math.sqrt(2) * z  # z_1 - z_2
    label = (g * s * gap).sigmoid()

    def slope(shift):
        delta = torch.tensor(shift, dtype=F64, requires_grad=True)
        # the delta^2 / 2 s^2 of both cancel; x around the policy's or the reference's mean, alike
        first, second = ((delta * x - delta**2 / 2) / s**2 for x in (s * gap / 2, -s * gap / 2))
        win, lose = (d3po.step_loss(*pair, beta, math.inf)[0] for pair in ((first, second), (second, first)))
        loss = (weight * (label * win + (1 - label) * lose)).sum()
        return torch.autograd.grad(loss, delta)[0].item()

    assert brentq(slope, 0.1, 5.0) == pytest.approx(2.0, abs=1e-9)
    assert slope(1.9) < -1e-4 and slope(2.1) > 1e-4


def attenuated(sampler, scale, beta, shared):
    """theta (steps,) where each step's own loss is flat, exactly: check 6.

    A step's difference D ~ N(0, 2 sigma^2) of two paths moves x_0 by A D, other steps (and x_T, if it is not shared)
    move it, too, by e: the label is right with probability E_e sigmoid(scale (A D + e)), and the step explains it by
    sigmoid(w D), w = beta delta / sigma^2. Its w solves E[(label - sigmoid(w D)) D] = 0.
    """
    z, weight = hermite()
    pushes = (sampler.downstream * sampler.step_std) ** 2
    noise = pushes.sum() + (0 if shared else sampler.memory_slope**2)
    found = []
    for push, std, downstream, gain in zip(pushes, sampler.step_std, sampler.downstream, sampler.gain, strict=True):
        gap, other = math.sqrt(2) * std * z, math.sqrt(2 * float(noise - push)) * z
        label = (scale * (downstream * gap.unsqueeze(1) + other)).sigmoid() @ weight
        w = brentq(lambda w, g=gap, p=label: float((weight * (p - (w * g).sigmoid()) * g).sum()), 0, 10 * scale)
        found.append(w * std**2 / beta / gain)
    return torch.stack([torch.as_tensor(x) for x in found])


def test_with_little_noise_every_step_has_the_exact_tilt():
    sampler = gaussian.load("line", num_steps=5).sampler
    tilt = sampler.optimum(2.0)  # P sigma^2 / (beta k)
    torch.testing.assert_close(attenuated(sampler, 1e-3, 2e-3, True), tilt, rtol=1e-5, atol=0)
    share = attenuated(sampler, 2.0, 4.0, True) / tilt
    assert (share < 0.97).all() and share.min() < 0.85  # other steps' noise also decides the label
    assert (attenuated(sampler, 2.0, 4.0, False) / tilt < share).all()  # and so does x_T


SCALE, BETA = 3.0, 2.0
CONFIG = d3po.Config(
    beta=BETA, clip_range=math.inf, reduction="sum", num_minibatches=1, steps_per_pass=5, weight_decay=0.0,
    max_grad_norm=math.inf,
)  # fmt: skip


def line():
    world = gaussian.load("line", num_steps=5)
    world.policy.network.double()
    world.policy.set_num_steps(5)
    return world, world.policy, world.sampler


@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_is_zero_at_the_attenuated_optimum_and_not_at_the_tilt(shared):
    """Through the loop's own rollout, labels and loss, at learning rate 0: within 4 standard errors, every step."""
    world, policy, sampler = line()
    labeller = bradley_terry(world.rewards["first_coordinate"], SCALE)

    def mean_gradient(theta, rounds=15):
        with torch.no_grad():
            policy.network.residual.theta.copy_(theta)
        caught = []
        hook = policy.network.residual.theta.register_post_accumulate_grad_hook(lambda p: caught.append(p.grad.clone()))
        config = dataclasses.replace(
            CONFIG, num_iterations=rounds, num_prompts=500, learning_rate=0.0, shared_start=shared
        )
        for _ in d3po.train(policy, None, world.prompts, config, torch.Generator().manual_seed(0), labeller=labeller):
            pass
        hook.remove()
        slopes = torch.stack(caught)
        return slopes.mean(0) / (slopes.std(0) / math.sqrt(len(slopes)))

    assert mean_gradient(attenuated(sampler, SCALE, BETA, shared)).abs().max() < 4
    assert mean_gradient(sampler.optimum(BETA / SCALE)).abs().max() > 8


@pytest.mark.optimum("d3po")
def test_the_loop_reaches_its_exact_optimum():
    world, policy, sampler = line()
    config = dataclasses.replace(CONFIG, num_iterations=50, num_prompts=600, learning_rate=0.05)
    labeller = bradley_terry(world.rewards["first_coordinate"], SCALE)
    goal, thetas = attenuated(sampler, SCALE, BETA, True), []
    for _ in d3po.train(policy, None, world.prompts, config, torch.Generator().manual_seed(0), labeller=labeller):
        thetas.append(policy.network.residual.theta.detach().clone())
    found = torch.stack(thetas[25:]).mean(0)
    shift, target = (float(sampler.mean_at(theta) - sampler.sample_mean) for theta in (found, goal))
    assert shift == pytest.approx(target, rel=0.05)
    assert float(sampler.reachable_shift(BETA / SCALE)) > 1.5 * target  # the tilt of all steps together is elsewhere
