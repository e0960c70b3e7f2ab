"""What tests of S2D2 share: models, block size 1 by itself, engines."""

from __future__ import annotations

import functools
from typing import Any

import torch

from random_models import make
from unmask.decode.policy import Policy
from unmask.decode.schedule import AlignedBlocks
from unmask.decode.state import DecodeState
from unmask.models.backbone import Forward
from unmask.models.model import Model
from unmask.ops.linear import pad_rows
from unmask.speculate.s2d2 import S2D2Backend, S2D2Engine
from unmask.speculate.s2d2_options import Options

MASK = 60
LIMIT = 3e-4  # expected of correct fp32 code (golden/README.md); 1e-3 is what it allows
SHAPES = {
    "sdar": dict(n_kv_heads=2, qk_norm=True),
    "plain": dict(n_layers=3),
    "shifted": dict(shifted=True, qk_norm=True),
    "v2": dict(n_kv_heads=1, qkv_bias=True, shifted=True),
}


@functools.cache
def model(shape: str, block: int, **changes) -> Model:
    return make(seed=3, visibility="block_causal", block_size=block, eos_ids=(59,), **SHAPES[shape], **changes)


def alone(m: Model, canvas: list[int], begin: int, target: int) -> torch.Tensor:
    """What block size 1 predicts at `target` in a block that begins at `begin`: one forward of its own, of the tokens before it and (unshifted) a
    mask; earlier blocks see block-causally."""
    size, shifted = m.config.block_size, m.config.shifted
    ids = canvas[:target] + ([] if shifted else [MASK])
    t, padded = len(ids), pad_rows(len(ids))
    pos = torch.zeros(padded, dtype=torch.int64)
    pos[:t] = torch.arange(t)
    row = torch.full((padded,), -1, dtype=torch.int64)
    row[:t] = 0
    flat = torch.zeros(padded, dtype=torch.int64)
    flat[:t] = torch.tensor(ids)
    q_end = torch.where(pos < begin, (pos // size + 1) * size, pos + 1)
    f = Forward(flat, row, pos, torch.where(row < 0, -1, pos), torch.tensor([0, t]), torch.tensor([0]), torch.tensor([[[0, t]]]), q_end)
    return m.head.logits(m(f, m.new_cache(1, t)))[t - 1]


def engine(
    m: Model, ids: list[list[int]], new: int, policy: Policy | None = None, options: Options | None = None, *, cache: str = "block",
    size: int | None = None, seeds: list[int] | None = None, **more: Any,
) -> S2D2Engine:  # fmt: skip
    """Canvases that end with whole blocks, as unmask.generate lays them out."""
    options, block = options or Options(), m.config.block_size
    lengths = [-(-(len(i) + new) // block) * block for i in ids]
    canvases = [i + [MASK] * (n - len(i)) for i, n in zip(ids, lengths, strict=True)]
    given_ = [[True] * len(i) + [False] * (n - len(i)) for i, n in zip(ids, lengths, strict=True)]
    state = DecodeState(canvases, given_, MASK, AlignedBlocks(size or block), None, seeds or list(range(len(ids))), torch.device("cpu"))
    policy = policy or Policy("sdar_dynamic", knobs=dict(threshold=0.9))
    return S2D2Engine(state, S2D2Backend(m, state, MASK, options), policy, cache=cache, options=options, record=True, **more)


def decode(e: S2D2Engine) -> list[list[int]]:
    for _ in e.run():
        pass
    assert not e.state.masked.any()
    return [e.state.canvas[r.index, : r.end].tolist() for r in e.state.rows]
