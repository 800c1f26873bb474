"""Exercises of chapter 51: a win rate as reward, its slope, running statistics, the optimum's KL, a planted bug."""

import torch

from minialign.course.chapters.questions_51 import QUESTIONS
from minialign.course.check import Exercise
from minialign.exact import discrete_kl, exponential_tilt
from minialign.methods import par
from minialign.statistics import Moments

# ---- preference as reward --------------------------------------------------------------------------------------------


def par_reward(rewards, references, k):
    """Mean over references of sigmoid(k (r - r_ref)): (b,), (b, m) -> (b,). The package's own."""
    return par.shape_reward(rewards, references, par.Config("par", k=k))


def _rows_case(g, dtype=torch.float32, shape=(7, 3)):
    draw = dict(generator=g, dtype=dtype)
    level = 5 * torch.randn(shape[0], **draw)  # a prompt's level, which should not matter
    return dict(
        rewards=level + torch.randn(shape[0], **draw),
        references=level.unsqueeze(1) + torch.randn(shape, **draw),
        k=float(0.5 + 2 * torch.rand((), generator=g)),
    )


_ROWS = {
    "one response": dict(rewards=torch.tensor([2.0]), references=torch.tensor([[1.0, 0.5]]), k=1.0),  # sheet: 0.774317
    "one reference": dict(rewards=torch.tensor([3.0, -4.0]), references=torch.tensor([[3.0], [-3.0]]), k=2.0),
    "float32": _rows_case,
    "float64": lambda g: _rows_case(g, torch.float64),
    "one response, float64": lambda g: _rows_case(g, torch.float64, (1, 5)),
}

PAR_REWARD = Exercise(
    "51/par_reward",
    points=3,
    reference=par_reward,
    cases=_ROWS,
    mistakes={
        "average the win rates, not the references: a sigmoid of a mean is not the mean of the sigmoids.": (
            lambda rewards, references, k: (k * (rewards - references.mean(1))).sigmoid()
        ),
        "that is how often the reference wins: turn the difference round.": lambda rewards, references, k: (
            1 - par_reward(rewards, references, k)
        ),
        "a sum over references where the mean belongs: with ten of them it goes up to 10.": (
            lambda rewards, references, k: par_reward(rewards, references, k) * references.shape[1]
        ),
        "k is missing.": lambda rewards, references, k: par_reward(rewards, references, 1.0),
        "k multiplies the whole difference, not the reward alone.": lambda rewards, references, k: (
            (k * rewards.unsqueeze(1) - references).sigmoid().mean(1)
        ),
        "the references are not used: this is the uncentred sigmoid.": lambda rewards, references, k: (
            k * rewards
        ).sigmoid(),
        "every response is compared with the references of all rows; those of its own row are meant.": (
            lambda rewards, references, k: (k * (rewards.unsqueeze(1) - references.flatten())).sigmoid().mean(1)
        ),
        "wins are counted, 0 or 1; the model's probability of winning is meant.": lambda rewards, references, k: (
            (rewards.unsqueeze(1) > references).to(rewards.dtype).mean(1)
        ),
    },
)

# ---- its slope -------------------------------------------------------------------------------------------------------


def par_slope(rewards, references, k):
    """df/dr of PAR: mean over references of k s (1 - s), s the win rate against that one."""
    wins = (k * (rewards.unsqueeze(1) - references)).sigmoid()
    return (k * wins * (1 - wins)).mean(1)


PAR_SLOPE = Exercise(
    "51/par_slope",
    points=3,
    reference=par_slope,
    cases=_ROWS,
    mistakes={
        "first the slope against each reference, then the mean; s (1 - s) of the mean is another number.": (
            lambda rewards, references, k: (lambda f: k * f * (1 - f))(par_reward(rewards, references, k))
        ),
        "the chain rule: the inner derivative, k, is missing.": lambda rewards, references, k: (
            par_slope(rewards, references, k) / k
        ),
        "the inner derivative appears once: k, not k squared.": lambda rewards, references, k: (
            k * par_slope(rewards, references, k)
        ),
        "that is f itself, not its derivative.": par_reward,
        "the derivative of a sigmoid s is s (1 - s), not s squared.": lambda rewards, references, k: (
            k * (k * (rewards.unsqueeze(1) - references)).sigmoid() ** 2
        ).mean(1),
        "a better response never gets less: the slope of a sigmoid is positive.": lambda rewards, references, k: (
            -par_slope(rewards, references, k)
        ),
    },
)

# ---- running statistics ----------------------------------------------------------------------------------------------


def merge(count, mean, var, batch):
    """(count, mean, var) of everything so far and `batch` (n,); var is the population variance. The package's own."""
    seen = Moments(count, mean, var, mean, mean).merge(Moments.of(batch))
    return seen.count, seen.mean, seen.var


def _merge(formula):
    """A variant: formula(share of the batch, old mean, old var, batch) -> (mean, var)."""

    def wrong(count, mean, var, batch):
        total = count + len(batch)
        return total, *formula(len(batch) / total, mean, var, batch)

    return wrong


def _means(share, mean, batch):
    return mean + share * (batch.mean() - mean)


def _merge_case(g, dtype=torch.float64):
    draw = dict(generator=g, dtype=dtype)
    return dict(
        count=torch.tensor(13.0, dtype=dtype),
        mean=3 + torch.randn((), **draw),
        var=0.5 + torch.rand((), **draw),
        batch=2 * torch.randn(5, **draw),
    )


MERGE = Exercise(
    "51/merge",
    points=3,
    reference=merge,
    cases={  # 4, then 1, 2, 3: mean 2.5, variance 1.25. No batch of one: Bessel's nan would hide the hint
        "one value and a batch": dict(
            count=torch.tensor(1.0), mean=torch.tensor(4.0), var=torch.tensor(0.0), batch=torch.tensor([1.0, 2, 3])
        ),
        "two values that lie apart": dict(
            count=torch.tensor(4.0), mean=torch.tensor(0.0), var=torch.tensor(1.0), batch=torch.tensor([9.0, 11.0])
        ),
        "float64": _merge_case,
        "float32": lambda g: _merge_case(g, torch.float32),
    },
    mistakes={
        "the mean of two means: each counts as much as it has rewards.": _merge(
            lambda share, mean, var, batch: (
                (mean + batch.mean()) / 2,
                merge(torch.tensor((1 - share) / share * len(batch)).to(var), mean, var, batch)[2],
            )
        ),
        "the two variances are averaged, but two groups that lie apart spread farther than either.": _merge(
            lambda share, mean, var, batch: (
                _means(share, mean, batch),
                (1 - share) * var + share * batch.var(correction=0),
            )
        ),
        "the distance of the two means counts with share times (1 - share).": _merge(
            lambda share, mean, var, batch: (
                _means(share, mean, batch),
                (1 - share) * var + share * batch.var(correction=0) + (batch.mean() - mean) ** 2,
            )
        ),
        "the shares are exchanged: the batch has n rewards, everything before has count.": _merge(
            lambda share, mean, var, batch: (
                _means(1 - share, mean, batch),
                share * var + (1 - share) * batch.var(correction=0) + share * (1 - share) * (batch.mean() - mean) ** 2,
            )
        ),
        "the batch's variance has Bessel's correction; the population's divides by n.": _merge(
            lambda share, mean, var, batch: (
                _means(share, mean, batch),
                (1 - share) * var + share * batch.var() + share * (1 - share) * (batch.mean() - mean) ** 2,
            )
        ),
        "the batch replaces what was seen before.": _merge(
            lambda share, mean, var, batch: (batch.mean(), batch.var(correction=0))
        ),
    },
)

# ---- where the optimum lies ------------------------------------------------------------------------------------------


def optimum_kl(prior, shaped, beta):
    """KL in nats of pi* = prior exp(shaped / beta) / Z from the prior (n,): a scalar."""
    log_prob = exponential_tilt(prior.log(), shaped, beta)[0]
    return discrete_kl(log_prob, prior.log())


def _tilt(prior, f):
    return prior * f.exp() / (prior * f.exp()).sum()


def _kl_case(g, dtype=torch.float64, n=7):
    draw = dict(generator=g, dtype=dtype)
    return dict(prior=torch.randn(n, **draw).softmax(0), shaped=torch.rand(n, **draw), beta=0.3)


OPTIMUM_KL = Exercise(
    "51/optimum_kl",
    points=4,
    reference=optimum_kl,
    cases={  # sheet: 0.172623
        "four answers": dict(
            prior=torch.tensor([0.4, 0.3, 0.2, 0.1]), shaped=torch.tensor([0.1, 0.4, 0.6, 0.95]), beta=0.5
        ),
        "equal rewards": dict(prior=torch.tensor([0.5, 0.25, 0.25]), shaped=torch.tensor([0.7, 0.7, 0.7]), beta=2.0),
        "a large reward over a small beta": dict(  # exp(120)
            prior=torch.tensor([0.5, 0.25, 0.25]), shaped=torch.tensor([1.2, 0.4, 0.8]), beta=0.01
        ),
        "float64": _kl_case,
        "float32": lambda g: _kl_case(g, torch.float32, 3),
    },
    mistakes={
        "this is KL(prior || pi*), the other direction: the average is over pi*, the policy.": (
            lambda prior, shaped, beta: (prior * (prior / _tilt(prior, shaped / beta)).log()).sum()
        ),
        "a large beta should hold the optimum near the prior: the reward is divided by it.": (
            lambda prior, shaped, beta: (lambda p: (p * (p / prior).log()).sum())(_tilt(prior, shaped * beta))
        ),
        "pi* tilts the prior; this one tilts the uniform law.": lambda prior, shaped, beta: (
            lambda p: (p * (p / prior).log()).sum()
        )((shaped / beta).softmax(0)),
        "log Z is missing: log pi* - log prior is shaped / beta minus log Z.": lambda prior, shaped, beta: (
            _tilt(prior, shaped / beta) * shaped / beta
        ).sum(),
        "that is the bound w^2 / (8 beta^2), not the KL itself.": lambda prior, shaped, beta: (
            (shaped.max() - shaped.min()) ** 2 / (8 * beta**2)
        ),
        "this is minus the entropy of pi*: the prior belongs in the logarithm, too.": lambda prior, shaped, beta: (
            lambda p: (p * p.log()).sum()
        )(_tilt(prior, shaped / beta)),
    },
)

# ---- the planted bug -------------------------------------------------------------------------------------------------


def shape_batch(rewards, prompts, references, k):
    """PAR of a batch, each response against the references of its own prompt."""
    rows = torch.stack([references[prompt] for prompt in prompts])
    return par_reward(rewards, rows, k)


def _planted(rewards, prompts, references, k):
    rows = torch.cat(list(references.values())).expand(len(rewards), -1)
    return par_reward(rewards, rows, k)


def _in_order(rewards, prompts, references, k):
    lists = list(references.values())
    return par_reward(rewards, torch.stack([lists[i % len(lists)] for i in range(len(prompts))]), k)


def _batch_case(g):
    level = {"hen": 0.0, "cow": 6.0, "owl": -3.0}
    prompts = [list(level)[i] for i in torch.randint(3, (5,), generator=g).tolist()]
    draw = dict(generator=g, dtype=torch.float64)
    return dict(
        rewards=torch.tensor([level[prompt] for prompt in prompts], dtype=torch.float64) + torch.randn(5, **draw),
        prompts=prompts,
        references={prompt: value + torch.randn(4, **draw) for prompt, value in level.items()},
        k=1.5,
    )


SHAPE_BATCH = Exercise(
    "51/shape_batch",
    points=3,
    reference=shape_batch,
    cases={
        "two prompts": dict(
            rewards=torch.tensor([1.0, 9.0, 11.0]),
            prompts=["easy", "hard", "easy"],
            references={"hard": torch.tensor([0.0, 2.0]), "easy": torch.tensor([10.0, 12.0])},
            k=1.0,
        ),
        "drawn, float64": _batch_case,
    },
    mistakes={
        "that is the colleague's bug still: the references of all prompts in one pot.": _planted,
        "references are looked up by prompt, not by the place in the batch.": _in_order,
        "one reference remains of each prompt's several: average the win rates, not the references.": (
            lambda rewards, prompts, references, k: (
                k * (rewards - torch.stack([references[prompt].mean() for prompt in prompts]))
            ).sigmoid()
        ),
        "centred within the batch, not by references: what the batch has learned is then subtracted again.": (
            lambda rewards, prompts, references, k: (k * (rewards - rewards.mean())).sigmoid()
        ),
    },
)

exercises = [PAR_REWARD, PAR_SLOPE, MERGE, OPTIMUM_KL, SHAPE_BATCH, *QUESTIONS]
