"""Caches: which positions a row forwards at a step. K and V of the positions that are forwarded are always rewritten in place.

Bidirectional models:

| cache | first step of a block | later steps of the block | exact |
|---|---|---|---|
| none | whole canvas | whole canvas | yes |
| prefix | whole canvas | [block start, end of canvas) | no (K/V of the prefix stay as of the block's first step) |
| dual | whole canvas | the block | no (prefix and suffix stay) |

prefix and dual: Fast-dLLM, arXiv 2505.22618 (generate_with_prefix_cache, generate_with_dual_cache). They are approximate on bidirectional
models of more than one layer: a position's K/V depend, from the second layer on, on the tokens that have changed since.

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

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .state import Row

CACHES = ("none", "prefix", "dual", "block")
ALLOWED = {"bidirectional": ("none", "prefix", "dual"), "block_causal": ("none", "block", "dual")}


def default_cache(visibility: str) -> str:
    """The exact one: nothing is cached on a bidirectional model, finished blocks on a block-causal one."""
    return "block" if visibility == "block_causal" else "none"


def is_exact(name: str, visibility: str, n_layers: int) -> bool:
    """True if cached decoding gives what recomputing everything gives: no cache, finished blocks, or a single bidirectional layer."""
    return name in ("none", "block") or (visibility == "bidirectional" and n_layers == 1)


def window(name: str, first_step: bool, block_start: int, block_end: int, length: int) -> tuple[int, int]:
    """Positions [start, end) that a row of a bidirectional model forwards at this step."""
    if name == "none" or first_step:
        return 0, length
    return (block_start, length) if name == "prefix" else (block_start, block_end)


def attention_block(row: Row, size: int) -> tuple[int, int]:
    """[start, end) of the attention blocks, aligned to multiples of `size`, that hold the row's block; the canvas may end inside."""
    return row.block_start // size * size, min(-(-row.block_end // size) * size, row.end)


def part_start(row: Row, size: int, part: int) -> int:
    """Start of the part of the attention block that the row's block lies in: parts are aligned to multiples of `part`, so that a prompt's
    remainder belongs to the first one."""
    return max(row.block_start // part * part, attention_block(row, size)[0])


def causal_window(name: str, row: Row, size: int, part: int) -> tuple[int, int]:
    """Positions [start, end) that a row of a block-causal model forwards at this step. dual: the whole block until the first position of
    the part being decoded is known (its K/V would else be those of a mask for everyone behind it), as Fast-dLLM v2 does. part: length of
    the parts (sub-blocks) that are decoded together."""
    begin, end = attention_block(row, size)
    if name == "none":
        return 0, end
    if name == "dual" and row.opened == begin and row.first_known:
        return part_start(row, size, part), row.block_end
    return min(row.stored, begin), end
