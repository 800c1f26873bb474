"""Histories and checkpoints."""

import dataclasses

import pytest
import torch

from minialign import loop, rewards
from minialign.methods import par


def steps(n):
    for i in range(n):
        yield loop.Step(
            i, {"reward": torch.tensor(float(i))}, {"network_evaluations": 10 * i, "reward_queries": i}, 0.1, dict
        )


def test_fit_collects_plain_numbers_and_stops_where_asked():
    history = loop.fit(steps(5), progress=False)
    assert history["reward"] == [0, 1, 2, 3, 4] and history[2]["network_evaluations"] == 20
    assert len(loop.fit(steps(5), total=2, progress=False)) == 2
    assert history.plot().axes[0].get_xlabel() == "reward queries"


def test_fit_does_not_run_one_iteration_too_many():
    ran = []

    def noted():
        for step in steps(5):
            ran.append(step.number)
            yield step

    loop.fit(noted(), total=3, progress=False)
    assert ran == [0, 1, 2]


def test_pack_and_unpack_put_everything_back(tmp_path):
    def start():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3, 2))
        return p, torch.optim.AdamW([p], lr=0.1), torch.Generator().manual_seed(5)

    def go(p, optimizer, generator, n):
        for _ in range(n):
            (p * torch.randn(3, 2, generator=generator)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    p, optimizer, generator = start()
    go(p, optimizer, generator, 3)
    loop.save_checkpoint(loop.pack([p], optimizer, generator, number=3), tmp_path / "c.safetensors")
    go(p, optimizer, generator, 4)
    q, other, fresh = start()
    assert loop.unpack(loop.load_checkpoint(tmp_path / "c.safetensors"), [q], other, fresh) == {"number": 3}
    go(q, other, fresh, 4)
    assert torch.equal(p, q)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(ValueError, match=r"trainable tensor 0 is \(5,\), the checkpoint has \(3, 2\)"):
        loop.unpack(
            loop.load_checkpoint(tmp_path / "c.safetensors"), [torch.nn.Parameter(torch.zeros(5))], other, fresh
        )


def test_one_process_owns_every_row():
    assert loop.own_rows(5).tolist() == [0, 1, 2, 3, 4]
    values = torch.arange(10.0).view(5, 2)
    assert torch.equal(loop.gather_rows(values, loop.own_rows(5), 5), values)


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    num_iterations: int = 3
    max_grad_norm: float = 1.0
    warmup_updates: int = 0


class Counted:
    network_evaluations = 0


def start(config=Config(), **changes):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    return weight, loop.Run(config, torch.optim.SGD([weight], lr=0.5), **changes)


def test_a_rounds_metrics_are_weighted_and_averaged_over_its_updates():
    weight, run = start()
    number = next(run.rounds())
    for parts in ([(1.0, 0.25), (5.0, 0.75)], [(2.0, 1.0)]):  # two updates, the first in two parts
        for value, share in parts:
            run.backward(weight.sum() * value, {"loss": torch.tensor(value)}, share)
        run.update()
    step = run.step({"reward": torch.tensor(7.0)}, reward_queries=4, labels=2)
    assert number == step.number == 0 and step.row()["loss"] == ((0.25 + 3.75) + 2) / 2 and step.row()["reward"] == 7
    assert step.costs == {"network_evaluations": 0, "reward_queries": 4, "labels": 2}


def test_a_gradient_that_is_not_finite_stops_before_any_weight_moves():
    weight, run = start()
    next(run.rounds())
    run.backward((weight * torch.tensor([1.0, torch.inf])).sum(), {})
    with pytest.raises(FloatingPointError, match=r"gradient of update 1 is not finite.*learning rate, 0\.5: try 0\.05"):
        run.update()
    assert torch.equal(weight.detach(), torch.zeros_like(weight)) and weight.grad is None


def test_the_learning_rate_warms_up_and_is_scaled_and_resumes(tmp_path):
    weight, run = start(Config(warmup_updates=4))
    for _ in run.rounds():
        run.backward(weight.sum(), {})
        run.update(0.5)
        step = run.step({}, reward_queries=1)
        if step.number == 1:
            loop.save_checkpoint(step.checkpoint(), tmp_path / "c.safetensors")
    assert step.row()["learning_rate"] == 0.5 * 0.5 * 3 / 4 and step.row()["grad_norm"] == pytest.approx(2**0.5)
    other, resumed = start(Config(warmup_updates=4), resume=loop.load_checkpoint(tmp_path / "c.safetensors"))
    for number in resumed.rounds():
        assert number == 2
        resumed.backward(other.sum(), {})
        resumed.update(0.5)
        again = resumed.step({}, reward_queries=1)
    assert torch.equal(weight, other) and again.costs == step.costs and again.row()["learning_rate"] == 0.1875


def test_what_is_looked_at_between_two_rounds_is_not_charged():
    policy = Counted()
    _, run = start(counts=[policy])
    for _ in run.rounds():
        policy.network_evaluations += 10
        step = run.step({}, reward_queries=0)
        policy.network_evaluations += 1_000  # somebody looks at samples
    assert step.network_evaluations == 30


def test_what_has_a_state_is_kept_and_what_has_none_is_left_alone():
    class Counter:
        total = 0

        def tensors(self):
            return {"total": torch.tensor(self.total)}

        def load(self, tensors):
            self.total = int(tensors["total"])

    counter = Counter()
    _, run = start(reward=counter, other=lambda samples, prompts: samples)
    next(run.rounds())
    counter.total = 5
    checkpoint = run.step({}).checkpoint()
    assert int(checkpoint["reward.total"]) == 5 and not any(name.startswith("other") for name in checkpoint)
    fresh = Counter()
    start(reward=fresh, resume=checkpoint)
    assert fresh.total == 5


def test_a_round_of_groups_is_drawn_and_cut(generator):
    _, run = start(generator=generator)
    batch = run.draw(["a", "b", "c"], 5, 2, unit=2)
    assert len(batch) == 10 and batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert batch.prompts == ["abc"[i] for i in batch.drawn.tolist()] and batch.prompts[::2] == batch.prompts[1::2]
    assert batch.own_prompts == batch.prompts and torch.equal(batch.gather(batch.group), batch.group)
    parts = run.minibatches(10, 3, batch.own)
    assert [len(part.rows) for part in parts] == [4, 3, 3] and all(part.share == 1 for part in parts)
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(10))
    assert all(part.rows.tolist() == sorted(part.everyone.tolist()) for part in parts)
    pairs = torch.tensor([[7, 6], [2, 3], [9, 8]])
    assert sorted(run.minibatches(pairs, 1, batch.own)[0].rows.tolist()) == sorted(pairs.tolist())
    assert [len(part.rows) for part in run.minibatches(2, 4, batch.own)] == [1, 1]  # too few for four parts


def test_a_column_that_appears_later_is_nan_before_and_a_missing_one_is_named():
    history = loop.History([{"reward": 1.0}, {"reward": 2.0, "kept": 3.0}])
    assert history["kept"][1] == 3 and history["kept"][0] != history["kept"][0]
    with pytest.raises(KeyError, match="no column 'kepd'; there are: reward, kept"):
        history["kepd"]


def test_a_round_without_an_update_reports_the_same_resumed_or_not():
    """A mean over nothing is no number: its column is empty there; no step was taken, so its length is 0."""
    weight, run = start(Config(warmup_updates=4))
    for number in run.rounds():
        if number == 0:
            run.backward(weight.sum(), {"loss": torch.tensor(1.0)})
            run.update()
        step = run.step({})
        checkpoint = checkpoint if number else step.checkpoint()
    _, resumed = start(Config(warmup_updates=4), resume=checkpoint)
    rows = [resumed.step({}).row() for _ in resumed.rounds()]
    assert "loss" not in step.row() and rows[-1] | {"seconds": 0} == step.row() | {"seconds": 0}
    assert rows[-1]["learning_rate"] == rows[-1]["grad_norm"] == 0


def test_a_round_with_fewer_rows_than_processes_is_refused_by_all_of_them(monkeypatch):
    """Those without rows would stop in the rollout, and the others wait for them for ever."""
    _, run = start()
    monkeypatch.setattr(loop, "num_processes", lambda: 3)
    assert len(run.draw(["a"], 3, 2, unit=2)) == 6
    with pytest.raises(ValueError, match="a round has 4 rows, in units of 2, for 3 processes"):
        run.draw(["a"], 2, 2, unit=2)


TWO_PROCESSES = """
import torch
from accelerate import PartialState
from minialign import loop
state = PartialState(cpu=True)
first, second, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
(first.sum() + (second.sum() if state.process_index == 1 else 0)).backward()
loop.sum_gradients([first, second, idle])
if state.is_main_process:
    torch.save([p.grad for p in (first, second, idle)], {out!r})
state.destroy_process_group()
"""


def test_a_weight_that_no_process_differentiates_has_no_gradient(two_processes):
    """As in one process: a gradient of 0 instead of none would let weight decay and momentum move it."""
    first, second, idle = two_processes(TWO_PROCESSES)
    assert first.tolist() == [2, 2] and second.tolist() == [1, 1] and idle is None


def test_sums_are_made_where_processes_can_talk(monkeypatch):
    """NCCL takes no tensor of the CPU, where the scores of texts and their lengths are."""
    from accelerate import PartialState

    class Reached(Exception):
        pass

    def all_reduce(tensor):
        raise Reached(tensor.device.type)

    monkeypatch.setattr(PartialState(), "device", torch.device("meta"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with pytest.raises(Reached, match="meta"):
        loop.sum_over_processes(torch.ones(2))


def test_a_checkpoint_with_more_weights_than_are_trained_is_refused():
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    both, one = torch.optim.SGD([first, second], lr=0.1), torch.optim.SGD([first], lr=0.1)
    checkpoint = loop.Run(Config(), both).tensors()
    with pytest.raises(ValueError, match="it has more than the 1 tensors that are trained here"):
        loop.Run(Config(), one, resume=checkpoint)


def test_a_checkpoint_that_does_not_fit_leaves_every_weight_as_it_was():
    def run(last, resume=None):
        weights = [torch.nn.Parameter(torch.full(shape, float(last))) for shape in ((2,), (last,))]
        return weights, lambda: loop.Run(Config(), torch.optim.SGD(weights, lr=0.1), resume=resume)

    weights, resumed = run(3, resume=run(4)[1]().tensors())
    with pytest.raises(ValueError, match=r"trainable tensor 1 is \(3,\), the checkpoint has \(4,\)"):
        resumed()
    assert weights[0].tolist() == [3, 3]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda shaped: rewards.weighted_sum({"shaped": shaped}, {"shaped": 2.0}),
        lambda shaped: rewards.Saturated([shaped], [0.5]),
        lambda shaped: par.Shaped(shaped, config=par.Config("sigmoid")),
    ],
    ids=["weighted sum", "saturated", "shaped"],
)
def test_a_reward_inside_another_keeps_its_state(wrap):
    def plain(samples, prompts):
        return samples[:, 0]

    def fresh():
        return wrap(par.Shaped(plain, config=par.Config("meanstd")))

    def kept(reward):
        return start(reward=reward)[1].tensors()

    reward, prompts = fresh(), [""] * 3
    reward(torch.tensor([[1.0], [2.0], [6.0]]), prompts)
    again = fresh()
    start(reward=again, resume=kept(reward))
    samples = torch.tensor([[0.0], [5.0], [1.0]])
    torch.testing.assert_close(again(samples, prompts), reward(samples, prompts))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fresh()(samples, prompts), reward(samples, prompts))


def test_statistics_that_a_checkpoint_does_not_hold_stay_as_they_are():
    references = {"a": torch.tensor([1.0, 3.0])}
    shaped = par.Shaped(lambda samples, prompts: samples, references, par.Config("clip", freeze=True))
    shaped.load({})
    assert float(shaped.statistics.mean) == 2
