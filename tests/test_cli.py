"""The command line as a user meets it, in the fast exact world: files, resuming, Ctrl-C, and errors that teach."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from minialign import bench, cli, evaluate, methods, prepare, recipes
from minialign import run as running

IMAGES = ("ddpo", "b2diffurl", "rlcm", "dragon")  # methods with a floor that work on pictures and points
FAST = ["--world", "compass", "--steps", "4", "--quiet", "--set", "num_prompts=32", "--set", "num_steps=5"]


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> int:
    return cli.main(["run", *map(str, arguments)])


def test_a_run_leaves_what_the_readme_promises(tmp_path, capsys):
    assert run("ddpo", *FAST, "--out", "r") == 0
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names >= {
        "summary.json",
        "metrics.csv",
        "timing.csv",
        "before_after.png",
        "curves.png",
        "run.json",
        "trainable.safetensors",
    }
    assert not [name for name in names if "partial" in name]
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["reward_queries"] == 4 * 32 and summary["network_evaluations"] == 4 * 32 * 5 * 4
    assert summary["before"]["kl"] == 0 and summary["after"]["kl"] > 0
    assert len(list(csv.DictReader((tmp_path / "r/metrics.csv").read_text().splitlines()))) == 4
    printed = capsys.readouterr().out
    assert "oracle accuracy" in printed and "network evaluations" in printed


def test_resuming_ends_with_the_numbers_of_an_uninterrupted_run(tmp_path):
    assert run("ddpo", *FAST, "--out", "whole") == 0
    assert run("ddpo", *FAST, "--steps", "2", "--out", "part") == 0
    assert run("--resume", "part", "--steps", "4", "--quiet") == 0
    whole, part = (json.loads((tmp_path / f"{name}/summary.json").read_text()) for name in ("whole", "part"))
    for summary in (whole, part):
        del summary["seconds"]
    assert whole == part
    a, b = (load_file(tmp_path / f"{name}/trainable.safetensors") for name in ("whole", "part"))
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_what_was_learned_and_resume_goes_on(tmp_path, which):
    command = [
        sys.executable,
        "-m",
        "minialign.cli",
        "run",
        "ddpo",
        "--world",
        "compass",
        "--steps",
        "100000",
        "--out",
        "r",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "r/metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(which)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "minialign run --resume" in out
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["interrupted"] and summary["iterations"] >= 1
    assert run("--resume", "r", "--steps", summary["iterations"] + 1, "--quiet") == 0
    assert json.loads((tmp_path / "r/summary.json").read_text())["iterations"] == summary["iterations"] + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo"], "unknown method 'dpo'; did you mean 'ddpo'?"),
        (["ddpo", "--world", "shape"], "unknown world 'shape'; did you mean 'shapes'?"),
        (["ddpo", "--set", "learning_rat=1"], "unknown field 'learning_rat'; did you mean 'learning_rate'?"),
        (["ddpo", "--set", "num_prompts=many"], "--set num_prompts=many: 'many' is not a whole number of at least 1"),
        (["ddpo", "--set", "eta"], "expected field=value"),
        (["ddpo", "--world", "compass", "--reward", "golf"], "unknown reward 'golf'; did you mean 'gold'?"),
        (["ddpo", "--world", "compass", "--reward", "nowhere:f"], "cannot load the reward"),
        (["ddpo", "--world", "compass", "--set", "eta=0"], "eta = 0"),
        (["ddpo", "--world", "compass", "--set", "num_minibatches=999"], "more than the 256 samples"),
        (["ppo", "--world", "shapes"], "language policies) does not run in world 'shapes': assistant, tokens."),
        (["ddpo", "--world", "assistant"], "diffusion or flow policies) does not run in world 'assistant': shapes"),
        (["reward_model", "--world", "tokens"], "learns a reward; language policies) does not run in world 'tokens'"),
        (["teleport", "--steps", "3"], "teleport has no num_iterations"),
        (["teleport", "--world", "line", "--reward", "gold"], "teleport takes no reward"),
        (["ddpo", "--world", "compass", "--reward", "gold,side"], "ddpo takes one reward, not 2"),
        (["constrained", "--world", "tokens", "--reward", "fives"], "there are 1 rewards and 2 thresholds"),
        (["ppo", "--set", "eta=1"], "unknown field 'eta'"),
        (["ppo", "--set", "num_minibatches=65"], "more than the 64 responses"),
        (["--resume", "nothing"], "holds no run to resume"),
        ([], "which method?"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(arguments, message, capsys, tmp_path):
    assert run(*arguments, "--quiet") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, capsys):
    assert run("ddpo", *FAST, "--out", "r") == 0
    assert run("ddpo", *FAST, "--out", "r") == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_ppo_teaches_the_assistant_and_resumes(tmp_path, capsys, lora_rank):
    small = [
        "ppo",
        "--quiet",
        "--set",
        "num_prompts=16",
        "--set",
        "learning_rate=0.003",
        "--set",
        f"lora_rank={lora_rank}",
    ]
    assert run(*small, "--steps", 6, "--out", "whole") == 0
    whole = json.loads((tmp_path / "whole/summary.json").read_text())
    assert whole["before"]["kl"] == 0 and whole["after"]["kl"] > 0.05 and whole["reward_queries"] == 6 * 16
    assert whole["before"]["reward"] == whole["before"]["oracle"] and 0 < whole["after"]["diversity"] < 1
    assert "oracle (gold reward)" in capsys.readouterr().out
    weights = "adapter_model.safetensors" if lora_rank else "trainable.safetensors"
    assert (tmp_path / "whole" / weights).exists() and (tmp_path / "whole/before_after.png").stat().st_size > 10_000
    assert run(*small, "--steps", 3, "--out", "part") == 0
    assert run("--resume", "part", "--steps", 6, "--quiet") == 0
    part = json.loads((tmp_path / "part/summary.json").read_text())
    assert part["after"] == whole["after"]


def test_ppo_climbs_in_the_enumerable_world(tmp_path):
    assert run("ppo", "--world", "tokens", "--steps", 60, "--quiet", "--out", "r") == 0
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["after"]["reward"] > summary["before"]["reward"] + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return samples[:, :1]", "returned shape (32, 1) for 32 samples"),
        ("return [0.0] * len(samples)", "list"),
        ("return samples[:, 0] / 0 * 0", "nan"),
        ("return prompt", "raised NameError"),
    ],
)
def test_a_broken_reward_is_named_and_nothing_is_left(body, message, tmp_path, capsys, monkeypatch):
    module = f"reward_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"def mine(samples, prompts):\n    {body}\n")
    monkeypatch.setattr(evaluate, "EVALUATION_SAMPLES", 32)
    monkeypatch.setattr(evaluate, "KL_SAMPLES", 8)
    assert run("ddpo", *FAST, "--reward", f"{module}:mine", "--out", "r") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_the_adapter_of_a_run_loads_in_diffusers_and_redraws_its_images(tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    from minialign.policies.diffusion import DiffusionPolicy
    from minialign.worlds.base import WEIGHTS

    drawn = []
    monkeypatch.setattr(evaluate, "EVALUATION_SAMPLES", 16)
    monkeypatch.setattr(evaluate, "KL_SAMPLES", 4)
    report = running.report

    def keep(plan, trial, rows, before, after, *rest):
        drawn.append((before, after))
        return report(plan, trial, rows, before, after, *rest)

    monkeypatch.setattr(running, "report", keep)
    small = ["num_prompts=4", "group_size=4", "warmup_updates=0", "learning_rate=0.02"]
    assert run("ddpo", "--steps", 1, "--quiet", "--out", "r", *(word for s in small for word in ("--set", s))) == 0
    (before, after) = drawn[0]
    assert (after["samples"] - before["samples"]).abs().max() > 0.05

    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "shapes", local_files_only=True)
    pipe.load_lora_weights(tmp_path / "r", weight_name="pytorch_lora_weights.safetensors")
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=6, guidance_scale=1.0)  # the recipe's
    noise = policy.draw_noise(16, torch.Generator().manual_seed(10_000))
    torch.testing.assert_close(policy.sample(after["prompts"], noise), after["samples"], atol=1e-4, rtol=0)
    # and with no code of ours at all: the pipeline's own call, deterministic sampler
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a red circle"], num_inference_steps=8, guidance_scale=1.0, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)


def test_bench_stores_its_rows(tmp_path, capsys, quick_distillation):
    names = [*IMAGES, "diffusion_dpo"]
    measure = ["bench", "--methods", *names, "--worlds", "compass", "--rounds", "2", "--out", "bench.json"]
    assert cli.main(measure) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert set(row) == {"method", "world", "device", "step_seconds", "floor_seconds", "ratio"}
        ratio = row["step_seconds"] / row["floor_seconds"]
        assert row["step_seconds"] > 0 and row["ratio"] == pytest.approx(ratio, rel=0.05)
    for wrong, message in {"rvr": "did you mean 'rwr'?", "rwr": "unknown method to measure"}.items():
        assert cli.main(["bench", "--methods", wrong]) == 2 and message in capsys.readouterr().err
    assert cli.main(["bench", "--methods", "ddpo", "--worlds", "assistant"]) == 2
    assert "does not run in world 'assistant'" in capsys.readouterr().err


def test_bench_measures_each_method_where_it_runs():
    ppo, ddpo = methods.CATALOGUE["ppo"], methods.CATALOGUE["ddpo"]
    assert bench.worlds_for(ppo, None, chosen=False) == ["assistant"]
    assert bench.worlds_for(ddpo, None, chosen=False) == ["shapes", "digits"]
    assert bench.worlds_for(ppo, ["ring"], chosen=False) == ["assistant"]  # all were meant, and it has no ring


def test_the_floor_of_ppo_is_its_rounds_rows(monkeypatch):
    """Rows that the bare passes send through policy and critic, against what a round is charged for."""
    config = methods.CATALOGUE["ppo"].module.Config(num_iterations=1, num_prompts=6, num_epochs=2)
    ppo = methods.CATALOGUE["ppo"]
    world = prepare.ready_world(ppo, "assistant", prepare.Chosen(dict(lora_rank=0), config))
    seen = {"policy": [], "critic": []}
    for name, module in (("policy", world.policy.network), ("critic", world.policy.critic)):
        module.register_forward_hook(
            lambda _, inputs, __, name=name: seen[name].append((inputs[0].shape[0], torch.is_grad_enabled()))
        )
    floor = ppo.module.floor(world.policy, config, {"longest": 5})
    seconds = bench.language_seconds(world.policy, world.prompts, **floor)
    assert seconds > 0
    assert seen["policy"] == [(6, False)] * (5 + 1) + [(6, True)] * 2  # five words, the reference, two epochs
    assert seen["critic"] == [(6, False)] + [(6, True)] * 2
    assert all(parameter.grad is None for parameter in world.policy.parameters())


def test_teleportation_is_measured_without_a_square_matrix():
    row = methods.CATALOGUE["teleport"].module.bench("cpu", dim=20_000, rank=8, num_images=100, batch=4)
    assert row["statistics_seconds"] > 0 and row["jump_seconds"] > 0
    assert row["memory_over_data"] < 20  # 20,000 x 20,000 would be 200 times the data


@pytest.fixture
def quick_distillation(monkeypatch):
    quick = dict(num_iterations=3, batch_size=16)
    monkeypatch.setitem(recipes.RECIPES, ("consistency_distillation", "compass"), quick)


def test_rlcm_on_a_world_without_a_twin_distils_one_first(tmp_path, capsys, quick_distillation):
    run = ["run", "rlcm", "--world", "compass", "--steps", "2", "--out", "r", "--quiet"]
    assert cli.main(run) == 0
    assert "distilling a consistency model of compass" in capsys.readouterr().err
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["network_evaluations"] == 2 * 256 * (4 + 3 * 3)  # the distillation is not charged to training
    assert cli.main(["run", "--resume", "r", "--steps", "3", "--quiet"]) == 0
    assert cli.main([*run[:-1], "--set", "num_steps=1", "--out", "s"]) == 2
    assert "num_steps = 1 has no stochastic step" in capsys.readouterr().err and not (tmp_path / "s").exists()
    assert cli.main([*run, "--set", "eta=0.5", "--out", "t"]) == 2  # a consistency sampler has no eta


@pytest.mark.parametrize("method", IMAGES)
def test_the_floor_has_the_networks_rows_of_a_step(method, quick_distillation):
    """The rows of the floor's passes, backward ones counted thrice, are the step's own network evaluations."""
    module = methods.CATALOGUE[method].module
    config = module.Config(num_iterations=2, num_prompts=6, **({
        "ddpo": dict(num_minibatches=1, group_size=2, steps_per_pass=2),
        "b2diffurl": dict(num_minibatches=1, num_branches=3, first_window=2, last_window=3, steps_per_pass=2),
        "rlcm": dict(num_minibatches=1, group_size=2),
        "dragon": dict(num_updates=3, minibatch_size=5, rollout_steps=4),
    }[method]))  # fmt: skip
    chosen = prepare.Chosen(dict(num_steps=5), config)
    world = prepare.ready_world(methods.CATALOGUE[method], "compass", chosen)
    spent = 0
    for step in module.train(world.policy, lambda samples, prompts: samples[:, 0], world.prompts, config):
        passes = module.floor(world.policy, config, step.metrics)
        spent += sum(passes["forward"]) + 3 * sum(passes["backward"])
        assert step.network_evaluations == spent


def test_what_samples_faster_is_compared_at_equal_evaluations(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "EVALUATION_SAMPLES", 64)
    small = ["--world", "compass", "--set", "budgets=3,6", "--set", "num_data=300", "--out", "r"]
    assert run("teleport", *small) == 0
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert list(summary["before"]) == ["distance_3", "distance_6", "oracle_3", "oracle_6"]
    assert summary["after"]["distance_3"] < summary["before"]["distance_3"] and "reward_queries" not in summary
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "run.json", "summary.json", "before_after.png", "curves.png"
    }  # fmt: skip
    assert "no jump" in capsys.readouterr().out
    assert run("--resume", "r") == 2 and "teleport trains nothing" in capsys.readouterr().err


def test_a_shaped_reward_runs_in_the_loop_of_another_and_resumes(tmp_path):
    assert run("par", "--steps", 4, "--quiet", "--set", "num_prompts=16", "--set", "k=2", "--out", "whole") == 0
    whole = json.loads((tmp_path / "whole/summary.json").read_text())
    assert whole["config"]["k"] == 2 and whole["loop_config"]["num_prompts"] == 16
    rows = csv.DictReader((tmp_path / "whole/metrics.csv").read_text().splitlines())
    assert all(0 < float(row["reward"]) < 1 for row in rows)
    assert run("par", "--steps", 2, "--quiet", "--set", "num_prompts=16", "--set", "k=2", "--out", "part") == 0
    assert run("--resume", "part", "--steps", 4, "--quiet") == 0
    assert json.loads((tmp_path / "part/summary.json").read_text())["after"] == whole["after"]


def test_constrained_holds_two_rewards_of_the_command_line_and_resumes(tmp_path):
    small = ["constrained", "--quiet", "--set", "num_prompts=16", "--out"]
    assert run(*small, "whole", "--steps", 4) == 0 and run(*small, "part", "--steps", 2) == 0
    assert run("--resume", "part", "--steps", 4, "--quiet") == 0
    whole, part = (json.loads((tmp_path / f"{name}/summary.json").read_text()) for name in ("whole", "part"))
    assert whole["reward"] == "fives,fours" and {"reward_0", "reward_1"} <= set(whole["after"])
    assert part["after"] == whole["after"]


def test_learning_from_pairs_draws_labels_resumes_and_counts_comparisons(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "EVALUATION_SAMPLES", 64)
    small = ["--world", "compass", "--quiet", "--set", "num_pairs=90", "--set", "batch_size=32", "--set", "num_steps=5"]
    assert run("diffusion_dpo", *small, "--steps", "4", "--out", "whole") == 0
    assert "128 comparisons" in capsys.readouterr().out and (tmp_path / "whole/before_after.png").stat().st_size > 1000
    assert run("diffusion_dpo", *small, "--steps", "2", "--out", "part") == 0
    assert run("--resume", "part", "--steps", "4", "--quiet") == 0  # draws and labels the same pairs again
    a, b = (load_file(tmp_path / f"{name}/trainable.safetensors") for name in ("whole", "part"))
    assert all((a[k] == b[k]).all() for k in a)
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert running.title_of(summary) == "diffusion_dpo on compass, labels by 'gold': 128 comparisons"
    assert run("diffusion_dpo", *small, "--set", "labels=votes") == 2
    assert "labels=votes: 'votes' is not one of 'reward', 'bradley_terry'" in capsys.readouterr().err


def test_dragon_takes_rewards_of_a_set_and_of_samples_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "EVALUATION_SAMPLES", 64)
    monkeypatch.setattr(evaluate, "KL_SAMPLES", 8)
    small = ["dragon", "--world", "compass", "--quiet"]
    small += [word for field in ("num_prompts=16", "num_updates=2", "num_steps=4") for word in ("--set", field)]
    assert run(*small, "--steps", 3, "--out", "whole") == 0 and run(*small, "--steps", 2, "--out", "part") == 0
    assert run("--resume", "part", "--steps", 3, "--quiet") == 0
    whole, part = (json.loads((tmp_path / f"{name}/summary.json").read_text()) for name in ("whole", "part"))
    assert whole["reward"] == "like_exemplars" and whole["before"]["reward"] < 0 and part["after"] == whole["after"]
    each = [*small, "--steps", 1, "--set", "selection=instance"]
    assert run(*each, "--out", "each") == 0
    assert json.loads((tmp_path / "each/summary.json").read_text())["reward"] == "gold"
    (tmp_path / "mine.py").write_text("def right(samples, prompts):\n    return (samples[:, 0] > 0).float().mean()\n")
    assert run(*small, "--steps", 1, "--reward", "mine:right", "--out", "mine") == 0
    for arguments, message in [
        ([*small, "--reward", "gold"], "unknown reward of a set 'gold'; There are: like_exemplars, mmd_to_exemplars"),
        ([*each, "--reward", "vendi"], "unknown reward 'vendi'"),
        ([*small, "--world", "line", "--set", "selection=distribution"], "world 'line' has no reward of a set."),
    ]:
        assert run(*arguments, "--out", "bad") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_course_copy_hands_out_the_notebooks_and_overwrites_no_answers(tmp_path, capsys):
    assert cli.main(["course", "copy", "mine"]) == 0
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {f"{chapter.stem}.ipynb" for chapter in methods.CHAPTERS.values()}
    assert cli.main(["course", "copy", "mine"]) == 2 and "already holds 00_tour.ipynb" in capsys.readouterr().err


def test_pretrain_names_what_it_can_make(capsys):
    assert cli.main(["pretrain", "shape"]) == 2
    assert "did you mean 'shapes'?" in capsys.readouterr().err
