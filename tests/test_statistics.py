"""Rewards remembered by name: moments, and what is forgotten."""

import pytest
import torch

from minialign.loop import load_checkpoint, save_checkpoint
from minialign.statistics import Moments, Statistics


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_moments_by_index_against_torch(generator):
    rewards, index = torch.randn(50, generator=generator, dtype=torch.float64).exp(), torch.arange(50) % 7
    moments = Moments.by_index(rewards, index, 9)
    for i in range(7):
        mine = rewards[index == i]
        expected = f64(len(mine), mine.mean(), mine.var(correction=0), mine.min(), mine.max())
        torch.testing.assert_close(torch.stack(list(moments[i].tensors().values())), expected)
        torch.testing.assert_close(moments[i].std, mine.std(correction=0))
        torch.testing.assert_close(moments[i].unbiased_std, mine.std())
    assert moments.count[7:].tolist() == [0, 0] and moments.unbiased_std[7:].tolist() == [0, 0]


def test_equal_rewards_have_exactly_no_spread():
    """.3 is no binary fraction: its mean over seven, computed as a sum, would be off by a last digit."""
    moments = Moments.of(torch.full((7,), 0.3))
    assert float(moments.var) == 0 and float(moments.mean) == float(torch.tensor(0.3))
    assert float(Moments.of(f64(5.0)).unbiased_std) == 0


def test_merged_is_together(generator):
    parts = [torch.randn(n, generator=generator, dtype=torch.float64) * n for n in (1, 5, 30)]
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    whole = Moments.of(torch.cat(parts))
    for name, value in whole.tensors().items():
        torch.testing.assert_close(merged.tensors()[name], value)


def test_the_last_few_of_each_name():
    statistics = Statistics(last=2)
    first = statistics.update(["a", "b", "a", "a"], f64(1, 10, 2, 3))  # a keeps 2 and 3
    assert first.mean.tolist() == [2.5, 10, 2.5, 2.5] and first.count.tolist() == [2, 1, 2, 2]
    second = statistics.update(["b", "b"], f64(20, 30))
    assert second.mean.tolist() == [25, 25]
    assert statistics.update(["a"], f64(9.0)).mean.tolist() == [6]  # 3 and 9: other names have not pushed them out


def test_the_last_rounds():
    statistics = Statistics(rounds=2)
    statistics.update(["a", "a", "b"], f64(1, 3, 9))
    assert statistics.update(["b"], f64(13.0)).mean.tolist() == [11]
    third = statistics.update(["a", "b"], f64(5, 1))  # the first round has aged out, for a too
    assert third.mean.tolist() == [5, 7] and third.count.tolist() == [1, 2]


def test_everything_is_kept_without_a_limit():
    statistics = Statistics()
    for value in range(5):
        moments = statistics.update(["a"], f64(value))
    assert moments.count.tolist() == [5] and moments.mean.tolist() == [2]


@pytest.mark.parametrize("limit", [dict(last=3), dict(rounds=2)])
def test_a_resumed_memory_belongs_to_the_names_not_to_their_order(tmp_path, limit):
    before = Statistics(**limit)
    before.update(["a", "b", ("c", 1)], f64(1, 2, 3))
    tensors = {name: tensor.clone() for name, tensor in before.tensors().items()}
    save_checkpoint(tensors, tmp_path / "c.safetensors")
    after = Statistics(**limit)
    after.load(load_checkpoint(tmp_path / "c.safetensors"))
    names, rewards = [("c", 1), "new", "a"], f64(7, 8, 9)  # another order, one gone, one new
    ours, theirs = after.update(names, rewards), before.update(names, rewards)
    assert torch.equal(ours.mean, theirs.mean) and ours.mean.tolist() == [5, 8, 5] and ours.count.tolist() == [2, 1, 2]


def test_names_are_told_apart_by_kind_and_outlive_the_process():
    statistics = Statistics()
    assert statistics.update([1, "1", (1,)], f64(1, 2, 3)).count.tolist() == [1, 1, 1]
    for name in (object(), frozenset("ab")):
        with pytest.raises(ValueError, match="no name that outlives this process"):
            statistics.update([name], f64(1))
