"""What the savers write, and what is shipped, is in the form that transformers 4 and 5 both read."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minialign.pretrain import formats, shapes_models
from minialign.worlds import assistant
from minialign.worlds.base import WEIGHTS

CLIP = ("shapes/tokenizer", "shapes/scorer", "shapes_lcm/tokenizer")


def told(path):
    return json.loads(path.read_text(encoding="utf-8"))


def merges(folder):
    first, *lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("#version")  # transformers 4 skips a line, whatever it says
    return lines


def check_tokenizer(folder):
    settings = told(folder / "tokenizer_config.json")
    assert set(settings) <= set(formats.SETTINGS)
    assert settings["tokenizer_class"] in ("CLIPTokenizer", "PreTrainedTokenizerFast")


@pytest.mark.parametrize("name", [*CLIP, "assistant"])
def test_shipped_tokenizers(name):
    check_tokenizer(WEIGHTS / name)
    model = told(WEIGHTS / name / "tokenizer.json")["model"]
    if name in CLIP:
        assert told(WEIGHTS / name / "vocab.json") == model["vocab"]
        assert merges(WEIGHTS / name) == [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize("name", ["shapes", "shapes_lcm"])
def test_shipped_text_encoders(name):
    with safe_open(WEIGHTS / name / "text_encoder" / "model.safetensors", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"text_model"}  # noqa: SIM118 (not a dictionary)


def test_the_saver_writes_the_words_that_are_shipped(tmp_path):
    formats.save_tokenizer(shapes_models.tokenizer(), tmp_path)
    check_tokenizer(tmp_path)
    for name in CLIP:
        assert told(tmp_path / "vocab.json") == told(WEIGHTS / name / "vocab.json")
        assert merges(tmp_path) == merges(WEIGHTS / name)
    formats.save_tokenizer(assistant.make_tokenizer(), tmp_path / "assistant")
    ours, shipped = tmp_path / "assistant", WEIGHTS / "assistant"
    assert told(ours / "tokenizer_config.json") == told(shipped / "tokenizer_config.json")
    for part in ("model", "added_tokens", "pre_tokenizer", "normalizer"):
        assert told(ours / "tokenizer.json")[part] == told(shipped / "tokenizer.json")[part]


def test_a_pipeline_is_saved_in_both_forms_and_loads_as_it_was(tmp_path):
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    words = shapes_models.tokenizer()
    text = shapes_models.text_encoder(words).eval()
    pipe = shapes_models.pipeline(shapes_models.autoencoder(), shapes_models.denoiser(), text, words)
    formats.save_pipeline(pipe, tmp_path / "once")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "once", local_files_only=True)
    formats.save_pipeline(loaded, tmp_path / "twice")  # as the twin's is, from what was loaded
    for name in ("once", "twice"):
        check_tokenizer(tmp_path / name / "tokenizer")
        file = tmp_path / name / "text_encoder" / "model.safetensors"
        formats._prefix_names(file, "text_model.")  # no second prefix
        bare = {key.removeprefix("text_model.") for key in text.state_dict()}
        assert set(load_file(file)) == {f"text_model.{key}" for key in bare}
    prompts = ["a red circle above a blue square", "three zebras"]
    ids = shapes_models.token_ids(words, prompts)
    assert torch.equal(ids, shapes_models.token_ids(loaded.tokenizer, prompts))
    assert torch.equal(text(ids).last_hidden_state, loaded.text_encoder(ids).last_hidden_state)


def test_whole_words_come_without_token_types():
    """A GPT-2 would add the embedding of token 0 to every other."""
    for words in (assistant.make_tokenizer(), assistant.load_model()[1]):
        assert set(words("the cow")) == {"input_ids", "attention_mask"}
