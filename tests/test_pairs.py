"""Pairs: which of two samples is preferred, from policies, rewards, labellers and folders of images."""

import math

import pytest
import torch
from PIL import Image

from minialign import worlds
from minialign.pairs import Pairs, arranged, bradley_terry, by_reward, by_segments, draw_pairs, relabel


def seed(n=0):
    return torch.Generator().manual_seed(n)


def first_number(samples, prompts):
    return samples[:, 0]


def four(strengths=None):
    chosen = torch.arange(8.0).view(4, 2)
    return Pairs(list("abcd"), chosen, -chosen, strengths, ["x", "y", "x", "y"])


def test_rows_are_selected_in_every_part():
    picked = four(torch.arange(4.0))[[2, 0]]
    assert picked.prompts == ["c", "a"] and picked.labellers == ["x", "x"] and picked.strengths.tolist() == [2, 0]
    assert picked.chosen.tolist() == [[4, 5], [0, 1]] and picked.rejected.tolist() == [[-4, -5], [0, -1]]
    assert len(four()[1:]) == 3 and four()[torch.tensor([True, False, False, False])].prompts == ["a"]
    texts = Pairs(["p", "q"], ["good", "fine"], ["bad", "poor"])
    assert texts[[1]].chosen == ["fine"] and texts[[1]].strengths is None


def test_the_winner_comes_first_ties_are_left_out_and_the_order_stays():
    """Lopsided: first, tie, second, first; strengths follow the winner's side."""
    first, second = torch.tensor([[5.0], [2.0], [1.0], [0.5]]), torch.tensor([[3.0], [2.0], [4.0], [0.25]])
    labels, strength = by_reward(first_number)(first, second, list("abcd"))
    assert labels.tolist() == [1, 0.5, 0, 1] and strength.tolist() == [2, 0, -3, 0.25]
    pairs = arranged(list("abcd"), first, second, (labels, strength))
    assert pairs.prompts == ["a", "c", "d"] and pairs.strengths.tolist() == [2, 3, 0.25]
    assert pairs.chosen.flatten().tolist() == [5, 4, 0.5] and pairs.rejected.flatten().tolist() == [3, 1, 0.25]
    turned = pairs.swapped()
    assert turned.chosen.flatten().tolist() == [3, 1, 0.25] and turned.strengths.tolist() == [-2, -3, -0.25]


def test_texts_are_arranged_too():
    labels = torch.tensor([0.0, 1.0, 0.5]), None
    pairs = arranged(["p", "q", "r"], ["a", "b", "c"], ["A", "B", "C"], labels)
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == (["p", "q"], ["A", "b"], ["a", "B"])


def test_people_err_as_bradley_and_terry_say_and_tie_as_rao_and_kupper_say():
    n = 20_000
    first, second = torch.full((n, 1), 0.9), torch.full((n, 1), 0.1)
    labels, strength = bradley_terry(first_number, scale=2)(first, second, [""] * n, seed())
    p = 1 / (1 + math.exp(-1.6))
    assert labels.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n)) and set(labels.tolist()) == {
        0,
        1,
    }
    assert strength.unique().tolist() == pytest.approx([0.8])
    labels, _ = bradley_terry(first_number, scale=2, tie=0.7)(first, second, [""] * n, seed())
    won = 1 / (1 + math.exp(-1.6 + 0.7))
    assert (labels == 1).float().mean().item() == pytest.approx(won, abs=4 * math.sqrt(0.25 / n))
    assert (labels == 0.5).any()
    wrong = bradley_terry(first_number)(second, first, [""] * n, seed(1))
    pairs = arranged([""] * n, second, first, wrong)
    assert (pairs.strengths < 0).float().mean().item() == pytest.approx(1 / (1 + math.exp(0.8)), abs=0.015)


def test_segments_keep_their_own_strengths():
    first, second = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    pairs = arranged(
        ["a", "b"], first, second, by_segments(lambda samples, prompts: samples)(first, second, ["a", "b"])
    )
    assert pairs.strengths.tolist() == [[2, -1], [2, -1]] and pairs.chosen.tolist() == [[3, 0], [2, 0]]
    with pytest.raises(ValueError, match=r"segments' rewards have shape \(2,\)"):
        by_segments(first_number)(first, second, ["a", "b"])


@pytest.mark.parametrize("model", ["diffusion", "flow"])
def test_pairs_of_a_policy_are_its_samples_and_follow_a_seed(model):
    world = worlds.load("compass", model=model, num_steps=4)
    pairs = draw_pairs(world.policy, by_reward(first_number), world.prompts, 300, seed(), rows_per_pass=64)
    assert len(pairs) == 300 and set(pairs.prompts) == set(world.prompts)
    assert (pairs.chosen[:, 0] > pairs.rejected[:, 0]).all()
    torch.testing.assert_close(pairs.strengths, pairs.chosen[:, 0] - pairs.rejected[:, 0])
    again = draw_pairs(world.policy, by_reward(first_number), world.prompts, 300, seed())  # in one pass
    torch.testing.assert_close(again.chosen, pairs.chosen)
    assert again.prompts == pairs.prompts
    both = torch.cat([pairs.chosen, pairs.rejected])
    drawn = world.policy.sample(world.prompts * 300, generator=seed(7))
    assert both.mean(0).sub(drawn.mean(0)).abs().max() < 0.25 and both.std(0).sub(drawn.std(0)).abs().max() < 0.15


def test_people_toss_another_coin_for_every_pass():
    """Eight passes of sixteen labels, and the same pairs and labels in one."""
    world, seen = worlds.load("ring", num_steps=2), []

    def toss(first, second, prompts, generator):
        seen.append(torch.rand(len(prompts), generator=generator))
        return (seen[-1] < 0.5).float(), None

    pairs, whole = (draw_pairs(world.policy, toss, world.prompts, 128, seed(), rows_per_pass=n) for n in (16, 128))
    assert len(seen) == 9 and len(torch.cat(seen[:8]).unique()) == 128
    assert torch.equal(torch.cat(seen[:8]), seen[8])
    torch.testing.assert_close(pairs.chosen, whole.chosen)


def test_the_same_start_without_noise_is_the_same_sample():
    world = worlds.load("ring", num_steps=4, eta=0.0)
    with pytest.raises(ValueError, match="all 5 pairs are ties"):
        draw_pairs(world.policy, by_reward(first_number), world.prompts, 5, seed(), same_start=True)
    assert len(draw_pairs(world.policy, by_reward(first_number), world.prompts, 5, seed())) == 5


def test_pairs_of_texts():
    world = worlds.load("tokens", kind="bigrams")
    policy, length = world.policy, lambda texts, prompts: torch.tensor([float(sum(map(ord, text))) for text in texts])
    pairs = draw_pairs(policy, by_reward(length), world.prompts, 40, seed(), num_tokens=4)
    assert (
        all(sum(map(ord, a)) > sum(map(ord, b)) for a, b in zip(pairs.chosen, pairs.rejected, strict=True))
        and len(pairs) > 5
    )
    with pytest.raises(ValueError, match="num_tokens is None"):
        draw_pairs(policy, by_reward(length), world.prompts, 4, seed())


def test_another_labeller_turns_what_it_sees_otherwise():
    """AI feedback: 0 and 2 are turned round, 1 ties under it, and states are decoded before it looks."""
    pairs = Pairs(list("abc"), torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([[2.0], [1.0], [5.0]]))
    found = relabel(pairs, by_reward(first_number), decode=lambda states: 10 * states)
    assert found.prompts == ["a", "c"] and found.chosen.flatten().tolist() == [2, 5]
    assert found.strengths.tolist() == [10, 30]


def test_saved_whole_and_loaded_again(tmp_path):
    pairs = four(torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 3.0], [1.0, 1.0]]))
    pairs.save(tmp_path / "pairs.safetensors")
    found = Pairs.load(tmp_path / "pairs.safetensors")
    assert found.prompts == pairs.prompts and found.labellers == pairs.labellers
    assert all(torch.equal(getattr(found, name), getattr(pairs, name)) for name in ("chosen", "rejected", "strengths"))
    texts = Pairs(["p", "q"], ["a", "b"], ["c", "ü"])
    texts.save(tmp_path / "texts.safetensors")
    assert Pairs.load(tmp_path / "texts.safetensors") == texts
    half = torch.zeros(4, 2)
    Pairs(["p", "q"], half[:2], half[2:]).save(tmp_path / "views.safetensors")  # two views of one storage
    with pytest.raises(ValueError, match="cannot save the prompt"):
        Pairs([("a", 1)], half[:1], half[1:2]).save(tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        Pairs.load(tmp_path / "never.safetensors")
    from minialign.checkpoint import save_checkpoint

    save_checkpoint({"a": half}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no pairs"):
        Pairs.load(tmp_path / "other.safetensors")


def folder_of_images(folder, table, sizes=((8, 8), (8, 8))):
    for i, (name, colour) in enumerate({"r": (255, 0, 0), "g": (0, 255, 0)}.items()):
        Image.new("RGB", sizes[i], colour).save(folder / f"{name}.png")
    (folder / "pairs.csv").write_text(table)


def test_a_folder_of_images_with_a_csv(tmp_path):
    rows = ["a,r.png,g.png,1,2,me", "b,r.png,g.png,0,3,you", "c,r.png,g.png,.5,0,me"]
    table = "\n".join(["prompt,image_0,image_1,label,strength,labeller", *rows])
    folder_of_images(tmp_path, table)
    pairs = Pairs.from_images(tmp_path)
    assert pairs.prompts == ["a", "b"] and pairs.labellers == ["me", "you"] and pairs.strengths.tolist() == [2, 3]
    assert pairs.chosen.shape == (2, 3, 8, 8) and pairs.chosen[:, :, 0, 0].tolist() == [[1, -1, -1], [-1, 1, -1]]
    assert pairs.rejected[:, :, 0, 0].tolist() == [[-1, 1, -1], [1, -1, -1]]
    mean = Pairs.from_images(tmp_path, encode=lambda images: images.mean((2, 3)))
    assert mean.chosen.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_folder_that_cannot_be_read_says_where(tmp_path):
    folder_of_images(tmp_path, "prompt,image_0,image_1,label\na,r.png,g.png,1\n", sizes=((8, 8), (6, 8)))
    with pytest.raises(ValueError, match="have different sizes"):
        Pairs.from_images(tmp_path)
    assert Pairs.from_images(tmp_path, size=4).chosen.shape == (1, 3, 4, 4)
    assert Pairs.from_images(tmp_path, size=(4, 6)).chosen.shape == (1, 3, 4, 6)
    for table, problem in {
        "prompt,image_0,label\na,r.png,1\n": "no column image_1",
        "prompt,image_0,image_1,label\na,r.png,g.png,first\n": "line 2: the label is not 0, .5 or 1",
        "prompt,image_0,image_1,label\na,r.png,g.png,1\nb,r.png,lost.png,1\n": "line 3: image_1 .*lost.png",
        "prompt,image_0,image_1,label,strength\na,r.png,g.png,1,much\n": "line 2: strength 'much'",
        "prompt,image_0,image_1,label\n": "has no rows",
        "prompt,image_0,image_1,label\na,r.png,g.png,.5\n": "all 1 pairs are ties",
    }.items():
        (tmp_path / "pairs.csv").write_text(table)
        with pytest.raises(ValueError, match=problem):
            Pairs.from_images(tmp_path, size=8)
    with pytest.raises(ValueError, match=r"there is no .*votes\.csv"):
        Pairs.from_images(tmp_path, "votes.csv")


def test_parts_that_do_not_fit_are_refused():
    two = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="differ in length"):
        Pairs(["a"], two, two)
    with pytest.raises(ValueError, match="shapes"):
        Pairs(["a", "b"], two, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="two of a kind"):
        Pairs(["a", "b"], two, ["x", "y"])
    with pytest.raises(ValueError, match="1 of 2 pairs hold nan"):
        Pairs(["a", "b"], two, torch.tensor([[0, 0, 0], [0, math.nan, 0]])).check_finite()
    with pytest.raises(ValueError, match="expected 2 labels"):
        arranged(["a", "b"], two, two, (torch.tensor([1.0, 0.3]), None))
