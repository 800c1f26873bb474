"""What a language policy deals in: responses to prompts, and what one pass says about them."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class Responses:
    """Responses to prompts, a row each; `responses[rows]` selects rows.

    prompt_tokens, prompt_mask (b, p), padded on the left; tokens, mask (b, t), padded on the right to the longest of
    the responses. mask is True on every token of a response, its EOS included. log_probs (b, t) under the policy and
    the temperature that sampled, 0 behind the end; None if the responses came from elsewhere. ended (b,): by EOS, not
    by the limit on tokens. texts: without special tokens.
    """

    prompt_tokens: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor | None
    ended: Tensor
    prompts: list[str]
    texts: list[str]
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response (b,), its EOS included."""
        return self.mask.sum(1)

    def __getitem__(self, rows: Tensor | slice) -> "Responses":
        rows = torch.arange(len(self), device=self.tokens.device)[rows]
        chosen = rows.tolist()
        columns = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                columns[field.name] = value[rows]
            elif isinstance(value, list):
                columns[field.name] = [value[i] for i in chosen]
        return replace(self, **columns)


class Scores(NamedTuple):
    """What one pass says about responses, all (b, t) and 0 behind the end; values (b, t, k) if asked, entropy too."""

    log_probs: Tensor
    values: Tensor | None
    entropy: Tensor | None
