"""minialign: fifty papers on aligning generative models with rewards, one paper a file.

Import what you need: `from minialign.methods import ddpo`, `from minialign import worlds`. This module itself imports
nothing heavy, so that `import minialign` stays under a second: the rooms below are loaded when first touched.
"""

import importlib
import os
import sys
import warnings

__version__ = "0.1.0"

_ROOMS = (
    "course", "exact", "exemplars", "kernels", "loop", "measure", "methods", "policies", "rewards", "search", "show",
    "worlds",
)  # fmt: skip
__all__ = ["__version__", *_ROOMS]


def _wait_less() -> None:
    """OpenMP's threads wait for each other by spinning; where another program holds a core, they mostly spin.

    GNU's OpenMP, which torch brings on Linux, reads how long when it is loaded, and never again.
    """
    theirs = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ) or os.environ.get("OMP_NUM_THREADS") == "1"
    if sys.platform != "linux" or theirs:
        return
    if "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = "3000"
    elif not sys.modules["torch"].cuda.is_available():
        warnings.warn(
            "torch was loaded before minialign, and its threads will spin where another program is busy: import "
            "minialign first, or set GOMP_SPINCOUNT=3000.",
            stacklevel=3,
        )


_wait_less()


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"minialign.{name}")
    raise AttributeError(f"module 'minialign' has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__():
    return list(__all__)
