"""Linear layers of many experts: rows that are grouped by expert, each group times its own weight.

Two forms, chosen by `grouped_available`:
- torch's grouped product (`torch._grouped_mm`, private to torch, so this module holds every use of it): one stacked weight [E, N, K], one
  call, and the group sizes stay on the device; it exists for bf16 on CUDA from sm_80 on;
- elsewhere one `Linear` per expert (packed as `unmask.ops.linear` says), for experts that have rows only. The sizes are read on the host,
  which on CUDA waits for the device once per layer.

Rows of a group are padded to a multiple of ROW_MULTIPLE on the CPU, so that a row has the same bits in any batch and any group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .linear import ROW_MULTIPLE, Format, Linear

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
        self.grouped = grouped_available(dtype, device, width, inner) if grouped is None else grouped
        if self.grouped:
            self._gate_up = torch.empty(n, 2 * inner, width, dtype=dtype, device=device)
            self._down = torch.empty(n, width, inner, dtype=dtype, device=device)
        self.gate_up: dict[int, Linear] = {}
        self.down: dict[int, Linear] = {}

    def put(self, expert: int, product: str, parts: Sequence[torch.Tensor]) -> None:
        """Sets one weight of an expert. product: "gate_up" (parts gate, up: [inner, width] each) or "down" ([width, inner])."""
        if self.grouped:
            torch.cat(list(parts), out=(self._gate_up if product == "gate_up" else self._down)[expert])
            return
        weight = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        (self.gate_up if product == "gate_up" else self.down)[expert] = Linear(weight, self.format)

    def forward(
        self, x: torch.Tensor, expert: torch.Tensor, middle: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, width]. expert: int64 [T, k], which experts each row goes through. middle: maps gate|up [M, 2 inner] to [M, inner].

        Returns y [M, width] and where, int64 [T, k]: y[where[t, j]] is row t through its j-th expert. M >= T k.
        """
        t, k = expert.shape
        flat = expert.reshape(-1)
        order = torch.argsort(flat, stable=True)  # entry (t, j) is t * k + j
        # where each expert's group ends; bincount would read its maximum on the host
        ends = torch.searchsorted(flat[order], torch.arange(self.n, device=flat.device), right=True, out_int32=self.grouped)
        where = torch.empty_like(order)
        if self.grouped:
            where[order] = torch.arange(t * k, device=flat.device)
            h = middle(torch._grouped_mm(x.index_select(0, order // k), self._gate_up.transpose(1, 2), offs=ends))
            y = torch._grouped_mm(h, self._down.transpose(1, 2), offs=ends)
        else:
            sizes = ends.diff(prepend=ends.new_zeros(1))
            padded = (sizes + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
            shift = padded.cumsum(0) - padded - (ends - sizes)
            place = torch.arange(t * k, device=flat.device) + shift[flat[order]]
            where[order] = place
            counts = padded.tolist()
            source = order.new_zeros(sum(counts))  # padding repeats row 0
            source[place] = order // k
            y = self._loop(x, source, counts, middle)
        return y, where.view(t, k)

    def _loop(self, x: torch.Tensor, source: torch.Tensor, counts: list[int], middle) -> torch.Tensor:
        """Experts in order, those that have rows; as many at a time as RUN_ROWS rows hold, so that small calls are few and copies short."""
        out, run, start, stop = [x.new_empty(0, self.width)], [], 0, 0
        for e, count in enumerate(counts):
            if count:
                run.append((e, stop - start, stop - start + count))
                stop += count
            if run and (stop - start >= RUN_ROWS or e == self.n - 1):
                rows = x.index_select(0, source[start:stop])
                h = middle(torch.cat([self.gate_up[i](rows[a:b]) for i, a, b in run]))
                out += [self.down[i](h[a:b]) for i, a, b in run]
                run, start = [], stop
        return torch.cat(out)

    def extra_repr(self) -> str:
        return f"{self.n} experts, {self.width} -> {self.inner} -> {self.width}, {'grouped product' if self.grouped else self.format}"
