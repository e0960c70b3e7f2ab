"""What Dream, Fast-dLLM v2, SDAR and LLaDA-MoE share: field names and tensor names of Qwen's classes, dense and with experts.

A family file decides what is fixed, absent or default; the functions here read the fields that mean the same in all of them.
Names: transformers' Qwen2, Qwen3 and Qwen3-MoE, which the authors' classes copy.
"""

from __future__ import annotations

import re
from typing import Any

from .config import Experts, Fields, ModelConfig, WeightSpec, shown

PREFIX = "model."
"""Leading part of every weight name but the head's."""

OVERRIDABLE = {
    "mask_id": ("mask_token_id", 0),
    "eos_ids": ("eos_token_id", []),
    "pad_id": ("pad_token_id", None),
    "max_positions": ("max_position_embeddings", 1),
    "rope_theta": ("rope_theta", 1.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
"""ModelConfig fields that a caller may give where config.json's field is missing or wrong: that field, and a value that
passes in its place until the caller's is put in."""

_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def is_ignored(name: str) -> bool:
    """Whether a tensor that the model does not use may be in the file: rotary buffers, which the config determines."""
    return _IGNORED.search(name) is not None


def check_rope_scaling(f: Fields) -> None:
    """rope_scaling, in its old (`type`) or new (`rope_type`) form, must leave the angles as they are."""
    scaling = f.raw.get("rope_scaling")
    if scaling is None:
        return
    keys = ("rope_type", "type")
    if not (isinstance(scaling, dict) and scaling and all(k in keys and v == "default" for k, v in scaling.items())):
        f.problems.append(f"rope_scaling must be absent, null or {{'rope_type': 'default'}}, got {shown(scaling)}")


def check_full_attention(f: Fields) -> None:
    """No sliding window: sliding_window and max_window_layers mean nothing without use_sliding_window."""
    if f.flag("use_sliding_window", False):
        f.problems.append("use_sliding_window must be False or null, got True")
    kinds = f.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        f.problems.append(f"layer_types must be absent, null or all 'full_attention', got {shown(kinds)}")


def head_dim(f: Fields, d_model: int, n_heads: int) -> int:
    """head_dim, or d_model / n_heads where it is missing or null."""
    if f.raw.get("head_dim") is not None:
        return f.integer("head_dim", "head_dim")
    if d_model % n_heads:
        f.problems.append(f"hidden_size must be a multiple of num_attention_heads, got {d_model} and {n_heads}")
    return d_model // n_heads


def kv_heads(f: Fields, n_heads: int) -> int:
    """num_key_value_heads; null: as many as query heads. Missing is an error: the classes' default, 32, fits no released model."""
    return f.integer("num_key_value_heads", "n_kv_heads", n_heads if "num_key_value_heads" in f.raw else None)


def dense_fields(f: Fields) -> dict[str, Any]:
    """The ModelConfig fields that every dense decoder of Qwen's reads alike; the whole head rotates. head_dim and the ids are the family's."""
    n_heads = f.integer("num_attention_heads", "n_heads")
    return dict(
        d_model=f.integer("hidden_size", "d_model"),
        n_layers=f.integer("num_hidden_layers", "n_layers"),
        n_heads=n_heads,
        n_kv_heads=kv_heads(f, n_heads),
        ffn_dim=f.integer("intermediate_size", "ffn_dim"),
        vocab_size=f.integer("vocab_size", "vocab_size"),
        rope_theta=f.number("rope_theta", 10000.0),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied_head=f.flag("tie_word_embeddings", False),
        max_positions=f.integer("max_position_embeddings", "max_positions", 32768),
    )


def weight_map(config: ModelConfig) -> dict[str, WeightSpec]:
    """Canonical name -> the tensor of the checkpoint (shapes [out, in]); `head` is missing where it is tied."""
    d, vocab = config.d_model, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = {
        "attn_norm": ("input_layernorm.weight", (d,)),
        "q": ("self_attn.q_proj.weight", (q, d)),
        "k": ("self_attn.k_proj.weight", (kv, d)),
        "v": ("self_attn.v_proj.weight", (kv, d)),
        "o": ("self_attn.o_proj.weight", (d, q)),
        "mlp_norm": ("post_attention_layernorm.weight", (d,)),
    }
    biases = {f"{x}_bias": (f"self_attn.{x}_proj.bias", (n,)) for x, n in (("q", q), ("k", kv), ("v", kv))}
    norms = {f"{x}_norm": (f"self_attn.{x}_norm.weight", (config.head_dim,)) for x in "qk"}
    specs = {"embed": WeightSpec(f"{PREFIX}embed_tokens.weight", (vocab, d))}
    for i in range(config.n_layers):
        layer = attention | mlp_names(config, i, shared="shared_expert")
        layer |= (biases if config.qkv_bias else {}) | (norms if config.qk_norm else {})
        for name, (theirs, shape) in layer.items():
            specs[f"layers.{i}.{name}"] = WeightSpec(f"{PREFIX}layers.{i}.{theirs}", shape)
    specs["final_norm"] = WeightSpec(f"{PREFIX}norm.weight", (d,))
    if not config.tied_head:
        specs["head"] = WeightSpec("lm_head.weight", (vocab, d))
    return specs


def mlp_names(config: ModelConfig, layer: int, shared: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Canonical name -> (name below the layer, shape) of a layer's MLP. shared: where the expert of every token is."""
    experts = config.experts
    if experts is None or layer not in experts.layers:
        return _swiglu("", "mlp", config.d_model, config.ffn_dim)
    names = {"router": ("mlp.gate.weight", (experts.n_experts, config.d_model))}
    if experts.selection_bias:
        names["router_bias"] = ("mlp.gate.expert_bias", (experts.n_experts,))
    for e in range(experts.n_experts):
        names |= _swiglu(f"experts.{e}.", f"mlp.experts.{e}", config.d_model, experts.expert_dim)
    if experts.shared_dim:
        names |= _swiglu("shared_", shared, config.d_model, experts.shared_dim)
    return names


def _swiglu(ours: str, theirs: str, d: int, inner: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        f"{ours}gate": (f"{theirs}.gate_proj.weight", (inner, d)),
        f"{ours}up": (f"{theirs}.up_proj.weight", (inner, d)),
        f"{ours}down": (f"{theirs}.down_proj.weight", (d, inner)),
    }


def experts_of(f: Fields, layers: tuple[int, ...], *, width: str, shared_dim: int, normalized: bool) -> Experts:
    """Softmax routing without groups, as Qwen3-MoE's: top_k of the probabilities, divided by their sum if `normalized`.

    width: the field that holds an expert's inner width.
    """
    return Experts(
        layers=layers,
        n_experts=f.integer("num_experts", "n_experts"),
        top_k=f.integer("num_experts_per_tok", "top_k"),
        expert_dim=f.integer(width, "expert_dim"),
        shared_dim=shared_dim,
        scoring="softmax",
        selection_bias=False,
        n_groups=1,
        kept_groups=1,
        normalized=normalized,
        scale=1.0,
    )
