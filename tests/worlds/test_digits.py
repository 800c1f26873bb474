"""The digits: real data, the exact mixture, the shipped network, its rewards, and how its weights are made."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits

from minialign import worlds
from minialign.measure import frechet_distance
from minialign.rewards import checked_set
from minialign.worlds import digits
from minialign.worlds.base import WEIGHTS

EVEN = [digits.NAMES[i % 10] for i in range(500)]  # every digit equally often


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return worlds.load("digits")


@pytest.fixture(scope="module")
def samples(world):
    return world.policy.sample(EVEN, generator=rng(0))


# ---- data


def test_the_real_digits_are_all_there_and_keep_their_labels():
    images, labels = digits.data("all")
    bunch = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    table = {tuple(image.ravel() / 16): label for image, label in zip(bunch.images, bunch.target, strict=True)}
    assert all(table[tuple(i.flatten().tolist())] == label for i, label in zip(images, labels.tolist(), strict=True))
    assert len({tuple(i.flatten().tolist()) for i in images}) == len(table)


def test_held_out_digits_are_held_out():
    (train, _), (held_out, _) = digits.data("train"), digits.data("held_out")
    assert (len(train), len(held_out)) == (1437, 360)
    seen = {tuple(image.flatten().tolist()) for image in train}
    assert sum(tuple(image.flatten().tolist()) in seen for image in held_out) == 0
    with pytest.raises(ValueError, match="unknown split 'test'"):
        digits.data("test")


def test_real_draws_each_digit_once_before_any_twice():
    images, names = digits.real(1800, rng(1))
    assert len(images) == len(names) == 1800
    assert len({tuple(image.flatten().tolist()) for image in images[:1797]}) == 1797
    assert (digits.classifier().predict(images.flatten(1).numpy()) == digits.labels_of(names).numpy()).mean() > 0.99
    assert torch.equal(digits.real(5, rng(2))[0], digits.real(5, rng(2))[0])
    assert digits.real(0)[0].shape == (0, 1, 8, 8)


# ---- rewards


def test_the_classifier_reads_held_out_digits():
    images, labels = digits.data("held_out")
    assert (digits.classifier().predict(images.flatten(1).numpy()) == labels.numpy()).mean() >= 0.985


def test_the_oracle_asks_for_the_prompts_digit():
    images, names = digits.real(200, rng(3))
    right = digits.oracle(images, names)
    assert right.dtype == torch.float32
    assert right.mean() >= 0.99
    shifted = [digits.NAMES[(digits.NAMES.index(name) + 1) % 10] for name in names]
    assert digits.oracle(images, shifted).mean() <= 0.01
    with pytest.raises(ValueError, match="unknown prompt 'ten'"):
        digits.oracle(images[:1], ["ten"])
    assert digits.oracle(images[:0], []).shape == (0,)


def test_the_oracle_is_not_fooled_by_what_no_digit_looks_like():
    block = torch.zeros(1, 1, 8, 8)
    block[..., 1:7] = 1.0
    assert digits.classifier().predict(block.flatten(1).numpy()) == 1  # a white rectangle is "one", says the classifier
    assert digits.oracle(block, ["one"]).item() == 0
    train = digits.data("train")[0].flatten(1)
    nearest = torch.tensor([(train - x).norm(dim=1).kthvalue(2).values for x in train])
    assert ((nearest <= digits.reach()).sum() / len(train)).item() == pytest.approx(0.999, abs=0.001)


def test_ink_and_symmetry_by_hand():
    picture = torch.zeros(1, 1, 8, 8)
    picture[0, 0, 0, 0], picture[0, 0, 0, 7] = 1.0, 0.5  # a pair that mirrors, 0.5 apart
    picture[0, 0, 4, 2] = 0.5  # its mirror image is empty
    assert digits.ink(picture, ["one"]).item() == pytest.approx(2 / 64)
    # |x - mirror| sums to 2 (0.5 + 0.5) = 2, x + mirror to 2 * 2 = 4
    assert digits.symmetric(picture, ["one"]).item() == pytest.approx(1 - 2 / 4)
    assert digits.symmetric(picture + picture.flip(-1), ["one"]).item() == 1
    assert digits.symmetric(0 * picture, ["one"]).item() == 1
    assert digits.symmetric(picture + picture.flip(-2), ["one"]).item() < 1  # up-down does not count


def test_bold_and_thin_pay_only_for_what_can_be_read():
    images, names = digits.real(60, rng(4))
    names = names[:30] + [digits.NAMES[(digits.NAMES.index(name) + 1) % 10] for name in names[30:]]
    right, ink = digits.oracle(images, names), images.flatten(1).mean(1)
    assert 0 < right.sum() <= 31
    torch.testing.assert_close(digits.bold(images, names), right * ink)
    torch.testing.assert_close(digits.thin(images, names), right * (1 - ink))


def test_likeness_is_the_posterior_of_the_mixture_by_scipy():
    images, names = digits.real(6, rng(5))
    train, labels = digits.data("train")
    latents = 2 * train.flatten(1).double().numpy() - 1
    joint = np.zeros((6, 10))
    for digit in range(10):
        own = latents[labels.numpy() == digit]
        covariance = np.cov(own.T, bias=True) + digits.RIDGE * np.eye(64)
        joint[:, digit] = scipy.stats.multivariate_normal(own.mean(0), covariance).logpdf(
            2 * images.flatten(1).double().numpy() - 1
        )
    joint = scipy.special.log_softmax(joint, axis=1)  # of equal prior weights: each digit is asked for by name
    for shift in (0, 3):
        wanted = [(digits.NAMES.index(name) + shift) % 10 for name in names]
        score = digits.likeness(images.double(), [digits.NAMES[digit] for digit in wanted])
        np.testing.assert_allclose(score, joint[np.arange(6), wanted], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["ink", "symmetric", "likeness", "bold", "thin"])
def test_gradients_of_smooth_rewards_are_live(name):
    images, names = digits.real(4, rng(6))
    wanted = names if name in ("bold", "thin") else [digits.NAMES[(digits.NAMES.index(n) + 1) % 10] for n in names]
    images = (0.9 * images + 0.05).requires_grad_()
    digits.REWARDS[name](images, wanted).sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()


# ---- the exact mixture


def test_the_mixture_has_the_moments_of_its_digits():
    mixture, (images, labels) = digits.mixture(), digits.data("train")
    latents = 2 * images.flatten(1).double() - 1
    torch.testing.assert_close(mixture.means[3], latents[labels == 3].mean(0))
    mean, covariance = mixture.moments()
    torch.testing.assert_close(mean, latents.mean(0))
    torch.testing.assert_close(
        covariance, latents.T.cov(correction=0) + digits.RIDGE * torch.eye(64, dtype=torch.float64)
    )


def test_the_mixture_world_is_an_exact_base_model_that_can_be_trained():
    world = worlds.load("digits", model="mixture", num_steps=10)
    state, step = torch.randn(4, 1, 8, 8, generator=rng(7)), torch.tensor(3)
    condition = world.policy.encode(["two", "seven", "two", "zero"])
    trained = world.policy.step(state, step, condition, next=state)
    base = world.policy.step(state, step, condition, next=state, reference=True)
    torch.testing.assert_close(trained.mean, base.mean, rtol=0, atol=0)
    own = digits.mixture().noise_pred(
        state[1:2].double(),
        world.policy.scheduler.alphas_cumprod[world.policy.timesteps[3]].double(),
        torch.eye(10, dtype=torch.float64)[7:8].log(),
    )
    torch.testing.assert_close(
        world.policy.model_output(state, step, condition)[1:2].double(), own, rtol=1e-3, atol=1e-4
    )
    assert sum(p.numel() for p in world.policy.parameters()) > 0
    drawn = world.policy.sample(EVEN[:200], generator=rng(8))
    assert world.oracle(drawn, EVEN[:200]).mean() > 0.95


# ---- the shipped network


def test_the_base_model_draws_the_digits_it_is_asked_for(samples):
    assert samples.shape == (500, 1, 8, 8)
    assert 0 <= samples.min() < samples.max() <= 1
    right = digits.oracle(samples, EVEN)
    assert right.mean() >= 0.97  # measured: 0.998 of these, 0.995 of 2,000
    assert right.view(50, 10).mean(0).min() >= 0.9  # no digit is left out


def test_few_steps_are_enough_with_and_without_guidance():
    few = EVEN[:200]
    quick = worlds.load("digits", num_steps=10)
    assert quick.oracle(quick.policy.sample(few, generator=rng(1)), few).mean() >= 0.97
    guided = worlds.load("digits", num_steps=10, guidance_scale=2.0)
    assert guided.oracle(guided.policy.sample(few, generator=rng(1)), few).mean() >= 0.97


def test_samples_look_like_real_digits_to_the_frechet_distance(samples):
    real = digits.data("all")[0].flatten(1)
    blurred = torch.nn.functional.avg_pool2d(samples, 3, 1, 1).flatten(1)
    distance = frechet_distance(samples.flatten(1), real)
    assert distance < 0.25  # measured: 0.12; 500 real digits: 0.05; the exact mixture (2,000): 0.11
    assert frechet_distance(blurred, real) > 2  # so the measure sees a one-pixel blur


def test_samples_are_no_copies_of_the_training_digits(samples):
    train = digits.data("train")[0].flatten(1)
    held_out = digits.data("held_out")[0].flatten(1)
    nearest = torch.cdist(samples.flatten(1), train).amin(1).median()
    nearest_real = torch.cdist(held_out, train).amin(1).median()
    assert nearest > 0.8 * nearest_real  # measured: 0.91; copies would give 0


def test_the_network_is_small_and_its_world_complete(world):
    assert sum(p.numel() for p in world.policy.network.parameters()) < 500_000
    assert sum(f.stat().st_size for f in (WEIGHTS / "digits").rglob("*") if f.is_file()) < 3e6
    assert world.prompts == list(digits.NAMES)
    assert world.default_reward in world.rewards
    assert world.policy.std.min() > 0  # every step has a density
    images, names = world.real(3, rng(9))
    for reward in world.rewards.values():
        assert reward(images, names).shape == (3,)


def test_the_samples_can_be_shown(world, samples):
    fig = world.show(samples[:4], ["zero", "one", "two", "nine"])
    assert [text.get_text() for text in fig.axes[0].texts] == ["zero", "one", "two", "nine"]
    assert len(fig.axes[0].lines) == 3 * 1 + 2  # three ticks, and a cross of two strokes for a three that is no nine
    assert len(fig.axes[0].images) == 4


def test_unknown_words_and_models_are_named(world):
    with pytest.raises(ValueError, match="unknown prompt 'sevn'; did you mean 'seven'"):
        world.policy.encode(["sevn"])
    with pytest.raises(ValueError, match="unknown model 'unett'"):
        worlds.load("digits", model="unett")


# ---- weights


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(WEIGHTS / "digits", tmp_path / "digits")


def test_the_card_names_the_weights_by_their_hash():
    weights = (WEIGHTS / "digits" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in (WEIGHTS / "digits" / "README.md").read_text(encoding="utf-8")


def test_the_shipped_scheduler_is_the_one_of_the_sheets():
    config = json.loads((WEIGHTS / "digits" / "scheduler" / "scheduler_config.json").read_text())
    wanted = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    wanted |= {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "epsilon"}
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize("part", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler"])
def test_missing_weights_name_the_command_that_remakes_them(copy, part):
    target = copy / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{part}.* is missing.*minialign pretrain digits"):
        digits.load(folder=copy)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{" + b[1:]])
def test_damaged_weights_name_the_command_too(copy, damage):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(FileNotFoundError, match=r"does not load.*minialign pretrain digits"):
        digits.load(folder=copy)


def test_rewards_of_a_set_prefer_what_their_exemplars_show(world):
    held_out, labels = digits.data("held_out")
    ink = held_out.flatten(1).mean(1).argsort()
    sets = {
        "like_bold": (held_out[ink[-90:]], held_out[ink[:90]]),
        "like_3_and_8": (held_out[(labels == 3) | (labels == 8)][:60], held_out[(labels == 0) | (labels == 1)][:60]),
        "like_real": (held_out[:100], held_out[labels == 0].repeat(4, 1, 1, 1)[:100]),
        "vendi": (held_out[:100], held_out[labels == 0].repeat(4, 1, 1, 1)[:100]),
    }
    assert sets.keys() == world.set_rewards.keys()
    for name, (better, worse) in sets.items():
        scores = [float(checked_set(world.set_rewards[name](), x, ["any"] * len(x))) for x in (better, worse)]
        assert scores[0] > scores[1], name
    assert digits.in_axes(held_out).shape == (360, 16)
    spread = digits.in_axes(digits.data("train")[0]).var(0).sum() / digits.data("train")[0].flatten(1).var(0).sum()
    assert 0.84 < spread < 0.86  # what the docstring says
