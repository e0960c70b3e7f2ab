"""Calls of block_attention and what they must give, for the CPU kernel, the CUDA kernels on emulated warps and those on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from strided import relayout
from unmask import reference
from unmask.reference.block_attention import attend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}  # of outputs of size ~1


@dataclass
class Call:
    """The op's arguments, in order."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_q: torch.Tensor
    kv_row: torch.Tensor
    seg: torch.Tensor
    q_end: torch.Tensor | None
    mask: torch.Tensor | None
    scale: float
    status: torch.Tensor | None = None

    def args(self) -> tuple:
        return tuple(getattr(self, f.name) for f in fields(self))


def build(counts=(5, 7), heads=4, kv_heads=2, dim=16, rows=3, slots=64, segs=((0, 40), (50, 9)), dtype=torch.float32, seed=0) -> Call:
    """One entry per count, each with the segments `segs` of its own cache row."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    cu = torch.tensor([0, *counts]).cumsum(0)
    batch = len(counts)
    return Call(
        draw(int(cu[-1]), heads, dim),
        draw(rows, kv_heads, slots, dim),
        draw(rows, kv_heads, slots, dim),
        cu,
        torch.arange(batch) % max(rows, 1),
        torch.tensor(segs, dtype=torch.int64).reshape(1, -1, 2).repeat(batch, 1, 1),
        None,
        None,
        dim**-0.5,
    )


def run(call: Call, fn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    status = None if call.status is None else call.status.clone()
    out, lse = fn(*replace(call, status=status).args())
    return out, lse, status


def in_library(call: Call) -> torch.Tensor:
    """What torch's own attention gives for the call (q_end and mask as a boolean mask), entry by entry, in the call's dtype."""
    out = torch.zeros_like(call.q)
    group = call.q.shape[1] // call.k_cache.shape[1]
    for b, row in enumerate(call.kv_row.tolist()):
        begin, end = int(call.cu_q[b]), int(call.cu_q[b + 1])
        index = torch.cat([torch.arange(s, s + n) for s, n in call.seg[b].tolist()])
        k, v = (c[row][:, index].repeat_interleave(group, 0)[None] for c in (call.k_cache, call.v_cache))
        seen = torch.ones(end - begin, len(index), dtype=torch.bool)
        if call.q_end is not None:
            seen &= torch.arange(len(index)) < call.q_end[begin:end, None]
        if call.mask is not None:
            w = min(len(index), call.mask.shape[2])
            part = call.mask[b if call.mask.shape[0] > 1 else 0, : end - begin, call.mask.shape[2] - w :]
            seen[:, len(index) - w :] &= part
        q = call.q[begin:end].transpose(0, 1)[None]
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None], scale=call.scale)[0].transpose(0, 1)
        out[begin:end] = result.masked_fill(~seen.any(1)[:, None, None], 0.0)
    return out


def assert_exact_enough(call: Call, fn) -> None:
    """Error against float64 at most twice that of torch's attention in the same dtype, plus a floor."""
    exact, exact_lse = attend(*call.args(), wide=torch.float64)
    out, lse, _ = run(call, fn)
    assert out.dtype == call.q.dtype and out.is_contiguous() and lse.dtype == torch.float32 and torch.isfinite(out).all()
    error, theirs = (x.double().sub(exact).abs().max().item() if x.numel() else 0.0 for x in (out, in_library(call)))
    assert error <= 2 * theirs + FLOOR[call.q.dtype], (error, theirs)
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse))
    finite = torch.isfinite(exact_lse)
    torch.testing.assert_close(lse[finite].double(), exact_lse[finite], rtol=1e-5, atol=2e-5)


ODD_SIZES = [
    dict(counts=()),
    dict(counts=(0,)),
    dict(counts=(0, 3, 0)),
    dict(counts=(1,), heads=1, kv_heads=1, dim=8, slots=1, segs=((0, 1),)),
    dict(segs=((7, 0), (3, 5), (64, 0), (0, 0))),
    dict(segs=((0, 0),)),
    dict(segs=()),
    dict(segs=((60, 4), (0, 64), (10, 1), (10, 1))),  # out of order and repeated
    dict(counts=(33, 100), segs=((0, 64),)),
    dict(counts=(70,), heads=7, kv_heads=1),
    dict(heads=0),
    dict(dim=1024, counts=(2,)),
]  # of `build`


def random_ends(call: Call) -> torch.Tensor:
    keys = int(call.seg[0, :, 1].sum())
    return torch.randint(-1, keys + 3, (call.q.shape[0],))


def entry(call: Call, b: int) -> Call:
    begin, end = int(call.cu_q[b]), int(call.cu_q[b + 1])
    return replace(
        call,
        q=call.q[begin:end],
        cu_q=torch.tensor([0, end - begin]),
        kv_row=call.kv_row[b : b + 1],
        seg=call.seg[b : b + 1],
        q_end=None if call.q_end is None else call.q_end[begin:end],
        mask=None if call.mask is None or call.mask.shape[0] == 1 else call.mask[b : b + 1],
    )


@st.composite
def calls(draw, most_tokens: int = 9, most_slots: int = 130, most_dim: int = 48) -> Call:
    """Any call: rows that do not exist, empty and overlapping segments, ends, masks."""
    dtype = draw(st.sampled_from(DTYPES))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, most_tokens), max_size=3))
    slots, dim = draw(st.integers(1, most_slots)), 8 * draw(st.integers(1, most_dim // 8))
    call = build(counts, kv_heads * group, kv_heads, dim, 2, slots, (), dtype, draw(st.integers(0, 2**31)))
    batch, tokens = len(counts), sum(counts)
    cut = st.tuples(st.integers(0, slots), st.integers(0, slots)).map(lambda x: (min(x), max(x) - min(x)))
    segments = draw(st.integers(0, 3))
    lists = [draw(st.lists(cut, min_size=segments, max_size=segments)) for _ in range(batch)]
    call.seg = torch.tensor(lists, dtype=torch.int64).reshape(batch, segments, 2)
    call.kv_row = torch.tensor([draw(st.integers(-2, 2)) for _ in range(batch)], dtype=torch.int64)
    if draw(st.booleans()):
        ends = draw(st.lists(st.integers(-3, 3 * slots), min_size=tokens, max_size=tokens))
        call.q_end = torch.tensor(ends, dtype=torch.int64)
    if draw(st.booleans()):
        g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        call.mask = torch.rand(draw(st.sampled_from([1, batch])), most_tokens, draw(st.integers(0, 40)), generator=g) < 0.6
    call.status = torch.zeros(batch, dtype=torch.int32)
    return call


LAYOUTS = ("dense", "dense", "offset", "step", "gap", "transposed")


@st.composite
def layouts(draw) -> dict[str, str]:
    """A layout for every tensor of a call."""
    return {name: draw(st.sampled_from(LAYOUTS)) for name in ("q", "k_cache", "v_cache", "cu_q", "kv_row", "seg", "q_end", "mask", "status")}


def assert_matches_the_definition_at(call: Call, how: dict[str, str], fn) -> None:
    """fn on the call with its tensors laid out as `how` says, against the reference on the call itself."""
    expected, expected_lse, status = run(call, reference.block_attention)
    strided = replace(call)
    for name, layout in how.items():
        t = getattr(call, name)
        if t is not None and t.numel():
            setattr(strided, name, relayout(t, layout))
    out, lse = fn(*strided.args())
    assert out.is_contiguous() and torch.equal(strided.status, status)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=max(5e-6, 4 * torch.finfo(call.q.dtype).eps))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=3e-5)
