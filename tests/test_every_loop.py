"""What holds for every training loop, whatever its paper: one list of loops, one test a law.

A loop that joins the package joins `LOOPS`. All run in float64 (or on a table), so that agreement means equality up to
rounding. Two processes are launched once, for all loops together.
"""

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "methods")]

from test_reward_model import make_tokenizer, network, preferences

from minialign import folder, worlds
from minialign.loop import load_checkpoint, save_checkpoint
from minialign.methods import (
    b2diffurl,
    constrained,
    d3po,
    ddpo,
    diffusion_dpo,
    diffusion_nft,
    dragon,
    find_noise,
    grpo,
    inpo,
    par,
    ppo,
    prdp,
    pso,
    raft,
    reward_model,
    rlcm,
    rpo_subject,
    rwr,
    smpo,
)
from minialign.methods import consistency_distillation as distillation
from minialign.pairs import arranged, bradley_terry, by_reward
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.initial_noise import NoisePolicy
from minialign.subjects import Subject
from minialign.worlds import dogs


@dataclass(frozen=True)
class Loop:
    """start() -> (parameters, train(config, generator, resume, reward)); `reward` replaces the loop's own if given.

    cuts: settings that divide the work and must not change the result. once: the settings of one round with one update,
    where the ratio is 1; None if the loop has no ratio. still: what a constant reward leaves unmoved, given `constant`
    settings: "all" weights, those of the "policy" (its critic learns), or None where there is no such law.
    """

    start: Callable[[], tuple[list, Callable]]
    config: Any
    cuts: dict = field(default_factory=dict)
    once: dict | None = None
    still: str | None = "all"
    constant: dict = field(default_factory=dict)


def distance(samples, prompts):
    """A smooth reward, so that every sample has an advantage of its own."""
    return -(samples - 1).square().sum(1)


def words(texts, prompts):
    """The same for texts."""
    return torch.tensor([sum(ord(c) for c in text) % 7 / 7 for text in texts])


def on_compass(method, wrap=lambda reward: reward, model="diffusion"):
    def start():
        world = worlds.load("compass", model=model, num_steps=5)
        world.policy.network.double()
        world.policy.to("cpu")

        def train(config, generator, resume=None, reward=None):
            return method.train(world.policy, wrap(reward or distance), world.prompts, config, generator, resume)

        return world.policy.parameters(), train

    return start


def several(reward):
    return [reward, lambda samples, prompts: reward(samples, prompts) / 2]


def of_a_set(reward):
    return lambda samples, prompts: reward(samples, prompts).mean()


def shaped(reward):
    return par.Shaped(reward, config=par.Config("clip"))


class Judged:
    """d3po, compared by somebody who errs, with random numbers of the run."""

    @staticmethod
    def train(policy, reward, prompts, config, generator, resume):
        return d3po.train(policy, None, prompts, config, generator, resume, labeller=bradley_terry(reward))


def few_step(method):
    def start():
        world = worlds.load("compass")
        world.policy.network.double()
        world.policy.to("cpu")
        policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=4)
        policy.train_all_weights()

        def train(config, generator, resume=None, reward=None):
            return method.train(policy, reward or distance, world.prompts, config, generator, resume)

        return policy.parameters(), train

    return start


def noise_start():
    world = worlds.load("compass", num_steps=5, eta=0.5)
    world.policy.network.double()
    world.policy.to("cpu")
    policy = NoisePolicy(world.policy, world.prompts)

    def train(config, generator, resume=None, reward=None):
        return find_noise.train(policy, reward or distance, world.prompts, config, generator, resume)

    return policy.parameters(), train


def language_start(method, heads, wrap=lambda reward: reward):
    def start():
        world = worlds.load("tokens", num_prompts=3)
        world.policy.train_all_weights()
        if heads:
            world.policy.add_value_heads(network=world.critic(heads))

        def train(config, generator, resume=None, reward=None):
            return method.train(world.policy, wrap(reward or words), world.prompts, config, generator, resume)

        return world.policy.parameters(), train

    return start


def pairs_start(method, model="diffusion"):
    """Fifteen pairs, so that the shares of two processes are unequal, labelled by the loop's reward."""

    def start():
        world = worlds.load("compass", model=model, num_steps=5)
        world.policy.network.double()
        world.policy.to("cpu")

        def train(config, generator, resume=None, reward=None):
            drawn = torch.randn(2, 15, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
            prompts = ["inner", "outer", "inner"] * 5
            pairs = arranged(prompts, *drawn, by_reward(reward or distance)(*drawn, prompts))
            return method.train(world.policy, pairs, config, generator, resume)

        return world.policy.parameters(), train

    return start


def distillation_start():
    world = worlds.load("compass")
    world.policy.network.double()
    world.policy.to("cpu")
    student = ConsistencyPolicy.from_diffusion(world.policy)

    def data(n, generator):
        samples, prompts = world.real(n, generator)
        return samples.double(), prompts

    def train(config, generator, resume=None, reward=None):
        return distillation.train(student, world.policy, data, config, generator, resume)

    return list(student.network.parameters()), train


def subject_start(of_class=False):
    def start():
        policy, task = dogs.load(base="exact", num_steps=5)
        policy.network.double()
        policy.to("cpu")
        drawn = torch.Generator().manual_seed(1)
        subject = Subject.draw(policy, task, task.references, 2, of_class=of_class, generator=drawn)
        policy.network_evaluations = 0

        def train(config, generator, resume=None, reward=None):
            return rpo_subject.train(policy, task.similarities, subject, config, generator, resume)

        return policy.parameters(), train

    return start


def classifier_start(num_labels):
    def start():
        model = reward_model.RewardModel(network(num_labels=num_labels).double(), make_tokenizer())

        def train(config, generator, resume=None, reward=None):
            return reward_model.train(model, preferences(23), config, generator, resume)

        return list(model.network.parameters()), train

    return start


DDPO = ddpo.Config(
    num_iterations=3, num_prompts=7, group_size=2, num_minibatches=2, learning_rate=3e-3, steps_per_pass=5,
    warmup_updates=5, weight_decay=0.0,
)  # fmt: skip
B2 = b2diffurl.Config(
    num_iterations=3, num_prompts=7, num_branches=3, first_window=2, last_window=4, num_minibatches=2, num_epochs=2,
    learning_rate=3e-3, steps_per_pass=4, clip_range=0.1, history_stages=1, weight_decay=0.0, positive_threshold=0.0,
    negative_threshold=0.0,
)  # fmt: skip
RLCM = rlcm.Config(num_iterations=3, num_prompts=7, group_size=2, num_minibatches=2, learning_rate=3e-3, clip_range=0.1)
PRDP = prdp.Config(
    num_iterations=3, num_prompts=7, group_size=3, num_updates=2, beta=0.5, clip_range=0.01, learning_rate=3e-3,
    prompts_per_pass=3, weight_decay=0.0,
)  # fmt: skip
D3PO = d3po.Config(
    num_iterations=3, num_prompts=7, num_minibatches=2, beta=1.0, clip_range=0.01, learning_rate=3e-3, steps_per_pass=5,
    warmup_updates=5, weight_decay=0.0,
)  # fmt: skip
PSO = pso.Config(num_iterations=3, batch_size=7, num_minibatches=2, beta=5.0, learning_rate=3e-3, pairs_per_pass=3)
PPO = ppo.Config(
    num_iterations=3, num_prompts=7, group_size=3, num_tokens=4, num_minibatches=2, num_epochs=2, learning_rate=0.03,
    kl_target=0.01, kl_horizon=50,
)  # fmt: skip
CONSTRAINED = constrained.Config(
    (0.5, 0.4), num_iterations=3, num_prompts=7, group_size=3, num_tokens=4, num_minibatches=2, num_epochs=2,
    learning_rate=0.03,
)  # fmt: skip
GRPO = grpo.Config(
    num_iterations=3, num_prompts=7, group_size=2, num_minibatches=2, learning_rate=3e-3, steps_per_pass=4,
    warmup_updates=5, weight_decay=0.0, beta=0.1,
)  # fmt: skip
NFT = diffusion_nft.Config(
    num_iterations=3, num_prompts=7, group_size=2, num_minibatches=2, learning_rate=3e-3, levels_per_pass=4,
    weight_decay=0.0, old_rate=0.1,
)  # fmt: skip
RAFT = raft.Config(
    num_iterations=3, num_prompts=7, group_size=3, num_tokens=4, num_minibatches=2, learning_rate=0.03, beta=0.1
)  # fmt: skip
FIND = find_noise.Config(num_iterations=3, group_size=7, learning_rate=3e-3, reduction="sum")
INPO = inpo.Config(num_iterations=3, batch_size=15, pairs_per_pass=6, beta=20.0, learning_rate=3e-3, warmup_updates=5)
DRAGON = dragon.Config(num_iterations=3, num_prompts=7, num_updates=4, minibatch_size=5)
SETS = dataclasses.replace(DRAGON, selection="distribution", paired=False, objective="kto")
DPO = diffusion_dpo.Config(
    num_iterations=3, batch_size=15, pairs_per_pass=15, beta=40.0, learning_rate=3e-3, warmup_updates=5
)
SMPO = smpo.Config(num_iterations=3, batch_size=7, num_inversion_steps=2, beta=40.0, learning_rate=3e-3)
SUBJECT = rpo_subject.Config(
    num_iterations=3, batch_size=5, validate_every=1, samples_per_prompt=3, learning_rate=3e-3, label_scale=2.0
)  # fmt: skip
ONCE = dict(num_iterations=1, num_minibatches=1, num_epochs=1)
KL_OFF = dict(beta=0.0, gae_lambda=1.0, num_iterations=1)

LOOPS = {
    "ddpo": Loop(on_compass(ddpo), DDPO, dict(steps_per_pass=2), ONCE),
    "ddpo with a KL": Loop(
        on_compass(ddpo), dataclasses.replace(DDPO, beta=0.5, timestep_fraction=0.6, baseline="group"),
        dict(steps_per_pass=2), ONCE, constant=dict(beta=0.0),
    ),
    "ddpo on a shaped reward": Loop(on_compass(ddpo, shaped), DDPO, dict(steps_per_pass=2), ONCE),
    "grpo": Loop(
        on_compass(grpo, model="flow"), GRPO, dict(steps_per_pass=2), dict(num_iterations=1, num_minibatches=1)
    ),
    "grpo of extremes, two rewards": Loop(
        on_compass(grpo, several, model="flow"),
        dataclasses.replace(GRPO, best_of=2, group_size=3, same_noise=True, trained_share=0.6, scale="batch", beta=0.0),
        dict(steps_per_pass=1), dict(num_iterations=1, num_minibatches=1),
    ),
    "diffusion_nft": Loop(on_compass(diffusion_nft, model="flow"), NFT, dict(levels_per_pass=1), still=None),
    "b2diffurl": Loop(on_compass(b2diffurl), B2, dict(steps_per_pass=1), ONCE),
    "b2diffurl by pairs": Loop(
        on_compass(b2diffurl), dataclasses.replace(B2, objective="pairwise"), dict(steps_per_pass=1),
        ONCE | dict(first_window=5, last_window=5), still=None,
    ),
    "rlcm": Loop(few_step(rlcm), RLCM, {}, dict(num_iterations=1, num_minibatches=1)),
    "rlcm by rebel": Loop(few_step(rlcm), dataclasses.replace(RLCM, objective="rebel"), {},
                          dict(num_iterations=1, num_minibatches=1)),
    "prdp": Loop(on_compass(prdp), PRDP, dict(prompts_per_pass=2), dict(num_iterations=1, num_updates=1)),
    "prdp by steps": Loop(
        on_compass(prdp), dataclasses.replace(PRDP, steps_per_pass=3, ties=True, shared_start=True),
        dict(steps_per_pass=2), dict(num_iterations=1, num_updates=1),
    ),
    "d3po": Loop(on_compass(d3po), D3PO, dict(steps_per_pass=2), ONCE),
    "d3po by groups, two rewards": Loop(
        on_compass(d3po, several), dataclasses.replace(D3PO, group_size=3, shared_start=False, num_epochs=2),
        dict(steps_per_pass=3), ONCE,
    ),
    "d3po by a labeller": Loop(
        on_compass(Judged), dataclasses.replace(D3PO, refresh_reference=True), dict(steps_per_pass=2), ONCE, None
    ),
    "pso": Loop(
        few_step(pso), PSO, dict(pairs_per_pass=2, steps_per_pass=2), dict(num_iterations=1, num_minibatches=1)
    ),
    "pso offline": Loop(
        few_step(pso), dataclasses.replace(PSO, mode="offline", data_size=20), dict(pairs_per_pass=2), still=None
    ),
    "find_noise": Loop(noise_start, FIND, {}, dict(num_iterations=1, num_epochs=1)),
    "find_noise with a network and a buffer": Loop(
        noise_start, dataclasses.replace(FIND, baseline="value", buffer_rounds=2, kl="moments"), {},
        dict(num_iterations=1, num_epochs=1), None,
    ),
    "ppo": Loop(language_start(ppo, 1), PPO, dict(rows_per_pass=5), ONCE, "policy", KL_OFF),
    "ppo as grpo": Loop(
        language_start(ppo, 1), dataclasses.replace(PPO, advantage="grpo", kl_loss="k3"), dict(rows_per_pass=5), ONCE,
        constant=KL_OFF,
    ),
    "constrained": Loop(language_start(constrained, 3, several), CONSTRAINED, dict(rows_per_pass=5), ONCE, None),
    "constrained images": Loop(
        on_compass(constrained, several),
        dataclasses.replace(CONSTRAINED, baseline="prompt", gae_lambda=1.0, learning_rate=3e-3),
        dict(rows_per_pass=5, steps_per_pass=2), ONCE, None,
    ),
    "rwr": Loop(
        on_compass(rwr), rwr.Config(num_iterations=3, batch_size=15, num_updates=4, minibatch_size=2), still=None
    ),
    "raft": Loop(language_start(raft, 0), RAFT, dict(rows_per_pass=2), still=None),
    "raft over all prompts": Loop(
        language_start(raft, 0), dataclasses.replace(RAFT, strategy="top", average="sequence", temperature=0.7),
        dict(rows_per_pass=2), still=None,
    ),
    "raft images": Loop(
        on_compass(raft), dataclasses.replace(RAFT, keep_winners=0.8, learning_rate=3e-3),
        dict(rows_per_pass=2, steps_per_pass=3), still=None,
    ),
    "dragon": Loop(on_compass(dragon), DRAGON),
    "dragon on sets": Loop(on_compass(dragon, of_a_set), SETS),
    "diffusion_dpo": Loop(pairs_start(diffusion_dpo), DPO, dict(pairs_per_pass=4), still=None),
    "diffusion_dpo, a flow's noise as errors, not shared": Loop(
        pairs_start(diffusion_dpo, "flow"), dataclasses.replace(DPO, shared_noise=False, target="epsilon", loss="ipo"),
        dict(pairs_per_pass=4), still=None,
    ),
    "inpo": Loop(pairs_start(inpo), INPO, dict(pairs_per_pass=4), still=None),
    "inpo by the policy, with a random term": Loop(
        pairs_start(inpo, "flow"),
        dataclasses.replace(INPO, invert_with="policy", inversion_noise=0.1, shared_noise=False, num_inversion_steps=3),
        dict(pairs_per_pass=4), still=None,
    ),
    "distillation": Loop(
        distillation_start, distillation.Config(num_iterations=3, batch_size=15, learning_rate=1e-3), still=None
    ),
    "smpo": Loop(pairs_start(smpo), SMPO, dict(pairs_per_pass=2), still=None),
    "smpo, labels smoothed, on a flow": Loop(
        pairs_start(smpo, "flow"), dataclasses.replace(SMPO, smoothing="label", renoise=False),
        dict(pairs_per_pass=3), still=None,
    ),
    "rpo": Loop(subject_start(), SUBJECT, still=None),
    "rpo, hard labels, the last weights": Loop(
        subject_start(), dataclasses.replace(SUBJECT, labels="hard", selection="last", validate_every=2), still=None
    ),
    "dreambooth": Loop(
        subject_start(of_class=True), dataclasses.replace(SUBJECT, preference_weight=0.0, prior_weight=1.0), still=None
    ),
    "reward model": Loop(
        classifier_start(1), reward_model.Config(batch_size=11, learning_rate=1e-2), still=None
    ),
    "reward model, ODIN": Loop(
        classifier_start(2), reward_model.Config(batch_size=8, learning_rate=1e-2, odin=True), still=None
    ),
}  # fmt: skip


def trained(name: str, resume=None, reward=None, seed=0, **settings):
    """(weights, rows, checkpoints) of a loop with its own settings and these."""
    parameters, train = LOOPS[name].start()
    config, rows, checkpoints = dataclasses.replace(LOOPS[name].config, **settings), [], []
    for step in train(config, torch.Generator().manual_seed(seed), resume, reward):
        rows.append(step.row())
        checkpoints.append({key: value.clone() for key, value in step.checkpoint().items()})
    return torch.cat([p.detach().flatten().double() for p in parameters]), rows, checkpoints


def start_weights(name: str):
    parameters, _ = LOOPS[name].start()
    return torch.cat([p.detach().flatten().double() for p in parameters])


WHOLE = {}


def whole(name: str):
    """The uninterrupted run of one process; run once."""
    if name not in WHOLE:
        WHOLE[name] = trained(name)
    return WHOLE[name]


def assert_same_rows(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert len(ours) == len(theirs) and [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(other[key], abs=tolerance), key


def finite(rows: list[dict]) -> bool:
    return all(value == value and abs(value) < 1e9 for row in rows for value in row.values())


@pytest.mark.parametrize("name", LOOPS)
def test_it_moves_and_reports(name):
    """Weights move, everything reported is finite, costs grow by what a round spends, and never shrink."""
    weights, rows, _ = whole(name)
    assert (weights - start_weights(name)).abs().max() > 1e-4 and finite(rows) and len(rows) == 3
    assert {"step", "network_evaluations", "reward_queries", "grad_norm", "learning_rate", "seconds"} <= rows[0].keys()
    for cost in ("network_evaluations", "reward_queries"):
        spent = [after[cost] - before[cost] for before, after in zip([{cost: 0}, *rows[:-1]], rows, strict=True)]
        assert all(isinstance(s, int) and s >= 0 for s in spent)
    assert rows[-1]["network_evaluations"] > 0


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if loop.cuts])
def test_how_the_work_is_cut_changes_nothing(name):
    weights, rows, _ = whole(name)
    ours, other, _ = trained(name, **LOOPS[name].cuts)
    torch.testing.assert_close(ours, weights, atol=1e-6, rtol=0)
    assert_same_rows(other, rows, 1e-5)


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if loop.once])
def test_the_ratio_is_one_before_the_first_update(name):
    _, rows, _ = trained(name, **LOOPS[name].once)
    assert rows[0]["clip_fraction"] == 0 and abs(rows[0]["approx_kl"]) < 1e-9 and rows[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", [name for name, loop in LOOPS.items() if loop.still])
def test_a_constant_reward_moves_no_weight(name):
    weights, _, _ = trained(
        name, reward=lambda samples, prompts: torch.full((len(samples),), 0.3), **LOOPS[name].constant
    )
    start = start_weights(name)
    assert torch.equal(weights[: len(start)], start) == (LOOPS[name].still == "all")
    if LOOPS[name].still == "policy":  # the critic, whose weights come last, learns the constant
        policy = sum(p.numel() for p in LOOPS[name].start()[0][:1])
        assert torch.equal(weights[:policy], start[:policy])


@pytest.mark.parametrize("name", LOOPS)
def test_resumed_is_uninterrupted(name, tmp_path):
    """Weights, totals and metrics.csv; the checkpoint goes through its file, and the seed it finds is another."""
    weights, rows, checkpoints = whole(name)
    save_checkpoint(checkpoints[0], tmp_path / "checkpoint.safetensors")
    resumed, rest, _ = trained(name, resume=load_checkpoint(tmp_path / "checkpoint.safetensors"), seed=99)
    assert torch.equal(resumed, weights)
    written = []
    for number, part in enumerate((rows, [rows[0], *rest])):
        folder.write_metrics(part, tmp_path / f"{number}.csv")
        written.append((tmp_path / f"{number}.csv").read_bytes())
    assert written[0] == written[1]


# ---- two processes ---------------------------------------------------------------------------------------------------


def everything() -> dict:
    return {name: trained(name)[:2] for name in LOOPS}


@pytest.fixture(scope="module")
def two(by_two_processes):
    return by_two_processes("test_every_loop")


@pytest.mark.parametrize("name", LOOPS)
def test_two_processes_give_what_one_gives(name, two):
    """Seven prompts, or 15 rows, so that the shares are unequal and groups are split."""
    weights, rows, _ = whole(name)
    ours, other = two[name]
    torch.testing.assert_close(ours, weights, atol=1e-6, rtol=0)
    assert_same_rows(other, rows, 1e-5)


def test_a_column_may_appear_later(tmp_path):
    rows = [{"step": 0, "reward": 1.0}, {"step": 1, "reward": 2.0, "kept": 3.0}]
    folder.write_metrics(rows, tmp_path / "metrics.csv")
    with open(tmp_path / "metrics.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"step": "0", "reward": "1.0", "kept": ""} and second["kept"] == "3.0"


def test_a_missed_optimum_says_where_to_look(tmp_path):
    """A failing test that is marked prints the order of the probes, of its own loop; others do not."""
    for name in ("conftest.py", "seconds.py"):
        (tmp_path / name).write_text((Path(__file__).parent / name).read_text())
    fails = "def {name}():\n    assert False\n"
    marked = "import pytest\n\n@pytest.mark.optimum('ppo')\n" + fails.format(name="test_a")
    (tmp_path / "test_it.py").write_text(marked + fails.format(name="test_b"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path).stdout
    assert said.count("where to look") == 1 and '-k "ratio and ppo"' in said and "4 s.e." in said
