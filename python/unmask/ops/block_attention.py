"""`block_attention`: packed query tokens against segments of the K/V cache, without copying or expanding it."""

from __future__ import annotations

import torch

from .. import _library as _library  # noqa: F401  (loads _C)


def block_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_q: torch.Tensor,
    kv_row: torch.Tensor,
    seg: torch.Tensor,
    q_end: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    status: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q . K) V per query token and head, over the keys that the token sees.

    q: [T, Hq, D]; k_cache, v_cache: [R, Hkv, S, D]; all of one dtype (float32, bfloat16, float16), any strides, D a multiple of 8 up to
    1024, Hq a multiple of Hkv (query head h reads kv head h // (Hq / Hkv)). cu_q: int64 [B + 1], kv_row: int64 [B], seg: int64
    [B, G, 2], q_end: int64 [T] or None, mask: bool [B or 1, Qmax, W] or None.

    Entry b owns the query tokens cu_q[b] .. cu_q[b + 1] - 1. Its n_b keys are the slots of cache row kv_row[b] in its segments (start,
    length), joined in order. Token t sees the first min(q_end[t], n_b) of them (all if q_end is None) and, of the last W, those whose
    column of mask[b, t - cu_q[b]] is True; if n_b < W the first W - n_b columns fall off. No causal order is implied.

    Returns out [T, Hq, D] (dense, q's dtype) and lse float32 [T, Hq], the natural logsumexp of the scaled scores. A token that sees no
    key, one outside every entry, and one of an entry with kv_row -1 (padding) gets out 0, lse -inf. NaN in K or V reaches only tokens
    that see it. On a CPU the bits of a token depend on its own entry only: not on the batch, padding or thread count. On CUDA they do so
    with batch_invariant=True; by default long prefixes of a small batch are split over more blocks, which changes the last bits.

    status: int32 [B] or None, bits are added: `Status.BAD_ROW` for kv_row >= R or < -1, `Status.BAD_SEGMENT` for a segment outside
    [0, S], for cu_q offsets outside [0, T] or below an earlier one, or for more than Qmax tokens with a mask. Such an entry reads
    nothing; its tokens get out 0, lse -inf. RuntimeError for wrong dtypes, devices, shapes, D, head counts or a scale that is not finite.
    """
    return torch.ops.unmask.block_attention(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status, batch_invariant)


@torch.library.register_fake("unmask::block_attention")
def _(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status=None, batch_invariant=False):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
