"""What every denoising policy can do: encode prompts, roll out, score a step under the weights and the reference."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minialign.kernels import StepOut, add_noise, expand_as, gaussian_kl, predict
from minialign.kernels.preferences import Target
from minialign.policies import adapters
from minialign.policies.architectures import call_network
from minialign.policies.border import refuse_half, refuse_zero_signal
from minialign.policies.encoders import class_encoder, latent_shape_of
from minialign.policies.noise import row_noise
from minialign.policies.trainable import TRAINABLE, Trainable
from minialign.policies.trajectory import Condition, Encoded, Trajectory
from minialign.settings import NonNegative, demand

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# A miniature has few attention weights, so its LoRA also reaches the convolutions and the feed-forward layers.
EVERYWHERE = (*ATTENTION, "conv1", "conv2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv_in", "conv_out")


class Policy(Trainable):
    """A network with a scheduler's noise levels, seen as a policy; what no sampler in particular is about.

    encoder: distinct prompts -> (inputs[, unconditional inputs[, shared inputs]]), dicts of tensors: see `Encoded`; or
    give `class_names` for a class-conditional network (keyword `class_labels`; `null_class` is its label without
    condition), or neither. A prompt is anything hashable that the encoder knows.
    guidance_scale g: e_u + g (e_c - e_u), as diffusers has it: at or below 1 the prompt alone; a guided evaluation
    counts 2.
    network_evaluations counts rows; a row that will be differentiated counts 3 (its backward pass costs 2 forward).

    A subclass says what a step is: `set_num_steps` and `_set_levels` (the grid), `num_actions`, `step_from`,
    `check_density`; and what its training loss is: `draw_levels`, `corrupt`, `training_error`.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler,
        *,
        latent_shape: tuple[int, ...] | None = None,
        encoder: Callable[[list], tuple[dict[str, Tensor], ...]] | None = None,
        class_names: Sequence[Hashable] | None = None,
        null_class: int | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        num_steps: int,
        guidance_scale: float | int,
    ):
        demand(NonNegative, guidance_scale=guidance_scale)
        if class_names is not None and encoder is not None:
            raise ValueError("give an encoder or class_names, not both: either says what a prompt means.")
        if guidance_scale > 1 and class_names is not None and null_class is None:
            raise ValueError("guidance_scale > 1 needs null_class: the label that the network knows as 'no condition'.")
        self.network = network.eval()  # dropout would make the ratio differ from 1 before the first update
        self.scheduler = scheduler
        self.latent_shape = tuple(latent_shape or latent_shape_of(network))
        self.guidance_scale = float(guidance_scale)
        self.network_evaluations = 0
        self.pipeline = None  # set by from_pipeline: where a saved adapter can be tried
        self._encoder = encoder or class_encoder(class_names, null_class)
        self._decoder = decoder
        self.set_num_steps(num_steps)

    def _set_levels(self, timesteps: Tensor) -> None:
        """The noise levels of a grid, where the network is. States are float32 at least, or the first ratio is not 1.

        Raises ValueError for a level that is noise alone, if the network predicts the noise.
        """
        parameter = next(self.network.parameters())
        self.device, self.state_dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        self.timesteps = timesteps.to(self.device).long()
        self._alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device, self.state_dtype)
        kind = self.scheduler.config.prediction_type
        refuse_zero_signal(self._alphas_cumprod, self.timesteps, kind, type(self.scheduler))

    def to(self, device: torch.device | str) -> "Policy":
        """Moves the network (and the pipeline's other modules) in place; trajectories and noise follow it."""
        self.network.to(device)
        if self.pipeline is not None:
            self.pipeline.to(device)
        if self._frozen_copy is not None:
            self._frozen_copy.to(device)
        self._set_levels(self.timesteps)
        return self

    # ---------------------------------------------------------------- what is trained, and against which reference

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones. Raises ValueError when there is none, for half precision, and see `Trainable`."""
        trainable = super().parameters()
        refuse_half(trainable)
        return trainable

    def train_all_weights(self) -> None:
        """Makes every weight of the network trainable, and keeps a frozen copy of it as the reference.

        Raises ValueError for a network in half precision, and for one with an adapter.
        """
        refuse_half(list(self.network.parameters()))
        super().train_all_weights()

    def add_lora(
        self, rank: int = 4, alpha: int | None = None, target_modules: Sequence[str] = ATTENTION, seed: int = 0
    ) -> None:
        """Freezes the network and adds a LoRA adapter (peft), zero at first. Reference: the network without it.

        The adapter is float32 whatever the network. Raises ValueError if there is one already, or if all weights train.
        """
        from peft import LoraConfig

        self._refuse_trained("add_lora")
        config = LoraConfig(
            r=rank, lora_alpha=alpha or rank, target_modules=list(target_modules), init_lora_weights="gaussian"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters.put_in(self.network, config)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes what was trained: LoRA in the format of diffusers' `load_lora_weights`, else all trainable weights.

        LoRA is written by the pipeline's own class; of a bare network, as a StableDiffusionPipeline's. `load_adapter`
        reads either. A whole pipeline is written by its own save_pretrained, with the adapter folded into the weights.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.parameters()  # refuses what an adapter's file would not hold
        name = self._active_adapter(self._adapters())
        (Path(folder) / (TRAINABLE if name else adapters.LORA)).unlink(
            missing_ok=True
        )  # an earlier one of the other kind
        if name:
            adapters.write(self.network, name, self.pipeline, folder)
        else:
            self._save_trainable(folder)

    def load_adapter(self, folder: str | Path) -> None:
        """What `save_adapter` wrote, to be trained further; in the place of add_lora or train_all_weights.

        Reference: the network as it was before. Raises ValueError for what another network's policy wrote, and leaves
        the network as it was; FileNotFoundError where there is nothing.
        """
        if (Path(folder) / TRAINABLE).exists():
            self._load_trainable(folder)
        elif (Path(folder) / adapters.LORA).exists():
            self._refuse_trained("load_adapter")
            adapters.read(self.network, self.pipeline, folder)
        else:
            raise FileNotFoundError(f"{folder} has no {adapters.LORA} and no {TRAINABLE}: nothing was saved there.")

    def merge(self) -> None:
        """Makes what was trained the base: folds the adapter into the weights, and forgets the reference.

        Nothing trains afterwards, until add_lora or train_all_weights is called again. Raises ValueError if nothing is.
        """
        self.parameters()
        if name := self._active_adapter(self._adapters()):
            adapters.take_out(self.network, name, merge=True)
        self._frozen_copy = None
        self.network.requires_grad_(False)

    def _refuse_trained(self, call: str) -> None:
        self._refuse_adapters()
        if self._frozen_copy is not None:
            raise ValueError(
                f"all weights of this policy train: {call} would leave them out of what is saved. Call policy.merge() "
                "before, which makes them the base."
            )

    # ---------------------------------------------------------------- the policy

    def encode(self, prompts: Sequence, guided: bool | None = None) -> Condition:
        """The network's inputs for each prompt; equal prompts are encoded once. Raises ValueError for an empty list.

        guided: whether to include the inputs without prompt; None: if guidance_scale is above 1.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; expected a list of strings: [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("prompts is empty; give at least one.")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, Hashable):
                raise ValueError(
                    f"prompt {i} is the {type(prompt).__name__} {prompt!r}; expected something hashable, to tell equal "
                    "prompts from others: a string, a number, a tuple, a frozen dataclass."
                )
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([row_of[prompt] for prompt in prompts], device=self.device)
        encoded = Encoded(*self._encoder(list(row_of)))
        guided = self.guidance_scale > 1 if guided is None else guided
        inputs, unconditional = (
            {name: value.to(self.device)[rows] for name, value in part.items()}
            for part in (encoded.inputs, encoded.unconditional if guided else {})
        )
        shared = {name: value.to(self.device) for name, value in encoded.shared.items()}
        return Condition(inputs, unconditional, shared, rows)

    def draw_noise(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        rows: Iterable[int] | Tensor | None = None,
    ) -> Tensor:
        """All the randomness of a rollout: (num_samples, S + 1, *latent); [:, 0] starts it, [:, i + 1] is step i's.

        rows: only these, what draw_noise(num_samples, generator)[rows] would be; the others are not drawn.
        """
        shape = (self.num_steps + 1, *self.latent_shape)
        return row_noise("standard_normal", num_samples, shape, self.state_dtype, generator, rows).to(self.device)

    def model_output(self, states: Tensor, step: Tensor | int, condition: Condition, reference: bool = False) -> Tensor:
        """What the network says at `states`, guided: noise, v or x0 as the scheduler's prediction_type has it."""
        return self.output_at(states, self.timesteps[step].expand(len(states)), condition, reference)

    def output_at(
        self,
        states: Tensor,
        timesteps: Tensor,
        condition: Condition,
        reference: bool = False,
        guidance_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The same at any training timesteps (n,), on the sampler's grid or not.

        guidance_scale: the policy's own by default; another for all, 1 being off; or (n,), a row its own. One that is
        given here is put into the formula, even below 1.
        """
        scale = max(self.guidance_scale, 1.0) if guidance_scale is None else guidance_scale
        if not isinstance(scale, Tensor) and scale == 1:
            return self._call(states, timesteps, condition.inputs | condition.shared, reference)
        if condition.unconditional.keys() != condition.inputs.keys():
            raise ValueError(
                "this condition was encoded with guidance_scale = 1; encode the prompts again to use guidance."
            )
        both = {name: torch.cat([condition.unconditional[name], value]) for name, value in condition.inputs.items()}
        unconditional, conditional = self._call(
            torch.cat([states, states]), timesteps.repeat(2), both | condition.shared, reference
        ).chunk(2)
        scale = expand_as(scale, states) if isinstance(scale, Tensor) else scale
        return unconditional + scale * (conditional - unconditional)

    def _call(self, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor], reference: bool) -> Tensor:
        differentiated = torch.is_grad_enabled() and not reference
        self.network_evaluations += len(states) * (3 if differentiated else 1)
        call = self._reference_call if reference else partial(call_network, self.network)
        return call(states, timesteps, inputs)

    @torch.no_grad()
    def _reference_call(self, states: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        # exact worlds: the analytic score without its residual
        if self._frozen_copy is None and hasattr(self.network, "reference_forward"):
            states = states.to(next(self.network.parameters()).dtype)
            return self.network.reference_forward(states, timesteps, **inputs)
        with self.reference_weights() as network:
            return call_network(network, states, timesteps, inputs)

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
        A given `next` is data; a sampled one carries the gradient: see `StepOut`.
        """
        step = torch.as_tensor(step, device=self.device)
        output = self.model_output(states, step, condition, reference)
        return self.step_from(output, states, step, next=next, noise=noise, reduction=reduction)

    def rollout(
        self,
        prompts: Sequence[Hashable] | Condition,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        reduction: str = "mean",
        states: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        grad_steps: int | Iterable[int] | Tensor | None = None,
        density: bool = True,
    ) -> Trajectory:
        """Runs steps `first` to `last` (excluded; all by default) and keeps every state and log-probability.

        noise: as from `draw_noise`, which is called if it is None. states: where to start from, noise[:, 0] by default:
        a branching rollout runs the prefix once, repeats its final states, and goes on from first = its length.
        density=False: no log-probabilities (log_probs is (n, 0)), so deterministic samplers will do. Raises ValueError
        where std = 0 otherwise.

        The gradient runs through `states` and `final` (decode passes it on); under torch.no_grad() there is none.
        grad_steps: which network calls keep their graph: None, all; an int K, the last K of this run; or any indices
        into `timesteps`. With x the state, e the network's output at x, and a step x' = C x + D e + std noise:

            step in grad_steps             dx'/dx = C + D de/dx,  dx'/dtheta = D de/dtheta
            another one, behind the first  dx'/dx = C             (e is a constant, the sampler's own path stays)
            before the first               none: the state there is data, and so is a noise that asks for a gradient

        The last K: truncated back-propagation, exactly. A subset: d final / d theta sums its steps' own terms, carried
        to the end by the factors above. A graphed call counts 3 network evaluations, another 1.
        """
        if density:
            self.check_density()
        condition = prompts if isinstance(prompts, Condition) else self.encode(prompts)
        noise = self.draw_noise(len(condition), generator) if noise is None else noise
        self._check_noise(noise, len(condition))
        if not 0 <= first <= (self.num_actions if last is None else last) <= self.num_actions:
            raise ValueError(
                f"first is {first} and last {last}; expected 0 <= first <= last <= {self.num_actions}, the steps that "
                "have a density."
            )
        steps = range(self.num_actions)[first:last]
        calls = range(steps.start, self.num_steps) if last is None else steps
        graphed = graphed_steps(calls, grad_steps)
        path, log_probs = [noise[:, 0] if states is None else states], []
        final = path[0]
        for i, out in zip(calls, self._walk(final, calls, condition, noise, reduction, graphed), strict=True):
            final = out.next
            if i in steps:  # a deterministic last call is no action: it only makes the sample
                path.append(out.next)
                log_probs.append(out.log_prob.detach())
        states = torch.stack(path, 1)
        log_probs = torch.stack(log_probs, 1) if log_probs and density else states.detach().new_empty(len(states), 0)
        steps = torch.arange(self.num_actions, device=self.device)[first:last]
        return Trajectory(states, log_probs, steps, self.timesteps[steps], condition, final)

    def _check_noise(self, noise: Tensor, rows: int) -> None:
        due = (rows, self.num_steps + 1)
        if noise.shape[:2] != due or noise.ndim != 2 + len(self.latent_shape):
            shape = (*due, *self.latent_shape)
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}, as draw_noise({rows}) gives it.")

    def _walk(
        self,
        states: Tensor,
        steps: range,
        condition: Condition,
        noise: Tensor,
        reduction: str,
        graphed: Collection[int] = (),
    ) -> Iterator[StepOut]:
        enabled, first = torch.is_grad_enabled(), min(graphed, default=self.num_steps)
        for i in steps:
            with torch.set_grad_enabled(enabled and i in graphed):
                output = self.model_output(states, i, condition)
            with torch.set_grad_enabled(enabled and i >= first):
                out = self.step_from(output, states, i, noise=noise[:, i + 1], reduction=reduction)
            states = out.next
            yield out

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Hashable], noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decoded samples, one a prompt; keeps no path and needs no density, so eta = 0 will do. No gradient: for one,
        decode what a rollout ends with."""
        condition = self.encode(prompts)
        noise = self.draw_noise(len(condition), generator) if noise is None else noise
        self._check_noise(noise, len(condition))
        states = noise[:, 0]
        for out in self._walk(states, range(self.num_steps), condition, noise, "mean"):
            states = out.next
        return self.decode(states)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent) to samples: images (n, channels, height, width) in [0, 1], or the latents themselves.

        Differentiable; where an image was clamped to [0, 1] its gradient is 0.
        """
        return latents if self._decoder is None else self._decoder(latents)

    def step_kl(self, out: StepOut, out_ref: StepOut, reduction: str) -> Tensor:
        """KL(policy || reference) of one step from the same state, (n,), nats: that of two Gaussians of one std."""
        return gaussian_kl(out.mean, out_ref.mean, out.std, reduction)

    # ---------------------------------------------------------------- training on clean samples

    def _draw_integers(self, high: int, n: int, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else self.device
        return torch.randint(high, (n,), generator=generator, device=device).to(self.device)

    def corrupt(self, latents: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise at `levels` (n,), training timesteps."""
        return add_noise(latents, noise, self._alphas_cumprod[levels])

    def signal_and_noise(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise), both (n,), of `levels` (n,): x_t = signal x_0 + noise eps."""
        alpha_bar = self._alphas_cumprod[levels]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noise_at(self, states: Tensor, levels: Tensor, condition: Condition, reference: bool = False) -> Tensor:
        """The noise that the network sees in states (n, *latent) at `levels` (n,), whatever it predicts; unguided."""
        output = self.output_at(states, levels, condition, reference, guidance_scale=1.0)
        kind = self.scheduler.config.prediction_type
        return predict(output, states, self._alphas_cumprod[levels], kind)[1]

    @property
    def target(self) -> Target:
        """What the training error is an error of: "epsilon", "v_prediction", "sample" or "flow" (`error_weight`)."""
        return self.scheduler.config.prediction_type


def graphed_steps(calls: range, grad_steps: int | Iterable[int] | Tensor | None) -> frozenset[int]:
    """Which network calls keep their graph; see `Policy.rollout`. Raises ValueError for calls that are not made."""
    if grad_steps is None:
        return frozenset(calls)
    if isinstance(grad_steps, int):
        if not 0 <= grad_steps <= len(calls):
            raise ValueError(f"grad_steps is {grad_steps}; this run has 0 to {len(calls)} last network calls to keep.")
        return frozenset(calls[len(calls) - grad_steps :])
    chosen = frozenset(int(i) for i in grad_steps)
    if missed := sorted(chosen - set(calls)):
        raise ValueError(f"grad_steps names step {missed[0]}; this run calls the network at {list(calls)}.")
    return chosen
