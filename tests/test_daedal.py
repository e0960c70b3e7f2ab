"""DAEDAL: every token, length and forward against the plain loop of daedal_reference.py, and what must hold whatever the model says."""

from __future__ import annotations

import functools
import itertools
import math
import types

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import unmask
from daedal_reference import Constants, Outcome, daedal
from random_models import make, prompts
from unmask.decode.growth import eos_confidence, first_masked, insertion_source, lowest

MASK, EOS, VOCAB = 12, 11, 13  # few tokens, so that random models often predict the end


@functools.cache
def small(seed: int = 0, shifted: bool = False, dtype: torch.dtype = torch.float32):
    return make(seed, dtype, std=0.4, vocab_size=VOCAB, mask_id=MASK, eos_ids=(EOS,), pad_id=EOS, shifted=shifted, n_layers=1)


def logits_of(model):
    """Dense logits of one canvas, row i predicting position i."""

    def call(ids: list[int]) -> torch.Tensor:
        if not ids:
            return torch.zeros(0, VOCAB)
        z = model.logits(torch.tensor([ids]))[0].float()
        return torch.cat([z[:1], z[:-1]]) if model.config.shifted else z

    return call


def arguments(c: Constants) -> dict:
    extra = {} if c.guidance is None else dict(cfg_scale=c.guidance - 1.0, negative_prompt=c.negative)
    return dict(
        schedule="daedal", max_new_tokens=c.longest, initial_tokens=c.initial, block_size=c.block, high_threshold=c.high, low_threshold=c.low,
        eos_threshold=c.eos, expand_threshold=c.expand, expansion=c.expansion, eos_window=c.window, **extra,
    )  # fmt: skip


def run(model, prompt, c: Constants, **more):
    return unmask.generate(model, prompt, **{**arguments(c), "eos_stop": False, "trace": True, **more})


def same(result: unmask.Result, want: Outcome) -> None:
    """Tokens, forwards, and what every forward did."""
    assert result.canvas == want.canvas and result.nfe == want.nfe == len(result.trace)
    assert [r["length"] for r in result.trace] == want.lengths
    assert [tuple(r["inserted"][0]) if r["inserted"] else None for r in result.trace] == want.inserted
    assert [sorted((p, t) for p, t, _ in r["committed"]) for r in result.trace] == want.committed
    assert [r["block"] < 0 for r in result.trace] == [True] * want.measured + [False] * (want.nfe - want.measured)


def constants(draw) -> Constants:
    longest = draw(st.integers(1, 40))
    bars = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
    return Constants(
        longest, draw(st.integers(1, min(longest, 16))), draw(st.integers(1, 12)), draw(bars), draw(bars), draw(bars), draw(bars),
        draw(st.integers(2, 9)), draw(st.integers(1, 8)),
    )  # fmt: skip


CASES = st.composite(constants)()
ROWS = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=6), min_size=1, max_size=3)  # a prompt may be empty, or hold the mask token


@given(seed=st.integers(0, 5), shifted=st.booleans(), rows=ROWS, c=CASES)
def test_equals_the_reference(seed, shifted, rows, c):
    model = small(seed, shifted)
    want = [daedal(logits_of(model), row, MASK, EOS, c) for row in rows]
    assume(min(o.margin for o in want) > 1e-6)  # a canvas of nothing but masks, for one, is all ties
    for result, outcome in zip(run(model, rows, c), want, strict=True):
        same(result, outcome)


@given(seed=st.integers(0, 5), rows=ROWS, c=CASES, weight=st.sampled_from([1.5, 2.0, 3.0]), negative=st.none() | st.lists(st.integers(0, 10), min_size=1, max_size=4))
def test_guidance_equals_the_reference(seed, rows, c, weight, negative):
    """Stage 2 is guided, stage 1 is not."""
    c = Constants(**{**vars(c), "guidance": weight, "negative": negative})
    model = small(seed)
    want = [daedal(logits_of(model), row, MASK, EOS, c) for row in rows]
    assume(min(o.margin for o in want) > 1e-6)  # a canvas of nothing but masks, for one, is all ties
    for result, outcome in zip(run(model, rows, c), want, strict=True):
        same(result, outcome)


EAGER = Constants(longest=40, initial=5, block=6, high=0.8, low=0.4, eos=0.2, expand=0.9, expansion=5, window=4)
"""Makes random models lengthen in stage 1, and insert until nothing more fits."""
CRAMPED = Constants(longest=12, initial=6, block=12, high=0.9, low=1.0, eos=0.0, expand=1.0, expansion=9, window=2)
"""Room for less than one insertion."""


TIMID = Constants(longest=40, initial=9, block=8, high=0.7, low=0.2, eos=0.1, expand=0.3, expansion=4, window=3)
"""Bars in the middle of what random models say, so that each one is passed now and missed then."""
GUIDED = Constants(**{**vars(TIMID), "guidance": 2.0})


@pytest.mark.parametrize("shifted", [False, True], ids=["own row", "shifted"])
@pytest.mark.parametrize("c", [EAGER, CRAMPED, TIMID, GUIDED], ids=["eager", "cramped", "timid", "guided"])
def test_equals_the_reference_on_cases_where_everything_happens(c, shifted):
    rows = [[1, *row] for row in prompts(4, VOCAB, seed=4, high=7)]
    compared = 0
    for seed in range(6):
        model = small(seed, shifted)
        for row, result in zip(rows, run(model, rows, c), strict=True):
            want = daedal(logits_of(model), row, MASK, EOS, c)
            if want.margin > 1e-6:
                same(result, want)
                compared += 1
    assert compared >= 20


def test_the_cases_hold_what_they_should():
    """The comparisons above would prove little if rows never grew: with these constants everything happens."""
    seen = [daedal(logits_of(small(seed)), row, MASK, EOS, EAGER) for seed, row in itertools.product(range(6), prompts(3, 11, seed=4))]
    runs = [run for o in seen for run in o.inserted[o.measured :] if run]
    assert max(o.measured for o in seen) > 2 and min(o.measured for o in seen) == 1
    assert len(runs) > 20 and all(n == 5 for _, n in runs)
    assert {o.lengths[-1] for o in seen} >= {40} and min(o.lengths[-1] for o in seen) < 40
    assert any(len(c) > 1 for o in seen for c in o.committed) and any(len(c) == 1 for o in seen for c in o.committed)
    seen = [daedal(logits_of(small(seed)), row, MASK, EOS, CRAMPED) for seed, row in itertools.product(range(6), prompts(3, 11, seed=4))]
    runs = [run for o in seen for run in o.inserted[o.measured :] if run]
    assert {n < 9 for _, n in runs} == {True, False}  # L_max cuts some runs, and of others only what stands behind them
    assert any(EOS not in o.canvas for o in seen)  # the tail is cut off then


@pytest.mark.parametrize("c", [EAGER, CRAMPED, Constants(30, 7, 4, 0.5, 0.5, 0.9, 1.0, 3, 2), Constants(64, 8, 32, 0.9, 0.3, 0.5, 0.9, 8, 8)], ids=["eager", "cramped", "b", "c"])
@pytest.mark.parametrize("seed", range(3))
def test_what_must_hold_at_every_step(seed, c):
    """The trace, replayed: it makes the canvas, and every rule can be read from it."""
    rows = prompts(4, VOCAB, seed=seed, high=7)
    for row, result in zip(rows, run(small(seed), rows, c), strict=True):
        first = len(row)
        canvas, undecided = row + [MASK] * c.initial, [False] * first + [True] * c.initial
        for record in result.trace:
            for position, token, _ in record["committed"]:
                assert undecided[position] and token != MASK and position >= first
                canvas[position], undecided[position] = token, False
            for position, n in record["inserted"]:
                if record["block"] < 0:
                    assert position == len(canvas) and not record["committed"] and 1 <= n <= c.expansion
                    canvas, undecided = canvas + [MASK] * n, undecided + [True] * n
                else:  # in place of one mask; what is decided keeps its order, because nothing else moves anything
                    assert undecided[position] and 2 <= n <= c.expansion
                    assert n == c.expansion or position - first + n == c.longest
                    canvas[position : position + 1] = [MASK] * n
                    undecided[position : position + 1] = [True] * n
                    del canvas[first + c.longest :], undecided[first + c.longest :]
            tail = record["length"] - (len(canvas) - first)
            canvas, undecided = canvas + [EOS] * tail, undecided + [False] * tail
            whole = min(c.window // 2, c.longest - (len(canvas) - tail - first))
            assert tail == (whole if record["block"] < 0 and not record["inserted"] else 0)  # once, at the end of stage 1
            assert len(canvas) - first == record["length"] <= c.longest
            assert canvas[:first] == row and not any(undecided[:first])
            assert record["block"] < 0 or record["committed"]  # at least one a step
        assert canvas == result.canvas and not any(undecided) and MASK not in canvas[first:]
        measured = sum(r["block"] < 0 for r in result.trace)
        assert measured <= math.ceil((c.longest - c.initial) / c.expansion) + 1
        grown = sum(bool(r["inserted"]) for r in result.trace[measured:])
        assert grown <= math.ceil((c.longest - result.trace[measured - 1]["length"]) / (c.expansion - 1))
        first_masks = sum(r["inserted"][0][1] for r in result.trace[:measured] if r["inserted"]) + c.initial
        assert result.nfe - measured <= first_masks + grown * (c.expansion - 1)


def test_thresholds_of_zero():
    for seed, row in itertools.product(range(4), prompts(3, 11, seed=1)):
        still = run(small(seed), row, Constants(**{**vars(EAGER), "expand": 0.0}))
        assert all(not r["inserted"] for r in still.trace if r["block"] >= 0)
        once = run(small(seed), row, Constants(**{**vars(EAGER), "eos": 0.0}))
        assert sum(r["block"] < 0 for r in once.trace) == 1 and once.trace[0]["length"] == EAGER.initial + EAGER.window // 2
        full = run(small(seed), row, Constants(**{**vars(EAGER), "initial": 40}))
        assert {r["length"] for r in full.trace} == {40} and not any(r["inserted"] for r in full.trace)


@pytest.mark.parametrize("more", [{}, dict(temperature=1.0), dict(cfg_scale=0.8), dict(temperature=0.6, cfg_scale=0.8), dict(suppress=[3, 4])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_row_alone_is_row_in_a_ragged_batch(dtype, more):
    model, rows, seeds = small(2, dtype=dtype), prompts(5, 11, seed=3), [5, 6, 7, 8, 9]
    batch = run(model, rows, EAGER, seeds=seeds, **more)
    assert len({len(r.canvas) - len(r.prompt_ids) for r in batch}) > 1 or len({r.nfe for r in batch}) > 1
    strip = lambda r: [{k: v for k, v in record.items() if k not in ("ms", "row")} for record in r.trace]  # noqa: E731
    for row, seed, got in zip(rows, seeds, batch, strict=True):
        alone = run(model, [row], EAGER, seeds=[seed], **more)[0]
        assert got.canvas == alone.canvas and strip(got) == strip(alone)
        assert not set(more.get("suppress", ())) & {t for record in got.trace for _, t, _ in record["committed"]}
    again = run(model, rows[::-1], EAGER, seeds=seeds[::-1], **more)
    assert [r.canvas for r in again] == [r.canvas for r in batch][::-1]


def test_samples_follow_the_seed():
    model, row = small(1), [1, 2, 3]
    canvases = [run(model, row, EAGER, temperature=1.5, seed=s).canvas for s in (0, 0, 1, 2, 3)]
    assert canvases[0] == canvases[1] and len({tuple(c) for c in canvases}) > 2


def test_one_forward_per_step_and_finished_rows_rest():
    model, rows, tokens = make(2, std=0.4, vocab_size=VOCAB, mask_id=MASK, eos_ids=(EOS,), pad_id=EOS, n_layers=1), prompts(5, 11, seed=3), []
    handle = model.register_forward_hook(lambda _, args, __: tokens.append(int((args[0].row >= 0).sum())))
    try:
        results = run(model, rows, EAGER)
    finally:
        handle.remove()
    assert len(tokens) == max(r.nfe for r in results) > min(r.nfe for r in results)
    start = [EAGER.initial] + [0] * len(tokens)
    for i, n in enumerate(tokens):  # every active row brings its own canvas, as long as it is before the step, and nothing else
        lengths = [start[0] if i == 0 else r.trace[i - 1]["length"] for r in results if i < r.nfe]
        assert n == sum(lengths) + sum(len(row) for row, r in zip(rows, results, strict=True) if i < r.nfe)


class Module(torch.nn.Module):
    """Somebody's module, which knows of no padding and no mask. Where the token `broken` is in a row, its odd positions are NaN."""

    def __init__(self, model, broken: int | None = None):
        super().__init__()
        self.inner, self.broken, self.shapes = [model], broken, []
        self.config = types.SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, vocab_size=VOCAB, shifted=False)

    def forward(self, ids):
        self.shapes.append(tuple(ids.shape))
        logits = self.inner[0].logits(ids)
        if self.broken is None:
            return logits
        odd = torch.arange(ids.shape[1]) % 2 == 1
        return torch.where(((ids == self.broken).any(1)[:, None] & odd)[:, :, None], torch.nan, logits)


@pytest.mark.parametrize("more", [{}, dict(temperature=0.7), dict(cfg_scale=1.0)], ids=str)
def test_any_module_on_rows_of_unequal_length(more):
    model, rows = small(2), [[1, 2, 3], [4], [5, 6, 7], []]
    module = Module(model)
    for got, want in zip(run(module, rows, EAGER, **more), run(model, rows, EAGER, **more), strict=True):
        assert got.canvas == want.canvas and got.nfe == want.nfe and got.exact
    lengths = {length for _, length in module.shapes}
    assert len(lengths) > 3 and max(lengths) <= 3 + EAGER.longest
    assert module.shapes[:3] == [(2, 8), (1, 6), (1, 5)]  # rows of one length share a call


def test_invalid_logits():
    model, rows = small(2), [[1, 2, 3], [4, 9], [5, 6, 7]]
    module = Module(model, broken=9)
    # token 9 stands in the second prompt only, and is kept out of all answers
    with pytest.raises(unmask.InvalidLogits, match="row 1, step 0, position 3: .*on_invalid='skip'"):
        run(module, rows, EAGER, suppress=[9])
    skipped, want = run(module, rows, EAGER, suppress=[9], on_invalid="skip"), run(model, rows, EAGER, suppress=[9])
    assert skipped[1].finish_reason == "invalid" and skipped[1].nfe == 1 and skipped[1].canvas == [4, 9] + [MASK] * EAGER.initial
    assert [(r["committed"], r["inserted"], r["length"]) for r in skipped[1].trace] == [([], [], EAGER.initial)]
    assert [skipped[i].canvas for i in (0, 2)] == [want[i].canvas for i in (0, 2)] and skipped[0].finish_reason == "length"
    # a row that turns invalid on the way ends there, as it was
    late = next(t for record in want[0].trace for _, t, _ in record["committed"] if t not in rows[0])
    some = run(Module(model, broken=late), [rows[0], rows[2]], EAGER, suppress=[9], on_invalid="skip")
    ended = [r for r in some if r.finish_reason == "invalid"]
    assert ended and all(late in r.canvas and r.nfe > 1 for r in ended)
    assert all(not r.trace[-1]["committed"] and not r.trace[-1]["inserted"] and r.trace[-1]["length"] == r.trace[-2]["length"] for r in ended)


def test_the_answer_is_cut_at_its_end():
    reasons = set()
    for seed, row in itertools.product(range(4), prompts(3, 11, seed=4)):
        whole, cut = run(small(seed), row, EAGER), run(small(seed), row, EAGER, eos_stop=True)
        answer = whole.canvas[len(row) :]
        assert whole.finish_reason == "length" and whole.ids == answer and cut.nfe == whole.nfe
        ids = answer[: answer.index(EOS)] if EOS in answer else answer
        assert cut.ids == ids and cut.canvas == row + ids + [EOS] * (len(answer) - len(ids))
        assert cut.tokens_per_forward == whole.tokens_per_forward == len(ids) / cut.nfe
        assert cut.finish_reason == ("eos" if EOS in answer else "length")
        reasons.add(cut.finish_reason)
    assert reasons == {"eos", "length"}


def test_empty_answers_and_batches():
    assert unmask.generate(small(), [], schedule="daedal", max_new_tokens=4) == []
    done = unmask.generate(small(), [[1, 2]], schedule="daedal", max_new_tokens=0)[0]
    assert done.canvas == [1, 2] and done.nfe == 0 and done.finish_reason == "length"
    one = run(small(), [1], Constants(**{**vars(EAGER), "longest": 1, "initial": 1}))
    assert len(one.canvas) == 2 and one.nfe == 2


def test_events():
    model, rows = small(2), prompts(3, 11, seed=3)
    events = list(unmask.stream(model, rows, **arguments(EAGER), eos_stop=False))
    results = events[-1].result
    assert [r.canvas for r in results] == [r.canvas for r in run(model, rows, EAGER)]
    assert sum(e.kind == "step" for e in events) == max(r.nfe for r in results)
    for i, r in enumerate(results):
        mine = [e for e in events if e.kind == "commit" and e.row == i]
        assert [e.nfe for e in mine] == list(range(1, r.nfe + 1)) and mine[-1].canvas == r.canvas and mine[-1].masks_left == 0
        assert [e.block for e in mine] == sorted(e.block for e in mine)


@given(st.data())
def test_arithmetic_of_growth(data):
    """Each function on the device against its plain meaning."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    cu = torch.tensor([0, *sizes]).cumsum(0)
    n = int(cu[-1])
    entry = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    pos = torch.cat([torch.arange(s) + 2 for s in sizes])
    p = torch.tensor(data.draw(st.lists(st.sampled_from([0.125, 0.25, 0.5, 1.0]), min_size=n, max_size=n)), dtype=torch.float64)
    flags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    window = data.draw(st.integers(1, 10))
    got = eos_confidence(flags, p, entry, cu, window)
    places = lowest(p, flags, entry, pos, len(sizes), 99)
    for e in range(len(sizes)):
        mine = [(float(p[i]), int(pos[i])) for i in range(int(cu[e]), int(cu[e + 1])) if flags[i]]
        assert float(got[e]) == sum(x for x, _ in mine[::-1][:window]) / window
        assert int(places[e]) == (min(mine)[1] if mine else 99)
    length, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    at = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=1, max_size=3)))
    for i, row in zip(at.tolist(), insertion_source(at, count, length).tolist(), strict=True):
        old = list(range(length))
        assert row == (old if i >= length else (old[:i] + [i] * count + old[i + 1 :])[:length])
    masked = torch.tensor([[False, True, True], [False, False, False]])
    assert first_masked(masked).tolist() == [1, 3]


BAD = [
    (dict(expansion=1), "expansion must be an integer in 2"),
    (dict(expansion=2.5), "expansion must be an integer"),
    (dict(initial_tokens=0), "initial_tokens must be an integer in 1"),
    (dict(initial_tokens=33), "initial_tokens must be at most max_new_tokens, 32 here, got 33"),
    (dict(eos_window=0), "eos_window must be an integer in 1"),
    (dict(high_threshold=1.5), r"high_threshold must be a number in \[0, 1\], got 1.5"),
    (dict(low_threshold=-0.1), r"low_threshold must be a number in \[0, 1\]"),
    (dict(eos_threshold=math.nan), "eos_threshold must be a number"),
    (dict(expand_threshold="high"), "expand_threshold must be a number"),
    (dict(expand_treshold=0.5), "unknown setting 'expand_treshold'; did you mean 'expand_threshold'"),
    (dict(policy="quota"), "brings its own commit rule, got policy='quota'"),
    (dict(threshold=0.9), "takes no setting of policies, got threshold; its own settings: initial_tokens, high_threshold"),
    (dict(steps=4), "takes no setting of policies, got steps"),
    (dict(score="margin"), "orders positions by confidence, got score='margin'"),
    (dict(cache="dual"), "needs cache='none', got cache='dual'"),
    (dict(top_p=0.9), "does not take top_p"),
    (dict(repetition_penalty=1.2), "does not take repetition_penalty"),
    (dict(logits_eos_inf=True), "does not take logits_eos_inf: it reads the answer's length"),
    (dict(suppress=[EOS]), r"suppress must not hold end ids, got \[11\]"),
    (dict(eos_stop="block"), "decodes every row to its end"),
    (dict(trace="predictions"), "trace must be True or False"),
    (dict(delimiters=[1]), "delimiters is for schedule='adablock', got schedule='daedal'"),
    (dict(max_new_tokens=300), "the model takes at most 256"),
]


@pytest.mark.parametrize("more, text", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_settings(more, text):
    with pytest.raises(unmask.SettingError, match=text):
        unmask.generate(small(), [1, 2], **{"schedule": "daedal", "max_new_tokens": 32, **more})


def test_settings_belong_to_the_schedule():
    for name, value in (("initial_tokens", 8), ("high_threshold", 0.5), ("eos_window", 4)):
        with pytest.raises(unmask.SettingError, match=f"{name} is for schedule='daedal', got schedule='fixed'"):
            unmask.generate(small(), [1], **{name: value})
    with pytest.raises(unmask.SettingError, match="low_threshold is for policy='hierarchy'"):
        unmask.generate(small(), [1], low_threshold=0.2)
    assert unmask.generate(small(), [1], max_new_tokens=4, policy="hierarchy", low_threshold=0.2).settings["low_threshold"] == 0.2
    with pytest.raises(unmask.SettingError, match="needs max_new_tokens"):
        unmask.generate(small(), [1], schedule="daedal")
    with pytest.raises(unmask.SettingError, match="use generate"):
        unmask.infill(small(), [1, None], schedule="daedal")
    with pytest.raises(unmask.SettingError, match="needs an end-of-sequence id"):
        unmask.generate(make(eos_ids=()), [1], schedule="daedal", max_new_tokens=8)
    found = unmask.generate(small(), [1], schedule="daedal", max_new_tokens=16).settings
    assert found["initial_tokens"] == 16 and found["expansion"] == 8 and found["eos_window"] == 32 and "threshold" not in found
    assert (found["high_threshold"], found["low_threshold"], found["eos_threshold"], found["expand_threshold"]) == (0.9, 0.1, 0.5, 0.9)
    assert unmask.generate(small(), [1], schedule="daedal", max_new_tokens=100).settings["initial_tokens"] == 64


TASKS = [
    ("sort d a c b =>", "a b c d"),
    ("reverse a b c d =>", "d c b a"),
    ("sort d a c =>", "a c d"),
    ("reverse x y z w v u =>", "u v w z y x"),
]


@pytest.mark.parametrize("initial", [1, 2, 4])
def test_the_embedded_model_finds_its_length(initial):
    model = unmask.load("tiny")
    # answers of up to six tokens from one to four masks; four end tokens in sight are enough for a model that writes that little
    sizes = dict(schedule="daedal", max_new_tokens=48, initial_tokens=initial, expansion=4, eos_window=4, block_size=8)
    results = unmask.generate(model, [q for q, _ in TASKS], trace=True, **sizes)
    assert [r.text.strip() for r in results] == [a for _, a in TASKS]
    assert all(r.finish_reason == "eos" and len(r.canvas) - len(r.prompt_ids) < 24 for r in results)
    assert any(r.trace[0]["inserted"] for r in results)
    stopped = unmask.generate(model, TASKS[0][0], stop="b", **sizes)
    assert stopped.finish_reason == "stop" and stopped.text.strip() == "a"
