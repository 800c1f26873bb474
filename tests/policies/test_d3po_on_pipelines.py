"""D3PO on StableDiffusionPipeline and StableDiffusionXLPipeline objects, small and random: rolls out, is compared,
steps, saves, and diffusers' own loader redraws the same images."""

import conftest
import pytest
import torch

from minialign.methods import d3po
from minialign.policies.diffusion import DiffusionPolicy

PROMPTS = ["abc", "de"]
CONFIG = d3po.Config(num_iterations=2, num_prompts=4, num_minibatches=2, learning_rate=0.01, weight_decay=0.0)


def brighter(first, second, prompts, generator=None):
    """Somebody who looks at two images."""
    assert first.shape == second.shape and first.min() >= 0 and first.max() <= 1 and len(prompts) == len(first)
    return (first.flatten(1).mean(1) > second.flatten(1).mean(1)).float()


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl"])
def test_an_adapter_is_trained_by_comparisons_saved_and_loaded_by_diffusers(kind, tmp_path):
    build = getattr(conftest, kind)
    policy = DiffusionPolicy.from_pipeline(build(tmp_path), num_steps=3, guidance_scale=3.0)
    policy.add_lora(rank=2)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(1))
    before = policy.sample(PROMPTS, noise)
    steps = list(d3po.train(policy, None, PROMPTS, CONFIG, torch.Generator().manual_seed(0), labeller=brighter))
    first, last = (step.row() for step in steps)
    assert abs(first["log_ratio"]) < 1e-4 and first["grad_norm"] > 0  # it starts as the reference, same guidance
    assert abs(last["log_ratio"]) > 1e-7 and last["comparisons"] == 8
    # guided: 2 a state; 3 steps of 8 images, rolled out, under the reference, differentiated
    assert first["network_evaluations"] == 2 * 24 * (1 + 1 + 3)
    after = policy.sample(PROMPTS, noise)
    assert (after - before).abs().max() > 1e-3
    conftest.redraws(policy, build(tmp_path), PROMPTS, noise, tmp_path / "lora", num_steps=3, guidance_scale=3.0)


def test_a_base_in_half_precision_keeps_what_trains_in_float32(tmp_path):
    policy = DiffusionPolicy.from_pipeline(
        conftest.stable_diffusion(tmp_path).to(torch.bfloat16), num_steps=3, guidance_scale=1.0
    )
    policy.add_lora(rank=2)
    generator = torch.Generator().manual_seed(0)
    conftest.trains_in_float32(policy, lambda: d3po.train(policy, None, PROMPTS, CONFIG, generator, labeller=brighter))
