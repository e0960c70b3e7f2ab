"""An example of an op: a small call, and what the reference makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Example:
    """args: of the op in torch.ops.unmask, in schema order. wrapper: the same call through `unmask.ops`.

    ours, expected: make everything that the op returns or writes, by the kernel and by the reference, from equal fresh inputs.
    Floats agree within `tolerance` (absolute and relative), everything else exactly.
    """

    op: str
    args: tuple[Any, ...]
    wrapper: Callable[[], Any]
    ours: Callable[[], Sequence[torch.Tensor]]
    expected: Callable[[], Sequence[torch.Tensor]]
    tolerance: float = 1e-5

    def differences(self) -> list[str]:
        """What disagrees, one line per tensor; empty when all is well."""
        got, want = list(self.ours()), list(self.expected())
        if len(got) != len(want):
            return [f"{len(got)} results, expected {len(want)}"]
        return [
            line
            for i, pair in enumerate(zip(got, want, strict=True))
            if (line := _difference(i, *pair, self.tolerance))
        ]


def _difference(index: int, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str | None:
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"result {index}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
    if not got.dtype.is_floating_point:
        return (
            None
            if torch.equal(got, want)
            else f"result {index}: {int((got != want).sum())} of {want.numel()} values differ"
        )
    if torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    return f"result {index}: off by {(got - want).abs().max():.3g}, allowed {tolerance:g}"
