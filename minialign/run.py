"""`minialign run`: a method in a world, what was measured before and after, and the folder that it leaves."""

import dataclasses
import json
import signal
import sys
import time
import warnings
from pathlib import Path

from minialign.folder import (
    CHECKPOINT,
    all_or_nothing,
    check_free,
    clear_leftovers,
    free_folder,
    read_description,
    save_round,
    saved_rows,
    start_folder,
    write_description,
    write_metrics,
    write_timing,
)
from minialign.methods import CATALOGUE
from minialign.prepare import (
    Chosen,
    UserError,
    choose_rewards,
    find_method,
    policy_kind,
    ready_world,
    settings,
    takes_sets,
    training,
)
from minialign.settings import expected, fits


class Interrupts:
    """The first Ctrl-C or SIGTERM asks the loop to stop after this iteration; a second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.previous = [signal.signal(which, self.handle) for which in self.SIGNALS]
        return self

    def __exit__(self, *_):
        for which, handler in zip(self.SIGNALS, self.previous, strict=True):
            signal.signal(which, handler)

    def handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this iteration; Ctrl-C again to stop at once", file=sys.stderr)


# The run --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What to run, as plain data: what run.json holds, the folder, and the rows that are done, None in a new run."""

    method: str
    world: str
    seed: int
    reward: str | None
    world_settings: dict
    config: dict
    loop_config: dict | None
    folder: Path
    rows: list[dict] | None = None

    def description(self) -> dict:
        found = {k: v for k, v in vars(self).items() if k not in ("folder", "rows")}
        return {k: v for k, v in found.items() if k != "loop_config" or v is not None}

    def chosen(self) -> Chosen:
        """The settings as they were chosen."""
        method = CATALOGUE[self.method]
        config = method.module.Config(**from_json(self.config))
        loop = method.loop and CATALOGUE[method.loop].module.Config(**from_json(self.loop_config))
        return Chosen(self.world_settings, config, loop)

    @property
    def iterations(self) -> int | None:
        """How many there are to be; None where nothing is trained."""
        return (self.loop_config or self.config).get("num_iterations")

    def finished(self) -> bool:
        """Whether all its iterations are done and reported."""
        path = self.folder / "summary.json"
        if self.rows is None or not path.exists():
            return False
        try:
            return json.loads(path.read_text()).get("iterations") == len(self.rows) == self.iterations
        except ValueError:  # damaged: it is written anew
            return False


def from_json(fields: dict) -> dict:
    """JSON has no tuples; a Config has no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def prepare(args) -> Plan:
    """From the command line, or from the folder that --resume names."""
    if args.resume is not None:
        return resumed(args)
    if args.method is None:
        raise UserError(f"which method? One of: {', '.join(CATALOGUE)}.")
    method = find_method(args.method)
    world = method.world if args.world is None else args.world
    policy_kind(method, world)  # raises, before anything is loaded
    chosen = settings(method, world, args.set, args.steps)
    folder = args.out or free_folder(f"{args.method}-{world}")
    check_free(folder)
    loop_config = chosen.loop and dataclasses.asdict(chosen.loop)
    config = dataclasses.asdict(chosen.config)
    return Plan(method.name, world, args.seed or 0, args.reward, chosen.world, config, loop_config, folder)


def resumed(args) -> Plan:
    """What run.json asked for, with as many more iterations as --steps says."""
    given = {"METHOD": args.method, "--world": args.world, "--seed": args.seed, "--reward": args.reward}
    given |= {"--out": args.out, "--set": args.set or None}
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--resume goes on with the run's own settings; leave out {name}. Only --steps may change.")
    folder = args.resume
    found = {"loop_config": None} | read_description(folder)
    try:
        for field in dataclasses.fields(Plan):
            if field.name not in ("folder", "rows") and not fits(found.get(field.name), field.type):
                raise ValueError(f"{field.name} is {found.get(field.name)!r}; expected {expected(field.type)}")
        plan = Plan(**found, folder=folder, rows=[])
        policy_kind(find_method(plan.method), plan.world)
        plan.chosen()
    except (TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{folder / 'run.json'} does not describe a run ({error}): put back its own, or start over with another "
            "--out."
        ) from None
    if hasattr(CATALOGUE[plan.method].module, "trial") and not hasattr(CATALOGUE[plan.method].module, "train"):
        raise UserError(f"{folder} holds nothing to go on with: {plan.method} trains nothing.")
    plan.rows = saved_rows(folder, plan.description())
    if args.steps is not None:
        (plan.loop_config or plan.config)["num_iterations"] = args.steps
        plan.chosen()  # checks the number
    if plan.iterations is not None and plan.iterations < len(plan.rows):
        raise UserError(f"{folder} has done {len(plan.rows)} iterations already: --steps {plan.iterations} is fewer.")
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
    of_sets = takes_sets(method, chosen.config)
    rewards = choose_rewards(method, world, plan.reward, of_sets)
    plan.reward = ",".join(rewards)
    steps = training(method, chosen, world, list(rewards.values()), plan.seed)
    total = (chosen.loop or chosen.config).num_iterations
    return evaluate.policy_trial(world, rewards, plan.seed, steps, total, method.loop is not None, of_sets)


def train(plan: Plan, trial, progress: bool) -> tuple[list[dict], bool]:
    """The training loop with its records on disk. Returns the rows, and whether it was interrupted."""
    import torch

    from minialign import loop

    rows, resume = list(plan.rows or ()), None
    if rows:
        resume = loop.load_checkpoint(plan.folder / CHECKPOINT)
        start_folder(plan.folder, plan.description())  # it may be longer now
    saved = time.monotonic()
    steps = trial.steps(torch.Generator().manual_seed(plan.seed), resume)
    with Interrupts() as interrupts, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the checkpoint has done")  # killed before its report: that is what is left
        for step in loop.watch(steps, trial.total, progress, initial=len(rows)):
            if not rows:  # nothing is left behind if the first iteration fails
                start_folder(plan.folder, plan.description())
            rows.append(step.row())
            last = interrupts.asked or step.number + 1 == trial.total
            if last or len(rows) == 1 or time.monotonic() - saved > 10:
                save_round(step.checkpoint(), rows, plan.description(), plan.folder)
                saved = time.monotonic()
                write_tables(rows, plan.folder)
            if interrupts.asked:
                break
    write_tables(rows, plan.folder)
    return rows, len(rows) < trial.total


def write_tables(rows: list[dict], folder: Path) -> None:
    write_metrics(rows, folder / "metrics.csv")
    write_timing(rows, folder / "timing.csv")


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
    with all_or_nothing(plan.folder) as partial:
        write_description(partial, plan.description())
        trial.save(partial)
        trial.draw(before, after, rows, partial, title_of(summary))
        (partial / "summary.json").write_text(json.dumps(summary, indent=2))
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
    if not summary["reward_queries"] and summary.get("comparisons"):
        return f"{title}, labels by {summary['reward']!r}: {summary['comparisons']:,} comparisons"
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
    from safetensors import SafetensorError

    plan = prepare(args)
    if plan.finished():
        clear_leftovers(plan.folder)
        print(f"{plan.folder} is finished: {len(plan.rows)} iterations. For more: --steps {2 * len(plan.rows)}.")
        return 0
    try:
        return run(plan, progress=not args.quiet)
    except (OSError, SafetensorError) as error:
        where = getattr(error, "filename", None) or plan.folder
        begun = (plan.folder / "run.json").exists()
        remedy = f"then: minialign run --resume {plan.folder}" if begun else "then start again"
        raise UserError(
            f"{getattr(error, 'strerror', None) or error} ({where}). What was written before is whole: make room, or "
            f"mend what is wrong there, {remedy}."
        ) from error


def run(plan: Plan, progress: bool) -> int:
    started = time.monotonic()
    trial = make_trial(plan)
    before, rows, interrupted = trial.before(), [], False
    if trial.steps is not None:
        rows, interrupted = train(plan, trial, progress)
    after = trial.after()
    report(plan, trial, rows, before, after, time.monotonic() - started, interrupted)
    if interrupted:
        print(f"go on with: minialign run --resume {plan.folder}")
    return 130 if interrupted else 0
