"""Special tokens, read in one place: what opens a text, what ends a response, what the network has an embedding for.

    ends              the tokenizer's EOS, and all that `generation_config` lists: each of them ends a response
    encode            tokens of texts, opened as the tokenizer opens any text (BOS, [CLS]), once; nothing behind them
    vocabulary        ids that the network reads, and says; `check_known` names the token that is beyond them
    check_decoding    what else a `generation_config` asks for, which training does not do: refused, or said aloud

Policies and reward models read a text alike.
"""

import warnings
from collections.abc import Sequence

from torch import nn

# They cut or sharpen the distribution for decoding; what trains is all of it, at the policy's own temperature.
SHARPENING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# They make it another one, that no network pass gives: what is sampled would not be what is scored.
REWEIGHTING = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "penalty_alpha",
    "dola_layers", "min_length", "min_new_tokens", "stop_strings",
)  # fmt: skip
NEUTRAL = {
    "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0,
    "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1, "min_new_tokens": 0,
}  # fmt: skip


def ends(tokenizer, network: nn.Module) -> list[int]:
    """Ids that end a response: the tokenizer's EOS first, then those of the network's generation_config.

    Raises ValueError if there is none.
    """
    listed = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    size = vocabulary(network)[1]  # a config's default may lie beyond a small vocabulary
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = list(dict.fromkeys(own + [token for token in listed if size is None or token < size]))
    if not found:
        raise ValueError(
            "the tokenizer has no EOS token, and generation_config lists none, so no response could end: set "
            "tokenizer.eos_token, or pass fixed_length=True."
        )
    return found


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, opened once: not again where a chat template has put the BOS there already."""
    plain = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    i = max(range(len(plain)), key=lambda i: len(plain[i]))
    opening = _opening(list(tokenizer([texts[i]])["input_ids"][0]), plain[i])
    return [ids if opening and ids[: len(opening)] == opening else opening + ids for ids in plain]


def _opening(full: list[int], plain: list[int]) -> list[int]:
    """What the tokenizer puts before a text's own tokens; what it puts behind them (EOS, [SEP]) is left away."""
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValueError(
        "with its special tokens, this tokenizer splits a text into other tokens than without: which of them open a "
        "text cannot be told. Use a tokenizer that adds them before and behind."
    )


def vocabulary(network: nn.Module) -> tuple[int | None, int | None]:
    """(ids that it reads, ids that it gives logits for), by its embeddings; None where it does not say."""
    sizes = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(getattr(network, name, lambda: None)(), "weight", None)
        sizes.append(None if weight is None else weight.shape[0])
    reads = sizes[0] or getattr(getattr(network, "config", None), "vocab_size", None)
    return reads, min(reads, sizes[1]) if reads and sizes[1] else reads


def check_known(rows: Sequence[Sequence[int]], names: Sequence[str], size: int | None, tokenizer) -> None:
    """Raises ValueError for the first id that the network does not have; `names` say whose rows they are."""
    for row, name in zip(rows, names, strict=True) if size is not None else ():
        token = next((token for token in row if not 0 <= token < size), None)
        if token is not None and token < 0:
            raise ValueError(f"{name} has the id {token}; expected 0 to {size - 1}: leave padding and labels away.")
        if token is not None:
            word = getattr(tokenizer, "convert_ids_to_tokens", lambda token: "?")(token)
            raise ValueError(
                f"{name} has the token {word!r}, id {token}, but the network knows ids 0 to {size - 1}: call "
                "network.resize_token_embeddings(len(tokenizer)) before, and train what is new."
            )


def check_decoding(network: nn.Module) -> None:
    """Warns of settings that sharpen sampling, raises ValueError for those that change the law itself."""
    config = getattr(network, "generation_config", None)
    if config is None:
        return
    asked = {}
    for name in SHARPENING + REWEIGHTING:
        value = getattr(config, name, None)
        if value not in (None, NEUTRAL.get(name)) and value != []:
            asked[name] = value
    if reweighted := [name for name in asked if name in REWEIGHTING]:
        raise ValueError(
            f"network.generation_config asks for {reweighted[0]} = {asked[reweighted[0]]!r}: responses would not come "
            f"from the distribution that is scored. Set network.generation_config.{reweighted[0]} = None to train "
            "without it."
        )
    if asked:
        said = ", ".join(f"{name} = {value}" for name, value in asked.items())
        warnings.warn(
            f"network.generation_config asks for {said}: training samples from the whole distribution, at its own "
            "`temperature`. Set them to None there to say that you know.",
            stacklevel=3,
        )
