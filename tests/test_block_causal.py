"""Decoding of block-causal models: exact block caches against recomputing and against a dense mask in float64, fused stores, sub-blocks,
batches, ends, guidance, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from block_causal_kit import MASK, SHAPES, model, one
from family_kit import Family, build_from
from models_kit import load
from plain_model import plain_forward
from random_models import make, prompts
from unmask.compat import llada2, sdar
from unmask.decode.backend import NativeBackend
from unmask.errors import SettingError
from unmask.models import fast_dllm_v2 as v2_family
from unmask.models import sdar as sdar_family
from unmask.models.model import Model


@functools.cache
def ending(shape: str, block: int, eos: int) -> Model:
    """The same weights with another end of sequence."""
    return make(seed=3, visibility="block_causal", block_size=block, **SHAPES[shape] | dict(eos_ids=(eos,)))


class Watch:
    """Notes, per forward, who was forwarded and the hidden states that predict each candidate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[dict[tuple[int, int], torch.Tensor]] = []
        self.windows: list[dict[int, tuple[int, int]]] = []
        reduce = NativeBackend.stats

        def stats(backend, plan, live, *args, **options):
            out = reduce(backend, plan, live, *args, **options)
            hidden, query = backend._candidates(plan)
            where = zip(plan.cand_row.tolist(), plan.cand_pos.tolist(), hidden[query], strict=True)
            self.steps.append({(row, pos): h for row, pos, h in where})
            self.windows.append({row: (start, end) for row, start, end, _, _ in plan.entries})
            return out

        monkeypatch.setattr(NativeBackend, "stats", stats)

    def take(self) -> tuple[list, list]:
        out = self.steps, self.windows
        self.steps, self.windows = [], []
        return out


@pytest.fixture
def watch(monkeypatch) -> Watch:
    return Watch(monkeypatch)


@st.composite
def jobs(draw):
    """(shape, attention block, sub-block, prompts, new tokens, settings)"""
    shape, block = draw(st.sampled_from(sorted(SHAPES))), draw(st.sampled_from((4, 6, 8, 16)))
    size = draw(st.sampled_from([s for s in (1, 2, 3, 4, 6, 8, 16, 2 * block) if block % s == 0 or s % block == 0]))
    rows = draw(st.integers(1, 3))
    lengths = [draw(st.integers(0, 2 * block)) for _ in range(rows)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ids = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in lengths]
    policy = draw(
        st.sampled_from(
            [
                dict(threshold=0.4), dict(policy="llada2", threshold=0.6, minimum=2), dict(policy="sdar_static"),
                dict(policy="edit", threshold=0.4, edit_threshold=0.5, max_post_steps=3), dict(policy="sdar_static", score="leftmost"),
                dict(threshold=0.3, temperature=0.8), dict(policy="eb", gamma=0.5),
            ]
        )
    )  # fmt: skip
    return shape, block, size, ids, draw(st.integers(1, 2 * block)), dict(policy)


def both(watch: Watch, m: Model, ids, **options) -> None:
    """cache="block" gives what recomputing everything gives, at every step: the same hidden states, tokens and forwards."""
    cached = unmask.generate(m, ids, cache="block", **options)
    fast, _ = watch.take()
    whole = unmask.generate(m, ids, cache="none", **options)
    slow, _ = watch.take()
    assert [r.canvas for r in cached] == [r.canvas for r in whole] and [r.nfe for r in cached] == [r.nfe for r in whole]
    assert all(r.exact for r in cached) and len(fast) == len(slow)
    for a, b in zip(fast, slow, strict=True):
        assert a.keys() == b.keys()
        assert all((a[k] - b[k]).abs().max() <= 1e-4 for k in a)


@given(jobs())
def test_cached_is_recomputed_at_every_step(job):
    shape, block, size, ids, new, policy = job
    with pytest.MonkeyPatch.context() as patch:
        both(Watch(patch), model(shape, block), ids, block_size=size, max_new_tokens=new, eos_stop=False, **policy)


@pytest.mark.parametrize("weight", [0.5, 2.0])
@pytest.mark.parametrize("shape", ["sdar", "v2"])
def test_guidance_with_the_block_cache(watch, shape, weight):
    ids = prompts(3, seed=5, low=1)
    m = model(shape, 4)
    both(watch, m, ids, block_size=2, max_new_tokens=11, cfg_scale=weight, threshold=0.4, eos_stop=False)
    plain = unmask.generate(m, ids, max_new_tokens=11, threshold=0.4, eos_stop=False)
    guided = unmask.generate(m, ids, max_new_tokens=11, threshold=0.4, eos_stop=False, cfg_scale=weight)
    assert [r.canvas for r in plain] != [r.canvas for r in guided]


@given(jobs(), st.sampled_from(["none", "block", "dual"]))
def test_row_alone_is_row_in_a_ragged_batch(job, cache):
    shape, block, size, ids, new, policy = job
    options = dict(cache=cache, block_size=size, max_new_tokens=new, trace=True, **policy)
    ids = [*ids, [7, 8, 9], []]
    batch = unmask.generate(model(shape, block), ids, seeds=list(range(len(ids))), **options)
    for seed, (row, got) in enumerate(zip(ids, batch, strict=True)):
        (alone,) = unmask.generate(model(shape, block), [row], seeds=[seed], **options)
        assert got.canvas == alone.canvas and got.nfe == alone.nfe and got.finish_reason == alone.finish_reason
        assert [(t["committed"], t["edited"]) for t in got.trace] == [(t["committed"], t["edited"]) for t in alone.trace]


REFERENCE = {"sdar": (sdar_family, "block_size", {}), "fast_dllm_v2": (v2_family, "bd_size", {"mask_token_id": 383})}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """(model, canonical weights) of a family with random weights and any block length."""

    @functools.cache
    def build(name: str, block: int):
        module, field, ids = REFERENCE[name]
        family, changes = Family.golden(module, name, ids), {field: block}
        folder: Path = tmp_path_factory.mktemp(f"{name}{block}")
        return build_from(family.write(folder, family.random(changes, seed=block), **changes)), load(folder)

    return build


def dense_decode(m: Model, weights, canvas: list[int], masked: list[bool], size: int, threshold: float):
    """The threshold rule by the definition: the whole canvas up to the attention block's end through a dense mask in float64, one row, no
    cache. Returns (tokens, forwards, positions of each step)."""
    c, x, masked = m.config, list(canvas), list(masked)
    order, start = [], masked.index(True) if any(masked) else len(x)
    while any(masked):
        end = min((start // size + 1) * size, len(x))
        while any(masked[start:end]):
            seen = min(-(-end // c.block_size) * c.block_size, len(x))
            ids = [c.mask_id if hole else t for t, hole in zip(x[:seen], masked[:seen], strict=True)]
            logits = plain_forward(weights, c, torch.tensor([ids]))[0]
            logits[:, c.mask_id] = -torch.inf
            p, token = logits.softmax(-1).max(-1)
            holes = [i for i in range(start, end) if masked[i]]
            source = {i: max(i - 1, 0) if c.shifted else i for i in holes}
            taken = [i for i in holes if p[source[i]] >= threshold] or [max(holes, key=lambda i: (p[source[i]].item(), -i))]
            for i in taken:
                x[i], masked[i] = int(token[source[i]]), False
            order.append(taken)
        start = end
    return x, len(order), order


@pytest.mark.parametrize("remainder", range(9))
@pytest.mark.parametrize(("name", "block", "size"), [("sdar", 8, 8), ("sdar", 4, 8), ("fast_dllm_v2", 8, 8), ("fast_dllm_v2", 8, 4)])
def test_against_a_dense_mask(checked, name, block, size, remainder):
    """Prompts of every remainder; of shifted models every position, the first of a block too, is predicted by the token before it."""
    m, weights = checked(name, block)
    ids = torch.randint(0, 380, (block + remainder,), generator=torch.Generator().manual_seed(remainder)).tolist()
    new = block + 3
    whole = -(-(len(ids) + new) // block) * block
    x, nfe, order = dense_decode(m, weights, ids + [0] * (whole - len(ids)), [False] * len(ids) + [True] * (whole - len(ids)), size, 0.3)
    got = unmask.generate(m, ids, block_size=size, max_new_tokens=new, threshold=0.3, eos_stop=False, trace=True)
    assert got.canvas == x[: len(ids) + new] and got.nfe == nfe
    cut = [[p for p in taken if p < len(ids) + new] for taken in order]
    assert [sorted(p for p, _, _ in t["committed"]) for t in got.trace] == [sorted(t) for t in cut]


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_v2"])
def test_infill_against_a_dense_mask(checked, name):
    m, weights = checked(name, 8)
    canvas: list[int | None] = torch.randint(0, 380, (43,), generator=torch.Generator().manual_seed(1)).tolist()
    for i in (2, 3, 4, 8, 9, 25, 26, 31, 40, 41, 42):  # three blocks whole in between, the last one short
        canvas[i] = None
    holes = [t is None for t in canvas]
    for size in (4, 8):
        x, nfe, _ = dense_decode(m, weights, [t or 0 for t in canvas], holes, size, 0.5)
        got = unmask.infill(m, canvas, block_size=size, threshold=0.5)
        assert got.canvas == x and got.nfe == nfe
        assert unmask.infill(m, canvas, block_size=size, threshold=0.5, cache="none").canvas == x
    assert all(g == t for g, t in zip(got.canvas, canvas, strict=True) if t is not None)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_later_blocks_never_change_earlier_results(shape):
    m, ids = model(shape, 8), [5, 6, 7]
    long = unmask.generate(m, ids, max_new_tokens=40, threshold=0.4, eos_stop=False)
    for new in (5, 13, 20):
        assert unmask.generate(m, ids, max_new_tokens=new, threshold=0.4, eos_stop=False).canvas == long.canvas[: 3 + new]
    canvas = [5, 6, *[None] * 6, 1, 2, None, 4, *range(10, 22)]
    first = unmask.infill(m, canvas, threshold=0.4).canvas
    for tail in (range(30, 42), [None] * 12, [0] * 12):
        assert unmask.infill(m, [*canvas[:12], *tail], threshold=0.4).canvas[:8] == first[:8]


@pytest.mark.parametrize("prompt", [0, 3, 8, 16, 21])
@pytest.mark.parametrize("shape", ["sdar", "plain"])
def test_fused_forwards_are_the_authors_without_the_stores(shape, prompt):
    m = model(shape, 8)
    ids = prompts(1, low=prompt, high=prompt, seed=prompt)[0]
    for new in (1, 8, 19, 32):
        options = dict(threshold=0.5, block_length=8, mask_id=MASK, eos_id=59, gen_length=new)
        x, stats = llada2.generate_cached(m, torch.tensor([ids], dtype=torch.int64), editing_threshold=2.0, max_post_steps=0, **options)
        (fused,) = unmask.generate(m, [ids], policy="llada2", threshold=0.5, max_new_tokens=new, eos_stop=False)
        assert x[0].tolist() == fused.canvas[: x.shape[1]] and 59 not in fused.canvas[prompt : x.shape[1] - 1]
        blocks = -(-(prompt + new) // 8) - prompt // 8
        assert fused.nfe == stats["nfe"] - (prompt >= 8) - (blocks - 1)


def test_windows_of_the_block_cache(watch):
    """The prompt with the first block, the finished block with the next one, else the block: nothing is forwarded for a store alone."""
    unmask.generate(model("plain", 4), [[1, 2, 3, 4, 5, 6, 7, 8, 9]], max_new_tokens=11, policy="sdar_static", eos_stop=False)
    _, windows = watch.take()
    assert [w[0] for w in windows] == [(0, 12), (8, 12), (8, 12), (8, 16), *[(12, 16)] * 3, (12, 20), *[(16, 20)] * 3]


@pytest.mark.parametrize("shape", ["plain", "shifted"])
def test_dual_forwards_the_part_alone_once_its_first_position_is_known(watch, shape):
    """A shifted model's window begins one token earlier: the one that predicts its first position."""
    lag, ids = int(SHAPES[shape].get("shifted", False)), list(range(1, 18))
    got = unmask.generate(model(shape, 16), [ids], block_size=4, max_new_tokens=15, cache="dual", policy="llada2", threshold=1.0, trace=True, eos_stop=False)
    steps, windows = watch.take()
    known, forwarded = set(range(17)), []
    for i, (window, record) in enumerate(zip(windows, got[0].trace, strict=True)):
        part = min(pos for _, pos in steps[i]) // 4 * 4
        alone = (part - lag, part + 4)
        expected = (0, 32) if i == 0 else alone if part in known else (16 - lag, 32)
        assert window[0] == expected, i
        forwarded.append(window[0][1] - window[0][0])
        known |= {p for p, _, _ in record["committed"]}
    assert not got[0].exact and 4 + lag in forwarded and 16 + lag in forwarded


def test_surplus_positions_of_the_last_block_are_cut():
    m = model("sdar", 16)
    for new in (1, 5, 13, 16):
        ids = [3, 4, 5]
        result = unmask.generate(m, ids, max_new_tokens=new, threshold=0.4, eos_stop=False, trace="predictions")
        assert len(result.canvas) == 3 + new and len(result.ids) == new and result.canvas[:3] == ids
        seen = [p for t in result.trace for p, _, _ in t["committed"]]
        assert sorted(seen) == list(range(3, 3 + new)) and all(len(t["filled"]) == 3 + new for t in result.trace)
        *events, done = unmask.stream(m, ids, max_new_tokens=new, threshold=0.4, eos_stop=False)
        commits = [e for e in events if e.kind == "commit"]
        assert sorted(p for e in commits for p in e.positions) == sorted(seen) and all(len(e.canvas) == 3 + new for e in commits)
        assert commits[-1].canvas == done.result.canvas == result.canvas
    assert unmask.generate(m, ids, max_new_tokens=0).canvas == ids


def test_end_of_sequence():
    """A row ends at the first EOS with nothing undecided before it, or where its block ends; an EOS behind the canvas is none."""
    ids = [3, 4, 5]
    free = unmask.generate(model("sdar", 8), ids, max_new_tokens=30, threshold=0.3, eos_stop=False)
    at = next(i for i in range(9, 30) if free.canvas[i] not in free.canvas[3:i] and i % 8 < 6)  # the EOS's place, not its block's end
    eos, block_end = free.canvas[at], at // 8 * 8 + 8
    m = ending("sdar", 8, eos)
    soon = unmask.generate(m, ids, max_new_tokens=30, threshold=0.3)
    late = unmask.generate(m, ids, max_new_tokens=30, threshold=0.3, eos_stop="block")
    never = unmask.generate(m, ids, max_new_tokens=30, threshold=0.3, eos_stop=False)
    assert soon.ids == late.ids == free.canvas[3:at] and soon.finish_reason == late.finish_reason == "eos"
    assert soon.canvas == free.canvas[:at] + [eos] * (33 - at) and late.canvas[:block_end] == free.canvas[:block_end]
    assert soon.nfe <= late.nfe < never.nfe and never.canvas == free.canvas and never.finish_reason == "length"
    for end in range(at // 8 * 8 + 1, block_end):  # canvases that end inside the EOS's block, before it or behind
        short = unmask.generate(m, ids, max_new_tokens=end - 3, threshold=0.3)
        assert short.canvas[:at] == free.canvas[: min(at, end)]
        assert short.finish_reason == ("eos" if at < end else "length")


def test_stream_is_generate():
    m, ids = model("v2", 8), prompts(3, seed=2)
    results = unmask.generate(m, ids, block_size=4, max_new_tokens=13, threshold=0.4)
    *events, done = unmask.stream(m, ids, block_size=4, max_new_tokens=13, threshold=0.4)
    assert [r.canvas for r in done.result] == [r.canvas for r in results]
    assert sum(e.kind == "step" for e in events) == max(r.nfe for r in results)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(block_size=3), "divisor or a multiple of the model's 8, got 3"),
        (dict(block_size=12), "divisor or a multiple of the model's 8, got 12"),
        (dict(cache="prefix"), "none, block, dual, sprint for a block-causal model, got 'prefix'"),
        (dict(schedule="adablock", delimiters=[3]), "schedule='adablock' needs a bidirectional model"),
        (dict(schedule="daedal", max_new_tokens=32), "schedule='daedal' needs a bidirectional model"),
        (dict(policy="wino"), "policy='wino' needs a bidirectional model"),
        (dict(negative_prompt=[1, 2], cfg_scale=1.0), "needs a bidirectional model"),
        (dict(cache="dual", cfg_scale=1.0), "cfg_scale needs cache='none'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_forward(options, words):
    m = model("sdar", 8)
    handle = m.register_forward_hook(lambda *_: pytest.fail("it ran"))
    try:
        with pytest.raises(SettingError) as caught:
            unmask.generate(m, [1, 2, 3], **options)
    finally:
        handle.remove()
    assert words in str(caught.value)
    with pytest.raises(SettingError, match="dllm, elastic for a bidirectional model, got 'block'"):
        unmask.generate(make(), [1, 2, 3], cache="block")


def test_a_store_leaves_the_steps_alone():
    """backend.store between two steps with the same plan: the next step's hidden states are those of its own forward."""
    m = model("plain", 4)
    torch.manual_seed(0)
    alone = sdar.block_diffusion_generate(m, one(9), MASK, 12, 4, 4, temperature=0.0)
    stats = NativeBackend.stats

    def disturbed(self, plan, live, *args, **options):
        self.store(0, 0, 8)
        return stats(self, plan, live, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeBackend, "stats", disturbed)
        assert sdar.block_diffusion_generate(m, one(9), MASK, 12, 4, 4, temperature=0.0).equal(alone)


def test_shapes_are_what_they_say():
    for shape, changes in SHAPES.items():
        config = model(shape, 8).config
        assert config.visibility == "block_causal" and dataclasses.asdict(config).items() >= changes.items()


@pytest.mark.parametrize("seed", range(3))
def test_a_variant_leaves_finished_blocks_exact(seed):
    model = make(seed, visibility="block_causal", block_size=4, shifted=True)
    runs = [unmask.generate(model, [1, 2, 3], policy="quota", variant="d2cache", cache=c, max_new_tokens=16, eos_stop=False) for c in ("block", "none")]
    assert runs[0].ids == runs[1].ids and runs[0].exact


def test_a_variant_is_not_exact_on_one_layer():
    one = make(n_layers=1, shifted=True, qkv_bias=True)
    assert not unmask.generate(one, [1, 2], policy="quota", variant="d2cache", cache="dual", max_new_tokens=4).exact
    assert unmask.generate(one, [1, 2], policy="quota", cache="dual", max_new_tokens=4).exact


def test_daedal_counts_what_it_forwards():
    result = unmask.generate(make(), [1, 2, 3], schedule="daedal", max_new_tokens=16, initial_tokens=4, trace=True)
    assert result.rows_forwarded == sum(record["rows"] for record in result.trace) >= 7 * result.nfe
