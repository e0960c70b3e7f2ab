"""Dream (Dream-v0-Base-7B, Dream-v0-Instruct-7B) and DiffuCoder, which has the same class: what is special about it.

Qwen2's layers (q, k and v with a bias, grouped K/V heads, rotary angles over the whole head) without any mask: every
position sees every other one, and logits at position i predict token i + 1, as in the model it was trained from (Dream,
arXiv 2508.15487; DiffuCoder, arXiv 2506.20639). Field names, defaults and weight names as in the authors'
configuration_dream.py and modeling_dream.py (DreamLM/Dream; read in NVlabs/Fast-dLLM's copy). Options which no released
checkpoint uses are refused by name, never ignored.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import CheckpointError
from .config import Fields, ModelConfig, WeightSpec, shown

MODEL_TYPES = ("Dream",)
ARCHITECTURES = ("DreamModel", "DreamBaseModel")
PREFIX = "model."
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

_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def is_ignored(name: str) -> bool:
    """Whether a tensor that the model does not use may be in the file: rotary buffers, which the config determines."""
    return _IGNORED.search(name) is not None


def read_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """ModelConfig from config.json and generation_config.json ({} where there is none).

    Raises CheckpointError with every unusable field; the values that it returns still need `validate`.
    """
    f = Fields(raw, generation)
    f.fixed(_FIXED)
    f.absent(_ABSENT)
    if not _is_default_rope(raw.get("rope_scaling")):
        f.problems.append(
            f"rope_scaling must be absent, null or {{'rope_type': 'default'}}, got {shown(raw['rope_scaling'])}"
        )
    if f.flag("use_sliding_window", False):  # sliding_window and max_window_layers mean nothing without it
        f.problems.append("use_sliding_window must be False or null, got True")
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        f.problems.append(f"layer_types must be absent, null or all 'full_attention', got {shown(kinds)}")

    d_model = f.integer("hidden_size", "d_model")
    n_heads = f.integer("num_attention_heads", "n_heads")
    if raw.get("head_dim") is not None:
        head_dim = f.integer("head_dim", "head_dim")
    else:
        head_dim = d_model // n_heads
        if d_model % n_heads:
            f.problems.append(
                f"hidden_size must be a multiple of num_attention_heads, got {d_model} and {n_heads}"
            )
    rows = f.integer("vocab_size", "vocab_size")
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    config = ModelConfig(
        family="dream",
        d_model=d_model,
        n_layers=f.integer("num_hidden_layers", "n_layers"),
        n_heads=n_heads,
        # null: as many as query heads. Missing is an error: the authors' default, 32, fits no released model.
        n_kv_heads=f.integer(
            "num_key_value_heads", "n_kv_heads", n_heads if "num_key_value_heads" in raw else None
        ),
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


def _is_default_rope(scaling: object) -> bool:
    """Whether rope_scaling, in its old (`type`) or new (`rope_type`) form, leaves the angles as they are."""
    if not isinstance(scaling, dict):
        return scaling is None
    return bool(scaling) and all(
        key in ("rope_type", "type") and kind == "default" for key, kind in scaling.items()
    )


def weight_map(config: ModelConfig) -> dict[str, WeightSpec]:
    """Canonical name -> the tensor of the checkpoint (shapes [out, in]); `head` is missing where it is tied."""
    d, ffn, vocab = config.d_model, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    per_layer = {
        "attn_norm": ("input_layernorm.weight", (d,)),
        "q": ("self_attn.q_proj.weight", (q, d)),
        "k": ("self_attn.k_proj.weight", (kv, d)),
        "v": ("self_attn.v_proj.weight", (kv, d)),
        "o": ("self_attn.o_proj.weight", (d, q)),
        "mlp_norm": ("post_attention_layernorm.weight", (d,)),
        "gate": ("mlp.gate_proj.weight", (ffn, d)),
        "up": ("mlp.up_proj.weight", (ffn, d)),
        "down": ("mlp.down_proj.weight", (d, ffn)),
    }
    if config.qkv_bias:  # always, unless a caller overrides it
        per_layer |= {f"{x}_bias": (f"self_attn.{x}_proj.bias", (n,)) for x, n in (("q", q), ("k", kv), ("v", kv))}
    specs = {"embed": WeightSpec(f"{PREFIX}embed_tokens.weight", (vocab, d))}
    for i in range(config.n_layers):
        for name, (theirs, shape) in per_layer.items():
            specs[f"layers.{i}.{name}"] = WeightSpec(f"{PREFIX}layers.{i}.{theirs}", shape)
    specs["final_norm"] = WeightSpec(f"{PREFIX}norm.weight", (d,))
    if not config.tied_head:
        specs["head"] = WeightSpec("lm_head.weight", (vocab, d))
    return specs
