"""`head_stats`: LM head fused with `logit_stats` over vocabulary tiles, for the rows asked for. Logits are never stored.

The GEMM is the library's (oneDNN with weights packed once, see `unmask.ops.linear`), one call per tile of 8,192 ids; the reduction is
ours. A tile of 32 rows is 1 MB of fp32 logits, so it is reduced while it is still in the cache; tiles of 4,096 ids take 7 to 10% longer at
16 and 32 rows (the library's cost per call), longer tiles no less. Tiles are multiples of the reduction's own chunk, so the result is
bit-identical to `logit_stats` on the concatenated logits.

On a Hopper GPU up to 64 rows of bf16 or fp16 go through one kernel instead (`torch.ops.unmask.fused_head_stats`): it reads the weights once
and reduces the logits, rounded to the model's dtype, where the product leaves them. Its sums are grouped otherwise, so they may differ from
`logit_stats` in the last bits; they do not depend on the other rows.

`head_filtered_stats` is the same for `filtered_stats`. A filter must see a whole row before it decides about any id, so there the logits are
stored, of few rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from .filtered_stats import filtered_stats
from .info import has_hopper_kernels
from .linear import Format, Linear, pad_rows
from .logit_stats import CHUNK, FIELDS, LogitStats, new_state, stats_finish, stats_tile

TILE = 8192
FUSED_ROWS = 64  # most entries of the fused kernel
LOGITS_BYTES = 16 << 20  # of one tile, alive at a time, where the rows are not counted on the host (CUDA)


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
        self.packed = self._packed_tiles()
        # tiles are views of it; the fused kernel and the tiles sum in another order, and which one runs depends on the number of rows
        self.weight = weight if weight.device.type == "cuda" and format != "tiled" else None

    @classmethod
    def of_tiles(cls, parts: Iterable[torch.Tensor], format: Format) -> Head:
        """The same on the CPU from the weight's tiles in order, [TILE, d] each and the last one at most that: each is packed before the next is taken."""
        head = cls.__new__(cls)
        head.tile, head.weight, head.tiles = TILE, None, []
        for part in parts:
            if part.device.type != "cpu" or part.shape[0] > TILE or (head.tiles and head.tiles[-1].out_features != TILE):
                raise ValueError(f"Head: tiles must be CPU tensors of {TILE} rows (the last one: at most that), got {list(part.shape)} on {part.device}")
            head.tiles.append(Linear(part, format))
            head.width, head.dtype, head.device = part.shape[1], part.dtype, part.device
        if not head.tiles:
            raise ValueError("Head: there must be at least one tile, got none")
        head.vocab_size = sum(t.out_features for t in head.tiles)
        head.packed = head._packed_tiles()
        return head

    def _packed_tiles(self) -> list[torch.Tensor] | None:
        """The tiles as `torch.ops.unmask.head_stats` takes them; None where they are of another format."""
        packed = [tile.packed_weight for tile in self.tiles]
        return None if any(tile is None for tile in packed) else packed

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
    per entry of `rows`. Returns LogitStats over T' entries. On the CPU only rows >= 0 are computed, padded to a multiple of 16, so that an
    entry has the same bits alone and in any batch; on CUDA all entries are, without a host read.
    """
    rows = _checked_rows("head_stats", hidden, head, rows)
    shared = dict(forbid=forbid, suppress=suppress, topk=topk, temperature=temperature)
    per_entry = dict(bias_ids=bias_ids, bias=bias, ids=ids, seed=seed, step=step, pos=pos)
    if hidden.device.type == "cpu":
        if head.packed is not None:
            lists = (forbid, suppress, bias_ids, bias, ids)
            return LogitStats(*torch.ops.unmask.head_stats(hidden, head.packed, rows, *lists, topk, temperature, seed, step, pos))
        return _live_entries(hidden, head, rows, shared, per_entry)
    if fused_head_fits(hidden, head, rows.shape[0]):
        lists = (forbid, suppress, bias_ids, bias, ids)
        return LogitStats(*torch.ops.unmask.fused_head_stats(hidden, head.weight, rows, *lists, topk, temperature, seed, step, pos))
    return _all_entries(hidden, head, rows, shared, per_entry)


def head_filtered_stats(
    hidden: torch.Tensor,
    head: Head,
    rows: torch.Tensor | None = None,
    *,
    forbid: torch.Tensor | None = None,
    suppress: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    top_k_first: bool = False,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    pos: torch.Tensor | None = None,
) -> LogitStats:
    """`filtered_stats` of `hidden @ head.T` for chosen rows; at most LOGITS_BYTES of logits are alive, or those of 16 rows.

    hidden, rows: as in `head_stats`. Everything else as in `filtered_stats`, per entry of `rows`. Returns LogitStats over T' entries, without
    top-k and at_ids. On the CPU only rows >= 0 are computed, padded to a multiple of 16, so that an entry has the same bits alone and in any
    batch; on CUDA all entries are, without a host read.
    """
    rows = _checked_rows("head_filtered_stats", hidden, head, rows)
    shared = dict(forbid=forbid, suppress=suppress, temperature=temperature, top_p=top_p, top_k=top_k, top_k_first=top_k_first)
    per_entry = dict(bias_ids=bias_ids, bias=bias, seed=seed, step=step, pos=pos)
    entries = _live_entries if hidden.device.type == "cpu" else _all_entries
    return entries(hidden, head, rows, shared, per_entry, _reduce_filtered)


def _checked_rows(op: str, hidden: torch.Tensor, head: Head, rows: torch.Tensor | None) -> torch.Tensor:
    if hidden.dim() != 2 or hidden.shape[1] != head.width:
        raise RuntimeError(f"{op}: hidden must be [M, d] = [any, {head.width}], got {list(hidden.shape)}")
    if hidden.dtype != head.dtype:
        raise RuntimeError(f"{op}: hidden must be {head.dtype}, got {hidden.dtype}")
    return torch.arange(hidden.shape[0], device=hidden.device) if rows is None else rows


def fused_head_fits(hidden: torch.Tensor, head: Head, entries: int) -> bool:
    """True if the fused kernel takes this call: a Hopper GPU, a library with sm_90a, bf16 or fp16, rows at multiples of 16 bytes."""
    if head.weight is None or entries > FUSED_ROWS or hidden.dtype not in (torch.bfloat16, torch.float16):
        return False
    aligned = all(t.stride(1) == 1 and t.stride(0) > 0 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, head.weight))
    return aligned and hidden.shape[1] % 8 == 0 and _hopper(hidden.device)


@functools.cache
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and has_hopper_kernels()


@torch.library.register_fake("unmask::head_stats")
@torch.library.register_fake("unmask::fused_head_stats")
def _(hidden, weight, rows, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos):
    n = hidden.shape[0] if rows is None else rows.shape[0]
    width = FIELDS + 2 * (0 if ids is None else ids.shape[1]) + topk
    return (
        hidden.new_empty((n, 1 + topk), dtype=torch.int64),
        hidden.new_empty((n, width), dtype=torch.float32),
        hidden.new_empty((n,), dtype=torch.int32),
    )


def _reduce(x: torch.Tensor, head: Head, shared: dict, per_entry: dict) -> LogitStats:
    """The statistics of every row of x [n, d], tile by tile; x is padded so that a row has the same bits in any batch."""
    n, ids = x.shape[0], per_entry["ids"]
    state = new_state(n, x.device)
    id_logit = None if ids is None else torch.full((n, ids.shape[1]), float("-inf"), device=x.device)
    if n:
        offset = 0
        x = head.tiles[0].prepared(_padded(x, pad_rows(n)))
        for tile in head.tiles:
            stats_tile(tile(x)[:n], state, id_logit, offset=offset, vocab=head.vocab_size, **shared, **per_entry)
            offset += tile.out_features
    return stats_finish(state, id_logit, shared["topk"])


def _reduce_filtered(x: torch.Tensor, head: Head, shared: dict, per_entry: dict) -> LogitStats:
    """The same for `filtered_stats`: the logits of some rows, filled tile by tile, then their statistics."""
    at_once = max(16, LOGITS_BYTES // (head.vocab_size * x.element_size()) // 16 * 16)
    parts = []
    for begin in range(0, max(1, x.shape[0]), at_once):
        some = x[begin : begin + at_once]
        n, offset = some.shape[0], 0
        logits = x.new_empty((n, head.vocab_size))
        if n:
            some = head.tiles[0].prepared(_padded(some, pad_rows(n)))
            for tile in head.tiles:
                logits[:, offset : offset + tile.out_features] = tile(some)[:n]
                offset += tile.out_features
        taken = {name: None if t is None else t[begin : begin + at_once] for name, t in per_entry.items()}
        parts.append(filtered_stats(logits, **shared, **taken))
    return parts[0] if len(parts) == 1 else LogitStats(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _live_entries(
    hidden: torch.Tensor, head: Head, rows: torch.Tensor, shared: dict, per_entry: dict, reduce=_reduce
) -> LogitStats:
    """Computes the entries that have a row, which the host must count: for the CPU, where that is no wait."""
    m, n = hidden.shape[0], rows.shape[0]
    live = torch.nonzero((rows >= 0) & (rows < m)).flatten()
    if live.shape[0] == n:
        return reduce(hidden.index_select(0, rows), head, shared, per_entry)
    taken = {name: None if t is None else t.index_select(0, live) for name, t in per_entry.items()}
    part = reduce(hidden.index_select(0, rows.index_select(0, live)), head, shared, taken)

    ids = torch.full((n, part.ids.shape[1]), -1)
    values, status = part.values.new_zeros((n, part.values.shape[1])), part.status.new_zeros(n)
    result = LogitStats(ids, values, status)
    if result.topk_id.shape[1]:
        result.topk_logit.fill_(float("-inf"))
    for whole, own in zip(result, part, strict=True):
        whole.index_copy_(0, live, own)
    low, high = torch.aminmax(rows)
    return _absent(result, rows, m) if low < -1 or high >= m else result


def _all_entries(
    hidden: torch.Tensor, head: Head, rows: torch.Tensor, shared: dict, per_entry: dict, reduce=_reduce
) -> LogitStats:
    """Computes every entry and blanks those without a row: nothing is read by the host, and a CUDA graph can capture it. At most
    LOGITS_BYTES of logits are alive."""
    m, n = hidden.shape[0], rows.shape[0]
    if n == 0 or m == 0:
        return _absent(reduce(hidden.new_zeros((n, head.width)), head, shared, per_entry), rows, m)
    at_once = max(16, LOGITS_BYTES // (head.tile * hidden.element_size()))
    parts = []
    for begin in range(0, n, at_once):
        some = slice(begin, begin + at_once)
        taken = {name: None if t is None else t[some] for name, t in per_entry.items()}
        parts.append(reduce(hidden.index_select(0, rows[some].clamp(0, m - 1)), head, shared, taken))
    return _absent(LogitStats(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))), rows, m)


def _absent(result: LogitStats, rows: torch.Tensor, m: int) -> LogitStats:
    """Entries without a row read as `rows == -1` does in logit_stats; those out of range get their status. No host read."""
    from .info import Status

    none, bad = ((rows < 0) | (rows >= m))[:, None], ((rows < -1) | (rows >= m))[:, None]
    ids = torch.where(none, -1, result.ids)
    values = torch.where(bad, float("nan"), torch.where(none, 0.0, result.values))
    status = torch.where(bad[:, 0], int(Status.BAD_ROW), torch.where(none[:, 0], 0, result.status)).to(torch.int32)
    blank = LogitStats(ids, values, status)
    blank.topk_logit.masked_fill_(none, float("-inf"))
    return blank


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with zero rows appended up to `rows`."""
    if x.shape[0] == rows:
        return x
    out = x.new_zeros((rows, x.shape[1]))
    out[: x.shape[0]] = x
    return out
