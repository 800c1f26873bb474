"""Flow-GRPO and DanceGRPO: the sheet's numbers, their limits, the exact optimum of the SDE policy."""

import math

import pytest
import torch

from minialign import worlds
from minialign.kernels import clipped_surrogate, kl_k1, kl_k2, kl_k3
from minialign.loop import Batch
from minialign.methods import ddpo, grpo
from minialign.policies.flow import FlowPolicy
from minialign.worlds import gaussian

ONE_GROUP = torch.zeros(4, dtype=torch.long)


def advantages(rewards, scale="group", group=ONE_GROUP, limit=5.0):
    return grpo.advantages_of(torch.tensor(rewards, dtype=torch.float64), group, scale, limit)


class TestAdvantages:
    def test_check_1(self):
        """(4, 1, 1, -3) by population stds; the sheet's eps of 1e-4 and ours differ in the fifth digit."""
        expected = [1.306497, 0.100500, 0.100500, -1.507496]
        assert advantages([4.0, 1.0, 1.0, -3.0]).tolist() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("scale", ["group", "batch"])
    def test_shift_and_scale_and_order_change_nothing(self, scale):
        """Check 8."""
        group = torch.tensor([0, 1, 0, 1, 0, 1])
        rewards = [4.0, 1.0, -1.0, -3.0, 2.0, 0.5]
        base = advantages(rewards, scale, group)
        moved = advantages([3 * r + 7 for r in rewards], scale, group)
        torch.testing.assert_close(moved, base, rtol=1e-5, atol=1e-6)
        order = torch.tensor([4, 1, 0, 5, 2, 3])  # permutes within the groups
        permuted = advantages([rewards[i] for i in order], scale, group[order])
        torch.testing.assert_close(permuted, base[order])

    def test_of_the_batch_and_of_none(self):
        group = torch.tensor([0, 0, 1, 1])
        centred = [1.0, -1.0, 3.0, -3.0]
        rewards = [11.0, 9.0, 3.0, -3.0]
        assert advantages(rewards, "none", group).tolist() == centred
        std = math.sqrt((36 + 16 + 4 + 64) / 4)  # of the rewards as they are, with what lies between the prompts
        assert advantages(rewards, "batch", group).tolist() == pytest.approx([c / std for c in centred], rel=1e-5)
        assert advantages(rewards, "group", group).tolist() == pytest.approx([1, -1, 1, -1], rel=1e-5)

    def test_one_winner_is_clipped_and_equal_rewards_are_exact_zeros(self):
        group = torch.zeros(101, dtype=torch.long)
        winner = [1.0] + [0.0] * 100
        assert advantages(winner, "group", group, 1e9)[0].item() == pytest.approx(math.sqrt(100), rel=1e-4)
        assert advantages(winner, "group", group)[0] == 5
        for scale in ("group", "batch", "none"):
            assert torch.equal(advantages([0.3] * 4, scale), torch.zeros(4, dtype=torch.float64))

    def test_the_extremes_of_each_group(self):
        rewards = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 5.0, 9.0])
        group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        chosen = grpo.extremes(rewards, group, 2, torch.tensor([0.0, 0, 0, 0, 0.5, 0.1, 0.9, 0.3]))
        assert chosen.nonzero().flatten().tolist() == [0, 3, 6, 7]
        assert grpo.extremes(rewards, group, 4, torch.rand(8)).all()


def test_which_kl_estimator_is_a_loss():
    """Check 5: under pi, the gradient of k1 is 0, of k2 that of KL(pi || ref), of k3 that of KL(ref || pi)."""
    logits = torch.tensor([0.2, -0.5, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    log_ref = torch.full((4,), -math.log(4), dtype=torch.float64)
    p = logits.softmax(0).detach()
    expected = {
        kl_k1: [0.0] * 4,
        kl_k2: [-0.066230, -0.104898, 0.221429, -0.050301],
        kl_k3: [-0.042845, -0.147130, 0.211033, -0.021058],
    }
    for estimator, gradient in expected.items():
        loss = (p * estimator(logits.log_softmax(0) - log_ref)).sum()
        assert torch.autograd.grad(loss, logits)[0].tolist() == pytest.approx(gradient, abs=1e-6)
    for unbiased in (kl_k1, kl_k3):
        assert (p * unbiased(logits.log_softmax(0) - log_ref)).sum().item() == pytest.approx(0.131719, abs=1e-6)


def line(**settings):
    world = worlds.load("line", model="flow", **settings)
    world.policy.network.double()
    world.policy.to("cpu")
    return world


def first_coordinate(samples, prompts):
    return samples[:, 0]


class TestLoss:
    def loss(self, config, advantages, world=None):
        world = world or line(num_steps=5)
        with torch.no_grad():
            traj = world.policy.rollout(
                ["a number"] * 3, generator=torch.Generator().manual_seed(0), reduction=config.reduction
            )
        steps = torch.arange(4).expand(3, -1)
        loss, info = grpo.transition_loss(world.policy, traj, torch.arange(3), steps, advantages, 0.2, config)
        theta = world.policy.network.residual.theta
        return loss, info, torch.autograd.grad(loss, theta)[0], traj, world.policy

    def test_at_the_first_step_it_is_reinforce_whatever_the_clip(self):
        """Check 1: rho = 1, gradient -A grad log pi."""
        a = torch.tensor([[1.5, -1.0, 0.25]], dtype=torch.float64)
        _, info, gradient, traj, policy = self.loss(grpo.Config(reduction="sum"), a)
        assert info["clip_fraction"] == 0 and info["approx_kl"].abs() < 1e-12
        batch = traj.transitions(torch.arange(3), torch.arange(4).expand(3, -1))
        out = policy.step(batch.states, batch.step, batch.condition, next=batch.next, reduction="sum")
        reinforce = -(a.repeat_interleave(4) * out.log_prob).mean()
        torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, policy.network.residual.theta)[0])
        assert gradient[:4].abs().min() > 0 and gradient[4] == 0  # the last step is not trained

    def test_several_rewards_add_their_losses(self):
        a = torch.tensor([[1.5, -1.0, 0.25], [0.5, 2.0, -0.5]], dtype=torch.float64)
        both = self.loss(grpo.Config(), a)
        alone = [self.loss(grpo.Config(), one[None]) for one in a]
        torch.testing.assert_close(both[2], alone[0][2] + alone[1][2])

    def test_the_kl_of_a_step(self):
        """Zero at the base; away from it the paper's, and the release's, which is |dt| times that over D."""
        world = line(num_steps=5)
        a = torch.zeros(1, 3, dtype=torch.float64)
        assert self.loss(grpo.Config(beta=1.0), a, world)[1]["kl"] == 0
        with torch.no_grad():
            world.policy.network.residual.theta.add_(0.2)
        gain, std = world.sampler.gain, world.sampler.step_std  # d mean / d velocity
        kl = (gain * 0.2 / std) ** 2 / 2
        for name, expected in (("path", kl[:4]), ("release", kl[:4] * 0.2)):
            loss, info, gradient, *_ = self.loss(grpo.Config(beta=2.0, kl=name), a, world)
            assert info["kl"].item() == pytest.approx(expected.mean().item(), rel=1e-6)
            assert loss.item() == pytest.approx(2 * expected.mean().item(), rel=1e-6)
            torch.testing.assert_close(gradient[:4], 2 * 2 * expected / 0.2 / 4)  # the KL is quadratic in theta


@pytest.mark.optimum("grpo")
@pytest.mark.parametrize(("noise_level", "shift"), [(0.7, 0.852452), (math.sqrt(2), 1.011966)])
def test_it_reaches_the_samplers_own_optimum(noise_level, shift):
    """Check 6: reward x_0, KL weight beta: the mean moves by S / beta, S = Var(x_0 | x_T), not by Var(x_0) / beta."""
    world = line(noise_level=noise_level)
    beta = 2.0
    config = grpo.Config(
        num_iterations=80, num_prompts=1, group_size=1024, num_minibatches=1, steps_per_pass=10, scale="none",
        train_last=True, reduction="sum", clip_range=1e9, beta=beta, learning_rate=0.03, weight_decay=0.0,
        max_grad_norm=1e9,
    )  # fmt: skip
    path = []
    for _ in grpo.train(world.policy, first_coordinate, world.prompts, config):
        path.append(world.policy.network.residual.theta.detach().clone())
    theta = torch.stack(path[-40:]).mean(0)  # Adam wanders around the optimum: its average does not
    moved = world.sampler.mean_at(theta) - world.sampler.sample_mean
    assert moved.item() == pytest.approx(shift / beta, rel=0.03)
    assert abs(moved.item() - 1 / beta) > 0.05 or noise_level > 1  # the data's own tilt is another one
    best = world.sampler.optimum(beta)
    torch.testing.assert_close(theta, best, atol=0.05, rtol=0.1)


class TestSettings:
    def run(self, world=None, reward=first_coordinate, **settings):
        world = world or line(num_steps=5)
        config = grpo.Config(**dict(num_iterations=2, num_prompts=2, group_size=6, learning_rate=0.01) | settings)
        steps = list(grpo.train(world.policy, reward, world.prompts, config))
        return world.policy.network.residual.theta.detach(), steps

    def test_the_same_noise_starts_a_group(self):
        world = line(num_steps=5)
        group = torch.arange(2).repeat_interleave(6)
        batch = Batch(["a number"] * 12, torch.zeros(12).long(), group, torch.arange(12))
        for same in (False, True):
            config = grpo.Config(group_size=6, same_noise=same)
            noise = grpo.initial_noise(world.policy, batch, config, torch.Generator().manual_seed(0))
            assert len(noise[:, 0].unique()) == (2 if same else 12) and len(noise[:, 1].unique()) == 12
            if same:
                assert len(noise[:6, 0].unique()) == 1

    def test_extremes_and_shares_train_less(self):
        _, steps = self.run(best_of=2)
        assert steps[0].metrics["trained"].item() == pytest.approx(2 / 6)
        _, all_steps = self.run(num_minibatches=1)
        _, half = self.run(num_minibatches=1, trained_share=0.5)
        # 12 rows: 5 forward passes, then 3 evaluations a trained state, 4 or 2 of them
        assert all_steps[0].network_evaluations == 12 * (5 + 3 * 4) and half[0].network_evaluations == 12 * (5 + 3 * 2)
        assert half[1].reward_queries == 24

    def test_two_rewards_are_charged_twice_and_one_in_a_list_is_one(self):
        theta, steps = self.run(reward=[first_coordinate, lambda samples, prompts: -samples[:, 0].abs()])
        assert steps[-1].reward_queries == 2 * 24 and theta.abs().max() > 0
        torch.testing.assert_close(self.run(reward=[first_coordinate])[0], self.run()[0])

    def test_dance_grpo(self):
        """A deterministic last step: nine actions of ten, and the reward is paid for the denoised guess."""
        policy = FlowPolicy(
            worlds.load("compass", model="flow").policy.network, latent_shape=(2,), class_names=("inner", "outer"),
            noise_level=0.3, noise_schedule="constant", deterministic_last=True,
        )  # fmt: skip
        config = grpo.Config(num_iterations=1, num_prompts=2, group_size=4, same_noise=True, trained_share=0.6)
        (step,) = grpo.train(policy, gaussian.gold, ["inner", "outer"], config)
        assert step.metrics["reward"].isfinite()
        assert grpo.trained_steps(policy, config) == 9

    def test_it_trains_a_diffusion_policy_as_ddpo_does(self):
        """One minibatch, all steps, group baseline: the same gradient, so the same weights."""
        thetas = []
        for method, config in (
            (grpo, grpo.Config(num_iterations=3, num_prompts=1, group_size=12, train_last=True, num_minibatches=1)),
            (ddpo, ddpo.Config(num_iterations=3, num_prompts=1, group_size=12, baseline="group", num_minibatches=1)),
        ):
            world = worlds.load("line", num_steps=5)
            list(method.train(world.policy, first_coordinate, world.prompts, config))
            thetas.append(world.policy.network.residual.theta.detach())
        assert thetas[0].abs().min() > 0
        torch.testing.assert_close(*thetas)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (dict(group_size=1), "group_size is 1: a group of one is its own mean"),
            (dict(best_of=3), "best_of is 3; expected an even number, at most the group's 6 samples"),
            (dict(best_of=8), "best_of is 8; expected an even number"),
            (dict(num_minibatches=13), "num_minibatches is 13, more than the 12 samples of a round"),
            (dict(best_of=2, num_minibatches=5), "num_minibatches is 5, more than the 4 samples"),
        ],
    )
    def test_what_cannot_train_is_said_before_anything_is_spent(self, settings, message):
        world = line(num_steps=5)
        with pytest.raises(ValueError, match=message):
            self.run(world, **settings)
        assert world.policy.network_evaluations == 0

    def test_the_releases_kl_needs_a_flow(self):
        world = worlds.load("line", num_steps=5)
        with pytest.raises(ValueError, match="kl='release' is of a flow's dt, and DiffusionPolicy has none"):
            self.run(world, kl="release")
        with pytest.raises(ValueError, match="of 1 step none is trained: set train_last=True"):
            self.run(worlds.load("line", num_steps=1))


def test_clipping_is_of_each_reward():
    """Why losses are added, not rewards: a ratio outside the range is clipped for the reward that would go on."""
    log_prob = torch.full((1,), 0.5)
    losses = [clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([a]), 0.2)[0] for a in (1.0, -0.4, 0.6)]
    assert (losses[0] + losses[1]).item() == pytest.approx(-1.2 + 0.4 * math.exp(0.5))
    assert losses[2].item() == pytest.approx(-0.6 * 1.2)
