"""`minialign pretrain digits_edm` and `patches`: what they shipped, and that they repeat themselves."""

import dataclasses
import functools
import json

import pytest
import torch

from minialign.pretrain import edm
from minialign.worlds import patches
from minialign.worlds.base import WEIGHTS

TINY = edm.Recipe(num_steps=6, batch_size=8, block_out_channels=(8, 16), checkpoints=(2,))


@pytest.mark.parametrize("name", ["digits_edm", "patches"])
def test_the_stored_history_shows_that_the_linear_part_is_learned_first(name):
    history = json.loads((WEIGHTS / name / "history.json").read_text())
    at_one = [next(row for row in rows if row["sigma"] == 1.0) for rows in history.values()]
    explained = [row["explained by gaussian"] for row in at_one]
    assert [int(step) for step in history] == [0, *edm.Recipe().checkpoints, edm.Recipe().num_steps]
    assert explained[0] < 0.1 and max(explained) > 0.8
    assert at_one[-1]["error"] < at_one[-1]["error, gaussian"]


def test_the_recipe_repeats_itself_and_writes_all_or_nothing(tmp_path, monkeypatch):
    for name in ("learned", "evaluate"):  # what they find is written down, and not looked at here
        monkeypatch.setattr(edm, name, functools.partial(getattr(edm, name), num_samples=100))
    state = torch.get_rng_state()
    for folder in ("a", "b"):
        edm.main(tmp_path / folder, recipe=TINY, report=lambda text: None, name="digits_edm")
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / f / "unet/diffusion_pytorch_model.safetensors").read_bytes() for f in ("a", "b")]
    assert weights[0] == weights[1] and not list(tmp_path.glob("*.partial"))
    history = json.loads((tmp_path / "a/history.json").read_text())
    assert list(history) == ["0", "2", "6"] and len(history["6"]) == len(edm.LEVELS)
    assert patches.denoiser(folder=tmp_path / "a").sample_shape == (1, 8, 8)
    card = (tmp_path / "a/README.md").read_text()
    assert "sha256" in card and str(dataclasses.asdict(TINY)["num_steps"]) in card
