"""Token kernels: numbers derived by hand, slow float64 loops from the papers, limits, and padding full of nan."""

import math
import statistics

import pytest
import torch
from torch.autograd import gradcheck

from minialign.kernels import (
    clipped_value_loss,
    gae,
    group_baselines,
    kl_k1,
    kl_k2,
    kl_k3,
    last_token,
    masked_mean,
    masked_whiten,
    sample_tokens,
    standardise_heads,
    token_entropy,
    token_log_probs,
    token_rewards,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged(*lengths, steps=None):
    """The mask of responses of these lengths."""
    return torch.arange(steps or max(lengths)) < torch.tensor(lengths)[:, None]


ONES = torch.ones(1, 3, dtype=torch.bool)
LENGTHS = (7, 1, 4, 5, 2)  # batch 5, t 7: one whole, one of a single token
MASK = ragged(*LENGTHS)
NAN = float("nan")


# ---------------------------------------------------------------------------------------------- log-probabilities


def test_log_probs_by_hand():
    # Logits (0, log 3) give 1/4, 3/4; at temperature 1/2 they are (0, 2 log 3): 1/10, 9/10.
    logits = f64(0, math.log(3)).expand(1, 2, 2)
    tokens = torch.tensor([[1, 0]])
    torch.testing.assert_close(token_log_probs(logits, tokens), f64(3 / 4, 1 / 4).log()[None])
    torch.testing.assert_close(token_log_probs(logits, tokens, 0.5), f64(9 / 10, 1 / 10).log()[None])
    torch.testing.assert_close(token_entropy(logits[:, :1]), f64(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))[None])
    torch.testing.assert_close(token_entropy(logits[:, :1], 0.5), f64(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))[None])


@pytest.mark.parametrize("temperature", [1, 0.7])
def test_log_probs_against_a_loop(temperature):
    logits = 3 * random(3, 5, 11)
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
    got, entropy = token_log_probs(logits, tokens, temperature), token_entropy(logits, temperature)
    for b in range(3):
        for t in range(5):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            p = [w / sum(weights) for w in weights]
            assert got[b, t].item() == pytest.approx(math.log(p[tokens[b, t]]), abs=1e-12)
            assert entropy[b, t].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-12)


def test_log_probs_limits():
    logits, tokens = random(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    # A shift of all logits is no change, 1e4 included: no digits may be lost to it.
    torch.testing.assert_close(
        token_log_probs(logits + 1e4, tokens), token_log_probs(logits, tokens), atol=1e-11, rtol=0
    )
    assert token_entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))
    # A suppressed token has probability 0 and takes no part in the entropy, nor in its gradient.
    suppressed = torch.cat([logits, torch.full((2, 3, 1), -math.inf, dtype=torch.float64)], -1).requires_grad_()
    entropy = token_entropy(suppressed)
    torch.testing.assert_close(entropy, token_entropy(logits))
    assert torch.autograd.grad(entropy.sum(), suppressed)[0].isfinite().all()
    assert gradcheck(lambda x: token_log_probs(x, tokens, 0.7), (logits.requires_grad_(),))
    assert gradcheck(lambda x: token_entropy(x, 0.7), (logits,))


def test_half_precision_logits_are_scored_in_float32():
    logits, tokens = random(2, 3, 50).bfloat16(), torch.tensor([[0, 1, 2], [3, 4, 49]])
    got = token_log_probs(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), token_log_probs(logits.double(), tokens), atol=1e-6, rtol=0)
    torch.testing.assert_close(token_entropy(logits).double(), token_entropy(logits.double()), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- sampling


def test_sampling_by_hand():
    # Cumulative sums .2, .2, .7, 1: a token of probability 0 is never drawn, not even on the edge.
    logits = f64(0.2, 0.0, 0.5, 0.3).log().expand(6, 4)
    uniform = f64(0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53)
    assert sample_tokens(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]
    # At temperature 1/2 the odds are squared: .04, 0, .25, .09 of .38; sums .1053, .7632.
    assert sample_tokens(logits, f64(0.1, 0.11, 0.76, 0.77, 0.0, 0.5), 0.5).tolist() == [0, 2, 2, 3, 0, 2]
    # Zero-probability tokens at both ends, at both ends of the unit interval.
    ends = f64(0, 0, 1, 0, 0).log().expand(2, 5)
    assert sample_tokens(ends, f64(0, 1 - 2**-53)).tolist() == [2, 2]


def test_rounding_draws_no_impossible_token():
    """float32 sums over 4,000 tokens end anywhere near 1: the largest uniform must not fall behind them, on -inf."""
    logits = torch.cat([random(32, 4000).float(), torch.full((32, 3), -math.inf)], 1)
    uniform = torch.full((32,), 1 - 2**-24)
    assert (logits.softmax(-1).cumsum(-1)[:, -1] < uniform).any()  # without which the test shows nothing
    assert (sample_tokens(logits, uniform) < 4000).all()


@pytest.mark.parametrize("temperature", [1, 0.6])
def test_frequencies_are_the_probabilities(temperature):
    """On an even grid of N uniforms each token is drawn N p times, up to one grid point at either edge."""
    num, logits = 10_007, 2 * random(13)
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    drawn = sample_tokens(logits.expand(num, 13), uniform, temperature)
    frequency = torch.bincount(drawn, minlength=13) / num
    torch.testing.assert_close(frequency.double(), (logits / temperature).softmax(-1), atol=1.01 / num, rtol=0)


# ---------------------------------------------------------------------------------------------- masked statistics


def test_masked_mean():
    x = torch.where(MASK, random(5, 7), NAN)
    rows = [row[:n].tolist() for row, n in zip(x, LENGTHS, strict=True)]
    assert masked_mean(x, MASK).item() == pytest.approx(statistics.fmean(v for row in rows for v in row))
    torch.testing.assert_close(masked_mean(x, MASK, dim=1), f64(*map(statistics.fmean, rows)))
    columns = [[row[t] for row in rows if len(row) > t] for t in range(7)]
    torch.testing.assert_close(masked_mean(x, MASK, dim=0), f64(*map(statistics.fmean, columns)))
    nothing = torch.zeros_like(MASK)
    assert masked_mean(x, nothing).item() == 0
    assert masked_mean(x, nothing, 1).tolist() == [0] * 5


def test_whitening_of_the_sheet():
    """Checks 1 and 2 of sheet ppo_rlhf: advantages, and a reward that keeps its mean.

    The sheet's last Bessel value, -1.065648, is a slip: whitened numbers sum to 0, and .917757 + .147991 = 1.065748.
    """
    advantages = f64(0.45525, 0.395, 0.3)[None]
    torch.testing.assert_close(
        masked_whiten(advantages, ONES), f64(1.124017, 0.181251, -1.305268)[None], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        masked_whiten(advantages, ONES, correction=1), f64(0.917757, 0.147991, -1.065748)[None], atol=1e-6, rtol=0
    )
    rewards = f64(1, 2, 3)[None]
    torch.testing.assert_close(
        masked_whiten(rewards, ONES, shift_mean=False), f64(0.775255, 2, 3.224745)[None], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(masked_whiten(rewards, ONES, shift_mean=False, correction=1), rewards)


@pytest.mark.parametrize("correction", [0, 1])
def test_whitening_sees_valid_tokens_only(correction):
    x = 5 + 3 * random(5, 7)
    valid = x[MASK]
    expected = (valid - valid.mean()) / (valid.var(correction=correction) + 1e-8).sqrt()
    for padding in (NAN, 1e9, -math.inf):
        got = masked_whiten(torch.where(MASK, x, padding), MASK, correction=correction)
        torch.testing.assert_close(got[MASK], expected)
        assert (got[~MASK] == 0).all()
        kept = masked_whiten(torch.where(MASK, x, padding), MASK, shift_mean=False, correction=correction)
        torch.testing.assert_close(kept[MASK], expected + valid.mean())
        assert (kept[~MASK] == 0).all()


def test_whitening_limits():
    for dtype in (torch.float32, torch.float64):
        constant = torch.where(MASK, torch.tensor(0.1, dtype=dtype), NAN)
        assert masked_whiten(constant, MASK).tolist() == [[0.0] * 7] * 5
    one = ragged(1, steps=3)
    assert masked_whiten(f64(5, 1, 2)[None], one, correction=1).tolist() == [[0, 0, 0]]  # one element has no variance
    assert masked_whiten(f64(5, 1, 2)[None], torch.zeros_like(one)).tolist() == [[0, 0, 0]]
    x = random(2, 3, seed=3)
    mask = ragged(3, 2)
    assert gradcheck(lambda y: masked_whiten(y, mask), (x.requires_grad_(),))


# ---------------------------------------------------------------------------------------------- token rewards


def test_last_token():
    assert last_token(MASK).nonzero().tolist() == [[i, n - 1] for i, n in enumerate(LENGTHS)]
    assert not last_token(torch.zeros(2, 3, dtype=torch.bool)).any()


def test_token_rewards_by_hand():
    # beta = .1, log-ratios (.2, -.1, 0): R = (-.02, .01, 1), the example of the sheet's check 1.
    rewards = token_rewards(f64(1.0), f64(-1.0, -2.0, -3.0)[None], f64(-1.2, -1.9, -3.0)[None], ONES, 0.1)
    torch.testing.assert_close(rewards, f64(-0.02, 0.01, 1.0)[None])


def test_token_rewards_against_a_loop():
    """The score sits on the last valid token, not in the last column; padding pays nothing, even where it is nan."""
    scores = random(5, seed=1)
    log_prob, log_prob_ref = (torch.where(MASK, random(5, 7, seed=s), NAN) for s in (2, 3))
    got = token_rewards(scores, log_prob, log_prob_ref, MASK, 0.3)
    for b, length in enumerate(LENGTHS):
        for t in range(7):
            expected = 0.0
            if t < length:
                expected = -0.3 * (log_prob[b, t] - log_prob_ref[b, t]).item()
            if t == length - 1:
                expected += scores[b].item()
            assert got[b, t].item() == pytest.approx(expected, abs=1e-14)
    total = scores - 0.3 * torch.where(MASK, log_prob - log_prob_ref, 0.0).sum(1)
    torch.testing.assert_close(got.sum(1), total)
    plain = token_rewards(scores, log_prob, log_prob_ref, MASK, 0)
    torch.testing.assert_close(plain, torch.where(last_token(MASK), scores[:, None], 0.0))


def test_no_gradient_through_the_reward():
    log_prob = random(5, 7).requires_grad_()
    assert not token_rewards(random(5).requires_grad_(), log_prob, random(5, 7), MASK, 0.3).requires_grad


# ---------------------------------------------------------------------------------------------- GAE


def test_gae_of_the_sheet():
    # delta = (-.02 + .6 - .5, .01 + .7 - .6, 1 - .7) = (.08, .11, .3); A_3 = .3, A_2 = .11 + .95 .3 = .395,
    # A_1 = .08 + .95 .395 = .45525; returns A + V.
    advantages, returns = gae(f64(-0.02, 0.01, 1)[None], f64(0.5, 0.6, 0.7)[None], ONES)
    torch.testing.assert_close(advantages, f64(0.45525, 0.395, 0.3)[None])
    torch.testing.assert_close(returns, f64(0.95525, 0.995, 1)[None])


def gae_loop(rewards, values, gamma, gae_lambda):
    """Eq. 16 of Schulman et al. (2016), the double sum as it stands: sum over l of (gamma lambda)^l delta_{t+l}."""
    steps = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(steps)]
    return [sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in range(t, steps)) for t in range(steps)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1, 0.95), (0.99, 0.9), (0.7, 0.3), (1, 1), (0.9, 0)])
def test_gae_against_the_double_sum(gamma, gae_lambda):
    """Responses of all lengths, 1 and t included; what stands behind their ends is nan."""
    rewards, values = (torch.where(MASK, random(5, 7, seed=s), NAN) for s in (1, 2))
    advantages, returns = gae(rewards, values, MASK, gamma, gae_lambda)
    for b, n in enumerate(LENGTHS):
        expected = gae_loop(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, gae_lambda)
        torch.testing.assert_close(advantages[b, :n], f64(*expected), atol=1e-13, rtol=0)
        torch.testing.assert_close(returns[b, :n], advantages[b, :n] + values[b, :n])
    assert (advantages[~MASK] == 0).all()
    assert (returns[~MASK] == 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 9, 31])
def test_gae_of_every_length(steps):
    """The doubling has edges at the powers of two."""
    rewards, values = random(1, steps, seed=steps), random(1, steps, seed=steps + 1)
    advantages, _ = gae(rewards, values, ragged(steps), 0.97, 0.8)
    expected = gae_loop(rewards[0].tolist(), values[0].tolist(), 0.97, 0.8)
    torch.testing.assert_close(advantages[0], f64(*expected), atol=1e-13, rtol=0)


def test_gae_limits():
    rewards, values = random(5, 7, seed=1), random(5, 7, seed=2)
    to_come = torch.where(MASK, rewards, 0.0).flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, MASK, 1.0, 1.0)
    torch.testing.assert_close(advantages[MASK], (to_come - values)[MASK])
    torch.testing.assert_close(returns[MASK], to_come[MASK])  # Monte Carlo, whatever the critic says
    advantages, _ = gae(rewards, values, MASK, 0.9, 0.0)
    following = torch.where(MASK, values, 0.0).roll(-1, 1)
    following[:, -1] = 0
    torch.testing.assert_close(advantages[MASK], (rewards + 0.9 * following - values)[MASK])
    # A critic that knows the rewards to come leaves nothing to blame anyone for.
    perfect, _ = gae(rewards, to_come, MASK, 1.0, 0.95)
    assert perfect.abs().max() < 1e-14


def test_gae_of_several_heads_is_gae_of_each():
    """Rewards, values and results (b, t, k); K = 3 streams share only the mask."""
    rewards, values = random(5, 7, 3, seed=1), random(5, 7, 3, seed=2)
    advantages, returns = gae(rewards, values, MASK, 0.99, 0.95)
    assert advantages.shape == returns.shape == (5, 7, 3)
    for head in range(3):
        alone = gae(rewards[..., head], values[..., head], MASK, 0.99, 0.95)
        torch.testing.assert_close((advantages[..., head], returns[..., head]), alone)


def test_gae_refuses_one_reward_stream_for_several_heads():
    """(b, t) rewards against (b, t, k) values would broadcast t against k and say nothing where t = k."""
    with pytest.raises(Exception, match=r"values|rewards"):
        gae(random(5, 7), random(5, 7, 7), MASK)


# ---------------------------------------------------------------------------------------------- value loss


@pytest.mark.parametrize("target", [-0.5, 0.0, 0.1, 0.5])
def test_value_loss_on_a_grid(target):
    """Old value 0, clip .2; moves on both sides of the clip, towards the target and away: the larger of two errors."""
    for moved in (-0.7, -0.3, -0.1, 0.0, 0.1, 0.3, 0.7):
        value = f64(moved).requires_grad_()
        loss = clipped_value_loss(value, f64(0.0), f64(target), 0.2)
        held = min(max(moved, -0.2), 0.2)
        assert loss.item() == pytest.approx(max((moved - target) ** 2, (held - target) ** 2) / 2), (moved, target)
        flat = abs(moved) > 0.2 and (held - target) ** 2 > (moved - target) ** 2
        slope = torch.autograd.grad(loss.sum(), value)[0].item()
        assert slope == pytest.approx(0 if flat else moved - target), (moved, target)


def test_value_loss_limits():
    values, old, returns = random(5, 7, 3), random(5, 7, 3, seed=1), random(5, 7, 3, seed=2)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 1e9), (values - returns) ** 2 / 2)
    torch.testing.assert_close(clipped_value_loss(old, old, returns, 0.2), (old - returns) ** 2 / 2)
    assert (clipped_value_loss(values, old, returns, 0.2) >= (values - returns) ** 2 / 2).all()


# ---------------------------------------------------------------------------------------------- KL estimators


def test_kl_estimators_of_the_sheet():
    """Check 7: one mean of k1 and k3; as losses their gradients in the logits are 0, grad KL(pi||ref), pi - ref."""
    p, q = f64(0.5, 0.3, 0.2), f64(0.2, 0.3, 0.5)
    logits = p.log().requires_grad_()
    log_ratio = token_log_probs(logits.expand(1, 3, 3), torch.arange(3)[None])[0] - q.log()
    for estimator in (kl_k1, kl_k3):
        assert (p @ estimator(log_ratio)).item() == pytest.approx(0.274887, abs=1e-6)
    expected = {kl_k1: f64(0, 0, 0), kl_k2: f64(0.320702, -0.082466, -0.238236), kl_k3: f64(0.3, 0, -0.3)}
    for estimator, gradient in expected.items():
        got = torch.autograd.grad(p @ estimator(log_ratio), logits, retain_graph=True)[0]
        torch.testing.assert_close(got, gradient, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions(dtype):
    """Half precision in, float32 out, and no digits lost beyond those of the input."""
    wide = torch.promote_types(dtype, torch.float32)
    x, y, scores = random(5, 7).to(dtype), random(5, 7, seed=1).to(dtype), random(5).to(dtype)
    calls = {
        "mean": lambda cast: masked_mean(cast(x), MASK),
        "whiten": lambda cast: masked_whiten(cast(x), MASK),
        "rewards": lambda cast: token_rewards(cast(scores), cast(x), cast(y), MASK, 0.3),
        "gae": lambda cast: torch.stack(gae(cast(x), cast(y), MASK)),
    }
    for name, call in calls.items():
        got = call(lambda value: value)
        assert got.dtype == wide, name
        torch.testing.assert_close(got.double(), call(lambda value: value.double()), atol=1e-5, rtol=1e-5)


def test_each_head_is_standardised_by_itself_over_valid_tokens():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1000.0, 0.01, 1.0], dtype=torch.float64)
    heads = torch.randn(5, 7, 3, generator=generator, dtype=torch.float64) * scales + 3
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 2]).unsqueeze(1)
    whitened = standardise_heads(heads, mask)
    for k in range(3):
        valid = heads[..., k][mask]
        expected = (valid - valid.mean()) / valid.std()
        torch.testing.assert_close(whitened[..., k][mask], expected, atol=2e-6, rtol=0)
    assert (whitened[~mask] == 0).all()
    # check 6: a reward and its threshold times a positive constant change nothing but the multiplier's step
    torch.testing.assert_close(standardise_heads(7 * heads, mask), whitened, atol=2e-6, rtol=0)
    assert not torch.allclose(masked_whiten(heads, mask.unsqueeze(-1).expand(heads.shape)), whitened)
    # far below its floor a head is no signal; the others do not care
    small = standardise_heads(1e-6 * heads / scales, mask, torch.tensor([1e-8, 1e-8, 1e-3]))[mask]
    assert small[:, 2].std() < 2e-3 and small[:, 0].std() == pytest.approx(1, abs=0.02)


def test_baselines_are_means_of_the_group_at_each_action():
    to_come = torch.arange(24.0).view(4, 3, 2)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    group = torch.tensor([5, 5, 0, 5])
    mean = group_baselines(to_come, mask, group)
    torch.testing.assert_close(mean[0, 0], (to_come[0, 0] + to_come[1, 0] + to_come[3, 0]) / 3)
    torch.testing.assert_close(mean[3, 1], (to_come[0, 1] + to_come[3, 1]) / 2)
    torch.testing.assert_close(mean[2], to_come[2] * mask[2].unsqueeze(1))  # alone; nothing behind its end
    torch.testing.assert_close(
        group_baselines(to_come, mask, torch.zeros(4, dtype=torch.long))[2, 1], to_come[[0, 2, 3], 1].mean(0)
    )
