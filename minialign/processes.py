"""Several processes, under `torchrun` or `accelerate launch`; alone, each of these does nothing.

Every process draws the same prompts, noise and minibatches from the same seed, and works on its own rows. Sums over
processes then give what one process gives with the same global batch.
"""

import torch
from torch import Tensor, nn


def own_rows(num_rows: int, device: torch.device | str = "cpu") -> Tensor:
    """The rows of a global batch that this process rolls out: every num_processes-th."""
    from accelerate import PartialState

    state = PartialState()
    return torch.arange(state.process_index, num_rows, state.num_processes, device=device)


def num_processes() -> int:
    from accelerate import PartialState

    return PartialState().num_processes


def gather_rows(own: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Each process's values (len(rows), ...) put together as the global batch (num_rows, ...), on every process.

    Gradients flow into this process's rows; summed over processes they are those of one process with the whole batch.
    """
    rows, full = rows.to(own.device), torch.zeros((num_rows, *own.shape[1:]), dtype=own.dtype, device=own.device)
    full = sum_over_processes(full.index_copy(0, rows, own.detach()))
    return full.index_copy(0, rows, own) if own.requires_grad else full


def gather_everything(own: Tensor) -> Tensor:
    """The rows of all processes, one after another, on every process; they may have different numbers of them."""
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return own
    counts = torch.zeros(state.num_processes, dtype=torch.long, device=own.device)
    counts[state.process_index] = len(own)
    ends = sum_over_processes(counts).cumsum(0)
    last = int(ends[state.process_index])
    return gather_rows(own, torch.arange(last - len(own), last), int(ends[-1]))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum, on every process and on the tensor's own device; the tensor itself may be overwritten."""
    import torch.distributed as dist
    from accelerate import PartialState

    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.to(PartialState().device)  # NCCL takes nothing that is not on the GPU
    dist.all_reduce(total)
    return total.to(tensor.device)


def names_everywhere(names: list[str]) -> list[str]:
    """The names that any process knows, in one order on all of them."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return names
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, names)
    return list(dict.fromkeys(name for some in everywhere for name in some))


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Adds the gradients of all processes, in one message. Each must have divided its loss by the global batch size.

    A weight that has none on any process keeps none, as in one process: an optimizer does not touch it then.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    here = torch.tensor([p.grad is not None for p in parameters]).to(gradients[0])
    flat = sum_over_processes(torch.cat([here, *(g.flatten() for g in gradients)]))
    anywhere, *gradients = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for p, gradient, reached in zip(parameters, gradients, anywhere.tolist(), strict=True):
        p.grad = gradient.view_as(p).to(p.dtype) if reached else None
