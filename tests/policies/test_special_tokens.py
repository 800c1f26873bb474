"""Which token opens a text, which end a response, and which the network does not know: said in one place."""

import warnings

import pytest
import torch
from test_language_policy import EOS, PROMPTS, VOCABULARY, Table, gpt2, llama, tokenizer

from minialign.policies import special_tokens
from minialign.policies.language import LanguagePolicy

BOS, EOT = 3, 4  # the words "a" and "b", in other roles


def opened(opening="a $A", **changes):
    """A tokenizer that puts "a" before a text, as its BOS."""
    from tokenizers import processors

    made = tokenizer(**{"bos_token": "a", "cls_token": "a", "sep_token": "b"} | changes)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=opening, special_tokens=[("a", BOS), ("b", EOT)]
    )
    return made


def with_ends(network, ends):
    network.generation_config.eos_token_id = ends
    return network


@pytest.mark.parametrize("listed", [EOT, [EOT], [EOT, EOS], [EOT, 50256]])
def test_every_end_ends_a_response(listed):
    """Sampled and given alike; each keeps its own end token, and the text is without it, special or not."""
    policy = LanguagePolicy(with_ends(gpt2(), listed), tokenizer())
    assert policy.ends == [EOS, EOT]
    responses = policy.generate(PROMPTS * 20, 12, generator=torch.Generator().manual_seed(0))
    last = responses.tokens.gather(1, responses.lengths.unsqueeze(1) - 1).squeeze(1)
    ends = torch.isin(responses.tokens, torch.tensor([EOS, EOT])) & responses.mask
    assert torch.equal(ends.any(1), responses.ended)
    assert torch.equal(ends.sum(1), responses.ended.long())  # nothing behind it
    assert {EOS, EOT} <= set(last[responses.ended].tolist())
    assert not any("b" in text.split() for text in responses.texts)
    given = policy.responses(["c"] * 3, [[5, EOT], [5, EOS], [5, 6]])
    assert given.ended.tolist() == [True, True, False]
    assert given.texts == ["c", "c", "c d"]
    texts = policy.responses(["c"] * 2, ["d b", "d"])
    assert [row[mask].tolist() for row, mask in zip(texts.tokens, texts.mask, strict=True)] == [[6, EOT], [6, EOS]]


def test_an_end_that_generation_config_alone_knows_will_do():
    policy = LanguagePolicy(with_ends(gpt2(), [EOT]), tokenizer(eos_token=None))
    assert policy.ends == [EOT]
    with pytest.raises(ValueError, match="no EOS token, and generation_config lists none"):
        LanguagePolicy(with_ends(gpt2(), None), tokenizer(eos_token=None))
    assert LanguagePolicy(Table(), tokenizer(eos_token=None), fixed_length=True).ends == []


@pytest.mark.parametrize("template", ["a $A", "a $A b", "a b $A"])
def test_a_text_is_opened_once_and_not_closed(template):
    """By what the tokenizer puts before it; what it puts behind would be an end in the middle."""
    texts = ["c d", "a c d", "c"]
    expected = [[BOS, 5, 6], [BOS, 5, 6], [BOS, 5]]
    if template == "a b $A":
        texts[1] = "a b c d"
        expected = [[BOS, EOT, *row[1:]] for row in expected]
    assert special_tokens.encode(opened(template), texts) == expected
    assert special_tokens.encode(tokenizer(), ["a a c", "c"]) == [[3, 3, 5], [5]]  # it opens nothing: all is text


def test_the_policy_reads_one_bos():
    policy = LanguagePolicy(gpt2(), opened())
    tokens, mask = policy.encode(["a c d", "c d"])
    assert mask.all()
    assert tokens.tolist() == [[BOS, 5, 6]] * 2


def test_unknown_tokens_are_named_before_the_network_is_called():
    """In prompts and in given responses; a head with fewer outputs than embeddings limits what can be said."""
    bigger = tokenizer()
    bigger.add_tokens(["<tool>"])
    policy = LanguagePolicy(gpt2(), bigger)
    for call in (lambda: policy.generate(["a <tool>"], 3), lambda: policy.encode(["c", "a <tool>"])):
        with pytest.raises(ValueError, match=r"prompt 'a <tool>' has the token '<tool>', id 16.*0 to 15.*resize_token"):
            call()
    with pytest.raises(ValueError, match=r"response 1 has the token '<tool>', id 16.*resize_token_embeddings"):
        policy.responses(["a", "a"], ["c", "<tool>"])
    with pytest.raises(ValueError, match="response 0 has the id -100; expected 0 to 15"):
        policy.responses(["a"], [[5, -100]])
    policy.network.resize_token_embeddings(len(bigger))
    assert policy.generate(["a <tool>"], 3).mask.any()
    narrow = llama()
    narrow.lm_head = torch.nn.Linear(16, 6)
    policy = LanguagePolicy(narrow, tokenizer())
    assert policy.encode(["j"])[0].tolist() == [[12]]
    with pytest.raises(ValueError, match=r"response 0 has the token 'j', id 12.*0 to 5"):
        policy.responses(["j"], ["j"])


def test_a_table_has_no_embeddings_to_check():
    assert special_tokens.vocabulary(Table()) == (None, None)
    assert special_tokens.vocabulary(gpt2()) == (VOCABULARY, VOCABULARY)


def test_what_decoding_would_change_is_refused_or_said():
    """A penalty makes another distribution, and is refused by name; sharpening is left away, and that is said."""
    for name, value in {"repetition_penalty": 1.05, "suppress_tokens": [7], "no_repeat_ngram_size": 2}.items():
        network = gpt2()
        setattr(network.generation_config, name, value)
        with pytest.raises(ValueError, match=f"{name} = .*generation_config.{name} = None"):
            LanguagePolicy(network, tokenizer())
        setattr(network.generation_config, name, None)
        LanguagePolicy(network, tokenizer())
    network.generation_config.update(temperature=0.6, top_p=0.9, top_k=0)
    with pytest.warns(UserWarning, match=r"temperature = 0.6, top_p = 0.9: training samples from the whole"):
        LanguagePolicy(network, tokenizer())
    network.generation_config.update(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LanguagePolicy(network, tokenizer())
