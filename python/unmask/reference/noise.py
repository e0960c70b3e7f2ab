"""The sampling noise of csrc/common/noise.h in PyTorch, bit for bit: the same polynomials in the same order of fused operations.

PyTorch has no fp32 fma. `fma` forms the product in float64 (exact: 24 + 24 bits), adds in float64 rounding to odd, and rounds once to
float32; a float64 has more than two bits to spare over float32, so the result is the correctly rounded a * b + c.
"""

from __future__ import annotations

import torch

from .uniform import philox

LN2_HI, LN2_LO = float.fromhex("0x1.62e400p-1"), float.fromhex("0x1.7f7d1cp-20")
LOG_P = [
    float.fromhex(c)
    for c in (
        "-0x1.38b580p-4", "0x1.055b6ap-3", "-0x1.0d8542p-3", "0x1.22da1cp-3",
        "-0x1.547244p-3", "0x1.99a008p-3", "-0x1.000226p-2", "0x1.555554p-2",
    )
]  # fmt: skip
SQRT_HALF_BITS = 0x3F3504F3
V_SPLIT = float.fromhex("0x1.2bec34p-2")  # 1 - sqrt(1/2)


def fma(a, b, c) -> torch.Tensor:
    """float32(a * b + c) with one rounding; arguments are float32 tensors or Python floats that float32 holds."""
    a, b, c = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in (a, b, c)))
    product = a * b
    total = product + c
    back = total - product  # two-sum: total + error is the exact sum
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    toward = torch.where((error > 0) == (total > 0), 1, -1)  # away from zero or toward it
    inexact = error.isfinite() & (error != 0) & (bits & 1 == 0)
    return torch.where(inexact, bits + toward, bits).view(torch.float64).float()


def _log_reduced(f: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """k ln2 + log1p(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]."""
    p = torch.full_like(f, LOG_P[0])
    for coefficient in LOG_P[1:]:
        p = fma(p, f, coefficient)
    return fma(k, LN2_HI, fma(f * f, fma(p, f, -0.5), fma(k, LN2_LO, f)))


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); returns f and k, both exact in float32."""
    i = x.view(torch.int32) - SQRT_HALF_BITS
    m = ((i & 0x007FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    return m - 1.0, (i >> 23).float()


def log_positive(x: torch.Tensor) -> torch.Tensor:
    """ln x of normal positive finite float32."""
    return _log_reduced(*_split(x))


def exponential(words: torch.Tensor) -> torch.Tensor:
    """Exp(1) variate -log(1 - v), v = (w + 1/2) / 2^32, of 32-bit words in int64; float32."""
    low = words < 2**31
    h = (torch.where(low, words, 2**32 - 1 - words).float() + 0.5) * 2.0**-32  # v, or 1 - v
    f, k = _split(h)
    half = h > V_SPLIT
    f = torch.where(low, torch.where(half, 1.0 - 2.0 * h, -h), f)
    k = torch.where(low, torch.where(half, -1.0, 0.0), k)
    return -_log_reduced(f, k)


def gumbel(seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 [T', V] standard Gumbel noise of token ids [V] for entries with int64 seed, step, pos [T']."""
    words = torch.stack(philox(seed[:, None], ids[None, :] // 4, pos[:, None], step[:, None], 0))
    picked = words.gather(0, (ids % 4).expand(words.shape[1:])[None])[0]
    return -log_positive(exponential(picked))
