"""The crowd: its network is the exact one, its sampler's law the closed form, its rewards what they say."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from minialign import worlds
from minialign.exact import GaussianMixture

F64 = torch.float64


def float64_world(**settings):
    world = worlds.load("crowd", **settings)
    world.policy.network.double()
    world.policy.to("cpu")
    return world


def test_the_network_knows_each_prompts_score():
    world = float64_world(num_prompts=5, num_held_out=2)
    network, table = world.policy.network, world.policy.scheduler.alphas_cumprod.double()
    prompts = [world.prompts[3], world.held_out[1], world.prompts[0]]
    x, t = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.tensor([901, 401, 1])
    centres = world.centres[world.index(prompts)].double()
    for row in range(3):
        alone = GaussianMixture.isotropic(centres[row : row + 1], 0.5)
        expected = alone.noise_pred(x[row : row + 1], table[t[row]])
        got = network(x[row : row + 1], t[row], centre=centres[row : row + 1])
        torch.testing.assert_close(got, expected)
    for p in network.residual.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    exact = network.reference_forward(x, t, centres)
    assert (network(x, t, centre=centres) - exact).abs().min() > 1e-3
    shifted = network(x, t, centre=centres.flip(0)) - network.reference_forward(x, t, centres.flip(0))
    assert (shifted - (network(x, t, centre=centres) - exact)).abs()[[0, 2]].min() > 1e-3  # it is told the centre


def test_every_prompt_has_the_samplers_law():
    """Moments of g . (x - m_c) at 10 steps: the sampler's, not the data's."""
    world = float64_world(num_prompts=3)
    prompts, scale = world.prompts * 12_000, math.sqrt(1.25)
    samples = world.policy.sample(prompts, generator=torch.Generator().manual_seed(0))
    along = world.rewards["even"](samples, prompts) / scale
    variance = float(world.sampler.sample_variance)
    assert variance == pytest.approx(0.1306, abs=1e-4)  # sd .361 where the data have .5
    # x_T has mean 0, not that of the noised data: the centre is missed by up to a tenth of it
    assert abs(float(along.mean())) < 0.1
    for prompt in world.prompts:
        own = along[[i for i, name in enumerate(prompts) if name == prompt]]
        assert abs(float(own.var()) - variance) < 4 * variance * math.sqrt(2 / len(own))
    assert world.reachable_gain(0.5) == pytest.approx(1.25 * float(world.sampler.noise_variance) / 0.5)
    assert world.reachable_gain(0.5) == pytest.approx(0.324234, abs=1e-6)


def test_rewards_and_oracle_point_by_point():
    world = worlds.load("crowd", num_prompts=4, num_held_out=1)
    prompts = [*world.prompts, world.held_out[0]]
    centres = world.centres[world.index(prompts)]
    offset = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    even, uneven = (world.rewards[name](centres + offset, prompts) for name in ("even", "uneven"))
    torch.testing.assert_close(even, torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0]))
    torch.testing.assert_close(uneven - even, world.levels[world.index(prompts)])
    assert world.oracle(centres + offset, prompts).tolist() == [1, 1, 0, 0, 0]  # too far; not better
    assert sorted(world.levels[:4].tolist()) == pytest.approx([-10, -10 / 3, 10 / 3, 10]) and world.levels[4] == 0
    assert worlds.load("crowd", spread=0.0).levels.abs().max() == 0


def test_seeds_names_and_refusals():
    one, same, other = (worlds.load("crowd", seed=s) for s in (0, 0, 1))
    assert torch.equal(one.centres, same.centres) and not torch.equal(one.centres, other.centres)
    assert len(one.prompts) == 256 and len(one.held_out) == 64 and not set(one.prompts) & set(one.held_out)
    for settings, words in (
        (dict(num_prompts=0), "num_prompts is 0"),
        (dict(spread=-1.0), "spread is -1.0"),
        (dict(num_held_out=-1), "num_held_out is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            worlds.load("crowd", **settings)
    with pytest.raises(ValueError, match=r"unknown prompt 'no\. 999'; crowd has: 'no\. 0' to 'no\. 319'"):
        one.policy.sample(["no. 999"])


def test_a_picture_of_it():
    world = worlds.load("crowd")
    fig = world.show(*world.real(200, torch.Generator().manual_seed(0)))
    assert isinstance(fig, Figure) and "from its centre: " in fig.axes[1].get_title("left")
    assert all(ax.get_xlabel() for ax in fig.axes[:2])
