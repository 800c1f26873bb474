"""Consistency policies: real diffusers classes, the pipeline's own pictures, and what a rollout is made of."""

import copy

import conftest
import pytest
import torch

from minialign import worlds
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy


def lcm_pipeline(tmp_path):
    """A random LatentConsistencyModelPipeline, with an embedding of the guidance scale that does something."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    sd = conftest.stable_diffusion(tmp_path)
    teacher = DiffusionPolicy.from_pipeline(sd, guidance_scale=1.0)
    unet = ConsistencyPolicy.from_diffusion(teacher, guidance_dim=16).network
    torch.manual_seed(0)
    unet.time_embedding.cond_proj.weight.data.normal_()
    return LatentConsistencyModelPipeline(
        sd.vae, sd.text_encoder, sd.tokenizer, unet, LCMScheduler.from_config(sd.scheduler.config, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 4])
def test_samples_are_the_pipelines_samples(tmp_path, num_steps):
    """Same noise, same guidance scale, same picture as LatentConsistencyModelPipeline draws."""
    pipe = lcm_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    policy = ConsistencyPolicy.from_pipeline(pipe, num_steps=num_steps, guidance_scale=5.0)
    noise = torch.randn(2, 1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    theirs = pipe(
        ["abc", "de"], num_inference_steps=num_steps, guidance_scale=5.0, latents=noise[:, 0].clone(),
        generator=generator, output_type="pt", height=8, width=8,
    ).images  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    later = [torch.randn(2, *policy.latent_shape, generator=generator) for _ in range(num_steps)]
    ours = policy.sample(["abc", "de"], torch.stack([noise[:, 0], *later], 1))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    other = ConsistencyPolicy.from_pipeline(pipe, num_steps=num_steps, guidance_scale=1.0)
    assert (other.sample(["abc", "de"], torch.stack([noise[:, 0], *later], 1)) - ours).abs().max() > 1e-4


def test_a_rollout_is_scored_as_it_was_drawn(tmp_path):
    policy = ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path), num_steps=4)
    policy.add_lora(rank=2)
    traj = policy.rollout(["abc", "de", "f"], generator=torch.Generator().manual_seed(0))
    assert traj.states.shape == (3, 4, *policy.latent_shape) and traj.log_probs.shape == (3, 3)
    assert traj.timesteps.tolist() == [999, 759, 499] and policy.timesteps.tolist() == [999, 759, 499, 259]
    assert policy.network_evaluations == 3 * 4 * 3  # grad mode: each call counts thrice; no second pass for guidance
    places = torch.arange(3).expand(3, 3)
    batch = traj.transitions(torch.arange(3), places)
    out = policy.step(batch.states, batch.step, batch.condition, next=batch.next)
    torch.testing.assert_close(out.log_prob, traj.log_probs.flatten(), atol=1e-6, rtol=0)
    # by hand: mean and std are those of the NEXT level
    a = policy.scheduler.alphas_cumprod[759]
    f = policy.denoise(traj.states[:, 0], torch.tensor([999] * 3), traj.condition)
    density = torch.distributions.Normal(a.sqrt() * f, (1 - a).sqrt()).log_prob(traj.states[:, 1]).flatten(1).mean(1)
    torch.testing.assert_close(traj.log_probs[:, 0], density, atol=1e-6, rtol=0)
    final = policy.denoise(traj.states[:, 3], torch.tensor([259] * 3), traj.condition)
    torch.testing.assert_close(traj.final, final, atol=1e-6, rtol=0)


def test_the_last_call_gets_no_gradient_unless_it_is_followed_by_noise():
    world = worlds.load("compass", residual="per_step_linear", num_steps=50)
    policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=4)
    policy.network.requires_grad_(True)
    (weight,) = policy.parameters()
    touched = {}
    for std in (0.0, 0.1):
        policy.terminal_std = std
        traj = policy.rollout(["inner", "outer"], generator=torch.Generator().manual_seed(0))
        assert traj.log_probs.shape[1] == policy.num_actions == (4 if std else 3)
        rows, places = torch.arange(2), torch.arange(policy.num_actions).expand(2, -1)
        batch = traj.transitions(rows, places)
        scored = policy.step(batch.states.detach(), batch.step, batch.condition, next=batch.next)
        (gradient,) = torch.autograd.grad(scored.log_prob.sum(), weight)
        touched[std] = (gradient.flatten(1) != 0).any(1).nonzero().flatten().tolist()
        clean = policy.denoise(traj.states[:, 3], policy.timesteps[3].expand(2), traj.condition)
        assert torch.equal(clean, traj.final) == (std == 0)
    # grid of 50 per-step weights: calls at 999, 759, 499 and, with terminal noise, 259
    assert len(touched[0.0]) == 3 and len(touched[0.1]) == 4
    policy.terminal_std = 0.1
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    sampled = policy.sample(["inner", "outer"], noise)
    policy.terminal_std = 0.0
    assert torch.equal(sampled, policy.sample(["inner", "outer"], noise))  # samples are never noised at the end


def test_branches_of_a_consistency_policy(tmp_path):
    """B2-DiffuRL's rollout works on it as it is: windows of 1 to H - 1 actions, and the last call."""
    from minialign.methods.b2diffurl import branch_rollout

    policy = ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path), num_steps=4)
    with torch.no_grad():
        noise = policy.draw_noise(6, torch.Generator().manual_seed(0))
        for window in (1, 2, 3):
            policy.network_evaluations = 0
            traj = branch_rollout(policy, ["abc", "de"], noise, window, 3)
            assert policy.network_evaluations == 2 * (3 - window) + 6 * (window + 1)
            whole = policy.rollout(["abc"] * 3 + ["de"] * 3, noise)
            torch.testing.assert_close(traj.final[::3], whole.final[::3])


def test_one_call_has_no_density_and_says_so(tmp_path):
    policy = ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path), num_steps=1)
    with pytest.raises(ValueError, match="num_steps = 1 has no stochastic step"):
        policy.rollout(["abc"])
    assert policy.sample(["abc"]).shape == (1, 3, 8, 8)


def test_a_student_starts_as_its_teachers_denoised_guess(tmp_path):
    teacher = DiffusionPolicy.from_pipeline(conftest.stable_diffusion(tmp_path), guidance_scale=1.0)
    for dim in (None, 16):
        student = ConsistencyPolicy.from_diffusion(teacher, guidance_dim=dim)
        x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([499, 499])
        condition = student.encode(["abc", "de"])
        f = student.denoise(x, t, condition)
        noise_pred = teacher.output_at(x, t, teacher.encode(["abc", "de"]))
        a = teacher.scheduler.alphas_cumprod[499]
        torch.testing.assert_close(f, (x - (1 - a).sqrt() * noise_pred) / a.sqrt(), atol=1e-5, rtol=1e-5)
        assert student.network is not teacher.network


def test_the_reference_is_what_training_began_with(tmp_path):
    policy = ConsistencyPolicy.from_pipeline(lcm_pipeline(tmp_path), num_steps=4)
    policy.train_all_weights()
    before = copy.deepcopy(policy.network.state_dict())
    for p in policy.parameters():
        p.data.add_(0.05)
    x, step, condition = torch.randn(2, *policy.latent_shape), torch.tensor([1, 1]), policy.encode(["abc", "de"])
    reference = policy.step(x, step, condition, reference=True).mean
    assert (policy.step(x, step, condition).mean - reference).abs().max() > 1e-3
    policy.network.load_state_dict(before)
    torch.testing.assert_close(policy.step(x, step, condition).mean, reference)


def test_guidance_outside_a_network_without_embedding(tmp_path):
    """A StableDiffusionPipeline whose UNet is a consistency function: e_u + g (e_c - e_u), two passes."""
    policy = ConsistencyPolicy.from_pipeline(conftest.stable_diffusion(tmp_path), num_steps=2, guidance_scale=3.0)
    with torch.no_grad():
        policy.sample(["abc"])
    assert policy.network_evaluations == 2 * 2
    condition, plain = policy.encode(["abc"]), {}
    x, t = torch.randn(1, *policy.latent_shape), torch.tensor([499])
    for g in (0.0, 1.0, 3.0):
        plain[g] = policy.output_at(x, t, condition, guidance_scale=torch.tensor([g]))
    torch.testing.assert_close(plain[3.0], plain[0.0] + 3 * (plain[1.0] - plain[0.0]))
    torch.testing.assert_close(policy.output_at(x, t, condition), plain[3.0])
