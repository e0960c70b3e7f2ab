"""RoPE at each token's own position and the K/V cache write, token by token."""

from __future__ import annotations

import math

import torch

from ..ops.info import Status
from . import _check
from .elementwise import normalise

_OP = "rope_append"


def cos_sin(pos: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [T, F] cos and sin of the fp32 angle float(pos) * inv_freq; the angle's own cos and sin are exact to the last bit or so."""
    angle = (pos.float()[:, None] * inv_freq[None, :]).double()
    return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, H, D] rotated on its first 2F dims: pairs (i, i + F), in fp32, rounded once to x's dtype."""
    freqs = cos.shape[-1]
    first, second = x[..., :freqs].float(), x[..., freqs : 2 * freqs].float()
    c, s = cos[:, None, :], sin[:, None, :]
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., 2 * freqs :]), dim=-1)


def _check_arguments(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status) -> None:
    _check.floating(_OP, "q", q)
    _check.dtype(_OP, q.dtype, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    _check.dtype(_OP, torch.int64, row=row, pos=pos, slot=slot, v_slot=v_slot)
    _check.dtype(_OP, q.dtype, q_weight=q_weight, k_weight=k_weight)
    _check.dtype(_OP, torch.float32, inv_freq=inv_freq)
    _check.dtype(_OP, torch.int32, status=status)
    _check.shape(_OP, "q", q, "[T, Hq, D]", (-1, -1, -1))
    tokens, _, dim = q.shape
    _check.shape(_OP, "k", k, "[T, Hkv, D]", (tokens, -1, dim))
    heads = k.shape[1]
    _check.shape(_OP, "v", v, "[T, Hkv, D]", (tokens, heads, dim))
    _check.shape(_OP, "k_cache", k_cache, "[R, Hkv, S, D]", (-1, heads, -1, dim))
    _check.shape(_OP, "v_cache", v_cache, "[R, Hkv, S, D]", (k_cache.shape[0], heads, k_cache.shape[2], dim))
    for name, t in (("row", row), ("pos", pos), ("slot", slot), ("v_slot", v_slot)):
        _check.shape(_OP, name, t, "[T]", (tokens,))
    for name, t in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check.shape(_OP, name, t, "[D]", (dim,))
    _check.shape(_OP, "inv_freq", inv_freq, "[F]", (-1,))
    _check.shape(_OP, "status", status, "[T]", (tokens,))
    if 2 * inv_freq.shape[0] > dim:
        _check.fail(_OP, "inv_freq", f"[F] with 2F <= D = {dim}", list(inv_freq.shape))
    if not (math.isfinite(eps) and eps >= 0):
        _check.fail(_OP, "eps", "finite and >= 0", f"{eps:f}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("status", status)):
        _check.writable(_OP, name, t)


def rope_append(
    q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status=None
) -> torch.Tensor:
    """See `unmask.ops.rope_append`."""
    _check_arguments(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status)
    rows, _, slots, _ = k_cache.shape
    v_slot = slot if v_slot is None else v_slot
    cos, sin = cos_sin(pos, inv_freq)
    q_out = rotate(q if q_weight is None else normalise(q, q_weight, eps), cos, sin)
    k_out = rotate(k if k_weight is None else normalise(k, k_weight, eps), cos, sin)
    for t in range(q.shape[0]):
        r, p, ks, vs = (int(x[t]) for x in (row, pos, slot, v_slot))
        bits = 0
        if not -1 <= r < rows:
            bits = Status.BAD_ROW
        elif r >= 0 and not (-1 <= ks < slots and -1 <= vs < slots and p >= 0):
            bits = Status.BAD_SLOT
        if r == -1 or bits:
            q_out[t] = 0
            if bits and status is not None:
                status[t] |= int(bits)
            continue
        if ks >= 0:
            k_cache[r, :, ks] = k_out[t]
        if vs >= 0:
            v_cache[r, :, vs] = v[t]
    return q_out
