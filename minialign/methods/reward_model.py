"""Reward models learned from preferences (Ziegler et al., 2019, arXiv 1909.08593; Stiennon et al., 2020, arXiv
2009.01325), and the variants against over-optimisation with which reward shaping is compared.

A person says which of two responses is better; Bradley and Terry (1952) make that the sigmoid of the difference of two
scores. They are fixed up to a shift for each prompt, so they are normalised over responses of the base model before RL:
only then does a KL weight mean anything.

    -log sigmoid(r(x, chosen) - r(x, rejected))                      bradley_terry_loss
    + regularisation (r_chosen^2 + r_rejected^2)      "Reg"          the same
    (r - bias) gain: mean 0, std 1 under the base     (Ziegler)      RewardModel.normalise
    theta = mean_m theta_m of several models          WARM           average_weights (Rame et al., 2024, 2401.12187)
    + |corr(r_q, n)| - corr(r_l, n) + |cos(w_q, w_l)| ODIN           odin_loss (Chen et al., 2024, 2402.07319)

`RewardModel` wraps any transformers sequence classifier and is itself a reward: `model(texts, prompts) -> scores`.
ODIN's model has two outputs, of which RL sees the first. As in neither paper: the score's head reads the last token,
EOS included, by the attention mask's end, so padding cannot move it; encoders pool as they do (policies/classifier.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from minialign import show
from minialign.evaluate import Trial
from minialign.loop import Run, Step, gather_rows, num_processes, own_rows
from minialign.pairs import Pairs
from minialign.policies import special_tokens
from minialign.policies.classifier import check_classifier, check_padding, class_outputs, output_layer
from minialign.policies.passes import in_full_precision
from minialign.settings import Count, Limit, NonNegative, Settings
from minialign.statistics import Moments


@dataclass(frozen=True)
class Config(Settings):
    num_epochs: Count = 1  # passes over the pairs; more of them overfit before they help
    batch_size: Count = 64  # pairs
    learning_rate: NonNegative = 1e-3  # AdamW, cosine to zero (tiny models; 5e-5 for large ones)
    weight_decay: NonNegative = 0.0
    regularisation: NonNegative = 0.0  # on squared scores ("Reg": 0.005)
    odin: bool = False  # two heads; the model needs num_labels = 2
    length_weight: NonNegative = 1.0  # ODIN's correlation term
    orthogonal_weight: NonNegative = 1.0  # ODIN's term on the two heads' weights
    max_grad_norm: Limit = 1.0  # l2


def bradley_terry_loss(
    chosen: Float[Tensor, "n"], rejected: Float[Tensor, "n"], regularisation: float | int = 0.0
) -> Float[Tensor, ""]:
    """-log sigmoid(chosen - rejected), mean over pairs, plus regularisation times the squared scores of a pair.

    log 2 where the scores are equal. A shift of both scores of a pair changes it by the regularisation alone.
    """
    return -logsigmoid(chosen - rejected).mean() + regularisation * (chosen**2 + rejected**2).mean()


def odin_loss(
    quality: Float[Tensor, "two n"],
    length: Float[Tensor, "two n"],
    num_tokens: Float[Tensor, "two n"],
    heads: Float[Tensor, "two d"],
    length_weight: float | int = 1.0,
    orthogonal_weight: float | int = 1.0,
) -> Float[Tensor, ""]:
    """Bradley-Terry on quality + length; quality must not correlate with the tokens' number, the length head must.

    Rows: chosen, rejected. heads: the weights of the quality and of the length head. |corr(quality, tokens)| -
    corr(length, tokens), Pearson over all responses; |cosine| of the heads.
    """
    total = quality + length
    correlation = _pearson(quality, num_tokens).abs() - _pearson(length, num_tokens)
    cosine = (heads[0] @ heads[1]).abs() / (heads[0].norm() * heads[1].norm() + 1e-6)
    return bradley_terry_loss(total[0], total[1]) + length_weight * correlation + orthogonal_weight * cosine


def _pearson(x: Float[Tensor, "*any"], y: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm() + 1e-6)


class RewardModel:
    """A transformers sequence classifier as a reward: `model(texts, prompts) -> scores (b,)`, outside autograd.

    network: `AutoModelForSequenceClassification` with num_labels 1, or 2 for ODIN (quality first). It reads the tokens
    of the prompt, opened as its tokenizer opens a text (BOS, [CLS]), those of the response, EOS (or [SEP]). Scores are
    (output - bias) gain; `normalise` sets the two. rows: texts in one call of the network.

    Raises ValueError for another kind of network, and for a tokenizer without pad or EOS.
    """

    def __init__(self, network: nn.Module, tokenizer, rows: int = 256, name: str = "reward_model"):
        check_classifier(network)
        self.network, self.tokenizer, self.rows, self.__name__ = network.eval(), tokenizer, rows, name
        self.end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if tokenizer.pad_token_id is None or self.end is None:
            raise ValueError("the tokenizer needs a pad and an EOS token: scores are read at the EOS.")
        network.config.pad_token_id = tokenizer.pad_token_id
        self.bias, self.gain = 0.0, 1.0
        self._padded = False  # whether padding was seen, and found to change nothing
        self.network_evaluations = 0  # rows; one that will be differentiated counts 3

    def tokenize(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask (b, t), padded on the right; num_tokens (b,) of the responses with their EOS.

        Raises ValueError for a token that the network does not know.
        """
        after = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        after = [list(ids) + [self.end] * (list(ids[-1:]) != [self.end]) for ids in after]
        # apart, so that a response's tokens do not depend on its prompt
        rows = [a + b for a, b in zip(special_tokens.encode(self.tokenizer, prompts), after, strict=True)]
        names = [f"prompt {prompt[:40]!r} with its response" for prompt in prompts]
        special_tokens.check_known(rows, names, special_tokens.vocabulary(self.network)[0], self.tokenizer)
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask, "num_tokens": torch.tensor([len(b) for b in after])}

    def outputs(self, batch: dict[str, Tensor]) -> Float[Tensor, "b heads"]:
        """What the classifier's heads say of each row: of its last token, where it is causal."""
        device = next(self.network.parameters()).device
        self.network_evaluations += len(batch["input_ids"]) * (3 if torch.is_grad_enabled() else 1)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        outputs = class_outputs(self.network, ids, mask)
        if not self._padded and not mask.all():  # once
            check_padding(self.network, ids, mask, outputs.detach())
            self._padded = True
        return outputs

    @torch.no_grad()
    def __call__(self, samples: Sequence[str], prompts: Sequence[str]) -> Float[Tensor, "b"]:
        scores = []
        for first in range(0, len(samples), self.rows):
            part = slice(first, first + self.rows)
            scores.append(self.outputs(self.tokenize(prompts[part], samples[part]))[:, 0])
        return (torch.cat(scores) - self.bias) * self.gain

    def normalise(self, samples: Sequence[str], prompts: Sequence[str]) -> None:
        """Sets gain and bias so that these responses, of the base model, score 0 on average with std 1."""
        self.bias, self.gain = 0.0, 1.0
        scores = self(samples, prompts)
        moments = Moments.of(scores)
        if not moments.unbiased_std > 1e-5 * scores.abs().max():  # less is rounding
            raise ValueError(f"all these responses, {len(scores)}, have the same score: nothing to normalise by.")
        self.bias, self.gain = float(moments.mean), 1 / float(moments.unbiased_std)


def average_weights(networks: Sequence[nn.Module], into: nn.Module) -> nn.Module:
    """WARM: `into` gets the plain average of the networks' weights, which must descend from the same initial ones."""
    states = [network.state_dict() for network in networks]
    averaged = {}
    for name, first in states[0].items():
        stack = torch.stack([state[name] for state in states])
        averaged[name] = stack.mean(0) if first.is_floating_point() else first
    into.load_state_dict(averaged)
    return into


def batch_loss(model: RewardModel, pairs: Pairs, rows: Sequence[int], config: Config):
    """(loss, share of pairs that the model orders as labelled) of pairs `rows`.

    Each process scores its own share of them and sees the scores of all, for ODIN's correlations run over the batch;
    the gradient is that of its own.
    """
    own = own_rows(len(rows))
    scores, num_tokens = pair_scores(model, pairs, [rows[i] for i in own.tolist()])
    scores = gather_rows(scores, own, len(rows)).transpose(0, 1)
    right = (scores[0].sum(-1) > scores[1].sum(-1)).float().mean()
    if not config.odin:
        return bradley_terry_loss(scores[0, :, 0], scores[1, :, 0], config.regularisation), right
    num_tokens = gather_rows(num_tokens, own, len(rows)).T.to(scores)
    heads, share = output_layer(model.network).weight, 1 / num_processes()
    heads = share * heads + (1 - share) * heads.detach()  # all processes see them: each adds its share of the gradient
    loss = odin_loss(scores[..., 0], scores[..., 1], num_tokens, heads, config.length_weight, config.orthogonal_weight)
    return loss, right


def pair_scores(model: RewardModel, pairs: Pairs, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Outputs (n, 2, heads) and numbers of tokens (n, 2) of the chosen and the rejected of pairs `rows`, maybe none."""
    if not rows:
        nothing = next(model.network.parameters()).float().sum() * 0  # takes part, with a gradient of 0
        return nothing.expand(0, 2, model.network.config.num_labels), torch.zeros(0, 2)
    prompts = [pairs.prompts[i] for i in rows]
    batch = model.tokenize(prompts * 2, [pairs.chosen[i] for i in rows] + [pairs.rejected[i] for i in rows])
    outputs = model.outputs(batch).view(2, len(rows), -1).transpose(0, 1)
    return outputs, batch["num_tokens"].view(2, -1).T.float()


def check(model: RewardModel, pairs: Pairs, config: Config) -> None:
    """Raises ValueError for settings or pairs that cannot train."""
    if len(pairs) == 0 or not isinstance(pairs.chosen, list):
        raise ValueError("there are no pairs of texts here; expected Pairs(prompts, chosen, rejected) of lists.")
    heads, wanted = model.network.config.num_labels, 2 if config.odin else 1
    if config.odin:
        output_layer(model.network)
    if heads != wanted:
        raise ValueError(
            f"the network has {heads} outputs and odin is {config.odin}: load it with num_labels={wanted}."
        )


def train(model: RewardModel, pairs: Pairs, config: Config = Config(), generator=None, resume=None) -> Iterator[Step]:
    """Trains the model in place on labelled pairs; yields a `Step` a minibatch, with `loss` and `accuracy`.

    generator: a CPU torch.Generator that orders the pairs (seed 0 if None). Network evaluations: 3 a response. Under
    `torchrun` each process scores its own share of every minibatch.
    """
    check(model, pairs, config)
    in_full_precision(model.network).requires_grad_(True)
    parameters = list(model.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    run = Run(config, optimizer, generator, resume, [model])
    ordering = torch.Generator()
    ordering.set_state(run.generator.get_state())  # a copy: a resumed run draws the same order again
    order = [torch.randperm(len(pairs.prompts), generator=ordering) for _ in range(config.num_epochs)]
    minibatches = [rows.tolist() for epoch in order for rows in epoch.split(config.batch_size)]
    for number in run.rounds(len(minibatches)):
        loss, right = batch_loss(model, pairs, minibatches[number], config)
        run.backward(loss, {"loss": loss / num_processes(), "accuracy": right / num_processes()})
        run.update((1 + math.cos(math.pi * number / len(minibatches))) / 2)
        yield run.step({}, labels=len(minibatches[number]))
    model.network.requires_grad_(False)


# On the command line ------------------------------------------------------------------------------------------------

PAIRS, TEST_PAIRS = 4000, 2000  # to learn from, one label in ten being wrong; to judge by, all labels right


def share_right(model: RewardModel, pairs: Pairs) -> float:
    return float((model(pairs.chosen, pairs.prompts) > model(pairs.rejected, pairs.prompts)).float().mean())


def trial(world, config: Config, seed: int) -> Trial:
    """Which share of pairs a classifier on the base model's trunk orders as the oracle does, before and after."""
    network = world.reward_network(seed=seed, num_labels=2 if config.odin else 1)
    model = RewardModel(network, world.policy.tokenizer)
    pairs = Pairs(*world.preferences(PAIRS, torch.Generator().manual_seed(1_000 + seed)))
    sets = {"accuracy": world.prompts, "accuracy_held_out": world.held_out}
    tests = {name: Pairs(*world.preferences(TEST_PAIRS, torch.Generator().manual_seed(0), 0.0, prompts=prompts))
             for name, prompts in sets.items()}  # fmt: skip
    answers = world.answers()
    texts, prompts = zip(*((text, p) for p in world.prompts for text in answers[p][:16]), strict=True)
    points = world.oracle(texts, prompts)

    def measured() -> dict:
        spent = model.network_evaluations
        scores = model(texts, prompts)
        found = {name: share_right(model, test) for name, test in tests.items()}
        found["correlation"] = float(torch.corrcoef(torch.stack([scores, points]))[0, 1])
        model.network_evaluations = spent  # not charged to training
        return found | {"scores": (scores - scores.mean()) / scores.std()}

    def draw(before: dict, after: dict, rows: list[dict], folder, title: str) -> None:
        levels = [level for level in sorted(set(points.tolist())) if (points == level).sum() >= 20]  # fewer say little
        means = {name: [float(side["scores"][points == level].mean()) for level in levels]
                 for name, side in (("before", before), ("after", after))}  # fmt: skip
        figure = show.curves(means, levels, "gold, points", "mean score, in standard deviations", title=title)
        show.save(figure, folder / "before_after.png", "mean score of the reward model at each level of gold")
        accuracy = {"accuracy": [row["accuracy"] for row in rows]}
        labels = [row["labels"] for row in rows]
        figure = show.curves(accuracy, labels, "labels", "accuracy of the minibatch", title="Accuracy over training")
        show.save(figure, folder / "curves.png", "accuracy over training")

    return Trial(
        before=measured, after=measured, draw=draw, save=network.save_pretrained,
        steps=lambda generator, resume=None: train(model, pairs, config, generator, resume),
        total=config.num_epochs * math.ceil(PAIRS / config.batch_size),
        labels={
            "accuracy": "pairs ordered as gold does", "accuracy_held_out": "the same, held-out prompts",
            "correlation": "correlation with gold",
        },
    )  # fmt: skip
