"""block_attention: against the definition and float64, any layout and segments, faults, NaN, batch and thread invariance."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention_cases
from attention_cases import (
    DTYPES,
    FLOOR,
    ODD_SIZES,
    Call,
    assert_matches_the_definition_at,
    build,
    calls,
    entry,
    in_library,
    layouts,
    random_ends,
)
from native import native
from strided import ALL_LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status
from unmask.reference.block_attention import attend

kernel = native("block_attention")


def run(call: Call, fn=kernel):
    return attention_cases.run(call, fn)


def assert_exact_enough(call: Call) -> None:
    attention_cases.assert_exact_enough(call, kernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "group"),
    [(8, 1), (16, 2), (16, 7), (24, 4), (40, 7), (64, 1), (64, 2), (64, 7), (96, 2), (128, 1), (128, 4), (128, 7), (136, 2)],
)
def test_matches_float64(dim, group, dtype):
    call = build(counts=(3, 12), heads=2 * group, kv_heads=2, dim=dim, slots=140, segs=((5, 70), (90, 41)), dtype=dtype)
    assert_exact_enough(call)
    call.q_end = random_ends(call)
    assert_exact_enough(call)
    call.mask = torch.rand(2, 12, 30) < 0.5
    assert_exact_enough(call)


@pytest.mark.parametrize("sizes", ODD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(sizes, dtype):
    call = build(dtype=dtype, **sizes)
    out, lse, _ = run(call)
    expected, expected_lse = reference.block_attention(*call.args())
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=max(4e-6, 2 * torch.finfo(dtype).eps))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-5)


@given(calls(), layouts())
def test_any_call_at_any_layout(call, how):
    assert_matches_the_definition_at(call, how, kernel)


@given(st.sampled_from(ALL_LAYOUTS), st.sampled_from(DTYPES), st.sampled_from([16, 64, 128]))
def test_a_layout_changes_no_bit(how, dtype, dim):
    call = build(counts=(3, 4), dim=dim, dtype=dtype)
    if how == "expanded":  # of dimension 0: every cache row and every token is the first
        same = replace(call, **{n: getattr(call, n)[:1].expand_as(getattr(call, n)).contiguous() for n in ("q", "k_cache", "v_cache")})
    else:
        same = call
    other = replace(call, **{n: relayout(getattr(call, n), how) for n in ("q", "k_cache", "v_cache")})
    for a, b in zip(run(same)[:2], run(other)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_keys_and_heads(dtype):
    call = build(dtype=dtype, dim=64)
    for view in (lambda c: c[:, :1].expand_as(c), lambda c: c[:, :, :1].expand_as(c), lambda c: c[..., :1].expand_as(c)):
        other = replace(call, k_cache=view(call.k_cache), v_cache=view(call.v_cache))
        dense = replace(call, k_cache=other.k_cache.contiguous(), v_cache=other.v_cache.contiguous())
        assert torch.equal(run(other)[0], run(dense)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_segments_are_joined_to_the_last_bit(dim, dtype):
    call = build(counts=(9,), dim=dim, slots=300, rows=1, segs=((0, 300),), dtype=dtype)
    for segs in (((0, 100), (100, 200)), ((0, 0), (0, 299), (299, 1), (5, 0)), ((0, 96), (96, 96), (192, 108))):
        part = replace(call, seg=torch.tensor([segs]))
        assert torch.equal(run(part)[0], run(call)[0]) and torch.equal(run(part)[1], run(call)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [2047, 2048, 2049, 4500])
def test_beyond_one_split(keys, dtype, threads):
    call = build(counts=(2,), heads=2, kv_heads=1, dim=64, rows=1, slots=keys, segs=((0, keys),), dtype=dtype)
    assert_exact_enough(call)
    threads(1)
    one = run(call)
    threads(2)  # few rows, many keys: splits run on their own
    assert torch.equal(run(call)[0], one[0]) and torch.equal(run(call)[1], one[1])
    call.q_end = torch.tensor([2, keys])  # the first token has seen nothing of the later splits
    assert_exact_enough(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (8, 2)])
def test_an_entry_gives_the_same_bits_alone_batched_padded_and_at_any_thread_count(heads, dtype, threads):
    call = build((1, 32, 0, 70, 5), *heads, 64, 3, 2300, ((3, 100), (110, 2180)), dtype)
    call.seg[3] = torch.tensor([[0, 33], [40, 17]])
    call.q_end = random_ends(call)
    call.mask = torch.rand(5, 70, 50) < 0.7
    threads(1)
    out, lse, _ = run(call)
    threads(2)
    assert torch.equal(run(call)[0], out) and torch.equal(run(call)[1], lse)
    for b in range(5):
        begin, end = int(call.cu_q[b]), int(call.cu_q[b + 1])
        part = run(entry(call, b))
        assert torch.equal(part[0], out[begin:end]) and torch.equal(part[1], lse[begin:end])
    # the same tokens with padding tokens behind, before and an entry of padding between
    pad = torch.full((4, *call.q.shape[1:]), float("nan"), dtype=dtype)
    ends = torch.full((4,), 10**12)
    padded = replace(
        call,
        q=torch.cat((pad, call.q, pad)),
        cu_q=torch.cat((call.cu_q + 4, call.cu_q[-1:] + 6)),
        kv_row=torch.cat((call.kv_row, torch.tensor([-1]))),
        seg=torch.cat((call.seg, torch.tensor([[[0, 2300], [0, 0]]]))),
        q_end=torch.cat((ends, call.q_end, ends)),
        mask=torch.cat((call.mask, call.mask[:1])),
    )
    wide_out, wide_lse, _ = run(padded)
    assert torch.equal(wide_out[4:-4], out) and torch.equal(wide_lse[4:-4], lse)
    for edge in (slice(0, 4), slice(-4, None)):
        assert (wide_out[edge] == 0).all() and torch.isneginf(wide_lse[edge]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_any_row_tile(dtype):
    call = build(counts=(300,), heads=2, kv_heads=1, dim=64, rows=1, slots=200, segs=((0, 200),), dtype=dtype)
    out, lse, _ = run(call)
    for begin, end in ((0, 1), (17, 50), (255, 300)):
        part = run(replace(call, q=call.q[begin:end], cu_q=torch.tensor([0, end - begin])))
        assert torch.equal(part[0], out[begin:end]) and torch.equal(part[1], lse[begin:end])


def test_mask_covers_the_last_keys():
    call = build(counts=(6, 4), segs=((0, 3), (20, 5)))  # n = 8
    for width in (0, 1, 8, 20):
        for shared in (True, False):
            call.mask = torch.rand(1 if shared else 2, 6, width) < 0.5
            assert_exact_enough(call)
    call.mask = torch.zeros(1, 6, 8, dtype=torch.bool)  # sees nothing
    out, lse, _ = run(call)
    assert (out == 0).all() and torch.isneginf(lse).all()
    call.mask[:, :, 3] = True  # exactly one key
    index = 20  # the fourth of the joined keys
    out, lse, _ = run(call)
    expected = call.v_cache[0, :, index].repeat_interleave(2, 0)
    torch.testing.assert_close(out[:6], expected.expand(6, -1, -1))


def test_block_causal_and_token_causal_ends():
    call = build(counts=(200,), dim=64, rows=1, slots=200, segs=((0, 200),))
    for ends in (torch.arange(200) + 1, (torch.arange(200) // 32 + 1) * 32):
        call.q_end = ends
        assert_exact_enough(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 30.0, 1000.0])
def test_scales_and_large_scores(scale, dtype):
    call = build(dtype=dtype, dim=64)
    call.scale = scale
    out, lse, _ = run(call)
    exact, exact_lse = attend(*call.args(), wide=torch.float64)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-5)
    error = (out.double() - exact).abs().max().item()
    # scores of 1e4 carry an absolute rounding error of ~1e-3, and so do weights and the library's output
    assert error <= 2 * (in_library(call).double() - exact).abs().max().item() + max(FLOOR[dtype], 4e-6 * abs(scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_invalid_cache_row_reaches_only_its_readers(which, bad, dtype):
    for dim in (24, 64):
        call = build(counts=(20, 40), heads=4, dim=dim, slots=200, segs=((0, 150), (160, 20)), dtype=dtype)
        call.q_end = torch.randint(0, 181, (60,))
        call.q_end[0], call.q_end[1] = 121, 122
        call.mask = torch.rand(2, 40, 20) < 0.5
        clean, clean_lse, _ = run(call)
        cache = getattr(call, which).clone()
        cache[0, 0, 121] = bad  # key 121 of entry 0, kv head 0 = query heads 0 and 1
        cache[0, :, 155] = bad  # a slot in no segment
        cache[1, 1, 179, 3] = bad  # key 169 of entry 1, one element, kv head 1, the mask's last column
        out, lse, _ = run(replace(call, **{which: cache}))
        touched = torch.zeros(60, 4, dtype=torch.bool)
        touched[:20, :2] = (call.q_end[:20] > 121)[:, None]
        touched[20:, 2:] = ((call.q_end[20:] > 169) & call.mask[1, :, 19])[:, None]
        assert torch.equal(out[~touched], clean[~touched]) and torch.equal(lse[~touched], clean_lse[~touched])
        assert touched.any() and not touched[0].any() and touched[1].any()
        if math.isnan(bad):
            assert out[touched].isnan().any(-1).all()
            assert which == "v_cache" or lse[touched].isnan().all()


def test_faults_set_status_and_give_zeros():
    call = build(counts=(2, 2, 2, 2, 2, 2, 2), segs=((0, 10),), rows=3)
    call.kv_row = torch.tensor([0, 3, -2, -1, 1, 2, 0])
    call.seg[4], call.seg[5] = torch.tensor([60, 5]), torch.tensor([-1, 3])
    call.status = torch.full((7,), int(Status.NAN), dtype=torch.int32)
    for fn in (kernel, reference.block_attention):
        out, lse, status = run(call, fn)
        row, segment, kept = Status.BAD_ROW | Status.NAN, Status.BAD_SEGMENT | Status.NAN, Status.NAN
        assert status.tolist() == [kept, row, row, kept, segment, segment, kept]
        assert (out[2:12] == 0).all() and torch.isneginf(lse[2:12]).all()
        assert (out[:2] != 0).any() and (out[12:] != 0).any()
    assert torch.equal(run(replace(call, status=None))[0], run(call)[0])


@pytest.mark.parametrize(
    ("cu", "bad"),
    [
        ([0, 5, 3, 6, 8], [1, 2]),  # the third begins below an earlier offset: its tokens would have two owners
        ([-1, 2, 4, 6, 8], [0]),
        ([0, 2, 4, 9, 8], [2, 3]),
        ([0, 2**62, 4, 6, 8], [0, 1, 2, 3]),
        ([2, 3, 3, 5, 7], []),
    ],
)
def test_bad_offsets(cu, bad):
    call = replace(build(counts=(2, 2, 2, 2)), cu_q=torch.tensor(cu), status=torch.zeros(4, dtype=torch.int32))
    expected, expected_lse, expected_status = run(call, reference.block_attention)
    out, lse, status = run(call)
    assert status.tolist() == [int(Status.BAD_SEGMENT) if b in bad else 0 for b in range(4)] == expected_status.tolist()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_segments_that_overflow_and_masks_that_are_too_short():
    big = 2**63 - 1
    call = build(counts=(2, 3, 3), segs=((0, 10), (0, 0)))
    call.seg[0, 1] = torch.tensor([big, big])
    call.seg[1, 1] = torch.tensor([1, big])
    call.mask = torch.ones(1, 2, 4, dtype=torch.bool)
    call.status = torch.zeros(3, dtype=torch.int32)
    assert run(call)[2].tolist() == [int(Status.BAD_SEGMENT)] * 3
    assert (run(call)[0] == 0).all()


base = build()
ERRORS = [
    (dict(q=base.q.double()), "q must be float32, bfloat16 or float16, got float64"),
    (dict(k_cache=base.k_cache.half()), "k_cache must be float32, got float16"),
    (dict(v_cache=base.v_cache.bfloat16()), "v_cache must be float32, got bfloat16"),
    (dict(cu_q=base.cu_q.int()), "cu_q must be int64, got int32"),
    (dict(kv_row=base.kv_row.int()), "kv_row must be int64, got int32"),
    (dict(seg=base.seg.int()), "seg must be int64, got int32"),
    (dict(q_end=torch.zeros(12)), "q_end must be int64, got float32"),
    (dict(mask=torch.zeros(1, 7, 3)), "mask must be bool, got float32"),
    (dict(status=torch.zeros(2, dtype=torch.int64)), "status must be int32, got int64"),
    (dict(q=base.q[0]), "q must be [T, Hq, D] = [any, any, any], got [4, 16]"),
    (dict(k_cache=base.k_cache[..., :8]), "k_cache must be [R, Hkv, S, D] = [any, any, any, 16], got [3, 2, 64, 8]"),
    (dict(v_cache=base.v_cache[:, :, :9]), "v_cache must be [R, Hkv, S, D] = [3, 2, 64, 16], got [3, 2, 9, 16]"),
    (dict(kv_row=base.kv_row[None]), "kv_row must be [B] = [any], got [1, 2]"),
    (dict(cu_q=base.cu_q[:2]), "cu_q must be [B + 1] = [3], got [2]"),
    (dict(seg=base.seg[:1]), "seg must be [B, G, 2] = [2, any, 2], got [1, 2, 2]"),
    (dict(q_end=torch.zeros(5, dtype=torch.int64)), "q_end must be [T] = [12], got [5]"),
    (
        dict(mask=torch.ones(3, 7, 2, dtype=torch.bool)),
        "mask must be [B or 1, Qmax, W] = [2, any, any], got [3, 7, 2]",
    ),
    (dict(status=torch.zeros(3, dtype=torch.int32)), "status must be [B] = [2], got [3]"),
    (
        {n: getattr(base, n)[..., :12] for n in ("q", "k_cache", "v_cache")},
        "D must be a multiple of 8 in [8, 1024], got 12",
    ),
    (
        {n: torch.zeros(*getattr(base, n).shape[:-1], 1032) for n in ("q", "k_cache", "v_cache")},
        "D must be a multiple of 8 in [8, 1024], got 1032",
    ),
    (dict(q=base.q[:, :3]), "Hq must be a multiple of Hkv = 2, got 3"),
    (dict(scale=math.inf), "scale must be finite, got inf"),
    (
        dict(status=torch.zeros(1, dtype=torch.int32).expand(2)),
        "status must be without expanded dimensions (it is written), got stride 0 in dimension 0",
    ),
]


@pytest.mark.parametrize(("change", "text"), ERRORS)
def test_errors(change, text):
    call = replace(build(), **change)
    for fn in (kernel, reference.block_attention, ops.block_attention):
        with pytest.raises(RuntimeError, match=re.escape(f"block_attention: {text}")):
            fn(*call.args())


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full):
    call = build()
    if full:
        call.q_end, call.mask = random_ends(call), torch.rand(2, 7, 5) < 0.5
        call.status = torch.zeros(2, dtype=torch.int32)
    torch.library.opcheck(kernel.default, call.args())


def test_compiles_without_graph_breaks():
    call = replace(build(dtype=torch.bfloat16), status=torch.zeros(2, dtype=torch.int32))
    compiled = torch.compile(lambda *args: ops.block_attention(*args)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*call.args()), run(call)[0] * 2)
