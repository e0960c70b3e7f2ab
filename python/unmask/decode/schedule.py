"""Where blocks end.

| schedule | a block ends | source |
|---|---|---|
| FixedBlocks | after block_size positions | LLaDA, arXiv 2502.09992 |
| AlignedBlocks | at the next multiple of block_size: a prompt's remainder shares the first block | SDAR, LLaDA2, Fast-dLLM v2 |
| AdaBlock | behind the most confident predicted delimiter near its start, else after block_size positions | arXiv 2509.26432 |

The last block is shorter where the length does not divide.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from ..errors import SettingError
from ..ops import LogitStats
from ..values import integer, number

if TYPE_CHECKING:
    from .rules.base import StepView
    from .state import Row


@dataclasses.dataclass(frozen=True)
class FixedBlocks:
    """Blocks of `block_size` positions from the row's first position to be decoded to the end of its canvas."""

    block_size: int
    adaptive = False

    def count(self, start: int, end: int) -> int:
        return -(-(end - start) // self.block_size)

    def next_end(self, start: int, end: int) -> int:
        """End of the block that begins at `start`, in a region that ends at `end`."""
        return min(start + self.block_size, end)

    def look(self, row: Row) -> int:
        """End of the positions whose statistics the block's first step needs."""
        return row.block_end


@dataclasses.dataclass(frozen=True)
class AlignedBlocks(FixedBlocks):
    """Blocks that end at absolute multiples of `block_size`, as block-causal models are trained with."""

    def count(self, start: int, end: int) -> int:
        return -(-end // self.block_size) - start // self.block_size

    def next_end(self, start: int, end: int) -> int:
        return min((start // self.block_size + 1) * self.block_size, end)


@dataclasses.dataclass(frozen=True)
class AdaBlock(FixedBlocks):
    """AdaBlock-dLLM (arXiv 2509.26432): block length from the confidence of predicted delimiters at the block's first forward.

    Of the undecided positions in a window of int(window * region) from the block's start, those whose predicted token is a delimiter are
    candidates; the most confident (the first on ties) ends the block if its confidence is at least `threshold`. Blocks may be longer or
    shorter than block_size, which holds where no delimiter is confident. delimiters: token ids. threshold: inf = fixed blocks.
    plain: predictions are the argmax of the plain softmax even where the policy samples (the authors' Dream code); else the policy's tokens
    (their LLaDA code).
    """

    delimiters: tuple[int, ...] = ()
    threshold: float = 0.3
    window: float = 0.25
    plain: bool = False
    adaptive = True

    def __post_init__(self):
        if not self.delimiters:
            raise SettingError("AdaBlock needs delimiters: token ids, or texts of one token each")
        for i, d in enumerate(self.delimiters):
            integer(f"delimiters[{i}]", d, 0)
        number("delimiter_threshold", self.threshold, 0.0, math.inf, finite=False)
        number("delimiter_window", self.window, 0.0, 1.0)

    def reach(self, row: Row) -> int:
        """End of the delimiter window of a row that opens a block."""
        return min(row.block_start + int(self.window * (row.end - row.start)), row.end)

    def look(self, row: Row) -> int:
        return max(row.block_end, self.reach(row))

    def settle(self, step: StepView, stats: LogitStats, opening: list[bool]) -> list[int]:
        """Ends of the entries' blocks, for those that open one at this step (0 for the others). Reads the device once."""
        ids = torch.tensor(self.delimiters, dtype=torch.int64, device=step.device)
        ends = step.per_entry([self.reach(r) if o else 0 for r, o in zip(step.rows, opening, strict=True)])
        among = step.masked & torch.isin(stats.token, ids) & (step.pos < step.spread(ends))
        confidence = stats.confidence
        best = step.best(confidence, among) & (confidence >= self.threshold)
        found = torch.zeros(step.entries, dtype=torch.int64, device=step.device).index_add_(0, step.entry, torch.where(best, step.pos + 1, 0))
        return [f or self.next_end(r.block_start, r.end) for f, r in zip(found.tolist(), step.rows, strict=True)]
