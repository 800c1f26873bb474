"""The command line: `minialign run | pretrain | replicate | bench | course`.

`run` trains a world's base model with a method and leaves in its folder: summary.json, metrics.csv, before_after.png,
curves.png, the adapter in the format that diffusers loads, and checkpoint.safetensors with run.json, from which
`--resume` goes on to the same numbers as an uninterrupted run.
"""

import argparse
import csv
import dataclasses
import difflib
import importlib
import json
import signal
import sys
import time
from pathlib import Path

METHODS = ("ddpo", "b2diffurl", "rlcm", "rwr")
REPOSITORY = Path(__file__).parent.parent

# What each world needs to be trained in a minute or two on two cores: the sampler, the adapter, the method's settings.
# Everything else is the method's own default; every field can be overridden with --set.
WORLDS = {
    "shapes": dict(num_steps=6, lora_rank=16),
    "digits": dict(num_steps=10, lora_rank=16),
    "compass": dict(num_steps=20),
    "ring": dict(num_steps=20),
    "line": dict(num_steps=20),
}
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
    ("rwr", "shapes"): dict(num_iterations=5, batch_size=1024, num_updates=60, minibatch_size=128),
    ("rwr", "digits"): dict(num_iterations=5, batch_size=1024, num_updates=60, minibatch_size=128),
}
WEIGHTS_MADE_BY = {
    "assistant": "minialign.worlds.pretrain_tokens",
    "digits": "minialign.worlds.pretrain_digits",
    "digits_edm": "minialign.worlds.pretrain_edm",
    "patches": "minialign.worlds.pretrain_edm",
    "shapes": "minialign.worlds.pretrain_shapes",
    "shapes_lcm": "minialign.pretrain_consistency",
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


class UserError(Exception):
    """What the user can mend: printed without a traceback, exit code 2."""


def nearest(kind: str, name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r};{hint} There are: {', '.join(sorted(known))}."


# -------------------------------------------------------------------------------- settings


def parse_value(field: str, text: str, default, annotation):
    """`text` as the type of the field's default (or annotation, where that is None)."""
    if text.lower() in ("none", "null") and "None" in str(annotation):
        return None
    kind = float if default is None else type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(
            f"--set {field}={text}: expected {'true or false' if kind is bool else kind.__name__}."
        ) from None


def settings(method: str, world: str, assignments: list[str], steps: int | None) -> tuple[dict, object]:
    """(world settings, the method's Config) from the recipe and the user's --set and --steps. Raises UserError."""
    module = importlib.import_module(f"minialign.methods.{method}")
    fields = {f.name: f for f in dataclasses.fields(module.Config)}
    world_settings = dict(eta=1.0, guidance_scale=1.0, lora_rank=16) | WORLDS[world]
    if method in CONSISTENCY:
        world_settings = {k: v for k, v in world_settings.items() if k != "eta"} | CALLS.get(world, dict(num_steps=4))
    chosen = dict(RECIPES.get((method, world), {}))
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment}: expected field=value.")
        if name in fields:
            chosen[name] = parse_value(name, text, fields[name].default, fields[name].type)
        elif name in world_settings:
            world_settings[name] = parse_value(name, text, world_settings[name], None)
        else:
            raise UserError(nearest("field", name, [*fields, *world_settings]))
    if steps is not None:
        chosen["num_iterations"] = steps
    return world_settings, module.Config(**chosen)


def load_world(name: str, world_settings: dict, method: str = "ddpo"):
    """The world with its policy ready to train: a LoRA adapter, or the residual of an exact world."""
    from minialign import worlds
    from minialign.policies.diffusion import EVERYWHERE

    if method in CONSISTENCY:
        return load_consistency_world(name, world_settings)
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
        return world.extras.get("encode", lambda samples: samples)(samples), prompts

    config = consistency_distillation.Config(**DISTILLATIONS[name])
    print(f"distilling a consistency model of {name} ({config.num_iterations} updates) ...", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    loop.fit(consistency_distillation.train(student, world.policy, data, config, generator), progress=False)
    if hasattr(student.network, "reference_forward"):
        student.train_all_weights()
    else:
        student.add_lora(rank=world_settings["lora_rank"], target_modules=EVERYWHERE)
    world.policy = student
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


def evaluate(world, reward, seed: int) -> dict:
    """Samples for the world's prompts from fixed noise, and what they score. Costs are not charged to training."""
    import torch

    from minialign import measure
    from minialign.rewards import checked

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
        held_out = world.extras.get("held_out", [])
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
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read_metrics(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


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
    if args.world not in WORLDS:
        raise UserError(nearest("world", args.world, WORLDS))
    world_settings, config = settings(args.method, args.world, args.set, args.steps)
    folder = Path(args.out) if args.out else free_folder(f"{args.method}-{args.world}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} already holds {'a run' if (folder / 'run.json').exists() else 'files'}. "
            f"Go on with `minialign run --resume {folder}`, or choose another --out."
        )
    return dict(
        method=args.method, world=args.world, seed=args.seed, reward=args.reward, world_settings=world_settings,
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
    if before["samples"].ndim == 4:
        title = f"{run['method']} on {run['world']}, reward {run['reward']!r}: {costs['reward_queries']:,} queries"
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
    for name in summary["before"]:
        old, new = summary["before"][name], summary["after"][name]
        print(f"{LABELS[name]:28}{old:10.3f}{new:10.3f}{new - old:+10.3f}")
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


# -------------------------------------------------------------------------------- pretrain, replicate, bench, course


def command_pretrain(args) -> int:
    if args.name not in WEIGHTS_MADE_BY:
        raise UserError(nearest("set of weights", args.name, WEIGHTS_MADE_BY))
    from minialign.worlds.base import WEIGHTS

    out = Path(args.out) if args.out else WEIGHTS / args.name
    module = WEIGHTS_MADE_BY[args.name]
    which = {"name": args.name} if list(WEIGHTS_MADE_BY.values()).count(module) > 1 else {}
    importlib.import_module(module).main(out, seed=args.seed, **which)
    return 0


def claims() -> dict[str, Path]:
    folder = REPOSITORY / "tests" / "claims"
    found = {path.stem.removeprefix("claim_"): path for path in folder.glob("claim_*.py")}
    if not found:
        raise UserError(
            "replications live in the repository's tests/claims: run this from an editable install of a clone."
        )
    return found


def command_replicate(args) -> int:
    found = claims()
    if args.table:
        write_table(found)
        return 0
    if args.name not in found:
        raise UserError(nearest("replication", str(args.name), found))
    sys.path.insert(0, str(found[args.name].parent))  # its worker processes import it by name, too
    verdict = importlib.import_module(f"claim_{args.name}").replicate()
    for bar in verdict["bars"]:
        mark = "pass" if bar["passed"] else "FAIL" if bar.get("claimed", True) else "no  "
        print(f"{mark}  {bar['id']}: {bar['value']:.4g} (bar {bar['threshold']})")
    print(f"{args.name}: {verdict['verdict']}, {verdict['seeds']} seeds")
    if args.out:
        Path(args.out).write_text(json.dumps(verdict, indent=2))
    return 0 if verdict["verdict"] == "replicates" else 1


def write_table(found: dict[str, Path]) -> None:
    """Rewrites the README's table of results from the stored verdicts in tests/claims/results."""
    lines = ["| paper | claim in miniature | measured | bar | verdict |", "|---|---|---|---|---|"]
    for name in sorted(found):
        stored = found[name].parent / "results" / f"{name}.json"
        if stored.exists():
            verdict = json.loads(stored.read_text())
            for bar in verdict["bars"]:
                measured = bar.get("text", format(bar["value"], ".4g"))
                mark = "replicates" if bar["passed"] else "does not replicate"
                lines.append(f"| {verdict['name']} | {bar['id']} | {measured} | {bar['threshold']} | {mark} |")
    readme = REPOSITORY / "README.md"
    head, rest = readme.read_text().split("<!-- results -->\n", 1)
    _, tail = rest.split("<!-- /results -->", 1)
    readme.write_text(head + "<!-- results -->\n" + "\n".join(lines) + "\n<!-- /results -->" + tail)
    print("\n".join(lines))


def floor_seconds(policy, forward: list[int], backward: list[int], prompts: list[str]) -> float:
    """Bare network passes: forward ones of so many rows each, then passes of so many rows forward and backward."""
    import torch

    condition = policy.encode([prompts[i % len(prompts)] for i in range(max(forward + backward))])
    inputs = {k: v for k, v in condition.tensors.items() if not k.startswith("unconditional.")}
    states, parameters = policy.draw_noise(len(condition))[:, 0], policy.parameters()
    timesteps = policy.timesteps[:1].expand(len(condition))

    def call(rows: int):
        output = policy.network(states[:rows], timesteps[:rows], **{k: v[:rows] for k, v in inputs.items()})
        return getattr(output, "sample", output)

    started = time.perf_counter()
    with torch.no_grad():
        for rows in forward:
            call(rows)
    for rows in backward:
        call(rows).sum().backward()
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    for p in parameters:
        p.grad = None
    return elapsed


def ddpo_passes(policy, config, metrics: dict) -> tuple[list[int], list[int]]:
    """What a DDPO round cannot do without: S forward passes, and forward and backward passes of all its states."""
    rows = config.num_prompts * config.group_size
    passes = range(0, policy.num_steps, config.steps_per_pass)
    backward = [rows * min(config.steps_per_pass, policy.num_steps - first) for first in passes]
    return [rows] * policy.num_steps, backward * config.num_epochs


def b2diffurl_passes(policy, config, metrics: dict) -> tuple[list[int], list[int]]:
    """Prefixes once, branches b times, and the window of the images that this stage kept."""
    window, kept = int(metrics["window"]), int(metrics["kept_positive"] + metrics["kept_negative"])
    branches = config.num_prompts * config.num_branches
    forward = [config.num_prompts] * (policy.num_steps - window) + [branches] * window
    passes = range(0, window, config.steps_per_pass)
    return forward, [kept * min(config.steps_per_pass, window - first) for first in passes] * config.num_epochs


def rlcm_passes(policy, config, metrics: dict) -> tuple[list[int], list[int]]:
    """H calls of the round's rows, and forward and backward passes of its H - 1 transitions, minibatch by minibatch."""
    rows, actions = config.num_prompts * config.group_size, policy.num_steps - (config.terminal_std == 0)
    actions = min(actions, config.trained_actions or actions)
    return [rows] * policy.num_steps, [rows // config.num_minibatches * actions] * config.num_minibatches


PASSES = {"ddpo": ddpo_passes, "b2diffurl": b2diffurl_passes, "rlcm": rlcm_passes}


def bench_row(method_name: str, world_name: str, rounds: int, device: str) -> dict:
    """A method's step beside its floor, alternating, so that a slow moment of the machine touches both; medians."""
    import statistics

    import torch

    method = importlib.import_module(f"minialign.methods.{method_name}")
    world_settings, config = settings(method_name, world_name, [], rounds + 1)
    world = load_world(world_name, world_settings, method_name)
    if device != "cpu":
        world.policy.to(device)

    def free_reward(samples, prompts):
        return samples.float().flatten(1).mean(1)

    measured, floors = [], []
    for step in method.train(world.policy, free_reward, world.prompts, config, torch.Generator().manual_seed(0)):
        floor = floor_seconds(world.policy, *PASSES[method_name](world.policy, config, step.metrics), world.prompts)
        if step.number:  # the first round warms up
            measured.append(step.seconds)
            floors.append(floor)
    step_seconds, floor = statistics.median(measured), statistics.median(floors)
    return dict(
        method=method_name, world=world_name, device=device, step_seconds=round(step_seconds, 4),
        floor_seconds=round(floor, 4), ratio=round(step_seconds / floor, 3),
    )  # fmt: skip


def teleport_row(device: str, dim: int = 64 * 64 * 3, rank: int = 512, num_images: int = 2000, batch: int = 64) -> dict:
    """Seconds for the statistics of `num_images` images and for the jump of a batch; memory beside the data's own."""
    import resource

    import torch

    from minialign.methods.teleport import Gaussian

    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(num_images, dim, generator=generator) * torch.linspace(3, 0.01, dim)).to(device)
    noise = torch.randn(batch, dim, generator=generator).to(device)
    peak, laps = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.perf_counter()]
    statistics = Gaussian.fit(data, rank)
    laps.append(time.perf_counter())
    statistics.flow(80 * noise, 80.0, 5.0).cpu()
    laps.append(time.perf_counter())
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / data.nbytes
    return dict(
        method="teleport", dim=dim, rank=rank, num_images=num_images, batch=batch, device=device,
        statistics_seconds=round(laps[1] - laps[0], 3), jump_seconds=round(laps[2] - laps[1], 4),
        memory_over_data=round(more, 2),
    )  # fmt: skip


def command_bench(args) -> int:
    rows = []
    for method in args.methods:
        if method == "teleport":  # no training step: the statistics and the jump
            rows.append(teleport_row(args.device))
            print("teleport, {dim} dimensions, rank {rank} ({device}): statistics of {num_images} images "
                  "{statistics_seconds} s, jump of {batch} {jump_seconds} s, memory {memory_over_data} times the data"
                  .format(**rows[-1]))  # fmt: skip
            continue
        if method not in PASSES:
            raise UserError(nearest("method to measure", method, [*PASSES, "teleport"]))
        for name in args.worlds:
            if name not in WORLDS:
                raise UserError(nearest("world", name, WORLDS))
            rows.append(bench_row(method, name, args.rounds, args.device))
            print(
                "{method} on {world} ({device}): step {step_seconds} s, floor {floor_seconds} s, ratio {ratio}".format(
                    **rows[-1]
                )
            )
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=2))
    return 0


def command_course(args) -> int:
    from minialign.course import build

    solutions, notebooks = REPOSITORY / "solutions", REPOSITORY / "notebooks"
    if not solutions.exists():
        raise UserError(
            "the chapters live in the repository's solutions/: run this from an editable install of a clone."
        )
    build.build_all(solutions, notebooks, execute=not args.no_execute, only=args.only)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="minialign", description="Reward alignment of generative models, one paper a file."
    )
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train a world's base model with a method")
    run.add_argument("method", nargs="?", help=", ".join(METHODS))
    run.add_argument("--world", default="shapes", help=", ".join(WORLDS))
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--steps", type=int, help="iterations of the method")
    run.add_argument("--reward", help="one of the world's rewards, or package.module:function")
    run.add_argument("--out", help="folder for the results (default: a new one under runs/)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the method's Config, or of the sampler",
    )
    run.add_argument("--resume", metavar="DIR", help="go on with an interrupted run")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.set_defaults(function=command_run)

    pretrain = commands.add_parser("pretrain", help="remake shipped weights")
    pretrain.add_argument("name", help=", ".join(WEIGHTS_MADE_BY))
    pretrain.add_argument("--out", help="folder (default: the shipped one)")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(function=command_pretrain)

    replicate = commands.add_parser("replicate", help="check a paper's claims in miniature")
    replicate.add_argument("name", nargs="?")
    replicate.add_argument("--out", help="store the verdict as JSON")
    replicate.add_argument("--table", action="store_true", help="rewrite the README's table from the stored verdicts")
    replicate.set_defaults(function=command_replicate)

    bench = commands.add_parser("bench", help="a method's step beside the bare network passes it cannot avoid")
    bench.add_argument("--methods", nargs="+", default=[*PASSES, "teleport"], help=", ".join([*PASSES, "teleport"]))
    bench.add_argument("--worlds", nargs="+", default=["shapes", "digits"])
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--out", help="store the rows as JSON")
    bench.set_defaults(function=command_bench)

    course = commands.add_parser("course", help="make the student's edition of the chapters")
    course.add_argument("action", choices=["build"])
    course.add_argument("--only", help="one chapter, by number or name")
    course.add_argument("--no-execute", action="store_true", help="leave the student's edition without outputs")
    course.set_defaults(function=command_course)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.function(args)
    except (UserError, ValueError, FileNotFoundError) as error:
        print(f"minialign {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minialign {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
