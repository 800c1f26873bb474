"""`patches`, the two EDM networks, and their recipe."""

import pytest
import torch

from minialign.exact import Gaussian
from minialign.measure import frechet_distance
from minialign.methods import teleport
from minialign.pretrain import edm
from minialign.worlds import digits, patches


def test_patches_are_natural():
    data = patches.data()
    assert data.shape == (8000, 1, 12, 12) and 0 <= data.min() < 0.05 and 0.95 < data.max() <= 1
    assert len(patches.data("train")) + len(patches.data("held_out")) == len(data)
    values = Gaussian.fit(patches.encode(data)).values
    assert 0.5 < values[0] / values.sum() < 0.95  # brightness first
    steps = (data[..., 1:] - data[..., :-1]).abs().mean(), (data - data.flip(0)).abs().mean()
    assert steps[0] < 0.3 * steps[1]  # neighbours agree far better than pixels of other patches
    torch.testing.assert_close(patches.decode(patches.encode(data[:5])), data[:5])
    with pytest.raises(ValueError, match="all, train, held_out"):
        patches.data("test")


@pytest.mark.parametrize("name", ["digits_edm", "patches"])
def test_the_shipped_network_denoises_held_out_data_better_than_its_gaussian(name):
    held_out = edm.data_of(name, "held_out")[:300]
    g = Gaussian.fit(edm.data_of(name, "train"))
    denoiser = patches.denoiser(name)
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for sigma in (0.2, 0.5, 1.0):
            x = held_out + sigma * noise
            ours, theirs = ((d - held_out).square().mean() for d in (denoiser(x, sigma), g.denoised(x, sigma)))
            assert ours < 0.9 * theirs  # stored: .55 to .81
        x = held_out + 20 * noise
        torch.testing.assert_close(denoiser(x, 20.0), g.denoised(x, 20.0), rtol=0, atol=0.5)


def test_the_shipped_network_draws_digits():
    denoiser = patches.denoiser("digits_edm")
    noise = torch.randn(500, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    from minialign.kernels import karras_sigmas

    with torch.no_grad():
        samples = digits.decode(teleport.sample(denoiser, noise, karras_sigmas(10)))
    real = digits.data()[0].flatten(1)
    assert frechet_distance(samples.flatten(1), real) < 0.5  # 500 real ones: about .2; noise: 20
    read = digits.classifier().predict(samples.flatten(1).numpy())
    assert min((read == digit).mean() for digit in range(10)) > 0.03  # all ten of them


def test_damaged_weights_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="minialign pretrain patches"):
        patches.denoiser(folder=tmp_path)
