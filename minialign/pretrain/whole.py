"""What every recipe does around its training: all or nothing, and nothing else in the process changes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def whole(out: str | Path, num_threads: int = 1) -> Iterator[Path]:
    """A folder to write into, beside `out`, whose place it takes at the end; it is gone if anything fails.

    Inside, torch has `num_threads`: one, and a seed, give the same bytes again. Threads and the global random state
    are as before behind.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(num_threads)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
