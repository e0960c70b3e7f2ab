"""Call overhead: microseconds per call of every op at the smallest sizes, through torch.ops and through the wrapper in unmask.ops.

Wanted: 6 us up to 12 arguments, 9 us above; the wrapper adds at most 2 us. One thread (a tiny call never starts others).
`torch alone` is the floor, measured in the same run: an op with the same schema that reads nothing and returns as many new tensors
(floor_ops.cpp). `ours us` is what our code adds to it.

    python bench/bench_overhead.py [--quick]
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

import floor_ops
import report
import timing
from unmask import ops
from unmask.cli.examples import examples
from unmask.ops.logit_stats import new_state, stats_finish, stats_tile

WANTED_FEW, WANTED_MANY, WANTED_WRAPPER, FEW_ARGUMENTS = 6.0, 9.0, 2.0, 12


def tiny_calls() -> dict[str, tuple[tuple, object]]:
    """Op -> (torch.ops arguments in schema order, the same call through the wrapper), one token or row, few channels."""
    i = torch.zeros(1, dtype=torch.int64)
    x, weight, pair = torch.randn(1, 8), torch.randn(8), torch.randn(1, 16)
    q = torch.randn(1, 1, 8)
    k_cache, v_cache = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
    inv_freq, cu, seg = torch.ones(4), torch.tensor([0, 1]), torch.tensor([[[0, 1]]])
    logits = torch.randn(1, 16)
    lse = logits.logsumexp(1)
    state, finished = new_state(1), new_state(1)
    stats_tile(logits, finished, offset=0, vocab=16)
    canvas, masked = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    score, bar = torch.ones(1), torch.ones(1)
    place, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    chain = torch.zeros(1, 1, 1, dtype=torch.int64)
    none = (None,) * 5
    rope = (q, q, q, k_cache, v_cache, i, i, i, None, None, None, inv_freq, 1e-5)
    return {
        "uniform": ((i, i, i), lambda: ops.uniform(i, i, i)),
        "rms_norm": ((x, weight, 1e-5), lambda: ops.rms_norm(x, weight, 1e-5)),
        "add_rms_norm": ((x, x.clone(), weight, 1e-5), lambda: ops.add_rms_norm(x, x, weight, 1e-5)),
        "silu_mul": ((pair,), lambda: ops.silu_mul(pair)),
        "rope_append": (rope, lambda: ops.rope_append(*rope)),
        "block_attention": (
            (q, k_cache, v_cache, cu, i, seg, None, None, 0.3), lambda: ops.block_attention(q, k_cache, v_cache, cu, i, seg, None, None, 0.3),
        ),
        "logit_stats": ((logits, None, *none, 0, 0.0, None, None, None, None, 1.0), lambda: ops.logit_stats(logits)),
        "filtered_stats": (
            (logits, None, None, None, None, None, 0.0, 0.9, 4, False, None, None, None), lambda: ops.filtered_stats(logits, top_p=0.9, top_k=4),
        ),
        "kl_stats": (
            (logits, logits, None, None, lse, lse), lambda: ops.kl_stats(logits, logits, lse=lse, previous_lse=lse),
        ),
        "stats_tile": (
            (logits, state, None, 0, 16, *none, 0, 0.0, None, None, None), lambda: stats_tile(logits, state, offset=0, vocab=16),
        ),
        "stats_finish": ((finished, None, 0), lambda: stats_finish(finished)),
        "commit": (
            (canvas, masked, cu, i, i, i, score, None, None, None, 1, [], None, bar),
            lambda: ops.commit(canvas, masked, cu, i, i, i, score, rule=1, threshold=bar),
        ),
        "verify_greedy": ((chain, chain, None, i, -1, False, None), lambda: ops.verify_greedy(chain, chain, None, i)),
        "verify_ratio": (
            (logits, logits, i, i, i, cu, i, i, i, None, None, 1.0, 1.0, True), lambda: ops.verify_ratio(logits, logits, i, i, i, cu, i, i, i),
        ),
        "moe_route": ((logits, None, None, 1, 1, 1, 2, True, 1.0, 1), lambda: ops.moe_route(logits, top_k=2)),
        "moe_combine": ((x, place, one), lambda: ops.moe_combine(x, place, one)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    calls = tiny_calls()
    missing = {e.op for e in examples()} - set(calls) - {"info"}
    if missing:
        raise SystemExit(f"no tiny call for {sorted(missing)}")
    floor_ops.load(list(calls))
    fns = {"empty lambda": lambda: None}
    for name, (op_args, wrapper) in calls.items():
        op, floor = getattr(torch.ops.unmask, name), getattr(torch.ops.unmask_floor, name)
        fns[f"{name} op"] = lambda op=op, op_args=op_args: op(*op_args)
        fns[f"{name} floor"] = lambda op=floor, op_args=op_args: op(*op_args)
        fns[f"{name} wrapper"] = wrapper
    times = {}
    with torch.inference_mode():
        for name in tqdm(calls, unit="op"):
            pair = {label: fns[label] for label in (f"{name} op", f"{name} floor", f"{name} wrapper", "empty lambda")}
            times |= timing.measure(
                pair, rounds=3 if args.quick else 9, min_time=0.02 if args.quick else 0.05, sample_time=2e-3
            )
    rows, slow = [], []
    for name in calls:
        arguments = len(getattr(torch.ops.unmask, name).default._schema.arguments)
        op, floor, wrapper = ((times[f"{name} {kind}"] - times["empty lambda"]) * 1e6 for kind in ("op", "floor", "wrapper"))
        wanted = WANTED_FEW if arguments <= FEW_ARGUMENTS else WANTED_MANY
        low = (times[f"{name} op"].p10 - times["empty lambda"].p10) * 1e6
        row = {
            "op": name,
            "arguments": arguments,
            "torch.ops us": op,
            "wanted": wanted,
            "10th percentile us": low,
            "torch alone": floor,
            "ours us": op - floor,
        }
        rows.append(row | {"wrapper us": wrapper, "wrapper adds us": wrapper - op})
        if op > wanted or wrapper - op > WANTED_WRAPPER:
            slow.append(name)
    notes = ["median per call, inference mode, one thread; the cost of an empty lambda call is taken off"]
    notes.append(f"too slow: {', '.join(slow)}" if slow else "all within the wanted overhead")
    report.write(
        "overhead-quick" if args.quick else "overhead",
        "Call overhead at tiny sizes",
        {"Microseconds per call": rows},
        notes,
    )


if __name__ == "__main__":
    main()
