"""`rope_append`: q/k norm, RoPE and the K/V cache write, in one pass over the fresh tokens."""

from __future__ import annotations

import torch

from .. import _library as _library  # noqa: F401  (loads _C)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    row: torch.Tensor,
    pos: torch.Tensor,
    slot: torch.Tensor,
    v_slot: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    inv_freq: torch.Tensor,
    eps: float,
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates q and k at each token's own position and writes K (after RoPE) and V into the cache, in place. Returns rotated q.

    q: [T, Hq, D]; k, v: [T, Hkv, D]; k_cache, v_cache: [R, Hkv, S, D], written; all of one dtype (float32, bfloat16, float16), any
    strides (caches not expanded). row, pos, slot, v_slot: int64 [T]. Per token and head:

    1. If q_weight / k_weight ([D], same dtype) is given: RMSNorm over D as in `rms_norm`, with `eps`.
    2. RoPE, NeoX style (rotate_half), on the first 2F <= D dims, inv_freq float32 [F]: pairs (i, i + F), angle = float(pos) *
       inv_freq[i] in fp32, rotation in fp32, rounded once. Other dims pass.
    3. K to `k_cache[row, :, slot]`, V to `v_cache[row, :, v_slot]` (`slot` where v_slot is None). Slot -1: not written. Where two
       tokens name one slot the later token wins.

    row -1 is padding: q comes back as zeros, nothing is written. A row >= R or < -1 sets `Status.BAD_ROW`, a slot >= S or < -1 or a
    position < 0 `Status.BAD_SLOT` in status[t] (int32 [T], bits are added); such a token writes nothing and its q is zero.

    Returns [T, Hq, D], dense, q's dtype. RuntimeError for wrong dtypes, devices, shapes or eps.
    """
    return torch.ops.unmask.rope_append(
        q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status
    )


@torch.library.register_fake("unmask::rope_append")
def _(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status=None):
    return q.new_empty(q.shape)
