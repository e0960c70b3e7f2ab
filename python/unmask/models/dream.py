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

    d_model = f.integer("hidden_size", "d_model")
    n_heads = f.integer("num_attention_heads", "n_heads")
    head_dim = qwen.head_dim(f, d_model, n_heads)
    rows = f.integer("vocab_size", "vocab_size")
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    config = ModelConfig(
        family="dream",
        d_model=d_model,
        n_layers=f.integer("num_hidden_layers", "n_layers"),
        n_heads=n_heads,
        n_kv_heads=qwen.kv_heads(f, n_heads),
        head_dim=head_dim,
        ffn_dim=f.integer("intermediate_size", "ffn_dim"),
        vocab_size=rows,
        rope_theta=f.number("rope_theta", 10000.0),
        rotary_dim=head_dim,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        qkv_bias=True,
        qk_norm=False,
        tied_head=f.flag("tie_word_embeddings", False),
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", eos_ids[0] if eos_ids else None, rows, VOCAB_SIZE, required=False),
        max_positions=f.integer("max_position_embeddings", "max_positions", 32768),
        block_size=None,
        shifted=True,
        visibility="bidirectional",
    )
    if f.problems:
        raise CheckpointError("unsupported Dream config", f.problems)
    return config
