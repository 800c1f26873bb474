"""`minialign pretrain digits`: its loss, its determinism, what it writes."""

import hashlib
import types

import pytest
import torch

from minialign.pretrain import digits as recipe
from minialign.worlds import digits

TINY = recipe.Recipe(num_steps=3, batch_size=4, block_out_channels=(8, 16))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("pretrain"), []
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "evaluate", lambda network: {"a figure": 0.5})
        for name in ("first", "second"):
            recipe.main(folder / name, 0, TINY, lines.append)
        recipe.main(folder / "other", 1, TINY, lines.append)
    return types.SimpleNamespace(folder=folder, lines=lines, state_kept=torch.equal(state, torch.get_rng_state()))


def test_pretraining_is_deterministic_and_leaves_the_global_state_alone(pretrained):
    read = lambda name: (pretrained.folder / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()  # noqa: E731
    assert read("first") == read("second")
    assert read("first") != read("other")
    assert pretrained.state_kept
    assert "a figure: 0.5000" in pretrained.lines


def test_what_pretraining_writes_loads_and_nothing_partial_stays(pretrained):
    unet, schedule = digits.load_unet(pretrained.folder / "first")
    assert unet.config.block_out_channels == [8, 16]
    assert schedule.config.steps_offset == 1
    assert {path.name for path in pretrained.folder.iterdir()} == {"first", "second", "other"}
    assert (
        hashlib.sha256(
            (pretrained.folder / "first" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        ).hexdigest()
        in (pretrained.folder / "first" / "README.md").read_text()
    )


def test_the_loss_is_zero_for_a_network_that_knows_the_noise():
    """x_t is built so that a network which inverts it with the true latents recovers the noise exactly."""
    latents = digits.encode(digits.data("train")[0][:16])
    alphas = recipe.scheduler().alphas_cumprod
    seen = []

    def network(states, timesteps, class_labels):
        alpha_bar = alphas[timesteps].view(-1, 1, 1, 1)
        seen.append(timesteps)
        return types.SimpleNamespace(sample=(states - alpha_bar.sqrt() * latents) / (1 - alpha_bar).sqrt())

    loss = recipe.denoising_loss(network, alphas, latents, torch.zeros(16).long(), torch.Generator().manual_seed(10))
    assert loss < 1e-6  # rounding, at most: 1e-7 / sqrt(1 - alpha_bar_0) squared
    assert (seen[0].sort().values * 16 // 1000).tolist() == list(range(16))  # one timestep in each sixteenth
    assert not torch.equal(seen[0], seen[0].sort().values)  # and not in the order of the batch
