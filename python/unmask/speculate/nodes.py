"""Draft nodes are virtual rows: a copy of a row's canvas some steps ahead, never of its K and V.

Node 0 of every row is the row itself, so what is written there needs no copying back; a row's other nodes live in canvas rows behind those of
the batch: node j of row r is canvas row j B + r.
"""

from __future__ import annotations

import dataclasses

import torch

from ..decode.caches import Block, Cache, CacheRule, Dual, NoCache, attention_block
from ..decode.state import DecodeState, Row


class NodeState(DecodeState):
    """The state of a batch with room for `nodes` nodes per row. `base` goes on as the state of the real rows: its tensors become views.

    canvas, masked, given, seeds: as in DecodeState, for nodes * B rows. rows: the real ones, then where each other node stands.
    """

    def __init__(self, base: DecodeState, nodes: int):
        self.batch, self.nodes = base.canvas.shape[0], nodes
        self.mask_id, self.schedule, self.steps = base.mask_id, base.schedule, base.steps
        self.canvas, self.masked, self.given = (x.repeat(nodes, 1) for x in (base.canvas, base.masked, base.given))
        self.seeds = base.seeds.repeat(nodes)
        base.canvas, base.masked, base.given = (x[: self.batch] for x in (self.canvas, self.masked, self.given))
        self.rows = [*base.rows, *(dataclasses.replace(r, index=j * self.batch + r.index) for j in range(1, nodes) for r in base.rows)]

    @property
    def active(self) -> list[Row]:
        return [r for r in self.rows[: self.batch] if r.active]

    def copy_row(self, source: list[int], target: list[int]) -> None:
        """Canvas and undecided map of canvas rows `source` to `target`."""
        at, to = (torch.tensor(x, device=self.canvas.device) for x in (source, target))
        self.canvas.index_copy_(0, to, self.canvas.index_select(0, at))
        self.masked.index_copy_(0, to, self.masked.index_select(0, at))

    def join(self, ids, keep, seed):
        raise ValueError("rows cannot join a batch that is decoded speculatively; start another one, or leave speculate out")


@dataclasses.dataclass
class Node:
    """A drafted state. view: where its row stands there (index: its canvas row; nfe: plain steps done). parent: place of its parent among the
    row's nodes, -1 for node 0."""

    view: Row
    parent: int = -1


def shares(cache: Cache, view: Row, base: Row) -> bool:
    """Whether a step from `view` reads nothing but its own window and K/V that node 0's forward leaves as they are in the plain run, and writes
    nothing that a later step reads. base: node 0.

    A step that renews the whole canvas (the first of a block, with prefix and dual) must be node 0: the K/V outside the window stay for later.
    """
    rule, size = cache.rule, cache.run.backend.attention_block
    if size is None:
        return isinstance(rule, NoCache) or not (view.step == 0 or (rule.refresh and view.step % rule.refresh == 0))
    if attention_block(view, size) != attention_block(base, size):
        return False  # the block that it leaves would have to be stored first
    if not isinstance(rule, Dual):
        return True
    begin, end = attention_block(view, size)
    # K/V of a finished part are read as its last step wrote them where the next part begins with a token that is known already
    kept = view.block_end < end and not bool(cache.run.state.masked[view.index, view.block_end])
    return view.opened == begin and view.first_known and not kept


def window_start(cache: Cache, view: Row, start: int) -> int:
    """Where a node's window begins, node 0 apart: without a cache a block-causal row forwards everything before its block too, which is the same
    in every node."""
    size = cache.run.backend.attention_block
    return start if size is None else max(start, attention_block(view, size)[0])


def scratch_slots(state: DecodeState, rule: CacheRule, attention_size: int | None, nodes: int) -> int:
    """Cache slots behind the canvas for the windows of a row's nodes, node 0 apart."""
    length = state.canvas.shape[1]
    size = state.schedule.block_size
    if attention_size is not None:
        widest = max(size, attention_size)
    elif isinstance(rule, Dual):
        widest = size
        if state.schedule.adaptive:
            widest = max([size, *(state.schedule.reach(dataclasses.replace(r, block_start=0)) for r in state.rows)])
    elif isinstance(rule, NoCache | Block):
        widest = length
    else:
        widest = max([r.end - r.start for r in state.rows], default=0)
    return (nodes - 1) * min(widest + 1, length)  # with shifted logits a window begins one position earlier
