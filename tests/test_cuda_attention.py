"""block_attention on a GPU: the cases of the emulation (tests/test_cuda_emulated_attention.py) and what only a GPU can show."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from attention_cases import (
    DTYPES,
    Call,
    assert_exact_enough,
    assert_matches_the_definition_at,
    build,
    calls,
    entry,
    layouts,
    random_ends,
    run,
)
from native import native
from on_gpu import op_on_gpu, to_cuda
from unmask.ops import Status

pytestmark = pytest.mark.usefixtures("cuda")
HALF = (torch.bfloat16, torch.float16)
_op = op_on_gpu("block_attention", written=(9,))


def poison(like: torch.Tensor) -> None:
    """Fills memory that the allocator hands out next with NaN: an output element that is not written shows."""
    blocks = [torch.full((like.numel() + 4096,), math.nan, device="cuda", dtype=like.dtype) for _ in range(3)]
    del blocks


def gpu(*args, batch_invariant=False):
    poison(args[0])
    return _op(*args, batch_invariant)


def invariant(*args):
    return gpu(*args, batch_invariant=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group"), [(8, 1), (24, 4), (64, 1), (64, 7), (96, 8), (128, 1), (128, 4), (128, 7), (136, 2), (256, 2)])
def test_matches_float64(dim, group, dtype):
    for counts in ((3, 12), (32,), (70, 1)):
        call = build(counts=counts, heads=2 * group, kv_heads=2, dim=dim, slots=140, segs=((5, 70), (90, 41)), dtype=dtype)
        for fn in (gpu, invariant):
            assert_exact_enough(call, fn)
        call.q_end = random_ends(call)
        assert_exact_enough(call, gpu)
        call.mask = torch.rand(len(counts), max(counts), 30) < 0.5
        assert_exact_enough(call, gpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [0, 1, 31, 33, 64, 4095, 4096, 9000])
def test_lengths_and_splits(keys, dtype):
    call = build(counts=(2, 3), heads=2, kv_heads=1, dim=128, rows=2, slots=9001, segs=((0, keys), (4, 0)), dtype=dtype)
    for fn in (gpu, invariant):
        assert_exact_enough(call, fn)


@pytest.mark.parametrize("dtype", HALF)
def test_a_prefix_of_128k(dtype):
    keys = 131072
    call = build(counts=(32,), heads=2, kv_heads=1, dim=128, rows=1, slots=keys + 32, segs=((0, keys), (keys, 32)), dtype=dtype)
    assert_exact_enough(call, gpu)


@given(calls(most_tokens=40, most_slots=600, most_dim=136), layouts())
@settings(max_examples=200, deadline=None)
def test_any_call_at_any_layout(call, how):
    assert_matches_the_definition_at(call, how, gpu)


def long_call(dtype: torch.dtype) -> Call:
    call = build((1, 32, 0, 70, 5), 14, 2, 128, 5, 6000, ((3, 1100), (1110, 4700)), dtype)
    call.seg[3] = torch.tensor([[0, 33], [40, 17]])
    call.q_end = random_ends(call)
    call.mask = torch.rand(5, 70, 50) < 0.7
    return call


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bit_identical_and_so_are_rows_of_any_batch_when_asked(dtype):
    call = long_call(dtype)
    for fn in (gpu, invariant):
        first = run(call, fn)
        for _ in range(20):
            again = run(call, fn)
            assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    out, lse, _ = run(call, invariant)
    for b in range(5):
        begin, end = int(call.cu_q[b]), int(call.cu_q[b + 1])
        part = run(entry(call, b), invariant)
        assert torch.equal(part[0], out[begin:end]) and torch.equal(part[1], lse[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_invalid_cache_row_reaches_only_its_readers(which, bad, dtype):
    call = build(counts=(20, 40), heads=4, dim=64, slots=200, segs=((0, 150), (160, 20)), dtype=dtype)
    call.q_end = torch.randint(0, 181, (60,))
    call.q_end[0], call.q_end[1] = 121, 122
    clean, clean_lse, _ = run(call, gpu)
    cache = getattr(call, which).clone()
    cache[0, 0, 121] = bad
    cache[0, :, 155] = bad
    out, lse, _ = run(replace(call, **{which: cache}), gpu)
    touched = torch.zeros(60, 4, dtype=torch.bool)
    touched[:20, :2] = (call.q_end[:20] > 121)[:, None]
    assert torch.equal(out[~touched], clean[~touched]) and torch.equal(lse[~touched], clean_lse[~touched])


def test_faults_set_status_and_give_zeros():
    call = build(counts=(2, 2, 2, 2, 2, 2, 2), segs=((0, 10),), rows=3, dtype=torch.bfloat16)
    call.kv_row = torch.tensor([0, 3, -2, -1, 1, 2, 0])
    call.seg[4], call.seg[5] = torch.tensor([60, 5]), torch.tensor([-1, 3])
    call.status = torch.full((7,), int(Status.NAN), dtype=torch.int32)
    out, lse, status = run(call, gpu)
    row, segment, kept = Status.BAD_ROW | Status.NAN, Status.BAD_SEGMENT | Status.NAN, Status.NAN
    assert status.tolist() == [kept, row, row, kept, segment, segment, kept]
    assert (out[2:12] == 0).all() and torch.isneginf(lse[2:12]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_captures_splits_and_replays_with_new_lengths(dtype):
    call = long_call(dtype)
    moved = [to_cuda(a) for a in call.args()]
    op = native("block_attention", "CUDA")
    op(*moved)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out, lse = op(*moved)
    for seg in (call.seg, torch.tensor([[[5, 64], [100, 3]]]).expand(5, 2, 2)):
        moved[5].copy_(seg)
        moved[6].copy_(call.q_end)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        want, want_lse = op(*moved)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_memory_beyond_2_to_the_31_elements(six_gb_of_gpu_memory):
    keys, heads = 1 << 19, 33  # 33 x 2^19 x 128 elements of K
    k = torch.zeros(1, heads, keys, 128, device="cuda", dtype=torch.bfloat16)
    k[0, -1, -64:] = torch.randn(64, 128, device="cuda").bfloat16()
    q = torch.randn(4, heads, 128, device="cuda").bfloat16()
    cu, row, seg = (torch.tensor(x, device="cuda") for x in ([0, 4], [0], [[[keys - 64, 64]]]))
    out, lse = native("block_attention", "CUDA")(q, k, k, cu, row, seg, None, None, 0.1)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, -1].float(), k[0, -1, -64:].float(), k[0, -1, -64:].float(), scale=0.1)
    torch.testing.assert_close(out[:, -1].float(), want, rtol=0, atol=0.02)
    assert (out[:, :-1] == 0).all()
