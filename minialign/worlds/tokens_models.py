"""Base models of the world `tokens`: language models over six words whose every response can be listed.

enumerate_responses, index_of    all responses of a length; the row of one
PrefixTree                       a language model that is a table, or a critic that is one: 6 logits a prefix
random_transformer               a two-layer GPT-2 over the same tokens
all_log_probs                    the law over all responses of any causal language model
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

VOCABULARY = 6
SPECIAL = 5  # the word whose count makes the inverted U


# Responses, listed --------------------------------------------------------------------------------------------------


@functools.cache
def enumerate_responses(length: int, vocabulary: int = VOCABULARY) -> Int[Tensor, "n length"]:
    """All responses of `length` words, n = vocabulary^length, in lexicographic order."""
    words = torch.arange(vocabulary)
    return torch.cartesian_prod(*[words] * length).view(-1, length)


def index_of(tokens: Int[Tensor, "*batch length"], vocabulary: int = VOCABULARY) -> Int[Tensor, "*batch"]:
    """The row of each response in `enumerate_responses`: its words as digits."""
    places = vocabulary ** torch.arange(tokens.shape[-1] - 1, -1, -1, device=tokens.device)
    return (tokens * places).sum(-1)


def num_prefixes(length: int, vocabulary: int = VOCABULARY) -> int:
    """Prefixes that a word can follow: 1 + 6 + 36 + 216 = 259 for 4 words."""
    return (vocabulary**length - 1) // (vocabulary - 1)


# Policies that can be enumerated ------------------------------------------------------------------------------------


class PrefixTree(nn.Module):
    """A causal language model that is a table: `table[prompt, prefix]` holds what is said after that prefix.

    table (prompts, prefixes, outputs): 6 logits for a policy, one number a head for a critic. Called as
    `tree(input_ids, attention_mask)`, where a row is a prompt's token (vocabulary + its number) and words 0 .. 5,
    padded on either side; outputs (b, s, outputs), as `.logits`: at each position, for the prefix that ends there.
    Prefixes are numbered as in a heap: the empty one 0, the children of i from 6 i + 1 on. A full response has no
    prefix to come; what stands at its last word is meaningless, as is what stands on padding.
    """

    def __init__(self, table: Float[Tensor, "prompts prefixes outputs"], vocabulary: int = VOCABULARY):
        super().__init__()
        self.table, self.vocabulary = nn.Parameter(table.clone()), vocabulary
        words, prefixes = 0, 1
        while prefixes <= table.shape[1]:  # a level of the heap is a word more
            words, prefixes = words + 1, prefixes * vocabulary + 1
        self.config = SimpleNamespace(max_position_embeddings=1 + words)

    def forward(
        self, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
    ) -> SimpleNamespace:
        read = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        place = read.cumsum(1) * read  # 0 on padding, 1 on the prompt's token, then 2, 3, ...
        prompt = (input_ids * (place == 1)).sum(1) - self.vocabulary
        prefix = torch.zeros_like(prompt)
        prefixes = []
        for column in range(input_ids.shape[1]):
            longer = prefix * self.vocabulary + 1 + input_ids[:, column]
            prefix = torch.where(place[:, column] > 1, longer, prefix)
            prefixes.append(prefix)
        prefixes = torch.stack(prefixes, 1).clamp_max(self.table.shape[1] - 1)
        return SimpleNamespace(logits=self.table[prompt.unsqueeze(1), prefixes])

    def all_log_probs(self) -> Float[Tensor, "prompts n"]:
        """log pi of every response, as `enumerate_responses` lists them; gradients flow. One softmax a prefix."""
        log_probs = self.table.log_softmax(-1)
        total, first, width = torch.zeros_like(log_probs[:, 0, :1]), 0, 1
        while first < self.table.shape[1]:  # level by level: `width` prefixes, each split into its 6 children
            total = (total.unsqueeze(-1) + log_probs[:, first : first + width]).flatten(1)
            first, width = first + width, width * self.vocabulary
        return total


def all_log_probs(network: nn.Module, num_prompts: int, length: int) -> Float[Tensor, "prompts n"]:
    """log pi of every response under any causal language model over the same tokens, from one pass over all prefixes.

    Gradients flow. Rows: prompts x 6^(length - 1), so 864 for the small world.
    """
    device = next(network.parameters()).device
    prefixes = enumerate_responses(length - 1) if length > 1 else torch.zeros(1, 0, dtype=torch.long)
    prompts = VOCABULARY + torch.arange(num_prompts).repeat_interleave(len(prefixes))
    ids = torch.cat([prompts.unsqueeze(1), prefixes.repeat(num_prompts, 1)], 1).to(device)
    log_probs = network(ids).logits[..., :VOCABULARY].log_softmax(-1)
    so_far = log_probs[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).sum(1, keepdim=True)
    return (so_far + log_probs[:, -1]).view(num_prompts, -1)


def random_transformer(num_prompts: int, length: int, seed: int, spread: float, lowered: float) -> nn.Module:
    """A two-layer GPT-2 of width 32 with random weights and a head of 6 outputs (prompts are read, never said).

    The head is scaled so that logits have standard deviation `spread` over all prefixes; SPECIAL's is lowered.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY + num_prompts, n_positions=length + 1, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = GPT2LMHeadModel(config).eval()
        network.lm_head = nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        network.lm_head.bias.zero_()
        prefixes = torch.cat(
            [torch.full((VOCABULARY ** (length - 1), 1), VOCABULARY), enumerate_responses(length - 1)], 1
        )
        network.lm_head.weight *= spread / network(prefixes).logits.std()
        network.lm_head.bias[SPECIAL] = -lowered
    return network


def tokenizer(num_prompts: int):
    """Words "0" to "5" with these ids, then the prompts "p0", "p1", ...; text is words with spaces between."""
    words = [str(i) for i in range(VOCABULARY)] + [f"p{i}" for i in range(num_prompts)]
    return word_tokenizer(words)


def word_tokenizer(words: Sequence[str], **special):
    """A transformers tokenizer whose tokens are whole words: ids in the order given, text split at spaces.

    It gives input_ids and attention_mask alone: where transformers 4 has its way, token_type_ids come too, and a GPT-2
    adds the embedding of token 0 to every other.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.get("unk_token", words[0])))
    core.pre_tokenizer = WhitespaceSplit()
    special = dict(clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"]) | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
