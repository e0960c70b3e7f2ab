"""S2D2: options, what is refused, invalid logits, and `unmask.generate`."""

from __future__ import annotations

import math

import pytest
import torch

import unmask
from golden_runs import GOLDEN
from random_models import make, prompts
from s2d2_kit import MASK, decode, engine, model
from unmask.compat.s2d2 import _run
from unmask.decode.backend import Guidance, NativeBackend
from unmask.decode.module_backend import ModuleBackend
from unmask.decode.policy import Policy
from unmask.decode.schedule import AlignedBlocks
from unmask.decode.state import DecodeState
from unmask.errors import InvalidLogits, SettingError
from unmask.speculate import methods, s2d2_rule
from unmask.speculate import s2d2 as module
from unmask.speculate.s2d2 import S2D2Backend, S2D2Engine
from unmask.speculate.s2d2_options import OPTIONS, ROUTES, Options, read_options


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


def test_the_table_of_the_documentation():
    from unmask.speculate.s2d2_options import option_table

    docs = (GOLDEN.parent.parent / "docs" / "speculate-s2d2.md").read_text()
    assert option_table() in docs
    assert {k.name for k in OPTIONS} == set(Options.__annotations__) and set(ROUTES) == set(_run.ROUTES.values())
    assert set(_run.NAMES.values()) <= {k.name for k in OPTIONS}


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
