"""Checkpoints: the state of a run as named tensors, in one safetensors file; no pickle.

    pack, unpack                          weights, optimizer moments, random state, counters <-> named tensors
    save_checkpoint, load_checkpoint      named tensors <-> a file that is whole or absent
    read_about                            the texts that were saved with them
    EarlyStopper                          the best weights so far

What else a run keeps (statistics, a reward's state) stands beside these tensors under names of its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def pack(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, generator: torch.Generator, **counts: int):
    """The state of training as named tensors (copies): weights, optimizer moments, random state, counters."""
    tensors = {f"parameter.{i}": p.detach().clone() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        for name, value in optimizer.state[p].items():
            tensors[f"optimizer.{i}.{name}"] = value.detach().clone()
    tensors["generator"] = generator.get_state().clone()
    return tensors | {f"count.{name}": torch.tensor(value) for name, value in counts.items()}


def unpack(
    tensors: Mapping[str, Tensor],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, int]:
    """Puts back what `pack` took; returns the counters.

    Raises ValueError, before anything is changed, for tensors that are no checkpoint or weights of other shapes.
    """
    missing = [name for name in ("generator", "count.number") if name not in tensors]
    if missing:
        held = ", ".join(list(tensors)[:3]) or "nothing"
        raise ValueError(
            f"this is no checkpoint of a run: it holds {held}, and no {missing[0]!r}. See Step.checkpoint."
        )
    check_shapes(tensors, parameters)
    for i, p in enumerate(parameters):
        p.data.copy_(tensors[f"parameter.{i}"])
        prefix = f"optimizer.{i}."
        moments = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
        if moments:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    generator.set_state(tensors["generator"].cpu())
    return {k.removeprefix("count."): int(v) for k, v in tensors.items() if k.startswith("count.")}


def check_shapes(tensors: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> None:
    if f"parameter.{len(parameters)}" in tensors:
        raise ValueError(
            f"the checkpoint does not fit this policy: it has more than the {len(parameters)} tensors that are trained "
            "here. Was it made with another LoRA rank, with a critic, or with all weights?"
        )
    for i, p in enumerate(parameters):
        saved = tensors.get(f"parameter.{i}")
        if saved is None or saved.shape != p.shape:
            raise ValueError(
                f"the checkpoint does not fit this policy: trainable tensor {i} is {tuple(p.shape)}, "
                f"the checkpoint has {None if saved is None else tuple(saved.shape)}. "
                "Was it made with another LoRA rank or another world?"
            )


def save_checkpoint(tensors: Mapping[str, Tensor], path: str | Path, about: Mapping[str, str] | None = None) -> None:
    """Atomic: a reader finds the old checkpoint or the new one, never half of it. about: texts that go with it.

    Raises OSError, a full disk among its reasons; then the old one is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_suffix(".partial")
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial, dict(about or {}) or None)
        partial.replace(path)
    except SafetensorError as error:  # as which it disguises the system's own errors
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors. Raises FileNotFoundError, or ValueError for a file that is empty, damaged or of another kind."""
    from safetensors.torch import load_file

    with readable(path):
        return load_file(path)


def read_about(path: str | Path) -> dict[str, str]:
    """The texts that were saved with the tensors; raises what `load_checkpoint` does."""
    from safetensors import safe_open

    with readable(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """What safetensors says of a file that it cannot read becomes a ValueError that names the file and the remedy."""
    from safetensors import SafetensorError

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        what = "it is empty" if path.is_file() and path.stat().st_size == 0 else str(error)
        raise ValueError(
            f"{path} is no checkpoint ({what}): put back a whole copy, or delete it and start over."
        ) from error


class EarlyStopper:
    """Keeps a copy of the weights that scored best; of equal scores the first. Saved with the run."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.step, self.value = 0, -math.inf  # step 0: nothing was kept
        self.weights = [p.detach().clone() for p in self.parameters]

    def update(self, step: int, value: float) -> bool:
        """Whether the weights of now, after `step` updates, are the best so far; if so they are copied."""
        if better := value > self.value:
            self.step, self.value = step, value
            self.weights = [p.detach().clone() for p in self.parameters]
        return better

    def restore(self) -> None:
        """Puts the best weights back, if there are any."""
        if self.step:
            for p, weight in zip(self.parameters, self.weights, strict=True):
                p.data.copy_(weight)

    def tensors(self) -> dict[str, Tensor]:
        about = {"step": torch.tensor(self.step), "value": torch.tensor(self.value, dtype=torch.float64)}
        return about | {f"{i}": weight for i, weight in enumerate(self.weights)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.step, self.value = int(tensors["step"]), float(tensors["value"])
        self.weights = [tensors[f"{i}"].to(p) for i, p in enumerate(self.parameters)]
