"""verify_greedy and verify_ratio: against the definitions, special and hostile contents, invariance, errors; and that speculative sampling with the
library's own draws gives the target's distribution."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status
from unmask.reference.verify import log_of_uniform, log_softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
MASK = 9
_greedy, _ratio = native("verify_greedy"), native("verify_ratio")
GREEDY = pytest.mark.parametrize("greedy", (_greedy, reference.verify_greedy))


def ids(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# ---- verify_greedy -----------------------------------------------------------------------------------------------------
@st.composite
def greedy_calls(draw):
    b, n, w = draw(st.integers(0, 5)), draw(st.integers(0, 9)), draw(st.integers(0, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    node = torch.randint(0, 4, (b, n, w), generator=g)
    subset = draw(st.booleans())
    if subset:
        node[torch.rand(node.shape, generator=g) < draw(st.sampled_from([0.2, 0.8, 0.97]))] = MASK
    after = torch.randint(0, 4, (b, n, w), generator=g)
    parent = None
    if not subset and draw(st.booleans()):
        parent = torch.stack([torch.randint(-1, max(j, 0), (b,), generator=g) if j else torch.full((b,), -1) for j in range(n)], 1) if n else ids().view(b, 0)
    for row in range(b):  # most nodes are what some earlier one became
        for j in range(1, n):
            if torch.rand((), generator=g) < 0.8:
                made_by = int(torch.randint(0, j, (), generator=g)) if subset else j - 1 if parent is None else int(parent[row, j])
                kept = node[row, j] == MASK if subset else torch.zeros(w, dtype=torch.bool)
                node[row, j] = torch.where(kept, MASK, after[row, made_by])
    count = torch.randint(0, n + 1, (b,), generator=g)
    if draw(st.booleans()):
        hostile = draw(st.sampled_from([-1, n + 1, 2**40, -(2**62)]))
        count[torch.rand(b, generator=g) < 0.3] = hostile
        if parent is not None and n:
            parent[torch.rand(parent.shape, generator=g) < 0.1] = draw(st.sampled_from([-2, n - 1, n, 2**50]))
    node, after = (relayout(t, draw(st.sampled_from(LAYOUTS))) for t in (node, after))
    if parent is not None:
        parent = relayout(parent, draw(st.sampled_from(LAYOUTS)))
    return node, after, parent, relayout(count, draw(st.sampled_from(LAYOUTS))), MASK, subset


@given(greedy_calls(), st.sampled_from(LAYOUTS[:-1]))
def test_greedy_equals_the_definition(call, layout):
    status, expected = (torch.full((len(call[3]),), 3, dtype=torch.int32) for _ in range(2))
    status = relayout(status, layout)
    got, want = _greedy(*call, status), reference.verify_greedy(*call, expected)
    for g, w in zip((*got, status), (*want, expected), strict=True):
        assert torch.equal(g, w)
    for g, w in zip(_greedy(*call), want, strict=True):
        assert torch.equal(g, w)


@GREEDY
def test_a_chain_stands_up_to_the_first_difference(greedy):
    """SSD: node 0 is the canvas that plain decoding has, so it always stands."""
    g = torch.Generator().manual_seed(4)
    for n in range(1, 7):
        for broken in range(1, n + 1):
            after = torch.randint(0, 5, (1, n, 8), generator=g)
            node = torch.cat((torch.randint(0, 5, (1, 1, 8), generator=g), after[:, :-1]), 1)
            if broken < n:
                node[0, broken, 3] += 1
            last, length = greedy(node, after, None, ids(n), MASK, False)
            assert (last.item(), length.item()) == (broken - 1, broken)


@GREEDY
def test_a_tree_takes_the_lowest_matching_child(greedy):
    """      0 -> 1 (differs), 2 (same), 3 (same); 2 -> 4 (differs), 6 (same); 3 -> 5 (same): the path is 0, 2, 6."""
    node, after = torch.zeros(1, 8, 3, dtype=torch.int64), torch.zeros(1, 8, 3, dtype=torch.int64)
    parent = ids(-1, 0, 0, 0, 2, 3, 2, -1)[None]
    after[0, 0], after[0, 2], after[0, 3] = 1, 2, 3
    node[0, 1], node[0, 2], node[0, 3], node[0, 4], node[0, 5], node[0, 6] = 7, 1, 1, 7, 3, 2
    assert [t.item() for t in greedy(node, after, parent, ids(8), MASK, False)] == [6, 3]
    assert [t.item() for t in greedy(node, after, parent, ids(6), MASK, False)] == [2, 2]


@GREEDY
def test_subset_goes_to_the_fixed_point(greedy):
    """FreeDave: 0 reaches 2 over 1, which disagrees; 2 (not 0) then agrees with 3; nothing agrees with 4."""
    m = MASK
    node = ids(m, m, m, m), ids(5, m, m, m), ids(m, 1, m, m), ids(m, 1, 2, m), ids(m, 1, 2, 8)
    after = ids(4, 1, m, m), ids(5, 5, m, m), ids(m, 1, 2, m), ids(m, 1, 2, 7), ids(m, 1, 2, 8)
    node, after = torch.stack(node)[None], torch.stack(after)[None]
    assert [t.item() for t in greedy(node, after, None, ids(5), m, True)] == [3, 3]
    assert [t.item() for t in greedy(node, after, None, ids(3), m, True)] == [2, 2]
    assert [t.item() for t in greedy(node, after, None, ids(5), 4, True)] == [0, 1]  # another mask id: 9 is a token like any other


@GREEDY
def test_greedy_bad_contents(greedy):
    node = torch.zeros(6, 3, 2, dtype=torch.int64)
    count = ids(3, -1, 4, 3, 3, 2)
    parent = torch.tensor([[-1, 0, 1], [-1, 0, 1], [-1, 0, 1], [0, 0, 1], [-1, 1, 1], [-1, 0, 99]])
    status = torch.tensor([1, 1, 1, 1, 1, 1], dtype=torch.int32)
    last, length = greedy(node, node, parent, count, MASK, False, status)
    bad = 1 | int(Status.BAD_SEGMENT)
    assert status.tolist() == [1, bad, bad, bad, bad, 1]
    assert last.tolist() == [2, -1, -1, -1, -1, 1] and length.tolist() == [3, 0, 0, 0, 0, 2]


def test_greedy_does_not_depend_on_threads_or_batch(threads):
    g = torch.Generator().manual_seed(1)
    after = torch.randint(0, 2, (600, 6, 64), generator=g)
    node = after.roll(1, 1)
    node[torch.rand(600, 6, generator=g) < 0.3] = 0
    count = torch.randint(0, 7, (600,), generator=g)
    threads(1)
    want = _greedy(node, after, None, count, MASK, False)
    for n in (2, 3):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(_greedy(node, after, None, count, MASK, False), want, strict=True))
    for b in (0, 77, 599):
        one = slice(b, b + 1)
        got = _greedy(node[one], after[one], None, count[one], MASK, False)
        assert all(torch.equal(a, w[one]) for a, w in zip(got, want, strict=True))


NODE = torch.zeros(2, 3, 4, dtype=torch.int64)
GREEDY_ERRORS = {
    "node must be int64, got int32": dict(node=NODE.int()),
    "after must be int64, got float32": dict(after=NODE.float()),
    "parent must be int64, got int32": dict(parent=NODE[..., 0].int()),
    "count must be int64, got bool": dict(count=ids(1, 1).bool()),
    "status must be int32, got int64": dict(status=ids(1, 1)),
    "node must be [B, N, W] = [any, any, any], got [2, 3]": dict(node=NODE[..., 0]),
    "after must be [B, N, W] = [2, 3, 4], got [2, 3, 3]": dict(after=NODE[..., :3]),
    "parent must be [B, N] = [2, 3], got [2, 2]": dict(parent=NODE[:, :2, 0]),
    "count must be [B] = [2], got [3]": dict(count=ids(1, 1, 1)),
    "status must be [B] = [2], got [1]": dict(status=torch.zeros(1, dtype=torch.int32)),
    "parent must be None when subset is set, got a tensor": dict(parent=NODE[..., 0], subset=True),
    "status must be without expanded dimensions (it is written), got stride 0 in dimension 0": dict(
        status=torch.zeros(1, dtype=torch.int32).expand(2)
    ),
}


@pytest.mark.parametrize("fn", (ops.verify_greedy, reference.verify_greedy))
@pytest.mark.parametrize("message", GREEDY_ERRORS)
def test_greedy_errors(fn, message):
    with pytest.raises(RuntimeError, match=re.escape(f"verify_greedy: {message}")):
        fn(**dict(node=NODE, after=NODE, parent=None, count=ids(1, 1), mask_id=MASK, subset=False) | GREEDY_ERRORS[message])


# ---- verify_ratio ------------------------------------------------------------------------------------------------------
class Call(NamedTuple):
    """Arguments in schema order."""

    p_logits: torch.Tensor
    q_logits: torch.Tensor
    p_row: torch.Tensor
    q_row: torch.Tensor
    token: torch.Tensor
    cu: torch.Tensor
    seed: torch.Tensor | None
    step: torch.Tensor | None
    pos: torch.Tensor | None
    uniforms: torch.Tensor | None = None
    forbid: torch.Tensor | None = None
    temper: float = 1.0
    temperature: float = 1.0
    resample: bool = True

    def kernel(self) -> ops.RatioResult:
        return ops.RatioResult(*_ratio(*self))

    def definition(self) -> ops.RatioResult:
        options = {name: getattr(self, name) for name in self._fields[9:]}
        return reference.verify_ratio(*self[:9], **options)

    def readable(self, n: int) -> bool:
        rows = (0 <= self.p_row[n] < len(self.p_logits)) and (0 <= self.q_row[n] < len(self.q_logits))
        return rows and bool(0 <= self.token[n] < self.p_logits.shape[1])

    def rows(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ln p and ln q of a position, float64."""
        return tuple(log_softmax(x[r[n]], self.temperature, self.forbid) for x, r in ((self.p_logits, self.p_row), (self.q_logits, self.q_row)))


def equal(got: ops.RatioResult, want: ops.RatioResult) -> bool:
    return all(torch.equal(g.nan_to_num(7.5), w.nan_to_num(7.5)) for g, w in zip(got, want, strict=True))


def assert_explained(call: Call, got: ops.RatioResult, want: ops.RatioResult) -> None:
    """Equal, but for what fp32 cannot tell: a ratio within its error, an acceptance or a draw that hangs on it."""
    assert [t.dtype for t in got] == [t.dtype for t in want] and [t.shape for t in got] == [t.shape for t in want]
    assert torch.equal(got.status, want.status)
    slack = torch.zeros(len(call.token))
    for n in range(len(call.token)):
        if call.readable(n):
            size = sum(float(x[call.token[n]].abs().nan_to_num(0, 0, 0)) for x in call.rows(n))
            slack[n] = 1e-6 * call.temper * (1 + size)
    off = (got.log_ratio - want.log_ratio).abs()
    assert torch.equal(got.log_ratio.isfinite(), want.log_ratio.isfinite()) and torch.equal(got.log_ratio.isnan(), want.log_ratio.isnan())
    assert bool((off <= slack)[want.log_ratio.isfinite()].all()), (got.log_ratio, want.log_ratio)
    for b in range(len(got.accepted)):
        if got.accepted[b] != want.accepted[b]:
            n = int(call.cu[b] + min(got.accepted[b], want.accepted[b]))
            u = call.uniforms
            log_u = log_of_uniform(call.seed[n], call.step[n], call.pos[n]) if u is None else math.log(max(float(u[n]), 2.0**-126))
            assert abs(log_u - min(0.0, float(want.log_ratio[n]))) <= slack[n] + 1e-6, (b, n)
        elif got.next[b] != want.next[b]:
            n = int(call.cu[b] + got.accepted[b])
            p, q = (x.exp() for x in call.rows(n))
            error = 2e-6 * (p + q)
            low, high = ((q - p + sign * error).clamp(min=0).log() for sign in (-1, 1))
            noise = reference.verify.residual_scores(torch.full_like(q, -INF), torch.zeros_like(q), call.seed[n], call.step[n], call.pos[n])
            assert 0 <= got.next[b] < len(q) and (high + noise)[got.next[b]] + 1e-5 >= (low + noise).max(), b


@st.composite
def ratio_calls(draw):
    v = draw(st.sampled_from([1, 2, 3, 15, 33, 128, 130, 200, 4095, 4096, 4097, 9001]))
    n, m, k = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.3, 3.0, 40.0]))
    p = torch.randn(m, v, generator=g) * scale
    q = torch.randn(k, v, generator=g) * scale
    q[0] = p[0] + draw(st.sampled_from([0.0, 1e-3, 0.3])) * torch.randn(v, generator=g)
    for t in (p, q):
        for special in draw(st.lists(st.sampled_from([INF, -INF, NAN, 3e38]), max_size=1)):
            share = draw(st.sampled_from([0.3, 1.0]))
            t[(torch.rand(t.shape, generator=g) < share) & (torch.randint(0, 3, (t.shape[0], 1), generator=g) == 0)] = special
    dtype = draw(st.sampled_from(DTYPES))
    p, q = (relayout(t.to(dtype), draw(st.sampled_from(ALL_LAYOUTS))) for t in (p, q))
    p_row, q_row = torch.randint(0, m, (n,), generator=g), torch.randint(0, k, (n,), generator=g)
    token = torch.where(torch.rand(n, generator=g) < 0.7, p.float().nan_to_num(0.0).argmax(1)[p_row], torch.randint(0, v, (n,), generator=g))
    hostile = draw(st.sampled_from([None, None, "inactive", "contents", "cu"]))
    cuts = torch.randint(0, n + 1, (draw(st.integers(0, 4)),), generator=g).sort().values
    if hostile == "inactive":
        p_row[torch.rand(n, generator=g) < 0.2] = -1
        q_row[torch.rand(n, generator=g) < 0.2] = -1
    if hostile == "contents":
        for t, bad in ((p_row, (-2, m, 2**40)), (q_row, (-9, k)), (token, (-1, v, 2**60))):
            t[torch.rand(n, generator=g) < 0.15] = draw(st.sampled_from(bad))
    cu = torch.cat((ids(0), cuts, ids(n)))
    if hostile == "cu":
        cu[torch.rand(len(cu), generator=g) < 0.4] = draw(st.sampled_from([-1, n + 1, 0, 2**50]))
    key = [torch.randint(-(2**62), 2**62, (n,), generator=g) for _ in range(3)]
    uniforms = None
    if draw(st.booleans()):
        uniforms = torch.rand(n, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
        if draw(st.booleans()):
            uniforms[torch.rand(n, generator=g) < 0.3] = draw(st.sampled_from([0.0, 1.0, 1e-30, -0.1, 1.5, NAN]))
    forbid = None
    if draw(st.booleans()):
        forbid = torch.cat((torch.randint(0, v, (draw(st.integers(0, 3)),), generator=g), ids(*draw(st.sampled_from([(), (-1,), (v,), (v - 1, v - 1)])))))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(9)]
    vectors = [relayout(t, how) for t, how in zip((p_row, q_row, token, cu, *key), layouts, strict=False)]
    uniforms = None if uniforms is None else relayout(uniforms, layouts[7])
    forbid = None if forbid is None else relayout(forbid, layouts[8])
    temper, temperature = draw(st.sampled_from([1.0, 1.0, 0.5, 2.0])), draw(st.sampled_from([1.0, 1.0, 0.7, 0.05, 30.0]))
    return Call(p, q, *vectors, uniforms, forbid, temper, temperature, draw(st.booleans()))


@given(ratio_calls())
def test_ratio_equals_the_definition(call):
    assert_explained(call, call.kernel(), call.definition())


def spans(n: int, length: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Call:
    """n spans of `length` positions, a row of either side each; tokens drawn from p."""
    p = torch.randn(n * length, vocab) * 2
    q = (p + spread * torch.randn(n * length, vocab)).to(dtype)
    p = p.to(dtype)
    row, key = torch.arange(n * length), torch.arange(n * length) % length
    token = torch.multinomial(p.float().softmax(-1), 1)[:, 0]
    return Call(p, q, row, row, token, torch.arange(0, n * length + 1, length), row // length, torch.zeros_like(row), key)


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
    torch.library.opcheck(_greedy.default, (NODE, NODE, NODE[..., 0] - 1, ids(1, 2), MASK, False, status))
    torch.library.opcheck(_greedy.default, (NODE, NODE, None, ids(1, 2), MASK, True))
    torch.library.opcheck(_ratio.default, (X, X, Z, Z, Z, ids(0, 1, 3), Z, Z, Z, None, ids(1), 1.0, 1.0, True))
    torch.library.opcheck(_ratio.default, (X, X, Z, Z, Z, ids(0, 1, 3), None, None, None, torch.rand(3), None, 0.5, 2.0, False))

    def step(x):
        ratio = ops.verify_ratio(x, X, Z, Z, Z, ids(0, 1, 3), Z, Z, Z)
        return ratio.log_ratio + 1, ops.verify_greedy(NODE, NODE, None, ratio.accepted).last + 1

    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(X), step(X), strict=True):
        assert torch.equal(got, want)


# ---- distribution ------------------------------------------------------------------------------------------------------
DRAWS = 400_000
CRITICAL = {11: 31.264, 15: 37.697, 10: 29.588}  # chi-square quantiles at 1 - 1e-3


def chi_square(tokens: torch.Tensor, q: torch.Tensor) -> float:
    """Against probabilities q float64 [V]; ids with q = 0 must not occur."""
    seen, expected = torch.bincount(tokens, minlength=len(q)).double(), q * len(tokens)
    assert bool((seen[q == 0] == 0).all())
    return float(((seen - expected) ** 2 / expected)[q > 0].sum())


def speculate(p: torch.Tensor, q: torch.Tensor, length: int = 1, **options) -> tuple[torch.Tensor, ops.RatioResult]:
    """DRAWS spans of `length` positions with rows 0..length - 1 of either side, drafted by logit_stats with the very seeds, steps and positions that
    the verification gets. Returns the drafts [DRAWS, length] and the result."""
    position = torch.arange(length).repeat(DRAWS)
    seed, step = torch.arange(DRAWS).repeat_interleave(length), torch.full_like(position, 3)
    key, none = (seed, step, position), (None,) * 4
    temperature, forbid = options.get("temperature", 1.0), options.get("forbid")
    token = native("logit_stats")(p, position, forbid, *none, 0, temperature, *key)[0][:, 0].contiguous()
    cu = torch.arange(0, len(position) + 1, length)
    return token.view(DRAWS, length), Call(p, q, position, position, token, cu, *key)._replace(**options).kernel()


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
