"""`DecodeState`: the canvases of a batch and where each row stands. Rows are independent and advance on their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .policy import quota_schedule
from .schedule import FixedBlocks

MASK64 = (1 << 64) - 1


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
    quotas: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    @property
    def active(self) -> bool:
        return self.finish_reason is None


class DecodeState:
    """Canvas and undecided map of every row, as device tensors; only `commit` writes tokens.

    canvas: int64 [B, L], `mask_id` where undecided. masked: bool [B, L], the undecided positions (never derived from ids, so a literal
    mask token in a prompt stays put). given: bool [B, L], positions that were there from the start. rows: one Row each.
    steps: forwards in all for policy quota, spread over a row's blocks; None = one position per forward.
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
    ):
        b, longest = len(canvases), max((len(c) for c in canvases), default=0)
        self.canvas = torch.full((b, longest), mask_id, dtype=torch.int64)
        self.masked = torch.zeros((b, longest), dtype=torch.bool)
        self.rows: list[Row] = []
        for i, (ids, keep) in enumerate(zip(canvases, given, strict=True)):
            self.canvas[i, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
            undecided = ~torch.as_tensor(keep, dtype=torch.bool)
            self.masked[i, : len(ids)] = undecided
            self.canvas[i, : len(ids)][undecided] = mask_id
            holes = torch.nonzero(undecided).flatten()
            start = int(holes[0]) if holes.numel() else len(ids)
            self.rows.append(Row(i, start, len(ids), block_end=start))
        self.canvas, self.masked = self.canvas.to(device), self.masked.to(device)
        self.given = ~self.masked
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self.schedule, self.steps = schedule, steps
        for row in self.rows:
            self.next_block(row)

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
