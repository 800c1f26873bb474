"""What a model is taught a subject from: a few pictures of it, and the base model's own pictures beside them.

SubjectTask     what a world or a user brings: references, prompts to train and to test with, two similarities
Subject         the same as a policy trains on it: latents, with what the base draws for the training prompts
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minialign.rewards import Reward
from minialign.settings import Count, demand

Similarities = tuple[Reward, Reward]  # to the subject, to the prompt


class SubjectTask(NamedTuple):
    """references: samples of one subject, all to `reference_prompt`. token: the word of the prompts that stands for it.

    prompts: to train and validate with; class_prompts: the same without the subject's word, for DreamBooth's prior;
    test_prompts: to judge with, none of them in `prompts` where there are enough. similarities: (to the subject, to the
    prompt), rewards in [0, 1]; they get prompts without the token.
    """

    references: Any
    reference_prompt: Hashable
    prompts: list[Hashable]
    class_prompts: list[Hashable]
    test_prompts: list[Hashable]
    similarities: Similarities
    token: str


@dataclass(frozen=True)
class Subject:
    """References (r, *latent) to `reference_prompt`, and the base's own pictures (g, *latent) to `prompts`, one each.

    Both are the policy's states. validation_prompts: what the model is to be good at. token: the word that stands for
    the subject, hidden from rewards; None: there is none.
    """

    references: Tensor
    reference_prompt: Hashable
    generated: Tensor
    prompts: list[Hashable] = field(repr=False)
    validation_prompts: list[Hashable] = field(repr=False)
    token: str | None = None

    @classmethod
    @torch.no_grad()
    def draw(
        cls,
        policy,
        task: SubjectTask,
        references: Tensor,
        images_per_prompt: int = 4,
        of_class: bool = False,
        generator: torch.Generator | None = None,
    ) -> "Subject":
        """The base draws its pictures now, `images_per_prompt` a prompt: the policy must not have been trained yet.

        references: the task's as latents. of_class: the pictures are for the class prompts (DreamBooth's prior), else
        for the training prompts, with the subject's word. They stay the same in training; for a resumed run draw them
        with the same generator's state.
        """
        demand(Count, images_per_prompt=images_per_prompt)
        prompts = task.class_prompts if of_class else task.prompts
        asked = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        drawn = policy.rollout(asked, policy.draw_noise(max(1, len(asked)), generator), density=False).final
        return cls(references.to(drawn), task.reference_prompt, drawn, asked, list(task.prompts), task.token)

    def check(self, policy) -> None:
        """Raises ValueError for pictures that are not this policy's states, and for prompts that it does not know."""
        for name, pictures in (("references", self.references), ("generated", self.generated)):
            shape = tuple(pictures.shape[1:])
            if shape != tuple(policy.latent_shape) or len(pictures) == 0:
                raise ValueError(
                    f"the subject's {name} are {len(pictures)} of shape {shape}; expected at least one of "
                    f"{tuple(policy.latent_shape)}, this policy's states: encode pictures with its autoencoder before."
                )
            if not pictures.isfinite().all():
                raise ValueError(f"the subject's {name} hold nan or inf.")
        if len(self.prompts) != len(self.generated):
            raise ValueError(
                f"there are {len(self.generated)} generated pictures and {len(self.prompts)} prompts; expected one a "
                "picture."
            )
        policy.encode([self.reference_prompt, *self.prompts, *self.validation_prompts])


def without_token(prompts: Sequence[Hashable], token: str | None) -> list[Hashable]:
    """Prompts without the word that stands for the subject: a reward's encoder never learned it. Only whole words."""
    if token is None:
        return list(prompts)
    return [" ".join(w for w in p.split() if w != token) if isinstance(p, str) else p for p in prompts]
