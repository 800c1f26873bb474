"""The stored verdicts follow from the stored raw results, the README quotes them, and a small part is run afresh."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from minialign import cli, worlds

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import claim_assistant
import claim_b2diffurl
import claim_b2diffurl_shapes
import claim_consistency
import claim_constrained
import claim_constrained_assistant
import claim_d3po
import claim_ddpo
import claim_diffusion_dpo
import claim_dragon
import claim_dragon_rewards
import claim_find_noise
import claim_grpo
import claim_grpo_shapes
import claim_inpo
import claim_par
import claim_ppo
import claim_prdp
import claim_pso
import claim_raft
import claim_rlcm
import claim_rlcm_shapes
import claim_rpo_subject
import claim_smpo
import claim_teleport


def test_a_verdict_can_fail():
    stored = json.loads((HERE / "results/ddpo.json").read_text())
    assert len(stored["runs"]) == claim_ddpo.SEEDS * len(claim_ddpo.METHODS)
    assert len(stored["kl_runs"]) == claim_ddpo.SEEDS
    swapped = [r | {"success": 1 - r["success"]} for r in stored["runs"]]
    assert claim_ddpo.verdict(swapped, stored["kl_runs"])["verdict"] == "does not replicate in miniature"


CLAIMS = {
    "assistant": claim_assistant,
    "b2diffurl": claim_b2diffurl,
    "b2diffurl_shapes": claim_b2diffurl_shapes,
    "consistency": claim_consistency,
    "constrained": claim_constrained,
    "constrained_assistant": claim_constrained_assistant,
    "d3po": claim_d3po,
    "ddpo": claim_ddpo,
    "diffusion_dpo": claim_diffusion_dpo,
    "grpo": claim_grpo,
    "grpo_shapes": claim_grpo_shapes,
    "inpo": claim_inpo,
    "find_noise": claim_find_noise,
    "dragon": claim_dragon,
    "dragon_rewards": claim_dragon_rewards,
    "par": claim_par,
    "ppo": claim_ppo,
    "prdp": claim_prdp,
    "pso": claim_pso,
    "raft": claim_raft,
    "rlcm": claim_rlcm,
    "rlcm_shapes": claim_rlcm_shapes,
    "smpo": claim_smpo,
    "rpo_subject": claim_rpo_subject,
    "teleport": claim_teleport,
}


def alike(ours: dict, theirs: dict) -> bool:
    """Two bars with the same words and truths, and near numbers; in `text`, "+1,234 +- 5", to one of the last digit.

    Another processor adds in another order, and what it prints may then lie on the other side of a tie.
    """
    words = [bar | dict.fromkeys({"value", "text"} & bar.keys()) for bar in (ours, theirs)]
    texts = [bar.get("text", "0 +- 0").replace(",", "").split(" +- ") for bar in (ours, theirs)]
    digit = 10.0 ** -len(texts[1][0].partition(".")[2])
    near = [abs(float(a) - float(b)) < 1.01 * digit for a, b in zip(*texts, strict=True)]
    return words[0] == words[1] and all(near) and ours["value"] == pytest.approx(theirs["value"], rel=1e-9, abs=1e-9)


def test_bars_are_alike_to_rounding_and_no_further():
    bar = {"id": "gold at 0.1", "value": 0.0125, "text": "+1,000.013 +- 0.002", "threshold": "> 0", "passed": True}
    assert alike(bar | {"value": 0.0125 - 1e-15, "text": "+1,000.012 +- 0.002"}, bar) and alike(bar, bar)
    far = [{"value": 0.01251}, {"value": -0.0125}, {"text": "+1,000.015 +- 0.002"}, {"text": "+1,000.013 +- 0.004"}]
    for change in (*far, {"passed": False}, {"threshold": "> 1"}, {"id": "gold at 0.2"}, {"claimed": True}):
        assert not alike(bar | change, bar), change


@pytest.mark.parametrize("name", CLAIMS)
def test_a_stored_verdict_follows_from_its_raw_results(name):
    stored = json.loads((HERE / f"results/{name}.json").read_text())
    again = CLAIMS[name].verdict(*(stored[raw] for raw in ("runs", "kl_runs") if raw in stored))
    assert [bar["id"] for bar in again["bars"]] == [bar["id"] for bar in stored["bars"]]
    for ours, theirs in zip(again["bars"], stored["bars"], strict=True):
        assert alike(ours, theirs), (ours, theirs)
    assert again["verdict"] == stored["verdict"]


def test_distillation_and_rlcm_can_fail():
    stored = json.loads((HERE / "results/consistency.json").read_text())["runs"]
    base = {r["seed"]: r["error"] for r in stored if r.get("arm") == "undistilled"}
    useless = [r | ({"error": base[r["seed"]]} if r.get("arm") in ("4000", "1500") else {}) for r in stored]
    assert claim_consistency.verdict(useless)["verdict"] == "does not replicate in miniature"
    stored = json.loads((HERE / "results/rlcm.json").read_text())["runs"]
    dear = [r | {"network_evaluations": 10 * r["network_evaluations"]} if r["method"].startswith("RLCM H 4 lr")
            and r["network_evaluations"] else r for r in stored]  # fmt: skip
    assert claim_rlcm.verdict(dear)["verdict"] == "does not replicate in miniature"


def test_one_seed_of_distillation_and_of_rlcm(monkeypatch):
    # stored, five seeds: error of one call 1.04 undistilled, .27 after 1,500 updates; fewer do here
    short = dataclasses.replace(claim_consistency.SHORT, num_iterations=1000)
    monkeypatch.setattr(claim_consistency, "SHORT", short)
    assert claim_consistency.compass_run("1500", 0)["error"]["1"] < 0.5
    monkeypatch.setattr(claim_rlcm, "DISTILLATION", short)
    claim_rlcm.distilled.cache_clear()
    ours = claim_rlcm.compass_run("side", "RLCM H 4 lr 0.001", 0)
    assert ours["network_evaluations"] < 100_000 and 1_500 < ours["queries"] < 7_000  # stored: 49k and 3,800
    claim_rlcm.distilled.cache_clear()


def test_smpo_can_fail():
    stored = json.loads((HERE / "results/smpo.json").read_text())["runs"]
    second = {r["seed"]: r["curve"] for r in stored if r["arm"] == "2 relabelled"}
    same = [r | ({"curve": second[r["seed"]]} if r["arm"] == "3 DDIM inversion" else {}) for r in stored]
    assert "reward after 100 steps, rung 3 minus rung 2" in failed(claim_smpo.verdict(same))
    coarse = [r | {"error": r["error"] | {"ReNoise": r["error"]["DDIM"]}} if "error" in r else r for r in stored]
    assert "inversion error at five steps, ReNoise over DDIM" in failed(claim_smpo.verdict(coarse))
    worse = [
        r | {"curve": [[*row[:3], row[3] - 1] for row in r["curve"]]} if r["arm"].endswith("/ 3, smoothed") else r
        for r in stored
    ]
    bar = "log-density at equal reward, human labels, smoothed minus not"
    assert bar in failed(claim_smpo.verdict(worse)) and bar not in failed(claim_smpo.verdict(stored))
    flat = [r | {"norms": {k: {"slope": 0.0, "tie": 1.0} for k in r["norms"]}} if "norms" in r else r for r in stored]
    assert sum("rung 5" in name for name in failed(claim_smpo.verdict(flat))) == 2


def test_one_seed_of_smpos_ladder(monkeypatch):
    monkeypatch.setattr(claim_smpo, "MOMENTS", (12,))
    monkeypatch.setitem(claim_smpo.SETTINGS, "num_iterations", 12)
    low, high = (claim_smpo.ladder_run(arm, 0)["curve"] for arm in ("1 human labels", "5 smoothed"))
    assert low[0] == high[0] and abs(low[0][2]) < 0.05 and high[1][2] > low[1][2] + 0.03
    assert (low[1][1], high[1][1]) == (12 * 512 * 4, 12 * 512 * 14)


def test_teleportation_fails_where_the_naive_start_is_as_good():
    stored = json.loads((HERE / "results/teleport.json").read_text())["runs"]
    equal = [
        r | {"start": r["start"] | {"teleport, 1": r["start"]["isotropic, 1"]}} if r["world"] == "exact" else r
        for r in stored
    ]
    assert claim_teleport.verdict(equal)["verdict"] == "does not replicate in miniature"
    (named,) = (b for b in claim_teleport.verdict(equal)["bars"] if b["id"].startswith("exact digits, start at 1:"))
    assert not named["passed"]


def test_one_seed_of_teleportation(monkeypatch):
    # stored, five seeds of 2,000 samples: 18.7 without the jump, .45 to 2.5 and .2 to 1; fewer samples add about .3
    monkeypatch.setattr(claim_teleport, "SAMPLES", 400)
    monkeypatch.setattr(claim_teleport, "BUDGETS", (9,))
    monkeypatch.setattr(claim_teleport, "LEVELS", (80.0, 2.5))
    monkeypatch.setattr(claim_teleport, "DROPPED", (0, 8))
    found = claim_teleport.exact_run(0)
    assert found["budget"]["9, 2.5"] < 0.1 * found["budget"]["9, 80"]
    assert found["dropped"]["8"] < found["dropped"]["0"] + 0.05
    assert found["start"]["teleport, 1"] < 0.4 * found["start"]["isotropic, 1"]
    assert found["start"]["rank 2, 1"] > 2 * found["start"]["teleport, 1"]


def test_find_noise_can_fail():
    stored = json.loads((HERE / "results/find_noise.json").read_text())["runs"]
    shifted, bar = "no calibration, reward + 2", "ring: FIND minus FIND without calibration, reward + 2"
    full = {r["seed"]: r["curve"] for r in stored if r["method"] == "full"}
    same = [r | ({"curve": full[r["seed"]]} if r["method"] == shifted else {}) for r in stored]
    lost = [r | ({"curve": [[*row[:3], 0.0] for row in r["curve"]]} if r["method"] == shifted else {}) for r in stored]
    assert bar in failed(claim_find_noise.verdict(same)) and bar not in failed(claim_find_noise.verdict(lost))
    thawed = [r | {"frozen": False} for r in stored]
    assert "runs of FIND in which a weight of the network moved" in failed(claim_find_noise.verdict(thawed))
    flat = [r | {"curve": [[*row[:3], 0.2] for row in r["curve"]]} if r["world"] == "shapes" else r for r in stored]
    assert "shapes, 20 steps: oracle, FIND minus frozen base" in failed(claim_find_noise.verdict(flat))


def test_one_seed_of_find_noise(monkeypatch):
    # stored, five seeds: .131 before, .975 +- .010 at the end
    monkeypatch.setitem(claim_find_noise.EXAMINED, "ring", 64)
    found = claim_find_noise.ring_run("full, reward + 2", 0)
    assert found["curve"][0][3] < 0.3 and found["curve"][-1][3] > 0.85 and found["frozen"] and found["std"] < 0.2
    assert found["curve"][-1][:2] == [480, 9600]


def test_over_optimisation_and_par_can_fail():
    stored = json.loads((HERE / "results/ppo.json").read_text())["runs"]
    far = [r | ({"to_optimum": 0.06} if r.get("beta") == 0.5 and r["seed"] == 3 else {}) for r in stored]
    failed = [b["id"] for b in claim_ppo.verdict(far)["bars"] if not b["passed"]]
    assert any("exact optimum" in name for name in failed)
    stored = json.loads((HERE / "results/par.json").read_text())["runs"]
    vanilla = {r["seed"]: r["gold"] for r in stored if r.get("method") == "vanilla" and r["beta"] == 0.05}
    useless = [
        r | ({"gold": vanilla[r["seed"]]} if r.get("method") == "par" and r["beta"] == 0.05 else {}) for r in stored
    ]
    assert claim_par.verdict(useless)["verdict"] == "does not replicate in miniature"


def test_the_assistants_verdict_can_fail_and_pass():
    stored = json.loads((HERE / "results/assistant.json").read_text())["runs"]
    start = {r["seed"]: r for r in stored if r["method"] == "par" and r["beta"] == claim_assistant.BETA}
    tame = [r | ({"gold": start[r["seed"]]["gold"][: claim_assistant.ROUNDS]}
                 if (r["method"], r["beta"]) == ("vanilla", claim_assistant.BETA) else {}) for r in stored]  # fmt: skip
    failed = {b["id"] for b in claim_assistant.verdict(tame)["bars"] if not b["passed"]}
    assert "equal steps: final gold, PAR minus vanilla" in failed
    level = [r | ({"gold": [2.0] * len(r["gold"])} if r["method"] == "par" else {}) for r in stored]
    passed = {b["id"] for b in claim_assistant.verdict(level)["bars"] if b["passed"]}
    assert "PAR: largest fall in twice the rounds, of five seeds" in passed


def test_one_seed_of_the_assistant():
    # stored, five seeds: after 20 to 30 rounds vanilla is below the base's 1.02 in four, PAR above vanilla in all
    vanilla = claim_assistant.train_run("vanilla", claim_assistant.BETA, 0, 24)
    shaped = claim_assistant.train_run("par", claim_assistant.BETA, 0, 24)
    assert sum(vanilla["gold"][-8:]) / 8 < 0.5 < sum(shaped["gold"][-8:]) / 8 - 0.5
    assert sum(vanilla["proxy"][-8:]) > sum(vanilla["proxy"][:8]) + 4
    assert 0.55 < vanilla["accuracy"] < 0.7


def test_one_seed_of_over_optimisation_and_of_par():
    # sheets: the small proxy's gold turns down by 1.5 and more; PAR ends .8 +- .2 above vanilla over 20 worlds
    run = claim_ppo.exact_run(0, inverted_u=True)
    assert (
        max(run["small"]["gold"]) - run["small"]["gold"][-1] > 0.5 and run["small"]["law"][1] > run["large"]["law"][1]
    )
    held = claim_ppo.ppo_run(0, 0.5, rounds=200)
    assert held["to_optimum"] < 0.1 and held["kl"][-1] > 0.5
    tilted = claim_par.tilt_run(0)["gold"]
    assert tilted["par, 1"] > tilted["vanilla, 1"] > tilted["sgfc, 1"]
    heavy = claim_par.control_run("student", 0)["gold"]
    assert heavy["par, 1"] > heavy["vanilla, 1"] + 0.1


def failed(verdict):
    return {bar["id"] for bar in verdict["bars"] if not bar["passed"]}


def test_constraints_can_fail():
    stored = json.loads((HERE / "results/constrained.json").read_text())["runs"]
    weights = {(r["reference"], r["seed"]): r for r in stored if r.get("method") == "weights"}
    same = [r | ({key: weights[r["reference"], r["seed"]][key] for key in ("v1", "v2", "kl")}
                 if r["part"] == "transfer" else {}) for r in stored]  # fmt: skip
    raised = "raised reference: final E, mu-PPO minus fixed weights, both tuned on world 0"
    assert raised in failed(claim_constrained.verdict(same)) - failed(claim_constrained.verdict(stored))
    near = [r | ({"to_projection": 0.1} if r.get("method") == "xi" else {}) for r in stored]  # its one bar that fails
    assert claim_constrained.verdict(near)["verdict"] == "replicates"
    far = [r | ({"to_projection": 1.0} if r.get("method") == "mu" else {}) for r in stored]
    assert any(name.startswith("mu-PPO: KL to the I-projection") for name in failed(claim_constrained.verdict(far)))
    stored = json.loads((HERE / "results/constrained_assistant.json").read_text())["runs"]
    plain = {r["seed"]: r["gold"] for r in stored if r["method"] == "PPO"}
    useless = [r | ({"gold": plain[r["seed"]]} if r["method"] == "mu" else {}) for r in stored]
    assert "final gold, mu-PPO minus PPO-SAT" in failed(claim_constrained_assistant.verdict(useless))


def test_one_world_of_constraints():
    # stored: PPO's E falls from -.8 to -3.8 in 200 rounds, mu passes its first peak of -.7 there, SAT stands at -.8
    ppo = claim_constrained.Run(2).weighted((1.0, 1.0), 0.02, rounds=150)
    held = claim_constrained.Run(2).train(200, thresholds=claim_constrained.THETA, variant="mu")
    assert claim_constrained.curve_of(ppo.curve)[-1] < max(claim_constrained.curve_of(ppo.curve)) - 1.5
    assert claim_constrained.curve_of(held.curve)[-1] > -1.2 and held.curve["l1"][-1] > 0.65
    exact = claim_constrained.exact_run(3)
    assert all(exact[name]["best"] >= max(exact[name]["theta"], exact[name]["weights"]) for name in ("same", "raised"))
    assert exact["raised"]["theta"] > exact["raised"]["weights"]


def test_one_seed_of_the_constrained_assistant():
    # stored, 80 rounds: mu ends .2 nats from the base with gold 1.2, PPO 21 nats with gold -9
    models = claim_constrained_assistant.reward_models(worlds.load("assistant"), 0)
    ppo = claim_constrained_assistant.train_run(models, "PPO", 0, rounds=16)
    held = claim_constrained_assistant.train_run(models, "mu", 0, (0.21, 0.57), rounds=16)
    assert sum(ppo["gold"][-4:]) / 4 < sum(held["gold"][-4:]) / 4 - 0.5
    assert ppo["kl"][-1] > 3 and held["kl"][-1] < 1


def test_raft_can_fail():
    """If K = 1 gained as much as K = 8 (the sheet's falsifier), if offsets chose winners, if gold never fell."""
    stored = json.loads((HERE / "results/raft.json").read_text())["runs"]
    before = failed(claim_raft.verdict(stored))
    eight = {r["seed"]: r["reward"] for r in stored if r["part"] == "ladder" and r["arm"] == "K 8"}
    alike = [r | ({"reward": eight[r["seed"]]} if (r["part"], r.get("arm")) == ("ladder", "K 1") else {})
             for r in stored]  # fmt: skip
    assert "reward after 3 rounds, K = 8 minus K = 1" in failed(claim_raft.verdict(alike)) - before
    moved = [r | ({"reward": r["reward"] + 1e-9} if (r["part"], r.get("arm")) == ("offsets", "RAFT") else {})
             for r in stored]  # fmt: skip
    new = failed(claim_raft.verdict(moved)) - before
    assert new == {"offsets a(x): what they change in RAFT's result, most of the seeds"}
    tame = [r | ({"gold_again": r["gold"]} if r["part"] == "assistant" else {}) for r in stored]
    tame = [r | ({"gold": sorted(r["gold"])} if r["part"] == "assistant" else {}) for r in tame]
    assert any(name.startswith("assistant: gold's fall") for name in failed(claim_raft.verdict(tame)))


def test_one_seed_of_raft():
    # stored, five seeds; exact best-of-8 and best-of-64 are the closed form
    selected, drifting = (claim_raft.ladder_run(arm, 0, rounds=2) for arm in ("K 8", "K 1"))
    assert selected["reward"][2] > 1.7 and abs(drifting["reward"][2]) < 0.3 and drifting["kl"][2] > 0.5
    assert abs(selected["reward"][1] - selected["best"][1]) < 0.15
    shifted, plain = (claim_raft.rival_run("RAFT", 0.1, 0, True, offset)["reward"] for offset in (True, False))
    assert shifted == plain


def test_b2diffurl_fails_if_it_collapses_like_ddpo():
    stored = json.loads((HERE / "results/b2diffurl.json").read_text())
    entropy = {(r["learning_rate"], r["seed"]): r["entropy"] for r in stored["runs"] if r["method"] == "DDPO"}
    collapsed = [r | {"entropy": entropy[r["learning_rate"], r["seed"]]} for r in stored["runs"]]
    assert claim_b2diffurl.verdict(collapsed)["verdict"] == "does not replicate in miniature"
    never = [r | ({"queries": None} if r["method"] == "B2 official" else {}) for r in stored["runs"]]
    assert not claim_b2diffurl.verdict(never)["bars"][0]["passed"]


def test_one_seed_of_b2diffurl_and_of_ddpo():
    # stored over six seeds, 95 %: entropy 1.368 +- .020 and 1.136 +- .060, evaluations 95k +- 17k and 346k +- 40k
    ours, ddpo = (claim_b2diffurl.compass_run(method, 0.01, 0) for method in ("B2 official", "DDPO"))
    assert ours["entropy"] - ddpo["entropy"] > 0.1
    assert ours["network_evaluations"] < 0.6 * ddpo["network_evaluations"] and ours["queries"] > ddpo["queries"]


def test_d3po_can_fail():
    stored = json.loads((HERE / "results/d3po.json").read_text())["runs"]
    kept = failed(claim_d3po.verdict(stored))
    for arm, key, change, bar in (
        ("D3PO", "reward", lambda x: 0.6 * x, "reward of D3PO after 60 rounds"),
        ("D3PO", "log_p", lambda x: 2 * x, "mean log p of D3PO's samples, the worst seed"),
        ("D3PO without clip", "log_p", lambda x: x / 3, "the same without the clip, the best seed"),
    ):
        bent = [r | ({key: list(map(change, r[key]))} if r["arm"] == arm else {}) for r in stored]
        assert bar in failed(claim_d3po.verdict(bent)) - kept, bar
    weaker = [r | ({"reward": [0.5 * x for x in r["reward"]]} if r["arm"].startswith("SFT") else
                   {"reward": [min(x, 2.0) for x in r["reward"]]} if r["arm"] == "DDPO" else {})
              for r in stored]  # fmt: skip
    assert claim_d3po.verdict(weaker)["verdict"] == "replicates"  # the two bars that fail


def test_one_seed_of_d3po_and_of_its_unclipped_twin():
    # stored, five seeds: 1.84 +- .07 after 40 rounds with log p near the data, 3.38 +- .38 and log p below -10 without
    held, free = (claim_d3po.ring_run(arm, 0, rounds=36) for arm in ("D3PO", "D3PO without clip"))
    assert held["reward"][-1] > 1.3 and held["log_p"][-1] > -4 > free["log_p"][-1]
    assert held["comparisons"] == 36 * 64 and held["values_seen"] == 0


def test_prdp_can_fail():
    stored = json.loads((HERE / "results/prdp.json").read_text())["runs"]
    kept = failed(claim_prdp.verdict(stored))
    far, low = "largest relative error of the gain", "gain uneven over gain even"
    for arm, factor, bar in (
        ("PRDP, few, uneven", 1.12, f"(a) few prompts, PRDP after 60 rounds: {far}"),
        ("PRDP, few, even", 1.2, f"(b) few prompts, PRDP: {low}, the seed farthest from 1"),
        ("DDPO batch, few, even", 0.05, f"(c) few prompts, DDPO with the batch's statistics after 20 rounds: {low}"),
        ("DDPO prompt, many, even", 0.05, f"many prompts, DDPO with its buffers after 20 rounds: {low}"),
        ("PRDP, many, uneven", 0.85, "many prompts, PRDP by pairs after 60 rounds: largest relative error on prompts "
         "never drawn"),
        ("PRDP hot, few, uneven", 1.4, "(d) ten times the learning rate, 20 updates a round: largest relative error "
         "with the clip"),
    ):  # fmt: skip
        bent = [r | ({"gain": [factor * g for g in r["gain"]]} if r["arm"] == arm else {}) for r in stored]
        assert bar in failed(claim_prdp.verdict(bent)) - kept, bar
    needed = [r | ({"gain": [2 * g for g in r["gain"]]} if r["arm"] == "PRDP hot without clip, few, uneven" else {})
              for r in stored]  # fmt: skip
    assert claim_prdp.verdict(needed)["verdict"] == "replicates"  # the one bar that fails


def test_one_seed_of_prdp_and_of_ddpo_in_a_crowd():
    # stored, five seeds: .325 +- .004 after 20 rounds, DDPO .12 +- .06, and 5.9 +- 1.6 without levels
    ours = claim_prdp.crowd_run("PRDP, many, uneven", 0, rounds=16)
    assert ours["gain"][-1] == pytest.approx(ours["target"], rel=0.1)
    drowned, free = (claim_prdp.crowd_run(f"DDPO prompt, many, {kind}", 0, rounds=12) for kind in ("uneven", "even"))
    assert abs(drowned["gain"][-1]) < 0.15 < 1 < free["gain"][-1]


def test_pso_can_fail():
    """If the diffusion loss kept the student sharp (the sheet's falsifier), if comparisons taught nothing, if pairs did
    no better than their winners."""
    stored = json.loads((HERE / "results/pso.json").read_text())["runs"]
    kept = failed(claim_pso.verdict(stored))

    def bent(arm, **columns):
        return [r | ({"curve": r["curve"] | columns} if r["arm"] == arm else {}) for r in stored]

    rows = len(stored[0]["curve"]["step"])
    sharp = failed(claim_pso.verdict(bent("SFT", on_mode=[0.95] * rows))) - kept
    assert {
        "SFT at its first checkpoint with reward 0.6: on-mode share",
        "on-mode share, online minus SFT there",
    } <= sharp
    still = failed(claim_pso.verdict(bent("online, beta 1", reward=[0.0] * rows))) - kept
    assert still == {"online, beta 1, 200 steps: reward"}
    same = next(r["curve"] for r in stored if r["arm"] == "SFT")
    tied = bent("offline, beta 2", reward=same["reward"], on_mode=same["on_mode"])
    assert "reward, offline beta 2 after 200 steps minus SFT where as sharp (within .05)" in failed(
        claim_pso.verdict(tied)
    )


def test_one_seed_of_pso(monkeypatch):
    # stored, five seeds, a better student: online .6 to .7 with 88 to 90 % on a mode after 50 steps, SFT 8 to 21 %
    short = dict(num_paths=2000, num_updates=400, batch_size=192, learning_rate=4e-3)
    monkeypatch.setattr(claim_pso, "DISTILLATION", short)
    monkeypatch.setattr(claim_pso, "NUM_PAIRS", 600)
    claim_pso.distilled.cache_clear()
    ours, blurred = (claim_pso.ring_run(arm, 0, steps=20)["curve"] for arm in ("online, beta 1", "SFT"))
    claim_pso.distilled.cache_clear()
    assert ours["reward"][-1] > ours["reward"][0] + 0.25 and blurred["reward"][-1] > 0.6
    assert ours["on_mode"][-1] > blurred["on_mode"][-1] + 0.3
    assert ours["network_evaluations"][-1] == 20 * 512 * (4 + 3 + 9)


def test_rpo_can_fail():
    """If the last weights were as good, or the best were the last, if the prompt were lost too, if S_I chose alike."""
    stored = json.loads((HERE / "results/rpo_subject.json").read_text())["runs"]
    kept = failed(claim_rpo_subject.verdict(stored))

    def bent(arm, change):
        return failed(claim_rpo_subject.verdict(
            [r | change(r) if (r["world"], r["arm"]) == ("dogs", arm) else r for r in stored]
        )) - kept  # fmt: skip

    alone = {r["seed"]: r["judged"]["last"] for r in stored if (r["world"], r["arm"]) == ("dogs", "references alone")}
    selected = "dogs, RPO: reward of the selected weights minus the last"
    assert selected in bent("RPO", lambda r: {"judged": r["judged"] | {"harmonic": r["judged"]["last"]}})
    assert selected in bent("RPO", lambda r: {"selected": {"harmonic": 400, "image alone": 400}})
    text = "dogs: S_T at the last step, RPO minus references alone"
    assert text in bent("RPO", lambda r: {"judged": r["judged"] | {"last": alone[r["seed"]]}})
    same = bent("references alone", lambda r: {"selected": dict.fromkeys(r["selected"], 200)})
    assert any(name.startswith("dogs, references alone: step selected by S_I") for name in same)


def test_one_seed_of_rpo(monkeypatch):
    # stored, five seeds of 400 steps: selected at 20 to 60, reward .47 +- .06, and .20 +- .03 at the end
    config, base = claim_rpo_subject.ARMS["RPO"]
    short = dataclasses.replace(config, num_iterations=200, samples_per_prompt=32)
    monkeypatch.setitem(claim_rpo_subject.ARMS, "RPO", (short, base))
    found = claim_rpo_subject.dogs_run("RPO", 0)
    assert found["selected"]["harmonic"] <= 120
    assert found["judged"]["harmonic"][0] > found["judged"]["last"][0] + 0.1
    assert found["judged"]["harmonic"][1] > 1.5 * found["judged"]["base"][1] and found["judged"]["last"][2] > 0.85


def test_dragon_can_fail():
    stored = json.loads((HERE / "results/dragon.json").read_text())["runs"]
    each = {r["seed"]: r for r in stored if r.get("arm") == "instance"}
    same = [r | ({key: each[r["seed"]][key] for key in ("frechet", "vendi")} if r.get("arm") == "dataset" else {})
            for r in stored]  # fmt: skip
    bars = failed(claim_dragon.verdict(same)) - failed(claim_dragon.verdict(stored))
    assert len(bars) == 3 and all(name.startswith("plane") for name in bars)
    stored = json.loads((HERE / "results/dragon_rewards.json").read_text())["runs"]
    better = [r | ({"wins": {r["reward"]: 1.0}} if r["reward"] == "number" else {}) for r in stored]  # its bar is near
    assert claim_dragon_rewards.verdict(better)["verdict"] == "replicates"
    useless = [r | {"wins": dict.fromkeys(r["wins"], 0.5)} for r in stored]
    assert len(failed(claim_dragon_rewards.verdict(useless))) > 4


def test_one_seed_of_dragon(monkeypatch):
    # stored, five seeds: after 24 rounds .21 to .44 of set rewards, 4.2 to 7.7 of samples', from a base at 1.5 to 1.8
    monkeypatch.setattr(claim_dragon, "PRETRAINING", 500)
    short = {name: settings | dict(num_iterations=7, num_updates=40) for name, settings in claim_dragon.PLANE.items()}
    monkeypatch.setattr(claim_dragon, "PLANE", short)
    claim_dragon.base_weights.cache_clear()
    crowd, each = (claim_dragon.plane_run(arm, 0) for arm in ("dataset", "instance"))
    assert crowd["frechet"] < 0.7 * crowd["before"]["frechet"] and each["vendi"] < 0.7 * crowd["vendi"]
    found = claim_dragon.table_run(0)
    assert found["r_dataset, swaps"] > found["r_dataset, chance"] + 0.5
    claim_dragon.base_weights.cache_clear()


def test_diffusion_dpo_can_fail():
    stored = json.loads((HERE / "results/diffusion_dpo.json").read_text())["runs"]
    before = failed(claim_diffusion_dpo.verdict(stored))
    for arm, other, bar in (
        ("DPO", "SFT", "(a) reward after 200 steps, DPO minus SFT"),
        ("scorer", "people", "(b) reward after 100 steps, a scorer's labels minus people's"),
        ("one noise", "two noises", "(c) reward after 400 steps, one noise minus two"),
    ):
        same = {r["seed"]: r["reward"] for r in stored if (r["world"], r["arm"]) == ("ring", other)}
        useless = [r | ({"reward": same[r["seed"]]} if (r["world"], r["arm"]) == ("ring", arm) else {}) for r in stored]
        assert bar in failed(claim_diffusion_dpo.verdict(useless)) - before, bar


def test_one_seed_of_diffusion_dpo(monkeypatch):
    # stored, five seeds, after 200 steps: base -.00 +- .02, SFT .63 +- .08, DPO 1.15 +- .06, shuffled .02 +- .02
    monkeypatch.setattr(claim_diffusion_dpo, "EXAMINED", 800)
    monkeypatch.setattr(claim_diffusion_dpo, "NUM_PAIRS", 1000)
    ours, sft = (claim_diffusion_dpo.ring_run(arm, 0, num_steps=60) for arm in ("DPO", "SFT"))
    assert ours["reward"] > sft["reward"] + 0.1 and sft["reward"] > sft["base"] + 0.3
    assert sft["network_evaluations"] == 60 * 256 * 3 and ours["network_evaluations"] == 60 * 256 * 8


def test_the_tables_quote_the_stored_verdicts(capsys):
    names = ("README.md", "tests/claims/README.md", "solutions/00_tour.ipynb", "notebooks/00_tour.ipynb")
    files = [cli.REPOSITORY / name for name in names]
    before = [file.read_text() for file in files]
    try:
        cli.main(["replicate", "--table"])
        assert [file.read_text() for file in files] == before
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)
    assert "DDPO_IS" in capsys.readouterr().out and "5 of 5 bars hold" in before[0]


def test_one_seed_of_importance_sampling_and_of_the_best_baseline():
    # stored over five seeds: .948 +- .025 and .837 +- .028 (95 %); the bars lie four times as far out
    assert claim_ddpo.compass_run("DDPO_IS", 0)["success"] > 0.85
    assert 0.7 < claim_ddpo.compass_run("RWR beta 20.0 lr 0.003", 0)["success"] < 0.95


def test_the_kl_regularised_optimum_is_met():
    run = claim_ddpo.kl_run(0, iterations=400)
    assert run["shift"] == pytest.approx(run["target"], rel=0.05)


def test_unknown_replication(capsys):
    assert cli.main(["replicate", "ddpp"]) == 2
    assert "did you mean 'ddpo'" in capsys.readouterr().err


def test_grpo_can_fail():
    stored = json.loads((HERE / "results/grpo.json").read_text())["runs"]
    base = {r["seed"]: r["trace"]["60"] for r in stored if r["arm"] == "raw rewards"}
    useless = [r | {"trace": r["trace"] | {"60": base[r["seed"]]}} if r["arm"] == "Flow-GRPO" else r for r in stored]
    bars = {bar["id"]: bar["passed"] for bar in claim_grpo.verdict(useless)["bars"]}
    assert not bars["(c) Flow-GRPO minus raw rewards"]
    stored = json.loads((HERE / "results/grpo_shapes.json").read_text())["runs"]
    still = [r | {"after": r["before"]} for r in stored]
    assert claim_grpo_shapes.verdict(still)["verdict"] == "does not replicate in miniature"


def test_one_seed_of_grpo():
    first = claim_grpo.plane_run("Flow-GRPO", 0, rounds=20)["trace"]  # stored: -4.2, then -.8 to -.2
    assert first["20"]["reward"] > first["0"]["reward"] + 2.5
    assert first["20"]["network_evaluations"] == 20 * 192 * (10 + 3 * 9) and first["20"]["queries"] == 20 * 192


def test_inpo_can_fail():
    """If InPO needed as many steps as Diffusion-DPO (the sheet's falsifier), or left the data."""
    stored = json.loads((HERE / "results/inpo.json").read_text())["runs"]
    before, theirs = failed(claim_inpo.verdict(stored)), {r["seed"]: r for r in stored if r["arm"] == "Diffusion-DPO"}
    same = [r | ({"reward": theirs[r["seed"]]["reward"][: len(r["steps"])]} if r["arm"] == "InPO" else {})
            for r in stored]  # fmt: skip
    new = failed(claim_inpo.verdict(same)) - before
    assert "reward: InPO minus Diffusion-DPO, both at 100 steps" in new
    assert "reward: InPO at 100 steps minus Diffusion-DPO at 400" in new
    lost = [r | ({"log_prob": [x - 1 for x in r["log_prob"]]} if r["arm"] == "InPO" and r["seed"] == 2 else {})
            for r in stored]  # fmt: skip
    assert "log-density of InPO's samples at 100 steps, worst seed" in failed(claim_inpo.verdict(lost)) - before


def test_one_seed_of_inpo(monkeypatch):
    # stored, five seeds, 25 steps: .331 +- .058 and .248 +- .043, log-density -2.12
    ours, theirs = (claim_inpo.ARMS[arm][:3] for arm in ("InPO", "Diffusion-DPO"))
    monkeypatch.setattr(claim_inpo, "SAMPLES", 500)
    monkeypatch.setattr(claim_inpo, "PAIRS", 1000)
    monkeypatch.setattr(claim_inpo, "ARMS", {"InPO": (*ours, (25,)), "Diffusion-DPO": (*theirs, (25,))})
    ours, theirs = (claim_inpo.ring_run(arm, 0) for arm in ("InPO", "Diffusion-DPO"))
    assert ours["reward"][1] > theirs["reward"][1] > 0.1 and ours["log_prob"][1] > -3
    assert ours["network_evaluations"][1] * 8 == theirs["network_evaluations"][1] * 18 == 25 * 256 * 8 * 18
