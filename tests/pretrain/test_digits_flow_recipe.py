"""`minialign pretrain digits_flow`: its losses, its determinism; what it writes loads as the pipeline's own class."""

import hashlib
import types

import pytest
import torch

from minialign.kernels import add_flow_noise
from minialign.policies.flow import FlowPolicy
from minialign.pretrain import digits_flow as recipe
from minialign.worlds import digits

TINY = recipe.Recipe(num_steps=2, autoencoder_steps=2, batch_size=4, num_warmup=1, num_layers=1, num_heads=2)
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("pretrain"), []
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "evaluate", lambda pipe: {"a figure": 0.5})
        for name, seed in (("first", 0), ("second", 0), ("other", 1)):
            recipe.main(folder / name, seed, TINY, lines.append)
    return types.SimpleNamespace(folder=folder, lines=lines, state_kept=torch.equal(state, torch.get_rng_state()))


def test_pretraining_is_deterministic_and_leaves_the_global_state_alone(pretrained):
    read = lambda name: (pretrained.folder / name / FILE).read_bytes()  # noqa: E731
    assert read("first") == read("second") and read("first") != read("other")
    assert pretrained.state_kept and "a figure: 0.5000" in pretrained.lines


def test_what_it_writes_loads_and_nothing_partial_stays(pretrained):
    pipe = digits.load_flow_pipeline(pretrained.folder / "first")
    assert type(pipe).__name__ == "StableDiffusion3Pipeline" and pipe.transformer.dtype == torch.float32
    assert {path.name for path in pretrained.folder.iterdir()} == {"first", "second", "other"}
    card = (pretrained.folder / "first" / "README.md").read_text()
    assert hashlib.sha256((pretrained.folder / "first" / FILE).read_bytes()).hexdigest() in card


def test_every_prompt_has_a_condition_of_its_own(pretrained):
    pipe = digits.load_flow_pipeline(pretrained.folder / "first")
    policy = FlowPolicy.from_pipeline(pipe, max_sequence_length=digits.T5_TOKENS)
    hidden = policy.encode([*digits.NAMES, ""]).inputs["encoder_hidden_states"].flatten(1)
    assert torch.cdist(hidden, hidden).add(torch.eye(11) * 9).min() > 0.5


def test_the_flow_loss_is_zero_for_a_network_that_knows_the_velocity():
    latents, noise, t = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.rand(8)
    seen = []

    def network(hidden_states, timestep, name):
        seen.append((hidden_states, timestep, name))
        return types.SimpleNamespace(sample=noise - latents)

    assert recipe.flow_matching_loss(network, latents, {"name": t}, t, noise) == 0
    states, timestep, name = seen[0]
    assert torch.equal(states, add_flow_noise(latents, noise, t)) and torch.equal(timestep, 1000 * t) and name is t


def test_the_autoencoders_loss_is_zero_for_the_identity():
    x, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    same = types.SimpleNamespace(
        encode=lambda x: types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=x)),
        decode=lambda x: types.SimpleNamespace(sample=x),
    )
    assert recipe.autoencoder_loss(same, x, noise).abs() < 1e-12


def test_the_shipped_model_reads_its_prompts_and_draws_what_its_pipeline_draws():
    world = digits.load("flow", num_steps=5)
    prompts = list(digits.NAMES) * 10
    noise = world.policy.draw_noise(100, torch.Generator().manual_seed(0))
    drawn = world.policy.sample(prompts, noise, num_steps=20)
    assert world.oracle(drawn, prompts).mean() > 0.85
    images = world.policy.pipeline(
        prompts[:3], latents=noise[:3, 0], num_inference_steps=5, guidance_scale=1.0, output_type="pt",
        max_sequence_length=digits.T5_TOKENS,
    ).images  # fmt: skip
    torch.testing.assert_close(world.policy.sample(prompts[:3], noise[:3]), images, atol=1e-5, rtol=1e-5)


def test_a_damaged_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"digits_flow.*model_index\.json is missing"):
        digits.load_flow_pipeline(tmp_path)
