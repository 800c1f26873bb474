"""What a policy understands of others' settings: schedulers, networks and pipelines; all else is refused by name.

A step is ours, a kernel with a density, so a setting that only diffusers' own step would hear would be lost in silence.
"""

import inspect

import torch
from torch import Tensor

# Of the noise levels, their grid and what the network says; the rest of these only matters with what is refused below.
LEVELS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr", "original_inference_steps",
    "timestep_scaling", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift",
    "time_shift_type",
)  # fmt: skip
# How another family walks along the same levels: its solver, which ours takes the place of.
SOLVERS = (
    "skip_prk_steps", "interpolation_type", "final_sigmas_type", "solver_order", "algorithm_type", "solver_type",
    "lower_order_final", "euler_at_final", "lambda_min_clipped", "predict_x0", "disable_corrector", "solver_p",
    "predictor_order", "corrector_order", "tau_func",
)  # fmt: skip
# A step of ours neither clips nor thresholds, and has the posterior's variance: what is set otherwise can be undone.
REQUIRED = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", None),
}
# What the network was trained for cannot: noise, v or x_0, of a mean alone, at discrete times.
TRAINED_FOR = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}
# Schedulers of networks that know x_t = sqrt(a) x_0 + sqrt(1 - a) noise at training timesteps.
FAMILY = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
# Of flow matching: what FlowMatchEulerDiscreteScheduler's own set_timesteps hears.
FLOW_LEVELS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "time_shift_type",
)  # fmt: skip
FLOW_COMPONENTS = (
    "transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
    "tokenizer_3", "feature_extractor", "image_encoder",
)  # fmt: skip
COMPONENTS = (
    "unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    "safety_checker", "feature_extractor", "image_encoder",  # judge or condition on pictures; only where they are asked
)  # fmt: skip


def understood(scheduler, kind: type):
    """The scheduler, as a `kind` (DDIMScheduler, LCMScheduler) on the same noise levels where it is of another family.

    Raises ValueError for a family whose network means something else, and for settings that would not be heard.
    """
    names = [base.__name__ for base in type(scheduler).__mro__]
    _check_trained_for(scheduler, names, kind)
    defaults = inspect.signature(type(scheduler).__init__).parameters
    said = {}
    for name in defaults.keys() & scheduler.config.keys() - {*LEVELS, *SOLVERS}:
        accepted = REQUIRED.get(name, (defaults[name].default,))
        if scheduler.config[name] not in accepted:
            said[name] = accepted[0]
    if said:
        settings = ", ".join(f"{name}={scheduler.config[name]!r}" for name in sorted(said))
        clamps = "it would clamp the denoised sample, and with it the mean of the transition. "
        raise ValueError(
            f"the scheduler ({names[0]}) has {settings}, which this policy's steps would not hear. "
            + (clamps if said.keys() & {"clip_sample", "thresholding"} else "")
            + repair(kind, **{name: said[name] for name in sorted(said)})
        )
    return scheduler if isinstance(scheduler, kind) else kind.from_config(scheduler.config, clip_sample=False)


def understood_flow(scheduler):
    """The scheduler, if it is a FlowMatchEulerDiscreteScheduler all of whose settings are heard.

    Raises ValueError for another: its levels, or the sign of its time, may mean something else.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"{name} is not understood as the clock of a flow. Use pipe.scheduler = "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config), if the network says velocities."
        )
    defaults = inspect.signature(type(scheduler).__init__).parameters
    for key in defaults.keys() & scheduler.config.keys() - {*FLOW_LEVELS}:
        if scheduler.config[key] != defaults[key].default:
            raise ValueError(
                f"the scheduler ({name}) has {key}={scheduler.config[key]!r}, which this policy's steps would not "
                f"hear. Use {name}.from_config(scheduler.config, {key}={defaults[key].default!r}); a pipeline's "
                "scheduler is pipe.scheduler, and the new one goes there."
            )
    if scheduler.config.num_train_timesteps != 1000:
        raise ValueError(
            f"the scheduler ({name}) has num_train_timesteps={scheduler.config.num_train_timesteps}; flow networks "
            f"take 1000 t. Use {name}.from_config(scheduler.config, num_train_timesteps=1000)."
        )
    return scheduler


def check_flow_pipeline(pipe) -> None:
    """Raises ValueError for what is no text-to-image pipeline of a flow: Stable Diffusion 3, FLUX."""
    name, parts = type(pipe).__name__, getattr(pipe, "components", {})
    missing = [part for part in ("transformer", "vae", "scheduler", "tokenizer") if getattr(pipe, part, None) is None]
    if missing or type(pipe.transformer).__name__ not in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        has = f"it has no {', '.join(missing)}" if missing else f"its network is a {type(pipe.transformer).__name__}"
        raise ValueError(
            f"cannot wrap {name}: {has}. Expected a StableDiffusion3Pipeline or a FluxPipeline, or build "
            "FlowPolicy(network, scheduler, ...) by hand; of a UNet with noise levels, DiffusionPolicy.from_pipeline."
        )
    other = [part for part, module in parts.items() if part not in FLOW_COMPONENTS and module is not None]
    if other:
        raise ValueError(f"cannot wrap {name}: its {other[0]} would not be heard. Wrap the text-to-image pipeline.")
    transformer = pipe.transformer.config
    latent, packed = pipe.vae.config.latent_channels, 4 if hasattr(pipe, "_pack_latents") else 1
    if (
        transformer.in_channels != packed * latent
        or (transformer.out_channels or transformer.in_channels) != packed * latent
    ):
        raise ValueError(
            f"cannot wrap {name}: its transformer takes {transformer.in_channels} channels, its VAE gives {latent}"
            f"{' in packs of 4' if packed == 4 else ''}. Inpainting and control networks need extra channels in every "
            "call; use a text-to-image one."
        )


def _check_trained_for(scheduler, names: list[str], kind: type) -> None:
    if not any(name in (*FAMILY, kind.__name__) for name in names):
        remedy = f"Use a network that was trained with a {FAMILY[0]}'s levels."
        if hasattr(scheduler, "alphas_cumprod"):
            remedy = f"If the network is none of its own family's: {repair(kind)}"
        raise ValueError(
            f"{names[0]} is not understood: its levels, or what its network says, are not a {kind.__name__}'s. {remedy}"
        )
    for name, accepted in TRAINED_FOR.items():
        if (value := scheduler.config.get(name, accepted[0])) not in accepted:
            raise ValueError(
                f"the scheduler ({names[0]}) has {name}={value!r}: its network says, or is asked, what no "
                f"{kind.__name__} knows. Use a network with {name} among {', '.join(map(repr, accepted))}."
            )


def repair(kind: type, **changes) -> str:
    """The call that makes a scheduler which is understood; what only the other family knows, it drops by itself."""
    known = inspect.signature(kind.__init__).parameters
    changes = {"clip_sample": False} | {name: value for name, value in changes.items() if name in known}
    said = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    return (
        f"Use {kind.__name__}.from_config(scheduler.config, {said}); a pipeline's scheduler is pipe.scheduler, and "
        "the new one goes there."
    )


def refuse_zero_signal(alpha_bar: Tensor, timesteps: Tensor, prediction_type: str, kind: type) -> None:
    """Raises ValueError where noise is predicted from nothing but noise: denoised would be x_t - noise over 0."""
    zero = timesteps[alpha_bar[timesteps] == 0].tolist()
    if zero and prediction_type == "epsilon":
        raise ValueError(
            f"alpha_bar is 0 at timestep {zero[0]} (rescale_betas_zero_snr=True), where a network that predicts the "
            "noise says nothing of x_0: every log-probability would be nan. "
            f"{repair(kind, rescale_betas_zero_snr=False)} Or set prediction_type, if the network predicts v."
        )


def check_pipeline(pipe) -> None:
    """Raises ValueError for what is neither text-to-image with a UNet and an autoencoder, nor a UNet alone."""
    name = type(pipe).__name__
    needed = ("unet", "scheduler") if unconditional(pipe) else ("unet", "vae", "scheduler", "tokenizer")
    missing = [part for part in needed if getattr(pipe, part, None) is None]
    if missing or not (unconditional(pipe) or hasattr(pipe, "encode_prompt")):
        hint = " It has a transformer: for a flow, FlowPolicy.from_pipeline." if hasattr(pipe, "transformer") else ""
        raise ValueError(
            f"cannot wrap {name}: it has no {', '.join(missing) or 'encode_prompt'}.{hint} Expected "
            "a pipeline like StableDiffusionPipeline, or build DiffusionPolicy(network, scheduler, ...) by hand."
        )
    other = [part for part, module in pipe.components.items() if part not in COMPONENTS and module is not None]
    if other:
        raise ValueError(
            f"cannot wrap {name}: its {other[0]} would not be heard. Wrap the text-to-image pipeline of the same UNet: "
            "StableDiffusionPipeline.from_pipe(pipe), or that of your model."
        )
    config = pipe.unet.config
    if not unconditional(pipe) and config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"cannot wrap {name}: its UNet takes {config.in_channels} channels, its VAE gives "
            f"{pipe.vae.config.latent_channels}. "
            "Inpainting and image-conditioned UNets need extra channels in every call; use a text-to-image one."
        )
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"cannot wrap {name}: its UNet takes {config.in_channels} channels and gives {config.out_channels}. One "
            "that also learned the variance is not understood; use one that predicts a mean alone."
        )
    _check_conditions(pipe)


def unconditional(pipe) -> bool:
    """A pipeline of a UNet and a scheduler alone: DDPMPipeline, DDIMPipeline."""
    return set(pipe.components) == {"unet", "scheduler"}


def _check_conditions(pipe) -> None:
    """Raises ValueError for what a UNet wants in every call and its pipeline's prompts do not give."""
    config, name = pipe.unet.config, type(pipe.unet).__name__
    accepted = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
        "addition_embed_type": ("text_time",) if hasattr(pipe, "text_encoder_2") else (None,),
        "attention_type": ("default",),
    }
    for key, values in accepted.items():
        if (value := config.get(key, values[0])) not in values:
            remedy = (
                "An adapter for pictures was loaded: call pipe.unload_ip_adapter()."
                if value == "ip_image_proj"
                else f"Build the policy by hand, with an encoder that gives it: DiffusionPolicy({name.lower()}, "
                "scheduler, encoder=..., decoder=...), or class_names=... for classes."
            )
            raise ValueError(
                f"cannot wrap {type(pipe).__name__}: its {name} has {key}={value!r}, a condition that no prompt gives. "
                + remedy
            )


def refuse_half(parameters: list[torch.nn.Parameter]) -> None:
    """Raises ValueError for trainable weights in half precision: updates below 2^-11 of a weight would be lost."""
    half = [p.dtype for p in parameters if torch.promote_types(p.dtype, torch.float32) != p.dtype]
    if half:
        raise ValueError(
            f"what trains is in {half[0]}: small updates would be rounded away, and Adam's eps is 0 in float16. Train "
            "an adapter (policy.add_lora() keeps it in float32), or load the pipeline in float32, or call "
            "pipe.to(torch.float32) before; peft.functional.cast_adapter_dtype(network, name) casts your own adapter."
        )
