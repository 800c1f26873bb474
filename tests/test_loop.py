"""Histories and checkpoints."""

import pytest
import torch

from minialign import loop


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
