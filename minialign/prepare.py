"""From names on a command line to a world, a policy that is ready, and settings; and the errors on the way."""

import dataclasses
import difflib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minialign import recipes
from minialign.methods import CATALOGUE, Method
from minialign.settings import Count, Fraction, Natural, NonNegative, Positive, annotations, parse


class UserError(Exception):
    """What the user can mend: printed without a traceback, exit code 2."""


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r};{hint} There are: {', '.join(known)}."


# What there is --------------------------------------------------------------------------------------------------------


def find_method(name: str) -> Method:
    if name not in CATALOGUE:
        raise UserError(nearest("method", name, CATALOGUE))
    return CATALOGUE[name]


def worlds_of(method: Method) -> list[str]:
    """Where it runs: in worlds with its kind of policy; if it does not just train one, in those with its recipe."""
    return [
        world
        for world, kinds in recipes.WORLDS.items()
        if set(method.policies) & set(kinds) and (trains_in(method, world) or (method.name, world) in recipes.RECIPES)
    ]


def trains_in(method: Method, world: str) -> bool:
    """Whether it needs no more than a policy there, or pairs of its samples."""
    return method.kind == "trains" or (method.kind == "learns from pairs" and world in recipes.PAIRS)


def policy_kind(method: Method, world: str) -> str:
    """The kind of policy that the method takes in that world. Raises UserError where it takes none."""
    if world not in recipes.WORLDS:
        raise UserError(nearest("world", world, recipes.WORLDS))
    if world not in worlds_of(method):
        kinds, fit = " or ".join(method.policies), ", ".join(worlds_of(method))
        raise UserError(f"{method.name} ({method.kind}; {kinds} policies) does not run in world {world!r}: {fit}.")
    return next(kind for kind in method.policies if kind in recipes.WORLDS[world])


# Settings -------------------------------------------------------------------------------------------------------------


# How a world's policy is sampled and what it trains; the methods' own settings check themselves.
WORLD_SETTINGS = {
    "num_steps": Count,
    "eta": Fraction,
    "noise_level": NonNegative,
    "guidance_scale": NonNegative,
    "lora_rank": Natural,
    "kind": str,
    "num_pairs": Count,
    "labels": Literal["reward", "bradley_terry"],
    "label_scale": Positive,
}
TRAINABLE_OR_DATA = ("lora_rank", "num_pairs", "labels", "label_scale")  # what says nothing of sampling


class Chosen(NamedTuple):
    """Settings of the world, the method's Config, and that of the loop it runs in, if that is another method's."""

    world: dict[str, Any]
    config: Any
    loop: Any = None


def settings(method: Method, world: str, assignments: list[str], steps: int | None = None) -> Chosen:
    """From the recipe and the user's --set and --steps. Raises UserError."""
    kinds = [method.module.Config, *([CATALOGUE[method.loop].module.Config] if method.loop else [])]
    fields = {name: annotation for kind in kinds for name, annotation in annotations(kind).items()}
    of_world = dict(recipes.WORLDS[world][policy_kind(method, world)])
    if method.kind == "learns from pairs":
        of_world |= recipes.PAIRS[world]
    chosen = dict(recipes.RECIPES.get((method.name, world), {}))
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment}: expected field=value.")
        if name not in fields and name not in of_world:
            raise UserError(nearest("field", name, [*fields, *of_world]))
        try:
            chosen[name] = parse(text, fields[name] if name in fields else WORLD_SETTINGS[name])
        except ValueError as error:
            raise UserError(f"--set {assignment}: {error}") from None
    if steps is not None:
        if "num_iterations" not in fields:
            raise UserError(f"{method.name} has no num_iterations: see `minialign methods {method.name}` for --set.")
        chosen["num_iterations"] = steps
    of_world |= {name: value for name, value in chosen.items() if name in of_world}
    try:
        configs = [kind(**{k: v for k, v in chosen.items() if k in annotations(kind)}) for kind in kinds]
    except ValueError as error:
        raise UserError(str(error)) from None
    return Chosen(of_world, *configs)


# Worlds and policies --------------------------------------------------------------------------------------------------


def load_world(name: str, kind: str, settings: dict[str, Any]):
    """The world with its policy of that kind, sampled as the settings say; distilled now where it ships none."""
    from minialign import worlds

    sampler = {name: value for name, value in settings.items() if name not in TRAINABLE_OR_DATA}
    if kind == "consistency" and ("consistency_distillation", name) in recipes.RECIPES:
        return distilled_world(name, sampler)
    return worlds.load(name, **sampler, **({"model": kind} if kind in ("consistency", "flow") else {}))


def distilled_world(name: str, sampler: dict[str, Any]):
    """The world with a consistency policy: a student, distilled here and now."""
    import torch

    from minialign import loop, worlds
    from minialign.policies.consistency import ConsistencyPolicy

    world, distillation = worlds.load(name), CATALOGUE["consistency_distillation"]
    student = ConsistencyPolicy.from_diffusion(world.policy, **sampler)
    config = settings(distillation, name, []).config
    print(f"distilling a consistency model of {name} ({config.num_iterations} updates) ...", file=sys.stderr)
    generator, data = torch.Generator().manual_seed(0), distillation.module.states_of(world)
    loop.fit(distillation.module.train(student, world.policy, data, config, generator), progress=False)
    return dataclasses.replace(world, policies={"consistency": lambda: student}, policy_kind="consistency")


def make_trainable(world, settings: dict[str, Any], num_value_heads: int = 0) -> None:
    """A LoRA adapter; where lora_rank is 0, or the world has none, all weights. A critic that stands apart."""
    from minialign.policies.diffusion import EVERYWHERE

    policy, rank = world.policy, settings.get("lora_rank", 0)
    if not rank:
        if not any(p.requires_grad for p in policy.network.parameters()):  # an exact world's residual trains already
            policy.train_all_weights()
    elif hasattr(policy, "generate"):
        policy.add_lora(rank=rank)
    else:
        policy.add_lora(rank=rank, target_modules=EVERYWHERE)
    if num_value_heads and world.critic is not None:
        policy.add_value_heads(num_value_heads, network=world.critic(num_value_heads))
    elif num_value_heads:
        policy.add_value_heads(num_value_heads, own_trunk=True)


def ready_world(method: Method, name: str, chosen: Chosen):
    """The world for a run of the method: loaded, and its policy ready to train if it is what is trained."""
    world = load_world(name, policy_kind(method, name), chosen.world)
    loop = CATALOGUE[method.loop or method.name].module
    if hasattr(loop, "wrap"):
        policy = loop.wrap(world.policy, world.prompts)
        world = dataclasses.replace(world, policies={world.policy_kind: lambda: policy})
    elif hasattr(loop, "train") and (method.kind == "learns a subject" or not hasattr(method.module, "trial")):
        heads = getattr(loop, "num_value_heads", lambda config: 0)(chosen.loop or chosen.config)
        make_trainable(world, chosen.world, heads if hasattr(world.policy, "generate") else 0)
    if world.policy is not None:
        world.policy.network_evaluations = 0
    return world


def labelled(policy, reward: Callable, prompts: list, settings: dict[str, Any], seed: int):
    """What a method that learns from pairs is given: samples of the base model, labelled; the same in a resumed run."""
    import torch

    from minialign import pairs

    labeller = {
        "reward": pairs.by_reward,
        "bradley_terry": partial(pairs.bradley_terry, scale=settings["label_scale"]),
    }[settings["labels"]]
    generator = torch.Generator().manual_seed(40_000 + seed)
    return pairs.draw_pairs(policy, labeller(reward), prompts, settings["num_pairs"], generator)


def training(method: Method, chosen: Chosen, world, rewards: list[Callable], seed: int) -> Callable[..., Iterator]:
    """steps(generator, resume): the method's loop on the world's policy, or the loop of another on its reward."""
    import torch

    policy, module, config = world.policy, method.module, chosen.config
    if len(rewards) != 1 and not method.several_rewards:
        raise UserError(f"{method.name} takes one reward, not {len(rewards)}.")
    reward = rewards if method.several_rewards else rewards[0]
    if method.kind == "learns from pairs":
        pairs = labelled(policy, reward, world.prompts, chosen.world, seed)
        return lambda generator, resume=None: module.train(policy, pairs, config, generator, resume)
    if method.loop:
        sampling = {"num_tokens": world.num_tokens} if hasattr(policy, "generate") else {}
        generator = torch.Generator().manual_seed(30_000 + seed)
        reward = module.shape(policy, reward, world.prompts, config, generator, **sampling)
        module, config = CATALOGUE[method.loop].module, chosen.loop
    return lambda generator, resume=None: module.train(policy, reward, world.prompts, config, generator, resume)


def takes_sets(method: Method, config: Any) -> bool:
    """Whether it is trained on rewards of a set."""
    return getattr(method.module, "takes_sets", lambda config: False)(config)


def choose_rewards(method: Method, world, text: str | None, of_sets: bool = False) -> dict[str, Callable]:
    """The rewards named in `text`, with commas between; those of the recipe, or the world's default, if it is None."""
    if of_sets and text is None and not world.set_rewards:
        raise UserError(
            f"world {world.name!r} has no reward of a set. Give your own, --reward package.module:function, or set "
            "another selection."
        )
    default = next(iter(world.set_rewards)) if of_sets and text is None else world.default_reward
    names = text.split(",") if text is not None else recipes.REWARDS.get((method.name, world.name), (default,))
    return {name: choose_reward(world, name, of_sets) for name in names}


def choose_reward(world, name: str, of_sets: bool = False) -> Callable:
    """One of the world's rewards, or any Python callable given as package.module:function."""
    known = world.set_rewards if of_sets else world.rewards
    if name in known:
        return known[name]() if of_sets else known[name]
    if ":" not in name:
        kind = "reward of a set" if of_sets else "reward"
        raise UserError(nearest(kind, name, known) + " Or give your own as package.module:function.")
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise UserError(f"cannot load the reward {name!r}: {type(error).__name__}: {error}") from None
    if not callable(reward):
        raise UserError(f"the reward {name!r} is {reward!r}; expected a function of (samples, prompts).")
    return reward


# Devices and files ----------------------------------------------------------------------------------------------------


def find_device(name: str) -> str:
    """The name of a device that computes here. Raises UserError for any other."""
    import torch

    try:
        float(torch.zeros(1, device=name))  # meta has no values
        if name.startswith("cpu:"):  # there is one, whatever its number
            raise RuntimeError("it is called cpu")
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"no device {name!r} here ({reason}). There are: {', '.join(there)}.") from None
    return name


def check_writable(path: Path, option: str = "--out") -> None:
    """Raises UserError, before anything is spent, if no file can be made at that path."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; expected a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first.")
    check_takes_files(path.absolute().parent, option)


def check_takes_files(folder: Path, option: str = "--out") -> None:
    """Raises UserError if nothing can be written in that folder, or in what it would be made in."""
    try:
        there = next(part for part in [folder, *folder.absolute().parents] if part.exists())
        if not there.is_dir():
            raise UserError(f"{option} {folder}: {there} is a file; expected a folder.")
        tempfile.TemporaryFile(dir=there).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {option} {folder}: {reason}. Choose another.") from None
