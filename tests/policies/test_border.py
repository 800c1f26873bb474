"""Others' settings at the border: heard as diffusers hears them, or refused by name with a repair that works."""

import re

import diffusers
import pytest
import torch
from conftest import class_conditional, sd_scheduler, stable_diffusion, stable_diffusion_xl
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler, UNet2DModel
from test_consistency_policy import lcm_pipeline

from minialign.policies.border import FAMILY
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PROMPTS = ["a dog", "cow in the sun"]


def pixels():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip


def followed(message, scheduler):
    """The scheduler that a refusal tells to build."""
    (call,) = re.findall(r"(\w+\.from_config\(scheduler\.config[^)]*\))", message)
    return eval(call, vars(diffusers), {"scheduler": scheduler})


def accepted(build, scheduler, rounds=3):
    """The policy, and how many refusals were followed to get it."""
    for refusals in range(rounds):
        try:
            policy = build(scheduler)
            policy.check_density()
            return policy, refusals
        except ValueError as refusal:
            scheduler = followed(str(refusal), scheduler)
    raise AssertionError("the advice leads nowhere")


# Schedulers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(clip_sample=True), "clip_sample=True.*the mean of the transition"),
        (dict(thresholding=True), "thresholding=True.*the mean of the transition"),
        (dict(clip_sample=True, thresholding=True), "clip_sample=True, thresholding=True"),
        (dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "alpha_bar is 0 at timestep 999"),
    ],
)
@pytest.mark.parametrize("kind", [DiffusionPolicy, ConsistencyPolicy])
def test_settings_that_a_step_would_not_hear_are_refused(kind, settings, message, sd):
    own = DDIMScheduler if kind is DiffusionPolicy else LCMScheduler
    scheduler = own(**BETAS | dict(clip_sample=False, steps_offset=1, set_alpha_to_one=False) | settings)

    def build(scheduler):
        sd.register_modules(scheduler=scheduler)
        return kind.from_pipeline(sd, num_steps=4)

    with pytest.raises(ValueError, match=message):
        build(scheduler)
    with pytest.raises(ValueError, match=message):
        kind(class_conditional(), scheduler, class_names=("a dog",))
    policy, refusals = accepted(build, scheduler)
    assert refusals == 1
    with torch.no_grad():
        assert policy.rollout(PROMPTS).log_probs.isfinite().all()


def test_alpha_bar_0_is_heard_by_networks_that_predict_v(sd):
    """The step from pure noise is then the pipeline's own."""
    settings = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    sd.register_modules(scheduler=sd_scheduler(**settings))
    sd.set_progress_bar_config(disable=True)
    policy = DiffusionPolicy.from_pipeline(sd, num_steps=4, eta=0.0, guidance_scale=3.0)
    noise = policy.draw_noise(2)
    theirs = sd(PROMPTS, latents=noise[:, 0], num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(policy.sample(PROMPTS, noise), theirs, atol=1e-5, rtol=1e-5)
    policy.eta = 1.0
    with torch.no_grad():
        assert policy.rollout(PROMPTS).log_probs.isfinite().all()


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "DPMSolverSDEScheduler"])  # that needs torchsde
def test_a_family_becomes_ddim_on_the_same_levels_and_its_advice_works(name, sd):
    def build(scheduler):
        sd.register_modules(scheduler=scheduler)
        return DiffusionPolicy.from_pipeline(sd, num_steps=4)

    original = getattr(diffusers, name)(**BETAS)
    policy, refusals = accepted(build, original)
    assert isinstance(policy.scheduler, DDIMScheduler) and refusals <= 2
    torch.testing.assert_close(policy.scheduler.alphas_cumprod, original.alphas_cumprod)
    with torch.no_grad():
        assert policy.rollout(PROMPTS).log_probs.isfinite().all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True), "use_karras_sigmas=True"),
        (diffusers.DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True), "use_lu_lambdas=True"),
        (EulerDiscreteScheduler(**BETAS, sigma_min=0.1, sigma_max=10.0), "sigma_max=10.0, sigma_min=0.1"),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large"), "variance_type='fixed_large'"),
        (DDPMScheduler(), "clip_sample=True"),
        (LCMScheduler(), "LCMScheduler is not understood"),
        (diffusers.TCDScheduler(), "TCDScheduler is not understood"),
        (diffusers.DDIMInverseScheduler(clip_sample=False), "DDIMInverseScheduler is not understood"),
    ],
)
def test_other_families_settings_are_refused_and_the_advice_works(scheduler, message, sd):
    def build(scheduler):
        return DiffusionPolicy(pixels(), scheduler, num_steps=4)

    with pytest.raises(ValueError, match=message):
        build(scheduler)
    assert accepted(build, scheduler)[1] <= 2


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler is not understood"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is not understood"),
        (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler is not understood"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow_prediction"),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "timestep_type"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type='learned_range'"),
    ],
)
@pytest.mark.parametrize("kind", [DiffusionPolicy, ConsistencyPolicy])
def test_networks_that_say_something_else_are_refused_without_a_wrong_advice(kind, scheduler, message):
    with pytest.raises(ValueError, match=message) as refusal:
        kind(pixels(), scheduler, num_steps=4)
    assert "from_config" not in str(refusal.value)


def test_an_lcm_grid_is_the_schedulers_whatever_it_was_made_of(sd):
    """A DDIM or PNDM pipeline whose UNet is a consistency function: LCMScheduler on its levels."""
    for scheduler in (sd.scheduler, PNDMScheduler.from_config(sd.scheduler.config, skip_prk_steps=True)):
        sd.register_modules(scheduler=scheduler)
        policy = ConsistencyPolicy.from_pipeline(sd, num_steps=4)
        assert isinstance(policy.scheduler, LCMScheduler)
        torch.testing.assert_close(policy.scheduler.alphas_cumprod, scheduler.alphas_cumprod)


def test_to_keeps_the_grid_that_was_chosen(sd, tmp_path):
    policy = ConsistencyPolicy.from_pipeline(sd, num_steps=3)
    policy.set_num_steps(3, [999, 659, 319])
    std = policy.std
    policy.to("cpu")
    assert policy.timesteps.tolist() == [999, 659, 319]
    torch.testing.assert_close(policy.std, std)
    with pytest.raises(ValueError, match="num_steps is 2, but there are 3 timesteps"):
        policy.set_num_steps(2, [999, 659, 319])
    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=4)
    grid = policy.timesteps.tolist()
    policy.pipeline.scheduler.set_timesteps(7)  # the pipeline was used in between
    policy.to("cpu")
    assert policy.timesteps.tolist() == grid


# Pipelines of a UNet alone --------------------------------------------------------------------------------------------


def test_a_pipeline_of_pixels_is_wrapped_and_draws_its_own_pictures(generator):
    def build(scheduler):
        return DiffusionPolicy.from_pipeline(diffusers.DDPMPipeline(pixels(), scheduler), num_steps=4)

    policy, refusals = accepted(build, DDPMScheduler())
    assert refusals <= 2
    with torch.no_grad():
        traj = policy.rollout(["", ""], generator=generator)
    assert traj.log_probs.isfinite().all() and policy.decode(traj.final).shape == (2, 1, 8, 8)
    pipe = diffusers.DDIMPipeline(policy.network, sd_scheduler())
    pipe.set_progress_bar_config(disable=True)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=4, eta=0.0)
    theirs = pipe(2, generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = policy.sample(["", ""], start.unsqueeze(1).expand(-1, 5, -1, -1, -1))
    torch.testing.assert_close(ours.permute(0, 2, 3, 1), torch.from_numpy(theirs), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no prompts to be guided by"):
        DiffusionPolicy.from_pipeline(pipe, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"num_class_embeds=4.*class_names="):
        DiffusionPolicy.from_pipeline(diffusers.DDIMPipeline(class_conditional(), sd_scheduler()))


# Networks and pipelines with more inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_class_embeds=4), "num_class_embeds=4"),
        (dict(class_embed_type="timestep"), "class_embed_type='timestep'"),
        (dict(encoder_hid_dim_type="ip_image_proj"), r"pipe\.unload_ip_adapter\(\)"),
        (dict(addition_embed_type="text_time"), "addition_embed_type='text_time'"),
        (dict(attention_type="gated"), "attention_type='gated'"),
        (dict(out_channels=8), "takes 4 channels and gives 8.*learned the variance"),
    ],
)
def test_conditions_that_no_prompt_gives_are_refused(changes, message, sd):
    sd.unet.register_to_config(**changes)
    with pytest.raises(ValueError, match=message):
        DiffusionPolicy.from_pipeline(sd)


def test_a_component_that_would_not_be_heard_is_refused(sd):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

    control = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(8, 8))
    pipe = StableDiffusionControlNetPipeline(**sd.components, controlnet=control, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"its controlnet would not be heard.*from_pipe\(pipe\)"):
        DiffusionPolicy.from_pipeline(pipe)
    DiffusionPolicy.from_pipeline(StableDiffusionPipeline.from_pipe(pipe))


# What words mean: guidance, sizes, units of latents -------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_guidance_is_the_pipelines_at_any_scale(make, guidance_scale, tmp_path):
    """At or below 1 it is the prompt alone, and one evaluation a row."""
    pipe = make(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, eta=0.0, guidance_scale=guidance_scale)
    noise = policy.draw_noise(2)
    ours = policy.sample(PROMPTS, noise)
    assert policy.network_evaluations == 2 * 3 * (2 if guidance_scale > 1 else 1)
    theirs = pipe(
        PROMPTS, latents=noise[:, 0], num_inference_steps=3, guidance_scale=guidance_scale, output_type="pt"
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 4.0])
def test_embedded_guidance_is_the_pipelines_at_any_scale(guidance_scale, tmp_path):
    pipe = lcm_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    policy = ConsistencyPolicy.from_pipeline(pipe, num_steps=1, guidance_scale=guidance_scale)
    noise = policy.draw_noise(2)
    theirs = pipe(
        PROMPTS, latents=noise[:, 0].clone(), num_inference_steps=1, guidance_scale=guidance_scale, output_type="pt",
        height=8, width=8,
    ).images  # fmt: skip
    torch.testing.assert_close(policy.sample(PROMPTS, noise), theirs, atol=2e-5, rtol=0)


def test_guidance_without_a_null_class_is_off_at_or_below_1():
    settings = dict(class_names=("a dog", "cow in the sun"), num_steps=2)
    low, off = (DiffusionPolicy(class_conditional(), sd_scheduler(), guidance_scale=g, **settings) for g in (0.0, 1.0))
    noise = off.draw_noise(2)
    torch.testing.assert_close(low.sample(PROMPTS, noise), off.sample(PROMPTS, noise))


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_pictures_that_are_not_square(kind, tmp_path):
    pipe = stable_diffusion(tmp_path, networks=dict(size=(4, 8))) if kind == "sd" else None
    pipe = pipe or stable_diffusion_xl(tmp_path, size=(4, 8))
    pipe.set_progress_bar_config(disable=True)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=2, eta=0.0, guidance_scale=1.0)
    assert policy.latent_shape == (4, 4, 8)
    noise = policy.draw_noise(2)
    theirs = pipe(
        PROMPTS, height=8, width=16, latents=noise[:, 0], num_inference_steps=2, guidance_scale=1.0, output_type="pt"
    ).images
    ours = policy.sample(PROMPTS, noise)
    assert ours.shape[-2:] == (8, 16)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


UNITS = dict(latents_mean=[0.5, -0.5, 0.3, 0.1], latents_std=[2.0, 1.5, 1.2, 0.8])


def test_latents_are_decoded_in_the_pipelines_units(tmp_path):
    pipe = stable_diffusion_xl(tmp_path, vae=UNITS)
    pipe.set_progress_bar_config(disable=True)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=2, eta=0.0, guidance_scale=1.0)
    noise = policy.draw_noise(2)
    theirs = pipe(PROMPTS, latents=noise[:, 0], num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    torch.testing.assert_close(policy.sample(PROMPTS, noise), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "units", "message"),
    [
        (stable_diffusion, UNITS, "latents_mean.*which StableDiffusionPipeline does not use"),
        (stable_diffusion, dict(shift_factor=0.1), "shift_factor=0.1, which StableDiffusionPipeline does not use"),
        (stable_diffusion_xl, dict(shift_factor=0.1), "shift_factor"),
        (stable_diffusion_xl, dict(latents_mean=UNITS["latents_mean"]), "without latents_std"),
    ],
)
def test_units_that_the_pipeline_would_not_hear_are_refused(make, units, message, tmp_path):
    pipe = make(tmp_path)
    pipe.vae.register_to_config(**units)
    for _ in units:
        with pytest.raises(ValueError, match=message) as refusal:
            DiffusionPolicy.from_pipeline(pipe)
        (repair,) = re.findall(r"pipe\.vae\.register_to_config\(\w+=None\)", str(refusal.value))
        exec(repair, {"pipe": pipe})
        message = "latents_std"
    DiffusionPolicy.from_pipeline(pipe)


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32(tmp_path):
    """Finite, right to float16's rounding of the weights, with a gradient; and the pipeline's own is as it was."""
    pipe = stable_diffusion_xl(tmp_path)
    pipe.vae.decoder.conv_in.weight.data.mul_(3e4)
    pipe.to(torch.float16)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=2)
    latents = policy.draw_noise(2)[:, 0].requires_grad_()
    images = policy.decode(latents)
    assert images.isfinite().all() and pipe.vae.dtype == torch.float16
    with torch.no_grad():
        due = pipe.vae.float().decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(images, due.clamp(0, 1), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(images.mean(), latents)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    pipe.vae.half()
    pipe.vae.register_to_config(force_upcast=False)
    assert not DiffusionPolicy.from_pipeline(pipe, num_steps=2).decode(latents).isfinite().all()  # heard, as asked
