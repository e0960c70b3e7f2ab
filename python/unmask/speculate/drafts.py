"""Drafts: the plain decoder's next steps as the last forward's statistics foresee them.

A row's predictions are kept by position. A drafted step is the policy's own rule on them, with the step's own counters, so quotas, thresholds
and noise come out as they would; only the forward is missing.

The host reads the device once per depth, for all rows: how many positions a drafted step leaves says where the next one stands. Second guesses
(tree="positions", "tokens") read it some times more per node, to name the places that they exchange.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..decode.backend import Plan, make_plan
from ..decode.rules.base import Selection, StepView
from ..decode.state import Row
from ..ops import LogitStats
from .nodes import Node, NodeState, shares

if TYPE_CHECKING:
    from .engine import Speculative


class Predictions:
    """ids: int64 [B L + 1, 1 + K], values: float32 [B L + 1, C], known: bool [B L + 1]: what the last accepted forward says of each canvas
    position. The last place takes what is not to be kept, so that nobody has to count what is."""

    def __init__(self, state: NodeState):
        self._places = state.batch * state.canvas.shape[1]
        self._device = state.canvas.device
        self.ids: torch.Tensor | None = None

    def note(self, flat: torch.Tensor, stats: LogitStats, chosen: torch.Tensor) -> None:
        """flat: int64 [N], index in the real rows' flattened canvas. chosen: bool [N]."""
        if self.ids is None:
            self.ids = stats.ids.new_full((self._places + 1, stats.ids.shape[1]), -1)
            self.values = stats.values.new_zeros((self._places + 1, stats.values.shape[1]))
            self.known = torch.zeros(self._places + 1, dtype=torch.bool, device=self._device)
        to = torch.where(chosen & (stats.token >= 0), flat, self._places)
        self.ids.index_copy_(0, to, stats.ids[:, : self.ids.shape[1]])  # a reduction may report more than is kept
        self.values.index_copy_(0, to, stats.values[:, : self.values.shape[1]])
        self.known.index_fill_(0, to, True)

    def read(self, flat: torch.Tensor) -> tuple[LogitStats, torch.Tensor]:
        """(statistics, bool [N] which are known)."""
        assert self.ids is not None
        status = torch.zeros(flat.shape[0], dtype=torch.int32, device=self._device)
        return LogitStats(self.ids.index_select(0, flat), self.values.index_select(0, flat), status), self.known.index_select(0, flat)


class Drafter:
    """Grows a row's nodes. It uses the engine's rule, score and commit on virtual rows."""

    def __init__(self, engine: Speculative):
        self.engine, self.state = engine, engine.nodes
        self.tree = engine.method.tree
        self.predictions = Predictions(self.state)
        self._plans: dict[tuple, Plan] = {}

    def draft(self, roots: list[Row], nodes: int) -> list[list[Node]]:
        """Nodes of each row, at most `nodes`; roots: where the rows stand (nfe: plain steps done)."""
        trees = [[Node(root)] for root in roots]
        if self.predictions.ids is None:
            return trees
        adaptive = self.state.schedule.adaptive
        front = {i: 0 for i, root in enumerate(roots) if not (adaptive and root.step == 0)}  # where such a block ends is not known yet
        depth = nodes if self.tree == "chain" else nodes // 2 + 1
        for d in range(1, depth):
            if not front:
                break
            self.engine.redraw(d)
            front = self._grow(trees, front, room=self.tree != "chain" and nodes - depth >= d)
        return trees

    def _candidates(self, views: list[Row]) -> Plan:
        """A plan without a forward."""
        key = tuple((v.index, *self.engine.rule.candidates(v)) for v in views)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 64:
                self._plans.clear()
            plan = self._plans[key] = make_plan(self.state, tuple((v, first, last, first, last) for v, first, last in key))
        return plan

    def _child(self, tree: list[Node], parent: Row) -> Row:
        """A copy of the parent in the row's next free place."""
        view = dataclasses.replace(parent, index=len(tree) * self.state.batch + tree[0].view.index)
        self.state.rows[view.index] = view
        return view

    def _grow(self, trees: list[list[Node]], front: dict[int, int], room: bool) -> dict[int, int]:
        """One more step for the rows in `front` (row -> place of the node to go on from); returns the new front. room: second guesses too."""
        engine, state = self.engine, self.state
        parents = [trees[i][at].view for i, at in front.items()]
        views = [self._child(trees[i], p) for i, p in zip(front, parents, strict=True)]
        state.copy_row([p.index for p in parents], [v.index for v in views])
        step = StepView(state, views, self._candidates(views), engine.policy.sampled)
        length = state.canvas.shape[1]
        stats, known = self.predictions.read(step.plan.cand_row % state.batch * length + step.pos)
        stats, selection = engine._choose(step, stats)
        live = step.masked & known
        result = engine._write(step, stats, selection, known)
        ended = engine.eos_reached(step.plan)
        wanted = step.masked if engine.method.subset else live  # a step of a part of its block would be a subset of the plain one
        left, usable, unknown, over = torch.stack(
            [step.count(state.masked.view(-1).index_select(0, step.flat)), step.count(live), step.count(wanted & ~known), ended]
        ).tolist()
        grown = {}
        for e, (i, at) in enumerate(front.items()):
            view, tree = views[e], trees[i]
            if not usable[e] or unknown[e] or over[e] or not self._advance(view, tree[0].view, left[e]):
                continue
            tree.append(Node(view, at))
            grown[i] = len(tree) - 1
            if room:
                self._second(step, stats, selection, live, result.committed, e, tree, at)
        return grown

    def _advance(self, view: Row, root: Row, left: int) -> bool:
        """Moves a view behind a drafted step; False where no node can stand there."""
        cache = self.engine.cache_run
        view.step += 1
        view.nfe += 1
        cache.forwarded(view)
        if left == 0:
            if self.state.schedule.adaptive:
                return False
            self.state.next_block(view)
            if not view.active:
                return False
        cache.moved([view])
        return shares(cache, view, root)

    def _second(
        self, step: StepView, stats: LogitStats, selection: Selection, live: torch.Tensor, committed: torch.Tensor, entry: int, tree: list[Node],
        parent: int,
    ) -> None:  # fmt: skip
        """A sibling of the node just grown, with another guess in its least certain place, where there is one."""
        child = tree[-1].view
        begin, end = step.plan.bounds[entry : entry + 2]
        mine = slice(begin, end)
        taken, open_ = live[mine] & committed[mine], live[mine] & ~committed[mine]
        if not bool(taken.any()):
            return
        score = torch.where(selection.score[mine].isnan(), -torch.inf, selection.score[mine].double())
        order = torch.argsort(score, descending=True, stable=True)
        last = int(order[torch.nonzero(taken[order]).flatten()[-1]])
        state, pos = self.state, step.pos[mine]
        if self.tree == "positions":
            if not bool(open_.any()):
                return
            other = int(order[torch.nonzero(open_[order]).flatten()[0]])
            token = int(stats.token[mine][other])
        else:
            other = last
            pair = stats.topk_id[mine][last].tolist()
            token = pair[0] if pair[0] != int(stats.token[mine][last]) else pair[1]
            if token < 0 or token == state.mask_id:
                return
        view = self._child(tree, child)
        state.copy_row([child.index], [view.index])
        state.canvas[view.index, pos[last]], state.masked[view.index, pos[last]] = state.mask_id, True
        state.canvas[view.index, pos[other]], state.masked[view.index, pos[other]] = token, False
        self.engine.cache_run.moved([view])
        if shares(self.engine.cache_run, view, tree[0].view):
            tree.append(Node(view, parent))
