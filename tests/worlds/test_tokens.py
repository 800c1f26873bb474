"""The enumerable worlds (tables, laws, proxies) and the assistant (its words, gold, preferences, shipped model)."""

import hashlib
import itertools
import json
import math
import re

import pytest
import torch

from minialign import exact, worlds
from minialign.policies.language import LanguagePolicy
from minialign.worlds import assistant, tokens
from minialign.worlds.base import WEIGHTS


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- responses, listed


def test_responses_are_all_words_in_order():
    table = tokens.enumerate_responses(3)
    assert [tuple(row) for row in table.tolist()] == list(itertools.product(range(6), repeat=3))
    assert torch.equal(tokens.index_of(table), torch.arange(216))
    assert tokens.index_of(torch.tensor([[[0, 0, 5, 2]], [[1, 0, 0, 0]]])).tolist() == [[32], [216]]
    assert (tokens.num_prefixes(1), tokens.num_prefixes(4)) == (1, 259)


def test_the_tree_says_what_its_table_holds():
    """Stepwise, by hand-counted prefix numbers: "" 0, "a" 1 + a, "a b" 7 + 6 a + b."""
    table = torch.randn(2, tokens.num_prefixes(3), 6, generator=rng(), dtype=torch.float64)
    tree = tokens.PrefixTree(table)
    log_probs = table.log_softmax(-1)
    expected = [
        [
            log_probs[p, 0, a] + log_probs[p, 1 + a, b] + log_probs[p, 7 + 6 * a + b, c]
            for a, b, c in itertools.product(range(6), repeat=3)
        ]
        for p in range(2)
    ]
    torch.testing.assert_close(tree.all_log_probs(), torch.tensor(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens.all_log_probs(tree, 2, 3), tree.all_log_probs(), rtol=0, atol=1e-12)
    assert torch.equal(tree(torch.tensor([[7, 4, 2]])).logits[0], table[1, [0, 5, 7 + 26]])


def test_the_tree_does_not_mind_padding():
    table = torch.randn(2, tokens.num_prefixes(3), 6, generator=rng(1))
    tree = tokens.PrefixTree(table)
    plain = tree(torch.tensor([[7, 4, 2]])).logits
    ids, mask = torch.tensor([[3, 5, 7, 4, 2, 1]]), torch.tensor([[0, 0, 1, 1, 1, 0]])
    assert torch.equal(tree(ids, attention_mask=mask).logits[:, 2:5], plain)


@pytest.mark.parametrize("model", ["table", "transformer"])
def test_laws_sum_to_one_and_agree_with_the_policys_scores(model):
    world = worlds.load("tokens", model=model)
    table = world.exact
    torch.testing.assert_close(table.log_prob_ref.exp().sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
    prompts = [world.prompts[i % 4] for i in range(96)]
    drawn = world.policy.generate(prompts, world.num_tokens, generator=rng(2))
    assert drawn.mask.all() and drawn.tokens.shape == (96, 4) and drawn.tokens.max() < 6
    scored = world.policy.log_probs(drawn)
    listed = table.log_prob_ref[torch.arange(96) % 4, tokens.index_of(drawn.tokens)]
    torch.testing.assert_close(scored.sum(1).double(), listed, rtol=0, atol=2e-5)
    torch.testing.assert_close(drawn.log_probs.sum(1).double(), listed, rtol=0, atol=2e-5)


def test_gradients_reach_the_table():
    """d log pi(y) / d logits at y's own prefixes is one_hot - softmax; nowhere else."""
    world = tokens.padding(0)
    tree = world.network.requires_grad_(True)
    tree.all_log_probs()[1, tokens.index_of(torch.tensor([5, 2, 0, 3]))].backward()
    visited = {0: 5, 6: 2, 7 + 32: 0, 43 + 6 * 32: 3}
    rest = tree.table.grad.clone()
    for prefix, word in visited.items():
        expected = torch.eye(6, dtype=torch.float64)[word] - tree.table[1, prefix].softmax(-1)
        torch.testing.assert_close(rest[1, prefix], expected, rtol=0, atol=1e-12)
        rest[1, prefix] = 0
    assert rest.abs().max() < 1e-15


def test_a_policy_samples_its_law():
    """Counts of 20,000 draws over 6 x 6 groups of responses: chi-squared with 35 degrees of freedom, 4 sd at 68."""
    world = worlds.load("tokens")
    drawn = world.policy.generate(["p2"] * 20_000, 4, generator=rng(3))
    counts = torch.bincount(6 * drawn.tokens[:, 1] + drawn.tokens[:, 3], minlength=36).double()
    law = world.exact.log_prob_ref[2].exp().view(6, 6, 6, 6).sum((0, 2)).flatten() * 20_000
    assert ((counts - law) ** 2 / law).sum() < 35 + 4 * math.sqrt(70)


def test_the_critic_is_a_table_of_zeros():
    world = worlds.load("tokens")
    world.policy.train_all_weights()
    world.policy.add_value_heads(network=world.critic(2))
    drawn = world.policy.generate(world.prompts, 4, generator=rng())
    values = world.policy.values(drawn)
    assert values.shape == (4, 4, 2) and not values.any()
    values.sum().backward()
    grad = world.policy.value_parameters()[0].grad
    assert (grad != 0).any(-1).sum() == 16 and grad.max() == 1  # four prefixes a prompt, once each


# ---- their rewards


def test_gold_and_proxy_of_the_padding_world():
    world = tokens.padding(3)
    prob = world.log_prob_ref.exp()
    torch.testing.assert_close((prob * world.gold).sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((prob * world.gold**2).sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    count = (world.responses == 5).sum(1).double()
    # gold up to its scale s is q + c/2 - c^2/2, and the proxy q + 1.5 c + noise: their gap in c, prompt by prompt
    for p in range(4):
        inputs = torch.stack([torch.ones_like(count), count, count**2], 1)
        inputs = torch.cat([inputs, world.proxies["proxy"][p].unsqueeze(1)], 1)
        _, linear, square, slope = torch.linalg.lstsq(inputs, world.gold[p].unsqueeze(1)).solution.flatten()
        assert square / slope == pytest.approx(-0.5, abs=0.1)
        assert linear / slope == pytest.approx(0.5 - 1.5, abs=0.2)
    means = torch.stack([world.gold[:, count == c].mean(1) for c in range(5)], 1)
    assert (means[:, 4] < means[:, 1] - 1).all()  # an inverted U, and
    proxies = torch.stack([world.proxies["proxy"][:, count == c].mean(1) for c in range(5)], 1)
    assert (proxies.diff(dim=1) > 0.5).all()  # a proxy that does not know it


def test_reward_tables_are_read_by_text_and_by_number():
    world = worlds.load("tokens")
    table = world.exact
    expected = torch.stack([table.gold[1, 32], table.gold[3, 1295]]).float()
    assert torch.equal(world.rewards["gold"](["0 0 5 2", "5 5 5 5"], ["p1", "p3"]), expected)
    assert torch.equal(world.rewards["gold"](torch.tensor([[0, 0, 5, 2], [5, 5, 5, 5]]), ["p1", "p3"]), expected)
    with pytest.raises(ValueError, match="unknown prompt 'p4'"):
        world.rewards["gold"](["0 0 5 2"], ["p4"])
    with pytest.raises(ValueError, match=r"samples\[1\] is '0 6 0 0'; expected 4 words"):
        world.rewards["proxy"](["0 0 5 2", "0 6 0 0"], ["p0", "p0"])


def test_features_by_hand():
    found = tokens.features(torch.tensor([[5, 5, 5, 1]]), bigrams=True)[0]
    assert found[:24].nonzero().flatten().tolist() == [5, 11, 17, 19]
    assert found[24:].view(6, 6).nonzero().tolist() == [[5, 1], [5, 5]] and found[24 + 35] == 2
    assert torch.equal(tokens.features(torch.tensor([[5, 5, 5, 1]]))[0], found[:24])


def test_comparisons_are_drawn_from_the_law_and_labelled_by_gold():
    log_prob = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log()
    gold = torch.tensor([0.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    chosen, rejected = tokens.comparisons(log_prob, gold, 20_000, rng())
    assert (gold[chosen] >= gold[rejected]).all() and chosen.max() == 2
    # both sides together are 40,000 draws: each share within 4 standard errors
    shares = torch.bincount(torch.cat([chosen, rejected]), minlength=4) / 40_000
    assert (shares - torch.tensor([0.5, 0.3, 0.2, 0.0])).abs().max() < 4 * math.sqrt(0.25 / 40_000)
    chosen, rejected = tokens.comparisons(log_prob, gold, 20_000, rng(), noise=0.25)
    differ = chosen != rejected
    wrong = (gold[chosen] < gold[rejected])[differ].double().mean()
    assert wrong == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / int(differ.sum())))
    with pytest.raises(ValueError, match=r"noise is 1\.5"):
        tokens.comparisons(log_prob, gold, 2, rng(), noise=1.5)


def test_bradley_terry_finds_the_weights_that_labelled():
    """Labels drawn from a logistic law: the estimate is within 4 standard errors of the truth, and stationary."""
    generator = rng(4)
    responses = tokens.enumerate_responses(2)
    inputs = torch.randn(36, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    first, second = torch.randint(len(responses), (2, 20_000), generator=generator)
    difference = inputs[first] - inputs[second]
    wins = torch.rand(20_000, generator=generator) < (difference @ truth).sigmoid()
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    scores = tokens.fit_bradley_terry(inputs, chosen, rejected, l2=0.0)
    weights = torch.linalg.lstsq(inputs, scores.unsqueeze(1)).solution.flatten()
    variance = ((difference @ truth).sigmoid() * (-(difference @ truth)).sigmoid()).unsqueeze(1)
    errors = torch.linalg.inv(difference.T @ (variance * difference)).diagonal().sqrt()
    assert ((weights - truth).abs() < 4 * errors).all()
    gradient = ((inputs[chosen] - inputs[rejected]) * -(scores[rejected] - scores[chosen]).sigmoid().unsqueeze(1)).mean(
        0
    )
    assert gradient.abs().max() < 1e-5
    shrunk = tokens.fit_bradley_terry(inputs, chosen, rejected, l2=0.1)
    assert shrunk.std() < scores.std()


# ---- exact curves


def test_best_of_n_is_what_n_draws_give():
    """Against a simulation of best-of-4, within 4 standard errors; and the limits n = 1 and n -> infinity."""
    world = tokens.padding(1)
    log_prob, proxy, gold = world.log_prob_ref[0], world.proxies["proxy"][0], world.gold[0]
    curve = tokens.best_of_n_curve(log_prob, proxy, gold, [1, 4, 10**9])
    assert curve.kl[0] == pytest.approx(0, abs=1e-12) and curve.gold[0] == pytest.approx(0, abs=1e-9)
    assert curve.gold[2] == pytest.approx(float(gold[proxy.argmax()]), abs=1e-6)
    draws = torch.multinomial(log_prob.exp(), 80_000, replacement=True, generator=rng()).view(20_000, 4)
    best = draws.gather(1, proxy[draws].argmax(1, keepdim=True))[:, 0]
    for table, value in ((proxy, curve.proxy[1]), (gold, curve.gold[1])):
        assert float(table[best].mean()) == pytest.approx(
            float(value), abs=4 * float(table[best].std()) / math.sqrt(20_000)
        )


def test_kl_of_best_of_n_stays_under_its_bound():
    """Sheet ppo_rlhf, check 3; the bound's numbers and its limit are tested with `exact`."""
    world, numbers = tokens.overoptimisation(0, num_comparisons=500), [2, 16, 1000, 60_000]
    curve = tokens.best_of_n_curve(world.log_prob_ref[0], world.proxies["small"][0], world.gold[0], numbers)
    bounds = torch.tensor([math.log(n) - (n - 1) / n for n in numbers], dtype=torch.float64)
    assert (curve.kl < bounds + 1e-9).all()
    assert curve.kl[:3] == pytest.approx(bounds[:3], abs=1e-3)  # 46,656 atoms are small, beside 1 / 1000
    assert 0.001 < bounds[3] - curve.kl[3] < 0.1


def test_the_optimum_trades_reward_for_kl():
    """Sheet ppo_rlhf, check 6, on a world: KL and E[r] fall with beta, E[r] - beta KL = beta log Z."""
    world = tokens.padding(2)
    kls, means = [], []
    for beta in (0.2, 0.5, 1.0, 3.0):
        law, log_z = exact.exponential_tilt(world.log_prob_ref, world.proxies["proxy"], beta)
        kls.append(exact.discrete_kl(law, world.log_prob_ref))
        means.append((law.exp() * world.proxies["proxy"]).sum(-1))
        torch.testing.assert_close(means[-1] - beta * kls[-1], beta * log_z, rtol=0, atol=1e-9)
    assert (torch.stack(kls).diff(dim=0) < 0).all() and (torch.stack(means).diff(dim=0) < 0).all()


def test_tilt_to_a_given_kl():
    world = tokens.padding(0)
    law = tokens.tilt_to_kl(world.log_prob_ref, world.proxies["proxy"], 1.25)
    torch.testing.assert_close(
        exact.discrete_kl(law, world.log_prob_ref), torch.full((4,), 1.25, dtype=torch.float64), rtol=0, atol=1e-9
    )
    strength = (law - world.log_prob_ref).diff(dim=-1) / world.proxies["proxy"].diff(dim=-1)  # a tilt: one t a prompt
    torch.testing.assert_close(strength, strength[:, :1].expand_as(strength), rtol=1e-6, atol=0)
    moved = tokens.tilt_to_kl(world.log_prob_ref, 100 * world.proxies["proxy"] - 7, 1.25)
    torch.testing.assert_close(moved, law, rtol=0, atol=1e-8)
    even = torch.full((4,), math.log(0.25), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"less than 0\.6931"):  # two equal best: log 2 nats at most
        tokens.tilt_to_kl(even, torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64), 0.7)


def test_a_small_reward_model_is_over_optimised_and_a_large_one_less():
    """Sheet ppo_rlhf, bars (a) to (c), on two seeds; the replication has five."""
    numbers = [1, 4, 16, 64, 256, 1000, 4000, 16_000, 60_000]
    for seed in (0, 1):
        world = tokens.overoptimisation(seed)
        small, large = (
            tokens.best_of_n_curve(world.log_prob_ref[0], world.proxies[name][0], world.gold[0], numbers)
            for name in ("small", "large")
        )
        assert (small.proxy.diff() > 0).all()
        assert small.gold.max() - small.gold[-1] > 0.5
        assert large.gold.max() > small.gold.max()
    plain = tokens.overoptimisation(1, inverted_u=False)
    curve = tokens.best_of_n_curve(plain.log_prob_ref[0], plain.proxies["small"][0], plain.gold[0], numbers)
    assert curve.gold.max() - curve.gold[-1] < 0.1  # without the inverted U nothing turns


def test_errors_of_a_proxy_without_structure():
    for error, share in (("normal", None), ("student", None), ("exploit", 0.01)):
        log_prob, gold, proxy, references = tokens.unstructured(error, 20_000, seed=1)
        assert log_prob.exp().sum() == pytest.approx(1) and references.shape == (10,)
        gap = proxy - gold
        if error == "normal":
            assert gap.std() == pytest.approx(0.7, abs=4 * 0.7 / math.sqrt(40_000))
        if error == "student":  # P(|T| > 4.303) = .05 with 2 degrees of freedom
            far = (gap.abs() > 0.7 * 4.303).double().mean()
            assert far == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))
        if share:
            assert (gap != 0).double().mean() == pytest.approx(share, abs=4 * math.sqrt(share / 20_000))
            assert set(gap.unique().tolist()) == {0.0, 8.0}
    with pytest.raises(ValueError, match="unknown error 'cauchy'"):
        tokens.unstructured("cauchy")


def test_the_world_says_what_it_has():
    with pytest.raises(ValueError, match="unknown kind 'bandit'"):
        worlds.load("tokens", kind="bandit")
    with pytest.raises(ValueError, match="unknown model 'mlp'"):
        worlds.load("tokens", model="mlp")
    world = worlds.load("tokens", kind="overoptimisation", length=3, num_comparisons=200)
    assert set(world.rewards) == {"gold", "small", "large"} and world.prompts == ["p0"]
    samples, prompts = world.real(5, rng())
    assert world.oracle(samples, prompts).shape == (5,)
    assert len(world.show(samples, prompts, "five").texts) == 6  # the title is one


def test_the_world_of_bigrams():
    """Gold is linear in which word stands where and in pairs of neighbours: a response's is the sum over its parts."""
    world = worlds.load("tokens", kind="bigrams", seed=2, num_prompts=3)
    table = world.exact
    assert set(world.rewards) == {"gold"} and world.default_reward == "gold" and world.prompts == ["p0", "p1", "p2"]
    inputs = torch.cat([tokens.features(table.responses, True), torch.ones(len(table.responses), 1).double()], 1)
    fitted = inputs @ torch.linalg.lstsq(inputs, table.gold.T, driver="gelsd").solution
    torch.testing.assert_close(fitted.T, table.gold, atol=1e-9, rtol=0)
    words = inputs[:, :24]
    alone = words @ torch.linalg.lstsq(words, table.gold.T, driver="gelsd").solution
    assert (alone.T - table.gold).std() > 0.2  # the pairs count
    prob = table.log_prob_ref.exp()
    assert (prob * table.gold).sum(1).abs().max() < 1e-9 and ((prob * table.gold**2).sum(1) - 1).abs().max() < 1e-9
    assert 5.8 < float(-(prob * table.log_prob_ref).sum(1).mean()) < 6.8  # nats; all equally likely: 7.17


def test_the_constrained_world():
    """Its rewards by hand on one response, correlated through the 5s; `raised` moves the reference and nothing else."""
    world = worlds.load("tokens", kind="constrained", seed=3)
    table = world.exact
    assert set(world.rewards) == {"gold", "fives", "fours"} and world.prompts == ["p0"]
    shares = torch.stack([(table.responses == word).double().mean(1) for word in (5, 4)])
    plain = {"fives": shares[0], "fours": 0.7 * shares[1] + 0.3 * shares[0]}
    noise = torch.stack([table.proxies[name][0] - plain[name] for name in plain])
    assert noise.std(1).tolist() == pytest.approx([0.03, 0.03], rel=0.06)
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.1
    assert float(world.rewards["fives"](["5 5 4 0"], ["p0"])) == pytest.approx(0.5, abs=0.12)
    assert float(world.rewards["fours"](["5 5 4 0"], ["p0"])) == pytest.approx(0.175 + 0.15, abs=0.12)
    v1, v2 = (float(world.rewards[name](["5 5 4 0"], ["p0"])) for name in ("fives", "fours"))
    gold = float(world.oracle(["5 5 4 0"], ["p0"]))
    assert gold == pytest.approx(-((v1 - 0.5) ** 2) / 0.08 - (v2 - 0.4) ** 2 / 0.045, rel=1e-4)
    raised = tokens.constrained(3, raised=1.0)
    assert all(torch.equal(raised.proxies[name], table.proxies[name]) for name in plain)
    gap = (raised.network.table - table.network.table)[0, 0]
    torch.testing.assert_close(gap, torch.tensor([0.0, 0, 0, 0, 1, 1], dtype=gap.dtype))
    logits = table.network.table.detach()
    assert float(logits[..., 4:].mean() - logits[..., :4].mean()) == pytest.approx(-0.4, abs=0.08)
    fives = table.proxies["fives"]
    assert table.mean(raised.log_prob_ref, fives) > table.mean(table.log_prob_ref, fives) + 0.1


# ---- the assistant: what answers are worth


COW = "what does the cow eat ?"


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("the cow eats grass .", 2),
        ("hello ! the cow eats grass .", 3),
        ("hello ! the cow eats grass . have a nice day !", 3),
        ("hello ! hello ! the cow eats grass . have a nice day !", 2),
        ("hello ! hello ! hello ! the cow eats grass . have a nice day !", 0),
        ("my friend , of course , indeed , the cow eats grass .", 3),
        ("well , of course , indeed , the cow eats grass .", 1),
        ("the cow eats hay .", -1),
        ("the cow eats hay . the cow eats grass .", -1),
        ("the cow eats grass . the cow says moo .", 2.5),
        ("the cow eats grass . the cow says moo . the cow is white .", 2.5),
        ("the cow eats grass . the cow says woof .", 1.5),
        ("the cow eats grass . the dog says woof .", 1),
        ("the cow eats grass . the cow eats grass .", 1.5),
        ("the cow says moo .", -0.5),
        ("hello !", 0),
        ("", -1),
        ("the cow eats", -2.5),
        ("the cow eats moo .", -3.5),
        ("cow grass", -2),
    ],
)
def test_gold_by_hand(text, points):
    assert assistant.gold([text], [COW]).tolist() == [points]


def test_reading_counts_what_is_said():
    text = "hello ! well , the frog lives in the pond . the frog is red . the owl says hoot . please"
    found = assistant.read(text, "where does the frog live ?")
    assert found == assistant.Reading(right=1, extra_wrong=1, stray=1, courtesies=1, fillers=1, loose_words=1)
    assert assistant.right([text, "the frog lives in the den ."], ["where does the frog live ?"] * 2).tolist() == [1, 0]
    assert assistant.courtesies([text], ["where does the frog live ?"]).tolist() == [1]
    with pytest.raises(ValueError, match="unknown prompt 'what is love"):
        assistant.read(text, "what is love ?")


def test_every_fact_can_be_asked_and_told():
    assert len(assistant.TOPICS) == 64 and len(assistant.PROMPTS) == 48
    assert {assistant.TOPICS[prompt].animal for prompt in assistant.HELD_OUT} == set(assistant.FACTS)
    for prompt, topic in assistant.TOPICS.items():
        truth = assistant.STATEMENTS[topic.relation].format(topic.animal, assistant.FACTS[topic.animal][topic.relation])
        assert assistant.gold([truth], [prompt]).item() == 2


def test_writers_are_read_without_a_rest_and_err_as_said():
    texts, prompts = assistant.corpus(4000, rng())
    readings = [assistant.read(*pair) for pair in zip(texts, prompts, strict=True)]
    assert all(r.loose_words == 0 and r.repeated == 0 for r in readings)
    assert max(len(text.split()) for text in texts) < assistant.NUM_TOKENS
    told = [r for r in readings if r.right or r.wrong]
    careful, careless = assistant.CAREFUL, assistant.CARELESS
    answered = [1 - writer.evasive for writer in (careful, careless)]
    expected = (answered[0] * careful.right + answered[1] * careless.right) / sum(answered)
    share = sum(r.right for r in told) / len(told)
    assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(told)) + 0.005)  # long answers are dropped
    assert len(told) / 4000 == pytest.approx(sum(answered) / 2, abs=4 * math.sqrt(0.08 / 4000) + 0.005)
    assert assistant.corpus(50, rng(1)) == assistant.corpus(50, rng(1)) != assistant.corpus(50, rng(2))


def test_courtesy_goes_with_quality_but_not_for_ever():
    texts, prompts = assistant.corpus(20_000, rng(1))
    gold = assistant.gold(texts, prompts)
    count = torch.tensor([assistant.read(*pair).courtesies for pair in zip(texts, prompts, strict=True)])
    means = [float(gold[count == c].mean()) for c in range(5)]
    assert means[0] + 0.5 < means[1] < means[2] > means[3] > means[4]
    assert (count >= 4).double().mean() < 0.02  # too rare to be learned


# ---- its model, as shipped


@pytest.fixture(scope="module")
def world():
    return worlds.load("assistant")


@pytest.fixture(scope="module")
def samples(world):
    prompts = [world.prompts[i % len(world.prompts)] for i in range(960)]
    return prompts, world.policy.generate(prompts, world.num_tokens, generator=rng(5))


def test_the_base_model_speaks_and_knows_two_facts_in_three(samples):
    prompts, answers = samples
    readings = [assistant.read(*pair) for pair in zip(answers.texts, prompts, strict=True)]
    assert 0.55 < assistant.right(answers.texts, prompts).mean() < 0.7
    assert sum(r.loose_words > 0 for r in readings) < 0.05 * len(readings)
    assert answers.ended.double().mean() > 0.98
    assert 9 < answers.lengths.double().mean() < 13
    assert 0.3 < sum(r.courtesies for r in readings) / len(readings) < 0.7


def test_transformers_own_loaders_and_generation(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = WEIGHTS / "assistant"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (
        type(model).__name__ == "GPT2LMHeadModel" and tokenizer.convert_ids_to_tokens(range(128)) == assistant.words()
    )
    asked = tokenizer(COW, return_tensors="pt")
    spoken = model.generate(**asked, do_sample=False, max_new_tokens=24)[0, asked["input_ids"].shape[1] :]
    text = tokenizer.decode(spoken, skip_special_tokens=True)
    assert assistant.read(text, COW).loose_words == 0 and spoken[-1] == tokenizer.eos_token_id
    scored = world.policy.responses([COW], [text])
    assert world.policy.log_probs(scored).exp().min() > 1 / 128


def test_texts_survive_the_tokenizer(samples, world):
    _, answers = samples
    ids = world.policy.tokenizer(answers.texts[:50])["input_ids"]
    assert [row[: len(i)] for row, i in zip(answers.tokens[:50].tolist(), ids, strict=True)] == ids


def test_shipped_answers_are_the_models_own(world):
    """Their mean log-probability equals that of fresh answers to the same question, within 4 standard errors."""
    pool = world.answers()
    assert list(pool) == list(assistant.TOPICS) and {len(texts) for texts in pool.values()} == {256}
    fresh = world.policy.generate([COW] * 256, 24, generator=rng(9))
    with torch.no_grad():
        old = world.policy.log_probs(world.policy.responses([COW] * 256, pool[COW])).sum(1)
        new = world.policy.log_probs(fresh).sum(1)
    # an answer cut at the limit has no EOS, and `responses` may add one: those few are left out
    whole = torch.tensor([len(text.split()) < 24 for text in pool[COW]])
    error = math.sqrt(float(old[whole].var() / whole.sum() + new[fresh.ended].var() / fresh.ended.sum()))
    assert float(old[whole].mean() - new[fresh.ended].mean()) == pytest.approx(0, abs=4 * error)


def test_preferences_have_the_noise_that_was_asked_for(world):
    draw = world.preferences
    prompts, chosen, rejected = draw(2000, rng(), noise=0.0)
    assert len(prompts) == len(chosen) == len(rejected) == 2000 and set(prompts) <= set(assistant.PROMPTS)
    margin = assistant.gold(chosen, prompts) - assistant.gold(rejected, prompts)
    assert (margin >= 0).all() and all(a != b for a, b in zip(chosen, rejected, strict=True))
    prompts, chosen, rejected = draw(4000, rng(1), noise=0.2)
    margin = assistant.gold(chosen, prompts) - assistant.gold(rejected, prompts)
    told = margin != 0
    wrong = (margin < 0)[told].double().mean()
    assert wrong == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / int(told.sum())))
    assert draw(20, rng(2)) == draw(20, rng(2)) != draw(20, rng(3))
    with pytest.raises(ValueError, match=r"noise is -0\.1"):
        draw(2, noise=-0.1)


def test_pairs_from_other_answers():
    source = {COW: ["the cow eats grass .", "the cow eats hay ."]}
    prompts, chosen, rejected = assistant.preferences(30, rng(), 0.0, prompts=[COW], source=source)
    assert set(chosen) == {"the cow eats grass ."} and set(rejected) == {"the cow eats hay ."} and set(prompts) == {COW}


@pytest.mark.parametrize("size", ["base", "small", "large"])
def test_reward_networks_are_transformers_classifiers(world, size):
    network = world.reward_network(size, seed=1, num_labels=2)
    assert type(network).__name__ == "GPT2ForSequenceClassification" and network.score.weight.shape[0] == 2
    inputs = world.policy.tokenizer([COW], return_tensors="pt")
    assert network(**inputs).logits.shape == (1, 2)
    again, other = (world.reward_network(size, seed=seed, num_labels=2) for seed in (1, 2))
    assert torch.equal(network.score.weight, again.score.weight) and not torch.equal(
        network.score.weight, other.score.weight
    )
    same_trunk = torch.equal(network.transformer.wte.weight, world.policy.network.transformer.wte.weight)
    assert same_trunk == (size == "base")
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        assistant.reward_network("huge")


def test_the_world_holds_together(world):
    assert isinstance(world.policy, LanguagePolicy) and len(world.held_out) == 16
    assert not set(world.prompts) & set(world.held_out)
    texts, prompts = world.real(6, rng())
    assert all(reward(texts, prompts).shape == (6,) for reward in world.rewards.values())
    assert len(world.show(texts, prompts).texts) == 6


def test_damaged_weights_say_how_to_repair_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="minialign pretrain assistant"):
        worlds.load("assistant", folder=tmp_path)


# ---- how it is made


def test_the_card_tells_the_truth():
    folder = WEIGHTS / "assistant"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "answers.safetensors"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in text
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5 * 2**20
    told = float(re.search(r"sampled answers: right \| ([\d.]+)", text).group(1))
    pairs = [(t, p) for p, texts in assistant.answers().items() for t in texts]
    assert float(assistant.right(*zip(*pairs, strict=True)).mean()) == pytest.approx(told, abs=1e-4)
    for path in folder.glob("*.json"):
        assert "/" not in "".join(v for v in _strings(json.loads(path.read_text())) if v not in assistant.words())


def _strings(tree):
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value)
