"""What a network is given: conditions by row and shared, prompts of any hashable kind, each architecture's call."""

from dataclasses import dataclass

import pytest
import torch
from conftest import class_conditional, sd_scheduler, stable_diffusion, stable_diffusion_xl
from torch import nn

from minialign.policies.architectures import call_network
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy


@dataclass(frozen=True)
class Scene:
    colour: str
    count: int


PROMPTS = [("red", 2), 7, Scene("blue", 3), ("red", 2), "a dog", 7]


class Spy(nn.Module):
    """Remembers what it was given; its output is the row's own number plus the shared one."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, t, row, ids):
        self.calls.append((row, ids))
        return (row + ids.sum()).unsqueeze(-1).expand_as(x) + self.weight


def spied(guidance_scale):
    encoded = []

    def encoder(prompts):
        encoded.append(list(prompts))
        numbers = torch.arange(len(prompts), dtype=torch.float32)
        return {"row": 10 + numbers}, {"row": 0 * numbers}, {"ids": torch.tensor([100.0, 200.0, 300.0])}

    policy = DiffusionPolicy(
        Spy(), sd_scheduler(), latent_shape=(2,), encoder=encoder, num_steps=3, guidance_scale=guidance_scale
    )
    return policy, encoded


def test_rows_select_rows_and_what_is_shared_stays():
    policy, encoded = spied(3.0)
    condition = policy.encode(PROMPTS)
    assert encoded == [[("red", 2), 7, Scene("blue", 3), "a dog"]]  # each once, in order
    assert condition.rows.tolist() == [0, 1, 2, 0, 3, 1]
    assert condition.inputs["row"].tolist() == [10, 11, 12, 10, 13, 11]
    part = condition[torch.tensor([4, 2])]
    assert len(part) == 2 and part.rows.tolist() == [3, 2]
    assert part.inputs["row"].tolist() == [13, 12] and part.unconditional["row"].tolist() == [0, 0]
    assert torch.equal(part.shared["ids"], condition.shared["ids"])
    # e_u + 3 (e_c - e_u) with e_u = 600, e_c = 600 + row; one call of both halves, the shared ids once
    output = policy.model_output(torch.zeros(2, 2), 0, part)
    assert output[:, 0].tolist() == [600 + 3 * 13, 600 + 3 * 12]
    ((row, ids),) = policy.network.calls
    assert row.tolist() == [0, 0, 13, 12] and ids.shape == (3,)


def test_guidance_can_be_off_for_a_call_and_needs_its_inputs():
    policy, _ = spied(3.0)
    condition = policy.encode(PROMPTS[:2])
    x, t = torch.zeros(2, 2), torch.tensor([5, 7])
    policy.network_evaluations = 0
    assert policy.output_at(x, t, condition, guidance_scale=1.0)[:, 0].tolist() == [610, 611]
    assert policy.network_evaluations == 3 * 2  # one pass, not two
    plain = policy.encode(PROMPTS[:2], guided=False)
    assert plain.unconditional == {}
    with pytest.raises(ValueError, match="encoded with guidance_scale = 1"):
        policy.output_at(x, t, plain)


def test_prompts_of_any_hashable_kind_and_bad_ones():
    policy = DiffusionPolicy(
        class_conditional(), sd_scheduler(), class_names=(("red", 2), 7, Scene("blue", 3), "a dog"), num_steps=3
    )
    assert policy.encode(PROMPTS).inputs["class_labels"].tolist() == [0, 1, 2, 0, 3, 1]
    assert policy.sample(PROMPTS).shape == (6, 1, 8, 8)
    with pytest.raises(ValueError, match=r"unknown prompt \('red', 3\); did you mean \"\('red', 2\)\"\?"):
        policy.encode([("red", 3)])
    with pytest.raises(ValueError, match=r"prompt 1 is the list \['red'\].*hashable"):
        policy.encode([7, ["red"]])
    with pytest.raises(ValueError, match="expected a list of strings"):
        policy.encode("a dog")


def test_encoding_many_prompts_is_not_quadratic():
    """50,000 distinct prompts: a search through the list for each would be 10^9 comparisons."""
    policy = DiffusionPolicy(class_conditional(), sd_scheduler(), num_steps=3)
    assert policy.encode(range(50_000)).rows[-1] == 49_999


def test_a_guidance_embedding_goes_with_its_row(tmp_path):
    teacher = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), guidance_scale=1.0)
    student = ConsistencyPolicy.from_diffusion(teacher, guidance_dim=16)
    condition = student.encode(["abc", "de", "f"])
    scales = student.with_guidance(condition, torch.tensor([1.0, 3.0, 8.0]))
    alone = student.with_guidance(condition[[1]], torch.tensor([3.0]))
    torch.testing.assert_close(scales[[1]].inputs["timestep_cond"], alone.inputs["timestep_cond"])
    assert "timestep_cond" not in scales.unconditional


# ---------------------------------------------------------------------------------------------- architectures


def test_added_conditions_of_stable_diffusion_xl(tmp_path):
    policy = DiffusionPolicy.from_pipeline(stable_diffusion_xl(tmp_path), num_steps=3, guidance_scale=1.0)
    condition = policy.encode(["abc", "de"])
    inputs = condition.inputs
    x, t = torch.randn(2, *policy.latent_shape), torch.tensor([3, 500])
    added = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
    direct = policy.network(x, t, encoder_hidden_states=inputs["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert torch.equal(policy.output_at(x, t, condition), direct)


def transformers_of_diffusers():
    """(network, states, inputs, what it is called with by hand) of each architecture that names its arguments."""
    from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=1, norm_num_groups=2,
        sample_size=4, patch_size=2, num_embeds_ada_norm=8,
    )  # fmt: skip
    sd3 = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=2,
        pos_embed_max_size=8,
    )  # fmt: skip
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {"encoder_hidden_states": torch.randn(2, 3, 16), "pooled_projections": torch.randn(2, 12)}
    image = torch.randn(2, 2, 4, 4)
    ids = {"img_ids": torch.rand(5, 3), "txt_ids": torch.zeros(3, 3)}
    return [
        (dit, image, {"class_labels": torch.tensor([1, 3])}, 1),
        (sd3, image, text, 1),
        (flux, torch.randn(2, 5, 4), text | ids, 1000),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_transformers_name_their_arguments_and_flux_counts_time_to_one(which):
    network, states, inputs, unit = transformers_of_diffusers()[which]
    network.eval()
    t = torch.tensor([300, 900])
    with torch.no_grad():
        direct = network(hidden_states=states, timestep=t / unit if unit > 1 else t, **inputs).sample
        assert torch.equal(call_network(network, states, t, inputs), direct)
        assert not torch.equal(call_network(network, states, t - 200, inputs), direct)
        kept = type("Mine", (type(network),), {})  # a subclass is called like its parent
        network.__class__ = kept
        assert torch.equal(call_network(network, states, t, inputs), direct)
