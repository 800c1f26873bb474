"""What every training loop needs and no paper is about.

    Run                  parameters, optimizer, random numbers, a round's rows and sums, costs; checkpoint.py
    Step                 what a method reports of a round; `train(...)` is a generator of them
    fit, watch, History  run one to its end, with a progress bar, and keep the numbers
    own_rows, ...        several processes: processes.py

A method's train() reads from top to bottom like its paper and asks `Run` for the rest, which never calls it back.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minialign.checkpoint import load_checkpoint, pack, save_checkpoint, unpack
from minialign.processes import (
    gather_everything,
    gather_rows,
    names_everywhere,
    num_processes,
    own_rows,
    sum_gradients,
    sum_over_processes,
)
from minialign.rewards import load_states, states, within
from minialign.statistics import key_of

__all__ = [
    "Batch",
    "History",
    "Minibatch",
    "Run",
    "Step",
    "fit",
    "gather_everything",
    "gather_rows",
    "load_checkpoint",
    "num_processes",
    "own_rows",
    "pack",
    "reward_metrics",
    "save_checkpoint",
    "sum_gradients",
    "sum_over_processes",
    "unpack",
    "watch",
]


@dataclass(frozen=True)
class Step:
    """What one iteration of a method reports. Metrics stay tensors until they are printed.

    costs: totals since the start of training, over all processes and resumes: `network_evaluations` and
    `reward_queries`, the two axes on which methods are compared, and whatever else a paper counts (labels,
    comparisons, environment steps). seconds is this iteration's wall time. checkpoint() gives all that resuming needs,
    as named tensors, valid until the generator goes on.
    """

    number: int
    metrics: dict[str, Tensor | float]
    costs: dict[str, int]
    seconds: float
    checkpoint: Callable[[], dict[str, Tensor]] = field(repr=False)

    @property
    def network_evaluations(self) -> int:
        return self.costs["network_evaluations"]

    @property
    def reward_queries(self) -> int:
        return self.costs["reward_queries"]

    def row(self) -> dict[str, float | int]:
        """Everything as plain numbers: a line of metrics.csv."""
        metrics = {name: float(value) for name, value in self.metrics.items()}
        return {"step": self.number, **metrics, **self.costs, "seconds": self.seconds}


class History(list):
    """Rows of numbers, one an iteration; `history["reward"]` is a column, `history.plot()` a figure."""

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        if not any(key in row for row in self):
            raise KeyError(f"no column {key!r}; there are: {', '.join(dict.fromkeys(k for row in self for k in row))}.")
        return [row.get(key, float("nan")) for row in self]  # a column may appear later

    def plot(self, metrics: tuple[str, ...] = ("reward",), x: str = "reward_queries", **kwargs):
        """Learning curves against `x`; draws with minialign.show.curves and returns the figure."""
        from minialign import show

        return show.curves({name: (self[x], self[name]) for name in metrics}, xlabel=x.replace("_", " "), **kwargs)


def fit(steps: Iterable[Step], total: int | None = None, progress: bool = True) -> History:
    """Runs a method to its end (or for `total` more iterations), with a bar showing the reward and the time left."""
    if total is not None and total < 1:
        raise ValueError(f"total is {total}; expected at least 1 iteration, or None for all that are left.")
    history = History()
    for step in watch(steps, total, progress):
        history.append(step.row())
        if total is not None and len(history) >= total:
            break
    return history


def watch(steps: Iterable[Step], total: int | None = None, progress: bool = True, initial: int = 0) -> Iterator[Step]:
    """Passes steps on while a progress bar (on stderr) shows the reward."""
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=initial, disable=not progress, unit="it", dynamic_ncols=True) as bar:
        for step in steps:
            if "reward" in step.metrics:
                bar.set_postfix_str(f"reward {float(step.metrics['reward']):.3f}")
            bar.update()
            yield step


# -------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Batch:
    """A round's rows: prompts of all of them, and which are this process's own.

    drawn (n,): each row's place in the list of prompts; group (n,): which of the round's draws it belongs to.
    """

    prompts: list[Hashable]
    drawn: Tensor
    group: Tensor
    own: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def own_prompts(self) -> list[Hashable]:
        return [self.prompts[i] for i in self.own.tolist()]

    def gather(self, own: Tensor) -> Tensor:
        """This process's values (rows, ...) and those of the others as the round's (n, ...), on every process."""
        return gather_rows(own, self.own, len(self))


class Minibatch(NamedTuple):
    """rows: this process's part, as places among its own rows; everyone: the round's rows (or pairs); share of it here.

    share weighs a mean over `rows` so that the sum over processes is the mean over the minibatch.
    """

    rows: Tensor
    everyone: Tensor
    share: float


class Run:
    """One training run: what is trained, what is random, and the sums of a round.

    optimizer: of the trainable parameters; its learning rates are the peak, `config.warmup_updates` (if there is one)
    how many updates lead to it, and `config.max_grad_norm` the largest l2 norm of a gradient. generator: a CPU
    torch.Generator, the run's only randomness (seed 0 if None). counts: what has a `network_evaluations`; what is
    evaluated between two rounds, outside the method, is not charged. kept: what has tensors() and load(), saved with
    the checkpoint under its name; a reward that has a state is kept like that, one that has none is left alone.
    resume: an earlier run's checkpoint, from `Step.checkpoint`.
    """

    def __init__(
        self,
        config: Any,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator | None = None,
        resume: Mapping[str, Tensor] | None = None,
        counts: Sequence[Any] = (),
        **kept: Any,
    ):
        for name, value, kind in (("generator", generator, torch.Generator), ("resume", resume, Mapping)):
            if value is not None and not isinstance(value, kind):
                expected = "a torch.Generator" if name == "generator" else "tensors by name, of load_checkpoint(path)"
                raise ValueError(f"{name} is {value!r}; expected {expected}.")
        self.config, self.optimizer, self.counts = config, optimizer, list(counts)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.kept = kept
        self.done = self.updates = 0
        self.costs = {"network_evaluations": 0, "reward_queries": 0}
        self._peak = [group["lr"] for group in optimizer.param_groups]
        self._about = {"num_steps": [p.num_steps for p in self.counts if hasattr(p, "num_steps")]}
        self._about_before: dict[str, Any] = {}
        if resume is not None:
            self._load(resume)

    def rounds(self, total: int | None = None) -> Iterator[int]:
        """Numbers of the rounds that are left, up to config.num_iterations (or total); each starts its sums anew."""
        total = self.config.num_iterations if total is None else total
        if self.done >= total:
            warnings.warn(f"the checkpoint has done {self.done} of {total} rounds: none is left.", stacklevel=3)
        while self.done < total:
            self._started, self._evaluated = time.perf_counter(), self._evaluations()
            self._infos, self._norms = [], []
            yield self.done

    def draw(self, prompts: Sequence[Hashable], num_prompts: int | None, group_size: int = 1, unit: int = 1) -> Batch:
        """A round of num_prompts prompts, drawn with replacement, group_size rows each, side by side.

        num_prompts None: each prompt once, in their order, for methods that learn something of each one.
        Processes take turns with `unit` rows at a time: those that must stay on one of them. Raises ValueError if
        there are too few for each process to have some, on all of them: none waits for another.
        """
        self._meet(prompts)
        each, num_prompts = num_prompts is None, num_prompts or len(prompts)
        if num_prompts * group_size // unit < num_processes():
            raise ValueError(
                f"a round has {num_prompts * group_size} rows, in units of {unit}, for {num_processes()} processes: "
                "draw more, or start fewer processes."
            )
        if each:
            drawn = torch.arange(len(prompts))
        else:
            drawn = torch.randint(len(prompts), (num_prompts,), generator=self.generator)
        drawn = drawn.repeat_interleave(group_size).to(self.device)
        group = torch.arange(num_prompts, device=self.device).repeat_interleave(group_size)
        own = (
            own_rows(len(drawn) // unit, self.device).unsqueeze(1) * unit + torch.arange(unit).to(self.device)
        ).flatten()
        return Batch([prompts[i] for i in drawn.tolist()], drawn, group, own)

    def _meet(self, prompts: Sequence[Hashable]) -> None:
        """Refuses what is no list of prompts; says if a resumed run goes on with others."""
        if "prompts" in self._about:
            return
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; expected a list of prompts: [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("prompts is empty; give at least one.")
        self._about["prompts"] = fingerprint(prompts)
        if self._about_before.get("prompts", self._about["prompts"]) != self._about["prompts"]:
            warnings.warn(
                "resumed with other prompts than the checkpoint's, or in another order: what is remembered of a prompt "
                "goes on, which ones are drawn does not.",
                stacklevel=4,
            )

    def minibatches(self, items: int | Tensor, num_minibatches: int, own: Tensor) -> list[Minibatch]:
        """Shuffles rows 0 to items - 1, or given rows (m,) or groups of rows (m, w), and cuts them into equal parts.

        own: the rows of this process, ascending. A part's `rows` are (k,) or (k, w), in ascending order; parts without
        any item, if there are too few, are left out.
        """
        items = torch.arange(items, device=own.device) if isinstance(items, int) else items
        shuffled = items[torch.randperm(len(items), generator=self.generator).to(items.device)]
        parts = []
        for part in shuffled.tensor_split(num_minibatches):
            first = part if part.ndim == 1 else part[:, 0]
            mine = part[torch.isin(first, own)]
            if len(part):
                rows = torch.searchsorted(own, mine)
                order = rows.argsort() if rows.ndim == 1 else rows[:, 0].argsort()
                parts.append(Minibatch(rows[order], part, len(mine) / len(part)))
        return parts

    def backward(self, loss: Tensor, info: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds the gradient of weight * loss, and weight * info to the round's metrics.

        The weights of all parts of an update, on all processes, sum to 1: then metrics are means over the round, and
        neither they nor the gradient depend on how the work was cut.
        """
        (weight * loss).backward()
        self._infos.append({name: weight * value.detach().float() for name, value in info.items()})

    def update(self, scale: float = 1.0) -> None:
        """One optimizer step with the gradients of all processes; scale: of the learning rate, beside the warm-up.

        Raises FloatingPointError if the gradient is not finite, before any weight has moved.
        """
        sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not norm.isfinite():
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"the gradient of update {self.updates + 1} is not finite. {_likeliest(self)}")
        self.updates += 1
        warm = min(1, self.updates / max(1, getattr(self.config, "warmup_updates", 0)))
        for group, peak in zip(self.optimizer.param_groups, self._peak, strict=True):
            group["lr"] = peak * scale * warm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._norms.append(norm)

    def step(self, metrics: Mapping[str, Tensor | float], **costs: int) -> Step:
        """The round's report: means of what `backward` was told, then `metrics`, gradient norm and learning rate.

        A round without an update has no such means, gradient norm 0 and learning rate 0.
        costs: of this round, on all processes together; network evaluations are counted here.
        """
        here = torch.tensor(self._evaluations() - self._evaluated, device=self.device)
        costs["network_evaluations"] = int(sum_over_processes(here))
        for name, spent in costs.items():
            self.costs[name] = self.costs.get(name, 0) + spent
        means = self._means()
        norms = torch.stack(self._norms or [torch.zeros((), device=self.device)])
        rate = self.optimizer.param_groups[0]["lr"] if self._norms else 0.0
        means |= dict(metrics) | {"grad_norm": norms.mean(), "learning_rate": rate}
        self.done += 1
        lap = time.perf_counter() - self._started
        return Step(self.done - 1, means, dict(self.costs), lap, self.tensors)

    def _means(self) -> dict[str, Tensor]:
        """Weighted sums of the round over all processes, a mean over its updates. Some may have had no part in it."""
        names = names_everywhere(list(dict.fromkeys(name for info in self._infos for name in info)))
        if not names:
            return {}
        zero = torch.zeros((), device=self.device)
        sums = [torch.stack([zero, *(info[n] for info in self._infos if n in info)]).sum() for n in names]
        means = sum_over_processes(torch.stack(sums)) / max(1, len(self._norms))
        return dict(zip(names, means, strict=True))

    def _evaluations(self) -> int:
        return sum(policy.network_evaluations for policy in self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint: copies of weights, optimizer moments and random state, counts, and what is kept."""
        tensors = pack(self.parameters, self.optimizer, self.generator, number=self.done, updates=self.updates)
        tensors |= {f"cost.{name}": torch.tensor(total) for name, total in self.costs.items()}
        tensors["about"] = torch.tensor(list(json.dumps(self._about).encode()), dtype=torch.uint8)
        return tensors | states(self.kept)

    def _load(self, resume: Mapping[str, Tensor]) -> None:
        load_states(self.kept, resume)  # first, for a checkpoint of another kind must leave the weights alone
        counts = unpack(resume, self.parameters, self.optimizer, self.generator)
        self.done, self.updates = counts["number"], counts.get("updates", 0)
        self.costs |= {name: int(total) for name, total in within(resume, "cost").items()}
        self._about_before = json.loads(bytes(resume["about"].tolist())) if "about" in resume else {}
        before, now = self._about_before.get("num_steps", self._about["num_steps"]), self._about["num_steps"]
        if before != now:
            warnings.warn(f"resumed with num_steps {now}; the checkpoint was made with {before}.", stacklevel=4)


ABILITIES = {
    "rollout": "denoises, a DiffusionPolicy, a ConsistencyPolicy or a FlowPolicy",
    "terminal_std": "draws in a few jumps, a ConsistencyPolicy",
    "velocity": "says a velocity, a FlowPolicy",
    "training_error": "knows its denoising error, a DiffusionPolicy, a FlowPolicy or a ConsistencyPolicy",
    "generate": "answers, a LanguagePolicy",
    "noise_log_prob": "learns its initial noise, NoisePolicy(policy, prompts) around one that denoises",
}


def check_policy(policy: Any, ability: str) -> None:
    """Raises ValueError for a policy that lacks what a method needs, one of ABILITIES."""
    if not hasattr(policy, ability):
        raise ValueError(f"the policy is a {type(policy).__name__}; this method needs one that {ABILITIES[ability]}.")


def fingerprint(prompts: Sequence[Hashable]) -> str | None:
    """Of a list of prompts; None where one of them has no name that outlives this process."""
    try:
        names = json.dumps([key_of(prompt) for prompt in prompts])
    except ValueError:
        return None
    return hashlib.sha256(names.encode()).hexdigest()


def reward_metrics(rewards: Tensor) -> dict[str, Tensor]:
    """Mean and population std of a round's rewards."""
    return {"reward": rewards.mean(), "reward_std": rewards.std(correction=0)}


def _likeliest(run: Run) -> str:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in run.parameters)
    if half:
        return "What trains is in half precision: keep it in float32 (policy.add_lora() does)."
    rate = max(run._peak)
    return (
        f"The likeliest cause is the learning rate, {rate:g}: try {rate / 10:g}, or a lower max_grad_norm; next, a "
        "reward whose gradient is not finite, or a base model in float16 (bfloat16 does not overflow)."
    )
