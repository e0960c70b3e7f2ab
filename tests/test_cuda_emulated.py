"""The CUDA kernels of logit_stats, run lane by lane on the CPU (emulate_warp.h), against the CPU kernel: what a machine without a GPU
can check of them. Lanes that would diverge at a warp operation, or load misaligned, fail here too."""

from __future__ import annotations

import ctypes

import pytest
import torch

import emulated
from native import native
from stats_cases import DTYPES, arguments, assert_same, call, guided
from unmask.ops.logit_stats import STATE_WORDS

SIZES = (1, 2, 7, 8, 511, 512, 513, 4095, 4096, 4097, 9001, 12288)


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("temperature", (0.0, 0.7, 30.0))
def test_same_as_the_cpu_kernel(vocab, temperature):
    for i, dtype in enumerate(DTYPES):
        for j, layout in enumerate(("dense", "padded") if vocab > 4097 else ("dense", "padded", "columns", "transposed")):
            a = call(vocab, dtype, seed=vocab + 3 * i + j, temperature=temperature, layout=layout)
            assert_same(emulated.logit_stats(a), native("logit_stats")(*arguments(a)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_bits_do_not_depend_on_the_launch_or_the_layout(dtype, temperature):
    """Groups of 1 to 3 chunks, 1 to 4 entries a launch, dense or strided rows, alone or in a batch."""
    a = call(9001, dtype, seed=12, temperature=temperature)
    want = emulated.logit_stats(a)
    for group_chunks, entries_per_launch in ((1, 1), (2, 4), (3, 3)):
        _same_bits(emulated.logit_stats(a, group_chunks, entries_per_launch), want)
    for layout in ("padded", "columns"):
        _same_bits(emulated.logit_stats(call(9001, dtype, seed=12, temperature=temperature, layout=layout)), want)
    for e in (0, 4):
        alone = dict(a)
        for name in ("rows", "bias_ids", "bias", "ids", "seed", "step", "pos"):
            alone[name] = a[name][e : e + 1]
        _same_bits(emulated.logit_stats(alone), tuple(t[e : e + 1] for t in want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (4097, 9001, 36870))
def test_a_cluster_gives_the_same_bits_as_two_launches(vocab, dtype):
    """One, and two, chunks a block; entries without a row, faults and lists included."""
    for temperature in (0.0, 0.8):
        a = call(vocab, dtype, seed=vocab, temperature=temperature)
        _same_bits(emulated.stats_cluster(a), emulated.logit_stats(a))


@pytest.mark.parametrize("vocab", (1, 9, 513, 4097, 9001))
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_guidance_is_the_cpu_kernels_and_keeps_its_bits(vocab, temperature):
    """Null logits of another layout than the logits; two launches and clusters; the last slice, behind which both sides read -inf."""
    for i, dtype in enumerate(DTYPES):
        plain = call(vocab, dtype, seed=vocab + 3 * i, temperature=temperature)
        for weight in (1.7, -0.5, 0.0):
            a = guided(plain, weight)
            got = emulated.logit_stats(a)
            assert_same(got, native("logit_stats")(*arguments(a)))
            materialised = {**plain, "logits": a["null_logits"] + weight * (a["logits"] - a["null_logits"])}
            _same_bits(got, emulated.logit_stats(materialised))
            if vocab > 4096:
                _same_bits(emulated.stats_cluster(a), got)
                _same_bits(emulated.logit_stats(a, 3, 2), got)
        for layout in ("padded", "columns", "transposed"):
            _same_bits(emulated.logit_stats(guided(plain, 1.7, layout)), emulated.logit_stats(guided(plain, 1.7)))


def test_cluster_plan():
    lib = emulated.library()
    out = (ctypes.c_int64 * 2)()

    def plan(entries, count, clusters=True):
        lib.emulated_cluster_plan(ctypes.c_int64(entries), ctypes.c_int64(count), ctypes.c_int64(clusters), out)
        return tuple(out)

    assert plan(32, 126_464) == (8, 4) and plan(32, 157_184) == (8, 5) and plan(1, 8192) == (2, 1) and plan(128, 5 * 4096) == (5, 1)
    assert plan(129, 126_464) == plan(32, 4096) == plan(32, 64 * 4096 + 1) == plan(32, 126_464, False) == (0, 0)
    for count in range(4097, 64 * 4096 + 1, 1777):
        blocks, warps = plan(7, count)
        assert 2 <= blocks <= 8 and 1 <= warps <= 8 and blocks * warps * 4096 >= count and (blocks - 1) * warps * 4096 < count


@pytest.mark.parametrize("temperature", (0.0, 0.9))
@pytest.mark.parametrize("seed", (4, 5, 8))
def test_tiles_give_the_same_bits_as_one_pass(temperature, seed):
    vocab = 9001
    a = call(vocab, torch.float32, seed, temperature)
    whole = {**a, "logits": a["logits"][a["rows"].clamp(0, 4)], "rows": None}
    state = torch.zeros(10, STATE_WORDS, dtype=torch.int32)
    id_logit = torch.full((4, 10), 777.0).T
    cpu_state, cpu_id_logit = state.clone(), id_logit.clone()
    for begin, end in ((0, 4096), (4096, vocab)):
        tile = {**whole, "logits": whole["logits"][:, begin:end]}
        emulated.stats_tile(tile, state, id_logit, begin, vocab)
        x = arguments(tile)
        native("stats_tile")(x[0], cpu_state, cpu_id_logit, begin, vocab, *x[2:])
    got = emulated.stats_finish(state, id_logit, a["topk"])
    _same_bits(got, emulated.logit_stats(whole))
    assert_same(got, native("stats_finish")(cpu_state, cpu_id_logit, a["topk"]))
    torch.testing.assert_close(state[:, :3], cpu_state[:, :3], rtol=0, atol=0)  # next, kept, status
    # a state of one backend finishes on the other
    assert_same(emulated.stats_finish(cpu_state, cpu_id_logit, a["topk"]), native("stats_finish")(cpu_state, cpu_id_logit, a["topk"]))


def test_tiles_out_of_order_are_reported():
    a = {**call(8192, torch.float32, 3), "rows": None, "ids": None}
    a["seed"] = a["step"] = a["pos"] = torch.zeros(5, dtype=torch.int64)
    state = torch.zeros(5, STATE_WORDS, dtype=torch.int32)
    emulated.stats_tile({**a, "logits": a["logits"][:, 4096:]}, state, None, 4096, 8192)
    token, stats, status, *_ = emulated.stats_finish(state, None, 0)
    assert (token == -1).all() and stats.isnan().all() and (status & 32 != 0).all()
    token, stats, status, *_ = emulated.stats_finish(torch.zeros(5, STATE_WORDS, dtype=torch.int32), None, 0)
    assert (token == -1).all() and (stats == 0).all() and (status == 0).all()


def test_large_vocabulary_merges_more_than_32_chunks_and_groups():
    torch.manual_seed(1)
    vocab = 40 * 4096 + 5
    one = torch.zeros(1, dtype=torch.int64)
    for temperature in (0.0, 1.0):
        a = {"logits": torch.randn(1, vocab), "topk": 8, "temperature": temperature, "seed": one, "step": one, "pos": one}
        assert_same(emulated.logit_stats(a), native("logit_stats")(*arguments(a)))


def test_plan():
    """Few rows spread over the machine, many rows get long groups, and the workspace stays bounded."""
    lib = emulated.library()
    out = (ctypes.c_int64 * 4)()
    for entries in (0, 1, 32, 1024, 1_000_000):
        for count in (1, 256, 4096, 126464, 152064, (1 << 31) - 1):
            lib.emulated_plan(ctypes.c_int64(entries), ctypes.c_int64(count), out)
            chunks, group_chunks, groups, per_launch = out
            assert chunks == -(-count // 4096) and groups == -(-chunks // group_chunks)
            assert 1 <= group_chunks <= min(8, chunks) and 1 <= per_launch <= max(entries, 1)
            assert per_launch == 1 or per_launch * (chunks * 12 + groups * 80) <= 1 << 26
            assert per_launch * groups < 1 << 31
    lib.emulated_plan(ctypes.c_int64(32), ctypes.c_int64(126464), out)
    assert list(out) == [31, 1, 31, 32]


def test_state_words_are_where_the_struct_has_them():
    out = (ctypes.c_int64 * 3)()
    emulated.library().emulated_state_words(out)
    assert list(out) == [0, 0, 0]


def _same_bits(got, want):
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.view(torch.int32) if g.dtype == torch.float32 else g, w.view(torch.int32) if w.dtype == torch.float32 else w)
