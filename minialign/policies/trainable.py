"""What every policy shares: which weights train, the frozen copy that is their reference, and saving them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

TRAINABLE = "trainable.safetensors"
ONE = (
    "A policy has one adapter, the one it trains: fold others into the weights before you wrap the network, with "
    "pipe.fuse_lora(); pipe.unload_lora_weights(), or peft's merge_and_unload(); fold its own with policy.merge()."
)


class Trainable:
    """A policy around `network`: all its weights train, or those of one adapter (peft), never both.

    The reference is the network as it was: `_frozen_copy` where all weights train, else the network with its adapter
    off. So whatever trains must belong to the adapter, and no second one may be on: it would be off in the reference.
    """

    network: nn.Module
    _frozen_copy: nn.Module | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones. Raises ValueError when there is none, or when the reference would train with them."""
        trainable = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("nothing to train: call policy.add_lora() or policy.train_all_weights() first.")
        if adapter := self._active_adapter(self._adapters()):
            outside = [name for name in trainable if adapter not in name.split(".")]
            if outside:
                raise ValueError(
                    f"{outside[0]} is trainable and no part of the adapter {adapter!r}: it would train in the "
                    "reference too, and not be saved. Freeze it (requires_grad_(False)), or call policy.merge() and "
                    "then policy.train_all_weights()."
                )
        return list(trainable.values())

    def train_all_weights(self) -> None:
        """Makes every weight of the network trainable, and keeps a frozen copy of it as the reference.

        Raises ValueError if there is an adapter: it could be neither saved nor told from the weights below it.
        """
        self._refuse_adapters()
        self._frozen_copy = copy.deepcopy(self.network).requires_grad_(False)
        self.network.requires_grad_(True)

    @contextmanager
    def reference_weights(self) -> Iterator[nn.Module]:
        """The module that is the reference, to be called inside: a frozen copy, or the network, its adapter off.

        Off by peft's own switch, for all that it can put into a network: adapter layers, `modules_to_save`, trained
        tokens. Which weights train is as before afterwards, where peft would wake all of the adapter's.
        """
        if self._frozen_copy is not None:
            yield self._frozen_copy
            return
        layers = self._adapters()
        if self._active_adapter(layers) is None:
            raise ValueError(
                "this policy has no reference: call policy.add_lora() or policy.train_all_weights() before training."
            )
        trains = [(p, p.requires_grad) for p in self.network.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield self.network
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, requires_grad in trains:
                parameter.requires_grad_(requires_grad)

    def _adapters(self) -> list[nn.Module]:
        """Every module of peft's in the network."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return [module for module in self.network.modules() if isinstance(module, kinds)]

    def _active_adapter(self, layers: list[nn.Module]) -> str | None:
        """Its name; None without adapter. Raises ValueError for several, and for one that is off or merged."""
        names = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
        if not names:
            return None
        if len(names) > 1:
            raise ValueError(f"the adapters {', '.join(names)} are on, and the reference would be without any. {ONE}")
        if any(layer.disable_adapters for layer in layers):
            raise ValueError(f"the adapter {names[0]!r} is off; put it on (enable_adapters) or remove it. {ONE}")
        if any(getattr(layer, "merged", False) for layer in layers):
            raise ValueError(f"the adapter {names[0]!r} is merged into the weights but not unloaded. {ONE}")
        return names[0]

    def _refuse_adapters(self) -> None:
        names = list(dict.fromkeys(name for layer in self._adapters() for name in layer.active_adapters))
        if names:
            raise ValueError(f"the network has the adapter {names[0]!r} already. {ONE}")

    def _save_trainable(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        weights = {name: p.detach().contiguous() for name, p in self.network.named_parameters() if p.requires_grad}
        save_file(weights, Path(folder) / TRAINABLE)

    def _load_trainable(self, folder: str | Path) -> None:
        """The weights that `_save_trainable` wrote, to be trained further; the reference is the network as it is now.

        Raises ValueError, and leaves every weight as it was, for those of another network.
        """
        from safetensors.torch import load_file

        weights, own = load_file(Path(folder) / TRAINABLE), dict(self.network.named_parameters())
        for name, weight in weights.items():
            expected = tuple(own[name].shape) if name in own else None
            if expected != tuple(weight.shape):
                raise ValueError(
                    f"{folder} has {name} {tuple(weight.shape)}, and this network {expected or 'no such weight'}: it "
                    "was saved from another network."
                )
        if self._frozen_copy is None:
            self.train_all_weights()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.requires_grad_(name in weights)
                if name in weights:
                    parameter.copy_(weights[name])


class ValueHeads(nn.Linear):
    """k scalars from a hidden state, 0 at first; in float32 at least, whatever the trunk's precision."""

    def __init__(self, hidden_size: int, num_heads: int, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        super().__init__(hidden_size, num_heads, device=like.device, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))
