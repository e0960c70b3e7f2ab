"""The argument errors of the ops, for their references: `<op>: <tensor> must be <expected>, got <actual>`."""

from __future__ import annotations

from typing import NoReturn

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fail(op: str, name: str, expected: str, actual: object) -> NoReturn:
    raise RuntimeError(f"{op}: {name} must be {expected}, got {actual}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floating(op: str, name: str, t: torch.Tensor) -> None:
    if t.dtype not in _FLOATS:
        fail(op, name, "float32, bfloat16 or float16", _name(t.dtype))


def real(op: str, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype not in (torch.float32, torch.float64):
            fail(op, name, "float32 or float64", _name(t.dtype))


def dtype(op: str, want: torch.dtype, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype != want:
            fail(op, name, _name(want), _name(t.dtype))


def shape(op: str, name: str, t: torch.Tensor | None, spec: str, sizes: tuple[int, ...]) -> None:
    """`sizes` with -1 for any; `spec` is the shape as the docstring writes it."""
    if t is None:
        return
    if t.ndim != len(sizes) or any(s >= 0 and s != got for s, got in zip(sizes, t.shape, strict=True)):
        want = ", ".join("any" if s < 0 else str(s) for s in sizes)
        fail(op, name, f"{spec} = [{want}]", list(t.shape))


def writable(op: str, name: str, t: torch.Tensor | None) -> None:
    if t is None:
        return
    for i, (stride, size) in enumerate(zip(t.stride(), t.shape, strict=True)):
        if stride == 0 and size > 1:
            fail(op, name, "without expanded dimensions (it is written)", f"stride 0 in dimension {i}")
