"""What of a layer's weights has arrived: each product is packed as soon as the last tensor of it is there.

A checkpoint is streamed tensor by tensor; packing product by product (expert by expert) instead of layer by layer keeps the memory of
loading at the model's own plus one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..ops.grouped_linear import Experts as ExpertWeights
from ..ops.linear import Format, Linear
from .config import ModelConfig

_PRODUCTS = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "qkv": "qkv",
    "o": "o",
    "gate": "gate_up",
    "up": "gate_up",
    "down": "down",
    "shared_gate": "shared_gate_up",
    "shared_up": "shared_gate_up",
    "shared_down": "shared_down",
}
"""Tensor -> the product that it is part of; a product joins its tensors' rows in this order. Other names stay tensors (norms, router)."""


class LayerWeights:
    """The products and small tensors of one layer, by canonical names (see `checkpoint.CheckpointInfo.tensors`).

    names: the tensors that will come. linears: product -> Linear; tensors: norms, `router`, `router_bias`; experts: or None.
    """

    def __init__(self, config: ModelConfig, format: Format, names: Iterable[str]):
        self.config, self.format = config, format
        self.missing = set(names)
        self.linears: dict[str, Linear] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.experts: ExpertWeights | None = None
        self._need: dict[str, list[str]] = {}
        for name in self.missing:
            self._need.setdefault(_product(name), []).append(name)
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    @classmethod
    def of(cls, config: ModelConfig, format: Format, weights: Mapping[str, torch.Tensor]) -> LayerWeights:
        """All at once, from tensors in memory."""
        found = cls(config, format, weights)
        for name, tensor in weights.items():
            found.add(name, tensor)
        return found

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor; the caller must not keep it."""
        self.missing.remove(name)
        product = _product(name)
        if not product:
            self.tensors[name] = tensor
            return
        parts = self._parts.setdefault(product, {})
        parts[name] = tensor
        if len(parts) == len(self._need[product]):
            del self._parts[product]
            self._pack(product, parts)

    def _pack(self, product: str, parts: dict[str, torch.Tensor]) -> None:
        if product.startswith("experts."):
            _, e, product = product.split(".")
            weights = [parts[f"experts.{e}.{n}"] for n in ("gate", "up", "down") if f"experts.{e}.{n}" in parts]
            self._expert_weights(weights[0]).put(int(e), product, weights)
            return
        weights = [parts[n] for n in _PRODUCTS if n in parts]
        biases = [parts[f"{n}_bias"] for n in "qkv" if f"{n}_bias" in parts]
        parts.clear()
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        del weights
        self.linears[product] = Linear(weight, self.format, torch.cat(biases) if biases else None)

    def _expert_weights(self, like: torch.Tensor) -> ExpertWeights:
        if self.experts is None:
            c = self.config.experts
            assert c is not None
            self.experts = ExpertWeights(c.n_experts, self.config.d_model, c.expert_dim, like.dtype, like.device, self.format)
        return self.experts


def _product(name: str) -> str:
    """The product that a tensor is part of; "" for a norm or a part of the router."""
    if name.startswith("experts."):
        head, _, last = name.rpartition(".")
        return f"{head}.{_PRODUCTS[last]}"
    return "qkv" if name in ("q_bias", "k_bias", "v_bias") else _PRODUCTS.get(name, "")
