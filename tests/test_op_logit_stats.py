"""logit_stats, stats_tile, stats_finish: against the definition on anything, faults, invariance, errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status
from unmask.ops.logit_stats import CHUNK, STATE_WORDS, LogitStats, new_state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
NAMES = ("rows", "forbid", "suppress", "bias_ids", "bias", "ids", "topk", "temperature", "seed", "step", "pos", "null_logits", "guidance")
DEFAULTS = {"topk": 0, "temperature": 0.0, "guidance": 1.0}
PER_ENTRY = ("rows", "bias_ids", "bias", "ids", "seed", "step", "pos")
_logit_stats, _stats_tile, _stats_finish = native("logit_stats"), native("stats_tile"), native("stats_finish")


def arguments(a: dict) -> tuple:
    return tuple(a.get(name, DEFAULTS.get(name)) for name in NAMES)


def kernel(logits: torch.Tensor, **a) -> LogitStats:
    return LogitStats(*_logit_stats(logits, *arguments(a)))


def definition(logits: torch.Tensor, **a) -> LogitStats:
    return reference.logit_stats(logits, *arguments(a))


FUNCTIONS = pytest.mark.parametrize("fn", (kernel, definition))


def assert_close(got: LogitStats, want: LogitStats) -> None:
    """Exact but for what went through an exponential or a logarithm."""
    for name in ("token", "status", "topk_id"):
        assert torch.equal(getattr(got, name), getattr(want, name)), (name, got, want)
    torch.testing.assert_close(got.topk_logit, want.topk_logit, rtol=0, atol=0)
    torch.testing.assert_close(got.at_ids[..., 1], want.at_ids[..., 1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.at_ids[..., 0], want.at_ids[..., 0], rtol=5e-7, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(got.stats, want.stats, rtol=2e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(got.p_rest, want.p_rest, rtol=5e-6, atol=1e-37, equal_nan=True)
    assert [t.dtype for t in got] == [t.dtype for t in want] and [t.shape for t in got] == [t.shape for t in want]


def assert_same_bits(got: LogitStats, want: LogitStats) -> None:
    for name, a, b in zip(LogitStats._fields, got, want, strict=True):
        assert torch.equal(a.nan_to_num(nan=-7.5), b.nan_to_num(nan=-7.5)), name


# ---- the table: one row of logits, its options, what must come out --------------------------------------------------
def row(*x: float) -> torch.Tensor:
    return torch.tensor([x])


E1 = math.exp(-1)
TABLE = {
    "two": (row(1.0, 0.0), {}, 0, (1 / (1 + E1), 1 / (1 + E1), E1 / (1 + E1), None, 1 + math.log1p(E1)), 0),
    "V = 1": (row(3.0), {}, 0, (1, 1, 0, 0, 3), 0),
    "V = 1, sampled": (row(3.0), {"temperature": 2.0}, 0, (1, 1, 0, 0, 3), 0),
    "ties: lowest id": (row(0.0, 2.0, 2.0, 2.0), {}, 1, (None, None, None, None, None), 0),
    "-0 and 0 tie": (row(-0.0, 0.0), {}, 0, (0.5, 0.5, 0.5, math.log(2), math.log(2)), 0),
    "one +inf": (row(0.0, INF, 5.0), {}, 1, (1, 1, 0, 0, INF), 0),
    "three +inf": (row(INF, 0.0, INF, INF), {}, 0, (1 / 3, 1 / 3, 1 / 3, math.log(3), INF), 0),
    "+inf, sampled": (row(0.0, 0.0, INF, INF), {"temperature": 3.0}, 2, (0.5, 0.5, 0.5, math.log(2), INF), 0),
    "forbidden +inf counts, cannot win": (row(INF, 0.0, INF), {"forbid": [0]}, 2, (0.5, 0.5, 0, math.log(2), INF), 0),
    "all mass forbidden": (row(INF, 0.0), {"forbid": [0]}, 1, (0, 0, 0, 0, INF), 0),
    "-inf has no mass": (row(-INF, 0.0, -INF, 0.0), {}, 1, (0.5, 0.5, 0.5, math.log(2), math.log(2)), 0),
    "one candidate": (row(-INF, 7.0, -INF), {}, 1, (1, 1, 0, 0, 7), 0),
    "all -inf": (row(-INF, -INF), {}, -1, (NAN,) * 5, Status.ALL_INF),
    "all -inf, sampled": (row(-INF, -INF), {"temperature": 1.0}, -1, (NAN,) * 5, Status.ALL_INF),
    "all candidates forbidden": (row(1.0, 2.0), {"forbid": [0, 1]}, -1, (NAN,) * 5, Status.ALL_INF),
    "all suppressed": (row(1.0, 2.0), {"suppress": [1, 0]}, -1, (NAN,) * 5, Status.ALL_INF),
    "NaN": (row(0.0, NAN, 1.0), {}, -1, (NAN,) * 5, Status.NAN),
    "-NaN": (-row(0.0, NAN, 1.0), {}, -1, (NAN,) * 5, Status.NAN),
    "NaN beside +inf": (row(INF, NAN), {}, -1, (NAN,) * 5, Status.NAN),
    "NaN between +infs": (row(*[INF] * 3, NAN, *[INF] * 60), {}, -1, (NAN,) * 5, Status.NAN),
    "NaN beside -inf": (row(-INF, NAN), {}, -1, (NAN,) * 5, Status.NAN),
    "forbidden NaN": (row(0.0, NAN), {"forbid": [1]}, -1, (NAN,) * 5, Status.NAN),
    "suppressed NaN": (row(0.0, NAN), {"suppress": [1]}, 0, (1, 1, 0, 0, 0), 0),
    "suppressed leaves the sum": (row(0.0, 9.0, 0.0), {"suppress": [1]}, 0, (0.5, 0.5, 0.5, math.log(2), math.log(2)), 0),
    "forbidden stays in the sum": (row(0.0, 1.0), {"forbid": [1]}, 0, (E1 / (1 + E1), E1 / (1 + E1), 0, None, None), 0),
    "bias": (row(0.0, 0.0), {"bias_ids": [[1]], "bias": [[1.0]]}, 1, (1 / (1 + E1), 1 / (1 + E1), E1 / (1 + E1), None, None), 0),
    "bias adds up in order": (row(0.0, 0.5), {"bias_ids": [[0, 0, 0]], "bias": [[1e8, 1.0, -1e8]]}, 1, (None,) * 5, 0),
    "bias -inf": (row(5.0, 0.0), {"bias_ids": [[0]], "bias": [[-INF]]}, 1, (1, 1, 0, 0, 0), 0),
    "inf - inf is NaN": (row(INF, 0.0), {"bias_ids": [[0]], "bias": [[-INF]]}, -1, (NAN,) * 5, Status.NAN),
    "negative ids are none": (
        row(1.0, 0.0), {"forbid": [-1], "suppress": [-5], "bias_ids": [[-1]], "bias": [[9.0]], "ids": [[-1]]}, 0,
        (1 / (1 + E1), 1 / (1 + E1), E1 / (1 + E1), None, None), 0,
    ),
    "ids beyond V": (row(1.0, 1.0), {"ids": [[2, 0]]}, 0, (0.5, 0.5, 0.5, math.log(2), None), Status.BAD_ID),
    "forbid beyond V": (row(1.0, 1.0), {"forbid": [2]}, 0, (0.5, 0.5, 0.5, math.log(2), None), Status.BAD_ID),
    "suppress beyond V": (row(1.0, 1.0), {"suppress": [2**40]}, 0, (0.5, 0.5, 0.5, math.log(2), None), Status.BAD_ID),
    "bias beyond V": (row(1.0, 1.0), {"bias_ids": [[2]], "bias": [[5.0]]}, 0, (0.5, 0.5, 0.5, math.log(2), None), Status.BAD_ID),
    "NaN and ids beyond V": (row(NAN, 1.0), {"ids": [[2]]}, -1, (NAN,) * 5, Status.BAD_ID | Status.NAN),
    "row -1": (row(1.0, 2.0), {"rows": [-1], "ids": [[0]]}, -1, (0,) * 5, 0),
    "row too low": (row(1.0, 2.0), {"rows": [-2]}, -1, (NAN,) * 5, Status.BAD_ROW),
    "row too high": (row(1.0, 2.0), {"rows": [1], "ids": [[7]]}, -1, (NAN,) * 5, Status.BAD_ROW),
    "huge temperature": (row(-3e38, 3e38, -INF), {"temperature": 1e30}, 1, (1, 1, 0, 0, 3e38), 0),
    "tiny temperature": (row(1.0, 2.0), {"temperature": 1e-300}, 1, (None,) * 5, 0),
    "large gap underflows to 0": (row(0.0, -200.0, -100.0), {}, 0, (1, 1, 0, 0, 0), 0),
    "large values": (row(3e38, 3e38), {}, 0, (0.5, 0.5, 0.5, math.log(2), 3e38), 0),
}


def options(a: dict, entries: int = 1) -> dict:
    floats = ("bias",)
    out = {k: torch.tensor(v, dtype=torch.float32 if k in floats else torch.int64) if isinstance(v, list) else v for k, v in a.items()}
    if out.get("temperature", 0) > 0:
        out |= {name: torch.arange(entries) for name in ("seed", "step", "pos")}
    return out


@FUNCTIONS
@pytest.mark.parametrize("case", TABLE)
def test_table(fn, case):
    logits, given_options, token, stats, status = TABLE[case]
    out = fn(logits, **options(given_options))
    assert out.token.tolist() == [token]
    assert out.status.tolist() == [int(status)]
    if out.token[0] >= 0:
        assert float(out.p + out.p_rest) == pytest.approx(1.0, abs=1e-7)
    else:
        assert torch.equal(out.p_rest.nan_to_num(7.0), out.p.nan_to_num(7.0))
    for got, want in zip(out.stats[0, :5].tolist(), stats, strict=True):
        assert want is None or got == pytest.approx(want, rel=3e-7, abs=1e-7, nan_ok=True)


@FUNCTIONS
def test_at_ids(fn):
    logits = torch.tensor([[1.0, 3.0, INF, -INF], [0.0, 1.0, 2.0, 3.0], [NAN, 0.0, 0.0, 0.0]])
    ids = torch.tensor([[2, 0, 3], [3, -1, 1], [0, 1, 2]])
    out = fn(logits, ids=ids, suppress=torch.tensor([1]))
    assert out.at_ids[0].tolist() == [[0.0, INF], [-INF, 1.0], [-INF, -INF]]
    lse = math.log(1 + math.exp(-1) + math.exp(-3)) + 3
    assert out.at_ids[1].flatten().tolist() == pytest.approx([3 - lse, 3, -INF, -INF, -INF, -INF], rel=1e-6)
    assert out.at_ids[2].isnan().all()


@FUNCTIONS
def test_topk(fn):
    logits = torch.tensor([[1.0, 5.0, 5.0, -INF, 2.0], [-INF] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]])
    out = fn(logits, topk=4, forbid=torch.tensor([4]), rows=torch.tensor([0, 1, -1, 2, 9]))
    assert out.topk_id.tolist() == [[1, 2, 0, -1], [-1] * 4, [-1] * 4, [3, 2, 1, 0], [-1] * 4]
    assert out.topk_logit[0].tolist() == [5.0, 5.0, 1.0, -INF]
    assert out.topk_logit[[1, 2, 4]].eq(-INF).all()


# ---- against the definition -----------------------------------------------------------------------------------------
SIZES = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200, 4095, 4096, 4097, 4096 + 65, 9001])


@st.composite
def calls(draw, vocab=SIZES):
    """(logits, options): special values, every list, entries that name no row, negative and too large ids."""
    v, n = draw(vocab), draw(st.integers(0, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    x = torch.randn(n, v, generator=g) * draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]))
    if draw(st.booleans()):
        x = x.round()  # ties
    for special in draw(st.lists(st.sampled_from([INF, -INF, NAN, -0.0, 3e38, 1e-40]), max_size=3)):
        where = torch.rand(n, v, generator=g) < draw(st.sampled_from([1.5 / v, 0.5, 0.99]))
        x[where & (integers(0, 2, n, 1) == 0)] = special
    a = {"topk": draw(st.integers(0, 8)), "temperature": draw(st.sampled_from([0.0, 0.0, 1e-3, 0.7, 5.0, 1e30]))}
    entries = n
    if draw(st.booleans()):
        entries = draw(st.integers(0, 6))
        a["rows"] = integers(-2 if draw(st.booleans()) else -1, n + 1, entries)
    high = v + draw(st.sampled_from([0, 0, 0, 1]))
    for name in ("forbid", "suppress"):
        if draw(st.booleans()):
            a[name] = integers(-1, high, draw(st.integers(0, 12)))
    if draw(st.booleans()):
        a["bias_ids"] = integers(-1, high, entries, draw(st.integers(0, 5)))
        a["bias"] = torch.randn(a["bias_ids"].shape, generator=g) * 3
    if draw(st.booleans()):
        a["ids"] = integers(-1, high, entries, draw(st.integers(0, 5)))
    if a["temperature"] > 0 or draw(st.booleans()):
        a["seed"], a["step"], a["pos"] = (integers(-(2**62), 2**62, entries) for _ in range(3))
    for name in ("rows", *(k for k in a if isinstance(a[k], torch.Tensor))):
        if name in a:
            a[name] = relayout(a[name], draw(st.sampled_from(ALL_LAYOUTS)))
    return relayout(x.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(ALL_LAYOUTS))), a


@given(calls())
def test_equals_the_definition(call):
    logits, a = call
    before = logits.clone()
    assert_close(kernel(logits, **a), definition(logits, **a))
    assert torch.equal(logits.nan_to_num(nan=-7.5), before.nan_to_num(nan=-7.5))


@given(calls(vocab=st.sampled_from([1, 17, 4096, 4097, 9001, 3 * CHUNK])), st.sampled_from([1, 2]), st.booleans())
def test_tiles_equal_one_pass_bit_for_bit(call, chunks_a_tile, strided):
    logits, a = call
    if "rows" in a:
        keep = (a["rows"] >= 0) & (a["rows"] < logits.shape[0])
        logits = logits[a.pop("rows")[keep]]
        a |= {name: a[name][keep] for name in PER_ENTRY if name in a}
    n, vocab = logits.shape
    state = new_state(n)
    id_logit = torch.full((n, a["ids"].shape[1]), NAN) if "ids" in a else None
    if strided:
        state = relayout(state, "transposed")
        id_logit = None if id_logit is None else relayout(id_logit, "step")
    for offset in range(0, vocab, chunks_a_tile * CHUNK):
        tile = logits[:, offset : offset + chunks_a_tile * CHUNK]
        _stats_tile(tile, state, id_logit, offset, vocab, *arguments(a)[1:-2])
    assert_same_bits(LogitStats(*_stats_finish(state, id_logit, a["topk"])), kernel(logits, **a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (0.5, 4.0, 20.0))
def test_as_accurate_as_torch(dtype, scale):
    """Error against float64 at most twice that of torch's fp32 softmax, plus a few units in the last place."""
    x = (torch.randn(4, 126_464) * scale).to(dtype)
    wide, p32 = x.double(), x.float().softmax(-1)
    out = kernel(x)
    log_p = wide.log_softmax(-1)
    want = {"p1": log_p.max(-1).values.exp(), "entropy": -(log_p.exp() * log_p).sum(-1), "logsumexp": wide.logsumexp(-1)}
    torch32 = {
        "p1": p32.max(-1).values,
        "entropy": -(p32 * x.float().log_softmax(-1)).sum(-1),
        "logsumexp": x.float().logsumexp(-1),
    }
    for name, exact in want.items():
        error = (getattr(out, name).double() - exact).abs()
        assert (error <= 2 * (torch32[name].double() - exact).abs() + 4e-7 * exact.abs() + 1e-7).all(), (name, error)
    assert torch.equal(out.token, x.float().argmax(-1))


# ---- guidance ---------------------------------------------------------------------------------------------------------
WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.7, -1.3, 1e-3, 1e30])


@given(calls(), WEIGHTS, st.sampled_from(ALL_LAYOUTS), st.integers(0, 2**31))
def test_guidance_has_the_bits_of_the_torch_expression(call, weight, layout, seed):
    logits, a = call
    g = torch.Generator().manual_seed(seed)
    null = (torch.randn(logits.shape, generator=g) * 3).round(decimals=1).to(logits.dtype)
    flip = torch.rand(logits.shape, generator=g) < 0.05
    null[flip] = logits[flip]  # infinities on both sides, NaN too
    null = relayout(null, layout)
    a |= {"null_logits": null, "guidance": weight}
    got = kernel(logits, **a)
    whole = {name: value for name, value in a.items() if name not in ("null_logits", "guidance")}
    assert_same_bits(got, kernel(null + weight * (logits - null), **whole))
    assert_close(got, definition(logits, **a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", (2.0, 3.7, -0.3))
def test_every_guided_logit_is_rounded_as_torch_rounds(dtype, weight):
    """Any bits on either side, subnormal, huge, infinite and NaN, in every lane: one id a row is possible, so its logsumexp is its logit."""
    rows, vocab = 20_000, 70
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    size = torch.iinfo(bits)
    c, u = (torch.randint(size.min, size.max + 1, (rows,)).to(bits).view(dtype) for _ in range(2))
    near = torch.arange(rows) % 2 == 0
    u[near] = (c[near].float() * (1 + torch.rand(int(near.sum())))).to(dtype)  # differences that need rounding
    logits, null = (torch.full((rows, vocab), fill).to(dtype) for fill in (-math.copysign(INF, weight), 0.0))
    at = torch.arange(rows)
    logits[at, at % vocab], null[at, at % vocab] = c, u
    got = kernel(logits, null_logits=null, guidance=weight)
    want = u + weight * (c - u)
    assert torch.equal(got.status == Status.NAN, want.isnan()) and torch.equal(got.status == Status.ALL_INF, want == -INF)
    some = got.status == 0
    assert int(some.sum()) > rows // 3 and torch.equal(got.logsumexp[some], want[some].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance_has_the_same_bits_alone_batched_and_at_any_thread_count(threads, dtype):
    logits, a = big_call(40, dtype)
    null = (torch.randn(logits.shape) * 3).to(dtype)
    threads(1)
    want = kernel(null + 1.7 * (logits - null), **a)
    for count in (1, 2, 3):
        threads(count)
        assert_same_bits(kernel(logits, null_logits=null, guidance=1.7, **a), want)
        few = {k: v[3:5] if k in PER_ENTRY else v for k, v in a.items()}  # chunks in parallel instead of rows
        assert_same_bits(kernel(logits[3:5], null_logits=null[3:5], guidance=1.7, **few), LogitStats(*(t[3:5] for t in want)))


# ---- invariance -------------------------------------------------------------------------------------------------------
def big_call(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    vocab = 10 * CHUNK + 77
    a = {
        "topk": 3, "temperature": 0.9, "forbid": torch.tensor([7, 9000]), "suppress": torch.arange(12_000, 12_050),
        "bias_ids": torch.randint(vocab, (n, 3)), "bias": torch.randn(n, 3), "ids": torch.randint(vocab, (n, 2)),
        "seed": torch.arange(n), "step": torch.arange(n) + 5, "pos": torch.arange(n) * 3,
    }  # fmt: skip
    return (torch.randn(n, vocab) * 4).to(dtype), a


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_batched_strided_and_at_any_thread_count(threads, dtype):
    logits, a = big_call(40, dtype)
    threads(1)
    want = kernel(logits, **a)
    for count in (2, 3):
        threads(count)
        assert_same_bits(kernel(logits, **a), want)
    for layout in ("offset", "step", "gap", "transposed"):
        assert_same_bits(kernel(relayout(logits, layout), **a), want)
    for few in (slice(3, 4), slice(10, 15)):  # chunks in parallel instead of rows
        part = {k: v[few] if k in PER_ENTRY else v for k, v in a.items()}
        assert_same_bits(kernel(logits[few], **part), LogitStats(*(t[few] for t in want)))
    rows = torch.tensor([5, -1, 5, 39])
    part = {k: v[rows] if k in PER_ENTRY else v for k, v in a.items()}
    picked = kernel(logits, rows=rows, **part)
    for i in (0, 2, 3):
        assert_same_bits(LogitStats(*(t[i] for t in picked)), LogitStats(*(t[rows[i]] for t in want)))


@pytest.mark.parametrize("poison", (NAN, INF, -INF))
@pytest.mark.parametrize("n", (4, 40))
def test_a_bad_row_leaves_the_others_alone(poison, n):
    logits, a = big_call(n, torch.bfloat16)
    want = kernel(logits, **a)
    logits[2] = poison
    got = kernel(logits, **a)
    others = torch.arange(n) != 2
    assert_same_bits(LogitStats(*(t[others] for t in got)), LogitStats(*(t[others] for t in want)))
    assert got.token[2] == -1 or poison == INF


@pytest.mark.parametrize("where", (0, 1, 15, 63, 64, 4095, 4096, 8191, 8192, 10 * CHUNK + 76))
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_nan_escapes(where, dtype):
    logits = torch.randn(1, 10 * CHUNK + 77).to(dtype)
    for sign in (1, -1):
        logits[0, where] = sign * NAN
        assert kernel(logits).status.tolist() == [Status.NAN]
        assert kernel(logits, temperature=1.0, topk=8, **{k: torch.tensor([1]) for k in ("seed", "step", "pos")}).token.tolist() == [-1]


@FUNCTIONS
def test_empty(fn):
    out = fn(torch.empty(0, 50), topk=3, ids=torch.empty(0, 2, dtype=torch.int64))
    parts = (*out, out.token, out.stats, out.at_ids, out.topk_id, out.topk_logit)
    assert [list(t.shape) for t in parts] == [[0, 4], [0, 13], [0], [0], [0, 6], [0, 2, 2], [0, 3], [0, 3]]
    out = fn(torch.randn(3, 50), rows=torch.empty(0, dtype=torch.int64))
    assert [list(t.shape) for t in (*out, out.at_ids, out.topk_id)] == [[0, 1], [0, 6], [0], [0, 0, 2], [0, 0]]
    assert fn(torch.empty(0, 50), rows=torch.tensor([0, -1])).status.tolist() == [Status.BAD_ROW, 0]


@FUNCTIONS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_sure_rows_keep_their_order(fn, dtype):
    """Beside a probability of 1, fp32 holds nothing below 6e-8; 1 - p, ln p and the entropy must."""
    gaps = torch.tensor([8.0, 16.0, 20.0, 24.0, 30.0, 32.0, 40.0, 60.0, 80.0])
    x = torch.zeros(len(gaps), 9000)
    x[:, 8000] = gaps
    x[1, 17] = gaps[1]  # a tie at the top is not sure
    out = fn(x.to(dtype), ids=torch.full((len(gaps), 1), 8000))
    others = 8999 * torch.exp(-gaps.double())
    others[1] = 1.0 + 8998 * math.exp(-16)
    others = others / (others + 1.0)
    assert out.token.tolist() == [8000, 17] + [8000] * 7
    torch.testing.assert_close(out.p_rest.double(), others, rtol=3e-6, atol=0)
    torch.testing.assert_close(out.confidence, 1.0 - others, rtol=0, atol=1e-7)
    torch.testing.assert_close(out.at_ids[:, 0, 0].double(), torch.log1p(-others), rtol=3e-6, atol=0)
    sure = torch.cat((others[:1], others[2:]))
    want = -torch.log1p(-sure) * (1 - sure) - sure * torch.log(sure / 8999)
    torch.testing.assert_close(torch.cat((out.entropy[:1], out.entropy[2:])).double(), want, rtol=3e-6, atol=0)
    assert (out.p[2:] == 1.0).sum() >= 5 and (out.confidence[2:5].diff() > 0).all()


# ---- tiles ------------------------------------------------------------------------------------------------------------
def test_tiles_out_of_order_or_with_another_topk_are_reported():
    logits = torch.randn(2, 2 * CHUNK)
    first, second = logits[:, :CHUNK], logits[:, CHUNK:]
    for tiles in ([(second, CHUNK, 0)], [(first, 0, 0), (first, 0, 0)], [(first, 0, 0), (second, CHUNK, 5)]):
        state = new_state(2)
        for tile, offset, topk in tiles:
            ops.stats_tile(tile, state, offset=offset, vocab=2 * CHUNK, topk=topk)
        out = ops.stats_finish(state)
        assert (out.status & Status.BAD_SEGMENT != 0).all() and (out.token == -1).all() and out.stats.isnan().all()
    state = new_state(2)
    ops.stats_tile(first, state, offset=0, vocab=2 * CHUNK)
    ops.stats_tile(second, state, offset=CHUNK, vocab=2 * CHUNK)
    assert (ops.stats_finish(state, topk=3).status == Status.BAD_SEGMENT).all()
    assert (ops.stats_finish(state, topk=2).status == 0).all()


def test_an_empty_state_gives_what_row_minus_one_gives():
    empty = ops.stats_finish(new_state(2), torch.full((2, 3), NAN), topk=2)
    none = kernel(torch.randn(1, 5), rows=torch.tensor([-1, -1]), ids=torch.zeros(2, 3, dtype=torch.int64), topk=2)
    assert_same_bits(empty, none)


# ---- errors -----------------------------------------------------------------------------------------------------------
X = torch.zeros(3, 10)
I3, I32 = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)
KEY = {"seed": I3, "step": I3, "pos": I3}
ERRORS = {
    "logits must be float32, bfloat16 or float16, got float64": (X.double(), {}),
    "logits must be [N, V] = [any, any], got [10]": (X[0], {}),
    "V of logits must be 1 to 2147483647, got 0": (X[:, :0], {}),
    "rows must be int64, got int32": (X, {"rows": I3.int()}),
    "rows must be [T'] = [any], got [3, 2]": (X, {"rows": I32}),
    "topk must be 0 to 8, got 9": (X, {"topk": 9}),
    "topk must be 0 to 8, got -1": (X, {"topk": -1}),
    "temperature must be a number in [0, 1e30], got -0.500000": (X, {"temperature": -0.5} | KEY),
    "temperature must be a number in [0, 1e30], got nan": (X, {"temperature": NAN} | KEY),
    "temperature must be a number in [0, 1e30], got inf": (X, {"temperature": INF} | KEY),
    "forbid must be int64, got float32": (X, {"forbid": X[0]}),
    "suppress must be [U] = [any], got [3, 2]": (X, {"suppress": I32}),
    "bias must be given with bias_ids, got None": (X, {"bias_ids": I32}),
    "bias_ids must be given with bias, got None": (X, {"bias": X[:, :2]}),
    "bias must be float32, got bfloat16": (X, {"bias_ids": I32, "bias": X[:, :2].bfloat16()}),
    "bias_ids must be [T', J] = [3, any], got [2, 2]": (X, {"bias_ids": I32[:2], "bias": X[:2, :2]}),
    "bias must be [T', J] = [3, 2], got [3, 3]": (X, {"bias_ids": I32, "bias": X[:, :3]}),
    "ids must be [T', J] = [3, any], got [3]": (X, {"ids": I3}),
    "ids must be [T', J] = [2, any], got [3, 2]": (X, {"ids": I32, "rows": I3[:2]}),
    "seed must be given when temperature > 0, got None": (X, {"temperature": 1.0}),
    "pos must be given when temperature > 0, got None": (X, {"temperature": 1.0, "seed": I3, "step": I3}),
    "step must be [T'] = [3], got [2]": (X, {"temperature": 1.0, "seed": I3, "step": I3[:2], "pos": I3}),
    "seed must be int64, got int32": (X, {"seed": I3.int()}),
    "null_logits must be float32, got bfloat16": (X, {"null_logits": X.bfloat16()}),
    "null_logits must be bfloat16, got float32": (X.bfloat16(), {"null_logits": X}),
    "null_logits must be [N, V] = [3, 10], got [3, 9]": (X, {"null_logits": X[:, :9]}),
    "null_logits must be [N, V] = [3, 10], got [2, 10]": (X, {"null_logits": X[:2], "rows": I3[:2]}),
    "null_logits must be given when guidance is not 1, got None": (X, {"guidance": 1.5}),
    "guidance must be finite in float32, got nan": (X, {"null_logits": X, "guidance": NAN}),
    "guidance must be finite in float32, got -inf": (X, {"null_logits": X, "guidance": -INF}),
    f"guidance must be finite in float32, got {1e39:f}": (X, {"guidance": 1e39}),
}


@FUNCTIONS
@pytest.mark.parametrize("message", ERRORS)
def test_errors(fn, message):
    logits, a = ERRORS[message]
    with pytest.raises(RuntimeError, match=re.escape(f"logit_stats: {message}")):
        fn(logits, **a)


STATE = new_state(3)
TILE_ERRORS = {
    "logits must be float32, bfloat16 or float16, got int32": dict(logits=X.int()),
    "state must be int32, got int64": dict(state=STATE.long()),
    f"state must be [T', STATE_WORDS] = [3, {STATE_WORDS}], got [2, {STATE_WORDS}]": dict(state=STATE[:2]),
    "state must be without expanded dimensions (it is written), got stride 0 in dimension 0": dict(state=STATE[:1].expand(3, -1)),
    "vocab must be 1 to 2147483647, got 0": dict(vocab=0),
    "offset must be a multiple of 4096 in [0, vocab), got 10": dict(offset=10),
    "offset must be a multiple of 4096 in [0, vocab), got 4096": dict(offset=4096),
    "C of logits must be a multiple of 4096, or the rest of the vocabulary, got 10": dict(vocab=11),
    "ids must be given with id_logit, got None": dict(id_logit=X[:, :2].clone()),
    "id_logit must be given with ids, got None": dict(ids=I32),
    "id_logit must be [T', J] = [3, 2], got [3, 3]": dict(ids=I32, id_logit=X[:, :3].clone()),
    "topk must be 0 to 8, got 9": dict(topk=9),
    "seed must be given when temperature > 0, got None": dict(temperature=1.0),
}


@pytest.mark.parametrize("message", TILE_ERRORS)
def test_tile_errors(message):
    a = dict(logits=X, state=STATE.clone(), offset=0, vocab=10) | TILE_ERRORS[message]
    with pytest.raises(RuntimeError, match=re.escape(f"stats_tile: {message}")):
        ops.stats_tile(**a)


def test_finish_errors():
    for a, message in (
        (dict(state=STATE.float()), "state must be int32, got float32"),
        (dict(state=STATE[:, :5]), f"state must be [T', STATE_WORDS] = [any, {STATE_WORDS}], got [3, 5]"),
        (dict(state=STATE, topk=9), "topk must be 0 to 8, got 9"),
        (dict(state=STATE, id_logit=I32), "id_logit must be float32, got int64"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"stats_finish: {message}")):
            ops.stats_finish(**a)


# ---- torch ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_opcheck(temperature):
    x, state, id_logit = torch.randn(3, 50), new_state(3), torch.zeros(3, 2)
    rest = (torch.tensor([1]), None, I32, X[:, :2], I32, 4, temperature, I3, I3, I3)
    torch.library.opcheck(_logit_stats.default, (x, I3, *rest))
    torch.library.opcheck(_logit_stats.default, (x, *[None] * 6, 0, 0.0, None, None, None))
    torch.library.opcheck(_logit_stats.default, (x, I3, *rest, torch.randn(3, 50), 1.5))
    torch.library.opcheck(_stats_tile.default, (x, state, id_logit, 0, 50, *rest))
    torch.library.opcheck(_stats_finish.default, (state, id_logit, 4))


def test_compile():
    def f(x, state, ids):
        ops.stats_tile(x, state, offset=0, vocab=x.shape[1])
        out = ops.logit_stats(x, ids=ids, topk=2, null_logits=x.flip(0), guidance=1.5)
        return out.margin + ops.stats_finish(state).entropy, out.at_ids

    x, ids = torch.randn(3, 70), I32
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, new_state(3), ids), f(x, new_state(3), ids), strict=True):
        assert torch.equal(a, b)


def test_wrapper_and_properties():
    x = torch.randn(4, 30)
    out = ops.logit_stats(x, torch.tensor([1, 2]), topk=2, forbid=torch.tensor([3]))
    assert_same_bits(out, kernel(x, rows=torch.tensor([1, 2]), topk=2, forbid=torch.tensor([3])))
    null = torch.randn(4, 30)
    assert_same_bits(ops.logit_stats(x, null_logits=null, guidance=1.5), kernel(x, null_logits=null, guidance=1.5))
    assert torch.equal(torch.stack((out.p, out.p1, out.p2, out.entropy, out.logsumexp, out.p_rest), 1), out.stats)
    assert torch.equal(out.margin, out.p1 - out.p2)
