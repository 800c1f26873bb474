"""The world of shapes: the oracle is exact, and every fact that it reads flips when the picture is changed."""

import json
import shutil

import pytest
import torch

from minialign import worlds
from minialign.rewards import checked, checked_set
from minialign.worlds import shapes, shapes_oracle, shapes_scenes
from minialign.worlds.base import WEIGHTS

FOLDER = WEIGHTS / "shapes"
BLUE, RED, YELLOW = (list(shapes.COLOURS).index(colour) for colour in ("blue", "red", "yellow"))
CIRCLE, SQUARE, TRIANGLE = range(3)


def spread(kind: str, n: int) -> list[str]:
    prompts = shapes.all_prompts(kind)
    return [prompts[i * len(prompts) // n] for i in range(n)]


def picture(*objects: tuple[int, int, float, float, float]) -> torch.Tensor:
    """One picture of (colour, shape, x, y, radius)."""
    colour, shape, x, y, radius = zip(*objects, strict=True)
    centre = torch.stack([torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)], -1)
    return shapes.draw(
        shapes.Layout(torch.tensor([colour]), torch.tensor([shape]), centre[None], torch.tensor([radius]).float())
    )


def false_facts(image: torch.Tensor, prompt: str) -> list[str]:
    return [name for name, holds in shapes.facts(image, [prompt])[0].items() if not holds]


# ---- grammar and drawing ---------------------------------------------------------------------------------------------


def test_grammar_counts_and_round_trip():
    assert [len(shapes.all_prompts(kind)) for kind in shapes.KINDS] == [12, 432, 24]
    scene = shapes.parse("A yellow triangle  right of a red square")
    assert scene.objects == ((YELLOW, TRIANGLE), (RED, SQUARE))
    assert (scene.relation, scene.kind) == ("right of", "relation")
    assert shapes.parse("three blue circles").objects == ((BLUE, CIRCLE),) * 3


def test_prompts_of_the_world_are_relations_and_held_out_ones_are_new():
    held_out = shapes.held_out_prompts()
    assert len(held_out) == 16
    assert not set(held_out) & set(shapes.PROMPTS)
    for prompts, each in ((shapes.PROMPTS, 2), (held_out, 4)):
        relations = [shapes.parse(prompt).relation for prompt in prompts]
        assert {relation: relations.count(relation) for relation in shapes.RELATIONS} == dict.fromkeys(
            shapes.RELATIONS, each
        )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a purple circle", "'purple'"),
        ("a red cirlce", "did you mean 'circle'"),
        ("a red circle above a red square", "two different colours"),
        ("a circle", "a COLOUR SHAPE"),
        ("", "a COLOUR SHAPE"),
        (3, "not a string"),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_with_the_nearest_one(prompt, said):
    with pytest.raises(ValueError, match=said):
        shapes.oracle(torch.zeros(1, 3, 32, 32), [prompt])


def test_samples_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\).*\(2, 3, 32, 32\)"):
        shapes.graded(torch.zeros(2, 1, 8, 8), ["a red circle"] * 2)


def test_drawing_is_deterministic_and_stays_on_the_paper():
    prompts = spread("relation", 60) + spread("count", 24)
    first, again = (shapes.render_scenes(prompts, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    other = shapes.render_scenes(prompts, torch.Generator().manual_seed(4))
    assert (first != other).flatten(1).any(1).all()
    border = torch.ones(32, 32, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    paper = torch.tensor(shapes.PAPER)[:, None]
    assert (first[:, :, border] - paper).abs().max() < 0.5  # a soft edge may touch the outermost pixels, no ink does


@pytest.mark.parametrize(("shape", "area"), [(CIRCLE, torch.pi * 49), (SQUARE, 196.0), (TRIANGLE, 3**0.5 * 49)])
def test_covered_area_is_the_ideal_one(shape, area):
    # radius 7: pi r^2, (2 r)^2 and sqrt(3) r^2; the cut-off ramp is exact along straight edges, and errs at corners by
    # less than half a pixel each
    covered = shapes_scenes.coverage(
        torch.tensor([shape]),
        torch.tensor([[15.3, 16.6]]),
        shapes_scenes.half_box(torch.tensor([shape]), torch.tensor([7.0])),
    )
    assert abs(covered.sum().item() - area) < 1.5


# ---- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_oracle_is_exact_on_drawn_scenes(kind, generator):
    prompts = spread(kind, 432)
    images = shapes.render_scenes(prompts, generator)
    assert shapes.oracle(images, prompts).tolist() == [1.0] * 432
    assert shapes.graded(images, prompts).tolist() == [1.0] * 432


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_oracle_refuses_every_other_prompt_of_the_kind(kind, generator):
    pool = shapes.all_prompts(kind)[:48]
    images = shapes.render_scenes(list(pool), generator)
    for shift in (1, 2, 3, 5, 17):
        others = list(pool[shift:] + pool[:shift])
        same_scene = [shapes.parse(a) == shapes.parse(b) for a, b in zip(pool, others, strict=True)]
        assert shapes.oracle(images, others).bool().tolist() == same_scene


def test_relation_facts_flip_with_the_picture(generator):
    prompts = spread("relation", 432)
    images = shapes.render_scenes(prompts, generator)
    sideways = torch.tensor([shapes.RELATIONS[shapes.parse(p).relation][0] == 0 for p in prompts])
    mirrored = torch.where(sideways[:, None, None, None], images.flip(3), images)
    assert torch.equal(shapes.oracle(mirrored, prompts).bool(), ~sideways)
    for image, prompt in zip(
        mirrored[sideways][:40], [p for p, s in zip(prompts, sideways, strict=True) if s], strict=False
    ):
        assert false_facts(image[None], prompt) == [shapes.parse(prompt).relation]
    turned = images.transpose(2, 3)  # above becomes left of; the triangles, now lying, lose their shape
    flat = torch.tensor(["triangle" not in p for p in prompts])
    assert shapes.oracle(turned, prompts).sum() == 0
    names = {"above": "left of", "left of": "above", "below": "right of", "right of": "below"}
    renamed = [p.replace(f" {shapes.parse(p).relation} ", f" {names[shapes.parse(p).relation]} ") for p in prompts]
    assert torch.equal(shapes.oracle(turned, renamed).bool(), flat)


def test_each_fact_is_lost_with_its_cause():
    prompt = "a red circle above a blue square"
    good = (RED, CIRCLE, 14, 8, 5), (BLUE, SQUARE, 17, 23, 5)
    assert false_facts(picture(*good), prompt) == []
    repainted = picture((YELLOW, CIRCLE, 14, 8, 5), good[1])
    assert false_facts(repainted, prompt) == ["red object 1", "red circle 1", "above", "above, foremost"]
    reshaped = picture((RED, TRIANGLE, 14, 8, 5), good[1])
    assert false_facts(reshaped, prompt) == ["red circle 1"]
    removed = picture(good[0])
    assert false_facts(removed, prompt)[-3:] == ["2 in all", "above", "above, foremost"]
    assert false_facts(picture(*good, (RED, SQUARE, 5, 24, 3.5)), prompt) == ["2 in all"]
    beside = picture((RED, CIRCLE, 7, 14, 5), (BLUE, SQUARE, 24, 17, 5))  # higher, but more beside than above
    assert false_facts(beside, prompt) == ["above, foremost"]
    assert false_facts(picture((RED, CIRCLE, 17, 23, 5), (BLUE, SQUARE, 14, 8, 5)), prompt) == ["above"]


def test_a_relation_is_read_from_the_right_shape_where_there_is_one():
    image = picture((RED, TRIANGLE, 24, 7, 4), (RED, CIRCLE, 14, 25, 4.5), (BLUE, SQUARE, 10, 13, 4.5))
    assert false_facts(image, "a red circle below a blue square") == ["2 in all"]


def test_oracle_has_a_margin(monkeypatch, generator):
    # the worst overlap seen in 3,000 drawn scenes is 0.944; without the soft edges it would be lower
    monkeypatch.setattr(shapes_oracle, "MIN_OVERLAP", 0.93)
    prompts = spread("count", 96)
    assert shapes.oracle(shapes.render_scenes(prompts, generator), prompts).tolist() == [1.0] * 96


def test_a_count_is_praised_object_by_object():
    two = picture((RED, CIRCLE, 8, 8, 5), (RED, CIRCLE, 23, 23, 5))
    assert shapes.oracle(two, ["two red circles"]).item() == 1
    # of "three red circles": three of colour, three of shape, one of number; two, two and none hold
    assert shapes.graded(two, ["three red circles"]).item() == pytest.approx(4 / 7)
    assert false_facts(two, "a red circle") == ["1 in all"]


def test_blobs_rings_and_foreign_colours_are_no_shapes():
    circle = picture((RED, CIRCLE, 16, 16, 8))
    assert shapes.oracle(circle, ["a red circle"]).item() == 1
    inside = (circle - circle[:, :, :1, :1]).abs().sum(1, keepdim=True) > 0.3
    rows, columns = torch.arange(32)[:, None], torch.arange(32)
    paper = torch.tensor(shapes.PAPER).view(1, 3, 1, 1)
    half_eaten = torch.where(columns < 16, circle, paper)
    ring = torch.where((rows - 15.5) ** 2 + (columns - 15.5) ** 2 < 20, paper, circle)
    long = torch.where((rows > 12) & (rows < 19) & inside, circle, paper)
    purple = torch.where(inside, torch.tensor([0.5, 0.2, 0.6]).view(1, 3, 1, 1), circle)
    for image in (half_eaten, ring, long):
        found = shapes.read_objects(image)
        assert (found.colour.tolist(), found.shape.tolist()) == ([RED], [shapes.UNKNOWN])
    assert shapes.read_objects(purple).colour.tolist() == [shapes.UNKNOWN]
    beside = torch.where(
        columns > 25, torch.tensor([0.5, 0.2, 0.6]).view(1, 3, 1, 1), picture((RED, CIRCLE, 10, 16, 6))
    )
    assert false_facts(beside, "a red circle") == ["1 in all"]


def test_a_picture_of_specks_has_no_object():
    speck = torch.tensor(shapes.PAPER).view(1, 3, 1, 1).repeat(1, 1, 32, 32)
    speck[0, :, 5, 5:7] = torch.tensor(shapes.COLOURS["red"]).view(3, 1)  # two pixels; objects have at least MIN_AREA
    assert shapes.oracle(speck, ["a red circle"]).tolist() == [0.0]


def test_an_empty_picture_and_noise_have_no_right_object(generator):
    paper = torch.tensor(shapes.PAPER).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    assert len(shapes.read_objects(paper).image) == 0
    noise = torch.rand(64, 3, 32, 32, generator=generator)
    assert shapes.oracle(noise, spread("single", 64)).sum() == 0


# ---- the shipped models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return worlds.load("shapes")


def test_every_word_is_one_token_and_other_words_fall_into_letters(world):
    tokenizer = world.policy.pipeline.tokenizer
    for word in shapes.words():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.tokenize("a purple pig")[-3:] == ["p", "i", "g</w>"]
    ids = tokenizer("a red circle left of a blue square", padding="max_length", max_length=16).input_ids
    assert len(ids) == 16
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == 9


def test_files_are_small_and_in_the_ecosystem_s_formats(world):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 11e6
    pipe = world.policy.pipeline
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert pipe.vae_scale_factor * pipe.unet.config.sample_size == shapes.SIZE


def test_the_plain_pipeline_draws_what_the_policy_draws(world):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = spread("single", 12)
    policy = type(world.policy).from_pipeline(pipe, num_steps=8, eta=0.0, guidance_scale=1.0)
    noise = policy.draw_noise(12, torch.Generator().manual_seed(0))
    theirs = pipe(
        prompts, num_inference_steps=8, eta=0.0, guidance_scale=1.0, latents=noise[:, 0], output_type="pt"
    ).images
    assert (theirs - policy.sample(prompts, noise=noise)).abs().max() < 1e-4
    assert shapes.oracle(theirs, prompts).mean() >= 0.5


def test_base_model_is_good_at_single_objects_and_unsure_of_relations(world):
    # the card's shares (512 samples) are above 0.90 and within 0.30 to 0.70; here 192 samples, so 4 standard errors
    for kind, low, high in (("single", 0.90, 1.0), ("relation", 0.30, 0.70)):
        prompts = spread(kind, 192)
        right = shapes.oracle(world.policy.sample(prompts, generator=torch.Generator().manual_seed(11)), prompts)
        slack = [4 * (bar * (1 - bar) / 192) ** 0.5 for bar in (low, high)]
        assert low - slack[0] <= right.mean() <= high + slack[1]


def test_decoding_keeps_every_fact(world, generator):
    images, prompts = world.real(100, generator)
    vae = world.policy.pipeline.vae
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        decoded = world.policy.decode(latents)
    assert shapes.oracle(decoded, prompts).mean() >= 0.97
    assert latents.std().item() == pytest.approx(1, abs=0.05)


def test_scorer_beats_chance_by_far_and_passes_gradients(world, generator):
    scorer, pool = world.rewards["scorer"], shapes.all_prompts("single")
    prompts = spread("single", 96)
    images = shapes.render_scenes(prompts, generator)
    scores = torch.stack([scorer(images, [prompt] * 96) for prompt in pool], 1)
    best = [pool[i] for i in scores.argmax(1).tolist()]
    assert sum(b == p for b, p in zip(best, prompts, strict=True)) / 96 > 0.75  # chance: 1/12
    images.requires_grad_()
    checked(scorer, images, prompts).sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()


def test_rewards_pass_the_border_check(world, generator):
    images, prompts = world.real(10, generator)
    for reward in world.rewards.values():
        assert checked(reward, images, prompts).shape == (10,)
    assert world.show(images, prompts) is not None
    assert world.default_reward in world.rewards


# ---- the consistency twin --------------------------------------------------------------------------------------------

TWIN = WEIGHTS / "shapes_lcm"


@pytest.fixture(scope="module")
def twin():
    return worlds.load("shapes", model="consistency")


def test_the_twin_is_a_latent_consistency_pipeline_that_draws_what_the_policy_draws(twin):
    from diffusers import LatentConsistencyModelPipeline

    pipe = LatentConsistencyModelPipeline.from_pretrained(TWIN, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts, policy = spread("single", 12), twin.policy
    assert policy.num_steps == 4 and policy.pipeline.unet.config.time_cond_proj_dim == policy.guidance_dim
    noise = torch.randn(12, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    settings = dict(num_inference_steps=4, guidance_scale=2.5, output_type="pt", height=32, width=32)
    theirs = pipe(prompts, latents=noise.clone(), generator=torch.Generator().manual_seed(1), **settings).images
    generator = torch.Generator().manual_seed(1)
    later = [torch.randn(noise.shape, generator=generator) for _ in range(4)]
    ours = policy.sample(prompts, torch.stack([noise, *later], 1))
    assert (theirs - ours).abs().max() < 1e-4


def test_the_twin_shares_encoder_and_autoencoder_and_is_small(world):
    hashes = [json.loads((folder / "hashes.json").read_text()) for folder in (FOLDER, TWIN)]
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert hashes[0][part] == hashes[1][part]
    assert sum(path.stat().st_size for path in TWIN.rglob("*") if path.is_file()) < 4e6
    assert not any("_name_or_path" in path.read_text() for path in TWIN.rglob("config.json"))


def test_with_two_calls_the_twin_draws_objects_and_its_undistilled_student_does_not(world, twin):
    from minialign.policies.consistency import ConsistencyPolicy

    prompts, generator = spread("single", 96), torch.Generator()
    untrained = ConsistencyPolicy.from_diffusion(world.policy, num_steps=2)
    twin.policy.set_num_steps(2)
    right = [
        float(shapes.oracle(policy.sample(prompts, generator=generator.manual_seed(3)), prompts).mean())
        for policy in (twin.policy, untrained)
    ]
    twin.policy.set_num_steps(4)
    assert right[0] > 0.7 and right[1] < 0.6  # the card: about .9 and .4; 96 samples, standard error .05


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="unknown model 'lcm' of world 'shapes'"):
        shapes.load(model="lcm")
    with pytest.raises(FileNotFoundError, match="minialign pretrain shapes_lcm"):
        shapes.load(model="consistency", folder="nowhere")


# ---- rewards of a set ------------------------------------------------------------------------------------------------


def test_pictures_may_be_held_against_captions():
    """Red scenes are nearer to red captions than blue ones, though no picture is among the exemplars."""
    scenes = {
        colour: shapes.render_scenes([f"a {colour} {shape}" for shape in shapes.SHAPES] * 20, generator)
        for colour, generator in (("red", torch.Generator().manual_seed(0)), ("blue", torch.Generator().manual_seed(1)))
    }
    own = shapes.render_scenes(list(shapes.PROMPTS) * 8, torch.Generator().manual_seed(2))
    captions, likeness = shapes.like_red_captions(), shapes.like_scenes()
    near, far = (float(checked_set(captions, x, ["any"] * len(x))) for x in scenes.values())
    assert near > far + 0.1
    by_size = own[shapes.ink_share(own)[:, 0].argsort()]
    large, small = (float(checked_set(shapes.like_large(), x, ["any"] * 16)) for x in (by_size[-16:], by_size[:16]))
    assert large > -5 and small < -50  # squared per cent: the collection is 20 % ink, the smallest are 8
    assert float(checked_set(likeness, own, ["any"] * 64)) > float(checked_set(likeness, scenes["red"], ["any"] * 60))


def test_the_embedders_agree_with_the_scorer():
    prompts = list(shapes.PROMPTS)
    images = shapes.render_scenes(prompts, torch.Generator().manual_seed(3))
    of_images, of_texts = shapes.load_embedders()
    cosine = (of_images(images) * of_texts(prompts)).sum(1)
    torch.testing.assert_close(cosine, shapes.load_scorer()(images, prompts), atol=1e-5, rtol=0)


# ---- damaged weights -------------------------------------------------------------------------------------------------


def test_missing_or_damaged_weights_say_how_to_remake_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="minialign pretrain shapes"):
        shapes.load(folder=tmp_path)
    shutil.copytree(FOLDER, tmp_path / "copy")
    name = next(iter(json.loads((FOLDER / "hashes.json").read_text())))
    damaged = bytearray((tmp_path / "copy" / name).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "copy" / name).write_bytes(damaged)
    with pytest.raises(FileNotFoundError, match=r"damaged.*minialign pretrain shapes"):
        shapes.load(folder=tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        shapes.load(folder=tmp_path / "copy")
