"""What every world offers: policies by kind, each built once when it is asked for, or none at all."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minialign import worlds
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy
from minialign.rewards import checked_set
from minialign.worlds import assistant, digits, patches, shapes
from minialign.worlds.base import WEIGHTS, World


def place(**settings):
    """A world of two prompts that are no strings."""
    given = {
        "name": "place",
        "prompts": [(0, 1), (1, 0)],
        "rewards": {"zero": lambda samples, prompts: torch.zeros(len(samples))},
        "default_reward": "zero",
        "oracle": lambda samples, prompts: torch.ones(len(samples)),
        "real": lambda n, generator=None: (torch.zeros(n, 2), [(0, 1)] * n),
        "show": lambda samples, prompts: None,
    }
    return World(**given | settings)


def test_policies_are_built_once_and_when_asked():
    built = []
    kinds = ("diffusion", "flow")
    world = place(policies={kind: lambda kind=kind: built.append(kind) or object() for kind in kinds})
    assert list(world.policies) == list(kinds) and len(world.policies) == 2 and "flow" in world.policies
    assert built == []
    assert world.policies["flow"] is world.policies["flow"] and built == ["flow"]
    assert world.policy is world.policies["diffusion"] and built == ["flow", "diffusion"]  # the first is the default
    assert dataclasses.replace(world, policy_kind="flow").policy is world.policies["flow"]
    assert built == ["flow", "diffusion"]


def test_a_kind_that_is_not_there_is_named():
    world = place(policies={"diffusion": object, "flow": object})
    with pytest.raises(ValueError, match=r"world 'place' has no 'language' policy\. There are: diffusion, flow."):
        world.policies["language"]
    with pytest.raises(ValueError, match="has no 'language' policy"):
        dataclasses.replace(world, policy_kind="language")


def test_a_world_may_have_no_policy():
    world = place()
    assert len(world.policies) == 0 and world.policy_kind is None
    with pytest.raises(ValueError, match="world 'place' has no policy: it offers data, rewards and an oracle"):
        _ = world.policy
    with pytest.raises(ValueError, match=r"no 'diffusion' policy\. There are: none\."):
        world.policies["diffusion"]
    samples, prompts = world.real(3)
    assert world.rewards["zero"](world.encode(samples), prompts).shape == (3,)


def test_shapes_offers_three_kinds():
    world = worlds.load("shapes", num_steps=3)
    assert list(world.policies) == ["diffusion", "consistency", "flow"]
    assert isinstance(world.policy, DiffusionPolicy) and world.policy.num_steps == 3
    twin = world.policies["consistency"]  # as shipped: the settings given were those of the default
    assert isinstance(twin, ConsistencyPolicy) and twin.num_steps == 4
    assert worlds.load("shapes", model="consistency").policy_kind == "consistency"


@pytest.mark.parametrize("name", worlds.names())
def test_every_world_says_what_its_oracle_means(name):
    world = worlds.load(name)
    samples, prompts = world.real(40, torch.Generator().manual_seed(0))
    scores = world.oracle(samples, prompts)
    assert world.oracle_scale == ("points" if name in ("assistant", "tokens") else "binary")
    assert set(scores.unique().tolist()) <= {0.0, 1.0} or world.oracle_scale == "points"
    assert world.policy is world.policies[world.policy_kind]
    states = world.encode(samples)
    assert len(states) == 40 and not set(world.prompts) & set(world.held_out)


# ---- weights left to chance


@pytest.mark.parametrize(
    ("name", "part", "load"),
    [
        ("digits", "unet", lambda folder: digits.load_unet(folder)),
        ("digits_edm", "unet", lambda folder: patches.denoiser("digits_edm", folder)),
        ("patches", "unet", lambda folder: patches.denoiser("patches", folder)),
        ("assistant", ".", lambda folder: assistant.load_model(folder)),
        ("assistant", ".", lambda folder: assistant.reward_network("base", folder=folder)),
        ("shapes", "scorer", lambda folder: shapes.load_scorer(folder)),
        ("shapes", "text_encoder", lambda folder: shapes.load_pipeline(folder)),
        ("shapes", "vae", lambda folder: shapes.load_pipeline(folder)),
        ("shapes", "unet", lambda folder: shapes.load_pipeline(folder)),
        ("shapes_lcm", "text_encoder", lambda folder: shapes.load_pipeline(folder, "consistency")),
    ],
)
def test_a_file_without_one_of_its_weights_is_refused(tmp_path, name, part, load):
    """The libraries would draw it at random. A true hash does not help: another library may call it otherwise."""
    folder = shutil.copytree(WEIGHTS / name, tmp_path / name)
    load(folder)
    file = next(path for path in (folder / part).glob("*.safetensors") if path.stem != "answers")
    weights = load_file(file)
    lost = sorted(weights)[-1]
    save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
    if (folder / "hashes.json").exists():
        hashes = json.loads((folder / "hashes.json").read_text())
        hashes[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(FileNotFoundError, match=rf"missing are \S*{lost.rpartition('.')[2]}, .*pretrain {name}"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("ring", {"like_exemplars": (0, 4), "mmd_to_exemplars": (0, 4), "vendi": range(8)}, (2, 6)),
        ("compass", {"like_exemplars": (0, 1, 6, 7), "mmd_to_exemplars": (0, 1, 6, 7), "vendi": range(8)}, (2, 3)),
    ],
)
def test_rewards_of_a_set_prefer_the_components_that_they_show(name, better, worse):
    world = worlds.load(name)
    samples, component = world.mixture.sample(1500, torch.Generator().manual_seed(0))
    for reward, good in better.items():
        scores = [
            float(checked_set(world.set_rewards[reward](), samples[row][:150], ["x"] * 150))
            for row in (torch.isin(component, torch.tensor(tuple(which))) for which in (good, worse))
        ]
        assert scores[0] > scores[1], reward
