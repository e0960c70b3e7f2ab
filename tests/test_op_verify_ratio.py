"""verify_ratio: against the definition, special and hostile contents, invariance, errors; that speculative sampling with the library's own draws
gives the target's distribution; and opcheck and compilation of both verify ops."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given

from strided import LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status
from verify_kit import (
    CRITICAL,
    DRAWS,
    DTYPES,
    INF,
    MASK,
    NAN,
    NODE,
    Call,
    assert_explained,
    chi_square,
    equal,
    ids,
    native_greedy,
    native_ratio,
    ratio_calls,
    spans,
    speculate,
)


@given(ratio_calls())
def test_ratio_equals_the_definition(call):
    assert_explained(call, call.kernel(), call.definition())


def test_equal_rows_are_accepted_whole():
    call = spans(50, 4, 300)
    got = call._replace(q_logits=call.p_logits.clone()).kernel()
    assert got.accepted.tolist() == [4] * 50 and got.next.tolist() == [-1] * 50 and not got.log_ratio.any() and not got.status.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_is_that_of_the_softmaxes(dtype):
    call = spans(20, 3, 9001, dtype)._replace(temper=0.7, temperature=1.3)
    p, q = ((x.double() / 1.3).log_softmax(1).gather(1, call.token[:, None])[:, 0] for x in (call.p_logits, call.q_logits))
    torch.testing.assert_close(call.kernel().log_ratio.double(), 0.7 * (q - p), rtol=1e-6, atol=1e-5)


def test_recorded_uniforms_decide_by_the_ratio():
    """u < q / p, as published code has it; the residual's support is q > p; nothing else is drawn."""
    call = spans(300, 1, 50)
    ratio = call.kernel().log_ratio.double().exp()
    u = torch.rand(300, dtype=torch.float64)
    for uniforms in (u, u.float()):
        got = call._replace(uniforms=uniforms).kernel()
        assert torch.equal(got.accepted.bool(), uniforms.double() < ratio)
        rejected = torch.nonzero(got.accepted == 0)[:, 0]
        assert len(rejected) > 30 and bool((got.next[got.accepted == 1] == -1).all())
        mass = (call.q_logits.softmax(1) - call.p_logits.softmax(1))[rejected, got.next[rejected]]
        assert bool((mass > 0).all())
    alone = call._replace(uniforms=u, seed=None, step=None, pos=None, resample=False).kernel()
    assert torch.equal(alone.accepted.bool(), u < ratio) and bool((alone.next == -1).all())


@pytest.mark.parametrize("run", (Call.kernel, Call.definition))
def test_ratio_special_values(run):
    """(p row, q row, token) -> log ratio; u = 1/2 throughout."""
    x = torch.tensor([[0.0, 0.0, -INF], [0.0, -INF, 0.0], [INF, INF, 0.0], [INF, 0.0, 0.0], [0.0, NAN, 0.0], [-INF] * 3])
    half = math.log(0.5)
    cases = {
        (0, 0, 0): (0.0, 1, -1, 0), (0, 1, 1): (-INF, 0, 2, 0), (0, 1, 2): (INF, 1, -1, 0), (0, 0, 2): (-INF, 0, None, 0),
        (2, 2, 1): (0.0, 1, -1, 0), (3, 2, 0): (half, 0, 1, 0), (2, 3, 0): (-half, 1, -1, 0), (2, 3, 1): (-INF, 0, 0, 0), (3, 0, 1): (INF, 1, -1, 0),
        (4, 0, 0): (NAN, 0, -1, 1), (0, 4, 0): (NAN, 0, -1, 1), (5, 0, 0): (NAN, 0, -1, 2), (4, 5, 0): (NAN, 0, -1, 3),
        (-1, 0, 0): (0.0, 0, -1, 0), (0, -1, 7): (0.0, 0, -1, 0), (-2, 0, 0): (NAN, 0, -1, 4), (0, 6, 0): (NAN, 0, -1, 4),
        (0, 0, 3): (NAN, 0, -1, 8), (0, 9, -1): (NAN, 0, -1, 12),
    }  # fmt: skip
    p_row, q_row, token = (torch.tensor(t) for t in zip(*cases, strict=True))
    n = torch.arange(len(cases))
    got = run(Call(x, x, p_row, q_row, token, torch.arange(len(cases) + 1), n, n, n, torch.full((len(cases),), 0.5)))
    for i, (ratio, accepted, following, status) in enumerate(cases.values()):
        assert got.log_ratio[i].item() == pytest.approx(ratio, abs=1e-6, nan_ok=True), i
        assert (got.accepted[i].item(), got.status[i].item()) == (accepted, status), i
        assert got.next[i].item() == following if following is not None else got.next[i].item() in (0, 1), i  # q == p: drawn from q


@pytest.mark.parametrize("run", (Call.kernel, Call.definition))
def test_a_span_ends_before_its_first_inactive_position(run):
    x = torch.zeros(2, 4)
    x[1, 1] = NAN
    p_row, q_row = ids(0, 0, -1, 1, 0, 0, 1), ids(0, 0, 0, 1, 0, 0, 0)
    n = torch.arange(7)
    call = Call(x, x, p_row, q_row, ids(0, 1, 9, 9, 0, 1, 2), ids(0, 4, 4, 7), n, n, n)
    got = run(call)  # what lies behind the end does not count, a NaN before it does
    assert got.accepted.tolist() == [2, 0, 0] and got.next.tolist() == [-1, -1, -1] and got.status.tolist() == [0, 0, int(Status.NAN)]
    bad = run(call._replace(cu=ids(0, 4, 2, 8)))
    assert bad.accepted.tolist() == [2, 0, 0] and bad.status.tolist() == [0, int(Status.BAD_SEGMENT), int(Status.BAD_SEGMENT)]


@pytest.mark.parametrize("run", (Call.kernel, Call.definition))
def test_forbidden_ids_are_removed_from_both_sides(run):
    p, q = torch.randn(1, 40), torch.randn(1, 40)
    p[0, 7], q[0, 9] = 30.0, NAN  # what a forbidden id's logit is makes no difference
    n = torch.arange(40)
    call = Call(p, q, n * 0, n * 0, n, torch.arange(41), n, n, n, forbid=ids(7, 9, -1))
    got = run(call)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[7, 9]] = False
    want = torch.full((40,), -INF)
    want[keep] = (q[0, keep].log_softmax(0) - p[0, keep].log_softmax(0)).float()
    torch.testing.assert_close(got.log_ratio, want, rtol=1e-5, atol=1e-5)
    assert got.accepted[7] == got.accepted[9] == 0 and not bool(torch.isin(got.next, ids(7, 9)).any()) and not got.status.any()
    outside = run(call._replace(forbid=ids(7, 9, 40)))
    assert outside.status.tolist() == [int(Status.BAD_ID)] * 40 and torch.equal(outside.next, got.next)


def test_ties_take_the_lowest_id():
    """Uniforms of 1 reject; equal masses and equal words cannot be had, so equal rows show the order: the draw is then from q."""
    vocab, n = 9001, torch.arange(64)
    x = torch.full((1, vocab), -INF)
    x[0, [5, 4097, 9000]] = 0.0
    call = Call(x, x, n * 0, n * 0, n * 0 + 5, torch.arange(65), n, n, n, torch.ones(64))
    got, want = call.kernel(), call.definition()
    assert torch.equal(got.next, want.next) and set(got.next.tolist()) == {5, 4097, 9000} and not got.accepted.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_has_the_same_bits_alone_batched_strided_and_at_any_thread_count(threads, dtype):
    call = spans(7, 3, 9001, dtype, spread=3.0)._replace(forbid=ids(3, 5000))
    threads(1)
    want = call.kernel()
    assert 0 < int((want.next >= 0).sum())
    for count in (2, 3):
        threads(count)
        assert equal(call.kernel(), want)
    for layout in LAYOUTS:
        assert equal(call._replace(p_logits=relayout(call.p_logits, layout), q_logits=relayout(call.q_logits, layout)).kernel(), want)
    for b in range(7):
        part = slice(3 * b, 3 * b + 3)
        alone = call._replace(**{name: getattr(call, name)[part] for name in ("p_row", "q_row", "token", "seed", "step", "pos")}, cu=ids(0, 3)).kernel()
        for name in ("accepted", "next", "status"):
            assert torch.equal(getattr(alone, name), getattr(want, name)[b : b + 1])
        assert torch.equal(alone.log_ratio, want.log_ratio[part])


def test_ratio_empty():
    none, x = ids(), torch.zeros(0, 5)
    got = Call(x, x, none, none, none, ids(0), none, none, none).kernel()
    assert [t.shape for t in got] == [(0,)] * 4
    got = Call(x, x, none, none, none, ids(0, 0, 0), none, none, none, torch.zeros(0), none).kernel()
    assert got.accepted.tolist() == [0, 0] and got.next.tolist() == [-1, -1] and got.status.tolist() == [0, 0]


X, Z = torch.zeros(2, 6), torch.zeros(3, dtype=torch.int64)
RATIO_ERRORS = {
    "p_logits must be float32, bfloat16 or float16, got float64": dict(p_logits=X.double()),
    "q_logits must be float32, got bfloat16": dict(q_logits=X.bfloat16()),
    "p_row must be int64, got int32": dict(p_row=Z.int()),
    "q_row must be int64, got int32": dict(q_row=Z.int()),
    "token must be int64, got int32": dict(token=Z.int()),
    "cu must be int64, got int32": dict(cu=Z.int()),
    "seed must be int64, got int32": dict(seed=Z.int()),
    "step must be given unless uniforms are and resample is off, got None": dict(step=None),
    "pos must be given unless uniforms are and resample is off, got None": dict(pos=None, uniforms=torch.zeros(3)),
    "uniforms must be float32 or float64, got bfloat16": dict(uniforms=torch.zeros(3).bfloat16()),
    "forbid must be int64, got int32": dict(forbid=Z.int()),
    "p_logits must be [P, V] = [any, any], got [6]": dict(p_logits=X[0]),
    "V of p_logits must be 1 to 2147483647, got 0": dict(p_logits=X[:, :0]),
    "q_logits must be [Q, V] = [any, 6], got [2, 5]": dict(q_logits=X[:, :5]),
    "p_row must be [N] = [any], got [1, 3]": dict(p_row=Z[None]),
    "q_row must be [N] = [3], got [2]": dict(q_row=Z[:2]),
    "token must be [N] = [3], got [2]": dict(token=Z[:2]),
    "cu must be [B + 1] = [any], got [1, 3]": dict(cu=Z[None]),
    "B + 1 of cu must be at least 1, got 0": dict(cu=Z[:0]),
    "pos must be [N] = [3], got [2]": dict(pos=Z[:2]),
    "uniforms must be [N] = [3], got [2]": dict(uniforms=torch.zeros(2)),
    "forbid must be [F] = [any], got [1, 3]": dict(forbid=Z[None]),
    "temper must be a finite number > 0, got 0.000000": dict(temper=0.0),
    "temper must be a finite number > 0, got inf": dict(temper=INF),
    "temperature must be a number in (0, 1e30], got 0.000000": dict(temperature=0.0),
    "temperature must be a number in (0, 1e30], got nan": dict(temperature=NAN),
}


@pytest.mark.parametrize("fn", (ops.verify_ratio, reference.verify_ratio))
@pytest.mark.parametrize("message", RATIO_ERRORS)
def test_ratio_errors(fn, message):
    arguments = dict(p_logits=X, q_logits=X, p_row=Z, q_row=Z, token=Z, cu=Z, seed=Z, step=Z, pos=Z)
    with pytest.raises(RuntimeError, match=re.escape(f"verify_ratio: {message}")):
        fn(**arguments | RATIO_ERRORS[message])


def test_opcheck_and_compile():
    status = torch.zeros(2, dtype=torch.int32)
    torch.library.opcheck(native_greedy.default, (NODE, NODE, NODE[..., 0] - 1, ids(1, 2), MASK, False, status))
    torch.library.opcheck(native_greedy.default, (NODE, NODE, None, ids(1, 2), MASK, True))
    torch.library.opcheck(native_ratio.default, (X, X, Z, Z, Z, ids(0, 1, 3), Z, Z, Z, None, ids(1), 1.0, 1.0, True))
    torch.library.opcheck(native_ratio.default, (X, X, Z, Z, Z, ids(0, 1, 3), None, None, None, torch.rand(3), None, 0.5, 2.0, False))

    def step(x):
        ratio = ops.verify_ratio(x, X, Z, Z, Z, ids(0, 1, 3), Z, Z, Z)
        return ratio.log_ratio + 1, ops.verify_greedy(NODE, NODE, None, ratio.accepted).last + 1

    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(X), step(X), strict=True):
        assert torch.equal(got, want)


# ---- distribution --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "forbidden"), [(1.0, False), (0.6, False), (1.0, True)])
def test_the_first_committed_token_is_distributed_as_the_target(dtype, temperature, forbidden):
    g = torch.Generator().manual_seed(11)
    p, q = ((torch.randn(1, 12, generator=g) * s).to(dtype) for s in (1.0, 1.5))
    draft, got = speculate(p, q, temperature=temperature, forbid=ids(4) if forbidden else None)
    x = q[0].double() / temperature
    if forbidden:
        x[4] = -INF
    target = x.softmax(0)
    committed = torch.where(got.accepted == 1, draft[:, 0], got.next)
    assert 0.02 < (got.accepted == 0).double().mean() and bool((committed >= 0).all()) and not got.status.any()
    assert chi_square(committed, target) < CRITICAL[10 if forbidden else 11]
    # the test can tell: it refuses the drafts, and what is accepted with a tempered ratio
    assert chi_square(draft[:, 0], (p[0].double() / temperature).masked_fill(target == 0, -INF).softmax(0)) < CRITICAL[10 if forbidden else 11]
    assert chi_square(draft[:, 0], target) > 1000
    _, tempered = speculate(p, q, temperature=temperature, temper=0.5, forbid=ids(4) if forbidden else None)
    assert chi_square(torch.where(tempered.accepted == 1, draft[:, 0], tempered.next), target) > 1000


def test_two_committed_tokens_are_independent():
    """The pair, given that the first was accepted or not, over two rows: the second token is target-distributed whatever the first was."""
    g = torch.Generator().manual_seed(5)
    p, q = torch.randn(2, 4, generator=g), torch.randn(2, 4, generator=g)
    draft, got = speculate(p, q, 2)
    target = q.double().softmax(1)
    went_on = got.accepted >= 1
    second = torch.where(got.accepted == 2, draft[:, 1], got.next)[went_on]
    first = draft[went_on, 0]
    p0, q0 = p[0].double().softmax(0), target[0]
    accepted = torch.minimum(p0, q0) / torch.minimum(p0, q0).sum()  # of an accepted first token
    assert len(second) > DRAWS // 3
    assert chi_square(first * 4 + second, (accepted[:, None] * target[1][None]).flatten()) < CRITICAL[15]
