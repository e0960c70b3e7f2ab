"""Where blocks end. Fixed blocks: equal length, the last one shorter when the length does not divide."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class FixedBlocks:
    """Blocks of `block_size` positions from the row's first position to be decoded to the end of its canvas."""

    block_size: int

    def count(self, start: int, end: int) -> int:
        return -(-(end - start) // self.block_size)

    def next_end(self, start: int, end: int) -> int:
        """End of the block that begins at `start`, in a region that ends at `end`."""
        return min(start + self.block_size, end)
