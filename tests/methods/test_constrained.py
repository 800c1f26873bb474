"""The sheet's numbers for multipliers and mixing, policies that land on the I-projection, and loops that agree."""

import dataclasses
import math

import jaxtyping
import pytest
import torch

from minialign import exact, worlds
from minialign.kernels import gae
from minialign.loop import Batch
from minialign.methods import constrained, par
from minialign.methods.constrained import (
    Config,
    mix_advantages,
    mixing_weights,
    multiplier_step,
    squashed,
)
from minialign.policies.episodes import Episodes
from minialign.rewards import Saturated, compressibility, weighted_sum
from minialign.worlds import tokens

ZERO = torch.zeros(2)


@pytest.mark.parametrize(("variant", "step"), [("mu", -0.0025), ("xi", -0.01), ("all", 0.0025)])
def test_one_multiplier_step_by_hand(variant, step):
    # sheet, check 5: raw 0, lr .1, v - theta = .1: slope .25 for the sigmoid, 1 for tanh; "all" turns the sign
    config = Config(variant=variant)
    raw, velocity = multiplier_step(ZERO, ZERO, torch.tensor([0.1, 0.0]), config)
    assert raw.tolist() == pytest.approx([step, 0.0], abs=1e-8)
    again, _ = multiplier_step(raw, velocity, torch.zeros(2), config)  # momentum .1 goes on without a violation
    assert float(again[0] - raw[0]) == pytest.approx(0.1 * step, rel=1e-4)


def test_the_slope_of_a_squashed_multiplier():
    """The step is -lr times the gradient of l (v - theta), by autograd, away from raw = 0."""
    violation = torch.tensor([0.2, -0.1, 0.3])
    for variant, sign in (("mu", 1), ("xi", 1), ("all", -1)):
        raw = torch.tensor([0.7, -1.2, 2.0], requires_grad=True)
        (gradient,) = torch.autograd.grad((squashed(raw, variant) * sign * violation).sum(), raw)
        stepped, _ = multiplier_step(raw.detach(), torch.zeros(3), violation, Config(variant=variant))
        torch.testing.assert_close(stepped, raw.detach() - 0.1 * gradient)


def test_the_multipliers_gradient_is_clipped_and_inequalities_stop_at_zero():
    config = Config(variant="xi")
    raw, _ = multiplier_step(ZERO, ZERO, torch.tensor([30.0, 40.0]), config)  # (.6, .8) times .5 times lr
    assert raw.tolist() == pytest.approx([-0.03, -0.04])
    violation, start = torch.tensor([0.4, -0.3]), torch.tensor([0.01, 0.5])
    raw, _ = multiplier_step(start, ZERO, violation, Config(variant="mu", squash=False))
    assert raw.tolist() == pytest.approx([0.0, 0.53])
    free, _ = multiplier_step(start, ZERO, violation, Config(variant="xi", squash=False))
    assert free.tolist() == pytest.approx([-0.03, 0.53])


def test_mixing_by_hand():
    # sheet, checks 5 and 7: N = 2
    a1, a2, a0 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 0.0]), torch.tensor([0.2, -0.4, 0.6])
    heads = torch.stack([a1, a2, a0], -1).unsqueeze(0)

    def mixed(level, variant, squash=True):
        return mix_advantages(heads, mixing_weights(level, variant, squash))[0]

    torch.testing.assert_close(mixed(squashed(ZERO, "mu"), "mu"), a0 + 0.5 * (a1 + a2))
    torch.testing.assert_close(mixed(squashed(ZERO, "xi"), "xi"), 2 * a0)
    one = torch.ones(2)
    torch.testing.assert_close(mixed(one, "xi"), a1 + a2)  # KL weight 0
    torch.testing.assert_close(mixed(-one, "xi"), 4 * a0 - a1 - a2)
    level = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(mixed(level, "all"), 1.1 * (a1 + a2) - 0.2 * a1 - 0.7 * a2)
    torch.testing.assert_close(mixed(level, "mu", squash=False), a0 + 0.2 * a1 + 0.7 * a2)


@pytest.mark.parametrize(
    ("constant", "baseline"),
    [*((c, kind) for c in (0.3, 1.7, 1.0, 0.0) for kind in ("batch", "prompt")), (0.0, "critic")],
)
def test_a_constant_reward_is_no_signal(constant, baseline):
    """Nor is its rounding, which standardising would blow up to 1; a reward of zeros has not even that."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.randint(1, 10, (24,), generator=generator).unsqueeze(1)
    log_probs = torch.randn(24, 9, generator=generator)
    reference = log_probs + 0.1 * torch.randn(24, 9, generator=generator)
    untrained = torch.zeros(24, 9, 3) if baseline == "critic" else None
    episodes = Episodes([], log_probs, reference, mask, untrained, None, (), 1)
    scores = torch.stack([torch.full((24,), constant), torch.randn(24, generator=generator)], 1)
    config = Config(thresholds=(1.0, 1.0), baseline=baseline, group_size=4)
    drawn = torch.arange(6).repeat_interleave(4)
    batch = Batch(["?"] * 24, drawn, drawn, torch.arange(24))
    advantages, *_ = constrained.round_advantages(episodes, scores, batch, config)
    assert advantages[..., 0].abs().max() < 0.02
    assert advantages[..., 1][mask].std() == pytest.approx(1, abs=1e-3)
    assert advantages[..., 2][mask].std() == pytest.approx(1, abs=1e-3)


def test_the_i_projections_of_the_sheet():
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    ladder = torch.tensor([[0.0], [1 / 3], [2 / 3], [1.0]], dtype=torch.float64)
    law, dual = exact.i_projection(ref.log(), ladder, torch.tensor([0.6], dtype=torch.float64))
    assert dual.tolist() == pytest.approx([2.163734], abs=1e-6)
    assert law.exp().tolist() == pytest.approx([0.146322, 0.225737, 0.309560, 0.318381], abs=1e-6)
    assert float(exact.discrete_kl(law, ref.log())) == pytest.approx(0.292585, abs=1e-6)
    features = torch.tensor([[0.0, 1], [1, 0], [0.5, 0.5], [1, 1]], dtype=torch.float64)
    law, dual = exact.i_projection(ref.log(), features, torch.tensor([0.6, 0.6], dtype=torch.float64))
    assert dual.tolist() == pytest.approx([0.946762, 0.659080], abs=1e-6)
    assert law.exp().tolist() == pytest.approx([0.310396, 0.310396, 0.179207, 0.2], abs=1e-6)
    assert float(exact.discrete_kl(law, ref.log())) == pytest.approx(0.050811, abs=1e-6)


def test_equal_sigmoids_are_an_exponential_dual():
    # check 3: unstandardised, the tilt is l / (N - sum l), which for N = 1 is e^mu
    for raw in (-1.3, 0.0, 2.1):
        kl_weight, weights = mixing_weights(squashed(torch.tensor([raw]), "mu"), "mu")
        assert float(weights[0] / kl_weight) == pytest.approx(math.exp(raw), rel=1e-5)


XI, DUAL = Config(variant="xi"), Config(squash=False)
KERNELS = {
    "mixing_weights": lambda heads, mask, level: mixing_weights(level, "mu"),
    "mix_advantages": lambda heads, mask, level: mix_advantages(heads, (level.sum(), level)),
    "multiplier_step": lambda heads, mask, level: multiplier_step(level, 0.1 * level, 2 * level, XI),
    "multiplier_step, dual": lambda heads, mask, level: multiplier_step(level, 0.1 * level, 2 * level, DUAL),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_in_one_graph_and_map(name, generator):
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    heads = torch.randn(2, 3, 4, 3, generator=generator, dtype=torch.float64)
    level, fn = torch.tensor([[0.3, -0.2], [0.9, 0.1]], dtype=torch.float64), KERNELS[name]
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")(heads[0], mask, level[0])
        mapped = torch.func.vmap(fn, (0, None, 0))(heads, mask, level)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        torch._dynamo.reset()
    leaves = torch.utils._pytree.tree_leaves
    expected = [leaves(fn(heads[i], mask, level[i])) for i in range(2)]
    for k, got in enumerate(leaves(compiled)):
        torch.testing.assert_close(got, expected[0][k])
        torch.testing.assert_close(leaves(mapped)[k], torch.stack([expected[0][k], expected[1][k]]))


# ---- training --------------------------------------------------------------------------------------------------------


def world(seed=1):
    loaded = worlds.load("tokens", kind="constrained", seed=seed)
    loaded.policy.train_all_weights()
    return loaded.exact, loaded.policy, [loaded.rewards["fives"], loaded.rewards["fours"]]


TABLE = dict(num_tokens=4, baseline="batch", gae_lambda=1.0, learning_rate=0.02, rows_per_pass=128, max_grad_norm=1e9)


def means(place, policy):
    law = place.log_probs(policy.network)
    return law, [place.mean(law, table) for table in place.proxies.values()]


def run(place, policy, rewards, seed=0, **settings):
    """The law at the end, the means of both rewards, and the last step."""
    config = Config(**TABLE | settings)
    *_, last = constrained.train(policy, rewards, place.prompts, config, torch.Generator().manual_seed(seed))
    return *means(place, policy), last


@pytest.mark.parametrize(("variant", "off", "bar"), [("mu", 0.04, 0.15), ("xi", 0.1, 0.6)])
@pytest.mark.optimum("constrained")
def test_a_trained_policy_lands_on_the_i_projection(variant, off, bar):
    """Fewer and longer steps than in the replication; the base model is 2.5 nats away. xi still swings by then: its
    weights start at 0, so it climbs late, and fast (measured: .06 to .09 nats for mu, .12 to .51 for xi)."""
    place, policy, rewards = world()
    settings = dict(num_iterations=250, num_prompts=256, rows_per_pass=256, learning_rate=0.05, multiplier_lr=0.2)
    law, reached, _ = run(place, policy, rewards, thresholds=(0.5, 0.4), variant=variant, **settings)
    features = torch.cat(list(place.proxies.values())).T
    target, _ = exact.i_projection(place.log_prob_ref[0], features, torch.tensor([0.5, 0.4], dtype=torch.float64))
    assert reached == pytest.approx([0.5, 0.4], abs=off)
    assert float(exact.discrete_kl(law[0], target)) < bar < 2 < place.kl(place.log_prob_ref, target.unsqueeze(0))


@pytest.mark.parametrize("dual", [False, True])
def test_a_slack_constraint_disarms_squashed_multipliers(dual):
    """theta_1 lies below the base, so its multiplier goes to 0; the KL then weighs 2 - l_2 > l_2, whatever l_2 is."""
    place, policy, rewards = world()
    textbook = dict(squash=False, standardise=False, multiplier_lr=2.0) if dual else dict(multiplier_lr=0.5)
    settings = dict(num_iterations=300, num_prompts=256, rows_per_pass=256, learning_rate=0.05) | textbook
    _, base = means(place, world()[1])
    _, reached, last = run(place, policy, rewards, thresholds=(0.1, 0.35), variant="mu", **settings)
    if dual:
        assert reached[1] == pytest.approx(0.35, abs=0.05)
    else:
        assert float(last.metrics["multiplier_1"]) > 0.9 and reached[1] == pytest.approx(base[1], abs=0.05)


def tilt(place, first, second):
    tables = list(place.proxies.values())
    return (place.log_prob_ref + first * tables[0] + second * tables[1]).log_softmax(-1)


def test_a_tilt_is_stationary_where_its_weights_are_the_multipliers():
    """Check 1, exactly, over all 1,296 responses: lambda_i = (l_i / std_i) / (l_0 / std_0), and gamma must be 1."""
    place, _, _ = world()
    law, weights = tilt(place, 3.0, 5.0), (3.0, 5.0)
    logits = torch.cat([law.view(6**k, -1).logsumexp(-1).view(-1, 6) for k in range(1, 5)])  # a prefix's next words
    network = tokens.PrefixTree(logits.unsqueeze(0))
    torch.testing.assert_close(network.all_log_probs(), law)
    words = place.responses
    ids = torch.cat([torch.full((len(words), 1), 6), words[:, :-1]], 1)
    log_prob = network(ids).logits.log_softmax(-1).gather(-1, words.unsqueeze(-1)).squeeze(-1)
    reference = place.network(ids).logits.log_softmax(-1).gather(-1, words.unsqueeze(-1)).squeeze(-1)
    heads = torch.zeros(len(words), 4, 3, dtype=torch.float64)
    for k, table in enumerate(place.proxies.values()):
        heads[:, -1, k] = table[0]
    heads[..., 2] = (reference - log_prob).detach()
    prob = law[0].exp().unsqueeze(1)

    def gradient(gamma, kl_weight=1.0):
        to_come, _ = gae(heads, torch.zeros_like(heads), torch.ones(len(words), 4, dtype=torch.bool), gamma, 1.0)
        centred = to_come - (prob.unsqueeze(-1) * to_come).sum(0)
        std = (prob.unsqueeze(-1) * centred**2).mean((0, 1)).sqrt() * 2
        level = torch.tensor(weights, dtype=torch.float64) * std[:2]
        mixed = mix_advantages(centred / std, (kl_weight * std[2], level))
        (found,) = torch.autograd.grad((prob * mixed * log_prob).sum(), network.table, retain_graph=True)
        return float(found.abs().max())

    assert gradient(1.0) < 1e-12
    assert gradient(0.99) > 1e-4 and gradient(1.0, kl_weight=1.1) > 1e-3


FAST = dict(learning_rate=0.03, num_iterations=120, num_prompts=256, rows_per_pass=256)


@pytest.mark.optimum("constrained")
def test_fixed_multipliers_without_standardising_are_a_tilt():
    # check 3: l / (N - sum l) with c = 1; raw values start near 0, so both are near 1/2 over 1
    place, policy, rewards = world()
    settings = dict(thresholds=(9.0, 9.0), standardise=False, multiplier_lr=0.0)
    law, _, last = run(place, policy, rewards, **FAST | settings)
    level = [float(last.metrics[f"multiplier_{i}"]) for i in range(2)]
    expected = tilt(place, *(x / (2 - sum(level)) for x in level))
    assert place.kl(law, expected) < 0.02 < 0.1 < place.kl(law, tilt(place, 3, 3))


@pytest.mark.optimum("constrained")
def test_the_textbooks_multipliers_are_the_tilt():
    place, policy, rewards = world()
    theta = torch.tensor([0.35, 0.3], dtype=torch.float64)
    settings = dict(variant="mu", squash=False, standardise=False, multiplier_lr=1.5, num_iterations=200)
    law, reached, last = run(place, policy, rewards, **FAST | settings, thresholds=tuple(theta.tolist()))
    target, dual = exact.i_projection(place.log_prob_ref[0], torch.cat(list(place.proxies.values())).T, theta)
    assert reached == pytest.approx(theta.tolist(), abs=0.03) and float(exact.discrete_kl(law[0], target)) < 0.05
    assert [float(last.metrics[f"multiplier_{i}"]) for i in range(2)] == pytest.approx(dual.tolist(), rel=0.25)


def test_fixed_weights_are_plain_ppo():
    """One reward with its KL inside: the exact tilt by r / beta, and no multiplier in sight."""
    place, policy, rewards = world()
    both = weighted_sum(dict(zip("ab", rewards, strict=True)), {"a": 0.3, "b": 0.5})
    law, _, last = run(place, policy, [both], **FAST | dict(variant="fixed", beta=0.2))
    assert place.kl(law, tilt(place, 1.5, 2.5)) < 0.02 < 0.1 < place.kl(law)
    assert not any(name.startswith("multiplier") for name in last.metrics)


@pytest.mark.parametrize("bounded", [0, 1])
def test_all_ppo_stops_what_has_enough(bounded):
    """max v_1 + v_2 with one of them at most a quarter or so: that one stays near, the other rises."""
    place, policy, rewards = world()
    thresholds = [9.0, 9.0]
    thresholds[bounded] = (0.2, 0.25)[bounded]
    settings = dict(variant="all", thresholds=tuple(thresholds), num_iterations=150, learning_rate=0.05)
    _, reached, last = run(place, policy, rewards, **settings)
    assert reached[bounded] < 0.4 and reached[1 - bounded] > 0.55  # measured: .245, .628; .328, .931
    levels = [float(last.metrics[f"multiplier_{i}"]) for i in (bounded, 1 - bounded)]
    assert levels[0] > levels[1] + 0.3


@pytest.mark.parametrize(
    ("variant", "squash", "moves"), [("mu", True, False), ("xi", True, False), ("xi", False, True)]
)
def test_thresholds_below_the_reference(variant, squash, moves):
    """Check 4: satisfied inequalities leave the policy; equalities push it down, but not through a tanh.

    A stationary tilt by lambda has A_0's spread |lambda| times the reward's, so standardised signals balance where the
    weights do: |l| = N - sum l. With l below 0 the right side is larger, always; unsquashed it is 1.
    """
    place, policy, rewards = world()
    _, before = means(place, policy)
    low = tuple(0.3 * v for v in before)
    config = Config(thresholds=low, variant=variant, squash=squash, multiplier_lr=1.0, num_iterations=150, **TABLE)
    *_, step = constrained.train(policy, rewards, place.prompts, config)
    _, after = means(place, policy)
    if moves:
        assert float(step.metrics["multiplier_0"]) < 0 and max(after) < 0.6 * max(before)
    else:
        assert min(a / b for a, b in zip(after, before, strict=True)) > 0.8
        assert float(step.metrics["multiplier_0"]) < (0.5 if variant == "mu" else -0.9)


def test_a_critic_with_a_head_for_each_reward_and_the_kl():
    place, policy, rewards = world()
    policy.add_value_heads(network=tokens.PrefixTree(torch.zeros(1, tokens.num_prefixes(4), 3)))
    settings = TABLE | dict(baseline="critic", gae_lambda=0.95, num_iterations=60, num_epochs=2, num_minibatches=2)
    before = means(place, policy)[1][0]
    for _ in constrained.train(policy, rewards, place.prompts, Config(thresholds=(0.5, 0.4), **settings)):
        pass
    assert means(place, policy)[1][0] > before + 0.1
    with torch.no_grad():
        responses = policy.generate(place.prompts * 64, 4, generator=torch.Generator().manual_seed(0))
        guess = policy.values(responses)[:, 0].mean(0)  # before the first word: v_1, v_2 and minus the KL
    assert guess[:2].tolist() == pytest.approx(means(place, policy)[1], abs=0.1)
    assert float(guess[2]) == pytest.approx(-place.kl(place.log_probs(policy.network)), rel=0.5)


def test_a_critic_with_too_few_heads_is_refused():
    place, policy, rewards = world()
    policy.add_value_heads(network=tokens.PrefixTree(torch.zeros(1, tokens.num_prefixes(4), 2)))
    with pytest.raises(ValueError, match=r"has 2 heads; this method needs 3: call policy.add_value_heads\(3\)"):
        run(place, policy, rewards, thresholds=(0.5, 0.4), baseline="critic", num_iterations=1)


def test_answers_of_different_lengths():
    """A GPT-2 that ends its answers, in float64: parts of a round add up, and a violation is a mean over answers."""
    found, config = {}, Config((1.0, 1.0), "xi", num_prompts=8, group_size=2, num_iterations=2)
    for passes in (16, 3):
        loaded, scored, lengths = worlds.load("assistant"), [], []
        loaded.policy.network.double()
        loaded.policy.train_all_weights()
        loaded.policy.add_value_heads(3)

        def watched(name, rewards=loaded.rewards, scored=scored, lengths=lengths):
            def reward(texts, prompts):
                scored.append(rewards[name](texts, prompts))
                lengths.append([len(text.split()) for text in texts])
                return scored[-1]

            return reward

        rewards, settings = [watched("gold"), watched("courtesies")], dataclasses.replace(config, rows_per_pass=passes)
        *_, last = constrained.train(loaded.policy, rewards, loaded.prompts, settings)
        found[passes] = torch.cat([p.detach().flatten() for p in loaded.policy.parameters()])
    torch.testing.assert_close(found[16], found[3], atol=1e-7, rtol=0)
    assert len(set(lengths[-1])) > 3
    assert float(last.metrics["length"]) == pytest.approx(sum(lengths[-1]) / 16 + 1, abs=0.2)  # and its EOS
    raw = (0.01 * torch.randn((), generator=torch.Generator().manual_seed(0))).expand(2)
    velocity = torch.zeros(2)
    for gold, courtesies in (scored[:2], scored[2:]):
        raw, velocity = multiplier_step(raw, velocity, torch.stack([gold.mean(), courtesies.mean()]) - 1, config)
    levels = [float(last.metrics[f"multiplier_{i}"]) for i in range(2)]
    assert levels == pytest.approx(raw.tanh().tolist(), abs=1e-6)


def test_a_prompts_baseline_ignores_what_is_the_prompts_own():
    """Rewards that differ between prompts alone teach nothing, if the KL is out of it (all of the weight on them)."""
    loaded = worlds.load("tokens", num_prompts=2)
    loaded.policy.train_all_weights()
    before = loaded.exact.log_probs(loaded.policy.network)
    by_prompt = lambda texts, prompts: torch.tensor([float(p == "p1") for p in prompts])  # noqa: E731
    settings = TABLE | dict(variant="fixed", beta=0.0, num_iterations=2, num_prompts=8, group_size=4)
    for baseline, moves in (("prompt", False), ("batch", True)):
        config = Config(**settings | dict(baseline=baseline))
        list(constrained.train(loaded.policy, [by_prompt], loaded.prompts, config))
        after = loaded.exact.log_probs(loaded.policy.network)
        assert torch.equal(before, after) != moves


def test_baselines_are_rewards_and_shaping_composes():
    place, policy, rewards = world()
    texts = ["5 5 4 0", "0 1 2 3"]
    scores = [reward(texts, place.prompts * 2) for reward in rewards]
    expected = -((scores[0] - 0.5) ** 2) - (scores[1] - 0.4) ** 2
    torch.testing.assert_close(Saturated(rewards, (0.5, 0.4))(texts, place.prompts * 2), expected)
    references = {place.prompts[0]: torch.tensor([0.1, 0.3])}
    shaped = [par.Shaped(reward, references) for reward in rewards]
    config = Config(thresholds=(0.52, 0.51), num_iterations=2, num_prompts=8, **TABLE)
    steps = list(constrained.train(policy, shaped, place.prompts, config))
    assert 0 < float(steps[0].metrics["reward_0"]) < 1 and steps[1].reward_queries == 2 * 8 * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(thresholds=(0.5,)), "2 rewards and 1 thresholds"),
        (dict(variant="nu"), "variant is 'nu'; expected one of 'mu', 'xi', 'all', 'fixed'"),
        (dict(baseline="none"), "baseline is 'none'"),
        (dict(num_minibatches=9, num_prompts=8), "more than the 8 samples"),
        (dict(num_epochs=0), "num_epochs is 0"),
        (dict(baseline="prompt"), "set group_size above 1"),
        (dict(variant="fixed"), "one reward and no thresholds, not 2 and 2"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings, message):
    place, policy, rewards = world()
    with pytest.raises(ValueError, match=message):
        next(constrained.train(policy, rewards, place.prompts, Config(**dict(thresholds=(0.5, 0.4)) | settings)))


# ---- denoising steps -------------------------------------------------------------------------------------------------


def on_the_line(rounds, theta, **settings):
    """The exact sampler; theta (rounds, steps) and the multiplier of every round, for the reward x_0."""
    loaded = worlds.load("line", num_steps=5)
    config = Config(
        thresholds=(theta,), num_iterations=rounds, baseline="batch", gae_lambda=1.0, rows_per_pass=512,
        steps_per_pass=5, max_grad_norm=1e9, **settings,
    )  # fmt: skip
    path, levels = [], []
    for step in constrained.train(loaded.policy, [loaded.rewards["first_coordinate"]], loaded.prompts, config):
        path.append(loaded.policy.network.residual.theta.detach().double().clone())
        levels.append(float(step.metrics["multiplier_0"]))
    return loaded.sampler, torch.stack(path), levels


@pytest.mark.optimum("constrained")
def test_a_samplers_dual_lands_on_its_i_projection():
    """The nearest path law with E[x_0] = theta shifts step i by optimum(beta), beta = Vn / shift, and its multiplier is
    shift / Vn (sheets constrained and ddpo)."""
    settings = dict(squash=False, standardise=False, multiplier_lr=1.0, learning_rate=0.01, num_prompts=256)
    sampler, path, levels = on_the_line(240, 0.5, **settings)
    found = path[80:].mean(0)  # descent-ascent: averages converge, over whole swings (sheet, trap 9)
    shift = 0.5 - float(sampler.sample_mean)
    beta = float(sampler.noise_variance) / shift
    assert float(sampler.mean_at(found)) == pytest.approx(0.5, abs=0.08)
    assert float(sampler.path_kl(found)) == pytest.approx(float(sampler.optimal_kl(beta)), rel=0.3)
    torch.testing.assert_close(found, sampler.optimum(beta), atol=0.06, rtol=0.1)
    assert sum(levels[80:]) / 160 == pytest.approx(1 / beta, rel=0.25)


@pytest.mark.parametrize(("variant", "theta"), [("mu", 0.4), ("xi", 0.4), ("mu", -0.3)])
def test_a_sampler_climbs_along_i_projections(variant, theta):
    """Standardised and with one reward every tilt is stationary at l = 1/2: v swings about theta, but on its way it is
    the nearest law with the mean that it has. A satisfied inequality moves nothing."""
    sampler, path, levels = on_the_line(100, theta, variant=variant, learning_rate=0.01, num_prompts=128)
    means = [float(sampler.mean_at(step)) for step in path]
    base = float(sampler.sample_mean)
    if theta < base:
        assert max(abs(m - base) for m in means) < 0.1 and levels[-1] < 0.4
        return
    reached = next(i for i, m in enumerate(means) if m > theta)
    nearest = (means[reached] - base) ** 2 / (2 * float(sampler.noise_variance))
    assert nearest <= float(sampler.path_kl(path[reached])) < 1.35 * nearest
    assert max(levels) > 0.5 and levels[-1] < levels[reached]  # it falls as soon as there is enough


IMAGES = dict(num_prompts=3, group_size=4, num_minibatches=2, baseline="prompt", gae_lambda=1.0)


def on_compass(rounds=3, **settings):
    """Weights after a few rounds on two rewards of points in the plane, in float64."""
    loaded = worlds.load("compass", num_steps=5)
    policy = loaded.policy
    policy.network.double()
    policy.set_num_steps(5)
    config = Config(thresholds=(0.5, 0.2), num_iterations=rounds, **IMAGES | dict(variant="xi") | settings)
    rewards = [loaded.rewards["side"], loaded.rewards["style"]]
    list(constrained.train(policy, rewards, loaded.prompts, config))
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_a_mean_over_elements_rescales_the_ratio_alone():
    """It is the D-th root of a ratio of sums: before the first update both are 1, then they are clipped elsewhere."""
    once = [on_compass(1, num_minibatches=1, reduction=reduction) for reduction in ("sum", "mean")]
    torch.testing.assert_close(*once, atol=1e-4, rtol=0)  # Adam: the gradient's scale is all that differs
    assert not torch.allclose(on_compass(reduction="sum", clip_range=0.001), on_compass(clip_range=0.001))


def two_image_rewards(model="diffusion", **settings):
    loaded = worlds.load("shapes", model=model)
    loaded.policy.add_lora()
    config = Config(thresholds=(0.3, -1.2), num_iterations=2, **IMAGES | settings)
    return list(constrained.train(loaded.policy, [loaded.rewards["scorer"], compressibility], loaded.prompts, config))


def test_two_image_rewards_with_a_threshold_each():
    first, last = two_image_rewards(learning_rate=3e-4)
    assert float(first.metrics["kl"]) == pytest.approx(0, abs=1e-3) and float(last.metrics["kl"]) != 0
    for i in range(2):  # too little raises a multiplier, enough lowers it
        reward, threshold = float(last.metrics[f"reward_{i}"]), (0.3, -1.2)[i]
        change = float(last.metrics[f"multiplier_{i}"]) - float(first.metrics[f"multiplier_{i}"])
        assert (change > 0) == (reward < threshold)
    # 12 pictures of 8 steps a round: rollout and reference 1 each, the update 3
    assert [first.network_evaluations, last.network_evaluations] == [12 * 8 * 5, 12 * 8 * 10]
    assert last.reward_queries == 2 * 12 * 2 and first.metrics["length"] == 8


def test_a_consistency_model_is_a_policy_too():
    _, last = two_image_rewards(model="consistency")
    assert last.metrics["length"] == 3  # of four calls three have a density


def test_denoising_needs_another_baseline_and_noise():
    with pytest.raises(ValueError, match="set baseline to 'prompt' or 'batch'"):
        two_image_rewards(baseline="critic")
    loaded = worlds.load("line", eta=0.0)
    config = Config(thresholds=(1.0,), baseline="batch")
    with pytest.raises(ValueError, match="eta = 0"):
        next(constrained.train(loaded.policy, [loaded.rewards["first_coordinate"]], loaded.prompts, config))
