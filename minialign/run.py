"""`minialign run`: a world's base model trained with a method, and the folder that it leaves."""

import csv
import dataclasses
import difflib
import importlib
import json
import signal
import sys
import time
from pathlib import Path

from minialign.settings import Count, Natural, NonNegative, annotations, parse

METHODS = ("ddpo", "b2diffurl", "rlcm", "rwr", "ppo")

# What each world needs to be trained in a minute or two on two cores: the sampler, the adapter, the method's settings.
# Everything else is the method's own default; every field can be overridden with --set.
WORLDS = {
    "shapes": dict(num_steps=6, lora_rank=16),
    "digits": dict(num_steps=10, lora_rank=16),
    "compass": dict(num_steps=20),
    "ring": dict(num_steps=20),
    "line": dict(num_steps=20),
    "assistant": dict(lora_rank=0),
    "tokens": dict(lora_rank=0),
}
LANGUAGE = ("ppo",)  # methods for language models, and below their worlds
LANGUAGE_WORLDS = ("assistant", "tokens")
CONSISTENCY = ("rlcm",)  # methods for consistency models
CALLS = {"shapes": dict(num_steps=4, guidance_scale=2.5)}  # how those are sampled; elsewhere 4 calls without guidance
DISTILLATIONS = {
    "digits": dict(num_iterations=800, batch_size=64, learning_rate=1e-3),
    "compass": dict(num_iterations=4000, batch_size=256),
    "ring": dict(num_iterations=4000, batch_size=256),
    "line": dict(num_iterations=1000, batch_size=256),
}
B2_SMALL = dict(num_prompts=26, num_minibatches=2, num_epochs=1, steps_per_pass=6)
B2_EXACT = dict(
    num_iterations=36, num_prompts=52, first_window=4, clip_range=0.1, learning_rate=1e-2, steps_per_pass=20
)
RECIPES = {
    ("ddpo", "shapes"): dict(num_iterations=50, learning_rate=3e-3, warmup_updates=10, steps_per_pass=6),
    ("ddpo", "digits"): dict(num_iterations=16, learning_rate=1e-3, steps_per_pass=5),
    ("ddpo", "compass"): dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3),
    ("ddpo", "ring"): dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3),
    ("ddpo", "line"): dict(num_iterations=40, num_prompts=256, group_size=1, num_minibatches=4, learning_rate=3e-3),
    # relations are settled by the first steps, so on shapes the window is the whole run; see tests/claims
    ("b2diffurl", "shapes"): B2_SMALL | dict(num_iterations=50, first_window=6, learning_rate=3e-3, warmup_updates=10),
    ("b2diffurl", "digits"): B2_SMALL | dict(num_iterations=32, first_window=4, learning_rate=1e-3),
    ("b2diffurl", "compass"): B2_EXACT | dict(last_window=10),
    ("b2diffurl", "ring"): B2_EXACT,
    ("b2diffurl", "line"): B2_EXACT,
    ("rlcm", "shapes"): dict(num_iterations=36, learning_rate=2e-3, final_lr_fraction=0.1, warmup_updates=20),
    ("rlcm", "digits"): dict(num_iterations=32, learning_rate=1e-3, num_minibatches=2),
    ("rlcm", "compass"): dict(num_iterations=40, num_prompts=256, group_size=1, learning_rate=1e-3, clip_range=0.1),
    ("rlcm", "ring"): dict(num_iterations=40, num_prompts=256, group_size=1, learning_rate=1e-3, clip_range=0.1),
    ("ppo", "assistant"): dict(num_iterations=120, learning_rate=3e-4),
    # plain sums of the rewards to come, whitened over the round, move a table best
    ("ppo", "tokens"): dict(num_iterations=200, num_tokens=4, num_epochs=1, gae_lambda=1.0, learning_rate=0.03),
    ("rwr", "shapes"): dict(num_iterations=5, batch_size=1024, num_updates=60, minibatch_size=128),
    ("rwr", "digits"): dict(num_iterations=5, batch_size=1024, num_updates=60, minibatch_size=128),
}
EVALUATION_SAMPLES = 512
KL_SAMPLES = 64
LABELS = {
    "reward": "reward",
    "oracle": "oracle accuracy",
    "oracle_held_out": "oracle, held-out prompts",
    "diversity": "diversity",
    "kl": "KL to base (nats a path)",
}
LANGUAGE_LABELS = {
    "oracle": "oracle (gold reward)",
    "diversity": "distinct word pairs",
    "kl": "KL to base (nats a response)",
}


class UserError(Exception):
    """What the user can mend: printed without a traceback, exit code 2."""


def nearest(kind: str, name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r};{hint} There are: {', '.join(sorted(known))}."


# -------------------------------------------------------------------------------- settings


# How a world's policy is sampled and what it trains; the methods' own settings check themselves.
WORLD_SETTINGS = {
    "num_steps": Count,
    "eta": NonNegative,
    "guidance_scale": NonNegative,
    "lora_rank": Natural,
}


def parse_value(field: str, text: str, annotation):
    """`text` as what the field holds. Raises UserError."""
    try:
        return parse(text, annotation)
    except ValueError as error:
        raise UserError(f"--set {field}={text}: {error}") from None


def settings(method: str, world: str, assignments: list[str], steps: int | None) -> tuple[dict, object]:
    """(world settings, the method's Config) from the recipe and the user's --set and --steps. Raises UserError."""
    module = importlib.import_module(f"minialign.methods.{method}")
    fields = annotations(module.Config)
    world_settings = dict(eta=1.0, guidance_scale=1.0, lora_rank=16) | WORLDS[world]
    if method in LANGUAGE:
        world_settings = dict(WORLDS[world])
    if method in CONSISTENCY:
        world_settings = {k: v for k, v in world_settings.items() if k != "eta"} | CALLS.get(world, dict(num_steps=4))
    chosen = dict(RECIPES.get((method, world), {}))
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment}: expected field=value.")
        if name in fields:
            chosen[name] = parse_value(name, text, fields[name])
        elif name in world_settings:
            world_settings[name] = parse_value(name, text, WORLD_SETTINGS[name])
        else:
            raise UserError(nearest("field", name, [*fields, *world_settings]))
    if steps is not None:
        chosen["num_iterations"] = steps
    try:
        return world_settings, module.Config(**chosen)
    except ValueError as error:
        raise UserError(str(error)) from None


def load_world(name: str, world_settings: dict, method: str = "ddpo"):
    """The world with its policy ready to train: a LoRA adapter, or the residual of an exact world."""
    from minialign import worlds
    from minialign.policies.diffusion import EVERYWHERE

    if method in CONSISTENCY:
        return load_consistency_world(name, world_settings)
    if method in LANGUAGE:
        return load_language_world(name, world_settings)
    sampler = {k: v for k, v in world_settings.items() if k != "lora_rank"}
    if name in ("compass", "ring", "line"):
        sampler = {k: v for k, v in sampler.items() if k != "guidance_scale"}
    world = worlds.load(name, **sampler)
    if not hasattr(world.policy.network, "reference_forward"):
        world.policy.add_lora(rank=world_settings["lora_rank"], target_modules=EVERYWHERE)
    return world


def load_consistency_world(name: str, world_settings: dict):
    """The world with a consistency policy: the shipped twin of shapes; elsewhere a student, distilled here and now."""
    import torch

    from minialign import loop, worlds
    from minialign.methods import consistency_distillation
    from minialign.policies.consistency import ConsistencyPolicy
    from minialign.policies.diffusion import EVERYWHERE

    num_steps, guidance_scale = world_settings["num_steps"], world_settings["guidance_scale"]
    if name == "shapes":
        world = worlds.load(name, model="consistency", num_steps=num_steps, guidance_scale=guidance_scale)
        world.policy.add_lora(rank=world_settings["lora_rank"], target_modules=EVERYWHERE)
        return world
    world = worlds.load(name)
    student = ConsistencyPolicy.from_diffusion(world.policy, num_steps=num_steps)

    def data(n: int, generator):
        samples, prompts = world.real(n, generator)
        return world.encode(samples), prompts

    config = consistency_distillation.Config(**DISTILLATIONS[name])
    print(f"distilling a consistency model of {name} ({config.num_iterations} updates) ...", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    loop.fit(consistency_distillation.train(student, world.policy, data, config, generator), progress=False)
    if hasattr(student.network, "reference_forward"):
        student.train_all_weights()
    else:
        student.add_lora(rank=world_settings["lora_rank"], target_modules=EVERYWHERE)
    return dataclasses.replace(world, policies={"consistency": lambda: student}, policy_kind="consistency")


def load_language_world(name: str, world_settings: dict):
    """The world with a language policy: all its weights train (lora_rank 0) or an adapter; the critic stands apart."""
    from minialign import worlds

    world = worlds.load(name)
    if world_settings["lora_rank"]:
        world.policy.add_lora(rank=world_settings["lora_rank"])
    else:
        world.policy.train_all_weights()
    if world.critic is not None:
        world.policy.add_value_heads(network=world.critic())
    else:
        world.policy.add_value_heads(own_trunk=True)
    return world


def choose_reward(world, name: str | None):
    """One of the world's rewards, or any Python callable given as package.module:function."""
    name = name or world.default_reward
    if name in world.rewards:
        return name, world.rewards[name]
    if ":" not in name:
        raise UserError(nearest("reward", name, world.rewards) + " Or give your own as package.module:function.")
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return name, getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot load the reward {name!r}: {error}") from None


# -------------------------------------------------------------------------------- run


def evaluate_language(world, reward, seed: int) -> dict:
    """As `evaluate`: answers from fixed noise; diversity is the share of different word pairs among all."""
    import torch

    from minialign import measure
    from minialign.rewards import checked

    policy, spent = world.policy, world.policy.network_evaluations
    generator, num_tokens = torch.Generator().manual_seed(10_000 + seed), world.num_tokens
    prompts = [world.prompts[i % len(world.prompts)] for i in range(EVALUATION_SAMPLES)]
    with torch.no_grad():
        responses = policy.generate(prompts, num_tokens, generator=generator)
        log_ratio = policy.log_probs(responses) - policy.log_probs(responses, reference=True)
        result = {
            "samples": responses.texts,
            "prompts": prompts,
            "oracle_scores": checked(world.oracle, responses.texts, prompts),
            "reward": float(checked(reward, responses.texts, prompts).mean()),
            "diversity": measure.distinct(responses.texts, 2),
            "kl": float(log_ratio.sum(1).mean()),
        }
        held_out = world.held_out
        if held_out:
            prompts = [held_out[i % len(held_out)] for i in range(EVALUATION_SAMPLES)]
            texts = policy.sample(prompts, num_tokens=num_tokens, generator=generator)
            result["oracle_held_out"] = float(checked(world.oracle, texts, prompts).mean())
    result["oracle"] = float(result["oracle_scores"].mean())
    policy.network_evaluations = spent
    return result


def evaluate(world, reward, seed: int) -> dict:
    """Samples for the world's prompts from fixed noise, and what they score. Costs are not charged to training."""
    import torch

    from minialign import measure
    from minialign.rewards import checked

    if world.name in LANGUAGE_WORLDS:
        return evaluate_language(world, reward, seed)
    policy, spent = world.policy, world.policy.network_evaluations
    generator = torch.Generator().manual_seed(10_000 + seed)
    prompts = [world.prompts[i % len(world.prompts)] for i in range(EVALUATION_SAMPLES)]
    with torch.no_grad():
        samples = policy.sample(prompts, policy.draw_noise(len(prompts), generator))
        traj = policy.rollout(prompts[:KL_SAMPLES], policy.draw_noise(KL_SAMPLES, generator))
        result = {
            "samples": samples,
            "prompts": prompts,
            "oracle_scores": checked(world.oracle, samples, prompts),
            "reward": float(checked(reward, samples, prompts).mean()),
            "diversity": float(measure.diversity(samples, prompts, reduction="mean")),
            "kl": float(measure.kl_to_base(policy, traj)),
        }
        held_out = world.held_out
        if held_out:  # prompts that training never sees
            prompts = [held_out[i % len(held_out)] for i in range(EVALUATION_SAMPLES)]
            samples = policy.sample(prompts, policy.draw_noise(len(prompts), generator))
            result["oracle_held_out"] = float(checked(world.oracle, samples, prompts).mean())
    result["oracle"] = float(result["oracle_scores"].mean())
    policy.network_evaluations = spent
    return result


class Interrupts:
    """The first Ctrl-C asks the loop to stop after this iteration; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this iteration; Ctrl-C again to stop at once", file=sys.stderr)


def free_folder(stem: str) -> Path:
    number = 0
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def write_metrics(rows: list[dict], path: Path) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        columns = dict.fromkeys(name for row in rows for name in row)  # some appear later
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read_metrics(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def prepare(args) -> dict:
    """What to run, as plain data: from the command line, or from the folder that --resume names."""
    if args.resume:
        folder = Path(args.resume)
        if not (folder / "run.json").exists():
            raise UserError(f"{folder} holds no run to resume (no run.json).")
        run = json.loads((folder / "run.json").read_text())
        if args.steps is not None:
            run["config"]["num_iterations"] = args.steps
        return run | {"folder": folder, "resumed": True}
    if args.method is None:
        raise UserError(f"which method? One of: {', '.join(METHODS)}.")
    if args.method not in METHODS:
        raise UserError(nearest("method", args.method, METHODS))
    world = args.world or ("assistant" if args.method in LANGUAGE else "shapes")
    if world not in WORLDS:
        raise UserError(nearest("world", world, WORLDS))
    if (args.method in LANGUAGE) != (world in LANGUAGE_WORLDS):
        fit = [name for name in WORLDS if (name in LANGUAGE_WORLDS) == (args.method in LANGUAGE)]
        kind = "language" if args.method in LANGUAGE else "image"
        raise UserError(f"{args.method} trains {kind} models, which world {world!r} has not. It has: {', '.join(fit)}.")
    world_settings, config = settings(args.method, world, args.set, args.steps)
    folder = Path(args.out) if args.out else free_folder(f"{args.method}-{world}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} already holds {'a run' if (folder / 'run.json').exists() else 'files'}. "
            f"Go on with `minialign run --resume {folder}`, or choose another --out."
        )
    return dict(
        method=args.method, world=world, seed=args.seed, reward=args.reward, world_settings=world_settings,
        config=dataclasses.asdict(config), folder=folder, resumed=False,
    )  # fmt: skip


def train(run: dict, world, reward, progress: bool) -> tuple[list[dict], bool]:
    """The training loop with its records on disk. Returns the metrics' rows, and whether it was interrupted."""
    import torch

    from minialign import loop

    method = importlib.import_module(f"minialign.methods.{run['method']}")
    config, folder = method.Config(**run["config"]), run["folder"]
    resume, rows = None, []
    if run["resumed"]:
        resume = loop.load_checkpoint(folder / "checkpoint.safetensors")
        done = int(resume["count.number"])
        rows = read_metrics(folder / "metrics.csv")[:done]
    description = {k: v for k, v in run.items() if k not in ("folder", "resumed")}
    generator = torch.Generator().manual_seed(run["seed"])
    steps = method.train(world.policy, reward, world.prompts, config, generator, resume)
    saved = time.monotonic()
    with Interrupts() as interrupts:
        for step in loop.watch(steps, config.num_iterations, progress, initial=len(rows)):
            if not folder.exists() or not rows:  # nothing is left behind if the first iteration fails
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "run.json").write_text(json.dumps(description, indent=2))
            rows.append(step.row())
            last = interrupts.asked or step.number + 1 == config.num_iterations
            if last or len(rows) == 1 or time.monotonic() - saved > 10:
                loop.save_checkpoint(step.checkpoint(), folder / "checkpoint.safetensors")
                write_metrics(rows, folder / "metrics.csv")
                saved = time.monotonic()
            if interrupts.asked:
                break
    return rows, len(rows) < config.num_iterations


def report(run: dict, world, rows: list[dict], before: dict, after: dict, seconds: float, interrupted: bool) -> dict:
    """Writes summary.json, the two pictures and the adapter; prints the table. Returns the summary."""
    from minialign import show
    from minialign.measure import paired_difference

    folder = run["folder"]
    gain = paired_difference(after["oracle_scores"], before["oracle_scores"])
    costs = {k: int(rows[-1][k]) if rows else 0 for k in ("network_evaluations", "reward_queries")}
    numbers = [name for name in LABELS if name in before]
    summary = {k: run[k] for k in ("method", "world", "seed", "reward", "world_settings", "config")} | {
        "before": {k: before[k] for k in numbers},
        "after": {k: after[k] for k in numbers},
        "oracle_gain": {"mean": gain[0], "standard_error": gain[1], "samples": EVALUATION_SAMPLES},
        "iterations": len(rows), "interrupted": interrupted, "seconds": round(seconds, 1), **costs,
    }  # fmt: skip
    world.policy.save_adapter(folder)
    title = f"{run['method']} on {run['world']}, reward {run['reward']!r}: {costs['reward_queries']:,} queries"
    if run["world"] in LANGUAGE_WORLDS:
        show.before_after_texts(
            before["samples"], after["samples"], before["prompts"], before["oracle_scores"], after["oracle_scores"],
            folder / "before_after.png", title=title, score_name="gold",
        )  # fmt: skip
    elif before["samples"].ndim == 4:
        show.before_after(
            before["samples"], after["samples"], before["prompts"], before["oracle_scores"], after["oracle_scores"],
            folder / "before_after.png", title=title,
        )  # fmt: skip
    else:
        show.save(world.show(after["samples"], after["prompts"]), folder / "before_after.png", "samples after training")
    if rows:
        show.save(curves_figure(rows, before["reward"]), folder / "curves.png", "reward over training")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print_table(summary, folder)
    return summary


def curves_figure(rows: list[dict], baseline: float):
    from minialign import show

    queries = [row["reward_queries"] for row in rows]
    reward = {"reward": [row["reward"] for row in rows]}
    return show.curves(
        reward, queries, xlabel="reward queries", ylabel="mean reward of the round", baseline=baseline,
        title="Reward over training",
    )  # fmt: skip


def print_table(summary: dict, folder: Path) -> None:
    print(f"\n{summary['method']} on {summary['world']}, seed {summary['seed']}, reward {summary['reward']!r}")
    print(f"{'':28}{'before':>10}{'after':>10}{'change':>10}")
    labels = LABELS | (LANGUAGE_LABELS if summary["world"] in LANGUAGE_WORLDS else {})
    for name in summary["before"]:
        old, new = summary["before"][name], summary["after"][name]
        print(f"{labels[name]:28}{old:10.3f}{new:10.3f}{new - old:+10.3f}")
    gain = summary["oracle_gain"]
    print(
        f"oracle gain {gain['mean']:+.3f} +- {gain['standard_error']:.3f} "
        f"(standard error, {gain['samples']} samples, same noise)"
    )
    costs = f"{summary['network_evaluations']:,} network evaluations, {summary['reward_queries']:,} reward queries"
    print(f"{costs}, {summary['seconds']:.0f} s{', interrupted' if summary['interrupted'] else ''}")
    print(f"saved in {folder}: before_after.png, curves.png, summary.json, metrics.csv, the adapter")


def command_run(args) -> int:
    started = time.monotonic()
    run = prepare(args)
    world = load_world(run["world"], run["world_settings"], run["method"])
    run["reward"], reward = choose_reward(world, run["reward"])
    before = evaluate(world, reward, run["seed"])
    world.policy.network_evaluations = 0
    rows, interrupted = train(run, world, reward, progress=not args.quiet)
    after = evaluate(world, reward, run["seed"])
    report(run, world, rows, before, after, time.monotonic() - started, interrupted)
    if interrupted:
        print(f"go on with: minialign run --resume {run['folder']}")
    return 130 if interrupted else 0
