"""Every kernel compiles without a graph break, gives the same numbers compiled, and works under torch.func.vmap.

jaxtyping's wrapper breaks the graph, so it is switched off here; the annotations are run by all the other tests.
"""

import math
import shutil

import jaxtyping
import pytest
import torch

from minialign import kernels
from minialign.kernels import Level
from minialign.methods import (
    b2diffurl,
    consistency_distillation,
    d3po,
    diffusion_nft,
    find_noise,
    grpo,
    par,
    prdp,
    pso,
    reward_model,
    rlcm,
    rpo_subject,
    smpo,
    teleport,
)

N = 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


X, Y, Z = random(N, 2, 3, seed=1), random(N, 2, 3, seed=2), random(N, 2, 3, seed=3)
STD, A, A_NEXT = f64(0.3, 0.5, 1, 2, 3), f64(0.1, 0.3, 0.5, 0.7, 0.9), f64(0.2, 0.5, 0.6, 0.8, 0.95)
LOG_P, LOG_Q, REWARDS = random(N, seed=4), random(N, seed=5), random(N, seed=6)
GROUP = torch.tensor([0, 3, 0, 3, 3])


def step(prediction_type, **given):
    def call(output, state, a, a_next):
        kwargs = {"prediction_type": prediction_type, "reduction": "mean", **given}
        return kernels.ddim_step(output, state, a, a_next, 0.8, **kwargs)

    return call


CASES = {
    "gaussian_log_prob": (lambda x, m, s: kernels.gaussian_log_prob(x, m, s, "sum"), (X, Y, STD)),
    "gaussian_kl": (lambda x, m, s: kernels.gaussian_kl(x, m, s, "mean"), (X, Y, STD)),
    "diagonal_log_prob": (lambda x, m, s: kernels.diagonal_log_prob(x, m, s, "mean"), (X, Y, Z)),
    "standard_normal_kl": (lambda m, s: kernels.standard_normal_kl(m, s, "sum"), (X, Y)),
    "gaussian_step": (
        lambda x, m, s: kernels.gaussian_step(x, m, s, next=None, noise=Z, reduction="mean"),
        (X, Y, STD),
    ),
    "squared_error": (lambda x, y: kernels.squared_error(x, y, "mean"), (X, Y)),
    "add_noise": (lambda x, z, a: kernels.add_noise(x, z, a), (X, Y, A)),
    "prediction_target": (lambda x, z, a: kernels.prediction_target(x, z, a, "v_prediction"), (X, Y, A)),
    "predict": (lambda o, s, a: kernels.predict(o, s, a, "v_prediction"), (X, Y, A)),
    "ddim_std": (lambda a, b: kernels.ddim_std(a, b, 0.8), (A, A_NEXT)),
    "ddim_step samples": (step("epsilon", noise=Z), (X, Y, A, A_NEXT)),
    "ddim_step scores": (step("v_prediction", next=Z), (X, Y, A, A_NEXT)),
    "ddim_step x0": (step("sample"), (X, Y, A, A_NEXT)),
    "posterior_std": (
        lambda a, b: kernels.posterior_std((b.sqrt(), (1 - b).sqrt()), (a.sqrt(), (1 - a).sqrt())),
        (A, A_NEXT),
    ),
    "ddim_alpha_bars": (lambda table, t: kernels.ddim_alpha_bars(table, t, 2, 0.99), (A, torch.tensor([4, 3, 1]))),
    "add_flow_noise": (lambda x, z, t: kernels.add_flow_noise(x, z, t), (X, Y, A)),
    "flow_diffusion": (lambda t: kernels.flow_diffusion(t, 0.7, "flow_grpo", t[1]), (A,)),
    "flow_diffusion constant": (lambda t: kernels.flow_diffusion(t, 0.3, "constant", t[1]), (A,)),
    "flow_step samples": (
        lambda v, x, t, u, s: kernels.flow_step(v, x, u, t, s, reduction="mean", noise=Z),
        (X, Y, A, A_NEXT, STD),
    ),
    "flow_step scores": (
        lambda v, x, t, u, s: kernels.flow_step(v, x, u, t, s, reduction="sum", next=Z),
        (X, Y, A, A_NEXT, STD),
    ),
    "variance_preserving_of": (lambda t: kernels.variance_preserving_of(t), (A,)),
    "means": (lambda p, q: kernels.means({"p": p, "q": q}), (LOG_P, LOG_Q)),
    "weighted_sums": (lambda p, q: kernels.weighted_sums({"p": p}, q), (LOG_P, LOG_Q)),
    "clipped_surrogate": (lambda p, q, a: kernels.clipped_surrogate(p, q, a, 0.2), (LOG_P, LOG_Q, REWARDS)),
    "group_advantages": (lambda r, g: kernels.group_advantages(r, g), (REWARDS, GROUP)),
    "group_advantages centred": (lambda r, g: kernels.group_advantages(r, g, scale=False), (REWARDS, GROUP)),
    "group_ranks": (lambda r, g, t: kernels.group_ranks(r, g, t), (REWARDS.round(), GROUP, LOG_P)),
    "whiten": (lambda x: kernels.whiten(x), (X,)),
    "kl_k1": (lambda u: kernels.kl_k1(u), (LOG_P,)),
    "kl_k2": (lambda u: kernels.kl_k2(u), (LOG_P,)),
    "kl_k3": (lambda u: kernels.kl_k3(u), (LOG_P,)),
}
TIMESTEPS = torch.tensor([0, 1, 19, 499, 999])
CASES |= {
    "boundary_scalings": (lambda t: kernels.boundary_scalings(t), (TIMESTEPS,)),
    "consistency_function": (lambda o, x, a, t: kernels.consistency_function(o, x, a, t), (X, Y, A, TIMESTEPS)),
    "consistency_step samples": (
        lambda f, a, s: kernels.consistency_step(f, a, s, reduction="mean", noise=Z), (X, A_NEXT, STD)
    ),
    "consistency_step scores": (
        lambda f, a, s: kernels.consistency_step(f, a, s, reduction="sum", next=Z), (X, A_NEXT, STD)
    ),
    "edm_scalings": (lambda s: kernels.edm_scalings(s, 0.5), (STD,)),
    "edm_denoised": (lambda o, x, s: kernels.edm_denoised(o, x, s, 0.5), (X, Y, STD)),
    "guidance_embedding": (lambda w: kernels.guidance_embedding(w, 9), (REWARDS,)),
    "lcm_guidance": (lambda g: kernels.lcm_guidance(g), (REWARDS,)),
    "diffusers_guidance": (lambda w: kernels.diffusers_guidance(w), (REWARDS,)),
}  # fmt: skip
TOKENS, VALID = torch.tensor([[0, 1, 2]] * N), torch.arange(3) < torch.tensor([[3], [1], [2], [3], [1]])
VALUE_HEADS = (random(N, 3, 2, seed=21), random(N, 3, 2, seed=22), VALID)
CASES |= {
    "token_log_probs": (lambda x, t: kernels.token_log_probs(x, t, 0.7), (random(N, 3, 4, seed=20), TOKENS)),
    "token_entropy": (lambda x: kernels.token_entropy(x, 0.7), (random(N, 3, 4, seed=20),)),
    "sample_tokens": (lambda x, u: kernels.sample_tokens(x, u, 0.7), (random(N, 4, seed=20), A)),
    "masked_mean": (lambda x, m: kernels.masked_mean(x, m), (X[:, 0], VALID)),
    "masked_mean of rows": (lambda x, m: kernels.masked_mean(x, m, dim=1), (X[:, 0], VALID)),
    "masked_whiten": (lambda x, m: kernels.masked_whiten(x, m), (X[:, 0], VALID)),
    "masked_whiten kept": (
        lambda x, m: kernels.masked_whiten(x, m, shift_mean=False, correction=1), (X[:, 0], VALID)
    ),
    "last_token": (lambda m: kernels.last_token(m), (VALID,)),
    "token_rewards": (
        lambda s, p, q, m: kernels.token_rewards(s, p, q, m, 0.3), (REWARDS, X[:, 0], Y[:, 0], VALID)
    ),
    "gae": (lambda r, v, m: kernels.gae(r, v, m, 0.99, 0.95), (X[:, 0], Y[:, 0], VALID)),
    "gae of heads": (lambda r, v, m: kernels.gae(r, v, m), VALUE_HEADS),
    "standardise_heads": (lambda x, m: kernels.standardise_heads(x, m), (VALUE_HEADS[0], VALID)),
    "group_baselines": (lambda x, m, g: kernels.group_baselines(x, m, g), (VALUE_HEADS[0], VALID, GROUP)),
    "clipped_value_loss": (lambda v, o, g: kernels.clipped_value_loss(v, o, g, 0.2), (X, Y, Z)),
    "denoising_log_ratio": (lambda e, r: kernels.denoising_log_ratio(e, r), (X, Y)),
    "dpo_loss": (lambda c, r: kernels.dpo_loss(c, r, 0.7), (LOG_P, LOG_Q)),
    "error_weight": (lambda a, b: kernels.error_weight("v_prediction", "sample", a, b), (A, A_NEXT)),
    "clipped_log_ratio": (lambda u: kernels.clipped_log_ratio(u, 0.2), (LOG_P,)),
    "sequence_log_ratio": (lambda p, q, m: kernels.sequence_log_ratio(p, q, m, "mean"), (X, Y, (Z > 0).double())),
    "soft_label_loss": (kernels.soft_label_loss, (LOG_P, LOG_Q.sigmoid())),
    "hinge_loss": (kernels.hinge_loss, (LOG_P,)),
    "ipo_loss": (lambda c, r: kernels.ipo_loss(c, r, 0.7), (LOG_P, LOG_Q)),
    "pair_accuracy": (kernels.pair_accuracy, (LOG_P, LOG_Q)),
    "preference_probability": (lambda d: kernels.preference_probability(d, 2.0, 0.3), (LOG_P,)),
    "transport": (lambda e, x, a, b: kernels.transport(e, x, (a, b), (b, a)), (X, Y, A, A_NEXT)),
    "kto_loss": (lambda u, y, z: kernels.kto_loss(u, y, z, 0.7), (LOG_P, (LOG_Q > 0).double(), LOG_Q[0])),
    "kto_reference_point": (lambda u: kernels.kto_reference_point(u, 0.7), (LOG_P,)),
}  # fmt: skip
Z_SCORES = random(4, 3, seed=7)
FLAT, VALUES = random(N, 6, seed=8), random(2, 3, seed=9) ** 2
GAUSSIAN = (random(6, seed=10), random(6, 3, seed=11), VALUES[0])
MIXTURE = (random(2, seed=10), random(2, 6, seed=11), random(2, 6, 3, seed=12), VALUES)
VP, EDM = Level.variance_preserving, Level.edm(0.7)
CASES |= {
    "gaussian_score": (lambda x, *g: kernels.gaussian_score(x, EDM, *g), (FLAT, *GAUSSIAN)),
    "gaussian_denoised": (lambda x, *g: kernels.gaussian_denoised(x, EDM, *g), (FLAT, *GAUSSIAN)),
    "gaussian_flow": (lambda x, a, b, *g: kernels.gaussian_flow(x, VP(a), VP(b), *g), (FLAT, A, A_NEXT, *GAUSSIAN)),
    "mixture_score": (lambda x, *m: kernels.mixture_score(x, EDM, *m), (FLAT, *MIXTURE)),
    "mixture_score of rows": (lambda x, a, *m: kernels.mixture_score(x, VP(a), *m), (FLAT, A, *MIXTURE)),
    "mixture_denoised": (lambda x, *m: kernels.mixture_denoised(x, EDM, *m), (FLAT, *MIXTURE)),
    "mixture_log_prob": (lambda x, *m: kernels.mixture_log_prob(x, EDM, *m), (FLAT, *MIXTURE)),
    "mixture_responsibilities": (lambda x, *m: kernels.mixture_responsibilities(x, EDM, *m), (FLAT, *MIXTURE)),
    "delta_score": (lambda x, data: kernels.delta_score(x, EDM, data), (FLAT, random(7, 6, seed=12))),
}
PATHS = tuple(random(2, 3, 4, seed=s) for s in (31, 32, 33))
ERRORS = tuple(random(N, seed=s) ** 2 for s in (41, 42, 43, 44))
LSC, REFERENCES = par.Config("lsc"), random(N, 4, seed=13)
KERNELS_OF_METHODS = {
    "grpo.advantages_of": (lambda r, g: grpo.advantages_of(r, g, "batch", 5.0), (REWARDS, GROUP)),
    "grpo.extremes": (lambda r, g, u: grpo.extremes(r, g, 2, u), (REWARDS, GROUP, LOG_P)),
    "diffusion_nft.optimality": (lambda r, g: diffusion_nft.optimality(r, g, 5.0), (REWARDS, GROUP)),
    "diffusion_nft.contrastive_loss": (
        lambda v, o, x, t, r: diffusion_nft.contrastive_loss(v, o, x, t, Z, Z + 1, r, 0.5, "adaptive"),
        (X, Y, Z, A, A_NEXT),
    ),
    "b2diffurl.branch_advantage": (lambda z: b2diffurl.branch_advantage(z), (Z_SCORES,)),
    "b2diffurl.select_extremes": (lambda z: b2diffurl.select_extremes(z, 0.5, -0.5), (Z_SCORES,)),
    "d3po.step_loss": (lambda c, r: d3po.step_loss(c, r, 0.1, 0.3), (LOG_P, LOG_Q)),
    "d3po.step_loss without clip": (lambda c, r: d3po.step_loss(c, r, 0.7, math.inf), (LOG_P, LOG_Q)),
    "d3po.pareto": (lambda a, b: d3po.pareto(a, b), (Z_SCORES[:2], Z_SCORES[2:])),
    "prdp.differences": (lambda x: prdp.differences(x), (Z_SCORES,)),
    "prdp.prdp_loss": (lambda p, q, ref, r: prdp.prdp_loss(p, q, ref, r, 0.7, 0.5), (*PATHS, Z_SCORES[:2])),
    "prdp.prdp_loss with ties": (
        lambda p, q, ref, r: prdp.prdp_loss(p, q, ref, r, 0.7, math.inf, "mean", ties=True),
        (*PATHS, Z_SCORES[:2]),
    ),
    "prdp.prediction": (lambda u, r: prdp.prediction(u, r, 0.7), (Z_SCORES[:2], Z_SCORES[2:])),
    "pso.online_loss": (
        lambda p, q, r: pso.online_loss(p, q, (r > 0).to(p.dtype), 0.7, 0.5)[0],
        (PATHS[0], PATHS[1], REWARDS[:3]),
    ),
    "pso.offline_loss": (lambda *e: pso.offline_loss(*e, 0.7, 0.5), ERRORS),
    "pso.reference_free_loss": (lambda c, r: pso.reference_free_loss(c, r, 5.0, 0.1, 0.5), ERRORS[:2]),
    "rlcm.rebel_loss": (lambda u, a: rlcm.rebel_loss(u, a, 0.7), (Z_SCORES[:2], Z_SCORES[2:])),
    "smpo.smooth_weights": (lambda p, q: smpo.smooth_weights(p, q, -3.0, 3.0, 10.0), (LOG_P, LOG_Q)),
    "smpo.smooth_labels": (lambda p, q: smpo.smooth_labels(p, q, -3.0, 3.0), (LOG_P, LOG_Q)),
    "consistency_distillation.ddim_jump": (
        lambda o, x, a, b: consistency_distillation.ddim_jump(o, x, a, b),
        (X, Y, A, A_NEXT),
    ),
    "consistency_distillation.distance": (lambda x, y: consistency_distillation.distance(x, y, "huber"), (X, Y)),
    "teleport.explained_variance": (lambda x, y: teleport.explained_variance(x, y, 0.3), (X, Y)),
    "par.shape_reward": (lambda r, refs: par.shape_reward(r, refs), (LOG_P, REFERENCES)),
    "par.shape_reward lsc": (lambda r, refs: par.shape_reward(r, refs, LSC), (LOG_P, REFERENCES)),
    "reward_model.bradley_terry_loss": (lambda p, q: reward_model.bradley_terry_loss(p, q, 0.1), (LOG_P, LOG_Q)),
    "reward_model.odin_loss": (
        lambda q, n, t, w: reward_model.odin_loss(q, n, t, w),
        tuple(random(2, N, seed=s) for s in (14, 15, 16, 17)),
    ),
    "find_noise.find_loss": (
        lambda p, q, r, kl: find_noise.find_loss(p, q, r, kl, 0.2, 0.3),
        (LOG_P, LOG_Q, REWARDS, A),
    ),
    "find_noise.moment_distance": (lambda m, s: find_noise.moment_distance(m, s, "mean"), (X, Y)),
    "rpo_subject.harmonic_mean": (lambda i, t: rpo_subject.harmonic_mean(i, t, 0.3), (A, A_NEXT)),
    "rpo_subject.subject_losses": (
        lambda r, g, b, c, p: rpo_subject.subject_losses(r, g, b, c, p, 0.7),
        (STD, A, REWARDS, LOG_P, A_NEXT),
    ),
    "b2diffurl.pairwise_loss": (lambda p, q: b2diffurl.pairwise_loss(p, q, 0.7), (LOG_P, LOG_Q)),
}
CASES |= KERNELS_OF_METHODS


@pytest.fixture(autouse=True)
def _annotations_off():
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def test_every_kernel_has_a_case():
    helpers = {"Level", "StepOut", "at_least_float32", "expand_as", "karras_sigmas", "lcm_timesteps", "same_shape"}
    assert {name.split()[0] for name in CASES.keys() - KERNELS_OF_METHODS.keys()} == set(kernels.__all__) - helpers


@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name):
    fn, args = CASES[name]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), fn(*args))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    """One kernel through the real code generator; one process and no precompiled headers, or that alone takes 20 s."""
    fn, args = CASES["clipped_surrogate"]
    cheap = {"compile_threads": 1, "cpp_cache_precompile_headers": False}
    torch.testing.assert_close(torch.compile(fn, fullgraph=True, options=cheap)(*args), fn(*args))


VMAP = {name: case for name, case in CASES.items() if name != "ddim_alpha_bars"}


@pytest.mark.parametrize("name", VMAP)
def test_vmap_is_a_loop(name):
    """Over a stack of two problems; integer arguments (group ids) are stacked too."""
    fn, args = CASES[name]
    stacked = [torch.stack([arg, arg.flip(0) if not arg.is_floating_point() else 0.9 * arg]) for arg in args]
    got = torch.func.vmap(fn)(*stacked)
    for row in range(2):
        expected = fn(*(arg[row] for arg in stacked))
        leaves = torch.utils._pytree.tree_leaves(got)
        for mine, theirs in zip(leaves, torch.utils._pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(mine[row], theirs)
