"""Proxy points where a known evaluation peaks; a simplex search step by step."""

import pytest
import torch

from minialign.search import fit_proxy_points, nelder_mead


def test_fit_proxy_points_finds_the_peak_that_runs_went_past():
    generator = torch.Generator().manual_seed(0)
    path = torch.rand(400, 2, generator=generator, dtype=torch.float64)
    worth = -(((path[:, 0] - 0.3) / 0.2) ** 2) - ((path[:, 1] - 0.6) / 0.3) ** 2
    noisy = worth + 0.05 * torch.randn(400, generator=generator, dtype=torch.float64)
    for degree in (4, 10):
        assert fit_proxy_points(path, noisy, degree=degree).tolist() == pytest.approx([0.3, 0.6], abs=0.06)
    one = path[:, :1] * 100
    assert fit_proxy_points(one, -((one[:, 0] - 70) ** 2)).tolist() == pytest.approx([70], abs=1.5)
    # one outlier high up is smoothed away, though it is the largest evaluation
    spiked = noisy.index_fill(0, path[:, 0].argmin(), 3.0)
    assert fit_proxy_points(path, spiked, degree=4).tolist() == pytest.approx([0.3, 0.6], abs=0.1)


def test_the_fit_weighs_by_density():
    """A crowded parabola with its peak at .2, and a few far points of another law: the crowd decides where it is."""
    crowd = torch.linspace(0, 0.4, 200, dtype=torch.float64)
    far = torch.linspace(0.9, 1.0, 5, dtype=torch.float64)
    points = torch.cat([crowd, far]).unsqueeze(1)
    worth = torch.cat([-((crowd - 0.2) ** 2), -1.5 * torch.ones(5, dtype=torch.float64)])
    assert fit_proxy_points(points, worth, degree=2).tolist() == pytest.approx([0.2], abs=0.04)  # .26 unweighted


def test_nelder_mead_climbs_a_quadratic_from_its_simplex():
    simplex = torch.tensor([[0.0, 0.0], [0.4, 0.0], [0.0, 0.5]])
    best, value, seen = nelder_mead(lambda t: -((t[0] - 0.5) ** 2) - 2 * (t[1] - 0.2) ** 2, simplex, 60)
    assert best == pytest.approx([0.5, 0.2], abs=0.02) and value > -1e-3
    assert [theta for theta, _ in seen[:3]] == [pytest.approx(row) for row in simplex.tolist()]
    # the worst, (0, .5) at -.43, is reflected through the middle of the others, (.2, 0)
    assert seen[3][0] == pytest.approx([0.4, -0.5], abs=1e-6) and len(seen) <= 60


def test_nelder_mead_expands_contracts_and_shrinks_as_the_paper_does():
    simplex = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    def tried(evaluate, count):
        return [theta for theta, _ in nelder_mead(evaluate, simplex, count)[2][3:]]

    # uphill along (1, -.5): the worst, (0, 1), goes to (1, -1), which is the best, so twice as far
    assert tried(lambda t: t[0] - 0.5 * t[1], 5) == [pytest.approx([1, -1]), pytest.approx([1.5, -2])]
    # a ridge at t_1 = .3: (1, -1) is worse than the worst, so half of the way back to it
    assert tried(lambda t: -((t[1] - 0.3) ** 2) + 1e-3 * t[0], 5) == [
        pytest.approx([1, -1]),
        pytest.approx([0.25, 0.5]),
    ]
    # the best corner is a spike: all other points are bad, so the two worse ones move half of the way to it
    spike = lambda t: 1.0 if t == [1.0, 0.0] else -abs(t[0] - 1) - abs(t[1]) - 5 * (t not in simplex.tolist())  # noqa: E731
    assert tried(spike, 7)[2:] == [pytest.approx([0.5, 0.0]), pytest.approx([0.5, 0.5])]
