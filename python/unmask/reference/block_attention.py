"""Attention of packed query tokens over segments of a K/V cache, entry by entry and token by token."""

from __future__ import annotations

import math

import torch

from ..ops.info import Status
from . import _check

_OP = "block_attention"
MAX_DIM = 1024


def _check_arguments(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status) -> None:
    _check.floating(_OP, "q", q)
    _check.dtype(_OP, q.dtype, k_cache=k_cache, v_cache=v_cache)
    _check.dtype(_OP, torch.int64, cu_q=cu_q, kv_row=kv_row, seg=seg, q_end=q_end)
    _check.dtype(_OP, torch.bool, mask=mask)
    _check.dtype(_OP, torch.int32, status=status)
    _check.shape(_OP, "q", q, "[T, Hq, D]", (-1, -1, -1))
    tokens, heads, dim = q.shape
    _check.shape(_OP, "k_cache", k_cache, "[R, Hkv, S, D]", (-1, -1, -1, dim))
    rows, kv_heads, slots, _ = k_cache.shape
    _check.shape(_OP, "v_cache", v_cache, "[R, Hkv, S, D]", (rows, kv_heads, slots, dim))
    _check.shape(_OP, "kv_row", kv_row, "[B]", (-1,))
    batch = kv_row.shape[0]
    _check.shape(_OP, "cu_q", cu_q, "[B + 1]", (batch + 1,))
    _check.shape(_OP, "seg", seg, "[B, G, 2]", (batch, -1, 2))
    _check.shape(_OP, "q_end", q_end, "[T]", (tokens,))
    if mask is not None:
        shared = mask.ndim == 3 and mask.shape[0] == 1
        _check.shape(_OP, "mask", mask, "[B or 1, Qmax, W]", (1 if shared else batch, -1, -1))
    _check.shape(_OP, "status", status, "[B]", (batch,))
    if not (8 <= dim <= MAX_DIM and dim % 8 == 0):
        _check.fail(_OP, "D", f"a multiple of 8 in [8, {MAX_DIM}]", dim)
    if kv_heads < 1 or heads % kv_heads:
        _check.fail(_OP, "Hq", f"a multiple of Hkv = {kv_heads}", heads)
    if not math.isfinite(scale):
        _check.fail(_OP, "scale", "finite", f"{scale:f}")
    _check.writable(_OP, "status", status)


def block_attention(
    q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status=None, batch_invariant=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `unmask.ops.block_attention`."""
    _check_arguments(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status)
    out, lse = attend(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status)
    return out.to(q.dtype), lse


def attend(
    q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status=None, wide=torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on checked arguments, computed and returned in the dtype `wide`."""
    tokens, heads, _ = q.shape
    rows, kv_heads, slots, _ = k_cache.shape
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full((tokens, heads), -math.inf, dtype=wide, device=q.device)
    reached = 0  # the highest offset so far
    for b in range(kv_row.shape[0]):
        begin, end, row = int(cu_q[b]), int(cu_q[b + 1]), int(kv_row[b])
        segments = [(int(start), int(length)) for start, length in seg[b].tolist()]
        bits = Status.OK
        if not -1 <= row < rows:
            bits |= Status.BAD_ROW
        bad_offsets = begin < reached or end < begin or end > tokens
        if bad_offsets or (mask is not None and end - begin > mask.shape[1]):
            bits |= Status.BAD_SEGMENT
        if any(start < 0 or length < 0 or start + length > slots for start, length in segments):
            bits |= Status.BAD_SEGMENT
        reached = max(reached, begin, end)
        if bits and status is not None:
            status[b] |= int(bits)
        if bits or row < 0:
            continue
        index = [slot for start, length in segments for slot in range(start, start + length)]
        key, value = (c[row][:, index].to(wide).repeat_interleave(heads // kv_heads, dim=0) for c in (k_cache, v_cache))
        for t in range(begin, end):
            seen = _visible(len(index), t, begin, b, q_end, mask)
            score = scale * torch.einsum("hd,hnd->hn", q[t].to(wide), key[:, seen])
            lse[t] = torch.logsumexp(score, dim=1)
            dead = torch.isneginf(score).all(dim=1, keepdim=True)  # nothing to see, or only scores of -inf
            weight = torch.softmax(score, dim=1).masked_fill(dead, 0.0)
            result = torch.einsum("hn,hnd->hd", weight, value[:, seen])
            out[t] = result.masked_fill(dead, 0.0)
    return out, lse


def _visible(n: int, t: int, begin: int, b: int, q_end: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
    """Indices of the keys, of n, that token t of entry b sees."""
    seen = torch.ones(n, dtype=torch.bool)
    if q_end is not None:
        seen[max(0, int(q_end[t])) :] = False
    if mask is not None:
        width = min(n, mask.shape[2])
        if width:
            seen[n - width :] &= mask[b if mask.shape[0] > 1 else 0, t - begin, mask.shape[2] - width :]
    return torch.nonzero(seen)[:, 0]
