"""moe_route and moe_combine: against the definition (bits), against torch's own scores, ties, special values, invariance, errors."""

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
from unmask.ops.moe_route import SCORINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
KERNELS = {name: native(name) for name in ("moe_route", "moe_combine")}
ROUTE = pytest.mark.parametrize("fn", (ops.moe_route, reference.moe_route))


def kernel_route(logits, row=None, bias=None, *, top_k, scoring="softmax", n_groups=1, groups_kept=1, renormalise=True, scale=1.0, multiple=1):
    return ops.Routes(*KERNELS["moe_route"](logits, row, bias, SCORINGS.index(scoring), n_groups, groups_kept, top_k, renormalise, scale, multiple))


def assert_same(got: ops.Routes, want: ops.Routes) -> None:
    """Integers equal, weights to a unit in the last place: our exponential is right to 2^-45, so one in millions rounds the other way."""
    for name in ("expert", "place", "source", "offsets"):
        g, w = getattr(got, name), getattr(want, name)
        assert g.dtype == w.dtype and torch.equal(g, w), name
    torch.testing.assert_close(got.weight, want.weight, rtol=2.5e-7, atol=1e-44, equal_nan=True)


# --- against the definition -------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3, 8, 40]))
    size = draw(st.sampled_from([1, 2, 4, 5, 31, 32, 33, 64]))
    kept = draw(st.integers(1, groups))
    experts, tokens = groups * size, draw(st.integers(0, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(tokens, experts, generator=g) * draw(st.sampled_from([0.0, 0.3, 2.0, 30.0]))
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2  # ties
    for special in draw(st.lists(st.sampled_from([INF, -INF, NAN, 3e38, -100.0]), max_size=1)):
        logits[(torch.rand(logits.shape, generator=g) < 0.2) & (torch.randint(0, 2, (tokens, 1), generator=g) == 0)] = special
    bias = (torch.randint(-4, 5, (experts,), generator=g) / 8) if draw(st.booleans()) else None
    row = torch.randint(-2, 3, (tokens,), generator=g) if draw(st.booleans()) else None
    logits = relayout(logits, draw(st.sampled_from(ALL_LAYOUTS)))
    bias, row = (None if t is None else relayout(t, draw(st.sampled_from(ALL_LAYOUTS))) for t in (bias, row))
    return (logits, row, bias), dict(
        top_k=draw(st.integers(1, min(12, kept * size))), scoring=draw(st.sampled_from(["sigmoid", "softmax"])), n_groups=groups, groups_kept=kept,
        renormalise=draw(st.booleans()), scale=draw(st.sampled_from([1.0, 2.5])), multiple=draw(st.sampled_from([1, 3, 16])),
    )  # fmt: skip


@given(calls())
def test_equals_the_definition(call):
    arguments, options = call
    assert_same(kernel_route(*arguments, **options), reference.moe_route(*arguments, **options))


@given(calls())
def test_groups_are_a_stable_sort_of_the_pairs(call):
    """By counting, not by the definition's arithmetic: each group holds its expert's tokens in order, padded to the multiple."""
    arguments, options = call
    routes, k, multiple = kernel_route(*arguments, **options), options["top_k"], options["multiple"]
    experts, offsets = arguments[0].shape[1], routes.offsets.tolist()
    assert routes.source.shape[0] >= offsets[-1] and offsets[0] == 0
    used = []
    for e in range(experts):
        tokens = [t for t, chosen in enumerate(routes.expert.tolist()) if e in chosen]
        begin, end = offsets[e], offsets[e + 1]
        assert end - begin == -(-len(tokens) // multiple) * multiple
        assert routes.source[begin:end].tolist() == tokens + [0] * (end - begin - len(tokens))
        for i, t in enumerate(tokens):
            assert routes.place[t, routes.expert[t].tolist().index(e)] == begin + i
        used += tokens
    assert not routes.source[offsets[-1] :].any()
    live = [True] * len(routes.expert) if arguments[1] is None else (arguments[1] >= 0).tolist()
    assert sorted(used) == sorted(t for t, there in enumerate(live) if there for _ in range(k))
    for t, there in enumerate(live):
        assert there or (routes.expert[t].tolist(), routes.weight[t].tolist(), routes.place[t].tolist()) == ([-1] * k, [0.0] * k, [-1] * k)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_scores_are_those_of_torch(scoring):
    """Against float64: three roundings (exponential, sum, quotient), and for a softmax the rounding of x - max before them. Torch's own
    fp32 scores are as near or less so."""
    x = torch.cat([torch.randn(200, 256) * s for s in (0.1, 2.0, 8.0)])
    routes = ops.moe_route(x, top_k=256, scoring=scoring, renormalise=False)
    function = torch.sigmoid if scoring == "sigmoid" else lambda t: torch.softmax(t, -1)
    theirs, exact = function(x).gather(1, routes.expert), function(x.double()).gather(1, routes.expert)
    below = 0.0 if scoring == "sigmoid" else (x.amax(1, keepdim=True) - x).gather(1, routes.expert).double()
    assert ((routes.weight.double() - exact).abs() <= 2.0**-24 * (3.01 + below) * exact + 1e-44).all()
    torch.testing.assert_close(routes.weight, theirs, rtol=2e-6, atol=1e-37)


def test_sigmoid_s_of_extreme_logits():
    x = torch.tensor([[0.0, -0.0, 1e-30, 20.0, 100.0, 3e38, INF, -20.0, -88.0, -89.0, -100.0, -3e38, -INF]])
    weight = torch.zeros(13)
    routes = ops.moe_route(x, top_k=13, scoring="sigmoid", renormalise=False)
    weight[routes.expert[0]] = routes.weight[0]
    assert weight[:7].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert weight[9:].tolist() == [0.0] * 4  # e^89 is above the largest float
    torch.testing.assert_close(weight[7:9].double(), torch.sigmoid(x[0, 7:9].double()), rtol=2e-7, atol=0)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_every_exponential_is_right_to_a_unit_in_the_last_place(scoring):
    grid = torch.linspace(-87, 87, 200_001)
    if scoring == "sigmoid":
        got, exact = ops.moe_route(grid[:, None], top_k=1, scoring="sigmoid", renormalise=False).weight[:, 0], torch.sigmoid(grid.double())
    else:
        pairs = torch.stack((grid, torch.zeros_like(grid)), 1)
        routes = ops.moe_route(pairs, top_k=2, scoring="softmax", renormalise=False)
        got, exact = routes.weight.gather(1, routes.expert.argsort(1))[:, 0], torch.softmax(pairs.double(), 1)[:, 0]
    normal = exact > 2e-38
    assert (((got.double() - exact).abs() / exact)[normal] <= 1.6 * 2.0**-23).all()


# --- ties and special values ------------------------------------------------------------------------------------


@ROUTE
def test_ties_take_the_lowest_expert_and_group(fn):
    same = torch.zeros(1, 12)
    for options, want in (
        ({}, [0, 1, 2]),
        ({"n_groups": 4, "groups_kept": 1}, [0, 1, 2]),
        ({"n_groups": 4, "groups_kept": 2, "bias": torch.tensor([0.0] * 6 + [1.0] * 6)}, [6, 7, 8]),
        ({"n_groups": 12, "groups_kept": 3}, [0, 1, 2]),
        ({"bias": torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])}, [1, 3, 5]),
    ):
        assert fn(same, top_k=3, scoring="sigmoid", **options).expert.tolist() == [want]


@ROUTE
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_nan_and_infinite_logits(fn, scoring):
    x = torch.zeros(6, 8)
    x[0, 6] = NAN
    x[1] = NAN
    x[2, 5] = -INF
    x[3] = -INF
    x[4, 2] = INF
    routes = fn(x, top_k=3, scoring=scoring)
    clean = fn(x[5:], top_k=3, scoring=scoring)
    assert torch.equal(routes.weight[5], clean.weight[0]) and routes.expert[5].tolist() == [0, 1, 2]  # others are not touched
    assert routes.weight[0].isnan().all() and routes.weight[1].isnan().all()
    assert routes.expert[0, 0] == (6 if scoring == "sigmoid" else 0)  # NaN counts as the highest; a softmax of one is NaN everywhere
    assert routes.weight[2].isfinite().all() and 5 not in routes.expert[2]
    assert routes.weight[3].isnan().all() if scoring == "softmax" else not routes.weight[3].any()
    assert routes.weight[4].isnan().all() if scoring == "softmax" else routes.expert[4, 0] == 2
    assert ((routes.expert >= 0) & (routes.expert < 8)).all()


@ROUTE
def test_an_expert_outside_the_kept_groups_is_never_chosen(fn):
    bias = torch.tensor([0.0, 0, 0, 0, 5, 5, -INF, -INF])
    assert fn(torch.zeros(1, 8), None, bias, top_k=4, scoring="sigmoid", n_groups=2, groups_kept=1).expert.tolist() == [[4, 5, 6, 7]]


@ROUTE
def test_empty(fn):
    routes = fn(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), top_k=2, multiple=16)
    assert [list(t.shape) for t in routes] == [[0, 2], [0, 2], [0, 2], [0], [6]] and not routes.offsets.any()


@ROUTE
def test_the_most_padding_fits(fn):
    """Every pair with an expert of its own: M rows are all in use."""
    routes = fn(torch.eye(4) * 9, top_k=1, multiple=16)
    assert routes.offsets.tolist() == [0, 16, 32, 48, 64] and routes.source.tolist() == [t if i == 0 else 0 for t in range(4) for i in range(16)]


# --- invariance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_same_bits_alone_batched_strided_and_at_any_thread_count(threads, scoring):
    x, bias = torch.randn(400, 256) * 2, torch.randn(256) * 0.1
    options = dict(top_k=8, scoring=scoring, n_groups=8, groups_kept=4, scale=2.5, multiple=16)
    threads(1)
    want = kernel_route(x, None, bias, **options)
    for count in (2, 3):
        threads(count)
        for got, w in zip(kernel_route(x, None, bias, **options), want, strict=True):
            assert torch.equal(got, w)
    for layout in ("offset", "step", "gap", "transposed"):
        for got, w in zip(kernel_route(relayout(x, layout), None, relayout(bias, layout), **options), want, strict=True):
            assert torch.equal(got, w)
    for t in (0, 77, 399):
        alone = kernel_route(x[t : t + 1], None, bias, **options)
        assert torch.equal(alone.expert[0], want.expert[t]) and torch.equal(alone.weight[0], want.weight[t])
    row = torch.where(torch.arange(400) % 3 == 0, -1, 5)
    some = kernel_route(x, row, bias, **options)
    assert torch.equal(some.expert[row >= 0], want.expert[row >= 0]) and torch.equal(some.weight[row >= 0], want.weight[row >= 0])


# --- moe_combine ------------------------------------------------------------------------------------------------


@given(st.data())
def test_combine_equals_the_definition(data):
    """Bits: products and sums in one order, rounded once."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    m, t, k, d = (data.draw(st.integers(0, n)) for n in (9, 5, 4, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    y = torch.randn(m, d, generator=g).to(dtype)
    if m and data.draw(st.booleans()):
        y[0] = data.draw(st.sampled_from([NAN, INF]))
    place, weight = torch.randint(-2, m + 2, (t, k), generator=g), torch.randn(t, k, generator=g)
    y, place, weight = (relayout(x, data.draw(st.sampled_from(ALL_LAYOUTS))) for x in (y, place, weight))
    got, want = KERNELS["moe_combine"](y, place, weight), reference.moe_combine(y, place, weight)
    assert got.is_contiguous() and got.dtype == dtype and torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_gives_the_same_bits_in_any_batch_and_at_any_thread_count(threads, dtype):
    y, place, weight = torch.randn(300, 520).to(dtype), torch.randint(0, 300, (200, 8)), torch.rand(200, 8)
    threads(1)
    want = ops.moe_combine(y, place, weight)
    for count in (2, 3):
        threads(count)
        assert torch.equal(ops.moe_combine(y, place, weight), want)
    assert torch.equal(ops.moe_combine(y, place[33:50], weight[33:50]), want[33:50])


def test_a_token_without_experts_gets_zeros_whatever_the_rows_hold():
    y = torch.full((4, 20), NAN)
    place = torch.tensor([[-1, -1], [4, 100], [-(2**62), 2**62]])
    assert torch.equal(ops.moe_combine(y, place, torch.ones(3, 2)), torch.zeros(3, 20))
    assert torch.equal(ops.moe_combine(torch.empty(0, 20), place, torch.ones(3, 2)), torch.zeros(3, 20))


# --- errors -----------------------------------------------------------------------------------------------------

X, ROW, BIAS = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(8)
ERRORS = {
    "logits must be float32, got bfloat16": dict(logits=X.bfloat16()),
    "logits must be [T, E] = [any, any], got [8]": dict(logits=X[0]),
    "E of logits must be 1 to 4096, got 0": dict(logits=X[:, :0], bias=BIAS[:0]),
    "E of logits must be 1 to 4096, got 4097": dict(logits=torch.zeros(1, 4097), bias=None, row=None),
    "row must be int64, got int32": dict(row=ROW.int()),
    "row must be [T] = [3], got [2]": dict(row=ROW[:2]),
    "bias must be float32, got float64": dict(bias=BIAS.double()),
    "bias must be [E] = [8], got [7]": dict(bias=BIAS[:7]),
    "n_groups must be a divisor of E = 8, got 3": dict(n_groups=3),
    "n_groups must be a divisor of E = 8, got 0": dict(n_groups=0),
    "n_groups must be a divisor of E = 8, got -2": dict(n_groups=-2),
    "groups_kept must be 1 to n_groups = 4, got 5": dict(groups_kept=5),
    "groups_kept must be 1 to n_groups = 4, got 0": dict(groups_kept=0),
    "top_k must be 1 to the 4 experts of the kept groups, got 5": dict(top_k=5),
    "top_k must be 1 to the 4 experts of the kept groups, got 0": dict(top_k=0),
    "top_k must be 1 to the 8 experts of the kept groups, got 9": dict(top_k=9, n_groups=1, groups_kept=1),
    "scale must be finite, got": dict(scale=NAN),
    "multiple must be 1 to 1024, got 0": dict(multiple=0),
    "multiple must be 1 to 1024, got 1025": dict(multiple=1025),
}


@ROUTE
@pytest.mark.parametrize("message", ERRORS)
def test_errors(fn, message):
    with pytest.raises(RuntimeError, match=re.escape(f"moe_route: {message}")):
        fn(**dict(logits=X, row=ROW, bias=BIAS, top_k=2, n_groups=4, groups_kept=2) | ERRORS[message])


@ROUTE
def test_unknown_scoring(fn):
    with pytest.raises(ValueError, match="moe_route: scoring must be one of sigmoid, softmax, got 'relu'"):
        fn(X, top_k=2, scoring="relu")
    with pytest.raises(RuntimeError, match=re.escape("moe_route: scoring must be 0 (sigmoid) or 1 (softmax), got 2")):
        KERNELS["moe_route"](X, None, None, 2, 1, 1, 2, True, 1.0, 1)


Y, PLACE, WEIGHT = torch.zeros(6, 5), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
COMBINE_ERRORS = {
    "y must be float32, bfloat16 or float16, got float64": dict(y=Y.double()),
    "y must be [M, D] = [any, any], got [5]": dict(y=Y[0]),
    "place must be int64, got int32": dict(place=PLACE.int()),
    "place must be [T, K] = [any, any], got [2]": dict(place=PLACE[0]),
    "weight must be float32, got float16": dict(weight=WEIGHT.half()),
    "weight must be [T, K] = [3, 2], got [3, 1]": dict(weight=WEIGHT[:, :1]),
}


@pytest.mark.parametrize("fn", (ops.moe_combine, reference.moe_combine))
@pytest.mark.parametrize("message", COMBINE_ERRORS)
def test_combine_errors(fn, message):
    with pytest.raises(RuntimeError, match=re.escape(f"moe_combine: {message}")):
        fn(**dict(y=Y, place=PLACE, weight=WEIGHT) | COMBINE_ERRORS[message])


def test_opcheck_and_compile():
    for multiple in (1, 16):
        torch.library.opcheck(KERNELS["moe_route"].default, (torch.randn(3, 8), ROW, BIAS, 0, 4, 2, 2, True, 2.5, multiple))
        torch.library.opcheck(KERNELS["moe_route"].default, (torch.randn(30, 8), None, None, 1, 1, 1, 2, False, 1.0, multiple))
    torch.library.opcheck(KERNELS["moe_combine"].default, (torch.randn(6, 5), PLACE, WEIGHT))

    def mixture(x):
        routes = ops.moe_route(x, top_k=2, multiple=16)
        return ops.moe_combine(x.index_select(0, routes.source), routes.place, routes.weight)

    x = torch.randn(5, 8)
    want = mixture(x)
    torch.testing.assert_close(want, x)  # every expert gives its input back, and the weights add up to one
    for dynamic in (False, True):
        assert torch.equal(torch.compile(mixture, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x), want)
