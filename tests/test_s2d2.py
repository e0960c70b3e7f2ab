"""S2D2: the authors' recorded runs, the verifier against block size 1, the laws of acceptance, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import golden_runs
import unmask
from golden_runs import BLOCK_FAMILIES, GOLDEN
from random_models import make, prompts
from unmask import ops
from unmask.compat.s2d2 import _run, fast_dllm_v2, llada2, sdar
from unmask.decode.backend import Guidance, ModuleBackend, NativeBackend
from unmask.decode.policy import Policy
from unmask.decode.schedule import AlignedBlocks
from unmask.decode.state import DecodeState
from unmask.errors import InvalidLogits, SettingError
from unmask.models.backbone import Forward
from unmask.models.model import Model
from unmask.ops.linear import pad_rows
from unmask.speculate import acceptance, methods, routing, s2d2_rule
from unmask.speculate import s2d2 as module
from unmask.speculate.acceptance import Keyed, Recorded, Transform
from unmask.speculate.routing import Look, Router
from unmask.speculate.s2d2 import S2D2Backend, S2D2Engine
from unmask.speculate.s2d2_options import ESTIMATORS, OPTIONS, ROUTES, Options, read_options
from unmask.speculate.spans import first_run
from unmask.speculate.verifier import Job, pack, scratch_slots, verify

MASK = 60
LIMIT = 3e-4  # expected of correct fp32 code (golden/README.md); 1e-3 is what it allows
FUNCTIONS: dict[str, tuple[Any, str, str]] = {
    "sdar": (sdar.block_diffusion_generate, "return_forward_stats", "total_forward_steps"),
    "llada2": (llada2.generate_ssd_policy, "record_decoding_order", "nfe"),
    "fast_dllm_v2": (fast_dllm_v2.generate_ssd_policy, "return_decoding_order", "total_forward_steps"),
}
SHAPES = {
    "sdar": dict(n_kv_heads=2, qk_norm=True),
    "plain": dict(n_layers=3),
    "shifted": dict(shifted=True, qk_norm=True),
    "v2": dict(n_kv_heads=1, qkv_bias=True, shifted=True),
}


def recorded(family: str) -> list[dict]:
    return json.loads((GOLDEN / family / "s2d2_ssd.json").read_text())["runs"]


RUNS = [(family, run) for family in BLOCK_FAMILIES for run in recorded(family)]


@pytest.fixture(scope="module")
def golden_models():
    return {family: golden_runs.load(family) for family in BLOCK_FAMILIES}


@functools.cache
def model(shape: str, block: int, **changes) -> Model:
    return make(seed=3, visibility="block_causal", block_size=block, eos_ids=(59,), **SHAPES[shape], **changes)


# -- the authors' runs ---------------------------------------------------------------------------------------------------------------------------


def test_every_run_is_here():
    assert collections.Counter(family for family, _ in RUNS) == dict(sdar=21, llada2=8, fast_dllm_v2=9)
    routes = collections.Counter(run["args"]["do_verify_policy"] for _, run in RUNS)
    assert set(routes) == set(_run.ROUTES)
    used = {r["args"]["token_acceptance_estimator"] for _, r in RUNS if "token_acceptance_estimator" in r["args"]}
    assert used == set(ESTIMATORS)


class Replay:
    """One recorded run, done again: what it returned, its engine, and what was forwarded."""

    def __init__(self, family: str, run: dict, m: Model, patch: pytest.MonkeyPatch, **changes: Any):
        self.loops: list[_run.SpeculativeLoop] = []
        self.forwards: list[tuple[list[int], list[int]]] = []  # positions and ids of each
        self.hidden: list[torch.Tensor] = []  # of each forward
        self.verifier: list[torch.Tensor] = []  # hidden states of the positions in question
        prepare, run_verify = _run.prepare, s2d2_rule.verify
        patch.setattr(_run, "prepare", lambda *a, **k: self.loops.append(prepare(*a, **k)) or self.loops[-1])
        patch.setattr(s2d2_rule, "verify", lambda *a, **k: self.verifier.append(run_verify(*a, **k)) or self.verifier[-1])
        function, stats, count = FUNCTIONS[family]
        args = dict(uniforms=run["uniforms_per_verify"], resampled=run["resampled_tokens"], **run["args"]) | changes
        handle = m.register_forward_hook(self._note)
        try:
            x, said = function(m, torch.tensor(run["prompt_ids"]), **{stats: True}, **args)
        finally:
            handle.remove()
        self.ids, self.nfe, self.order = x.tolist(), said[count], said.get("decoding_order")
        (self.loop,) = self.loops
        self.engine = self.loop.engine

    def _note(self, _, args, out):
        real = args[0].row >= 0
        self.forwards.append((args[0].pos[real].tolist(), args[0].ids[real].tolist()))
        self.hidden.append(out)


@pytest.mark.parametrize(("family", "run"), RUNS, ids=[f"{f}-{r['id']}" for f, r in RUNS])
def test_run(golden_models, family, run, monkeypatch):
    """Tokens, forwards and what each was, spans, drafts, probabilities and ratios of every verification, and how each position was settled."""
    m = golden_models[family]
    got = Replay(family, run, m, monkeypatch)
    assert got.ids == run["output_ids"]
    assert got.nfe == len(got.forwards) == run["nfe"] == got.loop.row.nfe
    assert json.loads(json.dumps(got.order)) == run["decoding_order"]
    whole = run.get("full_ids", run["output_ids"][0])
    canvas = got.loop.state.canvas[0].tolist()
    assert canvas == whole + [run["args"]["mask_id"]] * (len(canvas) - len(whole))

    steps = [s for s in run["steps"] if s["kind"].startswith("verify")]
    assert len(steps) == len(got.engine.verifications) == len(got.verifier) == len(run["uniforms_per_verify"])
    tempering = run["args"].get("ssd_ratio_tempering_factor", 1.0)
    for step, mine, hidden in zip(steps, got.engine.verifications, got.verifier, strict=True):
        assert mine.span == step["span"] and mine.draft == step["draft_tokens"] and mine.uniforms == step["uniforms"]
        # what was recorded of q is the plain softmax; Fast-dLLM v2's code compares with the one that top_p leaves
        q = m.head.logits(hidden)[: len(mine.span)].double().softmax(-1).gather(1, torch.tensor(mine.draft)[:, None])[:, 0]
        p, expected = torch.tensor(mine.p, dtype=torch.float64), torch.tensor(step["q_verify"], dtype=torch.float64)
        assert (p - torch.tensor(step["p_draft"])).abs().max() <= LIMIT
        assert (q - expected).abs().max() <= LIMIT
        assert (((q / p) ** tempering).clamp_max(1.0) - torch.tensor(step["ratio"])).abs().max() <= LIMIT
        if family != "fast_dllm_v2":
            assert (torch.tensor(mine.ratio) - torch.tensor(step["ratio"])).abs().max() <= LIMIT
    replaced = [v.token for v in got.engine.verifications if v.token is not None]
    assert replaced == run["resampled_tokens"]
    (counts,) = got.engine.counts
    assert counts.verifies == len(steps) and counts.replaced == len(replaced)

    for (positions, ids), step in zip(got.forwards, run["steps"], strict=True):
        if not step["kind"].startswith("verify"):
            assert positions == list(range(step["input_start"], step["input_start"] + step["input_len"]))
            continue
        fed = dict(zip(range(step["input_start"], step["input_start"] + len(step["input_ids"])), step["input_ids"], strict=True))
        drafted = [(p, t) for p, t in zip(positions, ids, strict=True) if t != run["args"]["mask_id"] and p >= step["input_start"]]
        assert all(fed[p] == t for p, t in drafted) and len(drafted) >= step["span"][-1] - step["input_start"]


def test_recorded_numbers_decide(golden_models, monkeypatch):
    """The same run with other numbers takes another course, both ways; without recorded numbers it depends on torch's seed alone."""
    run = recorded("sdar")[0]
    m = golden_models["sdar"]
    none = [[0.0] * 8] * 99
    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "uniforms", lambda self, row, forward, positions: none[0][: len(positions)])
        eager = Replay("sdar", run, m, patch)
    assert eager.nfe < run["nfe"] and all(v.kept == len(v.span) for v in eager.engine.verifications)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            outs.append(Replay("sdar", run, m, patch, uniforms=None, resampled=None).ids)
    assert outs[0] == outs[1] != outs[2]


def test_logits_inside_a_run(golden_models, monkeypatch):
    """Of a prefill, of a draft, and of the authors' 2L verification: rows of the draft half, then of the mask half."""
    run, m = recorded("sdar")[0], golden_models["sdar"]
    data = load_file(GOLDEN / "sdar" / "run_logits.safetensors")
    got = Replay("sdar", run, m, monkeypatch)
    seen = 0
    for key in (k for k in data if k.startswith(f"{run['id']}/forward")):
        k = int(key.split("/forward")[1])
        step, expected = run["steps"][k], data[key][0]
        positions, ids = got.forwards[k]
        logits = m.head.logits(got.hidden[k])[: len(positions)]
        if step["kind"] == "verify_2L":
            length, mask = step["input_len"] // 2, run["args"]["mask_id"]
            rows = [p - step["input_start"] + (length if t == mask else 0) for p, t in zip(positions, ids, strict=True)]
            assert len(rows) == len(set(rows)) == 7 + 6
            expected = expected[rows]
            seen += 1
        assert (logits - expected).abs().max() <= LIMIT
    assert seen == 1


# -- the verifier --------------------------------------------------------------------------------------------------------------------------------


def alone(m: Model, canvas: list[int], begin: int, target: int) -> torch.Tensor:
    """What block size 1 predicts at `target` in a block that begins at `begin`: one forward of its own, of the tokens before it and (unshifted) a
    mask; earlier blocks see block-causally."""
    size, shifted = m.config.block_size, m.config.shifted
    ids = canvas[:target] + ([] if shifted else [MASK])
    t, padded = len(ids), pad_rows(len(ids))
    pos = torch.zeros(padded, dtype=torch.int64)
    pos[:t] = torch.arange(t)
    row = torch.full((padded,), -1, dtype=torch.int64)
    row[:t] = 0
    flat = torch.zeros(padded, dtype=torch.int64)
    flat[:t] = torch.tensor(ids)
    q_end = torch.where(pos < begin, (pos // size + 1) * size, pos + 1)
    f = Forward(flat, row, pos, torch.where(row < 0, -1, pos), torch.tensor([0, t]), torch.tensor([0]), torch.tensor([[[0, t]]]), q_end)
    return m.head.logits(m(f, m.new_cache(1, t)))[t - 1]


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


def engine(
    m: Model, ids: list[list[int]], new: int, policy: Policy | None = None, options: Options | None = None, *, cache: str = "block",
    size: int | None = None, seeds: list[int] | None = None, **more: Any,
) -> S2D2Engine:  # fmt: skip
    """Canvases that end with whole blocks, as unmask.generate lays them out."""
    options, block = options or Options(), m.config.block_size
    lengths = [-(-(len(i) + new) // block) * block for i in ids]
    canvases = [i + [MASK] * (n - len(i)) for i, n in zip(ids, lengths, strict=True)]
    given_ = [[True] * len(i) + [False] * (n - len(i)) for i, n in zip(ids, lengths, strict=True)]
    state = DecodeState(canvases, given_, MASK, AlignedBlocks(size or block), None, seeds or list(range(len(ids))), torch.device("cpu"))
    policy = policy or Policy("sdar_dynamic", knobs=dict(threshold=0.9))
    return S2D2Engine(state, S2D2Backend(m, state, MASK, options), policy, cache=cache, options=options, record=True, **more)


def decode(e: S2D2Engine) -> list[list[int]]:
    for _ in e.run():
        pass
    assert not e.state.masked.any()
    return [e.state.canvas[r.index, : r.end].tolist() for r in e.state.rows]


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


# -- acceptance ----------------------------------------------------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


def check_law(counts: torch.Tensor, q: torch.Tensor) -> None:
    value, degrees = chi_square(counts, q * counts.sum())
    assert value < degrees + 5 * math.sqrt(2 * degrees), (value, degrees)


@pytest.mark.parametrize("transform", [Transform(), Transform(0.7), Transform(1.0, 0.9), Transform(1.3, 0.85, 5, True)])
def test_the_first_token_is_distributed_as_q(transform):
    """p and q fixed: draft from p, ratio test, residual. 40000 draws; a residual that is not taken, or one of p, fails by far."""
    generator = torch.Generator().manual_seed(1)
    vocab, n, mask = 12, 40000, 11
    p_logits, q_logits = (torch.randn(1, vocab, generator=generator) * 0.8 for _ in range(2))
    p_logits[0, mask] = q_logits[0, mask] = -torch.inf
    p, q = transform.probabilities(p_logits), transform.probabilities(q_logits)
    draft = torch.multinomial(p[0], n, replacement=True, generator=generator)
    key = dict(seed=torch.arange(n), step=torch.full((n,), 3), pos=torch.full((n,), 7))
    kept = ops.uniform(**key).double() < acceptance.ratios(q[0, draft], p[0, draft])
    other = acceptance.draw(acceptance.residual(q.clone(), p, mask).expand(n, vocab), **key)
    token = torch.where(kept, draft, other)
    assert 0.05 < float(kept.double().mean()) < 0.98
    check_law(torch.bincount(token, minlength=vocab), q[0])
    with pytest.raises(AssertionError):
        check_law(torch.bincount(draft, minlength=vocab), q[0])
    with pytest.raises(AssertionError):
        check_law(torch.bincount(torch.where(kept, draft, 0), minlength=vocab), q[0])


@pytest.mark.parametrize("policy", [dict(temperature=1.0, tempered=True), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9, tempered=True)])
def test_an_engines_first_token_is_distributed_as_the_verifiers(policy):
    """4000 rows, one seed each: the first position's token follows the softmax that block size 1 has there, through the whole loop."""
    m, n, ids = model("sdar", 4), 4000, [1, 2, 3, 4, 5]
    policy = Policy("llada2", knobs=dict(threshold=1.0), **policy)
    e = engine(m, [ids] * n, 3, policy, seeds=list(range(1000, 1000 + n)))
    next(e.run())
    first = torch.tensor([e.state.canvas[i, 5] for i in range(n)])
    assert not e.state.masked[:, 5].any()
    logits = alone(m, [*ids, 0], 4, 5)[None].clone()
    logits[0, MASK] = -torch.inf
    q = Transform.of(policy).probabilities(logits)[0]
    check_law(torch.bincount(first, minlength=61), q)
    kept = sum(v.kept > 0 for v in e.verifications) / n
    assert 0.05 < kept < 0.95
    drafts = torch.tensor([v.draft[0] for v in e.verifications])
    with pytest.raises(AssertionError):
        check_law(torch.bincount(drafts, minlength=61), q)


def test_the_op_and_the_definition_accept_alike(monkeypatch):
    """verify_ratio and the plain code agree on what stands and on the ratios; the token that replaces a rejected one is drawn by other noise."""
    m, ids = model("plain", 8), prompts(4, seed=8, low=1)
    runs = []
    for plain in (False, True):
        e = engine(m, ids, 16, Policy("llada2", knobs=dict(threshold=0.7), temperature=0.9, tempered=True))
        if plain:
            monkeypatch.setattr(Transform, "filters", True)
        next(e.run())
        runs.append(e.verifications)
    for a, b in zip(*runs, strict=True):
        assert a.span == b.span and a.draft == b.draft and a.uniforms == b.uniforms and a.kept == b.kept
        assert all(abs(x - y) <= 1e-5 for u, v in ((a.p, b.p), (a.q, b.q), (a.ratio, b.ratio)) for x, y in zip(u, v, strict=True))
    assert any(a.kept < len(a.span) for a in runs[0]) and any(a.kept for a in runs[0])


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0, 1.7]), st.sampled_from([1.0, 0.95, 0.5, 0.1]), st.sampled_from([0, 1, 4, 40]), st.booleans())
def test_transform_is_filtered_stats(seed, temperature, top_p, top_k, first):
    """The distributions of acceptance are those that the fused reduction draws from."""
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * 3
    p = Transform(temperature, top_p, top_k, first).probabilities(logits)
    key = dict(seed=torch.arange(5), step=torch.zeros(5, dtype=torch.int64), pos=torch.zeros(5, dtype=torch.int64))
    stats = ops.filtered_stats(logits, temperature=temperature, top_p=top_p, top_k=top_k, top_k_first=first, **(key if temperature else {}))
    assert torch.allclose(p.sum(1), torch.ones(5, dtype=torch.float64)) and torch.allclose(p.gather(1, stats.token[:, None])[:, 0].float(), stats.p, atol=2e-5)
    top = p.sort(1, descending=True).values
    assert torch.allclose(top[:, 0].float(), stats.p1, atol=2e-5) and torch.allclose(top[:, 1].float(), stats.p2, atol=2e-5)
    assert torch.allclose((acceptance.entropy(p) * math.log(33)).float(), stats.entropy, atol=1e-4)


def test_ratios_and_residuals():
    q, p = torch.tensor([0.3, 0.2, 0.0, 0.5]), torch.tensor([0.6, 0.1, 0.5, 0.0])
    assert torch.allclose(acceptance.ratios(q, p), torch.tensor([0.5, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(acceptance.ratios(q, p, 0.5), torch.tensor([0.5**0.5, 1.0, 0.0, 1.0], dtype=torch.float64))
    two = acceptance.residual(torch.stack([q, p]), torch.stack([p, p]), 1)  # where q = p nothing is left, so q itself; never the mask token
    assert torch.allclose(two, torch.tensor([[0.0, 0.0, 0.0, 0.5], [0.6, 0.0, 0.5, 0.0]]))
    assert acceptance.accepted([True, True, False, True]) == 2 and acceptance.accepted([]) == 0 and acceptance.accepted([True]) == 1
    weights = torch.tensor([[0.0, 1.0, 0.0]]).expand(50, 3)
    assert acceptance.draw(weights, torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)).eq(1).all()


# -- routing -------------------------------------------------------------------------------------------------------------------------------------


def test_spans():
    assert first_run([]) == first_run([False, False]) == (0, 0)
    assert first_run([True]) == (0, 1) and first_run([False, True, True]) == (1, 3) and first_run([True, False, True]) == (0, 1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name):
    o = Options(
        estimator=name, entropy_temperature=2.0, margin_threshold=0.2, confidence_power=0.5, margin_coef=1.5, entropy_threshold=0.6,
    )  # fmt: skip
    probabilities = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.3, 0.3, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0], [0.4, 0.25, 0.2, 0.15]], dtype=torch.float64)
    margin, uncertainty, square = routing.statistics(probabilities)
    got = routing.estimate(o, probabilities[:, 0], margin, uncertainty, square).tolist()
    for alpha, row in zip(got, probabilities.tolist(), strict=True):
        h = -sum(x * math.log(x) for x in row if x) / math.log(4)
        expected = {
            "soft_entropy_negexp": math.exp(-2.0 * h), "hard_margin_threshold": float(row[0] - row[1] > 0.2),
            "soft_confidence_power": row[0] ** 0.5, "soft_clipped_linear_margin": min(1.0, 1.5 * (row[0] - row[1])),
            "soft_renyi_2_entropy": sum(x * x for x in row), "hard_entropy_threshold": float(h < 0.6),
        }[name]  # fmt: skip
        assert alpha == pytest.approx(expected, abs=1e-9)


def test_the_score():
    assert routing.expected([0.5, 0.5, 1.0]) == 0.5 + 0.25 + 0.25 and routing.expected([]) == 0.0
    look = Look(3, 5, 2, [0.5, 0.5, 1.0])
    assert routing.score(Options(cost_coef=0.4), look) == pytest.approx(0.6)
    assert routing.score(Options(cost_coef=0.4, cost="dynamic"), look) == pytest.approx(0.2)
    at = Router(Options(route="score", score_threshold=1.0, cost_coef=0.0))
    assert at.decide(0, Look(1, 1, 0, [1.0])) and not at.decide(0, Look(1, 1, 0, [0.99]))
    short = Router(Options(min_span=3))
    assert [short.decide(0, Look(n, 4)) for n in (0, 1, 2, 3, 4)] == [False, False, False, True, True]
    legacy = Router(Options(min_span=3, legacy_span=True))
    assert legacy.decide(0, Look(1, 4, 2)) and not legacy.decide(0, Look(1, 4, 3)) and not legacy.decide(0, Look(1, 2, 2))


def test_hysteresis():
    """On above `on`, strictly; off below `off`; between them as before; rows apart; a forward without masks turns it off where asked."""
    o = Options(route="hysteresis", on=0.5, off=0.25, cost_coef=0.0)
    script = [0.4, 0.5, 0.6, 0.3, 0.25, 0.2, 0.4, 0.9]
    for row in (0, 3):
        router = Router(o)
        assert [router.decide(row, Look(1, 1, 0, [a])) for a in script] == [False, False, True, True, True, False, False, True]
        assert not router.decide(row + 1, Look(1, 1, 0, [0.4])) and router.decide(row, Look(1, 1, 0, [0.4]))
        assert not router.decide(row, Look(0, 0)) and router.decide(row, Look(1, 1, 0, [0.4]))
    reset = Router(o, empty_turns_off=True)
    assert reset.decide(0, Look(1, 1, 0, [0.9])) and not reset.decide(0, Look(0, 0)) and not reset.decide(0, Look(1, 1, 0, [0.4]))


def test_the_bandit():
    """Against UCB1 written out: both arms once per bucket, verify first, then mean reward + beta sqrt(ln t / n)."""
    o = Options(route="ucb", ucb_beta=0.7, ucb_span_bins=2, ucb_progress_bins=2, ucb_entropy_bins=2)
    router = Router(o)
    generator = torch.Generator().manual_seed(0)
    seen: dict[tuple, dict[int, list[float]]] = {}
    decisions = []
    for t in range(1, 200):
        span, decoded, masks, h = (torch.rand(4, generator=generator) * torch.tensor([8, 8, 8, 1])).tolist()
        look = Look(int(span) + 1, int(masks) + 1, length=8, decoded=int(decoded), entropy=h)
        bucket = (int(min(1, (look.span - 1) / 7 * 2)), int(decoded) / 8 >= 0.5, h >= 0.5)
        arms = seen.setdefault(bucket, {0: [], 1: []})
        value = [math.inf if not arms[a] else sum(arms[a]) / len(arms[a]) + 0.7 * math.sqrt(math.log(t) / len(arms[a])) for a in (0, 1)]
        got = router.decide(0, look)
        assert got == (value[1] >= value[0])
        reward = int(torch.randint(1, 6, (1,), generator=generator))
        router.note(0, reward)
        arms[int(got)].append(reward / (1 + got))
        decisions.append(got)
    assert len(seen) == 8 and 20 < sum(decisions) < 180


# -- what is refused -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(mode="lossless"), "mode"), (dict(route="always"), "route"), (dict(min_span=0), "min_span must be an integer >= 1|in 1"),
        (dict(min_span=2.5), "min_span"), (dict(min_span=True), "min_span"), (dict(on=0.0, off=0.0, route="hysteresis"), "on must be above off"),
        (dict(tempering=-1), "tempering"), (dict(tempering=math.nan), "tempering"), (dict(score_threshold=math.inf), "score_threshold"),
        (dict(ucb_beta="1"), "ucb_beta"), (dict(ucb_span_bins=0), "ucb_span_bins"), (dict(estimator="entropy"), "estimator"),
        (dict(ratio_all_spans=True), "ratio_threshold"), (dict(mode="greedy", ratio_threshold=0.5), "greedy"), (dict(mode="greedy", tempering=0.5), "greedy"),
        (dict(min_spam=3), "min_span"), (dict(cache_ver=1), "cache_ver"), (dict(rejected="skip"), "rejected"), (dict(min_commit=0), "min_commit"),
        (dict(high_confidence="x"), "high_confidence"),
    ],
)  # fmt: skip
def test_hostile_options(options, words):
    with pytest.raises(SettingError, match=words):
        Options(**options)
    with pytest.raises(SettingError, match="mapping"):
        read_options(3)
    assert read_options(None).settings() == Options().settings() == read_options({}).settings()


def test_a_tempering_of_zero_accepts_every_draft():
    """(q / p)^0 is 1. The op's exponent is above 0: it had refused this option's value in the middle of a run."""
    for shape in ("sdar", "v2"):
        result = unmask.generate(model(shape, 4), [1, 2], max_new_tokens=10, policy="sdar_dynamic", eos_stop=False, speculate="s2d2:tempering=0")
        assert result.accepted == result.drafted > 0 and MASK not in result.canvas


def test_what_a_verifier_cannot_serve_is_refused():
    m = model("sdar", 8)
    e = engine(m, [[1]], 7)
    with pytest.raises(SettingError, match="bidirectional, so with block size 1"):
        bidirectional = make(seed=1)
        state = DecodeState([[1, MASK]], [[True, False]], MASK, AlignedBlocks(2), None, [0], torch.device("cpu"))
        S2D2Engine(state, S2D2Backend(bidirectional, state, MASK, Options(), attention_block=2), Policy("threshold"))
    with pytest.raises(SettingError, match="room behind the canvas"):
        S2D2Engine(e.state, NativeBackend(m, e.state, MASK), e.policy, cache="block")
    with pytest.raises(SettingError, match="unmask.load"):
        S2D2Engine(e.state, ModuleBackend(torch.nn.Identity(), e.state, MASK), e.policy)
    for name, changes in (("guidance", dict(guidance=True)), ("soft_masks", dict(soft_masks=True))):
        with pytest.raises(SettingError, match=f"{name}.*two different things"):
            module.check(m.config, e.policy, "block", **changes)
    guided = S2D2Backend(m, e.state, MASK, Options())
    guided.guidance = Guidance(2.0)
    with pytest.raises(SettingError, match="guidance"):
        S2D2Engine(e.state, guided, e.policy, cache="block")
    with pytest.raises(SettingError, match="would read K and V of other tokens"):
        module.check(m.config, e.policy, "prefix")
    for policy in (Policy("wino"), Policy("remdm"), Policy("klass"), Policy("credit"), Policy("dream")):
        with pytest.raises(SettingError, match="falls back on a policy"):
            engine(m, [[1]], 7, policy)
    with pytest.raises(SettingError, match="repetition_penalty"):
        engine(m, [[1]], 7, Policy("threshold", repetition_penalty=1.2))
    with pytest.raises(SettingError, match="has no threshold"):
        engine(m, [[1]], 7, Policy("sdar_static"), Options(always_high_confidence=True))
    with pytest.raises(SettingError, match="draft_ver does not go with cache='dual'"):
        engine(m, [[1]], 7, options=Options(draft_ver=True), cache="dual")


def test_invalid_logits_of_the_verifier(monkeypatch):
    """NaN that the draft does not show and the verifier does: raised with its place, or the row ends and the others go on."""
    m, ids = model("sdar", 8), [[1, 2, 3], [4, 5]]
    run_verify = s2d2_rule.verify

    def broken(model_, cache, jobs_, *rest):
        hidden = run_verify(model_, cache, jobs_, *rest)
        at = 0
        for job in jobs_:
            if job.row == 1:
                hidden[at] = torch.nan
            at += len(job.targets)
        return hidden

    for options in (Options(), Options(mode="greedy"), Options(rejected="leave")):
        with monkeypatch.context() as patch:
            patch.setattr(s2d2_rule, "verify", broken)
            with pytest.raises(InvalidLogits, match="row 1, verification of step"):
                decode(engine(m, ids, 13, options=options))
            e = engine(m, ids, 13, options=options, on_invalid="skip")
            for _ in e.run():
                pass
        assert [r.finish_reason for r in e.state.rows] == ["length", "invalid"]
        assert e.state.canvas[0, :16].tolist() == decode(engine(m, ids[:1], 13, options=options))[0]


GENERATE = dict(mask_id=383)


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("sdar", dict(do_verify_policy="always"), "do_verify_policy"), ("sdar", dict(do_verify_score_type="ratio"), "do_verify_score_type"),
        ("sdar", dict(token_acceptance_estimator="x"), "token_acceptance_estimator"),
        ("sdar", dict(remasking_strategy="entropy_bounded"), "remasking_strategy"),
        ("sdar", dict(min_ssd_span_length=-1), "min_ssd_span_length"), ("sdar", dict(ssd_ratio_tempering_factor=-1), "ssd_ratio_tempering_factor"),
        ("sdar", dict(uniforms=[[0.5]]), r"uniforms\[0\] must hold 6 numbers"), ("sdar", dict(uniforms=[[2.0] * 6]), r"uniforms\[0\]"),
        ("sdar", dict(uniforms=[]), "uniforms must hold a list per verification"), ("sdar", dict(uniforms=5), "list of numbers"),
        ("sdar", dict(uniforms=[[0.999999] * 6] * 99, resampled=[]), "resampled must hold a token"), ("sdar", dict(resampled=[384]), r"resampled\[0\]"),
        ("sdar", dict(temperature=-1.0), "temperature"), ("sdar", dict(block_length=0), "block_length"),
        ("llada2", dict(do_verify_policy="contextual_bandit_ucb"), "do_verify_policy"),
        ("llada2", dict(token_acceptance_estimator="soft_confidence_power"), "token_acceptance"),
        ("llada2", dict(hysteresis_threshold_on=-3.0, do_verify_policy="score_hysteresis"), "above off"),
        ("llada2", dict(num_to_transfer=0), "num_to_transfer"),
        ("fast_dllm_v2", dict(use_ssd_cache=True), "use_ssd_cache"), ("fast_dllm_v2", dict(output_scores=True), "output_scores"),
        ("fast_dllm_v2", dict(use_block_cache=True, draft_ver=True), "draft_ver"), ("fast_dllm_v2", dict(max_new_tokens=None), "max_new_tokens"),
        ("fast_dllm_v2", dict(small_block_size=7), "small_block_size"), ("fast_dllm_v2", dict(top_p=0.0), "top_p"),
    ],
)  # fmt: skip
def test_hostile_arguments_of_the_authors_functions(golden_models, family, arguments, words):
    function, *_ = FUNCTIONS[family]
    length = dict(max_new_tokens=32) if family == "fast_dllm_v2" else dict(gen_length=16, block_length=8)
    with pytest.raises(SettingError, match=words):
        function(golden_models[family], torch.tensor([list(range(10))]), **(length | GENERATE | arguments))
    other = golden_models["fast_dllm_v2" if family != "fast_dllm_v2" else "sdar"]
    with pytest.raises(SettingError, match="block-causal with"):
        function(other, torch.tensor([[1, 2, 3]]), **(length | GENERATE))


def test_the_authors_functions_return_what_theirs_do(golden_models):
    ids = torch.tensor([list(range(20, 30))])
    x = sdar.block_diffusion_generate(golden_models["sdar"], ids, mask_id=383, gen_length=8, attention_mask=torch.ones_like(ids), eb_threshold=1, unknown=3)
    assert x.dtype == torch.int64 and x.shape[0] == 1 and torch.equal(x[:, :10], ids)
    x = llada2.generate_ssd_policy(golden_models["llada2"], ids, mask_id=383, eos_id=381, block_length=8, gen_length=8, return_stats=False)
    assert isinstance(x, torch.Tensor) and 10 < x.shape[1] <= 18
    x, said = llada2.generate_ssd_policy(golden_models["llada2"], ids, mask_id=383, eos_id=381, block_length=8, max_gen_toks=8)
    assert set(said) == {"nfe"}
    out = fast_dllm_v2.generate_ssd_policy(golden_models["fast_dllm_v2"], ids, mask_id=383, stop_token=381, max_length=42, return_dict_in_generate=True)
    assert out.sequences.shape[1] > 10
    sampled = [
        sdar.block_diffusion_generate(golden_models["sdar"], ids, mask_id=383, gen_length=8, do_sample=True, temperature=1.2, top_k=20, top_p=0.9)
        for _ in range(2)
    ]
    assert all(383 not in s for s in sampled)


def test_the_table_of_the_documentation():
    from unmask.speculate.s2d2_options import option_table

    docs = (GOLDEN.parent.parent / "docs" / "speculate-s2d2.md").read_text()
    assert option_table() in docs
    assert {k.name for k in OPTIONS} == set(Options.__annotations__) and set(ROUTES) == set(_run.ROUTES.values())
    assert set(_run.NAMES.values()) <= {k.name for k in OPTIONS}


def test_keyed_numbers_do_not_depend_on_the_batch():
    seeds = torch.tensor([5, 9, 5])
    keyed = Keyed(seeds)
    assert keyed.uniforms(0, 3, [7, 8]) == keyed.uniforms(2, 3, [7, 8]) == [keyed.uniforms(0, 3, [p])[0] for p in (7, 8)]
    assert keyed.uniforms(0, 3, [7]) != keyed.uniforms(1, 3, [7]) and keyed.uniforms(0, 4, [7]) != keyed.uniforms(0, 3, [7])
    state = engine(model("sdar", 8), [[1]], 7).state
    assert scratch_slots(state, 8) >= 15


def generate(model, rows, speculate, **more):
    common = dict(policy="sdar_dynamic", threshold=0.5, max_new_tokens=16, eos_stop=False, seeds=[5, 6, 7][: len(rows)])
    return unmask.generate(model, rows, speculate=speculate, **{**common, **more})


def test_generate_is_the_engine():
    model, rows = make(visibility="block_causal", block_size=4, qk_norm=True), prompts(3, low=1)
    by_text = generate(model, rows, "s2d2:mode=greedy,min_span=2")
    by_object = generate(model, rows, methods.S2D2(Options(mode="greedy", min_span=2)))
    assert [r.ids for r in by_text] == [r.ids for r in by_object]
    assert by_text[0].settings["speculate"] == "s2d2:mode=greedy,min_span=2" and "draft" not in by_text[0].settings
    for row, alone in zip(by_text, (generate(model, [r], "s2d2:mode=greedy,min_span=2")[0] for r in rows), strict=True):
        assert row.ids == alone.ids and row.nfe == alone.nfe
    assert 0 < sum(r.accepted for r in by_text) < sum(r.drafted for r in by_text)
    drawn = generate(model, rows, "s2d2")
    assert [r.ids for r in drawn] == [r.ids for r in generate(model, rows, "s2d2")] != [r.ids for r in generate(model, rows, "s2d2", seeds=[1, 2, 3])]


@pytest.mark.parametrize(
    "speculate, more, words",
    [
        ("s2d2:mode=x", {}, "unknown mode 'x'"),
        ("s2d2:min_span=0", {}, "min_span must be an integer in 1"),
        ("s2d2:min_span=two", {}, "min_span must be an integer"),
        ("s2d2:cache_ver=yes", {}, "cache_ver must be True or False, got 'yes'"),
        ("s2d2:nope=1", {}, "settings mode, route"),
        ("s2d2", dict(draft=3), "draft is for speculate='ssd'"),
        ("s2d2", dict(cfg_scale=1.0), "does not go with guidance"),
        ("s2d2", dict(policy="klass"), "falls back on a policy"),
    ],
)
def test_generate_refuses_before_a_forward(speculate, more, words):
    model = make(visibility="block_causal", block_size=4, qk_norm=True)
    handle = model.register_forward_hook(lambda *_: pytest.fail("a forward was made"))
    try:
        with pytest.raises(SettingError, match=words):
            unmask.generate(model, [1, 2], speculate=speculate, **more)
    finally:
        handle.remove()


def test_a_bidirectional_model_is_refused():
    with pytest.raises(SettingError, match="needs a block-causal model"):
        unmask.generate(make(), [1, 2], speculate="s2d2")
