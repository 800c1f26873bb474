"""A user runs the kernels without shape annotations, and torch makes (n, n) of (n,) and (n, 1), in silence."""

import jaxtyping
import pytest
import torch

from minialign import kernels as k
from minialign.kernels import edm_denoised
from minialign.methods.teleport import explained_variance

N = 3
rows, column, table = torch.rand(N), torch.rand(N, 1), torch.rand(N, N)
levels, mask = torch.linspace(0.2, 0.8, N), torch.ones(N, N, dtype=torch.bool)
group = torch.zeros(N, dtype=torch.long)
tokens = torch.zeros(N, N, dtype=torch.long)

WRONG = {
    "gaussian_log_prob": lambda: k.gaussian_log_prob(table, column, rows, "sum"),
    "gaussian_log_prob std": lambda: k.gaussian_log_prob(table, table, column, "sum"),
    "gaussian_kl": lambda: k.gaussian_kl(table, column, rows, "sum"),
    "gaussian_kl std": lambda: k.gaussian_kl(table, table, column, "sum"),
    "gaussian_step noise": lambda: k.gaussian_step(table, table, rows, next=None, noise=column, reduction="sum"),
    "gaussian_step next": lambda: k.gaussian_step(table, table, rows, next=column, noise=None, reduction="sum"),
    "squared_error": lambda: k.squared_error(rows, column, "mean"),
    "predict": lambda: k.predict(column, table, levels, "epsilon"),
    "predict level": lambda: k.predict(table, table, levels[:, None], "epsilon"),
    "add_noise": lambda: k.add_noise(table, column, levels),
    "prediction_target": lambda: k.prediction_target(table, column, levels, "v_prediction"),
    "ddim_step": lambda: k.ddim_step(table, table, levels, levels[:, None], 1.0, reduction="sum"),
    "consistency_function": lambda: k.consistency_function(table, table, levels[:, None], group),
    "consistency_function times": lambda: k.consistency_function(table, table, levels, group[:, None]),
    "consistency_step": lambda: k.consistency_step(table, levels[:, None], rows, reduction="sum"),
    "edm_denoised": lambda: edm_denoised(column, table, levels, 0.5),
    "edm_denoised level": lambda: edm_denoised(table, table, levels[:, None], 0.5),
    "clipped_surrogate": lambda: k.clipped_surrogate(rows, column, rows, 0.2),
    "weighted_sums": lambda: k.weighted_sums({"loss": rows}, column),
    "group_advantages": lambda: k.group_advantages(column, group),
    "token_log_probs": lambda: k.token_log_probs(torch.rand(N + 1, N, 5), tokens),
    "sample_tokens": lambda: k.sample_tokens(torch.rand(N, 5), column),
    "masked_mean": lambda: k.masked_mean(column, mask),
    "masked_whiten": lambda: k.masked_whiten(rows, mask),
    "standardise_heads": lambda: k.standardise_heads(torch.rand(N, 1, 2), mask),
    "group_baselines": lambda: k.group_baselines(torch.rand(N, 1, 2), mask, group),
    "token_rewards": lambda: k.token_rewards(column, table, table, mask, 0.1),
    "token_rewards reference": lambda: k.token_rewards(rows, table, column, mask, 0.1),
    "gae": lambda: k.gae(table, torch.rand(N, N, N), mask),
    "gae mask": lambda: k.gae(table, table, mask[:, :1]),
    "clipped_value_loss": lambda: k.clipped_value_loss(rows, rows, column, 0.2),
    "denoising_log_ratio": lambda: k.denoising_log_ratio(rows, column),
    "dpo_loss": lambda: k.dpo_loss(rows, column, 1.0),
    "kto_loss": lambda: k.kto_loss(rows, column, rows[0], 1.0),
    "explained_variance": lambda: explained_variance(rows, column),
}


@pytest.fixture
def unannotated():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_would_be_broadcast_are_refused(name):
    with pytest.raises(ValueError, match="expected one"):
        WRONG[name]()
