"""rope_append: against the definition and float64, any layout, in-place cache writes, faults, batch and thread invariance."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
kernel = native("rope_append")


@dataclass
class Call:
    """The op's arguments, in order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    row: torch.Tensor
    pos: torch.Tensor
    slot: torch.Tensor
    v_slot: torch.Tensor | None
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    inv_freq: torch.Tensor
    eps: float
    status: torch.Tensor | None

    def args(self) -> tuple:
        return tuple(getattr(self, f.name) for f in fields(self))

    def fresh(self) -> Call:
        """The same call on its own caches and status (layouts kept by the caller where they matter)."""
        status = None if self.status is None else self.status.clone()
        return replace(self, k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone(), status=status)


def build(tokens=6, heads=4, kv_heads=2, dim=16, freqs=None, rows=3, slots=11, dtype=torch.float32, norm=False, seed=0) -> Call:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    freqs = dim // 2 if freqs is None else freqs
    return Call(
        draw(tokens, heads, dim),
        draw(tokens, kv_heads, dim),
        draw(tokens, kv_heads, dim),
        draw(rows, kv_heads, slots, dim),
        draw(rows, kv_heads, slots, dim),
        torch.randint(0, rows, (tokens,), generator=g) if rows else torch.full((tokens,), -1),
        torch.randint(0, 4096, (tokens,), generator=g),
        torch.randint(0, slots, (tokens,), generator=g) if slots else torch.full((tokens,), -1),
        None,
        draw(dim) if norm else None,
        draw(dim) if norm else None,
        10000.0 ** (-torch.arange(freqs) / max(freqs, 1)).float(),
        1e-5,
        torch.zeros(tokens, dtype=torch.int32),
    )


def run(call: Call, fn=kernel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    call = call.fresh()
    out = fn(*call.args())
    return out, call.k_cache, call.v_cache, call.status


def assert_same_within_rounding(ours, theirs, dtype, norm):
    """V and status equal; K and q equal up to a flipped last bit (fp32: a few, from the order of the sum in the norm)."""
    steps = 8 if norm and dtype is torch.float32 else 2
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.isfinite(a).all()
        scale = b.double().abs().max().item() if b.numel() else 0.0
        assert (a.double() - b.double()).abs().max().item() <= steps * torch.finfo(dtype).eps * scale if a.numel() else True
    assert torch.equal(ours[2], theirs[2]) and torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(tokens=0),
        dict(tokens=1, heads=1, kv_heads=1, dim=2, rows=1, slots=1),
        dict(dim=128, tokens=9),
        dict(dim=64, freqs=16),
        dict(dim=48, freqs=11),
        dict(dim=10, freqs=0),
        dict(dim=6, freqs=2, heads=0),
        dict(kv_heads=0),
        dict(slots=0),
        dict(rows=0),
        dict(dim=600),
    ],
)
def test_matches_the_definition(sizes, norm, dtype):
    call = build(dtype=dtype, norm=norm, **sizes)
    assert_same_within_rounding(run(call), run(call, reference.rope_append), dtype, norm)


@given(st.data())
def test_any_call_at_any_layout(data):
    dtype, norm = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    dim = 2 * data.draw(st.integers(1, 20))
    call = build(
        tokens=data.draw(st.integers(0, 6)),
        heads=data.draw(st.integers(1, 4)),
        kv_heads=data.draw(st.integers(1, 3)),
        dim=dim,
        freqs=data.draw(st.integers(0, dim // 2)),
        rows=data.draw(st.integers(1, 3)),
        slots=data.draw(st.integers(1, 5)),
        dtype=dtype,
        norm=norm,
        seed=data.draw(st.integers(0, 2**31)),
    )
    tokens = call.q.shape[0]

    def numbers(low, high):
        return torch.tensor(data.draw(st.lists(st.integers(low, high), min_size=tokens, max_size=tokens)), dtype=torch.int64)

    call.row, call.slot = numbers(-2, call.k_cache.shape[0]), numbers(-2, call.k_cache.shape[2])
    call.pos = numbers(-1, 2**21)
    if data.draw(st.booleans()):
        call.v_slot = numbers(-2, call.k_cache.shape[2])
    expected = run(call, reference.rope_append)

    strided = call.fresh()
    for name in ("q", "k", "v", "row", "pos", "slot", "v_slot", "q_weight", "k_weight", "inv_freq"):
        t = getattr(call, name)
        if t is not None:
            setattr(strided, name, relayout(t, data.draw(st.sampled_from(LAYOUTS))))
    for name in ("k_cache", "v_cache", "status"):
        setattr(strided, name, relayout(getattr(strided, name), data.draw(st.sampled_from(LAYOUTS))))
    out = kernel(*strided.args())
    assert out.is_contiguous()
    assert_same_within_rounding((out, strided.k_cache, strided.v_cache, strided.status), expected, dtype, norm)


@given(st.sampled_from(ALL_LAYOUTS), st.sampled_from(DTYPES), st.booleans())
def test_expanded_inputs(how, dtype, norm):
    call = build(dtype=dtype, norm=norm, slots=20)
    for name in ("q", "k", "v", "row", "pos"):
        setattr(call, name, relayout(getattr(call, name), how))
    call.slot = torch.arange(call.q.shape[0])
    assert_same_within_rounding(run(call), run(call, reference.rope_append), dtype, norm)


def rotated64(x, weight, pos, inv_freq, eps):
    """The op in float64; the angle alone is rounded to fp32, as in the contract."""
    x = x.double()
    if weight is not None:
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    angle = (pos.float()[:, None] * inv_freq[None]).double()[:, None, :]
    f = inv_freq.shape[0]
    a, b = x[..., :f], x[..., f : 2 * f]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[..., 2 * f :]), -1)


def hf_rotary(x, weight, pos, inv_freq, eps):
    """What the models' own code does: cos and sin cast to the dtype, q * cos + rotate_half(q) * sin in the dtype."""
    if weight is not None:
        x = reference.elementwise.normalise(x, weight, eps)
    angle = pos.float()[:, None] * inv_freq[None]
    emb = torch.cat((angle, angle), -1)[:, None, :]
    f = inv_freq.shape[0]
    turn, rest = x[..., : 2 * f], x[..., 2 * f :]
    half = torch.cat((-turn[..., f:], turn[..., :f]), -1)
    return torch.cat((turn * emb.cos().to(x.dtype) + half * emb.sin().to(x.dtype), rest), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("top", [100, 4096, 1_000_000])
def test_error_is_at_rounding_level(dtype, norm, top):
    call = build(tokens=64, heads=3, dim=64, freqs=24, dtype=dtype, norm=norm)
    call.pos = torch.randint(0, top, (64,))
    exact = rotated64(call.q, call.q_weight, call.pos, call.inv_freq, call.eps)
    theirs = hf_rotary(call.q, call.q_weight, call.pos, call.inv_freq, call.eps)
    ours = run(call)[0]
    error, allowed = (ours.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-6
    if not norm:  # one rounding of an fp32 value
        assert error <= (0.502 if dtype is not torch.float32 else 1.5) * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "pos"),
    [
        ("small", torch.arange(0, 5000)),
        ("million", torch.arange(1_000_000, 1_003_000)),
        ("billion", torch.randint(0, 2**28, (3000,))),
        ("beyond the fast reduction", torch.randint(2**28, 2**62, (500,))),
    ],
)
def test_cos_and_sin_are_correctly_rounded_nearly_always(name, pos):
    inv_freq = 10000.0 ** (-torch.arange(16) / 16).float()
    n = pos.shape[0]
    q = torch.zeros(n, 1, 32)
    q[..., :16] = 1  # rotates to (cos, sin)
    none = torch.zeros(n, 0, 32)
    cache = torch.zeros(1, 0, 1, 32)
    zero = torch.zeros(n, dtype=torch.int64)
    out = kernel(q, none, none, cache, cache.clone(), zero, pos, zero - 1, None, None, None, inv_freq, 0.0)[:, 0]
    angle = (pos.float()[:, None] * inv_freq[None]).double().numpy()
    for ours, exact in ((out[:, :16].numpy(), np.cos(angle)), (out[:, 16:].numpy(), np.sin(angle))):
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        assert (np.abs(ours.astype(np.float64) - exact) <= 0.5001 * unit).all(), name


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_invalid_frequency_is_not_hidden(bad):
    call = build()
    call.inv_freq = call.inv_freq.clone()
    call.inv_freq[1] = bad
    out = run(call)[0]
    assert out[..., 1].isnan().all() and out[..., 0].isfinite().all()


def test_faults_set_status_and_write_nothing():
    call = build(tokens=8, rows=2, slots=5)
    call.row = torch.tensor([2, -2, 0, 0, 0, -1, 1, 0])
    call.slot = torch.tensor([0, 0, 5, -2, 1, 99, -1, 0])
    call.pos = torch.tensor([0, 0, 0, 0, -1, -5, 3, 4])
    call.v_slot = torch.tensor([0, 0, 0, 0, 0, 0, 2, 5])
    call.status = torch.full((8,), int(Status.NAN), dtype=torch.int32)  # bits are added to what is there
    out, k_cache, v_cache, status = run(call)
    row, slot = Status.BAD_ROW | Status.NAN, Status.BAD_SLOT | Status.NAN
    assert status.tolist() == [row, row, slot, slot, slot, Status.NAN, Status.NAN, slot]
    assert (out[:6] == 0).all() and (out[7] == 0).all() and (out[6] != 0).any()
    assert torch.equal(k_cache, call.k_cache)
    expected = call.v_cache.clone()
    expected[1, :, 2] = call.v[6]
    assert torch.equal(v_cache, expected)
    without = replace(call, status=None)
    assert torch.equal(run(without)[0], out)


@pytest.mark.parametrize("split_v", [False, True])
def test_the_last_of_several_writes_to_a_slot_wins(threads, split_v):
    call = build(tokens=400, heads=4, kv_heads=4, dim=64, rows=2, slots=7)
    if split_v:
        call.v_slot = torch.randint(-1, 7, (400,))
    expected = run(call, reference.rope_append)
    for n in (1, 2):
        threads(n)
        for _ in range(5):
            assert_same_within_rounding(run(call), expected, torch.float32, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gives_the_same_bits_alone_batched_and_at_any_thread_count(dtype, threads):
    call = build(tokens=300, heads=6, kv_heads=2, dim=128, rows=1, slots=300, dtype=dtype, norm=True)
    call.slot = torch.randperm(300)
    threads(1)
    one = run(call)
    threads(2)
    for a, b in zip(one, run(call), strict=True):
        assert torch.equal(a, b)
    for t in (0, 150, 299):
        part = replace(call, **{n: getattr(call, n)[t : t + 1] for n in ("q", "k", "v", "row", "pos", "slot", "status")})
        out, k_cache, v_cache, _ = run(part)
        assert torch.equal(out[0], one[0][t])
        s = int(call.slot[t])
        assert torch.equal(k_cache[0, :, s], one[1][0, :, s]) and torch.equal(v_cache[0, :, s], one[2][0, :, s])


def test_only_the_named_slots_change():
    call = build(tokens=3, rows=2, slots=9)
    call.row, call.slot = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 8])
    _, k_cache, v_cache, _ = run(call)
    touched = torch.zeros(2, 9, dtype=torch.bool)
    touched[call.row, call.slot] = True
    for before, after in ((call.k_cache, k_cache), (call.v_cache, v_cache)):
        changed = (before != after).any(-1).any(1)
        assert torch.equal(changed, touched)


@given(st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 500))
def test_scores_depend_on_relative_position(a, b, shift):
    call = build(tokens=4, heads=1, kv_heads=1, dim=32, rows=1, slots=4)
    q, k = call.q[0:1], call.k[0:1]
    call.q, call.k = q.expand(4, 1, 32), k.expand(4, 1, 32)
    call.row, call.slot = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    call.pos = torch.tensor([a, b, a + shift, b + shift])
    out, k_cache, _, _ = run(call)
    near, far = (out[i, 0] @ k_cache[0, 0, j] for i, j in ((0, 1), (2, 3)))
    assert abs(near - far) <= 2e-2 + 1e-4 * abs(near)  # the fp32 angle itself is off by up to 4096 * 2^-24


base = build()
ERRORS = [
    (dict(q=base.q.double()), "rope_append: q must be float32, bfloat16 or float16, got float64"),
    (dict(k=base.k.half()), "rope_append: k must be float32, got float16"),
    (dict(v_cache=base.v_cache.bfloat16()), "rope_append: v_cache must be float32, got bfloat16"),
    (dict(row=base.row.int()), "rope_append: row must be int64, got int32"),
    (dict(v_slot=base.slot.float()), "rope_append: v_slot must be int64, got float32"),
    (dict(q_weight=torch.ones(16).half()), "rope_append: q_weight must be float32, got float16"),
    (dict(inv_freq=base.inv_freq.double()), "rope_append: inv_freq must be float32, got float64"),
    (dict(status=torch.zeros(6, dtype=torch.int64)), "rope_append: status must be int32, got int64"),
    (dict(q=base.q[0]), "rope_append: q must be [T, Hq, D] = [any, any, any], got [4, 16]"),
    (dict(k=base.k[:5]), "rope_append: k must be [T, Hkv, D] = [6, any, 16], got [5, 2, 16]"),
    (dict(v=base.v[:, :1]), "rope_append: v must be [T, Hkv, D] = [6, 2, 16], got [6, 1, 16]"),
    (dict(k_cache=base.k_cache[0]), "rope_append: k_cache must be [R, Hkv, S, D] = [any, 2, any, 16], got [2, 11, 16]"),
    (dict(v_cache=base.v_cache[:2]), "rope_append: v_cache must be [R, Hkv, S, D] = [3, 2, 11, 16], got [2, 2, 11, 16]"),
    (dict(pos=base.pos[:1]), "rope_append: pos must be [T] = [6], got [1]"),
    (dict(k_weight=torch.ones(8)), "rope_append: k_weight must be [D] = [16], got [8]"),
    (dict(inv_freq=torch.ones(9)), "rope_append: inv_freq must be [F] with 2F <= D = 16, got [9]"),
    (dict(eps=-1.0), "rope_append: eps must be finite and >= 0, got -1.000000"),
    (dict(status=torch.zeros(5, dtype=torch.int32)), "rope_append: status must be [T] = [6], got [5]"),
    (
        dict(k_cache=base.k_cache[:1].expand(3, -1, -1, -1)),
        "rope_append: k_cache must be without expanded dimensions (it is written), got stride 0 in dimension 0",
    ),
]


@pytest.mark.parametrize(("change", "text"), ERRORS)
def test_errors(change, text):
    call = replace(build(), **change)
    for fn in (kernel, reference.rope_append, ops.rope_append):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            fn(*call.args())


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm):
    call = build(norm=norm)
    call.v_slot = call.slot.clone() if norm else None
    torch.library.opcheck(kernel.default, call.args())


def test_compiles_without_graph_breaks():
    call = build(norm=True, dtype=torch.bfloat16)
    compiled = torch.compile(lambda *args: ops.rope_append(*args) * 2, fullgraph=True, backend="aot_eager")
    once, twice = call.fresh(), call.fresh()
    assert torch.equal(compiled(*once.args()), ops.rope_append(*twice.args()) * 2)
    assert torch.equal(once.k_cache, twice.k_cache) and torch.equal(once.v_cache, twice.v_cache)


def test_a_faulty_token_overwrites_nothing(threads):
    """Of two tokens for one slot the later wins, but not if it may not be processed; at any split over threads."""
    call = build(tokens=4000, heads=8, kv_heads=8, dim=32, rows=1, slots=4000)
    call.slot = torch.arange(4000)
    call.slot[3999], call.pos[3999] = 7, -1
    threads(2)
    got = run(call)
    want = run(call, reference.rope_append)
    assert_same_within_rounding(got, want, torch.float32, False)
    assert not torch.equal(got[1][0, :, 7], call.k_cache[0, :, 7])
