"""The time that a decode's GEMMs alone take: the floor that everything else of a step is compared with.

Every forward of a run is known in advance (fixed steps): how many tokens it brings and how many masked rows the head reads. For each kind
of forward the four products of all layers run in order, each layer with its own weights, then the head; rows are padded to a multiple of
16 as in the decoder. Weights are packed once with oneDNN. For bf16 the floor is the faster of bf16 and fp32 copies of the weights. The
whole run of products is one rival in the same rounds as the decoder: on a shared machine two clocks minutes apart differ by a fifth.
"""

from __future__ import annotations

from collections import Counter

import torch

import timing
from unmask.models.model import Model
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
    """All linears of the bench model with random weights in one format; the head in tiles of `tile` ids."""

    def __init__(self, config: dict, dtype: torch.dtype, tile: int):
        d, ffn, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]
        self.dtype, self.width, self.inner = dtype, d, ffn
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}
        shapes = ((3 * d, d), (d, d), (2 * ffn, d), (d, ffn))
        self.layers = [[self._linear(*shape) for shape in shapes] for _ in range(config["n_layers"])]
        self.head = [self._linear(min(tile, vocab - i), d) for i in range(0, vocab, tile)]

    def _linear(self, n: int, k: int) -> Linear:
        return Linear(torch.randn(n, k, dtype=self.dtype), "packed")

    @torch.inference_mode()
    def forward(self, tokens: int, head_rows: int) -> None:
        """The products of one forward: all layers for `tokens` rows, then the head for `head_rows`."""
        x, inner = self._rows(tokens, self.width), self._rows(tokens, self.inner)
        for qkv, out, gate_up, down in self.layers:
            qkv(x), out(x), gate_up(x), down(inner)
        hidden = self._rows(head_rows, self.width)
        for tile in self.head:
            tile(hidden)

    @classmethod
    def of_model(cls, model: Model) -> Gemms:
        """The linears of a loaded dense model themselves, in their format: for models whose weights do not fit into memory twice."""
        if model.config.experts is not None:
            raise ValueError(f"the floor of a model counts dense layers, {model.config.family} has experts")
        gemms = cls.__new__(cls)
        layers = model.backbone.layers
        gemms.dtype, gemms.width, gemms.inner = model.dtype, model.config.d_model, model.config.ffn_dim
        gemms.layers = [[layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down] for layer in layers]
        gemms.head, gemms._inputs = model.head.tiles, {}
        return gemms

    def run(self, counts: Counter[tuple[int, int]]) -> None:
        """The products of a whole run."""
        for kind, count in counts.items():
            for _ in range(count):
                self.forward(*kind)

    def _rows(self, rows: int, width: int) -> torch.Tensor:
        if (rows, width) not in self._inputs:
            self._inputs[rows, width] = torch.randn(rows, width, dtype=self.dtype)
        return self._inputs[rows, width]


def fastest(config: dict, dtype: torch.dtype, kind: tuple[int, int], rounds: int = 3) -> tuple[Gemms, str]:
    """The fastest way to compute the products of one forward of `kind`: format of the weights, head whole or in tiles, and its name.

    Only this choice is timed here; `Gemms.run` of the result is then timed side by side with the decoder.
    """
    formats = {"packed": dtype} | ({"packed_fp32": torch.float32} if dtype is torch.bfloat16 else {})
    ways = {}
    for name, weights in formats.items():
        if packing_available(weights):
            for head, tile in (("whole head", config["vocab_size"]), ("tiled head", TILE)):
                gemms = Gemms(config, weights, tile)
                seconds = timing.measure({"": lambda g=gemms: g.forward(*kind)}, rounds=rounds, min_time=0.1, min_samples=3)
                ways[f"{name}, {head}"] = (seconds[""], gemms)
                ways = dict([min(ways.items(), key=lambda way: way[1][0])])  # the others' weights are freed
    if not ways:
        raise RuntimeError(f"this torch has no packed oneDNN weights for {dtype}; the floor is undefined")
    ((name, (_, gemms)),) = ways.items()
    return gemms, name
