"""`minialign run`: a method in a world, what was measured before and after, and the folder that it leaves."""

import csv
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

from minialign.methods import CATALOGUE
from minialign.prepare import (
    Chosen,
    UserError,
    choose_rewards,
    find_method,
    policy_kind,
    ready_world,
    settings,
    training,
)


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


# The folder -----------------------------------------------------------------------------------------------------------


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


# The run --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What to run, as plain data: what run.json holds, the folder, and whether there is something to go on with."""

    method: str
    world: str
    seed: int
    reward: str | None
    world_settings: dict
    config: dict
    loop_config: dict | None
    folder: Path
    resumed: bool = False

    def description(self) -> dict:
        found = {k: v for k, v in vars(self).items() if k not in ("folder", "resumed")}
        return {k: v for k, v in found.items() if k != "loop_config" or v is not None}

    def chosen(self) -> Chosen:
        """The settings as they were chosen."""
        method = CATALOGUE[self.method]
        config = method.module.Config(**from_json(self.config))
        loop = method.loop and CATALOGUE[method.loop].module.Config(**from_json(self.loop_config))
        return Chosen(self.world_settings, config, loop)


def from_json(fields: dict) -> dict:
    """JSON has no tuples; a Config has no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def prepare(args) -> Plan:
    """From the command line, or from the folder that --resume names."""
    if args.resume:
        return resumed(Path(args.resume), args.steps)
    if args.method is None:
        raise UserError(f"which method? One of: {', '.join(CATALOGUE)}.")
    method = find_method(args.method)
    world = args.world or method.world
    policy_kind(method, world)  # raises, before anything is loaded
    chosen = settings(method, world, args.set, args.steps)
    folder = Path(args.out) if args.out else free_folder(f"{args.method}-{world}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} already holds {'a run' if (folder / 'run.json').exists() else 'files'}. "
            f"Go on with `minialign run --resume {folder}`, or choose another --out."
        )
    loop_config = chosen.loop and dataclasses.asdict(chosen.loop)
    config = dataclasses.asdict(chosen.config)
    return Plan(method.name, world, args.seed, args.reward, chosen.world, config, loop_config, folder)


def resumed(folder: Path, steps: int | None) -> Plan:
    if not (folder / "run.json").exists():
        raise UserError(f"{folder} holds no run to resume (no run.json).")
    plan = Plan(**({"loop_config": None} | json.loads((folder / "run.json").read_text())), folder=folder, resumed=True)
    if not (folder / "checkpoint.safetensors").exists():
        raise UserError(f"{folder} holds nothing to go on with: {plan.method} trains nothing.")
    if steps is not None:
        (plan.loop_config or plan.config)["num_iterations"] = steps
    return plan


def make_trial(plan: Plan):
    """The method's own trial in the world, or that of a policy trained on rewards."""
    from minialign import evaluate

    method, chosen = find_method(plan.method), plan.chosen()
    world = ready_world(method, plan.world, chosen)
    if hasattr(method.module, "trial"):
        if plan.reward:
            raise UserError(f"{method.name} takes no reward: leave --reward out.")
        return method.module.trial(world, chosen.config, plan.seed)
    rewards = choose_rewards(method, world, plan.reward)
    plan.reward = ",".join(rewards)
    steps = training(method, chosen, world, list(rewards.values()), plan.seed)
    total = (chosen.loop or chosen.config).num_iterations
    return evaluate.policy_trial(world, rewards, plan.seed, steps, total, shaped=method.loop is not None)


def start_folder(plan: Plan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / "run.json").write_text(json.dumps(plan.description(), indent=2))


def train(plan: Plan, trial, progress: bool) -> tuple[list[dict], bool]:
    """The training loop with its records on disk. Returns the metrics' rows, and whether it was interrupted."""
    import torch

    from minialign import loop

    resume, rows = None, []
    if plan.resumed:
        resume = loop.load_checkpoint(plan.folder / "checkpoint.safetensors")
        rows = read_metrics(plan.folder / "metrics.csv")[: int(resume["count.number"])]
    saved = time.monotonic()
    steps = trial.steps(torch.Generator().manual_seed(plan.seed), resume)
    with Interrupts() as interrupts:
        for step in loop.watch(steps, trial.total, progress, initial=len(rows)):
            if not plan.folder.exists() or not rows:  # nothing is left behind if the first iteration fails
                start_folder(plan)
            rows.append(step.row())
            last = interrupts.asked or step.number + 1 == trial.total
            if last or len(rows) == 1 or time.monotonic() - saved > 10:
                loop.save_checkpoint(step.checkpoint(), plan.folder / "checkpoint.safetensors")
                write_metrics(rows, plan.folder / "metrics.csv")
                saved = time.monotonic()
            if interrupts.asked:
                break
    return rows, len(rows) < trial.total


# The report -----------------------------------------------------------------------------------------------------------

COSTS = ("network_evaluations", "reward_queries", "labels", "comparisons", "environment_steps")


def costs(rows: list[dict], trial) -> dict[str, int]:
    """Totals at the end of training: network evaluations, reward queries, and what else the method counts."""
    if trial.steps is None:
        return {}
    last = rows[-1] if rows else dict.fromkeys(COSTS[:2], 0)
    return {name: int(last[name]) for name in COSTS if name in last}


def report(plan: Plan, trial, rows: list[dict], before: dict, after: dict, seconds: float, interrupted: bool) -> dict:
    """Writes summary.json, the pictures and what was trained; prints the table. Returns the summary."""
    numbers = [name for name in trial.labels if name in before]
    summary = plan.description() | {
        "before": {k: before[k] for k in numbers},
        "after": {k: after[k] for k in numbers},
        **oracle_gain(before, after),
        "iterations": len(rows), "interrupted": interrupted, "seconds": round(seconds, 1), **costs(rows, trial),
    }  # fmt: skip
    trial.save(plan.folder)
    trial.draw(before, after, rows, plan.folder, title_of(summary))
    (plan.folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print_table(summary, trial, plan.folder)
    return summary


def oracle_gain(before: dict, after: dict) -> dict:
    """Of samples drawn from the same noise, where the trial has drawn some for training."""
    from minialign.measure import paired_difference

    if "oracle_scores" not in before or "oracle" not in before:
        return {}
    mean, standard_error = paired_difference(after["oracle_scores"], before["oracle_scores"])[:2]
    samples = len(before["oracle_scores"])
    return {"oracle_gain": {"mean": mean, "standard_error": standard_error, "samples": samples}}


def title_of(summary: dict) -> str:
    title = f"{summary['method']} on {summary['world']}"
    if summary["reward"] is None:
        return title
    return f"{title}, reward {summary['reward']!r}: {summary['reward_queries']:,} queries"


def print_table(summary: dict, trial, folder: Path) -> None:
    reward = f", reward {summary['reward']!r}" if summary["reward"] else ""
    print(f"\n{summary['method']} on {summary['world']}, seed {summary['seed']}{reward}")
    print(f"{'':28}{trial.columns[0]:>10}{trial.columns[1]:>10}{'change':>10}")
    for name, old in summary["before"].items():
        new = summary["after"][name]
        print(f"{trial.labels[name]:28}{old:10.3f}{new:10.3f}{new - old:+10.3f}")
    if "oracle_gain" in summary:
        gain = summary["oracle_gain"]
        print(
            f"oracle gain {gain['mean']:+.3f} +- {gain['standard_error']:.3f} "
            f"(standard error, {gain['samples']} samples, same noise)"
        )
    spent = [f"{summary[name]:,} {name.replace('_', ' ')}" for name in COSTS if summary.get(name)]
    print(", ".join([*spent, f"{summary['seconds']:.0f} s", *(["interrupted"] if summary["interrupted"] else [])]))
    print(f"saved in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def command_run(args) -> int:
    started = time.monotonic()
    plan = prepare(args)
    trial = make_trial(plan)
    before, rows, interrupted = trial.before(), [], False
    if trial.steps is not None:
        rows, interrupted = train(plan, trial, progress=not args.quiet)
    after = trial.after()
    start_folder(plan)
    report(plan, trial, rows, before, after, time.monotonic() - started, interrupted)
    if interrupted:
        print(f"go on with: minialign run --resume {plan.folder}")
    return 130 if interrupted else 0
