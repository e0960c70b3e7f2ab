"""LLaDA, dense (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5): what is special about it.

A Llama-shaped transformer without any mask: every position sees every other one, logits are not shifted. Field names,
defaults and weight names as in the authors' configuration_llada.py and modeling_llada.py (ML-GSAI/LLaDA): `ff_proj` is
the gate, `ff_out` of a block is down, `ff_out` beside `wte` is the head. Options of that code which no released
checkpoint uses are refused by name, never ignored.

Longer contexts (LongLLaDA, arXiv 2506.14429; UltraLLaDA, arXiv 2510.10481) are static NTK scaling: a larger base and nothing else. Their
public evaluation code multiplies the config's rope_theta by a factor, 1 for UltraLLaDA, whose files bring the larger base themselves. So
such a checkpoint needs no more than its rope_theta, and load(..., overrides={"rope_theta": ...}) scales another one. No public file says
what a `rope_scaling` would mean in this class, so that field stays refused.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import CheckpointError
from .config import Fields, ModelConfig, WeightSpec, shown

MODEL_TYPES = ("llada",)
ARCHITECTURES = ("LLaDAModelLM", "LLaDAModel")
PREFIX = "model."
"""Leading part of every weight name; checkpoints saved from the inner module lack it, on all names alike."""

MASK_ID, EOS_ID, EOT_ID = 126336, 126081, 126348
"""Ids of the released vocabulary: <|mdm_mask|>, <|endoftext|> and <|eot_id|> (ends an answer of the chat models)."""
VOCAB_SIZE = 126464

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Used where a checkpoint brings no template of its own; renders as the one shipped with LLaDA-8B-Instruct."""
BOS_TOKEN = "<|startoftext|>"
CHAT_TOKENS = (BOS_TOKEN,)
"""Tokens that a tokenizer must have for CHAT_TEMPLATE to be used."""

OVERRIDABLE = {
    "mask_id": ("mask_token_id", 0),
    "eos_ids": ("eos_token_id", []),
    "pad_id": ("pad_token_id", None),
    "max_positions": ("max_sequence_length", 1),
    "rope_theta": ("rope_theta", 1.0),
    "norm_eps": ("rms_norm_eps", 1e-5),
}
"""ModelConfig fields that a caller may give where config.json's field is missing or wrong: that field, and a value that
passes in its place until the caller's is put in."""

_FIXED: dict[str, tuple[Any, Any]] = {
    "block_type": ("llama", "sequential"),
    "layer_norm_type": ("rms", "default"),
    "activation_type": ("silu", "swiglu"),
    "rope": (True, False),
    "rope_full_precision": (True, True),
    "alibi": (False, False),
    "attention_layer_norm": (False, False),
    "include_bias": (False, False),
    "layer_norm_with_affine": (True, True),
    "input_emb_norm": (False, False),
    "scale_logits": (False, False),
    "block_group_size": (1, 1),
}
"""Field -> (the one supported value, the authors' default where the field is missing).

attention_layer_norm is not the per-head norm of other families: it normalises over all heads together.
"""

_ABSENT = ("rope_scaling", "quantization_config")
"""Fields that other checkpoints use to change what the weights mean: must be missing or null."""

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
    if raw.get("bias_for_layer_norm") not in (None, False):
        f.problems.append(f"bias_for_layer_norm must be False or null, got {shown(raw['bias_for_layer_norm'])}")

    d_model = f.integer("d_model", "d_model")
    n_heads = f.integer("n_heads", "n_heads")
    if d_model % n_heads:
        f.problems.append(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
    ratio = f.integer("mlp_ratio", "n_heads", 4)
    vocab = f.integer("vocab_size", "vocab_size")
    rows = f.integer("embedding_size", "vocab_size", vocab)  # null: as many as vocab_size
    if rows < vocab:
        f.problems.append(f"embedding_size must be at least vocab_size {vocab}, got {rows}")
    n_kv_heads = _kv_heads(raw, n_heads, f.integer("n_kv_heads", "n_kv_heads", n_heads), f.problems)
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    if rows == VOCAB_SIZE and EOS_ID in eos_ids and EOT_ID not in eos_ids:
        eos_ids = (*eos_ids, EOT_ID)
    config = ModelConfig(
        family="llada",
        d_model=d_model,
        n_layers=f.integer("n_layers", "n_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        ffn_dim=f.integer("mlp_hidden_size", "ffn_dim", ratio * d_model),
        vocab_size=rows,
        rope_theta=f.number("rope_theta", 10000.0),
        rotary_dim=d_model // n_heads,
        norm_eps=f.number("rms_norm_eps", 1e-5),
        qkv_bias=f.flag("include_qkv_bias", False),
        qk_norm=False,
        tied_head=f.flag("weight_tying", True),
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", eos_ids[0] if eos_ids else None, rows, VOCAB_SIZE, required=False),
        max_positions=f.integer("max_sequence_length", "max_positions", 1024),
        block_size=None,
        shifted=False,
        visibility="bidirectional",
    )
    if f.problems:
        raise CheckpointError("unsupported LLaDA config", f.problems)
    return config


def _kv_heads(raw: dict[str, Any], n_heads: int, n_kv_heads: int, problems: list[str]) -> int:
    """The authors' rule: n_kv_heads, unless multi_query_attention says 1 (true) or n_heads (false)."""
    multi_query = raw.get("multi_query_attention")
    if multi_query is None:
        return n_kv_heads
    if not isinstance(multi_query, bool):
        problems.append(f"multi_query_attention must be true, false or null, got {shown(multi_query)}")
        return n_kv_heads
    implied = 1 if multi_query else n_heads
    if raw.get("n_kv_heads") not in (None, implied):
        problems.append(
            f"n_kv_heads {n_kv_heads} contradicts multi_query_attention {multi_query}, which means {implied}"
        )
    return implied


def weight_map(config: ModelConfig) -> dict[str, WeightSpec]:
    """Canonical name -> the tensor of the checkpoint (shapes [out, in]); `head` is missing where it is tied."""
    d, ffn, vocab = config.d_model, config.ffn_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    root = PREFIX + "transformer."
    per_layer = {
        "attn_norm": ("attn_norm.weight", (d,)),
        "q": ("q_proj.weight", (q, d)),
        "k": ("k_proj.weight", (kv, d)),
        "v": ("v_proj.weight", (kv, d)),
        "o": ("attn_out.weight", (d, q)),
        "mlp_norm": ("ff_norm.weight", (d,)),
        "gate": ("ff_proj.weight", (ffn, d)),
        "up": ("up_proj.weight", (ffn, d)),
        "down": ("ff_out.weight", (d, ffn)),
    }
    if config.qkv_bias:
        per_layer |= {f"{x}_bias": (f"{x}_proj.bias", (n,)) for x, n in (("q", q), ("k", kv), ("v", kv))}
    specs = {"embed": WeightSpec(f"{root}wte.weight", (vocab, d))}
    for i in range(config.n_layers):
        for name, (theirs, shape) in per_layer.items():
            specs[f"layers.{i}.{name}"] = WeightSpec(f"{root}blocks.{i}.{theirs}", shape)
    specs["final_norm"] = WeightSpec(f"{root}ln_f.weight", (d,))
    if not config.tied_head:
        specs["head"] = WeightSpec(f"{root}ff_out.weight", (vocab, d))
    return specs
