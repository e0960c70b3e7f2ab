"""One small call of every op, with what the reference makes of it: `unmask doctor` compares them, bench_overhead.py times them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ops, reference
from ..ops.head_stats import Head, head_stats
from ..ops.linear import packed_weights_available
from ..ops.logit_stats import CHUNK, new_state, stats_finish, stats_tile
from .examples_base import Example


def examples() -> list[Example]:
    """One per op of the library; without those for packed weights where torch has none."""
    g = torch.Generator().manual_seed(0)
    return [
        _info(),
        _uniform(),
        _rope_append(g),
        _block_attention(g),
        *_logit_stats(g),
        _filtered_stats(g),
        _kl_stats(g),
        _commit(g),
        *_verify(g),
        *_elementwise(g),
        *_mixture(g),
        *_packed(g),
    ]


def _packed(g: torch.Generator) -> list[Example]:
    if not packed_weights_available():
        return []
    from .examples_packed import packed_examples

    return packed_examples(g)


def _copies(values: Sequence[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]


def _info() -> Example:
    def known():
        return [
            torch.tensor(
                [0 <= torch.ops.unmask.info(1) <= torch.ops.unmask.info(2) < len(ops.info.ISA_NAMES)]
            )
        ]

    return Example("info", (1,), ops.isa, known, lambda: [torch.tensor([True])])


def _uniform() -> Example:
    key = torch.tensor([7, 7, -3]), torch.tensor([0, 1, 5]), torch.tensor([0, 2, 1 << 40])
    return Example(
        "uniform",
        key,
        lambda: ops.uniform(*key),
        lambda: [ops.uniform(*key)],
        lambda: [reference.uniform(*key)],
        0.0,
    )


def _rope_append(g: torch.Generator) -> Example:
    t, hq, hkv, d, slots = 5, 4, 2, 16, 8
    q, k, v = (torch.randn(t, h, d, generator=g) for h in (hq, hkv, hkv))
    index = torch.tensor([0, 0, 1, -1, 1]), torch.tensor([3, 4, 9, 0, 2]), torch.tensor([0, 7, 2, 0, -1])
    weights = torch.rand(d, generator=g), torch.rand(d, generator=g)
    inv_freq = 1.0 / 500000.0 ** (torch.arange(0, d, 2) / d)

    def call(module):
        caches = torch.zeros(2, hkv, slots, d), torch.zeros(2, hkv, slots, d)
        status = torch.zeros(t, dtype=torch.int32)
        out = module.rope_append(q, k, v, *caches, *index, None, *weights, inv_freq, 1e-6, status)
        return [out, *caches, status]

    caches = torch.zeros(2, hkv, slots, d), torch.zeros(2, hkv, slots, d)
    args = (q, k, v, *caches, *index, None, *weights, inv_freq, 1e-6, None)
    return Example(
        "rope_append", args, lambda: ops.rope_append(*args), lambda: call(ops), lambda: call(reference)
    )


def _block_attention(g: torch.Generator) -> Example:
    t, hq, hkv, d, slots = 6, 4, 2, 16, 40
    q = torch.randn(t, hq, d, generator=g)
    k, v = (torch.randn(3, hkv, slots, d, generator=g) for _ in range(2))
    cu, rows = torch.tensor([0, 2, 6]), torch.tensor([2, 0])
    seg = torch.tensor([[[0, 9], [20, 5]], [[3, 30], [0, 0]]])
    end = torch.tensor([14, 13, 30, 0, 7, 30])
    mask = torch.rand(2, 4, 6, generator=g) > 0.3
    args = (q, k, v, cu, rows, seg, end, mask, d**-0.5, None)

    def call(module):
        status = torch.zeros(2, dtype=torch.int32)
        return [
            *module.block_attention(
                q, k, v, cu, rows, seg, q_end=end, mask=mask, scale=d**-0.5, status=status
            ),
            status,
        ]

    def wrapper():
        return ops.block_attention(q, k, v, cu, rows, seg, q_end=end, mask=mask, scale=d**-0.5)

    return Example("block_attention", args, wrapper, lambda: call(ops), lambda: call(reference))


def _logit_stats(g: torch.Generator) -> list[Example]:
    n, vocab = 3, 2 * CHUNK + 37
    logits = torch.randn(n, vocab, generator=g) * 4
    logits[1, ::2] = float("-inf")
    key = dict(
        temperature=0.7, seed=torch.tensor([1, 1, 2]), step=torch.tensor([0, 1, 0]), pos=torch.arange(n)
    )
    options = dict(
        forbid=torch.tensor([5]),
        suppress=torch.tensor([17, 4100]),
        ids=torch.tensor([[0, 17], [8000, -1], [5, 6]]),
        topk=4,
    )
    options |= key

    def tiled():
        state, id_logit = new_state(n), torch.zeros(n, 2)
        for offset in range(0, vocab, CHUNK):
            stats_tile(
                logits[:, offset : offset + CHUNK], state, id_logit, offset=offset, vocab=vocab, **options
            )
        return stats_finish(state, id_logit, 4)

    small, tile = torch.randn(1, 64, generator=g), torch.randn(1, 64, generator=g)
    state = new_state(1)

    def fold():
        state.zero_()
        stats_tile(tile, state, offset=0, vocab=64)

    def head(wide: bool):
        hidden, weight = (
            logits[:, :24].nan_to_num(neginf=0.0),
            logits[:, : 24 * 64].nan_to_num(neginf=0.0).reshape(-1, 24),
        )
        if wide:
            return list(reference.logit_stats(hidden @ weight.T))
        return list(head_stats(hidden, Head(weight, "plain")))

    fold()
    finished = (state.clone(), None, 0)
    none = (None,) * 6
    return [
        Example(
            "logit_stats", (small, *none, 0, 0.0, None, None, None), lambda: ops.logit_stats(small),
            lambda: ops.logit_stats(logits, **options), lambda: reference.logit_stats(logits, **options),
        ),
        Example(
            "stats_tile", (tile, new_state(1), None, 0, 64, None, None, None, None, None, 0, 0.0, None, None, None),
            lambda: stats_tile(tile, state, offset=0, vocab=64), tiled, lambda: reference.logit_stats(logits, **options),
        ),
        Example(
            "stats_finish", finished, lambda: stats_finish(finished[0]), lambda: head(False), lambda: head(True), 1e-4,
        ),
    ]  # fmt: skip


def _filtered_stats(g: torch.Generator) -> Example:
    n, vocab = 3, CHUNK + 37
    logits = torch.randn(n, vocab, generator=g) * 4
    key = dict(seed=torch.tensor([1, 1, 2]), step=torch.tensor([0, 1, 0]), pos=torch.arange(n))
    options = dict(forbid=torch.tensor([5]), suppress=torch.tensor([17]), temperature=0.7, top_p=0.9, top_k=50, **key)
    small = torch.randn(1, 64, generator=g)
    return Example(
        "filtered_stats", (small, None, None, None, None, None, 0.0, 0.9, 8, False, None, None, None),
        lambda: ops.filtered_stats(small, top_p=0.9, top_k=8), lambda: ops.filtered_stats(logits, **options),
        lambda: reference.filtered_stats(logits, **options),
    )  # fmt: skip


def _kl_stats(g: torch.Generator) -> Example:
    now, before = (torch.randn(3, CHUNK + 37, generator=g) * 3 for _ in range(2))
    rows = torch.tensor([0, 2, 1]), torch.tensor([1, 0, -1])
    sums = dict(lse=now[rows[0]].logsumexp(1), previous_lse=before[rows[1]].logsumexp(1))
    small = torch.randn(1, 64, generator=g)
    one = small.logsumexp(1)
    return Example(
        "kl_stats", (small, small, None, None, one, one), lambda: ops.kl_stats(small, small, lse=one, previous_lse=one),
        lambda: [ops.kl_stats(now, before, *rows, **sums)], lambda: [reference.kl_stats(now, before, *rows, **sums)],
    )  # fmt: skip


def _commit(g: torch.Generator) -> Example:
    canvas, masked = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.bool)
    masked[0, 3] = False
    cu, row = torch.tensor([0, 4, 9]), torch.tensor([0, 1])
    pos, token = torch.tensor([1, 2, 3, 4, 0, 2, 4, 6, 8]), torch.arange(10, 19)
    score = torch.rand(9, generator=g)

    def call(module):
        written = _copies((canvas, masked))
        status = torch.zeros(2, dtype=torch.int32)
        made = module.commit(*written, cu, row, pos, token, score, rule=3, params=(1.5,), status=status)
        return [*made, *written, status]

    decided = _copies((canvas, masked))
    args = (*decided, cu, row, pos, token, score, None, None, None, 3, [1.5], None, None, None)
    wrapper = lambda: ops.commit(*decided, cu, row, pos, token, score, rule=3, params=(1.5,))  # noqa: E731
    return Example("commit", args, wrapper, lambda: call(ops), lambda: call(reference), 0.0)


def _verify(g: torch.Generator) -> list[Example]:
    node = torch.randint(0, 3, (2, 4, 6), generator=g)
    after = node.roll(-1, 1)
    after[1, 1, 5] += 1
    chain = node, after, None, torch.tensor([4, 4])

    def greedy(module):
        status = torch.zeros(2, dtype=torch.int32)
        return [*module.verify_greedy(*chain, status=status), status]

    p = torch.randn(6, CHUNK + 37, generator=g) * 3
    q = p + torch.randn(6, CHUNK + 37, generator=g)
    row, token = torch.arange(6), p.argmax(1)
    span = row, row, token, torch.tensor([0, 3, 6]), torch.tensor([1, 1, 1, 2, 2, 2]), torch.zeros_like(row), row
    small = torch.randn(1, 64, generator=g)
    one = small, small, *(torch.tensor([0]),) * 3, torch.tensor([0, 1]), *(torch.tensor([0]),) * 3
    return [
        Example("verify_greedy", (*chain, -1, False, None), lambda: ops.verify_greedy(*chain), lambda: greedy(ops), lambda: greedy(reference), 0.0),
        Example(
            "verify_ratio", (*one, None, None, 1.0, 1.0, True), lambda: ops.verify_ratio(*one),
            lambda: [*ops.verify_ratio(p, q, *span)], lambda: [*reference.verify_ratio(p, q, *span)],
        ),
    ]  # fmt: skip


def _elementwise(g: torch.Generator) -> list[Example]:
    x, residual, weight, pair = (
        torch.randn(*shape, generator=g) for shape in ((3, 40), (3, 40), (40,), (3, 80))
    )

    def add_norm(module):
        total = residual.clone()
        return [module.add_rms_norm(total, x, weight, 1e-5), total]

    changed = torch.zeros_like(residual)
    return [
        Example(
            "rms_norm", (x, weight, 1e-5), lambda: ops.rms_norm(x, weight, 1e-5),
            lambda: [ops.rms_norm(x, weight, 1e-5)], lambda: [reference.rms_norm(x, weight, 1e-5)],
        ),
        Example(
            "add_rms_norm", (changed, x, weight, 1e-5), lambda: ops.add_rms_norm(changed, x, weight, 1e-5),
            lambda: add_norm(ops), lambda: add_norm(reference),
        ),
        Example("silu_mul", (pair,), lambda: ops.silu_mul(pair), lambda: [ops.silu_mul(pair)], lambda: [reference.silu_mul(pair)]),
    ]  # fmt: skip


def _mixture(g: torch.Generator) -> list[Example]:
    logits, bias, row = torch.randn(5, 32, generator=g), torch.randn(32, generator=g) * 0.1, torch.tensor([0, 0, -1, 1, 1])
    options = dict(top_k=4, scoring="sigmoid", n_groups=4, groups_kept=2, scale=2.5, multiple=16)
    place, weight = torch.tensor([[0, 5], [3, 3], [-1, 9]]), torch.rand(3, 2, generator=g)
    y = torch.randn(6, 40, generator=g).bfloat16()
    return [
        Example(
            "moe_route", (logits, None, None, 1, 1, 1, 4, True, 1.0, 1), lambda: ops.moe_route(logits, top_k=4),
            lambda: [*ops.moe_route(logits, row, bias, **options)], lambda: [*reference.moe_route(logits, row, bias, **options)],
        ),
        Example(
            "moe_combine", (y, place, weight), lambda: ops.moe_combine(y, place, weight),
            lambda: [ops.moe_combine(y, place, weight)], lambda: [reference.moe_combine(y, place, weight)], 0.0,
        ),
    ]  # fmt: skip
