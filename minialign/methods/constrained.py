"""Constrained RLHF (Moskovitz et al., 2023, arXiv 2310.04373): enough of each reward, not ever more of their sum.

Each learned reward is worth having up to a point, its proxy point theta_i; beyond, it is over-optimised. A weight says
how much more of something one wants, for ever; a constraint says how much is enough. So the task is to stay near the
base model, each reward is a constraint, and the Lagrange multipliers, learned beside the policy, are the weights that
one would have had to guess. They change as training goes.

    PPO       sum_i w_i r_i - beta KL                          ppo.train on `weighted`
    PPO-SAT   -sum_i (r_i - theta_i)^2 per episode - beta KL   ppo.train on `saturated`
    mu-PPO    max -KL, v_i >= theta_i, l = sigmoid(mu)         variant "mu"
    xi-PPO    max -KL, v_i = theta_i, l = tanh(xi)             variant "xi"
    All-PPO   max sum_i v_i - KL, v_i <= theta_i               variant "all"
    A = (N - sum l) A_0 + sum_i l_i A_i                        mixing_weights, mix_advantages
    mu <- mu - lr dl/dmu (v_i - theta_i)                       multiplier_step
    theta from runs: where a fitted evaluation peaks           fit_proxy_points
    theta by search                                            nelder_mead

Every A_i is standardised by itself BEFORE mixing, so multipliers weigh signals of unit variance and the KL's own
coefficient cancels. As in the paper: N + 1 value heads, the last one for the KL. As in neither: violations are means
over episodes, not tokens (long answers would count more, sheet trap 10); standardising runs over the whole round; the
baseline may be the round's own mean at each token ("batch"), which needs no critic. The official code's swapped
thresholds, its slice of the value heads and its unsquashed mixing (traps 1 to 3) are not kept.

A limit that the paper does not name: a stationary tilt by lambda gives A_0 a spread of |lambda| times the reward's, so
standardised signals balance only where |l| = N - sum l (one reward). With tanh(xi) < 0 the right side is the larger
one, always: xi-PPO cannot hold a reward BELOW the base model's. The unsquashed dual can.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from minialign.kernels import clipped_value_loss, gae, kl_k3, masked_mean, masked_whiten, token_rewards
from minialign.loop import Step, gather_rows, own_rows, pack, sum_gradients, sum_over_processes, timer, unpack
from minialign.rewards import checked

VARIANTS = ("mu", "xi", "all")


@dataclass(frozen=True)
class Config:
    thresholds: tuple[float, ...] = ()  # theta, one for each reward, in its units
    variant: str = "mu"  # "mu": at least theta; "xi": exactly; "all": at most, all rewards being the task
    squash: bool = True  # multipliers through sigmoid or tanh; False: the textbook's dual
    multiplier_lr: float = 0.1  # SGD, one step after every policy step; .5 oscillates
    multiplier_momentum: float = 0.1
    multiplier_max_norm: float = 0.5  # l2, of the multipliers' gradient
    beta: float = 0.02  # reward per nat inside each reward of "all"; it cancels elsewhere
    num_iterations: int = 100  # rounds of: respond, score, update
    num_prompts: int = 128  # responses a round, over all processes
    num_tokens: int = 24  # of a response at most
    num_minibatches: int = 1  # optimizer steps per pass over the round
    num_epochs: int = 1  # passes over the round (paper: 5)
    rows_per_pass: int = 64  # responses per network call: memory against speed, never the result
    baseline: str = "critic"  # "critic": N + 1 value heads; "batch": the round's mean at each token
    temperature: float = 1.0
    gamma: float = 1.0  # authors: .99, with which the solution is no longer an I-projection
    gae_lambda: float = 0.95
    clip_range: float = 0.2  # on the ratio of each token
    value_clip_range: float = 0.2
    value_coefficient: float = 0.5  # of the rewards' heads
    kl_value_coefficient: float = 0.2  # of the KL's head
    learning_rate: float = 1e-3  # AdamW (paper: 1e-6 for GPT-2; 0.02 for a table)
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5  # l2


# Kernels ------------------------------------------------------------------------------------------------------------


def squashed(raw: Float[Tensor, "n"], variant: str, squash: bool = True) -> Float[Tensor, "n"]:
    """Multipliers l: sigmoid in (0, 1), for "xi" tanh in (-1, 1); as they are without squashing."""
    if not squash:
        return raw
    return raw.tanh() if variant == "xi" else raw.sigmoid()


def mixing_weights(
    multipliers: Float[Tensor, "n"], variant: str, squash: bool = True
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """(weight of the KL's advantage, weights of the rewards' advantages).

    "mu", "xi": N - sum l, l. "all": the KL stands inside the rewards; 0, N - sum l - l_i. Unsquashed: 1, l ("all": 1 -
    l_i). At l = 1 for all, xi gives the KL weight 0, at l = -1 twice N.
    """
    rest = len(multipliers) - multipliers.sum() if squash else torch.ones_like(multipliers.sum())
    if variant == "all":
        return torch.zeros_like(rest), rest - multipliers
    return rest, multipliers


def mix_advantages(
    advantages: Float[Tensor, "b t heads"], weights: tuple[Float[Tensor, ""], Float[Tensor, "n"]]
) -> Float[Tensor, "b t"]:
    """(N - sum l) A_0 + sum_i l_i A_i, of advantages standardised before; the KL's head is the last."""
    kl_weight, reward_weights = weights
    return advantages[..., :-1] @ reward_weights.to(advantages) + kl_weight.to(advantages) * advantages[..., -1]


def standardise_heads(
    advantages: Float[Tensor, "b t heads"], mask: Bool[Tensor, "b t"], eps: float = 1e-16
) -> Float[Tensor, "b t heads"]:
    """Each head to mean 0 and variance 1 (Bessel) over the valid tokens, by itself; 0 behind the end."""
    heads = [masked_whiten(head, mask, eps=eps, correction=1) for head in advantages.unbind(-1)]
    return torch.stack(heads, -1)


def multiplier_step(
    raw: Float[Tensor, "n"], velocity: Float[Tensor, "n"], violation: Float[Tensor, "n"], config: Config
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(raw, velocity) after one step of SGD with momentum down sum_i l_i (v_i - theta_i).

    violation: v - theta. Too little reward raises l, enough lowers it ("all": the other way round). From raw = 0 with
    lr .1 and violation .1: -.0025 (sigmoid), -.01 (tanh). Unsquashed multipliers of inequalities stay at 0 or above.
    """
    slope = torch.ones_like(raw)
    if config.squash:
        level = squashed(raw, config.variant)
        slope = 1 - level**2 if config.variant == "xi" else level * (1 - level)
    gradient = slope * (-violation if config.variant == "all" else violation)
    gradient = gradient * (config.multiplier_max_norm / gradient.norm().clamp_min(1e-12)).clamp_max(1.0)
    velocity = config.multiplier_momentum * velocity + gradient
    raw = raw - config.multiplier_lr * velocity
    if not config.squash and config.variant != "xi":
        raw = raw.clamp_min(0)
    return raw, velocity


# The baselines, as rewards for ppo.train ----------------------------------------------------------------------------


def weighted(rewards: Sequence[Callable], weights: Sequence[float]) -> Callable:
    """sum_i w_i r_i, the fixed weighting, as one reward for any loop of this package."""

    def weighted_sum(samples, prompts) -> Tensor:
        return sum(w * checked(reward, samples, prompts) for w, reward in zip(weights, rewards, strict=True))

    return weighted_sum


def saturated(rewards: Sequence[Callable], thresholds: Sequence[float]) -> Callable:
    """PPO-SAT's reward: -sum_i (r_i - theta_i)^2 of each sample. It also pays for a small variance."""

    def saturation(samples, prompts) -> Tensor:
        scores = (checked(reward, samples, prompts) for reward in rewards)
        return -sum((score - theta) ** 2 for score, theta in zip(scores, thresholds, strict=True))

    return saturation


# The loop -----------------------------------------------------------------------------------------------------------


def round_advantages(policy, responses, scores: Tensor, own: Tensor, num_rows: int, config: Config):
    """(standardised advantages (b, t, N + 1), values, returns, KL of each response), before the round's update."""
    mask = responses.mask
    log_prob_ref = policy.log_probs(responses, reference=True)
    nothing = torch.zeros(len(mask), dtype=scores.dtype, device=scores.device)
    inside = config.beta if config.variant == "all" else 0.0
    heads = [token_rewards(s, responses.log_probs, log_prob_ref, mask, inside) for s in scores[own].unbind(1)]
    heads.append(token_rewards(nothing, responses.log_probs, log_prob_ref, mask, 1.0))
    rewards, right = torch.stack(heads, -1), (0, 0, 0, config.num_tokens - mask.shape[1])
    whole_mask = gather_rows(pad(mask.to(rewards), right[2:]), own, num_rows).bool()
    if config.baseline == "critic":
        values = policy.values(responses)
    else:  # the mean, over the whole round, of what is still to come at each token
        to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, config.gamma, 1.0)
        whole = gather_rows(pad(to_come, right), own, num_rows)
        mean = masked_mean(whole, whole_mask.unsqueeze(-1).expand(whole.shape), 0)
        values = mean[: mask.shape[1]].unsqueeze(0).expand(rewards.shape)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
    whole = standardise_heads(gather_rows(pad(advantages, right), own, num_rows), whole_mask)
    kl = torch.where(mask, responses.log_probs - log_prob_ref, 0.0).sum(1)
    return whole[own, : mask.shape[1]], values, returns, kl


def response_loss(policy, responses, rows: Tensor, batch: dict[str, Tensor], advantages: Tensor, config: Config):
    """(loss, metrics) of responses `rows`: the clipped surrogate of the mixture, and the value losses of all heads."""
    critic = config.baseline == "critic"
    part = responses[rows]
    log_prob, values, _ = policy.score(part, values=critic)
    log_ratio = torch.where(part.mask, log_prob - part.log_probs, 0.0)
    ratio, weight, mixed = log_ratio.exp(), batch["weight"][rows], advantages[rows]
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    loss = (weight * torch.maximum(-mixed * ratio, -mixed * clipped)).sum()
    info = {
        "approx_kl": (weight * kl_k3(-log_ratio)).sum().detach(),
        "clip_fraction": (weight * (ratio != clipped)).sum(),
    }
    if critic:
        error = clipped_value_loss(values, batch["values"][rows], batch["returns"][rows], config.value_clip_range)
        terms = (weight.unsqueeze(-1) * error).sum((0, 1))
        value_loss = config.value_coefficient * terms[:-1].mean() + config.kl_value_coefficient * terms[-1]
        loss, info = loss + value_loss, info | {"value_loss": value_loss.detach()}
    return loss, info


def check(policy, rewards: Sequence[Callable], prompts: Sequence[str], config: Config) -> None:
    """Raises ValueError for settings that cannot train, before anything is spent."""
    for name, allowed in {"variant": VARIANTS, "baseline": ("critic", "batch")}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
    if len(config.thresholds) != len(rewards) or not rewards:
        raise ValueError(
            f"there are {len(rewards)} rewards and {len(config.thresholds)} thresholds: give one threshold for each "
            "reward, in the same order."
        )
    for name in ("num_iterations", "num_prompts", "num_tokens", "num_minibatches", "num_epochs", "rows_per_pass"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    if config.num_minibatches > config.num_prompts:
        raise ValueError(f"num_minibatches is {config.num_minibatches}, more than {config.num_prompts} responses.")
    policy.encode(list(prompts))


def train(policy, rewards: Sequence[Callable], prompts, config=Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains `policy`, a LanguagePolicy, in place until each of `rewards` is at its threshold; yields a `Step` a round.

    rewards: callables `reward(texts, prompts) -> (b,)`, one for each of config.thresholds. Metrics: `reward` (their
    sum), `reward_0`, `multiplier_0`, ..., `kl`. With baseline "critic" N + 1 heads are added if the policy has none.
    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    """
    check(policy, rewards, prompts, config)
    count, device = len(rewards), policy.device
    if config.baseline == "critic" and not policy.value_parameters():
        policy.add_value_heads(count + 1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    thresholds = torch.tensor(config.thresholds, device=device, dtype=torch.float32)
    first = 0.01 * torch.randn((), generator=generator) if config.squash else torch.tensor(0.5)
    raw, velocity = first.to(device).expand(count).clone(), torch.zeros(count, device=device)
    start = 0
    if resume is not None:
        counts = unpack(resume, parameters, optimizer, generator)
        start, policy.network_evaluations = counts["number"], counts["network_evaluations"]
        raw, velocity = resume["multipliers"].to(device), resume["velocity"].to(device)
    own = own_rows(config.num_prompts, device)

    for number in range(start, config.num_iterations):
        lap = timer()
        asked = [prompts[i] for i in torch.randint(len(prompts), (config.num_prompts,), generator=generator).tolist()]
        with torch.no_grad():
            noise = policy.draw_noise(config.num_prompts, config.num_tokens, generator)[own.cpu()]
            own_prompts = [asked[i] for i in own.tolist()]
            responses = policy.generate(own_prompts, config.num_tokens, noise=noise, temperature=config.temperature)
            scores = [checked(reward, responses.texts, own_prompts).to(device) for reward in rewards]
            scores = gather_rows(torch.stack(scores, 1), own, config.num_prompts)
            advantages, values, returns, kl = round_advantages(
                policy, responses, scores, own, config.num_prompts, config
            )
            lengths = gather_rows(responses.lengths, own, config.num_prompts)
            kl = gather_rows(kl, own, config.num_prompts)
        batch, infos = {"values": values, "returns": returns}, []
        for _ in range(config.num_epochs):
            for minibatch in torch.randperm(config.num_prompts, generator=generator).tensor_split(
                config.num_minibatches
            ):
                minibatch = minibatch.to(device)
                mine = torch.isin(own, minibatch)
                batch["weight"] = (mine.unsqueeze(1) & responses.mask) / lengths[minibatch].sum()
                weights = mixing_weights(squashed(raw, config.variant, config.squash), config.variant, config.squash)
                mixed = mix_advantages(advantages, weights)
                for rows in mine.nonzero().flatten().split(config.rows_per_pass):
                    loss, info = response_loss(policy, responses, rows, batch, mixed, config)
                    loss.backward()
                    infos.append(info)
                sum_gradients(parameters)
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                raw, velocity = multiplier_step(raw, velocity, scores[minibatch].mean(0) - thresholds, config)
        passes = config.num_epochs * config.num_minibatches
        metrics = {name: torch.stack([i[name] for i in infos]).sum() / passes for name in infos[0]} if infos else {}
        metrics |= {"reward": scores.sum(1).mean(), "kl": kl.mean(), "length": lengths.float().mean()}
        for i, level in enumerate(squashed(raw, config.variant, config.squash)):
            metrics |= {f"reward_{i}": scores[:, i].mean(), f"multiplier_{i}": level}
        evaluations = int(sum_over_processes(torch.tensor(policy.network_evaluations, device=device)))
        state = {"multipliers": raw.cpu(), "velocity": velocity.cpu()}
        yield Step(
            number, metrics, evaluations, (number + 1) * config.num_prompts * count, lap(),
            lambda done=number + 1, state=state: (
                pack(parameters, optimizer, generator, number=done, network_evaluations=policy.network_evaluations)
                | state
            ),
        )  # fmt: skip


# Thresholds ---------------------------------------------------------------------------------------------------------


def fit_proxy_points(
    values: Float[Tensor, "m n"], evaluation: Float[Tensor, "m"], degree: int = 10, grid: int = 101
) -> Float[Tensor, "n"]:
    """theta: where a polynomial of that total degree, fitted to the evaluation along training runs, is largest.

    Least squares weighted by a Gaussian kernel density estimate of the values, as in the paper: where runs went often,
    the fit counts. The maximum is sought on a grid over the values' range, and only where some run went nearby (density
    above a hundredth of its maximum): outside, a polynomial says anything. One or two rewards.
    """
    import numpy as np
    from scipy.stats import gaussian_kde
    from sklearn.preprocessing import PolynomialFeatures

    x, y = values.double().cpu().numpy(), evaluation.double().cpu().numpy()
    if x.shape[1] > 2 or len(x) != len(y):
        raise ValueError(f"values {x.shape} and evaluation {y.shape}; expected (m, 1 or 2) and (m,).")
    low, span = x.min(0), np.ptp(x, 0)
    scaled = 2 * (x - low) / span - 1
    density, basis = gaussian_kde(scaled.T), PolynomialFeatures(degree)
    root = np.sqrt(density(scaled.T))[:, None]
    coefficients = np.linalg.lstsq(root * basis.fit_transform(scaled), root[:, 0] * y, rcond=1e-8)[0]
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, grid)] * x.shape[1], indexing="ij"), -1).reshape(-1, x.shape[1])
    seen = density(points.T)
    fitted = np.where(seen > 0.01 * seen.max(), basis.transform(points) @ coefficients, -np.inf)
    return torch.from_numpy(low + (points[fitted.argmax()] + 1) / 2 * span)


def nelder_mead(evaluate: Callable, simplex: Float[Tensor, "n1 n"], max_evaluations: int = 20):
    """(best theta, its value, all (theta, value) in order): scipy's Nelder-Mead on -evaluate, from a given simplex.

    evaluate(theta: list) -> larger is better: the evaluation after training with thresholds theta. Cold start: it
    resets the policy each time. Warm start, the paper's: it goes on from where the last one stopped, and then measures
    a policy that has not reached its thresholds. Reflection 1, expansion 2, contraction and shrinking .5, as there.
    """
    from scipy.optimize import minimize

    seen: list[tuple[list[float], float]] = []

    def objective(theta) -> float:
        seen.append((theta.tolist(), float(evaluate(theta.tolist()))))
        return -seen[-1][1]

    start = simplex.double().cpu().numpy()
    options = {"initial_simplex": start, "maxfev": max_evaluations, "xatol": 0.0, "fatol": 0.0}
    minimize(objective, start[0], method="Nelder-Mead", options=options)
    best = max(seen, key=lambda pair: pair[1])
    return best[0], best[1], seen
