"""Elastic-Cache (arXiv 2510.14973): a window of masks is computed at every step, and drift of attention says from which layer on the rest is.

The first forward of a row takes everything. Every later one forwards the first `window` undecided positions, what the last step decided, and the
tracked tokens. In each layer the tracked token is the decided one that the window's queries attend to most (mean over heads). After the forward
each layer's column of the token tracked there, the attention that the queries in both windows give it, head by head, is compared with that
of the forward before by its cosine. From behind the first layer where that is below `threshold` everything is recomputed: every position of the
row, from the hidden states that are kept in front of every layer, so that K, V and hidden states of these layers are all of this step. The layers
before keep theirs. Where no undecided position was in both windows, everything behind the first layer is recomputed.

Unverified, the authors' code was not at hand: which of the tracked token's weights are compared (its column, as here, or its row) and whether
head by head; that what was just decided is forwarded, which keeps no K and V of masks for decided tokens; that the test precedes the
recomputation instead of running along with it (rows of the window are computed twice in the layers that are recomputed, and counted twice).
Commits are any policy's; the paper's is policy="threshold", threshold=0.9.

Memory: besides K and V one vector [d_model] per layer and position. Two reads of the device per step more than without a cache: the cosines,
and which positions are undecided or tracked.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch

from ... import ops
from ...models.backbone import Forward, Layer
from ...ops.linear import pad_rows
from ._layers import Queries, received, toward
from .base import Cache, CacheRule, CacheRun, Runs, runs_of
from .d2 import refuse_partial

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..backend import Plan
    from ..policy import Policy
    from ..state import Row


@dataclasses.dataclass(frozen=True)
class Elastic(CacheRule):
    """Elastic-Cache. window: undecided positions computed at every step. threshold: cosine below which the layers behind are recomputed, 0..2;
    0 = never, above 1 = always and from the first layer on, which is exact."""

    window: int = 16
    threshold: float = 0.9
    name: ClassVar[str] = "elastic"
    source: ClassVar[str] = "Elastic-Cache, arXiv 2510.14973 (details unverified)"
    forwards: ClassVar[str] = "the first masks, what was just decided and the most attended tokens; everything behind the layer where attention drifts"
    every_position: ClassVar[bool] = False

    def __post_init__(self):
        self._integer("window", 1)
        self._number("threshold", 0.0, 2.0)

    def exact(self, config: ModelConfig) -> bool:
        return self.threshold > 1

    def check(self, policy: Policy, config: ModelConfig) -> None:
        if not self.exact(config):
            refuse_partial(self, policy)

    def start(self, run: CacheRun) -> Cache:
        return _Elastic(self, run)


@dataclasses.dataclass
class _Tracked:
    """What a row's last forward leaves for the next one. positions: its window, rising. token, column: per layer the tracked token (int64
    [1] on the device) and the window's attention to it, float32 [window, Hq]."""

    positions: list[int]
    token: list[torch.Tensor]
    column: list[torch.Tensor]


class _Elastic(Cache):
    windowed = False

    def __init__(self, rule: Elastic, run: CacheRun):
        super().__init__(rule, run)
        self._model, canvas = run.backend.model, run.state.canvas
        self._layers = self._model.backbone.layers
        self._always = rule.threshold > 1
        self._before = canvas
        self._windows: dict[int, list[int]] = {}  # of the next forward
        self._next: dict[int, Runs] = {}
        self._kept: dict[int, _Tracked] = {}
        self._queries: list[Queries] = []
        self._more: list[float] = []
        if self._always:
            return
        self.runner = self._layer
        shape = (len(self._layers), canvas.numel(), self._model.config.d_model)
        self._hidden = torch.zeros(shape, dtype=self._model.dtype, device=run.device)  # in front of each layer
        self._tracked = torch.zeros(canvas.shape, dtype=torch.bool, device=run.device)
        for row in run.state.active:
            self.joined(row)

    def joined(self, row: Row) -> None:
        undecided = self.run.state.masked[row.index, : row.end].nonzero().flatten().tolist()
        self._windows[row.index] = undecided[: self.rule.window]

    def _whole(self, row: Row) -> bool:
        return self._always or row.nfe == 0

    def window(self, row: Row) -> tuple[int, int]:
        return 0, row.end

    def runs(self, row: Row) -> Runs:
        return ((0, row.end),) if self._whole(row) else self._next[row.index]

    def begin(self, plan: Plan) -> None:
        self._before, self._plan = self.run.state.canvas.clone(), plan
        self._queries, self._more = [], [0.0] * len(plan.entries)

    def rows_forwarded(self, plan: Plan, rows: list[float]) -> list[float]:
        return [n + more / len(self._layers) for n, more in zip(rows, self._more, strict=True)]

    def moved(self, rows: list[Row]) -> None:
        if self._always or not rows:
            return
        state = self.run.state
        also = self._tracked | (state.canvas != self._before)
        code = (state.masked.to(torch.int8) + 2 * also.to(torch.int8)).cpu()
        for row in rows:
            own = code[row.index, : row.end]
            window = (own % 2 == 1).nonzero().flatten()[: self.rule.window]
            query = own >= 2
            query[window] = True
            if self.run.backend.shifted:
                query[(window - 1).clamp_min(0)] = True
            self._windows[row.index], self._next[row.index] = window.tolist(), runs_of(query)

    def _layer(self, index: int, layer: Layer, x, residual, f: Forward, kv, inv_freq, status) -> torch.Tensor:
        """A layer over the planned positions; behind the last one, what drift asks for."""
        eps, n = layer.config.norm_eps, self._plan.flat.shape[0]
        y = ops.add_rms_norm(residual, x, layer.attn_norm, eps)
        self._hidden[index].index_copy_(0, self._plan.flat, residual[:n])
        branch, q, lse = layer.attention(y, f, kv, inv_freq, status)
        self._queries.append(Queries(q, lse))
        x = layer.mlp.forward(ops.add_rms_norm(residual, branch, layer.mlp_norm, eps), f.row)
        if index == len(self._layers) - 1:
            self._finish(x, residual, f, inv_freq)
        return x

    def _finish(self, x: torch.Tensor, residual: torch.Tensor, f: Forward, inv_freq: torch.Tensor) -> None:
        """Recomputes what drift asks for (the forward's own tokens of it in `x` and `residual`), and tracks for the next forward."""
        positions, sizes = self._positions(), self._plan.sizes
        first = [sum(sizes[:e]) for e in range(len(sizes))]
        places = []  # where each entry's window stands among the forward's tokens
        for (index, *_), begin, own in zip(self._plan.entries, first, positions, strict=True):
            at = {p: begin + i for i, p in enumerate(own)}
            places.append([at[p] for p in self._windows[index]])
        again = _Again(self, self._drift(places), f, inv_freq)
        again.run()
        for e, (index, *_) in enumerate(self._plan.entries):
            row = self.run.state.rows[index]
            self._more[e] = float((len(self._layers) - again.begin[e]) * row.end)
            if again.begin[e] < len(self._layers):
                own = torch.tensor(positions[e], device=x.device) + again.start[e]
                where = torch.arange(first[e], first[e] + sizes[e], device=x.device)
                residual.index_copy_(0, where, again.residual.index_select(0, own))
                x.index_copy_(0, where, again.x.index_select(0, own))
            here = torch.tensor(places[e], device=x.device)
            there = torch.tensor(self._windows[index], device=x.device) + again.start[e]
            self._track(row, [(again.queries[n], there) if n >= again.begin[e] else (own, here) for n, own in enumerate(self._queries)])

    def _positions(self) -> list[list[int]]:
        if self._plan.runs is None:
            return [list(range(s, t)) for _, s, t, _, _ in self._plan.entries]
        return [[p for s, t in runs for p in range(s, t)] for runs in self._plan.runs]

    def _drift(self, places: list[list[int]]) -> list[int]:
        """Of each entry the first layer that is recomputed, the number of layers where none is. Reads the device once."""
        count, device = len(self._layers), self.run.device
        begin, tested, cosines = [count] * len(places), [], []
        for e, (index, *_) in enumerate(self._plan.entries):
            row = self.run.state.rows[index]
            if row.nfe == 0:
                continue
            kept = self._kept[index]
            then = {p: i for i, p in enumerate(kept.positions)}
            both = [(then[p], at) for p, at in zip(self._windows[index], places[e], strict=True) if p in then]
            if not both:
                begin[e] = min(1, count)
                continue
            old, new = (torch.tensor(side, device=device) for side in zip(*both, strict=True))
            own = []
            for layer in range(count):
                now = self._column(layer, index, self._queries[layer], new, kept.token[layer])
                was = kept.column[layer].index_select(0, old)
                own.append(torch.nn.functional.cosine_similarity(now.flatten(), was.flatten(), dim=0))
            tested.append(e)
            cosines.append(torch.stack(own))
        if tested:
            still = (torch.stack(cosines) >= float(self.rule.threshold)).cpu()  # a NaN drifts
            for e, own in zip(tested, still, strict=True):
                drifted = (~own).nonzero().flatten().tolist()
                begin[e] = drifted[0] + 1 if drifted else count
        return begin

    def _column(self, layer: int, index: int, own: Queries, at: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """float32 [n, Hq]: attention of the queries `at` to a token of canvas row `index`."""
        return toward(own, at, self.run.backend.cache.k[layer, index].index_select(1, token)[:, 0], self._layers[layer].scale)

    def _track(self, row: Row, sources: list[tuple[Queries, torch.Tensor]]) -> None:
        """Chooses each layer's tracked token. sources: per layer the queries, and where the window stands among them."""
        index, end, cache = row.index, row.end, self.run.backend.cache
        decided = ~self.run.state.masked[index, :end]
        token, column = [], []
        share = torch.ones(len(self._windows[index]), dtype=torch.float32, device=self.run.device)
        for layer, (own, at) in enumerate(sources):
            some = Queries(own.q.index_select(0, at), own.lse.index_select(0, at))
            sums = received(some, slice(0, at.shape[0]), cache.k[layer, index, :, :end], self._layers[layer].scale, share)
            token.append(torch.where(decided, sums, -1.0).argmax(keepdim=True))
            column.append(self._column(layer, index, own, at, token[-1]))
        self._tracked[index] = False
        self._tracked[index, :end].index_fill_(0, torch.cat(token), True)
        self._tracked[index, :end] &= decided  # a row that begins without any decided position tracks a mask, which is forwarded anyway
        self._kept[index] = _Tracked(self._windows[index], token, column)


class _Again:
    """The second pass of a forward: whole rows from a layer on, from the hidden states kept in front of it.

    begin: of each entry of the plan the first layer, the number of layers = none. Afterwards start: where each entry's position 0 stands among
    the tokens of this pass; queries: per layer from the lowest `begin` on; residual, x: behind the last layer, as in `Layer.forward`.
    """

    def __init__(self, cache: _Elastic, begin: list[int], f: Forward, inv_freq: torch.Tensor):
        self.cache, self.begin, self.f, self.inv_freq = cache, begin, f, inv_freq
        self.queries: dict[int, Queries] = {}
        self.start = [0] * len(begin)
        self.residual = self.x = cache._hidden[0, :0]
        self._packed: dict[int, _Packed] = {}

    def run(self) -> None:
        cache, layers = self.cache, self.cache._layers
        # rows that begin earlier stand first, so that a row's place is the same in every layer
        order = sorted((b, e) for e, b in enumerate(self.begin) if b < len(layers))
        ends = [cache.run.state.rows[cache._plan.entries[e][0]].end for _, e in order]
        for i, (_, e) in enumerate(order):
            self.start[e] = sum(ends[:i])
        for n in range(order[0][0] if order else len(layers), len(layers)):
            self._layer(n, [e for b, e in order if b <= n])

    def _layer(self, n: int, among: list[int]) -> None:
        cache = self.cache
        layer, kv = cache._layers[n], cache.run.backend.cache.layers[n]
        if len(among) not in self._packed:
            self._packed[len(among)] = _Packed.of(cache, among, self.f)
        at, eps = self._packed[len(among)], layer.config.norm_eps
        residual = cache._hidden[n].index_select(0, at.flat)
        q = layer.append(ops.rms_norm(residual, layer.attn_norm, eps), kv, at.row, at.pos, at.pos, self.inv_freq, None)
        out, lse = layer.attend(q, kv, at.cu, at.kv_row, at.seg, None, None, None)
        self.queries[n] = Queries(q, lse)
        x = layer.mlp(ops.add_rms_norm(residual, layer.o(out), layer.mlp_norm, eps), at.row)
        if n + 1 < len(cache._layers):
            cache._hidden[n + 1].index_copy_(0, at.flat[: at.tokens], (residual + x)[: at.tokens])
        else:
            self.residual, self.x = residual, x


@dataclasses.dataclass
class _Packed:
    """Whole rows of some entries as one list of tokens, padded to a multiple of 16; fields as of Forward. flat: int64 [T], canvas positions."""

    tokens: int
    row: torch.Tensor
    pos: torch.Tensor
    flat: torch.Tensor
    cu: torch.Tensor
    kv_row: torch.Tensor
    seg: torch.Tensor

    @classmethod
    def of(cls, cache: _Elastic, among: list[int], f: Forward) -> _Packed:
        state, device = cache.run.state, cache.run.device
        rows = [state.rows[cache._plan.entries[e][0]] for e in among]
        sizes = [row.end for row in rows]
        tokens = sum(sizes)
        fill = torch.zeros(pad_rows(tokens) - tokens, dtype=torch.int64)
        pos = torch.cat([*(torch.arange(size) for size in sizes), fill]).to(device)
        row = torch.cat([*(torch.full((row.end,), row.index) for row in rows), fill - 1]).to(device)
        entry = torch.tensor(among, device=device)
        return cls(
            tokens, row, pos, row.clamp_min(0) * state.canvas.shape[1] + pos, torch.tensor([0, *sizes]).cumsum(0).to(device),
            f.kv_row.index_select(0, entry), f.seg.index_select(0, entry),
        )  # fmt: skip
