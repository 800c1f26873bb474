"""A causal language model seen as a policy: a response is an episode, each token an action.

    state     prompt and the tokens so far          action   the next token
    policy    softmax(logits / temperature), all of it: no top-k, no top-p, so what is sampled is what is scored
    reward    r(text, prompt), at the end

`LanguagePolicy` wraps a transformers model and its tokenizer and never replaces them. Prompts are padded on the left,
responses on the right: all responses of a batch then start in one column, and `tokens[:, i]` is everywhere the i-th
action. Log-probabilities, values and masks are indexed by the action; the logits (and hidden states) that belong to
it stand one position before it. Nothing is read from padding, so its content cannot matter.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minialign.kernels import at_least_float32, sample_tokens, token_entropy, token_log_probs
from minialign.policies import special_tokens
from minialign.policies.language_weights import LanguageWeights
from minialign.policies.noise import row_noise
from minialign.policies.passes import check_agreement, in_half_precision, new_cache, run_pass
from minialign.policies.responses import Responses, Scores


class LanguagePolicy(LanguageWeights):
    """Any transformers causal language model with its tokenizer; or a module called in the same way.

    network: called as `network(input_ids, attention_mask=...)`, it gives logits (b, s, v), as they are or as `.logits`.
    What else it takes (position_ids, a cache, logits_to_keep) is used if its forward names it: a table needs none of
    them. It may carry a LoRA adapter already, as a PeftModel.
    fixed_length: responses have no EOS and always `num_tokens` tokens (enumerable worlds). Else every id that the
    tokenizer or the network's generation_config calls EOS ends one. use_cache=False: whole passes, also to generate.
    network_evaluations counts sequences: each pass over one, or its generation token by token, counts 1, and 3 if it
    will be differentiated; in half precision a generation is scored again, and counts 2. A critic with its own trunk
    counts on its own, one on the policy's trunk nothing.

    Raises ValueError for a tokenizer without EOS or with ids that the network does not have, and for a
    generation_config that would have responses come from another distribution (repetition_penalty).
    """

    def __init__(self, network: nn.Module, tokenizer, *, fixed_length: bool = False, use_cache: bool = True):
        network = self._unwrapped(network)
        self.network = network.eval()  # dropout would make the ratio differ from 1 before the first update
        self.tokenizer, self.use_cache = tokenizer, use_cache
        special_tokens.check_decoding(network)
        self.ends = [] if fixed_length else special_tokens.ends(tokenizer, network)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad = pad if pad is not None else self.ends[0] if self.ends else 0  # padding is masked: any token will do
        size, _ = special_tokens.vocabulary(network)
        special_tokens.check_known([[self.pad], self.ends], ["the padding", "the end"], size, tokenizer)
        self.network_evaluations = 0
        self._agreed: set[bool] = set()  # whether passes were compared without (False) and with padding (True)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def context(self) -> int | None:
        """The longest sequence that the network takes, or None if it does not say."""
        return getattr(getattr(self.network, "config", None), "max_position_embeddings", None)

    def to(self, device: torch.device | str) -> "LanguagePolicy":
        """Moves the network, its reference and its critic in place."""
        for module in (self.network, self._frozen_copy, self._value_heads, self._value_network):
            if module is not None:
                module.to(device)
        return self

    # ---------------------------------------------------------------- prompts and responses

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (b, p) of prompts, padded on the left, each opened once as the tokenizer opens a text (BOS).

        Raises ValueError for an empty list, an empty prompt, one that ends with an end token or fills the context, and
        for a token that the network does not know.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the string {prompts!r}; expected a list of strings: [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("prompts is empty; give at least one.")
        unique = list(dict.fromkeys(prompts))
        ids = dict(zip(unique, special_tokens.encode(self.tokenizer, unique), strict=True))
        for prompt in unique:
            self._check_prompt(prompt, ids[prompt])
        names = [f"prompt {prompt[:40]!r}" for prompt in unique]
        size, _ = special_tokens.vocabulary(self.network)
        special_tokens.check_known(list(ids.values()), names, size, self.tokenizer)
        return self._pad([ids[prompt] for prompt in prompts], left=True)

    def _check_prompt(self, prompt: str, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens: the first action needs at least one before it (a BOS).")
        if ids[-1] in self.ends and len(ids) > 1:
            raise ValueError(
                f"prompt {prompt[-40:]!r} ends with an end token, so its response would follow an end: leave it away "
                "(a chat template puts the answer's opening there with add_generation_prompt=True)."
            )
        if self.context is not None and len(ids) >= self.context:
            raise ValueError(
                f"prompt {prompt[:40]!r} has {len(ids)} tokens, and the network's context is {self.context}: no room "
                "is left for a response. Shorten the prompt."
            )

    def _pad(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        padded, mask = [], []
        for row in rows:
            gap = width - len(row)
            before, after = (gap, 0) if left else (0, gap)
            padded.append([self.pad] * before + list(row) + [self.pad] * after)
            mask.append([False] * before + [True] * len(row) + [False] * after)
        return torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)

    def responses(
        self, prompts: Sequence[str], responses: Sequence[str] | Sequence[Sequence[int]], temperature: float | int = 1.0
    ) -> Responses:
        """Given responses, ready to be scored: texts, or token ids, which are taken as they are.

        EOS is added to a text, unless it ends with an end token of its own.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses: give one response to each.")
        prompt_tokens, prompt_mask = self.encode(prompts)
        if isinstance(responses[0], str):
            ids = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
            responses = [list(row) + ([] if row and row[-1] in self.ends else self.ends[:1]) for row in ids]
        empty = [i for i, row in enumerate(responses) if len(row) == 0]
        if empty:
            raise ValueError(f"response {empty[0]} has no tokens; every response has at least its EOS.")
        names, size = [f"response {i}" for i in range(len(responses))], special_tokens.vocabulary(self.network)[1]
        special_tokens.check_known(responses, names, size, self.tokenizer)
        tokens, mask = self._pad(responses, left=False)
        self._check_context(prompt_tokens.shape[1], tokens.shape[1])
        ended = torch.tensor([row[-1] in self.ends for row in responses], device=self.device)
        return Responses(
            prompt_tokens,
            prompt_mask,
            tokens,
            mask,
            None,
            ended,
            list(prompts),
            self._texts(tokens, mask),
            float(temperature),
        )

    def _texts(self, tokens: Tensor, mask: Tensor) -> list[str]:
        rows = [row[:length] for row, length in zip(tokens.tolist(), mask.sum(1).tolist(), strict=True)]
        rows = [row[:-1] if row[-1] in self.ends else row for row in rows]  # an end need not be special to a tokenizer
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _check_context(self, prompt_length: int, num_tokens: int) -> None:
        if self.context is not None and prompt_length + num_tokens > self.context:
            raise ValueError(
                f"the longest prompt has {prompt_length} tokens and num_tokens is {num_tokens}, together more than the "
                f"network's context of {self.context}: shorten one of them."
            )

    def draw_noise(
        self,
        num_samples: int,
        num_tokens: int,
        generator: torch.Generator | None = None,
        rows: Iterable[int] | Tensor | None = None,
    ) -> Tensor:
        """All the randomness of a generation: uniform (num_samples, num_tokens), one number a token, float64, CPU.

        rows: only these, what draw_noise(num_samples, num_tokens, generator)[rows] would be; the others are not drawn.
        """
        return row_noise("random", num_samples, (num_tokens,), torch.float64, generator, rows)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        num_tokens: int,
        *,
        generator: torch.Generator | None = None,
        temperature: float | int = 1.0,
        noise: Tensor | None = None,
    ) -> Responses:
        """One response to each prompt, of at most `num_tokens` tokens, sampled from softmax(logits / temperature).

        Stops when all have ended. noise: as from `draw_noise`, which is called if it is None; a row's response depends
        on its own prompt and noise alone. With a cache a token costs one position; log_probs of cached and of whole
        passes agree to rounding (1e-6 in float32). In half precision that rounding would move the first ratio from 1:
        there log_probs are those of `score`, from one more pass over the responses, which counts as an evaluation.

        Raises ValueError for a network whose passes disagree, with the cache and without, or beside padding: see
        `passes.check_agreement`. It is asked at the first call, and at the first with padding, at no cost that counts.
        """
        if num_tokens < 1 or not temperature > 0:
            raise ValueError(
                f"num_tokens is {num_tokens}, temperature {temperature}; expected at least 1, and above 0."
            )
        prompt_tokens, prompt_mask = self.encode(prompts)
        self._check_context(prompt_tokens.shape[1], num_tokens)
        noise = self.draw_noise(len(prompts), num_tokens, generator) if noise is None else noise
        noise = noise.to(self.device, torch.float32 if self.device.type == "mps" else noise.dtype)
        self.network_evaluations += len(prompts)
        cache = new_cache(self.network) if self.use_cache else None
        ends = torch.tensor(self.ends, dtype=prompt_tokens.dtype, device=self.device)
        sequence, seen = prompt_tokens, prompt_mask
        running = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        tokens, mask, log_probs = [], [], []
        for step in range(num_tokens):
            new = sequence if cache is None or step == 0 else sequence[:, -1:]
            logits, _ = run_pass(self.network, new, seen, keep=1, cache=cache)
            token = sample_tokens(logits[:, 0], noise[:, step], temperature)
            token = torch.where(running, token, self.pad)
            log_prob = token_log_probs(logits, token.unsqueeze(1), temperature).squeeze(1)
            tokens.append(token)
            mask.append(running)
            log_probs.append(torch.where(running, log_prob, 0.0))
            sequence = torch.cat([sequence, token.unsqueeze(1)], 1)
            seen = torch.cat([seen, running.unsqueeze(1)], 1)
            if self.ends:
                running = running & (token.unsqueeze(1) != ends).all(1)
                if not running.any():
                    break
        tokens, mask = torch.stack(tokens, 1), torch.stack(mask, 1)
        responses = Responses(
            prompt_tokens, prompt_mask, tokens, mask, torch.stack(log_probs, 1), ~running, list(prompts),
            self._texts(tokens, mask), float(temperature),
        )  # fmt: skip
        self._check_passes(responses)
        if in_half_precision(self.network):
            responses.log_probs = self.log_probs(responses)
        return responses

    def sample(self, prompts: Sequence[str], *, num_tokens: int, generator: torch.Generator | None = None) -> list[str]:
        """The texts of `generate`, one to each prompt: what a reward takes."""
        return self.generate(prompts, num_tokens, generator=generator).texts

    def _check_passes(self, responses: Responses) -> None:
        padded = not responses.prompt_mask.all()
        if padded in self._agreed:
            return
        spent = self.network_evaluations
        check_agreement(self.network, responses, responses.log_probs, self.log_probs)
        self.network_evaluations = spent
        self._agreed |= {False, padded}

    # ---------------------------------------------------------------- scoring

    def score(
        self,
        responses: Responses,
        *,
        temperature: float | int | None = None,
        reference: bool = False,
        values: bool = False,
        entropy: bool = False,
    ) -> Scores:
        """Log-probabilities of every token in one pass, and values and entropy from the same pass if asked.

        temperature: the one that the responses were sampled at, by default. reference=True: under the frozen base
        model, without gradient. Gradients flow otherwise: wrap it in torch.no_grad() where they are not wanted.
        """
        if values and reference:
            raise ValueError("the reference has no values: ask for them in a call of their own.")
        temperature = responses.temperature if temperature is None else temperature
        hidden = values and self._value_heads is not None
        logits, states = self._teacher_forced(self.network, responses, reference=reference, hidden=hidden)
        valid = responses.mask
        return Scores(
            torch.where(valid, token_log_probs(logits, responses.tokens, temperature), 0.0),
            self._values(responses, states) if values else None,
            torch.where(valid, token_entropy(logits, temperature), 0.0) if entropy else None,
        )

    def log_probs(
        self, responses: Responses, *, temperature: float | int | None = None, reference: bool = False
    ) -> Float[Tensor, "b t"]:
        """log pi(token | prompt, tokens before), nats, 0 behind the end; see `score`."""
        return self.score(responses, temperature=temperature, reference=reference).log_probs

    def values(self, responses: Responses) -> Float[Tensor, "b t k"]:
        """What the critic expects BEFORE each token, a number a head, 0 behind the end. Needs `add_value_heads`."""
        states = None
        if self._value_heads is not None:
            _, states = self._teacher_forced(self.network, responses, hidden=True, keep=1)
        return self._values(responses, states)

    def log_probs_and_values(
        self, responses: Responses, *, temperature: float | int | None = None
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t k"]]:
        """Both from one pass, where the critic sits on the policy's trunk."""
        scores = self.score(responses, temperature=temperature, values=True)
        return scores.log_probs, scores.values

    def _teacher_forced(
        self,
        network: nn.Module,
        responses: Responses,
        *,
        reference: bool = False,
        hidden: bool = False,
        keep: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs at the positions before each token: the last token is not read, for it predicts nothing."""
        differentiated = torch.is_grad_enabled() and not reference
        self.network_evaluations += len(responses) * (3 if differentiated else 1)
        tokens = torch.cat([responses.prompt_tokens, responses.tokens], 1)[:, :-1]
        mask = torch.cat([responses.prompt_mask, responses.mask], 1)[:, :-1]
        keep = responses.tokens.shape[1] if keep is None else keep
        if reference:
            with torch.no_grad(), self.reference_weights() as frozen:
                return run_pass(frozen, tokens, mask, keep)
        return run_pass(network, tokens, mask, keep, hidden=hidden)

    def _values(self, responses: Responses, states: Tensor | None) -> Tensor:
        if self._value_heads is not None:
            values = self._value_heads(states[:, -responses.tokens.shape[1] :])
        elif self._value_network is not None:
            values, _ = self._teacher_forced(self._value_network, responses)
        else:
            raise ValueError("this policy has no critic: call policy.add_value_heads() before.")
        return torch.where(responses.mask.unsqueeze(-1), at_least_float32(values), 0.0)
