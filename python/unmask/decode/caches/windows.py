"""Caches whose positions are a window. K and V of the positions that are forwarded are always rewritten in place.

Bidirectional models:

| cache | first step of a block | later steps of the block | exact |
|---|---|---|---|
| none | whole canvas | whole canvas | yes |
| prefix | whole canvas | [block start, end of canvas) | no (K/V of the prefix stay as of the block's first step) |
| dual | whole canvas | the block | no (prefix and suffix stay) |

prefix and dual: Fast-dLLM, arXiv 2505.22618 (generate_with_prefix_cache, generate_with_dual_cache). They are approximate on bidirectional
models of more than one layer: a position's K/V depend, from the second layer on, on the tokens that have changed since. `refresh` forwards
the whole canvas at every refresh-th step of a block too (0: only at the first, as the authors do; 1: always, which is exact).

Block-causal models (LLaDA2, SDAR, Fast-dLLM v2, BD3-LM arXiv 2503.09573): a position sees its own attention block and those before it, so
K/V of finished blocks never change, and what lies behind the block is not forwarded at all:

| cache | first step of an attention block | later steps | exact |
|---|---|---|---|
| none | everything up to its end | the same | yes |
| block | what is not stored yet (the prompt, or the block just finished) and the block | the block | yes |
| dual | as block | the part being decoded (a sub-block); Fast-dLLM v2's use_block_cache | no (the rest of the block stays) |

The first step of `block` is the store of the finished block and the first denoising step of the next one in one forward: a finished block's
K/V must come from a forward that saw its last tokens, and nothing waits for that forward alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from .base import Cache, CacheRule, CacheRun

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..state import Row


def attention_block(row: Row, size: int) -> tuple[int, int]:
    """[start, end) of the attention blocks, aligned to multiples of `size`, that hold the row's block; the canvas may end inside."""
    return row.block_start // size * size, min(-(-row.block_end // size) * size, row.end)


def part_start(row: Row, size: int, part: int) -> int:
    """Start of the part of the attention block that the row's block lies in: parts are aligned to multiples of `part`, so that a prompt's
    remainder belongs to the first one."""
    return max(row.block_start // part * part, attention_block(row, size)[0])


@dataclasses.dataclass(frozen=True)
class NoCache(CacheRule):
    """Everything is recomputed at every step."""

    name: ClassVar[str] = "none"
    source: ClassVar[str] = ""
    forwards: ClassVar[str] = "everything that the block sees, at every step"
    visibility: ClassVar[tuple[str, ...]] = ("bidirectional", "block_causal")
    native: ClassVar[bool] = False

    def exact(self, config: ModelConfig) -> bool:
        return True

    def start(self, run: CacheRun) -> Cache:
        return (_Window if run.backend.attention_block is None else BlockWindow)(self, run)


@dataclasses.dataclass(frozen=True)
class Prefix(CacheRule):
    """Fast-dLLM's prefix cache. refresh: the whole canvas at every refresh-th step of a block (0: at its first step only)."""

    refresh: int = 0
    name: ClassVar[str] = "prefix"
    source: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    forwards: ClassVar[str] = "the whole canvas at a block's first step, then the block and everything behind it"
    native: ClassVar[bool] = False

    def __post_init__(self):
        self._integer("refresh", 0)

    def exact(self, config: ModelConfig) -> bool:
        return config.n_layers == 1 or self.refresh == 1

    def start(self, run: CacheRun) -> Cache:
        return _Window(self, run)


@dataclasses.dataclass(frozen=True)
class Dual(CacheRule):
    """Fast-dLLM's dual cache; on a block-causal model Fast-dLLM v2's cache of sub-blocks. refresh: as of Prefix, bidirectional models only."""

    refresh: int = 0
    name: ClassVar[str] = "dual"
    source: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618; v2: arXiv 2509.26328"
    forwards: ClassVar[str] = "the whole canvas at a block's first step, then the block (block-causal: the whole block, then the part being decoded)"
    visibility: ClassVar[tuple[str, ...]] = ("bidirectional", "block_causal")
    native: ClassVar[bool] = False

    def __post_init__(self):
        self._integer("refresh", 0)

    def exact(self, config: ModelConfig) -> bool:
        return config.visibility == "bidirectional" and (config.n_layers == 1 or self.refresh == 1)

    def start(self, run: CacheRun) -> Cache:
        return (_Window if run.backend.attention_block is None else _PartWindow)(self, run)


@dataclasses.dataclass(frozen=True)
class Block(CacheRule):
    """Finished blocks of a block-causal model: exact."""

    name: ClassVar[str] = "block"
    source: ClassVar[str] = "BD3-LM, arXiv 2503.09573"
    forwards: ClassVar[str] = "what is not stored yet with a block's first step, then the block"
    visibility: ClassVar[tuple[str, ...]] = ("block_causal",)

    def exact(self, config: ModelConfig) -> bool:
        return True

    def start(self, run: CacheRun) -> Cache:
        return BlockWindow(self, run)


class _Window(Cache):
    """none, prefix, dual on a bidirectional model."""

    def window(self, row: Row) -> tuple[int, int]:
        rule = self.rule
        if isinstance(rule, Prefix | Dual):
            due = row.step == 0 or (rule.refresh and row.step % rule.refresh == 0)
            if not due:
                return row.block_start, row.end if isinstance(rule, Prefix) else row.block_end
        return 0, row.end


class BlockWindow(Cache):
    """none, block on a block-causal model."""

    def __init__(self, rule: CacheRule, run: CacheRun):
        super().__init__(rule, run)
        self.size: int = run.backend.attention_block

    def window(self, row: Row) -> tuple[int, int]:
        begin, end = attention_block(row, self.size)
        return (0 if isinstance(self.rule, NoCache) else min(row.stored, begin)), end

    def forwarded(self, row: Row) -> None:
        row.stored = row.opened = attention_block(row, self.size)[0]


class _PartWindow(BlockWindow):
    """dual on a block-causal model: the whole block until the first position of the part being decoded is known (its K/V would else be those
    of a mask for everyone behind it), as Fast-dLLM v2 does. Whether it is known is one read of the device per step: the next window depends on it."""

    def window(self, row: Row) -> tuple[int, int]:
        begin, _ = attention_block(row, self.size)
        if row.opened == begin and row.first_known:
            return part_start(row, self.size, self.run.part), row.block_end
        return super().window(row)

    def moved(self, rows: list[Row]) -> None:
        if not rows:
            return
        masked = self.run.state.masked
        at = [row.index * masked.shape[1] + part_start(row, self.size, self.run.part) for row in rows]
        for row, undecided in zip(rows, masked.view(-1)[at].tolist(), strict=True):
            row.first_known = not undecided
