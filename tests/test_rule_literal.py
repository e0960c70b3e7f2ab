"""Every rule of the table against the same rule written out for one row in plain Python (tests/literal.py), over ragged infill batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import literal
import unmask
from literal import MASK, VOCAB, Script, scorer, tables
from unmask.decode.osdt import Table
from unmask.decode.table import RULES

FREQUENCIES = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.0])


def order_logits(pos: torch.Tensor) -> torch.Tensor:
    return torch.sin(pos.double() * 1.7) * 2.0


UNIT = st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
KNOBS = {
    "quota": dict(steps=st.sampled_from([None, 4, 7, 20])),
    "threshold": dict(threshold=UNIT, minimum=st.integers(1, 3), variant=st.sampled_from([None, "dinfer", "d2cache"])),
    "factor": dict(factor=st.sampled_from([0.2, 0.5, 1.0, 2.0]), factor_off_by_one=st.booleans()),
    "eb": dict(gamma=st.sampled_from([0.0, 0.05, 0.5, 2.0, 9.0]), variant=st.sampled_from([None, "d2cache"])),
    "pc": dict(steps=st.sampled_from([None, 5]), clip=st.sampled_from([0.5, 10.0]), decay=st.sampled_from([0.0, 0.25, 1.0])),
    "dus": dict(base=st.integers(2, 4), skip_below=st.sampled_from([None, 0.5, 1.0]), merge_last=st.booleans()),
    "klass": dict(threshold=UNIT, kl_threshold=st.sampled_from([1e-3, 0.5, 5.0]), history=st.integers(1, 3), minimum=st.integers(1, 2)),
    "slowfast": dict(
        threshold=UNIT, explore_threshold=UNIT, explore_steps=st.integers(1, 4), window=st.integers(2, 3), deviation=st.sampled_from([0.0, 1.0, 2.0])
    ),
    "sdar_static": dict(steps=st.sampled_from([None, 6])),
    "sdar_dynamic": dict(threshold=UNIT, steps=st.sampled_from([None, 6])),
    "llada2": dict(threshold=UNIT, minimum=st.integers(1, 3)),
    "sprint": dict(threshold=UNIT, steps=st.sampled_from([None, 4, 7])),
    "edit": dict(threshold=UNIT, edit_threshold=st.sampled_from([0.0, 0.5, 0.9, 1.5]), max_post_steps=st.sampled_from([0, 1, 5]), minimum=st.integers(1, 2)),
    "hierarchy": dict(threshold=UNIT, low_threshold=UNIT),
    "credit": dict(
        threshold=UNIT, credit_alpha=st.sampled_from([0.0, 0.7, 3.0]), boost_gamma=st.sampled_from([0.0, 0.2, 1.0]), decay_beta=st.sampled_from([0.0, 0.8, 1.0])
    ),
    "osdt": dict(cap=UNIT, slack=st.sampled_from([0.0, 0.2, 1.0]), table=st.sampled_from([Table(((0.9,), (0.4, 0.6, 0.2))), Table(((0.5, 0.1),))])),
    "dream": dict(
        alg=st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]), steps=st.sampled_from([None, 1, 3, 12]),
        eps=st.sampled_from([1e-3, 0.1]), alg_temp=st.sampled_from([None, 0.0, 0.5]),
    ),
    "plackett_luce": dict(steps=st.sampled_from([None, 5]), sample=st.booleans()),
    "remdm": dict(strategy=st.sampled_from(["cap", "rescale", "conf", "loop"]), steps=st.sampled_from([None, 1, 8]), eta=st.sampled_from([None, 0.3])),
    "remask": dict(k=st.integers(1, 4), loop_steps=st.integers(0, 3), start_ratio=st.sampled_from([0.0, 0.5, 0.875, 1.0])),
}  # fmt: skip
ANY_SCORE = {"quota", "threshold", "dus", "sdar_static"}


@pytest.mark.parametrize("name", [n for n in RULES if n != "wino"])
@given(data=st.data())
def test_rule_is_the_literal_rule(name, data):
    spec = RULES[name]
    knobs = {k: data.draw(s, label=k) for k, s in KNOBS[name].items()}
    knobs = {k: v for k, v in knobs.items() if v is not None}
    scores = [s for s in spec.scores if s in ("confidence", "margin", "entropy", "random", "leftmost")]
    score = data.draw(st.sampled_from(scores), label="score") if scores else None
    if name == "threshold" and score in ("entropy", "leftmost"):
        score = "confidence"
    rows, length = data.draw(st.integers(1, 3), label="rows"), data.draw(st.integers(2, 13), label="length")
    block = data.draw(st.integers(1, 8), label="block_size")
    holes = st.lists(st.sampled_from([None, None, None, 1, 2]), min_size=length - 1, max_size=length - 1)
    canvases = [[r, *data.draw(holes, label=f"canvas {r}")] for r in range(rows)]
    if "steps" in knobs and spec.uses_steps:
        assume(all(knobs["steps"] >= -(-(length - c.index(None)) // block) for c in canvases if None in c))
    table = tables(data.draw(st.integers(0, 10**6), label="logits"), rows, length)

    settings = dict(policy=name, block_size=block, seeds=[5 + r for r in range(rows)], trace=True, **knobs)
    settings |= {} if score is None else dict(score=score)
    settings |= dict(frequencies=FREQUENCIES) if name == "pc" else {}
    settings |= dict(order_logits=lambda step: order_logits(step.pos)) if name == "plackett_luce" else {}
    got = unmask.infill(Script(table), canvases, **settings)
    for r, (canvas, result) in enumerate(zip(canvases, got, strict=True)):
        more = dict(frequencies=FREQUENCIES) if name == "pc" else dict(h=order_logits) if name == "plackett_luce" else {}
        more |= dict(quota=True) if name == "sdar_dynamic" else {}
        rule = literal.RULES[name](knobs | more)
        score_of = scorer(score or ("pc" if name == "pc" else "confidence"), **knobs, **more)
        want = literal.decode(table[r], canvas, block, rule, score_of, seed=5 + r, steps=knobs.get("steps") if spec.uses_steps else None)
        assume(all(abs(a - b) > 2e-6 or math.isinf(a) for a, b in want.close))
        made = [({(p, t) for p, t, _ in x["committed"]}, {(p, a, b) for p, a, b, _ in x["edited"]}, {(p, t) for p, t in x["remasked"]}) for x in result.trace]
        assert made == want.trace
        assert (result.canvas, result.nfe) == (want.canvas, want.nfe) and MASK not in result.canvas
        if name == "plackett_luce":
            assert result.log_prob == pytest.approx(rule.log_prob, abs=1e-5)


def test_every_rule_has_a_literal():
    assert set(KNOBS) | {"wino"} == set(RULES) == set(literal.RULES) | {"wino"} and VOCAB == FREQUENCIES.numel()
