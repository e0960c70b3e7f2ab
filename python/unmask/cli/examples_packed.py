"""Examples of the ops that multiply by oneDNN's packed weights (CPU); the reference takes the same weights as ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import ops, reference
from ..ops.head_stats import Head, head_stats
from ..ops.linear import Linear
from .examples_base import Example

Weights = Callable[[torch.Tensor], torch.Tensor]


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed = Linear(weight, "packed").packed_weight
    assert packed is not None
    return packed


def packed_examples(g: torch.Generator) -> list[Example]:
    return [_decoder_layer(g), _moe_experts(g), _head_stats(g)]


def _decoder_layer(g: torch.Generator) -> Example:
    t, d, hq, hkv, dim, inner, slots = 16, 24, 4, 2, 8, 20, 12
    x, residual = (torch.randn(t, d, generator=g) for _ in range(2))
    qkv, o, gate_up, down = (torch.randn(*shape, generator=g) * 0.2 for shape in (((hq + 2 * hkv) * dim, d), (d, hq * dim), (2 * inner, d), (d, inner)))
    row = torch.tensor([0] * 5 + [1] * 4 + [-1] * 7)
    pos = torch.tensor([*range(5), *range(2, 6), *[0] * 7])
    seg = torch.tensor([[[0, 5]], [[0, 6]]])
    norms = [torch.rand(size, generator=g) + 0.5 for size in (d, d, dim, dim)]
    inv_freq = 1.0 / 500000.0 ** (torch.arange(0, dim, 2) / dim)

    def args(pack: Weights) -> tuple:
        caches = torch.zeros(2, hkv, slots, dim), torch.zeros(2, hkv, slots, dim)
        return (
            x, residual.clone(), *caches, pack(qkv), None, pack(o), pack(gate_up), pack(down), *norms, inv_freq, row, pos, pos,
            torch.tensor([0, 5, 9]), torch.arange(2), seg, None, None, 1e-6, dim**-0.5, torch.zeros(t, dtype=torch.int32), torch.zeros(2, dtype=torch.int32),
        )  # fmt: skip

    def call(function: Callable, pack: Weights) -> list[torch.Tensor]:
        made = args(pack)
        return [function(*made), *made[1:4], *made[-2:]]

    own = args(_packed)
    return Example(
        "decoder_layer", own, lambda: ops.decoder_layer(*own), lambda: call(ops.decoder_layer, _packed),
        lambda: call(reference.decoder_layer, lambda weight: weight), 1e-4,
    )  # fmt: skip


def _moe_experts(g: torch.Generator) -> Example:
    x, weight = torch.randn(16, 24, generator=g), torch.rand(16, 2, generator=g)
    expert = torch.arange(32).remainder(5).view(16, 2)
    expert[3] = -1
    gate_up, down = ([torch.randn(*shape, generator=g) * 0.2 for _ in range(5)] for shape in ((24, 24), (24, 12)))
    shared = torch.randn(32, 24, generator=g) * 0.2, torch.randn(24, 16, generator=g) * 0.2

    def args(pack: Weights) -> tuple:
        return x, expert, weight, [pack(w) for w in gate_up], [pack(w) for w in down], *(pack(w) for w in shared)

    own = args(_packed)
    return Example(
        "moe_experts", own, lambda: ops.moe_experts(*own), lambda: [ops.moe_experts(*own)],
        lambda: [reference.moe_experts(*args(lambda weight: weight))], 1e-4,
    )  # fmt: skip


def _head_stats(g: torch.Generator) -> Example:
    hidden, weight = torch.randn(3, 24, generator=g), torch.randn(4096 + 37, 24, generator=g)
    head, rows = Head(weight, "packed"), torch.tensor([2, 0, -1])
    assert head.packed is not None
    args = (hidden, head.packed, rows, *(None,) * 5, 2, 0.0, None, None, None)
    return Example(
        "head_stats", args, lambda: head_stats(hidden, head, rows, topk=2), lambda: list(head_stats(hidden, head, rows, topk=2)),
        lambda: list(reference.logit_stats(hidden @ weight.T, rows, topk=2)), 1e-4,
    )  # fmt: skip
