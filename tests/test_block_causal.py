"""Decoding of block-causal models: exact block caches against recomputing and against a dense mask in float64, fused stores, sub-blocks,
batches, ends, guidance, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from family_kit import Family, build_from
from models_kit import load
from plain_model import plain_forward
from random_models import make, prompts
from unmask.compat import fast_dllm_v2, llada2, sdar
from unmask.decode.backend import NativeBackend
from unmask.errors import SettingError
from unmask.models import fast_dllm_v2 as v2_family
from unmask.models import sdar as sdar_family
from unmask.models.model import Model

MASK = 60
SHAPES = {
    "sdar": dict(n_kv_heads=2, qk_norm=True),
    "v2": dict(n_kv_heads=1, qkv_bias=True, shifted=True),
    "plain": dict(n_layers=3),
    "shifted": dict(shifted=True, qk_norm=True),
}


@functools.cache
def model(shape: str, block: int, **changes) -> Model:
    return make(seed=3, visibility="block_causal", block_size=block, eos_ids=(59,), **SHAPES[shape], **changes)


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


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
@given(jobs())
@settings(max_examples=60)
def test_row_alone_is_row_in_a_ragged_batch(cache, job):
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


# what the golden runs of the compat functions do not hold


def one(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 59, (1, n), generator=torch.Generator().manual_seed(seed))


def test_sdar_never_overwrites_what_is_decided():
    """Its own top-k does, where a step's quota exceeds the masks left: two steps of four positions each, five masks of the prompt's block."""
    prompt = one(11)
    x = sdar.block_diffusion_generate(
        model("sdar", 8), prompt, MASK, 8, 8, denoising_steps=2, remasking_strategy="low_confidence_static", temperature=0.0
    )
    assert x.shape == (1, 24) and x[0, :11].tolist() == prompt[0].tolist() and MASK not in x[0, 11:]
    fused = unmask.generate(model("sdar", 8), prompt[0].tolist(), max_new_tokens=8, policy="quota", steps=4, eos_stop=False)
    assert fused.canvas[:11] == prompt[0].tolist()


def test_sdar_samples_by_torchs_seed_and_replays_what_it_drew():
    m, prompt, drawn = model("sdar", 8), one(6), []
    options = dict(mask_id=MASK, gen_length=16, block_length=4, denoising_steps=4, confidence_threshold=0.4)

    def run(seed: int, **more):
        torch.manual_seed(seed)
        return sdar.block_diffusion_generate(m, {"input_ids": prompt}, return_forward_stats=True, **options | more)

    a, b, c = run(1), run(1), run(2)
    assert a[0].equal(b[0]) and a[1] == b[1] and not a[0].equal(c[0])
    # every step's draw, from the order in which positions were settled
    x = a[0][0].tolist()
    for step in a[1]["decoding_order"]:
        settled = [p for p in step if p != "|"]
        drawn.append([x[settled[0] // 4 * 4 + i] for i in range(4)])
    with pytest.raises(SettingError, match="sampled_tokens must hold the tokens of every step"):
        run(1, sampled_tokens=drawn[:1])
    again = run(3, sampled_tokens=drawn * 4, remasking_strategy="sequential")
    assert again[0].shape == a[0].shape
    for wrong in (dict(temperature=0.5), dict(top_k=3), dict(top_p=0.9)):
        with pytest.raises(SettingError, match="needs temperature=1"):
            run(1, sampled_tokens=drawn, **wrong)
    for wrong_tokens in ([[1, 2]], [[1, 2, 3, 61]], "x"):
        with pytest.raises(SettingError, match="sampled_tokens must hold 4 token ids"):
            run(1, sampled_tokens=wrong_tokens)
    with pytest.raises(SettingError, match="sampled_tokens must not hold the mask token 60"):
        run(1, sampled_tokens=[[1, 2, 3, MASK]])
    filtered = [run(5, temperature=0.7, top_k=1)[0], run(6, temperature=0.7, top_k=1)[0], run(7, temperature=0.7, top_p=1e-6)[0]]
    assert all(f.equal(filtered[0]) for f in filtered)  # one token is left, whatever the seed
    greedy = run(5, temperature=1.0, do_sample=False)[0]
    assert greedy.equal(run(8, temperature=0.0)[0])


def test_v2_sees_a_prompt_of_one_block():
    """The authors' code drops it; its first forward is then the prefill, whose last logits give the first token."""
    m = model("v2", 8)
    options = dict(max_new_tokens=8, mask_id=MASK, threshold=0.5, small_block_size=4, block_size=8, stop_token=59)
    x, y = (fast_dllm_v2.generate(m, one(8, seed), **options) for seed in (1, 2))
    assert not x[0, 8:].equal(y[0, 8:])
    logits = m.logits(one(8, 1))[0, -1].clone()
    logits[MASK] = -torch.inf
    assert x[0, 8] == logits.argmax()


def test_v2_counts_whole_blocks_and_opens_the_next():
    m = model("v2", 8)
    options = dict(mask_id=MASK, threshold=0.5, small_block_size=4, block_size=8, stop_token=59)
    for prompt, new, length in ((5, 8, 9), (5, 15, 9), (5, 16, 17), (8, 8, 17), (8, 7, 9), (5, 7, 5), (11, 16, 25)):
        x = fast_dllm_v2.generate(m, one(prompt), max_new_tokens=new, **options)
        assert 59 in x[0] or x.shape[1] == length, (prompt, new)
    out, stats = fast_dllm_v2.generate(m, one(5), max_length=21, return_dict_in_generate=True, return_decoding_order=True, **options)
    assert out.sequences.equal(fast_dllm_v2.generate(m, one(5), max_new_tokens=16, **options))
    opened = [step[0] for step in stats["decoding_order"] if step[0] != int(step[0])]
    assert opened == [-8.5, -16.5] and stats["total_forward_steps"] == len(stats["decoding_order"])
    torch.manual_seed(0)
    a = fast_dllm_v2.generate(m, one(5), max_new_tokens=16, temperature=1.0, **options)
    torch.manual_seed(0)
    assert a.equal(fast_dllm_v2.generate(m, one(5), max_new_tokens=16, temperature=1.0, **options))


def test_llada2_forwards_once_more_where_editing_is_off():
    """As the authors' loop: with post steps allowed, a block without masks is forwarded once, edits nothing and ends."""
    m, options = model("sdar", 8), dict(gen_length=19, block_length=8, threshold=0.5, mask_id=MASK, eos_id=59)
    (x, short), (y, long) = (llada2.generate_cached(m, one(5), editing_threshold=2.0, max_post_steps=n, **options) for n in (0, 16))
    assert x.equal(y) and long["nfe"] == short["nfe"] + 3
    assert llada2.generate(m, one(5), return_stats=False, editing_threshold=2.0, **options).equal(x)
    torch.manual_seed(0)
    a, _ = llada2.generate_cached(m, one(5), temperature=1.0, top_k=5, top_p=0.9, **options)
    torch.manual_seed(0)
    b, _ = llada2.generate_cached(m, one(5), temperature=1.0, top_k=5, top_p=0.9, **options)
    assert a.equal(b)


def test_arguments_in_every_form_that_the_authors_take():
    """Stop ids in a tensor or an array, a list of none; filters that are off at -1 and above 1; ids that never come."""
    m, options = model("sdar", 8), dict(mask_id=MASK, gen_length=24, block_length=4, temperature=0.0)
    whole = sdar.block_diffusion_generate(m, one(6), **options)
    first = int(whole[0, 6])
    stopped = sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=[first], **options)
    assert stopped.eq(MASK).any() and not whole.eq(MASK).any()
    for ids in (torch.tensor([first]), np.array([first, 59]), (first,), [-1, first], torch.tensor([first, -1])):
        assert sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=ids, **options).equal(stopped)
    for ids in ([], [-1], None):
        assert sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=ids, **options).equal(whole)
    refused(lambda: sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=7, **options), "must be a list of token ids or None, got 7")
    refused(lambda: sdar.block_diffusion_generate(m, one(6), stopping_criteria_idx=[0.5], **options), "stopping_criteria_idx[0] must be an integer >= -1")

    def drawn(call, **filters):
        torch.manual_seed(0)
        out = call(one(6), temperature=1.0, **filters)
        return out[0] if isinstance(out, tuple) else out

    def sdar_(prompt, **more):
        return sdar.block_diffusion_generate(m, prompt, **options | more)

    def llada2_(prompt, **more):
        return llada2.generate_cached(m, prompt, gen_length=24, block_length=8, mask_id=MASK, **dict(eos_id=-1) | more)

    def v2(prompt, **more):
        return fast_dllm_v2.generate(model("v2", 8), prompt, **dict(max_new_tokens=16, block_size=8, small_block_size=4, mask_id=MASK, stop_token=-1) | more)

    for call, off in ((sdar_, dict(top_k=-1, top_p=2.0)), (llada2_, dict(top_k=-1, top_p=1.5, eos_early_stop=True)), (v2, dict(top_p=1.5))):
        plain = dict(top_p=1.0)
        assert drawn(call, **off).equal(drawn(call, **plain))
        refused(lambda call=call: drawn(call, top_p=0.0), "top_p must be a number in (0, inf)")
    for edits in (-1.0, math.inf):
        assert llada2_(one(6), editing_threshold=edits)[0].equal(llada2_(one(6), editing_threshold=min(max(edits, 0.0), 1.0))[0])


def refused(call, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        call()
    assert words in str(caught.value)


def test_compat_refuses():
    m, shifted, ids = model("sdar", 8), model("v2", 8), one(5)
    two = torch.cat([ids, ids])
    for call in (
        lambda m, x, **o: llada2.generate(m, x, **dict(mask_id=MASK, eos_id=59, gen_length=8) | o),
        lambda m, x, **o: sdar.block_diffusion_generate(m, x, **dict(mask_id=MASK, gen_length=8) | o),
    ):
        refused(lambda c=call: c(shifted, ids), "unshifted logits, got")
        refused(lambda c=call: c(make(), ids), "block-causal")
        refused(lambda c=call: c(torch.nn.Linear(1, 1), ids), "one from unmask.load, got Linear")
        refused(lambda c=call: c(m, two), "one prompt [1, P]")
        refused(lambda c=call: c(m, ids.float()), "int64 tensor")
        refused(lambda c=call: c(m, ids, mask_id=61), "mask_id must be below the model's vocabulary size 61")
        refused(lambda c=call: c(m, ids, block_length=0), "block_length must be an integer")
        refused(lambda c=call: c(m, ids, gen_length=-1), "gen_length must be an integer")
        refused(lambda c=call: c(m, ids, temperature=-1.0), "temperature")
    refused(lambda: sdar.block_diffusion_generate(m, ids, MASK, remasking_strategy="entropy_bounded"), "low_confidence_dynamic")
    refused(lambda: llada2.generate(m, ids, mask_id=MASK, eos_id=59, num_to_transfer=0), "num_to_transfer")
    v2 = dict(max_new_tokens=8, mask_id=MASK, stop_token=59, block_size=8, small_block_size=4)
    refused(lambda: fast_dllm_v2.generate(m, ids, **v2), "with shifted logits, got llada, block-causal, unshifted")
    refused(lambda: fast_dllm_v2.generate(shifted, ids, **v2 | dict(small_block_size=3)), "multiple of small_block_size")
    refused(lambda: fast_dllm_v2.generate(shifted, ids, **v2 | dict(max_new_tokens=None)), "give max_new_tokens or max_length")
    refused(lambda: fast_dllm_v2.generate(shifted, ids, **v2 | dict(threshold=float("nan"))), "threshold")


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
