"""Gaussians and mixtures seen through noise, against closed forms, slow references, autograd, quadrature, samples."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from minialign import kernels
from minialign.exact import Gaussian, GaussianMixture
from minialign.kernels import Level

F64 = torch.float64
D, R, B = 7, 3, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(rank=D, dim=D, seed=0):
    vectors = torch.linalg.qr(random(dim, dim, seed=seed)).Q[:, :rank]
    return Gaussian(random(dim, seed=seed + 1), vectors, 0.1 + 4 * random(rank, seed=seed + 2).abs())


def one_dimension(mean, value):
    return Gaussian(torch.tensor([mean], dtype=F64), torch.ones(1, 1, dtype=F64), torch.tensor([value], dtype=F64))


def f64(*values):
    return torch.tensor(values, dtype=F64)


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


# The sheet's closed-form checks ---------------------------------------------------------------------------------------


def test_check_1_one_dimension():
    # by hand: 1 + 79 sqrt((sigma^2 + 4) / (6400 + 4))
    flow = one_dimension(1.0, 4.0).flow
    x = torch.tensor([[80.0]], dtype=F64)
    assert [float(flow(x, 80.0, sigma)) for sigma in (10.0, 2.0, 0.0)] == pytest.approx(
        [11.067418, 3.792199, 2.974383], abs=5e-7
    )


def test_check_2_variance_preserving():
    x = torch.tensor([[0.5]], dtype=F64)
    moved = one_dimension(1.0, 4.0).flow(x, Level.variance_preserving(1e-4), Level.of(0.6, 0.8))
    assert float(moved) == pytest.approx(1.306582, abs=5e-7)


@pytest.mark.parametrize("rank", [R, D])
def test_check_3_semigroup_identity_and_inverse(rank):
    g, x = gaussian(rank), 80 * random(B, D, seed=9)
    torch.testing.assert_close(g.flow(g.flow(x, 80.0, 10.0), 10.0, 2.0), g.flow(x, 80.0, 2.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g.flow(x, 80.0, 80.0), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g.flow(g.flow(x, 80.0, 2.0), 2.0, 80.0), x, rtol=1e-11, atol=1e-11)


def test_check_4_marginals_are_carried_onto_each_other():
    """The map is affine, x -> A x + b: A (Sigma + 80^2) A' must be Sigma + 2^2, and b + A mean = mean."""
    g = gaussian(R)
    b = g.flow(torch.zeros(1, D, dtype=F64), 80.0, 2.0)[0]
    matrix = (g.flow(torch.eye(D, dtype=F64), 80.0, 2.0) - b).T
    covariance = g.vectors * g.values @ g.vectors.T
    eye = torch.eye(D, dtype=F64)
    torch.testing.assert_close(matrix @ (covariance + 6400 * eye) @ matrix.T, covariance + 4 * eye)
    torch.testing.assert_close(b + matrix @ g.mean, g.mean)


def test_check_4_the_endpoint_lies_in_the_span():
    g = gaussian(R)
    end = g.flow(80 * random(B, D, seed=9), 80.0, 0.0) - g.mean
    torch.testing.assert_close(end @ g.vectors @ g.vectors.T, end, rtol=1e-12, atol=1e-12)


def test_check_5_limits_of_the_variance():
    x = 80 * random(B, D, seed=9)
    point = Gaussian(gaussian().mean, gaussian().vectors, torch.zeros(D, dtype=F64))
    torch.testing.assert_close(point.flow(x, 80.0, 5.0), point.mean + 5 / 80 * (x - point.mean))
    wide = Gaussian(gaussian().mean, gaussian().vectors, torch.full((D,), 1e16, dtype=F64))
    torch.testing.assert_close(wide.flow(x, 80.0, 5.0), x, rtol=1e-11, atol=1e-9)
    g, y = gaussian(), random(B, D, seed=11)
    torch.testing.assert_close(g.flow(g.mean + 3 * y, 80.0, 5.0) - g.mean, 3 * (g.flow(g.mean + y, 80.0, 5.0) - g.mean))


def low_rank_pair():
    """Two components of rank R in D dimensions, as kernels take them: log_weights, means, vectors, values."""
    parts = [gaussian(R, seed=20), gaussian(R, seed=30)]
    stacked = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "vectors", "values"))
    return parts, (f64(0.3, 0.7).log(), *stacked)


@pytest.mark.parametrize("level", [Level.edm(1.3), Level.of(0.6, 0.8)])
@pytest.mark.parametrize("rank", [R, D])
def test_check_7_a_mixture_of_one_is_the_gaussian_and_autograd_gives_its_score(rank, level):
    g, x = gaussian(rank), 2 * random(B, D, seed=9)
    one = (torch.zeros(1, dtype=F64), g.mean[None], g.vectors[None], g.values[None])
    torch.testing.assert_close(kernels.mixture_score(x, level, *one), g.score(x, level), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernels.mixture_denoised(x, level, *one), g.denoised(x, level), rtol=1e-10, atol=1e-10)
    _, two = low_rank_pair()
    x = x.requires_grad_()
    (score,) = torch.autograd.grad(kernels.mixture_log_prob(x, level, *two).sum(), x)
    torch.testing.assert_close(kernels.mixture_score(x, level, *two), score, rtol=1e-10, atol=1e-10)
    # Tweedie: signal E[x_0] = x_t + noise_std^2 score.
    denoised = (x + level.noise_power * score) / level.signal_power**0.5
    torch.testing.assert_close(kernels.mixture_denoised(x, level, *two), denoised, rtol=1e-10, atol=1e-10)


# Check 8, the grid, is in tests/kernels/test_edm.py.

# Slow references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [R, D])
def test_score_and_denoiser_with_an_explicit_inverse(rank):
    g, x, sigma = gaussian(rank), random(B, D, seed=9), 0.7
    covariance = g.vectors * g.values @ g.vectors.T
    inverse = torch.linalg.inv(covariance + sigma**2 * torch.eye(D, dtype=F64))
    score = (g.mean - x) @ inverse
    torch.testing.assert_close(g.score(x, sigma), score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(g.denoised(x, sigma), x + sigma**2 * score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", [Level.edm(0.7), Level.of(0.6, 0.8)])
def test_low_rank_density_with_explicit_covariances(level):
    (parts, two), x, eye = low_rank_pair(), random(B, D, seed=9), torch.eye(D, dtype=F64)
    normals = [
        torch.distributions.MultivariateNormal(
            level.signal_power**0.5 * h.mean,
            level.signal_power * h.vectors * h.values @ h.vectors.T + level.noise_power * eye,
        )
        for h in parts
    ]
    joint = torch.stack([n.log_prob(x) for n in normals], 1) + two[0]
    torch.testing.assert_close(kernels.mixture_log_prob(x, level, *two), joint.logsumexp(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernels.mixture_responsibilities(x, level, *two), joint.softmax(1))


def test_levels_of_each_row():
    """(batch,) levels answer as each row alone would, in a Gaussian and in a mixture, low rank and full."""
    x, alpha_bar = random(B, D, seed=9), torch.linspace(0.95, 0.05, B, dtype=F64)
    _, two = low_rank_pair()
    g, level = gaussian(R), Level.variance_preserving(alpha_bar)
    calls = {
        "score": lambda x, level: g.score(x, level),
        "denoised": lambda x, level: g.denoised(x, level),
        "flow": lambda x, level: g.flow(x, level, Level.of(0.6, 0.8)),
        "mixture": lambda x, level: kernels.mixture_score(x, level, *two),
        "density": lambda x, level: kernels.mixture_log_prob(x, level, *two),
        "points": lambda x, level: kernels.delta_score(x, level, g.vectors.T),
    }
    for name, call in calls.items():
        alone = [call(x[[i]], Level.variance_preserving(float(alpha_bar[i]))) for i in range(B)]
        torch.testing.assert_close(call(x, level), torch.cat(alone), msg=name)


def test_variance_preserving_and_edm_are_one_process():
    """x_t = signal x_0 + noise_std noise is signal times EDM's x at sigma = noise_std / signal."""
    mixture, x = correlated(), random(4, 5, seed=3)
    edm, vp = Level.edm(0.8 / 0.6), Level.variance_preserving(0.36)
    torch.testing.assert_close(mixture.denoised(0.6 * x, vp), mixture.denoised(x, edm))
    torch.testing.assert_close(0.6 * mixture.score(0.6 * x, vp), mixture.score(x, edm))
    torch.testing.assert_close(mixture.log_prob(0.6 * x, vp) + 5 * math.log(0.6), mixture.log_prob(x, edm))
    torch.testing.assert_close(mixture.score(x, 0.36), mixture.score(x, vp))  # a number is alpha_bar
    torch.testing.assert_close(mixture.noise_pred(x, edm), -0.8 / 0.6 * mixture.score(x, edm))


@pytest.mark.parametrize("rank", [4, 64])
def test_no_digits_are_lost_at_low_noise_in_float32(rank):
    """At sigma = .002 |x|^2 - 2 x mean + |mean|^2 loses whole nats, and (denoised - x) / sigma^2 whole scores: each is
    a difference of numbers near 6400 over 4e-6. The float64 answers are those to the inputs that float32 was given."""
    dim = 64
    vectors = torch.linalg.qr(random(3, dim, dim, seed=1)).Q[..., :rank]
    means, values = 10 * random(3, dim, seed=2), torch.logspace(-8, 0, rank, dtype=F64).expand(3, -1)
    single = [t.float() for t in (f64(0.2, 0.3, 0.5).log(), means, vectors, values)]
    level, which = Level.edm(0.002), torch.arange(30) % 3
    inside = (single[2][which].double() @ (values[which].sqrt() * random(30, rank, seed=4)).unsqueeze(-1)).squeeze(-1)
    x = (single[1][which] + inside + 0.002 * random(30, dim, seed=5)).float()
    exact = [t.double() for t in single]
    log_prob = kernels.mixture_log_prob(x.double(), level, *exact)
    # What rounding of the coordinates must cost, y dy / v in each of 64 directions: |y| ~ 2, so dy ~ 2e-7, and where
    # v = 4e-6, y ~ .002: 64 * .002 * 2e-7 / 4e-6 = .006 nats.
    torch.testing.assert_close(kernels.mixture_log_prob(x, level, *single).double(), log_prob, rtol=1e-6, atol=1e-2)
    score = kernels.mixture_score(x.double(), level, *exact)
    error = (kernels.mixture_score(x, level, *single).double() - score).norm(dim=1) / score.norm(dim=1)
    assert error.max() < 1e-3
    one = [single[1][0], single[2][0], single[3][0] + 0.1]  # wide: its score is small
    score = kernels.gaussian_score(x[:1].double(), level, *(t.double() for t in one))
    assert (kernels.gaussian_score(x[:1], level, *one) - score).norm() / score.norm() < 1e-3
    points = single[1].repeat(20, 1) + 0.0003 * random(60, dim, seed=6).float()  # cdist multiplies above 25 rows
    near = points[:30] + 0.002 * random(30, dim, seed=7).float()
    score = kernels.delta_score(near.double(), level, points.double())
    assert (kernels.delta_score(near, level, points) - score).norm() / score.norm() < 1e-3


def test_the_flow_solves_the_ode():
    """dx/dsigma = -sigma score along the closed form, by central differences; also in VP notation, where
    x / alpha follows the same path at sigma / alpha."""
    g, x, h = gaussian(R), 80 * random(B, D, seed=9), 1e-5
    at = g.flow(x, 80.0, 2.0)
    slope = (g.flow(x, 80.0, 2.0 + h) - g.flow(x, 80.0, 2.0 - h)) / (2 * h)
    torch.testing.assert_close(slope, -2.0 * g.score(at, 2.0), rtol=1e-6, atol=1e-7)
    y = random(B, D, seed=10)
    vp = g.flow(y, Level.of(0.1, 0.995), Level.of(0.6, 0.8))
    torch.testing.assert_close(vp, 0.6 * g.flow(y / 0.1, 0.995 / 0.1, 0.8 / 0.6), rtol=1e-12, atol=1e-12)


def test_deltas_are_a_mixture_without_width():
    data, x = random(11, D, seed=3), random(B, D, seed=9)
    zeros = torch.zeros(11, D, 1, dtype=F64), torch.zeros(11, 1, dtype=F64)
    level, points = Level.of(0.5, 0.6), (torch.full((11,), 1 / 11, dtype=F64).log(), data, *zeros)
    torch.testing.assert_close(kernels.delta_score(x, level, data), kernels.mixture_score(x, level, *points))


def test_far_away_the_training_set_looks_like_its_gaussian():
    """The two scores agree in sigma^-1 and sigma^-3 where |x - mean| ~ sigma; what is left falls like sigma^-4."""
    data = random(200, D, seed=3).exp()  # skewed on purpose
    centred = data - data.mean(0)
    g = Gaussian.from_moments(data.mean(0), centred.T @ centred / len(data))
    z, gaps = random(B, D, seed=9), []
    for sigma in (100.0, 200.0):
        x = data.mean(0) + sigma * z
        gaps.append(float((kernels.delta_score(x, Level.edm(sigma), data) - g.score(x, sigma)).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(16, rel=0.1)


# Fitting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(300, 11), (13, 40)])
def test_fit_gives_mean_and_covariance(n, d):
    data = random(n, d, seed=1) * torch.linspace(1, 3, d, dtype=F64) + 2
    g = Gaussian.fit(data)
    torch.testing.assert_close(g.mean, data.mean(0))
    torch.testing.assert_close(g.vectors * g.values @ g.vectors.T, data.T.cov(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(g.vectors.T @ g.vectors, torch.eye(min(n - 1, d), dtype=F64), rtol=0, atol=1e-10)
    assert (g.values.diff() <= 0).all()


def test_fit_of_low_rank_is_the_leading_part_and_repeats_itself():
    data = random(400, 200, seed=1) * torch.logspace(1, -2, 200, dtype=F64)
    exact, low = Gaussian.fit(data), Gaussian.fit(data, rank=12)
    assert low.vectors.shape == (200, 12)
    torch.testing.assert_close(low.values, exact.values[:12], rtol=1e-2, atol=0)  # two power iterations
    before = torch.get_rng_state()
    again = Gaussian.fit(data, rank=12)
    assert torch.equal(again.vectors, low.vectors) and torch.equal(torch.get_rng_state(), before)


def test_images_keep_their_shape_and_half_precision_is_raised():
    images = random(50, 1, 4, 4).bfloat16()
    g = Gaussian.fit(images)
    assert g.mean.dtype == torch.float32
    x = random(3, 1, 4, 4).bfloat16()
    for out in (g.score(x, 1.0), g.denoised(x, 1.0), g.flow(x, 80.0, 1.0)):
        assert out.shape == x.shape and out.dtype == torch.float32
    assert g.trajectory(x, torch.tensor([80.0, 5.0, 0.0])).shape == (3, 3, 1, 4, 4)


def test_mixture_fit_finds_two_clusters():
    left, right = random(300, D, seed=1) - 8, 0.5 * random(100, D, seed=2) + 8
    mixture = GaussianMixture.fit(torch.cat([left, right]), 2, rank=D)
    order = mixture.means[:, 0].argsort()
    torch.testing.assert_close(mixture.log_weights.exp()[order], torch.tensor([0.75, 0.25], dtype=F64))
    torch.testing.assert_close(mixture.means[order], torch.stack([left.mean(0), right.mean(0)]))
    assert mixture.values[order[0]].mean() == pytest.approx(float(left.T.cov().trace()) / D + 1e-5, rel=1e-9)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Gaussian.fit(random(1, 3)), "at least 2 samples"),
        (lambda: Gaussian.fit(random(5, 9), rank=5), "rank 1 to 4"),
        (lambda: Gaussian.fit(random(5, 9) / 0), "nan or inf"),
        (lambda: gaussian().flow(random(2, 8), 80.0, 1.0), "8 elements a sample, these statistics 7"),
        (lambda: GaussianMixture.fit(random(5, 2), 5, rank=1), "fewer than 5 components"),
        (lambda: GaussianMixture.fit(random(5, 2), 2, rank=3), "1 to 2 modes"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# The mixture as a world sees it --------------------------------------------------------------------------------------


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


def test_flow_of_one_component():
    # Sheet teleport, VP check 2: mu = 1, lambda = 4, alpha_T = .01, x_T = .5, to (alpha, sigma) = (.6, .8): 1.306582.
    mixture = GaussianMixture(f64(1).reshape(1, 1), f64(4).reshape(1, 1, 1))
    assert mixture.flow(f64(0.5).reshape(1, 1), 1e-4, 0.36).item() == pytest.approx(1.306582, abs=5e-7)
    wide, x = correlated(1, 5), random(3, 5)
    two = wide.flow(wide.flow(x, 0.01, 0.4), 0.4, 0.9)
    torch.testing.assert_close(wide.flow(x, 0.01, 0.9), two)
    # dx / d alpha_bar of the flow, from d log sqrt(a) = -beta dt: (x + score) / (2 a).
    step = 1e-6
    slope = (wide.flow(x, 0.4, 0.4 + step) - wide.flow(x, 0.4, 0.4 - step)) / (2 * step)
    torch.testing.assert_close(slope, (x + wide.score(x, 0.4)) / 0.8, atol=1e-7, rtol=1e-7)
    with pytest.raises(ValueError, match=r"3 components.*moments"):
        correlated().flow(x, 0.1, 0.2)


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
