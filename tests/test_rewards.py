"""The check at the border of every reward, and the ready rewards."""

import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image

from minialign import rewards

SAMPLES = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"prompt {i}" for i in range(7)]


def returning(value):
    def constant(samples, prompts):
        return value

    return constant


def refusal(reward, samples=SAMPLES, prompts=PROMPTS) -> str:
    with pytest.raises(rewards.RewardError) as caught:
        rewards.checked(reward, samples, prompts)
    return str(caught.value)


# ---- what is accepted


@pytest.mark.parametrize(
    "scores",
    [
        torch.arange(7.0),
        torch.arange(7.0, dtype=torch.float64),
        torch.arange(7),
        torch.arange(7.0, dtype=torch.bfloat16),
        np.arange(7.0),
        np.arange(7, dtype=np.int32),
        np.arange(14.0)[::2] / 2,  # not contiguous
        np.arange(6.0, -1.0, -1.0)[::-1],  # negative strides, which torch.from_numpy alone refuses
    ],
)
def test_numbers_of_every_kind_become_float32(scores):
    out = rewards.checked(returning(scores), SAMPLES, PROMPTS)
    assert out.dtype == torch.float32
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_booleans_count_as_zero_and_one():
    assert rewards.checked(returning(torch.arange(7) > 4), SAMPLES, PROMPTS).tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_autograd_flows_through():
    samples = SAMPLES.double().requires_grad_()
    rewards.checked(lambda x, c: x.square().flatten(1).sum(1), samples, PROMPTS).sum().backward()
    torch.testing.assert_close(samples.grad, 2 * samples.detach())


def test_prompts_and_strings_reach_the_reward():
    lengths = rewards.checked(
        lambda x, c: torch.tensor([len(a) + len(b) for a, b in zip(x, c, strict=True)]), ["a", "bcd"], ["xy", ""]
    )
    assert lengths.tolist() == [3, 3]


# ---- what is refused, in the caller's own values


def test_a_linear_head_is_named():
    head = returning(torch.zeros(7, 1))
    head.__name__ = "aesthetic"
    assert refusal(head) == (
        "reward 'aesthetic' returned shape (7, 1) for 7 samples; expected (7,). "
        "Probably a linear head: return scores.squeeze(-1)."
    )


@pytest.mark.parametrize(
    ("shape", "cause"),
    [
        ((1, 7), "scores.squeeze(0)"),
        ((), "an average over the batch"),
        ((5,), "some samples were dropped"),
        ((7, 10), "one score per class"),
        ((7, 1, 8, 8), "scores.flatten(1).mean(1)"),
        ((3, 7), "one score per sample"),
    ],
)
def test_wrong_shapes_come_with_their_likely_cause(shape, cause):
    message = refusal(returning(torch.zeros(shape)))
    assert f"returned shape {shape} for 7 samples; expected (7,)." in message
    assert cause in message


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.0] * 7, ["a list", "Return torch.tensor(scores)."]),
        ((0.0,) * 7, ["a tuple", "Return torch.tensor(scores)."]),
        ([torch.zeros(())] * 7, ["a list", "Return torch.stack(scores)."]),
        (0.5, ["one number, 0.5", "average"]),
        (np.float64(0.5), ["one number, 0.5", "average"]),
        (None, ["None", "return statement is missing"]),
        ({"score": 1}, ["a dict"]),
        (np.array(["a"] * 7), ["a ndarray"]),
        (torch.zeros(7, dtype=torch.complex64), ["complex"]),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused_with_the_repair(scores, words):
    message = refusal(returning(scores))
    assert message.startswith("reward 'constant' returned")
    for word in words:
        assert word in message


def test_nan_is_counted_and_located():
    scores = torch.zeros(7)
    scores[[3, 5, 6]] = torch.nan
    assert refusal(returning(scores)) == (
        "reward 'constant' returned nan for 3 of 7 samples, first at index 3 (prompt 'prompt 3'). "
        "Look at samples[3] before filtering it out."
    )


def test_infinities_are_counted_too_and_overflow_to_float32_is_one():
    assert "returned inf for 1 of 7 samples, first at index 2 " in refusal(
        returning(torch.tensor([0, 0, -torch.inf, 0, 0, 0, 0]))
    )
    assert "returned nan and inf for 2 of 7" in refusal(returning(torch.tensor([torch.inf, torch.nan, 0, 0, 0, 0, 0])))
    assert "returned inf" in refusal(returning(torch.full((7,), 1e300, dtype=torch.float64)))


def test_an_exception_inside_is_named_and_kept_as_the_cause():
    def broken(samples, prompts):
        return {}["missing"]

    with pytest.raises(ValueError, match="reward 'broken' raised KeyError: 'missing'") as caught:
        rewards.checked(broken, SAMPLES, PROMPTS)
    assert "7 samples of shape (3, 8, 8)" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "takes (samples, prompts)" in refusal(lambda samples: samples)


def test_ctrl_c_inside_a_reward_is_not_swallowed():
    def interrupted(samples, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.checked(interrupted, SAMPLES, PROMPTS)


def test_samples_and_prompts_must_agree():
    assert (
        refusal(returning(torch.zeros(7)), prompts=PROMPTS[:3])
        == "reward 'constant' was given 7 samples but 3 prompts."
    )


def test_names_of_functions_partials_and_objects():
    class Scorer:
        def __call__(self, samples, prompts): ...

    assert rewards.name_of(rewards.jpeg_size) == "jpeg_size"
    assert rewards.name_of(functools.partial(rewards.jpeg_size, quality=50)) == "jpeg_size"
    assert rewards.name_of(Scorer()) == "Scorer"


# ---- JPEG size


def test_jpeg_size_is_that_of_pillows_file():
    image = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1))
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    assert rewards.jpeg_size(image[None], ["x"]).item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_noise_is_large_flat_is_small_and_quality_matters():
    noise, flat = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.full((1, 3, 32, 32), 0.4)
    both = rewards.jpeg_size(torch.cat([noise, flat]), ["", ""])
    assert both[0] > 2 * both[1] > 0
    assert rewards.jpeg_size(noise, [""], quality=20) < 0.5 * both[0]
    torch.testing.assert_close(rewards.incompressibility(noise, [""]), both[:1])
    torch.testing.assert_close(rewards.compressibility(noise, [""]), -both[:1])


def test_grey_images_and_out_of_range_values_are_coded_and_nan_is_reported():
    grey = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    assert (rewards.jpeg_size(grey, ["", ""]) > 0).all()
    torch.testing.assert_close(
        rewards.jpeg_size(3 * grey - 1, ["", ""]), rewards.jpeg_size((3 * grey - 1).clamp(0, 1), ["", ""])
    )
    grey[1, 0, 4, 4] = torch.nan
    assert "nan for 1 of 2 samples, first at index 1 (prompt 'b')" in refusal(rewards.jpeg_size, grey, ["a", "b"])


def test_jpeg_size_of_points_is_refused():
    assert "(7, 2)" in refusal(rewards.jpeg_size, torch.zeros(7, 2))


# ---- sums


def test_a_weighted_sum_adds_weighs_and_keeps_its_terms():
    known = {
        "mean": lambda x, c: x.flatten(1).mean(1),
        "one": lambda x, c: torch.ones(len(x)),
        "unused": returning(None),
    }
    total = rewards.weighted_sum(known, {"mean": 2.0, "one": -0.5})
    expected = 2 * SAMPLES.flatten(1).mean(1) - 0.5
    torch.testing.assert_close(rewards.checked(total, SAMPLES, PROMPTS), expected)
    assert rewards.name_of(total) == "2 mean - 0.5 one"
    assert set(total.terms(SAMPLES, PROMPTS)) == {"mean", "one"}


def test_a_broken_term_explains_itself_once():
    total = rewards.weighted_sum(
        {"good": returning(torch.zeros(7)), "bad": returning([0.0] * 7)}, {"good": 1, "bad": 1}
    )
    assert refusal(total).startswith("reward 'constant' returned a list")


def test_unknown_terms_are_refused():
    with pytest.raises(ValueError, match=r"unknown reward 'inc'\. There are: ink, oracle\."):
        rewards.weighted_sum({"oracle": returning(0), "ink": returning(0)}, {"inc": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        rewards.weighted_sum({"oracle": returning(0)}, {})


# ---- CLIP


class Words:
    """A tokenizer as transformers calls it: pads, keeps unused outputs, ends each text with the highest id."""

    def __call__(self, texts, padding, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        self.num_texts = len(texts)
        rows = [[1 + ord(letter) % 30 for letter in text[:6]] + [31] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [31] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": ids, "attention_mask": mask, "token_type_ids": ids})


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": 32,
        "max_position_embeddings": 8,
        "eos_token_id": 31,
        "bos_token_id": 0,
        "pad_token_id": 31,
    }
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    return CLIPModel(config)


def test_clip_score_equals_the_models_own_logits_on_the_processors_pixels(clip):
    from transformers import CLIPImageProcessor

    # neither square nor of the model's size, and of 8 bits already
    images = (torch.rand(3, 3, 20, 28, generator=torch.Generator().manual_seed(4)) * 255).round() / 255
    prompts, tokenizer = ["red", "blue", "blue"], Words()
    score = rewards.clip_scorer(clip, tokenizer)(images, prompts)
    assert tokenizer.num_texts == 2  # equal prompts are encoded once

    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor([(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in images], return_tensors="pt")
    tokens = Words()(prompts, True, True, "pt")
    with torch.no_grad():
        outputs = clip(pixel_values=pixels["pixel_values"], **{k: tokens[k] for k in ("input_ids", "attention_mask")})
    # Pillow rounds to 8 bits after resizing, too: half a level of 255, over a std of 0.27, is 0.007 a pixel.
    torch.testing.assert_close(score, outputs.logits_per_image.diagonal() / clip.logit_scale.exp(), atol=5e-3, rtol=0)
    assert score.std() > 0.02  # so that the tolerance means something


def test_clip_score_has_a_live_gradient_in_the_images_and_none_in_the_model(clip):
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(5)).requires_grad_()  # grey
    rewards.checked(rewards.clip_scorer(clip, Words()), images, ["a", "b"]).sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 1e-5).all()
    assert all(parameter.grad is None for parameter in clip.parameters())
    assert not clip.training


def test_clip_score_takes_the_processors_own_statistics(clip):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    identity = rewards.clip_scorer(clip, Words(), mean=(0.0,) * 3, std=(1.0,) * 3)
    shifted = rewards.clip_scorer(clip, Words(), mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(shifted(images * 0.25 + 0.5, ["a", "b"]), identity(images, ["a", "b"]))


# ---- rewards of a set


GROUP = [4, -1, 4, 4, -1, 4, 4]


def spread(samples, prompts):
    return samples.std(0).mean()


def set_refusal(reward, samples=SAMPLES, prompts=PROMPTS, group=None) -> str:
    with pytest.raises(rewards.RewardError) as caught:
        rewards.checked_set(reward, samples, prompts, group)
    return str(caught.value)


@pytest.mark.parametrize(
    "score", [2, 2.0, True, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor(2.0).double()]
)
def test_one_number_of_any_kind_is_a_score_of_a_set(score):
    found = rewards.checked_set(returning(score), SAMPLES, PROMPTS)
    assert found.dtype == torch.float32 and found.tolist() == [float(score)]


def test_groups_are_scored_apart_in_ascending_order():
    seen = []

    def reward(samples, prompts):
        seen.append(prompts)
        return samples.mean()

    found = rewards.checked_set(reward, SAMPLES, PROMPTS, GROUP)
    rows = [[1, 4], [0, 2, 3, 5, 6]]
    assert seen == [[PROMPTS[row] for row in group] for group in rows]
    torch.testing.assert_close(found, torch.stack([SAMPLES[group].mean() for group in rows]))
    torch.testing.assert_close(rewards.checked_set(reward, SAMPLES, PROMPTS, torch.tensor(GROUP)), found)
    torch.testing.assert_close(rewards.checked_set(reward, SAMPLES, PROMPTS), SAMPLES.mean().reshape(1))


def test_a_set_may_hold_anything_and_prompts_are_any_hashable():
    samples, prompts = [{"moves": 3}, {"moves": 5}, {"moves": 9}], [(0, 1), frozenset({2}), 7]

    def moves(samples, prompts):
        return sum(sample["moves"] for sample in samples)

    assert rewards.checked_set(moves, samples, prompts, [1, 0, 1]).tolist() == [5, 12]
    each = rewards.checked(lambda s, p: torch.tensor([len(x) for x in s]), samples, prompts)
    assert each.tolist() == [1, 1, 1]
    with pytest.raises(rewards.RewardError, match=r"first at index 1 \(prompt frozenset\(\{2\}\)\)"):
        rewards.checked(lambda s, p: torch.tensor([0.0, float("nan"), 0]), samples, prompts)


def test_autograd_flows_through_a_set():
    live = SAMPLES.clone().requires_grad_()
    rewards.checked_set(lambda samples, prompts: samples.square().sum(), live, PROMPTS, GROUP).sum().backward()
    torch.testing.assert_close(live.grad, 2 * SAMPLES)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (
            torch.zeros(7),
            "shape (7,) for group 0, a set of 7 samples; expected one number for the whole set. It scores",
        ),
        (torch.zeros(1), "of shape (1,) for group 0"),
        (torch.tensor(1j), "complex64 of shape ()"),
        ([1.0], "returned a list for group 0"),
        ("good", "returned a str"),
        (np.str_("good"), "returned a str_"),
        (None, "None for group 0, a set of 7 samples; expected one number for the whole set. Probably its return"),
        (float("nan"), "returned nan for group 0 of 7 samples"),
        (torch.tensor(-float("inf")), "returned -inf for group 0"),
        (torch.tensor(1e300, dtype=torch.float64), "returned inf for group 0"),
    ],
)
def test_what_is_not_one_number_is_refused(score, words):
    assert words in set_refusal(returning(score))


def test_a_set_reward_that_raises_and_sets_that_are_none():
    def broken(samples, prompts):
        return samples.no_such_method()

    assert "reward 'broken' raised AttributeError" in set_refusal(broken)
    assert "7 samples but 6 prompts" in set_refusal(spread, prompts=PROMPTS[:6])
    assert "was given no samples" in set_refusal(spread, SAMPLES[:0], [])
    assert "group has shape (6,) for 7 samples" in set_refusal(spread, group=GROUP[:6])
    assert "returned nan for group 2 of 1 samples" in set_refusal(spread, group=[1, 1, 1, 1, 1, 1, 2])
