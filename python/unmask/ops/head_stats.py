"""`head_stats`: LM head fused with `logit_stats` over vocabulary tiles, for the rows asked for. Logits are never stored.

The GEMM is the library's (oneDNN with weights packed once, see `unmask.ops.linear`), one call per tile of 8,192 ids; the reduction is
ours. A tile of 32 rows is 1 MB of fp32 logits, so it is reduced while it is still in the cache; tiles of 4,096 ids take 7 to 10% longer at
16 and 32 rows (the library's cost per call), longer tiles no less. Tiles are multiples of the reduction's own chunk, so the result is
bit-identical to `logit_stats` on the concatenated logits.
"""

from __future__ import annotations

import torch

from .linear import Format, Linear, pad_rows
from .logit_stats import CHUNK, LogitStats, new_state, stats_finish, stats_tile

TILE = 8192


class Head:
    """An LM head in vocabulary tiles. weight: [V, d] in the model's dtype, split into Linear tiles of `tile` ids (a multiple of 4,096)."""

    def __init__(self, weight: torch.Tensor, format: Format, tile: int = TILE):
        if tile <= 0 or tile % CHUNK:
            raise ValueError(f"Head: tile must be a positive multiple of {CHUNK}, got {tile}")
        self.vocab_size, self.width = weight.shape
        self.dtype = weight.dtype
        self.device = weight.device
        if format == "plain" and weight.device.type == "cpu":
            self.tiles = [Linear(weight[i : i + tile], format) for i in range(0, self.vocab_size, tile)]
        else:
            self.tiles = [Linear(weight[i : i + tile].contiguous(), format) for i in range(0, self.vocab_size, tile)]
        self.tile = tile

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, d] -> [M, V], materialised: for tests and for users who ask for logits; the decoder never does."""
        n = hidden.shape[0]
        x = self.tiles[0].prepared(_padded(hidden, pad_rows(n)))
        return torch.cat([tile(x) for tile in self.tiles], dim=1)[:n]


def head_stats(
    hidden: torch.Tensor,
    head: Head,
    rows: torch.Tensor | None = None,
    *,
    forbid: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    topk: int = 0,
    temperature: float = 0.0,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    pos: torch.Tensor | None = None,
) -> LogitStats:
    """Statistics of `hidden @ head.T` for chosen rows, without ever storing the logits.

    hidden: [M, d] in the head's dtype. rows: int64 [T'] rows of hidden, -1 = none (default: all). Everything else as in `logit_stats`,
    per entry of `rows`. Returns LogitStats over T' entries. Rows computed: only those >= 0, padded to a multiple of 16, so that an entry
    has the same bits alone and in any batch.
    """
    if hidden.dim() != 2 or hidden.shape[1] != head.width:
        raise RuntimeError(f"head_stats: hidden must be [M, d] = [any, {head.width}], got {list(hidden.shape)}")
    if hidden.dtype != head.dtype:
        raise RuntimeError(f"head_stats: hidden must be {head.dtype}, got {hidden.dtype}")
    m = hidden.shape[0]
    if rows is None:
        rows = torch.arange(m, device=hidden.device)
    live = torch.nonzero((rows >= 0) & (rows < m)).flatten()  # CPU: no sync to fear; the CUDA op of the next issue keeps the list on device
    n, n_live = rows.shape[0], live.shape[0]
    take = (lambda t: None if t is None else t.index_select(0, live)) if n_live != n else (lambda t: t)
    x = _padded(hidden.index_select(0, rows.index_select(0, live)), pad_rows(n_live))
    state = new_state(n_live, hidden.device)
    per_entry = dict(bias_ids=take(bias_ids), bias=take(bias), ids=take(ids), seed=take(seed), step=take(step), pos=take(pos))
    id_logit = None
    if ids is not None:
        id_logit = torch.full((n_live, ids.shape[1]), float("-inf"), device=hidden.device)
    if n_live:
        offset = 0
        x = head.tiles[0].prepared(x)
        for tile in head.tiles:
            logits = tile(x)[:n_live]
            stats_tile(
                logits, state, id_logit, offset=offset, vocab=head.vocab_size, forbid=forbid, suppress=suppress, topk=topk, temperature=temperature, **per_entry
            )
            offset += tile.out_features
    result = stats_finish(state, id_logit, topk)
    if n_live == n:
        return result
    return _scatter(result, live, rows, m)


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with zero rows appended up to `rows`."""
    if x.shape[0] == rows:
        return x
    out = x.new_zeros((rows, x.shape[1]))
    out[: x.shape[0]] = x
    return out


def _scatter(part: LogitStats, live: torch.Tensor, rows: torch.Tensor, m: int) -> LogitStats:
    """Spreads the computed entries over all T' entries; the others read as `rows == -1` does in logit_stats."""
    from .info import Status

    n = rows.shape[0]

    def spread(value: torch.Tensor, fill: float | int) -> torch.Tensor:
        out = value.new_full((n, *value.shape[1:]), fill)
        out[live] = value
        return out

    status, ids, values = spread(part.status, 0), spread(part.ids, -1), spread(part.values, 0.0)
    bad = (rows < -1) | (rows >= m)
    status[bad] = int(Status.BAD_ROW)
    values[bad] = float("nan")
    absent = torch.ones(n, dtype=torch.bool, device=rows.device)
    absent[live] = False
    result = LogitStats(ids, values, status)
    result.topk_logit[absent] = float("-inf")
    return result
