"""Noise that belongs to a row: the same whichever rows a process holds, and however many processes there are.

One draw from the run's generator keys a counter-based stream a row (Philox: Salmon et al., 2011), so nobody has to draw
the noise of the others, and the generator has moved on equally everywhere.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def row_noise(
    law: str,
    num_samples: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    rows: Iterable[int] | Tensor | None = None,
) -> Tensor:
    """(len(rows), *shape) of law "standard_normal" or "random" (uniform in [0, 1)), on the CPU; `rows`: all by default.

    A row's numbers follow from the generator's state and the row's index in [0, num_samples) alone, and a longer shape
    begins with the numbers of a shorter one. Whatever the rows, `generator` gives one number.
    """
    if num_samples < 1:
        raise ValueError(f"{num_samples} samples; expected at least 1.")
    rows = range(num_samples) if rows is None else rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if outside := [row for row in rows if not 0 <= row < num_samples]:
        raise ValueError(f"there is no row {outside[0]} among {num_samples} samples; rows count from 0.")
    device = None if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    bits = np.random.Philox(key=seed)
    stream, state = np.random.Generator(bits), bits.state
    noise = np.empty((len(rows), *shape), DTYPES[dtype])
    for row, out in zip(rows, noise, strict=True):
        state["state"]["key"][1] = row  # a new key at counter 0: much cheaper than a new generator
        bits.state = state
        getattr(stream, law)(out=out, dtype=out.dtype)
    return torch.from_numpy(noise)
