"""A model's forward by the definition, every step in one dtype, nothing shared with unmask: for any family's canonical weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from unmask.models.config import Experts, ModelConfig


def plain_forward(weights: dict[str, torch.Tensor], c: ModelConfig, ids: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits [B, L, V]: K/V heads repeated, the visibility as a mask, experts one token at a time."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    length = ids.shape[1]
    block = torch.arange(length) // c.block_size if c.visibility == "block_causal" else torch.zeros(length)
    seen = block[None, :] <= block[:, None]

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

    half = c.rotary_dim // 2
    angle = torch.arange(length, dtype=torch.float64)[:, None] * c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(x):  # [B, heads, L, head_dim]: dims i and i + half turn together, dims beyond 2 half stay
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    x = w["embed"][ids]
    for i in range(c.n_layers):
        own = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"layers.{i}.")}
        y = norm(x, own["attn_norm"])
        q, k, v = (heads.view(*ids.shape, -1, c.head_dim).transpose(1, 2) for heads in _qkv(own, c, y))
        if c.qk_norm:
            q, k = norm(q, own["q_norm"]), norm(k, own["k_norm"])
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for t in (rotate(k), v))
        score = (rotate(q) @ k.transpose(-1, -2)) / c.head_dim**0.5
        y = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + y.transpose(1, 2).flatten(2) @ own["o"].T
        y = norm(x, own["mlp_norm"])
        if c.experts is not None and i in c.experts.layers:
            x = x + torch.stack([plain_moe(own, c.experts, token) for token in y.flatten(0, 1)]).view(x.shape)
        else:
            x = x + swiglu(own, "", y)
    return norm(x, w["final_norm"]) @ w.get("head", w["embed"]).T


def _qkv(own: dict[str, torch.Tensor], c: ModelConfig, y: torch.Tensor) -> list[torch.Tensor]:
    if "qkv" in own:
        return list((y @ own["qkv"].T).split([c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim], -1))
    return [y @ own[n].T + own.get(f"{n}_bias", torch.zeros(1, dtype=y.dtype)) for n in "qkv"]


def swiglu(own: dict[str, torch.Tensor], prefix: str, y: torch.Tensor) -> torch.Tensor:
    return (F.silu(y @ own[f"{prefix}gate"].T) * (y @ own[f"{prefix}up"].T)) @ own[f"{prefix}down"].T


def plain_moe(own: dict[str, torch.Tensor], e: Experts, token: torch.Tensor) -> torch.Tensor:
    """One token [d] through its experts and the shared one."""
    bias = own["router_bias"] if e.selection_bias else None
    total = swiglu(own, "shared_", token) if e.shared_dim else torch.zeros_like(token)
    for expert, weight in plain_route(own["router"] @ token, e, bias):
        total = total + weight * swiglu(own, f"experts.{expert}.", token)
    return total


def plain_route(logits: torch.Tensor, e: Experts, bias: torch.Tensor | None) -> list[tuple[int, torch.Tensor]]:
    """(expert, weight) of one token in the order of choice, by Python's own (stable) sort: equal values by index."""
    score = _scores(logits, e.scoring)
    choice = score if bias is None else score + bias
    size = e.n_experts // e.n_groups

    def worth(group: int) -> float:
        return float(sum(choice[group * size : (group + 1) * size].sort(descending=True).values[:2]))

    kept = sorted(range(e.n_groups), key=worth, reverse=True)[: e.kept_groups]
    allowed = [i for i in range(e.n_experts) if i // size in kept]
    chosen = sorted(allowed, key=lambda i: float(choice[i]), reverse=True)[: e.top_k]
    weights = [score[i] for i in chosen]
    if e.normalized:
        weights = [weight / sum(weights) for weight in weights]
    return [(i, weight * e.scale) for i, weight in zip(chosen, weights, strict=True)]


def _scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """Exponentials and sum rounded once from float64, as `unmask.ops.moe_route` defines them: torch's own differ in the last bits from one
    CPU to the next, and then order choices that are equal but for rounding (score + bias of one, of another) differently."""
    if scoring == "sigmoid":
        return 1 / (1 + torch.exp(-logits.double()).to(logits.dtype))
    e = torch.exp((logits - logits.max()).double()).to(logits.dtype)
    return e / e.double().sum().to(logits.dtype)
