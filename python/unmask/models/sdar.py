"""SDAR (SDAR-1.7B/4B/8B-Chat and their block-size variants) and SDAR-MoE (SDAR-30B-A3B-Chat): what is special about it.

Qwen3's layers (no biases, per-head RMSNorm on q and k before the rotation, head_dim of its own) adapted to blocks: a block of `block_size`
tokens sees itself and the blocks before it; logits are not shifted (SDAR, arXiv 2510.06303). Field names, defaults and weight names as in
the authors' configuration_sdar.py and modeling_sdar.py (JetAstra/SDAR). The mixture is Qwen3-MoE's, as sgl-project/sglang's sdar_moe.py
runs it: softmax over all experts, the top num_experts_per_tok, divided by their sum if norm_topk_prob; every decoder_sparse_step-th layer
has one unless mlp_only_layers names it. No output of the authors' mixture was at hand: tests compare it with the definition only.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from . import qwen
from .config import LIMITS, Experts, Fields, ModelConfig, number_problems, shown
from .qwen import is_ignored, weight_map

__all__ = ["is_ignored", "read_config", "weight_map"]

MODEL_TYPES = ("sdar", "sdar_moe")
ARCHITECTURES = ("SDARForCausalLM", "SDARModel", "SDARMoeForCausalLM", "SDARMoeModel")
PREFIX = qwen.PREFIX

MASK_ID, EOS_ID = 151669, 151643
"""Ids of the released vocabulary: <|MASK|>, and <|endoftext|>, which also pads; generation_config.json adds <|im_end|>."""
VOCAB_SIZE = 151936
BLOCK_SIZE = 4

OVERRIDABLE = qwen.OVERRIDABLE | {"block_size": ("block_size", 1)}

_FIXED: dict[str, tuple[Any, Any]] = {"hidden_act": ("silu", "silu"), "attention_bias": (False, False)}
_ABSENT = ("quantization_config", "rope_parameters", "partial_rotary_factor", "bd_size", "shared_expert_intermediate_size")
"""Fields that other checkpoints use to change what the weights mean: must be missing or null."""


def read_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """ModelConfig from config.json and generation_config.json ({} where there is none).

    Raises CheckpointError with every unusable field; the values that it returns still need `validate`.
    """
    f = Fields(raw, generation)
    f.fixed(_FIXED)
    f.absent(_ABSENT)
    qwen.check_rope_scaling(f)
    qwen.check_full_attention(f)

    dense = qwen.dense_fields(f)
    head_dim = f.integer("head_dim", "head_dim", None if "head_dim" in raw else 128)  # Qwen3's default; null breaks it
    rows, n_layers = dense["vocab_size"], dense["n_layers"]
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    config = ModelConfig(
        family="sdar",
        **dense,
        head_dim=head_dim,
        rotary_dim=head_dim,
        qkv_bias=False,
        qk_norm=True,
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", eos_ids[0] if eos_ids else None, rows, VOCAB_SIZE, required=False),
        block_size=f.integer("block_size", "block_size", BLOCK_SIZE),
        shifted=False,
        visibility="block_causal",
        experts=_experts(f, n_layers) if _is_mixture(raw) else None,
    )
    if f.problems:
        raise CheckpointError("unsupported SDAR config", f.problems)
    return config


def _is_mixture(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == "sdar_moe" or raw.get("num_experts") is not None


def _experts(f: Fields, n_layers: int) -> Experts | None:
    if "norm_topk_prob" not in f.raw:  # SDAR's own default is not known; Qwen3-MoE's, False, is not what SDAR's checkpoints say
        f.problems.append("norm_topk_prob is missing")
    step = f.integer("decoder_sparse_step", "n_layers", 1)
    dense = f.raw.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(number_problems("", i, int, 0, LIMITS["n_layers"][1]) for i in dense):
        f.problems.append(f"mlp_only_layers must be a list of layer indices, got {shown(dense)}")
        dense = []
    layers = tuple(i for i in range(n_layers) if (i + 1) % step == 0 and i not in dense)
    found = qwen.experts_of(f, layers, width="moe_intermediate_size", shared_dim=0, normalized=f.flag("norm_topk_prob", False))
    return found if layers else None
