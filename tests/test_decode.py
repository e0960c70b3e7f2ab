"""The decoding loop: batches, caches, progress, given positions, invalid logits, counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from random_models import make, prompts
from unmask.decode.backend import NativeBackend, make_plan
from unmask.decode.schedule import FixedBlocks
from unmask.decode.state import DecodeState

POLICIES = [
    dict(policy="threshold", threshold=0.3),
    dict(policy="threshold", threshold=1.0),
    dict(policy="quota"),
    dict(policy="quota", steps=6),
    dict(policy="factor", factor=0.8),
    dict(policy="factor", factor=0.8, factor_off_by_one=True),
    dict(policy="threshold", score="margin", threshold=0.2),
    dict(policy="threshold", score="entropy", threshold=-1.0),
    dict(policy="quota", score="margin"),
    dict(policy="quota", score="entropy", steps=8),
    dict(policy="quota", score="random"),
    dict(policy="threshold", score="random", threshold=0.7),
    dict(policy="threshold", threshold=0.3, temperature=1.0),
    dict(policy="quota", score="random", temperature=0.7, steps=8),
    dict(policy="threshold", threshold=0.4, cfg_scale=0.7),
]
CACHES = ["none", "prefix", "dual"]
COMBINATIONS = [(p, c) for p, c in itertools.product(POLICIES, CACHES) if not (p.get("cfg_scale") and c != "none")]


@pytest.fixture(scope="module")
def model():
    return make()


def run(model, prompt, **settings):
    return unmask.generate(model, prompt, **{"max_new_tokens": 18, "block_size": 7, "eos_stop": False, **settings})


@pytest.mark.parametrize("policy, cache", COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_row_alone_is_row_in_a_ragged_batch(policy, cache, dtype):
    model = make(dtype=dtype)
    rows, seeds = prompts(4), [11, 22, 33, 44]
    batch = run(model, rows, cache=cache, seeds=seeds, **policy)
    for row, seed, got in zip(rows, seeds, batch, strict=True):
        alone = run(model, [row], cache=cache, seeds=[seed], **policy)[0]
        assert got.canvas == alone.canvas and got.nfe == alone.nfe
    other = run(model, [rows[2], rows[0]], cache=cache, seeds=[33, 11], **policy)
    assert [r.canvas for r in other] == [batch[2].canvas, batch[0].canvas]


def test_thread_count_does_not_change_a_bit(model, threads):
    results = []
    for n in (1, 2):
        threads(n)
        results.append([r.canvas for r in run(model, prompts(3), trace=True, policy="threshold", threshold=0.3, temperature=0.9)])
    assert results[0] == results[1]


@pytest.mark.parametrize("cache", CACHES)
def test_one_forward_per_step_for_the_whole_batch(model, cache):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        results = run(model, prompts(5), cache=cache, policy="threshold", threshold=0.25)
    finally:
        handle.remove()
    assert len(calls) == max(r.nfe for r in results)
    assert len({r.nfe for r in results}) > 1  # rows did advance on their own


@pytest.mark.parametrize("policy", POLICIES[:-1], ids=str)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_are_exact_with_one_layer(policy, cache):
    """Layer-0 K/V depend on a position's own token only, so every step of a cached run equals the uncached one."""
    model = make(n_layers=1, seed=3)
    exact, cached = (run(model, prompts(3, seed=5), cache=c, trace=True, seeds=[1, 2, 3], **policy) for c in ("none", cache))
    for a, b in zip(exact, cached, strict=True):
        assert a.canvas == b.canvas and a.nfe == b.nfe
        strip = lambda trace: [[(p, t) for p, t, _ in rec["committed"]] for rec in trace]  # noqa: E731
        assert strip(a.trace) == strip(b.trace)
        scores = [[s for rec in r.trace for _, _, s in rec["committed"]] for r in (a, b)]
        assert torch.allclose(torch.tensor(scores[0]), torch.tensor(scores[1]), atol=1e-5)
        assert a.exact and b.exact


def test_cached_runs_of_deeper_models_say_so(model):
    assert run(model, prompts(1)[0]).exact
    for cache in ("prefix", "dual"):
        result = run(model, prompts(1)[0], cache=cache)
        assert not result.exact and result.settings["exact"] is False


def test_dual_equals_prefix_when_the_block_is_everything(model):
    for row in prompts(3, seed=9):
        a, b = (run(model, row, cache=c, block_size=18, threshold=0.4) for c in ("prefix", "dual"))
        assert a.canvas == b.canvas and a.nfe == b.nfe


@pytest.mark.parametrize("policy, cache", COMBINATIONS, ids=str)
def test_at_least_one_commit_per_step_and_given_positions_stay(model, policy, cache):
    if policy.get("steps", 0) > 18:
        return
    rows = prompts(3, seed=2)
    for row, result in zip(rows, run(model, rows, cache=cache, trace=True, **policy), strict=True):
        assert result.canvas[: len(row)] == row and result.prompt_ids == row
        assert [record["nfe"] for record in result.trace] == list(range(1, result.nfe + 1)) and all(record["committed"] for record in result.trace)
        committed = [p for record in result.trace for p, _, _ in record["committed"]]
        assert sorted(committed) == list(range(len(row), len(row) + 18))  # each position once
        assert model.config.mask_id not in result.canvas[len(row) :]
        assert result.ids == result.canvas[len(row) :] and result.finish_reason == "length"
        assert [r["masks_left"] for r in result.trace][-1] == 0


@given(st.data())
def test_random_settings_keep_the_promises(data):
    model = _cached_model()
    policy = data.draw(st.sampled_from(POLICIES))
    cache = "none" if policy.get("cfg_scale") else data.draw(st.sampled_from(CACHES))
    n, block = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    policy = {k: v for k, v in policy.items() if k != "steps"}
    rows = data.draw(st.lists(st.lists(st.integers(0, 60), max_size=6), min_size=1, max_size=3))
    results = unmask.generate(model, rows, max_new_tokens=n, block_size=block, cache=cache, eos_stop=False, **policy)
    for row, result in zip(rows, results, strict=True):
        assert result.canvas[: len(row)] == row  # a literal mask id in a prompt is just a token
        assert len(result.canvas) == len(row) + n and 60 not in result.canvas[len(row) :]
        assert (1 if n else 0) <= result.nfe + (n == 0) and result.nfe <= n


_MODELS = {}


def _cached_model():
    return _MODELS.setdefault("base", make(seed=8))


def test_a_model_that_predicts_the_mask_everywhere_still_ends():
    model = make()
    head = model.head.tiles[0]
    weight = torch.zeros(61, 32)
    weight[60] = 100.0  # the mask id wins wherever the hidden state sums to something positive
    model.head.tiles[0] = type(head)(weight, head.format)
    for policy in POLICIES[:6]:
        result = run(model, [1, 2, 3], **policy)
        assert 60 not in result.canvas[3:] and result.nfe <= 18


def test_zero_new_tokens_and_empty_batches(model):
    result = unmask.generate(model, [1, 2, 3], max_new_tokens=0)
    assert result.ids == [] and result.canvas == [1, 2, 3] and result.nfe == 0 and result.tokens_per_forward == 0.0
    assert unmask.generate(model, []) == []
    assert [r.canvas[:2] for r in unmask.generate(model, [[], [5]], max_new_tokens=2, block_size=1)][1][0] == 5
    both = unmask.generate(model, [[7, 7], []], max_new_tokens=0)
    assert [r.canvas for r in both] == [[7, 7], []]


def test_infill_keeps_what_is_given(model):
    canvas = [4, None, None, 9, 60, None, 3, None]
    result = unmask.infill(model, canvas, block_size=3, threshold=0.4)
    for before, after in zip(canvas, result.canvas, strict=True):
        assert after == before if before is not None else after != 60
    assert result.ids == [result.canvas[i] for i in (1, 2, 5, 7)]
    batch = unmask.infill(model, [canvas, [None, 1], [2, 3]], block_size=3, threshold=0.4)
    assert batch[0].canvas == result.canvas and batch[2].canvas == [2, 3] and batch[2].nfe == 0
    for bad, text in (("abc", "a template as text needs a tokenizer"), (7, "canvas must be"), ([1, "x"], "must be an integer"), ([1, 99], r"must be in 0\.\.60")):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.infill(model, bad)
    with pytest.raises(unmask.SettingError, match="unknown setting 'max_new_tokens'"):
        unmask.infill(model, canvas, max_new_tokens=4)


def poisoned(model, row_marker=7):
    """The model, but any row whose first token is `row_marker` gets NaN hidden states."""

    def hook(module, args, hidden):
        f = args[0]
        first = {int(r): int(t) for r, p, t in zip(f.row, f.pos, f.ids, strict=True) if p == 0 and r >= 0}
        for t, r in enumerate(f.row.tolist()):
            if r >= 0 and first.get(r) == row_marker:
                hidden[t] = float("nan")
        return hidden

    return model.register_forward_hook(hook)


def test_invalid_logits():
    model = make()
    clean = run(model, [[1, 2], [3, 4]], threshold=0.3)
    handle = poisoned(model)
    try:
        with pytest.raises(unmask.InvalidLogits, match=r"row 1, step 0, position 2: a NaN in the logits"):
            run(model, [[1, 2], [7, 4], [3, 4]], threshold=0.3)
        results = run(model, [[1, 2], [7, 4], [3, 4]], threshold=0.3, on_invalid="skip")
    finally:
        handle.remove()
    assert [r.finish_reason for r in results] == ["length", "invalid", "length"]
    assert results[1].ids == [] and results[1].nfe == 1
    assert [results[0].canvas, results[2].canvas] == [r.canvas for r in clean]  # bit for bit as without the bad row


def test_eos_ends_a_row_once_everything_before_it_is_decided():
    model = make(seed=4, eos_ids=tuple(range(30, 60)))  # half the vocabulary ends the text
    for row in prompts(4, seed=1):
        full = run(model, row, threshold=0.35)
        short = run(model, row, threshold=0.35, eos_stop=True)
        made = full.canvas[len(row) :]
        first = next((i for i, t in enumerate(made) if t >= 30), None)
        assert first is not None
        assert short.finish_reason == "eos" and short.ids == made[:first] and short.nfe <= full.nfe
        assert short.tokens_per_forward == pytest.approx(first / short.nfe)
        assert full.tokens_per_forward == pytest.approx(first / full.nfe)  # tokens behind the first EOS never count
        assert len(short.canvas) == len(full.canvas) and set(short.canvas[len(row) + first :]) == {made[first]}


def test_quota_spreads_steps(model):
    result = run(model, [1], policy="quota", steps=7, trace=True)  # 18 positions in blocks of 7, 7, 4 with 3, 2, 2 steps
    assert [len(r["committed"]) for r in result.trace] == [3, 2, 2, 4, 3, 2, 2] and result.nfe == 7
    assert run(model, [1], policy="quota").nfe == 18
    assert run(model, [1], policy="quota", steps=500).nfe == 18  # a surplus of steps is not run
    with pytest.raises(unmask.SettingError, match="steps must be at least the number of blocks, 3 here"):
        run(model, [1], policy="quota", steps=2)


def test_threshold_extremes(model):
    assert run(model, [1, 2], threshold=0.0).nfe == 3  # a forward per block
    assert run(model, [1, 2], threshold=1.0).nfe == 18


def test_seeds(model):
    settings = dict(policy="quota", temperature=1.5)
    a, b = run(model, [1, 2, 3], seed=1, **settings), run(model, [1, 2, 3], seed=1, **settings)
    c = run(model, [1, 2, 3], seed=2, **settings)
    assert a.canvas == b.canvas != c.canvas
    two = run(model, [[1, 2, 3], [1, 2, 3]], seed=1, **settings)
    assert two[0].canvas == a.canvas != two[1].canvas
    assert run(model, [[1, 2, 3]] * 2, seeds=[5, 5], **settings)[1].canvas == run(model, [[1, 2, 3]], seeds=[5], **settings)[0].canvas


def test_stream_is_generate(model):
    settings = dict(max_new_tokens=10, block_size=4, threshold=0.3, eos_stop=False)
    events = list(unmask.stream(model, [[1], [2, 3]], **settings))
    assert [e.kind for e in events].count("done") == 1 and events[-1].kind == "done"
    results = events[-1].result
    assert [r.canvas for r in results] == [r.canvas for r in unmask.generate(model, [[1], [2, 3]], **settings)]
    assert sum(e.kind == "step" for e in events) == max(r.nfe for r in results)
    canvases = {0: [1] + [60] * 10, 1: [2, 3] + [60] * 10}
    for e in events:
        if e.kind == "commit":
            for p, t in zip(e.positions, e.ids, strict=True):
                assert canvases[e.row][p] == 60
                canvases[e.row][p] = t
            assert canvases[e.row] == e.canvas and e.scores == sorted(e.scores, reverse=True)
    assert list(canvases.values()) == [r.canvas for r in results]


def test_peak_of_a_step_holds_no_vocabulary_tensor():
    """No [rows, vocab] float tensor on the fused path: the largest tensor made in a step is far below it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and not t.is_mkldnn:
                    sizes.append(t.numel())
            return out

    model = make(vocab_size=40000, mask_id=39999, eos_ids=(39998,), pad_id=None)
    with Watch():
        unmask.generate(model, [1, 2, 3], max_new_tokens=16, block_size=16, cache="dual", eos_stop=False)
    assert max(sizes) <= 16 * 8192 < 16 * 40000


@pytest.mark.parametrize("runs", [None, (((0, 2), (4, 7)), ((3, 6),))], ids=["windows", "runs"])
def test_what_a_plan_knows_on_the_host(runs):
    state = DecodeState([[1, 2] + [60] * 6, [3] + [60] * 7], [[True] * 2 + [False] * 6, [True] + [False] * 7], 60, FixedBlocks(4), None, [0, 1], torch.device("cpu"))
    plan = make_plan(state, ((0, 0, 7, 2, 6), (1, 3, 6, 3, 6)), runs=runs)
    assert plan.bounds == plan.cu.tolist() == [0, 4, 7]
    assert [0, *itertools.accumulate(plan.sizes)] == plan.cu_q.tolist()
    assert plan.token_pos[plan.cand_query].tolist() == [p if p in plan.token_pos[: plan.sizes[0]].tolist() else 0 for p in range(2, 6)] + [3, 4, 5]


def test_slots_are_added_before_the_first_forward(model):
    state = DecodeState([[1, 60, 60]], [[True, False, False]], 60, FixedBlocks(2), None, [0], torch.device("cpu"))
    backend = NativeBackend(model, state, 60, extra_slots=2)
    assert backend.add_slots(4) == 5 and (backend.cache.rows, backend.cache.slots) == (1, 9)
    backend.store(0, 0, 3)
    with pytest.raises(AssertionError, match="a forward has written"):
        backend.add_slots(1)
