"""Philox4x32-10 in int64 arithmetic, and the uniform op on top of it."""

from __future__ import annotations

import torch

_M32 = 0xFFFFFFFF


def philox(seed: torch.Tensor, c0, c1, c2, c3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words (as int64) for each key `seed` (int64) and counter (c0..c3), broadcast together."""
    seed, c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.int64) for x in (seed, c0, c1, c2, c3)))
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    c0, c1, c2, c3 = (c & _M32 for c in (c0, c1, c2, c3))
    for _ in range(10):
        h0, l0 = _mul_hi_lo(0xD2511F53, c0)
        h1, l1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1, c2, c3


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the 64-bit product of two 32-bit numbers, without overflowing int64: b is split in 16-bit halves."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    mid = high + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """See `unmask.ops.uniform`."""
    word, _, _, _ = philox(seed, 0, pos, step, 1)
    return ((word >> 9).float() + 0.5) * 2.0**-23
