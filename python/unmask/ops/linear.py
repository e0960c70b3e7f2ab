"""Linear layers for few rows: weights packed once by oneDNN, through torch's own (private) ops.

torch's plain linear repacks the weight in every call, which costs more than the product itself at 16-64 rows: packed weights are 1.2-3x
faster there. The packed ops are private to torch, so this one module holds every use of them, behind a capability check; without them
`torch.nn.functional.linear` serves, slower and with the same results up to rounding (tests notice when that happens).

Formats:
- ``packed``: oneDNN's blocked layout in the model's dtype;
- ``packed_fp32``: the same for a bf16 model on a CPU without a bf16 dot product, where the library's bf16 GEMM is 3-5x slower than
  its fp32 one. bf16 values are exact in fp32, so the product is the same sum of the same terms, rounded once to bf16 at the end;
  it takes 4 bytes a weight instead of 2, so it is chosen only where that fits in memory;
- ``plain``: an ordinary tensor and `F.linear` (CUDA, and CPUs or torch builds without oneDNN);
- ``tiled``: an ordinary tensor and `F.linear` on TILE_ROWS rows at a time, always that many: the vendor's GEMMs on CUDA round differently for
  another number of rows, so this is how a row gets the same bits in any batch there (`unmask.load(..., batch_invariant=True)`);
- ``int8``: quantised weights in a byte each, only where asked for (`unmask.load(..., weights="int8")`, `unmask.ops.int8`).

Rows: the packed product gives a row the same bits in any batch, provided that the row count is a multiple of `ROW_MULTIPLE`
(tests/test_linear.py checks that property); callers pad.
"""

from __future__ import annotations

import functools
import os
from typing import Literal

import torch
from torch.nn import functional as F

from ..errors import SettingError
from .decoder_layer import packed_products_available
from .int8 import Digits, Int8Weight, digits

Format = Literal["packed", "packed_fp32", "plain", "tiled", "int8"]
FORMATS: tuple[str, ...] = ("packed", "packed_fp32", "plain")
"""Those with the weights' own values, among which `choose_format` chooses."""
ROW_MULTIPLE = 16
TILE_ROWS = 32  # of a product in format tiled
_ROW_HINT = 32  # rows that the blocked layout is chosen for; measured: no other hint is faster at 16-256 rows


def pad_rows(n: int) -> int:
    """The next multiple of ROW_MULTIPLE."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


@functools.cache
def packing_available(dtype: torch.dtype = torch.float32) -> bool:
    """True if torch's private oneDNN packing ops exist and give the product of a small example in this dtype."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        weight = torch.arange(32 * 16, dtype=torch.float32).view(32, 16).remainder(7).to(dtype)
        x = torch.arange(16 * 16, dtype=torch.float32).view(16, 16).remainder(5).to(dtype)
        return torch.equal(_packed_product(x, _pack(weight)), F.linear(x, weight))
    except (RuntimeError, AttributeError):
        return False


def packed_weights_available() -> bool:
    """True if this torch packs weights and multiplies by them in an op of ours too."""
    return packing_available(torch.float32) and packed_products_available()


def cpu_has_bf16_dot() -> bool:
    """True if this CPU multiplies bf16 natively (AVX-512 BF16), so that the library's bf16 GEMM is the fast one."""
    from .info import best_isa

    return best_isa() == "avx512bf16"


def choose_format(dtype: torch.dtype, device: torch.device, n_params: int) -> Format:
    """The fastest format whose weights fit: on the CPU `UNMASK_GEMM=packed|packed_fp32|plain` forces one."""
    if device.type != "cpu":
        return "plain"
    forced = os.environ.get("UNMASK_GEMM")
    if forced:
        if forced not in FORMATS:
            raise SettingError(f"UNMASK_GEMM must be one of {', '.join(FORMATS)}, got {forced!r}")
        return forced  # type: ignore[return-value]
    if not packing_available(torch.float32):
        return "plain"
    if dtype is torch.float32:
        return "packed"
    if dtype is torch.bfloat16:
        if not cpu_has_bf16_dot() and 4 * n_params < available_memory() // 2:
            return "packed_fp32"
        return "packed" if packing_available(torch.bfloat16) else "plain"
    return "plain"


def available_memory() -> int:
    """Bytes that can be allocated without swapping; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROW_HINT)


def _packed_product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


class Linear(torch.nn.Module):
    """y = x W^T (+ bias) for x [M, K] in the model's dtype (or `prepared`), M a multiple of ROW_MULTIPLE where row bits must not depend on the batch.

    weight: [N, K] in the model's dtype; it is converted to `format` and not kept. bias: [N] or None.
    """

    def __init__(self, weight: torch.Tensor, format: Format, bias: torch.Tensor | None = None):
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"Linear: weight must be [N, K], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.format = format
        self._bias = bias
        if format in ("plain", "tiled"):
            self._weight = weight
        elif format == "packed":
            self._weight = _pack(weight)
        elif format == "packed_fp32":
            self._weight = _pack(weight.float())
        elif format == "int8":
            self._weight = Int8Weight(weight)
        else:
            raise ValueError(f"Linear: format must be one of {', '.join(FORMATS)}, tiled, int8, got {format!r}")

    def forward(self, x: torch.Tensor | Digits) -> torch.Tensor:
        if self.format == "plain":
            return F.linear(x, self._weight, self._bias)
        if self.format == "tiled":
            return self._in_tiles(x)
        if self.format == "packed":
            y = _packed_product(x, self._weight)
        elif self.format == "int8":
            y = self._weight.product(x, self.dtype)
        else:
            y = _packed_product(self.prepared(x), self._weight).to(self.dtype)
        return y if self._bias is None else y + self._bias

    def _in_tiles(self, x: torch.Tensor) -> torch.Tensor:
        m = x.shape[0]
        x = F.pad(x, (0, 0, 0, -m % TILE_ROWS))
        parts = [F.linear(tile.contiguous(), self._weight, self._bias) for tile in x.split(TILE_ROWS)]
        return parts[0][:m] if len(parts) == 1 else torch.cat(parts)[:m]

    @property
    def packed_weight(self) -> torch.Tensor | None:
        """The weight, where an op of ours can multiply by it: format `packed`, and a torch that has the product for C++."""
        return self._weight if self.format == "packed" and packed_products_available() else None

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    def prepared(self, x: torch.Tensor) -> torch.Tensor | Digits:
        """x as the product wants it, for callers that multiply one x by several Linears of this format: converted once."""
        if self.format == "int8":
            return digits(x)
        return x.float() if self.format == "packed_fp32" else x

    def part(self, start: int, stop: int) -> Linear:
        """A Linear of its own for outputs start .. stop - 1: the same bits, without the work of the others. A packed weight is copied."""
        bias = None if self._bias is None else self._bias[start:stop]
        if self.format == "int8":
            made = Linear.__new__(Linear)
            torch.nn.Module.__init__(made)
            q, scale = self._weight.unpacked()
            made.out_features, made.in_features, made.dtype, made.format, made._bias = stop - start, self.in_features, self.dtype, self.format, bias
            made._weight = Int8Weight.of(q[start:stop].contiguous(), scale[start:stop])
            return made
        weight = self._weight if self.format in ("plain", "tiled") else self._weight.to_dense().to(self.dtype)
        return Linear(weight[start:stop], self.format, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.dtype}, {self.format}"
