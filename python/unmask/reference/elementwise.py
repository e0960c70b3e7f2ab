"""RMSNorm, residual add + RMSNorm and silu(gate) * up."""

from __future__ import annotations

import math

import torch

from . import _check


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dim: fp32 statistics, the scaled value rounded to x's dtype, then times weight in that dtype."""
    x32 = x.float()
    scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype) * weight


def _check_norm(op: str, residual: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    first, name = (x, "x") if residual is None else (residual, "residual")
    _check.floating(op, name, first)
    _check.dtype(op, first.dtype, x=x, weight=weight)
    _check.shape(op, name, first, "[T, D]", (-1, -1))
    _check.shape(op, "x", x, "[T, D]", tuple(first.shape))
    _check.shape(op, "weight", weight, "[D]", (x.shape[1],))
    _check.writable(op, "residual", residual)
    if not (math.isfinite(eps) and eps >= 0):
        _check.fail(op, "eps", "finite and >= 0", f"{eps:f}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `unmask.ops.rms_norm`."""
    _check_norm("rms_norm", None, x, weight, eps)
    return normalise(x, weight, eps)


def add_rms_norm(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `unmask.ops.add_rms_norm`."""
    _check_norm("add_rms_norm", residual, x, weight, eps)
    residual += x
    return normalise(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `unmask.ops.silu_mul`."""
    _check.floating("silu_mul", "gate_up", gate_up)
    _check.shape("silu_mul", "gate_up", gate_up, "[T, 2F]", (-1, -1))
    if gate_up.shape[1] % 2:
        _check.fail("silu_mul", "gate_up's last dimension", "even", gate_up.shape[1])
    gate, up = gate_up.chunk(2, dim=-1)
    gate32 = gate.float()
    return (gate32 * torch.sigmoid(gate32)).to(gate.dtype) * up
