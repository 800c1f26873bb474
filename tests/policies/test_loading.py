"""A model whose weights are not all the file's is refused, in diffusers' classes and in transformers'."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from minialign.policies.loading import load_whole


def unet():
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("make", [unet, gpt2])
def test_missing_and_surplus_weights_are_named(make, tmp_path):
    model = make().train()
    model.save_pretrained(tmp_path)
    loaded = load_whole(type(model), tmp_path)
    assert not loaded.training
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({"stray" if key == name else key: value for key, value in weights.items()}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"not those of the {type(model).__name__}.*missing are {name}, not .* stray\."
    ):
        load_whole(type(model), tmp_path)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"missing are {name}, not of this model are none"):
        load_whole(type(model), tmp_path)
    load_whole(type(model), tmp_path, new=[name])


def test_only_a_head_that_is_said_to_be_new_may_be_missing(tmp_path):
    from transformers import GPT2ForSequenceClassification

    gpt2().save_pretrained(tmp_path)
    assert load_whole(GPT2ForSequenceClassification, tmp_path, new=["score.weight"]).score.weight.shape == (2, 8)
    with pytest.raises(ValueError, match=r"missing are score\.weight, "):
        load_whole(GPT2ForSequenceClassification, tmp_path)


def test_of_many_names_three_are_shown(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    save_file({f"x{i}": torch.zeros(1) for i in range(5)} | weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not of this model are x0, x1, x2 and 2 more\."):
        load_whole(type(model), tmp_path)
