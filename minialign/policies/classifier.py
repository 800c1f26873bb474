"""A transformers sequence classifier, whatever its head looks like: what it says of a text.

Causal trunks (GPT-2, Llama) have a linear `score` that reads the last token: found by the mask's end, for transformers
looks for the last token that is not padding, and passes over an EOS that padding shares. Others (RoBERTa, DeBERTa,
ModernBERT) pool in their own way, so they are called as they are.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minialign.policies.passes import checkpointing, in_half_precision


def check_classifier(network: nn.Module) -> None:
    """Raises ValueError, before any text is read, for what is no sequence classifier of transformers'."""
    if hasattr(network, "get_base_model"):
        raise ValueError(
            "the network is a PeftModel, of which all weights would train: pass network.merge_and_unload()."
        )
    if not hasattr(network, "config") or "ForSequenceClassification" not in _names(network):
        raise ValueError(
            f"{type(network).__name__} is no sequence classifier: load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
        )


def _names(network: nn.Module) -> str:
    return " ".join(kind.__name__ for kind in type(network).__mro__)


def class_outputs(network: nn.Module, ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"]) -> Float[Tensor, "b heads"]:
    """The head's outputs, in float32; rows are padded on the right."""
    with checkpointing(network):
        if not hasattr(network, "score"):
            return network(input_ids=ids, attention_mask=mask).logits.float()
        hidden = getattr(network, network.base_model_prefix)(input_ids=ids, attention_mask=mask).last_hidden_state
        last = (mask.sum(1) - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        return network.score(hidden.gather(1, last).squeeze(1)).float()


@torch.no_grad()
def check_padding(network: nn.Module, ids: Tensor, mask: Tensor, outputs: Tensor) -> None:
    """Raises ValueError if the shortest row, alone, gives other outputs than beside the others (XLNet)."""
    row, length = int(mask.sum(1).argmin()), int(mask.sum(1).min())
    alone = class_outputs(network, ids[row : row + 1, :length], mask[row : row + 1, :length])
    gap, size = float((alone - outputs[row]).abs().max()), float(outputs.abs().max())
    if not gap <= 1e-6 + (0.2 if in_half_precision(network) else 1e-2) * size:
        raise ValueError(
            f"{type(network).__name__} reads padding: {ids.shape[1] - length} tokens of it move a score by {gap:.2g}. "
            "Take a classifier that can be padded on the right (GPT-2, Llama, RoBERTa, DeBERTa, ModernBERT)."
        )


def output_layer(network: nn.Module) -> nn.Linear:
    """The last linear layer of its head, a row of weights an output. Raises ValueError for a head without one."""
    trunk = set(getattr(network, network.base_model_prefix).modules())
    head = [module for module in network.modules() if module not in trunk and isinstance(module, nn.Linear)]
    if not head or head[-1].out_features != network.config.num_labels:
        raise ValueError(f"the head of {type(network).__name__} does not end with a linear layer, an output a label.")
    return head[-1]
