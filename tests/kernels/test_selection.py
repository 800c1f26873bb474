"""Ranks within groups: by hand, against a slow sort, and what must not change them."""

import pytest
import torch

from minialign.exact import best_of_n
from minialign.kernels import group_ranks


def test_by_hand():
    # group 2: 5 > 1; group 0: 3 (tiebreak .1), 3 (tiebreak .7), 2; group 4 alone
    rewards, group = torch.tensor([1.0, 3, 9, 2, 3, 5]), torch.tensor([2, 0, 4, 0, 0, 2])
    tiebreak = torch.tensor([0.5, 0.7, 0.2, 0.0, 0.1, 0.9])
    assert group_ranks(rewards, group, tiebreak).tolist() == [1, 1, 0, 2, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_sorting_each_group(dtype, generator):
    """97 samples in 11 groups of unequal sizes; half of the rewards are ties, some are -inf."""
    rewards = torch.randn(97, generator=generator).mul(2).round().to(dtype)
    rewards[::13] = -torch.inf
    group, tiebreak = torch.randint(11, (97,), generator=generator), torch.rand(97, generator=generator)
    expected = torch.empty(97, dtype=torch.long)
    for g in range(11):
        members = (group == g).nonzero().flatten().tolist()
        for rank, i in enumerate(sorted(members, key=lambda i: (-float(rewards[i]), float(tiebreak[i])))):
            expected[i] = rank
    assert torch.equal(group_ranks(rewards, group, tiebreak), expected)


def test_scale_and_shift_of_a_group_change_nothing(generator):
    """Sheet raft, check 6: r -> a(x) r + c(x), a > 0; a(x) < 0 does change them."""
    rewards, tiebreak = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    group = torch.arange(40) % 5
    ranks, scale, shift = group_ranks(rewards, group, tiebreak), torch.tensor([1, 3, 0.1, 7, 2])[group], group * 10.0
    assert torch.equal(group_ranks(scale * rewards + shift, group, tiebreak), ranks)
    assert not torch.equal(group_ranks(-scale * rewards, group, tiebreak), ranks)
    together = torch.zeros_like(group)
    assert not torch.equal(group_ranks(rewards + shift, together, tiebreak), group_ranks(rewards, together, tiebreak))


def test_the_winners_law_is_best_of_n_and_argmax_is_not(generator):
    """Sheet raft, check 3: p = (.4, .3, .2, .1), r = (0, 1, 1, 3), K = 3 -> (.064, .399, .266, .271); 4 s.e."""
    p, r, n = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 1, 1, 3]), 40_000
    law = best_of_n(p.log(), r.double(), 3).log_prob.exp()
    torch.testing.assert_close(law, torch.tensor([0.064, 0.399, 0.266, 0.271], dtype=torch.float64))
    drawn = torch.multinomial(p, 3 * n, replacement=True, generator=generator)
    drawn = drawn.view(n, 3).sort(1).values.flatten()  # an order of sampling that would leak: the first 1 before the 2s
    ranks = group_ranks(r[drawn], torch.arange(n).repeat_interleave(3), torch.rand(3 * n, generator=generator))
    found = torch.bincount(drawn[ranks == 0], minlength=4) / n
    error = (law * (1 - law) / n).sqrt()
    assert ((found - law).abs() < 4 * error).all()
    first = r[drawn].view(n, 3).argmax(1)
    leaked = torch.bincount(drawn.view(n, 3).gather(1, first.unsqueeze(1)).flatten(), minlength=4) / n
    assert leaked[1] - law[1] > 20 * error[1]


def test_shapes_that_would_broadcast_are_refused():
    rewards, group = torch.randn(4), torch.tensor([0, 0, 1, 1])
    with pytest.raises(Exception, match=r"tiebreak|shape"):
        group_ranks(rewards, group, torch.rand(1))
