"""What caches that look inside a forward share: a layer runner that keeps queries, and attention weights recovered from them.

The attention op gives the logsumexp of every query's scores, so the weight of a key is exp(scale q . k - lse): recomputed here in fp32, in
pieces of bounded size, and only for what is asked: sums over queries. Nothing of size [queries, heads, keys] is ever kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ... import ops
from ...models.backbone import Forward, Layer

PIECE = 1 << 22
"""Attention weights held at a time."""


@dataclasses.dataclass
class Queries:
    """Rotated Q [T, Hq, D] and logsumexps float32 [T, Hq] of one layer of the last forward."""

    q: torch.Tensor
    lse: torch.Tensor


class QueryKeeper:
    """Runs layers as `Layer.forward` does and keeps their queries: as much memory as K of the forwarded positions."""

    def __init__(self) -> None:
        self.layers: dict[int, Queries] = {}

    def __call__(self, index: int, layer: Layer, x, residual, f: Forward, kv, inv_freq, status) -> torch.Tensor:
        eps = layer.config.norm_eps
        branch, q, lse = layer.attention(ops.add_rms_norm(residual, x, layer.attn_norm, eps), f, kv, inv_freq, status)
        self.layers[index] = Queries(q, lse)
        return layer.mlp.forward(ops.add_rms_norm(residual, branch, layer.mlp_norm, eps), f.row)


def weights(own: Queries, span: slice, k: torch.Tensor, scale: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Attention weights, fp32 [Hkv, group, n, keys], of the queries in `span` in pieces of at most PIECE numbers (at least one query), with
    each piece's place in the span. k: [Hkv, keys, D], all that these queries saw."""
    q, lse = own.q[span], own.lse[span]
    n, heads, dim = q.shape
    shared, keys = k.shape[0], k.shape[1]
    k = k.to(torch.float32, copy=True).transpose(1, 2)  # a copy: its bits must not depend on where the row lies in the cache
    step = max(1, PIECE // max(1, heads * keys))
    for begin in range(0, n, step):
        piece = slice(begin, min(begin + step, n))
        m = piece.stop - begin
        # query head h reads K/V head h // group
        some = q[piece].to(torch.float32).view(m, shared, heads // shared, dim).permute(1, 2, 0, 3).reshape(shared, -1, dim)
        score = torch.bmm(some, k).view(shared, heads // shared, m, keys)
        shift = lse[piece].view(m, shared, heads // shared, 1).permute(1, 2, 0, 3)
        yield piece, torch.exp(score.mul_(scale).sub_(shift))


def received(own: Queries, span: slice, k: torch.Tensor, scale: float, share: torch.Tensor) -> torch.Tensor:
    """float32 [keys]: attention that each key receives from the queries in `span`, mean over heads, query i weighted by share[i]."""
    total = torch.zeros(k.shape[1], dtype=torch.float32, device=k.device)
    for piece, weight in weights(own, span, k, scale):
        total += (weight.mean((0, 1)) * share[piece, None]).sum(0)
    return total


def toward(own: Queries, at: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """float32 [n, Hq]: attention weights of the queries `at` (int64 [n]) for one key k [Hkv, D]."""
    q = own.q.index_select(0, at).to(torch.float32)
    k = k.to(torch.float32).repeat_interleave(q.shape[1] // k.shape[0], 0)
    return torch.exp((q * k).sum(2) * scale - own.lse.index_select(0, at))
