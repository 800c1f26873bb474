"""The initial noise as a policy: its density, what it leaves alone, pipelines, saving."""

import copy

import pytest
import torch
from conftest import stable_diffusion

from minialign import worlds
from minialign.kernels import diagonal_log_prob, gaussian_log_prob, standard_normal_kl
from minialign.methods import find_noise
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.initial_noise import NoisePolicy
from minialign.worlds import shapes

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_density_and_kl_are_torchs_own(reduction):
    x, mean, log_std = random(3, 2, 5, seed=1), random(3, 2, 5, seed=2), random(3, 2, 5, seed=3)
    law = torch.distributions.Normal(mean, log_std.exp())
    usual = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    reduce = getattr(torch, reduction)
    torch.testing.assert_close(diagonal_log_prob(x, mean, log_std, reduction), reduce(law.log_prob(x).flatten(1), 1))
    kl = torch.distributions.kl_divergence(law, usual).flatten(1)
    torch.testing.assert_close(standard_normal_kl(mean, log_std, reduction), reduce(kl, 1))


def test_density_limits_and_half_precision():
    x, mean, std = random(4, 7, seed=1), random(4, 7, seed=2), torch.tensor([0.5, 1, 2, 3], dtype=F64)
    equal = std.log().unsqueeze(1).expand_as(x)
    torch.testing.assert_close(
        diagonal_log_prob(x, mean, equal, "sum"), gaussian_log_prob(x, mean, std, reduction="sum")
    )
    assert (standard_normal_kl(torch.zeros(2, 3), torch.zeros(2, 3), "sum") == 0).all()
    half = diagonal_log_prob(*(t.bfloat16() for t in (x, mean, equal)), "sum")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), diagonal_log_prob(x, mean, equal, "sum"), atol=0.5, rtol=0.05)


def learned(eta=0.0, **settings):
    """compass, and laws that are nothing special."""
    world = worlds.load("compass", num_steps=5, eta=eta)
    policy = NoisePolicy(world.policy, world.prompts)
    with torch.no_grad():
        policy.mean.copy_(random(2, 2, seed=4))
        policy.log_std.copy_(0.5 * random(2, 2, seed=5))
    return world, policy


def test_each_prompt_is_drawn_from_its_own_law_and_others_as_before():
    world, policy = learned()
    prompts = ["outer", "inner", "outer"] * 2000
    noise = policy.draw_noise(len(prompts), torch.Generator().manual_seed(0))
    moved = policy.shifted(prompts, noise)
    assert torch.equal(moved[:, 1:], noise[:, 1:])
    for row, name in enumerate(world.prompts):
        own = moved[[i for i, prompt in enumerate(prompts) if prompt == name], 0]
        std, n = policy.log_std[row].exp(), len(own)
        assert ((own.mean(0) - policy.mean[row]).abs() < 4 * std / n**0.5).all()
        assert ((own.std(0) / std - 1).abs() < 4 / (2 * n) ** 0.5).all()
    one = NoisePolicy(world.policy, ["inner"])
    one.mean.data += 1
    prompts, noise = ["outer", "inner"], noise[:2]
    ours, base = one.sample(prompts, noise), world.policy.sample(prompts, noise)
    assert torch.equal(ours[0], base[0]) and not torch.equal(ours[1], base[1])
    assert one.noise_kl(one.rows(prompts), "sum").tolist() == [0, pytest.approx(1.0)]  # |mu|^2 / 2 of two coordinates
    torch.testing.assert_close(ours, world.policy.sample(prompts, one.shifted(prompts, noise)))


def test_at_first_it_is_the_sampler_and_freezes_it():
    world = worlds.load("compass", num_steps=5, eta=0.7)
    prompts, before = world.prompts * 4, copy.deepcopy(world.policy.network.state_dict())
    plain = world.policy.sample(prompts, generator=torch.Generator().manual_seed(0))
    policy = NoisePolicy(world.policy, world.prompts)
    assert torch.equal(policy.sample(prompts, generator=torch.Generator().manual_seed(0)), plain)
    assert not any(p.requires_grad for p in world.policy.network.parameters())
    spent = policy.network_evaluations
    for _ in find_noise.train(policy, world.oracle, world.prompts, find_noise.Config(num_iterations=3, group_size=4)):
        pass
    assert policy.network_evaluations - spent == 3 * 8 * 5  # 3 rounds of 2 x 4 samples of 5 steps; updates are free
    after = world.policy.network.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())  # bit by bit: bar 4


@pytest.mark.parametrize("kind", ["SD", "LCM", "bfloat16"])
def test_a_real_pipeline_learns_saves_loads_and_redraws(kind, tmp_path):
    """It rolls out, scores, takes a step, saves; the pipeline's own call redraws the same pictures."""
    prompts = ["a b", "c"]
    if kind == "LCM":
        pipe = shapes.load_pipeline(model="consistency")
        policy = NoisePolicy(ConsistencyPolicy.from_pipeline(pipe, num_steps=1), prompts)
    else:
        pipe = stable_diffusion(tmp_path)
        if kind == "bfloat16":
            pipe.to(torch.bfloat16)
        policy = NoisePolicy(DiffusionPolicy.from_pipeline(pipe, num_steps=3, eta=0.0, guidance_scale=1.0), prompts)
    config = find_noise.Config(num_iterations=2, group_size=4, learning_rate=0.1)

    def brightness(samples, prompts):
        return samples.float().mean((1, 2, 3))

    *_, step = find_noise.train(policy, brightness, prompts, config)
    assert step.reward_queries == 16 and policy.mean.dtype == torch.float32 and policy.mean.abs().mean() > 0.05
    policy.save_adapter(tmp_path / "saved")
    fresh = NoisePolicy(policy.sampler, ["c", "a b"])  # in another order
    fresh.load_adapter(tmp_path / "saved")
    torch.testing.assert_close(fresh.mean, policy.mean.flip(0), atol=0, rtol=0)
    torch.testing.assert_close(fresh.log_std, policy.log_std.flip(0))
    if kind == "SD":
        from safetensors.torch import load_file

        laws = load_file(tmp_path / "saved" / "initial_noise.safetensors")  # no class of ours is needed to use it
        noise = policy.draw_noise(2, torch.Generator().manual_seed(3))
        latents = laws["mean"] + laws["std"] * noise[:, 0]
        torch.testing.assert_close(latents, policy.latents(prompts, torch.Generator().manual_seed(3)))
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            prompts, latents=latents, num_inference_steps=3, guidance_scale=1.0, eta=0.0, output_type="pt"
        ).images
        torch.testing.assert_close(drawn, policy.sample(prompts, noise), atol=1e-4, rtol=0)
        plain = policy.sampler.sample(prompts, noise)
        assert (drawn - plain).abs().max() > 1e-2


def test_loading_refuses_what_would_be_another_sample(tmp_path):
    _, policy = learned()
    policy.save_adapter(tmp_path)
    for change, message in (
        (lambda w: w.policy.set_num_steps(7), "learned with the sampler .*'num_steps': 5.0"),
        (lambda w: setattr(w.policy, "eta", 1.0), "learned with the sampler"),
    ):
        other = worlds.load("compass", num_steps=5, eta=0.0)
        change(other)
        fresh = NoisePolicy(other.policy, other.prompts)
        with pytest.raises(ValueError, match=message):
            fresh.load_adapter(tmp_path)
        assert (fresh.mean == 0).all()
    line = NoisePolicy(worlds.load("ring", num_steps=5, eta=0.0).policy, ["a point"])
    with pytest.raises(ValueError, match="no law for the prompt 'a point'; it has: inner, outer"):
        line.load_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing was saved there"):
        policy.load_adapter(tmp_path / "elsewhere")


def test_what_is_no_sampler_is_refused():
    world, policy = learned()
    for wrong in (policy, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="expected one that denoises"):
            NoisePolicy(wrong, ["inner"])
    with pytest.raises(ValueError, match="prompts is the string 'inner'"):
        NoisePolicy(world.policy, "inner")
    with pytest.raises(ValueError, match="prompts is empty"):
        NoisePolicy(world.policy, [])
    with pytest.raises(AttributeError, match="no 'rollout'; its `sampler` may have"):
        policy.rollout  # noqa: B018
