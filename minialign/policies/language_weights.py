"""Which weights of a language model train, which are their reference, and how they are saved, gone on from, merged.

    add_lora, load_adapter, train_all_weights      what trains; the reference is the network without it, or as it was
    add_value_heads                                a critic beside it
    save_adapter, merge                            what was trained: in peft's own format, or into the weights

What trains is float32, whatever the precision of the base: a step of 1e-5 is lost in bfloat16.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minialign.policies.passes import in_full_precision
from minialign.policies.trainable import TRAINABLE, Trainable, ValueHeads
from minialign.settings import Count, demand


class LanguageWeights(Trainable):
    """The weights' side of a `LanguagePolicy`: a network, what trains of it, and its critic."""

    _peft: nn.Module | None = None  # peft works in place: its wrapper is needed for saving and merging alone
    _value_heads: ValueHeads | None = None
    _value_network: nn.Module | None = None

    def _unwrapped(self, network: nn.Module) -> nn.Module:
        """The network inside a PeftModel. Raises ValueError for an adapter that does not sit in its layers."""
        if not hasattr(network, "get_base_model"):
            return network
        if network.active_peft_config.is_prompt_learning or network.active_peft_config.is_adaption_prompt:
            kind = network.active_peft_config.peft_type
            raise ValueError(f"a {getattr(kind, 'value', kind)} adapter adds tokens, not weights: use one like LoRA.")
        self._peft = network
        return network.get_base_model()

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones, the critic's included.

        Raises ValueError when the network has none, for half precision, and for what `Trainable.parameters` refuses.
        """
        found = super().parameters() + self.value_parameters()
        half = next((p.dtype for p in found if p.dtype.itemsize < 4), None)
        if half is not None:
            raise ValueError(
                f"what trains is {half}, in which small steps are lost; expected float32: call policy.network.float() "
                "(for an adapter of a PeftModel: load it with autocast_adapter_dtype=True)."
            )
        return found

    @property
    def critic(self) -> nn.Module | None:
        """The critic's own network, if it has one: called as the policy's."""
        return self._value_network

    def value_parameters(self) -> list[nn.Parameter]:
        """Those of the critic alone: its heads, and its trunk if that is its own. Empty without a critic."""
        modules = [module for module in (self._value_heads, self._value_network) if module is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def train_all_weights(self) -> None:
        """Makes every weight of the network trainable, in float32, and keeps a frozen copy of it as the reference.

        A network in half precision becomes float32, the same numbers, before it is copied: the KL then starts at 0.
        Raises ValueError if there is an adapter.
        """
        self._refuse_adapters()
        in_full_precision(self.network)
        super().train_all_weights()

    def add_lora(
        self,
        rank: int = 4,
        alpha: int | None = None,
        target_modules: Sequence[str] | str = "all-linear",
        seed: int = 0,
    ) -> None:
        """Freezes the network and adds a LoRA adapter (peft), zero at first. Reference: the network without it.

        Raises ValueError where an adapter, or all weights, train already: `merge` makes them the base.
        """
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        self._refuse_what_trains()
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in self.network.modules()),  # GPT-2
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._peft = get_peft_model(self.network, config).eval()

    def _refuse_what_trains(self) -> None:
        if not hasattr(self.network, "get_output_embeddings"):
            raise ValueError(f"{type(self.network).__name__} takes no LoRA: call policy.train_all_weights() instead.")
        self._refuse_adapters()
        if self._frozen_copy is not None:
            raise ValueError(
                "all weights train already, and would not be saved with an adapter: call policy.merge() before, which "
                "makes them the base."
            )

    def add_value_heads(self, num_heads: int = 1, *, own_trunk: bool = False, network: nn.Module | None = None) -> None:
        """A critic with `num_heads` outputs, all 0 at first: linear heads on the policy's last hidden state.

        own_trunk: on a copy of the network as it is now, all of it trainable: policy and critic then do not pull at one
        trunk. network: another module called like the policy, with outputs (b, s, num_heads) as they are or as
        `.logits`: a table, or a token classifier. Replaces an earlier critic. A network in half precision becomes
        float32, for it trains.
        """
        demand(Count, num_heads=num_heads)
        self._value_heads = self._value_network = None
        if network is not None:
            self._value_network = in_full_precision(network).eval()
            return
        hidden_size = getattr(getattr(self.network, "config", None), "hidden_size", None)
        if hidden_size is None:
            raise ValueError(
                f"{type(self.network).__name__} has no hidden states to put value heads on: pass network=, a module "
                "with one output a head."
            )
        heads = ValueHeads(hidden_size, num_heads, next(self.network.parameters()))
        if own_trunk:
            self._value_network = in_full_precision(copy.deepcopy(self.network))
            self._value_network.set_output_embeddings(heads)  # in the place of the vocabulary
            self._value_network.requires_grad_(True).eval()
        else:
            self._value_heads = heads

    def save_adapter(self, folder: str | Path) -> None:
        """Writes what was trained: an adapter in peft's format (`PeftModel.from_pretrained`), else all trainable ones.

        `load_adapter` goes on from either. The critic is not written: it is of no use without the run that it served.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self._peft is not None:
            self._peft.save_pretrained(folder)
        elif adapter := self._active_adapter(self._adapters()):  # one that came without PeftModel: add_adapter
            from peft import get_peft_model_state_dict
            from safetensors.torch import save_file

            self.network.peft_config[adapter].save_pretrained(folder)
            weights = get_peft_model_state_dict(self.network, adapter_name=adapter)
            weights = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
            save_file(weights, Path(folder) / "adapter_model.safetensors")
        else:
            self._save_trainable(folder)

    def load_adapter(self, folder: str | Path) -> None:
        """Goes on from what `save_adapter` wrote, or from an adapter of peft's own; it trains. Reference: without it.

        Raises ValueError for a folder that holds neither, for another network's, or if something trains already.
        """
        folder = Path(folder)
        if (folder / TRAINABLE).exists():
            self._refuse_adapters()
            self._load_trainable(folder)
        elif (folder / "adapter_config.json").exists():
            self._refuse_what_trains()
            self._load_peft(folder)
        else:
            raise ValueError(
                f"{folder} holds neither adapter_config.json nor {TRAINABLE}: give a folder that save_adapter wrote."
            )

    def _load_peft(self, folder: Path) -> None:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils import load_peft_weights

        config, weights = PeftConfig.from_pretrained(folder), load_peft_weights(folder, device=str(self.device))
        config.inference_mode = False
        with torch.random.fork_rng(devices=[]):
            wrapper = get_peft_model(self.network, config)
        for name, own in get_peft_model_state_dict(wrapper).items():
            found = tuple(weights[name].shape) if name in weights else None
            if found != tuple(own.shape):
                self.network = wrapper.unload()
                raise ValueError(
                    f"{folder} has {name} {found or 'not at all'}, and this network {tuple(own.shape)}: it was saved "
                    "from another network."
                )
        set_peft_model_state_dict(wrapper, weights)
        self._peft = wrapper.eval()

    def merge(self) -> None:
        """Folds what was trained into the weights, which are then the base: frozen, the reference of what trains next.

        An adapter is rounded to the precision of the base. Raises ValueError if nothing was trained.
        """
        if self._frozen_copy is not None:
            self._frozen_copy = None
        elif self._peft is not None:
            self.network, self._peft = self._peft.merge_and_unload().eval(), None
        else:
            raise ValueError(
                "nothing to merge: no weights were trained. An adapter of transformers' own add_adapter is merged by "
                "peft alone: load it as a PeftModel."
            )
        self.network.requires_grad_(False)
