"""PPO and its critic-free relatives: by hand, invariances of the loop, and the exact optimum of an enumerable world."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from minialign.exact import discrete_kl, exponential_tilt
from minialign.kernels import gae, masked_whiten
from minialign.loop import Batch, fit
from minialign.methods import ppo
from minialign.policies.language import LanguagePolicy

VOCABULARY, LENGTH, BOS = 4, 3, 4


class Letters:
    """A tokenizer of single letters; the prompt is "?"."""

    eos_token_id, pad_token_id = None, 0

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[BOS if letter == "?" else "abcd".index(letter) for letter in text] for text in texts]}

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join("abcd"[token] for token in row) for row in rows]


class Table(nn.Module):
    """A free logit for each token after each prefix (or `outputs` free numbers): the first position is the prompt."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())  # (1 + 4 + 16, outputs)

    def forward(self, input_ids, attention_mask=None):
        index, rows = torch.zeros(len(input_ids), dtype=torch.long), []
        for position in range(input_ids.shape[1]):
            if position:
                index = VOCABULARY * index + 1 + input_ids[:, position]
            rows.append(self.logits[index])
        return torch.stack(rows, 1)


RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
TEXTS = ["".join("abcd"[t] for t in row) for row in RESPONSES.tolist()]
NODES = 1 + VOCABULARY + VOCABULARY**2


def world(seed=0, critic=True):
    """(policy, scores of all responses, reward)."""
    generator = torch.Generator().manual_seed(seed)
    policy = LanguagePolicy(
        Table(0.5 * torch.randn(NODES, VOCABULARY, generator=generator, dtype=torch.float64)), Letters(),
        fixed_length=True,
    )  # fmt: skip
    scores = torch.randn(len(TEXTS), generator=generator)
    policy.train_all_weights()
    if critic:
        policy.add_value_heads(network=Table(torch.zeros(NODES, 1, dtype=torch.float64)))
    return policy, scores, lambda texts, prompts: scores[torch.tensor([TEXTS.index(text) for text in texts])]


def law(policy, reference=False):
    """log pi of every response."""
    everything = policy.responses(["?"] * len(TEXTS), RESPONSES.tolist())
    with torch.no_grad():
        return policy.log_probs(everything, reference=reference).sum(1)


SMALL = ppo.Config(num_iterations=3, num_prompts=8, group_size=2, num_tokens=LENGTH, num_epochs=2, learning_rate=0.02)
KINDS = ("gae", "grpo", "rloo", "reinforce")


def test_adaptive_kl_by_hand():
    # sheet, check 5: the error 9 / 6 - 1 is clipped at .2
    controller = ppo.AdaptiveKL(0.2, 6.0, 10_000)
    controller.update(9.0, 64)
    assert controller.beta == pytest.approx(0.200256)
    controller.update(6.3, 1000)
    assert controller.beta == pytest.approx(0.200256 * (1 + 0.05 * 0.1))
    fixed = ppo.AdaptiveKL(0.2, None, 10_000)
    fixed.update(100.0, 64)
    assert fixed.beta == 0.2


def test_group_estimates_by_hand():
    scores, group = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    rloo = ppo.group_estimates(scores, group, "rloo", 3)
    # each minus the mean of the other two
    torch.testing.assert_close(rloo, torch.tensor([1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3 - 0.0]))
    grpo = ppo.group_estimates(scores, group, "grpo", 3)
    assert grpo[:3].mean().abs() < 1e-6 and grpo[:3].std(correction=0) == pytest.approx(1, abs=1e-5)
    assert float(ppo.group_estimates(scores, group, "reinforce", 3)[0]) == -1


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_sampling_weights_the_gradient_is_the_policy_gradient(kind):
    """rho = 1: the loss is -mean A log pi to first order, nothing is clipped; with advantages rebuilt by hand."""
    policy, _, reward = world()
    config = dataclasses.replace(SMALL, advantage=kind, beta=0.3, value_coefficient=0.0)
    with torch.no_grad():
        responses = policy.generate(["?"] * 16, LENGTH, generator=torch.Generator().manual_seed(1))
        scores = reward(responses.texts, None)
        group = torch.arange(8).repeat_interleave(2)
        policy.network.logits.add_(0.0)
        drawn = Batch(["?"] * 16, torch.zeros(16), group, torch.arange(16))
        batch, kl = ppo.round_estimates(policy, responses, scores, drawn, 0.3, config)
    assert kl.abs().max() == 0  # still the reference
    if kind == "gae":
        rewards = torch.zeros(16, LENGTH, dtype=torch.float64)
        rewards[:, -1] = scores
        expected = masked_whiten(gae(rewards, torch.zeros_like(rewards), responses.mask, 1.0, 0.95)[0], responses.mask)
    else:
        expected = ppo.group_estimates(scores, group, kind, 2)[:, None].expand(16, LENGTH)
        expected = masked_whiten(expected, responses.mask) if kind == "reinforce" else expected
    torch.testing.assert_close(batch["advantages"], expected.to(batch["advantages"]), rtol=1e-5, atol=1e-6)
    batch["weight"] = torch.full((16, LENGTH), 1 / 48, dtype=torch.float64)
    loss, info = ppo.response_loss(policy, responses, torch.arange(16), batch, 0.3, config)
    (gradient,) = torch.autograd.grad(loss, [policy.network.logits])
    log_prob = policy.log_probs(responses)
    (by_hand,) = torch.autograd.grad(-(expected * log_prob).mean(), [policy.network.logits])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-7)
    assert info["clip_fraction"] == 0 and info["approx_kl"].abs() < 1e-12


def trained(config, seed=0, resume=None, keep=None, reward=None):
    policy, _, usual = world()
    for step in ppo.train(policy, reward or usual, ["?"], config, torch.Generator().manual_seed(seed), resume):
        if keep is not None:
            keep.append((step, step.checkpoint()))
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", ["token", "sequence"])
def test_rows_per_pass_is_memory_not_result(kind, average):
    config = dataclasses.replace(SMALL, advantage=kind, num_minibatches=2, average=average)
    whole = trained(config)
    torch.testing.assert_close(trained(dataclasses.replace(config, rows_per_pass=3)), whole, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(trained(dataclasses.replace(config, learning_rate=0.0)), whole)


def test_costs_are_counted():
    """A round of n responses: generation, reference and (own) critic 1 each; an epoch 3 for policy and 3 for critic."""
    policy, _, reward = world()
    history = fit(ppo.train(policy, reward, ["?"], SMALL), progress=False)
    assert history["network_evaluations"] == [16 * (3 + 2 * 6) * n for n in (1, 2, 3)]
    assert history["reward_queries"] == [16, 32, 48]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.optimum("ppo")
def test_the_kl_regularised_optimum_is_met(kind):
    """pi* = pi_ref exp(score / beta) / Z over all 64 responses. GRPO's division by the group's std changes the scale of
    the score against the KL, so it lands elsewhere: nearer to pi* than the start, no more."""
    policy, scores, reward = world()
    reference, beta = law(policy, reference=True), 0.5
    optimum, _ = exponential_tilt(reference, scores.double(), beta)
    before = float(discrete_kl(reference, optimum))
    config = ppo.Config(
        num_iterations=300, num_prompts=64, group_size=1 if kind in ("gae", "reinforce") else 2, num_tokens=LENGTH,
        advantage=kind, num_epochs=2, beta=beta, learning_rate=0.03, final_lr_fraction=0.05, whiten=kind == "gae",
        value_coefficient=1.0,
    )  # fmt: skip
    fit(ppo.train(policy, reward, ["?"], config, torch.Generator().manual_seed(0)), progress=False)
    after = float(discrete_kl(law(policy), optimum))
    assert before > 0.5
    assert after < (0.5 * before if kind == "grpo" else 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "ppo"}, "'gae', 'grpo', 'rloo', 'reinforce'"),
        ({"advantage": "rloo", "group_size": 1}, "group_size above 1"),
        ({"num_tokens": 0}, "at least 1"),
        ({"num_minibatches": 17}, "more than the 16 responses"),
        ({"kl_loss": "k1"}, "'k2', 'k3'"),
    ],
)
def test_refusals(changes, message):
    policy, _, reward = world()
    with pytest.raises(ValueError, match=message):
        next(ppo.train(policy, reward, ["?"], dataclasses.replace(SMALL, **changes)))


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce"])
def test_equal_scores_have_no_advantage_at_all(kind):
    """Exactly none: .3 less its mean in float32 is 3e-8, which Adam would make steps of full length of."""
    group = torch.arange(7).repeat_interleave(2)
    assert torch.equal(ppo.group_estimates(torch.full((14,), 0.3), group, kind, 2), torch.zeros(14))
