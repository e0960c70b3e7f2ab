"""kl_stats: against the definition, against the rule as KLASS writes it, special values, invariance, errors."""

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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
_kl_stats = native("kl_stats")
FUNCTIONS = pytest.mark.parametrize("fn", (_kl_stats, reference.kl_stats))


def lse_of(x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    out = ops.logit_stats(x, rows).logsumexp
    return out.clone()


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=5e-6, equal_nan=True)


@st.composite
def calls(draw):
    v, n, m = draw(st.sampled_from([1, 2, 15, 33, 64, 65, 200, 4095, 4096, 4097, 9001])), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 3.0, 40.0]))
    x, y = torch.randn(n, v, generator=g) * scale, torch.randn(m, v, generator=g) * scale
    if draw(st.booleans()):
        y[0] = x[0] + 1e-2 * y[0]
    for t in (x, y):
        for special in draw(st.lists(st.sampled_from([INF, -INF, NAN, 3e38]), max_size=1)):
            t[(torch.rand(t.shape, generator=g) < 0.3) & (torch.randint(0, 2, (t.shape[0], 1), generator=g) == 0)] = special
    rows = previous_rows = None
    entries = n
    if draw(st.booleans()):
        entries = draw(st.integers(0, 6))
        rows = torch.randint(-1, n, (entries,), generator=g)
    if entries != m or draw(st.booleans()):
        previous_rows = torch.randint(-1, m, (entries,), generator=g)
    dtype = draw(st.sampled_from(DTYPES))
    x, y = (relayout(t.to(dtype), draw(st.sampled_from(ALL_LAYOUTS))) for t in (x, y))
    lse = relayout(lse_of(x, rows), draw(st.sampled_from(ALL_LAYOUTS[:-1])))
    return x, y, rows, previous_rows, lse, lse_of(y, previous_rows)


@given(calls())
def test_equals_the_definition(call):
    assert_near(_kl_stats(*call), reference.kl_stats(*call))


def test_as_klass_writes_it():
    """Float64 softmaxes, 1e-12 added to both: below 1e-6 from flooring."""
    x = torch.randn(30, 5000) * torch.linspace(0.2, 4, 30)[:, None]
    y = x + torch.randn(30, 5000) * torch.linspace(0.001, 2, 30)[:, None]
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    want = (p * ((p + 1e-12) / (q + 1e-12)).log()).sum(-1)
    got = ops.kl_stats(x, y, lse=lse_of(x), previous_lse=lse_of(y))
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=3e-6)


@FUNCTIONS
def test_special_values(fn):
    x = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0], [0.0, NAN, 0.0], [INF, 0.0, 0.0]])
    lse = torch.tensor([math.log(2), math.log(3), NAN, INF])
    cases = {(0, 0): 0.0, (0, 1): math.log(3 / 2), (-1, 0): 0.0, (-1, -1): 0.0, (0, -1): INF, (2, -1): INF, (2, 0): NAN, (0, 2): NAN,
             (3, 0): NAN, (0, 3): NAN, (4, 0): NAN, (-2, 0): NAN, (4, -1): NAN, (0, 4): NAN, (0, -2): NAN, (-1, 9): 0.0}  # fmt: skip
    cases[1, 0] = 2 / 3 * math.log(2 / 3) + 1 / 3 * (math.log(1 / 3) - math.log(1e-12))  # -inf is floored in q
    rows, previous_rows = (torch.tensor(t) for t in zip(*cases, strict=True))
    got = fn(x, x, rows, previous_rows, lse[rows.clamp(0, 3)], lse[previous_rows.clamp(0, 3)])
    assert got.tolist() == pytest.approx(list(cases.values()), rel=3e-7, abs=3e-7, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_logits_give_zero(dtype):
    x = (torch.randn(5, 9001) * 5).to(dtype)
    assert _kl_stats(x, x.clone(), None, None, lse_of(x), lse_of(x)).tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_batched_strided_and_at_any_thread_count(threads, dtype):
    x, y = ((torch.randn(9, 9001) * 3).to(dtype) for _ in range(2))
    lse, previous_lse = lse_of(x), lse_of(y)
    threads(1)
    want = _kl_stats(x, y, None, None, lse, previous_lse)
    for count in (2, 3):
        threads(count)
        assert torch.equal(_kl_stats(x, y, None, None, lse, previous_lse), want)
    for layout in ("offset", "step", "gap", "transposed"):
        assert torch.equal(_kl_stats(relayout(x, layout), relayout(y, layout), None, None, lse, previous_lse), want)
    rows = torch.tensor([4, 4, -1, 7])
    got = _kl_stats(x, y, rows, rows, lse[rows], previous_lse[rows])
    assert torch.equal(got, torch.where(rows < 0, 0.0, want[rows]))


def test_empty():
    none = torch.empty(0)
    assert _kl_stats(torch.empty(0, 5), torch.empty(0, 5), None, None, none, none).shape == (0,)
    assert _kl_stats(torch.empty(2, 5), torch.empty(0, 5), none.long(), none.long(), none, none).shape == (0,)


X, L, I2 = torch.zeros(3, 10), torch.zeros(3), torch.zeros(2, dtype=torch.int64)
ERRORS = {
    "logits must be float32, bfloat16 or float16, got float64": dict(logits=X.double()),
    "previous must be float32, got bfloat16": dict(previous=X.bfloat16()),
    "logits must be [N, V] = [any, any], got [10]": dict(logits=X[0]),
    "V of logits must be 1 to 2147483647, got 0": dict(logits=X[:, :0]),
    "previous must be [M, V] = [any, 10], got [3, 9]": dict(previous=X[:, :9]),
    "lse must be float32, got float64": dict(lse=L.double()),
    "lse must be [T'] = [3], got [2]": dict(lse=L[:2]),
    "previous_lse must be [T'] = [3], got [2]": dict(previous_lse=L[:2]),
    "rows must be [T'] = [3], got [2]": dict(rows=I2),
    "rows must be int64, got int32": dict(rows=I2.int()),
    "previous_rows must be int64, got float32": dict(previous_rows=L),
    "previous must be [T', V] without previous_rows = [3, 10], got [2, 10]": dict(previous=X[:2]),
}


@pytest.mark.parametrize("fn", (ops.kl_stats, reference.kl_stats))
@pytest.mark.parametrize("message", ERRORS)
def test_errors(fn, message):
    with pytest.raises(RuntimeError, match=re.escape(f"kl_stats: {message}")):
        fn(**dict(logits=X, previous=X, lse=L, previous_lse=L) | ERRORS[message])


def test_opcheck_and_compile():
    rows = torch.tensor([0, 1, 2])
    torch.library.opcheck(_kl_stats.default, (X, X, None, None, L, L))
    torch.library.opcheck(_kl_stats.default, (X, X, rows, rows, L, L))
    compiled = torch.compile(lambda x: ops.kl_stats(x, X, lse=L, previous_lse=L) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), ops.kl_stats(X, X, lse=L, previous_lse=L) + 1)
