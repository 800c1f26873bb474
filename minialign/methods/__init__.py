"""The catalogue: one entry a method, and what follows from it. One paper is one file of this folder.

`minialign methods`, the choices of `run` and `bench`, the maps of the course and its cross-references read `CATALOGUE`
and `CHAPTERS`; nobody else lists methods. Adding a paper: its file, an entry here, its recipes, claim, chapter, tests.
Nothing heavy is imported: a method's own module is loaded when it is asked for.

What a module of this folder must have is a `Config`, and what it does. The rest it may have:

    train(policy, reward, prompts, config, generator, resume) -> steps    what `run` calls where kind is "trains"
    train(policy, pairs, config, ...)         the same where kind is "learns from pairs", which `run` draws and labels
    wrap(policy, prompts) -> policy           what is trained in the place of the policy's weights
    num_value_heads(config) -> int            outputs of the critic that it needs beside a language policy
    shape(policy, reward, prompts, config, generator, **sampling) -> reward    for the loop of another, `Method.loop`
    train(policy, similarities, subject, config, ...)     kind "learns a subject", whose trial makes the subject
    trial(world, config, seed) -> Trial       all else: what is measured before and after, and the picture (evaluate.py)
    takes_sets(config) -> bool                whether its reward is one of a set: reward(samples, prompts) -> one number
    floor(policy, config, metrics) -> dict    network passes that the step just made could not avoid (bench.py)
    bench(device) -> dict                     a row of `minialign bench`, where there are no steps
"""

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[
    "trains",
    "learns from pairs",
    "learns a subject",
    "shapes rewards",
    "learns a reward",
    "samples faster",
    "steers",
    "searches",
]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is known of a method without loading it.

    policies: kinds of policy that it works on, of which a world offers some. world: where to try it first. claims: its
    replications, tests/claims/claim_NAME.py; none, if it is measured in another's alone. loop: the method in whose loop
    it runs, if it has none of its own. several_rewards: its `train` takes a list of them.
    """

    name: str
    title: str
    authors: str
    year: int
    arxiv: str
    chapter: str
    kind: Kind
    policies: tuple[str, ...]
    world: str
    claims: tuple[str, ...]
    loop: str | None = None
    several_rewards: bool = False

    @property
    def paper(self) -> str:
        return f"{self.authors}, {self.year}"

    @property
    def module(self):
        """The method's file, loaded."""
        return importlib.import_module(f"{__name__}.{self.name}")


@dataclass(frozen=True)
class Chapter:
    """A notebook of the course: `stem`.ipynb, in notebooks/ and in solutions/. goal: what you can do afterwards."""

    stem: str
    title: str
    goal: str

    @property
    def number(self) -> str:
        return self.stem[:2]


CATALOGUE = {
    method.name: method
    for method in (
        Method(
            name="teleport", title="Teleportation", authors="Wang and Vastola", year=2024, arxiv="2412.09726",
            chapter="03", kind="samples faster", policies=("diffusion",), world="digits", claims=("teleport",),
        ),
        Method(
            name="consistency_distillation", title="Consistency distillation", authors="Song et al.", year=2023,
            arxiv="2303.01469", chapter="04", kind="samples faster", policies=("diffusion",), world="compass",
            claims=("consistency",),
        ),
        Method(
            name="ddpo", title="DDPO", authors="Black et al.", year=2023, arxiv="2305.13301", chapter="10",
            kind="trains", policies=("diffusion", "flow"), world="shapes", claims=("ddpo",),
        ),
        Method(
            name="rwr", title="Reward-weighted regression", authors="Black et al.", year=2023, arxiv="2305.13301",
            chapter="10", kind="trains", policies=("diffusion", "flow"), world="shapes", claims=(),
        ),
        Method(
            name="b2diffurl", title="B2-DiffuRL", authors="Hu et al.", year=2025, arxiv="2503.11240", chapter="11",
            kind="trains", policies=("diffusion", "flow"), world="shapes", claims=("b2diffurl", "b2diffurl_shapes"),
        ),
        Method(
            name="rlcm", title="RLCM", authors="Oertell et al.", year=2024, arxiv="2404.03673", chapter="12",
            kind="trains", policies=("consistency",), world="shapes", claims=("rlcm", "rlcm_shapes"),
        ),
        Method(
            name="grpo", title="Flow-GRPO and DanceGRPO", authors="Liu et al.", year=2025, arxiv="2505.05470",
            chapter="13", kind="trains", policies=("flow", "diffusion", "consistency"), world="shapes",
            claims=("grpo", "grpo_shapes"), several_rewards=True,
        ),
        Method(
            name="diffusion_nft", title="DiffusionNFT", authors="Zheng et al.", year=2025, arxiv="2509.16117",
            chapter="13", kind="trains", policies=("flow",), world="digits", claims=(),
        ),
        Method(
            name="prdp", title="PRDP", authors="Deng et al.", year=2024, arxiv="2402.08714", chapter="14",
            kind="trains", policies=("diffusion", "flow"), world="crowd", claims=("prdp",),
        ),
        Method(
            name="find_noise", title="FIND", authors="Chen et al.", year=2024, arxiv="2407.19453", chapter="15",
            kind="trains", policies=("diffusion", "consistency", "flow"), world="shapes", claims=("find_noise",),
        ),
        Method(
            name="raft", title="RAFT", authors="Dong et al.", year=2023, arxiv="2304.06767", chapter="16",
            kind="trains", policies=("language", "diffusion", "consistency", "flow"), world="tokens", claims=("raft",),
        ),
        Method(
            name="dragon", title="DRAGON", authors="Bai et al.", year=2025, arxiv="2504.15217", chapter="17",
            kind="trains", policies=("diffusion", "flow"), world="digits", claims=("dragon", "dragon_rewards"),
        ),
        Method(
            name="diffusion_dpo", title="Diffusion-DPO", authors="Wallace et al.", year=2023, arxiv="2311.12908",
            chapter="20", kind="learns from pairs", policies=("diffusion", "flow", "consistency"), world="shapes",
            claims=("diffusion_dpo",),
        ),
        Method(
            name="d3po", title="D3PO", authors="Yang et al.", year=2023, arxiv="2311.13231", chapter="21",
            kind="trains", policies=("diffusion", "flow", "consistency"), world="shapes", claims=("d3po",),
            several_rewards=True,
        ),
        Method(
            name="inpo", title="InPO", authors="Lu et al.", year=2025, arxiv="2503.18454", chapter="22",
            kind="learns from pairs", policies=("diffusion", "flow"), world="digits", claims=("inpo",),
        ),
        Method(
            name="smpo", title="SmPO-Diffusion", authors="Lu et al.", year=2025, arxiv="2506.02698", chapter="23",
            kind="learns from pairs", policies=("diffusion", "flow"), world="digits", claims=("smpo",),
        ),
        Method(
            name="pso", title="PSO", authors="Miao et al.", year=2024, arxiv="2410.03190", chapter="24",
            kind="trains", policies=("consistency", "diffusion"), world="digits", claims=("pso",),
        ),
        Method(
            name="rpo_subject", title="RPO", authors="Miao et al.", year=2024, arxiv="2407.12164", chapter="25",
            kind="learns a subject", policies=("diffusion",), world="shapes", claims=("rpo_subject",),
        ),
        Method(
            name="reward_model", title="Reward models", authors="Ziegler et al.", year=2019, arxiv="1909.08593",
            chapter="50", kind="learns a reward", policies=("language",), world="assistant", claims=(),
        ),
        Method(
            name="ppo", title="PPO for language models", authors="Ziegler et al.", year=2019, arxiv="1909.08593",
            chapter="50", kind="trains", policies=("language",), world="assistant", claims=("ppo",),
        ),
        Method(
            name="par", title="Preference as reward", authors="Fu et al.", year=2025, arxiv="2502.18770", chapter="51",
            kind="shapes rewards", policies=("language",), world="tokens", claims=("par", "assistant"), loop="ppo",
        ),
        Method(
            name="constrained", title="Constrained RLHF", authors="Moskovitz et al.", year=2023, arxiv="2310.04373",
            chapter="52", kind="trains", policies=("language", "diffusion", "consistency", "flow"), world="tokens",
            claims=("constrained", "constrained_assistant"), several_rewards=True,
        ),
    )
}  # fmt: skip

CHAPTERS = {
    chapter.number: chapter
    for chapter in (
        Chapter("00_tour", "A tour", "see alignment happen in a minute, and find your way"),
        Chapter(
            "01_diffusion_as_a_policy", "Diffusion as a policy",
            "write a sampler's transition density, and say why eta = 0 has no gradient",
        ),
        Chapter(
            "02_gaussian_scores", "Gaussian scores",
            "say what a diffusion network learns first, where a matrix explains it, and where it stops",
        ),
        Chapter(
            "03_teleportation", "Teleportation",
            "jump over a sampler's first steps with a closed form, in any solver, and say what the jump really brought",
        ),
        Chapter(
            "04_consistency_models", "Consistency models",
            "distil fifty denoising steps into one jump, and say what ties the jump to the data",
        ),
        Chapter(
            "10_ddpo", "DDPO",
            "train a diffusion model on any reward, check it against exact answers, and see it over-optimise",
        ),
        Chapter(
            "11_b2diffurl", "B2-DiffuRL",
            "say which denoising steps decide what, and train those: growing windows, branches with a shared beginning",
        ),
        Chapter("12_rlcm", "RLCM", "train a model that draws in four calls, and say what its last call cannot learn"),
        Chapter(
            "13_grpo", "Group-relative policies",
            "let a group be its own critic, make a deterministic sampler explore, and say what its memory keeps",
        ),
        Chapter(
            "14_prdp", "PRDP",
            "turn the optimum of a regularised reward into a regression that needs no statistics of prompts, and ends",
        ),
        Chapter(
            "15_find_noise", "Which noise",
            "learn the noise that a frozen sampler starts from, prompt by prompt, and say what that can never do",
        ),
        Chapter(
            "16_raft", "RAFT",
            "train any generator on its own best samples, and say exactly what law T rounds of best-of-K lead to",
        ),
        Chapter(
            "17_dragon", "DRAGON",
            "turn any property of a crowd into a reward, and train on two crowds of which one is better",
        ),
        Chapter(
            "20_diffusion_dpo", "Diffusion-DPO",
            "train a diffusion model on votes, by denoising errors alone, and say why a pair shares its noise",
        ),
        Chapter(
            "21_d3po", "D3PO",
            "train a model on nothing but which of two pictures is better, step by step, and say what holds it",
        ),
        Chapter(
            "22_inpo", "InPO",
            "read a sampler backwards, learn from pairs where the model itself would have been, and count the cost",
        ),
        Chapter(
            "23_smpo", "SmPO",
            "tell a scaled margin from a smoothed label, invert a sampler, and say which part of a recipe did the work",
        ),
        Chapter(
            "24_pso", "PSO",
            "fine-tune a student that draws in four calls, say why the usual loss blurs it, and what comparisons keep",
        ),
        Chapter(
            "25_rpo_subject", "RPO: subjects",
            "teach a model one new thing from four pictures, and stop before it forgets everything else",
        ),
        Chapter(
            "50_reward_models_and_overoptimisation", "Reward models and over-optimisation",
            "learn a reward from comparisons, run PPO on a language model, and see where the proxy stops being true",
        ),
        Chapter(
            "51_reward_shaping", "Reward shaping",
            "put one line between reward model and optimiser, and tell a better reward from a weaker one",
        ),
        Chapter(
            "52_constrained_rlhf", "Constrained RLHF",
            "hold several rewards where each is enough, with learned multipliers, and say when tuned weights do",
        ),
    )
}  # fmt: skip
PARTS = {
    "0": "foundations", "1": "RL on diffusion", "2": "preference optimisation", "3": "reward gradients",
    "4": "steering at inference", "5": "reward models and language", "6": "personalisation", "7": "agents and tools",
    "8": "domains", "9": "capstones",
}  # fmt: skip
# Chapters whose numbers are given; one that stands in CHAPTERS is no longer to come.
ANNOUNCED = {
    "05": "guidance", "06": "ODE or SDE", "07": "fast samplers", "08": "models that eat themselves",
    "26": "IterComp",
    "30": "AlignProp", "31": "DRAKES", "32": "ControlNet++", "33": "R0",
    "40": "Feynman-Kac steering", "41": "SVDD", "42": "ReNO", "53": "and more on reward models",
    "60": "VPL", "61": "PAL", "62": "MiCRo", "63": "PPD", "70": "agents and tools",
    "80": "video, inpainting, 3D, driving", "90": "for instructors", "91": "your own model", "92": "the leaderboard",
}  # fmt: skip


def parts_table() -> str:
    """The tour's map in Markdown: a part of the course a line, what stands in it (linked) and what is to come."""
    lines = ["| part | chapters | to come |", "|---|---|---|"]
    for part, title in PARTS.items():
        here = " · ".join(chapter_link(number) for number in CHAPTERS if number.startswith(part))
        rest = [f"{n} {name}" for n, name in ANNOUNCED.items() if n.startswith(part) and n not in CHAPTERS]
        lines.append(f"| **{part}x {title}** | {here} | {' · '.join(rest)} |")
    return "\n".join(lines)


def chapter_link(number: str, folder: str = "") -> str:
    """`[10 DDPO](10_ddpo.ipynb)`: how a chapter is referred to. Raises ValueError for a number that does not exist."""
    if number not in CHAPTERS:
        raise ValueError(f"there is no chapter {number!r}. There are: {', '.join(CHAPTERS)}.")
    chapter = CHAPTERS[number]
    return f"[{number} {chapter.title}]({folder}{chapter.stem}.ipynb)"


def arxiv_link(method: Method) -> str:
    return f"[{method.paper}](https://arxiv.org/abs/{method.arxiv})"


def taught_in(number: str) -> Iterator[Method]:
    """The methods of a chapter."""
    return (method for method in CATALOGUE.values() if method.chapter == number)


def claimed_bars(method: Method, results: Path | None) -> list[dict]:
    """The bars of a method's stored replications in folder `results` that its paper claims; controls are left out."""
    files = [results / f"{claim}.json" for claim in method.claims] if results is not None else []
    verdicts = [json.loads(file.read_text()) for file in files if file.is_file()]
    return [bar for verdict in verdicts for bar in verdict["bars"] if bar.get("claimed", True)]


def bars(method: Method, results: Path | None) -> tuple[int, int] | None:
    """(bars that hold, bars) of a method's stored replications; None where nothing is stored."""
    claimed = [bar["passed"] for bar in claimed_bars(method, results)]
    return (sum(claimed), len(claimed)) if claimed else None


def bars_text(method: Method, results: Path | None) -> str:
    """ "5 of 6", or "-" where nothing is stored."""
    found = bars(method, results)
    return "{} of {}".format(*found) if found else "-"


def verdict(method: Method, results: Path | None) -> str:
    """ "5 of 6 bars hold; not: reward queries": a method's stored replications in a line."""
    found = bars(method, results)
    if found is None:
        return "no replication of its own"
    names = [bar["id"] for bar in claimed_bars(method, results) if not bar["passed"]]
    return f"{found[0]} of {found[1]} bars hold" + (f"; not: {'; '.join(names)}" if names else "")


def verdicts_table(results: Path | None) -> str:
    """A method a line in Markdown: its file, its paper, its verdict."""
    lines = ["| method | paper | in miniature |", "|---|---|---|"]
    for method in CATALOGUE.values():
        file = f"[`{method.name}`](minialign/methods/{method.name}.py)"
        lines.append(f"| {file} | {method.title}, {arxiv_link(method)} | {verdict(method, results)} |")
    return "\n".join(lines)


def catalogue_table(folder: str = "", results: Path | None = None) -> str:
    """The map of the course in Markdown: a chapter a line, with its methods, papers, and bars that hold.

    folder: of the notebooks, as seen from where the table will stand ("notebooks/"). Without results there is no last
    column.
    """
    columns = ["chapter", "what you can do afterwards", "method: paper", *(["bars that hold"] if results else [])]
    lines = [columns, ["---"] * len(columns)]
    for number, chapter in CHAPTERS.items():
        methods = list(taught_in(number))
        papers = "; ".join(f"`{method.name}`: {arxiv_link(method)}" for method in methods)
        held = [", ".join(bars_text(method, results) for method in methods)] if results else []
        lines.append([chapter_link(number, folder), chapter.goal, papers, *held])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
