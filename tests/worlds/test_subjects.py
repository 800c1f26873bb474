"""The two subjects: a thing in four dimensions, exact, and a two-coloured disc; their similarities on what is known."""

import pytest
import torch

from minialign import worlds
from minialign.kernels import add_noise
from minialign.worlds import dogs, shapes_subject
from minialign.worlds.shapes import render_scenes


def test_the_exact_base_knows_places_and_not_the_subject():
    """S_T of data: E exp(-|.25 z|^2) = 1 / (1 + 2 / 16); S_I of N(0, I): exp(-|v|^2 / 3) / 3. Within 4 s.e."""
    policy, task = dogs.load(base="exact")
    place = next(iter(dogs.PLACES))
    prompts = [f"a [V] dog {place}"] * 4000
    wide = torch.zeros(len(policy.network.mixture.log_weights), dtype=torch.bool)
    wide[0] = True
    log_weights = torch.where(wide, 0.0, float("-inf")).expand(4000, -1)
    samples = policy.network.mixture.sample(4000, torch.Generator().manual_seed(0), log_weights)[0]
    for similarity, mean in zip(task.similarities, (torch.tensor(-3.25 / 3).exp() / 3, 1 / 1.125), strict=True):
        scores = similarity(samples, prompts)
        assert abs(float(scores.mean() - mean)) < 4 * float(scores.std()) / 4000**0.5
        assert ((scores >= 0) & (scores <= 1)).all()
    assert torch.equal(task.similarities[1](samples[:3], ["a dog"] * 3), torch.ones(3))


def test_the_word_means_nothing_to_the_exact_base_and_the_references_are_all_on_the_beach():
    policy, task = dogs.load(base="exact", num_steps=5)
    noise = policy.draw_noise(6, torch.Generator().manual_seed(0))
    plain, named = (policy.sample([f"a {w}dog on the moon"] * 6, noise) for w in ("", "[V] "))
    assert torch.equal(plain, named)
    image, text = task.similarities
    assert image(task.references, [""] * 4).min() > 0.7
    assert text(task.references, ["a dog on the beach"] * 4).min() > 0.5
    assert text(task.references, ["a dog on the moon"] * 4).max() < 0.1
    with pytest.raises(ValueError, match="base is 'found'"):
        dogs.load(base="found")


def test_the_learned_base_is_taught_the_exact_one():
    """The error on noisy data of its own, before, after a few updates, and of no network at all."""
    exact = dogs.load(base="exact")[0].network
    torch.manual_seed(0)
    network, generator = dogs.WordsMLP(100), torch.Generator().manual_seed(3)
    labels, t = torch.arange(10).repeat(40), torch.randint(100, (400,), generator=generator)
    data = exact.mixture.sample(400, generator, exact.class_log_weights[labels])[0]
    states = add_noise(data, torch.randn(400, 4, generator=generator), exact.alphas_cumprod[t])
    wanted = exact(states, t, labels)
    assert (network(states, t, labels) - wanted).square().mean() > 0.5 * wanted.square().mean()
    dogs.fit(network, exact, updates=300)
    assert (network(states, t, labels) - wanted).square().mean() < 0.15 * wanted.square().mean()


def test_the_disc_is_like_itself_and_one_colour_is_not():
    image = shapes_subject.subject(3).similarities[0]
    other = shapes_subject.references(6, torch.Generator().manual_seed(99))
    assert image(other, [""] * 6).min() > 0.9
    wrong = render_scenes(
        ["a red circle", "a yellow circle", "a green circle", "a red circle left of a yellow circle"],
        torch.Generator().manual_seed(0),
    )
    assert image(wrong, [""] * 4).max() < 0.15
    upside = other.flip(2)  # yellow above red
    assert image(upside, [""] * 6).max() < 0.1
    centre = torch.full((1, 2), 16.0)
    blank = torch.tensor([0.965, 0.945, 0.91]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    disc = shapes_subject.draw_subject(centre, torch.tensor([6.0]))
    (which,), found = shapes_subject.features(disc)
    assert which == 0 and float(found[0, 0]) == pytest.approx(0.5, abs=0.05)
    assert float(found[0, 2]) == pytest.approx(0.479, abs=0.04)  # half-discs: 8 / (3 pi^1.5)
    assert torch.equal(image(torch.cat([blank, disc, blank]), [""] * 3) > 0, torch.tensor([False, True, False]))
    two = disc.clone()
    two[..., 1:6, 1:6] = torch.tensor(shapes_subject.COLOURS["red"]).view(3, 1, 1)  # something red elsewhere
    torch.testing.assert_close(image(two, [""]), image(disc, [""]))


def test_the_text_is_checked_fact_by_fact():
    text = shapes_subject.text_similarity
    scenes = render_scenes(["a red circle above a blue square"] * 3, torch.Generator().manual_seed(0))
    for place, held in [
        ("above a blue square", 3), ("below a blue square", 2), ("left of a blue square", 2),
        ("above a blue triangle", 2), ("below a blue triangle", 1), ("above a green square", 0),
    ]:  # fmt: skip
        torch.testing.assert_close(text(scenes, [f"a circle {place}"] * 3), torch.full((3,), held / 3))
    assert torch.equal(text(scenes, ["a circle"] * 3), torch.ones(3))
    alone = render_scenes(["a blue square"], torch.Generator().manual_seed(0))
    assert float(text(alone, ["a circle above a blue square"])) == pytest.approx(2 / 3)


def test_shapes_offers_the_subject_and_encodes_its_pictures():
    world = worlds.load("shapes", num_steps=2)
    task = world.subject(0)
    assert not set(task.prompts) & set(task.test_prompts) and len(task.prompts) == 8
    latents = world.encode(task.references)
    assert latents.shape == (4, *world.policy.latent_shape)
    seen = world.policy.decode(latents)
    assert task.similarities[0](seen, [""] * 4).min() > 0.7  # the autoencoder can draw what the model never drew
    assert (seen - task.references).abs().mean() < 0.03
    world.policy.encode([task.reference_prompt, *task.prompts, *task.test_prompts])
