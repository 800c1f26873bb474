"""`patches`, the two EDM networks, and their recipe."""

import dataclasses
import json

import pytest
import torch

from minialign.exact import Gaussian
from minialign.measure import frechet_distance
from minialign.methods import teleport
from minialign.worlds import digits, patches, pretrain_edm
from minialign.worlds.base import WEIGHTS

TINY = pretrain_edm.Recipe(num_steps=6, batch_size=8, block_out_channels=(8, 16), checkpoints=(2,))


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
    held_out = pretrain_edm.data_of(name, "held_out")[:300]
    g = Gaussian.fit(pretrain_edm.data_of(name, "train"))
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


@pytest.mark.parametrize("name", ["digits_edm", "patches"])
def test_the_stored_history_shows_that_the_linear_part_is_learned_first(name):
    history = json.loads((WEIGHTS / name / "history.json").read_text())
    at_one = [next(row for row in rows if row["sigma"] == 1.0) for rows in history.values()]
    explained = [row["explained by gaussian"] for row in at_one]
    assert [int(step) for step in history] == [0, *pretrain_edm.Recipe().checkpoints, pretrain_edm.Recipe().num_steps]
    assert explained[0] < 0.1 and max(explained) > 0.8
    assert at_one[-1]["error"] < at_one[-1]["error, gaussian"]


def test_the_recipe_repeats_itself_and_writes_all_or_nothing(tmp_path):
    state = torch.get_rng_state()
    for folder in ("a", "b"):
        pretrain_edm.main(tmp_path / folder, recipe=TINY, report=lambda text: None, name="digits_edm")
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / f / "unet/diffusion_pytorch_model.safetensors").read_bytes() for f in ("a", "b")]
    assert weights[0] == weights[1] and not list(tmp_path.glob("*.partial"))
    history = json.loads((tmp_path / "a/history.json").read_text())
    assert list(history) == ["0", "2", "6"] and len(history["6"]) == len(pretrain_edm.LEVELS)
    assert patches.denoiser(folder=tmp_path / "a").sample_shape == (1, 8, 8)
    card = (tmp_path / "a/README.md").read_text()
    assert "sha256" in card and str(dataclasses.asdict(TINY)["num_steps"]) in card


def test_damaged_weights_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="minialign pretrain patches"):
        patches.denoiser(folder=tmp_path)
