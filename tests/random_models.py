"""Small random models for tests: every layout question at a size where a forward takes a millisecond."""

from __future__ import annotations

import dataclasses

import torch

from unmask.models.config import ModelConfig
from unmask.models.model import Model, random_model

BASE = ModelConfig(
    family="llada", d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=48, vocab_size=61, rope_theta=10000.0, rotary_dim=8,
    norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_head=False, mask_id=60, eos_ids=(59,), pad_id=59, max_positions=256, block_size=None,
    shifted=False, visibility="bidirectional",
)  # fmt: skip


def make(seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.25, **changes) -> Model:
    """A random model; `changes` replace fields of BASE. std 0.25 spreads the winning probabilities over about 0.1 .. 0.99."""
    return random_model(dataclasses.replace(BASE, **changes), dtype=dtype, seed=seed, std=std)


def prompts(n: int, vocab: int = 59, seed: int = 0, low: int = 0, high: int = 12) -> list[list[int]]:
    """Ragged prompts of ids below `vocab`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (n,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]
