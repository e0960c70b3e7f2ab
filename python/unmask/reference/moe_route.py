"""`moe_route`, `moe_combine` and `moe_experts` as plain tensor code: the definition."""

from __future__ import annotations

import math

import torch

from ..ops.moe_route import SCORINGS, Routes
from . import _check
from .elementwise import silu_mul

_OP = "moe_route"


def moe_route(
    logits, row=None, bias=None, *, top_k, scoring="softmax", n_groups=1, groups_kept=1, renormalise=True, scale=1.0, multiple=1
) -> Routes:  # fmt: skip
    """See `unmask.ops.moe_route`."""
    if scoring not in SCORINGS:
        raise ValueError(f"moe_route: scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    _check_arguments(logits, row, bias, top_k, n_groups, groups_kept, scale, multiple)
    score = _sigmoid(logits) if scoring == "sigmoid" else _softmax(logits)
    choice = score if bias is None else score + bias
    out = torch.zeros_like(choice, dtype=torch.bool)
    if n_groups > groups_kept:
        groups = choice.unflatten(-1, (n_groups, -1))
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _first(best, groups_kept), True)
        out = ~kept.repeat_interleave(groups.shape[-1], dim=1)
    by_choice = choice.sort(dim=-1, descending=True, stable=True).indices
    expert = by_choice.gather(1, out.gather(1, by_choice).long().sort(dim=-1, stable=True).indices)[:, :top_k]
    weight = score.gather(1, expert)
    if renormalise:
        weight = weight / (weight.double().sum(-1, keepdim=True).float() + 1e-20)
    weight = weight * scale
    if row is not None:
        expert = expert.masked_fill((row < 0).unsqueeze(1), -1)
        weight = weight.masked_fill((row < 0).unsqueeze(1), 0.0)
    return Routes(expert, weight, *_groups(expert, logits.shape[1], multiple))


def moe_combine(y, place, weight) -> torch.Tensor:
    """See `unmask.ops.moe_combine`."""
    _check.floating("moe_combine", "y", y)
    _check.dtype("moe_combine", torch.int64, place=place)
    _check.dtype("moe_combine", torch.float32, weight=weight)
    _check.shape("moe_combine", "y", y, "[M, D]", (-1, -1))
    _check.shape("moe_combine", "place", place, "[T, K]", (-1, -1))
    _check.shape("moe_combine", "weight", weight, "[T, K]", tuple(place.shape))
    total = torch.zeros(place.shape[0], y.shape[1])
    for j in range(place.shape[1]):
        there = (place[:, j] >= 0) & (place[:, j] < y.shape[0])
        total[there] += y[place[there, j]].float() * weight[there, j : j + 1]
    return total.to(y.dtype)


def _exp(x: torch.Tensor) -> torch.Tensor:
    return x.double().exp().float()


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + _exp(-x))


def _softmax(x: torch.Tensor) -> torch.Tensor:
    e = _exp(x - x.amax(-1, keepdim=True))
    return e / e.double().sum(-1, keepdim=True).float()


def _first(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k highest of each row, equal ones by index: torch.topk promises no order among those."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _groups(expert: torch.Tensor, n: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """place, source and offsets."""
    flat, k = expert.reshape(-1), expert.shape[1]
    sizes = torch.bincount(flat[flat >= 0], minlength=n)
    padded = (sizes + multiple - 1) // multiple * multiple
    offsets = torch.cat((padded.new_zeros(1), padded.cumsum(0)))
    order = flat.argsort(stable=True)[int((flat < 0).sum()) :]  # pair (t, j) is t * k + j
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[flat[order]]
    place = torch.full_like(flat, -1)
    place[order] = offsets[flat[order]] + rank
    source = flat.new_zeros(len(flat) + (multiple - 1) * min(len(flat), n))
    source[place[order]] = order // k
    return place.view(expert.shape), source, offsets.int()


def _check_arguments(logits, row, bias, top_k, n_groups, groups_kept, scale, multiple) -> None:
    """Same checks and words as csrc/common/moe_route_args.h."""
    _check.dtype(_OP, torch.float32, logits=logits)
    _check.dtype(_OP, torch.int64, row=row)
    _check.dtype(_OP, torch.float32, bias=bias)
    _check.shape(_OP, "logits", logits, "[T, E]", (-1, -1))
    tokens, experts = logits.shape
    _check.shape(_OP, "row", row, "[T]", (tokens,))
    _check.shape(_OP, "bias", bias, "[E]", (experts,))
    if not 1 <= experts <= 4096:
        _check.fail(_OP, "E of logits", "1 to 4096", experts)
    if n_groups < 1 or experts % n_groups:
        _check.fail(_OP, "n_groups", f"a divisor of E = {experts}", n_groups)
    if not 1 <= groups_kept <= n_groups:
        _check.fail(_OP, "groups_kept", f"1 to n_groups = {n_groups}", groups_kept)
    choosable = experts // n_groups * groups_kept
    if not 1 <= top_k <= choosable:
        _check.fail(_OP, "top_k", f"1 to the {choosable} experts of the kept groups", top_k)
    if not math.isfinite(scale):
        _check.fail(_OP, "scale", "finite", scale)
    if not 1 <= multiple <= 1024:
        _check.fail(_OP, "multiple", "1 to 1024", multiple)


def moe_experts(
    x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, gate_up: list[torch.Tensor], down: list[torch.Tensor],
    shared_gate_up: torch.Tensor | None = None, shared_down: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """As `ops.moe_experts`, token by token, except that weights are ordinary tensors [N, K]; products are fp32, rounded once."""

    def swiglu(row: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        wide = (row.float() @ first.float().T).to(x.dtype)
        return (silu_mul(wide).float() @ second.float().T).to(x.dtype)

    used = sorted(set(expert.flatten().tolist()) - {-1})
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1])
        for e, w in zip(expert[t].tolist(), weight[t], strict=True):
            if e >= 0:
                i = used.index(e)
                total += swiglu(x[t : t + 1], gate_up[i], down[i])[0].float() * w
        out[t] = total.to(x.dtype)
    return out if shared_gate_up is None else out + swiglu(x, shared_gate_up, shared_down)
