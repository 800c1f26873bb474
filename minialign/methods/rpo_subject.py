"""RPO: subject-driven generation from a few pictures (Miao et al., NeurIPS 2024, arXiv 2407.12164).

Four pictures of one dog, and the model should draw this dog wherever it is asked to. Trained on the pictures alone it
copies them and forgets the prompt. The lambda-harmonic reward is high only where a sample is like the subject and like
its prompt. It picks the checkpoint; and it labels, by Bradley-Terry, a reference against a picture of the base's.

    S_I, S_T: like the subject, like the prompt, both in [0, 1]          HarmonicReward's two similarities
    r = 1 / (lambda / S_I + (1 - lambda) / S_T)                          harmonic_mean
    P(the reference wins) = sigmoid(r(x_R, c_G) - r(x_G, c_G))           label_probabilities
    L_sim = e_R; k = (e_R^0 - e_R) - (e_G^0 - e_G); L_pref(beta k)       subject_losses
    every so many steps: sample, score, keep the weights if better       EarlyStopper

e are mean squared denoising errors of the reference picture (R) and of the base's own (G), e^0 those under the base.
DreamBooth (Ruiz et al., 2022, arXiv 2208.12242) is a setting: preference_weight 0, and prior_weight 0 or 1, where the
base's pictures should be of the class ("a dog").

As in the official code: the labels look at the text alone (lambda_labels 0), so that the reference usually *loses* and
the preference is an anchor at the base's pictures; either half of a pair has its own prompt, noise and level.
As in neither: the harmonic mean without 1e-8; beta is heard (their SD script ignores it), gradients are clipped (theirs
are not), a picture has its own reward (theirs may have another's), the token is really taken out of the prompts that
rewards see. Labels are probabilities by default: the expected gradient of theirs, drawn ("hard"), without its noise.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from minialign import show
from minialign.checkpoint import EarlyStopper
from minialign.evaluate import Trial
from minialign.kernels import at_least_float32, denoising_log_ratio, preference_probability, same_shape, soft_label_loss
from minialign.loop import Run, Step, check_policy, gather_rows, num_processes, own_rows
from minialign.policies.noise import row_noise
from minialign.rewards import Reward, RewardError, checked, name_of
from minialign.settings import Count, Fraction, Limit, Natural, NonNegative, Positive, Settings, demand
from minialign.subjects import Similarities, Subject, without_token


@dataclass(frozen=True)
class Config(Settings):
    num_iterations: Count = 400  # optimizer steps
    batch_size: Count = 16  # references a step, and as many of the base's pictures, over all processes (paper: 1)
    beta: NonNegative = 1.0  # on differences of mean errors, about 0.01: a weak anchor
    preference_weight: NonNegative = 1.0  # of L_pref; 0: DreamBooth
    prior_weight: NonNegative = 0.0  # of e_G alone: DreamBooth's prior preservation has 1
    labels: Literal["soft", "hard"] = "soft"  # the probability itself, or drawn from it at every step (official)
    label_scale: Positive = 1.0  # on the difference of rewards, within the sigmoid
    lambda_labels: Fraction = 0.0  # of the reward that labels; 0: the text alone
    lambda_validation: Fraction = 0.5  # of the reward that selects (paper: 0.3, 0.5, 0.7)
    validate_every: Count = 20  # steps (paper: 40)
    samples_per_prompt: Count = 4  # in a validation
    validation_seed: Natural = 0  # the same noise in every validation
    selection: Literal["best", "last"] = "best"  # the weights that train() leaves behind
    learning_rate: NonNegative = 1e-4  # AdamW (paper: 5e-6 for a whole UNet)
    weight_decay: NonNegative = 1e-2
    max_grad_norm: Limit = 1.0  # l2


# The reward -----------------------------------------------------------------------------------------------------------


def harmonic_mean(
    image_similarity: Float[Tensor, "*any"], text_similarity: Float[Tensor, "*any"], weight: float | int
) -> Float[Tensor, "*any"]:
    """1 / (weight / S_I + (1 - weight) / S_T), of similarities in [0, 1]: both or nothing.

    Limits: S_T at weight 0 and S_I at weight 1, exactly; S where both are S; 0 where either is 0 and has a weight.
    Between the smaller of the two and their weighted arithmetic mean.
    """
    same_shape(image_similarity=image_similarity, text_similarity=text_similarity)
    image, text = at_least_float32(image_similarity), at_least_float32(text_similarity)
    if weight == 0:
        return text
    if weight == 1:
        return image
    return image * text / (weight * text + (1 - weight) * image).clamp_min(torch.finfo(image.dtype).tiny)


class HarmonicReward:
    """The lambda-harmonic reward of two similarities, rewards in [0, 1]; itself a reward, for any method.

    weight: lambda, of the image's. token: a word of the prompts that neither similarity gets to see. Cosines of an
    encoder c are to be given as (c + 1) / 2; the mean of several references is taken before, in the similarity.
    Raises RewardError (a ValueError) for a similarity outside [0, 1].
    """

    def __init__(
        self, image_similarity: Reward, text_similarity: Reward, weight: float | int, token: str | None = None
    ):
        demand(Fraction, weight=weight)
        self.similarities, self.weight, self.token = (image_similarity, text_similarity), weight, token
        self.__name__ = "harmonic"

    def parts(self, samples: Tensor, prompts: Sequence[Hashable]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """(S_I, S_T) of each sample."""
        shown = without_token(prompts, self.token)
        found = [checked(similarity, samples, shown) for similarity in self.similarities]
        for similarity, scores in zip(self.similarities, found, strict=True):
            if outside := ((scores < 0) | (scores > 1)).nonzero().flatten().tolist():
                raise RewardError(
                    f"similarity {name_of(similarity)!r} is {float(scores[outside[0]]):.4g} for sample {outside[0]}; "
                    "expected numbers in [0, 1], or their harmonic mean means nothing. Of a cosine c: (c + 1) / 2."
                )
        return found[0], found[1]

    def __call__(self, samples: Tensor, prompts: Sequence[Hashable]) -> Float[Tensor, "n"]:
        return harmonic_mean(*self.parts(samples, prompts), self.weight)


# The loss -------------------------------------------------------------------------------------------------------------


def subject_losses(
    error_reference: Float[Tensor, "n"],
    error_generated: Float[Tensor, "n"],
    base_reference: Float[Tensor, "n"],
    base_generated: Float[Tensor, "n"],
    label: Float[Tensor, "n"],
    beta: float | int,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """(L_sim, L_pref, k) of n pairs, from mean squared errors; label: the probability that the reference wins.

    k is how much more than the base the weights improve on the reference than on the base's own picture.
    Limits: at the base k = 0 and L_pref = log 2, whatever the label, and the gradient of L_sim + L_pref is
    [1 + beta (p - 1/2)] grad e_R + beta (1/2 - p) grad e_G; beta 0: that of L_sim alone. L_pref alone is smallest at
    beta k = log(p / (1 - p)). No gradient reaches the base.
    """
    reference = denoising_log_ratio(error_reference, base_reference)
    k = 2 * (reference - denoising_log_ratio(error_generated, base_generated))  # its half is not RPO's
    return at_least_float32(error_reference), soft_label_loss(beta * k, label), k


def label_probabilities(
    reward: Reward, references: Tensor, generated: Tensor, prompts: Sequence[Hashable], scale: float | int = 1.0
) -> Float[Tensor, "r g"]:
    """P(reference i wins against picture j, both judged by j's prompt), for all of them; samples, not latents.

    In [0.269, 0.731] for rewards in [0, 1] and scale 1: these labels are nearly coin flips.
    """
    own = checked(reward, generated, prompts)
    asked = list(dict.fromkeys(prompts))
    all_prompts = [prompt for prompt in asked for _ in range(len(references))]
    scores = checked(reward, references.repeat(len(asked), *[1] * (references.ndim - 1)), all_prompts)
    place = torch.tensor([asked.index(prompt) for prompt in prompts], device=scores.device)
    return preference_probability(scores.view(len(asked), -1)[place].T - own, scale)[0]


# The loop -------------------------------------------------------------------------------------------------------------


def train(
    policy, similarities: Similarities, subject: Subject, config: Config = Config(), generator=None, resume=None
) -> Iterator[Step]:
    """Trains `policy` in place on a subject; yields a `Step` an update. At the end it has the weights that scored best.

    similarities: (to the subject, to the prompt), rewards in [0, 1] of decoded samples. The paper validates with the
    training prompts: judge the result on others.
    Metrics: `loss`, `similarity`, `preference`, `gain` (k) and, in rounds with a validation, `reward` (harmonic),
    `image_similarity`, `text_similarity` and `best_step`. A reward query is one sample scored by both similarities.
    generator: a CPU torch.Generator, the run's only randomness (seed 0 if None). resume: an earlier run's checkpoint.
    """
    check(policy, subject, config)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    stopper = EarlyStopper(policy.parameters())
    run = Run(config, optimizer, generator, resume, [policy], stopper=stopper)
    label, queries = None, 0
    if config.preference_weight:
        pictures = policy.decode(subject.references), policy.decode(subject.generated)
        judge = HarmonicReward(*similarities, config.lambda_labels, subject.token)
        label = label_probabilities(judge, *pictures, subject.prompts, config.label_scale).to(policy.device)
        queries = (len(subject.references) * len(set(subject.prompts)) + len(subject.prompts)) * (run.done == 0)
    for number in run.rounds():
        loss, info, share = batch_loss(policy, subject, label, config, run.generator)
        run.backward(loss, info, share)
        run.update()
        metrics = {}
        if (number + 1) % config.validate_every == 0:
            metrics = validate(policy, similarities, subject, config)
            stopper.update(number + 1, float(metrics["reward"]))
            metrics["best_step"] = stopper.step
            queries += len(subject.validation_prompts) * config.samples_per_prompt
        yield run.step(metrics, reward_queries=queries)
        queries = 0
    if config.selection == "best":
        stopper.restore()


def batch_loss(
    policy, subject: Subject, label: Tensor | None, config: Config, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor], float]:
    """(loss, metrics, share) of this process's part of a batch, which is drawn whole: pictures, levels, noise, labels.

    The base's pictures are left out where no term needs them.
    """
    n = config.batch_size
    pick = [torch.randint(len(x), (n,), generator=generator) for x in (subject.references, subject.generated)]
    levels, coin = policy.draw_levels(2 * n, generator).view(2, n), torch.rand(n, generator=generator)
    own, sides = own_rows(n), 2 if config.preference_weight or config.prior_weight else 1
    shape = (2, *policy.latent_shape)
    noise = row_noise("standard_normal", n, shape, policy.state_dtype, generator, own).to(policy.device)
    i, j = (rows[own] for rows in pick)
    prompts = [subject.reference_prompt] * len(own) + [subject.prompts[row] for row in j.tolist()]
    latents = [subject.references[i.to(subject.references.device)], subject.generated[j.to(subject.generated.device)]]
    given = (
        torch.cat(latents[:sides]).to(policy.device), levels[:sides, own.to(levels.device)].flatten(),
        noise[:, :sides].transpose(0, 1).flatten(0, 1), policy.encode(prompts[: sides * len(own)]),
    )  # fmt: skip
    error = policy.training_error(*given, reduction="mean").view(sides, -1)
    loss, info = error[0], {"similarity": error[0].mean()}
    if config.prior_weight:
        loss = loss + config.prior_weight * error[1]
        info["prior"] = error[1].mean()
    if label is not None:
        base = policy.training_error(*given, reduction="mean", reference=True).view(sides, -1)
        p = label[i.to(label.device), j.to(label.device)]
        if config.labels == "hard":
            p = (coin[own].to(p) < p).to(p)
        _, preference, k = subject_losses(*error, *base, p.to(error.dtype), config.beta)
        loss = loss + config.preference_weight * preference
        info |= {"preference": preference.mean(), "gain": k.mean()}
    return loss.mean(), {"loss": loss.mean()} | info, len(own) / n


@torch.no_grad()
def validate(policy, similarities: Similarities, subject: Subject, config: Config) -> dict[str, Tensor]:
    """Mean harmonic reward, and its two parts, of samples to the training prompts; the same noise every time."""
    prompts = [p for p in subject.validation_prompts for _ in range(config.samples_per_prompt)]
    own = own_rows(len(prompts))
    noise = policy.draw_noise(len(prompts), torch.Generator().manual_seed(config.validation_seed), own)
    asked = [prompts[i] for i in own.tolist()]
    judge = HarmonicReward(*similarities, config.lambda_validation, subject.token)
    parts = torch.stack(judge.parts(policy.sample(asked, noise), asked), 1)
    image, text = gather_rows(parts, own, len(prompts)).unbind(1)
    reward = harmonic_mean(image, text, config.lambda_validation)
    return {"reward": reward.mean(), "image_similarity": image.mean(), "text_similarity": text.mean()}


def check(policy, subject: Subject, config: Config) -> None:
    """Raises ValueError for a policy or a subject that cannot train, before anything is spent."""
    check_policy(policy, "training_error")
    if not isinstance(subject, Subject):
        raise ValueError(f"the subject is a {type(subject).__name__}; expected Subject, as Subject.draw gives it.")
    subject.check(policy)
    prompts = len(subject.validation_prompts)
    if min(config.batch_size, prompts * config.samples_per_prompt) < num_processes():
        raise ValueError(
            f"batch_size is {config.batch_size}, and a validation has {prompts} prompts times "
            f"{config.samples_per_prompt} samples, for {num_processes()} processes; each needs one of both."
        )


# On the command line ------------------------------------------------------------------------------------------------


def floor(policy, config: Config, metrics: dict) -> dict:
    """References and, where a term needs them, the base's pictures, forward and backward; once under the reference."""
    rows = config.batch_size * (2 if config.preference_weight or config.prior_weight else 1)
    return {"forward": [rows] * bool(config.preference_weight), "backward": [rows]}


def trial(world, config: Config, seed: int) -> Trial:
    """The world's subject, in places where no training saw it, before and after; from the same noise."""
    policy, task, generator = world.policy, world.subject(seed), torch.Generator().manual_seed(40_000 + seed)
    subject = Subject.draw(
        policy, task, world.encode(task.references), of_class=not config.preference_weight, generator=generator
    )
    prompts = [prompt for prompt in task.test_prompts for _ in range(TEST_SAMPLES)]
    judge = HarmonicReward(*task.similarities, config.lambda_validation, task.token)

    def measured() -> dict:
        spent = policy.network_evaluations
        samples = policy.sample(prompts, generator=torch.Generator().manual_seed(10_000 + seed))
        policy.network_evaluations = spent  # not charged to training
        image, text = judge.parts(samples, prompts)
        scores = harmonic_mean(image, text, config.lambda_validation)
        numbers = {"reward": scores.mean(), "image_similarity": image.mean(), "text_similarity": text.mean()}
        return {name: float(value) for name, value in numbers.items()} | {"samples": samples, "scores": scores}

    def draw(before: dict, after: dict, rows: list[dict], folder, title: str) -> None:
        sides = before["samples"], after["samples"], prompts, before["scores"], after["scores"]
        show.before_after(*sides, folder / "before_after.png", title=title, score_name="reward")
        if looks := [row for row in rows if "reward" in row]:
            curves = {label: [row[name] for row in looks] for name, label in LABELS.items()}
            at = [row["step"] + 1 for row in looks]
            figure = show.curves(curves, at, "updates", "in a validation", title="Over training")
            show.save(figure, folder / "curves.png", "similarities over training")

    return Trial(
        before=measured, after=measured, draw=draw, save=policy.save_adapter, labels=LABELS,
        steps=lambda generator, resume=None: train(policy, task.similarities, subject, config, generator, resume),
        total=config.num_iterations,
    )  # fmt: skip


TEST_SAMPLES = 6  # a prompt
LABELS = {"reward": "reward", "image_similarity": "like the subject", "text_similarity": "like the prompt"}
