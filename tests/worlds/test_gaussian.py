"""The three Gaussian worlds against their sheets, and the contracts of their networks."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from minialign.exact import GaussianMixture, LinearGaussianSampler, exponential_tilt
from minialign.worlds import gaussian
from minialign.worlds.exact_denoiser import ExactDenoiser, PerStepLinear, PerStepScalar, ResidualMLP
from minialign.worlds.gaussian import mode_entropy, nearest_mode


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(num_components=3, dim=5, seed=0):
    """Full, unequal covariances and unequal weights: no diagonal or equal-weight shortcut gets them right."""
    root = random(num_components, dim, dim, seed=seed) / 2
    covariances = root @ root.mT + 0.05 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(
        2 * random(num_components, dim, seed=seed + 1), covariances, f64(*range(1, num_components + 1))
    )


# ---------------------------------------------------------------------------------------------- the networks


def alphas():
    return gaussian.scheduler().alphas_cumprod.double()


def test_exact_denoiser_is_the_noise_prediction():
    mixture, table = correlated(2, 2), alphas()
    network = ExactDenoiser(mixture, table, ResidualMLP().double())
    x, t = random(5, 2, seed=1), torch.tensor([1, 51, 401, 801, 951])
    labels = torch.tensor([0, 1, 0, 1, 0])
    exact = mixture.noise_pred(x, table[t])
    torch.testing.assert_close(network(x, t, class_labels=labels), exact)
    torch.testing.assert_close(network(x, 401), mixture.noise_pred(x, table[401]))
    torch.testing.assert_close(network(x, torch.tensor(401)), network(x, torch.full((5,), 401)))
    with torch.no_grad():
        for parameter in network.residual.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert (network(x, t, class_labels=labels) - exact).abs().min() > 1e-3
    torch.testing.assert_close(network.reference_forward(x, t, class_labels=labels), exact)
    torch.testing.assert_close(ExactDenoiser(mixture, table)(x, t), exact)


def test_exact_denoiser_of_classes():
    """Class 0 owns component 0, class 1 the others; one label more means no condition."""
    mixture, table = correlated(3, 4), alphas()
    owns = torch.tensor([[True, False, False], [False, True, True]])
    network = ExactDenoiser(mixture, table, class_components=owns)
    x, t = random(3, 4, seed=1), torch.tensor([301, 301, 301])
    got = network(x, t, class_labels=torch.tensor([0, 1, 2]))
    others = GaussianMixture(mixture.means[1:], mixture.covariances[1:], mixture.log_weights[1:].exp())
    first = GaussianMixture(mixture.means[:1], mixture.covariances[:1])
    torch.testing.assert_close(got[:1], first.noise_pred(x[:1], table[301]))
    torch.testing.assert_close(got[1:2], others.noise_pred(x[1:2], table[301]))
    torch.testing.assert_close(got[2:], mixture.noise_pred(x[2:], table[301]))
    torch.testing.assert_close(network(x, t), mixture.noise_pred(x, table[301]))
    torch.testing.assert_close(network.class_log_weights.exp().sum(-1), f64(1, 1, 1))


def test_residual_mlp_is_the_sheets():
    network = ResidualMLP()
    assert [tuple(p.shape) for p in network.parameters()] == [(96, 20), (96,), (96, 96), (96,), (2, 96), (2,)]
    x, t, labels = random(4, 2).float(), torch.tensor([1, 51, 501, 951]), torch.tensor([0, 1, 0, 1])
    assert network(x, t, labels).abs().max() == 0
    torch.nn.init.normal_(network.net[-1].weight)
    seen = []
    network.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(x, t, labels)
    w = [10 ** (3 * i / 7) for i in range(8)]
    for row, (time, label) in enumerate(zip(t.tolist(), labels.tolist(), strict=True)):
        phase = [v * time / 1000 for v in w]
        expected = [
            *x[row].tolist(),
            *map(math.sin, phase),
            *map(math.cos, phase),
            float(label == 0),
            float(label == 1),
        ]
        assert seen[0][row].tolist() == pytest.approx(expected, abs=1e-4)
    network(x, t, torch.full((4,), 2))
    network(x, t)
    assert seen[1][:, -2:].abs().max() == 0  # no condition: both zeros
    torch.testing.assert_close(seen[1], seen[2])
    for other in (torch.tensor([1, 0, 0, 1]), None):
        assert (network(x, t, other)[:2] - network(x, t, labels)[:2]).abs().max() > 1e-4
    assert network.bfloat16()(x.bfloat16(), t, labels).dtype == torch.bfloat16
    assert ResidualMLP(dim=1, num_classes=0)(random(4, 1).float(), t).shape == (4, 1)


def test_per_step_linear():
    """M[step, class] [x_1; x_2; 1], and no gradient for the steps and classes that were not asked."""
    timesteps = torch.arange(951, 0, -50)
    network = PerStepLinear(timesteps).double()
    assert network.weight.shape == (20, 2, 2, 3)
    x, t, labels = random(3, 2), torch.tensor([951, 51, 1]), torch.tensor([1, 0, 1])
    assert network(x, t, labels).abs().max() == 0
    torch.nn.init.normal_(network.weight, generator=torch.Generator().manual_seed(0))
    out = network(x, t, labels)
    for row, (step, label) in enumerate(((0, 1), (18, 0), (19, 1))):
        m = network.weight[step, label].tolist()
        expected = [m[i][0] * x[row, 0].item() + m[i][1] * x[row, 1].item() + m[i][2] for i in range(2)]
        assert out[row].tolist() == pytest.approx(expected)
    out.sum().backward()
    touched = network.weight.grad.abs().amax((2, 3)) > 0
    assert touched.nonzero().tolist() == [[0, 1], [18, 0], [19, 1]]
    torch.testing.assert_close(network(x, torch.tensor([999, 60, 0]), labels), out)  # off the grid: the nearest step


def test_per_step_scalar():
    network = PerStepScalar(torch.tensor([801, 601, 401, 201, 1])).double()
    with torch.no_grad():
        network.theta += f64(1, 2, 3, 4, 5)
    out = network(random(3, 2), torch.tensor([801, 1, 401]))
    assert out.tolist() == [[1, 1], [5, 5], [3, 3]]


# ---------------------------------------------------------------------------------------------- compass, ring, line


def test_compass_geometry():
    centres = gaussian.compass_submodes()
    # The mode (1.1, 1.1) has norm 1.1 sqrt 2; inner and outer lie .3 along the unit diagonal: 1.1 -+ .3 / sqrt 2.
    inner, outer = 1.1 - 0.3 / math.sqrt(2), 1.1 + 0.3 / math.sqrt(2)
    assert centres[0].flatten().tolist() == pytest.approx([inner, inner, outer, outer], abs=1e-6)
    assert centres[2].flatten().tolist() == pytest.approx([-inner, inner, -outer, outer], abs=1e-6)
    mixture = gaussian.compass()
    assert (mixture.num_components, mixture.dim) == (8, 2)
    torch.testing.assert_close(mixture.values, torch.full((8, 2), 0.08**2))
    torch.testing.assert_close(mixture.moments()[0], torch.zeros(2), atol=1e-6, rtol=0)


def test_compass_rewards_point_by_point():
    centres = gaussian.compass_submodes()
    samples = torch.stack([centres[0, 0], centres[1, 1], centres[2, 0] + 0.1, centres[3, 1] + 0.18, torch.zeros(2)])
    inner, outer = ["inner"] * 5, ["outer"] * 5
    assert gaussian.gold(samples, inner).tolist() == [1, 0, 1, 0, 0]  # .1 on both axes is .141 away, .18 is .255
    assert gaussian.gold(samples, outer).tolist() == [0, 1, 0, 0, 0]
    assert gaussian.side(samples, inner).tolist()[:4] == [0, 0, 1, 1]
    assert gaussian.side(samples, outer).tolist()[:4] == [1, 1, 0, 0]
    assert gaussian.side_and_quality(samples, inner).tolist() == [0, 0, 1, 0, 0]
    assert gaussian.side_and_quality(samples, outer).tolist() == [1, 1, 0, 0, 0]
    assert gaussian.style(samples, inner)[:4].tolist() == pytest.approx([1, 0.3, -0.3, -1])
    assert gaussian.styled_gold(samples, inner)[:4].tolist() == pytest.approx([1.4, 0.12, 0.88, -0.4])
    mixed = ["inner", "outer", "outer", "inner", "outer"]
    assert gaussian.gold(samples, mixed).tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="unknown prompt 'middle'; compass has: inner, outer"):
        gaussian.gold(samples, ["middle"] * 5)


@pytest.fixture(scope="module")
def compass():
    return gaussian.load("compass")


def test_compass_base_model(compass):
    """The base ignores the prompt, keeps the four modes, and scores .43 to .45 (sheet ddpo)."""
    prompts = compass.prompts * 10_000
    samples = compass.policy.sample(prompts, generator=torch.Generator().manual_seed(0))
    gold = compass.oracle(samples, prompts)
    assert 0.43 < gold.mean() < 0.45
    assert mode_entropy(samples, compass.modes).item() == pytest.approx(math.log(4), abs=1e-3)
    inner = gaussian.gold(samples, ["inner"] * len(samples))
    rows = torch.arange(len(samples)) % 2 == 0
    assert (inner[rows].mean() - inner[~rows].mean()).abs() < 4 * math.sqrt(2 * 0.25 / 10_000)


def test_compass_policy_starts_as_its_reference(compass):
    policy = compass.policy
    traj = policy.rollout(compass.prompts * 3, generator=torch.Generator().manual_seed(0), reduction="sum")
    for step in (0, 11, 19):
        given = {"next": traj.states[:, step + 1], "reduction": "sum"}
        now = policy.step(traj.states[:, step], step, traj.condition, **given)
        base = policy.step(traj.states[:, step], step, traj.condition, reference=True, **given)
        torch.testing.assert_close(now.mean, base.mean, atol=0, rtol=0)
        torch.testing.assert_close(now.log_prob, traj.log_probs[:, step])
    assert policy.timesteps.tolist() == list(range(951, 0, -50))
    assert (policy.std > 0).all()


def test_compass_data_is_right(compass):
    samples, prompts = compass.real(2000, torch.Generator().manual_seed(0))
    # Within .2 of its centre, sd .08: 1 - exp(-.2^2 / (2 .08^2)) = .9561.
    assert compass.oracle(samples, prompts).mean().item() == pytest.approx(
        0.9561, abs=4 * math.sqrt(0.9561 * 0.0439 / 2000)
    )


def test_seed_and_residuals_of_load():
    first, again, other = (gaussian.load("compass", seed=seed).policy.network.residual for seed in (3, 3, 4))
    assert torch.equal(first.net[0].weight, again.net[0].weight)
    assert not torch.equal(first.net[0].weight, other.net[0].weight)
    state = torch.random.get_rng_state()
    linear = gaussian.load("compass", residual="per_step_linear", num_steps=10, eta=0.5)
    assert torch.equal(state, torch.random.get_rng_state())  # loading leaves the global generator alone
    assert linear.policy.network.residual.weight.shape == (10, 2, 2, 3)
    assert (linear.policy.num_steps, linear.policy.eta) == (10, 0.5)
    with pytest.raises(ValueError, match="did you mean 'per_step_linear'"):
        gaussian.load("compass", residual="per_step_linaer")
    with pytest.raises(ValueError, match="did you mean 'compass'"):
        gaussian.load("compas")
    with pytest.raises(ValueError, match=r"world 'compass' has no setting 'std'. There are: model, num_steps"):
        gaussian.load("compass", std=0.1)


def test_ring():
    world = gaussian.load("ring")
    mixture, modes = world.mixture, world.modes
    assert modes[0].tolist() == pytest.approx([2, 0])
    assert modes[2].tolist() == pytest.approx([0, 2], abs=1e-6)
    torch.testing.assert_close(modes.norm(dim=-1), torch.full((8,), 2.0))
    samples, prompts = world.real(20_000, torch.Generator().manual_seed(0))
    # Sheet diffusion_dpo: mean log p -2.12 for sd .25, about -(log 8 + log(2 pi e .25^2)) = -2.145.
    assert mixture.log_prob(samples).mean().item() == pytest.approx(-2.13, abs=0.03)
    counts = torch.bincount(nearest_mode(samples, modes), minlength=8) / len(samples)
    assert (counts - 1 / 8).abs().max() < 4 * math.sqrt(0.11 / len(samples))
    points = torch.cat([modes, torch.tensor([[2.0, 0.8], [2.0, 0.7]])])  # the oracle reaches to 3 sd = .75
    values = [*(1 - i / 8 for i in range(8)), 1.0, 1.0]
    assert world.rewards["mode_value"](points, prompts[:10]).tolist() == pytest.approx(values)
    assert world.oracle(points, prompts[:10]).tolist() == [1, *[0] * 8, 1]
    assert world.rewards["first_coordinate"](points, prompts[:10]).tolist() == pytest.approx(points[:, 0].tolist())


def test_rings_optimum_over_modes_is_a_table():
    """Re-weighting whole modes by exp(value / beta) is the enumerated tilt of the eight equal modes."""
    world = gaussian.load("ring")
    values, beta = world.mode_values.double(), 0.5
    samples, prompts = world.real(40_000, torch.Generator().manual_seed(0))
    weights = (world.rewards["mode_value"](samples, prompts).double() / beta).softmax(0)
    mode = nearest_mode(samples, world.modes)
    shares = torch.zeros(8, dtype=torch.float64).index_add(0, mode, weights)
    target = exponential_tilt(torch.full((8,), -math.log(8), dtype=torch.float64), values, beta)[0].exp()
    assert (shares - target).abs().max() < 0.01


def test_line_is_the_linear_gaussian_sampler():
    world = gaussian.load("line", mean=0.3, std=0.5, num_steps=5)
    sampler = world.sampler
    assert isinstance(sampler, LinearGaussianSampler)
    samples = world.policy.sample(world.prompts * 20_000, generator=torch.Generator().manual_seed(0))
    mean, variance = 0.297046, 0.084424
    assert abs(samples.mean().item() - mean) < 4 * math.sqrt(variance / 20_000)
    assert abs(samples.var().item() - variance) < 4 * variance * math.sqrt(2 / 20_000)
    assert sampler.sample_mean.item() == pytest.approx(mean, abs=1e-6)  # the scheduler's table is float32
    assert world.policy.network.residual.theta.shape == (5,)
    assert world.oracle(torch.tensor([[0.79], [0.81]]), world.prompts * 2).tolist() == [0, 1]


def test_variance_within_a_branch_is_decided_in_the_window():
    """Sheet b2diffurl, check 1: share the first 14 steps, branch the last 6: within-group variance Vs(6)."""
    world = gaussian.load("line", std=0.5)
    policy, groups, branches, window = world.policy, 2000, 5, 6
    g = torch.Generator().manual_seed(0)
    trunk = policy.rollout(world.prompts * groups, generator=g, reduction="sum", last=20 - window)
    starts = trunk.final.repeat_interleave(branches, 0)
    tips = policy.rollout(world.prompts * len(starts), generator=g, reduction="sum", states=starts, first=20 - window)
    assert tips.timesteps.tolist() == [251, 201, 151, 101, 51, 1]
    within = tips.final.reshape(groups, branches).var(1)
    expected = world.sampler.window_variance(window).item()
    assert expected == pytest.approx(0.5242 * 0.169096, abs=2e-5)
    assert abs(within.mean().item() - expected) < 4 * expected * math.sqrt(2 / (branches - 1) / groups)


def test_mode_measures():
    modes = gaussian.compass_modes()
    samples = torch.cat([modes[:1].expand(3, 2), modes[1:2]]) + 0.2
    assert nearest_mode(samples, modes).tolist() == [0, 0, 0, 1]
    # Shares 3/4 and 1/4: .75 log(4/3) + .25 log 4 = .562335.
    assert mode_entropy(samples, modes).item() == pytest.approx(0.562335, abs=1e-6)
    assert mode_entropy(modes, modes).item() == pytest.approx(math.log(4))
    assert mode_entropy(modes[:1], modes).item() == 0


@pytest.mark.parametrize("name", ["compass", "ring", "line"])
def test_pictures(name):
    world = gaussian.load(name)
    samples, prompts = world.real(300, torch.Generator().manual_seed(0))
    fig = world.show(samples, prompts)
    assert isinstance(fig, Figure)
    assert len(fig.axes) == len(world.prompts)
    assert all(ax.get_xlabel() and ax.get_title("left") for ax in fig.axes)
    if name != "line":
        samples[0] = 1e6  # one sample gone astray must not shrink the picture to a dot
        assert world.show(samples, prompts).axes[0].get_xlim()[1] < 7
    if name == "compass":
        assert {ax.get_title("left").split(":")[0] for ax in fig.axes} == {"inner", "outer"}
        drawn = sum(
            len(c.get_offsets())
            for ax in fig.axes
            for c in ax.collections
            if hasattr(c, "get_sizes") and len(c.get_sizes())
        )
        assert drawn == 300
