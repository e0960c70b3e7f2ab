"""LLaDA2.0 and LLaDA2.1 (mini and flash): what is special about it.

A mixture of experts of Ling's shape adapted to blocks: a block of 32 tokens sees itself and the blocks before it; logits are not shifted
(LLaDA2.0, arXiv 2512.15745). q, k and v are one tensor, q and k have a per-head RMSNorm, the first half of each head rotates. The router
works in fp32: sigmoid scores; a bias per expert that counts for the choice only; groups ranked by the sum of their two best; the chosen
scores divided by their sum, times routed_scaling_factor; one shared expert is added. The first first_k_dense_replace layers are dense.

Field names, defaults and weight names as in the authors' configuration_llada2_moe.py and modeling_llada2_moe.py (inclusionAI; read in the
copies of phymhan/S2D2 and inclusionAI/dInfer). config.json names neither the mask token nor the end of a text nor the block length.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from . import qwen
from .config import Experts, Fields, ModelConfig, WeightSpec, shown
from .qwen import is_ignored

__all__ = ["is_ignored", "read_config", "weight_map"]

MODEL_TYPES = ("llada2_moe",)
ARCHITECTURES = ("LLaDA2MoeModelLM", "LLaDA2MoeModel")
PREFIX = qwen.PREFIX

MERGED = "it marks a checkpoint whose experts are merged into one tensor per layer (dFactory); convert it back to one tensor per expert first"
REFUSED = {"llada2_moe_veomni": MERGED}
"""model_type -> why it is not read."""

MASK_ID, EOS_ID = 156895, 156892
"""Ids of the released vocabulary: <|mask|>, and <|endoftext|>, which also pads."""
VOCAB_SIZE = 157184
BLOCK_SIZE = 32

OVERRIDABLE = qwen.OVERRIDABLE | {"block_size": ("block_size", 1)}

_FIXED: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "use_bias": (False, True),
    "use_qkv_bias": (False, False),
    "use_qk_norm": (True, True),
    "use_rmsnorm": (True, True),
    "norm_head": (False, False),
    "score_function": ("sigmoid", "sigmoid"),
    "norm_topk_prob": (True, True),
    "moe_router_enable_expert_bias": (True, True),
    "router_dtype": ("fp32", "fp32"),
}
"""Field -> (the one supported value, what the authors' code does where the field is missing)."""

_ABSENT = ("quantization_config", "rope_parameters", "bd_size", "linear_attention_layers", "use_linear_attention")
"""Fields that other checkpoints use to change what the weights mean: must be missing or null."""


def read_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """ModelConfig from config.json and generation_config.json ({} where there is none).

    Raises CheckpointError with every unusable field; the values that it returns still need `validate`.
    """
    f = Fields(raw, generation)
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        f.problems.append(f"model_type {kind!r} is not supported: {REFUSED[kind]}")
    f.fixed(_FIXED)
    f.absent(_ABSENT)
    qwen.check_rope_scaling(f)
    qwen.check_full_attention(f)

    d_model = f.integer("hidden_size", "d_model")
    n_layers = f.integer("num_hidden_layers", "n_layers")
    n_heads = f.integer("num_attention_heads", "n_heads")
    head_dim = qwen.head_dim(f, d_model, n_heads)
    rotary_dim = f.rotary_dim("partial_rotary_factor", 0.5, head_dim)
    if raw.get("rotary_dim") is not None and f.integer("rotary_dim", "rotary_dim") != rotary_dim:
        f.problems.append(f"rotary_dim must be head_dim x partial_rotary_factor = {rotary_dim}, got {shown(raw['rotary_dim'])}")
    rows = f.integer("vocab_size", "vocab_size")
    eos_ids = f.eos_ids(EOS_ID if rows > EOS_ID else None, rows)
    config = ModelConfig(
        family="llada2",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=f.integer("num_key_value_heads", "n_kv_heads"),
        head_dim=head_dim,
        ffn_dim=f.integer("intermediate_size", "ffn_dim"),
        vocab_size=rows,
        rope_theta=f.number("rope_theta", 10000.0),
        rotary_dim=rotary_dim,
        norm_eps=f.number("rms_norm_eps", 1e-5),
        qkv_bias=False,
        qk_norm=True,
        tied_head=f.flag("tie_word_embeddings", False),
        mask_id=f.one_id("mask_token_id", MASK_ID if rows > MASK_ID else None, rows, VOCAB_SIZE),
        eos_ids=eos_ids,
        pad_id=f.one_id("pad_token_id", eos_ids[0] if eos_ids else None, rows, VOCAB_SIZE, required=False),
        max_positions=f.integer("max_position_embeddings", "max_positions", 16384),
        block_size=f.integer("block_size", "block_size", BLOCK_SIZE),
        shifted=False,
        visibility="block_causal",
        experts=_experts(f, n_layers),
    )
    if f.problems:
        raise CheckpointError("unsupported LLaDA2 config", f.problems)
    return config


def _experts(f: Fields, n_layers: int) -> Experts:
    dense = f.integer("first_k_dense_replace", "first_dense", 0)
    if dense >= n_layers:
        f.problems.append(f"first_k_dense_replace must be below num_hidden_layers {n_layers}, got {dense}")
    width = f.integer("moe_intermediate_size", "expert_dim")
    return Experts(
        layers=tuple(range(dense, n_layers)),
        n_experts=f.integer("num_experts", "n_experts"),
        top_k=f.integer("num_experts_per_tok", "top_k"),
        expert_dim=width,
        shared_dim=width * f.integer("num_shared_experts", "n_shared", 0),
        scoring="sigmoid",
        selection_bias=True,
        n_groups=f.integer("n_group", "n_groups", 8),
        kept_groups=f.integer("topk_group", "kept_groups", 4),
        normalized=True,
        scale=f.number("routed_scaling_factor", 2.5),
    )


def weight_map(config: ModelConfig) -> dict[str, WeightSpec]:
    """Canonical name -> the tensor of the checkpoint (shapes [out, in]); `qkv` holds the rows of q, then k, then v."""
    d, vocab, head = config.d_model, config.vocab_size, config.head_dim
    q, kv = config.n_heads * head, config.n_kv_heads * head
    attention = {
        "attn_norm": ("input_layernorm.weight", (d,)),
        "qkv": ("attention.query_key_value.weight", (q + 2 * kv, d)),
        "q_norm": ("attention.query_layernorm.weight", (head,)),
        "k_norm": ("attention.key_layernorm.weight", (head,)),
        "o": ("attention.dense.weight", (d, q)),
        "mlp_norm": ("post_attention_layernorm.weight", (d,)),
    }
    specs = {"embed": WeightSpec(f"{PREFIX}word_embeddings.weight", (vocab, d))}
    for i in range(config.n_layers):
        for name, (theirs, shape) in (attention | qwen.mlp_names(config, i, shared="mlp.shared_experts")).items():
            specs[f"layers.{i}.{name}"] = WeightSpec(f"{PREFIX}layers.{i}.{theirs}", shape)
    specs["final_norm"] = WeightSpec(f"{PREFIX}norm.weight", (d,))
    if not config.tied_head:
        specs["head"] = WeightSpec("lm_head.weight", (vocab, d))
    return specs
