"""Guided logits u + weight (c - u) of a module that returned both, made a tile of the vocabulary at a time and only for the rows asked for.

Nothing of the size of the vocabulary is made: a tile is reduced while it is in the cache, as the head's tiles are (ops/head_stats.py), and the
statistics have the bits of `logit_stats` on the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ops import LogitStats
from ..ops.head_stats import _absent
from ..ops.logit_stats import CHUNK, new_state, stats_finish, stats_tile

TILE_BYTES = 2 << 20  # of guided logits alive at a time
PER_ENTRY = ("bias_ids", "bias", "ids", "seed", "step", "pos")


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
        """`logit_stats` of rows int64 [N] of [M, V] (-1 = none). options: as there. On the CPU rows that are -1 cost nothing."""
        m, n = self.shape[0], rows.shape[0]
        per_entry = {name: options.pop(name) for name in PER_ENTRY if options.get(name) is not None}
        if self.device.type != "cpu":
            return _absent(self._reduce(rows.clamp(0, max(m - 1, 0)), options, per_entry), rows, m)
        live = torch.nonzero(rows >= 0).flatten()
        if live.shape[0] == n:
            return self._reduce(rows, options, per_entry)
        part = self._reduce(rows.index_select(0, live), options, {name: t.index_select(0, live) for name, t in per_entry.items()})
        whole = (t.new_zeros((n, *t.shape[1:])).index_copy_(0, live, t) for t in part)
        return _absent(LogitStats(*whole), rows, m)

    def _reduce(self, rows: torch.Tensor, options: dict[str, Any], per_entry: dict[str, Any]) -> LogitStats:
        n, vocab = rows.shape[0], self.shape[1]
        ids, topk = per_entry.get("ids"), options.get("topk", 0)
        state = new_state(n, rows.device)
        id_logit = None if ids is None else torch.full((n, ids.shape[1]), float("-inf"), device=rows.device)
        c, u = (self.c, self.u) if _all_in_order(rows, self.shape[0]) else (None, None)
        tile = max(CHUNK, TILE_BYTES // (max(n, 1) * self.c.element_size()) // CHUNK * CHUNK)
        for begin in range(0, vocab if n else 0, tile):
            end = min(begin + tile, vocab)
            part = self._tile(c, u, rows, begin, end)
            stats_tile(part, state, id_logit, offset=begin, vocab=vocab, **options, **per_entry)
        return stats_finish(state, id_logit, topk)

    def _tile(self, c: torch.Tensor | None, u: torch.Tensor | None, rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """[n, end - begin], rounded at every operation as u + weight * (c - u) is."""
        if c is not None and u is not None:
            null = u[:, begin:end]
            return torch.sub(c[:, begin:end], null).mul_(self.weight).add_(null)
        null = self.u[:, begin:end].index_select(0, rows)
        return self.c[:, begin:end].index_select(0, rows).sub_(null).mul_(self.weight).add_(null)


def joined(parts: Sequence[torch.Tensor | GuidedLogits]) -> torch.Tensor | GuidedLogits:
    """Logits of several calls, one after the other: all guided, or none."""
    if isinstance(parts[0], GuidedLogits):
        return GuidedLogits(torch.cat([p.c for p in parts]), torch.cat([p.u for p in parts]), parts[0].weight)
    return torch.cat(parts)


def _all_in_order(rows: torch.Tensor, m: int) -> bool:
    """Whether rows are 0 .. m - 1, so that views will do; looked at on the CPU only."""
    return rows.device.type == "cpu" and rows.shape[0] == m and bool((rows == torch.arange(m)).all())
