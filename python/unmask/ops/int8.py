"""Linear weights in int8: half the memory of bf16, the activations kept, through torch's own quantised product.

A weight [N, K] is kept as int8 with one scale a row (symmetric, absmax / 127). What torch 2.13 offers on the CPU for such a weight with
plain activations, `_weight_int8pack_mm`, takes 2-3x the time of the packed bf16 product at 16-64 rows and 30x that of the fp32 one; its
product of two int8 matrices (FBGEMM, weights packed once) takes half of bf16's. So a row of activations is written as two int8 digits, x = s (h +
l / 254) with h, l in -127..127 and s the row's absmax / 127, and both go through that product: the error of x is at most 1/64,500 of the
row's largest, below the rounding of bf16. What is lost is lost in the weights alone, and from width 2048 on it takes 1.03-1.25x of bf16's time
and 0.5-0.6x of fp32's at 16-64 rows; narrow products, where the digits themselves count, up to 1.9x (bench/bench_int8.py).

The sums are integers, exact, so a row has the same bits in any batch and at any thread count. Everything private to torch is here, behind
a check that the product is exact at its extremes (it saturates on CPUs without VNNI).
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import NamedTuple

import torch

_DIGIT = 127  # largest digit
_FINE = 2 * _DIGIT  # the second digit counts 1/254 of the first: a rounding error of 1/2 is its largest value
_ENGINE = "fbgemm"
_MOST_K = (1 << 31) // (255 * _DIGIT)  # longest row whose sum of products fits into 32 bits
ROWS = 256  # that are multiplied at once: their digits take 8 bytes a value
_LARGE = 1 << 20  # values of a weight whose temporaries are worth returning to the system
_QUANTISED_AT_ONCE = 1 << 22  # values of a weight that are in fp32 at once


class Digits(NamedTuple):
    """Rows of activations as the product wants them. digits: float32 [2M, K], whole numbers: first digits, then second ones. scale: float32 [M, 1]."""

    digits: torch.Tensor
    scale: torch.Tensor


def digits(x: torch.Tensor) -> Digits:
    """x: [M, K], float32 or bfloat16. A row with NaN or an infinity has no finite scale, and gives nothing finite."""
    m = x.shape[0]
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).mul_(1.0 / _DIGIT).clamp_min_(1e-37)  # vector_norm(inf) takes ten times as long
    y = torch.empty((2 * m, x.shape[1]))
    high, low = y[:m], y[m:]
    torch.div(x, scale, out=low)
    torch.round(low, out=high)
    low.sub_(high).mul_(_FINE)
    return Digits(y, scale)


class Int8Weight:
    """weight: [N, K], float32 or bfloat16, on the CPU; it is quantised and not kept. Raises ValueError where int8 is not available."""

    def __init__(self, weight: torch.Tensor):
        scale = torch.empty(weight.shape[0])
        q = torch.empty(weight.shape, dtype=torch.int8)
        step = max(1, _QUANTISED_AT_ONCE // max(1, weight.shape[1]))
        for begin in range(0, weight.shape[0], step):
            rows = slice(begin, begin + step)
            some = weight[rows].float()
            s = some.abs().amax(1).mul_(1.0 / _DIGIT).clamp_min_(1e-37)
            q[rows] = some.div(s[:, None]).round_().clamp_(-_DIGIT, _DIGIT)  # not in place: .float() may be the weight itself
            scale[rows] = s
        self._set(q, scale)

    @classmethod
    def of(cls, q: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
        """From the quantised weight. q: int8 [N, K]. scale: float32 [N]."""
        made = cls.__new__(cls)
        made._set(q, scale)
        return made

    def _set(self, q: torch.Tensor, scale: torch.Tensor) -> None:
        if not int8_available():
            raise ValueError("int8 weights need FBGEMM and a CPU with AVX-512 VNNI (torch's int8 product saturates on others)")
        if q.shape[1] > _MOST_K:
            raise ValueError(f"int8 weights: rows must be at most {_MOST_K} long, so that their sums fit into 32 bits, got {q.shape[1]}")
        self.shape = q.shape
        self._packed = _pack(q, scale)
        if q.numel() >= _LARGE:
            _return_freed_memory()

    def product(self, x: torch.Tensor | Digits, dtype: torch.dtype) -> torch.Tensor:
        """x W^T as dtype [M, N]. x: [M, K], or `digits` of it."""
        if isinstance(x, Digits):
            return _product(x, self._packed, dtype)
        if x.shape[0] <= ROWS:
            return _product(digits(x), self._packed, dtype)
        out = torch.empty((x.shape[0], self.shape[0]), dtype=dtype)
        for begin in range(0, x.shape[0], ROWS):
            out[begin : begin + ROWS] = _product(digits(x[begin : begin + ROWS]), self._packed, dtype)
        return out

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 [N, K], float32 [N]): the weight is their product, row by row."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch.ops.quantized.linear_unpack(self._packed)[0]
            return weight.int_repr(), weight.q_per_channel_scales().float()


def _return_freed_memory() -> None:
    """FBGEMM's weights lie in the C heap, so the temporaries of each leave holes between them: half as much again over a model's weights,
    unless the C library gives their pages back. Without glibc nothing is done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass


def _pack(q: torch.Tensor, scale: torch.Tensor) -> torch.ScriptObject:
    """torch warns that its quantised tensors will go; `int8_available` notices when they have."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.backends.quantized.engine = _ENGINE
            weight = torch._make_per_channel_quantized_tensor(q, scale.double(), torch.zeros(q.shape[0], dtype=torch.int64), 0)
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before


def _whole_product(x: torch.Tensor, packed: torch.ScriptObject) -> torch.Tensor:
    """x of whole numbers in -127..127, float32 [M, K] -> float32 [M, N]: integer sums times the rows' scales. x is stored as x + 128 in 8 bits."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 128, packed)


def _product(x: Digits, packed: torch.ScriptObject, dtype: torch.dtype) -> torch.Tensor:
    m = x.scale.shape[0]
    both = _whole_product(x.digits, packed)
    return both[:m].add_(both[m:], alpha=1.0 / _FINE).mul_(x.scale).to(dtype)


@functools.cache
def int8_available() -> bool:
    """True if this torch and this CPU multiply int8 matrices exactly: also where every product is the largest there is."""
    if _ENGINE not in torch.backends.quantized.supported_engines:
        return False
    k = 512
    q = torch.full((32, k), _DIGIT, dtype=torch.int8)
    q[1::2] = -_DIGIT
    q[2] = torch.arange(k).remainder(255).sub(_DIGIT).to(torch.int8)
    x = torch.full((8, k), float(_DIGIT))
    x[1::2] = -_DIGIT
    x[2] = torch.arange(k).mul(7).remainder(255).sub(_DIGIT)
    try:
        return torch.equal(_whole_product(x, _pack(q, torch.ones(32))), x @ q.float().T)
    except (RuntimeError, AttributeError):
        return False
