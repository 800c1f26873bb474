"""Exact scores against autograd and quadrature, the three worlds against their sheets, the networks' contracts."""

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch.autograd import gradcheck

from minialign.exact import LinearGaussianSampler, exponential_tilt
from minialign.worlds import gaussian
from minialign.worlds.gaussian import (
    ExactDenoiser,
    GaussianMixture,
    PerStepLinear,
    PerStepScalar,
    ResidualMLP,
    mode_entropy,
    nearest_mode,
)


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


def textbook_log_prob(mixture, x, alpha_bar):
    """log p(x_t), (batch,), from torch.distributions' Cholesky: another route than the eigendecomposition."""
    signal = alpha_bar.sqrt().reshape(-1, 1, 1)
    eye = torch.eye(mixture.dim, dtype=x.dtype)
    covariances = alpha_bar.reshape(-1, 1, 1, 1) * mixture.covariances + (1 - alpha_bar).reshape(-1, 1, 1, 1) * eye
    parts = torch.distributions.MultivariateNormal(signal * mixture.means, covariances)
    return (parts.log_prob(x.unsqueeze(1)) + mixture.log_weights).logsumexp(-1)


# ---------------------------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("batch", [1, 7])
def test_density_and_score_at_every_noise_level(batch):
    mixture = correlated()
    x = 2 * random(batch, 5, seed=3)
    alpha_bar = torch.linspace(0.999, 0.004, batch, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(x, alpha_bar), textbook_log_prob(mixture, x, alpha_bar))
    live = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(textbook_log_prob(mixture, live, alpha_bar).sum(), live)
    torch.testing.assert_close(mixture.score(x, alpha_bar), score, atol=1e-10, rtol=1e-10)
    noise = -(1 - alpha_bar).sqrt().unsqueeze(-1) * score
    torch.testing.assert_close(mixture.noise_pred(x, alpha_bar), noise, atol=1e-10, rtol=1e-10)
    # Tweedie: x_t = sqrt(a) E[x_0] + sqrt(1 - a) E[noise].
    denoised = (x - (1 - alpha_bar).sqrt().unsqueeze(-1) * noise) / alpha_bar.sqrt().unsqueeze(-1)
    torch.testing.assert_close(mixture.denoised(x, alpha_bar), denoised, atol=1e-9, rtol=1e-9)


def test_posterior_mean_by_quadrature():
    """E[x_0 | x_t] = integral of x_0 p(x_0) N(x_t; sqrt(a) x_0, 1 - a) over its normaliser, in one dimension."""
    mixture = GaussianMixture(f64(-1, 0.5, 2).reshape(3, 1), f64(0.04, 0.25, 0.01).reshape(3, 1, 1), f64(0.5, 0.2, 0.3))
    x0 = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    prior = sum(
        w * torch.distributions.Normal(f64(m), f64(s)).log_prob(x0).exp()  # floats would be kept in float32
        for w, m, s in zip((0.5, 0.2, 0.3), (-1.0, 0.5, 2.0), (0.2, 0.5, 0.1), strict=True)
    )
    for alpha_bar in (0.02, 0.5, 0.98):
        for x_t in (-1.5, 0.1, 1.7):
            likelihood = torch.distributions.Normal(math.sqrt(alpha_bar) * x0, math.sqrt(1 - alpha_bar)).log_prob(
                f64(x_t)
            )
            weight = prior * likelihood.exp()
            got = mixture.denoised(f64(x_t).reshape(1, 1), alpha_bar).item()
            assert got == pytest.approx(((weight * x0).sum() / weight.sum()).item(), abs=1e-9)


def test_limits_of_the_noise_level():
    mixture, x = correlated(), random(4, 5, seed=5)
    mean, covariance = mixture.moments()
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(mixture.denoised(x, zero), mean.expand(4, 5))  # pure noise: the data's mean
    torch.testing.assert_close(mixture.noise_pred(x, zero), x)
    torch.testing.assert_close(mixture.denoised(x, one), x)  # no noise
    assert mixture.noise_pred(x, one).abs().max() == 0
    torch.testing.assert_close(mixture.score(x, 0.3), mixture.score(x, 0.3 * one))  # a number is every row's
    samples, component = mixture.sample(40_000, torch.Generator().manual_seed(0))
    share = torch.bincount(component, minlength=3) / len(component)
    assert (share - f64(1, 2, 3) / 6).abs().max() < 4 * math.sqrt(0.25 / len(component))
    assert ((samples.mean(0) - mean).abs() < 4 * (covariance.diagonal() / len(samples)).sqrt()).all()
    spread = (samples - mean).T @ (samples - mean) / len(samples)
    assert (spread - covariance).abs().max() < 0.05 * covariance.diagonal().max()
    by_hand = GaussianMixture(f64(-1, 3).reshape(2, 1), f64(1, 2).reshape(2, 1, 1), f64(3, 1))
    # weights 3/4, 1/4: mean 0; variance .75 (1 + 1) + .25 (2 + 9) = 4.25.
    assert [m.item() for m in by_hand.moments()] == pytest.approx([0, 4.25])


def test_sampled_covariance_has_the_eigenvectors_the_right_way():
    covariance = torch.tensor([[[1.0, 0.8], [0.8, 1.0]]], dtype=torch.float64)
    samples, _ = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), covariance).sample(
        20_000, torch.Generator().manual_seed(0)
    )
    assert torch.corrcoef(samples.T)[0, 1].item() == pytest.approx(0.8, abs=4 * (1 - 0.64) / math.sqrt(20_000))


def test_conditioning_on_components():
    """Rows with their own weights answer as the mixture of their own components alone would."""
    mixture, x = correlated(), random(2, 5, seed=5)
    log_weights = torch.stack([f64(0, 1, 0), f64(0.5, 0, 0.5)]).log()
    first = GaussianMixture(mixture.means[1:2], mixture.covariances[1:2])
    second = GaussianMixture(mixture.means[[0, 2]], mixture.covariances[[0, 2]])
    for name in ("score", "denoised", "log_prob", "noise_pred"):
        got = getattr(mixture, name)(x, f64(0.4, 0.4), log_weights)
        torch.testing.assert_close(got[0], getattr(first, name)(x[:1], 0.4)[0])
        torch.testing.assert_close(got[1], getattr(second, name)(x[1:], 0.4)[0])
    assert mixture.sample(2, torch.Generator().manual_seed(0), log_weights)[1].tolist()[0] == 1
    torch.testing.assert_close(mixture.responsibilities(x, 0.4).sum(-1), f64(1, 1))
    assert mixture.responsibilities(x, 0.4, log_weights)[0].tolist() == [0, 1, 0]


def test_image_shapes_and_gradients():
    mixture = correlated(2, 12)
    images = random(3, 1, 3, 4, seed=2)
    for name in ("score", "denoised", "noise_pred"):
        out = getattr(mixture, name)(images, f64(0.1, 0.5, 0.9))
        assert out.shape == images.shape
        torch.testing.assert_close(out.flatten(1), getattr(mixture, name)(images.flatten(1), f64(0.1, 0.5, 0.9)))
    assert gradcheck(lambda x: mixture.noise_pred(x, f64(0.1, 0.5, 0.9)), (images.requires_grad_(),))
    with pytest.raises(ValueError, match="x has 5 elements a sample; this mixture lives in 12 dimensions"):
        mixture.score(random(3, 5), 0.5)


def test_probability_flow():
    # Sheet teleport, VP check 2: mu = 1, lambda = 4, alpha_T = .01, x_T = .5, to (alpha, sigma) = (.6, .8): 1.306582.
    mixture = GaussianMixture(f64(1).reshape(1, 1), f64(4).reshape(1, 1, 1))
    assert mixture.probability_flow(f64(0.5).reshape(1, 1), 1e-4, 0.36).item() == pytest.approx(1.306582, abs=5e-7)
    wide, x = correlated(1, 5), random(3, 5)
    two = wide.probability_flow(wide.probability_flow(x, 0.01, 0.4), 0.4, 0.9)
    torch.testing.assert_close(wide.probability_flow(x, 0.01, 0.9), two)
    # dx / d alpha_bar of the flow, from d log sqrt(a) = -beta dt: (x + score) / (2 a).
    step = 1e-6
    slope = (wide.probability_flow(x, 0.4, 0.4 + step) - wide.probability_flow(x, 0.4, 0.4 - step)) / (2 * step)
    torch.testing.assert_close(slope, (x + wide.score(x, 0.4)) / 0.8, atol=1e-7, rtol=1e-7)
    with pytest.raises(ValueError, match=r"3 components.*moments"):
        correlated().probability_flow(x, 0.1, 0.2)


def test_tilted_mixture_is_the_definition():
    # Sheet videoalign: four modes at radius 2, sd .35, r = .8 x_1, beta 1: mean reward 1.141.
    modes = f64(2, 0, 0, 2, -2, 0, 0, -2).reshape(4, 2)
    tilted, log_z = GaussianMixture.isotropic(modes, 0.35).tilt(1.0, linear=f64(0.8, 0))
    assert 0.8 * tilted.moments()[0][0].item() == pytest.approx(1.141, abs=5e-4)
    x, base = random(6, 5, seed=9), correlated()
    linear, quadratic = random(5, seed=1), -torch.eye(5, dtype=torch.float64)
    tilted, log_z = base.tilt(0.7, linear, quadratic)
    reward = x @ linear - (x**2).sum(-1) / 2
    torch.testing.assert_close(tilted.log_prob(x), base.log_prob(x) + reward / 0.7 - log_z, atol=1e-9, rtol=1e-9)


def test_bad_mixtures_are_refused():
    means = torch.zeros(2, 2)
    for bad in (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="symmetric positive"):
            GaussianMixture(means, bad.expand(2, 2, 2))
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="mixture weights"):
            GaussianMixture.isotropic(means, 1.0, torch.tensor(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precisions(dtype):
    mixture, x = correlated(), random(4, 5, seed=3)
    out = mixture.noise_pred(x.to(dtype), torch.full((4,), 0.5, dtype=dtype))
    assert out.dtype == dtype
    tol = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), mixture.noise_pred(x, 0.5), atol=tol, rtol=tol)
    assert mixture.to(dtype).noise_pred(x.to(dtype), 0.5).isfinite().all()


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
    torch.testing.assert_close(mixture.eigenvalues, torch.full((8, 2), 0.08**2))
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
    assert mode_entropy(samples, compass.extras["modes"]).item() == pytest.approx(math.log(4), abs=1e-3)
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
    with pytest.raises(ValueError, match=r"world 'compass' has no setting 'std'. There are: num_steps"):
        gaussian.load("compass", std=0.1)


def test_ring():
    world = gaussian.load("ring")
    mixture, modes = world.extras["mixture"], world.extras["modes"]
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
    values, beta = world.extras["mode_values"].double(), 0.5
    samples, prompts = world.real(40_000, torch.Generator().manual_seed(0))
    weights = (world.rewards["mode_value"](samples, prompts).double() / beta).softmax(0)
    mode = nearest_mode(samples, world.extras["modes"])
    shares = torch.zeros(8, dtype=torch.float64).index_add(0, mode, weights)
    target = exponential_tilt(torch.full((8,), -math.log(8), dtype=torch.float64), values, beta)[0].exp()
    assert (shares - target).abs().max() < 0.01


def test_line_is_the_linear_gaussian_sampler():
    world = gaussian.load("line", mean=0.3, std=0.5, num_steps=5)
    sampler = world.extras["sampler"]
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
    expected = world.extras["sampler"].window_variance(window).item()
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
