"""What trains of a language model: in float32, told from its reference, saved, gone on from, merged; else refused."""

import copy

import pytest
import torch
from test_language_policy import MODELS, PROMPTS, Table, gpt2, llama, policy_of, sampled, shaken, tokenizer

from minialign.methods import constrained, ppo
from minialign.policies.language import LanguagePolicy

each_model = pytest.mark.parametrize("name", MODELS)


def peft_model(network, **changes):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(network, LoraConfig(**dict(r=2, target_modules=["q_proj"]) | changes))


def scores(policy, responses, reference=False):
    with torch.no_grad():
        return policy.log_probs(responses, reference=reference)


# ---------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("changes", [dict(modules_to_save=["lm_head"]), dict(trainable_token_indices=[4, 5]), {}])
def test_all_that_peft_trains_is_off_in_the_reference(changes):
    """A head of its own, some tokens of its own: the reference is what disable_adapter() of peft's gives."""
    wrapper = peft_model(llama(), **changes)
    policy = LanguagePolicy(wrapper, tokenizer())
    responses = sampled(policy)
    shaken(policy.parameters(), 0.3)
    reference = scores(policy, responses, True)
    torch.testing.assert_close(reference, responses.log_probs, atol=1e-5, rtol=0)
    with wrapper.disable_adapter():
        assert torch.equal(scores(policy, responses), reference)
    assert (scores(policy, responses) - responses.log_probs).abs().max() > 0.1
    assert all(p.requires_grad for p in policy.parameters())


def test_a_second_adapter_is_refused():
    """It would be off in the reference."""
    from peft import LoraConfig

    wrapper = peft_model(llama())
    wrapper.add_adapter("style", LoraConfig(r=2, target_modules=["q_proj"]))
    wrapper.base_model.set_adapter(["default", "style"])
    with pytest.raises(ValueError, match=r"adapters default, style are on.*merge_and_unload"):
        LanguagePolicy(wrapper, tokenizer()).parameters()


def test_an_adapter_without_its_peft_model(tmp_path):
    """Put into the layers by others (transformers' add_adapter): it trains, and is saved in peft's format."""
    from peft import LoraConfig, inject_adapter_in_model

    network = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), llama(), "own")
    policy = LanguagePolicy(network, tokenizer())
    shaken(policy.parameters(), 0.3)
    responses = sampled(policy)
    with pytest.raises(ValueError, match="has the adapter 'own' already"):
        policy.add_lora()
    with pytest.raises(ValueError, match=r"nothing to merge.*PeftModel"):
        policy.merge()
    policy.save_adapter(tmp_path)
    again = policy_of("llama")
    again.load_adapter(tmp_path)
    for reference in (False, True):
        assert torch.equal(scores(again, responses, reference), scores(policy, responses, reference))


def test_adapters_that_add_tokens_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    network = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adapter adds tokens, not weights.*LoRA"):
        LanguagePolicy(network, tokenizer())


# ---------------------------------------------------------------------------------------------- going on


@each_model
@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
def test_what_was_saved_can_be_trained_further(name, train, tmp_path):
    """The same numbers, over the same reference; all that trained before trains again, and is saved again."""
    first, second = policy_of(name), policy_of(name)
    getattr(first, train)()
    shaken(first.parameters())
    responses = sampled(first)
    first.save_adapter(tmp_path / "one")
    second.load_adapter(tmp_path / "one")
    for reference in (False, True):
        assert torch.equal(scores(second, responses, reference), scores(first, responses, reference))
    shapes = [[p.shape for p in policy.parameters()] for policy in (first, second)]
    assert shapes[0] == shapes[1]
    second.save_adapter(tmp_path / "two")
    shaken(second.parameters(), seed=6)
    assert (scores(second, responses) - scores(first, responses)).abs().max() > 0.05
    third = policy_of(name)
    third.load_adapter(tmp_path / "two")
    assert torch.equal(scores(third, responses), scores(first, responses))


def test_an_adapter_of_peft_s_own_is_gone_on_from(tmp_path):
    """With its head; loaded by peft for use alone, it has nothing to train."""
    from peft import PeftModel

    wrapper = peft_model(llama(), modules_to_save=["lm_head"])
    shaken([p for p in wrapper.parameters() if p.requires_grad], 0.3)
    wrapper.save_pretrained(tmp_path)
    frozen = LanguagePolicy(PeftModel.from_pretrained(llama(), tmp_path), tokenizer())
    with pytest.raises(ValueError, match="nothing to train"):
        frozen.parameters()
    policy = LanguagePolicy(llama(), tokenizer())
    policy.load_adapter(tmp_path)
    responses = sampled(frozen)
    for reference in (False, True):
        assert torch.equal(scores(policy, responses, reference), scores(frozen, responses, reference))
    assert len(policy.parameters()) == 5  # two layers' A and B, and the head


@each_model
def test_merged_weights_are_the_next_base(name, tmp_path):
    """The policy stays what it was; a new adapter starts from it, and has it as its reference."""
    policy = policy_of(name)
    policy.add_lora()
    shaken(policy.parameters())
    responses = sampled(policy)
    trained = scores(policy, responses)
    policy.merge()
    assert not any("lora" in key for key in policy.network.state_dict())
    torch.testing.assert_close(scores(policy, responses), trained, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="nothing to train"):
        policy.parameters()
    with pytest.raises(ValueError, match="nothing to merge: no weights were trained"):
        policy.merge()
    policy.add_lora(seed=1)
    shaken(policy.parameters(), seed=7)
    torch.testing.assert_close(scores(policy, responses, True), trained, atol=1e-5, rtol=0)
    assert (scores(policy, responses) - trained).abs().max() > 0.05
    policy.merge()
    policy.train_all_weights()
    between = scores(policy, responses)
    shaken(policy.parameters(), seed=8)
    assert torch.equal(scores(policy, responses, True), between)
    trained = scores(policy, responses)
    policy.merge()
    policy.add_lora()
    assert torch.equal(scores(policy, responses, True), trained)
    policy.save_adapter(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()


def test_weights_that_would_be_lost_are_refused(tmp_path):
    """An adapter and all weights: neither would be saved with the other, nor told from it in the reference."""
    policy = policy_of("llama")
    policy.add_lora()
    for call in (policy.train_all_weights, policy.add_lora, lambda: policy.load_adapter(tmp_path / "saved")):
        policy.save_adapter(tmp_path / "saved")
        with pytest.raises(ValueError, match=r"has the adapter 'default' already.*policy.merge\(\)"):
            call()
    policy = policy_of("llama")
    policy.train_all_weights()
    for call in (policy.add_lora, lambda: policy.load_adapter(tmp_path / "saved")):
        with pytest.raises(ValueError, match=r"all weights train already.*policy.merge\(\)"):
            call()


@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
def test_weights_of_another_network_are_refused_and_leave_it_as_it_was(train, tmp_path):
    policy, other = policy_of("llama"), policy_of("gpt2")
    getattr(policy, train)()
    shaken(policy.parameters())
    policy.save_adapter(tmp_path)
    before = copy.deepcopy(other.network.state_dict())
    with pytest.raises(ValueError, match=r"saved from another network|not found in the base model"):
        other.load_adapter(tmp_path)
    wide = llama()
    wide.model.layers[1].self_attn.q_proj = torch.nn.Linear(16, 16, bias=False)
    wide.model.layers[1].mlp.up_proj = torch.nn.Linear(16, 48, bias=False)
    wide = LanguagePolicy(wide, tokenizer())
    with pytest.raises(ValueError, match=r"and this network .* saved from another network"):
        wide.load_adapter(tmp_path)
    for network, keys in ((other.network, before.keys()), (wide.network, llama().state_dict().keys())):
        assert network.state_dict().keys() == keys
    assert all(torch.equal(before[key], value) for key, value in other.network.state_dict().items())
    with pytest.raises(ValueError, match=r"holds neither adapter_config.json nor trainable.safetensors"):
        other.load_adapter(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- precision


HALF = [torch.bfloat16, torch.float16]
PPO = ppo.Config(num_iterations=1, num_prompts=6, num_tokens=6, num_epochs=1, learning_rate=1e-4)
CONSTRAINED = constrained.Config((0.5,), num_iterations=1, num_prompts=6, num_tokens=6, learning_rate=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("train", ["add_lora", "train_all_weights"])
@pytest.mark.parametrize("method", ["ppo", "constrained"])
def test_a_network_in_half_precision_trains_in_float32(method, train, dtype):
    """Ratio 1 before the first update; then weights move by less than half precision could tell, moments included."""
    policy = LanguagePolicy(llama().to(dtype), tokenizer())
    getattr(policy, train)()
    policy.add_value_heads({"ppo": 1, "constrained": 2}[method], own_trunk=True)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    start = [p.detach().clone() for p in policy.parameters()]

    def reward(texts, prompts):
        return torch.tensor([float(len(text)) for text in texts])

    if method == "ppo":
        steps = ppo.train(policy, reward, PROMPTS, PPO)
    else:
        steps = constrained.train(policy, [reward], PROMPTS, CONSTRAINED)
    (step,) = steps
    assert float(step.metrics["clip_fraction"]) == 0
    assert abs(float(step.metrics["approx_kl"])) < 1e-6
    saved = step.checkpoint()
    assert {t.dtype for key, t in saved.items() if key.startswith(("parameter", "optimizer"))} == {torch.float32}
    moved = [(p.detach() - old).abs() for p, old in zip(policy.parameters(), start, strict=True)]
    assert all(m.isfinite().all() for m in moved)
    assert max(float(m.max()) for m in moved) > 5e-5
    if train == "train_all_weights":  # of a weight of 1 (a norm's), bfloat16 has no neighbour within 1e-4
        norm = policy.network.model.norm.weight
        assert 0 < float((norm - 1).abs().max()) < 2**-9
        responses = sampled(policy)
        assert (scores(policy, responses, True) - scores(policy, responses)).abs().max() > 0
    else:
        base = policy.network.model.layers[0].self_attn.q_proj.base_layer.weight
        assert base.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_the_copy_is_the_policy_before_the_first_update(dtype):
    policy = LanguagePolicy(llama().to(dtype), tokenizer())
    policy.train_all_weights()
    responses = sampled(policy)
    assert torch.equal(scores(policy, responses, True), scores(policy, responses))


def test_what_would_train_in_half_precision_is_refused():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"])
    policy = LanguagePolicy(get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=False), tokenizer())
    with pytest.raises(ValueError, match=r"what trains is torch.bfloat16.*policy.network.float\(\)"):
        policy.parameters()
    policy.network.float()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    policy.add_value_heads(network=Table(1).bfloat16())
    assert {p.dtype for p in policy.value_parameters()} == {torch.float32}


def test_a_critic_of_another_number_of_heads_is_refused_by_ppo():
    policy = LanguagePolicy(gpt2(), tokenizer())
    policy.add_lora()
    policy.add_value_heads(3)
    with pytest.raises(ValueError, match=r"critic has 3 heads; this method needs 1: call policy.add_value_heads\(1\)"):
        next(ppo.train(policy, lambda texts, prompts: torch.zeros(len(texts)), PROMPTS, PPO))
