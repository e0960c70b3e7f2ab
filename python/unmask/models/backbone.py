"""The one Transformer backbone: RMSNorm, attention over a K/V cache, SwiGLU or a mixture of experts. Families differ by config only.

A forward takes a packed list of T query tokens (`Forward`), not a padded batch: rows bring their whole canvas, a block, or nothing, so
refreshes, block steps and rows of unequal length share one forward. K and V of the tokens are written into the cache by the same op that
rotates them, then every token attends to the segments of its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch

from .. import ops
from ..ops.linear import Format, pad_rows
from .config import ModelConfig
from .layer_weights import LayerWeights
from .moe import MoE, SwiGLU


@dataclasses.dataclass(frozen=True)
class Forward:
    """One packed forward of T query tokens for B entries. Padding tokens (row -1) fill T up to a multiple of 16.

    ids, row, pos, slot: int64 [T]: token, cache row, RoPE position, K/V slot (-1 = do not write). cu_q: int64 [B+1], entry b owns tokens
    cu_q[b]..cu_q[b+1]. kv_row: int64 [B], the cache row whose keys entry b sees. seg: int64 [B, G, 2], (start, length) of visible slots.
    q_end: int64 [T] or None; mask: bool [B|1, Qmax, W] or None, as in `ops.block_attention`. mix_ids, mix_weight: int64 and float32 [T, K] or
    None: a token's input is the weighted sum of these rows of the embedding instead of its own row (soft masks).
    """

    ids: torch.Tensor
    row: torch.Tensor
    pos: torch.Tensor
    slot: torch.Tensor
    cu_q: torch.Tensor
    kv_row: torch.Tensor
    seg: torch.Tensor
    q_end: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    mix_ids: torch.Tensor | None = None
    mix_weight: torch.Tensor | None = None


class KVCache:
    """K (after RoPE) and V of every layer, in the documented view [row, kv head, slot, dim]. Only ops write to it.

    rows: cache rows R; slots: slots per row S (need not equal positions).
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        shape = (config.n_layers, rows, config.n_kv_heads, slots, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [(self.k[i], self.v[i]) for i in range(config.n_layers)]

    @property
    def rows(self) -> int:
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        return self.k.shape[3]


class Layer(torch.nn.Module):
    """Pre-norm attention + SwiGLU or a mixture of experts. q/k/v and gate/up are one product each. Parts are run by their `forward`: a module
    call's bookkeeping, cold, costs a small step a tenth of its time outside the products; forward hooks belong on the model.

    weights: by canonical name, or already packed (then `format` is theirs); a layer with a `router` is a mixture.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, torch.Tensor] | LayerWeights, format: Format):
        super().__init__()
        self.config = config
        w = weights if isinstance(weights, LayerWeights) else LayerWeights.of(config, format, weights)
        assert not w.missing, f"these tensors have not come: {sorted(w.missing)}"
        self.qkv, self.o = w.linears["qkv"], w.linears["o"]
        self.mlp: SwiGLU | MoE
        if "router" in w.tensors:
            assert config.experts is not None and w.experts is not None
            shared = SwiGLU(w.linears["shared_gate_up"], w.linears["shared_down"]) if "shared_down" in w.linears else None
            self.mlp = MoE(config.experts, w.tensors["router"], w.tensors.get("router_bias"), w.experts, shared, format)
        else:
            self.mlp = SwiGLU(w.linears["gate_up"], w.linears["down"])
        self.attn_norm, self.mlp_norm = w.tensors["attn_norm"], w.tensors["mlp_norm"]
        self.q_norm, self.k_norm = w.tensors.get("q_norm"), w.tensors.get("k_norm")
        self.scale = config.head_dim**-0.5
        self.batch_invariant = format == "tiled"
        self.packed = self._packed_weights()

    def _packed_weights(self) -> tuple[torch.Tensor | None, ...] | None:
        """The weights as `ops.decoder_layer` takes them; None where a product is of another kind: then the parts run one by one."""
        products = [self.qkv, self.o] + ([self.mlp.gate_up, self.mlp.down] if isinstance(self.mlp, SwiGLU) else [])
        packed = [product.packed_weight for product in products]
        if any(weight is None for weight in packed) or any(product.bias is not None for product in products[1:]):
            return None
        qkv, o, *mlp = packed
        return (qkv, self.qkv.bias, o, *(mlp or (None, None)), self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, f: Forward, kv, inv_freq: torch.Tensor, status) -> torch.Tensor:
        """x: the branch to add to `residual` (in place) before this layer's attention norm; returns the branch after this layer's MLP."""
        c = self.config
        if self.packed is not None:
            y = ops.decoder_layer(
                x, residual, *kv, *self.packed, inv_freq, f.row, f.pos, f.slot, f.cu_q, f.kv_row, f.seg, f.q_end, f.mask, c.norm_eps, self.scale,
                *status,
            )  # fmt: skip
            return y if isinstance(self.mlp, SwiGLU) else self.mlp.forward(y, f.row)
        y = ops.add_rms_norm(residual, x, self.attn_norm, c.norm_eps)
        branch, _, _ = self.attention(y, f, kv, inv_freq, status)
        return self.mlp.forward(ops.add_rms_norm(residual, branch, self.mlp_norm, c.norm_eps), f.row)

    def attention(self, y: torch.Tensor, f: Forward, kv, inv_freq: torch.Tensor, status) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The attention branch [T, d] of the normed tokens y, with what caches look at: Q [T, Hq, D] and the logsumexps, float32 [T, Hq]."""
        q = self.append(y, kv, f.row, f.pos, f.slot, inv_freq, status[0])
        out, lse = self.attend(q, kv, f.cu_q, f.kv_row, f.seg, f.q_end, f.mask, status[1])
        return self.o.forward(out), q, lse

    def append(self, y: torch.Tensor, kv, row, pos, slot, inv_freq: torch.Tensor, status: torch.Tensor | None) -> torch.Tensor:
        """Q [T, Hq, D] of the normed tokens y [T, d], rotated; their K and V are written into the cache. row, pos, slot: as in Forward."""
        c = self.config
        hq, hkv = c.n_heads, c.n_kv_heads
        q, k, v = self.qkv.forward(y).view(-1, hq + 2 * hkv, c.head_dim).split_with_sizes((hq, hkv, hkv), dim=1)
        return ops.rope_append(q, k, v, *kv, row, pos, slot, None, self.q_norm, self.k_norm, inv_freq, c.norm_eps, status)

    def attend(self, q: torch.Tensor, kv, cu_q, kv_row, seg, q_end, mask, status: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of Q [T, Hq, D] over the cache: the heads' outputs joined, [T, Hq D], and the logsumexps of their scores, float32 [T, Hq]."""
        out, lse = ops.block_attention(q, *kv, cu_q, kv_row, seg, q_end=q_end, mask=mask, scale=self.scale, status=status, batch_invariant=self.batch_invariant)
        return out.view(out.shape[0], -1), lse


class LayerRunner(Protocol):
    """Runs a layer of a forward in place of `Layer.forward`, for caches that go by layers. index: the layer's; the rest as there."""

    def __call__(
        self, index: int, layer: Layer, x: torch.Tensor, residual: torch.Tensor, f: Forward, kv: tuple[torch.Tensor, torch.Tensor],
        inv_freq: torch.Tensor, status: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor: ...  # fmt: skip


class Backbone(torch.nn.Module):
    """Embedding, layers, final norm. `forward` returns the hidden states that the head reads: [T, d_model]."""

    def __init__(self, config: ModelConfig, embed: torch.Tensor, layers: list[Layer], final_norm: torch.Tensor):
        super().__init__()
        self.config = config
        self.embed = embed
        self.layers = torch.nn.ModuleList(layers)
        self.final_norm = final_norm
        # fp32 throughout, as the families' own code computes it
        exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        self.inv_freq = (1.0 / (config.rope_theta**exponent)).to(embed.device)

    def forward(self, f: Forward, cache: KVCache, runner: LayerRunner | None = None) -> torch.Tensor:
        t = f.ids.shape[0]
        status = torch.zeros(t + f.kv_row.shape[0], dtype=torch.int32, device=f.ids.device)
        parts = (status[:t], status[t:])
        if f.mix_ids is None:
            residual = torch.nn.functional.embedding(f.ids, self.embed)
        else:
            weight = f.mix_weight.to(self.embed.dtype)
            residual = torch.nn.functional.embedding_bag(f.mix_ids, self.embed, mode="sum", per_sample_weights=weight)
        x = torch.zeros_like(residual)
        for index, (layer, kv) in enumerate(zip(self.layers, cache.layers, strict=True)):
            run = layer.forward if runner is None else partial(runner, index, layer)
            x = run(x, residual, f, kv, self.inv_freq, parts)
        hidden = ops.add_rms_norm(residual, x, self.final_norm, self.config.norm_eps)
        if f.ids.device.type == "cpu":  # a read without a sync; on CUDA the decode loop reads it with its done flag
            ops.raise_on_status(status, "forward")
        return hidden


def full_forward(ids: torch.Tensor, block_size: int | None = None) -> Forward:
    """Every row of ids [B, L] as one packed, uncached forward (K/V slots = positions).

    block_size: None: every position sees the whole row; else block-causal, a position sees all positions before the end of its block.
    """
    b, length = ids.shape
    t, padded = b * length, pad_rows(b * length)
    device = ids.device
    flat = torch.full((padded,), 0, dtype=torch.int64, device=device)
    flat[:t] = ids.reshape(-1)
    row = torch.full((padded,), -1, dtype=torch.int64, device=device)
    row[:t] = torch.arange(b, device=device).repeat_interleave(length)
    pos = torch.zeros(padded, dtype=torch.int64, device=device)
    pos[:t] = torch.arange(length, device=device).repeat(b)
    rows = torch.arange(b, device=device)
    seg = torch.tensor([[[0, length]]], device=device).expand(b, 1, 2)
    q_end = None if block_size is None else (pos // block_size + 1) * block_size  # beyond the row's end: up to its end
    return Forward(flat, row, pos, pos, torch.arange(b + 1, device=device) * length, rows, seg, q_end)
