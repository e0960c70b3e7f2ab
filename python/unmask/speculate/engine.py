"""Lossless self-speculation (SSD, FreeDave): one forward verifies the plain run's next steps as they were foreseen, and makes one more.

A plain step is a function of a row's canvas and its counters: forward, statistics, rule, commit. So the same step is made from every node, all
in one forward (layout.py): after[j] is what the plain run would make of node j. Node 0 is the row as it stands; a node behind it counts if it
is what its parent became. The row then moves on by as many steps as nodes counted, to after[last], and its next draft (drafts.py) comes from
the last node's statistics: no forward is spent on drafting. With one node this is the plain run.

Reads of the device per forward, beside the plain step's one: each depth of a draft (the host decides who may grow; drafts.py), which nodes count,
and, on block-causal models with cache="dual", whether each node's part has begun.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from .. import ops
from ..decode.backend import Plan, make_plan
from ..decode.caches import Cache, NoCache
from ..decode.engine import Commit, Engine
from ..decode.invalid import report_invalid
from ..decode.rules.base import StepView
from ..decode.state import Row
from ..ops import LogitStats
from .auto import Chooser
from .drafts import Drafter
from .layout import place
from .methods import SSD, Method
from .nodes import Node, NodeState, window_start


@dataclasses.dataclass
class _Last:
    """What the last forward left for drafting: step, bool [N] candidates of the last accepted nodes, the arguments of its reduction."""

    step: StepView
    accepted: torch.Tensor
    options: dict[str, Any]


@dataclasses.dataclass
class Speculative(Engine):
    """`Engine` over a NodeState, with a backend made for it. draft: nodes per row at most, N; chooser: says how many before each forward."""

    method: Method = dataclasses.field(default_factory=SSD)
    draft: int = 4
    chooser: Chooser | None = None

    def __post_init__(self):
        super().__post_init__()
        assert isinstance(self.state, NodeState)
        self.nodes: NodeState = self.state
        if self.method.tree == "tokens":
            self.rule.options = lambda step: dict(topk=2)  # type: ignore[method-assign]
        self._drafter = Drafter(self)
        self._done = [0] * self.nodes.batch  # plain steps of each row
        self._last: _Last | None = None

    def _plan(self, rows: list[Row], candidates) -> Plan:
        """As always, then placed: nodes other than 0 get scratch slots. The last few plans are kept."""
        entries = []
        for row in rows:
            v, start, end, first, last = self._entry(row, candidates, [])
            if v >= self.nodes.batch:
                begin = window_start(self._cache, row, start)
                start = begin - self._lag if begin > start else start
            entries.append((v, start, end, first, last))
        key = tuple(entries)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 16:
                self._plans.clear()
            made = make_plan(self.state, key, self.backend.shifted)
            plan = self._plans[key] = place(self.nodes, made, self.backend.attention_block, self.method.attention == "tree")
        return plan

    @property
    def cache_run(self) -> Cache:
        """The cache that follows the run: those that are served keep nothing but what stands in a Row, so nodes may use it too."""
        return self._cache

    def eos_reached(self, plan: Plan) -> torch.Tensor:
        """int64 [B]: 1 where the entry's row would end by an EOS as soon as this step is done."""
        if self._eos is None or self.eos_at_block_end:
            return torch.zeros_like(plan.row)
        return self._eos_reached(plan).long()

    @torch.inference_mode()
    def _step(self, rows: list[Row]) -> list[Commit]:
        began = time.perf_counter()
        most = self.draft if self.chooser is None else self.chooser.nodes(self, rows)
        roots = [dataclasses.replace(r, nfe=self._done[r.index]) for r in rows]
        trees = self._drafter.draft(roots, most) if most > 1 else [[Node(root)] for root in roots]
        drafting = time.perf_counter() - began
        views = [node.view for tree in trees for node in tree]
        at = torch.tensor([v.index for v in views], device=self.nodes.canvas.device)
        before = self.nodes.canvas.index_select(0, at)
        step, stats, invalid, _ = self._measure(views)
        was = step.masked, step.canvas
        stats, selection = self._choose(step, stats)
        result = self._write(step, stats, selection, self._valid(step, invalid))
        after, undecided = self.nodes.canvas.index_select(0, at), self.nodes.masked.index_select(0, at)
        ended = self._eos_reached(step.plan).long() if self._eos is not None else torch.zeros_like(result.left)
        paths = self._paths(trees, before, after)
        left, over, bad = torch.stack([result.left, ended, invalid.long()]).tolist()
        forwarded = self._cache.rows_forwarded(step.plan, self.backend.rows_forwarded(step.plan))
        made = self._records(step, stats, selection, result, None, left, was, forwarded) if self.record else []
        commits, lasts = [], []
        for row, tree, path, (first, end) in zip(rows, trees, paths, _spans(trees), strict=True):
            if self.nodes.schedule.adaptive and row.step == 0:
                root = tree[0].view  # the forward has said where its block ends
                row.block_end, row.masks, row.quotas = root.block_end, root.masks, root.quotas
            row.nfe += 1
            row.forwarded += sum(forwarded[first:end])
            counted = 0
            for node in path:
                e = first + node
                if node:
                    self.nodes.canvas[row.index], self.nodes.masked[row.index] = after[e], undecided[e]
                    counted += 1
                if bad[e]:
                    self._report_node(step, stats, e, row)
                if self.record:
                    commits.append(dataclasses.replace(
                        made[e], row=row.index, nfe=row.nfe, rows=0.0 if node else sum(forwarded[first:end]),
                        drafted=0 if node else len(tree) - 1, accepted=0,
                    ))  # fmt: skip
                self._done[row.index] += 1
                self._move(row, left[e], 0, bool(over[e]))
                if not row.active:
                    break
                self._cache.moved([row])
            lasts.append(e if row.active else -1)
            row.drafted += len(tree) - 1
            row.accepted += counted
            if self.record:
                own = len(commits) - 1 - counted
                commits[own] = dataclasses.replace(commits[own], accepted=counted)
            if self.chooser is not None:
                self.chooser.note(len(tree), counted, row.active)
        if most > 1 or self.chooser is not None:
            self._keep(step, stats, was[0], rows, lasts, left)
        if self.chooser is not None:
            self.chooser.spent(drafting, max(len(t) for t in trees) - 1)
        return commits

    def _paths(self, trees: list[list[Node]], before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
        """The accepted nodes of each row, in order. before, after: int64 [nodes of all rows, L], the canvases around this forward."""
        most = max(len(tree) for tree in trees)
        if most == 1:
            return [[0]] * len(trees)
        device = before.device
        index = torch.tensor([[first + min(j, end - first - 1) for j in range(most)] for first, end in _spans(trees)], device=device)
        count = torch.tensor([len(tree) for tree in trees], device=device)
        shape = (*index.shape, before.shape[1])
        node, result = (x.index_select(0, index.view(-1)).view(shape) for x in (before, after))
        parents = [[node.parent for node in tree] + [-1] * (most - len(tree)) for tree in trees]
        chain = self.method.subset or self.method.tree == "chain"
        parent = None if chain else torch.tensor(parents, device=device)
        found = ops.verify_greedy(node, result, parent, count, self.nodes.mask_id, self.method.subset)
        paths = []
        lasts, lengths = torch.stack([found.last, found.length]).tolist()
        for last, tree in zip(lasts, trees, strict=True):
            path = [last]
            while path[-1]:
                path.append(tree[path[-1]].parent)
            paths.append(path[::-1])
        assert [len(p) for p in paths] == lengths, "a node was skipped: the rule's steps are not as long as their quota"
        return paths

    def _report(self, step: StepView, stats: LogitStats, invalid: list[int]) -> None:
        """From a forward in which an adaptive schedule opens a block: of the rows themselves. Whether another node counts is not known yet."""
        own = [r.index < self.nodes.batch for r in step.rows]
        status = torch.where(step.spread(torch.tensor(own, device=step.device)), stats.status, 0)
        super()._report(step, stats._replace(status=status), [int(bad and mine) for bad, mine in zip(invalid, own, strict=True)])

    def _report_node(self, step: StepView, stats: LogitStats, entry: int, row: Row) -> None:
        """Invalid logits of a node that counts: raises, or ends the row as the plain run does."""
        mine = step.entry == entry
        shown = StepView(self.state, [dataclasses.replace(row, nfe=self._done[row.index])] * step.entries, step.plan, False)
        own = stats._replace(status=torch.where(mine, stats.status, 0))
        report_invalid(shown, own, [int(e == entry) for e in range(step.entries)], self.on_invalid)
        row.finish_reason = "invalid"

    def _keep(self, step: StepView, stats: LogitStats, masked: torch.Tensor, rows: list[Row], lasts: list[int], left: list[int]) -> None:
        """What the last accepted nodes say of the positions that are still masked, and, where a row is about to enter a block or just did, of
        the positions of that block that their forward reached. left: undecided positions of each entry's block after its step."""
        nodes = self.nodes
        chosen = torch.zeros(step.entries, dtype=torch.bool)
        for e in lasts:
            if e >= 0:
                chosen[e] = True
        accepted = step.spread(chosen.to(step.device)) & masked
        length = nodes.canvas.shape[1]
        self._drafter.predictions.note(step.plan.cand_row % nodes.batch * length + step.pos, stats, accepted)
        options = dict(suppress=self._suppress, filters=self._filters, **self.rule.options(step))
        self._last = _Last(step, accepted, options)
        ranges = {}
        for row, e in zip(rows, lasts, strict=True):
            if e >= 0 and (span := self._ahead(row, step.plan.entries[e], left[e])):
                ranges[e] = span
        if not ranges:
            return
        windows = tuple((v, start, end, *ranges.get(e, (start, start))) for e, (v, start, end, _, _) in enumerate(step.plan.entries))
        plan = make_plan(nodes, windows, self.backend.shifted)
        flat = plan.cand_row % nodes.batch * length + plan.cand_pos
        live = nodes.masked.view(-1).index_select(0, flat)
        self._drafter.predictions.note(flat, self.backend.reduce(plan, live, **options), live)

    def _ahead(self, row: Row, entry: tuple[int, int, int, int, int], left: int) -> tuple[int, int] | None:
        """Positions beyond the step's candidates whose predictions the next draft may want, within what the entry's forward reached."""
        if self.nodes.schedule.adaptive:
            return None
        shift, size = int(self.backend.shifted), self.backend.attention_block
        _, start, end, _, last = entry
        if row.block_start >= last:  # it has just entered a block
            low, high = row.block_start, row.block_end
        elif row.block_end < row.end and (size is not None or isinstance(self._cache.rule, NoCache)):  # a chain may enter the next one
            if left > 2 * self.draft:
                return None
            low, high = row.block_end, self.nodes.schedule.next_end(row.block_end, row.end)
        else:
            return None
        low, high = max(low, start + shift if start else 0), min(high, end + shift)
        return (low, high) if low < high else None

    def redraw(self, depth: int) -> None:
        """Sampled tokens are those of their own step: before a step is drafted, the last hidden states are reduced again with its noise."""
        last = self._last
        if self.policy.temperature == 0 or last is None:
            return
        nodes, step = self.nodes, last.step
        length = nodes.canvas.shape[1]
        flat = step.plan.cand_row % nodes.batch * length + step.pos
        live = last.accepted & nodes.masked.view(-1).index_select(0, flat)
        done = torch.tensor([self._done[v % nodes.batch] + depth - 1 for v, *_ in step.plan.entries], device=step.device)
        key = dict(seed=nodes.seeds.index_select(0, step.plan.cand_row), step=step.spread(done), pos=step.pos)
        stats = self.backend.reduce(step.plan, live, temperature=self.policy.temperature, **key, **last.options)
        self._drafter.predictions.note(flat, stats, live)

    def join(self, ids, given, seed: int = 0) -> Row:
        return self.nodes.join(ids, given, seed)


def _spans(trees: list[list[Node]]) -> list[tuple[int, int]]:
    """[first, end) of each row's nodes among those of all rows."""
    spans, seen = [], 0
    for tree in trees:
        spans.append((seen, seen + len(tree)))
        seen += len(tree)
    return spans
