"""Bradley-Terry, Reg, ODIN and WARM: by hand, against closed forms, and on real transformers classifiers."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from minialign.loop import fit
from minialign.methods import reward_model
from minialign.methods.reward_model import Config, Preferences, RewardModel

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
    return Preferences(["h"] * n, [a for a, _ in pairs], [b for _, b in pairs])


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
    with pytest.raises(ValueError, match="1 prompts, 2 chosen"):
        next(reward_model.train(model, Preferences(["h"], ["a", "b"], ["c"])))
    same = ["a", "a"]
    with pytest.raises(ValueError, match="same score"):
        model.normalise(same, ["h", "h"])


def test_a_process_without_a_pair_has_outputs_of_the_others_kind(tokenizer):
    """Processes add their outputs up: another precision would be an error, or other numbers, in the sum."""
    model = RewardModel(network().bfloat16(), tokenizer)
    (some, tokens), (none, no_tokens) = (reward_model.pair_scores(model, preferences(4), rows) for rows in ([1], []))
    assert some.dtype == none.dtype and tokens.dtype == no_tokens.dtype
    assert some.shape[1:] == none.shape[1:] and none.shape[0] == 0 and none.requires_grad
