"""Noise of rows: laws, independence, and that a row does not know who else is drawn."""

import time

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import class_conditional, sd_scheduler

from minialign import worlds
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.noise import row_noise


def seed(number=0):
    return torch.Generator().manual_seed(number)


def draws():
    """(draw(n, generator, rows), shape of a row) of both kinds of policy."""
    diffusion = DiffusionPolicy(class_conditional(), sd_scheduler(), num_steps=3)
    language = worlds.load("tokens").policy
    return [
        (diffusion.draw_noise, (4, 1, 8, 8)),
        (lambda n, generator, rows=None: language.draw_noise(n, 6, generator, rows), (6,)),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_draws_its_own_rows_alone(which):
    """Equal to the rows of the whole round, for every number of processes; every generator then stands at one place."""
    draw, shape = draws()[which]
    generator = seed(3)
    whole, after = draw(7, generator), generator.get_state()
    assert whole.shape == (7, *shape)
    for processes in (1, 2, 3):
        for process in range(processes):
            generator, own = seed(3), torch.arange(process, 7, processes)
            assert torch.equal(draw(7, generator, own), whole[own])
            assert torch.equal(generator.get_state(), after)
    assert torch.equal(draw(7, seed(3), [5, 0, 5]), whole[[5, 0, 5]])
    generator = seed(3)
    assert draw(7, generator, []).shape == (0, *shape)  # a process without rows
    assert torch.equal(generator.get_state(), after)
    again = draw(7, generator)
    assert (again != whole).float().mean() > 0.99  # the generator moved on
    assert torch.equal(draw(3, seed(3)), whole[:3])  # nor do rows know how many there are
    for wrong in (7, -1):
        with pytest.raises(ValueError, match=f"there is no row {wrong} among 7 samples"):
            draw(7, seed(3), [0, wrong])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", ["standard_normal", "random"])
def test_the_law_within_and_between_rows(law, dtype):
    """Kolmogorov-Smirnov along rows and along one column over rows; no correlation between neighbouring rows."""
    noise = row_noise(law, 2000, (50,), dtype, seed())
    assert noise.dtype == dtype
    cdf = scipy.stats.norm.cdf if law == "standard_normal" else scipy.stats.uniform.cdf
    for sample in (noise.flatten(), noise[:, 0], noise[0], noise[:, -1]):
        assert scipy.stats.kstest(sample.double().numpy(), cdf).pvalue > 1e-3
    centred = (noise - noise.mean()).double() / noise.double().std()
    pairs = (centred[1:] * centred[:-1]).mean(), (centred[:, 1:] * centred[:, :-1]).mean()
    assert all(abs(r) < 4 / noise.numel() ** 0.5 for r in pairs)
    assert noise.unique().numel() > 0.98 * noise.numel()
    if law == "random":
        assert noise.min() >= 0 and noise.max() < 1


def test_the_numbers_by_hand():
    """Philox with key (draw of the generator, row), counter 0: numpy's own, a fresh generator for the row."""
    number = int(torch.randint(2**63 - 1, (), generator=seed(8)))
    for row in (0, 5):
        stream = np.random.Generator(np.random.Philox(key=np.array([number, row], dtype=np.uint64)))
        expected = torch.from_numpy(stream.standard_normal((3, 2)))
        got = row_noise("standard_normal", 6, (3, 2), torch.float64, seed(8), [row])
        assert torch.equal(got[0], expected)
        longer = row_noise("standard_normal", 6, (4, 2), torch.float64, seed(8), [row])
        assert torch.equal(longer[0, :3], expected)  # a longer grid starts from the same noise


def test_rows_are_cheap():
    """A few ms for 100 rows of a small world, on a busy machine too (alone: 0.6 ms)."""
    times = []
    for _ in range(5):
        start = time.process_time()
        row_noise("standard_normal", 2048, (21, 2), torch.float32, seed())
        times.append(time.process_time() - start)
    assert min(times) / 20.48 < 0.005
