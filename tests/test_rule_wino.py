"""WINO against itself written down: blind probabilities from separate dense forwards, the two rules in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from random_models import make
from unmask.decode.backend import NativeBackend, make_plan
from unmask.decode.policy import Policy
from unmask.decode.rules.base import Run, StepView
from unmask.decode.schedule import FixedBlocks
from unmask.decode.state import DecodeState
from unmask.ops import LogitStats

MASK = 60


def dense_blind(model, ids: list[int], s: int, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [L, V] of the canvas alone, and [e - s, V] of the shadow, by a plain transformer over canvas + shadow with a dense mask."""
    c, w = model.config, weights(model)
    n, b = len(ids), e - s
    tokens = torch.tensor(ids + [MASK] * b)
    pos = torch.tensor([*range(n), *range(s, e)])
    see = torch.zeros(n + b, n + b, dtype=torch.bool)
    see[:n, :n] = True  # canvas tokens see the canvas
    see[n:, :] = True  # shadow tokens see everything
    for j in range(b):
        see[n + j, s + j] = False  # but the token that they re-predict
    x = w["embed"][tokens].double()
    half = c.head_dim // 2
    angle = pos[:, None].double() * (1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).double() / c.head_dim))
    cos, sin = (torch.cat([f, f], 1)[:, None] for f in (angle.cos(), angle.sin()))
    turn = lambda t: t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin  # noqa: E731
    norm = lambda t: t * torch.rsqrt((t * t).mean(-1, keepdim=True) + c.norm_eps)  # noqa: E731
    for layer in w["layers"]:
        y = norm(x)
        q, k, v = ((y @ layer[m].double().T).view(n + b, c.n_heads, c.head_dim) for m in "qkv")
        score = torch.einsum("ihd,jhd->hij", turn(q), turn(k)) / math.sqrt(c.head_dim)
        a = score.masked_fill(~see, -math.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", a, v).reshape(n + b, -1) @ layer["o"].double().T
        y = norm(x)
        x = x + (torch.nn.functional.silu(y @ layer["gate"].double().T) * (y @ layer["up"].double().T)) @ layer["down"].double().T
    p = (norm(x) @ w["head"].double().T).softmax(-1)
    return p[:n], p[n:]


def weights(model, seed: int = 7) -> dict:
    """The weights of `make(seed)`, drawn again in the order of `random_model`."""
    c, g = model.config, torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g) * 0.25  # noqa: E731
    d, q, f = c.d_model, c.n_heads * c.head_dim, c.ffn_dim
    embed = draw(c.vocab_size, d)
    layers = [dict(q=draw(q, d), k=draw(q, d), v=draw(q, d), o=draw(d, q), gate=draw(f, d), up=draw(f, d), down=draw(d, f)) for _ in range(c.n_layers)]
    return dict(embed=embed, layers=layers, head=draw(c.vocab_size, d))


def state_of(canvases, block=6):
    ids = [[MASK if t is None else t for t in c] for c in canvases]
    return DecodeState(ids, [[t is not None for t in c] for c in canvases], MASK, FixedBlocks(block), None, [0] * len(ids), torch.device("cpu"))


CANVASES = [[1, 2, 3, None, 4, None, None, None, None, None, None], [None] * 5, [9, 8, None, None, 7, None, None, None]]


def decided_in_part(state) -> None:
    """Some undecided positions of every block get tokens, as after a step."""
    for row in state.rows:
        for i in range(row.block_start, row.block_end):
            if state.masked[row.index, i] and i % 2:
                state.canvas[row.index, i], state.masked[row.index, i] = 20 + i, False


@torch.inference_mode()
def shadow_stats(model, state, plan):
    policy = Policy("wino")
    backend = NativeBackend(model, state, MASK, extra_slots=6)
    rule = policy.lower(Run(policy, state, MASK, backend))
    step = StepView(state, state.rows, plan, False)
    return step, backend.stats(plan, rule.wanted(step), shadow=True, **rule.options(step)), backend


def test_shadow_rows_are_blind_and_canvas_rows_do_not_see_them():
    model = make(seed=7)
    state = state_of(CANVASES)
    decided_in_part(state)
    plan = make_plan(state, tuple((r.index, 0, r.end, r.block_start, r.block_end) for r in state.rows))
    step, stats, _ = shadow_stats(model, state, plan)
    apart = []
    for i, (entry, p) in enumerate(zip(step.entry.tolist(), step.pos.tolist(), strict=True)):
        row = state.rows[entry]
        real, blind = dense_blind(model, state.canvas[entry, : row.end].tolist(), row.block_start, row.block_end)
        if state.masked[entry, p]:
            z = real[p].clone()
            z[MASK] = 0.0
            assert int(stats.token[i]) == int(z.argmax()) and float(stats.p[i]) == pytest.approx(float(z.max()), abs=1e-5)
        elif not state.given[entry, p]:
            own = blind[p - row.block_start]
            assert float(stats.at_ids[i, 0, 0].exp()) == pytest.approx(float(own[state.canvas[entry, p]]), abs=1e-5)
            apart.append(float((own - real[p]).abs().max()))
    assert len(apart) >= 6 and min(apart) > 1e-3  # the canvas's own row, which sees its token, is another one


def test_a_blind_row_does_not_depend_on_its_token():
    """Whatever stands at a position, its shadow row predicts the same, bit for bit, and what shadow tokens hold moves no canvas row. One layer:
    with more, a token reaches its shadow row by way of the canvas tokens that have seen it, as in the paper."""
    model = make(seed=7, n_layers=1)
    hidden = []
    model.register_forward_hook(lambda module, args, out: hidden.append(out.clone()))
    state = state_of(CANVASES)
    decided_in_part(state)
    plan = make_plan(state, tuple((r.index, 0, r.end, r.block_start, r.block_end) for r in state.rows))
    _, _, backend = shadow_stats(model, state, plan)
    shadow = backend._shadow
    rows = [int(shadow.shadow[e]) + p - state.rows[e].block_start for e, p in ((0, 5), (1, 3))]
    state.canvas[0, 5], state.canvas[1, 3] = 33, 44
    shadow_stats(model, state, plan)
    assert all(torch.equal(hidden[0][r], hidden[1][r]) for r in rows)
    assert not torch.equal(hidden[0][rows[0] + 1], hidden[1][rows[0] + 1])  # its neighbour does see it
    forward = shadow.forward
    real = shadow.real
    with torch.inference_mode():
        forward.ids[real] = state.canvas.view(-1).index_select(0, plan.flat)
        once = model(forward, model.new_cache(3, 32))
        forward.ids[[i for i in range(forward.ids.shape[0]) if i not in real.tolist()]] = 17
        again = model(forward, model.new_cache(3, 32))
    assert torch.equal(once[real], again[real]) and not torch.equal(once, again)


def test_nothing_out_is_a_capped_threshold():
    """narrow_out = 0: above wide_in commits, at most int(0.7 masks) within 5 to 20 of them, at least the best."""
    model = make(seed=7)
    for wide_in in (0.0, 0.3, 0.6, 1.0):
        r = unmask.generate(model, [1, 2], max_new_tokens=40, block_size=40, policy="wino", wide_in=wide_in, narrow_out=0.0, trace=True, eos_stop=False)
        canvas, masks = [1, 2] + [MASK] * 40, 40
        for x in r.trace:
            p = model.logits(torch.tensor([canvas]))[0].double().softmax(-1)
            p[:, MASK] = 0.0
            best = {i: float(p[i].max()) for i in range(42) if canvas[i] == MASK}
            most = min(max(int(0.7 * masks), 5), 20)
            n = max(1, min(sum(v > wide_in for v in best.values()), most))
            assert sorted(c[0] for c in x["committed"]) == sorted(sorted(best, key=lambda i: (-best[i], i))[:n]) and not x["remasked"]
            for i, t, _ in x["committed"]:
                canvas[i] = t
            masks -= n


@given(data=st.data())
def test_rule_is_the_literal_rule(data):
    """select and after on statistics made by hand: three rows, several steps, blind probabilities and confidences drawn, ties too."""
    n = data.draw(st.integers(2, 12))
    canvases = [data.draw(st.lists(st.sampled_from([None, None, 5]), min_size=n, max_size=n)) for _ in range(3)]
    canvases = [c if None in c else [None, *c[1:]] for c in canvases]
    wide_in, narrow_out = (data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])) for _ in range(2))
    state = state_of(canvases, block=16)
    policy = Policy("wino", knobs=dict(wide_in=wide_in, narrow_out=narrow_out))

    class Backend:
        shifted = False

    rule = policy.lower(Run(policy, state, MASK, Backend()))
    plan = make_plan(state, tuple((r.index, 0, r.end, r.block_start, r.block_end) for r in state.rows))
    before = {r.index: 30 for r in state.rows}
    value = st.sampled_from([0.125, 0.25, 0.375, 0.5, 0.625, 0.75])
    from unmask import ops

    for _ in range(4):
        total = plan.cand_pos.shape[0]
        conf, blind = ([data.draw(value) for _ in range(total)] for _ in range(2))
        stats = torch.zeros(total, 6)
        stats[:, 0], stats[:, 5] = torch.tensor(conf), 1.0 - torch.tensor(conf)
        at = torch.stack([torch.tensor(blind).log(), torch.zeros(total)], 1)[:, None]
        none = torch.empty(total, 0)
        made = LogitStats.pack(torch.full((total,), 7), stats, torch.zeros(total, dtype=torch.int32), at, none.long(), none)
        step = StepView(state, state.rows, plan, False)
        masked, given_ = step.masked.clone(), step.given
        selection = rule.select(step, made, made.confidence)
        committed = ops.commit(
            state.canvas, state.masked, plan.cu, plan.row, plan.cand_pos, made.token, selection.score, rule=selection.rule, quota=selection.quota
        ).committed  # fmt: skip
        back = rule.after(step, made, selection, committed)
        for entry in range(3):
            mine = [i for i in range(total) if int(step.entry[i]) == entry]
            open_ = [i for i in mine if masked[i]]
            order = sorted(open_, key=lambda i: (-conf[i], i))
            wide = [i for i in order if conf[i] > wide_in][: min(max(int(0.7 * len(open_)), 5), 20)] or order[:1]
            assert {i for i in mine if committed[i]} == set(wide)
            out = []
            if len(wide) > 1:
                out = [i for i in mine if not masked[i] and not given_[i] and blind[i] < narrow_out]
                if len(out) >= before[entry]:
                    out = sorted(out, key=lambda i: (blind[i], i))[: before[entry] - 1]
            assert {i for i in mine if back[i]} == set(out)
            before[entry] = len(wide)
        flat = plan.cand_flat[back]
        state.canvas.view(-1)[flat], state.masked.view(-1)[flat] = MASK, True
        for row in state.rows:
            row.step += 1


def test_shifted_models_and_rows_that_begin_at_0():
    with pytest.raises(unmask.SettingError, match="needs logits that are not shifted"):
        unmask.generate(make(shifted=True), [1, 2], policy="wino")
    model = make(seed=7, shifted=True)
    settings = dict(policy="wino", variant="d2cache", wide_in=0.3, narrow_out=0.5, block_size=8, max_new_tokens=16, trace=True)
    batch = unmask.generate(model, [[], [1, 2, 3]], **settings)  # the first row's first position predicts itself
    alone = unmask.generate(model, [[1, 2, 3]], **settings)[0]
    assert batch[1].canvas == alone.canvas and batch[1].nfe == alone.nfe
