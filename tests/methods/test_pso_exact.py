"""The pso sheet's check 5: two calls, one action, a linear-Gaussian student; the optimum of a pairwise loss in closed
form."""

import math

import pytest
import torch
from test_rlcm_exact import S, gaussian_policy

from minialign.methods import pso

BETA, SLOPE = 4.0, 1.5


def policy_and_optimum(beta=BETA, slope=SLOPE):
    """The student whose f is exact but for theta, and (1 - a) / sqrt(a) A g / beta, A = d x_out / d x_prev."""
    policy = gaussian_policy(2)
    policy.train_all_weights()
    a = policy.network.alphas_cumprod[policy.timesteps[1]]
    carried = S / (a * S**2 + 1 - a).sqrt()
    return policy, ((1 - a) / a.sqrt() * carried * slope / beta).item()


def judge(seed):
    """The sample, and Gumbel noise: differences of that are logistic, so labels are Bradley and Terry's."""
    generator = torch.Generator().manual_seed(seed)

    def reward(samples, prompts):
        uniform = torch.rand(len(samples), generator=generator, dtype=samples.dtype)
        return SLOPE * samples.squeeze(-1) - (-uniform.log()).log()

    return reward


def gradients(policy, theta, rounds=16, n=1500):
    """Of the loss with respect to theta, at that theta, a round each; samples are the reference's."""
    generator, reward, found = torch.Generator().manual_seed(0), judge(1), []
    pairs, places = torch.arange(2 * n).view(-1, 2), torch.arange(1)
    for _ in range(rounds):
        policy.network.theta.data.fill_(theta)
        with torch.no_grad():
            noise = policy.draw_noise(2 * n, generator)
            noise[1::2, 0] = noise[::2, 0]
            traj = policy.rollout([""] * 2 * n, noise, reduction="sum")
            ref = pso.reference_log_probs(policy, traj, reduction="sum", rows_per_pass=2 * n, steps_per_pass=1)
            rewards = reward(traj.final, None)
        preference = (rewards[::2] > rewards[1::2]).double()
        config = pso.Config(beta=BETA, reduction="sum", clip_range=math.inf)
        loss, _ = pso.round_loss(policy, traj, pairs, places, ref, preference, config)
        found.append(torch.autograd.grad(loss, policy.network.theta)[0])
    found = torch.stack(found)
    return found.mean().item(), found.std().item() / rounds**0.5


def test_the_gradient_vanishes_at_the_closed_forms_shift_and_nowhere_near():
    policy, best = policy_and_optimum()
    at, error = gradients(policy, best)
    assert abs(at) < 4 * error
    below, above = gradients(policy, 0.8 * best)[0], gradients(policy, 1.2 * best)[0]
    assert below < -8 * error and above > 8 * error


def test_the_loop_goes_there():
    policy, best = policy_and_optimum()
    config = pso.Config(
        num_iterations=40, batch_size=600, pairs_per_pass=600, beta=BETA, reduction="sum", clip_range=math.inf,
        shared_start=True, learning_rate=0.1,
    )  # fmt: skip
    path = [policy.network.theta.item() for _ in pso.train(policy, judge(2), [""], config)]
    assert sum(path[16:]) / 24 == pytest.approx(best, rel=0.1)
