"""minialign: fifty papers on aligning generative models with rewards, one paper a file.

Import what you need: `from minialign.methods import ddpo`, `from minialign import worlds`. This module itself imports
nothing heavy, so that `import minialign` stays under a second: the rooms below are loaded when first touched.
"""

import importlib

__version__ = "0.1.0"

_ROOMS = ("course", "exact", "kernels", "loop", "measure", "methods", "policies", "rewards", "search", "show", "worlds")
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"minialign.{name}")
    raise AttributeError(f"module 'minialign' has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__():
    return list(__all__)
