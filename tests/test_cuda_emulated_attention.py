"""The CUDA kernels of block_attention, run lane by lane on the CPU, against float64: the cases of test_op_block_attention.py and the cuts
of the work that only a GPU makes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import emulated
from attention_cases import (
    DTYPES,
    FLOOR,
    ODD_SIZES,
    Call,
    assert_exact_enough,
    assert_matches_the_definition_at,
    build,
    calls,
    entry,
    in_library,
    layouts,
    random_ends,
    run,
)
from unmask import reference
from unmask.ops import Status
from unmask.reference.block_attention import attend

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=["mma", "wgmma"], autouse=True)
def device(request):
    """Every test on a device whose few rows go to mma.sync tiles, and on one that has the Hopper kernel."""
    emulated.DEVICE = emulated.H200 if request.param == "wgmma" else emulated.MMA_ONLY
    yield request.param
    emulated.DEVICE = emulated.MMA_ONLY


def on_emulated_warps(**plan):
    return lambda *args: emulated.block_attention(*args, **plan)


def cut(call: Call, row_warps: int = 0, splits: int = 1, least: int = 64, cluster: bool = False, **more):
    """emulated.block_attention with another cut of the work than the plan's own (row_warps 0: the plan's tile)."""
    tokens, heads, dim = call.q.shape
    rows, kv_heads, slots, _ = call.k_cache.shape
    batch, segments = call.seg.shape[:2]
    plan = emulated.attention_plan(tokens, batch, heads, kv_heads, dim, slots, segments)
    if plan["wgmma"]:  # its tile is 64 rows
        row_warps, more["stages"] = 4, 2 + more.get("stages", 2)
    tile = 16 * row_warps if row_warps else plan["row_tile"]
    count = max(1, (tokens * heads // kv_heads + batch * (tile - 1)) // tile)
    blocks = count * kv_heads * splits
    padded, stages = 64 if dim <= 64 else 128, more.pop("stages", plan["stages"])
    shared = stages * 64 * padded * 2 + 256 if plan["wgmma"] else stages * 2 * 64 * padded * 2
    shared = max(shared, 64 * (padded + 8) * 4)
    return on_emulated_warps(
        row_warps=tile // 16, row_tile=tile, splits=splits, min_split_keys=least, tiles=count, blocks=blocks,
        cluster=cluster, partial_floats=0 if cluster else blocks * tile * (padded + 2), stages=stages, shared_bytes=shared, **more,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group"), [(8, 1), (24, 4), (64, 1), (64, 7), (96, 2), (128, 1), (128, 4), (128, 7), (136, 2)])
def test_matches_float64(dim, group, dtype):
    call = build(counts=(3, 12), heads=2 * group, kv_heads=2, dim=dim, slots=140, segs=((5, 70), (90, 41)), dtype=dtype)
    assert_exact_enough(call, on_emulated_warps())
    call.q_end = random_ends(call)
    assert_exact_enough(call, on_emulated_warps())
    call.mask = torch.rand(2, 12, 30) < 0.5
    assert_exact_enough(call, on_emulated_warps(eager=1))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("row_warps, stages", [(1, 2), (1, 3), (2, 3), (2, 4), (4, 4), (4, 2)])
@pytest.mark.parametrize("splits", [1, 4])
def test_any_cut_gives_the_same_result(dtype, row_warps, stages, splits):
    dim = 64 if stages == 3 else 128
    call = build(counts=(5, 40, 1), heads=4, kv_heads=2, dim=dim, rows=3, slots=420, segs=((3, 290), (300, 67)), dtype=dtype)
    call.seg[2] = torch.tensor([[0, 63], [70, 2]])
    call.q_end = random_ends(call)
    call.q_end[:3] = 10**9
    for eager in (0, 1, 2):
        fn = cut(call, row_warps, splits, stages=stages, eager=eager)
        assert_exact_enough(call, fn)
    if splits > 1:  # a cluster merges to the same bits as the workspace
        for a, b in zip(run(call, fn), run(call, cut(call, row_warps, splits, stages=stages, cluster=True)), strict=True):
            assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("dim", [64, 128])
def test_no_slot_is_filled_before_every_warp_has_read_it(dim):
    """Tiles that all rows see whole: nothing but the pipeline itself holds the warps together."""
    call = build(counts=(40,), heads=2, kv_heads=2, dim=dim, rows=1, slots=740, segs=((5, 170), (190, 541)), dtype=torch.bfloat16)
    for eager in (0, 1, 2):
        assert_exact_enough(call, cut(call, 4, stages=2, eager=eager))


@pytest.mark.parametrize("keys", [0, 1, 31, 33, 63, 64, 65, 257, 1025])
def test_lengths(keys):
    call = build(counts=(2, 3), heads=2, kv_heads=1, dim=64, rows=2, slots=1030, segs=((0, keys), (4, 0)), dtype=torch.bfloat16)
    assert_exact_enough(call, on_emulated_warps())
    assert_exact_enough(call, cut(call, 1, 4))


@pytest.mark.parametrize(
    "sizes",
    [
        *ODD_SIZES,
        dict(counts=tuple([1] * 70), rows=70, slots=20, segs=((0, 11), (12, 3))),  # more entries than one step of the scan
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(sizes, dtype):
    call = build(dtype=dtype, **sizes)
    out, lse, _ = run(call, on_emulated_warps())
    expected, expected_lse = reference.block_attention(*call.args())
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=max(4e-6, 2 * torch.finfo(dtype).eps))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-5)


@given(calls(), layouts())
@settings(max_examples=200)
def test_any_call_at_any_layout(call, how):
    assert_matches_the_definition_at(call, how, emulated.block_attention)


@pytest.mark.parametrize("dtype", HALF)
def test_segments_in_any_order_and_next_to_each_other(dtype):
    """Tiles that are boxes of neighbouring slots: segments that continue each other, that go back, that end at the cache's end."""
    for segs in (((0, 64), (64, 70), (134, 6)), ((100, 40), (0, 40)), ((76, 64), (0, 0), (10, 1), (11, 1)), ((139, 1), (139, 1))):
        call = build(counts=(4, 9), heads=4, kv_heads=2, dim=72, slots=140, segs=segs, dtype=dtype)
        assert_exact_enough(call, on_emulated_warps())
        assert_exact_enough(call, cut(call, 1, 2, eager=1))


@pytest.mark.parametrize("dtype", HALF)
def test_batch_invariant_rows(dtype):
    """With batch_invariant=True an entry has the same bits alone, batched and padded; splits follow from its own keys."""
    fixed = on_emulated_warps(batch_invariant=True)
    call = build((1, 20, 0, 5), 4, 2, 64, 3, 4400, ((3, 1100), (1110, 3190)), dtype)
    call.seg[3] = torch.tensor([[0, 33], [40, 17]])
    call.q_end = random_ends(call)
    call.mask = torch.rand(4, 20, 50) < 0.7
    assert emulated.attention_plan(26, 4, 4, 2, 64, 4400, 2, batch_invariant=True)["splits"] > 1
    assert_exact_enough(call, fixed)
    out, lse, _ = run(call, fixed)
    roomy = replace(  # more slots and an empty segment more: another capacity, the same keys
        call,
        k_cache=torch.cat((call.k_cache, call.k_cache), 2),
        v_cache=torch.cat((call.v_cache, call.v_cache), 2),
        seg=torch.cat((call.seg, torch.zeros(4, 1, 2, dtype=torch.int64)), 1),
    )
    assert torch.equal(run(roomy, fixed)[0], out)
    for b in range(4):
        begin, end = int(call.cu_q[b]), int(call.cu_q[b + 1])
        part = run(entry(call, b), fixed)
        assert torch.equal(part[0], out[begin:end]) and torch.equal(part[1], lse[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_uncovered_tokens_are_zeroed(dtype):
    call = build((2, 3, 2), 4, 2, 64, 3, 100, ((0, 90),), dtype)
    pad = torch.full((4, *call.q.shape[1:]), float("nan"), dtype=dtype)
    for rows in ([0, 1, 2], [0, -1, 2], [-1, 1, 9], [-1, -1, -1]):
        padded = replace(call, q=torch.cat((pad, call.q, pad)), cu_q=call.cu_q + 4, kv_row=torch.tensor(rows), status=torch.zeros(3, dtype=torch.int32))
        out, lse, status = run(padded, on_emulated_warps())
        want, want_lse, want_status = run(padded, reference.block_attention)
        assert torch.equal(torch.isinf(lse), torch.isinf(want_lse)) and torch.equal(status, want_status)
        assert (out[torch.isinf(lse)] == 0).all()
        torch.testing.assert_close(out.float(), want.float(), rtol=0, atol=max(4e-6, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_invalid_cache_row_reaches_only_its_readers(which, bad, dtype):
    for dim, row_warps in ((24, 2), (64, 4), (128, 1)):
        call = build(counts=(20, 40), heads=4, dim=dim, slots=200, segs=((0, 150), (160, 20)), dtype=dtype)
        fn = cut(call, row_warps) if dtype in HALF else on_emulated_warps()
        call.q_end = torch.randint(0, 181, (60,))
        call.q_end[0], call.q_end[1] = 121, 122
        call.mask = torch.rand(2, 40, 20) < 0.5
        clean, clean_lse, _ = run(call, fn)
        cache = getattr(call, which).clone()
        cache[0, 0, 121] = bad
        cache[0, :, 155] = bad  # a slot in no segment
        cache[1, 1, 179, 3] = bad
        out, lse, _ = run(replace(call, **{which: cache}), fn)
        touched = torch.zeros(60, 4, dtype=torch.bool)
        touched[:20, :2] = (call.q_end[:20] > 121)[:, None]
        touched[20:, 2:] = ((call.q_end[20:] > 169) & call.mask[1, :, 19])[:, None]
        assert torch.equal(out[~touched], clean[~touched]) and torch.equal(lse[~touched], clean_lse[~touched])
        assert touched.any() and not touched[0].any() and touched[1].any()
        if math.isnan(bad):
            assert out[touched].isnan().any(-1).all()
            assert which == "v_cache" or lse[touched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_whose_scores_are_all_minus_infinity_is_zero(dtype):
    call = build(counts=(3,), heads=2, kv_heads=1, dim=64, rows=1, slots=100, segs=((0, 100),), dtype=dtype)
    call.q = call.q.abs() + 0.1
    call.k_cache.fill_(-math.inf)
    call.v_cache[0, 0, 7] = math.nan
    for fn in (on_emulated_warps(), cut(call, 2, 4, cluster=True)) if dtype in HALF else (on_emulated_warps(),):
        out, lse, _ = run(call, fn)
        assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 30.0, 1000.0])
def test_scales_and_large_scores(scale, dtype):
    call = build(dtype=dtype, dim=64)
    call.scale = scale
    out, lse, _ = run(call, on_emulated_warps())
    exact, exact_lse = attend(*call.args(), wide=torch.float64)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=3e-5)
    error = (out.double() - exact).abs().max().item()
    assert error <= 2 * (in_library(call).double() - exact).abs().max().item() + max(FLOOR[dtype], 4e-6 * abs(scale))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_faults_set_status_and_give_zeros(dtype):
    call = build(counts=(2, 2, 2, 2, 2, 2, 2), segs=((0, 10),), rows=3, dtype=dtype)
    call.kv_row = torch.tensor([0, 3, -2, -1, 1, 2, 0])
    call.seg[4], call.seg[5] = torch.tensor([60, 5]), torch.tensor([-1, 3])
    call.status = torch.full((7,), int(Status.NAN), dtype=torch.int32)
    out, lse, status = run(call, on_emulated_warps())
    row, segment, kept = Status.BAD_ROW | Status.NAN, Status.BAD_SEGMENT | Status.NAN, Status.NAN
    assert status.tolist() == [kept, row, row, kept, segment, segment, kept]
    assert (out[2:12] == 0).all() and torch.isneginf(lse[2:12]).all()
    assert (out[:2] != 0).any() and (out[12:] != 0).any()


@pytest.mark.parametrize(
    ("offsets", "bad"),
    [
        ([0, 5, 3, 6, 8], [1, 2]),
        ([-1, 2, 4, 6, 8], [0]),
        ([0, 2, 4, 9, 8], [2, 3]),
        ([0, 2**62, 4, 6, 8], [0, 1, 2, 3]),
        ([2, 3, 3, 5, 7], []),
    ],
)
def test_bad_offsets(offsets, bad):
    call = replace(build(counts=(2, 2, 2, 2), dtype=torch.bfloat16), cu_q=torch.tensor(offsets), status=torch.zeros(4, dtype=torch.int32))
    expected, expected_lse, expected_status = run(call, reference.block_attention)
    out, lse, status = run(call, on_emulated_warps())
    assert status.tolist() == [int(Status.BAD_SEGMENT) if b in bad else 0 for b in range(4)] == expected_status.tolist()
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=0.016)
    torch.testing.assert_close(lse, expected_lse)
