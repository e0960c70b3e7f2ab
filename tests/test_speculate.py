"""Lossless self-speculation: tokens, order and end of the plain run, from fewer forwards; what cannot be verified exactly is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_runs
import unmask
from random_models import make, prompts
from unmask.decode.backend import NativeBackend
from unmask.decode.osdt import Table
from unmask.decode.table import RULES
from unmask.models.config import Experts
from unmask.models.model import Model
from unmask.speculate import auto
from unmask.speculate.methods import (
    REFUSED_RULES,
    S2D2,
    SERVED_RULES,
    SSD,
    STATIC_RULES,
    FreeDave,
    Method,
    read_method,
)

CAUSAL = dict(visibility="block_causal", block_size=12)
EXPERTS = Experts(
    layers=(1,), n_experts=4, top_k=2, expert_dim=24, shared_dim=16, scoring="sigmoid", selection_bias=True, n_groups=1, kept_groups=1, normalized=True,
    scale=1.0,
)  # fmt: skip
SHAPES = {
    "llada": dict(), "one layer": dict(n_layers=1), "dream": dict(n_kv_heads=2, qkv_bias=True, shifted=True),
    "moe": dict(n_kv_heads=2, experts=EXPERTS),
    "sdar": dict(n_kv_heads=2, qk_norm=True, **CAUSAL), "v2": dict(n_kv_heads=1, qkv_bias=True, shifted=True, **CAUSAL),
}  # fmt: skip
CACHES = {True: ("none", "block", "dual"), False: ("none", "prefix", "dual", "prefix:refresh=3", "dual:refresh=2")}
FREQUENCIES = torch.rand(61, generator=torch.Generator().manual_seed(3)) / 61
POLICIES = {
    "quota": dict(policy="quota"),
    "quota steps": dict(policy="quota", steps=10),
    "threshold": dict(threshold=0.35),
    "threshold dinfer": dict(threshold=0.5, variant="dinfer"),
    "threshold minimum": dict(threshold=0.6, minimum=2),
    "factor": dict(policy="factor", factor=1.2),
    "eb": dict(policy="eb", gamma=0.8),
    "eb d2cache": dict(policy="eb", gamma=0.8, variant="d2cache"),
    "pc": dict(policy="pc", frequencies=FREQUENCIES),
    "dus": dict(policy="dus"),
    "dus skip": dict(policy="dus", skip_below=0.2),
    "sdar_static": dict(policy="sdar_static", score="leftmost"),
    "sdar_dynamic": dict(policy="sdar_dynamic", threshold=0.5),
    "llada2": dict(policy="llada2", threshold=0.5),
    "sprint": dict(policy="sprint", threshold=0.7, steps=12),
    "hierarchy": dict(policy="hierarchy", threshold=0.6, low_threshold=0.5),
    "osdt": dict(policy="osdt", table=Table(((0.5, 0.3), (0.6,)))),
    "margin": dict(policy="quota", score="margin"),
    "entropy": dict(score="entropy", threshold=-1.0),
    "random": dict(policy="quota", score="random"),
    "bias": dict(policy="quota", position_bias=0.05),
    "certainty": dict(policy="quota", certainty_sigma=2.0),
    "sampled": dict(policy="quota", temperature=0.3),
    "sampled threshold": dict(threshold=0.4, temperature=0.5),
    "nucleus": dict(policy="quota", temperature=0.4, top_p=0.9),
    "repetition": dict(policy="quota", repetition_penalty=1.3),
    "suppress": dict(policy="quota", suppress=[5, 7], confidence_eos_eot_inf=True),
}  # fmt: skip
STATIC = [name for name, p in POLICIES.items() if p.get("policy") in STATIC_RULES]


@functools.cache
def model(shape: str, seed: int = 3) -> Model:
    return make(seed=seed, **SHAPES[shape])


def causal(shape: str) -> bool:
    return "visibility" in SHAPES[shape]


def story(result: unmask.Result) -> list:
    """Every plain step of a traced run, in order, without the forwards."""
    return [(t["block"], t["step"], t["masks_left"], [(p, i) for p, i, _ in t["committed"]]) for t in result.trace]


def scores(result: unmask.Result) -> list[float]:
    return [s for t in result.trace for _, _, s in t["committed"]]


@pytest.fixture(autouse=True)
def rows_cost_little(monkeypatch):
    """auto must not follow the clock of the machine that runs the tests."""
    monkeypatch.setattr(auto, "curve", lambda *_: {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.6})


SAME = ("ids", "canvas", "text", "finish_reason", "exact")


def check(m: Model, rows, method: str = "ssd", draft: int = 4, plain: list | None = None, **settings) -> Counter:
    """Compares a run with the plain one; returns its counts. Scores too agree to the bit, but for attention="tree", whose sums have another order."""
    settings = dict(max_new_tokens=24, block_size=12, eos_stop=False, seeds=list(range(len(rows))), trace=True) | settings
    plain = plain or unmask.generate(m, rows, **settings)
    fast = unmask.generate(m, rows, speculate=method, draft=draft, **settings)
    counts: Counter = Counter()
    for a, b in zip(plain, fast, strict=True):
        assert [getattr(a, n) for n in SAME] == [getattr(b, n) for n in SAME]
        assert story(a) == story(b)
        assert scores(a) == (pytest.approx(scores(b), rel=1e-4, abs=1e-5) if "attention=tree" in method else scores(b))
        assert b.nfe <= a.nfe and b.nfe + b.accepted == a.nfe and len(b.trace) == a.nfe
        assert sum(t["drafted"] for t in b.trace) == b.drafted and sum(t["accepted"] for t in b.trace) == b.accepted
        assert len({t["nfe"] for t in b.trace}) == b.nfe and sum(t["rows"] for t in b.trace) == b.rows_forwarded
        counts.update(drafted=b.drafted, accepted=b.accepted, nfe=b.nfe, plain=a.nfe)
    return counts


def both_paths(counts: Counter) -> None:
    """Drafts were accepted, and drafts were rejected."""
    assert 0 < counts["accepted"] < counts["drafted"], counts


def several(run) -> None:
    """`run(seed)` for other models until its counts show both paths, which some of them must."""
    counts: Counter = Counter()
    for seed in range(3, 9):
        counts += run(seed)
        if 0 < counts["accepted"] < counts["drafted"]:
            return
    both_paths(counts)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["llada", "dream", "sdar", "v2"])
def test_every_policy_and_cache(shape, policy):
    def run(seed: int) -> Counter:
        runs = (check(model(shape, seed), prompts(2, seed=seed), cache=cache, **POLICIES[policy]) for cache in CACHES[causal(shape)])
        return sum(runs, Counter())

    several(run)


@pytest.mark.parametrize("policy", STATIC)
@pytest.mark.parametrize("shape", ["llada", "dream", "sdar", "v2"])
def test_freedave(shape, policy):
    """Both layouts; the draft, hence the number of forwards, is the same."""
    def run(seed: int) -> Counter:
        counts: Counter = Counter()
        for cache in CACHES[causal(shape)][:3]:
            batch, tree = (
                check(model(shape, seed), prompts(2, seed=seed), f"freedave:attention={a}", cache=cache, **POLICIES[policy]) for a in ("batch", "tree")
            )
            assert batch == tree
            counts += batch
        return counts

    several(run)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["ssd:tree=positions", "ssd:tree=tokens", "ssd:attention=tree", "ssd:tree=tokens,attention=tree", "auto"])
def test_trees_and_layouts(shape, method):
    counts: Counter = Counter()
    for cache in CACHES[causal(shape)][:3]:
        for policy in ("quota", "threshold", "sampled"):
            counts += check(model(shape), prompts(2, seed=2), method, 5, cache=cache, **POLICIES[policy])
    both_paths(counts)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_draft_length(shape):
    """N = 1 is the plain run, forward by forward; each N accepts and rejects."""
    for cache in CACHES[causal(shape)][:3]:
        shared = dict(cache=cache, policy="quota")
        plain = unmask.generate(model(shape), prompts(3), max_new_tokens=24, block_size=12, eos_stop=False, seeds=[0, 1, 2], trace=True, **shared)
        one = check(model(shape), prompts(3), draft=1, plain=plain, **shared)
        assert one["drafted"] == 0 and one["nfe"] == one["plain"]
        for n in range(2, 9):
            both_paths(check(model(shape), prompts(3), draft=n, plain=plain, **shared))


def test_one_node_forwards_what_the_plain_run_does():
    for shape in ("llada", "dream", "sdar", "v2"):
        for cache in CACHES[causal(shape)][:3]:
            settings = dict(policy="quota", cache=cache, block_size=6, max_new_tokens=14)
            a = unmask.generate(model(shape), prompts(3), **settings)
            b = unmask.generate(model(shape), prompts(3), speculate="ssd", draft=1, **settings)
            assert [(r.nfe, r.rows_forwarded, r.canvas) for r in a] == [(r.nfe, r.rows_forwarded, r.canvas) for r in b]


@pytest.mark.parametrize("size", [3, 6, 12, 24])
@pytest.mark.parametrize("shape", ["sdar", "v2"])
def test_sub_blocks_and_blocks_of_several(shape, size):
    counts: Counter = Counter()
    for cache in CACHES[True]:
        for policy in ("quota", "threshold"):
            counts += check(model(shape), prompts(3, seed=5), cache=cache, block_size=size, max_new_tokens=29, **POLICIES[policy])
    both_paths(counts)


@pytest.mark.parametrize("shape", ["llada", "dream", "sdar", "v2"])
def test_a_row_alone_is_the_row_in_a_ragged_batch(shape):
    counts: Counter = Counter()
    for cache in CACHES[causal(shape)]:
        rows, seeds = prompts(4, seed=7), [4, 5, 6, 7]
        settings = dict(cache=cache, block_size=6, max_new_tokens=13, speculate="ssd", draft=4, **POLICIES["sampled threshold"])
        batch = unmask.generate(model(shape), rows, seeds=seeds, **settings)
        for row, seed, got in zip(rows, seeds, batch, strict=True):
            alone = unmask.generate(model(shape), [row], seeds=[seed], **settings)[0]
            assert (alone.canvas, alone.nfe, alone.accepted, alone.drafted) == (got.canvas, got.nfe, got.accepted, got.drafted)
            counts.update(drafted=got.drafted, accepted=got.accepted)
    both_paths(counts)


@pytest.mark.parametrize("eos", [True, "block"])
@pytest.mark.parametrize("shape", ["llada", "dream", "sdar", "v2"])
def test_end_of_sequence(shape, eos):
    """An EOS in the middle of an accepted chain ends the row where it ends the plain one."""
    rows = prompts(6, seed=4)
    plain = unmask.generate(model(shape), rows, max_new_tokens=18, block_size=6, eos_stop=False, policy="quota", score="leftmost")
    first = {t: max(r.ids.index(t) for r in plain if t in r.ids) for r in plain for t in r.ids}
    ends = sorted(first, key=lambda t: -first[t])[:3]  # tokens that some row says late
    counts, reasons = Counter(), set()
    for end in ends:
        ending = make(seed=3, **SHAPES[shape] | dict(eos_ids=(end,)))
        for cache in CACHES[causal(shape)][:3]:
            settings = dict(cache=cache, eos_stop=eos, policy="quota", score="leftmost", max_new_tokens=18, block_size=6)
            counts += check(ending, rows, **settings)
            reasons |= {r.finish_reason for r in unmask.generate(ending, rows, speculate="ssd", **settings)}
    both_paths(counts)
    assert reasons == {"eos", "length"}


def test_stop_strings_and_text():
    m = unmask.load("tiny")
    rows = ["sort d a c b =>", "json ann is 31 and lives in paris =>", "reverse a b c d =>", "close ([{ =>"]
    counts, reasons = Counter(), set()
    for stop in ("c", "31", "]", "age"):
        for cache in ("none", "dual"):
            settings = dict(policy="quota", stop=[stop], cache=cache, eos_stop=True, max_new_tokens=24, block_size=8)
            counts += check(m, rows, **settings)
            reasons |= {r.finish_reason for r in unmask.generate(m, rows, speculate="ssd", **settings)}
    both_paths(counts)
    assert {"stop", "eos"} <= reasons


@pytest.mark.parametrize("shape", ["llada", "dream", "sdar"])
def test_guidance(shape):
    counts: Counter = Counter()
    for method in ("ssd", "ssd:attention=tree"):
        for cache in ("none", "block") if causal(shape) else ("none",):
            counts += check(model(shape), prompts(3, seed=6, low=2), method, cache=cache, cfg_scale=0.6, policy="quota")
    both_paths(counts)


def test_adaptive_blocks():
    counts: Counter = Counter()
    for shape in ("llada", "dream"):
        for cache in CACHES[False]:
            for policy in (POLICIES["threshold"], dict(threshold=0.9), dict(threshold=0.9, temperature=0.4)):
                settings = dict(schedule="adablock", delimiters=list(range(0, 59, 3)), delimiter_threshold=0.2, delimiter_window=0.5, cache=cache)
                counts += check(model(shape), prompts(3, seed=2), max_new_tokens=24, **settings, **policy)
    both_paths(counts)


@pytest.mark.parametrize("shape", ["llada", "dream", "sdar", "v2"])
def test_infill(shape):
    canvas = [4, None, None, 9, 60, None, None, None, None, 3, None, None, None, 8, None, None, None, 1, 2, None]
    counts: Counter = Counter()
    for cache in CACHES[causal(shape)]:
        for size in (3, 6, 12):
            settings = dict(cache=cache, block_size=size, policy="quota", trace=True)
            for row in (canvas, canvas[::-1], canvas[3:]):
                a, b = unmask.infill(model(shape), row, **settings), unmask.infill(model(shape), row, speculate="ssd", **settings)
                assert a.canvas == b.canvas and story(a) == story(b) and a.nfe == b.nfe + b.accepted
                counts.update(drafted=b.drafted, accepted=b.accepted)
    both_paths(counts)


def test_bfloat16():
    counts: Counter = Counter()
    for shape in ("llada", "sdar"):
        m = make(seed=5, dtype=torch.bfloat16, **SHAPES[shape])
        for cache in CACHES[causal(shape)][:3]:
            counts += check(m, prompts(4, seed=8), cache=cache, policy="quota")
    both_paths(counts)


TOTALS: Counter = Counter()


@st.composite
def jobs(draw):
    """(shape, model seed, rows, method, draft, settings)"""
    shape = draw(st.sampled_from(sorted(SHAPES)))
    method = draw(st.sampled_from(["ssd", "ssd", "ssd:tree=positions", "ssd:tree=tokens", "freedave", "auto"]))
    policy = POLICIES[draw(st.sampled_from(STATIC if method == "freedave" else sorted(POLICIES)))]
    cache = draw(st.sampled_from(CACHES[causal(shape)]))
    size = draw(st.sampled_from((1, 3, 6, 12, 24))) if causal(shape) else draw(st.integers(1, 14))
    new = draw(st.integers(1, 24))
    eos = draw(st.sampled_from((False, True, "block")))
    rows = draw(st.lists(st.lists(st.integers(0, 60), max_size=9), min_size=1, max_size=3))
    seeds = draw(st.lists(st.integers(0, 1 << 40), min_size=len(rows), max_size=len(rows)))
    settings = dict(policy, cache=cache, block_size=size, max_new_tokens=new, eos_stop=eos, seeds=seeds)
    if settings.get("steps") is not None:
        settings["steps"] = 32
    return shape, draw(st.integers(0, 5)), rows, method, draw(st.integers(1, 8)), settings


@given(jobs())
def test_random_models_and_settings(job):
    shape, seed, rows, method, draft, settings = job
    TOTALS.update(check(model(shape, seed), rows, method, draft, **settings))


def test_random_models_took_both_paths():
    """Over all examples of the test above, which runs before this one."""
    if not TOTALS:
        test_random_models_and_settings()
    both_paths(TOTALS)


@pytest.mark.parametrize("method", ["ssd", "freedave"])
def test_tiny_takes_far_fewer_forwards(method):
    m = unmask.load("tiny")
    rows = ["sort d a c b =>", "json ann is 31 and lives in paris =>", "add 47 + 38 low first =>", "function f adds x and y =>", "close ([{ =>"]
    counts: Counter = Counter()
    for cache in ("none", "dual"):
        counts += check(m, rows, method, cache=cache, policy="quota", max_new_tokens=32, block_size=32, eos_stop=False)
    both_paths(counts)
    assert counts["plain"] >= 1.6 * counts["nfe"], counts


@pytest.mark.parametrize("family", (*golden_runs.FAMILIES, *golden_runs.BLOCK_FAMILIES))
def test_golden_checkpoints(family):
    m = golden_runs.load(family)
    rows = [r.data["prompt_ids"][0] for r in (*golden_runs.RUNS, *golden_runs.BLOCK_RUNS) if r.family == family][:3]
    for method in ("ssd", "freedave"):
        counts: Counter = Counter()
        for cache in CACHES[m.config.visibility == "block_causal"][:3]:
            for row in rows:
                counts += check(m, [row], method, cache=cache, policy="quota", max_new_tokens=32, block_size=None)
        both_paths(counts)
        length = counts["plain"] / counts["nfe"]
        print(f"{family} {method}: {length:.2f} steps a forward")
        assert length > 1.0


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


def test_every_rule_is_served_or_refused_with_a_reason():
    assert set(SERVED_RULES) | set(REFUSED_RULES) == set(RULES) and not set(SERVED_RULES) & set(REFUSED_RULES)
    needed = dict(plackett_luce=dict(order_logits=lambda step: step.pos.double()))
    for rule, reason in REFUSED_RULES.items():
        with pytest.raises(unmask.SettingError, match=f"does not serve policy='{rule}'") as caught:
            unmask.generate(model("llada"), [1], policy=rule, speculate="ssd", **needed.get(rule, {}))
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(speculate="sdd"), "unknown speculate 'sdd'; did you mean 'ssd'"),
        (dict(speculate=3), "speculate must be a name"),
        (dict(speculate=Method()), "speculate must be a name"),
        (dict(speculate="ssd:tree=wide"), "unknown speculate: tree 'wide'"),
        (dict(speculate="ssd:trees=chain"), "expected ssd:setting=value,... with settings attention, tree; got 'trees=chain'"),
        (dict(speculate="freedave:tree=chain"), "with settings attention; got"),
        (dict(draft=3), "draft is for speculate="),
        (dict(speculate="ssd", draft=0), "draft must be an integer in 1..64, got 0"),
        (dict(speculate="ssd", draft=2.5), "draft must be an integer"),
        (dict(speculate="freedave"), "lossless for rules that commit a fixed number of positions a step .* got policy='threshold'.*use speculate='ssd'"),
        (dict(speculate="ssd", score=lambda step: step.pos.double()), "does not serve a score function"),
        (dict(speculate="ssd", soft_masks=unmask.SoftMasks()), "does not serve soft_masks: a mask's embedding"),
        (dict(speculate="ssd", trace="predictions"), "does not serve trace='predictions'"),
        (dict(speculate="ssd", cfg_scale=1.0, negative_prompt=[1]), "does not serve negative_prompt: its null input"),
        (dict(speculate="ssd", schedule="daedal", max_new_tokens=8), "does not serve schedule='daedal'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(unmask.SettingError, match=message):
        unmask.generate(model("llada"), [1, 2], **settings)


def test_s2d2_reads_its_options_when_made():
    assert str(S2D2({"mode": "greedy"})) == "s2d2:mode=greedy" and str(S2D2(None)) == "s2d2"  # type: ignore[arg-type]
    with pytest.raises(unmask.SettingError, match="must be a mapping or an Options, got str"):
        S2D2("greedy")  # type: ignore[arg-type]


def test_a_module_is_refused():
    class Module(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros((*ids.shape, 61))

    with pytest.raises(unmask.SettingError, match="needs a model from unmask.load, got .*: a module's logits may change in their last bits"):
        unmask.generate(unmask.wrap(Module(), mask_id=60, shifted=False), [1, 2], speculate="ssd")


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


def test_settings_say_what_took_effect():
    (result,) = unmask.generate(model("llada"), [[1]], speculate="ssd:tree=positions", policy="quota")
    assert result.settings["speculate"] == "ssd:tree=positions" and result.settings["draft"] == 4
    (result,) = unmask.generate(model("llada"), [[1]], speculate="auto")
    assert result.settings["speculate"] == "auto" and result.settings["draft"] == 8
    (result,) = unmask.generate(model("llada"), [[1]])
    assert "speculate" not in result.settings and result.drafted == result.accepted == 0
    assert read_method(SSD()) == read_method("ssd") and str(FreeDave("tree")) == "freedave:attention=tree"


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
