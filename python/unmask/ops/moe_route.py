"""`moe_route` and `moe_combine`: what stands around the experts' products of a mixture of experts."""

from __future__ import annotations

from typing import NamedTuple

import torch

SCORINGS = ("sigmoid", "softmax")  # by the number that the op takes


class Routes(NamedTuple):
    """Where tokens go: pairs (t, j), token t through the j-th of its experts, and the pairs grouped by expert.

    Groups are in the order of the experts, a group's pairs in the order of the tokens; each group is padded to the multiple asked for.

    Attributes:
        expert: int64 [T, K], the experts in the order of choice; -1 for a token that goes through none.
        weight: float32 [T, K]; 0 for a token that goes through none.
        place: int64 [T, K], the pair's row among the groups; -1 for a token that goes through none.
        source: int64 [M], the token of each row among the groups, 0 in padding and behind the last group.
            M = T K + (multiple - 1) min(T K, E), whatever the data.
        offsets: int32 [E + 1], expert e's group is rows [offsets[e], offsets[e + 1]).
    """

    expert: torch.Tensor
    weight: torch.Tensor
    place: torch.Tensor
    source: torch.Tensor
    offsets: torch.Tensor


def moe_route(
    logits: torch.Tensor,
    row: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    n_groups: int = 1,
    groups_kept: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
    multiple: int = 1,
) -> Routes:
    """Which experts each token goes through, with which weights, and the pairs sorted by expert, in one call.

    logits: float32 [T, E], the router's output, any strides, E up to 4096. row: int64 [T] or None; tokens of a negative row (padding) go
    through no expert. bias: float32 [E] or None.
    1. score = sigmoid or softmax of the logits; choice = score + bias.
    2. With groups (E / n_groups neighbours each): a group counts the sum of its two highest choices (its one, if it has one); experts
       outside the groups_kept best groups cannot be chosen.
    3. The top_k experts by choice, in that order; equal choices: the lower index first (groups too). NaN counts as the highest.
    4. weight = score (without the bias), divided by the sum of the token's weights + 1e-20 if renormalise, times scale.
    multiple: groups are padded to multiples of it.

    fp32 with the exponentials and sums in fp64, each rounded once to fp32, so scores differ from those of torch (whose exponential is not the
    same on every CPU) in their last bits. A token has the same bits in any batch, at any thread count and on CPU and CUDA. NaN logits give NaN
    weights. No host sync; the groups stay on the device.
    Sources: LLaDA2's modeling_llada2_moe.py (inclusionAI/dInfer: sigmoid, groups, bias); transformers' Qwen3-MoE (softmax, renormalised);
    LLaDA-MoE's modeling_lladamoe.py (softmax, not renormalised).
    Errors: RuntimeError for dtype, shape, device, and for numbers out of range; ValueError for another scoring.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"moe_route: scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    return Routes(
        *torch.ops.unmask.moe_route(logits, row, bias, SCORINGS.index(scoring), n_groups, groups_kept, top_k, renormalise, scale, multiple)
    )


def moe_combine(y: torch.Tensor, place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """out[t] = the sum over j, in order, of y[place[t, j]] * weight[t, j]: fp32, product and sum rounded each, then once to y's dtype.

    y: [M, D] float32, bfloat16 or float16; place: int64 [T, K]; weight: float32 [T, K]; any strides. A place outside [0, M) is left out,
    so a token without experts gets zeros. Returns [T, D], dense, y's dtype. A token has the same bits in any batch and at any thread count.
    Errors: RuntimeError for dtype, shape, device.
    """
    return torch.ops.unmask.moe_combine(y, place, weight)


def moe_experts(
    x: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    shared_gate_up: torch.Tensor | None = None,
    shared_down: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum over j of weight[t, j] * E(x[t]) for E = expert[t, j], as `moe_combine` adds, plus the shared expert's output (rounded).

    E(x) = silu_mul(x gate_up^T) down^T. x: [T, d] float32 or bfloat16 on the CPU. expert: int64 [T, K], -1: none; weight: float32 [T, K].
    gate_up, down: of each expert that occurs in `expert`, in the order of their numbers: [2 F, d] and [d, F] of x's dtype, packed by
    `torch.ops.mkldnn._reorder_linear_weight`. shared_gate_up, shared_down: [2 G, d] and [d, G], packed, or None; they take T rows as they
    are, so T should be a multiple of 16 (see unmask.ops.linear).

    The bits are those of the products, `silu_mul` and `moe_combine` one by one; every expert's rows are padded to a multiple of 16, so a token
    has the same bits in any batch. Returns [T, d], dense, x's dtype. RuntimeError for wrong dtypes, layouts, shapes, or lists of another
    length than the number of experts that occur.
    """
    return torch.ops.unmask.moe_experts(x, expert, weight, gate_up, down, shared_gate_up, shared_down)


@torch.library.register_fake("unmask::moe_experts")
def _(x, expert, weight, gate_up, down, shared_gate_up, shared_down):
    return x.new_empty(x.shape)


@torch.library.register_fake("unmask::moe_route")
def _(logits, row, bias, scoring, n_groups, groups_kept, top_k, renormalise, scale, multiple):
    tokens, experts = logits.shape
    pairs = tokens * top_k
    capacity = pairs + (multiple - 1) * torch.sym_min(pairs, experts)
    expert = logits.new_empty((tokens, top_k), dtype=torch.int64)
    source = logits.new_empty((capacity,), dtype=torch.int64)
    offsets = logits.new_empty((experts + 1,), dtype=torch.int32)
    return expert, logits.new_empty((tokens, top_k)), torch.empty_like(expert), source, offsets


@torch.library.register_fake("unmask::moe_combine")
def _(y, place, weight):
    return y.new_empty((place.shape[0], y.shape[1]))
