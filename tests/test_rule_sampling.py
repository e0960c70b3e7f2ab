"""What shapes the distribution that tokens are drawn from and scored by, against dense references: filters, penalty, guidance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from literal import MASK, VOCAB, Script, tables
from random_models import make
from unmask.reference.noise import gumbel

LENGTH = 9


def filtered(z: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None, k_first: bool) -> torch.Tensor:
    """Dream's (or SDAR's) order, by sorting: float64 log-weights, -inf where removed."""
    z = z.double() / (temperature or 1.0)

    def p_filter(z):
        if top_p is None:
            return z
        s, order = z.sort(descending=True, stable=True)
        before = s.softmax(0).cumsum(0) - s.softmax(0)
        out = z.clone()
        out[order[before > top_p]] = -math.inf
        return out

    def k_filter(z):
        return z if top_k is None else torch.where(z < z.sort(descending=True).values[min(top_k, len(z)) - 1], -math.inf, z)

    return p_filter(k_filter(z)) if k_first else k_filter(p_filter(z))


@given(
    seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]), top_p=st.sampled_from([None, 0.3, 0.8, 0.95]),
    top_k=st.sampled_from([None, 1, 3, 50]), k_first=st.booleans(), tempered=st.booleans(),
)  # fmt: skip
def test_filters_and_confidence_source(seed, temperature, top_p, top_k, k_first, tempered):
    """The first forward's tokens and confidences of one block, all at once."""
    x = tables(seed, 1, LENGTH, forwards=1)[0]
    r = unmask.infill(
        Script([x]), [0, *[None] * (LENGTH - 1)], threshold=0.0, block_size=64, trace=True, seeds=[7], temperature=temperature, top_p=top_p,
        top_k=top_k, top_k_first=k_first, confidence_source="tempered" if tempered else "clean",
    )  # fmt: skip
    made = {p: (t, s) for p, t, s in r.trace[0]["committed"]}
    shaped = top_p is not None or top_k is not None or (tempered and temperature > 0)
    for i in range(1, LENGTH):
        z = x[0, i].clone()
        kept = filtered(z, temperature, top_p, top_k, k_first)
        allowed = torch.where(kept > -math.inf, z, -math.inf).double()
        allowed[MASK] = -math.inf
        if bool((allowed == -math.inf).all()):  # nothing but the mask token is left: the best other one stays
            z[MASK] = -math.inf
            allowed[z.argmax()] = float(z.max())
            kept[z.argmax()] = float(z.max()) / (temperature or 1.0)
        if temperature:
            one = torch.ones(1, dtype=torch.int64)
            allowed = allowed + temperature * gumbel(7 * one, 0 * one, i * one, torch.arange(VOCAB))[0].double()
        top = allowed.sort(descending=True).values
        if float(top[0] - top[1]) < 1e-5:
            continue
        token, score = made[i]
        assert token == int(allowed.argmax())
        p = (kept if shaped else x[0, i].double()).softmax(0)
        assert score == pytest.approx(float(p[token]), abs=2e-6)


@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([0.7, 1.0, 1.3, 4.0]), held=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_repetition_penalty(seed, penalty, held):
    canvas = [0, *held[1:], *[None] * 3, held[0], *[None] * 3]
    x = tables(seed, 1, len(canvas), forwards=1)[0]
    r = unmask.infill(Script([x]), canvas, threshold=0.0, block_size=64, trace=True, repetition_penalty=penalty)
    made = {p: (t, s) for p, t, s in r.trace[0]["committed"]}
    ids = sorted({t for t in canvas if t is not None})
    for i in [i for i, t in enumerate(canvas) if t is None]:
        z = x[0, i].double()
        z[ids] = torch.where(z[ids] > 0, z[ids] / penalty, z[ids] * penalty)
        p = z.softmax(0)
        z[MASK] = -math.inf
        top = z.sort(descending=True).values
        if float(top[0] - top[1]) > 1e-5:
            assert made[i][0] == int(z.argmax()) and made[i][1] == pytest.approx(float(p[made[i][0]]), abs=2e-6)


def test_a_decided_token_does_not_repeat_itself():
    """Editing with a penalty: a token that stands nowhere else keeps its own logit at its position."""
    x = torch.zeros(4, 4, VOCAB)
    for i, t in ((1, 3), (2, 4), (3, 5)):
        x[:, i, t] = 2.0
        x[:, i, 6] = 1.5
    settings = dict(policy="edit", threshold=0.0, edit_threshold=0.2, block_size=8, trace=True)
    r = unmask.infill(Script([x]), [0, None, None, None], repetition_penalty=4.0, **settings)
    assert r.canvas == [0, 3, 4, 5] and not any(t["edited"] for t in r.trace)
    x[:, 2, 3], x[:, 2, 4] = 2.0, 0.0  # now positions 1 and 2 both want token 3, and hold it
    r = unmask.infill(Script([x]), [0, None, None, None], repetition_penalty=4.0, **settings)
    assert [e[:3] for e in r.trace[1]["edited"]] == [[1, 3, 6], [2, 3, 6]]


# guidance


def dense_guided(model, canvas: list[int], given: list[bool], weight: float, negative: list[int] | None, shifted: bool) -> torch.Tensor:
    """Logits [L, V] by two whole forwards, u + weight (c - u), each read where its own input predicts the position."""
    start = given.index(False)
    null = [MASK60 if g else t for t, g in zip(canvas, given, strict=True)] if negative is None else negative + canvas[start:]
    move = 0 if negative is None else len(negative) - start
    c, u = (model.logits(torch.tensor([ids]))[0].double() for ids in (canvas, null))
    out = torch.zeros_like(c)
    for i in range(start, len(canvas)):
        ci, ui = (max(i - 1, 0), max(i + move - 1, 0)) if shifted else (i, i + move)
        out[i] = u[ui] + weight * (c[ci] - u[ui])
    return out


MASK60 = 60


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("negative", [None, [9], [9, 8, 7, 6, 5, 4]], ids=str)
def test_guidance_is_two_forwards(shifted, negative):
    model = make(seed=9, shifted=shifted)
    canvas = [1, 2, 3, None, None, 4, None, None]
    for w in (0.5, 2.0):
        r = unmask.infill(model, canvas, cfg_scale=w, negative_prompt=negative, threshold=0.0, block_size=64, trace=True)
        given_ = [t is not None for t in canvas]
        z = dense_guided(model, [MASK60 if t is None else t for t in canvas], given_, w + 1.0, negative, shifted)
        p = z.softmax(-1)
        z[:, MASK60] = -math.inf
        for i, t, s in r.trace[0]["committed"]:
            top = z[i].sort(descending=True).values
            assert float(top[0] - top[1]) < 1e-4 or t == int(z[i].argmax())
            assert s == pytest.approx(float(p[i, t]), abs=1e-4)


def test_guidance_conventions():
    model = make(seed=9)
    strip = lambda r: (r.canvas, r.nfe, [x["committed"] for x in r.trace])  # noqa: E731
    settings = dict(threshold=0.4, block_size=8, trace=True)
    a = unmask.generate(model, [1, 2, 3], cfg_scale=0.75, **settings)
    b = unmask.generate(model, [1, 2, 3], cfg_scale=1.75, cfg_convention="dream", **settings)
    none = unmask.generate(model, [1, 2, 3], **settings)
    off = [unmask.generate(model, [1, 2, 3], cfg_scale=0.0, **settings), unmask.generate(model, [1, 2, 3], cfg_scale=1, cfg_convention="dream", **settings)]
    assert strip(a) == strip(b) != strip(none) and all(strip(x) == strip(none) for x in off)  # bit for bit
    everything = unmask.infill(model, [None] * 8, cfg_scale=3.0, **settings)  # nothing is given, so both inputs are the same one
    assert everything.canvas == unmask.infill(model, [None] * 8, **settings).canvas
