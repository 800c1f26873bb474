"""LoRA adapters (peft) of denoising networks: put in, written in diffusers' format, read again, folded in.

diffusers' conditional UNets bring all of this with them; a UNet2DModel, or a module of one's own, none of it.
"""

import copy
from functools import wraps
from pathlib import Path
from types import MethodType

import torch
from torch import nn

NAME = "default"
LORA = "pytorch_lora_weights.safetensors"  # what diffusers calls the file of a LoRA


def put_in(network: nn.Module, config) -> None:
    """The adapter that `config` (a LoraConfig) says, trainable and float32 whatever the network; the rest is frozen."""
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    network.requires_grad_(False)
    add = getattr(network, "add_adapter", None)
    add(config, NAME) if add else inject_adapter_in_model(config, network, NAME)
    cast_adapter_dtype(network, NAME)
    if hasattr(network, "save_pretrained"):
        save = wraps(type(network).save_pretrained)(_save_merged)  # pipelines look which arguments it takes
        network.save_pretrained = MethodType(save, network)


def _save_merged(network: nn.Module, *args, **kwargs) -> None:
    """The weights with the adapter folded in, so that a pipeline saved while it trains draws the same pictures.

    diffusers would write peft's own layers, which its from_pretrained cannot read.
    """
    merged = copy.deepcopy(network)
    take_out(merged, NAME, merge=True)
    merged.save_pretrained(*args, **kwargs)


def write(network: nn.Module, name: str, pipeline, folder: str | Path) -> None:
    """The adapter `name` in the format of diffusers' `load_lora_weights`, by the pipeline's own class if it has one."""
    from peft.functional import get_peft_model_state_dict

    # in peft's own key names: diffusers' converter renames attention alone, and its loader then misses the rest
    layers = get_peft_model_state_dict(network, adapter_name=name)
    config = network.peft_config[name].to_dict()  # rank and alpha: without them the scale would be lost
    name = _part(pipeline)
    _kind(pipeline).save_lora_weights(
        folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": config}
    )


def read(network: nn.Module, pipeline, folder: str | Path) -> None:
    """The adapter that `write` wrote, put in and trainable.

    Raises ValueError for a file without the rank and alpha of its LoRA, and for one of another network, which is left
    as it was.
    """
    from peft import LoraConfig
    from peft.functional import set_peft_model_state_dict

    layers, _, metadata = _kind(pipeline).lora_state_dict(
        str(folder), weight_name=LORA, return_lora_metadata=True, local_files_only=True
    )
    if not metadata:
        raise ValueError(
            f"{Path(folder) / LORA} does not say the rank and alpha of its LoRA: policy.save_adapter did not write it. "
            "To align a model with it, load it with pipe.load_lora_weights, call pipe.fuse_lora() and "
            "pipe.unload_lora_weights(), then wrap the pipeline."
        )
    prefix = f"{_part(pipeline)}."
    layers, settings = ({k.removeprefix(prefix): v for k, v in part.items()} for part in (layers, metadata))
    try:
        put_in(network, LoraConfig(**settings | {"inference_mode": False}))
        result = set_peft_model_state_dict(network, layers, NAME)
        surplus = list(result.unexpected_keys)
    except (ValueError, RuntimeError) as error:
        take_out(network, NAME, merge=False)
        raise ValueError(
            f"{folder} has the adapter of another network: {str(error).splitlines()[-1].strip()}"
        ) from None
    if surplus:
        take_out(network, NAME, merge=False)
        raise ValueError(f"{folder} has the adapter of another network: there is no {surplus[0]} here.")


@torch.no_grad()
def take_out(network: nn.Module, name: str, merge: bool) -> None:
    """Replaces peft's modules by those that they wrap, with the adapter folded in (merge) or without it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merge:
                layer.merge(adapter_names=[name])
            inner = layer.get_base_layer()
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            inner = layer.modules_to_save[name] if merge else layer.original_module
        else:
            continue
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, inner)
    network.__dict__.pop("save_pretrained", None)
    getattr(network, "unload_lora", lambda: None)()  # diffusers' own record of its adapters
    if hasattr(network, "peft_config"):
        del network.peft_config
    network.requires_grad_(False)


def _kind(pipeline) -> type:
    from diffusers import StableDiffusionPipeline

    kind = StableDiffusionPipeline if pipeline is None else type(pipeline)
    return kind if hasattr(kind, "save_lora_weights") else StableDiffusionPipeline


def _part(pipeline) -> str:
    """What a pipeline's class calls the network that has the LoRA, in its files: "unet" or "transformer"."""
    kind = _kind(pipeline)
    return "unet" if hasattr(kind, "unet_name") else kind.transformer_name
