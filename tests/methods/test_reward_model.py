"""Bradley-Terry, Reg, ODIN and WARM: by hand, against closed forms, and on real transformers classifiers."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from minialign.loop import fit
from minialign.methods import reward_model
from minialign.methods.reward_model import Config, RewardModel
from minialign.pairs import Pairs
from minialign.policies.classifier import output_layer

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]


def make_tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def network(kind="gpt2", num_labels=1, seed=0):
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=num_labels,
            pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2ForSequenceClassification(config)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=num_labels, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def preferences(n, seed=0):
    """The response with more "a" wins; ties are drawn."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        " ".join(WORDS[3 + i] for i in torch.randint(0, 4, (4,), generator=generator).tolist()) for _ in range(2 * n)
    ]
    pairs = [sorted(texts[2 * i : 2 * i + 2], key=lambda t: -t.split().count("a")) for i in range(n)]
    return Pairs(["h"] * n, [a for a, _ in pairs], [b for _, b in pairs])


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert float(reward_model.bradley_terry_loss(chosen, rejected)) == pytest.approx(expected)
    assert float(reward_model.bradley_terry_loss(chosen, chosen)) == pytest.approx(math.log(2))
    # + .005 * ((1 + 0) + (0 + 4)) / 2
    assert float(reward_model.bradley_terry_loss(chosen, rejected, 0.005)) == pytest.approx(expected + 0.0125)
    shifted = reward_model.bradley_terry_loss(chosen + 3, rejected + 3)
    assert float(shifted) == pytest.approx(expected)


def test_odin_by_hand():
    """Quality that follows the length costs 1, a length head that follows it earns 1; parallel heads cost 1."""
    tokens = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]], dtype=torch.float64)
    flat = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]], dtype=torch.float64)
    flat = flat - (flat * (tokens - 4)).sum() / ((tokens - 4) ** 2).sum() * (tokens - 4)  # no correlation
    heads = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)

    def extra(quality, length, heads):
        total = quality + length
        return float(reward_model.odin_loss(quality, length, tokens, heads)) - float(
            reward_model.bradley_terry_loss(total[0], total[1])
        )

    assert extra(flat, tokens, heads) == pytest.approx(-1, abs=1e-5)
    assert extra(-tokens, tokens, heads) == pytest.approx(0, abs=1e-5)
    assert extra(flat, -tokens, heads) == pytest.approx(1, abs=1e-5)
    assert extra(flat, tokens, heads[[0, 0]]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_are_the_classifier_s_own_and_padding_cannot_move_them(kind, tokenizer):
    model = RewardModel(network(kind), tokenizer)
    texts, prompts = ["a b", "c d e f g a", "b"], ["h", "h g", "a"]
    together = model(texts, prompts)
    apart = torch.cat([model([t], [p]) for t, p in zip(texts, prompts, strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([tokenizer(f"{p} {t} <eos>")["input_ids"] for t, p in zip(texts[:1], prompts[:1], strict=True)])
    with torch.no_grad():
        theirs = model.network(input_ids=ids).logits[0, 0]
    torch.testing.assert_close(together[0], theirs, rtol=1e-5, atol=1e-6)
    assert model.tokenize(prompts, texts)["num_tokens"].tolist() == [3, 7, 2]


def test_normalised_over_the_base_and_affine_afterwards(tokenizer):
    model = RewardModel(network(), tokenizer, rows=3)
    texts, prompts = ["a", "b c", "d", "e a", "f", "g g g"], ["h"] * 6
    before = model(texts, prompts)
    model.normalise(texts, prompts)
    after = model(texts, prompts)
    assert float(after.mean()) == pytest.approx(0, abs=1e-5) and float(after.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(before.argsort(), after.argsort())


@pytest.mark.parametrize(("kind", "odin"), [("gpt2", False), ("llama", False), ("gpt2", True)])
def test_it_learns_which_response_wins(kind, odin, tokenizer):
    model = RewardModel(network(kind, 2 if odin else 1), tokenizer)
    config = Config(num_epochs=4, batch_size=32, learning_rate=1e-2, odin=odin)
    history = fit(reward_model.train(model, preferences(256), config), progress=False)
    assert history["network_evaluations"][-1] == 4 * 256 * 6
    fresh = preferences(200, seed=1)
    decided = [c.split().count("a") > r.split().count("a") for c, r in zip(fresh.chosen, fresh.rejected, strict=True)]
    won = model(fresh.chosen, fresh.prompts) > model(fresh.rejected, fresh.prompts)
    assert won[torch.tensor(decided)].float().mean() > 0.9
    assert not any(p.requires_grad for p in model.network.parameters())


def test_weight_averaging_is_the_mean_of_the_weights():
    nets = [network(seed=i) for i in range(3)]
    into = reward_model.average_weights(nets, copy.deepcopy(nets[0]))
    for p, *others in zip(into.parameters(), *(n.parameters() for n in nets), strict=True):
        torch.testing.assert_close(p, torch.stack(others).mean(0))


def test_refusals(tokenizer):
    model = RewardModel(network(), tokenizer)
    with pytest.raises(ValueError, match="num_labels=2"):
        next(reward_model.train(model, preferences(4), Config(odin=True)))
    for nothing in (Pairs([], [], []), Pairs(["h"], torch.zeros(1, 2), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="no pairs of texts"):
            next(reward_model.train(model, nothing))
    same = ["a", "a"]
    with pytest.raises(ValueError, match="same score"):
        model.normalise(same, ["h", "h"])


def test_a_process_without_a_pair_has_outputs_of_the_others_kind(tokenizer):
    """Processes add their outputs up: another precision would be an error, or other numbers, in the sum."""
    model = RewardModel(network().bfloat16(), tokenizer)
    (some, tokens), (none, no_tokens) = (reward_model.pair_scores(model, preferences(4), rows) for rows in ([1], []))
    assert some.dtype == none.dtype and tokens.dtype == no_tokens.dtype
    assert some.shape[1:] == none.shape[1:] and none.shape[0] == 0 and none.requires_grad


# ---- other people's classifiers and tokenizers -----------------------------------------------------------------------

SMALL = dict(
    vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1, cls_token_id=1, sep_token_id=1,
)  # fmt: skip
HEADS = {
    "roberta": SMALL, "deberta-v2": SMALL, "modernbert": SMALL, "bert": SMALL, "gpt_neox": SMALL,
    "opt": SMALL | dict(ffn_dim=32, word_embed_proj_dim=16),
    "xlnet": dict(vocab_size=len(WORDS), d_model=16, n_layer=2, n_head=2, d_inner=32),
    "t5": dict(
        vocab_size=len(WORDS), d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    ),
}  # fmt: skip


def classifier(kind, num_labels=1, auto=AutoModelForSequenceClassification, **changes):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, num_labels=num_labels, **HEADS.get(kind, SMALL) | changes))


@pytest.mark.parametrize("kind", sorted(HEADS.keys() - {"xlnet"}))
@pytest.mark.parametrize("odin", [False, True])
def test_any_head_scores_as_its_own_network_and_trains(kind, odin, tokenizer):
    """Whatever pools, and wherever the last layer is: the network's own logits of an unpadded row. All of it moves."""
    model = RewardModel(classifier(kind, 2 if odin else 1), tokenizer)
    texts, prompts = ["a b", "c d e f g a", "b"], ["h", "h g", "a"]
    scores = model(texts, prompts)
    for score, text, prompt in zip(scores, texts, prompts, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(f"{prompt} {text} <eos>")["input_ids"]])
            theirs = model.network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
        torch.testing.assert_close(score, theirs, rtol=1e-4, atol=1e-6)
    assert scores.std() > 0
    weights = [output_layer(model.network).weight, model.network.get_input_embeddings().weight]
    before = [weight.detach().clone() for weight in weights]
    history = fit(reward_model.train(model, preferences(8), Config(batch_size=8, odin=odin)), progress=False)
    assert weights[0].shape[0] == (2 if odin else 1)
    assert math.isfinite(history["loss"][0])
    assert all((now - then).abs().max() > 1e-4 for now, then in zip(weights, before, strict=True))


def test_what_is_no_sequence_classifier_is_refused_at_once(tokenizer):
    from peft import LoraConfig, get_peft_model

    for auto in (AutoModelForCausalLM, AutoModelForTokenClassification):
        with pytest.raises(ValueError, match=r"no sequence classifier.*AutoModelForSequenceClassification"):
            RewardModel(classifier("llama", auto=auto), tokenizer)
    with pytest.raises(ValueError, match="Linear is no sequence classifier"):
        RewardModel(torch.nn.Linear(2, 1), tokenizer)
    adapted = get_peft_model(network("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel.*merge_and_unload\(\)"):
        RewardModel(adapted, tokenizer)
    assert RewardModel(adapted.merge_and_unload(), tokenizer)(["a"], ["b"]).isfinite().all()


def test_a_classifier_that_reads_padding_is_refused(tokenizer):
    model = RewardModel(classifier("xlnet"), tokenizer)
    assert model(["a b", "c d"], ["h", "h"]).shape == (2,)  # nothing to pad
    for _ in range(2):
        with pytest.raises(ValueError, match="XLNetForSequenceClassification reads padding: 3 tokens of it"):
            model(["a", "c d e f"], ["h", "h"])


def test_it_reads_the_opening_once_and_no_end_but_the_last():
    """BOS or [CLS] as the tokenizer puts it before a text, not again after a template's own; EOS, or [SEP], behind."""
    from tokenizers import processors

    def tokens(template, prompts, responses, **special):
        made = make_tokenizer()
        for name, value in special.items():
            setattr(made, name, value)
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("g", 9), ("<eos>", 1)]
        )
        batch = RewardModel(network(), made).tokenize(prompts, responses)
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
        assert batch["num_tokens"].tolist() == [2] * len(prompts)
        return [row[:length] for row, length in rows]

    for template in ("g $A", "g $A <eos>"):
        assert tokens(template, ["b", "g b"], ["a", "a"]) == [[9, 4, 3, 1]] * 2
    assert tokens("$A", ["b", "g b"], ["a", "a <eos>"]) == [[4, 3, 1], [9, 4, 3, 1]]
    assert tokens("$A", ["b"], ["a"], eos_token=None, sep_token="h") == [[4, 3, 10]]


def test_tokens_beyond_the_embedding_are_named(tokenizer):
    bigger = make_tokenizer()
    bigger.add_tokens(["<tool>"])
    model = RewardModel(network(), bigger)
    with pytest.raises(ValueError, match=r"prompt 'b' with its response has the token '<tool>', id 11.*resize_token"):
        model(["a", "<tool>"], ["a", "b"])


def test_it_trains_in_float32(tokenizer):
    model = RewardModel(network().bfloat16(), tokenizer)
    steps = reward_model.train(model, preferences(8), Config(batch_size=8))
    saved = next(steps).checkpoint()
    assert {t.dtype for key, t in saved.items() if key.startswith(("parameter", "optimizer"))} == {torch.float32}


def test_gradient_checkpointing_is_heard_by_a_classifier(tokenizer):
    kept = {}
    for enable in (False, True):
        net = network("llama")
        if enable:
            net.gradient_checkpointing_enable()
        model, sizes = RewardModel(net, tokenizer), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):
            reward_model.pair_scores(model, preferences(4), range(4))
        kept[enable] = sum(sizes)
    assert kept[True] < 0.4 * kept[False]


@pytest.mark.parametrize("texts", [["a"], ["a", "a", "a"]])
def test_nothing_to_normalise_by(texts, tokenizer):
    """One response has no spread, nor have equal ones; the model stays as it was."""
    model = RewardModel(network(), tokenizer)
    with pytest.raises(ValueError, match=f"all these responses, {len(texts)}, have the same score"):
        model.normalise(texts, ["h"] * len(texts))


@pytest.mark.parametrize("n", [1, 3])
def test_odin_without_any_spread_is_finite(n):
    """Equal lengths and equal qualities correlate with nothing; so do those of one pair."""
    same = torch.full((2, n), 0.3, requires_grad=True)
    heads = torch.zeros(2, 4, requires_grad=True)
    loss = reward_model.odin_loss(same, same, torch.full((2, n), 5.0), heads)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [same, heads]))
