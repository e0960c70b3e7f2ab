"""`DecodeState`: the canvases of a batch and where each row stands. Rows are independent and advance on their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .policy import quota_schedule
from .schedule import FixedBlocks

MASK64 = (1 << 64) - 1
UNUSED = "unused"
"""Finish reason of a place that no row has taken yet."""


def row_seeds(seed: int | None, seeds: Sequence[int] | None, rows: int) -> list[int]:
    """One 63-bit seed per row: `seeds` as given, else a hash of (seed, row), so that a row's samples do not depend on its batch index
    alone but on the pair (splitmix64, Steele et al. 2014)."""
    if seeds is not None:
        return [s & (MASK64 >> 1) for s in seeds]
    return [_splitmix64(((seed or 0) & MASK64) ^ _splitmix64(i)) >> 1 for i in range(rows)]


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


@dataclasses.dataclass
class Row:
    """Where one row stands. Positions are canvas positions; the region to decode is [start, end)."""

    index: int
    start: int
    end: int
    block: int = -1
    block_start: int = 0
    block_end: int = 0
    step: int = 0  # steps done in this block
    masks: int = 0  # undecided positions when the block began
    stored: int = 0  # block-causal models: K/V of positions before it are final
    opened: int = -1  # start of the attention block that has been forwarded whole
    first_known: bool = False  # block-causal models: whether the first position of the part being decoded is (caches/windows.py)
    nfe: int = 0
    forwarded: float = 0.0  # positions forwarded so far; where a cache goes by layers, their mean over the layers
    drafted: int = 0  # speculation: nodes verified beside the row itself, and those of them that counted
    accepted: int = 0
    quotas: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    @property
    def active(self) -> bool:
        return self.finish_reason is None


class DecodeState:
    """Canvas and undecided map of every row, as device tensors; only `commit` writes tokens.

    canvas: int64 [B, L], `mask_id` where undecided. masked: bool [B, L], the undecided positions (never derived from ids, so a literal
    mask token in a prompt stays put). given: bool [B, L], positions that were there from the start. rows: one Row each.
    steps: forwards in all for policy quota, spread over a row's blocks; None = one position per forward. rows_at_least, length_at_least: room
    for rows that `join` later: that many rows, canvases that long.
    """

    def __init__(
        self,
        canvases: Sequence[Sequence[int]],
        given: Sequence[Sequence[bool]],
        mask_id: int,
        schedule: FixedBlocks,
        steps: int | None,
        seeds: Sequence[int],
        device: torch.device,
        rows_at_least: int = 0,
        length_at_least: int = 0,
    ):
        b, longest = max(len(canvases), rows_at_least), max((len(c) for c in canvases), default=0)
        self.mask_id, self.schedule, self.steps = mask_id, schedule, steps
        self.canvas = torch.full((b, max(longest, length_at_least)), mask_id, dtype=torch.int64)
        self.masked = torch.zeros_like(self.canvas, dtype=torch.bool)
        self.rows = [self._place(i, ids, keep) for i, (ids, keep) in enumerate(zip(canvases, given, strict=True))]
        self.rows += [Row(i, 0, 0, finish_reason=UNUSED) for i in range(len(self.rows), b)]
        self.canvas, self.masked = self.canvas.to(device), self.masked.to(device)
        self.given = ~self.masked
        self.seeds = torch.tensor([*seeds, *[0] * (b - len(seeds))], dtype=torch.int64, device=device)
        for row in self.active:
            self.next_block(row)

    def _place(self, index: int, ids: Sequence[int], keep: Sequence[bool]) -> Row:
        """Writes a row's canvas and undecided map."""
        undecided = ~torch.as_tensor(keep, dtype=torch.bool)
        tokens = torch.as_tensor(ids, dtype=torch.int64)
        if tokens.shape != undecided.shape:
            raise ValueError(f"given must have one flag per token, {tokens.shape[0]} here, got {undecided.shape[0]}")
        self.canvas[index], self.masked[index] = self.mask_id, False
        self.canvas[index, : len(ids)] = torch.where(undecided, self.mask_id, tokens).to(self.canvas.device)
        self.masked[index, : len(ids)] = undecided.to(self.masked.device)
        holes = torch.nonzero(undecided).flatten()
        start = int(holes[0]) if holes.numel() else len(ids)
        return Row(index, start, len(ids), block_end=start)

    def join(self, ids: Sequence[int], keep: Sequence[bool], seed: int) -> Row:
        """Puts a new row in the place of one that has finished, between two steps; every other row goes on as it would. Its K/V slots are the
        old row's, and it forwards everything that it sees before it reads any of them. Raises ValueError where there is no room."""
        free = next((r.index for r in self.rows if not r.active), None)
        if free is None:
            raise ValueError(f"all {len(self.rows)} rows are being decoded; wait for one to finish")
        if len(ids) > self.canvas.shape[1]:
            raise ValueError(f"the canvas must be at most {self.canvas.shape[1]} tokens long, got {len(ids)}")
        row = self._place(free, ids, keep)
        self.given[free] = ~self.masked[free]
        self.seeds[free] = seed
        self.rows[free] = row
        self.next_block(row)
        return row

    @property
    def active(self) -> list[Row]:
        return [r for r in self.rows if r.active]

    def next_block(self, row: Row) -> None:
        """Moves a row to its next block that holds undecided positions; the row finishes ("length") when there is none."""
        while True:
            if row.block_end >= row.end:
                row.finish_reason = "length"
                return
            row.block += 1
            row.block_start, row.step, row.first_known = row.block_end, 0, False
            self.settle_block(row, self.schedule.next_end(row.block_start, row.end))
            if row.masks:  # an adaptive end never leaves a block without any: it stands behind an undecided position
                return

    def settle_block(self, row: Row, end: int) -> None:
        """Sets where the row's block ends, and what its steps are to commit."""
        row.block_end = end
        row.masks = int(self.masked[row.index, row.block_start : end].sum())
        steps = row.masks if self.steps is None else quota_schedule(self.steps, self.schedule.count(row.start, row.end))[row.block]
        row.quotas = quota_schedule(row.masks, steps) if steps else []
