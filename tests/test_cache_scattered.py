"""dKV-Cache, EntropyCache, SPRINT: exact where they say so; the published loops over a plain float64 model whose K and V are as old as theirs
(tests/stale_model.py); what is forwarded; batches; what is refused."""

from __future__ import annotations

import functools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import stale_model
import unmask
from family_kit import Family, build_from
from models_kit import load
from random_models import make, prompts
from unmask import caches
from unmask.caches import DKV, Entropy, Sprint
from unmask.decode.backend import NativeBackend
from unmask.errors import SettingError
from unmask.models import dream as dream_family
from unmask.models import llada as llada_family
from unmask.models import sdar as sdar_family
from unmask.tiny.tasks import TASKS, held_out_examples, is_right

LAYOUTS = {"llada": {}, "dream": dict(shifted=True, qkv_bias=True, n_kv_heads=2)}


@functools.cache
def random(layout: str, layers: int, seed: int):
    return make(seed=seed, n_layers=layers, **LAYOUTS[layout])


class Watch:
    """Notes what every forward takes: per step {row: (positions, keys)}."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.steps: list[dict[int, tuple[list[int], tuple | None]]] = []
        stats = NativeBackend.stats

        def noted(backend, plan, live, *args, **options):
            bounds, pos = plan.cu_q.tolist(), plan.token_pos.tolist()
            keys = plan.keys or [None] * len(plan.entries)
            self.steps.append({row: (pos[bounds[e] : bounds[e + 1]], keys[e]) for e, (row, *_) in enumerate(plan.entries)})
            return stats(backend, plan, live, *args, **options)

        patch.setattr(NativeBackend, "stats", noted)

    def of(self, row: int) -> list[list[int]]:
        return [step[row][0] for step in self.steps if row in step]


def trace(result) -> list[tuple]:
    return [(r["block"], r["committed"], r["edited"]) for r in result.trace]


def same(a, b) -> bool:
    return [(x.canvas, x.nfe, trace(x)) for x in a] == [(x.canvas, x.nfe, trace(x)) for x in b]


@st.composite
def canvases(draw, rows: int = 3, longest: int = 10, new: int = 10):
    """Ragged prompts with a region behind them in which some tokens are given."""
    hole = st.sampled_from([None] * 5 + [7, 60])
    return [
        [*draw(st.lists(st.integers(0, 58), min_size=0, max_size=longest)), None, *draw(st.lists(hole, min_size=1, max_size=new))]
        for _ in range(draw(st.integers(1, rows)))
    ]


ANY_POLICY = [
    dict(threshold=0.4), dict(policy="quota"), dict(policy="eb", gamma=0.8), dict(threshold=0.3, temperature=0.7), dict(policy="sprint", threshold=0.6),
    dict(policy="edit", threshold=0.3, edit_threshold=0.3), dict(policy="klass", threshold=0.3, kl_threshold=0.1),
    dict(policy="klass", threshold=0.3, kl_threshold=0.1, variant="d2cache"), dict(policy="slowfast", threshold=0.5, explore_steps=2),
    dict(policy="dus", skip_below=0.4), dict(policy="quota", score="random"), dict(policy="dream"), dict(threshold=0.4, repetition_penalty=1.3),
    dict(threshold=0.4, soft_masks=unmask.SoftMasks()),
]  # fmt: skip
EXACT = [DKV(refresh_every=1), Entropy(threshold=-1.0), Entropy(threshold=-1.0, recent=0)]
EXACT_AT_ONE_LAYER = [
    DKV(), DKV(refresh_every=100), Entropy(threshold=math.inf), Entropy(recent=0, threshold=math.inf), Sprint(keep_ratio=1.0), Sprint(1.0, warmup_steps=3),
]  # fmt: skip


@given(st.data())
def test_exact_settings_give_what_no_cache_gives(data):
    layers = data.draw(st.integers(1, 3))
    model = random(data.draw(st.sampled_from(sorted(LAYOUTS))), layers, data.draw(st.integers(0, 5)))
    policy = data.draw(st.sampled_from(ANY_POLICY))
    rule = data.draw(st.sampled_from(EXACT + (EXACT_AT_ONE_LAYER if layers == 1 else [])))
    # d2Cache's windows on shifted models end one position early: a mask's K and V stay there, in one layer too
    assume(not (isinstance(rule, Sprint) and policy.get("variant") == "d2cache"))
    rows = data.draw(canvases())
    settings = dict(block_size=data.draw(st.integers(1, 9)), trace=True, seeds=[5 + i for i in range(len(rows))], **policy)
    if data.draw(st.booleans()):
        settings |= dict(schedule="adablock", delimiters=[3, 7, 11], delimiter_threshold=0.0)
    cached, plain = unmask.infill(model, rows, cache=rule, **settings), unmask.infill(model, rows, **settings)
    assert same(cached, plain) and all(r.exact for r in cached)
    if rule in EXACT:
        assert [r.rows_forwarded for r in cached] == [r.rows_forwarded for r in plain]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [dict(score="random"), dict(score="leftmost", steps=9), dict(score="random", position_bias=0.1, temperature=0.5)])
def test_greedy_is_exact_when_it_always_refreshes(layout, settings):
    model = random(layout, 3, 1)
    for rows in ([[1, 2, *[None] * 12], [*range(9), None, None, 3, *[None] * 5]], [[None] * 7]):
        shared = dict(policy="quota", block_size=5, trace=True, seeds=[3, 4][: len(rows)], **settings)
        cached, plain = unmask.infill(model, rows, cache=DKV(refresh_every=1, greedy=True), **shared), unmask.infill(model, rows, **shared)
        assert same(cached, plain) and cached[0].exact
        greedy = unmask.infill(model, rows, cache="dkv:greedy=true", **shared)
        order = [[[p for p, *_ in r["committed"]] for r in x.trace] for x in (greedy[0], plain[0])]
        assert [set(p) for p in order[0]] == [set(p) for p in order[1]], "the order does not depend on what the cache makes of the tokens"
        assert not greedy[0].exact and greedy[0].rows_forwarded < plain[0].rows_forwarded


def test_what_is_exact():
    one, three = random("llada", 1, 0).config, random("llada", 3, 0).config
    causal = make(visibility="block_causal", block_size=4, n_layers=3).config
    assert all(rule.exact(three) for rule in EXACT) and all(rule.exact(one) and not rule.exact(three) for rule in EXACT_AT_ONE_LAYER)
    assert DKV(refresh_every=1, greedy=True).exact(three) and not DKV(greedy=True).exact(one) and not Entropy().exact(three)
    assert Sprint(keep_ratio=1.0).exact(causal) and not Sprint(keep_ratio=0.99).exact(causal)


# --- the published loops -------------------------------------------------------------------------------------------------------------------------


FAMILIES = {
    "llada": (llada_family, dict(n_layers=2)), "dream": (dream_family, dict(num_hidden_layers=2)),
    "sdar": (sdar_family, dict(block_size=4, num_hidden_layers=2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(model, its weights in float64) of a family's random checkpoint."""

    @functools.cache
    def build(name: str):
        module, changes = FAMILIES[name]
        family = Family.golden(module, name, dict(mask_token_id=383) if name == "sdar" else None)
        folder = tmp_path_factory.mktemp(name)
        # probabilities far apart: fewer examples are dropped because two of them are nearly equal
        model = build_from(family.write(folder, family.random(changes, std=0.5), **changes))
        return model, stale_model.Weights(load(folder), model.config)

    return build


def against_the_loop(checked, name: str, rule, method, rows, size: int, policy: dict) -> None:
    """Tokens, order and positions forwarded of whole runs, for every row of a batch."""
    model, weights = checked(name)
    settings = policy | (dict(policy="quota") if "steps" in policy else {})
    want = [stale_model.decode(stale_model.Stale(weights), row, size, method(), policy, seed=11 + i) for i, row in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        got = unmask.infill(model, rows, cache=rule, block_size=size, trace=True, seeds=[11 + i for i in range(len(rows))], **settings)
    for i, (result, (ids, sets, commits)) in enumerate(zip(got, want, strict=True)):
        assert watch.of(i) == sets
        assert [sorted(p for p, *_ in r["committed"]) for r in result.trace] == commits
        assert result.canvas == ids
        assert result.rows_forwarded == sum(map(len, sets)) and result.nfe == len(sets)


@st.composite
def small_rows(draw, new: int = 11):
    hole = st.sampled_from([None] * 7 + [7])
    count = draw(st.sampled_from([1, 1, 2]))
    return [[*draw(st.lists(st.integers(0, 300), max_size=6)), None, *draw(st.lists(hole, min_size=2, max_size=new))] for _ in range(count)]


def steps_for(data, rows, size: int) -> int:
    blocks = max(math.ceil((len(r) - r.index(None)) / size) for r in rows)
    return data.draw(st.integers(blocks, 3 * blocks + 6), label="steps")


@given(st.data())
def test_dkv_is_the_authors_loop(checked, data):
    rows, size, every = data.draw(small_rows()), data.draw(st.integers(2, 12)), data.draw(st.integers(1, 6))
    policy = data.draw(st.sampled_from([dict(threshold=0.3), dict(threshold=0.15), None])) or dict(steps=steps_for(data, rows, size), score="confidence")
    against_the_loop(checked, data.draw(st.sampled_from(["llada", "dream"])), DKV(every), lambda: stale_model.DKV(every), rows, size, policy)


@given(st.data())
def test_dkv_greedy_is_the_authors_loop(checked, data):
    rows, size = data.draw(small_rows()), data.draw(st.integers(2, 12))
    every, window = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 5))
    policy = dict(steps=steps_for(data, rows, size), score="random")
    rule = DKV(every, greedy=True, window=window)
    against_the_loop(checked, data.draw(st.sampled_from(["llada", "dream"])), rule, lambda: stale_model.Greedy(every, window), rows, size, policy)


@given(st.data())
def test_entropy_cache_is_the_loop_of_its_abstract(checked, data):
    rows, size = data.draw(small_rows()), data.draw(st.integers(2, 12))
    threshold, recent = data.draw(st.sampled_from([-1.0, 0.5, 1.5, 2.5, math.inf])), data.draw(st.integers(0, 6))
    policy = data.draw(st.sampled_from([dict(threshold=0.3), dict(threshold=0.15)]))
    rule = Entropy(threshold, recent)
    against_the_loop(checked, data.draw(st.sampled_from(["llada", "dream"])), rule, lambda: stale_model.EntropyCache(threshold, recent), rows, size, policy)


@given(st.data())
def test_sprint_is_its_description(checked, data):
    name = data.draw(st.sampled_from(["llada", "dream", "sdar"]))
    rows = data.draw(small_rows())
    if name == "sdar":  # canvases end with an attention block
        rows = [[*r, *[None] * (-len(r) % 4)] for r in rows]
    size = 4 if name == "sdar" else data.draw(st.integers(2, 9))
    knobs = dict(
        keep_ratio=data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0])), alpha=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        warmup_steps=data.draw(st.integers(1, 3)), layer=data.draw(st.integers(-1, 1)),
    )  # fmt: skip
    policy = data.draw(st.sampled_from([dict(threshold=0.3), dict(threshold=0.15)]))
    against_the_loop(checked, name, Sprint(**knobs), lambda: stale_model.Sprint(**knobs), rows, size, policy)


# --- what is forwarded ---------------------------------------------------------------------------------------------------------------------------


APPROXIMATE = [
    (DKV(), dict(threshold=0.4)), (DKV(refresh_every=5), dict(policy="quota", steps=20)), (DKV(greedy=True), dict(policy="quota", score="random")),
    (DKV(greedy=True, window=0, refresh_every=6), dict(policy="quota", score="leftmost", steps=18)), (Entropy(3.5), dict(threshold=0.5)),
    (Entropy(threshold=3.3, recent=2), dict(policy="quota")), (Entropy(threshold=math.inf, recent=0), dict(threshold=0.3)),
    (Sprint(), dict(threshold=0.4)), (Sprint(keep_ratio=0.25, alpha=0.0, warmup_steps=2), dict(policy="sprint", steps=20)),
    (Sprint(keep_ratio=0.0), dict(policy="quota")),
]  # fmt: skip
IDS = [f"{rule}-{policy.get('policy', 'threshold')}" for rule, policy in APPROXIMATE]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule, policy", APPROXIMATE, ids=IDS)
def test_batches_and_costs(layout, rule, policy, monkeypatch):
    """Rows of unequal length and in different blocks get what each gets alone, and fewer positions are forwarded than without a cache."""
    model, rows, seeds = random(layout, 3, 4), prompts(4, seed=8, low=1), [3, 4, 5, 6]
    settings = dict(max_new_tokens=26, block_size=7, cache=rule, eos_stop=False, **policy)
    watch = Watch(monkeypatch)
    got = unmask.generate(model, rows, seeds=seeds, **settings)
    assert [r.rows_forwarded for r in got] == [sum(map(len, watch.of(i))) for i in range(4)]
    alone = [unmask.generate(model, row, seeds=[s], **settings) for row, s in zip(rows, seeds, strict=True)]
    assert [(a.canvas, a.nfe, a.rows_forwarded) for a in alone] == [(r.canvas, r.nfe, r.rows_forwarded) for r in got]
    for row, result in zip(rows, got, strict=True):
        assert not result.exact and result.rows_forwarded < result.nfe * (len(row) + 26)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule, policy", [a for a in APPROXIMATE if not isinstance(a[0], Sprint)], ids=[i for i in IDS if not i.startswith("sprint")])
def test_what_is_decided_is_forwarded_at_the_next_step(layout, rule, policy, monkeypatch):
    """So that what a cache holds of a token comes from a forward that saw it; and every step can predict something of its block."""
    model, rows = random(layout, 2, 2), prompts(3, seed=2, low=1)
    watch = Watch(monkeypatch)
    lag = int(model.config.shifted)
    for i, result in enumerate(unmask.generate(model, rows, max_new_tokens=21, block_size=6, cache=rule, trace=True, eos_stop=False, **policy)):
        sets, undecided = watch.of(i), set(range(len(rows[i]), len(result.canvas)))
        commits = [{p for p, *_ in r["committed"]} for r in result.trace]
        assert len(sets) == len(commits)
        for step, (forwarded, decided) in enumerate(zip(sets, commits, strict=True)):
            assert decided and {max(p - lag, 0) for p in decided} <= set(forwarded)
            chosen = [p for p in undecided & set(forwarded) if lag and p and not {p + 1} & undecided & set(forwarded)]  # others only predict p + 1
            assert all(p - 1 in forwarded for p in chosen)
            if step:
                assert commits[step - 1] <= set(forwarded)
            undecided -= decided


def test_a_wide_step_does_not_leave_masks_behind():
    """More tokens in a step than `recent`: all are forwarded with the next one."""
    model, row = random("llada", 2, 3), [1, 2, 3, *[None] * 16]
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = unmask.infill(model, row, cache=Entropy(threshold=math.inf, recent=1), policy="quota", steps=4, block_size=16, trace=True)
    sets, commits = watch.of(0), [{p for p, *_ in r["committed"]} for r in result.trace]
    assert [len(c) for c in commits] == [4] * 4
    assert [set(s) for s in sets[1:]] == [set(range(3, 19)) - set().union(*commits[:i]) | set().union(*commits[:i][-1:]) for i in (1, 2, 3)]


def test_recent_tokens_of_earlier_blocks():
    model, row = random("llada", 2, 3), [1, 2, 3, *[None] * 12]
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        result = unmask.infill(model, row, cache=Entropy(threshold=math.inf, recent=5), policy="quota", block_size=3, score="leftmost")
    assert result.nfe == 12
    assert watch.of(0)[10] == [8, 9, 10, 11, 12, 13, 14] and watch.of(0)[9] == list(range(15))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", [dict(threshold=0.4), dict(policy="edit", threshold=0.3, edit_threshold=0.3), dict(policy="quota", temperature=1.0)])
def test_sprint_that_keeps_everything_is_the_prefix_cache(layout, policy):
    model, rows = random(layout, 3, 6), prompts(3, seed=4)
    shared = dict(max_new_tokens=20, block_size=6, seeds=[1, 2, 3], trace=True, **policy)
    whole, prefix = (unmask.generate(model, rows, cache=c, **shared) for c in ("sprint:keep_ratio=1", "prefix"))
    assert same(whole, prefix) and [r.rows_forwarded for r in whole] == [r.rows_forwarded for r in prefix]


CAUSAL = {"plain": {}, "qk_norm": dict(qk_norm=True, n_kv_heads=2), "shifted": dict(shifted=True, qkv_bias=True)}


@functools.cache
def causal(shape: str, block: int, seed: int):
    return make(seed=seed, n_layers=2, visibility="block_causal", block_size=block, **CAUSAL[shape])


@given(st.data())
def test_sprint_that_keeps_everything_is_the_block_cache(data):
    shape, block = data.draw(st.sampled_from(sorted(CAUSAL))), data.draw(st.sampled_from([4, 8]))
    model = causal(shape, block, data.draw(st.integers(0, 3)))
    rows = prompts(data.draw(st.integers(1, 2)), seed=data.draw(st.integers(0, 9)))
    shared = dict(max_new_tokens=data.draw(st.integers(1, 12)), block_size=data.draw(st.sampled_from([block // 2, block, 2 * block])), trace=True)
    shared |= data.draw(st.sampled_from([dict(threshold=0.4), dict(policy="quota"), dict(policy="edit", threshold=0.4, edit_threshold=0.4)]))
    whole, exact = (unmask.generate(model, rows, cache=c, **shared) for c in (Sprint(keep_ratio=1.0), "block"))
    assert same(whole, exact) and [r.rows_forwarded for r in whole] == [r.rows_forwarded for r in exact] and whole[0].exact


@pytest.mark.parametrize("size", [2, 4])
def test_sprint_on_block_causal_models(size):
    """Half of the prefix is seen; batches; sub-blocks. What finished blocks leave is what the block cache leaves where one block is pruned."""
    model = make(n_layers=3, visibility="block_causal", block_size=4, qk_norm=True)
    rows, shared = prompts(3, seed=4, low=5), dict(max_new_tokens=16, block_size=size, policy="quota")
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        got = unmask.generate(model, rows, cache="sprint", **shared)
    alone = [unmask.generate(model, row, cache="sprint", **shared) for row in rows]
    assert [(a.canvas, a.nfe) for a in alone] == [(r.canvas, r.nfe) for r in got] and not got[0].exact
    exact = unmask.generate(model, rows, **shared)
    assert [r.rows_forwarded for r in got] == [r.rows_forwarded for r in exact]
    pruned = [(pos, keys) for step in watch.steps for pos, keys in step.values() if keys is not None]
    assert len(pruned) > 20
    for pos, keys in pruned:
        prefix, (first, end) = pos[0], keys[-1]
        assert (first, end) == (pos[0], pos[-1] + 1) and keys[0][1] - keys[0][0] == math.ceil(prefix / 2)


# --- quality and refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """(model, 32 held-out prompts, four of each task)."""
    return unmask.load("tiny"), [e for task in TASKS for e in held_out_examples(task, 4)]


def right(tiny, **settings) -> int:
    model, examples = tiny
    results = unmask.generate(model, [e.prompt for e in examples], max_new_tokens=32, block_size=16, **settings)
    return sum(is_right(e, r.text) for e, r in zip(examples, results, strict=True))


@pytest.mark.parametrize(
    "rule, policy, lost",
    [
        (DKV(), dict(threshold=0.9), 4), (DKV(4), dict(policy="sprint", steps=16), 4), (Entropy(), dict(threshold=0.9), 2),
        (Entropy(threshold=math.inf), dict(threshold=0.9), 4), (Sprint(keep_ratio=0.8), dict(threshold=0.9), 8),
        (Sprint(keep_ratio=1.0), dict(policy="sprint", steps=16), 4), (DKV(2, greedy=True), dict(policy="quota", score="leftmost"), 4),
    ],
    ids=str,
)  # fmt: skip
def test_the_embedded_model_still_answers(tiny, rule, policy, lost):
    """Half of a prompt that must be copied is too little, so SPRINT keeps more of it here than by default."""
    plain = right(tiny, **policy)
    assert plain >= 28 and right(tiny, cache=rule, **policy) >= plain - lost


HOSTILE = [
    (lambda: DKV(refresh_every=0), "dkv: refresh_every must be an integer in 1"), (lambda: DKV(refresh_every=2.5), "dkv: refresh_every"),
    (lambda: DKV(window=-1), "dkv: window"), (lambda: DKV(greedy="yes"), "dkv: greedy must be True or False"),
    (lambda: Entropy(threshold=math.nan), "entropy: threshold"), (lambda: Entropy(threshold="0.5"), "entropy: threshold"),
    (lambda: Entropy(recent=-1), "entropy: recent"), (lambda: Entropy(recent=True), "entropy: recent"),
    (lambda: Sprint(keep_ratio=1.5), "sprint: keep_ratio"), (lambda: Sprint(keep_ratio=-0.1), "sprint: keep_ratio"),
    (lambda: Sprint(alpha=math.inf), "sprint: alpha"), (lambda: Sprint(warmup_steps=0), "sprint: warmup_steps"), (lambda: Sprint(layer=-2), "sprint: layer"),
]  # fmt: skip


@pytest.mark.parametrize("build, message", HOSTILE)
def test_bad_settings_are_named(build, message):
    with pytest.raises(SettingError, match=message):
        build()


BIDIRECTIONAL, CAUSAL_MODEL = dict(n_layers=2), dict(n_layers=2, visibility="block_causal", block_size=4)


@pytest.mark.parametrize(
    "fields, settings, message",
    [
        (BIDIRECTIONAL, dict(cache="dkv:refresh_every=no"), "refresh_every must be an integer"),
        (BIDIRECTIONAL, dict(cache="dkv:every=3"), "refresh_every, greedy, window"),
        (BIDIRECTIONAL, dict(cache="dkv:greedy=true"), "needs policy='quota' or 'sdar_static' with score='random' or 'leftmost', got policy='threshold'"),
        (BIDIRECTIONAL, dict(cache="dkv:greedy=true", policy="quota"), "with score='confidence'"),
        (BIDIRECTIONAL, dict(cache=DKV(greedy=True), policy="quota", score="random", certainty_sigma=2.0), "certainty_sigma"),
        (BIDIRECTIONAL, dict(cache="entropy", policy="remdm"), "policy='remdm' needs cache='none'"),
        (BIDIRECTIONAL, dict(cache="sprint", policy="wino"), "policy='wino' needs cache='none'"),
        (BIDIRECTIONAL, dict(cache="dkv", cfg_scale=1.0), "cfg_scale needs cache='none'"),
        (BIDIRECTIONAL, dict(cache="sprint:layer=2"), r"sprint: layer must be in -1\.\.1 for this model, got 2"),
        (CAUSAL_MODEL, dict(cache="dkv"), "cache must be one of .* for a block-causal model, got 'dkv'"),
        (CAUSAL_MODEL, dict(cache="entropy"), "for a block-causal model, got 'entropy'"),
        (CAUSAL_MODEL, dict(cache="sprint", block_size=8), "needs a block_size of at most the model's 4, got 8"),
        (CAUSAL_MODEL | dict(shifted=True), dict(cache="sprint"), "logits are not shifted"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_with_the_reason(fields, settings, message):
    with pytest.raises(SettingError, match=message):
        unmask.generate(make(**fields), [1, 2, 3], max_new_tokens=8, **settings)


def test_the_settings_of_a_result_name_the_cache():
    model = random("llada", 1, 0)
    named = {"dkv": DKV(), "dkv:refresh_every=4,window=2": DKV(4, window=2), "entropy:threshold=inf": Entropy(math.inf), "sprint:keep_ratio=0.25": Sprint(0.25)}
    for text, given_ in named.items():
        result = unmask.generate(model, [1, 2], max_new_tokens=4, cache=given_)
        assert result.settings["cache"] == text
        assert unmask.generate(model, [1, 2], max_new_tokens=4, cache=text).canvas == result.canvas
    assert {"dkv", "entropy", "sprint"} <= set(caches.CACHES)
