"""The fused LM head for Hopper, run lane by lane on the CPU, against logit_stats on the logits of the same product."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
from native import native
from stats_cases import arguments, assert_same, call
from unmask.ops.info import Status

HALF = (torch.bfloat16, torch.float16)


def finite(vocab: int, dtype: torch.dtype, seed: int, temperature: float) -> dict:
    """A call whose 5 rows hold numbers only: a product cannot make one NaN without its neighbours."""
    a = call(vocab, dtype, seed, temperature)
    a["logits"] = a["logits"].float().nan_to_num(1.0, 3.0, -3.0).to(dtype)
    return a


def as_product(logits: torch.Tensor, width: int = 72) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [5, width] and weight [V, width] whose product is exactly `logits`."""
    weight = torch.zeros(logits.shape[1], width, dtype=logits.dtype)
    at = torch.randperm(width)[:5]
    weight[:, at] = logits.T
    hidden = torch.zeros(5, width, dtype=logits.dtype)
    hidden[torch.arange(5), at] = 1
    return hidden, weight


def quarters(*size: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
    """Numbers whose products add up exactly in fp32, so that only the last rounding, to the dtype, is left."""
    return (torch.randint(-8, 9, size, generator=generator) / 4).to(dtype)


@pytest.mark.parametrize("vocab", (1, 7, 63, 64, 65, 191, 192, 193, 700, 1500))
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_same_as_logit_stats(vocab, temperature):
    for i, dtype in enumerate(HALF):
        a = finite(vocab, dtype, vocab + 3 * i, temperature)
        hidden, weight = as_product(a["logits"])
        for when in (0, 1, 2):
            assert_same(emulated.fused_head_stats(a, hidden, weight, 1 + vocab % 4, when), native("logit_stats")(*arguments(a)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("entries", (1, 8, 31, 32, 33, 64))
def test_products(entries, dtype):
    """Dense products, with ties."""
    hidden, weight = quarters(entries, 200, dtype=dtype), quarters(500, 200, dtype=dtype)
    key = torch.arange(entries)
    a = {"topk": 3, "temperature": 0.0, "seed": key, "step": key, "pos": key, "ids": torch.randint(0, 500, (entries, 5))}
    got = emulated.fused_head_stats(a, hidden, weight, 2, entries % 3)
    want = native("logit_stats")(*arguments(a | {"logits": (hidden.double() @ weight.double().T).float().to(dtype)}))
    assert_same(got, want)


def test_a_bias_behind_a_tile_leaves_the_tile_alone():
    """-inf + inf would be NaN at places of a tile that hold no id."""
    key, inf = torch.arange(3), float("inf")
    a = {"topk": 2, "temperature": 0.0, "seed": key, "step": key, "pos": key}
    a["bias_ids"] = torch.tensor([[199, 3], [130, 131], [260, 64]])
    a["bias"] = torch.tensor([[inf, 1.0], [inf, 2.0], [inf, 0.5]])
    logits = quarters(3, 264, dtype=torch.bfloat16)
    hidden, weight = torch.eye(3, 8).bfloat16(), torch.zeros(264, 8).bfloat16()
    weight[:, :3] = logits.T
    want = native("logit_stats")(*arguments(a | {"logits": logits}))
    for multiprocessors in (1, 2, 5):
        assert_same(emulated.fused_head_stats(a, hidden, weight, multiprocessors), want)
    a["bias_ids"][:, 0] = 300  # outside of the vocabulary
    short = {**a, "logits": logits}
    assert_same(emulated.logit_stats(short), native("logit_stats")(*arguments(short)))


def test_rows_of_a_larger_batch_have_the_same_bits():
    hidden, weight = torch.randn(40, 72).bfloat16(), torch.randn(1000, 72).bfloat16()
    key = torch.arange(40)
    a = {"topk": 2, "temperature": 0.5, "seed": key, "step": key, "pos": key}
    whole = emulated.fused_head_stats(a, hidden, weight)
    for e in (0, 17, 39):
        alone = {name: v[e : e + 1] if isinstance(v, torch.Tensor) else v for name, v in a.items()}
        got = emulated.fused_head_stats(alone | {"rows": torch.tensor([e])}, hidden, weight)
        for g, w in zip(got, whole, strict=True):
            assert torch.equal(g, w[e : e + 1])


def test_a_nan_stays_in_its_row():
    hidden, weight = torch.randn(6, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    key = torch.arange(6)
    a = {"topk": 2, "temperature": 0.0, "seed": key, "step": key, "pos": key}
    clean = emulated.fused_head_stats(a, hidden, weight)
    hidden[2, 5] = float("nan")
    got = emulated.fused_head_stats(a, hidden, weight)
    assert got[2].tolist() == [0, 0, int(Status.NAN), 0, 0, 0] and got[0][2, 0] == -1
    for e in (0, 1, 3, 4, 5):
        assert all(torch.equal(g[e], c[e]) for g, c in zip(got, clean, strict=True))


@given(st.integers(1, 64), st.integers(1, 900), st.integers(1, 9), st.integers(1, 5), st.integers(0, 999), st.sampled_from([0.0, 1.0]), st.integers(0, 2))
@settings(max_examples=200)
def test_any_size(entries, vocab, eighths, multiprocessors, seed, temperature, when):
    g = torch.Generator().manual_seed(seed)
    width = 8 * eighths
    hidden = quarters(entries + 1, width + 8, dtype=torch.float16, generator=g)
    weight = quarters(vocab, width, dtype=torch.float16, generator=g)
    hidden = hidden[1:, :width]  # rows with a stride
    key = torch.randint(0, 1 << 40, (entries,), generator=g)
    a = {"topk": seed % 9, "temperature": temperature, "seed": key, "step": key, "pos": key}
    a["rows"] = torch.randint(-2, entries + 2, (entries,), generator=g) if seed % 2 else None
    a["forbid"] = torch.randint(0, vocab, (seed % 4,), generator=g)
    got = emulated.fused_head_stats(a, hidden, weight, multiprocessors, when)
    logits = (hidden.double() @ weight.double().T).float().half()
    assert_same(got, native("logit_stats")(*arguments(a | {"logits": logits})))


def test_plan():
    lib = emulated.build("emulate_head_stats.cpp")
    out, span = (ctypes.c_int64 * 6)(), (ctypes.c_int64 * 2)()

    def plan(entries, vocab, multiprocessors=132, shared=232448):
        lib.head_plan(*map(ctypes.c_int64, (entries, vocab, multiprocessors, shared)), out)
        return tuple(out)

    tokens, units, blocks, stages, stage_bytes, shared = plan(32, 126_464)
    assert (tokens, units, blocks, stages, stage_bytes) == (32, 1976, 132, 7, 28672) and shared <= 232448
    assert plan(33, 126_464)[0] == 64 and plan(64, 126_464)[3] == 6 and plan(64, 126_464)[5] <= 232448
    assert plan(1, 5)[1:3] == (1, 1)
    for vocab in (1, 64, 65, 32_000, 126_464, 152_064, 157_184, 2**31 - 200):
        _, units, blocks, *_ = plan(1, vocab)
        reached, longest = 0, 0
        for block in range(blocks):
            lib.head_unit_range(*map(ctypes.c_int64, (block, blocks, units)), span)
            assert span[0] == reached < span[1]
            reached, longest = span[1], max(longest, span[1] - span[0])
        assert reached == units == -(-vocab // 64) and longest <= -(-units // blocks)
