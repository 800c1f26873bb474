"""InPO on the classes that the paper trained, and on a flow's, small and random: inverts, steps, saves, and diffusers'
own loader redraws the same images."""

from functools import partial

import conftest
import pytest
import torch

from minialign.methods import inpo
from minialign.pairs import Pairs
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.flow import FlowPolicy
from minialign.policies.inversion import invert

PROMPTS = ["abc", "de"]
CONFIG = inpo.Config(
    num_iterations=2, batch_size=4, pairs_per_pass=3, beta=50.0, learning_rate=0.01, warmup_updates=0,
    num_inversion_steps=2, prompt_dropout=0.3,
)  # fmt: skip


def wrapped(kind, tmp_path):
    pipe, settings = getattr(conftest, kind)(tmp_path), dict(num_steps=3, guidance_scale=3.0)
    return (FlowPolicy if kind == "stable_diffusion_3" else DiffusionPolicy).from_pipeline(pipe, **settings)


def latents(policy):
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(4, *policy.latent_shape, generator=generator) for _ in range(2))
    return Pairs(PROMPTS * 2, chosen, rejected)


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"])
def test_an_adapter_is_trained_saved_and_loaded_by_diffusers(kind, tmp_path):
    policy = wrapped(kind, tmp_path)
    policy.add_lora(rank=2)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(1))
    before = policy.sample(PROMPTS, noise)
    policy.network_evaluations = 0
    first, last = (s.row() for s in inpo.train(policy, latents(policy), CONFIG, torch.Generator().manual_seed(0)))
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4) and first["grad_norm"] > 0  # it starts as the reference
    assert first["network_evaluations"] == 4 * (2 * 2 + 2 + 6)  # unguided, whatever the sampler's guidance
    assert last["margin"] != 0
    after = policy.sample(PROMPTS, noise)
    assert (after - before).abs().max() > 1e-3
    pipe = getattr(conftest, kind)(tmp_path)
    conftest.redraws(policy, pipe, PROMPTS, noise, tmp_path / "lora", num_steps=3, guidance_scale=3.0)


def told_as(policy, kind, module, args, kwargs, output):
    """The same noise, said as another network would."""
    signal, noise = (value.view(-1, 1, 1, 1) for value in policy.signal_and_noise(args[1]))
    clean = (args[0] - noise * output.sample) / signal
    said = {"epsilon": output.sample, "v_prediction": signal * output.sample - noise * clean, "sample": clean}
    return type(output)(said[kind])


def test_what_a_network_predicts_does_not_matter_to_inversion(tmp_path):
    """One state at one level, told as noise, as v and as x_0: the same inversion."""
    ends = []
    for kind in ("epsilon", "v_prediction", "sample"):
        pipe = conftest.stable_diffusion(tmp_path, prediction_type=kind)
        policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
        policy.network.register_forward_hook(partial(told_as, policy, kind), with_kwargs=True)
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        ends.append(invert(policy, x, torch.tensor([300, 900]), policy.encode(PROMPTS), reference=False))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], atol=1e-4, rtol=1e-4)


def test_a_base_in_half_precision_keeps_what_trains_in_float32(tmp_path):
    pipe = conftest.stable_diffusion(tmp_path).to(torch.bfloat16)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=1.0)
    policy.add_lora(rank=2)
    start = [p.detach().clone() for p in policy.parameters()]
    config = inpo.Config(num_iterations=2, batch_size=4, learning_rate=0.01, warmup_updates=0, num_inversion_steps=2)
    rows = [step.row() for step in inpo.train(policy, latents(policy), config)]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in policy.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(policy.parameters(), start, strict=True))
    assert all(value == value for row in rows for value in row.values())
