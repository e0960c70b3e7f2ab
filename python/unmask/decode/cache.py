"""Caches: which positions a row forwards at a step. K and V of the positions that are forwarded are always rewritten in place.

| cache | first step of a block | later steps of the block | exact |
|---|---|---|---|
| none | whole canvas | whole canvas | yes |
| prefix | whole canvas | [block start, end of canvas) | no (K/V of the prefix stay as of the block's first step) |
| dual | whole canvas | the block | no (prefix and suffix stay) |

prefix and dual: Fast-dLLM, arXiv 2505.22618 (generate_with_prefix_cache, generate_with_dual_cache). They are approximate on bidirectional
models of more than one layer: a position's K/V depend, from the second layer on, on the tokens that have changed since.
"""

from __future__ import annotations

CACHES = ("none", "prefix", "dual")


def is_exact(name: str, visibility: str, n_layers: int) -> bool:
    """True if cached decoding gives what recomputing everything gives: no cache, or a single bidirectional layer."""
    return name == "none" or (visibility == "bidirectional" and n_layers == 1)


def window(name: str, first_step: bool, block_start: int, block_end: int, length: int) -> tuple[int, int]:
    """Positions [start, end) that a row forwards at this step."""
    if name == "none" or first_step:
        return 0, length
    return (block_start, length) if name == "prefix" else (block_start, block_end)
