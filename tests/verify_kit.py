"""What tests of `verify_greedy` and `verify_ratio` share, on the CPU, on emulated warps and on a GPU: calls, and how results are judged."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, LAYOUTS, relayout
from unmask import ops, reference
from unmask.reference.verify import log_of_uniform, log_softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
MASK = 9
native_greedy, native_ratio = native("verify_greedy"), native("verify_ratio")
GREEDY = pytest.mark.parametrize("greedy", (native_greedy, reference.verify_greedy))


def ids(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


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


NODE = torch.zeros(2, 3, 4, dtype=torch.int64)


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
        return ops.RatioResult(*native_ratio(*self))

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


def spans(n: int, length: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Call:
    """n spans of `length` positions, a row of either side each; tokens drawn from p."""
    p = torch.randn(n * length, vocab) * 2
    q = (p + spread * torch.randn(n * length, vocab)).to(dtype)
    p = p.to(dtype)
    row, key = torch.arange(n * length), torch.arange(n * length) % length
    token = torch.multinomial(p.float().softmax(-1), 1)[:, 0]
    return Call(p, q, row, row, token, torch.arange(0, n * length + 1, length), row // length, torch.zeros_like(row), key)


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
