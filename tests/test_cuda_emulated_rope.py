"""The CUDA kernels of rope_append, run lane by lane on the CPU, against the CPU kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emulated
from strided import LAYOUTS, relayout
from test_op_rope_append import DTYPES, assert_same_within_rounding, build, run


def on_emulated_warps(launches):
    return lambda *args: emulated.rope_append(*args, launches=launches)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [dict(), dict(tokens=1, heads=1, kv_heads=1, dim=2, rows=1, slots=1), dict(dim=128, tokens=9), dict(dim=48, freqs=11), dict(dim=10, freqs=0),
     dict(dim=6, freqs=2, heads=0), dict(kv_heads=0), dict(slots=0), dict(rows=0), dict(dim=200, heads=5, kv_heads=3, tokens=3)],
)  # fmt: skip
def test_matches_the_cpu_kernel(sizes, norm, dtype):
    call = build(dtype=dtype, norm=norm, **sizes)
    want = run(call)
    for launches in (1, 2):
        got = run(call, on_emulated_warps(launches))
        assert_same_within_rounding(got, want, dtype, norm)
        if not norm:  # no sum whose order could differ
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@given(st.data())
def test_faults_duplicate_slots_and_layouts(data):
    call = build(tokens=data.draw(st.integers(1, 9)), dim=8, rows=2, slots=4, seed=data.draw(st.integers(0, 1000)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    call.row = torch.randint(-2, 4, call.row.shape, generator=g)
    call.slot = torch.randint(-2, 6, call.row.shape, generator=g)
    call.pos[torch.rand(call.row.shape, generator=g) < 0.2] = -3
    if data.draw(st.booleans()):
        call.v_slot = torch.randint(-1, 4, call.row.shape, generator=g)
    how = data.draw(st.sampled_from(LAYOUTS))
    for name in ("q", "k", "v", "row", "pos", "slot"):
        setattr(call, name, relayout(getattr(call, name), how))
    want = run(call)
    for launches in (1, 2):
        got = run(call, on_emulated_warps(launches))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_huge_positions():
    call = build(tokens=3, dim=8)
    call.pos = torch.tensor([2**31, 2**40, 5])
    for a, b in zip(run(call, on_emulated_warps(1)), run(call), strict=True):
        torch.testing.assert_close(a, b)
