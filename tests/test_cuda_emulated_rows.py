"""The CUDA kernels of rms_norm, add_rms_norm and silu_mul, run lane by lane on the CPU, against the CPU kernels."""

from __future__ import annotations

import pytest
import torch

import emulated
from native import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 1e-6, torch.bfloat16: 1.0 / 128, torch.float16: 1.0 / 1024}  # one step of the dtype, relative


def rows(n: int, width: int, dtype: torch.dtype, pad: int) -> torch.Tensor:
    return torch.full((n, width + pad), float("nan"), dtype=dtype)[:, :width].copy_(torch.randn(n, width) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 7, 8, 255, 256, 264, 1000))
@pytest.mark.parametrize("aligned", (True, False))
def test_norms(dtype, dim, aligned):
    pad = -dim % 8 if aligned else 3
    for n in (1, 5):
        x, residual, weight = rows(n, dim, dtype, pad), rows(n, dim, dtype, pad), torch.rand(dim).to(dtype)
        got = emulated.norm(x, None, weight, 1e-5, aligned and dim % 8 == 0)
        torch.testing.assert_close(got, native("rms_norm")(x, weight, 1e-5), rtol=STEP[dtype], atol=1e-30)
        ours, theirs = residual.clone(), residual.clone()
        got = emulated.norm(x, ours, weight, 1e-5, False)
        want = native("add_rms_norm")(theirs, x, weight, 1e-5)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(got, want, rtol=STEP[dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_layout(dtype):
    x, weight = rows(6, 520, dtype, 0), torch.rand(520).to(dtype)
    whole = emulated.norm(x, None, weight, 1e-6, True)
    assert torch.equal(whole, emulated.norm(x, None, weight, 1e-6, False))
    assert torch.equal(whole[3:4], emulated.norm(x[3:4], None, weight, 1e-6, True))
    gate = rows(6, 1040, dtype, 0)
    assert torch.equal(emulated.silu_mul(gate, True), emulated.silu_mul(gate, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 8, 255, 256, 520))
def test_silu_mul(dtype, width):
    gate = rows(5, 2 * width, dtype, 8)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 100.0, -100.0, 1e-3])
    gate[0, : min(8, width)] = special[:width].to(dtype)
    aligned = width % 8 == 0
    got, want = emulated.silu_mul(gate, aligned), native("silu_mul")(gate)
    torch.testing.assert_close(got, want, rtol=STEP[dtype], atol=1e-30, equal_nan=True)


def test_misaligned_rows_are_noticed():
    with pytest.raises(RuntimeError, match="not aligned"):
        emulated.norm(rows(2, 16, torch.bfloat16, 1)[:, :16], None, torch.ones(16, dtype=torch.bfloat16), 1e-5, True)
