"""The time that a decode's GEMMs alone take: the floor that everything else of a step is compared with.

Every forward of a run is known in advance (fixed steps): how many tokens it brings and how many masked rows the head reads. For each kind
of forward the four products of all layers run in order, each layer with its own weights, then the head; rows are padded to a multiple of
16 as in the decoder. Weights are packed once with oneDNN. For bf16 the floor is the faster of bf16 and fp32 copies of the weights.
"""

from __future__ import annotations

from collections import Counter

import torch

import timing
from unmask.ops.head_stats import TILE
from unmask.ops.linear import Linear, packing_available, pad_rows


def forwards(cache: str, prompt: int, new_tokens: int, block: int, steps: int) -> Counter[tuple[int, int]]:
    """How often each (tokens forwarded, rows that the head reads) occurs in a run of `steps` fixed steps."""
    kinds: Counter[tuple[int, int]] = Counter()
    length, blocks = prompt + new_tokens, new_tokens // block
    per_block, per_step = steps // blocks, block // (steps // blocks)
    for b in range(blocks):
        start = prompt + b * block
        for step in range(per_block):
            cached = {"none": length, "prefix": length - start, "dual": block}[cache]
            kinds[pad_rows(length if step == 0 else cached), pad_rows(block - step * per_step)] += 1
    return kinds


class Gemms:
    """All linears of the bench model with random weights in one format, and one vocabulary-tiled and one whole head."""

    def __init__(self, config: dict, dtype: torch.dtype):
        d, ffn, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
        if not packing_available(dtype):
            raise RuntimeError(f"this torch has no packed oneDNN weights for {dtype}; the floor is undefined")
        self.dtype = dtype
        self.width, self.inner = d, ffn
        shapes = ((3 * d, d), (d, d), (2 * ffn, d), (d, ffn))
        self.layers = [[self._linear(*shape) for shape in shapes] for _ in range(config["n_layers"])]
        head = torch.randn(vocab, d, dtype=dtype)
        self.head = Linear(head, "packed")
        self.tiles = [Linear(head[i : i + TILE], "packed") for i in range(0, vocab, TILE)]

    def _linear(self, n: int, k: int) -> Linear:
        return Linear(torch.randn(n, k, dtype=self.dtype), "packed")

    @torch.inference_mode()
    def seconds(self, tokens: int, head_rows: int, rounds: int = 3) -> float:
        """Backbone products for `tokens` rows plus the head for `head_rows` rows, whole or tiled, whichever is faster."""
        x, inner = (
            torch.randn(tokens, self.width, dtype=self.dtype),
            torch.randn(tokens, self.inner, dtype=self.dtype),
        )
        hidden = x[:1].expand(head_rows, -1).contiguous()

        def backbone():
            for qkv, out, gate_up, down in self.layers:
                qkv(x), out(x), gate_up(x), down(inner)

        parts = {
            "backbone": backbone,
            "head": lambda: self.head(hidden),
            "tiled": lambda: [tile(hidden) for tile in self.tiles],
        }
        times = timing.measure(parts, rounds=rounds, min_time=0.1, min_samples=3)
        return times["backbone"] + min(times["head"], times["tiled"])


def floor(
    config: dict, dtype: torch.dtype, runs: dict[str, Counter], rounds: int = 3
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of GEMMs per run, and the format that gave them: ({run: seconds}, {run: "packed" or "packed_fp32"})."""
    formats = {"packed": dtype} | ({"packed_fp32": torch.float32} if dtype is torch.bfloat16 else {})
    kinds = sorted({kind for run in runs.values() for kind in run})
    best: dict[str, tuple[float, str]] = {}
    for name, kind_dtype in formats.items():
        if not packing_available(kind_dtype):
            continue
        gemms = Gemms(config, kind_dtype)
        each = {kind: gemms.seconds(*kind, rounds=rounds) for kind in kinds}
        for run, counts in runs.items():
            total = sum(each[kind] * count for kind, count in counts.items())
            best[run] = min(best.get(run, (float("inf"), "")), (total, name))
    return {run: value for run, (value, _) in best.items()}, {run: name for run, (_, name) in best.items()}
