"""Consistency distillation: the closed forms of a Gaussian, a trained linear student, and the loop."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minialign import worlds
from minialign.methods import consistency_distillation as cd
from minialign.policies.consistency import ConsistencyPolicy
from minialign.worlds import gaussian

F64, M, S = torch.float64, 0.3, 0.5
TABLE = gaussian.scheduler().alphas_cumprod.to(F64)


def noise_pred(x, a):
    """The exact noise prediction of N(M, S^2)."""
    return (1 - a).sqrt() * (x - a.sqrt() * M) / (a * S**2 + 1 - a)


def exact(x, a):
    """f*(x, t), up to what is left of the noise at t = 0."""
    return M + S * (x - a.sqrt() * M) / (a * S**2 + 1 - a).sqrt()


def composed(t):
    """Slope of the map that DDIM steps of twenty make from t to 0: the distillation's fixed point."""
    grid, grid_next = cd.solver_grid(50)
    slope = torch.ones((), dtype=F64)
    for now, then in zip(grid[grid <= t], grid_next[grid <= t], strict=True):
        zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
        a, a_next = TABLE[now].view(1), TABLE[then].view(1)
        ends = [cd.ddim_jump(noise_pred(x, a), x, a, a_next) for x in (zero, one)]
        slope = slope * (ends[1] - ends[0]).squeeze()
    return slope


def test_the_grid_ends_at_timestep_zero():
    grid, grid_next = cd.solver_grid(50)
    assert grid[:2].tolist() == [19, 39] and grid_next[:2].tolist() == [0, 19]
    assert (grid[-1], grid_next[-1]) == (999, 979) and len(grid) == 50


def test_closed_forms_of_the_gaussian():
    """Checks 1 and 2 of the sheet: the exact map's slopes, and those of composed DDIM steps, 5 % off at the far end."""
    slopes = {259: 0.703063, 499: 0.561923, 759: 0.510087, 999: 0.500876}
    for t, slope in slopes.items():
        one, zero = (exact(torch.tensor(x, dtype=F64), TABLE[t]) for x in (1.0, 0.0))
        assert (one - zero).item() == pytest.approx(slope, abs=2e-6)
    fixed = {19: 0.955313, 99: 0.842847, 259: 0.673413, 499: 0.536055, 759: 0.485954, 999: 0.477035}
    for t, slope in fixed.items():
        assert composed(t).item() == pytest.approx(slope, abs=2e-6)


def test_an_exact_student_of_an_exact_solver_has_no_loss(generator):
    """Check 5: with x' on the same ODE trajectory, f* gives the same answer at both ends."""
    grid, grid_next = cd.solver_grid(50)
    x = torch.randn(50, generator=generator, dtype=F64)
    a, a_next = TABLE[grid], TABLE[grid_next]
    spread, spread_next = ((b * S**2 + 1 - b).sqrt() for b in (a, a_next))
    x_next = a_next.sqrt() * M + spread_next / spread * (x - a.sqrt() * M)
    assert cd.distance(exact(x, a), exact(x_next, a_next)).item() < 1e-25
    jumped = cd.ddim_jump(noise_pred(x, a), x, a, a_next)
    assert cd.distance(exact(x, a), exact(jumped, a_next)).item() > 1e-6  # a DDIM step is not the ODE


def test_distances_by_hand():
    prediction, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert cd.distance(prediction, target).item() == 0.5
    assert cd.distance(prediction, target, "huber", huber_c=0.75).item() == pytest.approx((1.25 - 0.75) / 2)


def test_the_average_follows_the_student():
    student = nn.Linear(3, 2)
    average = cd.EMA(SimpleNamespace(network=nn.Linear(3, 2)), 0.9)
    target = average.policy.network
    expected = [
        0.9 * t.detach() + 0.1 * s.detach() for t, s in zip(target.parameters(), student.parameters(), strict=True)
    ]
    average.update(student)
    for t, e in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(t.detach(), e)


class Linear(nn.Module):
    """noise_pred = k_t x + b_t, one pair a timestep: a student that can be the fixed point exactly."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1000, 2, dtype=F64))

    def forward(self, x, t):
        return self.table[t, :1] * x + self.table[t, 1:]


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=F64), requires_grad=False)

    def forward(self, x, t):
        return noise_pred(x, TABLE[t].unsqueeze(-1))


def line(network):
    from minialign.policies.diffusion import DiffusionPolicy

    return DiffusionPolicy(network, gaussian.scheduler(), latent_shape=(1,))


def data(n, generator):
    return M + S * torch.randn(n, 1, generator=generator, dtype=F64), [""] * n


def slopes(policy):
    grid, _ = cd.solver_grid(50)
    condition = policy.encode([""] * 50)
    ends = [policy.denoise(torch.full((50, 1), x, dtype=F64), grid, condition) for x in (0.0, 1.0)]
    return (ends[1] - ends[0]).detach().squeeze(-1)


def test_a_linear_student_learns_the_composition_of_ddim_steps():
    """Check 2: not the exact map. The slopes of fifty timesteps, learned by the real loop from the real loss."""
    student = ConsistencyPolicy.from_diffusion(line(Linear()))
    config = cd.Config(num_iterations=1500, batch_size=512, learning_rate=2e-2, ema_decay=0.9)
    for _ in cd.train(student, line(Teacher()), data, config, torch.Generator().manual_seed(0)):
        pass
    found, target = slopes(student), torch.stack([composed(t) for t in cd.solver_grid(50)[0].tolist()])
    assert (found - target).abs().max() < 0.01
    assert abs(found[-1].item() - 0.500876) > 0.015  # the exact ODE is farther away than the tolerance


def test_without_the_targets_own_time_nothing_ties_the_student_to_the_data(monkeypatch):
    """Trap 2: with t_n in the target too, f is never asked at the boundary, and the answer is wrong everywhere."""
    grid, _ = cd.solver_grid(50)
    right = ConsistencyPolicy.denoise

    def wrong_time(self, states, timesteps, condition, reference=False):
        return right(
            self, states, (timesteps + 20).clamp(max=999) if not torch.is_grad_enabled() else timesteps, condition
        )

    student = ConsistencyPolicy.from_diffusion(line(Linear()))
    config = cd.Config(num_iterations=600, batch_size=512, learning_rate=2e-2, ema_decay=0.9)
    with monkeypatch.context() as patched:
        patched.setattr(ConsistencyPolicy, "denoise", wrong_time)
        for _ in cd.train(student, line(Teacher()), data, config, torch.Generator().manual_seed(0)):
            pass
    target = torch.stack([composed(t) for t in grid.tolist()])
    assert (slopes(student) - target).abs().mean() > 0.1


def test_the_target_gets_no_gradient_and_the_teacher_does_not_move():
    world = worlds.load("compass")
    student = ConsistencyPolicy.from_diffusion(world.policy)
    student.network.requires_grad_(True)
    target = copy.copy(student)
    target.network = copy.deepcopy(student.network).requires_grad_(True)
    loss = cd.distillation_loss(
        student, target, world.policy, *world.real(32, torch.Generator().manual_seed(0)), cd.Config(),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    loss.backward()
    assert all(p.grad is None for p in target.network.parameters())
    assert all(p.grad is None for p in world.policy.network.parameters())
    assert any(p.grad.abs().sum() > 0 for p in student.parameters())


def digits_pair():
    world = worlds.load("digits")
    return world, world.policy, ConsistencyPolicy.from_diffusion(world.policy)


def test_no_guidance_is_the_conditional_teacher_and_equal_teachers_ignore_it():
    """Check 6."""
    _, teacher, _ = digits_pair()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([99, 499, 759, 999])
    condition = teacher.encode(["two"] * 4, guided=True)
    plain = teacher.output_at(x, t, condition)
    for g, same in ((1.0, True), (4.0, False)):
        guided = teacher.output_at(x, t, condition, guidance_scale=torch.full((4,), g))
        assert torch.allclose(guided, plain, atol=1e-5) == same
    condition.unconditional = condition.inputs
    equal = teacher.output_at(x, t, condition, guidance_scale=torch.full((4,), 4.0))
    torch.testing.assert_close(equal, plain, atol=1e-5, rtol=1e-5)


def trained(config):
    """(weights, last step) of a student in compass."""
    world = worlds.load("compass")
    student = ConsistencyPolicy.from_diffusion(world.policy)
    *_, last = cd.train(student, world.policy, world.real, config)
    return torch.cat([p.detach().flatten() for p in student.network.parameters()]), last


def test_costs_and_metrics():
    config = cd.Config(num_iterations=5, batch_size=16)
    weights, step = trained(config)
    assert step.network_evaluations == 5 * 16 * (3 + 1 + 1)  # student, target, teacher
    assert not torch.equal(weights, trained(dataclasses.replace(config, metric="huber"))[0])


def test_a_range_of_one_is_no_guidance_even_of_a_teacher_that_samples_with_some():
    """A wrapped pipeline's own scale is 5: the range says what is distilled, and (1, 1) is the default."""

    def weights(guidance_scale):
        world, teacher, student = digits_pair()
        teacher.guidance_scale = guidance_scale

        def latents(n, generator):
            images, prompts = world.real(n, generator)
            return 2 * images - 1, prompts

        step = next(cd.train(student, teacher, latents, cd.Config(num_iterations=1, batch_size=4)))
        assert step.network_evaluations == 4 * (3 + 1 + 1)
        return torch.cat([p.detach().flatten() for p in student.network.parameters()])

    assert torch.equal(weights(1.0), weights(5.0))


def test_impossible_settings_are_refused():
    world, teacher, student = digits_pair()

    def run(**change):
        return next(cd.train(student, teacher, world.real, cd.Config(**change)))

    with pytest.raises(ValueError, match="metric is 'lpips'; expected one of 'l2', 'huber'"):
        run(metric="lpips")
    with pytest.raises(ValueError, match="network cannot be told the scale"):
        run(guidance_range=(1.0, 4.0))
    with pytest.raises(ValueError, match="expected \\(lowest g, highest g\\)"):
        run(guidance_range=(4.0, 1.0))
    fixed = cd.Config(num_iterations=1, batch_size=4, guidance_range=(2.0, 2.0))

    def latents(n, generator):
        images, prompts = world.real(n, generator)
        return 2 * images - 1, prompts

    step = next(cd.train(student, teacher, latents, fixed))
    assert step.network_evaluations == 4 * (3 + 1 + 2)  # a guided teacher counts twice
