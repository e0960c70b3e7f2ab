"""Packed linears: the capability is there, products agree with F.linear, and a row's bits do not depend on its batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from unmask.ops import linear
from unmask.ops.linear import Linear

FORMATS = {torch.float32: ("packed", "plain"), torch.bfloat16: ("packed", "packed_fp32", "plain")}
CASES = [(d, f) for d, fs in FORMATS.items() for f in fs]


def test_packing_is_available():
    """Fails when torch changes its private packing ops, so that the silent cost of the fallback is noticed."""
    assert linear.packing_available(torch.float32)


@pytest.mark.parametrize("dtype, format", CASES)
@pytest.mark.parametrize("k, n", [(64, 192), (160, 64), (512, 1536), (1536, 512), (32, 61)])
def test_product(dtype, format, k, n):
    if format == "packed" and not linear.packing_available(dtype):
        assert linear.choose_format(dtype, torch.device("cpu"), 1) != "packed"
        return
    x, w = torch.randn(48, k).to(dtype), torch.randn(n, k).to(dtype)
    y = Linear(w, format)(x)
    exact = x.double() @ w.double().T
    assert y.dtype == dtype and y.shape == (48, n)
    error = (y.double() - exact).abs().max()
    torch_error = (F.linear(x, w).double() - exact).abs().max()
    assert error <= 2 * torch_error + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, n", [(64, 192), (512, 1536), (1536, 512), (512, 4096), (256, 61)])
def test_row_bits_do_not_depend_on_the_batch(dtype, k, n, threads):
    """The property everything above rests on: rows padded to a multiple of 16 get the same bits in any batch, at any thread count."""
    format = linear.choose_format(dtype, torch.device("cpu"), n * k)
    assert format != "plain"
    x, product = torch.randn(512, k).to(dtype), Linear(torch.randn(n, k).to(dtype), format)
    threads(1)
    alone = product(x[:16])
    for count in (1, 2):
        threads(count)
        for rows in (16, 32, 48, 80, 128, 144, 256, 512):
            assert torch.equal(product(x[:rows])[:16], alone), (count, rows)
        shuffled = torch.cat([x[16:48], x[:16], x[48:64]])
        assert torch.equal(product(shuffled)[32:48], alone), count


def test_bias_and_errors():
    x, w, b = torch.randn(16, 8), torch.randn(24, 8), torch.randn(24)
    assert torch.allclose(Linear(w, "packed", b)(x), F.linear(x, w, b), atol=1e-5)
    with pytest.raises(ValueError, match="format must be one of"):
        Linear(w, "blocked")
    with pytest.raises(ValueError, match="weight must be"):
        Linear(w[0], "plain")


def test_forced_format(monkeypatch):
    monkeypatch.setenv("UNMASK_GEMM", "plain")
    assert linear.choose_format(torch.float32, torch.device("cpu"), 10) == "plain"
    monkeypatch.setenv("UNMASK_GEMM", "fast")
    with pytest.raises(ValueError, match="UNMASK_GEMM must be one of packed, packed_fp32, plain"):
        linear.choose_format(torch.float32, torch.device("cpu"), 10)


def test_memory_decides_about_fp32_copies(monkeypatch):
    monkeypatch.delenv("UNMASK_GEMM", raising=False)
    monkeypatch.setattr(linear, "cpu_has_bf16_dot", lambda: False)
    monkeypatch.setattr(linear, "available_memory", lambda: 1000)
    assert linear.choose_format(torch.bfloat16, torch.device("cpu"), 100) == "packed_fp32"
    assert linear.choose_format(torch.bfloat16, torch.device("cpu"), 1000) != "packed_fp32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiled_rows_have_the_same_bits_in_any_batch(dtype):
    from unmask.ops.linear import TILE_ROWS

    generator = torch.Generator().manual_seed(3)
    x, bias = torch.randn(70, 48, generator=generator).to(dtype), torch.randn(40, generator=generator).to(dtype)
    layer = Linear(torch.randn(40, 48, generator=generator).to(dtype), "tiled", bias)
    whole, calls = layer(x), []
    assert whole.shape == (70, 40) and layer(x[:0]).shape == (0, 40)
    for begin, end in ((0, 1), (3, 20), (20, 70), (69, 70)):
        assert torch.equal(layer(x[begin:end]), whole[begin:end])
    product = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda t, *w: calls.append(t.shape[0]) or product(t, *w))
        layer(x), layer(x[:5])
    assert calls == [TILE_ROWS] * 4
