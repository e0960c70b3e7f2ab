"""What every decoding rule keeps (algorithms.md, 13), one test over all of them: batched and alone, ragged prompts, given tokens inside blocks."""

from __future__ import annotations

import functools
import types

import pytest
import torch

import unmask
from random_models import make
from unmask.decode.osdt import Table
from unmask.decode.table import RULES

MASK, VOCAB = 60, 61
FREQUENCIES = torch.arange(1, VOCAB + 1).double() / 1891.0


def order_logits(step):
    return torch.sin(step.pos.double() * 1.7) * 2.0


CASES: dict[str, list[dict]] = {
    "quota": [dict(), dict(steps=7), dict(score="random"), dict(score="leftmost", steps=9), dict(score="entropy", position_bias=0.1)],
    "threshold": [
        dict(threshold=0.4), dict(threshold=0.4, variant="dinfer"), dict(threshold=-1.5, score="entropy"), dict(threshold=0.5, score="random"),
        dict(threshold=0.9, minimum=2), dict(threshold=0.3, certainty_sigma=3.0), dict(threshold=0.3, position_bias=0.02),
        dict(threshold=0.4, top_p=0.8, top_k=6),
    ],
    "factor": [dict(factor=1.0), dict(factor_off_by_one=True), dict(variant="d2cache", factor=0.8)],
    "eb": [dict(gamma=1.0), dict(gamma=2.0, score="confidence"), dict(gamma=2.0, variant="d2cache")],
    "pc": [dict(frequencies=FREQUENCIES), dict(frequencies=FREQUENCIES, steps=8, decay=0.0)],
    "dus": [dict(), dict(base=3, merge_last=True), dict(skip_below=0.4)],
    "klass": [dict(threshold=0.4, kl_threshold=0.05), dict(threshold=0.3, kl_threshold=0.5, history=1), dict(threshold=0.4, variant="d2cache", kl_threshold=0.05), dict(threshold=0.3, kl_threshold=0.5, top_p=0.9)],
    "slowfast": [dict(threshold=0.5, explore_steps=2), dict(threshold=0.3, explore_threshold=0.2, explore_steps=3, window=3)],
    "sdar_static": [dict(), dict(score="leftmost", steps=6)],
    "sdar_dynamic": [dict(threshold=0.4, steps=6), dict(threshold=0.5)],
    "llada2": [dict(threshold=0.4), dict(threshold=0.9, minimum=2)],
    "sprint": [dict(threshold=0.5, steps=6), dict(threshold=0.9), dict(threshold=0.5, steps=6, score="margin")],
    "edit": [dict(threshold=0.3, edit_threshold=0.3), dict(threshold=0.5, edit_threshold=0.2, max_post_steps=3)],
    "hierarchy": [dict(threshold=0.6, low_threshold=0.3), dict(threshold=0.9)],
    "credit": [dict(threshold=0.5), dict(threshold=0.4, credit_alpha=2.0)],
    "osdt": [dict(table=Table(((0.5,), (0.3, 0.7)))), dict(table=Table(((0.9,),)), cap=0.4, slack=0.1)],
    "dream": [dict(alg=a) for a in ("origin", "maskgit_plus", "topk_margin", "entropy")] + [dict(steps=4, alg_temp=0.3)],
    "plackett_luce": [dict(order_logits=order_logits), dict(order_logits=order_logits, steps=6, sample=False)],
    "wino": [dict(wide_in=0.3, narrow_out=0.5), dict(wide_in=0.2, narrow_out=0.9), dict(variant="d2cache", wide_in=0.3, narrow_out=0.3), dict(wide_in=0.3, narrow_out=0.5, top_k=5)],
    "remdm": [dict(strategy=s, eta=0.2) for s in ("cap", "rescale", "conf", "loop")],
    "remask": [dict(k=2, loop_steps=3, start_ratio=0.5), dict(k=9, loop_steps=2)],
}  # fmt: skip
ALL = [pytest.param(name, knobs, id=f"{name}-{i}") for name, cases in CASES.items() for i, knobs in enumerate(cases)]

CANVASES = [
    [1, 2, 3, *[None] * 17],
    [None, 5, None, None, 7, 8, None, 9, None, None, 60, None],  # a literal mask token that is given
    [*range(10, 19), *[None] * 4, 20, None, None, 21, *[None] * 6],
    [4, 4, 4],
]
SEEDS = [11, 22, 33, 44]
BLOCK = 7


def test_every_rule_has_a_case():
    assert set(CASES) == set(RULES)


@functools.cache
def model(shifted: bool = False):
    return make(seed=5, shifted=shifted, qkv_bias=shifted)


class Module(torch.nn.Module):
    """A module of somebody: rows of one length in, logits out."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]
        self.config = types.SimpleNamespace(mask_token_id=MASK, vocab_size=VOCAB, shifted=False)

    def forward(self, ids):
        return self.inner[0].logits(ids)


def keeps_progress(name, knobs) -> bool:
    """Whether each forward of a block with masks left commits something."""
    if name == "dus":
        return "skip_below" not in knobs
    return name not in ("dream", "remdm", "remask")


def loses_positions(name, knobs) -> bool:
    return name == "wino" and knobs.get("variant") == "d2cache"


def same(a, b) -> None:
    strip = lambda r: [{k: v for k, v in x.items() if k not in ("row", "ms")} for x in r.trace]  # noqa: E731
    assert a.canvas == b.canvas and a.nfe == b.nfe and a.ids == b.ids and strip(a) == strip(b) and a.log_prob == b.log_prob


def replay(canvas, result) -> list[int]:
    """The canvas after every delta of the trace, each checked against what stood there."""
    now, given = [MASK if t is None else t for t in canvas], [t is not None for t in canvas]
    masked = [t is None for t in canvas]
    for record in result.trace:
        spots = [p for p, *_ in (*record["committed"], *record["edited"], *record["remasked"])]
        assert len(spots) == len(set(spots)) and not any(given[p] for p in spots)
        for p, t, _ in record["committed"]:
            assert masked[p] and t != MASK
            now[p], masked[p] = t, False
        for p, old, new, _ in record["edited"]:
            assert not masked[p] and now[p] == old != new != MASK
            now[p] = new
        for p, old in record["remasked"]:
            assert not masked[p] and now[p] == old
            now[p], masked[p] = MASK, True
        scores = [s for *_, s in record["committed"]]
        order = [(-s, p) for p, _, s in record["committed"]]
        assert order == sorted(order) and all(s == s for s in scores)
    return now


def check(name, knobs, canvases, results) -> None:
    for canvas, r in zip(canvases, results, strict=True):
        assert all(t is None or t == got for t, got in zip(canvas, r.canvas, strict=True))  # given tokens
        masks = canvas.count(None)
        assert replay(canvas, r) == r.canvas and r.finish_reason == "length"
        assert r.nfe == len(r.trace) and [x["nfe"] for x in r.trace] == list(range(1, r.nfe + 1))
        if not loses_positions(name, knobs):
            assert all(got != MASK for t, got in zip(canvas, r.canvas, strict=True) if t is None) and len(r.ids) == masks
        left = masks
        for x in r.trace:
            if left and keeps_progress(name, knobs) and not (name == "edit" and not _open(x, r)):
                assert x["committed"], x
            left += len(x["remasked"]) - len(x["committed"])
        blocks, region = len({x["block"] for x in r.trace}), len(canvas)
        bounds = dict(edit=masks + 16 * blocks, wino=5 * region, remdm=2 * masks, remask=masks + 2 * 3 * blocks)
        bounds |= dict(dream=knobs["steps"] * blocks) if "steps" in knobs else {}
        bound = bounds.get(name, masks)
        assert r.nfe <= bound and (r.nfe > 0) == (masks > 0)


def _open(record, result) -> bool:
    """Whether the record's block held masks when its forward began."""
    before = [x for x in result.trace if x["block"] == record["block"] and x["nfe"] < record["nfe"]]
    return not before or before[-1]["masks_left"] > 0


@pytest.mark.parametrize("name, knobs", ALL)
def test_rule(name, knobs):
    """Greedy and sampled: rows alone are rows in the batch; given tokens stay; the trace replays; runs end."""
    for more in (dict(), dict(temperature=0.8)):
        if more and name == "credit":
            continue
        settings = dict(policy=name, block_size=BLOCK, trace=True, **knobs, **more)
        batch = unmask.infill(model(), CANVASES, seeds=SEEDS, **settings)
        check(name, knobs, CANVASES, batch)
        for canvas, seed, got in zip(CANVASES, SEEDS, batch, strict=True):
            same(unmask.infill(model(), [canvas], seeds=[seed], **settings)[0], got)
        swapped = unmask.infill(model(), [CANVASES[2], CANVASES[1]], seeds=[33, 22], **settings)
        same(swapped[0], batch[2])
        same(swapped[1], batch[1])


@pytest.mark.parametrize("name, knobs", ALL)
def test_rule_with_a_shifted_model_caches_and_adaptive_blocks(name, knobs):
    spec, knobs = RULES[name], {k: v for k, v in knobs.items() if k != "steps"}
    shifts = [False, True] if name != "wino" or loses_positions(name, knobs) else [False]
    caches = ["none"] if "no cache" in spec.needs else ["none", "prefix", "dual"]
    for shifted in shifts:
        for cache in caches:
            for schedule in (dict(), dict(schedule="adablock", delimiters=list(range(20)), delimiter_threshold=0.2, delimiter_window=0.5)):
                settings = dict(policy=name, block_size=BLOCK, trace=True, cache=cache, **schedule, **knobs)
                batch = unmask.infill(model(shifted), CANVASES, seeds=SEEDS, **settings)
                check(name, knobs, CANVASES, batch)
                for canvas, seed, got in zip(CANVASES[:3], SEEDS, batch, strict=False):
                    if schedule or shifted:
                        same(unmask.infill(model(shifted), [canvas], seeds=[seed], **settings)[0], got)


@pytest.mark.parametrize("name, knobs", [p for p in ALL if "model" not in RULES[p.values[0]].needs])
def test_rule_with_any_module(name, knobs):
    """Rows of one length; the same tokens as the model itself gives, whose logits the module returns."""
    length = 16
    canvases = [(c + [None] * length)[:length] for c in CANVASES]
    settings = dict(policy=name, block_size=BLOCK, trace=True, seeds=SEEDS, **knobs)
    got = unmask.infill(Module(model()), canvases, **settings)
    check(name, knobs, canvases, got)
    for a, b in zip(got, unmask.infill(model(), canvases, **settings), strict=True):
        assert a.canvas == b.canvas and a.nfe == b.nfe


@pytest.mark.parametrize("name, knobs", [p for p in ALL if "no guidance" not in RULES[p.values[0]].needs])
def test_rule_with_guidance(name, knobs):
    for more in (dict(cfg_scale=0.7), dict(cfg_scale=0.7, negative_prompt=[9, 8]), dict(cfg_scale=0.5, schedule="adablock", delimiters=list(range(20)))):
        knobs = {k: v for k, v in knobs.items() if k != "steps"}
        settings = dict(policy=name, block_size=BLOCK, trace=True, **knobs, **more)
        batch = unmask.infill(model(), CANVASES[:3], seeds=SEEDS[:3], **settings)
        check(name, knobs, CANVASES[:3], batch)
        for canvas, seed, got in zip(CANVASES[:3], SEEDS[:3], batch, strict=True):
            same(unmask.infill(model(), [canvas], seeds=[seed], **settings)[0], got)


@pytest.mark.parametrize("name, knobs", [pytest.param(n, c[0], id=n) for n, c in CASES.items()])
def test_rule_with_everything_else(name, knobs):
    """Options that make a second reduction of a step: repetition penalty, predictions, suppressed ids, soft masks, dropped end tokens."""
    plain = dict(policy=name, block_size=BLOCK, trace=True, **knobs)
    fits = name not in ("credit", "dream", "plackett_luce") and knobs.get("score") is None and RULES[name].scores[0] in ("confidence", "pc")
    more = [dict(repetition_penalty=1.7, suppress=[3, 4]), dict(soft_masks=unmask.SoftMasks(k=3)), dict(trace="predictions")]
    more += [dict(confidence_eos_eot_inf=True, schedule="adablock", delimiters=list(range(20)), delimiter_window=0.5)] if fits else []
    for options in more:
        settings = plain | options
        settings = {k: v for k, v in settings.items() if k != "steps" or "schedule" not in options}
        batch = unmask.infill(model(), CANVASES[:3], seeds=SEEDS[:3], **settings)
        for canvas, seed, got in zip(CANVASES[:3], SEEDS[:3], batch, strict=True):
            same(unmask.infill(model(), [canvas], seeds=[seed], **settings)[0], got)
            assert replay(canvas, got) == got.canvas
            assert 3 not in got.ids or "suppress" not in options
        if options.get("trace") == "predictions":
            base = unmask.infill(model(), CANVASES[:3], seeds=SEEDS[:3], **plain)
            assert [r.canvas for r in base] == [r.canvas for r in batch]  # looking changes nothing
            for canvas, r in zip(CANVASES[:3], batch, strict=True):
                assert all(t is not None or f != MASK for x in r.trace for t, f in zip(canvas, x["filled"], strict=True))


def test_adaptive_blocks_step_over_given_stretches():
    """A block of given tokens alone takes no forward, however far the delimiter window looks; every forward commits."""
    canvas = [1, None, *range(2, 16), None, None, 3, None]
    settings = dict(schedule="adablock", delimiters=list(range(20)), delimiter_window=1.0, block_size=3, trace=True)
    for threshold in (0.0, 1.0):
        r = unmask.infill(model(), canvas, policy="quota", delimiter_threshold=threshold, **settings)
        assert r.nfe == 4 and all(len(x["committed"]) == 1 for x in r.trace)


@pytest.mark.parametrize("name", ["threshold", "remask", "edit", "remdm", "wino"])
def test_stop_strings_wait_where_tokens_may_still_change(name):
    """A rule that takes tokens back settles nothing before its block ends."""
    from unmask.decode.backend import NativeBackend
    from unmask.decode.engine import Engine
    from unmask.decode.policy import Policy
    from unmask.decode.schedule import FixedBlocks
    from unmask.decode.state import DecodeState

    state = DecodeState([[1, *[MASK] * 12]], [[True, *[False] * 12]], MASK, FixedBlocks(6), None, [3], torch.device("cpu"))
    calls = []

    def settled(row):
        calls.append(int(state.masked[0].sum()))

    policy = Policy(name)
    forwards = sum(1 for _ in Engine(state, NativeBackend(model(), state, MASK, extra_slots=6), policy, settled=settled).run())
    assert calls == [6, 0] if name != "threshold" else len(calls) == forwards > 2


def poisoned(marker: int = 10):
    """The model, but a row that begins with `marker` gets NaN at two of its positions, from its second forward on."""
    inner, seen = make(seed=5), [0]

    def hook(module, args, hidden):
        f = args[0]
        first = {int(r): int(t) for r, p, t in zip(f.row, f.pos, f.ids, strict=True) if p == 0 and r >= 0}
        bad = [r for r, t in first.items() if t == marker]
        seen[0] += bool(bad)
        for t, (r, p) in enumerate(zip(f.row.tolist(), f.pos.tolist(), strict=True)):
            if r in bad and seen[0] > 1 and p in (10, 20):
                hidden[t] = float("nan")
        return hidden

    inner.register_forward_hook(hook)
    return inner


EAGER = pytest.param("remdm", dict(strategy="cap", eta=1.0, steps=4), id="remdm that takes everything back")


@pytest.mark.parametrize("name, knobs", [*(pytest.param(n, c[0], id=n) for n, c in CASES.items()), EAGER])
def test_invalid_logits_end_their_row_only(name, knobs):
    settings = dict(policy=name, block_size=40, trace=True, **{k: v for k, v in knobs.items() if k != "steps" or not RULES[name].uses_steps})
    rows, seeds = [CANVASES[0], CANVASES[2], CANVASES[1]], [11, 33, 22]
    got = unmask.infill(poisoned(), rows, seeds=seeds, on_invalid="skip", **settings)
    clean = unmask.infill(model(), rows, seeds=seeds, **settings)
    assert got[1].finish_reason == "invalid" or clean[1].nfe == 1
    if got[1].finish_reason == "invalid":
        assert got[1].nfe == 2 and replay(rows[1], got[1]) == got[1].canvas
        assert not got[1].trace[1]["committed"] and not got[1].trace[1]["edited"] and not got[1].trace[1]["remasked"]
        with pytest.raises(unmask.InvalidLogits, match="row 1, step 1, position"):
            unmask.infill(poisoned(), rows, seeds=seeds, **settings)
    for a, b in ((got[0], clean[0]), (got[2], clean[2])):
        assert a.canvas == b.canvas and a.nfe == b.nfe and a.finish_reason == "length"


ONE_SHOT = dict(
    threshold=dict(threshold=0.0), factor=dict(factor=1e9), eb=dict(gamma=1e9), klass=dict(threshold=0.0, kl_threshold=1e9, history=1),
    llada2=dict(threshold=0.0), sdar_dynamic=dict(threshold=0.0), edit=dict(threshold=0.0, edit_threshold=1.5), hierarchy=dict(threshold=0.0),
    sprint=dict(threshold=0.0), credit=dict(threshold=0.0), osdt=dict(table=Table(((0.9,),)), cap=0.0), quota=dict(steps=3), sdar_static=dict(steps=3),
    pc=dict(frequencies=FREQUENCIES, steps=3), plackett_luce=dict(order_logits=order_logits, steps=3), dream=dict(steps=1), remdm=dict(steps=1),
)  # fmt: skip
ONE_PER_STEP = dict(
    threshold=dict(threshold=1.0), factor=dict(factor=1e-9), eb=dict(gamma=0.0, score="entropy"), klass=dict(threshold=1.0),
    llada2=dict(threshold=1.0), sdar_dynamic=dict(threshold=1.0), edit=dict(threshold=1.0, edit_threshold=1.5),
    sprint=dict(threshold=1.0), hierarchy=dict(threshold=1.0, low_threshold=1.0), osdt=dict(table=Table(((1.0,),)), cap=1.0), slowfast=dict(threshold=1.0),
    quota={}, sdar_static={}, pc=dict(frequencies=FREQUENCIES), plackett_luce=dict(order_logits=order_logits), wino=dict(wide_in=1.0),
)  # fmt: skip


@pytest.mark.parametrize("name", ONE_SHOT)
def test_extremes_commit_a_block_at_once(name):
    """17 positions in blocks of 7: one forward a block, KLASS one more (a first step has no predecessor)."""
    r = unmask.infill(model(), CANVASES[0], policy=name, block_size=BLOCK, trace=True, **ONE_SHOT[name])
    assert r.nfe == (6 if name == "klass" else 3)
    assert [len(x["committed"]) for x in r.trace] == ([1, 6, 1, 6, 1, 2] if name == "klass" else [7, 7, 3])


@pytest.mark.parametrize("name", ONE_PER_STEP)
def test_extremes_commit_one_position_a_step(name):
    for canvas in CANVASES[:3]:
        r = unmask.infill(model(), canvas, policy=name, block_size=BLOCK, trace=True, **ONE_PER_STEP[name])
        assert r.nfe == canvas.count(None) and all(len(x["committed"]) == 1 for x in r.trace)


def test_score_hooks():
    """A function that returns the confidence is the confidence; NaN ranks last and does not stall; what it may see is what the docs say."""
    base = unmask.infill(model(), CANVASES, policy="quota", block_size=BLOCK, trace=True)
    hooked = unmask.infill(model(), CANVASES, policy="quota", block_size=BLOCK, trace=True, score=lambda step: step.stats.confidence)
    for a, b in zip(base, hooked, strict=True):
        same(a, b)
    guided = unmask.infill(model(), CANVASES[0], policy="quota", block_size=40, trace=True, score=lambda step: -(step.pos - 9).abs().double())
    order = [p for x in guided.trace for p, *_ in x["committed"]]
    assert order == sorted(range(3, 20), key=lambda p: (abs(p - 9), p))
    nan = lambda step: torch.where(step.pos % 2 == 0, torch.nan, step.stats.confidence)  # noqa: E731
    for policy in ("quota", "threshold", "hierarchy", "plackett_luce"):
        knobs = dict(order_logits=nan) if policy == "plackett_luce" else dict(score=nan)
        r = unmask.infill(model(), CANVASES[0], policy=policy, block_size=40, trace=True, **knobs)
        assert MASK not in r.canvas
        if policy == "quota":
            assert [p % 2 for x in r.trace for p, *_ in x["committed"]] == [1] * 9 + [0] * 8
    for bad in (lambda step: step.stats.confidence[:1], lambda step: step.pos, lambda step: 1.0):
        with pytest.raises(unmask.SettingError, match="the score function must return float32 or float64"):
            unmask.infill(model(), CANVASES[0], policy="quota", score=bad)


@pytest.mark.parametrize("name, knobs", [pytest.param(n, c[0], id=n) for n, c in CASES.items()])
def test_eos_ends_a_row(name, knobs):
    """With half the vocabulary ending the text every row stops early, at a token that follows no undecided position, alone as in the batch."""
    ending = make(seed=5, eos_ids=tuple(range(30, 60)))
    settings = dict(policy=name, block_size=BLOCK, **{k: v for k, v in knobs.items() if k != "steps"})
    canvases = [CANVASES[0], CANVASES[2]]
    full, cut = (unmask.infill(ending, canvases, eos_stop=stop, seeds=[1, 2], **settings) for stop in (False, True))
    for canvas, a, b, seed in zip(canvases, full, cut, (1, 2), strict=True):
        holes = [i for i, t in enumerate(canvas) if t is None]
        first = next((k for k, i in enumerate(holes) if a.canvas[i] >= 30), None)
        assert first is not None and b.finish_reason == "eos" and b.nfe <= a.nfe
        assert [a.canvas[i] for i in holes[:first]] == b.ids
        assert all(t is None or t == got for t, got in zip(canvas, b.canvas, strict=True))
        assert unmask.infill(ending, canvas, eos_stop=True, seeds=[seed], **settings).canvas == b.canvas
