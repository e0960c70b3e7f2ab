"""decoder_layer, moe_experts and head_stats beside the same parts called one by one from Python, and beside their products alone, in one run.

Each op holds several products by oneDNN's packed weights and the small ops between them. `one by one` is what the decoder runs where weights
are of another format: the same kernels and the same bits. `products` are the op's GEMMs alone, on inputs made beforehand. In a step the weights
of the other layers have passed through the caches between two calls of a layer; so here --layers layers take turns, each with its own weights.
Medians of interleaved turns; bf16 where the CPU multiplies it, else fp32.

    python bench/bench_op_decoder_layer.py [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch

import report
import timing
from bench_layouts import LAYOUTS
from recorded_floor import Recorded, one_by_one
from unmask.models.backbone import full_forward
from unmask.models.model import Model, random_model
from unmask.ops.head_stats import head_stats
from unmask.ops.linear import packing_available

TOKENS = (16, 32)


def layers(model: Model, tokens: int) -> Callable[[], torch.Tensor]:
    """All layers of a model over one block of `tokens` tokens, a cache of their own."""
    f, cache = full_forward(torch.randint(0, model.config.vocab_size - 2, (1, tokens))), model.new_cache(1, tokens)
    return lambda: model.backbone(f, cache)


def head(model: Model, tokens: int) -> Callable[[], torch.Tensor]:
    hidden = torch.randn(tokens, model.config.d_model, dtype=model.dtype)
    return lambda: head_stats(hidden, model.head).values


def case(name: str, model: Model, run: Callable[[], torch.Tensor], tokens: int, each: int, **measured) -> dict:
    def split() -> torch.Tensor:
        with one_by_one(model):
            return run()

    if not torch.equal(run(), split()):
        raise SystemExit(f"{name}: the op and its parts differ")
    products = Recorded(model, run, complete=False)
    times = timing.measure({"op": run, "one by one": split, "products": products.run}, **measured)
    return {
        "op": name, "tokens": tokens, "ours": report.seconds(times["op"] / each), "one by one": report.seconds(times["one by one"] / each),
        "products": report.seconds(times["products"] / each), "one by one / ours": times["one by one"] / times["op"],
        "ours / products": times["op"] / times["products"],
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a small model, few samples: shows that the script works, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    measured, most_experts = dict(rounds=7, min_time=0.3, min_samples=3), 128
    if args.quick:
        args.width, args.layers, args.vocab = 64, 1, 256
        measured, most_experts = dict(rounds=1, min_time=0.0, min_samples=1), 16
    dtype = torch.bfloat16 if packing_available(torch.bfloat16) else torch.float32
    table = []
    for name, op in (("sdar 4", "decoder_layer"), ("fast_dllm_v2", "decoder_layer, biases"), ("sdar_moe", "decoder_layer + moe_experts")):
        layout = next(layout for layout in LAYOUTS if layout.name == name)
        model = random_model(layout.config(args.width, args.layers, args.vocab, most_experts), dtype=dtype, std=0.05)
        for tokens in TOKENS:
            table.append(case(f"{op} ({name})", model, layers(model, tokens), tokens, args.layers, **measured))
            if op == "decoder_layer":
                table.append(case("head_stats", model, head(model, tokens), tokens, 1, **measured))
    notes = [
        f"d {args.width}, {args.layers} layers taking turns (times are of one), vocabulary {args.vocab}, {dtype}, {args.threads} threads; medians",
        "of the layers: embedding and final norm of the forward are counted, a few microseconds a layer; the bits are compared before timing",
    ]
    report.write("op_decoder_layer-quick" if args.quick else "op_decoder_layer", "Ops that hold several products", {"Ops": table}, notes)


if __name__ == "__main__":
    main()
