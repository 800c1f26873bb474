"""`minialign pretrain shapes` and `shapes_lcm`: determinism, and folders that the world loads."""

from dataclasses import replace

from minialign.pretrain import shapes as recipe
from minialign.pretrain import shapes_lcm
from minialign.worlds import shapes


def test_the_recipe_writes_a_loadable_folder(tmp_path):
    short = replace(
        recipe.Recipe(),
        num_scenes=60, autoencoder_steps=2, denoiser_steps=2, scorer_steps=2, num_samples=12, num_exact=20,
        samplers=((2, 1.0, 1.0),),
        autoencoder_batch=4, denoiser_batch=4, scorer_batch=4,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    said = []
    first = recipe.main(tmp_path / "out", seed=3, recipe=short, report=said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written is left beside it
    assert not (tmp_path / "out" / "old").exists()
    assert "0.000" in (tmp_path / "out" / "README.md").read_text()
    assert first["oracle"] == (60, 60)
    shapes.load(folder=tmp_path / "out")
    again = recipe.main(tmp_path / "again", seed=3, recipe=short, report=said.append)
    hashes = [(tmp_path / name / "hashes.json").read_text() for name in ("out", "again")]
    assert hashes[0] == hashes[1]
    assert again["psnr"] == first["psnr"]


def test_the_twins_recipe_writes_a_loadable_folder(tmp_path):
    short = shapes_lcm.Recipe(num_scenes=48, num_iterations=2, guided_iterations=2, batch_size=4, num_samples=8)
    rows = shapes_lcm.main(tmp_path / "out", seed=3, recipe=short, report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {name for name, _, _ in rows} == {
        "teacher, eta 0", "teacher, eta 1", "teacher, eta 0, guidance 2.5", "undistilled", "student",
    }  # fmt: skip
    assert shapes.load(model="consistency", folder=tmp_path / "out").policy.num_steps == 4
