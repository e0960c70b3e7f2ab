"""What tests of caches that go by layers share: models, canvases, and what a run forwarded."""

from __future__ import annotations

import functools

import torch

from random_models import make

LAYOUTS = {"llada": {}, "dream": dict(shifted=True, qkv_bias=True, n_kv_heads=2)}


@functools.cache
def random(layout: str, layers: int, seed: int, dtype: torch.dtype = torch.float32):
    return make(seed=seed, n_layers=layers, dtype=dtype, **LAYOUTS[layout])


def watched(model, call):
    """What `call` returns, and of every forward meanwhile its positions and its hidden states."""
    steps = []

    def note(_, args, hidden):
        n = int((args[0].row >= 0).sum())
        steps.append((args[0].pos[:n].tolist(), hidden[:n].clone()))

    handle = model.register_forward_hook(note)
    try:
        return call(), steps
    finally:
        handle.remove()


def trace(result) -> list[tuple]:
    return [(r["block"], r["committed"], r["edited"]) for r in result.trace]


def told(results) -> list[tuple]:
    return [(r.canvas, r.nfe, trace(r)) for r in results]
