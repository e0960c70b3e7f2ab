"""Dream (Dream-v0-Base-7B, Dream-v0-Instruct-7B) and DiffuCoder, which has the same class: what is special about it.

Qwen2's layers (q, k and v with a bias, grouped K/V heads, rotary angles over the whole head) without any mask: every
position sees every other one, and logits at position i predict token i + 1, as in the model it was trained from (Dream,
arXiv 2508.15487; DiffuCoder, arXiv 2506.20639). Field names, defaults and weight names as in the authors'
configuration_dream.py and modeling_dream.py (DreamLM/Dream; read in NVlabs/Fast-dLLM's copy). Options which no released
checkpoint uses are refused by name, never ignored.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from . import qwen
from .config import Fields, ModelConfig
from .qwen import is_ignored, weight_map

__all__ = ["is_ignored", "read_config", "weight_map"]

MODEL_TYPES = ("Dream",)
ARCHITECTURES = ("DreamModel", "DreamBaseModel")
PREFIX = qwen.PREFIX
"""Leading part of every weight name but the head's; checkpoints saved from the inner module lack it, on all names alike."""

MASK_ID, EOS_ID = 151666, 151643
"""Ids of the released vocabulary: <|mask|>, and <|endoftext|>, which also pads and begins a text."""
VOCAB_SIZE = 152064

SYSTEM_PROMPT = "You are a helpful assistant."
"""What Qwen2.5's template says where a conversation brings no system message; DiffuCoder's README prompts with the same."""
CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
"""Used where a checkpoint brings no template of its own: the conversation as Qwen2.5's writes it (no tools)."""
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Tokens that a tokenizer must have for CHAT_TEMPLATE to be used."""

OVERRIDABLE = qwen.OVERRIDABLE

_FIXED: dict[str, tuple[Any, Any]] = {"hidden_act": ("silu", "silu")}
"""Field -> (the one supported value, the authors' default where the field is missing)."""

_ABSENT = ("quantization_config", "rope_parameters", "partial_rotary_factor", "block_size", "bd_size")
"""Fields that other checkpoints use to change what the weights mean: must be missing or null. rope_parameters is where
transformers 5 puts rope_theta and its scaling; a block length belongs to block-causal relatives."""

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
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    config = ModelConfig(
        family="dream",
        **dense,
        head_dim=head_dim,
        rotary_dim=head_dim,
        qkv_bias=True,
        qk_norm=False,
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", eos_ids[0] if eos_ids else None, rows, VOCAB_SIZE, required=False),
        block_size=None,
        shifted=True,
        visibility="bidirectional",
    )
    if f.problems:
        raise CheckpointError("unsupported Dream config", f.problems)
    return config
