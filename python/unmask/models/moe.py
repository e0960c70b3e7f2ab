"""The mixture of experts of a layer: which experts a token goes through (`route`), and the sum of what they give (`MoE`)."""

from __future__ import annotations

import torch

from .. import ops
from ..ops.grouped_linear import Experts as ExpertWeights
from ..ops.linear import Format, Linear, packing_available
from .config import Experts


def route(
    logits: torch.Tensor, experts: Experts, bias: torch.Tensor | None = None, row: torch.Tensor | None = None, multiple: int = 1
) -> ops.Routes:
    """`ops.moe_route` as the config says. logits: float32 [T, E], the router's output. bias: float32 [E], where experts.selection_bias."""
    return ops.moe_route(
        logits, row, bias, top_k=experts.top_k, scoring=experts.scoring, n_groups=experts.n_groups, groups_kept=experts.kept_groups,
        renormalise=experts.normalized, scale=experts.scale, multiple=multiple,
    )  # fmt: skip


class SwiGLU(torch.nn.Module):
    """A dense MLP: down(silu(gate x) * up x). gate_up, down: Linear, gate and up joined."""

    def __init__(self, gate_up: Linear, down: Linear):
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """x: [T, d] -> [T, d]. row is for `MoE`."""
        return self.down.forward(ops.silu_mul(self.gate_up.forward(x)))


class MoE(torch.nn.Module):
    """Sum over a token's experts of weight * expert(token), plus the shared expert's output where there is one.

    config: of the mixture. router: float32 [E, d]; bias: float32 [E] or None; experts: their weights; shared: SwiGLU or None;
    format: of the model's linear weights.

    A token's bits do not depend on the other tokens of the forward (on the CPU with packed weights): rows of every product are padded to
    a multiple of 16, and its experts' outputs are summed in fp32, one after the other in the order of choice, rounded once.
    Between the router's product and the experts' nothing waits for a device: which rows each expert gets stays in tensors.
    """

    def __init__(
        self, config: Experts, router: torch.Tensor, bias: torch.Tensor | None, experts: ExpertWeights, shared: SwiGLU | None, format: Format,
    ):  # fmt: skip
        super().__init__()
        self.config, self.experts, self.shared = config, experts, shared
        own: Format = "packed" if format != "plain" and packing_available(torch.float32) else "plain"
        self.router = Linear(router.float(), "tiled" if format == "tiled" else own)
        self.bias = None if bias is None else bias.float()
        self.packed = self._packed_weights()

    def _packed_weights(self) -> tuple | None:
        """Weights as `torch.ops.unmask.moe_experts` takes them: gate_up and down of every expert, those of the shared one; None where they
        are of another format: then the products run one by one."""
        experts = self.experts.packed_weights()
        shared = [] if self.shared is None else [self.shared.gate_up.packed_weight, self.shared.down.packed_weight]
        if experts is None or any(weight is None for weight in shared):
            return None
        return (*experts, *(shared or (None, None)))

    def forward(self, x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """x: [T, d], T a multiple of 16. row: int64 [T] or None; tokens of a negative row (padding) go through no routed expert."""
        routes = route(self.router.forward(x.float()), self.config, self.bias, row, self.experts.multiple)
        if self.packed is not None:
            gate_up, down, *shared = self.packed
            used = sorted({*routes.expert.flatten().tolist()} - {-1})
            return ops.moe_experts(x, routes.expert, routes.weight, [gate_up[e] for e in used], [down[e] for e in used], *shared)
        out = ops.moe_combine(self.experts(x, routes, ops.silu_mul), routes.place, routes.weight)
        return out if self.shared is None else out + self.shared(x)
