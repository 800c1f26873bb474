"""DiffusionNFT: the sheet's closed form, reached by regression; its limits; its control without the second term."""

import math

import pytest
import torch

from minialign import worlds
from minialign.methods import diffusion_nft as nft

F64 = dict(dtype=torch.float64)


class TestOptimality:
    def test_values(self):
        """Two groups; centred 1, -1, 3, -3: std sqrt 5. Within `spread` stds r is linear, outside it is 0 or 1."""
        rewards, group = torch.tensor([11.0, 9.0, 3.0, -3.0], **F64), torch.tensor([0, 0, 1, 1])
        std = math.sqrt(5)
        expected = [0.5 + c / (2 * 5 * std) for c in (1, -1, 3, -3)]
        assert nft.optimality(rewards, group, 5.0).tolist() == pytest.approx(expected, rel=1e-5)
        assert nft.optimality(rewards, group, 1.0).tolist() == pytest.approx([0.5 + 0.5 / std, 0.5 - 0.5 / std, 1, 0])

    def test_equal_rewards_say_nothing(self):
        assert nft.optimality(torch.full((4,), 0.3), torch.zeros(4).long(), 5.0).tolist() == [0.5] * 4


class TestLoss:
    def inputs(self):
        g = torch.Generator().manual_seed(0)
        denoised, noise, old, velocity = torch.randn(4, 3, 2, generator=g, **F64)
        t = torch.tensor([0.2, 0.5, 0.9], **F64)
        states = (1 - t[:, None]) * denoised + t[:, None] * noise
        return velocity.requires_grad_(), old, states, t, denoised, noise

    def test_plus_and_minus_are_mirror_images(self):
        velocity, old, *_ = self.inputs()
        plus, minus = nft.implicit_velocities(velocity, old, 0.3)
        torch.testing.assert_close(plus + minus, 2 * old)
        torch.testing.assert_close(plus, 0.7 * old + 0.3 * velocity)
        torch.testing.assert_close(nft.implicit_velocities(velocity, old, 1.0)[0], velocity)

    def test_good_samples_are_flow_matching_at_strength_one(self):
        velocity, old, states, t, denoised, noise = self.inputs()
        loss = nft.contrastive_loss(velocity, old, states, t, denoised, noise, torch.ones(3, **F64), 1.0)
        torch.testing.assert_close(loss, (velocity - (noise - denoised)).square().mean(1))

    def test_at_r_one_half_the_gradient_vanishes_where_v_is_v_old(self):
        """Check 7's last sentence, sample by sample: the two terms pull in opposite directions, equally."""
        _, old, states, t, denoised, noise = self.inputs()
        velocity = old.clone().requires_grad_()
        half = torch.full((3,), 0.5, **F64)
        for weighting in ("none", "adaptive"):
            loss = nft.contrastive_loss(velocity, old, states, t, denoised, noise, half, 0.5, weighting)
            assert torch.autograd.grad(loss.sum(), velocity)[0].abs().max() < 1e-12
            alone = nft.contrastive_loss(
                velocity, old, states, t, denoised, noise, half, 0.5, weighting, negative=False
            )
            assert torch.autograd.grad(alone.sum(), velocity)[0].abs().min() > 1e-6

    def test_the_codes_form(self):
        velocity, old, states, t, denoised, noise = self.inputs()
        r = torch.tensor([0.2, 0.5, 0.9], **F64)
        loss = nft.contrastive_loss(velocity, old, states, t, denoised, noise, r, 0.5, "adaptive")
        by_hand = []
        for i in range(3):
            total = 0
            for sign, share in ((1, r[i]), (-1, 1 - r[i])):
                guess = states[i] - t[i] * (old[i] + sign * 0.5 * (velocity[i] - old[i]))
                error = guess - denoised[i]
                total += share * error.square().mean() / error.abs().mean()
            by_hand.append(5 / 0.5 * total)
        torch.testing.assert_close(loss, torch.stack(by_hand))

    def test_half_precision_is_computed_in_single(self):
        inputs = [x.detach().to(torch.bfloat16) for x in self.inputs()]
        loss = nft.contrastive_loss(*inputs, torch.full((3,), 0.7), 1.0, "adaptive")
        assert loss.dtype == torch.float32 and loss.isfinite().all()


@pytest.mark.parametrize(("strength", "expected"), [(1.0, -0.961541), (0.5, -2 * 0.961541)])
def test_the_minimum_is_the_papers(strength, expected):
    """Check 7: N(0, 1) data, t = .5, x_t = .4, r = 1 where x_0 > 0: v_old = 0, v* = (2 / b) Cov(r, v | x_t).

    The minimum over a constant v of the mean loss, by its gradient, which is linear in v; x_0 | x_t is N(.4, .5).
    """
    n = 200_001
    quantiles = torch.linspace(0.5 / n, 1 - 0.5 / n, n, **F64)
    x0 = 0.4 + math.sqrt(0.5) * torch.special.ndtri(quantiles)
    noise = (0.4 - 0.5 * x0) / 0.5
    r, t, states = (x0 > 0).double(), torch.full((n,), 0.5, **F64), torch.full((n, 1), 0.4, **F64)
    assert r.mean().item() == pytest.approx(0.714196, abs=1e-5)
    old = torch.zeros(n, 1, **F64)

    def slope(v):
        v = torch.tensor(v, requires_grad=True, **F64)
        loss = nft.contrastive_loss(v.expand(n, 1), old, states, t, x0[:, None], noise[:, None], r, strength).mean()
        return torch.autograd.grad(loss, v)[0].item()

    at_zero, at_one = slope(0.0), slope(1.0)
    assert at_zero / (at_zero - at_one) == pytest.approx(expected, abs=2e-4)


def first_coordinate(samples, prompts):
    return samples[:, 0]


def line(**settings):
    world = worlds.load("line", model="flow", num_steps=5, **settings)
    world.policy.network.double()
    world.policy.to("cpu")
    return world


class TestTraining:
    def run(self, reward=first_coordinate, world=None, **settings):
        world = world or line()
        config = nft.Config(**dict(num_iterations=4, num_prompts=2, group_size=32, learning_rate=0.02) | settings)
        steps = list(nft.train(world.policy, reward, world.prompts, config))
        return world, steps

    def test_the_reward_rises(self):
        world, steps = self.run(num_iterations=20)
        assert steps[-1].metrics["reward"] > 0.3 + steps[0].metrics["reward"]
        assert world.policy.network.residual.theta.abs().max() > 0

    def test_a_constant_reward_moves_nothing(self):
        """It cancels sample by sample, but only while v is v_old: with one update a round, and old_limit 0."""
        world, _ = self.run(
            lambda samples, prompts: torch.zeros(len(samples)), num_minibatches=1, old_limit=0.0, beta=0.0
        )
        assert world.policy.network.residual.theta.abs().max() < 1e-9

    def test_without_the_negative_term_a_constant_reward_does_move_it(self):
        world, _ = self.run(
            lambda samples, prompts: torch.zeros(len(samples)),
            num_minibatches=1,
            old_limit=0.0,
            beta=0.0,
            negative=False,
        )
        assert world.policy.network.residual.theta.abs().max() > 1e-3

    def test_old_follows_as_it_is_told(self):
        p = torch.nn.Parameter(torch.zeros(3))
        old = nft.Old([p])
        p.data += 1
        with old.weights():
            assert p.data.abs().max() == 0
        assert p.data.min() == 1
        old.follow(0.75)
        assert old.values[0].tolist() == [0.25] * 3
        other = nft.Old([p])
        other.load(old.tensors())
        assert torch.equal(other.values[0], old.values[0])

    def test_old_is_put_back_whatever_happens(self):
        p = torch.nn.Parameter(torch.ones(3))
        old = nft.Old([p])
        p.data += 1
        with pytest.raises(RuntimeError), old.weights():
            raise RuntimeError
        assert p.data.tolist() == [2.0] * 3

    def test_costs(self):
        """64 samples: 5 steps of the ODE; of each at 4 levels a pass of v_old, one of the base, one that trains."""
        _, steps = self.run(num_iterations=1)
        assert steps[0].network_evaluations == 64 * (5 + 4 * (1 + 1 + 3)) and steps[0].reward_queries == 64
        _, steps = self.run(num_iterations=1, beta=0.0, num_levels=2)
        assert steps[0].network_evaluations == 64 * (5 + 2 * (1 + 3))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (dict(group_size=1), "group_size is 1"),
            (dict(num_minibatches=65), "num_minibatches is 65, more than the 64 samples"),
            (dict(num_levels=6), "num_levels is 6; the sampler's grid has 5"),
        ],
    )
    def test_what_cannot_train_is_said(self, settings, message):
        with pytest.raises(ValueError, match=message):
            self.run(**settings)

    def test_a_diffusion_policy_says_no_velocity(self):
        with pytest.raises((TypeError, ValueError), match="velocity"):
            self.run(world=worlds.load("line"))
