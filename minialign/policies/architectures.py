"""How each architecture is called: the one place that knows argument names, added conditions and units of time.

    network(x, t, **inputs)                                               diffusers' UNet2DModel, our own modules
    ... and pooled text and sizes inside added_cond_kwargs                UNet2DConditionModel (Stable Diffusion XL)
    network(hidden_states=x, timestep=t, **inputs)                        DiT, Stable Diffusion 3
    ... with t in [0, 1]                                                  Flux

A new architecture is a line of `CALLS`. x (n, *latent), t (n,) the training timestep, inputs by name. Language models
are called alike, and differ in what they name: `named_inputs`, `cache_name`.
"""

import inspect

from torch import Tensor, nn

ADDED = ("text_embeds", "time_ids", "image_embeds")  # what diffusers' conditional UNets want in a dictionary of its own


def positional(network: nn.Module, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]):
    return network(states, timesteps, **inputs)


def with_added_conditions(network: nn.Module, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]):
    added = {name: value for name, value in inputs.items() if name in ADDED}
    inputs = {name: value for name, value in inputs.items() if name not in ADDED}
    return network(states, timesteps, **inputs, added_cond_kwargs=added or None)


def by_keyword(network: nn.Module, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]):
    return network(hidden_states=states, timestep=timesteps, **inputs)


def in_unit_time(network: nn.Module, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]):
    return network(hidden_states=states, timestep=timesteps.to(states.dtype) / 1000, **inputs)


CALLS = {
    "UNet2DConditionModel": with_added_conditions,
    "DiTTransformer2DModel": by_keyword,
    "SD3Transformer2DModel": by_keyword,
    "FluxTransformer2DModel": in_unit_time,
}


def call_network(network: nn.Module, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The network's output (n, *latent) at states; it and all its inputs in the network's own precision.

    Subclasses are called alike.
    """
    dtype = next(network.parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    names = [kind.__name__ for kind in type(network).__mro__]
    call = next((CALLS[name] for name in names if name in CALLS), positional)
    output = call(network, states.to(dtype), timesteps, inputs)
    return getattr(output, "sample", output)


def named_inputs(network: nn.Module) -> frozenset[str]:
    """The arguments that its forward names."""
    return frozenset(inspect.signature(network.forward).parameters)


def cache_name(accepted: frozenset[str]) -> str | None:
    """transformers renames past_key_values to cache in 5.2x; older models know the first, other modules neither."""
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)
