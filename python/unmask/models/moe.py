"""The mixture of experts of a layer: which experts a token goes through (`route`), and the sum of what they give (`MoE`).

Routing is plain PyTorch in fp32 here, on every device; one fused op for it is a later step.
"""

from __future__ import annotations

import torch

from .. import ops
from ..ops.grouped_linear import Experts as ExpertWeights
from ..ops.linear import Format, Linear, packing_available
from .config import Experts


def route(logits: torch.Tensor, experts: Experts, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token goes through, and with which weights.

    logits: float32 [T, E], the router's output. bias: float32 [E], where experts.selection_bias.
    1. score = sigmoid or softmax of the logits; choice = score + bias.
    2. With groups (E / n_groups neighbours each): a group counts the sum of its two highest choices (its one, if it has one); experts
       outside the kept_groups best groups cannot be chosen.
    3. The top_k experts by choice, in that order; equal choices: the lower index first (groups too).
    4. weight = score (without the bias), divided by the sum of the token's weights + 1e-20 if normalized, times scale.

    Returns weights float32 [T, top_k] and experts int64 [T, top_k]. NaN logits give NaN weights.
    Sources: LLaDA2's modeling_llada2_moe.py (inclusionAI/dInfer: sigmoid, groups, bias); transformers' Qwen3-MoE (softmax, normalized);
    LLaDA-MoE's modeling_lladamoe.py (softmax, not normalized).
    """
    score = torch.sigmoid(logits) if experts.scoring == "sigmoid" else torch.softmax(logits, dim=-1)
    choice = score if bias is None else score + bias
    if experts.n_groups > experts.kept_groups:
        groups = choice.unflatten(-1, (experts.n_groups, -1))
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _first(best, experts.kept_groups), True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    chosen = _first(choice, experts.top_k)
    weight = score.gather(1, chosen)
    if experts.normalized:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * experts.scale, chosen


def _first(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k highest of each row, equal ones by index: torch.topk promises no order among those."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


class SwiGLU(torch.nn.Module):
    """A dense MLP: down(silu(gate x) * up x). gate_up, down: Linear, gate and up joined."""

    def __init__(self, gate_up: Linear, down: Linear):
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """x: [T, d] -> [T, d]. row is for `MoE`."""
        return self.down(ops.silu_mul(self.gate_up(x)))


class MoE(torch.nn.Module):
    """Sum over a token's experts of weight * expert(token), plus the shared expert's output where there is one.

    config: of the mixture. router: float32 [E, d]; bias: float32 [E] or None; experts: their weights; shared: SwiGLU or None;
    format: of the model's linear weights.

    A token's bits do not depend on the other tokens of the forward (on the CPU with packed weights): rows of every product are padded to
    a multiple of 16, and its experts' outputs are summed in fp32, one after the other in the order of choice, rounded once.
    """

    def __init__(
        self, config: Experts, router: torch.Tensor, bias: torch.Tensor | None, experts: ExpertWeights, shared: SwiGLU | None, format: Format,
    ):  # fmt: skip
        super().__init__()
        self.config, self.experts, self.shared = config, experts, shared
        self.router = Linear(router.float(), "packed" if format != "plain" and packing_available(torch.float32) else "plain")
        self.bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """x: [T, d], T a multiple of 16. row: int64 [T] or None; on the CPU tokens of row -1 (padding) go through no expert."""
        weight, chosen = route(self.router(x.float()), self.config, self.bias)
        if row is not None and x.device.type == "cpu" and bool((row < 0).any()):
            live = torch.nonzero(row >= 0).flatten()
            out = torch.zeros_like(x)
            out[live] = self._mix(x.index_select(0, live), weight.index_select(0, live), chosen.index_select(0, live))
        else:
            out = self._mix(x, weight, chosen)
        return out if self.shared is None else out + self.shared(x)

    def _mix(self, x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        y, where = self.experts(x, chosen, ops.silu_mul)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for j in range(chosen.shape[1]):  # product, then sum: a fused multiply-add would round vector bodies and tails differently
            total += y.index_select(0, where[:, j]).float() * weight[:, j : j + 1]
        return total.to(x.dtype)
