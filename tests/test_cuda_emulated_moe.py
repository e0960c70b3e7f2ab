"""The CUDA kernels of moe_route and moe_combine, run lane by lane on the CPU (emulate_warp.h), against the CPU kernels: the same bits."""

from __future__ import annotations

from ctypes import POINTER, c_bool, c_float, c_int64, c_void_p

import pytest
import torch

import emulated
from native import native
from strided import relayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def _call(function, tensors, numbers, *rest) -> None:
    pointers = (c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    if function(pointers, (c_int64 * len(numbers))(*map(int, numbers)), *rest):
        raise RuntimeError(emulated.build("emulate_moe_route.cpp").emulated_error().decode())


def route(logits, row, bias, scoring, groups, kept, top_k, renormalise, scale, multiple) -> tuple[torch.Tensor, ...]:
    """The op's outputs by the CUDA kernels."""
    function = emulated.build("emulate_moe_route.cpp").emulated_moe_route
    function.argtypes = [POINTER(c_void_p), POINTER(c_int64), c_float]
    (tokens, experts), poison = logits.shape, 0x7FC0DEAD
    capacity = tokens * top_k + (multiple - 1) * min(tokens * top_k, experts)
    expert, place, source = torch.full((tokens, top_k), poison), torch.full((tokens, top_k), poison), torch.full((capacity,), poison)
    offsets, count = torch.full((experts + 1,), poison, dtype=torch.int32), torch.full((experts,), poison, dtype=torch.int32)
    out = expert, torch.full((tokens, top_k), 777.0), place, source, offsets
    strides = [*logits.stride(), *(0 if t is None or not len(t) else t.stride(0) for t in (row, bias))]
    _call(function, (logits, row, bias, *out, count),
          [*strides, tokens, experts, groups, kept, top_k, multiple, capacity, scoring, renormalise], scale)  # fmt: skip
    return out


def assert_same_bits(got, want) -> None:
    for name, g, w in zip(("expert", "weight", "place", "source", "offsets"), got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g.nan_to_num(7.0) if name == "weight" else g, w.nan_to_num(7.0) if name == "weight" else w), name
        assert name != "weight" or torch.equal(g.isnan(), w.isnan())


CASES = [  # experts, groups, kept, top_k
    (1, 1, 1, 1), (6, 1, 1, 6), (16, 4, 2, 5), (31, 31, 7, 7), (33, 3, 2, 8), (64, 1, 1, 8), (96, 4, 4, 4), (256, 8, 4, 8), (300, 60, 33, 20),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scoring", (0, 1))
def test_routes(case, scoring):
    experts, groups, kept, top_k = case
    for i, layout in enumerate(("dense", "gap", "step", "transposed")):
        logits = torch.randn(7, experts) * (3 if i % 2 else 1)
        if i == 1:
            logits = logits.round()  # ties
        bias = None if i == 0 else relayout(torch.randn(experts) * 0.2, "step" if i == 2 else "dense")
        row = None if i == 3 else torch.tensor([0, 0, -1, 1, -5, 2, 0])
        args = (relayout(logits, layout), row, bias, scoring, groups, kept, top_k, i != 2, (1.0, 2.5)[i % 2], (1, 16, 5, 16)[i])
        assert_same_bits(route(*args), native("moe_route")(*args))


@pytest.mark.parametrize("scoring", (0, 1))
@pytest.mark.parametrize("groups", (1, 4))
def test_hostile_logits(scoring, groups):
    logits = torch.randn(10, 32)
    logits[0, 5] = NAN
    logits[1] = NAN
    logits[2] = INF
    logits[3] = -INF
    logits[4, 3:9] = INF
    logits[5, 1:30] = -INF
    logits[6] = 0.0
    logits[7] = torch.linspace(-3e38, 3e38, 32)
    logits[8] = torch.linspace(-120, 120, 32)
    bias = torch.randn(32)
    bias[9], bias[20] = -INF, NAN
    for b in (None, bias):
        args = (logits, None, b, scoring, groups, max(1, groups // 2), 6, True, 1.0, 16)
        assert_same_bits(route(*args), native("moe_route")(*args))


@pytest.mark.parametrize("tokens", (0, 1, 150))
def test_numbers_of_tokens(tokens):
    args = (torch.randn(tokens, 40), None, None, 1, 1, 1, 3, False, 1.0, 16)
    assert_same_bits(route(*args), native("moe_route")(*args))
    nobody = torch.full((tokens,), -1)
    assert_same_bits(route(args[0], nobody, *args[2:]), native("moe_route")(args[0], nobody, *args[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 8, 255, 256, 264))
def test_combine(dtype, dim):
    function = emulated.build("emulate_moe_route.cpp").emulated_moe_combine
    function.argtypes = [POINTER(c_void_p), POINTER(c_int64), c_bool]
    y = (torch.randn(12, dim + 3 if dim % 8 else dim) * 2).to(dtype)[:, :dim]
    y[3] = NAN  # nobody's
    place = torch.randint(4, 12, (9, 5))
    place[2], place[5, 1], place[6, 3] = -1, 12, -9
    weight = relayout(torch.randn(9, 5), "transposed")
    out = torch.full((9, dim), 777.0, dtype=dtype)
    numbers = [y.stride(0), 12, dim, *place.stride(), *weight.stride(), 9, 5, DTYPES.index(dtype)]
    _call(function, (y, place, weight, out), numbers, dim % 8 == 0)
    assert torch.equal(out, native("moe_combine")(y, place, weight)) and not out[2].any()
