"""Loading a model whose every weight is the file's."""

from collections.abc import Collection
from pathlib import Path
from typing import Any


def load_whole(model_class: Any, folder: str | Path, new: Collection[str] = (), **settings: Any) -> Any:
    """`model_class.from_pretrained(folder)` of diffusers or transformers, from local files, in eval mode.

    Both libraries draw a weight that the file lacks at random, drop one that the model lacks, and go on; here that is
    a ValueError with the names (a weight of another shape they refuse themselves). Those in `new` may be missing: a
    head that is yet to be trained.
    """
    model, found = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, **settings)
    missing, surplus = set(found["missing_keys"]) - set(new), set(found["unexpected_keys"])
    if missing or surplus:
        raise ValueError(
            f"the weights in {folder} are not those of the {type(model).__name__} that its config.json describes: "
            f"missing are {_some(missing)}, not of this model are {_some(surplus)}. Expected every weight under the "
            "name that the installed library gives it."
        )
    return model.eval()


def _some(names: set[str], shown: int = 3) -> str:
    first, rest = sorted(names)[:shown], len(names) - shown
    return (", ".join(first) or "none") + (f" and {rest} more" if rest > 0 else "")
