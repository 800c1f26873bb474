"""Chapters draw the replications' stored results, from a clone and from a wheel alike."""

import json
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath

import nbformat
import pytest

from minialign.course import stored

ROOT = Path(__file__).parents[2]
MODULE = sys.modules["minialign.course.stored"]  # the package's attribute of that name is the function


def test_in_a_clone_it_is_what_replicate_wrote():
    assert stored("ppo") == json.loads((ROOT / "tests/claims/results/ppo.json").read_text())


def test_without_a_clone_it_is_what_the_wheel_brought(tmp_path, monkeypatch):
    class Shipped(PurePosixPath):
        def locate(self):
            return tmp_path / self.name

    (tmp_path / "ppo.json").write_text('{"verdict": "of the wheel"}')
    (tmp_path / "00_tour.json").write_text("{}")
    names = ("../share/minialign/results/ppo.json", "../share/minialign/notebooks/00_tour.json", "minialign/cli.py")
    monkeypatch.setattr(MODULE, "CLONE", tmp_path / "nowhere")
    monkeypatch.setattr(metadata, "files", lambda name: [Shipped(name) for name in names])
    assert stored("ppo") == {"verdict": "of the wheel"}
    with pytest.raises(FileNotFoundError, match=r"called 'pop'\. There are: ppo\.$"):
        stored("pop")
    monkeypatch.setattr(metadata, "files", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install from a clone or a wheel"):
        stored("ppo")


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_chapter_looks_for_files_of_a_clone(path):
    """A student who installed a wheel has none."""
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not [source for source in code if "REPOSITORY" in source or "claims" in source]
