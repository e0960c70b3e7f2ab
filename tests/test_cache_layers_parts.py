"""d2Cache, dLLM-Cache, Elastic-Cache: the attention weights and the work that they choose by against their definitions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from cache_kit import LAYOUTS, random, told
from random_models import prompts
from unmask.caches import D2, DLLM, Elastic
from unmask.decode.backend import NativeBackend
from unmask.decode.caches import _layers, d2, dllm, elastic
from unmask.models.moe import SwiGLU
from unmask.ops.linear import FORMATS, Linear, packing_available, pad_rows

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


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy", "pc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_d2_chooses_by_the_policys_score(layout, score, monkeypatch):
    """The score of each undecided position in the first forward, times the density of decided ones around it; the block's positions first, but
    for entropies, to which the authors add their highest, a negative number."""
    model, seen = random(layout, 2, 6), []
    frequencies = torch.rand(model.config.vocab_size, generator=torch.Generator().manual_seed(0)) / 50
    likely = d2._D2._likely

    def watched(self, row, masked):
        picked = likely(self, row, masked)
        seen.append((self._confidence[row.index].clone(), row.start, row.end, self._block[row.index], masked.clone(), picked))
        return picked

    monkeypatch.setattr(d2._D2, "_likely", watched)
    prompt = list(range(5))
    how = dict(policy="pc", frequencies=frequencies, variant="d2cache", clip=0.4) if score == "pc" else dict(policy="quota", score=score)
    unmask.generate(model, prompt, max_new_tokens=12, steps=12, block_size=6, cache=D2(current_k=2, rollout_p=0.0), eos_stop=False, **how)
    logits = model.logits(torch.tensor([prompt + [model.config.mask_id] * 12]))[0]
    p = (logits.roll(1, 0) if model.config.shifted else logits)[5:].double().softmax(-1)
    top = p.index_fill(1, torch.tensor([model.config.mask_id]), 0.0).sort(-1, descending=True)  # in the sums, but no candidate
    want = {
        "confidence": top.values[:, 0], "margin": top.values[:, 0] - top.values[:, 1], "entropy": (p * p.clamp_min(1e-300).log()).sum(-1),
        "pc": (-top.values[:, 0] * torch.log(frequencies.double()[top.indices[:, 0]] + 1e-10)).clamp_max(0.4),
    }[score]  # fmt: skip
    for kept, start, end, (begin, stop), masked, picked in seen:
        torch.testing.assert_close(kept[start:end].double(), want, rtol=1e-4, atol=1e-5)
        undecided = masked[start:]
        if undecided[: stop - start].any():  # the block goes on
            ranked = kept[start:end].double() * d2.density(~undecided, 10.0)
            ranked[: stop - start] += ranked.max()
            among = undecided & (torch.arange(end - start) >= begin - start)
            best = torch.where(among, ranked, -torch.inf).argsort(descending=True, stable=True)
            inside = [i for i in best.tolist() if among[i]]
            chosen = picked[start:].nonzero().flatten().tolist()
            assert set(chosen) <= set(inside) and len(chosen) <= 2
            if score != "entropy":
                assert all(i < stop - start for i in chosen) or undecided[: stop - start].sum() < 2
    assert len(seen) >= 10


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


@pytest.mark.parametrize("ratio, refreshed", [(0.25, True), (0.0, False)])
def test_v_of_the_response_is_refreshed_though_nothing_of_it_is_computed(ratio, refreshed, monkeypatch):
    """int(0.25 * 3) = 0 positions are computed anew between refreshes of the response; V of all of them follow what comes in, as in the code."""
    model, seen = random("llada", 3, 1), []
    run = NativeBackend._run

    def watched(self, plan, shadow=False):
        run(self, plan, shadow)
        seen.append((self.cache.k.clone(), self.cache.v.clone()))

    monkeypatch.setattr(NativeBackend, "_run", watched)
    cache = DLLM(prompt_every=1, response_every=9, ratio=ratio)
    unmask.generate(model, [3, 4], max_new_tokens=3, steps=3, block_size=3, policy="quota", cache=cache, eos_stop=False)
    (k1, v1), (k2, v2), _ = seen
    behind, response = slice(1, None), slice(2, 5)  # layers behind the first
    assert torch.equal(k1[behind, 0, :, response], k2[behind, 0, :, response])
    assert torch.equal(v1[behind, 0, :, response], v2[behind, 0, :, response]) != refreshed


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
