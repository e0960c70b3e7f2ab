"""Row-wise pieces between the GEMMs: `rms_norm`, `add_rms_norm`, `silu_mul`."""

from __future__ import annotations

import torch

from .. import _library as _library  # noqa: F401  (loads _C)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in the order of LLaDA and Hugging Face: `round(x / sqrt(mean(x^2) + eps)) * weight`.

    x: [T, D] float32, bfloat16 or float16, any strides. weight: [D], x's dtype. eps: finite, >= 0. Statistics and scaling in fp32, the
    scaled value rounded to the dtype, then multiplied by weight (one more rounding). Returns [T, D], dense, x's dtype.
    A row gives the same bits in any batch and at any thread count. RuntimeError for wrong dtypes, devices, shapes or eps.
    """
    return torch.ops.unmask.rms_norm(x, weight, eps)


def add_rms_norm(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`residual += x` in place (rounded to the dtype), then `rms_norm(residual, weight, eps)`, in one pass.

    residual, x: [T, D] of one dtype, any strides (residual not expanded). Otherwise as `rms_norm`.
    """
    return torch.ops.unmask.add_rms_norm(residual, x, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's middle: `F.silu(gate) * up` for gate_up = [gate | up].

    gate_up: [T, 2F] float32, bfloat16 or float16, any strides. silu in fp32, rounded to the dtype, then multiplied in it.
    Returns [T, F], dense. RuntimeError for other dtypes or shapes and for an odd last dimension.
    """
    return torch.ops.unmask.silu_mul(gate_up)


@torch.library.register_fake("unmask::rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("unmask::add_rms_norm")
def _(residual, x, weight, eps):
    return residual.new_empty(residual.shape)


@torch.library.register_fake("unmask::silu_mul")
def _(gate_up):
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
