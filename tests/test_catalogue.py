"""What there is, is said once: the catalogue against the files, and a method that joins it in three lines."""

import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minialign import cli, describe, methods, prepare, recipes, worlds
from minialign.methods import ANNOUNCED, CATALOGUE, CHAPTERS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "claims" / "results"


# Nothing is listed that is not there, nothing is there that is not listed ---------------------------------------------


def test_every_file_of_methods_is_in_the_catalogue_and_says_what_its_entry_says():
    files = {path.stem for path in (ROOT / "minialign" / "methods").glob("*.py")} - {"__init__"}
    assert files == set(CATALOGUE)
    for name, method in CATALOGUE.items():
        assert method.name == name and method.module.Config(), f"{name} needs a Config whose defaults are possible"
        assert method.arxiv in method.module.__doc__, f"{name}: arXiv {method.arxiv} is not in its docstring"
        assert str(method.year) in method.module.__doc__ and method.authors.split()[0] in method.module.__doc__
        shape = {"shapes rewards": "shape", "trains": "train", "learns from pairs": "train"}.get(method.kind, "trial")
        assert hasattr(method.module, shape), f"{name} ({method.kind}) needs {shape}()"


def test_every_method_has_its_chapter_claims_results_and_tests():
    for name, method in CATALOGUE.items():
        assert method.chapter in CHAPTERS
        assert (ROOT / "tests" / "methods" / f"test_{name}.py").is_file(), f"{name} has no tests"
        for claim in method.claims:
            assert (ROOT / "tests" / "claims" / f"claim_{claim}.py").is_file(), f"{name}: no claim {claim}"
            assert (RESULTS / f"{claim}.json").is_file(), f"{name}: claim {claim} has no stored result"
    claims = {path.stem.removeprefix("claim_") for path in (ROOT / "tests" / "claims").glob("claim_*.py")}
    assert claims == {claim for method in CATALOGUE.values() for claim in method.claims}


@pytest.mark.parametrize("edition", ["solutions", "notebooks"])
def test_the_chapters_are_those_of_each_edition(edition):
    assert {path.stem for path in (ROOT / edition).glob("*.ipynb")} == {c.stem for c in CHAPTERS.values()}


def referred(text: str) -> set[str]:
    """Chapter numbers in a text: "chapter 10", "Chapters 11 and 12"."""
    found = re.findall(r"\bchapters?\s+(\d\d)((?:(?:,| and| to)\s+\d\d)*)", text, flags=re.IGNORECASE)
    return {number for first, rest in found for number in [first, *re.findall(r"\d\d", rest)]}


def unknown_chapters(text: str) -> set[str]:
    return referred(text) - set(CHAPTERS) - set(ANNOUNCED)


def test_chapters_refer_to_chapters_that_exist():
    assert unknown_chapters("as in chapter 10, Chapters 11 and 99") == {"99"}
    assert not set(ANNOUNCED) & set(CHAPTERS), "it has come: take it off the list of the announced"
    for chapter in CHAPTERS.values():
        cells = json.loads((ROOT / "solutions" / f"{chapter.stem}.ipynb").read_text())["cells"]
        words = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        assert not unknown_chapters(words), f"{chapter.stem} refers to chapters that do not exist"


def test_recipes_are_of_methods_worlds_and_fields_that_there_are():
    assert set(recipes.WORLDS) == set(worlds.names())
    for name, world in (*recipes.RECIPES, *recipes.REWARDS):
        assert world in prepare.worlds_of(CATALOGUE[name]), f"{name} does not run in {world}"
    for name, method in CATALOGUE.items():
        assert method.world in prepare.worlds_of(method), f"{name}: no {method.world}"
        for world in prepare.worlds_of(method):
            chosen = prepare.settings(method, world, [])
            known = {**chosen.world, **vars(chosen.config), **(vars(chosen.loop) if chosen.loop else {})}
            assert set(recipes.RECIPES.get((name, world), {})) <= set(known), (name, world)


@pytest.mark.parametrize("name", sorted(recipes.WORLDS))
def test_recipes_say_which_policies_a_world_has(name):
    world, listed = worlds.load(name), recipes.WORLDS[name]
    distilled = {"consistency"} if ("consistency_distillation", name) in recipes.RECIPES else set()
    assert set(listed) == set(world.policies) | distilled
    assert set(recipes.REWARDS.get(("constrained", name), ())) <= set(world.rewards) or name == "tokens"


def test_the_catalogue_is_light():
    code = "import sys, minialign.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_command_line_has_no_table_of_methods():
    for file in ("run", "bench", "cli", "prepare", "describe", "evaluate"):
        text = (ROOT / "minialign" / f"{file}.py").read_text()
        assert not re.findall(r'"(ddpo|rlcm|b2diffurl|ppo|rwr|par|constrained|teleport|reward_model)"', text), file
        assert len(text.splitlines()) <= 450, file


# What follows from it -------------------------------------------------------------------------------------------------


def test_methods_lists_them_with_papers_worlds_and_bars(capsys, monkeypatch):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("ddpo ")]
    assert all(word in line for word in ("10", "trains", "Black et al., 2023 (2305.13301)", "shapes", "5 of 5"))
    assert {line.split()[0] for line in lines[1:] if line} >= set(CATALOGUE)
    monkeypatch.setattr(describe, "RESULTS", Path("nowhere"))
    assert cli.main(["methods"]) == 0 and "5 of 5" not in capsys.readouterr().out


def test_bars_count_what_is_claimed_in_all_claims_of_a_method():
    stored = {name: json.loads((RESULTS / f"{name}.json").read_text())["bars"] for name in CATALOGUE["par"].claims}
    claimed = [bar["passed"] for bars in stored.values() for bar in bars if bar.get("claimed", True)]
    assert methods.bars(CATALOGUE["par"], RESULTS) == (sum(claimed), len(claimed)) and not all(claimed)
    assert methods.bars(CATALOGUE["par"], None) is None


@pytest.mark.parametrize("name", CATALOGUE)
def test_methods_name_prints_the_file_its_settings_and_commands_that_run(name, capsys):
    assert cli.main(["methods", name]) == 0
    printed, module = capsys.readouterr().out, CATALOGUE[name].module
    assert module.__doc__.splitlines()[0] in printed
    for field in module.Config.__dataclass_fields__:
        assert re.search(rf"^    {field}: ", printed, flags=re.MULTILINE), f"{field} is not shown"
    for command in re.findall(r"^minialign (run .*)$", printed, flags=re.MULTILINE):
        args = cli.parser().parse_args(command.split())
        prepare.policy_kind(prepare.find_method(args.method), args.world or CATALOGUE[name].world)


def test_methods_names_what_was_meant(capsys):
    assert cli.main(["methods", "teleprt"]) == 2 and "did you mean 'teleport'?" in capsys.readouterr().err


def test_the_map_has_every_chapter_and_paper_once():
    table = methods.catalogue_table("notebooks/", RESULTS)
    for chapter in CHAPTERS.values():
        assert (
            table.count(f"](notebooks/{chapter.stem}.ipynb)") == 1
            and (ROOT / "notebooks" / f"{chapter.stem}.ipynb").is_file()
        )
    assert all(f"`{name}`: " in table for name in CATALOGUE)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    with pytest.raises(ValueError, match="no chapter '99'"):
        methods.chapter_link("99")


# A method joins -------------------------------------------------------------------------------------------------------

THROW_AWAY = '''
"""Best of two: the pairwise winner is regressed to, once a round (Nobody, 2031, arXiv 3101.00001)."""

from dataclasses import dataclass

import torch

from minialign.loop import Run
from minialign.rewards import checked
from minialign.settings import Count, NonNegative, Settings


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 2  # rounds
    num_prompts: Count = 16  # a round
    learning_rate: NonNegative = 1e-3  # AdamW
    max_grad_norm: NonNegative = 1.0  # l2


def train(policy, reward, prompts, config=Config(), generator=None, resume=None):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate)
    run = Run(config, optimizer, generator, resume, [policy])
    for _ in run.rounds():
        batch = run.draw(prompts, config.num_prompts)
        traj = policy.rollout(batch.prompts, policy.draw_noise(len(batch), run.generator), grad_steps=1)
        scores = checked(reward, policy.decode(traj.final.detach()), batch.prompts)
        run.backward((traj.final - 1).square().mean(), {})
        run.update()
        yield run.step({"reward": scores.mean()}, reward_queries=len(batch))


def floor(policy, config, metrics):
    return {"forward": [config.num_prompts] * (policy.num_steps - 1), "backward": [config.num_prompts]}
'''


@pytest.fixture
def throw_away(tmp_path, monkeypatch):
    """One file, one catalogue entry, one recipe."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "best_of_two.py").write_text(textwrap.dedent(THROW_AWAY))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    entry = methods.Method(
        name="best_of_two", title="Best of two", authors="Nobody", year=2031, arxiv="3101.00001", chapter="10",
        kind="trains", policies=("diffusion",), world="compass", claims=("best_of_two",),
    )  # fmt: skip
    monkeypatch.setitem(CATALOGUE, "best_of_two", entry)
    monkeypatch.setitem(recipes.RECIPES, ("best_of_two", "compass"), dict(num_iterations=3))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("minialign.methods.best_of_two", None)
    vars(methods).pop("best_of_two", None)


def test_a_method_joins_with_one_file_one_entry_and_one_recipe(throw_away, capsys):
    assert cli.main(["methods"]) == 0 and "best_of_two" in capsys.readouterr().out
    assert cli.main(["methods", "best_of_two"]) == 0
    printed = capsys.readouterr().out
    assert "num_prompts: Count = 16  # a round" in printed and "minialign run best_of_two --world ring" in printed
    assert "`best_of_two`: [Nobody, 2031](https://arxiv.org/abs/3101.00001)" in methods.catalogue_table()

    assert cli.main(["run", "best_of_two", "--quiet", "--out", "r", "--set", "num_steps=4"]) == 0
    summary = json.loads((throw_away / "r" / "summary.json").read_text())
    assert summary["iterations"] == 3 and summary["reward_queries"] == 3 * 16
    assert {"before_after.png", "curves.png", "metrics.csv"} <= {path.name for path in (throw_away / "r").iterdir()}
    assert cli.main(["run", "--resume", "r", "--steps", "4", "--quiet"]) == 0

    assert (
        cli.main(["bench", "--methods", "best_of_two", "--worlds", "compass", "--rounds", "1", "--out", "b.json"]) == 0
    )
    (row,) = json.loads((throw_away / "b.json").read_text())
    assert row["method"] == "best_of_two" and row["ratio"] > 0


def test_no_formula_of_a_chapter_breaks_a_line_where_it_names_a_symbol():
    """Two backslashes before a letter: an escape too many; \\beta is shown as a new line and "beta"."""
    for path in [*(ROOT / "solutions").glob("*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                found = re.findall(r"\\\\[a-zA-Z]+", "".join(cell["source"]))
                assert not found, f"{path.parent.name}/{path.name}: {found}"
