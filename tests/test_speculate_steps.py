"""Lossless self-speculation: what a forward takes, shows and reports, and how many nodes "auto" chooses."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

import unmask
from random_models import make, prompts
from speculate_kit import POLICIES, SHAPES, check, model, rows_cost_little  # noqa: F401 (rows_cost_little: for every test here)
from unmask.decode.backend import NativeBackend
from unmask.models.model import Model
from unmask.speculate import auto


def test_stream_shows_every_step_of_a_forward():
    settings = dict(max_new_tokens=14, block_size=7, policy="quota", eos_stop=False, speculate="ssd", draft=4)
    events = list(unmask.stream(model("llada"), [[1], [2, 3]], **settings))
    results = events[-1].result
    canvases = {0: [1] + [60] * 14, 1: [2, 3] + [60] * 14}
    several = 0
    for e in events:
        if e.kind == "commit":
            for p, t in zip(e.positions, e.ids, strict=True):
                assert canvases[e.row][p] == 60
                canvases[e.row][p] = t
            assert canvases[e.row] == e.canvas
    assert list(canvases.values()) == [r.canvas for r in results]
    assert sum(e.kind == "step" for e in events) == max(r.nfe for r in results) < 14
    seen = Counter((e.row, e.nfe) for e in events if e.kind == "commit")
    several = sum(n > 1 for n in seen.values())
    assert several > 0 and any(n == 1 for n in seen.values())


def test_nothing_is_copied(monkeypatch):
    """The K/V cache has one row per row of the batch and room for the nodes' windows; no forward touches more of it than that."""
    caches = []
    new_cache = Model.new_cache
    monkeypatch.setattr(Model, "new_cache", lambda self, rows, slots: caches.append((rows, slots)) or new_cache(self, rows, slots))
    rows = [list(range(40)), list(range(30))]
    settings = dict(max_new_tokens=12, block_size=4, policy="quota", eos_stop=False)
    result = unmask.generate(model("llada"), rows, cache="dual", speculate="ssd", draft=5, **settings)
    assert caches == [(2, 52 + 4 * (4 + 1))]
    assert sum(r.accepted for r in result) > 0
    caches.clear()
    unmask.generate(model("llada"), rows, cache="dual", **settings)
    assert caches == [(2, 52)]


def test_candidates_are_more_query_rows(monkeypatch):
    """One forward a step for all nodes of all rows; a node brings its window, nothing else."""
    sizes = []
    stats = NativeBackend.stats
    monkeypatch.setattr(NativeBackend, "stats", lambda self, plan, *a, **k: sizes.append(plan.sizes) or stats(self, plan, *a, **k))
    settings = dict(max_new_tokens=8, block_size=8, cache="dual", policy="quota", eos_stop=False)
    (result,) = unmask.generate(model("llada"), [list(range(40))], speculate="ssd", **settings)
    assert len(sizes) == result.nfe and sum(map(sum, sizes)) == result.rows_forwarded
    assert sizes[0] == [48] and set(sizes[1]) == {8} and max(map(len, sizes)) == 4


def test_invalid_logits_of_a_node_that_does_not_count_are_nothing():
    """A NaN that only a rejected draft meets changes nothing; one that the plain run meets ends the row at the same step."""
    rows = [[1, 2], [3, 4]]
    settings = dict(max_new_tokens=14, block_size=7, policy="quota", eos_stop=False, on_invalid="skip", trace=True, seeds=[0, 1])
    clean = unmask.generate(model("llada"), rows, **settings)
    visited = [{tuple(sorted((p, i) for t in r.trace[:k] for p, i, _ in t["committed"])) for k in range(len(r.trace) + 1)} for r in clean]

    def poison(off_the_path: bool, at: int = 5):
        def hook(module, args, hidden):
            f = args[0]
            for start, end, row in zip(f.cu_q[:-1].tolist(), f.cu_q[1:].tolist(), f.kv_row.tolist(), strict=True):
                decided = tuple(sorted((p, i) for p, i in zip(f.pos[start:end].tolist(), f.ids[start:end].tolist(), strict=True) if p >= 2 and i != 60))
                if (decided not in visited[row]) if off_the_path else (row == 1 and len(decided) == at):
                    hidden[start:end] = float("nan")
                    hits.append(row)
            return hidden

        return model("llada").register_forward_hook(hook)

    hits: list[int] = []
    handle = poison(off_the_path=True)
    try:
        fast = unmask.generate(model("llada"), rows, speculate="ssd", **settings)
    finally:
        handle.remove()
    assert hits and [r.canvas for r in fast] == [r.canvas for r in clean] and all(r.accepted < r.drafted and r.accepted for r in fast)
    handle = poison(off_the_path=False)
    try:
        a, b = unmask.generate(model("llada"), rows, **settings), unmask.generate(model("llada"), rows, speculate="ssd", **settings)
        with pytest.raises(unmask.InvalidLogits, match=r"row 1, step 5, position \d+: a NaN"):
            unmask.generate(model("llada"), rows, speculate="ssd", **settings | dict(on_invalid="raise"))
    finally:
        handle.remove()
    assert [(r.canvas, r.finish_reason) for r in a] == [(r.canvas, r.finish_reason) for r in b] and b[1].finish_reason == "invalid"
    assert b[1].accepted > 0


def test_invalid_logits_of_a_draft_beside_a_row_that_opens_an_adaptive_block():
    """Tokens that only rejected drafts hold carry NaN. A block's opening forward reports invalid logits early; drafts of other rows are in it too."""
    rows, tried = prompts(3, seed=2), 0
    settings = dict(schedule="adablock", delimiters=list(range(0, 59, 3)), delimiter_threshold=0.2, delimiter_window=0.5, threshold=0.9)
    settings |= dict(max_new_tokens=24, block_size=6, eos_stop=False)
    drafting = dict(speculate="ssd:tree=tokens", draft=6)
    for shape in ("llada", "dream"):
        for seed in (4, 5):
            plain, seen = unmask.generate(model(shape, seed), rows, **settings), set()
            handle = model(shape, seed).register_forward_hook(lambda _, args, __, seen=seen: seen.update(args[0].ids.tolist()))
            try:
                unmask.generate(model(shape, seed), rows, **drafting, **settings)
            finally:
                handle.remove()
            for token in sorted(seen - {t for r in plain for t in r.canvas} - {60}):
                poisoned = make(seed=seed, **SHAPES[shape])
                poisoned.backbone.embed[token] = float("nan")
                fast = unmask.generate(poisoned, rows, **drafting, **settings)
                assert [(r.canvas, r.nfe + r.accepted) for r in fast] == [(r.canvas, r.nfe) for r in plain]
                tried += 1
    assert tried >= 4


def test_thread_count_does_not_change_a_bit(threads):
    results = []
    for n in (1, 2):
        threads(n)
        results.append(check(model("llada"), prompts(3), cache="dual", **POLICIES["sampled threshold"]))
    assert results[0] == results[1]


def test_auto_turns_itself_off_where_nothing_pays(monkeypatch):
    """Rows that cost as much as forwards: the plain run, with a draft of two tried every 32 forwards."""
    monkeypatch.setattr(auto, "curve", lambda *_: {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0})
    settings = dict(max_new_tokens=80, block_size=16, policy="quota", eos_stop=False, cache="dual")
    (plain,), (fast,) = unmask.generate(model("llada"), [[1]], **settings), unmask.generate(model("llada"), [[1]], speculate="auto", **settings)
    assert fast.canvas == plain.canvas and 1 <= fast.drafted <= 3 and fast.nfe >= plain.nfe - 3


def test_auto_drafts_far_while_drafts_are_accepted_and_less_after():
    chooser = auto.Chooser(8)
    costs = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.6}
    assert auto.best_nodes(0.95, costs, 0.0, 8) == 8 and auto.best_nodes(0.95, costs, 1.0, 8) == 1
    for _ in range(60):
        chooser.note(4, 0, True)
    assert chooser.acceptance < 0.05 and auto.best_nodes(chooser.acceptance, costs, 0.0, 8) == 1
    before = chooser.acceptance
    chooser.note(4, 0, False)  # the row ended: nothing was rejected
    assert chooser.acceptance == before
    for _ in range(60):
        chooser.note(4, 3, True)
    assert chooser.acceptance > 0.95
    assert [auto.between(costs, n) for n in (1, 2, 3, 4, 8)] == pytest.approx([1.0, 1.05, 1.125, 1.2, 1.6])
    assert auto.between(costs, 12) == pytest.approx(2.0) and auto.between({1: 0.5}, 3) == 1.5


def test_costs_are_measured_once_per_model_and_shape(monkeypatch):
    monkeypatch.undo()
    m, forwards = make(seed=9), []
    handle = m.register_forward_hook(lambda *_: forwards.append(1))
    times: list = []
    seconds = auto._seconds
    monkeypatch.setattr(auto, "_seconds", lambda *a: times.append(a) or seconds(*a))
    try:
        (a,) = unmask.generate(m, [[1, 2]], speculate="auto", policy="quota", block_size=8, max_new_tokens=16, cache="dual", eos_stop=False)
        measured = len(times)
        (b,) = unmask.generate(m, [[1, 2]], speculate="auto", policy="quota", block_size=8, max_new_tokens=16, cache="dual", eos_stop=False)
    finally:
        handle.remove()
    assert measured >= 8 and len(times) == measured and a.canvas == b.canvas
    assert len(forwards) == a.nfe + b.nfe  # what is measured is no forward of the run
    (curve,) = auto._CURVES[m].values()
    assert sorted(curve) == [1, 2, 4, 8] and all(t > 0 for t in curve.values())


@pytest.mark.parametrize("fields", [{}, dict(visibility="block_causal", block_size=4, qk_norm=True)], ids=["bidirectional", "block_causal"])
def test_a_batch_invariant_model(fields, monkeypatch):
    """The format that load(batch_invariant=True) takes on CUDA: its products and its attention are asked for fixed cuts, and the runs agree."""
    from random_models import BASE
    from unmask.models.model import random_model

    m = random_model(dataclasses.replace(BASE, **fields), std=0.25, format="tiled")
    asked, attend = set(), unmask.ops.block_attention
    monkeypatch.setattr(unmask.ops, "block_attention", lambda *a, **k: asked.add(k["batch_invariant"]) or attend(*a, **k))
    common = dict(policy="quota", max_new_tokens=16, block_size=8, eos_stop=False, trace=True)
    plain, fast = (unmask.generate(m, [[1, 2, 3], [5] * 9], speculate=s, **common) for s in (None, "ssd"))
    assert asked == {True}
    assert [r.ids for r in plain] == [r.ids for r in fast]
    assert [[c["committed"] for c in r.trace] for r in plain] == [[c["committed"] for c in r.trace] for r in fast]
    assert sum(r.accepted for r in fast) > 0 and sum(r.drafted - r.accepted for r in fast) > 0
