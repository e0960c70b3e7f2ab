"""The CUDA kernels of verify_greedy and verify_ratio, run lane by lane on the CPU (emulate_warp.h), against the CPU kernels."""

from __future__ import annotations

from ctypes import POINTER, c_double, c_float, c_int64, c_void_p

import pytest
import torch
from hypothesis import given

import emulated
from native import native
from stats_cases import strided
from unmask import ops
from verify_kit import DTYPES, Call, assert_explained, equal, greedy_calls, ids, ratio_calls, spans


def _run(name: str, pointers: tuple, numbers: list, *rest) -> None:
    lib = emulated.build("emulate_verify.cpp")
    function = getattr(lib, name)
    function.argtypes = [POINTER(c_void_p), POINTER(c_int64), *[type(x) for x in rest]]
    p = (c_void_p * len(pointers))(*(None if t is None else t.data_ptr() for t in pointers))
    if function(p, (c_int64 * len(numbers))(*map(int, numbers)), *rest):
        raise RuntimeError(lib.emulated_error().decode())


def greedy(node, after, parent, count, mask_id, subset, status=None) -> tuple[torch.Tensor, torch.Tensor]:
    last, length = torch.full(count.shape, -77), torch.full(count.shape, -77)
    strides = [*node.stride(), *after.stride(), *((0, 0) if parent is None else parent.stride()), count.stride(0), 0 if status is None else status.stride(0)]
    _run("emulated_verify_greedy", (node, after, parent, count, status, last, length), [*strides, *node.shape, mask_id, subset])
    return last, length


def ratio(call: Call, dense: tuple[bool, bool] = (False, False)) -> ops.RatioResult:
    n, spans_ = len(call.token), len(call.cu) - 1
    out = (torch.full((spans_,), -77), torch.full((spans_,), -77), torch.full((n,), 777.0), torch.full((spans_,), -77, dtype=torch.int32))
    vectors = call[2:11]  # p_row .. forbid
    numbers = [emulated._TYPES[call.p_logits.dtype], *call.p_logits.stride(), *call.q_logits.stride(), len(call.p_logits), len(call.q_logits)]
    numbers += [call.p_logits.shape[1], n, spans_, 0 if call.forbid is None else len(call.forbid)]
    numbers += [0 if t is None else t.stride(0) for t in vectors]
    numbers += [call.uniforms is not None and call.uniforms.dtype is torch.float64, call.resample, *dense]
    scale = 1.0 / float(torch.tensor(call.temperature, dtype=torch.float32))
    _run("emulated_verify_ratio", (*call[:2], *vectors, *out), numbers, c_double(call.temper), c_float(scale))
    return ops.RatioResult(*out)


@given(greedy_calls())
def test_greedy_same_as_the_cpu_kernel(call):
    status, expected = (torch.full((len(call[3]),), 1, dtype=torch.int32) for _ in range(2))
    got, want = greedy(*call, status), native("verify_greedy")(*call, expected)
    for g, w in zip((*got, status), (*want, expected), strict=True):
        assert torch.equal(g, w)
    for g, w in zip(greedy(*call), want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("width", (1, 31, 32, 33, 256))
def test_greedy_nodes_wider_than_a_warp(width):
    """One difference, in the last place."""
    after = torch.arange(5 * width).view(1, 5, width)
    node = torch.cat((after[:, :1], after[:, :-1]), 1)
    node[0, 3, -1] += 1
    assert [t.item() for t in greedy(node, after, None, ids(5), 0, False)] == [2, 3]


def test_greedy_more_nodes_than_a_warp():
    after = torch.zeros(2, 70, 2, dtype=torch.int64)
    parent = (torch.arange(70) - 1).repeat(2, 1)
    parent[1, 69] = 70
    status = torch.zeros(2, dtype=torch.int32)
    last, length = greedy(after, after, parent, ids(70, 70), 0, False, status)
    assert last.tolist() == [69, -1] and length.tolist() == [70, 0] and status.tolist() == [0, int(ops.Status.BAD_SEGMENT)]


@given(ratio_calls())
def test_ratio_same_as_the_cpu_kernel(call):
    assert_explained(call, ratio(call), call.kernel())


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_bits_do_not_depend_on_the_layout(dtype):
    call = spans(3, 2, 4099, dtype, spread=3.0)._replace(forbid=ids(3, 4098))
    want = ratio(call)
    assert_explained(call, want, call.kernel())
    assert int((want.next >= 0).sum()) > 0
    for layout in ("padded", "columns", "transposed"):
        assert equal(ratio(call._replace(p_logits=strided(call.p_logits, layout), q_logits=strided(call.q_logits, layout))), want)
    wide = [torch.nn.functional.pad(t, (0, 5))[:, :4099] for t in (call.p_logits, call.q_logits)]  # rows at multiples of 16 bytes
    assert equal(ratio(call._replace(p_logits=wide[0], q_logits=wide[1]), (True, True)), want)
    alone = ratio(call._replace(p_row=call.p_row[2:4], q_row=call.q_row[2:4], token=call.token[2:4], cu=ids(0, 2), seed=call.seed[2:4],
                                step=call.step[2:4], pos=call.pos[2:4]))  # fmt: skip
    assert torch.equal(alone.log_ratio, want.log_ratio[2:4]) and alone.next == want.next[1] and alone.accepted == want.accepted[1]


def test_ratio_more_chunks_than_a_warp():
    call = spans(1, 1, 33 * 4096 + 5, torch.bfloat16, spread=4.0)
    call.token[0] = call.q_logits[0].float().argmin()
    got = ratio(call)
    assert got.accepted.tolist() == [0] and got.next[0] >= 0
    assert_explained(call, got, call.kernel())


def test_ratio_spans_longer_than_a_warp():
    """Rejections and ends on either side of the 32 positions that a warp takes at a time."""
    n = 100
    x = torch.zeros(2, 4)
    x[1, 1] = float("nan")
    key = torch.arange(n)
    for stop, inactive, nan in ((None, None, None), (31, None, None), (32, 33, None), (70, 32, 40), (64, None, 99), (99, 64, 70), (None, 0, None)):
        row, uniforms = torch.zeros(n, dtype=torch.int64), torch.full((n,), 0.5)
        if stop is not None:
            uniforms[stop] = 1.0
        q_row = row.clone()
        for at, value in ((inactive, -1), (nan, 1)):
            if at is not None:
                q_row[at] = value
        call = Call(x, x, row, q_row, row, ids(0, n), key, key, key, uniforms)
        got = ratio(call)
        assert equal(got, call.kernel())
        end = n if inactive is None else inactive
        whole = end if stop is None or stop >= end else stop
        assert got.accepted.tolist() == [0 if nan is not None and nan < end else whole]
