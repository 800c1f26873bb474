"""Runs that are killed, starved of disk, whose files are damaged: nothing is lost, or one line says what is wrong."""

import json
import os
import re
import resource
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minialign import cli, evaluate, loop, recipes, show
from minialign.methods import b2diffurl, ddpo
from minialign.worlds import gaussian

SMALL = {
    "ddpo": ["--world", "compass", "--set", "num_prompts=16", "--set", "num_steps=5"],
    "b2diffurl": ["--world", "compass", "--set", "num_prompts=4", "--set", "num_steps=5", "--set", "last_window=5"],
    "rlcm": ["--world", "compass", "--set", "num_prompts=16"],
    "ppo": ["--world", "tokens", "--set", "num_prompts=16"],
}


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "EVALUATION_SAMPLES", 16)
    monkeypatch.setattr(evaluate, "KL_SAMPLES", 8)
    monkeypatch.setattr(evaluate, "before_after", lambda world, before, after, path, title: path.write_bytes(b"drawn"))
    monkeypatch.setattr(evaluate, "training_curve", lambda rows, baseline: None)
    monkeypatch.setattr(show, "save", lambda figure, path, alt: path.write_bytes(b"drawn"))
    monkeypatch.setitem(recipes.RECIPES, ("consistency_distillation", "compass"), dict(num_iterations=2, batch_size=8))


def command(method: str, out: str, steps: int = 3) -> list[str]:
    return ["run", method, *SMALL[method], "--steps", str(steps), "--quiet", "--out", out]


def in_a_child(arguments: list[str], nth: int, event) -> tuple[int, str]:
    """(exit status, what it said) of the command in a fork; `event` happens at the nth move of a file, 0: at once."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader) as said:  # a pipe, for what pytest captures with is a file
            text = said.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
    replace, count = Path.replace, 0

    def counting(self, target):
        nonlocal count
        count += 1
        return event(lambda: replace(self, target)) if count == nth else replace(self, target)

    try:
        os.dup2(writer, 2)
        sys.stdout = sys.stderr = os.fdopen(writer, "w", buffering=1)
        Path.replace = counting
        if nth == 0:
            event(lambda: None)
        os._exit(cli.main(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def killed_before(move):
    os._exit(77)


def killed_after(move):
    move()
    os._exit(77)


def without_disk(move):
    """From here on no file takes a byte."""
    move()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def assert_same_run(a: str, b: str) -> None:
    """Every file has the same bytes; but pictures carry nothing that must, and the clock is another."""
    assert {path.name for path in Path(a).iterdir()} == {path.name for path in Path(b).iterdir()}
    for path in Path(a).iterdir():
        if path.name == "summary.json":
            ours, theirs = (json.loads((Path(f) / path.name).read_text()) for f in (a, b))
            assert ours.pop("seconds") >= 0 and theirs.pop("seconds") >= 0
            assert ours == theirs
        elif path.suffix == ".safetensors" and path.stem == "checkpoint":
            ours, theirs = (loop.load_checkpoint(Path(f) / path.name) for f in (a, b))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        elif path.suffix != ".png" and path.name != "timing.csv":
            assert path.read_bytes() == (Path(b) / path.name).read_bytes(), path.name


def moves_of(method: str) -> int:
    """How many files a whole run moves into its folder, which becomes the one to compare with."""
    count = 0
    replace = Path.replace

    def counting(self, target):
        nonlocal count
        count += 1
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counting)
        assert cli.main(command(method, "whole")) == 0
    return count


@pytest.mark.parametrize("method", SMALL)
def test_a_run_killed_between_any_two_writes_resumes_to_the_same_files(method):
    moves = moves_of(method)
    assert moves >= 12  # run.json, checkpoint and tables twice or more, adapter, pictures, summary
    every = 1 if method == "ddpo" else 4
    for nth in range(1, moves + 1, every):
        event = killed_before if nth % 2 else killed_after
        assert in_a_child(command(method, "part"), nth, event)[0] == 77
        if Path("part/run.json").exists():
            assert cli.main(["run", "--resume", "part", "--quiet"]) == 0
        else:  # nothing had begun: the same command starts over
            assert cli.main(command(method, "part")) == 0
        assert_same_run("part", "whole")
        shutil.rmtree("part")


@pytest.mark.parametrize("nth", [1, 2, 3, 7, 9])
def test_a_full_disk_loses_nothing_that_was_written(nth):
    assert cli.main(command("ddpo", "whole")) == 0
    status, said = in_a_child(command("ddpo", "part"), nth, without_disk)
    assert status == 2 and "minialign run --resume part" in said and "Traceback" not in said
    assert not [path for path in Path("part").iterdir() if "partial" in path.name]
    assert cli.main(["run", "--resume", "part", "--quiet"]) == 0
    assert_same_run("part", "whole")


def test_a_disk_that_is_full_from_the_start_leaves_nothing():
    status, said = in_a_child(command("ddpo", "part"), 0, without_disk)
    assert status == 2 and "start again" in said and not Path("part").exists()


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evaluate, "EVALUATION_SAMPLES", 16)
        patch.setattr(evaluate, "KL_SAMPLES", 8)
        assert cli.main(command("ddpo", "r", steps=1)) == 0
        assert cli.main(command("ppo", "other", steps=1)) == 0
    return folder


def without(folder: Path, key: str) -> str:
    found = json.loads((folder / "run.json").read_text())
    del found[key]
    return json.dumps(found)


def changed(folder: Path, **fields) -> str:
    return json.dumps(json.loads((folder / "run.json").read_text()) | fields)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "checkpoint is empty": lambda r: (r / "checkpoint.safetensors").write_bytes(b""),
    "checkpoint is zeros": lambda r: (r / "checkpoint.safetensors").write_bytes(b"\0" * 100),
    "checkpoint is text": lambda r: (r / "checkpoint.safetensors").write_text("a note to myself"),
    "checkpoint is cut": lambda r: os.truncate(r / "checkpoint.safetensors", 2000),
    "checkpoint is a folder": lambda r: [
        (r / "checkpoint.safetensors").unlink(),
        (r / "checkpoint.safetensors").mkdir(),
    ],
    "checkpoint is of another run": lambda r: shutil.copy(r.parent / "other/checkpoint.safetensors", r),
    "checkpoint is of no run": lambda r: save_file({"a": torch.zeros(3)}, r / "checkpoint.safetensors"),
    "run.json is empty": lambda r: (r / "run.json").write_bytes(b""),
    "run.json is cut": lambda r: os.truncate(r / "run.json", 100),
    "run.json is binary": lambda r: (r / "run.json").write_bytes(b"\xff\xfe\0"),
    "run.json is a list": lambda r: (r / "run.json").write_text("[1]"),
    "run.json is null": lambda r: (r / "run.json").write_text("null"),
    "run.json lacks the method": lambda r: (r / "run.json").write_text(without(r, "method")),
    "run.json lacks the config": lambda r: (r / "run.json").write_text(without(r, "config")),
    "run.json has a field more": lambda r: (r / "run.json").write_text(changed(r, colour="red")),
    "run.json names no method": lambda r: (r / "run.json").write_text(changed(r, method="dpo")),
    "run.json names no world": lambda r: (r / "run.json").write_text(changed(r, world=3)),
    "run.json has an unknown setting": lambda r: (r / "run.json").write_text(changed(r, config={"learning_rat": 1})),
    "run.json has an impossible setting": lambda r: (r / "run.json").write_text(
        changed(r, config={"num_iterations": 0})
    ),
    "run.json has no settings": lambda r: (r / "run.json").write_text(changed(r, config="all")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_a_remedy(damage, finished, tmp_path, capsys):
    for name in ("r", "other"):
        shutil.copytree(finished / name, name)
    DAMAGES[damage](Path("r"))
    assert cli.main(["run", "--resume", "r", "--steps", "2", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"r/{damage.split()[0]}" in said
    assert "start over" in said and ("put back" in said or "delete" in said)


def test_the_remedy_for_a_damaged_checkpoint_works(finished, capsys):
    shutil.copytree(finished / "r", "r")
    Path("r/checkpoint.safetensors").unlink()
    assert cli.main(["run", "--resume", "r", "--steps", "3", "--quiet"]) == 0
    assert cli.main(command("ddpo", "whole")) == 0
    assert_same_run("r", "whole")


def test_a_finished_run_says_so_and_goes_on_if_asked(finished, capsys):
    shutil.copytree(finished / "r", "r")
    assert cli.main(["run", "--resume", "r"]) == 0
    assert "r is finished: 1 iterations. For more: --steps 2" in capsys.readouterr().out
    assert cli.main(["run", "--resume", "r", "--steps", "3", "--quiet"]) == 0
    assert cli.main(command("ddpo", "whole")) == 0
    assert_same_run("r", "whole")
    assert cli.main(["run", "--resume", "r", "--steps", "2"]) == 2
    assert "has done 3 iterations already" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["ddpo"], ["--seed", "1"], ["--world", "ring"], ["--set", "eta=1"], ["--out", "x"]])
def test_resume_keeps_its_settings_and_refuses_others(given, finished, capsys):
    shutil.copytree(finished / "r", "r")
    assert cli.main(["run", *given, "--resume", "r"]) == 2
    assert "goes on with the run's own settings; leave out" in capsys.readouterr().err


# ---- from Python -----------------------------------------------------------------------------------------------------

PROMPTS = ["inner", "outer"]


def checkpoint() -> dict:
    policy = gaussian.load("compass", num_steps=4).policy
    config = ddpo.Config(num_iterations=2, num_prompts=8, num_minibatches=1)
    *_, last = ddpo.train(policy, lambda x, _: x[:, 0], PROMPTS, config)
    return last.checkpoint()


@pytest.mark.parametrize(
    ("prompts", "num_steps", "rounds", "said"),
    [
        (PROMPTS, 4, 3, None),
        (PROMPTS[::-1], 4, 3, "resumed with other prompts"),
        (["inner"], 4, 3, "resumed with other prompts"),
        (PROMPTS, 5, 3, r"resumed with num_steps \[5\]; the checkpoint was made with \[4\]"),
        (PROMPTS, 4, 2, "has done 2 of 2 rounds: none is left"),
    ],
)
def test_what_differs_from_the_checkpoint_is_said(prompts, num_steps, rounds, said):
    saved, policy = checkpoint(), gaussian.load("compass", num_steps=num_steps).policy
    config = ddpo.Config(num_iterations=rounds, num_prompts=8, num_minibatches=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(ddpo.train(policy, lambda x, _: x[:, 0], prompts, config, resume=saved))
    messages = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    if said is None:
        assert messages == []
    else:
        (message,) = messages
        assert re.search(said, message)


def test_a_foreign_checkpoint_leaves_the_policy_as_it_was():
    saved, policy = checkpoint(), gaussian.load("compass", num_steps=4).policy
    before = [p.detach().clone() for p in policy.parameters()]
    config = b2diffurl.Config(num_iterations=3, num_prompts=4, first_window=1, last_window=4)
    with pytest.raises(ValueError, match="of the history: was it made by another method"):
        next(b2diffurl.train(policy, lambda x, _: x[:, 0], PROMPTS, config, resume=saved))
    for tensors in ({}, {"a": torch.zeros(2)}, {k: v for k, v in saved.items() if k != "generator"}):
        with pytest.raises(ValueError, match="checkpoint"):
            next(ddpo.train(policy, lambda x, _: x[:, 0], PROMPTS, resume=tensors))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize(("prompts", "said"), [("inner", r"the string 'inner'; expected a list"), ([], "is empty")])
def test_prompts_that_are_no_list(prompts, said):
    policy = gaussian.load("compass", num_steps=4).policy
    with pytest.raises(ValueError, match=said):
        next(ddpo.train(policy, lambda x, _: x[:, 0], prompts))
