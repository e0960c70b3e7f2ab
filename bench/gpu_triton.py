"""Attention of the kind that serving engines run for diffusion LMs: a plain block-tiled Triton kernel, as a baseline.

Written for this benchmark after what such prefill ("extend") kernels do, not copied from one: a program takes one tile of 64 or 128 queries of
one head of one row, whatever the number of queries; it walks all keys in tiles of 64, with a running maximum and sum per query in fp32, and
nothing splits the keys. Query heads of one kv head are not packed together: each reads K and V again (from L2 at best).

Without a GPU the same kernel runs in Triton's interpreter (TRITON_INTERPRET=1, which the import here sets where there is no device).
"""

from __future__ import annotations

import os

import torch

TILES = (64, 128)  # queries of a program
KEYS = 64  # keys of a step

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton decorates a kernel
try:
    import triton
    import triton.language as tl
except ImportError as error:  # torch's CPU builds come without it
    triton, absent = None, error


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int) -> torch.Tensor:
    """Full attention of q [B, H, Q, D] on k, v [B, Hkv, N, D], in q's dtype; D a power of two. Elements of a row must be dense. Returns
    [B, H, Q, D] (a view of [B, Q, H, D]). Raises ImportError without triton."""
    if triton is None:
        raise ImportError(f"no triton: {absent}")
    batch, heads, queries, dim = q.shape
    out = torch.empty((batch, queries, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    grid = (triton.cdiv(queries, tile), heads, batch)
    group = heads // k.shape[1]
    options = dict(num_warps=4 if tile == 64 else 8, num_stages=2)
    _attention[grid](q, k, v, out, *strides, queries, k.shape[2], group, dim**-0.5 * 1.44269504, dim, tile, KEYS, **options)
    return out


if triton is not None:

    @triton.jit
    def _attention(
        q, k, v, out,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
        queries, keys, group, scale,  # scale: of the scores, in powers of two
        dim: tl.constexpr, tile: tl.constexpr, step: tl.constexpr,
    ):  # fmt: skip
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        row = tl.program_id(0) * tile + tl.arange(0, tile)
        column, at = tl.arange(0, dim), tl.arange(0, step)
        there = row < queries
        x = tl.load(q + batch * q_batch + head * q_head + row[:, None] * q_row + column[None, :], mask=there[:, None], other=0.0)
        k_base = k + batch * k_batch + (head // group) * k_head
        v_base = v + batch * v_batch + (head // group) * v_head
        largest = tl.full([tile], float("-inf"), tl.float32)
        total = tl.zeros([tile], tl.float32)
        sums = tl.zeros([tile, dim], tl.float32)
        for first in range(0, keys, step):
            key = first + at
            seen = key < keys
            y = tl.load(k_base + key[None, :] * k_row + column[:, None], mask=seen[None, :], other=0.0)
            score = tl.where(seen[None, :], tl.dot(x, y) * scale, float("-inf"))
            top = tl.maximum(largest, tl.max(score, 1))
            kept = tl.exp2(largest - top)
            p = tl.exp2(score - top[:, None])
            z = tl.load(v_base + key[:, None] * v_row + column[None, :], mask=seen[:, None], other=0.0)
            total = total * kept + tl.sum(p, 1)
            sums = tl.dot(p.to(z.dtype), z, sums * kept[:, None])
            largest = top
        to = out + batch * o_batch + head * o_head + row[:, None] * o_row + column[None, :]
        tl.store(to, (sums / total[:, None]).to(x.dtype), mask=there[:, None])
