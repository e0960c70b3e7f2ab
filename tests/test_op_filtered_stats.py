"""filtered_stats: against the definition on anything, against logit_stats with filters off, invariance, faults, errors."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status
from unmask.ops.head_stats import Head, head_filtered_stats
from unmask.ops.logit_stats import CHUNK, LogitStats
from unmask.reference.filtered_stats import kept_ids

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
NAMES = ("rows", "forbid", "suppress", "bias_ids", "bias", "temperature", "top_p", "top_k", "top_k_first", "seed", "step", "pos")
DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "top_k_first": False}
PER_ENTRY = ("rows", "bias_ids", "bias", "seed", "step", "pos")
NEAR = 2e-6  # how close to top_p the mass before an id may come before a cut may differ from exact arithmetic
_filtered_stats, _logit_stats = native("filtered_stats"), native("logit_stats")


def arguments(a: dict) -> tuple:
    return tuple(a.get(name, DEFAULTS.get(name)) for name in NAMES)


def kernel(logits: torch.Tensor, **a) -> LogitStats:
    return LogitStats(*_filtered_stats(logits, *arguments(a)))


def definition(logits: torch.Tensor, **a) -> LogitStats:
    return reference.filtered_stats(logits, *arguments(a))


FUNCTIONS = pytest.mark.parametrize("fn", (kernel, definition))


def entry_agrees(got: LogitStats, want: LogitStats, e: int) -> bool:
    """Token and status exactly, the rest to what an exponential leaves."""
    if got.token[e] != want.token[e] or got.status[e] != want.status[e]:
        return False
    near = dict(rtol=3e-6, atol=4e-6, equal_nan=True)
    rest = torch.isclose(got.p_rest[e], want.p_rest[e], rtol=8e-6, atol=1e-37, equal_nan=True)
    return bool(torch.isclose(got.stats[e], want.stats[e], **near).all() & rest)


def assert_agrees(logits: torch.Tensor, a: dict) -> None:
    """Every entry is what the definition says, or what it says for a top_p that is off by NEAR: the masses of the kernel are fp32."""
    got, want = kernel(logits, **a), definition(logits, **a)
    assert [t.dtype for t in got] == [t.dtype for t in want] and [t.shape for t in got] == [t.shape for t in want]
    wrong = [e for e in range(got.token.shape[0]) if not entry_agrees(got, want, e)]
    p = a.get("top_p", 1.0)
    others = [definition(logits, **a | {"top_p": q}) for q in (max(p - NEAR, 0.0), p + NEAR)] if wrong and p < 1 else []
    for e in wrong:
        assert any(entry_agrees(got, other, e) for other in others), (e, [t[e] for t in got], [t[e] for t in want])


def assert_same_bits(got: LogitStats, want: LogitStats) -> None:
    for name, a, b in zip(LogitStats._fields, got, want, strict=True):
        assert torch.equal(a.nan_to_num(nan=-7.5), b.nan_to_num(nan=-7.5)), name


# ---- the table: one row of logits, its options, what must come out --------------------------------------------------
def row(*x: float) -> torch.Tensor:
    return torch.tensor([x])


def softmax(*x: float) -> tuple[float, float, float, float]:
    """p of the first, p of the second, entropy, logsumexp."""
    e = [math.exp(v - max(x)) for v in x]
    p = [v / sum(e) for v in e]
    return p[0], p[1] if len(p) > 1 else 0.0, -sum(v * math.log(v) for v in p if v > 0), max(x) + math.log(sum(e))


LN = [math.log(v) for v in (0.4, 0.3, 0.2, 0.1)]
TABLE = {
    "off": (row(*LN), {}, 0, softmax(*LN), 0),
    "the id that crosses top_p stays": (row(*LN), {"top_p": 0.45}, 0, softmax(*LN[:2]), 0),
    "more than top_p before it: gone": (row(*LN), {"top_p": 0.39}, 0, softmax(LN[0]), 0),
    "exactly top_p before it: stays": (row(0.0, 0.0, 0.0, 0.0), {"top_p": 0.5}, 0, softmax(0.0, 0.0, 0.0), 0),
    "top_p 0 keeps the first": (row(1.0, 2.0, 2.0), {"top_p": 0.0}, 1, softmax(2.0), 0),
    "top_p 1.5 is off": (row(*LN), {"top_p": 1.5}, 0, softmax(*LN), 0),
    "top_p inf is off": (row(*LN), {"top_p": INF}, 0, softmax(*LN), 0),
    "ties at the top-p cut: lowest ids": (row(0.0, 1.0, 0.0, 0.0), {"top_p": 0.6}, 1, softmax(1.0, 0.0), 0),
    "top_k": (row(*LN), {"top_k": 2}, 0, softmax(*LN[:2]), 0),
    "top_k 1": (row(*LN[::-1]), {"top_k": 1}, 3, softmax(LN[0]), 0),
    "top_k -1 is off": (row(*LN), {"top_k": -1}, 0, softmax(*LN), 0),
    "top_k V is off": (row(*LN), {"top_k": 4}, 0, softmax(*LN), 0),
    "ties with the k-th stay": (row(0.0, 1.0, 0.0, 0.0, -1.0), {"top_k": 2}, 1, softmax(1.0, 0.0, 0.0, 0.0), 0),
    "-0 ties with 0": (row(0.0, -0.0, -1.0), {"top_k": 1}, 0, softmax(0.0, 0.0), 0),
    "top-p before top-k": (row(*LN), {"top_p": 0.65, "top_k": 3}, 0, softmax(*LN[:2]), 0),
    "top-k before top-p renormalises": (row(*LN), {"top_p": 0.5, "top_k": 2, "top_k_first": True}, 0, softmax(LN[0]), 0),
    "the same with top-p first": (row(*LN), {"top_p": 0.5, "top_k": 2}, 0, softmax(*LN[:2]), 0),
    "a temperature divides": (row(*LN), {"temperature": 0.5, "top_k": 1}, 0, softmax(2 * LN[0]), 0),
    "top_p of the tempered softmax": (row(2.0, 0.0, 0.0), {"temperature": 2.0, "top_p": 0.7, "top_k": 1}, 0, softmax(1.0), 0),
    "forbidden ids count in the mass": (row(*LN), {"forbid": [0], "top_p": 0.45}, 1, (3 / 7, 0, None, math.log(0.7)), 0),
    "forbidden ids count in the k": (row(*LN), {"forbid": [0], "top_k": 2}, 1, (3 / 7, 0, None, math.log(0.7)), 0),
    "the best candidate stays": (row(*LN), {"forbid": [0, 1], "top_k": 1}, 2, (1 / 3, 0, None, math.log(0.6)), 0),
    "the best candidate stays, sampled": (row(*LN), {"forbid": [0, 1], "top_k": 2, "temperature": 1.0}, 2, (2 / 9, 0, None, math.log(0.9)), 0),
    "suppressed ids count nowhere": (row(*LN), {"suppress": [0], "top_p": 0.45}, 1, softmax(*LN[1:2]), 0),
    "bias comes first": (row(*LN), {"bias_ids": [[3]], "bias": [[9.0]], "top_k": 1}, 3, softmax(LN[3] + 9), 0),
    "V = 1": (row(3.0), {"top_p": 0.1, "top_k": 1}, 0, softmax(3.0), 0),
    "+inf takes all": (row(0.0, INF, 5.0), {"top_p": 0.9}, 1, (1, 0, 0, INF), 0),
    "+inf ties, top_p": (row(INF, 0.0, INF, INF), {"top_p": 0.5}, 0, (1 / 2, 1 / 2, math.log(2), INF), 0),
    "+inf ties, top_k": (row(INF, 0.0, INF, INF), {"top_k": 2}, 0, (1 / 3, 1 / 3, math.log(3), INF), 0),
    "+inf, top_k beyond": (row(INF, 0.0, -1.0), {"top_k": 2}, 0, (1, 0, 0, INF), 0),
    "+inf forbidden": (row(INF, 0.0, 1.0), {"top_p": 0.5, "forbid": [0]}, 2, (0, 0, 0, INF), 0),
    "fewer than k above -inf": (row(-INF, 1.0, -INF, 0.0), {"top_k": 3}, 1, softmax(1.0, 0.0), 0),
    "all -inf": (row(-INF, -INF), {"top_p": 0.5}, -1, (NAN,) * 4, Status.ALL_INF),
    "all candidates forbidden": (row(1.0, 2.0, 3.0), {"top_k": 1, "forbid": [0, 1, 2]}, -1, (NAN,) * 4, Status.ALL_INF),
    "all suppressed": (row(1.0, 2.0, 3.0), {"top_k": 1, "suppress": [0, 1, 2]}, -1, (NAN,) * 4, Status.ALL_INF),
    "NaN": (row(0.0, NAN, 1.0), {"top_k": 1}, -1, (NAN,) * 4, Status.NAN),
    "NaN beside +inf": (row(INF, NAN), {"top_p": 0.5}, -1, (NAN,) * 4, Status.NAN),
    "NaN beside -inf": (row(-INF, NAN), {"top_p": 0.5}, -1, (NAN,) * 4, Status.NAN),
    "NaN without filters": (row(0.0, NAN), {"temperature": 0.5}, -1, (NAN,) * 4, Status.NAN),
    "suppressed NaN": (row(0.0, NAN, -1.0), {"top_k": 1, "suppress": [1]}, 0, softmax(0.0), 0),
    "bias beyond V": (row(*LN), {"bias_ids": [[7]], "bias": [[9.0]], "top_k": 1}, 0, softmax(LN[0]), Status.BAD_ID),
    "forbid beyond V": (row(*LN), {"forbid": [4], "top_k": 1}, 0, softmax(LN[0]), Status.BAD_ID),
    "suppress beyond V": (row(*LN), {"suppress": [4]}, 0, softmax(*LN), Status.BAD_ID),
    "row -1": (row(*LN), {"rows": [-1], "top_k": 1}, -1, (0,) * 4, 0),
    "row too high": (row(*LN), {"rows": [1], "top_k": 1}, -1, (NAN,) * 4, Status.BAD_ROW),
    "row too low": (row(*LN), {"rows": [-2], "top_k": 1}, -1, (NAN,) * 4, Status.BAD_ROW),
    "large values": (row(3e38, -3e38, 3e38), {"top_p": 0.4, "top_k": 2}, 0, (1, 0, 0, 3e38), 0),
    "tiny temperature": (row(1.0, 1.0000001, 0.0), {"temperature": 1e-38, "top_p": 0.9}, 1, (1, 0, 0, 1.00000012e38), 0),
    "huge temperature": (row(5.0, 2.0, -40.0, 0.0), {"temperature": 1e30, "top_p": 0.5, "top_k": 1}, 0, (1, 0, 0, 0), 0),
}


def options(a: dict, entries: int = 1) -> dict:
    out = {k: torch.tensor(v, dtype=torch.float32 if k == "bias" else torch.int64) if isinstance(v, list) else v for k, v in a.items()}
    if out.get("temperature", 0) > 0:
        out |= {name: torch.arange(entries) for name in ("seed", "step", "pos")}
    return out


@FUNCTIONS
@pytest.mark.parametrize("case", TABLE)
def test_table(fn, case):
    logits, given_options, token, (p1, p2, entropy, logsumexp), status = TABLE[case]
    out = fn(logits, **options(given_options))
    assert out.token.tolist() == [token] and out.status.tolist() == [int(status)]
    if out.token[0] >= 0:
        assert float(out.p + out.p_rest) == pytest.approx(1.0, abs=1e-7)
    for got, want in zip(out.stats[0, 1:5].tolist(), (p1, p2, entropy, logsumexp), strict=True):
        assert want is None or got == pytest.approx(want, rel=4e-7, abs=2e-7, nan_ok=True)


# ---- against the definition -----------------------------------------------------------------------------------------
SIZES = st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 65, 127, 200, 1000, 4095, 4096, 4097, 4096 + 65, 9001])


@st.composite
def calls(draw):
    """(logits, options): special values, ties, every list, every mix of filters."""
    v, n = draw(SIZES), draw(st.integers(0, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    x = torch.randn(n, v, generator=g) * draw(st.sampled_from([0.0, 0.1, 3.0, 40.0])) + draw(st.sampled_from([0.0, 0.0, -17.0, 300.0]))
    if draw(st.booleans()):
        x = x.round()  # ties
    for special in draw(st.lists(st.sampled_from([INF, -INF, NAN, -0.0, 3e38, 1e-40]), max_size=2)):
        where = torch.rand(n, v, generator=g) < draw(st.sampled_from([1.5 / v, 0.5, 0.99]))
        x[where & (integers(0, 2, n, 1) == 0)] = special
    a = {
        "temperature": draw(st.sampled_from([0.0, 0.0, 1e-3, 0.2, 0.7, 1.0, 5.0, 1e30])),
        "top_p": draw(st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0, 1.0])),
        "top_k": draw(st.sampled_from([-1, 0, 0, 1, 2, 3, 17, 50, 400, v - 1, v])),
        "top_k_first": draw(st.booleans()),
    }
    entries = n
    if draw(st.booleans()):
        entries = draw(st.integers(0, 6))
        a["rows"] = integers(-2 if draw(st.booleans()) else -1, n + 1, entries)
    high = v + draw(st.sampled_from([0, 0, 0, 1]))
    for name in ("forbid", "suppress"):
        if draw(st.booleans()):
            a[name] = integers(-1, high, draw(st.integers(0, 12)))
    if n and draw(st.integers(0, 3)) == 0:  # the best ids are forbidden
        a["forbid"] = x.nan_to_num(nan=0.0).topk(min(3, v), dim=1).indices.flatten()
    if draw(st.booleans()):
        a["bias_ids"] = integers(-1, high, entries, draw(st.integers(0, 5)))
        a["bias"] = torch.randn(a["bias_ids"].shape, generator=g) * 3
    if a["temperature"] > 0 or draw(st.booleans()):
        a["seed"], a["step"], a["pos"] = (integers(-(2**62), 2**62, entries) for _ in range(3))
    for name in [k for k in a if isinstance(a[k], torch.Tensor)]:
        a[name] = relayout(a[name], draw(st.sampled_from(ALL_LAYOUTS)))
    return relayout(x.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(ALL_LAYOUTS))), a


@given(calls())
def test_equals_the_definition(call):
    logits, a = call
    before = logits.clone()
    assert_agrees(logits, a)
    assert torch.equal(logits.nan_to_num(nan=-7.5), before.nan_to_num(nan=-7.5))


@given(calls())
def test_with_filters_off_it_is_logit_stats(call):
    """The token for every temperature; everything at temperatures 0 and 1, bit for bit."""
    logits, a = call
    a |= {"top_p": 1.0, "top_k": 0}
    got = kernel(logits, **a)
    lists = (a.get(name) for name in ("rows", "forbid", "suppress", "bias_ids", "bias"))
    want = LogitStats(*_logit_stats(logits, *lists, None, 0, a["temperature"], *(a.get(name) for name in ("seed", "step", "pos"))))
    assert torch.equal(got.token, want.token) and torch.equal(got.status, want.status)
    if a["temperature"] in (0.0, 1.0):
        assert_same_bits(got, want)


@pytest.mark.parametrize("temperature", (0.0, 0.2))
@pytest.mark.parametrize("filters", ({"top_p": 0.95}, {"top_k": 50}, {"top_p": 0.95, "top_k": 50}, {"top_p": 0.9, "top_k": 3000}), ids=str)
@pytest.mark.parametrize("first", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_large_rows(dtype, first, filters, temperature):
    vocab = 50_257
    logits = torch.stack([torch.randn(vocab) * scale + shift for scale, shift in ((3.0, 0.0), (0.3, -7.0), (1.0, 20.0))]).to(dtype)
    logits[2, 777] = 45.0
    key = {name: torch.arange(3) + i for i, name in enumerate(("seed", "step", "pos"))}
    assert_agrees(logits, dict(filters, top_k_first=first, temperature=temperature, suppress=torch.tensor([5]), **key))


# Rows that keep more than V / 16 ids take another way, judged from every 32nd id (csrc/cpu/filtered_stats_head.h).
def flat_rows(vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Flat, flatter, tied, all equal, one id ahead, alternating, and two rows whose 32nd ids mislead: lighter, or heavier, than the rest."""
    x = torch.randn(8, vocab) * torch.tensor([1.0, 0.1, 1.0, 0.0, 0.5, 0.0, 1.0, 1.0])[:, None]
    x[2] = x[2].mul(2).round()
    x[4, 777] = 9.0
    x[5, ::2] = 1.0
    sampled = torch.cat([torch.arange(c * CHUNK + c % 32, min(vocab, (c + 1) * CHUNK), 32) for c in range(-(-vocab // CHUNK))])
    x[6, sampled] -= 12.0
    x[7, sampled] += 12.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", ({"top_p": 0.95}, {"top_p": 0.3}, {"top_k": 5000}, {"top_p": 0.99, "top_k": 9000, "top_k_first": True}), ids=str)
@pytest.mark.parametrize("layout", ("dense", "step"))
def test_many_kept_ids(dtype, filters, layout):
    vocab = 17_011
    logits = flat_rows(vocab, dtype)
    n = logits.shape[0]
    key = {name: torch.arange(n) + 7 * i for i, name in enumerate(("seed", "step", "pos"))}
    best = logits.float().topk(2, dim=1).indices.flatten()
    for temperature in (0.0, 2.0):
        for lists in ({}, {"forbid": best, "suppress": torch.tensor([3, vocab]), "bias_ids": torch.full((n, 1), 9), "bias": torch.ones(n, 1)}):
            assert_agrees(relayout(logits, layout), dict(filters, temperature=temperature, **lists, **key))


def test_kept_ids_are_those_of_the_published_code():
    """`top_p_logits` and `top_k_logits` as published (HKUNLP/Dream), restated: sort, shift the removal by one, scatter; k-th value."""
    x = torch.randn(40, 300) * 3
    for p, k in ((0.95, 0), (0.5, 0), (1.0, 7), (0.9, 20), (0.3, 200)):
        ordered, index = x.sort(-1, descending=True)
        over = ordered.double().softmax(-1).cumsum(-1) > p
        over = torch.cat((torch.zeros(40, 1, dtype=torch.bool), over[:, :-1]), 1)
        y = x.masked_fill(torch.zeros_like(over).scatter(-1, index, over), -INF) if p < 1 else x
        if k:
            y = y.masked_fill(y < y.topk(k).values[:, -1:], -INF)
        assert torch.equal(kept_ids(x, 1.0, p, k, False), y > -INF)


@pytest.mark.parametrize("top_p, top_k", ((0.9, 0), (1.0, 20), (0.8, 30)))
def test_the_sampled_token_follows_the_filtered_softmax(top_p, top_k):
    """Chi-square of 20,000 draws over the kept ids, and never one that was removed."""
    n, x = 20_000, torch.randn(60) * 2
    seed = torch.arange(n)
    out = kernel(x.expand(n, -1), temperature=0.7, top_p=top_p, top_k=top_k, seed=seed, step=seed % 3, pos=seed % 7)
    kept = kept_ids(x[None], float(torch.tensor(0.7)), top_p, top_k, False)[0]
    want = torch.where(kept, x / 0.7, -INF).double().softmax(0)
    seen = torch.bincount(out.token, minlength=60).double()
    assert seen[~kept].sum() == 0
    square = ((seen - n * want)[kept] ** 2 / (n * want)[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert square < freedom + 5 * math.sqrt(2 * freedom), (float(square), freedom)
    torch.testing.assert_close(out.p, want[out.token].float(), rtol=2e-6, atol=1e-7)


# ---- invariance -------------------------------------------------------------------------------------------------------
def big_call(n: int, dtype: torch.dtype, filters: dict) -> tuple[torch.Tensor, dict]:
    vocab = 10 * CHUNK + 77
    a = {
        "temperature": 0.9, "forbid": torch.tensor([7, 9000]), "suppress": torch.arange(12_000, 12_050),
        "bias_ids": torch.randint(vocab, (n, 3)), "bias": torch.randn(n, 3),
        "seed": torch.arange(n), "step": torch.arange(n) + 5, "pos": torch.arange(n) * 3,
    }  # fmt: skip
    return (torch.randn(n, vocab) * 4).to(dtype), a | filters


@pytest.mark.parametrize(
    "filters",
    ({}, {"top_p": 0.9}, {"top_p": 0.9, "temperature": 4.0}, {"top_k": 40}, {"top_p": 0.8, "top_k": 300, "top_k_first": True}),
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_batched_strided_and_at_any_thread_count(threads, dtype, filters):
    logits, a = big_call(12, dtype, filters)
    threads(1)
    want = kernel(logits, **a)
    for count in (2, 3):
        threads(count)
        assert_same_bits(kernel(logits, **a), want)
    for layout in ("offset", "step", "gap", "transposed"):
        assert_same_bits(kernel(relayout(logits, layout), **a), want)
    part = {k: v[3:4] if k in PER_ENTRY else v for k, v in a.items()}
    assert_same_bits(kernel(logits[3:4], **part), LogitStats(*(t[3:4] for t in want)))
    rows = torch.tensor([5, -1, 5, 11])
    part = {k: v[rows] if k in PER_ENTRY else v for k, v in a.items()}
    picked = kernel(logits, rows=rows, **part)
    for i in (0, 2, 3):
        assert_same_bits(LogitStats(*(t[i] for t in picked)), LogitStats(*(t[rows[i]] for t in want)))


@pytest.mark.parametrize("poison", (NAN, INF, -INF))
def test_a_bad_row_leaves_the_others_alone(poison):
    logits, a = big_call(6, torch.bfloat16, {"top_p": 0.9, "top_k": 90})
    want = kernel(logits, **a)
    logits[2] = poison
    got = kernel(logits, **a)
    others = torch.arange(6) != 2
    assert_same_bits(LogitStats(*(t[others] for t in got)), LogitStats(*(t[others] for t in want)))
    assert got.token[2] == -1 or poison == INF


@pytest.mark.parametrize("where", (0, 63, 4095, 4096, 10 * CHUNK + 76))
@pytest.mark.parametrize("filters", ({"top_p": 0.9}, {"top_k": 40}, {}), ids=str)
def test_no_nan_escapes(where, filters):
    for dtype in DTYPES:
        logits = torch.randn(1, 10 * CHUNK + 77).to(dtype)
        logits[0, where] = NAN
        assert kernel(logits, **filters).status.tolist() == [Status.NAN]


@FUNCTIONS
def test_empty(fn):
    assert [list(t.shape) for t in fn(torch.empty(0, 50), top_p=0.5)] == [[0, 1], [0, 6], [0]]
    assert fn(torch.empty(0, 50), rows=torch.tensor([0, -1]), top_k=3).status.tolist() == [Status.BAD_ROW, 0]


# ---- errors -----------------------------------------------------------------------------------------------------------
X = torch.zeros(3, 10)
I3 = torch.zeros(3, dtype=torch.int64)
ERRORS = {
    "logits must be float32, bfloat16 or float16, got float64": (X.double(), {}),
    "logits must be [N, V] = [any, any], got [10]": (X[0], {}),
    "V of logits must be 1 to 2147483647, got 0": (X[:, :0], {}),
    "rows must be int64, got int32": (X, {"rows": I3.int()}),
    "temperature must be a number in [0, 1e30], got -0.500000": (X, {"temperature": -0.5}),
    "top_p must be a number of at least 0 (1 or more: off), got -0.100000": (X, {"top_p": -0.1}),
    "top_p must be a number of at least 0 (1 or more: off), got nan": (X, {"top_p": NAN}),
    "forbid must be int64, got float32": (X, {"forbid": X[0]}),
    "bias must be given with bias_ids, got None": (X, {"bias_ids": I3[:, None]}),
    "seed must be given when temperature > 0, got None": (X, {"temperature": 1.0, "top_k": 3}),
    "pos must be [T'] = [3], got [2]": (X, {"temperature": 1.0, "seed": I3, "step": I3, "pos": I3[:2]}),
}


@FUNCTIONS
@pytest.mark.parametrize("message", ERRORS)
def test_errors(fn, message):
    logits, a = ERRORS[message]
    with pytest.raises(RuntimeError, match=re.escape(f"filtered_stats: {message}")):
        fn(logits, **a)


# ---- torch ------------------------------------------------------------------------------------------------------------
def test_opcheck_and_compile():
    x = torch.randn(3, 50)
    lists = (torch.tensor([1]), None, I3[:, None], X[:, :1])
    torch.library.opcheck(_filtered_stats.default, (x, I3, *lists, 0.5, 0.9, 5, True, I3, I3, I3))
    torch.library.opcheck(_filtered_stats.default, (x, *[None] * 5, 0.0, 1.0, 0, False, None, None, None))

    def f(x):
        out = ops.filtered_stats(x, top_p=0.8, top_k=4)
        return out.margin + out.entropy, out.token

    for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x), strict=True):
        assert torch.equal(a, b)


def test_wrapper():
    x, rows = torch.randn(4, 30), torch.tensor([1, 2])
    a = dict(forbid=torch.tensor([3]), top_p=0.7, top_k=5, top_k_first=True)
    out = ops.filtered_stats(x, rows, **a)
    assert_same_bits(out, kernel(x, rows=rows, **a))
    assert out.at_ids.shape == (2, 0, 2) and out.topk_id.shape == (2, 0)


# ---- the LM head ------------------------------------------------------------------------------------------------------
FILTERED = dict(top_p=0.9, top_k=300, forbid=torch.tensor([3]))


@pytest.mark.parametrize("dtype, format", [(torch.float32, "packed"), (torch.float32, "plain"), (torch.bfloat16, "packed_fp32")])
@pytest.mark.parametrize("vocab", [61, 4096, 9000])
def test_head_equals_the_op_on_the_logits(dtype, format, vocab):
    head, hidden, n = Head(torch.randn(vocab, 32).to(dtype), format), torch.randn(20, 32).to(dtype), 20
    key = dict(seed=torch.arange(n), step=torch.arange(n) % 3, pos=torch.arange(n) + 5)
    for a in ({}, FILTERED, dict(FILTERED, temperature=0.8, **key), dict(top_p=0.5, bias_ids=torch.randint(0, vocab, (n, 2)), bias=torch.randn(n, 2))):
        assert_same_bits(head_filtered_stats(hidden, head, **a), ops.filtered_stats(head.logits(hidden), **a))


@pytest.mark.parametrize("on_cuda", (False, True))
def test_head_rows_and_chunks(monkeypatch, on_cuda):
    """An entry does not depend on the others or on how many are computed at once; -1 reads as none. on_cuda: the way without host reads."""
    head, hidden = Head(torch.randn(5000, 32), "packed"), torch.randn(40, 32)
    everything = head_filtered_stats(hidden, head, **FILTERED)
    rows = torch.tensor([7, -1, 39, 7, 40, 0, *range(30), -5])
    module = sys.modules["unmask.ops.head_stats"]
    monkeypatch.setattr(module, "LOGITS_BYTES", 16 * 5000 * 4)
    if on_cuda:
        shared = dict(suppress=None, temperature=0.0, top_k_first=False) | FILTERED
        got = module._all_entries(hidden, head, rows, shared, dict.fromkeys(("bias_ids", "bias", "seed", "step", "pos")), module._reduce_filtered)
    else:
        got = head_filtered_stats(hidden, head, rows, **FILTERED)
    for e, r in enumerate(rows.tolist()):
        if 0 <= r < 40:
            assert_same_bits(LogitStats(*(t[e] for t in got)), LogitStats(*(t[r] for t in everything)))
        else:
            assert got.token[e] == -1 and got.status[e] == (0 if r == -1 else Status.BAD_ROW)
    alone = head_filtered_stats(hidden, head, torch.tensor([11]), **FILTERED)
    assert_same_bits(alone, LogitStats(*(t[11:12] for t in everything)))
    assert head_filtered_stats(hidden[:0], head).token.shape == (0,)
    with pytest.raises(RuntimeError, match=re.escape("head_filtered_stats: hidden must be [M, d] = [any, 32], got [40, 31]")):
        head_filtered_stats(hidden[:, :31], head)
