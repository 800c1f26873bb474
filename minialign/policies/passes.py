"""One pass of a causal language model over tokens, as the model wants to be called; and whether all its passes agree.

    run_pass          mask, positions, cache, as far as the network's forward names them
    new_cache         transformers' cache for this network, or None where it takes none
    checkpointing     lets layers save memory as gradient_checkpointing_enable() asked them to, dropout staying off
    check_agreement   with its cache, in one pass, beside padding: the same log-probabilities, or a ValueError

What is sampled must be what is scored: else no ratio is 1 before the first update, and nothing tells.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minialign.policies.architectures import cache_name, named_inputs
from minialign.policies.responses import Responses


def run_pass(
    network: nn.Module, tokens: Tensor, mask: Tensor, keep: int, *, cache=None, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(outputs, hidden states) at the last `keep` of `tokens`; `mask` also covers what is in the cache."""
    accepted = named_inputs(network)
    inputs = {}
    if "attention_mask" in accepted or "kwargs" in accepted:
        # A recurrent state has no positions behind it that could be masked.
        inputs["attention_mask"] = (mask[:, -tokens.shape[1] :] if _recurrent(cache) else mask).long()
    if "position_ids" in accepted:  # counted from the first real token
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    if hidden:
        inputs["output_hidden_states"] = True
    if cache is not None:
        inputs |= {cache_name(accepted): cache, "use_cache": True}
    elif "use_cache" in accepted:
        inputs["use_cache"] = False
    with checkpointing(network):
        output = network(tokens, **inputs)
    logits = getattr(output, "logits", output)[:, -keep:]
    return logits, output.hidden_states[-1] if hidden else None


def new_cache(network: nn.Module):
    default = getattr(network, "_supports_default_dynamic_cache", lambda: True)  # xLSTM, for one, has its own
    if cache_name(named_inputs(network)) is None or not default():
        return None
    from transformers import DynamicCache

    return DynamicCache(config=network.config)


def _recurrent(cache) -> bool:
    """Whether it holds nothing but recurrent states (Mamba), no keys and values."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and not any(hasattr(layer, "keys") for layer in layers)


@contextmanager
def checkpointing(network: nn.Module) -> Iterator[None]:
    """Wakes the layers that transformers' gradient_checkpointing_enable() has marked, for one differentiated pass.

    They checkpoint in training mode alone, which the policy never is in: so the mark itself is in training mode, and
    what it wraps, layer and children, is not, now or when the backward pass runs it again. Raises ValueError for a
    network that has the mark, and no layers of transformers' own that would heed it.
    """
    marked = []
    if torch.is_grad_enabled():
        marked = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    if not marked:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in marked if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(network).__name__} checkpoints gradients in training mode alone, dropout and all, and the policy "
            "keeps dropout off: call network.gradient_checkpointing_disable()."
        )
    theirs = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, theirs, strict=True):
        layer.training, layer._gradient_checkpointing_func = True, _without_dropout(layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, theirs, strict=True):
            layer.training, layer._gradient_checkpointing_func = False, checkpoint


def _without_dropout(layer: nn.Module, checkpoint: Callable) -> Callable:
    """`checkpoint`, of the layer in evaluation mode: some drop out by their own mode, not by a child's."""

    def run(function: Callable, *args):
        def evaluated(*args):
            before, layer.training = layer.training, False
            try:
                return function(*args)
            finally:
                layer.training = before

        return checkpoint(evaluated, *args)

    return run


def in_half_precision(network: nn.Module) -> bool:
    """Whether any weight is."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in network.parameters())


def in_full_precision(network: nn.Module) -> nn.Module:
    """The module itself, in float32 if any of it was in half precision."""
    return network.float() if in_half_precision(network) else network


def rounding(network: nn.Module) -> float:
    """Nats by which two ways of adding up may differ, on average over tokens: generous, for a fault is larger."""
    return 0.2 if in_half_precision(network) else 1e-3 if torch.get_float32_matmul_precision() == "highest" else 2e-2


def check_agreement(
    network: nn.Module, responses: Responses, log_probs: Tensor, score: Callable[[Responses], Tensor]
) -> None:
    """Raises ValueError if what was sampled is not what is scored. log_probs (b, t): as generated.

    The responses to the shortest and to the longest prompt are scored, `score` -> (b, t), in one pass; the first of
    them alone as well, where it was padded.
    """
    name, limit, lengths = type(network).__name__, rounding(network), responses.prompt_mask.sum(1)
    rows = torch.stack([lengths.argmax(), lengths.argmin()])
    pair = responses[rows]
    together = score(pair)

    def gap(row: int, other: Tensor) -> float:
        valid = pair.mask[row]
        return float((together[row] - other)[valid].abs().mean())

    if not (cached := gap(0, log_probs[rows[0]])) < limit:
        raise ValueError(
            f"{name} gives other probabilities with its cache than without: {cached:.2g} nats a token on average. What "
            "it samples is not what is scored, and no ratio would be 1 before the first update. Pass use_cache=False "
            "to LanguagePolicy: it then generates by whole passes."
        )
    short = pair[1:]
    first = int((~short.prompt_mask[0]).sum())
    short.prompt_tokens, short.prompt_mask = short.prompt_tokens[:, first:], short.prompt_mask[:, first:]
    padded = max(gap(1, log_probs[rows[1]]), gap(1, score(short)[0])) if first else 0.0
    if not padded < limit:
        raise ValueError(
            f"{name} reads padding: a prompt padded from {int(lengths.min())} to {int(lengths.max())} tokens changes "
            f"its log-probabilities by {padded:.2g} nats a token on average (a recurrent network without a mask, for "
            "example). Give it prompts of one length in tokens."
        )
