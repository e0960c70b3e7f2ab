"""What a denoise step costs beside its GEMMs alone, in the layout of every family that unmask loads.

    ratio = median time of a decode / median time of its products alone (recorded_floor.py), both taking turns in the same rounds

A decode is unmask.generate from a short prompt to --tokens new ones, one a forward (threshold 1): schedule, statistics, commit and results
count, and so do the forwards that open a block or refresh a cache, on both sides. Models are random, bf16, d 512 with heads of 64, 4
layers of the layout's kind (LLaDA2: a dense one before them), no checkpoint needed. Widths of FFNs and experts (over d), query heads per
K/V head (Dream's 7 become 8), numbers of experts and of chosen ones are those of LLaDA-8B, Dream-7B, LLaDA-MoE-7B-A1B, LLaDA2.0-mini, SDAR-8B,
Qwen3-30B-A3B (which SDAR-30B-A3B comes from) and Fast-dLLM v2 7B: fewer experts would be fewer and longer products than a step really has.
All masks share an embedding: only large weights (--std) let attention send them to different experts, as a trained router does.

Wanted: at most 1.35 in every layout.

    python bench/bench_layouts.py [--quick] [--only llada2 "sdar 4" ...]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

import report
import timing
import unmask
from recorded_floor import Recorded
from unmask.models.config import Experts, ModelConfig
from unmask.models.model import Model, random_model

WANTED = 1.35
HEAD_DIM = 64


@dataclass(frozen=True)
class Mixture:
    """inner: width of an expert over d. shared: shared experts of that width. The rest as in `unmask.models.config.Experts`."""

    n: int
    top_k: int
    inner: float
    normalized: bool
    shared: int = 0
    first_dense: int = 0
    router: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """q: width of all query heads over d; group: query heads that share a K/V head; ffn: width of a dense FFN over d.

    special: fields of ModelConfig beside the sizes. run: settings of unmask.generate.
    """

    name: str
    family: str
    group: int
    ffn: float
    q: float = 1.0
    mixture: Mixture | None = None
    special: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def config(self, d: int, layers: int, vocab: int, most_experts: int) -> ModelConfig:
        heads, m = int(self.q * d) // HEAD_DIM, self.mixture
        group, dense = min(self.group, heads), m.first_dense if m else 0
        free = dict(rotary_dim=HEAD_DIM, qkv_bias=False, qk_norm=False, block_size=None, shifted=False, visibility="bidirectional")
        return ModelConfig(
            family=self.family, d_model=d, n_layers=layers + dense, n_heads=heads, n_kv_heads=heads // group, head_dim=HEAD_DIM,
            ffn_dim=round(self.ffn * d / 64) * 64, vocab_size=vocab, rope_theta=1e6, norm_eps=1e-6, tied_head=False, mask_id=vocab - 1,
            eos_ids=(vocab - 2,), pad_id=vocab - 2, max_positions=1 << 15, experts=self._experts(d, layers, most_experts),
            **free | dict(self.special),
        )  # fmt: skip

    def _experts(self, d: int, layers: int, most: int) -> Experts | None:
        m = self.mixture
        if m is None:
            return None
        inner = int(m.inner * d)
        free = dict(scoring="softmax", selection_bias=False, n_groups=1, kept_groups=1, scale=1.0)
        return Experts(
            layers=tuple(range(m.first_dense, m.first_dense + layers)), n_experts=min(m.n, most), top_k=m.top_k, expert_dim=inner,
            shared_dim=m.shared * inner, normalized=m.normalized, **free | dict(m.router),
        )  # fmt: skip


def block_causal(size: int, **more: Any) -> dict[str, Any]:
    return dict(visibility="block_causal", block_size=size, **more)


GROUPS = dict(scoring="sigmoid", selection_bias=True, n_groups=8, kept_groups=4, scale=2.5)
DUAL = dict(cache="dual", block_size=32)
SDAR_MOE = Mixture(128, 8, 0.375, normalized=True)
LAYOUTS = (
    Layout("llada", "llada", 1, 3.0, run=DUAL),
    Layout("dream", "dream", 7, 18944 / 3584, special=dict(qkv_bias=True, shifted=True), run=DUAL),
    Layout("llada_moe", "llada_moe", 1, 4.0, mixture=Mixture(64, 8, 0.5, normalized=False), special=dict(qk_norm=True), run=DUAL),
    Layout(
        "llada2", "llada2", 4, 2.5, mixture=Mixture(256, 8, 0.25, normalized=True, shared=1, first_dense=1, router=GROUPS),
        special=block_causal(32, qk_norm=True, rotary_dim=HEAD_DIM // 2),
    ),
    Layout("sdar 4", "sdar", 4, 3.0, special=block_causal(4, qk_norm=True)),
    Layout("sdar 8", "sdar", 4, 3.0, special=block_causal(8, qk_norm=True)),
    Layout("sdar_moe", "sdar", 8, 3.0, q=2.0, mixture=SDAR_MOE, special=block_causal(4, qk_norm=True)),
    Layout("fast_dllm_v2", "fast_dllm_v2", 7, 18944 / 3584, special=block_causal(32, qkv_bias=True, shifted=True), run=dict(block_size=8)),
)  # fmt: skip


def step(layout: Layout, model: Model, rows: int, tokens: int, **measured) -> dict[str, Any]:
    """The row of the table for a batch of `rows`."""
    generator = torch.Generator().manual_seed(2)
    c = model.config
    # whole blocks where there are any: a prompt that ends within one would shorten the first
    prompts = torch.randint(0, c.vocab_size - 2, (rows, c.block_size or 16), generator=generator).tolist()

    def run() -> list[unmask.Result]:
        return unmask.generate(model, prompts, threshold=1.0, max_new_tokens=tokens, eos_stop=False, **layout.run)

    products, nfe = Recorded(model, run), max(r.nfe for r in run())
    times = timing.measure({"decode": run, "gemms": products.run}, **measured)
    row = {
        "layout": layout.name, "rows": rows, "forwards": nfe, "products a forward": len(products.calls) / nfe,
        "step ms": times["decode"] / nfe * 1e3, "GEMMs ms": times["gemms"] / nfe * 1e3, "ratio": times["decode"] / times["gemms"], "wanted": WANTED,
    }  # fmt: skip
    if c.experts is not None:
        row["experts with rows"] = products.expert_calls / 2 / nfe / len(c.experts.layers)  # each has two products
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="d_model, a multiple of 64 (default: 512)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, a multiple of 32 (default: 64)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--std", type=float, default=0.2, help="standard deviation of the weights: how far masks part at the routers (default: 0.2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=[layout.name for layout in LAYOUTS], help="these layouts (default: all)")
    parser.add_argument("--quick", action="store_true", help="small models, few samples: shows that the script works, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured, most_experts = dict(rounds=5, min_time=0.4, min_samples=1), 1 << 12  # a run of a mixture takes seconds
    if args.quick:
        args.width, args.layers, args.vocab, args.tokens, args.rows = 64, 1, 256, 32, [1]
        measured, most_experts = dict(rounds=1, min_time=0.0, min_samples=1, warmup=0), 16
    layouts = [layout for layout in LAYOUTS if args.only is None or layout.name in args.only]
    table = []
    with tqdm(total=len(layouts) * len(args.rows), disable=None) as bar:
        for layout in layouts:
            model = random_model(layout.config(args.width, args.layers, args.vocab, most_experts), dtype=torch.bfloat16, std=args.std)
            for rows in args.rows:
                bar.set_description(f"{layout.name}, {rows} rows")
                table.append(step(layout, model, rows, args.tokens, **measured))
                bar.update()
            del model  # before the next is made
    worst = max(table, key=lambda row: row["ratio"])
    missed = sorted({row["layout"] for row in table if row["ratio"] > WANTED})
    load = f"load when done {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    notes = [
        f"d {args.width}, {args.layers} layers (LLaDA2: and a dense one), vocabulary {args.vocab}, bf16, {args.threads} threads; medians; {load}",
        f"worst: {worst['layout']}, {worst['rows']} rows, {worst['ratio']:.2f} times its GEMMs, wanted {WANTED}; missed by: {', '.join(missed) or 'none'}",
        "a step's time is that of whole runs divided by their forwards; products without biases, with the rows that the run gave them",
    ]
    report.write("layouts-quick" if args.quick else "layouts", "A denoise step beside its GEMMs, in every layout", {"Steps": table}, notes)


if __name__ == "__main__":
    main()
