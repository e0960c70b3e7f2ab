"""`decoder_layer`: a whole Transformer layer in one op, around products by oneDNN's packed weights (CPU)."""

from __future__ import annotations

import functools

import torch

from .. import _library as _library  # noqa: F401  (loads _C)


def decoder_layer(
    x: torch.Tensor,
    residual: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qkv: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    o: torch.Tensor,
    gate_up: torch.Tensor | None,
    down: torch.Tensor | None,
    attn_norm: torch.Tensor,
    mlp_norm: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    inv_freq: torch.Tensor,
    row: torch.Tensor,
    pos: torch.Tensor,
    slot: torch.Tensor,
    cu_q: torch.Tensor,
    kv_row: torch.Tensor,
    seg: torch.Tensor,
    q_end: torch.Tensor | None,
    mask: torch.Tensor | None,
    eps: float,
    scale: float,
    token_status: torch.Tensor | None = None,
    entry_status: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's branch [T, d], to be added to `residual` by the next layer's norm; with the bits of the ops and products it stands for:

    1. y = add_rms_norm(residual, x, attn_norm, eps): residual += x, in place.
    2. q, k, v = y qkv^T (rounded, + qkv_bias, rounded), heads side by side; rope_append(q, k, v, caches, row, pos, slot, q_norm, k_norm).
    3. a = block_attention(q, caches, cu_q, kv_row, seg, q_end, mask, scale).
    4. y = add_rms_norm(residual, a o^T, mlp_norm, eps).
    5. silu_mul(y gate_up^T) down^T; without gate_up and down y itself, for a mixture of experts.

    x, residual: [T, d] float32 or bfloat16 on the CPU, dense rows. qkv [(Hq + 2 Hkv) D, d], o [d, Hq D], gate_up [2 F, d], down [d, F]: of
    that dtype, packed by `torch.ops.mkldnn._reorder_linear_weight`. attn_norm, mlp_norm [d], q_norm, k_norm [D] or None. The caches, row,
    pos, slot, inv_freq and token_status (int32 [T]) as in `rope_append`; cu_q, kv_row, seg, q_end, mask and entry_status (int32 [B]) as in
    `block_attention`; what those ops report in their status and what they leave unread holds here.

    Rows behind the last token whose `row` is not -1 are padding: they come back as zeros, and their residual stays. RuntimeError for wrong
    dtypes, layouts, shapes, eps or scale, before anything is written. T should be a multiple of 16: see unmask.ops.linear.
    """
    return torch.ops.unmask.decoder_layer(
        x, residual, k_cache, v_cache, qkv, qkv_bias, o, gate_up, down, attn_norm, mlp_norm, q_norm, k_norm, inv_freq, row, pos, slot,
        cu_q, kv_row, seg, q_end, mask, eps, scale, token_status, entry_status,
    )  # fmt: skip


@torch.library.register_fake("unmask::decoder_layer")
def _(x, residual, *others):
    return x.new_empty(x.shape)


@functools.cache
def packed_products_available() -> bool:
    """True if this torch lets a C++ op multiply by its packed weights (it was built with oneDNN)."""
    return torch.ops.unmask.info(-2) == 1
