"""Exercises of chapter 52: standardised heads, Lagrangian mixing, a multiplier's step, Newton, Nelder-Mead's points."""

import torch

from minialign.course.chapters.questions_52 import QUESTIONS
from minialign.course.check import Exercise
from minialign.methods import constrained

# ---- one signal for each reward --------------------------------------------------------------------------------------


def standardise(advantages, mask):
    """Each head (last axis) to mean 0 and standard deviation 1 over the valid actions. The package's own."""
    return constrained.standardise_heads(advantages, mask, floor=1e-8)


def _moments(advantages, mask, dim=None, correction=1, keepdim=True):
    """(mean, std) of each head over the valid actions of the whole round; or with `dim` of each episode."""
    valid = mask.unsqueeze(-1).to(advantages)
    over = (0, 1) if dim is None else dim
    count = valid.sum(over, keepdim=keepdim)
    mean = (advantages * valid).sum(over, keepdim=keepdim) / count
    var = ((advantages - mean) ** 2 * valid).sum(over, keepdim=keepdim) / (count - correction)
    return mean, var.sqrt() + 1e-8


def _masked(advantages, mask):
    return torch.where(mask.unsqueeze(-1), advantages, 0.0)


def _round(g, dtype=torch.float32, shape=(5, 7, 3)):
    lengths = torch.randint(3, shape[1] + 1, (shape[0],), generator=g)
    lengths[0] = shape[1]
    scales = torch.tensor([10.0, 0.1, 1.0], dtype=dtype)[: shape[2]]
    return dict(
        advantages=scales * (3 + torch.randn(shape, generator=g, dtype=dtype)),
        mask=torch.arange(shape[1]) < lengths.unsqueeze(1),
    )


def _with_nan(case):
    """Padding that no sum survives."""
    case["advantages"][~case["mask"]] = float("nan")
    return case


def _all_valid(advantages, mask):
    return _masked(standardise(advantages, torch.ones_like(mask)), mask)


def _one_scale(advantages, mask):
    flat = mask.unsqueeze(-1).expand_as(advantages)
    values = advantages[flat]
    return torch.where(flat, (advantages - values.mean()) / (values.std() + 1e-8), 0.0)


STANDARDISE = Exercise(
    "52/standardise",
    points=3,
    reference=standardise,
    cases={
        "padding": dict(
            advantages=torch.tensor([[[1.0, 10.0], [3.0, -10.0], [0.0, 0.0]], [[5.0, 30.0], [2.0, 0.0], [99.0, 99.0]]]),
            mask=torch.tensor([[True, True, True], [True, True, False]]),
        ),
        "a signal of zeros": dict(
            advantages=torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), mask=torch.tensor([[True, True]])
        ),  # no KL yet
        "padding that holds nan": lambda g: _with_nan(_round(g)),
        "float32": _round,
        "float64": lambda g: _round(g, torch.float64),
        "one answer, float64": lambda g: _round(g, torch.float64, (1, 11, 2)),
    },
    tolerance=1e-4,  # 1e-8 beside the root or under it
    mistakes={
        "one mean and one standard deviation for all heads: the loudest reward drowns the others again.": _one_scale,
        "what stands behind an answer's end was counted.": _all_valid,
        "what stands behind an answer's end must be 0, or it is trained on.": lambda advantages, mask: (
            lambda mean, std: (advantages - mean) / std
        )(*_moments(advantages, mask)),
        "scaled, but not centred.": lambda advantages, mask: _masked(advantages / _moments(advantages, mask)[1], mask),
        "centred, but not scaled.": lambda advantages, mask: _masked(advantages - _moments(advantages, mask)[0], mask),
        "divided by the variance; its root is meant.": lambda advantages, mask: _masked(
            (lambda mean, std: (advantages - mean) / std**2)(*_moments(advantages, mask)), mask
        ),
        "each episode by itself: then no episode can be better than another.": lambda advantages, mask: _masked(
            (lambda mean, std: (advantages - mean) / std)(*_moments(advantages, mask, dim=1)), mask
        ),
        "the population's standard deviation; the authors divide by n - 1.": lambda advantages, mask: _masked(
            (lambda mean, std: (advantages - mean) / std)(*_moments(advantages, mask, correction=0)), mask
        ),
    },
)

# ---- mixing ----------------------------------------------------------------------------------------------------------


def mix(advantages, multipliers):
    """(N - sum l) A_0 + sum_i l_i A_i; the KL's advantage is the last head. The package's own."""
    weights = constrained.mixing_weights(multipliers, "mu")
    return constrained.mix_advantages(advantages, weights)


def _mix_case(g, dtype=torch.float32, n=2, shape=(3, 5)):
    draw = dict(generator=g, dtype=dtype)
    return dict(advantages=torch.randn(*shape, n + 1, **draw), multipliers=torch.rand(n, **draw))


def _with_kl_weight(weight):
    return lambda advantages, multipliers: (
        advantages[..., :-1] @ multipliers + weight(multipliers) * advantages[..., -1]
    )


MIX = Exercise(
    "52/mix",
    points=3,
    reference=mix,
    cases={
        "multipliers 1/2": dict(
            advantages=torch.tensor([[[2.0, -4.0, 1.0]]]), multipliers=torch.tensor([0.5, 0.5])
        ),  # 1 - 2 + 1 = 0
        "multipliers 0": dict(
            advantages=torch.tensor([[[1.0, 3.0, 7.0]]]), multipliers=torch.tensor([0.0, 0.0])
        ),  # 2 A_0
        "multipliers 1": dict(
            advantages=torch.tensor([[[1.0, 3.0, 7.0]]]), multipliers=torch.tensor([1.0, 1.0])
        ),  # no A_0 at all
        "two rewards": _mix_case,
        "three rewards, float64": lambda g: _mix_case(g, torch.float64, 3),
        "one reward, float64": lambda g: _mix_case(g, torch.float64, 1),
        "one token, float64": lambda g: _mix_case(g, torch.float64, 2, (1, 1)),
    },
    mistakes={
        "the KL's weight is N minus the sum, N rewards: with 1 it turns negative, and distance is paid for.": (
            _with_kl_weight(lambda m: 1 - m.sum())
        ),
        "that is the textbook's, with weight 1 on the KL: squashed multipliers share N among all signals.": (
            _with_kl_weight(lambda m: 1.0)
        ),
        "the KL's advantage is missing.": _with_kl_weight(lambda m: 0.0),
        "the KL is subtracted; its advantage is already that of minus KL.": _with_kl_weight(lambda m: m.sum() - len(m)),
        "the KL's head is the last, not the first.": lambda advantages, multipliers: mix(
            advantages.roll(-1, -1), multipliers
        ),
        "the rewards' weights are l, not 1 - l.": lambda advantages, multipliers: (
            advantages[..., :-1] @ (1 - multipliers) + (len(multipliers) - multipliers.sum()) * advantages[..., -1]
        ),
        "divided by the number of signals; their weights already sum to N.": lambda advantages, multipliers: (
            mix(advantages, multipliers) / advantages.shape[-1]
        ),
    },
)

# ---- a multiplier's step ---------------------------------------------------------------------------------------------


def multiplier_step(raw, reached, thresholds, lr):
    """mu <- mu - lr sigmoid'(mu) (v - theta), reward by reward: the package's own, without momentum or clipping."""
    config = constrained.Config(multiplier_lr=lr, multiplier_momentum=0.0, multiplier_max_norm=float("inf"))
    return constrained.multiplier_step(raw, torch.zeros_like(raw), reached - thresholds, config)[0]


def _level_case(g, dtype=torch.float32, n=2):
    draw = dict(generator=g, dtype=dtype)
    rand = [torch.randn(n, **draw) for _ in range(3)]
    return dict(raw=rand[0], reached=rand[1], thresholds=rand[2], lr=0.7)


def _step(slope, sign=-1.0):
    return lambda raw, reached, thresholds, lr: raw + sign * lr * slope(raw) * (reached - thresholds)


STEP = Exercise(
    "52/multiplier_step",
    points=3,
    reference=multiplier_step,
    cases={
        "one reward": dict(
            raw=torch.zeros(1), reached=torch.tensor([0.6]), thresholds=torch.tensor([0.5]), lr=0.1
        ),  # sheet: -0.0025
        "far from 0": dict(
            raw=torch.tensor([3.0, -3.0]), reached=torch.tensor([1.0, 0.0]), thresholds=torch.tensor([0.0, 1.0]), lr=2.0
        ),
        "two rewards": _level_case,
        "three rewards, float64": lambda g: _level_case(g, torch.float64, 3),
        "one reward, float64": lambda g: _level_case(g, torch.float64, 1),
    },
    mistakes={
        "the wrong way: too little reward must raise the multiplier.": _step(
            lambda mu: mu.sigmoid() * (1 - mu.sigmoid()), sign=1.0
        ),
        "the slope of the sigmoid is missing: the step is taken in mu, not in l.": _step(torch.ones_like),
        "the slope of a sigmoid l is l (1 - l), not l.": _step(torch.sigmoid),
        "that is the slope of tanh.": _step(lambda mu: 1 - mu.tanh() ** 2),
        "one violation for all rewards: each multiplier answers for its own.": lambda raw, reached, thresholds, lr: (
            raw - lr * raw.sigmoid() * (1 - raw.sigmoid()) * (reached - thresholds).mean()
        ),
        "this gives l, not mu: the sigmoid belongs into the next mixing.": lambda raw, reached, thresholds, lr: (
            multiplier_step(raw, reached, thresholds, lr).sigmoid()
        ),
        "the size of the violation is lost: its sign alone decides here.": lambda raw, reached, thresholds, lr: (
            raw - lr * raw.sigmoid() * (1 - raw.sigmoid()) * (reached - thresholds).sign()
        ),
    },
)

# ---- Newton for the I-projection -------------------------------------------------------------------------------------


def _law(log_prior, features, weights):
    return (log_prior + features @ weights).softmax(0)


def newton_step(log_prior, features, targets, weights):
    """weights + Cov^-1 (targets - means), both under the tilt by `weights`: one step towards the I-projection."""
    law = _law(log_prior, features, weights)
    means = law @ features
    centred = features - means
    covariance = centred.T @ (law.unsqueeze(1) * centred)
    return weights + torch.linalg.solve(covariance, targets - means)


def _projection_case(g, n=13, k=2, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    features = torch.rand(n, k, **draw)
    return dict(
        log_prior=torch.randn(n, **draw).log_softmax(0),
        features=features,
        targets=features.mean(0) + 0.1 * torch.randn(k, **draw),
        weights=torch.randn(k, **draw),
    )


_SHEET = dict(
    log_prior=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log(),
    features=torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [1.0, 1.0]], dtype=torch.float64),
    targets=torch.tensor([0.6, 0.6], dtype=torch.float64),
)


def _newton(gradient=lambda targets, means: targets - means, matrix=None, at=None):
    """A variant: another gradient, another matrix of (law, features, means), or another law."""

    def variant(log_prior, features, targets, weights):
        law = _law(log_prior, features, weights if at is None else at(weights))
        means = law @ features
        centred = features - means
        covariance = centred.T @ (law.unsqueeze(1) * centred)
        if matrix is not None:
            covariance = matrix(law, features, covariance)
        return weights + torch.linalg.solve(covariance, gradient(targets, means))

    return variant


NEWTON = Exercise(
    "52/newton_step",
    points=5,
    reference=newton_step,
    cases={
        "from weights 0": _SHEET | dict(weights=torch.zeros(2, dtype=torch.float64)),
        "there already": _SHEET
        | dict(weights=torch.tensor([0.946762, 0.659080], dtype=torch.float64)),  # there already
        "two rewards": _projection_case,
        "one reward": lambda g: _projection_case(g, 7, 1),
        "three rewards": lambda g: _projection_case(g, 17, 3),
    },
    mistakes={
        "away from the targets: where a mean is too small, its weight must grow.": _newton(
            lambda targets, means: means - targets
        ),
        "second moments stand where the covariance belongs: the means must be subtracted first.": _newton(
            matrix=lambda law, features, covariance: features.T @ (law.unsqueeze(1) * features)
        ),
        "means and covariance are those of the base; each step needs those of the tilt it stands at.": _newton(
            at=torch.zeros_like
        ),
        "variances alone, each reward by itself: correlated rewards need the whole covariance.": _newton(
            matrix=lambda law, features, covariance: covariance.diagonal().diag()
        ),
        "that is a step of plain gradient ascent: the covariance is missing.": _newton(
            matrix=lambda law, features, covariance: torch.eye(len(covariance)).to(covariance)
        ),
        "all answers count alike in the covariance; they have probabilities.": _newton(
            matrix=lambda law, features, covariance: features.T.cov(correction=0).reshape(covariance.shape)
        ),
        "that is the change; the new weights are the old ones plus it.": lambda log_prior, features, targets, weights: (
            newton_step(log_prior, features, targets, weights) - weights
        ),
    },
)

# ---- Nelder-Mead -----------------------------------------------------------------------------------------------------


def candidates(simplex, scores):
    """(reflected, expanded, contracted): where Nelder-Mead would replace the vertex with the lowest score."""
    worst = scores.argmin()
    others = torch.arange(len(scores)) != worst
    centre = simplex[others].mean(0)
    reflected = centre + (centre - simplex[worst])
    return reflected, centre + 2 * (reflected - centre), centre + 0.5 * (simplex[worst] - centre)


def _candidates(worst=None, centre=None, expanded=None, contracted=None):
    """A variant of it, in one of its four places."""

    def variant(simplex, scores):
        at = (worst or (lambda s: s.argmin()))(scores)
        c = simplex[torch.arange(len(scores)) != at].mean(0) if centre is None else centre(simplex, scores)
        w = simplex[at]
        r = c + (c - w)
        e = c + 2 * (r - c) if expanded is None else expanded(c, r, w)
        return r, e, c + 0.5 * (w - c) if contracted is None else contracted(c, r, w)

    return variant


def _simplex(g, n=2, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    return dict(simplex=torch.rand(n + 1, n, **draw), scores=torch.randperm(n + 1, generator=g).to(dtype))


CANDIDATES = Exercise(
    "52/candidates",
    points=4,
    reference=candidates,
    cases={  # worst: the origin; the others' centre (1, 1)
        "a triangle": dict(
            simplex=torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), scores=torch.tensor([-3.0, -1.0, -2.0])
        ),
        "a triangle, float64": _simplex,
        "a tetrahedron": lambda g: _simplex(g, 3),
        "a line": lambda g: _simplex(g, 1, torch.float32),
    },
    mistakes={
        "the vertex to replace is the one with the lowest score; larger is better here.": _candidates(
            worst=lambda s: s.argmax()
        ),
        "the centre is that of the others: leave the worst vertex out.": _candidates(
            centre=lambda simplex, scores: simplex.mean(0)
        ),
        "reflected at the best vertex; at the centre of all the others is meant.": _candidates(
            centre=lambda simplex, scores: simplex[scores.argmax()]
        ),
        "the expansion goes on from the reflected point by twice the way: that is three times the way in all.": (
            _candidates(expanded=lambda c, r, w: r + 2 * (r - c))
        ),
        "twice the way from the worst vertex is the reflected point again; expansion counts from the centre.": (
            _candidates(expanded=lambda c, r, w: w + 2 * (c - w))
        ),
        "that contraction lies outside, between centre and reflection; the inner one lies towards the worst.": (
            _candidates(contracted=lambda c, r, w: c + 0.5 * (r - c))
        ),
    },
)

exercises = [STANDARDISE, MIX, STEP, NEWTON, CANDIDATES, *QUESTIONS]
