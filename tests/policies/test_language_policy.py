"""The language policy on random GPT-2- and Llama-class models and on a table: against transformers' own generation and
scoring, and against slow passes over single unpadded rows."""

import copy

import pytest
import torch
from torch import nn

from minialign.policies.architectures import cache_name, named_inputs
from minialign.policies.language import LanguagePolicy, Responses

WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklm"]
PROMPTS = ["a b c d e", "f", "g h a", "f", "m l k j i h"]  # lengths 5, 1, 3, 1, 6
EOS, VOCABULARY = 1, len(WORDS)


def tokenizer(**changes):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | changes
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def gpt2(seed=0, context=64):
    """Large initial weights, so that distributions are far from uniform and from each other; dropout at its default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=context, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(seed=0, context=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.4, attention_dropout=0.1,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Table(nn.Module):
    """Logits by the position and the token before: no cache, no position ids, no config. The first outputs are free."""

    def __init__(self, outputs=VOCABULARY, steps=64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(steps, VOCABULARY, outputs, generator=generator))

    def forward(self, input_ids, attention_mask=None):
        position = (attention_mask.cumsum(1) - 1).clamp_min(0)
        return self.table[position, input_ids]


MODELS = {"gpt2": gpt2, "llama": llama}
EVERYTHING = MODELS | {"table": Table}
each_model = pytest.mark.parametrize("name", MODELS)
everything = pytest.mark.parametrize("name", EVERYTHING)


def policy_of(name, **changes):
    return LanguagePolicy(EVERYTHING[name](), tokenizer(), **changes)


def sampled(policy, num_tokens=12, seed=0, temperature=1.0, prompts=PROMPTS * 3):
    return policy.generate(prompts, num_tokens, generator=torch.Generator().manual_seed(seed), temperature=temperature)


def shaken(parameters, scale=0.1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator))


def logits_of_row(network, ids):
    """Float64, one unpadded row, no cache, no position ids given: nothing of ours takes part."""
    network = copy.deepcopy(network).double()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = network(tokens, attention_mask=torch.ones_like(tokens))
    return getattr(output, "logits", output)[0]


# ---------------------------------------------------------------------------------------------- scoring


@everything
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generation_scores_and_rows_by_hand_agree(name, temperature):
    """Batched, left-padded, cached float32 generation; one padded pass; and float64 rows on their own."""
    policy = policy_of(name)
    responses = sampled(policy, temperature=temperature)
    assert 0 < (responses.lengths < responses.tokens.shape[1]).sum() < len(responses)  # some ended early, some did not
    with torch.no_grad():
        scored, entropy = policy.score(responses, entropy=True)[::2]
    torch.testing.assert_close(responses.log_probs, scored, atol=1e-5, rtol=0)
    for i, prompt in enumerate(responses.prompts):
        ids = policy.tokenizer(prompt)["input_ids"]
        tokens = responses.tokens[i][responses.mask[i]].tolist()
        log_p = (logits_of_row(policy.network, ids + tokens) / temperature).log_softmax(-1)
        for t, token in enumerate(tokens):
            row = log_p[len(ids) - 1 + t]  # the logits one position before the action
            assert scored[i, t].item() == pytest.approx(row[token].item(), abs=1e-5)
            assert entropy[i, t].item() == pytest.approx(-(row.exp() @ row).item(), abs=1e-5)
        assert (scored[i, len(tokens) :] == 0).all()
        assert (entropy[i, len(tokens) :] == 0).all()


@each_model
def test_against_transformers_own_generation_and_scores(name):
    """Their sampler, their cache, their compute_transition_scores; our one teacher-forced pass, to 1e-5."""
    policy = policy_of(name)
    batch = policy.tokenizer(PROMPTS * 4, padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(3)
    theirs = policy.network.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=10, do_sample=True,
        top_k=0, top_p=1.0, temperature=0.8, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = policy.network.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
    rows = [row.tolist() for row in theirs.sequences[:, batch["input_ids"].shape[1] :]]
    rows = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
    assert len(set(map(len, rows))) > 3
    responses = policy.responses(PROMPTS * 4, rows, temperature=0.8)
    assert responses.ended.tolist() == [row[-1] == EOS for row in rows]
    with torch.no_grad():
        got = policy.log_probs(responses)
    torch.testing.assert_close(got, torch.where(responses.mask, expected, 0.0), atol=1e-5, rtol=0)


@each_model
def test_the_greedy_response_is_transformers_greedy_response(name):
    """At a low temperature the most likely token is certain: our loop must give theirs, cache and padding included."""
    policy = policy_of(name)
    batch = policy.tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    theirs = policy.network.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=10, do_sample=False
    )[:, batch["input_ids"].shape[1] :]
    ours = policy.generate(PROMPTS, 10, noise=torch.full((5, 10), 0.5, dtype=torch.float64), temperature=1e-4)
    assert ours.tokens.tolist() == theirs[:, : ours.tokens.shape[1]].tolist()


@everything
def test_tokens_follow_the_noise(name):
    """The same uniform numbers through a slow loop over single rows: the same tokens."""
    policy = policy_of(name)
    noise = policy.draw_noise(5, 8, torch.Generator().manual_seed(4))
    responses = policy.generate(PROMPTS, 8, noise=noise, temperature=1.3)
    for i, prompt in enumerate(PROMPTS):
        ids, drawn = policy.tokenizer(prompt)["input_ids"], []
        while len(drawn) < 8 and EOS not in drawn:
            p = (logits_of_row(policy.network, ids + drawn)[-1] / 1.3).softmax(-1).tolist()
            total, token = 0.0, 0
            while (total := total + p[token]) <= noise[i, len(drawn)]:
                token += 1
            drawn.append(token)
        assert responses.tokens[i][responses.mask[i]].tolist() == drawn
        assert responses.ended[i] == (drawn[-1] == EOS)
        assert responses.texts[i].split() == [WORDS[token] for token in drawn if token not in (0, 1, 2)]


@everything
def test_a_response_depends_on_its_own_prompt_and_noise(name):
    """Not on its companions: alone, in another order, or beside a longer prompt it is the same."""
    policy = policy_of(name)
    noise = policy.draw_noise(5, 8, torch.Generator().manual_seed(1))
    together = policy.generate(PROMPTS, 8, noise=noise)
    for i in range(5):
        alone = policy.generate(PROMPTS[i : i + 1], 8, noise=noise[i : i + 1])
        assert alone.texts == together.texts[i : i + 1]
        length = int(alone.lengths[0])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[i, :length], atol=1e-5, rtol=0)


@everything
def test_padding_content_changes_nothing(name):
    """Other tokens in the padding: bit for bit the same log-probabilities and values, and the same gradient."""
    policy = policy_of(name)
    policy.train_all_weights()
    critic = Table(2) if name == "table" else None
    policy.add_value_heads(2, network=critic)
    shaken(policy.value_parameters())
    responses = sampled(policy)
    assert not responses.prompt_mask.all()
    assert not responses.mask.all()
    other = responses[:]
    other.prompt_tokens = torch.where(responses.prompt_mask, responses.prompt_tokens, 7)
    other.tokens = torch.where(responses.mask, responses.tokens, 9)
    results = []
    for version in (responses, other):
        log_probs, values = policy.log_probs_and_values(version)
        loss = log_probs.sum() + (values**2).sum()
        results.append((log_probs, values, *torch.autograd.grad(loss, policy.parameters())))
    for mine, theirs in zip(*results, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, theirs)
    assert all((results[0][i][~responses.mask] == 0).all() for i in (0, 1))


def test_one_token_responses():
    """The off-by-one test: T = 1, where a slice of [prompt:] or [prompt - 1 :] would be empty or too long."""
    for name in EVERYTHING:
        policy = policy_of(name)
        responses = sampled(policy, num_tokens=1)
        assert responses.tokens.shape == (15, 1)
        assert responses.mask.all()
        with torch.no_grad():
            scored = policy.log_probs(responses)
        for i, prompt in enumerate(responses.prompts):
            log_p = logits_of_row(policy.network, policy.tokenizer(prompt)["input_ids"])[-1].log_softmax(-1)
            assert scored[i, 0].item() == pytest.approx(log_p[responses.tokens[i, 0]].item(), abs=1e-5)


@everything
def test_responses_are_sampled_from_the_distribution_that_is_scored(name):
    """First tokens of one prompt on an even grid of noise: frequencies are scored probabilities, to a grid point."""
    policy, num = policy_of(name), 400
    noise = ((torch.arange(num, dtype=torch.float64) + 0.5) / num)[:, None]
    responses = policy.generate(["g h a"] * num, 1, noise=noise, temperature=0.9)
    every = policy.responses(["g h a"] * VOCABULARY, [[token] for token in range(VOCABULARY)], temperature=0.9)
    with torch.no_grad():
        probabilities = policy.log_probs(every).exp()[:, 0]
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    frequency = torch.bincount(responses.tokens[:, 0], minlength=VOCABULARY) / num
    torch.testing.assert_close(frequency, probabilities, atol=1.01 / num, rtol=0)


# ---------------------------------------------------------------------------------------------- PPO's needs


@everything
def test_ratio_is_one_before_the_first_update(name):
    """Exactly, if both log-probabilities come from `log_probs` on the same rows; to rounding if the old ones are
    generation's, for which the cache adds up in another order."""
    policy = policy_of(name)
    policy.train_all_weights()
    responses = sampled(policy)
    with torch.no_grad():
        old = policy.log_probs(responses)
    log_probs = policy.log_probs(responses)
    assert torch.equal(old, log_probs)
    # float32: a dot product of 16 terms, two layers deep, in log-probabilities of size at most 20: 20 * 2^-23 = 2.4e-6
    torch.testing.assert_close((log_probs - responses.log_probs).exp(), torch.ones_like(old), atol=1e-5, rtol=0)
    part = torch.tensor([3, 0, 7])
    torch.testing.assert_close(policy.log_probs(responses[part]), log_probs[part], atol=1e-5, rtol=0)


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """Half-precision weights: float32 log-probabilities and values, and the ratio is 1 before the first update."""
    policy = LanguagePolicy(MODELS[name]().to(dtype), tokenizer())
    policy.add_lora()
    for own_trunk in (False, True):
        policy.add_value_heads(2, own_trunk=own_trunk)
        shaken(policy.value_parameters())
        policy.network_evaluations = 0
        responses = sampled(policy)
        assert policy.network_evaluations == 2 * len(responses)  # generated, and scored in a whole pass
        log_probs, values = policy.log_probs_and_values(responses)
        assert log_probs.dtype == values.dtype == responses.log_probs.dtype == torch.float32
        (log_probs.sum() + values.sum()).backward()
        # Cached passes alone would be off by 0.02 to 0.05 in bfloat16 here.
        torch.testing.assert_close(
            (log_probs - responses.log_probs).exp(), torch.ones_like(log_probs), atol=1e-3, rtol=0
        )
        part = torch.tensor([3, 0, 7])
        torch.testing.assert_close(policy.log_probs(responses[part]), log_probs[part], atol=1e-3, rtol=0)
        assert all(p.grad.isfinite().all() for p in policy.value_parameters() if p.grad is not None)


@each_model
@pytest.mark.parametrize("own_trunk", [False, True])
def test_values_are_of_the_state_before_each_token(name, own_trunk):
    """Zero at first; then each value is the head's reading of the hidden state of an unpadded prefix, alone."""
    policy = policy_of(name)
    policy.add_value_heads(3, own_trunk=own_trunk)
    responses = sampled(policy)
    with torch.no_grad():
        assert policy.values(responses).eq(0).all()
        heads = policy._value_network.get_output_embeddings() if own_trunk else policy._value_heads
        shaken(heads.parameters(), scale=1.0)
        values = policy.values(responses)
        log_probs, together = policy.log_probs_and_values(responses)
        torch.testing.assert_close(together, values, atol=1e-6, rtol=0)
        assert torch.equal(log_probs, policy.log_probs(responses))
        assert values.shape == (*responses.tokens.shape, 3)
        trunk = getattr(policy.network, policy.network.base_model_prefix)
        for i in range(5):
            ids = policy.tokenizer(responses.prompts[i])["input_ids"]
            for t in range(int(responses.lengths[i])):
                prefix = torch.tensor([ids + responses.tokens[i, :t].tolist()])
                hidden = trunk(prefix).last_hidden_state[0, -1]
                torch.testing.assert_close(values[i, t], hidden @ heads.weight.T + heads.bias, atol=2e-5, rtol=0)


@each_model
def test_what_the_critic_trains(name):
    """On the policy's trunk its loss reaches the policy's weights; on its own it must not, nor the reverse."""
    for own_trunk in (False, True):
        policy = policy_of(name)
        policy.train_all_weights()
        policy.add_value_heads(1, own_trunk=own_trunk)
        shaken(policy.value_parameters())
        log_probs, values = policy.log_probs_and_values(sampled(policy))
        theirs = policy.value_parameters()
        own = [p for p in policy.parameters() if not any(p is q for q in theirs)]
        assert len(own) == len(list(policy.network.parameters()))
        reached = torch.autograd.grad(values.sum(), own, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in reached) != own_trunk
        assert all(
            g is None for g in torch.autograd.grad(log_probs.sum(), theirs, retain_graph=True, allow_unused=True)
        )
        live = torch.autograd.grad(values.sum(), theirs, allow_unused=True)
        assert sum(g is not None and g.abs().max() > 0 for g in live) >= (10 if own_trunk else 2)


def test_a_table_as_critic():
    policy = policy_of("table")
    policy.train_all_weights()
    policy.add_value_heads(2, network=Table(2, seed=9))
    responses = sampled(policy)
    values = policy.values(responses)
    assert values.shape == (*responses.tokens.shape, 2)
    table = policy.value_parameters()[0]
    ids = policy.tokenizer(responses.prompts[0])["input_ids"]
    sequence = ids + responses.tokens[0].tolist()
    for t in range(int(responses.lengths[0])):
        last = len(ids) - 1 + t
        assert torch.equal(values[0, t], table[last, sequence[last]])


def test_a_token_classifier_as_critic():
    from transformers import GPT2Config, GPT2ForTokenClassification

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=8, n_layer=1, n_head=2, num_labels=4)
    policy = policy_of("gpt2")
    policy.add_value_heads(4, network=GPT2ForTokenClassification(config))
    assert policy.values(sampled(policy)).shape[-1] == 4


# ---------------------------------------------------------------------------------------------- reference and adapters


@each_model
def test_lora_is_nothing_at_first(name):
    """B = 0: bit for bit the base model, through every layer it sits on; and its gradient is alive."""
    policy = policy_of(name)
    responses = sampled(policy)
    with torch.no_grad():
        before = policy.log_probs(responses)
    policy.add_lora(rank=2)
    assert torch.equal(policy.log_probs(responses), before)
    assert torch.equal(policy.log_probs(responses, reference=True), before)
    policy.log_probs(responses).sum().backward()
    touched = [p for p in policy.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(touched) == len(policy.parameters()) / 2  # every B; A gets its gradient once B is no longer 0
    assert all("lora" in n for n, p in policy.network.named_parameters() if p.requires_grad)


@each_model
def test_reference_by_adapter_and_by_copy_agree(name):
    """Both are the base model, whatever has been trained since, and asking leaves the policy as it was."""
    references = []
    for trainable in ("add_lora", "train_all_weights"):
        policy = policy_of(name)
        responses = sampled(policy)
        with torch.no_grad():
            before = policy.log_probs(responses)
        getattr(policy, trainable)()
        shaken(policy.parameters())
        after = policy.log_probs(responses)
        reference = policy.log_probs(responses, reference=True)
        assert not reference.requires_grad
        assert torch.equal(reference, before)
        assert torch.equal(policy.log_probs(responses), after)
        assert (after - before).abs().max() > 0.05
        assert all(p.requires_grad for p in policy.parameters())
        references.append(reference)
    assert torch.equal(*references)


def test_a_table_keeps_a_copy_as_reference():
    policy = policy_of("table")
    policy.train_all_weights()
    responses = sampled(policy)
    shaken(policy.parameters())
    torch.testing.assert_close(policy.log_probs(responses, reference=True), responses.log_probs, atol=1e-6, rtol=0)
    assert (policy.log_probs(responses) - responses.log_probs).abs().max() > 0.05


@each_model
def test_saved_adapter_loads_in_peft(name, tmp_path):
    from peft import PeftModel

    policy = policy_of(name)
    policy.add_lora(rank=2, alpha=6)
    shaken(policy.parameters())
    responses = sampled(policy)
    policy.save_adapter(tmp_path)
    again = LanguagePolicy(PeftModel.from_pretrained(MODELS[name](), tmp_path), policy.tokenizer)
    with torch.no_grad():
        for reference in (False, True):
            mine, loaded = (p.log_probs(responses, reference=reference) for p in (policy, again))
            torch.testing.assert_close(loaded, mine, atol=1e-6, rtol=0)
    assert (mine - responses.log_probs).abs().max() > 0.05


def test_trained_weights_are_saved(tmp_path):
    from safetensors.torch import load_file

    policy = policy_of("table")
    policy.train_all_weights()
    policy.save_adapter(tmp_path)
    assert torch.equal(load_file(tmp_path / "trainable.safetensors")["table"], policy.network.table)


def test_dropout_is_off():
    """The model is in training mode when it comes, and GPT-2's dropout is .1: two passes must still be equal."""
    network = gpt2().train()
    policy = LanguagePolicy(network, tokenizer())
    policy.add_lora()
    policy.add_value_heads(1, own_trunk=True)
    responses = sampled(policy)
    assert torch.equal(policy.log_probs(responses), policy.log_probs(responses))
    assert not any(module.training for part in (network, policy._value_network) for module in part.modules())


# ---------------------------------------------------------------------------------------------- bookkeeping


def test_network_evaluations_count_sequences_passes_and_gradients():
    policy = policy_of("gpt2")
    policy.add_lora()
    responses = sampled(policy)  # 15 rows, whatever their length
    assert policy.network_evaluations == 15
    with torch.no_grad():
        policy.log_probs(responses)
    assert policy.network_evaluations == 30
    policy.log_probs(responses, reference=True)  # never differentiated
    assert policy.network_evaluations == 45
    policy.log_probs(responses)
    assert policy.network_evaluations == 90
    policy.add_value_heads()
    policy.log_probs_and_values(responses)  # one trunk, one pass
    assert policy.network_evaluations == 135
    policy.add_value_heads(own_trunk=True)
    policy.log_probs_and_values(responses)
    assert policy.network_evaluations == 225
    with torch.no_grad():
        policy.values(responses)
    assert policy.network_evaluations == 240


def test_passes_are_not_repeated():
    """A cache means that each position is computed once; one scoring pass is one call of the network."""
    policy = policy_of("llama")
    policy.add_value_heads(2)
    sampled(policy)  # the first call also compares passes
    seen = []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    responses = sampled(policy)
    steps = responses.tokens.shape[1]
    assert seen == [6] + [1] * (steps - 1)
    seen.clear()
    policy.log_probs_and_values(responses)
    assert seen == [6 + steps - 1]


class OldName(nn.Module):
    """A model of a transformers version that calls its cache past_key_values."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config, self.caches = network, network.config, []

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        self.caches.append(past_key_values)
        cache = {cache_name(named_inputs(self.network)): past_key_values}
        return self.network(input_ids, attention_mask=attention_mask, position_ids=position_ids, **cache)


def test_the_cache_under_its_older_name():
    new, old = policy_of("gpt2"), LanguagePolicy(OldName(gpt2()), tokenizer())
    sampled(old)  # the first call also compares passes
    old.network.caches.clear()
    assert torch.equal(sampled(new).log_probs, sampled(old).log_probs)
    assert all(cache is not None for cache in old.network.caches)


def test_generation_stops_when_all_have_ended():
    policy = policy_of("table")
    with torch.no_grad():
        policy.network.table[..., EOS] = 30.0  # it ends at once
    sampled(policy)  # the first call also compares passes
    calls = []
    policy.network.register_forward_hook(lambda *args: calls.append(1))
    responses = policy.generate(PROMPTS, 10, generator=torch.Generator().manual_seed(0))
    assert responses.tokens.tolist() == [[EOS]] * 5
    assert responses.mask.all()
    assert responses.ended.all()
    assert responses.texts == [""] * 5
    assert len(calls) == 1


def test_fixed_length_responses_have_no_end():
    """Enumerable worlds: every token is an ordinary one, EOS's id included."""
    policy = LanguagePolicy(Table(), tokenizer(eos_token=None), fixed_length=True)
    with torch.no_grad():
        policy.network.table[..., EOS] += 1.0
    responses = sampled(policy, num_tokens=6)
    assert responses.tokens.shape == (15, 6)
    assert responses.mask.all()
    assert not responses.ended.any()
    assert (responses.tokens[:, :-1] == EOS).any()


def test_the_noise_is_uniform():
    noise = policy_of("table").draw_noise(500, 40, torch.Generator().manual_seed(0))
    assert noise.shape == (500, 40)
    assert noise.dtype == torch.float64
    for power in (1, 2):  # moments 1 / (p + 1), variances 1 / (2 p + 1) - 1 / (p + 1)^2; four standard errors
        error = 4 * ((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / 20_000) ** 0.5
        assert (noise**power).mean().item() == pytest.approx(1 / (power + 1), abs=error)


def test_the_generator_is_the_only_randomness():
    policy = policy_of("gpt2")
    torch.manual_seed(1)
    first = sampled(policy)
    torch.manual_seed(2)
    assert torch.equal(first.tokens, sampled(policy).tokens)
    assert not torch.equal(first.tokens[:, 0], sampled(policy, seed=1).tokens[:, 0])
    # Its state afterwards does not depend on when the responses ended.
    states = []
    for prompts in (PROMPTS, PROMPTS[::-1]):
        generator = torch.Generator().manual_seed(0)
        policy.generate(prompts, 9, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_rows_of_responses():
    policy = policy_of("gpt2")
    responses = sampled(policy)
    assert isinstance(responses, Responses)
    rows = torch.tensor([4, 0, 4])
    part = responses[rows]
    assert len(part) == 3
    assert part.texts == [responses.texts[i] for i in (4, 0, 4)]
    assert part.prompts == [PROMPTS[i] for i in (4, 0, 4)]
    for field in ("prompt_tokens", "prompt_mask", "tokens", "mask", "log_probs", "ended"):
        assert torch.equal(getattr(part, field), getattr(responses, field)[rows])
    chosen = responses.lengths > 3
    assert responses[chosen].lengths.tolist() == [n for n in responses.lengths.tolist() if n > 3]
    assert responses[2:4].texts == responses.texts[2:4]
    assert part.temperature == responses.temperature


def test_given_texts_are_the_sampled_ones():
    """Text to tokens and back: EOS is added once, and the scores are those of the sampled response."""
    policy = policy_of("gpt2")
    responses = sampled(policy)
    clean = [
        i
        for i in range(15)
        if responses.ended[i] and not {0, 2} & set(responses.tokens[i, : responses.lengths[i]].tolist())
    ]
    part = responses[torch.tensor(clean)]
    again = policy.responses(part.prompts, part.texts)
    assert len(clean) >= 2
    assert torch.equal(again.lengths, part.lengths)
    assert again.ended.all()
    assert again.log_probs is None
    with torch.no_grad():
        width = again.tokens.shape[1]
        torch.testing.assert_close(policy.log_probs(again), part.log_probs[:, :width], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- errors


def test_errors_teach():
    policy, adapted = policy_of("gpt2"), policy_of("gpt2")
    cases = {
        r"prompts is the string 'a b'.*\['a b'\]": lambda: policy.generate("a b", 3),
        "prompts is empty": lambda: policy.generate([], 3),
        "prompt '' has no tokens.*BOS": lambda: policy.generate(["a", ""], 3),
        r"prompt 'a </s>' ends with an end token.*add_generation_prompt": lambda: policy.generate(["a </s>"], 3),
        "64 tokens.*context is 64": lambda: policy.generate(["a", "a " * 64], 3),
        "longest prompt has 60 tokens.*num_tokens is 5": lambda: policy.generate(["a " * 60], 5),
        "num_tokens is 0": lambda: policy.generate(["a"], 0),
        "temperature 0": lambda: policy.generate(["a"], 3, temperature=0),
        "nothing to train.*add_lora": lambda: LanguagePolicy(gpt2().requires_grad_(False), tokenizer()).parameters(),
        "has the adapter 'default' already.*policy.merge": lambda: (adapted.add_lora(), adapted.add_lora()),
        "no reference.*add_lora": lambda: policy.log_probs(sampled(policy), reference=True),
        "no critic.*add_value_heads": lambda: policy.values(sampled(policy)),
        "2 prompts, but 1 responses": lambda: policy.responses(["a", "b"], ["c"]),
        "response 1 has no tokens": lambda: policy.responses(["a", "b"], [[3], []]),
        "reference has no values": lambda: policy.score(sampled(policy), reference=True, values=True),
        "no EOS token.*fixed_length": lambda: LanguagePolicy(Table(), tokenizer(eos_token=None)),
        "no hidden states.*network=": lambda: policy_of("table").add_value_heads(),
        "Table takes no LoRA.*train_all_weights": lambda: policy_of("table").add_lora(),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
    policy.generate(["a " * 60], 4)  # fills the context to the last position


def test_ids_that_the_network_does_not_have_are_refused():
    bigger = tokenizer()
    bigger.add_special_tokens({"pad_token": "<other pad>"})
    with pytest.raises(ValueError, match=r"padding has the token '<other pad>', id 16.*0 to 15.*resize_token"):
        LanguagePolicy(gpt2(), bigger)


def test_no_pad_token_is_no_matter():
    """Padding is masked, so EOS will do in its place, as in GPT-2."""
    with_pad, without = policy_of("gpt2"), LanguagePolicy(gpt2(), tokenizer(pad_token=None))
    first, second = sampled(with_pad), sampled(without)
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(first.log_probs, second.log_probs)
