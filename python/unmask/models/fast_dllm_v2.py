"""Fast-dLLM v2 (Fast_dLLM_v2_7B, Fast_dLLM_v2_1.5B): what is special about it.

Qwen2.5's layers (q, k and v with a bias) adapted to blocks: a block of `bd_size` tokens sees itself and the blocks before it, and logits
at position i predict token i + 1 (Fast-dLLM v2, arXiv 2509.26328). Field names, defaults and weight names as in the authors'
configuration.py and modeling.py (class Fast_dLLM_QwenForCausalLM; read in phymhan/S2D2's copy). The config names no mask token, and its
generate() stops at <|im_end|>, whatever the config's eos_token_id.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from . import qwen
from .config import Fields, ModelConfig
from .qwen import is_ignored, weight_map

__all__ = ["is_ignored", "read_config", "weight_map"]

MODEL_TYPES = ("Fast_dLLM_Qwen",)
ARCHITECTURES = ("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_QwenModel")
PREFIX = qwen.PREFIX

MASK_ID, STOP_ID, PAD_ID = 151665, 151645, 151643
"""Ids of the released vocabularies: |<MASK>|, <|im_end|> (ends an answer) and <|endoftext|>."""
VOCAB_SIZE = 152064
VOCAB_SIZES = (VOCAB_SIZE, 151936)
"""Of the 7B and of the 1.5B model."""
BLOCK_SIZE = 32

OVERRIDABLE = qwen.OVERRIDABLE | {"block_size": ("bd_size", 1)}

_FIXED: dict[str, tuple[Any, Any]] = {"hidden_act": ("silu", "silu")}
_ABSENT = ("quantization_config", "rope_parameters", "partial_rotary_factor", "block_size")
"""Fields that other checkpoints use to change what the weights mean: must be missing or null. The block length is `bd_size` here."""


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
    head_dim = qwen.head_dim(f, dense["d_model"], dense["n_heads"])
    rows = dense["vocab_size"]
    eos_ids = f.eos_ids(STOP_ID if rows > STOP_ID else None, rows)
    if rows in VOCAB_SIZES and eos_ids and STOP_ID not in eos_ids:
        eos_ids = (*eos_ids, STOP_ID)
    pad = PAD_ID if rows in VOCAB_SIZES else eos_ids[0] if eos_ids else None
    config = ModelConfig(
        family="fast_dllm_v2",
        **dense,
        head_dim=head_dim,
        rotary_dim=head_dim,
        qkv_bias=True,
        qk_norm=False,
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", pad, rows, VOCAB_SIZE, required=False),
        block_size=f.integer("bd_size", "block_size", BLOCK_SIZE),
        shifted=True,
        visibility="block_causal",
    )
    if f.problems:
        raise CheckpointError("unsupported Fast-dLLM v2 config", f.problems)
    return config
