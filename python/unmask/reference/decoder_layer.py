"""One Transformer layer over packed query tokens: the parts' definitions, one after the other."""

from __future__ import annotations

import torch

from .block_attention import block_attention
from .elementwise import add_rms_norm, silu_mul
from .rope_append import rope_append


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.float().T).to(x.dtype)


def decoder_layer(
    x, residual, k_cache, v_cache, qkv, qkv_bias, o, gate_up, down, attn_norm, mlp_norm, q_norm, k_norm, inv_freq, row, pos, slot, cu_q, kv_row,
    seg, q_end, mask, eps, scale, token_status=None, entry_status=None,
) -> torch.Tensor:  # fmt: skip
    """As `ops.decoder_layer`, except that the products' weights are ordinary tensors [N, K]; products are fp32, rounded once."""
    live = torch.nonzero(row != -1)
    padding = slice(int(live.max()) + 1 if live.numel() else 0, None)  # behind the last token that is none
    kept = residual[padding].clone()
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    heads = o.shape[1] // dim
    y = add_rms_norm(residual, x, attn_norm, eps)
    y = _product(y, qkv)
    if qkv_bias is not None:
        y = y + qkv_bias
    q, k, v = y.view(-1, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
    q = rope_append(q, k, v, k_cache, v_cache, row, pos, slot, None, q_norm, k_norm, inv_freq, eps, token_status)
    a, _ = block_attention(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, entry_status)
    y = add_rms_norm(residual, _product(a.flatten(1), o), mlp_norm, eps)
    if gate_up is not None:
        y = _product(silu_mul(_product(y, gate_up)), down)
    residual[padding] = kept
    y[padding] = 0
    return y
