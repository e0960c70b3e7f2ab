"""`uniform`: one counter-based random number per entry."""

from __future__ import annotations

import torch


def uniform(seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """One draw in (0, 1) per entry, a pure function of its key: equal bits alone, in any batch and on every backend.

    seed, step, pos: int64 [N]. Returns float32 [N]: (w >> 9 + 1/2) / 2^23 with w = word 0 of Philox4x32-10 (Salmon et al., SC11),
    key = seed, counter = (0, pos, step, 1).
    """
    return torch.ops.unmask.uniform(seed, step, pos)


@torch.library.register_fake("unmask::uniform")
def _(seed, step, pos):
    return seed.new_empty((seed.shape[0],), dtype=torch.float32)
