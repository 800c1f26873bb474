"""What every training loop needs and no paper is about: progress, history, checkpoints, several processes.

A method's `train(...)` is a generator of `Step`s, so it can be watched, plotted, stopped or resumed from outside.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """What one iteration of a method reports. Metrics stay tensors until they are printed.

    network_evaluations and reward_queries are totals since the start of training, the two axes on which methods are
    compared; seconds is this iteration's wall time. checkpoint() gives all that resuming needs, as named tensors, valid
    until the generator goes on.
    """

    number: int
    metrics: dict[str, Tensor | float]
    network_evaluations: int
    reward_queries: int
    seconds: float
    checkpoint: Callable[[], dict[str, Tensor]] = field(repr=False)

    def row(self) -> dict[str, float | int]:
        """Everything as plain numbers: a line of metrics.csv."""
        costs = {"network_evaluations": self.network_evaluations, "reward_queries": self.reward_queries}
        return {"step": self.number, **{k: float(v) for k, v in self.metrics.items()}, **costs, "seconds": self.seconds}


class History(list):
    """Rows of numbers, one an iteration; `history["reward"]` is a column, `history.plot()` a figure."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def plot(self, metrics: tuple[str, ...] = ("reward",), x: str = "reward_queries", **kwargs):
        """Learning curves against `x`; draws with minialign.show.curves and returns the figure."""
        from minialign import show

        return show.curves({name: (self[x], self[name]) for name in metrics}, xlabel=x.replace("_", " "), **kwargs)


def fit(steps: Iterable[Step], total: int | None = None, progress: bool = True) -> History:
    """Runs a method to its end (or for `total` more iterations), with a bar showing the reward and the time left."""
    history = History()
    for step in watch(steps, total, progress):
        history.append(step.row())
        if total is not None and len(history) >= total:
            break
    return history


def watch(steps: Iterable[Step], total: int | None = None, progress: bool = True, initial: int = 0) -> Iterator[Step]:
    """Passes steps on while a progress bar (on stderr) shows the reward."""
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=initial, disable=not progress, unit="it", dynamic_ncols=True) as bar:
        for step in steps:
            if "reward" in step.metrics:
                bar.set_postfix_str(f"reward {float(step.metrics['reward']):.3f}")
            bar.update()
            yield step


def timer() -> Callable[[], float]:
    """A stopwatch, started now: call it for the seconds since."""
    started = time.perf_counter()
    return lambda: time.perf_counter() - started


# -------------------------------------------------------------------------------- checkpoints: named tensors, no pickle


def pack(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, generator: torch.Generator, **counts: int):
    """The state of training as named tensors (copies): weights, optimizer moments, random state, counters."""
    tensors = {f"parameter.{i}": p.detach().clone() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        for name, value in optimizer.state[p].items():
            tensors[f"optimizer.{i}.{name}"] = value.detach().clone()
    tensors["generator"] = generator.get_state().clone()
    return tensors | {f"count.{name}": torch.tensor(value) for name, value in counts.items()}


def unpack(tensors: dict[str, Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, generator):
    """Puts back what `pack` took; returns the counters. Raises ValueError if the weights have other shapes."""
    for i, p in enumerate(parameters):
        saved = tensors.get(f"parameter.{i}")
        if saved is None or saved.shape != p.shape:
            raise ValueError(
                f"the checkpoint does not fit this policy: trainable tensor {i} is {tuple(p.shape)}, "
                f"the checkpoint has {None if saved is None else tuple(saved.shape)}. "
                "Was it made with another LoRA rank or another world?"
            )
        p.data.copy_(saved)
        prefix = f"optimizer.{i}."
        moments = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
        if moments:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    generator.set_state(tensors["generator"])
    return {k.removeprefix("count."): int(v) for k, v in tensors.items() if k.startswith("count.")}


def save_checkpoint(tensors: dict[str, Tensor], path: Path) -> None:
    """Atomic: a reader finds the old checkpoint or the new one, never half of it."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# -------------------------------------------------------------------------------- several processes (accelerate launch)
# Every process draws the same prompts, noise and minibatches from the same seed, and works on its own rows. Sums
# over processes then give what one process gives with the same global batch.


def own_rows(num_rows: int, device: torch.device | str = "cpu") -> Tensor:
    """The rows of a global batch that this process rolls out: every num_processes-th."""
    from accelerate import PartialState

    state = PartialState()
    return torch.arange(state.process_index, num_rows, state.num_processes, device=device)


def gather_rows(own: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Each process's values (len(rows), ...) put together as the global batch (num_rows, ...), on every process."""
    full = torch.zeros((num_rows, *own.shape[1:]), dtype=own.dtype, device=own.device)
    return sum_over_processes(full.index_copy(0, rows.to(own.device), own))


def sum_over_processes(tensor: Tensor) -> Tensor:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_parts(infos: list[dict[str, Tensor]], names: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """{name: its sum over the parts that a round's update was made of, on all processes}. Some may have had no part."""
    zero = {name: torch.zeros((), device=device) for name in names}
    sums = torch.stack([torch.stack([info[name].float() for info in [zero, *infos]]).sum() for name in names])
    return dict(zip(names, sum_over_processes(sums), strict=True))


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Adds the gradients of all processes, in one message. Each must have divided its loss by the global batch size."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = sum_over_processes(torch.cat([g.flatten() for g in gradients]))
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = gradient.view_as(p)
