"""Saves models so that transformers 4 and 5 both read them; what either writes, the other may not:

    tokenizer_config.json   5 names a class that only it has, and notes how the tokenizer was loaded
    vocab.json, merges.txt  all that the CLIPTokenizer of 4 reads; that of 5 writes tokenizer.json alone
    text encoder            what 4 calls `text_model.encoder...` is `encoder...` when 5 writes; it reads both

Tensors and tokens are the same in either.
"""

import json
from pathlib import Path

SETTINGS = (  # of a tokenizer, those that mean the same in both
    "bos_token", "eos_token", "pad_token", "unk_token", "padding_side", "model_max_length",
    "model_input_names", "clean_up_tokenization_spaces", "processor_class", "tokenizer_class",
)  # fmt: skip


def save_pipeline(pipe, folder: Path) -> None:
    """A pipeline of diffusers with a CLIP text encoder."""
    pipe.save_pretrained(folder)
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    _prefix_names(folder / "text_encoder" / "model.safetensors", "text_model.")


def save_flow_pipeline(pipe, folder: Path) -> None:
    """A StableDiffusion3Pipeline without T5, in float16: half the size, and a picture is the same to a grey level."""
    import torch

    dtype = pipe.transformer.dtype
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    pipe.to(dtype)
    for number in ("", "_2"):
        save_tokenizer(getattr(pipe, f"tokenizer{number}"), folder / f"tokenizer{number}")
        _prefix_names(folder / f"text_encoder{number}" / "model.safetensors", "text_model.")


def save_tokenizer(tokenizer, folder: Path) -> None:
    from tokenizers.models import BPE

    tokenizer.save_pretrained(folder)
    core = getattr(tokenizer, "backend_tokenizer", None)  # none in the CLIPTokenizer of 4, which writes the two itself
    if core is not None and isinstance(core.model, BPE):
        core.model.save(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in 4, which 5 still knows
    settings = {name: settings[name] for name in SETTINGS if name in settings}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _prefix_names(path: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    named = {
        name if name.startswith((prefix, "text_projection")) else prefix + name: tensor
        for name, tensor in weights.items()
    }
    save_file(named, path, metadata={"format": "pt"})
