"""LLaDA-MoE (LLaDA-MoE-7B-A1B-Base and -Instruct): what is special about it.

OLMoE-shaped layers without any mask: every position sees every other one, logits are not shifted; q and k have a per-head RMSNorm; the
MLP of a layer is a mixture where moe_layer_freq says 1. Field names and weight names as in the authors' configuration_lladamoe.py and
modeling_lladamoe.py (inclusionAI; read in the copy of ZHZisZZ/dllm). Their router is a softmax over all experts in fp32 and the top
num_experts_per_tok of it as they are: norm_topk_prob, moe_router_score_function, routed_scaling_factor and the router's groups stand in
the config, but that code reads none of them, so they change nothing here either. Two differences, both of rounding: the router's product
is taken in fp32 (theirs: in the model's dtype), and the experts' outputs are summed in fp32. No output of the authors' code was at hand:
tests compare this family with the definition only.

The released config.json says model_type "llada", as LLaDA's does; `architectures` tells the two apart.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from . import qwen
from .config import Experts, Fields, ModelConfig, shown
from .qwen import is_ignored, weight_map

__all__ = ["is_ignored", "read_config", "weight_map"]

MODEL_TYPES = ("lladamoe", "llada_moe", "llada")
ARCHITECTURES = ("LLaDAMoEModelLM", "LLaDAMoEModel")
PREFIX = qwen.PREFIX

MASK_ID, EOS_ID = 156895, 156892
"""Ids of the released vocabulary: <|mask|>, and <|endoftext|>, which also pads."""
VOCAB_SIZE = 157184

OVERRIDABLE = qwen.OVERRIDABLE

_FIXED: dict[str, tuple[Any, Any]] = {"hidden_act": ("silu", "silu"), "attention_bias": (False, False)}
_ABSENT = ("quantization_config", "rope_parameters", "clip_qkv", "block_size", "bd_size")
"""Fields that would change what the weights mean: must be missing or null."""


def read_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """ModelConfig from config.json and generation_config.json ({} where there is none).

    Raises CheckpointError with every unusable field; the values that it returns still need `validate`.
    """
    f = Fields(raw, generation)
    f.fixed(_FIXED)
    f.absent(_ABSENT)
    qwen.check_rope_scaling(f)
    if f.flag("moe_router_enable_expert_bias", False):
        f.problems.append("moe_router_enable_expert_bias must be False or null, got True")
    for name in ("rope_theta", "partial_rotary_factor"):
        if raw.get(name) is None:  # the class's default, -1, is unusable
            f.problems.append(f"{name} is missing")

    d_model = f.integer("hidden_size", "d_model")
    n_layers = f.integer("num_hidden_layers", "n_layers")
    n_heads = f.integer("num_attention_heads", "n_heads")
    if d_model % n_heads:
        f.problems.append(f"hidden_size must be a multiple of num_attention_heads, got {d_model} and {n_heads}")
    rows = f.integer("vocab_size", "vocab_size")
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    config = ModelConfig(
        family="llada_moe",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=f.integer("num_key_value_heads", "n_kv_heads", n_heads),
        head_dim=d_model // n_heads,
        ffn_dim=f.integer("dense_intermediate_size", "ffn_dim"),
        vocab_size=rows,
        rope_theta=f.number("rope_theta", 1.0),
        rotary_dim=f.rotary_dim("partial_rotary_factor", 1.0, d_model // n_heads),
        norm_eps=f.number("rms_norm_eps", 1e-5),
        qkv_bias=False,
        qk_norm=f.flag("qk_layernorm", False),
        tied_head=f.flag("tie_word_embeddings", False),
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", eos_ids[0] if eos_ids else None, rows, VOCAB_SIZE, required=False),
        max_positions=f.integer("max_position_embeddings", "max_positions", 4096),
        block_size=None,
        shifted=False,
        visibility="bidirectional",
        experts=_experts(f, n_layers),
    )
    if f.problems:
        raise CheckpointError("unsupported LLaDA-MoE config", f.problems)
    return config


def _experts(f: Fields, n_layers: int) -> Experts | None:
    kinds = f.raw.get("moe_layer_freq")
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(type(kind) is not int or kind not in (0, 1) for kind in kinds):
        f.problems.append(f"moe_layer_freq must be a list of {n_layers} values, 0 (dense) or 1 (mixture), got {shown(kinds)}")
        kinds = [1] * n_layers
    layers = tuple(i for i, kind in enumerate(kinds) if kind)
    shared = f.integer("shared_expert_intermediate_size", "shared_dim", 0)
    found = qwen.experts_of(f, layers, width="expert_intermediate_size", shared_dim=shared, normalized=False)
    return found if layers else None
