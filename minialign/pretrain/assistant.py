"""`minialign pretrain assistant`: trains the shipped GPT-2 on written answers of two kinds of writers, in minutes.

Maximum likelihood of the answer given the question, fresh answers at every step: the model learns how writers write,
errors included, and so knows about two facts in three. Afterwards it answers each question 256 times; these answers are
shipped too, so that preferences and best-of-n start at once. One thread and a fixed seed: the same bytes again on the
same machine and torch.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int, Integer
from torch import Tensor, nn

from minialign.policies.language import LanguagePolicy
from minialign.pretrain.formats import save_tokenizer
from minialign.pretrain.whole import whole
from minialign.worlds import assistant
from minialign.worlds.base import quietly

IGNORED = -100  # label of what is not to be learned: questions and padding


@dataclass(frozen=True)
class Recipe:
    num_steps: int = 2000  # optimizer steps
    batch_size: int = 64  # answers, all new
    learning_rate: float = 3e-3  # AdamW, cosine to zero after a short warm-up
    weight_decay: float = 1e-2
    num_warmup: int = 100
    width: int = 64
    layers: int = 2
    num_answers: int = 256  # shipped answers to each question


def tokens_and_labels(prompts: Sequence[str], texts: Sequence[str]) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """Question, answer, EOS, padded on the right; labels are the answer and its EOS."""
    index = {word: i for i, word in enumerate(assistant.words())}
    asked = [[index[word] for word in prompt.split()] for prompt in prompts]
    said = [[*(index[word] for word in text.split()), index["<eos>"]] for text in texts]
    width = max(len(a) + len(b) for a, b in zip(asked, said, strict=True))
    gaps = [width - len(a) - len(b) for a, b in zip(asked, said, strict=True)]
    tokens = [a + b + [index["<pad>"]] * gap for a, b, gap in zip(asked, said, gaps, strict=True)]
    labels = [[IGNORED] * len(a) + b + [IGNORED] * gap for a, b, gap in zip(asked, said, gaps, strict=True)]
    return torch.tensor(tokens), torch.tensor(labels)


def answer_loss(network: nn.Module, tokens: Int[Tensor, "b s"], labels: Int[Tensor, "b s"]) -> Tensor:
    """Nats a token of answers. Padding stands on the right, where a causal model cannot see it."""
    logits = network(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train(recipe: Recipe, seed: int, report=print) -> nn.Module:
    """The trained network. Seeds the global random state."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = GPT2LMHeadModel(assistant.config(recipe.width, recipe.layers)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    start = time.perf_counter()
    for step in range(recipe.num_steps):
        rate = min((step + 1) / recipe.num_warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps)))
        optimizer.param_groups[0]["lr"] = rate * recipe.learning_rate
        texts, prompts = assistant.corpus(recipe.batch_size, generator)
        loss = answer_loss(network, *tokens_and_labels(prompts, texts))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0:
            report(
                f"step {step + 1:>5}/{recipe.num_steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s"
            )
    return network.eval()


def sample_answers(network: nn.Module, num_answers: int, seed: int) -> Integer[Tensor, "prompts answers tokens"]:
    """`num_answers` to every question in the order of `TOPICS`, uint8; padded behind the EOS."""
    policy = LanguagePolicy(network, assistant.make_tokenizer())
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in assistant.TOPICS:
        drawn = policy.generate([prompt] * num_answers, assistant.NUM_TOKENS, generator=generator)
        padded = torch.zeros(num_answers, assistant.NUM_TOKENS, dtype=torch.uint8)
        padded[:, : drawn.tokens.shape[1]] = torch.where(drawn.mask, drawn.tokens, 0)
        rows.append(padded)
    return torch.stack(rows)


# What the card says -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(network: nn.Module, folder: Path, seed: int = 1) -> dict[str, float]:
    """The figures of the card, of the shipped answers."""
    texts, prompts = assistant.corpus(4096, torch.Generator().manual_seed(seed))
    pairs = [(text, prompt) for prompt, texts in assistant.answers(folder).items() for text in texts]
    figures = {"loss on new answers, nats a token": float(answer_loss(network, *tokens_and_labels(prompts, texts)))}
    for name, (said, asked) in {"written": (texts, prompts), "sampled": zip(*pairs, strict=True)}.items():
        readings = [assistant.read(*pair) for pair in zip(said, asked, strict=True)]
        scores, count = assistant.gold(said, asked), len(said)
        figures |= {
            f"{name} answers: right": float(assistant.right(said, asked).mean()),
            f"{name} answers: gold, mean": float(scores.mean()),
            f"{name} answers: gold, standard deviation": float(scores.std()),
            f"{name} answers: words": sum(len(text.split()) for text in said) / count,
            f"{name} answers: courtesies": sum(r.courtesies for r in readings) / count,
            f"{name} answers: fillers": sum(r.fillers for r in readings) / count,
            f"{name} answers: with loose words": sum(r.loose_words > 0 for r in readings) / count,
        }
    return figures


def card(recipe: Recipe, seed: int, figures: dict[str, float], num_parameters: int, seconds: float, sums: dict) -> str:
    """The README.md beside the weights."""
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    hashes = "\n".join(f"| `{name}` | `{value}` |" for name, value in sums.items())
    return f"""# Base model of the world `assistant`

A `GPT2LMHeadModel` (transformers) with {num_parameters:,} parameters and a tokenizer of {len(assistant.words())} whole
words. It answers {len(assistant.TOPICS)} questions about {len(assistant.FACTS)} animals, often rightly, sometimes
politely. `answers.safetensors` holds {recipe.num_answers} answers to each question, sampled at temperature 1.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "minialign/worlds/weights/assistant"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
asked = tokenizer("what does the cow eat ?", return_tensors="pt")
tokenizer.decode(model.generate(**asked, do_sample=True, top_k=0, max_new_tokens=24)[0])
```

**Data.** {recipe.num_steps * recipe.batch_size:,} answers made up by `minialign.worlds.assistant.write`, half of them
by careful writers, half by careless ones. No outside text.

**Recipe.** `minialign pretrain assistant --seed {seed}`, {seconds:.0f} s of CPU time, torch {torch.__version__}:
`{json.dumps(asdict(recipe))}`

**Figures.** "sampled" are the shipped answers of the model, "written" those of its teachers.

| | |
|---|---|
{rows}

**Limits.** Sixteen animals, four questions each; it errs about one fact in three, on purpose.

| sha256 of | |
|---|---|
{hashes}
"""


def main(out: str | Path, seed: int = 0, recipe: Recipe = Recipe(), report=print) -> dict[str, float]:
    """Trains, samples, measures, and writes model, tokenizer, answers and README.md into `out`, all or nothing."""
    from safetensors.torch import save_file

    with whole(out) as partial:
        start = time.process_time()
        network = train(recipe, seed, report)
        with quietly():
            network.save_pretrained(partial)
        save_tokenizer(assistant.make_tokenizer(), partial)
        save_file({"tokens": sample_answers(network, recipe.num_answers, seed + 1)}, partial / "answers.safetensors")
        figures = evaluate(network, partial)
        seconds = time.process_time() - start
        (partial / "generation_config.json").unlink(missing_ok=True)  # it says nothing that config.json does not
        names = ("model.safetensors", "answers.safetensors")
        sums = {name: hashlib.sha256((partial / name).read_bytes()).hexdigest() for name in names}
        num_parameters = sum(p.numel() for p in network.parameters())
        (partial / "README.md").write_text(card(recipe, seed, figures, num_parameters, seconds, sums), encoding="utf-8")
    assistant.answers.cache_clear()
    for name, value in figures.items():
        report(f"{name}: {value:.4f}")
    return figures
