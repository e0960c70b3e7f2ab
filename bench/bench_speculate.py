"""What self-speculation saves in forwards, and what verifying N candidates costs beside one forward of as many rows.

Forwards: the embedded model on its own tasks and the golden checkpoints on their recorded prompts, one token per step, N = 4: forwards of
the plain run over those of the speculative one, mean accepted length (steps a forward), tokens compared.
Cost: a random model (no checkpoint needed). One forward that verifies N nodes of one row, their windows sharing the row's prefix and suffix
in the K/V cache, against one forward of N rows' windows of as many tokens, each on a cache row of its own: the same query rows, no sharing.
Memory: the K/V cache of both, the largest growth of the process's memory in a run, and what N copies of the prefix would have taken.

    python bench/bench_speculate.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

import report
import timing
import unmask
from unmask.decode.backend import NativeBackend, make_plan
from unmask.decode.schedule import FixedBlocks
from unmask.decode.state import DecodeState
from unmask.models.config import ModelConfig
from unmask.models.model import Model, random_model
from unmask.speculate.layout import place
from unmask.speculate.nodes import NodeState

ROOT = Path(__file__).resolve().parent.parent
WANTED_NFE, WANTED_COST = 1.6, 1.15
PROMPTS = [
    "add 47 + 38 low first =>", "sort d a c b =>", "reverse d a c b =>", "close ([{ =>", "json ann is 31 and lives in paris =>",
    "json leo works in tokyo as a baker =>", "function f adds x and y =>", "pair near 42 with sum 76 =>", "finish (()( in 4 =>",
]  # fmt: skip
METHODS = ("ssd", "ssd:tree=positions", "ssd:tree=tokens", "freedave", "freedave:attention=tree")


def saved(name: str, model: Model, rows: list, cache: str, method: str, **settings) -> dict:
    """One row of the first table. Stops if a token differs."""
    settings = dict(policy="quota", cache=cache, eos_stop=False) | settings
    plain = unmask.generate(model, rows, **settings)
    fast = unmask.generate(model, rows, speculate=method, draft=4, **settings)
    if [r.canvas for r in plain] != [r.canvas for r in fast]:
        raise SystemExit(f"{name}, {cache}, {method}: speculation changed a token")
    a, b, accepted = sum(r.nfe for r in plain), sum(r.nfe for r in fast), sum(r.accepted for r in fast)
    drafted = sum(r.drafted for r in fast)
    return {
        "model": name, "cache": cache, "method": method, "plain NFE": a, "NFE": b, "ratio": a / b, "mean accepted length": (b + accepted) / b,
        "accepted of drafted": accepted / drafted if drafted else 0.0,
        "rows forwarded": sum(r.rows_forwarded for r in fast) / sum(r.rows_forwarded for r in plain), "tokens equal": True,
    }  # fmt: skip


def forwards(quick: bool) -> list[dict]:
    out = []
    tiny = unmask.load("tiny")
    prompts, methods = (PROMPTS[:2], METHODS[:1]) if quick else (PROMPTS, METHODS)
    out += [saved("tiny", tiny, prompts, "dual", method, max_new_tokens=32, block_size=32) for method in methods]
    out += [saved("tiny", tiny, prompts, cache, "ssd", max_new_tokens=32, block_size=32) for cache in ("none", "prefix")]
    sys.path.insert(0, str(ROOT / "tests"))
    import golden_runs

    for family in (*golden_runs.FAMILIES, *golden_runs.BLOCK_FAMILIES):
        model = golden_runs.load(family)
        rows = [r.data["prompt_ids"][0] for r in (*golden_runs.RUNS, *golden_runs.BLOCK_RUNS) if r.family == family][: 1 if quick else 3]
        for cache in ("block",) if model.config.visibility == "block_causal" else ("none", "dual"):
            out += [saved(f"golden {family}", model, rows, cache, m, max_new_tokens=32) for m in ("ssd", "freedave")]
    return out


def config(width: int, layers: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        family="llada", d_model=width, n_layers=layers, n_heads=width // 64, n_kv_heads=width // 64, head_dim=64, ffn_dim=3 * width,
        vocab_size=vocab, rope_theta=5e5, rotary_dim=64, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_head=False, mask_id=vocab - 1,
        eos_ids=(vocab - 2,), pad_id=vocab - 2, max_positions=1 << 15, block_size=None, shifted=False, visibility="bidirectional",
    )  # fmt: skip


def state(rows: int, length: int, block: int, mask_id: int) -> DecodeState:
    canvas = torch.arange(length).remainder(100).tolist()
    given = [True] * (length - 2 * block) + [False] * (2 * block)
    return DecodeState([canvas] * rows, [given] * rows, mask_id, FixedBlocks(block), None, list(range(rows)), torch.device("cpu"))


class Step:
    """A step's forward and statistics on the blocks of some entries."""

    def __init__(self, model: Model, s: DecodeState, backend: NativeBackend, plan):
        self.backend, self.plan = backend, plan
        self.live = s.masked.view(-1).index_select(0, plan.cand_flat)

    @torch.inference_mode()
    def run(self) -> None:
        self.backend.stats(self.plan, self.live)


def verify(model: Model, nodes: int, length: int, block: int, tree: bool) -> Step:
    s = NodeState(state(1, length, block, model.config.mask_id), nodes)
    backend = NativeBackend(model, s, model.config.mask_id, extra_slots=(nodes - 1) * block, kv_rows=1)
    first = s.rows[0].block_start
    plan = make_plan(s, tuple((j, first, first + block, first, first + block) for j in range(nodes)))
    return Step(model, s, backend, place(s, plan, None, tree))


def rows_alone(model: Model, rows: int, length: int, block: int) -> Step:
    s = state(rows, length, block, model.config.mask_id)
    first = s.rows[0].block_start
    plan = make_plan(s, tuple((j, first, first + block, first, first + block) for j in range(rows)))
    return Step(model, s, NativeBackend(model, s, model.config.mask_id), plan)


def costs(args: argparse.Namespace, model: Model, **measured) -> tuple[list[dict], float]:
    out, worst = [], 0.0
    for n in args.nodes:
        steps = {
            "verify": verify(model, n, args.length, args.block, False), "tree": verify(model, n, args.length, args.block, True),
            "rows": rows_alone(model, n, args.length, args.block), "one": rows_alone(model, 1, args.length, args.block),
        }  # fmt: skip
        times = timing.measure({k: s.run for k, s in steps.items()}, **measured)
        ratio = times["verify"] / times["rows"]
        worst = max(worst, ratio)
        kv = {k: sum(t.numel() * t.element_size() for t in (s.backend.cache.k, s.backend.cache.v)) / 1e6 for k, s in steps.items()}
        out.append({
            "N": n, "query rows": n * args.block, "one node ms": times["one"] * 1e3, "N rows ms": times["rows"] * 1e3, "verify ms": times["verify"] * 1e3,
            "ratio": ratio, "wanted": WANTED_COST, "as a tree": times["tree"] / times["rows"], "K/V MB": kv["verify"], "of N rows": kv["rows"],
        })  # fmt: skip
    return out, worst


CHILD = """
import sys, torch
sys.path.insert(0, {bench!r})
import bench_memory as m, bench_speculate as b
torch.set_num_threads(1)
model = b.random_model(b.config({width}, {layers}, {vocab}), dtype=torch.float32, std=0.05)
prompt = list(range(100)) * ({length} // 100)
options = dict(max_new_tokens=16, block_size=16, cache="dual", policy="quota", eos_stop=False)
b.unmask.generate(model, prompt[:64], **options)
m.reset_peak()
base = m.rss()
b.unmask.generate(model, prompt, **options, **{extra!r})
print((m.peak_rss() - base) / 1e6)
"""


def memory(args: argparse.Namespace) -> list[dict]:
    """Growth of the process by one run with a long prompt, a fresh process each."""
    out, grown = [], {}
    kv = 2 * args.layers * args.width * 4 / 1e6  # MB a position, fp32
    for name, extra in (("plain", {}), ("ssd, N = 4", dict(speculate="ssd", draft=4)), ("ssd, N = 8", dict(speculate="ssd", draft=8))):
        code = CHILD.format(bench=str(ROOT / "bench"), width=args.width, layers=args.layers, vocab=args.vocab, length=args.memory_length, extra=extra)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
        grown[name] = float(done.stdout.split()[-1])
        n = extra.get("draft", 1)
        out.append({
            "run": name, "prompt": args.memory_length, "peak growth MB": grown[name], "more than plain MB": grown[name] - grown["plain"],
            "K/V of the row MB": kv * (args.memory_length + 16), "N - 1 windows MB": kv * 16 * (n - 1),
            "N - 1 copies would be MB": kv * args.memory_length * (n - 1),
        })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="positions of a row in the cost table (default: 512)")
    parser.add_argument("--memory-length", type=int, default=2000, help="prompt of the memory table, a multiple of 100")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="small and few samples: shows that the script works, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.nodes, measured = (2, 4, 8), dict(rounds=5, min_time=0.1, min_samples=3)
    if args.quick:
        args.width, args.layers, args.vocab, args.length, args.memory_length, args.nodes = 64, 2, 512, 128, 200, (2,)
        measured = dict(rounds=1, min_time=0.0, min_samples=1)
    saved_rows = forwards(args.quick)
    model = random_model(config(args.width, args.layers, args.vocab), dtype=torch.float32, std=0.05)
    cost, worst = costs(args, model, **measured)
    grown = memory(args)
    chains = [r for r in saved_rows if r["model"] == "tiny" and r["method"] in ("ssd", "freedave") and r["cache"] == "dual"]
    least = min(r["ratio"] for r in chains)
    golden = [r for r in saved_rows if r["model"] != "tiny"]
    load = f"load when done {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    notes = [
        f"forwards on tiny at N = 4 (ssd and freedave, dual cache): at least {least:.2f} times fewer, wanted {WANTED_NFE}: "
        + ("reached" if least >= WANTED_NFE else "missed"),
        f"golden checkpoints: NFE never higher {all(r['ratio'] >= 1 for r in golden)}, "
        f"mean accepted length above 1 {all(r['mean accepted length'] > 1 for r in golden)}",
        f"verifying N candidates: at most {worst:.2f} times a forward of as many rows, wanted {WANTED_COST}: {'reached' if worst <= WANTED_COST else 'missed'}",
        "mean accepted length: plain steps that a forward makes; rows forwarded: positions, over those of the plain run",
        f"costs: d {args.width}, {args.layers} layers, vocabulary {args.vocab}, rows of {args.length}, blocks of {args.block}, "
        f"fp32, {args.threads} threads, medians; {load}",
        "K/V MB: of the cache that verifies N nodes of one row; of N rows: of the cache in which each has its own",
    ]
    report.write(
        "speculate-quick" if args.quick else "speculate", "Self-speculation: forwards saved, cost of verifying, memory",
        {"Forwards": saved_rows, "Verifying N nodes of a row beside a forward of N rows": cost, "Peak memory, one thread, 16 new tokens": grown}, notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
