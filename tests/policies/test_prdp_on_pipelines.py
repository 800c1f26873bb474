"""PRDP on StableDiffusionPipeline and StableDiffusionXLPipeline objects, small and random: rolls out, scores, steps,
saves, and diffusers' own loader redraws the same images."""

import conftest
import pytest
import torch

from minialign.methods import prdp
from minialign.policies.diffusion import DiffusionPolicy

PROMPTS = ["abc", "de"]
CONFIG = prdp.Config(
    num_iterations=2, num_prompts=3, group_size=2, num_updates=2, beta=1.0, learning_rate=0.01, weight_decay=0.0
)


def brightness(images, prompts):
    return images.flatten(1).mean(1) + images[:, 0, 0, 0]


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_an_adapter_is_trained_saved_and_loaded_by_diffusers(kind, tmp_path):
    build = getattr(conftest, kind)
    policy = DiffusionPolicy.from_pipeline(build(tmp_path), num_steps=3, guidance_scale=3.0)
    policy.add_lora(rank=2)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(1))
    before = policy.sample(PROMPTS, noise)
    steps = list(prdp.train(policy, brightness, PROMPTS, CONFIG, torch.Generator().manual_seed(0)))
    first, last = (step.row() for step in steps)
    assert abs(first["kl"]) < 1e-3 and abs(first["slope"]) < 1e-2  # it starts as the reference
    assert first["grad_norm"] > 0 and last["explained"] != 0
    # guided: 2 a state; 3 steps of 6 paths, rolled out, under the reference, twice differentiated
    assert first["network_evaluations"] == 2 * 18 * (1 + 1 + 2 * 3)
    after = policy.sample(PROMPTS, noise)
    assert (after - before).abs().max() > 1e-3
    conftest.redraws(policy, build(tmp_path), PROMPTS, noise, tmp_path / "lora", num_steps=3, guidance_scale=3.0)


def test_a_base_in_half_precision_keeps_what_trains_in_float32(tmp_path):
    pipe = conftest.stable_diffusion(tmp_path).to(torch.bfloat16)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
    policy.add_lora(rank=2)
    generator = torch.Generator().manual_seed(0)
    conftest.trains_in_float32(policy, lambda: prdp.train(policy, brightness, PROMPTS, CONFIG, generator))
