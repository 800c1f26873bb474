"""EDMDenoiser around a diffusers UNet: the same numbers as diffusers' own EDM scheduler makes of the same network."""

import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel

from minialign.policies.edm import EDMDenoiser


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("index", [0, 7, 16])
def test_diffusers_scheduler_gives_the_same_denoised_sample(unet, index):
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(18)
    t, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
    x = sigma * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = unet(scheduler.scale_model_input(x, t), t).sample
        theirs = scheduler.step(output, t, x).pred_original_sample
        ours = EDMDenoiser(unet, 0.5)(x, sigma)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_row_has_its_own_level_and_is_counted(unet):
    denoiser = EDMDenoiser(unet)
    x, sigmas = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    with torch.no_grad():
        together = denoiser(x, sigmas)
        apart = torch.cat([denoiser(x[i : i + 1], sigmas[i]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert denoiser.network_evaluations == 6 and denoiser.sample_shape == (1, 8, 8)
    denoiser(x, sigmas)  # with a gradient
    assert denoiser.network_evaluations == 6 + 3 * 3


def test_saved_and_loaded(unet, tmp_path):
    unet.save_pretrained(tmp_path / "unet")
    EDMEulerScheduler(sigma_data=0.7).save_pretrained(tmp_path / "scheduler")
    loaded = EDMDenoiser.from_pretrained(tmp_path)
    assert loaded.sigma_data == 0.7
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, 1.0), EDMDenoiser(unet, 0.7)(x, 1.0))
