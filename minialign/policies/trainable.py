"""What every policy shares: which weights train, the frozen copy that is their reference, and saving them."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn


class Trainable:
    """A policy around `network`; `_frozen_copy` is the reference where all weights train (None: the adapter is off)."""

    network: nn.Module
    _frozen_copy: nn.Module | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones. Raises ValueError when there is none."""
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError("nothing to train: call policy.add_lora() or policy.train_all_weights() first.")
        return trainable

    def train_all_weights(self) -> None:
        """Makes every weight of the network trainable, and keeps a frozen copy of it as the reference."""
        self._frozen_copy = copy.deepcopy(self.network).requires_grad_(False)
        self.network.requires_grad_(True)

    def _adapters(self) -> list[nn.Module]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]

    def _save_trainable(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        weights = {name: p.detach().contiguous() for name, p in self.network.named_parameters() if p.requires_grad}
        save_file(weights, Path(folder) / "trainable.safetensors")


class ValueHeads(nn.Linear):
    """k scalars from a hidden state, 0 at first; in float32 at least, whatever the trunk's precision."""

    def __init__(self, hidden_size: int, num_heads: int, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        super().__init__(hidden_size, num_heads, device=like.device, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))
