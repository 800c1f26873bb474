"""The policy contract on real diffusers classes: rollout, scoring, guidance, reference, adapters, costs, errors."""

import pytest
import torch
from conftest import class_conditional, sd_scheduler, stable_diffusion, stable_diffusion_xl

from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy

PROMPTS = ["a dog", "a cat", "a dog"]


def policies(folder):
    yield DiffusionPolicy.from_pipeline(stable_diffusion(folder), num_steps=4, guidance_scale=1.0)
    yield DiffusionPolicy.from_pipeline(stable_diffusion(folder), num_steps=4, guidance_scale=3.0)
    yield DiffusionPolicy.from_pipeline(stable_diffusion_xl(folder), num_steps=4, guidance_scale=3.0)
    for guidance, null in ((1.0, None), (2.0, 3)):
        yield DiffusionPolicy(
            class_conditional(), sd_scheduler(), class_names=("a dog", "a cat"), null_class=null, num_steps=4,
            guidance_scale=guidance, decoder=lambda x: x / 2 + 0.5,
        )  # fmt: skip


def test_rollout_score_and_step_on_every_class(tmp_path, generator):
    for policy in policies(tmp_path):
        policy.add_lora(rank=2)
        with torch.no_grad():
            traj = policy.rollout(PROMPTS, generator=generator)
        assert traj.states.shape == (3, 5, *policy.latent_shape)
        assert traj.log_probs.shape == (3, 4) and traj.log_probs.isfinite().all()
        assert (traj.timesteps[1:] < traj.timesteps[:-1]).all()
        images = policy.decode(traj.final)
        assert images.shape[0] == 3 and images.ndim == 4
        # the ratio is 1 before the first update, all steps scored in one call
        b, s = torch.cartesian_prod(torch.arange(3), torch.arange(4)).unbind(-1)
        out = policy.step(traj.states[b, s], traj.steps[s], traj.condition[b], next=traj.states[b, s + 1])
        # a convolution over 12 rows rounds differently from one over 3: some ten spacings of float32 in the densities
        torch.testing.assert_close(out.log_prob.view(3, 4), traj.log_probs, atol=1e-5, rtol=0)
        out.log_prob.sum().backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        assert gradients and any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_transition_agrees_with_diffusers_own_step(prediction_type, eta, generator):
    scheduler = sd_scheduler(prediction_type=prediction_type)
    policy = DiffusionPolicy(class_conditional(), scheduler, class_names=("a dog", "a cat"), num_steps=5, eta=eta)
    noise = policy.draw_noise(3, generator)
    with torch.no_grad():
        traj = policy.rollout(PROMPTS, noise)
        x = noise[:, 0]
        for i, t in enumerate(policy.timesteps):
            output = policy.network(x, t, **traj.condition.inputs).sample
            x = scheduler.step(output, t, x, eta=eta, variance_noise=noise[:, i + 1]).prev_sample
    torch.testing.assert_close(traj.final, x, atol=2e-5, rtol=1e-5)


def test_same_images_as_the_pipeline_itself(sd, generator):
    policy = DiffusionPolicy.from_pipeline(sd, num_steps=4, eta=0.0, guidance_scale=3.0)
    noise = policy.draw_noise(2, generator)
    sd.set_progress_bar_config(disable=True)
    theirs = sd(
        ["a dog", "a cat"], latents=noise[:, 0], num_inference_steps=4, guidance_scale=3.0, eta=0.0, output_type="pt"
    )
    torch.testing.assert_close(policy.sample(["a dog", "a cat"], noise), theirs.images, atol=1e-5, rtol=1e-5)


def test_reference_is_the_base_model_whatever_is_trained(tmp_path, generator):
    for trainable in ("add_lora", "train_all_weights"):
        policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=2.0)
        x, condition = policy.draw_noise(3, generator)[:, 0], policy.encode(PROMPTS)
        with torch.no_grad():
            before = policy.model_output(x, 0, condition)
            getattr(policy, trainable)()
            for p in policy.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            after = policy.model_output(x, 0, condition)
            reference = policy.model_output(x, 0, condition, reference=True)
            again = policy.model_output(x, 0, condition)
        torch.testing.assert_close(reference, before)
        torch.testing.assert_close(again, after)  # asking the reference leaves the policy as it was
        assert (after - before).abs().max() > 1e-3
        assert all(p.requires_grad for p in policy.parameters())


def test_network_evaluations_count_rows_guidance_and_gradients(sd):
    for guidance, factor in ((1.0, 1), (3.0, 2)):
        policy = DiffusionPolicy.from_pipeline(sd, num_steps=4, guidance_scale=guidance)
        policy.train_all_weights()
        with torch.no_grad():
            traj = policy.rollout(PROMPTS)
        assert policy.network_evaluations == 3 * 4 * factor
        policy.step(traj.states[:, 0], 0, traj.condition, next=traj.states[:, 1])
        assert policy.network_evaluations == 3 * 4 * factor + 3 * 3 * factor


def test_branching_from_a_stored_state_continues_the_same_run(sd, generator):
    policy = DiffusionPolicy.from_pipeline(sd, num_steps=5, guidance_scale=1.0)
    noise = policy.draw_noise(3, generator)
    with torch.no_grad():
        whole = policy.rollout(PROMPTS, noise)
        prefix = policy.rollout(PROMPTS, noise, last=2)
        rest = policy.rollout(whole.condition, noise, states=prefix.final, first=2)
    torch.testing.assert_close(rest.final, whole.final)
    torch.testing.assert_close(rest.log_probs, whole.log_probs[:, 2:])
    assert rest.steps.tolist() == [2, 3, 4]


def test_adapter_loads_in_diffusers_and_reproduces_the_images(sd, tmp_path, generator):
    from conftest import stable_diffusion as fresh

    policy = DiffusionPolicy.from_pipeline(sd, num_steps=3, guidance_scale=1.0)
    from minialign.policies.diffusion import EVERYWHERE

    base = fresh(tmp_path)  # same seed, but its text encoder and VAE are drawn anew: take ours
    base.register_modules(vae=sd.vae, text_encoder=sd.text_encoder)
    base.unet.load_state_dict(sd.unet.state_dict())
    policy.add_lora(rank=3, alpha=6, target_modules=EVERYWHERE)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    noise = policy.draw_noise(3, generator)
    trained = policy.sample(PROMPTS, noise)
    policy.save_adapter(tmp_path / "adapter")
    other = DiffusionPolicy.from_pipeline(base, num_steps=3, guidance_scale=1.0)
    assert (other.sample(PROMPTS, noise) - trained).abs().max() > 1e-3
    # offline, diffusers 0.35 wants the file's name
    base.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other.sample(PROMPTS, noise), trained, atol=1e-5, rtol=1e-4)


def test_an_adapter_is_written_by_the_pipelines_own_class(tmp_path, monkeypatch):
    pipe = stable_diffusion_xl(tmp_path)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3)
    policy.add_lora(rank=2)
    written = []
    original = type(pipe).save_lora_weights
    monkeypatch.setattr(
        type(pipe), "save_lora_weights", lambda *args, **kwargs: written.append(type(pipe)) or original(*args, **kwargs)
    )
    policy.save_adapter(tmp_path / "adapter")
    assert written == [type(pipe)]
    other = stable_diffusion_xl(tmp_path)
    other.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
    loaded = {name: p for name, p in other.unet.named_parameters() if "lora" in name}
    assert loaded and all(
        torch.equal(p, dict(pipe.unet.named_parameters())[name.replace("default_0", "default")])
        for name, p in loaded.items()
    )


@pytest.mark.parametrize("changes", [{"steps_offset": 0}, {"set_alpha_to_one": True, "steps_offset": 0}])
def test_a_deterministic_last_step_is_refused(changes):
    policy = DiffusionPolicy(class_conditional(), sd_scheduler(**changes), class_names=("a dog",), num_steps=4)
    with pytest.raises(ValueError, match=r"step 3 \(timestep 0\) is deterministic.*steps_offset=1"):
        policy.rollout(["a dog"])
    assert policy.sample(["a dog"]).isfinite().all()  # drawing needs no density


def test_bad_input_is_named(sd):
    policy = DiffusionPolicy(class_conditional(), sd_scheduler(), class_names=("a dog", "a cat"), num_steps=4)
    with pytest.raises(ValueError, match="unknown prompt 'a dig'; did you mean 'a dog'"):
        policy.encode(["a dig"])
    with pytest.raises(ValueError, match="prompts is empty"):
        policy.encode([])
    with pytest.raises(ValueError, match="expected a list of strings"):
        policy.encode("a dog")
    with pytest.raises(ValueError, match="clip_sample=True"):
        DiffusionPolicy(class_conditional(), sd_scheduler(clip_sample=True))
    with pytest.raises(ValueError, match="needs null_class"):
        DiffusionPolicy(class_conditional(), sd_scheduler(), class_names=("a dog",), guidance_scale=2.0)
    with pytest.raises(ValueError, match="eta = 0"):
        DiffusionPolicy(class_conditional(), sd_scheduler(), class_names=("a dog",), eta=0).rollout(["a dog"])
    with pytest.raises(ValueError, match="no reference"):
        policy.step(policy.draw_noise(1)[:, 0], 0, policy.encode(["a dog"]), reference=True)
    policy.network.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        policy.parameters()
    sd.register_modules(vae=None)
    with pytest.raises(ValueError, match="cannot wrap StableDiffusionPipeline: it has no vae"):
        DiffusionPolicy.from_pipeline(sd)


def test_pipelines_that_cannot_be_wrapped_say_why(tmp_path):
    pipe = stable_diffusion(tmp_path)
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels, its VAE gives 4"):
        DiffusionPolicy.from_pipeline(pipe)


def test_other_schedulers_become_ddim_on_the_same_noise_levels(sd):
    from diffusers import PNDMScheduler

    sd.register_modules(scheduler=PNDMScheduler.from_config(sd.scheduler.config, skip_prk_steps=True))
    policy = DiffusionPolicy.from_pipeline(sd, num_steps=4)
    policy.check_density()
    torch.testing.assert_close(policy.scheduler.alphas_cumprod, sd.scheduler.alphas_cumprod)


def test_training_error_hits_each_target(generator):
    from torch import nn

    class Echo(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

        def forward(self, x, t, **_):
            return self.answer + 0 * self.weight

    x0, noise = (torch.randn(3, 2, generator=generator) for _ in range(2))
    t = torch.tensor([1, 500, 999])
    a = sd_scheduler().alphas_cumprod[t][:, None]
    targets = {"epsilon": noise, "sample": x0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}
    for kind, target in targets.items():
        policy = DiffusionPolicy(Echo(target + 0.5), sd_scheduler(prediction_type=kind), latent_shape=(2,))
        error = policy.training_error(x0, t, noise, policy.encode(["", "", ""]), reduction="mean")
        torch.testing.assert_close(error, torch.full((3,), 0.25))


@pytest.mark.parametrize("kind", ["diffusion", "consistency"])
def test_training_error_of_a_real_network(sd, kind, generator):
    """Reductions differ by the number of elements; the reference's error is the base's, without gradient; a guided
    policy trains unguided; levels lie on the grid that the policy may be asked for."""
    policy = DiffusionPolicy.from_pipeline(sd, num_steps=3, guidance_scale=4.0)
    if kind == "consistency":
        policy = ConsistencyPolicy.from_pipeline(sd, num_steps=3, guidance_scale=4.0)
    policy.add_lora(rank=2)
    latents, noise = (torch.randn(3, *policy.latent_shape, generator=generator) for _ in range(2))
    condition, levels = policy.encode(PROMPTS), policy.draw_levels(3, generator)
    policy.network_evaluations = 0
    base = policy.training_error(latents, levels, noise, condition, reduction="mean")
    assert policy.network_evaluations == 3 * 3 and base.shape == (3,) and base.dtype == torch.float32
    a = policy.scheduler.alphas_cumprod[levels].reshape(3, 1, 1, 1)
    states = a.sqrt() * latents + (1 - a).sqrt() * noise
    output = policy.network(states, levels, **condition.inputs).sample
    expected, target = (output, noise) if kind == "diffusion" else (policy._consistent(output, states, levels), latents)
    torch.testing.assert_close(base, (expected - target).square().flatten(1).mean(1))
    total = policy.training_error(latents, levels, noise, condition, reduction="sum")
    torch.testing.assert_close(total, base * latents[0].numel())
    with torch.no_grad():
        [p.add_(0.1) for p in policy.parameters()]
    moved = policy.training_error(latents, levels, noise, condition, reduction="mean")
    assert moved.requires_grad and (moved - base).abs().min() > 1e-6
    reference = policy.training_error(latents, levels, noise, condition, reduction="mean", reference=True)
    assert not reference.requires_grad
    torch.testing.assert_close(reference, base.detach())


def test_levels_cover_the_training_timesteps(sd, generator):
    drawn = DiffusionPolicy.from_pipeline(sd).draw_levels(20_000, generator)
    assert drawn.min() == 0 and drawn.max() == 999 and drawn.unique().numel() == 1000
    drawn = ConsistencyPolicy.from_pipeline(sd).draw_levels(2000, generator)
    assert drawn.unique().tolist() == list(range(19, 1000, 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["diffusion", "consistency"])
def test_the_first_ratio_is_one_in_half_precision(sd, dtype, kind, generator):
    """States, means and log-probabilities are float32: all steps scored in one batch give the rollout's own numbers."""
    sd.to(dtype)
    policy = DiffusionPolicy.from_pipeline(sd, num_steps=4, guidance_scale=3.0)
    if kind == "consistency":
        policy = ConsistencyPolicy.from_pipeline(sd, num_steps=4, guidance_scale=3.0)
    policy.add_lora(rank=2)
    with torch.no_grad():
        [p.add_(0.1 * torch.randn(p.shape, generator=generator)) for p in policy.parameters()]
        traj = policy.rollout(PROMPTS, generator=generator)
    assert traj.states.dtype == traj.log_probs.dtype == torch.float32
    batch = traj.transitions(torch.arange(3), torch.arange(policy.num_actions).expand(3, -1))
    out = policy.step(batch.states, batch.step, batch.condition, next=batch.next)
    ratio = (out.log_prob - batch.log_prob_old).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    assert policy.decode(traj.final).dtype == torch.float32
