"""`minialign pretrain assistant`: its labels, its loss, its determinism."""

import math
import types

import pytest
import torch

from minialign.pretrain import assistant as recipe
from minialign.worlds import assistant

COW = "what does the cow eat ?"


def test_labels_are_the_answer_and_its_end():
    ids, labels = recipe.tokens_and_labels([COW, COW], ["the cow eats grass .", "hello !"])
    index = {word: i for i, word in enumerate(assistant.words())}
    assert ids.shape == (2, 12) and labels[0].tolist() == [-100] * 6 + [
        index[word] for word in ["the", "cow", "eats", "grass", ".", "<eos>"]
    ]
    assert labels[1, 6:].tolist() == [index["hello"], index["!"], index["<eos>"], -100, -100, -100]


def test_the_loss_is_that_of_answers_alone():
    """A network that knows nothing: log 128 nats a token, whatever stands in questions and padding."""
    network = types.SimpleNamespace(logits=torch.zeros(2, 12, 128))
    ids, labels = recipe.tokens_and_labels([COW, COW], ["the cow eats grass .", "hello !"])
    loss = recipe.answer_loss(_Constant(network), ids, labels)
    assert loss.item() == pytest.approx(math.log(128), abs=1e-6)


class _Constant(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, **inputs):
        return self.output


def test_pretraining_is_deterministic_and_learns(tmp_path):
    short = recipe.Recipe(num_steps=30, batch_size=16, width=16, layers=1, num_answers=2)
    quiet = lambda line: None  # noqa: E731
    before = torch.get_rng_state()
    figures = [recipe.main(tmp_path / name, recipe=short, report=quiet) for name in ("a", "b")]
    assert torch.equal(before, torch.get_rng_state())
    for name in ("model.safetensors", "answers.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert figures[0] == figures[1]
    assert (
        figures[0]["loss on new answers, nats a token"] < math.log(128) - 0.1
    )  # thirty updates of a tiny one, still warming up: 4.68 against 4.85
    assert not list(tmp_path.glob("*.partial"))
