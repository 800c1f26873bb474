"""PSO on a LatentConsistencyModelPipeline, small and random: rolls out, compares, steps, saves, and diffusers' own
loader redraws the same images."""

import conftest
import pytest
import torch
from test_consistency_policy import lcm_pipeline

from minialign.methods import pso
from minialign.policies.consistency import ConsistencyPolicy

PROMPTS = ["abc", "de"]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_pipeline_trains_and_loads_what_was_learned(mode, tmp_path):
    policy = ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path), num_steps=3)
    policy.add_lora(rank=2)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    before = policy.sample(PROMPTS, noise)
    config = pso.Config(mode=mode, num_iterations=2, batch_size=4, data_size=6, learning_rate=1e-2)
    first, last = (step.row() for step in pso.train(policy, brightness, PROMPTS, config))
    assert first["grad_norm"] > 0 and first["accuracy"] == 0.5 and first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert last["comparisons"] == 8
    after = policy.sample(PROMPTS, noise)
    assert (after - before).abs().max() > 1e-4
    conftest.redraws(policy, lcm_pipeline(tmp_path), PROMPTS, noise, tmp_path / "lora", num_steps=3)


def test_a_base_in_half_precision_keeps_what_trains_in_float32(tmp_path):
    policy = ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path).to(torch.bfloat16), num_steps=3)
    policy.add_lora(rank=2)
    for mode in ("online", "offline"):
        config = pso.Config(mode=mode, num_iterations=2, batch_size=4, data_size=6, learning_rate=1e-2)
        conftest.trains_in_float32(policy, lambda config=config: pso.train(policy, brightness, PROMPTS, config))
