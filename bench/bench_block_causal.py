"""What the fused store of block-causal decoding saves, and what a block step costs beside its GEMMs alone.

A random bf16 model (d 512, 4 layers, no checkpoint needed) decodes blocks of 4 with the threshold that comes closest to two steps a block.
`unfused` is the authors' loop (unmask.compat.llada2.generate_cached: a forward of its own stores each finished block), `fused` is
unmask.generate, which stores a block in the next one's first forward. Both commit by the same rule; the tokens are checked to be equal.
The GEMM floor runs the same products, forward by forward, with the model's own packed weights. All rivals take turns in the same rounds.

Wanted: at least 20% of the time saved, at most 1.35 times the GEMMs for a block step.

    python bench/bench_block_causal.py [--quick]
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

import torch

import report
import timing
import unmask
from gemm_floor import Gemms
from unmask.compat import llada2
from unmask.decode.backend import NativeBackend
from unmask.models.config import ModelConfig
from unmask.models.model import Model, random_model
from unmask.ops.linear import pad_rows

WANTED_SAVED, WANTED_RATIO = 0.20, 1.35
STEPS = 2.0  # a block


def config(block: int, d: int, layers: int, ffn: int, vocab: int) -> ModelConfig:
    """SDAR's layout: grouped heads of 64, qk-norm."""
    heads = d // 64
    return ModelConfig(
        family="sdar", d_model=d, n_layers=layers, n_heads=heads, n_kv_heads=max(heads // 4, 1), head_dim=64, ffn_dim=ffn, vocab_size=vocab,
        rope_theta=1e6, rotary_dim=64, norm_eps=1e-6, qkv_bias=False, qk_norm=True, tied_head=False, mask_id=vocab - 1, eos_ids=(vocab - 2,),
        pad_id=vocab - 2, max_positions=1 << 15, block_size=block, shifted=False, visibility="block_causal",
    )  # fmt: skip


def fused(model: Model, prompts: list[list[int]], new: int, threshold: float) -> list[unmask.Result]:
    return unmask.generate(model, prompts, policy="llada2", threshold=threshold, max_new_tokens=new, eos_stop=False)


def unfused(model: Model, prompt: list[int], new: int, threshold: float) -> tuple[torch.Tensor, dict]:
    c = model.config
    return llada2.generate_cached(
        model, torch.tensor([prompt]), block_length=c.block_size, gen_length=new, threshold=threshold, editing_threshold=2.0, max_post_steps=0,
        mask_id=c.mask_id, eos_id=c.vocab_size,  # no id: nothing is cut
    )  # fmt: skip


def threshold_for(model: Model, prompt: list[int], new: int) -> tuple[float, float]:
    """(threshold, steps a block) closest to STEPS; the steps rise with the threshold."""
    blocks = new // model.config.block_size
    low, high, best = 0.0, 1.0, (1.0, float("inf"))
    for _ in range(12):
        middle = (low + high) / 2
        steps = fused(model, [prompt], new, middle)[0].nfe / blocks
        if abs(steps - STEPS) < abs(best[1] - STEPS):
            best = middle, steps
        low, high = (middle, high) if steps < STEPS else (low, middle)
    return best


def forwards(run) -> Counter[tuple[int, int]]:
    """How often a run's forwards brought each (rows of the products, rows that the head reads), padded as in the decoder."""
    kinds: Counter[tuple[int, int]] = Counter()
    stats = NativeBackend.stats

    def watched(self, plan, live, *args, **options):
        kinds[pad_rows(plan.flat.shape[0]), pad_rows(int(live.sum()))] += 1
        return stats(self, plan, live, *args, **options)

    NativeBackend.stats = watched
    try:
        run()
    finally:
        NativeBackend.stats = stats
    return kinds


def save(args: argparse.Namespace, **measured) -> tuple[dict, float]:
    """The row of the first table, and the share of the time that fusing saves."""
    model = random_model(config(4, args.width, args.layers, args.ffn, args.vocab), dtype=torch.bfloat16, std=args.std)
    prompt = torch.randint(0, args.vocab - 2, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    threshold, steps = threshold_for(model, prompt, args.tokens)
    (ours,), (x, stats) = fused(model, [prompt], args.tokens, threshold), unfused(model, prompt, args.tokens, threshold)
    if x[0].tolist() != ours.canvas:
        raise SystemExit("the fused store changed a token")
    times = timing.measure(
        {"fused": lambda: fused(model, [prompt], args.tokens, threshold), "unfused": lambda: unfused(model, prompt, args.tokens, threshold)},
        **measured,
    )
    saved = 1.0 - times["fused"] / times["unfused"]
    row = {
        "block": 4, "threshold": threshold, "steps a block": steps, "forwards fused": ours.nfe, "unfused": stats["nfe"],
        "fused ms": times["fused"] * 1e3, "unfused ms": times["unfused"] * 1e3, "saved": saved, "tokens equal": True,
    }  # fmt: skip
    return row, saved


def step(args: argparse.Namespace, block: int, rows: int, **measured) -> tuple[dict, float]:
    """The row of the second table, and the decoder's time over its GEMMs'."""
    model = random_model(config(block, args.width, args.layers, args.ffn, args.vocab), dtype=torch.bfloat16, std=args.std)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, args.vocab - 2, (block,), generator=generator).tolist() for _ in range(rows)]
    gemms, new = Gemms.of_model(model), max(args.tokens, 2 * block) // block * block

    def run() -> list[unmask.Result]:
        return fused(model, prompts, new, 1.0)

    counts, nfe = forwards(run), max(r.nfe for r in run())
    times = timing.measure({"decode": run, "gemms": lambda: gemms.run(counts)}, **measured)
    ratio = times["decode"] / times["gemms"]
    row = {
        "block": block, "rows": rows, "forwards": nfe, "step ms": times["decode"] / nfe * 1e3, "GEMMs ms": times["gemms"] / nfe * 1e3,
        "ratio": ratio, "wanted": WANTED_RATIO,
    }  # fmt: skip
    return row, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="d_model, a multiple of 64 (default: 512)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, a multiple of 4 (default: 64)")
    parser.add_argument("--std", type=float, default=0.05, help="standard deviation of the weights: how sure the random model is")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a small model, few samples: shows that the script works, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = dict(rounds=5, min_time=0.5, min_samples=3)
    shapes = [(4, 1), (4, 8), (8, 1), (32, 1), (32, 4)]
    if args.quick:
        args.width, args.layers, args.ffn, args.vocab, args.tokens = 64, 2, 96, 512, 16
        measured, shapes = dict(rounds=1, min_time=0.0, min_samples=1), [(4, 1)]
    saved_row, saved = save(args, **measured)
    steps = [step(args, *shape, **measured) for shape in shapes]
    worst = max(ratio for _, ratio in steps)
    load = f"load when done {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    notes = [
        f"d {args.width}, {args.layers} layers, ffn {args.ffn}, vocabulary {args.vocab}, bf16, {args.threads} threads; medians; {load}",
        f"fused store: {saved:.0%} saved, wanted {WANTED_SAVED:.0%}: {'reached' if saved >= WANTED_SAVED else 'missed'}",
        f"block step: at most {worst:.2f} times its GEMMs, wanted {WANTED_RATIO}: {'reached' if worst <= WANTED_RATIO else 'missed'}",
        "the decoder's time is that of whole runs (schedule, statistics, commit, results), divided by its forwards",
    ]
    report.write(
        "block_causal-quick" if args.quick else "block_causal", "Block-causal decoding: the fused store, and a block step beside its GEMMs",
        {"Fused store": [saved_row], "A block step beside its GEMMs": [row for row, _ in steps]}, notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
