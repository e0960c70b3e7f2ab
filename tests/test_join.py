"""Rows that join a running batch: the engine's side of continuous batching."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from random_models import make, prompts
from unmask import SoftMasks
from unmask.decode.backend import Guidance, NativeBackend
from unmask.decode.caches import CACHES
from unmask.decode.engine import Engine
from unmask.decode.policy import Policy
from unmask.decode.schedule import AlignedBlocks, FixedBlocks
from unmask.decode.shadow import shadow_slots
from unmask.decode.state import DecodeState
from unmask.errors import SettingError

NEW, BLOCK = 14, 4


def order_logits(step):
    return (step.pos * 7 % 5).float()


POLICIES = [
    Policy(rule="threshold", knobs=dict(threshold=0.3)),
    Policy(rule="quota", temperature=1.0),
    Policy(rule="klass", knobs=dict(threshold=0.2, kl_threshold=0.05)),
    Policy(rule="credit", knobs=dict(threshold=0.4)),
    Policy(rule="slowfast"),
    Policy(rule="edit", knobs=dict(threshold=0.3, edit_threshold=0.4)),
    Policy(rule="dream", knobs=dict(steps=5)),
    Policy(rule="plackett_luce", knobs=dict(order_logits=order_logits)),
    Policy(rule="remdm", knobs=dict(strategy="conf", steps=6)),
    Policy(rule="remask"),
    Policy(rule="wino", knobs=dict(wide_in=0.3, narrow_out=0.4)),
]
NO_CACHE = ("remdm", "remask", "wino")
MODELS = {
    "bidirectional": dict(n_layers=2),
    "shifted": dict(n_layers=2, shifted=True, qkv_bias=True),
    "block_causal": dict(n_layers=2, visibility="block_causal", block_size=BLOCK, qk_norm=True),
}


def canvas(prompt):
    length = -(-(len(prompt) + NEW) // BLOCK) * BLOCK
    return prompt + [60] * (length - len(prompt)), [True] * len(prompt) + [False] * (length - len(prompt))


def engine(model, requests, policy, cache, soft=None, **room):
    blocks = AlignedBlocks(BLOCK) if model.config.visibility == "block_causal" else FixedBlocks(BLOCK)
    rows = [canvas(p) for p, _ in requests]
    state = DecodeState([c for c, _ in rows], [g for _, g in rows], 60, blocks, None, [s for _, s in requests], model.device, **room)
    backend = NativeBackend(model, state, 60, extra_slots=shadow_slots(policy, state), soft=None if soft is None else soft.start(state, 60))
    return Engine(state, backend, policy, cache=cache)


def alone(model, request, policy, cache, soft=None):
    run = engine(model, [request], policy, cache, soft)
    list(run.run())
    row = run.state.rows[0]
    return run.state.canvas[0, : row.end].tolist(), row.nfe


def joined(model, requests, policy, cache, soft, places, waits):
    """Canvas and NFE of every request, decoded in `places` places; waits[i]: steps between request i's turn and its joining."""
    run = engine(model, [], policy, cache, soft, rows_at_least=places, length_at_least=len(canvas([0] * 12)[0]))
    queue, done, where, wait = list(range(len(requests))), {}, {}, list(waits)

    def collect():
        for index, request in list(where.items()):
            row = run.state.rows[index]
            if not row.active:
                done[request] = run.state.canvas[index, : row.end].tolist(), row.nfe
                del where[index]

    while queue or where:
        while queue and len(where) < places and (wait[queue[0]] <= 0 or not where):
            request = queue.pop(0)
            row = run.join(*canvas(requests[request][0]), requests[request][1])
            where[row.index] = request
        if queue:
            wait[queue[0]] -= 1
        next(run.run(), None)
        collect()
    return [done[i] for i in range(len(requests))]


def combinations():
    for kind, fields in MODELS.items():
        for policy in POLICIES:
            for name, rule in CACHES.items():
                if fields.get("visibility", "bidirectional") not in rule.visibility:
                    continue
                if policy.rule in NO_CACHE and name not in ("none", "block") or policy.rule == "wino" and kind != "bidirectional":
                    continue
                yield pytest.param(kind, policy, name, id=f"{kind}-{policy.rule}-{name}")


def served(policy, cache, model):
    try:
        CACHES[cache]().check(policy, model.config)
    except SettingError:
        return False
    return True


@pytest.mark.parametrize("kind, policy, cache", list(combinations()))
def test_a_row_that_joins_gets_what_it_gets_alone(kind, policy, cache):
    model = make(**MODELS[kind])
    if not served(policy, cache, model):
        with pytest.raises(SettingError):
            CACHES[cache]().check(policy, model.config)
        return
    requests = list(zip(prompts(5, seed=3), [5, 1 << 40, 7, 8, 9], strict=True))
    expected = [alone(model, r, policy, cache) for r in requests]
    assert joined(model, requests, policy, cache, None, 2, [0, 2, 1, 0, 3]) == expected
    assert len({nfe for _, nfe in expected}) > 1 or policy.rule in ("quota", "dream", "slowfast", "plackett_luce", "remdm", "remask")


@given(st.data())
def test_any_times_of_joining(data):
    policy = data.draw(st.sampled_from(POLICIES[:4]))
    kind = data.draw(st.sampled_from(list(MODELS)))
    cache = data.draw(st.sampled_from(["none", "dual"] + (["block"] if kind == "block_causal" else ["prefix"])))
    model = make(data.draw(st.integers(0, 3)), **MODELS[kind])
    n = data.draw(st.integers(1, 4))
    requests = [(p, i + 1) for i, p in enumerate(prompts(n, seed=data.draw(st.integers(0, 9))))]
    waits = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    got = joined(model, requests, policy, cache, None, data.draw(st.integers(1, 3)), waits)
    assert got == [alone(model, r, policy, cache) for r in requests]


def test_soft_masks_of_the_row_before_are_forgotten():
    model, soft, policy = make(), SoftMasks(), POLICIES[0]
    requests = list(zip(prompts(4, seed=5), range(4), strict=True))
    assert joined(model, requests, policy, "none", soft, 1, [0] * 4) == [alone(model, r, policy, "none", soft) for r in requests]


def test_what_does_not_fit_is_refused():
    model, policy = make(), POLICIES[0]
    run = engine(model, [([1, 2], 0)], policy, "none")
    with pytest.raises(ValueError, match="all 1 rows are being decoded"):
        run.join(*canvas([1]))
    list(run.run())
    with pytest.raises(ValueError, match="at most 16 tokens long, got 28"):
        run.join(*canvas([1] * 12))
    with pytest.raises(ValueError, match="one flag per token, 3 here, got 2"):
        run.join([1, 2, 3], [True, False])
    before = run.state.canvas.clone()
    run.join(*canvas([3]))
    assert not torch.equal(before, run.state.canvas)
    state = DecodeState([[60] * 4], [[False] * 4], 60, FixedBlocks(4), None, [0], model.device, rows_at_least=2)
    guided = Engine(state, NativeBackend(model, state, 60, Guidance(1.5)), policy)
    with pytest.raises(SettingError, match="guidance"):
        guided.join([60] * 4, [False] * 4)
