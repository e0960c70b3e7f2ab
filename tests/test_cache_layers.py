"""d2Cache, dLLM-Cache, Elastic-Cache, whole runs: the recorded runs of the authors' code step by step, exact settings against no cache, batches, and
what is refused. What they choose by and compute: test_cache_layers_parts.py."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import golden_runs
import unmask
from cache_kit import LAYOUTS, random, told, trace, watched
from golden_runs import FAMILIES, GOLDEN, RUNS
from random_models import make, prompts
from unmask.caches import D2, DLLM, CacheRule, Elastic
from unmask.decode.caches import dllm
from unmask.errors import SettingError

LIMIT = 3e-4  # expected of correct fp32 code (golden/README.md)
RECORDED = [r for r in RUNS if r.file in ("d2cache_kv_d2", "d2cache_kv_dllm")]


@functools.cache
def golden(family: str):
    return golden_runs.load(family)


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
