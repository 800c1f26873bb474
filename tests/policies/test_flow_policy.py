"""Flows as policies: Stable Diffusion 3 and FLUX as their pipelines draw them, the SDE's law, the other clock."""

import pytest
import torch
from conftest import flux, stable_diffusion, stable_diffusion_3
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from minialign import worlds
from minialign.exact import LinearGaussianFlow
from minialign.methods import b2diffurl, constrained, d3po, ddpo, dragon, prdp, raft, rwr
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.flow import AsVelocity, FlowPolicy

PROMPTS = ["abc", "de"]
LENGTH = dict(max_sequence_length=8)
MAKE = {"sd3": stable_diffusion_3, "flux": flux}


def wrapped(kind, tmp_path, **settings):
    return FlowPolicy.from_pipeline(MAKE[kind](tmp_path), **LENGTH | settings)


class TestPipelines:
    @pytest.mark.parametrize(
        ("kind", "guidance_scale"), [("sd3", 0.5), ("sd3", 1.0), ("sd3", 4.0), ("flux", 1.0), ("flux", 4.0)]
    )
    def test_the_ode_draws_the_pipelines_pictures(self, kind, guidance_scale, tmp_path):
        pipe = MAKE[kind](tmp_path)
        policy = FlowPolicy.from_pipeline(pipe, num_steps=4, guidance_scale=guidance_scale, **LENGTH)
        noise = policy.draw_noise(2)
        ours = policy.sample(PROMPTS, noise)
        assert policy.network_evaluations == 2 * 4 * (2 if kind == "sd3" and guidance_scale > 1 else 1)
        theirs = pipe(
            PROMPTS, latents=noise[:, 0], num_inference_steps=4, guidance_scale=guidance_scale, output_type="pt",
            height=8, width=8, **LENGTH,
        ).images  # fmt: skip
        assert theirs.shape == (2, 3, 8, 8) and theirs.std() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", MAKE)
    def test_guidance_matters(self, kind, tmp_path):
        """Or the test above would pass without any."""
        one, four = (wrapped(kind, tmp_path, guidance_scale=g, num_steps=2) for g in (1.0, 4.0))
        noise = one.draw_noise(2)
        assert (one.sample(PROMPTS, noise) - four.sample(PROMPTS, noise)).abs().max() > 1e-4

    @pytest.mark.parametrize("kind", MAKE)
    def test_pictures_that_are_not_square_and_a_grid_of_their_own(self, kind, tmp_path):
        """The shift of a dynamic scheduler depends on the size of the picture."""
        pipe = MAKE[kind](tmp_path, use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=16)
        policy = FlowPolicy.from_pipeline(pipe, num_steps=3, height=8, width=16, **LENGTH)
        noise = policy.draw_noise(2)
        theirs = pipe(
            PROMPTS, latents=noise[:, 0], num_inference_steps=3, height=8, width=16, output_type="pt", **LENGTH,
            guidance_scale=7.0 if kind == "sd3" else 3.5,
        ).images  # fmt: skip
        ours = policy.sample(PROMPTS, noise)
        assert ours.shape == (2, 3, 8, 16)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        square = FlowPolicy.from_pipeline(pipe, num_steps=3, height=8, width=8, **LENGTH)
        assert (square.timesteps[1] - policy.timesteps[1]).abs() > 1

    def test_without_a_third_text_encoder(self, tmp_path):
        policy = FlowPolicy.from_pipeline(stable_diffusion_3(tmp_path, third=False), num_steps=2, **LENGTH)
        assert policy.sample(PROMPTS).isfinite().all()

    def test_flux_schnell_has_no_guidance(self, tmp_path):
        pipe = flux(tmp_path, guidance_embeds=False, use_dynamic_shifting=False)
        assert "guidance" not in FlowPolicy.from_pipeline(pipe, **LENGTH).encode(PROMPTS).inputs
        with pytest.raises(
            ValueError, match=r"guidance_scale is 3\.5, but this FluxPipeline has no guidance embedding"
        ):
            FlowPolicy.from_pipeline(pipe, guidance_scale=3.5, **LENGTH)

    @pytest.mark.parametrize("kind", MAKE)
    def test_what_is_sampled_is_what_is_scored_and_the_adapter_gets_a_gradient(self, kind, tmp_path):
        policy = wrapped(kind, tmp_path, num_steps=3)
        policy.add_lora(rank=2)
        with torch.no_grad():
            traj = policy.rollout(PROMPTS, generator=torch.Generator().manual_seed(0), reduction="sum")
        batch = traj.transitions(torch.arange(2), torch.arange(3).expand(2, -1))
        out = policy.step(batch.states, batch.step, batch.condition, next=batch.next, reduction="sum")
        torch.testing.assert_close(out.log_prob, batch.log_prob_old, atol=2e-4, rtol=1e-5)
        out.log_prob.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
        assert sum(float(p.grad.abs().sum()) for p in policy.parameters()) > 0
        ref = policy.step(batch.states, batch.step, batch.condition, next=batch.next, reduction="sum", reference=True)
        assert torch.equal(policy.step_kl(out, ref, "sum"), torch.zeros(6))

    @pytest.mark.parametrize("kind", MAKE)
    def test_the_pipelines_own_loader_redraws_the_trained_picture(self, kind, tmp_path):
        policy = wrapped(kind, tmp_path, num_steps=3)
        noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
        base = policy.sample(PROMPTS, noise)
        policy.add_lora(rank=3, alpha=6)
        for p in policy.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        trained = policy.sample(PROMPTS, noise)
        assert (trained - base).abs().max() > 1e-3
        policy.save_adapter(tmp_path / "saved")
        pipe = MAKE[kind](tmp_path)
        names = [name for name in pipe.components if name.startswith("text_encoder") or name == "vae"]
        pipe.register_modules(**{name: getattr(policy.pipeline, name) for name in names})
        pipe.load_lora_weights(tmp_path / "saved", local_files_only=True)
        guidance = 7.0 if kind == "sd3" else 3.5
        theirs = pipe(
            PROMPTS, latents=noise[:, 0], num_inference_steps=3, guidance_scale=guidance, output_type="pt", height=8,
            width=8, **LENGTH,
        ).images  # fmt: skip
        torch.testing.assert_close(trained, theirs, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("kind", MAKE)
    def test_half_precision_trains_a_float32_adapter(self, kind, dtype, tmp_path):
        policy = FlowPolicy.from_pipeline(MAKE[kind](tmp_path).to(dtype), num_steps=3, **LENGTH)
        policy.add_lora(rank=2)
        before = [p.detach().clone() for p in policy.parameters()]
        config = ddpo.Config(num_iterations=2, num_prompts=2, group_size=4, num_minibatches=1)
        steps = list(ddpo.train(policy, lambda images, prompts: images.mean((1, 2, 3)), PROMPTS, config))
        assert len(steps) == 2 and {p.dtype for p in policy.parameters()} == {torch.float32}
        assert all(p.isfinite().all() for p in policy.parameters())
        assert sum(not torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True)) > len(before) / 2

    def test_what_is_no_flow_is_refused_by_name(self, tmp_path):
        with pytest.raises(ValueError, match="cannot wrap StableDiffusionPipeline: it has no transformer"):
            FlowPolicy.from_pipeline(stable_diffusion(tmp_path))
        with pytest.raises(ValueError, match=r"It has a transformer: for a flow, FlowPolicy\.from_pipeline"):
            DiffusionPolicy.from_pipeline(stable_diffusion_3(tmp_path))
        pipe = stable_diffusion_3(tmp_path)
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
        with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler is not understood as the clock of a flow"):
            FlowPolicy.from_pipeline(pipe, **LENGTH)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)  # the advice
        FlowPolicy.from_pipeline(pipe, **LENGTH)
        with pytest.raises(ValueError, match="width is 9; expected a multiple of 4 pixels"):
            FlowPolicy.from_pipeline(pipe, width=9, **LENGTH)

    @pytest.mark.parametrize("setting", [dict(stochastic_sampling=True), dict(invert_sigmas=True)])
    def test_settings_that_a_step_would_not_hear_are_refused(self, setting, tmp_path):
        (name,) = setting
        with pytest.raises(ValueError, match=f"{name}=True, which this policy's steps would not hear"):
            FlowPolicy.from_pipeline(stable_diffusion_3(tmp_path, **setting), **LENGTH)


class TestExactWorlds:
    def test_rollouts_have_the_samplers_law(self):
        """10,000 rollouts: mean and variance of the closed form, within 4 standard errors; so has the ODE."""
        world = worlds.load("line", model="flow", mean=1.0, std=0.5)
        prompts, exact, n = ["a number"] * 10_000, world.sampler, 10_000
        with torch.no_grad():
            x = world.policy.rollout(prompts, generator=torch.Generator().manual_seed(0)).final
        variance = exact.sample_variance.item()
        assert x.mean().item() == pytest.approx(exact.sample_mean.item(), abs=4 * (variance / n) ** 0.5)
        assert x.var().item() == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)
        ode = LinearGaussianFlow(1.0, 0.5, 10, 0.0)
        x = world.policy.sample(prompts, generator=torch.Generator().manual_seed(1))
        assert x.mean().item() == pytest.approx(ode.sample_mean.item(), abs=4 * (ode.sample_variance.item() / n) ** 0.5)
        assert x.var().item() == pytest.approx(ode.sample_variance.item(), rel=4 * (2 / n) ** 0.5)

    def test_a_deterministic_last_step_is_the_denoised_guess_and_no_action(self):
        policy = worlds.load("compass", model="flow").policy
        policy.deterministic_last = True
        policy.set_num_steps(10)
        assert policy.num_actions == 9 and policy.std[-1] == 0 and (policy.std[:-1] > 0).all()
        with torch.no_grad():
            traj = policy.rollout(["inner"] * 4, generator=torch.Generator().manual_seed(0))
            out = policy.step(traj.states[:, -1], 9, traj.condition)
        assert traj.log_probs.shape == (4, 9) and torch.equal(traj.final, out.next)
        torch.testing.assert_close(out.next, out.denoised)

    def test_more_steps_to_draw_than_to_train(self):
        world = worlds.load("line", model="flow")
        prompts = ["a number"] * 10_000
        x = world.policy.sample(prompts, generator=torch.Generator().manual_seed(0), num_steps=1000)
        assert x.var().item() == pytest.approx(0.997433, rel=4 * (2 / 10_000) ** 0.5)
        assert world.policy.num_steps == 10 and len(world.policy.scheduler.timesteps) == 10

    def test_the_training_loss_is_least_at_the_exact_velocity(self):
        world = worlds.load("line", model="flow", num_steps=4)
        latents, _ = world.real(20_000, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        levels, noise = world.policy.draw_levels(20_000, generator), torch.randn(20_000, 1, generator=generator)
        assert levels.min() == 0.001 and levels.max() == 1
        condition = world.policy.encode(["a number"] * 20_000)
        error = world.policy.training_error(latents, levels, noise, condition, reduction="sum")
        # Var(noise - x_0 | x_t) of N(0, 1) data is 1 / ((1 - t)^2 + t^2), whose mean over t is pi / 2
        assert error.mean().item() == pytest.approx(torch.pi / 2, rel=0.05)
        with torch.no_grad():
            world.policy.network.residual.theta.add_(0.5)
        moved = world.policy.training_error(latents, levels, noise, condition, reduction="sum")
        reference = world.policy.training_error(latents, levels, noise, condition, reduction="sum", reference=True)
        assert (moved - error).mean().item() == pytest.approx(0.25, abs=0.05)
        assert torch.equal(reference, error.detach())

    @pytest.mark.parametrize(("settings", "message"), [
        (dict(noise_level=0.0), "noise_level = 0 is the flow's ODE: no density"),
        (dict(num_steps=1), "num_steps = 1 goes from t = 1 to 0"),
    ])  # fmt: skip
    def test_what_has_no_density_is_refused(self, settings, message):
        policy = worlds.load("line", model="flow", **settings).policy
        with pytest.raises(ValueError, match=message):
            policy.rollout(["a number"])
        assert policy.sample(["a number"]).isfinite().all()


class TestADiffusionModelOnTheFlowsClock:
    def test_exact_in_a_gaussian_world(self):
        """The wrapped noise predictor says the exact velocity, but where its noisiest level stands for more noise."""
        base = worlds.load("compass")
        flow = worlds.load("compass", model="flow").policy.network
        wrapped = AsVelocity(base.policy.network, base.policy.scheduler.alphas_cumprod, "epsilon")
        x, labels = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(64).long()
        for t, tolerance in ((100.0, 2e-3), (500.0, 2e-3), (900.0, 1e-3), (1000.0, 0.1)):
            t = torch.full((64,), t)
            exact = flow(x, t, labels)
            assert (wrapped(x, t, class_labels=labels) - exact).abs().mean() < tolerance * exact.abs().mean()

    def test_shapes_draws_what_its_prompts_say(self):
        world = worlds.load("shapes", model="flow", num_steps=10)
        prompts = ["a red circle", "a blue square", "a green triangle", "a yellow circle"] * 8
        drawn = world.policy.sample(prompts, generator=torch.Generator().manual_seed(0))
        assert world.oracle(drawn, prompts).mean() > 0.8  # single objects; the diffusion model's 8 steps get as many
        with torch.no_grad():
            walked = world.policy.decode(
                world.policy.rollout(prompts, generator=torch.Generator().manual_seed(0)).final
            )
        assert world.oracle(walked, prompts).mean() > 0.6


def gold(samples, prompts):
    return samples[:, 0]


LOOPS = {
    "ddpo": (ddpo, dict(num_prompts=32, group_size=1, num_minibatches=1, learning_rate=0.02), gold),
    "b2diffurl": (b2diffurl, dict(num_prompts=16, first_window=4, num_minibatches=2, learning_rate=0.02), gold),
    "constrained": (
        constrained, dict(num_prompts=64, thresholds=(2.0,), baseline="batch", learning_rate=0.02), [gold]
    ),
    "d3po": (d3po, dict(num_prompts=32, num_minibatches=1, learning_rate=0.02), gold),
    "prdp": (prdp, dict(num_prompts=4, group_size=16, beta=0.5, learning_rate=0.02), gold),
    "raft": (raft, dict(num_prompts=16, group_size=8, num_epochs=4, learning_rate=0.02), gold),
    "rwr": (rwr, dict(batch_size=128, num_updates=8, beta=1.0, learning_rate=0.02), gold),
    "dragon": (dragon, dict(num_prompts=32, num_updates=8, minibatch_size=32, learning_rate=0.02), gold),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_loops_that_know_no_flow_train_one(name):
    method, settings, reward = LOOPS[name]
    world = worlds.load("line", model="flow", num_steps=6)
    start = world.policy.network.residual.theta.detach().clone()
    config = method.Config(num_iterations=20, **settings)
    steps = list(method.train(world.policy, reward, world.prompts, config))
    moved = world.policy.network.residual.theta.detach() - start
    gain = world.sampler.policy_gradient  # d E[x_0] / d theta
    assert len(steps) == 20 and (gain @ moved.double()) > 0.05  # the reward is x_0 itself
