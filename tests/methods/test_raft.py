"""RAFT: the sheet's closed forms, the exact law after T rounds, its loss by hand, and the ecosystem's own classes."""

import dataclasses
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

POLICIES = Path(__file__).parents[1] / "policies"
sys.path.insert(0, str(POLICIES))

from test_language_policy import MODELS, tokenizer

from minialign import worlds
from minialign.exact import best_of_n, discrete_kl, exponential_tilt
from minialign.loop import fit
from minialign.methods import raft
from minialign.policies.consistency import ConsistencyPolicy
from minialign.policies.diffusion import DiffusionPolicy
from minialign.policies.language import LanguagePolicy

F64 = torch.float64
P, R = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.0, 1.0, 2.0], dtype=F64)
SMALL = raft.Config(num_iterations=2, num_prompts=8, group_size=3, num_tokens=4, num_minibatches=2, learning_rate=0.03)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def table(seed=0, length=2, num_prompts=1):
    """A tabular language model over 6^length responses, ready to train."""
    world = worlds.load("tokens", kind="bigrams", seed=seed, length=length, num_prompts=num_prompts)
    world.policy.train_all_weights()
    return world


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "law", "reward", "kl", "bound"),
    [
        (2, (0.25, 0.39, 0.36), 1.11, 0.140638, 0.193147),
        (4, (0.0625, 0.3471, 0.5904), 1.5279, 0.559751, 0.636294),
        (8, (0.003906, 0.163866, 0.832228), 1.828322, 1.068533, 1.204442),
    ],
)
def test_best_of_k_of_three_answers(k, law, reward, kl, bound):
    """Sheet, check 1."""
    found = best_of_n(P.log(), R, k)
    torch.testing.assert_close(found.log_prob.exp(), torch.tensor(law, dtype=F64), atol=1e-6, rtol=0)
    assert float(found.log_prob.exp() @ R) == pytest.approx(reward, abs=1e-6)
    assert float(found.kl) == pytest.approx(kl, abs=1e-6) and found.bound == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize(("k", "rounds"), [(2, 2), (3, 2), (2, 4)])
def test_rounds_multiply_in_the_exponent(k, rounds, generator):
    """Sheet, check 2: T rounds of best-of-K are one of best-of-K^T; with ties as well, for they share in proportion."""
    log_p = torch.randn(7, generator=generator, dtype=F64).log_softmax(0)
    for p, r in ((P.log(), R), (log_p, torch.tensor([0.0, 1, 1, 3, 3, 3, 5]).double())):
        law = p
        for _ in range(rounds):
            law = best_of_n(law, r, k).log_prob
        torch.testing.assert_close(law, best_of_n(p, r, k**rounds).log_prob, atol=1e-10, rtol=0)


def test_the_tilt_of_equal_kl_has_more_reward():
    """Sheet, check 4: RAFT knows ranks alone, so it is no tilt."""
    tilt, _ = exponential_tilt(P.log(), R, 1 / 1.384401)
    torch.testing.assert_close(tilt.exp(), torch.tensor([0.102341, 0.245153, 0.652506], dtype=F64), atol=1e-6, rtol=0)
    best = best_of_n(P.log(), R, 4)
    assert float(discrete_kl(tilt, P.log())) == pytest.approx(float(best.kl), abs=1e-6)
    assert float(tilt.exp() @ R) == pytest.approx(1.550165, abs=1e-6) and float(best.log_prob.exp() @ R) < 1.53


def test_a_reward_in_an_interval_gains_at_most():
    """Sheet, check 7: B = 1, K = 8: E max - E r <= sqrt(ln 8 / 2) = 1.019667; nearly half of it for a coin."""
    assert math.sqrt(math.log(8) / 2) == pytest.approx(1.019667, abs=1e-6)
    for share in (0.02, 0.1, 0.3):
        p = torch.tensor([1 - share, share], dtype=F64)
        gain = float(best_of_n(p.log(), torch.tensor([0.0, 1.0], dtype=F64), 8).log_prob.exp()[1]) - share
        assert 0.1 < gain < 1.019667


@pytest.mark.parametrize(("k", "local", "top"), [(4, 1.029375, 1.271106), (8, 1.423600, 1.646828)])
def test_gaussian_rewards_local_and_top(k, local, top):
    """Sheet, check 5, of n answers, 4 s.e.; "top" has more reward because it may take all from where it is easy."""
    n, g = 40_000, rng(k)
    rewards, group = torch.randn(n, generator=g, dtype=F64), torch.arange(n) // k
    for strategy, expected in (("local", local), ("top", top)):
        config = raft.Config(group_size=k, strategy=strategy)
        kept = raft.kept_samples(rewards, group, torch.ones(n).bool(), torch.rand(n, generator=g), config)
        assert int(kept.sum()) == n // k
        error = float(rewards[kept].std()) / math.sqrt(n // k)
        assert float(rewards[kept].mean()) == pytest.approx(expected, abs=4 * error) and error < 0.015


# ---- who wins --------------------------------------------------------------------------------------------------------


def select(rewards, allowed=None, **settings):
    rewards = torch.tensor(rewards)
    allowed = torch.ones_like(rewards).bool() if allowed is None else torch.tensor(allowed).bool()
    config = raft.Config(group_size=3, **settings)
    group, tiebreak = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), torch.linspace(0, 1, 9)
    return raft.kept_samples(rewards, group, allowed, tiebreak, config).nonzero().flatten().tolist()


REWARDS = [1.0, 5, 2, 9, 8, 7, 0, 0, 0]  # an easy prompt in the middle, ties at the end


def test_winners_by_hand():
    assert select(REWARDS) == [1, 3, 6]
    assert select(REWARDS, strategy="top") == [3, 4, 5]  # all from the easy prompt
    assert select(REWARDS, keep_winners=2 / 3) == [1, 3]
    assert select(REWARDS, allowed=[1, 0, 1, 0, 1, 1, 0, 0, 0]) == [2, 4]  # the last prompt is skipped
    assert select(REWARDS, allowed=[0] * 9) == [] == select(REWARDS, allowed=[0] * 9, strategy="top")
    assert select(REWARDS, allowed=[0, 0, 0, 0, 0, 0, 0, 0, 1], strategy="top") == [8]  # what is refused fills no place


def test_winners_are_invariant_locally_and_not_over_prompts():
    """Sheet, check 6."""
    moved = [3 * r + c for r, c in zip(REWARDS, [100.0] * 3 + [0.0] * 6, strict=True)]
    assert select(moved) == select(REWARDS)
    assert select(moved, strategy="top") == [0, 1, 2]


def test_a_group_of_one_keeps_all():
    config, rewards = raft.Config(group_size=1), torch.randn(6)
    for strategy in ("local", "top"):
        config = dataclasses.replace(config, strategy=strategy)
        kept = raft.kept_samples(rewards, torch.arange(6), torch.ones(6).bool(), torch.rand(6), config)
        assert kept.all()


def moved(policy, seed=3):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=rng(seed), dtype=p.dtype))
    return policy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_log_ratio_is_that_of_the_untempered_model(temperature):
    world = table()
    before, policy = world.exact.log_prob_ref, moved(world.policy)
    config = dataclasses.replace(SMALL, num_tokens=2, temperature=temperature)
    answers = raft.sampled(policy, ["p0"] * 40, policy.draw_noise(40, 2, rng()), config)
    columns = [world.exact.responses.tolist().index([int(w) for w in text.split()]) for text in answers.samples]
    expected = (world.exact.log_probs(policy.network) - before)[0, columns]
    torch.testing.assert_close(raft.log_ratio_of(policy, answers, config), expected, atol=1e-9, rtol=0)
    # sheet, check 8: with an ever larger beta the winner has the largest log p_0 - log p, whatever its reward
    ranked = torch.randn(40, generator=rng()) - 1e6 * expected
    group = torch.arange(40) // 8
    kept = raft.kept_samples(ranked, group, torch.ones(40).bool(), torch.rand(40), raft.Config())
    best = -expected.view(5, 8).amin(1)
    torch.testing.assert_close(-expected[kept], best)


def test_the_log_ratio_of_a_path_is_the_sum_over_its_steps():
    world = worlds.load("compass", num_steps=3)
    world.policy.network.double()
    world.policy.to("cpu")
    policy, config = moved(world.policy), dataclasses.replace(SMALL, beta=0.1, rows_per_pass=3, steps_per_pass=2)
    with torch.no_grad():
        drawn = raft.sampled(policy, ["inner"] * 5, policy.draw_noise(5, rng()), config)
        expected = torch.zeros(5, dtype=F64)
        for i in range(3):
            at = (drawn.record.states[:, i], i, drawn.record.condition)
            outs = [
                policy.step(*at, next=drawn.record.states[:, i + 1], reduction="sum", reference=r)
                for r in (False, True)
            ]
            expected += outs[0].log_prob - outs[1].log_prob
    torch.testing.assert_close(raft.log_ratio_of(policy, drawn, config), expected)
    assert expected.abs().max() > 0.1


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_supervised_loss_by_hand_and_in_parts():
    log_prob = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])  # lengths 3 and 1
    lengths = torch.tensor([3, 1])
    assert float(raft.supervised_loss(log_prob, lengths, lengths, "token")) == 10 / 4
    assert float(raft.supervised_loss(log_prob, lengths, lengths, "sequence")) == (2 + 4) / 2
    for average in ("token", "sequence"):
        parts = [raft.supervised_loss(log_prob[i : i + 1], lengths[i : i + 1], lengths, average) for i in range(2)]
        assert float(sum(parts)) == float(raft.supervised_loss(log_prob, lengths, lengths, average))


def test_the_mean_over_tokens_is_maximum_likelihood_and_the_mean_within_answers_is_not():
    """The sheet's trap of lengths: the token mean points where the sum over answers does, so no length is favoured."""
    policy = LanguagePolicy(MODELS["gpt2"](), tokenizer())
    policy.train_all_weights()
    answers = policy.responses(["a b", "c", "d e"], ["f", "g h i j k", "a a"])

    def gradient(loss):
        grads = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    log_prob, lengths = policy.log_probs(answers, temperature=1.0), answers.lengths
    by_sum, by_token, by_answer = (
        gradient(loss)
        for loss in (-log_prob.sum(), *(raft.supervised_loss(policy.log_probs(answers), lengths, lengths, average)
                                        for average in ("token", "sequence")))
    )  # fmt: skip
    torch.testing.assert_close(lengths.sum() * by_token, by_sum, atol=1e-4, rtol=1e-3)
    assert torch.cosine_similarity(by_answer, by_sum, 0) < 0.98


def test_the_prompt_is_not_trained_on():
    """LMFlow's code takes the loss on all tokens: the prompt's last token would then move, and here it does not."""
    policy = LanguagePolicy(MODELS["gpt2"](), tokenizer())
    policy.train_all_weights()
    policy.parameters()
    answers = policy.responses(["a b c d"], ["e"])
    with torch.no_grad():
        everything = policy.responses(["a"], ["b c d e"])
        whole = -policy.log_probs(everything).sum() / everything.lengths.sum()
    alone = raft.supervised_loss(policy.log_probs(answers), answers.lengths, answers.lengths, "token")
    torch.testing.assert_close(alone, -policy.log_probs(everything)[:, -2:].mean())  # e and the end
    assert (alone - whole).abs() > 0.1


def test_one_sample_a_prompt_moves_nothing_on_average():
    """Sheet, check 7: K = 1 trains on the model's own law, whose expected score is zero; with K = 2 it is not."""
    world = table()
    policy, law = world.policy, world.exact.log_prob_ref[0].exp()
    everything = policy.responses(["p0"] * 36, world.exact.responses.tolist())
    best = best_of_n(law.log(), world.exact.gold[0], 2).log_prob.exp()
    for weights, still in ((law, True), (best, False)):
        loss = -(weights * policy.log_probs(everything).sum(1)).sum()
        (gradient,) = torch.autograd.grad(loss, policy.parameters())
        assert (gradient.abs().max() < 1e-6) == still


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.optimum("raft")
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_law_of_two_rounds_is_best_of_k_squared(beta):
    """Tables are fitted to 6,000 winners of three a round; 36 responses. With beta = 0 that is best-of-9, to .015 nats,
    as many as 5,000 draws from best-of-3 leave twice; with a ranking KL it is not."""
    world = table(seed=1)
    config = raft.Config(
        num_iterations=2, num_prompts=6000, group_size=3, num_tokens=2, num_epochs=40, num_minibatches=1,
        rows_per_pass=6000, learning_rate=0.1, max_grad_norm=math.inf, beta=beta,
    )  # fmt: skip
    exact, distances = world.exact, []
    for step in raft.train(world.policy, world.rewards["gold"], world.prompts, config, rng()):
        law = exact.log_probs(world.policy.network)
        best = best_of_n(exact.log_prob_ref, exact.gold, 3 ** (step.number + 1)).log_prob
        distances.append(float(discrete_kl(law, best)))
        assert exact.kl(law) > 0.2
    assert max(distances) < 0.015 if beta == 0 else distances[1] > 0.03


def test_a_low_temperature_sharpens_even_without_selection():
    """K = 1 at lambda = .5: the winners are draws from softmax(2 logits), so that is where the model goes, not p."""
    world = table(seed=2, length=1)
    config = raft.Config(
        num_iterations=1, num_prompts=6000, group_size=1, num_tokens=1, num_epochs=60, num_minibatches=1,
        rows_per_pass=6000, learning_rate=0.1, max_grad_norm=math.inf, temperature=0.5,
    )  # fmt: skip
    fit(raft.train(world.policy, world.rewards["gold"], world.prompts, config, rng()), progress=False)
    law, base = world.exact.log_probs(world.policy.network), world.exact.log_prob_ref
    assert float(discrete_kl(law, (2 * base).log_softmax(-1))) < 0.005 < 0.1 < float(discrete_kl(law, base))


def test_every_round_starts_with_a_fresh_adam():
    """One update a round: Adam's first step has the length of its learning rate, and a remembering one's has not."""
    world = table(num_prompts=3)
    config = dataclasses.replace(SMALL, num_iterations=3, num_tokens=2, num_epochs=1, num_minibatches=1)
    weights = [world.policy.network.table.detach().clone()]
    for _ in raft.train(world.policy, world.rewards["gold"], world.prompts, config, rng()):
        weights.append(world.policy.network.table.detach().clone())
    for before, after in itertools.pairwise(weights):
        step = (after - before).abs()
        torch.testing.assert_close(step[step > 1e-4], torch.full_like(step[step > 1e-4], 0.03), atol=1e-3, rtol=0)


def test_the_learning_rate_falls_within_each_round():
    """Of four updates a round with fraction 0: 1, .75, .5, .25 of it, and the next round starts anew."""
    world, rates = table(), []
    config = dataclasses.replace(SMALL, num_tokens=2, num_epochs=2, final_lr_fraction=0.0)
    for step in raft.train(world.policy, world.rewards["gold"], world.prompts, config, rng()):
        rates.append(step.row()["learning_rate"])
    assert rates == pytest.approx([0.25 * 0.03] * 2)
    first = fit(
        raft.train(
            table().policy,
            world.oracle,
            world.prompts,
            dataclasses.replace(config, num_epochs=1, num_minibatches=1, num_iterations=1),
            rng(),
        ),
        progress=False,
    )
    assert first["learning_rate"] == [pytest.approx(0.03)]


def test_the_loss_of_all_samples_is_their_entropy_a_token():
    """K = 1, before the first update: -log p of what was just sampled, however it is cut into passes."""
    for changes in ({}, {"rows_per_pass": 3}, {"average": "sequence"}):
        config = dataclasses.replace(SMALL, num_iterations=1, group_size=1, num_epochs=1, num_minibatches=1, **changes)
        world = table(length=4, num_prompts=3)
        (row,) = fit(raft.train(world.policy, world.oracle, world.prompts, config, rng()), progress=False)
        assert row["loss"] == pytest.approx(row["entropy"] / 4, rel=1e-5)


def test_costs_and_metrics():
    """A round: 24 answers 1 each, 8 winners 3 each and epoch; with a ranking KL the reference 1 more an answer."""
    for changes, per_round in (({}, 24 + 2 * 3 * 8), ({"beta": 0.1}, 48 + 48), ({"strategy": "top"}, 72)):
        world = table()
        config = dataclasses.replace(SMALL, num_tokens=2, **changes)
        history = fit(raft.train(world.policy, world.rewards["gold"], world.prompts, config), progress=False)
        assert history["network_evaluations"] == [per_round, 2 * per_round] and history["reward_queries"] == [24, 48]
        assert all(kept > mean for kept, mean in zip(history["reward_kept"], history["reward"], strict=True))
        assert (
            history["kept"] == [8, 8]
            and history["length_kept"] == [2, 2]
            and ("kl" in history[0]) == bool(changes.get("beta"))
        )


def test_what_is_not_accepted_never_wins():
    world, seen = table(), []

    def without_fives(texts, prompts):
        seen.extend(texts)
        return torch.tensor(["5" not in text for text in texts])

    config = dataclasses.replace(SMALL, num_iterations=1, num_prompts=400, num_tokens=2, num_epochs=30)
    five = (world.exact.responses == 5).any(1)
    before = float(world.exact.log_prob_ref[0].exp()[five].sum())
    steps = raft.train(world.policy, world.rewards["gold"], world.prompts, config, rng(), accept=without_fives)
    (row,) = fit(steps, progress=False)
    after = float(world.exact.log_probs(world.policy.network)[0].exp()[five].sum())
    assert len(seen) == 1200 and row["kept"] < 400 and after < 0.2 * before
    start = world.policy.network.table.detach().clone()
    nothing = raft.train(
        world.policy, world.oracle, world.prompts, config, rng(), accept=lambda t, p: torch.zeros(len(t))
    )
    (row,) = fit(nothing, progress=False)
    assert row["kept"] == 0 and row["grad_norm"] == 0 and torch.equal(world.policy.network.table, start)


def test_selection_is_what_climbs_in_compass():
    """Pictures: K = 8 beats K = 1 at equal training; costs are S a sample and 3 a trained one."""
    ends = {}
    for k in (1, 8):
        world = worlds.load("compass", num_steps=10)
        config = raft.Config(num_iterations=2, num_prompts=256, group_size=k, num_epochs=40, learning_rate=3e-3)
        history = fit(raft.train(world.policy, world.rewards["gold"], world.prompts, config, rng()), progress=False)
        samples = world.policy.sample(world.prompts * 512, generator=rng(1))
        ends[k] = float(world.rewards["gold"](samples, world.prompts * 512).mean())
        assert history["network_evaluations"][0] == 256 * k * 10 + 40 * 256 * 3
    assert ends[8] > ends[1] + 0.09  # 4 s.e. of a difference of two means of 1,024


def test_a_consistency_model_is_trained_on_its_own_samples_too():
    """Four calls a sample, no density asked for; its winners' error of f(x_t) against x_0 falls in a round."""
    world = worlds.load("compass")
    policy = ConsistencyPolicy.from_diffusion(world.policy, num_steps=4)
    policy.train_all_weights()
    config = dataclasses.replace(SMALL, num_prompts=64, num_epochs=20, learning_rate=3e-3)
    history = fit(raft.train(policy, world.rewards["gold"], world.prompts, config, rng()), progress=False)
    assert history["network_evaluations"] == [n * (64 * 3 * 4 + 20 * 64 * 3) for n in (1, 2)]
    assert history["reward_kept"][0] > history["reward"][0] + 0.1 and history["loss"][1] < history["loss"][0]


def test_deterministic_samplers_will_do_unless_their_density_ranks():
    world = worlds.load("compass", num_steps=4, eta=0.0)
    next(raft.train(world.policy, world.rewards["gold"], world.prompts, SMALL))
    with pytest.raises(ValueError, match="eta = 0 makes every step deterministic"):
        next(raft.train(world.policy, world.rewards["gold"], world.prompts, dataclasses.replace(SMALL, beta=0.1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "global"}, "one of 'local', 'top'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"keep_winners": 0.0}, "keep_winners is 0.0; expected a finite number above 0 and at most 1"),
        ({"num_minibatches": 9}, "num_minibatches is 9, more than the 8 samples that a round keeps"),
        ({"beta": -0.1}, "beta is -0.1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    world = table()
    with pytest.raises(ValueError, match=message):
        next(raft.train(world.policy, world.oracle, world.prompts, dataclasses.replace(SMALL, **changes)))


def test_a_policy_that_neither_talks_nor_denoises_is_refused():
    with pytest.raises(ValueError, match="the policy is a Linear; this method needs one that denoises"):
        next(raft.train(torch.nn.Linear(2, 2), None, ["a"]))


def test_accept_is_checked_at_the_border():
    world = table()
    with pytest.raises(ValueError, match=r"'<lambda>' returned a list for 24 samples"):
        next(raft.train(world.policy, world.oracle, world.prompts, SMALL_TABLE, accept=lambda t, p: [True] * len(t)))


SMALL_TABLE = dataclasses.replace(SMALL, num_tokens=2)


# ---- the ecosystem's own classes -------------------------------------------------------------------------------------


def stable_diffusion(folder, **networks):
    spec = importlib.util.spec_from_file_location("policies_conftest", POLICIES / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.stable_diffusion(folder, networks=networks)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stable_diffusion_pipeline_trains_and_its_adapter_loads(dtype, tmp_path):
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipe = stable_diffusion(tmp_path).to(dtype)
    policy = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=3.0)
    noise = policy.draw_noise(4, rng(9))
    plain = policy.sample(["a b", "c"] * 2, noise)
    policy.add_lora(rank=2)
    config = dataclasses.replace(SMALL, num_iterations=1, num_prompts=4, beta=0.01)
    (row,) = fit(raft.train(policy, brightness, ["a b", "c"], config, rng()), progress=False)
    assert row["kept"] == 4 and row["grad_norm"] > 0 and {p.dtype for p in policy.parameters()} == {torch.float32}
    drawn = policy.sample(["a b", "c"] * 2, noise)
    assert (drawn - plain).abs().max() > 1e-3
    policy.save_adapter(tmp_path / "adapter")
    pipe.unload_lora_weights()
    other = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(other.sample(["a b", "c"] * 2, noise), plain)
    pipe.load_lora_weights(tmp_path / "adapter")
    again = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=3.0).sample(["a b", "c"] * 2, noise)
    torch.testing.assert_close(again, drawn, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_transformers_model_trains_and_its_adapter_loads(name, dtype, tmp_path):
    """Answers of unequal lengths; a reward of shortness keeps the short ones. PeftModel loads what is saved."""
    from peft import PeftModel

    policy = LanguagePolicy(MODELS[name]().to(dtype), tokenizer())
    policy.add_lora(rank=2)
    config = dataclasses.replace(SMALL, num_prompts=20, num_tokens=12, beta=0.01, temperature=0.9)

    def shortness(texts, prompts):
        return -torch.tensor([len(text.split()) for text in texts])

    rows = fit(raft.train(policy, shortness, ["a b c", "d"], config, rng()), progress=False)
    assert all(row["length_kept"] < row["length"] and row["grad_norm"] > 0 for row in rows), rows
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    policy.save_adapter(tmp_path)
    again = LanguagePolicy(PeftModel.from_pretrained(MODELS[name]().to(dtype), tmp_path), policy.tokenizer)
    answers = policy.responses(["a b c", "d"], ["e f", "g"])
    with torch.no_grad():
        ours, theirs, base = (
            p.log_probs(answers, reference=r) for p, r in ((policy, False), (again, False), (policy, True))
        )
    torch.testing.assert_close(theirs, ours, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=0)
    assert (ours - base).abs().max() > 1e-3
