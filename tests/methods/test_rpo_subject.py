"""RPO: the sheet's numbers and limits, what the loss weighs, which weights are handed back, a real pipeline."""

import dataclasses
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch

from minialign.checkpoint import EarlyStopper
from minialign.methods import rpo_subject as rpo
from minialign.policies.diffusion import DiffusionPolicy
from minialign.rewards import RewardError
from minialign.subjects import Subject, SubjectTask, without_token
from minialign.worlds import dogs

stable_diffusion = runpy.run_path(str(Path(__file__).parent.parent / "policies" / "conftest.py"))["stable_diffusion"]

SMALL = rpo.Config(
    num_iterations=4, batch_size=6, validate_every=2, samples_per_prompt=2, learning_rate=1e-3, label_scale=2.0
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def start(dtype=torch.float64, **settings):
    """(policy, task, subject) of the exact dogs, which need no time to be made."""
    policy, task = dogs.load(base="exact", num_steps=4)
    policy.network.to(dtype)
    policy.to("cpu")
    given = dict(images_per_prompt=2, generator=torch.Generator().manual_seed(1)) | settings
    return policy, task, Subject.draw(policy, task, task.references, **given)


def trained(config, similarities=None, subject=None, seed=0):
    """Weights after training, flat; rows; the weights behind every step."""
    policy, task, drawn = start()
    rows, weights = [], []
    steps = rpo.train(
        policy, similarities or task.similarities, subject or drawn, config, torch.Generator().manual_seed(seed)
    )
    for step in steps:
        rows.append(step.row())
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), rows, weights


# ---- the reward ------------------------------------------------------------------------------------------------------


def test_the_harmonic_mean_has_the_sheets_numbers_and_limits():
    image, text = f64(0.9, 0.5), f64(0.1, 0.5)
    for weight, value in ((0.3, 0.136364), (0.5, 0.18), (0.7, 0.264706)):
        torch.testing.assert_close(rpo.harmonic_mean(image, text, weight), f64(value, 0.5), atol=5e-7, rtol=0)
    image, text = torch.rand(2, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rpo.harmonic_mean(image, text, 0), text) and torch.equal(
        rpo.harmonic_mean(image, text, 1), image
    )
    for weight in (0.01, 0.3, 0.9):
        found, arithmetic = rpo.harmonic_mean(image, text, weight), weight * image + (1 - weight) * text
        assert (found >= torch.minimum(image, text)).all() and (found < arithmetic).all()
    # 0.3 / 0.5 / 0.7 of the arithmetic mean: .34, .5, .66, as the sheet has it
    assert pytest.approx(0.34) == 0.3 * 0.9 + 0.7 * 0.1
    nothing = rpo.harmonic_mean(f64(0.0, 1.0, 0.0), f64(1.0, 0.0, 0.0), 0.5)
    assert torch.equal(nothing, f64(0, 0, 0))
    assert rpo.harmonic_mean(f64(0.0), f64(0.7), 0)[0] == 0.7  # what has no weight may be 0


def test_the_harmonic_mean_in_half_precision_and_backwards():
    half = rpo.harmonic_mean(torch.tensor([0.9]).bfloat16(), torch.tensor([0.1]).bfloat16(), 0.5)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(0.18, abs=2e-3)
    image, text = f64(0.9, 0.2).requires_grad_(), f64(0.1, 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rpo.harmonic_mean(a, b, 0.3), (image, text))


def test_the_reward_hides_the_token_and_refuses_raw_cosines():
    asked = []

    def text(samples, prompts):
        asked.extend(prompts)
        return torch.tensor([0.1, 0.4])

    reward = rpo.HarmonicReward(lambda samples, prompts: torch.tensor([0.9, 0.4]), text, 0.5, token="w")
    found = reward(torch.zeros(2, 3), ["a w dog below a yellow cow", "a dog"])
    torch.testing.assert_close(found, torch.tensor([0.18, 0.4]))
    assert asked == ["a dog below a yellow cow", "a dog"]  # whole words alone
    assert without_token(["a [V] dog", 3], "[V]") == ["a dog", 3] and without_token(["a w"], None) == ["a w"]
    cosine = rpo.HarmonicReward(lambda samples, prompts: torch.tensor([0.9, -0.4]), text, 0.5)
    with pytest.raises(RewardError, match=r"is -0.4 for sample 1; expected numbers in \[0, 1\].*\(c \+ 1\) / 2"):
        cosine(torch.zeros(2, 3), ["", ""])
    with pytest.raises(ValueError, match=r"weight is 1\.5"):
        rpo.HarmonicReward(text, text, 1.5)


def test_labels_are_those_of_their_own_picture_and_prompt():
    """By hand, two references and three pictures of two prompts; the authors' code takes another picture's reward."""
    table = {"x": 1.0, "y": 3.0}

    def reward(samples, prompts):
        return samples[:, 0] * torch.tensor([table[prompt] for prompt in prompts])

    references, generated = torch.tensor([[0.1], [0.2]]), torch.tensor([[0.3], [0.05], [0.0]])
    found = rpo.label_probabilities(reward, references, generated, ["x", "y", "x"])
    by_hand = [[0.1 - 0.3, 0.3 - 0.15, 0.1], [0.2 - 0.3, 0.6 - 0.15, 0.2]]
    torch.testing.assert_close(found, torch.tensor(by_hand).sigmoid())
    swapped = rpo.label_probabilities(reward, generated[:1], references[:1], ["x"])
    assert float(found[0, 0] + swapped[0, 0]) == pytest.approx(1)


def test_labels_are_nearly_coin_flips():
    def reward(samples, prompts):
        return samples[:, 0]

    found = rpo.label_probabilities(reward, torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]), ["x", "x"])
    torch.testing.assert_close(found, torch.tensor([[0.731059, 0.5], [0.5, 0.268941]]), atol=5e-7, rtol=0)
    p = 0.731059
    assert -p * math.log2(p) - (1 - p) * math.log2(1 - p) == pytest.approx(0.84, abs=0.005)
    steep = rpo.label_probabilities(reward, torch.tensor([[1.0]]), torch.tensor([[0.0]]), ["x"], scale=0.1)
    assert float(steep) == pytest.approx(1 / (1 + math.exp(-0.1)))


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "beta"), [(0.475, 1.0), (0.9, 3.0)])
def test_at_the_base_the_loss_is_log_2_and_its_gradient_weighs_the_two_errors(p, beta):
    errors = f64(0.4, 1.3), f64(0.2, 0.7)
    reference, generated = (e.clone().requires_grad_() for e in errors)
    similarity, preference, k = rpo.subject_losses(reference, generated, *errors, torch.full((2,), p).double(), beta)
    torch.testing.assert_close(preference, torch.full((2,), math.log(2)).double())
    assert torch.equal(k, f64(0, 0)) and torch.equal(similarity, errors[0])
    (similarity + preference).sum().backward()
    torch.testing.assert_close(reference.grad, torch.full((2,), 1 + beta * (p - 0.5)).double())
    torch.testing.assert_close(generated.grad, torch.full((2,), beta * (0.5 - p)).double())
    if p == 0.475:  # the sheet's digits
        assert reference.grad[0].item() == pytest.approx(0.975) and generated.grad[0].item() == pytest.approx(0.025)


def test_k_is_the_reference_gain_minus_the_other_and_no_gradient_reaches_the_base():
    given = [f64(0.3).requires_grad_(), f64(0.9).requires_grad_(), f64(0.5).requires_grad_(), f64(1.0).requires_grad_()]
    _, preference, k = rpo.subject_losses(*given, f64(1.0), 2.0)
    assert k.item() == pytest.approx((0.5 - 0.3) - (1.0 - 0.9))
    assert preference.item() == pytest.approx(math.log1p(math.exp(-2 * 0.1)))
    preference.sum().backward()
    assert given[0].grad.item() > 0 and given[1].grad.item() < 0 and given[2].grad is None and given[3].grad is None


def test_without_similarity_the_preference_has_a_finite_minimum_at_the_logit():
    """Sheet, check 4: beta k = log(p / (1 - p)); Newton from 0."""
    p, beta = f64(0.2, 0.45, 0.7), 4.0
    error = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([error], max_iter=50, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = rpo.subject_losses(error, f64(0, 0, 0), f64(0, 0, 0), f64(0, 0, 0), p, beta)[1].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(-beta * error.detach(), p.logit(), atol=1e-6, rtol=0)


def test_soft_labels_are_the_expectation_of_hard_ones():
    p, gradients = 0.3, []
    for label in (p, 1.0, 0.0):
        errors = [f64(0.4).requires_grad_(), f64(0.8).requires_grad_()]
        rpo.subject_losses(*errors, f64(0.5), f64(0.6), f64(label), 2.0)[1].sum().backward()
        gradients.append(torch.stack([e.grad for e in errors]))
    torch.testing.assert_close(gradients[0], p * gradients[1] + (1 - p) * gradients[2])


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_beta_zero_is_dreambooth_without_prior():
    """Sheet, check 5, to the last bit: the same pictures, levels and noise are drawn."""
    plain, _, _ = trained(dataclasses.replace(SMALL, preference_weight=0.0, selection="last"))
    zero, rows, _ = trained(dataclasses.replace(SMALL, beta=0.0, selection="last"))
    torch.testing.assert_close(zero, plain, atol=1e-12, rtol=0)
    assert rows[-1]["preference"] == pytest.approx(math.log(2))
    moved, _, _ = trained(dataclasses.replace(SMALL, selection="last"))
    assert (moved - plain).abs().max() > 1e-5


def test_prior_preservation_adds_the_error_of_the_base_pictures():
    policy, _, subject = start(of_class=True)
    assert set(subject.prompts) == {"a dog"} and subject.validation_prompts[0] == "a [V] dog in the snow"
    config = dataclasses.replace(SMALL, preference_weight=0.0, prior_weight=0.5)
    loss, info, share = rpo.batch_loss(policy, subject, None, config, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx((info["similarity"] + 0.5 * info["prior"]).item()) and share == 1
    alone, less, _ = rpo.batch_loss(
        policy, subject, None, dataclasses.replace(config, prior_weight=0.0), torch.Generator().manual_seed(0)
    )
    assert alone.item() == pytest.approx(info["similarity"].item()) and "prior" not in less


def test_the_two_halves_have_their_own_noise_and_level():
    """One picture, one prompt for both: with shared noise and level their errors would be equal."""
    policy, task, _ = start()
    twin = Subject(
        task.references[:1].double(), task.reference_prompt, task.references[:1].double(), [task.reference_prompt],
        task.prompts,
    )  # fmt: skip
    config = dataclasses.replace(SMALL, preference_weight=0.0, prior_weight=1.0)
    _, info, _ = rpo.batch_loss(policy, twin, None, config, torch.Generator().manual_seed(0))
    assert abs((info["similarity"] - info["prior"]).item()) > 1e-3


def test_hard_labels_are_drawn_anew_at_every_step():
    """Each is one of the two that a sure label gives; both come, with p = 1/2, in twelve draws."""
    policy, _, subject = start()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05)  # away from the base, where all labels cost the same
    hard = dataclasses.replace(SMALL, labels="hard", batch_size=1)
    drawn = []
    for seed in range(12):
        half, sure, never = (
            rpo.batch_loss(policy, subject, torch.full((4, 6), p), c, torch.Generator().manual_seed(seed))[1][
                "preference"
            ].item()
            for p, c in ((0.5, hard), (1.0, dataclasses.replace(hard, labels="soft")),
                         (0.0, dataclasses.replace(hard, labels="soft")))
        )  # fmt: skip
        assert abs(sure - never) > 1e-5 and min(abs(half - sure), abs(half - never)) < 1e-9
        drawn.append(abs(half - sure) < 1e-9)
    assert 0 < sum(drawn) < 12


class Scripted:
    """An image similarity whose mean is what the script says, look after look."""

    def __init__(self, *values):
        self.values, self.looks = values, 0

    def __call__(self, samples, prompts):
        self.looks += 1
        return torch.full((len(samples),), self.values[self.looks - 1])


def test_the_best_weights_are_handed_back_not_the_last():
    config = dataclasses.replace(
        SMALL, num_iterations=10, lambda_validation=1.0, preference_weight=0.0, learning_rate=3e-3
    )
    task = start()[1]
    values = (0.2, 0.8, 0.8, 0.7, 0.1)  # the first of equal ones
    for selection, behind in (("best", 3), ("last", 9)):
        similarities = Scripted(*values), task.similarities[1]
        final, rows, weights = trained(dataclasses.replace(config, selection=selection), similarities)
        assert torch.equal(final, weights[behind])
        looks = [row for row in rows if "reward" in row]
        assert [row["best_step"] for row in looks] == [2, 4, 4, 4, 4] and [row["step"] for row in looks] == [
            1,
            3,
            5,
            7,
            9,
        ]
        assert [row["reward"] for row in looks] == pytest.approx(list(values))
    assert not torch.equal(weights[3], weights[9])


def test_the_stopper_keeps_copies_and_its_state():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    stopper = EarlyStopper([parameter])
    stopper.restore()
    assert parameter.item() == 1 and stopper.update(5, -2.0) and not stopper.update(6, -2.0)
    parameter.data.fill_(7.0)
    other = EarlyStopper([parameter])
    other.load(stopper.tensors())
    assert (other.step, other.value) == (5, -2.0)
    other.restore()
    assert parameter.item() == 1 and not other.update(7, float("nan"))


def test_costs_are_counted():
    """Six references and six pictures, three times each and once under the reference; validations; labels once."""
    policy, task, subject = start()
    drawn = policy.network_evaluations
    assert drawn == 3 * 2 * 4
    steps = [s.row() for s in rpo.train(policy, task.similarities, subject, SMALL, torch.Generator().manual_seed(0))]
    looks = [0, 3 * 2 * 4, 0, 3 * 2 * 4]
    totals = torch.tensor([6 * 2 * 3 + 12 + look for look in looks]).cumsum(0).tolist()
    assert [row["network_evaluations"] for row in steps] == totals
    labels = 4 * 3 + 6
    assert [row["reward_queries"] for row in steps] == [labels, labels + 6, labels + 6, labels + 12]
    _, rows, _ = trained(dataclasses.replace(SMALL, preference_weight=0.0))
    assert rows[0]["network_evaluations"] == 18 and rows[0]["reward_queries"] == 0


def test_what_cannot_train_is_refused_by_name():
    policy, task, subject = start()

    def refused(match, subject=subject, policy=policy, config=SMALL):
        with pytest.raises(ValueError, match=match):
            next(rpo.train(policy, task.similarities, subject, config))

    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="Subject"):
        next(rpo.train(policy, task.similarities, task.references, SMALL))
    pixels = dataclasses.replace(subject, references=torch.zeros(4, 3, 8, 8))
    refused(r"references are 4 of shape \(3, 8, 8\); expected at least one of \(4,\)", pixels)
    refused("references are 0 of shape", dataclasses.replace(subject, references=torch.zeros(0, 4)))
    refused("generated hold nan", dataclasses.replace(subject, generated=subject.generated * float("nan")))
    refused("6 generated pictures and 1 prompts", dataclasses.replace(subject, prompts=["a dog"]))
    refused("unknown prompt 'a cat'", dataclasses.replace(subject, validation_prompts=["a cat"]))
    refused("the policy is a str; this method needs one that", policy="network")
    for change, message in (({"beta": -1.0}, "beta is -1"), ({"labels": "firm"}, "labels is 'firm'"),
                            ({"lambda_validation": 1.1}, "lambda_validation is 1.1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="images_per_prompt is 0"):
        Subject.draw(policy, task, task.references, 0)


# ---- on the ecosystem's classes --------------------------------------------------------------------------------------


def test_a_stable_diffusion_pipeline_learns_a_subject_and_diffusers_loads_it(tmp_path):
    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=3.0)
    policy.add_lora(rank=2)
    generator = torch.Generator().manual_seed(0)

    def image(samples, prompts):
        return samples.mean((1, 2, 3))

    def text(samples, prompts):
        assert all("w" not in prompt.split() for prompt in prompts)
        return samples[:, 0].mean((1, 2))

    prompts = ["a w c on d", "a w c in e"]
    task = SubjectTask(None, "a w c", prompts, ["a c"], prompts, (image, text), "w")
    subject = Subject.draw(policy, task, torch.randn(3, 4, 4, 4, generator=generator), 2, generator=generator)
    noise = policy.draw_noise(2, torch.Generator().manual_seed(1))
    before = policy.sample(prompts, noise)
    config = dataclasses.replace(SMALL, learning_rate=0.01, batch_size=2)
    rows = [s.row() for s in rpo.train(policy, (image, text), subject, config, generator)]
    assert rows[0]["preference"] == pytest.approx(math.log(2), abs=1e-5) and abs(rows[0]["gain"]) < 1e-6
    assert all(row["grad_norm"] > 0 for row in rows) and abs(rows[-1]["gain"]) > 0
    after = policy.sample(prompts, noise)
    assert (after - before).abs().max() > 1e-3
    policy.save_adapter(tmp_path / "lora")
    pipe = stable_diffusion(tmp_path)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    again = DiffusionPolicy.from_pipeline(pipe, num_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(again.sample(prompts, noise), after, atol=1e-5, rtol=0)


def test_a_base_in_half_precision_keeps_what_trains_in_float32(tmp_path):
    policy = DiffusionPolicy.from_pipeline(
        stable_diffusion(tmp_path).to(torch.bfloat16), num_steps=3, guidance_scale=1.0
    )
    policy.add_lora(rank=2)
    same = (lambda samples, prompts: samples.mean((1, 2, 3)),) * 2
    task = SubjectTask(None, "a w c", ["a w c on d"], ["a c"], [], same, "w")
    subject = Subject.draw(policy, task, torch.randn(3, 4, 4, 4), 2, generator=torch.Generator().manual_seed(0))
    rows = [s.row() for s in rpo.train(policy, same, subject, dataclasses.replace(SMALL, batch_size=2))]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in policy.parameters())
    assert all(row["grad_norm"] > 0 and math.isfinite(row["loss"]) for row in rows)


def test_a_trial_measures_draws_and_saves(tmp_path):
    policy = DiffusionPolicy.from_pipeline(stable_diffusion(tmp_path), num_steps=3, guidance_scale=1.0)
    policy.add_lora(rank=2)
    similarities = (lambda x, _: x.mean((1, 2, 3))), (lambda x, _: x[:, 0].mean((1, 2)))
    task = SubjectTask(
        torch.rand(3, 3, 8, 8), "a w c", ["a w c on d", "a w c in e"], ["a c"], ["a w c by d"], similarities, "w"
    )
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    world = SimpleNamespace(policy=policy, subject=lambda seed: task, encode=lambda samples: latents)
    trial = rpo.trial(world, dataclasses.replace(SMALL, learning_rate=0.01, batch_size=2), 0)
    spent, before = policy.network_evaluations, trial.before()
    assert policy.network_evaluations == spent  # looking is not charged
    rows = [step.row() for step in trial.steps(torch.Generator().manual_seed(0))]
    after = trial.after()
    assert len(rows) == trial.total == 4 and before["reward"] != after["reward"]
    trial.draw(before, after, rows, tmp_path, "a trial")
    trial.save(tmp_path / "saved")
    names = {path.name for path in [*tmp_path.iterdir(), *(tmp_path / "saved").iterdir()]}
    assert {"before_after.png", "curves.png", "pytorch_lora_weights.safetensors"} <= names
    assert rpo.floor(policy, SMALL, {}) == {"forward": [12], "backward": [12]}
    assert rpo.floor(policy, dataclasses.replace(SMALL, preference_weight=0.0), {}) == {"forward": [], "backward": [6]}
