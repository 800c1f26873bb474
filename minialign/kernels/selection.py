"""Selection by rank: who is best within a group, ties broken by a given number. The reward's scale does not matter."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minialign.kernels.gaussian import same_shape


def group_ranks(
    rewards: Float[Tensor, "batch"], group: Int[Tensor, "batch"], tiebreak: Float[Tensor, "batch"]
) -> Int[Tensor, "batch"]:
    """Place of each sample within its group by reward, 0 the best; of equal rewards the lower `tiebreak` goes first.

    A drawn tiebreak gives the order of sampling no say: argmax would always take the first. `group` holds ids in
    [0, batch); rewards of -inf come last. Limits: unchanged when the rewards of a group are shifted, or scaled by a
    positive number. The best of a group is rank 0 (its law: exact.best_of_n); its better half is rank < size / 2.
    """
    same_shape(rewards=rewards, group=group, tiebreak=tiebreak)
    order = tiebreak.argsort(stable=True)
    order = order[rewards[order].argsort(descending=True, stable=True)]
    order = order[group[order].argsort(stable=True)]  # by group, then reward, then chance
    place = order.argsort()
    first = torch.full_like(place, len(place)).scatter_reduce(0, group, place, "amin")
    return place - first[group]
