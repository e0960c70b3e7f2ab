"""dLLM-Cache (arXiv 2506.06295; maomaocun/dLLM-Cache, dllm_cache/hooks): every layer keeps what its attention and its MLP gave each position,
and adds those again where it does not compute them anew.

Prompt (everything before the row's region) and response (the region) are refreshed at their own intervals, and always both at the first
forward of a row and in the first layer (as in d2Cache's port; the original counts forwards in all layers alike). Between refreshes of the
response a layer computes V of all its positions from what comes in, compares it with the V that it has kept, and computes Q, K, attention and
MLP anew for the floor(ratio * length) positions whose V has turned the most (cosine, ties: the first positions). New V are kept for all of
them, also where that number is 0, K for those alone. ratio = 0: nothing of the response is computed between refreshes.

| n-th forward of a row, n = 1, 2, ... | refreshed |
|---|---|
| (n - 1 + phase) a multiple of prompt_every, or n = 1 | the prompt |
| (n - 1 + phase) a multiple of response_every, or n = 1 | the response |

Memory: besides K and V two vectors [d_model] per layer and position in the model's dtype; with ratio > 0 a second copy of the V weights where
weights are packed. Nothing is read from the device. Rows forwarded are those that run attention and MLP: the V products that choose them and
the adding of what is kept are not counted.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch

from ... import ops
from ...ops.linear import pad_rows
from .base import Cache, CacheRule, CacheRun

if TYPE_CHECKING:
    from ...models.backbone import Forward, Layer
    from ...models.config import ModelConfig
    from ...ops.linear import Linear
    from ..backend import Plan
    from ..state import Row


@dataclasses.dataclass(frozen=True)
class DLLM(CacheRule):
    """dLLM-Cache. prompt_every, response_every: forwards between refreshes (the authors': 25 to 100 and 1 to 8 by task; 50 and 2 in
    d2Cache's port, taken here). ratio: share of the response that is computed between its refreshes, 0..1. phase: 0, as both codes count."""

    prompt_every: int = 50
    response_every: int = 2
    ratio: float = 0.25
    phase: int = 0
    name: ClassVar[str] = "dllm"
    source: ClassVar[str] = "dLLM-Cache, arXiv 2506.06295"
    forwards: ClassVar[str] = "in each layer prompt and response at their own intervals, between them the response positions whose V changed most"

    def __post_init__(self):
        self._integer("prompt_every", 1)
        self._integer("response_every", 1)
        self._number("ratio", 0.0, 1.0)
        self._integer("phase", 0)

    def exact(self, config: ModelConfig) -> bool:
        return config.n_layers == 1 or (self.prompt_every == 1 and (self.response_every == 1 or self.ratio == 1.0))

    def start(self, run: CacheRun) -> Cache:
        return _DLLM(self, run)


class _Parts:
    """How a forward's positions are computed in the layers behind the first. Indices are into its tokens, on the device.

    always: int64, refreshed positions; choose: int64 [N], response positions of rows that are not refreshed whole, in order; table: int64
    [C, W], place in `choose` of each such row's positions (N where there is none), sizes: how many of each row are computed, at most W.
    """

    def __init__(self, rule: DLLM, plan: Plan, rows: list[Row], dues: tuple[tuple[bool, bool], ...]):
        always, choose, table, self.sizes, self.forwarded = [], [], [], [], []
        self.order: list[tuple[int, int]] = []  # per entry: refreshed positions, chosen positions
        first = seen = 0
        for (_, start, end, _, _), row, due in zip(plan.entries, rows, dues, strict=True):
            assert start == 0 and end == row.end
            length = end - row.start
            count = int(float(rule.ratio) * length)
            whole = due[1] or count == length
            fixed = (range(first, first + row.start) if due[0] else range(0), range(first + row.start, first + end) if whole else range(0))
            mine = [i for part in fixed for i in part]
            picks = 0 if whole else count
            if rule.ratio > 0 and not whole:  # V of all of them are refreshed, also where no position is computed anew
                choose += range(first + row.start, first + end)
                table.append(list(range(seen, seen + length)))
                self.sizes.append(picks)
                seen += length
            self.order.append((len(mine), picks))
            always += mine
            self.forwarded.append(len(mine) + picks)
            first += end
        device = plan.flat.device
        self.tokens, self.total = first, sum(self.forwarded)
        self.whole = self.total == first
        self.always = torch.tensor(always, dtype=torch.int64, device=device)
        self.choose = torch.tensor(choose, dtype=torch.int64, device=device)
        width = max((len(t) for t in table), default=0)
        self.table = torch.tensor([t + [seen] * (width - len(t)) for t in table], dtype=torch.int64, device=device)
        self.cu = torch.tensor([0, *self.forwarded]).cumsum(0).to(device)
        # which of the first W places of each row of `table` are taken, flattened
        most = max(self.sizes, default=0)
        self.most = most
        self.taken = torch.tensor([i * most + j for i, n in enumerate(self.sizes) for j in range(n)], dtype=torch.int64, device=device)
        self.place = self._interleave(device)

    def _interleave(self, device: torch.device) -> torch.Tensor:
        """int64 [total]: positions of [always, chosen] in the order of the entries."""
        out, a, c = [], 0, len(self.always)
        for fixed, picks in self.order:
            out += [*range(a, a + fixed), *range(c, c + picks)]
            a, c = a + fixed, c + picks
        return torch.tensor(out, dtype=torch.int64, device=device)

    def positions(self, likeness: torch.Tensor | None) -> torch.Tensor:
        """int64 [total]: the tokens that are computed, entry after entry. likeness: float32 [N] of `choose`, the lowest are computed."""
        if likeness is None:
            return self.always
        padded = torch.cat([likeness, likeness.new_full((1,), torch.inf)])
        lowest = torch.argsort(padded[self.table].nan_to_num(-torch.inf, torch.inf, -torch.inf), dim=1, stable=True)[:, : self.most]
        chosen = self.choose[self.table.gather(1, lowest).view(-1)[self.taken]]
        return torch.cat([self.always, chosen])[self.place]


class _DLLM(Cache):
    def __init__(self, rule: DLLM, run: CacheRun):
        super().__init__(rule, run)
        model, canvas = run.backend.model, run.state.canvas
        self.runner = self._layer
        shape = (len(model.backbone.layers), canvas.numel(), model.config.d_model)
        self._attention = torch.zeros(shape, dtype=model.dtype, device=run.device)  # [layer, canvas position]
        self._mlp = torch.zeros_like(self._attention)
        self._products: dict[int, Linear] = {}
        self._plan: Plan | None = None
        self._parts: _Parts | None = None
        self._made: dict[tuple[tuple[bool, bool], ...], _Parts] = {}  # of this plan, by what is due

    def window(self, row: Row) -> tuple[int, int]:
        return 0, row.end

    def begin(self, plan: Plan) -> None:
        rows = [self.run.state.rows[index] for index, *_ in plan.entries]
        if plan is not self._plan:
            self._plan, self._made = plan, {}
        due = tuple((self._due(row, self.rule.prompt_every), self._due(row, self.rule.response_every)) for row in rows)
        if due not in self._made:
            self._made[due] = _Parts(self.rule, plan, rows, due)
        self._parts = self._made[due]

    def _due(self, row: Row, every: int) -> bool:
        return row.nfe == 0 or (row.nfe + self.rule.phase) % every == 0

    def rows_forwarded(self, plan: Plan, rows: list[float]) -> list[float]:
        layers = self._attention.shape[0]
        assert self._parts is not None
        return [(n + (layers - 1) * part) / layers for n, part in zip(rows, self._parts.forwarded, strict=True)]

    def _layer(self, index: int, layer: Layer, x, residual, f: Forward, kv, inv_freq, status) -> torch.Tensor:
        parts, plan, eps = self._parts, self._plan, layer.config.norm_eps
        assert parts is not None and plan is not None
        n, flat = parts.tokens, plan.flat
        attention, mlp = self._attention[index], self._mlp[index]
        y = ops.add_rms_norm(residual, x, layer.attn_norm, eps)
        if index == 0 or parts.whole:
            out, _, _ = layer.attention(y, f, kv, inv_freq, status)
            attention.index_copy_(0, flat, out[:n])
            x = layer.mlp.forward(ops.add_rms_norm(residual, out, layer.mlp_norm, eps), f.row)
            mlp.index_copy_(0, flat, x[:n])
            return x
        likeness = self._likeness(index, layer, y, f, kv) if parts.choose.numel() else None
        at = parts.positions(likeness)
        some, real = _padded(at), at.shape[0]
        pick = flat.index_select(0, at)
        if real:
            row = f.row.index_select(0, some).index_fill(0, torch.arange(real, some.shape[0], device=some.device), -1)
            pos, slot = f.pos.index_select(0, some), f.slot.index_select(0, some)
            q = layer.append(y.index_select(0, some), kv, row, pos, slot, inv_freq, status[0][: some.shape[0]])
            out, _ = layer.attend(q, kv, parts.cu, f.kv_row, f.seg, None, None, status[1])
            attention.index_copy_(0, pick, layer.o(out)[:real])
        residual[:n] += attention.index_select(0, flat)
        if real:
            z = layer.mlp(ops.rms_norm(residual.index_select(0, some), layer.mlp_norm, eps), row)
            mlp.index_copy_(0, pick, z[:real])
        kept = torch.zeros_like(x)
        kept[:n] = mlp.index_select(0, flat)
        return kept

    def _likeness(self, index: int, layer: Layer, y: torch.Tensor, f: Forward, kv) -> torch.Tensor:
        """float32 [N]: cosine of each new V of `choose`, over all K/V heads, with the one that was kept; the new ones take their place."""
        assert self._parts is not None
        c, choose = layer.config, self._parts.choose
        if index not in self._products:
            first = (c.n_heads + c.n_kv_heads) * c.head_dim
            self._products[index] = layer.qkv.part(first, first + c.n_kv_heads * c.head_dim)
        v = self._products[index](y.index_select(0, _padded(choose)))[: choose.shape[0]].view(-1, c.n_kv_heads, c.head_dim)
        row, slot = f.row.index_select(0, choose), f.slot.index_select(0, choose)
        kept = kv[1].transpose(1, 2)
        old, new = kept[row, slot].float().flatten(1), v.float().flatten(1)
        kept[row, slot] = v
        return torch.nn.functional.cosine_similarity(new, old, dim=1)


def _padded(at: torch.Tensor) -> torch.Tensor:
    """Indices with index 0 behind them, up to a multiple of 16: products of such lengths give a row the same bits in any batch."""
    return torch.cat([at, at.new_zeros(pad_rows(at.shape[0]) - at.shape[0])])
