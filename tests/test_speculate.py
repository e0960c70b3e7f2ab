"""Lossless self-speculation: tokens, order and end of the plain run, from fewer forwards, with every policy, cache and setting that is served."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden_runs
import unmask
from random_models import make, prompts
from speculate_kit import (  # noqa: F401 (rows_cost_little: for every test here)
    CACHES,
    POLICIES,
    SHAPES,
    STATIC,
    both_paths,
    causal,
    check,
    model,
    rows_cost_little,
    several,
    story,
)


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
