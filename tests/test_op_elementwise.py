"""rms_norm, add_rms_norm, silu_mul: against the definition, against float64, at any layout, batch and thread count."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, LAYOUTS, relayout
from unmask import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
KERNELS = {name: native(name) for name in ("rms_norm", "add_rms_norm", "silu_mul")}


def assert_rounding_level(ours, theirs, exact, slack=1e-6):
    """err(ours) <= 2 err(the plain PyTorch code in this dtype) + a floor, in units of eps * |exact|, against float64. The floor is what
    the roundings of one element may add up to: two in half precision, four (exp, product, sum, quotient) in fp32."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    if not ours.numel():
        return
    unit = torch.finfo(ours.dtype).eps * exact.abs() + slack * torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - exact).abs() / unit, (theirs.double() - exact).abs() / unit
    assert error.max() <= 2 * allowed.max() + (2.0 if ours.dtype is torch.float32 else 1.0)


def norm64(x, weight, eps=EPS):
    x = x.double()
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def silu_mul64(x):
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (2, 33), (4, 64), (3, 200), (7, 4096), (0, 8), (3, 0)])
def test_matches_the_definition(dtype, shape):
    x, weight, residual = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype), (3 * torch.randn(shape)).to(dtype)
    assert_rounding_level(KERNELS["rms_norm"](x, weight, EPS), reference.rms_norm(x, weight, EPS), norm64(x, weight))
    r1, r2 = residual.clone(), residual.clone()
    y1, y2 = KERNELS["add_rms_norm"](r1, x, weight, EPS), reference.add_rms_norm(r2, x, weight, EPS)
    assert torch.equal(r1, r2) and torch.equal(r1, residual + x)
    assert_rounding_level(y1, y2, norm64(r2, weight))
    gate_up = (8 * torch.randn(shape[0], 2 * shape[1])).to(dtype)
    assert_rounding_level(KERNELS["silu_mul"](gate_up), reference.silu_mul(gate_up), silu_mul64(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_equals_torch_within_one_rounding(dtype):
    gate_up = (20 * torch.randn(64, 512)).to(dtype)
    gate, up = gate_up.chunk(2, -1)
    theirs = torch.nn.functional.silu(gate) * up
    error = (KERNELS["silu_mul"](gate_up).double() - theirs.double()).abs()
    # fp32: each side is a few roundings from the exact value; half precision: one flipped rounding of silu, one of the product
    steps = 3 if dtype is torch.float32 else 2
    assert (error <= steps * torch.finfo(dtype).eps * theirs.double().abs() + 1e-30).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, -80.0, -87.4, -100.0, 100.0, 1e30, -1e30, 3e38])
def test_silu_of_extreme_gates(value):
    row = torch.tensor([[value, 1.0]])
    exact = silu_mul64(row)
    assert (KERNELS["silu_mul"](row).double() - exact).abs().item() <= 3e-7 * exact.abs().item() + 2e-36


def test_silu_is_accurate_on_a_fine_grid():
    gate = torch.linspace(-90, 90, 200_001)[None]
    ours = KERNELS["silu_mul"](torch.cat((gate, torch.ones_like(gate)), -1)).double()
    exact = gate.double() * torch.sigmoid(gate.double())
    assert ((ours - exact).abs() <= 4 * 2.0**-24 * exact.abs() + 2e-36).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_invalid_values_stay_in_their_row_as_in_torch(dtype, bad):
    x = torch.randn(3, 40).to(dtype)
    x[1, 5] = bad
    weight = torch.randn(40).to(dtype)
    clean = x.clone()
    clean[1] = 0
    for kernel, ref, args in (
        (KERNELS["rms_norm"], reference.rms_norm, (weight, EPS)),
        (KERNELS["silu_mul"], reference.silu_mul, ()),
    ):
        ours, theirs = kernel(x, *args), ref(x, *args)
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
        assert torch.equal(ours[::2], kernel(clean, *args)[::2])


@given(st.data())
def test_any_layout(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, dim = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, residual = (torch.randn(rows, dim, generator=generator).to(dtype) for _ in range(2))
    x = relayout(x, data.draw(st.sampled_from(ALL_LAYOUTS)))
    weight = relayout(torch.randn(dim, generator=generator).to(dtype), data.draw(st.sampled_from(ALL_LAYOUTS)))
    residual = relayout(residual, data.draw(st.sampled_from(LAYOUTS)))
    dense_residual = residual.clone()
    assert torch.equal(KERNELS["rms_norm"](x, weight, EPS), KERNELS["rms_norm"](x.contiguous(), weight.contiguous(), EPS))
    ours = KERNELS["add_rms_norm"](residual, x, weight, EPS)
    assert torch.equal(ours, KERNELS["add_rms_norm"](dense_residual, x.contiguous(), weight.contiguous(), EPS))
    assert torch.equal(residual, dense_residual)
    gate_up = relayout(torch.randn(rows, 2 * dim, generator=generator).to(dtype), data.draw(st.sampled_from(ALL_LAYOUTS)))
    ours = KERNELS["silu_mul"](gate_up)
    assert ours.is_contiguous() and torch.equal(ours, KERNELS["silu_mul"](gate_up.contiguous()))
    assert_rounding_level(ours, reference.silu_mul(gate_up), silu_mul64(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gives_the_same_bits_in_any_batch_and_at_any_thread_count(dtype, threads):
    x, weight, residual = torch.randn(200, 1536).to(dtype), torch.randn(1536).to(dtype), torch.randn(200, 1536).to(dtype)

    def run(a, r):
        r = r.clone()
        first = KERNELS["add_rms_norm"](r, a, weight, EPS)
        return torch.cat((KERNELS["rms_norm"](a, weight, EPS), first, r, KERNELS["silu_mul"](a)), -1)

    threads(1)
    one = run(x, residual)
    threads(2)
    assert torch.equal(one, run(x, residual))
    for i in (0, 99, 199):
        assert torch.equal(one[i : i + 1], run(x[i : i + 1], residual[i : i + 1]))
    assert torch.equal(one[50:67], run(x[50:67], residual[50:67]))


def _tensors(dtype=torch.float32):
    return torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype), torch.randn(8).to(dtype)


x, r, w = _tensors()
ERRORS = [
    ("rms_norm", (x.double(), w, EPS), "rms_norm: x must be float32, bfloat16 or float16, got float64"),
    ("rms_norm", (x, w.bfloat16(), EPS), "rms_norm: weight must be float32, got bfloat16"),
    ("rms_norm", (x[0], w, EPS), "rms_norm: x must be [T, D] = [any, any], got [8]"),
    ("rms_norm", (x, w[:7], EPS), "rms_norm: weight must be [D] = [8], got [7]"),
    ("rms_norm", (x, w, -1.0), "rms_norm: eps must be finite and >= 0, got -1.000000"),
    ("rms_norm", (x, w, float("nan")), "rms_norm: eps must be finite and >= 0, got nan"),
    ("add_rms_norm", (r.long(), x, w, EPS), "add_rms_norm: residual must be float32, bfloat16 or float16, got int64"),
    ("add_rms_norm", (r, x.half(), w, EPS), "add_rms_norm: x must be float32, got float16"),
    ("add_rms_norm", (r, x[:2], w, EPS), "add_rms_norm: x must be [T, D] = [3, 8], got [2, 8]"),
    (
        "add_rms_norm",
        (r[:1].expand(3, 8), x, w, EPS),
        "add_rms_norm: residual must be without expanded dimensions (it is written), got stride 0 in dimension 0",
    ),
    ("silu_mul", (x.int(),), "silu_mul: gate_up must be float32, bfloat16 or float16, got int32"),
    ("silu_mul", (x[None],), "silu_mul: gate_up must be [T, 2F] = [any, any], got [1, 3, 8]"),
    ("silu_mul", (x[:, :7],), "silu_mul: gate_up's last dimension must be even, got 7"),
]


@pytest.mark.parametrize(("name", "args", "text"), ERRORS)
def test_errors(name, args, text):
    for fn in (KERNELS[name], getattr(reference, name), getattr(ops, name)):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            fn(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, r, w = _tensors(dtype)
    torch.library.opcheck(KERNELS["rms_norm"].default, (x, w, EPS))
    torch.library.opcheck(KERNELS["add_rms_norm"].default, (r, x, w, EPS))
    torch.library.opcheck(KERNELS["silu_mul"].default, (x,))


def test_compiles_without_graph_breaks():
    x, r, w = _tensors()

    def block(x, r):
        return ops.silu_mul(ops.add_rms_norm(r, ops.rms_norm(x, w, EPS), w, EPS))

    r1, r2 = r.clone(), r.clone()
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x, r1), block(x, r2))
    assert torch.equal(r1, r2)
