"""S2D2: the verifier against block size 1, and whole runs."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from random_models import make, prompts
from s2d2_kit import MASK, SHAPES, alone, decode, engine, model
from unmask.decode.backend import NativeBackend
from unmask.decode.policy import Policy
from unmask.decode.schedule import AlignedBlocks
from unmask.decode.state import DecodeState
from unmask.models.model import Model
from unmask.speculate.s2d2 import S2D2Backend, S2D2Engine
from unmask.speculate.s2d2_options import Options
from unmask.speculate.verifier import Job, pack, verify

# -- the verifier --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 4, 12])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_one_forward_is_a_forward_of_block_size_1_for_each_position(shape, begin):
    m, block = model(shape, 4), 8
    generator = torch.Generator().manual_seed(begin)
    canvases = torch.randint(0, 59, (3, begin + block), generator=generator)
    state = DecodeState(canvases.tolist(), [[True] * begin + [False] * block] * 3, MASK, AlignedBlocks(block), None, [0] * 3, torch.device("cpu"))
    state.canvas.copy_(canvases)
    backend = S2D2Backend(m, state, MASK, Options())
    for row in range(3):
        if begin:
            backend.store(row, 0, begin)
    before = backend.cache.k[..., : begin + block, :].clone(), backend.cache.v[..., : begin + block, :].clone()
    first = 1 if begin == 0 and m.config.shifted else begin
    jobs = [
        Job(0, begin, tuple(range(first, begin + block))), Job(2, begin, (begin + 1, begin + 2, begin + 6)), Job(1, begin, (begin + 7,)),
    ]  # fmt: skip
    hidden = verify(m, backend.cache, jobs, state.canvas, MASK)
    wanted = [(job.row, t) for job in jobs for t in job.targets]
    logits = m.head.logits(hidden)
    for got, (row, target) in zip(logits, wanted, strict=True):
        assert (got - alone(m, canvases[row].tolist(), begin, target)).abs().max() <= 1e-4, (row, target)
    assert torch.equal(backend.cache.k[..., : begin + block, :], before[0]) and torch.equal(backend.cache.v[..., : begin + block, :], before[1])
    assert backend.cache.k[..., begin + block :, :].abs().sum() > 0  # its own K went behind the canvas
    sizes = [job.size(m.config.shifted) for job in jobs]
    lead = int(m.config.shifted and begin > 0)
    assert sizes == ([7 + lead, 6 + lead, 7 + lead] if m.config.shifted else [7 + 8, 6 + 3, 7 + 1])


def test_the_mask_is_the_authors_2l_mask():
    """With the whole block in question: strictly lower and lower triangles, and the diagonal of the mask half; the last draft token is left out."""
    length = 6
    forward, query = pack([Job(0, 4, tuple(range(4, 4 + length)))], torch.zeros((1, 10), dtype=torch.int64), MASK, False)
    n = length - 1
    expected = torch.zeros(2 * length - 1, 2 * length - 1, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if i < n and j < n:
                expected[i, j] = j <= i
            if j < n:
                expected[n + i, j] = j < i
            expected[n + i, n + j] = i == j
    assert torch.equal(forward.mask[0], expected) and query.tolist() == list(range(n, n + length))
    assert forward.seg.tolist() == [[[0, 4], [10, 11]]] and forward.pos[:11].tolist() == [4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 9]
    assert forward.ids[n : n + length].tolist() == [MASK] * length and forward.slot[:11].tolist() == list(range(10, 21))


# -- whole runs ----------------------------------------------------------------------------------------------------------------------------------


def autoregressive(m: Model, ids: list[int], length: int) -> list[int]:
    """Token by token with block size 1 everywhere: the argmax of each position."""
    x, shifted = list(ids), m.config.shifted
    while len(x) < length:
        logits = m.logits(torch.tensor([x if shifted else [*x, MASK]]))[0, -1].clone()
        logits[MASK] = -torch.inf
        x.append(int(logits.argmax()))
    return x


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_greedy_verification_is_greedy_autoregression(shape, block):
    """With the prefix stored token-causally, greedy S2D2 that verifies every step gives token for token what the model with block size 1 gives,
    whatever was drafted; drafts are accepted and rejected on the way."""
    m, single = model(shape, block), model(shape, 1)
    ids = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11] * 8]
    e = engine(m, ids, 21, options=Options(mode="greedy", cache_ver=True))
    for row, got in zip(ids, decode(e), strict=True):
        assert got == autoregressive(single, row, len(got))
    kept = [v.kept for v in e.verifications]
    assert any(v.kept == len(v.span) for v in e.verifications) and any(v.kept < len(v.span) for v in e.verifications) and max(kept) > 0
    assert e.verify_forwards < sum(c.verifies for c in e.counts)  # rows share verification forwards


def still(shape: str, block: int) -> Model:
    """A model without layers: what it predicts depends on the token at that position alone, so drafts and verifier agree."""
    m = make(seed=4, visibility="block_causal", block_size=block, **SHAPES[shape])
    m.backbone.layers = torch.nn.ModuleList()
    m.config = dataclasses.replace(m.config, n_layers=0)
    return m


@pytest.mark.parametrize(("mode", "temperature"), [("stochastic", 0.0), ("stochastic", 1.0), ("greedy", 0.0)])
def test_equal_distributions_finish_a_span_in_two_forwards(mode, temperature):
    policy = Policy("sdar_dynamic", knobs=dict(threshold=1.0), temperature=temperature, tempered=temperature > 0)
    e = engine(still("sdar", 8), [[1, 2, 3], [4] * 8, []], 16, policy, Options(mode=mode))
    decode(e)
    assert all(v.kept == len(v.span) for v in e.verifications) and all(v.token is None for v in e.verifications)
    blocks = [-(-r.end // 8) - len(i) // 8 for r, i in zip(e.state.rows, [[1, 2, 3], [4] * 8, []], strict=True)]
    assert [r.nfe for r in e.state.rows] == [2 * b for b in blocks]
    assert [c.accepted for c in e.counts] == [c.drafted for c in e.counts]


POLICIES = [
    Policy("sdar_dynamic", knobs=dict(threshold=0.6)), Policy("sdar_static"), Policy("llada2", knobs=dict(threshold=0.5, minimum=2)),
    Policy("threshold", knobs=dict(threshold=0.4)), Policy("edit", knobs=dict(threshold=0.4, edit_threshold=0.5, max_post_steps=3)),
    Policy("eb", knobs=dict(gamma=0.5)), Policy("sdar_static", score="leftmost"),
    Policy("sdar_dynamic", knobs=dict(threshold=0.5), temperature=0.8, tempered=True),
    Policy("llada2", knobs=dict(threshold=0.5), temperature=1.1, top_p=0.8, top_k=7, top_k_first=True, tempered=True),
    Policy("threshold", knobs=dict(threshold=0.5), temperature=0.7), Policy("llada2", knobs=dict(threshold=0.5), suppress=(3, 7)),
]  # fmt: skip
CHOICES = [
    {}, dict(mode="greedy"), dict(min_span=3), dict(min_span=4, legacy_span=True, high_confidence=0.3), dict(rejected="draft"), dict(rejected="leave"),
    dict(mode="greedy", rejected="leave"), dict(route="score", cost_coef=2.0), dict(route="score", estimator="soft_renyi_2_entropy", cost_coef=0.5),
    dict(route="score", estimator="hard_margin_threshold", cost="dynamic", high_confidence=0.4), dict(route="hysteresis", on=0.4, off=0.1, cost_coef=0.3),
    dict(route="ucb"), dict(route="ucb", ucb_entropy_source="masked", ucb_progress="filled", ucb_span_bins=3), dict(tempering=0.5),
    dict(ratio_threshold=0.3), dict(ratio_threshold=0.3, ratio_all_spans=True, always_high_confidence=True, high_confidence=0.6),
    dict(always_high_confidence=True, high_confidence=0.5, route="score", score_threshold=1.5), dict(cache_ver=True), dict(draft_ver=True),
    dict(cache_ver=True, draft_ver=True, mode="greedy"), dict(min_commit=3),
]  # fmt: skip


@st.composite
def jobs(draw):
    """(shape, attention block, block, prompts, new tokens, policy, options)"""
    shape, block = draw(st.sampled_from(sorted(SHAPES))), draw(st.sampled_from((4, 8)))
    size = draw(st.sampled_from([s for s in (2, 4, 8, 16) if block % s == 0 or s % block == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    lengths = draw(st.lists(st.integers(0, 2 * block), min_size=1, max_size=3))
    ids = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in lengths]
    return shape, block, size, ids, draw(st.integers(1, 2 * block)), draw(st.sampled_from(POLICIES)), draw(st.sampled_from(CHOICES))


def course(e: S2D2Engine) -> tuple:
    """Everything that a run decided, by row."""
    rows = decode(e)
    per_row = [[(v.span, v.draft, v.uniforms, v.kept, v.token) for v in e.verifications if v.row == r] for r in range(len(rows))]
    return rows, [r.nfe for r in e.state.rows], per_row, e.counts


@given(jobs())
@settings(max_examples=60)
def test_row_alone_is_row_in_a_ragged_batch(job):
    shape, block, size, ids, new, policy, options = job
    m, ids = model(shape, block), [*ids, [7, 8, 9], []]
    rows, nfe, verified, counts = course(engine(m, ids, new, policy, Options(**options), size=size))
    for i, row in enumerate(ids):
        alone_ = course(engine(m, [row], new, policy, Options(**options), size=size, seeds=[i]))
        assert (rows[i], nfe[i], verified[i], counts[i]) == tuple(x[0] for x in alone_)


@given(jobs())
@settings(max_examples=60)
def test_cached_is_recomputed(job):
    """A verification leaves the cache as it was: with finished blocks stored the run is the one that recomputes everything, and the K/V of decided
    blocks are those of a fresh forward. It always ends, with nothing masked and given tokens as they were."""
    shape, block, size, ids, new, policy, options = job
    m = model(shape, block)
    cached = engine(m, ids, new, policy, Options(**options), size=size)
    whole = engine(m, ids, new, policy, Options(**options), size=size, cache="none")
    rows, nfe, *_ = course(cached)
    again, nfe_again, *_ = course(whole)
    assert rows == again and nfe == nfe_again
    for a, b in zip(cached.verifications, whole.verifications, strict=True):
        assert a.span == b.span and a.kept == b.kept and all(abs(x - y) <= 1e-4 for x, y in zip(a.q, b.q, strict=True))
    assert all(got[: len(i)] == i for got, i in zip(rows, ids, strict=True)) and not any(MASK in got for got in rows)
    assert all(r.nfe >= c.verifies for r, c in zip(cached.state.rows, cached.counts, strict=True))


def test_verifications_and_their_absence_both_happen():
    """The options of the tests above route both ways, accept and reject; otherwise those tests would show little."""
    seen: dict[str, set] = collections.defaultdict(set)
    for options in CHOICES:
        e = engine(model("sdar", 8), prompts(3, seed=2), 16, POLICIES[0], Options(**options))
        for _ in e.run():
            name = options.get("route", "span") + ("-min" if "min_span" in options else "")
            seen[name] |= {p.verified for p in e.parts.values()}
        seen[options.get("mode", "stochastic")] |= {v.kept == len(v.span) for v in e.verifications}
    assert all(seen[name] == {True, False} for name in ("score", "hysteresis", "ucb", "span-min", "stochastic", "greedy")), seen


def test_counters():
    m, ids = model("plain", 8), [[1, 2, 3], [4, 5]]
    seen: list[int] = []
    handle = m.register_forward_hook(lambda _, args, out: seen.append(int((args[0].row >= 0).sum())))
    try:
        e = engine(m, ids, 16)
        steps = len(list(e.run()))
    finally:
        handle.remove()
    assert len(seen) == steps + e.verify_forwards
    assert sum(seen) == sum(r.forwarded for r in e.state.rows) and sum(c.rows_forwarded for c in e.counts) > 0
    for r, c in zip(e.state.rows, e.counts, strict=True):
        own = [v for v in e.verifications if v.row == r.index]
        assert c.verifies == len(own) and c.drafted == sum(len(v.span) for v in own) and c.accepted == sum(v.kept for v in own)
        assert r.nfe == c.verifies + steps if r.nfe == max(x.nfe for x in e.state.rows) else r.nfe <= c.verifies + steps


def test_a_row_that_does_not_verify_is_the_policys():
    """Options that never verify give the policy's own run."""
    m, policy = model("sdar", 8), Policy("sdar_dynamic", knobs=dict(threshold=0.6))
    e = engine(m, [[1, 2, 3], []], 20, policy, Options(min_span=99))
    from unmask.decode.engine import Engine

    state = engine(m, [[1, 2, 3], []], 20).state
    plain = Engine(state, NativeBackend(m, state, MASK), policy, cache="block")
    for _ in plain.run():
        pass
    assert decode(e) == [state.canvas[r.index, : r.end].tolist() for r in state.rows] and e.verify_forwards == 0
    assert [r.nfe for r in e.state.rows] == [r.nfe for r in state.rows]


def test_an_end_of_sequence_ends_rows():
    m = model("sdar", 8)
    free = decode(engine(m, [[1, 2, 3]], 24, options=Options(mode="greedy")))[0]
    eos = free[14]
    e = engine(m, [[1, 2, 3]], 24, options=Options(mode="greedy"), eos_ids=(eos,))
    for _ in e.run():
        pass
    (row,) = e.state.rows
    cut = 3 + free[3:].index(eos)
    assert row.finish_reason == "eos" and e.state.canvas[0, : cut + 1].tolist() == free[: cut + 1]


def test_a_shifted_model_without_a_prompt_does_not_verify_position_0():
    e = engine(model("shifted", 4), [[]], 8)
    decode(e)
    assert e.verifications and all(0 not in v.span for v in e.verifications)


def test_a_row_that_joins_begins_anew():
    m, options = model("sdar", 8), Options(route="ucb")
    first = engine(m, [[1, 2, 3]], 13, options=options, seeds=[5])
    decode(first)
    canvas = [7, 8, 9, 10] + [MASK] * 12
    row = first.join(canvas, [t != MASK for t in canvas], 9)
    for _ in first.run():
        pass
    fresh = engine(m, [[7, 8, 9, 10]], 12, options=options, seeds=[9])
    assert decode(fresh)[0] == first.state.canvas[row.index, :16].tolist() and fresh.counts == first.counts
