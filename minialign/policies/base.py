"""What every policy deals in: conditions, trajectories, and the single transitions that a loss picks from them."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minialign.kernels import StepOut, at_least_float32, expand_as
from minialign.policies.trainable import Trainable

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# A miniature has few attention weights, so its LoRA also reaches the convolutions and the feed-forward layers.
EVERYWHERE = (*ATTENTION, "conv1", "conv2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv_in", "conv_out")


@dataclass
class Condition:
    """Named inputs of the network, one row a sample; `condition[rows]` selects. `rows`: which prompt each came from."""

    tensors: dict[str, Tensor]
    rows: Tensor

    def __getitem__(self, index) -> "Condition":
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()}, self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)


class Transitions(NamedTuple):
    """Single steps, one a row: from `states` by policy step `step` to `next`, with its log-probability back then."""

    states: Tensor
    step: Tensor
    condition: Condition
    next: Tensor
    log_prob_old: Tensor


@dataclass
class Trajectory:
    """Denoising runs, from noise to data: `states[:, 0]` is noisiest, `states[:, i + 1]` follows by step `steps[i]`.

    states (batch, S + 1, *latent); log_probs (batch, S) under the weights that rolled it out; steps (S,) indices into
    the policy's `timesteps`; timesteps (S,) the network's integers; final (batch, *latent) what `policy.decode` takes.
    A run that started late, from the branching point of a tree, has `steps[0] > 0`.
    """

    states: Tensor
    log_probs: Tensor
    steps: Tensor
    timesteps: Tensor
    condition: Condition
    final: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def transitions(self, rows: Tensor, places: Tensor) -> Transitions:
        """The transitions of trajectories `rows` (n,) at their `places` (n, k), flattened to n k rows.

        A place counts from the start of this trajectory, not of the policy's steps: branches start in the middle.
        """
        b, s = rows.repeat_interleave(places.shape[1]), places.flatten()
        return Transitions(
            self.states[b, s], self.steps[s], self.condition[b], self.states[b, s + 1], self.log_probs[b, s]
        )


class Policy(Trainable):
    """A network with a scheduler's noise levels, seen as a policy; what no sampler in particular is about.

    encoder: prompts -> (inputs, unconditional inputs), two dicts of tensors with a row a prompt; or give `class_names`
    for a class-conditional network (keyword `class_labels`; `null_class` is its label without condition), or neither.
    guidance_scale g: e_u + g (e_c - e_u), 1 is off; a guided evaluation counts 2.
    network_evaluations counts rows; a row that will be differentiated counts 3 (its backward pass costs 2 forward).

    A subclass says what a step is: `set_num_steps` (the grid), `num_actions`, `step_from`, `check_density`.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler,
        *,
        latent_shape: tuple[int, ...] | None = None,
        encoder: Callable[[list[str]], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None,
        class_names: Sequence[str] | None = None,
        null_class: int | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        num_steps: int,
        guidance_scale: float | int,
    ):
        if getattr(scheduler.config, "clip_sample", False):
            raise ValueError(
                "the scheduler has clip_sample=True: it would clamp the denoised sample, and with it the mean of the "
                "transition. Pass type(scheduler).from_config(scheduler.config, clip_sample=False)."
            )
        if class_names is not None and encoder is not None:
            raise ValueError("give an encoder or class_names, not both: either says what a prompt means.")
        if guidance_scale != 1 and class_names is not None and null_class is None:
            raise ValueError(
                "guidance_scale != 1 needs null_class: the label that the network knows as 'no condition'."
            )
        self.network = network.eval()  # dropout would make the ratio differ from 1 before the first update
        self.scheduler = scheduler
        self.latent_shape = tuple(latent_shape or _latent_shape(network))
        self.guidance_scale = float(guidance_scale)
        self.network_evaluations = 0
        self.pipeline = None  # set by from_pipeline: where a saved adapter can be tried
        self._encoder = encoder or _class_encoder(class_names, null_class)
        self._decoder = decoder
        self.set_num_steps(num_steps)

    def _place(self) -> None:
        """Where the network is, and the precision of states: float32 at least, or the first ratio is not 1."""
        parameter = next(self.network.parameters())
        self.device, self.state_dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)

    def to(self, device: torch.device | str) -> "DiffusionPolicy":
        """Moves the network (and the pipeline's other modules) in place; trajectories and noise follow it."""
        self.network.to(device)
        if self.pipeline is not None:
            self.pipeline.to(device)
        if self._frozen_copy is not None:
            self._frozen_copy.to(device)
        self.set_num_steps(self.num_steps)
        return self

    # ---------------------------------------------------------------- what is trained, and against which reference

    def add_lora(
        self, rank: int = 4, alpha: int | None = None, target_modules: Sequence[str] = ATTENTION, seed: int = 0
    ) -> None:
        """Freezes the network and adds a LoRA adapter (peft), zero at first. Reference: the network without it."""
        from peft import LoraConfig, inject_adapter_in_model

        self.network.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=alpha or rank, target_modules=list(target_modules), init_lora_weights="gaussian"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add = getattr(self.network, "add_adapter", None)
            add(config) if add else inject_adapter_in_model(config, self.network)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes what was trained: LoRA in the format of diffusers' `load_lora_weights`, else all trainable weights."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not self._adapters():
            self._save_trainable(folder)
            return
        from diffusers import StableDiffusionPipeline
        from peft import get_peft_model_state_dict

        # in peft's own key names: diffusers' converter renames attention alone, and its loader then misses the rest
        layers = get_peft_model_state_dict(self.network)
        config = self.network.peft_config["default"].to_dict()  # rank and alpha: without them the scale would be lost
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)

    # ---------------------------------------------------------------- the policy

    def encode(self, prompts: Sequence[str], guided: bool | None = None) -> Condition:
        """The network's inputs for each prompt; equal prompts are encoded once. Raises ValueError for an empty list.

        guided: whether to include the inputs without prompt; None: if guidance_scale is not 1.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; expected a list of strings: [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("prompts is empty; give at least one.")
        unique = list(dict.fromkeys(prompts))
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.device)
        inputs, unconditional = self._encoder(unique)
        guided = (
            {f"unconditional.{name}": value for name, value in unconditional.items()}
            if (self.guidance_scale != 1 if guided is None else guided)
            else {}
        )
        tensors = {name: value.to(self.device)[rows] for name, value in (inputs | guided).items()}
        return Condition(tensors, rows)

    def draw_noise(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """All the randomness of a rollout: (num_samples, S + 1, *latent); [:, 0] starts it, [:, i + 1] is step i's."""
        shape = (num_samples, self.num_steps + 1, *self.latent_shape)
        device = generator.device if generator is not None else self.device
        return torch.randn(shape, generator=generator, device=device, dtype=self.state_dtype).to(self.device)

    def model_output(self, states: Tensor, step: Tensor | int, condition: Condition, reference: bool = False) -> Tensor:
        """What the network says at `states`, guided: noise, v or x0 as the scheduler's prediction_type has it."""
        return self.output_at(states, self.timesteps[step].expand(len(states)), condition, reference)

    def output_at(
        self,
        states: Tensor,
        timesteps: Tensor,
        condition: Condition,
        reference: bool = False,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """The same at any training timesteps (n,), on the sampler's grid or not; guidance_scale (n,): a row its own."""
        inputs = {k: v for k, v in condition.tensors.items() if not k.startswith("unconditional.")}
        if guidance_scale is None and self.guidance_scale == 1:
            return self._call(states, timesteps, inputs, reference)
        unguided = {k.removeprefix("unconditional."): v for k, v in condition.tensors.items() if k not in inputs}
        if unguided.keys() != inputs.keys():
            raise ValueError(
                "this condition was encoded with guidance_scale = 1; encode the prompts again to use guidance."
            )
        both = {name: torch.cat([unguided[name], inputs[name]]) for name in inputs}
        unconditional, conditional = self._call(
            torch.cat([states, states]), timesteps.repeat(2), both, reference
        ).chunk(2)
        scale = self.guidance_scale if guidance_scale is None else expand_as(guidance_scale, states)
        return unconditional + scale * (conditional - unconditional)

    def _call(self, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor], reference: bool) -> Tensor:
        differentiated = torch.is_grad_enabled() and not reference
        self.network_evaluations += len(states) * (3 if differentiated else 1)
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}  # Stable Diffusion XL
        if added:
            inputs = {name: value for name, value in inputs.items() if name not in added} | {"added_cond_kwargs": added}
        states = states.to(next(self.network.parameters()).dtype)
        network = self._reference_call if reference else self.network
        output = network(states, timesteps, **inputs)
        return getattr(output, "sample", output)

    @torch.no_grad()
    def _reference_call(self, states: Tensor, timesteps: Tensor, **inputs):
        if self._frozen_copy is not None:
            return self._frozen_copy(states, timesteps, **inputs)
        if hasattr(self.network, "reference_forward"):  # exact worlds: the analytic score without its residual
            return self.network.reference_forward(states, timesteps, **inputs)
        adapters = self._adapters()
        if not adapters:
            raise ValueError(
                "this policy has no reference: call policy.add_lora() or policy.train_all_weights() before training."
            )
        for module in adapters:
            module.enable_adapters(False)
        try:
            return self.network(states, timesteps, **inputs)
        finally:
            for module in adapters:
                module.enable_adapters(True)

    def step(
        self,
        states: Tensor,
        step: Tensor | int,
        condition: Condition,
        *,
        next: Tensor | None = None,
        noise: Tensor | None = None,
        reduction: str = "mean",
        reference: bool = False,
    ) -> StepOut:
        """One transition: scores `next` if given, else samples it with `noise`. states (n, *latent); step (n,) or int.

        `step` is an index into `timesteps`, not a timestep. reference=True: the same under the frozen base model.
        """
        step = torch.as_tensor(step, device=self.device)
        output = self.model_output(states, step, condition, reference)
        return self.step_from(output, states, step, next=next, noise=noise, reduction=reduction)

    def rollout(
        self,
        prompts: Sequence[str] | Condition,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
        states: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Trajectory:
        """Runs steps `first` to `last` (excluded; all by default) and keeps every state and log-probability.

        noise: as from `draw_noise`, which is called if it is None. states: where to start from, noise[:, 0] by default:
        a branching rollout runs the prefix once, repeats its final states, and goes on from first = its length.
        Wrap it in torch.no_grad() unless the gradient through the sampler is wanted. Raises ValueError where std = 0.
        """
        self.check_density()
        condition = prompts if isinstance(prompts, Condition) else self.encode(prompts)
        noise = self.draw_noise(len(condition), generator) if noise is None else noise
        steps = torch.arange(self.num_actions, device=self.device)[first:last]
        path, log_probs = [noise[:, 0] if states is None else states], []
        for out in self._walk(path[0], steps, condition, noise, reduction):
            path.append(out.next)
            log_probs.append(out.log_prob)
        states = torch.stack(path, 1)
        log_probs = torch.stack(log_probs, 1) if log_probs else states.new_empty(len(states), 0)
        final = self._after_actions(path[-1], condition) if last is None else path[-1]
        return Trajectory(states, log_probs, steps, self.timesteps[steps], condition, final)

    def _after_actions(self, states: Tensor, condition: Condition) -> Tensor:
        """What follows the last step that has a density: nothing, unless the sampler ends with a deterministic call."""
        return states

    def _walk(
        self, states: Tensor, steps: Tensor, condition: Condition, noise: Tensor, reduction: str
    ) -> Iterator[StepOut]:
        for i in range(len(steps)):
            out = self.step(states, steps[i], condition, noise=noise[:, steps[i] + 1], reduction=reduction)
            states = out.next
            yield out

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decoded samples, one a prompt; keeps no path and needs no density, so eta = 0 will do."""
        condition = self.encode(prompts)
        noise = self.draw_noise(len(condition), generator) if noise is None else noise
        states = noise[:, 0]
        for out in self._walk(states, torch.arange(self.num_steps, device=self.device), condition, noise, "mean"):
            states = out.next
        return self.decode(states)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent) to samples: images (n, channels, height, width) in [0, 1], or the latents themselves."""
        return latents if self._decoder is None else self._decoder(latents)


def check_pipeline(pipe) -> None:
    """Raises ValueError for what is no text-to-image pipeline with a UNet and an autoencoder."""
    missing = [part for part in ("unet", "vae", "scheduler", "tokenizer") if getattr(pipe, part, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        hint = " It has a transformer: flow models are not diffusion policies." if hasattr(pipe, "transformer") else ""
        raise ValueError(
            f"cannot wrap {type(pipe).__name__}: it has no {', '.join(missing) or 'encode_prompt'}.{hint} Expected "
            "a pipeline like StableDiffusionPipeline, or build DiffusionPolicy(network, scheduler, ...) by hand."
        )
    channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latent:
        raise ValueError(
            f"cannot wrap {type(pipe).__name__}: its UNet takes {channels} channels, its VAE gives {latent}. "
            "Inpainting and image-conditioned UNets need extra channels in every call; use a text-to-image one."
        )


def pipeline_modules(pipe, decode_rows: int) -> dict:
    """Encoder and decoder of a pipeline, its modules frozen. `decode_rows`: latents per call of the autoencoder."""
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if module is not None:
            module.requires_grad_(False).eval()
    return {"encoder": _pipeline_encoder(pipe), "decoder": _vae_decoder(pipe.vae, decode_rows)}


def _latent_shape(network: nn.Module) -> tuple[int, ...]:
    config = getattr(network, "config", None)
    if config is None or getattr(config, "sample_size", None) is None:
        raise ValueError(
            f"{type(network).__name__} does not say the shape of its samples: pass latent_shape=(channels, h, w)."
        )
    size = config.sample_size
    return (config.in_channels, *((size, size) if isinstance(size, int) else size))


def _class_encoder(class_names: Sequence[str] | None, null_class: int | None):
    """Prompts that are the names of classes; without names, every prompt is accepted and means nothing."""
    labels = {name: i for i, name in enumerate(class_names or ())}

    def encode(prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not labels:
            return {}, {}
        for prompt in prompts:
            if prompt not in labels:
                near = difflib.get_close_matches(prompt, labels, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown prompt {prompt!r}; {hint}This policy knows: {', '.join(labels)}.")
        unconditional = {} if null_class is None else {"class_labels": torch.full((len(prompts),), null_class)}
        return {"class_labels": torch.tensor([labels[prompt] for prompt in prompts])}, unconditional

    return encode


def _pipeline_encoder(pipe):
    """The pipeline's own encode_prompt. XL pipelines add pooled embeddings, and want the image's size (time_ids)."""

    @torch.no_grad()
    def encode(prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        encoded = pipe.encode_prompt(
            prompts, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        inputs, unconditional = {"encoder_hidden_states": encoded[0]}, {"encoder_hidden_states": encoded[1]}
        if len(encoded) == 4:
            side = pipe.unet.config.sample_size * pipe.vae_scale_factor
            time_ids = encoded[0].new_tensor([[side, side, 0, 0, side, side]]).expand(len(prompts), 6)
            inputs |= {"text_embeds": encoded[2], "time_ids": time_ids}
            unconditional |= {"text_embeds": encoded[3], "time_ids": time_ids}
        return inputs, unconditional

    return encode


def _vae_decoder(vae, rows: int):
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def decode(latents: Tensor) -> Tensor:
        latents = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
        images = torch.cat([vae.decode(part).sample for part in latents.split(rows)])
        return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)

    return decode
