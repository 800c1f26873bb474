"""Pipelines in half precision: they sample, the first ratio is 1, what trains is float32, moves and stays finite."""

import conftest
import pytest
import torch
from test_consistency_policy import lcm_pipeline

from minialign import worlds
from minialign.methods import ddpo, rlcm
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy

PROMPTS = ["abc", "de"]
DTYPES = [torch.float16, torch.bfloat16]


def half(kind, dtype, tmp_path):
    if kind == "diffusion":
        return DiffusionPolicy.from_pipeline(conftest.stable_diffusion(tmp_path).to(dtype), num_steps=3)
    return ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path).to(dtype), num_steps=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diffusion", "consistency"])
def test_pictures_are_those_of_full_precision_to_its_rounding(kind, dtype, tmp_path):
    """The consistency UNet has an embedding of the guidance, which comes in as float32."""
    policy = half(kind, dtype, tmp_path)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    images = policy.sample(PROMPTS, noise)
    assert images.dtype == torch.float32 and images.isfinite().all()
    policy.pipeline.to(torch.float32)  # the same rounded weights
    full = type(policy).from_pipeline(policy.pipeline, num_steps=3).sample(PROMPTS, noise)
    torch.testing.assert_close(images, full, atol=0.05 if dtype == torch.bfloat16 else 0.01, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["diffusion", "consistency"])
def test_policy_gradients_train_it(kind, dtype, tmp_path):
    """ratio 1 before the first update; then float32 weights that move, by finite steps, round after round."""
    policy = half(kind, dtype, tmp_path)
    policy.add_lora(rank=2)
    start = [p.detach().clone() for p in policy.parameters()]
    with torch.no_grad():
        traj = policy.rollout(PROMPTS, generator=torch.Generator().manual_seed(0))
    batch = traj.transitions(torch.arange(2), torch.arange(policy.num_actions).expand(2, -1))
    out = policy.step(batch.states, batch.step, batch.condition, next=batch.next)
    torch.testing.assert_close(
        (out.log_prob - batch.log_prob_old).exp(), torch.ones(len(out.log_prob)), atol=1e-5, rtol=0
    )
    method = ddpo if kind == "diffusion" else rlcm
    config = method.Config(num_iterations=3, num_prompts=2, group_size=4, num_minibatches=1)
    steps = list(method.train(policy, lambda images, prompts: images.mean((1, 2, 3)), PROMPTS, config))
    after = policy.parameters()
    assert len(steps) == 3 and {p.dtype for p in after} == {torch.float32}
    assert all(p.isfinite().all() for p in after)
    assert sum(not torch.equal(p, q) for p, q in zip(after, start, strict=True)) > len(start) / 2


def test_the_shapes_pipeline_trains_in_float16():
    """Its adapters, once in float16 themselves, were nan after one step of Adam: eps = 1e-8 is 0 there."""
    from diffusers import StableDiffusionPipeline

    folder = worlds.load("shapes").policy.pipeline.config._name_or_path
    policy = DiffusionPolicy.from_pipeline(
        StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16), num_steps=4, guidance_scale=1.0
    )
    policy.add_lora(rank=4)
    config = ddpo.Config(num_iterations=2, num_prompts=2, group_size=4, num_minibatches=1)
    steps = list(ddpo.train(policy, lambda images, prompts: images.mean((1, 2, 3)), ["a red circle"], config))
    assert 0 < steps[-1].metrics["reward"] < 1
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in policy.parameters())
