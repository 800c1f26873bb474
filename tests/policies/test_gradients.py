"""Differentiable sampling: the gradient of a rollout against finite differences, the linear-Gaussian closed form, and
products of step matrices written from the definition of `grad_steps`; all in float64."""

import pytest
import torch
from conftest import sd_scheduler, stable_diffusion

from minialign import worlds
from minialign.exact import LinearGaussianSampler
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy

NUM_STEPS = 5


def line(**settings):
    """(policy, its closed form) in float64; the scalar of each step has moved from 0."""
    world = worlds.load("line", mean=0.3, std=0.5, num_steps=NUM_STEPS, **settings)
    policy = world.policy
    policy.network.double()
    policy.network.alphas_cumprod.copy_(policy.scheduler.alphas_cumprod)
    policy.set_num_steps(NUM_STEPS)
    policy.network.residual.theta.data.copy_(torch.linspace(-0.2, 0.3, NUM_STEPS))
    table = policy.scheduler.alphas_cumprod
    return policy, LinearGaussianSampler(0.3, 0.5, NUM_STEPS, policy.eta, table)


def theta_gradient(policy, **settings):
    policy.network_evaluations = 0
    noise = policy.draw_noise(3, torch.Generator().manual_seed(0))
    final = policy.rollout(["a number"] * 3, noise, density=policy.std.all().item(), **settings).final
    assert final.dtype == torch.float64
    theta = policy.network.residual.theta
    return torch.autograd.grad(final.mean(), theta, allow_unused=True)[0]


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
def test_the_whole_gradient_is_the_closed_form(eta):
    policy, exact = line(eta=eta)
    gradient = theta_gradient(policy)
    torch.testing.assert_close(gradient, exact.policy_gradient, rtol=1e-6, atol=0)  # the table is rounded to float32
    assert gradient.abs().min() > 1e-3
    assert policy.network_evaluations == 3 * 3 * NUM_STEPS


@pytest.mark.parametrize("kept", range(NUM_STEPS + 1))
def test_truncation_is_exact(kept):
    """The last K entries are those of the whole gradient, the others zero; a kept step counts 3 evaluations, else 1."""
    policy, exact = line()
    gradient = theta_gradient(policy, grad_steps=kept) if kept else None
    if kept:
        expected = exact.policy_gradient * (torch.arange(NUM_STEPS) >= NUM_STEPS - kept)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
        assert policy.network_evaluations == 3 * (NUM_STEPS + 2 * kept)
    traj = policy.rollout(["a number"], grad_steps=kept, generator=torch.Generator().manual_seed(0))
    assert traj.final.requires_grad == (kept > 0)
    assert not traj.log_probs.requires_grad  # data, whatever is kept
    with torch.no_grad():
        assert torch.equal(traj.final, policy.rollout(["a number"], generator=torch.Generator().manual_seed(0)).final)


@pytest.mark.parametrize("subset", [(2,), (0,), (4,), (1, 3), (0, 2, 3), tuple(range(5))])
def test_any_subset(subset):
    """Behind the first graphed step the state passes through A (graphed) or through C alone:
    with the network's output constant, dx'/dx = d mean / d denoised / sqrt(a) = sqrt(a' / a)."""
    policy, exact = line(eta=0.6)
    plain = (exact.alpha_bar_next / exact.alpha_bar).sqrt()
    expected = torch.zeros(NUM_STEPS, dtype=torch.float64)
    for i in subset:
        factor = exact.gain[i]
        for j in range(i + 1, NUM_STEPS):
            factor = factor * (exact.slope[j] if j in subset else plain[j])
        expected[i] = factor
    gradient = theta_gradient(policy, grad_steps=torch.tensor(subset))
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    assert policy.network_evaluations == 3 * (NUM_STEPS + 2 * len(subset))


def test_a_late_start_counts_its_own_calls():
    policy, exact = line()
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    for first, kept in ((2, 3), (2, 1), (3, [4])):
        traj = policy.rollout(["a number"] * 2, noise, states=noise[:, 0], first=first, grad_steps=kept)
        (gradient,) = torch.autograd.grad(traj.final.mean(), policy.network.residual.theta)
        start = NUM_STEPS - kept if isinstance(kept, int) else kept[0]
        expected = exact.policy_gradient * (torch.arange(NUM_STEPS) >= start)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def consistency_line(num_steps, terminal_std=0.0):
    policy, _ = line()
    student = ConsistencyPolicy.from_diffusion(policy, num_steps=num_steps)
    student.terminal_std = terminal_std
    student.network.requires_grad_(True)
    return student


CALLS_AND_KEPT = [
    (n, std, kept) for n, std in ((1, 0.0), (4, 0.0), (4, 0.1)) for kept in (None, 0, 1, 2) if (kept or 0) <= n
]


@pytest.mark.parametrize(("num_steps", "terminal_std", "kept"), CALLS_AND_KEPT)
def test_consistency_policy(num_steps, terminal_std, kept):
    """f is affine in x and theta, with slopes by finite differences of f itself; calls chain as x' = s f(x) + std z.

    The deterministic last call counts as a step, and with one call alone there is no density.
    """
    policy = consistency_line(num_steps, terminal_std)
    theta, residual = policy.network.residual.theta, policy.network.residual
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    condition = policy.encode(["a number"] * 2)

    def slope(change):  # of f at each call, exact: f is affine
        with torch.no_grad():
            x = torch.zeros(2, 1, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                moved = change(sign)
                values.append(
                    [policy.denoise(x + moved, t.expand(2), condition)[0, 0].item() for t in policy.timesteps]
                )
                if moved == 0:
                    theta.add_(-sign)
        return (torch.tensor(values[0]) - torch.tensor(values[1])) / 2

    def shift_theta(sign):
        theta.data.add_(sign)
        return 0

    of_x, of_theta = slope(lambda sign: sign), slope(shift_theta)
    signal, calls = policy._signal.tolist(), num_steps
    graphed = range(calls) if kept is None else range(calls - kept, calls)
    expected = torch.zeros_like(theta.data)
    for i in graphed:
        factor = signal[i] * of_theta[i].item()
        for j in range(i + 1, calls):
            factor *= signal[j] * of_x[j].item()
        expected[residual.step_of[policy.timesteps[i]]] += factor
    policy.network_evaluations = 0
    traj = policy.rollout(condition, noise, grad_steps=kept, density=policy.num_actions > 0)
    assert policy.network_evaluations == 2 * (calls + 2 * len(graphed))
    assert traj.states.shape[1] == policy.num_actions + 1
    assert traj.final.requires_grad == (kept != 0)
    if kept != 0:
        (gradient,) = torch.autograd.grad(traj.final.mean(), theta)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
        assert gradient.abs().max() > 1e-3


def nonlinear(tmp_path):
    """A random Stable Diffusion in float64, but its CLIP, which transformers 4 cannot call in it, in float32."""
    pipe = stable_diffusion(tmp_path)
    pipe.unet.double()
    pipe.vae.double()
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=2.0)
    encode = policy._encoder
    policy._encoder = lambda prompts: [{name: x.double() for name, x in part.items()} for part in encode(prompts)]
    return policy


def test_finite_differences_through_the_sampler_and_the_decoder(tmp_path):
    """A reward of decoded pixels, along one random direction of all weights, and along one of the first noise."""
    policy = nonlinear(tmp_path)
    policy.train_all_weights()
    generator = torch.Generator().manual_seed(0)
    noise = policy.draw_noise(2, generator)
    assert noise.dtype == torch.float64
    weights = policy.parameters()
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in weights]
    start, towards = noise[:, 0].clone().requires_grad_(), torch.randn(noise[:, 0].shape, generator=generator).double()

    def reward(grad_steps=None):
        final = policy.rollout(["abc", "de"], noise, states=start, grad_steps=grad_steps).final
        return (policy.decode(final / 10) ** 2).mean()  # small latents: no pixel is clamped

    gradients = torch.autograd.grad(reward(), [start, *weights], allow_unused=True)
    slopes = (
        (gradients[0] * towards).sum(),
        sum((g * d).sum() for g, d in zip(gradients[1:], direction, strict=True) if g is not None),
    )
    values, h = [], 1e-5
    with torch.no_grad():
        for sign in (1, -1):
            start += sign * h * towards
            values.append(reward().item())
            start -= sign * h * towards
        for sign in (1, -1):
            [p.add_(sign * h * d) for p, d in zip(weights, direction, strict=True)]
            values.append(reward().item())
            [p.sub_(sign * h * d) for p, d in zip(weights, direction, strict=True)]
    by_differences = (values[0] - values[1]) / (2 * h), (values[2] - values[3]) / (2 * h)
    for slope, expected in zip(slopes, by_differences, strict=True):
        assert abs(expected) > 1e-5  # a gradient that is silently zero would agree with nothing to see
        assert slope.item() == pytest.approx(expected, rel=1e-5)
    # Cut behind the noise, it is data; the weights still learn from the last call.
    gradients = torch.autograd.grad(reward(grad_steps=1), [start, *weights], allow_unused=True)
    assert gradients[0] is None and any(g is not None and g.abs().max() > 0 for g in gradients[1:])


def test_samples_carry_no_gradient_and_impossible_steps_are_named(sd):
    policy, _ = line()
    assert not policy.sample(["a number"]).requires_grad
    for wrong, message in [
        (6, r"grad_steps is 6; this run has 0 to 5"), (-1, "grad_steps is -1"),
        ([1, 7], r"grad_steps names step 7; this run calls the network at \[0, 1, 2, 3, 4\]"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            policy.rollout(["a number"], grad_steps=wrong)
    with pytest.raises(ValueError, match=r"names step 1; this run calls the network at \[2, 3, 4\]"):
        policy.rollout(["a number"], states=torch.zeros(1, 1), first=2, grad_steps=[1])
    quiet = DiffusionPolicy(policy.network, sd_scheduler(), latent_shape=(1,), num_steps=NUM_STEPS, eta=0.0)
    assert quiet.rollout(["a number"], density=False).log_probs.shape == (1, 0)
