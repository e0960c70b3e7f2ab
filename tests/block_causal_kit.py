"""Small block-causal models of every layout, and prompts for them."""

from __future__ import annotations

import functools

import torch

from random_models import make
from unmask.models.model import Model

MASK = 60
SHAPES = {
    "sdar": dict(n_kv_heads=2, qk_norm=True),
    "v2": dict(n_kv_heads=1, qkv_bias=True, shifted=True),
    "plain": dict(n_layers=3),
    "shifted": dict(shifted=True, qk_norm=True),
}


@functools.cache
def model(shape: str, block: int, **changes) -> Model:
    return make(seed=3, visibility="block_causal", block_size=block, eos_ids=(59,), **SHAPES[shape], **changes)


def one(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 59, (1, n), generator=torch.Generator().manual_seed(seed))
