"""All passes of a network agree, or it is refused: with a cache, beside padding, and with gradient checkpointing."""

import pytest
import torch
from test_language_policy import MODELS, PROMPTS, VOCABULARY, gpt2, sampled, tokenizer
from torch import nn

from minialign.policies.language import LanguagePolicy
from minialign.policies.passes import checkpointing, rounding

SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, bos_token_id=1, eos_token_id=1, pad_token_id=0)
EQUAL = ["a b c", "d e f", "g h a"] * 4


def network_of(kind, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings))
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    return network


ATTENTION = dict(intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
LFM = dict(**ATTENTION, full_attn_idxs=[1])
JAMBA = dict(
    **ATTENTION, num_experts=2, num_experts_per_tok=1, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1,
    use_mamba_kernels=False,
)  # fmt: skip
# Purely recurrent and masked; mixed with attention; without a mask; with a cache of its own.
MASKED = {"mamba": dict(state_size=4), "lfm2": LFM, "jamba": JAMBA}
UNMASKED = {
    "rwkv": dict(attention_hidden_size=16),
    "xlstm": dict(
        num_heads=2, embedding_dim=16, chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native", step_kernel="native",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKED | UNMASKED)
def test_recurrent_networks_sample_what_is_scored_or_are_refused(kind):
    """transformers itself gives Mamba no mask with its cache; where none is heeded at all, prompts have one length."""
    policy = LanguagePolicy(network_of(kind, **(MASKED | UNMASKED)[kind]), tokenizer())
    responses = sampled(policy, prompts=EQUAL)
    torch.testing.assert_close(policy.log_probs(responses).detach(), responses.log_probs, atol=1e-5, rtol=0)
    if kind in MASKED:
        responses = sampled(policy)
        torch.testing.assert_close(policy.log_probs(responses).detach(), responses.log_probs, atol=1e-5, rtol=0)
        alone = policy.generate(["f"], 5, noise=torch.full((1, 5), 0.3, dtype=torch.float64))
        beside = policy.generate(["m l k j", "f"], 5, noise=torch.full((2, 5), 0.3, dtype=torch.float64))
        length = int(alone.lengths[0])
        torch.testing.assert_close(beside.log_probs[1, :length], alone.log_probs[0], atol=1e-5, rtol=0)
        return
    with pytest.raises(ValueError, match=r"reads padding: a prompt padded from 1 to 6 .* prompts of one length"):
        sampled(policy)
    sampled(policy, prompts=EQUAL)  # as advised


class Forgetful(nn.Module):
    """A network that, with its cache, does not know where it is: every new token is the first."""

    def __init__(self):
        super().__init__()
        self.network = gpt2()
        self.config = self.network.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        position_ids = position_ids if input_ids.shape[1] > 1 else torch.zeros_like(position_ids)
        return self.network(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_tells_another_story_is_refused(dtype):
    with pytest.raises(ValueError, match=r"Forgetful gives other probabilities with its cache.*use_cache=False"):
        sampled(LanguagePolicy(Forgetful().to(dtype), tokenizer()), prompts=EQUAL)
    policy = LanguagePolicy(Forgetful().to(dtype), tokenizer(), use_cache=False)  # as advised
    responses = sampled(policy)
    with torch.no_grad():
        assert (policy.log_probs(responses) - responses.log_probs).abs().max() < 1e-3


def test_passes_are_compared_once_and_cost_nothing():
    """At the first call, and at the first that pads; refused again and again where they disagree."""
    policy, calls = LanguagePolicy(gpt2(), tokenizer()), []
    policy.network.register_forward_hook(lambda *args: calls.append(1))
    extra = []
    for prompts in (EQUAL, EQUAL, PROMPTS, PROMPTS, EQUAL):
        calls.clear()
        policy.network_evaluations = 0
        responses = sampled(policy, prompts=prompts)
        extra.append(len(calls) - responses.tokens.shape[1])
        assert policy.network_evaluations == len(prompts)
    assert extra == [1, 0, 2, 0, 0]
    refused = LanguagePolicy(Forgetful(), tokenizer())
    for _ in range(2):
        with pytest.raises(ValueError, match="with its cache"):
            sampled(refused)


def test_half_precision_has_its_own_rounding():
    assert rounding(gpt2()) < 0.01 < rounding(gpt2().bfloat16())
    for make in MODELS.values():
        for dtype in (torch.bfloat16, torch.float16):
            sampled(LanguagePolicy(make().to(dtype), tokenizer()))  # no complaint


# ---------------------------------------------------------------------------------------------- gradient checkpointing


def dropping(kind):
    """Networks whose layers drop out by a child's mode (GPT-2, Llama) or by their own (OPT)."""
    if kind in MODELS:
        return MODELS[kind]()
    return network_of("opt", **ATTENTION | dict(ffn_dim=32, word_embed_proj_dim=16, dropout=0.5))


def scored(network, train):
    """(bytes kept for the backward pass, log-probabilities, gradients) of a training pass."""
    policy, sizes = LanguagePolicy(network, tokenizer()), []
    getattr(policy, train)()
    responses = policy.responses(["a b c d"] * 4, ["e f g h i j k l"] * 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        log_probs = policy.log_probs(responses)
    with torch.no_grad():
        assert torch.equal(policy.log_probs(responses), log_probs)  # the ratio is 1
    gradients = torch.autograd.grad(log_probs.sum(), policy.parameters())
    assert not any(module.training for module in policy.network.modules())
    return sum(sizes), log_probs.detach(), gradients


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
def test_gradient_checkpointing_saves_memory_and_changes_nothing(kind, train):
    plain, saving = dropping(kind), dropping(kind)
    saving.gradient_checkpointing_enable()
    before, log_probs, gradients = scored(plain, train)
    after, theirs, their_gradients = scored(saving, train)
    assert after < 0.4 * before
    assert torch.equal(theirs, log_probs)
    for mine, other in zip(gradients, their_gradients, strict=True):
        assert torch.equal(mine, other)


def test_the_critics_own_trunk_checkpoints_too():
    sizes = {}
    for enable in (False, True):
        network = gpt2()
        if enable:
            network.gradient_checkpointing_enable()
        policy, kept = LanguagePolicy(network, tokenizer()), []
        policy.add_value_heads(own_trunk=True)
        responses = policy.responses(["a b c d"] * 4, ["e f g h i j k l"] * 4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.nbytes), t)[1], lambda t: t):
            policy.values(responses)
        sizes[enable] = sum(kept)
    assert sizes[True] < 0.4 * sizes[False]


def test_checkpointing_that_needs_dropout_is_refused():
    """A mark that is not on one of transformers' own layers is heeded in training mode alone."""
    network = gpt2()
    network.transformer.gradient_checkpointing = True
    for layer in network.transformer.h:
        layer.gradient_checkpointing = False
    policy = LanguagePolicy(network, tokenizer())
    responses = sampled(policy)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel checkpoints .* network.gradient_checkpointing_disable\(\)"):
        policy.log_probs(responses)
    with checkpointing(network.lm_head):  # unmarked: nothing to say
        pass
    network.gradient_checkpointing_disable()
    assert policy.log_probs(responses).requires_grad
