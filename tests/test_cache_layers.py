"""d2Cache, dLLM-Cache, Elastic-Cache: the recorded runs of the authors' code step by step, exact settings against no cache, the attention weights
and the work that they choose by against their definitions, batches, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import golden_runs
import unmask
from golden_runs import FAMILIES, GOLDEN, RUNS
from random_models import make, prompts
from unmask.caches import D2, DLLM, CacheRule, Elastic
from unmask.decode.backend import NativeBackend
from unmask.decode.caches import _layers, d2, dllm, elastic
from unmask.errors import SettingError
from unmask.models.moe import SwiGLU
from unmask.ops.linear import FORMATS, Linear, packing_available, pad_rows

LIMIT = 3e-4  # expected of correct fp32 code (golden/README.md)
RECORDED = [r for r in RUNS if r.file in ("d2cache_kv_d2", "d2cache_kv_dllm")]
LAYOUTS = {"llada": {}, "dream": dict(shifted=True, qkv_bias=True, n_kv_heads=2)}


@functools.cache
def golden(family: str):
    return golden_runs.load(family)


@functools.cache
def random(layout: str, layers: int, seed: int, dtype: torch.dtype = torch.float32):
    return make(seed=seed, n_layers=layers, dtype=dtype, **LAYOUTS[layout])


def watched(model, call):
    """What `call` returns, and of every forward meanwhile its positions and its hidden states."""
    steps = []

    def note(_, args, hidden):
        n = int((args[0].row >= 0).sum())
        steps.append((args[0].pos[:n].tolist(), hidden[:n].clone()))

    handle = model.register_forward_hook(note)
    try:
        return call(), steps
    finally:
        handle.remove()


# --- the authors' code ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RECORDED, ids=str)
def test_recorded_rows_and_confidences(run, monkeypatch):
    """At every step the candidates that the authors' code recomputed (the others have zero logits: token 0 with 1 / vocabulary), and the
    confidences that it saw there. Where dLLM-Cache's cut falls between equal cosines, what is recomputed is topk's choice, until the next refresh."""
    model, ties = golden(run.family), []
    positions_of = dllm._Parts.positions

    def noted(self, likeness):
        if likeness is not None:
            lowest = likeness.sort().values
            ties.append(bool(lowest[self.most] == lowest[self.most - 1]))
        return positions_of(self, likeness)

    monkeypatch.setattr(dllm._Parts, "positions", noted)
    cuts = []
    handle = model.register_forward_hook(lambda *_: cuts.append(any(ties) if ties else None) or ties.clear())
    outcome, steps = watched(model, lambda: golden_runs.replay(run, model))
    handle.remove()
    assert outcome.ids == run.data["output_ids"] and len(steps) == run.data["nfe"] == len(run.data["steps"])
    blank, shift, seen, tied, skipped = 1 / model.config.vocab_size, int(model.config.shifted), set(), False, 0
    for number, (step, cut, (positions, hidden)) in enumerate(zip(run.data["steps"], cuts, steps, strict=True)):
        (candidates,), (tokens,), (confidences,) = (step[n] for n in ("candidates", "candidate_tokens", "candidate_confidence"))
        there = [not (t == 0 and abs(c - blank) < 1e-7) for t, c in zip(tokens, confidences, strict=True)]
        at = {p: i for i, p in enumerate(positions)}
        assert [p - shift in at for p in candidates] == there, number
        seen.add(sum(there) == len(there))
        tied = cut is not None and (cut or tied)
        skipped += tied
        if not tied:
            p, token = model.head.logits(hidden[[at[p - shift] for p, t in zip(candidates, there, strict=True) if t]]).softmax(1).max(1)
            assert token.tolist() == [x for x, t in zip(tokens, there, strict=True) if t]
            assert (p - torch.tensor([c for c, t in zip(confidences, there, strict=True) if t])).abs().max() <= LIMIT, number
    assert seen == ({True} if "dllm" in run.file else {True, False}) and skipped <= 6


LOGITS = {family: load_file(GOLDEN / family / "d2cache_run_logits.safetensors") for family in FAMILIES}


@pytest.mark.parametrize("key", [(f, k) for f in FAMILIES for k in LOGITS[f] if k.startswith(("d2_kv_d2_", "d2_kv_dllm_"))], ids="/".join)
def test_recorded_logits(key):
    """Of every position that was recomputed, and none else (zeros in the record), in the whole canvas."""
    family, name = key
    (run,) = [r for r in RECORDED if r.family == family and r.data["id"] == name.split("/")[0]]
    model, expected = golden(family), LOGITS[family][name][0]
    _, steps = watched(model, lambda: golden_runs.replay(run, model))
    positions, hidden = steps[int(name.rsplit("forward", 1)[1])]
    assert positions == expected.abs().sum(1).nonzero().flatten().tolist()
    assert (model.head.logits(hidden) - expected[positions]).abs().max() <= LIMIT


@pytest.mark.parametrize("run", RECORDED, ids=str)
def test_recorded_runs_forward_less(run, monkeypatch):
    """Fewer rows per forward than without a cache, and as many as stand in the plan, or in dLLM-Cache's schedule."""
    results = []
    generate = unmask.generate
    monkeypatch.setattr(unmask, "generate", lambda *a, **k: results.extend(r := generate(*a, **k)) or r)
    model = golden(run.family)
    _, steps = watched(model, lambda: golden_runs.replay(run, model))
    (result,) = results
    length = len(result.canvas)
    assert not result.exact and result.rows_forwarded < 0.8 * length * result.nfe
    if "cls" in run.args["cache"] and run.args["cache"]["cls"] == "d2Cache":
        assert result.rows_forwarded == sum(len(p) for p, _ in steps)
        return
    c, region = run.args["cache"], run.args["gen_length"]
    behind = [(length - region) * (n % c["kp"] == 0) + (region if n % c["kr"] == 0 else int(c["rou"] * region)) for n in range(result.nfe)]
    layers = model.config.n_layers
    assert result.rows_forwarded == pytest.approx(sum((length + (layers - 1) * b) / layers for b in behind))


# --- exactness -----------------------------------------------------------------------------------------------------------------------------------


def trace(result) -> list[tuple]:
    return [(r["block"], r["committed"], r["edited"]) for r in result.trace]


def told(results) -> list[tuple]:
    return [(r.canvas, r.nfe, trace(r)) for r in results]


@st.composite
def canvases(draw, new: int = 14):
    """Ragged prompts, empty ones too, with a region behind them in which some tokens are given, the mask token among them."""
    hole = st.sampled_from([None] * 5 + [7, 60])
    return [
        [*draw(st.lists(st.integers(0, 58), max_size=10)), None, *draw(st.lists(hole, min_size=1, max_size=new))]
        for _ in range(draw(st.integers(1, 3)))
    ]


POLICIES = [
    dict(threshold=0.4), dict(policy="quota"), dict(policy="eb", gamma=0.8), dict(threshold=0.3, temperature=0.7),
    dict(policy="klass", threshold=0.3, kl_threshold=0.1), dict(policy="klass", threshold=0.3, kl_threshold=0.1, variant="d2cache"),
    dict(policy="dus", skip_below=0.4), dict(policy="quota", score="random"), dict(policy="dream"), dict(threshold=0.4, repetition_penalty=1.3),
    dict(policy="credit", threshold=0.4), dict(threshold=0.4, suppress=[3, 9]), dict(threshold=0.4, soft_masks=unmask.SoftMasks()),
]  # fmt: skip
WHOLE = [dict(policy="edit", threshold=0.3, edit_threshold=0.3), dict(policy="slowfast", threshold=0.5, explore_steps=2)]
EXACT = [
    DLLM(prompt_every=1, response_every=1), DLLM(prompt_every=1, response_every=7, ratio=1.0), DLLM(1, 1, 0.0, 5), D2(refresh=1),
    D2(refresh=1, current_k=1), Elastic(threshold=1.5), Elastic(window=1, threshold=1.01),
]  # fmt: skip
EXACT_AT_ONE_LAYER = [DLLM(), DLLM(100, 100, 0.0), DLLM(7, 3, 0.3, 2)]
APPROXIMATE = [
    DLLM(5, 3, 0.3), DLLM(4, 3, 0.0), DLLM(100, 2, 1.0), DLLM(3, 50, 0.5, 1), D2(current_k=4), D2(0.5, 2, 3.0, 4), D2(rollout_p=0.0, current_k=100),
    D2(rollout_p=1.0), D2(current_k=3, refresh=3), Elastic(window=4), Elastic(window=3, threshold=0.0), Elastic(window=50, threshold=0.97),
    Elastic(window=2, threshold=1.0),
]  # fmt: skip


@given(st.data())
def test_exact_settings_give_what_no_cache_gives(data):
    layers = data.draw(st.integers(1, 3))
    model = random(data.draw(st.sampled_from(sorted(LAYOUTS))), layers, data.draw(st.integers(0, 5)))
    rule = data.draw(st.sampled_from(EXACT + (EXACT_AT_ONE_LAYER if layers == 1 else [])))
    rows = data.draw(canvases())
    policy = data.draw(st.sampled_from(POLICIES + WHOLE))
    settings = dict(block_size=data.draw(st.integers(1, 9)), trace=True, seeds=[5 + i for i in range(len(rows))], **policy)
    cached, plain = unmask.infill(model, rows, cache=rule, **settings), unmask.infill(model, rows, **settings)
    assert told(cached) == told(plain) and all(r.exact for r in cached)
    assert [r.rows_forwarded for r in cached] == [r.rows_forwarded for r in plain]


def test_what_is_exact():
    one, three = random("llada", 1, 0).config, random("llada", 3, 0).config
    assert all(rule.exact(three) and rule.exact(one) for rule in EXACT)
    assert all(rule.exact(one) and not rule.exact(three) for rule in EXACT_AT_ONE_LAYER)
    assert not any(rule.exact(three) for rule in APPROXIMATE) and not any(rule.exact(one) for rule in APPROXIMATE if not isinstance(rule, DLLM))


@given(st.data())
def test_the_first_step_is_exact(data):
    """It takes everything; only Elastic's and d2Cache's later steps, and dLLM-Cache's, differ."""
    model = random(data.draw(st.sampled_from(sorted(LAYOUTS))), 3, data.draw(st.integers(0, 5)))
    rows, rule = data.draw(canvases(new=8)), data.draw(st.sampled_from(APPROXIMATE))
    settings = dict(block_size=data.draw(st.integers(1, 9)), trace=True, **data.draw(st.sampled_from([dict(threshold=0.4), dict(policy="quota")])))
    cached, plain = unmask.infill(model, rows, cache=rule, **settings), unmask.infill(model, rows, **settings)
    assert [trace(r)[0] for r in cached] == [trace(r)[0] for r in plain]
    assert all(None not in r.canvas and (r.rows_forwarded <= r.nfe * len(r.canvas) or rule.threshold > 0) for r in cached)


@given(st.data())
def test_a_row_in_a_batch_is_the_row_alone(data):
    """Tokens, order, scores and work, bit for bit; with rows that stand in different blocks and leave at different times."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    model = random(data.draw(st.sampled_from(sorted(LAYOUTS))), 3, data.draw(st.integers(0, 5)), dtype)
    rows, rule = data.draw(canvases(new=8)), data.draw(st.sampled_from(APPROXIMATE))
    settings = dict(cache=rule, block_size=data.draw(st.integers(1, 9)), trace=True, **data.draw(st.sampled_from(POLICIES)))
    batch = unmask.infill(model, rows, seeds=[5 + i for i in range(len(rows))], **settings)
    alone = [unmask.infill(model, row, seeds=[5 + i], **settings) for i, row in enumerate(rows)]
    assert told(batch) == told(alone)
    assert [(r.rows_forwarded, [t["rows"] for t in r.trace]) for r in batch] == [(r.rows_forwarded, [t["rows"] for t in r.trace]) for r in alone]


@functools.cache
def sixteen_tokens(layout: str, seed: int, rule=None):
    settings = dict(max_new_tokens=16, block_size=8, policy="quota", eos_stop=False)
    return unmask.generate(random(layout, 3, seed), prompts(4, seed=2, low=3), cache=rule, **settings)


@pytest.mark.parametrize("rule", APPROXIMATE, ids=str)
def test_they_do_something(rule):
    """Approximate settings change what later steps see, so over several models some token differs from no cache's; and they cost less."""
    differs, work = False, []
    for layout in LAYOUTS:
        for seed in range(2):
            cached, plain = sixteen_tokens(layout, seed, rule), sixteen_tokens(layout, seed)
            differs |= [r.canvas for r in cached] != [r.canvas for r in plain]
            work += [c.rows_forwarded / p.rows_forwarded for c, p in zip(cached, plain, strict=True)]
    assert differs
    bound = 1.0 + 8 / 19 if isinstance(rule, Elastic) and rule.threshold == 1.0 else 1.0  # rows of its window are computed twice
    assert max(work) <= bound and sum(work) / len(work) < bound


# --- d2Cache: what it chooses by -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([0.05, 0.7, 3.0, 10.0, 200.0]))
def test_density_is_its_definition(decided, sigma):
    n = len(decided)
    signal = [True] * n + decided + [decided[-1]] * n
    gauss = [math.exp(-(k * k) / (2 * sigma * sigma)) for k in range(3 * n + 1)]
    norm = sum(gauss[abs(k)] for k in range(-3 * n, 3 * n))
    want = [sum(gauss[abs(n + i - j)] for j in range(3 * n) if signal[j]) / norm for i in range(n)]
    assert torch.allclose(d2.density(torch.tensor(decided), sigma), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@given(st.lists(st.floats(0.0, 4.0), min_size=1, max_size=30), st.floats(0.0, 1.0), st.data())
def test_nucleus_is_its_definition(score, p, data):
    among = data.draw(st.lists(st.booleans(), min_size=len(score), max_size=len(score)))
    values = torch.tensor(score, dtype=torch.float32)
    share = torch.where(torch.tensor(among), values, 0.0)
    share = share / (share.sum() + 1e-9)
    order = sorted(range(len(score)), key=lambda i: (-share[i].item(), i))
    want = set(order[:1])
    running = share[order].cumsum(0)
    want |= {i for i, total in zip(order, running, strict=True) if total <= p}
    assert d2.nucleus(values, p, torch.tensor(among)).nonzero().flatten().tolist() == sorted(i for i in want if among[i])


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 8))
def test_inflation_fills_gaps(chosen, width):
    on = [i for i, c in enumerate(chosen) if c]
    want = {i for a, b in zip(on, on[1:], strict=False) if b - a <= width for i in range(a, b + 1)} | set(on)
    assert d2.inflated(torch.tensor(chosen), width).nonzero().flatten().tolist() == sorted(want)


def dense(own: _layers.Queries, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention [Hq, n, keys] in float64."""
    group = own.q.shape[1] // k.shape[0]
    return torch.einsum("nhd,hkd->hnk", own.q.double(), k.double().repeat_interleave(group, 0)).mul(scale).softmax(2)


@pytest.mark.parametrize("piece", [1, 50, 1 << 22])
@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (6, 1)])
def test_weights_are_the_softmax(piece, heads, shared, monkeypatch):
    monkeypatch.setattr(_layers, "PIECE", piece)
    generator = torch.Generator().manual_seed(piece + heads)
    q, k = torch.randn(11, heads, 8, generator=generator), torch.randn(shared, 17, 8, generator=generator)
    score = torch.einsum("nhd,hkd->nhk", q, k.repeat_interleave(heads // shared, 0)) * 0.35
    own, share = _layers.Queries(q, score.logsumexp(2)), torch.rand(6, generator=generator)
    span = slice(3, 9)
    want = dense(_layers.Queries(q[span], own.lse[span]), k, 0.35)
    got = _layers.received(own, span, k, 0.35, share)
    assert torch.allclose(got.double(), torch.einsum("hnk,n->k", want, share.double()) / heads, atol=1e-6)
    assert torch.allclose(_layers.toward(own, torch.arange(3, 9), k[:, 5], 0.35).double(), want[:, :, 5].T, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollout_is_the_product_of_the_layers(layout, monkeypatch):
    """Column sums of prod (mean A + I) / 2, rows that were not forwarded being I, for every row of a batch and at every step."""
    model, checked = random(layout, 3, 4), []
    committed = d2._D2.committed

    def compare(self, step, stats, chosen):
        layers = dict(self._queries.layers)
        committed(self, step, stats, chosen)
        first = 0
        for (index, *_), size in zip(step.plan.entries, step.plan.sizes, strict=True):
            end, span = self.run.state.rows[index].end, slice(first, first + size)
            product = torch.eye(end, dtype=torch.float64)
            for n, own in sorted(layers.items()):
                mean = torch.eye(end, dtype=torch.float64)
                k = self.run.backend.cache.k[n, index, :, :end]
                mean[step.plan.token_pos[span]] = dense(_layers.Queries(own.q[span], own.lse[span]), k, model.backbone.layers[n].scale).mean(0)
                mean += torch.eye(end)
                product = mean / mean.sum(1, keepdim=True) @ product
            assert torch.allclose(self._rollout[index, :end].double(), product.sum(0), atol=1e-5)
            checked.append(size)
            first += size

    monkeypatch.setattr(d2._D2, "committed", compare)
    unmask.generate(model, prompts(3, seed=1), max_new_tokens=12, block_size=6, cache=D2(current_k=3), policy="quota", eos_stop=False)
    assert len(set(checked)) > 3


# --- dLLM-Cache: what it computes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6])
def test_work_is_skipped_not_thrown_away(layout, ratio, monkeypatch):
    """Rows that go through the MLP of each layer, padded to 16, are those that the schedule names; V alone is computed for the response."""
    model, rule, rows = random(layout, 3, 0), DLLM(6, 3, ratio), []
    mlp, products = SwiGLU.forward, []
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x, row=None: rows.append(x.shape[0]) or mlp(self, x, row))
    likeness = dllm._DLLM._likeness
    monkeypatch.setattr(dllm._DLLM, "_likeness", lambda self, *a: products.append(self._parts.choose.shape[0]) or likeness(self, *a))
    batch = [[1] * 20, [2] * 7]
    results = unmask.generate(model, batch, max_new_tokens=30, block_size=30, cache=rule, policy="quota", steps=15, eos_stop=False)
    want, choices = [], []
    for n in range(15):
        behind = sum(len(p) * (n % 6 == 0) + (30 if n % 3 == 0 else int(ratio * 30)) for p in batch)
        want += [pad_rows(87), *([pad_rows(behind)] * 2 if behind else [])]
        choices += [60, 60] if ratio and n % 3 else []
    assert rows == want and products == choices
    assert sum(r.rows_forwarded for r in results) == pytest.approx(sum(
        (87 + 2 * sum(len(p) * (n % 6 == 0) + (30 if n % 3 == 0 else int(ratio * 30)) for p in batch)) / 3 for n in range(15)
    ))  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format, dtype", [(f, d) for f in FORMATS for d in (torch.float32, torch.bfloat16)], ids=str)
def test_part_of_a_product_is_those_columns(format, dtype, bias):
    if format == "packed" and not packing_available(dtype):
        pytest.skip("this torch packs no weights of this dtype")
    generator = torch.Generator().manual_seed(1)
    weight, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((96, 64), (96,)))
    whole, x = Linear(weight, format, b if bias else None), torch.randn(48, 64, generator=generator).to(dtype)
    part = whole.part(64, 96)
    assert part.out_features == 32 and part.format == format and torch.equal(part(x), whole(x)[:, 64:])


def test_the_positions_whose_v_turned_most():
    class Row:
        nfe, start, end = 1, 2, 7

    class Plan:
        entries, flat = ((0, 0, 7, 2, 7), (1, 0, 7, 2, 7)), torch.arange(14)

    parts = dllm._Parts(DLLM(9, 9, 0.5), Plan, [Row, Row], ((False, False), (True, False)))
    likeness = torch.tensor([1.0, 0.2, 1.0, 0.1, 1.0, 0.5, 0.5, 0.5, math.nan, 0.9])
    assert parts.positions(likeness).tolist() == [5, 3, 7, 8, 12, 9] and parts.forwarded == [2, 4] and parts.cu.tolist() == [0, 2, 6]


# --- Elastic-Cache -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_pass_from_the_first_layer_on_is_the_whole_forward(layout, monkeypatch):
    """With a window that takes every mask, that is no cache, at every policy's tokens and order."""
    model = random(layout, 3, 3)
    monkeypatch.setattr(elastic._Elastic, "_drift", lambda self, places: [0] * len(places))
    settings = dict(max_new_tokens=14, block_size=5, threshold=0.4, trace=True, eos_stop=False)
    rows = prompts(3, seed=5)
    got, plain = unmask.generate(model, rows, cache=Elastic(window=100), **settings), unmask.generate(model, rows, **settings)
    assert told(got) == told(plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_pass_from_any_layer_on_agrees_with_the_first(layout, monkeypatch):
    """Where the first pass took everything, recomputing upper layers gives the same bits again."""
    model, rows = random(layout, 3, 3), prompts(3, seed=5)
    settings = dict(max_new_tokens=14, block_size=5, threshold=0.4, trace=True, eos_stop=False, cache=Elastic(window=4))
    runs = []
    for begin in ([3, 3, 3], [1, 2, 1], [0, 1, 2]):
        monkeypatch.setattr(elastic._Elastic, "_whole", lambda self, row: True)
        monkeypatch.setattr(elastic._Elastic, "_drift", lambda self, places, begin=begin: [begin[i] for i, *_ in self._plan.entries])
        runs.append(unmask.generate(model, rows, **settings))
    assert told(runs[0]) == told(runs[1]) == told(runs[2])
    length = [len(r.canvas) for r in runs[0]]
    more = [b.rows_forwarded - a.rows_forwarded for a, b in zip(runs[0], runs[1], strict=True)]
    assert more == pytest.approx([r.nfe * n * (3 - b) / 3 for r, n, b in zip(runs[1], length, (1, 2, 1), strict=True)])


def test_drift_is_the_cosine_of_the_tracked_tokens_column(monkeypatch):
    """From the queries, keys and windows of two forwards; a higher threshold never begins the recomputation later."""
    model, seen = random("dream", 3, 2), []
    drift, track = elastic._Elastic._drift, elastic._Elastic._track
    columns: dict[int, list] = {}

    def attention(self, index, layer, queries, places):
        row = self.run.state.rows[index]
        own = _layers.Queries(queries.q[places], queries.lse[places])
        return dense(own, self.run.backend.cache.k[layer, index, :, : row.end], model.backbone.layers[layer].scale)

    def checked(self, places):
        begin = drift(self, places)
        for e, (index, *_) in enumerate(self._plan.entries):
            row = self.run.state.rows[index]
            if row.nfe == 0:
                continue
            window, kept, tokens = columns[index]
            both = [p for p in self._windows[index] if p in window]
            first = len(self._layers) if both else 1
            for layer in range(len(self._layers) if both else 0):
                now = attention(self, index, layer, self._queries[layer], places[e])[:, :, tokens[layer]]
                a = now[:, [self._windows[index].index(p) for p in both]].flatten()
                b = kept[layer][:, [window.index(p) for p in both]].flatten()
                cosine = (a @ b / (a.norm() * b.norm())).item()
                assert abs(cosine - 0.99) > 1e-6
                if cosine < 0.99 and first == len(self._layers):
                    first = layer + 1
            assert begin[e] == first
            seen.append(first)
        lower = dataclasses.replace(self.rule, threshold=0.7)
        self.rule, rule = lower, self.rule
        assert all(a >= b for a, b in zip(drift(self, places), begin, strict=True))
        self.rule = rule
        return begin

    def tracked(self, row, sources):
        track(self, row, sources)
        kept, tokens = [], []
        for layer, (queries, places) in enumerate(sources):
            weight = attention(self, row.index, layer, queries, places)
            total = weight.sum((0, 1)).masked_fill(self.run.state.masked[row.index, : row.end], -1.0)
            tokens.append(int(total.argmax()))
            kept.append(weight[:, :, tokens[-1]])
            assert int(self._kept[row.index].token[layer]) == tokens[-1]
        columns[row.index] = self._windows[row.index], kept, tokens

    monkeypatch.setattr(elastic._Elastic, "_drift", checked)
    monkeypatch.setattr(elastic._Elastic, "_track", tracked)
    rows = prompts(3, seed=8, low=2)
    unmask.generate(model, rows, max_new_tokens=14, block_size=7, threshold=0.5, cache=Elastic(window=4, threshold=0.99), eos_stop=False)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_elastic_forwards(layout):
    """Window, what was decided, tracked tokens; with shifted logits the position before each mask of the window. Work rises with the threshold."""
    model, shift, rows = random(layout, 3, 1), int(random(layout, 3, 1).config.shifted), [[1, 2, 3, 4], [5] * 9]
    per_forward = []
    for threshold in (0.0, 0.9, 1.0):
        plans: list[tuple] = []
        with pytest.MonkeyPatch.context() as patch:
            stats = NativeBackend.stats

            def noted(backend, plan, live, *args, plans=plans, stats=stats, **options):
                masked = [backend.state.masked[row].nonzero().flatten().tolist() for row, *_ in plan.entries]
                plans.append((plan.runs, masked, [plan.token_pos[a:b].tolist() for a, b in zip(plan.cu_q, plan.cu_q[1:], strict=False)]))
                return stats(backend, plan, live, *args, **options)

            patch.setattr(NativeBackend, "stats", noted)
            results = unmask.generate(model, rows, max_new_tokens=12, block_size=6, policy="quota", cache=Elastic(3, threshold), eos_stop=False)
        planned = sum(len(p) for _, _, positions in plans for p in positions)
        for _, masked, positions in plans[1:]:
            for undecided, own in zip(masked, positions, strict=True):
                window = set(undecided[:3]) | {p - shift for p in undecided[:3]}
                assert window <= set(own) and len(set(own) - window) <= 1 + 3  # one was decided, three layers track one each
                assert not set(undecided[3:]) & set(own) - window
        forwarded = sum(r.rows_forwarded for r in results)
        assert forwarded == planned if threshold == 0 else forwarded > planned if threshold == 1 else forwarded >= planned
        per_forward.append(forwarded / sum(r.nfe for r in results))
    assert per_forward[0] <= per_forward[1] <= per_forward[2]


# --- settings ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache, named", [
    ("d2:current_k=0", "current_k"), ("d2:current_k=1.5", "current_k"), ("d2:rollout_p=1.1", "rollout_p"), ("d2:rollout_p=nan", "rollout_p"),
    ("d2:sigma=0", "sigma"), ("d2:sigma=-3", "sigma"), ("d2:inflate_w=-1", "inflate_w"), ("d2:refresh=-1", "refresh"), ("d2:k=3", "current_k"),
    ("dllm:ratio=2", "ratio"), ("dllm:ratio=-0.1", "ratio"), ("dllm:prompt_every=0", "prompt_every"), ("dllm:response_every=0", "response_every"),
    ("dllm:phase=-1", "phase"), ("elastic:window=0", "window"), ("elastic:threshold=-1", "threshold"), ("elastic:threshold=inf", "threshold"),
    ("elastic:window", "window"), ("d2:current_k=3,sigma=2,current_k=4", "current_k is given twice"), (CacheRule(), "cache must be a name .*, got CacheRule"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(cache, named):
    with pytest.raises(SettingError, match=named):
        unmask.generate(random("llada", 1, 0), [1], cache=cache)


@pytest.mark.parametrize("wrong", [True, "4", None, [1], 1e400, 1 << 70])
@pytest.mark.parametrize(
    "kind, field", [(D2, "current_k"), (D2, "sigma"), (DLLM, "ratio"), (DLLM, "prompt_every"), (Elastic, "window"), (Elastic, "threshold")]
)  # fmt: skip
def test_settings_of_the_wrong_kind_are_refused(kind, field, wrong):
    with pytest.raises(SettingError, match=field):
        kind(**{field: wrong})


@pytest.mark.parametrize("cache", ["d2", "elastic"])
def test_what_a_cache_of_parts_cannot_serve_is_refused(cache):
    model = random("llada", 2, 0)
    for settings in (dict(policy="slowfast"), dict(policy="edit"), dict(schedule="adablock", delimiters=[3]), dict(policy="wino"), dict(cfg_scale=1.0)):
        with pytest.raises(SettingError, match="cache"):
            unmask.generate(model, [1, 2], cache=cache, **settings)
    with pytest.raises(SettingError, match="bidirectional|block"):
        unmask.generate(make(visibility="block_causal", block_size=4), [1], cache=cache)
    with pytest.raises(SettingError, match="unmask.load"):
        unmask.generate(unmask.wrap(torch.nn.Linear(2, 2), mask_id=1, shifted=False), [0], cache=cache)


def test_dllm_serves_adaptive_blocks():
    settings = dict(max_new_tokens=12, block_size=4, schedule="adablock", delimiters=[3, 9], delimiter_threshold=0.1, threshold=0.4, eos_stop=False)
    model = random("llada", 3, 0)
    exact = unmask.generate(model, [1, 2, 3], cache="dllm:prompt_every=1,response_every=1", **settings)
    assert exact.canvas == unmask.generate(model, [1, 2, 3], **settings).canvas
    assert None not in unmask.generate(model, [1, 2, 3], cache="dllm", **settings).canvas


@pytest.mark.parametrize("cache", ["d2:current_k=3", "dllm", "elastic:window=3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_are_of_what_was_forwarded(layout, cache):
    """trace="predictions": the model's best token where the forward reached an undecided position, the last one elsewhere."""
    model, shift = random(layout, 3, 0), int(random(layout, 3, 0).config.shifted)
    settings = dict(max_new_tokens=12, block_size=6, policy="quota", cache=cache, trace="predictions", eos_stop=False)
    result, steps = watched(model, lambda: unmask.generate(model, [1, 2, 3], **settings))
    decided, before, kept = {}, None, 0
    for record, (positions, hidden) in zip(result.trace, steps, strict=True):
        logits = model.head.logits(hidden)
        logits[:, model.config.mask_id] = -torch.inf
        best = dict(zip(positions, logits.argmax(1).tolist(), strict=True))
        want = [1, 2, 3] + [decided.get(p, best.get(p - shift, before and before[p])) for p in range(3, 15)]
        assert record["filled"] == want
        kept += sum(p not in decided and p - shift not in best for p in range(3, 15))
        decided.update((p, result.canvas[p]) for p, *_ in record["committed"])
        before = want
    assert (kept > 0) == (cache != "dllm")
