"""Guided logits u + weight (c - u) of a module that returned both: read as one, combined by `logit_stats` while it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from ..ops import LogitStats


class GuidedLogits:
    """c, u: [..., V] conditional and unconditional logits; reads as the logits they stand for."""

    def __init__(self, c: torch.Tensor, u: torch.Tensor, weight: float):
        self.c, self.u, self.weight = c, u, weight
        self.shape, self.dtype, self.device = c.shape, c.dtype, c.device

    def dim(self) -> int:
        return self.c.dim()

    def reshape(self, *shape: int) -> GuidedLogits:
        return GuidedLogits(self.c.reshape(*shape), self.u.reshape(*shape), self.weight)

    def flatten(self, first: int, last: int) -> GuidedLogits:
        return GuidedLogits(self.c.flatten(first, last), self.u.flatten(first, last), self.weight)

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        """The guided logits of some rows, materialised (KLASS keeps them, filters read them several times)."""
        u = self.u.index_select(dim, rows)
        return self.c.index_select(dim, rows).sub_(u).mul_(self.weight).add_(u)

    def stats(self, rows: torch.Tensor, **options: Any) -> LogitStats:
        """`logit_stats` of rows int64 [N] of [M, V] (-1 = none). options: as there."""
        return ops.logit_stats(self.c, rows, null_logits=self.u, guidance=self.weight, **options)


def joined(parts: Sequence[torch.Tensor | GuidedLogits]) -> torch.Tensor | GuidedLogits:
    """Logits of several calls, one after the other: all guided, or none."""
    if isinstance(parts[0], GuidedLogits):
        return GuidedLogits(torch.cat([p.c for p in parts]), torch.cat([p.u for p in parts]), parts[0].weight)
    return torch.cat(parts)
