"""Linear layers of many experts: rows that are grouped by expert, each group times its own weight.

Two forms, chosen by `grouped_available`:
- torch's grouped product (`torch._grouped_mm`, private to torch, so this module holds every use of it): one stacked weight [E, N, K], one
  call, and the group sizes stay on the device; it exists for bf16 on CUDA from sm_80 on;
- elsewhere one `Linear` per expert (packed as `unmask.ops.linear` says), for experts that have rows only. The sizes are read on the host,
  which on CUDA waits for the device once per layer.

Rows of a group are padded to a multiple of ROW_MULTIPLE in the second form, so that a row has the same bits in any batch and any group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from .linear import ROW_MULTIPLE, Format, Linear
from .moe_route import Routes

RUN_ROWS = 1024


def grouped_available(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """True if torch's grouped product serves weights of this kind; `sizes`: rows' lengths, which must be multiples of 16 bytes."""
    if device.type != "cuda" or dtype is not torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and all(size % 8 == 0 for size in sizes)


class Experts(torch.nn.Module):
    """SwiGLU experts: y = W_down (silu(W_gate x) * W_up x), each row with its own expert's weights.

    n: experts. width, inner: K of a row, and of what stands between the products. format: of the weights, see unmask.ops.linear.
    Weights arrive one expert at a time (`put`) and are converted at once, so that no second copy of all of them exists.
    """

    def __init__(self, n: int, width: int, inner: int, dtype: torch.dtype, device: torch.device, format: Format, grouped: bool | None = None):
        super().__init__()
        self.n, self.width, self.inner, self.format = n, width, inner, format
        available = format != "tiled" and grouped_available(dtype, device, width, inner)
        self.grouped = available if grouped is None else grouped
        if self.grouped:
            self._gate_up = torch.empty(n, 2 * inner, width, dtype=dtype, device=device)
            self._down = torch.empty(n, width, inner, dtype=dtype, device=device)
        self.multiple = 1 if self.grouped else ROW_MULTIPLE  # groups of rows come padded to it
        self.gate_up: dict[int, Linear] = {}
        self.down: dict[int, Linear] = {}

    def put(self, expert: int, product: str, parts: Sequence[torch.Tensor]) -> None:
        """Sets one weight of an expert. product: "gate_up" (parts gate, up: [inner, width] each) or "down" ([width, inner])."""
        if self.grouped:
            torch.cat(list(parts), out=(self._gate_up if product == "gate_up" else self._down)[expert])
            return
        weight = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        (self.gate_up if product == "gate_up" else self.down)[expert] = Linear(weight, self.format)

    def packed_weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        """gate_up and down of every expert as `moe_experts` takes them; None where they are of another format."""
        lists = [[part[e].packed_weight for e in range(self.n)] for part in (self.gate_up, self.down)] if not self.grouped else []
        if not lists or any(weight is None for weights in lists for weight in weights):
            return None
        return lists[0], lists[1]

    def forward(self, x: torch.Tensor, routes: Routes, middle: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x: [T, width]. routes: of its rows, with groups padded to `multiple`. middle: maps gate|up [M, 2 inner] to [M, inner].

        Returns y [M, width]: y[routes.place[t, j]] is row t through its j-th expert; rows behind the last group may be missing or undefined.
        """
        if self.grouped:
            ends = routes.offsets[1:]
            h = middle(torch._grouped_mm(x.index_select(0, routes.source), self._gate_up.transpose(1, 2), offs=ends))
            return torch._grouped_mm(h, self._down.transpose(1, 2), offs=ends)
        offsets = routes.offsets.tolist()
        return self._loop(x, routes.source, [(e, b - a) for e, (a, b) in enumerate(itertools.pairwise(offsets)) if b > a], middle)

    def _loop(self, x: torch.Tensor, source: torch.Tensor, groups: list[tuple[int, int]], middle) -> torch.Tensor:
        """Experts in order, those that have rows; as many at a time as RUN_ROWS rows hold, so that small calls are few and copies short.

        groups: (expert, rows).
        """
        out, start = [x.new_empty(0, self.width)], 0
        while groups:
            n, total = 1, groups[0][1]
            while n < len(groups) and total < RUN_ROWS:
                total += groups[n][1]
                n += 1
            run, groups = groups[:n], groups[n:]
            sizes = [rows for _, rows in run]
            parts = x.index_select(0, source[start : start + total]).split(sizes)  # one call: a slice each costs as much as a small product
            h = middle(torch.cat([self.gate_up[e](part) for (e, _), part in zip(run, parts, strict=True)])).split(sizes)
            out += [self.down[e](part) for (e, _), part in zip(run, h, strict=True)]
            start += total
        return torch.cat(out)

    def extra_repr(self) -> str:
        return f"{self.n} experts, {self.width} -> {self.inner} -> {self.width}, {'grouped product' if self.grouped else self.format}"
