"""`describe`: the facts of a checkpoint as plain data, from its headers; and the bytes that it takes in memory. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..errors import check_names
from .checkpoint import FP32_NAMES, CheckpointInfo
from .config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SMALL = ("embed", "norm", "bias")
"""Ends of the canonical names of tensors that stay as they are; every other one is the weight of a product."""


def describe(info: CheckpointInfo) -> dict[str, Any]:
    """What a checkpoint is, as numbers and words that JSON can hold. Nothing but what `checkpoint.inspect` read is needed.

    folder, family, stored_dtype, n_files, stored_bytes; config: the sizes and ids (see ModelConfig; `experts`: None for a dense model);
    parameters: total, and active (those that a token goes through); weight_bytes: dtype -> bytes of all tensors in it, each once (a
    router stays float32; "int8": as weights="int8" keeps them beside bfloat16); kv_bytes_per_token: dtype -> bytes of K and V of one token in all layers; max_positions: longest sequence that
    the model was made for, in tokens.
    """
    c = info.config
    return {
        "folder": str(info.folder),
        "family": c.family,
        "stored_dtype": info.stored_dtype,
        "n_files": len(info.files),
        "stored_bytes": info.n_bytes,
        "config": _sizes(c),
        "parameters": {"total": info.n_parameters, "active": c.n_active_parameters},
        "weight_bytes": {**{dtype: loaded_bytes(info, dtype, "plain") for dtype in ITEM_BYTES}, "int8": loaded_bytes(info, "bfloat16", "int8")},
        "kv_bytes_per_token": {dtype: 2 * c.n_layers * c.n_kv_heads * c.head_dim * size for dtype, size in ITEM_BYTES.items()},
        "max_positions": c.max_positions,
    }


def loaded_bytes(info: CheckpointInfo, dtype: str, format: str) -> int:
    """Bytes of the weights once they are loaded in `dtype` with linear weights kept in `format` (see unmask.ops.linear): packed_fp32 keeps
    those in 4 bytes, int8 in one and a scale for each row, and a head that is tied to the embedding is packed beside it.

    Raises SettingError for another dtype than float32, bfloat16 and float16.
    """
    check_names("dtype", [dtype], ITEM_BYTES)
    item = ITEM_BYTES[dtype]
    product = {"packed_fp32": 4, "int8": 1}.get(format, item)
    total = 0
    for name, tensor in info.tensors.items():
        short = name.rpartition(".")[2]
        size = 4 if short in FP32_NAMES else item if short.endswith(_SMALL) else product
        total += size * math.prod(tensor.shape)
        if format == "int8" and size == 1:
            total += 4 * math.prod(tensor.shape[:-1])  # a scale for each row
    if info.config.tied_head and format != "plain":
        total += product * info.config.vocab_size * info.config.d_model
    return total


def longest(available: int, weights: int, kv_per_token: int, max_positions: int) -> int:
    """Tokens of one sequence, at most max_positions, whose K and V fit beside the weights; 0 if the weights alone do not.

    available, weights, kv_per_token: bytes. While loading, up to 1.1 x the weights and 200 MB are in use (bench/bench_memory.py --load
    holds every release to that).
    """
    if 1.1 * weights + (200 << 20) > available:
        return 0
    return min(max_positions, (available - weights) // kv_per_token)


def _sizes(c: ModelConfig) -> dict[str, Any]:
    experts = None
    if c.experts is not None:
        experts = dataclasses.asdict(c.experts)
        experts["layers"] = list(c.experts.layers)
    return {
        "layers": c.n_layers, "width": c.d_model, "heads": c.n_heads, "kv_heads": c.n_kv_heads, "head_dim": c.head_dim, "ffn": c.ffn_dim,
        "experts": experts, "vocab": c.vocab_size, "tied_head": c.tied_head, "qkv_bias": c.qkv_bias, "qk_norm": c.qk_norm,
        "rope_theta": c.rope_theta, "rotary_dim": c.rotary_dim, "norm_eps": c.norm_eps, "visibility": c.visibility, "block_size": c.block_size,
        "shifted": c.shifted, "mask_id": c.mask_id, "eos_ids": list(c.eos_ids), "pad_id": c.pad_id,
    }  # fmt: skip
