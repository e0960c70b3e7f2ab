"""decoder_layer: the bits of the parts it stands for, close to the definition, faults and padding as in the parts, nothing written on errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from unmask import ops, reference
from unmask.ops import Status
from unmask.ops.decoder_layer import packed_products_available
from unmask.ops.linear import Linear, packing_available

pytestmark = pytest.mark.skipif(not packing_available(torch.float32), reason="this torch has no packed weights")

DTYPES = [d for d in (torch.float32, torch.bfloat16) if packing_available(d)]


def kernel(*args):
    return native("decoder_layer", "MkldnnCPU")(*args)


def test_available():
    """Fails where torch packs weights but hides their product from C++: the decoder would be slower, and silently so."""
    assert packed_products_available()


@dataclass
class Call:
    """The op's arguments, in order; products as ordinary weights [N, K]."""

    x: torch.Tensor
    residual: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    inv_freq: torch.Tensor
    row: torch.Tensor
    pos: torch.Tensor
    slot: torch.Tensor
    cu_q: torch.Tensor
    kv_row: torch.Tensor
    seg: torch.Tensor
    q_end: torch.Tensor | None
    mask: torch.Tensor | None
    eps: float
    scale: float
    token_status: torch.Tensor | None
    entry_status: torch.Tensor | None

    def args(self) -> tuple:
        return tuple(getattr(self, f.name) for f in fields(self))

    def fresh(self) -> Call:
        """The same call on its own copies of what it writes."""
        written = ("residual", "k_cache", "v_cache", "token_status", "entry_status")
        return replace(self, **{n: t.clone() for n in written if (t := getattr(self, n)) is not None})

    def packed(self) -> Call:
        names = [n for n in ("qkv", "o", "gate_up", "down") if getattr(self, n) is not None]
        return replace(self, **{n: Linear(getattr(self, n), "packed").packed_weight for n in names})


def build(
    sizes=(5, 3), padding=8, width=24, heads=4, kv_heads=2, dim=8, inner=20, slots=16, dtype=torch.float32, bias=False, norm=False, dense=True,
    q_end=False, mask=False, seed=0,
) -> Call:  # fmt: skip
    """Entries of `sizes` tokens at the positions from 4 on, each seeing its row's first slots, then padding."""
    g = torch.Generator().manual_seed(seed)
    tokens, batch = sum(sizes), len(sizes)
    total = tokens + padding

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    row = torch.tensor([b for b, n in enumerate(sizes) for _ in range(n)] + [-1] * padding, dtype=torch.int64)
    pos = torch.tensor([4 + i for n in sizes for i in range(n)] + [0] * padding, dtype=torch.int64)
    fused = (heads + 2 * kv_heads) * dim
    return Call(
        draw(total, width), draw(total, width), draw(batch, kv_heads, slots, dim), draw(batch, kv_heads, slots, dim),
        draw(fused, width, scale=width**-0.5), draw(fused) if bias else None, draw(width, heads * dim, scale=0.2),
        draw(2 * inner, width, scale=width**-0.5) if dense else None, draw(width, inner, scale=0.2) if dense else None,
        draw(width), draw(width), draw(dim) if norm else None, draw(dim) if norm else None,
        10000.0 ** (-torch.arange(dim // 2) / (dim // 2)).float(), row, pos, pos.clone(),
        torch.tensor([0, *sizes]).cumsum(0), torch.arange(batch),
        torch.tensor([[[0, 4 + n]] for n in sizes], dtype=torch.int64).view(batch, 1, 2),
        pos + 1 if q_end else None, torch.rand(batch, max(sizes, default=1), 2, generator=g) < 0.7 if mask else None,
        1e-5, dim**-0.5, torch.zeros(total, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32),
    )  # fmt: skip


def parts(c: Call) -> torch.Tensor:
    """The ops and the packed product one by one, on ordinary weights."""
    kv_heads, dim = c.k_cache.shape[1], c.k_cache.shape[3]
    heads = c.o.shape[1] // dim
    y = ops.add_rms_norm(c.residual, c.x, c.attn_norm, c.eps)
    q, k, v = Linear(c.qkv, "packed", c.qkv_bias)(y).view(-1, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
    q = ops.rope_append(q, k, v, c.k_cache, c.v_cache, c.row, c.pos, c.slot, None, c.q_norm, c.k_norm, c.inv_freq, c.eps, c.token_status)
    a, _ = ops.block_attention(q, c.k_cache, c.v_cache, c.cu_q, c.kv_row, c.seg, c.q_end, c.mask, c.scale, c.entry_status)
    y = ops.add_rms_norm(c.residual, Linear(c.o, "packed")(a.flatten(1)), c.mlp_norm, c.eps)
    return y if c.gate_up is None else Linear(c.down, "packed")(ops.silu_mul(Linear(c.gate_up, "packed")(y)))


def run(call: Call, fn) -> tuple[torch.Tensor, ...]:
    """(branch, residual, caches, statuses), rows of padding left out."""
    call = call.fresh()
    out = fn(call)
    live = torch.nonzero(call.row != -1)
    n = int(live.max()) + 1 if live.numel() else 0
    return out[:n], call.residual[:n], call.k_cache, call.v_cache, call.token_status, call.entry_status


def ours(call: Call) -> torch.Tensor:
    packed = call.packed()
    before = packed.residual.clone()
    out = kernel(*packed.args())
    live = torch.nonzero(call.row != -1)
    n = int(live.max()) + 1 if live.numel() else 0
    assert out.shape == call.x.shape and out.dtype == call.x.dtype
    assert bool((out[n:] == 0).all()) and torch.equal(packed.residual[n:], before[n:])
    return out


def assert_same_bits(call: Call) -> None:
    for a, b in zip(run(call, ours), run(call, parts), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(bias=True), dict(norm=True), dict(dense=False), dict(dense=False, bias=True, norm=True), dict(q_end=True), dict(mask=True),
        dict(sizes=(16,), padding=0), dict(sizes=(1,), padding=15, heads=1, kv_heads=1), dict(sizes=(), padding=16),
        dict(sizes=(32, 32, 5), padding=11, width=512, heads=8, kv_heads=2, dim=64, inner=1536, slots=48, bias=True, norm=True),
    ],
    ids=str,
)  # fmt: skip
def test_the_bits_of_the_parts(options, dtype):
    assert_same_bits(build(dtype=dtype, **options))


@given(st.data())
def test_any_call(data):
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    sizes = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    call = build(
        sizes=sizes, padding=-sum(sizes) % 16 + 16 * draw(st.integers(0, 1)), width=draw(st.sampled_from([8, 24, 40])), kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3)), dim=draw(st.sampled_from([8, 16])), inner=draw(st.sampled_from([4, 20, 32])),
        dtype=draw(st.sampled_from(DTYPES)), bias=draw(st.booleans()), norm=draw(st.booleans()), dense=draw(st.booleans()),
        q_end=draw(st.booleans()), mask=draw(st.booleans()) and bool(sizes), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
    for name, low, high in (("row", -2, 4), ("slot", -2, 18), ("pos", -1, 50), ("kv_row", -2, 4)):  # faults too
        values = getattr(call, name)
        if values.numel() and draw(st.booleans()):
            values[draw(st.integers(0, values.numel() - 1))] = draw(st.integers(low, high))
    if call.seg.numel() and draw(st.booleans()):
        call.seg[draw(st.integers(0, len(sizes) - 1)), 0, draw(st.integers(0, 1))] = draw(st.integers(-1, 20))
    assert_same_bits(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(bias=True, norm=True), dict(dense=False), dict(q_end=True, mask=True)], ids=str)
def test_close_to_the_definition(options, dtype):
    call = build(dtype=dtype, **options)
    step = 64 * torch.finfo(dtype).eps
    for a, b in zip(run(call, ours), run(call, lambda c: reference.decoder_layer(*c.args())), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            assert (a.double() - b.double()).abs().max() <= step * max(1.0, b.double().abs().max())
        else:
            assert torch.equal(a, b)


def test_a_row_has_the_same_bits_in_any_batch_and_thread_count(threads):
    call = build(sizes=(7, 4, 9), padding=12, norm=True, bias=True, seed=3)
    threads(1)
    whole = run(call, ours)
    threads(2)
    assert all(torch.equal(a, b) for a, b in zip(run(call, ours), whole, strict=True))
    own = slice(7, 11)
    alone = replace(
        call, x=torch.cat([call.x[own], torch.zeros(12, 24)]), residual=torch.cat([call.residual[own], torch.zeros(12, 24)]),
        **{n: torch.cat([getattr(call, n)[own], torch.full((12,), -1 if n == "row" else 0)]) for n in ("row", "pos", "slot")},
        cu_q=torch.tensor([0, 4]), kv_row=torch.tensor([1]), seg=call.seg[1:2], token_status=None, entry_status=None,
    )  # fmt: skip
    out, residual, k_cache, v_cache, *_ = run_without_status(alone)
    assert torch.equal(out, whole[0][own]) and torch.equal(residual, whole[1][own])
    assert torch.equal(k_cache[1], whole[2][1]) and torch.equal(v_cache[1], whole[3][1])


def run_without_status(call: Call) -> tuple[torch.Tensor, ...]:
    call = call.fresh()
    out = ours(call)
    n = int(torch.nonzero(call.row != -1).max()) + 1
    return out[:n], call.residual[:n], call.k_cache, call.v_cache


def test_faults_are_reported_where_they_are():
    call = build()
    call.row[1], call.slot[2], call.kv_row[1] = 9, 99, 7
    *_, token_status, entry_status = run(call, ours)
    assert token_status.tolist() == [0, int(Status.BAD_ROW), int(Status.BAD_SLOT), *[0] * 13]
    assert entry_status.tolist() == [0, int(Status.BAD_ROW)]


def test_entries_without_tokens_have_a_status():
    call = build(sizes=(0,), padding=0)
    call.kv_row[0] = 3
    assert run(call, ours)[-1].tolist() == [int(Status.BAD_ROW)]


def ordinary(call: Call, name: str) -> torch.Tensor:
    return getattr(build(), name)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=lambda c: c.x.half()), "x must be float32 or bfloat16 on the CPU, got float16"),
        (dict(x=lambda c: c.x[:, :-1]), "residual must be [T, d] = [16, 23], got [16, 24]"),
        (dict(x=lambda c: c.x.T.contiguous().T), "x must be dense in its last dimension, got stride 16"),
        (dict(residual=lambda c: c.residual[:1].expand(16, 24)), "residual must be without expanded dimensions (it is written), got stride 0 in dimension 0"),
        (dict(residual=lambda c: c.residual.double()), "residual must be float32, got float64"),
        (dict(qkv=lambda c: ordinary(c, "qkv")), "qkv must be packed by oneDNN (torch.ops.mkldnn._reorder_linear_weight), got an ordinary tensor"),
        (dict(qkv=lambda c: c.gate_up), "qkv must be [(Hq + 2 Hkv) D, d] = [64, 24], got [40, 24]"),
        (dict(o=lambda c: c.down), "o must be [d, Hq D] with Hq a multiple of Hkv = 2 and D = 8, got [24, 20]"),
        (dict(down=lambda c: None), "down must be given with gate_up, got None"),
        (dict(gate_up=lambda c: c.qkv), "gate_up must be [2 F, d] = [40, 24], got [64, 24]"),
        (dict(qkv_bias=lambda c: torch.zeros(63)), "qkv_bias must be [(Hq + 2 Hkv) D] = [64], got [63]"),
        (dict(attn_norm=lambda c: c.attn_norm.bfloat16()), "attn_norm must be float32, got bfloat16"),
        (dict(k_norm=lambda c: torch.zeros(7)), "k_norm must be [D] = [8], got [7]"),
        (dict(inv_freq=lambda c: torch.zeros(5)), "inv_freq must be [F] with 2F <= D = 8, got [5]"),
        (dict(row=lambda c: c.row.int()), "row must be int64, got int32"),
        (dict(pos=lambda c: c.pos[:3]), "pos must be [T] = [16], got [3]"),
        (dict(cu_q=lambda c: c.cu_q[:2]), "cu_q must be [B + 1] = [3], got [2]"),
        (dict(seg=lambda c: c.seg[..., :1]), "seg must be [B, G, 2] = [2, any, 2], got [2, 1, 1]"),
        (dict(mask=lambda c: torch.zeros(3, 5, 2, dtype=torch.bool)), "mask must be [B or 1, Qmax, W] = [2, any, any], got [3, 5, 2]"),
        (dict(v_cache=lambda c: c.v_cache[:, :, :3]), "v_cache must be [R, Hkv, S, D] = [2, 2, 16, 8], got [2, 2, 3, 8]"),
        (dict(eps=lambda c: float("nan")), "eps must be finite and >= 0, got nan"),
        (dict(scale=lambda c: float("inf")), "scale must be finite, got inf"),
        (dict(token_status=lambda c: c.token_status[:3]), "token_status must be [T] = [16], got [3]"),
        (dict(entry_status=lambda c: c.entry_status.long()), "entry_status must be int32, got int64"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)  # fmt: skip
def test_errors_write_nothing(change, message):
    call = build().packed()
    call = replace(call, **{name: make(call) for name, make in change.items()})
    before = call.fresh()
    with pytest.raises(RuntimeError, match=re.escape(f"decoder_layer: {message}")):
        kernel(*call.args())
    for name in ("residual", "k_cache", "v_cache"):
        assert torch.equal(getattr(call, name), getattr(before, name))


def test_all_ordinary_weights_reach_the_same_check():
    with pytest.raises(RuntimeError, match="o must be packed by oneDNN"):
        torch.ops.unmask.decoder_layer(*build().args())


def test_empty_and_fake():
    call = build(sizes=(), padding=0).packed()
    assert kernel(*call.args()).shape == (0, 24)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in build().args()]
        assert torch.ops.unmask.decoder_layer(*fake).shape == (16, 24)
